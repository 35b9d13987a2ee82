//! Immutable data set versions: what a training run saw, named by the digest of a canonical text,
//! so that the same labels always give the same version and no version ever changes.

use crate::class::{ClassNameError, class_name};
use flywheel_shared::ids::Digest;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::num::ParseIntError;
use thiserror::Error;

const HEADER: &str = "flywheel-dataset 1";
/// One track in ten validates.
const VALIDATION_SHARE: f64 = 0.1;

/// Which part of training sees an item. The evaluation set is no part of a data set: it is never
/// chosen by the selector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Split {
    /// Learnt from.
    Train,
    /// Watched during training.
    Validation,
    /// Learnt from, though nobody has labelled it: the class is what the champion is sure of (a
    /// pseudo-label, Lee 2013).
    Pseudo,
}

impl Split {
    const fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "val",
            Self::Pseudo => "pseudo",
        }
    }
}

/// A labelled sample of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// Digest of the sample.
    pub digest: Digest,
    /// Index into [`Manifest::classes`].
    pub class: u32,
    /// Its part.
    pub split: Split,
}

/// A version of the data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The version that it follows.
    pub parent: Option<Digest>,
    /// What it was made from, one line: "queue", "bootstrap sim:roads", …
    pub source: String,
    /// Seeds the split.
    pub seed: u64,
    /// Class names in the order of the model's outputs; a later version only appends.
    pub classes: Vec<String>,
    /// Items in order of digest, each digest once.
    pub items: Vec<Item>,
}

/// A label that goes into a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label<'a> {
    /// Digest of the sample.
    pub digest: Digest,
    /// The class name.
    pub class: &'a str,
    /// What must not straddle train and validation: frames of one track, or a device's. Any text;
    /// empty for a sample of its own.
    pub track: &'a str,
    /// When it was given, in ms since the Unix epoch.
    pub at_ms: u64,
}

/// One sample with labels that contradict each other; the latest counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// Digest of the sample.
    pub digest: Digest,
    /// Every class it was given, in order of name.
    pub classes: Vec<String>,
}

/// A new version and what was odd about its labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frozen {
    /// The version.
    pub manifest: Manifest,
    /// Samples with contradicting labels.
    pub conflicts: Vec<Conflict>,
}

/// Why no version could be made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FreezeError {
    /// Nothing is labelled.
    #[error("there are no labels to freeze; label something first (`flywheel queue`)")]
    Empty,
    /// A class name breaks the rules.
    #[error("label of sample {digest}: {error}")]
    Class {
        /// Digest of the sample.
        digest: Digest,
        /// What is wrong.
        error: ClassNameError,
    },
    /// The source text has a line break or other control character.
    #[error("the source {0:?} must be one line of text")]
    Source(String),
}

/// What a version is made from.
#[derive(Debug, Clone, Copy)]
pub struct Freeze<'a> {
    /// The labels, in any order; a digest may come several times.
    pub labels: &'a [Label<'a>],
    /// Classes that the champion is sure of, for samples that nobody labelled; ignored where a
    /// label stands or where the class is none of the labels' or of the version before.
    pub pseudo: &'a [Label<'a>],
    /// Classes of the version before, in its order, kept even when nothing carries them now.
    pub classes: &'a [String],
    /// The version before.
    pub parent: Option<Digest>,
    /// One line: what it was made from.
    pub source: &'a str,
    /// Seeds the split.
    pub seed: u64,
}

/// Makes a version from all labels that stand.
///
/// New classes follow the known ones in order of their first label, then name. The split is drawn
/// by a hash of seed and track, so an item stays where it was as the set grows. A class that would
/// have nothing to train on gets the tracks that hold it moved into training.
///
/// # Errors
/// [`FreezeError`] names the label or field.
pub fn freeze(from: &Freeze<'_>) -> Result<Frozen, FreezeError> {
    if from.labels.is_empty() {
        return Err(FreezeError::Empty);
    }
    if from.source.chars().any(char::is_control) {
        return Err(FreezeError::Source(from.source.to_owned()));
    }
    let mut latest: BTreeMap<Digest, Label<'_>> = BTreeMap::new();
    let mut given: BTreeMap<Digest, BTreeSet<&str>> = BTreeMap::new();
    for label in from.labels {
        let class = class_name(label.class).map_err(|error| FreezeError::Class {
            digest: label.digest,
            error,
        })?;
        let label = Label { class, ..*label };
        given.entry(label.digest).or_default().insert(class);
        let kept = latest.entry(label.digest).or_insert(label);
        // At equal times the names decide, so that the order of the input does not.
        let order = |l: &Label<'_>| (l.at_ms, l.class.to_owned(), l.track.to_owned());
        if order(&label) > order(kept) {
            *kept = label;
        }
    }

    let classes = class_order(from.classes, latest.values());
    let index: BTreeMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
    let validation = validation_tracks(from.seed, latest.values());
    let mut items: BTreeMap<Digest, Item> = from
        .pseudo
        .iter()
        .filter_map(|label| {
            let item = Item {
                digest: label.digest,
                class: *index.get(label.class)?,
                split: Split::Pseudo,
            };
            Some((label.digest, item))
        })
        .collect();
    items.extend(latest.values().map(|label| {
        let item = Item {
            digest: label.digest,
            class: index[label.class],
            split: if validation.contains(&track_of(label)) {
                Split::Validation
            } else {
                Split::Train
            },
        };
        (label.digest, item)
    }));
    let conflicts = given
        .into_iter()
        .filter(|(_, classes)| classes.len() > 1)
        .map(|(digest, classes)| Conflict {
            digest,
            classes: classes.into_iter().map(str::to_owned).collect(),
        })
        .collect();
    let manifest = Manifest {
        parent: from.parent,
        source: from.source.to_owned(),
        seed: from.seed,
        classes,
        items: items.into_values().collect(),
    };
    Ok(Frozen {
        manifest,
        conflicts,
    })
}

