//! The gate lets better models through, stops worse ones, and says why.

use super::*;

fn digest(n: u32) -> Digest {
    Digest::of(&n.to_le_bytes())
}

/// Per class: items, then how many of them (from the front) the champion and (from the back) the
/// candidate get wrong.
fn cases(classes: &[(u32, u32, u32)]) -> Vec<Case> {
    let mut all = Vec::new();
    for (class, &(items, champion_wrong, candidate_wrong)) in (0..).zip(classes) {
        for i in 0..items {
            all.push(Case {
                digest: digest(u32::try_from(all.len()).unwrap()),
                class,
                champion: i >= champion_wrong,
                candidate: i < items - candidate_wrong,
            });
        }
    }
    all
}

fn run(policy: &GatePolicy, cases: &[Case], change: impl Fn(&mut Comparison<'_>)) -> Verdict {
    let classes: Vec<String> = (0..16).map(|i| format!("class {i}")).collect();
    let training = BTreeSet::from([digest(1_000_000)]);
    let mut comparison = Comparison {
        classes: &classes,
        cases,
        slices: &[],
        has_champion: true,
        latency_us: (100, 120),
        training: &training,
    };
    change(&mut comparison);
    judge(policy, &comparison).unwrap()
}

#[test]
fn a_clearly_better_model_passes_and_an_equal_one_does_not() {
    let policy = GatePolicy::default();
    let better = run(&policy, &cases(&[(50, 10, 3), (50, 20, 4)]), |_| {});
    assert!(better.passed, "{:?}", better.reasons);
    let gain = better.gain.unwrap();
    assert!((gain.mean - 0.23).abs() < 1e-12);
    assert!(gain.lower > 0.1 && gain.lower < gain.mean && gain.mean < gain.upper);
    assert!(better.reasons[0].contains("balanced accuracy 0.700 → 0.930"));

    let equal = run(&policy, &cases(&[(50, 5, 5), (50, 5, 5)]), |_| {});
    assert!(!equal.passed);
    assert!(equal.reasons[0].starts_with("not better enough"));
}

#[test]
fn a_lost_class_is_refused_however_much_the_rest_gains() {
    let counts = [(50, 25, 2), (50, 25, 2), (50, 2, 20)];
    let verdict = run(&GatePolicy::default(), &cases(&counts), |_| {});
    assert!(verdict.gain.unwrap().mean > 0.1);
    assert!(!verdict.passed);
    assert_eq!(verdict.reasons.len(), 1);
    assert!(verdict.reasons[0].starts_with("`class 2` got worse: 0.960 → 0.600 on 50 items"));

    let lifted = GatePolicy {
        max_drop_of: BTreeMap::from([("class 2".to_owned(), 1.0)]),
        ..GatePolicy::default()
    };
    assert!(run(&lifted, &cases(&counts), |_| {}).passed);
}

#[test]
fn a_slip_within_noise_is_not_a_regression() {
    let verdict = run(
        &GatePolicy::default(),
        &cases(&[(50, 20, 3), (50, 2, 5)]),
        |_| {},
    );
    assert!(verdict.passed, "{:?}", verdict.reasons);
    assert!(verdict.slices[1].difference.mean < -0.05);
}

#[test]
fn equal_models_rarely_fail_on_a_class_and_a_real_loss_rarely_slips_through() {
    // 16 classes of 50; both models are wrong independently, the candidate more often in class 0.
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let policy = GatePolicy {
        resamples: 300,
        ..GatePolicy::default()
    };
    let mut refused = |loss: f64| {
        (0..60)
            .filter(|_| {
                let mut all = Vec::new();
                for class in 0..16 {
                    let worse = if class == 0 { loss } else { 0.0 };
                    for _ in 0..50 {
                        all.push(Case {
                            digest: digest(u32::try_from(all.len()).unwrap()),
                            class,
                            champion: rng.random_bool(0.95),
                            candidate: rng.random_bool(0.95 - worse),
                        });
                    }
                }
                run(&policy, &all, |_| {})
                    .slices
                    .iter()
                    .any(|s| s.regressed)
            })
            .count()
    };
    let (false_alarms, found) = (refused(0.0), refused(0.3));
    assert!(false_alarms <= 9, "{false_alarms} of 60 false alarms");
    assert!(found >= 54, "{found} of 60 real losses found");
}

#[test]
fn a_slice_is_guarded_like_a_class() {
    let all = cases(&[(60, 30, 0), (60, 0, 12)]);
    let night: Vec<usize> = (105..120).collect();
    let slices = [Slice {
        name: "night".into(),
        items: night,
    }];
    let policy = GatePolicy {
        max_drop_of: BTreeMap::from([("class 1".to_owned(), 1.0)]),
        ..GatePolicy::default()
    };
    assert!(run(&policy, &all, |_| {}).passed);
    let classes: Vec<String> = (0..2).map(|i| format!("class {i}")).collect();
    let training = BTreeSet::new();
    let comparison = Comparison {
        classes: &classes,
        cases: &all,
        slices: &slices,
        has_champion: true,
        latency_us: (0, 0),
        training: &training,
    };
    let verdict = judge(&policy, &comparison).unwrap();
    assert!(!verdict.passed);
    assert!(verdict.reasons[0].starts_with("`night` got worse"));
}

#[test]
fn leaks_and_slowness_are_refused_in_words() {
    let policy = GatePolicy::default();
    let all = cases(&[(50, 25, 2)]);
    let leaked = BTreeSet::from([digest(3), digest(4)]);
    let classes = ["class 0".to_owned()];
    let comparison = Comparison {
        classes: &classes,
        cases: &all,
        slices: &[],
        has_champion: true,
        latency_us: (100, 260),
        training: &leaked,
    };
    let verdict = judge(&policy, &comparison).unwrap();
    assert!(!verdict.passed);
    assert!(verdict.reasons[0].starts_with("2 of 50 evaluation items were trained on"));
    assert!(verdict.reasons[1].starts_with("too slow: 260 µs against 100 µs"));
}

#[test]
fn a_first_model_needs_only_the_floor() {
    let first = |c: &mut Comparison<'_>| c.has_champion = false;
    let good = run(&GatePolicy::default(), &cases(&[(50, 0, 20)]), first);
    assert!(good.passed && good.gain.is_none());
    let bad = run(&GatePolicy::default(), &cases(&[(50, 0, 40)]), first);
    assert!(!bad.passed);
    assert!(bad.reasons[0].contains("0.200, the floor is 0.250"));
}

#[test]
fn balanced_accuracy_and_accuracy_differ_on_uneven_classes() {
    let all = cases(&[(900, 0, 9), (10, 10, 0)]);
    let balanced = run(&GatePolicy::default(), &all, |_| {});
    assert!(balanced.passed, "{:?}", balanced.reasons);
    let plain = GatePolicy {
        metric: Metric::Accuracy,
        ..GatePolicy::default()
    };
    let plain = run(&plain, &all, |_| {});
    assert!(plain.gain.unwrap().mean < 0.01);
    assert!((plain.candidate - 901.0 / 910.0).abs() < 1e-12);
}

#[test]
fn the_same_seed_gives_the_same_verdict() {
    let all = cases(&[(50, 10, 8), (40, 5, 6)]);
    let with = |seed| {
        let policy = GatePolicy {
            seed,
            ..GatePolicy::default()
        };
        run(&policy, &all, |_| {})
    };
    assert_eq!(with(1), with(1));
    assert_ne!(with(1).probability, with(2).probability);
}

#[test]
fn nonsense_is_an_error() {
    let classes = ["a".to_owned()];
    let training = BTreeSet::new();
    let all = cases(&[(5, 0, 0)]);
    let base = Comparison {
        classes: &classes,
        cases: &all,
        slices: &[],
        has_champion: true,
        latency_us: (0, 0),
        training: &training,
    };
    let policy = GatePolicy::default();
    let empty = Comparison { cases: &[], ..base };
    assert_eq!(judge(&policy, &empty), Err(GateError::Empty));
    let unnamed = Comparison {
        classes: &[],
        ..base
    };
    assert!(matches!(
        judge(&policy, &unnamed),
        Err(GateError::Class { case: 0, .. })
    ));
    let slices = [Slice {
        name: "x".into(),
        items: vec![5],
    }];
    let beyond = Comparison {
        slices: &slices,
        ..base
    };
    assert!(matches!(
        judge(&policy, &beyond),
        Err(GateError::Slice { item: 5, .. })
    ));
    for (bad, field) in [
        (
            GatePolicy {
                resamples: 0,
                ..policy.clone()
            },
            "resamples",
        ),
        (
            GatePolicy {
                max_drop: f64::NAN,
                ..policy.clone()
            },
            "max_drop",
        ),
        (
            GatePolicy {
                floor: 2.0,
                ..policy.clone()
            },
            "floor",
        ),
    ] {
        match judge(&bad, &base) {
            Err(GateError::Policy { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
}
