//! The planner's order, its halts, and its invariants under any fleet behaviour.

use super::*;
use proptest::prelude::*;

fn fleet(n: usize) -> Vec<Device> {
    (0..n)
        .map(|i| Device {
            id: format!("cam{i}"),
            group: if i % 2 == 0 { "north" } else { "south" }.into(),
            sequence: 1,
            online: true,
        })
        .collect()
}

fn offers(plan: &Plan) -> Vec<&str> {
    plan.actions
        .iter()
        .map(|Action::Offer { device }| device.as_str())
        .collect()
}

/// Offers what the plan says and lets every device that was offered confirm.
fn step(rollout: &mut Rollout, inventory: &[Device], now_ms: u64) -> usize {
    let plan = rollout.plan(inventory, now_ms);
    for device in offers(&plan) {
        rollout.offered(device, now_ms);
        rollout.record(device, Report::Confirmed, now_ms);
    }
    plan.actions.len()
}

#[test]
fn canary_then_waves_then_confirmed() {
    let devices = fleet(10);
    let policy = Policy {
        canary: Share::Count(2),
        waves: vec![50],
        ..Policy::default()
    };
    let mut rollout = Rollout::start(2, policy, &devices).unwrap();
    let sizes: Vec<usize> = rollout.waves.iter().map(Vec::len).collect();
    assert_eq!(sizes, [2, 3, 5]);
    let group = |id: &String| devices.iter().find(|d| d.id == *id).unwrap().group.clone();
    assert_ne!(group(&rollout.waves[0][0]), group(&rollout.waves[0][1]));

    // One canary alone opens nothing.
    let plan = rollout.plan(&devices, 0);
    assert_eq!(plan.state, State::Running { wave: 0 });
    let canaries = rollout.waves[0].clone();
    assert_eq!(offers(&plan), canaries);
    for canary in &canaries {
        rollout.offered(canary, 0);
    }
    assert!(rollout.record(&canaries[0], Report::Confirmed, 1));
    assert!(rollout.record(&canaries[1], Report::Trial, 1));
    assert_eq!(offers(&rollout.plan(&devices, 2)), [""; 0]);
    assert!(rollout.record(&canaries[1], Report::Confirmed, 3));
    assert_eq!(step(&mut rollout, &devices, 4), 3);
    assert_eq!(step(&mut rollout, &devices, 5), 5);
    assert_eq!(rollout.plan(&devices, 6).state, State::Confirmed);
    assert_eq!(rollout.summary(&devices)["confirmed"], 10);
}

#[test]
fn an_offer_is_repeated_after_it_expires_and_a_silent_device_after_it_stalls() {
    let devices = fleet(1);
    let policy = Policy {
        offer_ttl_ms: 100,
        stall_ms: 1000,
        ..Policy::default()
    };
    let mut rollout = Rollout::start(2, policy, &devices).unwrap();
    rollout.offered("cam0", 0);
    assert!(rollout.plan(&devices, 99).actions.is_empty());
    assert_eq!(offers(&rollout.plan(&devices, 100)), ["cam0"]);
    rollout.record("cam0", Report::Staged, 150);
    assert!(rollout.plan(&devices, 1149).actions.is_empty());
    assert_eq!(offers(&rollout.plan(&devices, 1150)), ["cam0"]);
    // A late report of an earlier stage does not take it back.
    rollout.record("cam0", Report::Trial, 1200);
    rollout.record("cam0", Report::Staged, 1300);
    assert_eq!(rollout.progress["cam0"], Progress::Trial { at_ms: 1300 });
}

