//! Sets of sample numbers as inclusive ranges, which is how acknowledgements and books speak.

use flywheel_shared::message::{MAX_RANGES, Ranges};
use serde::{Deserialize, Serialize};

/// Inclusive ranges of numbers, ascending, neither overlapping nor touching.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeSet(Vec<(u32, u32)>);

impl RangeSet {
    /// Adds `low ..= high`; an empty range adds nothing.
    pub fn insert(&mut self, low: u32, high: u32) {
        if low > high {
            return;
        }
        // Everything that overlaps or touches the new range is melted into it.
        let first = self
            .0
            .partition_point(|&(_, end)| end.saturating_add(1) < low);
        let last = self
            .0
            .partition_point(|&(start, _)| start <= high.saturating_add(1));
        let merged = self.0[first..last]
            .iter()
            .fold((low, high), |(low, high), &(start, end)| {
                (low.min(start), high.max(end))
            });
        self.0.splice(first..last, [merged]);
    }

    /// Whether `number` is in the set.
    pub fn contains(&self, number: u32) -> bool {
        let at = self.0.partition_point(|&(_, end)| end < number);
        self.0.get(at).is_some_and(|&(start, _)| start <= number)
    }

    /// How many numbers the set holds.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|&(low, high)| high - low + 1).sum()
    }

    /// The largest number, 0 for the empty set.
    pub fn max(&self) -> u32 {
        self.0.last().map_or(0, |&(_, high)| high)
    }

    /// The ranges in ascending order.
    pub fn ranges(&self) -> &[(u32, u32)] {
        &self.0
    }

    /// The set in the form of the wire, which holds at most [`MAX_RANGES`] ranges. If there are
    /// more, the smallest gaps are closed, so the result is a superset.
    pub fn to_wire(&self) -> Ranges {
        let mut ranges = self.0.clone();
        while ranges.len() > MAX_RANGES {
            let gap = |at: &usize| ranges[at + 1].0 - ranges[*at].1;
            let Some(at) = (0..ranges.len() - 1).min_by_key(gap) else {
                break;
            };
            ranges[at].1 = ranges[at + 1].1;
            ranges.remove(at + 1);
        }
        ranges.into_iter().collect()
    }
}

impl FromIterator<u32> for RangeSet {
    fn from_iter<I: IntoIterator<Item = u32>>(numbers: I) -> Self {
        let mut set = Self::default();
        for number in numbers {
            set.insert(number, number);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(pieces in proptest::collection::vec((0u32..200, 0u32..12), 0..60)) {
            let mut set = RangeSet::default();
            let mut plain = BTreeSet::new();
            for (low, len) in pieces {
                set.insert(low, low + len);
                plain.extend(low..=low + len);
            }
            prop_assert_eq!(set.count() as usize, plain.len());
            prop_assert_eq!(set.max(), plain.last().copied().unwrap_or(0));
            for number in 0..230 {
                prop_assert_eq!(set.contains(number), plain.contains(&number));
            }
            for pair in set.ranges().windows(2) {
                prop_assert!(pair[0].1 + 1 < pair[1].0);
            }
            let wire = set.to_wire();
            prop_assert!(plain.iter().all(|n| wire.iter().any(|&(low, high)| low <= *n && *n <= high)));
        }
    }

    #[test]
    fn the_wire_form_closes_the_smallest_gaps() {
        let mut set: RangeSet = (0..40).map(|i| i * 2).collect();
        set.insert(1000, 1000);
        let wire = set.to_wire();
        assert_eq!(wire.len(), MAX_RANGES);
        assert_eq!(wire.last(), Some(&(1000, 1000)));
    }

    #[test]
    fn the_ends_of_the_number_line_are_ordinary() {
        let mut set = RangeSet::default();
        set.insert(u32::MAX, u32::MAX);
        set.insert(0, 0);
        set.insert(5, 4);
        assert_eq!(set.ranges(), [(0, 0), (u32::MAX, u32::MAX)]);
    }
}
