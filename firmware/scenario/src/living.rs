//! A whole device on a simulated board: frames are scored, flagged, spooled to NOR flash, sent in
//! signed batches and acknowledged, through an outage, lost acknowledgements and two power cuts in
//! the middle of a flash operation. In the end every number is accounted for.

use core::fmt::Write;

use device_core::params::Params;
use device_core::slot::{Action, Event};
use device_core::spool::sim::NorSim;
use ed25519_dalek::SigningKey;
use firmware_device::{Answer, Board, Device, Identity, Input, Kept, Link, Timed};
use firmware_replay::{CELLS, ENTRIES, ERASE, MESSAGE, config};
use flywheel_shared::envelope;
use flywheel_shared::ids::Digest;
use flywheel_shared::message::{Down, LossReason, OfferMessage};
use flywheel_shared::trust::{Floor, Role, SignedRoot, TrustRoot, sign_digest};
use heapless::{Deque, Vec};

use crate::Failure::{self, Broken};
use crate::cloud::{Cloud, REPLY, signed_root};
use crate::stream::{Scene, Stream};
use crate::vectors::{DEVICE, HARDWARE, MADE_MS, MANIFEST, OFFER, ROOT};

/// The flash part.
type Flash<'c> = NorSim<'c, 4, ERASE>;
/// The device under test.
type Unit<'a, 'f, 'c> = Device<'a, &'f mut Flash<'c>, ENTRIES>;

/// Sides of a frame; three bytes a pixel.
const SIDE: usize = 32;
const PIXELS: usize = SIDE * SIDE * 3;
/// Frames, and milliseconds between them.
const FRAMES: u64 = 1600;
const FRAME_MS: u64 = 100;
/// Frames without a link.
const OUTAGE: core::ops::Range<u64> = 500..1000;
/// Flash operations after which the power of a life is cut; the last is not cut.
const CUTS: [u32; 2] = [260, 395];
/// Frames that time is given after the last one, for everything to arrive.
const TAIL: u64 = 3000;

/// Who the device is.
///
/// # Errors
/// [`Failure::Broken`] if the vectors are.
pub fn identity() -> Result<Identity, Failure> {
    Ok(Identity {
        device: DEVICE
            .parse()
            .map_err(|_| Broken("a device id is refused"))?,
        hardware: HARDWARE,
    })
}

/// What a new device has kept: the root that it was enrolled with.
fn enrolled() -> Result<Kept, Failure> {
    let trust =
        TrustRoot::pin(signed_root(ROOT)?).map_err(|_| Broken("the trust root is not believed"))?;
    Ok(Kept {
        trust: trust.into_inner(),
        ..Kept::default()
    })
}

/// The key that the device signs with; a test key.
pub fn key() -> SigningKey {
    SigningKey::from_bytes(&[4; 32])
}

/// The rollout key of the second root; a test key.
pub fn rollout_key() -> SigningKey {
    SigningKey::from_bytes(&[5; 32])
}

/// The board: a link that the scenario breaks, a cloud behind it, storage for one record.
struct Bench<'c> {
    key: SigningKey,
    cloud: &'c mut Cloud,
    /// Whether the link can come up.
    reachable: bool,
    up: bool,
    events: Deque<Link, 4>,
    replies: Deque<Vec<u8, REPLY>, 4>,
    /// What has arrived of a message of so many bytes.
    message: (Vec<u8, MESSAGE>, usize),
    kept: Kept,
    failure: Option<Failure>,
}

impl Board for Bench<'_> {
    fn begin(&mut self, len: usize) {
        self.message = (Vec::new(), len);
    }

    fn send(&mut self, piece: &[u8]) {
        let (message, len) = &mut self.message;
        if message.extend_from_slice(piece).is_err() {
            self.failure = Some(Broken("a message is longer than any"));
        }
        if !self.up || message.len() < *len {
            return;
        }
        match self.cloud.receive(message) {
            Ok(replies) => {
                for reply in replies {
                    if self.replies.push_back(reply).is_err() {
                        self.failure = Some(Broken("the cloud owes too many answers"));
                    }
                }
            }
            Err(failure) => self.failure = Some(failure),
        }
    }

    fn connect(&mut self, up: bool) {
        self.up = up && self.reachable;
        if up {
            let event = match self.reachable {
                true => Link::Connected,
                false => Link::Closed,
            };
            if self.events.push_back(event).is_err() {
                self.failure = Some(Broken("the link changes too often"));
            }
        }
    }

    fn sign(&mut self, digest: &Digest) -> [u8; 64] {
        sign_digest(Role::Device, &self.key, digest)
    }

    fn keep_root(&mut self, root: &SignedRoot<'_>) {
        // As a device does at its start: what was kept is checked again.
        match self.kept.trust.update(*root) {
            Ok(next) => self.kept.trust = next.into_inner(),
            Err(_) => self.failure = Some(Broken("the device keeps a root that is not the next")),
        }
    }

    fn keep_time(&mut self, floor: Floor) {
        self.kept.time = floor;
    }

    // Fetching and golden inputs are `proving`'s part of the scenario.
    fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Persist(record) => {
                self.kept.record = record;
                None
            }
            Action::Fetch(model) => Some(Event::Fetched {
                digest: model.digest,
            }),
            Action::RunGolden(model) => Some(Event::GoldenPassed {
                digest: model.digest,
            }),
            _ => None,
        }
    }
}

