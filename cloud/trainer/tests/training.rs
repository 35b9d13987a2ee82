//! Training as its callers see it: it learns, repeats itself, keeps what it knew, and stops.

use std::ops::ControlFlow;
use std::sync::Arc;

use cloud_trainer::{Augment, Champion, Example, Fit, TrainConfig, TrainError, Trained, train};
use device_engine::{
    ClassOutput, EngineKind, InputSpec, ModelBytes, ModelSpec, Output, Task, load,
};
use flywheel_models::{ARCH, NetConfig, Weights};

const SIDE: usize = 16;

fn config(classes: usize) -> TrainConfig {
    let net = NetConfig {
        channels: 1,
        width: SIDE,
        height: SIDE,
        classes,
        embedding: 16,
    };
    let input = InputSpec {
        mean: [0.5; 3],
        std: [0.25; 3],
        ..InputSpec::new(SIDE as u16, SIDE as u16, 1)
    };
    TrainConfig {
        steps: 40,
        batch: 16,
        ema: 0.9,
        augment: Augment {
            geometry: 0.3,
            light: 0.3,
            optics: 0.3,
            occlusion: 0.0,
            mirror: false,
        },
        ..TrainConfig::new(net, input, 3)
    }
}

/// Bars: vertical, horizontal, diagonal, a blob; `variant` moves and dims them.
fn image(class: usize, variant: usize) -> Arc<[u8]> {
    let at = 5 + variant % 5;
    let level = 150 + (variant * 13 % 100) as u8;
    (0..SIDE * SIDE)
        .map(|i| {
            let (x, y) = (i % SIDE, i / SIDE);
            let lit = match class {
                0 => x.abs_diff(at) <= 1,
                1 => y.abs_diff(at) <= 1,
                2 => (x + 8).abs_diff(y + at) <= 1,
                _ => x.abs_diff(at) <= 3 && y.abs_diff(at) <= 3,
            };
            if lit { level } else { 40 + (i * 7 % 20) as u8 }
        })
        .collect()
}

fn examples(classes: &[usize], each: usize) -> Vec<Example> {
    classes
        .iter()
        .flat_map(|&class| {
            (0..each).map(move |variant| Example {
                pixels: image(class, variant),
                label: class as u32,
                weight: 1.0,
            })
        })
        .collect()
}

