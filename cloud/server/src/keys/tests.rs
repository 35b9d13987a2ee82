use super::*;

fn plan(roots: Option<(u8, u8)>) -> Plan {
    Plan {
        now_ms: 1_000,
        days: 10,
        roots,
        min_sequence: None,
    }
}

/// A key folder, and the keys taken out of it.
struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    fn new(roots: Option<(u8, u8)>) -> (Self, Trust) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Self { dir };
        let trust = init(&folder.keys(), &plan(roots)).unwrap();
        (folder, trust)
    }

    fn keys(&self) -> PathBuf {
        self.dir.path().join("keys")
    }

    /// Takes a key to another place, as people do.
    fn take(&self, name: &str) -> PathBuf {
        let away = self.dir.path().join(name);
        fs::rename(self.keys().join(name), &away).unwrap();
        away
    }
}

fn signed(outcome: Outcome) -> Trust {
    match outcome {
        Outcome::Signed(trust) => *trust,
        partial => panic!("not signed: {partial:?}"),
    }
}

#[test]
fn keys_are_made_once_and_private() {
    let (folder, trust) = Folder::new(None);
    let keys = folder.keys();
    let again = init(&keys, &plan(None)).unwrap_err().to_string();
    assert!(again.contains("exists"), "{again}");
    assert_eq!(read_trust(&keys).unwrap(), trust);
    assert_eq!(trust.root.expires_ms, 1_000 + 10 * 24 * 3600 * 1000);
    assert_eq!(secrets(&keys).unwrap().len(), 3);
    let release = find(&keys, "release", &trust.root.release).unwrap();
    assert_eq!(release.verifying_key().to_bytes(), trust.root.release);
    let unknown = find(&keys, "release", &[7; 32]).err().unwrap().to_string();
    assert!(unknown.contains("0707"), "{unknown}");

    let path = keys.join("release.key");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let open = read(&path).unwrap_err().to_string();
    assert!(open.contains("chmod 600"), "{open}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, "abc\n").unwrap();
    let short = read(&path).unwrap_err().to_string();
    assert!(short.contains("64 hexadecimal digits"), "{short}");
}

#[test]
fn a_damaged_trust_root_is_named() {
    let (folder, _) = Folder::new(None);
    let path = folder.keys().join(TRUST_FILE);
    let mut bytes = fs::read(&path).unwrap();
    bytes[10] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = format!("{:#}", read_trust(&folder.keys()).unwrap_err());
    assert!(error.contains("trust.bin"), "{error}");
}

#[test]
fn a_rotation_adds_files_and_follows_what_was() {
    let (folder, first) = Folder::new(None);
    let keys = folder.keys();
    let mut before = first.clone();
    for (change, file) in [
        (Change::Release, Some("release.2.key")),
        (Change::Rollout, Some("rollout.3.key")),
        (Change::Root(Vec::new()), Some("root.4.1.key")),
        (Change::Nothing, None),
    ] {
        let plan = Plan {
            min_sequence: Some(7),
            ..plan(None)
        };
        let next = signed(rotate(&keys, &change, &plan, &[]).unwrap());
        let following = SignedRoot::from_bytes(&next.bytes).unwrap();
        assert!(before.root.update(following).is_ok(), "{change:?}");
        assert_eq!(next.root.min_sequence, 7);
        let (old, new) = (&before.root, &next.root);
        assert_eq!(old.release != new.release, change == Change::Release);
        assert_eq!(old.rollout != new.rollout, change == Change::Rollout);
        assert_eq!(old.root != new.root, matches!(change, Change::Root(_)));
        if let Some(file) = file {
            assert!(keys.join(file).exists(), "{file}");
        }
        let newest = read_trust(&keys).unwrap();
        assert_eq!(newest, next);
        assert_eq!(read_version(&keys, &newest, old.version).unwrap(), before);
        before = next;
    }
    assert!(read_version(&keys, &before, 9).is_err());
}

#[test]
fn a_threshold_of_root_keys_signs_from_several_places() {
    let (folder, first) = Folder::new(Some((3, 2)));
    let keys = folder.keys();
    let away: Vec<PathBuf> = (1..=3)
        .map(|n| folder.take(&format!("root.{n}.key")))
        .collect();
    // Nobody, then one of two, then the same one again, then another.
    let outcome = rotate(&keys, &Change::Rollout, &plan(None), &[]).unwrap();
    let lacks = |n| Outcome::Partial {
        version: 2,
        old: n,
        new: n,
    };
    assert_eq!(outcome, lacks(2));
    let waiting = rotate(&keys, &Change::Release, &plan(None), &[]).unwrap_err();
    assert!(waiting.to_string().contains("cosign"), "{waiting}");
    assert_eq!(cosign(&keys, &away[..1]).unwrap(), lacks(1));
    assert_eq!(
        cosign(&keys, &[away[0].clone(), away[0].clone()]).unwrap(),
        lacks(1)
    );
    assert_eq!(read_trust(&keys).unwrap(), first);
    let second = signed(cosign(&keys, &away[2..]).unwrap());
    assert_eq!(read_trust(&keys).unwrap(), second);
    assert!(cosign(&keys, &[]).is_err());

    // One root key is stolen: the two others replace it, and it signs no more.
    let stolen = first.root.root.keys[0];
    let change = Change::Root(vec![stolen]);
    let third = signed(rotate(&keys, &change, &plan(None), &away[1..]).unwrap());
    assert!(!third.root.root.keys.contains(&stolen));
    assert_eq!(third.root.root.keys[1..], first.root.root.keys[1..]);
    let unknown = rotate(&keys, &change, &plan(None), &away[1..]).unwrap_err();
    assert!(unknown.to_string().contains("no root key"), "{unknown}");
}

#[test]
fn a_threshold_that_cannot_be_met_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for roots in [(0, 0), (1, 2), (6, 1), (2, 0)] {
        let keys = dir.path().join("keys");
        let error = init(&keys, &plan(Some(roots))).unwrap_err().to_string();
        assert!(error.contains("1 to 5"), "{roots:?}: {error}");
        assert!(secrets(&keys).unwrap().is_empty());
    }
}
