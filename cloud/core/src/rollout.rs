//! Who gets a released model next. The planner is a function of stored state, inventory and time:
//! the executor carries out its offers, records what devices report, and asks again; after a crash
//! at any step it asks again just the same.
//!
//! Canaries come first, and nobody else is offered the model before every canary has confirmed it.
//! A canary that gives it up halts the rollout; later, more than `max_failed` failures do. A halt
//! needs no flag: it follows from the recorded failures.

mod policy;

pub use policy::{Policy, Share};

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// A device as the server knows it now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its id.
    pub id: String,
    /// Its group; canaries are spread over groups.
    pub group: String,
    /// Sequence of its live model.
    pub sequence: u64,
    /// Whether it can be offered anything now.
    pub online: bool,
}

/// How far one device is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    Confirmed,
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
    Excluded,
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
            Self::Confirmed => "confirmed",
            Self::Reverted { .. } => "reverted",
            Self::Failed { .. } => "failed",
            Self::Excluded => "excluded",
        }
    }

    const fn failure(&self) -> Option<&String> {
        match self {
            Self::Reverted { reason } | Self::Failed { reason } => Some(reason),
            _ => None,
        }
    }

    const fn is_settled(&self) -> bool {
        matches!(
            self,
            Self::Confirmed | Self::Reverted { .. } | Self::Failed { .. } | Self::Excluded
        )
    }

    const fn is_under_way(&self) -> bool {
        matches!(
            self,
            Self::Offered { .. } | Self::Staged { .. } | Self::Trial { .. }
        )
    }
}

/// What a device reported of the model. A refusal that a fresh offer cures (an expired offer) is
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

/// What the operator wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// Go on.
    #[default]
    Running,
    /// Offer nothing for now.
    Paused,
    /// Offer nothing any more.
    Aborted,
}

/// The stored state of a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// Sequence of the model.
    pub sequence: u64,
    /// The rules.
    pub policy: Policy,
    /// Device ids by wave, the canaries first; fixed at the start. Devices enrolled later belong
    /// to the last wave.
    pub waves: Vec<Vec<String>>,
    /// How far each device is; absent is pending.
    pub progress: BTreeMap<String, Progress>,
    /// What the operator wants.
    pub control: Control,
}

/// Where a rollout stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// This wave is under way, 0 for the canaries.
    Running {
        /// The wave.
        wave: usize,
    },
    /// Every device has confirmed, but for those excluded and the failures within the limit.
    Confirmed,
    /// Too much failed.
    Halted {
        /// Who and why.
        reason: String,
    },
    /// The operator stopped it for good.
    Aborted,
    /// The operator stopped it for now.
    Paused,
}

/// Something the executor should do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Offer the model to this device, then call [`Rollout::offered`].
    Offer {
        /// The device's id.
        device: String,
    },
}

/// What to do now, and where the rollout stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// In order of wave.
    pub actions: Vec<Action>,
    /// Where it stands.
    pub state: State,
}

/// Why a rollout can't start.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RolloutError {
    /// No device to roll out to.
    #[error("no device{} to roll out to; enrol one first", group.as_ref().map(|g| format!(" in group `{g}`")).unwrap_or_default())]
    NoDevice {
        /// The group that was asked for.
        group: Option<String>,
    },
    /// The policy makes no sense.
    #[error("rollout policy: {field} must be {want}")]
    Policy {
        /// Which field.
        field: &'static str,
        /// What would be right.
        want: &'static str,
    },
}

impl Rollout {
    /// A new rollout of the model with `sequence` to the devices that run an older one. Canaries
    /// are drawn by the seed, from devices that are online and from every group in turn while that
    /// is possible.
    ///
    /// # Errors
    /// [`RolloutError`] when the policy is contradictory or there is no device.
    pub fn start(
        sequence: u64,
        policy: Policy,
        inventory: &[Device],
    ) -> Result<Self, RolloutError> {
        policy.check()?;
        let fleet: Vec<&Device> = inventory.iter().filter(|d| policy.covers(d)).collect();
        if fleet.is_empty() {
            return Err(RolloutError::NoDevice {
                group: policy.group,
            });
        }
        let behind = fleet.into_iter().filter(|d| d.sequence < sequence);
        let order = policy.order(behind);
        let waves = policy.cut(order);
        Ok(Self {
            sequence,
            policy,
            waves,
            progress: BTreeMap::new(),
            control: Control::Running,
        })
    }

    /// What to do at `now_ms`.
    #[must_use]
    pub fn plan(&self, inventory: &[Device], now_ms: u64) -> Plan {
        let stop = |state| Plan {
            actions: Vec::new(),
            state,
        };
        if self.control == Control::Aborted {
            return stop(State::Aborted);
        }
        if let Some(reason) = self.halted() {
            return stop(State::Halted { reason });
        }
        if self.control == Control::Paused {
            return stop(State::Paused);
        }
        let waves = self.members(inventory);
        // A later wave waits for the devices it can wait for; one that is away does not hold up
        // the rest and is offered the model when it comes back. Canaries are always waited for.
        let holds = |wave: usize, device: &Device| {
            let progress = self.progress_of(device);
            !progress.is_settled() && (wave == 0 || device.online || progress.is_under_way())
        };
        let active = waves
            .iter()
            .enumerate()
            .position(|(wave, devices)| devices.iter().any(|d| holds(wave, d)))
            .unwrap_or(waves.len().saturating_sub(1));
        let open = || waves.iter().take(active + 1).flatten();
        if waves
            .iter()
            .flatten()
            .all(|d| self.progress_of(d).is_settled())
        {
            return stop(State::Confirmed);
        }
        Plan {
            actions: open()
                .filter(|d| d.online && self.is_due(&self.progress_of(d), now_ms))
                .map(|d| Action::Offer {
                    device: d.id.clone(),
                })
                .collect(),
            state: State::Running { wave: active },
        }
    }

