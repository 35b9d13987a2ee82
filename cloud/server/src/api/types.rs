//! The JSON documents of the HTTP API, used by the server and by its client alike.

mod rollouts;

use std::collections::BTreeMap;

pub use rollouts::*;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a request was not served.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What is wrong and what to do.
    pub error: String,
}

/// What the server is.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Info {
    /// Version of the server.
    pub version: String,
    /// Where devices connect by MQTT over TLS.
    pub mqtt: String,
    /// Where devices connect by QUIC.
    pub quic: String,
}

/// Asks for a token with which one device may enrol.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// The only device id that the token is good for; any if absent.
    pub device: Option<String>,
    /// Group that the device joins; `default` if absent.
    pub group: Option<String>,
    /// Seconds until the token ends; 3,600 if absent.
    pub ttl_s: Option<u64>,
}

/// A one-time enrolment token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TokenReply {
    /// The token; the server keeps only its hash.
    pub token: String,
    /// When it ends, Unix milliseconds.
    pub expires_ms: u64,
}

/// Enrols a device. Needs no API token: the enrolment token is the authority.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EnrollRequest {
    /// From [`TokenReply`].
    pub token: String,
    /// A PKCS#10 certificate request in PEM, signed by the key that the device keeps.
    pub csr_pem: String,
    /// The id that the device would like; the token may fix another.
    pub device: Option<String>,
}

/// What a device needs to know to belong to the fleet.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct EnrollReply {
    /// The device's id.
    pub device: String,
    /// Its certificate.
    pub certificate_pem: String,
    /// The fleet's certificate authority.
    pub ca_pem: String,
    /// The signed trust root, postcard, hexadecimal.
    pub trust_hex: String,
    /// Where to connect by MQTT over TLS.
    pub mqtt: String,
    /// Where to connect by QUIC.
    pub quic: String,
    /// Name in the server's certificate.
    pub server_name: String,
}

/// A device of the fleet.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeviceView {
    /// Its id.
    pub id: String,
    /// Its group.
    pub group: String,
    /// What it is tagged with.
    pub labels: BTreeMap<String, String>,
    /// Whether it was revoked.
    pub revoked: bool,
    /// Transport of its live connection, if there is one.
    pub transport: Option<String>,
    /// When it was last heard, Unix milliseconds.
    pub last_seen_ms: Option<u64>,
    /// Version of its trust root when it asked last, since the server started.
    #[serde(default)]
    pub root_version: Option<u32>,
    /// Its hardware class.
    pub hardware: String,
    /// Its source of frames.
    pub source: String,
    /// Its engine.
    pub engine: String,
    /// Index of the next frame of its source.
    pub frame: u64,
    /// Bytes that uploading every frame would have cost.
    pub bytes_seen: u64,
    /// Bytes of all uplink messages that arrived here.
    pub bytes_up: u64,
    /// Frames that it could not read.
    pub skipped: u64,
    /// Frames that it gave up because inference was behind; absent if its agent does not say.
    pub dropped: Option<u64>,
    /// Whether it waits for new frames to be allowed and has nothing left to upload.
    pub idle: bool,
    /// Its boot epoch.
    pub epoch: u32,
    /// Sequence of its live model; 0 for none.
    pub sequence: u64,
    /// Model on it, if this server knows it.
    pub model: Option<String>,
}

/// Tags a device; what is absent stays.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TagRequest {
    /// Labels to set.
    #[serde(default)]
    pub set: BTreeMap<String, String>,
    /// Labels to take off.
    #[serde(default)]
    pub remove: Vec<String>,
    /// Group to move it to.
    pub group: Option<String>,
}

/// Lets replayed sources (simulators, data sets) run on.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdvanceRequest {
    /// They halt before this frame.
    pub run_until: u64,
}

/// Which set an imported picture joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Trained on.
    Train,
    /// Judged by; never trained on.
    Golden,
    /// Score parameters are fitted on it; neither trained on nor judged by.
    Calibration,
}

/// Query of an import; the body is the picture file.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct ImportQuery {
    /// Set that the picture joins.
    pub split: Split,
    /// Its class.
    pub class: String,
    /// Pictures of one track never straddle a split; the picture's own digest if absent.
    pub track: Option<String>,
}

/// A stored picture.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ItemView {
    /// SHA-256 of the stored bytes.
    pub id: String,
    /// Columns in pixels.
    pub width: u32,
    /// Rows in pixels.
    pub height: u32,
    /// Whether the server had it already.
    pub known: bool,
}

/// Asks for items to label.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NextRequest {
    /// Who labels.
    pub worker: String,
    /// How many; 1 if absent.
    pub count: Option<u32>,
    /// How long they are leased, in seconds; 300 if absent.
    pub lease_s: Option<u64>,
}

