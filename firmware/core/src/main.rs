//! The image: runs the scenario and tells the emulator how it ended.
//!
//! It is linked without an allocator, so code that allocates does not get in here. Lines that
//! begin with `device:` concern the microcontroller only; all others must equal the host's.
#![no_std]
#![no_main]

use core::fmt::Write as _;

use cortex_m_rt::entry;
use cortex_m_semihosting::hio;
use firmware_replay::CELLS;
use panic_semihosting as _;

unsafe extern "C" {
    // Set by `memory.x`.
    static mut _nor: [u8; CELLS];
}

#[entry]
fn main() -> ! {
    firmware_board::end(report())
}

/// Runs the scenario; an error if it failed, if output is lost or if the stack was used up.
fn report() -> Result<(), ()> {
    let mut out = hio::hstdout()?;
    let nor = &raw mut _nor;
    // SAFETY: memory that the linker script gives to nobody else, borrowed once.
    let nor = unsafe { &mut *nor };
    nor.fill(0xFF);
    let result = firmware_scenario::run(&mut out, nor);
    let (used, size) = firmware_board::stack();
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
