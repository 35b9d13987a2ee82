//! Both distances in few dimensions: what takes a device a tenth of the time where embeddings are
//! wide.
//!
//! Both covariances of the relative Mahalanobis distance ([`super::mahalanobis`]) have the same
//! ridge, so the two distances differ in few directions only. In the basis that whitens the spread
//! within classes and makes the spread between them diagonal (Fisher's discriminants), with λᵢ the
//! spread between classes along i, all but r ≤ K − 1 of them cancel:
//!
//! minₖ |W(x−c) − mₖ|² − |W₀(x−c)|² = minₖ |t − P(μₖ−c)|² − Σᵢ tᵢ²/(1 + λᵢ),  t = P·x − P·c.
//!
//! The nearest prototype ([`super::neighbour`]) is sought in the q principal dimensions of the
//! embeddings: with y = Q·x and ρ = √(1 − |y|²) the length of the rest, by
//! √(|y − y'|² + (ρ − ρ')²), as if the rests pointed the same way. On MNIST with a digit held out,
//! q = 24 tells it apart as well as all 64 values do. As (y, ρ) has length 1, that is √(2 − 2·cos).

use super::mahalanobis::nearest;
use super::vector::{dot, saturate, times_blocks};
use crate::params::{BLOCK, Params};

/// Relative Mahalanobis distance and distance to the nearest prototype of an embedding at unit
/// length, which is overwritten; `outputs` is as long. For parameters of the compact form.
pub(super) fn distances(unit: &mut [f32], outputs: &mut [f32], params: &Params<'_>) -> (f32, f32) {
    let (shape, values) = (params.shape(), params.values());
    let layout = shape.layout();
    let (rank, dimensions) = (usize::from(shape.rank), usize::from(shape.subspace));
    let (blocks, _) = outputs.as_chunks_mut::<BLOCK>();
    let mut blocks = blocks.iter_mut();
    times_blocks(unit, &values[layout.projection], |sums| {
        if let Some(block) = blocks.next() {
            *block = sums;
        }
    });
    let (t, y) = outputs.split_at_mut(rank);
    for (t, offset) in t.iter_mut().zip(&values[layout.offsets]) {
        *t -= offset;
    }
    let gains = t.iter().zip(&values[layout.gains]);
    let shared: f32 = gains.map(|(t, gain)| t * t * gain).sum();
    let novelty = nearest(t, &values[layout.means], params.counts()) - shared;

    let y = &y[..dimensions];
    let place = &mut unit[..=dimensions];
    place[..dimensions].copy_from_slice(y);
    place[dimensions] = libm::sqrtf((1.0 - dot(y, y)).max(0.0));
    let mut most = [-1.0f32; BLOCK];
    times_blocks(place, &values[layout.prototypes], |sums| {
        for (most, sum) in most.iter_mut().zip(sums) {
            *most = if sum > *most { sum } else { *most };
        }
    });
    let cosine = most.into_iter().fold(-1.0f32, f32::max);
    (
        saturate(novelty),
        libm::sqrtf((2.0 - 2.0 * cosine).max(0.0)),
    )
}
