//! From camera pixels to a network's input tensor: resize, colour, scale, layout.
//!
//! Training, evaluation and the device all call [`preprocess`], so that what a model sees cannot
//! drift between the three.

use flywheel_shared::spec::InputSpec;
use thiserror::Error;

use crate::Frame;

/// Columns of the source whose weights are kept while a column of the target is made; beyond it
/// (shrinking by more than 32) they are computed for each row again.
const MAX_TAPS: usize = 64;

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

/// Writes the input tensor of `frame` to `out`, NCHW with N = 1:
/// `out[c][y][x] = (p / 255 − mean[c]) / std[c]`.
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
    if (frame.width as usize, frame.height as usize) == (width, height) {
        copy(frame, spec, out);
        return Ok(());
    }
    let mut weights = [0.0; MAX_TAPS];
    for x in 0..width {
        let columns = Columns::new(x, width, frame.width as usize, &mut weights);
        for y in 0..height {
            let rows = Window::new(y, height, frame.height as usize);
            put(
                filtered(frame, &columns, &rows),
                frame,
                spec,
                y * width + x,
                out,
            );
        }
    }
    Ok(())
}

/// Frame and tensor have the same sides.
fn copy(frame: &Frame<'_>, spec: &InputSpec, out: &mut [f32]) {
    let plane = out.len() / usize::from(spec.channels);
    if (frame.channels, spec.channels) == (3, 1) {
        for (index, pixel) in frame.pixels.chunks_exact(3).enumerate() {
            let pixel = [0, 1, 2].map(|c| f32::from(pixel[c]));
            put(pixel, frame, spec, index, out);
        }
        return;
    }
    // One channel at a time, so that the compiler can use vector registers.
    let step = usize::from(frame.channels);
    for (c, out) in out.chunks_exact_mut(plane).enumerate() {
        let (mean, std) = (spec.mean[c], spec.std[c]);
        let from = frame.pixels[c % step..].iter().step_by(step);
        for (value, &pixel) in out.iter_mut().zip(from) {
            *value = (f32::from(pixel) / 255.0 - mean) / std;
        }
    }
}

/// Normalises one pixel into its places in the tensor.
fn put(pixel: [f32; 3], frame: &Frame<'_>, spec: &InputSpec, index: usize, out: &mut [f32]) {
    let plane = out.len() / usize::from(spec.channels);
    let pixel = match (frame.channels, spec.channels) {
        (3, 1) => [0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]; 3],
        _ => pixel,
    };
    for (c, value) in pixel.iter().enumerate().take(usize::from(spec.channels)) {
        out[c * plane + index] = (value / 255.0 - spec.mean[c]) / spec.std[c];
    }
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

/// The source pixels along one axis that make one target pixel.
struct Window {
    centre: f32,
    support: f32,
    first: usize,
    last: usize,
}

impl Window {
    fn new(target: usize, target_len: usize, source_len: usize) -> Self {
        let scale = source_len as f32 / target_len as f32;
        let support = scale.max(1.0);
        // In pixel indices: pixel i has its centre at i.
        let centre = (target as f32 + 0.5) * scale - 0.5;
        let first = (centre - support).ceil().max(0.0) as usize;
        let last = ((centre + support).floor().max(0.0) as usize).min(source_len - 1);
        Self {
            centre,
            support,
            first: first.min(last),
            last,
        }
    }

    /// Triangle filter; weights outside the image are absent, hence the division by their sum.
    fn weight(&self, index: usize) -> f32 {
        (1.0 - (index as f32 - self.centre).abs() / self.support).max(0.0)
    }
}

/// The columns of the source that make one column of the target, with their weights, which are the
/// same in every row.
struct Columns<'w> {
    first: usize,
    weights: &'w [f32],
    /// Where they do not fit the buffer: weights are computed as they are needed.
    wide: Option<Window>,
}

impl<'w> Columns<'w> {
    fn new(target: usize, target_len: usize, source_len: usize, buffer: &'w mut [f32]) -> Self {
        let window = Window::new(target, target_len, source_len);
        let taps = window.last - window.first + 1;
        let Some(weights) = buffer.get_mut(..taps) else {
            return Self {
                first: window.first,
                weights: &[],
                wide: Some(window),
            };
        };
        for (tap, weight) in weights.iter_mut().enumerate() {
            *weight = window.weight(window.first + tap);
        }
        Self {
            first: window.first,
            weights,
            wide: None,
        }
    }
}

