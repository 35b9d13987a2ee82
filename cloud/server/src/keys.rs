//! The signing keys as files, and what is signed with them outside the server.
//!
//! `flywheel key init` makes three keys. The *root* key signs which other keys devices believe,
//! the *release* key signs models; both belong on a machine that is not the server. Only the
//! *rollout* key goes with `flywheel serve`, and all that it can do is offer a released model to
//! a device for some minutes.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ed25519_dalek::SigningKey;
use flywheel_shared::trust::{self, MAX_BODY, Role, Signed, TrustRoot};

/// File of the root key in a key folder.
pub const ROOT_KEY: &str = "root.key";
/// File of the release key in a key folder.
pub const RELEASE_KEY: &str = "release.key";
/// File of the rollout key in a key folder.
pub const ROLLOUT_KEY: &str = "rollout.key";
/// File of the signed trust root in a key folder; not secret.
pub const TRUST_FILE: &str = "trust.bin";

/// Makes a key folder with fresh keys; refuses to touch one that has any.
///
/// # Errors
/// If the folder holds keys already, can't be written, or the system has no randomness.
pub fn init(dir: &Path) -> Result<TrustRoot> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot restrict {}", dir.display()))?;
    for name in [ROOT_KEY, RELEASE_KEY, ROLLOUT_KEY, TRUST_FILE] {
        if dir.join(name).exists() {
            bail!(
                "{} exists; keys are never overwritten: choose another folder or move it away",
                dir.join(name).display()
            );
        }
    }
    let root = generate()?;
    let release = generate()?;
    let rollout = generate()?;
    let trust = TrustRoot {
        version: 1,
        root: root.verifying_key().to_bytes(),
        release: release.verifying_key().to_bytes(),
        rollout: rollout.verifying_key().to_bytes(),
    };
    for (name, key) in [
        (ROOT_KEY, &root),
        (RELEASE_KEY, &release),
        (ROLLOUT_KEY, &rollout),
    ] {
        write_new(
            &dir.join(name),
            0o600,
            format!("{}\n", hex::encode(key.to_bytes())).as_bytes(),
        )?;
    }
    let mut buffer = [0u8; MAX_BODY];
    let body = postcard::to_slice(&trust, &mut buffer)
        .context("the trust root does not fit its size limit")?
        .to_vec();
    let signature = trust::sign(Role::Root, &root, &body);
    let signed = encode_signed(&body, &signature)?;
    write_new(&dir.join(TRUST_FILE), 0o644, &signed)?;
    Ok(trust)
}

/// Reads one key file: 64 hexadecimal digits, readable by its owner only.
///
/// # Errors
/// If the file is missing, readable by others, or not a key; the message says how to mend it.
pub fn read(path: &Path) -> Result<SigningKey> {
    let meta = fs::metadata(path).with_context(|| {
        format!(
            "cannot read the key {}; make keys with `flywheel key init --dir DIR`",
            path.display()
        )
    })?;
    if meta.permissions().mode() & 0o077 != 0 {
        bail!(
            "the key {} is open to other users; run `chmod 600 {}`",
            path.display(),
            path.display()
        );
    }
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let bytes: [u8; 32] = hex::decode(text.trim())
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .with_context(|| {
            format!(
                "{} is not a key: expected 64 hexadecimal digits",
                path.display()
            )
        })?;
    Ok(SigningKey::from_bytes(&bytes))
}

/// Reads the signed trust root of a key folder and checks its signature.
///
/// # Errors
/// If the file is missing, damaged or not signed by the root key it names.
pub fn read_trust(dir: &Path) -> Result<(TrustRoot, Vec<u8>)> {
    let path = dir.join(TRUST_FILE);
    let bytes = fs::read(&path).with_context(|| {
        format!(
            "cannot read {}; make keys with `flywheel key init --dir {}`",
            path.display(),
            dir.display()
        )
    })?;
    let signed: Signed<'_> = postcard::from_bytes(&bytes)
        .with_context(|| format!("{} does not decode", path.display()))?;
    let trust = trust::verify_root(signed)
        .with_context(|| format!("{} is not a valid trust root", path.display()))?;
    Ok(((*trust).clone(), bytes))
}

/// A signed body as bytes.
///
/// # Errors
/// If it does not encode, which the size limit of bodies rules out.
pub fn encode_signed(body: &[u8], signature: &[u8]) -> Result<Vec<u8>> {
    let mut buffer = vec![0u8; body.len() + signature.len() + 16];
    let used = postcard::to_slice(&Signed { body, signature }, &mut buffer)
        .context("a signed body does not encode")?
        .len();
    buffer.truncate(used);
    Ok(buffer)
}

/// The key files of a folder that exist, by role.
pub fn list(dir: &Path) -> Vec<(&'static str, PathBuf)> {
    [
        ("root", ROOT_KEY),
        ("release", RELEASE_KEY),
        ("rollout", ROLLOUT_KEY),
    ]
    .into_iter()
    .map(|(role, name)| (role, dir.join(name)))
    .filter(|(_, path)| path.exists())
    .collect()
}

fn generate() -> Result<SigningKey> {
    let mut seed = [0u8; 32];
    getrandom::fill(&mut seed)
        .map_err(|error| anyhow::anyhow!("the system gives no randomness: {error}"))?;
    Ok(SigningKey::from_bytes(&seed))
}

fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        let trust = init(&keys).unwrap();
        assert!(init(&keys).unwrap_err().to_string().contains("exists"));
        let (read_back, _) = read_trust(&keys).unwrap();
        assert_eq!(read_back, trust);
        let release = read(&keys.join(RELEASE_KEY)).unwrap();
        assert_eq!(release.verifying_key().to_bytes(), trust.release);
        assert_eq!(list(&keys).len(), 3);

        fs::set_permissions(keys.join(RELEASE_KEY), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(
            read(&keys.join(RELEASE_KEY))
                .unwrap_err()
                .to_string()
                .contains("chmod 600")
        );
    }

    #[test]
    fn a_damaged_trust_root_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        init(&keys).unwrap();
        let path = keys.join(TRUST_FILE);
        let mut bytes = fs::read(&path).unwrap();
        bytes[10] ^= 1;
        fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", read_trust(&keys).unwrap_err());
        assert!(error.contains("trust.bin"), "{error}");
    }
}
