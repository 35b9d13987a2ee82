//! The frame loop: read, preprocess, infer, score, trigger, spool; on a thread of its own.
//!
//! At a pace with a rate frames come from the capture thread's shelf ([`crate::capture`]); else
//! they are read here, one after the other.
//!
//! In lockstep everything decided here is a function of the sequence of frames and of the frame at
//! which a candidate arrives, so the same seed flags the same frames. Random numbers are drawn by
//! frame index, so that a restart draws the same ones.

use std::sync::Arc;
use std::time::Duration;

use device_core::backlog::Taken;
use device_core::flicker::Flicker;
use device_core::governor::Governor;
use device_core::pace::{Next, Pace, Pacer};
use device_core::params::MAX_SIDE;
use device_core::shadow;
use device_core::slot::{Action, Event, Held};
use device_core::trigger::{Observation, Trigger, TriggerConfig, TriggerError};
use device_engine::Frame;
use flywheel_shared::message::{Lane, Record, Sample, Scores};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use thiserror::Error;

use crate::capture::{ASK_AGAIN_MS, MAX_FAILURES, Shelf, Stock};
use crate::clock::{Clock, SystemClock};
use crate::config::Config;
use crate::meter::{Meter, Stage};
use crate::models::{Runner, RunnerError};
use crate::shared::{Shared, Signals, Status, lock};
use crate::source::{FrameBuf, Read, Source, SourceError};
use crate::state::{Progress, StateError};
use crate::wire;

/// Frames between two saves of the position in the source.
const SAVE_EVERY: u64 = 64;
/// The same for frames from a shelf, since every save wears the flash. A camera's are not read again
/// anyway; of a replayed source, up to that many are after a kill.
const SAVE_EVERY_LIVE: u64 = 512;
/// Longest wait for a frame of the capture thread before the watchdog is thought of.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Bytes of batch header, signature and envelope that fall to one sample.
pub const BATCH_SHARE: usize = 10;
/// As many zeros as the longest embedding has values.
static BLANK: [u8; MAX_SIDE as usize] = [0; MAX_SIDE as usize];
/// How many errors of one kind are logged in full before only every thousandth is.
const LOUD: u64 = 10;

/// Why the frame loop ended.
#[derive(Debug, Error)]
pub enum PipelineError {
    /// The budget in the configuration makes no sense.
    #[error("configuration: {0}")]
    Budget(TriggerError),
    /// The source keeps failing.
    #[error("the source failed {MAX_FAILURES} times in a row, last with: {0}")]
    Source(SourceError),
}

/// Where frames come from.
pub enum Feed {
    /// Read in the frame loop itself, one index after the other.
    Direct(Box<dyn Source>),
    /// Captured by another thread.
    Shelf(Arc<Shelf>),
}

/// The frame loop and all it owns.
pub struct Pipeline {
    feed: Feed,
    uri: String,
    shared: Arc<Shared>,
    clock: Arc<dyn Clock>,
    pacer: Pacer,
    governor: Governor,
    trigger: Trigger,
    flicker: Flicker,
    live: Option<Runner>,
    candidate: Option<Runner>,
    /// Runs beside the live model while no candidate does.
    shadow: Option<Runner>,
    shadow_share: f32,
    frame: FrameBuf,
    progress: Progress,
    /// Progress when the loop was made, which the shelf's counts add to.
    base: Progress,
    saved: Progress,
    saved_mark: String,
    seed: u64,
    /// A source that has nothing yet is not asked before.
    ask_at_us: u64,
    ended: bool,
    failures: u32,
    errors: u64,
    warned: u64,
    meter: Meter,
    /// What the live model said of the last frame.
    scores: Option<Scores>,
}

/// What the frame loop does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A frame may be taken.
    Frame,
    /// Nothing before this time, in the clock's microseconds, unless signalled.
    WaitUntil(u64),
    /// Nothing before the capture thread has a frame, or a signal.
    Await {
        /// Whether none is due yet, or the source has said that it has none now.
        quiet: bool,
    },
    /// Nothing until a signal.
    Hold,
    /// The end.
    Stop,
}

