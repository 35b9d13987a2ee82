//! `flywheel bench`: what is claimed of the device's decisions, measured with the device's own
//! code on data that nobody here made; of the server's speed; and of rollouts, on a simulated fleet.

mod flagging;
mod ingest;
mod latency;
mod pictures;
pub(crate) mod rollout;
mod stream;
mod subject;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

pub use flagging::FlaggingArgs;
pub use ingest::IngestArgs;
pub use latency::LatencyArgs;
pub use rollout::RolloutArgs;

/// Parts of `flywheel bench`.
#[derive(Subcommand)]
pub enum BenchCommand {
    /// How much of a class that the model never saw is flagged under an upload budget, by each
    /// score and by the lanes together.
    #[command(after_help = "Example: flywheel bench flagging --data mnist/ --classes 0,3 --json")]
    Flagging(FlaggingArgs),
    /// How long scoring and triggering one frame take, beside a plain softmax.
    #[command(after_help = "Example: flywheel bench score --json")]
    Score(LatencyArgs),
    /// How many samples a second devices get stored, by each transport, beside plain tools.
    #[command(after_help = "Example: flywheel bench ingest --kib 10 --seconds 10 --json")]
    Ingest(IngestArgs),
    /// Rollouts over a large simulated fleet: a good model, a bad one, and one under kills, losses
    /// and a partition; and how fast offers are made. Exit code 3 if a bound is missed.
    #[command(after_help = "Example: flywheel bench rollout --devices 10000 --json")]
    Rollout(RolloutArgs),
}

/// Runs the command.
///
/// # Errors
/// If the data can't be read, or training fails.
pub fn run(command: BenchCommand) -> Result<ExitCode> {
    match command {
        BenchCommand::Flagging(args) => flagging::run(&args)?,
        BenchCommand::Score(args) => latency::run(&args)?,
        BenchCommand::Ingest(args) => ingest::run(&args)?,
        BenchCommand::Rollout(args) => return rollout::run(&args),
    }
    Ok(ExitCode::SUCCESS)
}
