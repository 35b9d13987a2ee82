//! From camera pixels to a network's input tensor: resize, colour, scale, layout.
//!
//! Training, evaluation and the device all call [`preprocess`], so that what a model sees cannot
//! drift between the three.

use flywheel_shared::spec::{Colour, InputSpec, Layout, Scale};
use thiserror::Error;

use crate::Frame;
use crate::resample::resample;

/// Why a frame cannot be made into an input tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InputError {
    /// The frame's sides are zero, or so large that their product overflows.
    #[error("frame is {width}×{height}; both sides must be at least 1 and of sane size")]
    FrameSize {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// Neither gray nor RGB.
    #[error("{what} has {found} channels; use 1 (gray) or 3 (RGB)")]
    Channels {
        /// `frame` or `input spec`.
        what: &'static str,
        /// The number found.
        found: u8,
    },
    /// The pixel buffer does not match the frame's sides.
    #[error("frame buffer has {found} bytes, but its sides say {want}")]
    FrameLen {
        /// Bytes in the buffer.
        found: usize,
        /// `width · height · channels`.
        want: usize,
    },
    /// The input spec has an empty side, or a mean or deviation that cannot be divided by.
    #[error(
        "input spec: {0} is not usable (sides at least 1, mean finite, std finite and above 0)"
    )]
    Spec(&'static str),
    /// The caller's tensor buffer has the wrong length.
    #[error("input tensor buffer has {found} values, the spec wants {want}")]
    OutLen {
        /// Values in the buffer.
        found: usize,
        /// `channels · height · width` of the spec.
        want: usize,
    },
}

/// Writes the input tensor of `frame` to `out` in the spec's layout, N = 1:
/// `(p / scale − mean[c]) / std[c]`, with c the channel in the tensor's own order.
///
/// `p` is the frame resized with a triangle filter around half-pixel centres: bilinear when
/// enlarging; when shrinking, the filter widens with the scale, so that a photograph does not
/// alias (as Pillow's `BILINEAR` does). Gray from RGB is BT.601 luma; RGB from gray repeats it.
/// Allocates nothing.
///
/// # Errors
/// [`InputError`], before anything is written, if frame, spec and buffer do not fit together.
pub fn preprocess(frame: &Frame<'_>, spec: &InputSpec, out: &mut [f32]) -> Result<(), InputError> {
    check(frame, spec, out.len())?;
    let (width, height) = (usize::from(spec.width), usize::from(spec.height));
    if (frame.width as usize, frame.height as usize) != (width, height) {
        resample(frame, width, height, |x, y, pixel| {
            put(pixel, frame, spec, y * width + x, out);
        });
    } else if frame.channels <= spec.channels && spec.layout == Layout::Nchw {
        copy(frame, spec, out);
    } else {
        let step = usize::from(frame.channels);
        for (index, pixel) in frame.pixels.chunks_exact(step).enumerate() {
            let pixel = [0, 1, 2].map(|c| f32::from(pixel[c.min(step - 1)]));
            put(pixel, frame, spec, index, out);
        }
    }
    Ok(())
}

/// Where channel `c` of the tensor comes from.
fn source(spec: &InputSpec, c: usize) -> usize {
    match spec.colour {
        Colour::Rgb => c,
        Colour::Bgr => 2 - c,
    }
}

/// Frame and tensor have the same sides, and the tensor's channels lie one after the other: one
/// channel at a time, so that the compiler can use vector registers.
fn copy(frame: &Frame<'_>, spec: &InputSpec, out: &mut [f32]) {
    let plane = out.len() / usize::from(spec.channels);
    let step = usize::from(frame.channels);
    let divisor = spec.scale.divisor();
    for (c, out) in out.chunks_exact_mut(plane).enumerate() {
        let (mean, std) = (spec.mean[c], spec.std[c]);
        let from = frame.pixels[source(spec, c).min(step - 1)..].iter();
        for (value, &pixel) in out.iter_mut().zip(from.step_by(step)) {
            *value = (f32::from(pixel) / divisor - mean) / std;
        }
    }
}

/// Normalises one pixel into its places in the tensor; `index` counts pixels.
fn put(pixel: [f32; 3], frame: &Frame<'_>, spec: &InputSpec, index: usize, out: &mut [f32]) {
    let channels = usize::from(spec.channels);
    let plane = out.len() / channels;
    let pixel = match (frame.channels, spec.channels) {
        (3, 1) => [0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]; 3],
        _ => pixel,
    };
    for c in 0..channels {
        let at = match spec.layout {
            Layout::Nchw => c * plane + index,
            Layout::Nhwc => index * channels + c,
        };
        out[at] = (pixel[source(spec, c)] / spec.scale.divisor() - spec.mean[c]) / spec.std[c];
    }
}

