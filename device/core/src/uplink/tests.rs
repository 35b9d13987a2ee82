//! The uplink in virtual time: alone, and against a server behind a lossy link.

use super::*;
use crate::sketch::mix;
use std::collections::{BTreeSet, VecDeque};
use std::vec::Vec;

mod attacks;

fn sleep_of(actions: &Actions) -> u64 {
    match actions.last() {
        Some(Action::Sleep { until_ms }) => *until_ms,
        other => panic!("the last action is {other:?}"),
    }
}

fn connects(actions: &Actions) -> Option<Transport> {
    actions.iter().find_map(|action| match action {
        Action::Connect(transport) => Some(*transport),
        _ => None,
    })
}

fn sends(actions: &Actions) -> bool {
    actions.iter().any(|a| matches!(a, Action::Send { .. }))
}

/// Brings a link online at `now`.
fn online(uplink: &mut Uplink, now: u64) -> Actions {
    uplink.step(now, Event::Tick, 0);
    let hello = uplink.step(now, Event::Connected, 0);
    assert!(hello.contains(&Action::SendHello));
    let actions = uplink.step(now, Event::Welcomed, 0);
    assert!(uplink.is_online());
    actions
}

const MANY: Event = Event::Pending {
    records: 1000,
    bytes: 1_000_000,
};

#[test]
fn nothing_is_sent_before_the_welcome() {
    let mut uplink = Uplink::new(UplinkConfig::default());
    for event in [Event::Tick, MANY, Event::HealthDue, Event::Connected] {
        let actions = uplink.step(5, event, 0);
        assert!(!sends(&actions) && !actions.contains(&Action::SendHealth));
    }
    let actions = uplink.step(6, Event::Welcomed, 0);
    assert_eq!(actions[0], Action::Rewind);
    assert!(sends(&actions) && actions.contains(&Action::SendHealth));
    assert!(!uplink.step(7, Event::Tick, 0).contains(&Action::SendHealth));
}

#[test]
fn four_batches_are_in_flight_at_most() {
    let mut uplink = Uplink::new(UplinkConfig::default());
    online(&mut uplink, 0);
    let mut asked = u32::from(sends(&uplink.step(0, MANY, 0)));
    for _ in 0..10 {
        asked += u32::from(sends(&uplink.step(1, Event::Sent { records: 64 }, 0)));
    }
    assert_eq!(asked, 4);
    assert_eq!(uplink.in_flight(), 4 * 64);
    assert!(!sends(&uplink.step(2, Event::Acked { records: 63 }, 0)));
    assert!(sends(&uplink.step(3, Event::Acked { records: 1 }, 0)));
}

#[test]
fn a_short_batch_waits_to_fill() {
    let mut uplink = Uplink::new(UplinkConfig::default());
    online(&mut uplink, 0);
    let one = Event::Pending {
        records: 1,
        bytes: 10,
    };
    let actions = uplink.step(100, one, 0);
    assert!(!sends(&actions));
    assert_eq!(sleep_of(&actions), 150);
    assert!(sends(&uplink.step(150, Event::Tick, 0)));
    // Nothing there after all: no second question until the spool says otherwise.
    let actions = uplink.step(151, Event::Sent { records: 0 }, 0);
    assert_eq!(sleep_of(&actions), u64::MAX);
}

#[test]
fn back_off_doubles_to_the_cap_and_stays_within_it() {
    let config = UplinkConfig {
        second: None,
        ..UplinkConfig::default()
    };
    let mut uplink = Uplink::new(config);
    let mut now = 0;
    for attempt in 0..20 {
        assert_eq!(
            connects(&uplink.step(now, Event::Tick, 0)),
            Some(Transport::Quic)
        );
        let draw = if attempt % 2 == 0 { 0 } else { u32::MAX };
        let until = sleep_of(&uplink.step(now, Event::Closed, draw));
        let ceiling = (200u64 << attempt).min(30_000);
        assert!(until - now >= ceiling / 2 && until - now <= ceiling);
        // A stale report of the same loss changes nothing.
        assert_eq!(sleep_of(&uplink.step(now, Event::Closed, draw)), until);
        now = until;
    }
}

