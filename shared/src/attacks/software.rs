//! Attacks on who signed what for whom.

use super::{BODY, Bench, NOW_MS, Sealed, SealedRoot, Surprise, World, judged};
use crate::ids::Digest;
use crate::trust::{
    Manifest, Offer, PublicKey, Role, Signed, SignedRoot, TimeStamp, TrustError, check, verify,
};
use heapless::Vec;

/// Flips bits of bytes, one at a time, and hands each copy to `judge`.
fn flipped(
    bench: &mut Bench<'_>,
    bytes: &[u8],
    judge: impl Fn(&World, &[u8]) -> Result<(), TrustError>,
) -> Result<(), Surprise> {
    let mut copy: Vec<u8, BODY> = Vec::from_slice(bytes).unwrap_or_default();
    let world = bench.world;
    bench.believed(judge(world, &copy))?;
    for bit in bench.strided(copy.len() * 8) {
        copy[bit / 8] ^= 1 << (bit % 8);
        bench.refused(judge(world, &copy))?;
        copy[bit / 8] ^= 1 << (bit % 8);
    }
    Ok(())
}

/// Every bit of a manifest and of its signature.
pub fn attack_arbitrary_software_bits_of_a_manifest(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&manifest, super::SEQUENCE));
    let judge =
        |world: &World, signed: Signed<'_>| judged(world.judge().offer(offer.signed(), signed));
    flipped(bench, &manifest.body, |world, body| {
        let signature = &manifest.signature;
        judge(world, Signed { body, signature })
    })?;
    flipped(bench, &manifest.signature, |world, signature| {
        let body = &manifest.body;
        judge(world, Signed { body, signature })
    })
}

/// Every bit of an offer and of its signature.
pub fn attack_arbitrary_software_bits_of_an_offer(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&manifest, super::SEQUENCE));
    let judge =
        |world: &World, signed: Signed<'_>| judged(world.judge().offer(signed, manifest.signed()));
    flipped(bench, &offer.body, |world, body| {
        let signature = &offer.signature;
        judge(world, Signed { body, signature })
    })?;
    flipped(bench, &offer.signature, |world, signature| {
        let body = &offer.body;
        judge(world, Signed { body, signature })
    })
}

/// Every bit of a time stamp and of its signature.
pub fn attack_arbitrary_software_bits_of_a_time_stamp(
    bench: &mut Bench<'_>,
) -> Result<(), Surprise> {
    let stamp = bench.world.stamped(1, NOW_MS);
    let judge = |world: &World, signed: Signed<'_>| {
        verify::<TimeStamp>(Role::Time, &world.trust.rollout, signed).map(|_| ())
    };
    flipped(bench, &stamp.body, |world, body| {
        let signature = &stamp.signature;
        judge(world, Signed { body, signature })
    })?;
    flipped(bench, &stamp.signature, |world, signature| {
        let body = &stamp.body;
        judge(world, Signed { body, signature })
    })
}

/// Every bit of a trust root and of its signatures, where none is too many.
pub fn attack_arbitrary_software_bits_of_a_root(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let root = SealedRoot::of(&world.next(), &[&world.root[0], &world.root[1]]);
    let judge = |world: &World, signed: SignedRoot<'_>| world.trust.update(signed).map(|_| ());
    flipped(bench, &root.body, |world, body| {
        let signatures = &root.signatures;
        judge(world, SignedRoot { body, signatures })
    })?;
    flipped(bench, &root.signatures, |world, signatures| {
        let body = &root.body;
        judge(world, SignedRoot { body, signatures })
    })
}

