//! How many bytes may leave: a token bucket in exact integers, so that the budget is a law and not
//! a tendency.

/// Fraction bits of an [`Amount`].
const BITS: u32 = 16;

/// A number of bytes in units of 1/65536.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Amount(u64);

impl Amount {
    /// Whole bytes.
    pub const fn bytes(bytes: u32) -> Self {
        Self((bytes as u64) << BITS)
    }

    /// `ratio` of `bytes`, rounded down; the ratio is taken into [0, 1] and down to 1/65536.
    pub fn share(bytes: u32, ratio: f32) -> Self {
        Self(u64::from(bytes) * u64::from(Self::parts(ratio)))
    }

    /// `ratio` of this amount, rounded down.
    pub fn times(self, ratio: f32) -> Self {
        let parts = u128::from(Self::parts(ratio));
        Self(((u128::from(self.0) * parts) >> BITS) as u64)
    }

    /// Both together; stops at the largest amount.
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// Whole bytes in it.
    pub fn whole(self) -> u64 {
        self.0 >> BITS
    }

    /// This amount as a share of `other`, 0 if that is nothing.
    pub fn over(self, other: Self) -> f32 {
        if other.0 == 0 {
            0.0
        } else {
            self.0 as f32 / other.0 as f32
        }
    }

    fn parts(ratio: f32) -> u32 {
        // The cast takes NaN to 0.
        (ratio.clamp(0.0, 1.0) * (1u32 << BITS) as f32) as u32
    }
}

/// A bucket that fills by what the caller credits (a share of the bytes seen, so that no clock is
/// needed) or by the passing of time, and never holds more than its capacity.
///
/// In every stretch of its life, `taken ≤ credited + capacity`. It is never overdrawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    capacity: Amount,
    level: Amount,
    /// When [`Bucket::advance`] was last called.
    at_ms: Option<u64>,
}

impl Bucket {
    /// A bucket that holds `level` of at most `capacity`.
    pub fn new(capacity: Amount, level: Amount) -> Self {
        Self {
            capacity,
            level: level.min(capacity),
            at_ms: None,
        }
    }

    /// What it holds.
    pub fn level(&self) -> Amount {
        self.level
    }

    /// What it can hold.
    pub fn capacity(&self) -> Amount {
        self.capacity
    }

    /// Changes what it can hold; what no longer fits is lost.
    pub fn resize(&mut self, capacity: Amount) {
        self.capacity = capacity;
        self.level = self.level.min(capacity);
    }

    /// Fills in `amount`; returns what did not fit.
    pub fn credit(&mut self, amount: Amount) -> Amount {
        let room = Amount(self.capacity.0 - self.level.0);
        let fits = room.min(amount);
        self.level.0 += fits.0;
        Amount(amount.0 - fits.0)
    }

    /// Fills by time: `bytes_per_second` since the last call. A clock that steps back fills
    /// nothing.
    pub fn advance(&mut self, now_ms: u64, bytes_per_second: u32) {
        let passed = now_ms.saturating_sub(self.at_ms.unwrap_or(now_ms));
        self.at_ms = Some(now_ms.max(self.at_ms.unwrap_or(0)));
        let earned = u128::from(passed) * u128::from(Amount::bytes(bytes_per_second).0) / 1000;
        self.credit(Amount(earned.min(u128::from(u64::MAX)) as u64));
    }

    /// Takes `amount` if the bucket still holds `reserve` afterwards; false if it does not.
    pub fn take(&mut self, amount: Amount, reserve: Amount) -> bool {
        let enough = self.level.0 >= amount.0.saturating_add(reserve.0);
        if enough {
            self.level.0 -= amount.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    proptest! {
        /// The law of the bucket over every stretch, not only from the start.
        #[test]
        fn taken_never_exceeds_credited_plus_capacity(
            capacity in 0u32..5000,
            ratio in 0.0f32..=1.0,
            steps in prop::collection::vec((0u32..4000, 0u32..3000, 0u32..800), 1..120),
        ) {
            let mut bucket = Bucket::new(Amount::bytes(capacity), Amount::bytes(capacity));
            let mut history: Vec<(f64, f64)> = Vec::new();
            for (seen, want, reserve) in steps {
                bucket.credit(Amount::share(seen, ratio));
                let before = bucket.level();
                let took = bucket.take(Amount::bytes(want), Amount::bytes(reserve));
                prop_assert_eq!(took, before >= Amount::bytes(want + reserve));
                history.push((f64::from(seen) * f64::from(ratio), if took { f64::from(want) } else { 0.0 }));
            }
            for from in 0..history.len() {
                let (mut credited, mut taken) = (0.0, 0.0);
                for (c, t) in &history[from..] {
                    credited += c;
                    taken += t;
                    prop_assert!(taken <= credited + f64::from(capacity) + 1e-6);
                }
            }
        }
    }

    #[test]
    fn fills_by_time_and_not_by_a_clock_that_steps_back() {
        let mut bucket = Bucket::new(Amount::bytes(1000), Amount::default());
        bucket.advance(5_000, 100);
        assert_eq!(bucket.level(), Amount::default());
        bucket.advance(7_500, 100);
        assert_eq!(bucket.level().whole(), 250);
        bucket.advance(1_000, 100);
        bucket.advance(7_500, 100);
        assert_eq!(bucket.level().whole(), 250);
        bucket.advance(u64::MAX, 100);
        assert_eq!(bucket.level().whole(), 1000);
    }

    #[test]
    fn ratios_are_rounded_down() {
        assert_eq!(Amount::share(1000, f32::NAN), Amount::default());
        assert_eq!(Amount::share(1000, 7.0).whole(), 1000);
        assert_eq!(Amount::share(1_000_000, 0.04).whole(), 39_993);
        assert_eq!(Amount::bytes(100).times(0.5).whole(), 50);
        assert_eq!(Amount::bytes(1).over(Amount::bytes(4)), 0.25);
    }
}
