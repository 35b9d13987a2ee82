use super::fixtures::{NOW, World, batch, hello, up, with_down};
use super::*;
use crate::store::fixtures::{loss, sample, signed};
use flywheel_shared::message::{EpochBook, SlotState};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;

fn refused(answers: &[Vec<u8>]) -> RefusedCode {
    assert_eq!(answers.len(), 1);
    with_down(&answers[0], |down| match down {
        Down::Refused(refused) => refused.code,
        other => panic!("{other:?}"),
    })
}

fn acked(answers: &[Vec<u8>]) -> Vec<(u32, u32, u32)> {
    let mut all = Vec::new();
    for answer in answers {
        with_down(answer, |down| match down {
            Down::Ack(ack) => all.extend(ack.ranges.iter().map(|r| (ack.epoch, r.0, r.1))),
            other => panic!("{other:?}"),
        });
    }
    all
}

async fn send(world: &World, id: &DeviceId, bytes: &[u8]) -> Vec<Vec<u8>> {
    world.ingest.handle(id, Transport::Quic, bytes).await
}

#[tokio::test]
async fn hello_is_answered_or_refused() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let answers = send(&world, &cam1.id, &hello(&cam1.id)).await;
    with_down(&answers[0], |down| {
        let welcome = Welcome {
            wire_version: WIRE_VERSION,
            now_ms: NOW,
        };
        assert_eq!(down, Down::Welcome(welcome));
    });
    let cam2: DeviceId = "cam2".parse().unwrap();
    assert_eq!(
        refused(&send(&world, &cam1.id, &hello(&cam2)).await),
        RefusedCode::Identity
    );
    assert_eq!(
        refused(&send(&world, &cam2, &hello(&cam2)).await),
        RefusedCode::Identity
    );
    let future = up(&Up::Hello(Hello {
        device: cam1.id.clone(),
        wire_version: WIRE_VERSION + 1,
        epoch: 1,
    }));
    assert_eq!(
        refused(&send(&world, &cam1.id, &future).await),
        RefusedCode::WireVersion
    );
}

#[tokio::test]
async fn signed_batches_are_committed_and_acknowledged_again_and_again() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let bytes = batch(&cam1, 3, &[sample(1, b"a"), loss(2), sample(9, b"b")]);
    for _ in 0..2 {
        let answers = send(&world, &cam1.id, &bytes).await;
        assert_eq!(acked(&answers), [(3, 1, 2), (3, 9, 9)]);
        assert_eq!(world.store.samples(0, 10).unwrap().len(), 2);
    }
    let traffic = world.store.traffic(&cam1.id).unwrap();
    assert_eq!(
        (traffic.batches, traffic.bytes_up),
        (2, 2 * bytes.len() as u64)
    );
    // More ranges than one message can name.
    let scattered: Vec<_> = (0..50).map(|i| loss(100 + 2 * i)).collect();
    let answers = send(&world, &cam1.id, &batch(&cam1, 3, &scattered)).await;
    assert_eq!(answers.len(), 2);
    assert_eq!(acked(&answers).len(), 50);
}

#[tokio::test]
async fn forged_batches_are_refused() {
    let world = World::new();
    let (cam1, cam2) = (world.enroll("cam1"), world.enroll("cam2"));
    let records = [sample(1, b"a")];
    // Somebody else's key, somebody else's batch, another epoch than was signed.
    let other_key = signed(&cam1.id, &cam2.key, 1, &records, |batch| {
        up(&Up::Batch(batch))
    });
    let other_batch = batch(&cam2, 1, &records);
    let other_epoch = signed(&cam1.id, &cam1.key, 1, &records, |batch| {
        up(&Up::Batch(message::Batch { epoch: 2, ..batch }))
    });
    let short = signed(&cam1.id, &cam1.key, 1, &records, |batch| {
        let signature = &batch.signature[1..];
        up(&Up::Batch(message::Batch { signature, ..batch }))
    });
    for bytes in [other_key, other_batch, other_epoch, short] {
        assert_eq!(
            refused(&send(&world, &cam1.id, &bytes).await),
            RefusedCode::Signature
        );
    }
    // Signed, but not what it says it is.
    let miscounted = {
        let joined = crate::store::fixtures::join(&records);
        let digest = trust::batch_digest(&cam1.id, 1, 2, &joined);
        up(&Up::Batch(message::Batch {
            epoch: 1,
            count: 2,
            records: &joined,
            signature: &trust::sign_digest(Role::Device, &cam1.key, &digest),
        }))
    };
    assert_eq!(
        refused(&send(&world, &cam1.id, &miscounted).await),
        RefusedCode::Malformed
    );
    assert!(world.store.samples(0, 10).unwrap().is_empty());
}

