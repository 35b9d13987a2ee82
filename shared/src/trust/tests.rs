//! Attacks on the verifier; each names the error that a device would report.

extern crate std;
use std::vec::Vec as StdVec;

use super::*;

struct World {
    release: SigningKey,
    rollout: SigningKey,
    trust: TrustRoot,
    device: DeviceId,
}

fn world() -> World {
    let root = SigningKey::from_bytes(&[1; 32]);
    let release = SigningKey::from_bytes(&[2; 32]);
    let rollout = SigningKey::from_bytes(&[3; 32]);
    let trust = TrustRoot {
        version: 1,
        root: root.verifying_key().to_bytes(),
        release: release.verifying_key().to_bytes(),
        rollout: rollout.verifying_key().to_bytes(),
    };
    World {
        release,
        rollout,
        trust,
        device: "cam1".parse().unwrap(),
    }
}

fn manifest() -> Manifest<'static> {
    let mut parts = Vec::new();
    parts
        .push(Part {
            kind: PartKind::Onnx,
            len: 3,
            digest: Digest::of(b"abc"),
        })
        .unwrap();
    Manifest {
        name: "roads",
        sequence: 5,
        hardware: ANY_HARDWARE,
        abi: RUNTIME_ABI,
        created_ms: 1_000,
        expires_ms: 10_000,
        trial: TrialBounds {
            frames: 10,
            max_latency_us: 0,
            min_confidence: 0.0,
        },
        parts,
    }
}

fn bytes<T: Serialize>(value: &T) -> StdVec<u8> {
    let mut buffer = [0u8; MAX_BODY];
    postcard::to_slice(value, &mut buffer).unwrap().to_vec()
}

impl World {
    fn offer_for(&self, manifest_body: &[u8], sequence: u64) -> Offer {
        Offer {
            device: self.device.clone(),
            manifest: Digest::of(manifest_body),
            sequence,
            expires_ms: 9_000,
            nonce: 7,
        }
    }

    /// Judges a manifest and the offer made from it, after `spoil` had its way with the offer.
    fn judge(
        &self,
        manifest: &Manifest<'_>,
        spoil: impl FnOnce(&mut Offer),
        now_ms: u64,
        floor: u64,
    ) -> Result<Digest, TrustError> {
        let manifest_body = bytes(manifest);
        let manifest_signature = sign(Role::Release, &self.release, &manifest_body);
        let mut offer = self.offer_for(&manifest_body, manifest.sequence);
        spoil(&mut offer);
        let offer_body = bytes(&offer);
        let offer_signature = sign(Role::Rollout, &self.rollout, &offer_body);
        let judge = Judge {
            trust: &self.trust,
            device: &self.device,
            hardware: "pi5",
            floor,
            now_ms,
        };
        judge
            .offer(
                Signed {
                    body: &offer_body,
                    signature: &offer_signature,
                },
                Signed {
                    body: &manifest_body,
                    signature: &manifest_signature,
                },
            )
            .map(|verified| verified.digest())
    }
}

#[test]
fn a_good_offer_is_taken() {
    let world = world();
    let manifest = manifest();
    assert_eq!(
        world.judge(&manifest, |_| (), 5_000, 4),
        Ok(Digest::of(&bytes(&manifest)))
    );
}

#[test]
fn attack_arbitrary_software_every_bit() {
    let world = world();
    let body = bytes(&manifest());
    let signature = sign(Role::Release, &world.release, &body);
    let verify_manifest = |body: &[u8], signature: &[u8]| {
        verify::<Manifest<'_>>(
            Role::Release,
            &world.trust.release,
            Signed { body, signature },
        )
        .map(|_| ())
    };
    assert_eq!(verify_manifest(&body, &signature), Ok(()));
    for bit in 0..body.len() * 8 {
        let mut spoiled = body.clone();
        spoiled[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(
            verify_manifest(&spoiled, &signature),
            Err(TrustError::BadSignature)
        );
    }
    for bit in 0..64 * 8 {
        let mut spoiled = signature;
        spoiled[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(
            verify_manifest(&body, &spoiled),
            Err(TrustError::BadSignature)
        );
    }
    assert_eq!(
        verify_manifest(&body, &signature[..63]),
        Err(TrustError::BadSignature)
    );
}

#[test]
fn attack_weak_key() {
    // The identity point: any signature with R = identity and s = 0 would "verify" under it.
    let mut weak = [0u8; 32];
    weak[0] = 1;
    let mut signature = [0u8; 64];
    signature[0] = 1;
    assert_eq!(
        check(Role::Release, &weak, &Digest::of(b"x"), &signature),
        Err(TrustError::BadKey)
    );
}

#[test]
fn attack_cross_role_replay() {
    let world = world();
    let body = bytes(&manifest());
    for (role, expected) in [
        (Role::Release, Ok(())),
        (Role::Rollout, Err(TrustError::BadSignature)),
        (Role::Root, Err(TrustError::BadSignature)),
        (Role::Device, Err(TrustError::BadSignature)),
    ] {
        let signature = sign(role, &world.release, &body);
        let got = verify::<Manifest<'_>>(
            Role::Release,
            &world.trust.release,
            Signed {
                body: &body,
                signature: &signature,
            },
        );
        assert_eq!(got.map(|_| ()), expected, "{role:?}");
    }
}

