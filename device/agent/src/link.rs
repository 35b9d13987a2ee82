//! The driver of the link: moves bytes between [`device_core::uplink`], the spool, the slot and a
//! transport. What to do when is decided there; this is the shell that does it.

pub mod health;
mod install;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use device_core::slot;
use device_core::uplink::{Action, Event, Transport, Uplink, UplinkConfig};
use flywheel_shared::envelope;
use flywheel_shared::message::{Batch, Desired, Down, Hello, Refused, RefusedCode, Up};
use flywheel_shared::trust::{Role, TrustError, batch_digest, sign_digest};
use flywheel_shared::{MAX_MESSAGE, WIRE_VERSION};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::clock::{Moment, unix_ms};
use crate::config::Config;
use crate::identity::Identity;
use crate::shared::{Shared, lock};
use crate::transport::{self, ConnectError, Connection};
use crate::trust::UpdateError;
use crate::wire;

use health::Reporter;
use install::Installer;

/// Longest sleep; whatever is due later is looked at again then.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// What the link is made of.
pub struct LinkConfig {
    /// Who the device is.
    pub identity: Arc<Identity>,
    /// The agent's configuration.
    pub config: Config,
    /// The current boot epoch.
    pub epoch: u32,
    /// Whether the cloud decides how far a replayed source runs.
    pub obey_run_until: bool,
}

/// The driver.
pub struct Link {
    shared: Arc<Shared>,
    identity: Arc<Identity>,
    epoch: u32,
    obey_run_until: bool,
    uplink: Uplink,
    started: Instant,
    rng: ChaCha8Rng,
    connection: Option<Connection>,
    connecting: Option<JoinHandle<Result<Connection, ConnectError>>>,
    /// When the uplink wants to be asked again.
    wake: Instant,
    reporter: Reporter,
    installer: Installer,
    idle: watch::Sender<bool>,
}

/// What woke the driver.
enum Woken {
    Stop,
    Message(Option<Vec<u8>>),
    Connected(Result<Connection, ConnectError>),
    Proved(Box<install::Proved>),
    News,
    Timer,
}

impl Link {
    /// Makes the driver, and a channel that says whether the device is idle.
    pub fn new(settings: LinkConfig, shared: Arc<Shared>) -> (Self, watch::Receiver<bool>) {
        let config = &settings.config;
        let first = config.transport.first().copied().unwrap_or(Transport::Quic);
        let uplink = Uplink::new(UplinkConfig {
            first,
            second: config.transport.get(1).copied(),
            ..UplinkConfig::default()
        });
        let now = Instant::now();
        let (idle, watcher) = watch::channel(false);
        // Only the jitter of reconnects hangs on this.
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        rng.set_stream(u64::from(settings.epoch));
        let installer = Installer::new(lock(&shared.models).loader());
        let link = Self {
            reporter: Reporter::new(config, settings.epoch, now),
            installer,
            shared,
            identity: settings.identity,
            epoch: settings.epoch,
            obey_run_until: settings.obey_run_until,
            uplink,
            started: now,
            rng,
            connection: None,
            connecting: None,
            wake: now,
            idle,
        };
        (link, watcher)
    }

    /// Runs until `stop` is sent, then tells the cloud the last news and closes.
    pub async fn run(mut self, mut stop: oneshot::Receiver<()>) {
        let boot = self.installer.step(&self.shared, slot::Event::Boot);
        self.perform_slot(boot).await;
        let trusted = lock(&self.shared.models).trusted();
        let trusted = self.installer.step(&self.shared, trusted);
        self.perform_slot(trusted).await;
        self.drive(Event::Tick).await;
        loop {
            let woken = self.wait(&mut stop).await;
            match woken {
                Woken::Stop => break,
                Woken::Message(Some(bytes)) => self.receive(&bytes).await,
                Woken::Message(None) => {
                    let why = self.connection.take().map(|c| c.why()).unwrap_or_default();
                    tracing::warn!(why, "connection lost");
                    self.drive(Event::Closed).await;
                }
                Woken::Connected(result) => self.connected(result).await,
                Woken::Proved(proved) => {
                    let actions = self.installer.proved(&self.shared, *proved);
                    self.perform_slot(actions).await;
                }
                Woken::News => {}
                Woken::Timer => self.tick().await,
            }
            self.look_around().await;
        }
        self.farewell().await;
    }

