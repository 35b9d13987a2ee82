//! Models that nobody here made, imported as a user would and checked against ONNX Runtime's
//! answers and published figures; each test is skipped, saying so, where the data is absent.

use std::path::Path;

use device_core::detect::{CANDIDATES, Detection, decode};
use device_engine::import::{Imported, Options, import};
use device_engine::package::Package;
use device_engine::{EngineKind, Frame, ModelSpec, Output, Plan, Task, load, preprocess};
use flywheel_shared::spec::{Colour, Scale};

mod data;
mod engines;

/// How far an answer may be from ONNX Runtime's with its optimisations off; ONNX Runtime with
/// them on is off by up to 1.5e-4.
const NEAR: f32 = 2e-4;

fn imported(path: &Path, options: Options) -> Imported {
    let onnx = std::fs::read(path).unwrap();
    let imported = import(&onnx, &options).unwrap();
    // What is written is what was made.
    let dir = tempfile::tempdir().unwrap();
    imported.package.write(dir.path()).unwrap();
    assert_eq!(Package::read(dir.path()).unwrap(), imported.package);
    imported
}

/// A loaded package with its buffers.
struct Model {
    plan: Box<dyn Plan>,
    package: Package,
    logits: Vec<f32>,
    heads: Vec<f32>,
    embedding: Vec<f32>,
}

impl Model {
    fn load(package: Package) -> Self {
        let spec: ModelSpec<'_> = package.spec();
        let mut plan = load(EngineKind::Tract, &package.bytes(&spec)).unwrap();
        assert!(package.golden.len() >= 2);
        assert!(package.prove(&mut *plan).unwrap() <= package.tolerance);
        for kind in engines::of_onnx() {
            let mut plan = load(kind, &package.bytes(&spec)).unwrap();
            let off = package.prove(&mut *plan).unwrap();
            eprintln!("golden inputs by {kind}: off by {off:e}");
        }
        Self {
            logits: vec![0.0; plan.classes()],
            heads: vec![0.0; plan.heads_len()],
            embedding: vec![0.0; plan.embedding_dim()],
            plan,
            package,
        }
    }

    fn tensor(&mut self, input: &[f32]) {
        self.plan
            .run(
                input,
                &mut Output {
                    logits: &mut self.logits,
                    heads: &mut self.heads,
                    embedding: &mut self.embedding,
                },
            )
            .unwrap();
    }

    fn frame(&mut self, frame: &Frame<'_>) {
        let mut input = vec![0.0; self.package.input.len()];
        preprocess(frame, &self.package.input, &mut input).unwrap();
        self.tensor(&input);
    }

    fn boxes(&mut self, frame: &Frame<'_>) -> Vec<Detection> {
        self.frame(frame);
        let Task::Detect(detector) = &self.package.task else {
            panic!("{:?} finds no boxes", self.package.task);
        };
        let mut list = vec![Detection::default(); CANDIDATES];
        let spec = self.package.spec();
        let source = (frame.width, frame.height);
        let found = decode(
            detector,
            &spec.input,
            spec.classes(),
            &self.heads,
            source,
            &mut list,
        )
        .unwrap();
        list.truncate(found.detections);
        list
    }
}

fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().zip(expected);
    pairs.fold(0.0, |worst, (a, b)| worst.max((a - b).abs()))
}

fn top(values: &[f32]) -> usize {
    let pairs = values.iter().enumerate();
    pairs
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map_or(0, |pair| pair.0)
}

#[test]
fn mnist_8_reads_digits_as_published() {
    let (Some(dir), Some(images)) = (
        data::find("models/libonnx/mnist_8"),
        data::find("mnist_idx"),
    ) else {
        return;
    };
    let imported = imported(
        &dir.join("model.onnx"),
        Options {
            scale: Some(Scale::Byte),
            ..Options::default()
        },
    );
    assert!(imported.notes.iter().any(|note| note.contains("--labels")));
    let package = imported.package;
    assert_eq!(package.embedding, 256);
    let mut model = Model::load(package);
    for set in 0..3 {
        let dir = dir.join(format!("test_data_set_{set}"));
        let floats = |name: &str, count: usize| -> Vec<f32> {
            let bytes = std::fs::read(dir.join(name)).unwrap();
            // A TensorProto ends with its raw data.
            bytes[bytes.len() - 4 * count..]
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect()
        };
        model.tensor(&floats("input_0.pb", 784));
        let expected = floats("output_0.pb", 10);
        // Its logits are in the thousands.
        assert!(worst(&model.logits, &expected) < 1e-2);
    }
    let (pixels, labels) = data::mnist_test(&images);
    let right = pixels
        .chunks_exact(784)
        .zip(&labels)
        .filter(|(pixels, label)| {
            model.frame(&Frame {
                pixels,
                width: 28,
                height: 28,
                channels: 1,
            });
            top(&model.logits) == usize::from(**label)
        })
        .count();
    eprintln!("mnist_8: {right} of {}", labels.len());
    assert_eq!(labels.len(), 10_000);
    assert!((9886..=9896).contains(&right), "{right}");
}

