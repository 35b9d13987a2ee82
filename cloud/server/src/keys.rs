//! The signing keys as files, and what is signed with them outside the server.
//!
//! `flywheel key init` makes the keys. The *root* keys sign which other keys devices believe, the
//! *release* key signs models; both belong on machines that are not the server. Only the *rollout*
//! key goes with `flywheel serve`, and all that it can do is offer a released model to a device for
//! some minutes, and tell it the time.
//!
//! A secret key is found by the public key that the trust root names, whatever its file is called, so
//! that a rotation adds files and never renames one. Nothing is overwritten but `trust.bin`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ed25519_dalek::SigningKey;
use flywheel_shared::trust::{PublicKey, Signed, SignedRoot, TrustRoot};

mod ceremony;

pub use ceremony::{Change, Outcome, Plan, cosign, init, rotate};

/// File of the newest trust root in a key folder; not secret.
pub const TRUST_FILE: &str = "trust.bin";
/// File of a trust root that waits for more signatures.
pub const PARTIAL_FILE: &str = "trust.partial";
/// Longest key file that is read.
const MAX_KEY_FILE: u64 = 4096;

/// A trust root as it is stored, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// The root.
    pub root: TrustRoot,
    /// With its signatures.
    pub bytes: Vec<u8>,
}

impl Trust {
    /// Reads a root that is signed by enough of its own keys.
    ///
    /// # Errors
    /// If it does not decode or is not.
    pub fn read(bytes: Vec<u8>) -> Result<Self> {
        let root = SignedRoot::from_bytes(&bytes)
            .and_then(TrustRoot::pin)
            .context("not a valid trust root")?
            .into_inner();
        Ok(Self { root, bytes })
    }
}

/// A secret key and where it came from.
pub struct Secret {
    /// The key.
    pub key: SigningKey,
    /// Its file; `-` for standard input.
    pub path: PathBuf,
}

impl Secret {
    /// The public key.
    pub fn public(&self) -> PublicKey {
        self.key.verifying_key().to_bytes()
    }
}

/// Reads one key: 64 hexadecimal digits in a file that only its owner can read, or, for `-`, on
/// standard input.
///
/// # Errors
/// If the file is missing, readable by others, or not a key; the message says how to mend it.
pub fn read(path: &Path) -> Result<SigningKey> {
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin()
            .take(MAX_KEY_FILE)
            .read_to_string(&mut text)
            .context("cannot read the key from standard input")?;
    } else {
        let mut file = fs::File::open(path).with_context(|| {
            format!(
                "cannot read the key {}; make keys with `flywheel key init --dir DIR`",
                path.display()
            )
        })?;
        // Of the open file, so that it can't be another one a moment later.
        let meta = file
            .metadata()
            .with_context(|| format!("cannot read {}", path.display()))?;
        if meta.permissions().mode() & 0o077 != 0 {
            bail!(
                "the key {} is open to other users; run `chmod 600 {}`",
                path.display(),
                path.display()
            );
        }
        (&mut file)
            .take(MAX_KEY_FILE)
            .read_to_string(&mut text)
            .with_context(|| format!("cannot read {}", path.display()))?;
    }
    let bytes: Option<[u8; 32]> = hex::decode(text.trim())
        .ok()
        .and_then(|bytes| bytes.try_into().ok());
    let bytes = bytes.with_context(|| {
        format!(
            "{} is not a key: expected 64 hexadecimal digits",
            match path.to_str() {
                Some("-") => "what came on standard input".to_owned(),
                _ => path.display().to_string(),
            }
        )
    })?;
    Ok(SigningKey::from_bytes(&bytes))
}

/// The secret keys of a folder, by file name.
///
/// # Errors
/// If the folder or a key in it can't be read.
pub fn secrets(dir: &Path) -> Result<Vec<Secret>> {
    let entries = fs::read_dir(dir).with_context(|| {
        format!(
            "cannot read {}; make keys with `flywheel key init --dir {}`",
            dir.display(),
            dir.display()
        )
    })?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("cannot read {}", dir.display()))?
            .path();
        if path.extension().is_some_and(|end| end == "key") {
            paths.push(path);
        }
    }
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let key = read(&path)?;
            Ok(Secret { key, path })
        })
        .collect()
}

/// The secret key in a folder that belongs to a public one.
///
/// # Errors
/// If there is none.
pub fn find(dir: &Path, role: &str, public: &PublicKey) -> Result<SigningKey> {
    secrets(dir)?
        .into_iter()
        .find(|secret| secret.public() == *public)
        .map(|secret| secret.key)
        .with_context(|| {
            format!(
                "no *.key file in {} is the {role} key {} that the trust root names",
                dir.display(),
                hex::encode(public)
            )
        })
}

/// Reads the newest trust root of a key folder and checks its signatures.
///
/// # Errors
/// If the file is missing, damaged or not signed by the root keys it names.
pub fn read_trust(dir: &Path) -> Result<Trust> {
    read_trust_file(&dir.join(TRUST_FILE))
}

/// Reads an older version of the trust root of a key folder; `newest` is what [`read_trust`] gave.
///
/// # Errors
/// If it is missing, damaged or another version.
pub fn read_version(dir: &Path, newest: &Trust, version: u32) -> Result<Trust> {
    if newest.root.version == version {
        return Ok(newest.clone());
    }
    let path = dir.join(version_file(version));
    let trust = read_trust_file(&path)?;
    ensure!(
        trust.root.version == version,
        "{} holds version {} of the trust root",
        path.display(),
        trust.root.version
    );
    Ok(trust)
}

fn read_trust_file(path: &Path) -> Result<Trust> {
    let bytes = fs::read(path).with_context(|| {
        format!(
            "cannot read {}; make keys with `flywheel key init --dir DIR`",
            path.display()
        )
    })?;
    Trust::read(bytes).with_context(|| path.display().to_string())
}

/// File of a trust root that is no longer the newest.
fn version_file(version: u32) -> String {
    format!("trust.{version}.bin")
}

/// A signed body as bytes.
///
/// # Errors
/// If it does not encode, which the size limit of bodies rules out.
pub fn encode_signed(body: &[u8], signature: &[u8]) -> Result<Vec<u8>> {
    encode(&Signed { body, signature })
}

fn encode<T: serde::Serialize>(value: &T) -> Result<Vec<u8>> {
    postcard::to_extend(value, Vec::new()).context("a signed body does not encode")
}

/// Writes a file that was not there.
///
/// # Errors
/// If it exists or can't be written.
pub fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .with_context(|| {
            format!(
                "cannot create {}; keys are never overwritten",
                path.display()
            )
        })?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests;
