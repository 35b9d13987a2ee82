//! How good a model is on a held-out set, from its outputs on each item: one report for people, for
//! the gate and for the registry. The server runs the exported artefact through the device's engine
//! and hands the probabilities in here.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

/// Bins of the expected calibration error.
pub const ECE_BINS: usize = 15;

/// One item of the evaluation set and what the model said about it.
#[derive(Debug, Clone, Copy)]
pub struct Outcome<'a> {
    /// Index of its class in the truth's class list.
    pub truth: u32,
    /// The model's probabilities, in the model's class order, summing to 1.
    pub probs: &'a [f32],
    /// How long the engine took, in µs.
    pub latency_us: u32,
}

/// How one class fares.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassReport {
    /// The class name.
    pub name: String,
    /// Items of this class.
    pub support: u32,
    /// Items that the model gave this class.
    pub predicted: u32,
    /// Share of its items found; `None` without any.
    pub recall: Option<f64>,
    /// Share of its predictions that are right; `None` without any.
    pub precision: Option<f64>,
}

/// Engine time in µs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50: u32,
    /// 99th percentile.
    pub p99: u32,
    /// Maximum.
    pub max: u32,
}

/// The evaluation of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Items evaluated.
    pub items: u32,
    /// Share of items that are right.
    pub accuracy: f64,
    /// Mean recall over the classes that have items.
    pub balanced_accuracy: f64,
    /// Mean recall over the rare classes that have items; `None` without any.
    pub rare_recall: Option<f64>,
    /// Expected calibration error, 15 equal-width bins (Guo et al. 2017, eq. 3).
    pub ece: f64,
    /// Engine time.
    pub latency: Latency,
    /// The truth's classes in order, then those that only the model knows.
    pub classes: Vec<ClassReport>,
    /// `confusion[truth][predicted]`, both in the order of `classes`.
    pub confusion: Vec<Vec<u32>>,
}

/// Why outcomes can't be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EvaluateError {
    /// No outcome.
    #[error("the evaluation set is empty; nothing can be said of the model")]
    Empty,
    /// A truth index beyond the class list.
    #[error("item {item}: truth class {class} is not among the {classes} classes of the set")]
    Truth {
        /// Position of the outcome.
        item: usize,
        /// The index.
        class: u32,
        /// Length of the list.
        classes: usize,
    },
    /// The wrong number of probabilities.
    #[error("item {item}: {found} probabilities for a model of {expected} classes")]
    Probabilities {
        /// Position of the outcome.
        item: usize,
        /// How many there are.
        found: usize,
        /// How many classes the model has.
        expected: usize,
    },
    /// A probability that is not finite.
    #[error("item {item}: the model's output is not a number; its weights are probably damaged")]
    NotFinite {
        /// Position of the outcome.
        item: usize,
    },
    /// A rare class that the evaluation set does not list.
    #[error("rare class `{0}` is not among the classes of the evaluation set; check its spelling")]
    Rare(String),
}

/// The softmax of `logits` at `temperature`, into `probs` of the same length. A temperature that is
/// not positive counts as 1.
pub fn softmax(logits: &[f32], temperature: f32, probs: &mut [f32]) {
    let temperature = if temperature > 0.0 { temperature } else { 1.0 };
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (p, &logit) in probs.iter_mut().zip(logits) {
        *p = ((logit - top) / temperature).exp();
        sum += *p;
    }
    for p in probs.iter_mut() {
        *p /= sum;
    }
}

/// Index of the greatest probability, the first of equals; `None` when there is none.
#[must_use]
pub fn argmax(probs: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (i, &p) in probs.iter().enumerate() {
        if best.is_none_or(|(_, b)| p > b) {
            best = Some((i, p));
        }
    }
    best.map(|(i, _)| i)
}

