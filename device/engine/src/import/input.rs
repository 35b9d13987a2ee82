//! What the input tensor of an imported model holds.

use flywheel_shared::spec::{Colour, InputSpec, Layout, Scale};

use super::{ImportError, Options};
use crate::inspect::{Graph, Port};

/// The one input, which takes the picture.
pub(super) fn one_input(graph: &Graph) -> Result<Port, ImportError> {
    let inputs = graph.inputs();
    match <[Port; 1]>::try_from(inputs) {
        Ok([input]) => Ok(input),
        Err(inputs) => {
            let names: Vec<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
            Err(ImportError::Unsupported(format!(
                "the model has {} inputs ({}); one picture can be given",
                names.len(),
                names.join(", ")
            )))
        }
    }
}

/// What the input tensor must hold: from the file where it says so, then from the flags.
pub(super) fn input_spec(
    graph: &Graph,
    source: &Port,
    options: &Options,
    notes: &mut Vec<String>,
) -> Result<InputSpec, ImportError> {
    if ![1, 2, 10].contains(&source.kind) {
        return Err(ImportError::Unsupported(format!(
            "input {:?} does not take f32, f16 or u8 values",
            source.name
        )));
    }
    let Some([_, a, b, c]) = source.shape.as_deref() else {
        return Err(ImportError::Unsupported(format!(
            "input {:?} is no picture: it has not four axes (batch, channels, rows, columns)",
            source.name
        )));
    };
    let is_channel = |side: &Option<usize>| matches!(side, Some(1 | 3));
    let layout = match (options.layout, is_channel(a), is_channel(c)) {
        (Some(layout), _, _) => layout,
        (None, true, false) => Layout::Nchw,
        (None, false, true) => Layout::Nhwc,
        _ => {
            return Err(ImportError::ask(
                "--layout nchw or --layout nhwc",
                "the order of the input's axes is not clear from its shape",
            ));
        }
    };
    let (channels, height, width) = match layout {
        Layout::Nchw => (a, b, c),
        Layout::Nhwc => (c, a, b),
    };
    let channels = match channels {
        Some(1) => 1,
        Some(3) => 3,
        Some(other) => {
            return Err(ImportError::Unsupported(format!(
                "input {:?} has {other} channels; 1 (grey) or 3 (colour) can be given (is --layout right?)",
                source.name
            )));
        }
        // Left open: one can't be told from the other, and colour is what cameras give.
        None => 3,
    };
    let side = |side: &Option<usize>, given: Option<u16>| -> Result<u16, ImportError> {
        match (side, given) {
            (Some(side), Some(given)) if *side != usize::from(given) => Err(ImportError::flag(
                "--size",
                format!("the model's input has a side of {side}, not {given}"),
            )),
            (_, Some(given)) if given > 0 => Ok(given),
            (Some(side), _) => u16::try_from(*side).map_err(|_| {
                ImportError::Unsupported(format!("the input has a side of {side} pixels"))
            }),
            (None, _) => Err(ImportError::ask(
                "--size WIDTHxHEIGHT",
                "the model leaves the size of its input open",
            )),
        }
    };
    let mut spec = InputSpec {
        layout,
        ..InputSpec::new(
            side(width, options.size.map(|size| size.0))?,
            side(height, options.size.map(|size| size.1))?,
            channels,
        )
    };
    spec.scale = options
        .scale
        .or_else(|| match graph.metadata("Image.NominalPixelRange")? {
            "NominalRange_0_255" => Some(Scale::Byte),
            _ => None,
        })
        .unwrap_or_default();
    spec.colour = options
        .colour
        .or_else(|| match graph.metadata("Image.BitmapPixelFormat")? {
            "Bgr8" => Some(Colour::Bgr),
            _ => None,
        })
        .unwrap_or_default();
    spec.mean = three("--mean", &options.mean, channels, 0.0)?;
    spec.std = three("--std", &options.std, channels, 1.0)?;
    if spec.std.iter().any(|std| *std <= 0.0) {
        return Err(ImportError::flag("--std", "every value must be above 0"));
    }
    if options.mean.is_empty() && options.std.is_empty() && options.scale.is_none() {
        notes.push(format!(
            "Nothing says how the input is normalised: values go in from 0 to {}; if the model \
             was trained otherwise, give --scale, --mean, --std and --colour.",
            match spec.scale {
                Scale::Unit => 1,
                Scale::Byte => 255,
            }
        ));
    }
    Ok(spec)
}

fn three(
    flag: &'static str,
    given: &[f32],
    channels: u8,
    otherwise: f32,
) -> Result<[f32; 3], ImportError> {
    if !given.iter().all(|value| value.is_finite()) {
        return Err(ImportError::flag(flag, "every value must be finite"));
    }
    match given {
        [] => Ok([otherwise; 3]),
        [all] => Ok([*all; 3]),
        [a, b, c] if channels == 3 => Ok([*a, *b, *c]),
        _ => Err(ImportError::flag(
            flag,
            format!("give one value, or one for each of the {channels} channels"),
        )),
    }
}