#[test]
fn resnet_2b_answers_as_onnx_runtime() {
    let (Some(path), Some(reference), Some(pictures)) = (
        data::find("models/vnncomp_cifar10/benchmarks/cifar10_resnet/onnx/resnet_2b.onnx"),
        data::find("ref_io/cifar_resnet_2b.npz"),
        data::find("cifar10_lossless"),
    ) else {
        return;
    };
    let package = imported(
        &path,
        Options {
            mean: vec![0.4914, 0.4822, 0.4465],
            std: vec![0.2471, 0.2435, 0.2616],
            ..Options::default()
        },
    )
    .package;
    assert_eq!(package.embedding, 100);
    let mut model = Model::load(package);
    let arrays = data::npz(&reference);
    let mut off = 0.0f32;
    for case in 0..32 {
        model.tensor(&arrays[&format!("case{case}/in/input.1")]);
        off = off.max(worst(&model.logits, &arrays[&format!("case{case}/out/33")]));
    }
    eprintln!("resnet_2b: off by {off:e} at most");
    assert!(off < NEAR);

    // A quarter of the pictures, one a row; 69.25 % are published for the whole test set.
    let labels = std::fs::read_to_string(pictures.join("labels.txt")).unwrap();
    let labels: Vec<&str> = labels.lines().take(1000).collect();
    let mut sheets: Vec<_> = std::fs::read_dir(&pictures)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "png"))
        .collect();
    sheets.sort();
    let sheet = data::picture(&sheets[0]);
    let right = sheet
        .pixels
        .chunks_exact(32 * 32 * 3)
        .zip(&labels)
        .filter(|(pixels, label)| {
            model.frame(&Frame {
                pixels,
                width: 32,
                height: 32,
                channels: 3,
            });
            label.trim() == top(&model.logits).to_string()
        })
        .count();
    eprintln!("resnet_2b: {right} of {}", labels.len());
    assert!((650..=740).contains(&right), "{right}");
}

#[test]
fn squeezenet_in_half_precision_knows_a_kitten() {
    let (Some(dir), Some(reference)) = (
        data::find("models/winml/SharedContent"),
        data::find("ref_io/squeezenet_fp16.npz"),
    ) else {
        return;
    };
    let imported = imported(
        &dir.join("models/SqueezeNet_fp16.onnx"),
        Options {
            scale: Some(Scale::Byte),
            colour: Some(Colour::Bgr),
            mean: vec![103.939, 116.779, 123.68],
            ..Options::default()
        },
    );
    assert!(imported.notes.iter().any(|note| note.contains("softmax")));
    assert!(imported.notes.iter().any(|note| note.contains("half")));
    let package = imported.package;
    // The last layer reads a map, which is averaged over space.
    assert_eq!(package.embedding, 512);
    let mut model = Model::load(package);
    let arrays = data::npz(&reference);
    for case in 0..2 {
        model.tensor(&arrays[&format!("case{case}/in/data_0")]);
        let mut probabilities = vec![0.0; 1000];
        device_core::score::softmax(&model.logits, 1.0, &mut probabilities);
        let expected = &arrays[&format!("case{case}/out/softmaxout_1")];
        let off = worst(&probabilities, expected);
        eprintln!("squeezenet: off by {off:e}");
        // Half precision has steps of 4.9e-4 near 1.
        assert!(off < 5e-4, "{off}");
    }
    let kitten = data::picture(&dir.join("media/kitten_224.png"));
    model.frame(&kitten.frame());
    let mut probabilities = vec![0.0; 1000];
    device_core::score::softmax(&model.logits, 1.0, &mut probabilities);
    assert_eq!(top(&probabilities), 281);
    eprintln!("squeezenet: kitten is 281 with {}", probabilities[281]);
    assert!((probabilities[281] - 0.94).abs() < 0.01);
}

