//! Attacks on what belongs together and on the bytes themselves.

use super::{
    BASE, BODY, Bench, DELTA, PARTS, SEQUENCE, Sealed, SealedRoot, Surprise, judged, part,
};
use crate::ids::Digest;
use crate::trust::{
    Delta, Intake, MAX_BODY, MAX_ROOT, Manifest, PartKind, Role, Signed, SignedRoot, TimeStamp,
    TrustError, TrustRoot, check_base, check_part, verify,
};
use heapless::Vec;

/// Longer than any body may be.
static LONG: [u8; MAX_BODY + 1] = [0; MAX_BODY + 1];

/// Each part in each other's place, and parts of another release.
pub fn attack_mix_and_match(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let manifest = bench.world.manifest();
    for listed in &manifest.parts {
        for (kind, bytes) in PARTS {
            if kind == listed.kind {
                bench.believed(check_part(listed, bytes))?;
                let mut other: Vec<u8, BODY> = Vec::from_slice(bytes).unwrap_or_default();
                if let Some(last) = other.last_mut() {
                    *last ^= 1;
                }
                bench.refused(check_part(listed, &other))?;
            } else if bytes.len() != listed.len as usize {
                let length = if bytes.len() > listed.len as usize {
                    TrustError::TooLong
                } else {
                    TrustError::Incomplete
                };
                bench.refused_as(length, check_part(listed, bytes))?;
            }
        }
    }
    // A manifest that swaps two digests is another one: the offer does not fit it.
    let world = bench.world;
    let good = world.released(&manifest);
    let offer = world.offered(&world.offer(&good, SEQUENCE));
    let mut swapped = world.manifest();
    let first = swapped.parts[0].digest;
    swapped.parts[0].digest = swapped.parts[1].digest;
    swapped.parts[1].digest = first;
    let sealed = world.released(&swapped);
    bench.refused_as(
        TrustError::WrongManifest,
        judged(world.judge().offer(offer.signed(), sealed.signed())),
    )?;
    // What was stored under one digest is not another manifest.
    let digest = Digest::of(&good.body);
    bench.believed(Manifest::recall(&digest, &good.body))?;
    bench.refused_as(
        TrustError::WrongManifest,
        Manifest::recall(&digest, &sealed.body),
    )
}

/// Manifests that the release key signed and that contradict themselves.
pub fn attack_mix_and_match_inconsistent(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let mut twice = world.manifest();
    let _ = twice.parts.push(part(PartKind::Spec, b"other labels"));
    bench.refused(world.take(&twice))?;
    let mut vain = world.manifest();
    vain.deltas[0].part = PartKind::BurnRecord;
    bench.refused(world.take(&vain))?;
    let mut longer = world.manifest();
    longer.deltas[0].len = longer.parts[0].len + 1;
    bench.refused(world.take(&longer))
}

/// Packages of which something is missing.
pub fn attack_partial_bundle(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let manifest = bench.world.manifest();
    for present in 0..(1u32 << PARTS.len()) {
        let have = |wanted: &crate::trust::Part| {
            let at = PARTS.iter().position(|(kind, _)| *kind == wanted.kind);
            at.is_some_and(|at| present >> at & 1 == 1)
        };
        let whole = present + 1 == 1 << PARTS.len();
        if whole {
            bench.believed(manifest.complete(have))?;
        } else {
            bench.refused(manifest.complete(have))?;
        }
    }
    for listed in &manifest.parts {
        for (_, bytes) in PARTS.iter().filter(|(kind, _)| *kind == listed.kind) {
            for len in 0..bytes.len() {
                bench.refused(check_part(listed, &bytes[..len]))?;
            }
        }
    }
    Ok(())
}

/// A stream that does not end.
pub fn attack_endless_data(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let manifest = bench.world.manifest();
    for (listed, (_, bytes)) in manifest.parts.iter().zip(PARTS) {
        for piece in 1..=bytes.len() {
            let mut intake = Intake::part(listed);
            for chunk in bytes.chunks(piece) {
                bench.believed(intake.take(chunk))?;
            }
            bench.refused(intake.take(b"!"))?;
            // Refused bytes leave no trace.
            bench.believed(intake.finish())?;
        }
        bench.refused(check_part(listed, &LONG))?;
    }
    let mut intake = Intake::delta(&manifest.deltas[0]);
    bench.believed(intake.take(DELTA))?;
    bench.refused(intake.take(&LONG[..1]))
}

