//! A model package on disk: `models/{digest of the manifest}/` with the signed manifest and one
//! file for each part. What is loaded are the very bytes that were checked.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flywheel_shared::MAX_CHUNK;
use flywheel_shared::ids::Digest;
use flywheel_shared::message::{Chunk, Fetch};
use flywheel_shared::trust::{
    Manifest, Part, PartKind, Role, Signed, TrialBounds, TrustError, TrustRoot, Verified,
    check_part, verify,
};
use thiserror::Error;

use crate::{files, wire};

/// Chunks that are asked for at a time.
const OUTSTANDING: u64 = 4;

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
    root: PathBuf,
}

impl Packages {
    /// Opens the folder of all packages, making it if it is not there.
    pub fn open(root: &Path) -> Result<Self, PackageError> {
        fs::create_dir_all(root)
            .and_then(|()| files::make_private(root))
            .map_err(at(root))?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// The packages in a folder that is not the agent's own: nothing there is made or changed.
    pub fn borrow(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    fn folder(&self, manifest: &Digest) -> PathBuf {
        self.root.join(manifest.to_string())
    }

    /// Makes room for a model whose offer was judged: its signed manifest is stored.
    pub fn admit(&self, manifest: Signed<'_>) -> Result<Digest, PackageError> {
        let digest = Digest::of(manifest.body);
        let folder = self.folder(&digest);
        let path = folder.join("manifest.bin");
        fs::create_dir_all(&folder)
            .and_then(|()| files::replace(&path, &wire::bytes(&manifest)))
            .map_err(at(&path))?;
        Ok(digest)
    }

    /// Continues to fetch an admitted package from where it stopped.
    pub fn fetch(&self, manifest: &Digest) -> Result<Fetching, PackageError> {
        let folder = self.folder(manifest);
        let path = folder.join("manifest.bin");
        let bytes = fs::read(&path).map_err(at(&path))?;
        let manifest = checked(manifest, &bytes).map_err(untrusted(&path))?;
        let missing = manifest
            .parts
            .iter()
            .filter(|part| !folder.join(file_name(part.kind)).exists())
            .copied()
            .rev()
            .collect();
        Fetching::start(folder, missing)
    }

    /// Whether the manifest of a package is signed by the release key that is believed now. Packages
    /// that the agent admitted itself were judged then, and are named by their digest since.
    pub fn signed(&self, trust: &TrustRoot, digest: &Digest) -> Result<(), PackageError> {
        let path = self.folder(digest).join("manifest.bin");
        let bytes = fs::read(&path).map_err(at(&path))?;
        let signed = postcard::from_bytes(&bytes).map_err(|_| TrustError::Malformed);
        signed
            .and_then(|signed| verify::<Manifest<'_>>(Role::Release, &trust.release, signed))
            .map(|_| ())
            .map_err(untrusted(&path))
    }

    /// Reads a complete package and checks every digest, beginning with the manifest's own.
    pub fn read(&self, digest: &Digest) -> Result<Package, PackageError> {
        let folder = self.folder(digest);
        let path = folder.join("manifest.bin");
        let bytes = fs::read(&path).map_err(at(&path))?;
        let manifest = checked(digest, &bytes).map_err(untrusted(&path))?;
        let mut parts = BTreeMap::new();
        for part in &manifest.parts {
            let path = folder.join(file_name(part.kind));
            let bytes = fs::read(&path).map_err(at(&path))?;
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

    /// Deletes a package.
    pub fn remove(&self, manifest: &Digest) -> Result<(), PackageError> {
        let folder = self.folder(manifest);
        match fs::remove_dir_all(&folder) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(at(&folder)(source)),
            _ => Ok(()),
        }
    }

    /// Deletes every package but those.
    pub fn keep_only(&self, wanted: &[Digest]) -> Result<(), PackageError> {
        let names: Vec<String> = wanted.iter().map(Digest::to_string).collect();
        for entry in fs::read_dir(&self.root).map_err(at(&self.root))? {
            let entry = entry.map_err(at(&self.root))?;
            let kept = entry
                .file_name()
                .to_str()
                .is_some_and(|name| names.iter().any(|wanted| wanted == name));
            if !kept {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(at(&path))?;
            }
        }
        Ok(())
    }
}

/// A package on its way.
#[derive(Debug)]
pub struct Fetching {
    folder: PathBuf,
    /// Parts that are not complete, the next one last.
    missing: Vec<Part>,
    /// Bytes of the current part on disk.
    have: u64,
    /// Bytes of the current part that were asked for.
    asked: u64,
    /// Whether the current part was fetched from the start because its digest was wrong.
    again: bool,
}

impl Fetching {
    fn start(folder: PathBuf, missing: Vec<Part>) -> Result<Self, PackageError> {
        let mut fetching = Self {
            folder,
            missing,
            have: 0,
            asked: 0,
            again: false,
        };
        fetching.resume()?;
        Ok(fetching)
    }

    /// Whether every part is there and checked.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// Forgets what was asked for: the connection broke, or answers are missing.
    pub fn ask_again(&mut self) {
        self.asked = self.have;
    }

    /// The chunks to ask for now.
    pub fn requests(&mut self) -> Vec<Fetch> {
        let mut requests = Vec::new();
        if let Some(part) = self.missing.last() {
            let chunk = MAX_CHUNK as u64;
            let len = u64::from(part.len);
            while self.asked < len && self.asked < self.have + OUTSTANDING * chunk {
                let piece = chunk.min(len - self.asked);
                requests.push(Fetch {
                    digest: part.digest,
                    offset: self.asked,
                    len: piece as u32,
                });
                self.asked += piece;
            }
        }
        requests
    }

    /// Takes a chunk. One that is not the next is ignored. Returns whether it was taken.
    ///
    /// # Errors
    /// If the disk fails, or if a complete part twice has the wrong digest.
    pub fn chunk(&mut self, chunk: &Chunk<'_>) -> Result<bool, PackageError> {
        let Some(part) = self.missing.last().copied() else {
            return Ok(false);
        };
        let end = self.have + chunk.bytes.len() as u64;
        let next = chunk.digest == part.digest
            && chunk.offset == self.have
            && !chunk.bytes.is_empty()
            && end <= u64::from(part.len);
        if !next {
            return Ok(false);
        }
        let path = self.partial(&part);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(at(&path))?;
        file.write_all_at(chunk.bytes, self.have)
            .map_err(at(&path))?;
        self.have = end;
        self.asked = self.asked.max(end);
        if self.have == u64::from(part.len) {
            self.finish(&part)?;
        }
        Ok(true)
    }

    fn partial(&self, part: &Part) -> PathBuf {
        self.folder
            .join(format!("{}.partial", file_name(part.kind)))
    }

    /// Sets the position in the current part by what is on disk, and finishes parts whose bytes
    /// are all there.
    fn resume(&mut self) -> Result<(), PackageError> {
        while let Some(part) = self.missing.last().copied() {
            let path = self.partial(&part);
            self.have = fs::metadata(&path).map_or(0, |meta| meta.len());
            if self.have > u64::from(part.len) {
                fs::remove_file(&path).map_err(at(&path))?;
                self.have = 0;
            }
            self.asked = self.have;
            if self.have < u64::from(part.len) {
                return Ok(());
            }
            if self.have == 0 {
                File::create(&path).map_err(at(&path))?;
            }
            let left = self.missing.len();
            self.finish(&part)?;
            if self.missing.len() == left {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Checks a part whose bytes are all there. A wrong digest starts it over once, since a
    /// power cut may have left rubbish in the file.
    fn finish(&mut self, part: &Part) -> Result<(), PackageError> {
        let path = self.partial(part);
        let bytes = fs::read(&path).map_err(at(&path))?;
        if let Err(error) = check_part(part, &bytes) {
            fs::remove_file(&path).map_err(at(&path))?;
            self.have = 0;
            self.asked = 0;
            if self.again {
                return Err(untrusted(&path)(error));
            }
            self.again = true;
            return Ok(());
        }
        let whole = self.folder.join(file_name(part.kind));
        File::open(&path)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&path, &whole))
            .and_then(|()| File::open(&self.folder)?.sync_all())
            .map_err(at(&whole))?;
        self.missing.pop();
        self.again = false;
        self.have = 0;
        self.asked = 0;
        self.resume()
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

fn file_name(kind: PartKind) -> &'static str {
    match kind {
        PartKind::Onnx => "model.onnx",
        PartKind::BurnRecord => "model.bpk",
        PartKind::Spec => "spec.bin",
        PartKind::Scores => "scores.bin",
        PartKind::Golden => "golden.bin",
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> PackageError {
    move |source| PackageError::Io {
        path: path.to_owned(),
        source,
    }
}

fn untrusted(path: &Path) -> impl Fn(TrustError) -> PackageError {
    move |source| PackageError::Trust {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
