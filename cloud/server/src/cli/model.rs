//! `flywheel train`, `eval` and `model`: from a dataset to a signed champion.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use device_engine::package::Package;
use flywheel_shared::trust::{PartKind, PublicKey, Role, sign};
use indicatif::{ProgressBar, ProgressStyle};

use super::format::{self, percent, short};
use super::sign::{SignArgs, TermsArgs};
use super::{Connection, EXIT_NEGATIVE, print_json, print_line};
use crate::api::types::{
    AddRequest, BlobView, EvalRequest, JobView, ManifestView, ModelView, PartName, PartRef,
    PromoteRequest, RootView, TrainRequest,
};
use crate::client::{Client, fresh_key};
use crate::keys;

/// Arguments of `flywheel train`.
#[derive(Args)]
#[command(after_help = "Example: flywheel train --dataset 3fa92c --seed 7")]
pub struct TrainArgs {
    /// Dataset to train on: its id or the beginning of it.
    #[arg(long)]
    dataset: String,
    /// Seed of initialisation, sampling and augmentation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Optimiser steps; chosen from the size of the dataset if absent.
    #[arg(long)]
    steps: Option<u32>,
    /// Start from fresh weights instead of the champion's.
    #[arg(long)]
    scratch: bool,
    /// Fit the classifier alone, on the champion's features: seconds instead of minutes, and a
    /// small update for devices.
    #[arg(long, conflicts_with = "scratch")]
    head: bool,
}

/// Arguments of `flywheel eval`.
#[derive(Args)]
#[command(after_help = "Example: flywheel eval 9c41d0 --rare deer --rare children")]
pub struct EvalArgs {
    /// The model: its id or the beginning of it.
    model: String,
    /// A class whose recall counts into `rare recall`; may be given several times.
    #[arg(long)]
    rare: Vec<String>,
}

/// Parts of `flywheel model`.
#[derive(Subcommand)]
pub enum ModelCommand {
    /// Make a package of an ONNX file; needs no server.
    Import(Box<super::import::ImportArgs>),
    /// Hand in a package that `flywheel model import` wrote; it can be judged, promoted and rolled
    /// out like a model that was trained here.
    #[command(after_help = "Example: flywheel model add face/")]
    Add {
        /// Folder of the package.
        dir: PathBuf,
        /// Name of the model; that of the package if absent.
        #[arg(long)]
        name: Option<String>,
    },
    /// List models.
    #[command(after_help = "Example: flywheel model ls")]
    Ls,
    /// Show a model with its evaluation and the gate's verdict.
    #[command(after_help = "Example: flywheel model show 9c41d0")]
    Show {
        /// Its id or the beginning of it.
        id: String,
    },
    /// Write a model's manifest to a file, to be signed on another machine.
    #[command(
        after_help = "Example: flywheel model export 9c41d0 --out manifest.bin --hardware orin"
    )]
    Export {
        /// Its id or the beginning of it.
        id: String,
        /// File for the manifest.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// What it asks of devices.
        #[command(flatten)]
        terms: TermsArgs,
    },
    /// Sign an exported manifest with the release key; needs no server.
    #[command(
        after_help = "Example: flywheel model sign manifest.bin --key release.key --out manifest.sig\n\nThe key may come on standard input: pass show release | flywheel model sign manifest.bin --key - --out manifest.sig"
    )]
    Sign(SignArgs),
    /// Hand in a manifest that was signed elsewhere and make its model the champion.
    #[command(
        after_help = "Example: flywheel model publish 9c41d0 --manifest manifest.bin --signature manifest.sig"
    )]
    Publish {
        /// Its id or the beginning of it.
        id: String,
        /// The manifest that was signed.
        #[arg(long, value_name = "FILE")]
        manifest: PathBuf,
        /// What `flywheel model sign` wrote.
        #[arg(long, value_name = "FILE")]
        signature: PathBuf,
        /// Promote although the gate did not pass, with the reason.
        #[arg(long, value_name = "REASON")]
        force: Option<String>,
    },
    /// Sign a model with the release key and make it the champion.
    #[command(after_help = "Example: flywheel model promote 9c41d0 --keys keys/")]
    Promote {
        /// Its id or the beginning of it.
        id: String,
        /// Folder with the release key; the key stays on this machine.
        #[arg(long, env = "FLYWHEEL_KEYS", value_name = "DIR")]
        keys: PathBuf,
        /// Promote although the gate did not pass, with the reason.
        #[arg(long, value_name = "REASON")]
        force: Option<String>,
    },
}

