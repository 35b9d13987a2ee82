//! A recorded life of a device, played again: what the product image runs, so that its size, its
//! memory and its instructions are those of the device and not of a scenario. The recording (keys,
//! score parameters, and every input with its time) lies in memory outside the image.
//!
//! What only replays is no part of a product: on the microcontroller it lies in a section of its own,
//! `.harness`, and is measured apart. Nothing of the device is inlined into it.
#![no_std]

use device_core::params::Params;
use device_core::slot::{Action, Event};
use device_core::trigger::TriggerConfig;
use device_core::uplink::UplinkConfig;
use ed25519_dalek::SigningKey;
use embedded_storage::nor_flash::NorFlash;
use firmware_device::{
    Board, Config, Counts, Device, Failure, HEAD_MAX, Identity, Kept, TAIL, Timed,
};
use flywheel_shared::envelope::HEADER;
use flywheel_shared::ids::{DeviceId, Digest};
use flywheel_shared::message::MAX_BOOKS;
use flywheel_shared::trust::{Floor, Role, SignedRoot, TrustRoot, sign_digest};
use serde::{Deserialize, Serialize};

/// Bytes of an erase block, as most serial NOR parts have them; a spool slot is one.
pub const ERASE: usize = 4096;
/// Samples that the spool holds.
pub const SLOTS: usize = 12;
/// Length of the spool's table.
pub const ENTRIES: usize = 2 * SLOTS + MAX_BOOKS + 2;
/// Bytes of flash: two halves of the journal, and the slots.
pub const CELLS: usize = (2 + SLOTS) * ERASE;
/// Bytes of the longest message that the device sends: a batch with one sample as long as a slot.
pub const MESSAGE: usize = HEADER + HEAD_MAX + ERASE + TAIL;
/// Most values of the score parameters.
pub const VALUES: usize = 640;

/// How the device spends and sends.
pub fn config() -> Config {
    Config {
        trigger: TriggerConfig {
            budget_ratio: 0.05,
            burst_bytes: 16 * 1024,
            ..TriggerConfig::default()
        },
        uplink: UplinkConfig {
            second: None,
            batch_bytes: ERASE as u32,
            ..UplinkConfig::default()
        },
        slot_bytes: ERASE as u32,
    }
}

/// What stands in front of the recorded inputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start<'a> {
    /// The device's name.
    pub device: DeviceId,
    /// Its signing key.
    pub key: [u8; 32],
    /// The pinned trust root.
    #[serde(borrow)]
    pub root: SignedRoot<'a>,
    /// The score parameters.
    #[serde(borrow)]
    pub scores: &'a [u8],
    /// How many inputs follow.
    pub inputs: u32,
}

/// What came of it; the same on every machine but for `ticks`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// The device's own counts.
    pub counts: Counts,
    /// FNV-1a over every byte sent.
    pub sent: u64,
    /// Numbers given out.
    pub flagged: u32,
    /// Numbers still in the spool.
    pub spooled: u32,
    /// Sequence of the live model.
    pub live: Option<u64>,
    /// Ticks of the clock while frames were scored and judged.
    pub ticks: u32,
}

impl Summary {
    /// What host and image print, and must agree on.
    pub fn numbers(&self) -> [u32; 9] {
        [
            self.counts.frames,
            self.counts.unscored,
            self.counts.messages,
            self.counts.acknowledged,
            self.flagged,
            self.spooled,
            self.live.unwrap_or(0) as u32,
            (self.sent >> 32) as u32,
            self.sent as u32,
        ]
    }
}

/// Where the parts of a device lie.
pub struct Memory<'a, F> {
    /// The score parameters. They belong to the model, so they count as no memory of the device.
    pub values: &'a mut [f32; VALUES],
    /// Who it is.
    pub identity: &'a mut Option<Identity>,
    /// The device itself.
    pub device: &'a mut Option<Device<'a, F, ENTRIES>>,
}