    async fn wait(&mut self, stop: &mut oneshot::Receiver<()>) -> Woken {
        let now = Instant::now();
        let due = self
            .wake
            .min(self.reporter.due(self.uplink.is_online()))
            .min(self.installer.due(now))
            .min(now + LONGEST_SLEEP);
        let message = async {
            match &mut self.connection {
                Some(connection) => connection.recv().await,
                None => std::future::pending().await,
            }
        };
        let connected = async {
            match &mut self.connecting {
                Some(task) => match task.await {
                    Ok(result) => result,
                    Err(panic) => Err(ConnectError::Failed {
                        endpoint: "the connecting task".to_owned(),
                        why: panic.to_string(),
                    }),
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // A dropped sender means that the agent is ending, too.
            _ = stop => Woken::Stop,
            bytes = message => Woken::Message(bytes),
            result = connected => Woken::Connected(result),
            proved = self.installer.proving() => Woken::Proved(Box::new(proved)),
            () = self.shared.news.notified() => Woken::News,
            () = tokio::time::sleep_until(due.into()) => Woken::Timer,
        }
    }

    /// Something is due.
    async fn tick(&mut self) {
        let now = Instant::now();
        if self.reporter.health_due(now) {
            lock(&self.shared.spool).retry();
            self.drive(Event::HealthDue).await;
        } else {
            self.drive(Event::Tick).await;
        }
        let actions = self.installer.tick(&self.shared, now);
        self.perform_slot(actions).await;
    }

    /// After every event: what changed meanwhile that the uplink or the cloud should know.
    async fn look_around(&mut self) {
        let pending = lock(&self.shared.spool).pending();
        self.drive(Event::Pending {
            records: u32::try_from(pending.records).unwrap_or(u32::MAX),
            bytes: pending.bytes,
        })
        .await;
        let idle = self.reporter.idle(&self.shared);
        self.idle
            .send_if_modified(|was| std::mem::replace(was, idle) != idle);
        if self.uplink.is_online() {
            if self.reporter.has_news(&self.shared) {
                self.drive(Event::HealthDue).await;
            }
            self.attest().await;
            if let Some(report) = self.reporter.report(&self.shared, Instant::now()) {
                self.send(report).await;
            }
            self.fetch().await;
        }
    }

    /// Gives an event to the uplink and does what it says, and what follows from that.
    async fn drive(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let now_ms = self.started.elapsed().as_millis() as u64;
            let draw = self.rng.next_u32();
            for action in self.uplink.step(now_ms, event, draw) {
                if let Some(event) = self.perform(action).await {
                    events.push_back(event);
                }
            }
        }
    }

    async fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Connect(kind) => {
                self.disconnect();
                tracing::debug!(transport = kind.name(), "connecting");
                let identity = Arc::clone(&self.identity);
                self.connecting = Some(tokio::spawn(async move {
                    transport::connect(kind, &identity).await
                }));
                None
            }
            Action::Disconnect => {
                self.disconnect();
                None
            }
            Action::SendHello => {
                let hello = Up::Hello(Hello {
                    device: self.identity.device.clone(),
                    wire_version: WIRE_VERSION,
                    epoch: self.epoch,
                });
                self.send(wire::envelope(&hello)).await;
                None
            }
            Action::Rewind => {
                let mut spool = lock(&self.shared.spool);
                spool.unsend();
                let pending = spool.pending();
                Some(Event::Pending {
                    records: u32::try_from(pending.records).unwrap_or(u32::MAX),
                    bytes: pending.bytes,
                })
            }
            Action::Send {
                max_records,
                max_bytes,
            } => Some(self.send_batch(max_records, max_bytes).await),
            Action::SendHealth => {
                match self.reporter.health(&self.shared, unix_ms()) {
                    Ok(message) => self.send(message).await,
                    Err(error) => tracing::error!(%error, "no health message this time"),
                }
                None
            }
            Action::Sleep { until_ms } => {
                let wake = self.started.checked_add(Duration::from_millis(until_ms));
                self.wake = wake.unwrap_or_else(|| Instant::now() + LONGEST_SLEEP);
                None
            }
        }
    }

    async fn send_batch(&mut self, max_records: u32, max_bytes: u32) -> Event {
        let taken = lock(&self.shared.spool).take(max_records as usize, max_bytes as usize);
        let batch = match taken {
            Ok(Some(batch)) => batch,
            Ok(None) => return Event::Sent { records: 0 },
            Err(error) => {
                tracing::error!(%error, "nothing can be sent now");
                return Event::Sent { records: 0 };
            }
        };
        let digest = batch_digest(
            &self.identity.device,
            batch.epoch,
            batch.count,
            &batch.records,
        );
        let signature = sign_digest(Role::Device, &self.identity.key, &digest);
        let message = Up::Batch(Batch {
            epoch: batch.epoch,
            count: batch.count,
            records: &batch.records,
            signature: &signature,
        });
        self.send(wire::envelope(&message)).await;
        Event::Sent {
            records: u32::from(batch.count),
        }
    }

    /// Sends an envelope. If the connection is gone, its end is noticed by reading.
    async fn send(&mut self, envelope: Vec<u8>) {
        if let Some(connection) = &self.connection {
            self.shared.count_up(envelope.len());
            let _ = connection.send(envelope).await;
        }
    }

    fn disconnect(&mut self) {
        if let Some(task) = self.connecting.take() {
            task.abort();
        }
        if let Some(connection) = self.connection.take() {
            tokio::spawn(connection.close());
        }
    }

    async fn connected(&mut self, result: Result<Connection, ConnectError>) {
        self.connecting = None;
        match result {
            Ok(connection) => {
                self.connection = Some(connection);
                self.drive(Event::Connected).await;
            }
            Err(error) => {
                tracing::warn!(%error, transport = self.uplink.transport().name(), "no connection");
                self.drive(Event::Closed).await;
            }
        }
    }

    /// Takes an envelope from the cloud. What does not decode is dropped: everything the cloud
    /// wants is repeated.
    async fn receive(&mut self, bytes: &[u8]) {
        let payload = match envelope::split(bytes, MAX_MESSAGE) {
            Ok((payload, [])) => payload,
            Ok(_) | Err(_) => {
                tracing::warn!(
                    len = bytes.len(),
                    "a damaged envelope from the cloud is dropped"
                );
                return;
            }
        };
        match postcard::from_bytes::<Down<'_>>(payload) {
            Ok(message) => self.obey(message).await,
            Err(error) => {
                tracing::warn!(%error, "a message from the cloud does not decode; it may be newer than this agent");
            }
        }
    }

    async fn obey(&mut self, message: Down<'_>) {
        match message {
            Down::Welcome(_) => {
                tracing::info!(transport = self.uplink.transport().name(), "welcome");
                self.reporter.new_connection();
                self.installer.new_connection();
                // Before anything that the cloud answers with an offer.
                lock(&self.shared.models).trust().refresh();
                self.attest().await;
                self.drive(Event::Welcomed).await;
            }
            Down::Ack(ack) => {
                let records = lock(&self.shared.spool).ack(ack.epoch, &ack.ranges);
                self.drive(Event::Acked { records }).await;
            }
            Down::Desired(desired) => self.desired(desired),
            Down::Refused(refused) => self.refused(refused).await,
            Down::Offer(offer) => {
                let actions = self.installer.offer(&self.shared, &offer, self.moment());
                self.perform_slot(actions).await;
            }
            Down::Chunk(chunk) => {
                let actions = self.installer.chunk(&self.shared, &chunk);
                self.perform_slot(actions).await;
            }
            Down::SlotSeen(seen) => {
                let event = slot::Event::ReportSeen {
                    digest: seen.manifest,
                    state: seen.state,
                };
                let actions = self.installer.step(&self.shared, event);
                self.perform_slot(actions).await;
            }
            Down::Root(signed) => {
                let updated = lock(&self.shared.models).update_root(signed);
                match updated {
                    Ok(()) => {
                        lock(&self.shared.models).trust().refresh();
                        let trusted = lock(&self.shared.models).trusted();
                        let actions = self.installer.step(&self.shared, trusted);
                        self.perform_slot(actions).await;
                    }
                    Err(UpdateError::Refused(TrustError::OldRoot)) => {}
                    Err(error) => {
                        tracing::warn!(%error, "a trust root is not taken");
                        // One between may have been lost.
                        let now = self.moment();
                        lock(&self.shared.models).trust().want(now.mono_ms);
                    }
                }
            }
            Down::Time(signed) => {
                let now = self.moment();
                let device = &self.identity.device;
                let answered = lock(&self.shared.models)
                    .trust()
                    .answer(device, signed, now);
                if let Err(error) = answered {
                    tracing::warn!(%error, "a time stamp is not taken");
                }
            }
        }
    }

    /// The time by both clocks.
    fn moment(&self) -> Moment {
        Moment {
            // One that stands before 1970 was never set.
            wall_ms: Some(unix_ms()).filter(|ms| *ms > 0),
            mono_ms: self.started.elapsed().as_millis() as u64,
        }
    }

    /// Asks for newer trust roots and the time, if the device wants them.
    async fn attest(&mut self) {
        let now = self.moment();
        let question = lock(&self.shared.models).trust().question(now.mono_ms);
        if let Some(attest) = question {
            self.send(wire::envelope(&Up::Attest(attest))).await;
        }
    }

    fn desired(&self, desired: Desired) {
        if self.obey_run_until {
            self.shared
                .signal(|signals| signals.run_until = desired.run_until);
        }
        lock(&self.shared.spool).settle(desired.health_at_ms);
    }

    async fn refused(&mut self, refused: Refused) {
        match refused.code {
            RefusedCode::NotFound => {
                let actions = self.installer.not_found(&self.shared);
                self.perform_slot(actions).await;
            }
            RefusedCode::Identity => {
                tracing::error!(
                    "the cloud does not know this device or has revoked it; enrol it again"
                );
            }
            RefusedCode::WireVersion => {
                tracing::error!(
                    version = WIRE_VERSION,
                    "the cloud does not speak this agent's wire version; update the older of the two"
                );
            }
            code => tracing::warn!(
                ?code,
                retry_after_ms = refused.retry_after_ms,
                "the cloud did not take a message"
            ),
        }
        self.drive(Event::Refused {
            code: refused.code,
            retry_after_ms: refused.retry_after_ms,
        })
        .await;
    }

    /// What the installer leaves to the link: fetching begins at once, the rest is told by
    /// `look_around`.
    async fn perform_slot(&mut self, actions: Vec<slot::Action>) {
        for action in actions {
            self.installer.perform(&self.shared, action);
        }
        if self.uplink.is_online() {
            self.fetch().await;
        }
    }

    async fn fetch(&mut self) {
        for request in self.installer.requests(Instant::now()) {
            self.send(wire::envelope(&Up::Fetch(request))).await;
        }
    }

    /// The orderly end.
    async fn farewell(mut self) {
        let actions = self.installer.step(&self.shared, slot::Event::Stop);
        debug_assert!(actions.is_empty());
        if let Err(error) = lock(&self.shared.spool).flush() {
            tracing::error!(%error, "the spool is not flushed");
        }
        if self.uplink.is_online()
            && let Ok(message) = self.reporter.health(&self.shared, unix_ms())
        {
            self.send(message).await;
        }
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
    }
}
