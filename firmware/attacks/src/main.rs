//! The program: an image on a microcontroller, its twin on a host.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod board;

#[cfg(not(target_os = "none"))]
fn main() -> std::process::ExitCode {
    let mut text = String::new();
    let result = firmware_attacks::run(&mut text);
    print!("{text}");
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("firmware-attacks: {failure}");
            std::process::ExitCode::FAILURE
        }
    }
}
