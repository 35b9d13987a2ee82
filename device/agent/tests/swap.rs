//! Swapping models at 30 frames a second drops no frame, and a slow frame costs only what the
//! backlog cannot hold.

#[allow(dead_code, reason = "each test uses its part")]
mod virtual_time;

use device_core::slot::SlotError;
use flywheel_agent::shared::lock;
use flywheel_shared::message::{Record, SlotState, records};
use virtual_time::{Cost, Device, Setup, World};

const QUICK: Cost = Cost {
    us: 12_000,
    stall_every: 0,
    stall_us: 0,
    fails_at: None,
    panics_at: None,
};

fn device(frames: u64, live: Cost, extra: &'static str) -> Device {
    Device::new(&Setup {
        frames,
        bad_every: 0,
        waiting: 4,
        quota: 10_000_000,
        live,
        extra,
    })
}

#[test]
fn swapping_models_drops_no_frame() {
    let frames = 6_000;
    let mut device = device(frames, QUICK, "");
    let mut offered = 0;
    while device.turn() {
        if device.frame() / 500 > offered && offered < 10 {
            device.settle_reports();
            offered += 1;
            // Beside the live one it takes 24 of the 33 ms that there are.
            device.offer(offered, 100, QUICK);
        }
    }
    let metrics = &device.shared.metrics;
    assert_eq!(metrics.seen.get(), frames);
    assert_eq!(metrics.dropped.get(), 0);
    assert_eq!(metrics.swaps.get(), 10);
    // The live model looked at every frame, whichever it was, and each candidate at its trial.
    let looked: u64 = device.world.looked.iter().map(World::get).sum();
    assert_eq!(looked, frames + 10 * 100);
    let live = device.shared.status().live.unwrap();
    assert_eq!(live.sequence, 10);
}

#[test]
fn a_stall_costs_what_the_backlog_cannot_hold_and_the_newest_stay() {
    let stalling = Cost {
        stall_every: 100,
        stall_us: 500_000,
        ..QUICK
    };
    let frames = 101;
    let mut device = device(frames, stalling, "");
    while device.turn() {}
    let metrics = &device.shared.metrics;
    assert_eq!(metrics.seen.get() + metrics.dropped.get(), frames);
    // The stall is at the last frame but one, so only one frame came after it, and waited.
    assert_eq!(metrics.dropped.get(), 0);

    let mut device = self::device(200, stalling, "");
    while device.turn() {}
    let metrics = &device.shared.metrics;
    // 512 ms are 15 frames; 4 wait.
    let dropped = metrics.dropped.get();
    assert!((10..=12).contains(&dropped), "{dropped}");
    assert_eq!(metrics.seen.get() + dropped, 200);
}

#[test]
fn a_rate_and_a_share_of_the_processor_are_held() {
    // Half of the frames.
    let mut half = device(3_000, QUICK, "max_fps = 15.0\n");
    while half.turn() {}
    let seen = half.shared.metrics.seen.get();
    assert!((1_490..=1_510).contains(&seen), "{seen}");
    assert_eq!(seen + half.shared.metrics.dropped.get(), 3_000);

    // 12 ms a frame at 0.2 of a core is a frame every 60 ms.
    let mut fifth = device(3_000, QUICK, "max_cpu = 0.2\n");
    while fifth.turn() {}
    let cpu = World::get(&fifth.world.cpu_us) as f64;
    let share = cpu / World::get(&fifth.world.now_us) as f64;
    assert!((0.19..=0.201).contains(&share), "{share}");
}

#[test]
fn a_candidate_on_a_share_of_the_frames_is_tried_as_long() {
    let mut device = device(3_000, QUICK, "shadow_share = 0.25\n");
    device.turn();
    device.offer(1, 200, QUICK);
    let mut swapped_at = 0;
    while device.turn() {
        if device.shared.metrics.swaps.get() == 0 {
            swapped_at = device.frame();
        }
    }
    // 200 frames of its own are about 800 of the stream.
    assert!((650..950).contains(&swapped_at), "{swapped_at}");
    assert_eq!(device.shared.metrics.swaps.get(), 1);
    let mut samples = 0;
    let mut spool = lock(&device.shared.spool);
    while let Some(batch) = spool.take(64, 1 << 16).unwrap() {
        samples += records(&batch.records)
            .filter(|record| matches!(record, Ok(Record::Sample(_))))
            .count();
    }
    assert_eq!(samples as u32, spool.flagged());
}

#[test]
fn an_engine_that_panics_costs_the_candidate_and_no_frame() {
    let frames = 1_000;
    let mut device = device(frames, QUICK, "");
    device.turn();
    device.offer(
        1,
        100,
        Cost {
            panics_at: Some(50),
            ..QUICK
        },
    );
    while device.turn() {}
    let report = lock(&device.shared.models).report().unwrap();
    assert_eq!(report.state, SlotState::Reverted);
    assert_eq!(report.code, SlotError::Engine.code());
    let metrics = &device.shared.metrics;
    assert_eq!((metrics.seen.get(), metrics.swaps.get()), (frames, 0));
    // The live model that panics gives no answer, and is asked again.
    let panicking = Cost {
        panics_at: Some(7),
        ..QUICK
    };
    let mut device = self::device(frames, panicking, "");
    while device.turn() {}
    assert_eq!(device.shared.metrics.failed.get(), 1);
    assert_eq!(device.shared.metrics.seen.get(), frames);
}
