//! Where the best few percent of a stream begin, in constant memory: the P² algorithm (Jain &
//! Chlamtac, CACM 28(10), 1985) and a pair of them that forgets.

/// One quantile of everything seen, from five markers.
///
/// Marker heights are moved by the piecewise-parabolic formula of the paper, or linearly where
/// the parabola would leave the neighbours' order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct P2 {
    p: f32,
    count: u32,
    /// Heights: minimum, between, the quantile, between, maximum.
    heights: [f32; 5],
    /// Ranks of the markers among the observations, from 1.
    ranks: [u32; 5],
}

impl P2 {
    /// An estimator of the `p`-quantile; `p` is taken into [0, 1].
    pub fn new(p: f32) -> Self {
        Self {
            p: p.clamp(0.0, 1.0),
            count: 0,
            heights: [0.0; 5],
            ranks: [1, 2, 3, 4, 5],
        }
    }

    /// Number of observations taken.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Aims at another quantile from now on; markers walk there by one rank per observation.
    pub fn aim(&mut self, p: f32) {
        self.p = p.clamp(0.0, 1.0);
    }

    /// Takes one observation; one that is not finite is ignored.
    pub fn observe(&mut self, x: f32) {
        if !x.is_finite() || self.count == u32::MAX {
            return;
        }
        if let Some(place) = self.heights.get_mut(self.count as usize) {
            *place = x;
            self.count += 1;
            if self.count == 5 {
                sort(&mut self.heights);
            }
            return;
        }
        self.count += 1;
        let q = &mut self.heights;
        q[0] = q[0].min(x);
        q[4] = q[4].max(x);
        // The first marker above x, and all after it, gain a rank; marker 4 always does.
        let above = q[1..4].iter().position(|&height| x < height).unwrap_or(3) + 1;
        for rank in &mut self.ranks[above..] {
            *rank += 1;
        }
        let span = (self.count - 1) as f32;
        for (i, share) in [(1, self.p / 2.0), (2, self.p), (3, (1.0 + self.p) / 2.0)] {
            let offset = 1.0 + span * share - self.ranks[i] as f32;
            if offset >= 1.0 && self.ranks[i + 1] - self.ranks[i] > 1 {
                self.heights[i] = self.moved(i, 1.0);
                self.ranks[i] += 1;
            } else if offset <= -1.0 && self.ranks[i] - self.ranks[i - 1] > 1 {
                self.heights[i] = self.moved(i, -1.0);
                self.ranks[i] -= 1;
            }
        }
    }

    /// The estimate; `None` before the first observation. Exact (nearest rank) up to five.
    pub fn value(&self) -> Option<f32> {
        match self.count {
            0 => None,
            1..=4 => {
                let n = self.count as usize;
                let mut few = self.heights;
                sort(&mut few[..n]);
                Some(few[libm::roundf(self.p * (n - 1) as f32) as usize])
            }
            _ => Some(self.heights[2]),
        }
    }

    /// Height of marker `i` after a move by `step` (±1) ranks.
    fn moved(&self, i: usize, step: f32) -> f32 {
        let q = &self.heights;
        let [below, here, above] = [i - 1, i, i + 1].map(|j| self.ranks[j] as f32);
        let rise = (q[i + 1] - q[i]) / (above - here);
        let fall = (q[i] - q[i - 1]) / (here - below);
        let parabolic = q[i]
            + step / (above - below)
                * ((here - below + step) * rise + (above - here - step) * fall);
        if q[i - 1] < parabolic && parabolic < q[i + 1] {
            parabolic
        } else if step > 0.0 {
            q[i] + rise
        } else {
            q[i] - fall
        }
    }
}

/// Insertion sort, since there are five values at most and `core`'s sorts are 1.7 KB of code.
fn sort(values: &mut [f32]) {
    for end in 1..values.len() {
        let mut at = end;
        while at > 0 && values[at - 1].total_cmp(&values[at]).is_gt() {
            values.swap(at - 1, at);
            at -= 1;
        }
    }
}

/// A quantile of the recent past: two [`P2`] half a window apart. The older answers; when it has
/// seen a window, the younger takes its place. So an answer always rests on the last half to whole
/// window, and a stream that drifts is followed within one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recent {
    window: u32,
    older: P2,
    younger: P2,
}

