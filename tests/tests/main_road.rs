//! The main road, whole: a VM dies, and its address comes back. And each way in which it must not.
//!
//! The judge is the server's own store, or a capture of the wire; the agent's word is only waited
//! for, to know when to look.
use std::{fs, net::Ipv4Addr, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook, Setup},
    boot::kernel::has_tcx,
    clock::{now, scaled},
    fixture::{NIC, SERVER_IP, SERVER_MAC, UPLINK, pool_ip, vm_mac},
    forge::{self, Nic},
    lab_test,
    netns::NetNs,
    node::Node,
    sandbox::{BPFFS, DIR, filters},
    server::{Place, Server, ServerKind},
    vm::{Client, KillKind, Vm},
    wire::{Capture, DECLINE, Dhcp, Frame, NAK, RELEASE},
    world::{PATIENCE, World},
};

/// Longer than a whole death at the settings of [`Setup::quick`]: when nothing must happen, this is
/// how long it is given to happen.
const A_DEATH: Duration = Duration::from_secs(6);

/// Boots a VM that has a lease and has been heard: ready to die.
fn living(world: &World, number: u8) -> Result<(Vm, Ipv4Addr)> {
    living_client(world, number, Client::Udhcpc)
}

fn living_client(world: &World, number: u8, client: Client) -> Result<(Vm, Ipv4Addr)> {
    let vm = world.boot_client(number, client)?;
    let ip = settled(world, &vm)?;
    Ok((vm, ip))
}

fn settled(world: &World, vm: &Vm) -> Result<Ipv4Addr> {
    let ip = vm.wait_lease(PATIENCE)?;
    world.server.wait_lease(ip, vm.mac, PATIENCE)?;
    vm.ping(SERVER_IP)?;
    Ok(ip)
}

/// Waits until the agent has learned the lease.
fn learned(agent: &Agent, ip: Ipv4Addr) -> Result<()> {
    agent.wait_event("bound", ip, PATIENCE).map(drop)
}

/// A capture of what reaches the server.
fn at_server(world: &World) -> Result<Capture> {
    Capture::start(world.server.netns(), world.server.place.link())
}

fn is_release(dhcp: &Dhcp, ip: Ipv4Addr) -> bool {
    dhcp.kind() == Some(RELEASE) && dhcp.ciaddr == ip
}

/// Gives whatever must not happen the time to happen, and fails if a RELEASE was on the wire.
fn no_release_within(world: &World, wire: &Capture, ip: Ipv4Addr, time: Duration) -> Result<()> {
    let seen = wire.wait("a RELEASE", time, |frame| {
        frame.dhcp().is_some_and(|dhcp| is_release(&dhcp, ip))
    });
    ensure!(seen.is_err(), "a RELEASE on the wire: {:?}", seen?.dhcp());
    ensure!(world.server.has(ip)?, "the server's lease of {ip} is gone");
    Ok(())
}

/// RFC 2131, table 5, and DESIGN.md §5: what every server accepts, and no switch drops.
fn ensure_well_formed(dhcp: &Dhcp, vm: &Vm, server: Ipv4Addr) -> Result<()> {
    ensure!(dhcp.from_mac == vm.mac, "Ethernet source {}", dhcp.from_mac);
    ensure!(dhcp.chaddr == vm.mac, "chaddr {}", dhcp.chaddr);
    ensure!(dhcp.from_ip == dhcp.ciaddr, "IP source {}", dhcp.from_ip);
    ensure!(dhcp.to_ip == server, "IP destination {}", dhcp.to_ip);
    ensure!(dhcp.yiaddr.is_unspecified(), "yiaddr {}", dhcp.yiaddr);
    let server_id = dhcp.option(54);
    ensure!(
        server_id == Some(&server.octets()),
        "server id {server_id:?}"
    );
    // What udhcpc used: the hardware type and address.
    let client_id = [&[1], &vm.mac.0[..]].concat();
    ensure!(
        dhcp.option(61) == Some(&client_id),
        "client id {:?}",
        dhcp.option(61)
    );
    for forbidden in [50, 51, 55, 57] {
        ensure!(dhcp.option(forbidden).is_none(), "option {forbidden}");
    }
    Ok(())
}

