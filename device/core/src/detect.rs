//! From a detector's raw tensors to boxes, and from boxes to the scores of a frame.
//!
//! Engines hand over what the network says; what it means is decided here, once, so that a
//! microcontroller and the cloud find the same boxes. The caller owns the list of candidates: a
//! longer one costs memory, a shorter one loses the least confident first, and says how many.

use core::fmt;

use flywheel_shared::message::Scores;
use flywheel_shared::spec::{
    Activation, BoxCode, Confidence, Detector, GridHead, Head, InputSpec, MAX_POINTS, Priors,
    SsdHead, grid,
};

use crate::params::Params;
use crate::score::{self, ScoreError, conformal};

/// A length for the list of candidates that is enough for crowds: before suppression each object
/// has some ten boxes.
pub const CANDIDATES: usize = 1024;

/// A box around one object, in pixels of the frame that was preprocessed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Detection {
    /// Index of its class.
    pub class: u16,
    /// Confidence, 0 to 1.
    pub confidence: f32,
    /// Left edge.
    pub left: f32,
    /// Top edge.
    pub top: f32,
    /// Right edge.
    pub right: f32,
    /// Bottom edge.
    pub bottom: f32,
    /// Key points (x, y); those that the model does not give are 0.
    pub points: [[f32; 2]; MAX_POINTS],
}

impl Detection {
    /// Intersection over union with another box, 0 to 1; 0 for two boxes without area.
    pub fn overlap(&self, other: &Self) -> f32 {
        let width = self.right.min(other.right) - self.left.max(other.left);
        let height = self.bottom.min(other.bottom) - self.top.max(other.top);
        if width <= 0.0 || height <= 0.0 {
            return 0.0;
        }
        let both = width * height;
        both / (self.area() + other.area() - both)
    }

    fn area(&self) -> f32 {
        (self.right - self.left) * (self.bottom - self.top)
    }
}

/// What [`decode`] left in the caller's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The first so many are detections: at or above the detector's threshold.
    pub detections: usize,
    /// Detections and the near misses behind them, down to half the threshold.
    pub candidates: usize,
    /// Candidates that the list had no room for before suppression; the least confident ones.
    pub lost: usize,
}

/// Why tensors can't be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetectError {
    /// The tensors do not hold as many values as the head has.
    Length {
        /// What the head has.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// There are no classes, or more than 65,536.
    Classes(usize),
    /// The number of priors is not the number of candidates.
    Priors {
        /// The head's candidates.
        expected: usize,
        /// The priors over the input.
        found: usize,
    },
    /// A threshold that is not above 0 and below 1, a stride or a size of 0, more key points than
    /// a detection holds, or an activation that the head can't have.
    Spec(&'static str),
}

impl fmt::Display for DetectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { expected, found } => {
                write!(f, "{found} head values where the detector has {expected}")
            }
            Self::Classes(found) => write!(f, "{found} classes; a detector has 1 to 65536"),
            Self::Priors { expected, found } => write!(
                f,
                "{found} priors for {expected} candidates; strides or sizes are not the model's"
            ),
            Self::Spec(what) => write!(f, "the detector's {what} is out of its range"),
        }
    }
}

impl core::error::Error for DetectError {}

/// Checks a detector for an input and a number of classes: what it must hold for [`decode`] to
/// accept tensors of [`Head::lens`].
///
/// # Errors
/// [`DetectError`], never of the kind `Length`.
pub fn check(detector: &Detector, input: &InputSpec, classes: usize) -> Result<(), DetectError> {
    if !(1..=1 << 16).contains(&classes) {
        return Err(DetectError::Classes(classes));
    }
    // Written so that NaN fails.
    if !(detector.threshold > 0.0 && detector.threshold < 1.0) {
        return Err(DetectError::Spec("threshold"));
    }
    if !(detector.overlap > 0.0 && detector.overlap <= 1.0) {
        return Err(DetectError::Spec("overlap"));
    }
    if input.width == 0 || input.height == 0 {
        return Err(DetectError::Spec("input size"));
    }
    match &detector.head {
        Head::Ssd(head) => {
            if let BoxCode::Offsets(priors) = &head.boxes {
                let (expected, found) = (head.candidates as usize, priors.count(input));
                if expected != found {
                    return Err(DetectError::Priors { expected, found });
                }
            }
            if head.candidates == 0 {
                return Err(DetectError::Spec("number of candidates"));
            }
        }
        Head::Grid(head) => {
            if usize::from(head.points) > MAX_POINTS {
                return Err(DetectError::Spec("number of key points"));
            }
            if head.strides[0] == 0 {
                return Err(DetectError::Spec("first stride"));
            }
            // Objectness stands alone, and one value has no softmax.
            if head.activation == Activation::Softmax {
                return Err(DetectError::Spec("activation"));
            }
        }
        Head::Yolo { candidates } => {
            if *candidates == 0 {
                return Err(DetectError::Spec("number of candidates"));
            }
        }
    }
    Ok(())
}