#[tokio::test]
async fn no_bytes_make_it_panic_and_none_that_are_damaged_are_taken() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let good = batch(&cam1, 1, &[sample(1, b"a")]);
    let mut sent = 0;
    for cut in 0..good.len() {
        assert_eq!(
            refused(&send(&world, &cam1.id, &good[..cut]).await),
            RefusedCode::Malformed
        );
        let mut flipped = good.clone();
        flipped[cut] ^= 0x11;
        refused(&send(&world, &cam1.id, &flipped).await);
        // Under a valid checksum, as only the device itself could send it.
        let payload = &flipped[envelope::HEADER..];
        let mut resealed = Vec::from(envelope::header(payload));
        resealed.extend_from_slice(payload);
        if resealed != good {
            refused(&send(&world, &cam1.id, &resealed).await);
            sent += 1;
        }
        sent += 2;
    }
    let traffic = world.store.traffic(&cam1.id).unwrap();
    assert_eq!((traffic.refused, traffic.messages), (sent, sent));
    assert!(world.store.samples(0, 10).unwrap().is_empty());
}

#[tokio::test]
async fn a_full_disk_refuses_a_batch_that_is_taken_later() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let bytes = batch(&cam1, 1, &[sample(1, b"a")]);
    world.faults.space.store(10, SeqCst);
    assert_eq!(
        refused(&send(&world, &cam1.id, &bytes).await),
        RefusedCode::Storage
    );
    assert!(world.store.samples(0, 10).unwrap().is_empty());
    world.faults.space.store(u64::MAX, SeqCst);
    assert_eq!(acked(&send(&world, &cam1.id, &bytes).await), [(1, 1, 1)]);
}

#[tokio::test]
async fn health_is_kept_and_answered_with_what_is_wanted() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    world.wishes.run_until.store(500, SeqCst);
    let book = EpochBook {
        epoch: 1,
        flagged: 4,
        acked: 0,
        spooled: Ranges::from_slice(&[(1, 4)]).unwrap(),
    };
    let health = Health {
        at_ms: 77,
        agent: "0.1",
        hardware: "any",
        source: "sim:roads",
        engine: "tract",
        epoch: 1,
        frame: 12,
        bytes_seen: 1,
        bytes_up: 2,
        skipped: 0,
        idle: true,
        live: None,
        sequence: 0,
        candidate: None,
        books: [book].into_iter().collect(),
    };
    let bytes = up(&Up::Health(health));
    let answers = send(&world, &cam1.id, &bytes).await;
    assert_eq!(answers.len(), 1);
    with_down(&answers[0], |down| {
        let desired = Desired {
            run_until: 500,
            health_at_ms: 77,
        };
        assert_eq!(down, Down::Desired(desired));
    });
    let offer = OfferBytes {
        offer: vec![1],
        offer_signature: [2; 64],
        manifest: vec![3],
        manifest_signature: [4; 64],
    };
    *world.wishes.offer.lock().unwrap() = Some(offer.clone());
    let answers = send(&world, &cam1.id, &bytes).await;
    with_down(&answers[1], |down| assert_eq!(down, offer.message()));
    let stored = world.ingest.fleet().health(&cam1.id).unwrap().unwrap();
    assert_eq!((stored.health.frame, stored.received_ms), (12, NOW));
    let report = world.ingest.fleet().audit().unwrap();
    assert!(report.balanced && report.spooled == 4, "{report}");
}

#[tokio::test]
async fn a_slot_report_is_seen_only_when_everybody_concerned_has_it() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let report = SlotReport {
        manifest: Digest::of(b"m"),
        sequence: 2,
        state: SlotState::Reverted,
        code: 9,
        detail: "too slow",
        trial_frames: 3,
        max_latency_us: 4,
    };
    let bytes = up(&Up::Slot(report.clone()));
    world.wishes.slot_fails.store(true, SeqCst);
    assert_eq!(
        refused(&send(&world, &cam1.id, &bytes).await),
        RefusedCode::Storage
    );
    world.wishes.slot_fails.store(false, SeqCst);
    let answers = send(&world, &cam1.id, &bytes).await;
    with_down(&answers[0], |down| {
        let seen = SlotSeen {
            manifest: report.manifest,
            state: report.state,
        };
        assert_eq!(down, Down::SlotSeen(seen));
    });
    let owned = OwnedSlotReport::from(&report);
    assert_eq!(
        *world.wishes.slots.lock().unwrap(),
        [(cam1.id.clone(), owned.clone())]
    );
    assert_eq!(
        world.ingest.fleet().slots(&cam1.id).unwrap()[0].report,
        owned
    );
}

