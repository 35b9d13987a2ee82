//! Confidences that devices report for their uniform lane, under a rollout's model and under the
//! one before: what the drift gate judges by.

use std::collections::{BTreeMap, VecDeque};

use cloud_core::rollout::Confidence;
use flywheel_shared::message::Lane;

use super::record::Entry;
use crate::store::{Cursor, Store, StoreError};

/// Samples kept under each model; the newest.
const MOST: usize = 4096;
/// Samples read at a time.
const PAGE: usize = 1024;

/// What was seen so far of one rollout; lost with the process and read again.
struct Seen {
    after: Cursor,
    reference: VecDeque<f32>,
    recent: VecDeque<f32>,
}

/// What was seen so far, by rollout.
#[derive(Default)]
pub(super) struct Evidence {
    seen: BTreeMap<u64, Seen>,
}

impl Evidence {
    /// The confidences since a rollout began, if its policy asks for them.
    pub(super) fn of(
        &mut self,
        store: &Store,
        entry: &Entry,
        references: &[[u8; 8]],
    ) -> Result<Option<Confidence>, StoreError> {
        if entry.rollout.head.policy.gate.drift.is_none() || !entry.is_running() {
            self.seen.remove(&entry.number);
            return Ok(None);
        }
        let model = prefix(&entry.package.digest());
        let seen = self.seen.entry(entry.number).or_insert_with(|| Seen {
            after: entry.samples_after,
            reference: VecDeque::new(),
            recent: VecDeque::new(),
        });
        loop {
            let page = store.samples(seen.after, PAGE)?;
            let Some((last, _)) = page.last() else { break };
            seen.after = *last;
            for (_, sample) in page.iter().filter(|(_, s)| s.lane == Lane::Uniform) {
                let side = if sample.model == model {
                    &mut seen.recent
                } else if references.contains(&sample.model) {
                    &mut seen.reference
                } else {
                    continue;
                };
                if side.len() == MOST {
                    side.pop_front();
                }
                side.push_back(sample.scores.confidence);
            }
        }
        Ok(Some(Confidence::compare(
            seen.reference.make_contiguous(),
            seen.recent.make_contiguous(),
        )))
    }
}

/// How samples name the model that scored them.
pub(super) fn prefix(digest: &flywheel_shared::ids::Digest) -> [u8; 8] {
    let mut prefix = [0; 8];
    prefix.copy_from_slice(&digest.0[..8]);
    prefix
}
