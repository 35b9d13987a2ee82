//! The rows of the attack matrix that are the link's.

use super::*;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Random bits from a seed and a place.
fn draw(seed: u64, at: u64) -> u32 {
    (mix(seed ^ at.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 32) as u32
}

const HOUR_MS: u64 = 3_600_000;

/// Connections come up, and nothing that is sent ever arrives: for a day, then no more.
#[test]
fn attack_drop_requests_backs_off_and_keeps_what_it_has() {
    for seed in 0..20u64 {
        let mut uplink = Uplink::new(UplinkConfig::default());
        let (mut now, mut attempts, mut steps) = (0u64, 0u64, 0u64);
        let mut last_attempt = None;
        let mut events = VecDeque::from([MANY]);
        while now < 24 * HOUR_MS {
            let event = events.pop_front().unwrap_or(Event::Tick);
            let actions = uplink.step(now, event, draw(seed, steps));
            steps += 1;
            for action in &actions {
                match action {
                    Action::Connect(_) => {
                        attempts += 1;
                        // Half the cap apart once the back-off is at its end.
                        let apart = last_attempt.map_or(u64::MAX, |last| now - last);
                        assert!(attempts < 12 || apart >= 10_000, "{attempts} {apart}");
                        last_attempt = Some(now);
                        events.push_back(Event::Connected);
                    }
                    // Sent into the void.
                    Action::Send { .. } => events.push_back(Event::Sent { records: 64 }),
                    _ => {}
                }
            }
            if events.is_empty() {
                now = sleep_of(&actions);
            }
            assert!(steps < 100_000, "a busy loop");
        }
        // A day holds 86,400 seconds: one attempt for each 25 s at most.
        assert!(attempts < 86_400 / 20, "{attempts}");
        assert_eq!(uplink.in_flight(), 0, "nothing counts as delivered");
        // The attack is over: within one back-off and one timeout the link is up and sends.
        let deadline = now + 60_000;
        loop {
            let actions = uplink.step(now, Event::Tick, draw(seed, steps));
            steps += 1;
            if connects(&actions).is_some() {
                uplink.step(now, Event::Connected, 0);
                uplink.step(now, Event::Welcomed, 0);
                break;
            }
            now = sleep_of(&actions);
            assert!(now < deadline);
        }
        assert!(uplink.is_online());
        uplink.step(now, MANY, 0);
        let actions = uplink.step(now + 1000, Event::Tick, 0);
        assert!(uplink.sending || sends(&actions));
    }
}

/// Ten thousand devices lose their server at the same moment. It comes back able to take 500 of them
/// a second, and turns the others away at once.
#[test]
fn attack_server_overload_ten_thousand_reconnect_at_once() {
    const DEVICES: usize = 10_000;
    const ADMITTED_A_SECOND: u32 = 500;
    let mut fleet: Vec<Uplink> = (0..DEVICES)
        .map(|_| {
            let mut uplink = Uplink::new(UplinkConfig::default());
            online(&mut uplink, 0);
            // Long enough online that the back-off starts anew.
            uplink.step(60_000, Event::Tick, 0);
            uplink
        })
        .collect();
    let lost_ms = 60_000;
    let mut wakes = BinaryHeap::new();
    for (device, uplink) in fleet.iter_mut().enumerate() {
        let actions = uplink.step(lost_ms, Event::Closed, draw(1, device as u64));
        wakes.push(Reverse((sleep_of(&actions), device)));
    }
    let mut attempts = std::vec![0u32; 3_600];
    let mut admitted = std::vec![0u32; 3_600];
    let (mut up, mut steps) = (0, 0u64);
    let mut last_up_ms = 0;
    while up < DEVICES {
        let Reverse((now, device)) = wakes.pop().unwrap();
        let second = ((now - lost_ms) / 1000) as usize;
        steps += 1;
        let uplink = &mut fleet[device];
        let actions = uplink.step(now, Event::Tick, draw(2, steps));
        if connects(&actions).is_none() {
            wakes.push(Reverse((sleep_of(&actions), device)));
            continue;
        }
        attempts[second] += 1;
        if admitted[second] < ADMITTED_A_SECOND {
            admitted[second] += 1;
            uplink.step(now, Event::Connected, 0);
            uplink.step(now, Event::Welcomed, 0);
            assert!(uplink.is_online());
            up += 1;
            last_up_ms = now - lost_ms;
        } else {
            let actions = uplink.step(now, Event::Closed, draw(3, steps));
            wakes.push(Reverse((sleep_of(&actions), device)));
        }
    }
    let total: u32 = attempts.iter().sum();
    // The first rush is one attempt or two of each device, then the back-off thins it out.
    assert!(attempts[0] <= 3 * DEVICES as u32, "{}", attempts[0]);
    for (second, count) in attempts.iter().enumerate().skip(6) {
        assert!(*count <= DEVICES as u32 / 4, "second {second}: {count}");
    }
    for (second, count) in attempts.iter().enumerate().skip(15) {
        assert!(*count <= 2 * ADMITTED_A_SECOND, "second {second}: {count}");
    }
    assert!(total <= 6 * DEVICES as u32, "{total} attempts");
    // 20 s is what the server itself needs.
    assert!(last_up_ms <= 60_000, "{last_up_ms} ms");
    std::println!(
        "{total} attempts, {} in the first second, all up after {last_up_ms} ms",
        attempts[0]
    );
}

/// No two devices that lost the same server wait alike, and none waits for nothing.
#[test]
fn attack_server_overload_jitter_spreads_the_first_attempts() {
    let mut slots = [0u32; 10];
    for device in 0..10_000u64 {
        let mut uplink = Uplink::new(UplinkConfig::default());
        online(&mut uplink, 0);
        let actions = uplink.step(20_000, Event::Closed, draw(5, device));
        let wait = sleep_of(&actions) - 20_000;
        assert!((100..=200).contains(&wait), "{wait}");
        slots[((wait - 100) / 10).min(9) as usize] += 1;
    }
    for count in slots {
        assert!((800..=1_300).contains(&count), "{slots:?}");
    }
}
