//! What the device believes: the newest trust root it was given, the time that was signed, and when
//! it asks the cloud for either.
//!
//! The root lies in the identity's folder, where enrolment put the first one; a newer one replaces it
//! whole. Floors need no reset when it does ([`flywheel_shared::trust::Floor`]).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flywheel_shared::ids::DeviceId;
use flywheel_shared::message::Attest;
use flywheel_shared::trust::{Signed, SignedRoot, Timekeeper, TrustError, TrustRoot};
use thiserror::Error;

use crate::clock::Moment;
use crate::state::{State, StateError};
use crate::{files, identity, wire};

/// Offers make the device ask no more often than this in milliseconds.
const ASK_AGAIN_MS: u64 = 10_000;

/// Why an answer of the cloud is not taken.
#[derive(Debug, Error)]
pub enum UpdateError {
    /// It is not believed.
    #[error("{0} (error {code})", code = .0.code())]
    Refused(TrustError),
    /// It can't be stored, so it does not hold: nothing that is lost with the power may.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// As [`UpdateError::Io`].
    #[error(transparent)]
    State(#[from] StateError),
}

impl From<TrustError> for UpdateError {
    fn from(error: TrustError) -> Self {
        Self::Refused(error)
    }
}

/// The device's keys and time.
pub struct Trust {
    root: TrustRoot,
    time: Timekeeper,
    path: PathBuf,
    state: Arc<State>,
    wanted: bool,
    /// The question that is not answered yet.
    nonce: Option<u64>,
    asked_ms: Option<u64>,
}

impl Trust {
    /// Goes on with a root and the stored time.
    ///
    /// # Errors
    /// If the state can't be read.
    pub fn open(data: &Path, root: TrustRoot, state: &Arc<State>) -> Result<Self, StateError> {
        Ok(Self {
            root,
            time: Timekeeper::new(state.time_floor()?),
            path: identity::trust_file(data),
            state: Arc::clone(state),
            wanted: false,
            nonce: None,
            asked_ms: None,
        })
    }

    /// The keys that are believed.
    pub fn root(&self) -> &TrustRoot {
        &self.root
    }

    /// Attested time, Unix milliseconds, if there is any.
    pub fn now(&self, now: Moment) -> Option<u64> {
        self.time.now(&self.root, now.wall_ms, now.mono_ms)
    }

    /// The cloud is to be asked now: on each connection, and after each newer root, under which time
    /// has to be attested again.
    pub fn refresh(&mut self) {
        self.wanted = true;
        self.nonce = None;
        self.asked_ms = None;
    }

    /// Has the cloud asked, unless it was just now. Returns whether it will be.
    pub fn want(&mut self, mono_ms: u64) -> bool {
        let asked = |at: u64| mono_ms < at.saturating_add(ASK_AGAIN_MS);
        self.wanted |= !self.asked_ms.is_some_and(asked);
        self.wanted
    }

    /// The question to send now, if there is one.
    pub fn question(&mut self, mono_ms: u64) -> Option<Attest> {
        if !self.wanted {
            return None;
        }
        let mut nonce = [0; 8];
        if let Err(error) = getrandom::fill(&mut nonce) {
            tracing::error!(%error, "the system gives no randomness; the time is not asked for");
            return None;
        }
        let nonce = u64::from_le_bytes(nonce);
        self.wanted = false;
        self.nonce = Some(nonce);
        self.asked_ms = Some(mono_ms);
        Some(Attest {
            nonce,
            root_version: self.root.version,
        })
    }

    /// Takes the root that follows the one in hand; durable on return.
    ///
    /// # Errors
    /// [`UpdateError`]; the root in hand holds then.
    pub fn update(&mut self, signed: SignedRoot<'_>) -> Result<(), UpdateError> {
        let next = self.root.update(signed)?.into_inner();
        files::replace(&self.path, &wire::bytes(&signed)).map_err(|source| UpdateError::Io {
            path: self.path.clone(),
            source,
        })?;
        tracing::info!(version = next.version, "a newer trust root is in force");
        self.root = next;
        Ok(())
    }

    /// Takes the answer to the last question.
    ///
    /// # Errors
    /// [`UpdateError`]; no time was learnt then.
    pub fn answer(
        &mut self,
        device: &DeviceId,
        signed: Signed<'_>,
        now: Moment,
    ) -> Result<(), UpdateError> {
        let nonce = self.nonce.ok_or(TrustError::WrongNonce)?;
        let mut time = self.time;
        time.answer(&self.root, device, nonce, signed, now.mono_ms)?;
        self.state.save_time_floor(time.floor())?;
        self.time = time;
        self.nonce = None;
        Ok(())
    }

