//! Which devices there are, what they last said, and whether their books balance.
//!
//! A device comes in by a one-time token and stays under its id for ever: ids are never given out
//! again, because sample numbers are counted per id, and a second device starting over at 1 would
//! have its samples taken for repetitions.

mod error;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use cloud_core::audit::{self, Ledger};
use cloud_core::ranges::RangeSet;
use cloud_core::rollout;
use flywheel_shared::ids::{DEVICE_ID_MAX, DeviceId, Digest};
use serde::{Deserialize, Serialize};

pub use error::FleetError;

use crate::ingest::{OwnedBook, OwnedHealth, OwnedSlotReport, Transport};
use crate::pki::Pki;
use crate::store::{Batch, Store, StoreError, Traffic};

const DEVICES: &str = "devices";
const TOKENS: &str = "tokens";
const HEALTH: &str = "health";
const SLOTS: &str = "slots";
const BOOKS: &str = "books";
/// Longest prefix of a grant: what is made up behind it has 12 characters.
const MAX_PREFIX: usize = DEVICE_ID_MAX - 12;

/// What an enrolment token allows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The group the device joins.
    pub group: String,
    /// Only this id.
    pub device: Option<DeviceId>,
    /// Only ids that begin so.
    pub prefix: Option<String>,
    /// When it ends, Unix milliseconds.
    pub expires_ms: u64,
}

/// A token as it is stored, under the digest of its text.
#[derive(Serialize, Deserialize)]
struct StoredToken {
    grant: Grant,
    used_by: Option<DeviceId>,
}

/// A device that was let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its id.
    pub device: DeviceId,
    /// Its group, for rollouts.
    pub group: String,
    /// What the operator tagged it with, for rollouts.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// When it was enrolled, Unix milliseconds.
    pub enrolled_at_ms: u64,
    /// When it was shut out, Unix milliseconds.
    pub revoked_at_ms: Option<u64>,
    /// The ed25519 key that signs its batches.
    #[serde(with = "hex_text")]
    pub public_key: [u8; 32],
}

/// What a device gets at enrolment.
#[derive(Clone, Debug)]
pub struct Enrolled {
    /// Its id.
    pub device: DeviceId,
    /// Its certificate, PEM.
    pub certificate_pem: String,
    /// The root to trust, PEM.
    pub ca_pem: String,
}

/// The last health message of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredHealth {
    /// When it came, Unix milliseconds.
    pub received_ms: u64,
    /// What it said.
    pub health: OwnedHealth,
}

/// The last report of a device about one model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredSlot {
    /// When it came, Unix milliseconds.
    pub received_ms: u64,
    /// What it said.
    pub report: OwnedSlotReport,
}

/// All about one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceView {
    /// Who it is.
    pub record: DeviceRecord,
    /// Its last health message.
    pub health: Option<StoredHealth>,
    /// Its last report about each model.
    pub slots: Vec<StoredSlot>,
    /// How it is connected now, if it is.
    pub connected: Option<Transport>,
    /// When it was last heard, Unix milliseconds.
    pub last_seen_ms: Option<u64>,
    /// What came from it.
    pub traffic: Traffic,
}

#[derive(Clone, Copy, Default)]
struct Presence {
    connected: Option<Transport>,
    last_seen_ms: Option<u64>,
}

/// What rollouts look at of a device's last health message.
#[derive(Clone)]
struct Facts {
    received_ms: u64,
    hardware: String,
    engine: String,
    sequence: u64,
    epoch: u32,
    skipped: u64,
}

impl Facts {
    fn of(received_ms: u64, health: &OwnedHealth) -> Self {
        Self {
            received_ms,
            hardware: health.hardware.clone(),
            engine: health.engine.clone(),
            sequence: health.sequence,
            epoch: health.epoch,
            skipped: health.skipped,
        }
    }
}

