//! The network that Flywheel trains, run by burn's flex backend without an operating system. The
//! image and its host twin run this same crate: the record is read, the network is built, and
//! synthetic pictures are answered.
//!
//! This is a program of its own because burn allocates; the core image has no allocator at all.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod plan;
pub mod run;
