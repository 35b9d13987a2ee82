//! [`score`] against a plain f64 reference.

use super::*;
use crate::params::Shape;
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

/// Parameters with arbitrary (not even positive) triangles: the formulas hold for any.
fn params_of(shape: Shape, t: f32, n: f32, seed: &[f32]) -> Vec<f32> {
    let mut values: Vec<f32> = (0..shape.values())
        .map(|i| seed[i % seed.len()] * (1.0 + (i % 7) as f32 * 0.1))
        .collect();
    let layout = shape.layout();
    values[0] = t;
    values[1] = n;
    for (i, count) in values[layout.counts].iter_mut().enumerate() {
        *count = if i == 1 { 0.0 } else { 3.0 };
    }
    for inverse in &mut values[layout.head_inverse] {
        *inverse = inverse.abs();
    }
    for table in [layout.unsure, layout.novel, layout.near, layout.fused] {
        values[table].sort_by(f32::total_cmp);
    }
    values
}

struct Reference {
    p: Vec<f64>,
    entropy: f64,
    energy: f64,
    novelty: f64,
    near: Option<f64>,
    boundary: Option<f64>,
}

fn reference(logits: &[f32], z: &[f32], params: &Params<'_>) -> Reference {
    let t = f64::from(params.temperature());
    let e: Vec<f64> = logits.iter().map(|&x| (f64::from(x) / t).exp()).collect();
    let sum: f64 = e.iter().sum();
    let p: Vec<f64> = e.iter().map(|e| e / sum).collect();
    let energy = -t * sum.ln();
    let d = z.len();
    let layout = params.shape().layout();
    let value = |i: usize| f64::from(params.values()[i]);
    let length = z.iter().map(|&z| f64::from(z).powi(2)).sum::<f64>().sqrt();
    let unit = |z: f32| {
        if length > 0.0 {
            f64::from(z) / length
        } else {
            0.0
        }
    };
    let c: Vec<f64> = (0..d)
        .map(|i| unit(z[i]) - value(layout.centre.start + i))
        .collect();
    let white = |start: usize| -> Vec<f64> {
        (0..d)
            .map(|i| {
                (0..=i)
                    .map(|j| value(start + i * (i + 1) / 2 + j) * c[j])
                    .sum()
            })
            .collect()
    };
    let y = white(layout.within.start);
    let background: f64 = white(layout.background.start).iter().map(|y| y * y).sum();
    let nearest = (0..logits.len())
        .filter(|&k| value(layout.counts.start + k) > 0.0)
        .map(|k| {
            (0..d)
                .map(|i| (y[i] - value(layout.means.start + k * d + i)).powi(2))
                .sum::<f64>()
        })
        .fold(f64::INFINITY, f64::min);
    let root = |square: f64| square.sqrt();
    let near = (0..usize::from(params.shape().prototypes))
        .map(|p| {
            let at = layout.prototypes.start + p * d;
            root((0..d).map(|i| (unit(z[i]) - value(at + i)).powi(2)).sum())
        })
        .reduce(f64::min);
    let boundary = params.shape().head.then(|| {
        let top = (0..logits.len())
            .rev()
            .max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        let top = top.unwrap();
        let away = root(
            (0..d)
                .map(|i| (f64::from(z[i]) - value(layout.head_mean.start + i)).powi(2))
                .sum(),
        );
        let sum: f64 = (0..logits.len())
            .filter(|&k| k != top)
            .map(|k| {
                let (high, low) = (k.max(top), k.min(top));
                let inverse = value(layout.head_inverse.start + high * (high - 1) / 2 + low);
                (f64::from(logits[top]) - f64::from(logits[k])).abs() * inverse
            })
            .sum();
        sum / (logits.len().max(2) - 1) as f64 / away
    });
    Reference {
        near,
        boundary,
        entropy: p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum(),
        p,
        energy,
        novelty: if d == 0 { energy } else { nearest - background },
    }
}

fn close(ours: f32, plain: f64, size: f64) -> bool {
    (f64::from(ours) - plain).abs() <= 2e-5 * (1.0 + size)
}

