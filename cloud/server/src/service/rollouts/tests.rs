//! What the controller says to operators, and that reports are durable when it has answered.

use cloud_core::rollout::Device;
use flywheel_shared::message::SlotState;

use super::*;
use crate::api::types::{ActRequest, RolloutAction, RolloutRequest};
use crate::bench::rollout::cloud::{Brittle, Cloud};
use crate::ingest::OwnedSlotReport;
use crate::store::Commit;
use crate::store::fixtures::{sample, unsigned};
use flywheel_shared::message::{Lane, Record, Sample, Scores};
use flywheel_shared::trust::Offer;

const NOW: u64 = 1_800_000_000_000;

struct World {
    _dir: tempfile::TempDir,
    cloud: Cloud,
    rollouts: Rollouts,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::open(dir.path()).unwrap();
    let shelf = Brittle::new(cloud.store.clone(), u64::MAX, false);
    let rollouts = cloud.controller(shelf).unwrap();
    World {
        _dir: dir,
        cloud,
        rollouts,
    }
}

fn fleet(n: usize) -> Vec<Device> {
    let device = |at| Device {
        id: format!("cam{at:02}"),
        group: "north".to_owned(),
        sequence: 1,
        online: true,
        ..Device::default()
    };
    (0..n).map(device).collect()
}

fn request(world: &World, policy_toml: Option<&str>) -> RolloutRequest {
    RolloutRequest {
        model: world.cloud.new.clone(),
        policy_toml: policy_toml.map(str::to_owned),
        ..RolloutRequest::default()
    }
}

fn because(reason: &str) -> ActRequest {
    ActRequest {
        reason: reason.to_owned(),
        ..ActRequest::default()
    }
}

fn report(sequence: u64, state: SlotState) -> OwnedSlotReport {
    OwnedSlotReport {
        manifest: flywheel_shared::ids::Digest([1; 32]),
        sequence,
        state,
        code: 0,
        detail: String::new(),
        trial_frames: 0,
        max_latency_us: 0,
    }
}

fn sequence_of(offer: &OfferBytes) -> u64 {
    postcard::from_bytes::<Offer>(&offer.offer)
        .unwrap()
        .sequence
}

