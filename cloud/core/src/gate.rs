//! Whether a candidate may replace the champion: a paired bootstrap on the same items decides
//! whether it is better, and no guarded slice may have got worse. The answer is a verdict with its
//! reasons in words, since somebody will want to know.

use flywheel_shared::ids::Digest;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// What must improve.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Mean recall over classes: a rare class counts like a common one.
    #[default]
    BalancedAccuracy,
    /// Share of items that are right.
    Accuracy,
}

impl Metric {
    const fn name(self) -> &'static str {
        match self {
            Self::BalancedAccuracy => "balanced accuracy",
            Self::Accuracy => "accuracy",
        }
    }
}

/// The rules of the gate. Shares are of 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatePolicy {
    /// What must improve.
    pub metric: Metric,
    /// By how much at least, measured.
    pub min_gain: f64,
    /// In what share of the resamples the candidate must be better, 0 to 1.
    pub min_probability: f64,
    /// A guarded class or slice fails the candidate when, with 95 % confidence, it lost more recall
    /// than this. With 40 to 60 items that takes a measured loss of about 0.12 where few answers
    /// changed; so over 16 classes an equal model is refused in about one case of twenty.
    pub max_drop: f64,
    /// Other limits than `max_drop` by class or slice name; 1 lifts the guard.
    pub max_drop_of: BTreeMap<String, f64>,
    /// The most that the candidate's median latency may be, in champion's; none is no limit.
    pub max_latency_ratio: Option<f64>,
    /// What a first model, with no champion to beat, must reach.
    pub floor: f64,
    /// Bootstrap resamples.
    pub resamples: u32,
    /// Seeds them.
    pub seed: u64,
}

impl Default for GatePolicy {
    fn default() -> Self {
        Self {
            metric: Metric::BalancedAccuracy,
            min_gain: 0.0,
            min_probability: 0.8,
            max_drop: 0.05,
            max_drop_of: BTreeMap::new(),
            max_latency_ratio: Some(2.0),
            floor: 0.25,
            resamples: 2000,
            seed: 0,
        }
    }
}

/// One item of the evaluation set under both models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Digest of the sample.
    pub digest: Digest,
    /// Index of its true class.
    pub class: u32,
    /// Whether the champion is right.
    pub champion: bool,
    /// Whether the candidate is right.
    pub candidate: bool,
}

/// Some of the items under a name: night, one device, …
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Its name in the verdict.
    pub name: String,
    /// Positions of its items among the cases.
    pub items: Vec<usize>,
}

/// All that the gate looks at.
#[derive(Debug, Clone, Copy)]
pub struct Comparison<'a> {
    /// Names of the true classes.
    pub classes: &'a [String],
    /// The items.
    pub cases: &'a [Case],
    /// Guarded slices besides the classes.
    pub slices: &'a [Slice],
    /// Whether there is a champion; without one `Case::champion` is not looked at.
    pub has_champion: bool,
    /// Median latency of champion and candidate in µs; 0 when not measured.
    pub latency_us: (u32, u32),
    /// Digests of everything that the candidate was trained on.
    pub training: &'a BTreeSet<Digest>,
}

/// A difference, candidate minus champion, with a two-sided 90 % interval: each bound holds with
/// 95 % confidence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// As measured.
    pub mean: f64,
    /// Lower bound.
    pub lower: f64,
    /// Upper bound.
    pub upper: f64,
}

/// How one class or slice moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SliceVerdict {
    /// Name of the class or slice.
    pub name: String,
    /// Items in it.
    pub items: u32,
    /// Share that the champion has right.
    pub champion: f64,
    /// Share that the candidate has right.
    pub candidate: f64,
    /// The difference.
    pub difference: Difference,
    /// Whether it fails the candidate.
    pub regressed: bool,
}

/// The gate's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether the candidate may be released.
    pub passed: bool,
    /// Why, in words: all objections, or what speaks for it.
    pub reasons: Vec<String>,
    /// The candidate's metric.
    pub candidate: f64,
    /// The champion's metric, if there is one.
    pub champion: Option<f64>,
    /// The gain over the champion, if there is one.
    pub gain: Option<Difference>,
    /// Share of the resamples in which the candidate is better, if there is a champion.
    pub probability: Option<f64>,
    /// Classes with items, then slices; empty without a champion.
    pub slices: Vec<SliceVerdict>,
}

/// Why there can't be a verdict.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GateError {
    /// No case.
    #[error("the evaluation set is empty; the gate has nothing to compare")]
    Empty,
    /// A class index beyond the names.
    #[error("case {case}: class {class} is not among the {classes} classes")]
    Class {
        /// Position of the case.
        case: usize,
        /// The index.
        class: u32,
        /// How many names there are.
        classes: usize,
    },
    /// A slice that names no case.
    #[error("slice `{slice}` names item {item}, but there are {cases} cases")]
    Slice {
        /// Its name.
        slice: String,
        /// The position it names.
        item: usize,
        /// How many cases there are.
        cases: usize,
    },
    /// A number of the policy is out of bounds.
    #[error("gate policy: {field} must be {want}")]
    Policy {
        /// Which.
        field: &'static str,
        /// What would be right.
        want: &'static str,
    },
}

