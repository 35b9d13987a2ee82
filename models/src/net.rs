//! The network itself: one small convolutional architecture in two forms.
//!
//! [`Net`] is what trains: convolution, batch norm, ReLU. [`Frozen`] is what runs: the same
//! function with every batch norm folded into its convolution, so that engines execute half the
//! operations and no engine needs running statistics. Both are filled from
//! [`Weights`](crate::Weights), the only place where values live.

use alloc::vec::Vec;

use burn::module::Module;
#[cfg(feature = "std")]
use burn::nn::BatchNormConfig;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::pool::AvgPool2dConfig;
use burn::nn::{BatchNorm, Linear, LinearConfig, PaddingConfig2d};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::ModelError;

/// Name of this architecture in a model's spec. Change it whenever [`NetConfig::stages`] or the
/// preprocessing contract changes, so that an old engine refuses a new record by name.
pub const ARCH: &str = "convnet-1";

/// Batch norm's variance offset, shared by training and folding.
pub(crate) const BN_EPSILON: f64 = 1e-5;

/// Side of the feature map that the dense layer sees, at most (larger maps are average-pooled).
const DENSE_SIDE: usize = 4;

/// What varies between two networks of this architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Input channels: 1 (gray) or 3 (RGB).
    pub channels: usize,
    /// Input width in pixels, 16 to 128.
    pub width: usize,
    /// Input height in pixels, 16 to 128.
    pub height: usize,
    /// Number of classes, 1 to 4096.
    pub classes: usize,
    /// Width of the penultimate layer, 8 to 512; its ReLU output is the embedding.
    pub embedding: usize,
}

/// One convolution of the stack; padding is always `kernel / 2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// Input channels.
    pub input: usize,
    /// Output channels.
    pub output: usize,
    /// Side of the square kernel.
    pub kernel: usize,
    /// Stride on both axes.
    pub stride: usize,
}

impl Stage {
    /// Length of an axis of `side` pixels after this stage.
    fn shrink(&self, side: usize) -> usize {
        (side + 2 * (self.kernel / 2) - self.kernel) / self.stride + 1
    }
}

impl NetConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the first field that is out of range.
    pub fn validate(&self) -> Result<(), ModelError> {
        let bad = |field, found, want| Err(ModelError::Config { field, found, want });
        if !matches!(self.channels, 1 | 3) {
            return bad("channels", self.channels, "1 (gray) or 3 (RGB)");
        }
        if !(16..=128).contains(&self.width) {
            return bad("width", self.width, "16 to 128");
        }
        if !(16..=128).contains(&self.height) {
            return bad("height", self.height, "16 to 128");
        }
        if !(1..=4096).contains(&self.classes) {
            return bad("classes", self.classes, "1 to 4096");
        }
        if !(8..=512).contains(&self.embedding) {
            return bad("embedding", self.embedding, "8 to 512");
        }
        Ok(())
    }

    /// The convolutions, first to last.
    ///
    /// The first one already halves the image, since full-resolution feature maps cost more
    /// memory traffic than they are worth in accuracy; images above 40 pixels are halved once
    /// more, so that 64-pixel images cost about as much as 32-pixel ones.
    pub fn stages(&self) -> [Stage; 4] {
        let third = if self.width.max(self.height) > 40 {
            2
        } else {
            1
        };
        let stage = |input, output, kernel, stride| Stage {
            input,
            output,
            kernel,
            stride,
        };
        [
            stage(self.channels, 32, 5, 2),
            stage(32, 64, 3, 2),
            stage(64, 96, 3, third),
            stage(96, 128, 3, 2),
        ]
    }

    /// Height and width of the last feature map.
    fn map(&self) -> [usize; 2] {
        self.stages()
            .iter()
            .fold([self.height, self.width], |[h, w], s| {
                [s.shrink(h), s.shrink(w)]
            })
    }

    /// Kernel (and stride) of the average pool before the dense layer; `[1, 1]` means none.
    fn pool(&self) -> [usize; 2] {
        self.map().map(|side| (side / DENSE_SIDE).max(1))
    }

    /// Inputs of the dense layer.
    pub fn features(&self) -> usize {
        let [h, w] = self.map();
        let [ph, pw] = self.pool();
        self.stages()[3].output * (h / ph) * (w / pw)
    }

    /// Values of one input tensor, `channels · height · width`.
    pub fn input_len(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Shape of a tensor of `count` preprocessed images, NCHW.
    pub fn batch_shape(&self, count: usize) -> [usize; 4] {
        [count, self.channels, self.height, self.width]
    }

    /// Multiply-accumulate operations of one inference.
    pub fn macs(&self) -> usize {
        let mut side = [self.height, self.width];
        let mut total = self.embedding * (self.features() + self.classes);
        for stage in self.stages() {
            side = side.map(|s| stage.shrink(s));
            total += side[0] * side[1] * stage.kernel * stage.kernel * stage.input * stage.output;
        }
        total
    }
}

