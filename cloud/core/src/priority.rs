//! Which unlabelled samples are worth a person's time next.
//!
//! One call ranks a pool for a budget. Strategies are variants of [`Strategy`]; each is a function
//! of the pool, the budget and a seed, so a ranking can be repeated and explained. `random` and
//! `margin` are plain baselines; `typiclust` serves a cold start; `flywheel` is the default: it
//! looks for what the model does not know (narrow margins, novelty), what it has seen too little of
//! (rare classes), and spreads the picks over embedding space, away from what is labelled already.

mod flywheel;
pub(crate) mod geometry;
mod limits;
#[cfg(test)]
mod tests;
mod typiclust;

use flywheel_shared::message::Lane;
use geometry::Rows;
use limits::Limits;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// What a model said about a sample. Values that are not finite count as "does not know".
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Index of the most probable class.
    pub top: u32,
    /// Index of the second most probable class; equals `top` for a model of one class.
    pub runner_up: u32,
    /// Probability of `top`, 0 to 1.
    pub confidence: f32,
    /// Difference between the two largest probabilities, 0 to 1.
    pub margin: f32,
    /// Novelty on the conformal scale `u = 1 − p`, 0 to 1.
    pub novelty: f32,
    /// Probability of classes with few labels, 0 to 1 (`Scores::rarity` of the device).
    pub rarity: f32,
}

/// Where a sample was seen. Frames of one device within [`Options::track_reach`] of each other
/// count as one track: they probably show the same thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Track<'a> {
    /// The device (and source, should it have several).
    pub device: &'a str,
    /// Index of the frame in the source.
    pub frame: u64,
}

/// A sample that could be labelled.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The embedding; empty when no model gave one, else of the pool's dimension.
    pub embedding: &'a [f32],
    /// What the live model said; `None` without a model.
    pub prediction: Option<Prediction>,
    /// Why the device kept it.
    pub lane: Lane,
    /// Where it was seen, if known.
    pub track: Option<Track<'a>>,
    /// Perceptual hash of the picture, if known: 64 bits, near-duplicates differ in few.
    pub phash: Option<u64>,
}

/// What is labelled already, in the same embedding space as the candidates.
#[derive(Debug, Clone, Copy)]
pub struct Labelled<'a> {
    /// The embedding; empty when there is none.
    pub embedding: &'a [f32],
    /// Its class, an index into [`Pool::class_counts`].
    pub class: u32,
}

/// All that a ranking looks at.
#[derive(Debug, Clone, Copy)]
pub struct Pool<'a> {
    /// What could be labelled, in an order that depends on nothing but the data.
    pub candidates: &'a [Candidate<'a>],
    /// What is labelled already; a part of it will do.
    pub labelled: &'a [Labelled<'a>],
    /// Labels per class, in the model's class order. Class indices beyond it count as unseen.
    pub class_counts: &'a [u32],
}

/// How to rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Strategy {
    /// Uniformly at random.
    Random,
    /// The narrowest margins first.
    Margin,
    /// Typical samples of large, little-labelled clusters (TypiClust, 2202.02794).
    Typiclust,
    /// TypiClust while there are fewer than two labels a class or no model, then margin, novelty
    /// and rarity spread over embedding space.
    #[default]
    Flywheel,
}

impl Strategy {
    /// Every strategy.
    pub const ALL: [Self; 4] = [Self::Random, Self::Margin, Self::Typiclust, Self::Flywheel];

    /// The name used in configuration and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Margin => "margin",
            Self::Typiclust => "typiclust",
            Self::Flywheel => "flywheel",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Strategy {
    type Err = PriorityError;

    fn from_str(text: &str) -> Result<Self, PriorityError> {
        Self::ALL
            .into_iter()
            .find(|s| s.name() == text)
            .ok_or_else(|| PriorityError::Strategy(text.to_owned()))
    }
}

/// The request for a ranking.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// How to rank.
    pub strategy: Strategy,
    /// The most picks wanted.
    pub budget: usize,
    /// Seeds every random choice.
    pub seed: u64,
    /// The most picks of one track; 0 counts as 1. Baselines ignore it.
    pub per_track: usize,
    /// How far apart two frames of one track can be. 0 for sources whose frames are independent
    /// draws, where a wider reach would only forbid good picks.
    pub track_reach: u64,
    /// Share of the budget drawn uniformly, 0 to 1, from the uniform lane while it lasts; it keeps
    /// an unbiased sample flowing and covers what no score finds. Only `flywheel` draws it.
    pub uniform_share: f32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            strategy: Strategy::Flywheel,
            budget: 200,
            seed: 0,
            per_track: 1,
            track_reach: 8,
            uniform_share: 0.05,
        }
    }
}

