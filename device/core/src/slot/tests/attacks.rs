//! The rows of the attack matrix that are the slot's.

use super::*;

/// The floor in the record, under the key of all offers here.
fn floor(shell: &Shell) -> u64 {
    shell.record.floor.under(KEY, 0)
}

#[test]
fn attack_rollback_the_floor_rises_at_confirm_only() {
    let mut shell = on_trial();
    assert_eq!(floor(&shell), 1, "download and trial leave it");
    assert!(shell.reboot(usize::MAX));
    assert_eq!(floor(&shell), 1, "and so does a restart in the middle");
    let older = shell.slot.step(offer(1));
    assert!(matches!(&older[..], [Action::Report(r)] if r.state == SlotState::Confirmed));
    // The trial fails: the same release may come again, and an older one may not.
    shell.settle();
    let mut failed = on_trial();
    failed.step(Event::EngineFailed, usize::MAX);
    assert_eq!(reverted(&failed), SlotError::Engine.code());
    failed.settle();
    assert_eq!(floor(&failed), 1);
    failed.step(offer(2), usize::MAX);
    assert!(failed.record.candidate.is_some());

    assert_eq!((floor(&shell), shell.live), (2, Some(model(2).digest)));
    assert!(shell.reboot(usize::MAX));
    for n in [1, 2] {
        let replayed = Event::Offer {
            model: Held {
                sequence: n,
                ..model(50)
            },
            bounds: BOUNDS,
            key: KEY,
        };
        let actions = shell.slot.step(replayed);
        assert!(
            matches!(&actions[..], [Action::Report(r)] if r.code == TrustError::Rollback.code()),
            "{actions:?}"
        );
    }
    assert_eq!(shell.slot.record(), &shell.record, "nothing was written");
}

#[test]
fn attack_partial_bundle_power_fails_at_every_write() {
    // With model 1 live, model 2 is cut at every action of every step, and once more at each action
    // of the start after that: what runs was complete and proved, or is model 1.
    let steps = 4 + BOUNDS.frames as usize;
    for at in 0..steps {
        for cut in 0..MAX_ACTIONS {
            for again in 0..MAX_ACTIONS {
                let mut shell = Shell::new();
                shell.step(offer(1), usize::MAX);
                shell.settle();
                let mut event = Some(offer(2));
                for step in 0..steps {
                    let Some(next) = event.take().or_else(|| shell.next()) else {
                        break;
                    };
                    let whole = shell.step(next, if step == at { cut } else { usize::MAX });
                    if !whole {
                        let _ = shell.reboot(again) || shell.reboot(usize::MAX);
                        let running = shell.live.unwrap();
                        let confirmed = shell.record.live.map(|live| live.digest);
                        assert_eq!(confirmed, Some(running));
                        assert!(shell.packages.contains(&running), "{at} {cut} {again}");
                        assert!(running == model(1).digest || floor(&shell) == 2);
                        break;
                    }
                }
                shell.settle();
            }
        }
    }
}

#[test]
fn attack_drop_requests_the_last_good_model_stays() {
    let mut shell = Shell::new();
    shell.step(offer(1), usize::MAX);
    shell.settle();
    shell.step(offer(2), usize::MAX);
    // The bytes never come, over any number of restarts, which are not held against the model.
    for _ in 0..20 {
        assert!(shell.reboot(usize::MAX));
        assert_eq!(shell.live, Some(model(1).digest));
        let candidate = shell.record.candidate.unwrap();
        assert_eq!(
            (candidate.state, candidate.starts),
            (SlotState::Fetching, 0)
        );
        // The cloud is told again and again that it is still fetching.
        assert_eq!(shell.slot.report().unwrap().state, SlotState::Fetching);
    }
    // Then they do.
    shell.settle();
    assert_eq!(shell.live, Some(model(2).digest));
}

#[test]
fn attack_key_compromise_a_revoked_release_key_ends_its_candidate_over_a_power_cut() {
    let other = KeyId([8; 8]);
    for cut in 0..MAX_ACTIONS {
        for again in 0..MAX_ACTIONS {
            let mut shell = on_trial();
            if !shell.step(Event::Trusted { key: other }, cut) {
                let _ = shell.reboot(again) || shell.reboot(usize::MAX);
                // The shell says so at every start.
                shell.step(Event::Trusted { key: other }, usize::MAX);
            }
            assert!(shell.record.candidate.is_none());
            shell.settle();
            assert_eq!(shell.live, Some(model(1).digest), "{cut} {again}");
        }
    }
}
