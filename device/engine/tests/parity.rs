//! The same model through every engine: equal answers, and the same manners on bad input.

use device_engine::{
    ClassOutput, EngineError, EngineKind, Frame, InputSpec, ModelBytes, ModelSpec, Output, Plan,
    Task, describe, load, onnx_runtime, preprocess,
};
use flywheel_models::{ARCH, NetConfig, Role, Weights, export};

mod engines;

/// Largest absolute difference allowed between two engines, in any logit or embedding value; the
/// values themselves are of order 1. Engines sum in different orders, hence not exactly 0.
const TOLERANCE: f32 = 1e-4;

const LABELS: &str = "stop\nyield\ndeer\nspeed 30\nother";

struct Package {
    record: Vec<u8>,
    onnx: Vec<u8>,
    spec: ModelSpec<'static>,
}

impl Package {
    fn bytes(&self) -> ModelBytes<'_> {
        ModelBytes {
            onnx: &self.onnx,
            record: &self.record,
            spec: &self.spec,
        }
    }
}

/// A random network whose batch norms have non-trivial statistics.
fn package(channels: u8, side: u16) -> Package {
    let spec = ModelSpec {
        arch: ARCH,
        labels: LABELS,
        input: InputSpec {
            mean: [0.45, 0.44, 0.42],
            std: [0.25, 0.24, 0.26],
            ..InputSpec::new(side, side, channels)
        },
        embedding: 64,
        task: Task::Classify(ClassOutput::Logits),
    };
    let config = NetConfig {
        channels: usize::from(channels),
        width: usize::from(side),
        height: usize::from(side),
        classes: spec.classes(),
        embedding: 64,
    };
    let mut weights = Weights::init(&config, 11).unwrap();
    let mut random = Lcg(1);
    for slot in weights.slots().to_vec() {
        for value in &mut weights.values_mut()[slot.range] {
            match slot.role {
                Role::Matrix => {}
                Role::Offset | Role::RunningMean => *value = 0.4 * random.unit() - 0.2,
                Role::Scale | Role::RunningVar => *value = 0.5 + random.unit(),
            }
        }
    }
    let record = weights.to_record().unwrap();
    let onnx = export::to_onnx(&config, &record).unwrap();
    Package { record, onnx, spec }
}

/// Knuth's linear congruential generator, enough to fill a test image.
struct Lcg(u64);

impl Lcg {
    fn byte(&mut self) -> u8 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 56) as u8
    }

    fn unit(&mut self) -> f32 {
        f32::from(self.byte()) / 255.0
    }
}

fn answer(plan: &mut dyn Plan, input: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut logits = vec![0.0; plan.classes()];
    let mut embedding = vec![0.0; plan.embedding_dim()];
    let mut output = Output {
        logits: &mut logits,
        embedding: &mut embedding,
        heads: &mut [],
    };
    plan.run(input, &mut output).unwrap();
    (logits, embedding)
}

#[test]
fn every_engine_gives_the_same_answers() {
    for (channels, side) in [(3, 32), (1, 28), (3, 64)] {
        let package = package(channels, side);
        let mut plans: Vec<_> = engines::here()
            .into_iter()
            .map(|kind| load(kind, &package.bytes()).unwrap())
            .collect();
        let mut random = Lcg(7);
        let mut distinct = Vec::new();
        for _ in 0..32 {
            let pixels: Vec<u8> = (0..40 * 36 * 3).map(|_| random.byte()).collect();
            let frame = Frame {
                pixels: &pixels,
                width: 40,
                height: 36,
                channels: 3,
            };
            let mut input = vec![0.0; package.spec.input.len()];
            preprocess(&frame, &package.spec.input, &mut input).unwrap();
            let (logits, embedding) = answer(&mut *plans[0], &input);
            assert_eq!(logits.len(), 5);
            assert!(embedding.iter().any(|value| *value > 0.0));
            for plan in &mut plans[1..] {
                let other = answer(&mut **plan, &input);
                let pairs = logits.iter().zip(&other.0);
                for (a, b) in pairs.chain(embedding.iter().zip(&other.1)) {
                    assert!((a - b).abs() < TOLERANCE, "{}: {a} and {b}", plan.kind());
                }
            }
            distinct.push(logits);
        }
        // Equal answers to everything would also agree between engines.
        assert!(distinct.windows(2).any(|pair| pair[0] != pair[1]));
    }
}

#[test]
fn running_in_place_is_running() {
    let package = package(3, 32);
    let input: Vec<f32> = {
        let mut random = Lcg(5);
        (0..package.spec.input.len())
            .map(|_| random.unit())
            .collect()
    };
    for kind in engines::here() {
        let mut plan = load(kind, &package.bytes()).unwrap();
        let wanted = answer(&mut *plan, &input);
        // Another input in between, so that nothing is left from the first run.
        plan.input_mut().fill(0.5);
        let mut logits = vec![0.0; plan.classes()];
        let mut embedding = vec![0.0; plan.embedding_dim()];
        let mut output = Output {
            logits: &mut logits,
            heads: &mut [],
            embedding: &mut embedding,
        };
        plan.run_in_place(&mut output).unwrap();
        assert!(plan.input_mut().iter().all(|value| *value == 0.5), "{kind}");
        plan.input_mut().copy_from_slice(&input);
        plan.run_in_place(&mut output).unwrap();
        assert_eq!((logits, embedding), wanted, "{kind}");
        // Profiling leaves the plan as it was.
        let costs = plan.profile(3).unwrap();
        assert_eq!(kind == EngineKind::Tract, !costs.is_empty());
        assert_eq!(answer(&mut *plan, &input), wanted, "{kind}");
    }
}

