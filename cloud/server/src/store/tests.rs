use super::disk::faulty::{Faults, FaultyDisk};
use super::fixtures::{loss, sample, unsigned};
use super::*;
use flywheel_shared::message::Record;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::SeqCst;
use tempfile::TempDir;

fn device(name: &str) -> DeviceId {
    name.parse().unwrap()
}

fn commit(store: &Store, name: &str, epoch: u32, records: &[Record<'_>]) -> Result<(), StoreError> {
    let batch = unsigned(epoch, records);
    store.commit_blocking(Commit::new(&device(name), 5, &batch).unwrap())
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

type Contents = (Vec<(Cursor, SampleMeta)>, Vec<Ledger>, Vec<Vec<u8>>);

/// Everything that can be read of samples.
fn contents(store: &Store) -> Contents {
    let samples = store.samples(0, usize::MAX).unwrap();
    let pictures = samples
        .iter()
        .map(|(_, meta)| store.picture(&meta.blob).unwrap().unwrap());
    let pictures = pictures.collect();
    for (_, meta) in &samples {
        assert_eq!(store.sample(&meta.id()).unwrap().as_ref(), Some(meta));
    }
    (samples, store.ledgers().unwrap(), pictures)
}

fn numbers(store: &Store) -> Vec<u32> {
    let samples = store.samples(0, usize::MAX).unwrap();
    samples.iter().map(|(_, meta)| meta.seq).collect()
}

#[test]
fn samples_come_back_in_commit_order_and_the_same_after_reopening() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    commit(
        &store,
        "cam1",
        1,
        &[sample(1, b"one"), loss(2), sample(3, b"three")],
    )
    .unwrap();
    commit(&store, "cam2", 4, &[sample(1, b"other")]).unwrap();
    let before = contents(&store);
    let order: Vec<_> = before
        .0
        .iter()
        .map(|(_, meta)| meta.id().to_string())
        .collect();
    assert_eq!(order, ["cam1-1-1", "cam1-1-3", "cam2-4-1"]);
    assert_eq!(
        before.2,
        [b"one".to_vec(), b"three".to_vec(), b"other".to_vec()]
    );
    assert!(before.0.is_sorted_by(|a, b| a.0 < b.0));
    let meta = &before.0[1].1;
    assert_eq!(
        (meta.frame, meta.captured_ms, meta.received_ms),
        (30, 1003, 5)
    );
    assert_eq!(meta.vector(), [1.0, -1.0]);
    // From a cursor on, and no more than asked for.
    assert_eq!(store.samples(before.0[0].0, 1).unwrap(), before.0[1..2]);
    assert_eq!(store.samples(u64::MAX, 1).unwrap(), []);
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(contents(&store), before);
    assert_eq!(store.picture(&Digest::of(b"none")).unwrap(), None);
}

#[test]
fn a_number_is_booked_once_whatever_is_repeated() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let first = [sample(1, b"a"), loss(2)];
    commit(&store, "cam1", 1, &first).unwrap();
    let before = contents(&store);
    let log = fs::metadata(dir.path().join("log/0000000000000000.seg"))
        .unwrap()
        .len();
    commit(&store, "cam1", 1, &first).unwrap();
    // A sample for a booked loss, a loss for an ingested sample.
    commit(&store, "cam1", 1, &[loss(1), sample(2, b"b")]).unwrap();
    assert_eq!(contents(&store), before);
    let now = fs::metadata(dir.path().join("log/0000000000000000.seg"))
        .unwrap()
        .len();
    assert_eq!(now, log, "repetitions do not grow the log");
    commit(&store, "cam1", 1, &[sample(2, b"b"), sample(3, b"c")]).unwrap();
    assert_eq!(numbers(&store), [1, 3]);
    let ledger = store.ledger(&device("cam1"), 1).unwrap();
    assert_eq!(ledger.ingested.ranges(), &[(1, 1), (3, 3)]);
    assert_eq!(ledger.lost["evicted"].ranges(), &[(2, 2)]);
    // Another epoch is another count.
    commit(&store, "cam1", 2, &[sample(1, b"d")]).unwrap();
    assert_eq!(numbers(&store), [1, 3, 1]);
}