/// A sample to label. The order of the picks is the ranking.
#[derive(Debug, Clone, PartialEq)]
pub struct Pick {
    /// Position in [`Pool::candidates`].
    pub index: usize,
    /// The strategy's own weight at the time of the pick: explains, but does not order.
    pub score: f32,
    /// Why it was picked.
    pub why: Why,
}

/// What spoke most for a pick.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// Drawn by lot.
    Uniform,
    /// The model hesitates between two classes.
    Unsure,
    /// Unlike what the model was trained on.
    Novel,
    /// Probably of a class with few labels.
    Rare,
    /// Typical of a group with few labels.
    Typical,
    /// Far from everything labelled or picked.
    Distant,
    /// Nothing better was left.
    Remaining,
}

/// The explanation of a pick: its main reason and the numbers behind it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Why {
    /// What spoke most for it.
    pub reason: Reason,
    /// The model's margin, if there is a model.
    pub margin: Option<f32>,
    /// Novelty, 0 to 1, if there is a model.
    pub novelty: Option<f32>,
    /// Labels of the predicted class, if there is a model.
    pub labels_of_class: Option<u32>,
    /// Distance in embedding space (unit vectors, 0 to 2) to the nearest labelled or picked
    /// sample at the time of the pick.
    pub distance: Option<f32>,
    /// Members of its cluster, for `typiclust`.
    pub cluster: Option<u32>,
}

impl fmt::Display for Why {
    /// `unsure: margin 0.08, novelty 0.91, 12 labels of its class, 0.34 from the nearest known`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.reason {
            Reason::Uniform => "drawn by lot",
            Reason::Unsure => "unsure",
            Reason::Novel => "novel",
            Reason::Rare => "probably rare",
            Reason::Typical => "typical of its group",
            Reason::Distant => "unlike anything labelled",
            Reason::Remaining => "nothing better left",
        })?;
        let mut separator = ": ";
        let mut part = |f: &mut fmt::Formatter<'_>, text: fmt::Arguments<'_>| {
            let written = write!(f, "{separator}{text}");
            separator = ", ";
            written
        };
        if let Some(x) = self.margin {
            part(f, format_args!("margin {x:.2}"))?;
        }
        if let Some(x) = self.novelty {
            part(f, format_args!("novelty {x:.2}"))?;
        }
        if let Some(x) = self.labels_of_class {
            part(f, format_args!("{x} labels of its class"))?;
        }
        if let Some(x) = self.distance {
            part(f, format_args!("{x:.2} from the nearest known"))?;
        }
        if let Some(x) = self.cluster {
            part(f, format_args!("a group of {x}"))?;
        }
        Ok(())
    }
}

/// Why a pool can't be ranked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PriorityError {
    /// Embeddings of different models in one pool.
    #[error(
        "{what} {index} has an embedding of {found} values where {expected} are expected; \
         embed the pool with one model"
    )]
    Dimension {
        /// "candidate" or "labelled sample".
        what: &'static str,
        /// Its position.
        index: usize,
        /// Its dimension.
        found: usize,
        /// The dimension of the first embedding.
        expected: usize,
    },
    /// No such strategy.
    #[error("unknown strategy `{0}`; use random, margin, typiclust or flywheel")]
    Strategy(String),
}

/// Ranks the pool: at most `options.budget` picks, the most wanted first, no candidate twice.
///
/// `flywheel` and `typiclust` give fewer than the budget rather than two near-duplicates
/// (perceptual hashes within 3 bits, or equal embeddings) or more than `per_track` of a track.
/// A whole queue needs no ranking: rank for the labels that the next round can get.
///
/// # Errors
/// [`PriorityError::Dimension`] when embeddings differ in length.
pub fn rank(pool: &Pool<'_>, options: &Options) -> Result<Vec<Pick>, PriorityError> {
    check_dimensions(pool)?;
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let budget = options.budget.min(pool.candidates.len());
    if budget == 0 {
        return Ok(Vec::new());
    }
    let strategy = match options.strategy {
        Strategy::Flywheel if is_cold(pool) => Strategy::Typiclust,
        other => other,
    };
    Ok(match strategy {
        Strategy::Random => random(pool, budget, &mut rng),
        Strategy::Margin => margin(pool, budget),
        Strategy::Typiclust | Strategy::Flywheel => {
            let rows = Rows::unit(pool.candidates.iter().map(|c| c.embedding));
            let mut limits = Limits::new(pool.candidates, &rows, options);
            if strategy == Strategy::Typiclust {
                typiclust::rank(pool, &rows, &mut limits, budget, &mut rng)
            } else {
                flywheel::rank(pool, &rows, &mut limits, budget, options, &mut rng)
            }
        }
    })
}

