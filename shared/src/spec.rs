//! How a model wants its input and what it answers: the part of a model package that makes the
//! bytes of an ONNX file meaningful. It is signed with the model.

use serde::{Deserialize, Serialize};

/// The input tensor: one image, f32, NCHW with N = 1, resized to `width` × `height` by the triangle
/// filter (bilinear when enlarging, antialiased when shrinking), each value `(pixel / 255 − mean[c]) / std[c]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct InputSpec {
    /// Columns in pixels.
    pub width: u16,
    /// Rows in pixels.
    pub height: u16,
    /// 1 for grey, 3 for red, green, blue.
    pub channels: u8,
    /// Mean of each channel on the scale 0 to 1; only the first `channels` count.
    pub mean: [f32; 3],
    /// Standard deviation of each channel, greater than 0; only the first `channels` count.
    pub std: [f32; 3],
}

impl InputSpec {
    /// Number of f32 values in the input tensor.
    pub fn len(&self) -> usize {
        self.width as usize * self.height as usize * self.channels as usize
    }

    /// Whether the tensor has no values at all, which no valid model has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A classifier with an embedding: input, labels and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec<'a> {
    /// The architecture, for engines that rebuild it from a record (`convnet-1`); empty if the
    /// package holds ONNX only.
    pub arch: &'a str,
    /// Class names in the order of the logits, separated by newlines.
    pub labels: &'a str,
    /// What the input tensor holds.
    pub input: InputSpec,
    /// Number of f32 values of the embedding output; 0 if the model has none.
    pub embedding: u16,
}

impl<'a> ModelSpec<'a> {
    /// The class names in the order of the logits.
    pub fn labels(&self) -> impl Iterator<Item = &'a str> + Clone {
        self.labels.split('\n').filter(|label| !label.is_empty())
    }

    /// Number of classes, which is the number of logits.
    pub fn classes(&self) -> usize {
        self.labels().count()
    }
}

/// Inputs with the answers they must give, run on the device before a model may go on trial.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Golden<'a> {
    /// Columns of each frame in pixels.
    pub width: u16,
    /// Rows of each frame in pixels.
    pub height: u16,
    /// Channels of each frame: 1 or 3.
    pub channels: u8,
    /// The frames one after the other, u8, HWC.
    #[serde(with = "serde_bytes_slice")]
    pub frames: &'a [u8],
    /// The expected logits of each frame one after the other, f32 little endian.
    #[serde(with = "serde_bytes_slice")]
    pub logits: &'a [u8],
    /// Largest absolute difference allowed in any logit.
    pub tolerance: f32,
}

impl Golden<'_> {
    /// Bytes of one frame.
    pub fn frame_len(&self) -> usize {
        self.width as usize * self.height as usize * self.channels as usize
    }
}

/// `&[u8]` as one length-prefixed run of bytes that is borrowed when read.
pub(crate) mod serde_bytes_slice {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &&[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub fn deserialize<'de: 'a, 'a, D: Deserializer<'de>>(from: D) -> Result<&'a [u8], D::Error> {
        <&'a [u8]>::deserialize(from)
    }
}