    /// Takes the time at which an offer was signed that is believed.
    ///
    /// # Errors
    /// If it can't be stored.
    pub fn heard(&mut self, signed_ms: u64) -> Result<(), StateError> {
        let mut time = self.time;
        if time.heard(&self.root, signed_ms) {
            self.state.save_time_floor(time.floor())?;
            self.time = time;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use flywheel_shared::trust::{Keys, Role, TimeStamp, sign};

    use super::*;
    use crate::identity::TrustBytes;

    fn public(key: &SigningKey) -> [u8; 32] {
        key.verifying_key().to_bytes()
    }

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn root(version: u32, rollout: &SigningKey) -> TrustRoot {
        TrustRoot {
            version,
            issued_ms: 1_000,
            expires_ms: u64::MAX,
            root: Keys::one(public(&key(1))),
            release: public(&key(2)),
            rollout: public(rollout),
            min_sequence: 0,
        }
    }

    fn sealed(root: &TrustRoot) -> Vec<u8> {
        let body = wire::bytes(root);
        let signature = sign(Role::Root, &key(1), &body);
        wire::bytes(&SignedRoot {
            body: &body,
            signatures: &[&public(&key(1))[..], &signature].concat(),
        })
    }

    fn at(mono_ms: u64, wall_ms: Option<u64>) -> Moment {
        Moment { wall_ms, mono_ms }
    }

    struct Device {
        data: tempfile::TempDir,
        state: Arc<State>,
        id: DeviceId,
    }

    impl Device {
        fn new() -> Self {
            let data = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(identity::folder(data.path())).unwrap();
            Self {
                state: Arc::new(State::open(data.path()).unwrap()),
                data,
                id: "cam1".parse().unwrap(),
            }
        }

        fn trust(&self, root: TrustRoot) -> Trust {
            Trust::open(self.data.path(), root, &self.state).unwrap()
        }

        fn answer(&self, trust: &mut Trust, by: &SigningKey, ask: Attest, now_ms: u64) -> bool {
            let body = wire::bytes(&TimeStamp {
                device: self.id.clone(),
                nonce: ask.nonce,
                now_ms,
            });
            let signature = sign(Role::Time, by, &body);
            let signed = Signed {
                body: &body,
                signature: &signature,
            };
            trust.answer(&self.id, signed, at(50, None)).is_ok()
        }
    }

    #[test]
    fn a_newer_root_replaces_the_stored_one_and_an_older_one_does_not() {
        let device = Device::new();
        let mut trust = device.trust(root(1, &key(3)));
        let second = root(2, &key(4));
        let bytes = sealed(&second);
        trust
            .update(SignedRoot::from_bytes(&bytes).unwrap())
            .unwrap();
        assert_eq!(trust.root(), &second);
        let path = identity::trust_file(device.data.path());
        let stored = std::fs::read(&path).unwrap();
        assert_eq!(TrustBytes::verify(stored, &path).unwrap().1, second);
        for (version, error) in [
            (1, TrustError::OldRoot),
            (2, TrustError::OldRoot),
            (4, TrustError::SkippedRoot),
        ] {
            let bytes = sealed(&root(version, &key(5)));
            let update = trust.update(SignedRoot::from_bytes(&bytes).unwrap());
            assert!(matches!(update, Err(UpdateError::Refused(e)) if e == error));
        }
        assert_eq!(trust.root(), &second);
    }

    #[test]
    fn a_root_that_cannot_be_stored_does_not_hold() {
        let device = Device::new();
        let mut trust = device.trust(root(1, &key(3)));
        std::fs::remove_dir_all(identity::folder(device.data.path())).unwrap();
        let bytes = sealed(&root(2, &key(4)));
        let update = trust.update(SignedRoot::from_bytes(&bytes).unwrap());
        assert!(matches!(update, Err(UpdateError::Io { .. })));
        assert_eq!(trust.root().version, 1);
    }

    #[test]
    fn each_question_has_a_nonce_of_its_own_and_one_answer() {
        let device = Device::new();
        let mut trust = device.trust(root(1, &key(3)));
        assert_eq!(trust.question(0), None);
        trust.refresh();
        let first = trust.question(0).unwrap();
        assert_eq!((first.root_version, trust.question(1)), (1, None));
        // Not again at once, unless the connection is new.
        assert!(!trust.want(9_999));
        assert!(trust.want(10_000));
        let second = trust.question(10_000).unwrap();
        assert_ne!(first.nonce, second.nonce);
        assert!(!device.answer(&mut trust, &key(3), first, 5_000));
        assert!(!device.answer(&mut trust, &key(9), second, 5_000));
        assert_eq!(trust.now(at(50, None)), None);
        assert!(device.answer(&mut trust, &key(3), second, 5_000));
        assert_eq!(trust.now(at(60, None)), Some(5_010));
        assert!(!device.answer(&mut trust, &key(3), second, 5_000));
    }

    #[test]
    fn the_time_floor_outlives_a_restart_and_a_clock_set_back_is_not_believed() {
        let device = Device::new();
        let mut trust = device.trust(root(1, &key(3)));
        trust.heard(7_000).unwrap();
        trust.heard(6_000).unwrap();
        let trust = device.trust(root(1, &key(3)));
        assert_eq!(trust.now(at(0, None)), None);
        assert_eq!(trust.now(at(0, Some(6_999))), None);
        assert_eq!(trust.now(at(0, Some(7_000))), Some(7_000));
        // Under another rollout key the floor is the root's.
        let trust = device.trust(root(2, &key(4)));
        assert_eq!(trust.now(at(0, Some(1_000))), Some(1_000));
        assert_eq!(trust.now(at(0, Some(999))), None);
    }
}
