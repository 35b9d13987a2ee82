//! What the agent remembers: the slot record and the accounts of the spool in sled, the boot epoch
//! and how far the source was read ([`crate::position`]) in files of their own.
//!
//! sled keeps writes in the memory of the process until it is flushed, so `kill -9` loses what was
//! not. Whatever later decisions rely on is therefore flushed by the function that writes it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use device_core::slot::SlotRecord;
use flywheel_shared::trust::Floor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::files;
use crate::position::{Position, PositionFile};
use crate::shared::lock as lock_mutex;
use crate::source::content_hash;
use crate::spool::{Account, Ledger, LedgerError};
use crate::wire;

/// Why the state cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// Another agent has the folder open.
    #[error(
        "{folder}: another agent (process {pid}) uses this data folder; stop it, or give this one a folder of its own"
    )]
    Locked {
        /// The data folder.
        folder: PathBuf,
        /// What the lock file says about its owner.
        pid: String,
    },
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// sled failed.
    #[error("{path}: the state database failed: {source}")]
    Database {
        /// Its folder.
        path: PathBuf,
        /// Why.
        source: sled::Error,
    },
    /// A stored value does not decode.
    #[error(
        "{path}: the stored {key} does not decode; it was written by another version of the agent"
    )]
    Malformed {
        /// The database's folder.
        path: PathBuf,
        /// Its key.
        key: &'static str,
    },
}

/// How far the source was read, and what it took. Saved together, so that after a crash frames
/// that are read again are not counted twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Index of the next frame.
    pub frame: u64,
    /// Bytes that uploading every frame would have cost.
    pub bytes_seen: u64,
    /// Frames that could not be read.
    pub skipped: u64,
    /// Frames given up because inference was behind.
    pub dropped: u64,
}

const EPOCH: &str = "boot epoch";
const SLOT: &str = "slot record";
const TIME: &str = "time floor";
const MARK: &str = "source mark";
// Where agents before 0.2 kept the position.
const OLD_SOURCE: &str = "source";
const OLD_PROGRESS: &str = "progress";
const OLD_BYTES_UP: &str = "bytes up";
const ACCOUNTS: &str = "spool accounts";

/// The agent's database and the lock on its data folder.
#[derive(Debug)]
pub struct State {
    db: sled::Db,
    path: PathBuf,
    epoch_path: PathBuf,
    position: Mutex<PositionFile>,
    position_path: PathBuf,
    /// What the position file said when it was opened.
    last: Option<Position>,
    _lock: File,
}

impl State {
    /// Locks the data folder and opens `state` in it.
    pub fn open(data: &Path) -> Result<Self, StateError> {
        let lock = lock(data)?;
        let path = data.join("state");
        let db = open_database(&path).map_err(|source| StateError::Database {
            path: path.clone(),
            source,
        })?;
        let position_path = data.join("position");
        let (position, last) =
            PositionFile::open(&position_path).map_err(|source| StateError::Io {
                path: position_path.clone(),
                source,
            })?;
        let mut state = Self {
            db,
            path,
            epoch_path: data.join("epoch"),
            position: Mutex::new(position),
            position_path,
            last,
            _lock: lock,
        };
        if state.last.is_none() {
            state.last = state.old_position()?;
        }
        Ok(state)
    }

    /// What an agent before 0.2 left.
    fn old_position(&self) -> Result<Option<Position>, StateError> {
        let Some((frame, bytes_seen, skipped)) = self.get(OLD_PROGRESS)? else {
            return Ok(None);
        };
        let source: String = self.get(OLD_SOURCE)?.unwrap_or_default();
        Ok(Some(Position {
            progress: Progress {
                frame,
                bytes_seen,
                skipped,
                dropped: 0,
            },
            bytes_up: self.get(OLD_BYTES_UP)?.unwrap_or(0),
            source: content_hash(source.as_bytes()),
        }))
    }

