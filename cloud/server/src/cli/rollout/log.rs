//! The rollout log from the operator's chair. It is checked here, with a key that the operator
//! trusts, since a server that was broken into would say that all is well.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::{print_json, print_line};
use crate::cli::{EXIT_NEGATIVE, format};
use crate::client::Client;
use crate::service::rollouts::log::{Entry, Line, Verifier};

/// Lines asked for at a time.
const PAGE: u64 = 1000;

/// Arguments of `flywheel rollout log`.
#[derive(Args)]
pub struct LogArgs {
    /// Only this rollout.
    #[arg(long, value_name = "NUMBER")]
    rollout: Option<u64>,
    /// Check every line: signatures, digests, order. Exit code 3 if it is not what was written.
    #[arg(long)]
    verify: bool,
    /// Folder with trust.bin, whose rollout key is believed.
    #[arg(long, env = "FLYWHEEL_KEYS", value_name = "DIR")]
    keys: Option<PathBuf>,
    /// A public key that was the rollout key once; may be given several times.
    #[arg(long, value_name = "HEX")]
    key: Vec<String>,
    /// A digest that an earlier --verify printed: the line must still be there.
    #[arg(long, value_name = "DIGEST")]
    contains: Option<String>,
}

pub(super) fn run(args: &LogArgs, client: &Client, json: bool) -> Result<ExitCode> {
    let mut lines: Vec<Line> = Vec::new();
    loop {
        let from = lines.len() as u64;
        let page: Vec<Line> = client.get(&format!("/v1/rollouts/log?from={from}&limit={PAGE}"))?;
        let last = (page.len() as u64) < PAGE;
        lines.extend(page);
        if last {
            break;
        }
    }
    if args.verify {
        return verify(args, &lines, json);
    }
    let mut entries = Vec::new();
    for line in &lines {
        let entry: Entry = serde_json::from_str(&line.body)
            .context("the server's log does not decode; check it with --verify")?;
        if args.rollout.is_none_or(|number| number == entry.rollout) {
            entries.push(entry);
        }
    }
    if json {
        return print_json(&entries).map(|()| ExitCode::SUCCESS);
    }
    for entry in &entries {
        print_line(format!(
            "{:>5} {} rollout {} {}: {}",
            entry.number,
            format::utc(entry.at_ms),
            entry.rollout,
            entry.by,
            entry.event.words()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(args: &LogArgs, lines: &[Line], json: bool) -> Result<ExitCode> {
    let mut keys = args.key.clone();
    if let Some(dir) = &args.keys {
        keys.push(super::trusted_key(dir)?);
    }
    if keys.is_empty() {
        bail!("--verify needs a key to believe: --keys DIR (a folder with trust.bin) or --key HEX");
    }
    let mut verifier = Verifier::new(keys);
    let mut contains = args.contains.is_none();
    let mut wrong = None;
    for line in lines {
        if let Err(error) = verifier.line(line) {
            wrong = Some(error.to_string());
            break;
        }
        contains |= args.contains.as_deref() == Some(verifier.seen().1);
    }
    if wrong.is_none() && !contains {
        wrong =
            Some("the line with the digest of --contains is gone: the end was cut off".to_owned());
    }
    let (count, digest) = verifier.seen();
    if json {
        print_json(&serde_json::json!({
            "lines": count,
            "digest": digest,
            "valid": wrong.is_none(),
            "error": wrong,
        }))?;
    } else {
        match &wrong {
            None => print_line(format!(
                "{count} lines, each signed and in its place; note the digest of the last to see later that none was cut off: {digest}"
            ))?,
            Some(error) => print_line(format!("NOT what was written: {error}"))?,
        }
    }
    Ok(match wrong {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::from(EXIT_NEGATIVE),
    })
}
