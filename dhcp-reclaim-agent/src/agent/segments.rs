//! Bridges by the number that the core knows them by.

use std::collections::BTreeMap;

use crate::core::{IfIndex, MacAddr, SegmentId};

/// Bridges by the number that the core knows them by.
#[derive(Debug)]
pub(super) struct Segments {
    names: Vec<String>,
    bridges: BTreeMap<SegmentId, Bridge>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Bridge {
    pub(super) ifindex: IfIndex,
    pub(super) mac: MacAddr,
}

impl Segments {
    pub(super) fn new(names: &[String]) -> Self {
        Self {
            names: names.to_vec(),
            bridges: BTreeMap::new(),
        }
    }

    pub(super) fn id(&self, name: &str) -> Option<SegmentId> {
        let index = self.names.iter().position(|known| known == name)?;
        SegmentId::try_from(index + 1).ok()
    }

    pub(super) fn name(&self, id: SegmentId) -> Option<&str> {
        let index = usize::try_from(id).ok()?.checked_sub(1)?;
        self.names.get(index).map(String::as_str)
    }

    pub(super) fn absent(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str).filter(|name| {
            self.id(name)
                .is_none_or(|id| !self.bridges.contains_key(&id))
        })
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
