//! A device without operating system and without allocator: the parts of `device-core` put
//! together. [`Device`] takes what happens ([`Input`]) and tells its [`Board`] what to do; the board
//! owns radio, clock, key and the storage of the slot's record. The scenario drives it on a
//! simulated board, the product image on that of the emulator, and a real product on its own.
#![no_std]
#![forbid(unsafe_code)]

mod batch;
mod device;

pub use batch::{HEAD_MAX, TAIL};
pub use device::{Board, Config, Counts, Device, Failure, Identity, Kept};

use heapless::Vec;
use serde::{Deserialize, Serialize};

/// Most classes of a model.
pub const CLASSES: usize = 32;
/// Most values of an embedding.
pub const DIM: usize = 64;

/// What happens to a device.
#[allow(clippy::large_enum_variant)] // There is no alloc to box with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Input<'a> {
    /// Time passed, or the link changed.
    Link(Link),
    /// A message of the cloud, envelope included.
    Message(#[serde(borrow, with = "bytes")] &'a [u8]),
    /// The model has answered a frame.
    #[serde(borrow)]
    Frame(Answer<'a>),
}

/// The state of the link, as the radio sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Link {
    /// Nothing new.
    Tick,
    /// It is up.
    Connected,
    /// It is down, or did not come up.
    Closed,
}

/// A frame and what the model says about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer<'a> {
    /// Index of the frame.
    pub frame: u64,
    /// Which encounter it belongs to.
    pub track: u64,
    /// What the inference took, in microseconds.
    pub latency_us: u32,
    /// Unnormalised class scores.
    pub logits: Vec<f32, CLASSES>,
    /// The embedding.
    pub embedding: Vec<f32, DIM>,
    /// Columns in pixels.
    pub width: u16,
    /// Rows in pixels.
    pub height: u16,
    /// Red, green, blue, one byte each.
    #[serde(borrow, with = "bytes")]
    pub pixels: &'a [u8],
}

/// An input with its time and its chance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timed<'a> {
    /// Milliseconds by a clock that does not run backwards: Unix time, or where the device has no
    /// such clock, any. It is believed no further than signed time goes.
    pub now_ms: u64,
    /// 32 random bits.
    pub draw: u32,
    /// What happens.
    #[serde(borrow)]
    pub input: Input<'a>,
}

/// Byte slices as serde's bytes, which borrow.
mod bytes {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<&'de [u8], D::Error> {
        <&[u8]>::deserialize(from)
    }
}
