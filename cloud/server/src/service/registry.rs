//! The model registry: what was trained from what, how it fared, which one is the champion, and
//! the signed manifests that devices believe.

use std::sync::Arc;

use cloud_core::evaluate::Report;
use flywheel_models::NetConfig;
use flywheel_shared::ids::Digest;
use flywheel_shared::spec::{ClassOutput, InputSpec, ModelSpec, Task};
use flywheel_shared::trust::{
    ANY_HARDWARE, Delta, MAX_BODY, MAX_DELTAS, Manifest, Part, PartKind, RUNTIME_ABI, Role, Signed,
    TrialBounds, check, verify,
};
use serde::{Deserialize, Serialize};

use super::packages::Origin;
use super::roots::Roots;
use super::{Fault, by_prefix, now_ms};
use crate::api::types::{GateView, ManifestView, ModelView, PromoteRequest, ReportView};
use crate::store::{Batch, Store, StoreError};

/// The deltas of one manifest.
type Deltas = heapless::Vec<Delta, MAX_DELTAS>;

const MODELS: &str = "models";
const ALIASES: &str = "aliases";
const CHAMPION: &[u8] = b"champion";
/// How long a device may take a released model.
const RELEASE_LIFE_MS: u64 = 365 * 24 * 60 * 60 * 1000;

/// A model with its lineage.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelRecord {
    /// Digest over the digests of its parts.
    pub id: String,
    /// The parts, by kind.
    pub parts: Vec<Part>,
    /// The network.
    pub net: NetConfig,
    /// Its preprocessing.
    pub input: InputSpec,
    /// Class names in the order of the logits.
    pub classes: Vec<String>,
    /// Id of the dataset.
    pub dataset: String,
    /// Id of the model whose weights it started from.
    pub parent: Option<String>,
    /// Seed of the run.
    pub seed: u64,
    /// Optimiser steps of the run.
    pub steps: u32,
    /// When the run ended, Unix milliseconds.
    pub created_ms: u64,
    /// Its evaluation.
    pub report: Option<Report>,
    /// The gate's verdict.
    pub gate: Option<GateView>,
    /// Its release, once promoted.
    pub release: Option<Release>,
    /// What it says of itself, if it was not trained here.
    #[serde(default)]
    pub origin: Option<Origin>,
}

/// A signed manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Release {
    /// Release number.
    pub sequence: u64,
    /// Digest of the manifest's body.
    pub digest: Digest,
    /// The manifest's body.
    pub body: Vec<u8>,
    /// The release key's signature.
    pub signature: Vec<u8>,
    /// Why it was promoted against the gate, if it was.
    pub forced: Option<String>,
    /// The champion before it, released again under the next number, for devices that must go
    /// back: signed at promotion, so that a halt at night needs no release key.
    #[serde(default)]
    pub back: Option<Back>,
}

impl Release {
    /// The manifest with its signature.
    pub fn manifest(&self) -> SignedManifest {
        SignedManifest {
            sequence: self.sequence,
            digest: self.digest,
            body: self.body.clone(),
            signature: self.signature.clone(),
        }
    }
}

/// A champion released again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Back {
    /// Id of the model.
    pub model: String,
    /// Its manifest, of the same parts as its first one.
    pub manifest: SignedManifest,
}

/// A manifest with the release key's signature.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SignedManifest {
    /// Release number.
    pub sequence: u64,
    /// Digest of the body.
    pub digest: Digest,
    /// The body.
    pub body: Vec<u8>,
    /// The signature.
    pub signature: Vec<u8>,
}

impl ModelRecord {
    /// The id of a model with these parts: the same weights, labels and score parameters have the
    /// same id, whenever and wherever they were made.
    pub fn id_of(parts: &[Part]) -> String {
        let digests: Vec<&[u8]> = parts.iter().map(|part| part.digest.0.as_slice()).collect();
        Digest::of_parts(&digests).to_string()
    }

    /// The part of a kind.
    ///
    /// # Errors
    /// If the model has none.
    pub fn part(&self, kind: PartKind) -> Result<&Part, Fault> {
        self.parts
            .iter()
            .find(|part| part.kind == kind)
            .ok_or_else(|| Fault::Internal(format!("model {} has no {kind:?} part", self.id)))
    }

    /// Class names as the spec holds them.
    pub fn labels(&self) -> String {
        self.classes.join("\n")
    }

