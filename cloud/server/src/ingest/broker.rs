//! The embedded MQTT broker (rumqttd), for fleets that one machine serves.
//!
//! Two ways in: TLS for devices (behind a [porter](super::porter)), where rumqttd takes the organisation of the client certificate
//! as the tenant and keeps every topic and filter under `/tenants/{organisation}/` (its feature
//! `validate-tenant-prefix`); and a plain one on the loopback interface for the server itself,
//! which has no tenant and is therefore guarded by a password made up at every start. The broker
//! keeps messages in memory and forgets the oldest when it is full. That costs a repetition and no
//! data, because devices keep what ingest has not acknowledged.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use rumqttd::{
    Broker, Config, ConnectionSettings, RouterConfig, SegmentConfig, ServerSettings, TlsConfig,
};

use super::mqtt::MAX_PACKET;
use super::porter;
use crate::pki::PkiPaths;

const UP: &str = "/tenants/+/up";
const USER: &str = "flywheel";
const MAX_CONNECTIONS: usize = 10_000;
/// TLS listeners behind the porter: handshakes at the same time.
const DOORS: usize = 4;
/// Time for a TLS handshake and the broker's answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where and as whom the broker listens.
#[derive(Clone, Debug)]
pub struct BrokerOptions {
    /// TLS, for devices.
    pub listen: SocketAddr,
    /// Plain, for the server; must be on the loopback interface.
    pub local: SocketAddr,
    /// The certificates.
    pub paths: PkiPaths,
}

/// How the server connects to its own broker.
#[derive(Clone, Debug)]
pub struct LocalBroker {
    /// The plain listener.
    pub address: SocketAddr,
    /// User name and password.
    pub credentials: (String, String),
}

/// Why the broker does not start.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// An address can't be listened on.
    #[error(
        "the MQTT broker can't listen on {address}: {error}; choose another port with --mqtt-port"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The plain listener would be open to others.
    #[error("{0} is not on the loopback interface, and the broker's own listener has no TLS")]
    NotLocal(SocketAddr),
    /// No password could be made up.
    #[error("the system's random source failed: {0}")]
    Random(String),
    /// No thread could be started.
    #[error("the MQTT broker can't be started: {0}")]
    Thread(io::Error),
}

/// Starts the broker in threads of its own, which end with the process.
pub fn start(options: &BrokerOptions) -> Result<LocalBroker, BrokerError> {
    if !options.local.ip().is_loopback() {
        return Err(BrokerError::NotLocal(options.local));
    }
    let refused = |address| move |error| BrokerError::Listen { address, error };
    let outside = TcpListener::bind(options.listen).map_err(refused(options.listen))?;
    outside.set_nonblocking(true).map_err(BrokerError::Thread)?;
    // The broker's threads only log what goes wrong, so it is tried here first.
    drop(TcpListener::bind(options.local).map_err(refused(options.local))?);
    let doors = free_ports().map_err(refused((Ipv4Addr::LOCALHOST, 0).into()))?;
    let mut password = [0; 16];
    getrandom::fill(&mut password).map_err(|error| BrokerError::Random(error.to_string()))?;
    let credentials = (USER.to_owned(), hex::encode(password));
    let config = config(options, &doors, &credentials);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(BrokerError::Thread)?;
    thread::Builder::new()
        .name("mqtt-porter".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                match tokio::net::TcpListener::from_std(outside) {
                    Ok(outside) => porter::stand(outside, &doors, PATIENCE).await,
                    Err(error) => tracing::error!(%error, "the MQTT listener failed"),
                }
            });
        })
        .map_err(BrokerError::Thread)?;
    thread::Builder::new()
        .name("broker".to_owned())
        .spawn(move || {
            if let Err(error) = Broker::new(config).start() {
                tracing::error!(%error, "the MQTT broker ended");
            }
        })
        .map_err(BrokerError::Thread)?;
    Ok(LocalBroker {
        address: options.local,
        credentials,
    })
}

/// Free ports on the loopback interface, one for each door.
fn free_ports() -> io::Result<Vec<SocketAddr>> {
    // All are held until all are chosen, so that none is chosen twice.
    let held = (0..DOORS).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let held = held.collect::<io::Result<Vec<_>>>()?;
    held.iter().map(TcpListener::local_addr).collect()
}

fn config(options: &BrokerOptions, doors: &[SocketAddr], credentials: &(String, String)) -> Config {
    let tls = TlsConfig::Rustls {
        capath: Some(options.paths.ca.display().to_string()),
        certpath: options.paths.server_cert.display().to_string(),
        keypath: options.paths.server_key.display().to_string(),
    };
    let auth = HashMap::from([credentials.clone()]);
    let local = (options.local, None, Some(auth));
    let doors = doors.iter().map(|door| (*door, Some(tls.clone()), None));
    let servers = doors.chain([local]).map(|(listen, tls, auth)| {
        let name = format!("mqtt-{}", listen.port());
        let settings = ServerSettings {
            name: name.clone(),
            listen,
            tls,
            next_connection_delay_ms: 1,
            connections: ConnectionSettings {
                connection_timeout_ms: 5_000,
                max_payload_size: MAX_PACKET,
                max_inflight_count: 500,
                auth,
                external_auth: None,
                dynamic_filters: true,
            },
        };
        (name, settings)
    });
    // What all devices send goes through one queue, what is sent to a device through one of its
    // own, which is therefore kept small.
    let up = SegmentConfig {
        max_segment_size: 16 * 1024 * 1024,
        max_segment_count: 8,
    };
    Config {
        router: RouterConfig {
            max_connections: MAX_CONNECTIONS,
            max_outgoing_packet_count: 200,
            max_segment_size: 256 * 1024,
            max_segment_count: 4,
            custom_segment: Some(HashMap::from([(UP.to_owned(), up)])),
            initialized_filters: Some(vec![UP.to_owned()]),
            ..RouterConfig::default()
        },
        v4: Some(servers.collect()),
        ..Config::default()
    }
}
