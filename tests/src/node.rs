//! A hypervisor: the sandbox's own net namespace, with a bridge for the VMs' ports.
use anyhow::Result;

use crate::{
    fixture::{BRIDGE, BRIDGE_MAC, Mac, UPLINK},
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

    /// Another machine: a namespace of its own, with a bridge of its own.
    pub fn elsewhere(bridge_mac: Mac) -> Result<Self> {
        Self::within(NetNs::new()?, bridge_mac)
    }

    /// A namespace that becomes a node: a VM with VMs of its own.
    pub fn within(netns: NetNs, bridge_mac: Mac) -> Result<Self> {
        let node = Self { netns };
        node.add_bridge()?;
        node.netns
            .ip(&format!("link set {BRIDGE} address {bridge_mac}"))?;
        Ok(node)
    }

    /// Lays a cable from this node's uplink to a port of `switch` that is called `name`.
    pub fn cable_to(&self, switch: &Self, name: &str, mac: Mac) -> Result<()> {
        self.netns.ip(&format!(
            "link add {UPLINK} address {mac} type veth peer name {name} netns {}
             link set {UPLINK} master {BRIDGE}
             link set {UPLINK} up",
            switch.netns.path(),
        ))?;
        switch.netns.ip(&format!(
            "link set {name} master {BRIDGE}
             link set {name} up"
        ))
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
