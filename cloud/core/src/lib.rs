//! The pure decisions of the cloud: what people label next, what a data set is, whether a model is
//! better, who gets it when, and whether every flagged sample is accounted for.
//!
//! Nothing here reads a clock, a file or a socket, and nothing is random but by a seed that the
//! caller gives, so a week of fleet life is a millisecond test and a server restart changes no
//! decision. The server (`flywheel`) owns storage and transports and calls in here.

pub mod audit;
pub mod calibrate;
pub mod class;
pub mod dataset;
pub mod drift;
pub mod evaluate;
pub mod gate;
pub mod priority;
pub mod queue;
pub mod ranges;
pub mod rollout;
