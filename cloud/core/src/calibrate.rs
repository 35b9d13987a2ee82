//! Fits the score parameters that travel with a model: temperature, class and background
//! Gaussians, conformal tables.
//!
//! The tables are computed with `device-core`'s own [`score`], so that u = 1 − p means on the
//! device what it meant here. Gaussians come from the training items and everything that says how
//! sure or how unusual an answer is from held-out items, since a network is too sure of what it
//! was trained on. All sums are in f64 and in a fixed order: the same input gives the same bytes.

use device_core::params::{Params, ParamsError, Shape};
use device_core::score::boundary::pair;
use device_core::score::neighbour::nearest_prototype;
use device_core::score::{ScoreError, fused, knot_level, normalise, score};
use thiserror::Error;

mod integer;
mod neutral;
mod prototypes;

pub use neutral::neutral;

/// Knots in each conformal table.
pub const TABLE: u16 = 64;
/// Range in which the temperature is sought.
pub const TEMPERATURE: std::ops::RangeInclusive<f64> = 0.05..=20.0;
/// Least shrinkage unless one is asked for. Ledoit and Wolf's is the best estimate of the
/// covariance, which is not what is wanted: directions in which the training items hardly vary
/// say little about the unknown, and shrinking tames them. On `sim:roads` (nets of 59 to 74 %
/// accuracy) 0.9 tells the class that was never seen apart best; rare classes, which the rarity
/// score looks after, stand out a little less (AUROC 0.84 to 0.78 at worst).
pub const SHRINKAGE: f64 = 0.9;
/// Training items below which a class mean is drawn towards the centre.
const FEW: f64 = 3.0;
/// Least ridge, relative to the mean variance: keeps f32 whitening of dead dimensions in range.
const LEAST_RIDGE: f64 = 1e-3;

/// What a model said about the training items and about held-out items.
///
/// Matrices are row-major; labels are indices of logits.
#[derive(Clone, Copy, Debug)]
pub struct FitInput<'a> {
    /// K: number of logits.
    pub classes: usize,
    /// d: number of embedding values, 0 for a model without embedding.
    pub dim: usize,
    /// n × d embeddings of the training items; empty if d = 0.
    pub embeddings: &'a [f32],
    /// n labels; empty if d = 0.
    pub labels: &'a [u32],
    /// m × K logits of the held-out items.
    pub held_logits: &'a [f32],
    /// m × d embeddings of the held-out items.
    pub held_embeddings: &'a [f32],
    /// m labels.
    pub held_labels: &'a [u32],
    /// K × d weights of the head that makes logits from the embedding, where it is known: what the
    /// distance to decision boundaries needs.
    pub head: Option<&'a [f32]>,
    /// Weight of the ridge in both covariances, 0 to 1; `None` takes Ledoit and Wolf's, but at
    /// least [`SHRINKAGE`].
    pub shrinkage: Option<f64>,
}

