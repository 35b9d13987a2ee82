//! Rankings of a small world whose truth is known: common classes, rare ones, one that the model
//! has never seen, tracks of several frames, a change of light, and a noisy novelty score.

use super::*;
use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
use std::collections::BTreeMap;

const DIM: usize = 32;
const COMMON: usize = 9;
const RARE: usize = 3;
/// The class that no label has: the last one.
const LATE: usize = COMMON + RARE;

fn gauss(rng: &mut ChaCha8Rng) -> f32 {
    let sum: f32 = (0..12).map(|_| rng.random::<f32>()).sum();
    sum - 6.0
}

fn vector(scale: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..DIM).map(|_| scale * gauss(rng)).collect()
}

fn add(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(x, y)| x + y).collect()
}

struct World {
    centres: Vec<Vec<f32>>,
    night: Vec<f32>,
    labelled: Vec<(Vec<f32>, usize)>,
    pool: Vec<(Vec<f32>, usize, u64)>,
}

impl World {
    /// Labels: 120 of each common class and 3 of each rare one, by day alone. Pool: day and night,
    /// 0.8 % of each rare class and 1.5 % of the late one, each thing seen on 1 to 3 frames.
    fn new(frames: usize, rng: &mut ChaCha8Rng) -> Self {
        let centres = (0..=LATE).map(|_| vector(1.0, rng)).collect();
        let mut world = Self {
            centres,
            night: vector(0.7, rng),
            labelled: Vec::new(),
            pool: Vec::new(),
        };
        for class in 0..LATE {
            for _ in 0..if class < COMMON { 120 } else { 3 } {
                let seen = world.draw(class, false, rng);
                world.labelled.push((seen, class));
            }
        }
        let mut frame = 0;
        while world.pool.len() < frames {
            let class = match rng.random_range(0..1000) {
                x @ 0..24 => COMMON + x / 8,
                24..39 => LATE,
                _ => rng.random_range(0..COMMON),
            };
            let night = rng.random_bool(0.4);
            let thing = world.draw(class, night, rng);
            for _ in 0..rng.random_range(1..=3) {
                let seen = add(&thing, &vector(0.1, rng));
                world.pool.push((seen, class, frame));
                frame += 1;
            }
            frame += 20;
        }
        world
    }

    fn draw(&self, class: usize, night: bool, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let noise = vector(if night { 1.0 } else { 0.7 }, rng);
        let seen = add(&self.centres[class], &noise);
        if night { add(&seen, &self.night) } else { seen }
    }

    /// A nearest-mean classifier of the labels, with noisy novelty: how far the nearest mean is,
    /// on the conformal scale of the labels, with errors.
    fn predict(&self, rng: &mut ChaCha8Rng) -> Vec<Prediction> {
        let mut sums: BTreeMap<usize, (Vec<f32>, f32)> = BTreeMap::new();
        for (seen, class) in &self.labelled {
            let sum = sums
                .entry(*class)
                .or_insert_with(|| (vec![0.0; DIM], 0.0));
            sum.0 = add(&sum.0, seen);
            sum.1 += 1.0;
        }
        let means: Vec<Vec<f32>> = sums
            .into_values()
            .map(|(sum, n)| sum.iter().map(|x| x / n).collect())
            .collect();
        let distances = |seen: &[f32]| -> Vec<f32> {
            let to = |mean: &Vec<f32>| geometry::distance2(seen, mean);
            means.iter().map(to).collect()
        };
        let nearest = |seen: &[f32]| distances(seen).into_iter().fold(f32::INFINITY, f32::min);
        let mut usual: Vec<f32> = self.labelled.iter().map(|(seen, _)| nearest(seen)).collect();
        usual.sort_by(f32::total_cmp);
        self.pool
            .iter()
            .map(|(seen, ..)| {
                let logits: Vec<f32> = distances(seen)
                    .iter()
                    .map(|d| -d / 4.0 + 0.3 * gauss(rng))
                    .collect();
                let mut probs = vec![0.0; logits.len()];
                crate::evaluate::softmax(&logits, 1.0, &mut probs);
                let mut order: Vec<usize> = (0..probs.len()).collect();
                order.sort_by(|&a, &b| probs[b].total_cmp(&probs[a]));
                let noisy = nearest(seen) + 4.0 * gauss(rng);
                let below = usual.partition_point(|&d| d < noisy);
                Prediction {
                    top: u32::try_from(order[0]).unwrap(),
                    runner_up: u32::try_from(order[1]).unwrap(),
                    confidence: probs[order[0]],
                    margin: probs[order[0]] - probs[order[1]],
                    novelty: below as f32 / (usual.len() + 1) as f32,
                }
            })
            .collect()
    }

    fn counts(&self) -> Vec<u32> {
        let mut counts = vec![0; LATE];
        for (_, class) in &self.labelled {
            counts[*class] += 1;
        }
        counts
    }
}

/// Ranks the world's pool; gives the true class of each pick.
fn select(world: &World, predictions: &[Prediction], strategy: Strategy, seed: u64) -> Vec<usize> {
    let candidates: Vec<Candidate<'_>> = world
        .pool
        .iter()
        .zip(predictions)
        .map(|((seen, _, frame), prediction)| Candidate {
            embedding: seen,
            prediction: Some(*prediction),
            lane: Lane::Novel,
            track: Some(Track {
                device: "cam",
                frame: *frame,
            }),
            phash: None,
        })
        .collect();
    let labelled: Vec<Labelled<'_>> = world
        .labelled
        .iter()
        .map(|(seen, class)| Labelled {
            embedding: seen,
            class: u32::try_from(*class).unwrap(),
        })
        .collect();
    let pool = Pool {
        candidates: &candidates,
        labelled: &labelled,
        class_counts: &world.counts(),
    };
    let options = Options {
        strategy,
        seed,
        ..Options::default()
    };
    let picks = rank(&pool, &options).unwrap();
    assert_eq!(picks.len(), options.budget);
    picks.iter().map(|p| world.pool[p.index].1).collect()
}

fn wanted(classes: &[usize]) -> (usize, usize) {
    (
        classes.iter().filter(|c| (COMMON..LATE).contains(*c)).count(),
        classes.iter().filter(|c| **c == LATE).count(),
    )
}

#[test]
fn flywheel_finds_three_times_the_rare_and_the_new_of_random() {
    let mut sums = BTreeMap::new();
    for seed in 0..4 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let world = World::new(1500, &mut rng);
        let predictions = world.predict(&mut rng);
        for strategy in [Strategy::Random, Strategy::Margin, Strategy::Flywheel] {
            let found = wanted(&select(&world, &predictions, strategy, seed));
            let sum: &mut (usize, usize) = sums.entry(strategy.name()).or_default();
            *sum = (sum.0 + found.0, sum.1 + found.1);
        }
    }
    println!("rare and late found in 4 rounds of 200: {sums:?}");
    let (random, flywheel) = (sums["random"], sums["flywheel"]);
    assert!(flywheel.0 >= 3 * random.0, "rare: {sums:?}");
    assert!(flywheel.1 >= 3 * random.1, "late: {sums:?}");
}
