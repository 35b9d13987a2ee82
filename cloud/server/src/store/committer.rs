//! The one thread that writes. It takes everything that waits, writes it with one sync, applies it
//! to the index, and only then answers: the more that comes at once, the less each costs.

use std::collections::BTreeMap;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use flywheel_shared::ids::DeviceId;
use flywheel_shared::message;

use super::batch::Batch;
use super::index::{Head, Index, View, encode, is_known};
use super::log::Log;
use super::{StoreError, Traffic};

/// Most jobs answered by one sync.
const MAX_GROUP: usize = 256;
/// Most batch bytes written by one sync.
const MAX_GROUP_BYTES: usize = 8 * 1024 * 1024;

/// Called once with the outcome, in the committer's thread, so it must be quick.
pub(super) type Reply<T> = Box<dyn FnOnce(Result<T, StoreError>) + Send>;

/// A batch to ingest, known to decode, so that no log entry can ever be one that does not.
pub struct Commit {
    device: DeviceId,
    received_ms: u64,
    epoch: u32,
    numbers: Vec<u32>,
    batch: Vec<u8>,
}

/// Why bytes are not a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// They do not decode, or some are left over.
    #[error("the batch does not decode")]
    Malformed,
    /// The number of records is not what the batch says.
    #[error("the batch does not hold as many records as it says")]
    Count,
    /// Sample numbers start at 1 and stand once in a batch.
    #[error("a sample number is 0 or stands twice in the batch")]
    Number,
}

impl Commit {
    /// Checks everything about a wire `Batch` (postcard) but its signature.
    pub fn new(device: &DeviceId, received_ms: u64, batch: &[u8]) -> Result<Self, BatchError> {
        let (wire, rest) = postcard::take_from_bytes::<message::Batch<'_>>(batch)
            .map_err(|_| BatchError::Malformed)?;
        if !rest.is_empty() {
            return Err(BatchError::Malformed);
        }
        let mut numbers = Vec::with_capacity(usize::from(wire.count));
        for record in message::records(wire.records) {
            numbers.push(record.map_err(|_| BatchError::Malformed)?.seq());
        }
        if numbers.len() != usize::from(wire.count) || numbers.is_empty() {
            return Err(BatchError::Count);
        }
        numbers.sort_unstable();
        if numbers[0] == 0 || !numbers.is_sorted_by(|a, b| a < b) {
            return Err(BatchError::Number);
        }
        Ok(Self {
            device: device.clone(),
            received_ms,
            epoch: wire.epoch,
            numbers,
            batch: batch.to_vec(),
        })
    }

    /// The epoch of its records.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The numbers of its records, ascending.
    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }
}

/// What the committer does for others.
pub(super) enum Job {
    /// Ingest.
    Commit(Commit, Reply<()>),
    /// Change records and streams; answered with the numbers of the events.
    Write(Batch, Reply<Vec<u64>>),
}

/// Counters that wait to be added to the index.
pub(super) type Pending = Mutex<BTreeMap<DeviceId, Traffic>>;

pub(super) struct Committer {
    pub(super) index: Arc<Index>,
    pub(super) log: Log,
    pub(super) pending: Arc<Pending>,
}

