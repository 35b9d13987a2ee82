//! From an ONNX file that somebody else made to a [`Package`]: what the file says is taken from
//! it, what a run on test patterns shows is inferred, and what neither tells is asked for, by the
//! name of the flag that answers it.

use flywheel_models::onnx::edit::{self, Node, Value};
use flywheel_shared::spec::{
    Activation, AnomalyOutput, ClassOutput, Colour, Confidence, InputSpec, Layout, PriorLevel,
    Scale, Task,
};
use thiserror::Error;

use crate::engine::{EngineError, EngineKind, load};
use crate::inspect::{Feature, Graph, Port, Probe};
use crate::package::{GoldenInput, Package, PackageError, answer};
use crate::preprocess::{InputError, resize};
use crate::{Frame, preprocess};

mod detector;
mod input;
mod pattern;

use input::{input_spec, one_input};

/// Most values of an embedding: score parameters hold two triangles of its square.
pub const MAX_EMBEDDING: usize = 1024;
/// Golden inputs that are drawn where no pictures are given.
const PATTERNS: u64 = 4;
/// Share of the largest answer that another engine may be off by.
const TOLERANCE: f32 = 1e-3;

/// What a model is for, as a flag says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// Class scores.
    Classify,
    /// Boxes.
    Detect,
    /// An anomaly score or a reconstruction.
    Anomaly,
    /// An embedding.
    Embed,
}

/// What the box values of an SSD-like head are, as a flag says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BoxKind {
    /// Shares of the picture.
    Corners,
    /// Pixels of the input.
    PixelCorners,
    /// Offsets from priors, which must be given.
    Offsets,
}

/// What the caller knows about the model; whatever is absent is inferred or asked for.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Name of the model.
    pub name: String,
    /// What it is for.
    pub task: Option<TaskKind>,
    /// Class names in the order of the class scores.
    pub labels: Vec<String>,
    /// The tensor to use as embedding.
    pub embedding: Option<String>,
    /// Order of the input's axes.
    pub layout: Option<Layout>,
    /// Width and height of the input.
    pub size: Option<(u16, u16)>,
    /// Order of the input's channels.
    pub colour: Option<Colour>,
    /// Range of the input's values before mean and deviation.
    pub scale: Option<Scale>,
    /// Mean: one value, or one a channel.
    pub mean: Vec<f32>,
    /// Standard deviation: one value, or one a channel.
    pub std: Vec<f32>,
    /// Smallest confidence of a detection.
    pub threshold: Option<f32>,
    /// Overlap above which the less confident of two boxes is dropped.
    pub overlap: Option<f32>,
    /// What the scores of a detector need.
    pub activation: Option<Activation>,
    /// How class score and objectness make a confidence.
    pub confidence: Option<Confidence>,
    /// What the boxes of an SSD-like head are.
    pub boxes: Option<BoxKind>,
    /// Priors of an SSD-like head.
    pub priors: Vec<PriorLevel>,
    /// Pictures for golden inputs.
    pub pictures: Vec<Picture>,
}

/// A picture that owns its pixels; see [`Frame`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// `height · width · channels` bytes.
    pub pixels: Vec<u8>,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// 1 (gray) or 3 (red, green, blue).
    pub channels: u8,
}

impl Picture {
    /// The borrowed form.
    pub fn frame(&self) -> Frame<'_> {
        Frame {
            pixels: &self.pixels,
            width: self.width,
            height: self.height,
            channels: self.channels,
        }
    }
}

/// A package with what its importer should know.
#[derive(Debug, Clone)]
pub struct Imported {
    /// The package; it has no score parameters yet.
    pub package: Package,
    /// What was assumed or left out, one sentence each.
    pub notes: Vec<String>,
}

/// Why a model can't be imported.
#[derive(Debug, Error)]
pub enum ImportError {
    /// The bytes are no ONNX file, damaged or split.
    #[error("{0}")]
    File(String),
    /// tract lacks operators.
    #[error(
        "tract does not have the operator{} {}; export the model without {}",
        if .0.len() == 1 { "" } else { "s" },
        .0.join(", "),
        if .0.len() == 1 { "it" } else { "them" }
    )]
    Operators(Vec<String>),
    /// tract has the operators, but not in this form.
    #[error("tract cannot run the model: {0}")]
    Graph(String),
    /// Something that the file does not tell.
    #[error("{problem}; say so with {flag}")]
    Ask {
        /// The flag that answers.
        flag: &'static str,
        /// What is not known.
        problem: String,
    },
    /// A flag contradicts the model.
    #[error("{flag}: {problem}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The model is of a kind that no task covers.
    #[error("{0}")]
    Unsupported(String),
    /// The engine refuses the package that was made.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A golden picture does not fit.
    #[error("golden picture {index}: {source}")]
    Picture {
        /// Which one.
        index: usize,
        /// Why.
        source: InputError,
    },
    /// A golden input can't be answered.
    #[error(transparent)]
    Golden(#[from] PackageError),
}

