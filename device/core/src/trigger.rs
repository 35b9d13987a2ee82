//! Whether a frame is worth its upload, and in which lane.
//!
//! Three mechanisms, from soft to hard. Each frame's u in a lane is damped if it repeats what was
//! just flagged, and but for the novel and campaign lanes by how much of its kind was sent already
//! ([`crate::sketch`]), so that rare classes are not starved by a flood of night frames. A lane flags what exceeds a quantile of its own recent scores ([`crate::quantile`]), and
//! the quantile is steered so that the lane spends what it earns. The byte bucket
//! ([`crate::bucket`]) is the law: over every stretch of frames, the bytes flagged are at most
//! `budget_ratio × bytes seen + burst_bytes`.
//!
//! The uniform lane is a coin toss, since drift and live accuracy are estimated from it: a frame
//! is kept with probability p = share·ratio·frame_bytes/cost, whatever its scores, and p is
//! reported as its `inclusion`. So that the law never bends p, the other lanes leave a reserve of
//! [`RESERVE`] samples in the bucket. They hold most of the income, so the uniform lane's luck
//! would need an excess of more than 8 samples against an income of several times its own mean: below 10⁻⁹
//! per sample at the default shares. [`Trigger::uniform_denied`] counts it if it happens.

use core::fmt;

use flywheel_shared::message::{Lane, Scores};

use crate::bucket::{Amount, Bucket};
use crate::quantile::Recent;
use crate::sketch::{Sketch, cell, near};

/// Samples that lanes other than uniform leave in the bucket (or half of it, if that is less).
pub const RESERVE: u32 = 8;

/// Flags after which sent counts are halved.
const HALF_LIFE: u32 = 256;
/// Flagged frames that new ones are compared with.
const RING: usize = 8;
/// Damped scores are lowered by up to this part at random, so that equal ones are told apart.
const TIE: f32 = 1.0 / 1024.0;
/// Weight of the newest frame in [`Account::earning`].
const SMOOTHING: f32 = 1.0 / 64.0;
/// Values of [`Observation::draw`].
const DRAWS: u64 = 1 << 32;
/// Share of the budget that the uniform lane takes while there is no model.
const BLIND_SHARE: f32 = 0.5;

/// How a [`Trigger`] spends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TriggerConfig {
    /// Bytes up per byte seen, 0 to 1.
    pub budget_ratio: f32,
    /// Bytes that may leave at once on top; must hold at least one sample to be of use.
    pub burst_bytes: u32,
    /// Share of each lane in the order of [`Lane::ALL`]; scaled so that the sum is 1. What a lane
    /// does not use flows to the others.
    pub shares: [f32; 5],
    /// Scored frames that a threshold looks back on.
    pub window: u32,
    /// Scored frames before the first threshold holds.
    pub warmup: u32,
    /// Smallest u (before damping) that novel and unsure flag, 0 to 1.
    pub floor: f32,
    /// α: by (1 + sent of this class and cell)^α is u divided, in the unsure lane p = 1 − u
    /// multiplied.
    pub cell_damping: f32,
    /// β: and by (1 + sent of this class)^β.
    pub class_damping: f32,
    /// And multiplied by this, 0 to 1, if it looks like one of the last flagged frames.
    pub repeat_damping: f32,
}

impl Default for TriggerConfig {
    fn default() -> Self {
        Self {
            budget_ratio: 0.04,
            burst_bytes: 64 * 1024,
            shares: [0.40, 0.35, 0.10, 0.0, 0.15],
            window: 512,
            warmup: 64,
            floor: 0.5,
            cell_damping: 0.5,
            class_damping: 0.25,
            repeat_damping: 0.25,
        }
    }
}

/// Which setting of a [`TriggerConfig`] is out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TriggerError {
    /// `budget_ratio` is not in 0..=1.
    Ratio,
    /// `burst_bytes` is 0.
    Burst,
    /// A share is negative or not finite, or all are 0.
    Shares,
    /// `window` is under 32, or `warmup` is 0.
    Window,
    /// `floor` or a damping is out of range.
    Damping,
}

impl fmt::Display for TriggerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ratio => "budget ratio: give a number from 0 to 1, such as 0.04",
            Self::Burst => "budget burst: give at least the size of one sample",
            Self::Shares => "budget shares: give numbers of at least 0, one of them greater than 0",
            Self::Window => "trigger window: give at least 32 frames, and a warm-up of at least 1",
            Self::Damping => {
                "trigger damping: give numbers of at least 0; floor and repeat damping up to 1"
            }
        })
    }
}

impl core::error::Error for TriggerError {}

