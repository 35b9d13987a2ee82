//! The sled index: everything in it but a few counters is derived from the commit log.
//!
//! Everything is in one tree, because a sled batch on one tree is recovered all or nothing: the
//! position up to which the log is applied changes in the same batch as what was applied. The
//! first byte of a key is its kind. Once sled has met an I/O error (a full disk) it answers with
//! that error for ever, so the index can be closed and opened again, after which the log's tail is
//! applied anew. sled does not always survive `kill -9` (seen once in about 700 kills: an empty
//! snapshot, then "corrupted data" at every start): then the index is set aside and made anew from
//! the whole log.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{PoisonError, RwLock};

use cloud_core::audit::Ledger;
use flywheel_shared::ids::{DeviceId, Digest};
use flywheel_shared::message::{self, Record};
use serde::{Deserialize, Serialize};

use super::batch::Change;
use super::log::Log;
use super::sample::{SampleId, SampleMeta};
use super::{Cursor, StoreError, Traffic};

const CACHE: u64 = 64 * 1024 * 1024;
const APPLIED: &[u8] = b"a";
const BLOB: u8 = b'b';
const BY_CURSOR: u8 = b'c';
const EVENT: u8 = b'e';
const LEDGER: u8 = b'g';
const TRAFFIC: u8 = b'n';
const RECORD: u8 = b'r';
const BY_ID: u8 = b's';

/// What stands in front of the raw bytes of a log entry. Variants are numbered by order: append
/// only.
#[derive(Serialize, Deserialize)]
pub(super) enum Head {
    /// 0: the rest of the entry is a wire `Batch` as the device signed it.
    Batch {
        /// Who sent it.
        device: DeviceId,
        /// When, Unix milliseconds.
        received_ms: u64,
    },
    /// 1: changes of records and streams; nothing follows.
    Write {
        /// In order.
        changes: Vec<Change>,
    },
}

/// Where a picture stands in the log.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) position: u64,
    pub(super) len: u32,
}

pub(super) struct Index {
    dir: PathBuf,
    /// The error of the last try to open it, while it is closed.
    db: RwLock<Result<sled::Db, StoreError>>,
    failed: AtomicBool,
}

impl Index {
    /// Opens the index and brings it up to date with the log; a damaged one is made anew.
    pub(super) fn open(dir: &Path, log: &Log) -> Result<Self, StoreError> {
        let index = Self {
            dir: dir.to_owned(),
            db: RwLock::new(Err(StoreError::Closed)),
            failed: AtomicBool::new(true),
        };
        index.recover(log)?;
        Ok(index)
    }

    /// Whether sled has failed and must be opened again.
    pub(super) fn failed(&self) -> bool {
        self.failed.load(SeqCst)
    }

    /// Opens sled again and applies the log's tail, or the whole log if sled is damaged.
    pub(super) fn recover(&self, log: &Log) -> Result<(), StoreError> {
        let opened = self.reopen().and_then(|()| self.catch_up(log));
        if let Err(StoreError::Index { why }) = opened {
            let aside = self.dir.with_extension("damaged");
            tracing::error!(
                why,
                aside = %aside.display(),
                "the index is damaged: it is set aside and made anew from the log"
            );
            self.set_aside(&aside)?;
            self.reopen()?;
            self.catch_up(log)?;
        } else {
            opened?;
        }
        self.failed.store(false, SeqCst);
        Ok(())
    }

