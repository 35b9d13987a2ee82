//! Kills agents, server and broker at random moments on a bad network, as often as asked, and
//! checks that nothing acknowledged is lost and nothing is stored twice.
//!
//! The program is its own server and agents: started with a lifeline it is `flywheel`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use flywheel_tests::chaos::{self, Plan, Route};

/// Kill agents, server and broker at random on a bad network, and check that nothing is lost.
#[derive(Parser)]
#[command(
    after_help = "Example:\n  cargo run --release -p flywheel-tests --bin chaos -- --kills 1000\n\nExit codes: 0 nothing was lost or doubled, 1 the run failed, 3 something was."
)]
struct Args {
    /// Kills on each route.
    #[arg(long, default_value_t = 100)]
    kills: u32,
    /// Ways to the cloud to try, one after the other: mosquitto, rumqttd, quic. Without it all
    /// whose programs are there.
    #[arg(long, value_enum)]
    route: Vec<Route>,
    /// Device agents.
    #[arg(long, default_value_t = 3)]
    devices: u32,
    /// Share of packets that the network loses, 0 to 0.9.
    #[arg(long, default_value_t = 0.2)]
    loss: f64,
    /// Seed of kills, losses and cuts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for data and logs, kept; a temporary one without it.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print JSON: a list with one report for each route.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    if std::env::var_os(flywheel::demo::LIFELINE).is_some() {
        return flywheel::cli::main();
    }
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    anyhow::ensure!(
        (0.0..=0.9).contains(&args.loss),
        "--loss must be between 0 and 0.9"
    );
    anyhow::ensure!(args.devices > 0, "--devices must be at least 1");
    let routes = if args.route.is_empty() {
        Route::present()
    } else {
        args.route.clone()
    };
    let temporary = tempfile::tempdir().context("no temporary folder")?;
    let base = args.dir.as_deref().unwrap_or(temporary.path());
    let mut reports = Vec::new();
    for route in routes {
        let report = chaos::run(&Plan {
            program: std::env::current_exe().context("cannot find the program itself")?,
            dir: base.join(route.name()),
            route,
            kills: args.kills,
            devices: args.devices,
            loss: args.loss,
            seed: args.seed,
        })
        .with_context(|| format!("route {}", route.name()))?;
        if !args.json {
            println!("{report}");
        }
        reports.push(report);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    }
    Ok(if reports.iter().all(chaos::Report::is_clean) {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    })
}