/// Finds boxes in a detector's tensors, which follow one another in `heads` as [`Head`] says.
///
/// `source` is width and height of the frame that was preprocessed. Boxes go to the front of
/// `out`, most confident first, clamped to the frame: detections, then near misses down to half
/// the threshold, which [`score`] looks at. Of boxes of one class that overlap by more than
/// [`Detector::overlap`] the most confident stays (greedy non-maximum suppression). Values that
/// are not finite make no box. Equal inputs give equal lists.
///
/// # Errors
/// [`DetectError`], before anything is written.
pub fn decode(
    detector: &Detector,
    input: &InputSpec,
    classes: usize,
    heads: &[f32],
    source: (u32, u32),
    out: &mut [Detection],
) -> Result<Found, DetectError> {
    check(detector, input, classes)?;
    let lens = detector.head.lens(input, classes);
    let expected = lens
        .iter()
        .fold(0usize, |sum, len| sum.saturating_add(*len));
    if heads.len() != expected {
        return Err(DetectError::Length {
            expected,
            found: heads.len(),
        });
    }
    let mut list = Candidates {
        out,
        len: 0,
        lost: 0,
        floor: floor(detector.threshold),
        // From shares of the input's sides to pixels of the source.
        scale: [source.0 as f32, source.1 as f32],
    };
    let side = [f32::from(input.width), f32::from(input.height)];
    match &detector.head {
        Head::Ssd(head) => ssd(head, input, side, classes, heads, &mut list),
        Head::Grid(head) => cells(head, input, side, classes, heads, &mut list),
        Head::Yolo { candidates } => yolo(*candidates as usize, side, classes, heads, &mut list),
    }
    let Candidates { out, len, lost, .. } = list;
    let candidates = suppress(&mut out[..len], detector.overlap);
    let detections = out[..candidates].partition_point(|d| d.confidence >= detector.threshold);
    Ok(Found {
        detections,
        candidates,
        lost,
    })
}

/// Confidence below which a box is not even a near miss.
fn floor(threshold: f32) -> f32 {
    threshold / 2.0
}

/// The caller's list while it fills up.
struct Candidates<'a> {
    out: &'a mut [Detection],
    len: usize,
    lost: usize,
    floor: f32,
    scale: [f32; 2],
}

impl Candidates<'_> {
    /// Takes a box given by its corners as shares of the picture's sides.
    fn offer(&mut self, class: usize, confidence: f32, corners: [f32; 4], points: &Points) {
        let [left, top, right, bottom] = corners;
        if !(confidence.is_finite() && corners.iter().all(|value| value.is_finite())) {
            return;
        }
        let [width, height] = self.scale;
        let x = |value: f32| (value * width).clamp(0.0, width);
        let y = |value: f32| (value * height).clamp(0.0, height);
        let detection = Detection {
            class: class as u16,
            confidence: confidence.min(1.0),
            left: x(left),
            top: y(top),
            right: x(right.max(left)),
            bottom: y(bottom.max(top)),
            points: points.map(|[px, py]| [x(px), y(py)]),
        };
        if let Some(place) = self.out.get_mut(self.len) {
            *place = detection;
            self.len += 1;
            return;
        }
        self.lost += 1;
        let weakest = self
            .out
            .iter_mut()
            .min_by(|a, b| a.confidence.total_cmp(&b.confidence));
        if let Some(weakest) = weakest
            && weakest.confidence < detection.confidence
        {
            *weakest = detection;
        }
    }
}

/// Key points as shares of the picture's sides.
type Points = [[f32; 2]; MAX_POINTS];

const NO_POINTS: Points = [[0.0; 2]; MAX_POINTS];

fn ssd(
    head: &SsdHead,
    input: &InputSpec,
    [width, height]: [f32; 2],
    classes: usize,
    heads: &[f32],
    list: &mut Candidates<'_>,
) {
    let first = usize::from(head.background);
    let columns = classes + first;
    let (scores, boxes) = heads.split_at(head.candidates as usize * columns);
    let rows = scores.chunks_exact(columns).zip(boxes.chunks_exact(4));
    for (index, (row, values)) in rows.enumerate() {
        let activate = Activated::new(head.activation, row);
        for (class, value) in row[first..].iter().enumerate() {
            let confidence = activate.of(*value);
            // Written so that NaN is passed over.
            let near = confidence >= list.floor;
            if !near {
                continue;
            }
            let [a, b, c, d] = [values[0], values[1], values[2], values[3]];
            let corners = match &head.boxes {
                BoxCode::Corners => [a, b, c, d],
                BoxCode::PixelCorners => [a / width, b / height, c / width, d / height],
                BoxCode::Offsets(priors) => match prior(priors, input, index) {
                    Some([x, y, size]) => {
                        let [v0, v1] = priors.variance;
                        corners_of(
                            [(x + a * v0 * size) / width, (y + b * v0 * size) / height],
                            [
                                size * libm::expf(c * v1) / width,
                                size * libm::expf(d * v1) / height,
                            ],
                        )
                    }
                    None => continue,
                },
            };
            list.offer(class, confidence, corners, &NO_POINTS);
        }
    }
}

