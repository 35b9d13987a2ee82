//! A model package on disk: `models/{digest of the manifest}/` with the signed manifest and one
//! file for each part. What is loaded are the very bytes that were checked.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flywheel_delta::Way;
use flywheel_shared::ids::Digest;
use flywheel_shared::trust::{
    Manifest, Part, PartKind, Role, Signed, TrialBounds, TrustError, TrustRoot, Verified,
    check_part, verify,
};
use thiserror::Error;

use super::disk::{self, Disk, Files};
use super::fetching::{self, Fetching, Shortcut, Want};
use crate::{files, wire};

const MANIFEST: &str = "manifest.bin";

/// Why a package is not usable.
#[derive(Debug, Error)]
pub enum PackageError {
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The bytes are not what was signed.
    #[error("{path}: {source}; the package will be fetched again when the cloud offers it")]
    Trust {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TrustError,
    },
}

impl PackageError {
    /// The number that is reported, if the bytes are at fault.
    pub fn trust(&self) -> Option<TrustError> {
        match self {
            Self::Trust { source, .. } => Some(*source),
            Self::Io { .. } => None,
        }
    }
}

/// A package whose every byte was checked against its signature.
#[derive(Clone, Debug, PartialEq)]
pub struct Package {
    /// Digest of the manifest, which names the model.
    pub digest: Digest,
    /// The manifest's sequence.
    pub sequence: u64,
    /// How the model is proved.
    pub trial: TrialBounds,
    parts: BTreeMap<PartKind, Vec<u8>>,
}

impl Package {
    /// A package of parts that nobody signed: to be measured, never to be installed. It is named
    /// by the digest of its ONNX file, or of its record if it has none.
    pub fn unsigned(parts: BTreeMap<PartKind, Vec<u8>>) -> Self {
        let named = [PartKind::Onnx, PartKind::BurnRecord]
            .into_iter()
            .find_map(|kind| parts.get(&kind));
        Self {
            digest: Digest::of(named.map_or(&[], Vec::as_slice)),
            sequence: 0,
            trial: TrialBounds {
                frames: 0,
                max_latency_us: 0,
                min_confidence: 0.0,
            },
            parts,
        }
    }