fn run(config: &TrainConfig, examples: &[Example], champion: Option<Champion<'_>>) -> Trained {
    train(config, examples, champion, &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap()
}

/// Accuracy of the exported model through tract on unseen variants.
fn accuracy(config: &TrainConfig, trained: &Trained, classes: &[usize]) -> f32 {
    let labels: Vec<String> = (0..config.net.classes).map(|i| format!("c{i}")).collect();
    let spec = ModelSpec {
        arch: ARCH,
        labels: &labels.join("\n"),
        input: config.input,
        embedding: config.net.embedding as u16,
        task: Task::Classify(ClassOutput::Logits),
    };
    let bytes = ModelBytes {
        onnx: &trained.onnx,
        record: &trained.record,
        spec: &spec,
    };
    let mut plan = load(EngineKind::Tract, &bytes).unwrap();
    let mut input = vec![0.0; plan.input_len()];
    let (mut correct, mut total) = (0, 0);
    for &class in classes {
        for variant in 100..120 {
            let pixels = image(class, variant);
            let frame = device_engine::Frame {
                pixels: &pixels,
                width: SIDE as u32,
                height: SIDE as u32,
                channels: 1,
            };
            device_engine::preprocess(&frame, &config.input, &mut input).unwrap();
            let mut logits = vec![0.0; plan.classes()];
            let mut embedding = vec![0.0; plan.embedding_dim()];
            let mut output = Output {
                logits: &mut logits,
                embedding: &mut embedding,
                heads: &mut [],
            };
            plan.run(&input, &mut output).unwrap();
            let best = (0..logits.len())
                .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
                .unwrap();
            correct += usize::from(best == class);
            total += 1;
        }
    }
    correct as f32 / total as f32
}

#[test]
fn a_separable_set_is_learnt_and_the_export_knows_it() {
    let config = config(3);
    let untrained = run(
        &TrainConfig {
            steps: 1,
            ..config.clone()
        },
        &examples(&[0, 1, 2], 20),
        None,
    );
    let trained = run(&config, &examples(&[0, 1, 2], 20), None);
    assert!(trained.train_accuracy > 0.95, "{}", trained.train_accuracy);
    assert!(trained.loss < untrained.loss);
    assert!(accuracy(&config, &trained, &[0, 1, 2]) > 0.9);
    assert!(accuracy(&config, &untrained, &[0, 1, 2]) < 0.9);
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_does_not() {
    let config = TrainConfig {
        steps: 4,
        ..config(3)
    };
    let examples = examples(&[0, 1, 2], 10);
    let first = run(&config, &examples, None);
    let again = run(&config, &examples, None);
    assert!(first.record == again.record && first.onnx == again.onnx);
    let other = run(&TrainConfig { seed: 4, ..config }, &examples, None);
    assert!(first.record != other.record && first.onnx != other.onnx);
}

#[test]
fn a_champion_learns_a_new_class_and_keeps_the_old_ones() {
    let old = config(3);
    let champion = run(&old, &examples(&[0, 1, 2], 20), None);
    let new = TrainConfig {
        lr: 1.5e-3,
        ..config(4)
    };
    let all = [examples(&[0, 1, 2], 20), examples(&[3], 8)].concat();
    let start = Champion {
        record: &champion.record,
        config: &old.net,
    };
    // One tiny step: old classes answered as before, the new one not yet claimed.
    let grown = run(
        &TrainConfig {
            steps: 1,
            lr: 1e-7,
            ..new.clone()
        },
        &all,
        Some(start),
    );
    let before = accuracy(&old, &champion, &[0, 1, 2]);
    assert!(accuracy(&new, &grown, &[0, 1, 2]) >= before - 0.02);
    let trained = run(&new, &all, Some(start));
    assert!(accuracy(&new, &trained, &[3]) > 0.8);
    assert!(accuracy(&new, &trained, &[0, 1, 2]) > 0.85);
}

#[test]
fn a_refit_changes_the_classifier_and_nothing_else() {
    let old = config(3);
    let champion = run(&old, &examples(&[0, 1, 2], 20), None);
    let start = Champion {
        record: &champion.record,
        config: &old.net,
    };
    let new = TrainConfig {
        fit: Fit::Head,
        steps: 300,
        ..config(4)
    };
    let all = [examples(&[0, 1, 2], 20), examples(&[3], 8)].concat();
    let refit = run(&new, &all, Some(start));
    let before = Weights::from_record(&old.net, &champion.record).unwrap();
    let after = Weights::from_record(&new.net, &refit.record).unwrap();
    for slot in before.slots() {
        let same = before.tensor(&slot.name) == after.tensor(&slot.name);
        assert_eq!(same, !slot.name.starts_with("head."), "{}", slot.name);
    }
    // Features that were learnt for three bars tell the blob from them well enough.
    assert!(accuracy(&new, &refit, &[3]) > 0.6);
    assert!(accuracy(&new, &refit, &[0, 1, 2]) > 0.85);
    assert!(refit == run(&new, &all, Some(start)));

    let error = train(&new, &all, None, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("fit is head"), "{error}");
}

#[test]
fn the_callback_sees_every_step_and_can_stop() {
    let config = config(2);
    let mut seen = Vec::new();
    let error = train(&config, &examples(&[0, 1], 8), None, &mut |progress| {
        assert_eq!(progress.steps, 40);
        assert!(progress.loss.is_finite() && (0.0..=1.0).contains(&progress.accuracy));
        seen.push(progress.step);
        match progress.step {
            3 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    })
    .unwrap_err();
    assert_eq!(error, TrainError::Cancelled { step: 3 });
    assert_eq!(seen, [1, 2, 3]);
}

#[test]
fn bad_arguments_are_named_before_any_work() {
    let good = config(2);
    let set = examples(&[0, 1], 4);
    let fail = |config: &TrainConfig, examples: &[Example]| {
        train(config, examples, None, &mut |_| -> ControlFlow<()> {
            panic!("a step was taken")
        })
        .unwrap_err()
        .to_string()
    };
    assert!(fail(&good, &[]).contains("empty"));
    assert!(fail(&good, &examples(&[0, 2], 4)).contains("example 4 has label 2"));
    let mut cut = set.clone();
    cut[1].pixels = vec![0; 5].into();
    assert!(fail(&good, &cut).contains("example 1: frame buffer has 5 bytes"));
    for (config, named) in [
        (
            TrainConfig {
                lr: f32::NAN,
                ..good.clone()
            },
            "lr",
        ),
        (
            TrainConfig {
                steps: 0,
                ..good.clone()
            },
            "steps",
        ),
        (
            TrainConfig {
                batch: 3,
                ..good.clone()
            },
            "batch",
        ),
        (
            TrainConfig {
                augment: Augment {
                    light: 3.0,
                    ..Augment::NONE
                },
                ..good.clone()
            },
            "augment.light",
        ),
        (
            TrainConfig {
                input: InputSpec {
                    width: 20,
                    ..good.input
                },
                ..good.clone()
            },
            "input",
        ),
    ] {
        let error = fail(&config, &set);
        assert!(error.contains(&format!("{named} is")), "{error}");
    }
}

#[test]
fn a_damaged_champion_is_an_error() {
    let config = config(2);
    let start = Champion {
        record: b"not a record",
        config: &config.net,
    };
    let result = train(&config, &examples(&[0, 1], 4), Some(start), &mut |_| {
        ControlFlow::Continue(())
    });
    assert!(matches!(result, Err(TrainError::Model(_))));
}
