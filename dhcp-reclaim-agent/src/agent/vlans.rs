//! Bridges that filter VLANs: a port's untagged frames belong to a VLAN of its own there.
//!
//! A lease is kept by the bridge's VLAN, not by the tag that its frames happen to carry on one port.

use std::collections::BTreeMap;

use tracing::{info, warn};

use super::Agent;
use crate::{
    core::{Event, IfIndex, SegmentId, Vlan, Vlans},
    ports::VlanFiltering,
};

/// What is known of the VLANs of ports, and of bridges themselves.
#[derive(Debug, Default)]
pub(super) struct PortVlans {
    links: BTreeMap<IfIndex, Vlans>,
    /// Bridges that filter, and whether by 802.1Q.
    filtering: BTreeMap<IfIndex, VlanFiltering>,
}

impl PortVlans {
    /// A port that has left its bridge, or a bridge that is gone.
    pub(super) fn forget(&mut self, ifindex: IfIndex) {
        self.links.remove(&ifindex);
        self.filtering.remove(&ifindex);
    }

    /// The tag that a frame of `vlan` leaves by `link` with, a port of the bridge or the bridge
    /// itself; zero for none, `None` if it does not leave there.
    pub(super) fn tag(&self, bridge: IfIndex, link: IfIndex, vlan: Vlan) -> Option<Vlan> {
        if !self.filtering.contains_key(&bridge) {
            return Some(vlan);
        }
        self.links.get(&link)?.tag(vlan)
    }

    /// What the port's untagged frames belong to; zero: to none.
    fn pvid(&self, bridge: IfIndex, port: IfIndex) -> Vlan {
        match self.filtering.get(&bridge) {
            Some(VlanFiltering::Customer) => self.links.get(&port).map_or(0, |vlans| vlans.pvid),
            Some(VlanFiltering::Service | VlanFiltering::Off) | None => 0,
        }
    }

    /// The VLAN of what the bridge itself sends and hears without a tag, as its own address does; zero
    /// where VLANs are not told apart, `None` if it has no such VLAN.
    fn own(&self, bridge: IfIndex) -> Option<Vlan> {
        match self.filtering.get(&bridge) {
            Some(VlanFiltering::Customer) => {
                let vlan = self.pvid(bridge, bridge);
                (vlan != 0 && self.tag(bridge, bridge, vlan) == Some(0)).then_some(vlan)
            }
            Some(VlanFiltering::Service | VlanFiltering::Off) | None => Some(0),
        }
    }
}

impl Agent {
    pub(super) async fn bridge_vlans(&mut self, bridge: IfIndex, filtering: VlanFiltering) {
        let Some(segment) = self.segments.by_ifindex(bridge) else {
            return;
        };
        let before = match filtering {
            VlanFiltering::Off => self.vlans.filtering.remove(&bridge),
            VlanFiltering::Customer | VlanFiltering::Service => {
                self.vlans.filtering.insert(bridge, filtering)
            }
        };
        if before.unwrap_or_default() != filtering {
            let name = self.segments.name(segment).unwrap_or("?");
            info!(
                bridge = name,
                ?filtering,
                "VLANs are filtered in another way"
            );
        }
        let ports: Vec<IfIndex> = self.ports_of(segment).map(|port| port.ifindex).collect();
        for port in &ports {
            self.apply_pvid(*port);
        }
        if before.unwrap_or_default() != filtering {
            self.drain_remembered().await;
            for port in ports {
                self.tell(Event::PvidChanged { port }).await;
            }
        }
        self.tell_vlans(segment).await;
    }

    pub(super) async fn vlans_of(&mut self, ifindex: IfIndex, vlans: Vlans) {
        let segment = match self.segments.by_ifindex(ifindex) {
            Some(segment) => Some(segment),
            None => self
                .watched
                .get(&ifindex)
                .map(|watched| watched.port.segment),
        };
        let bridge = segment.and_then(|segment| self.segments.bridge(segment));
        let pvid = |vlans: &PortVlans| bridge.map_or(0, |b| vlans.pvid(b.ifindex, ifindex));
        let before = pvid(&self.vlans);
        self.vlans.links.insert(ifindex, vlans);
        let after = pvid(&self.vlans);
        let Some(segment) = segment else {
            // It is told before its port.
            return;
        };
        if self.watched.contains_key(&ifindex) && before != after {
            self.apply_pvid(ifindex);
            // What is in the ring has the VLAN from before, and makes bindings that change with it.
            self.drain_remembered().await;
            self.tell(Event::PvidChanged { port: ifindex }).await;
        }
        self.tell_vlans(segment).await;
    }

