//! Attacks on the decoder, signed by the right keys: what is left when a key holder is careless or a
//! parser is.

use super::{BODY, Bench, NOW_MS, SEQUENCE, Sealed, SealedRoot, Surprise, World, encode};
use crate::ids::Digest;
use crate::trust::{Manifest, Offer, Role, SignedRoot, TimeStamp, TrustError, TrustRoot, verify};
use heapless::Vec;

/// A kind of signed body.
#[derive(Clone, Copy)]
enum Kind {
    Manifest,
    Offer,
    Time,
    Root,
}

const KINDS: [Kind; 4] = [Kind::Manifest, Kind::Offer, Kind::Time, Kind::Root];

impl Kind {
    fn body(self, world: &World) -> Vec<u8, BODY> {
        match self {
            Self::Manifest => encode(&world.manifest()),
            Self::Offer => encode(&world.offer(&world.released(&world.manifest()), SEQUENCE)),
            Self::Time => world.stamped(1, NOW_MS).body,
            Self::Root => encode(&world.next()),
        }
    }

    /// Where varints start; all are below 128 there but the root's version, which is 5.
    fn varints(self) -> &'static [usize] {
        match self {
            // Length of the name; length of the hardware, behind a sequence of two bytes; ABI.
            Self::Manifest => &[0, 8, 11],
            // Length of the device's name.
            Self::Offer => &[0],
            // Length of the device's name; the nonce.
            Self::Time => &[0, 5],
            // The version.
            Self::Root => &[0],
        }
    }

    /// What the device says to a body that the right keys signed.
    fn verdict(self, world: &World, body: &[u8]) -> Result<(), TrustError> {
        let release = || Sealed::raw(Role::Release, &world.release, body);
        let rollout = |role| Sealed::raw(role, &world.rollout, body);
        let trust = &world.trust;
        match self {
            Self::Manifest => {
                verify::<Manifest<'_>>(Role::Release, &trust.release, release().signed())
                    .map(|_| ())
            }
            Self::Offer => {
                let sealed = rollout(Role::Rollout);
                verify::<Offer>(Role::Rollout, &trust.rollout, sealed.signed()).map(|_| ())
            }
            Self::Time => {
                let sealed = rollout(Role::Time);
                verify::<TimeStamp>(Role::Time, &trust.rollout, sealed.signed()).map(|_| ())
            }
            Self::Root => {
                let sealed = SealedRoot::raw(body, &[&world.root[0], &world.root[1]]);
                trust.update(sealed.signed()).map(|_| ())
            }
        }
    }
}

/// Bytes behind the end.
pub fn attack_parser_abuse_trailing_bytes(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    for kind in KINDS {
        let mut body = kind.body(world);
        bench.believed(kind.verdict(world, &body))?;
        for _ in 0..3 {
            let _ = body.push(0);
            bench.refused(kind.verdict(world, &body))?;
        }
    }
    // Around a signed root, and signatures that are not whole.
    let sealed = SealedRoot::of(&world.next(), &[&world.root[0], &world.root[1]]);
    let mut outer: Vec<u8, BODY> = encode(&sealed.signed());
    bench.believed(SignedRoot::from_bytes(&outer))?;
    let _ = outer.push(0);
    bench.refused(SignedRoot::from_bytes(&outer))?;
    let mut uneven = sealed.clone();
    let _ = uneven.signatures.push(0);
    bench.refused(world.trust.update(uneven.signed()))?;
    bench.refused(TrustRoot::pin(uneven.signed()))
}

/// Every body cut at every length.
pub fn attack_parser_abuse_truncation(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    for kind in KINDS {
        let body = kind.body(world);
        for len in bench.strided(body.len()) {
            bench.refused(kind.verdict(world, &body[..len]))?;
        }
    }
    let manifest = encode(&world.manifest());
    for len in 0..manifest.len() {
        let cut = &manifest[..len];
        bench.refused(Manifest::recall(&Digest::of(cut), cut))?;
    }
    let root = SealedRoot::of(&world.next(), &[&world.root[0], &world.root[1]]);
    let outer: Vec<u8, BODY> = encode(&root.signed());
    for len in 0..outer.len() {
        bench.refused(SignedRoot::from_bytes(&outer[..len]))?;
    }
    Ok(())
}

/// Numbers spelled with more bytes than they need.
pub fn attack_parser_abuse_long_varints(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    for kind in KINDS {
        for at in kind.varints() {
            let body = kind.body(world);
            let mut long: Vec<u8, BODY> = Vec::new();
            let _ = long.extend_from_slice(&body[..*at]);
            let _ = long.extend_from_slice(&[body[*at] | 0x80, 0]);
            let _ = long.extend_from_slice(&body[at + 1..]);
            bench.refused(kind.verdict(world, &long))?;
        }
    }
    Ok(())
}
