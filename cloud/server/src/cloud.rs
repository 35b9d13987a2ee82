//! The running cloud: every service over one store, the sockets that reach them, and the tasks
//! that carry rollouts on.

use std::fmt;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use cloud_core::rollout::Device;
use flywheel_shared::ids::DeviceId;

use crate::api::types::{
    AuditView, DeviceView, EnrollReply, EnrollRequest, Info, RootRequest, RootView, TagRequest,
    TokenReply, TokenRequest,
};
use crate::client::{ADDRESS_FILE, TOKEN_FILE};
use crate::fleet::{self, Fleet, FleetError, Grant};
use crate::ingest::Ingest;
use crate::ingest::broker::{self, BrokerOptions};
use crate::ingest::endpoints::{Endpoints, Wanted};
use crate::ingest::mqtt::{self, MqttLink, MqttOptions, TlsFiles};
use crate::ingest::quic::{self, QuicListener};
use crate::pki::{self, Pki};
use crate::service::catalog::Catalog;
use crate::service::jobs::Jobs;
use crate::service::queue::{Labelling, Ranking};
use crate::service::registry::Registry;
use crate::service::rollouts::Rollouts;
use crate::service::roots::Roots;
use crate::service::training::Stations;
use crate::service::{Fault, now_ms};
use crate::store::{Store, StoreError};

const SETTINGS: &str = "settings";
const RUN_UNTIL: &[u8] = b"run_until";
/// How long an enrolment token is good for unless told.
const TOKEN_LIFE_S: u64 = 3600;
/// How long the broker may take to answer when the server starts.
const BROKER_PATIENCE: Duration = Duration::from_secs(10);
/// Rollouts are looked at this often besides at every event: for offers that went unanswered.
const ROLLOUT_TICK: Duration = Duration::from_millis(500);

/// What a cloud is started with.
#[derive(Clone, Debug)]
pub struct CloudConfig {
    /// Data folder.
    pub data: PathBuf,
    /// Folder with the rollout key and the trust root.
    pub keys: PathBuf,
    /// Interface on which everything listens.
    pub bind: IpAddr,
    /// Port of the API; 0 for a free one that is kept.
    pub http_port: u16,
    /// Port of MQTT over TLS, likewise.
    pub mqtt_port: u16,
    /// Port of QUIC, likewise.
    pub quic_port: u16,
    /// An external broker instead of the embedded one: as the server reaches it, and where
    /// devices do, `host:port`.
    pub broker: Option<(BrokerUrl, String)>,
    /// Names under which devices reach this machine.
    pub hosts: Vec<String>,
    /// How the queue ranks.
    pub ranking: Ranking,
}

/// A broker as the server reaches it: `mqtts://HOST:PORT` by TLS with a certificate of the fleet's
/// authority on both sides, or `mqtt://USER:PASSWORD@HOST:PORT` in the clear; credentials optional.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl {
    tls: bool,
    host: String,
    port: u16,
    credentials: Option<(String, String)>,
}

impl fmt::Debug for BrokerUrl {
    /// Without the password, which must not get into logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "mqtts" } else { "mqtt" };
        write!(f, "{scheme}://{}:{}", self.host, self.port)
    }
}

impl FromStr for BrokerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = "expected mqtts://HOST:PORT or mqtt://USER:PASSWORD@HOST:PORT, the part up to the @ optional";
        let (tls, rest) = match text.split_once("://") {
            Some(("mqtts", rest)) => (true, rest),
            Some(("mqtt", rest)) => (false, rest),
            _ => return Err(wanted.to_owned()),
        };
        let (credentials, address) = match rest.rsplit_once('@') {
            Some((credentials, address)) => {
                let (user, password) = credentials.split_once(':').ok_or(wanted)?;
                (Some((user.to_owned(), password.to_owned())), address)
            }
            None => (None, rest),
        };
        let (host, port) = address.rsplit_once(':').ok_or(wanted)?;
        if host.is_empty() {
            return Err(wanted.to_owned());
        }
        Ok(Self {
            tls,
            host: host.to_owned(),
            port: port.parse().map_err(|_| wanted)?,
            credentials,
        })
    }
}

/// Where devices connect.
#[derive(Clone, Debug)]
struct Addresses {
    /// MQTT over TLS, `host:port`.
    mqtt: String,
    /// QUIC, `host:port`.
    quic: String,
}

/// The sockets of devices; dropping it closes them.
struct Sockets {
    _quic: QuicListener,
    _mqtt: MqttLink,
}

