//! `flywheel serve`: raw flags into a running cloud.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloud_core::priority::Strategy;

use crate::cloud::{BrokerUrl, Cloud, CloudConfig};
use crate::service::queue::Ranking;

/// Arguments of `flywheel serve`.
#[derive(Args)]
#[command(
    after_help = "Example: flywheel key init --dir keys && flywheel serve --data cloud --keys keys\n\nThe API's address and token are written to api-address and api-token in the data folder; other commands find them with --data."
)]
pub struct ServeArgs {
    /// Folder of everything that the server keeps.
    #[arg(
        long,
        env = "FLYWHEEL_DATA_DIR",
        default_value = "flywheel-data",
        value_name = "DIR"
    )]
    data: PathBuf,
    /// Folder with rollout.key and trust.bin.
    #[arg(long, env = "FLYWHEEL_KEYS", value_name = "DIR")]
    keys: PathBuf,
    /// Interface on which the API, MQTT and QUIC listen. The API has no TLS of its own: on other
    /// interfaces than the loopback put a proxy with TLS in front.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    bind: IpAddr,
    /// Port of the HTTP API; 0 takes a free one and keeps it.
    #[arg(long, default_value_t = 7878, value_name = "PORT")]
    http_port: u16,
    /// Port for devices by MQTT over TLS; 0 takes a free one and keeps it.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    mqtt_port: u16,
    /// Port for devices by QUIC; 0 takes a free one and keeps it.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    quic_port: u16,
    /// Use this broker instead of the embedded one, as the server reaches it: mqtts://HOST:PORT for
    /// one that `flywheel device acl` set up.
    #[arg(
        long,
        value_name = "mqtt://USER:PASSWORD@HOST:PORT",
        requires = "broker_for_devices"
    )]
    broker: Option<BrokerUrl>,
    /// Where devices reach that broker, by TLS with their certificates.
    #[arg(long, value_name = "HOST:PORT", requires = "broker")]
    broker_for_devices: Option<String>,
    /// Name or address under which devices reach this machine; may be given several times.
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,
    /// How the queue ranks: flywheel, typiclust, margin or random.
    #[arg(long, default_value = "flywheel")]
    select: Strategy,
    /// How many items are ranked at a time: about the labels of a round.
    #[arg(long, default_value_t = 200)]
    batch: usize,
    /// Frames of one device this far apart at most show one thing, of which one item is ranked;
    /// 0 where every frame stands alone.
    #[arg(long, default_value_t = 8, value_name = "FRAMES")]
    track_reach: u64,
    /// Seed of the ranking's random choices.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Runs the command.
///
/// # Errors
/// If the server can't be reached or refuses.
pub fn run(args: ServeArgs) -> Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("FLYWHEEL_LOG").unwrap_or_else(|_| {
                tracing_subscriber::EnvFilter::new("info,rumqttd=off,quinn=warn,tract=warn")
            }),
        )
        .with_writer(std::io::stderr)
        .init();
    let config = CloudConfig {
        data: args.data,
        keys: args.keys,
        bind: args.bind,
        http_port: args.http_port,
        mqtt_port: args.mqtt_port,
        quic_port: args.quic_port,
        broker: args.broker.zip(args.broker_for_devices),
        hosts: args.host,
        ranking: Ranking {
            strategy: args.select,
            batch: args.batch,
            track_reach: args.track_reach,
            seed: args.seed,
        },
    };
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(Cloud::serve(config))?;
    Ok(ExitCode::SUCCESS)
}
