//! The model that is measured: what `flywheel model import` wrote, the parts of a device's package, a
//! bare ONNX file, or an untrained network of the built-in architecture.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use device_core::params::{Params, Shape};
use device_engine::package::{self, answer};
use device_engine::{EngineKind, InputSpec, ModelBytes, ModelSpec, describe, load};
use flywheel_models::{ARCH, NetConfig, Weights, export, sim};
use flywheel_shared::spec::{ClassOutput, Golden, Task};
use flywheel_shared::trust::PartKind;

use crate::models::Package;
use crate::wire;

/// Golden inputs that are made where a model comes without.
const GOLDEN_FRAMES: usize = 4;
/// Prototypes of a calibrated model at most, in all and of a class.
const PROTOTYPES: u16 = 256;
const PROTOTYPES_EACH: u16 = 20;
/// Knots of the score tables that are made where a model comes without.
const TABLE: u16 = 64;

/// Opens a folder with a `model.toml` or with parts, an ONNX file (an image classifier, run as it
/// is), or, with `None`, the built-in network. Signatures are not checked, since nothing is
/// installed. What is missing is made up, so that every stage has work: a spec from the ONNX file
/// (pixels scaled to 0..1), neutral score parameters, and golden answers from the first engine that
/// loads the model.
///
/// # Errors
/// In words that name the file.
pub fn open(path: Option<&Path>) -> Result<Package> {
    let parts = match path {
        None => built_in()?,
        Some(path) if path.join("model.toml").is_file() => described(path)?,
        Some(path) if path.is_dir() => Package::parts_in(path)?,
        Some(path) => {
            let onnx = fs::read(path)
                .with_context(|| format!("--model {}: cannot read", path.display()))?;
            BTreeMap::from([(PartKind::Onnx, onnx)])
        }
    };
    let from = path.map_or_else(|| "built-in".into(), Path::to_string_lossy);
    complete(parts).with_context(|| format!("--model {from}"))
}

/// The spec of a package that [`open`] gave.
///
/// # Errors
/// If it does not decode.
pub fn spec(package: &Package) -> Result<ModelSpec<'_>> {
    postcard::from_bytes(package.part(PartKind::Spec)).context("its spec.bin does not decode")
}

/// The parts of a package with a description.
fn described(folder: &Path) -> Result<BTreeMap<PartKind, Vec<u8>>> {
    let package = package::Package::read(folder)?;
    let mut parts: BTreeMap<_, _> = package.parts()?.into_iter().collect();
    if package.golden.is_empty() {
        // `complete` makes some.
        parts.remove(&PartKind::Golden);
    }
    Ok(parts)
}

fn built_in() -> Result<BTreeMap<PartKind, Vec<u8>>> {
    let input = InputSpec {
        mean: [0.5; 3],
        std: [0.25; 3],
        ..InputSpec::new(32, 32, 3)
    };
    let labels = sim::CLASSES.join("\n");
    let spec = ModelSpec {
        arch: ARCH,
        labels: &labels,
        input,
        embedding: 64,
        task: Task::Classify(ClassOutput::Logits),
    };
    let config = NetConfig {
        channels: 3,
        width: 32,
        height: 32,
        classes: sim::CLASSES.len(),
        embedding: 64,
    };
    let record = Weights::init(&config, 1)?.to_record()?;
    Ok(BTreeMap::from([
        (PartKind::Onnx, export::to_onnx(&config, &record)?),
        (PartKind::BurnRecord, record),
        (PartKind::Spec, wire::bytes(&spec)),
    ]))
}

