//! The spool against a disk that fills up, tears writes and loses what was not fsynced.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use flywheel_shared::message::{Codec, Lane, Scores, records};
use proptest::prelude::*;

use super::*;

/// Files in memory. What was not synced is lost, from a random byte on, in [`Faulty::power_cut`].
#[derive(Clone, Default)]
struct Faulty(Arc<Mutex<Store>>);

#[derive(Default)]
struct Store {
    /// Bytes and how many of them are synced.
    files: BTreeMap<String, (Vec<u8>, usize)>,
    /// Bytes that may still be written before the disk is full.
    room: Option<usize>,
    ledger: BTreeMap<u32, Account>,
    ledger_synced: BTreeMap<u32, Account>,
}

fn full() -> io::Error {
    io::ErrorKind::StorageFull.into()
}

impl Faulty {
    fn with<T>(&self, act: impl FnOnce(&mut Store) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    fn power_cut(&self, keep: u64) {
        self.with(|store| {
            for (bytes, synced) in store.files.values_mut() {
                let loose = bytes.len() - *synced;
                bytes.truncate(*synced + (keep % (loose as u64 + 1)) as usize);
                *synced = bytes.len();
            }
            store.ledger = store.ledger_synced.clone();
        });
    }

    fn size(&self) -> u64 {
        self.with(|store| store.files.values().map(|f| f.0.len() as u64).sum())
    }
}

impl Disk for Faulty {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.with(|store| store.files.keys().cloned().collect()))
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.with(|store| {
            Ok(store
                .files
                .get(name)
                .ok_or(io::ErrorKind::NotFound)?
                .0
                .clone())
        })
    }

    fn read_at(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let bytes = self.read(name)?;
        bytes
            .get(offset as usize..offset as usize + len)
            .map(<[u8]>::to_vec)
            .ok_or(io::ErrorKind::UnexpectedEof.into())
    }

    fn create(&mut self, name: &str) -> io::Result<()> {
        self.with(|store| {
            if store.room == Some(0) {
                return Err(full());
            }
            store.files.insert(name.to_owned(), (Vec::new(), 0));
            Ok(())
        })
    }

    fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.with(|store| {
            let wanted = bytes.len();
            let written = store.room.map_or(wanted, |room| room.min(wanted));
            let file = &mut store.files.get_mut(name).ok_or(io::ErrorKind::NotFound)?.0;
            file.truncate(offset as usize);
            file.extend_from_slice(&bytes[..written]);
            if let Some(room) = &mut store.room {
                *room -= written;
            }
            if written < wanted {
                Err(full())
            } else {
                Ok(())
            }
        })
    }

    fn truncate(&mut self, name: &str, len: u64) -> io::Result<()> {
        self.with(|store| {
            let (bytes, synced) = store.files.get_mut(name).ok_or(io::ErrorKind::NotFound)?;
            let cut = bytes.len().saturating_sub(len as usize);
            bytes.truncate(len as usize);
            *synced = (*synced).min(bytes.len());
            if let Some(room) = &mut store.room {
                *room += cut;
            }
            Ok(())
        })
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        self.with(|store| {
            let (bytes, synced) = store.files.get_mut(name).ok_or(io::ErrorKind::NotFound)?;
            *synced = bytes.len();
            Ok(())
        })
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.with(|store| {
            let (bytes, _) = store.files.remove(name).ok_or(io::ErrorKind::NotFound)?;
            if let Some(room) = &mut store.room {
                *room += bytes.len();
            }
            Ok(())
        })
    }
}

impl Ledger for Faulty {
    fn load(&self) -> Result<Vec<(u32, Account)>, LedgerError> {
        Ok(self.with(|store| store.ledger.clone().into_iter().collect()))
    }

    fn put(&mut self, epoch: u32, account: &Account) -> Result<(), LedgerError> {
        self.with(|store| store.ledger.insert(epoch, account.clone()));
        Ok(())
    }

