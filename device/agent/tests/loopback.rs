//! Whole agents against a small cloud over real QUIC on the loopback interface.

mod fake;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use device_core::params::{Params, Shape};
use device_engine::{
    ClassOutput, EngineKind, Frame, InputSpec, ModelBytes, ModelSpec, Output, Task, load,
    preprocess,
};
use fake::{Cloud, Release, release_key};
use flywheel_agent::agent::{self, AgentError, Mode};
use flywheel_agent::config::Config;
use flywheel_agent::wire;
use flywheel_models::{ARCH, NetConfig, Weights, export};
use flywheel_shared::ids::Digest;
use flywheel_shared::message::SlotState;
use flywheel_shared::spec::Golden;
use flywheel_shared::trust::{
    ANY_HARDWARE, Manifest, Part, PartKind, RUNTIME_ABI, Role, TrialBounds, sign,
};
use tokio::sync::oneshot;

const SIDE: u16 = 32;
const FRAME_BYTES: u64 = 3 * SIDE as u64 * SIDE as u64;

fn config(data: &Path) -> Config {
    let text = format!(
        "data = {data:?}\nsource = \"sim:roads?seed=5&size=32\"\ntransport = [\"quic\"]\nhealth_interval_ms = 100\n[budget]\nratio = 0.5\n"
    );
    Config::parse(Path::new("agent.toml"), &text).unwrap()
}

/// An agent on a thread of its own.
struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<(), AgentError>>,
}

fn start(data: &Path) -> Running {
    let config = config(data);
    let (stop, stopped) = oneshot::channel();
    let thread = thread::spawn(move || {
        agent::run_until(&config, Mode::Forever, async {
            let _ = stopped.await;
            Ok(())
        })
    });
    Running { stop, thread }
}

impl Running {
    fn stop(self) {
        self.stop.send(()).unwrap();
        self.thread.join().unwrap().unwrap();
    }
}

fn once(data: &Path, frames: u64) {
    agent::run_until(&config(data), Mode::Once { frames }, std::future::pending()).unwrap();
}

#[test]
fn everything_flagged_arrives_and_the_next_start_goes_on() {
    let data = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(data.path());
    once(data.path(), 300);
    let first = cloud.with(|memory| {
        let told = memory.health.clone().unwrap();
        assert_eq!(told.frame, 300);
        assert_eq!(told.bytes_seen, 300 * FRAME_BYTES);
        assert!(told.idle && told.live.is_none());
        let numbers: Vec<u32> = memory.records.keys().map(|key| key.seq).collect();
        let count = numbers.len() as u32;
        assert!(count > 10, "only {count} samples");
        assert_eq!(numbers, (1..=count).collect::<Vec<_>>());
        assert!(memory.records.values().all(|record| record.loss.is_none()));
        assert_eq!(told.books.len(), 1);
        assert_eq!((told.books[0].flagged, told.books[0].acked), (count, count));
        // All bytes of the samples, and little else.
        assert!(told.bytes_up > u64::from(count) * FRAME_BYTES);
        assert!(told.bytes_up < u64::from(count) * (FRAME_BYTES + 200) + 20_000);
        memory.records.clone()
    });
    once(data.path(), 100);
    cloud.with(|memory| {
        let told = memory.health.clone().unwrap();
        assert_eq!(told.frame, 400);
        assert_eq!(told.bytes_seen, 400 * FRAME_BYTES);
        let new: Vec<_> = memory
            .records
            .iter()
            .filter(|(key, _)| !first.contains_key(key))
            .collect();
        assert!(!new.is_empty());
        for (key, record) in new {
            assert_eq!(key.epoch, 2);
            assert!((300..400).contains(&record.frame));
        }
    });
}

#[test]
fn the_same_seed_flags_the_same_frames() {
    let frames: Vec<Vec<u64>> = (0..2)
        .map(|_| {
            let data = tempfile::tempdir().unwrap();
            let cloud = Cloud::start(data.path());
            once(data.path(), 200);
            cloud.with(|memory| memory.records.values().map(|r| r.frame).collect())
        })
        .collect();
    assert_eq!(frames[0], frames[1]);
}

