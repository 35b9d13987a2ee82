//! What operators do to rollouts: start, plan, pause, resume, abort, exclude, force.

use cloud_core::rollout::{Control, Device, End, Policy, Rollout, Selector};

use super::log::Event;
use super::offers::Package;
use super::record::Entry;
use super::{Change, Rollouts, State, find};
use crate::api::types::{
    ActRequest, PlanView, RolloutAction, RolloutRequest, RolloutView, SkippedView,
};
use crate::service::registry::{ModelRecord, Release};
use crate::service::{Fault, lock};

/// Who is named in the log when nobody is.
const OPERATOR: &str = "operator";

impl Rollouts {
    /// Starts a rollout of a promoted model.
    ///
    /// # Errors
    /// If the model is not promoted, another rollout runs, the policy makes no sense, or there is
    /// no device for it.
    pub fn start(
        &self,
        request: &RolloutRequest,
        inventory: &[Device],
        now_ms: u64,
    ) -> Result<RolloutView, Fault> {
        let mut state = lock(&self.state);
        let (model, rollout) = self.prepare(request, inventory, now_ms)?;
        if let Some(running) = state.entries.values().find(|entry| entry.is_running()) {
            return Err(Fault::Conflict(format!(
                "rollout {} is still running; wait for it, or abort it with `flywheel rollout abort {}`",
                running.number, running.number
            )));
        }
        let number = state.entries.keys().last().map_or(1, |last| last + 1);
        let release = self.release(&model)?;
        let (package, back) = Package::of(release)?;
        let previous = release.back.as_ref().map(|back| back.model.clone());
        let event = Event::Started {
            model: model.id.clone(),
            sequence: rollout.head.sequence,
            back: rollout.head.back,
            to: rollout.head.selector.to_string(),
            waves: rollout
                .summary()
                .iter()
                .map(|wave| wave.values().sum())
                .collect(),
            policy: Box::new(rollout.head.policy.clone()),
        };
        let entry = Entry {
            number,
            model: model.id,
            previous,
            started_ms: now_ms,
            ended_ms: None,
            samples_after: self.store.last_sample()?,
            rollout,
            package,
            back,
            waits_for: None,
        };
        let change = Change {
            number,
            members: entry.rollout.members.clone(),
            new: Some(entry),
            events: vec![(by(request.by.as_deref()), event)],
            ..Change::default()
        };
        self.commit(&mut state, vec![change], now_ms)?;
        self.seen(&state, number, inventory, now_ms)
    }

    /// What [`Rollouts::start`] would do; nothing is done.
    ///
    /// # Errors
    /// As [`Rollouts::start`], but for a running rollout.
    pub fn preview(
        &self,
        request: &RolloutRequest,
        inventory: &[Device],
        now_ms: u64,
    ) -> Result<PlanView, Fault> {
        let (model, rollout) = self.prepare(request, inventory, now_ms)?;
        let head = &rollout.head;
        let mut waves = vec![Vec::new(); head.waves as usize];
        for (id, member) in &rollout.members {
            if let Some(wave) = waves.get_mut(member.wave as usize) {
                wave.push(id.clone());
            }
        }
        let skipped = inventory.iter().filter_map(|device| {
            let why = if !head.selector.covers(device) {
                "is not in the group"
            } else if !head.selector.matches(device) {
                "is not healthy enough; it joins once it is"
            } else if device.sequence >= head.sequence {
                "runs this release already"
            } else {
                return None;
            };
            Some(SkippedView {
                device: device.id.clone(),
                why: why.to_owned(),
            })
        });
        let policy = &head.policy;
        let offers_s = match policy.offer_rate {
            0 => 0,
            rate => rollout.members.len() as u64 / u64::from(rate),
        };
        let pauses = policy.gate.soak_s.saturating_add(policy.jitter_s);
        Ok(PlanView {
            model: model.id.clone(),
            sequence: head.sequence,
            back: head.back,
            to: head.selector.to_string(),
            policy: policy_json(policy)?,
            away: inventory
                .iter()
                .filter(|d| !d.online && rollout.members.contains_key(&d.id))
                .map(|d| d.id.clone())
                .collect(),
            skipped: skipped.collect(),
            least_seconds: offers_s.max(pauses.saturating_mul(u64::from(head.waves))),
            waves,
        })
    }

    fn prepare(
        &self,
        request: &RolloutRequest,
        inventory: &[Device],
        now_ms: u64,
    ) -> Result<(ModelRecord, Rollout), Fault> {
        let model = self.registry.find(&request.model)?;
        let release = self.release(&model)?;
        let invalid = |error: cloud_core::rollout::RolloutError| Fault::Invalid(error.to_string());
        let selector: Selector = match request.to.as_deref() {
            Some(text) => text.parse().map_err(invalid)?,
            None => Selector::all(),
        };
        let policy = Policy {
            seed: release.sequence,
            ..policy(request)?
        };
        policy.check().map_err(invalid)?;
        if let Some(ahead) = inventory
            .iter()
            .find(|device| device.sequence > release.sequence && selector.covers(device))
        {
            return Err(Fault::Conflict(format!(
                "{} runs release {}, which is newer than {}; devices never go back to an older release",
                ahead.id, ahead.sequence, release.sequence
            )));
        }
        let back = release.back.as_ref().map(|back| back.manifest.sequence);
        let rollout = Rollout::start(release.sequence, back, policy, selector, inventory, now_ms)
            .map_err(|error| Fault::Conflict(error.to_string()))?;
        Ok((model, rollout))
    }