/// Centre and side of a prior in pixels of the input.
fn prior(priors: &Priors, input: &InputSpec, mut index: usize) -> Option<[f32; 3]> {
    for level in &priors.levels {
        let sizes = || level.sizes.iter().filter(|size| **size > 0);
        let many = sizes().count();
        let (columns, rows) = grid(input, level.stride)?;
        let here = columns * rows * many;
        if index >= here {
            index -= here;
            continue;
        }
        let cell = index / many;
        let size = *sizes().nth(index % many)?;
        let stride = f32::from(level.stride);
        return Some([
            ((cell % columns) as f32 + 0.5) * stride,
            ((cell / columns) as f32 + 0.5) * stride,
            f32::from(size),
        ]);
    }
    None
}

fn cells(
    head: &GridHead,
    input: &InputSpec,
    [width, height]: [f32; 2],
    classes: usize,
    heads: &[f32],
    list: &mut Candidates<'_>,
) {
    let levels = || {
        head.strides
            .iter()
            .filter_map(|stride| grid(input, *stride).map(|grid| (f32::from(*stride), grid)))
    };
    let all: usize = levels().map(|(_, (columns, rows))| columns * rows).sum();
    // The tensors of one kind lie side by side, so all strides make one long list of cells.
    let (scores, rest) = heads.split_at(all * classes);
    let (objects, rest) = rest.split_at(all);
    let (boxes, points) = rest.split_at(all * 4);
    let many = usize::from(head.points);
    let mut at = 0;
    for (stride, (columns, rows)) in levels() {
        for cell in 0..columns * rows {
            let index = at + cell;
            let row = &scores[index * classes..(index + 1) * classes];
            let object = Activated::new(head.activation, &[]).of(objects[index]);
            let activate = Activated::new(head.activation, row);
            for (class, value) in row.iter().enumerate() {
                let product = activate.of(*value).clamp(0.0, 1.0) * object.clamp(0.0, 1.0);
                let confidence = match head.confidence {
                    Confidence::Product => product,
                    Confidence::GeometricMean => libm::sqrtf(product),
                };
                let near = confidence >= list.floor;
                if !near {
                    continue;
                }
                let column = (cell % columns) as f32;
                let line = (cell / columns) as f32;
                let x = |value: f32| (column + value) * stride / width;
                let y = |value: f32| (line + value) * stride / height;
                let values = &boxes[4 * index..4 * index + 4];
                let corners = corners_of(
                    [x(values[0]), y(values[1])],
                    [
                        libm::expf(values[2]) * stride / width,
                        libm::expf(values[3]) * stride / height,
                    ],
                );
                let mut marks = NO_POINTS;
                let given = points[2 * many * index..2 * many * (index + 1)].chunks_exact(2);
                for (mark, pair) in marks.iter_mut().zip(given) {
                    *mark = [x(pair[0]), y(pair[1])];
                }
                list.offer(class, confidence, corners, &marks);
            }
        }
        at += columns * rows;
    }
}

fn yolo(
    candidates: usize,
    [width, height]: [f32; 2],
    classes: usize,
    heads: &[f32],
    list: &mut Candidates<'_>,
) {
    let row = |index: usize| &heads[index * candidates..(index + 1) * candidates];
    for class in 0..classes {
        for (index, confidence) in row(4 + class).iter().enumerate() {
            let near = *confidence >= list.floor;
            if near {
                let corners = corners_of(
                    [row(0)[index] / width, row(1)[index] / height],
                    [row(2)[index] / width, row(3)[index] / height],
                );
                list.offer(class, *confidence, corners, &NO_POINTS);
            }
        }
    }
}

fn corners_of([x, y]: [f32; 2], [width, height]: [f32; 2]) -> [f32; 4] {
    [
        x - width / 2.0,
        y - height / 2.0,
        x + width / 2.0,
        y + height / 2.0,
    ]
}

/// Makes probabilities of the values of one row.
enum Activated {
    Done,
    Sigmoid,
    Softmax { max: f32, sum: f32 },
}