/// Convolution without bias, batch norm, ReLU.
#[derive(Module, Debug)]
pub struct Block {
    pub(crate) conv: Conv2d,
    pub(crate) norm: BatchNorm,
}

/// The trainable form. Build it with [`Weights::net`](crate::Weights::net).
#[derive(Module, Debug)]
pub struct Net {
    pub(crate) blocks: Vec<Block>,
    pub(crate) embed: Linear,
    pub(crate) head: Linear,
    pool: [usize; 2],
}

impl Net {
    /// An uninitialised network; its parameters must be filled from weights before use.
    #[cfg(feature = "std")]
    pub(crate) fn empty(config: &NetConfig, device: &Device) -> Self {
        let blocks = config
            .stages()
            .iter()
            .map(|stage| Block {
                conv: conv(stage, false, device),
                norm: BatchNormConfig::new(stage.output)
                    .with_epsilon(BN_EPSILON)
                    .init(device),
            })
            .collect();
        Self {
            blocks,
            embed: LinearConfig::new(config.features(), config.embedding).init(device),
            head: LinearConfig::new(config.embedding, config.classes).init(device),
            pool: config.pool(),
        }
    }

    /// Class logits `[batch, classes]` and embeddings `[batch, embedding]` (non-negative) of
    /// preprocessed images `[batch, channels, height, width]`.
    ///
    /// On an autodiff device batch norm normalises by the batch and updates its running
    /// statistics; elsewhere it uses those statistics.
    pub fn forward(&self, images: Tensor<4>) -> (Tensor<2>, Tensor<2>) {
        let mut x = images;
        for block in &self.blocks {
            x = relu(block.norm.forward(block.conv.forward(x)));
        }
        tail(x, self.pool, &self.embed, &self.head)
    }

    /// Makes the running statistics of the last training step on this thread readable by a
    /// visitor (batch norm holds them back until its next step).
    #[cfg(feature = "std")]
    pub(crate) fn settle(&self) {
        for block in &self.blocks {
            block.norm.running_mean.value_sync();
            block.norm.running_var.value_sync();
        }
    }
}

/// The inference form: batch norms folded into the convolutions. Build it with
/// [`Weights::frozen`](crate::Weights::frozen).
#[derive(Module, Debug)]
pub struct Frozen {
    convs: Vec<Conv2d>,
    embed: Linear,
    head: Linear,
    pool: [usize; 2],
}

impl Frozen {
    /// An uninitialised network; its parameters must be filled from weights before use.
    pub(crate) fn empty(config: &NetConfig, device: &Device) -> Self {
        Self {
            convs: config
                .stages()
                .iter()
                .map(|s| conv(s, true, device))
                .collect(),
            embed: LinearConfig::new(config.features(), config.embedding).init(device),
            head: LinearConfig::new(config.embedding, config.classes).init(device),
            pool: config.pool(),
        }
    }

    /// Class logits `[batch, classes]` and embeddings `[batch, embedding]` (non-negative) of
    /// preprocessed images `[batch, channels, height, width]`.
    pub fn forward(&self, images: Tensor<4>) -> (Tensor<2>, Tensor<2>) {
        let mut x = images;
        for conv in &self.convs {
            x = relu(conv.forward(x));
        }
        tail(x, self.pool, &self.embed, &self.head)
    }
}

fn conv(stage: &Stage, bias: bool, device: &Device) -> Conv2d {
    let pad = stage.kernel / 2;
    Conv2dConfig::new([stage.input, stage.output], [stage.kernel, stage.kernel])
        .with_stride([stage.stride, stage.stride])
        .with_padding(PaddingConfig2d::Explicit(pad, pad, pad, pad))
        .with_bias(bias)
        .init(device)
}

/// Pool, dense layer (the embedding) and classifier, common to both forms.
fn tail(x: Tensor<4>, pool: [usize; 2], embed: &Linear, head: &Linear) -> (Tensor<2>, Tensor<2>) {
    let x = match pool {
        [1, 1] => x,
        pool => AvgPool2dConfig::new(pool)
            .with_strides(pool)
            .init()
            .forward(x),
    };
    let embedding = relu(embed.forward(x.flatten(1, 3)));
    (head.forward(embedding.clone()), embedding)
}
