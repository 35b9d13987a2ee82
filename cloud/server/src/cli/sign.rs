//! `flywheel model export`, `sign` and `publish`: a release key that never meets the server.
//!
//! Beside each manifest stands that of the champion before it, released once more (`FILE.back`), so
//! that devices can go back without the release key.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use flywheel_shared::ids::Digest;
use flywheel_shared::trust::{MAX_BODY, Manifest, Role, sign};

use super::{print_json, print_line};
use crate::api::types::{ManifestView, PromoteRequest};
use crate::keys;

/// Arguments of `flywheel model sign`.
#[derive(Args)]
pub struct SignArgs {
    /// What `flywheel model export` wrote.
    manifest: PathBuf,
    /// File of the release key; `-` reads it from standard input.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// File for the signature.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// What a release asks of devices, where it is to differ from what the server proposes.
#[derive(Args)]
pub struct TermsArgs {
    /// Only devices of this hardware class take it (`hardware` in their configuration).
    #[arg(long, value_name = "CLASS")]
    hardware: Option<String>,
    /// Live frames of the trial.
    #[arg(long, value_name = "N")]
    trial_frames: Option<u32>,
    /// Largest median inference time on trial in microseconds; 0 for no bound.
    #[arg(long, value_name = "US")]
    max_latency_us: Option<u32>,
    /// Smallest mean confidence on trial, 0 to 1; what falls below it and below the live model's is
    /// given up.
    #[arg(long, value_name = "SHARE")]
    min_confidence: Option<f32>,
}

impl TermsArgs {
    /// A manifest under these terms.
    fn apply(&self, body: &[u8]) -> Result<Vec<u8>> {
        let mut manifest = Manifest::recall(&Digest::of(body), body)
            .context("the server's manifest does not decode")?
            .into_inner();
        if let Some(hardware) = &self.hardware {
            manifest.hardware = hardware;
        }
        let trial = &mut manifest.trial;
        trial.frames = self.trial_frames.unwrap_or(trial.frames);
        trial.max_latency_us = self.max_latency_us.unwrap_or(trial.max_latency_us);
        trial.min_confidence = self.min_confidence.unwrap_or(trial.min_confidence);
        ensure!(
            (0.0..=1.0).contains(&trial.min_confidence),
            "--min-confidence is {}; it must be 0 to 1",
            trial.min_confidence
        );
        let mut buffer = [0u8; MAX_BODY];
        let body = postcard::to_slice(&manifest, &mut buffer)
            .context("the manifest does not encode; is the hardware class too long?")?;
        Ok(body.to_vec())
    }
}

/// Writes a manifest to a file.
///
/// # Errors
/// If the server's answer makes no sense, the terms do not, or the file can't be written.
pub fn export(view: &ManifestView, terms: &TermsArgs, out: &Path, json: bool) -> Result<()> {
    let body = hex::decode(&view.manifest_hex).context("the server's manifest is not hex")?;
    let body = terms.apply(&body)?;
    std::fs::write(out, &body).with_context(|| format!("cannot write {}", out.display()))?;
    let back_path = back(out);
    match &view.return_hex {
        Some(hex) => {
            let body = hex::decode(hex).context("the server's manifest for the way back")?;
            std::fs::write(&back_path, body)
        }
        // One of another model must not be signed with this one.
        None if back_path.exists() => std::fs::remove_file(&back_path),
        None => Ok(()),
    }
    .with_context(|| format!("cannot write {}", back_path.display()))?;
    describe(&body, out, json)
}

/// Where the manifest, or the signature, of the way back stands.
fn back(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".back");
    PathBuf::from(name)
}

