//! `flywheel rollout`, `device` and `audit`: the fleet from the operator's chair.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};

use super::format::{self, bytes, short};
use super::{Connection, EXIT_NEGATIVE, print_json, print_line};
use crate::api::types::{
    AbortRequest, AuditView, DeviceView, RolloutRequest, RolloutView, TokenReply, TokenRequest,
};
use crate::client::Client;
use crate::ingest::broker_files;
use crate::pki::Pki;

/// Parts of `flywheel rollout`.
#[derive(Subcommand)]
pub enum RolloutCommand {
    /// Offer a promoted model to the fleet: one device first, then the rest.
    #[command(after_help = "Example: flywheel rollout start 9c41d0 --policy canary")]
    Start {
        /// The model: its id or the beginning of it.
        model: String,
        /// Group of devices; all if absent.
        #[arg(long)]
        group: Option<String>,
        /// `canary` or `all`.
        #[arg(long, default_value = "canary")]
        policy: String,
    },
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
    /// Stop offering; devices that have confirmed keep the model.
    #[command(after_help = "Example: flywheel rollout abort 3 --reason 'wrong model'")]
    Abort {
        /// Its number.
        id: u64,
        /// Why.
        #[arg(long)]
        reason: String,
    },
}

/// A broker that `flywheel device acl` can set up.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum BrokerKind {
    /// Eclipse Mosquitto, 2.0 or later.
    Mosquitto,
}

/// Parts of `flywheel device`.
#[derive(Subcommand)]
pub enum DeviceCommand {
    /// Make a one-time token with which one device enrols.
    #[command(
        after_help = "Example: flywheel device enroll --device cam7\nthen, on the device: flywheel-agent enroll --url URL --token TOKEN --data DIR"
    )]
    Enroll {
        /// The only id that the token is good for.
        #[arg(long)]
        device: Option<String>,
        /// Group that the device joins.
        #[arg(long)]
        group: Option<String>,
        /// Seconds until the token ends.
        #[arg(long)]
        ttl_s: Option<u64>,
    },
    /// List devices.
    #[command(after_help = "Example: flywheel device ls")]
    Ls,
    /// Show a device.
    #[command(after_help = "Example: flywheel device show cam7 --json")]
    Show {
        /// Its id.
        id: String,
    },
    /// Refuse a device from now on, on both transports.
    #[command(after_help = "Example: flywheel device revoke cam7")]
    Revoke {
        /// Its id.
        id: String,
    },
    /// Write what an external broker needs to hold every device to its own topics. Runs on the
    /// server's machine, on its data folder (--data); the server need not run.
    #[command(
        after_help = "Example: flywheel device acl --broker mosquitto --data cloud/ --out broker/
then: mosquitto -c broker/mosquitto.conf
and: flywheel serve --data cloud/ --keys keys/ --broker mqtts://127.0.0.1:8883 --broker-for-devices HOST:8883"
    )]
    Acl {
        /// Which broker.
        #[arg(long, value_enum)]
        broker: BrokerKind,
        /// Folder for the files.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Port of its listener.
        #[arg(long, default_value_t = 8883)]
        port: u16,
        /// Name or address under which devices reach the broker; may be given several times.
        #[arg(long, value_name = "NAME")]
        host: Vec<String>,
    },
}

