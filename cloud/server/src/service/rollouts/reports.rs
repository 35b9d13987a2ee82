//! What devices report of the models they were offered. Reports that come at the same time are
//! written together: whoever comes first writes for all that wait.

use std::collections::BTreeMap;
use std::sync::mpsc::{SyncSender, sync_channel};

use cloud_core::rollout::{End, Member, Report};
use flywheel_shared::ids::DeviceId;
use flywheel_shared::message::SlotState;
use flywheel_shared::trust::TrustError;

use super::log::{Event, Outcome};
use super::{Change, Rollouts, State};
use crate::ingest::OwnedSlotReport;
use crate::service::lock;
use crate::store::StoreError;

/// Who is named in the log.
const DEVICES: &str = "devices";

/// A report that waits to be written.
pub(super) struct Waiting {
    device: DeviceId,
    report: OwnedSlotReport,
    now_ms: u64,
    done: SyncSender<Result<(), StoreError>>,
}

impl Rollouts {
    /// Notes what a device reported; durable on return.
    ///
    /// # Errors
    /// If the store fails; the device repeats its report.
    pub fn record(
        &self,
        device: &DeviceId,
        report: &OwnedSlotReport,
        now_ms: u64,
    ) -> Result<(), StoreError> {
        let (done, outcome) = sync_channel(1);
        lock(&self.waiting).push(Waiting {
            device: device.clone(),
            report: report.clone(),
            now_ms,
            done,
        });
        let mut state = lock(&self.state);
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        if !waiting.is_empty() {
            let reports = waiting
                .iter()
                .map(|w| (&w.device, &w.report, w.now_ms))
                .collect::<Vec<_>>();
            let written = self.note(&mut state, &reports);
            for waiting in waiting {
                // It waits below.
                let _ = waiting.done.send(written.clone());
            }
        }
        drop(state);
        outcome.recv().unwrap_or(Err(StoreError::Closed))
    }

    /// [`Rollouts::record`] of several reports.
    ///
    /// # Errors
    /// If the store fails; then none was noted.
    pub fn record_all(
        &self,
        reports: &[(DeviceId, OwnedSlotReport)],
        now_ms: u64,
    ) -> Result<(), StoreError> {
        let reports: Vec<_> = reports.iter().map(|(d, r)| (d, r, now_ms)).collect();
        self.note(&mut lock(&self.state), &reports)
    }

    fn note(
        &self,
        state: &mut State,
        reports: &[(&DeviceId, &OwnedSlotReport, u64)],
    ) -> Result<(), StoreError> {
        let mut touched: BTreeMap<u64, BTreeMap<String, Member>> = BTreeMap::new();
        let mut outcomes: BTreeMap<u64, Vec<Outcome>> = BTreeMap::new();
        let mut at_ms = 0;
        for (device, report, now_ms) in reports {
            at_ms = at_ms.max(*now_ms);
            let Some(kind) = kind(report) else { continue };
            let of_rollout = state.entries.values().rev().find(|entry| {
                let head = &entry.rollout.head;
                head.sequence == report.sequence || head.back == Some(report.sequence)
            });
            let Some(entry) = of_rollout else { continue };
            let head = &entry.rollout.head;
            let touched = touched.entry(entry.number).or_default();
            let known = touched
                .get(device.as_str())
                .or_else(|| entry.rollout.members.get(device.as_str()));
            let mut member = match known {
                Some(member) => member.clone(),
                // It joined after everybody had confirmed.
                None if head.end == Some(End::Confirmed) && head.sequence == report.sequence => {
                    Member::new(head.waves.saturating_sub(1))
                }
                None => continue,
            };
            if head.record(
                &mut member,
                report.sequence,
                kind,
                report.max_latency_us,
                *now_ms,
            ) {
                outcomes.entry(entry.number).or_default().push(Outcome {
                    device: device.to_string(),
                    state: member.progress.name().to_owned(),
                    reason: member.progress.reason().map(str::to_owned),
                });
                touched.insert(device.to_string(), member);
            }
        }
        let mut changes = Vec::new();
        for (number, members) in touched {
            let devices = outcomes.remove(&number).unwrap_or_default();
            if !devices.is_empty() {
                let events = Event::each(&devices, |devices| Event::Reported { devices });
                changes.push(Change {
                    number,
                    members,
                    events: events.map(|event| (DEVICES.to_owned(), event)).collect(),
                    ..Change::default()
                });
            }
        }
        self.commit(state, changes, at_ms)
    }
}

/// What a report means to a rollout; nothing if a fresh offer cures it.
fn kind(report: &OwnedSlotReport) -> Option<Report> {
    let reason = || match report.detail.as_str() {
        "" => format!("error {}", report.code),
        detail => format!("{detail} (error {})", report.code),
    };
    Some(match report.state {
        // The planner makes a new offer after the time of this one is over.
        SlotState::Refused
            if TrustError::from_code(report.code).is_some_and(TrustError::is_curable) =>
        {
            return None;
        }
        SlotState::Refused => Report::Failed(reason()),
        SlotState::Fetching | SlotState::Staged => Report::Staged,
        SlotState::Trial => Report::Trial,
        SlotState::Confirmed => Report::Confirmed,
        SlotState::Reverted => Report::Reverted(reason()),
    })
}
