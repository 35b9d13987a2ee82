//! Which head a detector has: from the shapes and names of its outputs, and from what it answers
//! to test pictures.

use flywheel_models::onnx::edit::Value;
use flywheel_shared::spec::{
    Activation, BoxCode, Confidence, Detector, GridHead, Head, InputSpec, MAX_LEVELS, MAX_POINTS,
    PriorLevel, Priors, SsdHead, grid,
};

use super::{BoxKind, ImportError, Options};

/// Smallest confidence of a detection unless told otherwise.
const THRESHOLD: f32 = 0.5;
/// Overlap above which a box is dropped unless told otherwise.
const OVERLAP: f32 = 0.45;
/// Variances of prior offsets, those of Liu et al. (1512.02325) and everyone since.
const VARIANCE: [f32; 2] = [0.1, 0.2];

/// A detector's head with its tensors in the order that it reads them.
pub struct Found {
    pub detector: Detector,
    pub classes: usize,
    pub values: Vec<Value>,
}

/// Finds the head; `answers` are the values of every output for every test picture.
pub fn find(
    values: &[Value],
    answers: &[Vec<Vec<f32>>],
    input: &InputSpec,
    options: &Options,
    notes: &mut Vec<String>,
) -> Result<Found, ImportError> {
    let shapes = || {
        values
            .iter()
            .map(|value| format!("{} {:?}", value.name, value.shape))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let (head, classes, order) = match values {
        [one] => yolo(one)?,
        [_, _] => ssd(values, answers, input, options, notes)?,
        _ => cells(values, answers, input, options, notes)?,
    }
    .ok_or_else(|| {
        ImportError::Unsupported(format!(
            "no detection head that is known has these outputs: {}; known are scores N×C with \
             boxes N×4, one tensor (4+K)×N, and cls, obj, bbox (and kps) for each stride",
            shapes()
        ))
    })?;
    let detector = Detector {
        head,
        threshold: options.threshold.unwrap_or(THRESHOLD),
        overlap: options.overlap.unwrap_or(OVERLAP),
    };
    device_core::detect::check(&detector, input, classes)
        .map_err(|error| ImportError::Unsupported(error.to_string()))?;
    if options.threshold.is_none() {
        notes.push(format!(
            "Boxes count from a confidence of {THRESHOLD}; give --threshold for another."
        ));
    }
    Ok(Found {
        detector,
        classes,
        values: order.into_iter().map(|at| values[at].clone()).collect(),
    })
}

/// Head, classes, and the outputs in the head's order.
type Guess = Result<Option<(Head, usize, Vec<usize>)>, ImportError>;

fn yolo(value: &Value) -> Guess {
    let [1, rows, candidates] = value.shape[..] else {
        return Ok(None);
    };
    // With more rows than columns it would be N × (5 + K), which has objectness too.
    if rows < 5 || candidates <= rows {
        return Ok(None);
    }
    let head = Head::Yolo {
        candidates: candidates as u32,
    };
    Ok(Some((head, rows - 4, vec![0])))
}

fn ssd(
    values: &[Value],
    answers: &[Vec<Vec<f32>>],
    input: &InputSpec,
    options: &Options,
    notes: &mut Vec<String>,
) -> Guess {
    let last = |at: usize| values[at].shape.last().copied().unwrap_or(0);
    let named = |at: usize| {
        let name = values[at].name.to_lowercase();
        name.contains("box") || name.contains("loc")
    };
    let boxes = match (last(0) == 4, last(1) == 4) {
        (false, true) => 1,
        (true, false) => 0,
        (true, true) if named(0) != named(1) => usize::from(named(1)),
        _ => return Ok(None),
    };
    let scores = 1 - boxes;
    let rows = |at: usize| values[at].shape.iter().product::<usize>() / last(at).max(1);
    let (candidates, columns) = (rows(boxes), last(scores));
    if candidates == 0 || rows(scores) != candidates {
        return Ok(None);
    }
    let all_scores = || answers.iter().map(|answer| answer[scores].as_slice());
    let sums_to_one = columns > 1
        && all_scores().all(|all| all.chunks_exact(columns).all(super::is_distribution));
    let background = match options.labels.len() {
        0 => sums_to_one || options.activation == Some(Activation::Softmax),
        labels if labels + 1 == columns => true,
        labels if labels == columns => false,
        labels => {
            return Err(ImportError::flag(
                "--labels",
                format!("there are {labels} names for {columns} columns of scores"),
            ));
        }
    };
    let activation = options.activation.unwrap_or_else(|| {
        if sums_to_one || all_scores().all(within_unit) {
            Activation::Done
        } else if background {
            Activation::Softmax
        } else {
            Activation::Sigmoid
        }
    });
    let code = match options.boxes {
        Some(kind) => kind,
        None if !options.priors.is_empty() => BoxKind::Offsets,
        None => box_kind(answers.iter().map(|answer| answer[boxes].as_slice()))?,
    };
    let code = match code {
        BoxKind::Corners => BoxCode::Corners,
        BoxKind::PixelCorners => BoxCode::PixelCorners,
        BoxKind::Offsets => BoxCode::Offsets(priors(&options.priors, candidates, input)?),
    };
    notes.push(format!(
        "An SSD-like head: {candidates} candidates, boxes as {}, {} background column.",
        match code {
            BoxCode::Corners => "corners in shares of the picture",
            BoxCode::PixelCorners => "corners in pixels",
            BoxCode::Offsets(_) => "offsets from priors",
        },
        if background { "with a" } else { "without a" }
    ));
    let head = Head::Ssd(SsdHead {
        candidates: candidates as u32,
        background,
        activation,
        boxes: code,
    });
    let classes = columns - usize::from(background);
    Ok(Some((head, classes, vec![scores, boxes])))
}

fn within_unit(values: &[f32]) -> bool {
    values.iter().all(|value| (-1e-3..=1.001).contains(value))
}

/// Corners are in order almost everywhere; offsets are not.
fn box_kind<'a>(all: impl Iterator<Item = &'a [f32]>) -> Result<BoxKind, ImportError> {
    let (mut ordered, mut rows, mut largest) = (0usize, 0usize, 0.0f32);
    for row in all.flat_map(|values| values.chunks_exact(4)) {
        rows += 1;
        ordered += usize::from(row[2] > row[0] && row[3] > row[1]);
        largest = row.iter().fold(largest, |max, v| max.max(v.abs()));
    }
    if ordered * 100 < rows * 95 {
        return Err(ImportError::ask(
            "--priors (\"STRIDE:SIZE,SIZE;STRIDE:SIZE\", in pixels of the input)",
            "the boxes are offsets from priors, which the file does not hold",
        ));
    }
    Ok(if largest <= 4.0 {
        BoxKind::Corners
    } else {
        BoxKind::PixelCorners
    })
}

