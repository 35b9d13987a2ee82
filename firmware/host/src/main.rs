//! Prints the firmware's scenario from a host, to be compared with what the image prints; with
//! `vectors DIR` it writes the test vectors that both embed, with `recording FILE` the life that the
//! product image plays, and with `replay` it plays it itself.

use std::fmt::{self, Write};
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

mod recording;
mod vectors;

/// Standard output as text, as the scenario wants it.
struct Stdout;

impl Write for Stdout {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        std::io::stdout()
            .write_all(text.as_bytes())
            .map_err(|_| fmt::Error)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        [] => {
            firmware_scenario::run(&mut Stdout, &mut flash()).map_err(|failure| failure.to_string())
        }
        ["vectors", folder] => write(Path::new(folder)),
        ["recording", file] => recording::make().and_then(|bytes| save(Path::new(file), &bytes)),
        ["replay"] => recording::expected().map(|line| println!("{line}")),
        _ => Err("usage: firmware-host [vectors DIR | recording FILE | replay]".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("firmware-host: {message}");
            ExitCode::FAILURE
        }
    }
}

/// New flash for the scenario.
fn flash() -> Vec<u8> {
    vec![0xFF; firmware_replay::CELLS]
}

/// Writes every vector into a folder that exists.
fn write(folder: &Path) -> Result<(), String> {
    for (name, bytes) in vectors::make()? {
        save(&folder.join(name), &bytes)?;
    }
    Ok(())
}

fn save(path: &Path, bytes: &[u8]) -> Result<(), String> {
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}
