//! Packages that are cut, damaged or signed by somebody else.

use ed25519_dalek::SigningKey;
use flywheel_shared::trust::{ANY_HARDWARE, RUNTIME_ABI, sign};

use super::*;

struct Cloud {
    trust: TrustRoot,
    manifest: Vec<u8>,
    signature: [u8; 64],
    parts: Vec<(PartKind, Vec<u8>)>,
}

fn cloud() -> Cloud {
    let key = SigningKey::from_bytes(&[5; 32]);
    let parts = vec![
        (
            PartKind::Onnx,
            (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect(),
        ),
        (PartKind::Spec, b"spec".to_vec()),
        (PartKind::Scores, Vec::new()),
        (PartKind::Golden, vec![9; 70_000]),
    ];
    let manifest = wire::bytes(&Manifest {
        name: "test",
        sequence: 3,
        hardware: ANY_HARDWARE,
        abi: RUNTIME_ABI,
        created_ms: 0,
        expires_ms: u64::MAX,
        trial: TrialBounds {
            frames: 1,
            max_latency_us: 0,
            min_confidence: 0.0,
        },
        parts: parts
            .iter()
            .map(|(kind, bytes): &(PartKind, Vec<u8>)| Part {
                kind: *kind,
                len: bytes.len() as u32,
                digest: Digest::of(bytes),
            })
            .collect(),
        deltas: heapless::Vec::new(),
    });
    Cloud {
        trust: TrustRoot {
            release: key.verifying_key().to_bytes(),
            ..TrustRoot::default()
        },
        signature: sign(Role::Release, &key, &manifest),
        manifest,
        parts,
    }
}

impl Cloud {
    fn signed(&self) -> Signed<'_> {
        Signed {
            body: &self.manifest,
            signature: &self.signature,
        }
    }

    fn answer(&self, fetch: &Fetch) -> Vec<u8> {
        let part = self
            .parts
            .iter()
            .find(|(_, bytes)| Digest::of(bytes) == fetch.digest)
            .unwrap();
        let start = fetch.offset as usize;
        part.1[start..start + fetch.len as usize].to_vec()
    }
}

fn give(fetching: &mut Fetching, fetch: &Fetch, bytes: &[u8]) -> Result<bool, PackageError> {
    fetching.chunk(&Chunk {
        digest: fetch.digest,
        offset: fetch.offset,
        bytes,
    })
}

/// Answers requests until the package is complete; returns the bytes that were transferred.
fn complete(cloud: &Cloud, fetching: &mut Fetching) -> usize {
    let mut moved = 0;
    while !fetching.is_complete() {
        let requests = fetching.requests();
        assert!(!requests.is_empty() && requests.len() <= 4);
        for fetch in requests {
            let bytes = cloud.answer(&fetch);
            moved += bytes.len();
            assert!(give(fetching, &fetch, &bytes).unwrap());
        }
    }
    moved
}

#[test]
fn a_fetch_resumes_where_it_was_cut() {
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let packages = Packages::open(folder.path()).unwrap();
    let digest = packages.admit(cloud.signed()).unwrap();
    let mut fetching = packages.fetch(&digest).unwrap();
    let first = fetching.requests();
    assert_eq!(first.len(), 4);
    for fetch in &first[..2] {
        assert!(give(&mut fetching, fetch, &cloud.answer(fetch)).unwrap());
    }
    // Answers that are repeated, out of order or of another part are not taken.
    assert!(!give(&mut fetching, &first[0], &cloud.answer(&first[0])).unwrap());
    assert!(!give(&mut fetching, &first[3], &cloud.answer(&first[3])).unwrap());
    drop(fetching);

    let mut fetching = packages.fetch(&digest).unwrap();
    let moved = complete(&cloud, &mut fetching);
    let whole: usize = cloud.parts.iter().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!(moved, whole - 2 * MAX_CHUNK);
    let package = packages.read(&digest).unwrap();
    for (kind, bytes) in &cloud.parts {
        assert_eq!(package.part(*kind), bytes.as_slice());
    }
    assert!(packages.fetch(&digest).unwrap().is_complete());
}

#[test]
fn lost_answers_are_asked_for_again() {
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let packages = Packages::open(folder.path()).unwrap();
    let digest = packages.admit(cloud.signed()).unwrap();
    let mut fetching = packages.fetch(&digest).unwrap();
    let first = fetching.requests();
    assert!(fetching.requests().is_empty());
    fetching.ask_again();
    assert_eq!(fetching.requests(), first);
    fetching.ask_again();
    complete(&cloud, &mut fetching);
}

#[test]
fn rubbish_in_a_partial_file_is_noticed_and_fetched_again() {
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let packages = Packages::open(folder.path()).unwrap();
    let digest = packages.admit(cloud.signed()).unwrap();
    let partial = folder
        .path()
        .join(digest.to_string())
        .join("model.onnx.partial");
    fs::write(&partial, vec![0; 100_000]).unwrap();
    let mut fetching = packages.fetch(&digest).unwrap();
    complete(&cloud, &mut fetching);
    assert!(packages.read(&digest).is_ok());
}

#[test]
fn a_server_that_sends_other_bytes_is_given_up() {
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let packages = Packages::open(folder.path()).unwrap();
    let digest = packages.admit(cloud.signed()).unwrap();
    let mut fetching = packages.fetch(&digest).unwrap();
    let error = loop {
        let fetch = fetching.requests()[0];
        match give(&mut fetching, &fetch, &vec![1; fetch.len as usize]) {
            Ok(_) => fetching.ask_again(),
            Err(error) => break error,
        }
    };
    assert_eq!(error.trust(), Some(TrustError::WrongDigest));
}

#[test]
fn one_flipped_byte_anywhere_is_refused_when_read() {
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let packages = Packages::open(folder.path()).unwrap();
    let digest = packages.admit(cloud.signed()).unwrap();
    complete(&cloud, &mut packages.fetch(&digest).unwrap());
    let home = folder.path().join(digest.to_string());
    for name in ["manifest.bin", "model.onnx", "spec.bin", "golden.bin"] {
        let path = home.join(name);
        let good = fs::read(&path).unwrap();
        // The digest names the manifest's body; the signature behind it was checked when it came.
        let end = match name {
            "manifest.bin" => good.len() - 65,
            _ => good.len(),
        };
        for at in [0, end / 2, end - 1] {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            fs::write(&path, &bad).unwrap();
            let error = packages.read(&digest).unwrap_err();
            assert!(error.trust().is_some(), "{name} at {at}: {error}");
            assert!(error.to_string().contains(name), "{error}");
        }
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert!(packages.read(&digest).is_err());
        fs::write(&path, &good).unwrap();
    }
    assert!(packages.read(&digest).is_ok());
    // Signed by somebody else.
    let mut stranger = cloud.trust.clone();
    stranger.release = SigningKey::from_bytes(&[6; 32]).verifying_key().to_bytes();
    assert!(packages.signed(&stranger, &digest).is_err());
    assert!(packages.signed(&cloud.trust, &digest).is_ok());
}

#[test]
fn only_wanted_packages_are_kept() {
    let cloud = cloud();
    let folder = tempfile::tempdir().unwrap();
    let packages = Packages::open(folder.path()).unwrap();
    let digest = packages.admit(cloud.signed()).unwrap();
    packages.keep_only(&[digest]).unwrap();
    assert!(packages.fetch(&digest).is_ok());
    packages.keep_only(&[]).unwrap();
    assert!(packages.fetch(&digest).is_err());
    assert!(packages.remove(&digest).is_ok());
}
