//! The rollout controller: stores rollouts, asks the pure planner what to do, signs offers with
//! the rollout key, and notes what devices report and operators do.
//!
//! Every decision is made again from stored state, so a restarted server goes on where it was, and
//! is stored with its line of the log before anything is sent or anybody is told.

mod control;
mod evidence;
pub mod log;
mod offers;
mod record;
mod reports;
#[cfg(test)]
mod tests;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use cloud_core::rollout::{Decision, Device, End, Head, Member, State as Stage};
use flywheel_shared::ids::DeviceId;
use tokio::sync::watch;

use super::registry::Registry;
use super::roots::Roots;
use super::{Fault, lock};
use crate::ingest::OfferBytes;
use crate::store::{Batch, Store, StoreError};
use evidence::Evidence;
use log::{Chain, Event, Line};
use record::Entry;
use reports::Waiting;

pub use record::Shelf;

/// Who is named in the log for what the planner decides.
const CONTROLLER: &str = "controller";

/// The rollouts of a server.
pub struct Rollouts {
    store: Arc<Store>,
    shelf: Arc<dyn Shelf>,
    registry: Arc<Registry>,
    roots: Arc<Roots>,
    /// Rises with every change, so that watchers can wait.
    changed: watch::Sender<u64>,
    /// Reports that wait to be written; taken while `state` is held.
    waiting: Mutex<Vec<Waiting>>,
    state: Mutex<State>,
}

/// What is stored, in memory; never ahead of the store.
struct State {
    entries: BTreeMap<u64, Entry>,
    chain: Chain,
    evidence: Evidence,
}

/// Changes to one rollout that are written together.
#[derive(Default)]
struct Change {
    number: u64,
    new: Option<Entry>,
    head: Option<Head>,
    ended_ms: Option<u64>,
    members: BTreeMap<String, Member>,
    /// Lines of the log: who, and what.
    events: Vec<(String, Event)>,
    /// The model that becomes the champion again.
    champion: Option<String>,
}