fn dies_with_its_port(kind: ServerKind, place: Place, hook: Hook) -> Result<()> {
    let world = World::new(kind, place, 2)?;
    let agent = world.agent(hook).quick().start()?;
    let wire = at_server(&world)?;
    let (mut dead, dead_ip) = world.living(&agent, 1)?;
    let (mut alive, alive_ip) = world.living(&agent, 2)?;
    alive.send_traffic(SERVER_IP, Duration::from_millis(100))?;

    dead.kill(KillKind::PortDeleted)?;
    let freed = world.server.wait_gone(dead_ip, PATIENCE);
    freed.with_context(|| agent.log())?;
    let release = wire.wait("the RELEASE", PATIENCE, |frame| {
        frame.dhcp().is_some_and(|dhcp| is_release(&dhcp, dead_ip))
    })?;
    let release = release.dhcp().context("not a RELEASE any more")?;
    ensure_well_formed(&release, &dead, SERVER_IP)?;
    if place == Place::Remote {
        ensure!(
            release.to_mac == SERVER_MAC,
            "Ethernet destination {}",
            release.to_mac
        );
    }

    let (_next, next_ip) = world.living(&agent, 3)?;
    ensure!(
        next_ip == dead_ip,
        "the next VM got {next_ip}, not {dead_ip}"
    );
    alive.ping(SERVER_IP)?;
    ensure!(
        alive.lease() == Some(alive_ip),
        "the neighbour lost its lease"
    );
    world.server.wait_lease(alive_ip, alive.mac, PATIENCE)?;
    let others = wire.dhcp(RELEASE);
    let wrong = others.iter().find(|dhcp| dhcp.ciaddr != dead_ip);
    ensure!(wrong.is_none(), "a RELEASE for the living: {wrong:?}");
    // The new owner must not lose what was freed for it: no late repetition.
    ensure!(world.server.has(next_ip)?, "the new lease is gone");
    agent.stop()
}

/// The guest is dead and its port is not: the slow road.
fn dies_behind_its_port(kind: ServerKind, place: Place, hook: Hook) -> Result<()> {
    let world = World::new(kind, place, 2)?;
    let agent = world.agent(hook).quick().start()?;
    let (mut dead, dead_ip) = world.living(&agent, 1)?;
    let (alive, alive_ip) = world.living(&agent, 2)?;

    dead.kill(KillKind::PortKept)?;
    let freed = world.server.wait_gone(dead_ip, PATIENCE);
    freed.with_context(|| agent.log())?;
    // Silent too, but it answers.
    alive.ping(SERVER_IP)?;
    ensure!(world.server.has(alive_ip)?, "the living lost its lease");
    Ok(())
}

macro_rules! placements {
    ($($name:ident: $kind:ident $place:ident $hook:ident;)+) => {$(
        mod $name {
            use super::*;

            lab_test! {
                fn dies_with_its_port() {
                    super::dies_with_its_port(ServerKind::$kind, Place::$place, Hook::$hook)
                }
                fn dies_behind_its_port() {
                    super::dies_behind_its_port(ServerKind::$kind, Place::$place, Hook::$hook)
                }
            }
        }
    )+};
}

placements! {
    dnsmasq_remote_tc: Dnsmasq Remote Tc;
    dnsmasq_local_tc: Dnsmasq Local Tc;
    dnsmasq_remote_xdp: Dnsmasq Remote Xdp;
    dnsmasq_local_xdp: Dnsmasq Local Xdp;
    dnsmasq_libvirt_tc: Dnsmasq Libvirt Tc;
    kea_remote_tc: Kea Remote Tc;
    kea_local_tc: Kea Local Tc;
    kea_remote_xdp: Kea Remote Xdp;
    kea_local_xdp: Kea Local Xdp;
    isc_remote_tc: Isc Remote Tc;
    isc_local_tc: Isc Local Tc;
    isc_remote_xdp: Isc Remote Xdp;
    isc_local_xdp: Isc Local Xdp;
}

