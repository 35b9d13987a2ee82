//! A model package as a folder: the ONNX file, score parameters, golden inputs, and a `model.toml`
//! that says what they mean, for people to read and to mend.
//!
//! The same things travel to devices as the parts of a signed manifest; this folder is what stands
//! before that, on the disk of whoever imports, measures or publishes a model. It is read
//! strictly: an unknown key, a missing file or a digest that does not fit is an error that names
//! the file and the key.

use std::fs;
use std::path::{Component, Path, PathBuf};

use flywheel_shared::ids::Digest;
use flywheel_shared::spec::{InputSpec, ModelSpec, Task};
use image::{DynamicImage, ExtendedColorType, ImageEncoder, ImageFormat};
use thiserror::Error;

use crate::engine::{EngineError, ModelBytes, Output, Plan};
use crate::{Frame, InputError, preprocess};

mod manifest;

use manifest::{File, Form, FormKind, GoldenTable, Manifest};

/// Name of the file that describes the package.
pub const MANIFEST: &str = "model.toml";
const ONNX: &str = "model.onnx";
const SCORES: &str = "scores.bin";

/// Why a package can't be read, written or proved.
#[derive(Debug, Error)]
pub enum PackageError {
    /// The disk refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The description is not understood; the message names line and key.
    #[error("{path}: {problem}")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file is not the one that the description names.
    #[error("{path}: {key}: {problem}")]
    Key {
        /// The description.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A golden input does not fit the model.
    #[error("golden input {index}: {source}")]
    Input {
        /// Which one.
        index: usize,
        /// Why.
        source: InputError,
    },
    /// The engine fails on a golden input.
    #[error("golden input {index}: {source}")]
    Engine {
        /// Which one.
        index: usize,
        /// Why.
        source: EngineError,
    },
    /// An answer is further off than the package allows.
    #[error(
        "golden input {index}: value {value} is {found}, the package says {expected} ± {tolerance}"
    )]
    Golden {
        /// Which input.
        index: usize,
        /// Which value of the answer.
        value: usize,
        /// What the engine gave.
        found: f32,
        /// What it must be.
        expected: f32,
        /// How far it may be off.
        tolerance: f32,
    },
}

/// A picture with the answer that the model must give.
#[derive(Clone, Debug, PartialEq)]
pub struct GoldenInput {
    /// u8, HWC, of the input's size and channels.
    pub pixels: Vec<u8>,
    /// Class scores; head values for a task without them; the embedding if there are no others.
    pub answer: Vec<f32>,
}

/// A model with everything that is needed to run and to judge it.
#[derive(Clone, Debug, PartialEq)]
pub struct Package {
    /// Name of the model, for people.
    pub name: String,
    /// The architecture of `record`; empty without one.
    pub arch: String,
    /// Class names, separated by newlines.
    pub labels: String,
    /// What the input tensor holds.
    pub input: InputSpec,
    /// Name of the input tensor in the ONNX file.
    pub input_name: String,
    /// What the outputs mean.
    pub task: Task,
    /// Names of the output tensors in the ONNX file, without the embedding.
    pub outputs: Vec<String>,
    /// Name of the embedding's tensor; empty without one.
    pub embedding_name: String,
    /// Number of values of the embedding; 0 without one.
    pub embedding: u16,
    /// The ONNX file.
    pub onnx: Vec<u8>,
    /// The burnpack record; empty if there is none.
    pub record: Vec<u8>,
    /// Score parameters as `device-core` reads them; empty if there are none.
    pub scores: Vec<u8>,
    /// Golden inputs.
    pub golden: Vec<GoldenInput>,
    /// How far an answer may be off the golden one.
    pub tolerance: f32,
}

