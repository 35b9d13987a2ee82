//! A model goes through the slot: a damaged part ends one attempt, a power cut interrupts the next,
//! and the model ends up live.

use core::fmt::Write;

use device_core::params::Params;
use device_core::slot::{Action, Event, Held, Reason, Slot, SlotError, SlotRecord};
use flywheel_shared::message::SlotState;
use flywheel_shared::spec::Golden;
use flywheel_shared::trust::{KeyId, Manifest, PartKind, Verified, check_part};

use crate::Failure::{self, Broken};
use crate::scoring;
use crate::stream::{CLASSES, DIM, Scene, Stream, World};
use crate::vectors::{GOLDEN, SCORES};

/// What an inference took, in microseconds; the core has no clock.
const LATENCY_US: u32 = 900;
/// Events that one step may lead to before something is wrong.
const CHAIN: usize = 8;

/// The shell around the slot: storage of one record, parts that can be had, a model to run.
struct Shell<'a> {
    slot: Slot,
    manifest: &'a Verified<Manifest<'static>>,
    params: &'a Params<'a>,
    /// The record as it lies in flash.
    stored: [u8; device_core::slot::RECORD_MAX],
    stored_len: usize,
    /// The golden part that arrives when it is fetched.
    arrives: &'a [u8],
}

/// Prints every action that the slot asks for; fails unless the model ends up live.
#[inline(never)] // See `crate::run`.
pub(crate) fn run(
    out: &mut impl Write,
    (manifest, key): (&Verified<Manifest<'static>>, KeyId),
    params: &Params<'_>,
) -> Result<(), Failure> {
    let model = Held {
        digest: manifest.digest(),
        sequence: manifest.sequence,
    };
    let offer = Event::Offer {
        model,
        bounds: manifest.trial,
        key,
    };
    let seen = |state| Event::ReportSeen {
        digest: model.digest,
        state,
    };
    let mut damaged = [0u8; GOLDEN.len()];
    damaged.copy_from_slice(GOLDEN);
    damaged[GOLDEN.len() / 2] ^= 1;

    let mut shell = Shell {
        slot: Slot::new(SlotRecord::default()),
        manifest,
        params,
        stored: [0; device_core::slot::RECORD_MAX],
        stored_len: 0,
        arrives: &damaged,
    };
    shell.step(out, "boot", Event::Boot)?;
    shell.step(out, "offer, damaged part", offer)?;
    shell.step(out, "report seen", seen(SlotState::Reverted))?;

    shell.arrives = GOLDEN;
    shell.step(out, "offer", offer)?;
    let mut stream = Stream::new(41);
    shell.frames(out, &mut stream, manifest.trial.frames / 2)?;

    let record = SlotRecord::from_bytes(&shell.stored[..shell.stored_len])
        .map_err(|_| Broken("the stored record does not decode"))?;
    shell.slot = Slot::new(record);
    shell.step(out, "power cut, boot", Event::Boot)?;
    shell.frames(out, &mut stream, manifest.trial.frames)?;
    shell.step(out, "report seen", seen(SlotState::Confirmed))?;
    shell.step(out, "offer again", offer)?;

    let record = shell.slot.record();
    if record.live != Some(model) || record.candidate.is_some() {
        return Err(Broken("the model is not live in the end"));
    }
    writeln!(
        out,
        "slot: live {}, floor {}",
        model.digest, record.floor.at
    )?;
    Ok(())
}

impl Shell<'_> {
    /// Gives an event, does what is asked for and gives the answers, until nothing is left to do.
    fn step(&mut self, out: &mut impl Write, why: &str, event: Event) -> Result<(), Failure> {
        writeln!(out, "slot: {why}")?;
        let mut next = Some(event);
        for _ in 0..CHAIN {
            let Some(event) = next.take() else {
                return Ok(());
            };
            for action in self.slot.step(event) {
                let answer = self.act(out, action)?;
                next = next.or(answer);
            }
        }
        Err(Broken("the slot does not come to rest"))
    }

    /// Does one action; returns the event that answers it, if any.
    fn act(&mut self, out: &mut impl Write, action: Action) -> Result<Option<Event>, Failure> {
        match action {
            Action::Persist(record) => {
                let bytes = record.to_bytes();
                self.stored[..bytes.len()].copy_from_slice(&bytes);
                self.stored_len = bytes.len();
                writeln!(out, "slot:   persist {} bytes", bytes.len())?;
                Ok(None)
            }
            Action::Fetch(model) => {
                writeln!(out, "slot:   fetch {}", model.sequence)?;
                let digest = model.digest;
                Ok(Some(match self.fetched() {
                    Ok(()) => Event::Fetched { digest },
                    Err(code) => Event::FetchFailed { digest, code },
                }))
            }
            Action::RunGolden(model) => {
                let digest = model.digest;
                let passed = golden_passes(self.arrives)?;
                let answer = if passed { "passed" } else { "failed" };
                writeln!(out, "slot:   golden {}: {answer}", model.sequence)?;
                let error = SlotError::Golden;
                Ok(Some(if passed {
                    Event::GoldenPassed { digest }
                } else {
                    Event::GoldenFailed { digest, error }
                }))
            }
            Action::BeginShadow(model) => {
                writeln!(out, "slot:   shadow {}", model.sequence)?;
                Ok(None)
            }
            Action::Swap(model) => {
                writeln!(out, "slot:   swap to {}", model.sequence)?;
                Ok(None)
            }
            Action::Discard => {
                writeln!(out, "slot:   discard")?;
                Ok(None)
            }
            Action::Report(report) => {
                writeln!(
                    out,
                    "slot:   report {} {}, {} frames, code {} {}",
                    report.model.sequence,
                    report.state.name(),
                    report.trial_frames,
                    report.code,
                    Reason(report.code)
                )?;
                Ok(None)
            }
        }
    }

    /// Whether the parts that arrived are the signed ones; a [`TrustError`] number if not.
    ///
    /// [`TrustError`]: flywheel_shared::trust::TrustError
    fn fetched(&self) -> Result<(), u16> {
        for (kind, bytes) in [(PartKind::Scores, SCORES), (PartKind::Golden, self.arrives)] {
            let Some(part) = self.manifest.part(kind) else {
                return Err(SlotError::Load.code());
            };
            check_part(part, bytes).map_err(|error| error.code())?;
        }
        Ok(())
    }

    /// Runs the model on so many live frames.
    fn frames(
        &mut self,
        out: &mut impl Write,
        stream: &mut Stream,
        count: u32,
    ) -> Result<(), Failure> {
        writeln!(out, "slot: {count} live frames")?;
        for _ in 0..count {
            let frame = stream.frame(Scene::DAY);
            let scores = scoring::of(&frame.logits, &frame.embedding, self.params)?;
            let actions = self.slot.step(Event::Frame {
                latency_us: LATENCY_US,
                confidence: scores.confidence,
                live_confidence: None,
            });
            for action in actions {
                if self.act(out, action)?.is_some() {
                    return Err(Broken("a live frame starts something anew"));
                }
            }
        }
        Ok(())
    }
}

/// Whether the scenario's model gives the signed answer on every golden frame.
fn golden_passes(bytes: &[u8]) -> Result<bool, Failure> {
    let golden: Golden<'_> =
        postcard::from_bytes(bytes).map_err(|_| Broken("the golden part does not decode"))?;
    let world = World::new();
    let (frames, rest) = golden.frames.as_chunks::<DIM>();
    let (answers, left) = golden.logits.as_chunks::<{ 4 * CLASSES }>();
    if golden.frame_len() != DIM || frames.len() != answers.len() || frames.is_empty() {
        return Err(Broken("the golden part is for another model"));
    }
    if !rest.is_empty() || !left.is_empty() {
        return Err(Broken("the golden part has a piece of a frame"));
    }
    let near = |(frame, expected): (&[u8; DIM], &[u8; 4 * CLASSES])| {
        let logits = world.logits(&World::embedding_of(frame));
        let (expected, _) = expected.as_chunks::<4>();
        let mut pairs = logits.iter().zip(expected);
        pairs.all(|(logit, raw)| (logit - f32::from_le_bytes(*raw)).abs() <= golden.tolerance)
    };
    Ok(frames.iter().zip(answers).all(near))
}
