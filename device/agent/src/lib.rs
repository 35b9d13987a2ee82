//! The agent on a Linux device: it watches a source of frames, keeps the moments worth learning
//! from until the cloud has them, and takes new models on trial.
//!
//! Decisions are [`device_core`]'s; this crate owns files, sockets, threads and clocks. Two
//! threads meet in [`shared`]: the frame loop ([`pipeline`]) and the link to the cloud ([`link`]).
//! At a pace with a rate a third one reads the source ([`capture`]).
//!
//! | module | holds |
//! |---|---|
//! | [`source`] | where frames come from |
//! | [`capture`] | reading the source at its rate, whatever inference does |
//! | [`pipeline`] | the frame loop |
//! | [`spool`] | flagged samples until they are acknowledged |
//! | [`models`] | packages on disk, the slot, loaded models |
//! | [`link`] | the driver of uplink and slot |
//! | [`transport`] | QUIC and MQTT |
//! | [`state`] | what survives restarts |
//! | [`trust`] | the keys and the time that the device believes |
//! | [`clock`] | time as the frame loop sees it |
//! | [`identity`], [`enroll`] | who the device is |
//! | [`doctor`] | what is wrong with this device, and the mend |
//! | [`metrics`] | what is counted and timed, for Prometheus |
//! | [`notify`] | what systemd is told |
//! | [`bench`], [`meter`], [`allocations`] | what a frame costs |
// Only the counting allocator is an exception.
#![deny(unsafe_code)]

pub mod agent;
pub mod allocations;
pub mod bench;
pub mod capture;
pub mod cli;
pub mod clock;
pub mod config;
pub mod doctor;
pub mod enroll;
mod files;
pub mod identity;
pub mod link;
pub mod meter;
pub mod metrics;
pub mod models;
pub mod notify;
pub mod pipeline;
mod position;
pub mod shared;
pub mod source;
pub mod spool;
pub mod state;
pub mod transport;
pub mod trust;
pub mod wire;
