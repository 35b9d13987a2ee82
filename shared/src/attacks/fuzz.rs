//! A seeded, structure-aware fuzzer of the verifier: it takes genuine messages apart at random, signs
//! a share of them anew with the right keys, and hands them to every entry of the verifier.
//!
//! Nothing may panic, and nothing that was changed may be believed unless a key holder signed the
//! change. Most inputs go where ed25519 is not reached, so that many are tried; each so many-th goes
//! all the way.

use heapless::Vec;
use serde::{Deserialize, Serialize};

use super::{BODY, NOW_MS, SEQUENCE, Sealed, SealedRoot, World, judged};
use crate::canonical;
use crate::ids::{Digest, IdError};
use crate::message::{Down, OfferMessage};
use crate::trust::{
    Judge, Manifest, Offer, Role, Signed, SignedRoot, TimeStamp, Timekeeper, TrustError, TrustRoot,
};

/// One in so many inputs goes through signature checks as it is.
const CHECKED: u64 = 256;
/// One in so many is signed anew first.
const SIGNED: u64 = 512;
/// Bytes at which parsers stumble.
const INTERESTING: [u8; 8] = [0x00, 0x01, 0x7f, 0x80, 0x81, 0xfe, 0xff, 0x05];

/// How an input ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was refused.
    Refused(TrustError),
    /// It decodes, where only that was asked.
    Decoded,
    /// It was believed, as it must: unchanged, or signed anew.
    Believed,
}

impl Outcome {
    /// Number of outcomes.
    pub const COUNT: usize = TrustError::ALL.len() + 2;

    /// A place in a table of counts: refusals by number, then the others.
    pub fn index(self) -> usize {
        match self {
            Self::Refused(error) => usize::from(error.code()) - 1,
            Self::Decoded => TrustError::ALL.len(),
            Self::Believed => TrustError::ALL.len() + 1,
        }
    }
}

/// Something that was changed was believed; [`Fuzzer::escaped`] has its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Escape;

/// The fuzzer.
pub struct Fuzzer {
    world: World,
    state: u64,
    manifest: Sealed,
    offer: Sealed,
    stamp: Sealed,
    root: SealedRoot,
    wire: Vec<u8, BODY>,
    keeper: Timekeeper,
    escaped: Vec<u8, BODY>,
}

impl Fuzzer {
    /// A fuzzer whose inputs follow from the seed.
    ///
    /// # Errors
    /// As [`World::new`].
    pub fn new(seed: u64) -> Result<Self, IdError> {
        let world = World::new(1)?;
        let manifest = world.released(&world.manifest());
        let offer = world.offered(&world.offer(&manifest, SEQUENCE));
        let stamp = world.stamped(1, NOW_MS);
        let root = SealedRoot::of(&world.next(), &[&world.root[0], &world.root[1]]);
        let wire = super::encode(&Down::Offer(OfferMessage {
            offer: offer.signed(),
            manifest: manifest.signed(),
        }));
        Ok(Self {
            world,
            state: seed,
            manifest,
            offer,
            stamp,
            root,
            wire,
            keeper: Timekeeper::default(),
            escaped: Vec::new(),
        })
    }