#[test]
fn a_canary_that_reverts_halts_whatever_the_limit_and_others_only_beyond_it() {
    let devices = fleet(6);
    let policy = Policy {
        max_failed: 1,
        waves: vec![],
        ..Policy::default()
    };
    let mut rollout = Rollout::start(2, policy, &devices).unwrap();
    let canary = rollout.waves[0][0].clone();
    let mut bad_canary = rollout.clone();
    bad_canary.record(&canary, Report::Reverted("latency".into()), 0);
    let plan = bad_canary.plan(&devices, 1);
    assert!(plan.actions.is_empty());
    assert_eq!(
        plan.state,
        State::Halted {
            reason: format!("canary {canary} gave the model up: latency")
        }
    );
    // The operator can take the canary out; the rest goes on.
    bad_canary.exclude(&canary);
    assert_eq!(bad_canary.plan(&devices, 1).actions.len(), 5);

    step(&mut rollout, &devices, 0);
    let rest = rollout.waves[1].clone();
    rollout.record(&rest[0], Report::Failed("no space".into()), 1);
    assert!(matches!(
        rollout.plan(&devices, 1).state,
        State::Running { wave: 1 }
    ));
    // Even a confirmed device can still lose the model.
    rollout.record(&rest[1], Report::Confirmed, 1);
    rollout.record(&rest[1], Report::Reverted("crash loop".into()), 2);
    let plan = rollout.plan(&devices, 2);
    assert!(matches!(&plan.state, State::Halted { reason } if reason.starts_with("2 devices")));
    assert!(plan.actions.is_empty());
}

#[test]
fn a_device_that_is_away_holds_up_the_end_but_not_the_next_wave() {
    let mut devices = fleet(9);
    let policy = Policy {
        waves: vec![50],
        ..Policy::default()
    };
    let mut rollout = Rollout::start(2, policy, &devices).unwrap();
    step(&mut rollout, &devices, 0);
    let away = rollout.waves[1][0].clone();
    let set = |devices: &mut Vec<Device>, online| {
        for device in devices.iter_mut().filter(|d| d.id == away) {
            device.online = online;
        }
    };
    set(&mut devices, false);
    assert_eq!(step(&mut rollout, &devices, 1), 3);
    assert_eq!(step(&mut rollout, &devices, 2), 4);
    assert_eq!(rollout.plan(&devices, 3).state, State::Running { wave: 2 });
    set(&mut devices, true);
    assert_eq!(offers(&rollout.plan(&devices, 4)), [away.as_str()]);
    step(&mut rollout, &devices, 4);
    assert_eq!(rollout.plan(&devices, 5).state, State::Confirmed);
}

#[test]
fn late_gone_and_up_to_date_devices_are_taken_as_they_are() {
    let mut devices = fleet(3);
    devices[1].sequence = 2;
    let mut rollout = Rollout::start(2, Policy::default(), &devices).unwrap();
    assert_eq!(rollout.waves.iter().flatten().count(), 2);
    devices.push(Device {
        id: "new".into(),
        group: "north".into(),
        sequence: 0,
        online: true,
    });
    let gone = rollout.waves[1][0].clone();
    devices.retain(|d| d.id != gone);
    step(&mut rollout, &devices, 0);
    assert_eq!(offers(&rollout.plan(&devices, 1)), ["new"]);
    // The server may learn of it from the live sequence alone.
    devices.iter_mut().for_each(|d| d.sequence = 2);
    assert_eq!(rollout.plan(&devices, 2).state, State::Confirmed);

    // A fleet of canaries alone: a late device still waits for them.
    let one = fleet(1);
    let rollout = Rollout::start(2, Policy::default(), &one).unwrap();
    let mut two = fleet(2);
    two[0].online = false;
    assert!(rollout.plan(&two, 0).actions.is_empty());
}

