//! Which example comes next: class-balanced, weighted, without luck.
//!
//! Independent draws would leave a third of the examples unseen in every epoch. Here an epoch is a
//! shuffled list in which each example stands as often as its weight says, rounded at random.

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Example;

/// An endless, seeded stream of example indices.
pub struct Sampler {
    /// Expected appearances of each example in one epoch.
    rates: Vec<f32>,
    epoch: Vec<usize>,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Rates proportional to `weight · n_label^−balance`, with a mean of 1.
    pub fn new(examples: &[Example], classes: usize, balance: f32, seed: u64) -> Self {
        let mut counts = vec![0u32; classes];
        for example in examples {
            counts[example.label as usize] += 1;
        }
        let mut rates: Vec<f32> = examples
            .iter()
            .map(|e| e.weight * (counts[e.label as usize] as f32).powf(-balance))
            .collect();
        let sum: f64 = rates.iter().map(|rate| f64::from(*rate)).sum();
        let scale = (rates.len() as f64 / sum) as f32;
        rates.iter_mut().for_each(|rate| *rate *= scale);
        Self {
            rates,
            epoch: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(seed),
        }
    }

    /// The next `count` examples.
    pub fn draw(&mut self, count: usize) -> Vec<usize> {
        let mut drawn = Vec::with_capacity(count);
        while drawn.len() < count {
            match self.epoch.pop() {
                Some(index) => drawn.push(index),
                None => self.refill(),
            }
        }
        drawn
    }

    fn refill(&mut self) {
        for (index, rate) in self.rates.iter().enumerate() {
            let chance: f32 = self.rng.random();
            let times = rate.floor() as usize + usize::from(chance < rate.fract());
            self.epoch.extend(std::iter::repeat_n(index, times));
        }
        // Rates average 1, so this is empty only for a tiny set, and only now and then.
        self.epoch.shuffle(&mut self.rng);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(counts: &[usize]) -> Vec<Example> {
        counts
            .iter()
            .enumerate()
            .flat_map(|(label, count)| {
                std::iter::repeat_n(
                    Example {
                        pixels: Vec::new().into(),
                        label: label as u32,
                        weight: 1.0,
                    },
                    *count,
                )
            })
            .collect()
    }

    fn share(balance: f32) -> f32 {
        let examples = examples(&[900, 100]);
        let drawn = Sampler::new(&examples, 2, balance, 1).draw(20_000);
        let rare = drawn.iter().filter(|i| examples[**i].label == 1).count();
        rare as f32 / 20_000.0
    }

    #[test]
    fn balance_moves_from_natural_to_equal_shares() {
        assert!((share(0.0) - 0.1).abs() < 0.02);
        assert!((share(1.0) - 0.5).abs() < 0.02);
        // 100^0.5 / (100^0.5 + 900^0.5) = 0.25
        assert!((share(0.5) - 0.25).abs() < 0.02);
    }

    #[test]
    fn every_example_comes_up_in_an_epoch_of_equals() {
        let examples = examples(&[50, 50]);
        let mut drawn = Sampler::new(&examples, 2, 0.75, 3).draw(100);
        drawn.sort_unstable();
        assert_eq!(drawn, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn weights_scale_and_zero_excludes() {
        let mut examples = examples(&[10]);
        examples[0].weight = 0.0;
        examples[1].weight = 3.0;
        let drawn = Sampler::new(&examples, 1, 1.0, 3).draw(11_000);
        let count = |index| drawn.iter().filter(|i| **i == index).count() as f32;
        assert_eq!(count(0), 0.0);
        assert!((count(1) / count(2) - 3.0).abs() < 0.4);
    }
}
