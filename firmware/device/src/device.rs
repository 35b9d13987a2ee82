//! The device: every part of `device-core` at its place.

use core::fmt;

use device_core::flicker::Flicker;
use device_core::params::Params;
use device_core::score::{quantise, score};
use device_core::sketch::signature;
use device_core::slot::{self, Held, Slot, SlotRecord};
use device_core::spool::{OVERHEAD, Recovery, Spool, SpoolError};
use device_core::trigger::{Flag, Observation, Trigger, TriggerConfig, TriggerError};
use device_core::uplink::{self, Uplink, UplinkConfig};
use embedded_storage::nor_flash::NorFlash;
use flywheel_shared::envelope;
use flywheel_shared::ids::{DEVICE_ID_MAX, DeviceId, Digest};
use flywheel_shared::message::{
    Ack, Attest, Codec, EpochBook, Hello, OfferMessage, Refused, Sample, Scores, SlotSeen,
};
use flywheel_shared::trust::{
    Accepted, BatchHash, Floor, Judge, Signed, SignedRoot, Timekeeper, TrustError, TrustRoot,
};
use flywheel_shared::{MAX_MESSAGE, WIRE_VERSION};
use serde::{Deserialize, Serialize};

use crate::batch::{head, tail};
use crate::{Answer, DIM, Input, Link, Timed};

/// Steps that one input may lead to before something is wrong.
const CHAIN: usize = 64;
/// Longest message without records in bytes, envelope included: a hello, that is a variant, a device
/// id and two numbers.
const SHORT: usize = envelope::HEADER + 1 + (1 + DEVICE_ID_MAX) + 3 + 5;

/// Who the device is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its name.
    pub device: DeviceId,
    /// Its hardware class.
    pub hardware: &'static str,
}

/// What the board has kept of earlier starts. On a new device all but the root is the default.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// The newest trust root: the one it was enrolled with, or what came in [`Board::keep_root`].
    pub trust: TrustRoot,
    /// The last of [`Board::keep_time`].
    pub time: Floor,
    /// The slot's record.
    pub record: SlotRecord,
}

/// How it spends and sends.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The trigger's.
    pub trigger: TriggerConfig,
    /// The uplink's. A batch must have room for the longest record of a slot.
    pub uplink: UplinkConfig,
    /// Bytes of a spool slot.
    pub slot_bytes: u32,
}

/// What the device asks of the hardware around it.
pub trait Board {
    /// A message of `len` bytes, envelope included, follows in pieces.
    fn begin(&mut self, len: usize);

    /// Sends the next piece of it. Should the spool's flash fail between two pieces, `connect(false)`
    /// comes in place of the next.
    fn send(&mut self, piece: &[u8]);

    /// Opens or closes the link; what became of it comes as [`Input::Link`].
    fn connect(&mut self, up: bool);

    /// Signs with the device's own key.
    fn sign(&mut self, digest: &Digest) -> [u8; 64];

    /// Keeps the newest trust root, before anything is believed that relies on it.
    fn keep_root(&mut self, root: &SignedRoot<'_>);

    /// Keeps how far time has come.
    fn keep_time(&mut self, floor: Floor);

    /// Does what the slot asks for and returns the event that answers it, if any.
    fn act(&mut self, action: slot::Action) -> Option<slot::Event>;

    /// Called before and after a frame is scored and judged.
    fn measure(&mut self) {}
}

/// Why an input could not be dealt with. The device goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The trigger's configuration is out of range.
    Trigger(TriggerError),
    /// The spool does not open, or its flash fails.
    Spool,
    /// A message is no envelope or does not decode.
    Message,
    /// The model's answer cannot be scored.
    Score,
    /// One input leads to no end of actions.
    Endless,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trigger(error) => return error.fmt(f),
            Self::Spool => "the spool's flash fails or holds another layout",
            Self::Message => "a message does not decode",
            Self::Score => "an answer of the model cannot be scored",
            Self::Endless => "the state machines do not come to rest",
        })
    }
}

impl core::error::Error for Failure {}

