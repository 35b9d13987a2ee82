//! Distances between embeddings. Rows are scaled to unit length: the direction of an embedding
//! says what is seen, its length mostly how well.

use super::draw;
use rand_chacha::ChaCha8Rng;

/// Squared distance below which two embeddings are of the same picture.
pub(super) const SAME: f32 = 1e-6;

/// Embeddings as unit rows of one dense matrix. A row without a direction (empty, zero, or not
/// finite) is zeros.
pub(crate) struct Rows {
    dim: usize,
    data: Vec<f32>,
    directed: Vec<bool>,
}

impl Rows {
    /// The rows scaled to unit length. All non-empty rows have one dimension.
    pub(crate) fn unit<'a>(rows: impl Iterator<Item = &'a [f32]> + Clone) -> Self {
        let dim = rows.clone().map(<[f32]>::len).max().unwrap_or(0);
        let mut matrix = Self {
            dim,
            data: Vec::new(),
            directed: Vec::new(),
        };
        for row in rows {
            let norm = row
                .iter()
                .map(|&x| f64::from(x) * f64::from(x))
                .sum::<f64>()
                .sqrt();
            let directed = norm.is_finite() && norm > 1e-12;
            matrix.directed.push(directed);
            if directed {
                let scaled = row.iter().map(|&x| (f64::from(x) / norm) as f32);
                matrix.data.extend(scaled);
            } else {
                matrix.data.resize(matrix.data.len() + dim, 0.0);
            }
        }
        matrix
    }

    pub(crate) fn len(&self) -> usize {
        self.directed.len()
    }

    pub(crate) fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.dim..(index + 1) * self.dim]
    }

    pub(super) fn is_directed(&self, index: usize) -> bool {
        self.directed[index]
    }

    /// Squared distance of two directed rows, `None` when either has no direction.
    pub(super) fn distance2(&self, index: usize, other: &Self, at: usize) -> Option<f32> {
        (self.directed[index] && other.directed[at])
            .then(|| distance2(self.row(index), other.row(at)))
    }

    /// The rows at `indices`, in that order.
    pub(super) fn select(&self, indices: &[usize]) -> Self {
        Self {
            dim: self.dim,
            data: indices
                .iter()
                .flat_map(|&i| self.row(i).iter().copied())
                .collect(),
            directed: indices.iter().map(|&i| self.directed[i]).collect(),
        }
    }

    /// These rows followed by those of `other`. Both have one dimension, or one has no embedding.
    pub(super) fn chain(&self, other: &Self) -> Self {
        let dim = self.dim.max(other.dim);
        let mut data = Vec::with_capacity(dim * (self.len() + other.len()));
        for rows in [self, other] {
            for i in 0..rows.len() {
                data.extend_from_slice(rows.row(i));
                data.resize(data.len() + dim - rows.dim, 0.0);
            }
        }
        Self {
            dim,
            data,
            directed: self
                .directed
                .iter()
                .chain(&other.directed)
                .copied()
                .collect(),
        }
    }
}

