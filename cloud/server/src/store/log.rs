//! The commit log: the truth. Every accepted batch is appended to it as it was signed, and every
//! change of a record and every event as it was made, and synced, before anyone is told; the index
//! is derived from it, catches up after a crash, and is made anew if it is damaged.
//!
//! A position is a byte offset over all segments, so it only rises and never moves. A segment is
//! named by the position of its first byte and starts with eight bytes of magic; envelopes follow.
//! What a crash leaves at the end without a whole envelope was never acknowledged and is cut off.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use flywheel_shared::envelope::{self, EnvelopeError, HEADER};

use super::StoreError;
use super::disk::{Disk, DiskFile};

const MAGIC: &[u8; 8] = b"FWLOG\0\0\x01";
/// A new segment is begun once the last one is this long, in bytes.
const SEGMENT: u64 = 64 * 1024 * 1024;
/// Longest payload of one envelope in the log, in bytes: far more than a message, for changes that
/// are made together.
pub(super) const MAX_ENTRY: usize = 32 * 1024 * 1024;

/// The open segments, shared between the writer and all readers.
#[derive(Clone, Default)]
pub(super) struct Segments(Arc<RwLock<BTreeMap<u64, Segment>>>);

#[derive(Clone)]
struct Segment {
    path: PathBuf,
    file: Arc<File>,
}

impl Segments {
    /// Reads `len` bytes at a position.
    pub(super) fn read(&self, position: u64, len: usize) -> Result<Vec<u8>, StoreError> {
        let found = self.with(|map| {
            let found = map.range(..=position).next_back();
            found.map(|(start, segment)| (*start, segment.clone()))
        });
        let Some((start, segment)) = found else {
            return Err(StoreError::Corrupt {
                path: PathBuf::from("log"),
                why: format!("no segment holds position {position}"),
            });
        };
        let mut bytes = vec![0; len];
        segment
            .file
            .read_exact_at(&mut bytes, position - start)
            .map_err(|error| StoreError::io(&segment.path, &error))?;
        Ok(bytes)
    }

    fn add(&self, start: u64, path: &Path) -> Result<(), StoreError> {
        let file = File::open(path).map_err(|error| StoreError::io(path, &error))?;
        let segment = Segment {
            path: path.to_owned(),
            file: Arc::new(file),
        };
        let mut map = self.0.write().unwrap_or_else(PoisonError::into_inner);
        map.insert(start, segment);
        Ok(())
    }

