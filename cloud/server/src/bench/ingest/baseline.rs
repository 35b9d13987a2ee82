//! What one would write without us: a file copied over quinn, and a mosquitto with a subscriber that
//! stores what comes.

use std::fs::File;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flywheel_agent::identity::Identity;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Endpoint};
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS, TlsConfiguration, Transport};
use tokio::task::JoinSet;

use crate::ingest::broker_files;
use crate::pki::Pki;
use crate::service::now_ms;

/// Bytes handed over at a time.
const PIECE: usize = 64 * 1024;
/// Largest MQTT packet.
const MAX_PACKET: usize = 2 << 20;
/// Messages that a publisher has on the way.
const INFLIGHT: u16 = 100;
/// Acknowledgements that may wait to be sent: polling brings messages faster than it sends them.
const ACKS: usize = 1_000_000;
/// How long the broker may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Seconds in which the devices together copy so many bytes into synced files, one stream each.
pub(super) async fn copy(identities: &[Arc<Identity>], dir: &Path, bytes: u64) -> Result<f64> {
    let pki = Pki::open(&dir.join("cloud").join("pki"), &[], now_ms())?;
    let server = QuicServerConfig::try_from(pki.quic_config()?)?;
    let server = quinn::ServerConfig::with_crypto(Arc::new(server));
    let endpoint = Endpoint::server(server, (Ipv4Addr::LOCALHOST, 0).into())?;
    let address = endpoint.local_addr()?;
    let folder = dir.join("copy");
    std::fs::create_dir_all(&folder)?;
    let share = bytes.div_ceil(identities.len() as u64);
    let started = Instant::now();
    let mut tasks: JoinSet<Result<()>> = JoinSet::new();
    let receiving = endpoint.clone();
    let (count, target) = (identities.len(), folder.clone());
    tasks.spawn(async move {
        let mut streams = JoinSet::new();
        for number in 0..count {
            let incoming = receiving.accept().await.context("no connection")?;
            let file = File::create(target.join(number.to_string()))?;
            streams.spawn(receive(incoming, file));
        }
        while let Some(done) = streams.join_next().await {
            done??;
        }
        Ok(())
    });
    for identity in identities {
        let client = QuicClientConfig::try_from(identity.tls(true)?)?;
        let config = ClientConfig::new(Arc::new(client));
        let name = identity.endpoints.server_name.clone();
        tasks.spawn(send(config, address, name, share));
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    let seconds = started.elapsed().as_secs_f64();
    endpoint.close(0u32.into(), b"");
    std::fs::remove_dir_all(&folder)?;
    Ok(seconds)
}

async fn receive(incoming: quinn::Incoming, mut file: File) -> Result<()> {
    let connection = incoming.await?;
    let (mut answer, mut stream) = connection.accept_bi().await?;
    while let Some(chunk) = stream.read_chunk(PIECE, true).await? {
        file.write_all(&chunk.bytes)?;
    }
    file.sync_data()?;
    answer.write_all(b"ok").await?;
    answer.finish()?;
    // The client closes once it has the answer.
    connection.closed().await;
    Ok(())
}

async fn send(config: ClientConfig, to: SocketAddr, name: String, bytes: u64) -> Result<()> {
    let socket = Endpoint::client((Ipv4Addr::UNSPECIFIED, 0).into())?;
    let connection = socket.connect_with(config, to, &name)?.await?;
    let (mut stream, mut answer) = connection.open_bi().await?;
    let mut piece = vec![0; PIECE];
    getrandom::fill(&mut piece).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
    let mut left = bytes;
    while left > 0 {
        let len = left.min(PIECE as u64);
        stream.write_all(&piece[..len as usize]).await?;
        left -= len;
    }
    stream.finish()?;
    answer.read_to_end(16).await?;
    connection.close(0u32.into(), b"");
    socket.wait_idle().await;
    Ok(())
}

/// Ends with the value.
struct Broker(Child);

impl Drop for Broker {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Messages a second that the devices get into a synced file by way of mosquitto; `None` where there
/// is no mosquitto.
pub(super) async fn mosquitto(
    identities: &[Arc<Identity>],
    dir: &Path,
    size: usize,
    length: Duration,
) -> Result<Option<f64>> {
    let pki = Pki::open(&dir.join("cloud").join("pki"), &[], now_ms())?;
    let out = dir.join("broker");
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port();
    let files = broker_files::write(&pki, &out, port, &[], now_ms())?;
    // Started by root, mosquitto would become a user who can't read a temporary folder.
    writeln!(
        File::options().append(true).open(&files.config)?,
        "user root"
    )?;
    let log = File::create(out.join("log"))?;
    let started = ["mosquitto", "/usr/sbin/mosquitto"]
        .iter()
        .find_map(|program| {
            let mut command = Command::new(program);
            command.arg("-c").arg(&files.config).stdin(Stdio::null());
            command
                .stdout(log.try_clone().ok()?)
                .stderr(log.try_clone().ok()?);
            command.spawn().ok()
        });
    let Some(child) = started else {
        return Ok(None);
    };
    let _broker = Broker(child);
    let since = Instant::now();
    while tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .await
        .is_err()
    {
        if since.elapsed() > PATIENCE {
            bail!(
                "mosquitto does not listen; see {}",
                out.join("log").display()
            );
        }
        tokio::task::yield_now().await;
    }
    let (certificate, key) = pki.ingest_client(now_ms())?;
    let mut options = options("flywheel-ingest", port);
    options.set_transport(Transport::tls_with_config(TlsConfiguration::Simple {
        ca: pki.ca_pem().as_bytes().to_vec(),
        alpn: None,
        client_auth: Some((certificate.into_bytes(), key.into_bytes())),
    }));
    options.set_manual_acks(true);
    let (client, mut events) = AsyncClient::new(options, ACKS);
    client.try_subscribe("/tenants/+/up", QoS::AtLeastOnce)?;
    while !matches!(events.poll().await?, Event::Incoming(Packet::SubAck(_))) {}
    let mut publishers = JoinSet::new();
    for identity in identities {
        let mut options = options_of(identity, port)?;
        options.set_inflight(INFLIGHT);
        publishers.spawn(publish(options, identity.device.to_string(), size));
    }
    let mut file = File::create(out.join("stored"))?;
    let mut stored = 0u64;
    let started = Instant::now();
    while started.elapsed() < length {
        let Ok(event) = tokio::time::timeout(length, events.poll()).await else {
            break;
        };
        if let Event::Incoming(Packet::Publish(message)) = event? {
            file.write_all(&message.payload)?;
            file.sync_data()?;
            // Where there is no room, the broker sends the message again, which costs it and not us.
            let _ = client.try_ack(&message);
            stored += 1;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    if stored == 0 {
        while let Some(ended) = publishers.try_join_next() {
            ended??;
        }
        bail!(
            "nothing came through mosquitto; see {}",
            out.join("log").display()
        );
    }
    publishers.shutdown().await;
    std::fs::remove_file(out.join("stored"))?;
    Ok(Some(stored as f64 / seconds))
}

fn options(client: &str, port: u16) -> MqttOptions {
    let mut options = MqttOptions::new(client, "127.0.0.1", port);
    options.set_max_packet_size(MAX_PACKET, MAX_PACKET);
    options
}

fn options_of(identity: &Identity, port: u16) -> Result<MqttOptions> {
    let mut options = options(identity.device.as_str(), port);
    options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(
        Arc::new(identity.tls(false)?),
    )));
    Ok(options)
}

/// Publishes until it is dropped.
async fn publish(options: MqttOptions, device: String, size: usize) -> Result<()> {
    let (client, mut events) = AsyncClient::new(options, 16);
    let topic = format!("/tenants/{device}/up");
    let mut payload = vec![0; size];
    getrandom::fill(&mut payload).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
    let sending = tokio::spawn(async move {
        // It fails when polling has ended.
        while client
            .publish(topic.as_str(), QoS::AtLeastOnce, false, payload.clone())
            .await
            .is_ok()
        {}
    });
    loop {
        if let Err(error) = events.poll().await {
            sending.abort();
            return Err(error.into());
        }
    }
}