    /// The spec over `labels`, which must be [`Self::labels`].
    pub fn spec<'a>(&'a self, labels: &'a str) -> ModelSpec<'a> {
        let (arch, task) = match &self.origin {
            Some(origin) => (origin.arch.as_str(), origin.task),
            None => (flywheel_models::ARCH, Task::Classify(ClassOutput::Logits)),
        };
        ModelSpec {
            arch,
            labels,
            input: self.input,
            embedding: self.net.embedding as u16,
            task,
        }
    }

    /// Whether it gives a picture one class, which is what queue, training and gate work with.
    pub fn classifies(&self) -> bool {
        let origin = self.origin.as_ref();
        origin.is_none_or(|origin| matches!(origin.task, Task::Classify(_)))
    }
}

/// The registry.
pub struct Registry {
    store: Arc<Store>,
    roots: Arc<Roots>,
    /// Serialises whatever reads a record or the greatest release number and writes the next.
    promoting: std::sync::Mutex<()>,
}

impl Registry {
    /// The registry in a store; `roots` name the release key.
    pub fn new(store: Arc<Store>, roots: Arc<Roots>) -> Self {
        Self {
            store,
            roots,
            promoting: std::sync::Mutex::new(()),
        }
    }

    /// Stores a new or changed model.
    ///
    /// # Errors
    /// If the store fails.
    pub fn save(&self, model: &ModelRecord) -> Result<(), Fault> {
        self.store.put(MODELS, model.id.as_bytes(), model)?;
        self.store.flush()?;
        Ok(())
    }

    /// Stores a new model; the same one again keeps what is known about it.
    ///
    /// # Errors
    /// If the store fails.
    pub fn keep(&self, model: ModelRecord) -> Result<ModelRecord, Fault> {
        let _one_at_a_time = super::lock(&self.promoting);
        if let Some(known) = self.store.get(MODELS, model.id.as_bytes())? {
            return Ok(known);
        }
        self.save(&model)?;
        Ok(model)
    }

    /// Notes an evaluation; everything else that is known about the model stays.
    ///
    /// # Errors
    /// If there is no such model or the store fails.
    pub fn judged(&self, id: &str, report: Report, gate: GateView) -> Result<ModelRecord, Fault> {
        let _one_at_a_time = super::lock(&self.promoting);
        let mut model = self.find(id)?;
        model.report = Some(report);
        model.gate = Some(gate);
        self.save(&model)?;
        Ok(model)
    }

