//! Bridges that filter VLANs: what a port's frames are tagged with depends on the port.
use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::Hook,
    fixture::{BRIDGE, Mac, NIC, SERVER_IP, UPLINK, vm_mac},
    forge::{BROADCAST_MAC, Nic, arp},
    lab_test,
    netns::NetNs,
    node::Node,
    sandbox::{foreign, run, skip},
    scene::Scene,
    server::{Place, Server, ServerKind},
    vm::{Client, KillKind, Vm},
    world::{PATIENCE, World},
};

const VLAN: u16 = 10;
/// The switch's end of the cable to the node.
const TRUNK: &str = "node1";
const NOT_HERE: &str = "this kernel's bridges filter no VLANs (CONFIG_BRIDGE_VLAN_FILTERING)";

fn filter_vlans(netns: &NetNs, how: &str) -> Result<()> {
    netns.ip(&format!("link set {BRIDGE} type bridge {how}"))
}

/// `bridge vlan ARGS`; several commands are separated by lines.
fn vlan(netns: &NetNs, script: &str) -> Result<()> {
    for line in script.lines().map(str::trim) {
        let mut command = netns.command(foreign("bridge")?);
        run(command.arg("vlan").args(line.split_whitespace()))?;
    }
    Ok(())
}

/// Makes a port one of VLAN 10 alone, untagged or not.
fn only(netns: &NetNs, port: &str, how: &str) -> Result<()> {
    vlan(
        netns,
        &format!(
            "del vid 1 dev {port}
             add vid {VLAN} dev {port} {how}"
        ),
    )
}

/// VMs and the server have access ports of VLAN 10; between node and switch there is a trunk.
struct Campus {
    scene: Scene,
    /// Its namespace lives as long as this.
    _switch: Node,
}

impl Campus {
    fn new() -> Result<Self> {
        let node = Node::new()?;
        if filter_vlans(&node.netns, "vlan_filtering 1").is_err() {
            return skip(NOT_HERE);
        }
        let switch = Node::elsewhere(Mac([2, 0xdc, 0, 0, 3, 1]))?;
        filter_vlans(&switch.netns, "vlan_filtering 1")?;
        node.cable_to(&switch, TRUNK, Mac([2, 0xdc, 0, 0, 1, 2]))?;
        let server = Server::start(&switch, ServerKind::Dnsmasq, Place::Remote, 5)?;
        only(&switch.netns, TRUNK, "")?;
        only(&switch.netns, UPLINK, "pvid untagged")?;
        only(&node.netns, UPLINK, "")?;
        vlan(&node.netns, &format!("add vid {VLAN} dev {BRIDGE} self"))?;
        Ok(Self {
            scene: Scene::in_world(World { node, server }, &[])?,
            _switch: switch,
        })
    }
}

/// Boots a VM behind an access port of VLAN 10, and waits for its lease.
fn living(scene: &Scene, number: u8) -> Result<(Vm, Ipv4Addr)> {
    let node = &scene.world.node;
    let mut vm = Vm::off(node, &format!("vm{number}"), vm_mac(number))?;
    vm.plug_in()?;
    scene.agent.wait_port_event("port-up", &vm.name, PATIENCE)?;
    only(&node.netns, &vm.name, "pvid untagged")?;
    vm.start_client(Client::Udhcpc)?;
    let ip = scene.lives(&vm)?;
    let binding = scene.agent.binding(ip)?.context("no binding")?;
    ensure!(binding.rest["vlan"] == VLAN, "{binding:?}");
    Ok((vm, ip))
}

