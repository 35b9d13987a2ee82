//! Plain vector arithmetic in a fixed order, so that every machine rounds alike.

use crate::params::BLOCK;

/// Scales `embedding` to Euclidean length 1 into the front of `out` (at least as long); zeros stay
/// zeros.
///
/// Its length follows contrast and weather rather than what is seen; without it Mahalanobis
/// distances tell the unknown apart better (Müller & Hein 2025, 2505.18032).
pub fn normalise(embedding: &[f32], out: &mut [f32]) {
    let largest = largest(embedding);
    let out = &mut out[..embedding.len()];
    if largest == 0.0 {
        out.fill(0.0);
        return;
    }
    // By the largest value first, so that no square overflows or vanishes.
    for (place, &z) in out.iter_mut().zip(embedding) {
        *place = z / largest;
    }
    let scale = 1.0 / libm::sqrtf(sum(out, |z| z * z));
    for place in out {
        *place *= scale;
    }
}

/// Makes an overflow the largest finite value of its sign, and NaN the largest of all.
pub(super) fn saturate(value: f32) -> f32 {
    if value.is_nan() {
        f32::MAX
    } else {
        value.clamp(f32::MIN, f32::MAX)
    }
}

// Eight running results let the compiler use vector registers; the order of operations stays fixed.
const LANES: usize = 8;

/// Largest |value|; NaN counts as nothing.
pub(crate) fn largest(values: &[f32]) -> f32 {
    let larger = |max: f32, z: f32| if z.abs() > max { z.abs() } else { max };
    let mut most = [0.0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder().iter().copied().fold(0.0, larger);
    for chunk in chunks {
        for (max, &z) in most.iter_mut().zip(chunk) {
            *max = larger(*max, z);
        }
    }
    most.into_iter().fold(tail, larger)
}

/// Σ term(value).
#[inline(always)]
pub(crate) fn sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    sum_of(values, values, |x, _| term(x))
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |x, y| x * y)
}

pub(super) fn square_distance(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |x, y| (x - y) * (x - y))
}

/// Products of `x` with rows that are stored in blocks ([`BLOCK`]), a block at a time.
#[inline(always)]
pub(super) fn times_blocks(x: &[f32], blocks: &[f32], mut each: impl FnMut([f32; BLOCK])) {
    for block in blocks.chunks_exact(BLOCK * x.len()) {
        let mut sums = [0.0f32; BLOCK];
        for (column, &x) in block.as_chunks::<BLOCK>().0.iter().zip(x) {
            for (sum, value) in sums.iter_mut().zip(column) {
                *sum += x * value;
            }
        }
        each(sums);
    }
}

#[inline(always)]
fn sum_of(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(x, y)| term(*x, *y))
        .sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += term(*x, *y);
        }
    }
    sums.iter().sum::<f32>() + tail
}