impl Recent {
    /// An estimator of the `p`-quantile over the last `window` observations (at least 10).
    pub fn new(p: f32, window: u32) -> Self {
        Self {
            window: window.max(10),
            older: P2::new(p),
            younger: P2::new(p),
        }
    }

    /// Aims at another quantile from now on.
    pub fn aim(&mut self, p: f32) {
        self.older.aim(p);
        self.younger.aim(p);
    }

    /// Takes one observation; one that is not finite is ignored.
    pub fn observe(&mut self, x: f32) {
        self.older.observe(x);
        if self.older.count > self.window / 2 {
            self.younger.observe(x);
        }
        if self.older.count >= self.window {
            self.older = self.younger;
            self.younger = P2::new(self.older.p);
        }
    }

    /// The estimate; `None` before the first observation.
    pub fn value(&self) -> Option<f32> {
        self.older.value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// A plain generator: tests need repeatable numbers, not good ones.
    fn uniform(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = crate::sketch::mix(state.wrapping_add(0x9E37_79B9_7F4A_7C15));
            (state >> 40) as f32 / (1u64 << 24) as f32
        }
    }

    /// Share of `sorted` below `x`.
    fn rank(sorted: &[f32], x: f32) -> f32 {
        sorted.partition_point(|&y| y < x) as f32 / sorted.len() as f32
    }

    #[test]
    fn the_papers_own_example() {
        // Table I of the paper: the median of these 20 observations is estimated as 4.44.
        let mut p2 = P2::new(0.5);
        for x in [
            0.02, 0.15, 0.74, 3.39, 0.83, 22.37, 10.15, 15.43, 38.62, 15.92, 34.60, 10.28, 1.47,
            0.40, 0.05, 11.39, 0.27, 0.42, 0.09, 11.37,
        ] {
            p2.observe(x);
        }
        let value = p2.value().unwrap();
        assert!((value - 4.44).abs() < 0.01, "{value}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn close_to_the_exact_quantile(seed in any::<u64>(), p in 0.05f32..0.99, shape in 0u8..3) {
            let mut next = uniform(seed);
            let mut p2 = P2::new(p);
            let mut all = Vec::new();
            for _ in 0..3000 {
                let u = next();
                let x = match shape {
                    0 => u,
                    1 => -libm::logf(1.0 - u),
                    _ => u + next() + next() + next(),
                };
                p2.observe(x);
                all.push(x);
            }
            all.sort_by(f32::total_cmp);
            let got = rank(&all, p2.value().unwrap());
            prop_assert!((got - p).abs() < 0.03, "aimed at {p}, hit {got}");
        }

        #[test]
        fn stays_within_what_was_seen(xs in prop::collection::vec(prop_oneof![-5.0f32..5.0, Just(f32::NAN), Just(1.0)], 0..200), p in 0.0f32..=1.0) {
            let mut recent = Recent::new(p, 20);
            for (i, &x) in xs.iter().enumerate() {
                recent.observe(x);
                recent.aim((p + i as f32 * 0.01) % 1.0);
                if let Some(value) = recent.value() {
                    prop_assert!((-5.0..=5.0).contains(&value));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn the_sort_is_that_of_the_library(bits in prop::collection::vec(any::<u32>(), 0..6)) {
            let mut ours: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let mut plain = ours.clone();
            sort(&mut ours);
            plain.sort_by(f32::total_cmp);
            prop_assert!(ours.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }

    #[test]
    fn follows_a_jump_within_a_window() {
        let mut next = uniform(3);
        let mut recent = Recent::new(0.9, 400);
        for _ in 0..5000 {
            recent.observe(next());
        }
        for _ in 0..600 {
            recent.observe(100.0 + next());
        }
        let value = recent.value().unwrap();
        assert!((100.8..101.0).contains(&value), "{value}");
    }

    #[test]
    fn a_moved_aim_is_followed() {
        let mut next = uniform(4);
        let mut recent = Recent::new(0.5, 400);
        for _ in 0..1000 {
            recent.observe(next());
        }
        recent.aim(0.95);
        for _ in 0..800 {
            recent.observe(next());
        }
        let value = recent.value().unwrap();
        assert!((0.92..0.98).contains(&value), "{value}");
    }
}