#[test]
fn pause_resume_abort_and_bad_policies() {
    let devices = fleet(3);
    let mut rollout = Rollout::start(2, Policy::default(), &devices).unwrap();
    for (control, state, count) in [
        (Control::Paused, State::Paused, 0),
        (Control::Running, State::Running { wave: 0 }, 1),
        (Control::Aborted, State::Aborted, 0),
    ] {
        rollout.control = control;
        let plan = rollout.plan(&devices, 0);
        assert_eq!((plan.state, plan.actions.len()), (state, count));
    }
    let start = |change: fn(&mut Policy)| {
        let mut policy = Policy::default();
        change(&mut policy);
        Rollout::start(2, policy, &devices).map(|_| ())
    };
    type Change = fn(&mut Policy);
    let fields: [(Change, &str); 4] = [
        (|p| p.canary = Share::Count(0), "canary"),
        (|p| p.canary = Share::Percent(101), "canary"),
        (|p| p.waves = vec![50, 20], "waves"),
        (|p| p.offer_ttl_ms = 0, "offer_ttl_ms"),
    ];
    for (change, field) in fields {
        match start(change) {
            Err(RolloutError::Policy { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    let error = start(|p| p.group = Some("west".into())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no device in group `west` to roll out to; enrol one first"
    );
}

/// What a simulated device does with an offer.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Confirms,
    Reverts,
    Fails,
    /// Misses the first offer.
    Sleeps,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        12 => Just(Fate::Confirms),
        1 => Just(Fate::Reverts),
        1 => Just(Fate::Fails),
        3 => Just(Fate::Sleeps),
    ]
}

proptest! {
    #[test]
    fn waves_partition_the_fleet(n in 1_usize..200, canary in 1_u8..100, first in 1_u8..100, seed in any::<u64>()) {
        let devices = fleet(n);
        let policy = Policy { canary: Share::Percent(canary), waves: vec![first], seed, ..Policy::default() };
        let rollout = Rollout::start(2, policy, &devices).unwrap();
        prop_assert!(rollout.waves.iter().all(|w| !w.is_empty()));
        let mut ids: Vec<&String> = rollout.waves.iter().flatten().collect();
        prop_assert_eq!(ids.len(), n);
        ids.sort();
        ids.dedup();
        prop_assert_eq!(ids.len(), n);
        prop_assert_eq!(rollout.waves[0].len(), (n * usize::from(canary)).div_ceil(100));
    }

    #[test]
    fn never_outside_the_open_waves_never_after_a_halt_and_it_ends(
        fates in prop::collection::vec(fate(), 1..30),
        online in prop::collection::vec(any::<bool>(), 30),
        max_failed in 0_u32..3,
        canaries in 1_u32..4,
        seed in any::<u64>(),
    ) {
        let mut devices = fleet(fates.len());
        for (device, &online) in devices.iter_mut().zip(&online) {
            device.online = online;
        }
        let policy = Policy {
            canary: Share::Count(canaries),
            waves: vec![20, 60],
            max_failed,
            offer_ttl_ms: 10,
            seed,
            ..Policy::default()
        };
        let mut rollout = Rollout::start(2, policy, &devices).unwrap();
        let mut missed = BTreeSet::new();
        let mut offered = 0;
        let mut end = None;
        for round in 0..40_u64 {
            // Everybody is back in the end.
            if round == 10 {
                devices.iter_mut().for_each(|d| d.online = true);
            }
            let now = round * 10;
            // A restart in between changes nothing.
            let plan = rollout.clone().plan(&devices, now);
            let failed = rollout.progress.values().filter(|p| p.failure().is_some()).count();
            if failed > max_failed as usize {
                let halted = matches!(plan.state, State::Halted { .. });
                prop_assert!(halted);
            }
            if !matches!(plan.state, State::Running { .. }) {
                prop_assert!(plan.actions.is_empty());
                end.get_or_insert(plan.state);
                continue;
            }
            prop_assert_eq!(&end, &None);
            let State::Running { wave: active } = plan.state else { unreachable!() };
            let canaries_confirmed = rollout.waves[0]
                .iter()
                .all(|id| rollout.progress.get(id) == Some(&Progress::Confirmed));
            for id in offers(&plan) {
                offered += 1;
                let wave = rollout.waves.iter().position(|w| w.iter().any(|x| x == id)).unwrap();
                prop_assert!(wave <= active);
                prop_assert!(wave == 0 || canaries_confirmed);
                let at: usize = id[3..].parse().unwrap();
                prop_assert!(devices[at].online);
                rollout.offered(id, now);
                match fates[at] {
                    Fate::Sleeps if missed.insert(at) => {}
                    Fate::Confirms | Fate::Sleeps => {
                        rollout.record(id, Report::Trial, now);
                        rollout.record(id, Report::Confirmed, now);
                    }
                    Fate::Reverts => { rollout.record(id, Report::Reverted("r".into()), now); }
                    Fate::Fails => { rollout.record(id, Report::Failed("f".into()), now); }
                }
            }
        }
        prop_assert!(matches!(end, Some(State::Confirmed | State::Halted { .. })), "{end:?}");
        prop_assert!(offered <= 2 * fates.len());
    }
}