    /// Takes the next boot epoch, above `floor` in any case. It is durable on return, and in a file
    /// of its own: an epoch that came twice would make the cloud take new samples for old ones.
    pub fn next_epoch(&self, floor: u32) -> Result<u32, StateError> {
        let io = |source| StateError::Io {
            path: self.epoch_path.clone(),
            source,
        };
        let last: u32 = match fs::read_to_string(&self.epoch_path) {
            Ok(text) => text.trim().parse().map_err(|_| StateError::Malformed {
                path: self.epoch_path.clone(),
                key: EPOCH,
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.get(EPOCH)?.unwrap_or(0),
            Err(error) => return Err(io(error)),
        };
        let epoch = last.max(floor) + 1;
        files::replace(&self.epoch_path, format!("{epoch}\n").as_bytes()).map_err(io)?;
        Ok(epoch)
    }

    /// How far the source with this URI had been read when the state was opened; from the start
    /// for another one.
    pub fn progress(&self, source: &str) -> Progress {
        match self.last {
            None => Progress::default(),
            Some(last) if last.source == content_hash(source.as_bytes()) => last.progress,
            Some(last) => Progress {
                frame: 0,
                ..last.progress
            },
        }
    }

    /// Where the source with this URI was to go on when the state was opened; empty for another
    /// one, or if it needs no mark.
    pub fn mark(&self, source: &str) -> Result<String, StateError> {
        let source = content_hash(source.as_bytes());
        let stored: Option<(u64, String)> = self.get(MARK)?;
        Ok(match (self.last, stored) {
            (Some(last), Some((of, mark))) if last.source == source && of == source => mark,
            _ => String::new(),
        })
    }

    /// Sets the mark; durable on return. It counts with the next [`State::save_progress`].
    pub fn set_mark(&self, source: &str, mark: &str) -> Result<(), StateError> {
        self.put(MARK, &(content_hash(source.as_bytes()), mark))?;
        self.flush()
    }

    /// Saves progress and the bytes sent so far, without allocating; the death of the process
    /// does not undo it, and a power cut not after [`State::flush`].
    pub fn save_progress(
        &self,
        source: &str,
        progress: &Progress,
        bytes_up: u64,
    ) -> Result<(), StateError> {
        let position = Position {
            progress: *progress,
            bytes_up,
            source: content_hash(source.as_bytes()),
        };
        lock_mutex(&self.position)
            .save(&position)
            .map_err(|source| self.unsaved(source))
    }

    /// Bytes of all messages sent, as of the last save before the state was opened.
    pub fn bytes_up(&self) -> u64 {
        self.last.map_or(0, |last| last.bytes_up)
    }

    /// The stored slot record; the default one if there is none.
    pub fn slot(&self) -> Result<SlotRecord, StateError> {
        let Some(bytes) = self.db.get(SLOT).map_err(|source| self.database(source))? else {
            return Ok(SlotRecord::default());
        };
        SlotRecord::from_bytes(&bytes).map_err(|_| StateError::Malformed {
            path: self.path.clone(),
            key: SLOT,
        })
    }

    /// Stores the slot record; durable on return.
    pub fn save_slot(&self, record: &SlotRecord) -> Result<(), StateError> {
        self.db
            .insert(SLOT, record.to_bytes().as_slice())
            .map_err(|source| self.database(source))?;
        self.flush()
    }

    /// The latest time that the cloud has signed.
    pub fn time_floor(&self) -> Result<Floor, StateError> {
        Ok(self.get(TIME)?.unwrap_or_default())
    }

    /// Stores it; durable on return.
    pub fn save_time_floor(&self, floor: Floor) -> Result<(), StateError> {
        self.put(TIME, &floor)?;
        self.flush()
    }

    /// The accounts of the spool, as its ledger.
    pub fn ledger(&self) -> Result<Box<dyn Ledger>, StateError> {
        let tree = self
            .db
            .open_tree(ACCOUNTS)
            .map_err(|source| self.database(source))?;
        Ok(Box::new(Accounts(tree)))
    }

    /// Makes everything written so far survive the process.
    pub fn flush(&self) -> Result<(), StateError> {
        lock_mutex(&self.position)
            .sync()
            .map_err(|source| self.unsaved(source))?;
        self.db
            .flush()
            .map(|_| ())
            .map_err(|source| self.database(source))
    }

    fn unsaved(&self, source: io::Error) -> StateError {
        StateError::Io {
            path: self.position_path.clone(),
            source,
        }
    }

    fn get<T: DeserializeOwned>(&self, key: &'static str) -> Result<Option<T>, StateError> {
        let Some(bytes) = self.db.get(key).map_err(|source| self.database(source))? else {
            return Ok(None);
        };
        postcard::from_bytes(&bytes)
            .map(Some)
            .map_err(|_| StateError::Malformed {
                path: self.path.clone(),
                key,
            })
    }

    fn put<T: Serialize>(&self, key: &'static str, value: &T) -> Result<(), StateError> {
        self.db
            .insert(key, wire::bytes(value))
            .map(|_| ())
            .map_err(|source| self.database(source))
    }

    fn database(&self, source: sled::Error) -> StateError {
        StateError::Database {
            path: self.path.clone(),
            source,
        }
    }
}

/// Opens the database; one that is damaged is set aside. sled does not survive every `kill -9`, and
/// a device must start whatever happened: the spool's own files then say what it holds.
fn open_database(path: &Path) -> Result<sled::Db, sled::Error> {
    let open = || {
        let config = sled::Config::new()
            .path(path)
            .cache_capacity(4 << 20)
            .mode(sled::Mode::LowSpace);
        // Of some kinds of damage sled says nothing but panics.
        catch_unwind(AssertUnwindSafe(|| config.open()))
            .unwrap_or_else(|_| Err(sled::Error::ReportableBug("it panicked".to_owned())))
    };
    match open() {
        Err(error) if !matches!(error, sled::Error::Io(_)) => {
            let aside = path.with_extension("damaged");
            tracing::error!(%error, aside = %aside.display(), "the state database is damaged; it is set aside");
            match fs::remove_dir_all(&aside) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(sled::Error::Io(error));
                }
                _ => fs::rename(path, &aside)?,
            }
            open()
        }
        opened => opened,
    }
}