/// A world with dnsmasq elsewhere, an agent in a hurry, and one VM that it has learned.
fn one_vm(more: &[&str]) -> Result<(World, Agent, Capture, Vm, Ipv4Addr)> {
    let world = World::new(ServerKind::Dnsmasq, Place::Remote, 2)?;
    let agent = world.agent(Hook::Tc).quick().args(more).start()?;
    let wire = at_server(&world)?;
    let (vm, ip) = world.living(&agent, 1)?;
    Ok((world, agent, wire, vm, ip))
}

/// An ARP request for the VM that reached it, other than the server's own.
fn is_probe(frame: &Frame, ip: Ipv4Addr) -> bool {
    frame.arp().is_some_and(|arp| {
        arp.op == 1 && arp.target_ip == ip && arp.sender_ip != SERVER_IP && !frame.outgoing
    })
}

/// Programs at both directions of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Attached {
    tcx: usize,
    clsact: usize,
}

fn attached(port: &str) -> Result<Attached> {
    let mut attached = Attached::default();
    for (way, direction) in [
        ("ingress", TcAttachType::Ingress),
        ("egress", TcAttachType::Egress),
    ] {
        if has_tcx()? {
            attached.tcx += SchedClassifier::query_tcx(port, direction)?.1.len();
        }
        attached.clsact += filters(port, way)?;
    }
    Ok(attached)
}

/// Both ways of a VM's port, by this hook.
fn both_ways(hook: Hook) -> Result<Attached> {
    let none = Attached::default();
    Ok(match hook {
        Hook::Tc if has_tcx()? => Attached { tcx: 2, ..none },
        Hook::Tc | Hook::Clsact => Attached { clsact: 2, ..none },
        Hook::Xdp => none,
    })
}

