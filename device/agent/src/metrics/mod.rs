//! What the agent counts and times, for Prometheus: counters since the start of the process and
//! histograms of the stages, in atomics, so that the frame loop never waits for whoever reads.
//! [`expose`] writes them down and [`serve`] answers requests.

pub mod expose;
pub mod serve;

use std::sync::atomic::{AtomicU64, Ordering};

use flywheel_shared::message::{Lane, LossReason};

use crate::meter::{Meter, Stage};

/// Upper bounds of the buckets in microseconds; the last bucket has none.
const BOUNDS_US: [u64; 15] = [
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000,
    1_000_000,
];

/// A cumulative histogram of durations.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS_US.len() + 1],
    sum_ns: AtomicU64,
}

impl Histogram {
    /// Takes a duration in nanoseconds.
    pub fn observe(&self, ns: u64) {
        let at = BOUNDS_US.partition_point(|bound| *bound * 1000 < ns);
        if let Some(bucket) = self.buckets.get(at) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Everything that is counted, since the process started.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Frames looked at.
    pub seen: Counter,
    /// Frames given up because inference was behind.
    pub dropped: Counter,
    /// Indices without a readable frame.
    pub skipped: Counter,
    /// Frames that the live model gave no answer on.
    pub failed: Counter,
    /// Models that took over.
    pub swaps: Counter,
    flagged: [Counter; Lane::ALL.len()],
    lost: [Counter; LossReason::ALL.len()],
    stages: [Histogram; Stage::ALL.len()],
}

impl Metrics {
    /// Takes what the stages of a frame took.
    pub fn frame(&self, meter: &Meter) {
        for (stage, histogram) in Stage::ALL.into_iter().zip(&self.stages) {
            if let Some(lap) = meter.lap(stage) {
                histogram.observe(lap.nanos);
            }
        }
    }

    /// Counts a flagged sample, and its loss if it was lost at once.
    pub fn flagged(&self, lane: Lane, lost: Option<LossReason>) {
        if let Some(counter) = self.flagged.get(lane as usize) {
            counter.add(1);
        }
        if let Some(counter) = lost.and_then(|reason| self.lost.get(reason as usize)) {
            counter.add(1);
        }
    }
}
