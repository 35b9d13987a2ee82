//! The event loop of the simulation: devices, links and controller under one virtual clock.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Context, Result};
use cloud_core::rollout as core;
use device_core::slot::{Action, Event, Held};
use flywheel_shared::ids::{DeviceId, Digest};
use flywheel_shared::message::SlotState;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cloud::{Brittle, Cloud};
use super::device::{Device, Fate, HARDWARE, arrived};
use crate::api::types::{ActRequest, RolloutAction, RolloutRequest, RolloutView};
use crate::ingest::{OfferBytes, OwnedSlotReport};
use crate::service::rollouts::Rollouts;
use crate::service::rollouts::log::{Event as Logged, Verifier};

/// The controller is asked this often, in ms: as the server's timer does.
const TICK_MS: u64 = 500;
/// A device says how it is this often, in ms.
const HEALTH_MS: u64 = 60_000;
/// A report that was not heard is repeated after this, in ms.
const REPEAT_MS: u64 = 5_000;
/// A killed controller is back after this, in ms.
const RESTART_MS: u64 = 2_000;
/// The simulation begins so long after the models were signed, in ms.
const HEAD_START_MS: u64 = 60_000;
/// Ticks between two looks at whether everybody has settled.
const LOOK_TICKS: u64 = 4;
/// Virtual time after which a simulation has failed, in ms.
const PATIENCE_MS: u64 = 6 * 3600 * 1000;

/// What happens to a fleet.
#[derive(Clone)]
pub(super) struct Conditions {
    pub(super) devices: usize,
    pub(super) seed: u64,
    /// Rules, as an operator writes them.
    pub(super) policy_toml: String,
    /// Share of devices on which the new model fails, 0 to 1.
    pub(super) failing: f64,
    /// Share of messages that are lost, 0 to 1.
    pub(super) loss: f64,
    /// The controller is killed so many times, each time in the middle of a write.
    pub(super) kills: u32,
    /// So many devices are cut off for two minutes.
    pub(super) partitioned: usize,
    /// The power of so many devices fails once.
    pub(super) power_cuts: usize,
    /// So many devices are taken out by the operator.
    pub(super) excluded: usize,
    /// Cuts the controller's store at exactly this write, applied or not; for tests.
    pub(super) cut: Option<(u64, bool)>,
}

/// Something that happens at a time.
enum Happening {
    /// The controller's timer.
    Tick,
    /// The controller's next write is its last.
    Kill,
    /// The controller is up again.
    Restart,
    /// A report arrives in the cloud.
    Report(usize, OwnedSlotReport),
    /// A health message arrives in the cloud: sequence, boots, whether there is a candidate.
    Health(usize, u64, u32, bool),
    /// An offer arrives on a device.
    Offer(usize, Box<OfferBytes>),
    /// A device hears that its report is stored.
    Heard(usize, Digest, SlotState),
    /// A device has fetched a model; valid in this life of it.
    Fetched(usize, u32, Digest),
    /// A device has run golden inputs.
    Proved(usize, u32, Held),
    /// A device has run a model on enough frames.
    Tried(usize, u32, Held),
    /// A device looks whether it has something to repeat.
    Repeat(usize),
    /// A device says how it is.
    SayHealth(usize),
    /// A device is cut off, or back.
    Online(usize, bool),
    /// The power of a device fails.
    PowerCut(usize),
    /// The operator takes a device out.
    Exclude(usize),
}

/// What came out.
pub(super) struct Outcome {
    /// Where the rollout stands.
    pub(super) view: RolloutView,
    /// Virtual seconds until everybody had settled.
    pub(super) virtual_s: f64,
    /// Devices that were offered the new model.
    pub(super) exposed: BTreeSet<String>,
    /// Virtual seconds from the report that crossed the threshold to the halt.
    pub(super) halt_after_s: Option<f64>,
    /// Messages that were lost.
    pub(super) lost: u64,
    /// Times that the controller was killed.
    pub(super) kills: u32,
    /// Writes of the controller.
    pub(super) writes: u64,
    /// Lines of the log, all verified.
    pub(super) log_lines: u64,
    /// What the log says but for offers and reports, without times.
    pub(super) decisions: Vec<String>,
}

