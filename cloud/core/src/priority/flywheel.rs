//! The warm strategy. In steps:
//!
//! 1. A small share is drawn by lot, from the devices' uniform lane while it lasts.
//! 2. The shortlist: the 10·b narrowest margins (Cluster-Margin, 2107.14263), the 5·b most novel
//!    and the 2·b most probably of a rare class. No score finds everything, so it is their union.
//! 3. Each has an interest: `(1 − margin) + N·e + R·r`, times the rarity of its class. Here `r` is
//!    the probability of classes with few labels, and `e = ½·p^−½`
//!    turns the novelty's rank in the pool into evidence (an e-value calibrator, Vovk and Wang
//!    2021): its mean is 1 however the novelty is distributed, so a miscalibrated or noisy score
//!    costs little, and only the top of the pool, where anything new must be, weighs much.
//! 4. Picks are drawn by k-means++ (BADGE's diversity, 1906.03671): with probability proportional
//!    to the squared interest times the squared distance to the nearest labelled or picked sample.
//!    Squaring the interest as well finds a third more of the rare than leaving it linear, and
//!    trains no worse, in simulated worlds like that of the tests.
//!
//! Rarity is `√(median / n)` of the predicted and the second class, labels and this round's picks
//! together, so that no predicted class eats the round.

use super::geometry::{Rows, SAME};
use super::limits::Limits;
use super::{Candidate, Options, Pick, Pool, Reason, draw, margin_of, novelty_of, unit_or, why};
use flywheel_shared::message::Lane;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Shortlist lengths in budgets.
const UNSURE: usize = 10;
const NOVEL: usize = 5;
const RARE: usize = 2;
/// Weight of the novelty evidence against `1 − margin`.
const NOVELTY_WEIGHT: f32 = 0.2;
/// Weight of the probability of rare classes against `1 − margin`.
const RARE_WEIGHT: f32 = 12.0;
/// Bounds of the rarity factor.
const RARITY: (f32, f32) = (0.5, 4.0);
/// What a campaign asked for counts this much more.
const CAMPAIGN: f32 = 2.0;
/// The most labelled samples that distances are measured to; more are thinned evenly by class.
const MAX_LABELLED: usize = 4096;
/// Squared distance to the nearest labelled sample when nothing is labelled or has an embedding.
const FAR: f32 = 1.0;

pub(super) fn rank(
    pool: &Pool<'_>,
    rows: &Rows,
    limits: &mut Limits<'_>,
    budget: usize,
    options: &Options,
    rng: &mut ChaCha8Rng,
) -> Vec<Pick> {
    let share = f64::from(unit_or(Some(options.uniform_share), 0.0));
    let lots = ((budget as f64 * share).round() as usize).min(budget);
    let lots = by_lot(pool, limits, lots, rng);

    let mut rarity = Rarity::of(pool);
    let evidence = evidence(pool);
    let short = shortlist(pool, &rarity, budget);
    let known = Rows::unit(thin(pool).into_iter().map(|i| pool.labelled[i].embedding));
    let mut near = nearest(rows, &short, &known);
    let cap = outlier_cap(&near);
    for lot in &lots {
        approach(&mut near, rows, &short, lot.index);
    }

    let interest: Vec<f32> = short
        .iter()
        .map(|&i| {
            let candidate = &pool.candidates[i];
            let asked = if candidate.lane == Lane::Campaign {
                CAMPAIGN
            } else {
                1.0
            };
            let rare = unit_or(candidate.prediction.map(|p| p.rarity), 0.0);
            asked * (1.0 - margin_of(candidate) + NOVELTY_WEIGHT * evidence[i] + RARE_WEIGHT * rare)
        })
        .collect();
    let mut open: Vec<bool> = short.iter().map(|&i| !limits.is_taken(i)).collect();
    let mut picks = Vec::with_capacity(budget);
    let mut weights = vec![0.0; short.len()];
    while picks.len() + lots.len() < budget {
        for (at, weight) in weights.iter_mut().enumerate() {
            *weight = if open[at] && near[at] >= SAME {
                let interest = interest[at] * rarity.factor(&pool.candidates[short[at]]);
                interest * interest * near[at].min(cap)
            } else {
                0.0
            };
        }
        let Some(at) = draw(&weights, rng) else {
            break;
        };
        let index = short[at];
        open[at] = false;
        if !limits.take(index) {
            continue;
        }
        let candidate = &pool.candidates[index];
        let reason = main_reason(candidate, evidence[index], rarity.factor(candidate));
        picks.push(Pick {
            index,
            score: weights[at],
            why: why(pool, index, reason, Some(near[at])),
        });
        rarity.picked(candidate);
        approach(&mut near, rows, &short, index);
    }
    let wanted = budget - picks.len() - lots.len();
    picks.extend(fill(pool, limits, wanted, rng));
    interleave(picks, lots)
}

