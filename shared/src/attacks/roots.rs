//! Attacks on the chain of trust roots.

use super::{Bench, SealedRoot, Surprise, key, public};
use crate::trust::{Keys, TrustError, TrustRoot};
use ed25519_dalek::SigningKey;

/// Older roots, genuine as they were.
pub fn attack_rollback_of_the_root(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let by = [&world.root[0], &world.root[1]];
    for version in 0..=world.trust.version {
        let old = TrustRoot {
            version,
            ..world.trust.clone()
        };
        bench.refused(world.trust.update(SealedRoot::of(&old, &by).signed()))?;
    }
    Ok(())
}

/// The chain is pushed to its last version, after which none could follow.
pub fn attack_fast_forward_root(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let by = [&world.root[0], &world.root[1]];
    let last = TrustRoot {
        version: u32::MAX,
        ..world.next()
    };
    bench.refused(world.trust.update(SealedRoot::of(&last, &by).signed()))?;
    // Even a device that is there refuses without an overflow.
    bench.refused_as(
        TrustError::OldRoot,
        last.update(SealedRoot::of(&world.next(), &by).signed()),
    )
}

/// Roots with too few distinct signers, of the old keys or of the new.
pub fn attack_key_compromise_threshold(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let [a, b, c] = &world.root;
    let stranger = &world.stranger;
    let next = world.next();
    let too_few: [&[&SigningKey]; 9] = [
        &[],
        &[a],
        &[c],
        &[a, a],
        &[a, a, a, a, a, a, a, a, a, a],
        &[stranger, stranger],
        &[a, stranger],
        &[a, &world.release],
        &[&world.rollout, a, a],
    ];
    for by in too_few {
        let sealed = SealedRoot::of(&next, by);
        bench.refused(world.trust.update(sealed.signed()))?;
        bench.refused(TrustRoot::pin(sealed.signed()))?;
    }
    // One genuine signature under the names of others.
    let mut renamed = SealedRoot::of(&next, &[a, a, a]);
    renamed.signatures[96..128].copy_from_slice(&public(b));
    renamed.signatures[192..224].copy_from_slice(&public(c));
    bench.refused(world.trust.update(renamed.signed()))?;
    // Another root's signatures.
    let other = TrustRoot {
        min_sequence: 1,
        ..world.next()
    };
    let mut moved = SealedRoot::of(&other, &[a, b, c]);
    moved.body = SealedRoot::of(&next, &[]).body;
    bench.refused(world.trust.update(moved.signed()))?;
    // A device that was made to hold a root with one key named twice still counts it once.
    let mut doubled = world.trust.clone();
    doubled.root.keys[1] = doubled.root.keys[0];
    bench.refused(doubled.update(SealedRoot::of(&next, &[a, b]).signed()))?;
    // All keys are replaced: too few of the old, or of the new.
    let new = [key(21), key(22), key(23)];
    let mut replaced = world.next();
    replaced.root.keys.clear();
    let _ = replaced
        .root
        .keys
        .extend_from_slice(&new.each_ref().map(public));
    let [x, y, _] = &new;
    let halves: [&[&SigningKey]; 5] = [&[a, b], &[x, y], &[a, b, x], &[a, x, y], &[a, x]];
    for by in halves {
        let sealed = SealedRoot::of(&replaced, by);
        bench.refused(world.trust.update(sealed.signed()))?;
    }
    // A bad signature of a key that also gave a good one, and strangers, do no harm.
    let mut noisy = SealedRoot::of(&replaced, &[stranger, a, a, b, x, y]);
    noisy.signatures[96 + 40] ^= 1;
    bench.believed(world.trust.update(noisy.signed()))?;
    // Thresholds that nobody can meet, or that anybody does.
    for threshold in [0, 4, 255] {
        let mut root = world.next();
        root.root.threshold = threshold;
        let sealed = SealedRoot::of(&root, &[a, b, c]);
        bench.refused(world.trust.update(sealed.signed()))?;
        bench.refused(TrustRoot::pin(sealed.signed()))?;
    }
    let nobody = TrustRoot {
        root: Keys::default(),
        ..world.next()
    };
    bench.refused(
        world
            .trust
            .update(SealedRoot::of(&nobody, &[a, b]).signed()),
    )?;
    bench.refused(TrustRoot::pin(SealedRoot::of(&nobody, &[]).signed()))?;
    bench.refused(TrustRoot::default().update(SealedRoot::of(&next, &[a, b]).signed()))
}

/// One key named twice to count as two, or given two roles.
pub fn attack_key_compromise_duplicate_keys(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let [a, b, c] = &world.root;
    type Spoil<'a> = &'a dyn Fn(&mut TrustRoot);
    let doubles: [(Spoil<'_>, &[&SigningKey]); 5] = [
        (&|root| root.root.keys[1] = root.root.keys[0], &[a, b, c]),
        (&|root| root.root.keys[2] = root.root.keys[0], &[a, b, c]),
        (&|root| root.release = root.rollout, &[a, b]),
        (&|root| root.release = root.root.keys[2], &[a, b]),
        (&|root| root.rollout = root.root.keys[0], &[a, b]),
    ];
    for (spoil, by) in doubles {
        let mut root = world.next();
        spoil(&mut root);
        let sealed = SealedRoot::of(&root, by);
        bench.refused(world.trust.update(sealed.signed()))?;
        bench.refused(TrustRoot::pin(sealed.signed()))?;
    }
    Ok(())
}

/// A root with one left out before it, so that a stolen set of keys never gets replaced.
pub fn attack_key_compromise_skipped_root(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let by = [&world.root[0], &world.root[1]];
    for skip in [2, 3, 100] {
        let later = TrustRoot {
            version: world.trust.version + skip,
            ..world.trust.clone()
        };
        bench.refused(world.trust.update(SealedRoot::of(&later, &by).signed()))?;
    }
    // In order they are taken.
    let next = bench.believed(
        world
            .trust
            .update(SealedRoot::of(&world.next(), &by).signed()),
    )?;
    let second = TrustRoot {
        version: next.version + 1,
        ..world.next()
    };
    bench.believed(next.update(SealedRoot::of(&second, &by).signed()))?;
    Ok(())
}
