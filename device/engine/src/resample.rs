//! The triangle filter that resizes pictures, one axis after the other and without a heap.
//!
//! Rows first: a target row is a weighted sum of source rows, which the compiler turns into vector
//! instructions, since it runs along the bytes of the picture. Then each target column is a weighted
//! sum within that row. A strip of columns at a time, so that the row fits the stack.

use crate::Frame;

/// Most source columns of a strip.
const STRIP: usize = 512;
/// Most target columns of a strip.
const TARGETS: usize = 256;
/// Most weights of a strip.
const WEIGHTS: usize = 3 * STRIP;

/// Calls `put(x, y, pixel)` for every pixel of `frame` at `width` × `height`; gray is repeated.
///
/// The frame's buffer must be as long as its sides say, and no side may be 0.
pub(crate) fn resample(
    frame: &Frame<'_>,
    width: usize,
    height: usize,
    mut put: impl FnMut(usize, usize, [f32; 3]),
) {
    let mut strip = Strip::new();
    let mut start = 0;
    while start < width {
        let end = strip.fill(start, width, frame.width as usize);
        if end == start {
            // The window of this one column is wider than a strip.
            for y in 0..height {
                put(start, y, filtered(frame, (start, width), (y, height)));
            }
            start += 1;
            continue;
        }
        for y in 0..height {
            strip.sum_rows(frame, y, height);
            for x in start..end {
                put(x, y, strip.pixel(x - start, usize::from(frame.channels)));
            }
        }
        start = end;
    }
}

/// Some neighbouring target columns, and the source columns that make them.
struct Strip {
    /// First and last source column, and one behind it.
    from: usize,
    to: usize,
    /// Of each target column: first source column from `from`, first weight, one behind the last.
    columns: [(u16, u16, u16); TARGETS],
    /// Weights that add up to 1 for each target column.
    weights: [f32; WEIGHTS],
    /// The source columns of one target row, channels interleaved.
    row: [f32; 3 * STRIP],
}

impl Strip {
    fn new() -> Self {
        Self {
            from: 0,
            to: 0,
            columns: [(0, 0, 0); TARGETS],
            weights: [0.0; WEIGHTS],
            row: [0.0; 3 * STRIP],
        }
    }

    /// Takes as many target columns from `start` on as fit; returns one behind the last.
    fn fill(&mut self, start: usize, width: usize, source: usize) -> usize {
        self.from = Window::new(start, width, source).first;
        self.to = self.from;
        let mut used = 0;
        for x in start..width.min(start + TARGETS) {
            let window = Window::new(x, width, source);
            let taps = window.last + 1 - window.first;
            if window.last + 1 - self.from > STRIP || used + taps > WEIGHTS {
                return x;
            }
            self.to = self.to.max(window.last + 1);
            let total = window.total();
            let weights = &mut self.weights[used..used + taps];
            for (weight, index) in weights.iter_mut().zip(window.first..) {
                *weight = window.weight(index) / total;
            }
            // All three are below the lengths above.
            self.columns[x - start] = (
                (window.first - self.from) as u16,
                used as u16,
                (used + taps) as u16,
            );
            used += taps;
        }
        width.min(start + TARGETS)
    }

    /// Sums up the source rows of target row `y`.
    fn sum_rows(&mut self, frame: &Frame<'_>, y: usize, height: usize) {
        let channels = usize::from(frame.channels);
        let row = &mut self.row[..(self.to - self.from) * channels];
        row.fill(0.0);
        let window = Window::new(y, height, frame.height as usize);
        let total = window.total();
        for index in window.first..=window.last {
            let weight = window.weight(index) / total;
            let start = (index * frame.width as usize + self.from) * channels;
            for (sum, &pixel) in row.iter_mut().zip(&frame.pixels[start..]) {
                *sum += weight * f32::from(pixel);
            }
        }
    }

    /// A target column of the row that was summed up.
    fn pixel(&self, column: usize, channels: usize) -> [f32; 3] {
        let (first, from, to) = self.columns[column];
        let weights = &self.weights[usize::from(from)..usize::from(to)];
        let row = &self.row[usize::from(first) * channels..];
        if channels == 1 {
            return [row.iter().zip(weights).map(|(value, w)| w * value).sum(); 3];
        }
        let mut sum = [0.0; 3];
        for (pixel, weight) in row.chunks_exact(3).zip(weights) {
            for (sum, value) in sum.iter_mut().zip(pixel) {
                *sum += weight * value;
            }
        }
        sum
    }
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

    fn total(&self) -> f32 {
        (self.first..=self.last).map(|i| self.weight(i)).sum()
    }
}

/// One pixel, by definition.
fn filtered(frame: &Frame<'_>, column: (usize, usize), row: (usize, usize)) -> [f32; 3] {
    let columns = Window::new(column.0, column.1, frame.width as usize);
    let rows = Window::new(row.0, row.1, frame.height as usize);
    let mut sum = [0.0; 3];
    for y in rows.first..=rows.last {
        for x in columns.first..=columns.last {
            let weight = rows.weight(y) * columns.weight(x);
            for (sum, value) in sum.iter_mut().zip(read(frame, x, y)) {
                *sum += weight * value;
            }
        }
    }
    let total = rows.total() * columns.total();
    sum.map(|value| value / total)
}

/// One pixel of the source; gray is repeated.
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

    #[test]
    fn strips_give_what_the_definition_gives() {
        let pixels: Vec<u8> = (0..3 * 2000 * 4 + 3 * 150 * 90)
            .map(|i| (i * 73 % 251) as u8)
            .collect();
        // Shrinking, enlarging, several strips of columns, many targets in one strip, and a window
        // that is wider than a strip.
        for (from, to) in [
            ((150, 90), (32, 32)),
            ((24, 20), (32, 48)),
            ((1400, 4), (700, 3)),
            ((40, 3), (600, 5)),
            ((2000, 4), (3, 2)),
            ((7, 5), (7, 9)),
        ] {
            for channels in [1, 3] {
                let frame = Frame {
                    pixels: &pixels[..from.0 * from.1 * channels],
                    width: from.0 as u32,
                    height: from.1 as u32,
                    channels: channels as u8,
                };
                let mut count = 0;
                resample(&frame, to.0, to.1, |x, y, pixel| {
                    count += 1;
                    let wanted = filtered(&frame, (x, to.0), (y, to.1));
                    for (found, wanted) in pixel.into_iter().zip(wanted) {
                        let off = (found - wanted).abs();
                        assert!(
                            off < 2e-3,
                            "{from:?} to {to:?} at {x}, {y}: {found} {wanted}"
                        );
                    }
                });
                assert_eq!(count, to.0 * to.1);
            }
        }
    }
}