/// A board without radio: it signs, sums up what it is to send, and believes what it is to fetch.
struct Port<C> {
    key: SigningKey,
    sent: u64,
    clock: C,
    since: Option<u32>,
    ticks: u32,
}

impl<C: FnMut() -> u32> Board for Port<C> {
    fn begin(&mut self, _len: usize) {}

    fn send(&mut self, piece: &[u8]) {
        for byte in piece {
            self.sent = (self.sent ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
    }

    fn connect(&mut self, _up: bool) {}

    fn sign(&mut self, digest: &Digest) -> [u8; 64] {
        sign_digest(Role::Device, &self.key, digest)
    }

    fn keep_root(&mut self, _root: &SignedRoot<'_>) {}

    fn keep_time(&mut self, _floor: Floor) {}

    fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Fetch(model) => Some(Event::Fetched {
                digest: model.digest,
            }),
            Action::RunGolden(model) => Some(Event::GoldenPassed {
                digest: model.digest,
            }),
            _ => None,
        }
    }

    fn measure(&mut self) {
        let now = (self.clock)();
        match self.since.take() {
            Some(since) => self.ticks += now.wrapping_sub(since),
            None => self.since = Some(now),
        }
    }
}

/// Plays `recording` on new flash. `clock` counts up, modulo 2³².
///
/// # Errors
/// [`Failure`]: the recording is damaged, or the device fails on it.
pub fn replay<'a, F: NorFlash>(
    recording: &'a [u8],
    hardware: &'static str,
    flash: F,
    memory: Memory<'a, F>,
    clock: impl FnMut() -> u32,
) -> Result<Summary, Failure> {
    let (start, mut rest): (Start<'_>, &[u8]) =
        postcard::take_from_bytes(recording).map_err(|_| Failure::Message)?;
    let identity: &Identity = memory.identity.insert(Identity {
        device: start.device,
        hardware,
    });
    let parts = (identity, params(start.scores, memory.values)?, config());
    let mut port = Port {
        key: SigningKey::from_bytes(&start.key),
        sent: 0xCBF2_9CE4_8422_2325,
        clock,
        since: None,
        ticks: 0,
    };
    Device::start(memory.device, parts, kept(start.root)?, flash)?;
    let device = memory.device.as_mut().ok_or(Failure::Spool)?;
    device.boot(&mut port)?;
    for _ in 0..start.inputs {
        let (timed, after) = next(rest)?;
        rest = after;
        device.take(&timed, &mut port)?;
    }
    let spooled = |(low, high): &(u32, u32)| high - low + 1;
    let mut summary = Summary {
        counts: device.counts(),
        sent: port.sent,
        live: device.record().live.map(|model| model.sequence),
        ticks: port.ticks,
        ..Summary::default()
    };
    for book in device.books() {
        summary.flagged += book.flagged;
        summary.spooled += book.spooled.iter().map(spooled).sum::<u32>();
    }
    Ok(summary)
}

/// The next input. Decoding leaves nothing on the stack while the device works.
#[inline(never)]
#[cfg_attr(target_os = "none", unsafe(link_section = ".harness"))]
fn next(rest: &[u8]) -> Result<(Timed<'_>, &[u8]), Failure> {
    postcard::take_from_bytes(rest).map_err(|_| Failure::Message)
}

/// What a new device has kept: the root that it was enrolled with.
#[inline(never)] // A device has to check it too.
fn kept(root: SignedRoot<'_>) -> Result<Kept, Failure> {
    let trust = TrustRoot::pin(root).map_err(|_| Failure::Message)?;
    Ok(Kept {
        trust: trust.into_inner(),
        ..Kept::default()
    })
}

#[inline(never)] // Like `kept`.
fn params<'a>(bytes: &[u8], values: &'a mut [f32; VALUES]) -> Result<Params<'a>, Failure> {
    Params::parse(bytes, values).map_err(|_| Failure::Score)
}