pub(super) struct World {
    conditions: Conditions,
    rng: ChaCha8Rng,
    started_ms: u64,
    now_ms: u64,
    agenda: BTreeMap<(u64, u64), Happening>,
    next: u64,
    cloud: Cloud,
    shelf: Arc<Brittle>,
    /// `None` while it is down.
    controller: Option<Rollouts>,
    devices: Vec<Device>,
    /// What the cloud knows of them, in the order of their ids.
    known: Vec<core::Device>,
    by_id: BTreeMap<String, usize>,
    /// Reports that wait for the next tick.
    inbox: Vec<(DeviceId, OwnedSlotReport)>,
    exposed: BTreeSet<String>,
    /// Devices that have answered about the new model, and those that failed.
    answered: BTreeSet<String>,
    failed: BTreeSet<String>,
    crossed_ms: Option<u64>,
    lost: u64,
    kills: u32,
    writes: u64,
    /// Sequence of the new model.
    sequence: u64,
    policy: core::Policy,
}

impl World {
    pub(super) fn new(dir: &Path, conditions: Conditions) -> Result<Self> {
        let cloud = Cloud::open(dir)?;
        let (left, applied) = conditions.cut.unwrap_or((u64::MAX, false));
        let shelf = Brittle::new(cloud.store.clone(), left, applied);
        let controller = cloud.controller(shelf.clone())?;
        let ids: Vec<DeviceId> = (0..conditions.devices)
            .map(|at| format!("cam{at:05}").parse().context("a device id"))
            .collect::<Result<_>>()?;
        let devices = ids
            .iter()
            .map(|id| Device::new(id.clone(), cloud.live, &cloud.trust))
            .collect();
        let known = ids
            .iter()
            .enumerate()
            .map(|(at, id)| core::Device {
                id: id.to_string(),
                group: ["north", "south", "east"][at % 3].to_owned(),
                hardware: HARDWARE.to_owned(),
                engine: "sim".to_owned(),
                sequence: cloud.live.sequence,
                online: true,
                restarts: 1,
                ..core::Device::default()
            })
            .collect();
        let started_ms = crate::service::now_ms() + HEAD_START_MS;
        let mut world = Self {
            rng: ChaCha8Rng::seed_from_u64(conditions.seed),
            policy: toml::from_str(&conditions.policy_toml)?,
            sequence: cloud.live.sequence + 1,
            by_id: ids
                .iter()
                .enumerate()
                .map(|(at, id)| (id.to_string(), at))
                .collect(),
            started_ms,
            now_ms: started_ms,
            agenda: BTreeMap::new(),
            next: 0,
            controller: Some(controller),
            shelf,
            devices,
            known,
            inbox: Vec::new(),
            exposed: BTreeSet::new(),
            answered: BTreeSet::new(),
            failed: BTreeSet::new(),
            crossed_ms: None,
            lost: 0,
            kills: 0,
            writes: 0,
            cloud,
            conditions,
        };
        world.lay_out();
        Ok(world)
    }

    /// Puts on the agenda what will happen whatever the controller does.
    fn lay_out(&mut self) {
        let n = self.conditions.devices;
        self.after(0, Happening::Tick);
        for at in 0..n {
            let phase = self.rng.random_range(0..HEALTH_MS);
            self.after(phase, Happening::SayHealth(at));
        }
        for _ in 0..self.conditions.kills {
            let when = self.rng.random_range(1_000..240_000);
            self.after(when, Happening::Kill);
        }
        // Those that are cut off are drawn, and back at once but for the jitter of their clocks.
        for at in self.draw(self.conditions.partitioned) {
            let back = 150_000 + self.rng.random_range(0..30_000);
            self.after(30_000, Happening::Online(at, false));
            self.after(back, Happening::Online(at, true));
        }
        for at in self.draw(self.conditions.power_cuts) {
            let when = self.rng.random_range(1_000..240_000);
            self.after(when, Happening::PowerCut(at));
        }
        for at in self.draw(self.conditions.excluded) {
            let when = self.rng.random_range(20_000..60_000);
            self.after(when, Happening::Exclude(at));
        }
    }