proptest! {
    #[test]
    fn agrees_with_plain_f64(
        logits in prop::collection::vec(-30.0f32..30.0, 1..14),
        z in prop::collection::vec(-4.0f32..4.0, 0..21),
        seed in prop::collection::vec(-1.0f32..1.0, 5..30),
        t in 0.3f32..5.0,
        head in any::<bool>(),
        prototypes in 0u16..6,
    ) {
        let dim = z.len() as u16;
        let shape = Shape {
            head: head && dim > 0,
            prototypes: if dim > 0 { prototypes } else { 0 },
            ..Shape::plain(logits.len() as u16, dim, 9)
        };
        let values = params_of(shape, t, 50.0, &seed);
        let params = Params::checked(shape, &values).unwrap();
        let mut scratch = vec![f32::NAN; shape.scratch()];
        let ours = score(&logits, &z, &params, &mut scratch).unwrap();
        let plain = reference(&logits, &z, &params);
        let mut sorted = plain.p.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        prop_assert!(close(ours.confidence, sorted[0], 1.0));
        prop_assert!(close(ours.margin, sorted[0] - sorted.get(1).unwrap_or(&0.0), 1.0));
        prop_assert!(close(plain.p[usize::from(ours.top1)] as f32, sorted[0], 1.0));
        if logits.len() > 1 {
            prop_assert!(ours.top1 != ours.top2);
            prop_assert!(close(plain.p[usize::from(ours.top2)] as f32, sorted[1], 1.0));
        }
        prop_assert!(close(ours.entropy, plain.entropy, 3.0), "{} {}", ours.entropy, plain.entropy);
        prop_assert!(close(ours.energy, plain.energy, 60.0));
        // Rounding grows with the two squares that are subtracted, which are below 4·10³ here.
        prop_assert!(close(ours.novelty, plain.novelty, 4e3), "{} {}", ours.novelty, plain.novelty);
        prop_assert!((0.0..=1.0).contains(&ours.u_unsure) && (0.0..=1.0).contains(&ours.u_novel));
        let near = neighbour::nearest_prototype(&z, &params, &mut scratch);
        prop_assert_eq!(near.is_some(), plain.near.is_some());
        if let (Some(ours), Some(plain)) = (near, plain.near) {
            prop_assert!(close(ours, plain, 1.0), "{} {}", ours, plain);
        }
        let boundary = boundary::boundary_distance(&logits, &z, &params);
        prop_assert_eq!(boundary.is_some(), plain.boundary.is_some());
        if let (Some(ours), Some(plain)) = (boundary, plain.boundary) {
            prop_assert!(close(ours, plain, plain), "{} {}", ours, plain);
        }
        if !z.is_empty() {
            let alone = mahalanobis::relative_mahalanobis(&z, &params, &mut scratch);
            prop_assert_eq!(alone.to_bits(), ours.novelty.to_bits());
        }
        let layout = shape.layout();
        let u = |table: std::ops::Range<usize>, x: f32| conformal(&values[table], 50.0, x);
        let expected = match near {
            None => u(layout.novel, ours.novelty),
            Some(near) => {
                let p = |u: f32| 1.0 - f64::from(u);
                let product = p(u(layout.novel.clone(), ours.novelty)) * p(u(layout.near, near));
                let fisher = -product.ln();
                prop_assert!(close(fused(ours.novelty, near, &params), fisher, fisher));
                u(layout.fused, fused(ours.novelty, near, &params))
            }
        };
        prop_assert_eq!(ours.u_novel, expected);
        let mut p = vec![0.0; logits.len()];
        softmax(&logits, t, &mut p);
        for (ours, plain) in p.iter().zip(&plain.p) {
            prop_assert!(close(*ours, *plain, 1.0));
        }
    }

    #[test]
    fn any_bits_give_an_error_or_finite_scores(
        bits in prop::collection::vec(any::<u32>(), 8),
        huge in any::<bool>(),
    ) {
        let shape = Shape { head: true, prototypes: 2, ..Shape::plain(4, 4, 5) };
        let values = params_of(shape, 0.5, 50.0, &[0.3, -0.7, 0.9, 0.1, 0.2]);
        let params = Params::checked(shape, &values).unwrap();
        let floats: Vec<f32> = bits
            .iter()
            .map(|&b| if huge { f32::from_bits(b | 0x7e00_0000) } else { f32::from_bits(b) })
            .collect();
        match score(&floats[..4], &floats[4..], &params, &mut [0.0; 8]) {
            Err(error) => {
                prop_assert_eq!(error, ScoreError::NotFinite);
                prop_assert!(floats.iter().any(|x| !x.is_finite()));
            }
            Ok(s) => {
                for x in [s.confidence, s.margin, s.entropy, s.energy, s.novelty, s.u_unsure, s.u_novel] {
                    prop_assert!(x.is_finite(), "{:?}", s);
                }
                prop_assert!((0.0..=1.0).contains(&s.u_unsure) && (0.0..=1.0).contains(&s.u_novel));
            }
        }
    }

    #[test]
    fn conformal_rises_with_the_score(
        mut table in prop::collection::vec(-5.0f32..5.0, 2..20),
        a in -8.0f32..8.0,
        b in -8.0f32..8.0,
    ) {
        table.sort_by(f32::total_cmp);
        let (low, high) = (a.min(b), a.max(b));
        prop_assert!(conformal(&table, 30.0, low) <= conformal(&table, 30.0, high));
    }

    #[test]
    fn quantise_is_within_half_a_step(z in prop::collection::vec(-50.0f32..50.0, 0..40)) {
        let mut q = vec![0i8; z.len()];
        let scale = quantise(&z, &mut q);
        for (z, q) in z.iter().zip(&q) {
            prop_assert!((z - scale * f32::from(*q)).abs() <= scale * 0.5001);
        }
    }
}

