//! Ways to the cloud. Each makes a [`Connection`]: a pair of queues of envelopes and the tasks
//! that move them. To add one, write a `connect` beside the two here and name it in
//! [`device_core::uplink::Transport`].

mod mqtt;
mod quic;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use device_core::uplink::Transport;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::identity::{Identity, TlsError};

/// Longest time in which a connection must stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Envelopes that may wait to be written before [`Connection::send`] waits.
const OUTBOUND: usize = 32;
/// Envelopes that may wait to be read. The device asks for nearly all that it gets, so a full
/// queue means that the reader is stuck, and the connection is given up.
const INBOUND: usize = 1024;
/// How long a farewell may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The address in the identity is not `HOST:PORT`.
    #[error("{0:?} is not HOST:PORT; enrol the device again")]
    Address(String),
    /// TLS can't be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The other side can't be reached or refuses.
    #[error("{endpoint}: {why}")]
    Failed {
        /// `HOST:PORT`.
        endpoint: String,
        /// What was said.
        why: String,
    },
    /// It took too long.
    #[error("{0}: no connection within {CONNECT_TIMEOUT:?}")]
    Timeout(String),
}

/// The connection is gone; [`Connection::why`] says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

/// Why a connection ended, filled in by its tasks.
#[derive(Clone, Default)]
struct Reason(Arc<Mutex<String>>);

impl Reason {
    /// Keeps the first reason; what follows is usually a consequence.
    fn set(&self, why: impl Into<String>) {
        let mut reason = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if reason.is_empty() {
            *reason = why.into();
        }
    }
}

/// An open connection.
pub struct Connection {
    outbound: mpsc::Sender<Vec<u8>>,
    inbound: mpsc::Receiver<Vec<u8>>,
    reason: Reason,
    writer: JoinHandle<()>,
    reader: JoinHandle<()>,
}

impl Connection {
    /// Queues an envelope. That it was sent says nothing about its arrival.
    pub async fn send(&self, envelope: Vec<u8>) -> Result<(), Closed> {
        self.outbound.send(envelope).await.map_err(|_| Closed)
    }

    /// The next envelope from the cloud; `None` once the connection is gone. Cancel-safe.
    pub async fn recv(&mut self) -> Option<Vec<u8>> {
        self.inbound.recv().await
    }

    /// Why the connection ended.
    pub fn why(&self) -> String {
        let reason = self.reason.0.lock().unwrap_or_else(PoisonError::into_inner);
        if reason.is_empty() {
            "closed".to_owned()
        } else {
            reason.clone()
        }
    }

    /// Sends what is queued and says goodbye.
    pub async fn close(mut self) {
        // The writer sees the end of its queue and says goodbye; the reader sees the other side
        // close.
        let (closed, _) = mpsc::channel(1);
        self.outbound = closed;
        let both = async {
            let _ = (&mut self.writer).await;
            let _ = (&mut self.reader).await;
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, both).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.writer.abort();
        self.reader.abort();
    }
}

/// Opens a connection of a kind.
pub async fn connect(kind: Transport, identity: &Identity) -> Result<Connection, ConnectError> {
    match kind {
        Transport::Quic => quic::connect(identity).await,
        Transport::Mqtt => mqtt::connect(identity).await,
    }
}
