//! The files below the spool: appending to the newest segment, deleting free ones, and moving the
//! last entries out of sparse ones.

use flywheel_shared::ids::SampleKey;

use super::ledger::LedgerError;
use super::segment::{self, Entry, OVERHEAD};
use super::{Content, Held, Place, Segment, SegmentId, Spool, SpoolError, disk_error};

/// A segment that has reached this length in bytes is followed by a new one.
pub(super) const SEGMENT: u64 = 1 << 20;

impl Spool {
    pub(super) fn append(
        &mut self,
        key: SampleKey,
        value: f32,
        record: &[u8],
    ) -> Result<Place, SpoolError> {
        self.buffer.clear();
        segment::encode(&Entry { key, value, record }, &mut self.buffer);
        let len = self.buffer.len() as u64;
        let filled = self.segments.get(&self.active).map_or(0, |s| s.len);
        if self.sealed || (filled > 0 && filled + len > SEGMENT) {
            self.roll()?;
        }
        let id = self.active;
        let name = segment::file_name(id.0, id.1);
        let offset = self.segments.get(&id).map_or(0, |s| s.len);
        if let Err(source) = self.disk.write_at(&name, offset, &self.buffer) {
            // Whatever was written of it must not stand before a later entry.
            self.sealed = self.disk.truncate(&name, offset).is_err();
            return Err(disk_error("write", id)(source));
        }
        let segment = self.segments.entry(id).or_default();
        segment.len = offset + len;
        segment.synced = false;
        Ok(Place {
            segment: id,
            offset,
            len: self.buffer.len() as u32,
        })
    }

    pub(super) fn roll(&mut self) -> Result<(), SpoolError> {
        let id = (self.epoch, self.active.1 + 1);
        self.disk
            .create(&segment::file_name(id.0, id.1))
            .map_err(disk_error("create", id))?;
        self.segments.insert(id, Segment::default());
        self.active = id;
        self.sealed = false;
        Ok(())
    }

    pub(super) fn sync(&mut self) -> Result<(), SpoolError> {
        for (&id, segment) in &mut self.segments {
            if !segment.synced {
                self.disk
                    .sync(&segment::file_name(id.0, id.1))
                    .map_err(disk_error("fsync", id))?;
                segment.synced = true;
            }
        }
        Ok(())
    }

    pub(super) fn save_accounts(&mut self) -> Result<(), LedgerError> {
        for (&epoch, account) in &self.accounts {
            self.ledger.put(epoch, account)?;
        }
        self.ledger.flush()
    }

    /// Deletes segments that hold nothing any more. A failure is retried at the next call.
    pub(super) fn sweep(&mut self) {
        let active = self.active;
        let free: Vec<SegmentId> = self
            .segments
            .iter()
            .filter(|(id, segment)| **id != active && segment.live == 0)
            .map(|(id, _)| *id)
            .collect();
        if free.is_empty() {
            return;
        }
        // What replaced their entries (moved samples, loss records, acknowledgements) first.
        if let Err(error) = self
            .sync()
            .and_then(|()| self.save_accounts().map_err(SpoolError::Ledger))
        {
            tracing::warn!(%error, "free spool segments stay until the disk takes the ledger");
            return;
        }
        for id in free {
            match self.disk.remove(&segment::file_name(id.0, id.1)) {
                Ok(()) => {
                    self.segments.remove(&id);
                }
                Err(source) => {
                    let error = disk_error("delete", id)(source);
                    tracing::warn!(%error, "will be tried again");
                }
            }
        }
    }

    /// Moves the entries of the sparsest segment to the newest one if the files have grown far
    /// beyond what they hold. One segment a call, so that no push takes long.
    pub(super) fn compact(&mut self) {
        let on_disk: u64 = self.segments.values().map(|segment| segment.len).sum();
        if on_disk <= self.quota + self.quota / 2 + 2 * SEGMENT {
            return;
        }
        let active = self.active;
        let Some(id) = self
            .segments
            .iter()
            .filter(|(id, _)| **id != active)
            .min_by_key(|(_, segment)| segment.live_bytes)
            .map(|(id, _)| *id)
        else {
            return;
        };
        let moving: Vec<(SampleKey, Held, Place)> = self
            .held
            .iter()
            .filter_map(|(key, held)| held.place.map(|place| (*key, *held, place)))
            .filter(|(_, _, place)| place.segment == id)
            .collect();
        for (key, held, place) in moving {
            let Ok(Some(bytes)) = self.read_entry(key, place) else {
                // Left where it is; `take` will find and book the damage.
                return;
            };
            let value = match held.content {
                Content::Sample { value } => value,
                Content::Loss(_) => 0.0,
            };
            let Ok(place) = self.append(key, value, &bytes[OVERHEAD..]) else {
                return;
            };
            let sent = !self.unsent.contains(&key);
            self.release(key);
            self.hold(key, held.content, Some(place));
            if sent {
                self.unmark(key);
            }
        }
        self.sweep();
    }
}
