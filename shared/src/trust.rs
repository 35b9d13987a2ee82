//! Who may say what: roles, signed bodies and the checks a device makes before it believes one.
//!
//! Roles after TUF (theupdateframework.io): *root* names the other keys, *release* signs model
//! manifests and is kept off the server, *rollout* is online and signs short-lived offers to one
//! device each, *device* signs what a device uploads. A signature covers a domain prefix (role
//! and format version) and the raw body, so that an offer never passes as a manifest. Bodies are
//! verified before they are decoded, and decode only from their single canonical spelling.

use core::fmt;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use heapless::Vec;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::canonical::{self, CanonicalError};
use crate::ids::{DeviceId, Digest};
use crate::spec::serde_bytes_slice;

/// Version of the device's runtime interface that a manifest must name.
pub const RUNTIME_ABI: u16 = 1;
/// Most bytes of a signed body; longer ones are refused unread.
pub const MAX_BODY: usize = 4096;
/// Most parts of a model package.
pub const MAX_PARTS: usize = 8;
/// Hardware class that fits every device.
pub const ANY_HARDWARE: &str = "any";

/// Who signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Names the release and rollout keys.
    Root,
    /// Signs [`Manifest`]s.
    Release,
    /// Signs [`Offer`]s.
    Rollout,
    /// Signs uploaded batches.
    Device,
}

impl Role {
    /// What stands in front of the body under a signature. All prefixes have the same length, so
    /// that none is the beginning of another.
    fn domain(self) -> &'static [u8; 24] {
        match self {
            Self::Root => b"flywheel/root/v1\0\0\0\0\0\0\0\0",
            Self::Release => b"flywheel/manifest/v1\0\0\0\0",
            Self::Rollout => b"flywheel/offer/v1\0\0\0\0\0\0\0",
            Self::Device => b"flywheel/batch/v1\0\0\0\0\0\0\0",
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

/// A value whose signature was checked; there is no other way to make one.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified<T> {
    value: T,
    digest: Digest,
}

impl<T> Verified<T> {
    /// Digest of the signed body, which names it.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

impl<T> core::ops::Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// Why something is not believed. The numbers are reported by devices and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum TrustError {
    /// The body exceeds [`MAX_BODY`].
    TooLarge = 1,
    /// The public key is not a key, or a weak one.
    BadKey = 2,
    /// The signature is not this role's over this body.
    BadSignature = 3,
    /// The body does not decode.
    Malformed = 4,
    /// The body decodes but is not spelled canonically.
    NotCanonical = 5,
    /// Past its expiry.
    Expired = 6,
    /// An offer to another device.
    WrongDevice = 7,
    /// A model for other hardware.
    WrongHardware = 8,
    /// A model for another runtime.
    WrongAbi = 9,
    /// Not newer than what the device has confirmed.
    Rollback = 10,
    /// The offer names another manifest.
    WrongManifest = 11,
    /// Bytes do not have the digest or length that was signed.
    WrongDigest = 12,
}

impl TrustError {
    /// The number that devices report.
    pub fn code(self) -> u16 {
        self as u16
    }
}

impl fmt::Display for TrustError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "the signed body is too large",
            Self::BadKey => "the public key is invalid or weak",
            Self::BadSignature => "the signature does not match",
            Self::Malformed => "the signed body does not decode",
            Self::NotCanonical => "the signed body is not in canonical form",
            Self::Expired => "it has expired",
            Self::WrongDevice => "the offer is for another device",
            Self::WrongHardware => "the model is for other hardware",
            Self::WrongAbi => "the model is for another runtime version",
            Self::Rollback => "it is not newer than the confirmed model",
            Self::WrongManifest => "the offer names another manifest",
            Self::WrongDigest => "the bytes do not have the signed digest or length",
        })
    }
}

impl core::error::Error for TrustError {}

impl From<CanonicalError> for TrustError {
    fn from(error: CanonicalError) -> Self {
        match error {
            CanonicalError::Malformed => Self::Malformed,
            CanonicalError::NotCanonical => Self::NotCanonical,
        }
    }
}

/// The keys that a device believes, signed by the root key and pinned at enrolment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustRoot {
    /// Rises by one at each rotation.
    pub version: u32,
    /// Public root key.
    pub root: [u8; 32],
    /// Public release key.
    pub release: [u8; 32],
    /// Public rollout key.
    pub rollout: [u8; 32],
}

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
    /// The parts.
    pub parts: Vec<Part, MAX_PARTS>,
}

impl Manifest<'_> {
    /// The part of a kind.
    pub fn part(&self, kind: PartKind) -> Option<&Part> {
        self.parts.iter().find(|part| part.kind == kind)
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

/// Permission for one device to take one model, for a short time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The device.
    pub device: DeviceId,
    /// Digest of the manifest's body.
    pub manifest: Digest,
    /// The manifest's sequence.
    pub sequence: u64,
    /// When the offer ends, Unix milliseconds.
    pub expires_ms: u64,
    /// Makes each offer unique.
    pub nonce: u64,
}

