//! The device alone: no scenario, no vectors, no text. It plays a recording that the emulator puts
//! in memory and says in numbers what came of it; `firmware-host replay` must say the same.
#![no_std]
#![no_main]

use core::fmt::Write as _;
use core::panic::PanicInfo;
use core::ptr;

use cortex_m::peripheral::syst::SystClkSource;
use cortex_m::peripheral::{Peripherals, SYST};
use cortex_m_rt::{STACK_PAINT_VALUE, entry, exception};
use cortex_m_semihosting::{debug, hio};
use firmware_device::replay::{BUFFER, CELLS, Flash, Summary, replay};

/// Longest recording in bytes.
const RECORDING: usize = 8 << 20;
/// What the counter counts modulo.
const RELOAD: u32 = 1 << 24;

unsafe extern "C" {
    // Set by the linker script of cortex-m-rt; only their addresses mean something.
    static _stack_end: u32;
    static _stack_start: u32;
    // Set by `memory.x`.
    static mut _nor: [u8; CELLS];
    static _recording: [u8; RECORDING];
}

/// Where the device builds its messages.
static mut MESSAGE: [u8; BUFFER] = [0; BUFFER];

#[entry]
fn main() -> ! {
    let status = run();
    loop {
        debug::exit(status);
    }
}

fn run() -> Result<(), ()> {
    let mut syst = Peripherals::take().ok_or(())?.SYST;
    syst.set_clock_source(SystClkSource::Core);
    syst.set_reload(RELOAD - 1);
    syst.clear_current();
    syst.enable_counter();
    let (nor, recording, message) = (&raw mut _nor, &raw const _recording, &raw mut MESSAGE);
    // SAFETY: memory that the linker script gives to nobody else, borrowed here only and once; the
    // recording was put there before the start and is never written to.
    let (nor, recording, message) = unsafe { (&mut *nor, &*recording, &mut *message) };
    nor.fill(0xFF);
    // The counter counts down, and is scaled so that its 24 bits wrap like 32.
    let clock = || 0u32.wrapping_sub(SYST::get_current() << 8);
    let summary = replay(recording, "cortexm7", Flash::new(nor), message, clock).map_err(drop)?;
    report(&summary)
}

#[inline(never)]
fn report(summary: &Summary) -> Result<(), ()> {
    let mut out = hio::hstdout()?;
    let Summary {
        counts,
        sent,
        flagged,
        spooled,
        live,
        ticks,
    } = *summary;
    writeln!(
        out,
        "{} {} {} {} {flagged} {spooled} {} {} {}",
        counts.frames,
        counts.unscored,
        counts.messages,
        counts.acknowledged,
        live.unwrap_or(0),
        (sent >> 32) as u32,
        sent as u32
    )
    .map_err(drop)?;
    writeln!(out, "device: {} {}", ticks >> 8, stack()).map_err(drop)
}

/// Bytes of stack that were ever written: `paint-stack` fills it before `main`.
fn stack() -> usize {
    let (end, start) = (&raw const _stack_end, &raw const _stack_start);
    let size = start as usize - end as usize;
    let mut painted = 0;
    // SAFETY: the linker script puts the words from `_stack_end` up to `_stack_start` in RAM, and
    // all of them were written at start.
    while painted < size
        && unsafe { ptr::read_volatile(end.byte_add(painted)) } == STACK_PAINT_VALUE
    {
        painted += size_of::<u32>();
    }
    size - painted
}

/// A product restarts here; the emulator is told.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        debug::exit(debug::EXIT_FAILURE);
    }
}

#[exception]
unsafe fn HardFault(_: &cortex_m_rt::ExceptionFrame) -> ! {
    loop {
        debug::exit(debug::EXIT_FAILURE);
    }
}
