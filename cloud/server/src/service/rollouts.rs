//! The rollout controller: stores rollouts, asks the pure planner what to do, signs offers with
//! the rollout key, and notes what devices report.
//!
//! Every decision is made again from stored state, so a restarted server goes on where it was.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cloud_core::rollout::{
    Action, Control, Device, Policy, Progress, Report, Rollout, Share, State,
};
use flywheel_shared::ids::DeviceId;
use flywheel_shared::message::SlotState;
use flywheel_shared::trust::{MAX_BODY, Offer, TrustError};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::registry::{ModelRecord, Registry};
use super::roots::Roots;
use super::{Fault, lock, now_ms};
use crate::api::types::{ProgressView, RolloutRequest, RolloutView};
use crate::ingest::{OfferBytes, OwnedSlotReport};
use crate::store::{Store, StoreError};

const ROLLOUTS: &str = "rollouts";
/// How long one device may take up one offer: long enough for a slow link to fetch, short enough
/// that a stolen rollout key is of little use for long.
const OFFER_LIFE_MS: u64 = 10 * 60 * 1000;
/// An unanswered offer is made again after this; devices also get it with every health report.
const OFFER_TTL_MS: u64 = 5_000;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct RolloutRecord {
    number: u64,
    model: String,
    policy: String,
    plan: Rollout,
    started_ms: u64,
    ended: Option<Ended>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Ended {
    at_ms: u64,
    state: State,
    reason: Option<String>,
}

/// The rollouts of a server.
pub struct Rollouts {
    store: Arc<Store>,
    registry: Arc<Registry>,
    roots: Arc<Roots>,
    /// Rises with every change, so that watchers can wait.
    changed: watch::Sender<u64>,
    rollouts: Mutex<BTreeMap<u64, RolloutRecord>>,
}

impl Rollouts {
    /// The rollouts in a store; `roots` sign offers.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn open(
        store: Arc<Store>,
        registry: Arc<Registry>,
        roots: Arc<Roots>,
    ) -> Result<Self, Fault> {
        let rollouts = store
            .scan::<RolloutRecord>(ROLLOUTS, &[])?
            .into_iter()
            .map(|(_, record)| (record.number, record))
            .collect();
        Ok(Self {
            store,
            registry,
            roots,
            changed: watch::channel(0).0,
            rollouts: Mutex::new(rollouts),
        })
    }

    /// Starts a rollout of a promoted model.
    ///
    /// # Errors
    /// If the model is not promoted, another rollout runs, or there is no device for it.
    pub fn start(
        &self,
        request: &RolloutRequest,
        inventory: &[Device],
    ) -> Result<RolloutView, Fault> {
        let model = self.registry.find(&request.model)?;
        let release = self.registry.standing(&model).ok_or_else(|| {
            Fault::Conflict(format!(
                "model {} is not signed by the release key that devices believe; run `flywheel model promote` first",
                model.id
            ))
        })?;
        let name = request.policy.as_deref().unwrap_or("canary");
        let canary = match name {
            "canary" => Share::Count(1),
            "all" => Share::Percent(100),
            other => {
                return Err(Fault::Invalid(format!(
                    "there is no policy `{other}`; use canary or all"
                )));
            }
        };
        let policy = Policy {
            canary,
            waves: Vec::new(),
            offer_ttl_ms: OFFER_TTL_MS,
            group: request.group.clone(),
            seed: release.sequence,
            ..Policy::default()
        };
        if let Some(ahead) = inventory
            .iter()
            .find(|device| device.sequence > release.sequence && policy.covers(device))
        {
            return Err(Fault::Conflict(format!(
                "{} runs release {}, which is newer than {}; devices never go back to an older release",
                ahead.id, ahead.sequence, release.sequence
            )));
        }
        let mut rollouts = lock(&self.rollouts);
        if let Some(running) = rollouts.values().find(|record| record.ended.is_none()) {
            return Err(Fault::Conflict(format!(
                "rollout {} is still running; wait for it, or abort it with `flywheel rollout abort {}`",
                running.number, running.number
            )));
        }
        let plan = Rollout::start(release.sequence, policy, inventory)
            .map_err(|error| Fault::Conflict(error.to_string()))?;
        let number = rollouts.keys().last().map_or(1, |last| last + 1);
        let record = RolloutRecord {
            number,
            model: model.id.clone(),
            policy: name.to_owned(),
            plan,
            started_ms: now_ms(),
            ended: None,
        };
        self.save(&record)?;
        let view = record.view(inventory);
        rollouts.insert(number, record);
        drop(rollouts);
        self.notify();
        Ok(view)
    }

    /// Carries the running rollout on: returns the offers to send now.
    ///
    /// # Errors
    /// If the store fails; nothing is sent then that is not noted.
    pub fn advance(&self, inventory: &[Device]) -> Result<Vec<(DeviceId, OfferBytes)>, Fault> {
        let mut rollouts = lock(&self.rollouts);
        let Some(record) = rollouts.values_mut().find(|record| record.ended.is_none()) else {
            return Ok(Vec::new());
        };
        let now = now_ms();
        let plan = record.plan.plan(inventory, now);
        let mut offers = Vec::new();
        let mut next = record.clone();
        let model = self.registry.find(&record.model)?;
        for action in plan.actions {
            let Action::Offer { device } = action;
            let id: DeviceId = device
                .parse()
                .map_err(|error| Fault::Internal(format!("device id {device}: {error}")))?;
            // Under a newer release key nobody would take it; the operator promotes it again.
            if let Some(offer) = self.offer_bytes(&model, &id, now)? {
                offers.push((id, offer));
                next.plan.offered(&device, now);
            }
        }
        match plan.state {
            State::Running { .. } | State::Paused => {}
            state => {
                let reason = match &state {
                    State::Halted { reason } => Some(reason.clone()),
                    _ => None,
                };
                next.ended = Some(Ended {
                    at_ms: now,
                    state,
                    reason,
                });
            }
        }
        if !offers.is_empty() || next.ended.is_some() {
            self.save(&next)?;
            *record = next;
            drop(rollouts);
            self.notify();
        }
        Ok(offers)
    }

    /// The offer that a device should have in hand now, if any: of the running rollout once it
    /// was made, else of the newest finished one, for devices that joined or came back later.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn standing_offer(
        &self,
        device: &DeviceId,
        sequence: u64,
        busy: bool,
    ) -> Result<Option<OfferBytes>, Fault> {
        let model = {
            let rollouts = lock(&self.rollouts);
            let record = rollouts.values().rev().find(|record| {
                let progress = record.plan.progress.get(device.as_str());
                match &record.ended {
                    None => matches!(progress, Some(Progress::Offered { .. })),
                    Some(ended) => {
                        ended.state == State::Confirmed
                            && record.plan.policy.group.is_none()
                            && matches!(
                                progress,
                                None | Some(Progress::Pending | Progress::Offered { .. })
                            )
                    }
                }
            });
            match record {
                Some(record) if record.plan.sequence > sequence && !busy => record.model.clone(),
                _ => return Ok(None),
            }
        };
        let model = self.registry.find(&model)?;
        self.offer_bytes(&model, device, now_ms())
    }

    /// Notes what a device reported.
    ///
    /// # Errors
    /// If the store fails.
    pub fn record(&self, device: &DeviceId, report: &OwnedSlotReport) -> Result<(), StoreError> {
        let reason = || {
            if report.detail.is_empty() {
                format!("error {}", report.code)
            } else {
                format!("{} (error {})", report.detail, report.code)
            }
        };
        let report_kind = match report.state {
            // A fresh offer cures these; the planner makes one after the offer's time is over.
            SlotState::Refused
                if TrustError::from_code(report.code).is_some_and(TrustError::is_curable) =>
            {
                return Ok(());
            }
            SlotState::Refused => Report::Failed(reason()),
            SlotState::Fetching | SlotState::Staged => Report::Staged,
            SlotState::Trial => Report::Trial,
            SlotState::Confirmed => Report::Confirmed,
            SlotState::Reverted => Report::Reverted(reason()),
        };
        let mut rollouts = lock(&self.rollouts);
        let Some(record) = rollouts
            .values_mut()
            .rev()
            .find(|record| record.plan.sequence == report.sequence)
        else {
            return Ok(());
        };
        let mut next = record.clone();
        if next.plan.record(device.as_str(), report_kind, now_ms()) {
            self.save(&next)?;
            *record = next;
            drop(rollouts);
            self.notify();
        }
        Ok(())
    }

    /// Stops a rollout for good.
    ///
    /// # Errors
    /// If there is none, or it has ended.
    pub fn abort(
        &self,
        id: &str,
        reason: &str,
        inventory: &[Device],
    ) -> Result<RolloutView, Fault> {
        let mut rollouts = lock(&self.rollouts);
        let number = find(&rollouts, id)?;
        let record = rollouts
            .get_mut(&number)
            .ok_or_else(|| Fault::NotFound(format!("there is no rollout {id}")))?;
        if record.ended.is_some() {
            return Err(Fault::Conflict(format!(
                "rollout {number} has ended already"
            )));
        }
        let mut next = record.clone();
        next.plan.control = Control::Aborted;
        next.ended = Some(Ended {
            at_ms: now_ms(),
            state: State::Aborted,
            reason: Some(reason.to_owned()),
        });
        self.save(&next)?;
        *record = next;
        let view = record.view(inventory);
        drop(rollouts);
        self.notify();
        Ok(view)
    }

    /// All rollouts, oldest first.
    pub fn list(&self, inventory: &[Device]) -> Vec<RolloutView> {
        lock(&self.rollouts)
            .values()
            .map(|record| record.view(inventory))
            .collect()
    }

    /// A rollout by number, or `latest`.
    ///
    /// # Errors
    /// If there is none.
    pub fn view(&self, id: &str, inventory: &[Device]) -> Result<RolloutView, Fault> {
        let rollouts = lock(&self.rollouts);
        let number = find(&rollouts, id)?;
        rollouts
            .get(&number)
            .map(|record| record.view(inventory))
            .ok_or_else(|| Fault::NotFound(format!("there is no rollout {id}")))
    }

    /// Something to wait on for the next change of any rollout.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn notify(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    fn save(&self, record: &RolloutRecord) -> Result<(), StoreError> {
        self.store
            .put(ROLLOUTS, &record.number.to_be_bytes(), record)
    }

    fn offer_bytes(
        &self,
        model: &ModelRecord,
        device: &DeviceId,
        now_ms: u64,
    ) -> Result<Option<OfferBytes>, Fault> {
        let Some(release) = self.registry.standing(model) else {
            return Ok(None);
        };
        let mut nonce = [0u8; 8];
        getrandom::fill(&mut nonce)
            .map_err(|error| Fault::Internal(format!("no randomness: {error}")))?;
        let offer = Offer {
            device: device.clone(),
            manifest: release.digest,
            sequence: release.sequence,
            issued_ms: now_ms,
            expires_ms: now_ms + OFFER_LIFE_MS,
            nonce: u64::from_le_bytes(nonce),
        };
        let mut buffer = [0u8; MAX_BODY];
        let body = postcard::to_slice(&offer, &mut buffer)
            .map_err(|error| Fault::Internal(format!("the offer does not encode: {error}")))?
            .to_vec();
        Ok(Some(OfferBytes {
            offer_signature: self.roots.sign_offer(&body),
            offer: body,
            manifest: release.body.clone(),
            manifest_signature: release.signature.as_slice().try_into().map_err(|_| {
                Fault::Internal(format!("the signature of model {} is damaged", model.id))
            })?,
        }))
    }
}