impl<E> From<SpoolError<E>> for Failure {
    fn from(_: SpoolError<E>) -> Self {
        Self::Spool
    }
}

/// What a device has done since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames judged.
    pub frames: u32,
    /// Messages sent.
    pub messages: u32,
    /// Records acknowledged.
    pub acknowledged: u32,
    /// Frames that were not scored.
    pub unscored: u32,
}

/// A device; `N` is the length of the spool's table.
pub struct Device<'a, F, const N: usize> {
    identity: &'a Identity,
    trust: TrustRoot,
    time: Timekeeper,
    /// The question to the cloud that is not answered yet.
    asked: Option<u64>,
    params: Params<'a>,
    trigger: Trigger,
    flicker: Flicker,
    spool: Spool<F, N>,
    uplink: Uplink,
    slot: Slot,
    counts: Counts,
}

impl<'a, F: NorFlash, const N: usize> Device<'a, F, N> {
    /// Starts, in `place`, with the spool that lies in `flash` and what the board has kept.
    ///
    /// # Errors
    /// [`Failure::Trigger`] or [`Failure::Spool`].
    #[inline(never)] // What is moved into place is on the stack twice; so only until this returns.
    pub fn start(
        place: &mut Option<Self>,
        (identity, params, config): (&'a Identity, Params<'a>, Config),
        kept: Kept,
        flash: F,
    ) -> Result<Recovery, Failure> {
        let range = 0..flash.capacity() as u32;
        let (spool, recovery) = Spool::open(flash, range, config.slot_bytes)?;
        // A record that fits a slot must fit a batch, or the spool would never be empty again.
        if config.uplink.batch_bytes < config.slot_bytes - OVERHEAD {
            return Err(Failure::Spool);
        }
        *place = Some(Self {
            identity,
            trust: kept.trust,
            time: Timekeeper::new(kept.time),
            asked: None,
            params,
            trigger: Trigger::new(config.trigger).map_err(Failure::Trigger)?,
            flicker: Flicker::default(),
            spool,
            uplink: Uplink::new(config.uplink),
            slot: Slot::new(kept.record),
            counts: Counts::default(),
        });
        Ok(recovery)
    }

    /// Goes on where the slot was interrupted; to be called once after [`Device::start`].
    ///
    /// # Errors
    /// [`Failure::Endless`], which would be a bug.
    #[inline(never)] // What is called from outside is kept apart from what calls it.
    pub fn boot(&mut self, board: &mut impl Board) -> Result<(), Failure> {
        self.slot(slot::Event::Boot, board)?;
        self.trusted(board)
    }

    /// Takes an input and has the board do everything that follows from it.
    ///
    /// # Errors
    /// [`Failure`]; whatever was flagged is in the books all the same.
    #[inline(never)] // See `boot`.
    pub fn take(&mut self, timed: &Timed<'_>, board: &mut impl Board) -> Result<(), Failure> {
        let &Timed {
            now_ms,
            draw,
            ref input,
        } = timed;
        let event = match input {
            Input::Link(Link::Tick) => uplink::Event::Tick,
            Input::Link(Link::Connected) => uplink::Event::Connected,
            Input::Link(Link::Closed) => uplink::Event::Closed,
            Input::Message(bytes) => self.receive(now_ms, draw, bytes, board)?,
            Input::Frame(answer) => {
                self.frame(now_ms, draw, answer, board)?;
                uplink::Event::Tick
            }
        };
        self.link(now_ms, draw, event, board)
    }

    /// The books of all epochs.
    pub fn books(&self) -> impl Iterator<Item = EpochBook> + '_ {
        self.spool.books()
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The slot's record.
    pub fn record(&self) -> &SlotRecord {
        self.slot.record()
    }

    /// The spool's flash.
    pub fn flash(&self) -> &F {
        self.spool.flash()
    }

