//! The whole-number form of the relative Mahalanobis distance ([`device_core::score::integer`]).

use device_core::score::integer::{ABSENT, FRACTION, GAIN, MAX_SHIFT, MEAN};

use super::Gaussians;

/// Models beyond these sizes are not for machines that lack a floating-point unit.
const MOST_CLASSES: usize = 128;
const MOST_DIM: usize = 256;
/// Spread between classes below which a direction tells nothing apart, relative to that within.
const LEAST: f64 = 1e-9;

/// What goes behind the `f32` values.
pub(super) struct Form {
    /// r.
    pub rank: usize,
    /// The byte form.
    pub bytes: Vec<u8>,
}

/// Quantises; `None` if classes do not differ, or the model is large.
pub(super) fn fit(gaussians: &Gaussians, classes: usize, d: usize) -> Option<Form> {
    if classes > MOST_CLASSES || d > MOST_DIM {
        return None;
    }
    // Between classes, in whitened coordinates: S = mean of ν νᵀ over the classes with items. The
    // background is I + S there, since both covariances have the same ridge.
    let present = gaussians.present.iter().filter(|present| **present).count() as f64;
    let mut between = vec![0.0; d * d];
    let rows = gaussians
        .plain_means
        .chunks_exact(d)
        .zip(&gaussians.present);
    for (mean, _) in rows.filter(|(_, present)| **present) {
        for i in 0..d {
            for j in 0..d {
                between[i * d + j] += mean[i] * mean[j] / present;
            }
        }
    }
    let (spread, vectors) = eigen(between, d);
    let mut order: Vec<usize> = (0..d).filter(|&i| spread[i] > LEAST).collect();
    order.sort_by(|&a, &b| spread[b].total_cmp(&spread[a]));
    order.truncate(classes.saturating_sub(1));
    let rank = order.len();
    if rank == 0 {
        return None;
    }

    let direction = |i: usize| -> Vec<f64> { (0..d).map(|j| vectors[j * d + i]).collect() };
    // P = Uᵀ W, a row for each direction.
    let rows: Vec<Vec<f64>> = order
        .iter()
        .map(|&i| transposed_times(&gaussians.within, &direction(i)))
        .collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let offsets: Vec<f64> = rows.iter().map(|row| dot(row, &gaussians.centre)).collect();
    let means: Vec<Vec<f64>> = gaussians
        .means
        .chunks_exact(d)
        .map(|mean| order.iter().map(|&i| dot(&direction(i), mean)).collect())
        .collect();

    let step = |row: &[f64]| row.iter().fold(0.0f64, |max, x| max.max(x.abs())) / 127.0;
    let largest = rows.iter().map(|row| step(row)).fold(0.0, f64::max);
    let one = f64::from(1u32 << FRACTION);
    // The largest multiplier fills 30 bits.
    let shift = (30.0 - (largest * one).log2())
        .floor()
        .clamp(0.0, f64::from(MAX_SHIFT));
    let word =
        |x: f64| (x.round().clamp(f64::from(i32::MIN), f64::from(i32::MAX)) as i32).to_le_bytes();
    let code = |x: f64, step: f64| {
        let code = if step > 0.0 { (x / step).round() } else { 0.0 };
        (code.clamp(-127.0, 127.0) as i8).cast_unsigned()
    };
    let mut bytes = vec![shift as u8];
    bytes.extend(
        rows.iter()
            .flat_map(|row| word(step(row) * one * shift.exp2())),
    );
    bytes.extend(offsets.iter().flat_map(|offset| word(offset * one)));
    let gain = |i: &usize| word(f64::from(1u32 << GAIN) / (1.0 + spread[*i]));
    bytes.extend(order.iter().flat_map(gain));
    for (mean, present) in means.iter().zip(&gaussians.present) {
        bytes.extend(if *present {
            word(step(mean) * f64::from(1u32 << MEAN))
        } else {
            ABSENT.to_le_bytes()
        });
    }
    for row in rows.iter().chain(&means) {
        bytes.extend(row.iter().map(|&x| code(x, step(row))));
    }
    Some(Form { rank, bytes })
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
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let left = dot(&times_triangle(&triangle, &x), &y);
        let right = dot(&x, &transposed_times(&triangle, &y));
        assert!((left - right).abs() < 1e-12);
    }
}