/// Signs a manifest.
///
/// # Errors
/// If the manifest is none, the key can't be read, or the file can't be written.
pub fn run(args: &SignArgs, json: bool) -> Result<ExitCode> {
    let body = read_manifest(&args.manifest)?;
    let key = keys::read(&args.key)?;
    let write = |body: &[u8], out: &Path| {
        let text = format!("{}\n", hex::encode(sign(Role::Release, &key, body)));
        std::fs::write(out, text).with_context(|| format!("cannot write {}", out.display()))
    };
    write(&body, &args.out)?;
    let way_back = back(&args.manifest);
    if way_back.exists() {
        write(&read_manifest(&way_back)?, &back(&args.out))?;
    }
    describe(&body, &args.manifest, json)?;
    Ok(ExitCode::SUCCESS)
}

/// What `flywheel model publish` hands in.
///
/// # Errors
/// If a file can't be read or is not what it should be.
pub fn request(manifest: &Path, signature: &Path, force: Option<String>) -> Result<PromoteRequest> {
    let way_back = back(manifest);
    let (return_hex, return_signature_hex) = if way_back.exists() {
        let body = hex::encode(read_manifest(&way_back)?);
        (Some(body), Some(read_signature(&back(signature))?))
    } else {
        (None, None)
    };
    Ok(PromoteRequest {
        manifest_hex: hex::encode(read_manifest(manifest)?),
        signature_hex: read_signature(signature)?,
        return_hex,
        return_signature_hex,
        force,
    })
}

/// A signature as hexadecimal text.
fn read_signature(path: &Path) -> Result<String> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let bytes = hex::decode(text.trim()).unwrap_or_default();
    ensure!(
        bytes.len() == 64,
        "{} is not a signature: expected 128 hexadecimal digits, as `flywheel model sign` writes",
        path.display()
    );
    Ok(hex::encode(bytes))
}

fn read_manifest(path: &Path) -> Result<Vec<u8>> {
    let body = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    decode(&body, path)?;
    Ok(body)
}

/// The manifest, so that nothing else is signed by mistake.
fn decode<'a>(body: &'a [u8], path: &Path) -> Result<Manifest<'a>> {
    ensure!(
        body.len() <= MAX_BODY,
        "{} is no manifest: it is longer than {MAX_BODY} bytes",
        path.display()
    );
    let manifest = Manifest::recall(&Digest::of(body), body)
        .with_context(|| format!("{} is no manifest", path.display()))?
        .into_inner();
    manifest
        .legal()
        .with_context(|| path.display().to_string())?;
    Ok(manifest)
}

/// Says what a manifest lets devices do, to those who sign it.
fn describe(body: &[u8], path: &Path, json: bool) -> Result<()> {
    let manifest = decode(body, path)?;
    let digest = Digest::of(body);
    if json {
        let parts: Vec<_> = manifest
            .parts
            .iter()
            .map(|part| {
                serde_json::json!({
                    "kind": format!("{:?}", part.kind),
                    "bytes": part.len,
                    "sha256": part.digest.to_string(),
                })
            })
            .collect();
        let deltas: Vec<_> = manifest
            .deltas
            .iter()
            .map(|delta| {
                serde_json::json!({
                    "kind": format!("{:?}", delta.part),
                    "bytes": delta.len,
                    "way": delta.codec,
                    "base": delta.base.to_string(),
                })
            })
            .collect();
        return print_json(&serde_json::json!({
            "digest": digest.to_string(),
            "name": manifest.name,
            "sequence": manifest.sequence,
            "hardware": manifest.hardware,
            "expires_ms": manifest.expires_ms,
            "parts": parts,
            "deltas": deltas,
        }));
    }
    print_line(format!(
        "manifest {digest}: {} release {} for hardware `{}`, {} parts, {} deltas",
        manifest.name,
        manifest.sequence,
        manifest.hardware,
        manifest.parts.len(),
        manifest.deltas.len()
    ))?;
    for part in &manifest.parts {
        print_line(format!(
            "  {:?}: {} bytes, SHA-256 {}",
            part.kind, part.len, part.digest
        ))?;
        for delta in manifest.deltas.iter().filter(|d| d.part == part.kind) {
            print_line(format!(
                "    or {} bytes for who has {}",
                delta.len, delta.base
            ))?;
        }
    }
    Ok(())
}
