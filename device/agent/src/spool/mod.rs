//! The spool: every flagged sample between the moment it takes its number and the moment the
//! cloud says that it is on disk there.
//!
//! The law it keeps is `flagged = acknowledged + spooled`, exactly, for each boot epoch, after any
//! crash: a number is never reused, skipped or forgotten, and a sample that is lost leaves a loss
//! record in its place. Three rules follow.
//!
//! - A sample is written to its segment at once, so the death of the process loses nothing; what
//!   was cut short is noticed by the checksum of its envelope and booked as a crash loss.
//! - Nothing is told to the cloud (sent, or counted in a book) before it was fsynced.
//! - A segment is deleted only after everything in it is acknowledged or lives elsewhere, and
//!   after the ledger that says so was flushed.
//!
//! Disk use is bounded by one and a half times the quota and a few segments: when evictions leave
//! segments sparse, their last entries move to the newest one.

mod disk;
mod files;
mod ledger;
mod ranges;
mod recover;
mod segment;
mod sending;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use flywheel_shared::MAX_MESSAGE;
use flywheel_shared::ids::SampleKey;
use flywheel_shared::message::{EpochBook, Loss, LossReason, MAX_BOOKS, Record, Sample};
use thiserror::Error;

pub use disk::{Disk, Folder};
pub use ledger::{Account, Ledger, LedgerError};
pub use ranges::RangeSet;
pub use recover::{Recovery, last_epoch};

use segment::OVERHEAD;

/// Longest record in bytes that fits a message together with its batch header and signature.
const MAX_RECORD: usize = MAX_MESSAGE - 256;

/// Why the spool cannot do what it was asked. Nothing is lost by any of these.
#[derive(Debug, Error)]
pub enum SpoolError {
    /// A file operation failed.
    #[error("spool: cannot {action} {name}: {source}")]
    Disk {
        /// What was tried.
        action: &'static str,
        /// The file.
        name: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The ledger failed.
    #[error("spool: the ledger of acknowledgements failed: {0}")]
    Ledger(LedgerError),
    /// The epoch was used before.
    #[error("spool: boot epoch {wanted} is not above {used}, which the spool holds already")]
    Epoch {
        /// The epoch asked for.
        wanted: u32,
        /// The highest one in use.
        used: u32,
    },
}

/// What became of a flagged sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The number it took.
    pub seq: u32,
    /// Why it is lost already, if it is.
    pub lost: Option<LossReason>,
}

/// How much waits to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Number of records.
    pub records: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Records of one epoch, ready to be signed and sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Their epoch.
    pub epoch: u32,
    /// How many.
    pub count: u16,
    /// Their postcard bytes, one after the other.
    pub records: Vec<u8>,
}

/// Books for one health message.
pub type Books = heapless::Vec<EpochBook, MAX_BOOKS>;

type SegmentId = (u32, u32);

#[derive(Clone, Copy, Debug)]
struct Place {
    segment: SegmentId,
    offset: u64,
    len: u32,
}

#[derive(Clone, Copy, Debug)]
enum Content {
    Sample { value: f32 },
    Loss(LossReason),
}

#[derive(Clone, Copy, Debug)]
struct Held {
    content: Content,
    /// `None` for a loss record that the disk has not taken yet.
    place: Option<Place>,
}

#[derive(Clone, Debug, Default)]
struct Segment {
    len: u64,
    live: u32,
    live_bytes: u64,
    synced: bool,
}

/// The durable queue of flagged samples.
pub struct Spool {
    disk: Box<dyn Disk>,
    ledger: Box<dyn Ledger>,
    quota: u64,
    epoch: u32,
    /// Numbers given out in the current epoch.
    last_seq: u32,
    accounts: BTreeMap<u32, Account>,
    held: BTreeMap<SampleKey, Held>,
    unsent: BTreeSet<SampleKey>,
    unsent_bytes: u64,
    /// Unsent samples by value, the least valuable first.
    evictable: BTreeSet<(u32, SampleKey)>,
    /// Losses without a place on disk.
    unwritten: BTreeSet<SampleKey>,
    segments: BTreeMap<SegmentId, Segment>,
    active: SegmentId,
    /// Set when the active segment may end in rubbish that could not be cut off.
    sealed: bool,
    live_bytes: u64,
    /// When a closed epoch was first reported, by the health message's time.
    reported: BTreeMap<u32, u64>,
    buffer: Vec<u8>,
    record: Vec<u8>,
}

