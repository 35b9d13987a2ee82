//! What the image runs on the microcontroller and `firmware-host` on a host, so that their outputs
//! can be compared byte by byte: an offer is verified, answers are scored, a sensor is read, a stream is flagged
//! under a budget, a model goes through the slot, and a whole device lives through an outage and
//! two power cuts. The code under test is `flywheel-shared`, `device-core` and `firmware-device`,
//! unchanged; this crate only feeds it and prints.
//!
//! Every number that is printed is either an integer, an `f32` with five decimals, or a
//! fingerprint over the bits of many `f32`, which no rounding can hide from.
#![no_std]
#![forbid(unsafe_code)]

use core::fmt::{self, Write};

mod cloud;
mod flagging;
pub mod living;
mod proving;
mod report;
mod scoring;
mod sensing;
pub mod stream;
mod trusting;
pub mod vectors;

/// Why a run ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The output could not be written.
    Output,
    /// Something did not hold that must.
    Broken(&'static str),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Output => f.write_str("the output could not be written"),
            Self::Broken(what) => f.write_str(what),
        }
    }
}

impl core::error::Error for Failure {}

impl From<fmt::Error> for Failure {
    fn from(_: fmt::Error) -> Self {
        Self::Output
    }
}

/// Runs everything and prints it, one fact a line.
///
/// # Errors
/// [`Failure::Output`] if `out` fails; [`Failure::Broken`] if a forgery is believed, a good offer
/// is not, the budget is exceeded, the model does not end up live, or a flagged sample is neither
/// acknowledged nor booked. `flash` holds [`firmware_replay::CELLS`] bytes or more, all erased.
pub fn run(out: &mut impl Write, flash: &mut [u8]) -> Result<(), Failure> {
    // The parts are never inlined, so that the stack holds the buffers of one of them at a time.
    let (manifest, key) = trusting::run(out)?;
    let mut values = [0.0; scoring::VALUES];
    let params = scoring::run(out, &mut values)?;
    sensing::run(out)?;
    flagging::run(out, &params)?;
    proving::run(out, (&manifest, key), &params)?;
    living::run(out, &params, flash)
}
