//! What the kernel half saw: watching for an address, looking, and asking so that there is something to
//! see.

use tracing::{debug, warn};

use super::{Agent, Scope, chain};
use crate::{
    clock,
    core::{Evidence, IfIndex, Key, MacAddr, Probe, ProbeVia, Time, types::EPOCH_ASKING},
    kernel::{watch_ip, watch_mac},
    packet::arp,
};

impl Agent {
    pub(super) fn arm(
        &mut self,
        key: Key,
        mac: MacAddr,
        own_port: Option<IfIndex>,
        everywhere: bool,
    ) {
        for watch in [
            watch_ip(key.segment, key.vlan, key.ip),
            watch_mac(key.segment, key.vlan, mac),
        ] {
            if let Err(error) = self.kernel.arm(&watch) {
                // A look finds it unarmed, and so nothing is concluded from its silence.
                self.counters.arm_failures += 1;
                warn!(error = %chain(&error), "cannot watch an address");
            }
        }
        let changed = self.armed.arm(key, mac, own_port, everywhere);
        self.apply_scope(changed);
        self.epoch_wanted |= everywhere;
    }

    pub(super) fn disarm(&mut self, key: Key, mac: MacAddr) {
        let (changed, mac_is_free) = self.armed.disarm(key, mac);
        self.apply_scope(changed);
        let ip = watch_ip(key.segment, key.vlan, key.ip);
        let mac = mac_is_free.then(|| watch_mac(key.segment, key.vlan, mac));
        for watch in [Some(ip), mac].into_iter().flatten() {
            if let Err(error) = self.kernel.disarm(&watch) {
                warn!(error = %chain(&error), "cannot stop watching an address");
            }
        }
    }

    fn apply_scope(&mut self, scope: Scope) {
        if let Some(port) = scope.port {
            self.apply_exact(port);
        }
        if let Some(segment) = scope.segment {
            let ports: Vec<IfIndex> = self.ports_of(segment).map(|port| port.ifindex).collect();
            for port in ports {
                self.apply_exact(port);
            }
        }
    }

    pub(super) fn apply_exact(&mut self, port: IfIndex) {
        if let Some(watched) = self.watched.get(&port) {
            self.kernel
                .set_exact(port, self.armed.wants(port, watched.port.segment));
        }
    }

    pub(super) fn look(&self, key: Key, chaddr: MacAddr, own_port: Option<IfIndex>) -> Evidence {
        let ip = self
            .kernel
            .watched(&watch_ip(key.segment, key.vlan, key.ip))
            .ok()
            .flatten();
        let mac = self
            .kernel
            .watched(&watch_mac(key.segment, key.vlan, chaddr))
            .ok()
            .flatten();
        let own = own_port.unwrap_or(0);
        // Only its own station proves that it uses the address.
        let address_at = ip
            .filter(|value| value.mac == chaddr.0)
            .and_then(|value| value.seen_at(own));
        // Where no program is attached, silence says nothing.
        let sighted = own_port.is_none_or(|port| self.watched.contains_key(&port))
            && self.blind.values().all(|port| port.segment != key.segment);
        let values = [ip, mac];
        let by_own = values
            .iter()
            .flatten()
            .filter_map(|value| value.seen_at(own))
            .max();
        let elsewhere = values
            .iter()
            .flatten()
            .filter_map(|value| value.seen_elsewhere(own))
            .max();
        Evidence {
            own_at: by_own.map(Time::from_nanos),
            address_at: address_at.map(Time::from_nanos),
            elsewhere: elsewhere.map(|(at, port)| (Time::from_nanos(at), port)),
            port_at: own_port.and_then(|port| self.heard(port)),
            uplink_at: self
                .uplinks(key.segment)
                .filter_map(|port| self.heard(port.ifindex))
                .max(),
            address: ip
                .filter(|value| value.latest_ns() != 0)
                .map(|value| (Time::from_nanos(value.latest_ns()), MacAddr(value.mac))),
            armed: ip.is_some() && mac.is_some() && sighted,
        }
    }

    /// Since when something may have come in by the port, at the latest.
    fn heard(&self, port: IfIndex) -> Option<Time> {
        self.epochs.began(self.kernel.port_epoch(port)?)
    }

    pub(super) fn probe(&mut self, probe: &Probe) -> bool {
        let (port, segment) = match probe.via {
            ProbeVia::Port(port) => {
                self.put_back(port);
                (Some(port), self.watched.get(&port).map(|w| w.port.segment))
            }
            ProbeVia::Segment(segment) => {
                if self.epochs.age(clock::monotonic()) > EPOCH_ASKING {
                    self.next_epoch();
                }
                (None, Some(segment))
            }
        };
        let Some(bridge) = segment.and_then(|segment| self.segments.bridge(segment)) else {
            return false;
        };
        let Some(vlan) = port.map_or(Some(probe.vlan), |port| {
            self.vlans.tag(bridge.ifindex, port, probe.vlan)
        }) else {
            return false;
        };
        let frame = arp::probe(bridge.mac, &Probe { vlan, ..*probe });
        match self.socket.send_on(port.unwrap_or(bridge.ifindex), &frame) {
            Ok(()) => true,
            Err(error) => {
                debug!(error = %chain(&error), "probe not sent");
                false
            }
        }
    }
}
