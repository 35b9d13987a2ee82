//! What a device decides, without an operating system: `no_std`, no allocation, no clock, no
//! randomness and no I/O. Every part takes `(now, event)` and answers with actions; a thin shell
//! (the Linux agent, the firmware) owns sockets, storage and time. So a week offline is a
//! millisecond test, and the cloud can run the very code that it judges a model for.
//!
//! The map, in the order in which a frame meets it:
//!
//! | module | decides |
//! |---|---|
//! | [`thermal`] | nothing: a sensor on a bus of `embedded-hal`, for devices without a camera |
//! | [`pace`] | whether the next frame may be taken now |
//! | [`governor`] | how far frames are spaced to hold a rate or a share of the processor |
//! | [`backlog`] | which captured frames wait, and which give way when inference is behind |
//! | [`shadow`] | which frames a second model looks at |
//! | [`params`] | what the bytes of a score-parameter part mean |
//! | [`score`] | how sure and how familiar a model's answer is, on one scale |
//! | [`anomaly`] | how unusual a frame is to a model without classes |
//! | [`detect`] | what boxes a detector's tensors mean, and how sure the frame is |
//! | [`sketch`] | what looks alike: signatures of embeddings, and counts of what was sent |
//! | [`flicker`] | whether the model contradicts itself from frame to frame |
//! | [`quantile`] | where the best few percent of a stream begin |
//! | [`bucket`] | how many bytes may leave |
//! | [`trigger`] | whether the frame is worth its upload, and in which lane |
//! | [`spool`] | what is kept in NOR flash until the cloud has it |
//! | [`uplink`] | when to connect, send, wait, resend and change transport |
//! | [`slot`] | whether an offered model becomes the live one |
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod anomaly;
pub mod backlog;
pub mod bucket;
pub mod detect;
pub mod flicker;
pub mod governor;
pub mod pace;
pub mod params;
pub mod quantile;
pub mod score;
pub mod shadow;
pub mod sketch;
pub mod slot;
pub mod spool;
pub mod thermal;
pub mod trigger;
pub mod uplink;
