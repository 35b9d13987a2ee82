//! What the agent counts and times, for Prometheus: counters since the start of the process and
//! histograms of the stages, in atomics, so that the frame loop never waits for whoever reads.
//! [`expose`] writes them down and [`serve`] answers requests.

pub mod expose;
pub mod serve;

use std::sync::atomic::{AtomicU64, Ordering};

use flywheel_shared::message::{Lane, LossReason};

/// Parts of the frame loop that are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading a frame from the source, or taking it from the capture thread.
    Read,
    /// The live model: preprocessing, inference and scores.
    Infer,
    /// The second model.
    Shadow,
    /// Whether to keep the frame.
    Trigger,
    /// Keeping it.
    Spool,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Self; 5] = [
        Self::Read,
        Self::Infer,
        Self::Shadow,
        Self::Trigger,
        Self::Spool,
    ];

    /// The label's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Infer => "infer",
            Self::Shadow => "shadow",
            Self::Trigger => "trigger",
            Self::Spool => "spool",
        }
    }
}

/// Reasons in the order of their numbers.
const REASONS: [LossReason; 5] = [
    LossReason::Evicted,
    LossReason::Crash,
    LossReason::Disk,
    LossReason::Corrupt,
    LossReason::Oversize,
];

/// Upper bounds of the buckets in microseconds; the last bucket has none.
const BOUNDS_US: [u64; 15] = [
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000,
    1_000_000,
];

/// A cumulative histogram of durations.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    /// Takes a duration.
    pub fn observe(&self, us: u64) {
        let at = BOUNDS_US.partition_point(|bound| *bound < us);
        if let Some(bucket) = self.buckets.get(at) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_us.fetch_add(us, Ordering::Relaxed);
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
    lost: [Counter; REASONS.len()],
    stages: [Histogram; Stage::ALL.len()],
}

impl Metrics {
    /// Takes how long a stage took.
    pub fn time(&self, stage: Stage, us: u64) {
        if let Some(histogram) = self.stages.get(stage as usize) {
            histogram.observe(us);
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
