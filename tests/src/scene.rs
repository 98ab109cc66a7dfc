//! What tests of one world with an agent have in common: lives begin, and end, as judged by the
//! server's own store and by the wire.
use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{
    agent::{Agent, Hook},
    fixture::{NIC, SERVER_IP},
    forge::Nic,
    server::{Place, ServerKind},
    vm::{Client, Station, Vm},
    wire::{Capture, Dhcp, Frame, RELEASE},
    world::{PATIENCE, World},
};

/// More than the agent has any use for in the lab.
const RSS_MAX: u64 = 96 << 20;

pub struct Scene {
    pub agent: Agent,
    /// What reaches the server, and leaves it.
    pub wire: Capture,
    pub world: World,
}

impl Scene {
    /// dnsmasq elsewhere, and an agent in a hurry.
    pub fn new(pool: u8, args: &[&str]) -> Result<Self> {
        Self::of(ServerKind::Dnsmasq, Place::Remote, pool, args)
    }

    pub fn of(kind: ServerKind, place: Place, pool: u8, args: &[&str]) -> Result<Self> {
        Self::in_world(World::new(kind, place, pool)?, args)
    }

    pub fn in_world(world: World, args: &[&str]) -> Result<Self> {
        let agent = world.agent(Hook::Tc).quick().args(args).start()?;
        let wire = Capture::start(world.server.netns(), world.server.place.link())?;
        Ok(Self { agent, wire, world })
    }

    /// Boots VM `number` and returns once the server and the agent know its lease.
    pub fn living(&self, number: u8) -> Result<(Vm, Ipv4Addr)> {
        self.world.living(&self.agent, number)
    }

    /// See [`Agent::boot`].
    pub fn boot(&self, vm: &mut Vm, client: Client) -> Result<()> {
        self.agent.boot(vm, client)
    }

    /// Waits until the server and the agent know the lease of a VM that was booted.
    pub fn lives(&self, vm: &impl Station) -> Result<Ipv4Addr> {
        self.world.lives(&self.agent, vm)
    }

    /// A hand on what the VM's network card sends.
    pub fn nic(&self, vm: &Vm) -> Result<Nic> {
        Nic::open(vm.netns(), NIC)
    }

    /// Ends a VM, and waits until the server has its address back: all of the machinery runs.
    pub fn dies(&self, vm: &mut impl Station, ip: Ipv4Addr) -> Result<()> {
        vm.die()?;
        self.freed(ip)
    }

    /// Somebody else dies and is reclaimed: longer than a hold-down, and all works.
    pub fn meanwhile(&self, number: u8) -> Result<()> {
        let (mut vm, ip) = self.living(number)?;
        self.dies(&mut vm, ip)
    }

    pub fn freed(&self, ip: Ipv4Addr) -> Result<()> {
        let gone = self.world.server.wait_gone(ip, PATIENCE);
        gone.with_context(|| {
            let gates = self.agent.ask_text(&["explain", &ip.to_string()]);
            format!("{}\n{}", self.story(), gates.unwrap_or_default())
        })?;
        // The server can be quicker than whoever reads the capture.
        self.wait_release(ip).map(drop)
    }

    /// The same for one whose bindings were put in doubt: it speaks once more, and is believed.
    pub fn speaks_and_dies(&self, vm: &mut Vm, ip: Ipv4Addr) -> Result<()> {
        vm.ping(SERVER_IP)?;
        self.agent.wait_certain(ip, PATIENCE)?;
        self.dies(vm, ip)
    }

    pub fn releases(&self, ip: Ipv4Addr) -> Vec<Dhcp> {
        let mut releases = self.wire.dhcp(RELEASE);
        releases.retain(|dhcp| dhcp.ciaddr == ip);
        releases
    }

    /// The server still has the lease, and nobody has tried to take it away.
    pub fn unharmed(&self, vm: &impl Station, ip: Ipv4Addr) -> Result<()> {
        let releases = self.releases(ip);
        ensure!(releases.is_empty(), "a RELEASE of {ip}: {releases:?}");
        let leases = self.world.server.leases()?;
        ensure!(
            leases
                .iter()
                .any(|lease| lease.ip == ip && lease.mac == vm.mac()),
            "the server's lease of {ip} to {} is gone: {leases:?}",
            vm.mac(),
        );
        Ok(())
    }

    /// The agent answers, and has not grown.
    pub fn healthy(&self) -> Result<()> {
        self.agent.list()?;
        let rss = self.agent.rss()?;
        ensure!(rss < RSS_MAX, "the agent has {} MiB in use", rss >> 20);
        Ok(())
    }

    pub fn wait_release(&self, ip: Ipv4Addr) -> Result<Dhcp> {
        let frame = self
            .wire
            .wait(&format!("a RELEASE of {ip}"), PATIENCE, |frame| {
                is_release(frame, ip)
            })
            .with_context(|| format!("events:\n{}", self.story()))?;
        frame.dhcp().context("not DHCP any more")
    }

    /// Fails if anything of `ip` is released within `time`. Only for where nothing else can be
    /// waited for.
    pub fn no_release_within(&self, ip: Ipv4Addr, time: Duration) -> Result<()> {
        let seen = self
            .wire
            .wait("a RELEASE", time, |frame| is_release(frame, ip));
        ensure!(seen.is_err(), "a RELEASE of {ip}: {:?}", seen?.dhcp());
        Ok(())
    }

    /// Waits until a counter of the agent's has come to `least`.
    pub fn wait_counter(&self, name: &str, least: u64) -> Result<()> {
        self.agent
            .until(&format!("{name} at {least}"), PATIENCE, |agent| {
                Ok((agent.counter(name)? >= least).then_some(()))
            })
    }

    /// What the agent told so far.
    pub fn story(&self) -> String {
        let events = self.agent.events();
        let lines: Vec<_> = events.iter().map(|event| event.json.to_string()).collect();
        lines.join("\n")
    }
}

pub fn is_release(frame: &Frame, ip: Ipv4Addr) -> bool {
    frame
        .dhcp()
        .is_some_and(|dhcp| dhcp.kind() == Some(RELEASE) && dhcp.ciaddr == ip)
}