#[test]
fn conformal_matches_counting() {
    // 1001 calibration scores 0, 1, …, 1000: the quantile at level q is 1000·q.
    let m = 65;
    let table: Vec<f32> = (0..m).map(|i| 1000.0 * knot_level(i, m)).collect();
    for s in [1.0f32, 250.0, 500.5, 900.0, 990.0, 999.0] {
        let smaller = (0..=1000).filter(|&i| (i as f32) < s).count() as f32;
        let exact = smaller / 1002.0;
        let ours = conformal(&table, 1001.0, s);
        assert!((ours - exact).abs() < 2e-3, "{s}: {ours} {exact}");
    }
    assert_eq!(conformal(&table, 1001.0, -3.0), 0.0);
    let beyond = [1000.0, 1001.0, 2000.0, 1e9].map(|s| conformal(&table, 1001.0, s));
    assert!(
        beyond.is_sorted_by(|a, b| a < b) && beyond[3] <= 1.0,
        "{beyond:?}"
    );
}

#[test]
fn ties_count_as_familiar() {
    // Half of the calibration set is as sure as can be; a frame as sure as that is not unusual.
    let table = [-1.0, -1.0, -1.0, -0.5, 0.0];
    assert_eq!(conformal(&table, 100.0, -1.0), 0.0);
    assert!(conformal(&table, 100.0, -0.99) > 0.7);
}

#[test]
fn a_broken_or_empty_embedding_quantises_to_zero() {
    let mut q = [9i8; 3];
    assert_eq!(quantise(&[0.0, f32::NAN, f32::INFINITY], &mut q), 0.0);
    assert_eq!(q, [0; 3]);
}

#[test]
fn wrong_lengths_are_named() {
    let shape = Shape::plain(2, 2, 2);
    let values = params_of(shape, 1.0, 5.0, &[0.5]);
    let params = Params::checked(shape, &values).unwrap();
    let mut scratch = [0.0; 4];
    assert_eq!(
        score(&[0.0], &[0.0; 2], &params, &mut scratch),
        Err(ScoreError::Logits {
            expected: 2,
            found: 1
        })
    );
    assert!(matches!(
        score(&[0.0; 2], &[], &params, &mut scratch),
        Err(ScoreError::Embedding { .. })
    ));
    assert!(matches!(
        score(&[0.0; 2], &[0.0; 2], &params, &mut scratch[..3]),
        Err(ScoreError::Scratch { .. })
    ));
}

