//! `flywheel demo`: the whole loop on this machine, with real processes and real sockets.
//!
//! The demo is an operator: it starts a server and devices, then does by the same HTTP API what
//! people do by hand. Devices take frames in lockstep (so many a round, as fast as they can), so
//! that one seed gives one outcome whatever the speed of the machine.

mod chaos;
mod labeller;
pub(crate) mod processes;
mod report;
mod world;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

pub use processes::{LIFELINE, hold_lifeline};

use crate::api::types::{
    AdvanceRequest, AuditView, DatasetView, DeviceView, EvalRequest, FreezeRequest, ItemView,
    JobView, ModelView, QueueItem, RolloutRequest, RolloutView, Split, TokenReply, TokenRequest,
    TrainRequest,
};
use crate::cli::fleet::audit_line;
use crate::cli::rollout::tally;
use crate::cli::{EXIT_NEGATIVE, data::percent_encode, format, model as model_cli};
use crate::client::{ADDRESS_FILE, Client, ClientError, TOKEN_FILE, fresh_key};
use crate::keys;
use crate::service::now_ms;
use chaos::Chaos;
use labeller::Labeller;
use processes::{Process, Spec};
use report::{Found, Report, Round};
use world::{World, device_id};

/// Share of wrong answers of the simulated labeller.
const LABELLER_ERROR: f64 = 0.02;
/// Pictures imported at a time.
const IMPORTS: usize = 8;
/// How long a station may take before the demo gives up; far above what any takes.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long the server may be away while it starts or starts again.
const SERVER_AWAY: Duration = Duration::from_secs(60);

/// How samples are chosen, on devices and in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Select {
    /// By lanes on the device and by the flywheel strategy in the queue.
    Flywheel,
    /// By lot on both sides, under the same budgets: the baseline.
    Random,
}

/// Arguments of `flywheel demo`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Examples:\n  flywheel demo\n  flywheel demo --seed 7 --rounds 3 --devices 4 --labels 200 --json out.json\n  flywheel demo --source idx:DIR --rare 8=0.005 --late 9\n  flywheel demo --source dir:DIR"
)]
pub struct DemoArgs {
    /// Frames: sim:roads, idx:DIR (MNIST format) or dir:DIR (a folder of pictures per class).
    #[arg(long, default_value = "sim:roads")]
    source: String,
    /// A class held to a share of the frames, as in 8=0.005; may be given several times.
    #[arg(long, value_name = "CLASS=SHARE", value_parser = parse_rare)]
    rare: Vec<(String, f64)>,
    /// The class that appears after the first round.
    #[arg(long, value_name = "CLASS")]
    late: Option<String>,
    /// Seed of everything.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Rounds of labelling, training and rollout.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Devices; every other one prefers MQTT, the rest QUIC.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    devices: u32,
    /// Labels in each round.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    labels: u32,
    /// Frames of each device in each round.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(200..))]
    frames: u64,
    /// Share of the bytes seen that devices may upload, in percent.
    #[arg(long, default_value_t = 4.5)]
    budget: f64,
    /// How samples are chosen.
    #[arg(long, value_enum, default_value_t = Select::Flywheel)]
    select: Select,
    /// Inference engine of the devices: tract, burn-flex, burn-ndarray, or auto for the fastest.
    #[arg(long, default_value = "tract")]
    engine: String,
    /// Optimiser steps of each training run; chosen from the data if absent.
    #[arg(long)]
    steps: Option<u32>,
    /// From this round on fit the classifier alone: seconds instead of a minute, and less learnt.
    #[arg(long, value_name = "ROUND", value_parser = clap::value_parser!(u32).range(1..))]
    refit_from: Option<u32>,
    /// Scale of the first labelled sets and the held-out set.
    #[arg(long, default_value_t = 1.0, hide = true)]
    scale: f64,
    /// Kill so many processes (server or a device, by lot) at random moments.
    #[arg(long, default_value_t = 0)]
    chaos: u32,
    /// Write the report to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep everything in this folder; a temporary one is removed at the end.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Leave server and devices running at the end, and print the address.
    #[arg(long)]
    keep: bool,
}

