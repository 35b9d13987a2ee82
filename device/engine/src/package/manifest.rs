//! The text of `model.toml` and its meaning: every key, strictly, in words that people use.

use device_core::detect;
use flywheel_shared::spec::{
    Activation, AnomalyOutput, BoxCode, ClassOutput, Colour, Confidence, Detector, GridHead, Head,
    InputSpec, Layout, MAX_LEVELS, PriorLevel, Priors, Scale, SsdHead, Task,
};
use serde::{Deserialize, Serialize};

use super::Package;

/// Version of the description.
const FORMAT: u32 = 1;

/// A key and what is wrong with it.
type Problem = (String, String);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format: u32,
    name: String,
    task: TaskName,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    arch: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    labels: Vec<String>,
    input: InputTable,
    output: OutputTable,
    #[serde(skip_serializing_if = "Option::is_none")]
    detector: Option<DetectorTable>,
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding: Option<EmbeddingTable>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<File>,
    pub form: Vec<Form>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub golden: Option<GoldenTable>,
}

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
enum TaskName {
    Classify,
    Detect,
    Anomaly,
    Embed,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InputTable {
    name: String,
    layout: LayoutName,
    width: u16,
    height: u16,
    colour: ColourName,
    scale: ScaleName,
    mean: Vec<f32>,
    std: Vec<f32>,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum LayoutName {
    Nchw,
    Nhwc,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum ColourName {
    Rgb,
    Bgr,
    Grey,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum ScaleName {
    Unit,
    Byte,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OutputTable {
    meaning: Meaning,
    tensors: Vec<String>,
}

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug)]
#[serde(rename_all = "lowercase")]
enum Meaning {
    Logits,
    Probabilities,
    Boxes,
    Score,
    Reconstruction,
    Embedding,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EmbeddingTable {
    tensor: String,
    values: u16,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct DetectorTable {
    head: HeadName,
    threshold: f32,
    overlap: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    candidates: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    background: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    activation: Option<ActivationName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    confidence: Option<ConfidenceName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    points: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    strides: Option<Vec<u16>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    boxes: Option<BoxName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    variance: Option<[f32; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priors: Option<Vec<PriorTable>>,
}

#[derive(Serialize, Deserialize, Clone, Copy, Default)]
#[serde(rename_all = "lowercase")]
enum HeadName {
    #[default]
    Ssd,
    Grid,
    Yolo,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum ActivationName {
    Done,
    Softmax,
    Sigmoid,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum ConfidenceName {
    Product,
    GeometricMean,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum BoxName {
    Corners,
    PixelCorners,
    Offsets,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PriorTable {
    stride: u16,
    sizes: Vec<u16>,
}

/// A file of the package.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub path: String,
    pub sha256: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Form {
    pub kind: FormKind,
    pub file: File,
}

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
pub(super) enum FormKind {
    Onnx,
    Burnpack,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GoldenTable {
    pub tolerance: f32,
    pub pictures: Vec<File>,
    pub answers: Vec<File>,
}

impl Manifest {
    /// The description of a package whose files are stored.
    pub fn of(
        package: &Package,
        form: Vec<Form>,
        scores: Option<File>,
        golden: GoldenTable,
    ) -> Self {
        let (task, meaning) = match package.task {
            Task::Classify(ClassOutput::Logits) => (TaskName::Classify, Meaning::Logits),
            Task::Classify(ClassOutput::Probabilities) => {
                (TaskName::Classify, Meaning::Probabilities)
            }
            Task::Detect(_) => (TaskName::Detect, Meaning::Boxes),
            Task::Anomaly(AnomalyOutput::Score) => (TaskName::Anomaly, Meaning::Score),
            Task::Anomaly(AnomalyOutput::Reconstruction) => {
                (TaskName::Anomaly, Meaning::Reconstruction)
            }
            Task::Embed => (TaskName::Embed, Meaning::Embedding),
        };
        let input = &package.input;
        let used = usize::from(input.channels).min(3);
        Self {
            format: FORMAT,
            name: package.name.clone(),
            task,
            arch: package.arch.clone(),
            labels: package.spec().labels().map(str::to_owned).collect(),
            input: InputTable {
                name: package.input_name.clone(),
                layout: match input.layout {
                    Layout::Nchw => LayoutName::Nchw,
                    Layout::Nhwc => LayoutName::Nhwc,
                },
                width: input.width,
                height: input.height,
                colour: match (input.channels, input.colour) {
                    (1, _) => ColourName::Grey,
                    (_, Colour::Rgb) => ColourName::Rgb,
                    (_, Colour::Bgr) => ColourName::Bgr,
                },
                scale: match input.scale {
                    Scale::Unit => ScaleName::Unit,
                    Scale::Byte => ScaleName::Byte,
                },
                mean: input.mean[..used].to_vec(),
                std: input.std[..used].to_vec(),
            },
            output: OutputTable {
                meaning,
                tensors: package.outputs.clone(),
            },
            detector: match &package.task {
                Task::Detect(detector) => Some(DetectorTable::of(detector)),
                _ => None,
            },
            embedding: (package.embedding > 0).then(|| EmbeddingTable {
                tensor: package.embedding_name.clone(),
                values: package.embedding,
            }),
            scores,
            form,
            golden: (!golden.pictures.is_empty()).then_some(golden),
        }
    }

    /// The package without its files.
    pub fn package(&self) -> Result<Package, Problem> {
        let wrong = |key: &str, problem: String| (key.to_owned(), problem);
        if self.format != FORMAT {
            return Err(wrong(
                "format",
                format!("{} is not known; this build reads {FORMAT}", self.format),
            ));
        }
        let input = self.input.spec()?;
        let task = self.task(&input)?;
        for (index, label) in self.labels.iter().enumerate() {
            if label.is_empty() || label.contains('\n') || self.labels[..index].contains(label) {
                return Err(wrong(
                    "labels",
                    format!("{label:?} is empty, of several lines, or there twice"),
                ));
            }
        }
        let wants_labels = matches!(task, Task::Classify(_) | Task::Detect(_));
        if wants_labels == self.labels.is_empty() {
            return Err(wrong(
                "labels",
                "a classifier or detector has at least one, every other task none".to_owned(),
            ));
        }
        let embedding = self.embedding.as_ref();
        if embedding.is_some_and(|embedding| embedding.values == 0) {
            return Err(wrong(
                "embedding.values",
                "is 0; leave the table out instead".to_owned(),
            ));
        }
        if task == Task::Embed && embedding.is_none() {
            return Err(wrong("embedding", "is missing for this task".to_owned()));
        }
        if self.form.is_empty() {
            return Err(wrong("form", "there is no form of the model".to_owned()));
        }
        Ok(Package {
            name: self.name.clone(),
            arch: self.arch.clone(),
            labels: self.labels.join("\n"),
            input,
            input_name: self.input.name.clone(),
            task,
            outputs: self.output.tensors.clone(),
            embedding_name: embedding.map_or_else(String::new, |e| e.tensor.clone()),
            embedding: embedding.map_or(0, |e| e.values),
            onnx: Vec::new(),
            record: Vec::new(),
            scores: Vec::new(),
            golden: Vec::new(),
            tolerance: 0.0,
        })
    }

    fn task(&self, input: &InputSpec) -> Result<Task, Problem> {
        let meaning = self.output.meaning;
        let task = match (self.task, meaning) {
            (TaskName::Classify, Meaning::Logits) => Task::Classify(ClassOutput::Logits),
            (TaskName::Classify, Meaning::Probabilities) => {
                Task::Classify(ClassOutput::Probabilities)
            }
            (TaskName::Anomaly, Meaning::Score) => Task::Anomaly(AnomalyOutput::Score),
            (TaskName::Anomaly, Meaning::Reconstruction) => {
                Task::Anomaly(AnomalyOutput::Reconstruction)
            }
            (TaskName::Embed, Meaning::Embedding) => Task::Embed,
            (TaskName::Detect, Meaning::Boxes) => {
                let table = self.detector.as_ref().ok_or_else(|| {
                    ("detector".to_owned(), "is missing for this task".to_owned())
                })?;
                let detector = table.detector()?;
                detect::check(&detector, input, self.labels.len())
                    .map_err(|error| ("detector".to_owned(), error.to_string()))?;
                Task::Detect(detector)
            }
            _ => {
                return Err((
                    "output.meaning".to_owned(),
                    format!("{meaning:?} does not go with this task"),
                ));
            }
        };
        if self.detector.is_some() && self.task != TaskName::Detect {
            return Err((
                "detector".to_owned(),
                "is there, but the task is another".to_owned(),
            ));
        }
        Ok(task)
    }
}

impl InputTable {
    fn spec(&self) -> Result<InputSpec, Problem> {
        let channels = match self.colour {
            ColourName::Grey => 1,
            ColourName::Rgb | ColourName::Bgr => 3,
        };
        let three = |key: &str, values: &[f32], legal: fn(f32) -> bool| {
            let all = values.iter().all(|value| legal(*value));
            match values {
                [a] if all && channels == 1 => Ok([*a; 3]),
                [a, b, c] if all && channels == 3 => Ok([*a, *b, *c]),
                _ => Err((
                    key.to_owned(),
                    format!("{values:?}: give one finite value a channel (std above 0)"),
                )),
            }
        };
        for (key, side) in [("input.width", self.width), ("input.height", self.height)] {
            if side == 0 {
                return Err((key.to_owned(), "is 0".to_owned()));
            }
        }
        Ok(InputSpec {
            mean: three("input.mean", &self.mean, f32::is_finite)?,
            std: three("input.std", &self.std, |v| v.is_finite() && v > 0.0)?,
            layout: match self.layout {
                LayoutName::Nchw => Layout::Nchw,
                LayoutName::Nhwc => Layout::Nhwc,
            },
            colour: match self.colour {
                ColourName::Bgr => Colour::Bgr,
                ColourName::Rgb | ColourName::Grey => Colour::Rgb,
            },
            scale: match self.scale {
                ScaleName::Unit => Scale::Unit,
                ScaleName::Byte => Scale::Byte,
            },
            ..InputSpec::new(self.width, self.height, channels)
        })
    }
}

impl DetectorTable {
    fn of(detector: &Detector) -> Self {
        let table = Self {
            threshold: detector.threshold,
            overlap: detector.overlap,
            ..Self::default()
        };
        let activation = |activation| match activation {
            Activation::Done => ActivationName::Done,
            Activation::Softmax => ActivationName::Softmax,
            Activation::Sigmoid => ActivationName::Sigmoid,
        };
        match &detector.head {
            Head::Ssd(head) => {
                let table = Self {
                    head: HeadName::Ssd,
                    candidates: Some(head.candidates),
                    background: Some(head.background),
                    activation: Some(activation(head.activation)),
                    boxes: Some(match head.boxes {
                        BoxCode::Corners => BoxName::Corners,
                        BoxCode::PixelCorners => BoxName::PixelCorners,
                        BoxCode::Offsets(_) => BoxName::Offsets,
                    }),
                    ..table
                };
                match &head.boxes {
                    BoxCode::Offsets(priors) => Self {
                        variance: Some(priors.variance),
                        priors: Some(
                            priors
                                .levels
                                .iter()
                                .filter(|level| level.stride > 0)
                                .map(|level| PriorTable {
                                    stride: level.stride,
                                    sizes: level.sizes.into_iter().filter(|s| *s > 0).collect(),
                                })
                                .collect(),
                        ),
                        ..table
                    },
                    _ => table,
                }
            }
            Head::Grid(head) => Self {
                head: HeadName::Grid,
                activation: Some(activation(head.activation)),
                confidence: Some(match head.confidence {
                    Confidence::Product => ConfidenceName::Product,
                    Confidence::GeometricMean => ConfidenceName::GeometricMean,
                }),
                points: Some(head.points),
                strides: Some(head.strides.into_iter().filter(|s| *s > 0).collect()),
                ..table
            },
            Head::Yolo { candidates } => Self {
                head: HeadName::Yolo,
                candidates: Some(*candidates),
                ..table
            },
        }
    }

    fn detector(&self) -> Result<Detector, Problem> {
        fn need<T>(key: &str, value: Option<T>) -> Result<T, Problem> {
            value.ok_or_else(|| {
                (
                    format!("detector.{key}"),
                    "is missing for this head".to_owned(),
                )
            })
        }
        let activation = || -> Result<Activation, Problem> {
            Ok(match need("activation", self.activation)? {
                ActivationName::Done => Activation::Done,
                ActivationName::Softmax => Activation::Softmax,
                ActivationName::Sigmoid => Activation::Sigmoid,
            })
        };
        let head = match self.head {
            HeadName::Ssd => Head::Ssd(SsdHead {
                candidates: need("candidates", self.candidates)?,
                background: need("background", self.background)?,
                activation: activation()?,
                boxes: match need("boxes", self.boxes)? {
                    BoxName::Corners => BoxCode::Corners,
                    BoxName::PixelCorners => BoxCode::PixelCorners,
                    BoxName::Offsets => BoxCode::Offsets(Priors {
                        variance: need("variance", self.variance)?,
                        levels: levels(need("priors", self.priors.as_ref())?)?,
                    }),
                },
            }),
            HeadName::Grid => Head::Grid(GridHead {
                strides: strides(need("strides", self.strides.as_ref())?)?,
                points: need("points", self.points)?,
                activation: activation()?,
                confidence: match need("confidence", self.confidence)? {
                    ConfidenceName::Product => Confidence::Product,
                    ConfidenceName::GeometricMean => Confidence::GeometricMean,
                },
            }),
            HeadName::Yolo => Head::Yolo {
                candidates: need("candidates", self.candidates)?,
            },
        };
        Ok(Detector {
            head,
            threshold: self.threshold,
            overlap: self.overlap,
        })
    }
}

fn strides(given: &[u16]) -> Result<[u16; MAX_LEVELS], Problem> {
    let mut strides = [0; MAX_LEVELS];
    match strides.get_mut(..given.len()) {
        Some(place) if !given.is_empty() && !given.contains(&0) => place.copy_from_slice(given),
        _ => {
            return Err((
                "detector.strides".to_owned(),
                format!("{given:?}: give 1 to {MAX_LEVELS} strides above 0"),
            ));
        }
    }
    Ok(strides)
}

fn levels(given: &[PriorTable]) -> Result<[PriorLevel; MAX_LEVELS], Problem> {
    let mut levels = [PriorLevel::NONE; MAX_LEVELS];
    if !(1..=MAX_LEVELS).contains(&given.len()) {
        return Err((
            "detector.priors".to_owned(),
            format!("there are {}; give 1 to {MAX_LEVELS}", given.len()),
        ));
    }
    for (index, (level, table)) in levels.iter_mut().zip(given).enumerate() {
        level.stride = table.stride;
        let most = level.sizes.len();
        match level.sizes.get_mut(..table.sizes.len()) {
            Some(place)
                if table.stride > 0 && !table.sizes.is_empty() && !table.sizes.contains(&0) =>
            {
                place.copy_from_slice(&table.sizes);
            }
            _ => {
                return Err((
                    format!("detector.priors[{index}]"),
                    format!("give a stride and 1 to {most} sizes, all above 0"),
                ));
            }
        }
    }
    Ok(levels)
}
