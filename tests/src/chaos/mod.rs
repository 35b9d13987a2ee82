//! The promise of the uplink under the worst treatment: agents, server and broker are killed with
//! SIGKILL at random moments while the network between them loses and cuts, and in the end every
//! flagged sample is in the cloud exactly once, or the device's books say why not.
//!
//! The run has two halves. In the first, frames flow and processes die. In the second the network
//! is calm and nobody is killed; devices upload what they kept. Then the conservation law is asked
//! of the server, and its store is opened and counted apart from it.

mod proxy;
mod victim;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use flywheel::api::types::{AdvanceRequest, AuditView, DeviceView, TokenReply, TokenRequest};
use flywheel::client::{ADDRESS_FILE, Client, ClientError};
use flywheel::ingest::broker_files;
use flywheel::ingest::endpoints::Endpoints;
use flywheel::pki::Pki;
use flywheel::store::Store;
use flywheel_agent::identity;
use indicatif::{ProgressBar, ProgressStyle};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::wait_until;
use proxy::Proxy;
use victim::{Spec, Victim};

/// Frames that every device may take between two kills.
const FRAMES: u64 = 6;
/// Milliseconds between two kills.
const BETWEEN_MS: std::ops::Range<u64> = 100..700;
/// How often processes are looked after.
const LOOK: Duration = Duration::from_millis(20);
/// How long the server may be away, killed as it is.
const AWAY: Duration = Duration::from_secs(60);
/// Samples read from the store at a time.
const PAGE: usize = 1000;

/// A way to the cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// MQTT by an external broker.
    Mosquitto,
    /// MQTT by the embedded broker.
    Rumqttd,
    /// QUIC.
    Quic,
}

impl Route {
    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mosquitto => "mosquitto",
            Self::Rumqttd => "rumqttd",
            Self::Quic => "quic",
        }
    }

    /// The routes that can be tried here; says so on stderr if mosquitto is missing.
    pub fn present() -> Vec<Self> {
        let mut routes = vec![Self::Rumqttd, Self::Quic];
        if mosquitto().is_some() {
            routes.insert(0, Self::Mosquitto);
        } else {
            eprintln!("skipped: no mosquitto here (apt-get install mosquitto)");
        }
        routes
    }
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The program that is `flywheel` when it has a lifeline.
    pub program: PathBuf,
    /// Folder for data and logs; made, and must not hold a run already.
    pub dir: PathBuf,
    /// How devices talk.
    pub route: Route,
    /// Kills.
    pub kills: u32,
    /// Devices.
    pub devices: u32,
    /// Share of lost packets, 0 to 1.
    pub loss: f64,
    /// Seed of kills, losses and cuts.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How devices talked.
    pub route: Route,
    /// The seed.
    pub seed: u64,
    /// Kills by kind of process.
    pub kills: BTreeMap<&'static str, u32>,
    /// Times that a process ended unasked (a server without broker) and was started again.
    pub restarts: u32,
    /// Packets that the proxy passed.
    pub packets_passed: u64,
    /// Packets that it lost.
    pub packets_lost: u64,
    /// Times that it cut the link.
    pub cuts: u64,
    /// Samples flagged by devices.
    pub flagged: u64,
    /// Samples in the cloud, as the audit says.
    pub ingested: u64,
    /// Samples that devices still hold.
    pub spooled: u64,
    /// Samples lost, by the reason that the device recorded.
    pub dropped: BTreeMap<String, u64>,
    /// Numbers that are nowhere: acknowledged and lost, or never booked.
    pub missing: Vec<String>,
    /// Samples in the store, counted apart from the audit.
    pub stored: u64,
    /// Samples that are in the store twice.
    pub doubled: u64,
    /// Stored samples whose picture is gone or damaged.
    pub damaged: u64,
    /// Whether the audit balances.
    pub balanced: bool,
    /// Seconds from the first kill to the end.
    pub seconds: f64,
}

