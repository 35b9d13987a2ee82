//! `flywheel bench flagging`: a class is held out, a model is trained on the others, calibrated as
//! production does, and shown a stream in which the class turns up now and then.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use cloud_core::calibrate::{self, FitInput};
use device_core::params::Params;
use device_core::score::boundary::boundary_distance;
use device_core::score::integer::Integer;
use device_core::score::neighbour::nearest_prototype;
use device_core::score::{conformal, quantise, score};
use device_core::sketch::signature;
use device_core::trigger::TriggerConfig;
use flywheel_agent::config::Shares;
use flywheel_agent::pipeline::BATCH_SHARE;
use flywheel_agent::wire;
use flywheel_shared::message::{Lane, Record, Sample, Scores};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::pictures::{Item, Source};
use super::stream::{self, Outcome, Plan, Scored};
use super::subject::{Answers, Subject};
use crate::cli::format;

/// Flags of `flywheel bench flagging`.
#[derive(Args)]
pub struct FlaggingArgs {
    /// A folder with files of the MNIST format, or with one folder of pictures for each class.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Classes that are held out, one after the other: names with commas between, or `all`.
    #[arg(long, default_value = "all", value_name = "NAMES")]
    classes: String,
    /// Training steps of each model.
    #[arg(long, default_value_t = 600)]
    steps: usize,
    /// Pictures that train a model, at most, from a set of the MNIST format; a third as many
    /// calibrate it.
    #[arg(long, default_value_t = 3300)]
    pictures: usize,
    /// Frames of each stream.
    #[arg(long, default_value_t = 5000)]
    frames: u32,
    /// Streams for each model.
    #[arg(long, default_value_t = 3)]
    streams: u64,
    /// Share of frames of the held-out class.
    #[arg(long, default_value_t = 0.02)]
    novel: f64,
    /// Bytes up of bytes seen.
    #[arg(long, default_value_t = 0.05)]
    budget: f32,
    /// Bytes that may leave at once on top, in KiB.
    #[arg(long, default_value_t = 16)]
    burst_kib: u32,
    /// Seed of everything that is drawn by lot.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

/// The single scores, each with all of the budget; less familiar is higher in all.
const SINGLE: [&str; 9] = [
    "max softmax",
    "margin",
    "entropy",
    "energy",
    "fDBD",
    "RMD f32",
    "RMD int8",
    "kNN",
    "RMD + kNN",
];
const RANDOM: &str = "random";
const LANES: &str = "lanes";

/// What the benchmark says.
#[derive(Serialize)]
struct Report {
    /// The folder's name.
    data: String,
    /// Models trained, one for each class held out.
    models: Vec<Model>,
    /// Frames of each stream.
    frames: u32,
    /// Streams for each model.
    streams: u64,
    /// Share of novel frames.
    novel: f64,
    /// Bytes up of bytes seen.
    budget: f32,
    /// Bytes that may leave at once on top.
    burst_bytes: u32,
    /// Shares of the lanes, in production.
    shares: BTreeMap<&'static str, f32>,
    /// Seed.
    seed: u64,
    /// Results, by what flags.
    results: Vec<Line>,
}

/// One trained model.
#[derive(Serialize)]
struct Model {
    /// The class that it never saw.
    held_out: String,
    /// Seed of its training and of its streams.
    seed: u64,
    /// Accuracy on known classes of the stream's pictures.
    accuracy: f64,
}

/// What one way of flagging found.
#[derive(Serialize)]
struct Line {
    /// A score, `lanes` or `random`.
    name: &'static str,
    /// Mean over classes of the share of novel frames that were flagged.
    recall: f64,
    /// Standard error of that mean.
    standard_error: f64,
    /// Share of frames flagged.
    flagged: f64,
    /// Bytes up of bytes seen.
    used: f64,
    /// Bytes beyond the budget at the worst moment of any stream.
    bytes_over: u64,
    /// Recall with each class held out.
    by_class: BTreeMap<String, f64>,
    /// Frames flagged in each lane.
    lanes: BTreeMap<&'static str, u64>,
}

/// Runs the benchmark.
///
/// # Errors
/// If the data can't be read, a class is unknown, or training fails.
pub fn run(args: &FlaggingArgs) -> Result<()> {
    if !(args.novel > 0.0 && args.novel < 1.0) {
        bail!(
            "--novel is {}; give a share between 0 and 1, such as 0.02",
            args.novel
        );
    }
    if args.frames == 0 || args.streams == 0 || args.pictures < 30 || args.steps == 0 {
        bail!("--frames, --streams and --steps must be at least 1, and --pictures at least 30");
    }
    let source = Source::open(&args.data)?;
    let held_out = choose(&args.classes, &source.classes)?;
    let sets = Sets::read(&source, args)?;
    let progress = ProgressBar::new((held_out.len() * args.steps) as u64).with_style(
        ProgressStyle::with_template("{bar:40} {percent} %, {eta} left: {msg}")
            .context("the progress bar's template")?,
    );
    let mut models = Vec::new();
    let mut found: Vec<(&'static str, Vec<Outcome>)> = SINGLE
        .into_iter()
        .chain([LANES, RANDOM])
        .map(|name| (name, Vec::new()))
        .collect();
    for &out in &held_out {
        let seed = args.seed.wrapping_add(out as u64);
        progress.set_message(format!("class {} held out", source.classes[out]));
        let (scored, accuracy) = sets.show(out, source.classes.len(), seed, args, &progress)?;
        models.push(Model {
            held_out: source.classes[out].clone(),
            seed,
            accuracy,
        });
        for (name, outcomes) in &mut found {
            outcomes.push(scored.flag(name, seed, args)?);
        }
    }
    progress.finish_and_clear();
    let report = Report {
        data: args
            .data
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        frames: args.frames,
        streams: args.streams,
        novel: args.novel,
        budget: args.budget,
        burst_bytes: args.burst_kib.saturating_mul(1024),
        shares: Lane::ALL
            .into_iter()
            .zip(production_shares())
            .map(|(lane, share)| (lane.name(), share))
            .collect(),
        seed: args.seed,
        results: found
            .iter()
            .map(|(name, outcomes)| line(name, outcomes, &models))
            .collect(),
        models,
    };
    print(&report, args.json)
}

/// The indices of the classes that `wanted` names.
fn choose(wanted: &str, classes: &[String]) -> Result<Vec<usize>> {
    if wanted == "all" {
        return Ok((0..classes.len()).collect());
    }
    wanted
        .split(',')
        .map(|name| {
            let found = classes.iter().position(|class| class == name.trim());
            found.with_context(|| {
                format!(
                    "--classes: there is no class `{}`; there are {}",
                    name.trim(),
                    classes.join(", ")
                )
            })
        })
        .collect()
}

fn production_shares() -> [f32; 5] {
    let shares = Shares::default();
    [
        shares.novel,
        shares.unsure,
        shares.disagree,
        shares.campaign,
        shares.uniform,
    ]
}

/// Pictures to train on, to calibrate on, and of the stream; no picture is in two of them.
struct Sets {
    train: Vec<Item>,
    held: Vec<Item>,
    stream: Vec<Item>,
}

impl Sets {
    fn read(source: &Source, args: &FlaggingArgs) -> Result<Self> {
        let (count, seed) = (args.pictures, args.seed);
        let read = |split, pool, count| source.read(split, pool, seed, count);
        // A folder is small: its own held-out fifth would leave too little of a rare class.
        Ok(if source.has_test_set() {
            Self {
                train: read("train", "0..0.5", count)?,
                held: read("train", "0.5..1", count / 3)?,
                stream: read("test", "0..1", 2 * count)?,
            }
        } else {
            Self {
                train: read("all", "0..0.5", count)?,
                held: read("all", "0.5..0.65", count)?,
                stream: read("all", "0.65..1", count)?,
            }
        })
    }

    /// Trains without class `out` and scores the stream's pictures; also the accuracy on those of
    /// known classes.
    fn show(
        &self,
        out: usize,
        classes: usize,
        seed: u64,
        args: &FlaggingArgs,
        progress: &ProgressBar,
    ) -> Result<(ScoredSet, f64)> {
        let known = classes - 1;
        let index = |class: usize| (class - usize::from(class > out)) as u32;
        let without = |items: &'_ [Item]| -> (Vec<usize>, Vec<u32>) {
            let kept = (0..items.len()).filter(|&i| items[i].class != out);
            kept.map(|i| (i, index(items[i].class))).unzip()
        };
        let (train_at, labels) = without(&self.train);
        let (held_at, held_labels) = without(&self.held);
        let train: Vec<&Item> = train_at.iter().map(|&i| &self.train[i]).collect();
        let held: Vec<&Item> = held_at.iter().map(|&i| &self.held[i]).collect();
        let mut subject = Subject::train(&train, &labels, known, seed, args.steps, &mut || {
            progress.inc(1);
        })?;
        let trained = subject.answer(train.iter().copied())?;
        let calibration = subject.answer(held.iter().copied())?;
        let bytes = calibrate::fit(FitInput {
            classes: known,
            dim: subject.embedding_dim(),
            embeddings: &trained.embeddings,
            labels: &labels,
            held_logits: &calibration.logits,
            held_embeddings: &calibration.embeddings,
            held_labels: &held_labels,
            head: Some(&subject.head),
            shrinkage: None,
        })?;
        let seen = subject.answer(self.stream.iter())?;
        let mut judge = Judge::new(&bytes)?;
        let mut tables = vec![Vec::new(); SINGLE.len()];
        for (logits, embedding) in calibration.rows(known) {
            let (_, values) = judge.values(logits, embedding)?;
            for (table, value) in tables.iter_mut().zip(values) {
                table.push(value);
            }
        }
        let scored = ScoredSet::new(&mut judge, &self.stream, out, &seen, &tables, known)?;
        let right = scored
            .frames
            .iter()
            .zip(&self.stream)
            .filter(|(frame, item)| {
                !frame.novel && u32::from(frame.scores.top1) == index(item.class)
            })
            .count();
        let of = scored.frames.iter().filter(|frame| !frame.novel).count();
        Ok((scored, right as f64 / of.max(1) as f64))
    }
}

/// Every score under one model's parameters.
struct Judge<'a> {
    params: Vec<f32>,
    shape: device_core::params::Shape,
    integer: Integer<'a>,
    scratch: Vec<f32>,
    whole: Vec<i32>,
    codes: Vec<i8>,
}

