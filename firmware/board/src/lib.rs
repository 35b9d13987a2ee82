//! What the images have in common: how deep their stack went, and how a run ends in the emulator.
#![no_std]

use core::ptr;

use cortex_m_rt::{ExceptionFrame, STACK_PAINT_VALUE, exception};
use cortex_m_semihosting::debug;
use cortex_m_semihosting::hio::{self, HostStream};

unsafe extern "C" {
    // Set by the linker script of cortex-m-rt; only their addresses mean something.
    static _stack_end: u32;
    static _stack_start: u32;
}

/// Interrupts of the part: 32 on the mps2-an500. Without a table of its own, an image gets the 240
/// of the architecture, 832 bytes more.
#[unsafe(link_section = ".vector_table.interrupts")]
#[unsafe(no_mangle)]
pub static __INTERRUPTS: [unsafe extern "C" fn(); 32] = [DefaultHandler; 32];

unsafe extern "C" {
    // Of cortex-m-rt: it never returns. No interrupt is enabled.
    fn DefaultHandler();
}

/// Bytes of stack that were ever written, and the size of the stack: `paint-stack` fills it
/// before `main`, so the first word that is no longer paint tells how deep it went.
pub fn stack() -> (usize, usize) {
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

/// Bytes of stack in use by the caller.
#[inline(always)]
pub fn depth() -> usize {
    &raw const _stack_start as usize - cortex_m::register::msp::read() as usize
}

/// Prints a number and what follows, without `core::fmt`; part of the harness of images that have
/// one.
///
/// # Errors
/// As semihosting, which has no words for it.
#[allow(clippy::result_unit_err)]
#[inline(never)]
#[unsafe(link_section = ".harness")]
pub fn print(out: &mut HostStream, number: u32, last: u8) -> Result<(), ()> {
    let mut text = [last; 11];
    let mut at = text.len() - 1;
    let mut rest = number;
    loop {
        at -= 1;
        text[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            return out.write_all(&text[at..]);
        }
    }
}

/// Tells the emulator how the run ended.
pub fn end(status: Result<(), ()>) -> ! {
    loop {
        debug::exit(status);
    }
}

/// Without `core::fmt`, which the product does not have.
#[exception]
unsafe fn HardFault(frame: &ExceptionFrame) -> ! {
    let mut line = *b"device: FAILED: hard fault at 0x00000000\n";
    for (digit, place) in line[32..40].iter_mut().enumerate() {
        let nibble = frame.pc() >> (28 - 4 * digit) & 0xF;
        *place = b"0123456789abcdef"[nibble as usize];
    }
    if let Ok(mut out) = hio::hstdout() {
        // There is nobody left to tell if this write fails.
        let _ = out.write_all(&line);
    }
    end(Err(()))
}
