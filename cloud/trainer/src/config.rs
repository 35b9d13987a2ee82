//! What a training run takes and gives.

use std::sync::Arc;

use device_engine::{InputError, InputSpec};
use flywheel_models::{ModelError, NetConfig, Slot};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::Augment;

/// One labelled image, already at the model's size.
#[derive(Debug, Clone)]
pub struct Example {
    /// u8, HWC, `width · height · channels` bytes of the input spec; shared, not copied.
    pub pixels: Arc<[u8]>,
    /// Index of the class.
    pub label: u32,
    /// Relative frequency at which it is drawn, on top of class balancing; 1 for most.
    pub weight: f32,
}

/// The model to start from.
#[derive(Debug, Clone, Copy)]
pub struct Champion<'a> {
    /// Its record.
    pub record: &'a [u8],
    /// Its network. Its classes must be the first classes of the new network.
    pub config: &'a NetConfig,
}

/// Which part of the network is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// All of it.
    #[default]
    Whole,
    /// The classifier alone, on the champion's features; every other weight keeps its bits.
    Head,
}

impl Fit {
    /// Whether a tensor may change.
    pub(crate) fn changes(self, slot: &Slot) -> bool {
        match self {
            Self::Whole => true,
            Self::Head => slot.name.starts_with("head."),
        }
    }
}

/// Everything that decides the outcome of a run, besides the examples and the champion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// The network to train.
    pub net: NetConfig,
    /// Its preprocessing; size and channels must be the network's.
    pub input: InputSpec,
    /// Which part of it.
    pub fit: Fit,
    /// Seed of initial weights, sampling and augmentation.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: usize,
    /// Images a step.
    pub batch: usize,
    /// Parts of a batch that are computed side by side, each on one thread; batch norm sees one
    /// part at a time. The outcome depends on it, not on the number of cores.
    pub shards: usize,
    /// Peak learning rate, reached after a warm-up of 1/20 of the steps; cosine decay afterwards.
    pub lr: f32,
    /// AdamW's decoupled decay, for matrices only.
    pub weight_decay: f32,
    /// Share of each target that is spread over all classes.
    pub label_smoothing: f32,
    /// Largest L2 norm of a step's gradient.
    pub clip: f32,
    /// Decay of the running average of weights that becomes the model; 0 takes the last weights.
    pub ema: f32,
    /// Exponent of class balancing: a class of n examples has its examples drawn `n^−balance` as
    /// often; 0 draws all alike, 1 draws all classes alike.
    pub balance: f32,
    /// Distortion of training images.
    pub augment: Augment,
}

impl TrainConfig {
    /// Defaults that suit small colour images with a few hundred to a few thousand examples.
    pub fn new(net: NetConfig, input: InputSpec, seed: u64) -> Self {
        Self {
            net,
            input,
            fit: Fit::Whole,
            seed,
            steps: 400,
            batch: 64,
            shards: 2,
            lr: 3e-3,
            weight_decay: 0.05,
            label_smoothing: 0.05,
            clip: 2.0,
            ema: 0.98,
            balance: 1.25,
            augment: Augment::default(),
        }
    }
}

/// Where a run stands, reported after every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// Running average of the loss (cross-entropy in nats, with smoothing).
    pub loss: f32,
    /// Running average of the accuracy on (augmented, balanced) training batches.
    pub accuracy: f32,
}

/// The outcome of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// burnpack record, to train on from and for burn engines.
    pub record: Vec<u8>,
    /// ONNX file, for tract.
    pub onnx: Vec<u8>,
    /// The last [`Progress::loss`].
    pub loss: f32,
    /// Accuracy of the final weights on the examples as given, without augmentation (on at most
    /// 1,024 of them, evenly spaced).
    pub train_accuracy: f32,
}

/// Why a run gave no model.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum TrainError {
    /// A field of [`TrainConfig`] makes no sense.
    #[error("train config: {field} is {found}; use {want}")]
    Config {
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would be accepted.
        want: &'static str,
    },
    /// Nothing to train on.
    #[error("the training set is empty; label some samples first")]
    Empty,
    /// An example's label is no class of the network.
    #[error("example {index} has label {label}, but the network has {classes} classes")]
    Label {
        /// Position in the slice.
        index: usize,
        /// Its label.
        label: u32,
        /// Classes of the network.
        classes: usize,
    },
    /// An example's pixels do not fit the input spec.
    #[error("example {index}: {error}")]
    Pixels {
        /// Position in the slice.
        index: usize,
        /// What does not fit.
        error: InputError,
    },
    /// The loss left the finite numbers.
    #[error("training diverged at step {step}; use a smaller lr")]
    Diverged {
        /// The step.
        step: usize,
    },
    /// The progress callback asked to stop.
    #[error("training was cancelled at step {step}")]
    Cancelled {
        /// The step.
        step: usize,
    },
    /// The machine refused a worker thread.
    #[error("cannot start a training thread: {0}")]
    Threads(String),
    /// The champion's record or the export failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}