/// Squared Euclidean distance.
pub(super) fn distance2(a: &[f32], b: &[f32]) -> f32 {
    // Eight running sums: a single one can't be vectorised, since float addition is ordered.
    let mut sums = [0.0_f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8
        .remainder()
        .iter()
        .zip(b8.remainder())
        .map(|(x, y)| (x - y) * (x - y))
        .sum();
    for (x, y) in a8.zip(b8) {
        for lane in 0..8 {
            let d = x[lane] - y[lane];
            sums[lane] += d * d;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Lloyd's k-means on `rows` from a k-means++ start: the cluster of each row, below `k`.
/// `O(rows · k · dim)` a step; callers bound `rows` and `k`.
pub(crate) fn kmeans(rows: &Rows, k: usize, steps: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let n = rows.len();
    let mut nearest = vec![f32::INFINITY; n];
    let mut weights = vec![1.0_f32; n];
    let mut centres: Vec<Vec<f32>> = Vec::with_capacity(k);
    while centres.len() < k {
        // All rows coincide with a centre: fewer clusters than asked for.
        let Some(next) = draw(&weights, rng) else {
            break;
        };
        let centre = rows.row(next).to_vec();
        for (i, nearest) in nearest.iter_mut().enumerate() {
            *nearest = nearest.min(distance2(rows.row(i), &centre));
            weights[i] = if *nearest < SAME { 0.0 } else { *nearest };
        }
        centres.push(centre);
    }
    let mut cluster = vec![0; n];
    for _ in 0..steps.max(1) {
        let mut moved = false;
        for (i, cluster) in cluster.iter_mut().enumerate() {
            let mut best = (f32::INFINITY, 0);
            for (c, centre) in centres.iter().enumerate() {
                let d = distance2(rows.row(i), centre);
                if d < best.0 {
                    best = (d, c);
                }
            }
            moved |= *cluster != best.1;
            *cluster = best.1;
        }
        if !moved {
            break;
        }
        let mut sums = vec![vec![0.0_f64; rows.dim]; centres.len()];
        let mut sizes = vec![0_u32; centres.len()];
        for (i, &c) in cluster.iter().enumerate() {
            sizes[c] += 1;
            for (sum, &x) in sums[c].iter_mut().zip(rows.row(i)) {
                *sum += f64::from(x);
            }
        }
        for (c, centre) in centres.iter_mut().enumerate() {
            // A cluster that lost all members keeps its centre and may win some back.
            if sizes[c] > 0 {
                for (x, sum) in centre.iter_mut().zip(&sums[c]) {
                    *x = (sum / f64::from(sizes[c])) as f32;
                }
            }
        }
    }
    cluster
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn rows_are_unit_and_undirected_ones_have_no_distance() {
        let data: [&[f32]; 4] = [&[3.0, 4.0], &[], &[0.0, 0.0], &[f32::NAN, 1.0]];
        let rows = Rows::unit(data.into_iter());
        assert_eq!(rows.row(0), &[0.6, 0.8]);
        assert_eq!(rows.distance2(0, &rows, 0), Some(0.0));
        for i in 1..4 {
            assert!(!rows.is_directed(i));
            assert_eq!(rows.row(i), &[0.0, 0.0]);
            assert_eq!(rows.distance2(0, &rows, i), None);
        }
        let none = Rows::unit([[].as_slice()].into_iter());
        assert_eq!(none.chain(&rows).len(), 5);
    }

    #[test]
    fn distance_agrees_with_the_plain_sum_at_every_length() {
        for n in 0..40_u8 {
            let a: Vec<f32> = (0..n).map(f32::from).collect();
            let b: Vec<f32> = (0..n).map(|x| f32::from(x) * 0.5 + 1.0).collect();
            let plain: f32 = a.iter().zip(&b).map(|(x, y)| (x - y) * (x - y)).sum();
            assert!((distance2(&a, &b) - plain).abs() <= plain * 1e-6);
        }
    }

    #[test]
    fn kmeans_finds_separate_groups_and_survives_identical_rows() {
        let points: Vec<[f32; 2]> = (0..30_u8)
            .map(|i| {
                let angle = f32::from(i % 3) * 2.0 + f32::from(i) * 0.001;
                [angle.cos(), angle.sin()]
            })
            .collect();
        let rows = Rows::unit(points.iter().map(<[f32; 2]>::as_slice));
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let cluster = kmeans(&rows, 3, 10, &mut rng);
        for i in 0..30 {
            for j in 0..30 {
                assert_eq!(cluster[i] == cluster[j], i % 3 == j % 3);
            }
        }
        let same = Rows::unit(std::iter::repeat_n([1.0_f32, 0.0].as_slice(), 9));
        assert_eq!(kmeans(&same, 4, 10, &mut rng), vec![0; 9]);
    }
}
