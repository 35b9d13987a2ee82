//! The cloud of Flywheel and its command line, in one binary.
//!
//! The map: [`ingest`] takes what devices send and the [`store`] makes it durable; the services
//! ([`service`]) turn samples into labels, datasets, models and rollouts; [`api`] offers them over
//! HTTP; [`cli`] is a client of that API; [`demo`] plays the operator. Decisions live in
//! `cloud-core`; here is what owns sockets, files, clocks and threads.

pub mod api;
pub mod bench;
pub mod cli;
pub mod client;
pub mod cloud;
pub mod demo;
pub mod fleet;
pub mod ingest;
pub mod keys;
pub mod picture;
pub mod pki;
pub mod service;
pub mod store;
