//! How much farther an embedding lies from every class than from the background.

use super::vector::{dot, normalise, saturate, square_distance};
use crate::params::Params;

/// Relative Mahalanobis distance minₖ |W(x−c) − mₖ|² − |W₀(x−c)|² (Ren et al. 2021, 2106.09022)
/// with x the embedding (d values, d > 0) at unit length, c the centre, W and W₀ the whitenings
/// within classes and of the background, mₖ the whitened class means; higher is less familiar.
///
/// `scratch` holds at least 2·d values, whose content does not matter.
pub fn relative_mahalanobis(embedding: &[f32], params: &Params<'_>, scratch: &mut [f32]) -> f32 {
    let (unit, white) = scratch.split_at_mut(embedding.len());
    normalise(embedding, unit);
    of_unit(unit, &mut white[..embedding.len()], params)
}

/// The same for an embedding at unit length, which is overwritten; `white` is as long.
pub(super) fn of_unit(unit: &mut [f32], white: &mut [f32], params: &Params<'_>) -> f32 {
    let dim = unit.len();
    let layout = params.shape().layout();
    let values = params.values();
    for (x, &mean) in unit.iter_mut().zip(params.centre()) {
        *x -= mean;
    }
    let centred = &*unit;
    let mut row = 0;
    let within = &values[layout.within];
    for (i, y) in white.iter_mut().enumerate() {
        *y = dot(&within[row..=row + i], &centred[..=i]);
        row += i + 1;
    }
    let mut nearest = f32::INFINITY;
    for (mean, &count) in values[layout.means].chunks_exact(dim).zip(params.counts()) {
        if count > 0.0 {
            nearest = nearest.min(square_distance(white, mean));
        }
    }
    let (mut row, mut background) = (0, 0.0f32);
    let whitening = &values[layout.background];
    for i in 0..dim {
        let y = dot(&whitening[row..=row + i], &centred[..=i]);
        background += y * y;
        row += i + 1;
    }
    saturate(nearest - background)
}
