//! How a model wants its input and what it answers: the part of a model package that makes the
//! bytes of an ONNX file meaningful. It is signed with the model.

use serde::{Deserialize, Serialize};

/// Order of the axes of an image tensor. Numbered by order: append only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layout {
    /// 0: batch, channel, row, column.
    #[default]
    Nchw,
    /// 1: batch, row, column, channel.
    Nhwc,
}

/// Order of the channels of a colour tensor. Numbered by order: append only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Colour {
    /// 0: red, green, blue.
    #[default]
    Rgb,
    /// 1: blue, green, red, as OpenCV reads pictures.
    Bgr,
}

/// What a pixel is divided by before mean and deviation. Numbered by order: append only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scale {
    /// 0: by 255, so that values lie in 0 to 1.
    #[default]
    Unit,
    /// 1: by 1, so that values lie in 0 to 255.
    Byte,
}

impl Scale {
    /// The divisor.
    pub fn divisor(self) -> f32 {
        match self {
            Self::Unit => 255.0,
            Self::Byte => 1.0,
        }
    }
}

/// The input tensor: one image, f32, resized to `width` × `height` by the triangle filter
/// (bilinear when enlarging, antialiased when shrinking), each value
/// `(pixel / scale − mean[c]) / std[c]`, with c the channel in the tensor's own order.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct InputSpec {
    /// Columns in pixels.
    pub width: u16,
    /// Rows in pixels.
    pub height: u16,
    /// 1 for grey, 3 for colour.
    pub channels: u8,
    /// Mean of each channel after scaling; only the first `channels` count.
    pub mean: [f32; 3],
    /// Standard deviation of each channel after scaling, greater than 0; only the first
    /// `channels` count.
    pub std: [f32; 3],
    /// Order of the axes; N is 1.
    pub layout: Layout,
    /// Order of the channels, if there are three.
    pub colour: Colour,
    /// Range of the values before mean and deviation.
    pub scale: Scale,
}

impl InputSpec {
    /// NCHW, RGB, values 0 to 1 as they are: the start for whatever differs.
    pub const fn new(width: u16, height: u16, channels: u8) -> Self {
        Self {
            width,
            height,
            channels,
            mean: [0.0; 3],
            std: [1.0; 3],
            layout: Layout::Nchw,
            colour: Colour::Rgb,
            scale: Scale::Unit,
        }
    }

    /// Number of f32 values in the input tensor.
    pub fn len(&self) -> usize {
        self.width as usize * self.height as usize * self.channels as usize
    }

    /// Whether the tensor has no values at all, which no valid model has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tensor's shape, N = 1.
    pub fn shape(&self) -> [usize; 4] {
        let (c, h, w) = (
            self.channels as usize,
            self.height as usize,
            self.width as usize,
        );
        match self.layout {
            Layout::Nchw => [1, c, h, w],
            Layout::Nhwc => [1, h, w, c],
        }
    }
}

/// What a model is for, and so what its outputs mean. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Task {
    /// 0: one score a class.
    Classify(ClassOutput),
    /// 1: boxes with a class and a confidence each.
    Detect(Detector),
    /// 2: how unlike the usual the picture is.
    Anomaly(AnomalyOutput),
    /// 3: an embedding and nothing else.
    Embed,
}

/// The class output. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClassOutput {
    /// 0: unnormalised.
    Logits,
    /// 1: softmax is done; engines give the natural logarithm, so that scores see logits.
    Probabilities,
}

/// The anomaly output. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AnomalyOutput {
    /// 0: one value, higher for the less usual.
    Score,
    /// 1: the input as the model remembers it; the score is the mean squared difference.
    Reconstruction,
}

/// How the outputs of a detector become boxes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Detector {
    /// The form of the output tensors.
    pub head: Head,
    /// Smallest confidence of a detection, above 0 and below 1.
    pub threshold: f32,
    /// Of two boxes of a class that overlap by more than this (intersection over union), the less
    /// confident is dropped.
    pub overlap: f32,
}

