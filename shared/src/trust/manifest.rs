//! The manifest: one model as a set of parts that belong together, each by length and digest, and
//! the small machines that hold arriving bytes against it.

use heapless::Vec;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::signature::body_digest;
use super::{MAX_BODY, TrustError, Verified};
use crate::canonical;
use crate::ids::Digest;

/// Version of the device's runtime interface that a manifest must name.
pub const RUNTIME_ABI: u16 = 1;
/// Most parts of a model package.
pub const MAX_PARTS: usize = 8;
/// Most deltas of a manifest.
pub const MAX_DELTAS: usize = 6;
/// Hardware class that fits every device.
pub const ANY_HARDWARE: &str = "any";

/// One model: everything that must be used together, by digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest<'a> {
    /// Name of the model's line, for people.
    pub name: &'a str,
    /// Rises with every release; a device takes only what is above its floor.
    pub sequence: u64,
    /// Hardware class, or [`ANY_HARDWARE`].
    pub hardware: &'a str,
    /// [`RUNTIME_ABI`].
    pub abi: u16,
    /// When it was made, Unix milliseconds.
    pub created_ms: u64,
    /// After this a device no longer takes it, Unix milliseconds.
    pub expires_ms: u64,
    /// How a device proves it.
    pub trial: TrialBounds,
    /// The parts, at most one of a kind.
    pub parts: Vec<Part, MAX_PARTS>,
    /// Shorter ways to some of the parts.
    pub deltas: Vec<Delta, MAX_DELTAS>,
}

impl<'a> Manifest<'a> {
    /// The part of a kind.
    pub fn part(&self, kind: PartKind) -> Option<&Part> {
        self.parts.iter().find(|part| part.kind == kind)
    }

    /// The part of a kind, without which nothing of that kind is loaded.
    ///
    /// # Errors
    /// [`TrustError::Unlisted`].
    pub fn listed(&self, kind: PartKind) -> Result<&Part, TrustError> {
        self.part(kind).ok_or(TrustError::Unlisted)
    }

    /// The delta that makes a part from a base the device has.
    ///
    /// # Errors
    /// [`TrustError::WrongBase`] if there is none from this base.
    pub fn delta(&self, kind: PartKind, base: &Digest) -> Result<&Delta, TrustError> {
        self.deltas
            .iter()
            .find(|delta| delta.part == kind && delta.base == *base)
            .ok_or(TrustError::WrongBase)
    }

    /// Whether every part is there, as `have` says of each.
    ///
    /// # Errors
    /// [`TrustError::Incomplete`].
    pub fn complete(&self, have: impl FnMut(&Part) -> bool) -> Result<(), TrustError> {
        if self.parts.iter().all(have) {
            Ok(())
        } else {
            Err(TrustError::Incomplete)
        }
    }

    /// Whether it lists each part once, and deltas only to parts it lists, none longer than what it
    /// spares.
    ///
    /// # Errors
    /// [`TrustError::Inconsistent`].
    pub fn legal(&self) -> Result<(), TrustError> {
        let twice = |(at, part): (usize, &Part)| {
            let earlier = &self.parts[..at];
            earlier.iter().any(|other| other.kind == part.kind)
        };
        let vain = |delta: &Delta| {
            self.part(delta.part)
                .is_none_or(|part| delta.len > part.len)
        };
        if self.parts.iter().enumerate().any(twice) || self.deltas.iter().any(vain) {
            Err(TrustError::Inconsistent)
        } else {
            Ok(())
        }
    }

    /// Reads a manifest that the device believed before and kept by its digest. That digest is what
    /// is trusted, so a rotated release key does not take the confirmed model away.
    ///
    /// # Errors
    /// [`TrustError::TooLarge`], [`TrustError::WrongManifest`] for any other digest,
    /// [`TrustError::Malformed`] or [`TrustError::NotCanonical`].
    pub fn recall(digest: &Digest, body: &'a [u8]) -> Result<Verified<Self>, TrustError> {
        if body_digest(body, MAX_BODY)? != *digest {
            return Err(TrustError::WrongManifest);
        }
        Ok(Verified::new(canonical::decode(body)?, *digest))
    }
}