#[tokio::test]
async fn only_published_blobs_are_fetched_piece_by_piece() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let bytes: Vec<u8> = (0..MAX_CHUNK + 100).map(|i| i as u8).collect();
    let digest = world.store.blobs().put(&bytes).unwrap();
    let fetch = |offset, len| {
        up(&Up::Fetch(Fetch {
            digest,
            offset,
            len,
        }))
    };
    let answers = send(&world, &cam1.id, &fetch(0, 10)).await;
    assert_eq!(refused(&answers), RefusedCode::NotFound);
    world.wishes.published.lock().unwrap().push(digest);
    let mut got = Vec::new();
    while got.len() < bytes.len() {
        let answers = send(&world, &cam1.id, &fetch(got.len() as u64, u32::MAX)).await;
        with_down(&answers[0], |down| match down {
            Down::Chunk(chunk) => {
                assert_eq!(chunk.offset, got.len() as u64);
                got.extend_from_slice(chunk.bytes);
            }
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(got, bytes);
    let answers = send(&world, &cam1.id, &fetch(bytes.len() as u64, 1)).await;
    assert_eq!(refused(&answers), RefusedCode::NotFound);
}

#[derive(Default)]
struct Recorder(Mutex<BTreeMap<String, usize>>);

impl Recorder {
    fn note(&self, what: &str) {
        *self.0.lock().unwrap().entry(what.to_owned()).or_default() += 1;
    }

    fn count(&self, what: &str) -> usize {
        self.0.lock().unwrap().get(what).copied().unwrap_or(0)
    }
}

impl Outlet for Recorder {
    fn send(&self, _device: &DeviceId, _envelope: Vec<u8>) -> bool {
        self.note("send");
        true
    }

    fn close(&self, _device: &DeviceId, _why: &str) {
        self.note("close");
    }
}

#[tokio::test]
async fn pushes_take_the_newest_way_and_revocation_ends_it() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let (quic, broker) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
    let connected = || {
        world
            .ingest
            .fleet()
            .show(&cam1.id)
            .unwrap()
            .unwrap()
            .connected
    };
    assert!(!world.ingest.push_desired(&cam1.id, 5));
    world.ingest.set_broker(Some(broker.clone()));
    let number = world.ingest.attach(&cam1.id, Transport::Quic, quic.clone());
    // Something late from the broker does not change the way; a hello does.
    let late = batch(&cam1, 1, &[loss(1)]);
    world.ingest.handle(&cam1.id, Transport::Mqtt, &late).await;
    assert!(world.ingest.push_desired(&cam1.id, 5));
    assert_eq!((quic.count("send"), broker.count("send")), (1, 0));
    world
        .ingest
        .handle(&cam1.id, Transport::Mqtt, &hello(&cam1.id))
        .await;
    assert_eq!(
        (quic.count("close"), connected()),
        (1, Some(Transport::Mqtt))
    );
    // The old connection's end is not the end of the new one.
    world.ingest.detach(&cam1.id, number);
    assert!(world.ingest.push_desired(&cam1.id, 5));
    assert_eq!(broker.count("send"), 1);
    world.ingest.revoke(&cam1.id).unwrap();
    assert_eq!(broker.count("close"), 1);
    assert!(!world.ingest.push_desired(&cam1.id, 5));
    let answers = world.ingest.handle(&cam1.id, Transport::Mqtt, &late).await;
    assert_eq!(refused(&answers), RefusedCode::Identity);
    assert_eq!(connected(), None);
}

#[tokio::test]
async fn a_device_that_falls_silent_behind_the_broker_counts_as_gone_until_it_speaks() {
    let world = World::new();
    let (cam1, cam2) = (world.enroll("cam1"), world.enroll("cam2"));
    let connected = |id| world.ingest.fleet().show(id).unwrap().unwrap().connected;
    world.ingest.set_broker(Some(Arc::new(Recorder::default())));
    world
        .ingest
        .attach(&cam2.id, Transport::Quic, Arc::new(Recorder::default()));
    world
        .ingest
        .handle(&cam1.id, Transport::Mqtt, &hello(&cam1.id))
        .await;
    world.now_ms.fetch_add(500, SeqCst);
    world.ingest.expire(500);
    assert_eq!(connected(&cam1.id), Some(Transport::Mqtt));
    world.ingest.expire(499);
    assert_eq!(connected(&cam1.id), None);
    // Of a direct connection its end is seen.
    assert_eq!(connected(&cam2.id), Some(Transport::Quic));
    let late = batch(&cam1, 1, &[loss(1)]);
    world.ingest.handle(&cam1.id, Transport::Mqtt, &late).await;
    assert_eq!(connected(&cam1.id), Some(Transport::Mqtt));
    world.ingest.set_broker(None);
    assert_eq!(connected(&cam1.id), None);
}

#[tokio::test]
async fn a_question_is_answered_with_the_newer_roots_and_then_the_time() {
    let world = World::new();
    let cam1 = world.enroll("cam1");
    let root = postcard::to_extend(
        &trust::SignedRoot {
            body: b"root 2",
            signatures: &[3; 96],
        },
        Vec::new(),
    )
    .unwrap();
    // A damaged one is left out; the device asks again from where it is.
    *world.wishes.roots.lock().unwrap() = vec![root, b"damaged".to_vec()];
    let ask = up(&Up::Attest(Attest {
        nonce: 9,
        root_version: 1,
    }));
    let answers = send(&world, &cam1.id, &ask).await;
    assert_eq!(answers.len(), 2);
    with_down(&answers[0], |down| {
        assert!(matches!(down, Down::Root(root) if root.body == b"root 2"));
    });
    with_down(&answers[1], |down| {
        assert!(matches!(down, Down::Time(time) if time.body == b"cam1 9 1"));
    });
}