    /// Scores a frame; keeps it if the trigger says so.
    fn frame(
        &mut self,
        now_ms: u64,
        draw: u32,
        answer: &Answer<'_>,
        board: &mut impl Board,
    ) -> Result<(), Failure> {
        self.counts.frames += 1;
        board.measure();
        let judged = self.judge(draw, answer);
        board.measure();
        let Some((scores, flag)) = judged else {
            self.counts.unscored += 1;
            return Err(Failure::Score);
        };
        if let Some(flag) = flag {
            self.keep(now_ms, answer, scores, flag);
        }
        if self.slot.on_trial() {
            let event = slot::Event::Frame {
                latency_us: answer.latency_us,
                confidence: scores.confidence,
                live_confidence: None,
            };
            self.slot(event, board)?;
        }
        Ok(())
    }

    #[inline(never)] // So that the stack holds the buffers of one step at a time.
    fn judge(&mut self, draw: u32, answer: &Answer<'_>) -> Option<(Scores, Option<Flag>)> {
        let mut scratch = [0.0; 2 * DIM];
        let embedding = answer.embedding.as_slice();
        let scores = score(&answer.logits, embedding, &self.params, &mut scratch).ok()?;
        let mark = signature(embedding, self.params.centre());
        let bytes = answer.pixels.len() as u32;
        let flag = self.trigger.observe(Observation {
            frame_bytes: bytes,
            // Scores, numbers and the quantised embedding.
            cost: bytes + 96 + embedding.len() as u32,
            scores: Some(&scores),
            signature: mark,
            disagree: self.flicker.observe(scores.top1, mark),
            wanted: scores.rarity,
            draw,
        });
        Some((scores, flag))
    }

    #[inline(never)]
    fn keep(&mut self, now_ms: u64, answer: &Answer<'_>, scores: Scores, flag: Flag) {
        let mut codes = [0i8; DIM];
        let codes = &mut codes[..answer.embedding.len()];
        let embedding_scale = quantise(&answer.embedding, codes);
        let mut embedding = [0u8; DIM];
        let embedding = &mut embedding[..codes.len()];
        for (byte, code) in embedding.iter_mut().zip(codes) {
            *byte = code.cast_unsigned();
        }
        let mut model = [0; 8];
        if let Some(live) = self.slot.record().live {
            model.copy_from_slice(&live.digest.0[..8]);
        }
        let mut sample = Sample {
            seq: 0,
            frame: answer.frame,
            captured_ms: self.unix_ms(now_ms).unwrap_or(now_ms),
            track: answer.track,
            model,
            lane: flag.lane,
            inclusion: flag.inclusion,
            scores,
            embedding_scale,
            embedding,
            width: answer.width,
            height: answer.height,
            codec: Codec::Rgb8,
            payload: answer.pixels,
        };
        // A loss is in the books, and told to the cloud like a sample.
        self.spool.push(&mut sample, flag.value);
    }

    /// Takes a message in; returns what the uplink is to hear of it.
    ///
    /// Read by its number, as [`Down`](flywheel_shared::message::Down) has them, so that the stack
    /// holds one kind of message at a time and what only the board understands is not decoded.
    #[inline(never)]
    fn receive(
        &mut self,
        now_ms: u64,
        draw: u32,
        bytes: &[u8],
        board: &mut impl Board,
    ) -> Result<uplink::Event, Failure> {
        let (payload, _) = envelope::split(bytes, MAX_MESSAGE).map_err(|_| Failure::Message)?;
        let (number, rest) = payload.split_first().ok_or(Failure::Message)?;
        match *number {
            number::WELCOME => {
                self.ask(now_ms, draw, board)?;
                return Ok(uplink::Event::Welcomed);
            }
            number::ACK => return self.acknowledged(rest),
            number::OFFER => {
                let event = match self.offer(now_ms, rest)? {
                    Ok(event) => Some(event),
                    Err(error) if error.is_curable() => {
                        self.ask(now_ms, draw, board)?;
                        None
                    }
                    // Without a signature that holds, it is nobody's.
                    Err(_) => None,
                };
                if let Some((event, issued_ms)) = event {
                    self.heard(issued_ms, board);
                    self.slot(event, board)?;
                }
            }
            number::REFUSED => {
                let Refused {
                    code,
                    retry_after_ms,
                } = read(rest)?;
                return Ok(uplink::Event::Refused {
                    code,
                    retry_after_ms,
                });
            }
            number::SLOT_SEEN => {
                let SlotSeen { manifest, state } = read(rest)?;
                let event = slot::Event::ReportSeen {
                    digest: manifest,
                    state,
                };
                self.slot(event, board)?;
            }
            number::ROOT => self.root(rest, board)?,
            number::TIME => self.answered(now_ms, rest, board)?,
            // Model bytes and wishes are the board's business.
            number::CHUNK | number::DESIRED => {}
            _ => return Err(Failure::Message),
        }
        Ok(uplink::Event::Tick)
    }

