//! Power cuts at every flash operation, full spools, bad blocks, and the law that must hold after
//! all of them.

use std::collections::BTreeMap;
use std::format;
use std::vec::Vec;

use flywheel_shared::message::{Codec, Lane, Scores, records};
use proptest::prelude::*;

use super::sim::{NorSim, SimError};
use super::*;

const ERASE: usize = 512;
/// Six slots, and one block less would be five.
const ENTRIES: usize = 2 * 6 + MAX_BOOKS + 2;
const JOURNAL: usize = 2 * 3072;
const SIZE: usize = JOURNAL + 6 * ERASE;

type Sim<'c, const WRITE: usize> = NorSim<'c, WRITE, ERASE>;
type Small<'f, 'c, const WRITE: usize> = Spool<&'f mut Sim<'c, WRITE>, ENTRIES>;

fn cells() -> Vec<u8> {
    std::vec![0xFF; SIZE]
}

fn open<'f, 'c, const WRITE: usize>(
    flash: &'f mut Sim<'c, WRITE>,
) -> Result<(Small<'f, 'c, WRITE>, Recovery), SpoolError<SimError>> {
    Spool::open(flash, 0..SIZE as u32, ERASE as u32)
}

fn sample(frame: u64, payload: &[u8]) -> Sample<'_> {
    Sample {
        seq: 0,
        frame,
        captured_ms: 1_760_000_000_000 + frame,
        track: frame / 8,
        model: [7; 8],
        lane: Lane::Novel,
        inclusion: 0.0,
        scores: Scores::default(),
        embedding_scale: 0.1,
        embedding: &[1, 2, 3],
        width: 8,
        height: 8,
        codec: Codec::Gray8,
        payload,
    }
}

/// A payload that tells its frame.
fn payload(frame: u64) -> Vec<u8> {
    let len = 20 + (frame * 37 % 250) as usize;
    (0..len)
        .map(|at| (frame as usize * 31 + at) as u8)
        .collect()
}

