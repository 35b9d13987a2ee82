//! One part of a batch: distort, run forward, run backward.
//!
//! Each shard has a thread pool of its own with a single thread, which burn's operations then run
//! on: no reduction is split, so that results do not depend on the number of cores, and most of
//! burn's element-wise operations are single-threaded anyway, so that two shards side by side are
//! faster than one batch over two threads.

use std::ops::Range;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Tensor, TensorData};
use device_engine::{Frame, InputError, preprocess};
use flywheel_models::Weights;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::augment::{Canvas, seed_of};
use crate::{Example, TrainConfig, TrainError};

/// A worker with its scratch memory.
pub struct Shard {
    pool: ThreadPool,
    canvas: Canvas,
    device: Device,
}

/// What a shard found out.
pub struct Outcome {
    /// See [`Weights::harvest`].
    pub harvest: Vec<f32>,
    /// Sum of the losses of its images.
    pub loss: f32,
    /// Images whose top class was the label.
    pub correct: usize,
}

impl Shard {
    /// Starts the worker.
    pub fn new(config: &TrainConfig) -> Result<Self, TrainError> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(1)
            .thread_name(|_| "train".to_owned())
            .build()
            .map_err(|error| TrainError::Threads(error.to_string()))?;
        Ok(Self {
            pool,
            canvas: Canvas::new(&config.net),
            device: Device::flex().autodiff(),
        })
    }

    /// Runs the images `picks` of step `step`, of which the first is number `first` of the batch.
    pub fn run(
        &mut self,
        job: &Job<'_>,
        picks: &[usize],
        first: usize,
    ) -> Result<Outcome, TrainError> {
        let Self {
            pool,
            canvas,
            device,
        } = self;
        pool.install(|| job.run(canvas, device, picks, first))
    }
}

impl Shard {
    /// Embeddings `[part, embedding]` of a part of the examples under the weights of `job`,
    /// distorted with the seeds of its step if `distorted`.
    pub fn embed(
        &mut self,
        job: &Job<'_>,
        part: Range<usize>,
        distorted: bool,
    ) -> Result<Vec<f32>, TrainError> {
        let Self { pool, canvas, .. } = self;
        pool.install(|| job.embed(canvas, part, distorted))
    }
}

/// What all shards of one step share.
pub struct Job<'a> {
    /// The run.
    pub config: &'a TrainConfig,
    /// All examples.
    pub examples: &'a [Example],
    /// The weights before the step.
    pub weights: &'a Weights,
    /// The step's number.
    pub step: usize,
}

impl Job<'_> {
    fn run(
        &self,
        canvas: &mut Canvas,
        device: &Device,
        picks: &[usize],
        first: usize,
    ) -> Result<Outcome, TrainError> {
        let config = self.config;
        let (len, classes) = (config.net.input_len(), config.net.classes);
        let mut images = vec![0.0; picks.len() * len];
        let mut targets = vec![config.label_smoothing / classes as f32; picks.len() * classes];
        for (i, &index) in picks.iter().enumerate() {
            let example = &self.examples[index];
            let seed = seed_of(config.seed, self.step, first + i);
            let pixels = canvas.draw(&example.pixels, &config.augment, seed);
            let out = &mut images[i * len..][..len];
            normalise(config, pixels, out).map_err(|error| TrainError::Pixels { index, error })?;
            targets[i * classes + example.label as usize] += 1.0 - config.label_smoothing;
        }
        let net = self.weights.net(device);
        let shape = config.net.batch_shape(picks.len());
        let images = Tensor::<4>::from_data(TensorData::new(images, shape), device);
        let targets =
            Tensor::<2>::from_data(TensorData::new(targets, [picks.len(), classes]), device);
        let (logits, _) = net.forward(images);
        let loss = (log_softmax(logits.clone(), 1) * targets).sum().neg();
        let sum = loss.clone().into_scalar::<f32>();
        let grads = (loss / picks.len() as f32).backward();
        let harvest = self.weights.harvest(&net, &grads);
        Ok(Outcome {
            harvest,
            loss: sum,
            correct: self.count_correct(logits, picks),
        })
    }

    fn embed(
        &self,
        canvas: &mut Canvas,
        part: Range<usize>,
        distorted: bool,
    ) -> Result<Vec<f32>, TrainError> {
        let config = self.config;
        let (len, device) = (config.net.input_len(), Device::flex());
        let net = self.weights.frozen(&device);
        let mut rows = Vec::with_capacity(part.len() * config.net.embedding);
        let all: Vec<usize> = part.collect();
        for batch in all.chunks(64) {
            let mut images = vec![0.0; batch.len() * len];
            for (&index, out) in batch.iter().zip(images.chunks_exact_mut(len)) {
                let mut pixels = &*self.examples[index].pixels;
                if distorted {
                    let seed = seed_of(config.seed, self.step, index);
                    pixels = canvas.draw(pixels, &config.augment, seed);
                }
                normalise(config, pixels, out)
                    .map_err(|error| TrainError::Pixels { index, error })?;
            }
            let images = Tensor::<4>::from_data(
                TensorData::new(images, config.net.batch_shape(batch.len())),
                &device,
            );
            let data = net.forward(images).1.into_data();
            // An embedding that is not f32 would leave rows out, which the caller's count tells.
            rows.extend_from_slice(data.as_slice::<f32>().unwrap_or_default());
        }
        Ok(rows)
    }

    fn count_correct(&self, logits: Tensor<2>, picks: &[usize]) -> usize {
        let data = logits.into_data();
        // Logits of a float module are f32; were they not, the count would only miss.
        let Ok(values) = data.as_slice::<f32>() else {
            return 0;
        };
        values
            .chunks_exact(self.config.net.classes)
            .zip(picks)
            .filter(|(row, index)| argmax(row) == self.examples[**index].label as usize)
            .count()
    }
}

/// The device's own preprocessing of pixels that are at the model's size.
pub fn normalise(config: &TrainConfig, pixels: &[u8], out: &mut [f32]) -> Result<(), InputError> {
    let frame = Frame {
        pixels,
        width: config.net.width as u32,
        height: config.net.height as u32,
        channels: config.net.channels as u8,
    };
    preprocess(&frame, &config.input, out)
}

/// Index of the largest value.
pub fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = i;
        }
    }
    best
}