impl Bench<'_> {
    /// The power is cut: what was on its way is gone.
    fn reset(&mut self) {
        self.up = false;
        self.events.clear();
        self.replies.clear();
    }

    /// What the device hears next, if anything.
    fn heard(&mut self) -> Option<Heard> {
        let event = self.events.pop_front().map(Heard::Link);
        event.or_else(|| self.replies.pop_front().map(Heard::Message))
    }
}

#[allow(clippy::large_enum_variant)] // There is no alloc to box with.
enum Heard {
    Link(Link),
    Message(Vec<u8, REPLY>),
}

/// What is fed to the device, for who wants to feed it to another one.
pub type Recorder<'r> = &'r mut dyn FnMut(&Timed<'_>);

/// Prints what became of every flagged sample; fails unless the books balance.
///
/// # Errors
/// As [`crate::run`].
#[inline(never)] // See `crate::run`.
pub fn run(out: &mut impl Write, params: &Params<'_>, cells: &mut [u8]) -> Result<(), Failure> {
    live(out, params, cells, &CUTS, &mut |_| {})
}

/// As [`run`], with the power cut after so many flash operations of each life, and with every
/// input told to `record`.
///
/// # Errors
/// As [`crate::run`].
pub fn live(
    out: &mut impl Write,
    params: &Params<'_>,
    cells: &mut [u8],
    cuts: &[u32],
    record: Recorder<'_>,
) -> Result<(), Failure> {
    let identity = identity()?;
    let cells = cells
        .get_mut(..CELLS)
        .ok_or(Broken("the flash is too small"))?;
    let mut flash = Flash::new(cells);
    let mut cloud = Cloud::new(&identity.device, &key(), rollout_key());
    let mut bench = Bench {
        key: key(),
        cloud: &mut cloud,
        reachable: true,
        up: false,
        events: Deque::new(),
        replies: Deque::new(),
        message: (Vec::new(), 0),
        kept: enrolled()?,
        failure: None,
    };
    let mut world = World::new();
    for life in 0..=cuts.len() {
        flash.restore();
        if let Some(&operations) = cuts.get(life) {
            flash.cut_after(operations, 7 + operations);
        }
        let mut place: Option<Unit<'_, '_, '_>> = None;
        let parts = (&identity, *params, config());
        let found = Device::start(&mut place, parts, bench.kept.clone(), &mut flash)
            .map_err(|_| Broken("the device does not start"))?;
        let device = place.as_mut().ok_or(Broken("the device is gone"))?;
        device
            .boot(&mut bench)
            .map_err(|_| Broken("the slot does not start"))?;
        writeln!(
            out,
            "life: start at frame {}: {} held, {} lost in the crash",
            world.frame, found.held, found.crashed
        )?;
        while !world.is_over(device) {
            world.step(device, &mut bench, record)?;
            if device.flash().is_cut() {
                writeln!(out, "life: the power is cut at frame {}", world.frame)?;
                bench.reset();
                break;
            }
        }
        if life == cuts.len() {
            audit(out, device, &bench)?;
        }
    }
    Ok(())
}

/// Time, and what the camera sees in it.
struct World {
    stream: Stream,
    /// Ticks of [`FRAME_MS`]; a frame each, as long as there are any.
    frame: u64,
    pixels: [u8; PIXELS],
}

impl World {
    fn new() -> Self {
        Self {
            stream: Stream::new(51),
            frame: 0,
            pixels: core::array::from_fn(|at| (at * 31) as u8),
        }
    }

    /// An input of this moment.
    fn timed<'i>(&mut self, input: Input<'i>) -> Timed<'i> {
        Timed {
            // A device without a clock counts from its start: it knows no time but what is signed.
            now_ms: self.frame * FRAME_MS,
            draw: self.stream.draw(),
            input,
        }
    }

    fn scene(&self) -> Scene {
        match self.frame * 4 / FRAMES {
            0 => Scene::DAY,
            1 => Scene::NIGHT,
            _ => Scene::LATE,
        }
    }

    /// Whether all frames are seen and all records have arrived, or time is up.
    fn is_over(&self, device: &Unit<'_, '_, '_>) -> bool {
        let arrived = device.books().all(|book| book.spooled.is_empty());
        self.frame >= FRAMES + TAIL || self.frame >= FRAMES && arrived
    }

    /// Everything that happens within [`FRAME_MS`].
    fn step(
        &mut self,
        device: &mut Unit<'_, '_, '_>,
        bench: &mut Bench<'_>,
        record: Recorder<'_>,
    ) -> Result<(), Failure> {
        bench.cloud.now_ms = MADE_MS + self.frame * FRAME_MS;
        bench.reachable = !OUTAGE.contains(&self.frame);
        if bench.up && !bench.reachable {
            bench.reset();
            // The queue is empty.
            let _ = bench.events.push_back(Link::Closed);
        }
        while let Some(heard) = bench.heard() {
            let input = match &heard {
                Heard::Link(link) => Input::Link(*link),
                Heard::Message(bytes) => Input::Message(bytes),
            };
            take(device, bench, record, &self.timed(input))?;
        }
        if self.frame == 1 {
            let mut message = [0; 1024];
            let bytes = offer(&mut message)?;
            take(device, bench, record, &self.timed(Input::Message(bytes)))?;
        }
        let mut timed = self.timed(Input::Link(Link::Tick));
        if self.frame < FRAMES {
            let seen = self.stream.frame(self.scene());
            self.pixels[..8].copy_from_slice(&self.frame.to_le_bytes());
            timed.input = Input::Frame(Answer {
                frame: self.frame,
                track: self.frame / 8,
                latency_us: 900,
                logits: Vec::from_slice(&seen.logits).map_err(|_| Broken("too many classes"))?,
                embedding: Vec::from_slice(&seen.embedding)
                    .map_err(|_| Broken("the embedding is too long"))?,
                width: SIDE as u16,
                height: SIDE as u16,
                pixels: &self.pixels,
            });
        }
        take(device, bench, record, &timed)?;
        self.frame += 1;
        Ok(())
    }
}

