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
use flywheel_shared::message::{Codec, Down, EpochBook, Hello, OfferMessage, Sample, Scores, Up};
use flywheel_shared::trust::{BatchHash, Judge, TrustRoot};
use flywheel_shared::{MAX_MESSAGE, WIRE_VERSION};

use crate::batch::{head, tail};
use crate::{Answer, DIM, Input, Link, Timed};

/// Steps that one input may lead to before something is wrong.
const CHAIN: usize = 64;
/// Longest hello in bytes, envelope included: a variant, a device id and two numbers.
const HELLO: usize = envelope::HEADER + 1 + (1 + DEVICE_ID_MAX) + 3 + 5;

/// Who the device is and whom it believes.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its name.
    pub device: DeviceId,
    /// Its hardware class.
    pub hardware: &'static str,
    /// The pinned keys.
    pub trust: TrustRoot,
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
    params: Params<'a>,
    trigger: Trigger,
    flicker: Flicker,
    spool: Spool<F, N>,
    uplink: Uplink,
    slot: Slot,
    counts: Counts,
}

impl<'a, F: NorFlash, const N: usize> Device<'a, F, N> {
    /// Starts, in `place`, with the spool that lies in `flash` and the slot record that the board
    /// has kept.
    ///
    /// # Errors
    /// [`Failure::Trigger`] or [`Failure::Spool`].
    #[inline(never)] // What is moved into place is on the stack twice; so only until this returns.
    pub fn start(
        place: &mut Option<Self>,
        (identity, params, config): (&'a Identity, Params<'a>, Config),
        record: SlotRecord,
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
            params,
            trigger: Trigger::new(config.trigger).map_err(Failure::Trigger)?,
            flicker: Flicker::default(),
            spool,
            uplink: Uplink::new(config.uplink),
            slot: Slot::new(record),
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
        self.slot(slot::Event::Boot, board)
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
            Input::Message(bytes) => self.receive(now_ms, bytes, board)?,
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
            captured_ms: now_ms,
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
    fn receive(
        &mut self,
        now_ms: u64,
        bytes: &[u8],
        board: &mut impl Board,
    ) -> Result<uplink::Event, Failure> {
        let (payload, _) = envelope::split(bytes, MAX_MESSAGE).map_err(|_| Failure::Message)?;
        match postcard::from_bytes(payload).map_err(|_| Failure::Message)? {
            Down::Welcome(_) => Ok(uplink::Event::Welcomed),
            Down::Ack(ack) => {
                let records = self.spool.acknowledge(ack.epoch, &ack.ranges)?;
                self.counts.acknowledged += records;
                Ok(uplink::Event::Acked { records })
            }
            Down::Offer(message) => {
                if let Some(event) = self.offer(now_ms, &message) {
                    self.slot(event, board)?;
                }
                Ok(uplink::Event::Tick)
            }
            Down::SlotSeen(seen) => {
                self.slot(
                    slot::Event::ReportSeen {
                        digest: seen.manifest,
                        state: seen.state,
                    },
                    board,
                )?;
                Ok(uplink::Event::Tick)
            }
            Down::Refused(refused) => Ok(uplink::Event::Refused {
                code: refused.code,
                retry_after_ms: refused.retry_after_ms,
            }),
            // Model bytes and wishes are the board's business.
            Down::Chunk(_) | Down::Desired(_) => Ok(uplink::Event::Tick),
        }
    }

    /// What the slot is to hear of an offer. Without a signature that holds, it is nobody's.
    #[inline(never)]
    fn offer(&self, now_ms: u64, message: &OfferMessage<'_>) -> Option<slot::Event> {
        let judge = Judge {
            trust: &self.identity.trust,
            device: &self.identity.device,
            hardware: self.identity.hardware,
            floor: self.slot.record().floor(),
            now_ms,
        };
        let manifest = judge.offer(message.offer, message.manifest).ok()?;
        Some(slot::Event::Offer {
            model: Held {
                digest: manifest.digest(),
                sequence: manifest.sequence,
            },
            bounds: manifest.trial,
        })
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
        let hello = Up::Hello(Hello {
            device: self.identity.device.clone(),
            wire_version: WIRE_VERSION,
            epoch: self.spool.epoch(),
        });
        let mut bytes = [0; HELLO];
        let message = envelope::seal(&hello, &mut bytes).ok_or(Failure::Message)?;
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