impl Package {
    /// What the model takes and gives.
    pub fn spec(&self) -> ModelSpec<'_> {
        ModelSpec {
            arch: &self.arch,
            labels: &self.labels,
            input: self.input,
            embedding: self.embedding,
            task: self.task,
        }
    }

    /// The forms that engines load; `spec` is [`Self::spec`].
    pub fn bytes<'a>(&'a self, spec: &'a ModelSpec<'a>) -> ModelBytes<'a> {
        ModelBytes {
            onnx: &self.onnx,
            record: &self.record,
            spec,
        }
    }

    /// Runs the golden inputs through a plan of this model; returns the largest difference.
    ///
    /// # Errors
    /// [`PackageError::Golden`] for an answer that is off, or what stops the engine.
    pub fn prove(&self, plan: &mut dyn Plan) -> Result<f32, PackageError> {
        let mut worst = 0.0f32;
        for (index, golden) in self.golden.iter().enumerate() {
            let found = answer(plan, &self.input, &golden.pixels, index)?;
            if found.len() != golden.answer.len() {
                return Err(PackageError::Golden {
                    index,
                    value: found.len().min(golden.answer.len()),
                    found: f32::NAN,
                    expected: f32::NAN,
                    tolerance: self.tolerance,
                });
            }
            for (value, (found, expected)) in found.iter().zip(&golden.answer).enumerate() {
                let off = (found - expected).abs();
                // Written so that NaN fails.
                let close = off <= self.tolerance;
                if !close {
                    return Err(PackageError::Golden {
                        index,
                        value,
                        found: *found,
                        expected: *expected,
                        tolerance: self.tolerance,
                    });
                }
                worst = worst.max(off);
            }
        }
        Ok(worst)
    }

    /// Reads the package in a folder.
    ///
    /// # Errors
    /// [`PackageError`], naming the file and the key.
    pub fn read(dir: &Path) -> Result<Self, PackageError> {
        let path = dir.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(io(&path))?;
        let manifest: Manifest = toml::from_str(&text).map_err(|error| PackageError::Manifest {
            path: path.clone(),
            problem: error.to_string().trim_end().to_owned(),
        })?;
        let reader = Reader { dir, path: &path };
        let mut package = manifest
            .package()
            .map_err(|(key, problem)| reader.key(&key, problem))?;
        for (index, form) in manifest.form.iter().enumerate() {
            let key = format!("form[{index}]");
            let place = match form.kind {
                FormKind::Onnx => &mut package.onnx,
                FormKind::Burnpack => &mut package.record,
            };
            if !place.is_empty() {
                return Err(reader.key(&key, "there is another form of this kind".to_owned()));
            }
            *place = reader.file(&key, &form.file)?;
        }
        if let Some(scores) = &manifest.scores {
            package.scores = reader.file("scores", scores)?;
        }
        if let Some(golden) = &manifest.golden {
            package.tolerance = golden.tolerance;
            if golden.pictures.len() != golden.answers.len() {
                return Err(reader.key(
                    "golden",
                    format!(
                        "there are {} pictures and {} answers",
                        golden.pictures.len(),
                        golden.answers.len()
                    ),
                ));
            }
            let pairs = golden.pictures.iter().zip(&golden.answers);
            for (index, (picture, answer)) in pairs.enumerate() {
                let key = format!("golden.pictures[{index}]");
                let pixels = pixels_of(&reader.file(&key, picture)?, &package.input)
                    .map_err(|problem| reader.key(&key, problem))?;
                let key = format!("golden.answers[{index}]");
                let bytes = reader.file(&key, answer)?;
                if bytes.len() % 4 != 0 {
                    return Err(reader.key(&key, "it does not hold whole f32 values".to_owned()));
                }
                let answer = bytes
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect();
                package.golden.push(GoldenInput { pixels, answer });
            }
        }
        Ok(package)
    }

    /// Writes the package into a folder, which must not hold one.
    ///
    /// # Errors
    /// [`PackageError`], naming the file.
    pub fn write(&self, dir: &Path) -> Result<(), PackageError> {
        let path = dir.join(MANIFEST);
        if path.exists() {
            return Err(PackageError::Manifest {
                path,
                problem: "there is a package already; name another folder, or remove it".to_owned(),
            });
        }
        let golden_dir = dir.join("golden");
        fs::create_dir_all(&golden_dir).map_err(io(&golden_dir))?;
        let store = |name: &str, bytes: &[u8]| -> Result<File, PackageError> {
            let path = dir.join(name);
            fs::write(&path, bytes).map_err(io(&path))?;
            Ok(File {
                path: name.to_owned(),
                sha256: Digest::of(bytes).to_string(),
            })
        };
        let mut form = Vec::new();
        for (kind, name, bytes) in [
            (FormKind::Onnx, ONNX, &self.onnx),
            (FormKind::Burnpack, "model.bpk", &self.record),
        ] {
            if !bytes.is_empty() {
                form.push(Form {
                    kind,
                    file: store(name, bytes)?,
                });
            }
        }
        let scores = match self.scores.as_slice() {
            [] => None,
            bytes => Some(store(SCORES, bytes)?),
        };
        let mut golden = GoldenTable {
            tolerance: self.tolerance,
            pictures: Vec::new(),
            answers: Vec::new(),
        };
        for (index, input) in self.golden.iter().enumerate() {
            let picture =
                png_of(&input.pixels, &self.input).map_err(|problem| PackageError::Manifest {
                    path: golden_dir.clone(),
                    problem,
                })?;
            golden
                .pictures
                .push(store(&format!("golden/{index}.png"), &picture)?);
            let bytes: Vec<u8> = input.answer.iter().flat_map(|v| v.to_le_bytes()).collect();
            golden
                .answers
                .push(store(&format!("golden/{index}.f32"), &bytes)?);
        }
        let manifest = Manifest::of(self, form, scores, golden);
        let text = toml::to_string(&manifest).map_err(|error| PackageError::Manifest {
            path: path.clone(),
            problem: error.to_string(),
        })?;
        // Last, so that a folder with a description is whole.
        fs::write(&path, text).map_err(io(&path))
    }
}

