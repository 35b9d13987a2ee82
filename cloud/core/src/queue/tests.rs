//! The queue's rules one by one, and its invariants under any run of commands.

use super::*;
use crate::class::ClassNameError;
use proptest::prelude::*;

const MINUTE: u64 = 60_000;

fn next(worker: &str, count: usize) -> Command {
    Command::Next {
        worker: worker.into(),
        count,
        lease_ms: MINUTE,
    }
}

fn label(worker: &str, item: ItemId, class: &str) -> Command {
    Command::Label {
        worker: worker.into(),
        item,
        class: class.into(),
        allow_new_class: true,
    }
}

fn given(events: &[Event]) -> Vec<ItemId> {
    events
        .iter()
        .filter_map(|e| match e {
            Event::Leased { item, .. } => Some(*item),
            _ => None,
        })
        .collect()
}

fn queue(items: u64) -> Queue {
    let mut queue = Queue::default();
    let items = (0..items).collect();
    queue.execute(0, &Command::Enqueue { items }).unwrap();
    queue
}

#[test]
fn gives_each_item_to_one_worker_in_order_of_rank() {
    let mut q = queue(5);
    let order = vec![3, 1, 99, 3];
    q.execute(0, &Command::Rank { order }).unwrap();
    assert_eq!(given(&q.execute(0, &next("ann", 1)).unwrap()), [3]);
    assert_eq!(given(&q.execute(0, &next("bob", 2)).unwrap()), [1, 0]);
    // A new ranking forgets the old one.
    q.execute(0, &Command::Rank { order: vec![4] }).unwrap();
    assert_eq!(given(&q.execute(0, &next("bob", 9)).unwrap()), [4, 2]);
    assert_eq!(given(&q.execute(0, &next("ann", 9)).unwrap()), [0_u64; 0]);
}

#[test]
fn an_expired_item_goes_to_the_next_worker_and_the_old_one_is_refused() {
    let mut q = queue(1);
    q.execute(0, &next("ann", 1)).unwrap();
    assert!(matches!(
        q.execute(MINUTE - 1, &label("bob", 0, "stop")),
        Err(QueueError::NotHolder { .. })
    ));
    assert_eq!(q.stats(MINUTE - 1).leased, 1);
    assert_eq!(q.stats(MINUTE).pending, 1);
    assert_eq!(given(&q.execute(MINUTE, &next("bob", 1)).unwrap()), [0]);
    assert!(matches!(
        q.execute(MINUTE, &label("ann", 0, "stop")),
        Err(QueueError::NotHolder { .. })
    ));
    q.execute(MINUTE, &label("bob", 0, "stop")).unwrap();
}

#[test]
fn a_late_label_counts_while_nobody_else_has_the_item() {
    let mut q = queue(2);
    q.execute(0, &next("ann", 2)).unwrap();
    q.execute(5 * MINUTE, &label("ann", 0, "stop")).unwrap();
    // Bob's request sweeps both leases but takes only the first; ann's second is still hers.
    let mut q = queue(2);
    q.execute(0, &next("ann", 2)).unwrap();
    assert_eq!(given(&q.execute(5 * MINUTE, &next("bob", 1)).unwrap()), [0]);
    q.execute(5 * MINUTE, &label("ann", 1, "yield")).unwrap();
    assert_eq!(q.stats(5 * MINUTE).workers["ann"].labelled, 1);
}

#[test]
fn renewal_extends_and_never_shortens() {
    let mut q = queue(1);
    q.execute(0, &next("ann", 1)).unwrap();
    let renew = |lease_ms| Command::Renew {
        worker: "ann".into(),
        item: 0,
        lease_ms,
    };
    q.execute(30_000, &renew(MINUTE)).unwrap();
    q.execute(30_000, &renew(1)).unwrap();
    assert_eq!(given(&q.execute(MINUTE, &next("bob", 1)).unwrap()), [0; 0]);
    assert_eq!(given(&q.execute(90_000, &next("bob", 1)).unwrap()), [0]);
    assert!(matches!(
        q.execute(90_000, &renew(MINUTE)),
        Err(QueueError::NotHolder { .. })
    ));
}

