//! A process that is killed and started again.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

/// Deaths that nobody ordered and that are made good by another start, as systemd would: a server
/// that finds no broker ends and is started again.
const MAX_DEATHS: u32 = 40;
/// Lines of a log that an error shows.
const TAIL: usize = 20;

/// What to start.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name in messages and of the log file.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Where its output goes.
    pub log: PathBuf,
    /// Whether the program ends by itself when its standard input does.
    pub lifeline: bool,
}

/// A running process.
pub struct Victim {
    spec: Spec,
    child: Child,
    kills: u32,
    deaths: u32,
}

impl Victim {
    /// Starts a process.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(spec: Spec) -> Result<Self> {
        let child = spawn(&spec)?;
        Ok(Self {
            spec,
            child,
            kills: 0,
            deaths: 0,
        })
    }

    /// How often it was killed.
    pub fn kills(&self) -> u32 {
        self.kills
    }

    /// How often it ended unasked.
    pub fn deaths(&self) -> u32 {
        self.deaths
    }

    /// Kills it with SIGKILL and starts it again.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn kill(&mut self) -> Result<()> {
        self.end();
        self.kills += 1;
        self.child = spawn(&self.spec)?;
        Ok(())
    }

    /// Starts it again if it has ended.
    ///
    /// # Errors
    /// If it keeps ending; the error shows the end of its log.
    pub fn look(&mut self) -> Result<()> {
        if matches!(self.child.try_wait(), Ok(None)) {
            return Ok(());
        }
        self.deaths += 1;
        if self.deaths > MAX_DEATHS {
            let log = std::fs::read_to_string(&self.spec.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            bail!(
                "{} keeps ending:\n{}",
                self.spec.name,
                lines[lines.len().saturating_sub(TAIL)..].join("\n")
            );
        }
        self.child = spawn(&self.spec)?;
        Ok(())
    }

    /// Kills it for good.
    pub fn end(&mut self) {
        // It may have ended by itself; that comes to the same.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.end();
    }
}

fn spawn(spec: &Spec) -> Result<Child> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&spec.log)
        .with_context(|| format!("cannot write {}", spec.log.display()))?;
    let mut command = Command::new(&spec.program);
    command.args(&spec.args);
    if spec.lifeline {
        command
            .env(flywheel::demo::LIFELINE, "1")
            .stdin(Stdio::piped());
    } else {
        command.stdin(Stdio::null());
    }
    command
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", spec.program.display()))
}