fn parse_rare(text: &str) -> Result<(String, f64), String> {
    let wanted = "expected CLASS=SHARE with a share between 0 and 1, as in 8=0.005";
    let (class, share) = text.rsplit_once('=').ok_or(wanted)?;
    let share: f64 = share.parse().map_err(|_| wanted)?;
    if class.is_empty() || !(share > 0.0 && share < 1.0) {
        return Err(wanted.to_owned());
    }
    Ok((class.to_owned(), share))
}

/// Runs the demo.
///
/// # Errors
/// If a station fails; the message names it and the log to read.
pub fn run(args: DemoArgs) -> Result<ExitCode> {
    args.engine
        .parse::<flywheel_agent::models::EngineChoice>()
        .map_err(|error| anyhow::anyhow!("--engine: {error}"))?;
    if !(args.budget > 0.0 && args.budget <= 100.0) {
        bail!("--budget is in percent of the bytes seen: above 0, at most 100");
    }
    let mut temporary = None;
    let dir = match &args.dir {
        Some(dir) => {
            if dir.exists()
                && std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
            {
                bail!(
                    "--dir {} is not empty; the demo starts from nothing: give a new folder",
                    dir.display()
                );
            }
            std::fs::create_dir_all(dir)
                .with_context(|| format!("cannot create --dir {}", dir.display()))?;
            dir.clone()
        }
        None => {
            let made = tempfile::Builder::new()
                .prefix("flywheel-demo-")
                .tempdir()
                .context("cannot create a temporary folder")?;
            temporary.insert(made).path().to_owned()
        }
    };
    let dir = std::path::absolute(&dir).context("the current folder is gone")?;
    let keep = args.keep;
    let json = args.json.clone();
    let turned = Demo::start(args, &dir).and_then(|mut demo| {
        let report = demo.turn()?;
        Ok((demo, report))
    });
    let (demo, report) = match turned {
        Ok(turned) => turned,
        Err(error) => {
            // The logs that the error speaks of must outlive it.
            if let Some(temporary) = temporary {
                let _ = temporary.keep();
            }
            return Err(error.context(format!(
                "the demo's logs are in {}",
                dir.join("logs").display()
            )));
        }
    };
    println!("{}", report.table());
    println!("{}", audit_line(&report.audit));
    if let Some(path) = &json {
        let text = serde_json::to_string_pretty(&report).context("the report does not encode")?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("cannot write --json {}", path.display()))?;
    }
    if keep {
        println!(
            "The server is at {}; its data is in {}. Try `flywheel queue ls --data {}`. Press Ctrl-C to end.",
            demo.client.server(),
            demo.cloud_dir.display(),
            demo.cloud_dir.display()
        );
        loop {
            demo.check()?;
            std::thread::park_timeout(Duration::from_secs(1));
        }
    }
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_NEGATIVE)
    })
}

struct Demo {
    args: DemoArgs,
    world: World,
    cloud_dir: PathBuf,
    keys_dir: PathBuf,
    client: Client,
    // Devices end before the server, so that their last acknowledgements arrive.
    devices: Vec<Process>,
    server: Process,
    seconds: BTreeMap<String, f64>,
    /// When the last label of the batch was given.
    labelled: Option<Instant>,
    chaos: Chaos,
}

/// How a rollout went, and how long after the last label of the batch devices had the model.
#[derive(Default)]
struct Released {
    state: String,
    canary_s: Option<f64>,
    all_s: Option<f64>,
}