#[test]
fn a_second_agent_on_the_same_folder_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(data.path());
    let running = start(data.path());
    cloud.wait("a health message", |memory| memory.health.is_some());
    let error = agent::run(&config(data.path()), Mode::Once { frames: 1 }).unwrap_err();
    assert!(error.to_string().contains("another agent"), "{error}");
    running.stop();
}

/// A package of an untrained network, with golden answers from the engine itself.
fn release(sequence: u64) -> Release {
    let spec = ModelSpec {
        arch: ARCH,
        labels: "stop\nyield\nother",
        input: InputSpec {
            mean: [0.5; 3],
            std: [0.25; 3],
            ..InputSpec::new(SIDE, SIDE, 3)
        },
        embedding: 64,
        task: Task::Classify(ClassOutput::Logits),
    };
    let net = NetConfig {
        channels: 3,
        width: usize::from(SIDE),
        height: usize::from(SIDE),
        classes: 3,
        embedding: 64,
    };
    let record = Weights::init(&net, sequence).unwrap().to_record().unwrap();
    let onnx = export::to_onnx(&net, &record).unwrap();
    let frames: Vec<u8> = (0..2 * FRAME_BYTES as u32)
        .map(|i| (i * 37 % 255) as u8)
        .collect();
    let bytes = ModelBytes {
        onnx: &onnx,
        record: &record,
        spec: &spec,
    };
    let mut plan = load(EngineKind::Tract, &bytes).unwrap();
    let mut input = vec![0.0; plan.input_len()];
    let mut logits = [0.0; 3];
    let mut answers = Vec::new();
    for pixels in frames.chunks_exact(FRAME_BYTES as usize) {
        let frame = Frame {
            pixels,
            width: u32::from(SIDE),
            height: u32::from(SIDE),
            channels: 3,
        };
        preprocess(&frame, &spec.input, &mut input).unwrap();
        let mut output = Output {
            logits: &mut logits,
            embedding: &mut [0.0; 64],
            heads: &mut [],
        };
        plan.run(&input, &mut output).unwrap();
        answers.extend(logits.iter().flat_map(|logit| logit.to_le_bytes()));
    }
    let golden = wire::bytes(&Golden {
        width: SIDE,
        height: SIDE,
        channels: 3,
        frames: &frames,
        logits: &answers,
        tolerance: 1e-4,
    });
    let parts = [
        (PartKind::Onnx, onnx.clone()),
        (PartKind::BurnRecord, record.clone()),
        (PartKind::Spec, wire::bytes(&spec)),
        (PartKind::Scores, scores()),
        (PartKind::Golden, golden),
    ];
    let manifest = wire::bytes(&Manifest {
        name: "roads",
        sequence,
        hardware: ANY_HARDWARE,
        abi: RUNTIME_ABI,
        created_ms: 0,
        expires_ms: u64::MAX,
        trial: TrialBounds {
            frames: 20,
            max_latency_us: 0,
            min_confidence: 0.0,
        },
        parts: parts
            .iter()
            .map(|(kind, bytes)| Part {
                kind: *kind,
                len: bytes.len() as u32,
                digest: Digest::of(bytes),
            })
            .collect(),
        deltas: heapless::Vec::new(),
    });
    Release {
        signature: sign(Role::Release, &release_key(), &manifest),
        manifest,
        sequence,
        parts: parts
            .into_iter()
            .map(|(_, bytes)| (Digest::of(&bytes), bytes))
            .collect(),
    }
}

/// Score parameters that know nothing: T = 1, one item a class, empty tables.
fn scores() -> Vec<u8> {
    let shape = Shape::plain(3, 64, 2);
    let layout = shape.layout();
    let mut values = vec![0.0; shape.values()];
    values[layout.temperature] = 1.0;
    values[layout.calibrated] = 100.0;
    values[layout.counts].fill(1.0);
    let mut out = vec![0; shape.encoded_len()];
    Params::checked(shape, &values)
        .unwrap()
        .encode(&mut out)
        .unwrap();
    out
}

