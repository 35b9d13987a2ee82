//! What is held: samples and runs of losses, ordered by number, in a table of fixed length.
//!
//! It cannot overflow: between two held samples of an epoch lies one gap, so there are at most as
//! many gaps as samples and epochs together, and when the table is full the losses of one gap are
//! booked under one reason. Numbers stay exact; the reason of some becomes their neighbour's.

use core::ops::RangeInclusive;

use flywheel_shared::ids::SampleKey;
use flywheel_shared::message::{LossReason, MAX_RANGES, Ranges};
use heapless::Vec;

use super::Pending;

/// Longest encoded loss record in bytes: a tag, five bytes of number, a reason.
pub(super) const LOSS_MAX: usize = 7;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Content {
    Sample {
        slot: u16,
        /// Bytes of its record.
        len: u32,
        value: f32,
    },
    Loss {
        reason: LossReason,
        /// Whether the journal has it.
        stored: bool,
    },
}

/// A sample, or losses with the numbers `key.seq..=last`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) key: SampleKey,
    pub(super) last: u32,
    pub(super) content: Content,
}

impl Entry {
    pub(super) fn is_stored(&self) -> bool {
        !matches!(self.content, Content::Loss { stored: false, .. })
    }

    fn end(&self) -> SampleKey {
        SampleKey {
            epoch: self.key.epoch,
            seq: self.last,
        }
    }

    fn numbers(&self) -> u32 {
        self.last - self.key.seq + 1
    }

    /// Whether `next` goes on where this ends.
    fn touches(&self, next: &Self) -> bool {
        self.key.epoch == next.key.epoch && self.last.checked_add(1) == Some(next.key.seq)
    }
}