/// Signatures of every other length.
pub fn attack_arbitrary_software_cut_signature(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let manifest = bench.world.released(&bench.world.manifest());
    let mut long = [0u8; 65];
    long[..64].copy_from_slice(&manifest.signature);
    for len in (0..64).chain([65]) {
        let signed = Signed {
            body: &manifest.body,
            signature: &long[..len],
        };
        let key = &bench.world.trust.release;
        bench.refused(verify::<Manifest<'_>>(Role::Release, key, signed))?;
    }
    Ok(())
}

/// The order of the group, little endian: s + L would verify as well as s without strict checks.
const ORDER: [u8; 32] = [
    0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
];

/// The second half of a signature by the release key of "any body" as a manifest, whose first half is
/// the identity: s = k·a satisfies s·B = R + k·A, and only strict checks refuse it.
const IDENTITY_S: [u8; 32] = [
    0x66, 0xd2, 0x17, 0x87, 0xde, 0xa6, 0x9c, 0x66, 0x77, 0x00, 0xdf, 0xca, 0xe9, 0x78, 0xfd, 0x39,
    0xb2, 0x49, 0xfd, 0xf3, 0x23, 0x4f, 0xaa, 0xb7, 0xdb, 0x64, 0xcd, 0xce, 0x5d, 0x46, 0xb8, 0x0f,
];

/// A second signature made from the first, and ones with a small point in place of R.
pub fn attack_arbitrary_software_malleable_signature(
    bench: &mut Bench<'_>,
) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let judge = |signature: &[u8; 64]| {
        let signed = Signed {
            body: &manifest.body,
            signature,
        };
        verify::<Manifest<'_>>(Role::Release, &world.trust.release, signed).map(|_| ())
    };
    let mut second = manifest.signature;
    for _ in 0..7 {
        let mut carry = 0u16;
        for (byte, order) in second[32..].iter_mut().zip(ORDER) {
            carry += u16::from(*byte) + u16::from(order);
            *byte = carry as u8;
            carry >>= 8;
        }
        bench.refused(judge(&second))?;
    }
    for point in SMALL {
        let mut small = manifest.signature;
        small[..32].copy_from_slice(&point);
        bench.refused(judge(&small))?;
    }
    let mut identity = [0u8; 64];
    identity[0] = 1;
    identity[32..].copy_from_slice(&IDENTITY_S);
    let digest = Digest::of(b"any body");
    let key = &world.trust.release;
    bench.refused(check(Role::Release, key, &digest, &identity))
}

/// The right body under a key that is not believed, and the right key's signature of another body.
pub fn attack_arbitrary_software_wrong_key(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let good = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&good, super::SEQUENCE));
    let root = &world.root[0];
    for key in [&world.stranger, &world.rollout, root] {
        let forged = Sealed::raw(Role::Release, key, &good.body);
        let verdict = world.judge().offer(offer.signed(), forged.signed());
        bench.refused(judged(verdict))?;
    }
    for key in [&world.stranger, &world.release, root] {
        let forged = Sealed::raw(Role::Rollout, key, &offer.body);
        let verdict = world.judge().offer(forged.signed(), good.signed());
        bench.refused(judged(verdict))?;
    }
    Ok(())
}

const fn point(first: u8, middle: u8, last: u8) -> PublicKey {
    let mut point = [middle; 32];
    point[0] = first;
    point[31] = last;
    point
}

const ORDER_8_A: PublicKey = [
    0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0,
    0xd5, 0xdf, 0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05,
];
const ORDER_8_B: PublicKey = [
    0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f,
    0x2a, 0x20, 0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
];

const fn negative(mut point: PublicKey) -> PublicKey {
    point[31] |= 0x80;
    point
}

/// The eight points of small order and every other spelling of them (Chalkias, Garillot, Nikolaenko,
/// "Taming the many EdDSAs", 2020, table 1).
pub const SMALL: [PublicKey; 14] = [
    // Orders 1, 2, 4, 4, 8, 8, 8, 8.
    point(0x01, 0x00, 0x00),
    point(0xec, 0xff, 0x7f),
    point(0x00, 0x00, 0x00),
    point(0x00, 0x00, 0x80),
    ORDER_8_A,
    negative(ORDER_8_A),
    ORDER_8_B,
    negative(ORDER_8_B),
    // x = 0 with a sign, and y not reduced.
    point(0x01, 0x00, 0x80),
    point(0xec, 0xff, 0xff),
    point(0xed, 0xff, 0x7f),
    point(0xed, 0xff, 0xff),
    point(0xee, 0xff, 0x7f),
    point(0xee, 0xff, 0xff),
];