/// The devices.
pub struct Fleet {
    store: Arc<Store>,
    pki: Arc<Pki>,
    records: RwLock<BTreeMap<DeviceId, DeviceRecord>>,
    presence: Mutex<BTreeMap<DeviceId, Presence>>,
    /// As stored, so that a look at the whole fleet reads nothing.
    facts: Mutex<BTreeMap<DeviceId, Facts>>,
    /// Held while enrolling and revoking, so that a token is used once.
    changing: Mutex<()>,
}

impl Fleet {
    /// Reads the devices from the store.
    pub fn open(store: Arc<Store>, pki: Arc<Pki>) -> Result<Arc<Self>, FleetError> {
        let records = store.scan::<DeviceRecord>(DEVICES, b"")?;
        let records = records
            .into_iter()
            .map(|(_, record)| (record.device.clone(), record));
        let healths = store.scan::<StoredHealth>(HEALTH, b"")?;
        let facts = healths.into_iter().filter_map(|(device, stored)| {
            let device = String::from_utf8(device).ok()?.parse().ok()?;
            Some((device, Facts::of(stored.received_ms, &stored.health)))
        });
        Ok(Arc::new(Self {
            facts: Mutex::new(facts.collect()),
            records: RwLock::new(records.collect()),
            presence: Mutex::default(),
            changing: Mutex::default(),
            store,
            pki,
        }))
    }

    /// Makes a token that lets one device in. Only its digest is stored, so it can't be shown
    /// again.
    pub fn mint_token(&self, grant: &Grant) -> Result<String, FleetError> {
        if let Some(prefix) = &grant.prefix {
            parse_id(prefix)?;
            if prefix.len() > MAX_PREFIX {
                return Err(FleetError::NotAllowed {
                    id: prefix.clone(),
                    why: format!("a prefix has at most {MAX_PREFIX} characters"),
                });
            }
        }
        let token = random_hex::<16>()?;
        let stored = StoredToken {
            grant: grant.clone(),
            used_by: None,
        };
        self.store.put(TOKENS, &token_key(&token), &stored)?;
        Ok(token)
    }