fn find(rollouts: &BTreeMap<u64, RolloutRecord>, id: &str) -> Result<u64, Fault> {
    if id == "latest" {
        return rollouts.keys().last().copied().ok_or_else(|| {
            Fault::NotFound(
                "there is no rollout yet; start one with `flywheel rollout start`".to_owned(),
            )
        });
    }
    id.parse()
        .map_err(|_| Fault::Invalid(format!("`{id}` is not the number of a rollout")))
}

impl RolloutRecord {
    fn view(&self, inventory: &[Device]) -> RolloutView {
        let state = match &self.ended {
            Some(ended) => ended.state.clone(),
            None => self.plan.plan(inventory, now_ms()).state,
        };
        let (name, wave) = match &state {
            State::Running { wave } => ("running", *wave),
            State::Confirmed => ("confirmed", 0),
            State::Halted { .. } => ("halted", 0),
            State::Aborted => ("aborted", 0),
            State::Paused => ("paused", 0),
        };
        // Ended by the plan but not noted yet: watchers see it when it is noted.
        let name = if self.ended.is_none() && name != "paused" {
            "running"
        } else {
            name
        };
        let mut devices: BTreeMap<String, ProgressView> = self
            .plan
            .waves
            .iter()
            .flatten()
            .map(|device| {
                (
                    device.clone(),
                    ProgressView {
                        state: Progress::Pending.name().to_owned(),
                        detail: None,
                    },
                )
            })
            .collect();
        for (device, progress) in &self.plan.progress {
            let detail = match progress {
                Progress::Reverted { reason } | Progress::Failed { reason } => Some(reason.clone()),
                _ => None,
            };
            devices.insert(
                device.clone(),
                ProgressView {
                    state: progress.name().to_owned(),
                    detail,
                },
            );
        }
        RolloutView {
            id: self.number,
            model: self.model.clone(),
            sequence: self.plan.sequence,
            policy: self.policy.clone(),
            state: name.to_owned(),
            reason: self.ended.as_ref().and_then(|ended| ended.reason.clone()),
            wave: wave as u32,
            started_ms: self.started_ms,
            ended_ms: self.ended.as_ref().map(|ended| ended.at_ms),
            devices,
        }
    }
}