    #[inline(never)]
    fn acknowledged(&mut self, ack: &[u8]) -> Result<uplink::Event, Failure> {
        let ack: Ack = read(ack)?;
        let records = self.spool.acknowledge(ack.epoch, &ack.ranges)?;
        self.counts.acknowledged += records;
        Ok(uplink::Event::Acked { records })
    }

    /// What the slot is to hear of an offer, and when it was signed.
    #[inline(never)]
    fn offer(
        &self,
        now_ms: u64,
        message: &[u8],
    ) -> Result<Result<(slot::Event, u64), TrustError>, Failure> {
        let message: OfferMessage<'_> = read(message)?;
        let key = self.trust.release_id();
        let judge = Judge {
            trust: &self.trust,
            device: &self.identity.device,
            hardware: self.identity.hardware,
            floor: self.slot.record().floor.under(key, self.trust.min_sequence),
            now_ms: self.unix_ms(now_ms),
        };
        Ok(judge.offer(message.offer, message.manifest).map(
            |Accepted {
                 manifest,
                 issued_ms,
             }| {
                let event = slot::Event::Offer {
                    model: Held {
                        digest: manifest.digest(),
                        sequence: manifest.sequence,
                    },
                    bounds: manifest.trial,
                    key,
                };
                (event, issued_ms)
            },
        ))
    }

    /// Takes the root that follows the one in hand. Any other is passed over: the cloud repeats
    /// what it wants.
    #[inline(never)]
    fn root(&mut self, message: &[u8], board: &mut impl Board) -> Result<(), Failure> {
        let signed: SignedRoot<'_> = read(message)?;
        if !self.next_root(&signed) {
            return Ok(());
        }
        board.keep_root(&signed);
        self.trusted(board)
    }

    #[inline(never)]
    fn next_root(&mut self, signed: &SignedRoot<'_>) -> bool {
        match self.trust.update(*signed) {
            Ok(next) => {
                self.trust = next.into_inner();
                true
            }
            Err(_) => false,
        }
    }

    /// Tells the slot which release key is believed.
    fn trusted(&mut self, board: &mut impl Board) -> Result<(), Failure> {
        let key = self.trust.release_id();
        self.slot(slot::Event::Trusted { key }, board)
    }

    /// Asks the cloud for newer roots and the time.
    fn ask(&mut self, now_ms: u64, draw: u32, board: &mut impl Board) -> Result<(), Failure> {
        // No question is like another, and none can be told in advance.
        let nonce = u64::from(draw) << 32 | now_ms & u64::from(u32::MAX);
        self.asked = Some(nonce);
        let question = Attest {
            nonce,
            root_version: self.trust.version,
        };
        self.tell(number::ATTEST, &question, board)
    }

    /// Takes signed time, if it answers the question.
    #[inline(never)]
    fn answered(
        &mut self,
        now_ms: u64,
        message: &[u8],
        board: &mut impl Board,
    ) -> Result<(), Failure> {
        let signed: Signed<'_> = read(message)?;
        let device = &self.identity.device;
        if let Some(nonce) = self.asked
            && self
                .time
                .answer(&self.trust, device, nonce, signed, now_ms)
                .is_ok()
        {
            self.asked = None;
            board.keep_time(self.time.floor());
        }
        Ok(())
    }