    fn draw(&mut self, count: usize) -> Vec<usize> {
        let mut drawn = BTreeSet::new();
        while drawn.len() < count.min(self.conditions.devices) {
            drawn.insert(self.rng.random_range(0..self.conditions.devices));
        }
        drawn.into_iter().collect()
    }

    fn after(&mut self, wait_ms: u64, happening: Happening) {
        self.next += 1;
        self.agenda
            .insert((self.now_ms + wait_ms, self.next), happening);
    }

    /// Sends something over a link, which may lose it.
    fn send(&mut self, device: usize, happening: Happening) {
        let wait = self.rng.random_range(20..400);
        let lost = self.rng.random_bool(self.conditions.loss);
        if lost || !self.devices[device].online {
            self.lost += 1;
        } else {
            self.after(wait, happening);
        }
    }

    /// Starts the rollout and runs until everybody has settled.
    pub(super) fn run(mut self) -> Result<Outcome> {
        let request = RolloutRequest {
            model: self.cloud.new.clone(),
            policy_toml: Some(self.conditions.policy_toml.clone()),
            by: Some("bench".to_owned()),
            ..RolloutRequest::default()
        };
        // An operator whose command was cut off looks whether it was done, and repeats it if not.
        loop {
            self.ensure_up()?;
            let Some(controller) = &self.controller else {
                continue;
            };
            if controller
                .view("latest", &self.known, self.now_ms, false)
                .is_ok()
            {
                break;
            }
            match controller.start(&request, &self.known, self.now_ms) {
                Ok(_) => break,
                Err(_) if self.conditions.cut.is_some() => self.kill(),
                Err(error) => return Err(error.into()),
            }
        }
        let mut settled_ms = None;
        while let Some(((at_ms, _), happening)) = self.agenda.pop_first() {
            anyhow::ensure!(
                at_ms < self.started_ms + PATIENCE_MS,
                "the rollout does not end within {} virtual hours",
                PATIENCE_MS / 3_600_000
            );
            self.now_ms = at_ms;
            let look = matches!(happening, Happening::Tick)
                && (at_ms - self.started_ms).is_multiple_of(LOOK_TICKS * TICK_MS);
            self.happen(happening)?;
            if look && self.is_settled() {
                settled_ms = Some(at_ms);
                break;
            }
        }
        let settled_ms = settled_ms.context("the simulation ran out of events")?;
        self.ensure_up()?;
        let (log_lines, decisions) = self.check_log()?;
        let controller = self.controller.as_ref().context("the controller is down")?;
        let view = controller.view("latest", &self.known, self.now_ms, true)?;
        self.check_truth(&view)?;
        let ended_ms = view.ended_ms.context("the rollout has not ended")?;
        let since = |ms: u64| (ms - self.started_ms) as f64 / 1000.0;
        Ok(Outcome {
            halt_after_s: self
                .crossed_ms
                .filter(|_| view.state == "halted")
                .map(|crossed| ended_ms.saturating_sub(crossed) as f64 / 1000.0),
            view,
            virtual_s: since(settled_ms),
            exposed: self.exposed,
            lost: self.lost,
            kills: self.kills,
            writes: self.writes + self.shelf.writes.load(SeqCst),
            log_lines,
            decisions,
        })
    }

    fn is_settled(&self) -> bool {
        let Some(controller) = &self.controller else {
            return false;
        };
        let view = controller.view("latest", &self.known, self.now_ms, false);
        view.is_ok_and(|view| {
            let under_way = ["offered", "staged", "trial"];
            let open = view.waves.iter().flat_map(|wave| &wave.states);
            let open = open.filter(|(state, _)| under_way.contains(&state.as_str()));
            view.ended_ms.is_some() && view.returning == 0 && open.count() == 0
        })
    }

    fn kill(&mut self) {
        if self.controller.take().is_some() {
            self.kills += 1;
            self.inbox.clear();
            self.writes += self.shelf.writes.load(SeqCst);
            self.after(RESTART_MS, Happening::Restart);
        }
    }