    /// Makes an input and hands it in.
    ///
    /// # Errors
    /// If it was believed and must not be.
    pub fn step(&mut self) -> Result<Outcome, Escape> {
        let draw = self.next();
        if draw.is_multiple_of(SIGNED) {
            return self.signed_anew();
        }
        if draw.is_multiple_of(CHECKED) {
            return self.as_it_is();
        }
        Ok(match self.below(8) {
            0 | 1 => {
                let body = self.spoilt(Which::Manifest);
                decoded(Manifest::recall(&Digest::of(&body), &body).and_then(|m| m.legal()))
            }
            2 => decodes::<Offer>(&self.spoilt(Which::Offer)),
            3 => decodes::<TimeStamp>(&self.spoilt(Which::Time)),
            4 => decodes::<TrustRoot>(&self.spoilt(Which::Root)),
            5 => {
                // Signatures of other lengths, so that none is checked.
                let body = self.spoilt(Which::Root);
                let len = self.below(self.root.signatures.len() as u64) as usize;
                let signed = SignedRoot {
                    body: &body,
                    signatures: &self.root.signatures[..len.min(95)],
                };
                decoded(TrustRoot::pin(signed).map(|_| ()))
            }
            6 => {
                let bytes = self.spoilt(Which::SignedRoot);
                let signed = SignedRoot::from_bytes(&bytes);
                decoded(signed.map(|signed| signed.pairs().for_each(|_| ())))
            }
            _ => {
                let bytes = self.spoilt(Which::Wire);
                match ::postcard::from_bytes::<Down<'_>>(&bytes) {
                    Ok(_) => Outcome::Decoded,
                    Err(_) => Outcome::Refused(TrustError::Malformed),
                }
            }
        })
    }

    /// The body that was believed, after an [`Escape`].
    pub fn escaped(&self) -> &[u8] {
        &self.escaped
    }

    /// Genuine messages with anything changed: refused whatever it is.
    fn as_it_is(&mut self) -> Result<Outcome, Escape> {
        let which = [Which::Manifest, Which::Offer, Which::Time, Which::Root];
        let which = which[self.below(4) as usize];
        let genuine = self.bytes(which);
        let mut body = genuine.clone();
        let (mut signature, mut signatures) = (self.signature(which), self.root.signatures.clone());
        let place = self.below(2);
        if place == 0 {
            self.spoil(&mut body);
        } else {
            let at = self.below(64) as usize;
            signature[at] ^= 1 << self.below(8);
            signatures[32 + at] ^= 1 << self.below(8);
        }
        let changed = place == 1 || body != genuine;
        let verdict = self.verdict(which, &body, &signature, &signatures);
        match verdict {
            Err(error) => Ok(Outcome::Refused(error)),
            Ok(()) if changed => {
                self.escaped = body;
                Err(Escape)
            }
            Ok(()) => Ok(Outcome::Believed),
        }
    }

    /// Changed messages under a genuine signature of the change: the parser and the judge alone.
    fn signed_anew(&mut self) -> Result<Outcome, Escape> {
        let which = [Which::Manifest, Which::Offer, Which::Time, Which::Root];
        let which = which[self.below(4) as usize];
        let mut body = self.bytes(which);
        self.spoil(&mut body);
        let world = &self.world;
        let (signature, signatures) = match which {
            Which::Root => {
                let sealed = SealedRoot::raw(&body, &[&world.root[0], &world.root[1]]);
                ([0; 64], sealed.signatures)
            }
            Which::Manifest => (
                Sealed::raw(Role::Release, &world.release, &body).signature,
                Vec::new(),
            ),
            Which::Offer => (
                Sealed::raw(Role::Rollout, &world.rollout, &body).signature,
                Vec::new(),
            ),
            _ => (
                Sealed::raw(Role::Time, &world.rollout, &body).signature,
                Vec::new(),
            ),
        };
        Ok(match self.verdict(which, &body, &signature, &signatures) {
            Ok(()) => Outcome::Believed,
            Err(error) => Outcome::Refused(error),
        })
    }

    fn verdict(
        &mut self,
        which: Which,
        body: &[u8],
        signature: &[u8],
        signatures: &[u8],
    ) -> Result<(), TrustError> {
        let world = &self.world;
        let signed = Signed { body, signature };
        match which {
            Which::Manifest => {
                // An offer that fits whatever the manifest has become.
                let sequence = canonical::decode::<Manifest<'_>>(body).map_or(0, |m| m.sequence);
                let offer = Offer {
                    manifest: Digest::of(body),
                    ..world.offer(&self.manifest, sequence)
                };
                let offer = world.offered(&offer);
                judged(world.judge().offer(offer.signed(), signed))
            }
            Which::Offer => judged(world.judge().offer(signed, self.manifest.signed())),
            Which::Root => {
                let next = world.trust.update(SignedRoot { body, signatures })?;
                // Whatever was signed must be usable without a panic.
                let judge = Judge {
                    trust: &next,
                    floor: next.min_sequence,
                    ..world.judge()
                };
                match judge.offer(self.offer.signed(), self.manifest.signed()) {
                    Ok(_) | Err(_) => Ok(()),
                }
            }
            _ => {
                let mut keeper = self.keeper;
                keeper.answer(&world.trust, &world.device, 1, signed, 0)?;
                let _ = keeper.now(&world.trust, Some(NOW_MS), u64::MAX);
                Ok(())
            }
        }
    }

    fn bytes(&self, which: Which) -> Vec<u8, BODY> {
        match which {
            Which::Manifest => self.manifest.body.clone(),
            Which::Offer => self.offer.body.clone(),
            Which::Time => self.stamp.body.clone(),
            Which::Root => self.root.body.clone(),
            Which::SignedRoot => super::encode(&self.root.signed()),
            Which::Wire => self.wire.clone(),
        }
    }

    fn signature(&self, which: Which) -> [u8; 64] {
        match which {
            Which::Manifest => self.manifest.signature,
            Which::Offer => self.offer.signature,
            _ => self.stamp.signature,
        }
    }

    fn spoilt(&mut self, which: Which) -> Vec<u8, BODY> {
        let mut bytes = self.bytes(which);
        self.spoil(&mut bytes);
        bytes
    }

    /// Changes bytes in one to four places; sometimes they end up as they were.
    fn spoil(&mut self, bytes: &mut Vec<u8, BODY>) {
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                return;
            }
            let at = self.below(bytes.len() as u64) as usize;
            match self.below(8) {
                0 | 1 => bytes[at] ^= 1 << self.below(8),
                2 => bytes[at] = INTERESTING[self.below(8) as usize],
                3 => bytes[at] = self.next() as u8,
                4 => bytes.truncate(at),
                5 => {
                    bytes.remove(at);
                }
                6 => {
                    // One byte more, or a number that is spelled longer.
                    let long = bytes[at] | 0x80;
                    if bytes.insert(at, long).is_ok() && self.below(2) == 0 {
                        bytes[at + 1] = 0;
                    }
                }
                _ => {
                    // A piece of the message in another place of it.
                    let from = self.below(bytes.len() as u64) as usize;
                    let len = self.below(16) as usize;
                    let len = len.min(bytes.len() - at).min(bytes.len() - from);
                    bytes.copy_within(from..from + len, at);
                }
            }
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Which genuine message an input is made from.
#[derive(Clone, Copy)]
enum Which {
    Manifest,
    Offer,
    Time,
    Root,
    SignedRoot,
    Wire,
}

