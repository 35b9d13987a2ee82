//! `flywheel key`: make, list, replace and publish the keys that devices believe.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use flywheel_shared::trust::PublicKey;

use super::{Connection, format, print_json, print_line};
use crate::api::types::{RootRequest, RootView};
use crate::keys::{self, Change, Outcome, Plan, Trust};
use crate::service::now_ms;

/// Parts of `flywheel key`.
#[derive(Subcommand)]
pub enum KeyCommand {
    /// Make root, release and rollout keys.
    #[command(
        after_help = "Example: flywheel key init --dir keys/\n\nWith root keys for three people, of whom two must agree: flywheel key init --dir keys/ --root-keys 3 --threshold 2"
    )]
    Init {
        /// Folder for the keys.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// Number of root keys, 1 to 5.
        #[arg(long, default_value_t = 1, value_name = "N")]
        root_keys: u8,
        /// Root keys that must sign the next trust root.
        #[arg(long, default_value_t = 1, value_name = "M")]
        threshold: u8,
        #[command(flatten)]
        life: Life,
    },
    /// List the keys of a folder.
    #[command(after_help = "Example: flywheel key ls --dir keys/")]
    Ls {
        /// Folder with the keys.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
    /// Replace a key in good order; `flywheel key publish` then tells the devices.
    #[command(
        after_help = "Example: flywheel key rotate rollout --dir keys/ && flywheel key publish --dir keys/ --data cloud/\n\nROLE `none` keeps every key and renews the expiry."
    )]
    Rotate(ReplaceArgs),
    /// Replace a key that was stolen; `flywheel key publish` then tells the devices.
    #[command(
        after_help = "Example: flywheel key revoke release --dir keys/ && flywheel key publish --dir keys/ --data cloud/"
    )]
    Revoke(ReplaceArgs),
    /// Add signatures to a trust root that waits for more root keys.
    #[command(after_help = "Example: flywheel key cosign --dir keys/ --key /media/usb/root.2.key")]
    Cosign {
        /// Folder with trust.bin and trust.partial.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// File of a root key that is not in the folder; `-` reads it from standard input. May be
        /// given several times.
        #[arg(long, value_name = "FILE")]
        key: Vec<PathBuf>,
    },
    /// Hand newer trust roots to the server, and by it to the devices.
    #[command(after_help = "Example: flywheel key publish --dir keys/ --data cloud/")]
    Publish {
        /// Folder with trust.bin.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
}

/// How long a trust root is good for.
#[derive(Args)]
pub struct Life {
    /// Days after which devices take no model under this trust root until a newer one is published.
    #[arg(long, default_value_t = 1825, value_name = "N")]
    days: u64,
}

/// Arguments of `flywheel key rotate` and `revoke`.
#[derive(Args)]
pub struct ReplaceArgs {
    /// Whose key is replaced.
    role: Role,
    /// Folder with the keys; the new one is written there.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// File of a root key that is not in the folder; `-` reads it from standard input. May be given
    /// several times.
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// With `root`: replace only this root key, by its public half; may be given several times.
    #[arg(long, value_name = "PUBLIC")]
    only: Vec<String>,
    /// With `root`: number of new root keys; as before if absent.
    #[arg(long, value_name = "N", requires = "threshold")]
    root_keys: Option<u8>,
    /// With `root`: keys that must sign the next trust root; as before if absent.
    #[arg(long, value_name = "M")]
    threshold: Option<u8>,
    /// Devices take no model up to this release number; as before if absent. Under a new release key
    /// their floor starts again here, however high the old key pushed it.
    #[arg(long, value_name = "N")]
    min_sequence: Option<u64>,
    #[command(flatten)]
    life: Life,
}

/// A key that can be replaced.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    /// The keys that sign trust roots.
    Root,
    /// The key that signs models.
    Release,
    /// The key that signs offers and the time.
    Rollout,
    /// No key; the trust root is renewed.
    None,
}