/// One file of a model package.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it holds.
    pub kind: PartKind,
    /// Its length in bytes; nothing longer is fetched.
    pub len: u32,
    /// SHA-256 of its bytes.
    pub digest: Digest,
}

/// What a part holds. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PartKind {
    /// 0: an ONNX file.
    Onnx,
    /// 1: a burn record (burnpack).
    BurnRecord,
    /// 2: a [`crate::spec::ModelSpec`].
    Spec,
    /// 3: score parameters, as `device-core` reads them.
    Scores,
    /// 4: a [`crate::spec::Golden`].
    Golden,
}

/// A way to a part by what the device has already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// Which part it makes; that part's digest is the digest of the output.
    pub part: PartKind,
    /// SHA-256 of the part it starts from.
    pub base: Digest,
    /// How it is encoded.
    pub codec: u8,
    /// Its length in bytes; nothing longer is fetched.
    pub len: u32,
    /// SHA-256 of its bytes.
    pub digest: Digest,
}

/// What a model must hold to on live frames before it is confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrialBounds {
    /// Live frames to see.
    pub frames: u32,
    /// Largest allowed median inference time in microseconds; 0 for no bound.
    pub max_latency_us: u32,
    /// Smallest allowed mean confidence, 0 to 1; 0 for no bound.
    pub min_confidence: f32,
}

/// Bytes on their way, held against a signed length and digest. Never takes a byte too many, and
/// believes none before the last one came.
#[derive(Clone)]
pub struct Intake {
    left: u32,
    digest: Digest,
    hash: Sha256,
}

impl Intake {
    /// Awaits a part.
    pub fn part(part: &Part) -> Self {
        Self::new(part.len, part.digest)
    }

    /// Awaits the bytes of a delta.
    pub fn delta(delta: &Delta) -> Self {
        Self::new(delta.len, delta.digest)
    }

    fn new(len: u32, digest: Digest) -> Self {
        Self {
            left: len,
            digest,
            hash: Sha256::new(),
        }
    }

    /// Bytes that are still to come.
    pub fn left(&self) -> u32 {
        self.left
    }

    /// Takes the next bytes, or none of them.
    ///
    /// # Errors
    /// [`TrustError::TooLong`].
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), TrustError> {
        let len = u32::try_from(bytes.len()).map_err(|_| TrustError::TooLong)?;
        self.left = self.left.checked_sub(len).ok_or(TrustError::TooLong)?;
        self.hash.update(bytes);
        Ok(())
    }

    /// Whether the bytes that were taken are those that were signed.
    ///
    /// # Errors
    /// [`TrustError::Incomplete`] or [`TrustError::WrongDigest`].
    pub fn finish(self) -> Result<(), TrustError> {
        if self.left > 0 {
            return Err(TrustError::Incomplete);
        }
        if Digest(self.hash.finalize().into()) == self.digest {
            Ok(())
        } else {
            Err(TrustError::WrongDigest)
        }
    }
}

/// Checks that `bytes` are the part that was signed.
///
/// # Errors
/// [`TrustError::TooLong`], [`TrustError::Incomplete`] or [`TrustError::WrongDigest`].
pub fn check_part(part: &Part, bytes: &[u8]) -> Result<(), TrustError> {
    let mut intake = Intake::part(part);
    intake.take(bytes)?;
    intake.finish()
}

/// Checks that `bytes` are what a delta starts from; to be asked before it is applied.
///
/// # Errors
/// [`TrustError::WrongBase`].
pub fn check_base(delta: &Delta, bytes: &[u8]) -> Result<(), TrustError> {
    if Digest::of(bytes) == delta.base {
        Ok(())
    } else {
        Err(TrustError::WrongBase)
    }
}