fn decodes<'a, T: Deserialize<'a> + Serialize>(bytes: &'a [u8]) -> Outcome {
    decoded(
        canonical::decode::<T>(bytes)
            .map(|_| ())
            .map_err(TrustError::from),
    )
}

fn decoded(verdict: Result<(), TrustError>) -> Outcome {
    match verdict {
        Ok(()) => Outcome::Decoded,
        Err(error) => Outcome::Refused(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smoke_run_refuses_in_many_ways_and_lets_nothing_through() {
        let mut fuzzer = Fuzzer::new(1).unwrap();
        let mut counts = [0u32; Outcome::COUNT];
        for _ in 0..50_000 {
            let outcome = fuzzer.step().unwrap();
            counts[outcome.index()] += 1;
        }
        for error in [
            TrustError::BadSignature,
            TrustError::Malformed,
            TrustError::NotCanonical,
            TrustError::Threshold,
        ] {
            assert!(counts[Outcome::Refused(error).index()] > 0, "{error:?}");
        }
        assert!(counts[Outcome::Decoded.index()] > 0);
        assert!(counts[Outcome::Believed.index()] > 0);
    }

    #[test]
    fn one_seed_makes_one_run() {
        let run = |seed| {
            let mut fuzzer = Fuzzer::new(seed).unwrap();
            let mut sum = 0u64;
            for _ in 0..2_000 {
                let index = fuzzer.step().unwrap().index() as u64;
                sum = sum.wrapping_mul(31).wrapping_add(index);
            }
            sum
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }
}
