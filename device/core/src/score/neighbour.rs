//! How far an embedding lies from the nearest place where training items lie.

use super::compact;
use super::vector::{normalise, square_distance};
use crate::params::Params;

/// Distance |x − p| to the nearest prototype p, x the embedding at unit length: the k-nearest
/// neighbour score (Sun et al. 2022, 2204.06507) with k = 1 over a few unit-length prototypes of
/// each class in place of all training items; higher is less familiar. 0 to 2.
///
/// In the compact form of the parameters it is a lower bound of that ([`super::compact`]).
///
/// `None` without prototypes. `scratch` holds at least 2·d values, whose content does not matter.
pub fn nearest_prototype(
    embedding: &[f32],
    params: &Params<'_>,
    scratch: &mut [f32],
) -> Option<f32> {
    let (unit, spare) = scratch.split_at_mut(embedding.len());
    normalise(embedding, unit);
    if params.shape().subspace > 0 {
        Some(compact::distances(unit, &mut spare[..embedding.len()], params).1)
    } else {
        nearest(unit, params)
    }
}

/// The same for an embedding at unit length, in the whole form.
pub(super) fn nearest(unit: &[f32], params: &Params<'_>) -> Option<f32> {
    let prototypes = &params.values()[params.shape().layout().prototypes];
    if unit.is_empty() || prototypes.is_empty() {
        return None;
    }
    let square = prototypes
        .chunks_exact(unit.len())
        .map(|prototype| square_distance(unit, prototype))
        .fold(f32::INFINITY, f32::min);
    Some(libm::sqrtf(square))
}
