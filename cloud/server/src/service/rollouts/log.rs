//! The rollout log: everything that anyone did and that the controller decided, in order. Each line
//! names the digest of the one before and is signed by the rollout key, so that none can be changed,
//! taken out or put in between; only the end could be cut off, which a digest noted elsewhere shows.

use std::collections::BTreeMap;

use cloud_core::rollout::Policy;
use ed25519_dalek::{Signature, VerifyingKey};
use flywheel_shared::ids::Digest;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::service::roots::Roots;
use crate::store::{Batch, Store, StoreError};

const LINES: &str = "rollout log";
const CHAIN: &str = "rollout log end";
/// Most devices named in one line: the store keeps small records well and large ones badly.
const MOST_DEVICES: usize = 500;
/// Stands in front of what is signed. As long as the prefixes of [`flywheel_shared::trust::Role`]
/// and none of them, so that a line never passes as an offer.
const DOMAIN: &[u8; 24] = b"flywheel/rollout-log/v1\0";

/// A line as it is stored and shown: what is signed stands in it byte for byte.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Line {
    /// An [`Entry`] as JSON.
    pub body: String,
    /// The public key, hexadecimal.
    pub key: String,
    /// ed25519 over the domain and the digest of the body, hexadecimal.
    pub signature: String,
}

/// What a line says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its number, from 0.
    pub number: u64,
    /// SHA-256 of the body of the line before; zero for the first.
    pub before: String,
    /// When, Unix milliseconds.
    pub at_ms: u64,
    /// Which rollout.
    pub rollout: u64,
    /// Who: `controller`, `devices`, or whom the operator's command named.
    pub by: String,
    /// What.
    pub event: Event,
}

/// How far a device says it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The device.
    pub device: String,
    /// Its stage.
    pub state: String,
    /// Why, if it gave up.
    pub reason: Option<String>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Event {
    /// A rollout began.
    Started {
        /// The model.
        model: String,
        /// Its release number.
        sequence: u64,
        /// Release number under which the model before comes back.
        back: Option<u64>,
        /// Which devices.
        to: String,
        /// Devices of each wave.
        waves: Vec<usize>,
        /// The rules.
        policy: Box<Policy>,
    },
    /// Devices came later.
    Joined {
        /// Their ids.
        devices: Vec<String>,
    },
    /// A wave opened.
    Opened {
        /// Which.
        wave: u32,
        /// Why.
        reason: String,
    },
    /// The model was offered.
    Offered {
        /// To these devices.
        devices: Vec<String>,
    },
    /// The model before was offered.
    OfferedBack {
        /// To these devices.
        devices: Vec<String>,
    },
    /// Devices got further.
    Reported {
        /// Which, and how far.
        devices: Vec<Outcome>,
    },
    /// Every device has confirmed, within the limits.
    Confirmed,
    /// Too much failed.
    Halted {
        /// What.
        reason: String,
        /// Whether devices go back to the model before.
        returning: bool,
    },
    /// Stopped for good by the operator.
    Aborted {
        /// Why.
        reason: String,
        /// Whether devices go back to the model before.
        returning: bool,
    },
    /// The model before is the champion again.
    Champion {
        /// Which.
        model: String,
    },
    /// Stopped for now by the operator.
    Paused {
        /// Why.
        reason: String,
    },
    /// Goes on.
    Resumed {
        /// Why.
        reason: String,
    },
    /// A device was taken out.
    Excluded {
        /// Which.
        device: String,
        /// Why.
        reason: String,
    },
    /// The gate behind a wave was forced.
    ForcedWave {
        /// Which.
        wave: u32,
        /// Why.
        reason: String,
    },
    /// A device is offered the model before its turn.
    ForcedDevice {
        /// Which.
        device: String,
        /// Why.
        reason: String,
    },
}

impl Event {
    /// One event for each so many devices; none for none.
    pub(super) fn each<T: Clone>(
        devices: &[T],
        event: impl Fn(Vec<T>) -> Self,
    ) -> impl Iterator<Item = Self> {
        devices
            .chunks(MOST_DEVICES)
            .map(move |some| event(some.to_vec()))
    }

