//! Places where training items lie: the small set that stands for all of them on a device.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::priority::geometry::{Rows, kmeans};

/// Prototypes of all classes together, at most: what a device multiplies through for each frame.
const TOTAL: usize = 256;
/// Prototypes of one class, at most. On MNIST with a digit held out, 20 of each class tell it apart
/// as well as all training items do, and 10 a little worse.
const EACH: usize = 20;
/// Items of a class that are clustered, at most.
const ITEMS: usize = 4000;
/// Lloyd's steps.
const STEPS: usize = 15;

/// Prototypes (P × d, unit length) of embeddings (n × d) with their labels below `classes`: centres
/// of k-means with a k-means++ start, in each class by itself so that a rare class has its own.
/// The same input gives the same bytes.
pub(super) fn fit(embeddings: &[f32], labels: &[u32], classes: usize, d: usize) -> Vec<f32> {
    if d == 0 {
        return Vec::new();
    }
    let each = (TOTAL / classes).clamp(1, EACH);
    let mut found = Vec::new();
    for class in 0..classes.min(TOTAL) {
        let members = labels
            .iter()
            .zip(embeddings.chunks_exact(d))
            .filter(|(label, _)| **label as usize == class)
            .map(|(_, row)| row);
        let stride = members.clone().count().div_ceil(ITEMS).max(1);
        let rows = Rows::unit(members.step_by(stride));
        if rows.len() == 0 {
            continue;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(class as u64);
        let clusters = kmeans(&rows, each.min(rows.len()), STEPS, &mut rng);
        for cluster in 0..each {
            let mut sum = vec![0.0f64; d];
            for (i, _) in clusters
                .iter()
                .enumerate()
                .filter(|(_, at)| **at == cluster)
            {
                for (sum, &x) in sum.iter_mut().zip(rows.row(i)) {
                    *sum += f64::from(x);
                }
            }
            let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
            // An empty cluster, or one of embeddings without a direction.
            if length > 1e-9 {
                found.extend(sum.iter().map(|x| (x / length) as f32));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_its_own_and_all_are_of_unit_length() {
        // 100 items of class 0 in two directions, one item of class 2, none of class 1.
        let mut embeddings = Vec::new();
        let mut labels = Vec::new();
        for i in 0..100u8 {
            let side = f32::from(i % 2);
            embeddings.extend([3.0 * side, 3.0 * (1.0 - side), 0.01 * f32::from(i % 5)]);
            labels.push(0);
        }
        embeddings.extend([0.0, 0.0, 7.0]);
        labels.push(2);
        let found = fit(&embeddings, &labels, 3, 3);
        assert_eq!(found, fit(&embeddings, &labels, 3, 3));
        let rows: Vec<&[f32]> = found.chunks_exact(3).collect();
        assert!((3..=EACH + 1).contains(&rows.len()), "{rows:?}");
        for row in &rows {
            let length: f32 = row.iter().map(|x| x * x).sum();
            assert!((length - 1.0).abs() < 1e-5, "{row:?}");
        }
        for direction in [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]] {
            let closest = rows
                .iter()
                .map(|row| row.iter().zip(direction).map(|(x, y)| x * y).sum::<f32>())
                .fold(0.0, f32::max);
            assert!(closest > 0.999, "{direction:?}: {closest}");
        }
    }

    #[test]
    fn broken_or_absent_embeddings_give_none() {
        assert!(fit(&[], &[], 3, 0).is_empty());
        assert!(fit(&[0.0; 8], &[0, 1], 2, 4).is_empty());
    }
}