    /// Notes that the model was offered.
    pub fn offered(&mut self, device: &str, now_ms: u64) {
        let progress = self.progress.entry(device.to_owned()).or_default();
        match progress {
            Progress::Pending => *progress = Progress::Offered { at_ms: now_ms },
            Progress::Offered { at_ms }
            | Progress::Staged { at_ms }
            | Progress::Trial { at_ms } => *at_ms = now_ms,
            _ => {}
        }
    }

    /// Notes what a device reported; true when that changed its progress. Reports may repeat and
    /// come late: a device never goes back, and what is settled stays, except that a confirmed
    /// model can still be reverted.
    pub fn record(&mut self, device: &str, report: Report, now_ms: u64) -> bool {
        let progress = self.progress.entry(device.to_owned()).or_default();
        let next = match (&*progress, report) {
            (Progress::Confirmed, Report::Reverted(reason)) => Progress::Reverted { reason },
            (settled, _) if settled.is_settled() => return false,
            (Progress::Trial { .. }, Report::Staged) => Progress::Trial { at_ms: now_ms },
            (_, Report::Staged) => Progress::Staged { at_ms: now_ms },
            (_, Report::Trial) => Progress::Trial { at_ms: now_ms },
            (_, Report::Confirmed) => Progress::Confirmed,
            (_, Report::Reverted(reason)) => Progress::Reverted { reason },
            (_, Report::Failed(reason)) => Progress::Failed { reason },
        };
        let changed = *progress != next;
        *progress = next;
        changed
    }

    /// Takes a device out, whatever its progress; a failure of it no longer counts.
    pub fn exclude(&mut self, device: &str) {
        self.progress.insert(device.to_owned(), Progress::Excluded);
    }

    /// How many devices are at each stage, by its name.
    #[must_use]
    pub fn summary(&self, inventory: &[Device]) -> BTreeMap<&'static str, usize> {
        let mut summary = BTreeMap::new();
        for device in self.members(inventory).into_iter().flatten() {
            *summary.entry(self.progress_of(device).name()).or_default() += 1;
        }
        summary
    }

    /// The devices of each wave that are still enrolled, and late ones in the last.
    fn members<'a>(&self, inventory: &'a [Device]) -> Vec<Vec<&'a Device>> {
        let by_id: BTreeMap<&str, &Device> = inventory.iter().map(|d| (d.id.as_str(), d)).collect();
        let mut waves: Vec<Vec<&Device>> = self
            .waves
            .iter()
            .map(|wave| {
                let known = wave.iter().filter_map(|id| by_id.get(id.as_str()));
                known.copied().collect()
            })
            .collect();
        let planned: BTreeSet<&str> = self.waves.iter().flatten().map(String::as_str).collect();
        let late = by_id.values().copied().filter(|d| {
            !planned.contains(d.id.as_str())
                && self.policy.covers(d)
                && (d.sequence < self.sequence || self.progress.contains_key(&d.id))
        });
        // The canaries stay among themselves, even when they were the whole fleet.
        match waves.len() {
            0 | 1 => waves.push(late.collect()),
            n => waves[n - 1].extend(late),
        }
        waves
    }

    /// The recorded progress, or what the live model tells: a device that runs this model or a
    /// newer one needs no offer.
    fn progress_of(&self, device: &Device) -> Progress {
        let recorded = self.progress.get(&device.id).cloned().unwrap_or_default();
        if !recorded.is_settled() && device.sequence >= self.sequence {
            return Progress::Confirmed;
        }
        recorded
    }

    fn is_due(&self, progress: &Progress, now_ms: u64) -> bool {
        let old = |at_ms: u64, limit: u64| now_ms.saturating_sub(at_ms) >= limit;
        match progress {
            Progress::Pending => true,
            Progress::Offered { at_ms } => old(*at_ms, self.policy.offer_ttl_ms),
            Progress::Staged { at_ms } | Progress::Trial { at_ms } => {
                old(*at_ms, self.policy.stall_ms)
            }
            _ => false,
        }
    }

    fn halted(&self) -> Option<String> {
        let canaries = self.waves.first().map_or(&[] as &[String], Vec::as_slice);
        let reason = |device: &String| self.progress.get(device).and_then(Progress::failure);
        for canary in canaries {
            if let Some(reason) = reason(canary) {
                return Some(format!("canary {canary} gave the model up: {reason}"));
            }
        }
        let failed: Vec<&String> = self
            .progress
            .iter()
            .filter(|(_, p)| p.failure().is_some())
            .map(|(id, _)| id)
            .collect();
        if failed.len() as u64 <= u64::from(self.policy.max_failed) {
            return None;
        }
        let example = failed.first().copied()?;
        Some(format!(
            "{} devices gave the model up, at most {} may; for example {example}: {}",
            failed.len(),
            self.policy.max_failed,
            reason(example).map_or("", String::as_str)
        ))
    }
}

#[cfg(test)]
mod tests;
