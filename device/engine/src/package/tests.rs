use super::*;
use flywheel_shared::spec::{
    Activation, BoxCode, ClassOutput, Colour, Confidence, Detector, GridHead, Head, Layout,
    MAX_LEVELS, PriorLevel, Priors, Scale, SsdHead,
};

fn package(task: Task) -> Package {
    let classes = matches!(task, Task::Classify(_) | Task::Detect(_));
    Package {
        name: "signs".to_owned(),
        arch: String::new(),
        labels: if classes { "stop\nyield" } else { "" }.to_owned(),
        input: InputSpec {
            mean: [104.0, 117.0, 123.68],
            std: [1.0, 0.1, 57.375],
            layout: Layout::Nhwc,
            colour: Colour::Bgr,
            scale: Scale::Byte,
            ..InputSpec::new(64, 32, 3)
        },
        input_name: "data".to_owned(),
        task,
        outputs: vec!["a".to_owned(), "b".to_owned()],
        embedding_name: "features".to_owned(),
        embedding: 16,
        onnx: vec![1, 2, 3],
        record: Vec::new(),
        scores: vec![4, 5],
        golden: vec![GoldenInput {
            pixels: (0..64 * 32 * 3).map(|i| (i % 251) as u8).collect(),
            answer: vec![0.5, -1.25e-3],
        }],
        tolerance: 1e-3,
    }
}

fn tasks() -> Vec<Task> {
    let detect = |head| {
        Task::Detect(Detector {
            head,
            threshold: 0.7,
            overlap: 0.3,
        })
    };
    let mut levels = [PriorLevel::NONE; MAX_LEVELS];
    levels[0] = PriorLevel {
        stride: 8,
        sizes: [10, 16, 0, 0],
    };
    vec![
        Task::Classify(ClassOutput::Logits),
        Task::Classify(ClassOutput::Probabilities),
        Task::Anomaly(flywheel_shared::spec::AnomalyOutput::Score),
        Task::Anomaly(flywheel_shared::spec::AnomalyOutput::Reconstruction),
        Task::Embed,
        detect(Head::Yolo { candidates: 42 }),
        detect(Head::Grid(GridHead {
            strides: [8, 16, 0, 0, 0],
            points: 5,
            activation: Activation::Done,
            confidence: Confidence::GeometricMean,
        })),
        detect(Head::Ssd(SsdHead {
            candidates: 9,
            background: true,
            activation: Activation::Softmax,
            boxes: BoxCode::Corners,
        })),
        detect(Head::Ssd(SsdHead {
            candidates: 64,
            background: false,
            activation: Activation::Sigmoid,
            boxes: BoxCode::Offsets(Priors {
                variance: [0.1, 0.2],
                levels,
            }),
        })),
    ]
}

#[test]
fn what_is_written_is_read_again_for_every_task() {
    for task in tasks() {
        let dir = tempfile::tempdir().unwrap();
        let package = package(task);
        package.write(dir.path()).unwrap();
        assert_eq!(Package::read(dir.path()).unwrap(), package);
        let again = package.write(dir.path()).unwrap_err().to_string();
        assert!(
            again.contains("model.toml") && again.contains("already"),
            "{again}"
        );
    }
}

#[test]
fn every_mistake_names_the_file_and_the_key() {
    let dir = tempfile::tempdir().unwrap();
    package(tasks()[8]).write(dir.path()).unwrap();
    let path = dir.path().join(MANIFEST);
    let good = fs::read_to_string(&path).unwrap();
    for (from, to, names) in [
        ("format = 1", "format = 7", "format"),
        ("task = \"detect\"", "task = \"find\"", "find"),
        ("task = \"detect\"", "task = \"classify\"", "output.meaning"),
        ("width = 64", "width = 0", "input.width"),
        ("width = 64", "widht = 64", "widht"),
        ("colour = \"bgr\"", "colour = \"grey\"", "input.mean"),
        ("std = [1.0,", "std = [0.0,", "input.std"),
        ("stride = 8", "stride = 0", "detector.priors[0]"),
        ("candidates = 64", "candidates = 63", "detector"),
        ("threshold = 0.7", "threshold = 1.5", "threshold"),
        ("variance", "varianz", "varianz"),
        ("\"yield\"", "\"stop\"", "labels"),
        ("\"model.onnx\"", "\"../model.onnx\"", "form[0]"),
        ("\"scores.bin\"", "\"golden/0.f32\"", "scores"),
        ("\"golden/0.png\"", "\"golden/1.png\"", "golden/1.png"),
    ] {
        assert!(good.contains(from), "{from} is not in\n{good}");
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let error = Package::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains(names), "{to}: {error}");
    }
    fs::write(&path, &good).unwrap();
    fs::write(dir.path().join("model.onnx"), [1, 2, 4]).unwrap();
    let error = Package::read(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("form[0]") && error.contains("digest"),
        "{error}"
    );
    let nowhere = Package::read(&dir.path().join("golden")).unwrap_err();
    assert!(nowhere.to_string().contains(MANIFEST));
}
