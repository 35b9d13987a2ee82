//! When a transfer is too slow to go on with.
//!
//! Who can't forge bytes may still hold a device by sending one now and then (slow retrieval, TUF).
//! Two bounds, both only while the device is connected: a least rate over each window, and a deadline
//! for the whole. A device that is offline for a week has not transferred slowly.

use flywheel_shared::trust::TrustError;

/// The bounds of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferLimits {
    /// Bytes that a window must bring, at least 1.
    pub window_bytes: u32,
    /// Length of a window in milliseconds, at least 1.
    pub window_ms: u64,
    /// Connected time for all of it in milliseconds.
    pub deadline_ms: u64,
}

impl Default for TransferLimits {
    /// 32 KiB a minute, and a day for all.
    fn default() -> Self {
        Self {
            window_bytes: 32 * 1024,
            window_ms: 60_000,
            deadline_ms: 24 * 60 * 60 * 1000,
        }
    }
}

/// One transfer under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    limits: TransferLimits,
    /// When the present window began.
    window_ms: u64,
    /// Bytes in it.
    bytes: u64,
    /// Connected time before the present window.
    spent_ms: u64,
    paused: bool,
}

impl Transfer {
    /// Begins a transfer at `now_ms` (any clock that does not run backwards), connected.
    pub fn start(limits: TransferLimits, now_ms: u64) -> Self {
        let limits = TransferLimits {
            window_bytes: limits.window_bytes.max(1),
            window_ms: limits.window_ms.max(1),
            ..limits
        };
        Self {
            limits,
            window_ms: now_ms,
            bytes: 0,
            spent_ms: 0,
            paused: false,
        }
    }

    /// Bytes came that were taken, or, with 0, time passed.
    ///
    /// # Errors
    /// [`TrustError::TooSlow`]: give the transfer up.
    pub fn progress(&mut self, now_ms: u64, bytes: u32) -> Result<(), TrustError> {
        if self.paused {
            return Ok(());
        }
        let window = now_ms.saturating_sub(self.window_ms);
        if self.spent_ms.saturating_add(window) >= self.limits.deadline_ms {
            return Err(TrustError::TooSlow);
        }
        self.bytes = self.bytes.saturating_add(u64::from(bytes));
        let enough = self.bytes >= u64::from(self.limits.window_bytes);
        if window >= self.limits.window_ms {
            if !enough {
                return Err(TrustError::TooSlow);
            }
            self.close(now_ms);
        }
        Ok(())
    }

    /// The connection is gone: the time until [`Transfer::resume`] does not count, and what the
    /// window brought counts for nothing.
    pub fn pause(&mut self, now_ms: u64) {
        if !self.paused {
            self.close(now_ms);
            self.paused = true;
        }
    }

    /// The connection is back.
    pub fn resume(&mut self, now_ms: u64) {
        if self.paused {
            self.window_ms = now_ms;
            self.paused = false;
        }
    }

    /// When [`Transfer::progress`] should be asked next though nothing came.
    pub fn due_ms(&self) -> u64 {
        if self.paused {
            return u64::MAX;
        }
        let left = self.limits.deadline_ms.saturating_sub(self.spent_ms);
        self.window_ms
            .saturating_add(left.min(self.limits.window_ms))
    }

    fn close(&mut self, now_ms: u64) {
        let window = now_ms.saturating_sub(self.window_ms);
        self.spent_ms = self.spent_ms.saturating_add(window);
        self.window_ms = now_ms;
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: TransferLimits = TransferLimits {
        window_bytes: 1000,
        window_ms: 10_000,
        deadline_ms: 100_000,
    };

    /// Feeds `bytes` every `every_ms` until it is given up; says when, or `None` by `until_ms`.
    fn drip(bytes: u32, every_ms: u64, until_ms: u64) -> Option<u64> {
        let mut transfer = Transfer::start(LIMITS, 5);
        let mut now = 5;
        while now < until_ms {
            // Whichever comes first, as a shell would.
            let next = now + every_ms;
            while transfer.due_ms() < next {
                now = transfer.due_ms();
                if transfer.progress(now, 0).is_err() {
                    return Some(now);
                }
            }
            now = next;
            if transfer.progress(now, bytes).is_err() {
                return Some(now);
            }
        }
        None
    }

    #[test]
    fn attack_slow_retrieval_a_drip_ends_with_its_first_window() {
        for (bytes, every_ms) in [(0, 1_000), (1, 1), (1, 1_000), (99, 1_000), (999, 10_000)] {
            let ended = drip(bytes, every_ms, 1_000_000).unwrap();
            assert!(
                ended <= 5 + 11_000 || bytes == 1 && every_ms == 1,
                "{bytes} {every_ms}: {ended}"
            );
        }
        // Nothing at all, and no clock tick but the one asked for.
        let mut silent = Transfer::start(LIMITS, 0);
        assert_eq!(silent.due_ms(), 10_000);
        assert_eq!(silent.progress(10_000, 0), Err(TrustError::TooSlow));
        // Seldom looked at, it counts all the same.
        let mut late = Transfer::start(LIMITS, 0);
        assert_eq!(late.progress(90_000, 500), Err(TrustError::TooSlow));
    }

    #[test]
    fn attack_slow_retrieval_a_burst_does_not_pay_for_later() {
        let mut transfer = Transfer::start(LIMITS, 0);
        assert_eq!(transfer.progress(1, u32::MAX), Ok(()));
        assert_eq!(transfer.progress(10_000, 0), Ok(()));
        assert_eq!(transfer.progress(20_000, 999), Err(TrustError::TooSlow));
    }

    #[test]
    fn attack_slow_retrieval_the_deadline_ends_even_the_least_rate() {
        let ended = drip(100, 1_000, 1_000_000).unwrap();
        assert_eq!(ended, 100_005);
        assert_eq!(drip(100, 1_000, 99_000), None);
        // Without a rate to speak of, the deadline alone.
        let limits = TransferLimits {
            window_bytes: 0,
            window_ms: 0,
            deadline_ms: 50,
        };
        let mut transfer = Transfer::start(limits, u64::MAX - 100);
        assert_eq!(transfer.progress(u64::MAX - 60, 1), Ok(()));
        assert_eq!(
            transfer.progress(u64::MAX - 50, 1),
            Err(TrustError::TooSlow)
        );
    }

    #[test]
    fn attack_slow_retrieval_time_offline_does_not_count_and_windows_start_anew() {
        let mut transfer = Transfer::start(LIMITS, 0);
        transfer.pause(4_000);
        assert_eq!(transfer.due_ms(), u64::MAX);
        assert_eq!(transfer.progress(900_000_000, 0), Ok(()));
        transfer.resume(900_000_000);
        transfer.resume(900_000_001);
        assert_eq!(transfer.progress(900_009_999, 0), Ok(()));
        let mut cut = transfer;
        assert_eq!(
            transfer.progress(900_010_000, 999),
            Err(TrustError::TooSlow)
        );
        // Cutting the connection just before a window ends gains a window, until the deadline.
        let mut now = 900_009_999;
        let mut windows = 0;
        while cut.progress(now, 1).is_ok() {
            cut.pause(now);
            cut.resume(now);
            now += 9_999;
            windows += 1;
            assert!(windows < 12);
        }
    }
}
