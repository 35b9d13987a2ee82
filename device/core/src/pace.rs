//! Whether the frame loop may take the next frame now.

/// How a source is paced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// A replayed source that runs up to the frame the cloud names, so that a run is a function
    /// of its seed. A trial goes on beyond it, since it needs live frames to end.
    Lockstep,
    /// As fast as frames are processed.
    Max,
    /// Frames per second of a live source; more than 0.
    Fps(f32),
}

/// What the frame loop does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Takes the frame, after giving up `dropped` older ones that it came too late for.
    Take {
        /// Frames of the schedule that were missed.
        dropped: u64,
    },
    /// Waits until this time, in the caller's milliseconds.
    WaitUntil(u64),
    /// Waits for the cloud or a trial to let it go on.
    Hold,
}

/// Decides when frames are taken. The clock is the caller's, in milliseconds from any origin.
#[derive(Clone, Copy, Debug)]
pub struct Pacer {
    pace: Pace,
    /// The last time that was asked.
    last_ms: Option<u64>,
    /// Time since the schedule of [`Pace::Fps`] began. It is summed up from step to step, so that a
    /// clock that is set back stops nothing.
    passed_ms: u64,
    /// Frames of the schedule taken or dropped.
    scheduled: u64,
    dropped: u64,
}

impl Pacer {
    /// A pacer whose schedule begins with the first question.
    pub fn new(pace: Pace) -> Self {
        Self {
            pace,
            last_ms: None,
            passed_ms: 0,
            scheduled: 0,
            dropped: 0,
        }
    }

    /// May the frame with index `frame` be taken? `run_until` is what the cloud said last
    /// ([`Desired`](flywheel_shared::message::Desired)); `trial_running` whether a model is on
    /// trial or about to be.
    pub fn next(&mut self, now_ms: u64, frame: u64, run_until: u64, trial_running: bool) -> Next {
        match self.pace {
            Pace::Lockstep if frame < run_until || trial_running => Next::Take { dropped: 0 },
            Pace::Lockstep => Next::Hold,
            Pace::Max => Next::Take { dropped: 0 },
            Pace::Fps(fps) => self.on_schedule(now_ms, f64::from(fps)),
        }
    }

    /// Frames given up so far because processing was too slow.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Frame n is due n/fps seconds after the start; of several that are due the newest is taken.
    fn on_schedule(&mut self, now_ms: u64, fps: f64) -> Next {
        // A rate that is no rate stands for one frame a second rather than for a stuck loop.
        let fps = if fps > 0.0 && fps.is_finite() {
            fps
        } else {
            1.0
        };
        self.passed_ms += now_ms.saturating_sub(self.last_ms.unwrap_or(now_ms));
        self.last_ms = Some(now_ms);
        let passed = self.passed_ms as f64;
        // The hair keeps a frame from being missed by a rounding error at its very due time.
        let newest = (passed * fps / 1000.0 + 1e-6) as u64;
        if newest < self.scheduled {
            let due = libm::ceil(self.scheduled as f64 * 1000.0 / fps) as u64;
            // A frame due within this very millisecond still leaves time to wait for.
            let wait = due.saturating_sub(self.passed_ms).max(1);
            return Next::WaitUntil(now_ms.saturating_add(wait));
        }
        let dropped = newest - self.scheduled;
        self.scheduled = newest + 1;
        self.dropped += dropped;
        Next::Take { dropped }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lockstep_halts_except_for_a_trial() {
        let mut pacer = Pacer::new(Pace::Lockstep);
        assert_eq!(pacer.next(0, 9, 10, false), Next::Take { dropped: 0 });
        assert_eq!(pacer.next(0, 10, 10, false), Next::Hold);
        assert_eq!(pacer.next(0, 10, 10, true), Next::Take { dropped: 0 });
        let mut pacer = Pacer::new(Pace::Max);
        assert_eq!(pacer.next(0, 10, 10, false), Next::Take { dropped: 0 });
    }

    proptest! {
        /// Over any stalls: frames come no faster than the schedule, waits end in a frame, and
        /// taken plus dropped is what was due.
        #[test]
        fn a_schedule_is_kept(fps in 0.5f32..200.0, stalls in prop::collection::vec(0u64..400, 1..100)) {
            let mut pacer = Pacer::new(Pace::Fps(fps));
            let (mut now, mut taken) = (1000, 0u64);
            for stall in stalls {
                match pacer.next(now, 0, 0, false) {
                    Next::Take { .. } => taken += 1,
                    Next::WaitUntil(at) => {
                        prop_assert!(at > now);
                        prop_assert!((at - now) as f32 <= 1000.0 / fps + 2.0);
                        now = at;
                        let is_take = matches!(pacer.next(now, 0, 0, false), Next::Take { .. });
                        prop_assert!(is_take);
                        taken += 1;
                    }
                    Next::Hold => prop_assert!(false, "a live source never holds"),
                }
                let due = ((now - 1000) as f64 * f64::from(fps) / 1000.0) as u64 + 1;
                prop_assert!(taken + pacer.dropped() <= due);
                now += stall;
            }
        }
    }

    #[test]
    fn a_clock_set_back_does_not_stop_the_schedule() {
        let mut pacer = Pacer::new(Pace::Fps(10.0));
        for now in [5_000_000, 5_000_100, 5_000_200] {
            assert_eq!(pacer.next(now, 0, 0, false), Next::Take { dropped: 0 });
        }
        assert_eq!(pacer.next(40, 0, 0, false), Next::WaitUntil(140));
        assert_eq!(pacer.next(140, 0, 0, false), Next::Take { dropped: 0 });
        assert_eq!(pacer.dropped(), 0);
    }

    #[test]
    fn an_impossible_rate_still_moves() {
        for fps in [0.0, -3.0, f32::NAN] {
            let mut pacer = Pacer::new(Pace::Fps(fps));
            assert_eq!(pacer.next(0, 0, 0, false), Next::Take { dropped: 0 });
            assert_eq!(pacer.next(0, 0, 0, false), Next::WaitUntil(1000));
        }
    }
}
