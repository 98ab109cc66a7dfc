//! A hypervisor: the sandbox's own net namespace, with a bridge for the VMs' ports.
use anyhow::Result;

use crate::{
    fixture::{BRIDGE, BRIDGE_MAC},
    netns::NetNs,
};

pub struct Node {
    pub netns: NetNs,
}

impl Node {
    pub fn new() -> Result<Self> {
        let node = Self::without_bridge()?;
        node.add_bridge()?;
        Ok(node)
    }

    pub fn without_bridge() -> Result<Self> {
        let netns = NetNs::current()?;
        netns.init()?;
        Ok(Self { netns })
    }

    pub fn add_bridge(&self) -> Result<()> {
        self.netns.ip(&format!(
            "link add {BRIDGE} address {BRIDGE_MAC} type bridge stp_state 0 forward_delay 0 mcast_snooping 0
             link set {BRIDGE} up"
        ))
    }
}