impl Demo {
    fn start(args: DemoArgs, dir: &Path) -> Result<Self> {
        let started = Instant::now();
        let world = World::new(&world::Plan {
            source: &args.source,
            rare: &args.rare,
            late: args.late.as_deref(),
            seed: args.seed,
            devices: args.devices,
            frames: args.frames,
            scale: args.scale,
        })?;
        let keys_dir = dir.join("keys");
        let cloud_dir = dir.join("cloud");
        let logs = dir.join("logs");
        std::fs::create_dir_all(&logs)
            .with_context(|| format!("cannot create {}", logs.display()))?;
        keys::init(&keys_dir, &keys::Plan::new(now_ms()))?;
        let server = Process::start(Spec {
            name: "server".to_owned(),
            args: [
                "serve",
                "--data",
                &cloud_dir.to_string_lossy(),
                "--keys",
                &keys_dir.to_string_lossy(),
                "--http-port",
                "0",
                "--select",
                match args.select {
                    Select::Flywheel => "flywheel",
                    Select::Random => "random",
                },
                "--batch",
                &args.labels.to_string(),
                "--track-reach",
                &world.track_reach.to_string(),
                "--seed",
                &args.seed.to_string(),
            ]
            .map(str::to_owned)
            .to_vec(),
            log: logs.join("server.log"),
        })?;
        wait_for(&server, "the server to listen", || {
            Ok(cloud_dir.join(ADDRESS_FILE).exists() && cloud_dir.join(TOKEN_FILE).exists())
        })?;
        let client = Client::from_data(&cloud_dir, None)?.with_patience(SERVER_AWAY);
        let _: crate::api::types::Info = client.get("/v1/info")?;
        let mut demo = Self {
            chaos: Chaos::new(args.chaos, args.seed),
            args,
            world,
            cloud_dir,
            keys_dir,
            client,
            devices: Vec::new(),
            server,
            seconds: BTreeMap::new(),
            labelled: None,
        };
        for at in 0..demo.world.devices.len() {
            let process = demo.start_device(at, dir, &logs)?;
            demo.devices.push(process);
        }
        demo.spent("start", started);
        Ok(demo)
    }

    fn start_device(&self, at: usize, dir: &Path, logs: &Path) -> Result<Process> {
        let id = device_id(at);
        let data = dir.join("devices").join(&id);
        std::fs::create_dir_all(&data)
            .with_context(|| format!("cannot create {}", data.display()))?;
        let token: TokenReply = self.client.post(
            "/v1/devices/tokens",
            &TokenRequest {
                device: Some(id.clone()),
                group: None,
                ttl_s: None,
            },
        )?;
        flywheel_agent::enroll::enroll(&flywheel_agent::enroll::Request {
            url: self.client.server().to_owned(),
            token: token.token,
            data: data.clone(),
            device: Some(id.parse().context("the id of a demo device")?),
            force: false,
        })
        .with_context(|| format!("{id} can't enrol"))?;
        let shares = match self.args.select {
            Select::Flywheel => "",
            Select::Random => {
                "shares = { novel = 0.0, unsure = 0.0, disagree = 0.0, campaign = 0.0, uniform = 1.0 }\n"
            }
        };
        let transport = if at.is_multiple_of(2) {
            r#"["quic", "mqtt"]"#
        } else {
            r#"["mqtt", "quic"]"#
        };
        let config = format!(
            "data = {data}\nsource = {source}\nengine = \"{engine}\"\ntransport = {transport}\npace = \"lockstep\"\nhealth_interval_ms = 500\nseed = {seed}\n\n[budget]\nratio = {ratio}\nburst_kib = 16\n{shares}",
            data = toml_string(&data.to_string_lossy()),
            source = toml_string(&self.world.devices[at]),
            engine = self.args.engine,
            seed = self.args.seed.wrapping_add(at as u64),
            ratio = self.args.budget / 100.0,
        );
        let path = data.join("agent.toml");
        std::fs::write(&path, config)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Process::start(Spec {
            name: id.clone(),
            args: vec![
                "agent".to_owned(),
                "run".to_owned(),
                "--config".to_owned(),
                path.to_string_lossy().into_owned(),
            ],
            log: logs.join(format!("{id}.log")),
        })
    }