/// Judges the candidate.
///
/// # Errors
/// [`GateError`] when the comparison or the policy makes no sense; a refusal is no error.
pub fn judge(policy: &GatePolicy, comparison: &Comparison<'_>) -> Result<Verdict, GateError> {
    check(policy, comparison)?;
    let groups = by_class(comparison);
    let candidate = metric(policy.metric, &groups, |c| c.candidate);
    let mut objections = Vec::new();
    objections.extend(leak(comparison));
    objections.extend(slow(policy, comparison));
    if !comparison.has_champion {
        let name = policy.metric.name();
        let text = format!(
            "first model: {name} {candidate:.3}, the floor is {:.3}",
            policy.floor
        );
        if candidate < policy.floor {
            objections.push(text.clone());
        }
        return Ok(Verdict {
            passed: objections.is_empty(),
            reasons: or_else(objections, text),
            candidate,
            champion: None,
            gain: None,
            probability: None,
            slices: Vec::new(),
        });
    }

    let mut rng = ChaCha8Rng::seed_from_u64(policy.seed);
    let resamples = usize::try_from(policy.resamples).unwrap_or(usize::MAX);
    // One series of resampled recall differences for each class; the metric is their mix.
    let mut totals = vec![0.0; resamples];
    let mut slices = Vec::new();
    for (class, cases) in &groups {
        let series = resample(cases, resamples, &mut rng);
        let weight = weight(policy.metric, cases.len(), &groups, comparison.cases.len());
        for (total, x) in totals.iter_mut().zip(&series) {
            *total += weight * x;
        }
        slices.push(verdict_on(policy, class, cases, series));
    }
    for slice in comparison.slices.iter().filter(|s| !s.items.is_empty()) {
        let cases: Vec<&Case> = slice.items.iter().map(|&i| &comparison.cases[i]).collect();
        let series = resample(&cases, resamples, &mut rng);
        slices.push(verdict_on(policy, &slice.name, &cases, series));
    }

    let champion = metric(policy.metric, &groups, |c| c.champion);
    let better = totals.iter().filter(|&&x| x > 0.0).count();
    let probability = better as f64 / resamples as f64;
    let gain = bounds(candidate - champion, totals);
    let summary = format!(
        "{} {champion:.3} → {candidate:.3} ({:+.3}, 90 % interval {:+.3} to {:+.3}); better in \
         {:.0} % of the resamples",
        policy.metric.name(),
        gain.mean,
        gain.lower,
        gain.upper,
        probability * 100.0
    );
    if gain.mean < policy.min_gain || probability < policy.min_probability {
        objections.push(format!(
            "not better enough: {summary}; wanted a gain of {:.3} in {:.0} %",
            policy.min_gain,
            policy.min_probability * 100.0
        ));
    }
    for slice in slices.iter().filter(|s| s.regressed) {
        objections.push(format!(
            "`{}` got worse: {:.3} → {:.3} on {} items, at best {:+.3}; at most {:.3} may be lost",
            slice.name,
            slice.champion,
            slice.candidate,
            slice.items,
            slice.difference.upper,
            policy.limit(&slice.name)
        ));
    }
    Ok(Verdict {
        passed: objections.is_empty(),
        reasons: or_else(objections, summary),
        candidate,
        champion: Some(champion),
        gain: Some(gain),
        probability: Some(probability),
        slices,
    })
}

impl GatePolicy {
    fn limit(&self, name: &str) -> f64 {
        self.max_drop_of.get(name).copied().unwrap_or(self.max_drop)
    }
}

fn check(policy: &GatePolicy, comparison: &Comparison<'_>) -> Result<(), GateError> {
    let is_share = |x: f64| (0.0..=1.0).contains(&x);
    let drops = policy.max_drop_of.values().all(|&x| is_share(x));
    let ratio = policy.max_latency_ratio.is_none_or(|r| r > 0.0);
    let rules = [
        (
            "resamples",
            (100..=1_000_000).contains(&policy.resamples),
            "from 100 to 1000000",
        ),
        (
            "min_gain",
            (-1.0..=1.0).contains(&policy.min_gain),
            "from -1 to 1",
        ),
        (
            "min_probability",
            is_share(policy.min_probability),
            "from 0 to 1",
        ),
        ("max_drop", is_share(policy.max_drop), "from 0 to 1"),
        ("max_drop_of", drops, "from 0 to 1 for each class"),
        ("floor", is_share(policy.floor), "from 0 to 1"),
        ("max_latency_ratio", ratio, "above 0"),
    ];
    for (field, holds, want) in rules {
        if !holds {
            return Err(GateError::Policy { field, want });
        }
    }
    if comparison.cases.is_empty() {
        return Err(GateError::Empty);
    }
    for (case, x) in comparison.cases.iter().enumerate() {
        if usize::try_from(x.class).map_or(true, |c| c >= comparison.classes.len()) {
            return Err(GateError::Class {
                case,
                class: x.class,
                classes: comparison.classes.len(),
            });
        }
    }
    for slice in comparison.slices {
        if let Some(&item) = slice.items.iter().find(|&&i| i >= comparison.cases.len()) {
            return Err(GateError::Slice {
                slice: slice.name.clone(),
                item,
                cases: comparison.cases.len(),
            });
        }
    }
    Ok(())
}

