//! How a RELEASE leaves: the order, the last look at what came between, the frame.

use std::{collections::BTreeSet, net::Ipv4Addr};

use dhcp_reclaim_ebpf::abi::{
    EMIT_EGRESS, EMIT_INGRESS, EmitOrder, VERDICT_NONE, VERDICT_SENT, VERDICT_VETOED,
};
use tracing::warn;

use super::{Agent, Intent, SUSPENDED, chain};
use crate::{
    clock,
    core::{IfIndex, Release, ReleaseOutcome, SegmentId},
    kernel::{watch_ip, watch_mac},
    packet::release::release_frame,
};

/// Option 56 of every RELEASE: who sent it, for the server's log.
const MESSAGE: &str = concat!("dhcp-reclaim ", env!("CARGO_PKG_VERSION"));

impl Agent {
    /// Where the kernel half may not know by now what a decision would have to: to write it down may
    /// have taken long. A port that is not watched yet may have a VM that was dead when it was decided;
    /// what comes by all others `emit` knows.
    pub(super) async fn overtaken(
        &mut self,
        ready: &[(usize, Intent, Vec<u8>)],
    ) -> BTreeSet<SegmentId> {
        // What has arrived is there to be read after this.
        tokio::task::yield_now().await;
        let segments = ready.iter().map(|(_, intent, _)| intent.release.segment);
        let segments: BTreeSet<SegmentId> = segments.collect();
        self.put_all_back(&segments);
        let Some(ports) = self.ports.waiting() else {
            return segments;
        };
        if self.memory.was_suspended(clock::suspended(), SUSPENDED) {
            return segments;
        }
        let unseen = self.late.values().copied();
        let unseen = unseen.chain(self.blind.values().map(|port| port.segment));
        let new = ports
            .iter()
            .filter(|port| !self.watched.contains_key(&port.ifindex));
        let new = new.filter_map(|port| self.segments.by_ifindex(port.segment));
        unseen.chain(new).collect()
    }

    pub(super) async fn order(
        &mut self,
        release: &Release,
        xid: u32,
    ) -> Result<Vec<u8>, ReleaseOutcome> {
        if self.settings.dry_run {
            return Err(ReleaseOutcome::DryRun);
        }
        let Some(bridge) = self.segments.bridge(release.segment) else {
            return Err(ReleaseOutcome::Failed);
        };
        let server_mac = match release.server_mac {
            Some(mac) if mac == bridge.mac => mac,
            // The bridge's MAC may have changed since the ACK: it takes that of a port.
            _ if self.is_local(bridge.ifindex, release.server).await => bridge.mac,
            Some(mac) => mac,
            None => {
                warn!(server = %release.server, "no frame of the server was seen: its MAC is not known");
                return Err(ReleaseOutcome::Failed);
            }
        };
        let direction = if server_mac == bridge.mac {
            EMIT_INGRESS
        } else {
            EMIT_EGRESS
        };
        let vlan = match direction {
            // The host's own stack gets what the bridge would have handed up to it.
            EMIT_INGRESS => self
                .vlans
                .tag(bridge.ifindex, bridge.ifindex, release.vlan)
                .unwrap_or(release.vlan),
            _ => release.vlan,
        };
        let order = EmitOrder {
            silent_since_ns: release.silent_since.as_nanos(),
            ip: watch_ip(release.segment, release.vlan, release.ip),
            mac: watch_mac(release.segment, release.vlan, release.chaddr),
            ifindex: bridge.ifindex,
            direction,
            verdict: VERDICT_NONE,
            vlan: vlan.to_be_bytes(),
        };
        let frame = release_frame(release, server_mac, xid, MESSAGE);
        let ordered = frame.map_err(anyhow::Error::from).and_then(|frame| {
            self.kernel.order(xid, &order)?;
            Ok(frame)
        });
        ordered.map_err(|error| {
            warn!(xid, error = format!("{error:#}"), "RELEASE not sent");
            ReleaseOutcome::Failed
        })
    }

    async fn is_local(&mut self, bridge: IfIndex, ip: Ipv4Addr) -> bool {
        match self.addresses.of(bridge).await {
            Ok(networks) => networks.iter().any(|(own, _)| *own == ip),
            Err(error) => {
                warn!(error = %chain(&error), "cannot read the bridge's addresses");
                false
            }
        }
    }

    /// Sends a RELEASE that was ordered.
    pub(super) fn send(&self, xid: u32, frame: &[u8]) -> ReleaseOutcome {
        // A vetoed frame is an error here too; the verdict tells which it was.
        let sent = self.link.send_release(frame);
        match (self.kernel.verdict(xid), sent) {
            (Ok(VERDICT_SENT), _) => ReleaseOutcome::Sent,
            (Ok(VERDICT_VETOED), _) => ReleaseOutcome::Vetoed,
            (Ok(VERDICT_NONE), Err(error)) => {
                warn!(xid, error = %chain(&error), "RELEASE not sent");
                ReleaseOutcome::Failed
            }
            (Ok(verdict), _) => {
                warn!(xid, verdict, "RELEASE did not pass the emit program");
                ReleaseOutcome::Failed
            }
            (Err(error), _) => {
                warn!(xid, error = %chain(&error), "RELEASE not sent");
                ReleaseOutcome::Failed
            }
        }
    }
}
