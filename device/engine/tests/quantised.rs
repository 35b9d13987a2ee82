//! int8 models, with quantisation around float operators (QDQ) and with quantised operators
//! (QLinear), built here to the byte so that their answers are known.

use device_engine::import::{Options, import};
use device_engine::{Output, Plan, load};
use flywheel_shared::spec::Scale;

mod engines;

const INPUTS: usize = 16;
const CLASSES: usize = 3;
/// Step of the input's, the weights' and the output's quantisation.
const STEPS: [f32; 3] = [1.0, 0.25, 0.5];

fn weight(row: usize, column: usize) -> i8 {
    ((row * 7 + column * 5) % 11) as i8 - 5
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u64, payload: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, payload.len() as u64);
    out.extend_from_slice(payload);
}

/// A `TensorProto`: 1 is f32, 2 u8, 3 i8, 7 i64.
fn tensor(name: &str, kind: u64, shape: &[usize], raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for side in shape {
        number(&mut out, 1, *side as u64);
    }
    number(&mut out, 2, kind);
    bytes(&mut out, 8, name.as_bytes());
    bytes(&mut out, 9, raw);
    out
}

fn node(op: &str, inputs: &[&str], output: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for input in inputs {
        bytes(&mut out, 1, input.as_bytes());
    }
    bytes(&mut out, 2, output.as_bytes());
    bytes(&mut out, 3, output.as_bytes());
    bytes(&mut out, 4, op.as_bytes());
    out
}

/// A `ValueInfoProto` of f32 values.
fn value(name: &str, shape: &[usize]) -> Vec<u8> {
    let mut sides = Vec::new();
    for side in shape {
        let mut dimension = Vec::new();
        number(&mut dimension, 1, *side as u64);
        bytes(&mut sides, 1, &dimension);
    }
    let mut tensor = Vec::new();
    number(&mut tensor, 1, 1);
    bytes(&mut tensor, 2, &sides);
    let mut kind = Vec::new();
    bytes(&mut kind, 1, &tensor);
    let mut out = Vec::new();
    bytes(&mut out, 1, name.as_bytes());
    bytes(&mut out, 2, &kind);
    out
}

/// A 4 × 4 picture times a matrix.
fn model(nodes: &[Vec<u8>]) -> Vec<u8> {
    let mut graph = Vec::new();
    for node in nodes {
        bytes(&mut graph, 1, node);
    }
    bytes(&mut graph, 2, b"quantised");
    let weights: Vec<u8> = (0..INPUTS * CLASSES)
        .map(|at| weight(at / CLASSES, at % CLASSES).cast_unsigned())
        .collect();
    let shape: Vec<u8> = [1i64, INPUTS as i64]
        .iter()
        .flat_map(|side| side.to_le_bytes())
        .collect();
    for initializer in [
        tensor("w", 3, &[INPUTS, CLASSES], &weights),
        tensor("shape", 7, &[2], &shape),
        tensor("x_step", 1, &[], &STEPS[0].to_le_bytes()),
        tensor("w_step", 1, &[], &STEPS[1].to_le_bytes()),
        tensor("y_step", 1, &[], &STEPS[2].to_le_bytes()),
        tensor("x_zero", 2, &[], &[0]),
        tensor("w_zero", 3, &[], &[0]),
        tensor("y_zero", 2, &[], &[128]),
    ] {
        bytes(&mut graph, 5, &initializer);
    }
    bytes(&mut graph, 11, &value("x", &[1, 1, 4, 4]));
    bytes(&mut graph, 12, &value("y", &[1, CLASSES]));
    let mut opset = Vec::new();
    number(&mut opset, 2, 13);
    let mut model = Vec::new();
    number(&mut model, 1, 8);
    bytes(&mut model, 7, &graph);
    bytes(&mut model, 8, &opset);
    model
}

fn check(onnx: &[u8], rounding: f32) {
    let options = Options {
        scale: Some(Scale::Byte),
        ..Options::default()
    };
    let package = match import(onnx, &options) {
        Ok(imported) => imported.package,
        Err(error) => panic!("{error}"),
    };
    // The last layer reads the pixels.
    assert_eq!(usize::from(package.embedding), INPUTS);
    let spec = package.spec();
    for kind in engines::of_onnx() {
        let plan = load(kind, &package.bytes(&spec)).unwrap();
        check_answer(plan, rounding);
    }
}

fn check_answer(mut plan: Box<dyn Plan>, rounding: f32) {
    let input: Vec<f32> = (0..INPUTS).map(|at| (at * 3 % 14) as f32).collect();
    let (mut logits, mut embedding) = ([0.0; CLASSES], [0.0; INPUTS]);
    let mut output = Output {
        logits: &mut logits,
        heads: &mut [],
        embedding: &mut embedding,
    };
    plan.run(&input, &mut output).unwrap();
    for (class, logit) in logits.iter().enumerate() {
        let exact: f32 = (0..INPUTS)
            .map(|at| input[at] * f32::from(weight(at, class)) * STEPS[1])
            .sum();
        assert!((logit - exact).abs() <= rounding, "{logit} for {exact}");
    }
    assert_eq!(embedding.as_slice(), input);
    assert!(logits.iter().any(|logit| *logit != logits[0]));
}

#[test]
fn quantised_operators_run() {
    check(
        &model(&[
            node("Reshape", &["x", "shape"], "flat"),
            node("QuantizeLinear", &["flat", "x_step", "x_zero"], "xq"),
            node(
                "QLinearMatMul",
                &[
                    "xq", "x_step", "x_zero", "w", "w_step", "w_zero", "y_step", "y_zero",
                ],
                "yq",
            ),
            node("DequantizeLinear", &["yq", "y_step", "y_zero"], "y"),
        ]),
        STEPS[2] / 2.0 + 1e-3,
    );
}

#[test]
fn float_operators_between_quantisation_run() {
    check(
        &model(&[
            node("Reshape", &["x", "shape"], "flat"),
            node("QuantizeLinear", &["flat", "x_step", "x_zero"], "xq"),
            node("DequantizeLinear", &["xq", "x_step", "x_zero"], "xd"),
            node("DequantizeLinear", &["w", "w_step", "w_zero"], "wd"),
            node("MatMul", &["xd", "wd"], "y"),
        ]),
        1e-3,
    );
}
