//! MQTT: the server is a client of a broker, embedded or not. Devices publish to
//! `/tenants/{device}/up` and the server to `/tenants/{device}/down`; the broker sees to it that
//! only the holder of a device's certificate can do so under its id.
//!
//! The broker's own acknowledgement is used for flow control alone: it is given once a message is
//! dealt with, so no more than one window of messages waits here. What frees a device's spool is
//! ingest's acknowledgement.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use flywheel_shared::ids::DeviceId;
use rumqttc::{
    AsyncClient, Event, EventLoop, Packet, Publish, QoS, SubscribeReasonCode, TlsConfiguration,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::{Ingest, Outlet, Transport};

/// Largest MQTT packet in bytes: a message with its topic.
pub(super) const MAX_PACKET: usize = 2 * 1024 * 1024;
const UP: &str = "/tenants/+/up";
/// Requests that may wait for the connection.
const QUEUE: usize = 256;
/// A device that is silent for this long counts as not connected, in milliseconds.
const SILENCE_MS: u64 = 60_000;
const EXPIRY_CHECK: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);

/// TLS to an external broker.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Roots to trust, PEM.
    pub ca_pem: String,
    /// The server's own certificate and private key for the broker, PEM, if it wants one.
    pub client: Option<(String, String)>,
}

/// Which broker to use, and how.
#[derive(Clone, Debug)]
pub struct MqttOptions {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// User name and password.
    pub credentials: Option<(String, String)>,
    /// TLS; `None` for a plain connection.
    pub tls: Option<TlsFiles>,
    /// Client id; two servers on one broker need different ones.
    pub client_id: String,
    /// How long [`start`] waits for the first connection.
    pub patience: Duration,
}

/// Why the broker can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the MQTT broker at {host}:{port} can't be used: {why}")]
pub struct MqttError {
    host: String,
    port: u16,
    why: String,
}

/// How the link is.
#[derive(Clone, Debug)]
struct State {
    /// How often it was connected and subscribed.
    connections: u64,
    /// Why it is not now, if it is not.
    problem: Option<String>,
}

/// The link to the broker; it connects again by itself. Dropping it ends it.
pub struct MqttLink {
    _tasks: JoinSet<()>,
    state: watch::Receiver<State>,
}

impl MqttLink {
    /// Whether it is connected and subscribed now.
    pub fn is_connected(&self) -> bool {
        self.state.borrow().problem.is_none()
    }

    /// Waits until it is connected, for the `times`-th time or later.
    pub async fn connected(&self, times: u64) {
        let mut state = self.state.clone();
        let connected = |state: &State| state.problem.is_none() && state.connections >= times;
        // An error means that the link has ended, and nothing changes any more.
        let _ = state.wait_for(connected).await;
    }
}

/// Connects to the broker; returns once subscribed.
pub async fn start(ingest: Arc<Ingest>, options: &MqttOptions) -> Result<MqttLink, MqttError> {
    let mut mqtt = rumqttc::MqttOptions::new(&options.client_id, &options.host, options.port);
    mqtt.set_keep_alive(Duration::from_secs(20))
        .set_clean_session(true)
        .set_manual_acks(true)
        .set_max_packet_size(MAX_PACKET, MAX_PACKET);
    if let Some((user, password)) = &options.credentials {
        mqtt.set_credentials(user, password);
    }
    if let Some(tls) = &options.tls {
        let client_auth = tls.client.as_ref();
        let client_auth = client_auth
            .map(|(certificate, key)| (certificate.clone().into_bytes(), key.clone().into_bytes()));
        mqtt.set_transport(rumqttc::Transport::tls_with_config(
            TlsConfiguration::Simple {
                ca: tls.ca_pem.clone().into_bytes(),
                alpn: None,
                client_auth,
            },
        ));
    }
    let (client, events) = AsyncClient::new(mqtt, QUEUE);
    let (set_state, mut state) = watch::channel(State {
        connections: 0,
        problem: Some("no connection yet".to_owned()),
    });
    let (acks, to_acknowledge) = mpsc::unbounded_channel();
    let session = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    tasks.spawn(acknowledge(client.clone(), session.clone(), to_acknowledge));
    tasks.spawn(expire(ingest.clone()));
    let poller = Poller {
        ingest,
        client,
        session,
        acks,
        state: set_state,
        workers: BTreeMap::new(),
        strangers: None,
        tasks: JoinSet::new(),
    };
    tasks.spawn(poller.run(events));
    let first = state.wait_for(|state| state.problem.is_none());
    let connected = tokio::time::timeout(options.patience, first)
        .await
        .is_ok_and(|first| first.is_ok());
    if !connected {
        let why = state.borrow().problem.clone();
        return Err(MqttError {
            host: options.host.clone(),
            port: options.port,
            why: why.unwrap_or_else(|| "it went away".to_owned()),
        });
    }
    Ok(MqttLink {
        _tasks: tasks,
        state,
    })
}

/// A message to deal with, and where to say that it is.
type Work = (DeviceId, Bytes, oneshot::Sender<()>);

