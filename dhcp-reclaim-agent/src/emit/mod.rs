//! What the agent sends: RELEASEs by its private link, where `emit` looks at them, and ARP probes.

mod link;
mod sys;

use std::io;

pub use self::{link::PrivateLink, sys::PacketSocket};

/// Why nothing left.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    #[error("cannot open a packet socket: run as root, or grant CAP_NET_RAW")]
    Socket(#[source] io::Error),
    #[error("cannot send on {interface}")]
    Send {
        interface: String,
        source: io::Error,
    },
    #[error("cannot {what} {interface}")]
    Link {
        what: &'static str,
        interface: &'static str,
        source: Box<rtnetlink::Error>,
    },
    #[error("interface {0} is not there after its creation")]
    Missing(&'static str),
}
