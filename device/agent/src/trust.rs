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

/// The cloud is not asked more often than this in milliseconds, but for once on each connection.
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

    /// The cloud is to be asked on this connection.
    pub fn new_connection(&mut self) {
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
