//! Score parameters of a model that nothing is known about yet: one that was imported without
//! pictures to calibrate on.

use device_core::params::{Params, ParamsError, Shape};

use super::TABLE;

/// Span of energies that the table of novelty covers, in nats on either side of 0. Logits beyond
/// it are rare, and u keeps their order there too.
const ENERGY: f32 = 64.0;

/// Parameters for K classes, without statistics of the embedding: temperature 1, and straight
/// lines for conformal tables, so that u rises with −margin and with energy. The order of frames
/// is right, which is all that the trigger's own quantiles need; u is no probability.
///
/// # Errors
/// [`ParamsError::Shape`] for a number of classes that parameters can't hold.
pub fn neutral(classes: usize) -> Result<Vec<u8>, ParamsError> {
    let classes = u16::try_from(classes).unwrap_or(u16::MAX);
    let shape = Shape::plain(classes, 0, TABLE).check()?;
    let layout = shape.layout();
    let mut values = vec![0.0f32; shape.values()];
    values[layout.temperature] = 1.0;
    values[layout.calibrated] = 1.0;
    let mut line = |range: std::ops::Range<usize>, from: f32, to: f32| {
        let last = (range.len() - 1) as f32;
        for (knot, value) in values[range].iter_mut().enumerate() {
            *value = from + (to - from) * knot as f32 / last;
        }
    };
    line(layout.unsure, -1.0, 0.0);
    line(layout.novel, -ENERGY, ENERGY);
    let mut bytes = vec![0u8; shape.encoded_len()];
    Params::checked(shape, &values)?.encode(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use device_core::score::score;

    #[test]
    fn what_is_less_certain_scores_higher() {
        let bytes = neutral(3).unwrap();
        let mut values = vec![0.0; Params::len_f32(&bytes).unwrap()];
        let params = Params::parse(&bytes, &mut values).unwrap();
        let sure = score(&[9.0, 0.0, 0.0], &[], &params, &mut []).unwrap();
        let torn = score(&[1.0, 0.9, 0.0], &[], &params, &mut []).unwrap();
        assert!(torn.u_unsure > sure.u_unsure);
        assert!(torn.u_novel > sure.u_novel);
        assert!(neutral(0).is_err() && neutral(5000).is_err());
    }
}
