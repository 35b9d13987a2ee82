//! The spool of a microcontroller: every flagged sample on NOR flash between the moment it takes
//! its number and the moment the cloud says that it is on disk there.
//!
//! The law it keeps is `flagged = acknowledged + spooled`, exactly, for each boot epoch, after a
//! power cut at any write or erase: a number is never reused, skipped or forgotten, and a sample
//! that is lost leaves a loss record in its place. That is the law of the spool on Linux
//! (`flywheel-agent`), with the same names. Three rules follow.
//!
//! - A sample is in flash when [`Spool::push`] returns. Its number lies in front of it, and a
//!   trailer behind it makes it valid; what was cut short in between is booked as a crash loss.
//! - Nothing is told to the cloud (sent, or counted in a book) before it is in flash.
//! - A slot is erased only after the loss or the acknowledgement of what it holds is in flash.
//!
//! **Layout.** One sample per slot of a fixed number of erase blocks, and a journal in two halves
//! in front of them for what is not a sample: losses, acknowledgements, epochs. With one sample
//! per slot, the least valuable one is evicted by erasing it, nothing is ever moved, and every push
//! costs the same. The price is that a short sample takes a whole slot, which is small on a device
//! whose frames are all of one size.
//!
//! **Why not `sequential-storage`** (8.0, looked at first): its queue frees the oldest page only,
//! so the least valuable of all samples cannot make room without copying pages around it; an item
//! has to fit a page, and a frame may be longer than an erase block; its traits are async, where
//! these are plain calls; and its format on flash changes with major versions.
//!
//! **Why no trait that both spools implement.** Nothing is generic over them: the agent's hands out
//! `Vec`s and talks to threads and to sled, this one streams into the caller's buffer. What they
//! share is the record that leaves them ([`flywheel_shared::message::Record`]) and the law.
//!
//! Only [`NorFlash`] is needed, no second write to a written word, so flash with error correction
//! will do.

mod area;
mod journal;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
mod slots;
mod table;
#[cfg(test)]
mod tests;

use core::fmt;
use core::ops::Range;

use embedded_storage::nor_flash::NorFlash;
use flywheel_shared::ids::SampleKey;
use flywheel_shared::message::{EpochBook, Loss, LossReason, MAX_BOOKS, Record, Sample};
use heapless::Vec;

use area::Area;
use journal::{Journal, Note};
use slots::Slots;
use table::{Content, LOSS_MAX, Table};

/// Bytes of a slot that are not the sample's.
pub const OVERHEAD: u32 = slots::OVERHEAD;

/// Why the spool cannot do what it was asked. Nothing is lost by any of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpoolError<E> {
    /// The flash refused a read, a write or an erase.
    Flash(E),
    /// The area, the slot size or the table's length do not fit each other or the flash.
    Layout(&'static str),
    /// The flash holds a spool of another layout: open it as that one, or erase it.
    OtherLayout {
        /// Bytes of its slots.
        slot_bytes: u32,
        /// How many it has.
        slots: u32,
    },
    /// The limit is too low for the next record.
    Limit {
        /// Bytes that the record has.
        need: usize,
    },
    /// What was taken is no longer held, so it cannot be read.
    Gone,
}

impl<E: fmt::Debug> fmt::Display for SpoolError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flash(error) => write!(f, "spool: the flash failed: {error:?}"),
            Self::Layout(what) => write!(f, "spool: {what}"),
            Self::OtherLayout { slot_bytes, slots } => write!(
                f,
                "spool: the flash holds a spool of {slots} slots of {slot_bytes} bytes; open it as such or erase it"
            ),
            Self::Limit { need } => write!(f, "spool: the next record needs {need} bytes"),
            Self::Gone => f.write_str("spool: the records to be read are no longer held"),
        }
    }
}

impl<E: fmt::Debug> core::error::Error for SpoolError<E> {}

/// What became of a flagged sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The number it took.
    pub seq: u32,
    /// Why it is lost already, if it is.
    pub lost: Option<LossReason>,
}

/// Records of one epoch that are on their way; [`Spool::read`] gives their bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Their epoch.
    pub epoch: u32,
    /// Number of the first.
    pub first: u32,
    /// How many.
    pub count: u16,
    /// Their bytes, one record after the other.
    pub len: usize,
}

/// How much waits to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Number of records.
    pub records: u32,
    /// Their bytes.
    pub bytes: u64,
}

/// What was found when the spool was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Records that wait to be sent.
    pub held: u32,
    /// Numbers booked now as lost in a crash.
    pub crashed: u32,
}

/// Numbers given out in one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Account {
    epoch: u32,
    flagged: u32,
}