fn push<const WRITE: usize>(spool: &mut Small<'_, '_, WRITE>, frame: u64, value: f32) -> Pushed {
    spool.push(&mut sample(frame, &payload(frame)), value)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Got {
    Frame(u64),
    Lost(LossReason),
}

/// What the cloud has.
type Cloud = BTreeMap<SampleKey, Got>;

/// Takes a batch and gives it to the cloud; returns its epoch and numbers.
fn ship<const WRITE: usize>(
    spool: &mut Small<'_, '_, WRITE>,
    cloud: &mut Cloud,
    most: u16,
) -> Result<Option<(u32, Vec<u32>)>, SpoolError<SimError>> {
    let Some(taken) = spool.take(most, 1000)? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    spool.read(&taken, &mut |piece| bytes.extend_from_slice(piece))?;
    assert_eq!(bytes.len(), taken.len);
    let mut numbers = Vec::new();
    for record in records(&bytes) {
        let record = record.unwrap();
        let got = match record {
            Record::Sample(sample) => {
                assert_eq!(sample.payload, payload(sample.frame));
                Got::Frame(sample.frame)
            }
            Record::Loss(loss) => Got::Lost(loss.reason),
        };
        numbers.push(record.seq());
        // The first delivery counts, as in the cloud.
        let key = SampleKey {
            epoch: taken.epoch,
            seq: record.seq(),
        };
        cloud.entry(key).or_insert(got);
    }
    assert_eq!(numbers.len(), usize::from(taken.count));
    Ok(Some((taken.epoch, numbers)))
}

fn drain<const WRITE: usize>(spool: &mut Small<'_, '_, WRITE>, cloud: &mut Cloud) {
    spool.unsend();
    while let Some((epoch, numbers)) = ship(spool, cloud, 5).unwrap() {
        let range = (numbers[0], *numbers.last().unwrap());
        let freed = spool.acknowledge(epoch, &[range]).unwrap();
        assert_eq!(freed as usize, numbers.len());
    }
    assert!(spool.is_empty());
    assert_eq!(spool.pending(), Pending::default());
}

/// Each book adds up, and lists what is held.
fn check_books<const WRITE: usize>(spool: &Small<'_, '_, WRITE>) {
    for book in spool.books() {
        let spooled: u32 = book.spooled.iter().map(|&(low, high)| high - low + 1).sum();
        assert_eq!(book.flagged, book.acked + spooled, "{book:?}");
    }
}

#[test]
fn samples_come_out_in_order_and_unchanged() {
    let mut cells = cells();
    let mut flash = Sim::<4>::new(&mut cells);
    let (mut spool, recovery) = open(&mut flash).unwrap();
    assert_eq!(recovery, Recovery::default());
    assert_eq!((spool.capacity(), spool.epoch()), (6, 1));
    for frame in 0..5 {
        let pushed = push(&mut spool, frame, 0.5);
        assert_eq!((pushed.seq, pushed.lost), (frame as u32 + 1, None));
    }
    assert_eq!(spool.pending().records, 5);
    let mut cloud = Cloud::new();
    let (epoch, numbers) = ship(&mut spool, &mut cloud, 2).unwrap().unwrap();
    assert_eq!((epoch, numbers.as_slice()), (1, &[1, 2][..]));
    assert_eq!(spool.pending().records, 3);
    assert_eq!(spool.acknowledge(1, &[(1, 1)]), Ok(1));
    // Behind a gap, or of another epoch: nothing is freed.
    assert_eq!(spool.acknowledge(1, &[(3, 4)]), Ok(0));
    assert_eq!(spool.acknowledge(2, &[(1, 9)]), Ok(0));
    spool.unsend();
    assert_eq!(spool.pending().records, 4);
    check_books(&spool);
    drain(&mut spool, &mut cloud);
    let frames: Vec<Got> = cloud.values().copied().collect();
    assert_eq!(frames, (0..5).map(Got::Frame).collect::<Vec<_>>());
}

#[test]
fn a_full_spool_gives_up_the_least_valuable() {
    let mut cells = cells();
    let mut flash = Sim::<4>::new(&mut cells);
    let (mut spool, _) = open(&mut flash).unwrap();
    for (frame, value) in [0.5, 0.3, 0.9, 0.3, 0.7, 0.8].into_iter().enumerate() {
        assert_eq!(push(&mut spool, frame as u64, value).lost, None);
    }
    // Worth less than everything held.
    assert_eq!(push(&mut spool, 6, 0.1).lost, Some(LossReason::Evicted));
    // The older of the two at 0.3 goes, then the other.
    assert_eq!(push(&mut spool, 7, 0.6).lost, None);
    assert_eq!(push(&mut spool, 8, 0.6).lost, None);
    // What is on its way is not given up.
    let mut cloud = Cloud::new();
    while ship(&mut spool, &mut cloud, 100).unwrap().is_some() {}
    assert_eq!(push(&mut spool, 9, 1.0).lost, Some(LossReason::Evicted));
    drain(&mut spool, &mut cloud);
    let evicted: Vec<u32> = cloud
        .iter()
        .filter(|(_, got)| **got == Got::Lost(LossReason::Evicted))
        .map(|(key, _)| key.seq)
        .collect();
    assert_eq!(evicted, [2, 4, 7, 10]);
    assert_eq!(cloud.len(), 10);
}

#[test]
fn what_does_not_fit_a_slot_is_a_loss() {
    let mut cells = cells();
    let mut flash = Sim::<4>::new(&mut cells);
    let (mut spool, _) = open(&mut flash).unwrap();
    let pushed = spool.push(&mut sample(0, &[0; ERASE]), 1.0);
    assert_eq!(pushed.lost, Some(LossReason::Oversize));
    let empty = sample(0, &[]);
    let head = slots::encoded_len(&Record::Sample(Sample { seq: 2, ..empty })).unwrap();
    // 2 bytes more for the length of a payload of more than 127 bytes.
    let room = ERASE - OVERHEAD as usize - head as usize - 1;
    assert_eq!(
        spool.push(&mut sample(0, &[7; ERASE][..room]), 1.0).lost,
        None
    );
    assert_eq!(
        spool
            .push(&mut sample(0, &[7; ERASE][..room + 1]), 1.0)
            .lost,
        Some(LossReason::Oversize)
    );
    let lost = spool.take(1, 16).unwrap().unwrap();
    assert_eq!((lost.first, lost.count), (1, 1));
    assert_eq!(
        spool.take(1, 16),
        Err(SpoolError::Limit {
            need: ERASE - OVERHEAD as usize
        })
    );
    let sample = spool.take(1, ERASE).unwrap().unwrap();
    assert_eq!((sample.first, sample.count), (2, 1));
    spool.acknowledge(1, &[(1, 1)]).unwrap();
    let mut bytes = 0;
    let mut count = |piece: &[u8]| bytes += piece.len();
    assert_eq!(spool.read(&lost, &mut count), Err(SpoolError::Gone));
    spool.read(&sample, &mut count).unwrap();
    assert_eq!(bytes, sample.len);
}

#[test]
fn damage_and_bad_blocks_become_losses() {
    let mut cells = cells();
    let mut flash = Sim::<4>::new(&mut cells);
    let (mut spool, _) = open(&mut flash).unwrap();
    push(&mut spool, 0, 0.5);
    push(&mut spool, 1, 0.5);
    // The first slot's record.
    flash.cells()[JOURNAL + 40] ^= 1;
    let (spool, recovery) = open(&mut flash).unwrap();
    assert_eq!((recovery.held, recovery.crashed, spool.epoch()), (2, 0, 2));
    flash.wear_out(Some((JOURNAL / ERASE) + 2));
    let (mut spool, _) = open(&mut flash).unwrap();
    assert_eq!(spool.epoch(), 2, "an epoch without numbers is used again");
    let lost: Vec<Option<LossReason>> = (2..6).map(|f| push(&mut spool, f, 0.5).lost).collect();
    assert_eq!(lost.iter().filter(|lost| lost.is_some()).count(), 1);
    assert!(lost.contains(&Some(LossReason::Disk)));
    let mut cloud = Cloud::new();
    drain(&mut spool, &mut cloud);
    let at = |epoch, seq| cloud[&SampleKey { epoch, seq }];
    assert_eq!(at(1, 1), Got::Lost(LossReason::Corrupt));
    assert_eq!(at(1, 2), Got::Frame(1));
    assert_eq!(cloud.len(), 6);
    assert_eq!(spool.settle(1), Ok(()));
    assert_eq!(
        spool.books().map(|book| book.epoch).collect::<Vec<_>>(),
        [2]
    );
    // Settled for good.
    let (spool, _) = open(&mut flash).unwrap();
    assert!(spool.books().all(|book| book.epoch >= 2));
}

#[test]
fn losses_that_the_flash_refuses_are_told_to_nobody() {
    let mut cells = cells();
    let mut flash = Sim::<4>::new(&mut cells);
    let (mut spool, _) = open(&mut flash).unwrap();
    push(&mut spool, 0, 0.5);
    // The live half of the journal is the first.
    spool.area.flash_mut().wear_out(Some(0));
    assert_eq!(
        spool.push(&mut sample(1, &[0; ERASE]), 1.0).lost,
        Some(LossReason::Oversize)
    );
    push(&mut spool, 2, 0.5);
    let mut cloud = Cloud::new();
    ship(&mut spool, &mut cloud, 9).unwrap();
    assert_eq!(cloud.len(), 1);
    assert_eq!(spool.pending().records, 0);
    assert!(spool.acknowledge(1, &[(1, 1)]).is_err());
    check_books(&spool);
    spool.area.flash_mut().wear_out(None);
    drain(&mut spool, &mut cloud);
    assert_eq!(cloud.len(), 3);
}

#[test]
fn a_lost_journal_loses_no_sample() {
    let mut cells = cells();
    let mut flash = Sim::<4>::new(&mut cells);
    let (mut spool, _) = open(&mut flash).unwrap();
    push(&mut spool, 0, 0.5);
    push(&mut spool, 1, 0.5);
    flash.cells()[..JOURNAL].fill(0x5A);
    let (mut spool, recovery) = open(&mut flash).unwrap();
    assert_eq!((recovery.held, spool.epoch()), (2, 2));
    let mut cloud = Cloud::new();
    drain(&mut spool, &mut cloud);
    assert_eq!(cloud.len(), 2);
}

#[test]
fn another_layout_is_refused_and_impossible_ones_are_named() {
    let mut cells = cells();
    let mut flash = Sim::<4>::new(&mut cells);
    open(&mut flash).unwrap();
    let other = Spool::<_, ENTRIES>::open(&mut flash, 0..SIZE as u32, 2 * ERASE as u32);
    assert_eq!(
        other.map(drop),
        Err(SpoolError::OtherLayout {
            slot_bytes: ERASE as u32,
            slots: 6
        })
    );
    for (range, slot) in [
        (0..SIZE as u32 + 512, 512),
        (0..JOURNAL as u32, 512),
        (0..SIZE as u32, 500),
        (0..SIZE as u32, 0),
        (1..SIZE as u32, 512),
    ] {
        let error = Spool::<_, ENTRIES>::open(&mut flash, range.clone(), slot).map(drop);
        assert!(
            matches!(error, Err(SpoolError::Layout(_))),
            "{range:?} {slot}"
        );
    }
    let error = Spool::<_, 4>::open(&mut flash, 0..SIZE as u32, 512).map(drop);
    assert!(matches!(error, Err(SpoolError::Layout(_))));
}

/// The script of [`survives`]: pushes of changing worth, batches, acknowledgements, some of them
/// lost. Returns early, with what it was doing undone, when the power is cut.
struct Script {
    step: u64,
    cloud: Cloud,
    /// Numbers that `push` has given, and what became of them.
    given: BTreeMap<SampleKey, (u64, Option<LossReason>)>,
}

const STEPS: u64 = 240;

impl Script {
    fn run<const WRITE: usize>(&mut self, spool: &mut Small<'_, '_, WRITE>) {
        while self.step < STEPS {
            let step = self.step;
            let mixed = crate::sketch::mix(step);
            self.step += 1;
            if mixed % 8 < 6 {
                let oversize = mixed.is_multiple_of(29);
                let frame = if oversize { 0 } else { step };
                let long = [0; ERASE];
                let bytes = payload(frame);
                let content = if oversize { &long[..] } else { &bytes };
                let value = (mixed >> 20) as f32 % 100.0 / 100.0;
                let pushed = spool.push(&mut sample(frame, content), value);
                if !spool.flash().is_cut() {
                    let key = SampleKey {
                        epoch: spool.epoch(),
                        seq: pushed.seq,
                    };
                    assert_eq!(self.given.insert(key, (frame, pushed.lost)), None);
                }
            } else if mixed % 8 == 6 {
                spool.unsend();
            } else {
                let shipped = ship(spool, &mut self.cloud, 4);
                if let Ok(Some((epoch, numbers))) = shipped
                    && !mixed.is_multiple_of(3)
                {
                    let low = numbers[0] - numbers[0] % 2;
                    let _ = spool.acknowledge(epoch, &[(low, *numbers.last().unwrap())]);
                }
            }
            if spool.flash().is_cut() {
                return;
            }
            check_books(spool);
        }
    }

    /// flagged = acknowledged + spooled + recorded losses, number by number.
    fn check<const WRITE: usize>(
        &mut self,
        spool: &mut Small<'_, '_, WRITE>,
        cuts: u32,
        why: &str,
    ) {
        let books: Vec<EpochBook> = spool.books().collect();
        drain(spool, &mut self.cloud);
        let mut flagged = 0;
        for book in &books {
            flagged += book.flagged;
            for seq in 1..=book.flagged {
                let key = SampleKey {
                    epoch: book.epoch,
                    seq,
                };
                let got = self.cloud.get(&key);
                match (self.given.get(&key), got) {
                    (_, None) => panic!("{why}: {key:?} is gone"),
                    // A push that returned is durable: only a choice can lose it.
                    (Some((frame, None)), Some(got)) => assert!(
                        *got == Got::Frame(*frame) || *got == Got::Lost(LossReason::Evicted),
                        "{why}: {key:?} {got:?}"
                    ),
                    // Perhaps under its neighbour's reason: see `table`.
                    (Some((_, Some(_))), Some(got)) => {
                        assert!(matches!(got, Got::Lost(_)), "{why}: {key:?} {got:?}");
                    }
                    (None, Some(_)) => {}
                }
            }
        }
        assert_eq!(flagged as usize, self.cloud.len(), "{why}");
        let given = self.given.len() as u32;
        assert!(
            (given..=given + cuts).contains(&flagged),
            "{why}: {given} {flagged}"
        );
    }
}

/// Runs the script with the power cut after `first` operations and, while it recovers, again and
/// again.
fn survives<const WRITE: usize>(first: u32, seed: u32) -> bool {
    let why = format!("cut after {first}, seed {seed}, words of {WRITE}");
    let mut script = Script {
        step: 0,
        cloud: Cloud::new(),
        given: BTreeMap::new(),
    };
    let mut cells = cells();
    let mut flash = Sim::<WRITE>::new(&mut cells);
    flash.cut_after(first, seed);
    let mut cuts = 0;
    let mut again = seed % 4;
    loop {
        match open(&mut flash) {
            Ok((mut spool, _)) => script.run(&mut spool),
            Err(error) => assert_eq!(error, SpoolError::Flash(SimError::PowerCut), "{why}"),
        }
        if !flash.is_cut() {
            break;
        }
        cuts += 1;
        flash.restore();
        if again > 0 {
            flash.cut_after(again - 1 + cuts, seed + cuts);
            again -= 1;
        }
    }
    flash.restore();
    let (mut spool, _) = open(&mut flash).unwrap();
    script.check(&mut spool, cuts, &why);
    cuts > 0
}

#[test]
fn the_law_holds_after_a_power_cut_at_every_operation() {
    let mut first = 0;
    while survives::<4>(first, first) {
        first += 1;
    }
    assert!(first > 300, "the script has only {first} operations");
}

#[test]
fn whatever_the_width_of_a_word() {
    for first in (0..300).step_by(7) {
        survives::<1>(first, first + 1);
        survives::<8>(first, first + 2);
        survives::<32>(first, first + 3);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_two_cuts(first in 0u32..400, seed in 0u32..100_000) {
        survives::<4>(first, seed);
    }
}
