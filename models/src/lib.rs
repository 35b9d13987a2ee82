//! The models Flywheel trains, and the simulator it trains them on.
//!
//! One crate because both sides of the loop need them: the trainer builds [`Net`] and updates its
//! [`Weights`]; the device's burn engine runs [`Frozen`]; everything else sees only the bytes of a
//! record ([`record`]) and of an ONNX file ([`export`]).

pub mod error;
pub mod export;
pub mod net;
pub mod onnx;
pub mod record;
pub mod sim;
pub mod weights;

pub use error::ModelError;
pub use net::{ARCH, Frozen, Net, NetConfig};
pub use weights::{Role, Slot, Weights};
