//! The audit trail: one entry for each decision to release, with its evidence.

use std::{net::Ipv4Addr, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::core::MacAddr;

/// Why an address was released, and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuditEntry {
    pub number: u64,
    pub ts: Timestamp,
    pub ip: Ipv4Addr,
    pub mac: MacAddr,
    pub segment: String,
    pub vlan: u16,
    pub port: String,
    pub server: Ipv4Addr,
    pub server_mac: Option<MacAddr>,
    /// No frame of the VM was seen since.
    pub silent_since: Timestamp,
    pub silent_for: Duration,
    /// Probes that left since then, and none was answered.
    pub probes: u32,
    pub gates: Vec<AuditGate>,
    pub xid: u32,
    pub outcome: AuditOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditGate {
    pub gate: String,
    pub verdict: String,
    pub reason: String,
}

/// What became of a RELEASE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuditOutcome {
    /// Decided, and the frame has not left yet.
    Intended,
    /// The agent ended between the decision and the answer.
    Unknown,
    Sent,
    /// The kernel half saw the VM after the decision.
    Vetoed,
    /// It could not be sent.
    Failed,
    DryRun,
}
