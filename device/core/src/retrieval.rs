//! Whether a download comes fast enough to be waited for: a mirror that sends a byte a minute would
//! otherwise keep a device on its old model for good, without an error anywhere.
//!
//! Only time in which the device waits for bytes that it asked for counts, so that neither a dead
//! connection nor the device's own budget speaks against the sender.

use flywheel_shared::trust::TrustError;

/// What is expected of a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Least {
    /// Bytes a second over the whole download.
    pub rate: u32,
    /// Milliseconds that it may be behind that.
    pub patience_ms: u64,
}

impl Default for Least {
    /// 100 bytes a second, and ten minutes behind: a model of 1 MB within three hours of waiting.
    fn default() -> Self {
        Self {
            rate: 100,
            patience_ms: 600_000,
        }
    }
}

/// One download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retrieval {
    least: Least,
    waited_ms: u64,
    bytes: u64,
    /// Since when it waits.
    since_ms: Option<u64>,
}

impl Retrieval {
    /// A download that has not begun.
    pub fn new(least: Least) -> Self {
        Self {
            least,
            waited_ms: 0,
            bytes: 0,
            since_ms: None,
        }
    }

    /// Whether bytes are awaited, from now on. A clock that steps back costs the sender nothing.
    pub fn waits(&mut self, now_ms: u64, waits: bool) {
        if let Some(since_ms) = self.since_ms {
            self.waited_ms = self
                .waited_ms
                .saturating_add(now_ms.saturating_sub(since_ms));
        }
        self.since_ms = waits.then_some(now_ms);
    }

    /// Bytes came.
    pub fn came(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// When it is given up if nothing more comes: `None` while nothing is awaited. It rises with
    /// every byte, and a whole download of `n` bytes has `n / rate` seconds and the patience.
    pub fn deadline_ms(&self) -> Option<u64> {
        let earned_ms = self.bytes.saturating_mul(1000) / u64::from(self.least.rate.max(1));
        let left_ms = earned_ms
            .saturating_add(self.least.patience_ms)
            .saturating_sub(self.waited_ms);
        Some(self.since_ms?.saturating_add(left_ms))
    }

    /// Whether it may go on.
    ///
    /// # Errors
    /// [`TrustError::TooSlow`] from the deadline on.
    pub fn check(&self, now_ms: u64) -> Result<(), TrustError> {
        match self.deadline_ms() {
            Some(deadline_ms) if now_ms >= deadline_ms => Err(TrustError::TooSlow),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: Least = Least {
        rate: 100,
        patience_ms: 10_000,
    };

    #[test]
    fn attack_slow_retrieval_ends_at_the_deadline() {
        // A byte a second is 99 short of what is expected of each.
        let mut retrieval = Retrieval::new(LEAST);
        retrieval.waits(0, true);
        let mut given_up_at = None;
        for second in 1..1_000u64 {
            if retrieval.check(second * 1000).is_err() {
                given_up_at = Some(second);
                break;
            }
            retrieval.came(1);
        }
        assert_eq!(given_up_at, Some(11));
        assert_eq!(retrieval.check(11_000), Err(TrustError::TooSlow));
        // A sender that keeps the rate is waited for as long as it takes.
        let mut retrieval = Retrieval::new(LEAST);
        retrieval.waits(0, true);
        for second in 1..100_000u64 {
            retrieval.came(100);
            assert_eq!(retrieval.check(second * 1000), Ok(()));
        }
    }

    #[test]
    fn only_waiting_counts() {
        let mut retrieval = Retrieval::new(LEAST);
        assert_eq!(
            (retrieval.deadline_ms(), retrieval.check(u64::MAX)),
            (None, Ok(()))
        );
        retrieval.waits(1_000, true);
        retrieval.waits(4_000, false);
        assert_eq!(retrieval.check(u64::MAX), Ok(()));
        // A week later, 7 of the 10 s are left.
        retrieval.waits(700_000_000, true);
        assert_eq!(retrieval.deadline_ms(), Some(700_007_000));
        retrieval.came(50);
        assert_eq!(retrieval.deadline_ms(), Some(700_007_500));
        retrieval.waits(5, true);
        assert_eq!(retrieval.deadline_ms(), Some(7_505));
    }
}
