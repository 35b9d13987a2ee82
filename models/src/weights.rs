//! A network's values in one flat vector, in the order in which burn visits the module.
//!
//! Everything that must be reproducible bit for bit happens here in plain arithmetic rather than
//! in a framework: seeded initialisation (burn's generator is global to the process), growing the
//! classifier, folding batch norms, and, in the trainer, averaging and stepping.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

#[cfg(feature = "std")]
use burn::module::ModuleVisitor;
use burn::module::{Module, ModuleMapper, Param};
#[cfg(feature = "std")]
use burn::tensor::Gradients;
use burn::tensor::{Device, Tensor, TensorData};
#[cfg(feature = "std")]
use rand::{Rng, SeedableRng};
#[cfg(feature = "std")]
use rand_chacha::ChaCha8Rng;

#[cfg(feature = "std")]
use crate::net::Net;
use crate::net::{BN_EPSILON, Frozen, NetConfig};
use crate::{ModelError, record};

/// What a tensor is for, which decides how it is initialised and whether an optimiser touches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A convolution or dense matrix: trained, with weight decay.
    Matrix,
    /// A bias or batch norm's beta: trained, no decay, starts at 0.
    Offset,
    /// Batch norm's gamma: trained, no decay, starts at 1.
    Scale,
    /// Batch norm's running mean: not trained, starts at 0.
    RunningMean,
    /// Batch norm's running variance: not trained, starts at 1.
    RunningVar,
}

impl Role {
    /// Whether gradients reach it.
    pub fn trained(self) -> bool {
        !matches!(self, Self::RunningMean | Self::RunningVar)
    }
}

/// One tensor's place in [`Weights::values`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// burn's path of the tensor, as in the record: `blocks.0.conv.weight`.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Position in the flat vector.
    pub range: Range<usize>,
    /// What it is for.
    pub role: Role,
    /// Inputs of one output unit, for initialisation.
    #[cfg_attr(not(feature = "std"), allow(dead_code))]
    fan_in: usize,
}

/// The values of one [`Net`].
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    config: NetConfig,
    slots: Arc<[Slot]>,
    values: Vec<f32>,
}

impl Weights {
    /// Fresh weights: He-normal matrices (He et al. 2015, `σ² = 2 / fan_in`), the classifier at
    /// `σ² = 1 / fan_in`, zero offsets, unit scales. The same seed gives the same values
    /// everywhere.
    ///
    /// # Errors
    /// [`ModelError::Config`].
    #[cfg(feature = "std")]
    pub fn init(config: &NetConfig, seed: u64) -> Result<Self, ModelError> {
        let mut weights = Self::zeros(config)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for slot in weights.slots.clone().iter() {
            let gain = if slot.name == "head.weight" { 1.0 } else { 2.0 };
            let sigma = (gain / slot.fan_in as f32).sqrt();
            for value in &mut weights.values[slot.range.clone()] {
                *value = match slot.role {
                    Role::Matrix => sigma * normal(&mut rng),
                    Role::Offset | Role::RunningMean => 0.0,
                    Role::Scale | Role::RunningVar => 1.0,
                };
            }
        }
        Ok(weights)
    }

    /// All-zero weights in the layout of `config`, to be filled through [`Weights::values_mut`].
    ///
    /// # Errors
    /// [`ModelError::Config`].
    pub fn zeros(config: &NetConfig) -> Result<Self, ModelError> {
        config.validate()?;
        let slots = layout(config);
        let len = slots.last().map_or(0, |slot| slot.range.end);
        Ok(Self {
            config: *config,
            slots: slots.into(),
            values: vec![0.0; len],
        })
    }

    /// Reads a record made by [`Weights::to_record`].
    ///
    /// # Errors
    /// Damaged bytes, or a record of another architecture or shape: see [`ModelError`].
    pub fn from_record(config: &NetConfig, bytes: &[u8]) -> Result<Self, ModelError> {
        record::decode(config, bytes)
    }

    /// The burnpack record of these weights; the same weights give the same bytes.
    ///
    /// # Errors
    /// [`ModelError::Damaged`] if the writer fails (it has no reason to).
    pub fn to_record(&self) -> Result<Vec<u8>, ModelError> {
        record::encode(self)
    }

