//! The image. It is linked without an allocator.

use core::fmt::Write as _;

use cortex_m_rt::entry;
use cortex_m_semihosting::hio;
use panic_semihosting as _;

#[entry]
fn main() -> ! {
    firmware_board::end(report())
}

fn report() -> Result<(), ()> {
    let mut out = hio::hstdout()?;
    let result = firmware_attacks::run(&mut out);
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
