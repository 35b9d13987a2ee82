//! The models Flywheel trains, and the simulator it trains them on.
//!
//! One crate because both sides of the loop need them: the trainer builds [`Net`] and updates its
//! [`Weights`]; the device's burn engine runs [`Frozen`]; everything else sees only the bytes of a
//! record ([`record`]) and of an ONNX file (`export`).
//!
//! Without the feature `std` only [`Frozen`], its record and [`Weights`] are left, which need
//! `alloc` alone: what a microcontroller runs.
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

pub mod error;
#[cfg(feature = "std")]
pub mod export;
pub mod net;
#[cfg(feature = "std")]
pub mod onnx;
pub mod record;
#[cfg(feature = "std")]
pub mod sim;
pub mod weights;

pub use error::ModelError;
pub use net::{ARCH, Frozen, Net, NetConfig};
pub use weights::{Role, Slot, Weights};
