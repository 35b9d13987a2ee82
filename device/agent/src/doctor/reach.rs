//! Whether the cloud is reached, and what time it is there. An agent that runs keeps its session:
//! a broker closes the older of two connections of one client, so then only TLS is tried.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use device_core::uplink::Transport;
use flywheel_shared::message::{Down, Hello, Up};
use flywheel_shared::{MAX_MESSAGE, WIRE_VERSION, envelope};
use rustls::ClientConnection;
use rustls_pki_types::ServerName;

use super::Check;
use crate::clock::unix_ms;
use crate::config::Config;
use crate::identity::Identity;
use crate::transport::{self, Connection};
use crate::wire;

/// Longest wait for any answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clocks that differ by less are right.
const SKEW_MS: u64 = 5_000;
/// Clocks that differ by more make offers expire and certificates fail.
const MAX_SKEW_MS: u64 = 300_000;

/// The checks of every transport of the configuration, and of the clock.
pub fn all(config: &Config, identity: &Identity, running: bool) -> Vec<Check> {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            return vec![Check::fail(
                "network",
                error.to_string(),
                "the system gives no sockets; look at ulimit -n",
            )];
        }
    };
    let mut checks = Vec::new();
    let mut skew = None;
    for kind in &config.transport {
        if running && *kind == Transport::Mqtt {
            checks.push(tls_only(identity));
            continue;
        }
        let name = kind.name();
        match runtime.block_on(ask(*kind, identity, !running)) {
            Ok((endpoint, measured)) => {
                skew = skew.or(measured);
                checks.push(Check::ok(name, format!("{endpoint} knows this device")));
            }
            Err(why) => checks.push(Check::fail(name, why, mend(*kind))),
        }
    }
    // One way out is enough for the agent.
    let reached = checks.iter().any(|check| check.mend.is_empty());
    for check in &mut checks {
        if reached && check.verdict == super::Verdict::Fail {
            check.verdict = super::Verdict::Warn;
        }
    }
    checks.push(clock(skew, running));
    checks
}

fn mend(kind: Transport) -> &'static str {
    match kind {
        Transport::Quic => {
            "is `flywheel serve` running, and does the network let UDP through to it? The agent falls back to MQTT"
        }
        Transport::Mqtt => {
            "is the broker running, and does the network let TCP through to it? See `mqtt` in identity/endpoints.toml"
        }
    }
}

/// Connects, and says hello if no agent does already. Returns the endpoint and how far the clocks
/// are apart in milliseconds.
async fn ask(
    kind: Transport,
    identity: &Identity,
    hello: bool,
) -> Result<(String, Option<u64>), String> {
    let endpoint = match kind {
        Transport::Quic => identity.endpoints.quic.clone(),
        Transport::Mqtt => identity.endpoints.mqtt.clone(),
    };
    let mut connection = transport::connect(kind, identity)
        .await
        .map_err(|error| error.to_string())?;
    let mut skew = None;
    if hello {
        let welcomed = tokio::time::timeout(PATIENCE, welcome(&mut connection, identity)).await;
        skew = Some(welcomed.map_err(|_| {
            format!("{endpoint}: connected, but no answer to hello within {PATIENCE:?}")
        })??);
    }
    connection.close().await;
    Ok((endpoint, skew))
}

async fn welcome(connection: &mut Connection, identity: &Identity) -> Result<u64, String> {
    let hello = Up::Hello(Hello {
        device: identity.device.clone(),
        wire_version: WIRE_VERSION,
        // Epochs begin at 1: nothing is ever told under this one.
        epoch: 0,
    });
    let asked = unix_ms();
    if connection.send(wire::envelope(&hello)).await.is_err() {
        return Err(connection.why());
    }
    while let Some(bytes) = connection.recv().await {
        let Ok((payload, _)) = envelope::split(&bytes, MAX_MESSAGE) else {
            continue;
        };
        match postcard::from_bytes::<Down<'_>>(payload) {
            Ok(Down::Welcome(welcome)) => {
                // The answer was written somewhere between the two readings of our clock.
                let now = unix_ms().max(asked);
                let nearest = welcome.now_ms.clamp(asked, now);
                return Ok(nearest.abs_diff(welcome.now_ms));
            }
            Ok(Down::Refused(refused)) => {
                return Err(format!("the cloud refuses this device: {:?}", refused.code));
            }
            _ => {}
        }
    }
    Err(connection.why())
}

/// Judges the clock by how far it is from the cloud's, in milliseconds.
fn clock(skew_ms: Option<u64>, running: bool) -> Check {
    let name = "clock";
    let mend = "set the clock: timedatectl set-ntp true";
    match skew_ms {
        None if running => Check::warn(
            name,
            "not compared: the agent holds the connection",
            "stop the agent and run doctor again to compare it with the cloud's",
        ),
        None => Check::warn(
            name,
            "not compared: the cloud is not reached",
            "mend the network first",
        ),
        Some(skew) if skew <= SKEW_MS => {
            Check::ok(name, format!("within {skew} ms of the cloud's"))
        }
        Some(skew) if skew <= MAX_SKEW_MS => {
            Check::warn(name, format!("{} s from the cloud's", skew / 1000), mend)
        }
        Some(skew) => Check::fail(name, format!("{} s from the cloud's", skew / 1000), mend),
    }
}

/// Whether the broker's port answers with a certificate of the fleet and takes ours.
fn tls_only(identity: &Identity) -> Check {
    let name = Transport::Mqtt.name();
    let endpoint = &identity.endpoints.mqtt;
    match handshake(identity, endpoint) {
        Ok(()) => Check::ok(
            name,
            format!("{endpoint} answers; TLS only, since the agent runs"),
        ),
        Err(error) => Check::fail(name, format!("{endpoint}: {error}"), mend(Transport::Mqtt)),
    }
}

fn handshake(identity: &Identity, endpoint: &str) -> io::Result<()> {
    let address = endpoint
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| io::Error::other("the name has no address"))?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let tls = identity.tls(false).map_err(io::Error::other)?;
    let name =
        ServerName::try_from(identity.endpoints.server_name.clone()).map_err(io::Error::other)?;
    let mut session = ClientConnection::new(Arc::new(tls), name).map_err(io::Error::other)?;
    while session.is_handshaking() {
        session.complete_io(&mut stream)?;
    }
    let mut tls = rustls::Stream::new(&mut session, &mut stream);
    // A server that refuses our certificate says so only now (TLS 1.3). An MQTT ping before any
    // CONNECT is answered by silence or a close, never by data.
    tls.write_all(&[0xC0, 0x00])?;
    tls.flush()?;
    match tls.read(&mut [0; 1]) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn the_clock_is_judged_by_its_distance() {
        for (skew, running, want) in [
            (None, true, Verdict::Warn),
            (None, false, Verdict::Warn),
            (Some(0), false, Verdict::Ok),
            (Some(5_000), false, Verdict::Ok),
            (Some(60_000), false, Verdict::Warn),
            (Some(3_600_000), false, Verdict::Fail),
        ] {
            let check = clock(skew, running);
            assert_eq!(check.verdict, want, "{check}");
            assert_eq!(check.mend.is_empty(), want == Verdict::Ok);
        }
    }
}
