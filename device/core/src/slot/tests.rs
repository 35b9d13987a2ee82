//! The slot on a shell that loses power between any two actions.

use super::*;
use flywheel_shared::trust::Floor;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::vec::Vec;

mod attacks;

fn model(n: u8) -> Held {
    Held {
        digest: Digest([n; 32]),
        sequence: u64::from(n),
    }
}

const BOUNDS: TrialBounds = TrialBounds {
    frames: 5,
    max_latency_us: 1000,
    min_confidence: 0.5,
};

fn offer(n: u8) -> Event {
    Event::Offer {
        model: model(n),
        bounds: BOUNDS,
        key: KEY,
    }
}

const KEY: KeyId = KeyId([7; 8]);

const GOOD: Event = Event::Frame {
    latency_us: 300,
    confidence: 0.9,
    live_confidence: None,
};

/// What a shell has on flash and in memory, and the rules it must never see broken.
#[derive(Clone)]
struct Shell {
    // On flash.
    record: SlotRecord,
    packages: BTreeSet<Digest>,
    // In memory.
    slot: Slot,
    live: Option<Digest>,
    golden: Option<Held>,
    fetch: Option<Held>,
    passed: Option<Digest>,
    shadow: Option<Digest>,
    shadow_frames: u32,
}

impl Shell {
    fn new() -> Self {
        let mut shell = Self {
            record: SlotRecord::default(),
            packages: BTreeSet::new(),
            slot: Slot::new(SlotRecord::default()),
            live: None,
            golden: None,
            fetch: None,
            passed: None,
            shadow: None,
            shadow_frames: 0,
        };
        shell.step(Event::Boot, usize::MAX);
        shell
    }

    /// Proved in one piece since the power came on.
    fn proved(&self, digest: Digest) -> bool {
        self.passed == Some(digest)
            && self.shadow == Some(digest)
            && self.shadow_frames >= BOUNDS.frames
    }

    /// Performs at most `before_cut` actions of a step; false if power failed.
    fn step(&mut self, event: Event, before_cut: usize) -> bool {
        match event {
            Event::Frame { .. } if self.shadow.is_some() => self.shadow_frames += 1,
            Event::Fetched { digest } => {
                self.packages.insert(digest);
            }
            Event::GoldenPassed { digest } => self.passed = Some(digest),
            _ => {}
        }
        let actions = self.slot.step(event);
        for (done, action) in actions.into_iter().enumerate() {
            if done == before_cut {
                return false;
            }
            match action {
                Action::Persist(record) => {
                    if record.live != self.record.live {
                        let digest = record.live.map(|live| live.digest);
                        assert!(digest.is_some_and(|digest| self.proved(digest)));
                        let same = record.floor.key == self.record.floor.key;
                        assert!(!same || record.floor.at > self.record.floor.at);
                    }
                    let stored = SlotRecord::from_bytes(&record.to_bytes());
                    assert_eq!(stored, Ok(record));
                    self.record = record;
                }
                Action::Fetch(model) => self.fetch = Some(model),
                Action::RunGolden(model) => {
                    assert!(self.packages.contains(&model.digest));
                    self.golden = Some(model);
                }
                Action::BeginShadow(model) => {
                    assert_eq!(self.passed, Some(model.digest));
                    self.shadow = Some(model.digest);
                    self.shadow_frames = 0;
                }
                Action::Swap(model) => {
                    assert!(self.proved(model.digest));
                    assert_eq!(
                        self.record.live,
                        Some(model),
                        "swapped before it was stored"
                    );
                    self.live = Some(model.digest);
                }
                Action::Discard => {
                    self.shadow = None;
                    self.golden = None;
                    self.fetch = None;
                    let named = [
                        self.record.live.map(|live| live.digest),
                        self.record.candidate.map(|c| c.model.digest),
                    ];
                    self.packages
                        .retain(|digest| named.contains(&Some(*digest)));
                }
                Action::Report(report) => assert_ne!(report.model.digest, Digest([0; 32])),
            }
            if let Some(live) = self.record.live {
                assert!(
                    self.packages.contains(&live.digest),
                    "the live package is gone"
                );
            }
        }
        assert_eq!(self.slot.record(), &self.record);
        true
    }

    /// Power comes back. Booting itself may be cut too.
    fn reboot(&mut self, before_cut: usize) -> bool {
        self.slot = Slot::new(self.record);
        self.live = self.record.live.map(|live| live.digest);
        (self.golden, self.fetch, self.passed, self.shadow) = (None, None, None, None);
        self.shadow_frames = 0;
        self.step(Event::Boot, before_cut)
    }

