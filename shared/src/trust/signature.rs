//! Signatures under a role: who signs, what exactly ed25519 sees, and when a key is none.

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::TrustError;
use crate::canonical;
use crate::ids::{DeviceId, Digest};
use crate::spec::serde_bytes_slice;

/// Most bytes of a signed body; longer ones are refused unread.
pub const MAX_BODY: usize = 4096;

/// A public ed25519 key.
pub type PublicKey = [u8; 32];

/// As what something is signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A [`super::TrustRoot`], by root keys.
    Root,
    /// A [`super::Manifest`], by the release key.
    Release,
    /// An [`super::Offer`], by the rollout key.
    Rollout,
    /// A batch of samples, by the device's key.
    Device,
    /// A [`super::TimeStamp`], by the rollout key.
    Time,
}

impl Role {
    /// What stands in front of the body's digest under a signature. All prefixes have the same
    /// length, so that none is the beginning of another.
    pub fn domain(self) -> &'static [u8; 24] {
        match self {
            Self::Root => b"flywheel/root/v2\0\0\0\0\0\0\0\0",
            Self::Release => b"flywheel/manifest/v2\0\0\0\0",
            Self::Rollout => b"flywheel/offer/v2\0\0\0\0\0\0\0",
            Self::Device => b"flywheel/batch/v1\0\0\0\0\0\0\0",
            Self::Time => b"flywheel/time/v1\0\0\0\0\0\0\0\0",
        }
    }
}

/// A body and a signature over it, not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed<'a> {
    /// postcard bytes.
    #[serde(with = "serde_bytes_slice")]
    pub body: &'a [u8],
    /// ed25519, 64 bytes.
    #[serde(with = "serde_bytes_slice")]
    pub signature: &'a [u8],
}

/// A value whose signature was checked, or whose digest was when it was stored; there is no other
/// way to make one.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified<T> {
    value: T,
    digest: Digest,
}

impl<T> Verified<T> {
    pub(super) fn new(value: T, digest: Digest) -> Self {
        Self { value, digest }
    }

    /// Digest of the signed body, which names it.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The value alone.
    pub fn into_inner(self) -> T {
        self.value
    }
}

impl<T> core::ops::Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// Checks a signature over the raw bytes of a body, then decodes it.
///
/// # Errors
/// [`TrustError::TooLarge`], [`TrustError::BadKey`], [`TrustError::BadSignature`],
/// [`TrustError::Malformed`] or [`TrustError::NotCanonical`], in that order.
pub fn verify<'a, T>(
    role: Role,
    key: &PublicKey,
    signed: Signed<'a>,
) -> Result<Verified<T>, TrustError>
where
    T: Deserialize<'a> + Serialize,
{
    let digest = body_digest(signed.body, MAX_BODY)?;
    check(role, key, &digest, signed.signature)?;
    Ok(Verified::new(canonical::decode(signed.body)?, digest))
}

/// The digest of a body that keeps to its cap.
pub(super) fn body_digest(body: &[u8], cap: usize) -> Result<Digest, TrustError> {
    if body.len() > cap {
        return Err(TrustError::TooLarge);
    }
    Ok(Digest::of(body))
}

/// Signs a body; the counterpart of [`verify`].
pub fn sign(role: Role, key: &SigningKey, body: &[u8]) -> [u8; 64] {
    sign_digest(role, key, &Digest::of(body))
}

/// Signs a digest under a role; used for batches, whose body is never in one piece.
pub fn sign_digest(role: Role, key: &SigningKey, digest: &Digest) -> [u8; 64] {
    key.sign(&message(role, digest)).to_bytes()
}

/// Checks a signature made by [`sign_digest`] in strict mode (no weak keys, no malleability).
///
/// # Errors
/// [`TrustError::BadKey`] or [`TrustError::BadSignature`].
pub fn check(
    role: Role,
    key: &PublicKey,
    digest: &Digest,
    signature: &[u8],
) -> Result<(), TrustError> {
    let key = strong(key)?;
    let signature = Signature::from_slice(signature).map_err(|_| TrustError::BadSignature)?;
    key.verify_strict(&message(role, digest), &signature)
        .map_err(|_| TrustError::BadSignature)
}

/// The key, if it is one: a point of large order in its one canonical spelling, without which one
/// key could count as two.
///
/// # Errors
/// [`TrustError::BadKey`].
pub fn strong(key: &PublicKey) -> Result<VerifyingKey, TrustError> {
    // RFC 8032, 5.1.3: y, without the sign bit, is below p = 2^255 - 19.
    let [low, middle @ .., high] = key;
    let canonical = *low < 0xED || high & 0x7F != 0x7F || middle.iter().any(|byte| *byte != 0xFF);
    let key = VerifyingKey::from_bytes(key).map_err(|_| TrustError::BadKey)?;
    if canonical && !key.is_weak() {
        Ok(key)
    } else {
        Err(TrustError::BadKey)
    }
}

/// The digest that a device signs for a batch.
pub fn batch_digest(device: &DeviceId, epoch: u32, count: u16, records: &[u8]) -> Digest {
    let id = device.as_str().as_bytes();
    let mut hash = Sha256::new();
    hash.update([id.len() as u8]);
    hash.update(id);
    hash.update(epoch.to_le_bytes());
    hash.update(count.to_le_bytes());
    hash.update(records);
    Digest(hash.finalize().into())
}

/// Domain prefix and digest: the 56 bytes that ed25519 sees.
fn message(role: Role, digest: &Digest) -> [u8; 56] {
    let mut out = [0u8; 56];
    out[..24].copy_from_slice(role.domain());
    out[24..].copy_from_slice(&digest.0);
    out
}
