//! What only the node's own people may ask for, and what comes of it.

use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{BindingView, ErrorCode, GateView, ImportRequest, Response};
use crate::core::{Vlan, gates::Gate};

/// Bytes of a reason: each event of what is held by it repeats it.
pub const REASON_MAX: usize = 200;

/// A request that changes something, or sends something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    Pause { reason: Option<String> },
    Resume,
    Probe(Which),
    Release { which: Which, force: Vec<Gate> },
    Import(ImportRequest),
}

/// One binding: an address, and where it is if that is not enough.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Which {
    pub ip: Ipv4Addr,
    #[serde(default)]
    pub bridge: Option<String>,
    #[serde(default)]
    pub vlan: Option<Vlan>,
}

/// Who asks, by SO_PEERCRED of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    pub uid: u32,
    /// Zero: of another pid namespace.
    pub pid: i32,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "uid {}, pid {}", self.uid, self.pid)
    }
}

/// An order on its way to the agent's loop.
#[derive(Debug)]
pub struct Ordered {
    pub order: Order,
    pub by: Peer,
    pub reply: oneshot::Sender<OrderAnswer>,
}

/// The lines of the answer, or why there are none.
pub type OrderAnswer = Result<Vec<Response>, Refusal>;

/// An order that is not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: ErrorCode,
    pub message: String,
}

impl Refusal {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// A hold on all releases of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseView {
    pub since: Timestamp,
    pub by: Peer,
    #[serde(default)]
    pub reason: Option<String>,
}

impl PauseView {
    /// In one clause: since when, by whom, why.
    pub fn text(&self) -> String {
        let why = self.reason.as_deref().unwrap_or("no reason was given");
        format!("paused since {:.0} by {}: {why}", self.since, self.by)
    }
}

/// What `resume` ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeView {
    pub paused: Option<PauseView>,
    pub breaker_closed: bool,
}

/// What a VM answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeView {
    pub binding: BindingView,
    pub alive: bool,
    /// When the frame came that says so, and by which port.
    pub seen_at: Option<Timestamp>,
    pub seen_by: Option<String>,
}

/// What came of an order to release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseView {
    pub binding: BindingView,
    pub result: ReleaseResult,
    /// Of a VM that is alive: when its frame came, and by which port.
    pub seen_at: Option<Timestamp>,
    pub seen_by: Option<String>,
    /// Of one that is held: what every gate says.
    pub gates: Vec<GateView>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReleaseResult {
    /// The RELEASE left the node.
    Released,
    /// `--dry-run`.
    WouldRelease,
    /// The kernel half heard the VM after the decision.
    Vetoed,
    /// It could not be sent.
    Failed,
    /// A gate holds.
    Held,
    /// The VM answered.
    Alive,
    /// Its lease ended meanwhile in another way.
    Ended,
}
