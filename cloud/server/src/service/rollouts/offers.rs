//! Offers: short-lived permissions for one device each, signed with the rollout key, and which one
//! a device should have in hand.

use std::sync::Arc;

use cloud_core::rollout::{Device, End, Progress};
use flywheel_shared::ids::{DeviceId, Digest};
use flywheel_shared::trust::{MAX_BODY, Offer, Role, check};
use serde::{Deserialize, Serialize};

use super::Rollouts;
use super::record::Entry;
use crate::ingest::OfferBytes;
use crate::service::registry::{Release, SignedManifest};
use crate::service::roots::Roots;
use crate::service::{Fault, lock};

/// How long one device may take up one offer: long enough for a slow link to fetch, short enough
/// that a stolen rollout key is of little use for long.
const OFFER_LIFE_MS: u64 = 10 * 60 * 1000;

/// A signed manifest, ready to be offered. Stored with the rollout, since the model may be released
/// again under another key and number.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "SignedManifest", into = "SignedManifest")]
pub(super) struct Package {
    digest: Digest,
    sequence: u64,
    body: Vec<u8>,
    signature: [u8; 64],
}

impl From<Package> for SignedManifest {
    fn from(package: Package) -> Self {
        Self {
            sequence: package.sequence,
            digest: package.digest,
            body: package.body,
            signature: package.signature.to_vec(),
        }
    }
}

impl TryFrom<SignedManifest> for Package {
    type Error = Fault;

    fn try_from(manifest: SignedManifest) -> Result<Self, Fault> {
        Self::new(&manifest)
    }
}

impl Package {
    /// A release, and the model before it as it was signed to come back.
    pub(super) fn of(release: &Release) -> Result<(Arc<Self>, Option<Arc<Self>>), Fault> {
        let back = release.back.as_ref().map(|back| Self::new(&back.manifest));
        Ok((
            Arc::new(Self::new(&release.manifest())?),
            back.transpose()?.map(Arc::new),
        ))
    }

    fn new(manifest: &SignedManifest) -> Result<Self, Fault> {
        Ok(Self {
            digest: manifest.digest,
            sequence: manifest.sequence,
            body: manifest.body.clone(),
            signature: manifest.signature.as_slice().try_into().map_err(|_| {
                Fault::Internal(format!(
                    "the signature of release {} is damaged",
                    manifest.sequence
                ))
            })?,
        })
    }

    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    /// Signs an offer of it to a device.
    pub(super) fn offer(
        &self,
        roots: &Roots,
        device: &DeviceId,
        now_ms: u64,
    ) -> Result<OfferBytes, Fault> {
        let mut nonce = [0u8; 8];
        getrandom::fill(&mut nonce)
            .map_err(|error| Fault::Internal(format!("no randomness: {error}")))?;
        let offer = Offer {
            device: device.clone(),
            manifest: self.digest,
            sequence: self.sequence,
            issued_ms: now_ms,
            expires_ms: now_ms + OFFER_LIFE_MS,
            nonce: u64::from_le_bytes(nonce),
        };
        let mut buffer = [0u8; MAX_BODY];
        let body = postcard::to_slice(&offer, &mut buffer)
            .map_err(|error| Fault::Internal(format!("the offer does not encode: {error}")))?
            .to_vec();
        Ok(OfferBytes {
            offer_signature: roots.sign_offer(&body),
            offer: body,
            manifest: self.body.clone(),
            manifest_signature: self.signature,
        })
    }
}

impl Rollouts {
    /// Whether devices believe the key that signed it.
    pub(super) fn is_believed(&self, package: &Package) -> bool {
        let key = self.roots.root().release;
        check(Role::Release, &key, &package.digest, &package.signature).is_ok()
    }

    /// The offer that a device should have in hand now, if any: of a running rollout once it was
    /// made, of the model before after a halt, else of the newest rollout that confirmed and is for
    /// the device, in case it joined, was tagged or came back later. `busy` is a device that has a
    /// candidate.
    ///
    /// # Errors
    /// If the offer can't be signed.
    pub fn standing_offer(
        &self,
        device: &Device,
        busy: bool,
        now_ms: u64,
    ) -> Result<Option<OfferBytes>, Fault> {
        if busy {
            return Ok(None);
        }
        let package = {
            let state = lock(&self.state);
            state
                .entries
                .values()
                .rev()
                .find_map(|entry| wanted(entry, device))
        };
        let newer = package.filter(|package| package.sequence > device.sequence);
        let Some(package) = newer.filter(|package| self.is_believed(package)) else {
            return Ok(None);
        };
        let id = super::parse(&device.id)?;
        package.offer(&self.roots, &id, now_ms).map(Some)
    }
}

/// What a rollout wants a device to run, if it has a say.
fn wanted(entry: &Entry, device: &Device) -> Option<Arc<Package>> {
    let head = &entry.rollout.head;
    let progress = entry.rollout.members.get(&device.id).map(|m| &m.progress);
    let model = match (&head.end, progress) {
        (_, Some(Progress::Returning { .. })) if head.returning => return entry.back.clone(),
        (None, Some(Progress::Offered { .. })) => true,
        (Some(End::Confirmed), None) => head.selector.matches(device),
        (Some(End::Confirmed), Some(Progress::Pending | Progress::Offered { .. })) => {
            head.selector.matches(device)
        }
        _ => false,
    };
    model.then(|| entry.package.clone())
}
