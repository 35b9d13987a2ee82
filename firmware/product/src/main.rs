//! The device alone: no scenario, no vectors, no text. It plays a recording that the emulator puts
//! in memory and says in numbers what came of it; `firmware-host replay` must say the same.
//!
//! What no product has (the player of the recording, the simulated flash, the output) lies in a
//! section of its own, `.harness`, in a memory of its own, and is measured apart. Whatever else the
//! linker finds is the product's, so what both use is counted as the product's too.
#![no_std]
#![no_main]

use core::mem::MaybeUninit;
use core::panic::PanicInfo;

use cortex_m::peripheral::syst::SystClkSource;
use cortex_m::peripheral::{Peripherals, SYST};
use cortex_m_rt::entry;
use cortex_m_semihosting::hio;
use device_core::spool::sim::{NorSim, SimError};
use embedded_storage::nor_flash::{ErrorType, NorFlash, ReadNorFlash};
use firmware_device::{Device, Identity, Timed};
use firmware_replay::{CELLS, ENTRIES, ERASE, Memory, Summary, VALUES, replay};

/// Longest recording in bytes.
const RECORDING: usize = 8 << 20;
/// What the counter counts modulo.
const RELOAD: u32 = 1 << 24;

unsafe extern "C" {
    // Set by `memory.x`; only their addresses mean something.
    static mut _nor: [u8; CELLS];
    static mut _values: [f32; VALUES];
    static _recording: [u8; RECORDING];
}

/// The device's own memory. Uninitialised, so that it takes no flash.
static mut DEVICE: MaybeUninit<Option<Device<'static, Chip, ENTRIES>>> = MaybeUninit::uninit();
static mut IDENTITY: MaybeUninit<Option<Identity>> = MaybeUninit::uninit();

/// The flash part. A product has the driver of its own, so this counts as the harness's.
struct Chip(NorSim<'static, 4, ERASE>);

impl ErrorType for Chip {
    type Error = SimError;
}

impl ReadNorFlash for Chip {
    const READ_SIZE: usize = <NorSim<'_, 4, ERASE> as ReadNorFlash>::READ_SIZE;

    #[inline(never)]
    #[unsafe(link_section = ".harness")]
    fn read(&mut self, offset: u32, bytes: &mut [u8]) -> Result<(), SimError> {
        self.0.read(offset, bytes)
    }

    fn capacity(&self) -> usize {
        CELLS
    }
}

impl NorFlash for Chip {
    const WRITE_SIZE: usize = <NorSim<'_, 4, ERASE> as NorFlash>::WRITE_SIZE;
    const ERASE_SIZE: usize = ERASE;

    #[inline(never)]
    #[unsafe(link_section = ".harness")]
    fn erase(&mut self, from: u32, to: u32) -> Result<(), SimError> {
        self.0.erase(from, to)
    }

    #[inline(never)]
    #[unsafe(link_section = ".harness")]
    fn write(&mut self, offset: u32, bytes: &[u8]) -> Result<(), SimError> {
        self.0.write(offset, bytes)
    }
}

#[entry]
fn main() -> ! {
    firmware_board::end(run())
}

#[inline(never)]
#[unsafe(link_section = ".harness")]
fn run() -> Result<(), ()> {
    let mut syst = Peripherals::take().ok_or(())?.SYST;
    syst.set_clock_source(SystClkSource::Core);
    syst.set_reload(RELOAD - 1);
    syst.clear_current();
    syst.enable_counter();
    let (nor, values, recording) = (&raw mut _nor, &raw mut _values, &raw const _recording);
    let (identity, device) = (&raw mut IDENTITY, &raw mut DEVICE);
    // SAFETY: memory that the linker script gives to nobody else, borrowed here only and once; the
    // recording was put there before the start and is never written to. Bytes and floats may have
    // any value.
    let (nor, values, recording) = unsafe { (&mut *nor, &mut *values, &*recording) };
    // SAFETY: borrowed here only and once, and written before they are read.
    let memory = unsafe {
        Memory {
            values,
            identity: (*identity).write(None),
            device: (*device).write(None),
        }
    };
    nor.fill(0xFF);
    // The counter counts down, and is scaled so that its 24 bits wrap like 32.
    let clock = || 0u32.wrapping_sub(SYST::get_current() << 8);
    let chip = Chip(NorSim::new(nor));
    let summary = replay(recording, "cortexm7", chip, memory, clock).map_err(drop)?;
    // What lies below this frame is the harness's, but for the input, which a product has too.
    let own = firmware_board::depth() - size_of::<Timed<'_>>();
    report(&summary, own)
}

#[inline(never)]
#[unsafe(link_section = ".harness")]
fn report(summary: &Summary, own: usize) -> Result<(), ()> {
    let mut out = hio::hstdout()?;
    for number in summary.numbers() {
        firmware_board::print(&mut out, number, b' ')?;
    }
    out.write_all(b"\ndevice: ")?;
    firmware_board::print(&mut out, summary.ticks >> 8, b' ')?;
    firmware_board::print(&mut out, (firmware_board::stack().0 - own) as u32, b'\n')
}

/// A product restarts here; the emulator is told.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    firmware_board::end(Err(()))
}
