//! The planner's order, its gates and halts, the way back, and its invariants under any fleet
//! behaviour.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn fleet(n: usize) -> Vec<Device> {
    (0..n)
        .map(|i| Device {
            id: format!("cam{i}"),
            group: if i % 2 == 0 { "north" } else { "south" }.into(),
            sequence: 1,
            online: true,
            ..Device::default()
        })
        .collect()
}

fn start(policy: Policy, devices: &[Device]) -> Rollout {
    Rollout::start(2, Some(3), policy, Selector::all(), devices, 0).unwrap()
}

fn wave(rollout: &Rollout, wave: u32) -> Vec<String> {
    let of_wave = rollout.members.iter().filter(|(_, m)| m.wave == wave);
    of_wave.map(|(id, _)| id.clone()).collect()
}

fn offers(plan: &Plan) -> Vec<&str> {
    plan.decisions
        .iter()
        .filter_map(|decision| match decision {
            Decision::Offer { device, .. } => Some(device.as_str()),
            _ => None,
        })
        .collect()
}

fn returns(plan: &Plan) -> Vec<&str> {
    plan.decisions
        .iter()
        .filter_map(|decision| match decision {
            Decision::Return { device } => Some(device.as_str()),
            _ => None,
        })
        .collect()
}

/// Plans and makes every decision.
fn pass(rollout: &mut Rollout, devices: &[Device], now_ms: u64) -> Plan {
    let plan = rollout.plan(devices, None, now_ms);
    for decision in &plan.decisions {
        rollout.decide(decision, now_ms);
    }
    plan
}

/// Makes every decision and lets every device that was offered confirm.
fn step(rollout: &mut Rollout, devices: &[Device], now_ms: u64) -> usize {
    let plan = pass(rollout, devices, now_ms);
    let offered = offers(&plan);
    for device in &offered {
        rollout.record(device, 2, Report::Confirmed, 0, now_ms);
    }
    offered.len()
}

