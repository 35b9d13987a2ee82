//! Models that were made elsewhere: the parts of a package, checked by the code that will run them
//! on devices, become a model of the registry.

use std::collections::BTreeMap;

use device_engine::EngineKind;
use flywheel_agent::models::{Package, Runner};
use flywheel_models::NetConfig;
use flywheel_shared::ids::Digest;
use flywheel_shared::spec::{ModelSpec, Task};
use flywheel_shared::trust::{Part, PartKind};
use serde::{Deserialize, Serialize};

use super::registry::ModelRecord;
use super::training::Stations;
use super::{Fault, blob, now_ms};
use crate::api::types::{AddRequest, PartName};

/// Most characters of a model's name.
const MAX_NAME: usize = 64;

/// What a model that was made elsewhere says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Its name, for people.
    pub name: String,
    /// The architecture of its record; empty without one.
    pub arch: String,
    /// What its outputs mean.
    pub task: Task,
}

impl From<PartName> for PartKind {
    fn from(name: PartName) -> Self {
        match name {
            PartName::Onnx => Self::Onnx,
            PartName::Record => Self::BurnRecord,
            PartName::Spec => Self::Spec,
            PartName::Scores => Self::Scores,
            PartName::Golden => Self::Golden,
        }
    }
}

impl Stations<'_> {
    /// Registers a model whose parts are stored already. The same parts are the same model.
    ///
    /// # Errors
    /// If a part is missing or damaged, or the device's engine does not load the model or does not
    /// give its golden answers.
    pub fn add(&self, request: &AddRequest) -> Result<ModelRecord, Fault> {
        let invalid = |why: String| Fault::Invalid(format!("model {:?}: {why}", request.name));
        if request.name.is_empty() || request.name.chars().count() > MAX_NAME {
            return Err(invalid(format!("a name has 1 to {MAX_NAME} characters")));
        }
        let mut bytes = BTreeMap::new();
        let mut parts = Vec::new();
        for part in &request.parts {
            let digest: Digest = part
                .digest
                .parse()
                .map_err(|error| invalid(format!("digest {}: {error}", part.digest)))?;
            let content = blob(self.store, &digest)?;
            let kind = PartKind::from(part.kind);
            parts.push(Part {
                kind,
                len: u32::try_from(content.len())
                    .map_err(|_| invalid(format!("the {kind:?} part exceeds 4 GiB")))?,
                digest,
            });
            if bytes.insert(kind, content).is_some() {
                return Err(invalid(format!("the {kind:?} part is there twice")));
            }
        }
        for kind in [PartKind::Onnx, PartKind::Spec, PartKind::Golden] {
            if !bytes.contains_key(&kind) {
                return Err(invalid(format!(
                    "it has no {kind:?} part; `flywheel model import` makes a whole package"
                )));
            }
        }
        parts.sort_unstable_by_key(|part| part.kind);

        // As a device does it when the model arrives.
        let package = Package::unsigned(bytes);
        Runner::load(EngineKind::Tract, &package)
            .and_then(|mut runner| runner.prove(&package))
            .map_err(|error| invalid(format!("devices would refuse it: {error}")))?;

        let spec: ModelSpec<'_> = postcard::from_bytes(package.part(PartKind::Spec))
            .map_err(|error| invalid(format!("its spec does not decode: {error}")))?;
        let model = ModelRecord {
            id: ModelRecord::id_of(&parts),
            parts,
            net: NetConfig {
                channels: usize::from(spec.input.channels),
                width: usize::from(spec.input.width),
                height: usize::from(spec.input.height),
                classes: spec.classes(),
                embedding: usize::from(spec.embedding),
            },
            input: spec.input,
            classes: spec.labels().map(str::to_owned).collect(),
            dataset: String::new(),
            parent: None,
            seed: 0,
            steps: 0,
            created_ms: now_ms(),
            report: None,
            gate: None,
            release: None,
            origin: Some(Origin {
                name: request.name.clone(),
                arch: spec.arch.to_owned(),
                task: spec.task,
            }),
        };
        self.registry.keep(model)
    }
}