/// The form of a detector's output tensors; each is flattened, and they follow one another in the
/// order given. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Head {
    /// 0: scores N × C, boxes N × 4 (SSD, RetinaFace, UltraFace).
    Ssd(SsdHead),
    /// 1: for each stride a grid of cells: class scores of all strides, then objectness of all,
    /// boxes of all, key points of all (YuNet, YOLOX).
    Grid(GridHead),
    /// 2: one tensor (4 + K) × N: centre x, centre y, width, height in input pixels, then K class
    /// probabilities (YOLOv8 and later).
    Yolo {
        /// N.
        candidates: u32,
    },
}

/// Scores and boxes of a fixed list of candidates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SsdHead {
    /// N.
    pub candidates: u32,
    /// Whether column 0 of the scores means "nothing here", so that C = K + 1.
    pub background: bool,
    /// What must be done to the scores.
    pub activation: Activation,
    /// What the box values are.
    pub boxes: BoxCode,
}

/// What makes raw scores probabilities. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// 0: nothing; the model did it.
    Done,
    /// 1: softmax over the columns of a candidate.
    Softmax,
    /// 2: the logistic function of each value.
    Sigmoid,
}

/// What the four box values of a candidate are. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum BoxCode {
    /// 0: left, top, right, bottom, as shares of the picture's sides.
    Corners,
    /// 1: left, top, right, bottom, in pixels of the input.
    PixelCorners,
    /// 2: offsets from priors (Liu et al. 2016, 1512.02325, eq. 2): with v the variances, centre =
    /// prior centre + value · v₀ · prior size, size = prior size · exp(value · v₁).
    Offsets(Priors),
}

/// Square prior boxes on grids: for each level, row by row, for each cell its sizes in order.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Priors {
    /// v₀ for centres and v₁ for sizes.
    pub variance: [f32; 2],
    /// The levels; those behind the last are [`PriorLevel::NONE`].
    pub levels: [PriorLevel; MAX_LEVELS],
}

impl Priors {
    /// Number of priors over an input.
    pub fn count(&self, input: &InputSpec) -> usize {
        let sizes = |level: &PriorLevel| level.sizes.iter().filter(|size| **size > 0).count();
        self.levels
            .iter()
            .map(|level| grid(input, level.stride).map_or(0, |(w, h)| w * h) * sizes(level))
            .sum()
    }
}

/// The priors of one stride.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PriorLevel {
    /// Pixels of the input between two cells; 0 for a level that is not there.
    pub stride: u16,
    /// Sides of the priors in pixels of the input; 0 for one that is not there.
    pub sizes: [u16; 4],
}

impl PriorLevel {
    /// No level.
    pub const NONE: Self = Self {
        stride: 0,
        sizes: [0; 4],
    };
}

/// Class, objectness, box and key points for each cell of several grids: with s the stride and
/// (c, r) the cell, centre = ((c, r) + value) · s, size = exp(value) · s, key point = ((c, r) +
/// value) · s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GridHead {
    /// Strides in pixels of the input, in the order of the tensors; 0 behind the last.
    pub strides: [u16; MAX_LEVELS],
    /// Key points of a box, 0 to [`MAX_POINTS`]; without any there are no such tensors.
    pub points: u8,
    /// What must be done to class scores and objectness.
    pub activation: Activation,
    /// How class score and objectness make a confidence.
    pub confidence: Confidence,
}

/// How class score p and objectness o make a confidence. Numbered by order: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Confidence {
    /// 0: p · o (YOLOX).
    Product,
    /// 1: √(p · o) (YuNet).
    GeometricMean,
}

/// Most levels of a detector.
pub const MAX_LEVELS: usize = 5;
/// Most key points of a box.
pub const MAX_POINTS: usize = 5;
/// Most tensors of a head.
pub const MAX_TENSORS: usize = 4 * MAX_LEVELS;

/// Columns and rows of the cells of a stride; `None` without a stride.
pub fn grid(input: &InputSpec, stride: u16) -> Option<(usize, usize)> {
    (stride > 0).then(|| {
        (
            input.width.div_ceil(stride) as usize,
            input.height.div_ceil(stride) as usize,
        )
    })
}

