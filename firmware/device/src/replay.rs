//! A recorded life of a device, played again: what the product image runs, so that its size, its
//! memory and its instructions are those of the device and not of a scenario. The recording (keys,
//! score parameters, and every input with its time) lies in memory outside the image.
//!
//! What only replays is no part of a product, so the image can count it apart: nothing of the
//! device is inlined into [`replay`].

use device_core::params::Params;
use device_core::slot::{Action, Event, SlotRecord};
use device_core::trigger::TriggerConfig;
use device_core::uplink::UplinkConfig;
use ed25519_dalek::SigningKey;
use embedded_storage::nor_flash::NorFlash;
use flywheel_shared::envelope::HEADER;
use flywheel_shared::ids::{DeviceId, Digest};
use flywheel_shared::message::MAX_BOOKS;
use flywheel_shared::trust::{Role, Signed, sign_digest, verify_root};
use serde::{Deserialize, Serialize};

use crate::batch::{HEAD_MAX, TAIL};
use crate::{Board, Config, Counts, Device, Failure, Identity, Timed};

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
    pub root: Signed<'a>,
    /// The score parameters.
    #[serde(borrow, with = "crate::bytes")]
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
    let identity: &Identity = memory
        .identity
        .insert(identity(start.device, hardware, start.root)?);
    let parts = (identity, params(start.scores, memory.values)?, config());
    let mut port = Port {
        key: SigningKey::from_bytes(&start.key),
        sent: 0xCBF2_9CE4_8422_2325,
        clock,
        since: None,
        ticks: 0,
    };
    Device::start(memory.device, parts, SlotRecord::default(), flash)?;
    let device = memory.device.as_mut().ok_or(Failure::Spool)?;
    device.boot(&mut port)?;
    for _ in 0..start.inputs {
        let (timed, after): (Timed<'_>, &[u8]) =
            postcard::take_from_bytes(rest).map_err(|_| Failure::Message)?;
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

#[inline(never)] // A device has to do it too.
fn identity(
    device: DeviceId,
    hardware: &'static str,
    root: Signed<'_>,
) -> Result<Identity, Failure> {
    let verified = verify_root(root).map_err(|_| Failure::Message)?;
    Ok(Identity {
        device,
        hardware,
        trust: (*verified).clone(),
    })
}

#[inline(never)] // Like `identity`.
fn params<'a>(bytes: &[u8], values: &'a mut [f32; VALUES]) -> Result<Params<'a>, Failure> {
    Params::parse(bytes, values).map_err(|_| Failure::Score)
}
