//! A model's new part as the difference to the one that a device has.
//!
//! The cloud tries every [`Way`] and takes the smallest; the device takes what it is told, within
//! the length that was signed. Nothing here is trusted: the device checks the digest of what it
//! starts from, and of what comes out.
//!
//! Weights that are trained a little further change in their low bits. zstd alone does not see
//! that, since it looks for equal bytes; so each value's bits are taken as an integer, the old one
//! is subtracted, and the bytes of equal weight are put side by side ([`difference`]).
#![forbid(unsafe_code)]

mod difference;
mod onnx;
mod runs;

use std::io::{self, Read, Write};

use thiserror::Error;
use zstd::stream::{read, write};

/// zstd's level up to [`LARGE`] bytes; the cloud encodes once, many devices fetch.
const LEVEL: i32 = 19;
/// From this many bytes on a level that takes seconds and not minutes.
const LARGE: usize = 16 << 20;
const LARGE_LEVEL: i32 = 9;
/// zstd's smallest and largest window, as logarithms.
const WINDOW: std::ops::RangeInclusive<u32> = 10..=27;

/// How a difference is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// zstd over the new part; the old one is not used.
    Full,
    /// zstd with the old part before the new one (`zstd --patch-from`).
    Patch,
    /// Differences of the values of equally long tensors, by byte planes, under zstd.
    Difference,
}

impl Way {
    /// All ways.
    pub const ALL: [Self; 3] = [Self::Full, Self::Patch, Self::Difference];

    /// Its number in a manifest.
    pub fn code(self) -> u8 {
        match self {
            Self::Full => 1,
            Self::Patch => 2,
            Self::Difference => 3,
        }
    }

    /// The way with a number; `None` for one that a newer cloud knows.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.code() == code)
    }
}

/// Why a difference can't be applied.
#[derive(Debug, Error)]
pub enum DeltaError {
    /// zstd does not understand it.
    #[error("the difference does not decompress: {0}")]
    Zstd(#[from] io::Error),
    /// It makes more or fewer bytes than were announced.
    #[error("the difference makes more or fewer than the {0} bytes announced")]
    Length(usize),
    /// It speaks of bytes that neither part has.
    #[error("the difference does not fit the part it starts from")]
    Runs,
}

/// The smallest coding of `target` for who has `base`; `None` if `target` itself is no larger.
///
/// # Errors
/// If zstd fails, which it does for want of memory only.
pub fn encode(base: &[u8], target: &[u8]) -> Result<Option<(Way, Vec<u8>)>, DeltaError> {
    let mut best: Option<(Way, Vec<u8>)> = None;
    for way in Way::ALL {
        let coded = encode_as(way, base, target)?;
        let least = best
            .as_ref()
            .map_or(target.len(), |(_, bytes)| bytes.len());
        if coded.len() < least {
            best = Some((way, coded));
        }
    }
    Ok(best)
}

/// Codes `target` in one way.
///
/// # Errors
/// As [`encode`].
pub fn encode_as(way: Way, base: &[u8], target: &[u8]) -> Result<Vec<u8>, DeltaError> {
    match way {
        Way::Full => pack(&[], target),
        Way::Patch => pack(base, target),
        Way::Difference => difference::encode(base, target),
    }
}

/// Makes the new part of the old one; it has `len` bytes, and nothing longer is ever held.
///
/// # Errors
/// [`DeltaError`], for any bytes that [`encode`] did not make of this `base`, unless they happen to
/// make `len` bytes: check the digest of what comes out.
pub fn apply(way: Way, base: &[u8], delta: &[u8], len: usize) -> Result<Vec<u8>, DeltaError> {
    let bytes = match way {
        Way::Full => unpack(&[], delta, len)?,
        Way::Patch => unpack(base, delta, len)?,
        Way::Difference => return difference::apply(base, delta, len),
    };
    if bytes.len() == len {
        Ok(bytes)
    } else {
        Err(DeltaError::Length(len))
    }
}

/// Logarithm of a window that reaches over both.
fn window(prefix: usize, len: usize) -> u32 {
    let bits = usize::BITS - prefix.saturating_add(len).leading_zeros();
    bits.clamp(*WINDOW.start(), *WINDOW.end())
}

/// zstd over `bytes`, with `prefix` as what stood before.
fn pack(prefix: &[u8], bytes: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let large = prefix.len().saturating_add(bytes.len()) >= LARGE;
    let level = if large { LARGE_LEVEL } else { LEVEL };
    let mut encoder = write::Encoder::with_ref_prefix(Vec::new(), level, prefix)?;
    encoder.window_log(window(prefix.len(), bytes.len()))?;
    encoder.long_distance_matching(large)?;
    encoder.include_checksum(false)?;
    encoder.set_pledged_src_size(Some(bytes.len() as u64))?;
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// What [`pack`] made, up to one byte more than `most`.
fn unpack(prefix: &[u8], packed: &[u8], most: usize) -> Result<Vec<u8>, DeltaError> {
    let mut decoder = read::Decoder::with_ref_prefix(packed, prefix)?;
    decoder.window_log_max(window(prefix.len(), most))?;
    let mut bytes = Vec::new();
    decoder.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(DeltaError::Length(most));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
