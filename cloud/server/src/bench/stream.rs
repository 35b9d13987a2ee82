//! One stream of frames through the device's trigger, with the byte budget checked after each.

use anyhow::Result;
use device_core::flicker::Flicker;
use device_core::trigger::{Observation, Trigger, TriggerConfig};
use flywheel_shared::message::{Lane, Scores};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A frame of which everything but its draw is known.
#[derive(Clone, Copy)]
pub struct Scored {
    /// What the model said.
    pub scores: Scores,
    /// Signature of the embedding.
    pub signature: Option<u64>,
    /// What uploading every frame would count for this one, in bytes.
    pub seen: u32,
    /// What a sample of it costs on the wire, in bytes.
    pub cost: u32,
    /// Whether it is of the class that the model never saw.
    pub novel: bool,
}

/// How a stream is made.
#[derive(Clone, Copy)]
pub struct Plan {
    /// Frames.
    pub frames: u32,
    /// Share of novel frames.
    pub novel: f64,
    /// Seed of order and draws.
    pub seed: u64,
}

/// What came of streams.
#[derive(Clone, Copy, Default)]
pub struct Outcome {
    /// Novel frames that came.
    pub came: u64,
    /// Novel frames that were flagged.
    pub found: u64,
    /// Frames flagged.
    pub flagged: u64,
    /// Frames.
    pub frames: u64,
    /// Bytes seen.
    pub seen: u64,
    /// Bytes flagged.
    pub up: u64,
    /// Most bytes that were ever flagged beyond what ratio and burst allow.
    pub over: u64,
    /// Frames flagged in each lane.
    pub lanes: [u64; 5],
}

impl Outcome {
    /// Adds what came of another stream.
    pub fn add(&mut self, other: &Self) {
        self.came += other.came;
        self.found += other.found;
        self.flagged += other.flagged;
        self.frames += other.frames;
        self.seen += other.seen;
        self.up += other.up;
        self.over = self.over.max(other.over);
        for (sum, lane) in self.lanes.iter_mut().zip(other.lanes) {
            *sum += lane;
        }
    }
}

/// Draws from a list without replacement, and from all of it again when it is used up.
struct Deck {
    order: Vec<usize>,
    at: usize,
}

impl Deck {
    fn new(items: impl Iterator<Item = usize>) -> Self {
        let order: Vec<usize> = items.collect();
        Self {
            at: order.len(),
            order,
        }
    }

    fn next(&mut self, rng: &mut ChaCha8Rng) -> Option<usize> {
        if self.at >= self.order.len() {
            self.at = 0;
            for i in (1..self.order.len()).rev() {
                self.order.swap(i, rng.random_range(0..=i));
            }
        }
        let item = self.order.get(self.at).copied();
        self.at += 1;
        item
    }
}

/// Runs one stream; `u_novel` replaces that score of each frame, where it is given.
///
/// # Errors
/// If the trigger refuses its configuration.
pub fn run(
    frames: &[Scored],
    u_novel: Option<&[f32]>,
    config: TriggerConfig,
    plan: Plan,
) -> Result<Outcome> {
    let mut rng = ChaCha8Rng::seed_from_u64(plan.seed);
    let deck = |novel: bool| Deck::new((0..frames.len()).filter(|&i| frames[i].novel == novel));
    let (mut known, mut novel) = (deck(false), deck(true));
    let mut trigger = Trigger::new(config)?;
    let mut flicker = Flicker::default();
    let mut outcome = Outcome::default();
    for _ in 0..plan.frames {
        let rare = rng.random_bool(plan.novel);
        let picked = if rare {
            novel.next(&mut rng)
        } else {
            known.next(&mut rng)
        };
        let Some(index) = picked else {
            continue;
        };
        let frame = &frames[index];
        let mut scores = frame.scores;
        if let Some(u) = u_novel {
            scores.u_novel = u[index];
        }
        let flag = trigger.observe(Observation {
            frame_bytes: frame.seen,
            cost: frame.cost,
            scores: Some(&scores),
            signature: frame.signature,
            disagree: flicker.observe(scores.top1, frame.signature),
            wanted: scores.rarity,
            draw: rng.random(),
        });
        outcome.frames += 1;
        outcome.seen += u64::from(frame.seen);
        outcome.came += u64::from(frame.novel);
        if let Some(flag) = flag {
            outcome.flagged += 1;
            outcome.found += u64::from(frame.novel);
            outcome.up += u64::from(frame.cost);
            outcome.lanes[flag.lane as usize] += 1;
        }
        let allowed =
            outcome.seen as f64 * f64::from(config.budget_ratio) + f64::from(config.burst_bytes);
        outcome.over = outcome
            .over
            .max((outcome.up as f64 - allowed).max(0.0).ceil() as u64);
    }
    Ok(outcome)
}

/// All of the budget for one lane.
pub fn alone(lane: Lane) -> [f32; 5] {
    let mut shares = [0.0; 5];
    shares[lane as usize] = 1.0;
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<Scored> {
        (0..400u16)
            .map(|i| Scored {
                scores: Scores {
                    top1: i % 5,
                    u_novel: if i < 40 { 0.999 } else { f32::from(i) / 420.0 },
                    ..Scores::default()
                },
                signature: None,
                seen: 1000,
                cost: 1000,
                novel: i < 40,
            })
            .collect()
    }

    fn run_with(shares: [f32; 5], u_novel: Option<&[f32]>) -> Outcome {
        let config = TriggerConfig {
            budget_ratio: 0.05,
            burst_bytes: 16_000,
            shares,
            ..TriggerConfig::default()
        };
        let plan = Plan {
            frames: 6000,
            novel: 0.02,
            seed: 3,
        };
        run(&frames(), u_novel, config, plan).unwrap()
    }

    #[test]
    fn a_score_that_knows_finds_nearly_all_and_chance_finds_its_share() {
        let good = run_with(alone(Lane::Novel), None);
        assert!(
            good.found * 10 > good.came * 8,
            "{} of {}",
            good.found,
            good.came
        );
        let chance = run_with(alone(Lane::Uniform), None);
        assert!(
            chance.found * 10 < chance.came,
            "{} of {}",
            chance.found,
            chance.came
        );
        assert!((80..160).contains(&chance.came));
        for outcome in [good, chance] {
            assert_eq!((outcome.over, outcome.frames), (0, 6000));
        }
        let blind = run_with(alone(Lane::Novel), Some(&[0.0; 400]));
        assert_eq!(blind.flagged, 0);
    }

    #[test]
    fn a_deck_gives_each_once_before_any_again() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut deck = Deck::new(0..7);
        for _ in 0..3 {
            let mut round: Vec<_> = (0..7).filter_map(|_| deck.next(&mut rng)).collect();
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2, 3, 4, 5, 6]);
        }
        assert_eq!(Deck::new(0..0).next(&mut rng), None);
    }
}
