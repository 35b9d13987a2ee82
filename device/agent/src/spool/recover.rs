//! Opening a spool: the index is rebuilt from the segments, and numbers that should be there and
//! are not are booked as losses.

use std::collections::{BTreeMap, BTreeSet};

use flywheel_shared::ids::SampleKey;
use flywheel_shared::message::{LossReason, Record};

use super::disk::Disk;
use super::ledger::{Account, Ledger};
use super::segment::{self, Piece};
use super::{Content, Place, Segment, SegmentId, Spool, SpoolError, disk_error};

/// What was found when the spool was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Records that wait to be sent.
    pub held: usize,
    /// Numbers booked now as lost in a crash.
    pub crashed: u32,
    /// Numbers booked now as damaged on the medium.
    pub corrupt: u32,
}

/// The highest boot epoch that left a segment, 0 for none. The newest segment is never deleted
/// before there is one of a later epoch, so this is a floor that survives the loss of the index.
pub fn last_epoch(disk: &dyn Disk) -> Result<u32, SpoolError> {
    Ok(segments(disk)?.last().map_or(0, |id| id.0))
}

fn segments(disk: &dyn Disk) -> Result<Vec<SegmentId>, SpoolError> {
    let names = disk.list().map_err(|source| SpoolError::Disk {
        action: "list",
        name: "its folder".to_owned(),
        source,
    })?;
    let mut ids: Vec<SegmentId> = names
        .iter()
        .filter_map(|n| segment::parse_name(n))
        .collect();
    ids.sort_unstable();
    Ok(ids)
}

/// What a pass over all segments found.
#[derive(Default)]
struct Scan {
    found: BTreeMap<SampleKey, (Content, Place)>,
    segments: BTreeMap<SegmentId, Segment>,
    damaged: BTreeSet<SampleKey>,
    /// Torn ends: the file, its good length and the number that was being written.
    torn: Vec<(SegmentId, u64, Option<SampleKey>)>,
}

impl Scan {
    fn read(disk: &dyn Disk) -> Result<Self, SpoolError> {
        let mut scan = Self::default();
        for id in segments(disk)? {
            let bytes = disk
                .read(&segment::file_name(id.0, id.1))
                .map_err(disk_error("read", id))?;
            let mut len = bytes.len() as u64;
            for piece in segment::scan(&bytes) {
                match piece {
                    Piece::Whole { offset, entry } => {
                        let content = match postcard::from_bytes::<Record<'_>>(entry.record) {
                            Ok(Record::Sample(_)) => Content::Sample { value: entry.value },
                            Ok(Record::Loss(loss)) => Content::Loss(loss.reason),
                            Err(_) => {
                                scan.damaged.insert(entry.key);
                                continue;
                            }
                        };
                        let place = Place {
                            segment: id,
                            offset,
                            len: (entry.record.len() + segment::OVERHEAD) as u32,
                        };
                        scan.found.insert(entry.key, (content, place));
                    }
                    Piece::Damaged(key) => {
                        scan.damaged.insert(key);
                    }
                    Piece::Torn { offset, key } => {
                        len = offset;
                        scan.torn.push((id, offset, key));
                    }
                }
            }
            scan.segments.insert(
                id,
                Segment {
                    len,
                    ..Segment::default()
                },
            );
        }
        Ok(scan)
    }
}