/// Runs the command.
///
/// # Errors
/// If files can't be read or written, or the server refuses.
pub fn run(command: &KeyCommand, connection: &Connection) -> Result<ExitCode> {
    let json = connection.json;
    match command {
        KeyCommand::Init {
            dir,
            root_keys,
            threshold,
            life,
        } => {
            let plan = Plan {
                now_ms: now_ms(),
                days: life.days,
                roots: Some((*root_keys, *threshold)),
                min_sequence: None,
            };
            let trust = keys::init(dir, &plan)?;
            if json {
                print_root(dir, &trust)?;
            } else {
                print_line(format!(
                    "Keys are in {}. Keep the root keys and release.key off the server; only rollout.key and trust.bin belong there.",
                    dir.display()
                ))?;
            }
        }
        KeyCommand::Ls { dir } => list(dir, json)?,
        KeyCommand::Rotate(args) => replace(args, false, json)?,
        KeyCommand::Revoke(args) => replace(args, true, json)?,
        KeyCommand::Cosign { dir, key } => conclude(dir, keys::cosign(dir, key)?, json)?,
        KeyCommand::Publish { dir } => publish(dir, connection)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn list(dir: &Path, json: bool) -> Result<()> {
    let trust = keys::read_trust(dir)?;
    let secrets = keys::secrets(dir)?;
    let file = |public: &PublicKey| {
        let secret = secrets.iter().find(|secret| secret.public() == *public)?;
        Some(secret.path.file_name()?.to_string_lossy().into_owned())
    };
    let root = &trust.root;
    let named = root.root.keys.iter().map(|key| ("root", key));
    let named: Vec<_> = named
        .chain([("release", &root.release), ("rollout", &root.rollout)])
        .collect();
    let old: Vec<_> = secrets
        .iter()
        .map(|secret| (secret.public(), secret))
        .filter(|(public, _)| named.iter().all(|(_, key)| *key != public))
        .collect();
    if json {
        let rows = named.iter().map(|(role, key)| {
            serde_json::json!({
                "role": role,
                "public": hex::encode(key),
                "secret_here": file(key).is_some(),
                "file": file(key),
            })
        });
        let old = old.iter().map(|(public, secret)| {
            serde_json::json!({
                "role": "none",
                "public": hex::encode(public),
                "secret_here": true,
                "file": secret.path.file_name().map(|name| name.to_string_lossy()),
            })
        });
        return print_json(&rows.chain(old).collect::<Vec<_>>());
    }
    print_line(format!(
        "trust root version {}, {} of {} root keys sign the next; {}",
        root.version,
        root.root.threshold,
        root.root.keys.len(),
        expiry(root.expires_ms, now_ms())
    ))?;
    let mut table = format::table(&["role", "public key", "secret here"]);
    for (role, key) in &named {
        let here = file(key).unwrap_or_else(|| "no".to_owned());
        table.add_row([(*role).to_owned(), hex::encode(key), here]);
    }
    for (public, secret) in &old {
        let name = secret.path.file_name().unwrap_or_default();
        table.add_row([
            "no longer".to_owned(),
            hex::encode(public),
            name.to_string_lossy().into_owned(),
        ]);
    }
    print_line(table)
}

/// How long a trust root still holds, in words.
fn expiry(expires_ms: u64, now_ms: u64) -> String {
    const DAY_MS: u64 = 24 * 60 * 60 * 1000;
    match expires_ms.checked_sub(now_ms) {
        None => "it has EXPIRED: devices take no model; renew it with `flywheel key rotate none`"
            .to_owned(),
        Some(left) if left < 60 * DAY_MS => format!(
            "it expires in {} days: renew it with `flywheel key rotate none`",
            left / DAY_MS
        ),
        Some(left) => format!("it expires in {} days", left / DAY_MS),
    }
}

fn replace(args: &ReplaceArgs, stolen: bool, json: bool) -> Result<()> {
    let only = args
        .only
        .iter()
        .map(|text| {
            hex::decode(text)
                .ok()
                .and_then(|bytes| bytes.try_into().ok())
                .with_context(|| {
                    format!("--only {text}: a public key is 64 hexadecimal digits, as `flywheel key ls` shows")
                })
        })
        .collect::<Result<Vec<PublicKey>>>()?;
    anyhow::ensure!(
        args.role == Role::Root || (only.is_empty() && args.threshold.is_none()),
        "--only, --root-keys and --threshold go with `root` only"
    );
    let change = match args.role {
        Role::Root => Change::Root(only),
        Role::Release => Change::Release,
        Role::Rollout => Change::Rollout,
        Role::None => Change::Nothing,
    };
    let before = keys::read_trust(&args.dir)?.root.root;
    let plan = Plan {
        now_ms: now_ms(),
        days: args.life.days,
        roots: args.threshold.map(|threshold| {
            let count = args.root_keys.unwrap_or(before.keys.len() as u8);
            (count, threshold)
        }),
        min_sequence: args.min_sequence,
    };
    let outcome = keys::rotate(&args.dir, &change, &plan, &args.key)?;
    conclude(&args.dir, outcome, json)?;
    if json {
        return Ok(());
    }
    print_line(match (args.role, stolen) {
        (Role::Rollout, _) => {
            "The server needs the new rollout key in its key folder before the root is published."
        }
        (Role::Release, true) => {
            "Models that the old key signed are taken by nobody once devices have the new root; promote the model that they should run again, and roll it out."
        }
        (Role::Release, false) => {
            "Promote the champion again with the new key before the next rollout."
        }
        (Role::Root, _) => "Keep the new root keys apart, off the server.",
        (Role::None, _) => "No key was replaced.",
    })
}

fn conclude(dir: &Path, outcome: Outcome, json: bool) -> Result<()> {
    match outcome {
        Outcome::Signed(trust) if json => print_root(dir, &trust),
        Outcome::Signed(trust) => print_line(format!(
            "Version {} of the trust root is signed; publish it with `flywheel key publish --dir {}`.",
            trust.root.version,
            dir.display()
        )),
        Outcome::Partial { version, old, new } if json => print_json(&serde_json::json!({
            "dir": dir,
            "version": version,
            "missing_old": old,
            "missing_new": new,
        })),
        Outcome::Partial { version, old, new } => print_line(format!(
            "Version {version} of the trust root lacks the signatures of {old} old and {new} new root keys. Take {}/trust.bin and trust.partial to where they are and run `flywheel key cosign --dir DIR --key FILE`.",
            dir.display()
        )),
    }
}

fn print_root(dir: &Path, trust: &Trust) -> Result<()> {
    let root = &trust.root;
    print_json(&serde_json::json!({
        "dir": dir,
        "version": root.version,
        "threshold": root.root.threshold,
        "root": root.root.keys.iter().map(hex::encode).collect::<Vec<_>>(),
        "release": hex::encode(root.release),
        "rollout": hex::encode(root.rollout),
        "min_sequence": root.min_sequence,
        "issued_ms": root.issued_ms,
        "expires_ms": root.expires_ms,
    }))
}

/// Hands every root above the server's newest in, in their order.
fn publish(dir: &Path, connection: &Connection) -> Result<()> {
    let client = connection.client()?;
    let newest = keys::read_trust(dir)?;
    let theirs: Vec<RootView> = client.get("/v1/roots")?;
    let have = theirs.last().map_or(0, |root| root.version);
    let mut published = Vec::new();
    for version in have.saturating_add(1)..=newest.root.version {
        let trust = keys::read_version(dir, &newest, version)?;
        let request = RootRequest {
            root_hex: hex::encode(&trust.bytes),
        };
        let view: RootView = client.post("/v1/roots", &request)?;
        published.push(view);
    }
    if connection.json {
        return print_json(&published);
    }
    for root in &published {
        print_line(format!(
            "Version {} of the trust root is published.",
            root.version
        ))?;
    }
    if published.is_empty() {
        print_line(format!(
            "The server has version {have} of the trust root already, and {} has none above it.",
            dir.display()
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_expiry_is_announced() {
        let day = 24 * 60 * 60 * 1000;
        assert!(super::expiry(day, 2 * day).contains("EXPIRED"));
        assert!(super::expiry(9 * day, day).contains("in 8 days: renew"));
        assert_eq!(super::expiry(101 * day, day), "it expires in 100 days");
    }
}
