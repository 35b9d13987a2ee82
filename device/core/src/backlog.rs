//! Which captured frames wait for inference, and which give way when it falls behind.
//!
//! A camera does not wait. Between the thread that captures and the one that looks stands a
//! backlog of a fixed number of frames; when it is full, the oldest frame gives way to the newest
//! and is counted, so that what is looked at is never older than the backlog is long. Such a frame
//! was never flagged, so the audit knows nothing of it.
//!
//! Only the bookkeeping is here: the caller keeps one preallocated buffer for each slot.

/// Most frames that a backlog holds.
pub const MAX_BACKLOG: usize = 64;

/// A waiting frame, and what had become of the frames before it when it was captured.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    index: u64,
    missed: u64,
    skipped: u64,
}

/// Where a captured frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Put {
    /// Number of the buffer, under the backlog's capacity.
    pub slot: usize,
    /// Index of the frame that gave way, if one had to.
    pub evicted: Option<u64>,
}

/// The oldest waiting frame. For every frame taken,
/// `index − first index = frames taken before + dropped + skipped`, exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Number of its buffer.
    pub slot: usize,
    /// Its index in the source.
    pub index: u64,
    /// Frames before it that were never looked at, since the backlog was made: given way or missed.
    pub dropped: u64,
    /// Indices before it at which the source had no frame, since the backlog was made.
    pub skipped: u64,
}

/// How far a source came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Index of the frame that is captured next.
    pub next: u64,
    /// Frames never looked at, since the backlog was made.
    pub dropped: u64,
    /// Indices without a frame, since the backlog was made.
    pub skipped: u64,
}

/// A bounded queue of frame indices that drops the oldest.
#[derive(Clone, Debug)]
pub struct Backlog {
    entries: [Entry; MAX_BACKLOG],
    capacity: usize,
    /// Slot of the oldest waiting frame.
    head: usize,
    len: usize,
    next: u64,
    evicted: u64,
    missed: u64,
    skipped: u64,
}

impl Backlog {
    /// An empty backlog of `capacity` frames (1 to [`MAX_BACKLOG`]) whose first frame has the
    /// index `first`.
    pub fn new(capacity: usize, first: u64) -> Self {
        Self {
            entries: [Entry::default(); MAX_BACKLOG],
            capacity: capacity.clamp(1, MAX_BACKLOG),
            head: 0,
            len: 0,
            next: first,
            evicted: 0,
            missed: 0,
            skipped: 0,
        }
    }

    /// How far the source came; frames that still wait count neither as seen nor as dropped.
    pub fn totals(&self) -> Totals {
        Totals {
            next: self.next,
            dropped: self.evicted + self.missed,
            skipped: self.skipped,
        }
    }

    /// Frames that wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no frame waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The next frame was captured.
    pub fn put(&mut self) -> Put {
        let mut evicted = None;
        if self.len == self.capacity {
            evicted = self.entries.get(self.head).map(|entry| entry.index);
            self.evicted += 1;
            self.pop();
        }
        let slot = (self.head + self.len) % self.capacity;
        if let Some(entry) = self.entries.get_mut(slot) {
            *entry = Entry {
                index: self.next,
                missed: self.missed,
                skipped: self.skipped,
            };
        }
        self.len += 1;
        self.next += 1;
        Put { slot, evicted }
    }

    /// The source has no frame at the next index.
    pub fn skip(&mut self) {
        self.skipped += 1;
        self.next += 1;
    }

    /// The next `frames` were not captured at all: their time had passed.
    pub fn miss(&mut self, frames: u64) {
        self.missed += frames;
        self.next = self.next.saturating_add(frames);
    }

    /// Takes the oldest waiting frame; its buffer may be filled again at once.
    pub fn take(&mut self) -> Option<Taken> {
        if self.len == 0 {
            return None;
        }
        let slot = self.head;
        let entry = *self.entries.get(slot)?;
        self.pop();
        Some(Taken {
            slot,
            index: entry.index,
            // Whatever gave way was older than what still waits.
            dropped: self.evicted + entry.missed,
            skipped: entry.skipped,
        })
    }

    fn pop(&mut self) {
        self.head = (self.head + 1) % self.capacity;
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_oldest_gives_way_and_order_is_kept() {
        let mut backlog = Backlog::new(2, 10);
        assert_eq!(backlog.take(), None);
        for (slot, evicted) in [(0, None), (1, None), (0, Some(10)), (1, Some(11))] {
            assert_eq!(backlog.put(), Put { slot, evicted });
        }
        let taken = backlog.take().unwrap();
        assert_eq!((taken.slot, taken.index, taken.dropped), (0, 12, 2));
        assert_eq!(backlog.take().unwrap().index, 13);
        assert!(backlog.is_empty());
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Put,
        Skip,
        Miss(u64),
        Take,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Put),
            1 => Just(Step::Skip),
            1 => (1u64..5).prop_map(Step::Miss),
            3 => Just(Step::Take),
        ]
    }

    proptest! {
        /// Against a queue of the standard library: the same frames in the same order, no two
        /// waiting frames in one buffer, and every index accounted for at every frame taken.
        #[test]
        fn every_index_is_seen_dropped_or_skipped(
            capacity in 1usize..8,
            steps in prop::collection::vec(step(), 1..400),
        ) {
            let first = 7;
            let mut backlog = Backlog::new(capacity, first);
            let mut model: std::collections::VecDeque<(usize, u64)> = Default::default();
            let mut next = first;
            let mut seen = 0;
            for step in steps {
                match step {
                    Step::Put => {
                        let put = backlog.put();
                        let oldest = (model.len() == capacity).then(|| model.pop_front()).flatten();
                        prop_assert_eq!(put.evicted, oldest.map(|(_, index)| index));
                        prop_assert!(put.slot < capacity);
                        prop_assert!(model.iter().all(|(slot, _)| *slot != put.slot));
                        model.push_back((put.slot, next));
                        next += 1;
                    }
                    Step::Skip => {
                        backlog.skip();
                        next += 1;
                    }
                    Step::Miss(frames) => {
                        backlog.miss(frames);
                        next += frames;
                    }
                    Step::Take => {
                        let taken = backlog.take();
                        let oldest = model.pop_front();
                        prop_assert_eq!(taken.map(|t| (t.slot, t.index)), oldest);
                        if let Some(taken) = taken {
                            prop_assert_eq!(
                                taken.index - first,
                                seen + taken.dropped + taken.skipped
                            );
                            seen += 1;
                        }
                    }
                }
                let totals = backlog.totals();
                prop_assert_eq!(totals.next, next);
                prop_assert_eq!(
                    next - first,
                    seen + totals.dropped + totals.skipped + model.len() as u64
                );
                prop_assert_eq!(backlog.len(), model.len());
            }
        }
    }
}
