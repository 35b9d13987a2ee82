//! The messages between device and cloud, the same on MQTT and QUIC.
//!
//! Each is postcard inside an [`crate::envelope`]. The device drives: it says [`Up::Hello`],
//! sends batches of records until they are acknowledged, reports its health, and fetches model
//! bytes by digest and offset, which makes every transfer resumable on any transport. Whatever
//! the cloud wants of a device is a *state* that it repeats ([`Down::Desired`], [`Down::Offer`]),
//! never a command that could be lost.

use heapless::Vec;
use serde::{Deserialize, Serialize};

use crate::ids::{DeviceId, Digest};
use crate::spec::serde_bytes_slice;
use crate::trust::{Signed, SignedRoot};

/// Most epochs that one health message accounts for.
pub const MAX_BOOKS: usize = 16;
/// Most ranges of numbers in one book or acknowledgement.
pub const MAX_RANGES: usize = 32;

/// Inclusive ranges of sample numbers, ascending.
pub type Ranges = Vec<(u32, u32), MAX_RANGES>;

/// From the device to the cloud. Variants are numbered by order: append only.
#[allow(clippy::large_enum_variant)] // There is no alloc to box with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Up<'a> {
    /// 0: first message on a connection.
    Hello(Hello),
    /// 1: flagged samples and loss records.
    #[serde(borrow)]
    Batch(Batch<'a>),
    /// 2: inventory, books and counters, sent at intervals and after every change of state.
    #[serde(borrow)]
    Health(Health<'a>),
    /// 3: what became of an offered model; repeated until acknowledged by [`Down::SlotSeen`].
    #[serde(borrow)]
    Slot(SlotReport<'a>),
    /// 4: a request for a piece of a model part.
    Fetch(Fetch),
    /// 5: a request for newer trust roots and the time; sent after each [`Down::Welcome`], and when
    /// an offer fails on time or keys.
    Attest(Attest),
}

/// From the cloud to the device. Variants are numbered by order: append only.
#[allow(clippy::large_enum_variant)] // There is no alloc to box with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Down<'a> {
    /// 0: the cloud knows the device; samples may flow.
    Welcome(Welcome),
    /// 1: these records are committed to disk in the cloud; the spool may free them.
    Ack(Ack),
    /// 2: a model to take, with its manifest.
    #[serde(borrow)]
    Offer(OfferMessage<'a>),
    /// 3: a piece of a model part.
    #[serde(borrow)]
    Chunk(Chunk<'a>),
    /// 4: what the cloud wants of the device.
    Desired(Desired),
    /// 5: the last message was not taken, and why.
    Refused(Refused),
    /// 6: a slot report is stored; it need not be repeated.
    SlotSeen(SlotSeen),
    /// 7: a newer [`crate::trust::TrustRoot`]; one message for each version, in their order.
    #[serde(borrow)]
    Root(SignedRoot<'a>),
    /// 8: a [`crate::trust::TimeStamp`], which answers [`Up::Attest`].
    #[serde(borrow)]
    Time(Signed<'a>),
}

/// Opens a connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Must equal the certificate's organisation.
    pub device: DeviceId,
    /// [`crate::WIRE_VERSION`] of the sender.
    pub wire_version: u16,
    /// The current boot epoch.
    pub epoch: u32,
}

/// Answers [`Hello`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`crate::WIRE_VERSION`] of the cloud.
    pub wire_version: u16,
    /// The cloud's clock, Unix milliseconds.
    pub now_ms: u64,
}

/// Records of one epoch, signed by the device's own key over [`crate::trust::batch_digest`], so
/// that a broker or gateway in between can delay them but not forge or change them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Batch<'a> {
    /// Epoch of all records.
    pub epoch: u32,
    /// Number of records.
    pub count: u16,
    /// [`Record`]s one after the other; read them with [`records`].
    #[serde(with = "serde_bytes_slice")]
    pub records: &'a [u8],
    /// ed25519 signature, 64 bytes.
    #[serde(with = "serde_bytes_slice")]
    pub signature: &'a [u8],
}

/// What one sample number stands for. Variants are numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Record<'a> {
    /// 0: a flagged sample.
    #[serde(borrow)]
    Sample(Sample<'a>),
    /// 1: a sample that was flagged and then lost, since drops are data.
    Loss(Loss),
}

impl Record<'_> {
    /// The number that the record takes in its epoch.
    pub fn seq(&self) -> u32 {
        match self {
            Self::Sample(sample) => sample.seq,
            Self::Loss(loss) => loss.seq,
        }
    }
}

/// Reads the records of a batch one after the other. An undecodable record ends the iteration
/// with an error.
pub fn records(mut bytes: &[u8]) -> impl Iterator<Item = Result<Record<'_>, postcard::Error>> {
    core::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        match postcard::take_from_bytes::<Record<'_>>(bytes) {
            Ok((record, rest)) => {
                bytes = rest;
                Some(Ok(record))
            }
            Err(error) => {
                bytes = &[];
                Some(Err(error))
            }
        }
    })
}