    /// The loop.
    fn turn(&mut self) -> Result<Report> {
        let mut labeller = Labeller {
            sources: self.world.truths()?,
            // Nobody answers with a sign that has not been put up yet.
            classes: self
                .world
                .classes
                .iter()
                .filter(|class| **class != self.world.late)
                .cloned()
                .collect(),
            error_rate: LABELLER_ERROR,
            seed: self.args.seed,
            answers: BTreeMap::new(),
        };
        self.import_sets()?;
        let mut rounds = vec![self.train_and_release(0, 0, true)?];
        let mut labels = 0;
        for number in 1..=self.args.rounds {
            self.stream(u64::from(number) * self.args.frames)?;
            labels += self.label(&mut labeller)?;
            let found = self.found(&labeller)?;
            let mut round = self.train_and_release(number, labels, false)?;
            round.found = found;
            rounds.push(round);
        }
        // What trials flagged is still on its way.
        self.settle("settle", 0)?;
        let audit: AuditView = self.client.get("/v1/audit")?;
        let released = rounds.iter().filter(|round| round.rollout != "none");
        let ok = audit.balanced
            && released.clone().all(|round| round.rollout == "confirmed")
            && released.count() > 0;
        Ok(Report {
            source: self.world.source.clone(),
            seed: self.args.seed,
            select: match self.args.select {
                Select::Flywheel => "flywheel",
                Select::Random => "random",
            }
            .to_owned(),
            devices: self.args.devices,
            engine: self.args.engine.clone(),
            labeller_error: LABELLER_ERROR,
            rare: self.world.rare.clone(),
            late: self.world.late.clone(),
            rounds,
            labels_digest: labeller.digest().to_string(),
            audit,
            restarts: std::iter::once(&self.server)
                .chain(&self.devices)
                .map(|process| (process.name().to_owned(), process.restarts()))
                .collect(),
            seconds: self.seconds.clone(),
            ok,
        })
    }

    fn import_sets(&mut self) -> Result<()> {
        let started = Instant::now();
        let total: u64 = self.world.sets.iter().map(|(_, _, count, _)| count).sum();
        let bar = bar("import", total)?;
        for (split, uri, count, stride) in self.world.sets.clone() {
            let name = match split {
                Split::Train => "train",
                Split::Golden => "golden",
                Split::Calibration => "calibration",
            };
            let pictures = world::draw(&uri, count, stride)?;
            // Several at a time, so that one flush of the server's disk serves them all.
            for group in pictures.chunks(IMPORTS) {
                let put = |(class, track, file): &(String, String, Vec<u8>)| {
                    self.client.put_bytes::<ItemView>(
                        &format!(
                            "/v1/items?split={name}&class={}&track={}",
                            percent_encode(class),
                            percent_encode(track)
                        ),
                        file,
                    )
                };
                std::thread::scope(|scope| {
                    let running: Vec<_> = group
                        .iter()
                        .map(|picture| scope.spawn(move || put(picture)))
                        .collect();
                    running.into_iter().try_for_each(|thread| {
                        thread
                            .join()
                            .map_err(|_| anyhow::anyhow!("an import was cut short"))?
                            .map(drop)
                            .map_err(anyhow::Error::from)
                    })
                })?;
                bar.inc(group.len() as u64);
                self.disturb();
            }
        }
        bar.finish_and_clear();
        self.spent("import", started);
        Ok(())
    }

    /// Lets every device run up to a frame and waits until all that they flagged is in the cloud.
    fn stream(&mut self, run_until: u64) -> Result<()> {
        let started = Instant::now();
        let _: serde_json::Value = self
            .client
            .post("/v1/lockstep", &AdvanceRequest { run_until })?;
        self.settle("stream", run_until)?;
        self.spent("stream", started);
        Ok(())
    }