    fn ensure_up(&mut self) -> Result<()> {
        if self.controller.is_none() {
            self.shelf = Brittle::new(
                self.cloud.store.clone(),
                u64::MAX,
                self.kills.is_multiple_of(2),
            );
            self.controller = Some(self.cloud.controller(self.shelf.clone())?);
        }
        Ok(())
    }

    fn happen(&mut self, happening: Happening) -> Result<()> {
        match happening {
            Happening::Tick => {
                self.tick();
                self.after(TICK_MS, Happening::Tick);
            }
            Happening::Kill => self.shelf.cut(),
            Happening::Restart => self.ensure_up()?,
            Happening::Report(at, report) => self.take_report(at, report),
            Happening::Health(at, sequence, boots, busy) => {
                self.take_health(at, sequence, boots, busy);
            }
            Happening::Offer(at, offer) => {
                if self.devices[at].online {
                    let now_ms = self.now_ms;
                    let actions = self.devices[at].offer(&self.cloud.trust, &offer, now_ms);
                    self.perform(at, &actions);
                }
            }
            Happening::Heard(at, digest, state) => {
                if self.devices[at].online {
                    let actions = self.devices[at].step(Event::ReportSeen { digest, state });
                    self.perform(at, &actions);
                }
            }
            Happening::Fetched(at, life, digest) => {
                if self.devices[at].boots == life {
                    let actions = self.devices[at].step(Event::Fetched { digest });
                    self.perform(at, &actions);
                }
            }
            Happening::Proved(at, life, model) => {
                if self.devices[at].boots == life {
                    let fate = self.fate(at, model.sequence);
                    let actions = self.devices[at].prove(model.digest, fate);
                    self.perform(at, &actions);
                }
            }
            Happening::Tried(at, life, model) => self.tried(at, life, model),
            Happening::Repeat(at) => self.tell(at),
            Happening::SayHealth(at) => {
                self.say_health(at);
                self.after(HEALTH_MS, Happening::SayHealth(at));
            }
            Happening::Online(at, online) => {
                self.devices[at].online = online;
                if online {
                    self.say_health(at);
                    self.tell(at);
                } else {
                    self.known[at].online = false;
                }
            }
            Happening::PowerCut(at) => {
                let actions = self.devices[at].reboot();
                self.perform(at, &actions);
                self.say_health(at);
            }
            Happening::Exclude(at) => self.exclude(at),
        }
        Ok(())
    }

    /// What the new model does on a device; the old one always works.
    fn fate(&self, at: usize, sequence: u64) -> Fate {
        let lot = |salt: &[u8]| {
            let seed = self.conditions.seed.to_le_bytes();
            let Digest(lot) = Digest::of_parts(&[salt, &seed, &(at as u64).to_le_bytes()]);
            u16::from_le_bytes([lot[0], lot[1]])
        };
        if sequence != self.sequence
            || f64::from(lot(b"fails")) >= self.conditions.failing * 65_536.0
        {
            return Fate::Works;
        }
        [Fate::Slow, Fate::Golden, Fate::Crash][usize::from(lot(b"how") % 3)]
    }

    fn tried(&mut self, at: usize, life: u32, model: Held) {
        if self.devices[at].boots != life || self.devices[at].candidate() != Some(model) {
            return;
        }
        let actions = match self.fate(at, model.sequence) {
            Fate::Crash => self.devices[at].reboot(),
            fate => self.devices[at].trial(model, fate),
        };
        self.perform(at, &actions);
    }

    /// Does what the slot of a device wants.
    fn perform(&mut self, at: usize, actions: &[Action]) {
        let life = self.devices[at].boots;
        for action in actions {
            match action {
                Action::Fetch(model) => {
                    let wait = self.rng.random_range(500..6_000);
                    self.after(wait, Happening::Fetched(at, life, model.digest));
                }
                Action::RunGolden(model) => {
                    let wait = self.rng.random_range(200..900);
                    self.after(wait, Happening::Proved(at, life, *model));
                }
                Action::BeginShadow(model) => {
                    let wait = self.rng.random_range(2_000..8_000);
                    self.after(wait, Happening::Tried(at, life, *model));
                }
                Action::Swap(_) => self.say_health(at),
                Action::Report(_) => self.tell(at),
                Action::Persist(_) | Action::Discard => {}
            }
        }
    }