/// The durable queue of flagged samples. `N` bounds the table of what is held: two entries for each
/// slot and [`MAX_BOOKS`] + 2 besides, 24 bytes each.
pub struct Spool<F, const N: usize> {
    area: Area<F>,
    journal: Journal,
    slots: Slots,
    table: Table<N>,
    /// By epoch; the last is the current one.
    accounts: Vec<Account, MAX_BOOKS>,
    /// Everything up to here is acknowledged.
    through: SampleKey,
    /// Everything up to here was sent.
    sent: SampleKey,
    /// Slots that are in use, and that have failed since the start.
    busy: [bool; N],
    /// Where the search for a free slot begins, so that all are worn alike.
    next_slot: usize,
}

impl<F: NorFlash, const N: usize> Spool<F, N> {
    /// Opens the spool that lies in `range` of `flash`, or begins one there, with slots of
    /// `slot_bytes`; both in whole erase blocks. Starts a new boot epoch if the last one gave out
    /// numbers.
    ///
    /// As many slots are used as `range` and `N` have room for.
    ///
    /// # Errors
    /// If the flash fails or the sizes do not fit; see [`SpoolError`].
    pub fn open(
        flash: F,
        range: Range<u32>,
        slot_bytes: u32,
    ) -> Result<(Self, Recovery), SpoolError<F::Error>> {
        let area = Area::new(flash, range).map_err(SpoolError::Layout)?;
        let journal = Journal::new::<F>(N);
        let slots = Slots::new::<F>(journal.end(), area.len(), slot_bytes, N)
            .map_err(SpoolError::Layout)?;
        let mut spool = Self {
            journal,
            slots,
            table: Table::new(),
            accounts: Vec::new(),
            through: SampleKey { epoch: 0, seq: 0 },
            sent: SampleKey { epoch: 0, seq: 0 },
            busy: [false; N],
            next_slot: 0,
            area,
        };
        let recovery = spool.recover()?;
        Ok((spool, recovery))
    }

    /// Gives the next number to a sample and keeps it; `sample.seq` is set. `value` (0 to 1) is
    /// what eviction goes by: of the unsent samples worth no more than this one, the least valuable
    /// goes, the oldest of equals. Whatever happens, the number is accounted for.
    pub fn push(&mut self, sample: &mut Sample<'_>, value: f32) -> Pushed {
        self.retry();
        let key = SampleKey {
            epoch: self.epoch(),
            seq: self.flagged() + 1,
        };
        sample.seq = key.seq;
        // Ordering needs a value that is not negative and not NaN.
        let value = if value > 0.0 { value.min(1.0) } else { 0.0 };
        let lost = self.keep(key, &Record::Sample(*sample), value).err();
        self.flag(key);
        if let Some(reason) = lost {
            // If the flash refuses this too, it is tried again later.
            let stored = self.write_loss(key, reason).is_ok();
            self.table
                .insert_loss(key.epoch, key.seq..=key.seq, reason, stored);
        }
        Pushed { seq: key.seq, lost }
    }

    /// Takes the oldest unsent records of one epoch, at most `max_records` of them and `max_bytes`
    /// in all. They stay held until [`Spool::acknowledge`] or [`Spool::unsend`]. A sample that no
    /// longer matches its checksum is booked as lost.
    ///
    /// # Errors
    /// [`SpoolError::Flash`]; [`SpoolError::Limit`] if not even the next one is short enough.
    pub fn take(
        &mut self,
        max_records: u16,
        max_bytes: usize,
    ) -> Result<Option<Taken>, SpoolError<F::Error>> {
        self.retry();
        let before = self.sent;
        let taken = self.gather(max_records, max_bytes);
        if taken.is_err() {
            self.sent = before;
        }
        taken
    }

    fn gather(
        &mut self,
        max_records: u16,
        max_bytes: usize,
    ) -> Result<Option<Taken>, SpoolError<F::Error>> {
        let mut taken: Option<Taken> = None;
        while let Some((key, content)) = self.table.after(self.sent) {
            let so_far = taken.unwrap_or(Taken {
                epoch: key.epoch,
                first: key.seq,
                count: 0,
                len: 0,
            });
            if key.epoch != so_far.epoch || so_far.count == max_records.max(1) {
                break;
            }
            let need = match content {
                Content::Loss { stored: false, .. } => break,
                Content::Loss { reason, .. } => loss(key, reason).1,
                Content::Sample { len, .. } => len as usize,
            };
            if need > max_bytes - so_far.len {
                match taken {
                    None => return Err(SpoolError::Limit { need }),
                    Some(_) => break,
                }
            }
            if let Content::Sample { slot, len, .. } = content
                && !self.slots.is_whole(&mut self.area, slot, key, len)?
            {
                self.lose(key, LossReason::Corrupt)?;
                continue;
            }
            taken = Some(Taken {
                count: so_far.count + 1,
                len: so_far.len + need,
                ..so_far
            });
            self.sent = key;
        }
        Ok(taken)
    }

