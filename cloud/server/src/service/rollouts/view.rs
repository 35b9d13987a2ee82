//! Rollouts as people and programs see them.

use std::collections::{BTreeMap, HashSet};

use cloud_core::rollout::{Control, Device, End, Progress, State};

use super::record::Entry;
use super::{Rollouts, find};
use crate::api::types::{ProgressView, RolloutView, WaveView};
use crate::service::{Fault, lock};

impl Rollouts {
    /// All rollouts, oldest first.
    pub fn list(&self, inventory: &[Device], now_ms: u64) -> Vec<RolloutView> {
        lock(&self.state)
            .entries
            .values()
            .map(|entry| entry.view(inventory, now_ms, false))
            .collect()
    }

    /// A rollout by number, or `latest`; with or without every device in it.
    ///
    /// # Errors
    /// If there is none.
    pub fn view(
        &self,
        id: &str,
        inventory: &[Device],
        now_ms: u64,
        devices: bool,
    ) -> Result<RolloutView, Fault> {
        let state = lock(&self.state);
        let number = find(&state.entries, id)?;
        state
            .entries
            .get(&number)
            .map(|entry| entry.view(inventory, now_ms, devices))
            .ok_or_else(|| Fault::NotFound(format!("there is no rollout {id}")))
    }
}

impl Entry {
    pub(super) fn view(&self, inventory: &[Device], now_ms: u64, devices: bool) -> RolloutView {
        let head = &self.rollout.head;
        let (state, reason) = match &head.end {
            Some(End::Confirmed) => ("confirmed", None),
            Some(End::Halted { reason }) => ("halted", Some(reason.clone())),
            Some(End::Aborted { reason }) => ("aborted", Some(reason.clone())),
            None if head.control == Control::Paused => ("paused", None),
            None => ("running", None),
        };
        // Before the controller's first look, as far as it can be told without measurements.
        let waits_for = || match self.rollout.plan(inventory, None, now_ms).state {
            State::Running { waits_for, .. } => Some(waits_for),
            _ => None,
        };
        let waits_for = match state {
            "running" => self.waits_for.clone().or_else(waits_for),
            _ => None,
        };
        let online: HashSet<&str> = inventory
            .iter()
            .filter(|device| head.returning && device.online)
            .map(|device| device.id.as_str())
            .collect();
        let to_return: Vec<&String> = self
            .rollout
            .members
            .iter()
            .filter(|(_, member)| head.returning && member.progress.is_to_return())
            .map(|(id, _)| id)
            .collect();
        let waves = self.rollout.summary().into_iter().map(|states| WaveView {
            devices: states.values().map(|n| *n as u64).sum(),
            states: states
                .into_iter()
                .map(|(state, n)| (state.to_owned(), n as u64))
                .collect(),
        });
        let view = |(id, progress): (&String, &Progress)| {
            let view = ProgressView {
                state: progress.name().to_owned(),
                detail: progress.reason().map(str::to_owned),
            };
            (id.clone(), view)
        };
        let all = || self.rollout.members.iter().map(|(id, m)| (id, &m.progress));
        let shown: BTreeMap<String, ProgressView> = if devices {
            all().map(view).collect()
        } else {
            BTreeMap::new()
        };
        let failures = all().filter(|(_, progress)| {
            progress.failure().is_some() || matches!(progress, Progress::Stranded { .. })
        });
        RolloutView {
            id: self.number,
            model: self.model.clone(),
            sequence: head.sequence,
            back: head.back,
            to: head.selector.to_string(),
            policy: head.policy.name.clone(),
            state: state.to_owned(),
            reason,
            waits_for,
            wave: head.wave,
            returning: to_return.len() as u64,
            returning_away: to_return
                .iter()
                .filter(|id| !online.contains(id.as_str()))
                .count() as u64,
            started_ms: self.started_ms,
            ended_ms: self.ended_ms,
            waves: waves.collect(),
            failures: failures.map(view).collect(),
            devices: shown,
        }
    }
}
