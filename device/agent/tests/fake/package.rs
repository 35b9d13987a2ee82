//! Packages of untrained networks, with golden answers from the engine itself.

use device_core::params::{Params, Shape};
use device_engine::{
    ClassOutput, EngineKind, Frame, InputSpec, ModelBytes, ModelSpec, Output, Task, load,
    preprocess,
};
use ed25519_dalek::SigningKey;
use flywheel_agent::wire;
use flywheel_models::{ARCH, NetConfig, Weights, export};
use flywheel_shared::ids::Digest;
use flywheel_shared::spec::Golden;
use flywheel_shared::trust::{
    ANY_HARDWARE, Manifest, Part, PartKind, RUNTIME_ABI, Role, TrialBounds, sign,
};

use super::{Release, release_key};

const SIDE: u16 = 32;
pub const FRAME_BYTES: u64 = 3 * SIDE as u64 * SIDE as u64;
const NET: NetConfig = NetConfig {
    channels: 3,
    width: SIDE as usize,
    height: SIDE as usize,
    classes: 3,
    embedding: 64,
};

/// A release of a network of its own.
pub fn release(sequence: u64) -> Release {
    sealed(sequence, parts(sequence), &release_key(), |_| {})
}

/// The parts of a network; as many networks as seeds.
pub fn parts(seed: u64) -> Vec<(PartKind, Vec<u8>)> {
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
    let record = Weights::init(&NET, seed).unwrap().to_record().unwrap();
    let onnx = export::to_onnx(&NET, &record).unwrap();
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
    vec![
        (PartKind::Onnx, onnx),
        (PartKind::BurnRecord, record),
        (PartKind::Spec, wire::bytes(&spec)),
        (PartKind::Scores, scores()),
        (PartKind::Golden, golden),
    ]
}

/// A release of these parts, under what is changed in its manifest.
pub fn sealed(
    sequence: u64,
    parts: Vec<(PartKind, Vec<u8>)>,
    key: &SigningKey,
    change: impl FnOnce(&mut Manifest<'_>),
) -> Release {
    let mut manifest = Manifest {
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
    };
    change(&mut manifest);
    let manifest = wire::bytes(&manifest);
    Release {
        signature: sign(Role::Release, key, &manifest),
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
