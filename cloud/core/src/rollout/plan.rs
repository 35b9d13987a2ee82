//! The planner itself: what to do next, as a function of a rollout, the devices, the measurements
//! and the time.

use super::gate::{self, Confidence, Known, Verdict};
use super::{Control, Decision, Device, End, Plan, Progress, Rollout, State};
use std::collections::HashMap;

impl Rollout {
    /// What to do at `now_ms`. One pass over devices and inventory.
    #[must_use]
    pub fn plan(&self, inventory: &[Device], confidence: Option<&Confidence>, now_ms: u64) -> Plan {
        let by_id: HashMap<&str, &Device> = inventory.iter().map(|d| (d.id.as_str(), d)).collect();
        if self.head.end.is_some() {
            return self.plan_return(&by_id, now_ms);
        }
        let mut decisions = self.joins(inventory);
        decisions.extend(self.seen(&by_id));
        if !decisions.is_empty() {
            // What follows from these is decided on the state in which they are made.
            let mut next = self.clone();
            for decision in &decisions {
                next.decide(decision, now_ms);
            }
            let mut plan = next.plan_wave(&by_id, confidence, now_ms);
            decisions.append(&mut plan.decisions);
            plan.decisions = decisions;
            return plan;
        }
        self.plan_wave(&by_id, confidence, now_ms)
    }

    fn plan_wave(
        &self,
        by_id: &HashMap<&str, &Device>,
        confidence: Option<&Confidence>,
        now_ms: u64,
    ) -> Plan {
        let known: Vec<Known<'_>> = self
            .members
            .iter()
            .map(|(id, member)| (id.as_str(), member, by_id.get(id.as_str()).copied()))
            .collect();
        let halt = |reason: String| Plan {
            decisions: vec![Decision::End(End::Halted { reason })],
            state: State::Ended,
        };
        if let Some(reason) = gate::exceeded(self, &known, confidence) {
            return halt(reason);
        }
        if self.head.control == Control::Paused {
            return Plan {
                decisions: Vec::new(),
                state: State::Paused {
                    wave: self.head.wave,
                },
            };
        }
        let mut decisions = Vec::new();
        let (mut wave, mut opened_ms) = (self.head.wave, self.head.opened_ms);
        let waits_for = match gate::of_wave(self, wave, &known, confidence, now_ms) {
            Verdict::Halt(reason) => return halt(reason),
            Verdict::Wait(reason) => reason,
            Verdict::Pass(_) if wave + 1 >= self.head.waves => {
                if known.iter().all(|known| self.is_done(known)) {
                    return Plan {
                        decisions: vec![Decision::End(End::Confirmed)],
                        state: State::Ended,
                    };
                }
                "devices of earlier waves, or that are away".to_owned()
            }
            Verdict::Pass(reason) => {
                wave += 1;
                opened_ms = now_ms;
                decisions.push(Decision::Open { wave, reason });
                "the answers of the wave that has just opened".to_owned()
            }
        };
        self.offer(&known, wave, opened_ms, now_ms, &mut decisions);
        Plan {
            decisions,
            state: State::Running { wave, waits_for },
        }
    }

    /// Adds the offers that are due.
    fn offer(
        &self,
        known: &[Known<'_>],
        wave: u32,
        opened_ms: u64,
        now_ms: u64,
        decisions: &mut Vec<Decision>,
    ) {
        let mut left = self.budget(now_ms);
        for (id, member, device) in known {
            let Some(device) = device else { continue };
            if left == 0 {
                return;
            }
            let open = member.forced
                || member.wave < wave
                || member.wave == wave
                    && now_ms >= opened_ms.saturating_add(self.head.policy.delay_ms(id));
            let wanted = member.forced || self.head.selector.matches(device);
            if open && wanted && device.online && self.is_due(&member.progress, now_ms) {
                left -= 1;
                decisions.push(Decision::Offer {
                    device: (*id).to_owned(),
                    boots: device.restarts,
                });
            }
        }
    }

    fn plan_return(&self, by_id: &HashMap<&str, &Device>, now_ms: u64) -> Plan {
        let ended = Plan {
            decisions: Vec::new(),
            state: State::Ended,
        };
        let (true, Some(back)) = (self.head.returning, self.head.back) else {
            return ended;
        };
        let mut decisions = Vec::new();
        let mut left = 0;
        let mut budget = self.budget(now_ms);
        for (id, member) in &self.members {
            if !member.progress.is_to_return() {
                continue;
            }
            let Some(device) = by_id.get(id.as_str()) else {
                continue;
            };
            if device.sequence >= back {
                decisions.push(Decision::Seen { device: id.clone() });
                continue;
            }
            left += 1;
            let due = match member.progress {
                Progress::Returning { at_ms } => {
                    self.is_old(at_ms, now_ms, self.head.policy.offer_ttl_s)
                }
                _ => true,
            };
            if device.online && due && budget > 0 {
                budget -= 1;
                decisions.push(Decision::Return { device: id.clone() });
            }
        }
        if left == 0 && decisions.is_empty() {
            return ended;
        }
        Plan {
            decisions,
            state: State::Returning { left },
        }
    }

    /// Devices that match and run an older model, but were not there at the start.
    fn joins(&self, inventory: &[Device]) -> Vec<Decision> {
        let late = inventory.iter().filter(|device| {
            device.sequence < self.head.sequence
                && !self.members.contains_key(&device.id)
                && self.head.selector.matches(device)
        });
        let devices: Vec<String> = late.map(|device| device.id.clone()).collect();
        if devices.is_empty() {
            return Vec::new();
        }
        vec![Decision::Join { devices }]
    }

    /// A device that runs this model or a newer one needs no offer.
    fn seen(&self, by_id: &HashMap<&str, &Device>) -> Vec<Decision> {
        let arrived = self.members.iter().filter(|(id, member)| {
            let there = by_id.get(id.as_str());
            !member.progress.is_settled()
                && there.is_some_and(|device| device.sequence >= self.head.sequence)
        });
        arrived
            .map(|(id, _)| Decision::Seen { device: id.clone() })
            .collect()
    }

    /// Whether a device no longer holds up the end.
    fn is_done(&self, (_, member, device): &Known<'_>) -> bool {
        let away_ms = self.head.policy.away_s.saturating_mul(1000);
        let gone = device.is_none_or(|device| {
            !self.head.selector.covers(device) || !device.online && device.silent_ms >= away_ms
        });
        member.progress.is_settled() || gone && !member.forced
    }

    fn is_due(&self, progress: &Progress, now_ms: u64) -> bool {
        let policy = &self.head.policy;
        match progress {
            Progress::Pending => true,
            Progress::Offered { at_ms } => self.is_old(*at_ms, now_ms, policy.offer_ttl_s),
            Progress::Staged { at_ms } | Progress::Trial { at_ms } => {
                self.is_old(*at_ms, now_ms, policy.stall_s)
            }
            _ => false,
        }
    }

    fn is_old(&self, at_ms: u64, now_ms: u64, limit_s: u64) -> bool {
        now_ms.saturating_sub(at_ms) >= limit_s.saturating_mul(1000)
    }

    /// How many offers may be made now: the rate, less those of the last second.
    fn budget(&self, now_ms: u64) -> usize {
        let rate = self.head.policy.offer_rate as usize;
        if rate == 0 {
            return usize::MAX;
        }
        let recent = self.members.values().filter(|member| {
            member
                .offered_ms
                .is_some_and(|at_ms| now_ms.saturating_sub(at_ms) < 1000)
        });
        rate.saturating_sub(recent.count())
    }
}
