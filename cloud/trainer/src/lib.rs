//! Training with burn: the only cloud crate that sees autodiff.
//!
//! burn computes gradients; the choices around it (which examples, how they are distorted, how
//! weights step) are plain seeded arithmetic in this crate, so that one seed gives one model, byte
//! for byte, on one kind of machine.

pub mod augment;
pub mod config;
mod head;
mod optimiser;
mod sampler;
mod shard;
mod train;

pub use augment::Augment;
pub use config::{Champion, Example, Fit, Progress, TrainConfig, TrainError, Trained};
pub use train::train;
