//! QUIC: one connection per device, authenticated by its certificate, with one bidirectional
//! stream of envelopes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use flywheel_shared::MAX_MESSAGE;
use flywheel_shared::envelope::HEADER;
use flywheel_shared::ids::DeviceId;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream, TransportConfig, VarInt};
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Ingest, Outlet, Transport};
use crate::pki::{Pki, PkiError, certificate_device};

/// Closed in good order.
const CLOSED: VarInt = VarInt::from_u32(0);
/// The device is not enrolled, or was revoked.
const REFUSED: VarInt = VarInt::from_u32(1);
/// The peer does not keep to the protocol.
const PROTOCOL: VarInt = VarInt::from_u32(2);

/// Envelopes that may wait for a slow device before pushes to it are dropped.
const QUEUE: usize = 64;

/// Why QUIC does not work.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The address can't be listened on.
    #[error("QUIC can't listen on {address}: {error}; choose another port with --quic-port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// The certificates are not accepted.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The TLS configuration does not fit QUIC.
    #[error("TLS can't be set up for QUIC: {0}")]
    Tls(String),
}

/// A running listener; dropping it ends all connections.
pub struct QuicListener {
    endpoint: Endpoint,
    accepting: JoinHandle<()>,
}

/// Listens for devices. Must be called within a tokio runtime.
pub fn listen(
    ingest: Arc<Ingest>,
    pki: &Pki,
    address: SocketAddr,
) -> Result<QuicListener, QuicError> {
    let tls = QuicServerConfig::try_from(pki.quic_config()?)
        .map_err(|error| QuicError::Tls(error.to_string()))?;
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_idle_timeout(Some(VarInt::from_u32(15_000).into()))
        .keep_alive_interval(Some(Duration::from_secs(5)));
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    let endpoint =
        Endpoint::server(config, address).map_err(|error| QuicError::Listen { address, error })?;
    let accepting = tokio::spawn(accept(ingest, endpoint.clone()));
    Ok(QuicListener {
        endpoint,
        accepting,
    })
}

impl QuicListener {
    /// The address it listens on.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Ends all connections in good order.
    pub async fn close(&self) {
        self.endpoint.close(CLOSED, b"the server is stopping");
        self.endpoint.wait_idle().await;
    }
}

impl Drop for QuicListener {
    fn drop(&mut self) {
        self.accepting.abort();
        self.endpoint.close(CLOSED, b"the server is stopping");
    }
}

async fn accept(ingest: Arc<Ingest>, endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        let ingest = ingest.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(&ingest, incoming).await {
                tracing::debug!(%error, "a QUIC connection ended");
            }
        });
    }
}

#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    #[error("the certificate names no device, or one that is not enrolled or revoked")]
    Stranger,
}

async fn serve(ingest: &Arc<Ingest>, incoming: Incoming) -> Result<(), Ended> {
    let connection = incoming.await?;
    let Some(device) = device_of(&connection).filter(|id| ingest.fleet.key(id).is_some()) else {
        connection.close(REFUSED, b"not enrolled or revoked");
        return Err(Ended::Stranger);
    };
    let (send, receive) = connection.accept_bi().await?;
    let (sender, queue) = mpsc::channel(QUEUE);
    let outlet = QuicOutlet {
        sender: sender.clone(),
        connection: connection.clone(),
    };
    let number = ingest.attach(&device, Transport::Quic, Arc::new(outlet));
    tracing::info!(%device, remote = %connection.remote_address(), "connected by QUIC");
    let writing = tokio::spawn(write(send, queue));
    read(ingest, &device, &connection, receive, sender).await;
    ingest.detach(&device, number);
    writing.abort();
    tracing::info!(%device, "QUIC connection ended");
    Ok(())
}

/// The device that the verified certificate is for.
fn device_of(connection: &Connection) -> Option<DeviceId> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    certificate_device(chain.first()?)
}

async fn read(
    ingest: &Arc<Ingest>,
    device: &DeviceId,
    connection: &Connection,
    mut stream: RecvStream,
    answers: mpsc::Sender<Vec<u8>>,
) {
    let mut bytes = vec![0; HEADER];
    loop {
        bytes.truncate(HEADER);
        if stream.read_exact(&mut bytes).await.is_err() {
            return;
        }
        let len = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if len > MAX_MESSAGE {
            // What follows can't be found any more.
            connection.close(PROTOCOL, b"a message exceeds the limit");
            return;
        }
        bytes.resize(HEADER + len, 0);
        if stream.read_exact(&mut bytes[HEADER..]).await.is_err() {
            return;
        }
        for answer in ingest.handle(device, Transport::Quic, &bytes).await {
            if answers.send(answer).await.is_err() {
                return;
            }
        }
        if ingest.fleet.key(device).is_none() {
            connection.close(REFUSED, b"revoked");
            return;
        }
    }
}

async fn write(mut stream: SendStream, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(envelope) = queue.recv().await {
        if stream.write_all(&envelope).await.is_err() {
            return;
        }
    }
}

struct QuicOutlet {
    sender: mpsc::Sender<Vec<u8>>,
    connection: Connection,
}

impl Outlet for QuicOutlet {
    fn send(&self, _device: &DeviceId, envelope: Vec<u8>) -> bool {
        self.sender.try_send(envelope).is_ok()
    }

    fn close(&self, _device: &DeviceId, why: &str) {
        self.connection.close(REFUSED, why.as_bytes());
    }
}
