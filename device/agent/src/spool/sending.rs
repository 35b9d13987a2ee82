//! What leaves the spool: batches of the oldest records, read back from the segments.

use std::io;

use flywheel_shared::ids::SampleKey;
use flywheel_shared::message::{Loss, LossReason, Record};

use super::segment::{self, OVERHEAD};
use super::{
    Content, Held, Outgoing, Pending, Place, Spool, SpoolError, disk_error, extend_record,
};

impl Spool {
    /// How much waits to be sent.
    pub fn pending(&self) -> Pending {
        let current = SampleKey {
            epoch: self.epoch,
            seq: self.durable(self.epoch),
        };
        // Losses at the very end that are not on disk are told to nobody yet.
        let volatile = self
            .unwritten
            .range(current..)
            .filter(|key| **key != current);
        Pending {
            records: self.unsent.len() - volatile.count().min(self.unsent.len()),
            bytes: self.unsent_bytes,
        }
    }

    /// Takes the oldest unsent records of one epoch, at most `max_records` and about `max_bytes`
    /// of them, but at least one. They stay held until [`Spool::ack`] or [`Spool::unsend`].
    pub fn take(
        &mut self,
        max_records: usize,
        max_bytes: usize,
    ) -> Result<Option<Outgoing>, SpoolError> {
        self.sync()?;
        let durable = |spool: &Self, key: &SampleKey| key.seq <= spool.durable(key.epoch);
        let Some(first) = self.unsent.iter().find(|key| durable(self, key)).copied() else {
            return Ok(None);
        };
        let candidates: Vec<SampleKey> = self
            .unsent
            .range(first..)
            .take_while(|key| key.epoch == first.epoch && durable(self, key))
            .take(max_records.clamp(1, usize::from(u16::MAX)))
            .copied()
            .collect();
        let mut out = Outgoing {
            epoch: first.epoch,
            count: 0,
            records: Vec::new(),
        };
        let mut taken = Vec::new();
        for key in candidates {
            let before = out.records.len();
            self.read_record(key, &mut out.records)?;
            if before > 0 && out.records.len() > max_bytes {
                out.records.truncate(before);
                break;
            }
            out.count += 1;
            taken.push(key);
        }
        for key in taken {
            self.unmark(key);
        }
        Ok(Some(out))
    }

    /// Appends the record of `key` to `out`; a sample that can no longer be read becomes a loss.
    fn read_record(&mut self, key: SampleKey, out: &mut Vec<u8>) -> Result<(), SpoolError> {
        let Some(held) = self.held.get(&key).copied() else {
            return Ok(());
        };
        if let (Content::Sample { .. }, Some(place)) = (held.content, held.place) {
            match self.read_entry(key, place) {
                Ok(Some(bytes)) => {
                    out.extend_from_slice(&bytes[OVERHEAD..]);
                    return Ok(());
                }
                Ok(None) => {}
                Err(error) if is_damage(&error) => {}
                Err(source) => return Err(disk_error("read", place.segment)(source)),
            }
            tracing::error!(
                epoch = key.epoch,
                seq = key.seq,
                "a spooled sample no longer matches its checksum; it is booked as lost"
            );
            self.lose(key, LossReason::Corrupt);
            self.sync()?;
        }
        if let Some(Held {
            content: Content::Loss(reason),
            ..
        }) = self.held.get(&key)
        {
            let loss = Record::Loss(Loss {
                seq: key.seq,
                reason: *reason,
            });
            extend_record(&loss, out);
        }
        Ok(())
    }

    /// The bytes of an entry, envelope included; `None` if they are damaged.
    pub(super) fn read_entry(&self, key: SampleKey, place: Place) -> io::Result<Option<Vec<u8>>> {
        let name = segment::file_name(place.segment.0, place.segment.1);
        let bytes = self.disk.read_at(&name, place.offset, place.len as usize)?;
        let good = segment::decode(&bytes).is_some_and(|entry| entry.key == key);
        Ok(good.then_some(bytes))
    }

    /// Forgets what was sent and not acknowledged: it will be sent again.
    pub fn unsend(&mut self) {
        let keys: Vec<SampleKey> = self.held.keys().copied().collect();
        for key in keys {
            self.mark(key);
        }
    }
}

/// Whether an error says that the stored bytes are gone, not that the machine is busy.
fn is_damage(error: &io::Error) -> bool {
    const EIO: i32 = 5;
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound
    ) || error.raw_os_error() == Some(EIO)
}
