//! Pictures that people brought, and immutable dataset versions of everything that is labelled.

use std::collections::BTreeSet;
use std::sync::Arc;

use cloud_core::class::class_name;
use cloud_core::dataset::{self, Freeze, Label, Manifest};
use flywheel_shared::ids::Digest;
use flywheel_shared::message::Codec;
use serde::{Deserialize, Serialize};

use super::{Fault, by_prefix, now_ms};
use crate::api::types::{DatasetDiff, DatasetView, ImportQuery, ItemView, Split};
use crate::picture::Picture;
use crate::store::Store;

const IMPORTS: &str = "imports";
const DATASETS: &str = "datasets";

/// A picture that was imported with its class.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Import {
    /// Digest of the stored bytes.
    pub digest: Digest,
    /// How they are encoded.
    pub codec: Codec,
    /// Columns in pixels.
    pub width: u32,
    /// Rows in pixels.
    pub height: u32,
    /// Set that it belongs to.
    pub split: Split,
    /// Its class.
    pub class: String,
    /// Pictures of one track never straddle a split.
    pub track: String,
}

/// A label that stands in the queue, as far as a dataset needs it.
#[derive(Clone, Debug)]
pub struct QueueLabel {
    /// Digest of the picture.
    pub digest: Digest,
    /// The class.
    pub class: String,
    /// Device and encounter.
    pub track: String,
    /// When it was given, Unix milliseconds.
    pub at_ms: u64,
}

impl QueueLabel {
    fn as_label(&self) -> Label<'_> {
        Label {
            digest: self.digest,
            class: &self.class,
            track: &self.track,
            at_ms: self.at_ms,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct DatasetRecord {
    created_ms: u64,
    number: u64,
}

/// The catalogue of imports and datasets.
pub struct Catalog {
    store: Arc<Store>,
}

impl Catalog {
    /// The catalogue in a store.
    pub fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    /// Takes one labelled picture.
    ///
    /// # Errors
    /// If the picture does not decode, the class name breaks the rules, or the picture is already
    /// in another set, which would leak what a model is judged by into what it learns from.
    pub fn import(&self, query: &ImportQuery, bytes: &[u8]) -> Result<ItemView, Fault> {
        let class = class_name(&query.class)
            .map_err(|error| Fault::Invalid(error.to_string()))?
            .to_owned();
        let picture = Picture::decode_file(bytes, None)
            .map_err(|error| Fault::Invalid(format!("{error:#}")))?;
        let (codec, stored) = match image::guess_format(bytes) {
            Ok(image::ImageFormat::Png) => (Codec::Png, bytes.to_vec()),
            Ok(image::ImageFormat::Jpeg) => (Codec::Jpeg, bytes.to_vec()),
            _ => (Codec::Png, picture.to_png()?),
        };
        let digest = Digest::of(&stored);
        let known = self.store.get::<Import>(IMPORTS, &digest.0)?;
        if let Some(known) = &known
            && known.split != query.split
        {
            return Err(Fault::Conflict(format!(
                "the picture {digest} is already in the {:?} set; a picture belongs to one set only",
                known.split
            )));
        }
        if let Some(known) = &known
            && known.class != class
        {
            return Err(Fault::Conflict(format!(
                "the picture {digest} is already imported as `{}`; one of the two classes is wrong",
                known.class
            )));
        }
        // What is in a dataset is stored; reading every manifest for each new picture would be slow.
        if query.split != Split::Train
            && self.store.blobs().len(&digest)?.is_some()
            && self.is_trained_on(&digest)?
        {
            return Err(Fault::Conflict(format!(
                "the picture {digest} is in a dataset that models were trained on; it can't judge them"
            )));
        }
        if known.is_none() {
            self.store.blobs().put(&stored)?;
        }
        self.store.put(
            IMPORTS,
            &digest.0,
            &Import {
                digest,
                codec,
                width: picture.width,
                height: picture.height,
                split: query.split,
                class,
                track: query.track.clone().unwrap_or_default(),
            },
        )?;
        Ok(ItemView {
            id: digest.to_string(),
            width: picture.width,
            height: picture.height,
            known: known.is_some(),
        })
    }

    /// Imports of a set in the order of their digests.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn imports(&self, split: Split) -> Result<Vec<Import>, Fault> {
        Ok(self
            .store
            .scan::<Import>(IMPORTS, &[])?
            .into_iter()
            .map(|(_, import)| import)
            .filter(|import| import.split == split)
            .collect())
    }

    /// An import by digest.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn find_import(&self, digest: &Digest) -> Result<Option<Import>, Fault> {
        Ok(self.store.get(IMPORTS, &digest.0)?)
    }