    /// All models, oldest first.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn list(&self) -> Result<Vec<ModelRecord>, Fault> {
        let mut models: Vec<ModelRecord> = self
            .store
            .scan::<ModelRecord>(MODELS, &[])?
            .into_iter()
            .map(|(_, model)| model)
            .collect();
        models.sort_by(|a, b| (a.created_ms, &a.id).cmp(&(b.created_ms, &b.id)));
        Ok(models)
    }

    /// A model by id, by the beginning of it, or `champion`.
    ///
    /// # Errors
    /// If there is none, or several.
    pub fn find(&self, wanted: &str) -> Result<ModelRecord, Fault> {
        if wanted == "champion" {
            return self.champion()?.ok_or_else(|| {
                Fault::NotFound("there is no champion yet; promote a model first".to_owned())
            });
        }
        let models = self.list()?;
        let id = by_prefix(
            "model",
            wanted,
            models.iter().map(|model| model.id.as_str()),
        )?
        .to_owned();
        models
            .into_iter()
            .find(|model| model.id == id)
            .ok_or_else(|| Fault::NotFound(format!("there is no model {id}")))
    }

    /// The champion.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn champion(&self) -> Result<Option<ModelRecord>, Fault> {
        match self.store.get::<String>(ALIASES, CHAMPION)? {
            Some(id) => Ok(self.store.get(MODELS, id.as_bytes())?),
            None => Ok(None),
        }
    }

    /// The champion, if it is a classifier.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn classifier(&self) -> Result<Option<ModelRecord>, Fault> {
        Ok(self.champion()?.filter(ModelRecord::classifies))
    }

    /// The model of a signed manifest, first or released again.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn by_manifest(&self, digest: &Digest) -> Result<Option<ModelRecord>, Fault> {
        let models = self.list()?;
        let releases = || {
            models
                .iter()
                .filter_map(|model| Some((model, model.release.as_ref()?)))
        };
        let first = releases().find(|(_, release)| release.digest == *digest);
        let id = first.map(|(model, _)| &model.id).or_else(|| {
            releases()
                .filter_map(|(_, release)| release.back.as_ref())
                .find(|back| back.manifest.digest == *digest)
                .map(|back| &back.model)
        });
        Ok(id
            .and_then(|id| models.iter().find(|model| model.id == *id))
            .cloned())
    }

    /// Digests of all manifests of a model, as far as it was released.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn manifests(&self, id: &str) -> Result<Vec<Digest>, Fault> {
        let mut digests = Vec::new();
        for model in self.list()? {
            let Some(release) = model.release else {
                continue;
            };
            if model.id == id {
                digests.push(release.digest);
            }
            digests.extend(
                release
                    .back
                    .filter(|back| back.model == id)
                    .map(|back| back.manifest.digest),
            );
        }
        Ok(digests)
    }

    /// Makes a model the champion, with other changes.
    ///
    /// # Errors
    /// If it does not encode.
    pub fn put_champion(batch: &mut Batch, id: &str) -> Result<(), StoreError> {
        batch.put(ALIASES, CHAMPION, id)?;
        Ok(())
    }

    /// Whether a blob is a part of a released model, or a delta to one, which devices may fetch.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn is_released_part(&self, digest: &Digest) -> Result<bool, Fault> {
        Ok(self.list()?.iter().any(|model| {
            let Some(release) = &model.release else {
                return false;
            };
            let manifest = Manifest::recall(&release.digest, &release.body);
            model.parts.iter().any(|part| part.digest == *digest)
                || manifest.is_ok_and(|manifest| {
                    let mut deltas = manifest.deltas.iter();
                    deltas.any(|delta| delta.digest == *digest)
                })
        }))
    }

    /// The release of a model, if devices believe the key that signed it. Under a newer release key
    /// a model is released again, with a number of its own.
    pub fn standing<'m>(&self, model: &'m ModelRecord) -> Option<&'m Release> {
        let key = self.roots.root().release;
        model.release.as_ref().filter(|release| {
            check(Role::Release, &key, &release.digest, &release.signature).is_ok()
        })
    }

    /// Shorter ways to the parts of `to` from those of `from`, which devices run; stored, so that
    /// they can be fetched.
    fn deltas(&self, from: &ModelRecord, to: &ModelRecord) -> Result<Deltas, Fault> {
        let mut deltas = Deltas::new();
        for part in &to.parts {
            let old = from.parts.iter().find(|old| old.kind == part.kind);
            let Some(old) = old.filter(|old| old.digest != part.digest && old.len > 0) else {
                continue;
            };
            // Without a delta the part is fetched whole, so damage on this disk is no reason to stop.
            let blob = |digest| self.store.blobs().get(digest);
            let (Ok(Some(base)), Ok(Some(target))) = (blob(&old.digest), blob(&part.digest)) else {
                tracing::warn!(part = ?part.kind, "no delta is made: a blob is missing or damaged");
                continue;
            };
            let coded = flywheel_delta::encode(&base, &target)
                .map_err(|error| Fault::Internal(format!("a delta can't be made: {error}")))?;
            // Little gain is not worth a part that has to be put together on the device.
            let Some((way, bytes)) =
                coded.filter(|(_, bytes)| bytes.len() <= target.len() / 10 * 9)
            else {
                continue;
            };
            let delta = Delta {
                part: part.kind,
                base: old.digest,
                codec: way.code(),
                len: bytes.len() as u32,
                digest: self.store.blobs().put(&bytes)?,
            };
            if deltas.push(delta).is_err() {
                break;
            }
        }
        Ok(deltas)
    }

    /// The bytes that the release key must sign: the model's manifest, and that of the present
    /// champion under the number after it.
    ///
    /// # Errors
    /// If the model does not fit a manifest.
    pub fn manifest(&self, model: &ModelRecord) -> Result<ManifestView, Fault> {
        if let Some(release) = self.standing(model) {
            return Ok(ManifestView {
                manifest_hex: hex::encode(&release.body),
                sequence: release.sequence,
                return_hex: None,
            });
        }
        let sequence = self.next_sequence()?;
        let trial = TrialBounds {
            frames: 60,
            max_latency_us: 200_000,
            min_confidence: 1.0 / model.classes.len().max(1) as f32,
        };
        // It has proved itself before, and must not be measured against the model that failed.
        let proved = TrialBounds {
            frames: 1,
            max_latency_us: 0,
            min_confidence: 0.0,
        };
        let champion = self.champion()?.filter(|champion| champion.id != model.id);
        let (deltas, back) = match champion {
            None => (Deltas::new(), None),
            Some(champion) => (
                self.deltas(&champion, model)?,
                Some(body(
                    &champion,
                    sequence + 1,
                    proved,
                    self.deltas(model, &champion)?,
                )?),
            ),
        };
        Ok(ManifestView {
            manifest_hex: hex::encode(body(model, sequence, trial, deltas)?),
            sequence,
            return_hex: back.map(hex::encode),
        })
    }

    /// Takes a signed manifest: the model becomes the champion.
    ///
    /// # Errors
    /// If the signature is not the release key's, the manifest is not this model's or not the
    /// next release, or the gate did not pass and no reason to force it is given.
    pub fn promote(&self, wanted: &str, request: &PromoteRequest) -> Result<ModelRecord, Fault> {
        let _one_at_a_time = super::lock(&self.promoting);
        let mut model = self.find(wanted)?;
        let forced = request
            .force
            .as_deref()
            .is_some_and(|why| !why.trim().is_empty());
        match &model.gate {
            _ if forced => {}
            // A verdict holds against the champion that it was given against. A model that was
            // released has proved itself once; going back to it needs no new proof.
            Some(gate)
                if gate.passed
                    && model.release.is_none()
                    && gate.champion != self.champion()?.map(|champion| champion.id) =>
            {
                return Err(Fault::Conflict(format!(
                    "model {} was judged against another champion; run `flywheel eval` again",
                    model.id
                )));
            }
            Some(gate) if gate.passed => {}
            Some(gate) => {
                return Err(Fault::Conflict(format!(
                    "the gate refused model {}: {}; to promote it all the same give a reason with --force",
                    model.id,
                    gate.reasons.join("; ")
                )));
            }
            None => {
                return Err(Fault::Conflict(format!(
                    "model {} was not evaluated; run `flywheel eval` first",
                    model.id
                )));
            }
        }
        let signed = self.signed(
            "manifest_hex",
            &request.manifest_hex,
            &request.signature_hex,
            &model,
        )?;
        match self.standing(&model) {
            // Promoting an older release again makes it the champion; its number stands.
            Some(release) if release.body == signed.body => {}
            Some(_) => {
                return Err(Fault::Conflict(format!(
                    "model {} was released before with another manifest",
                    model.id
                )));
            }
            None => {
                let next = self.next_sequence()?;
                let back = self.signed_back(&model, request)?;
                let numbers = (signed.sequence, back.as_ref().map(|b| b.manifest.sequence));
                if numbers.0 != next || numbers.1.is_some_and(|back| back != next + 1) {
                    return Err(Fault::Conflict(format!(
                        "the manifest has release number {}, the next one is {next}; fetch it again and sign that",
                        signed.sequence
                    )));
                }
                model.release = Some(Release {
                    sequence: signed.sequence,
                    digest: signed.digest,
                    body: signed.body,
                    signature: signed.signature,
                    forced: request.force.clone(),
                    back,
                });
                self.save(&model)?;
            }
        }
        self.store.put(ALIASES, CHAMPION, &model.id)?;
        self.store.flush()?;
        Ok(model)
    }

    /// The champion's manifest for the way back, as a promotion brings it.
    fn signed_back(
        &self,
        model: &ModelRecord,
        request: &PromoteRequest,
    ) -> Result<Option<Back>, Fault> {
        let (body, signature) = match (&request.return_hex, &request.return_signature_hex) {
            (None, None) => return Ok(None),
            (Some(body), Some(signature)) => (body, signature),
            _ => {
                return Err(Fault::Invalid(
                    "return_hex and return_signature_hex belong together".to_owned(),
                ));
            }
        };
        let champion = self.champion()?.filter(|champion| champion.id != model.id);
        let champion = champion.ok_or_else(|| {
            Fault::Invalid("return_hex: there is no other champion to go back to".to_owned())
        })?;
        Ok(Some(Back {
            manifest: self.signed("return_hex", body, signature, &champion)?,
            model: champion.id,
        }))
    }

    /// A manifest that the release key signed, of the parts of this model.
    fn signed(
        &self,
        field: &str,
        body: &str,
        signature: &str,
        model: &ModelRecord,
    ) -> Result<SignedManifest, Fault> {
        let body =
            hex::decode(body).map_err(|error| Fault::Invalid(format!("{field}: {error}")))?;
        let signature = hex::decode(signature)
            .map_err(|error| Fault::Invalid(format!("{field}, its signature: {error}")))?;
        let manifest = verify::<Manifest<'_>>(
            Role::Release,
            &self.roots.root().release,
            Signed {
                body: &body,
                signature: &signature,
            },
        )
        .map_err(|error| {
            Fault::Invalid(format!(
                "the manifest is not signed by the release key that devices believe: {error}"
            ))
        })?;
        manifest
            .legal()
            .map_err(|error| Fault::Invalid(format!("{field}: {error}")))?;
        let sorted = |digests: &mut Vec<Digest>| digests.sort_unstable();
        let mut named: Vec<Digest> = manifest.parts.iter().map(|part| part.digest).collect();
        let mut own: Vec<Digest> = model.parts.iter().map(|part| part.digest).collect();
        sorted(&mut named);
        sorted(&mut own);
        if named != own {
            return Err(Fault::Invalid(format!(
                "{field}: the manifest names other parts than model {}",
                model.id
            )));
        }
        let (sequence, digest) = (manifest.sequence, manifest.digest());
        Ok(SignedManifest {
            sequence,
            digest,
            body,
            signature,
        })
    }

    /// A model for people.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn view(&self, model: &ModelRecord) -> Result<ModelView, Fault> {
        let champion = self.store.get::<String>(ALIASES, CHAMPION)?;
        Ok(ModelView {
            id: model.id.clone(),
            sequence: model.release.as_ref().map(|release| release.sequence),
            champion: champion.as_deref() == Some(model.id.as_str()),
            created_ms: model.created_ms,
            name: model.origin.as_ref().map(|origin| origin.name.clone()),
            dataset: model.dataset.clone(),
            parent: model.parent.clone(),
            seed: model.seed,
            steps: model.steps,
            classes: model.classes.clone(),
            onnx_bytes: u64::from(model.part(PartKind::Onnx)?.len),
            report: model.report.as_ref().map(report_view),
            gate: model.gate.clone(),
        })
    }

    fn next_sequence(&self) -> Result<u64, Fault> {
        Ok(self
            .list()?
            .iter()
            .filter_map(|model| model.release.as_ref())
            .map(|release| {
                let back = release.back.as_ref();
                back.map_or(release.sequence, |back| back.manifest.sequence)
            })
            .chain([self.roots.root().min_sequence])
            .max()
            .unwrap_or(0)
            .saturating_add(1))
    }
}