impl ImportError {
    fn ask(flag: &'static str, problem: impl Into<String>) -> Self {
        Self::Ask {
            flag,
            problem: problem.into(),
        }
    }

    fn flag(flag: &'static str, problem: impl Into<String>) -> Self {
        Self::Flag {
            flag,
            problem: problem.into(),
        }
    }
}

/// Makes a package of an ONNX file.
///
/// The outputs of the packaged file are those of the task, then the embedding: for a classifier
/// the input of the last layer with weights, averaged over space where that is a map. A final
/// softmax is left out, since scores are made of logits.
///
/// # Errors
/// [`ImportError`]: what the file lacks, with the flag that gives it; operators that tract lacks.
pub fn import(onnx: &[u8], options: &Options) -> Result<Imported, ImportError> {
    let graph = Graph::parse(onnx).map_err(ImportError::File)?;
    let unknown = graph.unknown_operators();
    if !unknown.is_empty() {
        return Err(ImportError::Operators(unknown));
    }
    let mut notes = Vec::new();
    let source = one_input(&graph)?;
    let input = input_spec(&graph, &source, options, &mut notes)?;
    let importer = Importer {
        onnx,
        graph,
        source,
        input,
        options,
    };
    importer.package(notes)
}

/// Everything about one import.
struct Importer<'a> {
    onnx: &'a [u8],
    graph: Graph,
    source: Port,
    input: InputSpec,
    options: &'a Options,
}

/// What the task's outputs are.
struct Outputs {
    task: Task,
    labels: Vec<String>,
    values: Vec<Value>,
    embedding: Option<Value>,
    nodes: Vec<Node>,
}

