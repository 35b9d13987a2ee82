//! From a dataset to a model in the registry: decode, train, export, fit the score parameters
//! through the device's engine, and pack the parts.

use std::ops::ControlFlow;
use std::sync::Arc;

use cloud_core::calibrate;
use cloud_core::dataset::{Manifest, Split as Share};
use cloud_trainer::{Champion, Example, Fit, TrainConfig};
use flywheel_models::NetConfig;
use flywheel_shared::ids::Digest;
use flywheel_shared::spec::{Golden, InputSpec};
use flywheel_shared::trust::{Part, PartKind};

use super::catalog::Catalog;
use super::inference::Inference;
use super::queue::Labelling;
use super::registry::{ModelRecord, Registry};
use super::{Fault, blob, now_ms};
use crate::api::types::Split;
use crate::picture::Picture;
use crate::store::Store;

/// How often a picture from a device is drawn in training, relative to an imported one: it shows
/// the world that the model works in, and was chosen for what it teaches.
const DEVICE_WEIGHT: f32 = 3.0;
/// The same for a picture that nobody labelled: less than a label is worth.
const PSEUDO_WEIGHT: f32 = 1.5;
/// Steps of a refit, which cost next to nothing.
const HEAD_STEPS: usize = 2000;
/// Values of the embedding.
const EMBEDDING: usize = 64;
/// Largest side of a model's input that is chosen by itself.
const MAX_INPUT: u32 = 64;
/// Golden inputs in a model package.
const GOLDEN_INPUTS: usize = 8;
/// Largest difference in a logit between engines: four times what the parity suite allows.
const GOLDEN_TOLERANCE: f32 = 1e-2;

/// What a run was asked for.
#[derive(Clone, Debug)]
pub struct Run {
    /// Seed of initialisation, sampling and augmentation.
    pub seed: u64,
    /// Optimiser steps; chosen from the dataset if absent.
    pub steps: Option<u32>,
    /// Start from fresh weights.
    pub scratch: bool,
    /// Fit the classifier alone, on the champion's features.
    pub head: bool,
}

/// The services that training reads from and writes to.
pub struct Stations<'a> {
    /// Blobs.
    pub store: &'a Store,
    /// Imports and datasets.
    pub catalog: &'a Catalog,
    /// Pictures of queue items.
    pub labelling: &'a Labelling,
    /// Models.
    pub registry: &'a Registry,
}

/// A decoded picture with its class index.
struct Labelled {
    picture: Picture,
    class: u32,
    /// Whether a device saw it, rather than somebody having brought it.
    from_device: bool,
}

