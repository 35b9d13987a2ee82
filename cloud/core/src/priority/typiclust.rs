//! TypiClust (Hacohen, Dekel, Weinshall 2022, 2202.02794): with few labels, uncertainty means
//! nothing, and the best picks are typical samples of the largest groups that have no label yet.

use super::geometry::{Rows, distance2, kmeans};
use super::limits::Limits;
use super::{Pick, Pool, Reason, Why, why};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::cmp::Reverse;

/// The most clusters (the paper's own bound).
const MAX_CLUSTERS: usize = 500;
/// The most rows that are clustered; a larger pool is sampled.
const MAX_ROWS: usize = 10_000;
/// The most cluster members that typicality is measured among.
const MAX_MEMBERS: usize = 400;
/// Neighbours that typicality averages over.
const NEIGHBOURS: usize = 20;
/// Smaller clusters hold outliers and come last.
const MIN_CLUSTER: usize = 5;
const LLOYD_STEPS: usize = 8;

/// A cluster with its unlabelled members, the most typical first.
struct Cluster {
    labelled: usize,
    size: usize,
    members: Vec<(usize, f32)>,
}

pub(super) fn rank(
    pool: &Pool<'_>,
    rows: &Rows,
    limits: &mut Limits<'_>,
    budget: usize,
    rng: &mut ChaCha8Rng,
) -> Vec<Pick> {
    let mut clusters = clusters(pool, rows, budget, rng);
    // One pick from each cluster in turn; a pick counts as a label from then on.
    clusters.sort_by_key(|c| (c.labelled, c.size < MIN_CLUSTER, Reverse(c.size)));
    let mut picks = Vec::with_capacity(budget);
    let mut next = vec![0; clusters.len()];
    let mut level = clusters.first().map_or(0, |c| c.labelled);
    while picks.len() < budget {
        let mut left = false;
        for (cluster, next) in clusters.iter_mut().zip(&mut next) {
            if cluster.labelled > level || picks.len() == budget {
                left |= *next < cluster.members.len();
                continue;
            }
            while let Some(&(index, typicality)) = cluster.members.get(*next) {
                *next += 1;
                if limits.take(index) {
                    cluster.labelled += 1;
                    picks.push(Pick {
                        index,
                        score: typicality,
                        why: Why {
                            cluster: u32::try_from(cluster.size).ok(),
                            ..why(pool, index, Reason::Typical, None)
                        },
                    });
                    break;
                }
            }
            left |= *next < cluster.members.len();
        }
        if !left {
            break;
        }
        level += 1;
    }
    picks.extend(super::flywheel::fill(
        pool,
        limits,
        budget - picks.len(),
        rng,
    ));
    picks
}

fn clusters(pool: &Pool<'_>, rows: &Rows, budget: usize, rng: &mut ChaCha8Rng) -> Vec<Cluster> {
    // Only what has an embedding can be clustered; the rest is filled in by lot.
    let labelled = Rows::unit(pool.labelled.iter().map(|l| l.embedding));
    let some = |rows: &Rows, rng: &mut ChaCha8Rng| -> Vec<usize> {
        let mut all: Vec<usize> = (0..rows.len()).filter(|&i| rows.is_directed(i)).collect();
        let (drawn, _) = all.partial_shuffle(rng, MAX_ROWS);
        let mut drawn = drawn.to_vec();
        drawn.sort_unstable();
        drawn
    };
    let members = some(rows, rng);
    let known = some(&labelled, rng);
    if members.is_empty() {
        return Vec::new();
    }
    let all = rows.select(&members).chain(&labelled.select(&known));
    let k = (known.len() + budget).min(MAX_CLUSTERS).min(all.len());
    let assigned = kmeans(&all, k, LLOYD_STEPS, rng);

    let mut positions: Vec<Vec<usize>> = vec![Vec::new(); k];
    for (position, &cluster) in assigned.iter().enumerate() {
        positions[cluster].push(position);
    }
    positions
        .into_iter()
        .filter(|p| !p.is_empty())
        .map(|positions| {
            let mut typical: Vec<(usize, f32)> = positions
                .iter()
                .filter(|&&p| p < members.len())
                .map(|&p| (members[p], typicality(&all, p, &positions)))
                .collect();
            typical.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            Cluster {
                labelled: positions.len() - typical.len(),
                size: positions.len(),
                members: typical,
            }
        })
        .collect()
}

/// The inverse of the mean distance to the nearest members of its cluster.
fn typicality(rows: &Rows, at: usize, members: &[usize]) -> f32 {
    let stride = members.len().div_ceil(MAX_MEMBERS).max(1);
    let mut distances: Vec<f32> = members
        .iter()
        .step_by(stride)
        .filter(|&&m| m != at)
        .map(|&m| distance2(rows.row(at), rows.row(m)).sqrt())
        .collect();
    if distances.is_empty() {
        return 0.0;
    }
    let k = NEIGHBOURS.min(distances.len());
    distances.select_nth_unstable_by(k - 1, f32::total_cmp);
    let mean = distances[..k].iter().sum::<f32>() / k as f32;
    1.0 / mean.max(1e-6)
}