fn class_order<'a>(known: &[String], labels: impl Iterator<Item = &'a Label<'a>>) -> Vec<String> {
    let mut order: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    for class in known {
        if seen.insert(class.as_str()) {
            order.push(class.clone());
        }
    }
    let mut first: BTreeMap<&str, u64> = BTreeMap::new();
    for label in labels.filter(|l| !seen.contains(l.class)) {
        let at = first.entry(label.class).or_insert(label.at_ms);
        *at = label.at_ms.min(*at);
    }
    let mut new: Vec<(u64, &str)> = first.into_iter().map(|(class, at)| (at, class)).collect();
    new.sort_unstable();
    order.extend(new.into_iter().map(|(_, class)| class.to_owned()));
    order
}

/// A track's key: its name, or the digest for a sample of its own.
fn track_of(label: &Label<'_>) -> Digest {
    if label.track.is_empty() {
        label.digest
    } else {
        Digest::of_parts(&[b"track", label.track.as_bytes()])
    }
}

fn validation_tracks<'a>(
    seed: u64,
    labels: impl Iterator<Item = &'a Label<'a>> + Clone,
) -> BTreeSet<Digest> {
    let threshold = (VALIDATION_SHARE * f64::from(u32::MAX)) as u32;
    let draws_validation = |track: &Digest| {
        let [a, b, c, d, ..] = Digest::of_parts(&[b"split", &seed.to_le_bytes(), &track.0]).0;
        u32::from_le_bytes([a, b, c, d]) < threshold
    };
    let mut validation: BTreeSet<Digest> = labels
        .clone()
        .map(track_of)
        .filter(draws_validation)
        .collect();
    let mut tracks: BTreeMap<&str, BTreeSet<Digest>> = BTreeMap::new();
    for label in labels {
        tracks
            .entry(label.class)
            .or_default()
            .insert(track_of(label));
    }
    for tracks in tracks.values() {
        if tracks.iter().all(|t| validation.contains(t)) {
            validation.retain(|t| !tracks.contains(t));
        }
    }
    validation
}

