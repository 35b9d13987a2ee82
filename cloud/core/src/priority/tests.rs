//! Rankings of a small world whose truth is known: common classes, rare ones, one that the model
//! has never seen, tracks of several frames, a change of light, and a noisy novelty score.

use super::*;
use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
use std::collections::{BTreeMap, BTreeSet};

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
    pool: Vec<Seen>,
}

/// A frame of the pool.
struct Seen {
    embedding: Vec<f32>,
    class: usize,
    thing: usize,
    frame: u64,
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
        let (mut frame, mut thing) = (0, 0);
        while world.pool.len() < frames {
            let class = match rng.random_range(0..1000) {
                x @ 0..24 => COMMON + x / 8,
                24..39 => LATE,
                _ => rng.random_range(0..COMMON),
            };
            let night = rng.random_bool(0.4);
            let first = world.draw(class, night, rng);
            for _ in 0..rng.random_range(1..=3) {
                world.pool.push(Seen {
                    embedding: add(&first, &vector(0.1, rng)),
                    class,
                    thing,
                    frame,
                });
                frame += 1;
            }
            frame += 20;
            thing += 1;
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
            let sum = sums.entry(*class).or_insert_with(|| (vec![0.0; DIM], 0.0));
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
        let mut usual: Vec<f32> = self
            .labelled
            .iter()
            .map(|(seen, _)| nearest(seen))
            .collect();
        usual.sort_by(f32::total_cmp);
        self.pool
            .iter()
            .map(|Seen { embedding, .. }| {
                let logits: Vec<f32> = distances(embedding)
                    .iter()
                    .map(|d| -d / 4.0 + 0.3 * gauss(rng))
                    .collect();
                let mut probs = vec![0.0; logits.len()];
                crate::evaluate::softmax(&logits, 1.0, &mut probs);
                let mut order: Vec<usize> = (0..probs.len()).collect();
                order.sort_by(|&a, &b| probs[b].total_cmp(&probs[a]));
                let noisy = nearest(embedding) + 4.0 * gauss(rng);
                let below = usual.partition_point(|&d| d < noisy);
                Prediction {
                    top: u32::try_from(order[0]).unwrap(),
                    runner_up: u32::try_from(order[1]).unwrap(),
                    confidence: probs[order[0]],
                    margin: probs[order[0]] - probs[order[1]],
                    novelty: below as f32 / (usual.len() + 1) as f32,
                    rarity: 0.0,
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

/// Ranks the world's pool; gives how many different things of the rare classes and of the late one
/// were picked.
fn found(
    world: &World,
    predictions: &[Prediction],
    strategy: Strategy,
    seed: u64,
) -> (usize, usize) {
    let candidates: Vec<Candidate<'_>> = world
        .pool
        .iter()
        .zip(predictions)
        .map(|(seen, prediction)| Candidate {
            embedding: &seen.embedding,
            prediction: Some(*prediction),
            lane: Lane::Novel,
            track: Some(Track {
                device: "cam",
                frame: seen.frame,
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
    assert_eq!(picks, rank(&pool, &options).unwrap());
    let things: BTreeSet<(usize, usize)> = picks
        .iter()
        .map(|p| (world.pool[p.index].class, world.pool[p.index].thing))
        .collect();
    let late = things.iter().filter(|(class, _)| *class == LATE).count();
    let wanted = things.iter().filter(|(class, _)| *class >= COMMON).count();
    (wanted - late, late)
}

#[test]
fn flywheel_finds_three_times_the_rare_and_the_new_of_random() {
    let mut sums: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for seed in 0..3 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let world = World::new(2000, &mut rng);
        let predictions = world.predict(&mut rng);
        for strategy in [Strategy::Random, Strategy::Flywheel] {
            let found = found(&world, &predictions, strategy, seed);
            let sum = sums.entry(strategy.name()).or_default();
            *sum = (sum.0 + found.0, sum.1 + found.1);
        }
    }
    let (random, flywheel) = (sums["random"], sums["flywheel"]);
    assert!(flywheel.0 >= 3 * random.0, "rare: {sums:?}");
    assert!(flywheel.1 >= 3 * random.1, "late: {sums:?}");
}

/// A pool without a model: `groups` well separated groups, of which the first are the largest.
fn groups(groups: usize, rng: &mut ChaCha8Rng) -> Vec<(Vec<f32>, usize)> {
    let centres: Vec<Vec<f32>> = (0..groups).map(|_| vector(1.0, rng)).collect();
    let mut all = Vec::new();
    for (group, centre) in centres.iter().enumerate() {
        for _ in 0..60 - 3 * group {
            all.push((add(centre, &vector(0.15, rng)), group));
        }
    }
    all.shuffle(rng);
    all
}

fn bare(embedding: &[f32]) -> Candidate<'_> {
    Candidate {
        embedding,
        prediction: None,
        lane: Lane::Uniform,
        track: None,
        phash: None,
    }
}

#[test]
fn a_cold_start_takes_a_typical_sample_of_every_group_without_a_label() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let samples = groups(12, &mut rng);
    let candidates: Vec<Candidate<'_>> = samples.iter().map(|(seen, _)| bare(seen)).collect();
    let of = |group: usize| samples.iter().find(|(_, g)| *g == group).unwrap();
    let labelled: Vec<Labelled<'_>> = (0..2)
        .map(|group| Labelled {
            embedding: &of(group).0,
            class: 0,
        })
        .collect();
    let pool = Pool {
        candidates: &candidates,
        labelled: &labelled,
        class_counts: &[2],
    };
    let options = Options {
        budget: 10,
        ..Options::default()
    };
    let picks = rank(&pool, &options).unwrap();
    let found: BTreeSet<usize> = picks.iter().map(|p| samples[p.index].1).collect();
    assert!(found.len() >= 9, "only groups {found:?}");
    assert!(found.iter().filter(|g| **g >= 2).count() >= 8, "{found:?}");
    assert!(picks.iter().all(|p| p.why.reason == Reason::Typical));
    assert!(
        picks[0]
            .why
            .to_string()
            .starts_with("typical of its group: a group of ")
    );
}

#[test]
fn near_duplicates_are_picked_once() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let vectors: Vec<Vec<f32>> = (0..20).map(|_| vector(1.0, &mut rng)).collect();
    // Each embedding twice, and a third time by a hash that differs in two bits.
    let prediction = Some(Prediction {
        top: 0,
        runner_up: 1,
        confidence: 0.6,
        margin: 0.3,
        novelty: 0.5,
        rarity: 0.0,
    });
    let other: Vec<Vec<f32>> = (0..20).map(|_| vector(1.0, &mut rng)).collect();
    let mut candidates = Vec::new();
    for (i, seen) in vectors.iter().enumerate() {
        let hash = rng.random::<u64>();
        for (embedding, phash) in [(seen, hash), (seen, !hash), (&other[i], hash ^ 0b101)] {
            candidates.push(Candidate {
                prediction,
                phash: Some(phash),
                ..bare(embedding)
            });
        }
    }
    let pool = Pool {
        candidates: &candidates,
        labelled: &[],
        class_counts: &[50, 50],
    };
    for strategy in [Strategy::Flywheel, Strategy::Typiclust] {
        let options = Options {
            strategy,
            budget: 60,
            ..Options::default()
        };
        let picks = rank(&pool, &options).unwrap();
        // Of each three either the first alone, or the second and the third.
        let mut by_thing: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for pick in &picks {
            by_thing
                .entry(pick.index / 3)
                .or_default()
                .insert(pick.index % 3);
        }
        assert_eq!(by_thing.len(), 20);
        for kept in by_thing.values() {
            assert!(
                *kept == BTreeSet::from([0]) || *kept == BTreeSet::from([1, 2]),
                "{strategy}: {kept:?}"
            );
        }
    }
}

#[test]
fn lots_come_from_the_uniform_lane_and_campaigns_are_heard() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let vectors: Vec<Vec<f32>> = (0..2000).map(|_| vector(1.0, &mut rng)).collect();
    let candidates: Vec<Candidate<'_>> = vectors
        .iter()
        .enumerate()
        .map(|(i, seen)| Candidate {
            prediction: Some(Prediction {
                top: 0,
                runner_up: 1,
                confidence: 0.95,
                margin: if i < 100 { 0.9 } else { 0.7 },
                novelty: 0.1,
                rarity: 0.0,
            }),
            lane: match i {
                0..20 => Lane::Uniform,
                20..40 => Lane::Campaign,
                _ => Lane::Unsure,
            },
            ..bare(seen)
        })
        .collect();
    let pool = Pool {
        candidates: &candidates,
        labelled: &[],
        class_counts: &[50, 50],
    };
    let options = Options {
        budget: 100,
        uniform_share: 0.1,
        ..Options::default()
    };
    let picks = rank(&pool, &options).unwrap();
    let lots: Vec<usize> = (0..100)
        .filter(|&at| picks[at].why.reason == Reason::Uniform)
        .collect();
    assert_eq!(lots, (0..10).map(|i| i * 10 + 9).collect::<Vec<_>>());
    assert!(lots.iter().all(|&at| picks[at].index < 20));
    let of =
        |range: std::ops::Range<usize>| picks.iter().filter(|p| range.contains(&p.index)).count();
    assert!(
        of(20..40) > of(40..60),
        "campaign {} plain {}",
        of(20..40),
        of(40..60)
    );
}

#[test]
fn odd_pools_are_ranked_or_refused_but_never_panic() {
    let (nan, zero) = ([f32::NAN; 4], [0.0_f32; 4]);
    let good = [1.0_f32, 0.0, 0.0, 0.0];
    let prediction = Some(Prediction {
        top: 900,
        runner_up: u32::MAX,
        confidence: f32::NAN,
        margin: f32::INFINITY,
        novelty: f32::NAN,
        rarity: 0.0,
    });
    let candidates: Vec<Candidate<'_>> = [&nan[..], &zero, &[], &good, &zero]
        .into_iter()
        .map(|embedding| Candidate {
            prediction,
            ..bare(embedding)
        })
        .collect();
    let labelled = [Labelled {
        embedding: &[],
        class: 7,
    }];
    for strategy in Strategy::ALL {
        for class_counts in [&[][..], &[0, 0], &[9, 9]] {
            let pool = Pool {
                candidates: &candidates,
                labelled: &labelled,
                class_counts,
            };
            let options = Options {
                strategy,
                uniform_share: f32::NAN,
                ..Options::default()
            };
            assert_eq!(rank(&pool, &options).unwrap().len(), 5, "{strategy}");
            let none = Pool {
                candidates: &[],
                ..pool
            };
            assert!(rank(&none, &options).unwrap().is_empty());
        }
        assert_eq!(strategy.name().parse(), Ok(strategy));
    }
    let mixed = [bare(&good), bare(&good[..2])];
    let pool = Pool {
        candidates: &mixed,
        labelled: &[],
        class_counts: &[],
    };
    assert_eq!(
        rank(&pool, &Options::default()),
        Err(PriorityError::Dimension {
            what: "candidate",
            index: 1,
            found: 2,
            expected: 4
        })
    );
    assert!("best".parse::<Strategy>().is_err());
}

proptest! {
    #[test]
    fn caps_and_sizes_hold(
        items in prop::collection::vec((0_u64..120, 0_usize..3, 0.0_f32..1.0, 0.0_f32..1.0, 0_u32..4), 0..150),
        budget in 0_usize..60,
        (per_track, track_reach) in (1_usize..4, 0_u64..10),
        strategy in prop::sample::select(Strategy::ALL.to_vec()),
        cold in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let vectors: Vec<Vec<f32>> = items.iter().map(|_| vector(1.0, &mut rng)).collect();
        let devices = ["a", "b", "c"];
        let candidates: Vec<Candidate<'_>> = items
            .iter()
            .zip(&vectors)
            .map(|(&(frame, device, margin, novelty, top), seen)| Candidate {
                prediction: (!cold).then_some(Prediction {
                    top,
                    runner_up: 0,
                    confidence: 0.5 + margin / 2.0,
                    margin,
                    novelty,
                    rarity: 0.0,
                }),
                track: Some(Track { device: devices[device], frame }),
                ..bare(seen)
            })
            .collect();
        let pool = Pool { candidates: &candidates, labelled: &[], class_counts: &[30, 20, 1] };
        let options = Options { strategy, budget, seed, per_track, track_reach, uniform_share: 0.05 };
        let picks = rank(&pool, &options).unwrap();
        prop_assert_eq!(&picks, &rank(&pool, &options).unwrap());

        let indices: BTreeSet<usize> = picks.iter().map(|p| p.index).collect();
        prop_assert_eq!(indices.len(), picks.len());
        prop_assert!(picks.len() <= budget);
        if matches!(strategy, Strategy::Random | Strategy::Margin) {
            prop_assert_eq!(picks.len(), budget.min(items.len()));
            return Ok(());
        }
        let beside = |track: Track<'_>, indices: &BTreeSet<usize>| {
            indices
                .iter()
                .filter_map(|&i| candidates[i].track)
                .filter(|t| t.device == track.device && t.frame.abs_diff(track.frame) <= options.track_reach)
                .count()
        };
        for &i in &indices {
            prop_assert!(beside(candidates[i].track.unwrap(), &indices) <= per_track);
        }
        // Short of the budget only when the limits forbid every other candidate.
        if picks.len() < budget {
            for i in (0..items.len()).filter(|i| !indices.contains(i)) {
                let mut with = indices.clone();
                with.insert(i);
                let full = with
                    .iter()
                    .any(|&j| beside(candidates[j].track.unwrap(), &with) > per_track);
                prop_assert!(full, "candidate {} could have been picked", i);
            }
        }
    }
}