/// Trains a candidate and shows it.
///
/// # Errors
/// If the server can't be reached, or the run fails.
pub fn train(args: &TrainArgs, connection: &Connection) -> Result<ExitCode> {
    let client = connection.client()?;
    let job: JobView = client.post(
        "/v1/train",
        &TrainRequest {
            dataset: args.dataset.clone(),
            seed: Some(args.seed),
            steps: args.steps,
            scratch: Some(args.scratch),
            head: Some(args.head),
            key: Some(fresh_key()?),
        },
    )?;
    let job = follow(&client, &job.id, &bar("train")?)?;
    show_result(&client, &job, connection)
}

/// Judges a model and shows the verdict.
///
/// # Errors
/// If the server can't be reached, or there is nothing to judge by.
pub fn eval(args: &EvalArgs, connection: &Connection) -> Result<ExitCode> {
    let client = connection.client()?;
    let job: JobView = client.post(
        "/v1/eval",
        &EvalRequest {
            model: args.model.clone(),
            rare: Some(args.rare.clone()),
            key: Some(fresh_key()?),
        },
    )?;
    let job = follow(&client, &job.id, &bar("eval")?)?;
    show_result(&client, &job, connection)
}

/// A progress bar for a job on the server.
///
/// # Errors
/// If the template is wrong, which a test rules out.
pub fn bar(name: &'static str) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix:>10} {bar:36} {pos}/{len} {msg} {eta}")
        .context("the progress bar's template")?;
    Ok(ProgressBar::new(1).with_style(style).with_prefix(name))
}

/// Waits for a job on the server, drawing its progress.
///
/// # Errors
/// If the job failed, or the server is gone for longer than the client's patience.
pub fn follow(client: &Client, id: &str, bar: &ProgressBar) -> Result<JobView> {
    loop {
        // The server holds the answer back until something changes or the wait is over.
        let job: JobView = client.get(&format!("/v1/jobs/{id}?wait_ms=500"))?;
        bar.set_length(job.steps.max(1));
        bar.set_position(job.step);
        bar.set_message(job.message.clone());
        match job.state.as_str() {
            "done" => {
                bar.finish_and_clear();
                return Ok(job);
            }
            "failed" => {
                bar.abandon();
                bail!(
                    "{} failed: {}",
                    job.kind,
                    job.error.unwrap_or_else(|| "no reason given".to_owned())
                );
            }
            _ => {}
        }
    }
}

/// Waits a little less than a job takes between two looks at something that has no event.
pub const POLL: Duration = Duration::from_millis(150);

fn show_result(client: &Client, job: &JobView, connection: &Connection) -> Result<ExitCode> {
    let id = job
        .model
        .as_deref()
        .context("the server names no model for the finished job")?;
    let model: ModelView = client.get(&format!("/v1/models/{id}"))?;
    show(connection, &model)?;
    Ok(match &model.gate {
        Some(gate) if !gate.passed => ExitCode::from(EXIT_NEGATIVE),
        _ => ExitCode::SUCCESS,
    })
}

