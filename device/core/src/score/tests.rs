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
    for table in [layout.unsure, layout.novel] {
        values[table].sort_by(f32::total_cmp);
    }
    values
}

struct Reference {
    p: Vec<f64>,
    entropy: f64,
    energy: f64,
    novelty: f64,
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
    Reference {
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
    ) {
        let shape = Shape { classes: logits.len() as u16, dim: z.len() as u16, table: 9 };
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
        let shape = Shape { classes: 4, dim: 4, table: 5 };
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
    let shape = Shape {
        classes: 2,
        dim: 2,
        table: 2,
    };
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