/// Why nothing can be fitted.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
pub enum FitError {
    /// A matrix or list has the wrong length.
    #[error("{what} has {found} values where {expected} are needed")]
    Length {
        /// Which.
        what: &'static str,
        /// Values needed.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// There is nothing to learn from.
    #[error("{what} is empty; score parameters need at least one item there")]
    Empty {
        /// Which list.
        what: &'static str,
    },
    /// A label that is no index of a logit.
    #[error("{what}[{index}] is {label}, but the model has {classes} classes")]
    Label {
        /// Which list.
        what: &'static str,
        /// Position in it.
        index: usize,
        /// The label.
        label: u32,
        /// K.
        classes: usize,
    },
    /// NaN or infinity in a matrix: the model is broken.
    #[error("{what}[{index}] is not a finite number")]
    NotFinite {
        /// Which matrix.
        what: &'static str,
        /// Position in it.
        index: usize,
    },
    /// A shrinkage outside 0 to 1.
    #[error("shrinkage is {0}; give a number from 0 to 1")]
    Shrinkage(f64),
    /// The covariance can't be factored, which a ridge should have prevented.
    #[error(
        "the covariance of the embeddings cannot be factored; are their values of wildly different size?"
    )]
    Covariance,
    /// The sizes are beyond what score parameters hold, or a value left the range of f32.
    #[error("score parameters: {0}")]
    Params(#[from] ParamsError),
    /// A held-out item can't be scored.
    #[error("scoring a held-out item: {0}")]
    Score(#[from] ScoreError),
}

/// Fits score parameters; returns the bytes of a
/// [`PartKind::Scores`](flywheel_shared::trust::PartKind::Scores) part.
///
/// - Temperature: minimises the mean negative log-likelihood of the held-out labels (Guo et al.
///   2017, 1706.04599) by golden-section search over ln T.
/// - Covariances: Σ is the scatter of the training embeddings, at unit length, around their class
///   means, divided by n. The background is centred on the mean c of the class means, and Σ₀ = Σ + mean of
///   (μₖ−c)(μₖ−c)ᵀ: every class counts once. Ren et al. (2106.09022) fit it to the items as they
///   come; then the direction of a class with three items of a thousand is missing from the
///   background, MD₀ is large there, and the rarest class looks the most familiar of all. Both get
///   the *same* ridge λI, so that what they share cancels exactly in the relative distance. λ = ρμ/(1−ρ) with μ the mean variance within
///   classes and ρ the given shrinkage or that of Ledoit & Wolf (2004, "A well-conditioned
///   estimator for large-dimensional covariance matrices", section 3.3), if above [`SHRINKAGE`].
/// - Prototypes: k-means centres of each class ([`prototypes`]); the table of `fused` then makes
///   `u_novel` out of the distances to whole classes and to the nearest prototype.
/// - The integer form of the relative Mahalanobis distance ([`integer`]), for small models.
/// - A class with fewer than 3 training items has its mean drawn to the centre, as if one more
///   item lay there; a class without items has no mean and takes no part in the distance.
///
/// # Errors
/// [`FitError`]: lists that do not fit together, values that are not finite, no items.
pub fn fit(input: FitInput<'_>) -> Result<Vec<u8>, FitError> {
    check(&input)?;
    let wide = |size: usize| u16::try_from(size).unwrap_or(u16::MAX);
    let (k, d) = (input.classes, input.dim);
    let gaussians = match d {
        0 => None,
        _ => Some(Gaussians::fit(&input)?),
    };
    let centres = prototypes::fit(input.embeddings, input.labels, k, d);
    let directions = gaussians
        .as_ref()
        .and_then(|gaussians| integer::fit(gaussians, k, d));
    let shape = Shape {
        head: d > 0 && input.head.is_some(),
        prototypes: wide(centres.len().checked_div(d).unwrap_or(0)),
        rank: directions.as_ref().map_or(0, |form| wide(form.rank)),
        ..Shape::plain(wide(k), wide(d), TABLE)
    }
    .check()?;
    let layout = shape.layout();
    let mut values = vec![0.0f32; shape.values()];
    values[layout.temperature] = temperature(&input) as f32;
    values[layout.calibrated] = input.held_labels.len() as f32;
    for &label in input.labels {
        values[layout.counts.start + label as usize] += 1.0;
    }
    if let Some(gaussians) = &gaussians {
        narrow(&mut values[layout.centre.clone()], &gaussians.centre);
        narrow(&mut values[layout.within.clone()], &gaussians.within);
        narrow(
            &mut values[layout.background.clone()],
            &gaussians.background,
        );
        narrow(&mut values[layout.means.clone()], &gaussians.means);
    }
    if let (true, Some(head)) = (shape.head, input.head) {
        let n = input.labels.len() as f64;
        for (j, mean) in values[layout.head_mean.clone()].iter_mut().enumerate() {
            let column = input.embeddings.iter().skip(j).step_by(d);
            *mean = (column.map(|&x| f64::from(x)).sum::<f64>() / n) as f32;
        }
        inverse_distances(head, d, &mut values[layout.head_inverse.clone()]);
    }
    values[layout.prototypes.clone()].copy_from_slice(&centres);

    // With tables of zeros the scores come out right and only u does not; u is not used here.
    let params = Params::checked(shape, &values)?;
    let mut scratch = vec![0.0; shape.scratch()];
    let (mut unsure, mut novel, mut near) = (Vec::new(), Vec::new(), Vec::new());
    for (i, logits) in input.held_logits.chunks_exact(k).enumerate() {
        let embedding = &input.held_embeddings[i * d..(i + 1) * d];
        let scores = score(logits, embedding, &params, &mut scratch)?;
        unsure.push(-scores.margin);
        novel.push(scores.novelty);
        near.extend(nearest_prototype(embedding, &params, &mut scratch));
    }
    knots(&unsure, &mut values[layout.unsure]);
    knots(&novel, &mut values[layout.novel.clone()]);
    if shape.prototypes > 0 {
        knots(&near, &mut values[layout.near.clone()]);
        let params = Params::checked(shape, &values)?;
        let both: Vec<f32> = novel
            .iter()
            .zip(&near)
            .map(|(&novel, &near)| fused(novel, near, &params))
            .collect();
        knots(&both, &mut values[layout.fused.clone()]);
    }

    let mut bytes = vec![0u8; shape.front_len()];
    Params::checked(shape, &values)?.encode(&mut bytes)?;
    if let Some(directions) = directions {
        bytes.extend(directions.bytes);
    }
    Ok(bytes)
}

/// 1/‖wₐ − w_b‖ of each pair of rows of `head` (K × d), 0 for equal ones.
fn inverse_distances(head: &[f32], d: usize, out: &mut [f32]) {
    for (a, upper) in head.chunks_exact(d).enumerate() {
        for (b, lower) in head.chunks_exact(d).enumerate().take(a) {
            let apart = |(x, y): (&f32, &f32)| (f64::from(*x) - f64::from(*y)).powi(2);
            let square: f64 = upper.iter().zip(lower).map(apart).sum();
            out[pair(a, b)] = if square > 0.0 {
                (1.0 / square.sqrt()).min(f64::from(f32::MAX)) as f32
            } else {
                0.0
            };
        }
    }
}

fn check(input: &FitInput<'_>) -> Result<(), FitError> {
    let (n, m) = (input.labels.len(), input.held_labels.len());
    if input.classes == 0 {
        return Err(FitError::Empty { what: "classes" });
    }
    if m == 0 {
        return Err(FitError::Empty {
            what: "held_labels",
        });
    }
    if input.dim > 0 && n == 0 {
        return Err(FitError::Empty { what: "labels" });
    }
    for (what, values, expected) in [
        ("embeddings", input.embeddings, n * input.dim),
        ("held_logits", input.held_logits, m * input.classes),
        ("held_embeddings", input.held_embeddings, m * input.dim),
        (
            "head",
            input.head.unwrap_or_default(),
            input.head.map_or(0, |_| input.classes * input.dim),
        ),
    ] {
        if values.len() != expected {
            return Err(FitError::Length {
                what,
                expected,
                found: values.len(),
            });
        }
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(FitError::NotFinite { what, index });
        }
    }
    for (what, labels) in [("labels", input.labels), ("held_labels", input.held_labels)] {
        let classes = input.classes;
        let beyond = labels.iter().position(|&label| label as usize >= classes);
        if let Some(index) = beyond {
            return Err(FitError::Label {
                what,
                index,
                label: labels[index],
                classes,
            });
        }
    }
    match input.shrinkage {
        Some(rho) if !(0.0..=1.0).contains(&rho) => Err(FitError::Shrinkage(rho)),
        _ => Ok(()),
    }
}