/// An item of the labelling queue.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct QueueItem {
    /// Its number in the queue.
    pub id: u64,
    /// Path of the picture as PNG on this server.
    pub picture: String,
    /// Columns in pixels.
    pub width: u32,
    /// Rows in pixels.
    pub height: u32,
    /// Device that flagged it.
    pub device: String,
    /// Index of the frame in the device's source.
    pub frame: u64,
    /// Capture time, Unix milliseconds.
    pub captured_ms: u64,
    /// Why the device kept it.
    pub lane: String,
    /// What the champion takes it for.
    pub guess: Option<String>,
    /// The champion's confidence in the guess, 0 to 1.
    pub confidence: Option<f32>,
    /// Why it stands where it stands.
    pub why: String,
    /// State: `pending`, `leased`, `labelled` or `skipped`.
    pub state: String,
    /// Who holds or has labelled it.
    pub worker: Option<String>,
    /// Its label.
    pub class: Option<String>,
    /// When the lease ends, Unix milliseconds.
    pub lease_until_ms: Option<u64>,
}

/// Answers one item.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelRequest {
    /// The item.
    pub item: u64,
    /// Who answers; must hold the item's lease.
    pub worker: String,
    /// The class; a new name makes a new class.
    pub class: String,
}

/// Puts one item aside.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SkipRequest {
    /// The item.
    pub item: u64,
    /// Who skips it; must hold the item's lease.
    pub worker: String,
    /// Why.
    pub reason: String,
}

/// The queue in numbers.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct QueueStats {
    /// Waiting for a person.
    pub pending: u64,
    /// Held by somebody.
    pub leased: u64,
    /// Answered.
    pub labelled: u64,
    /// Put aside.
    pub skipped: u64,
    /// Labels by person.
    pub by_worker: BTreeMap<String, u64>,
    /// Labels by class.
    pub by_class: BTreeMap<String, u64>,
    /// Names of all classes known, in the order of the champion's outputs, new ones last.
    pub classes: Vec<String>,
}

/// Probability from which the champion's class stands in for a label, unless a request says.
pub const PSEUDO_ABOVE: f32 = 0.9;

/// Freezes what is labelled now.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FreezeRequest {
    /// Seed of the split; 0 if absent.
    pub seed: Option<u64>,
    /// Take in unlabelled pictures whose class the champion gives at least this (calibrated)
    /// probability, and whose like it was trained on; 0.9 if absent, none at 1.
    pub pseudo_above: Option<f32>,
}

/// An immutable dataset version.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DatasetView {
    /// SHA-256 of its manifest.
    pub id: String,
    /// When it was frozen, Unix milliseconds.
    pub created_ms: u64,
    /// Items to train on.
    pub train: u64,
    /// Items held back for validation.
    pub validation: u64,
    /// Unlabelled items to train on with the class that the champion was sure of.
    pub pseudo: u64,
    /// Class names in the order of the logits.
    pub classes: Vec<String>,
    /// Labelled items by class.
    pub by_class: BTreeMap<String, u64>,
    /// The version before.
    pub parent: Option<String>,
}

/// What changed between two dataset versions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DatasetDiff {
    /// Items only in the second.
    pub added: u64,
    /// Items only in the first.
    pub removed: u64,
    /// Items whose class differs.
    pub relabelled: u64,
    /// Added items by class.
    pub added_by_class: BTreeMap<String, u64>,
    /// Classes only in the second.
    pub new_classes: Vec<String>,
}

/// Trains a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainRequest {
    /// Dataset id, or an unambiguous beginning of it.
    pub dataset: String,
    /// Seed of initialisation, sampling and augmentation; 0 if absent.
    pub seed: Option<u64>,
    /// Optimiser steps; chosen from the size of the dataset if absent.
    pub steps: Option<u32>,
    /// Start from fresh weights even if there is a champion.
    pub scratch: Option<bool>,
    /// Fit the classifier alone, on the champion's features: seconds, and a small update.
    pub head: Option<bool>,
    /// Chosen by the client, at most 64 characters: a request that is sent again with the key of one
    /// that arrived starts nothing, and gets that one's job.
    pub key: Option<String>,
}

/// Judges a model on the golden set, through the device's engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalRequest {
    /// Model id, or an unambiguous beginning of it.
    pub model: String,
    /// Classes whose mean recall is reported as `rare_recall`.
    pub rare: Option<Vec<String>>,
    /// Chosen by the client, at most 64 characters: a request that is sent again with the key of one
    /// that arrived starts nothing, and gets that one's job.
    pub key: Option<String>,
}

/// A long piece of work on the server.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobView {
    /// Its id.
    pub id: String,
    /// `train` or `eval`.
    pub kind: String,
    /// `running`, `done` or `failed`.
    pub state: String,
    /// Steps taken.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// What it is at, for people.
    pub message: String,
    /// Id of the model that it made or judged.
    pub model: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// Seconds since it started.
    pub seconds: f64,
}