    /// The event in words.
    #[must_use]
    pub fn words(&self) -> String {
        let back = |returning: bool| match returning {
            true => "; devices that took it go back",
            false => "",
        };
        match self {
            Self::Started {
                model,
                sequence,
                to,
                waves,
                policy,
                ..
            } => format!(
                "started: model {} (release {sequence}) to {to}, policy {}, waves of {waves:?}",
                &model[..model.len().min(12)],
                policy.name
            ),
            Self::Joined { devices } => format!("joined later: {}", list(devices)),
            Self::Opened { wave, reason } => format!("wave {wave} opened: {reason}"),
            Self::Offered { devices } => format!("offered to {}", list(devices)),
            Self::OfferedBack { devices } => {
                format!("the model before offered to {}", list(devices))
            }
            Self::Reported { devices } => {
                let mut by_state: BTreeMap<&str, Vec<String>> = BTreeMap::new();
                for outcome in devices {
                    let of_state = by_state.entry(outcome.state.as_str()).or_default();
                    of_state.push(match &outcome.reason {
                        Some(reason) => format!("{} ({reason})", outcome.device),
                        None => outcome.device.clone(),
                    });
                }
                let parts: Vec<String> = by_state
                    .iter()
                    .map(|(state, devices)| format!("{state}: {}", list(devices)))
                    .collect();
                parts.join("; ")
            }
            Self::Confirmed => "confirmed".to_owned(),
            Self::Halted { reason, returning } => format!("halted: {reason}{}", back(*returning)),
            Self::Aborted { reason, returning } => {
                format!("aborted: {reason}{}", back(*returning))
            }
            Self::Champion { model } => {
                format!(
                    "model {} is the champion again",
                    &model[..model.len().min(12)]
                )
            }
            Self::Paused { reason } => format!("paused: {reason}"),
            Self::Resumed { reason } => format!("resumed: {reason}"),
            Self::Excluded { device, reason } => format!("{device} excluded: {reason}"),
            Self::ForcedWave { wave, reason } => {
                format!("the gate behind wave {wave} forced: {reason}")
            }
            Self::ForcedDevice { device, reason } => format!("{device} forced: {reason}"),
        }
    }
}

fn list(devices: &[String]) -> String {
    match devices {
        [one] => one.clone(),
        few if few.len() <= 6 => few.join(", "),
        many => format!("{} and {} more", many[..5].join(", "), many.len() - 5),
    }
}

/// The end of the log, to append to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chain {
    next: u64,
    before: String,
}

impl Chain {
    /// The end of a store's log.
    pub(super) fn open(store: &Store) -> Result<Self, StoreError> {
        let stored = store.get(CHAIN, b"")?;
        Ok(stored.unwrap_or_else(|| Self {
            next: 0,
            before: Digest([0; 32]).to_string(),
        }))
    }

    /// Adds a line to a batch; the chain is that of the store once the batch is written.
    pub(super) fn append(
        &mut self,
        batch: &mut Batch,
        roots: &Roots,
        (at_ms, rollout, by): (u64, u64, &str),
        event: Event,
    ) -> Result<(), StoreError> {
        let entry = Entry {
            number: self.next,
            before: self.before.clone(),
            at_ms,
            rollout,
            by: by.to_owned(),
            event,
        };
        let body = serde_json::to_string(&entry).map_err(|error| StoreError::Record {
            tree: LINES.to_owned(),
            why: error.to_string(),
        })?;
        let digest = Digest::of(body.as_bytes());
        let (key, signature) = roots.sign_line(&message(&digest));
        let line = Line {
            key: hex::encode(key),
            signature: hex::encode(signature),
            body,
        };
        batch.put(LINES, &self.next.to_be_bytes(), &line)?;
        self.next += 1;
        self.before = digest.to_string();
        batch.put(CHAIN, b"", self)?;
        Ok(())
    }
}

/// Up to `limit` lines from a number on.
pub(super) fn read(store: &Store, from: u64, limit: usize) -> Result<Vec<Line>, StoreError> {
    let mut lines = Vec::new();
    for number in from..from.saturating_add(limit as u64) {
        match store.get(LINES, &number.to_be_bytes())? {
            Some(line) => lines.push(line),
            None => break,
        }
    }
    Ok(lines)
}

/// Why a log is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {number} of the rollout log {why}")]
pub struct LogError {
    /// Its number.
    pub number: u64,
    /// What is wrong with it.
    pub why: String,
}

/// A check of a log from its first line, fed with its lines in order.
#[derive(Clone, Debug)]
pub struct Verifier {
    keys: Vec<String>,
    next: u64,
    before: String,
}

