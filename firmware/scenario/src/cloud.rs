//! The other end of the link: takes batches, remembers every number, and acknowledges.

use ed25519_dalek::SigningKey;
use flywheel_shared::envelope;
use flywheel_shared::ids::DeviceId;
use flywheel_shared::message::{Ack, Attest, Batch, Down, Ranges, Record, Up, Welcome, records};
use flywheel_shared::trust::{Role, Signed, SignedRoot, TimeStamp, batch_digest, check, sign};
use flywheel_shared::{MAX_MESSAGE, WIRE_VERSION};
use heapless::Vec;

use crate::Failure::{self, Broken};
use crate::report::Fingerprint;
use crate::vectors::ROOT2;

/// Longest answer of this cloud in bytes: a trust root.
pub(crate) const REPLY: usize = 512;
/// Most answers to one message: a trust root and the time.
const REPLIES: usize = 2;
/// What it answers to a message.
pub(crate) type Replies = Vec<Vec<u8, REPLY>, REPLIES>;
/// Boot epochs that it can tell apart.
const EPOCHS: usize = 4;
/// Numbers of an epoch that it can.
const NUMBERS: usize = 256;
/// Of so many acknowledgements, one gets lost on its way.
const LOST: u32 = 7;

/// What arrived of one epoch.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    pub(crate) epoch: u32,
    seen: [u32; NUMBERS / 32],
    pub(crate) samples: u32,
    /// By [`flywheel_shared::message::LossReason`].
    pub(crate) losses: [u32; 5],
}

impl Tally {
    fn has(&self, seq: u32) -> bool {
        let bit = 1 << (seq % 32);
        self.seen
            .get(seq as usize / 32)
            .is_some_and(|word| word & bit != 0)
    }

    /// The largest n such that 1 ..= n have all arrived.
    pub(crate) fn whole(&self) -> u32 {
        (1..NUMBERS as u32).find(|seq| !self.has(*seq)).unwrap_or(0) - 1
    }
}

/// The cloud.
pub(crate) struct Cloud {
    device: DeviceId,
    public: [u8; 32],
    /// Signs the time.
    rollout: SigningKey,
    /// Unix milliseconds.
    pub(crate) now_ms: u64,
    pub(crate) tallies: Vec<Tally, EPOCHS>,
    pub(crate) batches: u32,
    pub(crate) again: u32,
    pub(crate) acks_lost: u32,
    /// Over all bytes that arrived.
    pub(crate) all: Fingerprint,
}

impl Cloud {
    pub(crate) fn new(device: &DeviceId, key: &SigningKey, rollout: SigningKey) -> Self {
        Self {
            device: device.clone(),
            public: key.verifying_key().to_bytes(),
            rollout,
            now_ms: 0,
            tallies: Vec::new(),
            batches: 0,
            again: 0,
            acks_lost: 0,
            all: Fingerprint::new(),
        }
    }

    /// Takes a message; returns the answers that do not get lost.
    pub(crate) fn receive(&mut self, message: &[u8]) -> Result<Replies, Failure> {
        let (payload, _) = envelope::split(message, MAX_MESSAGE)
            .map_err(|_| Broken("a message of the device is damaged"))?;
        for byte in payload {
            self.all.add(u32::from(*byte));
        }
        match postcard::from_bytes(payload) {
            Ok(Up::Hello(hello)) if hello.device == self.device => {
                let now_ms = self.now_ms;
                replies([Ok(Down::Welcome(Welcome {
                    wire_version: WIRE_VERSION,
                    now_ms,
                }))])
            }
            Ok(Up::Batch(batch)) => self.batch(&batch),
            Ok(Up::Attest(question)) => self.attest(question),
            _ => Err(Broken("a message of the device does not decode")),
        }
    }

    /// The roots that the device lacks, and the time.
    fn attest(&self, question: Attest) -> Result<Replies, Failure> {
        let stamp = TimeStamp {
            device: self.device.clone(),
            nonce: question.nonce,
            now_ms: self.now_ms,
        };
        let mut body = [0; 64];
        let body = postcard::to_slice(&stamp, &mut body)
            .map_err(|_| Broken("a time stamp is too long"))?;
        let signature = sign(Role::Time, &self.rollout, body);
        let time = Ok(Down::Time(Signed {
            body,
            signature: &signature,
        }));
        match question.root_version {
            1 => replies([signed_root(ROOT2).map(Down::Root), time]),
            _ => replies([time]),
        }
    }

    fn batch(&mut self, batch: &Batch<'_>) -> Result<Replies, Failure> {
        self.batches += 1;
        let known = self.tallies.iter().any(|tally| tally.epoch == batch.epoch);
        if !known {
            // One signature of each epoch; checking all of them would take most of the run.
            let digest = batch_digest(&self.device, batch.epoch, batch.count, batch.records);
            check(Role::Device, &self.public, &digest, batch.signature)
                .map_err(|_| Broken("a batch is not signed by the device"))?;
            let tally = Tally {
                epoch: batch.epoch,
                seen: [0; NUMBERS / 32],
                samples: 0,
                losses: [0; 5],
            };
            self.tallies
                .push(tally)
                .map_err(|_| Broken("there are more epochs than starts"))?;
        }
        let tally = self
            .tallies
            .iter_mut()
            .find(|tally| tally.epoch == batch.epoch)
            .ok_or(Broken("an epoch is gone"))?;
        let (mut low, mut high, mut count) = (u32::MAX, 0, 0);
        for record in records(batch.records) {
            let record = record.map_err(|_| Broken("a record does not decode"))?;
            let seq = record.seq();
            (low, high, count) = (low.min(seq), high.max(seq), count + 1);
            if tally.has(seq) {
                self.again += 1;
                continue;
            }
            let word = tally.seen.get_mut(seq as usize / 32);
            *word.ok_or(Broken("a number is out of range"))? |= 1 << (seq % 32);
            match record {
                Record::Sample(_) => tally.samples += 1,
                Record::Loss(loss) => tally.losses[loss.reason as usize] += 1,
            }
        }
        if count != u32::from(batch.count) || high - low + 1 != count {
            return Err(Broken("a batch is not a run of numbers"));
        }
        if self.batches.is_multiple_of(LOST) {
            self.acks_lost += 1;
            return Ok(Replies::new());
        }
        let mut ranges = Ranges::new();
        // The first of 32.
        let _ = ranges.push((low, high));
        let epoch = batch.epoch;
        replies([Ok(Down::Ack(Ack { epoch, ranges }))])
    }
}

/// Enveloped messages of the cloud.
fn replies<'a>(
    messages: impl IntoIterator<Item = Result<Down<'a>, Failure>>,
) -> Result<Replies, Failure> {
    let too_long = || Broken("an answer of the cloud is too long");
    let mut replies = Replies::new();
    for message in messages {
        let mut bytes = [0; REPLY];
        let sealed = envelope::seal(&message?, &mut bytes).ok_or_else(too_long)?;
        let sealed = Vec::from_slice(sealed).map_err(|_| too_long())?;
        replies.push(sealed).map_err(|_| too_long())?;
    }
    Ok(replies)
}

/// A signed root of the vectors.
pub(crate) fn signed_root(bytes: &'static [u8]) -> Result<SignedRoot<'static>, Failure> {
    SignedRoot::from_bytes(bytes).map_err(|_| Broken("a signed root does not decode"))
}
