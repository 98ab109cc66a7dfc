//! A node, a DHCP server and VMs: what a test or the demo starts with.
use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    agent::{Agent, Hook, Setup},
    fixture::{BRIDGE, SERVER_IP, vm_mac},
    node::Node,
    server::{Place, Pool, Server, ServerKind},
    vm::{Client, Station, Vm},
};

/// Long for a slow machine; nothing waits for it when things go well.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct World {
    pub node: Node,
    pub server: Server,
}

impl World {
    /// A server of this kind in this place, with a pool of exactly `pool` addresses.
    pub fn new(kind: ServerKind, place: Place, pool: u8) -> Result<Self> {
        Self::with_pool(kind, place, Pool::small(pool))
    }

    pub fn with_pool(kind: ServerKind, place: Place, pool: Pool) -> Result<Self> {
        let node = Node::new().context("cannot make the node")?;
        let server = Server::start_with(&node, kind, place, pool, &[])
            .with_context(|| format!("cannot start {kind} ({place})"))?;
        Ok(Self { node, server })
    }

    /// One whose guests and server are in this VLAN.
    pub fn tagged(kind: ServerKind, place: Place, pool: u8, vlan: u16) -> Result<Self> {
        let node = Node::tagged(vlan).context("cannot make the node")?;
        let server = Server::start(&node, kind, place, pool)
            .with_context(|| format!("cannot start {kind} ({place}) in VLAN {vlan}"))?;
        Ok(Self { node, server })
    }

    /// dnsmasq elsewhere, with more arguments of its own.
    pub fn with_dnsmasq(args: &[&str], pool: u8) -> Result<Self> {
        let node = Node::new().context("cannot make the node")?;
        let server = Server::start_with(
            &node,
            ServerKind::Dnsmasq,
            Place::Remote,
            Pool::small(pool),
            args,
        )?;
        Ok(Self { node, server })
    }

    /// A server elsewhere that tells what leases it has, and a node with an address to ask it from.
    pub fn with_a_server_to_ask() -> Result<Self> {
        let pool = Pool {
            leasequery: true,
            ..Pool::small(6)
        };
        let world = Self::with_pool(ServerKind::Isc, Place::Remote, pool)?;
        world
            .node
            .netns
            .ip(&format!("addr add 10.67.0.2/24 dev {BRIDGE}"))?;
        Ok(world)
    }

    /// An agent for this world, not started yet.
    pub fn agent(&self, hook: Hook) -> Setup {
        Setup::new(self.server.place, hook)
    }

    /// Boots VM number `number` behind port `vm<number>`.
    pub fn boot(&self, number: u8) -> Result<Vm> {
        self.boot_client(number, Client::Udhcpc)
    }

    /// The same, and `agent` hears all that it says: see [`Agent::boot`].
    pub fn boot_heard(&self, agent: &Agent, number: u8) -> Result<Vm> {
        let mut vm = Vm::off(&self.node, &format!("vm{number}"), vm_mac(number))?;
        agent.boot(&mut vm, Client::Udhcpc)?;
        Ok(vm)
    }

    /// The same, and returns once the server and the agent know its lease.
    pub fn living(&self, agent: &Agent, number: u8) -> Result<(Vm, Ipv4Addr)> {
        let vm = self.boot_heard(agent, number)?;
        let ip = self.lives(agent, &vm)?;
        Ok((vm, ip))
    }

    /// Waits until the server and the agent know the lease of a VM that was booted.
    pub fn lives(&self, agent: &Agent, vm: &impl Station) -> Result<Ipv4Addr> {
        let ip = vm.wait_booted()?;
        self.server.wait_lease(ip, vm.mac(), PATIENCE)?;
        vm.ping(SERVER_IP)?;
        agent.wait("the learned lease", PATIENCE, |event| {
            event.ip == Some(ip)
                && event.json["mac"] == vm.mac().to_string()
                && ["bound", "renewed"].contains(&event.name.as_str())
        })?;
        Ok(ip)
    }

    pub fn boot_client(&self, number: u8, client: Client) -> Result<Vm> {
        Vm::boot(&self.node, &format!("vm{number}"), vm_mac(number), client)
    }
}
