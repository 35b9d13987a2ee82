//! The documents about rollouts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Starts a rollout, or plans one.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RolloutRequest {
    /// Model id, or an unambiguous beginning of it.
    pub model: String,
    /// Which devices: a group, or terms such as `label.site=north,hardware=pi4,healthy`; all if
    /// absent.
    pub to: Option<String>,
    /// `canary` (one device, then the rest) or `all`; `canary` if absent.
    pub policy: Option<String>,
    /// Rules of one's own as TOML, instead of `policy`.
    pub policy_toml: Option<String>,
    /// Who asks, for the log.
    pub by: Option<String>,
}

/// What a rollout would do.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PlanView {
    /// The model.
    pub model: String,
    /// Its release number.
    pub sequence: u64,
    /// Release number under which the model before would come back.
    pub back: Option<u64>,
    /// Which devices.
    pub to: String,
    /// The rules, complete.
    pub policy: serde_json::Value,
    /// Devices of each wave, the canaries first.
    pub waves: Vec<Vec<String>>,
    /// Devices among them that can't be reached now.
    pub away: Vec<String>,
    /// Devices that would be left out, and why.
    pub skipped: Vec<SkippedView>,
    /// It takes at least so long by its own rules.
    pub least_seconds: u64,
}

/// A device that a rollout leaves out.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SkippedView {
    /// The device.
    pub device: String,
    /// Why.
    pub why: String,
}

/// A rollout.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RolloutView {
    /// Its number.
    pub id: u64,
    /// The model.
    pub model: String,
    /// The model's release number.
    pub sequence: u64,
    /// Release number under which the model before comes back; absent if there was none.
    pub back: Option<u64>,
    /// Which devices.
    pub to: String,
    /// `canary`, `all`, or the name that its file gives.
    pub policy: String,
    /// `running`, `paused`, `confirmed`, `halted` or `aborted`.
    pub state: String,
    /// Why it halted or was aborted.
    pub reason: Option<String>,
    /// What the next wave or the end waits for, while it runs.
    pub waits_for: Option<String>,
    /// Which wave is open, from 0.
    pub wave: u32,
    /// Devices that are still to go back to the model before.
    pub returning: u64,
    /// Those among them that can't be reached now.
    pub returning_away: u64,
    /// When it started, Unix milliseconds.
    pub started_ms: u64,
    /// When it ended, Unix milliseconds.
    pub ended_ms: Option<u64>,
    /// The waves, the canaries first.
    pub waves: Vec<WaveView>,
    /// Devices that gave the model up, and why.
    pub failures: BTreeMap<String, ProgressView>,
    /// Where each device is; left out where only an overview was asked for.
    pub devices: BTreeMap<String, ProgressView>,
}

/// A wave in numbers.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct WaveView {
    /// Its devices.
    pub devices: u64,
    /// How many are at each stage.
    pub states: BTreeMap<String, u64>,
}

/// How far one device is in a rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProgressView {
    /// `pending`, `offered`, `staged`, `trial`, `confirmed`, `reverted`, `failed`, `excluded`;
    /// after a halt `returning`, `returned` or `stranded`.
    pub state: String,
    /// The device's reason, or the operator's.
    pub detail: Option<String>,
}

/// What can be done to a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RolloutAction {
    /// Offer nothing for now.
    Pause,
    /// Go on.
    Resume,
    /// Stop for good.
    Abort,
    /// Take a device out.
    Exclude,
    /// Open the next wave whatever its gate says, or offer the model to a device before its turn.
    Force,
}

impl RolloutAction {
    /// The name used in paths.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Abort => "abort",
            Self::Exclude => "exclude",
            Self::Force => "force",
        }
    }
}

/// Does something to a rollout.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ActRequest {
    /// Why; goes into the rollout log. Only `resume` needs none.
    #[serde(default)]
    pub reason: String,
    /// The device to exclude or force.
    pub device: Option<String>,
    /// `abort`: devices that took the model go back to the one before.
    pub back: Option<bool>,
    /// Who does it, for the log.
    pub by: Option<String>,
}