    /// Takes the time at which a believed offer was signed.
    fn heard(&mut self, issued_ms: u64, board: &mut impl Board) {
        if self.time.heard(&self.trust, issued_ms) {
            board.keep_time(self.time.floor());
        }
    }

    /// Unix milliseconds, if they are known.
    fn unix_ms(&self, now_ms: u64) -> Option<u64> {
        self.time.now(&self.trust, Some(now_ms), now_ms)
    }

    /// Gives the slot an event and the board its actions, until nothing is left to do.
    fn slot(&mut self, event: slot::Event, board: &mut impl Board) -> Result<(), Failure> {
        let mut next = Some(event);
        for _ in 0..CHAIN {
            let Some(event) = next.take() else {
                return Ok(());
            };
            for action in self.slot.step(event) {
                next = next.or(board.act(action));
            }
        }
        Err(Failure::Endless)
    }

    /// Gives the uplink an event and does what it asks for.
    fn link(
        &mut self,
        now_ms: u64,
        draw: u32,
        event: uplink::Event,
        board: &mut impl Board,
    ) -> Result<(), Failure> {
        let pending = self.spool.pending();
        let told = uplink::Event::Pending {
            records: pending.records,
            bytes: pending.bytes,
        };
        let mut events: heapless::Deque<uplink::Event, 4> = heapless::Deque::new();
        for event in [told, event] {
            // Two of four.
            let _ = events.push_back(event);
        }
        for _ in 0..CHAIN {
            let Some(event) = events.pop_front() else {
                return Ok(());
            };
            for action in self.uplink.step(now_ms, event, draw) {
                if let Some(answer) = self.act(action, board)? {
                    events.push_back(answer).map_err(|_| Failure::Endless)?;
                }
            }
        }
        Err(Failure::Endless)
    }

    fn act(
        &mut self,
        action: uplink::Action,
        board: &mut impl Board,
    ) -> Result<Option<uplink::Event>, Failure> {
        match action {
            uplink::Action::Connect(_) => board.connect(true),
            uplink::Action::Disconnect => board.connect(false),
            uplink::Action::Rewind => {
                self.spool.unsend();
                let pending = self.spool.pending();
                return Ok(Some(uplink::Event::Pending {
                    records: pending.records,
                    bytes: pending.bytes,
                }));
            }
            uplink::Action::SendHello => self.hello(board)?,
            uplink::Action::Send {
                max_records,
                max_bytes,
            } => {
                let records = self.send(max_records, max_bytes, board)?;
                return Ok(Some(uplink::Event::Sent { records }));
            }
            // A health message needs facts that the board has; it sends them itself.
            uplink::Action::SendHealth | uplink::Action::Sleep { .. } => {}
        }
        Ok(None)
    }

    fn hello(&mut self, board: &mut impl Board) -> Result<(), Failure> {
        let hello = Hello {
            device: self.identity.device.clone(),
            wire_version: WIRE_VERSION,
            epoch: self.spool.epoch(),
        };
        self.tell(number::HELLO, &hello, board)
    }

    /// Sends a message without records. Not as an [`Up`](flywheel_shared::message::Up), which is as
    /// long as the longest message: 4.5 KB of stack.
    fn tell(
        &mut self,
        number: u8,
        message: &impl Serialize,
        board: &mut impl Board,
    ) -> Result<(), Failure> {
        let mut bytes = [0; SHORT];
        let message = envelope::seal(&(number, message), &mut bytes).ok_or(Failure::Message)?;
        board.begin(message.len());
        board.send(message);
        self.counts.messages += 1;
        Ok(())
    }

