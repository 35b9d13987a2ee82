//! The frame loop: read, preprocess, infer, score, trigger, spool; on a thread of its own.
//!
//! In lockstep everything decided here is a function of the sequence of frames and of the frame at
//! which a candidate arrives, so the same seed flags the same frames. Random numbers are drawn by
//! frame index, so that a restart draws the same ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use device_core::flicker::Flicker;
use device_core::pace::{Next, Pace, Pacer};
use device_core::params::MAX_SIDE;
use device_core::slot::{Action, Event, Held};
use device_core::trigger::{Observation, Trigger, TriggerConfig, TriggerError};
use device_engine::Frame;
use flywheel_shared::message::{Lane, Record, Sample, Scores};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use thiserror::Error;

use crate::config::Config;
use crate::meter::{Meter, Stage};
use crate::models::{Runner, RunnerError};
use crate::shared::{Shared, Status, lock};
use crate::source::{FrameBuf, Read, Source, SourceError};
use crate::state::Progress;
use crate::wire;

/// Frames between two saves of the position in the source.
const SAVE_EVERY: u64 = 64;
/// Bytes of batch header, signature and envelope that fall to one sample.
pub const BATCH_SHARE: usize = 10;
/// As many zeros as the longest embedding has values.
static BLANK: [u8; MAX_SIDE as usize] = [0; MAX_SIDE as usize];
/// Frames in a row that may fail before the source is given up.
const MAX_FAILURES: u32 = 100;
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

/// The frame loop and all it owns.
pub struct Pipeline {
    source: Box<dyn Source>,
    uri: String,
    shared: Arc<Shared>,
    pacer: Pacer,
    trigger: Trigger,
    flicker: Flicker,
    live: Option<Runner>,
    candidate: Option<Runner>,
    frame: FrameBuf,
    progress: Progress,
    saved: Progress,
    seed: u64,
    started: Instant,
    ended: bool,
    failures: u32,
    errors: u64,
    meter: Meter,
    /// What the live model said of the last frame.
    scores: Option<Scores>,
}

/// What the wait for the next frame ended with.
enum Go {
    Frame,
    Stop,
}

impl Pipeline {
    /// Makes the loop; `pace` may differ from the configuration's.
    pub fn new(
        config: &Config,
        pace: Pace,
        source: Box<dyn Source>,
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
        Ok(Self {
            source,
            uri: config.source.clone(),
            shared,
            pacer: Pacer::new(pace),
            trigger,
            flicker: Flicker::default(),
            live,
            candidate: None,
            frame: FrameBuf::new(),
            progress,
            saved: progress,
            seed: config.seed,
            started: Instant::now(),
            ended: false,
            failures: 0,
            errors: 0,
            meter: Meter::new(),
            scores: None,
        })
    }

