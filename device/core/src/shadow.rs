//! Which frames a second model looks at beside the live one.
//!
//! A candidate on trial, or a second model that the configuration names, costs its own inference,
//! so it may run on a share of the frames. The choice is a function of seed and frame index: a
//! restart chooses the same frames, and so does every run of the same seed. It is drawn rather
//! than counted off, since every n-th frame may always show the same phase of something periodic.

use crate::sketch::mix;

/// Whether the second model looks at frame `index`. `share` is 0 (never) to 1 (always); what is no
/// number counts as 0.
pub fn looks(seed: u64, index: u64, share: f32) -> bool {
    if share >= 1.0 {
        return true;
    }
    // 24 bits are what an f32 holds exactly.
    let draw = (mix(mix(seed ^ 0x5ad0) ^ index) >> 40) as f32 / (1u64 << 24) as f32;
    draw < share
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(seed: u64, share: f32) -> usize {
        (0..20_000)
            .filter(|index| looks(seed, *index, share))
            .count()
    }

    #[test]
    fn the_share_is_kept_and_the_ends_are_exact() {
        assert_eq!(chosen(1, 1.0), 20_000);
        for never in [0.0, -1.0, f32::NAN] {
            assert_eq!(chosen(1, never), 0);
        }
        for share in [0.05, 0.3, 0.75] {
            let found = chosen(1, share) as f32 / 20_000.0;
            // Five standard deviations of a binomial are under 0.018.
            assert!((found - share).abs() < 0.018, "{found} for {share}");
        }
    }

    #[test]
    fn a_larger_share_looks_at_all_that_a_smaller_one_does() {
        for index in 0..2_000 {
            assert!(!looks(7, index, 0.2) || looks(7, index, 0.4));
        }
    }

    #[test]
    fn seeds_choose_differently_and_neighbours_are_independent() {
        let both = |a: &dyn Fn(u64) -> bool, b: &dyn Fn(u64) -> bool| {
            (0..20_000).filter(|i| a(*i) && b(*i)).count() as f32 / 20_000.0
        };
        let one = |i| looks(1, i, 0.5);
        let other = |i| looks(2, i, 0.5);
        let later = |i| looks(1, i + 1, 0.5);
        assert!((both(&one, &other) - 0.25).abs() < 0.016);
        assert!((both(&one, &later) - 0.25).abs() < 0.016);
    }
}