    /// Lets a device in: `csr_pem` proves its key, `wanted` is the id it would like. The same key
    /// may use its token again until that ends, in case it never heard the answer.
    pub fn enroll(
        &self,
        token: &str,
        csr_pem: &str,
        wanted: Option<&str>,
        now_ms: u64,
    ) -> Result<Enrolled, FleetError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let key = token_key(token);
        let stored: StoredToken = self
            .store
            .get(TOKENS, &key)?
            .ok_or(FleetError::UnknownToken)?;
        if now_ms > stored.grant.expires_ms {
            return Err(FleetError::ExpiredToken);
        }
        if let Some(device) = stored.used_by {
            let issued = self.pki.issue(csr_pem, &device, now_ms)?;
            if self.key(&device) != Some(issued.public_key) {
                return Err(FleetError::UsedToken(device));
            }
            return Ok(self.enrolled(device, issued.certificate_pem));
        }
        let device = choose_id(&stored.grant, wanted)?;
        if self.record(&device).is_some() {
            return Err(FleetError::Taken(device));
        }
        let issued = self.pki.issue(csr_pem, &device, now_ms)?;
        let record = DeviceRecord {
            device: device.clone(),
            group: stored.grant.group.clone(),
            labels: BTreeMap::new(),
            enrolled_at_ms: now_ms,
            revoked_at_ms: None,
            public_key: issued.public_key,
        };
        let used = StoredToken {
            used_by: Some(device.clone()),
            ..stored
        };
        let mut batch = Batch::new();
        batch.put(DEVICES, device.as_str().as_bytes(), &record)?;
        batch.put(TOKENS, &key, &used)?;
        self.store.write(batch)?;
        self.remember(record);
        Ok(self.enrolled(device, issued.certificate_pem))
    }

    /// Shuts a device out for ever. [`crate::ingest::Ingest::revoke`] also ends its connection.
    pub fn revoke(&self, device: &DeviceId, now_ms: u64) -> Result<(), FleetError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = self
            .record(device)
            .ok_or_else(|| FleetError::UnknownDevice(device.clone()))?;
        if record.revoked_at_ms.is_none() {
            record.revoked_at_ms = Some(now_ms);
            self.store
                .put(DEVICES, device.as_str().as_bytes(), &record)?;
            self.remember(record);
        }
        Ok(())
    }

    /// Who a device is; revoked ones too.
    pub fn record(&self, device: &DeviceId) -> Option<DeviceRecord> {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records.get(device).cloned()
    }

    /// All devices in the order of their ids; revoked ones too.
    pub fn records(&self) -> Vec<DeviceRecord> {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records.values().cloned().collect()
    }

    /// The key that signs a device's batches; `None` for one that is unknown or revoked.
    pub fn key(&self, device: &DeviceId) -> Option<[u8; 32]> {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        let record = records.get(device)?;
        record.revoked_at_ms.is_none().then_some(record.public_key)
    }

    /// All about every device.
    pub fn list(&self) -> Result<Vec<DeviceView>, FleetError> {
        self.records()
            .into_iter()
            .map(|record| self.view(record))
            .collect()
    }

    /// All about one device.
    pub fn show(&self, device: &DeviceId) -> Result<Option<DeviceView>, FleetError> {
        self.record(device)
            .map(|record| self.view(record))
            .transpose()
    }

    /// The last health message of a device.
    pub fn health(&self, device: &DeviceId) -> Result<Option<StoredHealth>, StoreError> {
        self.store.get(HEALTH, device.as_str().as_bytes())
    }

    /// The last report of a device about each model.
    pub fn slots(&self, device: &DeviceId) -> Result<Vec<StoredSlot>, StoreError> {
        let found = self.store.scan(SLOTS, &keyed(device, &[]))?;
        Ok(found.into_iter().map(|(_, slot)| slot).collect())
    }

    /// Keeps a health message, and durably the books of epochs that are over: once they are
    /// acknowledged the device forgets them, while the rest comes again with the next message.
    pub fn store_health(
        &self,
        device: &DeviceId,
        health: &OwnedHealth,
        now_ms: u64,
    ) -> Result<(), StoreError> {
        let stored = StoredHealth {
            received_ms: now_ms,
            health: health.clone(),
        };
        let (mut notes, mut closed) = (Batch::new(), Batch::new());
        notes.put(HEALTH, device.as_str().as_bytes(), &stored)?;
        for book in health
            .books
            .iter()
            .filter(|book| book.epoch != health.epoch)
        {
            let key = keyed(device, &book.epoch.to_be_bytes());
            if self.store.get(BOOKS, &key)?.as_ref() != Some(book) {
                closed.put(BOOKS, &key, book)?;
            }
        }
        self.store.write(closed)?;
        self.store.note(notes)?;
        let mut facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        facts.insert(device.clone(), Facts::of(now_ms, health));
        Ok(())
    }

    /// The devices that rollouts may go to, in the order of their ids: all but revoked ones.
    pub fn inventory(&self, now_ms: u64) -> Vec<rollout::Device> {
        let records = self.records();
        let there = records.into_iter().filter(|r| r.revoked_at_ms.is_none());
        let facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        let presence = self.lock_presence();
        there
            .map(|record| {
                let facts = facts.get(&record.device);
                let presence = presence.get(&record.device).copied().unwrap_or_default();
                let heard_ms = facts.map(|facts| facts.received_ms);
                let heard_ms = presence.last_seen_ms.max(heard_ms);
                let heard_ms = heard_ms.unwrap_or(record.enrolled_at_ms);
                rollout::Device {
                    id: record.device.to_string(),
                    group: record.group,
                    labels: record.labels,
                    hardware: facts.map(|f| f.hardware.clone()).unwrap_or_default(),
                    engine: facts.map(|f| f.engine.clone()).unwrap_or_default(),
                    sequence: facts.map_or(0, |f| f.sequence),
                    online: presence.connected.is_some(),
                    silent_ms: now_ms.saturating_sub(heard_ms),
                    restarts: facts.map_or(0, |f| f.epoch),
                    skipped: facts.map_or(0, |f| f.skipped),
                }
            })
            .collect()
    }

    /// Sets and takes off labels of a device, and moves it to another group if one is named.
    pub fn tag(
        &self,
        device: &DeviceId,
        set: &BTreeMap<String, String>,
        remove: &[String],
        group: Option<&str>,
    ) -> Result<(), FleetError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = self
            .record(device)
            .ok_or_else(|| FleetError::UnknownDevice(device.clone()))?;
        let words = set.iter().flat_map(|(key, value)| [key.as_str(), value]);
        if let Some(bad) = words.chain(group).find(|word| !is_label(word)) {
            return Err(FleetError::Label(bad.chars().take(80).collect()));
        }
        for key in remove {
            record.labels.remove(key);
        }
        record.labels.extend(set.clone());
        if let Some(group) = group {
            record.group = group.to_owned();
        }
        self.store
            .put(DEVICES, device.as_str().as_bytes(), &record)?;
        self.remember(record);
        Ok(())
    }

    /// Keeps a report about a model, durably.
    pub fn store_slot(
        &self,
        device: &DeviceId,
        report: &OwnedSlotReport,
        now_ms: u64,
    ) -> Result<(), StoreError> {
        let stored = StoredSlot {
            received_ms: now_ms,
            report: report.clone(),
        };
        let key = keyed(device, &report.manifest.0);
        self.store.put(SLOTS, &key, &stored)
    }

    /// Notes that a device was heard.
    pub fn seen(&self, device: &DeviceId, now_ms: u64) {
        self.lock_presence()
            .entry(device.clone())
            .or_default()
            .last_seen_ms = Some(now_ms);
    }

    /// When a device was last heard since the server started, Unix milliseconds.
    pub fn last_seen(&self, device: &DeviceId) -> Option<u64> {
        self.lock_presence().get(device)?.last_seen_ms
    }

    /// Notes how a device is connected, or that it is not any more.
    pub fn set_connected(&self, device: &DeviceId, connected: Option<Transport>) {
        self.lock_presence()
            .entry(device.clone())
            .or_default()
            .connected = connected;
    }

    /// Checks the conservation law over the fleet.
    pub fn audit(&self) -> Result<audit::Report, FleetError> {
        Ok(audit::audit(&self.ledgers()?))
    }

    /// What is known about each (device, epoch): the device's last book, and what was ingested and
    /// lost.
    pub fn ledgers(&self) -> Result<Vec<Ledger>, FleetError> {
        // The books first: what they call acknowledged is then in what is read after them.
        let name = |key: &[u8]| {
            let device = key.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(device).into_owned()
        };
        let open = self.store.scan::<StoredHealth>(HEALTH, b"")?;
        let open = open.into_iter().flat_map(|(key, stored)| {
            let epoch = stored.health.epoch;
            let books = stored.health.books.into_iter();
            let current = books.filter(move |book| book.epoch == epoch);
            current.map(move |book| (name(&key), book))
        });
        let closed = self.store.scan::<OwnedBook>(BOOKS, b"")?;
        let closed = closed.into_iter().map(|(key, book)| (name(&key), book));
        let all = open.chain(closed).map(|(device, book)| {
            let ledger = Ledger {
                device: device.clone(),
                epoch: book.epoch,
                flagged: book.flagged,
                acked: book.acked,
                spooled: book.spooled,
                ..Ledger::default()
            };
            ((device, book.epoch), ledger)
        });
        let mut all: BTreeMap<_, _> = all.collect();
        for known in self.store.ledgers()? {
            let key = (known.device.clone(), known.epoch);
            let ledger = all.entry(key).or_insert_with(|| Ledger {
                device: known.device.clone(),
                epoch: known.epoch,
                ..Ledger::default()
            });
            ledger.ingested = known.ingested;
            ledger.lost = known.lost;
            read_ahead(ledger);
        }
        Ok(all.into_values().collect())
    }

    fn view(&self, record: DeviceRecord) -> Result<DeviceView, FleetError> {
        let device = &record.device;
        let presence = self
            .lock_presence()
            .get(device)
            .copied()
            .unwrap_or_default();
        let health = self.health(device)?;
        let heard_ms = health.as_ref().map(|health| health.received_ms);
        Ok(DeviceView {
            slots: self.slots(device)?,
            connected: presence.connected,
            last_seen_ms: presence.last_seen_ms.max(heard_ms),
            traffic: self.store.traffic(device)?,
            health,
            record,
        })
    }

    fn enrolled(&self, device: DeviceId, certificate_pem: String) -> Enrolled {
        Enrolled {
            device,
            certificate_pem,
            ca_pem: self.pki.ca_pem().to_owned(),
        }
    }

    fn remember(&self, record: DeviceRecord) {
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        records.insert(record.device.clone(), record);
    }

    fn lock_presence(&self) -> MutexGuard<'_, BTreeMap<DeviceId, Presence>> {
        self.presence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Samples may be ahead of the device's last book. Numbers are gapless, so every number up to the
