//! A stream of a day, a night and a day with something new is flagged under a byte budget.

use core::fmt::Write;

use device_core::flicker::Flicker;
use device_core::params::Params;
use device_core::sketch::signature;
use device_core::trigger::{Observation, Trigger, TriggerConfig};
use flywheel_shared::message::Lane;

use crate::Failure::{self, Broken};
use crate::report::Fingerprint;
use crate::scoring;
use crate::stream::{LATE, Scene, Stream};

/// Frames in all.
const FRAMES: u32 = 4000;
/// Bytes of one: 32 × 32 pixels in colour.
const FRAME_BYTES: u32 = 32 * 32 * 3;
/// The budget is one byte of this many.
const PER_BYTE: u64 = 25;
/// And so many at once on top.
const BURST: u32 = 16 * 1024;

/// Prints lanes and bytes. The law of the budget is checked after every frame.
#[inline(never)] // See `crate::run`.
pub(crate) fn run(out: &mut impl Write, params: &Params<'_>) -> Result<(), Failure> {
    let config = TriggerConfig {
        budget_ratio: 1.0 / PER_BYTE as f32,
        burst_bytes: BURST,
        ..TriggerConfig::default()
    };
    let mut trigger =
        Trigger::new(config).map_err(|_| Broken("the trigger refuses its configuration"))?;
    let mut flicker = Flicker::default();
    let mut stream = Stream::new(31);
    let mut all = Fingerprint::new();
    let (mut seen, mut up) = (0u64, 0u64);
    let (mut frames, mut bytes) = ([0u32; 5], [0u64; 5]);
    let (mut late, mut late_flagged) = (0, 0);
    for index in 0..FRAMES {
        let scene = match index * 4 / FRAMES {
            0 => Scene::DAY,
            1 => Scene::NIGHT,
            _ => Scene::LATE,
        };
        let frame = stream.frame(scene);
        let scores = scoring::of(&frame.logits, &frame.embedding, params)?;
        let mark = signature(&frame.embedding, params.centre());
        let cost = 800 + stream.draw() % 600;
        let flag = trigger.observe(Observation {
            frame_bytes: FRAME_BYTES,
            cost,
            scores: Some(&scores),
            signature: mark,
            disagree: flicker.observe(scores.top1, mark),
            wanted: 0.0,
            draw: stream.draw(),
        });
        seen += u64::from(FRAME_BYTES);
        for value in [
            scores.margin,
            scores.novelty,
            scores.u_unsure,
            scores.u_novel,
        ] {
            all.add(value.to_bits());
        }
        late += u32::from(frame.class == LATE);
        if let Some(flag) = flag {
            let lane = flag.lane as usize;
            frames[lane] += 1;
            bytes[lane] += u64::from(cost);
            up += u64::from(cost);
            late_flagged += u32::from(frame.class == LATE);
            all.add(index);
            all.add(flag.lane as u32);
            all.add(flag.inclusion.to_bits());
            all.add(flag.value.to_bits());
        }
        if up > seen / PER_BYTE + u64::from(BURST) {
            return Err(Broken("the trigger exceeds its budget"));
        }
    }
    writeln!(
        out,
        "trigger: {FRAMES} frames, {seen} bytes seen, {up} up of {} allowed, {} uniform denied",
        seen / PER_BYTE + u64::from(BURST),
        trigger.uniform_denied()
    )?;
    for lane in Lane::ALL {
        let (frames, bytes) = (frames[lane as usize], bytes[lane as usize]);
        if trigger.spent(lane) != bytes {
            return Err(Broken("the trigger's books are wrong"));
        }
        writeln!(
            out,
            "trigger: {}: {frames} frames, {bytes} bytes",
            lane.name()
        )?;
    }
    writeln!(
        out,
        "trigger: unknown class: {late_flagged} of {late} frames flagged"
    )?;
    writeln!(out, "trigger: fingerprint {all}")?;
    Ok(())
}
