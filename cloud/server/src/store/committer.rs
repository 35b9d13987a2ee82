//! The one thread that writes. It takes everything that waits, writes it with one sync, applies it
//! to the index, and only then answers: the more that comes at once, the less each costs.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use flywheel_shared::ids::DeviceId;
use flywheel_shared::message;

use super::batch::{Batch, Change};
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
    /// Change records in the index alone; an empty batch is answered once everything before it is
    /// on the medium.
    Note(Batch, Reply<()>),
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
        // Notes and counters are all that may still be in memory alone.
        let flushed = self
            .apply(&[], &[], &[])
            .and_then(|()| self.index.barrier());
        if let Err(error) = flushed {
            tracing::error!(%error, "the index could not be flushed at the end");
        }
    }

    fn commit(&mut self, group: Vec<Job>) {
        let (mut commits, mut writes, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for job in group {
            match job {
                Job::Commit(commit, reply) => commits.push((commit, reply)),
                Job::Write(batch, reply) => writes.push((batch, reply)),
                Job::Note(batch, reply) => notes.push((batch, reply)),
            }
        }
        let outcome = self.store(&commits, &mut writes, &notes);
        // A commit without an entry may repeat one of this group, so it shares the outcome.
        for (_, reply) in commits {
            reply(outcome.clone());
        }
        for (batch, reply) in writes {
            reply(outcome.clone().map(|()| numbers(&batch)));
        }
        let flush = notes.iter().any(|(batch, _)| batch.is_empty());
        let noted = match outcome {
            // What is noted does not need the log.
            Err(StoreError::Full { .. }) => self.apply_notes(&notes),
            outcome => outcome,
        };
        let noted = noted.and_then(|()| if flush { self.index.barrier() } else { Ok(()) });
        for (_, reply) in notes {
            reply(noted.clone());
        }
    }

    /// Makes a group durable and applies it to the index.
    fn store(
        &mut self,
        commits: &[(Commit, Reply<()>)],
        writes: &mut [(Batch, Reply<Vec<u64>>)],
        notes: &[(Batch, Reply<()>)],
    ) -> Result<(), StoreError> {
        self.recover_if_failed()?;
        self.number(writes)?;
        let mut payloads = self.select(commits)?;
        for (batch, _) in &*writes {
            let changes = batch.changes().to_vec();
            payloads.push(encode("log", &Head::Write { changes })?);
        }
        let positions = if payloads.is_empty() {
            Vec::new()
        } else {
            self.log.append(&payloads)?
        };
        self.apply(&positions, &payloads, notes).or_else(|error| {
            tracing::warn!(%error, "the index failed; opening it again");
            // This applies what is in the log already.
            self.index.recover(&self.log)?;
            self.apply_notes(notes)
        })
    }

    /// Gives the events of a group their numbers.
    fn number(&self, writes: &mut [(Batch, Reply<Vec<u64>>)]) -> Result<(), StoreError> {
        let mut next = BTreeMap::<String, u64>::new();
        for (batch, _) in writes {
            for change in batch.changes_mut() {
                if let Change::Event { stream, number, .. } = change {
                    let next = match next.entry(stream.clone()) {
                        Entry::Occupied(entry) => entry.into_mut(),
                        Entry::Vacant(entry) => entry.insert(self.index.next_event(stream)?),
                    };
                    *number = *next;
                    *next += 1;
                }
            }
        }
        Ok(())
    }

    fn recover_if_failed(&self) -> Result<(), StoreError> {
        if self.index.failed() {
            self.index.recover(&self.log)?;
            tracing::info!("the index works again");
        }
        Ok(())
    }

    /// The log entries of the commits; none where every record is known, so that a device that
    /// never heard an acknowledgement does not grow the log.
    fn select(&self, commits: &[(Commit, Reply<()>)]) -> Result<Vec<Vec<u8>>, StoreError> {
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
            entries.push(payload);
        }
        Ok(entries)
    }

    /// One atomic step of the index: log entries, notes and counters.
    fn apply(
        &self,
        positions: &[u64],
        payloads: &[Vec<u8>],
        notes: &[(Batch, Reply<()>)],
    ) -> Result<(), StoreError> {
        // Held until they are in the index, so that a reader finds each count in one place.
        let mut counters = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        self.index.with(|db| {
            let mut view = View::new(db);
            for (position, payload) in positions.iter().zip(payloads) {
                view.apply_entry(*position, payload)?;
            }
            for (batch, _) in notes {
                view.apply_changes(batch.changes());
            }
            for (device, traffic) in &*counters {
                view.add_traffic(device, traffic)?;
            }
            view.set_applied(self.log.end());
            view.commit()
        })?;
        counters.clear();
        Ok(())
    }

    fn apply_notes(&self, notes: &[(Batch, Reply<()>)]) -> Result<(), StoreError> {
        self.apply(&[], &[], notes)
    }
}

/// The numbers of a batch's events.
fn numbers(batch: &Batch) -> Vec<u64> {
    let events = batch.changes().iter().filter_map(|change| match change {
        Change::Event { number, .. } => Some(*number),
        _ => None,
    });
    events.collect()
}

impl Job {
    fn len(&self) -> usize {
        match self {
            Self::Commit(commit, _) => commit.batch.len(),
            Self::Write(batch, _) => batch.len(),
            Self::Note(..) => 0,
        }
    }
}