    /// Freezes all training imports and queue labels into a version, with `pseudo` labels where
    /// nobody gave one; the same labels give the same version. Pictures of the golden and
    /// calibration sets stay out whatever their labels.
    ///
    /// # Errors
    /// If nothing is labelled or the store fails.
    pub fn freeze(
        &self,
        queue: &[QueueLabel],
        pseudo: &[QueueLabel],
        seed: u64,
    ) -> Result<DatasetView, Fault> {
        let mut held_out = BTreeSet::new();
        for split in [Split::Golden, Split::Calibration] {
            held_out.extend(self.imports(split)?.into_iter().map(|import| import.digest));
        }
        let imports = self.imports(Split::Train)?;
        let from_imports = imports.iter().map(|import| Label {
            digest: import.digest,
            class: &import.class,
            track: &import.track,
            at_ms: 0,
        });
        let apart = |label: &Label<'_>| !held_out.contains(&label.digest);
        let labels: Vec<Label<'_>> = from_imports
            .chain(queue.iter().map(QueueLabel::as_label))
            .filter(apart)
            .collect();
        let pseudo: Vec<Label<'_>> = pseudo
            .iter()
            .map(QueueLabel::as_label)
            .filter(apart)
            .collect();
        let parent = self.latest()?;
        let (parent_id, classes) = match &parent {
            Some((id, manifest)) => (Some(*id), manifest.classes.clone()),
            None => (None, Vec::new()),
        };
        let freeze = |parent| {
            dataset::freeze(&Freeze {
                labels: &labels,
                pseudo: &pseudo,
                classes: &classes,
                parent,
                source: "queue and imports",
                seed,
            })
            .map_err(|error| Fault::Invalid(error.to_string()))
        };
        // Nothing new since the last version: that version is the answer.
        if let Some((id, manifest)) = &parent
            && freeze(manifest.parent)?.manifest == *manifest
        {
            return self.view(id, manifest);
        }
        let manifest = freeze(parent_id)?.manifest;
        let id = self.store.blobs().put(manifest.to_text().as_bytes())?;
        if self.store.get::<DatasetRecord>(DATASETS, &id.0)?.is_none() {
            let number = self.store.scan::<DatasetRecord>(DATASETS, &[])?.len() as u64;
            self.store.put(
                DATASETS,
                &id.0,
                &DatasetRecord {
                    created_ms: now_ms(),
                    number,
                },
            )?;
        }
        self.store.flush()?;
        self.view(&id, &manifest)
    }

    /// All versions, oldest first.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn list(&self) -> Result<Vec<DatasetView>, Fault> {
        self.ids()?
            .into_iter()
            .map(|id| self.view(&id, &self.manifest(&id)?))
            .collect()
    }

    /// A version by id or the beginning of it.
    ///
    /// # Errors
    /// If there is none, or several.
    pub fn find(&self, wanted: &str) -> Result<(Digest, Manifest), Fault> {
        let ids: Vec<String> = self.ids()?.iter().map(ToString::to_string).collect();
        let id: Digest = by_prefix("dataset", wanted, ids.iter().map(String::as_str))?
            .parse()
            .map_err(|error| Fault::Internal(format!("dataset key: {error}")))?;
        Ok((id, self.manifest(&id)?))
    }

    /// A version for people.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn view(&self, id: &Digest, manifest: &Manifest) -> Result<DatasetView, Fault> {
        let record = self.store.get::<DatasetRecord>(DATASETS, &id.0)?;
        let counts = manifest.counts();
        Ok(DatasetView {
            id: id.to_string(),
            created_ms: record.map_or(0, |record| record.created_ms),
            train: counts.iter().map(|count| u64::from(count.0)).sum(),
            validation: counts.iter().map(|count| u64::from(count.1)).sum(),
            pseudo: manifest.pseudo() as u64,
            classes: manifest.classes.clone(),
            by_class: manifest
                .classes
                .iter()
                .cloned()
                .zip(counts.iter().map(|count| u64::from(count.0 + count.1)))
                .collect(),
            parent: manifest.parent.map(|parent| parent.to_string()),
        })
    }

    /// What changed from one version to another.
    ///
    /// # Errors
    /// If either does not exist.
    pub fn diff(&self, from: &str, to: &str) -> Result<DatasetDiff, Fault> {
        let diff = dataset::diff(&self.find(from)?.1, &self.find(to)?.1);
        let mut added_by_class = std::collections::BTreeMap::new();
        for (_, class) in &diff.added {
            *added_by_class.entry(class.clone()).or_insert(0u64) += 1;
        }
        Ok(DatasetDiff {
            added: diff.added.len() as u64,
            removed: diff.removed.len() as u64,
            relabelled: diff.relabelled.len() as u64,
            added_by_class,
            new_classes: diff.new_classes,
        })
    }

    fn is_trained_on(&self, digest: &Digest) -> Result<bool, Fault> {
        for id in self.ids()? {
            let manifest = self.manifest(&id)?;
            if manifest
                .items
                .binary_search_by_key(digest, |item| item.digest)
                .is_ok()
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn ids(&self) -> Result<Vec<Digest>, Fault> {
        let mut rows: Vec<(u64, Digest)> = self
            .store
            .scan::<DatasetRecord>(DATASETS, &[])?
            .into_iter()
            .filter_map(|(key, record)| Some((record.number, Digest(key.try_into().ok()?))))
            .collect();
        rows.sort_unstable();
        Ok(rows.into_iter().map(|(_, id)| id).collect())
    }

    fn latest(&self) -> Result<Option<(Digest, Manifest)>, Fault> {
        match self.ids()?.last() {
            Some(id) => Ok(Some((*id, self.manifest(id)?))),
            None => Ok(None),
        }
    }

    fn manifest(&self, id: &Digest) -> Result<Manifest, Fault> {
        let bytes = super::blob(&self.store, id)?;
        let text = String::from_utf8(bytes)
            .map_err(|_| Fault::Internal(format!("dataset {id} is not text")))?;
        Manifest::parse(&text)
            .map_err(|error| Fault::Internal(format!("dataset {id} is damaged: {error}")))
    }
}
