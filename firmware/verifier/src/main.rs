//! The verifier alone, to know what it takes: a root is pinned, the next one follows, time is
//! learnt, an offer with its manifest is judged, and a part is held against it. It is linked without
//! an allocator. `firmware/attacks` tries what must be refused.
#![no_std]
#![no_main]

use core::panic::PanicInfo;

use cortex_m_rt::entry;
use cortex_m_semihosting::hio;
use firmware_scenario::vectors::{
    DEVICE, GOLDEN, HARDWARE, MANIFEST, NONCE, OFFER, ROOT, ROOT2, TIME,
};
use flywheel_shared::ids::DeviceId;
use flywheel_shared::trust::{
    Judge, PartKind, Signed, SignedRoot, Timekeeper, TrustError, TrustRoot, Verified, check_part,
};

#[entry]
fn main() -> ! {
    firmware_board::end(report())
}

/// Prints the number of the error, 0 for none, and what the verifier took of the stack.
#[inline(never)]
#[unsafe(link_section = ".harness")]
fn report() -> Result<(), ()> {
    let mut out = hio::hstdout()?;
    let device = DEVICE.parse().map_err(drop)?;
    let code = everything(&device).map_or_else(TrustError::code, |()| 0);
    out.write_all(b"verifier: ")?;
    firmware_board::print(&mut out, code.into(), b'\n')?;
    out.write_all(b"device: ")?;
    let stack = firmware_board::stack().0 - firmware_board::depth();
    firmware_board::print(&mut out, stack as u32, b'\n')
}

#[inline(never)]
fn everything(device: &DeviceId) -> Result<(), TrustError> {
    let trust = roots()?;
    let mut time = Timekeeper::default();
    time.answer(&trust, device, NONCE, signed(TIME)?, 0)?;
    let judge = Judge {
        trust: &trust,
        device,
        hardware: HARDWARE,
        floor: trust.min_sequence,
        now_ms: time.now(&trust, None, 1),
    };
    let accepted = judge.offer(signed(OFFER)?, signed(MANIFEST)?)?;
    check_part(accepted.manifest.listed(PartKind::Golden)?, GOLDEN)
}

#[inline(never)]
fn roots() -> Result<Verified<TrustRoot>, TrustError> {
    let pinned = TrustRoot::pin(SignedRoot::from_bytes(ROOT)?)?;
    pinned.update(SignedRoot::from_bytes(ROOT2)?)
}

fn signed(bytes: &'static [u8]) -> Result<Signed<'static>, TrustError> {
    postcard::from_bytes(bytes).map_err(|_| TrustError::Malformed)
}

/// The emulator is told.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    firmware_board::end(Err(()))
}
