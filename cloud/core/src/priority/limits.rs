//! What no ranking may do, whatever its scores: pick more than so many of one track, or two
//! pictures of the same thing.

use super::geometry::{Rows, SAME};
use super::{Candidate, Options};
use std::collections::BTreeMap;

/// Perceptual hashes within this many bits are of one picture.
const SAME_HASH_BITS: u32 = 3;

/// The picks so far and what they forbid.
pub(super) struct Limits<'a> {
    candidates: &'a [Candidate<'a>],
    rows: &'a Rows,
    per_track: usize,
    reach: u64,
    /// Picks by device and frame; several at one frame are counted.
    frames: BTreeMap<&'a str, BTreeMap<u64, usize>>,
    hashes: Vec<u64>,
    picked: Vec<usize>,
    taken: Vec<bool>,
}

impl<'a> Limits<'a> {
    pub(super) fn new(candidates: &'a [Candidate<'a>], rows: &'a Rows, options: &Options) -> Self {
        Self {
            candidates,
            rows,
            per_track: options.per_track.max(1),
            reach: options.track_reach,
            frames: BTreeMap::new(),
            hashes: Vec::new(),
            picked: Vec::new(),
            taken: vec![false; candidates.len()],
        }
    }

    /// Takes the candidate if nothing forbids it; true when taken. `O(picks · dim)`.
    pub(super) fn take(&mut self, index: usize) -> bool {
        let candidate = &self.candidates[index];
        if self.taken[index] || !self.track_allows(candidate) || self.is_duplicate(index) {
            return false;
        }
        if let Some(track) = candidate.track {
            let frames = self.frames.entry(track.device).or_default();
            *frames.entry(track.frame).or_default() += 1;
        }
        self.hashes.extend(candidate.phash);
        self.picked.push(index);
        self.taken[index] = true;
        true
    }

    pub(super) fn is_taken(&self, index: usize) -> bool {
        self.taken[index]
    }

    fn track_allows(&self, candidate: &Candidate<'_>) -> bool {
        let Some(track) = candidate.track else {
            return true;
        };
        let Some(frames) = self.frames.get(track.device) else {
            return true;
        };
        let near = |frame: u64| {
            frames.range(frame.saturating_sub(self.reach)..=frame.saturating_add(self.reach))
        };
        let count = |frame: u64| near(frame).map(|(_, n)| n).sum::<usize>();
        // Neither the candidate nor any pick beside it may come to see more than the limit.
        count(track.frame) < self.per_track
            && near(track.frame).all(|(&frame, _)| count(frame) < self.per_track)
    }

    fn is_duplicate(&self, index: usize) -> bool {
        let same_hash = self.candidates[index].phash.is_some_and(|hash| {
            self.hashes
                .iter()
                .any(|h| (h ^ hash).count_ones() <= SAME_HASH_BITS)
        });
        same_hash
            || self.picked.iter().any(|&p| {
                let distance = self.rows.distance2(index, self.rows, p);
                distance.is_some_and(|d| d < SAME)
            })
    }
}
