//! Whether the world has changed, and whether it is time to train again.
//!
//! Drift is a two-sample Kolmogorov–Smirnov test on each class's softmax output, Bonferroni
//! corrected (BBSDs of "Failing Loudly", 1810.11953). Both samples must come from the uniform lane:
//! the other lanes pick what looks odd and would always look drifted.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Fewer rows than this on either side say nothing.
pub const MIN_ROWS: usize = 20;

/// The outcome of a two-sample Kolmogorov–Smirnov test.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ks {
    /// Greatest distance between the two empirical distribution functions, 0 to 1.
    pub statistic: f64,
    /// Asymptotic p-value; with ties it errs towards 1.
    pub p: f64,
}

/// The test of one class's softmax output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassDrift {
    /// The class name.
    pub class: String,
    /// The test.
    pub ks: Ks,
}

/// The drift of a model's outputs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DriftReport {
    /// Rows compared: reference, recent.
    pub rows: (usize, usize),
    /// Each class in model order.
    pub classes: Vec<ClassDrift>,
    /// A class has drifted when its p-value is below this: α divided by the number of classes.
    pub threshold: f64,
    /// Whether any class has drifted.
    pub drifted: bool,
}

impl DriftReport {
    /// The class with the smallest p-value.
    #[must_use]
    pub fn strongest(&self) -> Option<&ClassDrift> {
        self.classes.iter().min_by(|a, b| a.ks.p.total_cmp(&b.ks.p))
    }
}

/// Why drift can't be tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DriftError {
    /// Too few rows.
    #[error(
        "{reference} reference and {recent} recent rows; at least {MIN_ROWS} of each are needed"
    )]
    TooFew {
        /// Rows of the reference.
        reference: usize,
        /// Recent rows.
        recent: usize,
    },
    /// A row of the wrong length or with a value that is not finite.
    #[error("row {row} of the {side} sample must hold {classes} finite probabilities")]
    Row {
        /// "reference" or "recent".
        side: &'static str,
        /// Position of the row.
        row: usize,
        /// Number of classes.
        classes: usize,
    },
    /// α outside (0, 1).
    #[error("alpha must be above 0 and below 1")]
    Alpha,
}

/// Tests whether `recent` softmax outputs differ from `reference`, at family-wise level `alpha`.
/// Rows are probabilities in the order of `classes`.
///
/// # Errors
/// [`DriftError`] when there is too little or malformed data.
pub fn drift(
    classes: &[String],
    reference: &[&[f32]],
    recent: &[&[f32]],
    alpha: f64,
) -> Result<DriftReport, DriftError> {
    if !(alpha > 0.0 && alpha < 1.0) {
        return Err(DriftError::Alpha);
    }
    if reference.len() < MIN_ROWS || recent.len() < MIN_ROWS {
        return Err(DriftError::TooFew {
            reference: reference.len(),
            recent: recent.len(),
        });
    }
    for (side, rows) in [("reference", reference), ("recent", recent)] {
        let bad = |row: &&[f32]| row.len() != classes.len() || row.iter().any(|p| !p.is_finite());
        if let Some(row) = rows.iter().position(bad) {
            return Err(DriftError::Row {
                side,
                row,
                classes: classes.len(),
            });
        }
    }
    let column = |rows: &[&[f32]], class: usize| -> Vec<f32> {
        let mut column: Vec<f32> = rows.iter().map(|row| row[class]).collect();
        column.sort_unstable_by(f32::total_cmp);
        column
    };
    let threshold = alpha / classes.len().max(1) as f64;
    let classes: Vec<ClassDrift> = classes
        .iter()
        .enumerate()
        .map(|(i, class)| ClassDrift {
            class: class.clone(),
            ks: ks_sorted(&column(reference, i), &column(recent, i)),
        })
        .collect();
    Ok(DriftReport {
        rows: (reference.len(), recent.len()),
        drifted: classes.iter().any(|c| c.ks.p < threshold),
        classes,
        threshold,
    })
}

/// The test on two samples in any order; `None` when either has fewer than [`MIN_ROWS`] values.
#[must_use]
pub fn ks(a: &[f32], b: &[f32]) -> Option<Ks> {
    if a.len().min(b.len()) < MIN_ROWS {
        return None;
    }
    let sorted = |of: &[f32]| {
        let mut of = of.to_vec();
        of.sort_unstable_by(f32::total_cmp);
        of
    };
    Some(ks_sorted(&sorted(a), &sorted(b)))
}

