//! What the process tests share: running the program, servers that end with the test, and waiting
//! for a condition.

pub mod chaos;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long a condition may take; far above what any does, so that a slow machine is no failure.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// The program under test.
pub struct Flywheel {
    program: PathBuf,
}

impl Flywheel {
    /// `program` is `env!("CARGO_BIN_EXE_flywheel-under-test")` of the test.
    pub fn new(program: &str) -> Self {
        Self {
            program: PathBuf::from(program),
        }
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        Command::new(&self.program)
            .args(args)
            .stdin(Stdio::null())
            .env_remove("FLYWHEEL_TOKEN")
            .env_remove("FLYWHEEL_SERVER")
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))
    }

    /// Runs a command that must succeed; returns what it printed.
    ///
    /// # Errors
    /// If it fails; the error holds its words.
    pub fn succeed(&self, args: &[&str]) -> Result<String> {
        let output = self.run(args)?;
        ensure!(
            output.status.success(),
            "flywheel {} ended with {}:\n{}\n{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs a command that must end with an exit code; returns its error output.
    ///
    /// # Errors
    /// If it ends otherwise.
    pub fn fail(&self, code: i32, args: &[&str]) -> Result<String> {
        let output = self.run(args)?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(code),
            "flywheel {} ended with {} instead of {code}:\n{}\n{errors}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
        );
        Ok(errors)
    }

    /// Runs a command with `--json` and parses its answer.
    ///
    /// # Errors
    /// If it fails or prints something else.
    pub fn json(&self, args: &[&str]) -> Result<serde_json::Value> {
        let text = self.succeed(&[args, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// Starts a process in the background; it ends with the returned value.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(&self, args: &[&str], log: &Path) -> Result<Background> {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)?;
        let child = Command::new(&self.program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        Ok(Background { child })
    }
}

/// A process that is killed when the test is over.
pub struct Background {
    child: Child,
}

impl Background {
    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        // It may have ended by itself; that comes to the same.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Looks until a condition holds.
///
/// # Errors
/// If it does not hold within [`PATIENCE`]; `what` names it.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("waited in vain until {what}");
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    Ok(())
}

/// The folder of real data, where there is one; a test that needs it says so and passes without.
pub fn data_dir(part: &str) -> Option<PathBuf> {
    let base = std::env::var_os("FLYWHEEL_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"),
        PathBuf::from,
    );
    let dir = base.join(part);
    if dir.exists() {
        Some(dir)
    } else {
        eprintln!("skipped: no {} (set FLYWHEEL_DATA)", dir.display());
        None
    }
}