#[test]
fn three_failures_change_the_transport_and_the_first_is_probed_again() {
    let mut uplink = Uplink::new(UplinkConfig::default());
    let mut now = 0;
    let mut tried = Vec::new();
    for _ in 0..4 {
        tried.push(connects(&uplink.step(now, Event::Tick, 0)).unwrap());
        if tried.len() < 4 {
            now = sleep_of(&uplink.step(now, Event::Closed, 0));
        }
    }
    use Transport::{Mqtt, Quic};
    assert_eq!(tried, [Quic, Quic, Quic, Mqtt]);
    uplink.step(now, Event::Connected, 0);
    let probe = sleep_of(&uplink.step(now, Event::Welcomed, 0));
    assert_eq!(probe, now + 60_000);
    // A vain probe goes back at once, and the next one comes later.
    let actions = uplink.step(probe, Event::Tick, 0);
    assert_eq!(actions[0], Action::Disconnect);
    assert_eq!(connects(&actions), Some(Quic));
    let back = sleep_of(&uplink.step(probe + 5, Event::Closed, 0));
    assert_eq!(connects(&uplink.step(back, Event::Tick, 0)), Some(Mqtt));
    uplink.step(back, Event::Connected, 0);
    let probe = sleep_of(&uplink.step(back, Event::Welcomed, 0));
    assert_eq!(probe, back + 120_000);
    // A probe that works stays.
    assert_eq!(connects(&uplink.step(probe, Event::Tick, 0)), Some(Quic));
    uplink.step(probe, Event::Connected, 0);
    let actions = uplink.step(probe, Event::Welcomed, 0);
    assert_eq!(sleep_of(&actions), u64::MAX);
    assert_eq!(uplink.transport(), Quic);
}

#[test]
fn a_probe_waits_for_batches_in_flight() {
    let mut uplink = Uplink::new(UplinkConfig {
        failures_to_switch: 1,
        probe_ms: 1_000,
        ..UplinkConfig::default()
    });
    uplink.step(0, Event::Tick, 0);
    let now = sleep_of(&uplink.step(0, Event::Closed, 0));
    online(&mut uplink, now);
    assert_eq!(uplink.transport(), Transport::Mqtt);
    uplink.step(now, MANY, 0);
    uplink.step(now, Event::Sent { records: 1000 }, 0);
    assert_eq!(connects(&uplink.step(now + 2_000, Event::Tick, 0)), None);
    let actions = uplink.step(now + 2_001, Event::Acked { records: 1000 }, 0);
    assert_eq!(connects(&actions), Some(Transport::Quic));
}

#[test]
fn a_connection_that_never_welcomes_fails() {
    let mut uplink = Uplink::new(UplinkConfig::default());
    uplink.step(0, Event::Tick, 0);
    let until = sleep_of(&uplink.step(3, Event::Connected, 0));
    assert_eq!(until, 10_000);
    assert_eq!(uplink.step(until, Event::Tick, 0)[0], Action::Disconnect);
}

#[test]
fn silence_resends_once_and_then_reconnects() {
    let mut uplink = Uplink::new(UplinkConfig::default());
    online(&mut uplink, 0);
    uplink.step(0, MANY, 0);
    let mut now = 0;
    for expected in [Action::Rewind, Action::Disconnect] {
        uplink.step(now, Event::Sent { records: 1000 }, 0);
        now += 10_000;
        let actions = uplink.step(now, Event::Tick, 0);
        assert_eq!(actions[0], expected);
        assert_eq!(uplink.in_flight(), 0);
        uplink.step(now, MANY, 0);
    }
    assert!(!uplink.is_online());
}

#[test]
fn refusals_pause_or_end_the_connection() {
    let refused = |code, retry_after_ms| Event::Refused {
        code,
        retry_after_ms,
    };
    let mut uplink = Uplink::new(UplinkConfig::default());
    online(&mut uplink, 0);
    uplink.step(0, MANY, 0);
    uplink.step(0, Event::Sent { records: 64 }, 0);
    let actions = uplink.step(10, refused(RefusedCode::Storage, 5_000), 0);
    assert!(actions.contains(&Action::Rewind) && !sends(&actions));
    assert!(!sends(&uplink.step(20, MANY, 0)));
    assert!(!sends(&uplink.step(5_009, Event::Tick, 0)));
    assert!(sends(&uplink.step(5_010, Event::Tick, 0)));
    assert_eq!(
        uplink
            .step(5_020, refused(RefusedCode::NotFound, 0), 0)
            .len(),
        1
    );
    let actions = uplink.step(5_030, refused(RefusedCode::Identity, 0), 0);
    assert_eq!(actions[0], Action::Disconnect);
    assert!(sleep_of(&actions) >= 5_030 + 15_000);
}

/// A server behind a link that loses, delays and cuts; seeded.
struct World {
    lot: u64,
    now: u64,
    /// Messages under way: when they arrive, on which connection, what.
    to_cloud: VecDeque<(u64, u32, Vec<u32>)>,
    to_device: VecDeque<(u64, u32, Reply)>,
    connection: u32,
    up: bool,
    stored: BTreeSet<u32>,
    unsent: BTreeSet<u32>,
    flying: Vec<u32>,
    acked: BTreeSet<u32>,
}

#[derive(Clone, Debug)]
enum Reply {
    Connected,
    Welcome,
    Ack(Vec<u32>),
    Full,
}