/// The test on two sorted, non-empty samples.
fn ks_sorted(a: &[f32], b: &[f32]) -> Ks {
    let (n, m) = (a.len() as f64, b.len() as f64);
    let (mut i, mut j) = (0, 0);
    let mut statistic = 0.0_f64;
    while let (Some(&x), Some(&y)) = (a.get(i), b.get(j)) {
        // Both functions step over all copies of a value before they are compared.
        let value = x.min(y);
        while a.get(i).is_some_and(|&v| v <= value) {
            i += 1;
        }
        while b.get(j).is_some_and(|&v| v <= value) {
            j += 1;
        }
        statistic = statistic.max((i as f64 / n - j as f64 / m).abs());
    }
    let root = (n * m / (n + m)).sqrt();
    Ks {
        statistic,
        // Stephens' correction for finite samples, as in Numerical Recipes 14.3.
        p: kolmogorov((root + 0.12 + 0.11 / root) * statistic),
    }
}

/// Smirnov's limit Q(λ) = 2 Σ (−1)^(j−1) exp(−2 j² λ²), the probability of a greater distance.
fn kolmogorov(lambda: f64) -> f64 {
    // Below this the sum is 1 to ten digits but converges too slowly.
    if lambda < 0.25 {
        return 1.0;
    }
    let mut sum = 0.0;
    let mut sign = 1.0;
    for j in 1..=100 {
        let term = (-2.0 * f64::from(j * j) * lambda * lambda).exp();
        sum += sign * term;
        if term < 1e-16 {
            break;
        }
        sign = -sign;
    }
    (2.0 * sum).clamp(0.0, 1.0)
}

/// When to train again. A 0 switches a rule off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trigger {
    /// After so many new labels.
    pub new_labels: u32,
    /// When the uniform lane has drifted.
    pub drift: bool,
    /// So long after the last training, in ms.
    pub schedule_ms: u64,
    /// Never with fewer new labels than this: there would be nothing to learn.
    pub min_labels: u32,
    /// Never sooner than this after the last training, in ms.
    pub rest_ms: u64,
}

impl Default for Trigger {
    fn default() -> Self {
        Self {
            new_labels: 200,
            drift: true,
            schedule_ms: 0,
            min_labels: 20,
            rest_ms: 0,
        }
    }
}

/// What happened since the last training.
#[derive(Debug, Clone, Copy)]
pub struct Since<'a> {
    /// Labels given since.
    pub labels: u32,
    /// When it was, in ms since the Unix epoch; `None` when there was none.
    pub trained_ms: Option<u64>,
    /// The latest test against the data it was trained for.
    pub drift: Option<&'a DriftReport>,
}

/// Whether to train.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decision {
    /// Now, for these reasons.
    Train {
        /// In words.
        reasons: Vec<String>,
    },
    /// Not yet.
    Wait {
        /// In words.
        reason: String,
    },
}

