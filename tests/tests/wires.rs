//! Wires that are not as plain as the lab's others: guests that tag their frames, ports that lose and
//! delay them.
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::Hook,
    fixture::{BRIDGE, NIC, SERVER_IP, TRUNK},
    lab_test,
    netns::NetNs,
    sandbox::{foreign, run, skip},
    scene::Scene,
    server::{Place, ServerKind},
    vm::{KillKind, Vm},
    wire::{Capture, RELEASE},
    world::{PATIENCE, World},
};

const VLAN: u16 = 100;

/// A guest that tags its own frames, and a server in its VLAN: the bridge knows nothing of it.
fn tagged_guests(kind: ServerKind, place: Place) -> Result<()> {
    let probe = NetNs::new()?;
    // `lo` takes no tags on any kernel.
    probe.ip("link add p0 type veth peer name p1")?;
    if probe.ip("link add link p0 name v0 type vlan id 5").is_err() {
        return skip("this kernel has no 802.1Q links (CONFIG_VLAN_8021Q)");
    }
    let world = World::tagged(kind, place, 2, VLAN)?;
    let agent = world.agent(Hook::Tc).quick().start()?;
    // Where tags can be seen: below the server's own link.
    let link = match place {
        Place::Remote => TRUNK,
        Place::Local | Place::Libvirt => BRIDGE,
    };
    let wire = Capture::start(world.server.netns(), link)?;
    let (mut dead, ip) = world.living(&agent, 1)?;
    let (alive, alive_ip) = world.living(&agent, 2)?;
    let binding = agent.binding(ip)?.context("no binding")?;
    ensure!(binding.rest["vlan"] == VLAN, "{binding:?}");

    dead.kill(KillKind::PortDeleted)?;
    let freed = world.server.wait_gone(ip, PATIENCE);
    freed.with_context(|| agent.log())?;
    let release = wire.wait("the RELEASE in its VLAN", PATIENCE, |frame| {
        frame.vlan == Some(VLAN)
            && frame
                .dhcp()
                .is_some_and(|dhcp| dhcp.kind() == Some(RELEASE) && dhcp.ciaddr == ip)
    })?;
    ensure!(release.from_mac() == Some(dead.mac), "{release:?}");

    // Its port stays: the slow road.
    let mut alive = alive;
    alive.kill(KillKind::PortKept)?;
    let freed = world.server.wait_gone(alive_ip, PATIENCE);
    freed.with_context(|| agent.log())?;
    agent.stop()
}

/// What a bad cable does to both ways of a VM's link.
fn impair(node: &NetNs, vm: &Vm) -> Result<()> {
    for (netns, link) in [(node, vm.name.as_str()), (vm.netns(), NIC)] {
        let words = format!("qdisc add dev {link} root netem loss 10% delay 50ms 10ms");
        run(netns.command(foreign("tc")?).args(words.split_whitespace()))?;
    }
    Ok(())
}

lab_test! {
    fn tagged_guests_of_dnsmasq_elsewhere() { tagged_guests(ServerKind::Dnsmasq, Place::Remote) }
    fn tagged_guests_of_dnsmasq_here() { tagged_guests(ServerKind::Dnsmasq, Place::Local) }
    fn tagged_guests_of_kea_elsewhere() { tagged_guests(ServerKind::Kea, Place::Remote) }
    fn tagged_guests_of_isc_here() { tagged_guests(ServerKind::Isc, Place::Local) }

    /// Every tenth frame is lost, each way, and the others are late: the living keep their leases,
    /// idle or busy, and the dead lose theirs.
    fn loss_and_delay_kill_nobody() {
        let probe = NetNs::new()?;
        let words = ["qdisc", "add", "dev", "lo", "root", "netem", "loss", "1%"];
        if run(probe.command(foreign("tc")?).args(words)).is_err() {
            return skip("this kernel cannot lose frames (CONFIG_NET_SCH_NETEM)");
        }
        let scene = Scene::new(10, &[])?;
        let (idle, idle_ip) = scene.living(1)?;
        let (mut busy, busy_ip) = scene.living(2)?;
        let (mut unplugged, unplugged_ip) = scene.living(3)?;
        let (mut silent, silent_ip) = scene.living(4)?;
        for vm in [&idle, &busy, &unplugged, &silent] {
            impair(&scene.world.node.netns, vm)?;
        }
        busy.send_traffic(SERVER_IP, Duration::from_millis(100))?;

        unplugged.kill(KillKind::PortDeleted)?;
        scene.freed(unplugged_ip)?;
        silent.kill(KillKind::PortKept)?;
        scene.freed(silent_ip)?;
        // The idle one has been probed all the while, and is now for two deaths more.
        scene.no_release_within(idle_ip, Duration::from_secs(8))?;
        scene.unharmed(&idle, idle_ip)?;
        scene.unharmed(&busy, busy_ip)?;
        ensure!(scene.agent.counter("core.probes_sent")? > 3);
        Ok(())
    }
}