impl Spool {
    /// Gives the next number to a sample and keeps it; `sample.seq` is set. `value` (0 to 1) is
    /// what eviction goes by. Whatever happens, the number is accounted for.
    pub fn push(&mut self, sample: &mut Sample<'_>, value: f32) -> Pushed {
        self.last_seq += 1;
        let key = SampleKey {
            epoch: self.epoch,
            seq: self.last_seq,
        };
        sample.seq = key.seq;
        // Ordering by bits needs a value that is not negative and not NaN.
        let value = if value > 0.0 { value.min(1.0) } else { 0.0 };
        let mut record = std::mem::take(&mut self.record);
        encode_record(&Record::Sample(*sample), &mut record);
        let lost = self.keep(key, value, &record).err();
        self.record = record;
        if let Some(reason) = lost {
            self.lose(key, reason);
        }
        self.sweep();
        self.compact();
        Pushed { seq: key.seq, lost }
    }

    fn keep(&mut self, key: SampleKey, value: f32, record: &[u8]) -> Result<(), LossReason> {
        let need = (record.len() + OVERHEAD) as u64;
        if record.len() > MAX_RECORD || need > self.quota {
            return Err(LossReason::Oversize);
        }
        self.make_room(need, value)?;
        let place = self.append(key, value, record).map_err(|error| {
            tracing::error!(%error, epoch = key.epoch, seq = key.seq, "the spool cannot store a sample; it is booked as lost");
            LossReason::Disk
        })?;
        self.hold(key, Content::Sample { value }, Some(place));
        Ok(())
    }

    /// Evicts the least valuable unsent samples until `need` bytes fit the quota, or fails,
    /// evicting none, if that would cost a sample worth more than `value`.
    fn make_room(&mut self, need: u64, value: f32) -> Result<(), LossReason> {
        let excess = (self.live_bytes + need).saturating_sub(self.quota);
        let mut freed = 0;
        let mut victims = Vec::new();
        for &(bits, key) in &self.evictable {
            if freed >= excess {
                break;
            }
            if bits > value.to_bits() {
                break;
            }
            freed += self.held.get(&key).map_or(0, Held::bytes);
            victims.push(key);
        }
        if freed < excess {
            return Err(LossReason::Evicted);
        }
        for key in victims {
            self.lose(key, LossReason::Evicted);
        }
        Ok(())
    }

    /// Puts a loss record in the place of a number.
    fn lose(&mut self, key: SampleKey, reason: LossReason) {
        self.release(key);
        self.hold(key, Content::Loss(reason), None);
        self.write_loss(key, reason);
    }

    fn write_loss(&mut self, key: SampleKey, reason: LossReason) {
        let mut record = Vec::new();
        encode_record(
            &Record::Loss(Loss {
                seq: key.seq,
                reason,
            }),
            &mut record,
        );
        // A failure leaves it in `unwritten`, to be tried again.
        if let Ok(place) = self.append(key, 0.0, &record) {
            self.release(key);
            self.hold(key, Content::Loss(reason), Some(place));
        }
    }

    /// Tries again to write loss records that the disk has refused. Call it now and then.
    pub fn retry(&mut self) {
        for key in self.unwritten.clone() {
            if let Some(Held {
                content: Content::Loss(reason),
                ..
            }) = self.held.get(&key).copied()
            {
                self.write_loss(key, reason);
                if self.unwritten.contains(&key) {
                    return;
                }
            }
        }
    }

    /// Numbers given out in the current epoch.
    pub fn flagged(&self) -> u32 {
        self.last_seq
    }

    /// Whether everything that was ever flagged is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// What it holds, sent or not.
    pub fn usage(&self) -> Pending {
        Pending {
            records: self.held.len(),
            bytes: self.live_bytes,
        }
    }

    /// The cloud has these numbers on disk: they are freed. Returns how many of them were sent
    /// and not unsent since.
    pub fn ack(&mut self, epoch: u32, ranges: &[(u32, u32)]) -> u32 {
        let Some(account) = self.accounts.get_mut(&epoch) else {
            return 0;
        };
        // Numbers that were never told to the cloud cannot be acknowledged by it.
        let limit = account.flagged;
        let mut freed = Vec::new();
        for &(low, high) in ranges {
            let (low, high) = (low.max(1), high.min(limit));
            account.acked.insert(low, high);
            if low <= high {
                let keys = SampleKey { epoch, seq: low }..=SampleKey { epoch, seq: high };
                freed.extend(self.held.range(keys).map(|(key, _)| *key));
            }
        }
        let mut in_flight = 0;
        for key in freed {
            in_flight += u32::from(!self.unsent.contains(&key));
            self.release(key);
        }
        if let Some(account) = self.accounts.get(&epoch)
            && let Err(error) = self.ledger.put(epoch, account)
        {
            tracing::warn!(
                error,
                "acknowledgements are not stored; the records will be sent again after a restart"
            );
        }
        self.sweep();
        in_flight
    }

