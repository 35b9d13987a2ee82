//! The agent on a Linux device: it watches a source of frames, keeps the moments worth learning
//! from until the cloud has them, and takes new models on trial.
//!
//! Decisions are [`device_core`]'s; this crate owns files, sockets, threads and clocks. Two
//! threads meet in [`shared`]: the frame loop ([`pipeline`]) and the link to the cloud ([`link`]).
//!
//! | module | holds |
//! |---|---|
//! | [`source`] | where frames come from |
//! | [`pipeline`] | the frame loop |
//! | [`spool`] | flagged samples until they are acknowledged |
//! | [`models`] | packages on disk, the slot, loaded models |
//! | [`link`] | the driver of uplink and slot |
//! | [`transport`] | QUIC and MQTT |
//! | [`state`] | what survives restarts |
//! | [`identity`], [`enroll`] | who the device is |
//! | [`bench`], [`meter`], [`allocations`] | what a frame costs |
// Only the counting allocator is an exception.
#![deny(unsafe_code)]

pub mod agent;
pub mod allocations;
pub mod bench;
pub mod cli;
pub mod config;
pub mod enroll;
mod files;
pub mod identity;
pub mod link;
pub mod meter;
pub mod models;
pub mod pipeline;
mod position;
pub mod shared;
pub mod source;
pub mod spool;
pub mod state;
pub mod transport;
pub mod wire;
