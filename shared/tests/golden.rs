//! A corpus of messages as bytes, each as some version of this crate once wrote it. Today's code
//! must still read them, and write them again byte for byte: variants and fields are appended and
//! never moved. A line of `golden.txt` is never changed; a new message gets a new one.

use std::collections::BTreeMap;
use std::fmt::Debug;

use flywheel_shared::WIRE_LATEST;
use flywheel_shared::ids::Digest;
use flywheel_shared::message::{
    Ack, Batch, Chunk, Codec, Desired, Down, EpochBook, Fetch, Health, HealthTail, Hello, Lane,
    Loss, LossReason, OfferMessage, Ranges, Record, Refused, RefusedCode, Sample, Scores,
    SlotReport, SlotSeen, SlotState, Up, Welcome,
};
use flywheel_shared::trust::Signed;
use serde::{Deserialize, Serialize};

const DIGEST: Digest = Digest([0x5a; 32]);

/// The lines of `golden.txt`, and those that it lacks.
struct Corpus {
    lines: BTreeMap<&'static str, &'static [u8]>,
    read: usize,
    missing: Vec<String>,
}

impl Corpus {
    fn open() -> Self {
        let mut lines = BTreeMap::new();
        for line in include_str!("golden.txt").lines() {
            let (name, hex) = line.split_once(' ').expect("a name and bytes");
            let bytes: Vec<u8> = (0..hex.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal"))
                .collect();
            // What is read borrows from it.
            let bytes: &'static [u8] = bytes.leak();
            assert!(lines.insert(name, bytes).is_none(), "{name} is there twice");
        }
        Self {
            lines,
            read: 0,
            missing: Vec::new(),
        }
    }

    /// Holds `value` against the line of this name.
    fn check<T>(&mut self, name: &str, value: &T)
    where
        T: Serialize + Deserialize<'static> + PartialEq + Debug,
    {
        let mut buffer = [0; 2048];
        let written = &*postcard::to_slice(value, &mut buffer).unwrap();
        let Some(bytes) = self.lines.get(name) else {
            let hex: String = written.iter().map(|byte| format!("{byte:02x}")).collect();
            self.missing.push(format!("{name} {hex}"));
            return;
        };
        assert_eq!(&written, bytes, "{name} is written otherwise");
        let (read, rest) = postcard::take_from_bytes::<T>(bytes).unwrap();
        assert_eq!(&read, value, "{name} is read otherwise");
        assert!(rest.is_empty(), "{name}");
        self.read += 1;
    }

    fn finish(self) {
        assert!(
            self.missing.is_empty(),
            "golden.txt lacks:\n{}",
            self.missing.join("\n")
        );
        assert_eq!(self.read, self.lines.len(), "nothing reads some line");
    }
}

fn health() -> Health<'static> {
    let book = EpochBook {
        epoch: 6,
        flagged: 40,
        acked: 33,
        spooled: Ranges::from_slice(&[(30, 33), (38, 40)]).unwrap(),
    };
    Health {
        at_ms: 1_750_000_000_000,
        agent: "0.1.0",
        hardware: "any-linux",
        source: "sim:roads?seed=1",
        engine: "tract",
        epoch: 6,
        frame: 100_000,
        bytes_seen: 1 << 33,
        bytes_up: 1 << 20,
        skipped: 3,
        idle: true,
        live: Some(Digest([0xab; 32])),
        sequence: 4,
        candidate: None,
        books: [book].into_iter().collect(),
    }
}

fn sample() -> Sample<'static> {
    Sample {
        seq: 38,
        frame: 99_000,
        captured_ms: 1_750_000_000_000,
        track: 12,
        model: [1, 2, 3, 4, 5, 6, 7, 8],
        lane: Lane::Uniform,
        inclusion: 0.01,
        scores: Scores {
            top1: 300,
            top2: 2,
            confidence: 0.5,
            margin: 0.25,
            entropy: 1.5,
            energy: -3.0,
            novelty: 2.0,
            u_unsure: 0.75,
            u_novel: 0.125,
            rarity: 1.0,
        },
        embedding_scale: 0.5,
        embedding: &[1, 0xff, 3],
        width: 640,
        height: 2,
        codec: Codec::Jpeg,
        payload: &[0xff, 0xd8, 0xff],
    }
}