fn lock(data: &Path) -> Result<File, StateError> {
    let path = data.join("LOCK");
    let io = |source| StateError::Io {
        path: path.clone(),
        source,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // Only for the message; an unreadable one must not hide the real error.
            let _ = file.read_to_string(&mut pid);
            return Err(StateError::Locked {
                folder: data.to_owned(),
                pid: pid.trim().to_owned(),
            });
        }
        Err(TryLockError::Error(source)) => return Err(io(source)),
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(io)?;
    Ok(file)
}

struct Accounts(sled::Tree);

impl Ledger for Accounts {
    fn load(&self) -> Result<Vec<(u32, Account)>, LedgerError> {
        self.0
            .iter()
            .map(|entry| {
                let (key, value) = entry.map_err(|error| error.to_string())?;
                let key =
                    <[u8; 4]>::try_from(&*key).map_err(|_| "a key is not an epoch".to_owned())?;
                let account = postcard::from_bytes(&value)
                    .map_err(|error| format!("an account does not decode: {error}"))?;
                Ok((u32::from_be_bytes(key), account))
            })
            .collect()
    }

    fn put(&mut self, epoch: u32, account: &Account) -> Result<(), LedgerError> {
        self.0
            .insert(epoch.to_be_bytes(), wire::bytes(account))
            .map(|_| ())
            .map_err(|error| error.to_string())
    }

    fn remove(&mut self, epoch: u32) -> Result<(), LedgerError> {
        self.0
            .remove(epoch.to_be_bytes())
            .map(|_| ())
            .map_err(|error| error.to_string())
    }

