//! Prints the firmware's scenario from a host, to be compared with what the image prints; with
//! `vectors DIR` it writes the test vectors that both embed.

use std::fmt::{self, Write};
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

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
        [] => firmware_scenario::run(&mut Stdout).map_err(|failure| failure.to_string()),
        ["vectors", folder] => write(Path::new(folder)),
        _ => Err("usage: firmware-host [vectors DIR]".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("firmware-host: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Writes every vector into a folder that exists.
fn write(folder: &Path) -> Result<(), String> {
    for (name, bytes) in vectors::make()? {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}