fn complete(mut parts: BTreeMap<PartKind, Vec<u8>>) -> Result<Package> {
    if !parts.contains_key(&PartKind::Spec) {
        let Some(onnx) = parts.get(&PartKind::Onnx) else {
            bail!("holds neither spec.bin nor model.onnx; give a package's folder or an ONNX file");
        };
        let bare = describe(onnx)?;
        let labels: Vec<String> = (0..bare.classes).map(|class| class.to_string()).collect();
        let spec = wire::bytes(&ModelSpec {
            arch: "",
            labels: &labels.join("\n"),
            input: InputSpec::new(bare.width, bare.height, bare.channels),
            embedding: bare.embedding,
            task: Task::Classify(ClassOutput::Logits),
        });
        parts.insert(PartKind::Spec, spec);
    }
    let spec_bytes = parts[&PartKind::Spec].clone();
    let spec: ModelSpec<'_> =
        postcard::from_bytes(&spec_bytes).context("its spec.bin does not decode")?;
    if let Entry::Vacant(place) = parts.entry(PartKind::Scores) {
        place.insert(neutral_scores(&spec)?);
    }
    if !parts.contains_key(&PartKind::Golden) {
        let part = |kind| parts.get(&kind).map_or(&[][..], Vec::as_slice);
        let golden = golden(&ModelBytes {
            onnx: part(PartKind::Onnx),
            record: part(PartKind::BurnRecord),
            spec: &spec,
        })?;
        parts.insert(PartKind::Golden, golden);
    }
    Ok(Package::unsigned(parts))
}

/// Score parameters that know nothing but cost what real ones cost: every class has a mean and
/// prototypes.
fn neutral_scores(spec: &ModelSpec<'_>) -> Result<Vec<u8>> {
    let classes = u16::try_from(spec.classes().max(1)).context("too many classes")?;
    let mut shape = Shape::plain(classes, spec.embedding, TABLE);
    if spec.embedding > 0 {
        shape.prototypes = classes.saturating_mul(PROTOTYPES_EACH).min(PROTOTYPES);
    }
    let shape = shape.check()?;
    let layout = shape.layout();
    let mut values = vec![0.0; shape.values()];
    values[layout.temperature] = 1.0;
    values[layout.calibrated] = 1000.0;
    values[layout.counts].fill(100.0);
    for whitening in [layout.within, layout.background] {
        let mut diagonal = whitening.start;
        for row in 0..usize::from(shape.dim) {
            values[diagonal] = 1.0;
            diagonal += row + 2;
        }
    }
    let dim = usize::from(shape.dim);
    for (i, at) in layout.prototypes.step_by(dim.max(1)).enumerate() {
        values[at + i % dim] = 1.0;
    }
    for (table, low, high) in [
        (layout.unsure, -1.0, 0.0),
        (layout.novel, -10.0, 10.0),
        (layout.near, 0.0, 2.0),
        (layout.fused, 0.0, 2.0),
    ] {
        let last = table.len().saturating_sub(1) as f32;
        for (i, knot) in values[table].iter_mut().enumerate() {
            *knot = low + (high - low) * i as f32 / last;
        }
    }
    let mut bytes = vec![0; shape.encoded_len()];
    Params::checked(shape, &values)?.encode(&mut bytes)?;
    Ok(bytes)
}

/// Noise, with the answers of the first engine that loads the model.
fn golden(model: &ModelBytes<'_>) -> Result<Vec<u8>> {
    let mut plan = Err(None);
    for &kind in EngineKind::ALL {
        match load(kind, model) {
            Ok(loaded) => {
                plan = Ok(loaded);
                break;
            }
            Err(error) => plan = plan.map_err(|first| first.or(Some(error))),
        }
    }
    let mut plan = match plan {
        Ok(plan) => plan,
        Err(Some(error)) => return Err(error.into()),
        Err(None) => bail!("this build has no engine"),
    };
    let input = &model.spec.input;
    // Knuth's linear congruential generator: any input does, as long as it is always the same.
    let mut state = 1u64;
    let frames: Vec<u8> = (0..GOLDEN_FRAMES * input.len())
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect();
    let mut answers = Vec::new();
    let mut largest = 1.0f32;
    for (index, pixels) in frames.chunks_exact(input.len()).enumerate() {
        for value in answer(&mut *plan, input, pixels, index)? {
            answers.extend(value.to_le_bytes());
            largest = largest.max(value.abs());
        }
    }
    Ok(wire::bytes(&Golden {
        width: input.width,
        height: input.height,
        channels: input.channels,
        frames: &frames,
        logits: &answers,
        tolerance: 1e-3 * largest,
    }))
}