impl<'a> Judge<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self> {
        let mut params = vec![0.0; Params::len_f32(bytes)?];
        let shape = Params::parse(bytes, &mut params)?.shape();
        let integer = Integer::parse(bytes)?.context("the model has no integer form")?;
        Ok(Self {
            scratch: vec![0.0; shape.scratch()],
            whole: vec![0; integer.rank()],
            codes: vec![0; usize::from(shape.dim)],
            params,
            shape,
            integer,
        })
    }

    /// The wire's scores, and the value of each of [`SINGLE`].
    fn values(&mut self, logits: &[f32], embedding: &[f32]) -> Result<(Scores, [f32; 9])> {
        let params = Params::view(self.shape, &self.params)?;
        let scores = score(logits, embedding, &params, &mut self.scratch)?;
        let near = nearest_prototype(embedding, &params, &mut self.scratch)
            .context("the parameters have no prototypes")?;
        let boundary =
            boundary_distance(logits, embedding, &params).context("the parameters have no head")?;
        quantise(embedding, &mut self.codes);
        let whole = self
            .integer
            .novelty(&self.codes, &mut self.whole)
            .context("the integer form does not fit")?;
        let values = [
            -scores.confidence,
            -scores.margin,
            scores.entropy,
            scores.energy,
            -boundary,
            scores.novelty,
            whole as f32,
            near,
            scores.u_novel,
        ];
        Ok((scores, values))
    }
}