impl Trigger {
    /// Decides at `now_ms`.
    #[must_use]
    pub fn decide(&self, since: &Since<'_>, now_ms: u64) -> Decision {
        let wait = |reason: String| Decision::Wait { reason };
        let age = since.trained_ms.map(|at| now_ms.saturating_sub(at));
        if let Some(age) = age.filter(|&age| age < self.rest_ms) {
            return wait(format!(
                "trained {age} ms ago; rests until {} ms",
                self.rest_ms
            ));
        }
        let wanted = self.min_labels.max(1);
        if since.labels < wanted {
            return wait(format!("{} new labels; at least {wanted}", since.labels));
        }
        let mut reasons = Vec::new();
        if self.new_labels > 0 && since.labels >= self.new_labels {
            reasons.push(format!("{} new labels", since.labels));
        }
        let drifted = since.drift.filter(|d| self.drift && d.drifted);
        if let Some(class) = drifted.and_then(DriftReport::strongest) {
            reasons.push(format!(
                "drift, most in the output for `{}` (KS {:.2}, p {:.1e})",
                class.class, class.ks.statistic, class.ks.p
            ));
        }
        if self.schedule_ms > 0 && age.is_none_or(|age| age >= self.schedule_ms) {
            reasons.push(match age {
                Some(age) => format!("on schedule, {age} ms after the last training"),
                None => "on schedule, for the first time".to_owned(),
            });
        }
        if reasons.is_empty() {
            wait(format!("{} new labels and no rule asks", since.labels))
        } else {
            Decision::Train { reasons }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const CLASSES: usize = 10;

    fn names() -> Vec<String> {
        (0..CLASSES).map(|i| format!("class {i}")).collect()
    }

    /// Softmax rows of random logits; `shift` is added to the logit of class 3.
    fn rows(n: usize, shift: f32, rng: &mut ChaCha8Rng) -> Vec<Vec<f32>> {
        (0..n)
            .map(|_| {
                let mut logits: Vec<f32> =
                    (0..CLASSES).map(|_| rng.random_range(-2.0..2.0)).collect();
                logits[3] += shift;
                let mut probs = vec![0.0; CLASSES];
                crate::evaluate::softmax(&logits, 1.0, &mut probs);
                probs
            })
            .collect()
    }

    fn run(shift: f32, rng: &mut ChaCha8Rng) -> DriftReport {
        let (a, b) = (rows(150, 0.0, rng), rows(120, shift, rng));
        let a: Vec<&[f32]> = a.iter().map(Vec::as_slice).collect();
        let b: Vec<&[f32]> = b.iter().map(Vec::as_slice).collect();
        drift(&names(), &a, &b, 0.05).unwrap()
    }

    #[test]
    fn the_statistic_is_the_greatest_gap() {
        let ks = ks_sorted(&[1.0, 2.0, 3.0, 4.0], &[3.0, 4.0, 5.0, 6.0]);
        assert_eq!(ks.statistic, 0.5);
        assert_eq!(ks_sorted(&[1.0; 30], &[1.0; 20]).statistic, 0.0);
        assert_eq!(ks_sorted(&[0.0; 30], &[1.0; 20]).statistic, 1.0);
        assert!(ks_sorted(&[0.0; 30], &[1.0; 20]).p < 1e-9);
    }

    #[test]
    fn the_limit_law_matches_published_values() {
        // Smirnov's table (1948).
        for (lambda, q) in [
            (0.5, 0.963_945),
            (1.0, 0.269_999_67),
            (1.358, 0.05),
            (1.628, 0.01),
        ] {
            assert!((kolmogorov(lambda) - q).abs() < 1e-4, "{lambda}");
        }
        assert_eq!(kolmogorov(0.0), 1.0);
    }

    #[test]
    fn false_alarms_are_nominal_and_a_shift_is_found() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let (mut alarms, mut single) = (0, 0);
        for _ in 0..300 {
            let report = run(0.0, &mut rng);
            alarms += u32::from(report.drifted);
            single += u32::from(report.classes[0].ks.p < 0.05);
        }
        // Nominal: 15 each; bounds at about four standard deviations.
        assert!(alarms <= 30, "{alarms} of 300 family-wise");
        assert!((3..=30).contains(&single), "{single} of 300 single tests");
        let found = (0..50).filter(|_| {
            let report = run(1.0, &mut rng);
            report.drifted && report.strongest().is_some_and(|c| c.class == "class 3")
        });
        assert!(found.count() >= 45);
    }

    #[test]
    fn bad_data_is_named() {
        let good = vec![0.1_f32; CLASSES];
        let short = vec![0.1_f32; 3];
        let many: Vec<&[f32]> = vec![&good; MIN_ROWS];
        let mut broken = many.clone();
        broken[7] = &short;
        assert!(matches!(
            drift(&names(), &many, &many[1..], 0.05),
            Err(DriftError::TooFew { recent: 19, .. })
        ));
        assert!(matches!(
            drift(&names(), &many, &broken, 0.05),
            Err(DriftError::Row {
                side: "recent",
                row: 7,
                ..
            })
        ));
        assert_eq!(drift(&names(), &many, &many, 0.0), Err(DriftError::Alpha));
    }

    #[test]
    fn each_rule_triggers_and_nothing_does_without_labels() {
        let trigger = Trigger {
            new_labels: 100,
            drift: true,
            schedule_ms: 1000,
            min_labels: 10,
            rest_ms: 50,
        };
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        let drifted = run(2.0, &mut rng);
        let since = |labels, trained_ms, drift| Since {
            labels,
            trained_ms,
            drift,
        };
        let reasons = |since: &Since<'_>, now| match trigger.decide(since, now) {
            Decision::Train { reasons } => reasons.len(),
            Decision::Wait { .. } => 0,
        };
        assert_eq!(reasons(&since(100, Some(900), None), 1000), 1);
        assert_eq!(reasons(&since(99, Some(900), None), 1000), 0);
        assert_eq!(reasons(&since(99, Some(900), Some(&drifted)), 1000), 1);
        assert_eq!(reasons(&since(99, Some(0), None), 1000), 1);
        assert_eq!(reasons(&since(99, None, None), 0), 1);
        assert_eq!(reasons(&since(100, Some(0), Some(&drifted)), 1000), 3);
        assert_eq!(reasons(&since(100, Some(951), Some(&drifted)), 1000), 0);
        assert_eq!(reasons(&since(9, Some(0), Some(&drifted)), 1000), 0);
        let off = Trigger {
            new_labels: 0,
            drift: false,
            schedule_ms: 0,
            ..trigger
        };
        assert!(matches!(
            off.decide(&since(5000, None, Some(&drifted)), 0),
            Decision::Wait { .. }
        ));
    }
}
