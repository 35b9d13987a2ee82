//! The few dimensions in which prototypes are compared ([`device_core::score::compact`]).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use device_core::params::BLOCK;

use super::directions::dot;

/// Dimensions at least.
const LEAST_DIMENSIONS: usize = 16;
/// Rounds of the iteration. The subspace needs not be exactly the one of largest spread.
const ROUNDS: usize = 60;
/// Length, relative to that before, below which nothing of a direction is left.
const LEAST: f64 = 1e-12;

/// Dimensions beside `rank` directions: what fills blocks, 16 to 31.
pub(super) fn dimensions(rank: usize) -> usize {
    (rank + LEAST_DIMENSIONS).next_multiple_of(BLOCK) - rank
}

/// Orthonormal rows (q × d) that span the `q` dimensions in which the symmetric, not negative d × d
/// matrix `moment` is largest, by orthogonal iteration (Golub & Van Loan, Matrix Computations,
/// section 8.2.4). Where it has fewer dimensions, the rows left over are 0. The same input gives
/// the same bytes.
pub(super) fn fit(moment: &[f64], q: usize, d: usize) -> Vec<Vec<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut rows: Vec<Vec<f64>> = (0..q)
        .map(|_| (0..d).map(|_| f64::from(rng.next_u32()) - 2e9).collect())
        .collect();
    orthonormalise(&mut rows);
    for _ in 0..ROUNDS {
        for row in &mut rows {
            *row = moment.chunks_exact(d).map(|line| dot(line, row)).collect();
        }
        orthonormalise(&mut rows);
    }
    rows
}

/// Coordinates of `unit` (d values of length 1) in the subspace of `rows`, and the length of what
/// lies outside of it.
pub(super) fn place(rows: &[Vec<f64>], unit: &[f32]) -> Vec<f64> {
    let inner = |row: &Vec<f64>| row.iter().zip(unit).map(|(r, &x)| r * f64::from(x)).sum();
    let mut place: Vec<f64> = rows.iter().map(inner).collect();
    place.push((1.0 - dot(&place, &place)).max(0.0).sqrt());
    place
}

/// Gram and Schmidt's way, each row twice, since once loses digits.
fn orthonormalise(rows: &mut [Vec<f64>]) {
    for i in 0..rows.len() {
        let (done, rest) = rows.split_at_mut(i);
        let row = &mut rest[0];
        let before = dot(row, row).sqrt();
        for other in done.iter().chain(done.iter()) {
            let part = dot(other, row);
            for (x, y) in row.iter_mut().zip(other) {
                *x -= part * y;
            }
        }
        let length = dot(row, row).sqrt();
        let scale = if length > LEAST * before {
            1.0 / length
        } else {
            0.0
        };
        for x in row {
            *x *= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_dimensions_of_largest_spread() {
        // 5 dimensions, of which a turned plane holds nearly all.
        let d = 5;
        let (a, b) = ([0.6, 0.8, 0.0, 0.0, 0.0], [0.0, 0.0, 0.6, 0.0, 0.8]);
        let mut moment = vec![0.0; d * d];
        for i in 0..d {
            moment[i * d + i] = 0.01;
            for j in 0..d {
                moment[i * d + j] += 5.0 * a[i] * a[j] + 2.0 * b[i] * b[j];
            }
        }
        let rows = fit(&moment, 2, d);
        let inside = |x: &[f64]| {
            let parts = rows.iter().map(|row| dot(row, x).powi(2));
            parts.sum::<f64>()
        };
        assert!((inside(&a) - 1.0).abs() < 1e-9 && (inside(&b) - 1.0).abs() < 1e-9);
        assert!(inside(&[0.8, -0.6, 0.0, 0.0, 0.0]) < 1e-9);
    }

    #[test]
    fn rows_beyond_the_rank_are_zero() {
        let moment = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let rows = fit(&moment, 2, 3);
        assert!((rows[0][0].abs() - 1.0).abs() < 1e-12);
        assert_eq!(rows[1], [0.0; 3]);
    }
}