    fn remove(&mut self, epoch: u32) -> Result<(), LedgerError> {
        self.with(|store| store.ledger.remove(&epoch));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LedgerError> {
        self.with(|store| store.ledger_synced = store.ledger.clone());
        Ok(())
    }
}

fn open(disk: &Faulty, quota: u64) -> (Spool, Recovery) {
    let epoch = last_epoch(disk).unwrap() + 1;
    Spool::open(Box::new(disk.clone()), Box::new(disk.clone()), epoch, quota).unwrap()
}

fn push(spool: &mut Spool, len: usize, value: f32) -> Pushed {
    let payload = vec![0x5A; len];
    let mut sample = Sample {
        seq: 0,
        frame: 9,
        captured_ms: 1,
        track: 1,
        model: [1; 8],
        lane: Lane::Novel,
        inclusion: 0.0,
        scores: Scores::default(),
        embedding_scale: 1.0,
        embedding: &[],
        width: 1,
        height: 1,
        codec: Codec::Gray8,
        payload: &payload,
    };
    spool.push(&mut sample, value)
}

/// The numbers in a batch, and which of them are losses and why.
fn contents(batch: &Outgoing) -> Vec<(u32, Option<LossReason>)> {
    let read: Vec<_> = records(&batch.records)
        .map(|record| match record.unwrap() {
            Record::Sample(sample) => (sample.seq, None),
            Record::Loss(loss) => (loss.seq, Some(loss.reason)),
        })
        .collect();
    assert_eq!(read.len(), usize::from(batch.count));
    read
}

/// Sends and acknowledges everything; what came is returned by epoch.
fn drain(spool: &mut Spool) -> BTreeMap<SampleKey, Option<LossReason>> {
    let mut seen = BTreeMap::new();
    spool.unsend();
    while let Some(batch) = spool.take(7, 4000).unwrap() {
        for (seq, loss) in contents(&batch) {
            let key = SampleKey {
                epoch: batch.epoch,
                seq,
            };
            assert_eq!(seen.insert(key, loss), None, "{key:?} was sent twice");
            spool.ack(batch.epoch, &[(seq, seq)]);
        }
    }
    seen
}

#[test]
fn what_is_acknowledged_is_freed_and_segments_go_with_it() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 100 << 20);
    for _ in 0..3000 {
        assert_eq!(push(&mut spool, 2000, 0.5).lost, None);
    }
    assert!(disk.size() > 6_000_000);
    let seen = drain(&mut spool);
    assert_eq!(seen.len(), 3000);
    assert!(seen.values().all(Option::is_none));
    assert!(spool.is_empty());
    assert!(disk.size() <= 1 << 20);
    let books = spool.books(1).unwrap();
    assert_eq!((books[0].flagged, books[0].acked), (3000, 3000));
}

#[test]
fn killing_the_process_loses_nothing_that_was_pushed() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 1 << 20);
    for _ in 0..10 {
        push(&mut spool, 100, 0.5);
    }
    drop(spool);
    let (mut spool, recovery) = open(&disk, 1 << 20);
    assert_eq!(recovery.held, 10);
    assert_eq!(recovery.crashed, 0);
    assert_eq!(push(&mut spool, 100, 0.5).seq, 1);
    assert_eq!(drain(&mut spool).len(), 11);
}

#[test]
fn a_torn_write_is_booked_as_a_crash() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 1 << 20);
    for _ in 0..3 {
        push(&mut spool, 100, 0.5);
    }
    drop(spool);
    disk.with(|store| {
        let file = &mut store.files.values_mut().next().unwrap().0;
        let len = file.len();
        file.truncate(len - 50);
    });
    let (spool, recovery) = open(&disk, 1 << 20);
    assert_eq!((recovery.held, recovery.crashed), (3, 1));
    drop(spool);
    // Booked once, however often the agent starts.
    let (mut spool, recovery) = open(&disk, 1 << 20);
    assert_eq!((recovery.held, recovery.crashed), (3, 0));
    let seen = drain(&mut spool);
    let key = |seq| SampleKey { epoch: 1, seq };
    assert_eq!(seen[&key(2)], None);
    assert_eq!(seen[&key(3)], Some(LossReason::Crash));
}

