//! The cloud of the simulation: the real registry and controller over a real store, with a shelf
//! between that can be cut at any write.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use anyhow::{Context, Result};
use device_core::slot::Held;
use ed25519_dalek::SigningKey;
use flywheel_models::NetConfig;
use flywheel_shared::ids::Digest;
use flywheel_shared::spec::InputSpec;
use flywheel_shared::trust::{Part, PartKind, Role, TrustRoot, sign};

use crate::api::types::{GateView, PromoteRequest};
use crate::keys;
use crate::service::now_ms;
use crate::service::registry::{ModelRecord, Registry};
use crate::service::rollouts::{Rollouts, Shelf};
use crate::service::roots::Roots;
use crate::store::{Batch, Store, StoreError};

/// A shelf that fails from a write on, as if the process had been killed there.
pub(crate) struct Brittle {
    store: Arc<Store>,
    /// Writes until the cut.
    left: AtomicU64,
    /// Whether the write at the cut reaches the disk: the process dies before it can say so.
    applied: bool,
    /// Writes so far.
    pub(crate) writes: AtomicU64,
}

impl Brittle {
    /// Lets `left` writes pass.
    pub(crate) fn new(store: Arc<Store>, left: u64, applied: bool) -> Arc<Self> {
        Arc::new(Self {
            store,
            left: AtomicU64::new(left),
            applied,
            writes: AtomicU64::new(0),
        })
    }

    /// The next write is the last.
    pub(crate) fn cut(&self) {
        self.left.store(0, SeqCst);
    }
}

impl Shelf for Brittle {
    fn write(&self, batch: Batch) -> Result<(), StoreError> {
        self.writes.fetch_add(1, SeqCst);
        let left = self
            .left
            .fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
        if left.is_err() {
            if self.applied {
                self.store.write(batch)?;
            }
            return Err(StoreError::Closed);
        }
        self.store.write(batch).map(drop)
    }
}

/// Store, keys, and two released models: the one that the fleet runs and the one to roll out.
pub(crate) struct Cloud {
    pub(crate) store: Arc<Store>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) trust: TrustRoot,
    pub(crate) roots: Arc<Roots>,
    /// Id of the model that the fleet runs.
    #[cfg(test)]
    pub(crate) old: String,
    /// Id of the model to roll out.
    pub(crate) new: String,
    /// The model that the fleet runs, as devices know it.
    pub(crate) live: Held,
}

impl Cloud {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let store = Store::open(dir)?;
        let keys_dir = dir.join("keys");
        let plan = keys::Plan {
            now_ms: now_ms(),
            days: 365,
            roots: None,
            min_sequence: None,
        };
        let trust = keys::init(&keys_dir, &plan)?.root;
        let roots = Roots::open(store.clone(), &keys_dir)?;
        let release = keys::find(&keys_dir, "release", &trust.release)?;
        let registry = Arc::new(Registry::new(store.clone(), roots.clone()));
        let old = promote(&registry, &release, "old")?;
        let new = promote(&registry, &release, "new")?;
        let first = old
            .release
            .as_ref()
            .context("the first model has no release")?;
        Ok(Self {
            live: Held {
                digest: first.digest,
                sequence: first.sequence,
            },
            #[cfg(test)]
            old: old.id,
            new: new.id,
            store,
            registry,
            trust,
            roots,
        })
    }

    /// The public key that signs the log, hexadecimal.
    pub(crate) fn log_key(&self) -> String {
        hex::encode(self.trust.rollout)
    }

    /// A controller as it comes up after a start.
    pub(crate) fn controller(&self, shelf: Arc<Brittle>) -> Result<Rollouts> {
        Ok(Rollouts::open_on(
            shelf,
            self.store.clone(),
            self.registry.clone(),
            self.roots.clone(),
        )?)
    }
}

/// Makes a model and the operator's signatures, as `flywheel model promote` does.
fn promote(registry: &Registry, key: &SigningKey, name: &str) -> Result<ModelRecord> {
    let part = |kind| Part {
        kind,
        len: 4,
        digest: Digest::of_parts(&[name.as_bytes(), &[kind as u8]]),
    };
    let parts = vec![part(PartKind::Onnx), part(PartKind::Spec)];
    let champion = registry.champion()?.map(|champion| champion.id);
    let model = ModelRecord {
        id: ModelRecord::id_of(&parts),
        parts,
        net: NetConfig {
            channels: 1,
            width: 32,
            height: 32,
            classes: 4,
            embedding: 8,
        },
        input: InputSpec::new(32, 32, 1),
        classes: ["a", "b", "c", "d"].map(str::to_owned).to_vec(),
        dataset: "none".to_owned(),
        parent: None,
        seed: 0,
        steps: 0,
        created_ms: 0,
        report: None,
        gate: Some(GateView {
            passed: true,
            champion,
            reasons: Vec::new(),
        }),
        release: None,
        origin: None,
    };
    registry.save(&model)?;
    let manifest = registry.manifest(&model)?;
    let signature = |body: &str| -> Result<String> {
        Ok(hex::encode(sign(Role::Release, key, &hex::decode(body)?)))
    };
    let request = PromoteRequest {
        signature_hex: signature(&manifest.manifest_hex)?,
        manifest_hex: manifest.manifest_hex,
        return_signature_hex: manifest.return_hex.as_deref().map(signature).transpose()?,
        return_hex: manifest.return_hex,
        force: None,
    };
    Ok(registry.promote(&model.id, &request)?)
}