impl Importer<'_> {
    fn package(&self, mut notes: Vec<String>) -> Result<Imported, ImportError> {
        let golden = self.golden_pictures()?;
        let probe = self.probe(self.onnx)?;
        let mut outputs = self.outputs(&probe, &golden, &mut notes)?;
        if let Some(name) = &self.options.embedding {
            if !self.graph.has_value(name) {
                return Err(ImportError::flag(
                    "--embedding",
                    format!("the model has no tensor {name:?}"),
                ));
            }
            let feature = Feature {
                name: name.clone(),
                dequantise: None,
            };
            outputs.nodes.clear();
            let (value, nodes) = self.feature(&feature)?.map_err(|problem| {
                ImportError::flag("--embedding", format!("{name:?} {problem}"))
            })?;
            outputs.embedding = Some(value);
            outputs.nodes = nodes;
        }
        let mut all = outputs.values.clone();
        all.extend(outputs.embedding.clone());
        let onnx = edit::with_outputs(self.onnx, &outputs.nodes, &all)
            .map_err(|error| ImportError::File(error.to_string()))?;
        let mut package = Package {
            name: self.options.name.clone(),
            arch: String::new(),
            labels: outputs.labels.join("\n"),
            input: self.input,
            input_name: self.source.name.clone(),
            task: outputs.task,
            outputs: outputs.values.iter().map(|v| v.name.clone()).collect(),
            embedding: outputs
                .embedding
                .as_ref()
                .map_or(0, |value| value.shape.iter().product::<usize>() as u16),
            embedding_name: outputs.embedding.map_or_else(String::new, |v| v.name),
            onnx,
            record: Vec::new(),
            scores: Vec::new(),
            golden: Vec::new(),
            tolerance: 0.0,
        };
        let spec = package.spec();
        let mut plan = load(EngineKind::Tract, &package.bytes(&spec))?;
        let mut answered = Vec::new();
        let mut largest = 1.0f32;
        for (index, pixels) in golden.into_iter().enumerate() {
            let answer = answer(&mut *plan, &package.input, &pixels, index)?;
            largest = answer.iter().fold(largest, |max, v| max.max(v.abs()));
            answered.push(GoldenInput { pixels, answer });
        }
        let half = self.source.kind == 10;
        package.golden = answered;
        package.tolerance = TOLERANCE * largest * if half { 5.0 } else { 1.0 };
        if half {
            notes.push("The model is in half precision; tract computes it in f32.".to_owned());
        }
        Ok(Imported { package, notes })
    }

    fn probe(&self, onnx: &[u8]) -> Result<Probe, ImportError> {
        Probe::new(onnx, self.source.kind, &self.input.shape()).map_err(ImportError::Graph)
    }

    /// The given pictures at the input's size, or test patterns.
    fn golden_pictures(&self) -> Result<Vec<Vec<u8>>, ImportError> {
        if self.options.pictures.is_empty() {
            return Ok((0..PATTERNS)
                .map(|seed| pattern::draw(&self.input, seed))
                .collect());
        }
        let pictures = self.options.pictures.iter().enumerate();
        pictures
            .map(|(index, picture)| {
                let mut pixels = vec![0; self.input.len()];
                resize(
                    &picture.frame(),
                    self.input.width,
                    self.input.height,
                    self.input.channels,
                    &mut pixels,
                )
                .map_err(|source| ImportError::Picture { index, source })?;
                Ok(pixels)
            })
            .collect()
    }

    /// The tensor of a picture of the input's size.
    fn tensor(&self, pixels: &[u8]) -> Result<Vec<f32>, ImportError> {
        let frame = Frame {
            pixels,
            width: u32::from(self.input.width),
            height: u32::from(self.input.height),
            channels: self.input.channels,
        };
        let mut tensor = vec![0.0; self.input.len()];
        preprocess(&frame, &self.input, &mut tensor)
            .map_err(|source| ImportError::Picture { index: 0, source })?;
        Ok(tensor)
    }

    fn outputs(
        &self,
        probe: &Probe,
        golden: &[Vec<u8>],
        notes: &mut Vec<String>,
    ) -> Result<Outputs, ImportError> {
        let mut values = Vec::new();
        for (port, fact) in self.graph.outputs().into_iter().zip(&probe.facts) {
            if fact.kind == 0 {
                return Err(ImportError::Unsupported(format!(
                    "output {:?} does not hold f32 or f16 values; export the model with float outputs",
                    port.name
                )));
            }
            values.push(Value {
                name: port.name,
                kind: fact.kind,
                shape: fact.shape.clone(),
            });
        }
        let task = match self.options.task {
            Some(task) => task,
            None => self.guess(&values)?,
        };
        // Answers to every golden input, for what shapes don't tell.
        let tensors = golden.iter().map(|pixels| self.tensor(pixels));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let answers = probe.run(&tensors).map_err(ImportError::Graph)?;
        match task {
            TaskKind::Classify => self.classifier(&values, &answers, notes),
            TaskKind::Detect => {
                let found = detector::find(&values, &answers, &self.input, self.options, notes)?;
                Ok(Outputs {
                    task: Task::Detect(found.detector),
                    labels: self.labels(found.classes, notes)?,
                    values: found.values,
                    embedding: None,
                    nodes: Vec::new(),
                })
            }
            TaskKind::Anomaly => self.anomaly(values),
            TaskKind::Embed => self.embedder(values),
        }
    }

    /// The task that fits the shapes of the outputs.
    fn guess(&self, values: &[Value]) -> Result<TaskKind, ImportError> {
        let unsure = |problem: String| Err(ImportError::ask("--task", problem));
        let Some(first) = values.first() else {
            return Err(ImportError::Unsupported(
                "the model has no outputs".to_owned(),
            ));
        };
        let long: Vec<usize> = first
            .shape
            .iter()
            .copied()
            .filter(|side| *side > 1)
            .collect();
        if values.iter().all(|value| value.shape.len() == 3) {
            return Ok(TaskKind::Detect);
        }
        match long.as_slice() {
            [] => Ok(TaskKind::Anomaly),
            [_] => Ok(TaskKind::Classify),
            _ if first.shape == self.input.shape() => Ok(TaskKind::Anomaly),
            _ => unsure(format!(
                "what the model is for does not follow from its output {:?} of shape {:?}",
                first.name, first.shape
            )),
        }
    }

    fn labels(&self, classes: usize, notes: &mut Vec<String>) -> Result<Vec<String>, ImportError> {
        let given = &self.options.labels;
        if given.is_empty() {
            notes.push(format!(
                "The {classes} classes are called by their numbers; name them with --labels FILE, one a line."
            ));
            return Ok((0..classes).map(|class| class.to_string()).collect());
        }
        if given.len() != classes {
            return Err(ImportError::flag(
                "--labels",
                format!("there are {} names for {classes} classes", given.len()),
            ));
        }
        Ok(given.clone())
    }

    fn classifier(
        &self,
        values: &[Value],
        answers: &[Vec<Vec<f32>>],
        notes: &mut Vec<String>,
    ) -> Result<Outputs, ImportError> {
        let Some(output) = values.first() else {
            return Err(ImportError::Unsupported(
                "the model has no outputs".to_owned(),
            ));
        };
        for other in &values[1..] {
            notes.push(format!("Output {:?} is left out.", other.name));
        }
        let classes = output.shape.iter().product();
        let origin = self.graph.origin(&output.name);
        let mut value = output.clone();
        let mut meaning = ClassOutput::Logits;
        if origin.logits != output.name {
            notes.push(format!(
                "The softmax at the end is left out: {:?} gives the class scores.",
                origin.logits
            ));
            value = Value {
                name: origin.logits.clone(),
                ..value
            };
        } else if answers
            .iter()
            .filter_map(|answer| answer.first())
            .all(|row| is_distribution(row))
        {
            meaning = ClassOutput::Probabilities;
            notes.push(
                "The outputs are probabilities; their logarithm serves as logits.".to_owned(),
            );
        }
        let mut outputs = Outputs {
            task: Task::Classify(meaning),
            labels: self.labels(classes, notes)?,
            values: vec![value],
            embedding: None,
            nodes: Vec::new(),
        };
        if self.options.embedding.is_some() {
            return Ok(outputs);
        }
        let found = match &origin.embedding {
            Some(feature) => self.feature(feature)?.map_err(|problem| {
                format!("the input of its last layer, {:?}, {problem}", feature.name)
            }),
            None => Err("no layer with weights stands before its class scores".to_owned()),
        };
        match found {
            Ok((embedding, nodes)) => {
                outputs.embedding = Some(embedding);
                outputs.nodes = nodes;
            }
            Err(why) => notes.push(format!(
                "The model has no embedding ({why}), so scores fall back to its logits; name a tensor with --embedding."
            )),
        }
        Ok(outputs)
    }

    fn anomaly(&self, values: Vec<Value>) -> Result<Outputs, ImportError> {
        let [value] = <[Value; 1]>::try_from(values).map_err(|values| {
            ImportError::Unsupported(format!(
                "an anomaly model has one output, this one has {}",
                values.len()
            ))
        })?;
        let meaning = if value.shape.iter().product::<usize>() == 1 {
            AnomalyOutput::Score
        } else if value.shape == self.input.shape() {
            AnomalyOutput::Reconstruction
        } else {
            return Err(ImportError::flag(
                "--task",
                format!(
                    "an anomaly model gives one score or its input again, this one {:?}",
                    value.shape
                ),
            ));
        };
        Ok(Outputs {
            task: Task::Anomaly(meaning),
            labels: Vec::new(),
            values: vec![value],
            embedding: None,
            nodes: Vec::new(),
        })
    }

    fn embedder(&self, values: Vec<Value>) -> Result<Outputs, ImportError> {
        let mut embedding = None;
        let mut nodes = Vec::new();
        if self.options.embedding.is_none() {
            let Some(value) = values.into_iter().next() else {
                return Err(ImportError::Unsupported(
                    "the model has no outputs".to_owned(),
                ));
            };
            let feature = Feature {
                name: value.name,
                dequantise: None,
            };
            let (value, added) = self.feature(&feature)?.map_err(|problem| {
                ImportError::ask("--embedding", format!("the output {problem}"))
            })?;
            embedding = Some(value);
            nodes = added;
        }
        Ok(Outputs {
            task: Task::Embed,
            labels: Vec::new(),
            values: Vec::new(),
            embedding,
            nodes,
        })
    }

    /// A value as embedding, averaged over space if it is a map; the inner error says why not.
    #[allow(clippy::type_complexity)]
    fn feature(
        &self,
        feature: &Feature,
    ) -> Result<Result<(Value, Vec<Node>), String>, ImportError> {
        let mut nodes: Vec<Node> = feature.dequantise.iter().cloned().collect();
        // The shape is not known yet; tract finds it.
        let undeclared = |name: &str, nodes: &[Node]| {
            let value = Value {
                name: name.to_owned(),
                kind: 0,
                shape: Vec::new(),
            };
            edit::with_outputs(self.onnx, nodes, &[value])
                .map_err(|error| ImportError::File(error.to_string()))
        };
        let mut name = feature.name.clone();
        let mut fact = match self.probe(&undeclared(&name, &nodes)?) {
            Ok(probe) => probe.facts[0].clone(),
            Err(error) => return Ok(Err(format!("can't be an output: {error}"))),
        };
        if let [1, _, height, width] = fact.shape[..]
            && height * width > 1
        {
            let output = format!("{name}_pooled");
            nodes.push(Node {
                op: "GlobalAveragePool",
                inputs: vec![name],
                output: output.clone(),
            });
            name = output;
            fact = self.probe(&undeclared(&name, &nodes)?)?.facts[0].clone();
        }
        if fact.kind == 0 {
            return Ok(Err("does not hold f32 or f16 values".to_owned()));
        }
        if fact.len() > MAX_EMBEDDING || fact.is_empty() {
            return Ok(Err(format!(
                "has {} values, and an embedding 1 to {MAX_EMBEDDING}",
                fact.len()
            )));
        }
        Ok(Ok((
            Value {
                name,
                kind: fact.kind,
                shape: fact.shape,
            },
            nodes,
        )))
    }
}

/// Whether values are probabilities that sum to 1.
fn is_distribution(row: &[f32]) -> bool {
    let sum: f32 = row.iter().sum();
    row.len() > 1 && (sum - 1.0).abs() < 1e-2 && row.iter().all(|p| (0.0..=1.001).contains(p))
}
