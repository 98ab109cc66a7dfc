//! VMs that are not where they were: two nodes with an agent each, and one switch between them and
//! the server. Who moved is not dead, and who died after it is released once.
use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook, Setup},
    fixture::{Mac, NIC, SERVER_IP, SERVER_MAC, vm_mac},
    forge::{BROADCAST_MAC, Forged, Nic, arp, rarp},
    lab_test,
    node::Node,
    scene::Scene,
    server::{Place, Server, ServerKind},
    vm::{Client, KillKind, Order, Vm},
    wire::{Capture, REQUEST},
    world::{PATIENCE, World},
};

const NODES: [&str; 2] = ["node1", "node2"];

/// `scene` is node 1; what is beyond it is here.
struct Cluster {
    scene: Scene,
    second: Agent,
    node2: Node,
    switch: Node,
}

impl Cluster {
    fn new(args: &[&str]) -> Result<Self> {
        let node1 = Node::new()?;
        let node2 = Node::elsewhere(Mac([2, 0xdc, 0, 0, 2, 1]))?;
        let switch = Node::elsewhere(Mac([2, 0xdc, 0, 0, 3, 1]))?;
        node1.cable_to(&switch, NODES[0], Mac([2, 0xdc, 0, 0, 1, 2]))?;
        node2.cable_to(&switch, NODES[1], Mac([2, 0xdc, 0, 0, 2, 2]))?;
        let server = Server::start(&switch, ServerKind::Dnsmasq, Place::Remote, 20)?;
        let second = Setup::new(Place::Remote, Hook::Tc)
            .on(&node2.netns, "agent2")?
            .quick()
            .args(args)
            .start()?;
        let world = World {
            node: node1,
            server,
        };
        Ok(Self {
            scene: Scene::in_world(world, args)?,
            second,
            node2,
            switch,
        })
    }

