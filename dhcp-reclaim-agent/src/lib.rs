//! The userspace half of dhcp-reclaim. ARCHITECTURE.md draws the road that a packet takes through
//! these rooms; `agent` is the loop that joins them.

pub mod agent;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod core;
pub mod emit;
mod errors;
pub mod kernel;
pub mod leasefile;
pub mod metrics;
mod netlink;
pub mod packet;
pub mod ports;
pub mod sandbox;
pub mod service;
pub mod store;
