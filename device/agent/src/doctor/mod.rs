//! What is wrong with this device, and what to do about it: each check looks at one thing that the
//! agent needs and says how it is, with the mend if it is not well. Nothing is changed but a probe
//! file that is deleted again.
//!
//! [`checks`] judges what was found; [`reach`] asks the network.

pub mod checks;
pub mod reach;

use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::config::{Config, ConfigError};
use crate::identity::{Identity, install_crypto};
use crate::state::{State, StateError};

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// The agent runs, but something deserves attention, or could not be looked at.
    Warn,
    /// The agent does not run, or does not do its work.
    Fail,
}

impl Verdict {
    /// The word that is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// What to do; empty if nothing.
    pub mend: String,
}

impl Check {
    /// All is well.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Ok,
            detail: detail.into(),
            mend: String::new(),
        }
    }

    /// Something deserves attention.
    pub fn warn(name: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Warn,
            mend: mend.into(),
            ..Self::ok(name, detail)
        }
    }

    /// Something is broken.
    pub fn fail(name: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Fail,
            ..Self::warn(name, detail, mend)
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<5} {:<12} {}",
            self.verdict.name(),
            self.name,
            self.detail
        )?;
        if !self.mend.is_empty() {
            write!(f, "\n{:<18} → {}", "", self.mend)?;
        }
        Ok(())
    }
}

/// All checks of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether none failed.
    pub ok: bool,
    /// The checks in the order in which to mend.
    pub checks: Vec<Check>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            writeln!(f, "{check}")?;
        }
        let count = |verdict| self.checks.iter().filter(|c| c.verdict == verdict).count();
        write!(
            f,
            "{} ok, {} to look at, {} failed",
            count(Verdict::Ok),
            count(Verdict::Warn),
            count(Verdict::Fail)
        )
    }
}

/// Examines the device that a configuration describes. `now_ms` is the wall clock, Unix
/// milliseconds.
///
/// # Errors
/// The configuration cannot be read: then nothing can be examined.
pub fn examine(path: &Path, now_ms: u64) -> Result<Report, ConfigError> {
    let config = Config::read(path)?;
    install_crypto();
    let mut list = vec![Check::ok("config", path.display().to_string())];
    list.push(checks::folder(&config.data));
    list.push(checks::space(&config));
    list.push(checks::engine(&config));
    let identity = match Identity::load(&config.data) {
        Ok(identity) => {
            list.push(checks::identity(&identity, now_ms));
            Some(identity)
        }
        Err(error) => {
            let mend = "enrol it: `flywheel device enroll` on the server prints a token for `flywheel-agent enroll`";
            list.push(Check::fail("identity", error.to_string(), mend));
            None
        }
    };
    // The lock is held until the end, so that no agent starts while its place is tried out.
    let state = if config.data.join("state").is_dir() {
        Some(State::open(&config.data))
    } else {
        None
    };
    let running = matches!(state, Some(Err(StateError::Locked { .. })));
    list.push(checks::source(&config, running));
    match &state {
        None => list.push(Check::ok("state", "none yet: the agent has not run here")),
        Some(Ok(_)) => list.push(Check::ok("state", "readable; no agent runs")),
        Some(Err(StateError::Locked { pid, .. })) => {
            list.push(Check::ok(
                "state",
                format!("in use by the agent (process {pid})"),
            ));
        }
        Some(Err(error)) => list.push(Check::fail(
            "state",
            error.to_string(),
            "move the `state` folder away; the spool keeps what was flagged",
        )),
    }
    if let Some(identity) = &identity {
        let state = state.as_ref().and_then(|state| state.as_ref().ok());
        list.push(checks::model(&config, identity, state, running));
        list.extend(reach::all(&config, identity, running));
    }
    Ok(Report {
        ok: list.iter().all(|check| check.verdict != Verdict::Fail),
        checks: list,
    })
}