#[test]
fn a_lost_or_stale_index_is_made_good_from_the_log() {
    let dir = TempDir::new().unwrap();
    let stale = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    commit(&store, "cam1", 1, &[sample(1, b"a"), loss(2)]).unwrap();
    drop(store);
    copy(&dir.path().join("index"), &stale.path().join("index"));
    let store = Store::open(dir.path()).unwrap();
    commit(&store, "cam1", 1, &[sample(3, b"c")]).unwrap();
    commit(&store, "cam2", 1, &[sample(1, b"d")]).unwrap();
    store.put("a", b"gone", &1).unwrap();
    store.append_events("s", &["first", "second"]).unwrap();
    let mut batch = Batch::new();
    batch.put("a", b"k", &2).unwrap();
    batch.delete("a", b"gone").unwrap();
    batch.event("s", "third").unwrap();
    assert_eq!(store.write(batch).unwrap(), [2]);
    let written = |store: &Store| {
        let records = store.scan::<i32>("a", b"").unwrap();
        (records, store.events::<String>("s", 0).unwrap())
    };
    let before = (contents(&store), written(&store));
    assert_eq!(before.1.1.len(), 3);
    drop(store);
    let index = dir.path().join("index");
    let saved = stale.path().join("log");
    copy(&dir.path().join("log"), &saved);
    // Damage as it was seen after a kill, and worse.
    let ways: [&dyn Fn(); 5] = [
        &|| fs::remove_dir_all(&index).unwrap(),
        &|| {
            fs::remove_dir_all(&index).unwrap();
            copy(&stale.path().join("index"), &index);
        },
        &|| fs::write(index.join("db"), b"").unwrap(),
        &|| fs::write(index.join("conf"), b"nonsense").unwrap(),
        &|| {
            let len = fs::metadata(index.join("db")).unwrap().len();
            fs::write(index.join("db"), vec![0xa5; len as usize]).unwrap();
        },
    ];
    for damage in ways {
        damage();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!((contents(&store), written(&store)), before);
        // And numbers go on.
        let mut batch = Batch::new();
        batch.event("s", "next").unwrap();
        assert_eq!(store.write(batch).unwrap(), [3]);
        drop(store);
        fs::remove_dir_all(dir.path().join("log")).unwrap();
        copy(&saved, &dir.path().join("log"));
        fs::remove_dir_all(&index).unwrap();
        drop(Store::open(dir.path()).unwrap());
    }
}

#[test]
fn what_is_noted_is_not_in_the_log() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let log = dir.path().join("log/0000000000000000.seg");
    let before = fs::metadata(&log).unwrap().len();
    let mut notes = Batch::new();
    notes.put("health", b"cam1", &1).unwrap();
    store.note(notes).unwrap();
    store.flush().unwrap();
    assert_eq!(fs::metadata(&log).unwrap().len(), before);
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.get::<i32>("health", b"cam1").unwrap(), Some(1));
    let mut long = Batch::new();
    long.put("a", b"k", &"x".repeat(40 << 20)).unwrap();
    let error = store.write(long).unwrap_err().to_string();
    assert!(error.contains("fewer at a time"), "{error}");
}

#[test]
fn a_log_shorter_than_the_index_knows_is_named() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    commit(&store, "cam1", 1, &[sample(1, b"a")]).unwrap();
    drop(store);
    let file = OpenOptions::new()
        .write(true)
        .open(dir.path().join("log/0000000000000000.seg"))
        .unwrap();
    file.set_len(12).unwrap();
    let error = Store::open(dir.path()).err().unwrap();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
}

#[test]
fn a_full_disk_refuses_and_keeps_nothing_until_there_is_space() {
    let faults = Faults::none();
    let dir = TempDir::new().unwrap();
    let disk = Arc::new(FaultyDisk(faults.clone()));
    let store = Store::open_on(disk, dir.path()).unwrap();
    commit(&store, "cam1", 1, &[sample(1, b"a")]).unwrap();
    let before = contents(&store);
    for space in [0, 1, 40] {
        faults.space.store(space, SeqCst);
        let refused = commit(&store, "cam1", 1, &[sample(2, b"b")]);
        assert!(
            matches!(refused, Err(StoreError::Full { .. })),
            "{refused:?}"
        );
        assert_eq!(contents(&store), before);
    }
    // What is known is acknowledged even now: it is on the medium.
    commit(&store, "cam1", 1, &[sample(1, b"a")]).unwrap();
    faults.space.store(u64::MAX, SeqCst);
    commit(&store, "cam1", 1, &[sample(2, b"b")]).unwrap();
    assert_eq!(numbers(&store), [1, 2]);
    let after = contents(&store);
    drop(store);
    assert_eq!(contents(&Store::open(dir.path()).unwrap()), after);
}

#[test]
fn at_random_nothing_acknowledged_is_lost_and_nothing_is_doubled() {
    let mut state = 7_u64;
    let mut random = move |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % below
    };
    for _ in 0..8 {
        let faults = Faults::none();
        let dir = TempDir::new().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(FaultyDisk(faults.clone()));
        let mut store = Store::open_on(disk.clone(), dir.path()).unwrap();
        let mut acknowledged = BTreeSet::new();
        let mut offered = BTreeSet::new();
        for _ in 0..40 {
            match random(8) {
                0 => {
                    drop(store);
                    faults.space.store(u64::MAX, SeqCst);
                    if random(2) == 0 {
                        // What a kill during a write leaves.
                        let segment = dir.path().join("log/0000000000000000.seg");
                        let mut file = OpenOptions::new().append(true).open(segment).unwrap();
                        file.write_all(&vec![3; random(40) as usize]).unwrap();
                    }
                    store = Store::open_on(disk.clone(), dir.path()).unwrap();
                }
                1 => faults.space.store(random(300), SeqCst),
                2 => faults.space.store(u64::MAX, SeqCst),
                _ => {
                    let first = 1 + random(30) as u32;
                    let records: Vec<_> = (first..first + 1 + random(5) as u32)
                        .map(|seq| sample(seq, b"picture"))
                        .collect();
                    offered.extend(records.iter().map(Record::seq));
                    if commit(&store, "cam1", 1, &records).is_ok() {
                        acknowledged.extend(records.iter().map(Record::seq));
                    }
                }
            }
        }
        let found = numbers(&store);
        let distinct: BTreeSet<u32> = found.iter().copied().collect();
        assert_eq!(distinct.len(), found.len(), "none doubled");
        assert!(acknowledged.is_subset(&distinct), "none lost");
        assert!(distinct.is_subset(&offered));
        let ledger = store.ledger(&device("cam1"), 1).unwrap();
        assert!(ledger.ingested.iter().eq(distinct));
    }
}