    /// The release of a model, if devices believe the key that signed it.
    fn release<'m>(&self, model: &'m ModelRecord) -> Result<&'m Release, Fault> {
        self.registry.standing(model).ok_or_else(|| {
            Fault::Conflict(format!(
                "model {} is not signed by the release key that devices believe; run `flywheel model promote` first",
                model.id
            ))
        })
    }

    /// Does something to a rollout.
    ///
    /// # Errors
    /// If there is none, no reason is given, or it makes no sense now.
    pub fn act(
        &self,
        id: &str,
        action: RolloutAction,
        request: &ActRequest,
        inventory: &[Device],
        now_ms: u64,
    ) -> Result<RolloutView, Fault> {
        let mut state = lock(&self.state);
        let number = find(&state.entries, id)?;
        let entry = state
            .entries
            .get(&number)
            .ok_or_else(|| Fault::NotFound(format!("there is no rollout {id}")))?;
        let reason = request.reason.trim().to_owned();
        if reason.is_empty() && action != RolloutAction::Resume {
            return Err(Fault::Invalid(
                "reason: say why; it goes into the rollout log".to_owned(),
            ));
        }
        let head = &entry.rollout.head;
        // An ended rollout has nothing to steer but the devices that go back.
        if head.end.is_some() && !(action == RolloutAction::Exclude && head.returning) {
            return Err(Fault::Conflict(format!(
                "rollout {number} has ended already"
            )));
        }
        let mut next = head.clone();
        let mut change = Change {
            number,
            ..Change::default()
        };
        let device = || {
            let id = request
                .device
                .as_deref()
                .ok_or_else(|| Fault::Invalid("device: name the device".to_owned()))?;
            let member = entry.rollout.members.get(id).cloned();
            let member = member
                .ok_or_else(|| Fault::NotFound(format!("{id} is not in rollout {number}")))?;
            Ok::<_, Fault>((id.to_owned(), member))
        };
        let event = match action {
            RolloutAction::Pause => {
                next.control = Control::Paused;
                Event::Paused { reason }
            }
            RolloutAction::Resume => {
                next.control = Control::Running;
                Event::Resumed { reason }
            }
            RolloutAction::Abort => {
                let wanted = request.back.unwrap_or(false);
                if wanted && next.back.is_none() {
                    return Err(Fault::Conflict(format!(
                        "rollout {number} has no model before to go back to"
                    )));
                }
                next.returning = wanted;
                next.end = Some(End::Aborted {
                    reason: reason.clone(),
                });
                change.ended_ms = Some(now_ms);
                if wanted {
                    change.champion = self.champion_again(entry)?;
                }
                Event::Aborted {
                    reason,
                    returning: wanted,
                }
            }
            RolloutAction::Exclude => {
                let (id, mut member) = device()?;
                member.progress = cloud_core::rollout::Progress::Excluded {
                    reason: reason.clone(),
                };
                change.members.insert(id.clone(), member);
                Event::Excluded { device: id, reason }
            }
            RolloutAction::Force if request.device.is_some() => {
                let (id, mut member) = device()?;
                member.forced = true;
                change.members.insert(id.clone(), member);
                Event::ForcedDevice { device: id, reason }
            }
            RolloutAction::Force => {
                next.forced_wave = Some(next.wave);
                Event::ForcedWave {
                    wave: next.wave,
                    reason,
                }
            }
        };
        if next != *head {
            change.head = Some(next);
        }
        let who = by(request.by.as_deref());
        if let Some(model) = &change.champion {
            let event = Event::Champion {
                model: model.clone(),
            };
            change.events.push((who.clone(), event));
        }
        change.events.insert(0, (who, event));
        self.commit(&mut state, vec![change], now_ms)?;
        self.seen(&state, number, inventory, now_ms)
    }

    /// The model that becomes the champion again when this rollout's devices go back.
    pub(super) fn champion_again(&self, entry: &Entry) -> Result<Option<String>, Fault> {
        let champion = self.registry.champion()?;
        let is_champion = champion.is_some_and(|champion| champion.id == entry.model);
        Ok(entry.previous.clone().filter(|_| is_champion))
    }

    fn seen(
        &self,
        state: &State,
        number: u64,
        inventory: &[Device],
        now_ms: u64,
    ) -> Result<RolloutView, Fault> {
        let entry = state.entries.get(&number);
        entry
            .map(|entry| entry.view(inventory, now_ms, true))
            .ok_or_else(|| Fault::NotFound(format!("there is no rollout {number}")))
    }
}

/// The policy that a request names or brings.
fn policy(request: &RolloutRequest) -> Result<Policy, Fault> {
    match (request.policy.as_deref(), request.policy_toml.as_deref()) {
        (Some(_), Some(_)) => Err(Fault::Invalid(
            "name a policy or bring one, not both".to_owned(),
        )),
        (None | Some("canary"), None) => Ok(Policy::canary()),
        (Some("all"), None) => Ok(Policy::all()),
        (Some(other), None) => Err(Fault::Invalid(format!(
            "there is no policy `{other}`; use canary, all or a TOML file"
        ))),
        // The parser's message shows the line and the field.
        (None, Some(text)) => {
            toml::from_str(text).map_err(|error| Fault::Invalid(format!("rollout policy: {error}")))
        }
    }
}

fn policy_json(policy: &Policy) -> Result<serde_json::Value, Fault> {
    serde_json::to_value(policy)
        .map_err(|error| Fault::Internal(format!("the policy does not encode: {error}")))
}

fn by(name: Option<&str>) -> String {
    let name = name.map(str::trim).filter(|name| !name.is_empty());
    name.unwrap_or(OPERATOR).chars().take(80).collect()
}
