//! The twin on a host: prints what the image must print, writes the model slot that the emulator
//! loads, and compares the outputs.

use std::fs;
use std::process::ExitCode;

use firmware_infer::run::{TOLERANCE, difference, run, slot_bytes};

/// Does what the arguments say.
pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        [] => print(),
        ["slot", file] => write(file),
        ["compare", file] => compare(file),
        _ => Err("usage: firmware-infer [slot FILE | compare FILE]".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("firmware-infer: {message}");
            ExitCode::FAILURE
        }
    }
}

fn print() -> Result<(), String> {
    print!("{}", expected()?);
    Ok(())
}

fn expected() -> Result<String, String> {
    let slot = slot_bytes().map_err(|error| error.to_string())?;
    let mut text = String::new();
    run(&mut text, &slot, || {}).map_err(|failure| failure.to_string())?;
    Ok(text)
}

fn write(file: &str) -> Result<(), String> {
    let slot = slot_bytes().map_err(|error| error.to_string())?;
    fs::write(file, slot).map_err(|error| format!("{file}: {error}"))
}

/// Compares what the image printed, lines for the microcontroller only left out, with the host.
fn compare(file: &str) -> Result<(), String> {
    let text = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    let device: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("device: "))
        .collect();
    let largest = difference(&expected()?, &device.join("\n"))?;
    if largest > TOLERANCE {
        return Err(format!(
            "host and device differ by {largest:e}, more than {TOLERANCE:e}"
        ));
    }
    println!(
        "infer: host and device agree on {} lines, differing by at most {largest:e}",
        device.len()
    );
    Ok(())
}