impl Committer {
    /// Works until all senders are gone.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            let mut bytes = first.len();
            let mut group = vec![first];
            while group.len() < MAX_GROUP && bytes < MAX_GROUP_BYTES {
                let Ok(next) = jobs.try_recv() else { break };
                bytes += next.len();
                group.push(next);
            }
            self.commit(group);
        }
        // Counters are the only thing that may still be in memory alone.
        let flushed = self.apply(&[], &[], &[]).and_then(|_| self.index.barrier());
        if let Err(error) = flushed {
            tracing::error!(%error, "the index could not be flushed at the end");
        }
    }

    fn commit(&mut self, group: Vec<Job>) {
        let (mut commits, mut writes, mut write_replies) = (Vec::new(), Vec::new(), Vec::new());
        for job in group {
            match job {
                Job::Commit(commit, reply) => commits.push((commit, reply)),
                Job::Write(batch, reply) => {
                    writes.push(batch);
                    write_replies.push(reply);
                }
            }
        }
        let selected = self
            .recover_if_failed()
            .and_then(|()| self.select(&commits));
        let entries = match selected {
            Ok(entries) => entries,
            Err(error) => {
                for (_, reply) in commits {
                    reply(Err(error.clone()));
                }
                for reply in write_replies {
                    reply(Err(error.clone()));
                }
                return;
            }
        };
        let payloads: Vec<_> = entries.iter().flatten().cloned().collect();
        let appended = if payloads.is_empty() {
            Ok(Vec::new())
        } else {
            self.log.append(&payloads)
        };
        let positions = appended.as_deref().unwrap_or_default();
        // After a failed append no payload has a position, and only the writes are applied.
        let applied = self.apply(positions, &payloads, &writes).or_else(|error| {
            tracing::warn!(%error, "the index failed; opening it again");
            self.index.recover(&self.log)?;
            self.apply(positions, &payloads, &writes)
        });
        // A commit without an entry may repeat one of this group, so it shares the outcome.
        for (_, reply) in commits {
            reply(match (&appended, &applied) {
                (Err(error), _) | (_, Err(error)) => Err(error.clone()),
                (Ok(_), Ok(_)) => Ok(()),
            });
        }
        if write_replies.is_empty() {
            return;
        }
        let numbers = applied.and_then(|numbers| self.index.barrier().map(|()| numbers));
        match numbers {
            Ok(numbers) => {
                for (reply, numbers) in write_replies.into_iter().zip(numbers) {
                    reply(Ok(numbers));
                }
            }
            Err(error) => {
                for reply in write_replies {
                    reply(Err(error.clone()));
                }
            }
        }
    }

    fn recover_if_failed(&self) -> Result<(), StoreError> {
        if self.index.failed() {
            self.index.recover(&self.log)?;
            tracing::info!("the index works again");
        }
        Ok(())
    }

    /// The log entry of each commit; none where every record is known, so that a device that never
    /// heard an acknowledgement does not grow the log.
    fn select(&self, commits: &[(Commit, Reply<()>)]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        let mut ledgers = BTreeMap::new();
        let mut entries = Vec::with_capacity(commits.len());
        for (commit, _) in commits {
            let key = (commit.device.clone(), commit.epoch);
            if !ledgers.contains_key(&key) {
                let ledger = self.index.ledger(&commit.device, commit.epoch)?;
                ledgers.insert(key.clone(), ledger);
            }
            let Some(ledger) = ledgers.get_mut(&key) else {
                continue;
            };
            let fresh = commit.numbers.iter().any(|seq| !is_known(ledger, *seq));
            if !fresh {
                entries.push(None);
                continue;
            }
            // Loss or sample does not matter here: what counts is that the number is taken.
            for seq in &commit.numbers {
                ledger.ingested.insert(*seq);
            }
            let head = Head::Batch {
                device: commit.device.clone(),
                received_ms: commit.received_ms,
            };
            let mut payload = encode("log", &head)?;
            payload.extend_from_slice(&commit.batch);
            entries.push(Some(payload));
        }
        Ok(entries)
    }

    /// One atomic step of the index: log entries, writes and counters. Returns the event numbers
    /// of each write.
    fn apply(
        &self,
        positions: &[u64],
        payloads: &[Vec<u8>],
        writes: &[Batch],
    ) -> Result<Vec<Vec<u64>>, StoreError> {
        // Held until they are in the index, so that a reader finds each count in one place.
        let mut counters = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let numbers = self.index.with(|db| {
            let mut view = View::new(db);
            for (position, payload) in positions.iter().zip(payloads) {
                view.apply_entry(*position, payload)?;
            }
            let numbers = writes.iter().map(|write| view.apply_batch(write));
            let numbers = numbers.collect::<Result<Vec<_>, _>>()?;
            for (device, traffic) in &*counters {
                view.add_traffic(device, traffic)?;
            }
            view.set_applied(self.log.end());
            view.commit()?;
            Ok(numbers)
        })?;
        counters.clear();
        Ok(numbers)
    }
}

impl Job {
    fn len(&self) -> usize {
        match self {
            Self::Commit(commit, _) => commit.batch.len(),
            Self::Write(..) => 0,
        }
    }
}