/// The services of a running cloud.
pub struct Cloud {
    /// Token of the API.
    pub token: String,
    /// Everything durable.
    pub store: Arc<Store>,
    /// Devices.
    pub fleet: Arc<Fleet>,
    /// Imports and datasets.
    pub catalog: Catalog,
    /// The labelling queue.
    pub labelling: Labelling,
    /// Models.
    pub registry: Arc<Registry>,
    /// Rollouts.
    pub rollouts: Rollouts,
    /// Training and evaluation.
    pub jobs: Jobs,
    /// Which keys devices believe.
    pub roots: Arc<Roots>,
    addresses: OnceLock<Addresses>,
    ingest: OnceLock<Arc<Ingest>>,
}

impl Cloud {
    /// Opens the services; nothing listens yet.
    ///
    /// # Errors
    /// If keys are missing, the data folder is in use, or a record can't be read.
    pub fn open(config: &CloudConfig, pki: Arc<Pki>, store: Arc<Store>) -> Result<Arc<Self>> {
        let roots = Roots::open(store.clone(), &config.keys)?;
        let registry = Arc::new(Registry::new(store.clone(), roots.clone()));
        Ok(Arc::new(Self {
            token: token(&config.data)?,
            fleet: Fleet::open(store.clone(), pki)?,
            catalog: Catalog::new(store.clone()),
            labelling: Labelling::open(store.clone(), config.ranking)?,
            rollouts: Rollouts::open(store.clone(), registry.clone(), roots.clone())?,
            jobs: Jobs::new(store.clone()),
            registry,
            roots,
            addresses: OnceLock::new(),
            ingest: OnceLock::new(),
            store,
        }))
    }

