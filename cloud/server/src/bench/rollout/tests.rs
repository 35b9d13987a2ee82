//! The benchmark's scenarios on a small fleet, and the controller cut at every single write.

use super::*;

const DEVICES: usize = 300;

#[test]
fn a_good_model_reaches_every_device() {
    let outcome = simulate(good(DEVICES, 3)).unwrap();
    assert_eq!(outcome.view.state, "confirmed");
    assert_eq!(ends(&outcome)["confirmed"], DEVICES as u64);
    assert_eq!(outcome.exposed.len(), DEVICES);
}

#[test]
fn a_bad_model_is_halted_at_once_and_whoever_took_it_goes_back() {
    let outcome = simulate(bad(DEVICES, 3)).unwrap();
    assert_eq!(outcome.view.state, "halted");
    assert!(outcome.halt_after_s.unwrap() <= HALT_S);
    assert!(outcome.exposed.len() as u64 <= open(&outcome));
    assert!(
        outcome.exposed.len() < DEVICES / 2,
        "{}",
        outcome.exposed.len()
    );
    let ends = ends(&outcome);
    assert!(ends["returned"] > 0 && ends["reverted"] > 0, "{ends:?}");
    assert_eq!(
        ends["returned"] + ends["reverted"] + ends["pending"],
        DEVICES as u64,
        "{ends:?}"
    );
    // The model before is the champion again, so that the next one is trained from it.
    assert!(
        outcome
            .decisions
            .iter()
            .any(|line| line.ends_with("is the champion again")),
        "{:?}",
        outcome.decisions
    );
}

#[test]
fn kills_losses_power_cuts_and_a_partition_leave_nobody_behind() {
    for seed in [3, 4] {
        let outcome = simulate(storm(DEVICES, seed)).unwrap();
        assert_eq!(outcome.view.state, "confirmed", "{:?}", outcome.view.reason);
        assert!(outcome.kills >= 6, "{}", outcome.kills);
        assert!(outcome.lost > 100, "{}", outcome.lost);
        let ends = ends(&outcome);
        let known: u64 = ["confirmed", "reverted", "excluded"]
            .iter()
            .filter_map(|end| ends.get(*end))
            .sum();
        assert_eq!(known, DEVICES as u64, "{ends:?}");
    }
}

#[test]
fn one_seed_one_outcome() {
    let states = |outcome: &Outcome| outcome.view.devices.clone();
    let (one, two) = (
        simulate(storm(100, 5)).unwrap(),
        simulate(storm(100, 5)).unwrap(),
    );
    assert_eq!(states(&one), states(&two));
    assert_eq!(one.decisions, two.decisions);
    assert_eq!(one.virtual_s, two.virtual_s);
}

#[test]
fn cut_at_any_write_the_controller_goes_on_where_it_was() {
    // Small, with an exclusion, failures, several waves and a way back.
    let small = |failing: f64, cut| Conditions {
        failing,
        excluded: 1,
        cut,
        policy_toml: r#"
            canary = 2
            canary_max_failed = 2
            waves = ["50%"]
            max_failed = 1
            [gate]
            # So long that the exclusion comes before the end, whatever is cut.
            soak_s = 30
        "#
        .to_owned(),
        ..conditions(12, 11)
    };
    for failing in [0.0, 0.5] {
        let whole = simulate(small(failing, None)).unwrap();
        assert_eq!(whole.view.state == "halted", failing > 0.0);
        assert!(whole.writes > 10, "{}", whole.writes);
        for write in 0..whole.writes {
            for applied in [false, true] {
                let outcome = simulate(small(failing, Some((write, applied)))).unwrap();
                assert_eq!(outcome.view.state, whole.view.state, "write {write}");
                assert_eq!(outcome.view.wave, whole.view.wave, "write {write}");
                assert_eq!(outcome.kills, 1, "write {write}");
                let members: u64 = ends(&outcome).values().sum();
                assert_eq!(members, 12, "write {write}");
                if failing == 0.0 {
                    assert_eq!(ends(&outcome), ends(&whole), "write {write}");
                }
            }
        }
    }
}

#[test]
fn offers_and_reconnects_are_all_served() {
    let dir = tempfile::tempdir().unwrap();
    let conditions = Conditions {
        policy_toml: "canary = \"100%\"\n".to_owned(),
        ..conditions(DEVICES, 1)
    };
    let rush = World::new(dir.path(), conditions)
        .unwrap()
        .rush(30_000)
        .unwrap();
    assert_eq!((rush.offers, rush.answered), (DEVICES, DEVICES));
    assert!(rush.peak < DEVICES as u64 / 10, "{}", rush.peak);
}