impl Spool {
    /// Opens the spool for a new boot epoch with a quota in bytes.
    ///
    /// # Errors
    /// If the disk or the ledger fails, or `epoch` was used before ([`last_epoch`]).
    pub fn open(
        disk: Box<dyn Disk>,
        mut ledger: Box<dyn Ledger>,
        epoch: u32,
        quota: u64,
    ) -> Result<(Self, Recovery), SpoolError> {
        let scan = Scan::read(&*disk)?;
        let mut accounts: BTreeMap<u32, Account> = ledger
            .load()
            .map_err(SpoolError::Ledger)?
            .into_iter()
            .collect();
        for key in scan.found.keys() {
            let account = accounts.entry(key.epoch).or_default();
            account.flagged = account.flagged.max(key.seq);
        }
        for account in accounts.values_mut() {
            account.flagged = account.flagged.max(account.acked.max());
        }
        let used = accounts
            .keys()
            .chain(scan.segments.keys().map(|(epoch, _)| epoch))
            .max();
        if let Some(&used) = used
            && epoch <= used
        {
            return Err(SpoolError::Epoch {
                wanted: epoch,
                used,
            });
        }
        for (id, _, key) in &scan.torn {
            count_torn(&mut accounts, id.0, *key);
        }
        // An epoch in which nothing was flagged has no book.
        for (&epoch, _) in accounts.iter().filter(|(_, account)| account.flagged == 0) {
            ledger.remove(epoch).map_err(SpoolError::Ledger)?;
        }
        accounts.retain(|_, account| account.flagged > 0);
        accounts.insert(epoch, Account::default());

        let mut spool = Self {
            disk,
            ledger,
            quota,
            epoch,
            last_seq: 0,
            accounts,
            held: BTreeMap::new(),
            unsent: BTreeSet::new(),
            unsent_bytes: 0,
            evictable: BTreeSet::new(),
            unwritten: BTreeSet::new(),
            segments: scan.segments,
            active: (epoch, 0),
            sealed: false,
            live_bytes: 0,
            reported: BTreeMap::new(),
            buffer: Vec::new(),
            record: Vec::new(),
        };
        spool.roll()?;
        for (key, (content, place)) in scan.found {
            if !spool.is_acked(key) {
                spool.hold(key, content, Some(place));
            }
        }
        let recovery = spool.book_missing(&scan.damaged);
        // A power cut may have undone evictions, or the quota was lowered. It cannot fail: all
        // samples are unsent, and none is worth more than 1.
        let _ = spool.make_room(0, 1.0);
        // The losses must be on disk before the torn ends that explain them are cut off.
        spool.sync()?;
        spool.save_accounts().map_err(SpoolError::Ledger)?;
        for (id, len, _) in scan.torn {
            // If it fails, the torn end is found again at the next start and changes nothing.
            let _ = spool.disk.truncate(&segment::file_name(id.0, id.1), len);
        }
        spool.sweep();
        Ok((spool, recovery))
    }

    fn is_acked(&self, key: SampleKey) -> bool {
        self.accounts
            .get(&key.epoch)
            .is_some_and(|account| account.acked.contains(key.seq))
    }

    /// Books every number of an earlier epoch that is neither held nor acknowledged.
    fn book_missing(&mut self, damaged: &BTreeSet<SampleKey>) -> Recovery {
        let mut recovery = Recovery::default();
        let missing: Vec<SampleKey> = self
            .accounts
            .iter()
            .flat_map(|(&epoch, account)| {
                (1..=account.flagged)
                    .map(move |seq| SampleKey { epoch, seq })
                    .filter(|key| !account.acked.contains(key.seq))
            })
            .filter(|key| !self.held.contains_key(key))
            .collect();
        for key in missing {
            if damaged.contains(&key) {
                recovery.corrupt += 1;
                self.lose(key, LossReason::Corrupt);
            } else {
                recovery.crashed += 1;
                self.lose(key, LossReason::Crash);
            }
        }
        recovery.held = self.held.len();
        recovery
    }
}

/// A write was cut short. Unless it was the rewriting of a number that is known, the number after
/// the last one of that epoch was flagged and is lost.
fn count_torn(accounts: &mut BTreeMap<u32, Account>, file_epoch: u32, key: Option<SampleKey>) {
    let epoch = key.map_or(file_epoch, |key| key.epoch);
    // A number that was read from rubbish must not open an account.
    if epoch > file_epoch || (epoch < file_epoch && !accounts.contains_key(&epoch)) {
        return;
    }
    let account = accounts.entry(epoch).or_default();
    if key.is_none_or(|key| key.seq > account.flagged) {
        account.flagged += 1;
    }
}
