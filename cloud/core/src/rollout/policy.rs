//! The rules of a rollout, as an operator writes them into a file, and how they divide a fleet
//! into waves.

use super::{Device, RolloutError};
use flywheel_shared::ids::Digest;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;

/// A part of the fleet; written as a number of devices or as a percentage: `3`, `"5%"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// So many devices.
    Count(u32),
    /// So many in a hundred, rounded up.
    Percent(u8),
}

impl Share {
    fn of(self, fleet: usize) -> usize {
        match self {
            Self::Count(n) => usize::try_from(n).unwrap_or(usize::MAX).min(fleet),
            Self::Percent(p) => (fleet * usize::from(p)).div_ceil(100),
        }
    }

    fn is_some(self) -> bool {
        match self {
            Self::Count(n) => n > 0,
            Self::Percent(p) => (1..=100).contains(&p),
        }
    }
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Count(n) => to.serialize_u32(*n),
            Self::Percent(p) => to.collect_str(&format_args!("{p}%")),
        }
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = Share;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of devices, as in 3, or a whole percentage, as in \"5%\"")
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Share, E> {
                let count = u32::try_from(n);
                count
                    .map(Share::Count)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(n), &self))
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Share, E> {
                let count = u32::try_from(n);
                count
                    .map(Share::Count)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(n), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Share, E> {
                let percent = text.strip_suffix('%').and_then(|n| n.trim().parse().ok());
                percent
                    .map(Share::Percent)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        from.deserialize_any(Either)
    }
}

/// What must hold before the next wave opens. A limit that is exceeded halts the rollout, since
/// waiting cures nothing; everything else is waited for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gate {
    /// Share of the open wave that must have confirmed, 0 to 1. Without it every device that can be
    /// reached must have answered, one way or the other.
    pub min_confirmed: Option<f64>,
    /// Largest share of failures among all devices that have answered, 0 to 1.
    pub max_failed_share: Option<f64>,
    /// `max_failed_share` is not looked at before so many devices have answered.
    pub min_answers: u32,
    /// Largest 99th percentile over devices of the slowest inference in their trial, in ms.
    pub max_latency_p99_ms: Option<f64>,
    /// Most restarts (crashes among them; the cloud can't tell) of devices since they were offered
    /// the model, in all.
    pub max_restarts: Option<u32>,
    /// So long after enough of the wave has confirmed, in seconds.
    pub soak_s: u64,
    /// How far confidence on the uniform lane may fall below that of the model before.
    pub drift: Option<DriftGate>,
}

/// A two-sample Kolmogorov–Smirnov test of the confidences that devices report for the uniform
/// lane, under this model and under the one before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DriftGate {
    /// Greatest distance between the two distributions that is no drift, 0 to 1.
    pub max_distance: f64,
    /// A distance with a p-value above this is luck.
    pub alpha: f64,
    /// The wave waits for so many samples under each model.
    pub min_samples: u32,
}

impl Default for DriftGate {
    fn default() -> Self {
        Self {
            max_distance: 0.2,
            alpha: 0.01,
            min_samples: 50,
        }
    }
}

/// The rules of a rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Its name in reports.
    pub name: String,
    /// The first wave; at least one device.
    pub canary: Share,
    /// The most canaries that may give the model up without halting the rollout.
    pub canary_max_failed: u32,
    /// How many devices the waves after the canaries reach, each with all before it; ascending.
    /// The rest of the fleet is the last wave.
    pub waves: Vec<Share>,
    /// Instead of `waves`: each wave is so many times the one before.
    pub factor: Option<u32>,
    /// The most failures beyond the canaries that do not halt the rollout; without it none, or as
    /// many as `gate.max_failed_share` allows.
    pub max_failed: Option<u32>,
    /// What opens the next wave.
    pub gate: Gate,
    /// Most offers in a second; 0 for no limit.
    pub offer_rate: u32,
    /// Devices of a wave are offered the model spread over so many seconds.
    pub jitter_s: u64,
    /// An offer without an answer is made again after this, in seconds.
    pub offer_ttl_s: u64,
    /// A device that was heard of with the model, but not for this long, is offered it again, in
    /// seconds.
    pub stall_s: u64,
    /// A device that was silent for this long does not hold up the end, in seconds; it is offered
    /// the model when it comes back.
    pub away_s: u64,
    /// Whether devices that took the model go back to the one before when it halts.
    #[serde(rename = "return")]
    pub go_back: bool,
    /// Draws who is a canary and who comes in which wave.
    pub seed: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            name: "custom".to_owned(),
            canary: Share::Count(1),
            canary_max_failed: 0,
            waves: Vec::new(),
            factor: None,
            max_failed: None,
            gate: Gate::default(),
            offer_rate: 0,
            jitter_s: 0,
            offer_ttl_s: 5,
            stall_s: 600,
            away_s: 24 * 3600,
            go_back: true,
            seed: 0,
        }
    }
}

impl Policy {
    /// One device, then all others.
    #[must_use]
    pub fn canary() -> Self {
        Self {
            name: "canary".to_owned(),
            ..Self::default()
        }
    }

    /// All devices at once.
    #[must_use]
    pub fn all() -> Self {
        Self {
            name: "all".to_owned(),
            canary: Share::Percent(100),
            ..Self::default()
        }
    }