/// greatest that was seen was given out; those that neither came nor stand in the book are held by
/// the device, until its next book says otherwise.
fn read_ahead(ledger: &mut Ledger) {
    let settled = ledger
        .lost
        .values()
        .fold(ledger.ingested.clone(), |all, lost| all.union(lost));
    let Some(last) = settled.last().filter(|last| *last > ledger.flagged) else {
        return;
    };
    let ahead = RangeSet::from_range(ledger.flagged + 1..=last).difference(&settled);
    ledger.spooled = ledger.spooled.union(&ahead);
    ledger.flagged = last;
}

fn choose_id(grant: &Grant, wanted: Option<&str>) -> Result<DeviceId, FleetError> {
    let wanted = wanted.map(parse_id).transpose()?;
    let not_allowed = |id: &DeviceId, why: String| FleetError::NotAllowed {
        id: id.as_str().to_owned(),
        why,
    };
    match (&grant.device, wanted) {
        (Some(only), Some(wanted)) if *only != wanted => {
            Err(not_allowed(&wanted, format!("it is for {only}")))
        }
        (Some(only), _) => Ok(only.clone()),
        (None, Some(wanted)) => match &grant.prefix {
            Some(prefix) if !wanted.as_str().starts_with(prefix) => Err(not_allowed(
                &wanted,
                format!("ids must begin with {prefix}"),
            )),
            _ => Ok(wanted),
        },
        (None, None) => {
            let prefix = grant.prefix.as_deref().unwrap_or("dev");
            parse_id(&format!("{prefix}{}", random_hex::<6>()?))
        }
    }
}

/// What a selector of devices can name.
fn is_label(word: &str) -> bool {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ' ');
    (1..=64).contains(&word.len()) && word.trim() == word && word.chars().all(plain)
}

fn parse_id(text: &str) -> Result<DeviceId, FleetError> {
    text.parse().map_err(|why| FleetError::BadId {
        id: text.chars().take(80).collect(),
        why,
    })
}

fn token_key(token: &str) -> [u8; 32] {
    Digest::of(token.trim().as_bytes()).0
}

fn keyed(device: &DeviceId, rest: &[u8]) -> Vec<u8> {
    let mut key = device.as_str().as_bytes().to_vec();
    key.push(0);
    key.extend_from_slice(rest);
    key
}

fn random_hex<const N: usize>() -> Result<String, FleetError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| FleetError::Random(error.to_string()))?;
    Ok(hex::encode(bytes))
}

/// A key as hexadecimal text, for JSON that people read.
mod hex_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    pub fn serialize<S: Serializer>(key: &[u8; 32], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&hex::encode(key))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 32], D::Error> {
        let mut key = [0; 32];
        hex::decode_to_slice(String::deserialize(from)?, &mut key).map_err(D::Error::custom)?;
        Ok(key)
    }
}

#[cfg(test)]
mod tests;