/// T that minimises the mean negative log-likelihood, which is convex in 1/T and so has one
/// minimum over ln T.
fn temperature(input: &FitInput<'_>) -> f64 {
    let loss = |log_t: f64| {
        let beta = (-log_t).exp();
        let rows = input.held_logits.chunks_exact(input.classes);
        rows.zip(input.held_labels)
            .map(|(row, &label)| {
                let max = row.iter().copied().fold(f32::MIN, f32::max);
                let x = |z: f32| beta * (f64::from(z) - f64::from(max));
                let sum: f64 = row.iter().map(|&z| x(z).exp()).sum();
                sum.ln() - x(row[label as usize])
            })
            .sum::<f64>()
    };
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (TEMPERATURE.start().ln(), TEMPERATURE.end().ln());
    let (mut a, mut b) = (high - ratio * (high - low), low + ratio * (high - low));
    let (mut loss_a, mut loss_b) = (loss(a), loss(b));
    // 40 steps narrow ln T to 3·10⁻⁸.
    for _ in 0..40 {
        if loss_a <= loss_b {
            (high, b, loss_b) = (b, a, loss_a);
            a = high - ratio * (high - low);
            loss_a = loss(a);
        } else {
            (low, a, loss_a) = (a, b, loss_b);
            b = low + ratio * (high - low);
            loss_b = loss(b);
        }
    }
    f64::midpoint(low, high).exp()
}

