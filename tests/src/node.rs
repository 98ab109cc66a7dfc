//! A hypervisor: the sandbox's own net namespace, with a bridge for the VMs' ports.
use anyhow::Result;

use crate::{
    fixture::{BRIDGE, BRIDGE_MAC, Mac, NIC, TRUNK, UPLINK},
    netns::NetNs,
};

pub struct Node {
    pub netns: NetNs,
    /// Guests and servers of this node put their frames into this VLAN themselves (802.1Q); the
    /// bridge hands them on as they are.
    pub vlan: Option<u16>,
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
        let node = Self { netns, vlan: None };
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

    /// A node whose guests and servers are in this VLAN.
    pub fn tagged(vlan: u16) -> Result<Self> {
        let node = Self::new()?;
        Ok(Self {
            vlan: Some(vlan),
            ..node
        })
    }

    pub fn without_bridge() -> Result<Self> {
        let netns = NetNs::current()?;
        netns.init()?;
        Ok(Self { netns, vlan: None })
    }

    pub fn add_bridge(&self) -> Result<()> {
        self.netns.ip(&format!(
            "link add {BRIDGE} address {BRIDGE_MAC} type bridge stp_state 0 forward_delay 0 mcast_snooping 0
             link set {BRIDGE} up"
        ))
    }
}

/// What a guest or a server calls the far end of its cable.
pub(crate) fn cable_end(vlan: Option<u16>) -> &'static str {
    match vlan {
        Some(_) => TRUNK,
        None => NIC,
    }
}

/// Makes the link that tags, if there is to be one, on the far end of a cable.
pub(crate) fn tag(netns: &NetNs, vlan: Option<u16>) -> Result<()> {
    let Some(vlan) = vlan else {
        return Ok(());
    };
    netns.ip(&format!(
        "link set {TRUNK} up
         link add link {TRUNK} name {NIC} type vlan id {vlan}"
    ))
}