struct Poller {
    ingest: Arc<Ingest>,
    client: AsyncClient,
    /// Rises with every lost connection: acknowledgements of an older one are void.
    session: Arc<AtomicU64>,
    acks: mpsc::UnboundedSender<(u64, Publish, oneshot::Receiver<()>)>,
    state: watch::Sender<State>,
    /// One task per device, so that none waits for another.
    workers: BTreeMap<DeviceId, mpsc::UnboundedSender<Work>>,
    /// One for all ids that are not enrolled, which are only refused.
    strangers: Option<mpsc::UnboundedSender<Work>>,
    tasks: JoinSet<()>,
}

impl Poller {
    async fn run(mut self, mut events: EventLoop) {
        let mut retry = FIRST_RETRY;
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => {
                    // By a task of its own: the queue may be full, and only polling drains it.
                    let client = self.client.clone();
                    self.tasks.spawn(async move {
                        // It fails only when polling has ended.
                        let _ = client.subscribe(UP, QoS::AtLeastOnce).await;
                    });
                }
                Ok(Event::Incoming(Packet::SubAck(ack))) => {
                    let refused =
                        |code: &SubscribeReasonCode| *code == SubscribeReasonCode::Failure;
                    if ack.return_codes.iter().any(refused) {
                        let why = format!("it refuses the subscription to {UP}");
                        tracing::error!("{why}");
                        self.state.send_modify(|state| state.problem = Some(why));
                        continue;
                    }
                    retry = FIRST_RETRY;
                    let outlet = Arc::new(MqttOutlet(self.client.clone()));
                    self.ingest.set_broker(Some(outlet));
                    tracing::info!("subscribed at the broker");
                    self.state.send_modify(|state| {
                        state.connections += 1;
                        state.problem = None;
                    });
                }
                Ok(Event::Incoming(Packet::Publish(publish))) => self.dispatch(publish),
                Ok(_) => {}
                Err(error) => {
                    self.session.fetch_add(1, SeqCst);
                    self.ingest.set_broker(None);
                    self.state.send_modify(|state| {
                        if state.problem.is_none() {
                            tracing::warn!(%error, "the connection to the broker is lost");
                        }
                        state.problem = Some(error.to_string());
                    });
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(LAST_RETRY);
                }
            }
        }
    }

    fn dispatch(&mut self, publish: Publish) {
        let (done, outcome) = oneshot::channel();
        if let Some(device) = device_of(&publish.topic) {
            let work = (device.clone(), publish.payload.clone(), done);
            let (tasks, ingest, client) = (&mut self.tasks, &self.ingest, &self.client);
            let mut begin = || {
                let (sender, queue) = mpsc::unbounded_channel();
                tasks.spawn(work_off(ingest.clone(), client.clone(), queue));
                sender
            };
            let worker = if ingest.fleet().record(&device).is_some() {
                self.workers.entry(device).or_insert_with(begin)
            } else {
                self.strangers.get_or_insert_with(&mut begin)
            };
            // Workers end with the poller.
            let _ = worker.send(work);
        }
        // A topic without a device drops `done`, which counts as dealt with.
        let session = self.session.load(SeqCst);
        let _ = self.acks.send((session, publish, outcome));
    }
}

fn device_of(topic: &str) -> Option<DeviceId> {
    let device = topic.strip_prefix("/tenants/")?.strip_suffix("/up")?;
    device.parse().ok()
}

/// Deals with messages one after the other.
async fn work_off(
    ingest: Arc<Ingest>,
    client: AsyncClient,
    mut queue: mpsc::UnboundedReceiver<Work>,
) {
    while let Some((device, payload, done)) = queue.recv().await {
        let answers = ingest.handle(&device, Transport::Mqtt, &payload).await;
        // Nobody waits after a lost connection.
        let _ = done.send(());
        for answer in answers {
            let sent = client
                .publish(down(&device), QoS::AtLeastOnce, false, answer)
                .await;
            if sent.is_err() {
                return;
            }
        }
    }
}

/// Acknowledges to the broker in the order of arrival, which brokers insist on.
async fn acknowledge(
    client: AsyncClient,
    session: Arc<AtomicU64>,
    mut queue: mpsc::UnboundedReceiver<(u64, Publish, oneshot::Receiver<()>)>,
) {
    while let Some((of, publish, outcome)) = queue.recv().await {
        // An error means that the message needs nothing more.
        let _ = outcome.await;
        if of == session.load(SeqCst) && client.ack(&publish).await.is_err() {
            return;
        }
    }
}

async fn expire(ingest: Arc<Ingest>) {
    loop {
        tokio::time::sleep(EXPIRY_CHECK).await;
        ingest.expire(SILENCE_MS);
    }
}

fn down(device: &DeviceId) -> String {
    format!("/tenants/{device}/down")
}

struct MqttOutlet(AsyncClient);

impl Outlet for MqttOutlet {
    fn send(&self, device: &DeviceId, envelope: Vec<u8>) -> bool {
        self.0
            .try_publish(down(device), QoS::AtLeastOnce, false, envelope)
            .is_ok()
    }

    // The broker holds the connection; whatever a device sends is refused.
    fn close(&self, _device: &DeviceId, _why: &str) {}
}