/// Centre, both whitenings (lower triangles by rows) and the whitened class means.
struct Gaussians {
    centre: Vec<f64>,
    within: Vec<f64>,
    background: Vec<f64>,
    means: Vec<f64>,
    /// Whitened class means as the background knows them: not drawn to the centre.
    plain_means: Vec<f64>,
    /// Which classes have items.
    present: Vec<bool>,
}

impl Gaussians {
    fn fit(input: &FitInput<'_>) -> Result<Self, FitError> {
        let (k, d) = (input.classes, input.dim);
        let mut embeddings = vec![0.0; input.embeddings.len()];
        for (unit, raw) in embeddings
            .chunks_exact_mut(d)
            .zip(input.embeddings.chunks_exact(d))
        {
            normalise(raw, unit);
        }
        let rows = || embeddings.chunks_exact(d).zip(input.labels);

        let mut counts = vec![0.0f64; k];
        let mut sums = vec![0.0f64; k * d];
        for (row, &label) in rows() {
            let label = label as usize;
            counts[label] += 1.0;
            for (sum, &z) in sums[label * d..].iter_mut().zip(row) {
                *sum += f64::from(z);
            }
        }
        let mut means: Vec<f64> = sums
            .iter()
            .enumerate()
            .map(|(at, sum)| sum / counts[at / d].max(1.0))
            .collect();
        let mut residuals = Vec::with_capacity(input.embeddings.len());
        for (row, &label) in rows() {
            let mean = &means[label as usize * d..];
            residuals.extend(row.iter().zip(mean).map(|(&z, mean)| f64::from(z) - mean));
        }
        let mut within = scatter(&residuals, d);

        // From here on means are relative to the centre; classes without items lie on it.
        let present = counts.iter().filter(|&&count| count > 0.0).count() as f64;
        let centre: Vec<f64> = (0..d)
            .map(|j| means.iter().skip(j).step_by(d).sum::<f64>() / present)
            .collect();
        for (at, mean) in means.iter_mut().enumerate() {
            *mean = if counts[at / d] > 0.0 {
                *mean - centre[at % d]
            } else {
                0.0
            };
        }
        let spread = k as f64 / present;
        let mut background: Vec<f64> = scatter(&means, d)
            .iter()
            .zip(&within)
            .map(|(between, within)| within + spread * between)
            .collect();
        let plain = means.clone();
        for (at, mean) in means.iter_mut().enumerate() {
            let count = counts[at / d];
            if count < FEW {
                *mean *= count / (count + 1.0);
            }
        }

        let ridge = ridge(&residuals, &within, &background, d, input.shrinkage);
        for i in 0..d {
            within[i * d + i] += ridge;
            background[i * d + i] += ridge;
        }
        let within = whitening(&within, d).ok_or(FitError::Covariance)?;
        let background = whitening(&background, d).ok_or(FitError::Covariance)?;
        let whitened = |means: &[f64]| -> Vec<f64> {
            means
                .chunks_exact(d)
                .flat_map(|mean| times_triangle(&within, mean))
                .collect()
        };
        Ok(Self {
            means: whitened(&means),
            plain_means: whitened(&plain),
            present: counts.iter().map(|&count| count > 0.0).collect(),
            centre,
            within,
            background,
        })
    }
}

/// L·x with L a lower triangle by rows.
fn times_triangle(triangle: &[f64], x: &[f64]) -> Vec<f64> {
    (0..x.len())
        .map(|i| {
            let row = i * (i + 1) / 2;
            let products = triangle[row..=row + i].iter().zip(x).map(|(l, x)| l * x);
            products.sum()
        })
        .collect()
}

/// 1/n Σ x xᵀ over the rows of `rows` (n × d), d × d.
fn scatter(rows: &[f64], d: usize) -> Vec<f64> {
    let mut sum = vec![0.0; d * d];
    for row in rows.chunks_exact(d) {
        for (i, x) in row.iter().enumerate() {
            for (cell, y) in sum[i * d..=i * d + i].iter_mut().zip(row) {
                *cell += x * y;
            }
        }
    }
    let n = (rows.len() / d) as f64;
    for i in 0..d {
        for j in 0..=i {
            sum[i * d + j] /= n;
            sum[j * d + i] = sum[i * d + j];
        }
    }
    sum
}

