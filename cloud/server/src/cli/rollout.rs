//! `flywheel rollout`: plan, start, steer and watch rollouts, and read their log.

mod log;
mod watch;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use super::format::{self, short};
use super::{Connection, EXIT_NEGATIVE, print_json, print_line};
use crate::api::types::{ActRequest, PlanView, RolloutAction, RolloutRequest, RolloutView};
use crate::client::Client;

/// A device list longer than this is cut in tables.
const MOST_ROWS: usize = 50;

/// Parts of `flywheel rollout`.
#[derive(Subcommand)]
pub enum RolloutCommand {
    /// Offer a promoted model to devices: canaries first, then wave by wave.
    #[command(
        after_help = "Examples:\n  flywheel rollout start 9c41d0 --policy canary\n  flywheel rollout start 9c41d0 --to north --policy night.toml\n  flywheel rollout start champion --to label.site=gate,hardware=pi4,healthy\n\nA policy file:\n  name = \"night\"\n  canary = 2\n  waves = [\"10%\", \"50%\"]\n  offer_rate = 100\n  [gate]\n  min_confirmed = 0.95\n  max_failed_share = 0.02\n  min_answers = 20\n  soak_s = 600"
    )]
    Start(StartArgs),
    /// Show what `start` would do, without doing it.
    #[command(after_help = "Example: flywheel rollout plan 9c41d0 --to north --policy night.toml")]
    Plan(StartArgs),
    /// List rollouts.
    #[command(after_help = "Example: flywheel rollout ls")]
    Ls,
    /// Show a rollout; the latest if no number is given.
    #[command(after_help = "Example: flywheel rollout status 3")]
    Status {
        /// Its number.
        id: Option<u64>,
    },
    /// Watch a rollout until it ends; exit code 3 unless every device confirmed.
    #[command(after_help = "Example: flywheel rollout watch")]
    Watch {
        /// Its number; the latest if absent.
        id: Option<u64>,
    },
    /// Offer nothing for now; too many failures still halt it.
    #[command(after_help = "Example: flywheel rollout pause 3 --reason 'storm at the coast'")]
    Pause(ActArgs),
    /// Go on after a pause.
    #[command(after_help = "Example: flywheel rollout resume 3")]
    Resume {
        /// Its number.
        id: u64,
        /// Why.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Stop for good; devices that have confirmed keep the model unless they are to return.
    #[command(after_help = "Example: flywheel rollout abort 3 --reason 'wrong model' --return")]
    Abort {
        /// Which, and why.
        #[command(flatten)]
        act: ActArgs,
        /// Offer the model before to the devices that took this one.
        #[arg(long = "return")]
        back: bool,
    },
    /// Take a device out; a failure of it no longer counts.
    #[command(after_help = "Example: flywheel rollout exclude 3 cam7 --reason 'lens broken'")]
    Exclude {
        /// Number of the rollout.
        id: u64,
        /// The device.
        device: String,
        /// Why; goes into the rollout log.
        #[arg(long)]
        reason: String,
    },
    /// Open the next wave whatever its gate says, or offer the model to one device now.
    #[command(
        after_help = "Examples:\n  flywheel rollout force 3 --reason 'soaked by hand'\n  flywheel rollout force 3 --device cam7 --reason 'on the bench'"
    )]
    Force {
        /// Which, and why.
        #[command(flatten)]
        act: ActArgs,
        /// Only this device, before its turn.
        #[arg(long)]
        device: Option<String>,
    },
    /// Show everything that anyone did and the controller decided; --verify checks it.
    #[command(
        after_help = "Examples:\n  flywheel rollout log --rollout 3\n  flywheel rollout log --verify --keys keys/"
    )]
    Log(log::LogArgs),
}

/// Arguments of `flywheel rollout start` and `plan`.
#[derive(Args)]
pub struct StartArgs {
    /// The model: its id, the beginning of it, or `champion`.
    model: String,
    /// Devices: a group, or terms such as label.site=north,hardware=pi4,healthy; all if absent.
    #[arg(long, value_name = "GROUP|SELECTOR", alias = "group")]
    to: Option<String>,
    /// `canary` (one device, then the rest), `all`, or a TOML file.
    #[arg(long, default_value = "canary", value_name = "FILE|canary|all")]
    policy: String,
}

