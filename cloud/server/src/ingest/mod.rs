//! What devices send, whatever it came by: authenticated, deduplicated, committed, and only then
//! acknowledged.
//!
//! [`Ingest::handle`] takes one envelope and gives the answers. It keeps nothing between messages
//! but who is connected, so a restart loses nothing and a device need not start over. Transports
//! ([`mqtt`], [`quic`]) move bytes and vouch for the device's id; the batch signature vouches for
//! it again.

pub mod broker;
pub mod broker_files;
pub mod endpoints;
pub mod mqtt;
mod porter;
pub mod quic;
mod wire;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod transport_tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloud_core::ranges::RangeSet;
use flywheel_shared::ids::{DeviceId, Digest};
use flywheel_shared::message::{
    Ack, Attest, Chunk, Desired, Down, Fetch, Health, Hello, MAX_RANGES, Ranges, Refused,
    RefusedCode, SlotReport, SlotSeen, Up, Welcome,
};
use flywheel_shared::trust::{self, Role};
use flywheel_shared::{MAX_CHUNK, MAX_MESSAGE, WIRE_VERSION, envelope, message};
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;

pub use wire::{
    Attested, OfferBytes, OwnedBook, OwnedHealth, OwnedSlotReport, Transport, digest_text,
};

use crate::fleet::{Fleet, FleetError};
use crate::store::{Commit, Store, StoreError, Traffic};
use wire::{envelope_of, root_envelope};

/// Gives Unix milliseconds.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// What the cloud wants of devices. All of it is called off the async threads and may block.
pub trait Steering: Send + Sync {
    /// The frame before which the device's replayed source halts; `u64::MAX` never halts it.
    fn desired(&self, device: &DeviceId) -> u64;

    /// An offer to answer a health message with.
    fn offer(&self, device: &DeviceId, health: &OwnedHealth) -> Option<OfferBytes>;

    /// A device says what became of a model. It is stored already, and comes again until the
    /// device has heard that this returned `Ok`, so it must not matter how often it comes.
    fn slot(&self, device: &DeviceId, report: &OwnedSlotReport) -> Result<(), StoreError>;

    /// What a device asked for: trust roots above its own, and the time. `None` if they can't be
    /// had now; the device asks again.
    fn attest(&self, device: &DeviceId, attest: &Attest, now_ms: u64) -> Option<Attested>;

    /// Whether a blob is a part of a published model, which any device may fetch.
    fn may_fetch(&self, blob: &Digest) -> bool;
}

/// The way to a connected device.
pub trait Outlet: Send + Sync {
    /// Sends an envelope without waiting; false if it can't be taken now.
    fn send(&self, device: &DeviceId, envelope: Vec<u8>) -> bool;

    /// Ends the connection, where it is one.
    fn close(&self, device: &DeviceId, why: &str);
}

struct Link {
    number: u64,
    transport: Transport,
    outlet: Arc<dyn Outlet>,
}

#[derive(Default)]
struct Links {
    next: u64,
    devices: BTreeMap<DeviceId, Link>,
    /// The way to every device that talks by the broker.
    broker: Option<Arc<dyn Outlet>>,
}

/// Ingest and the way back.
pub struct Ingest {
    store: Arc<Store>,
    fleet: Arc<Fleet>,
    steering: Arc<dyn Steering>,
    clock: Clock,
    links: Mutex<Links>,
}

/// How long a refused device waits before it tries again, in milliseconds.
fn patience(code: RefusedCode) -> u32 {
    match code {
        RefusedCode::Storage => 2_000,
        RefusedCode::NotFound => 5_000,
        RefusedCode::Malformed => 10_000,
        RefusedCode::Identity | RefusedCode::Signature => 60_000,
        RefusedCode::WireVersion => 600_000,
    }
}

/// Answers to one message, or why it was not taken.
type Answers = Result<Vec<Vec<u8>>, RefusedCode>;