/// Up to `wanted` candidates by lot, whatever the limits leave, as the last resort.
pub(super) fn fill(
    pool: &Pool<'_>,
    limits: &mut Limits<'_>,
    wanted: usize,
    rng: &mut ChaCha8Rng,
) -> Vec<Pick> {
    let mut order: Vec<usize> = (0..pool.candidates.len()).collect();
    order.shuffle(rng);
    take_in_order(pool, limits, wanted, &order, Reason::Remaining)
}

/// The uniform share: from the uniform lane first, since only that lane is unbiased.
fn by_lot(
    pool: &Pool<'_>,
    limits: &mut Limits<'_>,
    wanted: usize,
    rng: &mut ChaCha8Rng,
) -> Vec<Pick> {
    let mut order: Vec<usize> = (0..pool.candidates.len()).collect();
    order.shuffle(rng);
    order.sort_by_key(|&i| pool.candidates[i].lane != Lane::Uniform);
    take_in_order(pool, limits, wanted, &order, Reason::Uniform)
}

fn take_in_order(
    pool: &Pool<'_>,
    limits: &mut Limits<'_>,
    wanted: usize,
    order: &[usize],
    reason: Reason,
) -> Vec<Pick> {
    let mut picks = Vec::with_capacity(wanted);
    for &index in order {
        if picks.len() == wanted {
            break;
        }
        if limits.take(index) {
            picks.push(Pick {
                index,
                score: 0.0,
                why: why(pool, index, reason, None),
            });
        }
    }
    picks
}

/// Spreads the lots over the ranking, so that people who stop early label some of them too.
fn interleave(picks: Vec<Pick>, lots: Vec<Pick>) -> Vec<Pick> {
    let total = picks.len() + lots.len();
    let (count, mut lots) = (lots.len(), lots.into_iter());
    let mut picks = picks.into_iter();
    let mut given = 0;
    (0..total)
        .filter_map(|at| {
            if (at + 1) * count >= (given + 1) * total && given < count {
                given += 1;
                lots.next()
            } else {
                picks.next()
            }
        })
        .collect()
}

/// Novelty evidence of every candidate, from its rank: mean about 1, ties share a rank.
fn evidence(pool: &Pool<'_>) -> Vec<f32> {
    let n = pool.candidates.len();
    let mut order: Vec<usize> = (0..n).collect();
    let novelty = |i: usize| novelty_of(&pool.candidates[i]);
    order.sort_by(|&a, &b| novelty(b).total_cmp(&novelty(a)));
    let mut evidence = vec![1.0; n];
    let mut start = 0;
    for tied in order.chunk_by(|&a, &b| novelty(a) == novelty(b)) {
        let middle = start as f32 + tied.len() as f32 * 0.5;
        for &i in tied {
            evidence[i] = 0.5 / (middle / n as f32).sqrt();
        }
        start += tied.len();
    }
    evidence
}

/// How much a class's samples are worth for its lack of labels.
struct Rarity {
    /// Labels plus picks of this round, by class.
    counts: Vec<f32>,
    median: f32,
}

impl Rarity {
    fn of(pool: &Pool<'_>) -> Self {
        let mut sorted = pool.class_counts.to_vec();
        sorted.sort_unstable();
        Self {
            counts: pool.class_counts.iter().map(|&n| n as f32).collect(),
            median: sorted.get(sorted.len() / 2).map_or(0.0, |&n| n as f32),
        }
    }

    fn class(&self, class: u32) -> f32 {
        let index = usize::try_from(class).unwrap_or(usize::MAX);
        let count = self.counts.get(index).copied().unwrap_or(0.0);
        ((self.median + 1.0) / (count + 1.0))
            .sqrt()
            .clamp(RARITY.0, RARITY.1)
    }

    /// The mean of the two likeliest classes by their probabilities; 1 without a model.
    fn factor(&self, candidate: &Candidate<'_>) -> f32 {
        let Some(p) = candidate.prediction else {
            return 1.0;
        };
        let first = unit_or(Some(p.confidence), 0.5).max(1e-3);
        let second = (first - margin_of(candidate)).clamp(0.0, first);
        (first * self.class(p.top) + second * self.class(p.runner_up)) / (first + second)
    }

