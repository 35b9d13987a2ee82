//! Whether an offered model becomes the live one: fetch, prove on golden inputs, prove on live
//! frames beside the live model, then swap, or give up with a reason.
//!
//! The slot holds one small [`SlotRecord`] that the shell keeps on storage. It is written
//! ([`Action::Persist`]) before anything that relies on it is done, so that power may fail between
//! any two actions: after [`Event::Boot`] the slot goes on from the record, and the worst that can
//! be lost is a trial's progress. The live model changes in one write, at the end of a trial that
//! passed in one piece; a candidate during which the device restarted more than [`MAX_RESTARTS`]
//! times without being asked to is given up.
//!
//! Verifying signatures is the shell's part ([`flywheel_shared::trust::Judge`]), except that an
//! offer of the live model must reach the slot *before* it is judged, since the judge calls what
//! is not newer a rollback and the cloud wants to hear `Confirmed`.

use flywheel_shared::ids::Digest;
use flywheel_shared::message::SlotState;
use flywheel_shared::trust::{KeyId, TrialBounds, TrustError};
use heapless::Vec;

use crate::quantile::P2;

mod record;

pub use record::{Candidate, Held, RECORD_MAX, Reason, RecordError, Report, SlotError, SlotRecord};

/// Unasked restarts that a candidate may live through once its code may have run.
pub const MAX_RESTARTS: u8 = 2;
/// Most actions of one step.
pub const MAX_ACTIONS: usize = 4;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// The device started and the record was read; first event of all.
    Boot,
    /// The device is about to stop in good order: this restart is not held against a candidate.
    Stop,
    /// A verified offer, or any offer of the live model.
    Offer {
        /// Which model.
        model: Held,
        /// What it must hold to.
        bounds: TrialBounds,
        /// Release key that signed it; of no account if it is the live model.
        key: KeyId,
    },
    /// Only this release key is believed: after a newer trust root, and after every start.
    Trusted {
        /// The key.
        key: KeyId,
    },
    /// An offer that was not believed.
    Refused {
        /// Which model it was about.
        model: Held,
        /// [`TrustError`] number.
        code: u16,
    },
    /// All parts are on storage and have the signed digests.
    Fetched {
        /// The manifest.
        digest: Digest,
    },
    /// A part can't be had as signed: a wrong digest or no room, not a lost connection.
    FetchFailed {
        /// The manifest.
        digest: Digest,
        /// [`TrustError`] or [`SlotError`] number.
        code: u16,
    },
    /// Every golden input gave the signed answer.
    GoldenPassed {
        /// The manifest.
        digest: Digest,
    },
    /// One did not, or the model does not load.
    GoldenFailed {
        /// The manifest.
        digest: Digest,
        /// [`SlotError::Golden`] or [`SlotError::Load`].
        error: SlotError,
    },
    /// The candidate has answered a live frame.
    Frame {
        /// Its inference time in microseconds.
        latency_us: u32,
        /// Its confidence, 0 to 1; what is no number counts as 0.
        confidence: f32,
        /// The live model's on the same frame, if there is one.
        live_confidence: Option<f32>,
    },
    /// The candidate failed on a live frame.
    EngineFailed,
    /// The cloud has stored a report.
    ReportSeen {
        /// The manifest.
        digest: Digest,
        /// The state that is stored.
        state: SlotState,
    },
}

/// What the shell is to do, in order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    /// Write the record durably before anything else is done.
    Persist(SlotRecord),
    /// Fetch the missing parts of this model instead of any other's; answer `Fetched` or
    /// `FetchFailed`.
    Fetch(Held),
    /// Load this model and run its golden inputs; answer `GoldenPassed` or `GoldenFailed`.
    RunGolden(Held),
    /// Run this model beside the live one on every frame; report each as `Frame`.
    BeginShadow(Held),
    /// Make this model, which runs in shadow, the live one between two frames.
    Swap(Held),
    /// Stop running a candidate, and delete every package that the record names neither as live
    /// nor as candidate.
    Discard,
    /// There is something new to tell: [`Slot::report`], until it says `None`.
    Report(Report),
}