    fn settle(&mut self, name: &'static str, run_until: u64) -> Result<()> {
        let bar = bar(name, run_until * u64::from(self.args.devices))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.disturb();
            let devices: Vec<DeviceView> = self.client.get("/v1/devices")?;
            bar.set_position(devices.iter().map(|d| d.frame.min(run_until)).sum());
            let done = devices.iter().filter(|d| d.idle && d.frame >= run_until);
            if done.count() == self.devices.len() && !self.chaos.is_waiting_for_restart() {
                bar.finish_and_clear();
                return Ok(());
            }
            self.check()?;
            if Instant::now() > deadline {
                bail!("the devices do not come to rest; see the logs of cam1 …");
            }
            std::thread::park_timeout(model_cli::POLL);
        }
    }

    fn label(&mut self, labeller: &mut Labeller) -> Result<u32> {
        let started = Instant::now();
        let bar = bar("label", u64::from(self.args.labels))?;
        let labelled = labeller.work(&self.client, self.args.labels, &bar)?;
        self.labelled = Some(Instant::now());
        bar.finish_and_clear();
        self.spent("label", started);
        Ok(labelled)
    }

    /// Counts what was found, which only the source's truth can tell.
    fn found(&self, labeller: &Labeller) -> Result<Found> {
        let items: Vec<QueueItem> = self.client.get("/v1/queue?limit=1000000")?;
        let mut found = Found::default();
        for item in items {
            let truth = labeller
                .sources
                .get(&item.device)
                .and_then(|source| source.truth(item.frame))
                .unwrap_or_default();
            let labelled = u32::from(item.state == "labelled");
            found.uploaded += 1;
            if self.world.rare.contains(&truth) {
                found.uploaded_rare += 1;
                found.labelled_rare += labelled;
            } else if truth == self.world.late {
                found.uploaded_late += 1;
                found.labelled_late += labelled;
            }
        }
        Ok(found)
    }

    fn train_and_release(&mut self, number: u32, labels: u32, scratch: bool) -> Result<Round> {
        let started = Instant::now();
        let dataset: DatasetView = self.client.post(
            "/v1/datasets",
            &FreezeRequest {
                seed: Some(self.args.seed),
                pseudo_above: None,
            },
        )?;
        let job: JobView = self.client.post(
            "/v1/train",
            &TrainRequest {
                dataset: dataset.id,
                seed: Some(self.args.seed.wrapping_add(u64::from(number))),
                steps: self.args.steps,
                scratch: Some(scratch),
                head: Some(self.args.refit_from.is_some_and(|from| number >= from)),
                key: Some(fresh_key()?),
            },
        )?;
        let candidate = self.finish(&job, "train")?;
        self.spent("train", started);

        let started = Instant::now();
        let job: JobView = self.client.post(
            "/v1/eval",
            &EvalRequest {
                model: candidate,
                rare: Some(self.world.rare.clone()),
                key: Some(fresh_key()?),
            },
        )?;
        let candidate = self.finish(&job, "evaluate")?;
        self.spent("evaluate", started);

        let started = Instant::now();
        let model: ModelView = self.client.get(&format!("/v1/models/{candidate}"))?;
        let gate = model.gate.clone().context("the server judged no gate")?;
        let rollout = if gate.passed {
            model_cli::promote(&self.client, &model.id, &self.keys_dir, None)?;
            self.roll_out(&model.id)?
        } else {
            Released {
                state: "none".to_owned(),
                ..Released::default()
            }
        };
        self.spent("rollout", started);
        let champion: ModelView = if gate.passed {
            model.clone()
        } else {
            self.client.get("/v1/models/champion").with_context(|| {
                format!(
                    "the gate refused the first model: {}",
                    gate.reasons.join("; ")
                )
            })?
        };
        let devices: Vec<DeviceView> = self.client.get("/v1/devices")?;
        let mut round = Round {
            round: number,
            model: champion.id.clone(),
            labels,
            bytes_seen: devices.iter().map(|d| d.bytes_seen).sum(),
            bytes_up: devices.iter().map(|d| d.bytes_up).sum(),
            accuracy: 0.0,
            balanced_accuracy: 0.0,
            rare_recall: 0.0,
            late_recall: 0.0,
            ece: 0.0,
            gate: if gate.passed {
                "passed".to_owned()
            } else {
                gate.reasons.join("; ")
            },
            rollout: rollout.state,
            label_to_canary_s: rollout.canary_s,
            label_to_all_s: rollout.all_s,
            candidate: model.id,
            found: Found::default(),
        };
        let report = champion.report.context("the champion was not evaluated")?;
        round.measure(&report, &self.world.late);
        eprintln!(
            "round {number}: accuracy {}, rare {}, late {}, gate {}{}",
            format::percent(round.accuracy),
            format::percent(round.rare_recall),
            format::percent(round.late_recall),
            round.gate,
            match (round.label_to_canary_s, round.label_to_all_s) {
                (Some(canary), Some(all)) => format!(
                    "; from the last label to the canary {canary:.1} s, to all devices {all:.1} s"
                ),
                _ => String::new(),
            }
        );
        Ok(round)
    }

    fn finish(&mut self, job: &JobView, name: &'static str) -> Result<String> {
        let bar = model_cli::bar(name)?;
        loop {
            self.disturb();
            let job: JobView = self
                .client
                .get(&format!("/v1/jobs/{}?wait_ms=300", job.id))?;
            bar.set_length(job.steps);
            bar.set_position(job.step);
            bar.set_message(job.message.clone());
            match job.state.as_str() {
                "done" => {
                    bar.finish_and_clear();
                    return job.model.context("a finished job names no model");
                }
                "failed" => bail!("{name}: {}", job.error.unwrap_or_default()),
                _ => self.check()?,
            }
        }
    }

    fn roll_out(&mut self, model: &str) -> Result<Released> {
        let bar = bar("rollout", u64::from(self.args.devices))?;
        let request = RolloutRequest {
            model: model.to_owned(),
            ..RolloutRequest::default()
        };
        let since = self.labelled;
        let elapsed = move || since.map(|labelled| labelled.elapsed().as_secs_f64());
        let mut canary_s = None;
        let mut rollout: RolloutView = match self.client.post("/v1/rollouts", &request) {
            // The server was killed after it had stored the rollout and before it answered.
            Err(ClientError::Refused {
                status: 409,
                message,
            }) => {
                let latest: RolloutView = self.client.get("/v1/rollouts/latest")?;
                anyhow::ensure!(latest.model == model, message);
                latest
            }
            answer => answer?,
        };
        let deadline = Instant::now() + PATIENCE;
        while rollout.state == "running" {
            self.disturb();
            rollout = self
                .client
                .get(&format!("/v1/rollouts/{}?wait_ms=300", rollout.id))?;
            let confirmed = rollout.devices.values().filter(|d| d.state == "confirmed");
            bar.set_position(confirmed.count() as u64);
            bar.set_message(tally(&rollout));
            let canary = rollout.waves.first();
            if canary.is_some_and(|wave| wave.states.get("confirmed") == Some(&wave.devices)) {
                canary_s = canary_s.or_else(elapsed);
            }
            self.check()?;
            if Instant::now() > deadline {
                bail!(
                    "the rollout does not end: {}; see the logs of cam1 …",
                    tally(&rollout)
                );
            }
        }
        bar.finish_and_clear();
        if let Some(reason) = &rollout.reason {
            eprintln!("rollout {}: {} ({reason})", rollout.id, rollout.state);
        }
        let all_s = elapsed().filter(|_| rollout.state == "confirmed");
        Ok(Released {
            state: rollout.state,
            canary_s: canary_s.or(all_s),
            all_s,
        })
    }

    /// Fails once a process can't be kept running.
    fn check(&self) -> Result<()> {
        self.server.check()?;
        self.devices.iter().try_for_each(Process::check)
    }

    fn disturb(&mut self) {
        self.chaos.disturb(&self.server, &self.devices);
    }

    fn spent(&mut self, station: &str, since: Instant) {
        *self.seconds.entry(station.to_owned()).or_insert(0.0) += since.elapsed().as_secs_f64();
    }
}

