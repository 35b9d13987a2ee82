//! The shared library of ONNX Runtime, which the user names: a vendor's build of it is the way to an
//! accelerator that no engine in Rust drives, such as TensorRT on a Jetson.
//!
//! Nothing of it is linked, shipped or downloaded. It is loaded once and serves the whole process,
//! since it keeps threads and state of its own; hence the one global here.

use std::path::Path;

use crate::engine::EngineError;
#[cfg(not(feature = "ort"))]
use crate::engine::EngineKind;

/// Names the library where the caller does not.
pub const VARIABLE: &str = "FLYWHEEL_ORT_LIBRARY";

/// Whether this build has the engine `ort`.
pub const BUILT: bool = cfg!(feature = "ort");

/// Loads the library, or finds that it is loaded; with `None` the one that [`VARIABLE`] names.
/// [`crate::load`] does so by itself, but an agent wants to know before it touches a model.
///
/// # Errors
/// [`EngineError::Missing`] if this build is without the engine, no library is named, the named
/// one is none or too old, or another one is loaded already.
#[cfg(feature = "ort")]
pub fn open(library: Option<&Path>) -> Result<(), EngineError> {
    crate::ort_plan::environment(library).map(|_| ())
}

/// Loads the library, or finds that it is loaded.
///
/// # Errors
/// [`EngineError::Missing`], since this build is without the engine.
#[cfg(not(feature = "ort"))]
pub fn open(_library: Option<&Path>) -> Result<(), EngineError> {
    Err(EngineError::Missing {
        engine: EngineKind::Ort.name(),
        why: "this build is without it; build it with --features ort".to_owned(),
    })
}