/// Runs a rollout command.
///
/// # Errors
/// If the server can't be reached or refuses.
pub fn rollout(command: RolloutCommand, connection: &Connection) -> Result<ExitCode> {
    let client = connection.client()?;
    match command {
        RolloutCommand::Start {
            model,
            group,
            policy,
        } => {
            let rollout: RolloutView = client.post(
                "/v1/rollouts",
                &RolloutRequest {
                    model,
                    group,
                    policy: Some(policy),
                },
            )?;
            show_rollout(connection, &rollout)?;
        }
        RolloutCommand::Ls => {
            let rollouts: Vec<RolloutView> = client.get("/v1/rollouts")?;
            if connection.json {
                return print_json(&rollouts).map(|()| ExitCode::SUCCESS);
            }
            let mut table = format::table(&["rollout", "model", "policy", "state", "devices"]);
            for rollout in &rollouts {
                table.add_row([
                    rollout.id.to_string(),
                    short(&rollout.model).to_owned(),
                    rollout.policy.clone(),
                    rollout.state.clone(),
                    tally(rollout),
                ]);
            }
            print_line(table)?;
        }
        RolloutCommand::Status { id } => {
            show_rollout(connection, &find(&client, id, 0)?)?;
        }
        RolloutCommand::Watch { id } => {
            let mut rollout = find(&client, id, 0)?;
            let mut shown = String::new();
            while rollout.state == "running" {
                let line = format!("wave {}: {}", rollout.wave, tally(&rollout));
                if line != shown && !connection.json {
                    print_line(&line)?;
                    shown = line;
                }
                rollout = find(&client, Some(rollout.id), 500)?;
            }
            show_rollout(connection, &rollout)?;
            if rollout.state != "confirmed" {
                return Ok(ExitCode::from(EXIT_NEGATIVE));
            }
        }
        RolloutCommand::Abort { id, reason } => {
            let rollout: RolloutView = client.post(
                &format!("/v1/rollouts/{id}/abort"),
                &AbortRequest { reason },
            )?;
            show_rollout(connection, &rollout)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A rollout by number, or the latest; waits up to `wait_ms` for it to change.
fn find(client: &Client, id: Option<u64>, wait_ms: u32) -> Result<RolloutView> {
    let id = id.map_or("latest".to_owned(), |id| id.to_string());
    Ok(client.get(&format!("/v1/rollouts/{id}?wait_ms={wait_ms}"))?)
}

/// How many devices are in which state.
pub fn tally(rollout: &RolloutView) -> String {
    let mut counts = std::collections::BTreeMap::new();
    for progress in rollout.devices.values() {
        *counts.entry(progress.state.as_str()).or_insert(0u32) += 1;
    }
    counts
        .iter()
        .map(|(state, count)| format!("{count} {state}"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn show_rollout(connection: &Connection, rollout: &RolloutView) -> Result<()> {
    if connection.json {
        return print_json(rollout);
    }
    print_line(format!(
        "rollout {} of model {} (release {}), {}: {}{}",
        rollout.id,
        short(&rollout.model),
        rollout.sequence,
        rollout.policy,
        rollout.state,
        rollout
            .reason
            .as_deref()
            .map(|reason| format!(", {reason}"))
            .unwrap_or_default()
    ))?;
    let mut table = format::table(&["device", "state", "reason"]);
    for (device, progress) in &rollout.devices {
        table.add_row([
            device.clone(),
            progress.state.clone(),
            progress.detail.clone().unwrap_or_default(),
        ]);
    }
    print_line(table)
}

/// Runs a device command.
///
/// # Errors
/// If the server can't be reached or refuses.
pub fn device(command: DeviceCommand, connection: &Connection) -> Result<ExitCode> {
    if let DeviceCommand::Acl {
        broker: BrokerKind::Mosquitto,
        out,
        port,
        host,
    } = &command
    {
        return acl(connection, out, *port, host);
    }
    let client = connection.client()?;
    match command {
        DeviceCommand::Enroll {
            device,
            group,
            ttl_s,
        } => {
            let reply: TokenReply = client.post(
                "/v1/devices/tokens",
                &TokenRequest {
                    device,
                    group,
                    ttl_s,
                },
            )?;
            if connection.json {
                return print_json(&reply).map(|()| ExitCode::SUCCESS);
            }
            print_line(&reply.token)?;
        }
        DeviceCommand::Ls => {
            let devices: Vec<DeviceView> = client.get("/v1/devices")?;
            if connection.json {
                return print_json(&devices).map(|()| ExitCode::SUCCESS);
            }
            let mut table = format::table(&[
                "device", "group", "link", "frame", "seen", "uploaded", "release", "",
            ]);
            for device in &devices {
                table.add_row([
                    device.id.clone(),
                    device.group.clone(),
                    device.transport.clone().unwrap_or_else(|| "–".to_owned()),
                    device.frame.to_string(),
                    bytes(device.bytes_seen),
                    bytes(device.bytes_up),
                    device.sequence.to_string(),
                    if device.revoked {
                        "revoked"
                    } else if device.idle {
                        "idle"
                    } else {
                        ""
                    }
                    .to_owned(),
                ]);
            }
            print_line(table)?;
        }
        DeviceCommand::Show { id } => {
            let device: DeviceView = client.get(&format!("/v1/devices/{id}"))?;
            print_json(&device)?;
        }
        DeviceCommand::Acl { .. } => {}
        DeviceCommand::Revoke { id } => {
            let device: DeviceView =
                client.post(&format!("/v1/devices/{id}/revoke"), &serde_json::json!({}))?;
            if connection.json {
                print_json(&device)?;
            } else {
                print_line(format!("{} is refused from now on", device.id))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the files of a broker, for the authority in the data folder.
fn acl(connection: &Connection, out: &Path, port: u16, hosts: &[String]) -> Result<ExitCode> {
    let data = connection.data.as_deref().context(
        "--data DIR is needed: the server's data folder, which holds the fleet's authority",
    )?;
    let now_ms = crate::service::now_ms();
    let pki = Pki::open(&data.join("pki"), hosts, now_ms)?;
    let files = broker_files::write(&pki, out, port, hosts, now_ms)?;
    if connection.json {
        print_json(&files)?;
    } else {
        print_line(format!(
            "wrote {out}: let the broker's user read it (chown -R mosquitto {out}) and start it with: mosquitto -c {}",
            files.config.display(),
            out = out.display(),
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks the conservation law.
///
/// # Errors
/// If the server can't be reached.
pub fn audit(connection: &Connection) -> Result<ExitCode> {
    let audit: AuditView = connection.client()?.get("/v1/audit")?;
    if connection.json {
        print_json(&audit)?;
    } else {
        print_line(audit_line(&audit))?;
        for missing in &audit.missing {
            print_line(format!("  missing: {missing}"))?;
        }
    }
    Ok(if audit.balanced {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_NEGATIVE)
    })
}

/// The conservation law in one line.
pub fn audit_line(audit: &AuditView) -> String {
    let dropped: u64 = audit.dropped.values().sum();
    let reasons = if audit.dropped.is_empty() {
        String::new()
    } else {
        let reasons: Vec<_> = audit
            .dropped
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        format!(" ({})", reasons.join(", "))
    };
    format!(
        "audit: {} flagged {} {} ingested + {} spooled + {dropped} dropped{reasons}: {}",
        audit.flagged,
        if audit.balanced { "=" } else { "≠" },
        audit.ingested,
        audit.spooled,
        if audit.balanced {
            "balanced"
        } else {
            "NOT BALANCED"
        }
    )
}
