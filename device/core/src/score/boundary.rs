//! How far an embedding lies from the decision boundaries around it.

use super::vector::{saturate, square_distance};
use crate::params::Params;

/// Regularised distance to the decision boundaries, fDBD (Liu & Qin 2024, 2312.11536, eq. 8): the
/// mean over the classes k ≠ top of |z_top − zₖ| / ‖w_top − wₖ‖, divided by ‖h − μ‖, with z the
/// logits, h the raw embedding, μ the mean of training embeddings, and wₖ the weights of class k
/// in the head that makes z from h. *Lower* is less familiar. A pair of classes with equal weights
/// has no boundary and counts as 0.
///
/// `None` without the head's parameters, or if the slices do not fit them.
pub fn boundary_distance(logits: &[f32], embedding: &[f32], params: &Params<'_>) -> Option<f32> {
    let (mean, inverse) = params.head()?;
    let classes = usize::from(params.shape().classes);
    if logits.len() != classes || embedding.len() != mean.len() {
        return None;
    }
    let (top, _) = super::top_two(logits);
    let mut sum = 0.0f32;
    for (k, &logit) in logits.iter().enumerate() {
        if k != top {
            sum += (logits[top] - logit).abs() * inverse[pair(top, k)];
        }
    }
    let others = (classes.max(2) - 1) as f32;
    let spread = libm::sqrtf(square_distance(embedding, mean));
    Some(saturate(sum / others / spread.max(f32::MIN_POSITIVE)))
}

/// Place of the pair (a, b), a ≠ b, in a strict lower triangle by rows.
pub fn pair(a: usize, b: usize) -> usize {
    let (high, low) = (a.max(b), a.min(b));
    high * (high - 1) / 2 + low
}
