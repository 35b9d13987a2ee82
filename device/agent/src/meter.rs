//! What each stage of a frame costs: time and heap allocations, taken at the borders between the
//! stages of the production code, so that a benchmark measures that code and not a copy of it.

use std::time::Instant;

use crate::allocations;

/// A stage of the frame loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The source fills the buffer: capturing, or reading and decoding a file.
    Read,
    /// Pixels become the input tensor.
    Preprocess,
    /// The engine runs the model.
    Infer,
    /// The answer becomes scores.
    Score,
    /// The trigger decides, random draw and cost of the sample included.
    Trigger,
    /// A flagged sample goes to the spool.
    Spool,
}

impl Stage {
    /// All stages, in the order of a frame's way.
    pub const ALL: [Self; 6] = [
        Self::Read,
        Self::Preprocess,
        Self::Infer,
        Self::Score,
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
#[derive(Clone, Copy, Debug)]
pub struct Meter {
    laps: [Option<Lap>; Stage::ALL.len()],
    at: Instant,
    allocations: u64,
}

impl Meter {
    /// A meter that starts now.
    pub fn new() -> Self {
        Self {
            laps: [None; Stage::ALL.len()],
            at: Instant::now(),
            allocations: allocations::of_this_thread(),
        }
    }

    /// Begins a frame.
    pub fn start(&mut self) {
        *self = Self::new();
    }

    /// What happened since the last border belongs to no stage.
    pub fn skip(&mut self) {
        self.at = Instant::now();
        self.allocations = allocations::of_this_thread();
    }

    /// What happened since the last border belongs to `stage`, besides what it has already.
    pub fn end(&mut self, stage: Stage) {
        let (since, before) = (self.at, self.allocations);
        self.skip();
        let lap = self.laps[stage as usize].get_or_insert_default();
        lap.nanos += self.at.duration_since(since).as_nanos() as u64;
        lap.allocations += self.allocations - before;
    }

    /// What a stage took of this frame; `None` if the frame did not come to it.
    pub fn lap(&self, stage: Stage) -> Option<Lap> {
        self.laps[stage as usize]
    }
}

impl Default for Meter {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_add_up_within_a_frame_and_start_over_with_the_next() {
        let mut meter = Meter::new();
        assert_eq!(meter.lap(Stage::Score), None);
        meter.end(Stage::Score);
        let first = meter.lap(Stage::Score).unwrap();
        let border = meter.at;
        while meter.at == border {
            meter.end(Stage::Score);
        }
        assert!(meter.lap(Stage::Score).unwrap().nanos > first.nanos);
        assert_eq!(meter.lap(Stage::Spool), None);
        meter.start();
        assert!(Stage::ALL.iter().all(|stage| meter.lap(*stage).is_none()));
    }
}