pub(super) struct Table<const N: usize> {
    entries: Vec<Entry, N>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new() -> Self {
        Self {
            entries: Vec::new(),
        }
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Index of the first entry that ends at or behind `key`.
    fn position(&self, key: SampleKey) -> usize {
        self.entries.partition_point(|entry| entry.end() < key)
    }

    /// What a number stands for, if it is in the table.
    pub(super) fn get(&self, key: SampleKey) -> Option<Content> {
        let entry = self.entries.get(self.position(key))?;
        (entry.key <= key).then_some(entry.content)
    }

    /// Whether a number is in the table.
    pub(super) fn covers(&self, key: SampleKey) -> bool {
        self.get(key).is_some()
    }

    /// Whether any number of an epoch is.
    pub(super) fn holds(&self, epoch: u32) -> bool {
        self.entries.iter().any(|entry| entry.key.epoch == epoch)
    }

    pub(super) fn insert_sample(&mut self, key: SampleKey, slot: u16, len: u32, value: f32) {
        self.insert(Entry {
            key,
            last: key.seq,
            content: Content::Sample { slot, len, value },
        });
    }

    /// Books numbers as lost; those that the table has already are left as they are.
    pub(super) fn insert_loss(
        &mut self,
        epoch: u32,
        numbers: RangeInclusive<u32>,
        reason: LossReason,
        stored: bool,
    ) {
        while let Some(gap) = self.gap(epoch, numbers.clone()) {
            self.insert(Entry {
                key: SampleKey {
                    epoch,
                    seq: *gap.start(),
                },
                last: *gap.end(),
                content: Content::Loss { reason, stored },
            });
        }
    }

    fn insert(&mut self, entry: Entry) {
        let at = self.position(entry.key);
        // There is room: see the head of the module.
        if insert(&mut self.entries, at, entry).is_err() {
            debug_assert!(false, "more gaps than samples and epochs");
        }
        self.join(at, false);
        if let Some(before) = at.checked_sub(1) {
            self.join(before, false);
        }
        if self.entries.is_full() {
            let _ = (1..self.entries.len()).any(|at| self.join(at - 1, true));
        }
    }

    /// Melts the entry at `at` and the next one into one if they are losses that touch and were
    /// lost alike, or, if `force`, whatever their reasons.
    fn join(&mut self, at: usize, force: bool) -> bool {
        let [first, second] = match self.entries.get(at..at + 2) {
            Some(&[first, second]) if first.touches(&second) => [first, second],
            _ => return false,
        };
        let (
            Content::Loss { reason, stored },
            Content::Loss {
                reason: other,
                stored: also,
            },
        ) = (first.content, second.content)
        else {
            return false;
        };
        if !force && (reason, stored) != (other, also) {
            return false;
        }
        self.entries[at].last = second.last;
        self.entries[at].content = Content::Loss {
            reason,
            stored: stored && also,
        };
        remove(&mut self.entries, at + 1);
        true
    }

    /// Takes a sample out; returns its slot.
    pub(super) fn remove_sample(&mut self, key: SampleKey) -> Option<u16> {
        let at = self.position(key);
        match self.entries.get(at) {
            Some(&Entry {
                key: found,
                content: Content::Sample { slot, .. },
                ..
            }) if found == key => {
                remove(&mut self.entries, at);
                Some(slot)
            }
            _ => None,
        }
    }

    /// Takes everything up to `through` out.
    pub(super) fn release_through(&mut self, through: SampleKey) {
        self.entries.retain(|entry| entry.end() > through);
        if let Some(first) = self.entries.first_mut()
            && first.key <= through
        {
            first.key.seq = through.seq + 1;
        }
    }

    /// How many numbers there are up to `through`.
    pub(super) fn count_through(&self, through: SampleKey) -> u32 {
        let numbers = |entry: &Entry| match entry.end() <= through {
            true => entry.numbers(),
            false => through.seq - entry.key.seq + 1,
        };
        let up_to = self.entries.iter().take_while(|entry| entry.key <= through);
        up_to.map(numbers).sum()
    }

    /// The first number behind `key` and what it stands for.
    pub(super) fn after(&self, key: SampleKey) -> Option<(SampleKey, Content)> {
        let next = SampleKey {
            epoch: key.epoch,
            seq: key.seq.checked_add(1)?,
        };
        let entry = self.entries.get(self.position(next))?;
        Some((entry.key.max(next), entry.content))
    }

    /// The cheapest sample behind `sent` that is worth at most `value`, the oldest of equals.
    pub(super) fn least_valuable(&self, sent: SampleKey, value: f32) -> Option<(SampleKey, u16)> {
        let mut least: Option<(f32, SampleKey, u16)> = None;
        for entry in self.entries.iter().filter(|entry| entry.key > sent) {
            if let Content::Sample {
                slot, value: worth, ..
            } = entry.content
                && worth <= value
                && least.is_none_or(|(best, ..)| worth < best)
            {
                least = Some((worth, entry.key, slot));
            }
        }
        least.map(|(_, key, slot)| (key, slot))
    }

    /// The first numbers in `range` that the table does not have.
    pub(super) fn gap(
        &self,
        epoch: u32,
        range: RangeInclusive<u32>,
    ) -> Option<RangeInclusive<u32>> {
        let (mut low, high) = (*range.start(), *range.end());
        for entry in self.entries.iter().filter(|entry| entry.key.epoch == epoch) {
            if low > high || entry.key.seq > high {
                break;
            }
            if entry.last < low {
                continue;
            }
            if entry.key.seq > low {
                return Some(low..=entry.key.seq - 1);
            }
            low = entry.last.checked_add(1)?;
        }
        (low <= high).then_some(low..=high)
    }

    /// The first losses that the journal does not have.
    pub(super) fn unstored(&self) -> Option<Entry> {
        self.entries
            .iter()
            .find(|entry| !entry.is_stored())
            .copied()
    }

    /// The journal has the losses that begin at `key`.
    pub(super) fn mark_stored(&mut self, key: SampleKey) {
        let at = self.position(key);
        if let Some(entry) = self.entries.get_mut(at)
            && let Content::Loss { stored, .. } = &mut entry.content
        {
            *stored = true;
            self.join(at, false);
            if let Some(before) = at.checked_sub(1) {
                self.join(before, false);
            }
        }
    }

    /// What may be sent behind `sent`: nothing from the first loss on that the journal lacks.
    pub(super) fn pending(&self, sent: SampleKey) -> Pending {
        let mut pending = Pending::default();
        let sendable = self.entries.iter().take_while(|entry| entry.is_stored());
        for entry in sendable.filter(|entry| entry.end() > sent) {
            let numbers = match entry.key > sent {
                true => entry.numbers(),
                false => entry.last - sent.seq,
            };
            pending.records += numbers;
            pending.bytes += match entry.content {
                Content::Sample { len, .. } => u64::from(len),
                Content::Loss { .. } => u64::from(numbers) * LOSS_MAX as u64,
            };
        }
        pending
    }

    /// Of the numbers `1..=flagged`, how many come before the last ones that the journal lacks.
    pub(super) fn durable(&self, epoch: u32, flagged: u32) -> u32 {
        let mut durable = flagged;
        for entry in self.entries.iter().rev() {
            if entry.key.epoch == epoch && !entry.is_stored() && entry.last == durable {
                durable = entry.key.seq - 1;
            }
        }
        durable
    }

    /// The numbers of an epoch up to `last` as the wire wants them. If there are more ranges than
    /// it allows, the smallest gaps are closed, so the result is a superset.
    pub(super) fn ranges(&self, epoch: u32, last: u32) -> Ranges {
        let mut ranges = Ranges::new();
        let of_epoch = self.entries.iter().filter(|entry| entry.key.epoch == epoch);
        for entry in of_epoch.filter(|entry| entry.key.seq <= last) {
            let (low, high) = (entry.key.seq, entry.last.min(last));
            if let Some(end) = ranges.last_mut()
                && end.1 + 1 == low
            {
                end.1 = high;
                continue;
            }
            if ranges.len() == MAX_RANGES {
                close_smallest_gap(&mut ranges, low);
            }
            // The line above has made room; if the gap in front of `low` is the smallest, it
            // is closed by it.
            match ranges.is_full() {
                true => ranges[MAX_RANGES - 1].1 = high,
                false => drop(ranges.push((low, high))),
            }
        }
        ranges
    }
}

/// As [`Vec::insert`], which would be the only one to need `memmove`, 1.6 KB of a microcontroller's
/// flash; so would be `swap`.
pub(super) fn insert<T: Copy, const N: usize>(
    list: &mut Vec<T, N>,
    at: usize,
    item: T,
) -> Result<(), T> {
    list.push(item)?;
    for place in (at + 1..list.len()).rev() {
        list[place] = list[place - 1];
    }
    list[at] = item;
    Ok(())
}

/// As [`Vec::remove`], for the same reason; `at` is in the list.
pub(super) fn remove<T: Copy, const N: usize>(list: &mut Vec<T, N>, at: usize) {
    for place in at + 1..list.len() {
        list[place - 1] = list[place];
    }
    list.pop();
}

/// Closes the smallest gap between full ranges, unless the one in front of `next` is smaller.
fn close_smallest_gap(ranges: &mut Ranges, next: u32) {
    let gap = |at: usize| ranges[at + 1].0 - ranges[at].1;
    let at = (0..ranges.len() - 1).min_by_key(|&at| gap(at));
    if let Some(at) = at
        && gap(at) <= next - ranges[ranges.len() - 1].1
    {
        ranges[at].1 = ranges[at + 1].1;
        remove(ranges, at + 1);
    }
}
