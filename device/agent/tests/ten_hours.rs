//! Ten hours of frames at 30 a second in virtual time, with model swaps, a spool that fills up and
//! clocks that are set back: memory stays flat and every count is exact.

#[allow(dead_code, reason = "each test uses its part")]
mod virtual_time;

use std::sync::atomic::Ordering;

use flywheel_agent::metrics::expose::resident_bytes;
use flywheel_agent::shared::lock;
use flywheel_shared::envelope;
use flywheel_shared::message::{HealthTail, Lane, LossReason, Record, Up, records};
use flywheel_shared::{MAX_MESSAGE, WIRE_LATEST};
use virtual_time::{Cost, Device, FPS, Setup, World};

const HOUR: u64 = 3600 * FPS as u64;
const FRAMES: u64 = 10 * HOUR;
/// Resident memory may grow by this much between hour 2.5 and the end: less than 8 bytes a frame.
const FLAT: u64 = 6 << 20;

const USUAL: Cost = Cost {
    us: 8_000,
    stall_every: 40_000,
    stall_us: 700_000,
    fails_at: None,
    panics_at: None,
};

/// Whether the cloud is reached at this frame.
fn online(frame: u64) -> bool {
    !matches!(frame / HOUR, 1 | 4 | 8)
}

/// What the cloud knows.
#[derive(Default)]
struct Cloud {
    /// 0: unknown, 1: sample, 2: loss; by number.
    numbers: Vec<u8>,
    samples: u64,
    evicted: u64,
    frames: Vec<bool>,
    by_lane: [u64; Lane::ALL.len()],
    last_health_ms: u64,
    batches: u64,
}

impl Cloud {
    /// Takes all that is sent, and acknowledges it; every 50th batch is lost on its way.
    fn take(&mut self, device: &Device) {
        let mut spool = lock(&device.shared.spool);
        while let Some(batch) = spool.take(64, 64 << 10).unwrap() {
            self.batches += 1;
            if self.batches.is_multiple_of(50) {
                spool.unsend();
                continue;
            }
            let mut ranges = Vec::new();
            for record in records(&batch.records) {
                let record = record.unwrap();
                let seq = record.seq();
                let at = seq as usize;
                if self.numbers.len() <= at {
                    self.numbers.resize(at + 1, 0);
                }
                assert_eq!(self.numbers[at], 0, "number {seq} came twice");
                match record {
                    Record::Sample(sample) => {
                        self.numbers[at] = 1;
                        self.samples += 1;
                        self.by_lane[sample.lane as usize] += 1;
                        let frame = &mut self.frames[sample.frame as usize];
                        assert!(!*frame, "frame {} came twice", sample.frame);
                        *frame = true;
                    }
                    Record::Loss(loss) => {
                        assert_eq!(loss.reason, LossReason::Evicted);
                        self.numbers[at] = 2;
                        self.evicted += 1;
                    }
                }
                ranges.push((seq, seq));
            }
            spool.ack(batch.epoch, &ranges);
        }
    }

    /// Hears how the device is, and audits it.
    fn hear(&mut self, device: &mut Device) {
        let wall_ms = World::get(&device.world.wall_ms);
        let message = device.reporter.health(&device.shared, wall_ms).unwrap();
        let (payload, _) = envelope::split(&message, MAX_MESSAGE).unwrap();
        let (Up::Health(health), tail) = postcard::take_from_bytes(payload).unwrap() else {
            panic!("not a health message");
        };
        let tail = HealthTail::read(tail).unwrap().unwrap();
        assert!(
            health.at_ms > self.last_health_ms,
            "the report's time went back"
        );
        self.last_health_ms = health.at_ms;
        let known = self.numbers.iter().filter(|kind| **kind > 0).count() as u32;
        for book in &health.books {
            let spooled: u32 = book.spooled.iter().map(|(low, high)| high - low + 1).sum();
            assert_eq!(book.flagged, book.acked + spooled);
            assert_eq!(book.acked, known);
        }
        lock(&device.shared.spool).settle(health.at_ms);
        let metrics = &device.shared.metrics;
        assert_eq!(
            health.frame,
            metrics.seen.get() + metrics.dropped.get() + metrics.skipped.get()
        );
        assert_eq!(health.skipped, metrics.skipped.get());
        assert_eq!(tail.dropped, metrics.dropped.get());
    }
}

