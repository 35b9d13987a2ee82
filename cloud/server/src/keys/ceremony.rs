//! Making and replacing keys: the first trust root, and each that follows it. Where root keys lie
//! with several people, a root that lacks signatures waits in `trust.partial` and goes from one to
//! the next.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ed25519_dalek::SigningKey;
use flywheel_shared::trust::{
    Keys, MAX_ROOT_KEYS, PublicKey, Role, SignedRoot, TrustError, TrustRoot, sign,
};

use super::{
    PARTIAL_FILE, Secret, TRUST_FILE, Trust, encode, read, read_trust, secrets, version_file,
    write_new,
};

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// What a new trust root is to say besides its keys.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The clock, Unix milliseconds: devices that trusted a stolen rollout key for the time start
    /// again from here.
    pub now_ms: u64,
    /// For how long devices take models under the root.
    pub days: u64,
    /// Number and threshold of root keys; as before if absent.
    pub roots: Option<(u8, u8)>,
    /// Models up to this release number are not taken; as before if absent.
    pub min_sequence: Option<u64>,
}

impl Plan {
    /// Five years from now, everything else as before.
    pub fn new(now_ms: u64) -> Self {
        Self {
            now_ms,
            days: 1825,
            roots: None,
            min_sequence: None,
        }
    }
}

/// Which keys a new trust root replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// None: the root gets a new expiry.
    Nothing,
    /// The release key.
    Release,
    /// The rollout key.
    Rollout,
    /// These root keys; all of them if none is named.
    Root(Vec<PublicKey>),
}

/// How far a new trust root came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is in `trust.bin`, to be published.
    Signed(Box<Trust>),
    /// So many more of the old and of the new root keys must sign `trust.partial`.
    Partial {
        /// Its version.
        version: u32,
        /// Signatures of old keys that are missing.
        old: usize,
        /// Signatures of new keys that are missing.
        new: usize,
    },
}

/// Makes a key folder with fresh keys; refuses to touch one that has any.
///
/// # Errors
/// If the folder holds keys already, can't be written, or the system has no randomness.
pub fn init(dir: &Path, plan: &Plan) -> Result<Trust> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot restrict {}", dir.display()))?;
    let there = secrets(dir)?.into_iter().map(|secret| secret.path);
    let trust = dir.join(TRUST_FILE);
    if let Some(path) = there.chain(trust.exists().then_some(trust)).next() {
        bail!(
            "{} exists; keys are never overwritten: choose another folder or move it away",
            path.display()
        );
    }
    let (count, threshold) = plan.roots.unwrap_or((1, 1));
    let mut root = TrustRoot {
        version: 1,
        issued_ms: plan.now_ms,
        expires_ms: expiry(plan),
        min_sequence: plan.min_sequence.unwrap_or(0),
        ..TrustRoot::default()
    };
    let mut new = Vec::new();
    root.root = fresh_roots(dir, 1, count, threshold, &mut new)?;
    root.release = fresh(dir.join("release.key"), &mut new)?;
    root.rollout = fresh(dir.join("rollout.key"), &mut new)?;
    root.legal().context("the new trust root")?;
    for secret in &new {
        write_secret(secret)?;
    }
    let trust = Trust::read(seal(&root, Vec::new(), &root.root, &new)?)?;
    write_new(&dir.join(TRUST_FILE), 0o644, &trust.bytes)?;
    Ok(trust)
}

/// Makes the trust root that follows the newest one of a folder, with fresh keys as `change` says,
/// and signs it with every root key in the folder and in `keys`.
///
/// # Errors
/// If a root waits for signatures already, or files can't be read or written.
pub fn rotate(dir: &Path, change: &Change, plan: &Plan, keys: &[PathBuf]) -> Result<Outcome> {
    let old = read_trust(dir)?;
    let partial = dir.join(PARTIAL_FILE);
    ensure!(
        !partial.exists(),
        "{} waits for signatures; complete it with `flywheel key cosign --dir {}`, or remove it",
        partial.display(),
        dir.display()
    );
    let version = old
        .root
        .version
        .checked_add(1)
        .context("the trust root has no further version")?;
    let mut next = TrustRoot {
        version,
        issued_ms: plan.now_ms,
        expires_ms: expiry(plan),
        min_sequence: plan.min_sequence.unwrap_or(old.root.min_sequence),
        ..old.root.clone()
    };
    let mut new = Vec::new();
    match change {
        Change::Nothing => {}
        Change::Release => {
            next.release = fresh(dir.join(format!("release.{version}.key")), &mut new)?;
        }
        Change::Rollout => {
            next.rollout = fresh(dir.join(format!("rollout.{version}.key")), &mut new)?;
        }
        Change::Root(replaced) if replaced.is_empty() => {
            let before = (old.root.root.keys.len() as u8, old.root.root.threshold);
            let (count, threshold) = plan.roots.unwrap_or(before);
            next.root = fresh_roots(dir, version, count, threshold, &mut new)?;
        }
        Change::Root(replaced) => {
            for public in replaced {
                let place = next.root.keys.iter().position(|key| key == public);
                let place = place.with_context(|| {
                    format!(
                        "{} is no root key of {}",
                        hex::encode(public),
                        dir.display()
                    )
                })?;
                let path = dir.join(format!("root.{version}.{}.key", place + 1));
                next.root.keys[place] = fresh(path, &mut new)?;
            }
            if let Some((_, threshold)) = plan.roots {
                next.root.threshold = threshold;
            }
        }
    }
    next.legal().context("the new trust root")?;
    // A key that is lost with the power is worse than one that nobody needs.
    for secret in &new {
        write_secret(secret)?;
    }
    new.extend(secrets(dir)?);
    new.extend(given(keys)?);
    let bytes = seal(&next, Vec::new(), &old.root.root, &new)?;
    conclude(dir, &old, &next, bytes)
}

