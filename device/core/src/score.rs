//! How sure and how familiar a model's answer is, each on the one scale u = 1 − p in [0, 1].
//!
//! The cloud calls this very function when it calibrates and evaluates, so that a threshold means
//! on the device what it meant in the cloud. Operations are in a fixed order and all
//! transcendental functions come from `libm`, so results agree to the bit across machines.

use core::fmt;

use flywheel_shared::message::Scores;

use crate::params::Params;

pub mod boundary;
pub mod integer;
pub mod mahalanobis;
pub mod neighbour;
mod vector;

pub use vector::normalise;
use vector::saturate;

/// Part of the mean below which a class is short of labels; of classes that are about equal, half
/// lie below the mean.
pub const SCARCE: f32 = 0.9;

/// Why an answer can't be scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreError {
    /// The number of logits is not that of the parameters.
    Logits {
        /// What the parameters say.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// The length of the embedding is not that of the parameters.
    Embedding {
        /// What the parameters say.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// The scratch buffer is too small.
    Scratch {
        /// See [`crate::params::Shape::scratch`].
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// A logit or an embedding value is NaN or infinite: the model is broken on this input.
    NotFinite,
}

impl fmt::Display for ScoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Logits { expected, found } => {
                write!(f, "{found} logits for score parameters of {expected}")
            }
            Self::Embedding { expected, found } => write!(
                f,
                "an embedding of {found} values for score parameters of {expected}"
            ),
            Self::Scratch { expected, found } => {
                write!(f, "scratch of {found} values where {expected} are needed")
            }
            Self::NotFinite => f.write_str("the model's output holds NaN or infinity"),
        }
    }
}

impl core::error::Error for ScoreError {}

/// Scores one answer.
///
/// `logits` are the K raw outputs, `embedding` the d values of the penultimate layer, `scratch` at
/// least [`crate::params::Shape::scratch`] values whose content does not matter.
///
/// - softmax pᵢ = exp(zᵢ/T) / Σ exp(zⱼ/T), T by temperature scaling (Guo et al. 2017, 1706.04599);
///   `confidence` = p of `top1`, `margin` = p of `top1` − p of `top2`, `entropy` = −Σ pᵢ ln pᵢ.
/// - `energy` = −T ln Σ exp(zᵢ/T) (Liu et al. 2020, 2010.03759).
/// - `novelty` = minₖ MDₖ − MD₀ (Ren et al. 2021, 2106.09022), MDₖ the squared Mahalanobis
///   distance to the mean of class k under the shared covariance, MD₀ that to the background,
///   both of the embedding at unit length ([`normalise`]); for a model without embedding it is
///   `energy`.
/// - `u_unsure`: [`conformal`] of −margin.
/// - `u_novel`: [`conformal`] of novelty, and where the parameters hold prototypes of
///   [`fused`], which takes the distance to the nearest of them into account.
/// - `rarity` = Σ pₖ·(1 − nₖ/n̄) over the classes with nₖ < [`SCARCE`]·n̄, nₖ the training items of
///   class k and n̄ their mean over the classes that have any: the expected need for a label.
///
/// Finite inputs give finite scores: distances that overflow saturate at `f32::MAX`, which is
/// most novel.
pub fn score(
    logits: &[f32],
    embedding: &[f32],
    params: &Params<'_>,
    scratch: &mut [f32],
) -> Result<Scores, ScoreError> {
    let shape = params.shape();
    let (classes, dim) = (usize::from(shape.classes), usize::from(shape.dim));
    if logits.len() != classes {
        return Err(ScoreError::Logits {
            expected: classes,
            found: logits.len(),
        });
    }
    if embedding.len() != dim {
        return Err(ScoreError::Embedding {
            expected: dim,
            found: embedding.len(),
        });
    }
    if scratch.len() < shape.scratch() {
        return Err(ScoreError::Scratch {
            expected: shape.scratch(),
            found: scratch.len(),
        });
    }
    if !logits
        .iter()
        .chain(embedding)
        .all(|value| value.is_finite())
    {
        return Err(ScoreError::NotFinite);
    }

    let t = params.temperature();
    let (top1, top2) = top_two(logits);
    let max = logits[top1];
    // With x = (z − max)/T: S = Σ eˣ and A = Σ x·eˣ give the softmax, ln Σ and the entropy at once.
    let (mut sum, mut weighted) = (0.0f32, 0.0f32);
    for &logit in logits {
        let x = (logit - max) / t;
        let e = libm::expf(x);
        if e > 0.0 {
            sum += e;
            weighted += x * e;
        }
    }
    let log_sum = libm::logf(sum);
    let second = if classes > 1 {
        libm::expf((logits[top2] - max) / t)
    } else {
        0.0
    };
    let margin = (1.0 - second) / sum;
    let energy = saturate(-(max + t * log_sum));
    let layout = shape.layout();
    let (novelty, near) = if dim == 0 {
        (energy, None)
    } else {
        let (unit, white) = scratch.split_at_mut(dim);
        normalise(embedding, unit);
        let near = neighbour::nearest(unit, params);
        let novelty = mahalanobis::of_unit(unit, &mut white[..dim], params);
        (novelty, near)
    };
    let n = params.calibrated();
    let values = params.values();
    let u_novel = match near {
        Some(near) => conformal(&values[layout.fused], n, fused(novelty, near, params)),
        None => conformal(&values[layout.novel], n, novelty),
    };
    Ok(Scores {
        top1: top1 as u16,
        top2: top2 as u16,
        confidence: 1.0 / sum,
        margin,
        entropy: (log_sum - weighted / sum).max(0.0),
        energy,
        novelty,
        u_unsure: conformal(&values[layout.unsure], n, -margin),
        u_novel,
        rarity: rarity(logits, t, max, sum, params.counts()),
    })
}