impl Activated {
    fn new(activation: Activation, row: &[f32]) -> Self {
        match activation {
            Activation::Done => Self::Done,
            Activation::Sigmoid => Self::Sigmoid,
            Activation::Softmax => {
                let max = row.iter().copied().fold(f32::MIN, f32::max);
                let sum = row.iter().map(|value| libm::expf(value - max)).sum();
                Self::Softmax { max, sum }
            }
        }
    }

    fn of(&self, value: f32) -> f32 {
        match self {
            Self::Done => value,
            Self::Sigmoid => 1.0 / (1.0 + libm::expf(-value)),
            Self::Softmax { max, sum } => libm::expf(value - max) / sum,
        }
    }
}

/// Sorts by falling confidence and keeps of overlapping boxes of a class the first; returns how
/// many stay.
fn suppress(list: &mut [Detection], overlap: f32) -> usize {
    list.sort_unstable_by(|a, b| {
        let place = |d: &Detection| [d.left, d.top, d.right, d.bottom];
        b.confidence
            .total_cmp(&a.confidence)
            .then(a.class.cmp(&b.class))
            .then_with(|| {
                let pairs = place(a).into_iter().zip(place(b));
                pairs.fold(core::cmp::Ordering::Equal, |order, (a, b)| {
                    order.then(a.total_cmp(&b))
                })
            })
    });
    let mut kept = 0;
    for index in 0..list.len() {
        let candidate = list[index];
        let covered = list[..kept]
            .iter()
            .any(|k| k.class == candidate.class && k.overlap(&candidate) > overlap);
        if !covered {
            list[kept] = candidate;
            kept += 1;
        }
    }
    kept
}

/// Scores of a frame from its candidates, as [`decode`] left them (detections first, then near
/// misses), so that the lanes that choose pictures for a classifier choose for a detector too.
///
/// With t the threshold and cᵢ the confidences:
///
/// - `top1`, `top2`: the classes of the most confident candidate and of the first of another
///   class.
/// - `confidence`: c of the most confident detection; 1 − c of the best near miss where nothing
///   is detected (how sure the model is that nothing is there), 1 without any.
/// - `margin` = min over candidates of (cᵢ − t)/(1 − t) above and (t − cᵢ)/t below the threshold:
///   how little would have changed the answer. Near misses end at t/2, so it is at most ½.
/// - `entropy`: mean over candidates of the binary entropy of cᵢ in nats; 0 without candidates.
/// - `energy`, `novelty`, `u_novel`, `rarity`: those of [`score::score`] for the embedding and
///   for K class scores ln(c/(1 − c)), c the best candidate of the class (t/1000 at least).
/// - `u_unsure`: [`conformal`] of −margin, as there.
///
/// `logits` is room for K values, `scratch` as in [`score::score`].
///
/// # Errors
/// [`ScoreError`] of [`score::score`].
pub fn score(
    candidates: &[Detection],
    threshold: f32,
    embedding: &[f32],
    params: &Params<'_>,
    logits: &mut [f32],
    scratch: &mut [f32],
) -> Result<Scores, ScoreError> {
    let logit = |confidence: f32| {
        let c = confidence.clamp(threshold / 1000.0, 1.0 - 1e-6);
        libm::logf(c / (1.0 - c))
    };
    logits.fill(logit(0.0));
    for candidate in candidates {
        if let Some(best) = logits.get_mut(usize::from(candidate.class)) {
            *best = best.max(logit(candidate.confidence));
        }
    }
    let plain = score::score(logits, embedding, params, scratch)?;
    let mut margin = (threshold - floor(threshold)) / threshold;
    let mut entropy = 0.0;
    for candidate in candidates {
        let c = candidate.confidence;
        margin = margin.min(if c >= threshold {
            (c - threshold) / (1.0 - threshold)
        } else {
            (threshold - c) / threshold
        });
        entropy += binary_entropy(c) / candidates.len() as f32;
    }
    let first = candidates.first();
    let top1 = first.map_or(plain.top1, |best| best.class);
    let other = candidates.iter().find(|other| other.class != top1);
    let values = params.values();
    let table = &values[params.shape().layout().unsure];
    Ok(Scores {
        top1,
        top2: other.map_or(top1, |other| other.class),
        confidence: match first {
            Some(best) if best.confidence >= threshold => best.confidence,
            Some(best) => 1.0 - best.confidence,
            None => 1.0,
        },
        margin,
        entropy,
        u_unsure: conformal(table, params.calibrated(), -margin),
        ..plain
    })
}

/// −c ln c − (1 − c) ln(1 − c).
fn binary_entropy(c: f32) -> f32 {
    let term = |p: f32| {
        if p > 0.0 { -p * libm::logf(p) } else { 0.0 }
    };
    term(c) + term(1.0 - c)
}

#[cfg(test)]
mod tests;
