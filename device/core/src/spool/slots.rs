//! Slots: one sample each. A head block with the number, the record, and in the last block of the
//! slot a trailer with length and checksum, written last.

use embedded_storage::nor_flash::NorFlash;
use flywheel_shared::ids::SampleKey;
use flywheel_shared::message::{MAX_BOOKS, Record};
use postcard::ser_flavors::{Flavor, Size};

use super::SpoolError;
use super::area::{Area, BLOCK, CRC32, PAGE, sealed, unsealed};

const HEAD: u32 = 0x464C_5953;

/// Bytes of a slot that are not the record's.
pub(super) const OVERHEAD: u32 = 2 * BLOCK as u32;

/// Where the slots lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots {
    start: u32,
    bytes: u32,
    count: u16,
}

/// What the head of a slot says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Head {
    pub(super) key: SampleKey,
    pub(super) value: f32,
}

/// Bytes of a record on the wire; `None` if it cannot be encoded.
pub(super) fn encoded_len(record: &Record<'_>) -> Option<u32> {
    let len = postcard::serialize_with_flavor(record, Size::default()).ok()?;
    u32::try_from(len).ok()
}

impl Slots {
    /// As many slots of `bytes` as fit in `start..end`, and a table of `entries`.
    pub(super) fn new<F: NorFlash>(
        start: u32,
        end: u32,
        bytes: u32,
        entries: usize,
    ) -> Result<Self, &'static str> {
        if bytes <= OVERHEAD || !bytes.is_multiple_of(F::ERASE_SIZE as u32) {
            return Err("a slot must be whole erase blocks");
        }
        let fit = (end.saturating_sub(start) / bytes) as usize;
        let listed = entries.saturating_sub(MAX_BOOKS + 2) / 2;
        let count = fit.min(listed).min(usize::from(u16::MAX));
        if count == 0 {
            return Err("there is no room for a single slot: give a larger area or table");
        }
        Ok(Self {
            start,
            bytes,
            count: count as u16,
        })
    }

    pub(super) fn count(&self) -> usize {
        usize::from(self.count)
    }

    pub(super) fn bytes(&self) -> u32 {
        self.bytes
    }

    /// Longest record that a slot holds.
    pub(super) fn capacity(&self) -> u32 {
        self.bytes - OVERHEAD
    }

    fn place(&self, slot: u16) -> u32 {
        self.start + u32::from(slot) * self.bytes
    }

    /// The block of the trailer.
    fn end(&self, slot: u16) -> u32 {
        self.place(slot) + self.bytes - BLOCK as u32
    }

    /// What a slot's head says; `None` for an empty or damaged one.
    pub(super) fn head<F: NorFlash>(
        &self,
        area: &mut Area<F>,
        slot: u16,
    ) -> Result<Option<Head>, SpoolError<F::Error>> {
        let block = area.block(self.place(slot))?;
        Ok(match unsealed(&block) {
            Some([HEAD, epoch, seq, value]) => Some(Head {
                key: SampleKey { epoch, seq },
                value: f32::from_bits(value),
            }),
            _ => None,
        })
    }

    /// Length of the record in a slot; `None` if it was never completed.
    pub(super) fn trailer<F: NorFlash>(
        &self,
        area: &mut Area<F>,
        slot: u16,
        key: SampleKey,
    ) -> Result<Option<u32>, SpoolError<F::Error>> {
        Ok(self.checked(area, slot, key)?.map(|(len, _)| len))
    }

    /// Length and checksum of the record with this number.
    fn checked<F: NorFlash>(
        &self,
        area: &mut Area<F>,
        slot: u16,
        key: SampleKey,
    ) -> Result<Option<(u32, u32)>, SpoolError<F::Error>> {
        let block = area.block(self.end(slot))?;
        Ok(match unsealed(&block) {
            Some([len, crc, epoch, seq])
                if (SampleKey { epoch, seq }) == key && len <= self.capacity() =>
            {
                Some((len, crc))
            }
            _ => None,
        })
    }

    /// Whether a slot holds a record of this length that matches its checksum.
    pub(super) fn is_whole<F: NorFlash>(
        &self,
        area: &mut Area<F>,
        slot: u16,
        key: SampleKey,
        len: u32,
    ) -> Result<bool, SpoolError<F::Error>> {
        let Some((found, crc)) = self.checked(area, slot, key)? else {
            return Ok(false);
        };
        if found != len {
            return Ok(false);
        }
        let mut digest = CRC32.digest();
        self.stream(area, slot, len, &mut |piece| digest.update(piece))?;
        Ok(digest.finalize() == crc)
    }

    /// Gives a record of known length to `sink`, page by page.
    pub(super) fn stream<F: NorFlash>(
        &self,
        area: &mut Area<F>,
        slot: u16,
        len: u32,
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<(), SpoolError<F::Error>> {
        let mut page = [0; PAGE];
        let from = self.place(slot) + BLOCK as u32;
        for at in (0..len).step_by(PAGE) {
            let piece = &mut page[..PAGE.min((len - at) as usize)];
            area.read(from + at, piece)?;
            sink(piece);
        }
        Ok(())
    }

    /// Erases a slot and writes a record that fits it; the trailer comes last.
    pub(super) fn write<F: NorFlash>(
        &self,
        area: &mut Area<F>,
        slot: u16,
        key: SampleKey,
        value: f32,
        record: &Record<'_>,
    ) -> Result<(), SpoolError<F::Error>> {
        let from = self.place(slot);
        area.erase(from, from + self.bytes)?;
        let mut writer = Writer {
            area,
            at: from,
            page: [0xFF; PAGE],
            filled: 0,
            len: 0,
            digest: CRC32.digest(),
            failed: Ok(()),
        };
        writer.put(&sealed([HEAD, key.epoch, key.seq, value.to_bits()]))?;
        let done = postcard::serialize_with_flavor(record, &mut writer);
        writer.failed?;
        // `encoded_len` has seen that it can be encoded, so nothing but the flash can fail.
        done.map_err(|_| SpoolError::Layout("a record cannot be encoded"))?;
        let (len, crc) = (writer.len, writer.digest.finalize());
        area.write(self.end(slot), &sealed([len, crc, key.epoch, key.seq]))
    }
}

