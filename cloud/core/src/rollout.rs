//! Who gets a released model next, and who goes back to the one before. The planner is a function
//! of stored state, inventory, measurements and time: the executor stores its decisions, carries
//! them out, records what devices report, and asks again; after a crash at any step it asks again
//! just the same.
//!
//! Canaries come first, and nobody else is offered the model before the gate behind their wave
//! passes; then wave by wave. Too many failures, or a measurement beyond its limit, halt the
//! rollout for good, and the devices that took the model are offered the one before.

mod gate;
mod plan;
mod policy;
mod progress;
mod selector;

pub use gate::Confidence;
pub use policy::{DriftGate, Gate, Policy, Share};
pub use progress::{Member, Progress, Report};
pub use selector::Selector;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

/// A device as the server knows it now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its id.
    pub id: String,
    /// Its group; canaries are spread over groups.
    pub group: String,
    /// What the operator tagged it with.
    pub labels: BTreeMap<String, String>,
    /// Hardware class.
    pub hardware: String,
    /// Name of its engine.
    pub engine: String,
    /// Sequence of its live model.
    pub sequence: u64,
    /// Whether it can be offered anything now.
    pub online: bool,
    /// Since it was heard, in ms.
    pub silent_ms: u64,
    /// Its boots so far.
    pub restarts: u32,
    /// Frames that it could not read.
    pub skipped: u64,
}

/// What the operator wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Go on.
    #[default]
    Running,
    /// Offer nothing for now; too many failures still halt.
    Paused,
}

/// How a rollout ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Every device has confirmed, but for those excluded, those away, and the failures within the
    /// limit.
    Confirmed,
    /// Too much failed.
    Halted {
        /// What, in words.
        reason: String,
    },
    /// The operator stopped it.
    Aborted {
        /// Why.
        reason: String,
    },
}

/// Where a rollout stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// This wave is open, 0 for the canaries, and the next one waits for something.
    Running {
        /// The wave.
        wave: u32,
        /// What is waited for, in words.
        waits_for: String,
    },
    /// The operator stopped it for now.
    Paused {
        /// The wave.
        wave: u32,
    },
    /// It has ended, and so many devices are to go back to the model before.
    Returning {
        /// Devices.
        left: usize,
    },
    /// It has ended, and nothing is left to do.
    Ended,
}

/// What a rollout is and where it stands, but for its devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// Sequence of the model.
    pub sequence: u64,
    /// Sequence under which the model before was released again; `None` when there was none.
    pub back: Option<u64>,
    /// The rules.
    pub policy: Policy,
    /// Which devices.
    pub selector: Selector,
    /// Waves, the canaries counted.
    pub waves: u32,
    /// The open wave.
    pub wave: u32,
    /// Since when, in ms since the Unix epoch.
    pub opened_ms: u64,
    /// The wave whose gate the operator forced.
    pub forced_wave: Option<u32>,
    /// What the operator wants.
    pub control: Control,
    /// How it ended, if it has.
    pub end: Option<End>,
    /// Whether devices go back to the model before.
    pub returning: bool,
}

/// The stored state of a rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// All but the devices.
    pub head: Head,
    /// The devices by id. Who is in which wave is fixed at the start; devices that join later
    /// belong to the last wave.
    pub members: BTreeMap<String, Member>,
}

/// Something that is decided, to be stored with [`Rollout::decide`] and then done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// These devices came later and belong to the last wave.
    Join {
        /// Their ids.
        devices: Vec<String>,
    },
    /// This device runs the model, as its health says; its report is still to come.
    Seen {
        /// Its id.
        device: String,
    },
    /// The next wave opens.
    Open {
        /// Which.
        wave: u32,
        /// Why, in words.
        reason: String,
    },
    /// Offer the model to this device.
    Offer {
        /// Its id.
        device: String,
        /// Its boots so far.
        boots: u32,
    },
    /// Offer the model before to this device.
    Return {
        /// Its id.
        device: String,
    },
    /// It ends.
    End(End),
}

/// What to do now, and where the rollout stands then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// In order.
    pub decisions: Vec<Decision>,
    /// Where it stands once they are made.
    pub state: State,
}

/// Why a rollout can't start.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RolloutError {
    /// No device to roll out to.
    #[error("{}", no_device(selector))]
    NoDevice {
        /// What was asked for.
        selector: String,
    },
    /// The policy makes no sense.
    #[error("rollout policy: {field} must be {want}")]
    Policy {
        /// Which field.
        field: &'static str,
        /// What would be right.
        want: &'static str,
    },
    /// A selector makes no sense.
    #[error(
        "`{term}` names no devices; write a group, group=NAME, device=ID, hardware=NAME, engine=NAME, label.KEY=VALUE, online, healthy, or sequence, restarts, skipped or silent_s with a number (silent_s<60), several of them separated by commas"
    )]
    Selector {
        /// The term.
        term: String,
    },
}

fn no_device(selector: &str) -> String {
    match selector {
        "all" => "there is no device to roll out to; enrol one first".to_owned(),
        other => format!("no device matches `{other}`; enrol or tag one first"),
    }
}