/// Whether there is too little to go by for scores: fewer than two labels a class, or no model.
fn is_cold(pool: &Pool<'_>) -> bool {
    let labels: u64 = pool.class_counts.iter().map(|&n| u64::from(n)).sum();
    let scored = pool.candidates.iter().filter(|c| c.prediction.is_some());
    labels < 2 * pool.class_counts.len().max(1) as u64 || scored.count() * 2 < pool.candidates.len()
}

fn check_dimensions(pool: &Pool<'_>) -> Result<(), PriorityError> {
    let candidates = pool.candidates.iter().map(|c| c.embedding.len());
    let labelled = pool.labelled.iter().map(|l| l.embedding.len());
    let all = (candidates.enumerate().map(|(i, n)| ("candidate", i, n)))
        .chain(labelled.enumerate().map(|(i, n)| ("labelled sample", i, n)));
    let mut expected = None;
    for (what, index, found) in all.filter(|(_, _, n)| *n > 0) {
        let expected = *expected.get_or_insert(found);
        if found != expected {
            return Err(PriorityError::Dimension {
                what,
                index,
                found,
                expected,
            });
        }
    }
    Ok(())
}

fn random(pool: &Pool<'_>, budget: usize, rng: &mut ChaCha8Rng) -> Vec<Pick> {
    let mut order: Vec<usize> = (0..pool.candidates.len()).collect();
    let (drawn, _) = order.partial_shuffle(rng, budget);
    drawn
        .iter()
        .map(|&index| Pick {
            index,
            score: 1.0,
            why: why(pool, index, Reason::Uniform, None),
        })
        .collect()
}

fn margin(pool: &Pool<'_>, budget: usize) -> Vec<Pick> {
    let mut order: Vec<usize> = (0..pool.candidates.len()).collect();
    order.sort_by(|&a, &b| {
        margin_of(&pool.candidates[a]).total_cmp(&margin_of(&pool.candidates[b]))
    });
    order.truncate(budget);
    order
        .into_iter()
        .map(|index| Pick {
            index,
            score: 1.0 - margin_of(&pool.candidates[index]),
            why: why(pool, index, Reason::Unsure, None),
        })
        .collect()
}

/// The margin, 0 to 1; 0 when there is no model or it is not finite.
fn margin_of(candidate: &Candidate<'_>) -> f32 {
    unit_or(candidate.prediction.map(|p| p.margin), 0.0)
}

/// The novelty, 0 to 1; the middle when there is no model or it is not finite.
fn novelty_of(candidate: &Candidate<'_>) -> f32 {
    unit_or(candidate.prediction.map(|p| p.novelty), 0.5)
}

fn unit_or(value: Option<f32>, otherwise: f32) -> f32 {
    match value {
        Some(x) if x.is_finite() => x.clamp(0.0, 1.0),
        _ => otherwise,
    }
}

/// Labels of a class; unseen classes have none.
fn count_of(pool: &Pool<'_>, class: u32) -> u32 {
    let index = usize::try_from(class).unwrap_or(usize::MAX);
    pool.class_counts.get(index).copied().unwrap_or(0)
}

fn why(pool: &Pool<'_>, index: usize, reason: Reason, distance2: Option<f32>) -> Why {
    let candidate = &pool.candidates[index];
    Why {
        reason,
        margin: candidate.prediction.map(|_| margin_of(candidate)),
        novelty: candidate.prediction.map(|_| novelty_of(candidate)),
        labels_of_class: candidate.prediction.map(|p| count_of(pool, p.top)),
        distance: distance2.map(f32::sqrt),
        cluster: None,
    }
}

/// An index drawn with probability proportional to its weight; `None` when all weights are zero.
fn draw(weights: &[f32], rng: &mut ChaCha8Rng) -> Option<usize> {
    let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    if total <= 0.0 || !total.is_finite() {
        return None;
    }
    let mut left = rng.random::<f64>() * total;
    let mut last = None;
    for (index, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            last = Some(index);
            left -= f64::from(weight);
            if left < 0.0 {
                break;
            }
        }
    }
    last
}