#[test]
fn damage_on_the_medium_is_booked_when_it_is_found() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 1 << 20);
    for _ in 0..4 {
        push(&mut spool, 100, 0.5);
    }
    let flip = |nth: usize| {
        disk.with(|store| {
            let file = &mut store.files.values_mut().next().unwrap().0;
            let len = file.len() / 4;
            file[len * nth + len / 2] ^= 1;
        });
    };
    flip(1);
    let batch = spool.take(10, 10_000).unwrap().unwrap();
    assert_eq!(
        contents(&batch),
        [
            (1, None),
            (2, Some(LossReason::Corrupt)),
            (3, None),
            (4, None)
        ]
    );
    drop(spool);
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 1 << 20);
    for _ in 0..4 {
        push(&mut spool, 100, 0.5);
    }
    drop(spool);
    disk.with(|store| {
        let file = &mut store.files.values_mut().next().unwrap().0;
        let len = file.len() / 4;
        file[len * 2 + len / 2] ^= 1;
    });
    let (mut spool, recovery) = open(&disk, 1 << 20);
    assert_eq!((recovery.corrupt, recovery.crashed), (1, 0));
    let seen = drain(&mut spool);
    let key = SampleKey { epoch: 1, seq: 3 };
    assert_eq!(seen[&key], Some(LossReason::Corrupt));
}

#[test]
fn a_full_disk_costs_samples_but_no_number() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 1 << 20);
    assert_eq!(push(&mut spool, 100, 0.5).lost, None);
    disk.with(|store| store.room = Some(30));
    assert_eq!(push(&mut spool, 100, 0.5).lost, Some(LossReason::Disk));
    assert_eq!(push(&mut spool, 100, 0.5).lost, Some(LossReason::Disk));
    // While the loss records themselves find no room, nobody is told of their numbers.
    disk.with(|store| store.room = Some(0));
    push(&mut spool, 100, 0.5);
    let told = spool.books(1).unwrap()[0].flagged;
    let batch = spool.take(10, 10_000).unwrap().unwrap();
    assert_eq!(contents(&batch).len(), told as usize);
    assert!(told < spool.flagged());
    disk.with(|store| store.room = None);
    assert_eq!(push(&mut spool, 100, 0.5).lost, None);
    assert_eq!(spool.books(2).unwrap()[0].flagged, 5);
    let seen = drain(&mut spool);
    let lost: Vec<_> = seen.values().copied().collect();
    let disk_loss = Some(LossReason::Disk);
    assert_eq!(lost, [None, disk_loss, disk_loss, disk_loss, None]);
}

#[test]
fn the_least_valuable_is_evicted_and_the_better_kept() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 2000);
    for value in [0.9, 0.2, 0.5, 0.2] {
        assert_eq!(push(&mut spool, 350, value).lost, None);
    }
    // Less than everything that is there: this one is the victim.
    assert_eq!(push(&mut spool, 350, 0.1).lost, Some(LossReason::Evicted));
    assert_eq!(push(&mut spool, 350, 0.8).lost, None);
    assert_eq!(push(&mut spool, 3000, 1.0).lost, Some(LossReason::Oversize));
    let seen = drain(&mut spool);
    let lost: Vec<u32> = seen
        .iter()
        .filter(|(_, loss)| loss.is_some())
        .map(|(key, _)| key.seq)
        .collect();
    assert_eq!(lost, [2, 5, 7]);
}

#[test]
fn evictions_do_not_let_the_files_grow() {
    let disk = Faulty::default();
    let quota = 3 << 20;
    let (mut spool, _) = open(&disk, quota);
    // Every third sample is worth keeping for good, so evictions leave holes in every segment.
    for i in 0..4000u16 {
        let value = if i % 3 == 0 {
            0.9
        } else {
            f32::from(i) / 8000.0
        };
        push(&mut spool, 4000, value);
        assert!(disk.size() <= quota + quota / 2 + 4 * files::SEGMENT);
    }
    drop(spool);
    let (mut spool, recovery) = open(&disk, quota);
    assert_eq!((recovery.crashed, recovery.corrupt), (0, 0));
    let seen = drain(&mut spool);
    assert_eq!(seen.len(), 4000);
    let kept: Vec<u32> = seen
        .iter()
        .filter(|(_, loss)| loss.is_none())
        .map(|(key, _)| key.seq)
        .collect();
    assert!(kept.len() > 600, "{} kept", kept.len());
    // The newest of the valuable ones are all there.
    assert!(kept.iter().filter(|seq| (**seq - 1) % 3 == 0).count() >= kept.len() * 9 / 10);
}