#[test]
fn a_bare_onnx_file_says_what_it_takes_and_gives() {
    let package = package(3, 64);
    let bare = describe(&package.onnx).unwrap();
    assert_eq!((bare.channels, bare.height, bare.width), (3, 64, 64));
    assert_eq!((bare.classes, bare.embedding), (5, 64));
    assert!(describe(&package.onnx[..100]).is_err());
    assert!(describe(b"").is_err());
}

#[test]
fn damaged_models_are_errors_that_name_the_engine() {
    let package = package(3, 32);
    for kind in engines::here() {
        let whole = match kind {
            EngineKind::Tract | EngineKind::Ort => &package.onnx,
            _ => &package.record,
        };
        for cut in [1, 7, 64, whole.len() / 3, whole.len() / 2, whole.len() - 1] {
            let bytes = ModelBytes {
                onnx: &package.onnx[..cut.min(package.onnx.len())],
                record: &package.record[..cut.min(package.record.len())],
                spec: &package.spec,
            };
            let error = load(kind, &bytes).err();
            assert!(
                matches!(&error, Some(EngineError::Load { engine, .. }) if *engine == kind.name()),
                "{kind} cut at {cut}: {error:?}"
            );
        }
        let empty = ModelBytes {
            onnx: &[],
            record: &[],
            spec: &package.spec,
        };
        assert!(matches!(
            load(kind, &empty).err(),
            Some(EngineError::NoForm { .. })
        ));
    }
}

#[test]
fn a_spec_that_does_not_fit_the_model_is_refused() {
    let package = package(3, 32);
    let specs = [
        ModelSpec {
            labels: "only\ntwo",
            ..package.spec
        },
        ModelSpec {
            embedding: 32,
            ..package.spec
        },
        ModelSpec {
            input: InputSpec {
                width: 40,
                ..package.spec.input
            },
            ..package.spec
        },
        ModelSpec {
            input: InputSpec {
                channels: 1,
                ..package.spec.input
            },
            ..package.spec
        },
    ];
    for kind in engines::here() {
        for spec in &specs {
            let bytes = ModelBytes {
                spec,
                ..package.bytes()
            };
            let error = load(kind, &bytes).err();
            assert!(
                matches!(error, Some(EngineError::Load { .. })),
                "{kind} accepted {spec:?}"
            );
        }
    }
}

#[test]
fn buffers_of_the_wrong_length_are_named() {
    let package = package(1, 28);
    for kind in engines::here() {
        let mut plan = load(kind, &package.bytes()).unwrap();
        let input = vec![0.0; plan.input_len()];
        for (input_len, logits, embedding, named) in [
            (input.len() - 1, 5, 64, "input"),
            (input.len(), 4, 64, "logits"),
            (input.len(), 5, 65, "embedding"),
        ] {
            let mut output = Output {
                logits: &mut vec![0.0; logits],
                embedding: &mut vec![0.0; embedding],
                heads: &mut [],
            };
            let error = plan.run(&input[..input_len], &mut output).unwrap_err();
            assert!(matches!(error, EngineError::Buffer { what, .. } if what == named));
        }
    }
}

#[test]
fn an_input_that_overflows_is_an_error_not_an_answer() {
    let package = package(1, 28);
    for kind in engines::here() {
        let mut plan = load(kind, &package.bytes()).unwrap();
        let input = vec![f32::NAN; plan.input_len()];
        let mut output = Output {
            logits: &mut [0.0; 5],
            embedding: &mut [0.0; 64],
            heads: &mut [],
        };
        // A ReLU may swallow NaN (max(NaN, 0) is 0), so a finite answer is allowed; a NaN is not.
        if plan.run(&input, &mut output).is_ok() {
            assert!(output.logits.iter().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn names_parse_and_unknown_ones_list_the_choices() {
    for &kind in EngineKind::ALL {
        assert_eq!(kind.name().parse::<EngineKind>().unwrap(), kind);
    }
    assert_eq!("burn".parse::<EngineKind>().unwrap(), EngineKind::BurnFlex);
    let error = "caffe".parse::<EngineKind>().unwrap_err().to_string();
    assert!(
        error.contains("caffe") && error.contains("tract"),
        "{error}"
    );
    if !onnx_runtime::BUILT {
        let error = "ort".parse::<EngineKind>().unwrap_err().to_string();
        assert!(error.contains("--features ort"), "{error}");
        // Whoever gets there by other ways is told as well.
        for error in [
            onnx_runtime::open(None).unwrap_err(),
            load(EngineKind::Ort, &package(1, 28).bytes())
                .err()
                .unwrap(),
        ] {
            assert!(error.to_string().contains("--features ort"), "{error}");
        }
    }
}