    /// Sends what a device has to tell, until it is heard.
    fn tell(&mut self, at: usize) {
        let Some(report) = self.devices[at].report() else {
            return;
        };
        if self.devices[at].online {
            self.send(at, Happening::Report(at, arrived(&report)));
            // One of several in flight that is heard makes the others fall silent.
            self.after(REPEAT_MS, Happening::Repeat(at));
        }
    }

    fn say_health(&mut self, at: usize) {
        let device = &self.devices[at];
        let (sequence, boots) = (device.live().sequence, device.boots);
        let busy = device.candidate().is_some();
        self.send(at, Happening::Health(at, sequence, boots, busy));
    }

    fn take_report(&mut self, at: usize, report: OwnedSlotReport) {
        if self.controller.is_none() {
            self.lost += 1;
            return;
        }
        self.known[at].online = true;
        let id = self.devices[at].id.clone();
        if report.sequence == self.sequence {
            let answer = match report.state {
                SlotState::Confirmed => Some(false),
                SlotState::Reverted | SlotState::Refused => Some(true),
                _ => None,
            };
            if let Some(failed) = answer {
                self.answered.insert(id.to_string());
                if failed {
                    self.failed.insert(id.to_string());
                }
                self.watch_threshold();
            }
        }
        self.inbox.push((id, report));
    }

    /// Notes when the reports that have arrived cross the share that halts.
    fn watch_threshold(&mut self) {
        let gate = &self.policy.gate;
        let share = self.failed.len() as f64 / self.answered.len() as f64;
        let enough = self.answered.len() >= gate.min_answers as usize;
        if self.crossed_ms.is_none()
            && enough
            && gate.max_failed_share.is_some_and(|most| share > most)
        {
            self.crossed_ms = Some(self.now_ms);
        }
    }

    fn take_health(&mut self, at: usize, sequence: u64, boots: u32, busy: bool) {
        let Some(controller) = &self.controller else {
            self.lost += 1;
            return;
        };
        let known = &mut self.known[at];
        known.online = true;
        known.sequence = sequence;
        known.restarts = boots;
        if let Ok(Some(offer)) = controller.standing_offer(known, busy, self.now_ms) {
            self.send_offer(at, offer);
        }
    }

    fn send_offer(&mut self, at: usize, offer: OfferBytes) {
        self.send(at, Happening::Offer(at, Box::new(offer)));
    }

    /// What the server does at its timer: notes what came and carries the rollout on.
    fn tick(&mut self) {
        let Some(controller) = &self.controller else {
            return;
        };
        let inbox = std::mem::take(&mut self.inbox);
        if controller.record_all(&inbox, self.now_ms).is_err() {
            self.kill();
            return;
        }
        let offers = controller.advance(&self.known, self.now_ms);
        for (id, report) in inbox {
            if let Some(at) = self.by_id.get(id.as_str()).copied() {
                self.send(at, Happening::Heard(at, report.manifest, report.state));
            }
        }
        match offers {
            Ok(offers) => {
                for (id, offer) in offers {
                    if let Some(at) = self.by_id.get(id.as_str()).copied() {
                        if is_of(&offer, self.sequence) {
                            self.exposed.insert(id.to_string());
                        }
                        self.send_offer(at, offer);
                    }
                }
            }
            Err(_) => self.kill(),
        }
    }

    fn exclude(&mut self, at: usize) {
        let request = ActRequest {
            reason: "drawn by the bench".to_owned(),
            device: Some(self.devices[at].id.to_string()),
            ..ActRequest::default()
        };
        let now_ms = self.now_ms;
        let done = self.controller.as_ref().is_some_and(|controller| {
            controller
                .act(
                    "latest",
                    RolloutAction::Exclude,
                    &request,
                    &self.known,
                    now_ms,
                )
                .is_ok()
        });
        if !done {
            // The operator repeats a command that was not answered.
            if self.controller.is_some() {
                self.kill();
            }
            self.after(RESTART_MS + 500, Happening::Exclude(at));
        }
    }

