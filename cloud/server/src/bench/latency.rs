//! `flywheel bench score`: time of score and trigger for each frame, as a ratio to a plain softmax
//! of the same logits in the same run, since times alone say as much of the machine.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use cloud_core::calibrate::{self, FitInput};
use device_core::params::Params;
use device_core::score::integer::Integer;
use device_core::score::{quantise, score, softmax};
use device_core::sketch::signature;
use device_core::trigger::{Observation, Trigger, TriggerConfig};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::cli::format;

/// Answers that are scored in turn.
const ANSWERS: usize = 512;
/// Frames between two looks at the clock.
const BATCH: usize = 256;

/// Flags of `flywheel bench score`.
#[derive(Args)]
pub struct LatencyArgs {
    /// Number of classes K.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(2..=1024))]
    classes: u16,
    /// Number of embedding values d.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256))]
    dim: u16,
    /// Rounds, of which the median counts.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    classes: u16,
    dim: u16,
    prototypes: u16,
    rounds: u32,
    /// What the ratios are to.
    baseline: &'static str,
    results: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    name: &'static str,
    /// Median nanoseconds a frame.
    ns: f64,
    /// To the baseline.
    ratio: f64,
}

/// Runs the benchmark.
///
/// # Errors
/// If parameters can't be fitted, which the ranges of the flags exclude.
pub fn run(args: &LatencyArgs) -> Result<()> {
    let (k, d) = (usize::from(args.classes), usize::from(args.dim));
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let means: Vec<f32> = (0..k * d).map(|_| rng.random_range(0.0..2.0)).collect();
    let items = (30 * k).max(ANSWERS);
    let labels: Vec<u32> = (0..items).map(|i| (i % k) as u32).collect();
    let (mut embeddings, mut logits) = (Vec::new(), Vec::new());
    for &label in &labels {
        let mean = &means[label as usize * d..][..d];
        let embedding: Vec<f32> = mean
            .iter()
            .map(|mean| mean + rng.random_range(-1.0..1.0))
            .collect();
        logits.extend(means.chunks_exact(d).map(|mean| {
            let apart = |(a, b): (&f32, &f32)| (a - b).powi(2);
            -mean.iter().zip(&embedding).map(apart).sum::<f32>() / 4.0
        }));
        embeddings.extend(embedding);
    }
    let bytes = calibrate::fit(FitInput {
        classes: k,
        dim: d,
        embeddings: &embeddings,
        labels: &labels,
        held_logits: &logits,
        held_embeddings: &embeddings,
        held_labels: &labels,
        head: None,
        shrinkage: None,
    })?;
    let mut values = vec![0.0; Params::len_f32(&bytes)?];
    let params = Params::parse(&bytes, &mut values)?;
    let integer = Integer::parse(&bytes)?;
    let rows: Vec<(&[f32], &[f32])> = logits
        .chunks_exact(k)
        .zip(embeddings.chunks_exact(d))
        .take(ANSWERS)
        .collect();

    let mut scratch = vec![0.0; params.shape().scratch()];
    let mut say = |logits: &[f32], embedding: &[f32]| {
        score(
            black_box(logits),
            black_box(embedding),
            &params,
            &mut scratch,
        )
    };
    let mut probabilities = vec![0.0; k];
    let mut codes = vec![0i8; d];
    let mut whole = vec![0i32; integer.map_or(0, |integer| integer.rank())];
    let mut trigger = Trigger::new(TriggerConfig::default())?;
    let names = [
        "softmax",
        "score",
        "score + signature + trigger",
        "RMD int8",
    ];
    let mut times: [Vec<f64>; 4] = Default::default();
    for round in 0..args.rounds as usize {
        let answers = || (0..BATCH).map(|i| rows[(round * BATCH + i) % rows.len()]);
        // Side by side in each round, so that a busy moment slows all of them.
        times[0].push(timed(|| {
            for (logits, _) in answers() {
                softmax(black_box(logits), params.temperature(), &mut probabilities);
                black_box(&probabilities);
            }
            Ok(())
        })?);
        times[1].push(timed(|| {
            for (logits, embedding) in answers() {
                let scores = say(logits, embedding)?;
                black_box(&scores);
            }
            Ok(())
        })?);
        times[2].push(timed(|| {
            for (logits, embedding) in answers() {
                let scores = say(logits, embedding)?;
                let flag = trigger.observe(Observation {
                    frame_bytes: 3072,
                    cost: 1200,
                    scores: Some(&scores),
                    signature: signature(embedding, params.centre()),
                    disagree: false,
                    wanted: scores.rarity,
                    draw: rng.random(),
                });
                black_box(&flag);
            }
            Ok(())
        })?);
        if let Some(integer) = &integer {
            times[3].push(timed(|| {
                for (_, embedding) in answers() {
                    quantise(black_box(embedding), &mut codes);
                    black_box(integer.novelty(&codes, &mut whole));
                }
                Ok(())
            })?);
        }
    }
    let medians = times.map(median);
    let report = Report {
        classes: args.classes,
        dim: args.dim,
        prototypes: params.shape().prototypes,
        rounds: args.rounds,
        baseline: names[0],
        results: names
            .into_iter()
            .zip(medians)
            .filter(|(_, ns)| *ns > 0.0)
            .map(|(name, ns)| Line {
                name,
                ns,
                ratio: ns / medians[0],
            })
            .collect(),
    };
    print(&report, args.json)
}

/// Nanoseconds a frame of a batch.
fn timed(batch: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    batch()?;
    Ok(start.elapsed().as_nanos() as f64 / BATCH as f64)
}

/// The middle one; 0 of none.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(0.0)
}

fn print(report: &Report, json: bool) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(report)?)?;
        return Ok(());
    }
    let mut table = format::table(&["what", "ns a frame", "to softmax"]);
    for line in &report.results {
        table.add_row([
            line.name.to_owned(),
            format!("{:.0}", line.ns),
            format!("{:.1}", line.ratio),
        ]);
    }
    writeln!(
        out,
        "{} classes, {} embedding values, {} prototypes; median of {} rounds",
        report.classes, report.dim, report.prototypes, report.rounds
    )?;
    writeln!(out, "{table}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_median_is_the_middle_one() {
        assert!((super::median(vec![9.0, 1.0, 4.0]) - 4.0).abs() < 1e-12);
        assert_eq!(super::median(Vec::new()), 0.0);
    }
}
