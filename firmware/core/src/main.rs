//! The image: runs the scenario and tells the emulator how it ended.
//!
//! It is linked without an allocator, so code that allocates does not get in here. Lines that
//! begin with `device:` concern the microcontroller only; all others must equal the host's.
#![no_std]
#![no_main]

use core::fmt::Write as _;
use core::ptr;

use cortex_m_rt::{ExceptionFrame, STACK_PAINT_VALUE, entry, exception};
use cortex_m_semihosting::{debug, hio};
use firmware_device::replay::CELLS;
use panic_semihosting as _;

unsafe extern "C" {
    // Set by the linker script of cortex-m-rt; only their addresses mean something.
    static _stack_end: u32;
    static _stack_start: u32;
    static mut _nor: [u8; CELLS];
}

#[entry]
fn main() -> ! {
    let status = report();
    loop {
        debug::exit(status);
    }
}

/// Runs the scenario; an error if it failed, if output is lost or if the stack was used up.
fn report() -> Result<(), ()> {
    let mut out = hio::hstdout()?;
    let nor = &raw mut _nor;
    // SAFETY: memory that the linker script gives to nobody else, borrowed once.
    let nor = unsafe { &mut *nor };
    nor.fill(0xFF);
    let result = firmware_scenario::run(&mut out, nor);
    let (used, size) = stack();
    writeln!(out, "device: stack {used} of {size} bytes").map_err(drop)?;
    if let Err(failure) = result {
        writeln!(out, "device: FAILED: {failure}").map_err(drop)?;
        return Err(());
    }
    if used == size {
        writeln!(out, "device: FAILED: the stack reached its end").map_err(drop)?;
        return Err(());
    }
    Ok(())
}

/// Bytes of stack that were ever written, and the size of the stack: `paint-stack` fills it
/// before `main`, so the first word that is no longer paint tells how deep it went.
fn stack() -> (usize, usize) {
    let (end, start) = (&raw const _stack_end, &raw const _stack_start);
    let size = start as usize - end as usize;
    let mut painted = 0;
    // SAFETY: the linker script puts the words from `_stack_end` up to `_stack_start` in RAM, and
    // the loop stops below the present frame at the latest, whose words are no paint. Nothing
    // below the stack pointer belongs to a Rust object.
    while painted < size
        && unsafe { ptr::read_volatile(end.byte_add(painted)) } == STACK_PAINT_VALUE
    {
        painted += size_of::<u32>();
    }
    (size - painted, size)
}

#[exception]
unsafe fn HardFault(frame: &ExceptionFrame) -> ! {
    if let Ok(mut out) = hio::hstdout() {
        // There is nobody left to tell if this write fails.
        let _ = writeln!(out, "device: FAILED: hard fault at {:#010x}", frame.pc());
    }
    loop {
        debug::exit(debug::EXIT_FAILURE);
    }
}