/// Streams bytes into a slot, page by page, so that a record is never in RAM as a whole.
struct Writer<'a, F: NorFlash> {
    area: &'a mut Area<F>,
    at: u32,
    page: [u8; PAGE],
    filled: usize,
    /// Bytes of the record so far.
    len: u32,
    digest: crc::Digest<'static, u32, crc::NoTable>,
    failed: Result<(), SpoolError<F::Error>>,
}

impl<F: NorFlash> Writer<'_, F> {
    fn put(&mut self, mut bytes: &[u8]) -> Result<(), SpoolError<F::Error>> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PAGE - self.filled));
            self.page[self.filled..self.filled + now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == PAGE {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SpoolError<F::Error>> {
        let len = self.filled.next_multiple_of(BLOCK);
        if len > 0 {
            self.area.write(self.at, &self.page[..len])?;
        }
        self.at += len as u32;
        self.page = [0xFF; PAGE];
        self.filled = 0;
        Ok(())
    }
}

impl<F: NorFlash> Flavor for &mut Writer<'_, F> {
    type Output = ();

    fn try_extend(&mut self, data: &[u8]) -> postcard::Result<()> {
        self.digest.update(data);
        self.len += data.len() as u32;
        self.failed = self.put(data);
        match self.failed {
            Ok(()) => Ok(()),
            Err(_) => Err(postcard::Error::SerializeBufferFull),
        }
    }

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.try_extend(&[byte])
    }

    fn finalize(self) -> postcard::Result<()> {
        self.failed = self.flush();
        match self.failed {
            Ok(()) => Ok(()),
            Err(_) => Err(postcard::Error::SerializeBufferFull),
        }
    }
}
