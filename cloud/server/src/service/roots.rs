//! The trust roots of the fleet: every version that devices may have to walk through, the rollout
//! key that the newest one names, and what that key signs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use ed25519_dalek::{Signer, SigningKey};
use flywheel_shared::ids::DeviceId;
use flywheel_shared::message::Attest;
use flywheel_shared::trust::{
    MAX_BODY, PublicKey, Role, SignedRoot, TimeStamp, TrustError, TrustRoot, sign,
};

use super::{Fault, lock};
use crate::api::types::RootView;
use crate::ingest::Attested;
use crate::keys;
use crate::store::{Store, StoreError};

const ROOTS: &str = "roots";

/// The newest root, and the key for it.
#[derive(Clone)]
struct Current {
    root: TrustRoot,
    /// The root with its signatures.
    bytes: Vec<u8>,
    rollout: SigningKey,
}

/// The trust roots of a server.
pub struct Roots {
    store: Arc<Store>,
    /// Folder with the rollout key, which is read again when a root names another one.
    keys: PathBuf,
    current: Mutex<Current>,
    /// The version that each device had when it asked last, since the server started.
    seen: Mutex<BTreeMap<DeviceId, u32>>,
}

impl Roots {
    /// The roots in a store, and those that the key folder has beyond them.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the folder belongs to another fleet.
    pub fn open(store: Arc<Store>, keys: &Path) -> Result<Arc<Self>> {
        let given = keys::read_trust(keys)?;
        let mut stored: Vec<Vec<u8>> = store
            .scan::<Vec<u8>>(ROOTS, &[])?
            .into_iter()
            .map(|(_, bytes)| bytes)
            .collect();
        let mut newest = match stored.pop() {
            None => {
                put(&store, given.root.version, &given.bytes)?;
                given.clone()
            }
            Some(bytes) => keys::Trust::read(bytes)
                .context("the newest trust root in the data folder is damaged")?,
        };
        while newest.root.version < given.root.version {
            let next = keys::read_version(keys, &given, newest.root.version + 1)?;
            let signed = SignedRoot::from_bytes(&next.bytes)?;
            newest.root.update(signed).with_context(|| {
                format!(
                    "version {} of the trust root in {} does not follow version {} in the data folder",
                    next.root.version,
                    keys.display(),
                    newest.root.version
                )
            })?;
            put(&store, next.root.version, &next.bytes)?;
            newest = next;
        }
        if newest.root.version == given.root.version {
            ensure!(
                newest.root == given.root,
                "{} belongs to another fleet than the data folder: both have version {} of the trust root, and they differ",
                keys.display(),
                given.root.version
            );
        }
        let rollout = rollout_key(keys, &newest.root)?;
        Ok(Arc::new(Self {
            store,
            keys: keys.to_owned(),
            current: Mutex::new(Current {
                root: newest.root,
                bytes: newest.bytes,
                rollout,
            }),
            seen: Mutex::default(),
        }))
    }

    /// The newest root.
    pub fn root(&self) -> TrustRoot {
        lock(&self.current).root.clone()
    }

