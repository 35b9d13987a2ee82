//! The `flywheel` program, built for the tests of this package.

use std::process::ExitCode;

fn main() -> ExitCode {
    flywheel::cli::main()
}
