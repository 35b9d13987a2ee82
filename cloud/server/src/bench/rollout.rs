//! `flywheel bench rollout`: rollouts over a large simulated fleet. Planner, controller, store,
//! log, verifier and slots are the real ones; links and clock are made up, so that hours take
//! seconds and one seed gives one outcome.

pub(crate) mod cloud;
mod device;
#[cfg(test)]
mod tests;
mod world;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use crate::cli::{EXIT_NEGATIVE, format};
use world::{Conditions, Outcome, World};

/// Virtual seconds within which a bad model must be halted.
const HALT_S: f64 = 5.0;
/// Offers in a second of real time that must be reached.
const OFFERS_PER_S: f64 = 1_000.0;

/// Flags of `flywheel bench rollout`.
#[derive(Args)]
pub struct RolloutArgs {
    /// Devices.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=99_999))]
    devices: u32,
    /// Seed of everything.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    devices: u32,
    seed: u64,
    scenarios: Vec<Scenario>,
    dispatch: Dispatch,
    /// Whether every bound holds.
    ok: bool,
}

#[derive(Serialize)]
struct Scenario {
    name: &'static str,
    /// State of the rollout.
    state: String,
    reason: Option<String>,
    /// Devices by where they ended.
    ends: BTreeMap<String, u64>,
    /// Devices that ended where they should, of all.
    settled: u64,
    /// Devices that were offered the model, and those of the waves that were open.
    exposed: u64,
    open: u64,
    /// Virtual seconds from the report that crossed the threshold to the halt.
    halt_after_s: Option<f64>,
    virtual_s: f64,
    real_s: f64,
    controller_kills: u32,
    messages_lost: u64,
    store_writes: u64,
    log_lines: u64,
    /// What operator and controller did, but for single offers, from the log.
    decisions: Vec<String>,
    ok: bool,
}

#[derive(Serialize)]
struct Dispatch {
    offers: usize,
    offers_per_s: f64,
    controller_restart_s: f64,
    reconnects: usize,
    reconnects_per_s: f64,
    /// Most that came in one second when they spread over 30 s.
    reconnects_peak: u64,
    ok: bool,
}

/// The rules of all scenarios: few canaries, then tenths, then the rest.
const POLICY: &str = r#"
name = "bench"
canary = 10
canary_max_failed = 9
waves = ["5%", "25%"]
offer_rate = 400
jitter_s = 5
offer_ttl_s = 15
stall_s = 60

[gate]
max_failed_share = 0.05
min_answers = 40
soak_s = 20
"#;

fn conditions(devices: usize, seed: u64) -> Conditions {
    Conditions {
        devices,
        seed,
        policy_toml: POLICY.to_owned(),
        failing: 0.0,
        loss: 0.0,
        kills: 0,
        partitioned: 0,
        power_cuts: 0,
        excluded: 0,
        cut: None,
    }
}

/// A model that works everywhere.
fn good(devices: usize, seed: u64) -> Conditions {
    conditions(devices, seed)
}

/// A model that fails on every fifth device.
fn bad(devices: usize, seed: u64) -> Conditions {
    Conditions {
        failing: 0.2,
        ..conditions(devices, seed)
    }
}

/// A model that works nearly everywhere, under everything that can happen.
fn storm(devices: usize, seed: u64) -> Conditions {
    Conditions {
        failing: 0.01,
        loss: 0.1,
        kills: 12,
        partitioned: devices * 3 / 10,
        power_cuts: devices / 20,
        excluded: (devices / 500).max(2),
        ..conditions(devices, seed)
    }
}

/// Runs the benchmark.
///
/// # Errors
/// If the store fails, or a rollout does not end.
pub fn run(args: &RolloutArgs) -> Result<ExitCode> {
    let n = args.devices as usize;
    let scenarios = vec![
        scenario("good model", good(n, args.seed), |_, ends| {
            ends.get("confirmed") == Some(&(n as u64))
        })?,
        scenario("bad model", bad(n, args.seed), |outcome, ends| {
            let ends: u64 = ["reverted", "returned", "pending"]
                .iter()
                .filter_map(|end| ends.get(*end))
                .sum();
            outcome.view.state == "halted"
                && outcome.halt_after_s.is_some_and(|s| s <= HALT_S)
                && outcome.exposed.len() as u64 <= open(outcome)
                && ends == n as u64
        })?,
        scenario(
            "kills, losses, a partition",
            storm(n, args.seed),
            |outcome, ends| {
                let ends: u64 = ["confirmed", "reverted", "excluded"]
                    .iter()
                    .filter_map(|end| ends.get(*end))
                    .sum();
                outcome.view.state == "confirmed" && ends == n as u64
            },
        )?,
    ];
    let dispatch = dispatch(n, args.seed)?;
    let ok = dispatch.ok && scenarios.iter().all(|scenario| scenario.ok);
    let report = Report {
        devices: args.devices,
        seed: args.seed,
        scenarios,
        dispatch,
        ok,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_NEGATIVE)
    })
}