/// The integer form against the formula in f64 over the same whole numbers.
mod whole {
    use super::*;
    use crate::params::Params;
    use crate::score::integer::{ABSENT, FRACTION, GAIN, Integer, MEAN};

    fn append(bytes: &mut Vec<u8>, words: &[i32]) {
        for word in words {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }

    proptest! {
        #[test]
        fn agrees_with_plain_f64(
            (classes, rank) in (1usize..6, 1usize..5),
            dim in 5usize..40,
            numbers in prop::collection::vec(any::<i8>(), 400),
            shift in 4u8..12,
        ) {
            let mut numbers = numbers.into_iter().cycle();
            let mut next = || i32::from(numbers.next().unwrap());
            let shape = Shape { rank: rank as u16, ..Shape::plain(classes as u16, dim as u16, 2) };
            let values = params_of(shape, 1.0, 5.0, &[0.5]);
            let mut bytes = vec![0; shape.front_len()];
            Params::checked(shape, &values).unwrap().encode(&mut bytes).unwrap();
            let scales: Vec<i32> = (0..rank).map(|_| (next().abs() + 1) << shift).collect();
            let offsets: Vec<i32> = (0..rank).map(|_| next() << 6).collect();
            let gains: Vec<i32> = (0..rank).map(|_| (next().abs() + 1) << 8).collect();
            let mut mean_scales: Vec<i32> = (0..classes).map(|_| (next().abs() + 1) << 8).collect();
            if classes > 1 {
                mean_scales[1] = ABSENT;
            }
            let rows: Vec<i32> = (0..rank * dim).map(|_| next()).collect();
            let means: Vec<i32> = (0..classes * rank).map(|_| next()).collect();
            bytes.push(shift);
            for words in [&scales, &offsets, &gains, &mean_scales] {
                append(&mut bytes, words);
            }
            bytes.extend(rows.iter().chain(&means).map(|&x| (x as i8).cast_unsigned()));
            let integer = Integer::parse(&bytes).unwrap().unwrap();
            let embedding: Vec<i8> = (0..dim).map(|_| next() as i8).collect();
            let ours = integer.novelty(&embedding, &mut vec![7; rank]).unwrap();

            let one = f64::from(1 << FRACTION);
            let length = embedding.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let t: Vec<f64> = (0..rank)
                .map(|i| {
                    let sum: f64 = (0..dim)
                        .map(|j| f64::from(rows[i * dim + j]) * f64::from(embedding[j]))
                        .sum();
                    let scale = f64::from(scales[i]) / f64::from(1u32 << shift) / one;
                    sum * scale / length.max(1.0 / 256.0) - f64::from(offsets[i]) / one
                })
                .collect();
            let background: f64 = t
                .iter()
                .zip(&gains)
                .map(|(t, &gain)| t * t * f64::from(gain) / f64::from(1 << GAIN))
                .sum();
            let nearest = (0..classes)
                .filter(|&k| mean_scales[k] != ABSENT)
                .map(|k| {
                    let mean = |i: usize| {
                        f64::from(means[k * rank + i]) * f64::from(mean_scales[k])
                            / f64::from(1 << MEAN)
                    };
                    t.iter().enumerate().map(|(i, t)| (t - mean(i)).powi(2)).sum::<f64>()
                })
                .fold(f64::INFINITY, f64::min);
            let plain = nearest - background;
            let size: f64 = nearest + background + 1.0;
            prop_assert!((f64::from(ours) / one - plain).abs() < 5e-3 * size, "{} {}", f64::from(ours) / one, plain);
            // Only the direction counts: nothing but what rounding leaves changes with the size.
            prop_assert!(integer.novelty(&embedding[1..], &mut vec![0; rank]).is_none());
            prop_assert!(integer.novelty(&embedding, &mut []).is_none());
        }
    }
}