/// Cases by true class, in class order, classes without any left out.
fn by_class<'a>(comparison: &Comparison<'a>) -> Vec<(&'a str, Vec<&'a Case>)> {
    let mut groups: Vec<(&str, Vec<&Case>)> = comparison
        .classes
        .iter()
        .map(|name| (name.as_str(), Vec::new()))
        .collect();
    for case in comparison.cases {
        // `check` made sure of the index.
        if let Some(group) = usize::try_from(case.class)
            .ok()
            .and_then(|c| groups.get_mut(c))
        {
            group.1.push(case);
        }
    }
    groups.retain(|(_, cases)| !cases.is_empty());
    groups
}

fn share(cases: &[&Case], right: impl Fn(&Case) -> bool) -> f64 {
    cases.iter().filter(|c| right(c)).count() as f64 / cases.len() as f64
}

fn weight(metric: Metric, items: usize, groups: &[(&str, Vec<&Case>)], all: usize) -> f64 {
    match metric {
        Metric::BalancedAccuracy => 1.0 / groups.len() as f64,
        Metric::Accuracy => items as f64 / all as f64,
    }
}

fn metric(
    metric: Metric,
    groups: &[(&str, Vec<&Case>)],
    right: impl Fn(&Case) -> bool + Copy,
) -> f64 {
    let all = groups.iter().map(|(_, cases)| cases.len()).sum();
    groups
        .iter()
        .map(|(_, cases)| weight(metric, cases.len(), groups, all) * share(cases, right))
        .sum()
}

/// Differences of the share that is right, candidate minus champion, on cases drawn with
/// replacement. The pairing stays: a case brings both answers.
fn resample(cases: &[&Case], resamples: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    let changes: Vec<i32> = cases
        .iter()
        .map(|c| i32::from(c.candidate) - i32::from(c.champion))
        .collect();
    if changes.iter().all(|&x| x == 0) {
        return vec![0.0; resamples];
    }
    (0..resamples)
        .map(|_| {
            let sum: i32 = (0..changes.len())
                .map(|_| changes[rng.random_range(0..changes.len())])
                .sum();
            f64::from(sum) / changes.len() as f64
        })
        .collect()
}

fn bounds(mean: f64, mut series: Vec<f64>) -> Difference {
    series.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| {
        let rank = (series.len() as f64 * share).ceil().max(1.0) as usize;
        series.get(rank - 1).copied().unwrap_or(mean)
    };
    Difference {
        mean,
        lower: at(0.05),
        upper: at(0.95),
    }
}

fn verdict_on(policy: &GatePolicy, name: &str, cases: &[&Case], series: Vec<f64>) -> SliceVerdict {
    let (champion, candidate) = (share(cases, |c| c.champion), share(cases, |c| c.candidate));
    let difference = bounds(candidate - champion, series);
    SliceVerdict {
        name: name.to_owned(),
        items: u32::try_from(cases.len()).unwrap_or(u32::MAX),
        champion,
        candidate,
        difference,
        regressed: difference.upper < -policy.limit(name),
    }
}

fn leak(comparison: &Comparison<'_>) -> Option<String> {
    let leaked: Vec<Digest> = comparison
        .cases
        .iter()
        .map(|c| c.digest)
        .filter(|d| comparison.training.contains(d))
        .collect();
    let first = leaked.first()?;
    Some(format!(
        "{} of {} evaluation items were trained on, the first is {first}; take them out of the \
         data set",
        leaked.len(),
        comparison.cases.len()
    ))
}

fn slow(policy: &GatePolicy, comparison: &Comparison<'_>) -> Option<String> {
    let (champion, candidate) = comparison.latency_us;
    let limit = policy.max_latency_ratio?;
    if !comparison.has_champion || champion == 0 {
        return None;
    }
    let ratio = f64::from(candidate) / f64::from(champion);
    (ratio > limit).then(|| {
        format!(
            "too slow: {candidate} µs against {champion} µs is {ratio:.2} times as long; at most \
             {limit:.2} is allowed"
        )
    })
}

fn or_else(objections: Vec<String>, otherwise: String) -> Vec<String> {
    if objections.is_empty() {
        vec![otherwise]
    } else {
        objections
    }
}

#[cfg(test)]
mod tests;