/// See [`score`]; `max` is the largest logit and `sum` the sum of exp((z − max)/t).
fn rarity(logits: &[f32], t: f32, max: f32, sum: f32, counts: &[f32]) -> f32 {
    let (mut items, mut classes) = (0.0f32, 0.0f32);
    for &count in counts.iter().filter(|count| **count > 0.0) {
        items += count;
        classes += 1.0;
    }
    if classes == 0.0 {
        return 0.0;
    }
    let enough = items / classes;
    let mut mass = 0.0f32;
    for (&logit, &count) in logits.iter().zip(counts) {
        if count > 0.0 && count < SCARCE * enough {
            mass += libm::expf((logit - max) / t) / sum * (1.0 - count / enough);
        }
    }
    mass.clamp(0.0, 1.0)
}

/// Softmax of `logits` at temperature `t` into `out` of the same length; the largest exponent is
/// subtracted first, so finite logits give finite probabilities.
pub fn softmax(logits: &[f32], t: f32, out: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let mut sum = 0.0;
    for (p, &logit) in out.iter_mut().zip(logits) {
        *p = libm::expf((logit - max) / t);
        sum += *p;
    }
    for p in out {
        *p /= sum;
    }
}

/// Quantile level of knot `i` of a table of `m` knots: 1 − (1 − i/(m−1))². Knots stand dense at
/// the upper end, where the trigger's thresholds lie.
pub fn knot_level(i: usize, m: usize) -> f32 {
    let left = 1.0 - i as f32 / (m - 1) as f32;
    1.0 - left * left
}

/// u = 1 − p of `score` against a calibration set whose quantiles at [`knot_level`] are `table`
/// (ascending, at least 2) and whose size is `n`.
///
/// The conformal p-value (Vovk et al. 2005, eq. 2.20) is p = (#{i: sᵢ ≥ score} + 1)/(n + 1), so
/// u = F(score)·n/(n+1) with F the share of smaller calibration scores, here interpolated between
/// knots. Beyond the largest knot, where p would stay at 1/(n+1), it falls further as
/// spread/(spread + excess) with spread the distance from the middle knot to the last: this keeps
/// the order of very unusual frames, and says nothing about probability there.
pub fn conformal(table: &[f32], n: f32, score: f32) -> f32 {
    let (m, Some(&last)) = (table.len(), table.last()) else {
        return 1.0;
    };
    let top = n / (n + 1.0);
    if score > last {
        let spread = (last - table[m / 2]).max(1e-6);
        let p = (1.0 - top) * (spread / (spread + (score - last)));
        // Infinite spans divide to NaN; `max` ignores that and leaves the most unusual.
        return 1.0 - p.max(0.0);
    }
    let above = table.partition_point(|&knot| knot < score);
    if above == 0 || m < 2 {
        return 0.0;
    }
    let (low, high) = (table[above - 1], table[above]);
    let part = ((score - low) / (high - low)).clamp(0.0, 1.0);
    let (from, to) = (knot_level(above - 1, m), knot_level(above, m));
    (from + part * (to - from)) * top
}

/// −ln p₁ − ln p₂ with p₁ the conformal p-value of `novelty` and p₂ that of `near`, the distance
/// to the nearest prototype: Fisher's combination of two tests (Statistical Methods for Research
/// Workers, 1925, section 21.1).
///
/// The two are not independent, so it is no χ² variable; [`conformal`] through a table of its own
/// brings it to the common scale. One asks how far the frame lies from whole classes, the other
/// how far from any place where training items lie: each is blind to what the other sees.
/// `near` counts only where the parameters hold prototypes.
pub fn fused(novelty: f32, near: f32, params: &Params<'_>) -> f32 {
    let (layout, values, n) = (
        params.shape().layout(),
        params.values(),
        params.calibrated(),
    );
    let surprise = |table: &[f32], score: f32| {
        // 2⁻²⁴ is the resolution of u just below 1.
        -libm::logf((1.0 - conformal(table, n, score)).max(5.960_464_5e-8))
    };
    surprise(&values[layout.novel], novelty) + surprise(&values[layout.near], near)
}

/// Symmetric quantisation to i8: `value ≈ scale × i8` with scale = max|value| / 127.
///
/// Writes as many values as both slices hold. Values that are not finite count as 0; an embedding
/// of zeros has scale 0.
pub fn quantise(embedding: &[f32], out: &mut [i8]) -> f32 {
    let finite = |value: f32| if value.is_finite() { value } else { 0.0 };
    let largest = embedding
        .iter()
        .fold(0.0f32, |largest, &value| largest.max(finite(value).abs()));
    let scale = largest / 127.0;
    for (place, &value) in out.iter_mut().zip(embedding) {
        *place = if scale > 0.0 {
            libm::roundf(finite(value) / scale).clamp(-127.0, 127.0) as i8
        } else {
            0
        };
    }
    scale
}

/// Indices of the largest and the second largest value; the lower index wins a tie, and both are
/// 0 for a single class.
fn top_two(logits: &[f32]) -> (usize, usize) {
    let (mut top1, mut top2) = (0, None);
    for (i, &logit) in logits.iter().enumerate().skip(1) {
        if logit > logits[top1] {
            top2 = Some(top1);
            top1 = i;
        } else if top2.is_none_or(|second: usize| logit > logits[second]) {
            top2 = Some(i);
        }
    }
    (top1, top2.unwrap_or(top1))
}

#[cfg(test)]
mod tests;
