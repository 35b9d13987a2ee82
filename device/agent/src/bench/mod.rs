//! `flywheel-agent bench`: what a frame costs on this board, by stage and by engine, in time,
//! allocations and memory. It runs the production frame loop ([`crate::pipeline`]) on a data folder
//! of its own; nothing here is a copy of what it measures.

mod model;
mod report;
mod rig;
mod session;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use device_engine::{EngineKind, onnx_runtime};
use flywheel_shared::trust::PartKind;

pub use model::open as open_model;
pub use report::{Allocations, EngineReport, Measured, Percentiles, Report, StageReport};

use crate::allocations;
use crate::meter::Stage;
use crate::models::{EngineChoice, Package, Runner, UnknownChoice, fastest};
use report::{ModelReport, OperatorReport, memory};
use rig::Rig;

/// Frames that are run before anything is counted, at least: the trigger's warm-up and the growth of
/// every buffer lie in them.
const WARMUP: u64 = 300;
/// Runs that a profile is the median of.
const PROFILE_RUNS: u32 = 200;
/// Operators that a profile lists.
const PROFILE_ROWS: usize = 20;

/// Which engines are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engines {
    /// Each that this build has.
    All,
    /// One.
    One(EngineChoice),
}

impl FromStr for Engines {
    type Err = UnknownChoice;

    fn from_str(name: &str) -> Result<Self, UnknownChoice> {
        if name == "all" {
            return Ok(Self::All);
        }
        Ok(Self::One(name.parse()?))
    }
}

/// Flags of `bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// A folder that `flywheel model import` wrote, or one of a device's models/, or an ONNX file of
    /// a classifier; without it an untrained network of the built-in architecture.
    #[arg(long, value_name = "DIR|FILE")]
    pub model: Option<PathBuf>,
    /// tract, burn-flex, burn-ndarray, ort, auto (the fastest that works), or all.
    #[arg(long, value_name = "NAME", default_value = "all")]
    pub engine: Engines,
    /// Shared library of ONNX Runtime, for the engine ort; FLYWHEEL_ORT_LIBRARY if absent.
    #[arg(long, value_name = "FILE")]
    pub ort_library: Option<PathBuf>,
    /// Frames to measure, after a warm-up.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub frames: u64,
    /// Where frames come from; without it the simulator, at the model's size.
    #[arg(long, value_name = "URI")]
    pub source: Option<String>,
    /// Take this many frames a second and count those given up, instead of running flat out.
    #[arg(long, value_name = "N")]
    pub fps: Option<f32>,
    /// Also list what each operator costs, where the engine tells.
    #[arg(long)]
    pub profile: bool,
    /// Print JSON for programs.
    #[arg(long)]
    pub json: bool,
    /// Be driven by lines on stdin (`run FIRST COUNT`, `memory`), one engine only.
    #[arg(long, conflicts_with_all = ["fps", "profile"])]
    pub stdin: bool,
    /// Write the model's parts to a folder and end.
    #[arg(long, value_name = "DIR", conflicts_with = "stdin")]
    pub export: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// In words that name the flag or the file.
