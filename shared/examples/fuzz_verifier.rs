//! Fuzzes the verifier for as many runs as told and counts how they ended.
//!
//! `cargo run --release -p flywheel-shared --features attacks --example fuzz_verifier -- --runs
//! 100000000 --seed 1 --json`

use std::process::ExitCode;
use std::time::Instant;

use flywheel_shared::attacks::fuzz::{Fuzzer, Outcome};
use flywheel_shared::trust::TrustError;

const USAGE: &str = "usage: fuzz_verifier [--runs N] [--seed N] [--json]";
/// Runs between two lines of progress.
const PROGRESS: u64 = 10_000_000;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fuzz_verifier: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let (mut runs, mut seed, mut json) = (1_000_000u64, 1u64, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || {
            let value = args
                .next()
                .ok_or(format!("{arg} needs a number; {USAGE}"))?;
            value
                .parse::<u64>()
                .map_err(|error| format!("{arg} {value}: {error}; {USAGE}"))
        };
        match arg.as_str() {
            "--runs" => runs = number()?,
            "--seed" => seed = number()?,
            "--json" => json = true,
            _ => return Err(format!("unknown argument {arg}; {USAGE}")),
        }
    }
    let mut fuzzer = Fuzzer::new(seed).map_err(|error| error.to_string())?;
    let mut counts = [0u64; Outcome::COUNT];
    let started = Instant::now();
    for done in 1..=runs {
        let Ok(outcome) = fuzzer.step() else {
            let body = fuzzer.escaped();
            return Err(format!(
                "run {done} of seed {seed} was believed: {body:02x?}"
            ));
        };
        counts[outcome.index()] += 1;
        if done % PROGRESS == 0 {
            eprintln!("{done} runs, {:.0} s", started.elapsed().as_secs_f64());
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let names = TrustError::ALL
        .iter()
        .map(|error| (format!("{error:?}"), Outcome::Refused(*error)))
        .chain([
            ("Decoded".to_owned(), Outcome::Decoded),
            ("Believed".to_owned(), Outcome::Believed),
        ]);
    let rows: Vec<(String, u64)> = names
        .map(|(name, outcome)| (name, counts[outcome.index()]))
        .filter(|(_, count)| *count > 0)
        .collect();
    if json {
        let rows: Vec<String> = rows
            .iter()
            .map(|(name, count)| format!("\"{name}\": {count}"))
            .collect();
        println!(
            "{{\"runs\": {runs}, \"seed\": {seed}, \"seconds\": {seconds:.1}, \"panics\": 0, \"escapes\": 0, \"outcomes\": {{{}}}}}",
            rows.join(", ")
        );
    } else {
        println!("{runs} runs of seed {seed} in {seconds:.1} s, no panic, nothing let through");
        for (name, count) in rows {
            println!("{count:>12}  {name}");
        }
    }
    Ok(())
}
