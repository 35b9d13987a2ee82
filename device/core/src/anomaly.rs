//! Scores of a frame from a model that only says how unusual it is, or that redraws the usual.

use flywheel_shared::message::Scores;

use crate::params::Params;
use crate::score::{ScoreError, conformal};

/// How far a reconstruction is from its input: the mean of the squared differences, which the
/// network was trained to make small on the usual. 0 for no values; slices of unequal length are
/// compared as far as both go.
pub fn reconstruction_error(input: &[f32], output: &[f32]) -> f32 {
    let values = input.len().min(output.len());
    if values == 0 {
        return 0.0;
    }
    let sum: f32 = input
        .iter()
        .zip(output)
        .map(|(a, b)| (a - b) * (a - b))
        .sum();
    (sum / values as f32).min(f32::MAX)
}

/// Scores of an anomaly score, higher for the less usual: `novelty` and `energy` are the score,
/// `u_novel` its place among those of the calibration ([`conformal`]), `confidence` = 1 −
/// `u_novel`. There are no classes, so `margin` is 1 and nothing is unsure or rare.
///
/// # Errors
/// [`ScoreError::NotFinite`] for a score that is NaN or infinite.
pub fn score(value: f32, params: &Params<'_>) -> Result<Scores, ScoreError> {
    if !value.is_finite() {
        return Err(ScoreError::NotFinite);
    }
    let table = &params.values()[params.shape().layout().novel];
    let u_novel = conformal(table, params.calibrated(), value);
    Ok(Scores {
        top1: 0,
        top2: 0,
        confidence: 1.0 - u_novel,
        margin: 1.0,
        entropy: 0.0,
        energy: value,
        novelty: value,
        u_unsure: 0.0,
        u_novel,
        rarity: 0.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Shape;
    use std::vec;

    #[test]
    fn the_unusual_rises_with_the_score_and_errors_are_mean_squares() {
        let shape = Shape::plain(1, 0, 3);
        let mut values = vec![0.0; shape.values()];
        values[..2].copy_from_slice(&[1.0, 9.0]);
        values[shape.layout().novel].copy_from_slice(&[0.0, 1.0, 4.0]);
        let params = Params::checked(shape, &values).unwrap();
        let at = |value| score(value, &params).unwrap().u_novel;
        assert!(at(0.0) < at(0.5) && at(0.5) < at(3.0) && at(3.0) < at(50.0));
        assert_eq!(score(f32::NAN, &params), Err(ScoreError::NotFinite));
        assert_eq!(reconstruction_error(&[1.0, 2.0], &[0.0, 4.0]), 2.5);
        assert_eq!(reconstruction_error(&[], &[]), 0.0);
        assert_eq!(reconstruction_error(&[f32::MAX], &[f32::MIN]), f32::MAX);
    }
}