lab_test! {
    fn dies_behind_an_access_port() {
        let campus = Campus::new()?;
        let scene = &campus.scene;
        let (mut vm, ip) = living(scene, 1)?;
        let (neighbour, neighbour_ip) = living(scene, 2)?;
        scene.dies(&mut vm, ip)?;
        scene.unharmed(&neighbour, neighbour_ip)
    }

    /// It is asked by its own port, where its VLAN has no tag.
    fn falls_silent_behind_an_access_port() {
        let campus = Campus::new()?;
        let scene = &campus.scene;
        let (mut vm, ip) = living(scene, 1)?;
        let answered = scene.agent.counter("core.probes_sent")? + 2;
        scene.wait_counter("core.probes_sent", answered)?;
        scene.agent.ensure_no_event("silent", ip)?;
        vm.kill(KillKind::PortKept)?;
        scene.freed(ip)
    }

    /// It lives on beyond the trunk, where its frames have a tag.
    fn moves_from_an_access_port_to_beyond_the_trunk() {
        let campus = Campus::new()?;
        let scene = &campus.scene;
        let (vm, ip) = living(scene, 1)?;
        let beyond = Nic::open(scene.world.server.netns(), NIC)?;
        vm.unplug()?;
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        beyond.send(&arp(1, (vm.mac, ip), (BROADCAST_MAC, SERVER_IP)))?;
        scene.agent.wait_event("moved", ip, PATIENCE)?;
        let (mut other, other_ip) = living(scene, 2)?;
        scene.dies(&mut other, other_ip)?;
        scene.unharmed(&vm, ip)
    }

    /// Where the bridge itself has no part in a VLAN nobody can be asked there.
    fn a_vlan_that_the_bridge_is_no_member_of_is_held() {
        let campus = Campus::new()?;
        let scene = &campus.scene;
        let (mut vm, ip) = living(scene, 1)?;
        vlan(&scene.world.node.netns, &format!("del vid {VLAN} dev {BRIDGE} self"))?;
        scene.agent.until("a hold", PATIENCE, |agent| {
            let (verdict, reason) = agent.gate(ip, "confirmed")?;
            Ok((verdict == "hold" && reason.contains("no member of 10")).then_some(()))
        })?;
        vm.kill(KillKind::PortDeleted)?;
        // More rounds than a death takes.
        let asked = scene.agent.counter("core.probes_sent")? + 6;
        scene.wait_counter("core.probes_sent", asked)?;
        ensure!(scene.releases(ip).is_empty(), "released where nobody was asked");
        vlan(&scene.world.node.netns, &format!("add vid {VLAN} dev {BRIDGE} self"))?;
        scene.freed(ip)
    }

    /// The server is this host, at the bridge itself: its VLAN has no tag there either.
    fn dies_where_the_server_is_at_the_bridge() {
        let scene = Scene::of(ServerKind::Dnsmasq, Place::Local, 5, &[])?;
        let node = &scene.world.node.netns;
        if filter_vlans(node, "vlan_filtering 1").is_err() {
            return skip(NOT_HERE);
        }
        vlan(node, &format!("add vid {VLAN} dev {BRIDGE} self pvid untagged"))?;
        let (mut vm, ip) = living(&scene, 1)?;
        scene.dies(&mut vm, ip)
    }

    /// What is known by other tags ends with them; a renewal makes it known again.
    fn a_bridge_begins_to_filter_vlans() {
        let scene = Scene::new(5, &[])?;
        let (mut vm, ip) = scene.living(1)?;
        if filter_vlans(&scene.world.node.netns, "vlan_filtering 1").is_err() {
            return skip(NOT_HERE);
        }
        scene.agent.wait_event("moved", ip, PATIENCE)?;
        vm.renew()?;
        scene.agent.until("its lease on the default VLAN", PATIENCE, |agent| {
            let bindings = agent.list()?;
            let on = |vlan: u16| bindings.iter().any(|b| b.ip == ip && b.state == "bound" && b.rest["vlan"] == vlan);
            Ok(on(1).then_some(()))
        })?;
        vm.ping(SERVER_IP)?;
        scene.dies(&mut vm, ip)
    }

    /// The bridge's own address is on its default VLAN: from there its server is asked, and a file's
    /// leases are there too.
    fn leases_that_were_there_first_are_on_the_bridges_own_vlan() {
        let world = World::with_a_server_to_ask()?;
        if filter_vlans(&world.node.netns, "vlan_filtering 1").is_err() {
            return skip(NOT_HERE);
        }
        let mut vm = world.boot(1)?;
        let ip = vm.wait_lease(PATIENCE)?;
        // On a VLAN where nobody can be asked.
        let mut elsewhere = world.boot(2)?;
        elsewhere.wait_lease(PATIENCE)?;
        only(&world.node.netns, &elsewhere.name, "pvid untagged")?;
        elsewhere.send_traffic(SERVER_IP, Duration::from_millis(100))?;
        vm.ping(SERVER_IP)?;
        let server = SERVER_IP.to_string();
        let agent = world.agent(Hook::Tc).quick().args(&["--ask-server", &server]).start()?;
        let bound = agent.wait_event("bound", ip, PATIENCE);
        bound.with_context(|| format!("{}{}", agent.log(), world.server.log()))?;
        let binding = agent.binding(ip)?.context("no binding")?;
        ensure!(binding.rest["vlan"] == 1 && binding.rest["origin"] == "imported", "{binding:?}");
        agent.until("one that is not asked for", PATIENCE, |agent| {
            Ok((agent.counter("agent.leases_not_asked_for")? > 0).then_some(()))
        })?;
        vm.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(ip, PATIENCE)?;
        agent.stop()
    }

    /// By 802.1ad tags: not followed, so nothing is released until that ends.
    fn a_provider_bridge_is_held() {
        let scene = Scene::new(5, &[])?;
        if filter_vlans(&scene.world.node.netns, "vlan_filtering 1 vlan_protocol 802.1ad").is_err() {
            return skip(NOT_HERE);
        }
        let held = |event: &dhcp_reclaim_tests::agent::Event| {
            event.name == "held" && event.json["reason"].as_str().is_some_and(|r| r.contains("802.1ad"))
        };
        scene.agent.wait("a hold", PATIENCE, held)?;
        let (mut vm, ip) = scene.living(1)?;
        vm.kill(KillKind::PortDeleted)?;
        scene.agent.wait_event("gone", ip, PATIENCE)?;
        let (verdict, reason) = scene.agent.gate(ip, "confirmed")?;
        ensure!(verdict == "hold" && reason.contains("802.1ad"), "{verdict}: {reason}");
        filter_vlans(&scene.world.node.netns, "vlan_filtering 0")?;
        scene.freed(ip)
    }
}