    fn flush(&mut self) -> Result<(), LedgerError> {
        self.0
            .flush()
            .map(|_| ())
            .map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_rise_even_when_the_database_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        assert_eq!(state.next_epoch(0).unwrap(), 1);
        assert_eq!(state.next_epoch(0).unwrap(), 2);
        drop(state);
        let state = State::open(folder.path()).unwrap();
        assert_eq!(state.next_epoch(0).unwrap(), 3);
        drop(state);
        // An empty file in place of the database is what a kill was seen to leave, or nearly.
        for damage in ["", "nonsense"] {
            std::fs::write(folder.path().join("state/conf"), damage).unwrap();
            let state = State::open(folder.path()).unwrap();
            let last = state.next_epoch(0).unwrap();
            assert!(last > 3, "{last}");
            assert!(state.ledger().unwrap().load().unwrap().is_empty());
        }
        std::fs::remove_dir_all(folder.path().join("state")).unwrap();
        let state = State::open(folder.path()).unwrap();
        assert_eq!(state.next_epoch(0).unwrap(), 6);
        assert_eq!(state.next_epoch(9).unwrap(), 10);
        std::fs::write(folder.path().join("epoch"), "x").unwrap();
        let error = state.next_epoch(0).unwrap_err().to_string();
        assert!(error.contains("boot epoch"), "{error}");
    }

    #[test]
    fn a_second_agent_is_told_who_holds_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = State::open(folder.path()).unwrap();
        let error = State::open(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains(&std::process::id().to_string()),
            "no process id in: {error}"
        );
        drop(first);
        State::open(folder.path()).unwrap();
    }

    #[test]
    fn progress_belongs_to_one_source_and_counters_to_the_device() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        assert_eq!(state.progress("sim:roads"), Progress::default());
        let progress = Progress {
            frame: 640,
            bytes_seen: 9000,
            skipped: 2,
            dropped: 5,
        };
        state.set_mark("sim:roads", "b.jpg").unwrap();
        state.save_progress("sim:roads", &progress, 77).unwrap();
        drop(state);
        let state = State::open(folder.path()).unwrap();
        assert_eq!(state.progress("sim:roads"), progress);
        assert_eq!(state.bytes_up(), 77);
        let other = state.progress("dir:pictures");
        assert_eq!((other.frame, other.bytes_seen), (0, 9000));
        assert_eq!(state.mark("sim:roads").unwrap(), "b.jpg");
        assert_eq!(state.mark("dir:pictures").unwrap(), "");
    }

    #[test]
    fn progress_of_an_older_agent_is_understood() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        state.put(OLD_PROGRESS, &(640u64, 9000u64, 2u64)).unwrap();
        state.put(OLD_SOURCE, &"sim:roads").unwrap();
        state.put(OLD_BYTES_UP, &77u64).unwrap();
        drop(state);
        let state = State::open(folder.path()).unwrap();
        let progress = state.progress("sim:roads");
        assert_eq!((progress.frame, progress.bytes_seen), (640, 9000));
        assert_eq!((progress.skipped, progress.dropped), (2, 0));
        assert_eq!(state.bytes_up(), 77);
        assert_eq!(state.progress("dir:pictures").frame, 0);
        state.put(OLD_PROGRESS, &7u8).unwrap();
        drop(state);
        assert!(matches!(
            State::open(folder.path()),
            Err(StateError::Malformed { .. })
        ));
        // What was saved since holds, whatever is left from before.
        let newer = tempfile::tempdir().unwrap();
        let state = State::open(newer.path()).unwrap();
        state.put(OLD_PROGRESS, &(640u64, 9000u64, 2u64)).unwrap();
        let progress = Progress {
            frame: 3,
            ..Progress::default()
        };
        state.save_progress("sim:roads", &progress, 1).unwrap();
        drop(state);
        let state = State::open(newer.path()).unwrap();
        assert_eq!(state.progress("sim:roads"), progress);
    }

    #[test]
    fn a_mark_counts_with_the_position_of_its_source_only() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let progress = Progress::default();
        state.set_mark("dir:a", "7.jpg").unwrap();
        state.save_progress("dir:a", &progress, 0).unwrap();
        // Killed between the two.
        state.set_mark("dir:b", "1.jpg").unwrap();
        drop(state);
        let state = State::open(folder.path()).unwrap();
        assert_eq!(state.mark("dir:a").unwrap(), "");
        assert_eq!(state.mark("dir:b").unwrap(), "");
        state.save_progress("dir:b", &progress, 0).unwrap();
        drop(state);
        let state = State::open(folder.path()).unwrap();
        assert_eq!(state.mark("dir:b").unwrap(), "1.jpg");
    }
}