impl Report {
    /// Whether nothing was lost, doubled or damaged.
    pub fn is_clean(&self) -> bool {
        self.balanced
            && self.missing.is_empty()
            && self.spooled == 0
            && self.doubled == 0
            && self.damaged == 0
            && self.stored == self.ingested
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kills: Vec<String> = self.kills.iter().map(|(k, n)| format!("{n} {k}")).collect();
        let dropped: u64 = self.dropped.values().sum();
        write!(
            f,
            "{}: killed {}; {} of {} packets lost, {} cuts; {} flagged = {} ingested + {} spooled + \
             {dropped} dropped {:?}; {} stored, {} doubled, {} damaged; {:.0} s: {}",
            self.route.name(),
            kills.join(", "),
            self.packets_lost,
            self.packets_lost + self.packets_passed,
            self.cuts,
            self.flagged,
            self.ingested,
            self.spooled,
            self.dropped,
            self.stored,
            self.doubled,
            self.damaged,
            self.seconds,
            if self.is_clean() {
                "clean"
            } else {
                "NOT CLEAN"
            }
        )
    }
}

/// Does it.
///
/// # Errors
/// If a process can't be kept running, or devices do not come to rest.
pub fn run(plan: &Plan) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let mut world = World::build(plan, &runtime)?;
    let started = Instant::now();
    world.disturb(plan)?;
    world.settle()?;
    let audit: AuditView = world.client()?.get("/v1/audit")?;
    let mut report = world.report(plan, audit);
    // The server's lock on its folder ends with it.
    let data = world.data.clone();
    drop(world);
    count_store(&data, &mut report)?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

struct World {
    data: PathBuf,
    broker: Option<Victim>,
    server: Victim,
    agents: Vec<Victim>,
    proxy: Proxy,
    run_until: u64,
}

impl World {
    fn build(plan: &Plan, runtime: &tokio::runtime::Runtime) -> Result<Self> {
        let dir = &plan.dir;
        ensure!(
            !dir.join("cloud").exists(),
            "{} holds a run already; choose another folder",
            dir.display()
        );
        std::fs::create_dir_all(dir)?;
        let data = dir.join("cloud");
        flywheel::keys::init(
            &dir.join("keys"),
            &flywheel::keys::Plan {
                now_ms: flywheel_agent::clock::unix_ms(),
                days: 30,
                roots: None,
                min_sequence: None,
            },
        )?;
        let mut serve = flags(&[
            "serve",
            "--data",
            &text(&data),
            "--keys",
            &text(&dir.join("keys")),
            "--http-port",
            "0",
        ]);
        let mut broker = None;
        let mut broker_address = None;
        if plan.route == Route::Mosquitto {
            let (address, victim) = start_mosquitto(dir, &data)?;
            serve.extend(flags(&[
                "--broker",
                &format!("mqtts://{address}"),
                "--broker-for-devices",
                &address.to_string(),
            ]));
            (broker, broker_address) = (Some(victim), Some(address));
        }
        let mut server = Victim::start(plan.spec("server", serve))?;
        wait_until("the server answers", || {
            server.look()?;
            Ok(data.join(ADDRESS_FILE).exists()
                && Client::from_data(&data, None)?
                    .get::<Vec<DeviceView>>("/v1/devices")
                    .is_ok())
        })?;
        let client = Client::from_data(&data, None)?;
        let endpoints: Endpoints =
            serde_json::from_slice(&std::fs::read(data.join("endpoints.json"))?)?;
        let seed = plan.seed ^ 0x70_78;
        let proxy = runtime.block_on(async {
            match plan.route {
                Route::Mosquitto | Route::Rumqttd => {
                    let upstream = broker_address.unwrap_or(endpoints.mqtt);
                    Proxy::tcp(upstream, plan.loss, seed).await
                }
                Route::Quic => Proxy::udp(endpoints.quic, plan.loss, seed).await,
            }
        })?;
        // Otherwise devices run as far as they can before the first kill.
        advance(&client, 0)?;
        let agents = (1..=plan.devices)
            .map(|number| start_agent(plan, &client, proxy.address, number))
            .collect::<Result<_>>()?;
        Ok(Self {
            data,
            broker,
            server,
            agents,
            proxy,
            run_until: 0,
        })
    }