/// A rollout and why something is done to it.
#[derive(Args)]
pub struct ActArgs {
    /// Its number.
    id: u64,
    /// Why; goes into the rollout log.
    #[arg(long)]
    reason: String,
}

impl StartArgs {
    fn request(self) -> Result<RolloutRequest> {
        let named = matches!(self.policy.as_str(), "canary" | "all");
        let text = if named {
            None
        } else {
            let path = Path::new(&self.policy);
            Some(std::fs::read_to_string(path).with_context(|| {
                format!(
                    "--policy {}: write canary, all or a TOML file",
                    path.display()
                )
            })?)
        };
        Ok(RolloutRequest {
            model: self.model,
            to: self.to,
            policy: named.then_some(self.policy),
            policy_toml: text,
            by: operator(),
        })
    }
}

/// Who does it, for the log: nothing hangs on it but that people find each other.
fn operator() -> Option<String> {
    std::env::var("USER").ok().filter(|name| !name.is_empty())
}

/// Runs a rollout command.
///
/// # Errors
/// If the server can't be reached or refuses.
pub fn run(command: RolloutCommand, connection: &Connection) -> Result<ExitCode> {
    let client = connection.client()?;
    let act = |id: u64, action: RolloutAction, request: ActRequest| {
        let request = ActRequest {
            by: operator(),
            ..request
        };
        let path = format!("/v1/rollouts/{id}/{}", action.name());
        let rollout: RolloutView = client.post(&path, &request)?;
        show(connection, &rollout)
    };
    match command {
        RolloutCommand::Start(args) => {
            let rollout: RolloutView = client.post("/v1/rollouts", &args.request()?)?;
            show(connection, &rollout)?;
        }
        RolloutCommand::Plan(args) => {
            let plan: PlanView = client.post("/v1/rollouts/plan", &args.request()?)?;
            show_plan(connection, &plan)?;
        }
        RolloutCommand::Ls => {
            let rollouts: Vec<RolloutView> = client.get("/v1/rollouts")?;
            if connection.json {
                return print_json(&rollouts).map(|()| ExitCode::SUCCESS);
            }
            let mut table =
                format::table(&["rollout", "model", "to", "policy", "state", "devices"]);
            for rollout in &rollouts {
                table.add_row([
                    rollout.id.to_string(),
                    short(&rollout.model).to_owned(),
                    rollout.to.clone(),
                    rollout.policy.clone(),
                    rollout.state.clone(),
                    tally(rollout),
                ]);
            }
            print_line(table)?;
        }
        RolloutCommand::Status { id } => show(connection, &find(&client, id, 0, false)?)?,
        RolloutCommand::Watch { id } => {
            let rollout = watch::until_it_ends(&client, id, connection.json)?;
            show(connection, &rollout)?;
            if rollout.state != "confirmed" {
                return Ok(ExitCode::from(EXIT_NEGATIVE));
            }
        }
        RolloutCommand::Pause(ActArgs { id, reason }) => {
            let request = ActRequest {
                reason,
                ..ActRequest::default()
            };
            act(id, RolloutAction::Pause, request)?;
        }
        RolloutCommand::Resume { id, reason } => {
            let request = ActRequest {
                reason,
                ..ActRequest::default()
            };
            act(id, RolloutAction::Resume, request)?;
        }
        RolloutCommand::Abort {
            act: ActArgs { id, reason },
            back,
        } => {
            let request = ActRequest {
                reason,
                back: Some(back),
                ..ActRequest::default()
            };
            act(id, RolloutAction::Abort, request)?;
        }
        RolloutCommand::Exclude { id, device, reason } => {
            let request = ActRequest {
                reason,
                device: Some(device),
                ..ActRequest::default()
            };
            act(id, RolloutAction::Exclude, request)?;
        }
        RolloutCommand::Force {
            act: ActArgs { id, reason },
            device,
        } => {
            let request = ActRequest {
                reason,
                device,
                ..ActRequest::default()
            };
            act(id, RolloutAction::Force, request)?;
        }
        RolloutCommand::Log(args) => return log::run(&args, &client, connection.json),
    }
    Ok(ExitCode::SUCCESS)
}

/// A rollout by number, or the latest; waits up to `wait_ms` for it to change.
fn find(client: &Client, id: Option<u64>, wait_ms: u32, brief: bool) -> Result<RolloutView> {
    let id = id.map_or("latest".to_owned(), |id| id.to_string());
    Ok(client.get(&format!(
        "/v1/rollouts/{id}?wait_ms={wait_ms}&brief={brief}"
    ))?)
}