    /// Every line is signed and in its place; returns how many, and what they say but for times.
    fn check_log(&self) -> Result<(u64, Vec<String>)> {
        let controller = self.controller.as_ref().context("the controller is down")?;
        let mut verifier = Verifier::new(vec![self.cloud.log_key()]);
        let mut decisions = Vec::new();
        for line in controller.log(0, usize::MAX >> 1)? {
            let entry = verifier.line(&line)?;
            match &entry.event {
                Logged::Offered { .. } | Logged::Reported { .. } | Logged::OfferedBack { .. } => {}
                event => decisions.push(event.words()),
            }
        }
        Ok((verifier.seen().0, decisions))
    }

    /// What the cloud says of each device is what is on the device.
    fn check_truth(&self, view: &RolloutView) -> Result<()> {
        let back = view.back.context("there is no way back")?;
        for device in &self.devices {
            let state = view.devices.get(device.id.as_str());
            let state = state
                .context("a device is not in the rollout")?
                .state
                .as_str();
            let sequence = device.live().sequence;
            let right = match state {
                "confirmed" => sequence == self.sequence,
                "reverted" | "failed" | "pending" => sequence == self.cloud.live.sequence,
                "returned" => sequence == back,
                "excluded" => true,
                _ => false,
            };
            anyhow::ensure!(
                right,
                "{} is {state} in the cloud and runs release {sequence}",
                device.id
            );
        }
        Ok(())
    }

    /// Every device is offered the model at once; then all of them come back at once. Returns how
    /// many offers were made and the seconds of real time that it took, each time.
    pub(super) fn rush(mut self, spread_ms: u64) -> Result<Rush> {
        let request = RolloutRequest {
            model: self.cloud.new.clone(),
            policy_toml: Some(self.conditions.policy_toml.clone()),
            ..RolloutRequest::default()
        };
        let controller = self.controller.take().context("the controller is down")?;
        controller.start(&request, &self.known, self.now_ms)?;
        let started = std::time::Instant::now();
        let offers = controller.advance(&self.known, self.now_ms)?.len();
        let dispatch_s = started.elapsed().as_secs_f64();
        // Nobody has heard; the server starts again, and everybody connects within the spread.
        drop(controller);
        self.shelf = Brittle::new(self.cloud.store.clone(), u64::MAX, false);
        let started = std::time::Instant::now();
        let controller = self.cloud.controller(self.shelf.clone())?;
        let restart_s = started.elapsed().as_secs_f64();
        let mut per_second: BTreeMap<u64, u64> = BTreeMap::new();
        let mut arrivals: Vec<(u64, usize)> = (0..self.devices.len())
            .map(|at| (self.rng.random_range(0..spread_ms.max(1)), at))
            .collect();
        arrivals.sort_unstable();
        let started = std::time::Instant::now();
        let mut answered = 0;
        for (ms, at) in arrivals {
            *per_second.entry(ms / 1000).or_default() += 1;
            let offer = controller.standing_offer(&self.known[at], false, self.now_ms + ms)?;
            answered += usize::from(offer.is_some());
        }
        Ok(Rush {
            offers,
            dispatch_s,
            restart_s,
            answered,
            answer_s: started.elapsed().as_secs_f64(),
            peak: per_second.values().copied().max().unwrap_or(0),
        })
    }
}

/// How fast offers are made.
pub(super) struct Rush {
    /// Offers of one pass.
    pub(super) offers: usize,
    /// Real seconds of the pass: planning, signing, storing.
    pub(super) dispatch_s: f64,
    /// Real seconds until a killed controller is up again.
    pub(super) restart_s: f64,
    /// Devices that were answered with their offer after they came back.
    pub(super) answered: usize,
    /// Real seconds for all of them.
    pub(super) answer_s: f64,
    /// Most that came in one virtual second.
    pub(super) peak: u64,
}

/// Whether an offer is of the release with this number.
fn is_of(offer: &OfferBytes, sequence: u64) -> bool {
    use flywheel_shared::trust::Offer;
    postcard::from_bytes::<Offer>(&offer.offer).is_ok_and(|offer| offer.sequence == sequence)
}