    /// The books of all epochs for a health message of time `at_ms`, exact at this moment.
    /// Everything counted in them is on disk when this returns. Of more than [`MAX_BOOKS`]
    /// epochs, the oldest and the current one are given.
    pub fn books(&mut self, at_ms: u64) -> Result<Books, SpoolError> {
        self.retry();
        self.sync()?;
        let mut books = Books::new();
        let newest = self.epoch;
        for (&epoch, account) in &self.accounts {
            if books.len() + 1 == MAX_BOOKS && epoch != newest {
                continue;
            }
            let flagged = account.flagged;
            let spooled: RangeSet = self
                .held
                .range(
                    SampleKey { epoch, seq: 0 }..=SampleKey {
                        epoch,
                        seq: flagged,
                    },
                )
                .map(|(key, _)| key.seq)
                .collect();
            let spooled = spooled.to_wire();
            let count: u32 = spooled.iter().map(|&(low, high)| high - low + 1).sum();
            if epoch != newest && count == 0 {
                self.reported.entry(epoch).or_insert(at_ms);
            }
            let book = EpochBook {
                epoch,
                flagged,
                acked: flagged - count,
                spooled,
            };
            // The loop above never exceeds the capacity.
            if books.push(book).is_err() {
                break;
            }
        }
        Ok(books)
    }

    /// The cloud has stored the health message of time `health_at_ms`: epochs that were closed in
    /// it need no book any more.
    pub fn settle(&mut self, health_at_ms: u64) {
        let settled: Vec<u32> = self
            .reported
            .iter()
            .filter(|(_, at)| **at <= health_at_ms)
            .map(|(epoch, _)| *epoch)
            .collect();
        for epoch in settled {
            // If this fails, the book is reported again after the next start.
            if self.ledger.remove(epoch).is_ok() {
                self.accounts.remove(&epoch);
                self.reported.remove(&epoch);
            }
        }
    }

    /// Makes everything survive a power cut; for an orderly end.
    pub fn flush(&mut self) -> Result<(), SpoolError> {
        self.retry();
        self.sync()?;
        self.save_accounts().map_err(SpoolError::Ledger)
    }

    /// Highest number of an epoch that is on disk, or acknowledged.
    fn durable(&self, epoch: u32) -> u32 {
        self.accounts
            .get(&epoch)
            .map_or(0, |account| account.flagged)
    }

    fn hold(&mut self, key: SampleKey, content: Content, place: Option<Place>) {
        if let Some(place) = place {
            let segment = self.segments.entry(place.segment).or_default();
            segment.live += 1;
            segment.live_bytes += u64::from(place.len);
            self.live_bytes += u64::from(place.len);
            let account = self.accounts.entry(key.epoch).or_default();
            account.flagged = account.flagged.max(key.seq);
        } else {
            self.unwritten.insert(key);
        }
        self.held.insert(key, Held { content, place });
        self.mark(key);
    }

    /// Lets go of a number, whatever it holds.
    fn release(&mut self, key: SampleKey) {
        self.unmark(key);
        self.unwritten.remove(&key);
        if let Some(place) = self.held.remove(&key).and_then(|held| held.place)
            && let Some(segment) = self.segments.get_mut(&place.segment)
        {
            segment.live -= 1;
            segment.live_bytes -= u64::from(place.len);
            self.live_bytes -= u64::from(place.len);
        }
    }

    fn mark(&mut self, key: SampleKey) {
        let Some(held) = self.held.get(&key) else {
            return;
        };
        if self.unsent.insert(key) {
            self.unsent_bytes += held.bytes();
            if let Content::Sample { value } = held.content {
                self.evictable.insert((value.to_bits(), key));
            }
        }
    }

    fn unmark(&mut self, key: SampleKey) {
        if self.unsent.remove(&key)
            && let Some(held) = self.held.get(&key)
        {
            self.unsent_bytes -= held.bytes();
            if let Content::Sample { value } = held.content {
                self.evictable.remove(&(value.to_bits(), key));
            }
        }
    }
}

impl Held {
    /// What it takes of the quota.
    fn bytes(&self) -> u64 {
        self.place.map_or(0, |place| u64::from(place.len))
    }
}

fn disk_error(action: &'static str, id: SegmentId) -> impl Fn(io::Error) -> SpoolError {
    move |source| SpoolError::Disk {
        action,
        name: segment::file_name(id.0, id.1),
        source,
    }
}

fn encode_record(record: &Record<'_>, out: &mut Vec<u8>) {
    out.clear();
    extend_record(record, out);
}

fn extend_record(record: &Record<'_>, out: &mut Vec<u8>) {
    crate::wire::append(record, out);
}