/// Actions in the order in which to perform them.
pub type Actions = Vec<Action, MAX_ACTIONS>;

/// A trial's measurements.
#[derive(Clone, Copy, Debug)]
struct Trial {
    frames: u32,
    latency: P2,
    max_latency_us: u32,
    confidence: f64,
    live_confidence: f64,
    live_frames: u32,
}

impl Trial {
    fn new() -> Self {
        Self {
            frames: 0,
            latency: P2::new(0.5),
            max_latency_us: 0,
            confidence: 0.0,
            live_confidence: 0.0,
            live_frames: 0,
        }
    }

    fn observe(&mut self, latency_us: u32, confidence: f32, live_confidence: Option<f32>) {
        let part = |x: f32| if x.is_finite() { f64::from(x) } else { 0.0 };
        self.frames = self.frames.saturating_add(1);
        self.latency.observe(latency_us as f32);
        self.max_latency_us = self.max_latency_us.max(latency_us);
        self.confidence += part(confidence);
        if let Some(live) = live_confidence {
            self.live_confidence += part(live);
            self.live_frames += 1;
        }
    }

    /// The bound that was missed, if any, once enough frames were seen.
    ///
    /// A mean confidence under the bound is forgiven if the live model's is no higher on the same
    /// frames: then the scene is hard, not the model bad.
    fn verdict(&self, bounds: &TrialBounds) -> Result<(), SlotError> {
        let median = self.latency.value().unwrap_or(0.0);
        if bounds.max_latency_us > 0 && median > bounds.max_latency_us as f32 {
            return Err(SlotError::Latency);
        }
        let mean = |sum: f64, n: u32| if n > 0 { sum / f64::from(n) } else { 1.0 };
        let ours = mean(self.confidence, self.frames);
        let live = mean(self.live_confidence, self.live_frames);
        if ours < f64::from(bounds.min_confidence) && ours < live {
            return Err(SlotError::Confidence);
        }
        Ok(())
    }
}

/// The state machine of one device's models.
#[derive(Clone, Debug)]
pub struct Slot {
    record: SlotRecord,
    trial: Trial,
    /// An answer to an offer that need not survive, since the cloud repeats its offers: refused,
    /// or live already.
    reply: Option<Report>,
    /// The candidate's state that the cloud has heard of.
    told: Option<(Digest, SlotState)>,
}

impl Slot {
    /// The slot of a record as it was stored, or of the default one on a new device. Give it
    /// [`Event::Boot`] next.
    pub fn new(record: SlotRecord) -> Self {
        Self {
            record,
            trial: Trial::new(),
            reply: None,
            told: None,
        }
    }

    /// The record, as last persisted.
    pub fn record(&self) -> &SlotRecord {
        &self.record
    }

    /// Whether a candidate is to run on live frames.
    pub fn on_trial(&self) -> bool {
        self.candidate_in(SlotState::Trial).is_some()
    }

    /// What the cloud has not confirmed to know, most important first: to be sent on every new
    /// connection and at intervals until this says `None`.
    pub fn report(&self) -> Option<Report> {
        self.record.outcome.or(self.reply).or_else(|| {
            let candidate = self.record.candidate?;
            let known = self.told == Some((candidate.model.digest, candidate.state));
            (!known).then(|| self.progress(&candidate))
        })
    }

