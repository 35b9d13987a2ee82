//! The offer, which lets one device take one model for a short time, and the judge of both.

use serde::{Deserialize, Serialize};

use super::signature::verify;
use super::{ANY_HARDWARE, Manifest, RUNTIME_ABI, Role, Signed, TrustError, TrustRoot, Verified};
use crate::ids::{DeviceId, Digest};

/// Permission for one device to take one model, for a short time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The device.
    pub device: DeviceId,
    /// Digest of the manifest's body.
    pub manifest: Digest,
    /// The manifest's sequence.
    pub sequence: u64,
    /// When it was made, Unix milliseconds: a signed time, below which the device's never falls
    /// again.
    pub issued_ms: u64,
    /// When the offer ends, Unix milliseconds.
    pub expires_ms: u64,
    /// Makes each offer unique.
    pub nonce: u64,
}

/// What a device knows when it judges an offer.
#[derive(Clone, Copy, Debug)]
pub struct Judge<'a> {
    /// The keys that it believes.
    pub trust: &'a TrustRoot,
    /// The device itself.
    pub device: &'a DeviceId,
    /// Its hardware class.
    pub hardware: &'a str,
    /// Sequence that the manifest must exceed: [`super::Floor::under`] the release key.
    pub floor: u64,
    /// Attested time ([`super::Timekeeper::now`]), Unix milliseconds, if there is one.
    pub now_ms: Option<u64>,
}

/// An offer that is believed, with its manifest.
#[derive(Clone, Debug, PartialEq)]
pub struct Accepted<'m> {
    /// The model.
    pub manifest: Verified<Manifest<'m>>,
    /// When the offer was signed; goes to [`super::Timekeeper::heard`].
    pub issued_ms: u64,
}

impl Judge<'_> {
    /// Checks an offer and its manifest in the order: signatures and canonical forms, device,
    /// digest, consistency, time, hardware, runtime, sequence.
    ///
    /// # Errors
    /// The first that fails, as a [`TrustError`].
    pub fn offer<'m>(
        &self,
        offer: Signed<'_>,
        manifest: Signed<'m>,
    ) -> Result<Accepted<'m>, TrustError> {
        let offer: Verified<Offer> = verify(Role::Rollout, &self.trust.rollout, offer)?;
        let manifest: Verified<Manifest<'m>> =
            verify(Role::Release, &self.trust.release, manifest)?;
        if offer.device != *self.device {
            return Err(TrustError::WrongDevice);
        }
        if offer.manifest != manifest.digest() || offer.sequence != manifest.sequence {
            return Err(TrustError::WrongManifest);
        }
        manifest.legal()?;
        let now_ms = self.now_ms.ok_or(TrustError::NoTime)?;
        if now_ms > self.trust.expires_ms {
            return Err(TrustError::RootExpired);
        }
        if now_ms > offer.expires_ms || now_ms > manifest.expires_ms {
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
        Ok(Accepted {
            manifest,
            issued_ms: offer.issued_ms,
        })
    }
}
