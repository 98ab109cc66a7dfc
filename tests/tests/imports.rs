//! Leases that were there before the agent was: told by the servers' own files, and never worth more
//! than what is seen. The judge is the server's store.
use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook, binary},
    clock::wall,
    fixture::{BRIDGE, LEASE_SECONDS, Mac, NIC, SERVER_IP, SERVER_MAC, pool_ip, vm_mac},
    lab_test,
    sandbox::DIR,
    server::{Place, ServerKind},
    vm::{KillKind, Vm},
    wire::{Capture, DISCOVER, RELEASE, REQUEST},
    world::{PATIENCE, World},
};
use serde_json::{Value, json};

/// VMs that have their leases, and no agent yet.
fn living(world: &World, count: u8) -> Result<Vec<(Vm, Ipv4Addr)>> {
    let mut vms = Vec::new();
    for number in 1..=count {
        let vm = world.boot(number)?;
        let ip = vm.wait_lease(PATIENCE)?;
        world.server.wait_lease(ip, vm.mac, PATIENCE)?;
        vms.push((vm, ip));
    }
    Ok(vms)
}

/// The server's own file; of libvirt, what its helper would have written.
fn lease_file(world: &World) -> Result<PathBuf> {
    if world.server.place != Place::Libvirt {
        return Ok(world.server.store().to_owned());
    }
    let until = wall().as_secs() + u64::from(LEASE_SECONDS);
    let entry = |(ip, mac): (Ipv4Addr, Mac)| {
        json!({
            "ip-address": ip.to_string(),
            "mac-address": mac.to_string(),
            "hostname": "vm",
            // What udhcpc sends by itself.
            "client-id": format!("01:{mac}"),
            "expiry-time": until,
        })
    };
    let leases = world.server.leases()?;
    let entries: Vec<Value> = leases.iter().map(|l| entry((l.ip, l.mac))).collect();
    let path = Path::new(DIR).join(format!("{BRIDGE}.status"));
    fs::write(&path, serde_json::to_vec_pretty(&entries)?)?;
    Ok(path)
}

fn import(agent: &Agent, args: &[&str]) -> Result<Value> {
    let text = agent.ask_text(&[&["import", "--json"], args].concat())?;
    serde_json::from_str(&text).with_context(|| text)
}

fn imported_and_reclaimed(kind: ServerKind, place: Place) -> Result<()> {
    let world = World::new(kind, place, 6)?;
    let mut vms = living(&world, 3)?;
    let agent = world.agent(Hook::Tc).quick().start()?;
    ensure!(agent.list()?.is_empty(), "{:?}", agent.list()?);
    let file = lease_file(&world)?;
    let file = file.to_str().context("a path")?;
    // Of libvirt's file all is known.
    let mut args = vec![file];
    let (server, mac) = (SERVER_IP.to_string(), SERVER_MAC.to_string());
    if place != Place::Libvirt {
        args.extend(["--server", server.as_str()]);
    }
    if place == Place::Remote {
        args.extend(["--server-mac", mac.as_str()]);
    }
    let told = import(&agent, &args)?;
    ensure!(told["taken"] == 3, "{told}");
    for (vm, ip) in &vms {
        let bound = agent.wait_event("bound", *ip, PATIENCE)?;
        ensure!(bound.port.as_deref() == Some(vm.name.as_str()), "{bound:?}");
        let binding = agent.binding(*ip)?.context("no binding")?;
        ensure!(binding.rest["origin"] == "imported", "{binding:?}");
        ensure!(
            agent.gate(*ip, "confirmed")?.0 == "pass",
            "{:?}",
            agent.explain(*ip)?
        );
    }
    // One dies; the others keep theirs.
    let (mut dead, dead_ip) = vms.remove(0);
    dead.kill(KillKind::PortDeleted)?;
    let gone = world.server.wait_gone(dead_ip, PATIENCE);
    gone.with_context(|| format!("{:?}\n{}", agent.explain(dead_ip), agent.log()))?;
    for (vm, ip) in &vms {
        vm.ping(SERVER_IP)?;
        world.server.wait_lease(*ip, vm.mac, PATIENCE)?;
    }
    // What the wire says takes the place of what was told.
    let (vm, ip) = vms.first().context("no VM")?;
    vm.renew()?;
    agent.until("a binding of the wire's", PATIENCE, |agent| {
        let binding = agent.binding(*ip)?.context("no binding")?;
        Ok((binding.rest["origin"] == "wire").then_some(()))
    })?;
    let again = import(&agent, &args)?;
    ensure!(again["taken"] == 0, "{again}");
    agent.stop()
}