/// Signed metadata beyond its cap, refused unread: nothing in it was signed.
pub fn attack_endless_metadata(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let signed = Signed {
        body: &LONG,
        signature: &[0; 64],
    };
    let good = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&good, SEQUENCE));
    bench.refused(judged(world.judge().offer(signed, good.signed())))?;
    bench.refused(judged(world.judge().offer(offer.signed(), signed)))?;
    bench.refused(verify::<TimeStamp>(
        Role::Time,
        &world.trust.rollout,
        signed,
    ))?;
    bench.refused(Manifest::recall(&Digest::of(&LONG), &LONG))?;
    let root = SealedRoot::of(&world.next(), &[&world.root[0]; 11]);
    let long_root = SignedRoot {
        body: &LONG[..=MAX_ROOT],
        signatures: &root.signatures[..96],
    };
    for signed in [root.signed(), long_root] {
        bench.refused(world.trust.update(signed))?;
        bench.refused(TrustRoot::pin(signed))?;
    }
    Ok(())
}

/// A mirror that serves other bytes of the right length.
pub fn attack_malicious_mirror(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let manifest = bench.world.manifest();
    for (listed, (_, bytes)) in manifest.parts.iter().zip(PARTS) {
        let mut copy: Vec<u8, BODY> = Vec::from_slice(bytes).unwrap_or_default();
        for bit in bench.strided(copy.len() * 8) {
            copy[bit / 8] ^= 1 << (bit % 8);
            bench.refused(check_part(listed, &copy))?;
            copy[bit / 8] ^= 1 << (bit % 8);
        }
        bench.refused(check_part(listed, &LONG[..bytes.len()]))?;
    }
    Ok(())
}

/// Files beside those that the manifest lists.
pub fn attack_extra_files(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let manifest = bench.world.manifest();
    for kind in [PartKind::BurnRecord, PartKind::Scores] {
        bench.refused(manifest.listed(kind))?;
    }
    for (kind, _) in PARTS {
        bench.believed(manifest.listed(kind))?;
    }
    let nothing = Manifest {
        parts: Vec::new(),
        deltas: Vec::new(),
        ..bench.world.manifest()
    };
    for (kind, _) in PARTS {
        bench.refused(nothing.listed(kind))?;
    }
    Ok(())
}

/// A delta against something else, other delta bytes, and an output that is not the part.
pub fn attack_wrong_delta_base(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.manifest();
    let base = Digest::of(BASE);
    let delta: Delta = *bench.believed(manifest.delta(PartKind::Onnx, &base))?;
    bench.believed(check_base(&delta, BASE))?;
    for other in [&b""[..], b"weights of release 298", &BASE[1..], DELTA] {
        bench.refused(manifest.delta(PartKind::Onnx, &Digest::of(other)))?;
        bench.refused(check_base(&delta, other))?;
    }
    // The right base for another part.
    bench.refused(manifest.delta(PartKind::Spec, &base))?;
    let mut intake = Intake::delta(&delta);
    bench.believed(intake.take(b"9->301"))?;
    bench.refused_as(TrustError::WrongDigest, intake.finish())?;
    let output = bench.believed(manifest.listed(PartKind::Onnx))?;
    let wrong = check_part(output, b"weights of release 301");
    bench.refused_as(TrustError::WrongDigest, wrong)?;
    // A delta that a mirror adds is under no signature.
    let mut added = world.manifest();
    added.deltas[0].base = Digest::of(b"any");
    let good = world.released(&manifest);
    let forged = Sealed {
        body: world.released(&added).body,
        ..good.clone()
    };
    let offer = world.offered(&world.offer(&good, SEQUENCE));
    bench.refused_as(
        TrustError::BadSignature,
        judged(world.judge().offer(offer.signed(), forged.signed())),
    )
}

/// The bytes change between two reads: what is hashed is what is loaded, piece by piece.
pub fn attack_swap_after_check(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let manifest = bench.world.manifest();
    for (listed, (_, bytes)) in manifest.parts.iter().zip(PARTS) {
        for at in 0..bytes.len() {
            let mut intake = Intake::part(listed);
            bench.believed(intake.take(&bytes[..at]))?;
            bench.believed(intake.take(&LONG[..bytes.len() - at]))?;
            bench.refused(intake.finish())?;
        }
    }
    Ok(())
}
