//! Bindings by what frames and messages name. Small, as there is an entry of each for every binding.

use std::{collections::BTreeSet, net::Ipv4Addr};

use super::{
    binding::Binding,
    types::{Key, MacAddr, SegmentId, Vlan},
};

#[derive(Clone, Debug, Default)]
pub struct Index {
    macs: BTreeSet<(MacAddr, Key)>,
    /// By a hash of it: the bindings have the client-id itself.
    client_ids: BTreeSet<(u64, Key)>,
}

impl Index {
    pub fn insert(&mut self, binding: &Binding) {
        self.macs.insert((binding.chaddr, binding.key));
        if let Some(id) = &binding.client_id {
            self.client_ids.insert((hash(id), binding.key));
        }
    }

    pub fn remove(&mut self, binding: &Binding) {
        self.macs.remove(&(binding.chaddr, binding.key));
        if let Some(id) = &binding.client_id {
            self.client_ids.remove(&(hash(id), binding.key));
        }
    }

    /// On whichever VLAN of the segment.
    pub fn of_mac(&self, segment: SegmentId, mac: MacAddr) -> impl Iterator<Item = Key> {
        let first = (mac, key(segment, Vlan::MIN, Ipv4Addr::UNSPECIFIED));
        let last = (mac, key(segment, Vlan::MAX, Ipv4Addr::BROADCAST));
        self.macs.range(first..=last).map(|(_, key)| *key)
    }

    /// Those that show this client-id, and few others perhaps.
    pub fn of_client_id(
        &self,
        segment: SegmentId,
        vlan: Vlan,
        id: &[u8],
    ) -> impl Iterator<Item = Key> {
        let id = hash(id);
        let first = (id, key(segment, vlan, Ipv4Addr::UNSPECIFIED));
        let last = (id, key(segment, vlan, Ipv4Addr::BROADCAST));
        self.client_ids.range(first..=last).map(|(_, key)| *key)
    }
}

const fn key(segment: SegmentId, vlan: Vlan, ip: Ipv4Addr) -> Key {
    Key { segment, vlan, ip }
}

/// FNV-1a. Who finds another client-id of the same hash gains nothing by it.
fn hash(id: &[u8]) -> u64 {
    id.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::types::Time;

    #[test]
    fn each_is_found_where_it_is_and_nowhere_else() {
        let of = |segment, vlan, n, id: &[u8]| Binding {
            client_id: Some(id.to_vec()),
            ..Binding::new(
                key(segment, vlan, Ipv4Addr::new(10, 0, 0, n)),
                MacAddr([2, 0, 0, 0, 0, n]),
                Time::ZERO,
            )
        };
        let mut index = Index::default();
        let one = of(1, 5, 1, b"one");
        let others = [
            of(1, 5, 2, b"two"),
            of(2, 5, 1, b"one"),
            of(1, 6, 1, b"one"),
        ];
        for binding in others.iter().chain([&one]) {
            index.insert(binding);
        }
        let macs = |index: &Index| index.of_mac(1, one.chaddr).collect::<Vec<_>>();
        let ids = |index: &Index| index.of_client_id(1, 5, b"one").collect::<Vec<_>>();
        assert_eq!(macs(&index), [one.key, others[2].key], "on any VLAN");
        assert_eq!(ids(&index), [one.key], "on its own");
        index.remove(&one);
        assert_eq!(macs(&index), [others[2].key]);
        assert_eq!(ids(&index), []);
        assert_eq!(hash(b"a"), 0xaf63_dc4c_8601_ec8c, "as others compute it");
    }
}