impl Verifier {
    /// A check against the public keys that are believed, hexadecimal.
    #[must_use]
    pub fn new(keys: Vec<String>) -> Self {
        Self {
            keys,
            next: 0,
            before: Digest([0; 32]).to_string(),
        }
    }

    /// Lines seen, and the digest of the last: who notes it sees later whether the end was cut off.
    #[must_use]
    pub fn seen(&self) -> (u64, &str) {
        (self.next, &self.before)
    }

    /// Checks the next line.
    ///
    /// # Errors
    /// If it is not signed by a believed key, was changed, or does not follow the one before.
    pub fn line(&mut self, line: &Line) -> Result<Entry, LogError> {
        let number = self.next;
        let wrong = |why: String| LogError { number, why };
        if !self.keys.contains(&line.key) {
            return Err(wrong(format!(
                "is signed by the key {}, which is not believed; if it was the rollout key once, name it with --key",
                line.key
            )));
        }
        let mut key = [0; 32];
        let key = hex::decode_to_slice(&line.key, &mut key)
            .ok()
            .and_then(|()| VerifyingKey::from_bytes(&key).ok())
            .ok_or_else(|| wrong("names a key that is none".to_owned()))?;
        let digest = Digest::of(line.body.as_bytes());
        let signature = hex::decode(&line.signature)
            .ok()
            .and_then(|bytes| Signature::from_slice(&bytes).ok())
            .ok_or_else(|| wrong("has no signature".to_owned()))?;
        key.verify_strict(&message(&digest), &signature)
            .map_err(|_| wrong("was changed: its signature does not match".to_owned()))?;
        let entry: Entry = serde_json::from_str(&line.body)
            .map_err(|error| wrong(format!("does not decode: {error}")))?;
        if entry.number != self.next || entry.before != self.before {
            return Err(wrong(format!(
                "does not follow the one before (it is number {} and names {}): a line was taken out or put in",
                entry.number,
                &entry.before[..entry.before.len().min(12)]
            )));
        }
        self.next += 1;
        self.before = digest.to_string();
        Ok(entry)
    }
}

fn message(digest: &Digest) -> [u8; 56] {
    let mut out = [0; 56];
    out[..24].copy_from_slice(DOMAIN);
    out[24..].copy_from_slice(&digest.0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> (Vec<Line>, std::sync::Arc<Roots>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let cloud = crate::bench::rollout::cloud::Cloud::open(dir.path()).unwrap();
        let (store, key) = (cloud.store, cloud.roots);
        let mut chain = Chain::open(&store).unwrap();
        for wave in 0..4 {
            let mut batch = Batch::new();
            let event = Event::Opened {
                wave,
                reason: "because".to_owned(),
            };
            chain
                .append(&mut batch, &key, (9, 1, "controller"), event)
                .unwrap();
            store.write(batch).unwrap();
            assert_eq!(Chain::open(&store).unwrap(), chain);
        }
        (read(&store, 0, 100).unwrap(), key, dir)
    }

    fn verify(lines: &[Line], key: &[u8; 32]) -> Result<u64, LogError> {
        let mut verifier = Verifier::new(vec![hex::encode(key)]);
        for line in lines {
            verifier.line(line)?;
        }
        Ok(verifier.seen().0)
    }

    #[test]
    fn a_log_verifies_and_any_change_is_found() {
        let (lines, roots, _dir) = log();
        let key = roots.root().rollout;
        assert_eq!(verify(&lines, &key), Ok(4));
        for at in 0..4 {
            let mut changed = lines.clone();
            changed[at].body = changed[at].body.replace("because", "somehow");
            assert_eq!(verify(&changed, &key).unwrap_err().number, at as u64);
            let mut missing = lines.clone();
            missing.remove(at);
            assert_eq!(verify(&missing, &key).is_err(), at < 3);
            let mut doubled = lines.clone();
            doubled.insert(at, lines[at].clone());
            assert!(verify(&doubled, &key).is_err());
        }
        let mut swapped = lines.clone();
        swapped.swap(1, 2);
        assert!(
            verify(&swapped, &key)
                .unwrap_err()
                .why
                .contains("taken out")
        );
        let other = roots.root().release;
        assert!(verify(&lines, &other).unwrap_err().why.contains("--key"));
        // Signed as an offer is not signed as a line.
        let mut crossed = lines;
        let offer = roots.sign_offer(crossed[0].body.as_bytes());
        crossed[0].signature = hex::encode(offer);
        assert!(verify(&crossed, &key).unwrap_err().why.contains("changed"));
    }
}