#[test]
fn bad_requests_name_the_field() {
    let world = world();
    for (policy, to, word) in [
        (Some("canery = 1"), None, "canery"),
        (
            Some("[gate]\nmin_confirmed = 1.5"),
            None,
            "gate.min_confirmed must be above 0",
        ),
        (Some("canary = \"some\""), None, "whole percentage"),
        (Some("waves = [50, 20]"), None, "waves must be ascending"),
        (None, Some("colour=red"), "`colour=red` names no devices"),
    ] {
        let request = RolloutRequest {
            to: to.map(str::to_owned),
            ..request(&world, policy)
        };
        let error = world
            .rollouts
            .preview(&request, &fleet(3), NOW)
            .unwrap_err();
        assert!(matches!(error, Fault::Invalid(_)), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    let both = RolloutRequest {
        policy: Some("all".to_owned()),
        ..request(&world, Some("canary = 1"))
    };
    assert!(world.rollouts.start(&both, &fleet(3), NOW).is_err());
    let nobody = world.rollouts.start(&request(&world, None), &[], NOW);
    assert!(nobody.unwrap_err().to_string().contains("enrol one first"));
    assert!(world.rollouts.list(&[], NOW).is_empty());
    assert!(world.rollouts.log(0, 10).unwrap().is_empty());
}

#[test]
fn a_plan_is_what_a_start_does() {
    let world = world();
    let mut devices = fleet(10);
    devices[3].online = false;
    devices[4].sequence = 2;
    let request = request(
        &world,
        Some("canary = 2\nwaves = [\"50%\"]\n[gate]\nsoak_s = 60"),
    );
    let plan = world.rollouts.preview(&request, &devices, NOW).unwrap();
    assert!(world.rollouts.list(&devices, NOW).is_empty());
    assert_eq!(
        plan.waves.iter().map(Vec::len).collect::<Vec<_>>(),
        [2, 3, 4]
    );
    assert_eq!(plan.away, ["cam03"]);
    assert_eq!(plan.skipped.len(), 1);
    assert_eq!((plan.least_seconds, plan.back), (180, Some(3)));
    world.rollouts.start(&request, &devices, NOW).unwrap();
    let offers = world.rollouts.advance(&devices, NOW).unwrap();
    let mut offered: Vec<String> = offers.iter().map(|(id, _)| id.to_string()).collect();
    offered.sort();
    let mut canaries = plan.waves[0].clone();
    canaries.sort();
    assert_eq!(offered, canaries);
    let second = world.rollouts.start(&request, &devices, NOW).unwrap_err();
    assert!(second.to_string().contains("still running"), "{second}");
}

#[test]
fn operators_steer_with_reasons_and_all_of_it_is_in_the_log() {
    let world = world();
    let devices = fleet(4);
    let rollouts = &world.rollouts;
    rollouts
        .start(&request(&world, None), &devices, NOW)
        .unwrap();
    let act = |action, request: &ActRequest| rollouts.act("1", action, request, &devices, NOW);
    let silent = act(RolloutAction::Pause, &because(" ")).unwrap_err();
    assert!(silent.to_string().contains("say why"), "{silent}");
    assert_eq!(
        act(RolloutAction::Pause, &because("storm")).unwrap().state,
        "paused"
    );
    assert!(rollouts.advance(&devices, NOW).unwrap().is_empty());
    act(RolloutAction::Resume, &because("")).unwrap();
    assert_eq!(rollouts.advance(&devices, NOW).unwrap().len(), 1);
    act(RolloutAction::Force, &because("soaked by hand")).unwrap();
    assert_eq!(rollouts.advance(&devices, NOW).unwrap().len(), 3);
    let unknown = ActRequest {
        device: Some("cam99".to_owned()),
        ..because("broken")
    };
    assert!(matches!(
        act(RolloutAction::Exclude, &unknown),
        Err(Fault::NotFound(_))
    ));
    let named = ActRequest {
        device: Some("cam00".to_owned()),
        ..unknown
    };
    let view = act(RolloutAction::Exclude, &named).unwrap();
    assert_eq!(view.devices["cam00"].detail.as_deref(), Some("broken"));
    let back = ActRequest {
        back: Some(true),
        ..because("wrong model")
    };
    let view = act(RolloutAction::Abort, &back).unwrap();
    assert_eq!((view.state.as_str(), view.returning), ("aborted", 3));
    let champion = world.cloud.registry.champion().unwrap().unwrap();
    assert_eq!(champion.id, world.cloud.old);
    let offers = rollouts.advance(&devices, NOW).unwrap();
    assert!(offers.iter().all(|(_, offer)| sequence_of(offer) == 3));
    assert_eq!(offers.len(), 3);
    assert!(
        act(RolloutAction::Pause, &because("late"))
            .unwrap_err()
            .to_string()
            .contains("ended")
    );

    let mut verifier = log::Verifier::new(vec![world.cloud.log_key()]);
    let words: Vec<String> = rollouts
        .log(0, 100)
        .unwrap()
        .iter()
        .map(|line| verifier.line(line).unwrap().event.words())
        .collect();
    for (line, beginning) in words.iter().zip([
        "started",
        "paused: storm",
        "resumed",
        "offered to cam",
        "the gate behind wave 0 forced: soaked by hand",
        "wave 1 opened: the operator forced it",
        "offered to cam",
        "cam00 excluded: broken",
        "aborted: wrong model; devices that took it go back",
        "model ",
        "the model before offered to cam",
    ]) {
        assert!(line.starts_with(beginning), "{words:#?}");
    }
    assert_eq!(words.len(), 11, "{words:#?}");
}

#[test]
fn whoever_joins_later_gets_the_right_model() {
    let world = world();
    let mut devices = fleet(2);
    let request = RolloutRequest {
        to: Some("north".to_owned()),
        policy: Some("all".to_owned()),
        ..request(&world, None)
    };
    world.rollouts.start(&request, &devices, NOW).unwrap();
    world.rollouts.advance(&devices, NOW).unwrap();
    let new = |group: &str| Device {
        id: "new".to_owned(),
        group: group.to_owned(),
        online: true,
        ..Device::default()
    };
    let standing = |device: &Device, busy| {
        let offer = world.rollouts.standing_offer(device, busy, NOW).unwrap();
        offer.map(|offer| sequence_of(&offer))
    };
    // While it runs, only those that were offered the model have an offer.
    assert_eq!(standing(&devices[0], false), Some(2));
    assert_eq!(standing(&devices[0], true), None);
    assert_eq!(standing(&new("north"), false), None);
    for device in &mut devices {
        let id = device.id.parse().unwrap();
        world
            .rollouts
            .record(&id, &report(2, SlotState::Confirmed), NOW)
            .unwrap();
        device.sequence = 2;
    }
    world.rollouts.advance(&devices, NOW).unwrap();
    assert_eq!(
        world.rollouts.view("1", &devices, NOW, true).unwrap().state,
        "confirmed"
    );
    assert_eq!(standing(&devices[0], false), None);
    assert_eq!(standing(&new("north"), false), Some(2));
    assert_eq!(standing(&new("south"), false), None);
    // What becomes of it is known.
    let id = "new".parse().unwrap();
    world
        .rollouts
        .record(&id, &report(2, SlotState::Confirmed), NOW)
        .unwrap();
    let view = world.rollouts.view("1", &devices, NOW, true).unwrap();
    assert_eq!(view.devices["new"].state, "confirmed");
}

#[test]
fn reports_of_many_threads_are_durable_when_answered() {
    let world = world();
    let devices = fleet(40);
    let request = RolloutRequest {
        policy: Some("all".to_owned()),
        ..request(&world, None)
    };
    world.rollouts.start(&request, &devices, NOW).unwrap();
    world.rollouts.advance(&devices, NOW).unwrap();
    std::thread::scope(|scope| {
        for device in &devices {
            let rollouts = &world.rollouts;
            scope.spawn(move || {
                let id = device.id.parse().unwrap();
                for state in [SlotState::Fetching, SlotState::Trial, SlotState::Confirmed] {
                    rollouts.record(&id, &report(2, state), NOW).unwrap();
                }
            });
        }
    });
    let shelf = Brittle::new(world.cloud.store.clone(), u64::MAX, false);
    let again = world.cloud.controller(shelf).unwrap();
    let view = |rollouts: &Rollouts| rollouts.view("1", &devices, NOW, true).unwrap().devices;
    assert_eq!(view(&again), view(&world.rollouts));
    assert!(
        view(&again)
            .values()
            .all(|device| device.state == "confirmed")
    );
    let mut verifier = log::Verifier::new(vec![world.cloud.log_key()]);
    for line in again.log(0, 1000).unwrap() {
        verifier.line(&line).unwrap();
    }
    assert!(again.advance(&devices, NOW).unwrap().is_empty());
    assert_eq!(
        again.view("1", &devices, NOW, false).unwrap().state,
        "confirmed"
    );
}

#[test]
fn a_store_that_fails_leaves_everything_as_it_was() {
    let world = world();
    let devices = fleet(3);
    let shelf = Brittle::new(world.cloud.store.clone(), 2, false);
    let rollouts = world.cloud.controller(shelf).unwrap();
    rollouts
        .start(&request(&world, None), &devices, NOW)
        .unwrap();
    let offers = rollouts.advance(&devices, NOW).unwrap();
    let canary = offers[0].0.clone();
    let before = rollouts.view("1", &devices, NOW, true).unwrap().devices;
    assert!(
        rollouts
            .record(&canary, &report(2, SlotState::Trial), NOW)
            .is_err()
    );
    assert!(
        rollouts
            .act("1", RolloutAction::Pause, &because("x"), &devices, NOW)
            .is_err()
    );
    assert_eq!(
        rollouts.view("1", &devices, NOW, true).unwrap().devices,
        before
    );
    assert_eq!(rollouts.log(0, 100).unwrap().len(), 2);
}

/// Commits uniform samples that a model scored with a confidence.
fn uniform(
    world: &World,
    device: &str,
    numbers: std::ops::Range<u32>,
    model: &str,
    confidence: f32,
) {
    let digest = world.cloud.registry.manifests(model).unwrap()[0];
    let records: Vec<Record<'_>> = numbers
        .map(|seq| match sample(seq, b"picture") {
            Record::Sample(sample) => Record::Sample(Sample {
                lane: Lane::Uniform,
                model: evidence::prefix(&digest),
                scores: Scores {
                    confidence: confidence + (seq % 7) as f32 * 1e-4,
                    ..sample.scores
                },
                ..sample
            }),
            loss => loss,
        })
        .collect();
    let batch = unsigned(1, &records);
    let commit = Commit::new(&device.parse().unwrap(), NOW, &batch).unwrap();
    world.cloud.store.commit_blocking(commit).unwrap();
}

#[test]
fn confidence_on_the_uniform_lane_opens_the_next_wave_or_halts() {
    for (confidence, halts) in [(0.9, false), (0.5, true)] {
        let world = world();
        let devices = fleet(3);
        // What was seen before the rollout does not count.
        uniform(&world, "cam01", 1..40, &world.cloud.old, 0.1);
        let policy = "[gate.drift]\nmin_samples = 20";
        world
            .rollouts
            .start(&request(&world, Some(policy)), &devices, NOW)
            .unwrap();
        let canary = world.rollouts.advance(&devices, NOW).unwrap()[0].0.clone();
        world
            .rollouts
            .record(&canary, &report(2, SlotState::Confirmed), NOW)
            .unwrap();
        uniform(&world, "cam01", 40..80, &world.cloud.old, 0.9);
        uniform(&world, "cam02", 1..11, &world.cloud.new, confidence);
        assert!(world.rollouts.advance(&devices, NOW).unwrap().is_empty());
        let view = world.rollouts.view("1", &devices, NOW, false).unwrap();
        let waits_for = view.waits_for.unwrap();
        assert!(
            waits_for.starts_with("10 uniform samples under the model and 40"),
            "{waits_for}"
        );
        uniform(&world, "cam02", 11..31, &world.cloud.new, confidence);
        // A controller that has just started reads the same.
        let shelf = Brittle::new(world.cloud.store.clone(), u64::MAX, false);
        let again = world.cloud.controller(shelf).unwrap();
        let offers = again.advance(&devices, NOW).unwrap();
        let view = again.view("1", &devices, NOW, false).unwrap();
        if halts {
            assert!(offers.is_empty());
            let reason = view.reason.unwrap();
            assert!(
                reason.starts_with("confidence on the uniform lane fell from 0.90 to 0.50"),
                "{reason}"
            );
        } else {
            assert_eq!((offers.len(), view.wave), (2, 1));
        }
    }
}
