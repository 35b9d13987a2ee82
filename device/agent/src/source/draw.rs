//! Streams made from labelled sets: which pictures belong to a split, shard and pool, and an
//! endless seeded draw with rare classes and one that appears late. Picture choice by index is a
//! pure function, so that nothing has to be replayed after a restart.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::SourceError;
use super::query::Query;

/// Keep the three questions put to one hash apart, so that no answer tells another.
const POOL: u64 = 1;
const SHARD: u64 = 2;
const HELD_OUT: u64 = 3;

/// Which half of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Split {
    /// Everything.
    All,
    /// What may be learnt from.
    Train,
    /// What is held out.
    Test,
}

#[derive(Clone, Copy)]
enum Mix {
    Stream,
    Balanced,
}

/// Which share of a set's pictures belongs to one reader, decided by content: identical pictures
/// always fall together, whatever their names.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Portion {
    shard: (u64, u64),
    pool: (f64, f64),
}

impl Portion {
    /// Takes `shard=K/N` and `pool=START..END`.
    pub(super) fn take(query: &mut Query) -> Result<Self, SourceError> {
        let expected = "K/N with K below N, such as 0/4";
        let shard = match query.text("shard") {
            None => (0, 1),
            Some(text) => text
                .split_once('/')
                .and_then(|(k, n)| Some((k.parse::<u64>().ok()?, n.parse::<u64>().ok()?)))
                .filter(|(k, n)| k < n)
                .ok_or_else(|| query.refuse("shard", &text, expected))?,
        };
        let expected = "START..END, fractions with 0 <= START < END <= 1, such as 0..0.2";
        let pool = match query.text("pool") {
            None => (0.0, 1.0),
            Some(text) => text
                .split_once("..")
                .and_then(|(a, b)| Some((a.parse::<f64>().ok()?, b.parse::<f64>().ok()?)))
                .filter(|(a, b)| (0.0..=1.0).contains(a) && (0.0..=1.0).contains(b) && a < b)
                .ok_or_else(|| query.refuse("pool", &text, expected))?,
        };
        Ok(Self { shard, pool })
    }

    /// Whether this is everything, so that nobody need be asked about single pictures.
    pub(super) fn is_all(&self) -> bool {
        self.shard.1 == 1 && self.pool == (0.0, 1.0)
    }

    /// Whether a picture with this content belongs here.
    pub(super) fn holds(&self, content: u64) -> bool {
        let fraction = mixed(content ^ POOL) as f64 / (u64::MAX as f64 + 1.0);
        let in_pool = self.pool.0 <= fraction && (fraction < self.pool.1 || self.pool.1 >= 1.0);
        in_pool && mixed(content ^ SHARD) % self.shard.1 == self.shard.0
    }
}

/// Whether content is in the held-out fifth.
pub(super) fn held_out(content: u64) -> bool {
    mixed(content ^ HELD_OUT).is_multiple_of(5)
}

