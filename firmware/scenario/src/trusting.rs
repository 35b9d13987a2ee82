//! A trust root follows another, an offer and its manifest are believed under it, and none of them
//! with one bit flipped anywhere, for another device, too late, or again.

use core::fmt::Write;

use flywheel_shared::ids::DeviceId;
use flywheel_shared::trust::{
    Judge, KeyId, Manifest, Signed, SignedRoot, TrustError, TrustRoot, Verified, check_part,
};

use crate::Failure::{self, Broken};
use crate::cloud::signed_root;
use crate::vectors::{DEVICE, HARDWARE, MADE_MS, SEQUENCE, UNTIL_MS};
use crate::vectors::{GOLDEN, MANIFEST, OFFER, ROOT, ROOT2, SCORES};

/// One bit is flipped in every so many bytes.
const STRIDE: usize = 8;

/// Prints who is believed and who is refused with which number; returns the believed
/// manifest and the key that signed it.
#[inline(never)] // See `crate::run`.
pub(crate) fn run(out: &mut impl Write) -> Result<(Verified<Manifest<'static>>, KeyId), Failure> {
    let pinned = TrustRoot::pin(signed_root(ROOT)?)
        .map_err(|_| Broken("the first trust root is not believed"))?;
    let root = signed_root(ROOT2)?;
    let trust = pinned
        .update(root)
        .map_err(|_| Broken("the next trust root is not believed"))?;
    let device: DeviceId = DEVICE
        .parse()
        .map_err(|_| Broken("a device id is refused"))?;
    let other: DeviceId = "cam2"
        .parse()
        .map_err(|_| Broken("a device id is refused"))?;
    let judge = Judge {
        trust: &trust,
        device: &device,
        hardware: HARDWARE,
        floor: SEQUENCE - 1,
        now_ms: Some(MADE_MS),
    };
    let (offer, manifest) = (read(OFFER)?, read(MANIFEST)?);
    let believed = judge
        .offer(offer, manifest)
        .map_err(|_| Broken("a good offer is not believed"))?
        .manifest;
    writeln!(
        out,
        "trust: version {} believes {} {} with {} parts, {}",
        trust.version,
        believed.name,
        believed.sequence,
        believed.parts.len(),
        believed.digest()
    )?;

    let of_root = |body: &[u8]| pinned.update(SignedRoot { body, ..root }).err();
    let of_root_signatures =
        |signatures: &[u8]| pinned.update(SignedRoot { signatures, ..root }).err();
    let of_offer = |body: &[u8]| judge.offer(Signed { body, ..offer }, manifest).err();
    let of_offer_signature =
        |signature: &[u8]| judge.offer(Signed { signature, ..offer }, manifest).err();
    let of_manifest = |body: &[u8]| judge.offer(offer, Signed { body, ..manifest }).err();
    let of_manifest_signature = |signature: &[u8]| {
        judge
            .offer(
                offer,
                Signed {
                    signature,
                    ..manifest
                },
            )
            .err()
    };
    let [scores, golden] = believed.parts.as_slice() else {
        return Err(Broken("the manifest has other parts"));
    };
    let of_scores = |bytes: &[u8]| check_part(scores, bytes).err();
    let of_golden = |bytes: &[u8]| check_part(golden, bytes).err();
    let unsigned = &[TrustError::BadSignature];
    let other_bytes = &[TrustError::WrongDigest];
    let too_few = &[TrustError::Threshold];
    let damage: [Damage<'_>; 8] = [
        ("root body", root.body, &of_root, too_few),
        (
            "root signatures",
            root.signatures,
            &of_root_signatures,
            too_few,
        ),
        ("offer body", offer.body, &of_offer, unsigned),
        (
            "offer signature",
            offer.signature,
            &of_offer_signature,
            unsigned,
        ),
        ("manifest body", manifest.body, &of_manifest, unsigned),
        (
            "manifest signature",
            manifest.signature,
            &of_manifest_signature,
            unsigned,
        ),
        ("scores part", SCORES, &of_scores, other_bytes),
        ("golden part", GOLDEN, &of_golden, other_bytes),
    ];
    for case in damage {
        flipped(out, case)?;
    }

    let of = |judge: Judge<'_>| judge.offer(offer, manifest).err();
    let refusals = [
        (
            "a manifest as an offer",
            judge.offer(manifest, manifest).err(),
            TrustError::BadSignature,
        ),
        (
            "another device",
            of(Judge {
                device: &other,
                ..judge
            }),
            TrustError::WrongDevice,
        ),
        (
            "other hardware",
            of(Judge {
                hardware: "rp2350",
                ..judge
            }),
            TrustError::WrongHardware,
        ),
        (
            "a millisecond late",
            of(Judge {
                now_ms: Some(UNTIL_MS + 1),
                ..judge
            }),
            TrustError::Expired,
        ),
        (
            "without signed time",
            of(Judge {
                now_ms: None,
                ..judge
            }),
            TrustError::NoTime,
        ),
        (
            "under the first root",
            of(Judge {
                trust: &pinned,
                ..judge
            }),
            TrustError::BadSignature,
        ),
        (
            "the first root again",
            trust.update(signed_root(ROOT)?).err(),
            TrustError::OldRoot,
        ),
        (
            "the model it has",
            of(Judge {
                floor: SEQUENCE,
                ..judge
            }),
            TrustError::Rollback,
        ),
    ];
    for (name, error, expected) in refusals {
        if error != Some(expected) {
            return Err(Broken("a bad offer is not refused, or for another reason"));
        }
        let code = expected.code();
        writeln!(out, "trust: {name}: refused with {code}, {expected}")?;
    }
    Ok((believed, trust.release_id()))
}

fn read(bytes: &'static [u8]) -> Result<Signed<'static>, Failure> {
    match postcard::take_from_bytes(bytes) {
        Ok((signed, [])) => Ok(signed),
        _ => Err(Broken("a signed vector does not decode")),
    }
}

/// A name, intact bytes, why a copy of them is refused (`None`: it is not), and the possible
/// reasons.
type Damage<'a> = (
    &'a str,
    &'a [u8],
    &'a dyn Fn(&[u8]) -> Option<TrustError>,
    &'a [TrustError],
);

/// Flips bits, one at a time; every copy must be refused for one of the expected reasons, and the
/// intact bytes must not.
fn flipped(out: &mut impl Write, case: Damage<'_>) -> Result<(), Failure> {
    let (name, bytes, refused, expected) = case;
    if refused(bytes).is_some() {
        return Err(Broken("intact bytes are not believed"));
    }
    let mut buffer = [0u8; SCORES.len()];
    let copy = buffer
        .get_mut(..bytes.len())
        .ok_or(Broken("a vector is longer than its copy"))?;
    copy.copy_from_slice(bytes);
    let mut counts = [0u32; 2];
    for at in (0..copy.len()).step_by(STRIDE) {
        let bit = 1 << (at / STRIDE % 8);
        copy[at] ^= bit;
        let error = refused(copy).ok_or(Broken("a flipped bit is believed"))?;
        copy[at] ^= bit;
        let known = expected.iter().position(|&known| known == error);
        let count = known.and_then(|index| counts.get_mut(index));
        *count.ok_or(Broken("a flipped bit is refused for another reason"))? += 1;
    }
    for (error, count) in expected.iter().zip(counts) {
        writeln!(
            out,
            "trust: {name}: {count} flipped bits refused with {}, {error}",
            error.code()
        )?;
    }
    Ok(())
}
