use super::*;
use crate::pki::PkiError;
use crate::store::fixtures::{loss, sample, unsigned};
use crate::store::{Commit, Store};
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use std::path::Path;
use tempfile::TempDir;

const NOW: u64 = 1_800_000_000_000;

fn open(dir: &Path) -> (Arc<Store>, Arc<Fleet>) {
    let store = Store::open(dir).unwrap();
    let pki = Arc::new(Pki::open(&dir.join("pki"), &[], NOW).unwrap());
    let fleet = Fleet::open(store.clone(), pki).unwrap();
    (store, fleet)
}

fn request(key: &KeyPair) -> String {
    let params = CertificateParams::default();
    params.serialize_request(key).unwrap().pem().unwrap()
}

fn csr() -> String {
    request(&KeyPair::generate_for(&PKCS_ED25519).unwrap())
}

fn grant() -> Grant {
    Grant {
        group: "north".to_owned(),
        expires_ms: NOW + 1000,
        ..Grant::default()
    }
}

fn id(text: &str) -> DeviceId {
    text.parse().unwrap()
}

#[test]
fn a_token_lets_one_device_in_once() {
    let dir = TempDir::new().unwrap();
    let (_, fleet) = open(dir.path());
    let token = fleet.mint_token(&grant()).unwrap();
    assert_eq!(token.len(), 32);
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let enrolled = fleet
        .enroll(&token, &request(&key), Some("cam1"), NOW)
        .unwrap();
    assert_eq!(enrolled.device, id("cam1"));
    assert_eq!(
        fleet.key(&id("cam1")).as_ref().map(|k| &k[..]),
        Some(key.public_key_raw())
    );
    assert_eq!(fleet.record(&id("cam1")).unwrap().group, "north");
    // The same key again, which never heard the answer; then another.
    let again = fleet.enroll(&token, &request(&key), None, NOW).unwrap();
    assert_eq!(again.device, id("cam1"));
    let other = fleet.enroll(&token, &csr(), Some("cam2"), NOW).unwrap_err();
    assert!(matches!(&other, FleetError::UsedToken(device) if *device == id("cam1")));
    assert!(other.is_refusal());
    assert_eq!(fleet.records().len(), 1);
}

#[test]
fn what_a_token_does_not_allow_is_refused_and_does_not_use_it_up() {
    let dir = TempDir::new().unwrap();
    let (_, fleet) = open(dir.path());
    let enroll = |token: &str, wanted: Option<&str>, at| fleet.enroll(token, &csr(), wanted, at);
    assert!(matches!(
        enroll("guess", None, NOW),
        Err(FleetError::UnknownToken)
    ));
    let token = fleet.mint_token(&grant()).unwrap();
    assert!(matches!(
        enroll(&token, None, NOW + 1001),
        Err(FleetError::ExpiredToken)
    ));
    assert!(matches!(
        enroll(&token, Some("../x"), NOW),
        Err(FleetError::BadId { .. })
    ));
    assert!(matches!(
        fleet.enroll(&token, "no request", Some("cam1"), NOW),
        Err(FleetError::Pki(PkiError::Request(_)))
    ));
    let named = Grant {
        device: Some(id("cam9")),
        ..grant()
    };
    let named = fleet.mint_token(&named).unwrap();
    assert!(matches!(
        enroll(&named, Some("cam8"), NOW),
        Err(FleetError::NotAllowed { .. })
    ));
    assert_eq!(enroll(&named, None, NOW).unwrap().device, id("cam9"));
    let prefixed = Grant {
        prefix: Some("roof".to_owned()),
        ..grant()
    };
    let prefixed = fleet.mint_token(&prefixed).unwrap();
    assert!(matches!(
        enroll(&prefixed, Some("cam8"), NOW),
        Err(FleetError::NotAllowed { .. })
    ));
    let made_up = enroll(&prefixed, None, NOW).unwrap().device;
    assert!(made_up.as_str().starts_with("roof") && made_up.as_str().len() > 8);
    assert!(matches!(
        enroll(&token, Some("cam9"), NOW),
        Err(FleetError::Taken(_))
    ));
    assert_eq!(
        enroll(&token, Some("cam1"), NOW).unwrap().device,
        id("cam1")
    );
}

#[test]
fn revocation_is_for_ever_and_survives_a_restart() {
    let dir = TempDir::new().unwrap();
    let (store, fleet) = open(dir.path());
    let token = fleet.mint_token(&grant()).unwrap();
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    fleet
        .enroll(&token, &request(&key), Some("cam1"), NOW)
        .unwrap();
    fleet.revoke(&id("cam1"), NOW + 5).unwrap();
    fleet.revoke(&id("cam1"), NOW + 6).unwrap();
    assert_eq!(fleet.key(&id("cam1")), None);
    assert!(matches!(
        fleet.enroll(&token, &request(&key), None, NOW + 7),
        Err(FleetError::UsedToken(_))
    ));
    assert!(matches!(
        fleet.revoke(&id("cam2"), NOW),
        Err(FleetError::UnknownDevice(_))
    ));
    drop((fleet, store));
    let (_store, fleet) = open(dir.path());
    assert_eq!(
        fleet.record(&id("cam1")).unwrap().revoked_at_ms,
        Some(NOW + 5)
    );
    let fresh = fleet.mint_token(&grant()).unwrap();
    assert!(matches!(
        fleet.enroll(&fresh, &csr(), Some("cam1"), NOW),
        Err(FleetError::Taken(_))
    ));
}

