//! Time that a device may rely on to tell whether an offer has expired.
//!
//! A device asks with a nonce and the rollout key answers: that is time which nobody can hold back
//! or replay. Every signed time, old or new, raises a floor that outlives restarts, so that a clock
//! set back does not bring old offers back to life.

use serde::{Deserialize, Serialize};

use super::signature::verify;
use super::{Floor, Role, Signed, TrustError, TrustRoot, Verified};
use crate::ids::DeviceId;

/// What time it is, said to one device in answer to its question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimeStamp {
    /// The device.
    pub device: DeviceId,
    /// The question.
    pub nonce: u64,
    /// Unix milliseconds.
    pub now_ms: u64,
}

/// What a device knows of the time. Its `floor` is to be kept across restarts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timekeeper {
    floor: Floor,
    /// The last answer of this start: what it said, as a floor, and when it came by the device's
    /// monotonic clock.
    anchor: Option<(Floor, u64)>,
}

impl Timekeeper {
    /// Goes on from a stored floor; the default one on a new device.
    pub fn new(floor: Floor) -> Self {
        Self {
            floor,
            anchor: None,
        }
    }

    /// What to store.
    pub fn floor(&self) -> Floor {
        self.floor
    }

    /// Attested time, Unix milliseconds: the device's clock if it has one and it is not behind what
    /// was signed, and signed time of this start plus what has passed since, whichever is later.
    /// `None` if there is neither: an old floor says what has passed at least, and not how much.
    ///
    /// `mono_ms` is any clock that does not run backwards, the same at every call.
    pub fn now(&self, trust: &TrustRoot, clock_ms: Option<u64>, mono_ms: u64) -> Option<u64> {
        let key = trust.rollout_id();
        let floor = self.floor.under(key, trust.issued_ms);
        let clock = clock_ms.filter(|clock_ms| *clock_ms >= floor);
        let anchor = self.anchor.filter(|(said, _)| said.key == key);
        let since = anchor.map(|(said, at)| said.at.saturating_add(mono_ms.saturating_sub(at)));
        clock.max(since)
    }

    /// Takes the answer to a question.
    ///
    /// # Errors
    /// Those of [`super::verify`], [`TrustError::WrongDevice`] and [`TrustError::WrongNonce`].
    pub fn answer(
        &mut self,
        trust: &TrustRoot,
        device: &DeviceId,
        nonce: u64,
        signed: Signed<'_>,
        mono_ms: u64,
    ) -> Result<(), TrustError> {
        let stamp: Verified<TimeStamp> = verify(Role::Time, &trust.rollout, signed)?;
        if stamp.device != *device {
            return Err(TrustError::WrongDevice);
        }
        if stamp.nonce != nonce {
            return Err(TrustError::WrongNonce);
        }
        self.heard(trust, stamp.now_ms);
        // The floor may be higher: then time has been signed ahead, and does not go back.
        self.anchor = Some((self.floor, mono_ms));
        Ok(())
    }

    /// Takes the time in something else that the rollout key signed and that was believed, an offer
    /// say: it may be old, so only the floor rises. Returns whether it did.
    pub fn heard(&mut self, trust: &TrustRoot, signed_ms: u64) -> bool {
        let least = trust.issued_ms.max(signed_ms);
        self.floor.raise(trust.rollout_id(), least)
    }
}