fn take(
    device: &mut Unit<'_, '_, '_>,
    bench: &mut Bench<'_>,
    record: Recorder<'_>,
    timed: &Timed<'_>,
) -> Result<(), Failure> {
    record(timed);
    let done = device.take(timed, bench);
    if let Some(failure) = bench.failure.take() {
        return Err(failure);
    }
    // A flash without power fails, which the caller sees by itself.
    match done {
        Err(_) if !device.flash().is_cut() => Err(Broken("the device fails")),
        _ => Ok(()),
    }
}

/// The signed offer of the vectors as a message.
fn offer(buffer: &mut [u8]) -> Result<&[u8], Failure> {
    let read =
        |bytes| postcard::from_bytes(bytes).map_err(|_| Broken("a signed vector does not decode"));
    let message = Down::Offer(OfferMessage {
        offer: read(OFFER)?,
        manifest: read(MANIFEST)?,
    });
    envelope::seal(&message, buffer).ok_or(Broken("the offer is too long"))
}

/// flagged = acknowledged + spooled + recorded losses, for every epoch.
fn audit(
    out: &mut impl Write,
    device: &Unit<'_, '_, '_>,
    bench: &Bench<'_>,
) -> Result<(), Failure> {
    let cloud = &*bench.cloud;
    writeln!(
        out,
        "uplink: {} batches, {} acknowledgements lost, {} records twice, fingerprint {}",
        cloud.batches, cloud.acks_lost, cloud.again, cloud.all
    )?;
    for book in device.books() {
        let tally = cloud.tallies.iter().find(|tally| tally.epoch == book.epoch);
        let (samples, losses, whole) =
            tally.map_or((0, [0; 5], 0), |t| (t.samples, t.losses, t.whole()));
        let lost: u32 = losses.iter().sum();
        let spooled: u32 = book.spooled.iter().map(|&(low, high)| high - low + 1).sum();
        write!(
            out,
            "audit: epoch {}: {} flagged = {samples} ingested + {spooled} spooled",
            book.epoch, book.flagged
        )?;
        for (reason, count) in [
            LossReason::Evicted,
            LossReason::Crash,
            LossReason::Disk,
            LossReason::Corrupt,
            LossReason::Oversize,
        ]
        .into_iter()
        .zip(losses)
        .filter(|(_, count)| *count > 0)
        {
            write!(out, " + {count} {}", reason.name())?;
        }
        writeln!(out)?;
        if book.flagged != samples + spooled + lost || whole + spooled < book.flagged {
            return Err(Broken(
                "a flagged sample is neither in the cloud nor booked",
            ));
        }
    }
    let live = device.record().live.map(|model| model.sequence);
    match live {
        Some(sequence) => writeln!(out, "life: model {sequence} is live")?,
        None => return Err(Broken("the offered model is not live")),
    }
    writeln!(
        out,
        "life: trust root {} is in force",
        bench.kept.trust.version
    )?;
    Ok(())
}