impl Stations<'_> {
    /// Trains a candidate on a dataset; `progress(step, steps, message)` is called after every
    /// step. The same dataset, champion and run give the same model id.
    ///
    /// # Errors
    /// If a picture is missing, or training fails; damaged ones are left out with a warning.
    pub fn train(
        &self,
        dataset_id: &Digest,
        dataset: &Manifest,
        run: &Run,
        progress: &mut dyn FnMut(u64, u64, String),
    ) -> Result<ModelRecord, Fault> {
        progress(0, 1, "reading pictures".to_owned());
        let mut train = Vec::new();
        let mut validation = Vec::new();
        let mut pseudo = Vec::new();
        for item in &dataset.items {
            let picture = match self.picture(&item.digest) {
                // Small before the next one is read: photographs at full size fill any memory.
                Ok(picture) => picture.at_most(2 * MAX_INPUT)?,
                Err(Fault::Damaged(why)) => {
                    tracing::warn!(%why, "left out of training");
                    continue;
                }
                Err(fault) => return Err(fault),
            };
            let labelled = Labelled {
                picture,
                class: item.class,
                from_device: self.catalog.find_import(&item.digest)?.is_none(),
            };
            match item.split {
                Share::Train => train.push(labelled),
                Share::Validation => validation.push(labelled),
                Share::Pseudo => pseudo.push(labelled),
            }
        }
        let champion = if run.scratch {
            None
        } else {
            // A champion whose classes are not the first ones of the dataset can't be grown.
            self.registry
                .champion()?
                .filter(|champion| dataset.classes.starts_with(&champion.classes))
        };
        let (net, input) = match &champion {
            Some(champion) => (
                NetConfig {
                    classes: dataset.classes.len(),
                    ..champion.net
                },
                champion.input,
            ),
            None => {
                let pictures = train.iter().map(|labelled| &labelled.picture);
                fresh_net(pictures, dataset.classes.len())?
            }
        };
        let mut config = TrainConfig::new(net, input, run.seed);
        if run.head {
            if champion.is_none() {
                return Err(Fault::Invalid(
                    "only a champion whose classes come first in the dataset can be refitted; train without `head`".to_owned(),
                ));
            }
            config.fit = Fit::Head;
        }
        config.steps = run.steps.map_or_else(
            || steps_for(train.len(), champion.is_some(), config.fit),
            |steps| steps as usize,
        );
        let labelled = train.iter().map(|labelled| match labelled.from_device {
            true => (labelled, DEVICE_WEIGHT),
            false => (labelled, 1.0),
        });
        let examples = labelled
            .chain(pseudo.iter().map(|labelled| (labelled, PSEUDO_WEIGHT)))
            .map(|(labelled, weight)| {
                let small = labelled.picture.resized(
                    u32::from(input.width),
                    u32::from(input.height),
                    input.channels,
                )?;
                Ok(Example {
                    pixels: Arc::from(small.pixels),
                    label: labelled.class,
                    weight,
                })
            })
            .collect::<Result<Vec<_>, Fault>>()?;
        let record = match &champion {
            Some(champion) => Some(blob(
                self.store,
                &champion.part(PartKind::BurnRecord)?.digest,
            )?),
            None => None,
        };
        let start = champion
            .as_ref()
            .zip(record.as_ref())
            .map(|(champion, record)| Champion {
                record,
                config: &champion.net,
            });
        let trained = cloud_trainer::train(&config, &examples, start, &mut |at| {
            progress(
                at.step as u64,
                at.steps as u64,
                format!("loss {:.3}, accuracy {:.3}", at.loss, at.accuracy),
            );
            ControlFlow::Continue(())
        })
        .map_err(|error| Fault::Internal(error.to_string()))?;

        let steps = config.steps as u64;
        progress(steps, steps, "fitting scores".to_owned());
        let mut model = ModelRecord {
            id: String::new(),
            parts: Vec::new(),
            net: config.net,
            input,
            classes: dataset.classes.clone(),
            dataset: dataset_id.to_string(),
            parent: champion.map(|champion| champion.id),
            seed: run.seed,
            steps: config.steps as u32,
            created_ms: now_ms(),
            report: None,
            gate: None,
            release: None,
        };
        let labels = model.labels();
        let mut inference = Inference::from_onnx(&trained.onnx, &model, &labels)?;
        let scores = self.fit_scores(&mut inference, &model, &train, validation)?;
        let golden = golden_inputs(&mut inference, &train, &model)?;
        let spec = encode(&model.spec(&labels))?;
        for (kind, bytes) in [
            (PartKind::Onnx, &trained.onnx),
            (PartKind::BurnRecord, &trained.record),
            (PartKind::Spec, &spec),
            (PartKind::Scores, &scores),
            (PartKind::Golden, &golden),
        ] {
            model.parts.push(Part {
                kind,
                len: u32::try_from(bytes.len())
                    .map_err(|_| Fault::Internal(format!("the {kind:?} part exceeds 4 GiB")))?,
                digest: self.store.blobs().put(bytes)?,
            });
        }
        model.id = ModelRecord::id_of(&model.parts);
        // The same model again keeps what is known about it.
        match self.registry.find(&model.id) {
            Ok(known) => Ok(known),
            Err(Fault::NotFound(_)) => {
                self.registry.save(&model)?;
                Ok(model)
            }
            Err(fault) => Err(fault),
        }
    }

    /// Score parameters: class statistics from what was trained on, temperature and conformal
    /// tables from what was not.
    fn fit_scores(
        &self,
        inference: &mut Inference,
        model: &ModelRecord,
        train: &[Labelled],
        validation: Vec<Labelled>,
    ) -> Result<Vec<u8>, Fault> {
        let mut held_out = validation;
        for import in self.catalog.imports(Split::Calibration)? {
            if let Some(class) = model
                .classes
                .iter()
                .position(|class| *class == import.class)
            {
                held_out.push(Labelled {
                    picture: self.picture(&import.digest)?,
                    class: class as u32,
                    from_device: false,
                });
            }
        }
        let trained = answers(inference, train)?;
        // Without held-out pictures the training set must do; its scores are too good, so the
        // trigger's own quantiles, not the tables, then keep the budget.
        let held = if held_out.is_empty() {
            answers(inference, train)?
        } else {
            answers(inference, &held_out)?
        };
        calibrate::fit(calibrate::FitInput {
            classes: model.classes.len(),
            dim: model.net.embedding,
            embeddings: &trained.embeddings,
            labels: &trained.labels,
            held_logits: &held.logits,
            held_embeddings: &held.embeddings,
            held_labels: &held.labels,
            // No lane uses the distance to decision boundaries.
            head: None,
            shrinkage: None,
        })
        .map_err(|error| Fault::Internal(format!("fitting the scores: {error}")))
    }

    /// A picture of a dataset, wherever it came from.
    ///
    /// # Errors
    /// If it is neither imported nor in the queue, or is damaged.
    pub fn picture(&self, digest: &Digest) -> Result<Picture, Fault> {
        let (codec, width, height) = if let Some(import) = self.catalog.find_import(digest)? {
            (import.codec, import.width, import.height)
        } else if let Some(sample) = self.labelling.sample_of(digest) {
            (
                sample.codec,
                u32::from(sample.width),
                u32::from(sample.height),
            )
        } else {
            return Err(Fault::NotFound(format!("there is no picture {digest}")));
        };
        Picture::decode(codec, width, height, &blob(self.store, digest)?)
            .map_err(|error| Fault::Damaged(format!("picture {digest}: {error:#}")))
    }
}