/// One frame as the trigger sees it.
#[derive(Clone, Copy, Debug)]
pub struct Observation<'a> {
    /// What uploading every frame would cost for this one, in bytes; this counts as seen.
    pub frame_bytes: u32,
    /// What a sample of it would cost on the wire in bytes, all included.
    pub cost: u32,
    /// What the model said; `None` without a model: only the uniform lane works then, with half
    /// of the whole budget at least.
    pub scores: Option<&'a Scores>,
    /// [`crate::sketch::signature`] of the embedding.
    pub signature: Option<u64>,
    /// The model contradicts itself ([`crate::flicker`]) or another model.
    pub disagree: bool,
    /// How much the cloud asks for this frame, 0 to 1: [`Scores::rarity`], or 1 for a campaign
    /// that it matches.
    pub wanted: f32,
    /// 32 random bits, independent from frame to frame.
    pub draw: u32,
}

/// A frame to keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flag {
    /// Why.
    pub lane: Lane,
    /// Probability with which the uniform lane kept it; 0 in other lanes.
    pub inclusion: f32,
    /// What it is worth, 0 to 1, when a full spool must choose. Uniform samples are worth 1, since
    /// losing some of them by choice would bias every estimate.
    pub value: f32,
}

/// A lane's purse and threshold.
#[derive(Clone, Copy, Debug)]
struct Account {
    lane: Lane,
    share: f32,
    /// Part of the income that it is getting, what others do not use included; smoothed.
    earning: f32,
    purse: Bucket,
    threshold: Recent,
}

/// Chooses the frames of one stream.
#[derive(Clone, Debug)]
pub struct Trigger {
    config: TriggerConfig,
    uniform_share: f32,
    bucket: Bucket,
    /// Campaign, disagree, novel, unsure.
    accounts: [Account; 4],
    sent: Sketch<4, 256>,
    ring: [Option<(u16, u64)>; RING],
    ring_at: usize,
    scored: u32,
    spent: [u64; 5],
    uniform_denied: u32,
}

impl Trigger {
    /// A trigger whose bucket holds the burst and whose lanes have earned nothing yet.
    ///
    /// # Errors
    /// The setting that is out of range.
    pub fn new(config: TriggerConfig) -> Result<Self, TriggerError> {
        let sum: f32 = config.shares.iter().sum();
        let positive = |x: f32| x >= 0.0 && x.is_finite();
        let part = |x: f32| (0.0..=1.0).contains(&x);
        if !part(config.budget_ratio) {
            return Err(TriggerError::Ratio);
        }
        if config.burst_bytes == 0 {
            return Err(TriggerError::Burst);
        }
        if !config.shares.into_iter().all(positive) || !positive(sum) || sum == 0.0 {
            return Err(TriggerError::Shares);
        }
        if config.window < 32 || config.warmup == 0 {
            return Err(TriggerError::Window);
        }
        let damping = positive(config.cell_damping) && positive(config.class_damping);
        if !(damping && part(config.floor) && part(config.repeat_damping)) {
            return Err(TriggerError::Damping);
        }
        let burst = Amount::bytes(config.burst_bytes);
        let share = |lane: Lane| config.shares[lane as usize] / sum;
        let account = |lane| Account {
            lane,
            share: share(lane),
            earning: share(lane),
            purse: Bucket::new(burst.times(share(lane)), Amount::default()),
            threshold: Recent::new(0.98, config.window),
        };
        Ok(Self {
            config,
            uniform_share: share(Lane::Uniform),
            bucket: Bucket::new(burst, burst),
            accounts: [Lane::Campaign, Lane::Disagree, Lane::Novel, Lane::Unsure].map(account),
            sent: Sketch::new(HALF_LIFE),
            ring: [None; RING],
            ring_at: 0,
            scored: 0,
            spent: [0; 5],
            uniform_denied: 0,
        })
    }

    /// Takes one frame; `Some` if it is to be kept, which is paid for at once.
    pub fn observe(&mut self, frame: Observation<'_>) -> Option<Flag> {
        let cost = Amount::bytes(frame.cost.max(1));
        self.earn(frame.frame_bytes, frame.cost.max(1));
        let mut flag = self.toss(&frame, cost);
        if let Some(scores) = frame.scores {
            let kind = Kind {
                class: scores.top1,
                signature: frame.signature,
            };
            let damping = self.damping(kind);
            // Thresholds learn from every frame, kept or not: they describe the stream.
            let choice = self.choose(&frame, scores, damping, cost);
            if flag.is_none()
                && let Some((index, value)) = choice
                && self.accounts[index].purse.take(cost, Amount::default())
            {
                // `choose` has seen that the bucket holds it.
                self.bucket.take(cost, Amount::default());
                flag = Some(Flag {
                    lane: self.accounts[index].lane,
                    inclusion: 0.0,
                    value,
                });
            }
            if flag.is_some() {
                self.remember(kind);
            }
        }
        if let Some(flag) = flag {
            self.spent[flag.lane as usize] += cost.whole();
        }
        flag
    }