impl Head {
    /// Number of values of each output tensor, in order, for K classes.
    pub fn lens(&self, input: &InputSpec, classes: usize) -> heapless::Vec<usize, MAX_TENSORS> {
        match self {
            Self::Ssd(head) => {
                let n = head.candidates as usize;
                [
                    n.saturating_mul(classes + usize::from(head.background)),
                    n.saturating_mul(4),
                ]
                .into_iter()
                .collect()
            }
            Self::Grid(head) => {
                let cells = || {
                    head.strides
                        .iter()
                        .filter_map(|stride| grid(input, *stride))
                        .map(|(columns, rows)| columns * rows)
                };
                let points = 2 * usize::from(head.points);
                [classes, 1, 4, points]
                    .into_iter()
                    .filter(|values| *values > 0)
                    .flat_map(|values| cells().map(move |cells| cells * values))
                    .collect()
            }
            Self::Yolo { candidates } => [(4 + classes).saturating_mul(*candidates as usize)]
                .into_iter()
                .collect(),
        }
    }
}

/// What a model takes, what it is for, and what it answers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec<'a> {
    /// The architecture, for engines that rebuild it from a record (`convnet-1`); empty if the
    /// package holds ONNX only.
    pub arch: &'a str,
    /// Class names in the order of the class scores, separated by newlines; empty for a task
    /// without classes.
    pub labels: &'a str,
    /// What the input tensor holds.
    pub input: InputSpec,
    /// Number of f32 values of the embedding output; 0 if the model has none.
    pub embedding: u16,
    /// What the outputs mean.
    pub task: Task,
}

impl<'a> ModelSpec<'a> {
    /// The class names in the order of the class scores.
    pub fn labels(&self) -> impl Iterator<Item = &'a str> + Clone {
        self.labels.split('\n').filter(|label| !label.is_empty())
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.labels().count()
    }

    /// Number of class scores that an engine gives: the number of classes of a classifier, 0 for
    /// every other task.
    pub fn logits(&self) -> usize {
        match self.task {
            Task::Classify(_) => self.classes(),
            Task::Detect(_) | Task::Anomaly(_) | Task::Embed => 0,
        }
    }

    /// Number of values of each output tensor that is neither class scores nor embedding, in
    /// order: a detector's tensors, an anomaly score or a reconstruction.
    pub fn head_lens(&self) -> heapless::Vec<usize, MAX_TENSORS> {
        match &self.task {
            Task::Classify(_) | Task::Embed => heapless::Vec::new(),
            Task::Detect(detector) => detector.head.lens(&self.input, self.classes()),
            Task::Anomaly(AnomalyOutput::Score) => [1].into_iter().collect(),
            Task::Anomaly(AnomalyOutput::Reconstruction) => {
                [self.input.len()].into_iter().collect()
            }
        }
    }
}

/// Inputs with the answers they must give, run on the device before a model may go on trial.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Golden<'a> {
    /// Columns of each frame in pixels.
    pub width: u16,
    /// Rows of each frame in pixels.
    pub height: u16,
    /// Channels of each frame: 1 or 3.
    pub channels: u8,
    /// The frames one after the other, u8, HWC.
    #[serde(with = "serde_bytes_slice")]
    pub frames: &'a [u8],
    /// The expected logits of each frame one after the other, f32 little endian; for other tasks
    /// the expected head values, or the embedding where there are none.
    #[serde(with = "serde_bytes_slice")]
    pub logits: &'a [u8],
    /// Largest absolute difference allowed in any value.
    pub tolerance: f32,
}

impl Golden<'_> {
    /// Bytes of one frame.
    pub fn frame_len(&self) -> usize {
        self.width as usize * self.height as usize * self.channels as usize
    }
}

/// `&[u8]` as one length-prefixed run of bytes that is borrowed when read.
pub(crate) mod serde_bytes_slice {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &&[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub fn deserialize<'de: 'a, 'a, D: Deserializer<'de>>(from: D) -> Result<&'a [u8], D::Error> {
        <&'a [u8]>::deserialize(from)
    }
}
