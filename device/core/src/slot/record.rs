//! What a slot stores and reports: the reasons, the record and its bytes. It stands apart from the
//! state machine because these outlive a release: a newer agent reads an older one's record.

use core::fmt;

use flywheel_shared::ids::Digest;
use flywheel_shared::message::SlotState;
use flywheel_shared::trust::{Floor, KeyId, TrialBounds, TrustError};
use heapless::Vec;
use serde::{Deserialize, Serialize};

/// Most bytes of a stored [`SlotRecord`].
pub const RECORD_MAX: usize = 224;
/// Version of the stored form.
const RECORD_VERSION: u8 = 2;

/// Why a model was given up. The numbers are reported by devices and never reused; those below
/// 100 belong to [`TrustError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum SlotError {
    /// A golden input gave another answer than in the cloud.
    Golden = 100,
    /// The engine can't load the model.
    Load = 101,
    /// The model failed on a live frame.
    Engine = 102,
    /// The median inference took longer than the manifest allows.
    Latency = 103,
    /// The mean confidence was below the manifest's bound and below the live model's.
    Confidence = 104,
    /// The device restarted too often while the model was on it.
    CrashLoop = 105,
    /// A newer model was offered while this one was being fetched.
    Superseded = 106,
    /// The device could not store the model.
    Storage = 107,
}

impl SlotError {
    /// The number that devices report.
    pub fn code(self) -> u16 {
        self as u16
    }
}

impl fmt::Display for SlotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Golden => "a golden input gave another answer than in the cloud",
            Self::Load => "the engine cannot load the model",
            Self::Engine => "the model failed on a live frame",
            Self::Latency => "the median inference took longer than allowed",
            Self::Confidence => "the mean confidence was too low",
            Self::CrashLoop => "the device restarted too often during the trial",
            Self::Superseded => "a newer model was offered before this one was complete",
            Self::Storage => "the device could not store the model",
        })
    }
}

impl core::error::Error for SlotError {}

/// A model by its manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Digest of the manifest's body.
    pub digest: Digest,
    /// The manifest's sequence.
    pub sequence: u64,
}

/// A model that is not proved yet.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Which.
    pub model: Held,
    /// `Fetching`, `Staged` or `Trial`.
    pub state: SlotState,
    /// What it must hold to.
    pub bounds: TrialBounds,
    /// Release key that signed it.
    pub key: KeyId,
    /// Starts of the device during which its code may have run, the present one included, less
    /// those that ended in good order.
    pub starts: u8,
}

/// What the cloud is told about a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Which.
    pub model: Held,
    /// How far it came.
    pub state: SlotState,
    /// [`TrustError`] or [`SlotError`] number; 0 for none. [`Report::reason`] has the words.
    pub code: u16,
    /// Live frames that the trial has seen.
    pub trial_frames: u32,
    /// Slowest inference on trial in microseconds.
    pub max_latency_us: u32,
}

impl Report {
    /// The code in words; empty for 0.
    pub fn reason(&self) -> Reason {
        Reason(self.code)
    }
}

/// A code of either kind, in words through `Display`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason(pub u16);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SLOT: [SlotError; 8] = [
            SlotError::Golden,
            SlotError::Load,
            SlotError::Engine,
            SlotError::Latency,
            SlotError::Confidence,
            SlotError::CrashLoop,
            SlotError::Superseded,
            SlotError::Storage,
        ];
        if self.0 == 0 {
            return Ok(());
        }
        if let Some(error) = TrustError::from_code(self.0) {
            return fmt::Display::fmt(&error, f);
        }
        if let Some(error) = SLOT.into_iter().find(|error| error.code() == self.0) {
            return fmt::Display::fmt(&error, f);
        }
        write!(f, "reason {}, which this version does not know", self.0)
    }
}

/// All that must survive a power failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SlotRecord {
    /// The live model.
    pub live: Option<Held>,
    /// The model on its way to become live.
    pub candidate: Option<Candidate>,
    /// The last end of a candidate that the cloud has not confirmed to have stored.
    pub outcome: Option<Report>,
    /// Sequence of the last confirmed model, under the release key that signed it: what is not
    /// above it is never taken again, whatever becomes of the model itself.
    pub floor: Floor,
}

/// The record before floors were tied to keys.
#[derive(Deserialize)]
struct RecordV1 {
    live: Option<Held>,
    /// Read to get past it: the key that signed it was not noted, so it is offered again.
    _candidate: Option<(Held, SlotState, TrialBounds, u8)>,
    outcome: Option<Report>,
}

impl From<RecordV1> for SlotRecord {
    /// The floor starts again: keys of that release are believed by none of this one.
    fn from(old: RecordV1) -> Self {
        Self {
            live: old.live,
            outcome: old.outcome,
            ..Self::default()
        }
    }
}

/// A stored record that does not decode: damaged, or of another version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordError;

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the stored slot record does not decode")
    }
}

impl core::error::Error for RecordError {}

impl SlotRecord {
    /// The stored form: a version byte and postcard.
    pub fn to_bytes(&self) -> Vec<u8, RECORD_MAX> {
        let mut out = Vec::new();
        // A test holds that the longest record fits.
        let _ = out.push(RECORD_VERSION);
        let mut body = [0u8; RECORD_MAX];
        if let Ok(body) = postcard::to_slice(self, &mut body) {
            let _ = out.extend_from_slice(body);
        }
        out
    }

    /// Reads the stored form, this one or the one before.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let (version, body) = bytes.split_first().ok_or(RecordError)?;
        let (record, rest) = match *version {
            RECORD_VERSION => postcard::take_from_bytes(body),
            1 => postcard::take_from_bytes::<RecordV1>(body)
                .map(|(old, rest)| (Self::from(old), rest)),
            _ => return Err(RecordError),
        }
        .map_err(|_| RecordError)?;
        if rest.is_empty() {
            Ok(record)
        } else {
            Err(RecordError)
        }
    }
}