/// The stream's pictures with all that is known of them.
struct ScoredSet {
    frames: Vec<Scored>,
    /// Each of [`SINGLE`] of each picture on the scale u = 1 − p.
    single: Vec<Vec<f32>>,
}

impl ScoredSet {
    fn new(
        judge: &mut Judge<'_>,
        items: &[Item],
        out: usize,
        answers: &Answers,
        calibration: &[Vec<f32>],
        classes: usize,
    ) -> Result<Self> {
        let tables: Vec<Vec<f32>> = calibration
            .iter()
            .map(|values| {
                let mut table = vec![0.0; usize::from(calibrate::TABLE)];
                calibrate::knots(values, &mut table);
                table
            })
            .collect();
        let held = calibration.first().map_or(0, Vec::len) as f32;
        let mut set = Self {
            frames: Vec::with_capacity(items.len()),
            single: vec![Vec::with_capacity(items.len()); SINGLE.len()],
        };
        let blank = vec![0u8; items.iter().map(|item| item.payload).max().unwrap_or(0)];
        for (at, (item, (logits, embedding))) in items.iter().zip(answers.rows(classes)).enumerate()
        {
            let (scores, values) = judge.values(logits, embedding)?;
            for (name, ((u, table), value)) in SINGLE
                .iter()
                .zip(set.single.iter_mut().zip(&tables).zip(values))
            {
                // The combination is on the scale already.
                u.push(match *name {
                    "RMD + kNN" => value,
                    _ => conformal(table, held, value),
                });
            }
            let params = Params::view(judge.shape, &judge.params)?;
            let codes: Vec<u8> = judge
                .codes
                .iter()
                .map(|code| code.cast_unsigned())
                .collect();
            let sample = Sample {
                seq: at as u32 + 1,
                frame: at as u64,
                captured_ms: flywheel_agent::source::START_MS,
                track: at as u64,
                model: [0xff; 8],
                lane: Lane::Novel,
                inclusion: 0.0,
                scores,
                embedding_scale: 1.0,
                embedding: &codes,
                width: u16::try_from(item.size.0).unwrap_or(u16::MAX),
                height: u16::try_from(item.size.1).unwrap_or(u16::MAX),
                codec: item.codec,
                payload: &blank[..item.payload],
            };
            let cost = wire::len(&Record::Sample(sample)) + BATCH_SHARE;
            set.frames.push(Scored {
                scores,
                signature: signature(embedding, params.centre()),
                seen: item.seen,
                cost: u32::try_from(cost).unwrap_or(u32::MAX),
                novel: item.class == out,
            });
        }
        Ok(set)
    }

