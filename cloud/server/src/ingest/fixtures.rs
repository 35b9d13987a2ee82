//! A small cloud and enrolled devices, for tests.

use super::*;
use crate::fleet::Grant;
use crate::pki::Pki;
use crate::store::disk::Disk;
use crate::store::disk::faulty::{Faults, FaultyDisk};
use crate::store::fixtures::signed;
use ed25519_dalek::SigningKey;
use flywheel_shared::message::Record;
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use tempfile::TempDir;

pub(super) const NOW: u64 = 1_800_000_000_000;

#[derive(Default)]
pub(super) struct Wishes {
    pub(super) run_until: AtomicU64,
    pub(super) slots: Mutex<Vec<(DeviceId, OwnedSlotReport)>>,
    pub(super) slot_fails: AtomicBool,
    pub(super) offer: Mutex<Option<OfferBytes>>,
    pub(super) published: Mutex<Vec<Digest>>,
    pub(super) roots: Mutex<Vec<Vec<u8>>>,
}

impl Steering for Wishes {
    fn desired(&self, _device: &DeviceId) -> u64 {
        self.run_until.load(SeqCst)
    }

    fn offer(&self, _device: &DeviceId, _health: &OwnedHealth) -> Option<OfferBytes> {
        self.offer.lock().unwrap().clone()
    }

    fn slot(&self, device: &DeviceId, report: &OwnedSlotReport) -> Result<(), StoreError> {
        if self.slot_fails.load(SeqCst) {
            return Err(StoreError::Closed);
        }
        self.slots
            .lock()
            .unwrap()
            .push((device.clone(), report.clone()));
        Ok(())
    }

    fn attest(&self, device: &DeviceId, attest: &Attest, _now_ms: u64) -> Option<Attested> {
        Some(Attested {
            roots: self.roots.lock().unwrap().clone(),
            time: format!("{device} {} {}", attest.nonce, attest.root_version).into_bytes(),
            time_signature: [7; 64],
        })
    }

    fn may_fetch(&self, blob: &Digest) -> bool {
        self.published.lock().unwrap().contains(blob)
    }
}

/// An enrolled device: what its identity folder holds.
pub(super) struct Identity {
    pub(super) id: DeviceId,
    pub(super) key: SigningKey,
    pub(super) key_pem: String,
    pub(super) certificate_pem: String,
}

pub(super) struct World {
    pub(super) dir: TempDir,
    pub(super) faults: Arc<Faults>,
    pub(super) store: Arc<Store>,
    pub(super) pki: Arc<Pki>,
    pub(super) wishes: Arc<Wishes>,
    pub(super) now_ms: Arc<AtomicU64>,
    pub(super) ingest: Arc<Ingest>,
}

impl World {
    pub(super) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let faults = Faults::none();
        let disk: Arc<dyn Disk> = Arc::new(FaultyDisk(faults.clone()));
        let store = Store::open_on(disk, dir.path()).unwrap();
        // TLS clients compare with the real clock.
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_millis() as u64;
        let pki = Arc::new(Pki::open(&dir.path().join("pki"), &[], now).unwrap());
        let fleet = Fleet::open(store.clone(), pki.clone()).unwrap();
        let wishes = Arc::new(Wishes::default());
        let now_ms = Arc::new(AtomicU64::new(NOW));
        let clock = now_ms.clone();
        let clock: Clock = Arc::new(move || clock.load(SeqCst));
        let ingest = Ingest::new(store.clone(), fleet, wishes.clone(), clock);
        Self {
            dir,
            faults,
            store,
            pki,
            wishes,
            now_ms,
            ingest,
        }
    }

    pub(super) fn enroll(&self, id: &str) -> Identity {
        let grant = Grant {
            expires_ms: u64::MAX,
            ..Grant::default()
        };
        let token = self.ingest.fleet().mint_token(&grant).unwrap();
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let csr = CertificateParams::default()
            .serialize_request(&key)
            .unwrap();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_millis() as u64;
        let enrolled = self
            .ingest
            .fleet()
            .enroll(&token, &csr.pem().unwrap(), Some(id), now)
            .unwrap();
        // PKCS#8 holds the seed after `04 22 04 20`.
        let der = key.serialize_der();
        let at = der
            .windows(4)
            .position(|w| w == [4, 0x22, 4, 0x20])
            .unwrap()
            + 4;
        let seed: [u8; 32] = der[at..at + 32].try_into().unwrap();
        let signing = SigningKey::from_bytes(&seed);
        assert_eq!(signing.verifying_key().as_bytes(), key.public_key_raw());
        Identity {
            id: enrolled.device,
            key: signing,
            key_pem: key.serialize_pem(),
            certificate_pem: enrolled.certificate_pem,
        }
    }
}

pub(super) fn up(message: &Up<'_>) -> Vec<u8> {
    let payload = postcard::to_extend(message, Vec::new()).unwrap();
    let mut bytes = Vec::from(envelope::header(&payload));
    bytes.extend(payload);
    bytes
}

pub(super) fn hello(id: &DeviceId) -> Vec<u8> {
    up(&Up::Hello(Hello {
        device: id.clone(),
        wire_version: WIRE_VERSION,
        epoch: 1,
    }))
}

pub(super) fn batch(device: &Identity, epoch: u32, records: &[Record<'_>]) -> Vec<u8> {
    signed(&device.id, &device.key, epoch, records, |batch| {
        up(&Up::Batch(batch))
    })
}

pub(super) fn with_down<R>(bytes: &[u8], look: impl FnOnce(Down<'_>) -> R) -> R {
    let (payload, rest) = envelope::split(bytes, MAX_MESSAGE).unwrap();
    assert!(rest.is_empty());
    look(postcard::from_bytes(payload).unwrap())
}