    /// What an agent that starts has not taken over yet, its records would be heard without.
    async fn drain_remembered(&mut self) {
        if !self.remembering {
            self.drain().await;
        }
    }

    pub(super) fn apply_pvid(&mut self, port: IfIndex) {
        let segment = self.watched.get(&port).map(|watched| watched.port.segment);
        if let Some(bridge) = segment.and_then(|segment| self.segments.bridge(segment)) {
            self.kernel
                .set_pvid(port, self.vlans.pvid(bridge.ifindex, port));
        }
    }

    /// Where the address of the segment's bridge is: see [`PortVlans::own`].
    pub(super) fn own_vlan(&self, segment: SegmentId) -> Option<Vlan> {
        self.vlans.own(self.segments.bridge(segment)?.ifindex)
    }

    /// The VLAN of untagged frames of the port; `None` if that is gone, and its bridge filters VLANs.
    pub(super) fn pvid_of(&self, segment: SegmentId, port: IfIndex) -> Option<Vlan> {
        let bridge = self.segments.bridge(segment).map(|it| it.ifindex);
        match bridge.filter(|_| self.filters_vlans(segment)) {
            Some(bridge) if self.watched.contains_key(&port) => Some(self.vlans.pvid(bridge, port)),
            Some(_) => None,
            None => Some(0),
        }
    }

    pub(super) fn filters_vlans(&self, segment: SegmentId) -> bool {
        let bridge = self.segments.bridge(segment);
        bridge.is_some_and(|bridge| self.vlans.filtering.contains_key(&bridge.ifindex))
    }

    /// What the core must know: where the bridge itself can send, and what cannot be told apart.
    async fn tell_vlans(&mut self, segment: SegmentId) {
        let Some(bridge) = self.segments.bridge(segment) else {
            return;
        };
        let name = self.segments.name(segment).unwrap_or("?");
        let filtering = self.vlans.filtering.get(&bridge.ifindex).copied();
        let tunnel = self.ports_of(segment).any(|port| {
            self.vlans
                .links
                .get(&port.ifindex)
                .is_some_and(|vlans| vlans.tunnel)
        });
        let reason = match filtering {
            Some(VlanFiltering::Service) => Some(format!(
                "{name} has vlan_filtering 1 by 802.1ad tags, which are not followed: nothing on it is \
                 released"
            )),
            Some(VlanFiltering::Customer) if tunnel => Some(format!(
                "{name} has vlan_filtering 1 and a port with vlan_tunnel, whose VLANs are not followed: \
                 nothing on it is released"
            )),
            Some(VlanFiltering::Customer | VlanFiltering::Off) | None => None,
        };
        if let Some(reason) = &reason {
            warn!(bridge = name, "{reason}");
        }
        self.tell(Event::SegmentHeld { segment, reason }).await;
        let own = filtering.map(|_| {
            let links = &self.vlans.links;
            links.get(&bridge.ifindex).cloned().unwrap_or_default()
        });
        self.tell(Event::SegmentVlans { segment, own }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIDGE: IfIndex = 3;

    fn own(filtering: VlanFiltering, pvid: Vlan, members: &[(Vlan, Vlan, bool)]) -> Option<Vlan> {
        let mut vlans = PortVlans::default();
        vlans.filtering.insert(BRIDGE, filtering);
        let own = Vlans {
            pvid,
            members: members.to_vec(),
            tunnel: false,
        };
        vlans.links.insert(BRIDGE, own);
        vlans.own(BRIDGE)
    }

    #[test]
    fn a_bridges_own_vlan_is_untagged_both_ways() {
        use VlanFiltering::{Customer, Service};
        assert_eq!(PortVlans::default().own(BRIDGE), Some(0));
        assert_eq!(own(Service, 1, &[(1, 1, true)]), Some(0));
        assert_eq!(own(Customer, 1, &[(1, 1, true)]), Some(1));
        assert_eq!(own(Customer, 10, &[(1, 1, true), (10, 20, true)]), Some(10));
        // What it sends belongs to 10, and what it hears of 10 has a tag.
        assert_eq!(own(Customer, 10, &[(10, 10, false)]), None);
        // What it sends is dropped.
        assert_eq!(own(Customer, 0, &[(10, 10, true)]), None);
        assert_eq!(own(Customer, 0, &[]), None);
    }
}