    /// Runs every stream under what `name` says.
    fn flag(&self, name: &str, seed: u64, args: &FlaggingArgs) -> Result<Outcome> {
        let (u, shares) = match name {
            LANES => (None, production_shares()),
            RANDOM => (None, stream::alone(Lane::Uniform)),
            single => (
                SINGLE
                    .iter()
                    .position(|known| *known == single)
                    .map(|at| self.single[at].as_slice()),
                stream::alone(Lane::Novel),
            ),
        };
        let config = TriggerConfig {
            budget_ratio: args.budget,
            burst_bytes: args.burst_kib.saturating_mul(1024),
            shares,
            ..TriggerConfig::default()
        };
        let mut total = Outcome::default();
        for number in 0..args.streams {
            let plan = Plan {
                frames: args.frames,
                novel: args.novel,
                seed: seed.wrapping_mul(1_000_003).wrapping_add(number),
            };
            total.add(&stream::run(&self.frames, u, config, plan)?);
        }
        Ok(total)
    }
}

fn line(name: &'static str, outcomes: &[Outcome], models: &[Model]) -> Line {
    let recalls: Vec<f64> = outcomes
        .iter()
        .map(|outcome| outcome.found as f64 / outcome.came.max(1) as f64)
        .collect();
    let n = recalls.len() as f64;
    let mean = recalls.iter().sum::<f64>() / n;
    let square: f64 = recalls.iter().map(|recall| (recall - mean).powi(2)).sum();
    let mut total = Outcome::default();
    for outcome in outcomes {
        total.add(outcome);
    }
    Line {
        name,
        recall: mean,
        standard_error: if n > 1.0 {
            (square / (n - 1.0) / n).sqrt()
        } else {
            0.0
        },
        flagged: total.flagged as f64 / total.frames.max(1) as f64,
        used: total.up as f64 / total.seen.max(1) as f64,
        bytes_over: total.over,
        by_class: models
            .iter()
            .map(|model| model.held_out.clone())
            .zip(recalls)
            .collect(),
        lanes: Lane::ALL
            .into_iter()
            .map(|lane| (lane.name(), total.lanes[lane as usize]))
            .collect(),
    }
}

fn print(report: &Report, json: bool) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(report)?)?;
        return Ok(());
    }
    let mut table = format::table(&[
        "flagged by",
        "recall",
        "±",
        "frames",
        "bytes",
        "over budget",
    ]);
    for line in &report.results {
        table.add_row([
            line.name.to_owned(),
            format!("{:.3}", line.recall),
            format!("{:.3}", line.standard_error),
            format::percent(line.flagged),
            format::percent(line.used),
            format::bytes(line.bytes_over),
        ]);
    }
    let accuracy: f64 = report.models.iter().map(|model| model.accuracy).sum();
    writeln!(
        out,
        "{}: {} models of mean accuracy {}, {} streams of {} frames each, {} of them novel, seed {}",
        report.data,
        report.models.len(),
        format::percent(accuracy / report.models.len() as f64),
        report.streams,
        report.frames,
        format::percent(report.novel),
        report.seed
    )?;
    writeln!(out, "{table}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_chosen_by_name_and_unknown_ones_named() {
        let classes = ["cat", "dog", "eel"].map(str::to_owned);
        assert_eq!(choose("all", &classes).unwrap(), [0, 1, 2]);
        assert_eq!(choose("eel, cat", &classes).unwrap(), [2, 0]);
        let error = choose("cow", &classes).unwrap_err().to_string();
        assert!(error.contains("cow") && error.contains("dog"), "{error}");
    }

    #[test]
    fn the_mean_and_its_error_are_over_classes() {
        let outcome = |found| Outcome {
            came: 10,
            found,
            over: found,
            ..Outcome::default()
        };
        let model = |name: &str| Model {
            held_out: name.to_owned(),
            seed: 0,
            accuracy: 1.0,
        };
        let line = line("kNN", &[outcome(2), outcome(6)], &[model("a"), model("b")]);
        assert!((line.recall - 0.4).abs() < 1e-12);
        assert!((line.standard_error - 0.2).abs() < 1e-12);
        assert_eq!((line.bytes_over, line.by_class["b"]), (6, 0.6));
    }
}
