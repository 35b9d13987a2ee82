//! The agent's program.

use std::process::ExitCode;

use flywheel_agent::allocations::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    flywheel_agent::cli::main(std::env::args_os())
}