    /// Another model took over: its scores and signatures mean something else. What was earned
    /// and spent stays.
    pub fn model_changed(&mut self) {
        for account in &mut self.accounts {
            account.threshold = Recent::new(0.98, self.config.window);
        }
        self.sent.clear();
        self.ring = [None; RING];
        self.scored = 0;
    }

    /// Bytes flagged in a lane so far.
    pub fn spent(&self, lane: Lane) -> u64 {
        self.spent[lane as usize]
    }

    /// How often the uniform lane drew a frame that the bucket could not pay.
    pub fn uniform_denied(&self) -> u32 {
        self.uniform_denied
    }

    /// Bytes that lanes other than uniform may not touch.
    fn reserve(&self, cost: u32) -> Amount {
        Amount::bytes(
            cost.saturating_mul(RESERVE)
                .min(self.config.burst_bytes / 2),
        )
    }

    /// Books the income of a frame: all of it in the bucket, the lanes' parts in their purses,
    /// what a full purse can't take in the others'.
    fn earn(&mut self, seen: u32, cost: u32) {
        let income = Amount::share(seen, self.config.budget_ratio);
        self.bucket.credit(income);
        // A purse holds two samples at least, or a small lane could never pay for one.
        let least = Amount::bytes(cost.saturating_mul(2));
        let burst = Amount::bytes(self.config.burst_bytes);
        let mut spare = Amount::default();
        let mut open = 0.0;
        for account in &mut self.accounts {
            if account.share > 0.0 {
                let capacity = burst.times(account.share).max(least);
                account.purse.resize(capacity);
                let over = account.purse.credit(income.times(account.share));
                if over == Amount::default() {
                    open += account.share;
                } else {
                    spare = spare.plus(over);
                }
            }
        }
        for account in &mut self.accounts {
            let mut earned = account.share;
            if open > 0.0 && account.purse.level() < account.purse.capacity() {
                let part = account.share / open;
                account.purse.credit(spare.times(part));
                earned += spare.over(income) * part;
            }
            account.earning += SMOOTHING * (earned - account.earning);
        }
    }

    /// The uniform lane.
    fn toss(&mut self, frame: &Observation<'_>, cost: Amount) -> Option<Flag> {
        let share = match frame.scores {
            Some(_) => self.uniform_share,
            None => self.uniform_share.max(BLIND_SHARE),
        };
        // Of the 2³² draws these many win, so p is a multiple of 2⁻³² exactly.
        let winners = winners(
            share,
            self.config.budget_ratio,
            frame.frame_bytes,
            frame.cost.max(1),
        );
        if u64::from(frame.draw) >= winners {
            return None;
        }
        if !self.bucket.take(cost, Amount::default()) {
            self.uniform_denied = self.uniform_denied.saturating_add(1);
            return None;
        }
        Some(Flag {
            lane: Lane::Uniform,
            inclusion: winners as f32 / DRAWS as f32,
            value: 1.0,
        })
    }

    /// Updates every threshold; returns the account with the fullest purse among those that want
    /// the frame and can pay, with the frame's value.
    fn choose(
        &mut self,
        frame: &Observation<'_>,
        scores: &Scores,
        damping: Damping,
        cost: Amount,
    ) -> Option<(usize, f32)> {
        let warm = self.scored >= self.config.warmup;
        self.scored = self.scored.saturating_add(1);
        let reserve = self.reserve(frame.cost.max(1));
        let affordable = self.bucket.level() >= cost.plus(reserve);
        // Other bits of the draw than those that decide the toss.
        let lot = (crate::sketch::mix(u64::from(frame.draw)) >> 40) as f32 / (1u64 << 24) as f32;
        let mut best: Option<(usize, f32, f32)> = None;
        for (index, account) in self.accounts.iter_mut().enumerate() {
            if account.share == 0.0 {
                continue;
            }
            let (u, floor) = match account.lane {
                Lane::Campaign => (frame.wanted, 0.0),
                Lane::Disagree => (f32::from(u8::from(frame.disagree)), 0.0),
                Lane::Novel => (scores.u_novel, self.config.floor),
                Lane::Unsure | Lane::Uniform => (scores.u_unsure, self.config.floor),
            };
            // A score that is no number is not evidence of anything.
            let u = if u.is_finite() { u } else { 0.0 };
            let damped = match account.lane {
                // What the cloud asks for already weighs how much of a class it has; damping by
                // class would send it what looks like nothing it asked for.
                Lane::Campaign => u * damping.repeat,
                // One thing in view is sent once or twice, whatever it is.
                _ if damping.repeat < 1.0 => u * damping.repeat * damping.kind,
                // The class that the model gives to what it does not know means little.
                Lane::Novel => u,
                // On u itself damping would undo the score, which tells one in a hundred from one
                // in a thousand by 0.009. So what was sent makes p = 1 − u larger instead.
                Lane::Unsure => (1.0 - (1.0 - u) / damping.kind).max(0.0),
                _ => u * damping.kind,
            } * (1.0 - TIE * lot);
            let fullness = account.purse.level().over(account.purse.capacity());
            let rate = account.earning
                * self.config.budget_ratio
                * (frame.frame_bytes as f32 / frame.cost.max(1) as f32)
                * (4.0 * fullness * fullness).max(0.25);
            account.threshold.aim((1.0 - rate).clamp(0.5, 0.9995));
            let threshold = account.threshold.value().unwrap_or(1.0);
            account.threshold.observe(damped);
            let wants = warm && u > 0.0 && u >= floor && damped > threshold;
            let pays = affordable && account.purse.level() >= cost;
            if wants && pays && best.is_none_or(|(_, full, _)| fullness > full) {
                best = Some((index, fullness, damped.clamp(0.0, 1.0)));
            }
        }
        best.map(|(index, _, value)| (index, value))
    }