    fn reopen(&self) -> Result<(), StoreError> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        // The old one must be gone first: it holds the lock on the file.
        *db = Err(StoreError::Closed);
        *db = open_sled(&self.dir);
        db.as_ref().map(drop).map_err(StoreError::clone)
    }

    /// Moves the folder away; only the last damaged one is kept.
    fn set_aside(&self, aside: &Path) -> Result<(), StoreError> {
        *self.db.write().unwrap_or_else(PoisonError::into_inner) = Err(StoreError::Closed);
        let moved = match fs::remove_dir_all(aside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => fs::rename(&self.dir, aside),
        };
        moved.map_err(|error| StoreError::io(&self.dir, &error))
    }

    /// Applies what the log holds beyond the applied position.
    fn catch_up(&self, log: &Log) -> Result<(), StoreError> {
        let applied = self.applied()?;
        if applied > log.end() {
            return Err(StoreError::Corrupt {
                path: self.dir.clone(),
                why: format!(
                    "the index knows the commit log up to {applied}, but it ends at {}; \
                     restore the folder from a backup",
                    log.end()
                ),
            });
        }
        log.replay(applied, |position, payload| {
            self.with(|db| {
                let mut view = View::new(db);
                view.apply_entry(position, payload)?;
                view.set_applied(position + payload.len() as u64);
                view.commit()
            })
        })
    }

    /// Runs `f` on the database and notes a failure.
    pub(super) fn with<R>(
        &self,
        f: impl FnOnce(&sled::Db) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let db = db.as_ref().map_err(|error| {
            self.failed.store(true, SeqCst);
            error.clone()
        })?;
        let result = f(db);
        if let Err(StoreError::Index { .. } | StoreError::Full { .. }) = &result {
            self.failed.store(true, SeqCst);
        }
        result
    }

    /// Returns once everything written so far is on the medium. sled's own flush ends in
    /// `sync_file_range`, which is no barrier, so the file is synced besides.
    pub(super) fn barrier(&self) -> Result<(), StoreError> {
        self.with(|db| db.flush().map_err(sled_error))?;
        let file = self.dir.join("db");
        File::open(&file)
            .and_then(|file| file.sync_data())
            .map_err(|error| StoreError::io(&file, &error))
    }

    fn applied(&self) -> Result<u64, StoreError> {
        self.with(|db| {
            let value = db.get(APPLIED).map_err(sled_error)?;
            Ok(value.map_or(0, |bytes| be_u64(&bytes)))
        })
    }

    pub(super) fn record(&self, tree: &str, key: &[u8]) -> Result<Option<sled::IVec>, StoreError> {
        self.with(|db| db.get(record_key(tree, key)).map_err(sled_error))
    }

    /// Keys (without the tree's name) and values in key order.
    pub(super) fn records(
        &self,
        tree: &str,
        prefix: &[u8],
    ) -> Result<Vec<(Vec<u8>, sled::IVec)>, StoreError> {
        let skip = tree.len() + 2;
        self.with(|db| {
            let found = db.scan_prefix(record_key(tree, prefix)).map(|pair| {
                let (key, value) = pair.map_err(sled_error)?;
                Ok((key[skip..].to_vec(), value))
            });
            found.collect()
        })
    }

    pub(super) fn events(
        &self,
        stream: &str,
        from: u64,
    ) -> Result<Vec<(u64, sled::IVec)>, StoreError> {
        let start = event_key(stream, from);
        let end = event_key(stream, u64::MAX);
        self.with(|db| {
            let found = db.range(start..=end).map(|pair| {
                let (key, value) = pair.map_err(sled_error)?;
                Ok((be_u64(&key[key.len() - 8..]), value))
            });
            found.collect()
        })
    }

    /// The number of the next event of a stream.
    pub(super) fn next_event(&self, stream: &str) -> Result<u64, StoreError> {
        self.with(|db| next_event(db, stream))
    }

    pub(super) fn ledger(&self, device: &DeviceId, epoch: u32) -> Result<Ledger, StoreError> {
        self.with(|db| read_ledger(db, device, epoch))
    }

    pub(super) fn ledgers(&self) -> Result<Vec<Ledger>, StoreError> {
        self.with(|db| {
            let values = db.scan_prefix([LEDGER]).values();
            let all = values.map(|value| decode("ledgers", &value.map_err(sled_error)?));
            all.collect()
        })
    }

    pub(super) fn traffic(&self, device: &DeviceId) -> Result<Traffic, StoreError> {
        self.with(|db| read_traffic(db, device))
    }

    pub(super) fn samples(
        &self,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<(Cursor, SampleMeta)>, StoreError> {
        let Some(first) = after.checked_add(1) else {
            return Ok(Vec::new());
        };
        let (start, end) = (keyed(BY_CURSOR, &first.to_be_bytes()), [BY_CURSOR + 1]);
        self.with(|db| {
            let found = db.range(start.as_slice()..end.as_slice()).take(limit);
            let found = found.map(|pair| {
                let (key, value) = pair.map_err(sled_error)?;
                Ok((be_u64(&key[1..]), decode("samples", &value)?))
            });
            found.collect()
        })
    }

    pub(super) fn last_sample(&self) -> Result<Cursor, StoreError> {
        self.with(|db| {
            let mut all = db.range([BY_CURSOR].as_slice()..[BY_CURSOR + 1].as_slice());
            let last = all.next_back().transpose().map_err(sled_error)?;
            Ok(last.map_or(0, |(key, _)| be_u64(&key[1..])))
        })
    }

    pub(super) fn sample(&self, id: &SampleId) -> Result<Option<SampleMeta>, StoreError> {
        self.with(|db| {
            let Some(cursor) = db.get(id_key(id)).map_err(sled_error)? else {
                return Ok(None);
            };
            let value = db.get(keyed(BY_CURSOR, &cursor)).map_err(sled_error)?;
            value.map(|value| decode("samples", &value)).transpose()
        })
    }

    pub(super) fn place(&self, blob: &Digest) -> Result<Option<Place>, StoreError> {
        self.with(|db| {
            let value = db.get(keyed(BLOB, &blob.0)).map_err(sled_error)?;
            value.map(|value| decode("blobs", &value)).transpose()
        })
    }
}

