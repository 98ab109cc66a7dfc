//! What a lease is, when its VM counts as dead, and whether a RELEASE may leave: pure, without
//! clock, socket or randomness of its own. `Event`s and the time go in, `Action`s come out.

#![forbid(unsafe_code)]

pub mod binding;
pub mod counters;
pub mod engine;
pub mod gates;
mod index;
pub mod limits;
pub mod pacing;
pub mod policy;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;
pub mod types;

pub use binding::{Origin, Outcome};
pub use engine::{
    AskError, Engine, Import, ImportCount, Resumed, Saved, SavedAlarm, SavedRelease,
    SavedTransaction,
};
pub use policy::{Commit, Policy};
pub use types::*;
