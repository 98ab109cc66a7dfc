//! Bridges by the number that the core knows them by.

use std::collections::BTreeMap;

use crate::core::{IfIndex, MacAddr, SegmentId};

/// Bridges by the number that the core and the kernel's maps know them by. It is made of the name, so
/// that what is pinned means the same to the next agent, whatever other bridges that one follows.
#[derive(Debug)]
pub(super) struct Segments {
    names: Vec<(SegmentId, String)>,
    bridges: BTreeMap<SegmentId, Bridge>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Bridge {
    pub(super) ifindex: IfIndex,
    pub(super) mac: MacAddr,
}

impl Segments {
    pub(super) fn new(names: &[String]) -> Self {
        let mut segments = Self {
            names: Vec::new(),
            bridges: BTreeMap::new(),
        };
        for name in names {
            let mut id = number(name);
            // Two names of one number are rarer than one in a billion, and still two bridges.
            while segments.name(id).is_some_and(|other| other != name) {
                id = id.checked_add(1).unwrap_or(1);
            }
            segments.names.push((id, name.clone()));
        }
        segments
    }

    pub(super) fn id(&self, name: &str) -> Option<SegmentId> {
        let (id, _) = self.names.iter().find(|(_, known)| known == name)?;
        Some(*id)
    }

    pub(super) fn name(&self, id: SegmentId) -> Option<&str> {
        let (_, name) = self.names.iter().find(|(known, _)| *known == id)?;
        Some(name)
    }

    pub(super) fn absent(&self) -> Vec<(SegmentId, String)> {
        let absent = |(id, _): &&(SegmentId, String)| !self.bridges.contains_key(id);
        self.names.iter().filter(absent).cloned().collect()
    }

    pub(super) fn up(&mut self, ifindex: IfIndex, name: &str, mac: MacAddr) {
        if let Some(id) = self.id(name) {
            self.bridges.insert(id, Bridge { ifindex, mac });
        }
    }

    pub(super) fn down(&mut self, ifindex: IfIndex) {
        self.bridges.retain(|_, bridge| bridge.ifindex != ifindex);
    }

    pub(super) fn set_mac(&mut self, ifindex: IfIndex, mac: MacAddr) {
        for bridge in self
            .bridges
            .values_mut()
            .filter(|bridge| bridge.ifindex == ifindex)
        {
            bridge.mac = mac;
        }
    }

    pub(super) fn by_ifindex(&self, ifindex: IfIndex) -> Option<SegmentId> {
        self.bridges
            .iter()
            .find(|(_, bridge)| bridge.ifindex == ifindex)
            .map(|(id, _)| *id)
    }

    pub(super) fn bridge(&self, id: SegmentId) -> Option<Bridge> {
        self.bridges.get(&id).copied()
    }
}

/// FNV-1a; never zero, which is no segment's.
fn number(name: &str) -> SegmentId {
    let hash = name.bytes().fold(0x811c_9dc5, |hash: u32, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    hash.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_has_its_number_whatever_the_others_are() {
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        let (one, two) = (
            Segments::new(&names(&["br0"])),
            Segments::new(&names(&["br1", "br0"])),
        );
        assert_eq!(one.id("br0"), two.id("br0"));
        assert_ne!(two.id("br0"), two.id("br1"));
        assert_eq!(two.id("br2"), None);
        assert_eq!(two.name(two.id("br1").unwrap()), Some("br1"));
        assert_eq!(number("a"), 0xe40c_292c, "as others compute it");
    }
}