/// Evaluates a model of `model_classes` on outcomes whose truth indexes `truth_classes`. A truth
/// class that the model does not know counts as wrong, whatever the model says.
///
/// # Errors
/// [`EvaluateError`] names the item.
pub fn evaluate(
    truth_classes: &[String],
    model_classes: &[String],
    rare: &[String],
    outcomes: &[Outcome<'_>],
) -> Result<Report, EvaluateError> {
    check(truth_classes, model_classes, outcomes)?;
    let mut names: Vec<&String> = truth_classes.iter().collect();
    let mut index: BTreeMap<&str, usize> =
        truth_classes.iter().map(String::as_str).zip(0..).collect();
    let to_row: Vec<usize> = model_classes
        .iter()
        .map(|class| {
            *index.entry(class).or_insert_with(|| {
                names.push(class);
                names.len() - 1
            })
        })
        .collect();

    let mut confusion = vec![vec![0_u32; names.len()]; names.len()];
    let mut calibration = Calibration::default();
    let mut right = 0_u32;
    for outcome in outcomes {
        let truth = usize::try_from(outcome.truth).unwrap_or(usize::MAX);
        // `check` made sure that there is a class to say.
        let Some(top) = argmax(outcome.probs) else {
            continue;
        };
        let said = to_row[top];
        confusion[truth][said] += 1;
        right += u32::from(truth == said);
        calibration.add(outcome.probs[top], truth == said);
    }

    let classes: Vec<ClassReport> = names
        .iter()
        .enumerate()
        .map(|(class, name)| {
            let support: u32 = confusion[class].iter().sum();
            let predicted: u32 = confusion.iter().map(|row| row[class]).sum();
            let hits = f64::from(confusion[class][class]);
            ClassReport {
                name: (*name).clone(),
                support,
                predicted,
                recall: (support > 0).then(|| hits / f64::from(support)),
                precision: (predicted > 0).then(|| hits / f64::from(predicted)),
            }
        })
        .collect();
    for name in rare {
        if !index.contains_key(name.as_str()) {
            return Err(EvaluateError::Rare(name.clone()));
        }
    }
    let is_rare = |class: &&ClassReport| rare.contains(&class.name);
    Ok(Report {
        items: u32::try_from(outcomes.len()).unwrap_or(u32::MAX),
        accuracy: f64::from(right) / outcomes.len() as f64,
        balanced_accuracy: mean(classes.iter().filter_map(|c| c.recall)).unwrap_or(0.0),
        rare_recall: mean(classes.iter().filter(is_rare).filter_map(|c| c.recall)),
        ece: calibration.error(),
        latency: latency(outcomes),
        classes,
        confusion,
    })
}

fn check(
    truth_classes: &[String],
    model_classes: &[String],
    outcomes: &[Outcome<'_>],
) -> Result<(), EvaluateError> {
    if outcomes.is_empty() {
        return Err(EvaluateError::Empty);
    }
    for (item, outcome) in outcomes.iter().enumerate() {
        if usize::try_from(outcome.truth).map_or(true, |t| t >= truth_classes.len()) {
            return Err(EvaluateError::Truth {
                item,
                class: outcome.truth,
                classes: truth_classes.len(),
            });
        }
        if outcome.probs.len() != model_classes.len() || model_classes.is_empty() {
            return Err(EvaluateError::Probabilities {
                item,
                found: outcome.probs.len(),
                expected: model_classes.len(),
            });
        }
        if outcome.probs.iter().any(|p| !p.is_finite()) {
            return Err(EvaluateError::NotFinite { item });
        }
    }
    Ok(())
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(s, n), x| (s + x, n + 1));
    (count > 0).then(|| sum / f64::from(count))
}

fn latency(outcomes: &[Outcome<'_>]) -> Latency {
    let mut sorted: Vec<u32> = outcomes.iter().map(|o| o.latency_us).collect();
    sorted.sort_unstable();
    // Nearest rank: the smallest value with at least this share at or below it.
    let at = |percent: usize| {
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(0)
    };
    Latency {
        p50: at(50),
        p99: at(99),
        max: at(100),
    }
}

/// Confidence against accuracy in equal-width bins.
#[derive(Default)]
struct Calibration {
    /// Items, right items and summed confidence of each bin.
    bins: [(u32, u32, f64); ECE_BINS],
}

impl Calibration {
    fn add(&mut self, confidence: f32, right: bool) {
        // Bin m covers ((m − 1)/M, m/M], as in the paper.
        let scaled = (f64::from(confidence) * ECE_BINS as f64).ceil() as usize;
        let bin = &mut self.bins[scaled.clamp(1, ECE_BINS) - 1];
        bin.0 += 1;
        bin.1 += u32::from(right);
        bin.2 += f64::from(confidence);
    }

    /// Σ |B|/n · |acc(B) − conf(B)|.
    fn error(&self) -> f64 {
        let items: u32 = self.bins.iter().map(|b| b.0).sum();
        let gaps = self.bins.iter().map(|b| (f64::from(b.1) - b.2).abs());
        gaps.sum::<f64>() / f64::from(items.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    fn outcome(truth: u32, probs: &[f32]) -> Outcome<'_> {
        Outcome {
            truth,
            probs,
            latency_us: 100 + truth,
        }
    }

    #[test]
    fn hand_counted_example() {
        // Truth knows `deer`, which the model has never heard of; the model knows `bin`.
        let truth = names(&["stop", "yield", "deer"]);
        let model = names(&["yield", "stop", "bin"]);
        let outcomes = [
            outcome(0, &[0.1, 0.9, 0.0]),
            outcome(0, &[0.2, 0.2, 0.6]),
            outcome(1, &[1.0, 0.0, 0.0]),
            outcome(2, &[0.0, 1.0, 0.0]),
        ];
        let report = evaluate(&truth, &model, &names(&["deer", "yield"]), &outcomes).unwrap();
        assert_eq!(report.accuracy, 0.5);
        assert_eq!(report.balanced_accuracy, (0.5 + 1.0 + 0.0) / 3.0);
        assert_eq!(report.rare_recall, Some(0.5));
        let order: Vec<&str> = report.classes.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(order, ["stop", "yield", "deer", "bin"]);
        assert_eq!(report.confusion[0], [1, 0, 0, 1]);
        assert_eq!(report.confusion[2], [1, 0, 0, 0]);
        assert_eq!(report.classes[0].precision, Some(0.5));
        assert_eq!(report.classes[3].recall, None);
        assert_eq!(report.classes[2].precision, None);
        // Bins: 0.9 right (gap 0.1), 0.6 wrong (gap 0.6), two at 1.0 with one right (gap 1 of 2).
        assert!((report.ece - (0.1 + 0.6 + 1.0) / 4.0).abs() < 1e-6);
        assert_eq!(
            report.latency,
            Latency {
                p50: 100,
                p99: 102,
                max: 102
            }
        );
    }

    #[test]
    fn bad_outcomes_are_named() {
        let classes = names(&["a", "b"]);
        let run = |outcomes: &[Outcome<'_>], rare: &[&str]| {
            evaluate(&classes, &classes, &names(rare), outcomes).map(|_| ())
        };
        assert_eq!(run(&[], &[]), Err(EvaluateError::Empty));
        assert!(matches!(
            run(&[outcome(2, &[0.5, 0.5])], &[]),
            Err(EvaluateError::Truth { item: 0, .. })
        ));
        assert!(matches!(
            run(&[outcome(0, &[0.5, 0.5]), outcome(0, &[1.0])], &[]),
            Err(EvaluateError::Probabilities { item: 1, .. })
        ));
        assert_eq!(
            run(&[outcome(0, &[f32::NAN, 0.5])], &[]),
            Err(EvaluateError::NotFinite { item: 0 })
        );
        assert_eq!(
            run(&[outcome(0, &[0.5, 0.5])], &["c"]),
            Err(EvaluateError::Rare("c".into()))
        );
    }

    #[test]
    fn softmax_is_stable_and_temperature_flattens() {
        let mut probs = [0.0; 3];
        softmax(&[1000.0, 1001.0, 999.0], 1.0, &mut probs);
        assert!((probs.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(argmax(&probs), Some(1));
        let sharp = probs[1];
        softmax(&[1000.0, 1001.0, 999.0], 4.0, &mut probs);
        assert!(probs[1] < sharp);
        assert_eq!(argmax(&[]), None);
    }

    proptest! {
        #[test]
        fn reports_add_up(
            rows in prop::collection::vec((0_u32..4, prop::collection::vec(-4.0_f32..4.0, 3)), 1..60)
        ) {
            let truth = names(&["a", "b", "c", "d"]);
            let model = names(&["c", "a", "e"]);
            let probs: Vec<Vec<f32>> = rows
                .iter()
                .map(|(_, logits)| {
                    let mut probs = vec![0.0; 3];
                    softmax(logits, 1.0, &mut probs);
                    probs
                })
                .collect();
            let outcomes: Vec<Outcome<'_>> =
                rows.iter().zip(&probs).map(|((t, _), p)| outcome(*t, p)).collect();
            let report = evaluate(&truth, &model, &[], &outcomes).unwrap();
            let total: u32 = report.confusion.iter().flatten().sum();
            prop_assert_eq!(total, report.items);
            let hits: u32 = (0..5).map(|i| report.confusion[i][i]).sum();
            prop_assert!((report.accuracy - f64::from(hits) / rows.len() as f64).abs() < 1e-12);
            prop_assert!((0.0..=1.0).contains(&report.ece));
            prop_assert!((0.0..=1.0).contains(&report.balanced_accuracy));
            prop_assert_eq!(report.rare_recall, None);
            // Classes that the model does not know are never right.
            prop_assert_eq!(report.confusion[1][1] + report.confusion[3][3], 0);
        }
    }
}
