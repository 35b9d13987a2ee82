//! The command line: raw flags in, one typed call out.
//!
//! Every command but `serve`, `demo`, `agent`, `model sign` and most of `key` is a client of a running server's HTTP
//! API. Tables are for people; `--json` prints the API's own documents for programs.

pub mod data;
pub mod fleet;
pub mod format;
mod import;
mod key;
pub mod model;
mod queue;
pub mod rollout;
mod serve;
mod sign;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::client::{Client, ClientError, DEFAULT_SERVER};

/// The command worked, but its answer is no: the gate refused, the audit does not balance, the
/// rollout did not confirm.
pub const EXIT_NEGATIVE: u8 = 3;
/// No server answers.
pub const EXIT_UNREACHABLE: u8 = 4;
/// The server does not accept the token.
pub const EXIT_UNAUTHORIZED: u8 = 5;

/// A data engine for machines that see: devices keep the moments worth learning from, people
/// label them, models are retrained, proven, signed and rolled out.
#[derive(Parser)]
#[command(
    name = "flywheel",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the answer is no (gate, audit, rollout), \
                  4 no server answers, 5 wrong token.\n\nExample: flywheel demo"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where the server is.
#[derive(Args, Clone)]
pub struct Connection {
    /// Address of the server's API.
    #[arg(long, global = true, env = "FLYWHEEL_SERVER", value_name = "URL")]
    server: Option<String>,
    /// API token of the server.
    #[arg(
        long,
        global = true,
        env = "FLYWHEEL_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true
    )]
    token: Option<String>,
    /// The server's data folder on this machine: gives address and token.
    #[arg(long, global = true, env = "FLYWHEEL_DATA_DIR", value_name = "DIR")]
    data: Option<PathBuf>,
    /// Print JSON for programs.
    #[arg(long, global = true)]
    json: bool,
}

impl Connection {
    /// The client that the flags describe.
    ///
    /// # Errors
    /// If neither a token nor a data folder is given.
    pub fn client(&self) -> Result<Client, ClientError> {
        // What is named outright goes before what a data folder says; a folder's token never
        // goes to another server than the folder's.
        match (&self.server, &self.token, &self.data) {
            (Some(server), Some(token), _) => Ok(Client::new(server, token)),
            (None, token, Some(data)) => Client::from_data(data, token.as_deref()),
            (None, Some(token), None) => Ok(Client::new(DEFAULT_SERVER, token)),
            (server, None, _) => Err(ClientError::Unauthorized {
                server: server.clone().unwrap_or_else(|| DEFAULT_SERVER.to_owned()),
            }),
        }
    }
}

/// A command of several parts, with the server it talks to.
#[derive(Args)]
struct Remote<T: Subcommand> {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: T,
}

/// A command of one part, with the server it talks to.
#[derive(Args)]
struct RemoteOnce<T: Args> {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    args: T,
}

#[derive(Subcommand)]
enum Command {
    /// Run the whole loop on this machine: a server, devices, a labeller, training, rollouts.
    Demo(Box<crate::demo::DemoArgs>),
    /// Run the cloud: ingest, queue, registry, rollouts.
    Serve(serve::ServeArgs),
    /// Work the labelling queue.
    Queue(Remote<queue::QueueCommand>),
    /// Freeze, list and compare dataset versions; import pictures.
    Dataset(Remote<data::DatasetCommand>),
    /// Train a candidate model from the champion.
    Train(RemoteOnce<model::TrainArgs>),
    /// Judge a model on the golden set through the device's engine.
    Eval(RemoteOnce<model::EvalArgs>),
    /// List, show and promote models.
    Model(Remote<model::ModelCommand>),
    /// Make, replace and publish signing keys.
    Key(Remote<key::KeyCommand>),
    /// Roll a model out and watch it.
    Rollout(Remote<rollout::RolloutCommand>),
    /// Enrol, list, tag and revoke devices.
    Device(Remote<fleet::DeviceCommand>),
    /// Check that every flagged sample is accounted for; exit code 3 if one is not.
    #[command(after_help = "Example: flywheel audit --data cloud/")]
    Audit(Connection),
    /// Measure the device's decisions on labelled pictures.
    #[command(subcommand)]
    Bench(crate::bench::BenchCommand),
    /// Run as a device agent (the same program as `flywheel-agent`).
    #[command(disable_help_flag = true)]
    Agent {
        /// Arguments of `flywheel-agent`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    crate::demo::hold_lifeline();
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flywheel: {error:#}");
            match error.downcast_ref::<ClientError>() {
                Some(ClientError::Unreachable { .. } | ClientError::Discovery { .. }) => {
                    ExitCode::from(EXIT_UNREACHABLE)
                }
                Some(ClientError::Unauthorized { .. }) => ExitCode::from(EXIT_UNAUTHORIZED),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Demo(args) => crate::demo::run(*args),
        Command::Serve(args) => serve::run(args),
        Command::Queue(at) => queue::run(at.command, &at.connection),
        Command::Dataset(at) => data::run(at.command, &at.connection),
        Command::Train(at) => model::train(&at.args, &at.connection),
        Command::Eval(at) => model::eval(&at.args, &at.connection),
        Command::Model(at) => model::run(at.command, &at.connection),
        Command::Key(at) => key::run(&at.command, &at.connection),
        Command::Rollout(at) => rollout::run(at.command, &at.connection),
        Command::Device(at) => fleet::device(at.command, &at.connection),
        Command::Audit(connection) => fleet::audit(&connection),
        Command::Bench(command) => crate::bench::run(command),
        Command::Agent { args } => Ok(flywheel_agent::cli::run_from(
            std::iter::once(OsString::from("flywheel-agent")).chain(args),
        )),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Prints a document as JSON.
fn print_json<T: serde::Serialize>(value: &T) -> Result<()> {
    use std::io::Write;
    let text = serde_json::to_string_pretty(value).context("the answer can't be printed")?;
    writeln!(std::io::stdout().lock(), "{text}")?;
    Ok(())
}

/// Prints a line for people.
fn print_line(text: impl std::fmt::Display) -> Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout().lock(), "{text}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn walk(command: &clap::Command, path: &str) {
            for sub in command.get_subcommands() {
                let path = format!("{path} {}", sub.get_name());
                if sub.get_name() == "help" {
                    continue;
                }
                if sub.has_subcommands() {
                    walk(sub, &path);
                } else if sub.get_name() != "agent" {
                    let help = sub
                        .get_after_help()
                        .map(ToString::to_string)
                        .unwrap_or_default();
                    assert!(help.contains("Example"), "`{path}` has no example");
                }
            }
        }
        walk(&super::Cli::command(), "flywheel");
    }
}