/// A manifest's bytes.
fn body(
    model: &ModelRecord,
    sequence: u64,
    trial: TrialBounds,
    deltas: Deltas,
) -> Result<Vec<u8>, Fault> {
    let now = now_ms();
    let mut parts = heapless_parts(&model.parts)?;
    parts.sort_unstable_by_key(|part| part.kind);
    let manifest = Manifest {
        name: "champion",
        sequence,
        hardware: ANY_HARDWARE,
        abi: RUNTIME_ABI,
        created_ms: now,
        expires_ms: now + RELEASE_LIFE_MS,
        trial,
        parts,
        deltas,
    };
    let mut buffer = [0u8; MAX_BODY];
    let body = postcard::to_slice(&manifest, &mut buffer)
        .map_err(|error| Fault::Internal(format!("the manifest does not encode: {error}")))?;
    Ok(body.to_vec())
}

fn heapless_parts(
    parts: &[Part],
) -> Result<heapless::Vec<Part, { flywheel_shared::trust::MAX_PARTS }>, Fault> {
    heapless::Vec::from_slice(parts)
        .map_err(|_| Fault::Internal(format!("a manifest can't hold {} parts", parts.len())))
}

fn report_view(report: &Report) -> ReportView {
    ReportView {
        items: u64::from(report.items),
        accuracy: report.accuracy,
        balanced_accuracy: report.balanced_accuracy,
        rare_recall: report.rare_recall,
        ece: report.ece,
        recall: report
            .classes
            .iter()
            .filter_map(|class| Some((class.name.clone(), class.recall?)))
            .collect(),
        latency_us: f64::from(report.latency.p50),
    }
}