    /// The newest root with its signatures, as devices store it.
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.current).bytes.clone()
    }

    /// Signs an offer's body.
    pub fn sign_offer(&self, body: &[u8]) -> [u8; 64] {
        sign(Role::Rollout, &lock(&self.current).rollout, body)
    }

    /// Signs a line of the rollout log, which stands under a domain of its own; returns the public
    /// key with it, since lines outlive keys.
    pub(super) fn sign_line(&self, message: &[u8; 56]) -> (PublicKey, [u8; 64]) {
        let current = lock(&self.current);
        let signature = current.rollout.sign(message).to_bytes();
        (current.root.rollout, signature)
    }

    /// The version that a device had when it asked last; `None` if it has not since the server started.
    pub fn version_of(&self, device: &DeviceId) -> Option<u32> {
        lock(&self.seen).get(device).copied()
    }

    /// Every root, oldest first.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn list(&self) -> Result<Vec<RootView>, Fault> {
        self.above(0)?.into_iter().map(view).collect()
    }

    /// Takes the root that follows the newest one.
    ///
    /// # Errors
    /// If it is not signed by enough keys of both, is not the next version, or names a rollout key
    /// that is not in the server's key folder.
    pub fn publish(&self, bytes: Vec<u8>) -> Result<RootView, Fault> {
        let mut current = lock(&self.current);
        let refused = |error: TrustError| {
            let version = current.root.version;
            Fault::Invalid(match error {
                TrustError::OldRoot | TrustError::SkippedRoot => format!(
                    "{error}: the server has version {version} and takes version {} next (error {})",
                    version.saturating_add(1),
                    error.code()
                ),
                _ => format!("{error} (error {})", error.code()),
            })
        };
        let root = SignedRoot::from_bytes(&bytes)
            .and_then(|signed| current.root.update(signed))
            .map_err(refused)?
            .into_inner();
        let rollout = if root.rollout == current.root.rollout {
            current.rollout.clone()
        } else {
            rollout_key(&self.keys, &root).map_err(|error| {
                Fault::Conflict(format!(
                    "version {} of the trust root names a new rollout key, and the server does not have it: put it into the server's key folder first ({error:#})",
                    root.version
                ))
            })?
        };
        put(&self.store, root.version, &bytes)?;
        let seen = view(bytes.clone())?;
        *current = Current {
            root,
            bytes,
            rollout,
        };
        Ok(seen)
    }

    /// What a device asked for: the roots above its own, and the time.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn attest(
        &self,
        device: &DeviceId,
        attest: &Attest,
        now_ms: u64,
    ) -> Result<Attested, Fault> {
        lock(&self.seen).insert(device.clone(), attest.root_version);
        let roots = self.above(attest.root_version)?;
        let stamp = TimeStamp {
            device: device.clone(),
            nonce: attest.nonce,
            now_ms,
        };
        let mut buffer = [0u8; MAX_BODY];
        let time = postcard::to_slice(&stamp, &mut buffer)
            .map_err(|error| Fault::Internal(format!("the time does not encode: {error}")))?
            .to_vec();
        Ok(Attested {
            time_signature: sign(Role::Time, &lock(&self.current).rollout, &time),
            time,
            roots,
        })
    }

    /// The roots above a version, oldest first.
    fn above(&self, version: u32) -> Result<Vec<Vec<u8>>, StoreError> {
        let roots = self.store.scan::<Vec<u8>>(ROOTS, &[])?;
        let above = |key: &[u8]| key > &version.to_be_bytes()[..];
        Ok(roots
            .into_iter()
            .filter(|(key, _)| above(key))
            .map(|(_, bytes)| bytes)
            .collect())
    }
}

/// Stores a root under its version; durable on return.
fn put(store: &Store, version: u32, bytes: &[u8]) -> Result<(), StoreError> {
    store.put(ROOTS, &version.to_be_bytes(), &bytes)?;
    store.flush()
}

/// The rollout key that a root names.
fn rollout_key(keys: &Path, root: &TrustRoot) -> Result<SigningKey> {
    keys::find(keys, "rollout", &root.rollout)
}

/// A root for people and programs.
fn view(bytes: Vec<u8>) -> Result<RootView, Fault> {
    let trust = keys::Trust::read(bytes)?;
    let root = &trust.root;
    Ok(RootView {
        version: root.version,
        issued_ms: root.issued_ms,
        expires_ms: root.expires_ms,
        threshold: root.root.threshold,
        root: root.root.keys.iter().map(hex::encode).collect(),
        release: hex::encode(root.release),
        rollout: hex::encode(root.rollout),
        min_sequence: root.min_sequence,
        root_hex: hex::encode(&trust.bytes),
    })
}

#[cfg(test)]
mod tests {
    use flywheel_shared::trust::verify;

    use super::*;
    use crate::keys::{Change, Outcome, Plan};

    struct World {
        dir: tempfile::TempDir,
    }

    impl World {
        fn new() -> Self {
            let world = Self {
                dir: tempfile::tempdir().unwrap(),
            };
            keys::init(&world.keys(), &plan()).unwrap();
            world
        }

        fn keys(&self) -> PathBuf {
            self.dir.path().join("keys")
        }

        fn open(&self) -> Result<Arc<Roots>> {
            let store = Store::open(&self.dir.path().join("data"))?;
            Roots::open(store, &self.keys())
        }

