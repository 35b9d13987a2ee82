//! `flywheel dataset`: versions of what is labelled, and pictures brought in from outside.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use super::format::{self, short};
use super::{Connection, print_json, print_line};
use crate::api::types::{DatasetDiff, DatasetView, FreezeRequest, ItemView, PSEUDO_ABOVE};
use crate::client::Client;

/// Parts of `flywheel dataset`.
#[derive(Subcommand)]
pub enum DatasetCommand {
    /// Freeze everything labelled now into an immutable version.
    #[command(after_help = "Example: flywheel dataset freeze --seed 7")]
    Freeze {
        /// Seed of the split into training and validation.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Take in unlabelled pictures whose class the champion gives at least this probability;
        /// 1 takes none.
        #[arg(long, value_name = "PROBABILITY", default_value_t = PSEUDO_ABOVE)]
        pseudo_above: f32,
    },
    /// List versions.
    #[command(after_help = "Example: flywheel dataset ls")]
    Ls,
    /// Show a version.
    #[command(after_help = "Example: flywheel dataset show 3fa92c")]
    Show {
        /// Its id or the beginning of it.
        id: String,
    },
    /// What changed between two versions.
    #[command(after_help = "Example: flywheel dataset diff 3fa92c 77b01e")]
    Diff {
        /// The first.
        from: String,
        /// The second.
        to: String,
    },
    /// Import labelled pictures: a folder with one folder of pictures for each class.
    #[command(after_help = "Example: flywheel dataset import golden/ --split golden")]
    Import {
        /// The folder.
        folder: PathBuf,
        /// Which set they join.
        #[arg(long, value_enum)]
        split: SplitArg,
    },
}

/// A set of imported pictures.
#[derive(Clone, Copy, ValueEnum)]
pub enum SplitArg {
    /// Trained on.
    Train,
    /// Judged by, never trained on.
    Golden,
    /// Score parameters are fitted on it.
    Calibration,
}

impl SplitArg {
    fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Golden => "golden",
            Self::Calibration => "calibration",
        }
    }
}

/// Runs the command.
///
/// # Errors
/// If the server can't be reached or refuses.
pub fn run(command: DatasetCommand, connection: &Connection) -> Result<ExitCode> {
    let client = connection.client()?;
    match command {
        DatasetCommand::Freeze { seed, pseudo_above } => {
            let request = FreezeRequest {
                seed: Some(seed),
                pseudo_above: Some(pseudo_above),
            };
            let dataset: DatasetView = client.post("/v1/datasets", &request)?;
            show(connection, &dataset)?;
        }
        DatasetCommand::Ls => {
            let datasets: Vec<DatasetView> = client.get("/v1/datasets")?;
            if connection.json {
                return print_json(&datasets).map(|()| ExitCode::SUCCESS);
            }
            let mut table = format::table(&[
                "dataset",
                "train",
                "validation",
                "pseudo",
                "classes",
                "parent",
            ]);
            for dataset in &datasets {
                table.add_row([
                    short(&dataset.id).to_owned(),
                    dataset.train.to_string(),
                    dataset.validation.to_string(),
                    dataset.pseudo.to_string(),
                    dataset.classes.len().to_string(),
                    dataset
                        .parent
                        .as_deref()
                        .map(short)
                        .unwrap_or_default()
                        .to_owned(),
                ]);
            }
            print_line(table)?;
        }
        DatasetCommand::Show { id } => {
            show(connection, &client.get(&format!("/v1/datasets/{id}"))?)?;
        }
        DatasetCommand::Diff { from, to } => {
            let diff: DatasetDiff = client.get(&format!("/v1/datasets/{from}/diff/{to}"))?;
            if connection.json {
                return print_json(&diff).map(|()| ExitCode::SUCCESS);
            }
            print_line(format!(
                "{} added, {} removed, {} relabelled; new classes: {}",
                diff.added,
                diff.removed,
                diff.relabelled,
                if diff.new_classes.is_empty() {
                    "none".to_owned()
                } else {
                    diff.new_classes.join(", ")
                }
            ))?;
            let mut table = format::table(&["class", "added"]);
            for (class, count) in &diff.added_by_class {
                table.add_row([class.clone(), count.to_string()]);
            }
            print_line(table)?;
        }
        DatasetCommand::Import { folder, split } => {
            let (imported, known) = import(&client, &folder, split)?;
            if connection.json {
                print_json(&serde_json::json!({ "imported": imported, "known": known }))?;
            } else {
                print_line(format!("{imported} imported, {known} known already"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(connection: &Connection, dataset: &DatasetView) -> Result<()> {
    if connection.json {
        return print_json(dataset);
    }
    print_line(format!(
        "dataset {}: {} to train on, {} to validate, {} with pseudo-labels",
        short(&dataset.id),
        dataset.train,
        dataset.validation,
        dataset.pseudo
    ))?;
    let mut table = format::table(&["class", "labelled"]);
    for class in &dataset.classes {
        let count = dataset.by_class.get(class).copied().unwrap_or(0);
        table.add_row([class.clone(), count.to_string()]);
    }
    print_line(table)
}

/// Uploads every picture below `folder`; its class is the name of the folder it lies in.
fn import(client: &Client, folder: &Path, split: SplitArg) -> Result<(u64, u64)> {
    let mut files = Vec::new();
    let classes = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read the folder {}", folder.display()))?;
    for class in classes {
        let class = class.with_context(|| format!("cannot list {}", folder.display()))?;
        if !class.path().is_dir() {
            continue;
        }
        let name = class.file_name().to_string_lossy().into_owned();
        for file in std::fs::read_dir(class.path())
            .with_context(|| format!("cannot read the folder {}", class.path().display()))?
        {
            files.push((name.clone(), file?.path()));
        }
    }
    files.sort();
    if files.is_empty() {
        bail!(
            "{} holds no pictures: expected one folder for each class, with pictures in it",
            folder.display()
        );
    }
    let progress = ProgressBar::new(files.len() as u64).with_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} pictures, {eta} left")
            .context("the progress bar's template")?,
    );
    let (mut imported, mut known) = (0, 0);
    for (class, path) in files {
        let bytes =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let item: ItemView = client
            .put_bytes(
                &format!(
                    "/v1/items?split={}&class={}",
                    split.name(),
                    percent_encode(&class)
                ),
                &bytes,
            )
            .with_context(|| format!("{} was not taken", path.display()))?;
        if item.known {
            known += 1;
        } else {
            imported += 1;
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok((imported, known))
}

/// A class name inside a query.
pub fn percent_encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_escaped() {
        assert_eq!(percent_encode("speed 30/ä"), "speed%2030%2F%C3%A4");
    }
}
