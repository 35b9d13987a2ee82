//! What each stage of a frame costs: time and heap allocations, taken at the borders between the
//! stages of the production code, so that a benchmark measures that code and not a copy of it. The
//! metrics are fed from the same readings.

use std::sync::Arc;

use crate::allocations;
use crate::clock::{Clock, SystemClock};

/// A stage of the frame loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The source fills the buffer: capturing, or reading and decoding a file; or the frame is
    /// taken from the capture thread.
    Read,
    /// Pixels become the input tensor.
    Preprocess,
    /// The engine runs the model.
    Infer,
    /// The answer becomes scores.
    Score,
    /// The second model: a candidate on trial, or one that looks at a share of the frames.
    Shadow,
    /// The trigger decides, random draw and cost of the sample included.
    Trigger,
    /// A flagged sample goes to the spool.
    Spool,
}

impl Stage {
    /// All stages, in the order of a frame's way.
    pub const ALL: [Self; 7] = [
        Self::Read,
        Self::Preprocess,
        Self::Infer,
        Self::Score,
        Self::Shadow,
        Self::Trigger,
        Self::Spool,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Preprocess => "preprocess",
            Self::Infer => "infer",
            Self::Score => "score",
            Self::Shadow => "shadow",
            Self::Trigger => "trigger",
            Self::Spool => "spool",
        }
    }
}

/// What one stage took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lap {
    /// Nanoseconds.
    pub nanos: u64,
    /// Heap allocations of the frame loop's thread; see [`allocations`].
    pub allocations: u64,
}

/// The laps of one frame.
pub struct Meter {
    clock: Arc<dyn Clock>,
    laps: [Option<Lap>; Stage::ALL.len()],
    /// All that ends now belongs to this stage.
    within: Option<Stage>,
    /// The last border, in the clock's nanoseconds.
    at_ns: u64,
    allocations: u64,
}

impl Meter {
    /// A meter that starts now.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            laps: [None; Stage::ALL.len()],
            within: None,
            at_ns: clock.now_ns(),
            allocations: allocations::of_this_thread(),
            clock,
        }
    }

    /// Begins a frame. Returns when, in the clock's microseconds.
    pub fn start(&mut self) -> u64 {
        self.laps = [None; Stage::ALL.len()];
        self.cross();
        self.at_ns / 1000
    }

    /// What happened since the last border belongs to `stage`, besides what it has already.
    pub fn end(&mut self, stage: Stage) {
        let (since, before) = (self.at_ns, self.allocations);
        self.cross();
        let stage = self.within.unwrap_or(stage);
        let lap = self.laps[stage as usize].get_or_insert_default();
        // A clock may be set back.
        lap.nanos += self.at_ns.saturating_sub(since);
        lap.allocations += self.allocations - before;
    }

    /// Does `work`, all of which belongs to `stage`, whatever stages end in it.
    pub fn within<T>(&mut self, stage: Stage, work: impl FnOnce(&mut Self) -> T) -> T {
        self.within = Some(stage);
        let result = work(self);
        self.end(stage);
        self.within = None;
        result
    }

    /// What a stage took of this frame; `None` if the frame did not come to it.
    pub fn lap(&self, stage: Stage) -> Option<Lap> {
        self.laps[stage as usize]
    }

    fn cross(&mut self) {
        self.at_ns = self.clock.now_ns();
        self.allocations = allocations::of_this_thread();
    }
}

impl Default for Meter {
    /// A meter that goes by this machine's clock.
    fn default() -> Self {
        Self::new(Arc::new(SystemClock::new()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// It goes on by 10 ns at each look.
    struct Ticks(AtomicU64);

    impl Clock for Ticks {
        fn now_ns(&self) -> u64 {
            self.0.fetch_add(10, Ordering::Relaxed)
        }
        fn cpu_us(&self) -> u64 {
            0
        }
    }

    fn nanos(meter: &Meter, stage: Stage) -> Option<u64> {
        meter.lap(stage).map(|lap| lap.nanos)
    }

    #[test]
    fn laps_add_up_within_a_frame_and_start_over_with_the_next() {
        let mut meter = Meter::new(Arc::new(Ticks(AtomicU64::new(3_000))));
        assert_eq!(nanos(&meter, Stage::Score), None);
        meter.end(Stage::Score);
        meter.end(Stage::Trigger);
        meter.end(Stage::Score);
        assert_eq!(nanos(&meter, Stage::Score), Some(20));
        assert_eq!(nanos(&meter, Stage::Trigger), Some(10));
        assert_eq!(nanos(&meter, Stage::Spool), None);
        assert_eq!(meter.start(), 3);
        assert!(Stage::ALL.iter().all(|stage| meter.lap(*stage).is_none()));
    }

    #[test]
    fn stages_of_the_second_model_are_not_taken_for_the_first_one_s() {
        let mut meter = Meter::new(Arc::new(Ticks(AtomicU64::new(0))));
        meter.end(Stage::Infer);
        meter.within(Stage::Shadow, |meter| {
            meter.end(Stage::Preprocess);
            meter.end(Stage::Infer);
        });
        meter.end(Stage::Trigger);
        let laps = Stage::ALL.map(|stage| nanos(&meter, stage));
        assert_eq!(laps, [None, None, Some(10), None, Some(30), Some(10), None]);
    }
}