    /// Runs a cloud until the process is asked to end.
    ///
    /// # Errors
    /// If something can't be opened or a port can't be bound.
    pub async fn serve(config: CloudConfig) -> Result<()> {
        pki::install_crypto();
        anyhow::ensure!(
            !config.bind.is_unspecified() || !config.hosts.is_empty(),
            "--bind {} needs --host NAME: the name or address under which devices reach this machine",
            config.bind
        );
        let store = Store::open(&config.data)?;
        let pki = Arc::new(Pki::open(
            &config.data.join("pki"),
            &config.hosts,
            now_ms(),
        )?);
        let cloud = Self::open(&config, pki.clone(), store)?;
        let optional = |port: u16| (port != 0).then_some(port);
        let endpoints = Endpoints::settle(
            &config.data.join("endpoints.json"),
            &Wanted {
                bind: config.bind,
                http: optional(config.http_port),
                mqtt: optional(config.mqtt_port),
                quic: optional(config.quic_port),
            },
        )?;
        let _sockets = cloud.listen(&config, &pki, &endpoints).await?;
        Jobs::resume(&cloud)?;

        let address = endpoints.http;
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| {
                format!("the API can't listen on {address}; choose another port with --http-port")
            })?;
        tokio::spawn(Self::carry_on(cloud.clone()));
        write_private(
            &config.data.join(ADDRESS_FILE),
            format!("http://{address}\n").as_bytes(),
        )?;
        tracing::info!(%address, mqtt = %cloud.info().mqtt, quic = %cloud.info().quic, "listening");
        axum::serve(listener, crate::api::router(cloud.clone()))
            .with_graceful_shutdown(asked_to_end())
            .await
            .context("the API stopped")?;
        cloud.store.flush()?;
        Ok(())
    }

    /// Opens the sockets of devices: QUIC, and MQTT by the embedded or an external broker.
    async fn listen(
        self: &Arc<Self>,
        config: &CloudConfig,
        pki: &Pki,
        endpoints: &Endpoints,
    ) -> Result<Sockets> {
        let ingest = Ingest::new(
            self.store.clone(),
            self.fleet.clone(),
            self.clone(),
            Arc::new(now_ms),
        );
        let quic = quic::listen(ingest.clone(), pki, endpoints.quic)?;
        let (options, for_devices) = match &config.broker {
            Some((url, for_devices)) => (
                MqttOptions {
                    host: url.host.clone(),
                    port: url.port,
                    credentials: url.credentials.clone(),
                    tls: url.tls.then(|| broker_tls(pki)).transpose()?,
                    client_id: "flywheel-ingest".to_owned(),
                    patience: BROKER_PATIENCE,
                },
                Some(for_devices.clone()),
            ),
            None => {
                let local = broker::start(&BrokerOptions {
                    listen: endpoints.mqtt,
                    local: endpoints.mqtt_local,
                    paths: pki.paths().clone(),
                })?;
                (
                    MqttOptions {
                        host: local.address.ip().to_string(),
                        port: local.address.port(),
                        credentials: Some(local.credentials),
                        tls: None,
                        client_id: "flywheel-ingest".to_owned(),
                        patience: BROKER_PATIENCE,
                    },
                    None,
                )
            }
        };
        let mqtt = mqtt::start(ingest.clone(), &options).await?;
        let reachable = |address: SocketAddr| match config.hosts.first() {
            Some(host) => format!("{host}:{}", address.port()),
            None => address.to_string(),
        };
        // Set once, here, before anything can ask for them.
        let _ = self.ingest.set(ingest);
        let _ = self.addresses.set(Addresses {
            mqtt: for_devices.unwrap_or_else(|| reachable(endpoints.mqtt)),
            quic: reachable(endpoints.quic),
        });
        Ok(Sockets {
            _quic: quic,
            _mqtt: mqtt,
        })
    }

    /// The services that training and evaluation work with.
    pub fn stations(&self) -> Stations<'_> {
        Stations {
            store: &self.store,
            catalog: &self.catalog,
            labelling: &self.labelling,
            registry: &self.registry,
        }
    }

    /// What the server is and where devices connect.
    pub fn info(&self) -> Info {
        let addresses = self.addresses.get();
        Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mqtt: addresses.map(|at| at.mqtt.clone()).unwrap_or_default(),
            quic: addresses.map(|at| at.quic.clone()).unwrap_or_default(),
        }
    }

    /// The devices that rollouts may go to.
    pub fn inventory(&self) -> Vec<Device> {
        self.fleet.inventory(now_ms())
    }

    /// Makes the offers that are due and sends them.
    ///
    /// # Errors
    /// If the store fails.
    pub fn advance_rollouts(&self) -> Result<(), Fault> {
        let offers = self.rollouts.advance(&self.inventory(), now_ms())?;
        if let Some(ingest) = self.ingest.get() {
            for (device, offer) in offers {
                // Unheard offers are repeated with the answer to the device's next health report.
                ingest.push_offer(&device, &offer);
            }
        }
        Ok(())
    }

    /// Tags a device.
    ///
    /// # Errors
    /// If there is none, or a label could not be named by a selector.
    pub fn tag(&self, id: &str, request: &TagRequest) -> Result<DeviceView, Fault> {
        let device = parse_device(id)?;
        let group = request.group.as_deref();
        self.fleet
            .tag(&device, &request.set, &request.remove, group)?;
        self.device(id)
    }

    /// Lets replayed sources run on.
    ///
    /// # Errors
    /// If the store fails.
    pub fn advance(&self, run_until: u64) -> Result<(), Fault> {
        self.store.put(SETTINGS, RUN_UNTIL, &run_until)?;
        if let Some(ingest) = self.ingest.get() {
            for device in self.fleet.records() {
                // One that is not connected hears of it with the answer to its next health report.
                ingest.push_desired(&device.device, run_until);
            }
        }
        Ok(())
    }

    /// The frame before which replayed sources halt.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn run_until(&self) -> Result<u64, Fault> {
        Ok(self.store.get(SETTINGS, RUN_UNTIL)?.unwrap_or(0))
    }

    /// Takes the next trust root and hands it to the devices that are connected; the others ask for
    /// it when they are.
    ///
    /// # Errors
    /// If it is not signed as it must be, or the store fails.
    pub fn publish_root(&self, request: &RootRequest) -> Result<RootView, Fault> {
        let bytes = hex::decode(&request.root_hex)
            .map_err(|error| Fault::Invalid(format!("root_hex: {error}")))?;
        let view = self.roots.publish(bytes.clone())?;
        if let Some(ingest) = self.ingest.get() {
            for device in self.fleet.records() {
                ingest.push_root(&device.device, &bytes);
            }
        }
        Ok(view)
    }

    /// Makes an enrolment token.
    ///
    /// # Errors
    /// If the device id is not one.
    pub fn make_token(&self, request: &TokenRequest) -> Result<TokenReply, Fault> {
        let expires_ms = now_ms() + request.ttl_s.unwrap_or(TOKEN_LIFE_S).saturating_mul(1000);
        let device = request.device.as_deref().map(parse_device).transpose()?;
        let token = self.fleet.mint_token(&Grant {
            group: request
                .group
                .clone()
                .unwrap_or_else(|| "default".to_owned()),
            device,
            prefix: None,
            expires_ms,
        })?;
        Ok(TokenReply { token, expires_ms })
    }

    /// Enrols a device.
    ///
    /// # Errors
    /// If the token does not allow it.
    pub fn enroll(&self, request: &EnrollRequest) -> Result<EnrollReply, Fault> {
        let enrolled = self.fleet.enroll(
            &request.token,
            &request.csr_pem,
            request.device.as_deref(),
            now_ms(),
        )?;
        let info = self.info();
        Ok(EnrollReply {
            device: enrolled.device.to_string(),
            certificate_pem: enrolled.certificate_pem,
            ca_pem: enrolled.ca_pem,
            trust_hex: hex::encode(self.roots.bytes()),
            mqtt: info.mqtt,
            quic: info.quic,
            server_name: pki::SERVER_NAME.to_owned(),
        })
    }

    /// All devices.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn devices(&self) -> Result<Vec<DeviceView>, Fault> {
        self.fleet
            .list()?
            .into_iter()
            .map(|device| self.device_view(device))
            .collect()
    }

    /// One device.
    ///
    /// # Errors
    /// If there is none.
    pub fn device(&self, id: &str) -> Result<DeviceView, Fault> {
        let device = parse_device(id)?;
        let found = self
            .fleet
            .show(&device)?
            .ok_or(FleetError::UnknownDevice(device))?;
        self.device_view(found)
    }

    /// Shuts a device out.
    ///
    /// # Errors
    /// If there is none.
    pub fn revoke(&self, id: &str) -> Result<DeviceView, Fault> {
        let device = parse_device(id)?;
        match self.ingest.get() {
            Some(ingest) => ingest.revoke(&device)?,
            None => self.fleet.revoke(&device, now_ms())?,
        }
        self.device(id)
    }

    /// The conservation law over the fleet.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn audit(&self) -> Result<AuditView, Fault> {
        let report = self.fleet.audit()?;
        let findings = [
            ("nowhere", &report.missing),
            ("twice", &report.double),
            ("never flagged", &report.unflagged),
        ];
        let mut missing: Vec<String> = findings
            .into_iter()
            .flat_map(|(what, findings)| findings.iter().map(move |finding| (what, finding)))
            .map(|(what, finding)| {
                format!(
                    "{} epoch {}: {:?} {what}",
                    finding.device,
                    finding.epoch,
                    finding.ranges.ranges()
                )
            })
            .collect();
        missing.extend(report.over_acked.iter().map(|(device, epoch, acked, known)| {
            format!("{device} epoch {epoch}: the device counts {acked} acknowledged, the cloud has {known}")
        }));
        Ok(AuditView {
            flagged: report.flagged,
            ingested: report.ingested,
            spooled: report.spooled,
            dropped: report.dropped,
            balanced: report.balanced,
            missing,
        })
    }

    fn device_view(&self, device: fleet::DeviceView) -> Result<DeviceView, Fault> {
        let health = device.health.map(|stored| stored.health);
        let model = match health.as_ref().and_then(|health| health.live) {
            Some(digest) => self.registry.by_manifest(&digest)?.map(|model| model.id),
            None => None,
        };
        let health = health.as_ref();
        let text = |pick: fn(&crate::ingest::OwnedHealth) -> &String| {
            health
                .map(|health| pick(health).clone())
                .unwrap_or_default()
        };
        Ok(DeviceView {
            id: device.record.device.to_string(),
            group: device.record.group,
            labels: device.record.labels,
            revoked: device.record.revoked_at_ms.is_some(),
            transport: device
                .connected
                .map(|transport| transport.name().to_owned()),
            last_seen_ms: device.last_seen_ms,
            root_version: self.roots.version_of(&device.record.device),
            hardware: text(|health| &health.hardware),
            source: text(|health| &health.source),
            engine: text(|health| &health.engine),
            frame: health.map_or(0, |health| health.frame),
            bytes_seen: health.map_or(0, |health| health.bytes_seen),
            bytes_up: device.traffic.bytes_up,
            skipped: health.map_or(0, |health| health.skipped),
            dropped: health.and_then(|health| health.dropped),
            idle: health.is_some_and(|health| health.idle),
            epoch: health.map_or(0, |health| health.epoch),
            sequence: health.map_or(0, |health| health.sequence),
            model,
        })
    }

    async fn carry_on(cloud: Arc<Self>) {
        let mut tick = tokio::time::interval(ROLLOUT_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut changes = cloud.rollouts.changes();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
            let cloud = cloud.clone();
            let advanced = tokio::task::spawn_blocking(move || cloud.advance_rollouts()).await;
            match advanced {
                Ok(Ok(())) => {}
                Ok(Err(fault)) => tracing::error!(%fault, "a rollout can't go on"),
                Err(error) => tracing::error!(%error, "a rollout was cut short"),
            }
        }
    }
}

