//! The rules of a rollout and how they divide a fleet into waves.

use super::{Device, RolloutError};
use flywheel_shared::ids::Digest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A part of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Share {
    /// So many devices.
    Count(u32),
    /// So many in a hundred, rounded up.
    Percent(u8),
}

/// The rules of a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// The first wave; at least one device.
    pub canary: Share,
    /// Where the waves after it end, in percent of the fleet, ascending; 100 is added at the end.
    pub waves: Vec<u8>,
    /// The most failures beyond the canaries that do not halt the rollout.
    pub max_failed: u32,
    /// An offer without an answer is made again after this, in ms.
    pub offer_ttl_ms: u64,
    /// A device that was heard of with the model, but not for this long, is offered it again, in ms.
    pub stall_ms: u64,
    /// Only devices of this group; `None` for all.
    pub group: Option<String>,
    /// Draws who is a canary and who comes in which wave.
    pub seed: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            canary: Share::Count(1),
            waves: vec![50],
            max_failed: 0,
            offer_ttl_ms: 60_000,
            stall_ms: 600_000,
            group: None,
            seed: 0,
        }
    }
}

impl Policy {
    pub(super) fn check(&self) -> Result<(), RolloutError> {
        let canary = match self.canary {
            Share::Count(n) => n > 0,
            Share::Percent(p) => (1..=100).contains(&p),
        };
        let ascending = self.waves.is_sorted_by(|a, b| a < b);
        let percents = self.waves.iter().all(|p| (1..=100).contains(p));
        let rules = [
            ("canary", canary, "at least one device, or 1 to 100 percent"),
            (
                "waves",
                ascending && percents,
                "ascending percents, 1 to 100",
            ),
            ("offer_ttl_ms", self.offer_ttl_ms > 0, "above 0"),
            ("stall_ms", self.stall_ms > 0, "above 0"),
        ];
        for (field, holds, want) in rules {
            if !holds {
                return Err(RolloutError::Policy { field, want });
            }
        }
        Ok(())
    }

    /// Whether a rollout with this policy is for the device.
    pub fn covers(&self, device: &Device) -> bool {
        self.group
            .as_ref()
            .is_none_or(|group| *group == device.group)
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

    pub(super) fn cut(&self, order: Vec<String>) -> Vec<Vec<String>> {
        let fleet = order.len();
        let percent = |p: u8| (fleet * usize::from(p)).div_ceil(100);
        let canaries = match self.canary {
            Share::Count(n) => usize::try_from(n).unwrap_or(usize::MAX),
            Share::Percent(p) => percent(p),
        };
        let ends = self.waves.iter().map(|&p| percent(p)).chain([fleet]);
        let mut waves = Vec::new();
        let mut left = order.into_iter();
        let mut done = 0;
        for end in std::iter::once(canaries.min(fleet)).chain(ends) {
            if end > done || waves.is_empty() {
                waves.push(left.by_ref().take(end - done).collect());
                done = end;
            }
        }
        waves
    }
}
