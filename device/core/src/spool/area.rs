//! A piece of NOR flash, addressed from 0, in blocks that every part can read and write.

use core::ops::Range;

use embedded_storage::nor_flash::NorFlash;

use super::SpoolError;

/// Everything begins at a multiple of this; no part's write or read unit is longer.
pub(super) const BLOCK: usize = 32;
/// Longest single write: the usual page of a serial NOR part.
pub(super) const PAGE: usize = 256;

pub(super) struct Area<F> {
    flash: F,
    range: Range<u32>,
}

impl<F: NorFlash> Area<F> {
    pub(super) fn new(flash: F, range: Range<u32>) -> Result<Self, &'static str> {
        let erase = F::ERASE_SIZE as u32;
        if !BLOCK.is_multiple_of(F::WRITE_SIZE) || !BLOCK.is_multiple_of(F::READ_SIZE) {
            return Err("read and write units must divide 32 bytes");
        }
        if !F::ERASE_SIZE.is_multiple_of(BLOCK) {
            return Err("an erase block must be a multiple of 32 bytes");
        }
        if range.start > range.end
            || range.end as usize > flash.capacity()
            || !range.start.is_multiple_of(erase)
            || !range.end.is_multiple_of(erase)
        {
            return Err("the area must be whole erase blocks inside the flash");
        }
        Ok(Self { flash, range })
    }

    pub(super) fn len(&self) -> u32 {
        self.range.end - self.range.start
    }

    /// Fills `out`; `at` is a multiple of [`BLOCK`], the length is not.
    pub(super) fn read(&mut self, at: u32, out: &mut [u8]) -> Result<(), SpoolError<F::Error>> {
        let at = self.range.start + at;
        let whole = out.len() - out.len() % F::READ_SIZE;
        let (body, tail) = out.split_at_mut(whole);
        self.flash.read(at, body).map_err(SpoolError::Flash)?;
        if !tail.is_empty() {
            let mut unit = [0; BLOCK];
            let unit = &mut unit[..F::READ_SIZE];
            self.flash
                .read(at + whole as u32, unit)
                .map_err(SpoolError::Flash)?;
            tail.copy_from_slice(&unit[..tail.len()]);
        }
        Ok(())
    }

    /// One block, as [`Area::read`].
    pub(super) fn block(&mut self, at: u32) -> Result<[u8; BLOCK], SpoolError<F::Error>> {
        let mut block = [0; BLOCK];
        self.read(at, &mut block)?;
        Ok(block)
    }

    /// Writes whole blocks to erased ones.
    pub(super) fn write(&mut self, at: u32, bytes: &[u8]) -> Result<(), SpoolError<F::Error>> {
        self.flash
            .write(self.range.start + at, bytes)
            .map_err(SpoolError::Flash)
    }

    /// Erases `from..to`.
    pub(super) fn erase(&mut self, from: u32, to: u32) -> Result<(), SpoolError<F::Error>> {
        let base = self.range.start;
        self.flash
            .erase(base + from, base + to)
            .map_err(SpoolError::Flash)
    }

    pub(super) fn flash(&self) -> &F {
        &self.flash
    }

    #[cfg(test)]
    pub(super) fn flash_mut(&mut self) -> &mut F {
        &mut self.flash
    }
}

/// Four bytes, little endian.
pub(super) fn word(bytes: &[u8], index: usize) -> u32 {
    let at = 4 * index;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// A block of words and their checksum, the rest left erased.
pub(super) fn sealed(words: [u32; 4]) -> [u8; BLOCK] {
    let mut block = [0xFF; BLOCK];
    for (bytes, word) in block.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let crc = CRC32.checksum(&block[..16]);
    block[16..20].copy_from_slice(&crc.to_le_bytes());
    block
}

/// The words of a block whose checksum holds.
pub(super) fn unsealed(block: &[u8; BLOCK]) -> Option<[u32; 4]> {
    (CRC32.checksum(&block[..16]) == word(block, 4))
        .then(|| [0, 1, 2, 3].map(|index| word(block, index)))
}

/// The checksum of the envelopes on the wire, without a table: flash is dearer than the eight steps
/// a byte, which a page takes longer to program than to sum up.
pub(super) const CRC32: crc::Crc<u32, crc::NoTable> =
    crc::Crc::<u32, crc::NoTable>::new(&crc::CRC_32_ISCSI);