fn bar(name: &'static str, len: u64) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix:>10} {bar:36} {pos}/{len} {msg}")
        .context("the progress bar's template")?;
    Ok(ProgressBar::new(len).with_style(style).with_prefix(name))
}

fn wait_for(process: &Process, what: &str, ready: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SERVER_AWAY;
    while !ready()? {
        process.check()?;
        if Instant::now() > deadline {
            bail!(
                "waited in vain for {what}; see the log of {}",
                process.name()
            );
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    Ok(())
}

/// A TOML basic string.
fn toml_string(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rare_classes_are_parsed_and_bad_ones_refused() {
        assert_eq!(parse_rare("8=0.005"), Ok(("8".to_owned(), 0.005)));
        assert_eq!(parse_rare("a=b=0.5"), Ok(("a=b".to_owned(), 0.5)));
        for bad in ["8", "8=", "8=2", "=0.1", "8=-0.1"] {
            assert!(
                parse_rare(bad).unwrap_err().contains("CLASS=SHARE"),
                "{bad}"
            );
        }
    }

    #[test]
    fn paths_survive_toml() {
        let text = toml_string("a \"quoted\" \\ path");
        let parsed: toml::Table = toml::from_str(&format!("p = {text}")).unwrap();
        assert_eq!(parsed["p"].as_str(), Some("a \"quoted\" \\ path"));
    }
}