/// What a model said about a set, row by row.
struct Answers {
    logits: Vec<f32>,
    embeddings: Vec<f32>,
    labels: Vec<u32>,
}

fn answers(inference: &mut Inference, set: &[Labelled]) -> Result<Answers, Fault> {
    let mut answers = Answers {
        logits: Vec::with_capacity(set.len() * inference.logits.len()),
        embeddings: Vec::with_capacity(set.len() * inference.embedding.len()),
        labels: Vec::with_capacity(set.len()),
    };
    for labelled in set {
        inference.run(&labelled.picture)?;
        answers.logits.extend_from_slice(&inference.logits);
        answers.embeddings.extend_from_slice(&inference.embedding);
        answers.labels.push(labelled.class);
    }
    Ok(answers)
}

/// The network for a first model: as large as the pictures up to [`MAX_INPUT`], in colour if any
/// of them is.
///
/// # Errors
/// If there is no picture.
pub fn fresh_net<'a>(
    pictures: impl Iterator<Item = &'a Picture> + Clone,
    classes: usize,
) -> Result<(NetConfig, InputSpec), Fault> {
    let largest = pictures
        .clone()
        .map(|picture| picture.width.max(picture.height))
        .max()
        .ok_or_else(|| {
            Fault::Invalid("the dataset has nothing to train on; label something first".to_owned())
        })?;
    // Three halvings must leave whole pixels.
    let side = largest.min(MAX_INPUT).next_multiple_of(4).max(16);
    let channels = if pictures.clone().any(|picture| picture.channels == 3) {
        3
    } else {
        1
    };
    Ok((
        NetConfig {
            channels: usize::from(channels),
            width: side as usize,
            height: side as usize,
            classes,
            embedding: EMBEDDING,
        },
        InputSpec {
            mean: [0.5; 3],
            std: [0.25; 3],
            ..InputSpec::new(side as u16, side as u16, channels)
        },
    ))
}

/// Steps of a run that was not told: passes over the data, within bounds that keep a round short.
fn steps_for(examples: usize, fine_tune: bool, fit: Fit) -> usize {
    if fit == Fit::Head {
        return HEAD_STEPS;
    }
    let passes = if fine_tune { 75 } else { 25 };
    (examples * passes / 64).clamp(300, 2800)
}

fn encode<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, Fault> {
    postcard::to_extend(value, Vec::new())
        .map_err(|error| Fault::Internal(format!("a model part does not encode: {error}")))
}

/// Training pictures, spread over the classes, with the answers that every engine must give.
fn golden_inputs(
    inference: &mut Inference,
    train: &[Labelled],
    model: &ModelRecord,
) -> Result<Vec<u8>, Fault> {
    let InputSpec {
        width,
        height,
        channels,
        ..
    } = model.input;
    let (mut frames, mut logits) = (Vec::new(), Vec::new());
    let wanted = (0..model.classes.len() as u32).take(GOLDEN_INPUTS);
    for labelled in wanted.filter_map(|class| train.iter().find(|labelled| labelled.class == class))
    {
        let picture = labelled
            .picture
            .resized(u32::from(width), u32::from(height), channels)?;
        inference.run(&picture)?;
        frames.extend_from_slice(&picture.pixels);
        logits.extend(
            inference
                .logits
                .iter()
                .flat_map(|logit| logit.to_le_bytes()),
        );
    }
    encode(&Golden {
        width,
        height,
        channels,
        frames: &frames,
        logits: &logits,
        tolerance: GOLDEN_TOLERANCE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_grow_with_the_data_within_bounds() {
        assert_eq!(steps_for(10, true, Fit::Whole), 300);
        assert_eq!(steps_for(100_000, false, Fit::Whole), 2800);
        assert!(steps_for(1_500, true, Fit::Whole) > steps_for(500, true, Fit::Whole));
    }

    #[test]
    fn the_first_network_fits_the_pictures() {
        let picture = |width, height, channels: u8| Picture {
            width,
            height,
            channels,
            pixels: vec![0; (width * height) as usize * channels as usize],
        };
        let fresh_net = |pictures: &[Picture]| fresh_net(pictures.iter(), 3);
        let (net, input) = fresh_net(&[picture(28, 28, 1)]).unwrap();
        assert_eq!((net.width, net.channels, net.classes), (28, 1, 3));
        assert_eq!((input.width, input.channels), (28, 1));
        let (net, _) = fresh_net(&[picture(150, 100, 1), picture(10, 10, 3)]).unwrap();
        assert_eq!((net.width, net.height, net.channels), (64, 64, 3));
        assert!(fresh_net(&[]).is_err());
    }
}