#[test]
fn what_is_on_its_way_is_not_evicted() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 1000);
    push(&mut spool, 350, 0.1);
    push(&mut spool, 350, 0.1);
    assert_eq!(spool.take(10, 10_000).unwrap().unwrap().count, 2);
    assert_eq!(push(&mut spool, 350, 0.9).lost, Some(LossReason::Evicted));
    spool.unsend();
    assert_eq!(push(&mut spool, 350, 0.9).lost, None);
}

#[test]
fn batches_hold_one_epoch_and_keep_their_bounds() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 1 << 20);
    for _ in 0..5 {
        push(&mut spool, 1000, 0.5);
    }
    drop(spool);
    let (mut spool, _) = open(&disk, 1 << 20);
    push(&mut spool, 1000, 0.5);
    let mut shape = Vec::new();
    while let Some(batch) = spool.take(3, 2500).unwrap() {
        assert!(batch.records.len() <= 2500);
        shape.push((batch.epoch, batch.count));
    }
    assert_eq!(shape, [(1, 2), (1, 2), (1, 1), (2, 1)]);
    assert_eq!(spool.pending(), Pending::default());
    spool.unsend();
    // One record is sent even if it alone exceeds the bound.
    assert_eq!(spool.take(3, 10).unwrap().unwrap().count, 1);
}

#[test]
fn closed_epochs_are_reported_until_the_report_is_stored() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 1 << 20);
    push(&mut spool, 10, 0.5);
    drop(spool);
    let (mut spool, _) = open(&disk, 1 << 20);
    assert_eq!(spool.books(10).unwrap()[0].spooled.as_slice(), [(1, 1)]);
    spool.settle(10);
    drain(&mut spool);
    let books = spool.books(20).unwrap();
    assert_eq!((books[0].epoch, books[0].acked), (1, 1));
    // The report that was stored is older than the one that shows the epoch closed.
    spool.settle(19);
    assert_eq!(spool.books(30).unwrap().len(), 2);
    spool.settle(20);
    let books = spool.books(40).unwrap();
    assert_eq!(books.len(), 1);
    assert_eq!(books[0].epoch, 2);
    drop(spool);
    let (mut spool, _) = open(&disk, 1 << 20);
    assert_eq!(spool.books(50).unwrap().len(), 1);
}

#[test]
fn an_epoch_is_never_used_twice() {
    let disk = Faulty::default();
    drop(open(&disk, 1 << 20));
    let error = Spool::open(Box::new(disk.clone()), Box::new(disk), 1, 1 << 20)
        .err()
        .unwrap();
    assert!(matches!(error, SpoolError::Epoch { wanted: 1, used: 1 }));
}

#[test]
fn acknowledgements_of_unknown_numbers_change_nothing() {
    let disk = Faulty::default();
    let (mut spool, _) = open(&disk, 1 << 20);
    push(&mut spool, 10, 0.5);
    spool.ack(9, &[(1, 5)]);
    spool.ack(1, &[(2, u32::MAX), (5, 3), (0, 0)]);
    let books = spool.books(1).unwrap();
    assert_eq!(books[0].spooled.as_slice(), [(1, 1)]);
    push(&mut spool, 10, 0.5);
    assert_eq!(spool.books(2).unwrap()[0].spooled.as_slice(), [(1, 2)]);
}

#[derive(Clone, Debug)]
enum Step {
    Push {
        len: usize,
        value: f32,
    },
    Send {
        records: usize,
        bytes: usize,
    },
    /// Acknowledges what was sent, by a mask over the numbers.
    Ack {
        mask: u64,
    },
    Unsend,
    Books,
    DiskFull {
        room: usize,
    },
    Space,
    Kill,
    PowerCut {
        keep: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (0usize..90_000, 0.0f32..1.0).prop_map(|(len, value)| Step::Push { len, value }),
        3 => (1usize..20, 1usize..300_000).prop_map(|(records, bytes)| Step::Send { records, bytes }),
        3 => any::<u64>().prop_map(|mask| Step::Ack { mask }),
        1 => Just(Step::Unsend),
        2 => Just(Step::Books),
        1 => (0usize..120_000).prop_map(|room| Step::DiskFull { room }),
        2 => Just(Step::Space),
        1 => Just(Step::Kill),
        1 => any::<u64>().prop_map(|keep| Step::PowerCut { keep }),
    ]
}

