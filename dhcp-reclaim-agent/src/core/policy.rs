//! The settings that decide, as the core uses them.

use std::{collections::BTreeSet, time::Duration};

use super::gates::Gate;

/// What makes a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The server's ACK, matched to the REQUEST.
    Ack,
    /// The REQUEST's (server, VM) pair, once the address was seen alive at its own port: for
    /// places where replies cannot be seen.
    Request,
}

/// See `docs/configuration.md` for what each setting trades.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub commit: Commit,
    /// Without a frame for this long, a VM is looked for.
    pub silence: Duration,
    /// Of those, so many in a second at most: with more, each is looked for less often.
    pub probe_rate: u32,
    /// Between two probes out of a port that is up.
    pub probe_interval: Duration,
    /// How long an answer to a probe may take.
    pub probe_wait: Duration,
    /// Unanswered probes that make a VM silent.
    pub misses: u32,
    /// From the loss of a port to *gone*, on a segment without uplinks.
    pub hold_down: Duration,
    /// The same on a segment with uplinks, where a VM may have moved to.
    pub hold_down_uplink: Duration,
    /// From the first unanswered probe to *gone*, while the port is up.
    pub hold_down_silent: Duration,
    /// Whether anything is released while its port is up.
    pub release_while_port_up: bool,
    /// After a start or a change of links, nothing is released for this long.
    pub settle: Duration,
    /// A lease that ends sooner than this is left to end.
    pub min_remaining: Duration,
    /// Share of the node's bindings that may die in one window; `None` turns the breaker off.
    pub breaker: Option<f64>,
    /// Deaths in one window that never open the breaker.
    pub breaker_min: usize,
    pub breaker_window: Duration,
    /// RELEASEs a second to one server, and how many at once.
    pub rate: u32,
    pub burst: u32,
    pub bindings_per_port: usize,
    /// Bindings that have their turn at once: however many are due, what happens meanwhile is heard
    /// before the next ones are judged, and a slow processor is not taken for one that stood still.
    pub at_once: usize,
    /// Whether servers are asked what became of a RELEASE.
    pub leasequery: bool,
    /// VLAN tags are not seen where a network card or a veth keeps them beside the frame: by XDP.
    pub blind_to_tags: bool,
    /// Gates that are not asked: what the simulation takes away to see what each is for.
    pub without: BTreeSet<Gate>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            commit: Commit::Ack,
            silence: Duration::from_secs(30),
            probe_rate: 100,
            probe_interval: Duration::from_secs(10),
            probe_wait: Duration::from_secs(1),
            misses: 3,
            hold_down: Duration::from_secs(2),
            hold_down_uplink: Duration::from_secs(10),
            hold_down_silent: Duration::from_secs(300),
            release_while_port_up: true,
            settle: Duration::from_secs(3),
            min_remaining: Duration::from_secs(10),
            breaker: Some(0.5),
            breaker_min: 32,
            breaker_window: Duration::from_secs(60),
            rate: 50,
            burst: 32,
            bindings_per_port: 256,
            at_once: 64,
            leasequery: true,
            blind_to_tags: false,
            without: BTreeSet::new(),
        }
    }
}