/// A 64-bit hash of a picture's bytes: FNV-1a. It sorts pictures into portions and guards nothing.
pub(crate) fn content_hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The finaliser of SplitMix64: every input bit reaches every output bit.
fn mixed(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The class shares a URI asks for, before the classes are known.
pub(super) struct Wish {
    seed: u64,
    mix: Mix,
    rare: Vec<(String, f64)>,
    late: Option<(String, u64)>,
}

impl Wish {
    /// Takes `seed`, `mix`, `rare=CLASS:SHARE,…` and `late=CLASS@FRAME`.
    pub(super) fn take(query: &mut Query) -> Result<Self, SourceError> {
        let seed = query.value("seed", 7, "a whole number")?;
        let mix = query.choice(
            "mix",
            [("stream", Mix::Stream), ("balanced", Mix::Balanced)],
        )?;
        let mut rare: Vec<(String, f64)> = Vec::new();
        if let Some(text) = query.text("rare") {
            for part in text.split(',') {
                let (class, share) = part
                    .rsplit_once(':')
                    .and_then(|(class, share)| Some((class, share.parse::<f64>().ok()?)))
                    .filter(|(class, share)| !class.is_empty() && (0.0..1.0).contains(share))
                    .ok_or_else(|| {
                        query.refuse("rare", &text, "CLASS:SHARE,… such as 8:0.005,3:0.01")
                    })?;
                if rare.iter().any(|(other, _)| other == class) {
                    return Err(query.refuse("rare", &text, "each class only once"));
                }
                rare.push((class.to_owned(), share));
            }
            if rare.iter().map(|(_, share)| share).sum::<f64>() >= 1.0 {
                return Err(query.refuse("rare", &text, "shares that sum to less than 1"));
            }
        }
        let late = match query.text("late") {
            None => None,
            Some(text) => Some(
                text.rsplit_once('@')
                    .and_then(|(class, from)| Some((class.to_owned(), from.parse::<u64>().ok()?)))
                    .filter(|(class, _)| !class.is_empty() && rare.iter().all(|(r, _)| r != class))
                    .ok_or_else(|| {
                        query.refuse(
                            "late",
                            &text,
                            "CLASS@FRAME such as 9@5000, of a class that isn't rare",
                        )
                    })?,
            ),
        };
        Ok(Self {
            seed,
            mix,
            rare,
            late,
        })
    }

    /// Fits the wish to a set: `classes` are all its class names and `pools[c]` the items of class
    /// `c` that are this reader's. A common class without items is left out of the draw.
    ///
    /// # Errors
    /// A named class does not exist or has no items; nothing common is left to draw.
    pub(super) fn fit(
        self,
        query: &Query,
        classes: &[String],
        pools: Vec<Vec<usize>>,
    ) -> Result<Draw, SourceError> {
        let find = |parameter: &str, name: &str| {
            let class = classes
                .iter()
                .position(|class| class == name)
                .ok_or_else(|| {
                    query.refuse(parameter, name, &format!("one of {}", classes.join(", ")))
                })?;
            if pools[class].is_empty() {
                return Err(SourceError::Empty {
                    uri: query.uri().to_owned(),
                    which: format!(" of class {name:?}"),
                });
            }
            Ok(class)
        };
        let mut rare = BTreeMap::new();
        for (name, share) in &self.rare {
            rare.insert(find("rare", name)?, *share);
        }
        let late = match &self.late {
            None => None,
            Some((name, from)) => Some((find("late", name)?, *from)),
        };
        let held = |class: &usize| !pools[*class].is_empty();
        let (before, after, rare, late_from) = match self.mix {
            Mix::Balanced => {
                let all: Vec<usize> = (0..pools.len()).filter(held).collect();
                (all.clone(), all, BTreeMap::new(), 0)
            }
            Mix::Stream => {
                let after: Vec<usize> = (0..pools.len())
                    .filter(held)
                    .filter(|c| !rare.contains_key(c))
                    .collect();
                let before = after
                    .iter()
                    .copied()
                    .filter(|c| late.is_none_or(|(late, _)| late != *c))
                    .collect();
                (before, after, rare, late.map_or(0, |(_, from)| from))
            }
        };
        // `before` is the smaller: if it has a class, so has `after`.
        if before.is_empty() {
            return Err(SourceError::Empty {
                uri: query.uri().to_owned(),
                which: " of any common class".to_owned(),
            });
        }
        let rng = ChaCha8Rng::seed_from_u64(self.seed);
        Ok(Draw {
            rng,
            rare: rare.into_iter().collect(),
            before,
            after,
            late_from,
            pools,
        })
    }
}

/// An endless draw with replacement; each index has its own stream of random numbers.
pub(super) struct Draw {
    rng: ChaCha8Rng,
    /// Rare classes and their shares.
    rare: Vec<(usize, f64)>,
    /// The classes that share the rest before and after the late class appears.
    before: Vec<usize>,
    after: Vec<usize>,
    late_from: u64,
    pools: Vec<Vec<usize>>,
}

impl Draw {
    /// The class and the item at `index`.
    pub(super) fn at(&self, index: u64) -> (usize, usize) {
        let mut rng = self.rng.clone();
        rng.set_stream(index);
        let unit = |rng: &mut ChaCha8Rng| (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let mut left = unit(&mut rng);
        let class = 'class: {
            for &(class, share) in &self.rare {
                if left < share {
                    break 'class class;
                }
                left -= share;
            }
            let common = if index >= self.late_from {
                &self.after
            } else {
                &self.before
            };
            let rest = 1.0 - self.rare.iter().map(|(_, share)| share).sum::<f64>();
            common[((left / rest * common.len() as f64) as usize).min(common.len() - 1)]
        };
        let pool = &self.pools[class];
        let item = (unit(&mut rng) * pool.len() as f64) as usize;
        (class, pool[item.min(pool.len() - 1)])
    }
}
