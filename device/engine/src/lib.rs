//! Inference engines behind one trait, and the one preprocessing function of the whole system.
//!
//! Both sides use this crate: the device runs it on live frames, and the cloud evaluates every
//! candidate through it, so that a model is judged by the code that will run it. To add an engine,
//! add a module that implements [`Plan`] and a variant of [`EngineKind`]; the parity test then
//! covers it.

pub mod bare;
mod burn_plan;
pub mod engine;
pub mod frame;
pub mod import;
pub mod inspect;
pub mod onnx_runtime;
#[cfg(feature = "ort")]
mod ort_plan;
pub mod package;
pub mod preprocess;
mod resample;
mod tract_plan;

pub use bare::{Bare, describe};
pub use engine::{
    EngineError, EngineKind, ModelBytes, OperatorCost, Output, Plan, UnknownEngine, load,
};
pub use frame::Frame;
pub use preprocess::{InputError, preprocess};

pub use flywheel_shared::spec::{ClassOutput, InputSpec, ModelSpec, Task};