/// Writes `frame` at another size and number of channels to `out` (u8, HWC), by the filter of
/// [`preprocess`].
///
/// # Errors
/// As [`preprocess`].
pub fn resize(
    frame: &Frame<'_>,
    width: u16,
    height: u16,
    channels: u8,
    out: &mut [u8],
) -> Result<(), InputError> {
    let spec = InputSpec {
        layout: Layout::Nhwc,
        scale: Scale::Byte,
        ..InputSpec::new(width, height, channels)
    };
    if out.len() != spec.len() {
        return Err(InputError::OutLen {
            found: out.len(),
            want: spec.len(),
        });
    }
    let mut values = vec![0.0; spec.len()];
    preprocess(frame, &spec, &mut values)?;
    for (place, value) in out.iter_mut().zip(values) {
        *place = value.round() as u8;
    }
    Ok(())
}

fn check(frame: &Frame<'_>, spec: &InputSpec, out: usize) -> Result<(), InputError> {
    for (what, found) in [("frame", frame.channels), ("input spec", spec.channels)] {
        if !matches!(found, 1 | 3) {
            return Err(InputError::Channels { what, found });
        }
    }
    let size = InputError::FrameSize {
        width: frame.width,
        height: frame.height,
    };
    let want = (frame.width as usize)
        .checked_mul(frame.height as usize)
        .and_then(|area| area.checked_mul(usize::from(frame.channels)))
        .filter(|bytes| *bytes > 0)
        .ok_or(size)?;
    if frame.pixels.len() != want {
        return Err(InputError::FrameLen {
            found: frame.pixels.len(),
            want,
        });
    }
    if spec.width == 0 || spec.height == 0 {
        return Err(InputError::Spec("a side"));
    }
    let used = usize::from(spec.channels);
    if !spec.mean[..used].iter().all(|mean| mean.is_finite()) {
        return Err(InputError::Spec("a mean"));
    }
    if !spec.std[..used]
        .iter()
        .all(|std| std.is_finite() && *std > 0.0)
    {
        return Err(InputError::Spec("a std"));
    }
    if out != spec.len() {
        return Err(InputError::OutLen {
            found: out,
            want: spec.len(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(width: u16, height: u16, channels: u8) -> InputSpec {
        InputSpec::new(width, height, channels)
    }

    fn frame(pixels: &[u8], width: u32, height: u32, channels: u8) -> Frame<'_> {
        Frame {
            pixels,
            width,
            height,
            channels,
        }
    }

    #[test]
    fn equal_size_only_normalises_and_changes_layout() {
        let pixels = [0, 51, 102, 153, 204, 255];
        let spec = InputSpec {
            mean: [0.5, 0.0, 0.2],
            std: [0.5, 1.0, 0.4],
            ..spec(2, 1, 3)
        };
        let mut out = [0.0; 6];
        preprocess(&frame(&pixels, 2, 1, 3), &spec, &mut out).unwrap();
        let want = [-1.0, 0.2, 0.2, 0.8, 0.5, 2.0];
        for (found, want) in out.iter().zip(want) {
            assert!((found - want).abs() < 1e-6, "{out:?}");
        }
    }

    #[test]
    fn layout_colour_order_and_scale_follow_the_spec() {
        let pixels = [10, 20, 30, 40, 50, 60];
        let spec = InputSpec {
            layout: Layout::Nhwc,
            colour: Colour::Bgr,
            scale: Scale::Byte,
            // In the tensor's order: blue first.
            mean: [1.0, 2.0, 3.0],
            ..spec(2, 1, 3)
        };
        let mut out = [0.0; 6];
        preprocess(&frame(&pixels, 2, 1, 3), &spec, &mut out).unwrap();
        assert_eq!(out, [29.0, 18.0, 7.0, 59.0, 48.0, 37.0]);
        let planes = InputSpec {
            layout: Layout::Nchw,
            ..spec
        };
        preprocess(&frame(&pixels, 2, 1, 3), &planes, &mut out).unwrap();
        assert_eq!(out, [29.0, 59.0, 18.0, 48.0, 7.0, 37.0]);
    }

    #[test]
    fn enlarging_is_bilinear_with_half_pixel_centres() {
        // A 2-pixel step enlarged to 4: centres fall at −0.25, 0.25, 0.75 and 1.25.
        let mut out = [0.0; 4];
        preprocess(&frame(&[0, 255], 2, 1, 1), &spec(4, 1, 1), &mut out).unwrap();
        for (found, want) in out.iter().zip([0.0, 0.25, 0.75, 1.0]) {
            assert!((found - want).abs() < 1e-6, "{out:?}");
        }
    }

    #[test]
    fn shrinking_averages_instead_of_skipping() {
        // Alternating black and white lines are mid-gray from afar; point sampling would alias.
        let pixels: Vec<u8> = (0..64 * 64)
            .map(|i| if i % 2 == 0 { 0 } else { 255 })
            .collect();
        let mut out = [0.0; 64];
        preprocess(&frame(&pixels, 64, 64, 1), &spec(8, 8, 1), &mut out).unwrap();
        assert!(out.iter().all(|v| (v - 0.5).abs() < 0.05), "{out:?}");
    }

    #[test]
    fn equal_sides_take_the_short_way_to_the_same_values() {
        let pixels: Vec<u8> = (0..5 * 4 * 3).map(|i| (i * 73 % 251) as u8).collect();
        for (from, to) in [(1, 1), (1, 3), (3, 1), (3, 3)] {
            for layout in [Layout::Nchw, Layout::Nhwc] {
                for colour in [Colour::Rgb, Colour::Bgr] {
                    let spec = InputSpec {
                        mean: [0.45, 0.5, 0.4],
                        std: [0.25, 0.2, 0.3],
                        layout,
                        colour,
                        ..InputSpec::new(5, 4, to)
                    };
                    let frame = frame(&pixels[..5 * 4 * usize::from(from)], 5, 4, from);
                    let mut short = vec![0.0; spec.len()];
                    preprocess(&frame, &spec, &mut short).unwrap();
                    let mut long = vec![0.0; spec.len()];
                    resample(&frame, 5, 4, |x, y, pixel| {
                        put(pixel, &frame, &spec, y * 5 + x, &mut long);
                    });
                    for (a, b) in short.iter().zip(&long) {
                        assert!(
                            (a - b).abs() < 1e-5,
                            "{from} to {to}, {layout:?}, {colour:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_flat_image_stays_flat_at_every_size() {
        let pixels = [77; 13 * 7 * 3];
        for (w, h) in [(1, 1), (5, 3), (13, 7), (32, 32), (40, 2)] {
            let mut out = vec![0.0; 3 * usize::from(w) * usize::from(h)];
            preprocess(&frame(&pixels, 13, 7, 3), &spec(w, h, 3), &mut out).unwrap();
            assert!(out.iter().all(|v| (v - 77.0 / 255.0).abs() < 1e-5));
        }
    }

    #[test]
    fn gray_and_rgb_convert_both_ways() {
        let mut rgb = [0.0; 3];
        preprocess(&frame(&[102], 1, 1, 1), &spec(1, 1, 3), &mut rgb).unwrap();
        assert!(rgb.iter().all(|v| (v - 0.4).abs() < 1e-6));
        let mut gray = [0.0; 1];
        preprocess(&frame(&[255, 0, 0], 1, 1, 3), &spec(1, 1, 1), &mut gray).unwrap();
        assert!((gray[0] - 0.299).abs() < 1e-6);
    }

    #[test]
    fn every_mismatch_has_its_own_error() {
        let pixels = [0; 12];
        let good = frame(&pixels, 2, 2, 3);
        let mut out = [0.0; 12];
        let mut error = |frame: Frame<'_>, spec: InputSpec, len: usize| {
            preprocess(&frame, &spec, &mut out[..len]).unwrap_err()
        };
        let cut = Frame {
            pixels: &pixels[..11],
            ..good
        };
        assert!(matches!(
            error(cut, spec(2, 2, 3), 12),
            InputError::FrameLen {
                found: 11,
                want: 12
            }
        ));
        let empty = Frame {
            pixels: &[],
            width: 0,
            ..good
        };
        assert!(matches!(
            error(empty, spec(2, 2, 3), 12),
            InputError::FrameSize { .. }
        ));
        let huge = Frame {
            width: u32::MAX,
            height: u32::MAX,
            ..good
        };
        assert!(matches!(
            error(huge, spec(2, 2, 3), 12),
            InputError::FrameSize { .. } | InputError::FrameLen { .. }
        ));
        let two = Frame {
            channels: 2,
            ..good
        };
        assert!(matches!(
            error(two, spec(2, 2, 3), 12),
            InputError::Channels { what: "frame", .. }
        ));
        assert!(matches!(
            error(good, spec(2, 2, 4), 12),
            InputError::Channels {
                what: "input spec",
                ..
            }
        ));
        assert!(matches!(
            error(good, spec(2, 2, 3), 11),
            InputError::OutLen {
                found: 11,
                want: 12
            }
        ));
        assert!(matches!(
            error(good, spec(0, 2, 3), 0),
            InputError::Spec("a side")
        ));
        let flat = InputSpec {
            std: [1.0, 0.0, 1.0],
            ..spec(2, 2, 3)
        };
        assert_eq!(error(good, flat, 12), InputError::Spec("a std"));
    }
}
