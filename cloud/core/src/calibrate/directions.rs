//! The few directions in which the distance to classes and that to the background differ
//! ([`device_core::score::compact`]).

use super::Gaussians;

/// More classes leave nearly as many directions as embedding values: nothing is gained.
const MOST_CLASSES: usize = 128;
/// Spread between classes below which a direction tells nothing apart, relative to that within.
const LEAST: f64 = 1e-9;

/// Fisher's discriminants, those that tell most apart first.
pub(super) struct Directions {
    /// P = Uᵀ·W, a row of d values for each direction.
    pub rows: Vec<Vec<f64>>,
    /// 1/(1 + λ) of each direction.
    pub gains: Vec<f64>,
    /// r coordinates of each of the K class means.
    pub means: Vec<Vec<f64>>,
}

impl Directions {
    /// `None` if the classes do not differ, or are very many.
    pub fn fit(gaussians: &Gaussians, classes: usize, d: usize) -> Option<Self> {
        if classes > MOST_CLASSES {
            return None;
        }
        // Between classes, in whitened coordinates: S = mean of ν νᵀ over the classes with items.
        // The background is I + S there, since both covariances have the same ridge. S has the
        // eigenvalues of the Gram matrix of the ν, which is smaller, and Σ uₖνₖ for eigenvectors.
        let present: Vec<&[f64]> = gaussians
            .plain_means
            .chunks_exact(d)
            .zip(&gaussians.present)
            .filter_map(|(mean, present)| present.then_some(mean))
            .collect();
        let n = present.len();
        let gram = present
            .iter()
            .flat_map(|a| present.iter().map(|b| dot(a, b) / n as f64))
            .collect();
        let (spread, vectors) = eigen(gram, n);
        let mut order: Vec<usize> = (0..n).filter(|&i| spread[i] > LEAST).collect();
        order.sort_by(|&a, &b| spread[b].total_cmp(&spread[a]));
        order.truncate(classes.saturating_sub(1));
        if order.is_empty() {
            return None;
        }
        let axes: Vec<Vec<f64>> = order
            .iter()
            .map(|&i| {
                let length = (n as f64 * spread[i]).sqrt();
                let mut axis = vec![0.0; d];
                for (k, mean) in present.iter().enumerate() {
                    let weight = vectors[k * n + i] / length;
                    for (place, x) in axis.iter_mut().zip(*mean) {
                        *place += weight * x;
                    }
                }
                axis
            })
            .collect();
        Some(Self {
            rows: axes
                .iter()
                .map(|axis| transposed_times(&gaussians.within, axis))
                .collect(),
            gains: order.iter().map(|&i| 1.0 / (1.0 + spread[i])).collect(),
            means: gaussians
                .means
                .chunks_exact(d)
                .map(|mean| axes.iter().map(|axis| dot(axis, mean)).collect())
                .collect(),
        })
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.rows.len()
    }
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Lᵀ·x with L a lower triangle by rows.
fn transposed_times(triangle: &[f64], x: &[f64]) -> Vec<f64> {
    let d = x.len();
    (0..d)
        .map(|j| (j..d).map(|i| triangle[i * (i + 1) / 2 + j] * x[i]).sum())
        .collect()
}

/// Eigenvalues and eigenvectors (columns) of a symmetric d × d matrix by cyclic Jacobi rotations
/// (Golub & Van Loan, Matrix Computations, section 8.5).
fn eigen(mut a: Vec<f64>, d: usize) -> (Vec<f64>, Vec<f64>) {
    let mut v = vec![0.0; d * d];
    for i in 0..d {
        v[i * d + i] = 1.0;
    }
    let size: f64 = a.iter().map(|x| x * x).sum();
    for _ in 0..60 {
        let off: f64 = (0..d)
            .flat_map(|i| (0..i).map(move |j| (i, j)))
            .map(|(i, j)| a[i * d + j].powi(2))
            .sum();
        if off <= 1e-26 * size {
            break;
        }
        for p in 0..d {
            for q in p + 1..d {
                let apq = a[p * d + q];
                if apq == 0.0 {
                    continue;
                }
                let tau = (a[q * d + q] - a[p * d + p]) / (2.0 * apq);
                let t = tau.signum() / (tau.abs() + (1.0 + tau * tau).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                let s = t * c;
                for k in 0..d {
                    let (x, y) = (a[k * d + p], a[k * d + q]);
                    (a[k * d + p], a[k * d + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..d {
                    let (x, y) = (a[p * d + k], a[q * d + k]);
                    (a[p * d + k], a[q * d + k]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (v[k * d + p], v[k * d + q]);
                    (v[k * d + p], v[k * d + q]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    ((0..d).map(|i| a[i * d + i]).collect(), v)
}

#[cfg(test)]
mod tests {
    use super::super::times_triangle;
    use super::*;

    #[test]
    fn eigenvectors_rebuild_the_matrix() {
        let d = 7;
        let mut a = vec![0.0; d * d];
        for i in 0..d {
            for j in 0..=i {
                let x = ((i * 31 + j * 17) % 23) as f64 - 11.0;
                a[i * d + j] = x;
                a[j * d + i] = x;
            }
        }
        let (values, v) = eigen(a.clone(), d);
        for i in 0..d {
            for j in 0..d {
                let again: f64 = (0..d)
                    .map(|k| values[k] * v[i * d + k] * v[j * d + k])
                    .sum();
                assert!((again - a[i * d + j]).abs() < 1e-9, "{i} {j}");
            }
        }
    }

    #[test]
    fn a_transposed_triangle_is_one() {
        let triangle = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let (x, y) = ([1.0, -2.0, 0.5], [0.3, 0.7, -1.0]);
        let left = dot(&times_triangle(&triangle, &x), &y);
        let right = dot(&x, &transposed_times(&triangle, &y));
        assert!((left - right).abs() < 1e-12);
    }
}
