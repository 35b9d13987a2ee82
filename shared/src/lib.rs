//! What the device and the cloud must agree on, to the byte: identifiers, messages, envelopes,
//! model descriptions, signed manifests and their verifier.
//!
//! Nothing here allocates or needs `std`, because the same code checks a signature on a Cortex-M
//! and on the server. Messages borrow from the buffer they were read from. Enum variants are
//! numbered by their order, which is therefore never changed: new variants go to the end, and
//! `tests/golden.rs` decodes a corpus of old bytes with the code of today.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "attacks"))]
pub mod attacks;
pub mod envelope;
pub mod ids;
pub mod message;
pub mod spec;
pub mod trust;

mod canonical;

/// Version of the wire protocol. A peer with another major version is refused with
/// [`message::RefusedCode::WireVersion`].
pub const WIRE_VERSION: u16 = 1;

/// Upper bound of one message in bytes, envelope included, on every transport.
pub const MAX_MESSAGE: usize = 1024 * 1024;

/// Upper bound of the bytes of a model chunk in one [`message::Down::Chunk`].
pub const MAX_CHUNK: usize = 64 * 1024;
