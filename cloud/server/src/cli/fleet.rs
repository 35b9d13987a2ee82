//! `flywheel device` and `audit`: the fleet from the operator's chair.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};

use super::format::{self, bytes};
use super::{Connection, EXIT_NEGATIVE, print_json, print_line};
use crate::api::types::{AuditView, DeviceView, TagRequest, TokenReply, TokenRequest};
use crate::ingest::broker_files;
use crate::pki::Pki;

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
    /// Tag a device with labels, for `flywheel rollout start --to label.KEY=VALUE`.
    #[command(after_help = "Example: flywheel device tag cam7 site=north lens=wide --remove spare")]
    Tag {
        /// Its id.
        id: String,
        /// Labels to set.
        #[arg(value_name = "KEY=VALUE", value_parser = parse_label)]
        labels: Vec<(String, String)>,
        /// A label to take off; may be given several times.
        #[arg(long, value_name = "KEY")]
        remove: Vec<String>,
        /// Move it to this group.
        #[arg(long)]
        group: Option<String>,
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

fn parse_label(text: &str) -> Result<(String, String), String> {
    let parts = text
        .split_once('=')
        .filter(|(key, value)| !key.is_empty() && !value.is_empty());
    let (key, value) = parts.ok_or("expected KEY=VALUE, as in site=north")?;
    Ok((key.to_owned(), value.to_owned()))
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
        DeviceCommand::Tag {
            id,
            labels,
            remove,
            group,
        } => {
            let request = TagRequest {
                set: labels.into_iter().collect(),
                remove,
                group,
            };
            let device: DeviceView = client.post(&format!("/v1/devices/{id}/tags"), &request)?;
            if connection.json {
                return print_json(&device).map(|()| ExitCode::SUCCESS);
            }
            let labels = device
                .labels
                .iter()
                .map(|(key, value)| format!("{key}={value}"));
            let labels: Vec<String> = labels.collect();
            print_line(format!(
                "{} ({}): {}",
                device.id,
                device.group,
                labels.join(", ")
            ))?;
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