fn has_ended(cloud: &Arc<Cloud>, state: SlotState) -> bool {
    cloud.with(|memory| memory.reports.iter().any(|(seen, _)| *seen == state))
}

#[test]
fn an_offered_model_goes_on_trial_and_live_and_a_damaged_one_is_fetched_again() {
    let data = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(data.path());
    let offered = release(4);
    let digest = Digest::of(&offered.manifest);
    let size: usize = offered.parts.values().map(Vec::len).sum();
    cloud.with(|memory| memory.run_until = 50);
    let running = start(data.path());
    let idle_at = |frame| {
        move |memory: &fake::Memory| {
            memory
                .health
                .as_ref()
                .is_some_and(|told| told.idle && told.frame == frame)
        }
    };
    cloud.wait("the first halt", idle_at(50));
    assert!(cloud.with(|memory| memory.records.values().all(|r| r.model == [0; 8])));
    cloud.with(|memory| memory.release = Some(offered));
    // The trial goes on beyond the halt, frame by frame, and halts again when it is over.
    cloud.wait("the model to be live", |memory| {
        let live = memory.health.as_ref().and_then(|told| told.live);
        live == Some(digest) && memory.reports.iter().any(|r| r.0 == SlotState::Confirmed)
    });
    cloud.wait("the halt after the trial", idle_at(70));
    assert!(!has_ended(&cloud, SlotState::Reverted));
    assert_eq!(cloud.with(|memory| memory.fetched), size);
    cloud.with(|memory| memory.run_until = 300);
    cloud.wait("the second halt", idle_at(300));
    running.stop();
    cloud.with(|memory| {
        let id: [u8; 8] = digest.0[..8].try_into().unwrap();
        let scored = |r: &&fake::Arrived| r.model == id && r.frame >= 70;
        assert!(memory.records.values().filter(scored).count() > 0);
        memory.reports.clear();
        memory.health = None;
    });

    // A byte flips on the device's disk: it starts without a model, and gets the same one again.
    let path = data
        .path()
        .join("models")
        .join(digest.to_string())
        .join("model.onnx");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let running = start(data.path());
    cloud.wait("the model to be live again", |memory| {
        let live = memory.health.as_ref().and_then(|told| told.live);
        live == Some(digest) && memory.reports.iter().any(|r| r.0 == SlotState::Confirmed)
    });
    running.stop();
}

#[test]
fn a_model_that_answers_otherwise_than_signed_is_reverted() {
    let data = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(data.path());
    let good = release(1);
    let mut bad = release(2);
    // Signed with the golden answers of another network.
    let theirs = |release: &Release| -> Manifest<'static> {
        let manifest: Manifest<'_> = postcard::from_bytes(&release.manifest).unwrap();
        Manifest {
            name: "roads",
            hardware: ANY_HARDWARE,
            ..manifest.clone()
        }
    };
    let golden = *theirs(&good).part(PartKind::Golden).unwrap();
    let mut manifest = theirs(&bad);
    for part in &mut manifest.parts {
        if part.kind == PartKind::Golden {
            *part = golden;
        }
    }
    bad.parts.extend(good.parts);
    bad.manifest = wire::bytes(&manifest);
    bad.signature = sign(Role::Release, &release_key(), &bad.manifest);
    cloud.with(|memory| memory.release = Some(bad));
    let running = start(data.path());
    cloud.wait("the model to be given up", |memory| {
        memory.reports.iter().any(|r| r.0 == SlotState::Reverted)
    });
    cloud.with(|memory| {
        let codes: Vec<u16> = memory
            .reports
            .iter()
            .filter(|r| r.0 == SlotState::Reverted)
            .map(|r| r.1)
            .collect();
        assert!(codes.iter().all(|code| *code == 100), "{codes:?}");
        assert!(!memory.reports.iter().any(|r| r.0 == SlotState::Trial));
    });
    running.stop();
}
