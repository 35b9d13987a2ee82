//! Why something about a device was not done, in words for whoever asked.

use flywheel_shared::ids::{DeviceId, IdError};

use crate::pki::PkiError;
use crate::store::StoreError;

/// Why something about a device was not done.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// There is no such token.
    #[error("the enrolment token is unknown; make one with `flywheel device enroll`")]
    UnknownToken,
    /// The token is too old.
    #[error("the enrolment token has expired; make a new one with `flywheel device enroll`")]
    ExpiredToken,
    /// The token was used, by another key.
    #[error("the enrolment token was used already, for device {0}; each is good for one device")]
    UsedToken(DeviceId),
    /// The token does not allow this id.
    #[error("the enrolment token does not allow the device id {id:?}: {why}")]
    NotAllowed {
        /// The id that was asked for.
        id: String,
        /// What it allows.
        why: String,
    },
    /// The id is not one.
    #[error("{id:?} is not a device id: {why}")]
    BadId {
        /// The text.
        id: String,
        /// What is wrong with it.
        why: IdError,
    },
    /// The id is in use, or was.
    #[error("the device id {0} is taken; ids are never given out twice, choose another")]
    Taken(DeviceId),
    /// A label or group that no selector could name.
    #[error(
        "{0:?} can't be a label or group: letters, digits, spaces and - _ . / only, 1 to 64 of them"
    )]
    Label(String),
    /// There is no such device.
    #[error("there is no device {0}")]
    UnknownDevice(DeviceId),
    /// The system gave no random bytes.
    #[error("the system's random source failed: {0}")]
    Random(String),
    /// No certificate could be issued.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// It could not be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl FleetError {
    /// Whether the caller asked for something that is not allowed, rather than something being
    /// wrong with the server.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Random(_) | Self::Store(_) => false,
            Self::Pki(error) => matches!(error, PkiError::Request(_)),
            _ => true,
        }
    }
}
