//! What a lease is, when its VM counts as dead, and whether a RELEASE may leave: pure, without
//! clock, socket or randomness of its own. `Event`s and the time go in, `Action`s come out.

#![forbid(unsafe_code)]

pub mod types;

pub use types::*;
