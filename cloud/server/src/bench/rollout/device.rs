//! A simulated device: the slot and the judge of real ones, over storage and a network that are
//! made up.

use std::collections::BTreeMap;

use device_core::slot::{Action, Actions, Event, Held, Report, Slot, SlotError, SlotRecord};
use flywheel_shared::ids::{DeviceId, Digest};
use flywheel_shared::trust::{Accepted, Floor, Judge, KeyId, Signed, TrialBounds, TrustRoot};

use crate::ingest::{OfferBytes, OwnedSlotReport};

/// Hardware class of every device.
pub(super) const HARDWARE: &str = "sim";

/// What a model does on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It passes every check.
    Works,
    /// It is too slow.
    Slow,
    /// A golden input gives another answer.
    Golden,
    /// It brings the device down.
    Crash,
}

/// A device.
pub(super) struct Device {
    pub(super) id: DeviceId,
    pub(super) online: bool,
    pub(super) boots: u32,
    slot: Slot,
    /// What is on its storage.
    stored: SlotRecord,
    /// Bounds of the models that it has judged.
    judged: BTreeMap<Digest, TrialBounds>,
}

impl Device {
    /// A device that runs a model.
    pub(super) fn new(id: DeviceId, live: Held, trust: &TrustRoot) -> Self {
        let stored = SlotRecord {
            live: Some(live),
            floor: Floor {
                key: trust.release_id(),
                at: live.sequence,
            },
            ..SlotRecord::default()
        };
        let mut device = Self {
            id,
            online: true,
            boots: 1,
            slot: Slot::new(stored),
            stored,
            judged: BTreeMap::new(),
        };
        device.step(Event::Boot);
        device
    }

    /// Its live model.
    pub(super) fn live(&self) -> Held {
        self.stored.live.unwrap_or(Held {
            digest: Digest([0; 32]),
            sequence: 0,
        })
    }

    /// The model on its way, if there is one.
    pub(super) fn candidate(&self) -> Option<Held> {
        self.stored.candidate.map(|candidate| candidate.model)
    }

    /// What it has to tell.
    pub(super) fn report(&self) -> Option<Report> {
        self.slot.report()
    }

    /// Takes an event; what the slot wants persisted is.
    pub(super) fn step(&mut self, event: Event) -> Actions {
        let actions = self.slot.step(event);
        for action in &actions {
            if let Action::Persist(record) = action {
                self.stored = *record;
            }
        }
        actions
    }

    /// The power fails and comes back.
    pub(super) fn reboot(&mut self) -> Actions {
        self.boots += 1;
        self.slot = Slot::new(self.stored);
        self.step(Event::Boot)
    }

    /// Judges an offer as the agent does and takes it to the slot.
    pub(super) fn offer(&mut self, trust: &TrustRoot, offer: &OfferBytes, now_ms: u64) -> Actions {
        let digest = Digest::of(&offer.manifest);
        let known = self
            .stored
            .live
            .into_iter()
            .chain(self.candidate())
            .find(|model| model.digest == digest);
        if let Some(model) = known {
            let bounds = TrialBounds {
                frames: 0,
                max_latency_us: 0,
                min_confidence: 0.0,
            };
            return self.step(Event::Offer {
                model,
                bounds,
                key: KeyId::default(),
            });
        }
        let judge = Judge {
            trust,
            device: &self.id,
            hardware: HARDWARE,
            floor: self
                .stored
                .floor
                .under(trust.release_id(), trust.min_sequence),
            now_ms: Some(now_ms),
        };
        let signed = |body, signature| Signed { body, signature };
        let verdict = judge.offer(
            signed(&offer.offer, &offer.offer_signature),
            signed(&offer.manifest, &offer.manifest_signature),
        );
        let event = match verdict {
            Ok(Accepted { manifest, .. }) => {
                self.judged.insert(digest, manifest.trial);
                Event::Offer {
                    model: Held {
                        digest,
                        sequence: manifest.sequence,
                    },
                    bounds: manifest.trial,
                    key: trust.release_id(),
                }
            }
            Err(error) => Event::Refused {
                model: Held {
                    digest,
                    sequence: 0,
                },
                code: error.code(),
            },
        };
        self.step(event)
    }

    /// Runs a candidate's golden inputs.
    pub(super) fn prove(&mut self, digest: Digest, fate: Fate) -> Actions {
        self.step(match fate {
            Fate::Golden => Event::GoldenFailed {
                digest,
                error: SlotError::Golden,
            },
            _ => Event::GoldenPassed { digest },
        })
    }

    /// Runs a candidate on as many frames as its trial needs.
    pub(super) fn trial(&mut self, model: Held, fate: Fate) -> Actions {
        let bounds = self.judged.get(&model.digest);
        let frames = bounds.map_or(1, |bounds| bounds.frames.max(1));
        for _ in 0..frames {
            let actions = self.step(Event::Frame {
                latency_us: if fate == Fate::Slow { 900_000 } else { 20_000 },
                confidence: 0.9,
                live_confidence: Some(0.9),
            });
            if !actions.is_empty() {
                return actions;
            }
        }
        Actions::new()
    }
}

/// A report as it arrives in the cloud.
pub(super) fn arrived(report: &Report) -> OwnedSlotReport {
    OwnedSlotReport {
        manifest: report.model.digest,
        sequence: report.model.sequence,
        state: report.state,
        code: report.code,
        detail: report.reason().to_string(),
        trial_frames: report.trial_frames,
        max_latency_us: report.max_latency_us,
    }
}