/// What a device knows when it judges an offer.
#[derive(Clone, Copy, Debug)]
pub struct Judge<'a> {
    /// The keys that were pinned.
    pub trust: &'a TrustRoot,
    /// The device itself.
    pub device: &'a DeviceId,
    /// Its hardware class.
    pub hardware: &'a str,
    /// Sequence of the confirmed model.
    pub floor: u64,
    /// Its clock, Unix milliseconds.
    pub now_ms: u64,
}

impl Judge<'_> {
    /// Checks an offer and its manifest in the order: signature, canonical form, device,
    /// expiry, hardware, runtime, sequence. Returns the manifest.
    pub fn offer<'m>(
        &self,
        offer: Signed<'_>,
        manifest: Signed<'m>,
    ) -> Result<Verified<Manifest<'m>>, TrustError> {
        let offer: Verified<Offer> = verify(Role::Rollout, &self.trust.rollout, offer)?;
        let manifest: Verified<Manifest<'m>> =
            verify(Role::Release, &self.trust.release, manifest)?;
        if offer.device != *self.device {
            return Err(TrustError::WrongDevice);
        }
        if offer.manifest != manifest.digest() || offer.sequence != manifest.sequence {
            return Err(TrustError::WrongManifest);
        }
        if self.now_ms > offer.expires_ms || self.now_ms > manifest.expires_ms {
            return Err(TrustError::Expired);
        }
        if manifest.hardware != ANY_HARDWARE && manifest.hardware != self.hardware {
            return Err(TrustError::WrongHardware);
        }
        if manifest.abi != RUNTIME_ABI {
            return Err(TrustError::WrongAbi);
        }
        if manifest.sequence <= self.floor {
            return Err(TrustError::Rollback);
        }
        Ok(manifest)
    }
}

/// Checks that `bytes` are the part that was signed.
pub fn check_part(part: &Part, bytes: &[u8]) -> Result<(), TrustError> {
    if bytes.len() as u64 == u64::from(part.len) && Digest::of(bytes) == part.digest {
        Ok(())
    } else {
        Err(TrustError::WrongDigest)
    }
}

/// Checks a signature over the raw bytes of a body, then decodes it.
pub fn verify<'a, T>(
    role: Role,
    key: &[u8; 32],
    signed: Signed<'a>,
) -> Result<Verified<T>, TrustError>
where
    T: Deserialize<'a> + Serialize,
{
    if signed.body.len() > MAX_BODY {
        return Err(TrustError::TooLarge);
    }
    let digest = Digest::of(signed.body);
    check(role, key, &digest, signed.signature)?;
    Ok(Verified {
        value: canonical::decode(signed.body)?,
        digest,
    })
}

/// Checks the root's own signature on the trust root, which is self-contained.
pub fn verify_root(signed: Signed<'_>) -> Result<Verified<TrustRoot>, TrustError> {
    if signed.body.len() > MAX_BODY {
        return Err(TrustError::TooLarge);
    }
    // The key to check with is inside: what makes it trusted is that the caller pinned it.
    let claimed: TrustRoot = canonical::decode(signed.body)?;
    verify(Role::Root, &claimed.root, signed)
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
pub fn check(
    role: Role,
    key: &[u8; 32],
    digest: &Digest,
    signature: &[u8],
) -> Result<(), TrustError> {
    let key = VerifyingKey::from_bytes(key).map_err(|_| TrustError::BadKey)?;
    if key.is_weak() {
        return Err(TrustError::BadKey);
    }
    let signature = Signature::from_slice(signature).map_err(|_| TrustError::BadSignature)?;
    key.verify_strict(&message(role, digest), &signature)
        .map_err(|_| TrustError::BadSignature)
}

/// The digest that a device signs for a batch.
pub fn batch_digest(device: &DeviceId, epoch: u32, count: u16, records: &[u8]) -> Digest {
    let mut hash = BatchHash::new(device, epoch, count);
    hash.update(records);
    hash.digest()
}

/// [`batch_digest`] of records that are never in memory as a whole.
pub struct BatchHash(Sha256);

impl BatchHash {
    /// Of a batch with no records yet.
    pub fn new(device: &DeviceId, epoch: u32, count: u16) -> Self {
        let id = device.as_str().as_bytes();
        let mut hash = Sha256::new();
        hash.update([id.len() as u8]);
        hash.update(id);
        hash.update(epoch.to_le_bytes());
        hash.update(count.to_le_bytes());
        Self(hash)
    }

    /// Takes the next piece of the records.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// The digest of all of them.
    pub fn digest(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// Domain prefix and digest: the 56 bytes that ed25519 sees.
fn message(role: Role, digest: &Digest) -> [u8; 56] {
    let mut out = [0u8; 56];
    out[..24].copy_from_slice(role.domain());
    out[24..].copy_from_slice(&digest.0);
    out
}

#[cfg(test)]
mod tests;