/// Changes being prepared on top of the database, to be applied all or nothing. Only the
/// committer has one, so what it reads can't change under it.
pub(super) struct View<'a> {
    db: &'a sled::Db,
    batch: sled::Batch,
    ledgers: BTreeMap<(DeviceId, u32), Ledger>,
}

impl<'a> View<'a> {
    pub(super) fn new(db: &'a sled::Db) -> Self {
        Self {
            db,
            batch: sled::Batch::default(),
            ledgers: BTreeMap::new(),
        }
    }

    /// Books one log entry, whose payload begins at `position`. A number that is booked already is
    /// passed over, so applying an entry twice changes nothing.
    pub(super) fn apply_entry(&mut self, position: u64, payload: &[u8]) -> Result<(), StoreError> {
        let undecodable = |why: postcard::Error| StoreError::Corrupt {
            path: PathBuf::from("log"),
            why: format!("the entry at position {position} does not decode: {why}"),
        };
        let (head, body) = postcard::take_from_bytes(payload).map_err(undecodable)?;
        let (device, received_ms) = match head {
            Head::Batch {
                device,
                received_ms,
            } => (device, received_ms),
            Head::Write { changes } => {
                self.apply_changes(&changes);
                return Ok(());
            }
        };
        let batch: message::Batch<'_> = postcard::from_bytes(body).map_err(undecodable)?;
        for (at, record) in message::records(batch.records).enumerate() {
            let record = record.map_err(undecodable)?;
            let ledger = self.ledger(&device, batch.epoch)?;
            let sample = match record {
                Record::Loss(loss) => {
                    ledger.lose(loss.seq, loss.reason.name());
                    continue;
                }
                Record::Sample(sample) => sample,
            };
            if is_known(ledger, sample.seq) {
                continue;
            }
            ledger.ingested.insert(sample.seq);
            let meta = SampleMeta::from_wire(&device, batch.epoch, received_ms, &sample);
            // The picture is a part of the payload, so the difference of the addresses is where.
            let offset = sample.payload.as_ptr().addr() - payload.as_ptr().addr();
            let place = Place {
                position: position + offset as u64,
                len: sample.payload.len() as u32,
            };
            let cursor = (position + at as u64).to_be_bytes();
            self.batch
                .insert(keyed(BLOB, &meta.blob.0), encode("blobs", &place)?);
            self.batch.insert(id_key(&meta.id()), &cursor);
            self.batch
                .insert(keyed(BY_CURSOR, &cursor), encode("samples", &meta)?);
        }
        Ok(())
    }

    /// Makes changes, as often as one likes.
    pub(super) fn apply_changes(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Put { tree, key, value } => {
                    self.batch.insert(record_key(tree, key), value.as_slice());
                }
                Change::Delete { tree, key } => self.batch.remove(record_key(tree, key)),
                Change::Event {
                    stream,
                    number,
                    value,
                } => self
                    .batch
                    .insert(event_key(stream, *number), value.as_slice()),
            }
        }
    }

    pub(super) fn add_traffic(
        &mut self,
        device: &DeviceId,
        more: &Traffic,
    ) -> Result<(), StoreError> {
        let mut traffic = read_traffic(self.db, device)?;
        traffic.add(more);
        let key = keyed(TRAFFIC, device.as_str().as_bytes());
        self.batch.insert(key, encode("traffic", &traffic)?);
        Ok(())
    }

    pub(super) fn set_applied(&mut self, position: u64) {
        self.batch.insert(APPLIED, &position.to_be_bytes());
    }

    pub(super) fn commit(mut self) -> Result<(), StoreError> {
        for ((device, epoch), ledger) in &self.ledgers {
            let value = encode("ledgers", ledger)?;
            self.batch.insert(ledger_key(device, *epoch), value);
        }
        self.db.apply_batch(self.batch).map_err(sled_error)
    }

    fn ledger(&mut self, device: &DeviceId, epoch: u32) -> Result<&mut Ledger, StoreError> {
        match self.ledgers.entry((device.clone(), epoch)) {
            std::collections::btree_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            std::collections::btree_map::Entry::Vacant(entry) => {
                Ok(entry.insert(read_ledger(self.db, device, epoch)?))
            }
        }
    }
}