    /// Takes an event. Events that do not fit the state, such as an answer about a model that was
    /// given up meanwhile, do nothing.
    pub fn step(&mut self, event: Event) -> Actions {
        let mut out = Actions::new();
        match event {
            Event::Boot => self.boot(&mut out),
            Event::Stop => self.stop(&mut out),
            Event::Offer { model, bounds, key } => self.offer(model, bounds, key, &mut out),
            Event::Trusted { key } => {
                if let Some(candidate) = self.record.candidate.filter(|c| c.key != key) {
                    self.give_up(candidate, TrustError::Revoked.code(), &mut out);
                }
            }
            Event::Refused { model, code } => {
                self.answer(model, SlotState::Refused, code, &mut out);
            }
            Event::Fetched { digest } => {
                if let Some(candidate) = self.named(SlotState::Fetching, digest) {
                    self.advance(candidate, SlotState::Staged, &mut out);
                    push(&mut out, Action::RunGolden(candidate.model));
                }
            }
            Event::FetchFailed { digest, code } => {
                if let Some(candidate) = self.named(SlotState::Fetching, digest) {
                    self.give_up(candidate, code, &mut out);
                }
            }
            Event::GoldenPassed { digest } => {
                if let Some(candidate) = self.named(SlotState::Staged, digest) {
                    self.trial = Trial::new();
                    self.advance(candidate, SlotState::Trial, &mut out);
                    push(&mut out, Action::BeginShadow(candidate.model));
                }
            }
            Event::GoldenFailed { digest, error } => {
                if let Some(candidate) = self.named(SlotState::Staged, digest) {
                    self.give_up(candidate, error.code(), &mut out);
                }
            }
            Event::Frame {
                latency_us,
                confidence,
                live_confidence,
            } => {
                if let Some(candidate) = self.candidate_in(SlotState::Trial) {
                    self.trial.observe(latency_us, confidence, live_confidence);
                    self.judge(candidate, &mut out);
                }
            }
            Event::EngineFailed => {
                if let Some(candidate) = self.candidate_in(SlotState::Trial) {
                    self.give_up(candidate, SlotError::Engine.code(), &mut out);
                }
            }
            Event::ReportSeen { digest, state } => self.seen(digest, state, &mut out),
        }
        out
    }

    fn boot(&mut self, out: &mut Actions) {
        self.trial = Trial::new();
        let Some(mut candidate) = self.record.candidate else {
            push(out, Action::Discard);
            return;
        };
        if candidate.state == SlotState::Fetching {
            push(out, Action::Discard);
            push(out, Action::Fetch(candidate.model));
            return;
        }
        candidate.starts = candidate.starts.saturating_add(1);
        if candidate.starts > MAX_RESTARTS + 1 {
            self.give_up(candidate, SlotError::CrashLoop.code(), out);
            return;
        }
        // Storage may have suffered with the power, so golden inputs are run again.
        candidate.state = SlotState::Staged;
        self.record.candidate = Some(candidate);
        push(out, Action::Persist(self.record));
        push(out, Action::Discard);
        push(out, Action::RunGolden(candidate.model));
    }

    fn stop(&mut self, out: &mut Actions) {
        let Some(candidate) = &mut self.record.candidate else {
            return;
        };
        if candidate.starts > 0 {
            candidate.starts -= 1;
            push(out, Action::Persist(self.record));
        }
    }

    fn offer(&mut self, model: Held, bounds: TrialBounds, key: KeyId, out: &mut Actions) {
        if self.record.live.map(|live| live.digest) == Some(model.digest) {
            if self.record.outcome.map(|told| told.model.digest) == Some(model.digest) {
                self.tell(out);
            } else {
                self.answer(model, SlotState::Confirmed, 0, out);
            }
            return;
        }
        if model.sequence <= self.record.floor.under(key, 0) {
            let code = TrustError::Rollback.code();
            self.answer(model, SlotState::Refused, code, out);
            return;
        }
        if let Some(current) = self.record.candidate {
            if current.model.digest == model.digest {
                self.told = None;
                self.tell(out);
                return;
            }
            let newer = model.sequence > current.model.sequence;
            if current.state != SlotState::Fetching || !newer || self.record.outcome.is_some() {
                return;
            }
            self.conclude(
                current.model,
                SlotState::Reverted,
                SlotError::Superseded.code(),
            );
        } else if self.record.outcome.is_some() {
            // An offer made before the cloud knew how the last one ended; it repeats what it wants.
            self.tell(out);
            return;
        }
        self.record.candidate = Some(Candidate {
            model,
            state: SlotState::Fetching,
            bounds,
            key,
            starts: 0,
        });
        push(out, Action::Persist(self.record));
        self.tell(out);
        push(out, Action::Discard);
        push(out, Action::Fetch(model));
    }