impl crate::ingest::Steering for Cloud {
    fn desired(&self, _device: &DeviceId) -> u64 {
        self.run_until().unwrap_or_else(|fault| {
            tracing::error!(%fault, "how far sources may run is not known");
            0
        })
    }

    fn offer(
        &self,
        device: &DeviceId,
        health: &crate::ingest::OwnedHealth,
    ) -> Option<crate::ingest::OfferBytes> {
        let record = self.fleet.record(device)?;
        let known = Device {
            id: device.to_string(),
            group: record.group,
            labels: record.labels,
            hardware: health.hardware.clone(),
            engine: health.engine.clone(),
            sequence: health.sequence,
            // It has just been heard.
            online: true,
            silent_ms: 0,
            restarts: health.epoch,
            skipped: health.skipped,
        };
        self.rollouts
            .standing_offer(&known, health.candidate.is_some(), now_ms())
            .unwrap_or_else(|fault| {
                tracing::error!(%fault, %device, "no offer can be made");
                None
            })
    }

    fn slot(
        &self,
        device: &DeviceId,
        report: &crate::ingest::OwnedSlotReport,
    ) -> Result<(), StoreError> {
        self.rollouts.record(device, report, now_ms())
    }

    fn attest(
        &self,
        device: &DeviceId,
        attest: &flywheel_shared::message::Attest,
        now_ms: u64,
    ) -> Option<crate::ingest::Attested> {
        let attested = self.roots.attest(device, attest, now_ms);
        attested
            .inspect_err(|fault| tracing::error!(%fault, %device, "keys and time can't be told"))
            .ok()
    }

