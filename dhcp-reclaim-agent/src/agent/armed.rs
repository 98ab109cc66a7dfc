//! Who needs the exact tier of WATCH, and at which ports.

use std::collections::{BTreeMap, BTreeSet};

use dhcp_reclaim_ebpf::abi::WatchKey;

use crate::{
    core::{IfIndex, Key, MacAddr, SegmentId},
    kernel::{watch_ip, watch_mac},
};

/// Who needs the exact tier, and where.
#[derive(Debug, Default)]
pub(super) struct Armed {
    bindings: BTreeMap<Key, Scope>,
    ports: BTreeMap<IfIndex, usize>,
    segments: BTreeMap<SegmentId, usize>,
    /// A MAC with several addresses is armed once.
    macs: BTreeMap<(SegmentId, u16, MacAddr), BTreeSet<Key>>,
}

/// Ports that one watch looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Scope {
    pub(super) port: Option<IfIndex>,
    pub(super) segment: Option<SegmentId>,
}

impl Armed {
    /// Returns what may have changed.
    pub(super) fn arm(
        &mut self,
        key: Key,
        mac: MacAddr,
        own_port: Option<IfIndex>,
        everywhere: bool,
    ) -> Scope {
        let scope = Scope {
            port: own_port,
            segment: everywhere.then_some(key.segment),
        };
        // Counted up before the old scope is counted down: what both need stays on throughout.
        add(&mut self.ports, scope.port);
        add(&mut self.segments, scope.segment);
        let old = self.bindings.insert(key, scope).unwrap_or_default();
        subtract(&mut self.ports, old.port);
        subtract(&mut self.segments, old.segment);
        self.macs
            .entry((key.segment, key.vlan, mac))
            .or_default()
            .insert(key);
        Scope {
            port: scope.port.or(old.port),
            segment: scope.segment.or(old.segment),
        }
    }

    /// Returns what may have changed, and whether nobody else needs the MAC.
    pub(super) fn disarm(&mut self, key: Key, mac: MacAddr) -> (Scope, bool) {
        let old = self.bindings.remove(&key).unwrap_or_default();
        subtract(&mut self.ports, old.port);
        subtract(&mut self.segments, old.segment);
        let id = (key.segment, key.vlan, mac);
        let free = self.macs.get_mut(&id).is_none_or(|keys| {
            keys.remove(&key);
            keys.is_empty()
        });
        if free {
            self.macs.remove(&id);
        }
        (old, free)
    }

    /// Every address that is armed.
    pub(super) fn watches(&self) -> BTreeSet<WatchKey> {
        let ips = self.bindings.keys();
        let ips = ips.map(|key| watch_ip(key.segment, key.vlan, key.ip));
        let macs = self.macs.keys();
        ips.chain(macs.map(|(segment, vlan, mac)| watch_mac(*segment, *vlan, *mac)))
            .collect()
    }

    pub(super) fn macs(&self) -> impl Iterator<Item = (SegmentId, MacAddr)> {
        self.macs.keys().map(|(segment, _, mac)| (*segment, *mac))
    }

    /// Those of which every port is watched for somebody.
    pub(super) fn segments(&self) -> impl Iterator<Item = SegmentId> {
        self.segments.keys().copied()
    }

    pub(super) fn wants(&self, port: IfIndex, segment: SegmentId) -> bool {
        self.ports.contains_key(&port) || self.segments.contains_key(&segment)
    }
}

fn add<K: Ord>(counts: &mut BTreeMap<K, usize>, key: Option<K>) {
    if let Some(key) = key {
        *counts.entry(key).or_default() += 1;
    }
}

fn subtract<K: Ord + Copy>(counts: &mut BTreeMap<K, usize>, key: Option<K>) {
    let Some(key) = key else {
        return;
    };
    let Some(count) = counts.get_mut(&key) else {
        return;
    };
    *count -= 1;
    if *count == 0 {
        counts.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

    fn key(n: u8) -> Key {
        Key {
            segment: 1,
            vlan: 0,
            ip: Ipv4Addr::new(10, 0, 0, n),
        }
    }

    #[test]
    fn a_port_is_exact_for_as_long_as_anybody_needs_it() {
        let mut armed = Armed::default();
        armed.arm(key(1), MAC, Some(7), false);
        armed.arm(key(2), MAC, Some(7), false);
        assert!(armed.wants(7, 1) && !armed.wants(8, 1));
        assert_eq!(
            armed.disarm(key(1), MAC),
            (
                Scope {
                    port: Some(7),
                    segment: None
                },
                false
            )
        );
        assert!(armed.wants(7, 1));
        assert_eq!(
            armed.disarm(key(2), MAC),
            (
                Scope {
                    port: Some(7),
                    segment: None
                },
                true
            )
        );
        assert!(!armed.wants(7, 1));
    }

    #[test]
    fn widening_a_watch_takes_in_the_segment() {
        let mut armed = Armed::default();
        armed.arm(key(1), MAC, Some(7), false);
        armed.arm(key(1), MAC, Some(7), true);
        assert!(armed.wants(7, 1) && armed.wants(8, 1) && !armed.wants(8, 2));
        armed.arm(key(1), MAC, None, true);
        armed.disarm(key(1), MAC);
        assert!(!armed.wants(7, 1) && !armed.wants(8, 1));
        assert_eq!(
            armed.disarm(key(1), MAC),
            (Scope::default(), true),
            "twice is as good as once"
        );
    }
}
