//! The attack matrix (`flywheel_shared::attacks`), case by case, on a microcontroller as on a host:
//! both must print the same lines.
#![no_std]
#![forbid(unsafe_code)]

use core::fmt::{self, Write};

use flywheel_shared::attacks::{CASES, World};

/// Of the bits and lengths that a case could spoil, one in so many is tried. Prime, so that every
/// bit of a byte has its turn; the tests of `flywheel-shared` try all.
const STRIDE: usize = 61;

/// Why a run is no success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The output could not be written.
    Output,
    /// So many attacks ended otherwise than they must; their lines say how.
    Attacks(usize),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Output => f.write_str("the output could not be written"),
            Self::Attacks(count) => {
                write!(f, "{count} attacks ended otherwise than they must")
            }
        }
    }
}

impl core::error::Error for Failure {}

impl From<fmt::Error> for Failure {
    fn from(_: fmt::Error) -> Self {
        Self::Output
    }
}

/// Tries every attack and prints a line for each.
///
/// # Errors
/// [`Failure`].
pub fn run(out: &mut impl Write) -> Result<(), Failure> {
    // Its ids are legal, so there is a world.
    let world = World::new(STRIDE).map_err(|_| Failure::Attacks(CASES.len()))?;
    let mut failed = 0;
    for case in CASES {
        let (name, code) = (case.name, case.expected.code());
        match case.run(&world) {
            Ok(tries) => writeln!(out, "{name} ok {code}, {tries} variants: {}", case.expected)?,
            Err(surprise) => {
                failed += 1;
                let got = surprise.got.map_or(0, |error| error.code());
                let variant = surprise.variant;
                writeln!(
                    out,
                    "{name} FAILED: expected {code}, variant {variant} gave {got}"
                )?;
            }
        }
    }
    match failed {
        0 => Ok(()),
        _ => Err(Failure::Attacks(failed)),
    }
}