    /// Gives the bytes of what was taken last to `sink`, piece by piece, so that they are never in
    /// RAM as a whole; as often as the caller likes.
    ///
    /// # Errors
    /// [`SpoolError::Flash`]; [`SpoolError::Gone`] if it was acknowledged, or unsent and evicted.
    pub fn read(
        &mut self,
        taken: &Taken,
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<(), SpoolError<F::Error>> {
        let mut left = taken.len;
        let mut less = |len: usize| {
            left = left.checked_sub(len)?;
            Some(())
        };
        for offset in 0..u32::from(taken.count) {
            let key = SampleKey {
                epoch: taken.epoch,
                seq: taken.first.checked_add(offset).ok_or(SpoolError::Gone)?,
            };
            match self.table.get(key).ok_or(SpoolError::Gone)? {
                Content::Loss { reason, .. } => {
                    let (bytes, len) = loss(key, reason);
                    less(len).ok_or(SpoolError::Gone)?;
                    sink(&bytes[..len]);
                }
                Content::Sample { slot, len, .. } => {
                    less(len as usize).ok_or(SpoolError::Gone)?;
                    self.slots.stream(&mut self.area, slot, len, sink)?;
                }
            }
        }
        if left == 0 {
            Ok(())
        } else {
            Err(SpoolError::Gone)
        }
    }

    /// Forgets what was sent and not acknowledged: it will be sent again.
    pub fn unsend(&mut self) {
        self.sent = self.through;
    }

    /// The cloud has these numbers of an epoch on disk. Freed is what they cover from the front on,
    /// without a gap; numbers behind a gap stay, and are sent again after [`Spool::unsend`].
    /// Returns how many records that were sent and not unsent since were freed.
    ///
    /// # Errors
    /// [`SpoolError::Flash`] if the acknowledgement cannot be stored: then nothing is freed.
    pub fn acknowledge(
        &mut self,
        epoch: u32,
        ranges: &[(u32, u32)],
    ) -> Result<u32, SpoolError<F::Error>> {
        let mut through = self.through;
        'front: for entry in self.table.entries() {
            if entry.key.epoch != epoch || !entry.is_stored() {
                break;
            }
            let mut next = entry.key.seq;
            while next <= entry.last {
                let Some(&(_, high)) = ranges
                    .iter()
                    .find(|(low, high)| (*low..=*high).contains(&next))
                else {
                    break 'front;
                };
                let seq = high.min(entry.last);
                through = SampleKey { epoch, seq };
                // The last number of all ends the loop without an overflow.
                let Some(after) = seq.checked_add(1) else {
                    break 'front;
                };
                next = after;
            }
        }
        if through == self.through {
            return Ok(0);
        }
        self.note(Note::Through(through))?;
        let in_flight = self.table.count_through(self.sent.min(through));
        self.through = through;
        self.sent = self.sent.max(through);
        for entry in self
            .table
            .entries()
            .iter()
            .take_while(|entry| entry.key <= through)
        {
            if let Content::Sample { slot, .. } = entry.content {
                self.busy[usize::from(slot)] = false;
            }
        }
        self.table.release_through(through);
        Ok(in_flight)
    }