    pub(super) fn failures_allowed(&self) -> Option<u32> {
        match (self.max_failed, self.gate.max_failed_share) {
            (None, Some(_)) => None,
            (limit, _) => Some(limit.unwrap_or(0)),
        }
    }

    /// Whether the rules make sense.
    ///
    /// # Errors
    /// [`RolloutError::Policy`] names the first field that does not.
    pub fn check(&self) -> Result<(), RolloutError> {
        let share = |share: Option<f64>| share.is_none_or(|s| s > 0.0 && s <= 1.0);
        // The size of the fleet is not known here, so counts and percentages are ordered apart.
        let ascending = |pick: fn(&Share) -> Option<u32>| {
            let sizes: Vec<u32> = self.waves.iter().filter_map(pick).collect();
            sizes.is_sorted_by(|a, b| a < b)
        };
        let counts = ascending(|s| match s {
            Share::Count(n) => Some(*n),
            Share::Percent(_) => None,
        });
        let percents = ascending(|s| match s {
            Share::Percent(p) => Some(u32::from(*p)),
            Share::Count(_) => None,
        });
        let gate = &self.gate;
        let drift = gate.drift.clone().unwrap_or_default();
        let rules = [
            (
                "canary",
                self.canary.is_some(),
                "at least one device, or \"1%\" to \"100%\"",
            ),
            (
                "waves",
                counts && percents && self.waves.iter().all(|wave| wave.is_some()),
                "ascending numbers of devices or percentages up to \"100%\"",
            ),
            (
                "factor",
                self.factor.is_none_or(|factor| factor > 1)
                    && (self.factor.is_none() || self.waves.is_empty()),
                "at least 2, and without `waves`",
            ),
            ("offer_ttl_s", self.offer_ttl_s > 0, "above 0"),
            ("stall_s", self.stall_s > 0, "above 0"),
            ("away_s", self.away_s > 0, "above 0"),
            (
                "gate.min_confirmed",
                share(gate.min_confirmed),
                "above 0, at most 1",
            ),
            (
                "gate.max_failed_share",
                share(gate.max_failed_share),
                "above 0, at most 1",
            ),
            (
                "gate.max_latency_p99_ms",
                gate.max_latency_p99_ms
                    .is_none_or(|ms| ms > 0.0 && ms.is_finite()),
                "above 0",
            ),
            (
                "gate.drift.max_distance",
                (0.0..=1.0).contains(&drift.max_distance),
                "between 0 and 1",
            ),
            (
                "gate.drift.alpha",
                drift.alpha > 0.0 && drift.alpha < 1.0,
                "above 0 and below 1",
            ),
            (
                "gate.drift.min_samples",
                drift.min_samples >= 20,
                "at least 20: fewer say nothing",
            ),
        ];
        for (field, holds, want) in rules {
            if !holds {
                return Err(RolloutError::Policy { field, want });
            }
        }
        Ok(())
    }

    /// When a device's turn comes in its wave, in ms after the wave opened.
    pub(super) fn delay_ms(&self, device: &str) -> u64 {
        match self.jitter_s.saturating_mul(1000) {
            0 => 0,
            spread => {
                let Digest(lot) =
                    Digest::of_parts(&[b"jitter", &self.seed.to_le_bytes(), device.as_bytes()]);
                let mut first = [0; 8];
                first.copy_from_slice(&lot[..8]);
                u64::from_le_bytes(first) % spread
            }
        }
    }

    /// Device ids: online first, then each group's first, second, … by the seed's draw.
    pub(super) fn order<'a>(&self, devices: impl Iterator<Item = &'a Device>) -> Vec<String> {
        let lot = |id: &str| Digest::of_parts(&[&self.seed.to_le_bytes(), id.as_bytes()]);
        let mut drawn: Vec<(bool, Digest, &Device)> =
            devices.map(|d| (!d.online, lot(&d.id), d)).collect();
        drawn.sort_by_key(|(away, lot, _)| (*away, *lot));
        let mut places: BTreeMap<(bool, &str), u32> = BTreeMap::new();
        let mut placed: Vec<(bool, u32, Digest, &Device)> = Vec::with_capacity(drawn.len());
        for (away, lot, device) in drawn {
            let place = places.entry((away, device.group.as_str())).or_default();
            placed.push((away, *place, lot, device));
            *place += 1;
        }
        placed.sort_by_key(|(away, place, lot, _)| (*away, *place, *lot));
        placed.into_iter().map(|(.., d)| d.id.clone()).collect()
    }

    /// Cuts an order into waves, none of them empty.
    pub(super) fn cut(&self, order: Vec<String>) -> Vec<Vec<String>> {
        let fleet = order.len();
        let canaries = self.canary.of(fleet).max(1);
        let mut ends = vec![canaries];
        match self.factor {
            Some(factor) => {
                let (mut size, mut end) = (canaries, canaries);
                while end < fleet {
                    size = size.saturating_mul(usize::try_from(factor).unwrap_or(usize::MAX));
                    end = end.saturating_add(size).min(fleet);
                    ends.push(end);
                }
            }
            None => ends.extend(self.waves.iter().map(|wave| wave.of(fleet))),
        }
        ends.push(fleet);
        let mut waves = Vec::new();
        let mut left = order.into_iter();
        let mut done = 0;
        for end in ends {
            if end > done {
                waves.push(left.by_ref().take(end - done).collect());
                done = end;
            }
        }
        waves
    }
}
