//! The file that says how far the source was read. It is written every few frames, so writing it
//! must cost neither memory nor a wait for the disk: two slots of fixed size take turns, and a
//! write cut short spoils only the older one.
//!
//! A slot of 128 bytes is, little endian: FNV-1a `u64` of the rest, number `u64`, and a [`Position`]
//! in postcard with zeros after it. The larger valid number holds. New numbers are only added at
//! the end, where an older agent left zeros.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::source::content_hash;
use crate::state::Progress;

const SLOT: usize = 128;

/// What is saved together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// How far the source was read.
    pub progress: Progress,
    /// Bytes of all messages sent since enrolment.
    pub bytes_up: u64,
    /// Which source, as a hash of its URI.
    pub source: u64,
}

/// A [`Position`] as it lies in a slot.
#[derive(Serialize, Deserialize)]
struct Stored {
    frame: u64,
    bytes_seen: u64,
    skipped: u64,
    bytes_up: u64,
    source: u64,
    dropped: u64,
}

impl From<&Position> for Stored {
    fn from(position: &Position) -> Self {
        let Progress {
            frame,
            bytes_seen,
            skipped,
            dropped,
        } = position.progress;
        Self {
            frame,
            bytes_seen,
            skipped,
            bytes_up: position.bytes_up,
            source: position.source,
            dropped,
        }
    }
}

impl From<Stored> for Position {
    fn from(stored: Stored) -> Self {
        Self {
            progress: Progress {
                frame: stored.frame,
                bytes_seen: stored.bytes_seen,
                skipped: stored.skipped,
                dropped: stored.dropped,
            },
            bytes_up: stored.bytes_up,
            source: stored.source,
        }
    }
}

/// The open file.
#[derive(Debug)]
pub struct PositionFile {
    file: File,
    number: u64,
}

impl PositionFile {
    /// Opens the file, making it if it is not there, and reads what was saved last.
    pub fn open(path: &Path) -> io::Result<(Self, Option<Position>)> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let mut newest = None;
        for slot in 0..2 {
            let mut bytes = [0; SLOT];
            match file.read_exact_at(&mut bytes, slot * SLOT as u64) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
                Err(error) => return Err(error),
            }
            if let Some((number, position)) = decode(&bytes)
                && newest.is_none_or(|(other, _)| other < number)
            {
                newest = Some((number, position));
            }
        }
        let number = newest.map_or(0, |(number, _)| number);
        Ok((Self { file, number }, newest.map(|(_, position)| position)))
    }

    /// Saves a position; it survives the death of the process, and a power cut after
    /// [`PositionFile::sync`].
    pub fn save(&mut self, position: &Position) -> io::Result<()> {
        let number = self.number + 1;
        let bytes = encode(number, position)?;
        self.file.write_all_at(&bytes, number % 2 * SLOT as u64)?;
        self.number = number;
        Ok(())
    }

    /// Makes what was saved survive a power cut.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn encode(number: u64, position: &Position) -> io::Result<[u8; SLOT]> {
    let mut bytes = [0; SLOT];
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    postcard::to_slice(&Stored::from(position), &mut bytes[16..]).map_err(io::Error::other)?;
    let check = content_hash(&bytes[8..]);
    bytes[..8].copy_from_slice(&check.to_le_bytes());
    Ok(bytes)
}

fn decode(bytes: &[u8; SLOT]) -> Option<(u64, Position)> {
    let (check, body) = bytes.split_first_chunk()?;
    let (number, position) = body.split_first_chunk()?;
    if u64::from_le_bytes(*check) != content_hash(body) {
        return None;
    }
    let (stored, _) = postcard::take_from_bytes::<Stored>(position).ok()?;
    Some((u64::from_le_bytes(*number), stored.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(frame: u64) -> Position {
        Position {
            progress: Progress {
                frame,
                bytes_seen: 3 * frame,
                skipped: 1,
                dropped: 5,
            },
            bytes_up: 7,
            source: content_hash(b"sim:roads"),
        }
    }

    #[test]
    fn a_cut_or_damaged_write_leaves_the_one_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("position");
        let (mut file, first) = PositionFile::open(&path).unwrap();
        assert_eq!(first, None);
        for frame in 1..=6 {
            file.save(&position(frame)).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        let (_, last) = PositionFile::open(&path).unwrap();
        assert_eq!(last, Some(position(6)));
        // The sixth is in the first slot; any damage there brings back the fifth.
        for at in 0..SLOT {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x20;
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(PositionFile::open(&path).unwrap().1, Some(position(5)));
        }
        std::fs::write(&path, &whole[..SLOT + 9]).unwrap();
        let (mut file, last) = PositionFile::open(&path).unwrap();
        assert_eq!(last, Some(position(6)));
        file.save(&position(7)).unwrap();
        assert_eq!(PositionFile::open(&path).unwrap().1, Some(position(7)));
        std::fs::write(&path, b"rubbish").unwrap();
        assert_eq!(PositionFile::open(&path).unwrap().1, None);
    }

    #[test]
    fn a_position_without_the_frames_given_up_is_understood() {
        let mut bytes = [0; SLOT];
        bytes[8..16].copy_from_slice(&3u64.to_le_bytes());
        let older = (640u64, 9000u64, 2u64, 77u64, u64::MAX);
        postcard::to_slice(&older, &mut bytes[16..]).unwrap();
        let check = content_hash(&bytes[8..]);
        bytes[..8].copy_from_slice(&check.to_le_bytes());
        let position = Position {
            progress: Progress {
                frame: 640,
                bytes_seen: 9000,
                skipped: 2,
                dropped: 0,
            },
            bytes_up: 77,
            source: u64::MAX,
        };
        assert_eq!(decode(&bytes), Some((3, position)));
    }
}