    /// What a healthy shell would report next, if anything.
    fn next(&mut self) -> Option<Event> {
        if let Some(model) = self.fetch.take() {
            return Some(Event::Fetched {
                digest: model.digest,
            });
        }
        if let Some(model) = self.golden.take() {
            return Some(Event::GoldenPassed {
                digest: model.digest,
            });
        }
        self.shadow.filter(|_| self.slot.on_trial()).map(|_| GOOD)
    }

    /// Runs without faults until nothing is left to do.
    fn settle(&mut self) {
        for _ in 0..100 {
            let event = self.next().or_else(|| {
                let report = self.slot.report()?;
                Some(Event::ReportSeen {
                    digest: report.model.digest,
                    state: report.state,
                })
            });
            match event {
                Some(event) => assert!(self.step(event, usize::MAX)),
                None => return,
            }
        }
        panic!("does not come to rest: {:?}", self.slot);
    }
}

#[test]
fn a_good_model_is_fetched_proved_and_swapped_in() {
    let mut shell = Shell::new();
    shell.step(offer(1), usize::MAX);
    let mut states = Vec::new();
    while let Some(event) = shell.next() {
        states.push(shell.slot.report().unwrap().state);
        shell.step(event, usize::MAX);
    }
    states.dedup();
    use SlotState::{Confirmed, Fetching, Staged, Trial};
    assert_eq!(states, [Fetching, Staged, Trial]);
    let report = shell.slot.report().unwrap();
    assert_eq!((report.state, report.code), (Confirmed, 0));
    assert_eq!((report.trial_frames, report.max_latency_us), (5, 300));
    assert_eq!(shell.live, Some(model(1).digest));
    shell.settle();
    assert_eq!(shell.slot.report(), None);
    // Offered again: said again, without a trial and without a write.
    let actions = shell.slot.step(offer(1));
    assert!(matches!(&actions[..], [Action::Report(r)] if r.state == Confirmed));
    // Something older: refused.
    let mut shell_two = shell.clone();
    shell_two.slot.record.live = Some(model(9));
    shell_two.slot.record.floor.at = 9;
    let actions = shell_two.slot.step(offer(4));
    assert!(
        matches!(&actions[..], [Action::Report(r)] if r.code == TrustError::Rollback.code()),
        "{actions:?}"
    );
}

/// Up to three power failures, each after any number of actions since the last start, in a whole
/// update and in the starts between.
#[test]
fn any_three_power_cuts_leave_a_proved_model_or_the_old_one() {
    let run = |cuts: [usize; 3]| {
        let mut shell = Shell::new();
        let mut cuts_left = cuts.into_iter();
        let mut left = cuts_left.next().unwrap_or(usize::MAX);
        let mut restarts = 0;
        let mut event = Some(offer(1));
        while let Some(next) = event.take().or_else(|| shell.next()) {
            let mut length = shell.slot.clone().step(next).len();
            let mut alive = shell.step(next, left);
            while !alive {
                left = cuts_left.next().unwrap_or(usize::MAX);
                // A start that ends before its first write has run nothing and does not count.
                let ran = |c: Candidate| c.state != SlotState::Fetching && left > 0;
                restarts += u8::from(shell.record.candidate.is_some_and(ran));
                length = Slot::new(shell.record).step(Event::Boot).len();
                alive = shell.reboot(left);
            }
            left = left.saturating_sub(length);
        }
        // Before the first write the offer is forgotten; the cloud makes it again.
        if shell.record == SlotRecord::default() {
            shell.step(offer(1), usize::MAX);
        }
        shell.settle();
        let live = shell.record.live;
        assert!(shell.record.candidate.is_none());
        assert_eq!(shell.live, live.map(|live| live.digest));
        assert_eq!(live.is_some(), restarts <= MAX_RESTARTS, "{cuts:?}");
        live.is_some()
    };
    const LAST: usize = 16;
    let mut outcomes = BTreeSet::new();
    for a in 0..LAST {
        for b in 0..LAST {
            for c in 0..LAST {
                outcomes.insert(run([a, b, c]));
            }
        }
    }
    assert_eq!(outcomes.len(), 2, "cuts reach both ends");
}

