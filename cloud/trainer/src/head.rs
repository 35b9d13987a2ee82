//! Refit of the classifier alone. Everything before it stays as it is, so the pictures go through
//! the network once, in a few distorted views, and a step is a matrix product: seconds where the
//! whole network takes minutes, and an update of which a device needs a few kilobytes.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Tensor, TensorData};
use flywheel_models::Weights;

use crate::shard::{Job, Outcome, Shard, argmax};
use crate::{Example, TrainConfig, TrainError};

/// Views of each example; the first is the picture as it is.
const VIEWS: usize = 4;

/// Embeddings of all examples in all views, under weights that do not change.
pub struct Features {
    /// `[view][example][embedding]`.
    rows: Vec<f32>,
    examples: usize,
    dim: usize,
    device: Device,
}

impl Features {
    /// Runs the network over the examples, one part for each shard.
    ///
    /// # Errors
    /// [`TrainError::Pixels`], [`TrainError::Threads`] or [`TrainError::Diverged`] if an embedding
    /// is no number.
    pub fn new(
        config: &TrainConfig,
        examples: &[Example],
        weights: &Weights,
    ) -> Result<Self, TrainError> {
        let dim = config.net.embedding;
        let mut rows = Vec::with_capacity(VIEWS * examples.len() * dim);
        let mut shards = (0..config.shards)
            .map(|_| Shard::new(config))
            .collect::<Result<Vec<_>, _>>()?;
        let size = examples.len().div_ceil(config.shards).max(1);
        for view in 0..VIEWS {
            let job = Job {
                config,
                examples,
                weights,
                step: view,
            };
            let parts: Vec<Result<Vec<f32>, TrainError>> = std::thread::scope(|scope| {
                let running: Vec<_> = shards
                    .iter_mut()
                    .enumerate()
                    .map(|(at, shard)| {
                        let part =
                            (at * size).min(examples.len())..((at + 1) * size).min(examples.len());
                        let job = &job;
                        scope.spawn(move || shard.embed(job, part, view > 0))
                    })
                    .collect();
                running
                    .into_iter()
                    .map(|thread| {
                        thread.join().unwrap_or_else(|_| {
                            Err(TrainError::Threads("a worker panicked".to_owned()))
                        })
                    })
                    .collect()
            });
            for part in parts {
                rows.extend(part?);
            }
        }
        let whole = rows.len() == VIEWS * examples.len() * dim;
        if !whole || !rows.iter().all(|value| value.is_finite()) {
            return Err(TrainError::Diverged { step: 0 });
        }
        Ok(Self {
            rows,
            examples: examples.len(),
            dim,
            device: Device::flex().autodiff(),
        })
    }

    /// One step on the examples `picks`: gradients of the classifier, everything else as it is.
    pub fn step(&self, job: &Job<'_>, picks: &[usize]) -> Outcome {
        let (config, dim) = (job.config, self.dim);
        let classes = config.net.classes;
        let mut rows = Vec::with_capacity(picks.len() * dim);
        let mut targets = vec![config.label_smoothing / classes as f32; picks.len() * classes];
        for (i, &index) in picks.iter().enumerate() {
            let view = (job.step * picks.len() + i) % VIEWS;
            rows.extend_from_slice(&self.rows[(view * self.examples + index) * dim..][..dim]);
            targets[i * classes + job.examples[index].label as usize] +=
                1.0 - config.label_smoothing;
        }
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values, shape), &self.device)
        };
        let slots = job.weights.slots();
        let named = |name: &str| slots.iter().find(|slot| slot.name == name);
        let mut outcome = Outcome {
            harvest: job.weights.values().to_vec(),
            loss: 0.0,
            correct: 0,
        };
        // Every network of this architecture has both.
        let (Some(weight), Some(bias)) = (named("head.weight"), named("head.bias")) else {
            return outcome;
        };
        let values = |range: &std::ops::Range<usize>| job.weights.values()[range.clone()].to_vec();
        let w = tensor(values(&weight.range), [dim, classes]).require_grad();
        let b = tensor(values(&bias.range), [1, classes]).require_grad();
        let logits = tensor(rows, [picks.len(), dim]).matmul(w.clone()) + b.clone();
        let targets = tensor(targets, [picks.len(), classes]);
        let loss = (log_softmax(logits.clone(), 1) * targets).sum().neg();
        outcome.loss = loss.clone().into_scalar::<f32>();
        let grads = (loss / picks.len() as f32).backward();
        for (slot, tensor) in [(weight, w), (bias, b)] {
            let into = &mut outcome.harvest[slot.range.clone()];
            into.fill(0.0);
            if let Some(data) = tensor.grad(&grads).map(Tensor::into_data)
                && let Ok(gradient) = data.as_slice::<f32>()
            {
                into.copy_from_slice(gradient);
            }
        }
        let data = logits.into_data();
        if let Ok(values) = data.as_slice::<f32>() {
            outcome.correct = values
                .chunks_exact(classes)
                .zip(picks)
                .filter(|(row, index)| argmax(row) == job.examples[**index].label as usize)
                .count();
        }
        outcome
    }
}