    fn with<R>(&self, f: impl FnOnce(&BTreeMap<u64, Segment>) -> R) -> R {
        f(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The writing end; there is one, in the committer's thread.
pub(super) struct Log {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segments: Segments,
    file: Box<dyn DiskFile>,
    path: PathBuf,
    /// Position of the current segment's first byte.
    start: u64,
    /// Position after the last whole envelope.
    end: u64,
    /// Whether bytes of a failed append may stand after `end`.
    dirty: bool,
}

impl Log {
    /// Opens the log in `dir`, cutting off what a crash left at its end.
    pub(super) fn open(disk: Arc<dyn Disk>, dir: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(|error| StoreError::io(dir, &error))?;
        let segments = Segments::default();
        let mut last = None;
        for (start, path) in list(dir)? {
            segments.add(start, &path)?;
            last = Some((start, path));
        }
        let (start, path) = last.unwrap_or_else(|| (0, segment_path(dir, 0)));
        let file = disk
            .open(&path)
            .map_err(|error| StoreError::io(&path, &error))?;
        let mut log = Self {
            disk,
            dir: dir.to_owned(),
            segments,
            file,
            path,
            start,
            end: start,
            dirty: true,
        };
        let bytes = fs::read(&log.path).map_err(|error| StoreError::io(&log.path, &error))?;
        if bytes.len() < MAGIC.len() {
            log.begin()?;
        } else {
            let whole = whole_len(&log.path, &bytes)?;
            log.end = start + whole as u64;
            if whole < bytes.len() {
                tracing::warn!(
                    path = %log.path.display(),
                    bytes = bytes.len() - whole,
                    "cutting off an unfinished write at the end of the log"
                );
                log.clean()?;
            }
            log.dirty = false;
        }
        Ok(log)
    }

    /// For readers.
    pub(super) fn segments(&self) -> Segments {
        self.segments.clone()
    }

    /// Position after the last whole envelope.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Appends `payloads` and returns, once they are on the medium, the position of each one's
    /// first payload byte. On an error none of them is in the log.
    pub(super) fn append(&mut self, payloads: &[Vec<u8>]) -> Result<Vec<u64>, StoreError> {
        if self.dirty {
            self.clean()?;
        }
        if self.end - self.start >= SEGMENT {
            self.roll()?;
        }
        let mut bytes = Vec::with_capacity(payloads.iter().map(|p| p.len() + HEADER).sum());
        let mut positions = Vec::with_capacity(payloads.len());
        for payload in payloads {
            bytes.extend_from_slice(&envelope::header(payload));
            positions.push(self.end + bytes.len() as u64);
            bytes.extend_from_slice(payload);
        }
        let written = self.file.append(&bytes).and_then(|()| self.file.sync());
        if let Err(error) = written {
            self.dirty = true;
            // Frees the space at once; if it fails, the next append tries again first.
            if let Err(error) = self.clean() {
                tracing::error!(%error, "the log could not be cut back after a failed write");
            }
            return Err(StoreError::io(&self.path, &error));
        }
        self.end += bytes.len() as u64;
        Ok(positions)
    }

    /// Calls `visit(position, payload)` for every envelope whose first payload byte stands at or
    /// after `from`, in order.
    pub(super) fn replay(
        &self,
        from: u64,
        mut visit: impl FnMut(u64, &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let all: Vec<(u64, PathBuf)> = self.segments.with(|map| {
            let entries = map
                .iter()
                .map(|(start, segment)| (*start, segment.path.clone()));
            entries.collect()
        });
        for (at, (start, path)) in all.iter().enumerate() {
            let segment_end = all.get(at + 1).map_or(self.end, |next| next.0);
            if segment_end <= from {
                continue;
            }
            let bytes = fs::read(path).map_err(|error| StoreError::io(path, &error))?;
            let len = usize::try_from(segment_end - start).unwrap_or(usize::MAX);
            let damaged = |offset: usize| StoreError::Corrupt {
                path: path.clone(),
                why: format!("no valid record at byte {offset}"),
            };
            let bytes = bytes.get(..len).ok_or_else(|| damaged(bytes.len()))?;
            let mut rest = bytes.get(MAGIC.len()..).ok_or_else(|| damaged(0))?;
            while !rest.is_empty() {
                let offset = len - rest.len();
                let (payload, next) =
                    envelope::split(rest, MAX_ENTRY).map_err(|_| damaged(offset))?;
                let position = start + (offset + HEADER) as u64;
                if position >= from {
                    visit(position, payload)?;
                }
                rest = next;
            }
        }
        Ok(())
    }

    /// Cuts the current segment back to the last whole envelope.
    fn clean(&mut self) -> Result<(), StoreError> {
        self.file
            .truncate(self.end - self.start)
            .and_then(|()| self.file.sync())
            .map_err(|error| StoreError::io(&self.path, &error))?;
        self.dirty = false;
        if self.end == self.start {
            self.begin()?;
        }
        Ok(())
    }

    /// Writes the magic of a new or torn segment.
    fn begin(&mut self) -> Result<(), StoreError> {
        let written = (|| {
            self.file.truncate(0)?;
            self.file.append(MAGIC)?;
            self.file.sync()?;
            self.disk.sync_dir(&self.dir)
        })();
        if let Err(error) = written {
            self.dirty = true;
            return Err(StoreError::io(&self.path, &error));
        }
        self.segments.add(self.start, &self.path)?;
        self.end = self.start + MAGIC.len() as u64;
        self.dirty = false;
        Ok(())
    }

    fn roll(&mut self) -> Result<(), StoreError> {
        let path = segment_path(&self.dir, self.end);
        let file = self
            .disk
            .open(&path)
            .map_err(|error| StoreError::io(&path, &error))?;
        (self.start, self.path, self.file) = (self.end, path, file);
        self.begin()
    }
}

fn segment_path(dir: &Path, start: u64) -> PathBuf {
    dir.join(format!("{start:016x}.seg"))
}

/// The segments of a folder in order.
fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, StoreError> {
    let entries = fs::read_dir(dir).map_err(|error| StoreError::io(dir, &error))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| StoreError::io(dir, &error))?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        if path.extension().is_some_and(|ext| ext == "seg")
            && let Some(start) = stem.and_then(|stem| u64::from_str_radix(stem, 16).ok())
        {
            found.push((start, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Length of the magic and the whole envelopes after it.
fn whole_len(path: &Path, bytes: &[u8]) -> Result<usize, StoreError> {
    let Some(mut rest) = bytes.strip_prefix(MAGIC) else {
        return Err(StoreError::Corrupt {
            path: path.to_owned(),
            why: "it is not a log segment of this version".to_owned(),
        });
    };
    loop {
        match envelope::split(rest, MAX_ENTRY) {
            Ok((_, next)) => rest = next,
            Err(
                EnvelopeError::Incomplete(_) | EnvelopeError::TooLong | EnvelopeError::Checksum,
            ) => {
                return Ok(bytes.len() - rest.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::RealDisk;
    use super::super::disk::faulty::{Faults, FaultyDisk};
    use super::*;
    use std::sync::atomic::Ordering::SeqCst;

    fn payloads(n: u8) -> Vec<Vec<u8>> {
        (1..=n).map(|i| vec![i; 10 + usize::from(i)]).collect()
    }

    fn all(log: &Log, from: u64) -> Vec<(u64, Vec<u8>)> {
        let mut seen = Vec::new();
        log.replay(from, |at, payload| {
            seen.push((at, payload.to_vec()));
            Ok(())
        })
        .unwrap();
        seen
    }

    #[test]
    fn positions_read_back_what_was_appended() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(Arc::new(RealDisk), dir.path()).unwrap();
        let positions = log.append(&payloads(5)).unwrap();
        for (position, payload) in positions.iter().zip(payloads(5)) {
            let read = log.segments().read(*position, payload.len()).unwrap();
            assert_eq!(read, payload);
        }
        assert_eq!(
            all(&log, positions[3]).len(),
            2,
            "from a position, inclusive"
        );
        assert!(log.segments().read(log.end(), 1).is_err());
    }

    #[test]
    fn cut_after_any_byte_leaves_whole_records_and_a_working_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(Arc::new(RealDisk), dir.path()).unwrap();
        log.append(&payloads(4)).unwrap();
        let whole = fs::read(segment_path(dir.path(), 0)).unwrap();
        let mut ends = vec![MAGIC.len()];
        for payload in payloads(4) {
            ends.push(ends.last().unwrap() + HEADER + payload.len());
        }
        for cut in 0..=whole.len() {
            let copy = tempfile::tempdir().unwrap();
            fs::write(segment_path(copy.path(), 0), &whole[..cut]).unwrap();
            let mut log = Log::open(Arc::new(RealDisk), copy.path()).unwrap();
            let kept = ends
                .iter()
                .filter(|end| **end <= cut)
                .count()
                .saturating_sub(1);
            let found: Vec<_> = all(&log, 0).into_iter().map(|(_, p)| p).collect();
            assert_eq!(found, payloads(4)[..kept], "cut at {cut}");
            log.append(&[vec![9; 3]]).unwrap();
            drop(log);
            let log = Log::open(Arc::new(RealDisk), copy.path()).unwrap();
            assert_eq!(all(&log, 0).len(), kept + 1, "cut at {cut}, after one more");
        }
    }

    #[test]
    fn a_full_disk_appends_nothing_and_works_again_later() {
        let faults = Faults::none();
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(FaultyDisk(faults.clone()));
        let mut log = Log::open(disk, dir.path()).unwrap();
        log.append(&payloads(2)).unwrap();
        let end = log.end();
        for space in 0..30 {
            faults.space.store(space, SeqCst);
            let error = log.append(&payloads(2)).unwrap_err();
            assert!(matches!(error, StoreError::Full { .. }), "{error}");
            assert_eq!(log.end(), end);
            assert_eq!(fs::metadata(&log.path).unwrap().len(), end);
        }
        faults.space.store(u64::MAX, SeqCst);
        log.append(&payloads(3)).unwrap();
        assert_eq!(all(&log, 0).len(), 5);
    }

    #[test]
    fn a_failed_sync_is_not_taken_for_success_even_if_the_cut_fails_too() {
        let faults = Faults::none();
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(Arc::new(FaultyDisk(faults.clone())), dir.path()).unwrap();
        faults.sync_fails.store(true, SeqCst);
        faults.truncate_fails.store(true, SeqCst);
        assert!(log.append(&payloads(2)).is_err());
        assert!(log.append(&payloads(2)).is_err());
        faults.sync_fails.store(false, SeqCst);
        faults.truncate_fails.store(false, SeqCst);
        log.append(&payloads(1)).unwrap();
        assert_eq!(all(&log, 0).len(), 1);
    }

    #[test]
    fn segments_roll_and_replay_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(Arc::new(RealDisk), dir.path()).unwrap();
        log.append(&payloads(2)).unwrap();
        log.roll().unwrap();
        let positions = log.append(&payloads(3)).unwrap();
        drop(log);
        let log = Log::open(Arc::new(RealDisk), dir.path()).unwrap();
        assert_eq!(list(dir.path()).unwrap().len(), 2);
        let seen = all(&log, 0);
        assert_eq!(seen.len(), 5);
        assert!(seen.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(all(&log, positions[0]).len(), 3);
    }

    #[test]
    fn damage_before_the_end_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(Arc::new(RealDisk), dir.path()).unwrap();
        log.append(&payloads(2)).unwrap();
        let first = log.path.clone();
        log.roll().unwrap();
        let mut bytes = fs::read(&first).unwrap();
        bytes[20] ^= 1;
        fs::write(&first, bytes).unwrap();
        let log = Log::open(Arc::new(RealDisk), dir.path()).unwrap();
        let error = log.replay(0, |_, _| Ok(())).unwrap_err();
        assert!(
            error.to_string().contains("0000000000000000.seg"),
            "{error}"
        );
    }
}