    /// The network these weights belong to.
    pub fn config(&self) -> &NetConfig {
        &self.config
    }

    /// Where each tensor lies.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// All values, in slot order.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All values, in slot order, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// The values of the tensor called `name`, if there is one.
    pub fn tensor(&self, name: &str) -> Option<&[f32]> {
        self.slots
            .iter()
            .find(|slot| slot.name == name)
            .map(|slot| &self.values[slot.range.clone()])
    }

    /// These weights in a network with more classes. Rows of the old classes are copied, so their
    /// logits do not change; rows of new classes start as small seeded noise with the bias of the
    /// least likely old class, so that they do not steal predictions before they are trained.
    /// Class order is therefore: old classes first, new ones appended.
    ///
    /// # Errors
    /// [`ModelError::Grow`] when `config` differs in anything but a class count at least as large.
    #[cfg(feature = "std")]
    pub fn grow(&self, config: &NetConfig, seed: u64) -> Result<Self, ModelError> {
        let (old, new) = (self.config.classes, config.classes);
        if (NetConfig {
            classes: new,
            ..self.config
        }) != *config
        {
            return Err(ModelError::Grow(format!(
                "the champion is {:?}, the new network {config:?}; only `classes` may differ",
                self.config
            )));
        }
        if new < old {
            return Err(ModelError::Grow(format!(
                "{new} classes are fewer than the champion's {old}"
            )));
        }
        let mut grown = Self::init(config, seed)?;
        let slots = self.slots.clone();
        for (from, to) in slots.iter().zip(grown.slots.clone().iter()) {
            let source = &self.values[from.range.clone()];
            let target = &mut grown.values[to.range.clone()];
            match from.name.as_str() {
                "head.weight" => {
                    for (row, source) in target.chunks_exact_mut(new).zip(source.chunks_exact(old))
                    {
                        row[..old].copy_from_slice(source);
                        row[old..].iter_mut().for_each(|value| *value *= 0.1);
                    }
                }
                "head.bias" => {
                    target[..old].copy_from_slice(source);
                    let least = source.iter().copied().fold(f32::INFINITY, f32::min);
                    target[old..].fill(least);
                }
                _ => target.copy_from_slice(source),
            }
        }
        Ok(grown)
    }

    /// The trainable network on `device` (an autodiff device, to train it).
    #[cfg(feature = "std")]
    pub fn net(&self, device: &Device) -> Net {
        let mut filler = Filler {
            slots: self.slots.iter(),
            values: &self.values,
        };
        Net::empty(&self.config, device).map(&mut filler)
    }

    /// The inference network on `device`, batch norms folded into the convolutions:
    /// `w' = w·γ/√(σ²+ε)`, `b' = β − μ·γ/√(σ²+ε)`.
    pub fn frozen(&self, device: &Device) -> Frozen {
        let (slots, values) = self.fold();
        let mut filler = Filler {
            slots: slots.iter(),
            values: &values,
        };
        Frozen::empty(&self.config, device).map(&mut filler)
    }

    /// What one training step on `net` says about each value, laid out as [`Weights::values`]:
    /// the gradient of a trained tensor, the new value of a running statistic. Both may be averaged
    /// over shards. Must be called on the thread that ran `net`'s forward pass.
    #[cfg(feature = "std")]
    pub fn harvest(&self, net: &Net, grads: &Gradients) -> Vec<f32> {
        net.settle();
        let mut out = vec![0.0; self.values.len()];
        let mut reader = Reader {
            slots: self.slots.iter(),
            grads,
            out: &mut out,
        };
        net.visit(&mut reader);
        out
    }