/// Adds the signatures of every root key in a folder and in `keys` to the root that waits there.
///
/// # Errors
/// If none waits, it does not follow the newest one, or files can't be read or written.
pub fn cosign(dir: &Path, keys: &[PathBuf]) -> Result<Outcome> {
    let old = read_trust(dir)?;
    let path = dir.join(PARTIAL_FILE);
    let bytes = fs::read(&path).with_context(|| {
        format!(
            "cannot read {}; `flywheel key rotate` leaves it where signatures are missing",
            path.display()
        )
    })?;
    let named = || path.display().to_string();
    let signed = SignedRoot::from_bytes(&bytes).with_context(named)?;
    let next: TrustRoot = postcard::from_bytes(signed.body).with_context(named)?;
    next.legal().with_context(named)?;
    ensure!(
        old.root.version.checked_add(1) == Some(next.version),
        "{} is version {} and does not follow version {} in {}",
        path.display(),
        next.version,
        old.root.version,
        TRUST_FILE
    );
    let mut signers = secrets(dir)?;
    signers.extend(given(keys)?);
    let bytes = seal(&next, signed.signatures.to_vec(), &old.root.root, &signers)?;
    conclude(dir, &old, &next, bytes)
}

/// Puts a root in force if it has signatures enough, or away as it is.
fn conclude(dir: &Path, old: &Trust, next: &TrustRoot, bytes: Vec<u8>) -> Result<Outcome> {
    let signed = SignedRoot::from_bytes(&bytes)?;
    let partial = dir.join(PARTIAL_FILE);
    match old.root.update(signed) {
        Ok(_) => {
            let kept = dir.join(version_file(old.root.version));
            if !kept.exists() {
                write_new(&kept, 0o644, &old.bytes)?;
            }
            replace(&dir.join(TRUST_FILE), &bytes)?;
            if partial.exists() {
                fs::remove_file(&partial)
                    .with_context(|| format!("cannot remove {}", partial.display()))?;
            }
            Ok(Outcome::Signed(Box::new(Trust::read(bytes)?)))
        }
        Err(TrustError::Threshold) => {
            let missing = |keys: &Keys| {
                let has = |key: &&PublicKey| signed.pairs().any(|(by, _)| by == *key);
                let count = keys.keys.iter().filter(has).count();
                usize::from(keys.threshold).saturating_sub(count)
            };
            let (old, new) = (missing(&old.root.root), missing(&next.root));
            replace(&partial, &bytes)?;
            Ok(Outcome::Partial {
                version: next.version,
                old,
                new,
            })
        }
        Err(error) => Err(error).context("the new trust root"),
    }
}

/// A root with the signatures it has and those of each of `signers` that is a root key before or
/// after and has not signed.
fn seal(
    next: &TrustRoot,
    mut signatures: Vec<u8>,
    before: &Keys,
    signers: &[Secret],
) -> Result<Vec<u8>> {
    let body = encode(next)?;
    for secret in signers {
        let public = secret.public();
        let asked = before.keys.contains(&public) || next.root.keys.contains(&public);
        let signed = SignedRoot {
            body: &body,
            signatures: &signatures,
        };
        if asked && signed.pairs().all(|(by, _)| *by != public) {
            let signature = sign(Role::Root, &secret.key, &body);
            signatures.extend_from_slice(&public);
            signatures.extend_from_slice(&signature);
        }
    }
    encode(&SignedRoot {
        body: &body,
        signatures: &signatures,
    })
}

fn given(keys: &[PathBuf]) -> Result<Vec<Secret>> {
    keys.iter()
        .map(|path| {
            let key = read(path)?;
            Ok(Secret {
                key,
                path: path.clone(),
            })
        })
        .collect()
}

fn expiry(plan: &Plan) -> u64 {
    plan.now_ms.saturating_add(plan.days.saturating_mul(DAY_MS))
}

fn fresh_roots(
    dir: &Path,
    version: u32,
    count: u8,
    threshold: u8,
    new: &mut Vec<Secret>,
) -> Result<Keys> {
    ensure!(
        (1..=MAX_ROOT_KEYS).contains(&usize::from(count)) && (1..=count).contains(&threshold),
        "a trust root has 1 to {MAX_ROOT_KEYS} root keys, of which a threshold of 1 to all must sign; got {threshold} of {count}"
    );
    let mut keys = Keys {
        threshold,
        ..Keys::default()
    };
    for number in 1..=count {
        let name = match (version, count) {
            (1, 1) => "root.key".to_owned(),
            (1, _) => format!("root.{number}.key"),
            _ => format!("root.{version}.{number}.key"),
        };
        // There is room, as was just ensured.
        let _ = keys.keys.push(fresh(dir.join(name), new)?);
    }
    Ok(keys)
}

/// A fresh key, to be written at `path`.
fn fresh(path: PathBuf, new: &mut Vec<Secret>) -> Result<PublicKey> {
    let mut seed = [0u8; 32];
    getrandom::fill(&mut seed)
        .map_err(|error| anyhow::anyhow!("the system gives no randomness: {error}"))?;
    let secret = Secret {
        key: SigningKey::from_bytes(&seed),
        path,
    };
    let public = secret.public();
    new.push(secret);
    Ok(public)
}

fn write_secret(secret: &Secret) -> Result<()> {
    let text = format!("{}\n", hex::encode(secret.key.as_bytes()));
    write_new(&secret.path, 0o600, text.as_bytes())
}

/// Replaces a public file, whole or not at all.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    fs::File::create(&temporary)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("cannot write {}", path.display()))
}