lab_test! {
    fn dnsmasqs_leases_are_imported_and_reclaimed() {
        imported_and_reclaimed(ServerKind::Dnsmasq, Place::Local)
    }

    fn a_remote_dnsmasqs_leases_are_imported_and_reclaimed() {
        imported_and_reclaimed(ServerKind::Dnsmasq, Place::Remote)
    }

    fn keas_leases_are_imported_and_reclaimed() {
        imported_and_reclaimed(ServerKind::Kea, Place::Local)
    }

    fn libvirts_leases_are_imported_and_reclaimed() {
        imported_and_reclaimed(ServerKind::Dnsmasq, Place::Libvirt)
    }

    /// It is asked by the MACs that the bridge has learned; the VMs say nothing of DHCP.
    fn a_server_that_is_asked_tells_of_leases_that_were_there() {
        let world = World::with_a_server_to_ask()?;
        let mut vms = living(&world, 3)?;
        for (vm, _) in &vms {
            vm.ping(SERVER_IP)?;
        }
        let (mut unseen, unseen_ip) = vms.pop().context("no VM")?;
        unseen.freeze()?;
        let wire = Capture::start(world.server.netns(), NIC)?;
        let server = SERVER_IP.to_string();
        let setup = world.agent(Hook::Tc).quick();
        let agent = setup.args(&["--ask-server", &server]).start()?;
        for (vm, ip) in &vms {
            let bound = agent.wait_event("bound", *ip, PATIENCE);
            let bound = bound.with_context(|| format!("{}{}", agent.log(), world.server.log()))?;
            ensure!(bound.port.as_deref() == Some(vm.name.as_str()), "{bound:?}");
            let binding = agent.binding(*ip)?.context("no binding")?;
            ensure!(binding.rest["origin"] == "imported", "{binding:?}");
            let explained = agent.explain(*ip)?;
            ensure!(agent.gate(*ip, "confirmed")?.0 == "pass", "{explained:?}");
        }
        agent.until("the third", PATIENCE, |agent| {
            Ok((agent.counter("agent.leases_told")? == 3).then_some(()))
        })?;
        let asked = [wire.dhcp(DISCOVER), wire.dhcp(REQUEST)].concat();
        ensure!(asked.is_empty(), "{asked:?}");
        // Whom nobody has seen alive is no death, however long the other one's takes.
        unseen.kill(KillKind::PortDeleted)?;
        let (mut dead, dead_ip) = vms.remove(0);
        dead.kill(KillKind::PortDeleted)?;
        let gone = world.server.wait_gone(dead_ip, PATIENCE);
        gone.with_context(|| format!("{:?}\n{}", agent.explain(dead_ip), agent.log()))?;
        let releases = wire.dhcp(RELEASE);
        ensure!(releases.iter().all(|release| release.ciaddr == dead_ip), "{releases:?}");
        let (vm, ip) = vms.first().context("no VM")?;
        vm.ping(SERVER_IP)?;
        for ip in [*ip, unseen_ip] {
            ensure!(world.server.has(ip)?, "its lease of {ip} is gone");
        }
        agent.stop()
    }

    fn a_server_that_was_silent_is_asked_again() {
        let world = World::with_a_server_to_ask()?;
        let vms = living(&world, 1)?;
        let (vm, ip) = vms.first().context("no VM")?;
        vm.ping(SERVER_IP)?;
        world.server.freeze()?;
        let server = SERVER_IP.to_string();
        let agent = world.agent(Hook::Tc).quick().args(&["--ask-server", &server]).start()?;
        agent.until("a question without an answer", PATIENCE, |agent| {
            Ok((agent.counter("agent.leases_unanswered")? > 0).then_some(()))
        })?;
        ensure!(agent.counter("agent.leases_told")? == 0, "{}", agent.log());
        world.server.thaw()?;
        let bound = agent.wait_event("bound", *ip, PATIENCE);
        let bound = bound.with_context(|| format!("{}{}", agent.log(), world.server.log()))?;
        ensure!(bound.port.as_deref() == Some(vm.name.as_str()), "{bound:?}");
        agent.stop()
    }

    fn what_was_imported_and_never_seen_is_never_released() {
        let world = World::new(ServerKind::Dnsmasq, Place::Local, 6)?;
        let mut vms = living(&world, 2)?;
        let wire = Capture::start(world.server.netns(), world.server.place.link())?;
        // The file that the agent reads at its start: two VMs that are here, one that is not, and
        // their addresses under other MACs in a second one.
        let until = wall().as_secs() + u64::from(LEASE_SECONDS);
        let lines = |leases: &[(Mac, Ipv4Addr)]| -> String {
            let line = |(mac, ip): &(Mac, Ipv4Addr)| format!("{until} {mac} {ip} * *\n");
            leases.iter().map(line).collect()
        };
        let ghost = (vm_mac(77), pool_ip(5));
        let ips: Vec<Ipv4Addr> = vms.iter().map(|(_, ip)| *ip).collect();
        let (first, stale) = (Path::new(DIR).join("first"), Path::new(DIR).join("stale"));
        fs::write(&first, lines(&[ghost]))?;
        // Each has the other's address: as in a file that is old.
        fs::write(&stale, lines(&[(vms[1].0.mac, ips[0]), (vms[0].0.mac, ips[1])]))?;
        let spec = |path: &Path| format!("{},server={SERVER_IP}", path.display());
        let setup = world.agent(Hook::Tc).quick();
        let (first, stale) = (spec(&first), spec(&stale));
        let agent = setup
            .args(&["--import", &first, "--import", &stale])
            .start()?;
        let hearsay = agent.list()?;
        ensure!(hearsay.len() == 3, "{hearsay:?}");
        for binding in &hearsay {
            ensure!(binding.state == "requested" && binding.rest["origin"] == "imported", "{binding:?}");
        }
        let searched = |agent: &Agent| agent.counter("core.import_searches");
        agent.until("searches", PATIENCE, |agent| Ok((searched(agent)? >= 3).then_some(())))?;
        let (verdict, reason) = agent.gate(ghost.1, "confirmed")?;
        ensure!(verdict == "hold" && reason.contains("never seen alive"), "{reason}");
        // Both die, and nothing leaves for as long as a death takes. One that the wire has shown
        // dies after them: when it is released, theirs would have been.
        let mut known = world.boot_heard(&agent, 3)?;
        let known_ip = known.wait_lease(PATIENCE)?;
        agent.wait_event("bound", known_ip, PATIENCE)?;
        for (vm, _) in &mut vms {
            vm.kill(KillKind::PortDeleted)?;
        }
        agent.until("the end of a hold-down", PATIENCE, |agent| {
            let lost = |(vm, _): &(Vm, Ipv4Addr)| {
                agent.events().iter().any(|event| {
                    event.name == "port-lost" && event.port.as_deref() == Some(vm.name.as_str())
                })
            };
            Ok(vms.iter().all(lost).then_some(()))
        })?;
        known.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(known_ip, PATIENCE)?;
        let releases = wire.dhcp(RELEASE);
        ensure!(releases.iter().all(|release| release.ciaddr == known_ip), "{releases:?}");
        for ip in ips {
            ensure!(world.server.has(ip)?, "its lease of {ip} is gone");
        }
        // Not after a restart either.
        agent.stop()?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        ensure!(agent.list()?.iter().filter(|b| b.rest["origin"] == "imported").count() == 3);
        agent.until("searches", PATIENCE, |agent| Ok((searched(agent)? >= 3).then_some(())))?;
        ensure!(wire.dhcp(RELEASE).len() == releases.len());
        agent.stop()
    }

    fn what_is_wrong_with_an_import_is_said_in_one_line() {
        let world = World::new(ServerKind::Dnsmasq, Place::Local, 2)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let bad = Path::new(DIR).join("bad.leases");
        fs::write(&bad, "1900000000 02:00 10.67.0.100 * *\n")?;
        let good = Path::new(DIR).join("good.leases");
        fs::write(&good, "1900000000 02:00:00:00:00:01 10.67.0.100 * *\n")?;
        let (bad, good) = (bad.display().to_string(), good.display().to_string());
        for (args, code, said) in [
            (vec![bad.as_str(), "--server", "10.67.0.1"], 1, "bad.leases:1: `02:00` is no Ethernet address"),
            (vec![good.as_str()], 2, "which server granted them is not said"),
            (vec![good.as_str(), "--server", "10.67.0.1", "--bridge", "br9"], 1, "bridge br9 is not followed"),
            (vec!["/nowhere", "--server", "10.67.0.1"], 1, "cannot read /nowhere"),
        ] {
            let mut command = Command::new(binary()?);
            let output = command.arg("import").args(&args).arg("--control").arg(agent.control()).output()?;
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.code() == Some(code) && text.contains(said), "{args:?}: {text}");
            ensure!(text.trim_end().lines().count() == 1, "{text}");
        }
        ensure!(agent.list()?.is_empty());
        // An agent that may not be there in time for a file starts without it.
        agent.stop()?;
        let agent = world.agent(Hook::Tc).quick().args(&["--import", "/nowhere,server=10.67.0.1"]).start()?;
        ensure!(agent.stat("agent.import_failures")? == 1, "{}", agent.log());
        ensure!(agent.log().contains("not imported"), "{}", agent.log());
        agent.stop()
    }
}
