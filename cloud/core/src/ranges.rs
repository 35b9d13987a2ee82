//! A set of sequence numbers as sorted ranges: a device that has sent a million samples without a
//! gap costs the store one pair of numbers.

use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use thiserror::Error;

/// A set of `u32`, kept as sorted, disjoint, non-adjacent inclusive ranges.
///
/// Serialized as a list of `(first, last)` pairs; a list that breaks the order is refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(u32, u32)>", into = "Vec<(u32, u32)>")]
pub struct RangeSet {
    ranges: Vec<(u32, u32)>,
}

/// A list of pairs that is not sorted, disjoint and non-adjacent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("range {index} ({first}..={last}) is reversed, out of order or touches the one before it")]
pub struct RangeError {
    /// Position in the list.
    pub index: usize,
    /// First number of the offending range.
    pub first: u32,
    /// Last number of the offending range.
    pub last: u32,
}

impl TryFrom<Vec<(u32, u32)>> for RangeSet {
    type Error = RangeError;

    fn try_from(ranges: Vec<(u32, u32)>) -> Result<Self, RangeError> {
        for (index, &(first, last)) in ranges.iter().enumerate() {
            let touches = index > 0 && u64::from(ranges[index - 1].1) + 1 >= u64::from(first);
            if first > last || touches {
                return Err(RangeError { index, first, last });
            }
        }
        Ok(Self { ranges })
    }
}

impl From<RangeSet> for Vec<(u32, u32)> {
    fn from(set: RangeSet) -> Self {
        set.ranges
    }
}

impl FromIterator<u32> for RangeSet {
    fn from_iter<I: IntoIterator<Item = u32>>(numbers: I) -> Self {
        let mut set = Self::default();
        for number in numbers {
            set.insert(number);
        }
        set
    }
}