    /// Slots and values of [`Frozen`], in its visiting order.
    fn fold(&self) -> (Vec<Slot>, Vec<f32>) {
        let mut slots = Vec::new();
        let mut values: Vec<f32> = Vec::with_capacity(self.values.len());
        let mut push = |name: &str, shape: &[usize], add: &mut dyn Iterator<Item = f32>| {
            let start = values.len();
            values.extend(add);
            slots.push(Slot {
                name: name.to_owned(),
                shape: shape.to_vec(),
                range: start..values.len(),
                role: Role::Matrix,
                fan_in: 1,
            });
        };
        let stages = self.config.stages().len();
        // The layout has, for each stage, weight, gamma, beta, mean and variance, in this order.
        let (blocks, rest) = self.slots.split_at(5 * stages);
        for (index, block) in blocks.chunks_exact(5).enumerate() {
            let [weight, gamma, beta, mean, var] =
                [0, 1, 2, 3, 4].map(|i: usize| &self.values[block[i].range.clone()]);
            let scale: Vec<f32> = gamma
                .iter()
                .zip(var)
                .map(|(g, v)| (f64::from(*g) / libm::sqrt(f64::from(*v) + BN_EPSILON)) as f32)
                .collect();
            let per_output = weight.len() / scale.len();
            push(
                &format!("convs.{index}.weight"),
                &block[0].shape,
                &mut weight
                    .iter()
                    .enumerate()
                    .map(|(i, w)| w * scale[i / per_output]),
            );
            push(
                &format!("convs.{index}.bias"),
                &[scale.len()],
                &mut (0..scale.len()).map(|i| beta[i] - mean[i] * scale[i]),
            );
        }
        for slot in rest {
            push(
                &slot.name,
                &slot.shape,
                &mut self.values[slot.range.clone()].iter().copied(),
            );
        }
        (slots, values)
    }
}

/// The tensors of [`Net`] in visiting order; [`Weights::net`] relies on it and a test checks it.
fn layout(config: &NetConfig) -> Vec<Slot> {
    let mut slots: Vec<Slot> = Vec::new();
    let mut push = |name: String, shape: Vec<usize>, role, fan_in| {
        let start = slots.last().map_or(0, |slot| slot.range.end);
        let len: usize = shape.iter().product();
        slots.push(Slot {
            name,
            shape,
            range: start..start + len,
            role,
            fan_in,
        });
    };
    for (i, stage) in config.stages().iter().enumerate() {
        let (k, out) = (stage.kernel, stage.output);
        push(
            format!("blocks.{i}.conv.weight"),
            vec![out, stage.input, k, k],
            Role::Matrix,
            stage.input * k * k,
        );
        for (name, role) in [
            ("gamma", Role::Scale),
            ("beta", Role::Offset),
            ("running_mean", Role::RunningMean),
            ("running_var", Role::RunningVar),
        ] {
            push(format!("blocks.{i}.norm.{name}"), vec![out], role, 1);
        }
    }
    for (name, input, output) in [
        ("embed", config.features(), config.embedding),
        ("head", config.embedding, config.classes),
    ] {
        push(
            format!("{name}.weight"),
            vec![input, output],
            Role::Matrix,
            input,
        );
        push(format!("{name}.bias"), vec![output], Role::Offset, 1);
    }
    slots
}

/// A standard normal value (Box–Muller).
#[cfg(feature = "std")]
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let u = 1.0 - unit(rng);
    let v = unit(rng);
    ((-2.0 * u.ln()).sqrt() * (core::f64::consts::TAU * v).cos()) as f32
}

/// A uniform value in [0, 1).
#[cfg(feature = "std")]
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Fills a module's tensors from slots, in visiting order.
struct Filler<'a> {
    slots: core::slice::Iter<'a, Slot>,
    values: &'a [f32],
}

impl ModuleMapper for Filler<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        // A module with more tensors than the layout would be a bug of this crate, which the
        // layout test catches; it keeps its initial value here.
        let Some(slot) = self.slots.next() else {
            return param;
        };
        let id = param.id;
        let data = TensorData::new(self.values[slot.range.clone()].to_vec(), slot.shape.clone());
        let tensor = Tensor::from_data(data, &param.lazy_device());
        param.transform_for_load(tensor, id)
    }
}

/// Copies gradients and running statistics into a flat vector, in visiting order.
#[cfg(feature = "std")]
struct Reader<'a> {
    slots: core::slice::Iter<'a, Slot>,
    grads: &'a Gradients,
    out: &'a mut [f32],
}