    fn answer(&mut self, model: Held, state: SlotState, code: u16, out: &mut Actions) {
        let report = Report {
            model,
            state,
            code,
            trial_frames: 0,
            max_latency_us: 0,
        };
        self.reply = Some(report);
        push(out, Action::Report(report));
    }

    /// Ends the trial if it has seen enough.
    fn judge(&mut self, candidate: Candidate, out: &mut Actions) {
        if self.trial.frames < candidate.bounds.frames.max(1) {
            return;
        }
        if let Err(error) = self.trial.verdict(&candidate.bounds) {
            self.give_up(candidate, error.code(), out);
            return;
        }
        self.record.live = Some(candidate.model);
        let sequence = candidate.model.sequence;
        self.record.floor.raise(candidate.key, sequence);
        self.record.candidate = None;
        self.conclude(candidate.model, SlotState::Confirmed, 0);
        push(out, Action::Persist(self.record));
        push(out, Action::Swap(candidate.model));
        push(out, Action::Discard);
        self.tell(out);
    }

    fn give_up(&mut self, candidate: Candidate, code: u16, out: &mut Actions) {
        self.record.candidate = None;
        self.conclude(candidate.model, SlotState::Reverted, code);
        push(out, Action::Persist(self.record));
        push(out, Action::Discard);
        self.tell(out);
    }

    fn advance(&mut self, mut candidate: Candidate, state: SlotState, out: &mut Actions) {
        candidate.state = state;
        candidate.starts = candidate.starts.max(1);
        self.record.candidate = Some(candidate);
        push(out, Action::Persist(self.record));
        self.tell(out);
    }

    fn seen(&mut self, digest: Digest, state: SlotState, out: &mut Actions) {
        let is = |report: &Report| report.model.digest == digest && report.state == state;
        let outcome = self.record.outcome.as_ref().is_some_and(is);
        if outcome {
            self.record.outcome = None;
            push(out, Action::Persist(self.record));
        }
        let reply = self.reply.as_ref().is_some_and(is);
        if reply {
            self.reply = None;
        }
        let current = self.record.candidate;
        if current.is_some_and(|c| c.model.digest == digest && c.state == state) {
            self.told = Some((digest, state));
        }
        // What stood behind it comes forward.
        if outcome || reply {
            self.tell(out);
        }
    }

    /// Notes how a model ended, with the measurements of its trial.
    fn conclude(&mut self, model: Held, state: SlotState, code: u16) {
        self.record.outcome = Some(Report {
            model,
            state,
            code,
            trial_frames: self.trial.frames,
            max_latency_us: self.trial.max_latency_us,
        });
        self.trial = Trial::new();
    }

    fn progress(&self, candidate: &Candidate) -> Report {
        Report {
            model: candidate.model,
            state: candidate.state,
            code: 0,
            trial_frames: self.trial.frames,
            max_latency_us: self.trial.max_latency_us,
        }
    }

    fn tell(&self, out: &mut Actions) {
        if let Some(report) = self.report() {
            push(out, Action::Report(report));
        }
    }

    fn candidate_in(&self, state: SlotState) -> Option<Candidate> {
        self.record.candidate.filter(|c| c.state == state)
    }

    fn named(&self, state: SlotState, digest: Digest) -> Option<Candidate> {
        self.candidate_in(state)
            .filter(|c| c.model.digest == digest)
    }
}

/// No step makes more than [`MAX_ACTIONS`]; the longest are an offer and a confirmation.
fn push(out: &mut Actions, action: Action) {
    let fits = out.push(action).is_ok();
    debug_assert!(fits, "a step made too many actions");
}

#[cfg(test)]
mod tests;
