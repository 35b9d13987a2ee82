//! The messages of devices as the cloud keeps and shows them, and the bytes of answers: the edge
//! between the borrowed types of the wire and what the server stores.

use cloud_core::ranges::RangeSet;
use flywheel_shared::envelope;
use flywheel_shared::ids::Digest;
use flywheel_shared::message::{Down, Health, OfferMessage, SlotReport, SlotState};
use flywheel_shared::trust::{Signed, SignedRoot};
use serde::{Deserialize, Serialize};

/// How a device talks to the cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// By a broker.
    Mqtt,
    /// Directly.
    Quic,
}

impl Transport {
    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mqtt => "mqtt",
            Self::Quic => "quic",
        }
    }
}

/// [`Health`], owned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OwnedHealth {
    /// The device's clock, Unix milliseconds.
    pub at_ms: u64,
    /// Version of the agent.
    pub agent: String,
    /// Hardware class.
    pub hardware: String,
    /// The source's URI.
    pub source: String,
    /// Name of the engine in use.
    pub engine: String,
    /// The current boot epoch.
    pub epoch: u32,
    /// Index of the next frame.
    pub frame: u64,
    /// Bytes that uploading every frame would have cost.
    pub bytes_seen: u64,
    /// Bytes of all messages sent.
    pub bytes_up: u64,
    /// Frames that could not be read.
    pub skipped: u64,
    /// Whether the source waits and everything flagged is acknowledged.
    pub idle: bool,
    /// Digest of the manifest of the live model.
    #[serde(with = "digest_text")]
    pub live: Option<Digest>,
    /// Sequence of the live model.
    pub sequence: u64,
    /// Digest of the manifest that is staged or on trial.
    #[serde(with = "digest_text")]
    pub candidate: Option<Digest>,
    /// Books of the epochs that are not closed and acknowledged.
    pub books: Vec<OwnedBook>,
}

/// The book of one epoch, owned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedBook {
    /// The epoch.
    pub epoch: u32,
    /// Numbers given out: 1 to this.
    pub flagged: u32,
    /// Numbers acknowledged.
    pub acked: u32,
    /// Numbers still held by the device.
    pub spooled: RangeSet,
}

impl From<&Health<'_>> for OwnedHealth {
    fn from(health: &Health<'_>) -> Self {
        let books = health.books.iter().map(|book| {
            let mut spooled = RangeSet::new();
            for (first, last) in &book.spooled {
                spooled.insert_range(*first..=*last);
            }
            OwnedBook {
                epoch: book.epoch,
                flagged: book.flagged,
                acked: book.acked,
                spooled,
            }
        });
        Self {
            at_ms: health.at_ms,
            agent: health.agent.to_owned(),
            hardware: health.hardware.to_owned(),
            source: health.source.to_owned(),
            engine: health.engine.to_owned(),
            epoch: health.epoch,
            frame: health.frame,
            bytes_seen: health.bytes_seen,
            bytes_up: health.bytes_up,
            skipped: health.skipped,
            idle: health.idle,
            live: health.live,
            sequence: health.sequence,
            candidate: health.candidate,
            books: books.collect(),
        }
    }
}

/// [`SlotReport`], owned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedSlotReport {
    /// Digest of the manifest.
    #[serde(with = "digest_text::one")]
    pub manifest: Digest,
    /// Its sequence.
    pub sequence: u64,
    /// How far it came.
    pub state: SlotState,
    /// Number of the error; 0 for none.
    pub code: u16,
    /// The reason in words; empty for none.
    pub detail: String,
    /// Live frames that the trial has seen.
    pub trial_frames: u32,
    /// Slowest inference on trial in microseconds.
    pub max_latency_us: u32,
}

impl From<&SlotReport<'_>> for OwnedSlotReport {
    fn from(report: &SlotReport<'_>) -> Self {
        Self {
            manifest: report.manifest,
            sequence: report.sequence,
            state: report.state,
            code: report.code,
            detail: report.detail.to_owned(),
            trial_frames: report.trial_frames,
            max_latency_us: report.max_latency_us,
        }
    }
}

/// A signed offer and the signed manifest that it names, as bytes to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferBytes {
    /// Body of the offer, postcard.
    pub offer: Vec<u8>,
    /// By the rollout key.
    pub offer_signature: [u8; 64],
    /// Body of the manifest, postcard.
    pub manifest: Vec<u8>,
    /// By the release key.
    pub manifest_signature: [u8; 64],
}

impl OfferBytes {
    pub(super) fn message(&self) -> Down<'_> {
        Down::Offer(OfferMessage {
            offer: Signed {
                body: &self.offer,
                signature: &self.offer_signature,
            },
            manifest: Signed {
                body: &self.manifest,
                signature: &self.manifest_signature,
            },
        })
    }
}

/// The answers to [`flywheel_shared::message::Attest`], as bytes to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attested {
    /// Trust roots as they are stored, oldest first.
    pub roots: Vec<Vec<u8>>,
    /// Body of the time stamp, postcard.
    pub time: Vec<u8>,
    /// By the rollout key.
    pub time_signature: [u8; 64],
}

impl Attested {
    /// The envelopes, roots first: the time is checked with the newest of them.
    pub(super) fn envelopes(&self) -> Vec<Vec<u8>> {
        let roots = self.roots.iter().filter_map(|bytes| root_envelope(bytes));
        let time = envelope_of(&Down::Time(Signed {
            body: &self.time,
            signature: &self.time_signature,
        }));
        roots.chain([time]).collect()
    }
}

/// A stored trust root as a message; `None` if it is damaged.
pub(super) fn root_envelope(bytes: &[u8]) -> Option<Vec<u8>> {
    let signed = SignedRoot::from_bytes(bytes).ok()?;
    Some(envelope_of(&Down::Root(signed)))
}

/// A message in its envelope.
pub(super) fn envelope_of(message: &Down<'_>) -> Vec<u8> {
    // Writing to memory does not fail; if it did, the receiver would refuse the empty message.
    let payload = postcard::to_extend(message, Vec::new()).unwrap_or_default();
    let mut bytes = Vec::from(envelope::header(&payload));
    bytes.extend_from_slice(&payload);
    bytes
}

/// Digests as hexadecimal text, for JSON that people read.
pub mod digest_text {
    use flywheel_shared::ids::Digest;
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    /// Writes an optional digest.
    pub fn serialize<S: Serializer>(digest: &Option<Digest>, to: S) -> Result<S::Ok, S::Error> {
        match digest {
            Some(digest) => to.collect_str(digest),
            None => to.serialize_none(),
        }
    }

    /// Reads an optional digest.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Digest>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse().map_err(D::Error::custom))
            .transpose()
    }

    /// The same for a digest that is always there.
    pub mod one {
        use super::*;

        /// Writes a digest.
        pub fn serialize<S: Serializer>(digest: &Digest, to: S) -> Result<S::Ok, S::Error> {
            to.collect_str(digest)
        }

        /// Reads a digest.
        pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Digest, D::Error> {
            String::deserialize(from)?.parse().map_err(D::Error::custom)
        }
    }
}
