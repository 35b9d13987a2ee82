//! A model's new part as the difference to the one that a device has.
//!
//! The cloud tries every [`Way`] and takes the smallest; the device takes what it is told, within
//! the length that was signed. Nothing here is trusted: the device checks the digest of what it
//! starts from, and of what comes out.
//!
//! Weights that are trained a little further change in their low bits. A compressor does not see
//! that, since it looks for equal bytes; so each value's bits are taken as an integer, the old one
//! is subtracted, and the bytes of equal weight are put side by side ([`difference`]). What changed
//! in a few places, a head that grew say, is copied from the old part around them ([`patch`]).
//!
//! The compressor under both is Deflate: it needs 32 KiB on the device whatever the model's size, and
//! no C compiler. What is left after the steps above has no long repeats, so that zstd would gain
//! little.
#![forbid(unsafe_code)]

mod difference;
mod onnx;
mod patch;
mod runs;

use std::io::{self, Read, Write};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use thiserror::Error;

/// How a difference is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Deflate over the new part; the old one is not used.
    Full,
    /// Copies from the old part, and what stands between them.
    Patch,
    /// Differences of the values of equally long tensors, by byte planes.
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
    /// Deflate does not understand it.
    #[error("the difference does not decompress: {0}")]
    Packed(#[from] io::Error),
    /// It makes more or fewer bytes than were announced.
    #[error("the difference makes more or fewer than the {0} bytes announced")]
    Length(usize),
    /// It speaks of bytes that neither part has.
    #[error("the difference does not fit the part it starts from")]
    Misfit,
}

/// The smallest coding of `target` for who has `base`; `None` if `target` itself is no larger.
///
/// # Errors
/// None that a caller can mend: only that of a failed write to memory.
pub fn encode(base: &[u8], target: &[u8]) -> Result<Option<(Way, Vec<u8>)>, DeltaError> {
    let mut best: Option<(Way, Vec<u8>)> = None;
    for way in Way::ALL {
        let coded = encode_as(way, base, target)?;
        let least = best.as_ref().map_or(target.len(), |(_, bytes)| bytes.len());
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
        Way::Full => pack(target),
        Way::Patch => patch::encode(base, target),
        Way::Difference => difference::encode(base, target),
    }
}

/// Makes the new part of the old one; it has `len` bytes, and nothing much longer is ever held.
///
/// # Errors
/// [`DeltaError`], for any bytes that [`encode`] did not make of this `base`, unless they happen to
/// make `len` bytes: check the digest of what comes out.
pub fn apply(way: Way, base: &[u8], delta: &[u8], len: usize) -> Result<Vec<u8>, DeltaError> {
    let bytes = match way {
        Way::Full => unpack(delta, len)?,
        Way::Patch => patch::apply(base, delta, len)?,
        Way::Difference => difference::apply(base, delta, len)?,
    };
    if bytes.len() == len {
        Ok(bytes)
    } else {
        Err(DeltaError::Length(len))
    }
}

fn pack(bytes: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// What [`pack`] made, if it is at most `most` bytes.
fn unpack(packed: &[u8], most: usize) -> Result<Vec<u8>, DeltaError> {
    let mut bytes = Vec::new();
    let mut decoder = DeflateDecoder::new(packed).take(most as u64 + 1);
    decoder.read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(DeltaError::Length(most));
    }
    Ok(bytes)
}

/// Two byte strings in one: the length of the first as `u32` little endian, the first, the second.
fn join(first: &[u8], second: &[u8]) -> Vec<u8> {
    // A part is shorter than 4 GiB, and Deflate adds next to nothing.
    let head = (first.len() as u32).to_le_bytes();
    [&head[..], first, second].concat()
}

/// What [`join`] joined.
fn split(joined: &[u8]) -> Result<(&[u8], &[u8]), DeltaError> {
    let (head, rest) = joined.split_first_chunk().ok_or(DeltaError::Misfit)?;
    rest.split_at_checked(u32::from_le_bytes(*head) as usize)
        .ok_or(DeltaError::Misfit)
}

/// Appends a number in base 128, least significant digits first.
fn put(out: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

#[cfg(test)]
mod tests;
