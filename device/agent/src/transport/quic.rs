//! QUIC: one bidirectional stream that the device opens, envelopes one after the other both ways.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use flywheel_shared::MAX_MESSAGE;
use flywheel_shared::envelope::HEADER;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, IdleTimeout, RecvStream, SendStream, TransportConfig, VarInt};
use tokio::net::lookup_host;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::{CLOSE_TIMEOUT, CONNECT_TIMEOUT, ConnectError, Connection, INBOUND, OUTBOUND, Reason};
use crate::identity::{Identity, TlsError};

const KEEP_ALIVE: Duration = Duration::from_secs(5);
const IDLE_TIMEOUT_MS: u32 = 15_000;

pub(super) async fn connect(identity: &Identity) -> Result<Connection, ConnectError> {
    let endpoint = &identity.endpoints.quic;
    if !endpoint.contains(':') {
        return Err(ConnectError::Address(endpoint.clone()));
    }
    let failed = |why: String| ConnectError::Failed {
        endpoint: endpoint.clone(),
        why,
    };
    let tls = QuicClientConfig::try_from(identity.tls(true)?)
        .map_err(|error| TlsError::Other(error.to_string()))?;
    let mut transport = TransportConfig::default();
    transport
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))));
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport));

    let dial = async {
        let remote = lookup_host(endpoint)
            .await
            .map_err(|error| error.to_string())?
            .next()
            .ok_or("the name has no address")?;
        let local: SocketAddr = match remote {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = Endpoint::client(local).map_err(|error| error.to_string())?;
        let connection = socket
            .connect_with(config, remote, &identity.endpoints.server_name)
            .map_err(|error| error.to_string())?
            .await
            .map_err(|error| error.to_string())?;
        let streams = connection
            .open_bi()
            .await
            .map_err(|error| error.to_string())?;
        Ok::<_, String>((socket, connection, streams))
    };
    let (socket, connection, (send, receive)) =
        match tokio::time::timeout(CONNECT_TIMEOUT, dial).await {
            Ok(Ok(parts)) => parts,
            Ok(Err(why)) => return Err(failed(why)),
            Err(_) => return Err(ConnectError::Timeout(endpoint.clone())),
        };

    let reason = Reason::default();
    let (outbound, queue) = mpsc::channel(OUTBOUND);
    let (sink, inbound) = mpsc::channel(INBOUND);
    let writer = Writer {
        socket,
        connection,
        stream: send,
    };
    Ok(Connection {
        outbound,
        inbound,
        writer: tokio::spawn(writer.run(queue, reason.clone())),
        reader: tokio::spawn(read(receive, sink, reason.clone())),
        reason,
    })
}

/// Owns the connection, which closes when this is dropped.
struct Writer {
    socket: Endpoint,
    connection: quinn::Connection,
    stream: SendStream,
}

impl Writer {
    async fn run(mut self, mut queue: mpsc::Receiver<Vec<u8>>, reason: Reason) {
        while let Some(envelope) = queue.recv().await {
            if let Err(error) = self.stream.write_all(&envelope).await {
                reason.set(error.to_string());
                return;
            }
        }
        // Wait until the other side has it all; closing at once would discard what is in flight.
        if self.stream.finish().is_ok() {
            let _ = tokio::time::timeout(CLOSE_TIMEOUT / 2, self.stream.stopped()).await;
        }
        self.connection.close(VarInt::from_u32(0), b"bye");
        let _ = tokio::time::timeout(CLOSE_TIMEOUT / 2, self.socket.wait_idle()).await;
    }
}

async fn read(mut stream: RecvStream, sink: mpsc::Sender<Vec<u8>>, reason: Reason) {
    loop {
        let mut envelope = vec![0; HEADER];
        if let Err(error) = stream.read_exact(&mut envelope).await {
            reason.set(error.to_string());
            return;
        }
        let len = u32::from_le_bytes([envelope[0], envelope[1], envelope[2], envelope[3]]) as usize;
        if len > MAX_MESSAGE {
            reason.set(format!("the cloud announced a message of {len} bytes"));
            return;
        }
        envelope.resize(HEADER + len, 0);
        if let Err(error) = stream.read_exact(&mut envelope[HEADER..]).await {
            reason.set(error.to_string());
            return;
        }
        match sink.try_send(envelope) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                reason.set("messages from the cloud come faster than they are read");
                return;
            }
            Err(TrySendError::Closed(_)) => return,
        }
    }
}