    /// Somebody else dies on node 1 and is reclaimed: longer than any hold-down, and all works.
    fn meanwhile(&self, number: u8) -> Result<()> {
        let (mut vm, ip) = self.scene.living(number)?;
        self.scene.dies(&mut vm, ip)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Announce {
    Rarp,
    Garp,
    Traffic,
}

fn moves(order: Order, announce: Announce) -> Result<()> {
    let cluster = Cluster::new(&[])?;
    let scene = &cluster.scene;
    let (mut vm, ip) = scene.living(1)?;
    vm.migrate(&cluster.node2, ip, order)?;
    let nic = scene.nic(&vm)?;
    match announce {
        Announce::Rarp => nic.send(&rarp(vm.mac))?,
        Announce::Garp => nic.send(&arp(1, (vm.mac, ip), (BROADCAST_MAC, ip)))?,
        Announce::Traffic => vm.send_traffic(SERVER_IP, Duration::from_millis(100))?,
    }
    scene.agent.wait_event("moved", ip, PATIENCE)?;
    cluster.meanwhile(2)?;
    scene.unharmed(&vm, ip)?;

    // Its next renewal is what tells node 2 of the lease.
    let renew = Forged::client(REQUEST, vm.mac, 0x1234)
        .option(61, &[&[1], &vm.mac.0[..]].concat())
        .with(|f| {
            f.to_mac = SERVER_MAC;
            (f.from_ip, f.ciaddr, f.to_ip) = (ip, ip, SERVER_IP);
        });
    nic.send(&renew.frame())?;
    cluster.second.wait_event("bound", ip, PATIENCE)?;
    vm.ping(SERVER_IP)?;
    vm.kill(KillKind::PortDeleted)?;
    scene.freed(ip).with_context(|| cluster.second.log())?;
    cluster.meanwhile(3)?;
    // The address may have been given to that one.
    let mut releases = scene.releases(ip);
    releases.retain(|release| release.chaddr == vm.mac);
    ensure!(releases.len() == 1, "not once: {releases:?}");
    Ok(())
}

lab_test! {
    fn moves_old_port_first_and_says_so_by_rarp() { moves(Order::OldPortFirst, Announce::Rarp) }
    fn moves_old_port_first_and_says_so_by_garp() { moves(Order::OldPortFirst, Announce::Garp) }
    fn moves_new_port_first_and_says_so_by_rarp() { moves(Order::NewPortFirst, Announce::Rarp) }
    fn moves_new_port_first_and_just_goes_on() { moves(Order::NewPortFirst, Announce::Traffic) }

    /// It says nothing at all: what finds it is the question.
    fn moves_in_silence() {
        let cluster = Cluster::new(&[])?;
        let scene = &cluster.scene;
        let (mut vm, ip) = scene.living(1)?;
        // Its kernel must not announce the address by itself.
        vm.migrate(&cluster.node2, ip, Order::OldPortFirst)?;
        scene.agent.wait_event("moved", ip, PATIENCE)?;
        cluster.meanwhile(2)?;
        scene.unharmed(&vm, ip)?;
        vm.ping(SERVER_IP)
    }

    /// Node 2 never hears of the lease: nobody releases it, and that is all that is lost.
    fn dies_where_nobody_knows_it() {
        let cluster = Cluster::new(&[])?;
        let scene = &cluster.scene;
        let (mut vm, ip) = scene.living(1)?;
        vm.migrate(&cluster.node2, ip, Order::NewPortFirst)?;
        scene.nic(&vm)?.send(&rarp(vm.mac))?;
        scene.agent.wait_event("moved", ip, PATIENCE)?;
        vm.kill(KillKind::PortDeleted)?;
        cluster.second.wait_port_event("port-lost", "vm1", PATIENCE)?;
        cluster.meanwhile(2)?;
        scene.unharmed(&vm, ip)
    }

    fn its_mac_comes_by_the_uplink_while_its_port_is_silent() {
        let cluster = Cluster::new(&["--hold-down-silent", "5s"])?;
        let scene = &cluster.scene;
        let (mut vm, ip) = scene.living(1)?;
        vm.freeze()?;
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        let beyond = Nic::open(&cluster.switch.netns, NODES[0])?;
        beyond.send(&arp(1, (vm.mac, Ipv4Addr::UNSPECIFIED), (BROADCAST_MAC, SERVER_IP)))?;
        scene.agent.wait_event("moved", ip, PATIENCE)?;
        cluster.meanwhile(2)?;
        scene.unharmed(&vm, ip)
    }

    fn its_address_is_somebody_elses_beyond_the_uplink() {
        let cluster = Cluster::new(&["--hold-down-uplink", "2s"])?;
        let scene = &cluster.scene;
        let (mut vm, ip) = scene.living(1)?;
        vm.kill(KillKind::PortDeleted)?;
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        let beyond = Nic::open(&cluster.switch.netns, NODES[0])?;
        beyond.send(&arp(1, (vm_mac(77), ip), (BROADCAST_MAC, ip)))?;
        scene.agent.wait_event("moved", ip, PATIENCE)?;
        cluster.meanwhile(2)?;
        scene.unharmed(&vm, ip)
    }

    /// The cable is out while the carrier is still there: silence means nothing until it is back.
    fn the_uplink_is_cut_during_the_hold_down() {
        let cluster = Cluster::new(&[])?;
        let scene = &cluster.scene;
        let (mut vm, ip) = scene.living(1)?;
        let cut = Capture::start(&cluster.switch.netns, NODES[0])?;
        cluster.switch.netns.ip("link set node1 nomaster")?;
        vm.kill(KillKind::PortDeleted)?;
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        // Three hold-downs.
        let seen = cut.wait("a RELEASE", Duration::from_secs(3), |frame| {
            dhcp_reclaim_tests::scene::is_release(frame, ip)
        });
        ensure!(seen.is_err(), "released into a cut cable");
        scene.agent.until("a hold for want of the uplink", PATIENCE, |agent| {
            let (verdict, reason) = agent.gate(ip, "dead")?;
            Ok((verdict == "hold" && reason.contains("uplink")).then_some(()))
        })?;
        cluster.switch.netns.ip("link set node1 master br0")?;
        scene.freed(ip)?;
        ensure!(scene.releases(ip).len() == 1);
        Ok(())
    }

    fn stopped_and_started_with_a_new_port() {
        let scene = Scene::new(5, &["--hold-down-uplink", "2s"])?;
        let (mut vm, ip) = scene.living(1)?;
        vm.kill(KillKind::PortDeleted)?;
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        let mut vm = scene.world.boot_client(1, Client::Udhcpc)?;
        ensure!(scene.lives(&vm)? == ip, "another address");
        let (mut other, other_ip) = scene.living(2)?;
        scene.dies(&mut other, other_ip)?;
        scene.unharmed(&vm, ip)?;
        scene.dies(&mut vm, ip)?;
        ensure!(scene.releases(ip).len() == 1);
        Ok(())
    }

    /// A VM with VMs of its own: the port that they share stays up and busy.
    fn one_of_two_behind_a_port_dies() {
        let scene = Scene::new(5, &[])?;
        let mut outer = Vm::off(&scene.world.node, "outer", vm_mac(9))?;
        outer.plug_in()?;
        let inside = Node::within(outer.netns().try_clone()?, Mac([2, 0xdc, 0, 0, 9, 1]))?;
        inside.netns.ip(&format!("link set {NIC} master br0"))?;
        let boot = |number: u8| -> Result<(Vm, Ipv4Addr)> {
            let vm = Vm::boot(&inside, &format!("vm{number}"), vm_mac(number), Client::Udhcpc)?;
            let ip = scene.lives(&vm)?;
            Ok((vm, ip))
        };
        let (mut dies, dead_ip) = boot(1)?;
        let (mut lives, ip) = boot(2)?;
        lives.send_traffic(SERVER_IP, Duration::from_millis(100))?;
        for ip in [dead_ip, ip] {
            let binding = scene.agent.binding(ip)?.context("no binding")?;
            ensure!(binding.port.as_deref() == Some("outer"), "{binding:?}");
        }
        dies.kill(KillKind::PortDeleted)?;
        scene.freed(dead_ip)?;
        scene.unharmed(&lives, ip)?;
        // And when all of it goes, the other one too.
        lives.kill(KillKind::PortDeleted)?;
        outer.kill(KillKind::PortDeleted)?;
        scene.freed(ip)
    }
}