fn ups() -> [(&'static str, Up<'static>); 5] {
    let hello = Hello {
        device: "cam7".parse().unwrap(),
        wire_version: 1,
        epoch: 6,
    };
    let batch = Batch {
        epoch: 6,
        count: 2,
        records: &[1, 38, 0],
        signature: &[7; 64],
    };
    let slot = SlotReport {
        manifest: DIGEST,
        sequence: 4,
        state: SlotState::Reverted,
        code: 300,
        detail: "too slow",
        trial_frames: 60,
        max_latency_us: 250_000,
    };
    let fetch = Fetch {
        digest: DIGEST,
        offset: 1 << 40,
        len: 65_536,
    };
    [
        ("up.hello", Up::Hello(hello)),
        ("up.batch", Up::Batch(batch)),
        ("up.health", Up::Health(health())),
        ("up.slot", Up::Slot(slot)),
        ("up.fetch", Up::Fetch(fetch)),
    ]
}

fn downs() -> [(&'static str, Down<'static>); 7] {
    let signed = |body| Signed {
        body,
        signature: &[9; 64],
    };
    let welcome = Welcome {
        wire_version: 1,
        now_ms: 1_750_000_000_000,
    };
    let ack = Ack {
        epoch: 6,
        ranges: Ranges::from_slice(&[(1, 29), (34, 37)]).unwrap(),
    };
    let offer = OfferMessage {
        offer: signed(&[1, 2]),
        manifest: signed(&[3, 4, 5]),
    };
    let chunk = Chunk {
        digest: DIGEST,
        offset: 65_536,
        bytes: &[8, 9],
    };
    let desired = Desired {
        run_until: u64::MAX,
        health_at_ms: 1_750_000_000_000,
    };
    let refused = Refused {
        code: RefusedCode::NotFound,
        retry_after_ms: 5000,
    };
    let seen = SlotSeen {
        manifest: DIGEST,
        state: SlotState::Confirmed,
    };
    [
        ("down.welcome", Down::Welcome(welcome)),
        ("down.ack", Down::Ack(ack)),
        ("down.offer", Down::Offer(offer)),
        ("down.chunk", Down::Chunk(chunk)),
        ("down.desired", Down::Desired(desired)),
        ("down.refused", Down::Refused(refused)),
        ("down.slot_seen", Down::SlotSeen(seen)),
    ]
}

#[test]
fn old_messages_are_read_and_written_as_ever() {
    let mut corpus = Corpus::open();
    for (name, up) in ups() {
        corpus.check(name, &up);
    }
    for (name, down) in downs() {
        corpus.check(name, &down);
    }
    corpus.check("record.sample", &Record::Sample(sample()));
    for reason in LossReason::ALL {
        let loss = Record::Loss(Loss { seq: 200, reason });
        corpus.check(&format!("record.loss.{}", reason.name()), &loss);
    }
    let tail = HealthTail { dropped: 70_000 };
    corpus.check("up.health+tail.2", &(Up::Health(health()), tail));
    corpus.finish();
}

#[test]
fn a_tail_is_read_as_far_as_it_is_known() {
    assert_eq!(WIRE_LATEST, 2, "a new field wants a line in golden.txt");
    let corpus = Corpus::open();
    let read = |bytes: &[u8]| {
        let (up, rest) = postcard::take_from_bytes::<Up<'_>>(bytes).unwrap();
        assert_eq!(up, Up::Health(health()));
        HealthTail::read(rest)
    };
    assert_eq!(read(corpus.lines["up.health"]), Ok(None));
    let mut bytes = corpus.lines["up.health+tail.2"].to_vec();
    let tail = HealthTail { dropped: 70_000 };
    assert_eq!(read(&bytes), Ok(Some(tail)));
    bytes.extend([1, 2, 3]);
    assert_eq!(read(&bytes), Ok(Some(tail)));
    bytes.truncate(bytes.len() - 4);
    assert!(read(&bytes).is_err());
}
