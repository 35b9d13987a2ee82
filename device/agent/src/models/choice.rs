//! Which engine runs a model: the one that the configuration names, or with `auto` the fastest of
//! those that give the signed answers, found out on the device itself.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Instant;

use device_engine::{EngineError, EngineKind, UnknownEngine, onnx_runtime};
use thiserror::Error;

use super::package::Package;
use super::runner::{Runner, RunnerError};

/// Passes over the golden inputs that an engine is timed by; the fastest one counts.
const ROUNDS: u32 = 5;

/// What the configuration says about engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineChoice {
    /// This one.
    Fixed(EngineKind),
    /// For each model the fastest that passes its golden inputs. Which one that is may differ from
    /// start to start, and answers then differ within the golden tolerance.
    Auto,
}

/// A name that is no engine's, nor `auto`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}, or auto for the fastest that works")]
pub struct UnknownChoice(#[from] UnknownEngine);

impl EngineChoice {
    /// The name that configuration and `--engine` take.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fixed(kind) => kind.name(),
            Self::Auto => "auto",
        }
    }

    /// Makes ready what an engine needs besides models: ONNX Runtime's library, which `library`
    /// names, or else the environment.
    ///
    /// # Errors
    /// If this very engine is chosen and cannot be had. With `auto` that is only logged, and the
    /// others are left.
    pub fn prepare(self, library: Option<&Path>) -> Result<(), EngineError> {
        match self {
            Self::Fixed(EngineKind::Ort) => onnx_runtime::open(library),
            Self::Auto if library.is_some() => {
                if let Err(error) = onnx_runtime::open(library) {
                    tracing::warn!(%error, "one engine less to choose from");
                }
                Ok(())
            }
            Self::Fixed(_) | Self::Auto => Ok(()),
        }
    }

    /// Loads a package. With `auto`, what was measured is logged.
    ///
    /// # Errors
    /// What the engine says; with `auto`, what the first engine says that has the form of the
    /// model it needs, if none passes.
    pub fn load(self, package: &Package) -> Result<Runner, RunnerError> {
        match self {
            Self::Fixed(kind) => Runner::load(kind, package),
            Self::Auto => {
                let (runner, trials) = fastest(package);
                for trial in &trials {
                    match &trial.result {
                        Ok(nanos) => {
                            tracing::info!(model = %package.digest, engine = trial.engine.name(), us = nanos / 1000, "engine passes the golden inputs");
                        }
                        Err(error) => {
                            tracing::info!(engine = trial.engine.name(), %error, "engine does not run this model");
                        }
                    }
                }
                if let Some(runner) = runner {
                    tracing::info!(model = %package.digest, engine = runner.engine().name(), "the fastest engine is taken");
                    return Ok(runner);
                }
                let mut errors: Vec<RunnerError> = trials
                    .into_iter()
                    .filter_map(|trial| trial.result.err())
                    .collect();
                let first = errors.iter().position(|error| !lacks_form(error));
                // There is at least one engine, and each has failed.
                Err(errors.swap_remove(first.unwrap_or(0)))
            }
        }
    }
}

impl Default for EngineChoice {
    fn default() -> Self {
        Self::Fixed(EngineKind::default())
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for EngineChoice {
    type Err = UnknownChoice;

    fn from_str(name: &str) -> Result<Self, UnknownChoice> {
        if name == "auto" {
            return Ok(Self::Auto);
        }
        Ok(Self::Fixed(name.parse()?))
    }
}

/// How one engine did.
#[derive(Debug)]
pub struct Trial {
    /// The engine.
    pub engine: EngineKind,
    /// Nanoseconds for all golden inputs, preprocessing included; or why it cannot be taken.
    pub result: Result<u64, RunnerError>,
}

/// Tries every engine of this build on the golden inputs; gives the fastest that passes, if any
/// does, and how each did.
pub fn fastest(package: &Package) -> (Option<Runner>, Vec<Trial>) {
    let mut best: Option<(u64, Runner)> = None;
    let mut trials = Vec::new();
    for &engine in EngineKind::ALL {
        let result = Runner::load(engine, package).and_then(|mut runner| {
            // The first pass warms up.
            runner.prove(package)?;
            let mut nanos = u64::MAX;
            for _ in 0..ROUNDS {
                let start = Instant::now();
                runner.prove(package)?;
                nanos = nanos.min(start.elapsed().as_nanos() as u64);
            }
            if best.as_ref().is_none_or(|(other, _)| nanos < *other) {
                best = Some((nanos, runner));
            }
            Ok(nanos)
        });
        trials.push(Trial { engine, result });
    }
    (best.map(|(_, runner)| runner), trials)
}

fn lacks_form(error: &RunnerError) -> bool {
    matches!(
        error,
        RunnerError::Engine {
            source: EngineError::NoForm { .. },
            ..
        }
    )
}
