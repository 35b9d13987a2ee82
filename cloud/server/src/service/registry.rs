//! The model registry: what was trained from what, how it fared, which one is the champion, and
//! the signed manifests that devices believe.

use std::sync::Arc;

use cloud_core::evaluate::Report;
use flywheel_models::NetConfig;
use flywheel_shared::ids::Digest;
use flywheel_shared::spec::{ClassOutput, InputSpec, ModelSpec, Task};
use flywheel_shared::trust::{
    ANY_HARDWARE, MAX_BODY, Manifest, Part, PartKind, RUNTIME_ABI, Role, Signed, TrialBounds,
    check, verify,
};
use serde::{Deserialize, Serialize};

use super::roots::Roots;
use super::{Fault, by_prefix, now_ms};
use crate::api::types::{GateView, ManifestView, ModelView, PromoteRequest, ReportView};
use crate::store::Store;

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
    pub fn spec<'a>(&self, labels: &'a str) -> ModelSpec<'a> {
        ModelSpec {
            arch: flywheel_models::ARCH,
            labels,
            input: self.input,
            embedding: self.net.embedding as u16,
            task: Task::Classify(ClassOutput::Logits),
        }
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

    /// The model of a signed manifest.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn by_manifest(&self, digest: &Digest) -> Result<Option<ModelRecord>, Fault> {
        Ok(self.list()?.into_iter().find(|model| {
            model
                .release
                .as_ref()
                .is_some_and(|release| release.digest == *digest)
        }))
    }

    /// Whether a blob is a part of a released model, which devices may fetch.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn is_released_part(&self, digest: &Digest) -> Result<bool, Fault> {
        Ok(self.list()?.iter().any(|model| {
            model.release.is_some() && model.parts.iter().any(|part| part.digest == *digest)
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

    /// The bytes that the release key must sign.
    ///
    /// # Errors
    /// If the model was promoted already or does not fit a manifest.
    pub fn manifest(&self, model: &ModelRecord) -> Result<ManifestView, Fault> {
        if let Some(release) = self.standing(model) {
            return Ok(ManifestView {
                manifest_hex: hex::encode(&release.body),
                sequence: release.sequence,
            });
        }
        let now = now_ms();
        let sequence = self.next_sequence()?;
        let mut parts = heapless_parts(&model.parts)?;
        parts.sort_unstable_by_key(|part| part.kind);
        let manifest = Manifest {
            name: "champion",
            sequence,
            hardware: ANY_HARDWARE,
            abi: RUNTIME_ABI,
            created_ms: now,
            expires_ms: now + RELEASE_LIFE_MS,
            trial: TrialBounds {
                frames: 60,
                max_latency_us: 200_000,
                min_confidence: 1.0 / model.classes.len().max(1) as f32,
            },
            parts,
            deltas: heapless::Vec::new(),
        };
        let mut buffer = [0u8; MAX_BODY];
        let body = postcard::to_slice(&manifest, &mut buffer)
            .map_err(|error| Fault::Internal(format!("the manifest does not encode: {error}")))?;
        Ok(ManifestView {
            manifest_hex: hex::encode(body),
            sequence,
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
        let body = hex::decode(&request.manifest_hex)
            .map_err(|error| Fault::Invalid(format!("manifest_hex: {error}")))?;
        let signature = hex::decode(&request.signature_hex)
            .map_err(|error| Fault::Invalid(format!("signature_hex: {error}")))?;
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
            .map_err(|error| Fault::Invalid(error.to_string()))?;
        let mut signed: Vec<Digest> = manifest.parts.iter().map(|part| part.digest).collect();
        let mut own: Vec<Digest> = model.parts.iter().map(|part| part.digest).collect();
        signed.sort_unstable();
        own.sort_unstable();
        if signed != own {
            return Err(Fault::Invalid(format!(
                "the manifest names other parts than model {}",
                model.id
            )));
        }
        match self.standing(&model) {
            // Promoting an older release again makes it the champion; its number stands.
            Some(release) if release.body == body => {}
            Some(_) => {
                return Err(Fault::Conflict(format!(
                    "model {} was released before with another manifest",
                    model.id
                )));
            }
            None => {
                let next = self.next_sequence()?;
                if manifest.sequence != next {
                    return Err(Fault::Conflict(format!(
                        "the manifest has release number {}, the next one is {next}; fetch it again and sign that",
                        manifest.sequence
                    )));
                }
                model.release = Some(Release {
                    sequence: manifest.sequence,
                    digest: manifest.digest(),
                    body: body.clone(),
                    signature,
                    forced: request.force.clone(),
                });
                self.save(&model)?;
            }
        }
        self.store.put(ALIASES, CHAMPION, &model.id)?;
        self.store.flush()?;
        Ok(model)
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
            .map(|release| release.sequence)
            .chain([self.roots.root().min_sequence])
            .max()
            .unwrap_or(0)
            .saturating_add(1))
    }
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