impl Manifest {
    /// The canonical text: equal manifests, equal bytes. It is also the form they are stored in.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::with_capacity(100 + self.items.len() * 80);
        let parent = self
            .parent
            .map_or_else(|| "-".to_owned(), |d| d.to_string());
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "{HEADER}\nparent {parent}\nsource {}\nseed {}",
            self.source, self.seed
        );
        for class in &self.classes {
            let _ = writeln!(text, "class {class}");
        }
        for item in &self.items {
            let _ = writeln!(
                text,
                "item {} {} {}",
                item.digest,
                item.class,
                item.split.name()
            );
        }
        text
    }

    /// The version's id: SHA-256 of its canonical text.
    #[must_use]
    pub fn id(&self) -> Digest {
        Digest::of(self.to_text().as_bytes())
    }

    /// Reads a canonical text. Whatever is accepted is written back byte for byte.
    ///
    /// # Errors
    /// [`ParseError`] names the line.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut lines = text.lines().zip(1..);
        let mut field = |name: &'static str| match lines.next() {
            Some((line, number)) => line
                .strip_prefix(name)
                .map(|value| (value, number))
                .ok_or_else(|| fault(number, format!("expected `{name}…`"))),
            None => Err(fault(0, format!("the text ends before `{name}…`"))),
        };
        let (rest, number) = field(HEADER)?;
        if !rest.is_empty() {
            return Err(fault(
                number,
                "unknown version; this reads version 1".into(),
            ));
        }
        let parent = match field("parent ")? {
            ("-", _) => None,
            (value, number) => Some(digest(value, number)?),
        };
        let source = field("source ")?.0.to_owned();
        let (value, number) = field("seed ")?;
        let seed = value
            .parse()
            .map_err(|e: ParseIntError| fault(number, format!("seed: {e}")))?;
        let mut manifest = Self {
            parent,
            source,
            seed,
            classes: Vec::new(),
            items: Vec::new(),
        };
        for (line, number) in lines {
            if let Some(class) = line.strip_prefix("class ") {
                let name = class_name(class).map_err(|e| fault(number, e.to_string()))?;
                manifest.classes.push(name.to_owned());
            } else if let Some(item) = line.strip_prefix("item ") {
                let item = manifest.parse_item(item, number)?;
                manifest.items.push(item);
            } else {
                return Err(fault(number, "expected `class …` or `item …`".into()));
            }
        }
        let names: BTreeSet<&String> = manifest.classes.iter().collect();
        if names.len() != manifest.classes.len() {
            return Err(fault(0, "a class is named twice".into()));
        }
        if manifest.to_text() != text {
            return Err(fault(0, "not in canonical form".into()));
        }
        Ok(manifest)
    }

    fn parse_item(&self, item: &str, number: usize) -> Result<Item, ParseError> {
        let parts: Vec<&str> = item.split(' ').collect();
        let [hex, class, split] = parts[..] else {
            return Err(fault(
                number,
                "expected `item DIGEST CLASS train|val|pseudo`".into(),
            ));
        };
        let digest = digest(hex, number)?;
        let class: u32 = class
            .parse()
            .map_err(|e: ParseIntError| fault(number, format!("class index: {e}")))?;
        if usize::try_from(class).is_ok_and(|c| c >= self.classes.len()) {
            return Err(fault(number, format!("there is no class {class}")));
        }
        let split = match split {
            "train" => Split::Train,
            "val" => Split::Validation,
            "pseudo" => Split::Pseudo,
            other => return Err(fault(number, format!("unknown split `{other}`"))),
        };
        if self.items.last().is_some_and(|last| last.digest >= digest) {
            return Err(fault(number, "items must be in order, each once".into()));
        }
        Ok(Item {
            digest,
            class,
            split,
        })
    }

    /// How many labelled items each class has, in class order: `(train, validation)`.
    #[must_use]
    pub fn counts(&self) -> Vec<(u32, u32)> {
        let mut counts = vec![(0, 0); self.classes.len()];
        for item in &self.items {
            if let Some(count) = usize::try_from(item.class)
                .ok()
                .and_then(|c| counts.get_mut(c))
            {
                match item.split {
                    Split::Train => count.0 += 1,
                    Split::Validation => count.1 += 1,
                    Split::Pseudo => {}
                }
            }
        }
        counts
    }

    /// How many items have a pseudo-label.
    #[must_use]
    pub fn pseudo(&self) -> usize {
        let pseudo = |item: &&Item| item.split == Split::Pseudo;
        self.items.iter().filter(pseudo).count()
    }

    fn class_of(&self, item: &Item) -> &str {
        usize::try_from(item.class)
            .ok()
            .and_then(|c| self.classes.get(c))
            .map_or("", String::as_str)
    }
}

/// A text that is no manifest.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("data set manifest, line {line}: {what}")]
pub struct ParseError {
    /// The line, from 1; 0 for the text as a whole.
    pub line: usize,
    /// What is wrong.
    pub what: String,
}

fn fault(line: usize, what: String) -> ParseError {
    ParseError { line, what }
}

fn digest(hex: &str, line: usize) -> Result<Digest, ParseError> {
    hex.parse()
        .map_err(|e| fault(line, format!("`{hex}`: {e}")))
}

/// What changed from one version to another, each list in order of digest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diff {
    /// New samples and their class.
    pub added: Vec<(Digest, String)>,
    /// Samples that are gone and the class they had.
    pub removed: Vec<(Digest, String)>,
    /// Samples with another class: digest, before, after.
    pub relabelled: Vec<(Digest, String, String)>,
    /// Samples that changed between training, validation and pseudo-labels: digest, after.
    pub moved: Vec<(Digest, Split)>,
    /// Classes that only the newer version has, in its order.
    pub new_classes: Vec<String>,
}

/// What changed from `old` to `new`.
#[must_use]
pub fn diff(old: &Manifest, new: &Manifest) -> Diff {
    let before: BTreeMap<Digest, &Item> = old.items.iter().map(|x| (x.digest, x)).collect();
    let after: BTreeMap<Digest, &Item> = new.items.iter().map(|x| (x.digest, x)).collect();
    let mut diff = Diff::default();
    for (digest, item) in &after {
        let class = new.class_of(item);
        match before.get(digest) {
            None => diff.added.push((*digest, class.to_owned())),
            Some(was) => {
                let old_class = old.class_of(was);
                if old_class != class {
                    let change = (*digest, old_class.to_owned(), class.to_owned());
                    diff.relabelled.push(change);
                }
                if was.split != item.split {
                    diff.moved.push((*digest, item.split));
                }
            }
        }
    }
    for (digest, item) in &before {
        if !after.contains_key(digest) {
            diff.removed.push((*digest, old.class_of(item).to_owned()));
        }
    }
    let known: BTreeSet<&String> = old.classes.iter().collect();
    let new_classes = new.classes.iter().filter(|c| !known.contains(c));
    diff.new_classes = new_classes.cloned().collect();
    diff
}

#[cfg(test)]
mod tests;