fn simulate(conditions: Conditions) -> Result<Outcome> {
    let dir = tempfile::tempdir().context("cannot create a temporary folder")?;
    World::new(dir.path(), conditions)?.run()
}

fn scenario(
    name: &'static str,
    conditions: Conditions,
    holds: impl Fn(&Outcome, &BTreeMap<String, u64>) -> bool,
) -> Result<Scenario> {
    let started = Instant::now();
    let outcome = simulate(conditions).with_context(|| name.to_owned())?;
    let ends = ends(&outcome);
    let under_way = ["offered", "staged", "trial", "returning", "stranded"];
    let settled = ends
        .iter()
        .filter(|(end, _)| !under_way.contains(&end.as_str()))
        .map(|(_, count)| count)
        .sum();
    Ok(Scenario {
        name,
        ok: holds(&outcome, &ends),
        settled,
        state: outcome.view.state.clone(),
        reason: outcome.view.reason.clone(),
        exposed: outcome.exposed.len() as u64,
        open: open(&outcome),
        halt_after_s: outcome.halt_after_s,
        virtual_s: outcome.virtual_s,
        real_s: started.elapsed().as_secs_f64(),
        controller_kills: outcome.kills,
        messages_lost: outcome.lost,
        store_writes: outcome.writes,
        log_lines: outcome.log_lines,
        decisions: outcome.decisions,
        ends,
    })
}

/// How many devices ended where.
fn ends(outcome: &Outcome) -> BTreeMap<String, u64> {
    let mut ends = BTreeMap::new();
    for progress in outcome.view.devices.values() {
        *ends.entry(progress.state.clone()).or_default() += 1;
    }
    ends
}

/// Devices of the waves that were opened.
fn open(outcome: &Outcome) -> u64 {
    let waves = outcome
        .view
        .waves
        .iter()
        .take(outcome.view.wave as usize + 1);
    waves.map(|wave| wave.devices).sum()
}

fn dispatch(devices: usize, seed: u64) -> Result<Dispatch> {
    let dir = tempfile::tempdir().context("cannot create a temporary folder")?;
    let conditions = Conditions {
        policy_toml: "name = \"all\"\ncanary = \"100%\"\n".to_owned(),
        ..conditions(devices, seed)
    };
    let rush = World::new(dir.path(), conditions)?.rush(30_000)?;
    let offers_per_s = rush.offers as f64 / rush.dispatch_s;
    let reconnects_per_s = rush.answered as f64 / rush.answer_s;
    Ok(Dispatch {
        ok: rush.offers == devices
            && rush.answered == devices
            && offers_per_s >= OFFERS_PER_S
            && reconnects_per_s >= OFFERS_PER_S,
        offers: rush.offers,
        offers_per_s,
        controller_restart_s: rush.restart_s,
        reconnects: rush.answered,
        reconnects_per_s,
        reconnects_peak: rush.peak,
    })
}

fn print(report: &Report) {
    let mut table = format::table(&[
        "scenario",
        "state",
        "ends",
        "exposed",
        "halt after",
        "virtual",
        "real",
        "kills",
        "lost",
        "",
    ]);
    for scenario in &report.scenarios {
        let ends = scenario.ends.iter().map(|(end, n)| format!("{n} {end}"));
        table.add_row([
            scenario.name.to_owned(),
            scenario.state.clone(),
            ends.collect::<Vec<_>>().join(", "),
            format!("{} of {} open", scenario.exposed, scenario.open),
            scenario
                .halt_after_s
                .map_or("–".to_owned(), |s| format!("{s:.1} s")),
            format!("{:.0} s", scenario.virtual_s),
            format!("{:.1} s", scenario.real_s),
            scenario.controller_kills.to_string(),
            scenario.messages_lost.to_string(),
            if scenario.ok { "ok" } else { "MISSED" }.to_owned(),
        ]);
    }
    println!("{table}");
    for scenario in &report.scenarios {
        if let Some(reason) = &scenario.reason {
            println!("{}: {reason}", scenario.name);
        }
    }
    let dispatch = &report.dispatch;
    println!(
        "dispatch: {} offers at {:.0} a second; a killed controller is back in {:.2} s and answers {} devices that reconnect at {:.0} a second ({} in the fullest second of 30): {}",
        dispatch.offers,
        dispatch.offers_per_s,
        dispatch.controller_restart_s,
        dispatch.reconnects,
        dispatch.reconnects_per_s,
        dispatch.reconnects_peak,
        if dispatch.ok { "ok" } else { "MISSED" }
    );
}