impl Rollouts {
    /// The rollouts in a store; `roots` sign offers and the log.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn open(
        store: Arc<Store>,
        registry: Arc<Registry>,
        roots: Arc<Roots>,
    ) -> Result<Self, Fault> {
        Self::open_on(store.clone(), store, registry, roots)
    }

    /// [`Rollouts::open`] with a shelf of the caller's to write to.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn open_on(
        shelf: Arc<dyn Shelf>,
        store: Arc<Store>,
        registry: Arc<Registry>,
        roots: Arc<Roots>,
    ) -> Result<Self, Fault> {
        let state = State {
            entries: record::load(&store)?,
            chain: Chain::open(&store)?,
            evidence: Evidence::default(),
        };
        Ok(Self {
            store,
            shelf,
            registry,
            roots,
            changed: watch::channel(0).0,
            waiting: Mutex::default(),
            state: Mutex::new(state),
        })
    }

    /// Carries rollouts on: returns the offers to send now. Call it after every change and now and
    /// then besides, for offers that went unanswered.
    ///
    /// # Errors
    /// If the store fails; nothing is sent then that is not noted.
    pub fn advance(
        &self,
        inventory: &[Device],
        now_ms: u64,
    ) -> Result<Vec<(DeviceId, OfferBytes)>, Fault> {
        let mut state = lock(&self.state);
        let mut offers = Vec::new();
        let mut changes = Vec::new();
        let mut waits = Vec::new();
        let live: Vec<u64> = state
            .entries
            .values()
            .filter(|entry| entry.is_running() || entry.rollout.head.returning)
            .map(|entry| entry.number)
            .collect();
        for number in live {
            let State {
                entries, evidence, ..
            } = &mut *state;
            let Some(entry) = entries.get(&number) else {
                continue;
            };
            let references = self.references(entry)?;
            let confidence = evidence.of(&self.store, entry, &references)?;
            let plan = entry.rollout.plan(inventory, confidence.as_ref(), now_ms);
            waits.push(match plan.state {
                Stage::Running { waits_for, .. } => (number, Some(waits_for)),
                _ => (number, None),
            });
            // Under a newer release key nobody would take these; the operator promotes again.
            let offered = self.is_believed(&entry.package);
            let back = entry.back.as_ref().is_some_and(|p| self.is_believed(p));
            // Whoever a newer rollout has reached is its business.
            let newer = entries.range(number + 1..);
            let reached: BTreeSet<&str> = newer
                .flat_map(|(_, newer)| &newer.rollout.members)
                .filter(|(_, m)| m.progress.is_settled() || m.progress.is_under_way())
                .map(|(id, _)| id.as_str())
                .collect();
            let decisions: Vec<Decision> = plan
                .decisions
                .into_iter()
                .filter(|decision| match decision {
                    Decision::Return { device } => back && !reached.contains(device.as_str()),
                    Decision::Offer { .. } => offered,
                    _ => true,
                })
                .collect();
            if decisions.is_empty() {
                continue;
            }
            for decision in &decisions {
                let (device, package) = match decision {
                    Decision::Offer { device, .. } => (device, Some(&entry.package)),
                    Decision::Return { device } => (device, entry.back.as_ref()),
                    _ => continue,
                };
                if let Some(package) = package {
                    let id = parse(device)?;
                    let offer = package.offer(&self.roots, &id, now_ms)?;
                    offers.push((id, offer));
                }
            }
            changes.push(self.change(entry, &decisions, now_ms)?);
        }
        self.commit(&mut state, changes, now_ms)?;
        for (number, waits_for) in waits {
            if let Some(entry) = state.entries.get_mut(&number) {
                entry.waits_for = waits_for;
            }
        }
        Ok(offers)
    }

    /// What decisions change.
    fn change(&self, entry: &Entry, decisions: &[Decision], now_ms: u64) -> Result<Change, Fault> {
        let mut next = entry.rollout.clone();
        let mut touched: BTreeSet<&String> = BTreeSet::new();
        let (mut offered, mut back, mut seen) = (Vec::new(), Vec::new(), Vec::new());
        let mut events = Vec::new();
        let mut champion = None;
        for decision in decisions {
            next.decide(decision, now_ms);
            match decision {
                Decision::Join { devices } => {
                    touched.extend(devices);
                    events.extend(Event::each(devices, |devices| Event::Joined { devices }));
                }
                Decision::Seen { device } => {
                    touched.insert(device);
                    seen.push(device.clone());
                }
                Decision::Open { wave, reason } => events.push(Event::Opened {
                    wave: *wave,
                    reason: reason.clone(),
                }),
                Decision::Offer { device, .. } => {
                    touched.insert(device);
                    offered.push(device.clone());
                }
                Decision::Return { device } => {
                    touched.insert(device);
                    back.push(device.clone());
                }
                Decision::End(End::Halted { reason }) => {
                    events.push(Event::Halted {
                        reason: reason.clone(),
                        returning: next.head.returning,
                    });
                    if next.head.returning {
                        champion = self.champion_again(entry)?;
                    }
                }
                Decision::End(_) => events.push(Event::Confirmed),
            }
        }
        let seen: Vec<log::Outcome> = seen
            .into_iter()
            .map(|device: String| {
                let member = next.members.get(&device);
                let state = member.map_or("", |member| member.progress.name());
                log::Outcome {
                    state: state.to_owned(),
                    device,
                    reason: None,
                }
            })
            .collect();
        events.extend(Event::each(&seen, |devices| Event::Reported { devices }));
        events.extend(Event::each(&offered, |devices| Event::Offered { devices }));
        events.extend(Event::each(&back, |devices| Event::OfferedBack { devices }));
        if let Some(model) = &champion {
            events.push(Event::Champion {
                model: model.clone(),
            });
        }
        let ended = next.head.end.is_some() && entry.is_running();
        Ok(Change {
            number: entry.number,
            new: None,
            ended_ms: ended.then_some(now_ms),
            members: touched
                .into_iter()
                .filter_map(|id| Some((id.clone(), next.members.remove(id)?)))
                .collect(),
            head: (next.head != entry.rollout.head).then_some(next.head),
            events: events
                .into_iter()
                .map(|event| (CONTROLLER.to_owned(), event))
                .collect(),
            champion,
        })
    }

    /// Writes changes with their lines of the log, then takes them over.
    fn commit(
        &self,
        state: &mut State,
        changes: Vec<Change>,
        now_ms: u64,
    ) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new();
        let mut chain = state.chain.clone();
        let mut entries = Vec::new();
        for mut change in changes {
            for (by, event) in std::mem::take(&mut change.events) {
                chain.append(&mut batch, &self.roots, (now_ms, change.number, &by), event)?;
            }
            for (device, member) in &change.members {
                record::put_member(&mut batch, change.number, device, member)?;
            }
            if let Some(entry) = &change.new {
                entry.record().put(&mut batch)?;
            }
            if let Some(head) = &change.head
                && let Some(entry) = state.entries.get(&change.number)
            {
                let ended_ms = change.ended_ms.or(entry.ended_ms);
                let record = record::Record {
                    head: head.clone(),
                    ended_ms,
                    ..entry.record()
                };
                record.put(&mut batch)?;
            }
            if let Some(model) = &change.champion {
                Registry::put_champion(&mut batch, model)?;
            }
            entries.push(change);
        }
        self.shelf.write(batch)?;
        state.chain = chain;
        for change in entries {
            if let Some(entry) = change.new {
                state.entries.insert(change.number, entry);
                continue;
            }
            if let Some(entry) = state.entries.get_mut(&change.number) {
                entry.rollout.members.extend(change.members);
                if let Some(head) = change.head {
                    entry.rollout.head = head;
                }
                entry.ended_ms = change.ended_ms.or(entry.ended_ms);
            }
        }
        self.changed.send_modify(|version| *version += 1);
        Ok(())
    }

    /// Something to wait on for the next change of any rollout.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Up to `limit` lines of the log from a number on.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn log(&self, from: u64, limit: usize) -> Result<Vec<Line>, Fault> {
        Ok(log::read(&self.store, from, limit)?)
    }

    /// How samples name the model before: by its own release, or by the one under which it came
    /// back.
    fn references(&self, entry: &Entry) -> Result<Vec<[u8; 8]>, Fault> {
        if entry.rollout.head.policy.gate.drift.is_none() {
            return Ok(Vec::new());
        }
        let Some(previous) = &entry.previous else {
            return Ok(Vec::new());
        };
        let digests = self.registry.manifests(previous)?;
        Ok(digests.iter().map(evidence::prefix).collect())
    }
}

fn find(entries: &BTreeMap<u64, Entry>, id: &str) -> Result<u64, Fault> {
    if id == "latest" {
        return entries.keys().last().copied().ok_or_else(|| {
            Fault::NotFound(
                "there is no rollout yet; start one with `flywheel rollout start`".to_owned(),
            )
        });
    }
    id.parse()
        .map_err(|_| Fault::Invalid(format!("`{id}` is not the number of a rollout")))
}

fn parse(device: &str) -> Result<DeviceId, Fault> {
    device
        .parse()
        .map_err(|error| Fault::Internal(format!("device id {device}: {error}")))
}
