//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use flywheel_shared::ids::{DeviceId, IdError};
use tracing_subscriber::EnvFilter;

use crate::agent::{self, Mode};
use crate::bench::{self, BenchArgs};
use crate::clock::unix_ms;
use crate::config::Config;
use crate::doctor;
use crate::enroll::{self, Request};

/// The answer is no; as in `flywheel`'s own commands.
const EXIT_NEGATIVE: u8 = 3;

/// The agent of a Flywheel device.
#[derive(Debug, Parser)]
#[command(name = "flywheel-agent", version, about)]
struct Arguments {
    /// How the log on stderr is written.
    #[arg(long, value_enum, default_value_t = Log::Text, global = true)]
    log: Log,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Log {
    /// For people.
    Text,
    /// One JSON object a line, for machines.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Watch a source of frames until SIGTERM or SIGINT, and keep the cloud informed.
    #[command(
        after_help = "Example:\n  flywheel-agent run --config /etc/flywheel/agent.toml\n\nFLYWHEEL_LOG sets what is logged to stderr: FLYWHEEL_LOG=debug; --log json how.\nUnder systemd: Type=notify, and WatchdogSec= restarts it when frames stop to advance."
    )]
    Run {
        /// Configuration, TOML.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Take a number of frames, wait until the cloud has everything that was flagged, and end.
    #[command(after_help = "Example:\n  flywheel-agent once --config agent.toml --frames 500")]
    Once {
        /// Configuration, TOML.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Number of frames, from where the source was left.
        #[arg(long, value_name = "N")]
        frames: u64,
    },
    /// Measure a model on this board, engine by engine, through the frame loop that production runs.
    #[command(
        after_help = "Example:\n  flywheel-agent bench --model model.onnx --engine all\n  flywheel-agent bench --model /var/lib/flywheel/models/3f9c… --engine tract --json --profile\n\nTimes are of one frame. \"outside\" counts heap allocations of frames that were not flagged,\nin everything but the engine and the reading of the picture."
    )]
    Bench(BenchArgs),
    /// Look for what keeps this device from its work, and say the mend.
    #[command(
        after_help = "Example:\n  flywheel-agent doctor --config /etc/flywheel/agent.toml\n\nExit code 0 if nothing failed, 3 if a check failed, 1 if the configuration cannot be read."
    )]
    Doctor {
        /// Configuration, TOML.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Trade a one-time token for an identity.
    #[command(
        after_help = "Example:\n  flywheel device enroll        # on the server: prints a token\n  flywheel-agent enroll --url http://127.0.0.1:7878 --token 3f9c… --data /var/lib/flywheel"
    )]
    Enroll {
        /// The server, http://HOST:PORT.
        #[arg(long)]
        url: String,
        /// The one-time token.
        #[arg(long)]
        token: String,
        /// The agent's data folder.
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        /// Wanted name: 1 to 24 lower-case letters and digits. Without it the server chooses.
        #[arg(long, value_name = "ID", value_parser = device)]
        device: Option<DeviceId>,
        /// Replace an identity that is there.
        #[arg(long)]
        force: bool,
    },
}

fn device(text: &str) -> Result<DeviceId, IdError> {
    text.parse()
}

/// Runs the program with these arguments, the first of which is its name.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    run_from(arguments)
}

/// Runs an agent inside another program: `arguments` begin with a program name, as those of
/// `main` do. It logs to stderr by `FLYWHEEL_LOG`, unless the program has set up logging itself.
pub fn run_from(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nothing is left to tell if even stderr is closed.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    // A benchmark's table says all that is to be said.
    let level = match arguments.command {
        Command::Bench(_) => "warn",
        _ => "info",
    };
    let filter = EnvFilter::try_from_env("FLYWHEEL_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    // It fails only if logging is set up already.
    let _ = match arguments.log {
        Log::Text => log.try_init(),
        Log::Json => log.json().flatten_event(true).try_init(),
    };
    match execute(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run { config } => agent::run(&Config::read(&config)?, Mode::Forever)?,
        Command::Once { config, frames } => {
            agent::run(&Config::read(&config)?, Mode::Once { frames })?;
        }
        Command::Bench(args) => bench::run(&args)?,
        Command::Doctor { config, json } => {
            let report = doctor::examine(&config, unix_ms())?;
            if json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                println!("{report}");
            }
            if !report.ok {
                return Ok(ExitCode::from(EXIT_NEGATIVE));
            }
        }
        Command::Enroll {
            url,
            token,
            data,
            device,
            force,
        } => {
            let device = enroll::enroll(&Request {
                url,
                token,
                data: data.clone(),
                device,
                force,
            })?;
            println!("enrolled {device} in {}", data.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example() {
        let mut command = Arguments::command();
        command.build();
        for sub in command.get_subcommands_mut() {
            if sub.get_name() != "help" {
                let help = sub.render_long_help().to_string();
                assert!(help.contains("Example:"), "{help}");
            }
        }
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_bad_device_name_is_refused_on_the_command_line() {
        let parse = |id: &str| {
            Arguments::try_parse_from([
                "a", "enroll", "--url", "u", "--token", "t", "--data", "d", "--device", id,
            ])
        };
        assert!(parse("cam7").is_ok());
        assert!(parse("Cam/7").is_err());
    }
}