/// What golden inputs are compared by, for one picture of the input's size.
///
/// # Errors
/// [`PackageError::Input`] or [`PackageError::Engine`], with `index`.
pub fn answer(
    plan: &mut dyn Plan,
    spec: &InputSpec,
    pixels: &[u8],
    index: usize,
) -> Result<Vec<f32>, PackageError> {
    let frame = Frame {
        pixels,
        width: u32::from(spec.width),
        height: u32::from(spec.height),
        channels: spec.channels,
    };
    let mut input = vec![0.0; spec.len()];
    preprocess(&frame, spec, &mut input).map_err(|source| PackageError::Input { index, source })?;
    let mut logits = vec![0.0; plan.classes()];
    let mut heads = vec![0.0; plan.heads_len()];
    let mut embedding = vec![0.0; plan.embedding_dim()];
    plan.run(
        &input,
        &mut Output {
            logits: &mut logits,
            heads: &mut heads,
            embedding: &mut embedding,
        },
    )
    .map_err(|source| PackageError::Engine { index, source })?;
    let first = [logits, heads, embedding];
    Ok(first
        .into_iter()
        .find(|values| !values.is_empty())
        .unwrap_or_default())
}

struct Reader<'a> {
    dir: &'a Path,
    path: &'a Path,
}

impl Reader<'_> {
    fn key(&self, key: &str, problem: String) -> PackageError {
        PackageError::Key {
            path: self.path.to_owned(),
            key: key.to_owned(),
            problem,
        }
    }

    /// The bytes of a file, checked against its digest.
    fn file(&self, key: &str, file: &File) -> Result<Vec<u8>, PackageError> {
        let name = Path::new(&file.path);
        let inside = name
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if !inside || file.path.is_empty() {
            return Err(self.key(
                key,
                format!("{:?} is not a file inside the package", file.path),
            ));
        }
        let wanted: Digest = file
            .sha256
            .parse()
            .map_err(|_| self.key(key, "sha256 is not 64 hexadecimal digits".to_owned()))?;
        let path = self.dir.join(name);
        let bytes = fs::read(&path).map_err(io(&path))?;
        let found = Digest::of(&bytes);
        if found != wanted {
            return Err(self.key(
                key,
                format!(
                    "{} has digest {found}, not {wanted}; import the model again",
                    file.path
                ),
            ));
        }
        Ok(bytes)
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> PackageError {
    let path = path.to_owned();
    move |source| PackageError::Io { path, source }
}

/// Decodes a picture that must have the input's size and channels.
fn pixels_of(bytes: &[u8], input: &InputSpec) -> Result<Vec<u8>, String> {
    let picture = image::load_from_memory_with_format(bytes, ImageFormat::Png)
        .map_err(|error| error.to_string())?;
    let (width, height) = (u32::from(input.width), u32::from(input.height));
    if (picture.width(), picture.height()) != (width, height) {
        return Err(format!(
            "the picture is {}×{}, the input {width}×{height}",
            picture.width(),
            picture.height()
        ));
    }
    match (input.channels, picture) {
        (1, DynamicImage::ImageLuma8(grey)) => Ok(grey.into_raw()),
        (3, DynamicImage::ImageRgb8(colour)) => Ok(colour.into_raw()),
        (channels, _) => Err(format!(
            "the picture does not have {channels} channels of 8 bits"
        )),
    }
}

fn png_of(pixels: &[u8], input: &InputSpec) -> Result<Vec<u8>, String> {
    let colour = match input.channels {
        1 => ExtendedColorType::L8,
        _ => ExtendedColorType::Rgb8,
    };
    if pixels.len() != input.len() {
        return Err(format!(
            "a golden picture has {} bytes, the input {}",
            pixels.len(),
            input.len()
        ));
    }
    let mut out = Vec::new();
    image::codecs::png::PngEncoder::new(&mut out)
        .write_image(
            pixels,
            u32::from(input.width),
            u32::from(input.height),
            colour,
        )
        .map_err(|error| error.to_string())?;
    Ok(out)
}

#[cfg(test)]
mod tests;