/// λ of the ridge λI; see [`fit`].
fn ridge(
    residuals: &[f64],
    within: &[f64],
    background: &[f64],
    d: usize,
    shrinkage: Option<f64>,
) -> f64 {
    let n = (residuals.len() / d) as f64;
    let trace = |s: &[f64]| (0..d).map(|i| s[i * d + i]).sum::<f64>() / d as f64;
    let mean = trace(within);
    let rho = shrinkage.unwrap_or_else(|| {
        // ‖S − μI‖² = ‖S‖² − dμ², and (1/n²) Σ ‖x xᵀ − S‖² = (Σ|x|⁴/n − ‖S‖²)/n.
        let square: f64 = within.iter().map(|s| s * s).sum();
        let spread = square - d as f64 * mean * mean;
        let fourth: f64 = residuals
            .chunks_exact(d)
            .map(|x| x.iter().map(|x| x * x).sum::<f64>().powi(2))
            .sum();
        let error = ((fourth / n - square) / n).max(0.0);
        let wolf = if spread > 0.0 { error / spread } else { 1.0 };
        wolf.clamp(SHRINKAGE, 1.0)
    });
    // ρ = 1 asks for a sphere, which a ridge only approaches.
    let wanted = mean * rho / (1.0 - rho).max(1e-3);
    // With one item per class nothing varies within classes; take the scale from the background.
    let scale = if mean > 0.0 { mean } else { trace(background) };
    let least = LEAST_RIDGE * scale;
    if wanted.max(least) > 0.0 {
        wanted.max(least)
    } else {
        // All embeddings are equal; any ridge makes whatever differs novel.
        1.0
    }
}

/// L⁻¹ of the Cholesky factor A = L Lᵀ of a symmetric d × d matrix: its lower triangle by rows.
/// `None` if A is not positive definite.
fn whitening(a: &[f64], d: usize) -> Option<Vec<f64>> {
    let at = |i: usize, j: usize| i * (i + 1) / 2 + j;
    let mut l = vec![0.0; d * (d + 1) / 2];
    for i in 0..d {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|p| l[at(i, p)] * l[at(j, p)]).sum();
            let rest = a[i * d + j] - dot;
            if i == j {
                if !(rest > 0.0 && rest.is_finite()) {
                    return None;
                }
                l[at(i, i)] = rest.sqrt();
            } else {
                l[at(i, j)] = rest / l[at(j, j)];
            }
        }
    }
    // Forward substitution, column by column of the identity.
    let mut inverse = vec![0.0; l.len()];
    for j in 0..d {
        inverse[at(j, j)] = 1.0 / l[at(j, j)];
        for i in j + 1..d {
            let dot: f64 = (j..i).map(|p| l[at(i, p)] * inverse[at(p, j)]).sum();
            inverse[at(i, j)] = -dot / l[at(i, i)];
        }
    }
    Some(inverse)
}

fn narrow(to: &mut [f32], from: &[f64]) {
    for (place, &value) in to.iter_mut().zip(from) {
        *place = value as f32;
    }
}

/// The quantiles of `scores` (at least one) at [`knot_level`], linear between ranks.
pub fn knots(scores: &[f32], table: &mut [f32]) {
    let mut scores = scores.to_vec();
    scores.sort_unstable_by(f32::total_cmp);
    let (m, last) = (table.len(), scores.len() - 1);
    for (i, knot) in table.iter_mut().enumerate() {
        let rank = f64::from(knot_level(i, m)).clamp(0.0, 1.0) * last as f64;
        let below = rank as usize;
        let above = (below + 1).min(last);
        let part = rank - below as f64;
        let (low, high) = (f64::from(scores[below]), f64::from(scores[above]));
        *knot = (low + part * (high - low)) as f32;
    }
    // Rounding to f32 keeps the order, but only almost surely the last digit of equal knots.
    for i in 1..m {
        table[i] = table[i].max(table[i - 1]);
    }
}

#[cfg(test)]
mod tests;