#[test]
fn claim_takes_a_certain_item_unless_somebody_has_it() {
    let mut q = queue(3);
    let claim = |worker: &str| Command::Claim {
        worker: worker.into(),
        item: 2,
        lease_ms: MINUTE,
    };
    q.execute(0, &claim("ann")).unwrap();
    assert!(matches!(
        q.execute(1, &claim("bob")),
        Err(QueueError::Held {
            until_ms: MINUTE,
            ..
        })
    ));
    assert_eq!(q.execute(MINUTE, &claim("bob")).unwrap().len(), 2);
    let release = Command::Release {
        worker: "bob".into(),
        item: 2,
    };
    q.execute(MINUTE, &release).unwrap();
    assert_eq!(q.waiting().collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_label_stands_until_undone_or_reviewed() {
    let mut q = queue(1);
    q.execute(0, &next("ann", 1)).unwrap();
    q.execute(1, &label("ann", 0, "stop")).unwrap();
    assert!(matches!(
        q.execute(2, &label("ann", 0, "yield")),
        Err(QueueError::AlreadyLabelled { .. })
    ));
    let review = |worker: &str, class: &str| Command::Review {
        worker: worker.into(),
        item: 0,
        class: class.into(),
        allow_new_class: false,
    };
    assert!(matches!(
        q.execute(2, &review("ann", "stop")),
        Err(QueueError::OwnReview { .. })
    ));
    assert!(matches!(
        q.execute(2, &review("bob", "yield")),
        Err(QueueError::NewClass { .. })
    ));
    q.execute(
        2,
        &Command::AddClass {
            class: "yield".into(),
        },
    )
    .unwrap();
    q.execute(3, &review("bob", "yield")).unwrap();
    assert_eq!(q.labels().collect::<Vec<_>>(), [(0, "yield", 3)]);
    let stats = q.stats(3);
    assert_eq!((stats.classes["stop"], stats.classes["yield"]), (0, 1));
    assert_eq!(stats.workers["bob"].reviewed, 1);

    let undo = |worker: &str| Command::Undo {
        worker: worker.into(),
        item: 0,
    };
    assert!(matches!(
        q.execute(4, &undo("bob")),
        Err(QueueError::NothingToUndo { .. })
    ));
    q.execute(4, &undo("ann")).unwrap();
    assert_eq!(q.stats(4).pending, 1);
    // Whoever undid it can put it right at once.
    q.execute(5, &label("ann", 0, "stop")).unwrap();
    assert_eq!(q.classes(), ["stop", "yield"]);
}

#[test]
fn a_skip_needs_a_reason_and_ends_the_item() {
    let mut q = queue(1);
    q.execute(0, &next("ann", 1)).unwrap();
    let skip = |reason: &str| Command::Skip {
        worker: "ann".into(),
        item: 0,
        reason: reason.into(),
    };
    assert!(matches!(
        q.execute(1, &skip(" ")),
        Err(QueueError::Field {
            field: "reason",
            ..
        })
    ));
    q.execute(1, &skip("none of these")).unwrap();
    assert_eq!(q.stats(1).skipped, 1);
    assert!(matches!(
        q.execute(2, &label("ann", 0, "stop")),
        Err(QueueError::AlreadySkipped { .. })
    ));
}

#[test]
fn bad_commands_are_refused_by_field() {
    let mut q = queue(1);
    for (command, field) in [
        (next("ann", 0), "count"),
        (next("ann", MAX_NEXT + 1), "count"),
        (next("", 1), "worker"),
        (next("a\nb", 1), "worker"),
        (
            Command::Next {
                worker: "ann".into(),
                count: 1,
                lease_ms: MAX_LEASE_MS + 1,
            },
            "lease_ms",
        ),
    ] {
        match q.execute(0, &command) {
            Err(QueueError::Field { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{command:?} gave {other:?}"),
        }
    }
    q.execute(0, &next("ann", 1)).unwrap();
    assert_eq!(
        q.execute(0, &label("ann", 0, "")),
        Err(QueueError::ClassName(ClassNameError::Empty))
    );
    assert_eq!(
        q.execute(0, &label("ann", 7, "stop")),
        Err(QueueError::Unknown { item: 7 })
    );
}

#[test]
fn a_damaged_log_is_an_error_and_leaves_the_state_alone() {
    let mut q = queue(1);
    let before = q.clone();
    for event in [
        Event::Enqueued { item: 0 },
        Event::Released { item: 0 },
        Event::Undone { item: 0 },
        Event::Ranked { order: vec![0, 5] },
        Event::Leased {
            item: 8,
            worker: "ann".into(),
            until_ms: 1,
        },
        Event::Reviewed {
            item: 0,
            worker: "ann".into(),
            class: "new".into(),
            at_ms: 0,
        },
    ] {
        assert!(q.apply(&event).is_err(), "{event:?}");
        assert_eq!(q, before);
    }
}

fn command() -> impl Strategy<Value = Command> {
    let worker = || prop::sample::select(vec!["ann", "bob", "cem"]).prop_map(str::to_owned);
    let class = || prop::sample::select(vec!["stop", "yield", "deer"]).prop_map(str::to_owned);
    let item = || 0_u64..12;
    prop_oneof![
        prop::collection::vec(item(), 0..6).prop_map(|items| Command::Enqueue { items }),
        prop::collection::vec(item(), 0..6).prop_map(|order| Command::Rank { order }),
        (worker(), 1_usize..4, 1_u64..20).prop_map(|(worker, count, lease_ms)| Command::Next {
            worker,
            count,
            lease_ms
        }),
        (worker(), item(), 1_u64..20).prop_map(|(worker, item, lease_ms)| Command::Claim {
            worker,
            item,
            lease_ms
        }),
        (worker(), item(), 1_u64..20).prop_map(|(worker, item, lease_ms)| Command::Renew {
            worker,
            item,
            lease_ms
        }),
        (worker(), item()).prop_map(|(worker, item)| Command::Release { worker, item }),
        (worker(), item(), class(), any::<bool>()).prop_map(
            |(worker, item, class, allow_new_class)| Command::Label {
                worker,
                item,
                class,
                allow_new_class
            }
        ),
        (worker(), item()).prop_map(|(worker, item)| Command::Skip {
            worker,
            item,
            reason: "blurred".into()
        }),
        (worker(), item()).prop_map(|(worker, item)| Command::Undo { worker, item }),
        (worker(), item(), class()).prop_map(|(worker, item, class)| Command::Review {
            worker,
            item,
            class,
            allow_new_class: true
        }),
    ]
}

/// Recounts everything the indices and counters claim.
fn check(q: &Queue, now_ms: u64) {
    let mut plain = Stats::default();
    for (id, item) in q.items() {
        assert_eq!(
            q.pending.contains(&(item.rank, id)),
            matches!(item.status, Status::Pending { .. })
        );
        match &item.status {
            Status::Pending { .. } => plain.pending += 1,
            Status::Leased { worker, until_ms } => {
                assert!(q.expiry.contains(&(*until_ms, id)));
                if *until_ms > now_ms {
                    plain.leased += 1;
                } else {
                    plain.pending += 1;
                }
                plain.workers.entry(worker.clone()).or_default().leased += 1;
            }
            Status::Labelled { class, worker, .. } => {
                plain.labelled += 1;
                *plain.classes.entry(class.clone()).or_default() += 1;
                plain.workers.entry(worker.clone()).or_default().labelled += 1;
            }
            Status::Skipped { worker, .. } => {
                plain.skipped += 1;
                plain.workers.entry(worker.clone()).or_default().skipped += 1;
            }
        }
    }
    let mut stats = q.stats(now_ms);
    stats.classes.retain(|_, n| *n > 0);
    for worker in stats.workers.values_mut() {
        worker.reviewed = 0;
    }
    stats.workers.retain(|_, w| *w != WorkerStats::default());
    assert_eq!(stats, plain);
    assert_eq!(q.pending.len() + q.expiry.len(), {
        let open = |x: &&Item| matches!(x.status, Status::Pending { .. } | Status::Leased { .. });
        q.items.values().filter(open).count()
    });
}

proptest! {
    #[test]
    fn any_run_of_commands_keeps_the_invariants_and_replays(
        steps in prop::collection::vec((0_u64..15, command()), 0..80)
    ) {
        let mut q = Queue::default();
        let mut log = Vec::new();
        let mut now = 0;
        for (wait, command) in steps {
            now += wait;
            let held: Vec<(ItemId, Status)> = q
                .items()
                .filter(|(_, x)| matches!(&x.status,
                    Status::Leased { until_ms, .. } if *until_ms > now))
                .map(|(id, x)| (id, x.status.clone()))
                .collect();
            let before = q.clone();
            match q.execute(now, &command) {
                Ok(events) => log.extend(events),
                Err(_) => prop_assert_eq!(&q, &before),
            }
            // A live lease never passes straight to somebody else.
            for (id, status) in held {
                if let (Status::Leased { worker: old, .. }, Some(Item {
                    status: Status::Leased { worker, .. }, ..
                })) = (status, q.item(id)) {
                    prop_assert_eq!(&old, worker);
                }
            }
            check(&q, now);
        }
        prop_assert_eq!(Queue::replay(&log).unwrap(), q);
    }
}