impl Ingest {
    /// Brings the parts together.
    pub fn new(
        store: Arc<Store>,
        fleet: Arc<Fleet>,
        steering: Arc<dyn Steering>,
        clock: Clock,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            fleet,
            steering,
            clock,
            links: Mutex::default(),
        })
    }

    /// The devices.
    pub fn fleet(&self) -> &Arc<Fleet> {
        &self.fleet
    }

    /// Takes one message of a device, whose id the transport has authenticated, and returns the
    /// envelopes to answer with. What they acknowledge is durable. Messages of one device must be
    /// handed over one after the other, in their order.
    pub async fn handle(
        self: &Arc<Self>,
        device: &DeviceId,
        transport: Transport,
        bytes: &[u8],
    ) -> Vec<Vec<u8>> {
        let answers = match self.fleet.key(device) {
            None => Err(RefusedCode::Identity),
            Some(key) => {
                self.fleet.seen(device, (self.clock)());
                let answers = self.take(device, &key, transport, bytes).await;
                let traffic = Traffic {
                    bytes_up: bytes.len() as u64,
                    messages: 1,
                    batches: 0,
                    refused: u64::from(answers.is_err()),
                };
                self.store.count(device, &traffic);
                answers
            }
        };
        answers.unwrap_or_else(|code| {
            tracing::debug!(%device, ?code, "refused a message");
            vec![refusal(code)]
        })
    }

    async fn take(
        self: &Arc<Self>,
        device: &DeviceId,
        key: &[u8; 32],
        transport: Transport,
        bytes: &[u8],
    ) -> Answers {
        let malformed = RefusedCode::Malformed;
        let (payload, rest) = envelope::split(bytes, MAX_MESSAGE).map_err(|_| malformed)?;
        let (up, trailing) = postcard::take_from_bytes(payload).map_err(|_| malformed)?;
        if !rest.is_empty() || !trailing.is_empty() {
            return Err(malformed);
        }
        if transport == Transport::Mqtt {
            self.attach_by_broker(device, matches!(up, Up::Hello(_)));
        }
        match up {
            Up::Hello(hello) => self.hello(device, &hello),
            Up::Batch(batch) => self.batch(device, key, &batch).await,
            Up::Health(health) => self.health(device, &health).await,
            Up::Slot(report) => self.slot(device, &report).await,
            Up::Fetch(fetch) => self.fetch(fetch).await,
            Up::Attest(attest) => self.attest(device, attest).await,
        }
    }

    fn hello(&self, device: &DeviceId, hello: &Hello) -> Answers {
        if hello.device != *device {
            return Err(RefusedCode::Identity);
        }
        if hello.wire_version != WIRE_VERSION {
            return Err(RefusedCode::WireVersion);
        }
        let welcome = Welcome {
            wire_version: WIRE_VERSION,
            now_ms: (self.clock)(),
        };
        Ok(vec![envelope_of(&Down::Welcome(welcome))])
    }

    async fn batch(
        &self,
        device: &DeviceId,
        key: &[u8; 32],
        batch: &message::Batch<'_>,
    ) -> Answers {
        let digest = trust::batch_digest(device, batch.epoch, batch.count, batch.records);
        trust::check(Role::Device, key, &digest, batch.signature)
            .map_err(|_| RefusedCode::Signature)?;
        let bytes = postcard::to_extend(batch, Vec::new()).map_err(|_| RefusedCode::Malformed)?;
        let commit = Commit::new(device, (self.clock)(), &bytes).map_err(|error| {
            tracing::warn!(%device, %error, "a signed batch is not valid");
            RefusedCode::Malformed
        })?;
        let (epoch, numbers) = (commit.epoch(), commit.numbers().to_vec());
        let (done, outcome) = oneshot::channel();
        self.store.commit(commit, move |result| {
            // If nobody waits any more, the device asks again.
            let _ = done.send(result);
        });
        outcome
            .await
            .unwrap_or(Err(StoreError::Closed))
            .map_err(|error| storage(device, &error))?;
        let batches = Traffic {
            batches: 1,
            ..Traffic::default()
        };
        self.store.count(device, &batches);
        Ok(acks(epoch, &numbers))
    }

    async fn health(self: &Arc<Self>, device: &DeviceId, health: &Health<'_>) -> Answers {
        let health = OwnedHealth::from(health);
        let (this, device) = (self.clone(), device.clone());
        blocking(move || {
            this.fleet
                .store_health(&device, &health, (this.clock)())
                .map_err(|error| storage(&device, &error))?;
            let desired = Desired {
                run_until: this.steering.desired(&device),
                health_at_ms: health.at_ms,
            };
            let mut answers = vec![envelope_of(&Down::Desired(desired))];
            if let Some(offer) = this.steering.offer(&device, &health) {
                answers.push(envelope_of(&offer.message()));
            }
            Ok(answers)
        })
        .await
    }

    async fn slot(self: &Arc<Self>, device: &DeviceId, report: &SlotReport<'_>) -> Answers {
        let report = OwnedSlotReport::from(report);
        let (this, device) = (self.clone(), device.clone());
        blocking(move || {
            this.fleet
                .store_slot(&device, &report, (this.clock)())
                .and_then(|()| this.steering.slot(&device, &report))
                .map_err(|error| storage(&device, &error))?;
            let seen = SlotSeen {
                manifest: report.manifest,
                state: report.state,
            };
            Ok(vec![envelope_of(&Down::SlotSeen(seen))])
        })
        .await
    }

    async fn attest(self: &Arc<Self>, device: &DeviceId, attest: Attest) -> Answers {
        let (this, device) = (self.clone(), device.clone());
        blocking(move || {
            let now_ms = (this.clock)();
            let attested = this.steering.attest(&device, &attest, now_ms);
            attested
                .map(|attested| attested.envelopes())
                .ok_or(RefusedCode::Storage)
        })
        .await
    }

    async fn fetch(self: &Arc<Self>, fetch: Fetch) -> Answers {
        let this = self.clone();
        blocking(move || {
            let Fetch {
                digest,
                offset,
                len,
            } = fetch;
            if !this.steering.may_fetch(&digest) {
                return Err(RefusedCode::NotFound);
            }
            let len = usize::try_from(len).unwrap_or(MAX_CHUNK).min(MAX_CHUNK);
            match this.store.blobs().read_at(&digest, offset, len) {
                Ok(Some(bytes)) => {
                    let chunk = Chunk {
                        digest,
                        offset,
                        bytes: &bytes,
                    };
                    Ok(vec![envelope_of(&Down::Chunk(chunk))])
                }
                Ok(None) => Err(RefusedCode::NotFound),
                Err(error) => {
                    tracing::error!(%error, "a model part can't be read");
                    Err(RefusedCode::Storage)
                }
            }
        })
        .await
    }

    /// Sends a message to a device at once. False if it is not connected or can't keep up; the
    /// state is then repeated in the answer to its next health message.
    pub fn push(&self, device: &DeviceId, message: &Down<'_>) -> bool {
        self.outlet(device)
            .is_some_and(|outlet| outlet.send(device, envelope_of(message)))
    }

    fn outlet(&self, device: &DeviceId) -> Option<Arc<dyn Outlet>> {
        let links = self.links();
        links.devices.get(device).map(|link| link.outlet.clone())
    }

    /// Tells a device at once until where it runs; see [`Ingest::push`].
    pub fn push_desired(&self, device: &DeviceId, run_until: u64) -> bool {
        let health = self.fleet.health(device).ok().flatten();
        let desired = Desired {
            run_until,
            health_at_ms: health.map_or(0, |stored| stored.health.at_ms),
        };
        self.push(device, &Down::Desired(desired))
    }

    /// Gives a device a newer trust root at once; see [`Ingest::push`]. One that does not hear it
    /// asks on its next connection.
    pub fn push_root(&self, device: &DeviceId, root: &[u8]) -> bool {
        let outlet = self.outlet(device);
        let envelope = root_envelope(root);
        outlet
            .zip(envelope)
            .is_some_and(|(outlet, envelope)| outlet.send(device, envelope))
    }

    /// Offers a model to a device at once; see [`Ingest::push`].
    pub fn push_offer(&self, device: &DeviceId, offer: &OfferBytes) -> bool {
        self.push(device, &offer.message())
    }

    /// Shuts a device out for ever and ends its connection.
    pub fn revoke(&self, device: &DeviceId) -> Result<(), FleetError> {
        self.fleet.revoke(device, (self.clock)())?;
        let link = self.links().devices.remove(device);
        if let Some(link) = link {
            link.outlet.send(device, refusal(RefusedCode::Identity));
            link.outlet.close(device, "revoked");
        }
        self.fleet.set_connected(device, None);
        Ok(())
    }

    /// Makes `outlet` the way to a device, ending an older connection; returns the number to
    /// detach it with.
    fn attach(&self, device: &DeviceId, transport: Transport, outlet: Arc<dyn Outlet>) -> u64 {
        let mut links = self.links();
        links.next += 1;
        let number = links.next;
        let link = Link {
            number,
            transport,
            outlet,
        };
        let old = links.devices.insert(device.clone(), link);
        self.fleet.set_connected(device, Some(transport));
        drop(links);
        if let Some(old) = old {
            old.outlet.close(device, "replaced by a newer connection");
        }
        number
    }

    /// A device that is heard by the broker is reached by it, unless it has a direct connection:
    /// that one gives way only when the device says hello, since what arrives otherwise may be
    /// older.
    fn attach_by_broker(&self, device: &DeviceId, hello: bool) {
        let links = self.links();
        let linked = links.devices.get(device).map(|link| link.transport);
        let outlet = match linked {
            Some(Transport::Mqtt) => None,
            Some(Transport::Quic) if !hello => None,
            _ => links.broker.clone(),
        };
        drop(links);
        if let Some(outlet) = outlet {
            self.attach(device, Transport::Mqtt, outlet);
        }
    }

    /// Forgets a connection, unless a newer one has taken its place.
    fn detach(&self, device: &DeviceId, number: u64) {
        let mut links = self.links();
        if links
            .devices
            .get(device)
            .is_some_and(|link| link.number == number)
        {
            links.devices.remove(device);
            self.fleet.set_connected(device, None);
        }
    }

    /// Sets the way to devices that talk by the broker; `None` when it is gone, and they with it.
    fn set_broker(&self, outlet: Option<Arc<dyn Outlet>>) {
        let mut links = self.links();
        if outlet.is_none() {
            links.devices.retain(|device, link| {
                let stays = link.transport != Transport::Mqtt;
                if !stays {
                    self.fleet.set_connected(device, None);
                }
                stays
            });
        }
        links.broker = outlet;
    }

    /// Counts devices that talk by the broker as gone if they were silent for `silence_ms`: the
    /// broker does not tell. Their next message brings them back.
    fn expire(&self, silence_ms: u64) {
        let since = (self.clock)().saturating_sub(silence_ms);
        self.links().devices.retain(|device, link| {
            let heard = self.fleet.last_seen(device) >= Some(since);
            let stays = link.transport != Transport::Mqtt || heard;
            if !stays {
                self.fleet.set_connected(device, None);
            }
            stays
        });
    }

    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn blocking(f: impl FnOnce() -> Answers + Send + 'static) -> Answers {
    spawn_blocking(f).await.unwrap_or_else(|error| {
        tracing::error!(%error, "answering a message failed");
        Err(RefusedCode::Storage)
    })
}

fn storage(device: &DeviceId, error: &StoreError) -> RefusedCode {
    tracing::error!(%device, %error, "a message could not be stored; the device will repeat it");
    RefusedCode::Storage
}

fn refusal(code: RefusedCode) -> Vec<u8> {
    envelope_of(&Down::Refused(Refused {
        code,
        retry_after_ms: patience(code),
    }))
}

/// Acknowledgements of `numbers`: one message, or several if they are too scattered for one.
fn acks(epoch: u32, numbers: &[u32]) -> Vec<Vec<u8>> {
    let all: RangeSet = numbers.iter().copied().collect();
    let pieces = all.ranges().chunks(MAX_RANGES).map(|piece| {
        // A piece has at most as many ranges as fit.
        let ranges = Ranges::from_slice(piece).unwrap_or_default();
        envelope_of(&Down::Ack(Ack { epoch, ranges }))
    });
    pieces.collect()
}