fn health(books: Vec<OwnedBook>) -> OwnedHealth {
    OwnedHealth {
        at_ms: 1,
        agent: "0".to_owned(),
        hardware: "any".to_owned(),
        source: "sim:roads".to_owned(),
        engine: "tract".to_owned(),
        epoch: 1,
        frame: 0,
        bytes_seen: 0,
        bytes_up: 0,
        skipped: 0,
        dropped: None,
        idle: false,
        live: Some(Digest::of(b"m")),
        sequence: 0,
        candidate: None,
        books,
    }
}

fn book(epoch: u32, flagged: u32, acked: u32, spooled: &[(u32, u32)]) -> OwnedBook {
    OwnedBook {
        epoch,
        flagged,
        acked,
        spooled: spooled.to_vec().try_into().unwrap(),
    }
}

#[test]
fn the_audit_joins_books_with_what_came_and_finds_what_did_not() {
    let dir = TempDir::new().unwrap();
    let (store, fleet) = open(dir.path());
    let cam1 = id("cam1");
    let take = |epoch, records: &[_]| {
        let commit = Commit::new(&cam1, NOW, &unsigned(epoch, records)).unwrap();
        store.commit_blocking(commit).unwrap();
    };
    take(1, &[sample(1, b"a"), loss(2)]);
    // No book yet: what came is all there is, and a gap is still with the device.
    take(1, &[sample(5, b"e")]);
    let report = fleet.audit().unwrap();
    assert!(report.balanced, "{report}");
    assert_eq!((report.flagged, report.ingested, report.spooled), (5, 2, 2));
    fleet
        .store_health(&cam1, &health(vec![book(1, 6, 3, &[(3, 4), (6, 6)])]), NOW)
        .unwrap();
    let report = fleet.audit().unwrap();
    assert!(report.balanced, "{report}");
    assert_eq!((report.flagged, report.spooled), (6, 3));
    // The book of epoch 1 is closed and no longer sent; it still counts.
    take(1, &[sample(3, b"c"), sample(4, b"d"), sample(6, b"f")]);
    fleet
        .store_health(&cam1, &health(vec![book(2, 1, 0, &[(1, 1)])]), NOW)
        .unwrap();
    let report = fleet.audit().unwrap();
    assert!(report.balanced, "{report}");
    assert_eq!((report.flagged, report.ingested, report.spooled), (7, 5, 1));
    assert_eq!(report.dropped["evicted"], 1);
    // A number that neither came nor is held anywhere.
    fleet
        .store_health(&cam1, &health(vec![book(2, 3, 0, &[(1, 1)])]), NOW)
        .unwrap();
    let report = fleet.audit().unwrap();
    assert!(!report.balanced);
    assert_eq!(report.missing[0].ranges.ranges(), &[(2, 3)]);
}

#[test]
fn a_view_shows_what_was_last_said() {
    let dir = TempDir::new().unwrap();
    let (_, fleet) = open(dir.path());
    let token = fleet.mint_token(&grant()).unwrap();
    fleet.enroll(&token, &csr(), Some("cam1"), NOW).unwrap();
    let cam1 = id("cam1");
    let report = OwnedSlotReport {
        manifest: Digest::of(b"m"),
        sequence: 3,
        state: flywheel_shared::message::SlotState::Trial,
        code: 0,
        detail: String::new(),
        trial_frames: 5,
        max_latency_us: 9,
    };
    fleet.store_slot(&cam1, &report, NOW).unwrap();
    fleet.store_health(&cam1, &health(vec![]), NOW + 1).unwrap();
    fleet.seen(&cam1, NOW + 2);
    fleet.set_connected(&cam1, Some(Transport::Quic));
    let view = fleet.show(&cam1).unwrap().unwrap();
    assert_eq!(view.slots[0].report, report);
    assert_eq!(view.health.as_ref().unwrap().health, health(vec![]));
    assert_eq!(view.connected, Some(Transport::Quic));
    assert_eq!(view.last_seen_ms, Some(NOW + 2));
    let json = serde_json::to_string(&view).unwrap();
    assert!(
        json.contains(&Digest::of(b"m").to_string()),
        "digests are text"
    );
    assert_eq!(serde_json::from_str::<DeviceView>(&json).unwrap(), view);
    assert_eq!(fleet.list().unwrap(), [view]);
    assert_eq!(fleet.show(&id("cam2")).unwrap(), None);
}