/// How many devices are at which stage.
pub fn tally(rollout: &RolloutView) -> String {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for wave in &rollout.waves {
        for (state, count) in &wave.states {
            *counts.entry(state).or_default() += count;
        }
    }
    words(&counts)
}

fn words<K: AsRef<str>>(counts: &BTreeMap<K, u64>) -> String {
    let counts = counts
        .iter()
        .map(|(state, count)| format!("{count} {}", state.as_ref()));
    counts.collect::<Vec<_>>().join(", ")
}

/// What a rollout is, and where it stands.
fn headline(rollout: &RolloutView) -> String {
    let reason = rollout.reason.as_deref();
    let waits = rollout
        .waits_for
        .as_deref()
        .filter(|_| rollout.state == "running");
    let mut line = format!(
        "rollout {} of model {} (release {}) to {}, {}: {}",
        rollout.id,
        short(&rollout.model),
        rollout.sequence,
        rollout.to,
        rollout.policy,
        rollout.state
    );
    if let Some(reason) = reason {
        line += &format!(", {reason}");
    }
    if let Some(waits) = waits {
        line += &format!(", waits for: {waits}");
    }
    if rollout.returning > 0 {
        line += &format!(
            "; {} devices are on their way back to the model before, {} of them away",
            rollout.returning, rollout.returning_away
        );
    }
    line
}

fn show(connection: &Connection, rollout: &RolloutView) -> Result<()> {
    if connection.json {
        return print_json(rollout);
    }
    print_line(headline(rollout))?;
    let mut table = format::table(&["wave", "devices", ""]);
    for (number, wave) in rollout.waves.iter().enumerate() {
        let name = if number == 0 {
            "canary".to_owned()
        } else {
            number.to_string()
        };
        table.add_row([name, wave.devices.to_string(), words(&wave.states)]);
    }
    print_line(table)?;
    if rollout.devices.len() <= MOST_ROWS {
        devices(&rollout.devices)
    } else {
        devices(&rollout.failures)
    }
}

fn devices(devices: &BTreeMap<String, crate::api::types::ProgressView>) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let mut table = format::table(&["device", "state", "reason"]);
    for (device, progress) in devices.iter().take(MOST_ROWS) {
        table.add_row([
            device.clone(),
            progress.state.clone(),
            progress.detail.clone().unwrap_or_default(),
        ]);
    }
    print_line(table)?;
    if devices.len() > MOST_ROWS {
        print_line(format!("and {} more", devices.len() - MOST_ROWS))?;
    }
    Ok(())
}

fn show_plan(connection: &Connection, plan: &PlanView) -> Result<()> {
    if connection.json {
        return print_json(plan);
    }
    let total: usize = plan.waves.iter().map(Vec::len).sum();
    print_line(format!(
        "model {} (release {}) would go to {total} devices ({}), in at least {} s; {}",
        short(&plan.model),
        plan.sequence,
        plan.to,
        plan.least_seconds,
        match plan.back {
            Some(back) => format!("the model before would come back as release {back}"),
            None => "there is no model before to go back to".to_owned(),
        }
    ))?;
    let mut table = format::table(&["wave", "devices", ""]);
    for (number, wave) in plan.waves.iter().enumerate() {
        let some: Vec<&str> = wave.iter().take(8).map(String::as_str).collect();
        let more = wave.len() - some.len();
        table.add_row([
            if number == 0 {
                "canary".to_owned()
            } else {
                number.to_string()
            },
            wave.len().to_string(),
            some.join(", ")
                + &if more > 0 {
                    format!(" and {more} more")
                } else {
                    String::new()
                },
        ]);
    }
    print_line(table)?;
    if !plan.away.is_empty() {
        print_line(format!("{} of them can't be reached now", plan.away.len()))?;
    }
    let mut reasons: BTreeMap<&str, u64> = BTreeMap::new();
    for skipped in &plan.skipped {
        *reasons.entry(&skipped.why).or_default() += 1;
    }
    for (why, count) in reasons {
        print_line(format!("left out: {count} devices, because each {why}"))?;
    }
    Ok(())
}

/// Where the keys are that a log is checked with.
fn trusted_key(keys: &Path) -> Result<String> {
    Ok(hex::encode(crate::keys::read_trust(keys)?.root.rollout))
}