const QUOTA: u64 = 600_000;

/// What the cloud knows.
#[derive(Default)]
struct Cloud {
    ingested: BTreeSet<SampleKey>,
    /// Highest number of each epoch that any book told of.
    told: BTreeMap<u32, u32>,
}

impl Cloud {
    /// Every number that the device counts is ingested here or listed as spooled there.
    fn audit(&mut self, books: &Books) {
        for book in books {
            let mut listed = 0;
            for &(low, high) in &book.spooled {
                listed += high - low + 1;
            }
            assert_eq!(book.flagged, book.acked + listed, "{book:?}");
            for seq in 1..=book.flagged {
                let key = SampleKey {
                    epoch: book.epoch,
                    seq,
                };
                let spooled = book
                    .spooled
                    .iter()
                    .any(|&(low, high)| low <= seq && seq <= high);
                assert!(
                    spooled || self.ingested.contains(&key),
                    "{key:?} is nowhere: {book:?}"
                );
            }
            let told = self.told.entry(book.epoch).or_default();
            assert!(book.flagged >= *told, "{book:?} told of {told} before");
            *told = book.flagged;
        }
        for key in &self.ingested {
            let book = books.iter().find(|book| book.epoch == key.epoch);
            assert!(
                book.is_none_or(|book| key.seq <= book.flagged),
                "{key:?} came but is not counted"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn the_books_always_balance(steps in proptest::collection::vec(step(), 1..200)) {
        let disk = Faulty::default();
        let (mut spool, _) = open(&disk, QUOTA);
        let mut cloud = Cloud::default();
        let mut sent: Vec<(u32, Vec<u32>)> = Vec::new();
        for step in steps {
            match step {
                Step::Push { len, value } => {
                    let before = spool.flagged();
                    prop_assert_eq!(push(&mut spool, len, value).seq, before + 1);
                }
                Step::Send { records, bytes } => {
                    if let Some(batch) = spool.take(records, bytes).unwrap() {
                        let numbers: Vec<u32> = contents(&batch).iter().map(|c| c.0).collect();
                        let epoch = batch.epoch;
                        cloud.ingested.extend(numbers.iter().map(|&seq| SampleKey { epoch, seq }));
                        sent.push((epoch, numbers));
                    }
                }
                Step::Ack { mask } => {
                    for (epoch, numbers) in sent.drain(..) {
                        for (at, seq) in numbers.into_iter().enumerate() {
                            if mask >> (at % 64) & 1 == 1 {
                                spool.ack(epoch, &[(seq, seq)]);
                            }
                        }
                    }
                }
                Step::Unsend => spool.unsend(),
                Step::Books => cloud.audit(&spool.books(1).unwrap()),
                Step::DiskFull { room } => disk.with(|store| store.room = Some(room)),
                Step::Space => disk.with(|store| store.room = None),
                Step::Kill | Step::PowerCut { .. } => {
                    drop(spool);
                    if let Step::PowerCut { keep } = step {
                        disk.power_cut(keep);
                    }
                    disk.with(|store| store.room = None);
                    spool = open(&disk, QUOTA).0;
                    sent.clear();
                }
            }
            prop_assert!(spool.live_bytes <= QUOTA + 60_000, "{} live", spool.live_bytes);
            prop_assert!(disk.size() <= QUOTA + QUOTA / 2 + 4 * files::SEGMENT, "{} on disk", disk.size());
        }
        disk.with(|store| store.room = None);
        cloud.audit(&spool.books(1).unwrap());
        cloud.ingested.extend(drain(&mut spool).into_keys());
        prop_assert!(spool.is_empty());
        let books = spool.books(2).unwrap();
        cloud.audit(&books);
        prop_assert!(books.iter().all(|book| book.spooled.is_empty()));
    }
}
