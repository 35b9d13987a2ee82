//! What can be wrong with a source, said so that the reader knows which part of the URI or which
//! file to mend.

use std::path::PathBuf;

use flywheel_models::sim::RoadsError;

/// Why a source could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No such kind of source.
    #[error("source {uri:?}: not one of sim:roads, idx:DIR, dir:PATH, v4l2:/dev/videoN")]
    Scheme {
        /// The URI.
        uri: String,
    },
    /// A kind of source that this build leaves out.
    #[error(
        "source {uri:?}: this agent is built without it; build it with `cargo build --release -p flywheel-agent --features {feature}`"
    )]
    NotBuilt {
        /// The URI.
        uri: String,
        /// The feature that has it.
        feature: &'static str,
    },
    /// A parameter that this kind of source doesn't have.
    #[error("source {uri:?}: unknown parameter {name:?}; known here: {}", known.join(", "))]
    UnknownParameter {
        /// The URI.
        uri: String,
        /// The parameter.
        name: String,
        /// The parameters that there are.
        known: Vec<&'static str>,
    },
    /// A parameter's value can't be used.
    #[error("source {uri:?}: {name}={value}: expected {expected}")]
    Value {
        /// The URI.
        uri: String,
        /// The parameter.
        name: String,
        /// Its value.
        value: String,
        /// What it should be.
        expected: String,
    },
    /// The simulator refuses its configuration.
    #[error("source {uri:?}: {source}")]
    Roads {
        /// The URI.
        uri: String,
        /// Why.
        source: RoadsError,
    },
    /// A file or folder can't be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that should be there is not.
    #[error("{}: holds none of {}", folder.display(), names.join(", "))]
    Missing {
        /// Where it was looked for.
        folder: PathBuf,
        /// The names looked for.
        names: Vec<String>,
    },
    /// A file isn't what it should be.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Nothing is left to draw from.
    #[error("source {uri:?}: no picture{which} is left after split, shard and pool; widen them")]
    Empty {
        /// The URI.
        uri: String,
        /// Of which class, or nothing.
        which: String,
    },
}