impl Pipeline {
    /// Makes the loop; `pace` may differ from the configuration's. With [`Feed::Shelf`] it is
    /// that of the capture thread.
    pub fn new(
        config: &Config,
        pace: Pace,
        feed: Feed,
        live: Option<Runner>,
        shared: Arc<Shared>,
    ) -> Result<Self, PipelineError> {
        let shares = &config.budget.shares;
        let trigger = Trigger::new(TriggerConfig {
            budget_ratio: config.budget.ratio,
            burst_bytes: config.budget.burst_kib.saturating_mul(1024),
            shares: [
                shares.novel,
                shares.unsure,
                shares.disagree,
                shares.campaign,
                shares.uniform,
            ],
            ..TriggerConfig::default()
        })
        .map_err(PipelineError::Budget)?;
        let progress = shared.status().progress;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let mut frame = FrameBuf::new();
        let mark = shared.state.mark(&config.source).unwrap_or_default();
        frame.mark.clone_from(&mark);
        Ok(Self {
            feed,
            uri: config.source.clone(),
            shared,
            pacer: Pacer::new(pace),
            governor: Governor::new(config.limits, clock.now_us(), clock.cpu_us()),
            clock: Arc::clone(&clock),
            trigger,
            flicker: Flicker::default(),
            live,
            candidate: None,
            shadow: None,
            shadow_share: config.shadow_share,
            frame,
            progress,
            base: progress,
            saved: progress,
            saved_mark: mark,
            seed: config.seed,
            ask_at_us: 0,
            ended: false,
            failures: 0,
            errors: 0,
            warned: 0,
            meter: Meter::new(clock),
            scores: None,
        })
    }

    /// Lets a second model look at a share of the frames while none is on trial.
    #[must_use]
    pub fn with_shadow(mut self, shadow: Option<Runner>) -> Self {
        self.shadow = shadow;
        self
    }

    /// Goes by other clocks than this machine's.
    #[must_use]
    pub fn with_clock(mut self, config: &Config, clock: Arc<dyn Clock>) -> Self {
        self.governor = Governor::new(config.limits, clock.now_us(), clock.cpu_us());
        self.meter = Meter::new(Arc::clone(&clock));
        self.clock = clock;
        self
    }

    /// Runs until told to stop. The position is saved in any case.
    pub fn run(mut self) -> Result<(), PipelineError> {
        let result = loop {
            match self.take() {
                Ok(true) => {}
                ended => break ended.map(|_| ()),
            }
        };
        self.save();
        result
    }

    /// Waits until a frame may be taken, and takes it; returns too once the source has ended.
    /// False if told to stop instead.
    pub fn take(&mut self) -> Result<bool, PipelineError> {
        loop {
            if self.wait() == Turn::Stop {
                return Ok(false);
            }
            if self.step()? || self.ended {
                return Ok(true);
            }
        }
    }

    /// Takes a frame if one may be taken now, without waiting; for callers that own the time.
    pub fn poll(&mut self) -> Result<Turn, PipelineError> {
        let shared = Arc::clone(&self.shared);
        let turn = self.turn(&mut shared.signals().0);
        match turn {
            Turn::Frame => {
                self.step()?;
            }
            Turn::Hold if !shared.status().held => {
                self.save();
                self.tell(true);
            }
            Turn::Stop => self.save(),
            _ => {}
        }
        Ok(turn)
    }

    /// What the stages of the last frame took.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// What the live model said of the last frame; `None` if it gave no answer.
    pub fn scores(&self) -> Option<Scores> {
        self.scores
    }

    /// Frames given up because inference was behind, in all.
    pub fn dropped(&self) -> u64 {
        self.progress.dropped
    }

    /// Whether the source has no more frames.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Goes on at another frame of a source that is read here.
    pub fn seek(&mut self, frame: u64) {
        self.progress.frame = frame;
        self.ended = false;
    }