    /// The parts that lie in a folder, such as one under a device's `models/`, unchecked; for
    /// [`Package::unsigned`].
    pub fn parts_in(folder: &Path) -> Result<BTreeMap<PartKind, Vec<u8>>, PackageError> {
        let mut parts = BTreeMap::new();
        for kind in PART_KINDS {
            let path = folder.join(file_name(kind));
            match fs::read(&path) {
                Ok(bytes) => {
                    parts.insert(kind, bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(at(&path)(error)),
            }
        }
        Ok(parts)
    }

    /// Writes the parts to a folder, under the names that [`Package::parts_in`] reads.
    pub fn write_parts(&self, folder: &Path) -> Result<(), PackageError> {
        fs::create_dir_all(folder).map_err(at(folder))?;
        for (kind, bytes) in &self.parts {
            let path = folder.join(file_name(*kind));
            fs::write(&path, bytes).map_err(at(&path))?;
        }
        Ok(())
    }

    /// The bytes of a part; empty if the package has none of the kind.
    pub fn part(&self, kind: PartKind) -> &[u8] {
        self.parts.get(&kind).map_or(&[], Vec::as_slice)
    }
}

/// The packages of a device.
#[derive(Clone, Debug)]
pub struct Packages {
    disk: Arc<dyn Disk>,
    root: PathBuf,
}

impl Packages {
    /// Opens the folder of all packages, making it if it is not there.
    pub fn open(root: &Path) -> Result<Self, PackageError> {
        let packages = Self::on(Arc::new(Files), root)?;
        files::make_private(root).map_err(at(root))?;
        Ok(packages)
    }

    /// As [`Packages::open`], on any disk.
    pub fn on(disk: Arc<dyn Disk>, root: &Path) -> Result<Self, PackageError> {
        disk.make_folder(root)
            .and_then(|()| disk.sync_folder(root.parent().unwrap_or(Path::new(""))))
            .map_err(at(root))?;
        Ok(Self {
            disk,
            root: root.to_owned(),
        })
    }

    /// The packages in a folder that is not the agent's own: nothing there is made or changed.
    pub fn borrow(root: &Path) -> Self {
        Self {
            disk: Arc::new(Files),
            root: root.to_owned(),
        }
    }

    fn folder(&self, manifest: &Digest) -> PathBuf {
        self.root.join(manifest.to_string())
    }

    /// Makes room for a model whose offer was judged: its signed manifest is stored, durably, since
    /// the slot record will name it.
    pub fn admit(&self, manifest: Signed<'_>) -> Result<Digest, PackageError> {
        let digest = Digest::of(manifest.body);
        let folder = self.folder(&digest);
        let path = folder.join(MANIFEST);
        self.disk
            .make_folder(&folder)
            .and_then(|()| disk::replace(&*self.disk, &path, &wire::bytes(&manifest)))
            .and_then(|()| self.disk.sync_folder(&self.root))
            .map_err(at(&path))?;
        Ok(digest)
    }

    /// Continues to fetch an admitted package from where it stopped. What another package here has
    /// is taken from there, whole or as the base of a difference.
    pub fn fetch(&self, manifest: &Digest) -> Result<Fetching, PackageError> {
        let folder = self.folder(manifest);
        // A part that got its name before the agent died need not have it after a power cut.
        self.disk
            .sync_folder(&folder)
            .and_then(|()| self.disk.sync_folder(&self.root))
            .map_err(at(&folder))?;
        let path = folder.join(MANIFEST);
        let bytes = self.disk.read(&path).map_err(at(&path))?;
        let manifest = checked(manifest, &bytes).map_err(untrusted(&path))?;
        let mut missing = Vec::new();
        for part in &manifest.parts {
            let path = folder.join(file_name(part.kind));
            let there = self.disk.len(&path).map_err(at(&path))?.is_some();
            if !there && !self.copy(part, &folder)? {
                missing.push(Want {
                    part: *part,
                    shortcut: self.shortcut(&manifest, part),
                });
            }
        }
        missing.reverse();
        Fetching::start(Arc::clone(&self.disk), folder, missing)
    }

    /// Takes a part from a package that has the same; false if there is none.
    fn copy(&self, part: &Part, folder: &Path) -> Result<bool, PackageError> {
        let found = self.holding(part.kind, &part.digest);
        let bytes = found.and_then(|path| self.disk.read(&path).ok());
        match bytes.filter(|bytes| check_part(part, bytes).is_ok()) {
            Some(bytes) => fetching::install(&*self.disk, folder, part.kind, &bytes).map(|()| true),
            None => Ok(false),
        }
    }

    /// A difference to a part that is here.
    fn shortcut(&self, manifest: &Manifest<'_>, part: &Part) -> Option<Shortcut> {
        manifest.deltas.iter().find_map(|delta| {
            let shorter = delta.part == part.kind && delta.len < part.len;
            let way = Way::from_code(delta.codec).filter(|_| shorter)?;
            Some(Shortcut {
                way,
                digest: delta.digest,
                len: delta.len,
                base: self.holding(delta.part, &delta.base)?,
                base_digest: delta.base,
            })
        })
    }

    /// The file of a part in any package that lists it.
    fn holding(&self, kind: PartKind, digest: &Digest) -> Option<PathBuf> {
        let folders = self.disk.list(&self.root).ok()?;
        folders.into_iter().find_map(|folder| {
            let lists = self.manifest_in(&folder, |manifest| {
                manifest
                    .part(kind)
                    .is_some_and(|part| part.digest == *digest)
            });
            let path = folder.join(file_name(kind));
            let there = matches!(self.disk.len(&path), Ok(Some(_)));
            (lists? && there).then_some(path)
        })
    }

    /// Looks at the manifest of a package, if the folder is one.
    fn manifest_in<T>(&self, folder: &Path, look: impl FnOnce(&Manifest<'_>) -> T) -> Option<T> {
        let digest = folder.file_name()?.to_str()?.parse().ok()?;
        let bytes = self.disk.read(&folder.join(MANIFEST)).ok()?;
        Some(look(&checked(&digest, &bytes).ok()?))
    }

    /// Whether the manifest of a package is signed by the release key that is believed now. Packages
    /// that the agent admitted itself were judged then, and are named by their digest since.
    pub fn signed(&self, trust: &TrustRoot, digest: &Digest) -> Result<(), PackageError> {
        let path = self.folder(digest).join(MANIFEST);
        let bytes = self.disk.read(&path).map_err(at(&path))?;
        let signed = postcard::from_bytes(&bytes).map_err(|_| TrustError::Malformed);
        signed
            .and_then(|signed| verify::<Manifest<'_>>(Role::Release, &trust.release, signed))
            .map(|_| ())
            .map_err(untrusted(&path))
    }

    /// Reads a complete package and checks every digest, beginning with the manifest's own. The
    /// bytes that are returned are those that were hashed; nothing that the manifest does not list
    /// is read.
    pub fn read(&self, digest: &Digest) -> Result<Package, PackageError> {
        let folder = self.folder(digest);
        let path = folder.join(MANIFEST);
        let bytes = self.disk.read(&path).map_err(at(&path))?;
        let manifest = checked(digest, &bytes).map_err(untrusted(&path))?;
        let mut parts = BTreeMap::new();
        for part in &manifest.parts {
            let path = folder.join(file_name(part.kind));
            // Before it is read, so that no file takes more memory than was signed.
            let len = self.disk.len(&path).map_err(at(&path))?;
            if len.is_some_and(|len| len > u64::from(part.len)) {
                return Err(untrusted(&path)(TrustError::TooLong));
            }
            let bytes = self.disk.read(&path).map_err(at(&path))?;
            check_part(part, &bytes).map_err(untrusted(&path))?;
            parts.insert(part.kind, bytes);
        }
        Ok(Package {
            digest: *digest,
            sequence: manifest.sequence,
            trial: manifest.trial,
            parts,
        })
    }

    /// The smallest sequence of the packages that are here, whole or not; `None` without any.
    pub fn oldest(&self) -> Option<u64> {
        let folders = self.disk.list(&self.root).ok()?;
        folders
            .into_iter()
            .filter_map(|folder| self.manifest_in(&folder, |manifest| manifest.sequence))
            .min()
    }

    /// Deletes a package.
    pub fn remove(&self, manifest: &Digest) -> Result<(), PackageError> {
        let folder = self.folder(manifest);
        disk::remove_all(&*self.disk, &folder).map_err(at(&folder))
    }

    /// Deletes every package but those.
    pub fn keep_only(&self, wanted: &[Digest]) -> Result<(), PackageError> {
        let wanted: Vec<PathBuf> = wanted.iter().map(|digest| self.folder(digest)).collect();
        for path in self.disk.list(&self.root).map_err(at(&self.root))? {
            if !wanted.contains(&path) {
                disk::remove_all(&*self.disk, &path).map_err(at(&path))?;
            }
        }
        Ok(())
    }
}

/// The manifest in the stored bytes, if it has this digest.
fn checked<'m>(digest: &Digest, bytes: &'m [u8]) -> Result<Manifest<'m>, TrustError> {
    let signed: Signed<'m> = postcard::from_bytes(bytes).map_err(|_| TrustError::Malformed)?;
    Manifest::recall(digest, signed.body).map(Verified::into_inner)
}

const PART_KINDS: [PartKind; 5] = [
    PartKind::Onnx,
    PartKind::BurnRecord,
    PartKind::Spec,
    PartKind::Scores,
    PartKind::Golden,
];

pub(super) fn file_name(kind: PartKind) -> &'static str {
    match kind {
        PartKind::Onnx => "model.onnx",
        PartKind::BurnRecord => "model.bpk",
        PartKind::Spec => "spec.bin",
        PartKind::Scores => "scores.bin",
        PartKind::Golden => "golden.bin",
    }
}

pub(super) fn at(path: &Path) -> impl Fn(io::Error) -> PackageError {
    move |source| PackageError::Io {
        path: path.to_owned(),
        source,
    }
}

pub(super) fn untrusted(path: &Path) -> impl Fn(TrustError) -> PackageError {
    move |source| PackageError::Trust {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