/// Photographs with the faces that ONNX Runtime finds on them.
const PHOTOS: [(&str, usize); 4] = [("1.jpg", 44), ("11.jpg", 25), ("16.jpg", 9), ("6.jpg", 14)];

fn ultraface(dir: &Path) -> Model {
    let options = Options {
        labels: vec!["face".to_owned()],
        scale: Some(Scale::Byte),
        mean: vec![127.0],
        std: vec![128.0],
        threshold: Some(0.7),
        overlap: Some(0.5),
        ..Options::default()
    };
    let path = dir.join("models/onnx/version-RFB-320.onnx");
    let imported = imported(&path, options);
    assert!(
        imported
            .notes
            .iter()
            .any(|note| note.contains("4420 candidates, boxes as corners in shares")),
        "{:?}",
        imported.notes
    );
    Model::load(imported.package)
}

#[test]
fn ultraface_counts_the_faces_on_its_photographs() {
    let (Some(dir), Some(reference)) = (
        data::find("models/ultraface"),
        data::find("ref_io/ultraface_rfb320.npz"),
    ) else {
        return;
    };
    let mut model = ultraface(&dir);
    let arrays = data::npz(&reference);
    for case in 0..3 {
        model.tensor(&arrays[&format!("case{case}/in/input")]);
        let mut expected = arrays[&format!("case{case}/out/scores")].clone();
        expected.extend(&arrays[&format!("case{case}/out/boxes")]);
        assert!(worst(&model.heads, &expected) < NEAR);
    }
    for (name, faces) in PHOTOS {
        let photo = data::picture(&dir.join("imgs").join(name));
        let found = model.boxes(&photo.frame());
        eprintln!("ultraface: {name}: {} of {faces} faces", found.len());
        assert!(found.len().abs_diff(faces) * 10 <= faces, "{name}");
        for face in &found {
            let (width, height) = (face.right - face.left, face.bottom - face.top);
            assert!(face.right <= photo.width as f32 && face.bottom <= photo.height as f32);
            assert!(width > 4.0 && height > 4.0 && width / height < 2.0);
        }
    }
}

#[test]
fn yunet_answers_as_onnx_runtime_and_finds_the_same_faces() {
    let (Some(dir), Some(reference), Some(other)) = (
        data::find("models/yunet"),
        data::find("ref_io/yunet_n_320.npz"),
        data::find("models/ultraface"),
    ) else {
        return;
    };
    let options = Options {
        labels: vec!["face".to_owned()],
        scale: Some(Scale::Byte),
        colour: Some(Colour::Bgr),
        threshold: Some(0.6),
        overlap: Some(0.3),
        ..Options::default()
    };
    let package = imported(&dir.join("onnx/yunet_n_320_320.onnx"), options).package;
    assert_eq!(package.outputs.len(), 12);
    let mut model = Model::load(package);
    let arrays = data::npz(&reference);
    let mut off = 0.0f32;
    for case in 0..3 {
        model.tensor(&arrays[&format!("case{case}/in/input")]);
        let mut expected = Vec::new();
        for output in &model.package.outputs {
            expected.extend(&arrays[&format!("case{case}/out/{output}")]);
        }
        off = off.max(worst(&model.heads, &expected));
    }
    eprintln!("yunet: off by {off:e} at most");
    assert!(off < 5e-4);
    let mut ultraface = ultraface(&other);
    for (name, _) in &PHOTOS[2..] {
        let photo = data::picture(&other.join("imgs").join(name));
        let theirs = ultraface.boxes(&photo.frame());
        let ours = model.boxes(&photo.frame());
        let both = ours
            .iter()
            .filter(|face| theirs.iter().any(|other| other.overlap(face) > 0.3))
            .count();
        eprintln!(
            "yunet: {name}: {} faces, {both} of UltraFace's {}",
            ours.len(),
            theirs.len()
        );
        assert!(both * 10 >= theirs.len() * 7, "{name}");
        for face in &ours {
            // Eyes, nose and mouth lie in or at the box.
            let (w, h) = (face.right - face.left, face.bottom - face.top);
            for [x, y] in face.points {
                assert!(x > face.left - w / 2.0 && x < face.right + w / 2.0);
                assert!(y > face.top - h / 2.0 && y < face.bottom + h / 2.0);
            }
        }
    }
}