#[derive(Clone, Debug)]
enum Op {
    Offer(u8),
    Next,
    FetchFails,
    GoldenFails,
    Frame(u32, f32),
    EngineFails,
    Seen,
    Stop,
    Cut,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (1u8..7).prop_map(Op::Offer),
        12 => Just(Op::Next),
        1 => Just(Op::FetchFails),
        1 => Just(Op::GoldenFails),
        2 => (0u32..5000, prop_oneof![0.0f32..=1.0, Just(f32::NAN)]).prop_map(|(l, c)| Op::Frame(l, c)),
        1 => Just(Op::EngineFails),
        3 => Just(Op::Seen),
        1 => Just(Op::Stop),
        1 => Just(Op::Cut),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    /// The rules in [`Shell`] hold on any history, and any history comes to rest.
    #[test]
    fn any_history_keeps_the_rules(ops in prop::collection::vec((op(), prop_oneof![4 => Just(usize::MAX), 1 => 0usize..4]), 1..60)) {
        let mut shell = Shell::new();
        let stray = Digest([77; 32]);
        for (op, before_cut) in ops {
            let current = shell.record.candidate.map_or(stray, |c| c.model.digest);
            let event = match op {
                Op::Offer(n) => offer(n),
                Op::Next => match shell.next() {
                    Some(event) => event,
                    None => continue,
                },
                Op::FetchFails => Event::FetchFailed { digest: current, code: TrustError::WrongDigest.code() },
                Op::GoldenFails => Event::GoldenFailed { digest: current, error: SlotError::Golden },
                Op::Frame(latency_us, confidence) => Event::Frame { latency_us, confidence, live_confidence: Some(0.6) },
                Op::EngineFails => Event::EngineFailed,
                Op::Seen => match shell.slot.report() {
                    Some(report) => Event::ReportSeen { digest: report.model.digest, state: report.state },
                    None => continue,
                },
                Op::Stop => {
                    shell.step(Event::Stop, usize::MAX);
                    while !shell.reboot(usize::MAX) {}
                    continue;
                }
                Op::Cut => {
                    let _ = shell.reboot(before_cut) || shell.reboot(usize::MAX);
                    continue;
                }
            };
            if !shell.step(event, before_cut) {
                shell.reboot(usize::MAX);
            }
        }
        shell.settle();
        prop_assert!(shell.record.candidate.is_none());
        prop_assert_eq!(shell.live, shell.record.live.map(|live| live.digest));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = SlotRecord::from_bytes(&bytes);
    }
}

/// A slot with model 1 live and model 2 on trial.
fn on_trial() -> Shell {
    let mut shell = Shell::new();
    shell.step(offer(1), usize::MAX);
    shell.settle();
    shell.step(offer(2), usize::MAX);
    for _ in 0..2 {
        let event = shell.next().unwrap();
        shell.step(event, usize::MAX);
    }
    assert!(shell.slot.on_trial());
    shell
}

fn reverted(shell: &Shell) -> u16 {
    let report = shell.slot.report().unwrap();
    assert_eq!(report.state, SlotState::Reverted);
    assert_eq!(report.model, model(2));
    assert_eq!(shell.record.live, Some(model(1)));
    assert_eq!(shell.record.floor, Floor { key: KEY, at: 1 });
    report.code
}

#[test]
fn each_missed_bound_has_its_reason() {
    let trial = |latency_us, confidence, live_confidence| {
        let mut shell = on_trial();
        for _ in 0..BOUNDS.frames {
            shell.step(
                Event::Frame {
                    latency_us,
                    confidence,
                    live_confidence,
                },
                usize::MAX,
            );
        }
        shell
    };
    assert_eq!(
        reverted(&trial(1500, 0.9, Some(0.9))),
        SlotError::Latency.code()
    );
    assert_eq!(
        reverted(&trial(300, 0.3, Some(0.6))),
        SlotError::Confidence.code()
    );
    assert_eq!(
        reverted(&trial(300, f32::NAN, None)),
        SlotError::Confidence.code()
    );
    // The scene is hard for the live model too.
    assert_eq!(trial(300, 0.3, Some(0.2)).record.live, Some(model(2)));
    let mut shell = on_trial();
    shell.step(Event::EngineFailed, usize::MAX);
    assert_eq!(reverted(&shell), SlotError::Engine.code());
}

#[test]
fn one_slow_frame_is_not_the_median() {
    let mut shell = on_trial();
    for latency_us in [300, 90_000, 310, 305, 320] {
        shell.step(
            Event::Frame {
                latency_us,
                confidence: 0.9,
                live_confidence: None,
            },
            usize::MAX,
        );
    }
    assert_eq!(shell.record.live, Some(model(2)));
    assert_eq!(shell.slot.report().unwrap().max_latency_us, 90_000);
}

#[test]
fn restarts_are_counted_unless_asked_for() {
    let mut shell = on_trial();
    for _ in 0..20 {
        shell.step(Event::Stop, usize::MAX);
        shell.reboot(usize::MAX);
    }
    assert!(shell.record.candidate.is_some());
    shell.reboot(usize::MAX);
    shell.reboot(usize::MAX);
    assert!(shell.record.candidate.is_some());
    shell.reboot(usize::MAX);
    assert_eq!(reverted(&shell), SlotError::CrashLoop.code());
}

