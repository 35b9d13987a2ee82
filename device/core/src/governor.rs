//! How hard the device may work: frames a second and processor time are held under a limit by
//! spacing the frames.
//!
//! Each frame pushes the earliest time of the next one: by `1 / max_fps`, and by the processor time
//! it took over the share allowed (the generic cell rate algorithm, ITU-T I.371, with a burst of
//! one frame). So over any stretch of time the processor time used is at most the share of it, and
//! what one frame takes. Time not used is not saved up: an hour of idleness pays for no burst.

/// Limits; `None` is none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// Frames a second that are looked at; above 0.
    pub max_fps: Option<f32>,
    /// Processor time by wall time: 1 is one core all the time, 4 is four; above 0.
    pub max_cpu: Option<f32>,
}

impl Limits {
    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        self.max_fps.is_none() && self.max_cpu.is_none()
    }
}

/// Spaces frames. Times are the caller's, in microseconds from any origin.
#[derive(Clone, Copy, Debug)]
pub struct Governor {
    /// Microseconds between two frames; 0 without a limit.
    spacing_us: f64,
    /// 0 without a limit.
    share: f64,
    last_us: u64,
    /// Processor time at the last frame.
    cpu_us: u64,
    /// Earliest times by frames and by processor time. Kept as fractions, so that a rate of 30 is
    /// 30 and not 30.3.
    frame_due_us: f64,
    cpu_due_us: f64,
    /// When the last frame began.
    started_us: f64,
}

impl Governor {
    /// A governor that lets the first frame pass at once. `cpu_us` is the processor time used so
    /// far, which is not held against it. A limit that is no positive number is none.
    pub fn new(limits: Limits, now_us: u64, cpu_us: u64) -> Self {
        let positive = |limit: Option<f32>| limit.filter(|limit| *limit > 0.0 && limit.is_finite());
        Self {
            spacing_us: positive(limits.max_fps).map_or(0.0, |fps| 1e6 / f64::from(fps)),
            share: positive(limits.max_cpu).map_or(0.0, f64::from),
            last_us: now_us,
            cpu_us,
            frame_due_us: now_us as f64,
            cpu_due_us: now_us as f64,
            started_us: now_us as f64,
        }
    }

    /// Whether processor time matters to it.
    pub fn needs_cpu_time(&self) -> bool {
        self.share > 0.0
    }

    /// Earliest time at which the next frame may be looked at; `now_us` or earlier if now.
    pub fn due_us(&mut self, now_us: u64) -> u64 {
        self.follow(now_us);
        // The hair keeps a rounding error from costing a wait of its own.
        libm::ceil(self.frame_due_us.max(self.cpu_due_us) - 1e-3).max(0.0) as u64
    }

    /// A frame is looked at from `now_us` on.
    pub fn started(&mut self, now_us: u64) {
        self.follow(now_us);
        self.started_us = now_us as f64;
        // A wait that ended late is made up for, by half a frame at most.
        let late = self.started_us - self.spacing_us / 2.0;
        self.frame_due_us = self.frame_due_us.max(late) + self.spacing_us;
    }

    /// It is done at `now_us`, and the process has used `cpu_us` in all.
    pub fn finished(&mut self, now_us: u64, cpu_us: u64) {
        self.follow(now_us);
        let used = cpu_us.saturating_sub(self.cpu_us) as f64;
        self.cpu_us = cpu_us;
        if self.share > 0.0 {
            self.cpu_due_us = self.cpu_due_us.max(self.started_us) + used / self.share;
        }
    }

    /// A clock that was set back takes the schedule with it.
    fn follow(&mut self, now_us: u64) {
        if now_us < self.last_us {
            let back = (self.last_us - now_us) as f64;
            self.frame_due_us -= back;
            self.cpu_due_us -= back;
            self.started_us -= back;
        }
        self.last_us = now_us;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs frames that each cost `cost` µs of wall and `cpu` µs of processor time for `span`;
    /// returns frames and processor time used.
    fn run(limits: Limits, cost: u64, cpu: u64, span: u64) -> (u64, u64) {
        let (mut now, mut used, mut frames) = (5_000, 700, 0);
        let mut governor = Governor::new(limits, now, used);
        while now < 5_000 + span {
            let due = governor.due_us(now);
            if due > now {
                now = due;
                assert!(governor.due_us(now) <= now, "a wait must end in a frame");
                continue;
            }
            governor.started(now);
            now += cost;
            used += cpu;
            frames += 1;
            governor.finished(now, used);
        }
        (frames, used - 700)
    }

    #[test]
    fn the_rate_is_held_exactly() {
        let limits = Limits {
            max_fps: Some(30.0),
            max_cpu: None,
        };
        let (frames, _) = run(limits, 2_000, 2_000, 100_000_000);
        assert!((3_000..=3_001).contains(&frames), "{frames}");
        // Too slow for the limit: it is not felt.
        let (frames, _) = run(limits, 50_000, 50_000, 100_000_000);
        assert_eq!(frames, 2_000);
    }

    #[test]
    fn no_limit_waits_for_nothing() {
        for odd in [None, Some(0.0), Some(-1.0), Some(f32::NAN)] {
            let limits = Limits {
                max_fps: odd,
                max_cpu: odd,
            };
            assert_eq!(run(limits, 1_000, 1_000, 1_000_000).0, 1_000);
        }
    }

    #[test]
    fn idleness_is_not_saved_up() {
        let limits = Limits {
            max_fps: Some(10.0),
            max_cpu: Some(0.5),
        };
        let mut governor = Governor::new(limits, 0, 0);
        let now = 3_600_000_000;
        assert!(governor.due_us(now) <= now);
        governor.started(now);
        assert_eq!(governor.due_us(now), now + 50_000);
        governor.finished(now + 80_000, 80_000);
        // 80 ms of work at half a core end 160 ms after it began.
        assert_eq!(governor.due_us(now + 80_000), now + 160_000);
    }

    #[test]
    fn a_clock_set_back_does_not_stall_the_frames() {
        let limits = Limits {
            max_fps: Some(10.0),
            max_cpu: Some(0.5),
        };
        let mut governor = Governor::new(limits, 9_000_000_000, 0);
        governor.started(9_000_000_000);
        governor.finished(9_000_010_000, 10_000);
        let due = governor.due_us(1_000_000);
        assert!(due <= 1_100_000, "{due}");
    }

    proptest! {
        /// Whatever frames cost, the processor time stays under the share, but for one frame.
        #[test]
        fn the_share_is_held(
            share in 0.05f32..2.0,
            cpu in 100u64..60_000,
            idle in 0u64..20_000,
        ) {
            let limits = Limits { max_fps: None, max_cpu: Some(share) };
            let span = 60_000_000;
            let (frames, used) = run(limits, cpu + idle, cpu, span);
            let allowed = f64::from(share) * span as f64;
            prop_assert!(used as f64 <= allowed + 2.0 * cpu as f64, "{used} of {allowed}");
            // Nor is it held down further than needed.
            let free = span as f64 / (cpu + idle) as f64;
            let want = free.min(allowed / cpu as f64);
            prop_assert!(frames as f64 >= 0.97 * want - 2.0, "{frames} of {want}");
        }
    }
}