/// Whether a number is ingested or its loss booked.
pub(super) fn is_known(ledger: &Ledger, seq: u32) -> bool {
    ledger.ingested.contains(seq) || ledger.lost.values().any(|lost| lost.contains(seq))
}

pub(super) fn encode<T: Serialize>(tree: &str, value: &T) -> Result<Vec<u8>, StoreError> {
    postcard::to_extend(value, Vec::new()).map_err(|error| StoreError::record(tree, &error))
}

fn decode<T: for<'de> Deserialize<'de>>(tree: &str, bytes: &[u8]) -> Result<T, StoreError> {
    postcard::from_bytes(bytes).map_err(|error| StoreError::record(tree, &error))
}

fn open_sled(dir: &Path) -> Result<sled::Db, StoreError> {
    let config = sled::Config::new().path(dir).cache_capacity(CACHE);
    // Of some kinds of damage sled says nothing but panics.
    catch_unwind(AssertUnwindSafe(|| config.open()))
        .unwrap_or_else(|_| Err(sled::Error::ReportableBug("it panicked".to_owned())))
        .map_err(sled_error)
}

fn sled_error(error: sled::Error) -> StoreError {
    match error {
        sled::Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => {
            StoreError::Full {
                path: PathBuf::from("index"),
            }
        }
        error => StoreError::Index {
            why: error.to_string(),
        },
    }
}

fn read_ledger(db: &sled::Db, device: &DeviceId, epoch: u32) -> Result<Ledger, StoreError> {
    let value = db.get(ledger_key(device, epoch)).map_err(sled_error)?;
    value.map_or_else(
        || {
            Ok(Ledger {
                device: device.as_str().to_owned(),
                epoch,
                ..Ledger::default()
            })
        },
        |value| decode("ledgers", &value),
    )
}

fn read_traffic(db: &sled::Db, device: &DeviceId) -> Result<Traffic, StoreError> {
    let key = keyed(TRAFFIC, device.as_str().as_bytes());
    let value = db.get(key).map_err(sled_error)?;
    value.map_or_else(|| Ok(Traffic::default()), |value| decode("traffic", &value))
}

fn next_event(db: &sled::Db, stream: &str) -> Result<u64, StoreError> {
    let all = event_key(stream, 0)..=event_key(stream, u64::MAX);
    match db.range(all).next_back() {
        None => Ok(0),
        Some(pair) => {
            let (key, _) = pair.map_err(sled_error)?;
            Ok(be_u64(&key[key.len() - 8..]) + 1)
        }
    }
}

fn keyed(kind: u8, rest: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + rest.len());
    key.push(kind);
    key.extend_from_slice(rest);
    key
}

/// Kind, name, zero, rest. Names hold no zero, so none is the beginning of another.
fn named(kind: u8, name: &str, rest: &[u8]) -> Vec<u8> {
    let mut key = keyed(kind, name.as_bytes());
    key.push(0);
    key.extend_from_slice(rest);
    key
}

fn record_key(tree: &str, key: &[u8]) -> Vec<u8> {
    named(RECORD, tree, key)
}

fn event_key(stream: &str, number: u64) -> Vec<u8> {
    named(EVENT, stream, &number.to_be_bytes())
}

fn ledger_key(device: &DeviceId, epoch: u32) -> Vec<u8> {
    named(LEDGER, device.as_str(), &epoch.to_be_bytes())
}

fn id_key(id: &SampleId) -> Vec<u8> {
    let mut key = named(BY_ID, id.device.as_str(), &id.epoch.to_be_bytes());
    key.extend_from_slice(&id.seq.to_be_bytes());
    key
}

fn be_u64(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}