    /// Runs until told to stop. The position is saved in any case.
    pub fn run(mut self) -> Result<(), PipelineError> {
        let result = loop {
            match self.take() {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.save();
        result
    }

    /// Waits until a frame may be taken, and takes it; false if told to stop instead.
    pub fn take(&mut self) -> Result<bool, PipelineError> {
        match self.wait() {
            Go::Stop => Ok(false),
            Go::Frame => self.step().map(|()| true),
        }
    }

    /// What the stages of the last frame took.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// What the live model said of the last frame; `None` if it gave no answer.
    pub fn scores(&self) -> Option<Scores> {
        self.scores
    }

    /// Frames given up because processing was too slow for [`Pace::Fps`].
    pub fn dropped(&self) -> u64 {
        self.pacer.dropped()
    }

    /// Whether the source has no more frames.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Goes on at another frame of the source.
    pub fn seek(&mut self, frame: u64) {
        self.progress.frame = frame;
        self.ended = false;
    }

    /// Waits until the next frame may be taken, or the end.
    fn wait(&mut self) -> Go {
        let shared = Arc::clone(&self.shared);
        let (mut signals, changed) = shared.signals();
        loop {
            if signals.stop {
                return Go::Stop;
            }
            if let Some(candidate) = signals.candidate.take() {
                tracing::info!(model = %candidate.digest(), frame = self.progress.frame, "trial begins");
                self.candidate = Some(candidate);
            }
            let now_ms = self.started.elapsed().as_millis() as u64;
            let next = if self.ended {
                Next::Hold
            } else {
                self.pacer.next(
                    now_ms,
                    self.progress.frame,
                    signals.run_until,
                    self.candidate.is_some(),
                )
            };
            match next {
                Next::Take { .. } => {
                    if shared.status().held {
                        self.tell(false);
                    }
                    return Go::Frame;
                }
                Next::WaitUntil(at_ms) => {
                    let wait = Duration::from_millis(at_ms.saturating_sub(now_ms));
                    signals = match changed.wait_timeout(signals, wait) {
                        Ok((signals, _)) => signals,
                        Err(poisoned) => poisoned.into_inner().0,
                    };
                }
                Next::Hold if shared.status().held => {
                    signals = match changed.wait(signals) {
                        Ok(signals) => signals,
                        Err(poisoned) => poisoned.into_inner(),
                    };
                }
                Next::Hold => {
                    // Saving waits for the disk, and whoever signals should not.
                    drop(signals);
                    self.save();
                    self.tell(true);
                    signals = shared.signals().0;
                }
            }
        }
    }

    /// Takes one frame.
    fn step(&mut self) -> Result<(), PipelineError> {
        let index = self.progress.frame;
        self.meter.start();
        self.scores = None;
        let read = self.source.read(index, &mut self.frame);
        self.meter.end(Stage::Read);
        match read {
            Ok(Read::Frame) => {
                self.failures = 0;
                self.look();
            }
            Ok(Read::Skipped { name, why }) => {
                tracing::warn!(frame = index, file = name, why, "frame skipped");
                self.progress.skipped += 1;
            }
            Ok(Read::End) => {
                tracing::info!(frames = index, "the source has ended");
                self.ended = true;
                return Ok(());
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
        self.progress.frame += 1;
        self.tell(false);
        if self.progress.frame.abs_diff(self.saved.frame) >= SAVE_EVERY {
            self.save();
        }
        Ok(())
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
                complain(&mut self.errors, self.progress.frame, &error);
                None
            }
        };
        let signature = scores.and(self.live.as_ref().and_then(Runner::signature));
        let mut disagree =
            scores.is_some_and(|scores| self.flicker.observe(scores.top1, signature));
        self.scores = scores;
        self.meter.end(Stage::Score);
        let mut event = None;
        if let Some(candidate) = &mut self.candidate {
            let start = Instant::now();
            let answer = candidate.infer(&pixels, &mut Meter::new());
            let latency_us = u32::try_from(start.elapsed().as_micros()).unwrap_or(u32::MAX);
            match answer {
                Ok(theirs) => {
                    let other = |scores: &Scores| {
                        let live = self.live.as_ref().map(|live| live.label(scores.top1));
                        live != Some(candidate.label(theirs.top1))
                    };
                    disagree |= scores.as_ref().is_some_and(other);
                    event = Some(Event::Frame {
                        latency_us,
                        confidence: theirs.confidence,
                        live_confidence: scores.map(|scores| scores.confidence),
                    });
                }
                // The frame is at fault, not the model.
                Err(RunnerError::Input(_)) => {}
                Err(error) => {
                    tracing::error!(%error, frame = self.progress.frame, "the candidate failed");
                    event = Some(Event::EngineFailed);
                }
            }
        }
        self.meter.skip();
        self.keep(scores, signature, disagree);
        if let Some(event) = event {
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
                        self.live = Some(candidate);
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
        let bytes_up = self.shared.bytes_up();
        match self
            .shared
            .state
            .save_progress(&self.uri, &self.progress, bytes_up)
        {
            Ok(()) => self.saved = self.progress,
            Err(error) => {
                tracing::error!(%error, "the position in the source is not saved; after a restart some frames are read again");
            }
        }
    }
}

/// Logs an error, but not one a frame for a day.
fn complain(count: &mut u64, frame: u64, error: &RunnerError) {
    *count += 1;
    if *count <= LOUD || count.is_multiple_of(1000) {
        tracing::error!(frame, %error, count, "the live model gave no answer");
    }
}
