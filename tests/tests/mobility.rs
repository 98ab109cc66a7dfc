//! VMs that are not where they were: two nodes with an agent each, and one switch between them and
//! the server. Who moved is not dead, and who died after it is released once.
use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Hook, Setup},
    clock::{now, scaled},
    cluster::{Cluster, NODES},
    fixture::{BRIDGE, Mac, NIC, SERVER_IP, SERVER_MAC, UPLINK, vm_mac},
    forge::{BROADCAST_MAC, Forged, Nic, arp, bpdu, rarp},
    lab_test,
    node::Node,
    scene::{Scene, is_release},
    server::{Place, ServerKind},
    vm::{Client, KillKind, Order, Vm},
    wire::{Capture, REQUEST},
    world::{PATIENCE, World},
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Announce {
    Rarp,
    Garp,
    Traffic,
}

/// `says`: all that still comes by the uplink.
fn cut_during_the_hold_down(says: Option<Vec<u8>>) -> Result<()> {
    let cluster = Cluster::new(&[])?;
    let scene = &cluster.scene;
    let (mut vm, ip) = scene.living(1)?;
    let beyond = Nic::open(&cluster.switch.netns, NODES[0])?;
    let say = || says.as_ref().map_or(Ok(()), |frame| beyond.send(frame));
    let cut = Capture::start(&cluster.switch.netns, NODES[0])?;
    cluster.switch.netns.ip("link set node1 nomaster")?;
    vm.kill(KillKind::PortDeleted)?;
    scene.agent.wait_event("silent", ip, PATIENCE)?;
    // Three hold-downs.
    for _ in 0..30 {
        say()?;
        let seen = cut.wait("a RELEASE", Duration::from_millis(100), |frame| {
            is_release(frame, ip)
        });
        ensure!(seen.is_err(), "released into a cut cable");
    }
    scene
        .agent
        .until("a hold for want of the uplink", PATIENCE, |agent| {
            say()?;
            let (verdict, reason) = agent.gate(ip, "dead")?;
            Ok((verdict == "hold" && reason.contains("uplink")).then_some(()))
        })?;
    cluster.switch.netns.ip("link set node1 master br0")?;
    scene.freed(ip)?;
    ensure!(scene.releases(ip).len() == 1);
    Ok(())
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
    scene.meanwhile(2)?;
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
    scene.meanwhile(3)?;
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
        scene.meanwhile(2)?;
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
        scene.meanwhile(2)?;
        scene.unharmed(&vm, ip)
    }

    /// Network scripts delete the bridge and make it again: whoever died just then may as well have
    /// been started at a port that nobody heard.
    fn a_bridge_that_is_made_again() {
        let scene = Scene::new(10, &["--hold-down-silent", "6s"])?;
        let netns = &scene.world.node.netns;
        let (mut vm, ip) = scene.living(1)?;
        let (mut other, gone) = scene.living(2)?;
        other.kill(KillKind::PortDeleted)?;
        netns.ip(&format!("link del {BRIDGE}"))?;
        scene.agent.wait("that the bridge is gone", PATIENCE, |event| {
            event.json["reason"] == "settled: its bridge is gone"
        })?;
        let (verdict, reason) = scene.agent.gate(gone, "settled")?;
        ensure!(verdict == "hold", "{reason}");
        let back = now();
        scene.world.node.add_bridge()?;
        for port in [UPLINK, vm.name.as_str()] {
            netns.ip(&format!("link set {port} master {BRIDGE}"))?;
        }
        vm.ping(SERVER_IP)?;
        scene.unharmed(&vm, ip)?;
        scene.freed(gone)?;
        let release = scene.wire.frames().into_iter().find(|frame| is_release(frame, gone));
        let waited = release.context("no RELEASE")?.at - back;
        ensure!(waited >= scaled(Duration::from_secs(6)), "released {waited:?} after the bridge came back");
        scene.speaks_and_dies(&mut vm, ip)
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
        scene.meanwhile(2)?;
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
        scene.meanwhile(2)?;
        scene.unharmed(&vm, ip)
    }

    /// The cable is out while the carrier is still there: silence means nothing until it is back.
    fn the_uplink_is_cut_during_the_hold_down() { cut_during_the_hold_down(None) }
    /// A switch goes on saying who it is by a port that it blocks.
    fn the_uplink_is_blocked_during_the_hold_down() { cut_during_the_hold_down(Some(bpdu(SERVER_MAC))) }

    /// Its new port is outside of `--port`: no lease is learned there, but its life is seen.
    fn moves_to_a_port_that_nobody_named() {
        // Longer than a slow machine takes to plug it in again.
        let scene = Scene::new(5, &["--port", "vm*", "--hold-down-uplink", "6s"])?;
        let (mut vm, ip) = scene.living(1)?;
        vm.unplug()?;
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        vm.name = "spare1".to_owned();
        vm.plug_in()?;
        vm.configure(ip)?;
        let moved = scene.agent.wait_event("moved", ip, PATIENCE)?;
        let reason = moved.json["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("spare1"), "{reason}");
        let (mut other, other_ip) = scene.living(2)?;
        scene.dies(&mut other, other_ip)?;
        scene.unharmed(&vm, ip)?;
        // A renewal from there binds nothing, so its end there is nobody's to tell.
        let before = scene.wire.dhcp(REQUEST).len();
        vm.renew()?;
        scene.agent.until("the renewal", PATIENCE, |_| {
            Ok((scene.wire.dhcp(REQUEST).len() > before).then_some(()))
        })?;
        vm.kill(KillKind::PortDeleted)?;
        let (mut other, other_ip) = scene.living(3)?;
        scene.dies(&mut other, other_ip)?;
        scene.unharmed(&vm, ip)
    }

    /// Its port is gone, and one frame of it comes by a port where no lease was ever learned.
    fn speaks_at_the_last_moment_from_a_port_that_nobody_named() {
        let scene = Scene::new(5, &["--port", "vm*", "--hold-down-uplink", "3s"])?;
        let (vm, ip) = scene.living(1)?;
        let mut spare = Vm::off(&scene.world.node, "spare1", vm_mac(77))?;
        spare.plug_in()?;
        scene.agent.wait_port_event("port-up", "spare1", PATIENCE)?;
        spare.wait_forwarding(PATIENCE)?;
        let nic = scene.nic(&spare)?;
        vm.unplug()?;
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        nic.send(&arp(1, (vm.mac, ip), (BROADCAST_MAC, ip)))?;
        scene.agent.wait_event("moved", ip, PATIENCE)?;
        let (mut other, other_ip) = scene.living(2)?;
        scene.dies(&mut other, other_ip)?;
        scene.unharmed(&vm, ip)
    }

    /// A server behind a port that nobody named is told about, and not believed.
    fn a_server_behind_a_port_that_nobody_named() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 5)?;
        // As for a local server: without `--uplink`.
        let agent = Setup::new(Place::Local, Hook::Tc)
            .quick()
            .args(&["--port", "vm*"])
            .start()?;
        let vm = world.boot(1)?;
        let ip = vm.wait_lease(PATIENCE)?;
        let told = agent.wait("the server", PATIENCE, |event| {
            event.name == "rogue-server" && event.port.as_deref() == Some(UPLINK)
        })?;
        let reason = told.json["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("--uplink"), "{reason}");
        agent.wait_event("requested", ip, PATIENCE)?;
        agent.ensure_no_event("bound", ip)
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