#[test]
fn a_newer_offer_waits_for_a_trial_and_supersedes_a_fetch() {
    let mut shell = on_trial();
    let before = shell.record;
    assert!(shell.slot.step(offer(3)).is_empty());
    assert_eq!(shell.record, before);

    let mut shell = Shell::new();
    shell.step(offer(1), usize::MAX);
    shell.step(offer(2), usize::MAX);
    assert_eq!(shell.record.candidate.map(|c| c.model), Some(model(2)));
    let report = shell.slot.report().unwrap();
    assert_eq!(report.model, model(1));
    assert_eq!(report.code, SlotError::Superseded.code());
    // The old fetch ends late; it is not mistaken for the new one.
    assert!(
        shell
            .slot
            .step(Event::Fetched {
                digest: model(1).digest
            })
            .is_empty()
    );
    shell.settle();
    assert_eq!(shell.record.live, Some(model(2)));
}

#[test]
fn an_offer_made_before_the_cloud_heard_of_the_end_is_not_tried_again() {
    let mut shell = on_trial();
    shell.step(Event::EngineFailed, usize::MAX);
    let actions = shell.slot.step(offer(2));
    assert!(matches!(&actions[..], [Action::Report(r)] if r.state == SlotState::Reverted));
    assert!(shell.slot.record().candidate.is_none());
    shell.settle();
    // Offered once more after that, it is meant.
    shell.step(offer(2), usize::MAX);
    shell.settle();
    assert_eq!(shell.record.live, Some(model(2)));
}

#[test]
fn the_longest_record_fits_and_reasons_have_words() {
    let held = Held {
        digest: Digest([255; 32]),
        sequence: u64::MAX,
    };
    let longest = SlotRecord {
        live: Some(held),
        candidate: Some(Candidate {
            model: held,
            state: SlotState::Trial,
            bounds: TrialBounds {
                frames: u32::MAX,
                max_latency_us: u32::MAX,
                min_confidence: 1.0,
            },
            key: KeyId([255; 8]),
            starts: 255,
        }),
        outcome: Some(Report {
            model: held,
            state: SlotState::Reverted,
            code: u16::MAX,
            trial_frames: u32::MAX,
            max_latency_us: u32::MAX,
        }),
        floor: Floor {
            key: KeyId([255; 8]),
            at: u64::MAX,
        },
    };
    let bytes = longest.to_bytes();
    assert!(bytes.len() < RECORD_MAX, "{}", bytes.len());
    assert_eq!(SlotRecord::from_bytes(&bytes), Ok(longest));
    assert_eq!(SlotRecord::from_bytes(&bytes[..40]), Err(RecordError));
    assert_eq!(SlotRecord::from_bytes(&[]), Err(RecordError));

    use std::string::ToString;
    assert_eq!(Reason(0).to_string(), "");
    assert_eq!(Reason(5).to_string(), TrustError::NotCanonical.to_string());
    assert_eq!(Reason(104).to_string(), SlotError::Confidence.to_string());
    assert!(Reason(999).to_string().contains("999"));
}

#[test]
fn a_candidate_of_a_revoked_key_is_given_up_and_a_confirmed_model_stays() {
    let mut shell = on_trial();
    assert!(shell.slot.step(Event::Trusted { key: KEY }).is_empty());
    let other = KeyId([8; 8]);
    shell.step(Event::Trusted { key: other }, usize::MAX);
    assert_eq!(reverted(&shell), TrustError::Revoked.code());
    assert!(shell.slot.step(Event::Trusted { key: other }).is_empty());
    // What the old key confirmed is no floor under the new one.
    shell.settle();
    let again = Event::Offer {
        model: Held {
            sequence: 1,
            ..model(3)
        },
        bounds: BOUNDS,
        key: other,
    };
    shell.step(again, usize::MAX);
    shell.settle();
    assert_eq!(
        shell.record.live.map(|live| live.digest),
        Some(model(3).digest)
    );
    assert_eq!(shell.record.floor, Floor { key: other, at: 1 });
}

#[test]
fn the_record_of_an_older_release_is_read() {
    // Version 1, live model 1, no candidate, no outcome.
    let mut bytes = std::vec![1, 1];
    bytes.extend_from_slice(&[1; 32]);
    bytes.extend_from_slice(&[5, 0, 0]);
    let record = SlotRecord::from_bytes(&bytes).unwrap();
    assert_eq!(record.live.map(|live| live.sequence), Some(5));
    assert_eq!(record.floor, Floor::default());
    bytes.push(0);
    assert_eq!(SlotRecord::from_bytes(&bytes), Err(RecordError));
}
