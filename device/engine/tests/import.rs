//! Importing: what is inferred, what is asked for by the name of its flag, and what is refused.

use device_engine::import::{ImportError, Options, TaskKind, import};
use device_engine::{EngineKind, Output, load};
use flywheel_models::onnx::edit::{Node, Value, with_outputs};
use flywheel_models::{NetConfig, Weights, export};
use flywheel_shared::spec::{ClassOutput, Layout, Scale, Task};

const CONFIG: NetConfig = NetConfig {
    channels: 3,
    width: 32,
    height: 32,
    classes: 4,
    embedding: 64,
};

/// Our own network, as another's file.
fn model() -> Vec<u8> {
    let record = Weights::init(&CONFIG, 1).unwrap().to_record().unwrap();
    export::to_onnx(&CONFIG, &record).unwrap()
}

/// The network with its outputs replaced by what nodes make of its logits.
fn ending_in(nodes: &[(&'static str, &str, &str)], output: &str, shape: &[usize]) -> Vec<u8> {
    let nodes: Vec<Node> = nodes
        .iter()
        .map(|(op, input, output)| Node {
            op,
            inputs: vec![(*input).to_owned()],
            output: (*output).to_owned(),
        })
        .collect();
    let value = Value {
        name: output.to_owned(),
        kind: 1,
        shape: shape.to_vec(),
    };
    with_outputs(&model(), &nodes, &[value]).unwrap()
}

fn error(onnx: &[u8], options: &Options) -> String {
    match import(onnx, options) {
        Ok(imported) => panic!("accepted: {:?}", imported.notes),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_classifier_needs_no_flags_and_its_embedding_is_found() {
    let labels = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
    let options = Options {
        labels,
        mean: vec![0.5],
        std: vec![0.25, 0.25, 0.2],
        ..Options::default()
    };
    let onnx = model();
    let imported = import(&onnx, &options).unwrap();
    let package = imported.package;
    assert_eq!(package.task, Task::Classify(ClassOutput::Logits));
    assert_eq!(package.input.shape(), [1, 3, 32, 32]);
    assert_eq!(package.input.std, [0.25, 0.25, 0.2]);
    assert_eq!(package.input_name, export::INPUT);
    assert_eq!(package.outputs, [export::LOGITS]);
    assert_eq!(package.embedding, 64);
    // The file has a second output, which is the same value and not asked for as an output.
    assert_eq!(imported.notes, ["Output \"embedding\" is left out."]);

    // The packaged file answers as the original.
    let spec = package.spec();
    let mut theirs = load(
        EngineKind::Tract,
        &device_engine::ModelBytes {
            onnx: &onnx,
            record: &[],
            spec: &spec,
        },
    )
    .unwrap();
    let mut ours = load(EngineKind::Tract, &package.bytes(&spec)).unwrap();
    let input: Vec<f32> = (0..3072).map(|i| (i % 17) as f32 / 17.0).collect();
    let run = |plan: &mut dyn device_engine::Plan| {
        let (mut logits, mut embedding) = ([0.0; 4], [0.0; 64]);
        let mut output = Output {
            logits: &mut logits,
            heads: &mut [],
            embedding: &mut embedding,
        };
        plan.run(&input, &mut output).unwrap();
        (logits, embedding)
    };
    assert_eq!(run(&mut *theirs), run(&mut *ours));
    assert_eq!(package.prove(&mut *ours).unwrap(), 0.0);
    let mut other = package.clone();
    other.golden[1].answer[2] += 1.0;
    let off = other.prove(&mut *ours).unwrap_err().to_string();
    assert!(off.contains("golden input 1: value 2"), "{off}");
}

#[test]
fn a_final_softmax_is_left_out_and_other_probabilities_are_seen() {
    let soft = ending_in(&[("Softmax", export::LOGITS, "p")], "p", &[1, 4]);
    let imported = import(&soft, &Options::default()).unwrap();
    assert_eq!(imported.package.outputs, [export::LOGITS]);
    assert_eq!(imported.package.embedding, 64);
    assert!(imported.notes.iter().any(|note| note.contains("--labels")));
    assert!(imported.notes.iter().any(|note| note.contains("--mean")));

    // Behind another operator than a softmax the way back ends, and values tell.
    let rounded = ending_in(
        &[("Softmax", export::LOGITS, "p"), ("Abs", "p", "q")],
        "q",
        &[1, 4],
    );
    let imported = import(&rounded, &Options::default()).unwrap();
    let package = imported.package;
    assert_eq!(package.task, Task::Classify(ClassOutput::Probabilities));
    assert_eq!(package.embedding, 0);
    assert!(
        imported
            .notes
            .iter()
            .any(|note| note.contains("--embedding")),
        "{:?}",
        imported.notes
    );
    // Logarithms of probabilities: their exponentials sum to 1.
    let sum: f32 = package.golden[0].answer.iter().map(|v| v.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-4, "{sum}");
}

#[test]
fn an_embedding_can_be_named_and_a_map_is_averaged() {
    let named = Options {
        embedding: Some(export::LOGITS.to_owned()),
        ..Options::default()
    };
    let package = import(&model(), &named).unwrap().package;
    assert_eq!(
        (package.embedding, package.embedding_name.as_str()),
        (4, "logits")
    );
    let none = Options {
        embedding: Some("nowhere".to_owned()),
        ..Options::default()
    };
    let error = error(&model(), &none);
    assert!(
        error.contains("--embedding") && error.contains("nowhere"),
        "{error}"
    );
    let picture = Options {
        embedding: Some(export::INPUT.to_owned()),
        ..Options::default()
    };
    let package = import(&model(), &picture).unwrap().package;
    assert_eq!(
        (package.embedding, package.embedding_name.as_str()),
        (3, "input_pooled")
    );
}

#[test]
fn anomaly_models_and_embedders_follow_from_their_outputs() {
    let score = ending_in(&[("ReduceMean", export::LOGITS, "m")], "m", &[1, 1]);
    let package = import(&score, &Options::default()).unwrap().package;
    assert!(matches!(package.task, Task::Anomaly(_)));
    assert_eq!(package.golden[0].answer.len(), 1);
    let again = ending_in(&[("Relu", export::INPUT, "r")], "r", &[1, 3, 32, 32]);
    let package = import(&again, &Options::default()).unwrap().package;
    assert_eq!(package.golden[0].answer.len(), 3072);
    let embed = Options {
        task: Some(TaskKind::Embed),
        ..Options::default()
    };
    let package = import(&model(), &embed).unwrap().package;
    assert_eq!((package.task, package.embedding), (Task::Embed, 4));
    assert_eq!(package.golden[0].answer.len(), 4);
}

#[test]
fn what_is_not_known_is_asked_for_by_its_flag() {
    let deep = ending_in(&[("Relu", "value_1", "r")], "r", &[]);
    let error_of = |options: &Options| error(&deep, options);
    assert!(error_of(&Options::default()).contains("--task"));
    for (options, flag) in [
        (
            Options {
                labels: vec!["one".to_owned()],
                ..Options::default()
            },
            "--labels",
        ),
        (
            Options {
                size: Some((64, 64)),
                ..Options::default()
            },
            "--size",
        ),
        (
            Options {
                layout: Some(Layout::Nhwc),
                ..Options::default()
            },
            "--layout",
        ),
        (
            Options {
                mean: vec![0.1, 0.2],
                ..Options::default()
            },
            "--mean",
        ),
        (
            Options {
                std: vec![0.0],
                scale: Some(Scale::Byte),
                ..Options::default()
            },
            "--std",
        ),
        (
            Options {
                task: Some(TaskKind::Anomaly),
                ..Options::default()
            },
            "anomaly",
        ),
        (
            Options {
                task: Some(TaskKind::Detect),
                ..Options::default()
            },
            "detection head",
        ),
    ] {
        let error = error(&model(), &options);
        assert!(error.contains(flag), "{flag}: {error}");
    }
}

#[test]
fn operators_that_tract_lacks_are_named() {
    let odd = ending_in(&[("Quux", export::LOGITS, "q")], "q", &[1, 4]);
    let refused = import(&odd, &Options::default()).unwrap_err();
    assert!(
        matches!(&refused, ImportError::Operators(names) if *names == ["Quux"]),
        "{refused}"
    );
    assert!(refused.to_string().contains("Quux"));
}

#[test]
fn damaged_files_are_errors() {
    let whole = model();
    for cut in [0, 1, 60, whole.len() / 2, whole.len() - 1] {
        let error = error(&whole[..cut], &Options::default());
        assert!(!error.is_empty(), "{cut}");
    }
    // Damage in the middle of the weights is not seen; damage in names and shapes is refused.
    for at in (0..400).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        // Whatever it is, nothing panics.
        let _ = import(&bytes, &Options::default());
    }
}