/// Runs the command.
///
/// # Errors
/// If the server can't be reached or refuses.
pub fn run(command: ModelCommand, connection: &Connection) -> Result<ExitCode> {
    if let ModelCommand::Import(args) = &command {
        return super::import::run(args, connection.json);
    }
    if let ModelCommand::Sign(args) = &command {
        return super::sign::run(args, connection.json);
    }
    let client = connection.client()?;
    match command {
        // Need no client, so they are gone by now.
        ModelCommand::Import(_) | ModelCommand::Sign(_) => {}
        ModelCommand::Export { id, out, terms } => {
            let manifest: ManifestView = client.get(&format!("/v1/models/{id}/manifest"))?;
            super::sign::export(&manifest, &terms, &out, connection.json)?;
        }
        ModelCommand::Publish {
            id,
            manifest,
            signature,
            force,
        } => {
            let request = super::sign::request(&manifest, &signature, force)?;
            let model: ModelView = client.post(&format!("/v1/models/{id}/promote"), &request)?;
            show(connection, &model)?;
        }
        ModelCommand::Ls => {
            let models: Vec<ModelView> = client.get("/v1/models")?;
            if connection.json {
                return print_json(&models).map(|()| ExitCode::SUCCESS);
            }
            let mut table = format::table(&[
                "model", "release", "from", "accuracy", "rare", "ece", "gate", "",
            ]);
            for model in &models {
                let report = model.report.as_ref();
                table.add_row([
                    short(&model.id).to_owned(),
                    model
                        .sequence
                        .map(|sequence| sequence.to_string())
                        .unwrap_or_default(),
                    match &model.name {
                        Some(name) => name.clone(),
                        None => short(&model.dataset).to_owned(),
                    },
                    report
                        .map(|report| percent(report.accuracy))
                        .unwrap_or_default(),
                    report
                        .and_then(|report| report.rare_recall)
                        .map(percent)
                        .unwrap_or_default(),
                    report
                        .map(|report| format!("{:.3}", report.ece))
                        .unwrap_or_default(),
                    match &model.gate {
                        Some(gate) if gate.passed => "passed".to_owned(),
                        Some(_) => "refused".to_owned(),
                        None => String::new(),
                    },
                    if model.champion { "champion" } else { "" }.to_owned(),
                ]);
            }
            print_line(table)?;
        }
        ModelCommand::Add { dir, name } => {
            show(connection, &add(&client, &dir, name)?)?;
        }
        ModelCommand::Show { id } => {
            show(connection, &client.get(&format!("/v1/models/{id}"))?)?;
        }
        ModelCommand::Promote { id, keys, force } => {
            let model = promote(&client, &id, &keys, force)?;
            show(connection, &model)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Hands in the parts of a package.
///
/// # Errors
/// If the folder holds no package, or the server refuses it.
pub fn add(client: &Client, dir: &std::path::Path, name: Option<String>) -> Result<ModelView> {
    let package = Package::read(dir)?;
    let mut parts = Vec::new();
    for (kind, bytes) in package.parts()? {
        let stored: BlobView = client.put_bytes("/v1/blobs", &bytes)?;
        let kind = match kind {
            PartKind::Onnx => PartName::Onnx,
            PartKind::BurnRecord => PartName::Record,
            PartKind::Spec => PartName::Spec,
            PartKind::Scores => PartName::Scores,
            PartKind::Golden => PartName::Golden,
        };
        parts.push(PartRef {
            kind,
            digest: stored.digest,
        });
    }
    let name = name.unwrap_or(package.name);
    Ok(client.post("/v1/models", &AddRequest { name, parts })?)
}

/// Signs a model's manifest here and hands in the signature; the release key never travels.
///
/// # Errors
/// If the key can't be read, or the server refuses (the gate did not pass, say).
pub fn promote(
    client: &Client,
    id: &str,
    keys: &std::path::Path,
    force: Option<String>,
) -> Result<ModelView> {
    // The server knows which one devices believe now; a wrong answer only makes it refuse.
    let roots: Vec<RootView> = client.get("/v1/roots")?;
    let newest = roots.last().context("the server has no trust root")?;
    let public: PublicKey = hex::decode(&newest.release)
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .context("the server's release key is not hex")?;
    let key = keys::find(keys, "release", &public)?;
    let manifest: ManifestView = client.get(&format!("/v1/models/{id}/manifest"))?;
    let body = hex::decode(&manifest.manifest_hex).context("the server's manifest is not hex")?;
    let signature = sign(Role::Release, &key, &body);
    // The way back is signed now, so that a halt at night needs no release key.
    let back = manifest.return_hex.as_deref().map(hex::decode).transpose();
    let back = back.context("the server's manifest for the way back is not hex")?;
    let back_signature = back.map(|body| hex::encode(sign(Role::Release, &key, &body)));
    Ok(client.post(
        &format!("/v1/models/{id}/promote"),
        &PromoteRequest {
            manifest_hex: manifest.manifest_hex,
            signature_hex: hex::encode(signature),
            return_hex: manifest.return_hex,
            return_signature_hex: back_signature,
            force,
        },
    )?)
}

fn show(connection: &Connection, model: &ModelView) -> Result<()> {
    if connection.json {
        return print_json(model);
    }
    print_line(format!(
        "model {}{}{}",
        short(&model.id),
        model
            .sequence
            .map(|sequence| format!(", release {sequence}"))
            .unwrap_or_default(),
        if model.champion { ", champion" } else { "" }
    ))?;
    if let Some(name) = &model.name {
        print_line(format!("{name}, made elsewhere"))?;
    } else {
        print_line(format!(
            "from dataset {}, seed {}, {} steps, starting at {}",
            short(&model.dataset),
            model.seed,
            model.steps,
            model
                .parent
                .as_deref()
                .map_or("fresh weights".to_owned(), |parent| format!(
                    "model {}",
                    short(parent)
                ))
        ))?;
    }
    if let Some(report) = &model.report {
        print_line(format!(
            "{} items: accuracy {}, balanced {}, rare {}, calibration error {:.3}, {:.0} µs an inference",
            report.items,
            percent(report.accuracy),
            percent(report.balanced_accuracy),
            report.rare_recall.map_or("–".to_owned(), percent),
            report.ece,
            report.latency_us
        ))?;
        let mut table = format::table(&["class", "recall"]);
        for (class, recall) in &report.recall {
            table.add_row([class.clone(), percent(*recall)]);
        }
        print_line(table)?;
    }
    if let Some(gate) = &model.gate {
        print_line(format!(
            "gate: {} (against {})",
            if gate.passed { "passed" } else { "refused" },
            gate.champion.as_deref().map_or("no champion", short)
        ))?;
        for reason in &gate.reasons {
            print_line(format!("  {reason}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_bar_has_a_template() {
        assert!(super::bar("train").is_ok());
    }
}