    /// Sends the next batch. Its records are read twice: to be signed and summed up, and to be sent.
    #[inline(never)]
    fn send(
        &mut self,
        max_records: u32,
        max_bytes: u32,
        board: &mut impl Board,
    ) -> Result<u32, Failure> {
        let most = u16::try_from(max_records).unwrap_or(u16::MAX);
        let Some(taken) = self.spool.take(most, max_bytes as usize)? else {
            return Ok(0);
        };
        let mut hash = BatchHash::new(&self.identity.device, taken.epoch, taken.count);
        let mut sum = envelope::Pieces::new();
        let head = head(taken.epoch, taken.count, taken.len as u32);
        sum.update(&head);
        self.spool.read(&taken, &mut |piece| {
            hash.update(piece);
            sum.update(piece);
        })?;
        let tail = tail(&board.sign(&hash.digest()));
        sum.update(&tail);
        board.begin(envelope::HEADER + head.len() + taken.len + tail.len());
        board.send(&sum.header());
        board.send(&head);
        let sent = self.spool.read(&taken, &mut |piece| board.send(piece));
        if sent.is_err() {
            board.connect(false);
        }
        sent?;
        board.send(&tail);
        self.counts.messages += 1;
        Ok(u32::from(taken.count))
    }
}

/// Decodes what stands behind a message's number.
fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Failure> {
    postcard::from_bytes(bytes).map_err(|_| Failure::Message)
}

/// The numbers of the variants of [`Up`](flywheel_shared::message::Up) and
/// [`Down`](flywheel_shared::message::Down), which never change.
mod number {
    pub(super) const HELLO: u8 = 0;
    pub(super) const ATTEST: u8 = 5;

    pub(super) const WELCOME: u8 = 0;
    pub(super) const ACK: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const CHUNK: u8 = 3;
    pub(super) const DESIRED: u8 = 4;
    pub(super) const REFUSED: u8 = 5;
    pub(super) const SLOT_SEEN: u8 = 6;
    pub(super) const ROOT: u8 = 7;
    pub(super) const TIME: u8 = 8;
}

#[cfg(test)]
mod tests {
    use super::*;
    use flywheel_shared::message::{Chunk, Desired, Down, RefusedCode, SlotState, Up, Welcome};

    #[test]
    fn messages_have_the_numbers_of_the_wire_format() {
        let signed = Signed {
            body: &[1],
            signature: &[2],
        };
        let digest = Digest([3; 32]);
        let all = [
            (
                number::WELCOME,
                Down::Welcome(Welcome {
                    wire_version: 1,
                    now_ms: 2,
                }),
            ),
            (
                number::ACK,
                Down::Ack(Ack {
                    epoch: 1,
                    ranges: Default::default(),
                }),
            ),
            (
                number::OFFER,
                Down::Offer(OfferMessage {
                    offer: signed,
                    manifest: signed,
                }),
            ),
            (
                number::CHUNK,
                Down::Chunk(Chunk {
                    digest,
                    offset: 0,
                    bytes: &[],
                }),
            ),
            (
                number::DESIRED,
                Down::Desired(Desired {
                    run_until: 0,
                    health_at_ms: 0,
                }),
            ),
            (
                number::REFUSED,
                Down::Refused(Refused {
                    code: RefusedCode::Storage,
                    retry_after_ms: 1,
                }),
            ),
            (
                number::SLOT_SEEN,
                Down::SlotSeen(SlotSeen {
                    manifest: digest,
                    state: SlotState::Trial,
                }),
            ),
            (
                number::ROOT,
                Down::Root(SignedRoot {
                    body: &[1],
                    signatures: &[2],
                }),
            ),
            (number::TIME, Down::Time(signed)),
        ];
        for (number, message) in all {
            let mut bytes = [0; 128];
            assert_eq!(postcard::to_slice(&message, &mut bytes).unwrap()[0], number);
        }
        let hello = Hello {
            device: "cam1".parse().unwrap(),
            wire_version: 300,
            epoch: u32::MAX,
        };
        let question = Attest {
            nonce: u64::MAX,
            root_version: 1,
        };
        assert_eq!(
            bytes(&(number::HELLO, &hello)),
            bytes(&Up::Hello(hello.clone()))
        );
        assert_eq!(
            bytes(&(number::ATTEST, &question)),
            bytes(&Up::Attest(question))
        );
    }

    fn bytes(message: &impl Serialize) -> heapless::Vec<u8, SHORT> {
        let mut buffer = [0; SHORT];
        let sealed = envelope::seal(message, &mut buffer).unwrap();
        heapless::Vec::from_slice(sealed).unwrap()
    }
}