    fn picked(&mut self, candidate: &Candidate<'_>) {
        let index = candidate
            .prediction
            .and_then(|p| usize::try_from(p.top).ok());
        if let Some(count) = index.and_then(|i| self.counts.get_mut(i)) {
            *count += 1.0;
        }
    }
}

/// Positions of the candidates worth a closer look, ascending.
fn shortlist(pool: &Pool<'_>, rarity: &Rarity, budget: usize) -> Vec<usize> {
    let candidates = pool.candidates;
    let mut chosen = vec![false; candidates.len()];
    let mut smallest = |count: usize, key: &dyn Fn(&Candidate<'_>) -> f32| {
        let count = count.min(candidates.len());
        // Keys once, not at every comparison; the position breaks ties the same way everywhere.
        let mut keyed: Vec<(f32, usize)> = candidates.iter().map(key).zip(0..).collect();
        if count < keyed.len() {
            keyed.select_nth_unstable_by(count, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        }
        for &(_, i) in &keyed[..count] {
            chosen[i] = true;
        }
    };
    smallest(budget.saturating_mul(UNSURE), &margin_of);
    smallest(budget.saturating_mul(NOVEL), &|c| -novelty_of(c));
    smallest(budget.saturating_mul(RARE), &|c| -rarity.factor(c));
    smallest(budget.saturating_mul(RARE), &|c| {
        -unit_or(c.prediction.map(|p| p.rarity), 0.0)
    });
    let asked = (0..candidates.len()).filter(|&i| candidates[i].lane == Lane::Campaign);
    for i in asked.take(budget.saturating_mul(RARE)) {
        chosen[i] = true;
    }
    (0..candidates.len()).filter(|&i| chosen[i]).collect()
}

/// Positions of at most [`MAX_LABELLED`] labelled samples: all of the small classes and evenly
/// spaced ones of the large, since what matters is which regions are covered.
fn thin(pool: &Pool<'_>) -> Vec<usize> {
    let mut by_class: std::collections::BTreeMap<u32, Vec<usize>> = Default::default();
    for (i, labelled) in pool.labelled.iter().enumerate() {
        by_class.entry(labelled.class).or_default().push(i);
    }
    let mut kept = Vec::new();
    let mut groups: Vec<Vec<usize>> = by_class.into_values().collect();
    groups.sort_by_key(Vec::len);
    let total = groups.len();
    for (done, group) in groups.into_iter().enumerate() {
        let room = (MAX_LABELLED.saturating_sub(kept.len()) / (total - done)).max(1);
        let stride = group.len().div_ceil(room);
        kept.extend(group.into_iter().step_by(stride));
    }
    kept.sort_unstable();
    kept
}

/// Squared distance of each shortlisted candidate to the nearest labelled sample.
fn nearest(rows: &Rows, short: &[usize], known: &Rows) -> Vec<f32> {
    short
        .iter()
        .map(|&i| {
            (0..known.len())
                .filter_map(|k| rows.distance2(i, known, k))
                .min_by(f32::total_cmp)
                .unwrap_or(FAR)
        })
        .collect()
}

/// Takes the new pick into the distances.
fn approach(near: &mut [f32], rows: &Rows, short: &[usize], picked: usize) {
    for (near, &i) in near.iter_mut().zip(short) {
        if let Some(d) = rows.distance2(i, rows, picked) {
            *near = near.min(d);
        }
    }
}

/// The 95th percentile of the distances: squared distances would otherwise hand the round to a few
/// freak pictures.
fn outlier_cap(near: &[f32]) -> f32 {
    let mut sorted = near.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    sorted
        .get(sorted.len() * 95 / 100)
        .copied()
        .unwrap_or(FAR)
        .max(SAME)
}

/// What spoke most for the candidate, in comparison with an ordinary one.
fn main_reason(candidate: &Candidate<'_>, evidence: f32, rarity: f32) -> Reason {
    let unsure = 1.0 - margin_of(candidate);
    let novel = NOVELTY_WEIGHT * evidence;
    if rarity >= 2.0 {
        Reason::Rare
    } else if novel >= unsure && evidence >= 1.0 {
        Reason::Novel
    } else if unsure >= 0.3 {
        Reason::Unsure
    } else {
        Reason::Distant
    }
}
