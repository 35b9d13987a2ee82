//! What an ONNX file says about itself, for a model that comes without a spec: enough to measure
//! it, and to refuse what no engine here runs.

use std::panic::{AssertUnwindSafe, catch_unwind};

use thiserror::Error;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::Factoid;
use tract_onnx::tract_hir::internal::DimLike;

use crate::engine::panic_text;

/// Most values of an output that is taken for class scores or an embedding.
const MAX_VALUES: usize = 1024;

/// The shapes of a classifier in an ONNX file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bare {
    /// Channels of the input: 1 or 3.
    pub channels: u8,
    /// Rows of the input.
    pub height: u16,
    /// Columns of the input.
    pub width: u16,
    /// Values of the first output.
    pub classes: u16,
    /// Values of the second output; 0 if there is none, or if it is too large for an embedding.
    pub embedding: u16,
}

/// Why a file is not a classifier that can be described.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the ONNX file cannot be run as an image classifier: {0}")]
pub struct BareError(String);

/// Reads the shapes from an ONNX file with one input, f32 NCHW with N = 1 (or open).
///
/// # Errors
/// [`BareError`] for bytes that are no ONNX, another input, or a first output that is not one row
/// of 1 to 1024 values.
pub fn describe(onnx: &[u8]) -> Result<Bare, BareError> {
    // Damaged bytes can make the loader panic; it leaves nothing half done.
    catch_unwind(AssertUnwindSafe(|| read(onnx)))
        .unwrap_or_else(|panic| Err(BareError(panic_text(&*panic).to_owned())))
}

fn read(onnx: &[u8]) -> Result<Bare, BareError> {
    let say = |error: TractError| BareError(format!("{error:#}"));
    let model = tract_onnx::onnx()
        .model_for_read(&mut std::io::Cursor::new(onnx))
        .map_err(say)?;
    let inputs = model.input_outlets().map_err(say)?.len();
    if inputs != 1 {
        return Err(BareError(format!("it has {inputs} inputs, not 1")));
    }
    let fact = model.input_fact(0).map_err(say)?;
    let sides: Vec<Option<usize>> = fact
        .shape
        .dims()
        .map(|dim| dim.concretize().and_then(|dim| dim.to_usize().ok()))
        .collect();
    let wrong = || {
        BareError(format!(
            "its input is {:?}, not 1 × channels (1 or 3) × rows × columns",
            fact.shape
        ))
    };
    let (channels, height, width) = match sides[..] {
        [None | Some(1), Some(c @ (1 | 3)), Some(h), Some(w)] if h > 0 && w > 0 => (
            c as u8,
            u16::try_from(h).map_err(|_| wrong())?,
            u16::try_from(w).map_err(|_| wrong())?,
        ),
        _ => return Err(wrong()),
    };
    let shape = [
        1,
        usize::from(channels),
        usize::from(height),
        usize::from(width),
    ];
    let model = model
        .with_input_fact(0, InferenceFact::dt_shape(f32::datum_type(), shape))
        .and_then(InferenceModelExt::into_typed)
        .map_err(say)?;
    let mut lengths = Vec::new();
    for index in 0..model.output_outlets().map_err(say)?.len() {
        let fact = model.output_fact(index).map_err(say)?;
        lengths.push(
            fact.shape
                .as_concrete()
                .map(|s| s.iter().product::<usize>()),
        );
    }
    let fitting = |length: Option<&Option<usize>>| {
        length
            .copied()
            .flatten()
            .filter(|length| (1..=MAX_VALUES).contains(length))
            .map(|length| length as u16)
    };
    let classes = fitting(lengths.first()).ok_or_else(|| {
        BareError(format!(
            "its first output has {:?} values, not 1 to {MAX_VALUES}",
            lengths.first().copied().flatten()
        ))
    })?;
    Ok(Bare {
        channels,
        height,
        width,
        classes,
        embedding: fitting(lengths.get(1)).unwrap_or(0),
    })
}