lab_test! {
    fn within_three_seconds_by_default() {
        let world = World::new(ServerKind::Dnsmasq, Place::Local, 1)?;
        let agent = world.agent(Hook::Tc).start()?;
        let (mut vm, ip) = world.living(&agent, 1)?;
        // The agent has been up for longer than `settle` when a real VM dies.
        let settled = agent.wait("the time that a start takes to settle", Duration::from_secs(4), |_| false);
        ensure!(settled.is_err());
        let killed = vm.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(ip, PATIENCE).with_context(|| agent.log())?;
        let took = now() - killed;
        println!("NOTE freed {:.3} s after the kill, at default settings", took.as_secs_f64());
        ensure!(took < scaled(Duration::from_secs(3)), "took {took:?}");
        Ok(())
    }

    fn detached_and_then_deleted_is_a_port_lost() {
        let (world, agent, _wire, mut vm, ip) = one_vm(&["--hold-down-silent", "300s"])?;
        vm.kill(KillKind::PortDetached)?;
        world.server.wait_gone(ip, PATIENCE).with_context(|| agent.log())
    }

    fn carrier_lost_is_a_port_lost() {
        let (world, agent, _wire, mut vm, ip) = one_vm(&[])?;
        vm.kill(KillKind::CarrierLost)?;
        world.server.wait_gone(ip, PATIENCE).with_context(|| agent.log())
    }

    fn a_busy_vm_is_never_probed() {
        let (world, agent, wire, mut busy, ip) = one_vm(&[])?;
        busy.send_traffic(SERVER_IP, Duration::from_millis(100))?;
        let (quiet, quiet_ip) = world.living(&agent, 2)?;
        let at_busy = Capture::start(busy.netns(), NIC)?;
        let at_quiet = Capture::start(quiet.netns(), NIC)?;
        // The one beside it is probed, again and again: the agent does look.
        at_quiet.wait_nth("probes of the quiet VM", 3, PATIENCE, |frame| is_probe(frame, quiet_ip))?;
        ensure!(busy.traffic_sent() > 10, "the busy VM was not busy");
        let probes = at_busy.count(|frame| is_probe(frame, ip));
        ensure!(probes == 0, "a busy VM was probed {probes} times");
        no_release_within(&world, &wire, quiet_ip, Duration::from_secs(1))?;
        ensure!(agent.state(ip)? == "bound", "state {}", agent.state(ip)?);
        Ok(())
    }

    fn a_vm_that_sends_without_answering_is_alive() {
        let (world, agent, wire, mut vm, ip) = one_vm(&[])?;
        vm.silence_arp()?;
        vm.send_traffic(SERVER_IP, Duration::from_millis(300))?;
        no_release_within(&world, &wire, ip, A_DEATH)?;
        ensure!(vm.traffic_sent() > 10, "the VM did not send");
        ensure!(agent.state(ip)? == "bound", "state {}", agent.state(ip)?);
        Ok(())
    }

    fn a_vm_that_comes_back_in_the_hold_down_is_not_released() {
        let (world, agent, wire, mut vm, ip) = one_vm(&["--hold-down-silent", "4s"])?;
        vm.freeze()?;
        agent.wait_event("silent", ip, PATIENCE)?;
        vm.thaw()?;
        vm.ping(SERVER_IP)?;
        agent.wait_event("alive", ip, PATIENCE)?;
        no_release_within(&world, &wire, ip, A_DEATH)?;
        ensure!(agent.state(ip)? == "bound", "state {}", agent.state(ip)?);
        // And it can still die.
        vm.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(ip, PATIENCE)
    }

    fn a_port_made_again_with_its_vm_alive_is_not_released() {
        let (world, agent, wire, mut vm, ip) = one_vm(&["--hold-down-uplink", "3s", "--hold-down", "3s", "--hold-down-silent", "4s"])?;
        vm.unplug()?;
        agent.wait_port_event("port-lost", "vm1", PATIENCE)?;
        vm.plug_in()?;
        vm.configure(ip)?;
        vm.ping(SERVER_IP)?;
        no_release_within(&world, &wire, ip, A_DEATH)?;
        vm.ping(SERVER_IP)
    }

    fn a_guests_own_release_is_not_repeated() {
        let (world, agent, wire, mut vm, ip) = one_vm(&[])?;
        vm.release()?;
        world.server.wait_gone(ip, PATIENCE)?;
        agent.wait_event("withdrawn", ip, PATIENCE)?;
        vm.kill(KillKind::PortDeleted)?;
        agent.wait_port_event("port-lost", "vm1", PATIENCE)?;
        let second = wire.wait_nth("a second RELEASE", 2, A_DEATH, |frame| {
            frame.dhcp().is_some_and(|dhcp| is_release(&dhcp, ip))
        });
        ensure!(second.is_err() && wire_releases(&wire, ip) == 1, "{:?}", wire.dhcp(RELEASE));
        Ok(())
    }

    fn a_declined_address_is_not_released() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 2)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let wire = at_server(&world)?;
        // Somebody has the first address of the pool without having asked for it.
        let mut squatter = Vm::off(&world.node, "squatter", vm_mac(9))?;
        squatter.plug_in()?;
        squatter.configure(pool_ip(0))?;
        squatter.ping(SERVER_IP)?;

        let mut vm = world.boot_client(1, Client::UdhcpcChecking)?;
        let decline = wire.wait("a DECLINE", PATIENCE, |frame| {
            frame.dhcp().is_some_and(|dhcp| dhcp.kind() == Some(DECLINE))
        })?;
        let declined = decline.dhcp().context("not a DECLINE any more")?;
        ensure!(declined.option(50) == Some(&pool_ip(0).octets()), "{declined:?}");
        agent.wait("the end of the declined binding", PATIENCE, |event| {
            event.ip == Some(pool_ip(0)) && ["refused", "withdrawn"].contains(&event.name.as_str())
        })?;
        vm.kill(KillKind::PortDeleted)?;
        let seen = wire.wait("a RELEASE", A_DEATH, |frame| {
            frame.dhcp().is_some_and(|dhcp| is_release(&dhcp, pool_ip(0)))
        });
        ensure!(seen.is_err(), "a RELEASE of a declined address");
        Ok(())
    }

    fn a_refused_request_makes_no_binding() {
        // dhcpd is authoritative: it refuses an address of another network.
        let world = World::new(ServerKind::Isc, Place::Remote, 1)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let wire = at_server(&world)?;
        let foreign_ip = Ipv4Addr::new(10, 99, 0, 5);
        let mut vm = Vm::off(&world.node, "vm1", vm_mac(1))?;
        let lease = format!(
            "lease {{ interface \"{NIC}\"; fixed-address {foreign_ip}; \
             option subnet-mask 255.255.255.0; option dhcp-lease-time 3600; \
             option dhcp-server-identifier 10.99.0.1; \
             renew 5 2037/01/01 00:00:00; rebind 5 2037/01/01 00:00:00; \
             expire 5 2037/01/01 00:00:00; }}\n"
        );
        fs::write(Path::new(DIR).join("vm1/dhclient.leases"), lease)?;
        vm.start_client(Client::Dhclient)?;
        vm.plug_in()?;
        // A NAK is broadcast: it can be seen at the VM.
        let ip = vm.wait_lease(PATIENCE)?;
        ensure!(!wire.dhcp(NAK).is_empty(), "no NAK: {}", vm.client_log());
        learned(&agent, ip)?;
        let state = agent.state(foreign_ip)?;
        ensure!(["none", "refused"].contains(&state.as_str()), "state {state}");
        vm.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(ip, PATIENCE)?;
        ensure!(wire_releases(&wire, foreign_ip) == 0, "a RELEASE of a refused address");
        Ok(())
    }

    fn a_dry_run_sends_nothing() {
        let (world, agent, wire, mut vm, ip) = one_vm(&["--dry-run"])?;
        vm.kill(KillKind::PortDeleted)?;
        agent.wait_event("would-release", ip, PATIENCE)?;
        no_release_within(&world, &wire, ip, Duration::from_secs(2))
    }

    fn a_lease_from_before_the_agent_is_left_alone() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 1)?;
        let (mut vm, ip) = living(&world, 1)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let wire = at_server(&world)?;
        vm.ping(SERVER_IP)?;
        vm.kill(KillKind::PortDeleted)?;
        agent.wait_port_event("port-lost", "vm1", PATIENCE)?;
        no_release_within(&world, &wire, ip, A_DEATH)
    }

    fn a_renewal_is_learned_too() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 1)?;
        let (mut vm, ip) = living(&world, 1)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        vm.renew()?;
        agent.wait("the renewed lease", PATIENCE, |event| {
            event.ip == Some(ip) && ["bound", "renewed"].contains(&event.name.as_str())
        })?;
        vm.ping(SERVER_IP)?;
        vm.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(ip, PATIENCE).with_context(|| agent.log())
    }

    fn list_says_what_the_server_says() {
        let (world, agent, _wire, vm, ip) = one_vm(&[])?;
        let binding = agent.binding(ip)?.context("no binding")?;
        ensure!(binding.is_of(vm.mac), "{binding:?}");
        ensure!(binding.state == "bound", "{binding:?}");
        ensure!(binding.port.as_deref() == Some("vm1"), "{binding:?}");
        ensure!(binding.server == Some(SERVER_IP), "{binding:?}");
        let server_mac = binding.server_mac.clone();
        ensure!(server_mac == Some(SERVER_MAC.to_string()), "{binding:?}");
        ensure!(agent.list()?.len() == world.server.leases()?.len());
        agent.explain(ip)?;
        Ok(())
    }

    fn a_second_agent_is_refused() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 1)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let said = refusal(&world.agent(Hook::Tc).quick().named("second"))?;
        ensure!(said.contains("another") || said.contains("already"), "it says: {said}");
        // The first one has taken no harm.
        let (mut vm, ip) = world.living(&agent, 1)?;
        vm.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(ip, PATIENCE)
    }

    fn a_bridge_that_is_not_there_yet_is_waited_for() {
        let node = Node::without_bridge()?;
        let agent = Setup::new(Place::Remote, Hook::Tc).quick().start()?;
        node.add_bridge()?;
        let server = Server::start(&node, ServerKind::Dnsmasq, Place::Remote, 1)?;
        let world = World { node, server };
        let (mut vm, ip) = world.living(&agent, 1)?;
        vm.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(ip, PATIENCE).with_context(|| agent.log())
    }

    fn an_unknown_key_is_named() {
        Node::new()?;
        let config = Path::new(DIR).join("agent.toml");
        fs::write(&config, "# a comment\nhold-dwon = \"2s\"\n")?;
        let path = config.display().to_string();
        let said = refusal(&Setup::new(Place::Local, Hook::Tc).args(&["--config", &path]))?;
        for part in [path.as_str(), "hold-dwon", "2"] {
            ensure!(said.contains(part), "no {part:?} in: {said}");
        }
        Ok(())
    }

    /// The client asks as soon as its link is up; nothing of its first exchange may be missed.
    fn a_new_port_is_watched_before_its_guest_asks() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 20)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let mut delays = Vec::new();
        for number in 1..=10 {
            let vm = world.boot(number)?;
            let up = agent.wait_port_event("port-up", &vm.name, PATIENCE)?;
            delays.push(up.at.saturating_duration_since(vm.linked_at));
            let ip = vm.wait_lease(PATIENCE)?;
            learned(&agent, ip)?;
            let binding = agent.binding(ip)?.context("no binding")?;
            ensure!(binding.is_of(vm.mac) && binding.state == "bound", "{binding:?}");
        }
        delays.sort();
        println!(
            "NOTE a new port is watched {:?} (median), {:?} (most) after its making",
            delays[delays.len() / 2],
            delays[delays.len() - 1],
        );
        Ok(())
    }

    fn the_hook_may_change_with_the_next_agent() {
        let (world, agent, _wire, mut vm, ip) = one_vm(&[])?;
        let mut agent = agent;
        for hook in [Hook::Clsact, Hook::Tc, Hook::Clsact] {
            agent.stop()?;
            agent = world.agent(hook).quick().start()?;
            ensure!(attached("vm1")? == both_ways(hook)?, "{hook:?}: {:?}", attached("vm1")?);
        }
        let (mut late, late_ip) = world.living(&agent, 2)?;
        for (vm, ip) in [(&mut vm, ip), (&mut late, late_ip)] {
            vm.kill(KillKind::PortDeleted)?;
            world.server.wait_gone(ip, PATIENCE).with_context(|| agent.log())?;
        }
        Ok(())
    }

    /// A port that goes takes its filters along: nobody took them away.
    fn deaths_one_after_another_do_not_put_each_other_off_on_clsact() {
        let world = World::new(ServerKind::Dnsmasq, Place::Local, 8)?;
        let more = ["--hold-down-silent", "10m"];
        let agent = world.agent(Hook::Clsact).quick().args(&more).start()?;
        let mut vms = Vec::new();
        for number in 1..=8 {
            let (vm, ip) = world.living(&agent, number)?;
            vms.push((vm, ip));
        }
        // Where everything is slow a new port may have been watched late.
        let unheard = agent.stat("core.ports_unheard")?;
        for (vm, _) in &mut vms {
            vm.kill(KillKind::PortDeleted)?;
        }
        for (_, ip) in &vms {
            world.server.wait_gone(*ip, PATIENCE).with_context(|| agent.log())?;
        }
        ensure!(agent.stat("core.ports_unheard")? == unheard, "{}", agent.log());
        Ok(())
    }

    /// Whoever else works on a clsact: what is not heard at one port may be the VM that is searched for.
    fn programs_that_are_missing_anywhere_are_put_back_before_a_release() {
        let world = World::new(ServerKind::Dnsmasq, Place::Local, 2)?;
        let agent = world.agent(Hook::Clsact).quick().start()?;
        let (mut dead, dead_ip) = world.living(&agent, 1)?;
        let (mut alive, alive_ip) = world.living(&agent, 2)?;
        alive.send_traffic(SERVER_IP, Duration::from_millis(100))?;
        world.node.netns.shell("tc qdisc del dev vm2 clsact")?;
        dead.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(dead_ip, PATIENCE).with_context(|| agent.log())?;
        ensure!(attached("vm2")? == both_ways(Hook::Clsact)?, "at vm2: {:?}", attached("vm2")?);
        ensure!(agent.stat("core.ports_unheard")? > 0, "{}", agent.log());
        ensure!(world.server.has(alive_ip)?, "the living lost its lease");
        Ok(())
    }

    /// What it said there was not heard; the bridge has learned it all the same.
    fn who_speaks_where_programs_are_missing_is_not_released() {
        let world = World::new(ServerKind::Dnsmasq, Place::Local, 2)?;
        let more = ["--hold-down-silent", "10m", "--misses", "1"];
        let agent = world.agent(Hook::Clsact).quick().args(&more).start()?;
        let (mut vm, ip) = world.living(&agent, 1)?;
        let (other, _) = world.living(&agent, 2)?;
        world.node.netns.shell("tc qdisc del dev vm2 clsact")?;
        // The same station, by another port; it says something there once, and answers nothing.
        let frame = forge::rarp(vm.mac);
        let nic = Nic::open(other.netns(), NIC)?;
        vm.kill(KillKind::PortDeleted)?;
        nic.send(&frame)?;
        agent.until("the gap is seen", PATIENCE, |agent| {
            Ok((agent.stat("core.ports_unheard")? > 0).then_some(()))
        })?;
        ensure!(world.server.has(ip)?, "released");
        let wire = at_server(&world)?;
        no_release_within(&world, &wire, ip, A_DEATH)
    }

    fn nothing_is_left_of_an_agent() {
        let (_world, agent, _wire, _vm, _ip) = one_vm(&["--detach-on-exit"])?;
        let links = || -> Result<String> { NetNs::current()?.shell("ls /sys/class/net") };
        ensure!(attached("vm1")? == both_ways(Hook::Tc)?, "at vm1: {:?}", attached("vm1")?);
        ensure!(links()?.contains("dreclaim"), "no private link: {}", links()?);

        agent.stop()?;
        for port in ["vm1", UPLINK] {
            ensure!(attached(port)? == Attached::default(), "still attached at {port}");
        }
        ensure!(!links()?.contains("dreclaim"), "still there: {}", links()?);
        // The kernel puts two iterators of its own into every new BPF file system.
        let pins = Path::new(BPFFS).join("dhcp-reclaim");
        ensure!(!pins.exists(), "still pinned: {:?}", fs::read_dir(pins)?.collect::<Vec<_>>());
        ensure!(!Path::new(DIR).join("control.sock").exists(), "the socket is still there");
        Ok(())
    }

    /// While its uplink is away, too, a VM may have moved beyond it.
    fn that_a_bridge_had_an_uplink_outlives_the_agent() {
        let more = ["--hold-down-uplink", "2h", "--hold-down", "1s", "--hold-down-silent", "2h"];
        let (world, agent, _wire, mut vm, ip) = one_vm(&more)?;
        world.node.netns.ip(&format!("link set {UPLINK} nomaster"))?;
        agent.wait_port_event("port-lost", UPLINK, PATIENCE)?;
        let mut agent = agent;
        for _ in 0..2 {
            agent.stop()?;
            agent = world.agent(Hook::Tc).quick().args(&more).start()?;
        }
        agent.ask_text(&["probe", &ip.to_string()])?;
        vm.kill(KillKind::PortDeleted)?;
        agent.wait_event("silent", ip, PATIENCE)?;
        let explained = agent.ask_text(&["explain", &ip.to_string()])?;
        let long = scaled(Duration::from_secs(7200)).as_secs_f64();
        ensure!(explained.contains(&format!("of {long:.3}s have passed")), "{explained}");
        agent.stop()
    }

    fn a_stopped_agent_releases_nothing() {
        let (world, agent, wire, mut vm, ip) = one_vm(&["--hold-down-uplink", "2s"])?;
        vm.kill(KillKind::PortDeleted)?;
        agent.wait_port_event("port-lost", "vm1", PATIENCE)?;
        agent.stop()?;
        no_release_within(&world, &wire, ip, A_DEATH)
    }
}

fn wire_releases(wire: &Capture, ip: Ipv4Addr) -> usize {
    let releases = wire.dhcp(RELEASE);
    releases.iter().filter(|dhcp| dhcp.ciaddr == ip).count()
}

/// What an agent says that must not start.
fn refusal(setup: &Setup) -> Result<String> {
    let mut process = setup.spawn()?;
    let status = process.wait_end(PATIENCE)?;
    ensure!(!status.success(), "it did not fail: {}", process.log());
    Ok(process.log())
}