impl World {
    fn lot(&mut self, sides: u64) -> u64 {
        self.lot = self.lot.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.lot) % sides
    }

    fn reply(&mut self, reply: Reply) {
        let at = self.now + 1 + self.lot(300);
        self.to_device.push_back((at, self.connection, reply));
    }

    /// Performs actions; the events that follow at once.
    fn perform(&mut self, actions: &Actions) -> Vec<Event> {
        let mut events = Vec::new();
        let pending = |unsent: &BTreeSet<u32>| Event::Pending {
            records: unsent.len() as u32,
            bytes: unsent.len() as u64 * 900,
        };
        for action in actions {
            match *action {
                Action::Connect(_) => {
                    assert!(!self.up, "connects while connected");
                    self.connection += 1;
                    match self.lot(4) {
                        0 => events.push(Event::Closed),
                        // Not even an answer.
                        1 => self.up = true,
                        _ => {
                            self.up = true;
                            self.reply(Reply::Connected);
                        }
                    }
                }
                Action::Disconnect => self.up = false,
                Action::SendHello => {
                    self.reply(Reply::Welcome);
                }
                Action::Rewind => {
                    self.unsent.extend(self.flying.drain(..));
                    events.push(pending(&self.unsent));
                }
                Action::Send { max_records, .. } => {
                    let batch: Vec<u32> = self
                        .unsent
                        .iter()
                        .take(max_records as usize)
                        .copied()
                        .collect();
                    self.unsent.retain(|n| !batch.contains(n));
                    self.flying.extend(&batch);
                    events.push(Event::Sent {
                        records: batch.len() as u32,
                    });
                    // One in ten vanishes, as do all on a connection that is cut.
                    if self.lot(10) > 0 {
                        let at = self.now + 1 + self.lot(200);
                        self.to_cloud.push_back((at, self.connection, batch));
                    }
                }
                Action::SendHealth | Action::Sleep { .. } => {}
            }
        }
        events
    }

    /// Lets messages that are due arrive; the events at the device.
    fn deliver(&mut self) -> Vec<Event> {
        let now = self.now;
        let (due, later): (VecDeque<_>, _) = self.to_cloud.drain(..).partition(|m| m.0 <= now);
        self.to_cloud = later;
        for (_, connection, batch) in due {
            if connection != self.connection || !self.up {
                continue;
            }
            if self.lot(12) == 0 {
                self.reply(Reply::Full);
                continue;
            }
            self.stored.extend(&batch);
            // One answer in ten vanishes.
            if self.lot(10) > 0 {
                self.reply(Reply::Ack(batch));
            }
        }
        let (due, later): (VecDeque<_>, _) = self.to_device.drain(..).partition(|m| m.0 <= now);
        self.to_device = later;
        let mut events = Vec::new();
        for (_, connection, reply) in due {
            if connection != self.connection || !self.up {
                continue;
            }
            events.push(match reply {
                Reply::Connected => Event::Connected,
                Reply::Welcome => Event::Welcomed,
                Reply::Full => Event::Refused {
                    code: RefusedCode::Storage,
                    retry_after_ms: 100,
                },
                Reply::Ack(batch) => {
                    self.acked.extend(&batch);
                    self.unsent.retain(|n| !batch.contains(n));
                    let flying = self.flying.len();
                    self.flying.retain(|n| !batch.contains(n));
                    Event::Acked {
                        records: (flying - self.flying.len()) as u32,
                    }
                }
            });
        }
        if self.up && self.lot(60) == 0 {
            self.up = false;
            events.push(Event::Closed);
        }
        events
    }
}

#[test]
fn over_a_lossy_link_everything_is_acknowledged() {
    for seed in 0..40u64 {
        let mut world = World {
            lot: seed,
            now: 0,
            to_cloud: VecDeque::new(),
            to_device: VecDeque::new(),
            connection: 0,
            up: false,
            stored: BTreeSet::new(),
            unsent: (0..3000).collect(),
            flying: Vec::new(),
            acked: BTreeSet::new(),
        };
        let mut uplink = Uplink::new(UplinkConfig::default());
        let mut queue = VecDeque::from([
            Event::Pending {
                records: 3000,
                bytes: 2_700_000,
            },
            Event::Tick,
        ]);
        let mut steps = 0;
        while world.acked.len() < 3000 {
            let mut until = u64::MAX;
            while let Some(event) = queue.pop_front() {
                let draw = world.lot(1 << 32) as u32;
                let before = world.now;
                let actions = uplink.step(world.now, event, draw);
                until = sleep_of(&actions);
                assert!(until > before, "a sleep that does not sleep");
                assert!(uplink.in_flight() <= 4 * 64);
                queue.extend(world.perform(&actions));
                steps += 1;
            }
            // Whatever comes first: a message or the time it asked to be woken at.
            let arrives = world.to_cloud.iter().map(|m| m.0);
            let arrives = arrives.chain(world.to_device.iter().map(|m| m.0)).min();
            let next = until.min(arrives.unwrap_or(u64::MAX));
            assert_ne!(next, u64::MAX, "seed {seed}: stuck with {:?}", uplink);
            world.now = world.now.max(next);
            queue.extend(world.deliver());
            queue.push_back(Event::Tick);
            assert!(steps < 60_000, "seed {seed}: a busy loop");
            assert!(world.now < 24 * 3_600_000, "seed {seed}: hardly moves");
        }
        assert!(world.acked.is_subset(&world.stored));
    }
}
