//! The file that holds the slot record: two pages that take turns, each checked by itself, so that a
//! write cut short spoils only the older one.
//!
//! A page of 512 bytes is, little endian: the first 8 bytes of the SHA-256 of the rest, number `u64`,
//! time floor (8 bytes of the key, `u64` ms), length `u16`, the record's bytes, zeros. The larger valid number holds. The second
//! page lies 4096 bytes behind the first, since a disk may spoil a whole sector at once.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use device_core::slot::SlotRecord;
use flywheel_shared::ids::Digest;
use flywheel_shared::trust::{Floor, KeyId};
use thiserror::Error;

use super::disk::Disk;

const PAGE: usize = 512;
const APART: u64 = 4096;
const CHECK: usize = 8;
const HEAD: usize = CHECK + 8 + 16 + 2;

/// A file operation on the slot record failed.
#[derive(Debug, Error)]
#[error("{path}: {source}")]
pub struct SlotFileError {
    path: PathBuf,
    source: io::Error,
}

/// What is stored together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stored {
    /// The slot's own record.
    pub record: SlotRecord,
    /// The latest time that the cloud has signed ([`flywheel_shared::trust::Timekeeper`]).
    pub time: Floor,
}

/// What was found when the file was opened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Found {
    /// No file, or an empty one: nothing was ever saved.
    Nothing,
    /// The newest whole page.
    Stored(Stored),
    /// Bytes, but no whole page.
    Damaged,
}

/// The open file.
pub struct SlotFile {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    number: u64,
}

impl SlotFile {
    /// Opens the file, making it if it is not there, and reads what was saved last. What is found
    /// is durable on return: after the death of the process a page may have been written and not
    /// synced, and everything that follows is built on it.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn open(disk: Arc<dyn Disk>, path: &Path) -> Result<(Self, Found), SlotFileError> {
        let at = |source| SlotFileError {
            path: path.to_owned(),
            source,
        };
        if disk.len(path).map_err(at)?.is_none() {
            disk.write_at(path, 0, &[]).map_err(at)?;
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        disk.sync(path)
            .and_then(|()| disk.sync_folder(folder))
            .map_err(at)?;
        let bytes = disk.read(path).map_err(at)?;
        let newest = [0, APART as usize]
            .into_iter()
            .filter_map(|start| decode(bytes.get(start..start + PAGE)?))
            .max_by_key(|(number, _)| *number);
        let number = newest.map_or(0, |(number, _)| number);
        let found = match newest {
            Some((_, stored)) => Found::Stored(stored),
            // The first page may have been cut short before anything was built on it.
            None if bytes.len() as u64 <= APART + PAGE as u64 && bytes.iter().all(|b| *b == 0) => {
                Found::Nothing
            }
            None => Found::Damaged,
        };
        let file = Self {
            disk,
            path: path.to_owned(),
            number,
        };
        Ok((file, found))
    }

    /// Saves; durable on return. After an error the last save holds, or this one.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn save(&mut self, stored: &Stored) -> Result<(), SlotFileError> {
        let number = self.number + 1;
        self.disk
            .write_at(&self.path, number % 2 * APART, &encode(number, stored))
            .and_then(|()| self.disk.sync(&self.path))
            .map_err(|source| SlotFileError {
                path: self.path.clone(),
                source,
            })?;
        self.number = number;
        Ok(())
    }
}

impl fmt::Debug for SlotFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotFile")
            .field("path", &self.path)
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

fn encode(number: u64, stored: &Stored) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let record = stored.record.to_bytes();
    page[CHECK..CHECK + 8].copy_from_slice(&number.to_le_bytes());
    page[CHECK + 8..CHECK + 16].copy_from_slice(&stored.time.key.0);
    page[CHECK + 16..CHECK + 24].copy_from_slice(&stored.time.at.to_le_bytes());
    page[CHECK + 24..HEAD].copy_from_slice(&(record.len() as u16).to_le_bytes());
    page[HEAD..HEAD + record.len()].copy_from_slice(&record);
    let check = Digest::of(&page[CHECK..]);
    page[..CHECK].copy_from_slice(&check.0[..CHECK]);
    page
}

fn decode(page: &[u8]) -> Option<(u64, Stored)> {
    let (check, body) = page.split_first_chunk::<CHECK>()?;
    if Digest::of(body).0[..CHECK] != *check {
        return None;
    }
    let (number, body) = body.split_first_chunk()?;
    let (key, body) = body.split_first_chunk()?;
    let (at, body) = body.split_first_chunk()?;
    let (len, body) = body.split_first_chunk()?;
    let record = body.get(..usize::from(u16::from_le_bytes(*len)))?;
    let stored = Stored {
        record: SlotRecord::from_bytes(record).ok()?,
        time: Floor {
            key: KeyId(*key),
            at: u64::from_le_bytes(*at),
        },
    };
    Some((u64::from_le_bytes(*number), stored))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::disk::Files;
    use device_core::slot::{Held, RECORD_MAX};

    const _: () = assert!(HEAD + RECORD_MAX <= PAGE);

    fn stored(n: u8) -> Stored {
        Stored {
            record: SlotRecord {
                live: Some(Held {
                    digest: Digest([n; 32]),
                    sequence: u64::from(n),
                }),
                ..SlotRecord::default()
            },
            time: Floor {
                key: KeyId([5; 8]),
                at: 7,
            },
        }
    }

    fn open(path: &Path) -> (SlotFile, Found) {
        SlotFile::open(Arc::new(Files), path).unwrap()
    }

    #[test]
    fn the_last_save_is_found_and_a_spoilt_one_gives_the_one_before() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("slot");
        let (mut file, found) = open(&path);
        assert_eq!(found, Found::Nothing);
        assert_eq!(open(&path).1, Found::Nothing);
        for n in 1..=5 {
            file.save(&stored(n)).unwrap();
            assert_eq!(open(&path).1, Found::Stored(stored(n)));
        }
        // Number 5 stands in the second page.
        let good = std::fs::read(&path).unwrap();
        for at in 0..PAGE {
            let mut bytes = good.clone();
            bytes[APART as usize + at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(open(&path).1, Found::Stored(stored(4)), "byte {at}");
        }
        std::fs::write(&path, &good[..APART as usize]).unwrap();
        let (mut file, found) = open(&path);
        assert_eq!(found, Found::Stored(stored(4)));
        file.save(&stored(6)).unwrap();
        assert_eq!(open(&path).1, Found::Stored(stored(6)));
        std::fs::write(&path, [1; 5000]).unwrap();
        assert_eq!(open(&path).1, Found::Damaged);
        std::fs::write(&path, b"x").unwrap();
        assert_eq!(open(&path).1, Found::Damaged);
    }
}
