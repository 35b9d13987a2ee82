//! The bytes as `TRUST.md` describes them, and batches.

extern crate std;
use std::vec::Vec as StdVec;

use ed25519_dalek::SigningKey;
use heapless::Vec;

use super::*;
use crate::attacks::encode;
use crate::ids::{DeviceId, Digest};

/// Pieces one after the other.
fn join(pieces: &[&[u8]]) -> StdVec<u8> {
    pieces.concat()
}

#[test]
fn a_root_has_the_documented_layout() {
    let mut keys = Vec::new();
    keys.extend_from_slice(&[[1; 32], [2; 32]]).unwrap();
    let root = TrustRoot {
        version: 300,
        issued_ms: 1,
        expires_ms: 128,
        root: Keys { threshold: 2, keys },
        release: [3; 32],
        rollout: [4; 32],
        min_sequence: 7,
    };
    let expected = join(&[
        &[0xac, 0x02, 1, 0x80, 0x01, 2, 2],
        &[1; 32],
        &[2; 32],
        &[3; 32],
        &[4; 32],
        &[7],
    ]);
    assert_eq!(encode(&root)[..], expected);
    let signed = SignedRoot {
        body: b"body",
        signatures: &[9; 96],
    };
    assert_eq!(encode(&signed)[..], join(&[&[4], b"body", &[96], &[9; 96]]));
    assert_eq!(signed.pairs().count(), 1);
}

#[test]
fn a_manifest_has_the_documented_layout() {
    let mut manifest = Manifest {
        name: "roads",
        sequence: 300,
        hardware: "m7",
        abi: 1,
        created_ms: 2,
        expires_ms: 3,
        trial: TrialBounds {
            frames: 60,
            max_latency_us: 200,
            min_confidence: 0.5,
        },
        parts: Vec::new(),
        deltas: Vec::new(),
    };
    let part = Part {
        kind: PartKind::Spec,
        len: 5,
        digest: Digest([6; 32]),
    };
    manifest.parts.push(part).unwrap();
    let delta = Delta {
        part: PartKind::Spec,
        base: Digest([7; 32]),
        codec: 8,
        len: 4,
        digest: Digest([9; 32]),
    };
    manifest.deltas.push(delta).unwrap();
    let expected = join(&[
        &[5],
        b"roads",
        &[0xac, 0x02, 2],
        b"m7",
        &[1, 2, 3, 60, 0xc8, 0x01],
        &0.5f32.to_le_bytes(),
        &[1, 2, 5],
        &[6; 32],
        &[1, 2],
        &[7; 32],
        &[8, 4],
        &[9; 32],
    ]);
    assert_eq!(encode(&manifest)[..], expected);
}

#[test]
fn an_offer_and_a_time_stamp_have_the_documented_layout() {
    let device: DeviceId = "cam1".parse().unwrap();
    let offer = Offer {
        device: device.clone(),
        manifest: Digest([5; 32]),
        sequence: 1,
        issued_ms: 2,
        expires_ms: 300,
        nonce: 3,
    };
    let expected = join(&[&[4], b"cam1", &[5; 32], &[1, 2, 0xac, 0x02, 3]]);
    assert_eq!(encode(&offer)[..], expected);
    let stamp = TimeStamp {
        device,
        nonce: 9,
        now_ms: 300,
    };
    assert_eq!(encode(&stamp)[..], join(&[&[4], b"cam1", &[9, 0xac, 0x02]]));
}

#[test]
fn a_signature_covers_the_domain_and_the_digest() {
    use ed25519_dalek::Signer;
    let key = SigningKey::from_bytes(&[4; 32]);
    for (role, domain) in [
        (Role::Root, "flywheel/root/v2"),
        (Role::Release, "flywheel/manifest/v2"),
        (Role::Rollout, "flywheel/offer/v2"),
        (Role::Time, "flywheel/time/v1"),
        (Role::Device, "flywheel/batch/v1"),
    ] {
        let mut seen = domain.as_bytes().to_vec();
        seen.resize(24, 0);
        seen.extend_from_slice(&Digest::of(b"body").0);
        assert_eq!(sign(role, &key, b"body"), key.sign(&seen).to_bytes());
    }
}

#[test]
fn the_largest_root_and_manifest_keep_to_their_caps() {
    let mut keys = Vec::new();
    keys.extend_from_slice(&[[255; 32]; MAX_ROOT_KEYS]).unwrap();
    let root = TrustRoot {
        version: u32::MAX,
        issued_ms: u64::MAX,
        expires_ms: u64::MAX,
        root: Keys {
            threshold: 255,
            keys,
        },
        release: [255; 32],
        rollout: [255; 32],
        min_sequence: u64::MAX,
    };
    let len = encode(&root).len();
    assert!(len > 0 && len <= MAX_ROOT, "{len}");
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