    fn may_fetch(&self, digest: &flywheel_shared::ids::Digest) -> bool {
        self.registry.is_released_part(digest).unwrap_or(false)
    }
}

impl From<FleetError> for Fault {
    fn from(error: FleetError) -> Self {
        match &error {
            FleetError::UnknownDevice(_) => Self::NotFound(error.to_string()),
            FleetError::Taken(_) | FleetError::UsedToken(_) => Self::Conflict(error.to_string()),
            refusal if refusal.is_refusal() => Self::Invalid(error.to_string()),
            _ => Self::Internal(error.to_string()),
        }
    }
}

fn parse_device(id: &str) -> Result<DeviceId, Fault> {
    id.parse()
        .map_err(|error| Fault::Invalid(format!("`{id}` is not a device id: {error}")))
}

/// The API token of a data folder, made on first use.
fn token(data: &Path) -> Result<String> {
    let path = data.join(TOKEN_FILE);
    if let Ok(token) = fs::read_to_string(&path) {
        let token = token.trim().to_owned();
        anyhow::ensure!(
            !token.is_empty(),
            "{} is empty; remove it and start again to get a new token",
            path.display()
        );
        return Ok(token);
    }
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes)
        .map_err(|error| anyhow::anyhow!("the system gives no randomness: {error}"))?;
    let token = hex::encode(bytes);
    write_private(&path, format!("{token}\n").as_bytes())?;
    Ok(token)
}

/// Replaces a file that only its owner may read, whole or not at all.
fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    // A leftover of a crash may be in the way.
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(|| format!("cannot create {}", temporary.display()))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// How the ingest shows an external broker who it is, and knows it.
fn broker_tls(pki: &Pki) -> Result<TlsFiles> {
    Ok(TlsFiles {
        ca_pem: pki.ca_pem().to_owned(),
        client: Some(pki.ingest_client(now_ms())?),
    })
}

async fn asked_to_end() {
    let interrupt = tokio::signal::ctrl_c();
    match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            }
        }
        Err(error) => {
            tracing::warn!(%error, "SIGTERM can't be listened for");
            let _ = interrupt.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broker_urls() {
        let url: BrokerUrl = "mqtt://me:a:b@c@broker:1883".parse().unwrap();
        assert_eq!((url.host.as_str(), url.port), ("broker", 1883));
        assert_eq!(url.credentials, Some(("me".to_owned(), "a:b@c".to_owned())));
        assert!(!format!("{url:?}").contains("a:b"));
        let url: BrokerUrl = "mqtt://127.0.0.1:1".parse().unwrap();
        assert_eq!((url.credentials, url.tls), (None, false));
        assert!("mqtts://127.0.0.1:1".parse::<BrokerUrl>().unwrap().tls);
        for bad in [
            "broker:1883",
            "mqtt://broker",
            "mqtt://me@broker:1",
            "mqtt://:1",
            "mqtt://b:x",
        ] {
            assert!(
                bad.parse::<BrokerUrl>()
                    .unwrap_err()
                    .contains("mqtts://HOST"),
                "{bad}"
            );
        }
    }
}