#[test]
fn ten_hours_leave_nothing_behind_and_nothing_out() {
    let mut device = Device::new(&Setup {
        frames: FRAMES,
        bad_every: 9_973,
        waiting: 4,
        quota: 200_000,
        live: USUAL,
        extra: "max_fps = 60.0\nmax_cpu = 0.9\n",
    });
    device.reporter.welcomed(WIRE_LATEST);
    let mut cloud = Cloud {
        frames: vec![false; FRAMES as usize],
        ..Cloud::default()
    };
    let mut next_look = 0;
    let mut next_hour = 0;
    let mut sequence = 0;
    let mut confirmed = 0;
    let mut baseline = None;
    let mut fullest = 0;
    while device.turn() {
        let frame = device.frame();
        if frame >= next_look {
            next_look += 10 * FPS as u64;
            if online(frame) {
                cloud.take(&device);
                device.settle_reports();
            }
            cloud.hear(&mut device);
            fullest = fullest.max(lock(&device.shared.spool).usage().bytes);
            // Loss records may take up to half as much again.
            assert!(fullest <= 300_000, "{fullest} bytes in a spool of 200000");
        }
        if frame >= next_hour + HOUR / 2 && frame / HOUR == next_hour / HOUR {
            // In the middle of each hour a model, if the cloud is there to offer one. The sixth
            // fails on its 50th frame.
            next_hour += HOUR;
            if online(frame) {
                sequence += 1;
                let fails_at = (sequence == 6).then_some(50);
                confirmed += u64::from(fails_at.is_none());
                device.offer(sequence, 300, Cost { fails_at, ..USUAL });
            }
            // And the clocks are set back: the wall clock by a day, the other by an hour.
            let wall = &device.world.wall_ms;
            wall.fetch_sub(86_400_000, Ordering::Relaxed);
            device.set_back(3_600_000_000);
            if frame > 2 * HOUR && baseline.is_none() {
                baseline = resident_bytes();
            }
        }
    }
    let grown = resident_bytes().unwrap().saturating_sub(baseline.unwrap());
    cloud.take(&device);
    cloud.hear(&mut device);

    // Every frame is accounted for, in the device's books and in those of camera and models.
    let (world, metrics) = (&device.world, &device.shared.metrics);
    let (seen, dropped, skipped) = (
        metrics.seen.get(),
        metrics.dropped.get(),
        metrics.skipped.get(),
    );
    assert_eq!(device.frame(), FRAMES);
    assert_eq!(seen + dropped + skipped, FRAMES);
    assert_eq!(skipped, FRAMES / 9_973);
    assert_eq!(skipped, World::get(&world.bad));
    assert_eq!(seen + dropped, World::get(&world.given));
    let looked: u64 = world.looked.iter().map(World::get).sum();
    let trials = 300 * confirmed + 50;
    assert_eq!(looked, seen + trials);
    // Each stall of 0.7 s is 21 frames, of which 4 wait.
    assert!((300..800).contains(&dropped), "{dropped} dropped");
    assert_eq!(metrics.swaps.get(), confirmed);
    assert_eq!((sequence, confirmed), (7, 6));

    // Every flagged number is a sample or a loss that the cloud has.
    let spool = lock(&device.shared.spool);
    let flagged = u64::from(spool.flagged());
    assert!(spool.is_empty());
    assert_eq!(cloud.samples + cloud.evicted, flagged);
    assert!(cloud.numbers[1..].iter().all(|kind| *kind > 0));
    assert_eq!(cloud.numbers.len() as u64, flagged + 1);
    assert!(flagged > 10_000, "only {flagged} flagged");
    assert!(
        cloud.evicted > 1_000,
        "the spool was never full: {}",
        cloud.evicted
    );
    assert!(fullest > 190_000, "{fullest}");
    let lanes = |lane: Lane| cloud.by_lane[lane as usize];
    assert!(lanes(Lane::Unsure) > 0 && lanes(Lane::Uniform) > 0 && lanes(Lane::Disagree) > 0);
    println!(
        "{FRAMES} frames: {seen} seen, {dropped} dropped, {skipped} skipped; {flagged} flagged: {} samples, {} evicted; {confirmed} swaps; resident memory grew by {} KiB",
        cloud.samples,
        cloud.evicted,
        grown / 1024
    );
    assert!(
        grown < FLAT,
        "resident memory grew by {grown} bytes in 7.5 hours"
    );
}