#[test]
fn attack_wrong_device_hardware_and_abi() {
    let world = world();
    assert_eq!(
        world.judge(
            &manifest(),
            |offer| offer.device = "cam2".parse().unwrap(),
            5_000,
            4
        ),
        Err(TrustError::WrongDevice)
    );
    let other = Manifest {
        hardware: "jetson",
        ..manifest()
    };
    assert_eq!(
        world.judge(&other, |_| (), 5_000, 4),
        Err(TrustError::WrongHardware)
    );
    let other = Manifest {
        abi: RUNTIME_ABI + 1,
        ..manifest()
    };
    assert_eq!(
        world.judge(&other, |_| (), 5_000, 4),
        Err(TrustError::WrongAbi)
    );
}

#[test]
fn attack_rollback_and_freeze() {
    let world = world();
    assert_eq!(
        world.judge(&manifest(), |_| (), 5_000, 5),
        Err(TrustError::Rollback)
    );
    assert_eq!(
        world.judge(&manifest(), |_| (), 9_001, 4),
        Err(TrustError::Expired)
    );
    assert_eq!(
        world.judge(&manifest(), |offer| offer.expires_ms = 99_000, 10_001, 4),
        Err(TrustError::Expired)
    );
}

#[test]
fn attack_mix_and_match() {
    let world = world();
    assert_eq!(
        world.judge(
            &manifest(),
            |offer| offer.manifest = Digest::of(b"other"),
            5_000,
            4
        ),
        Err(TrustError::WrongManifest)
    );
    assert_eq!(
        world.judge(&manifest(), |offer| offer.sequence = 6, 5_000, 4),
        Err(TrustError::WrongManifest)
    );
    let part = manifest().parts[0];
    assert_eq!(check_part(&part, b"abc"), Ok(()));
    assert_eq!(check_part(&part, b"abd"), Err(TrustError::WrongDigest));
    assert_eq!(check_part(&part, b"abcd"), Err(TrustError::WrongDigest));
}

#[test]
fn attack_parser_abuse() {
    let world = world();
    let good = bytes(&manifest());
    let judge = |body: &[u8]| {
        let signature = sign(Role::Release, &world.release, body);
        verify::<Manifest<'_>>(
            Role::Release,
            &world.trust.release,
            Signed {
                body,
                signature: &signature,
            },
        )
        .map(|_| ())
    };
    let mut trailing = good.clone();
    trailing.push(0);
    assert_eq!(judge(&trailing), Err(TrustError::Malformed));
    for cut in 0..good.len() {
        assert_eq!(judge(&good[..cut]), Err(TrustError::Malformed), "{cut}");
    }
    // "roads" has length 5, which may also be spelled 0x85 0x00.
    let mut long = StdVec::from([0x85, 0x00]);
    long.extend_from_slice(&good[1..]);
    assert_eq!(judge(&long), Err(TrustError::NotCanonical));
    assert_eq!(judge(&[0; MAX_BODY + 1]), Err(TrustError::TooLarge));
}

#[test]
fn the_trust_root_signs_itself() {
    let root = SigningKey::from_bytes(&[1; 32]);
    let body = bytes(&world().trust);
    let signature = sign(Role::Root, &root, &body);
    let signed = Signed {
        body: &body,
        signature: &signature,
    };
    assert_eq!(verify_root(signed).unwrap().version, 1);
    let stranger = sign(Role::Root, &SigningKey::from_bytes(&[9; 32]), &body);
    assert_eq!(
        verify_root(Signed {
            signature: &stranger,
            ..signed
        }),
        Err(TrustError::BadSignature)
    );
}

#[test]
fn a_batch_is_bound_to_device_epoch_and_count() {
    let key = SigningKey::from_bytes(&[4; 32]);
    let public = key.verifying_key().to_bytes();
    let device: DeviceId = "cam1".parse().unwrap();
    let signature = sign_digest(Role::Device, &key, &batch_digest(&device, 1, 2, b"xy"));
    let verdict = |device: &DeviceId, epoch, count, records: &[u8]| -> Result<(), TrustError> {
        check(
            Role::Device,
            &public,
            &batch_digest(device, epoch, count, records),
            &signature,
        )
    };
    assert_eq!(verdict(&device, 1, 2, b"xy"), Ok(()));
    for spoiled in [
        verdict(&"cam2".parse().unwrap(), 1, 2, b"xy"),
        verdict(&device, 2, 2, b"xy"),
        verdict(&device, 1, 3, b"xy"),
        verdict(&device, 1, 2, b"xz"),
    ] {
        assert_eq!(spoiled, Err(TrustError::BadSignature));
    }
}