        fn rotate(&self, change: &Change) -> keys::Trust {
            match keys::rotate(&self.keys(), change, &plan(), &[]).unwrap() {
                Outcome::Signed(trust) => *trust,
                partial => panic!("{partial:?}"),
            }
        }
    }

    fn plan() -> Plan {
        Plan {
            now_ms: 1_000,
            days: 10,
            roots: None,
            min_sequence: None,
        }
    }

    #[test]
    fn roots_are_published_in_order_and_handed_to_devices_that_lack_them() {
        let world = World::new();
        let roots = world.open().unwrap();
        let second = world.rotate(&Change::Release);
        let third = world.rotate(&Change::Rollout);
        let skipped = roots.publish(third.bytes.clone()).unwrap_err().to_string();
        assert!(skipped.contains("takes version 2 next"), "{skipped}");
        roots.publish(second.bytes.clone()).unwrap();
        let again = roots.publish(second.bytes.clone()).unwrap_err();
        assert!(
            matches!(&again, Fault::Invalid(why) if why.contains("error 14")),
            "{again}"
        );
        roots.publish(third.bytes.clone()).unwrap();
        assert_eq!(roots.root(), third.root);
        assert_eq!(roots.list().unwrap().len(), 3);

        let device: DeviceId = "cam1".parse().unwrap();
        let ask = Attest {
            nonce: 5,
            root_version: 1,
        };
        assert_eq!(roots.version_of(&device), None);
        let attested = roots.attest(&device, &ask, 77).unwrap();
        assert_eq!(roots.version_of(&device), Some(1));
        assert_eq!(attested.roots, [second.bytes, third.bytes.clone()]);
        let signed = flywheel_shared::trust::Signed {
            body: &attested.time,
            signature: &attested.time_signature,
        };
        let stamp = verify::<TimeStamp>(Role::Time, &third.root.rollout, signed).unwrap();
        assert_eq!((stamp.nonce, stamp.now_ms), (5, 77));
        drop(roots);
        // What was published holds over a restart.
        let roots = world.open().unwrap();
        assert_eq!((roots.root(), roots.bytes()), (third.root, third.bytes));
    }

    #[test]
    fn a_rollout_key_that_the_server_lacks_is_asked_for_first() {
        let world = World::new();
        let roots = world.open().unwrap();
        let second = world.rotate(&Change::Rollout);
        let key = world.keys().join("rollout.2.key");
        let away = world.dir.path().join("away.key");
        std::fs::rename(&key, &away).unwrap();
        let refused = roots.publish(second.bytes.clone()).unwrap_err();
        assert!(
            matches!(&refused, Fault::Conflict(why) if why.contains("key folder")),
            "{refused}"
        );
        assert_eq!(roots.root().version, 1);
        std::fs::rename(&away, &key).unwrap();
        assert_eq!(roots.publish(second.bytes).unwrap().version, 2);
    }

    #[test]
    fn a_folder_that_is_ahead_is_followed_and_one_of_another_fleet_is_refused() {
        let world = World::new();
        drop(world.open().unwrap());
        world.rotate(&Change::Rollout);
        let third = world.rotate(&Change::Root(Vec::new()));
        let roots = world.open().unwrap();
        assert_eq!(roots.root(), third.root);
        assert_eq!(roots.list().unwrap().len(), 3);
        drop(roots);

        std::fs::remove_dir_all(world.keys()).unwrap();
        keys::init(&world.keys(), &plan()).unwrap();
        let key_gone = world.open().err().unwrap().to_string();
        assert!(key_gone.contains("rollout key"), "{key_gone}");
        world.rotate(&Change::Nothing);
        world.rotate(&Change::Nothing);
        let other = format!("{:#}", world.open().err().unwrap());
        assert!(other.contains("another fleet"), "{other}");
    }

    #[test]
    fn nothing_that_is_not_a_root_is_published() {
        let world = World::new();
        let roots = world.open().unwrap();
        let second = world.rotate(&Change::Nothing);
        for bit in 0..second.bytes.len() * 8 {
            let mut bytes = second.bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(
                matches!(roots.publish(bytes), Err(Fault::Invalid(_))),
                "{bit}"
            );
        }
        assert_eq!(roots.root().version, 1);
        roots.publish(second.bytes).unwrap();
    }
}
