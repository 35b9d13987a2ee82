//! The trust root: which keys a device believes, and how one root follows another.
//!
//! After TUF (The Update Framework, 1.0.33, 5.3): version N+1 is signed by enough root keys of
//! version N *and* of its own, so that losing fewer keys than the threshold neither forges a root
//! nor ends the chain. A root that has expired stops offers but never a newer root.

use heapless::Vec;
use serde::{Deserialize, Serialize};

use super::floor::KeyId;
use super::signature::{body_digest, check, strong};
use super::{PublicKey, Role, TrustError, Verified};
use crate::canonical;
use crate::ids::Digest;
use crate::spec::serde_bytes_slice;

/// Most root keys.
pub const MAX_ROOT_KEYS: usize = 5;
/// Most bytes of a root's body.
pub const MAX_ROOT: usize = 512;
/// Most signatures on one root: those of the old keys and of the new.
pub const MAX_ROOT_SIGNATURES: usize = 2 * MAX_ROOT_KEYS;
/// Bytes of one signature on a root: the public key, then the signature.
pub const ROOT_SIGNATURE: usize = 32 + 64;

/// Keys of which so many must agree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    /// So many distinct keys must sign, 1 to the number of keys.
    pub threshold: u8,
    /// The public keys, distinct.
    pub keys: Vec<PublicKey, MAX_ROOT_KEYS>,
}

impl Keys {
    /// A single key.
    pub fn one(key: PublicKey) -> Self {
        let mut keys = Vec::new();
        // There is room for one.
        let _ = keys.push(key);
        Self { threshold: 1, keys }
    }
}

/// The keys that a device believes: pinned at enrolment, replaced only by a newer root.
/// The default one believes nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustRoot {
    /// Rises by exactly one with each root.
    pub version: u32,
    /// When it was made, Unix milliseconds: the first time that a device may rely on.
    pub issued_ms: u64,
    /// After this no offer is taken under it, Unix milliseconds.
    pub expires_ms: u64,
    /// Root keys, which sign roots.
    pub root: Keys,
    /// Release key, which signs manifests.
    pub release: PublicKey,
    /// Rollout key, which signs offers and time.
    pub rollout: PublicKey,
    /// Models up to this sequence are not taken. Where the release key is new, what a device
    /// confirmed before no longer counts, and this is its floor.
    pub min_sequence: u64,
}

/// A root and its signatures, not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedRoot<'a> {
    /// postcard bytes of a [`TrustRoot`].
    #[serde(with = "serde_bytes_slice")]
    pub body: &'a [u8],
    /// [`ROOT_SIGNATURE`] bytes for each signature.
    #[serde(with = "serde_bytes_slice")]
    pub signatures: &'a [u8],
}

impl<'a> SignedRoot<'a> {
    /// Reads the stored and transferred form, which is postcard and nothing after it.
    ///
    /// # Errors
    /// [`TrustError::Malformed`] or [`TrustError::NotCanonical`].
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, TrustError> {
        Ok(canonical::decode(bytes)?)
    }

    /// Public key and signature, one after the other.
    pub fn pairs(&self) -> impl Iterator<Item = (&'a PublicKey, &'a [u8])> + use<'a> {
        self.signatures
            .chunks_exact(ROOT_SIGNATURE)
            .filter_map(|pair| pair.split_first_chunk::<32>())
    }

    /// The digest of the body, if everything keeps to its caps.
    fn digest(&self) -> Result<Digest, TrustError> {
        if self.signatures.len() > MAX_ROOT_SIGNATURES * ROOT_SIGNATURE {
            return Err(TrustError::TooLarge);
        }
        if !self.signatures.len().is_multiple_of(ROOT_SIGNATURE) {
            return Err(TrustError::Malformed);
        }
        body_digest(self.body, MAX_ROOT)
    }

    /// Whether enough distinct keys signed. Keys are counted, not signatures.
    fn signed_by(&self, keys: &Keys, digest: &Digest) -> Result<(), TrustError> {
        let signed = |key: &&PublicKey| {
            self.pairs().any(|(by, signature)| {
                by == *key && check(Role::Root, by, digest, signature).is_ok()
            })
        };
        let distinct = |(at, key): (usize, &'_ PublicKey)| !keys.keys[..at].contains(key);
        let count = keys
            .keys
            .iter()
            .enumerate()
            .filter(|&(at, key)| distinct((at, key)))
            .map(|(_, key)| key)
            .filter(signed)
            .take(usize::from(keys.threshold))
            .count();
        if keys.threshold > 0 && count == usize::from(keys.threshold) {
            Ok(())
        } else {
            Err(TrustError::Threshold)
        }
    }
}

impl TrustRoot {
    /// Checks a first root, which is self-contained: what makes it trusted is that the caller got
    /// it at enrolment and keeps it.
    ///
    /// # Errors
    /// [`TrustError::TooLarge`], [`TrustError::Malformed`], [`TrustError::NotCanonical`],
    /// [`TrustError::BadKey`], [`TrustError::DuplicateKey`] or [`TrustError::Threshold`].
    pub fn pin(signed: SignedRoot<'_>) -> Result<Verified<Self>, TrustError> {
        let digest = signed.digest()?;
        let root: Self = canonical::decode(signed.body)?;
        root.legal()?;
        signed.signed_by(&root.root, &digest)?;
        Ok(Verified::new(root, digest))
    }

    /// Checks the root that follows this one. Expiry plays no part: a device that slept through
    /// several roots walks through all of them.
    ///
    /// # Errors
    /// As [`Self::pin`], and [`TrustError::OldRoot`] or [`TrustError::SkippedRoot`] for any version
    /// but the next.
    pub fn update(&self, signed: SignedRoot<'_>) -> Result<Verified<Self>, TrustError> {
        let digest = signed.digest()?;
        // The keys in hand come first, so that strangers' bytes are never decoded.
        signed.signed_by(&self.root, &digest)?;
        let next: Self = canonical::decode(signed.body)?;
        if next.version <= self.version {
            return Err(TrustError::OldRoot);
        }
        if next.version - self.version != 1 {
            return Err(TrustError::SkippedRoot);
        }
        next.legal()?;
        signed.signed_by(&next.root, &digest)?;
        Ok(Verified::new(next, digest))
    }

    /// Whether the root makes sense: a threshold that can be met, and no key weak or named twice.
    ///
    /// # Errors
    /// [`TrustError::Threshold`], [`TrustError::BadKey`] or [`TrustError::DuplicateKey`].
    pub fn legal(&self) -> Result<(), TrustError> {
        let threshold = usize::from(self.root.threshold);
        if threshold == 0 || threshold > self.root.keys.len() {
            return Err(TrustError::Threshold);
        }
        // An online key that is also a release or root key would undo the roles.
        let all = || self.root.keys.iter().chain([&self.release, &self.rollout]);
        for (at, key) in all().enumerate() {
            strong(key)?;
            if all().take(at).any(|other| other == key) {
                return Err(TrustError::DuplicateKey);
            }
        }
        Ok(())
    }

    /// Names the release key.
    pub fn release_id(&self) -> KeyId {
        KeyId::of(&self.release)
    }

    /// Names the rollout key.
    pub fn rollout_id(&self) -> KeyId {
        KeyId::of(&self.rollout)
    }
}
