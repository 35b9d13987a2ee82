//! What the spool must remember beside samples: a journal in two halves. One half is live; when it
//! is full, what still matters is written to the other, and a last note there makes it the live
//! one. So a power cut leaves either the old half whole or the new one.

use embedded_storage::nor_flash::NorFlash;
use flywheel_shared::ids::SampleKey;
use flywheel_shared::message::{LossReason, MAX_BOOKS};

use super::SpoolError;
use super::area::{Area, BLOCK, sealed, unsealed};
use super::slots::Slots;
use super::table::Entry;

/// Notes that fit a half beyond what [`Journal::renew`] may write.
const SPARE: usize = 32;

const BEGIN: u32 = 0x4A00;
const COMMIT: u32 = 0x4A01;
const THROUGH: u32 = 0x4A02;
const ACCOUNT: u32 = 0x4A03;
const SETTLED: u32 = 0x4A04;
const LOSS: u32 = 0x4A10;

/// One fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Note {
    /// Everything up to here is acknowledged.
    Through(SampleKey),
    /// An epoch gave out at least so many numbers.
    Account { epoch: u32, flagged: u32 },
    /// The cloud knows the last book of an epoch.
    Settled(u32),
    /// Numbers that are lost.
    Loss {
        epoch: u32,
        first: u32,
        last: u32,
        reason: LossReason,
    },
}

impl Note {
    pub(super) fn loss(entry: &Entry, reason: LossReason) -> Self {
        Self::Loss {
            epoch: entry.key.epoch,
            first: entry.key.seq,
            last: entry.last,
            reason,
        }
    }

    fn to_words(self) -> [u32; 4] {
        match self {
            Self::Through(key) => [THROUGH, key.epoch, key.seq, 0],
            Self::Account { epoch, flagged } => [ACCOUNT, epoch, flagged, 0],
            Self::Settled(epoch) => [SETTLED, epoch, 0, 0],
            Self::Loss {
                epoch,
                first,
                last,
                reason,
            } => [LOSS + code(reason), epoch, first, last],
        }
    }

    fn from_words([kind, a, b, c]: [u32; 4]) -> Option<Self> {
        match kind {
            THROUGH => Some(Self::Through(SampleKey { epoch: a, seq: b })),
            ACCOUNT => Some(Self::Account {
                epoch: a,
                flagged: b,
            }),
            SETTLED => Some(Self::Settled(a)),
            _ if b <= c => Some(Self::Loss {
                epoch: a,
                first: b,
                last: c,
                reason: reason(kind.checked_sub(LOSS)?)?,
            }),
            _ => None,
        }
    }
}

fn code(reason: LossReason) -> u32 {
    reason as u32
}

fn reason(code: u32) -> Option<LossReason> {
    LossReason::ALL.get(code as usize).copied()
}

/// Where the journal lies and how far it is written.
#[derive(Clone, Debug)]
pub(super) struct Journal {
    /// Bytes of a half, whole erase blocks.
    half_bytes: u32,
    /// 0 or 1.
    live: u32,
    generation: u32,
    /// Blocks written in the live half.
    filled: u32,
}

impl Journal {
    /// A journal for a table of so many entries.
    pub(super) fn new<F: NorFlash>(entries: usize) -> Self {
        let most = BLOCK * (3 + MAX_BOOKS + entries + SPARE);
        Self {
            half_bytes: most.next_multiple_of(F::ERASE_SIZE) as u32,
            live: 1,
            generation: 0,
            filled: u32::MAX, // Until it is found or renewed.
        }
    }

    /// The first byte behind both halves.
    pub(super) fn end(&self) -> u32 {
        2 * self.half_bytes
    }

    fn place(&self, half: u32, block: u32) -> u32 {
        half * self.half_bytes + block * BLOCK as u32
    }

    /// Looks for the live half; `false` if there is none.
    pub(super) fn find<F: NorFlash>(
        &mut self,
        area: &mut Area<F>,
        slots: &Slots,
    ) -> Result<bool, SpoolError<F::Error>> {
        let mut found = false;
        for half in 0..2 {
            let Some([BEGIN, generation, slot_bytes, count]) =
                unsealed(&area.block(self.place(half, 0))?)
            else {
                continue;
            };
            if (slot_bytes, count) != (slots.bytes(), slots.count() as u32) {
                return Err(SpoolError::OtherLayout {
                    slot_bytes,
                    slots: count,
                });
            }
            if self.is_committed(area, half, generation)?
                && (!found || generation > self.generation)
            {
                found = true;
                self.live = half;
                self.generation = generation;
                // Behind the last note, a word may be half written and still read as erased, and
                // no word may be written twice: the first note of this start renews the journal.
                self.filled = self.blocks();
            }
        }
        Ok(found)
    }

    /// Whether a half was written to its end.
    fn is_committed<F: NorFlash>(
        &self,
        area: &mut Area<F>,
        half: u32,
        generation: u32,
    ) -> Result<bool, SpoolError<F::Error>> {
        for index in 0..self.blocks() {
            let block = area.block(self.place(half, index))?;
            if unsealed(&block) == Some([COMMIT, generation, 0, 0]) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// How many notes a half holds.
    pub(super) fn blocks(&self) -> u32 {
        self.half_bytes / BLOCK as u32
    }

    /// A note of the live half; `None` for what is none or was cut short.
    pub(super) fn read<F: NorFlash>(
        &self,
        area: &mut Area<F>,
        index: u32,
    ) -> Result<Option<Note>, SpoolError<F::Error>> {
        let block = area.block(self.place(self.live, index))?;
        Ok(unsealed(&block).and_then(Note::from_words))
    }

    pub(super) fn has_room(&self) -> bool {
        self.filled < self.blocks()
    }

    /// Writes a note; there must be room.
    pub(super) fn append<F: NorFlash>(
        &mut self,
        area: &mut Area<F>,
        note: Note,
    ) -> Result<(), SpoolError<F::Error>> {
        self.write(area, self.live, note.to_words())
    }

    /// Writes `notes` to the other half and makes it the live one.
    pub(super) fn renew<F: NorFlash>(
        &mut self,
        area: &mut Area<F>,
        slots: &Slots,
        notes: impl Iterator<Item = Note>,
    ) -> Result<(), SpoolError<F::Error>> {
        let half = 1 - self.live;
        let mut next = Self {
            live: half,
            generation: self.generation + 1,
            filled: 0,
            ..*self
        };
        let from = self.place(half, 0);
        area.erase(from, from + self.half_bytes)?;
        let generation = next.generation;
        next.write(
            area,
            half,
            [BEGIN, generation, slots.bytes(), slots.count() as u32],
        )?;
        for note in notes {
            next.append(area, note)?;
        }
        next.write(area, half, [COMMIT, generation, 0, 0])?;
        *self = next;
        Ok(())
    }

    /// A block that failed is not written again.
    fn write<F: NorFlash>(
        &mut self,
        area: &mut Area<F>,
        half: u32,
        words: [u32; 4],
    ) -> Result<(), SpoolError<F::Error>> {
        let at = self.place(half, self.filled);
        self.filled += 1;
        area.write(at, &sealed(words))
    }
}
