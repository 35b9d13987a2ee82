//! How far an embedding lies from the nearest place where training items lie.

use super::vector::{normalise, square_distance};
use crate::params::Params;

/// Distance |x − p| to the nearest prototype p, x the embedding at unit length: the k-nearest
/// neighbour score (Sun et al. 2022, 2204.06507) with k = 1 over a few unit-length prototypes of
/// each class in place of all training items; higher is less familiar. 0 to 2.
///
/// `None` without prototypes. `scratch` holds at least d values, whose content does not matter.
pub fn nearest_prototype(
    embedding: &[f32],
    params: &Params<'_>,
    scratch: &mut [f32],
) -> Option<f32> {
    let unit = &mut scratch[..embedding.len()];
    normalise(embedding, unit);
    nearest(unit, params)
}

/// The same for an embedding at unit length.
pub(super) fn nearest(unit: &[f32], params: &Params<'_>) -> Option<f32> {
    let prototypes = params.prototypes();
    if unit.is_empty() || prototypes.is_empty() {
        return None;
    }
    let square = prototypes
        .chunks_exact(unit.len())
        .map(|prototype| square_distance(unit, prototype))
        .fold(f32::INFINITY, f32::min);
    Some(libm::sqrtf(square))
}