    /// What u is multiplied by, 0 to 1, for a frame of this kind.
    fn damping(&self, kind: Kind) -> Damping {
        let rarity =
            |key: u64, power: f32| libm::powf(1.0 + f32::from(self.sent.count(key)), -power);
        let looks_like = |sent: &(u16, u64)| {
            sent.0 == kind.class && kind.signature.is_some_and(|now| near(now, sent.1))
        };
        let repeat = if self.ring.iter().flatten().any(looks_like) {
            self.config.repeat_damping
        } else {
            1.0
        };
        Damping {
            repeat,
            kind: rarity(kind.cell_key(), self.config.cell_damping)
                * rarity(kind.class_key(), self.config.class_damping),
        }
    }

    /// Counts a flagged frame.
    fn remember(&mut self, kind: Kind) {
        self.sent.add(kind.class_key());
        self.sent.add(kind.cell_key());
        if let Some(signature) = kind.signature {
            self.ring[self.ring_at] = Some((kind.class, signature));
            self.ring_at = (self.ring_at + 1) % RING;
        }
    }
}

/// ⌊2³² · share · ratio · bytes / cost⌋, at most 2³²; `share` and `ratio` are taken into [0, 1].
///
/// In integers, since doubles are 3.6 KB of code on a part whose floating-point unit does single
/// precision only.
fn winners(share: f32, ratio: f32, bytes: u32, cost: u32) -> u64 {
    let [(m, e), (n, f)] = [share, ratio].map(parts);
    // m·n has 48 bits and with `bytes` 80; the shift is 14 or more, as neither factor exceeds 1.
    let product = u128::from(m * n) * u128::from(bytes);
    let scaled = product.checked_shr(e + f - 32).unwrap_or(0) as u64;
    if scaled >> 32 >= u64::from(cost) {
        return DRAWS;
    }
    // Long division by hand, bit by bit: the compiler's own for 64 bits is another 1 KB.
    let (mut rest, mut quotient) = (scaled >> 32, 0);
    for bit in (0..32).rev() {
        rest = rest << 1 | (scaled >> bit & 1);
        quotient <<= 1;
        if rest >= u64::from(cost) {
            rest -= u64::from(cost);
            quotient |= 1;
        }
    }
    quotient
}

/// m and e of x = m·2⁻ᵉ, for x taken into [0, 1]; what is no number is 0.
fn parts(x: f32) -> (u64, u32) {
    let bits = if x > 0.0 { x.min(1.0).to_bits() } else { 0 };
    let (fraction, exponent) = (bits & 0x7F_FFFF, bits >> 23);
    let hidden = u32::from(exponent > 0) << 23;
    (u64::from(fraction | hidden), 150 - exponent.max(1))
}

/// Factors of u, 0 to 1.
#[derive(Clone, Copy)]
struct Damping {
    /// For looking like one of the last flagged frames.
    repeat: f32,
    /// For how much of its class and cell was sent.
    kind: f32,
}

/// What repeats are told by.
#[derive(Clone, Copy)]
struct Kind {
    class: u16,
    signature: Option<u64>,
}

impl Kind {
    fn class_key(self) -> u64 {
        u64::from(self.class) << 32 | u64::from(u32::MAX)
    }

    fn cell_key(self) -> u64 {
        u64::from(self.class) << 32 | u64::from(self.signature.map_or(u32::MAX - 1, cell))
    }
}

#[cfg(test)]
mod tests;