#[cfg(feature = "std")]
impl ModuleVisitor for Reader<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(slot) = self.slots.next() else {
            return;
        };
        let tensor = match slot.role.trained() {
            true => param.val().grad(self.grads),
            false => Some(param.val()),
        };
        // A tensor that the loss does not depend on has no gradient, which is zero.
        if let Some(data) = tensor.map(Tensor::into_data)
            && let Ok(values) = data.as_slice::<f32>()
        {
            self.out[slot.range.clone()].copy_from_slice(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: NetConfig = NetConfig {
        channels: 3,
        width: 32,
        height: 32,
        classes: 5,
        embedding: 64,
    };

    /// Names and shapes as burn visits them.
    #[derive(Default)]
    struct Names {
        path: Vec<String>,
        seen: Vec<(String, Vec<usize>)>,
    }

    impl ModuleVisitor for Names {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.seen
                .push((self.path.join("."), param.val().dims().to_vec()));
        }
    }

    #[test]
    fn the_layout_is_what_burn_visits_at_every_size() {
        for (side, channels) in [(16, 1), (28, 1), (32, 3), (41, 3), (64, 3), (128, 3)] {
            let config = NetConfig {
                width: side,
                height: side,
                channels,
                ..CONFIG
            };
            let weights = Weights::init(&config, 1).unwrap();
            let net = weights.net(&Device::flex());
            let mut names = Names::default();
            net.visit(&mut names);
            let expected: Vec<_> = weights
                .slots()
                .iter()
                .map(|slot| (slot.name.clone(), slot.shape.clone()))
                .collect();
            assert_eq!(names.seen, expected);
            // The dense layer must accept what the convolutions give it.
            let x = Tensor::<4>::zeros([1, channels, side, side], &Device::flex());
            let (logits, embedding) = net.forward(x);
            assert_eq!(logits.dims(), [1, 5]);
            assert_eq!(embedding.dims(), [1, 64]);
        }
    }

    #[test]
    fn folding_keeps_the_function() {
        let mut weights = Weights::init(&CONFIG, 3).unwrap();
        perturb_statistics(&mut weights);
        let device = Device::flex();
        let x = ramp(4, &device);
        let (logits, embedding) = weights.net(&device).forward(x.clone());
        let (folded, folded_embedding) = weights.frozen(&device).forward(x);
        assert!(difference(logits, folded) < 1e-4);
        assert!(difference(embedding, folded_embedding) < 1e-4);
    }

    #[test]
    fn growing_keeps_the_old_logits() {
        let old = Weights::init(&CONFIG, 3).unwrap();
        let config = NetConfig {
            classes: 7,
            ..CONFIG
        };
        let grown = old.grow(&config, 9).unwrap();
        let device = Device::flex();
        let x = ramp(3, &device);
        let before = old.frozen(&device).forward(x.clone()).0;
        let after = grown.frozen(&device).forward(x).0;
        assert_eq!(after.dims(), [3, 7]);
        assert!(difference(before, after.narrow(1, 0, 5)) < 1e-5);
        assert_eq!(grown, old.grow(&config, 9).unwrap());
        assert_ne!(grown, old.grow(&config, 10).unwrap());
    }

    #[test]
    fn growing_refuses_fewer_classes_and_other_nets() {
        let old = Weights::init(&CONFIG, 3).unwrap();
        for config in [
            NetConfig {
                classes: 4,
                ..CONFIG
            },
            NetConfig {
                embedding: 32,
                ..CONFIG
            },
        ] {
            assert!(matches!(old.grow(&config, 1), Err(ModelError::Grow(_))));
        }
    }

    #[test]
    fn a_config_out_of_range_is_named() {
        let config = NetConfig {
            channels: 2,
            ..CONFIG
        };
        let error = Weights::init(&config, 1).unwrap_err();
        assert!(error.to_string().contains("channels is 2"), "{error}");
    }

    fn perturb_statistics(weights: &mut Weights) {
        let slots = weights.slots.clone();
        for slot in slots.iter().filter(|slot| slot.role != Role::Matrix) {
            for (i, value) in weights.values[slot.range.clone()].iter_mut().enumerate() {
                *value += 0.01 * (i % 17) as f32;
            }
        }
    }

    fn ramp(batch: usize, device: &Device) -> Tensor<4> {
        let len = batch * CONFIG.input_len();
        let values: Vec<f32> = (0..len)
            .map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0)
            .collect();
        Tensor::from_data(TensorData::new(values, [batch, 3, 32, 32]), device)
    }

    fn difference(a: Tensor<2>, b: Tensor<2>) -> f32 {
        (a - b).abs().max().into_scalar::<f32>()
    }
}