/// A frame worth learning from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample<'a> {
    /// Number in its epoch, from 1.
    pub seq: u32,
    /// Index of the frame in the device's source.
    pub frame: u64,
    /// Capture time, Unix milliseconds.
    pub captured_ms: u64,
    /// The encounter that the source's tracker puts the frame in: frames of one track show the
    /// same thing. Tracks of one device have different numbers.
    pub track: u64,
    /// The first 8 bytes of the digest of the manifest whose model scored it; zero for none.
    pub model: [u8; 8],
    /// Why it was kept.
    pub lane: Lane,
    /// Probability with which the uniform lane would have kept this frame, so that estimates from
    /// that lane stay unbiased (Horvitz–Thompson); 0 in other lanes.
    pub inclusion: f32,
    /// What the model said.
    pub scores: Scores,
    /// Scale of `embedding`: value = `scale × i8`.
    pub embedding_scale: f32,
    /// The embedding, quantised to i8, symmetric.
    #[serde(with = "serde_bytes_slice")]
    pub embedding: &'a [u8],
    /// Columns in pixels.
    pub width: u16,
    /// Rows in pixels.
    pub height: u16,
    /// How `payload` is encoded.
    pub codec: Codec,
    /// The picture.
    #[serde(with = "serde_bytes_slice")]
    pub payload: &'a [u8],
}

/// A sample number whose sample is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// Number in its epoch, from 1.
    pub seq: u32,
    /// Why it is gone.
    pub reason: LossReason,
}

/// Why a flagged sample was lost. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LossReason {
    /// 0: the spool was full and this was the least valuable.
    Evicted,
    /// 1: the agent or the board died before the sample was on disk.
    Crash,
    /// 2: the disk refused the write.
    Disk,
    /// 3: the stored bytes no longer match their checksum.
    Corrupt,
    /// 4: the sample exceeds the largest message.
    Oversize,
}

impl LossReason {
    /// All reasons in the order of their numbers.
    pub const ALL: [Self; 5] = [
        Self::Evicted,
        Self::Crash,
        Self::Disk,
        Self::Corrupt,
        Self::Oversize,
    ];

    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Evicted => "evicted",
            Self::Crash => "crash",
            Self::Disk => "disk",
            Self::Corrupt => "corrupt",
            Self::Oversize => "oversize",
        }
    }
}

/// Which share of the upload budget a sample was taken from. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Lane {
    /// 0: unlike what the model was trained on.
    Novel,
    /// 1: the model hesitates between classes.
    Unsure,
    /// 2: models disagree, or one model flickers over a track.
    Disagree,
    /// 3: the cloud asked for it.
    Campaign,
    /// 4: chosen by lot; the only lane that drift and live accuracy are estimated from.
    Uniform,
}

impl Lane {
    /// All lanes in the order of their numbers.
    pub const ALL: [Self; 5] = [
        Self::Novel,
        Self::Unsure,
        Self::Disagree,
        Self::Campaign,
        Self::Uniform,
    ];

    /// The name used in reports and configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Novel => "novel",
            Self::Unsure => "unsure",
            Self::Disagree => "disagree",
            Self::Campaign => "campaign",
            Self::Uniform => "uniform",
        }
    }
}

/// What a model said about one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Index of the most probable class.
    pub top1: u16,
    /// Index of the second class; equals `top1` for a model of one class.
    pub top2: u16,
    /// Temperature-scaled softmax of `top1`, 0 to 1.
    pub confidence: f32,
    /// Difference of the two largest softmax values, 0 to 1.
    pub margin: f32,
    /// Shannon entropy of the softmax in nats.
    pub entropy: f32,
    /// Free energy −T·log Σ exp(logit / T); lower means more familiar.
    pub energy: f32,
    /// Relative Mahalanobis distance of the embedding; higher means less familiar.
    pub novelty: f32,
    /// Uncertainty on the conformal scale: 1 − p-value of `margin`, 0 to 1.
    pub u_unsure: f32,
    /// Novelty on the conformal scale, 0 to 1: 1 − p-value of `novelty`, or where the model has
    /// prototypes of `novelty` and the distance to the nearest of them together.
    pub u_novel: f32,
    /// Posterior mass of the classes that the cloud has too few labels of, 0 to 1: how much the
    /// cloud would like to see this frame.
    pub rarity: f32,
}

/// How the picture of a sample is encoded. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Codec {
    /// 0: one byte a pixel.
    Gray8,
    /// 1: red, green, blue, one byte each.
    Rgb8,
    /// 2: JPEG file.
    Jpeg,
    /// 3: PNG file.
    Png,
}

/// Durably ingested numbers. Losses are acknowledged like samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ack {
    /// Their epoch.
    pub epoch: u32,
    /// The numbers.
    pub ranges: Ranges,
}