pub fn run(args: &BenchArgs) -> Result<()> {
    let started = Instant::now();
    if args.fps.is_some_and(|fps| !(fps > 0.0 && fps.is_finite())) {
        bail!("--fps must be a number above 0");
    }
    if let Some(library) = &args.ort_library {
        onnx_runtime::open(Some(library)).context("--ort-library")?;
    }
    let package = model::open(args.model.as_deref())?;
    if let Some(folder) = &args.export {
        package.write_parts(folder)?;
        println!("{}", folder.display());
        return Ok(());
    }
    if args.stdin {
        let Engines::One(choice) = args.engine else {
            bail!("--stdin needs one engine: add --engine tract");
        };
        let runner = choice.load(&package)?;
        let (engine, model) = (runner.engine().name(), describe(args, &package)?);
        let rig = Rig::new(runner, &source(args, &model), None)?;
        let load_ms = started.elapsed().as_secs_f64() * 1000.0;
        let (commands, answers) = (io::stdin().lock(), io::stdout().lock());
        return session::run(rig, engine, &model, load_ms, commands, answers);
    }
    let report = measure(args, &package)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

/// Measures a package with the engines of `args`.
///
/// # Errors
/// If the source cannot be used. An engine that does not run the model is a line of the report.
pub fn measure(args: &BenchArgs, package: &Package) -> Result<Report> {
    let model = describe(args, package)?;
    let source = source(args, &model);
    allocations::count_all();
    let mut engines = Vec::new();
    match args.engine {
        Engines::All => {
            for &kind in EngineKind::ALL {
                engines.push(one(args, package, &source, kind)?);
            }
        }
        Engines::One(EngineChoice::Fixed(kind)) => {
            engines.push(one(args, package, &source, kind)?);
        }
        Engines::One(EngineChoice::Auto) => {
            let (runner, trials) = fastest(package);
            for trial in trials {
                let chosen = runner.as_ref().map(Runner::engine) == Some(trial.engine);
                engines.push(match trial.result {
                    Ok(_) if chosen => one(args, package, &source, trial.engine)?,
                    Ok(nanos) => EngineReport {
                        engine: trial.engine.name(),
                        error: Some(format!(
                            "passes the golden inputs in {} µs, but another engine is faster",
                            nanos / 1000
                        )),
                        measured: None,
                    },
                    Err(error) => failed(trial.engine, error.to_string()),
                });
            }
        }
    }
    let speed = |report: &EngineReport| {
        let measured = report.measured.as_ref().filter(|m| m.golden)?;
        let infer = measured
            .stages
            .iter()
            .find(|s| s.stage == Stage::Infer.name())?;
        Some((infer.time.p50_us, report.engine))
    };
    let fastest = engines
        .iter()
        .filter_map(speed)
        .min_by(|a, b| a.0.total_cmp(&b.0));
    Ok(Report {
        agent: env!("CARGO_PKG_VERSION"),
        arch: std::env::consts::ARCH,
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        model,
        source,
        warmup: warmup(args.frames),
        fastest: fastest.map(|(_, engine)| engine),
        engines,
    })
}

fn describe(args: &BenchArgs, package: &Package) -> Result<ModelReport> {
    let spec = model::spec(package)?;
    let input = &spec.input;
    let name = match &args.model {
        None => "built-in".to_owned(),
        Some(path) => path.display().to_string(),
    };
    Ok(ModelReport {
        name,
        digest: package.digest.to_string(),
        input: [
            usize::from(input.channels),
            usize::from(input.height),
            usize::from(input.width),
        ],
        mean: input.mean,
        std: input.std,
        divisor: input.scale.divisor(),
        classes: spec.classes(),
        embedding: usize::from(spec.embedding),
        onnx_bytes: package.part(PartKind::Onnx).len(),
    })
}

fn source(args: &BenchArgs, model: &ModelReport) -> String {
    let [_, height, width] = model.input;
    let size = height.max(width).clamp(16, 256);
    let simulator = || format!("sim:roads?seed=1&size={size}");
    args.source.clone().unwrap_or_else(simulator)
}

fn warmup(frames: u64) -> u64 {
    WARMUP.max(frames / 10)
}

fn failed(engine: EngineKind, error: String) -> EngineReport {
    EngineReport {
        engine: engine.name(),
        error: Some(error),
        measured: None,
    }
}

fn one(
    args: &BenchArgs,
    package: &Package,
    source: &str,
    kind: EngineKind,
) -> Result<EngineReport> {
    let start = Instant::now();
    let mut runner = match Runner::load(kind, package) {
        Ok(runner) => runner,
        Err(error) => return Ok(failed(kind, error.to_string())),
    };
    let golden = runner.prove(package);
    let load_ms = start.elapsed().as_secs_f64() * 1000.0;
    let mut operators = Vec::new();
    if args.profile {
        let costs = runner.profile(PROFILE_RUNS)?;
        let all: u64 = costs.iter().map(|cost| cost.nanos).sum();
        operators.extend(
            costs
                .into_iter()
                .take(PROFILE_ROWS)
                .map(|cost| OperatorReport {
                    node: cost.node,
                    operator: cost.operator,
                    shape: cost.shape,
                    us: cost.nanos as f64 / 1000.0,
                    share: cost.nanos as f64 / all as f64,
                }),
        );
    }
    let mut rig = Rig::new(runner, source, args.fps)?;
    let measured = frames(&mut rig, args.frames).context("the frame loop failed")?;
    Ok(EngineReport {
        engine: kind.name(),
        error: None,
        measured: Some(Measured {
            load_ms,
            golden: golden.is_ok(),
            golden_error: golden.err().map(|error| error.to_string()),
            operators,
            ..measured
        }),
    })
}

/// Runs the warm-up and the frames to be measured.
fn frames(rig: &mut Rig, wanted: u64) -> Result<Measured> {
    for _ in 0..warmup(wanted) {
        rig.pipeline.take()?;
        // A listing of pictures starts over; a stream never ends.
        if rig.pipeline.ended() {
            rig.pipeline.seek(0);
        }
    }
    let mut tally = Tally::new(wanted);
    let dropped = rig.pipeline.dropped();
    let skipped = rig.shared.status().progress.skipped;
    let everywhere = allocations::of_all_threads();
    let mine = allocations::of_this_thread();
    let start = Instant::now();
    while tally.frames < wanted {
        let frame_start = Instant::now();
        let before = allocations::of_this_thread();
        rig.pipeline.take()?;
        let taken = allocations::of_this_thread() - before;
        let nanos = frame_start.elapsed().as_nanos() as u64;
        if rig.pipeline.ended() {
            if tally.frames == 0 && rig.frames == Some(0) {
                bail!("the source has no frames");
            }
            rig.pipeline.seek(0);
            continue;
        }
        tally.add(rig, taken, nanos);
    }
    let seconds = start.elapsed().as_secs_f64();
    let mine = allocations::of_this_thread() - mine;
    let others = (allocations::of_all_threads() - everywhere).saturating_sub(mine);
    let mut measured = tally.finish(others);
    measured.dropped = rig.pipeline.dropped() - dropped;
    measured.skipped = rig.shared.status().progress.skipped - skipped;
    measured.fps = measured.frames as f64 / seconds;
    (measured.rss_kib, measured.peak_rss_kib) = memory();
    Ok(measured)
}

/// The laps of all frames. Every buffer is made before the first one.
struct Tally {
    frames: u64,
    flagged: u64,
    laps: [Vec<u64>; Stage::ALL.len()],
    allocated: [(u64, u64); Stage::ALL.len()],
    frame: Vec<u64>,
    total: Vec<u64>,
    outside_unflagged: (u64, u64),
    outside_flagged: u64,
    score_trigger_max: u64,
}

impl Tally {
    fn new(frames: u64) -> Self {
        let buffer = || Vec::with_capacity(frames as usize);
        Self {
            frames: 0,
            flagged: 0,
            laps: Stage::ALL.map(|_| buffer()),
            allocated: [(0, 0); Stage::ALL.len()],
            frame: buffer(),
            total: buffer(),
            outside_unflagged: (0, 0),
            outside_flagged: 0,
            score_trigger_max: 0,
        }
    }

    fn add(&mut self, rig: &Rig, taken: u64, nanos: u64) {
        let meter = rig.pipeline.meter();
        let lap = |stage| meter.lap(stage).unwrap_or_default();
        for stage in Stage::ALL {
            if let Some(lap) = meter.lap(stage) {
                self.laps[stage as usize].push(lap.nanos);
                let (sum, max) = &mut self.allocated[stage as usize];
                *sum += lap.allocations;
                *max = lap.allocations.max(*max);
            }
        }
        self.frames += 1;
        self.frame.push(
            Stage::ALL
                .into_iter()
                .filter(|stage| *stage != Stage::Read)
                .map(|stage| lap(stage).nanos)
                .sum(),
        );
        self.total.push(nanos);
        let outside = taken - lap(Stage::Infer).allocations - lap(Stage::Read).allocations;
        if meter.lap(Stage::Spool).is_some() {
            self.flagged += 1;
            self.outside_flagged += outside;
        } else if meter.lap(Stage::Preprocess).is_some() {
            // Of a picture that cannot be read, the log says so, which allocates.
            let (sum, max) = &mut self.outside_unflagged;
            *sum += outside;
            *max = outside.max(*max);
        }
        let both = lap(Stage::Score).allocations + lap(Stage::Trigger).allocations;
        self.score_trigger_max = both.max(self.score_trigger_max);
    }

    fn finish(mut self, other_threads: u64) -> Measured {
        let mean = |sum: u64, count: u64| {
            if count > 0 {
                sum as f64 / count as f64
            } else {
                0.0
            }
        };
        let sum = |stage: Stage| self.allocated[stage as usize].0;
        let taken = Allocations {
            outside_unflagged: mean(self.outside_unflagged.0, self.frames - self.flagged),
            outside_unflagged_max: self.outside_unflagged.1,
            score_trigger_max: self.score_trigger_max,
            outside_flagged: mean(self.outside_flagged, self.flagged),
            engine: mean(sum(Stage::Infer), self.frames),
            other_threads: mean(other_threads, self.frames),
            source: mean(sum(Stage::Read), self.frames),
        };
        let counted = allocations::are_counted();
        let mut medians = [0.0; Stage::ALL.len()];
        let mut stages = Vec::new();
        for (stage, laps) in Stage::ALL.into_iter().zip(&mut self.laps) {
            let (sum, max) = self.allocated[stage as usize];
            if laps.is_empty() {
                continue;
            }
            let time = Percentiles::of(laps);
            medians[stage as usize] = time.p50_us;
            stages.push(StageReport {
                stage: stage.name(),
                count: laps.len(),
                time,
                allocations: counted.then(|| mean(sum, laps.len() as u64)),
                max_allocations: counted.then_some(max),
            });
        }
        let median = |stage: Stage| medians[stage as usize];
        Measured {
            score_trigger_share: (median(Stage::Score) + median(Stage::Trigger))
                / median(Stage::Infer).max(f64::MIN_POSITIVE),
            stages,
            frame: Percentiles::of(&mut self.frame),
            total: Percentiles::of(&mut self.total),
            allocations: counted.then_some(taken),
            frames: self.frames,
            flagged: self.flagged,
            ..Measured::default()
        }
    }
}