    /// Waits until the next frame may be taken, or the end.
    fn wait(&mut self) -> Turn {
        let shared = Arc::clone(&self.shared);
        let (mut signals, changed) = shared.signals();
        loop {
            let turn = self.turn(&mut signals);
            let wait = match turn {
                Turn::Frame | Turn::Stop => return turn,
                Turn::WaitUntil(at_us) => {
                    let wait = at_us.saturating_sub(self.clock.now_us());
                    Duration::from_micros(wait).min(LOOK_AGAIN)
                }
                Turn::Await { .. } => LOOK_AGAIN,
                Turn::Hold if shared.status().held => {
                    signals = match changed.wait(signals) {
                        Ok(signals) => signals,
                        Err(poisoned) => poisoned.into_inner(),
                    };
                    continue;
                }
                Turn::Hold => {
                    // Saving waits for the disk, and whoever signals should not.
                    drop(signals);
                    self.save();
                    self.tell(true);
                    signals = shared.signals().0;
                    continue;
                }
            };
            signals = match changed.wait_timeout(signals, wait) {
                Ok((signals, _)) => signals,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// What is to be done now.
    fn turn(&mut self, signals: &mut Signals) -> Turn {
        if signals.stop {
            return Turn::Stop;
        }
        if let Some(candidate) = signals.candidate.take() {
            tracing::info!(model = %candidate.digest(), frame = self.progress.frame, "trial begins");
            self.candidate = Some(candidate);
        }
        if self.ended {
            return Turn::Hold;
        }
        let now_us = self.clock.now_us();
        let due_us = self.governor.due_us(now_us).max(self.ask_at_us);
        let turn = match &self.feed {
            Feed::Shelf(shelf) => match shelf.stock() {
                Stock::Frames | Stock::Ended => Turn::Frame,
                Stock::Empty { quiet } => Turn::Await { quiet },
            },
            Feed::Direct(_) => {
                let next = self.pacer.next(
                    now_us / 1000,
                    self.progress.frame,
                    signals.run_until,
                    self.candidate.is_some(),
                );
                match next {
                    Next::Take { .. } => Turn::Frame,
                    Next::WaitUntil(at_ms) => Turn::WaitUntil(at_ms.saturating_mul(1000)),
                    Next::Hold => Turn::Hold,
                }
            }
        };
        let turn = match turn {
            Turn::Frame if due_us > now_us => Turn::WaitUntil(due_us),
            turn => turn,
        };
        // It waits because it has to, so it is alive.
        if matches!(turn, Turn::WaitUntil(_) | Turn::Await { quiet: true }) {
            self.shared.beat();
        }
        turn
    }

    /// Takes one frame; false if there was none to take.
    fn step(&mut self) -> Result<bool, PipelineError> {
        let started_us = self.meter.start();
        self.scores = None;
        self.governor.started(started_us);
        let before = self.progress;
        let read = match &mut self.feed {
            Feed::Shelf(shelf) => match shelf.take(&mut self.frame) {
                Some(taken) => {
                    self.arrive(taken);
                    true
                }
                None => {
                    let shelf = Arc::clone(shelf);
                    return self.finish(&shelf).map(|()| false);
                }
            },
            Feed::Direct(source) => {
                let index = self.progress.frame;
                let read = source.read(index, &mut self.frame);
                match self.sort(read, index)? {
                    Some(read) => read,
                    None => return Ok(false),
                }
            }
        };
        self.meter.end(Stage::Read);
        if read {
            self.look();
        }
        self.progress.frame += 1;
        self.count(before);
        self.shared.beat();
        let cpu_us = if self.governor.needs_cpu_time() {
            self.clock.cpu_us()
        } else {
            0
        };
        self.governor.finished(self.clock.now_us(), cpu_us);
        self.tell(false);
        let every = match self.feed {
            Feed::Direct(_) => SAVE_EVERY,
            Feed::Shelf(_) => SAVE_EVERY_LIVE,
        };
        if self.progress.frame.abs_diff(self.saved.frame) >= every {
            self.save();
        }
        Ok(true)
    }

    /// Deals with what a direct read gave: whether it is a frame; `None` if the source stays at
    /// this index.
    fn sort(
        &mut self,
        read: Result<Read, SourceError>,
        index: u64,
    ) -> Result<Option<bool>, PipelineError> {
        match read {
            Ok(Read::Frame) => {
                self.failures = 0;
                return Ok(Some(true));
            }
            Ok(Read::NotYet) => {
                self.ask_at_us = self.clock.now_us() + ASK_AGAIN_MS * 1000;
                self.shared.beat();
                return Ok(None);
            }
            Ok(Read::Skipped { name, why }) => {
                tracing::warn!(frame = index, file = name, why, "frame skipped");
                self.progress.skipped += 1;
            }
            Ok(Read::End) => {
                tracing::info!(frames = index, "the source has ended");
                self.ended = true;
                return Ok(None);
            }
            Err(error) => {
                self.failures += 1;
                self.progress.skipped += 1;
                tracing::error!(frame = index, %error, "the source failed; the frame is skipped");
                if self.failures >= MAX_FAILURES {
                    return Err(PipelineError::Source(error));
                }
            }
        }
        Ok(Some(false))
    }

    /// Books what became of the frames before the one that was taken from the shelf.
    fn arrive(&mut self, taken: Taken) {
        self.progress.frame = taken.index;
        self.progress.skipped = self.base.skipped + taken.skipped;
        let dropped = self.base.dropped + taken.dropped;
        if dropped > self.progress.dropped {
            self.warned += 1;
            if self.warned <= LOUD || self.warned.is_multiple_of(1000) {
                tracing::warn!(
                    frame = taken.index,
                    dropped = dropped - self.progress.dropped,
                    total = dropped,
                    "inference is behind; the oldest frames were given up"
                );
            }
            // What is left out may have changed the class with good reason.
            self.flicker.reset();
        }
        self.progress.dropped = dropped;
    }

    /// The shelf will hold nothing more.
    fn finish(&mut self, shelf: &Shelf) -> Result<(), PipelineError> {
        let before = self.progress;
        let totals = shelf.totals();
        self.progress.frame = totals.next;
        self.progress.skipped = self.base.skipped + totals.skipped;
        self.progress.dropped = self.base.dropped + totals.dropped;
        self.ended = true;
        self.count(before);
        match shelf.failure() {
            Some(error) => Err(PipelineError::Source(error)),
            None => Ok(()),
        }
    }

    /// Counts what was passed since `before`.
    fn count(&self, before: Progress) {
        let metrics = &self.shared.metrics;
        let skipped = self.progress.skipped - before.skipped;
        let dropped = self.progress.dropped - before.dropped;
        metrics.skipped.add(skipped);
        metrics.dropped.add(dropped);
        metrics
            .seen
            .add(self.progress.frame - before.frame - skipped - dropped);
    }

    /// Runs the models on the frame in the buffer and keeps it if it is worth it.
    fn look(&mut self) {
        let meta = self.frame.meta;
        self.progress.bytes_seen += u64::from(meta.seen_bytes);
        let pixels = Frame {
            pixels: &self.frame.pixels,
            width: meta.width,
            height: meta.height,
            channels: meta.channels,
        };
        let meter = &mut self.meter;
        let scores = match self.live.as_mut().map(|live| live.infer(&pixels, meter)) {
            None => None,
            Some(Ok(scores)) => Some(scores),
            Some(Err(error)) => {
                self.shared.metrics.failed.add(1);
                complain(&mut self.errors, self.progress.frame, &error);
                None
            }
        };
        let signature = scores.and(self.live.as_ref().and_then(Runner::signature));
        let mut disagree =
            scores.is_some_and(|scores| self.flicker.observe(scores.top1, signature));
        if self.live.is_some() {
            self.meter.end(Stage::Score);
        }
        self.scores = scores;
        let mut event = None;
        let on_trial = self.candidate.is_some();
        let second = match &mut self.candidate {
            None => self.shadow.as_mut(),
            candidate => candidate.as_mut(),
        };
        let looks = shadow::looks(self.seed, self.progress.frame, self.shadow_share);
        if let Some(second) = second.filter(|_| looks) {
            let answer = self
                .meter
                .within(Stage::Shadow, |meter| second.infer(&pixels, meter));
            let took_us = self.meter.lap(Stage::Shadow).unwrap_or_default().nanos / 1000;
            match answer {
                Ok(theirs) => {
                    let other = |scores: &Scores| {
                        let live = self.live.as_ref().map(|live| live.label(scores.top1));
                        live != Some(second.label(theirs.top1))
                    };
                    disagree |= scores.as_ref().is_some_and(other);
                    event = Some(Event::Frame {
                        latency_us: u32::try_from(took_us).unwrap_or(u32::MAX),
                        confidence: theirs.confidence,
                        live_confidence: scores.map(|scores| scores.confidence),
                    });
                }
                // The frame is at fault, not the model.
                Err(RunnerError::Input(_)) => {}
                Err(error) if on_trial => {
                    tracing::error!(%error, frame = self.progress.frame, "the candidate failed");
                    event = Some(Event::EngineFailed);
                }
                Err(error) => complain(&mut self.errors, self.progress.frame, &error),
            }
        }
        self.keep(scores, signature, disagree);
        self.shared.metrics.frame(&self.meter);
        // A second model that is not on trial concerns nobody but the lane.
        if let Some(event) = event.filter(|_| on_trial) {
            self.advance(event);
        }
    }

    /// Asks the trigger about the frame in the buffer, and spools it if it says so.
    fn keep(&mut self, scores: Option<Scores>, signature: Option<u64>, disagree: bool) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(self.progress.frame);
        let (codec, payload) = self.frame.payload();
        let meta = self.frame.meta;
        let model = self.live.as_ref().map(Runner::digest);
        // Most frames are not kept: until one is, its embedding is as many zeros.
        let dim = match (&self.live, scores) {
            (Some(live), Some(_)) => live.sizes().1,
            _ => 0,
        };
        let mut sample = Sample {
            seq: 0,
            frame: self.progress.frame,
            captured_ms: meta.captured_ms,
            track: meta.track,
            model: model.map_or([0; 8], |digest| {
                let [a, b, c, d, e, f, g, h, ..] = digest.0;
                [a, b, c, d, e, f, g, h]
            }),
            lane: Lane::Uniform,
            inclusion: 0.0,
            scores: scores.unwrap_or_default(),
            embedding_scale: 0.0,
            embedding: &BLANK[..dim.min(BLANK.len())],
            // Sides beyond that do not fit a message as pixels, and files carry their own.
            width: u16::try_from(meta.width).unwrap_or(u16::MAX),
            height: u16::try_from(meta.height).unwrap_or(u16::MAX),
            codec,
            payload,
        };
        let cost = wire::len(&Record::Sample(sample)) + BATCH_SHARE;
        let flag = self.trigger.observe(Observation {
            frame_bytes: meta.seen_bytes,
            cost: u32::try_from(cost).unwrap_or(u32::MAX),
            scores: scores.as_ref(),
            signature,
            disagree,
            wanted: scores.map_or(0.0, |scores| scores.rarity),
            draw: rng.next_u32(),
        });
        self.meter.end(Stage::Trigger);
        if let Some(flag) = flag {
            sample.lane = flag.lane;
            sample.inclusion = flag.inclusion;
            if let Some(live) = self.live.as_mut().filter(|_| dim > 0) {
                (sample.embedding, sample.embedding_scale) = live.quantised();
            }
            let pushed = lock(&self.shared.spool).push(&mut sample, flag.value);
            self.meter.end(Stage::Spool);
            self.shared.metrics.flagged(flag.lane, pushed.lost);
            if let Some(reason) = pushed.lost {
                tracing::warn!(
                    seq = pushed.seq,
                    reason = reason.name(),
                    "a flagged sample is lost"
                );
            }
            self.shared.news.notify_one();
        }
    }

    /// Tells the slot about the candidate's frame, and does what it says between two frames.
    fn advance(&mut self, event: Event) {
        let actions = match lock(&self.shared.models).step(event) {
            Ok(actions) => actions,
            Err(error) => {
                // The next frame asks again.
                tracing::error!(%error, "the slot record cannot be stored; the trial goes on");
                return;
            }
        };
        if !actions.is_empty() {
            self.shared.news.notify_one();
        }
        for action in actions {
            match action {
                Action::Swap(model) => {
                    if let Some(candidate) = self.candidate.take() {
                        tracing::info!(model = %model.digest, frame = self.progress.frame, "model confirmed and live");
                        if self.live.replace(candidate).is_some() {
                            self.shared.metrics.swaps.add(1);
                        }
                        self.flicker.reset();
                    }
                }
                Action::Discard => {
                    if let Some(candidate) = self.candidate.take() {
                        tracing::warn!(model = %candidate.digest(), frame = self.progress.frame, "model given up on trial");
                    }
                }
                _ => {}
            }
        }
    }

    fn tell(&self, held: bool) {
        self.shared.tell(Status {
            progress: self.progress,
            held,
            live: self.live.as_ref().map(|live| Held {
                digest: live.digest(),
                sequence: live.sequence(),
            }),
            engine: self.live.as_ref().map(Runner::engine),
        });
    }

    fn save(&mut self) {
        match self.save_position() {
            Ok(()) => self.saved = self.progress,
            Err(error) => {
                tracing::error!(%error, "the position in the source is not saved; after a restart some frames are read again");
            }
        }
    }

    fn save_position(&mut self) -> Result<(), StateError> {
        let state = &self.shared.state;
        // First the mark: the position says that it counts. Few sources have one, and to store it
        // waits for the disk.
        if self.frame.mark != self.saved_mark {
            state.set_mark(&self.uri, &self.frame.mark)?;
            self.saved_mark.clone_from(&self.frame.mark);
        }
        state.save_progress(&self.uri, &self.progress, self.shared.bytes_up())
    }
}

/// Logs an error, but not one a frame for a day.
fn complain(count: &mut u64, frame: u64, error: &RunnerError) {
    *count += 1;
    if *count <= LOUD || count.is_multiple_of(1000) {
        tracing::error!(frame, %error, count, "a model gave no answer");
    }
}