#[test]
fn many_writers_share_syncs_and_each_number_is_booked_once() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    thread::scope(|scope| {
        for name in ["cam1", "cam1", "cam2"] {
            let store = &store;
            scope.spawn(move || {
                for seq in 1..=30 {
                    let event = format!("{name} {seq}");
                    commit(store, name, 1, &[sample(seq, event.as_bytes())]).unwrap();
                    store.append_event("events", &event).unwrap();
                }
            });
        }
    });
    assert_eq!(numbers(&store).len(), 60);
    let events = store.events::<String>("events", 0).unwrap();
    assert!(events.iter().map(|(number, _)| *number).eq(0..90));
}

#[test]
fn records_and_events() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.put("a", b"k1", &1).unwrap();
    store.put("a", b"k2", &2).unwrap();
    store.put("ab", b"k1", &3).unwrap();
    let mut batch = Batch::new();
    batch.put("a", b"x", &4).unwrap();
    batch.delete("a", b"k1").unwrap();
    batch.event("s", "first").unwrap();
    batch.event("s", "second").unwrap();
    assert_eq!(store.write(batch).unwrap(), [0, 1]);
    assert_eq!(store.append_events("s", &["third", "fourth"]).unwrap(), 2);
    assert_eq!(store.append_events::<&str>("s", &[]).unwrap(), 4);
    assert_eq!(store.append_event("st", "other").unwrap(), 0);
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.get::<i32>("a", b"k1").unwrap(), None);
    assert_eq!(store.get::<i32>("ab", b"k1").unwrap(), Some(3));
    let all = store.scan::<i32>("a", b"").unwrap();
    assert_eq!(all, [(b"k2".to_vec(), 2), (b"x".to_vec(), 4)]);
    assert_eq!(store.scan::<i32>("a", b"k").unwrap().len(), 1);
    let tail = store.events::<String>("s", 2).unwrap();
    assert_eq!(tail, [(2, "third".to_owned()), (3, "fourth".to_owned())]);
    store.delete("a", b"k2").unwrap();
    store.delete("a", b"never").unwrap();
    assert_eq!(store.scan::<i32>("a", b"").unwrap().len(), 1);
    let error = store.get::<String>("ab", b"k1").unwrap_err();
    assert!(error.to_string().contains("\"ab\""), "{error}");
    assert!(store.put("a\0b", b"", &1).is_err());
}

#[test]
fn counters_are_in_one_place_at_a_time_and_survive() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let one = Traffic {
        bytes_up: 10,
        messages: 1,
        ..Traffic::default()
    };
    store.count(&device("cam1"), &one);
    store.flush().unwrap();
    store.count(&device("cam1"), &one);
    assert_eq!(store.traffic(&device("cam1")).unwrap().bytes_up, 20);
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.traffic(&device("cam1")).unwrap().messages, 2);
}

#[test]
fn a_second_server_is_told_who_has_the_folder() {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let error = Store::open(dir.path()).err().unwrap();
    let pid = std::process::id().to_string();
    assert_eq!(
        error,
        StoreError::Locked {
            dir: dir.path().to_owned(),
            pid
        }
    );
    drop(store);
    Store::open(dir.path()).unwrap();
}

#[test]
fn batches_that_do_not_hold_together_are_refused() {
    let check = |bytes: &[u8]| Commit::new(&device("cam1"), 0, bytes).err();
    let good = unsigned(1, &[sample(1, b"a"), loss(2)]);
    assert_eq!(check(&good), None);
    for cut in 0..good.len() {
        assert!(check(&good[..cut]).is_some(), "cut at {cut}");
    }
    let mut long = good.clone();
    long.push(0);
    assert_eq!(check(&long), Some(BatchError::Malformed));
    let zero = unsigned(1, &[sample(0, b"a")]);
    assert_eq!(check(&zero), Some(BatchError::Number));
    let twice = unsigned(1, &[sample(4, b"a"), loss(4)]);
    assert_eq!(check(&twice), Some(BatchError::Number));
    assert_eq!(check(&unsigned(1, &[])), Some(BatchError::Count));
}
