//! How far one device is: on its way to the model, or back to the one before.

use serde::{Deserialize, Serialize};

/// A device that gave the model before up so often keeps what it has.
const MAX_RETURNS: u8 = 3;

/// How far one device is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// Not offered yet.
    #[default]
    Pending,
    /// Offered, no answer yet.
    Offered {
        /// When last, in ms since the Unix epoch.
        at_ms: u64,
    },
    /// Fetching or fetched.
    Staged {
        /// When last heard of, in ms since the Unix epoch.
        at_ms: u64,
    },
    /// Running beside the live model.
    Trial {
        /// When last heard of, in ms since the Unix epoch.
        at_ms: u64,
    },
    /// Live.
    Confirmed {
        /// Since when, in ms since the Unix epoch.
        at_ms: u64,
    },
    /// Given up after staging; the old model is live.
    Reverted {
        /// The device's reason.
        reason: String,
    },
    /// Refused, or could not be staged.
    Failed {
        /// The device's reason.
        reason: String,
    },
    /// Taken out by the operator.
    Excluded {
        /// Why.
        reason: String,
    },
    /// After a halt: offered the model before.
    Returning {
        /// When last, in ms since the Unix epoch.
        at_ms: u64,
    },
    /// Runs the model before again.
    Returned,
    /// Took the model and can't take the one before.
    Stranded {
        /// The device's reason.
        reason: String,
    },
}

impl Progress {
    /// The name used in reports.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Offered { .. } => "offered",
            Self::Staged { .. } => "staged",
            Self::Trial { .. } => "trial",
            Self::Confirmed { .. } => "confirmed",
            Self::Reverted { .. } => "reverted",
            Self::Failed { .. } => "failed",
            Self::Excluded { .. } => "excluded",
            Self::Returning { .. } => "returning",
            Self::Returned => "returned",
            Self::Stranded { .. } => "stranded",
        }
    }

    /// Why it went wrong, or why it was taken out.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Reverted { reason }
            | Self::Failed { reason }
            | Self::Excluded { reason }
            | Self::Stranded { reason } => Some(reason),
            _ => None,
        }
    }

    /// The device's reason, if it gave the model up by itself.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        match self {
            Self::Reverted { reason } | Self::Failed { reason } => Some(reason),
            _ => None,
        }
    }

    /// Whether nothing more is to come of it while the rollout runs.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        !matches!(
            self,
            Self::Pending | Self::Offered { .. } | Self::Staged { .. } | Self::Trial { .. }
        )
    }

    /// Whether the device was offered the model and has not said how it ended.
    #[must_use]
    pub const fn is_under_way(&self) -> bool {
        matches!(
            self,
            Self::Offered { .. } | Self::Staged { .. } | Self::Trial { .. }
        )
    }

    /// Whether the device has or may have the model, or is on its way back from it.
    #[must_use]
    pub const fn is_to_return(&self) -> bool {
        self.is_under_way() || matches!(self, Self::Confirmed { .. } | Self::Returning { .. })
    }
}

/// What a device reported of a model. A refusal that a fresh offer cures (an expired offer) is
/// no report: leave it out and the offer is made again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// It is fetching or has fetched it.
    Staged,
    /// It runs beside the live model.
    Trial,
    /// It is live.
    Confirmed,
    /// It was given up after staging.
    Reverted(String),
    /// It was refused or could not be staged.
    Failed(String),
}

/// A device in a rollout.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its wave, 0 for the canaries.
    pub wave: u32,
    /// How far it is.
    pub progress: Progress,
    /// Slowest inference of its trial in µs; 0 when not known.
    #[serde(default)]
    pub latency_us: u32,
    /// Its boots when it was first offered the model.
    #[serde(default)]
    pub boots: Option<u32>,
    /// When it was last offered this model or the one before, in ms since the Unix epoch.
    #[serde(default)]
    pub offered_ms: Option<u64>,
    /// How often it gave the model before up.
    #[serde(default)]
    pub failed_returns: u8,
    /// Offered whatever its wave, because the operator said so.
    #[serde(default)]
    pub forced: bool,
}

impl Member {
    /// A device that was not offered anything yet.
    #[must_use]
    pub fn new(wave: u32) -> Self {
        Self {
            wave,
            ..Self::default()
        }
    }

    /// Notes an offer.
    pub(super) fn offered(&mut self, boots: u32, now_ms: u64) {
        self.boots.get_or_insert(boots);
        self.offered_ms = Some(now_ms);
        match &mut self.progress {
            Progress::Pending => self.progress = Progress::Offered { at_ms: now_ms },
            Progress::Offered { at_ms }
            | Progress::Staged { at_ms }
            | Progress::Trial { at_ms } => *at_ms = now_ms,
            _ => {}
        }
    }

    /// Notes a report about the model. Reports may repeat and come late: a device never goes back,
    /// and what is settled stays, except that a confirmed model can still be reverted.
    pub(super) fn report(&mut self, report: Report, now_ms: u64) {
        let at_ms = now_ms;
        self.progress = match (&self.progress, report) {
            (Progress::Confirmed { .. }, Report::Reverted(reason)) => Progress::Reverted { reason },
            (settled, _) if settled.is_settled() => return,
            (Progress::Trial { .. }, Report::Staged) => Progress::Trial { at_ms },
            (_, Report::Staged) => Progress::Staged { at_ms },
            (_, Report::Trial) => Progress::Trial { at_ms },
            (_, Report::Confirmed) => Progress::Confirmed { at_ms },
            (_, Report::Reverted(reason)) => Progress::Reverted { reason },
            (_, Report::Failed(reason)) => Progress::Failed { reason },
        };
    }

    /// Notes a report about the model before, which the device was offered again.
    pub(super) fn report_return(&mut self, report: Report, now_ms: u64) {
        if !self.progress.is_to_return() {
            return;
        }
        self.progress = match report {
            Report::Confirmed => Progress::Returned,
            Report::Staged | Report::Trial => Progress::Returning { at_ms: now_ms },
            Report::Reverted(reason) | Report::Failed(reason) => {
                self.failed_returns = self.failed_returns.saturating_add(1);
                if self.failed_returns < MAX_RETURNS {
                    Progress::Returning { at_ms: now_ms }
                } else {
                    Progress::Stranded { reason }
                }
            }
        };
    }
}