/// A model in the registry.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelView {
    /// Digest of its parts.
    pub id: String,
    /// Its release number, once promoted.
    pub sequence: Option<u64>,
    /// Whether it is the champion.
    pub champion: bool,
    /// When it was made, Unix milliseconds.
    pub created_ms: u64,
    /// Its name, if it was made elsewhere.
    pub name: Option<String>,
    /// Dataset that it was trained on; empty for one that was made elsewhere.
    pub dataset: String,
    /// Model that it was trained from.
    pub parent: Option<String>,
    /// Seed and steps of the run.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u32,
    /// Class names in the order of the logits.
    pub classes: Vec<String>,
    /// Bytes of the ONNX file.
    pub onnx_bytes: u64,
    /// Its evaluation on the golden set.
    pub report: Option<ReportView>,
    /// The gate's verdict.
    pub gate: Option<GateView>,
}

/// An evaluation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReportView {
    /// Items judged.
    pub items: u64,
    /// Share of items whose class was right.
    pub accuracy: f64,
    /// Mean recall of all classes.
    pub balanced_accuracy: f64,
    /// Mean recall of the classes that were named rare; absent if none was.
    pub rare_recall: Option<f64>,
    /// Expected calibration error, 15 bins.
    pub ece: f64,
    /// Recall by class.
    pub recall: BTreeMap<String, f64>,
    /// Median inference time in microseconds on the server.
    pub latency_us: f64,
}

/// The gate's verdict.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GateView {
    /// Whether the model may be promoted.
    pub passed: bool,
    /// Model that it was compared with.
    pub champion: Option<String>,
    /// The reasons, in words.
    pub reasons: Vec<String>,
}

/// A stored blob.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct BlobView {
    /// SHA-256 of its bytes.
    pub digest: String,
}

/// Registers a model that was made elsewhere, whose parts are stored blobs.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddRequest {
    /// Its name, for people: 1 to 64 characters.
    pub name: String,
    /// Its parts, each kind at most once.
    pub parts: Vec<PartRef>,
}

/// A part of a model.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PartRef {
    /// What it is.
    pub kind: PartName,
    /// SHA-256 of its bytes.
    pub digest: String,
}

/// A kind of part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PartName {
    /// ONNX file.
    Onnx,
    /// burn record.
    Record,
    /// What the model takes and gives.
    Spec,
    /// Score parameters.
    Scores,
    /// Golden inputs and answers.
    Golden,
}

/// The bytes that the release key must sign to promote a model.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ManifestView {
    /// Canonical postcard bytes, hexadecimal.
    pub manifest_hex: String,
    /// Release number in it.
    pub sequence: u64,
    /// The present champion under the next number, to go back to if this model fails in the
    /// field; to be signed as well. Absent if there is none, or the model was released before.
    pub return_hex: Option<String>,
}

/// A version of the trust root: which keys devices believe.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RootView {
    /// Rises by one with each.
    pub version: u32,
    /// When it was made, Unix milliseconds.
    pub issued_ms: u64,
    /// After this devices take no model under it, Unix milliseconds.
    pub expires_ms: u64,
    /// So many of the root keys sign the next version.
    pub threshold: u8,
    /// Public root keys, hexadecimal.
    pub root: Vec<String>,
    /// Public release key, hexadecimal.
    pub release: String,
    /// Public rollout key, hexadecimal.
    pub rollout: String,
    /// Models up to this release number are not taken.
    pub min_sequence: u64,
    /// All of it as signed, hexadecimal.
    pub root_hex: String,
}

/// The next version of the trust root.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RootRequest {
    /// As in [`RootView`].
    pub root_hex: String,
}

/// Promotes a model: it becomes the champion, and may be rolled out.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PromoteRequest {
    /// From [`ManifestView`].
    pub manifest_hex: String,
    /// The release key's ed25519 signature, hexadecimal.
    pub signature_hex: String,
    /// From [`ManifestView`]; without it a rollout that halts leaves the model where it is.
    pub return_hex: Option<String>,
    /// The release key's signature of it.
    pub return_signature_hex: Option<String>,
    /// Why the model is promoted although the gate did not pass it.
    pub force: Option<String>,
}

/// The conservation law over the fleet.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AuditView {
    /// Samples flagged by devices.
    pub flagged: u64,
    /// Samples committed here.
    pub ingested: u64,
    /// Samples that devices still hold.
    pub spooled: u64,
    /// Samples lost, by recorded reason.
    pub dropped: BTreeMap<String, u64>,
    /// Whether flagged = ingested + spooled + dropped, number by number.
    pub balanced: bool,
    /// Numbers that are nowhere, for people.
    pub missing: Vec<String>,
}
