//! NOR flash in RAM: bits only fall from 1 to 0, erasing works on whole blocks, no word is written
//! twice, and the power can be cut at any operation, which is then left half done.

use embedded_storage::nor_flash::{
    ErrorType, NorFlash, NorFlashError, NorFlashErrorKind, ReadNorFlash, check_erase, check_read,
    check_write,
};

/// Why the simulated flash does not do what it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimError {
    /// Not aligned, or out of bounds.
    Arguments(NorFlashErrorKind),
    /// A word that is not erased would be written.
    NotErased,
    /// The power is cut: everything fails until [`NorSim::restore`].
    PowerCut,
    /// The block is worn out: see [`NorSim::wear_out`].
    WornOut,
}

impl NorFlashError for SimError {
    fn kind(&self) -> NorFlashErrorKind {
        match self {
            Self::Arguments(kind) => *kind,
            _ => NorFlashErrorKind::Other,
        }
    }
}

/// A part that writes words of `WRITE` bytes and erases blocks of `ERASE`.
#[derive(Debug)]
pub struct NorSim<'a, const WRITE: usize, const ERASE: usize> {
    bytes: &'a mut [u8],
    /// Writes and erases until the power is cut; `None` for never.
    left: Option<u32>,
    cut: bool,
    /// First cell of a word that a cut left half written; it may still read as erased.
    torn: Option<usize>,
    worn: Option<usize>,
    operations: u32,
    erases: u32,
    seed: u32,
}

impl<'a, const WRITE: usize, const ERASE: usize> NorSim<'a, WRITE, ERASE> {
    /// A part of as many cells as `bytes`, with what they hold. A new part is all `0xFF`.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self {
            bytes,
            left: None,
            cut: false,
            torn: None,
            worn: None,
            operations: 0,
            erases: 0,
            seed: 1,
        }
    }

    /// Cuts the power in the middle of the write or erase after the next `operations`; `seed`
    /// decides how far that one gets.
    pub fn cut_after(&mut self, operations: u32, seed: u32) {
        self.left = Some(operations);
        self.seed = seed;
    }

    /// The power is back.
    pub fn restore(&mut self) {
        self.left = None;
        self.cut = false;
    }

    /// Whether the power is cut.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// Writes to and erasures of this erase block fail from now on; `None` for none.
    pub fn wear_out(&mut self, block: Option<usize>) {
        self.worn = block;
    }

    /// Writes and erases so far.
    pub fn operations(&self) -> u32 {
        self.operations
    }

    /// Erases so far.
    pub fn erases(&self) -> u32 {
        self.erases
    }

    /// The cells, to be damaged by a test.
    pub fn cells(&mut self) -> &mut [u8] {
        self.bytes
    }

    fn random(&mut self) -> u32 {
        // Numerical Recipes' "quick and dirty" generator, its better half.
        self.seed = self
            .seed
            .wrapping_mul(1_664_525)
            .wrapping_add(1_013_904_223);
        self.seed >> 16
    }

    /// Counts an operation on `block`; `true` if the power is cut in the middle of it.
    fn begin(&mut self, block: usize) -> Result<bool, SimError> {
        if self.cut {
            return Err(SimError::PowerCut);
        }
        if self.worn == Some(block) {
            return Err(SimError::WornOut);
        }
        self.operations += 1;
        match &mut self.left {
            Some(0) => {
                self.cut = true;
                Ok(true)
            }
            Some(left) => {
                *left -= 1;
                Ok(false)
            }
            None => Ok(false),
        }
    }
}

impl<const WRITE: usize, const ERASE: usize> ErrorType for NorSim<'_, WRITE, ERASE> {
    type Error = SimError;
}

impl<const WRITE: usize, const ERASE: usize> ReadNorFlash for NorSim<'_, WRITE, ERASE> {
    const READ_SIZE: usize = if WRITE < 4 { WRITE } else { 4 };

    fn read(&mut self, offset: u32, bytes: &mut [u8]) -> Result<(), SimError> {
        check_read(self, offset, bytes.len()).map_err(SimError::Arguments)?;
        if self.cut {
            return Err(SimError::PowerCut);
        }
        let at = offset as usize;
        bytes.copy_from_slice(&self.bytes[at..at + bytes.len()]);
        Ok(())
    }

    fn capacity(&self) -> usize {
        self.bytes.len()
    }
}

impl<const WRITE: usize, const ERASE: usize> NorFlash for NorSim<'_, WRITE, ERASE> {
    const WRITE_SIZE: usize = WRITE;
    const ERASE_SIZE: usize = ERASE;

    fn erase(&mut self, from: u32, to: u32) -> Result<(), SimError> {
        check_erase(self, from, to).map_err(SimError::Arguments)?;
        for block in from as usize / ERASE..to as usize / ERASE {
            let cells = block * ERASE..(block + 1) * ERASE;
            if self.begin(block)? {
                // An erasure that was cut leaves nobody knows what; some of it is as before.
                for at in cells {
                    let (lot, bits) = (self.random() % 3, self.random() as u8);
                    match lot {
                        0 => {}
                        1 => self.bytes[at] = 0xFF,
                        _ => self.bytes[at] |= bits,
                    }
                }
                return Err(SimError::PowerCut);
            }
            self.erases += 1;
            self.torn = self.torn.filter(|at| !cells.contains(at));
            self.bytes[cells].fill(0xFF);
        }
        Ok(())
    }

    fn write(&mut self, offset: u32, bytes: &[u8]) -> Result<(), SimError> {
        check_write(self, offset, bytes.len()).map_err(SimError::Arguments)?;
        let at = offset as usize;
        let torn = self.begin(at / ERASE)?;
        let cells = at..at + bytes.len();
        let torn_before = self.torn.is_some_and(|at| cells.contains(&at));
        if torn_before || self.bytes[cells.clone()].iter().any(|cell| *cell != 0xFF) {
            return Err(SimError::NotErased);
        }
        if !torn {
            self.bytes[cells].copy_from_slice(bytes);
            return Ok(());
        }
        // Words up to some place are written, the next one in part, the others not at all.
        let words = bytes.len() / WRITE;
        let whole = self.random() as usize % (words + 1) * WRITE;
        self.bytes[at..at + whole].copy_from_slice(&bytes[..whole]);
        self.torn = (whole < bytes.len()).then_some(at + whole);
        let half = whole..(whole + WRITE).min(bytes.len());
        // What is half written may still read as erased.
        if !self.random().is_multiple_of(4) {
            for (index, byte) in half.clone().zip(&bytes[half]) {
                self.bytes[at + index] = byte | self.random() as u8;
            }
        }
        Err(SimError::PowerCut)
    }
}
