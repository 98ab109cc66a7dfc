//! From the core's words to what clients of the control socket read.

use jiff::{SignedDuration, Timestamp};

use super::segments::Segments;
use crate::{
    clock,
    control::{BindingView, EventView, ExplainView, GateView, client_id_text},
    core::{
        Notice, Time,
        binding::Binding,
        gates::{Finding, Verdict},
    },
};

/// Both clocks at one moment, to tell times of one by the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clocks {
    pub(super) monotonic: Time,
    pub(super) wall: Timestamp,
}

impl Clocks {
    pub(super) fn now() -> Self {
        Self {
            monotonic: clock::monotonic(),
            wall: clock::wall(),
        }
    }

    /// The same moment by the monotonic clock; what has passed is now.
    pub(super) fn monotonic_at(self, at: Timestamp) -> Time {
        let ahead = at.duration_since(self.wall).max(SignedDuration::ZERO);
        self.monotonic + ahead.unsigned_abs()
    }

    pub(super) fn wall(self, at: Time) -> Timestamp {
        let ahead =
            SignedDuration::try_from(at.since(self.monotonic)).unwrap_or(SignedDuration::MAX);
        let ago = SignedDuration::try_from(self.monotonic.since(at)).unwrap_or(SignedDuration::MAX);
        self.wall
            .saturating_add(ahead)
            .and_then(|at| at.saturating_sub(ago))
            .unwrap_or(self.wall)
    }
}

pub(super) fn event(notice: &Notice, clocks: Clocks) -> EventView {
    EventView {
        ts: clocks.wall(notice.at),
        event: notice.event,
        ip: notice.ip,
        mac: notice.mac,
        port: notice.port.clone(),
        reason: notice.reason.clone(),
    }
}

pub(super) fn binding(binding: &Binding, segments: &Segments, clocks: Clocks) -> BindingView {
    let key = binding.key;
    BindingView {
        ip: key.ip,
        mac: binding.chaddr,
        client_id: binding.client_id.as_deref().map(client_id_text),
        server: binding.server,
        server_mac: binding.server_mac,
        segment: segments.name(key.segment).unwrap_or("?").to_owned(),
        vlan: (key.vlan != 0).then_some(key.vlan),
        port: binding.port_name.clone(),
        state: binding.state,
        outcome: binding.outcome,
        origin: binding.origin,
        lease_expires_at: binding.expires.map(|at| clocks.wall(at)),
        last_seen_at: binding.last_seen.map(|at| clocks.wall(at)),
    }
}

pub(super) fn explain(
    binding: BindingView,
    findings: &[Finding],
    history: Vec<EventView>,
) -> ExplainView {
    let first = findings
        .iter()
        .find(|finding| finding.verdict != Verdict::Pass);
    ExplainView {
        binding,
        verdict: first
            .map_or("release", |finding| verdict(finding.verdict))
            .to_owned(),
        gates: gates(findings),
        history,
    }
}

pub(super) fn gates(findings: &[Finding]) -> Vec<GateView> {
    let gates = findings.iter().map(|finding| GateView {
        gate: finding.gate.name().to_owned(),
        verdict: verdict(finding.verdict).to_owned(),
        reason: finding.reason.clone(),
    });
    gates.collect()
}

pub(super) const fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Hold => "hold",
        Verdict::Forget => "forget",
    }
}
