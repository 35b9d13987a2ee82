//! Floors: what a device has seen and does not go below, each tied to the key that set it.
//!
//! A stolen key can raise a floor to the end of the number range, after which nothing would be
//! taken any more. A floor therefore counts only under the key that raised it: when a newer root
//! names another key, the floor starts again where that root says. Nothing has to be reset, so no
//! power cut comes between a new root and its floors.

use serde::{Deserialize, Serialize};

use super::PublicKey;

/// Names a key in what a device stores: its first 8 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyId(pub [u8; 8]);

impl KeyId {
    /// The name of a key.
    pub fn of(key: &PublicKey) -> Self {
        let mut id = [0; 8];
        id.copy_from_slice(&key[..8]);
        Self(id)
    }
}

/// A number that only rises while one key is believed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Floor {
    /// The key that raised it.
    pub key: KeyId,
    /// How far.
    pub at: u64,
}

impl Floor {
    /// The floor under a key, for which the trust root says `least`.
    pub fn under(&self, key: KeyId, least: u64) -> u64 {
        if self.key == key {
            self.at.max(least)
        } else {
            least
        }
    }

    /// The floor after something signed by `key` was believed. Returns whether it changed.
    pub fn raise(&mut self, key: KeyId, at: u64) -> bool {
        let raised = Self {
            key,
            at: self.under(key, at),
        };
        let changed = raised != *self;
        *self = raised;
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_rises_under_one_key_and_starts_again_under_another() {
        let (old, new) = (KeyId([1; 8]), KeyId([2; 8]));
        let mut floor = Floor::default();
        assert_eq!(floor.under(old, 3), 3);
        assert!(floor.raise(old, 7));
        assert!(!floor.raise(old, 6));
        assert_eq!(floor.under(old, 3), 7);
        assert_eq!(floor.under(old, 9), 9);
        assert!(floor.raise(old, u64::MAX));
        assert_eq!(floor.under(new, 3), 3);
        assert!(floor.raise(new, 4));
        assert_eq!(floor.under(new, 3), 4);
    }
}