    /// The books of all epochs that are not settled, exact at this moment, oldest first. Everything
    /// counted in them is in flash.
    pub fn books(&self) -> impl Iterator<Item = EpochBook> + '_ {
        self.accounts.iter().map(|account| {
            let flagged = self.table.durable(account.epoch, account.flagged);
            let spooled = self.table.ranges(account.epoch, flagged);
            let count: u32 = spooled.iter().map(|&(low, high)| high - low + 1).sum();
            EpochBook {
                epoch: account.epoch,
                flagged,
                acked: flagged - count,
                spooled,
            }
        })
    }

    /// The cloud has stored a book of `epoch`, which is not the current one, that shows everything
    /// acknowledged: it needs no book any more.
    ///
    /// # Errors
    /// [`SpoolError::Flash`]: then the book is given again.
    pub fn settle(&mut self, epoch: u32) -> Result<(), SpoolError<F::Error>> {
        let known = self.accounts.iter().any(|account| account.epoch == epoch);
        if !known || epoch == self.epoch() || self.table.holds(epoch) {
            return Ok(());
        }
        self.note(Note::Settled(epoch))?;
        self.accounts.retain(|account| account.epoch != epoch);
        Ok(())
    }

    /// Tries again to store losses that the flash has refused. Every push and take does it too.
    pub fn retry(&mut self) {
        while let Some(entry) = self.table.unstored() {
            let Content::Loss { reason, .. } = entry.content else {
                return;
            };
            if self.note(Note::loss(&entry, reason)).is_err() {
                return;
            }
            self.table.mark_stored(entry.key);
        }
    }

    /// How much waits to be sent.
    pub fn pending(&self) -> Pending {
        self.table.pending(self.sent)
    }

    /// Whether everything that was ever flagged is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.table.entries().is_empty()
    }

    /// The current boot epoch.
    pub fn epoch(&self) -> u32 {
        self.accounts.last().map_or(1, |account| account.epoch)
    }

    /// Numbers given out in the current epoch.
    pub fn flagged(&self) -> u32 {
        self.accounts.last().map_or(0, |account| account.flagged)
    }

    /// How many samples can be held at once.
    pub fn capacity(&self) -> usize {
        self.slots.count()
    }

    /// The flash.
    pub fn flash(&self) -> &F {
        self.area.flash()
    }

    fn keep(&mut self, key: SampleKey, record: &Record<'_>, value: f32) -> Result<(), LossReason> {
        let len = slots::encoded_len(record).ok_or(LossReason::Oversize)?;
        if len > self.slots.capacity() {
            return Err(LossReason::Oversize);
        }
        let slot = match self.free_slot() {
            Some(slot) => slot,
            None => self.evict(value)?,
        };
        self.next_slot = usize::from(slot) + 1;
        // Busy from here on: if writing fails, the slot is not tried again before the next start.
        self.busy[usize::from(slot)] = true;
        self.slots
            .write(&mut self.area, slot, key, value, record)
            .map_err(|_| LossReason::Disk)?;
        self.table.insert_sample(key, slot, len, value);
        Ok(())
    }

    fn free_slot(&self) -> Option<u16> {
        let count = self.slots.count();
        (0..count)
            .map(|step| (self.next_slot + step) % count)
            .find(|&slot| !self.busy[slot])
            .map(|slot| slot as u16)
    }

    /// Makes a slot free at the cost of a sample that is worth no more than `value`.
    fn evict(&mut self, value: f32) -> Result<u16, LossReason> {
        let (key, slot) = self
            .table
            .least_valuable(self.sent, value)
            .ok_or(LossReason::Evicted)?;
        self.lose(key, LossReason::Evicted)
            .map_err(|_| LossReason::Disk)?;
        Ok(slot)
    }

    /// Puts a stored loss in the place of a held sample.
    fn lose(&mut self, key: SampleKey, reason: LossReason) -> Result<(), SpoolError<F::Error>> {
        self.write_loss(key, reason)?;
        if let Some(slot) = self.table.remove_sample(key) {
            self.busy[usize::from(slot)] = false;
        }
        self.table
            .insert_loss(key.epoch, key.seq..=key.seq, reason, true);
        Ok(())
    }

    fn write_loss(
        &mut self,
        key: SampleKey,
        reason: LossReason,
    ) -> Result<(), SpoolError<F::Error>> {
        self.note(Note::Loss {
            epoch: key.epoch,
            first: key.seq,
            last: key.seq,
            reason,
        })
    }

    /// A number was given out.
    fn flag(&mut self, key: SampleKey) {
        match self.accounts.iter_mut().find(|a| a.epoch == key.epoch) {
            Some(account) => account.flagged = account.flagged.max(key.seq),
            None => {
                let account = Account {
                    epoch: key.epoch,
                    flagged: key.seq,
                };
                let at = self.accounts.iter().filter(|a| a.epoch < key.epoch).count();
                // More epochs than books only after the loss of the journal: the oldest goes.
                if self.accounts.is_full() {
                    table::remove(&mut self.accounts, 0);
                }
                let at = at.min(self.accounts.len());
                let _ = table::insert(&mut self.accounts, at, account);
            }
        }
    }

    /// Writes a note; if the journal is full, everything that still matters moves to its other
    /// half first.
    fn note(&mut self, note: Note) -> Result<(), SpoolError<F::Error>> {
        if !self.journal.has_room() {
            self.renew()?;
        }
        self.journal.append(&mut self.area, note)
    }

    /// Writes everything that still matters to the other half of the journal.
    fn renew(&mut self) -> Result<(), SpoolError<F::Error>> {
        let accounts = self.accounts.iter().map(|account| Note::Account {
            epoch: account.epoch,
            flagged: account.flagged,
        });
        let losses = self
            .table
            .entries()
            .iter()
            .filter_map(|entry| match entry.content {
                Content::Loss {
                    reason,
                    stored: true,
                } => Some(Note::loss(entry, reason)),
                _ => None,
            });
        let through = [Note::Through(self.through)];
        let notes = through.into_iter().chain(accounts).chain(losses);
        self.journal.renew(&mut self.area, &self.slots, notes)
    }

    /// Reads everything back; losses found now are written down before anything else.
    fn recover(&mut self) -> Result<Recovery, SpoolError<F::Error>> {
        let mut journal = self.journal.clone();
        let found = journal.find(&mut self.area, &self.slots)?;
        if found {
            for index in 0..journal.blocks() {
                if let Some(note) = journal.read(&mut self.area, index)? {
                    self.replay(note);
                }
            }
        }
        self.journal = journal;
        if !found {
            self.renew()?;
        }
        for slot in 0..self.slots.count() as u16 {
            self.find_sample(slot)?;
        }
        let mut crashed = 0;
        for index in 0..self.accounts.len() {
            let Account { epoch, flagged } = self.accounts[index];
            let from = match self.through.epoch.cmp(&epoch) {
                core::cmp::Ordering::Less => 1,
                core::cmp::Ordering::Equal => self.through.seq + 1,
                core::cmp::Ordering::Greater => continue,
            };
            while let Some(gap) = self.table.gap(epoch, from..=flagged) {
                crashed += gap.end() - gap.start() + 1;
                self.table.insert_loss(epoch, gap, LossReason::Crash, false);
            }
        }
        self.retry();
        if self.table.unstored().is_some() {
            // Without them on record the numbers of this start could not be told from theirs.
            self.renew()?;
            self.retry();
        }
        self.begin_epoch()?;
        self.sent = self.through;
        Ok(Recovery {
            held: self.pending().records,
            crashed,
        })
    }

    fn replay(&mut self, note: Note) {
        match note {
            Note::Through(through) => {
                self.through = self.through.max(through);
                // Not `flag`: the epoch may be settled.
                if let Some(account) = self.accounts.iter_mut().find(|a| a.epoch == through.epoch) {
                    account.flagged = account.flagged.max(through.seq);
                }
                self.table.release_through(self.through);
            }
            Note::Account { epoch, flagged } => self.flag(SampleKey {
                epoch,
                seq: flagged,
            }),
            Note::Settled(epoch) => self.accounts.retain(|account| account.epoch != epoch),
            Note::Loss {
                epoch,
                first,
                last,
                reason,
            } => {
                self.flag(SampleKey { epoch, seq: last });
                self.table.insert_loss(epoch, first..=last, reason, true);
            }
        }
    }

    /// Takes in what a slot holds; what nobody waits for any more leaves it free.
    fn find_sample(&mut self, slot: u16) -> Result<(), SpoolError<F::Error>> {
        let Some(head) = self.slots.head(&mut self.area, slot)? else {
            return Ok(());
        };
        if head.key <= self.through || self.table.covers(head.key) {
            return Ok(());
        }
        // A sample without trailer was cut short: its number leaves a gap, which is booked.
        self.flag(head.key);
        if let Some(len) = self.slots.trailer(&mut self.area, slot, head.key)? {
            self.busy[usize::from(slot)] = true;
            self.table.insert_sample(head.key, slot, len, head.value);
        }
        Ok(())
    }

    /// The next epoch, unless no number was given out in the last one, or there is no room for
    /// another book: numbers are in flash before anybody hears of them, so counting on is safe.
    fn begin_epoch(&mut self) -> Result<(), SpoolError<F::Error>> {
        let fresh = match self.accounts.last() {
            Some(last) if last.flagged == 0 || self.accounts.is_full() => return Ok(()),
            Some(last) => {
                let last = *last;
                self.note(Note::Account {
                    epoch: last.epoch,
                    flagged: last.flagged,
                })?;
                last.epoch + 1
            }
            None => 1,
        };
        self.note(Note::Account {
            epoch: fresh,
            flagged: 0,
        })?;
        self.flag(SampleKey {
            epoch: fresh,
            seq: 0,
        });
        Ok(())
    }
}

/// The record of a loss: its bytes and how many there are.
fn loss(key: SampleKey, reason: LossReason) -> ([u8; LOSS_MAX], usize) {
    let record = Record::Loss(Loss {
        seq: key.seq,
        reason,
    });
    let mut bytes = [0; LOSS_MAX];
    // It fits: that is what the constant says.
    let len = postcard::to_slice(&record, &mut bytes).map_or(0, |bytes| bytes.len());
    (bytes, len)
}