    /// A client of the server as it is now.
    fn client(&self) -> Result<Client> {
        Ok(Client::from_data(&self.data, None)?.with_patience(AWAY))
    }

    fn victims(&mut self) -> impl Iterator<Item = &mut Victim> {
        self.agents
            .iter_mut()
            .chain([&mut self.server])
            .chain(&mut self.broker)
    }

    /// Lets frames flow and kills.
    fn disturb(&mut self, plan: &Plan) -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(plan.seed);
        let bar = ProgressBar::new(u64::from(plan.kills)).with_style(ProgressStyle::with_template(
            "{msg} {wide_bar} {pos}/{len} kills, {eta} left",
        )?);
        bar.set_message(plan.route.name());
        for _ in 0..plan.kills {
            self.run_until += FRAMES;
            // The server may be away; the next call says it again and more.
            let _ = advance(&Client::from_data(&self.data, None)?, self.run_until);
            let until = Instant::now() + Duration::from_millis(rng.random_range(BETWEEN_MS));
            while Instant::now() < until {
                self.victims().try_for_each(Victim::look)?;
                std::thread::park_timeout(LOOK);
            }
            // Half of the kills hit agents, the rest server and broker.
            let agents = self.agents.len();
            let victim = match (rng.random_range(0..4u32), &mut self.broker) {
                (0, Some(broker)) => broker,
                (0 | 1, _) => &mut self.server,
                _ => &mut self.agents[rng.random_range(0..agents)],
            };
            victim.kill()?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Waits until every device has taken its frames and uploaded what it kept.
    fn settle(&mut self) -> Result<()> {
        self.proxy.calm();
        let client = self.client()?;
        let until = self.run_until;
        advance(&client, until)?;
        wait_until("all devices are idle and the audit balances", || {
            self.victims().try_for_each(Victim::look)?;
            let devices: Vec<DeviceView> = client.get("/v1/devices")?;
            if !devices
                .iter()
                .all(|device| device.idle && device.frame >= until)
            {
                return Ok(false);
            }
            let audit: AuditView = client.get("/v1/audit")?;
            Ok(audit.spooled == 0 && audit.balanced)
        })
    }

    fn report(&self, plan: &Plan, audit: AuditView) -> Report {
        let counters = self.proxy.counters();
        let mut kills = BTreeMap::from([
            ("agents", self.agents.iter().map(Victim::kills).sum()),
            ("server", self.server.kills()),
        ]);
        if let Some(broker) = &self.broker {
            kills.insert("broker", broker.kills());
        }
        let everybody = self.agents.iter().chain([&self.server]).chain(&self.broker);
        Report {
            route: plan.route,
            seed: plan.seed,
            kills,
            restarts: everybody.map(Victim::deaths).sum(),
            packets_passed: counters.passed.load(Relaxed),
            packets_lost: counters.lost.load(Relaxed),
            cuts: counters.cuts.load(Relaxed),
            flagged: audit.flagged,
            ingested: audit.ingested,
            spooled: audit.spooled,
            dropped: audit.dropped,
            missing: audit.missing,
            stored: 0,
            doubled: 0,
            damaged: 0,
            balanced: audit.balanced,
            seconds: 0.0,
        }
    }
}

impl Plan {
    fn spec(&self, name: &str, args: Vec<String>) -> Spec {
        Spec {
            name: name.to_owned(),
            program: self.program.clone(),
            args,
            log: self.dir.join(format!("{name}.log")),
            lifeline: true,
        }
    }
}

/// Enrols a device and starts it, with the proxy between it and the cloud.
fn start_agent(plan: &Plan, client: &Client, proxy: SocketAddr, number: u32) -> Result<Victim> {
    let device = format!("cam{number}");
    let data = plan.dir.join(&device);
    let request = TokenRequest {
        device: Some(device.clone()),
        group: None,
        ttl_s: None,
    };
    let token: TokenReply = client.post("/v1/devices/tokens", &request)?;
    flywheel_agent::enroll::enroll(&flywheel_agent::enroll::Request {
        url: client.server().to_owned(),
        token: token.token,
        data: data.clone(),
        device: Some(device.parse().context("device id")?),
        force: false,
    })?;
    // What enrolment stored leads to the cloud itself.
    let path = identity::folder(&data).join("endpoints.toml");
    let mut endpoints: identity::Endpoints = toml::from_str(&std::fs::read_to_string(&path)?)?;
    let transport = match plan.route {
        Route::Quic => {
            endpoints.quic = proxy.to_string();
            "quic"
        }
        Route::Mosquitto | Route::Rumqttd => {
            endpoints.mqtt = proxy.to_string();
            "mqtt"
        }
    };
    std::fs::write(&path, toml::to_string(&endpoints)?)?;
    let config = plan.dir.join(format!("{device}.toml"));
    // Without a model half of the frames go up, which is plenty.
    std::fs::write(
        &config,
        format!(
            "data = {data:?}\nsource = \"sim:roads?seed={number}\"\ntransport = [\"{transport}\"]\n\
             pace = \"lockstep\"\nhealth_interval_ms = 500\nseed = {number}\n\n\
             [budget]\nratio = 1.0\nburst_kib = 1024\n"
        ),
    )?;
    Victim::start(plan.spec(
        &device,
        flags(&["agent", "run", "--config", &text(&config)]),
    ))
}

/// The external broker, set up by the files that `flywheel device acl` writes.
fn start_mosquitto(dir: &Path, data: &Path) -> Result<(SocketAddr, Victim)> {
    let program = mosquitto().context("no mosquitto here: apt-get install mosquitto")?;
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port();
    let now_ms = flywheel::service::now_ms();
    let pki = Pki::open(&data.join("pki"), &[], now_ms)?;
    let files = broker_files::write(&pki, &dir.join("broker"), port, &[], now_ms)?;
    // Started by root, mosquitto would become a user who can't read a temporary folder.
    let mut config = std::fs::OpenOptions::new()
        .append(true)
        .open(&files.config)?;
    writeln!(config, "user root")?;
    let victim = Victim::start(Spec {
        name: "mosquitto".to_owned(),
        program,
        args: flags(&["-c", &text(&files.config)]),
        log: dir.join("mosquitto.log"),
        lifeline: false,
    })?;
    Ok(((Ipv4Addr::LOCALHOST, port).into(), victim))
}

/// Where mosquitto is, if anywhere.
fn mosquitto() -> Option<PathBuf> {
    ["mosquitto", "/usr/sbin/mosquitto"]
        .into_iter()
        .map(PathBuf::from)
        .find(|program| Command::new(program).arg("-h").output().is_ok())
}

/// Counts what is in the store, without the help of the server.
fn count_store(data: &Path, report: &mut Report) -> Result<()> {
    let store = Store::open(data)?;
    let mut seen = BTreeSet::new();
    let mut cursor = 0;
    loop {
        let page = store.samples(cursor, PAGE)?;
        let Some((last, _)) = page.last() else {
            break;
        };
        ensure!(*last > cursor, "the store's cursor does not advance");
        cursor = *last;
        for (_, sample) in page {
            report.stored += 1;
            if !seen.insert(sample.id()) {
                report.doubled += 1;
            }
            if !matches!(store.picture(&sample.blob), Ok(Some(_))) {
                report.damaged += 1;
            }
        }
    }
    if report.stored == 0 {
        bail!("nothing was stored, so nothing was tried");
    }
    Ok(())
}

/// Lets devices take frames up to this one.
fn advance(client: &Client, run_until: u64) -> Result<(), ClientError> {
    client
        .post("/v1/lockstep", &AdvanceRequest { run_until })
        .map(|AdvanceRequest { .. }| ())
}

fn flags(args: &[&str]) -> Vec<String> {
    args.iter().map(|&arg| arg.to_owned()).collect()
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
