//! Plain vector arithmetic in a fixed order, so that every machine rounds alike.

/// Scales `embedding` to Euclidean length 1 into the front of `out` (at least as long); zeros stay
/// zeros.
///
/// Its length follows contrast and weather rather than what is seen; without it Mahalanobis
/// distances tell the unknown apart better (Müller & Hein 2025, 2505.18032).
pub fn normalise(embedding: &[f32], out: &mut [f32]) {
    let largest = embedding.iter().fold(0.0f32, |max, z| max.max(z.abs()));
    if largest == 0.0 {
        out[..embedding.len()].fill(0.0);
        return;
    }
    // By the largest value first, so that no square overflows or vanishes.
    let mut square = 0.0;
    for (place, &z) in out.iter_mut().zip(embedding) {
        *place = z / largest;
        square += *place * *place;
    }
    let scale = 1.0 / libm::sqrtf(square);
    for place in &mut out[..embedding.len()] {
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

// Eight running sums let the compiler use vector registers; the order of additions stays fixed.
const LANES: usize = 8;

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |x, y| x * y)
}

pub(super) fn square_distance(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |x, y| (x - y) * (x - y))
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