fn halted(rollout: &Rollout) -> &str {
    match &rollout.head.end {
        Some(End::Halted { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn canary_then_waves_then_confirmed() {
    let devices = fleet(10);
    let policy = Policy {
        canary: Share::Count(2),
        waves: vec![Share::Percent(50)],
        ..Policy::default()
    };
    let mut rollout = start(policy, &devices);
    let sizes: Vec<usize> = (0..3).map(|w| wave(&rollout, w).len()).collect();
    assert_eq!(sizes, [2, 3, 5]);
    let canaries = wave(&rollout, 0);
    let group = |id: &String| devices.iter().find(|d| d.id == *id).unwrap().group.clone();
    assert_ne!(group(&canaries[0]), group(&canaries[1]));

    // One canary alone opens nothing.
    let plan = pass(&mut rollout, &devices, 0);
    assert!(matches!(plan.state, State::Running { wave: 0, .. }));
    assert_eq!(offers(&plan), canaries);
    assert!(rollout.record(&canaries[0], 2, Report::Confirmed, 0, 1));
    assert!(rollout.record(&canaries[1], 2, Report::Trial, 0, 1));
    assert_eq!(offers(&pass(&mut rollout, &devices, 2)), [""; 0]);
    assert!(rollout.record(&canaries[1], 2, Report::Confirmed, 0, 3));
    assert_eq!(step(&mut rollout, &devices, 4), 3);
    assert_eq!(step(&mut rollout, &devices, 5), 5);
    pass(&mut rollout, &devices, 6);
    assert_eq!(rollout.head.end, Some(End::Confirmed));
    let confirmed: usize = rollout.summary().iter().map(|w| w["confirmed"]).sum();
    assert_eq!(confirmed, 10);
}

#[test]
fn waves_grow_by_a_factor() {
    let devices = fleet(100);
    let policy = Policy {
        canary: Share::Percent(2),
        factor: Some(3),
        ..Policy::default()
    };
    let rollout = start(policy, &devices);
    let sizes: Vec<usize> = (0..rollout.head.waves)
        .map(|w| wave(&rollout, w).len())
        .collect();
    assert_eq!(sizes, [2, 6, 18, 54, 20]);
}

#[test]
fn an_offer_is_repeated_after_it_expires_and_a_silent_device_after_it_stalls() {
    let devices = fleet(1);
    let policy = Policy {
        offer_ttl_s: 1,
        stall_s: 10,
        ..Policy::default()
    };
    let mut rollout = start(policy, &devices);
    pass(&mut rollout, &devices, 0);
    assert_eq!(offers(&rollout.plan(&devices, None, 999)), [""; 0]);
    assert_eq!(offers(&rollout.plan(&devices, None, 1000)), ["cam0"]);
    rollout.record("cam0", 2, Report::Staged, 0, 1500);
    assert_eq!(offers(&rollout.plan(&devices, None, 11_499)), [""; 0]);
    assert_eq!(offers(&rollout.plan(&devices, None, 11_500)), ["cam0"]);
    // A late report of an earlier stage does not take it back.
    rollout.record("cam0", 2, Report::Trial, 0, 12_000);
    rollout.record("cam0", 2, Report::Staged, 0, 13_000);
    assert_eq!(
        rollout.members["cam0"].progress,
        Progress::Trial { at_ms: 13_000 }
    );
}

#[test]
fn a_canary_that_reverts_halts_whatever_the_limit_and_others_only_beyond_it() {
    let devices = fleet(6);
    let policy = Policy {
        max_failed: Some(1),
        ..Policy::default()
    };
    let mut rollout = start(policy, &devices);
    let canary = wave(&rollout, 0)[0].clone();
    let mut bad_canary = rollout.clone();
    bad_canary.record(&canary, 2, Report::Reverted("latency".into()), 0, 0);
    let mut forgiven = bad_canary.clone();
    let plan = pass(&mut bad_canary, &devices, 1);
    assert_eq!(offers(&plan), [""; 0]);
    assert_eq!(
        halted(&bad_canary),
        format!("canary {canary} gave the model up: latency")
    );
    // The operator can take the canary out in time; the rest goes on.
    assert!(forgiven.exclude(&canary, "broken lens"));
    assert!(!forgiven.exclude("nobody", ""));
    assert_eq!(offers(&pass(&mut forgiven, &devices, 1)).len(), 5);

    step(&mut rollout, &devices, 0);
    pass(&mut rollout, &devices, 0);
    let rest = wave(&rollout, 1);
    rollout.record(&rest[0], 2, Report::Failed("no space".into()), 0, 1);
    let plan = pass(&mut rollout, &devices, 1);
    assert!(matches!(plan.state, State::Running { wave: 1, .. }));
    // Even a confirmed device can still lose the model.
    rollout.record(&rest[1], 2, Report::Confirmed, 0, 1);
    rollout.record(&rest[1], 2, Report::Reverted("crash loop".into()), 0, 2);
    pass(&mut rollout, &devices, 2);
    assert!(halted(&rollout).starts_with("2 devices gave the model up, at most 1 may"));
}

#[test]
fn a_device_that_is_away_holds_up_the_end_but_not_the_next_wave() {
    let mut devices = fleet(9);
    let policy = Policy {
        waves: vec![Share::Percent(50)],
        away_s: 60,
        ..Policy::default()
    };
    let mut rollout = start(policy, &devices);
    step(&mut rollout, &devices, 0);
    let away = wave(&rollout, 1)[0].clone();
    let set = |devices: &mut Vec<Device>, online, silent_ms| {
        for device in devices.iter_mut().filter(|d| d.id == away) {
            device.online = online;
            device.silent_ms = silent_ms;
        }
    };
    set(&mut devices, false, 0);
    assert_eq!(step(&mut rollout, &devices, 1), 3);
    assert_eq!(step(&mut rollout, &devices, 2), 4);
    let plan = pass(&mut rollout, &devices, 3);
    assert!(matches!(plan.state, State::Running { wave: 2, .. }));
    let mut without = rollout.clone();
    set(&mut devices, true, 0);
    assert_eq!(step(&mut rollout, &devices, 4), 1);
    pass(&mut rollout, &devices, 5);
    assert_eq!(rollout.head.end, Some(End::Confirmed));
    // Away for too long, it does not hold up the end either.
    set(&mut devices, false, 60_000);
    pass(&mut without, &devices, 6);
    assert_eq!(without.head.end, Some(End::Confirmed));
    assert_eq!(without.members[&away].progress, Progress::Pending);
}

#[test]
fn late_gone_and_up_to_date_devices_are_taken_as_they_are() {
    let mut devices = fleet(3);
    devices[1].sequence = 2;
    let mut rollout = start(Policy::default(), &devices);
    assert_eq!(rollout.members.len(), 2);
    devices.push(Device {
        id: "new".into(),
        group: "north".into(),
        online: true,
        ..Device::default()
    });
    let gone = wave(&rollout, 1)[0].clone();
    devices.retain(|d| d.id != gone);
    step(&mut rollout, &devices, 0);
    assert_eq!(offers(&pass(&mut rollout, &devices, 1)), ["new"]);
    // The server may learn of it from the live sequence alone.
    devices.iter_mut().for_each(|d| d.sequence = 2);
    pass(&mut rollout, &devices, 2);
    assert_eq!(rollout.members["new"].progress.name(), "confirmed");
    pass(&mut rollout, &devices, 3);
    assert_eq!(rollout.head.end, Some(End::Confirmed));

    // A fleet of canaries alone: a late device still waits for them.
    let one = fleet(1);
    let mut rollout = start(Policy::default(), &one);
    let mut two = fleet(2);
    two[0].online = false;
    assert_eq!(offers(&pass(&mut rollout, &two, 0)), [""; 0]);
    assert_eq!(rollout.members["cam1"].wave, 1);
}

#[test]
fn groups_are_looked_up_at_every_pass() {
    let mut devices = fleet(4);
    let selector: Selector = "label.site=a,healthy".parse().unwrap();
    let none = Rollout::start(2, None, Policy::all(), selector.clone(), &devices, 0);
    assert_eq!(
        none.unwrap_err().to_string(),
        "no device matches `label.site=a,healthy`; enrol or tag one first"
    );
    let tag = |device: &mut Device| {
        device.labels.insert("site".into(), "a".into());
    };
    tag(&mut devices[0]);
    tag(&mut devices[1]);
    let mut rollout = Rollout::start(2, None, Policy::all(), selector, &devices, 0).unwrap();
    // One falls ill before its turn, and one is tagged later.
    devices[1].silent_ms = 600_000;
    tag(&mut devices[2]);
    assert_eq!(offers(&pass(&mut rollout, &devices, 0)), ["cam0"]);
    rollout.record("cam0", 2, Report::Confirmed, 0, 1);
    devices[1].silent_ms = 0;
    assert_eq!(offers(&pass(&mut rollout, &devices, 1)), ["cam1"]);
    rollout.record("cam1", 2, Report::Confirmed, 0, 2);
    assert_eq!(step(&mut rollout, &devices, 2), 1);
    pass(&mut rollout, &devices, 3);
    assert_eq!(rollout.head.end, Some(End::Confirmed));
    assert_eq!(
        rollout.members.keys().collect::<Vec<_>>(),
        ["cam0", "cam1", "cam2"]
    );
}

#[test]
fn pause_and_force() {
    let devices = fleet(3);
    let mut rollout = start(Policy::default(), &devices);
    rollout.head.control = Control::Paused;
    let plan = pass(&mut rollout, &devices, 0);
    assert_eq!(plan.state, State::Paused { wave: 0 });
    assert!(plan.decisions.is_empty());
    rollout.head.control = Control::Running;
    assert_eq!(offers(&pass(&mut rollout, &devices, 0)).len(), 1);
    // The canary does not answer, and the operator knows better.
    rollout.head.forced_wave = Some(0);
    assert_eq!(offers(&pass(&mut rollout, &devices, 1)).len(), 2);
    // Forced once: the next gate is not.
    assert!(offers(&pass(&mut rollout, &devices, 2)).is_empty());
    // A device is forced before its turn.
    let mut rollout = start(Policy::default(), &devices);
    let last = wave(&rollout, 1)[1].clone();
    rollout.members.get_mut(&last).unwrap().forced = true;
    assert_eq!(offers(&pass(&mut rollout, &devices, 0)).len(), 2);
    // A pause does not keep a failure from halting it.
    rollout.head.control = Control::Paused;
    rollout.record(&last, 2, Report::Reverted("x".into()), 0, 1);
    pass(&mut rollout, &devices, 1);
    assert!(halted(&rollout).contains(&last));
}

#[test]
fn bad_policies_are_named() {
    let devices = fleet(3);
    type Change = fn(&mut Policy);
    let fields: [(Change, &str); 12] = [
        (|p| p.canary = Share::Count(0), "canary"),
        (|p| p.canary = Share::Percent(101), "canary"),
        (
            |p| p.waves = vec![Share::Percent(50), Share::Percent(20)],
            "waves",
        ),
        (
            |p| p.waves = vec![Share::Count(50), Share::Count(50)],
            "waves",
        ),
        (|p| p.factor = Some(1), "factor"),
        (
            |p| {
                p.factor = Some(2);
                p.waves = vec![Share::Count(5)];
            },
            "factor",
        ),
        (|p| p.offer_ttl_s = 0, "offer_ttl_s"),
        (|p| p.gate.min_confirmed = Some(1.1), "gate.min_confirmed"),
        (
            |p| p.gate.max_failed_share = Some(0.0),
            "gate.max_failed_share",
        ),
        (
            |p| p.gate.max_latency_p99_ms = Some(f64::NAN),
            "gate.max_latency_p99_ms",
        ),
        (
            |p| {
                p.gate.drift = Some(DriftGate {
                    alpha: 1.0,
                    ..DriftGate::default()
                })
            },
            "gate.drift.alpha",
        ),
        (
            |p| {
                p.gate.drift = Some(DriftGate {
                    min_samples: 3,
                    ..DriftGate::default()
                })
            },
            "gate.drift.min_samples",
        ),
    ];
    for (change, field) in fields {
        let mut policy = Policy::default();
        change(&mut policy);
        match Rollout::start(2, None, policy, Selector::all(), &devices, 0) {
            Err(RolloutError::Policy { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    let nobody = Rollout::start(2, None, Policy::default(), Selector::all(), &[], 0);
    let error = nobody.unwrap_err().to_string();
    assert_eq!(error, "there is no device to roll out to; enrol one first");
}

#[test]
fn gates_wait_for_confirmations_and_soak_time() {
    let devices = fleet(21);
    let policy = Policy {
        canary: Share::Count(20),
        canary_max_failed: 9,
        gate: Gate {
            min_confirmed: Some(0.9),
            soak_s: 60,
            ..Gate::default()
        },
        ..Policy::default()
    };
    let mut rollout = start(policy, &devices);
    pass(&mut rollout, &devices, 0);
    let canaries = wave(&rollout, 0);
    for (at, canary) in (1..).zip(&canaries[..17]) {
        rollout.record(canary, 2, Report::Confirmed, 0, at * 1000);
    }
    let waits = |rollout: &Rollout, now| match rollout.plan(&devices, None, now).state {
        State::Running { waits_for, .. } => waits_for,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        waits(&rollout, 18_000),
        "17 of 20 devices of wave 0 confirmed; 18 must"
    );
    let mut hopeless = rollout.clone();
    for canary in &canaries[17..] {
        hopeless.record(canary, 2, Report::Failed("x".into()), 0, 18_000);
    }
    pass(&mut hopeless, &devices, 18_000);
    assert_eq!(
        halted(&hopeless),
        "17 of 20 devices of wave 0 confirmed and 0 can still; 18 must"
    );
    rollout.record(&canaries[17], 2, Report::Confirmed, 0, 30_000);
    assert_eq!(waits(&rollout, 89_999), "soaking: 59 of 60 s");
    let plan = pass(&mut rollout, &devices, 90_000);
    assert!(matches!(plan.decisions[0], Decision::Open { wave: 1, .. }));
}

#[test]
fn limits_halt_wherever_the_rollout_is() {
    let devices = fleet(200);
    let with = |gate: Gate| {
        let policy = Policy {
            canary: Share::Count(150),
            canary_max_failed: 200,
            gate,
            ..Policy::default()
        };
        let mut rollout = start(policy, &devices);
        pass(&mut rollout, &devices, 0);
        rollout
    };
    // The share of failures, but only once enough have answered.
    let mut rollout = with(Gate {
        max_failed_share: Some(0.05),
        min_answers: 20,
        ..Gate::default()
    });
    let canaries = wave(&rollout, 0);
    rollout.record(&canaries[0], 2, Report::Failed("x".into()), 0, 1);
    rollout.record(&canaries[1], 2, Report::Failed("x".into()), 0, 1);
    for canary in &canaries[2..19] {
        rollout.record(canary, 2, Report::Confirmed, 0, 1);
    }
    pass(&mut rollout, &devices, 1);
    assert_eq!(rollout.head.end, None);
    rollout.record(&canaries[19], 2, Report::Confirmed, 0, 1);
    pass(&mut rollout, &devices, 1);
    assert!(halted(&rollout).starts_with("2 of 20 devices gave the model up, at most 5.0 % may"));

    // The 99th percentile of the slowest inferences: one of a hundred does not count.
    let mut rollout = with(Gate {
        max_latency_p99_ms: Some(10.0),
        ..Gate::default()
    });
    for (at, canary) in canaries[..100].iter().enumerate() {
        let slow = if at == 0 { 50_000 } else { 9_000 };
        rollout.record(canary, 2, Report::Trial, slow, 1);
    }
    pass(&mut rollout, &devices, 1);
    assert_eq!(rollout.head.end, None);
    rollout.record(&canaries[1], 2, Report::Trial, 50_000, 1);
    pass(&mut rollout, &devices, 1);
    assert!(halted(&rollout).contains("50.0 ms at the 99th percentile of 100 devices"));

    // Restarts since the offer.
    let mut rollout = with(Gate {
        max_restarts: Some(2),
        ..Gate::default()
    });
    let mut crashing = devices.clone();
    let crashed = crashing.iter_mut().find(|d| d.id == canaries[0]).unwrap();
    crashed.restarts = 2;
    pass(&mut rollout, &crashing, 1);
    assert_eq!(rollout.head.end, None);
    let crashed = crashing.iter_mut().find(|d| d.id == canaries[1]).unwrap();
    crashed.restarts = 1;
    pass(&mut rollout, &crashing, 1);
    assert!(halted(&rollout).starts_with("devices restarted 3 times"));
}

#[test]
fn confidence_on_the_uniform_lane_may_rise_but_not_fall() {
    let devices = fleet(3);
    let policy = Policy {
        gate: Gate {
            drift: Some(DriftGate::default()),
            ..Gate::default()
        },
        ..Policy::default()
    };
    let mut rollout = start(policy, &devices);
    step(&mut rollout, &devices, 0);
    let sample = |n: u16, low: f32| -> Vec<f32> {
        (0..n)
            .map(|i| low + 0.2 * f32::from(i) / f32::from(n))
            .collect()
    };
    let state = |recent: &[f32], reference: &[f32]| {
        let mut rollout = rollout.clone();
        let confidence = Confidence::compare(reference, recent);
        let plan = rollout.plan(&devices, Some(&confidence), 1);
        for decision in &plan.decisions {
            rollout.decide(decision, 1);
        }
        (plan, rollout.head.end)
    };
    let (plan, end) = state(&sample(49, 0.8), &sample(500, 0.8));
    let State::Running { waits_for, .. } = plan.state else {
        panic!("{end:?}")
    };
    assert!(waits_for.starts_with("49 uniform samples"), "{waits_for}");
    for low in [0.8, 0.75] {
        let (plan, _) = state(&sample(60, 0.8), &sample(500, low));
        assert!(
            matches!(plan.decisions[0], Decision::Open { .. }),
            "{plan:?}"
        );
    }
    let (_, end) = state(&sample(60, 0.6), &sample(500, 0.8));
    let Some(End::Halted { reason }) = end else {
        panic!("{end:?}")
    };
    assert!(reason.starts_with("confidence on the uniform lane fell from 0.90 to 0.70"));
}

#[test]
fn those_who_took_the_model_go_back_and_the_others_stay() {
    let mut devices = fleet(10);
    let policy = Policy {
        canary: Share::Count(5),
        canary_max_failed: 1,
        ..Policy::default()
    };
    let mut rollout = start(policy, &devices);
    pass(&mut rollout, &devices, 0);
    let canaries = wave(&rollout, 0);
    rollout.record(&canaries[0], 2, Report::Confirmed, 0, 1);
    rollout.record(&canaries[1], 2, Report::Trial, 0, 1);
    rollout.record(&canaries[2], 2, Report::Reverted("x".into()), 0, 1);
    rollout.record(&canaries[3], 2, Report::Reverted("x".into()), 0, 1);
    // Of the fifth nothing was heard, and it is away.
    let away = devices.iter_mut().find(|d| d.id == canaries[4]).unwrap();
    away.online = false;
    pass(&mut rollout, &devices, 2);
    assert!(rollout.head.returning);
    let plan = pass(&mut rollout, &devices, 3);
    assert_eq!(returns(&plan), [&canaries[0], &canaries[1]]);
    assert_eq!(plan.state, State::Returning { left: 3 });
    // What was on trial confirms too late, then goes back all the same.
    rollout.record(&canaries[1], 2, Report::Confirmed, 0, 4);
    rollout.record(&canaries[0], 3, Report::Trial, 0, 4);
    rollout.record(&canaries[0], 3, Report::Confirmed, 0, 5);
    assert_eq!(
        returns(&pass(&mut rollout, &devices, 5_003)),
        [&canaries[1]]
    );
    // The health of a device is as good as its report.
    let back = devices.iter_mut().find(|d| d.id == canaries[1]).unwrap();
    back.sequence = 3;
    pass(&mut rollout, &devices, 5_004);
    assert_eq!(rollout.members[&canaries[1]].progress, Progress::Returned);
    // The one that was away comes back, and can't take the old model any more.
    devices.iter_mut().for_each(|d| d.online = true);
    for attempt in 0..3 {
        let plan = pass(&mut rollout, &devices, 10_000 * (attempt + 1));
        assert_eq!(returns(&plan), [&canaries[4]]);
        rollout.record(
            &canaries[4],
            3,
            Report::Failed("no space".into()),
            0,
            10_001 * (attempt + 1),
        );
    }
    assert_eq!(rollout.members[&canaries[4]].progress.name(), "stranded");
    assert_eq!(pass(&mut rollout, &devices, 60_000).state, State::Ended);
    let untouched = rollout
        .members
        .values()
        .filter(|m| m.progress == Progress::Pending);
    assert_eq!(untouched.count(), 5);
}

#[test]
fn offers_keep_to_their_rate_and_spread() {
    let devices = fleet(100);
    let policy = Policy {
        offer_rate: 10,
        ..Policy::all()
    };
    let mut rollout = start(policy, &devices);
    let counts: Vec<usize> = (0..12)
        .map(|i| step(&mut rollout, &devices, i * 500))
        .collect();
    assert_eq!(counts, [10, 0, 10, 0, 10, 0, 10, 0, 10, 0, 10, 0]);

    let policy = Policy {
        jitter_s: 10,
        ..Policy::all()
    };
    let mut rollout = start(policy, &devices);
    let counts: Vec<usize> = (0..=10)
        .map(|i| step(&mut rollout, &devices, i * 1000))
        .collect();
    assert_eq!(counts.iter().sum::<usize>(), 100);
    assert!(counts.iter().all(|count| *count < 25), "{counts:?}");
}

#[test]
fn policies_are_written_by_people() {
    let text = r#"{"name": "night", "canary": 2, "waves": ["10%", 50], "gate": {"soak_s": 5}, "return": false}"#;
    let policy: Policy = serde_json::from_str(text).unwrap();
    assert_eq!(policy.waves, [Share::Percent(10), Share::Count(50)]);
    assert!(!policy.go_back);
    let again = serde_json::to_string(&policy).unwrap();
    assert_eq!(serde_json::from_str::<Policy>(&again).unwrap(), policy);
    for (bad, word) in [
        (r#"{"canary": "two"}"#, "whole percentage"),
        (r#"{"canary": -1}"#, "whole percentage"),
        (r#"{"canery": 1}"#, "canery"),
        (r#"{"gate": {"soak": 1}}"#, "soak"),
    ] {
        let error = serde_json::from_str::<Policy>(bad).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
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

fn report() -> impl Strategy<Value = Report> {
    prop_oneof![
        Just(Report::Staged),
        Just(Report::Trial),
        Just(Report::Confirmed),
        Just(Report::Reverted("r".into())),
        Just(Report::Failed("f".into())),
    ]
}

/// What is stored and read again.
fn stored(rollout: &Rollout) -> Rollout {
    let head = serde_json::to_string(&rollout.head).unwrap();
    let members = serde_json::to_string(&rollout.members).unwrap();
    Rollout {
        head: serde_json::from_str(&head).unwrap(),
        members: serde_json::from_str(&members).unwrap(),
    }
}

proptest! {
    #[test]
    fn waves_partition_the_fleet(n in 1_usize..200, canary in 1_u8..100, first in 1_u8..100, factor in 1_u32..5, seed in any::<u64>()) {
        let devices = fleet(n);
        let policy = Policy {
            canary: Share::Percent(canary),
            waves: if factor > 1 { vec![] } else { vec![Share::Percent(first)] },
            factor: (factor > 1).then_some(factor),
            seed,
            ..Policy::default()
        };
        let rollout = start(policy, &devices);
        prop_assert_eq!(rollout.members.len(), n);
        for at in 0..rollout.head.waves {
            prop_assert!(!wave(&rollout, at).is_empty());
        }
        prop_assert_eq!(wave(&rollout, 0).len(), (n * usize::from(canary)).div_ceil(100));
    }

    /// Repeated, late and out-of-order reports never take a device back, and the order of what is
    /// settled does not matter to what was settled first.
    #[test]
    fn progress_is_monotone(reports in prop::collection::vec(report(), 1..12)) {
        let rank = |progress: &Progress| match progress {
            Progress::Pending => 0,
            Progress::Offered { .. } => 1,
            Progress::Staged { .. } => 2,
            Progress::Trial { .. } => 3,
            Progress::Confirmed { .. } => 4,
            _ => 5,
        };
        let devices = fleet(1);
        let mut rollout = start(Policy::all(), &devices);
        pass(&mut rollout, &devices, 0);
        for (at, report) in (1..).zip(reports) {
            let before = rank(&rollout.members["cam0"].progress);
            rollout.record("cam0", 2, report.clone(), 0, at);
            let after = rollout.members["cam0"].clone();
            prop_assert!(rank(&after.progress) >= before);
            // Said again, it changes nothing.
            prop_assert!(!rollout.record("cam0", 2, report, 0, at));
        }
    }

    #[test]
    fn never_outside_the_open_wave_never_after_a_halt_and_everybody_ends_settled(
        fates in prop::collection::vec(fate(), 1..30),
        online in prop::collection::vec(any::<bool>(), 30),
        echoes in prop::collection::vec((0_usize..30, report_of_nothing_new()), 40),
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
            waves: vec![Share::Percent(20), Share::Percent(60)],
            max_failed: Some(max_failed),
            offer_ttl_s: 1,
            stall_s: 2,
            seed,
            ..Policy::default()
        };
        let mut rollout = start(policy, &devices);
        let mut missed = BTreeSet::new();
        let mut offered = 0;
        for (round, echo) in (0_u64..).zip(&echoes) {
            // Everybody is back in the end.
            if round == 10 {
                devices.iter_mut().for_each(|d| d.online = true);
            }
            let now = round * 1000;
            let plan = rollout.plan(&devices, None, now);
            // A restart at any moment decides the same.
            rollout = stored(&rollout);
            prop_assert_eq!(&rollout.plan(&devices, None, now), &plan);
            let ended = rollout.head.end.clone();
            let failed = rollout.members.values()
                .filter(|m| m.wave > 0 && m.progress.failure().is_some()).count();
            let canary_failed = rollout.members.values()
                .any(|m| m.wave == 0 && m.progress.failure().is_some());
            if ended.is_none() && (failed > max_failed as usize || canary_failed) {
                let halts = matches!(plan.decisions[..], [Decision::End(End::Halted { .. })]);
                prop_assert!(halts, "{:?}", plan);
            }
            for decision in &plan.decisions {
                rollout.decide(decision, now);
                // Killed between two decisions, it goes on from there.
                rollout = stored(&rollout);
            }
            let confirmed = |wave| rollout.members.values()
                .filter(|m| m.wave == wave)
                .all(|m| m.progress.name() == "confirmed");
            if ended.is_some() {
                prop_assert!(offers(&plan).is_empty());
            }
            let to_offer: Vec<String> = offers(&plan).into_iter().map(str::to_owned).collect();
            for id in &to_offer {
                offered += 1;
                let member = &rollout.members[id];
                prop_assert!(member.wave <= rollout.head.wave);
                prop_assert!(member.wave == 0 || confirmed(0));
                let at: usize = id[3..].parse().unwrap();
                prop_assert!(devices[at].online);
            }
            for id in &to_offer {
                let at: usize = id[3..].parse().unwrap();
                match fates[at] {
                    Fate::Sleeps if missed.insert(at) => {}
                    Fate::Confirms | Fate::Sleeps => {
                        rollout.record(id, 2, Report::Trial, 0, now);
                        rollout.record(id, 2, Report::Confirmed, 0, now);
                    }
                    Fate::Reverts => { rollout.record(id, 2, Report::Reverted("r".into()), 0, now); }
                    Fate::Fails => { rollout.record(id, 2, Report::Failed("f".into()), 0, now); }
                }
            }
            for id in returns(&plan) {
                // The way back needs two tries.
                let at: usize = id[3..].parse().unwrap();
                let report = if missed.insert(at + 1000) { Report::Failed("f".into()) } else { Report::Confirmed };
                rollout.record(id, 3, report, 0, now);
            }
            // An old report comes again, of whomever.
            let id = format!("cam{}", echo.0);
            if rollout.members.get(&id).is_some_and(|m| m.progress != Progress::Pending) {
                rollout.record(&id, 2, echo.1.clone(), 0, now);
            }
        }
        prop_assert!(rollout.head.end.is_some());
        prop_assert_eq!(rollout.plan(&devices, None, 100_000).state, State::Ended);
        for member in rollout.members.values() {
            let name = member.progress.name();
            let confirmed = rollout.head.end == Some(End::Confirmed);
            let known = match name {
                "confirmed" => confirmed,
                "reverted" | "failed" => true,
                "returned" | "pending" => !confirmed,
                _ => false,
            };
            prop_assert!(known, "{} after {:?}", name, rollout.head.end);
        }
        prop_assert!(offered <= 2 * fates.len() + echoes.len());
    }
}

/// A report of a stage that the device was in before.
fn report_of_nothing_new() -> impl Strategy<Value = Report> {
    prop_oneof![Just(Report::Staged), Just(Report::Trial)]
}