impl RangeSet {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { ranges: Vec::new() }
    }

    /// The numbers of `range`; empty when it is reversed.
    #[must_use]
    pub fn from_range(range: RangeInclusive<u32>) -> Self {
        let mut set = Self::new();
        set.insert_range(range);
        set
    }

    /// Adds `number`; true when it was not there before.
    pub fn insert(&mut self, number: u32) -> bool {
        if self.contains(number) {
            return false;
        }
        self.insert_range(number..=number);
        true
    }

    /// Adds every number of `range`, merging what it overlaps or touches.
    pub fn insert_range(&mut self, range: RangeInclusive<u32>) {
        let (first, last) = (*range.start(), *range.end());
        if first > last {
            return;
        }
        // Everything in `from..to` overlaps or touches the new range and is merged into it.
        let from = self
            .ranges
            .partition_point(|r| u64::from(r.1) + 1 < u64::from(first));
        let to = self
            .ranges
            .partition_point(|r| u64::from(r.0) <= u64::from(last) + 1);
        let merged = if from < to {
            (
                first.min(self.ranges[from].0),
                last.max(self.ranges[to - 1].1),
            )
        } else {
            (first, last)
        };
        self.ranges.splice(from..to, [merged]);
    }

    /// Whether `number` is in the set.
    #[must_use]
    pub fn contains(&self, number: u32) -> bool {
        let at = self.ranges.partition_point(|r| r.1 < number);
        self.ranges.get(at).is_some_and(|r| r.0 <= number)
    }

    /// How many numbers it holds.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.ranges
            .iter()
            .map(|r| u64::from(r.1) - u64::from(r.0) + 1)
            .sum()
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Its greatest number.
    #[must_use]
    pub fn last(&self) -> Option<u32> {
        self.ranges.last().map(|r| r.1)
    }

    /// The ranges `(first, last)`, both inclusive, in order.
    #[must_use]
    pub fn ranges(&self) -> &[(u32, u32)] {
        &self.ranges
    }

    /// Every number, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.ranges.iter().flat_map(|r| r.0..=r.1)
    }

    /// What is in this set, in `other`, or in both.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut all: Vec<_> = self.ranges.iter().chain(&other.ranges).copied().collect();
        all.sort_unstable();
        let mut ranges: Vec<(u32, u32)> = Vec::with_capacity(all.len());
        for (first, last) in all {
            match ranges.last_mut() {
                Some(open) if u64::from(first) <= u64::from(open.1) + 1 => {
                    open.1 = open.1.max(last);
                }
                _ => ranges.push((first, last)),
            }
        }
        Self { ranges }
    }

    /// What is in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let (mut a, mut b) = (0, 0);
        let mut ranges = Vec::new();
        while let (Some(x), Some(y)) = (self.ranges.get(a), other.ranges.get(b)) {
            let (first, last) = (x.0.max(y.0), x.1.min(y.1));
            if first <= last {
                ranges.push((first, last));
            }
            if x.1 < y.1 {
                a += 1;
            } else {
                b += 1;
            }
        }
        Self { ranges }
    }

    /// What is in this set and not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut ranges = Vec::new();
        let mut at = 0;
        for &(first, last) in &self.ranges {
            // The next number of this range that is not yet dealt with; none once past `u32::MAX`.
            let mut next = Some(first);
            while other.ranges.get(at).is_some_and(|r| r.1 < first) {
                at += 1;
            }
            let mut cut = at;
            while let (Some(from), Some(r)) = (next, other.ranges.get(cut)) {
                if r.0 > last {
                    break;
                }
                if r.0 > from {
                    ranges.push((from, r.0 - 1));
                }
                next = r.1.checked_add(1);
                cut += 1;
            }
            if let Some(from) = next.filter(|&from| from <= last) {
                ranges.push((from, last));
            }
        }
        Self { ranges }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn numbers() -> impl Strategy<Value = Vec<u32>> {
        // Both ends of the domain, so that overflow at either would show.
        prop::collection::vec(prop_oneof![0_u32..40, (u32::MAX - 20)..=u32::MAX], 0..40)
    }

    fn well_formed(set: &RangeSet) -> bool {
        RangeSet::try_from(set.ranges.clone()).as_ref() == Ok(set)
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(a in numbers(), b in numbers()) {
            let (x, y): (BTreeSet<u32>, BTreeSet<u32>) =
                (a.iter().copied().collect(), b.iter().copied().collect());
            let (s, t): (RangeSet, RangeSet) =
                (a.iter().copied().collect(), b.iter().copied().collect());
            prop_assert!(well_formed(&s));
            prop_assert!(s.iter().eq(x.iter().copied()));
            prop_assert_eq!(s.len(), x.len() as u64);
            prop_assert_eq!(s.is_empty(), x.is_empty());
            prop_assert_eq!(s.last(), x.last().copied());
            for n in (0..45).chain((u32::MAX - 25)..=u32::MAX) {
                prop_assert_eq!(s.contains(n), x.contains(&n));
            }
            for (ours, plain) in [
                (s.union(&t), x.union(&y).copied().collect::<Vec<_>>()),
                (s.intersection(&t), x.intersection(&y).copied().collect()),
                (s.difference(&t), x.difference(&y).copied().collect()),
            ] {
                prop_assert!(well_formed(&ours), "{ours:?}");
                prop_assert_eq!(ours.iter().collect::<Vec<_>>(), plain);
            }
        }

        #[test]
        fn whole_ranges_agree(ranges in prop::collection::vec((0_u32..60, 0_u32..9), 0..12)) {
            let mut set = RangeSet::new();
            let mut plain = BTreeSet::new();
            for (first, more) in ranges {
                set.insert_range(first..=first + more);
                plain.extend(first..=first + more);
            }
            prop_assert!(well_formed(&set));
            prop_assert!(set.iter().eq(plain));
        }
    }

    #[test]
    fn insert_tells_whether_it_was_new_and_gapless_runs_stay_one_range() {
        let mut set: RangeSet = (1..=1000).collect();
        assert_eq!(set.ranges(), &[(1, 1000)]);
        assert!(!set.insert(500));
        assert!(set.insert(1002));
        assert!(set.insert(1001));
        assert_eq!(set.ranges(), &[(1, 1002)]);
        #[allow(clippy::reversed_empty_ranges)]
        set.insert_range(9..=3);
        assert_eq!(set.len(), 1002);
    }

    #[test]
    fn a_broken_list_is_refused() {
        for (bad, index) in [
            (vec![(3, 1)], 0),
            (vec![(1, 4), (5, 6)], 1),
            (vec![(5, 6), (1, 2)], 1),
        ] {
            assert_eq!(RangeSet::try_from(bad).map_err(|e| e.index), Err(index));
        }
    }
}
