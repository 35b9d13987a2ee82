//! Known mixtures: what is planted must be found.

use super::*;
use flywheel_shared::message::Scores;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Standard normal numbers (Box and Muller).
struct Normal(ChaCha8Rng);

impl Normal {
    fn unit(&mut self) -> f64 {
        (f64::from(self.0.next_u32()) + 0.5) / 4_294_967_296.0
    }

    fn next(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

/// A mixture of Gaussians under one correlated covariance, with the exact posterior as logits.
struct World {
    normal: Normal,
    classes: usize,
    dim: usize,
    means: Vec<f64>,
}

#[derive(Default)]
struct Items {
    embeddings: Vec<f32>,
    logits: Vec<f32>,
    labels: Vec<u32>,
}

impl World {
    /// One mean more than classes: the last is the unknown class.
    fn new(classes: usize, dim: usize, seed: u64) -> Self {
        let mut normal = Normal(ChaCha8Rng::seed_from_u64(seed));
        let means = (0..(classes + 1) * dim)
            .map(|_| 2.0 * normal.next())
            .collect();
        Self {
            normal,
            classes,
            dim,
            means,
        }
    }

    fn embedding(&mut self, class: usize) -> Vec<f32> {
        let d = self.dim;
        let noise: Vec<f64> = (0..d).map(|_| self.normal.next()).collect();
        (0..d)
            .map(|j| {
                // Each value shares half of its noise with the one before it.
                let neighbour = noise[j.saturating_sub(1)];
                (self.means[class * d + j] + 0.8 * noise[j] + 0.5 * neighbour) as f32
            })
            .collect()
    }

    fn items(&mut self, per_class: usize, t: f64) -> Items {
        let mut items = Items::default();
        for class in 0..self.classes {
            for _ in 0..per_class {
                let z = self.embedding(class);
                items.logits.extend(self.logits(&z).map(|x| (t * x) as f32));
                items.embeddings.extend(z);
                items.labels.push(class as u32);
            }
        }
        items
    }

    /// −|z − μₖ|²/2: not the exact posterior, as the noise is correlated, but a good classifier.
    fn logits<'a>(&'a self, z: &'a [f32]) -> impl Iterator<Item = f64> + 'a {
        let means = self.means.chunks_exact(self.dim).take(self.classes);
        means.map(move |mean| {
            let square = mean.iter().zip(z).map(|(m, z)| (m - f64::from(*z)).powi(2));
            -square.sum::<f64>() / 2.0
        })
    }
}

fn input<'a>(world: &World, train: &'a Items, held: &'a Items) -> FitInput<'a> {
    FitInput {
        classes: world.classes,
        dim: world.dim,
        embeddings: &train.embeddings,
        labels: &train.labels,
        held_logits: &held.logits,
        held_embeddings: &held.embeddings,
        held_labels: &held.labels,
        head: None,
        shrinkage: None,
    }
}

/// Scores of every item under the parameters in `bytes`.
fn scores(bytes: &[u8], items: &Items) -> Vec<Scores> {
    let mut values = vec![0.0; Params::len_f32(bytes).unwrap()];
    let params = Params::parse(bytes, &mut values).unwrap();
    let shape = params.shape();
    let (k, d) = (usize::from(shape.classes), usize::from(shape.dim));
    let mut scratch = vec![0.0; shape.scratch()];
    items
        .logits
        .chunks_exact(k)
        .enumerate()
        .map(|(i, logits)| {
            let embedding = &items.embeddings[i * d..(i + 1) * d];
            score(logits, embedding, &params, &mut scratch).unwrap()
        })
        .collect()
}

/// Largest distance between the distribution of `u` and the uniform one (Kolmogorov).
fn distance_to_uniform(u: impl Iterator<Item = f32>) -> f64 {
    let mut u: Vec<f64> = u.map(f64::from).collect();
    u.sort_by(f64::total_cmp);
    let n = u.len() as f64;
    u.iter()
        .enumerate()
        .map(|(i, u)| (u - i as f64 / n).abs().max((u - (i + 1) as f64 / n).abs()))
        .fold(0.0, f64::max)
}

#[test]
fn what_is_known_is_uniform_and_what_is_new_stands_out() {
    let mut world = World::new(10, 12, 1);
    let (train, held, fresh) = (
        world.items(80, 1.0),
        world.items(80, 1.0),
        world.items(200, 1.0),
    );
    let bytes = fit(input(&world, &train, &held)).unwrap();
    let known = scores(&bytes, &fresh);
    let novel = distance_to_uniform(known.iter().map(|s| s.u_novel));
    // Kolmogorov at 0.1 % for 800 against 2000 items: 0.082.
    assert!(novel < 0.082, "{novel}");

    let mut unknown = Items::default();
    for _ in 0..200 {
        let z = world.embedding(10);
        unknown.logits.extend(world.logits(&z).map(|x| x as f32));
        unknown.embeddings.extend(z);
    }
    let new = scores(&bytes, &unknown);
    let found = new.iter().filter(|s| s.u_novel > 0.95).count();
    assert!(found > 180, "{found} of 200");
}

#[test]
fn unsure_is_uniform_where_margins_are_not_tied() {
    let mut world = World::new(6, 4, 2);
    // Overlapping classes, so that margins spread over all of 0 to 1.
    for mean in &mut world.means {
        *mean *= 0.3;
    }
    let (train, held, fresh) = (
        world.items(100, 1.0),
        world.items(150, 1.0),
        world.items(300, 1.0),
    );
    let bytes = fit(input(&world, &train, &held)).unwrap();
    let distance = distance_to_uniform(scores(&bytes, &fresh).iter().map(|s| s.u_unsure));
    assert!(distance < 0.08, "{distance}");
}

#[test]
fn a_planted_temperature_is_found() {
    let mut world = World::new(5, 3, 3);
    for mean in &mut world.means {
        *mean *= 0.5;
    }
    let (train, held) = (world.items(10, 1.0), world.items(2000, 1.0));
    // Labels drawn from the softmax itself: T = 1 is then the truth.
    let mut drawn = Items {
        labels: Vec::new(),
        ..held
    };
    for row in drawn.logits.chunks_exact(5) {
        let mut p = [0.0; 5];
        device_core::score::softmax(row, 1.0, &mut p);
        let mut left = world.normal.unit() as f32;
        let hit = p.iter().position(|p| {
            left -= p;
            left < 0.0
        });
        drawn.labels.push(hit.unwrap_or(4) as u32);
    }
    for planted in [0.4f32, 1.0, 3.0] {
        let scaled = Items {
            logits: drawn.logits.iter().map(|z| z * planted).collect(),
            embeddings: drawn.embeddings.clone(),
            labels: drawn.labels.clone(),
        };
        let bytes = fit(input(&world, &train, &scaled)).unwrap();
        let mut values = vec![0.0; Params::len_f32(&bytes).unwrap()];
        let t = Params::parse(&bytes, &mut values).unwrap().temperature();
        assert!((t / planted - 1.0).abs() < 0.05, "{planted}: {t}");
    }
}

#[test]
fn whitening_makes_the_scatter_within_classes_the_identity() {
    let mut world = World::new(4, 7, 4);
    let train = world.items(4000, 1.0);
    let held = world.items(5, 1.0);
    let gaussians = Gaussians::fit(&FitInput {
        shrinkage: Some(0.0),
        ..input(&world, &train, &held)
    })
    .unwrap();
    let d = world.dim;
    // The covariance of W·(x − μₖ) must be the identity, up to the small ridge.
    let mut white = Vec::new();
    for (z, &label) in train.embeddings.chunks_exact(d).zip(&train.labels) {
        let mut x = vec![0.0; d];
        normalise(z, &mut x);
        for i in 0..d {
            let row = i * (i + 1) / 2;
            let y: f64 = (0..=i)
                .map(|j| gaussians.within[row + j] * (f64::from(x[j]) - gaussians.centre[j]))
                .sum();
            white.push(y - gaussians.means[label as usize * d + i]);
        }
    }
    let covariance = scatter(&white, d);
    for i in 0..d {
        for j in 0..d {
            let identity = f64::from(u8::from(i == j));
            assert!((covariance[i * d + j] - identity).abs() < 0.02);
        }
    }
}

#[test]
fn dead_dimensions_rare_and_absent_classes_are_no_obstacle() {
    let mut world = World::new(5, 6, 5);
    let mut train = world.items(30, 1.0);
    let mut held = world.items(30, 1.0);
    for items in [&mut train, &mut held] {
        for z in items.embeddings.chunks_exact_mut(6) {
            z[2] = 0.0;
            z[4] = z[1];
        }
    }
    // Class 4 keeps one item, class 3 none.
    let keep = |i: usize| i < 90 || i == 120;
    let mut few = Items::default();
    for i in (0..150).filter(|&i| keep(i)) {
        few.embeddings.extend(&train.embeddings[i * 6..(i + 1) * 6]);
        few.labels.push(train.labels[i]);
    }
    let bytes = fit(input(&world, &few, &held)).unwrap();
    let mut values = vec![0.0; Params::len_f32(&bytes).unwrap()];
    let params = Params::parse(&bytes, &mut values).unwrap();
    assert_eq!(params.counts(), [30.0, 30.0, 30.0, 0.0, 1.0]);
    let known: Vec<f32> = scores(&bytes, &held).iter().map(|s| s.novelty).collect();
    let mean = |range: std::ops::Range<usize>| {
        known[range.clone()].iter().sum::<f32>() / range.len() as f32
    };
    // The class that was never seen and the one seen once are less familiar than the others.
    assert!(mean(0..90) < mean(90..120) && mean(0..90) < mean(120..150));

    // Nothing varies at all: still parameters.
    let same = Items {
        embeddings: vec![1.5; 6 * 10],
        labels: vec![0; 10],
        logits: Vec::new(),
    };
    assert!(fit(input(&world, &same, &held)).is_ok());
}

#[test]
fn the_same_input_gives_the_same_bytes_and_a_model_without_embedding_works() {
    let mut world = World::new(4, 5, 6);
    let (train, held) = (world.items(20, 1.0), world.items(20, 1.0));
    let all = input(&world, &train, &held);
    assert_eq!(fit(all), fit(all));
    let bare = FitInput {
        dim: 0,
        embeddings: &[],
        labels: &[],
        held_embeddings: &[],
        ..all
    };
    let bytes = fit(bare).unwrap();
    let items = Items {
        logits: held.logits.clone(),
        ..Items::default()
    };
    for s in scores(&bytes, &items) {
        assert_eq!(s.novelty, s.energy);
    }
}

#[test]
fn each_fault_is_named() {
    let mut world = World::new(3, 2, 7);
    let (train, held) = (world.items(5, 1.0), world.items(5, 1.0));
    let good = input(&world, &train, &held);
    let broken = vec![f32::NAN; held.logits.len()];
    let text = |input: FitInput<'_>| fit(input).unwrap_err().to_string();
    for (input, expected) in [
        (
            FitInput {
                embeddings: &train.embeddings[1..],
                ..good
            },
            "embeddings has 29 values where 30 are needed",
        ),
        (
            FitInput {
                held_logits: &broken,
                ..good
            },
            "held_logits[0] is not a finite number",
        ),
        (
            FitInput {
                held_logits: &[],
                held_embeddings: &[],
                held_labels: &[],
                ..good
            },
            "held_labels is empty; score parameters need at least one item there",
        ),
        (
            FitInput {
                labels: &[9; 15],
                ..good
            },
            "labels[0] is 9, but the model has 3 classes",
        ),
        (
            FitInput {
                shrinkage: Some(2.0),
                ..good
            },
            "shrinkage is 2; give a number from 0 to 1",
        ),
    ] {
        assert_eq!(text(input), expected);
    }
}

/// Distance to the nearest prototype and the integer form, of every item.
fn distances(bytes: &[u8], items: &Items, d: usize) -> Vec<(f32, f32, f32)> {
    let mut values = vec![0.0; Params::len_f32(bytes).unwrap()];
    let params = Params::parse(bytes, &mut values).unwrap();
    let form = device_core::score::integer::Integer::parse(bytes)
        .unwrap()
        .unwrap();
    let mut scratch = vec![0.0; params.shape().scratch()];
    let mut whole = vec![0; form.rank()];
    let mut codes = vec![0i8; d];
    items
        .embeddings
        .chunks_exact(d)
        .map(|embedding| {
            device_core::score::quantise(embedding, &mut codes);
            let integer = form.novelty(&codes, &mut whole).unwrap();
            let float = device_core::score::mahalanobis::relative_mahalanobis(
                embedding,
                &params,
                &mut scratch,
            );
            let near = nearest_prototype(embedding, &params, &mut scratch).unwrap();
            (integer as f32 / 4096.0, float, near)
        })
        .collect()
}

#[test]
fn the_integer_form_is_the_same_distance() {
    for (classes, dim) in [(3, 8), (9, 24), (12, 5)] {
        let mut world = World::new(classes, dim, 4);
        let (train, held) = (world.items(80, 1.0), world.items(30, 1.0));
        let bytes = fit(input(&world, &train, &held)).unwrap();
        let pairs = distances(&bytes, &held, dim);
        let (mut error, mut size) = (0.0, 0.0);
        let mean = pairs.iter().map(|p| p.1).sum::<f32>() / pairs.len() as f32;
        for (integer, float, _) in &pairs {
            error += (integer - float).powi(2);
            size += (float - mean).powi(2);
        }
        // A correlation of 0.999 and more.
        assert!(error < 2e-3 * size, "{classes} {dim}: {error} of {size}");
    }
}

#[test]
fn prototypes_tell_the_unknown_apart_and_fused_novelty_is_uniform() {
    let mut world = World::new(5, 16, 9);
    let (train, held) = (world.items(200, 1.0), world.items(200, 1.0));
    let bytes = fit(input(&world, &train, &held)).unwrap();
    let fresh = world.items(200, 1.0);
    let u: Vec<f32> = scores(&bytes, &fresh).iter().map(|s| s.u_novel).collect();
    let off = distance_to_uniform(u.iter().copied());
    assert!(off < 0.06, "{off}");
    let mut unknown = Items::default();
    for _ in 0..100 {
        unknown.embeddings.extend(world.embedding(5));
    }
    let known = distances(&bytes, &fresh, 16);
    let limit = {
        let mut near: Vec<f32> = known.iter().map(|p| p.2).collect();
        near.sort_by(f32::total_cmp);
        near[near.len() * 95 / 100]
    };
    let found = distances(&bytes, &unknown, 16);
    let beyond = found.iter().filter(|p| p.2 > limit).count();
    assert!(beyond > 60, "{beyond} of 100");
}

#[test]
fn the_head_gives_distances_to_boundaries() {
    let mut world = World::new(3, 4, 2);
    let (train, held) = (world.items(20, 1.0), world.items(20, 1.0));
    let head: Vec<f32> = (0..12).map(|i| ((i * 7) % 5) as f32).collect();
    let bytes = fit(FitInput {
        head: Some(&head),
        ..input(&world, &train, &held)
    })
    .unwrap();
    let mut values = vec![0.0; Params::len_f32(&bytes).unwrap()];
    let params = Params::parse(&bytes, &mut values).unwrap();
    let (mean, inverse) = params.head().unwrap();
    let column: f32 = train.embeddings.iter().step_by(4).sum();
    assert!((mean[0] - column / train.labels.len() as f32).abs() < 1e-4);
    for (a, b) in [(1, 0), (2, 0), (2, 1)] {
        let apart = (0..4).map(|j| (head[a * 4 + j] - head[b * 4 + j]).powi(2));
        let distance = apart.sum::<f32>().sqrt();
        assert!((inverse[pair(a, b)] * distance - 1.0).abs() < 1e-5);
    }
    let short = FitInput {
        head: Some(&head[1..]),
        ..input(&world, &train, &held)
    };
    assert!(matches!(
        fit(short),
        Err(FitError::Length { what: "head", .. })
    ));
}
