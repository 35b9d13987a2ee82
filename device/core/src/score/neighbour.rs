//! How far an embedding lies from the nearest place where training items lie.

use super::vector::{dot, normalise, square_distance};
use crate::params::Params;

/// Distance |x − p| to the nearest prototype p, x the embedding at unit length: the k-nearest
/// neighbour score (Sun et al. 2022, 2204.06507) with k = 1 over a few unit-length prototypes of
/// each class in place of all training items; higher is less familiar. 0 to 2.
///
/// In the compact form of the parameters, with y = Q·x the coordinates in the subspace of largest
/// spread and ρ = √(1 − |y|²) the length of the rest, it is √(|y − y'|² + (ρ − ρ')²): the rests
/// count as if they pointed the same way.
///
/// `None` without prototypes. `scratch` holds at least 2·d values, whose content does not matter.
pub fn nearest_prototype(
    embedding: &[f32],
    params: &Params<'_>,
    scratch: &mut [f32],
) -> Option<f32> {
    let (unit, spare) = scratch.split_at_mut(embedding.len());
    normalise(embedding, unit);
    nearest(unit, params, spare)
}

/// The same for an embedding at unit length; `spare` is as long.
pub(super) fn nearest(unit: &[f32], params: &Params<'_>, spare: &mut [f32]) -> Option<f32> {
    let layout = params.shape().layout();
    let values = params.values();
    let prototypes = &values[layout.prototypes];
    if unit.is_empty() || prototypes.is_empty() {
        return None;
    }
    let dimensions = usize::from(params.shape().subspace);
    let place = if dimensions > 0 {
        let place = &mut spare[..=dimensions];
        coordinates(unit, &values[layout.subspace], place);
        &*place
    } else {
        unit
    };
    let square = prototypes
        .chunks_exact(place.len())
        .map(|prototype| square_distance(place, prototype))
        .fold(f32::INFINITY, f32::min);
    Some(libm::sqrtf(square))
}

/// Coordinates of `unit` (d values of length 1) in the subspace of the orthonormal `rows` (q × d),
/// and the length of what lies outside of it, into `out` (q + 1).
pub fn coordinates(unit: &[f32], rows: &[f32], out: &mut [f32]) {
    let Some((rest, inside)) = out.split_last_mut() else {
        return;
    };
    for (y, row) in inside.iter_mut().zip(rows.chunks_exact(unit.len())) {
        *y = dot(row, unit);
    }
    *rest = libm::sqrtf((1.0 - dot(inside, inside)).max(0.0));
}