fn filtered(frame: &Frame<'_>, columns: &Columns<'_>, rows: &Window) -> [f32; 3] {
    // The fourth value adds up the weights.
    let mut sum = [0.0; 4];
    let mut add = |pixel: [f32; 3], weight: f32| {
        let [r, g, b] = pixel;
        for (sum, value) in sum.iter_mut().zip([r, g, b, 1.0]) {
            *sum += weight * value;
        }
    };
    for y in rows.first..=rows.last {
        let row_weight = rows.weight(y);
        if row_weight == 0.0 {
            continue;
        }
        if let Some(window) = &columns.wide {
            for x in window.first..=window.last {
                add(read(frame, x, y), row_weight * window.weight(x));
            }
            continue;
        }
        let start = y * frame.width as usize + columns.first;
        if frame.channels == 1 {
            for (&pixel, weight) in frame.pixels[start..].iter().zip(columns.weights) {
                add([f32::from(pixel); 3], row_weight * weight);
            }
        } else {
            let pixels = frame.pixels[3 * start..].chunks_exact(3);
            for (pixel, weight) in pixels.zip(columns.weights) {
                add([0, 1, 2].map(|c| f32::from(pixel[c])), row_weight * weight);
            }
        }
    }
    let [r, g, b, total] = sum;
    [r, g, b].map(|value| value / total)
}

/// One pixel; gray is repeated.
fn read(frame: &Frame<'_>, x: usize, y: usize) -> [f32; 3] {
    let index = y * frame.width as usize + x;
    match frame.channels {
        1 => [f32::from(frame.pixels[index]); 3],
        _ => [0, 1, 2].map(|c| f32::from(frame.pixels[3 * index + c])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(width: u16, height: u16, channels: u8) -> InputSpec {
        InputSpec {
            width,
            height,
            channels,
            mean: [0.0; 3],
            std: [1.0; 3],
        }
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

    /// As the docstring says it, pixel by pixel.
    fn by_definition(frame: &Frame<'_>, spec: &InputSpec) -> Vec<f32> {
        let (width, height) = (usize::from(spec.width), usize::from(spec.height));
        let mut out = vec![0.0; spec.len()];
        for y in 0..height {
            let rows = Window::new(y, height, frame.height as usize);
            for x in 0..width {
                let columns = Window::new(x, width, frame.width as usize);
                let (mut sum, mut total) = ([0.0; 3], 0.0);
                for row in rows.first..=rows.last {
                    for column in columns.first..=columns.last {
                        let weight = rows.weight(row) * columns.weight(column);
                        total += weight;
                        for (sum, value) in sum.iter_mut().zip(read(frame, column, row)) {
                            *sum += weight * value;
                        }
                    }
                }
                let mut pixel = sum.map(|value| value / total);
                if (frame.channels, spec.channels) == (3, 1) {
                    pixel = [0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]; 3];
                }
                for (c, plane) in out.chunks_exact_mut(width * height).enumerate() {
                    plane[y * width + x] = (pixel[c] / 255.0 - spec.mean[c]) / spec.std[c];
                }
            }
        }
        out
    }

    #[test]
    fn fast_paths_give_the_very_values_of_the_definition() {
        let pixels: Vec<u8> = (0..420 * 36 * 3).map(|i| (i * 73 % 251) as u8).collect();
        // Equal sides, enlarging, shrinking, and shrinking by so much that weights don't fit.
        for (w, h) in [(32, 32), (24, 20), (40, 36), (96, 64), (420, 36)] {
            for (from, to) in [(1, 1), (1, 3), (3, 1), (3, 3)] {
                let frame = frame(&pixels[..w * h * from], w as u32, h as u32, from as u8);
                for (width, height) in [(32, 32), (5, 40)] {
                    let spec = InputSpec {
                        mean: [0.45, 0.5, 0.4],
                        std: [0.25, 0.2, 0.3],
                        ..spec(width, height, to)
                    };
                    let mut out = vec![0.0; spec.len()];
                    preprocess(&frame, &spec, &mut out).unwrap();
                    assert_eq!(
                        out,
                        by_definition(&frame, &spec),
                        "{w}×{h}×{from} to {spec:?}"
                    );
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
