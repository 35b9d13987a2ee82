//! `flywheel bench ingest`: durable samples a second, from devices that talk as agents do to a server
//! that commits as always, beside what plain tools make of the same bytes on the same disk.

mod baseline;
mod load;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use device_core::uplink::Transport;
use flywheel_agent::enroll;
use flywheel_agent::identity::Identity;
use serde::Serialize;

use crate::api::types::{TokenReply, TokenRequest};
use crate::cli::format;
use crate::client::{ADDRESS_FILE, Client};
use crate::demo::processes::{Process, Spec};
use crate::keys;

/// How long the server may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// Flags of `flywheel bench ingest`.
#[derive(Args)]
pub struct IngestArgs {
    /// Devices that send at the same time.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    devices: u32,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Sizes of a picture in KiB.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10, 200])]
    kib: Vec<u32>,
    /// Folder on the disk to measure; a temporary one without it. What was measured is removed.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    devices: u32,
    seconds: u32,
    results: Vec<Line>,
}

/// One transport at one size.
#[derive(Serialize)]
struct Line {
    transport: &'static str,
    kib: u32,
    /// Samples that were acknowledged, which the server does once they are on the medium.
    samples: u64,
    samples_per_s: f64,
    /// Of pictures, in 10⁶ bytes.
    mb_per_s: f64,
    /// From handing a batch to the transport to its acknowledgement, milliseconds.
    ack_ms: Percentiles,
    /// Processor time of the server for one sample, microseconds.
    server_cpu_us: f64,
    baseline: Option<Baseline>,
}

#[derive(Clone, Copy, Serialize)]
struct Percentiles {
    p50: f64,
    p95: f64,
    p99: f64,
}

/// What a plain tool makes of the same bytes.
#[derive(Serialize)]
struct Baseline {
    name: &'static str,
    samples_per_s: f64,
    /// Its seconds for a sample, by ours: above 1 we are faster.
    ratio: f64,
}

/// Runs the benchmark.
///
/// # Errors
/// If the server can't be started or a device loses its connection.
pub fn run(args: &IngestArgs) -> Result<()> {
    if let Some(zero) = args.kib.iter().find(|kib| !(1..=900).contains(*kib)) {
        bail!("--kib {zero}: a picture has 1 to 900 KiB here, since a message has at most 1 MiB");
    }
    crate::pki::install_crypto();
    let dir = match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("cannot create {}", dir.display()))?;
            tempfile::tempdir_in(dir)
        }
        None => tempfile::tempdir(),
    }
    .context("no temporary folder")?;
    let world = World::start(dir.path(), args.devices)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let length = Duration::from_secs(u64::from(args.seconds));
    let mut results = Vec::new();
    let mut epoch = 0;
    for &kib in &args.kib {
        for (transport, name) in [(Transport::Quic, "quic"), (Transport::Mqtt, "mqtt")] {
            epoch += 1;
            let cpu = cpu_us(world.server.pid())?;
            let load = load::Load {
                transport,
                size: kib as usize * 1024,
                epoch,
                length,
            };
            let tally = runtime.block_on(load::run(&world.identities, &load))?;
            let cpu = cpu_us(world.server.pid())?.saturating_sub(cpu);
            world.server.check()?;
            let rate = tally.samples as f64 / tally.seconds;
            let plain = match transport {
                Transport::Quic => {
                    let bytes = tally.samples * u64::from(kib) * 1024;
                    runtime
                        .block_on(baseline::copy(&world.identities, dir.path(), bytes))
                        .map(|seconds| ("plain quinn file copy", tally.samples as f64 / seconds))
                        .map(Some)
                }
                Transport::Mqtt => runtime
                    .block_on(baseline::mosquitto(
                        &world.identities,
                        dir.path(),
                        kib as usize * 1024,
                        length,
                    ))
                    .map(|rate| {
                        rate.map(|rate| {
                            (
                                "mosquitto QoS 1, a subscriber that syncs each message",
                                rate,
                            )
                        })
                    }),
            }?;
            results.push(Line {
                transport: name,
                kib,
                samples: tally.samples,
                samples_per_s: rate,
                mb_per_s: rate * f64::from(kib) * 1024.0 / 1e6,
                ack_ms: tally.percentiles(),
                server_cpu_us: cpu as f64 / tally.samples.max(1) as f64,
                baseline: plain.map(|(name, plain)| Baseline {
                    name,
                    samples_per_s: plain,
                    ratio: rate / plain,
                }),
            });
            if !args.json {
                eprintln!("{name}, {kib} KiB: {rate:.0} samples/s");
            }
        }
    }
    let report = Report {
        devices: args.devices,
        seconds: args.seconds,
        results,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let mut table = format::table(&[
        "transport",
        "KiB",
        "samples/s",
        "MB/s",
        "ack ms p50",
        "p95",
        "p99",
        "cpu µs",
        "by baseline",
    ]);
    for line in &report.results {
        table.add_row([
            line.transport.to_owned(),
            line.kib.to_string(),
            format!("{:.0}", line.samples_per_s),
            format!("{:.1}", line.mb_per_s),
            format!("{:.1}", line.ack_ms.p50),
            format!("{:.1}", line.ack_ms.p95),
            format!("{:.1}", line.ack_ms.p99),
            format!("{:.0}", line.server_cpu_us),
            line.baseline.as_ref().map_or_else(
                || "no mosquitto".to_owned(),
                |plain| format!("{:.2} ({})", plain.ratio, plain.name),
            ),
        ]);
    }
    println!("{table}");
    Ok(())
}

