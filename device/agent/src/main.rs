//! The agent's program.

use std::process::ExitCode;

fn main() -> ExitCode {
    flywheel_agent::cli::main(std::env::args_os())
}