/// The state of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health<'a> {
    /// The device's clock, Unix milliseconds.
    pub at_ms: u64,
    /// Version of the agent.
    pub agent: &'a str,
    /// Hardware class that manifests are matched against.
    pub hardware: &'a str,
    /// The source's URI.
    pub source: &'a str,
    /// Name of the engine in use.
    pub engine: &'a str,
    /// The current boot epoch.
    pub epoch: u32,
    /// Index of the next frame of the source.
    pub frame: u64,
    /// Bytes that uploading every frame would have cost, since the device was enrolled.
    pub bytes_seen: u64,
    /// Bytes of all messages sent, since the device was enrolled.
    pub bytes_up: u64,
    /// Frames that could not be read.
    pub skipped: u64,
    /// Whether the source waits for [`Desired::run_until`] to rise and everything flagged so far
    /// is acknowledged.
    pub idle: bool,
    /// Digest of the manifest of the live model.
    pub live: Option<Digest>,
    /// The floor above which an offer must be: the sequence of the confirmed model, unless a newer
    /// trust root says otherwise.
    pub sequence: u64,
    /// Digest of the manifest that is staged or on trial.
    pub candidate: Option<Digest>,
    /// One book for each epoch that is not closed and acknowledged.
    pub books: Vec<EpochBook, MAX_BOOKS>,
}

/// The conservation law of one boot epoch: `flagged = acked + lost + spooled`, where lost numbers
/// whose loss record is acknowledged count in `acked`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochBook {
    /// The epoch.
    pub epoch: u32,
    /// Numbers given out: 1 ..= `flagged`.
    pub flagged: u32,
    /// Numbers (samples and loss records) that the cloud has acknowledged.
    pub acked: u32,
    /// Numbers of samples and loss records still held by the device.
    pub spooled: Ranges,
}

/// What became of an offered model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlotReport<'a> {
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Its sequence.
    pub sequence: u64,
    /// How far it came.
    pub state: SlotState,
    /// [`crate::trust::TrustError`] number or slot error number; 0 for none.
    pub code: u16,
    /// The reason in words that a person understands; empty for none.
    pub detail: &'a str,
    /// Live frames that the trial has seen.
    pub trial_frames: u32,
    /// Slowest inference on trial in microseconds.
    pub max_latency_us: u32,
}

/// How far a model came on a device. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlotState {
    /// 0: refused before anything was fetched.
    Refused,
    /// 1: being fetched.
    Fetching,
    /// 2: complete and verified.
    Staged,
    /// 3: golden inputs passed; runs beside the live model.
    Trial,
    /// 4: live.
    Confirmed,
    /// 5: given up; the previous model is live.
    Reverted,
}

impl SlotState {
    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Fetching => "fetching",
            Self::Staged => "staged",
            Self::Trial => "trial",
            Self::Confirmed => "confirmed",
            Self::Reverted => "reverted",
        }
    }
}

/// A slot report is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotSeen {
    /// Digest of the manifest.
    pub manifest: Digest,
    /// The state that is stored.
    pub state: SlotState,
}

/// Asks for a piece of a model part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// Digest of the part.
    pub digest: Digest,
    /// First byte wanted.
    pub offset: u64,
    /// Number of bytes wanted, at most [`crate::MAX_CHUNK`].
    pub len: u32,
}

/// A piece of a model part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk<'a> {
    /// Digest of the whole part.
    pub digest: Digest,
    /// Where the piece starts.
    pub offset: u64,
    /// The piece.
    #[serde(with = "serde_bytes_slice")]
    pub bytes: &'a [u8],
}

/// Asks for trust roots newer than the device's, and for the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attest {
    /// Random; the time stamp repeats it.
    pub nonce: u64,
    /// Version of the device's trust root.
    pub root_version: u32,
}

/// A model to take: the manifest signed by the release key, the offer by the rollout key.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OfferMessage<'a> {
    /// A [`crate::trust::Offer`].
    #[serde(borrow)]
    pub offer: Signed<'a>,
    /// A [`crate::trust::Manifest`].
    #[serde(borrow)]
    pub manifest: Signed<'a>,
}

/// What the cloud wants of a device; also the answer to every [`Health`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// A replayed source (simulator, data set) halts before this frame; `u64::MAX` never halts.
    /// Live cameras ignore it.
    pub run_until: u64,
    /// [`Health::at_ms`] of the newest health message that the cloud has stored; closed books in
    /// it need not be sent again.
    pub health_at_ms: u64,
}

/// A message was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Why.
    pub code: RefusedCode,
    /// Wait at least this long before the next try, in milliseconds.
    pub retry_after_ms: u32,
}

/// Why the cloud did not take a message. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusedCode {
    /// 0: the device is not enrolled, or was revoked.
    Identity,
    /// 1: the signature is not the device's.
    Signature,
    /// 2: the message does not decode.
    Malformed,
    /// 3: the wire version is not understood.
    WireVersion,
    /// 4: the cloud can't store it now (disk full); nothing was committed.
    Storage,
    /// 5: there is no such blob.
    NotFound,
}