/// A server and its enrolled devices.
struct World {
    server: Process,
    identities: Vec<Arc<Identity>>,
}

impl World {
    fn start(dir: &Path, devices: u32) -> Result<Self> {
        let (data, keys_dir) = (dir.join("cloud"), dir.join("keys"));
        keys::init(
            &keys_dir,
            &keys::Plan {
                now_ms: crate::service::now_ms(),
                days: 1,
                roots: None,
                min_sequence: None,
            },
        )?;
        let server = Process::start(Spec {
            name: "server".to_owned(),
            args: [
                "serve",
                "--data",
                &data.to_string_lossy(),
                "--keys",
                &keys_dir.to_string_lossy(),
                "--http-port",
                "0",
            ]
            .map(str::to_owned)
            .to_vec(),
            log: dir.join("server.log"),
        })?;
        let started = Instant::now();
        while !data.join(ADDRESS_FILE).exists() {
            server.check()?;
            if started.elapsed() > PATIENCE {
                bail!("the server does not start");
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        let client = Client::from_data(&data, None)?.with_patience(PATIENCE);
        let identities = (1..=devices)
            .map(|number| {
                let device = format!("cam{number}");
                let token: TokenReply = client.post(
                    "/v1/devices/tokens",
                    &TokenRequest {
                        device: Some(device.clone()),
                        group: None,
                        ttl_s: None,
                    },
                )?;
                let home = dir.join(&device);
                enroll::enroll(&enroll::Request {
                    url: client.server().to_owned(),
                    token: token.token,
                    data: home.clone(),
                    device: Some(device.parse()?),
                    force: false,
                })?;
                Ok(Arc::new(Identity::load(&home)?))
            })
            .collect::<Result<_>>()?;
        Ok(Self { server, identities })
    }
}

/// Processor time that a process has used, microseconds.
fn cpu_us(pid: u32) -> Result<u64> {
    // utime and stime are fields 14 and 15 of proc_pid_stat(5), in hundredths of a second; the
    // second field is a name in parentheses that may hold anything.
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let ticks = text.rsplit_once(')').map(|(_, rest)| {
        let fields = rest.split_whitespace().skip(11).take(2);
        fields
            .filter_map(|field| field.parse::<u64>().ok())
            .sum::<u64>()
    });
    ticks
        .map(|ticks| ticks * 10_000)
        .with_context(|| format!("{path} is not understood"))
}