/// Keys under which anybody can sign: as the key of a check, and named by a trust root.
pub fn attack_arbitrary_software_weak_key(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    // R = identity and s = 0 satisfies s·B = R + k·A for A of small order, for one k in eight.
    let mut forged = [0u8; 64];
    forged[0] = 1;
    for weak in SMALL {
        for message in 0..8u8 {
            let digest = Digest::of(&[message]);
            bench.refused(check(Role::Release, &weak, &digest, &forged))?;
        }
        let by = [&world.root[0], &world.root[1]];
        let release = crate::trust::TrustRoot {
            release: weak,
            ..world.next()
        };
        bench.refused(world.trust.update(SealedRoot::of(&release, &by).signed()))?;
        let mut root = world.next();
        root.root.keys[2] = weak;
        bench.refused(world.trust.update(SealedRoot::of(&root, &by).signed()))?;
    }
    Ok(())
}

/// Each body under each other role's prefix, with the key that is right for the place.
pub fn attack_cross_role_replay(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&manifest, super::SEQUENCE));
    let stamp = world.stamped(1, NOW_MS);
    let roles = [
        Role::Root,
        Role::Release,
        Role::Rollout,
        Role::Device,
        Role::Time,
    ];
    for role in roles {
        let as_manifest = Sealed::raw(role, &world.release, &manifest.body);
        let as_offer = Sealed::raw(role, &world.rollout, &offer.body);
        let as_time = Sealed::raw(role, &world.rollout, &stamp.body);
        if role != Role::Release {
            let verdict = world.judge().offer(offer.signed(), as_manifest.signed());
            bench.refused(judged(verdict))?;
        }
        if role != Role::Rollout {
            let verdict = world.judge().offer(as_offer.signed(), manifest.signed());
            bench.refused(judged(verdict))?;
        }
        if role != Role::Time {
            let key = &world.trust.rollout;
            bench.refused(verify::<TimeStamp>(Role::Time, key, as_time.signed()))?;
        }
        // No prefix begins another, whatever follows it.
        for other in roles.into_iter().filter(|other| *other != role) {
            if role.domain() == other.domain() {
                return Err(bench.surprise(None));
            }
        }
    }
    // Genuine messages in each other's place.
    bench.refused(judged(
        world.judge().offer(manifest.signed(), manifest.signed()),
    ))?;
    bench.refused(judged(
        world.judge().offer(stamp.signed(), manifest.signed()),
    ))?;
    bench.refused(judged(world.judge().offer(offer.signed(), offer.signed())))?;
    let key = &world.trust.rollout;
    bench.refused(verify::<TimeStamp>(Role::Time, key, offer.signed()))
}

/// A genuine offer, and a genuine time stamp, to another device.
pub fn attack_wrong_device(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let offer = world.offered(&Offer {
        device: world.other.clone(),
        ..world.offer(&manifest, super::SEQUENCE)
    });
    bench.refused(judged(
        world.judge().offer(offer.signed(), manifest.signed()),
    ))?;
    let stamp = world.stamped(1, NOW_MS);
    let mut keeper = crate::trust::Timekeeper::default();
    bench.refused(keeper.answer(&world.trust, &world.other, 1, stamp.signed(), 0))
}

/// A genuine offer with the genuine manifest of another model, or another release of it.
pub fn attack_wrong_model(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&manifest, super::SEQUENCE));
    let others = [
        Manifest {
            name: "rails",
            ..world.manifest()
        },
        Manifest {
            sequence: super::SEQUENCE + 1,
            ..world.manifest()
        },
    ];
    for other in others {
        let other = world.released(&other);
        bench.refused(judged(world.judge().offer(offer.signed(), other.signed())))?;
    }
    let other = world.offered(&world.offer(&manifest, super::SEQUENCE + 1));
    bench.refused(judged(
        world.judge().offer(other.signed(), manifest.signed()),
    ))
}

/// A model for other hardware, and names that only look alike.
pub fn attack_wrong_hardware(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    for hardware in ["rp2350", "", "m", "m77", "M7", "m7 ", "ANY"] {
        let other = Manifest {
            hardware,
            ..world.manifest()
        };
        bench.refused(world.take(&other))?;
    }
    let any = Manifest {
        hardware: crate::trust::ANY_HARDWARE,
        ..world.manifest()
    };
    bench.believed(world.take(&any))
}

/// A model for another runtime.
pub fn attack_wrong_abi(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    for abi in [0, crate::trust::RUNTIME_ABI + 1, u16::MAX] {
        let other = Manifest {
            abi,
            ..world.manifest()
        };
        bench.refused(world.take(&other))?;
    }
    Ok(())
}