fn priors(
    given: &[PriorLevel],
    candidates: usize,
    input: &InputSpec,
) -> Result<Priors, ImportError> {
    let mut levels = [PriorLevel::NONE; MAX_LEVELS];
    let Some(place) = levels.get_mut(..given.len()) else {
        return Err(ImportError::flag(
            "--priors",
            format!("at most {MAX_LEVELS} levels are known"),
        ));
    };
    place.copy_from_slice(given);
    let priors = Priors {
        variance: VARIANCE,
        levels,
    };
    let count = priors.count(input);
    if count != candidates {
        return Err(ImportError::flag(
            "--priors",
            format!("they make {count} boxes, the model has {candidates}"),
        ));
    }
    Ok(priors)
}

/// What a tensor of a grid head holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Class,
    Object,
    Box,
    Points,
}

impl Role {
    fn of(name: &str) -> Option<Self> {
        let name = name.to_lowercase();
        let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
        if has(&["kps", "kpt", "landm", "point"]) {
            Some(Self::Points)
        } else if has(&["box", "reg", "loc"]) {
            Some(Self::Box)
        } else if has(&["obj", "conf", "iou"]) {
            Some(Self::Object)
        } else if has(&["cls", "class", "score"]) {
            Some(Self::Class)
        } else {
            None
        }
    }
}

fn cells(
    values: &[Value],
    answers: &[Vec<Vec<f32>>],
    input: &InputSpec,
    options: &Options,
    notes: &mut Vec<String>,
) -> Guess {
    let mut tensors = Vec::new();
    for (at, value) in values.iter().enumerate() {
        let [1, cells, width] = value.shape[..] else {
            return Ok(None);
        };
        let stride = [4u16, 8, 16, 32, 64, 128]
            .into_iter()
            .find(|stride| grid(input, *stride).is_some_and(|(w, h)| w * h == cells));
        let (Some(role), Some(stride)) = (Role::of(&value.name), stride) else {
            return Ok(None);
        };
        tensors.push((role, stride, width, at));
    }
    tensors.sort_unstable();
    let of = |role: Role| tensors.iter().filter(move |tensor| tensor.0 == role);
    let strides: Vec<u16> = of(Role::Class).map(|tensor| tensor.1).collect();
    let width = |role: Role| of(role).next().map_or(0, |tensor| tensor.2);
    let (classes, points) = (width(Role::Class), width(Role::Points));
    for (role, wanted) in [
        (Role::Class, classes),
        (Role::Object, 1),
        (Role::Box, 4),
        (Role::Points, points),
    ] {
        let fits = of(role).map(|tensor| tensor.1).eq(strides.iter().copied())
            && of(role).all(|tensor| tensor.2 == wanted);
        if !(fits || role == Role::Points && points == 0) {
            return Ok(None);
        }
    }
    if strides.is_empty() || strides.len() > MAX_LEVELS || points > 2 * MAX_POINTS {
        return Ok(None);
    }
    let mut levels = [0; MAX_LEVELS];
    levels[..strides.len()].copy_from_slice(&strides);
    let scores = tensors
        .iter()
        .filter(|tensor| matches!(tensor.0, Role::Class | Role::Object));
    let done = scores
        .clone()
        .all(|tensor| answers.iter().all(|answer| within_unit(&answer[tensor.3])));
    let activation = options.activation.unwrap_or(if done {
        Activation::Done
    } else {
        Activation::Sigmoid
    });
    let confidence = options.confidence.unwrap_or(if points > 0 {
        Confidence::GeometricMean
    } else {
        Confidence::Product
    });
    notes.push(format!(
        "A grid head: strides {strides:?}, {} key points, confidence as the {} of class score and \
         objectness; give --confidence for the other.",
        points / 2,
        match confidence {
            Confidence::Product => "product",
            Confidence::GeometricMean => "geometric mean",
        }
    ));
    let head = Head::Grid(GridHead {
        strides: levels,
        points: (points / 2) as u8,
        activation,
        confidence,
    });
    Ok(Some((
        head,
        classes,
        tensors.into_iter().map(|tensor| tensor.3).collect(),
    )))
}