impl Head {
    /// Notes what a device reported about the model with this sequence, which is that of the
    /// rollout or of the model before; true when that changed anything. `latency_us` is the slowest
    /// inference of its trial, 0 when there was none.
    pub fn record(
        &self,
        member: &mut Member,
        sequence: u64,
        report: Report,
        latency_us: u32,
        now_ms: u64,
    ) -> bool {
        let before = member.clone();
        if sequence == self.sequence {
            member.latency_us = member.latency_us.max(latency_us);
            member.report(report, now_ms);
        } else if Some(sequence) == self.back && self.returning {
            member.report_return(report, now_ms);
        }
        *member != before
    }
}

impl Rollout {
    /// A new rollout of the model with `sequence` to the devices that run an older one. Canaries
    /// are drawn by the seed, from devices that are online and from every group in turn while that
    /// is possible. `back` is the sequence of the model before, released again.
    ///
    /// # Errors
    /// [`RolloutError`] when the policy is contradictory or there is no device.
    pub fn start(
        sequence: u64,
        back: Option<u64>,
        policy: Policy,
        selector: Selector,
        inventory: &[Device],
        now_ms: u64,
    ) -> Result<Self, RolloutError> {
        policy.check()?;
        if !inventory.iter().any(|device| selector.matches(device)) {
            return Err(RolloutError::NoDevice {
                selector: selector.to_string(),
            });
        }
        let behind = inventory
            .iter()
            .filter(|device| selector.matches(device) && device.sequence < sequence);
        let waves = policy.cut(policy.order(behind));
        let mut members = BTreeMap::new();
        for (wave, devices) in (0..).zip(&waves) {
            members.extend(devices.iter().map(|id| (id.clone(), Member::new(wave))));
        }
        Ok(Self {
            head: Head {
                sequence,
                back,
                policy,
                selector,
                waves: u32::try_from(waves.len()).unwrap_or(u32::MAX).max(1),
                wave: 0,
                opened_ms: now_ms,
                forced_wave: None,
                control: Control::Running,
                end: None,
                returning: false,
            },
            members,
        })
    }

    /// Makes a decision.
    pub fn decide(&mut self, decision: &Decision, now_ms: u64) {
        match decision {
            Decision::Join { devices } => {
                // The canaries stay among themselves, even when they were the whole fleet.
                self.head.waves = self.head.waves.max(2);
                let last = self.head.waves - 1;
                for id in devices {
                    let late = || Member::new(last);
                    self.members.entry(id.clone()).or_insert_with(late);
                }
            }
            Decision::Seen { device } => {
                if let Some(member) = self.members.get_mut(device) {
                    if self.head.end.is_some() {
                        member.report_return(Report::Confirmed, now_ms);
                    } else {
                        member.report(Report::Confirmed, now_ms);
                    }
                }
            }
            Decision::Open { wave, .. } => {
                self.head.wave = *wave;
                self.head.opened_ms = now_ms;
            }
            Decision::Offer { device, boots } => {
                if let Some(member) = self.members.get_mut(device) {
                    member.offered(*boots, now_ms);
                }
            }
            Decision::Return { device } => {
                if let Some(member) = self.members.get_mut(device) {
                    member.offered_ms = Some(now_ms);
                    member.progress = Progress::Returning { at_ms: now_ms };
                }
            }
            Decision::End(end) => {
                let go_back = matches!(end, End::Halted { .. }) && self.head.policy.go_back;
                self.end(end.clone(), go_back);
            }
        }
    }

    /// Ends it; with `go_back` the devices that took the model are offered the one before.
    pub fn end(&mut self, end: End, go_back: bool) {
        self.head.end = Some(end);
        self.head.returning = go_back && self.head.back.is_some();
    }

    /// Notes what a device reported; see [`Head::record`]. False if it is not in the rollout.
    pub fn record(
        &mut self,
        device: &str,
        sequence: u64,
        report: Report,
        latency_us: u32,
        now_ms: u64,
    ) -> bool {
        let member = self.members.get_mut(device);
        member.is_some_and(|member| {
            self.head
                .record(member, sequence, report, latency_us, now_ms)
        })
    }

    /// Takes a device out, whatever its progress; a failure of it no longer counts. False if it is
    /// not in the rollout.
    pub fn exclude(&mut self, device: &str, reason: &str) -> bool {
        let Some(member) = self.members.get_mut(device) else {
            return false;
        };
        member.progress = Progress::Excluded {
            reason: reason.to_owned(),
        };
        true
    }

    /// How many devices of each wave are at each stage, by its name.
    #[must_use]
    pub fn summary(&self) -> Vec<BTreeMap<&'static str, usize>> {
        let mut waves = vec![BTreeMap::new(); self.head.waves as usize];
        for member in self.members.values() {
            if let Some(wave) = waves.get_mut(member.wave as usize) {
                *wave.entry(member.progress.name()).or_default() += 1;
            }
        }
        waves
    }
}

#[cfg(test)]
mod tests;
