//! The lab tested by itself: what the judges of all other tests say must be true without an agent.
use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    fixture::{BRIDGE, NIC, SERVER_IP, pool_ip, vm_mac},
    lab_test,
    sandbox::{MARK, foreign},
    server::{Place, ServerKind},
    vm::{Client, KillKind},
    watch,
    wire::{Capture, RELEASE, REQUEST},
    world::{PATIENCE, World},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A lease shows in the server's store, survives its neighbour's RELEASE, and ends by its own.
fn lease_comes_and_goes(kind: ServerKind, place: Place, client: Client) -> Result<()> {
    let world = World::new(kind, place, 2)?;
    let mut one = world.boot_client(1, client)?;
    let two = world.boot(2)?;
    let ip_one = one.wait_lease(PATIENCE)?;
    let ip_two = two.wait_lease(PATIENCE)?;
    ensure!(ip_one != ip_two, "both VMs got {ip_one}");
    world.server.wait_lease(ip_one, one.mac, PATIENCE)?;
    world.server.wait_lease(ip_two, two.mac, PATIENCE)?;
    one.ping(SERVER_IP)?;

    one.release()?;
    world.server.wait_gone(ip_one, PATIENCE)?;
    ensure!(world.server.has(ip_two)?, "the neighbour's lease went too");
    Ok(())
}

/// A VM that dies without a word leaves its lease: the pool is full for the next one.
fn lease_of_the_dead_stays(kind: ServerKind, place: Place) -> Result<()> {
    let world = World::new(kind, place, 1)?;
    let mut one = world.boot(1)?;
    let ip = one.wait_lease(PATIENCE)?;
    world.server.wait_lease(ip, one.mac, PATIENCE)?;
    one.kill(KillKind::PortDeleted)?;

    let two = world.boot(2)?;
    let got = two.wait_lease(Duration::from_secs(3));
    ensure!(got.is_err(), "a full pool gave {got:?}");
    ensure!(world.server.has(ip)?, "the dead VM's lease is gone");
    Ok(())
}

macro_rules! placements {
    ($($name:ident: $kind:ident $place:ident;)+) => {$(
        mod $name {
            use super::*;

            lab_test! {
                fn lease_comes_and_goes() {
                    super::lease_comes_and_goes(
                        ServerKind::$kind,
                        Place::$place,
                        Client::Udhcpc,
                    )
                }
                fn lease_of_the_dead_stays() {
                    super::lease_of_the_dead_stays(ServerKind::$kind, Place::$place)
                }
            }
        }
    )+};
}

placements! {
    dnsmasq_remote: Dnsmasq Remote;
    dnsmasq_local: Dnsmasq Local;
    dnsmasq_libvirt: Dnsmasq Libvirt;
    kea_remote: Kea Remote;
    kea_local: Kea Local;
    isc_remote: Isc Remote;
    isc_local: Isc Local;
}

lab_test! {
    fn dhclient_takes_and_gives_back() {
        lease_comes_and_goes(ServerKind::Dnsmasq, Place::Remote, Client::Dhclient)
    }

    fn dhcpcd_takes_and_gives_back() {
        lease_comes_and_goes(ServerKind::Dnsmasq, Place::Remote, Client::Dhcpcd)
    }

    fn kills_and_freezes_do_what_they_say() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 3)?;
        let mut frozen = world.boot(1)?;
        let mut silent = world.boot(2)?;
        let mut killed = world.boot(3)?;
        let ips = [&frozen, &silent, &killed].map(|vm| vm.wait_lease(PATIENCE));
        let [frozen_ip, silent_ip, killed_ip] = ips;
        let (frozen_ip, silent_ip, killed_ip) = (frozen_ip?, silent_ip?, killed_ip?);
        for vm in [&frozen, &silent, &killed] {
            vm.ping(SERVER_IP)?;
        }
        let answers = |ip| -> Result<bool> {
            let mut busybox = world.server.netns().command(foreign("busybox")?);
            let output = busybox
                .args(["arping", "-c", "1", "-w", "1", "-I", NIC, &format!("{ip}")])
                .output()?;
            Ok(output.status.success())
        };
        for ip in [frozen_ip, silent_ip, killed_ip] {
            ensure!(answers(ip)?, "{ip} does not answer while it lives");
        }

        frozen.freeze()?;
        silent.silence_arp()?;
        killed.kill(KillKind::PortKept)?;
        for ip in [frozen_ip, silent_ip, killed_ip] {
            ensure!(!answers(ip)?, "{ip} still answers");
        }
        let wire = Capture::start(world.server.netns(), NIC)?;
        silent.send_traffic(SERVER_IP, Duration::from_millis(50))?;
        wire.wait("traffic of a VM that does not answer", PATIENCE, |frame| {
            frame.from_mac() == Some(vm_mac(2)) && frame.arp().is_none()
        })?;
        ensure!(
            wire.count(|frame| frame.from_mac() == Some(vm_mac(1))) == 0,
            "a frozen VM sends",
        );

        frozen.thaw()?;
        ensure!(answers(frozen_ip)?, "does not answer after the thaw");
        frozen.ping(SERVER_IP)
    }

    fn a_capture_reads_dhcp() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 1)?;
        let wire = Capture::start(world.server.netns(), NIC)?;
        let mut vm = world.boot(1)?;
        let ip = vm.wait_lease(PATIENCE)?;
        ensure!(ip == pool_ip(0), "got {ip}");
        wire.wait("a REQUEST", PATIENCE, |frame| {
            frame.dhcp().is_some_and(|dhcp| dhcp.kind() == Some(REQUEST))
        })?;
        let requests = wire.dhcp(REQUEST);
        let request = requests.first().context("no REQUEST on the wire")?;
        ensure!(request.chaddr == vm.mac && request.option(50) == Some(&ip.octets()));
        ensure!(wire.dhcp(RELEASE).is_empty(), "a RELEASE too early");
        vm.release()?;
        wire.wait("the VM's RELEASE", PATIENCE, |frame| {
            frame.dhcp().is_some_and(|dhcp| {
                dhcp.kind() == Some(RELEASE) && dhcp.ciaddr == ip && dhcp.from_mac == vm.mac
            })
        })
        .map(drop)
    }

    /// Not a test: a world that stays until it is killed, for the test below.
    #[ignore = "lives until it is killed"]
    fn stays_up() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 1)?;
        let vm = world.boot(1)?;
        vm.wait_lease(PATIENCE)?;
        println!("UP");
        loop {
            std::thread::park();
        }
    }
}

/// Killing whoever runs the lab, with the one signal that nobody can handle, ends all of it.
#[test]
fn kill_9_leaves_nothing() {
    if !nix::unistd::Uid::effective().is_root() {
        println!("SKIP kill_9_leaves_nothing: needs root");
        return;
    }
    let links_before = links();
    let mut runner = Command::new(std::env::current_exe().unwrap())
        .args(["stays_up", "--exact", "--include-ignored", "--nocapture"])
        .args(["--test-threads=1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = runner.id();
    let mark = format!("{MARK}={pid}-stays_up");
    let output = BufReader::new(runner.stdout.take().unwrap());
    let up = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line.ends_with("UP"));
    assert!(up, "the lab did not come up");
    let alive = marked(&mark);
    assert!(alive.len() >= 3, "a test that could not fail: {alive:?}");

    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    runner.wait().unwrap();
    let empty = std::env::temp_dir().join(format!("dhcp-reclaim-lab-{pid}"));
    let gone = watch::until(&empty, PATIENCE, "the end of all of the lab", || {
        Ok(marked(&mark).is_empty().then_some(()))
    });
    std::fs::remove_dir(&empty).unwrap();
    gone.unwrap_or_else(|error| panic!("{error:#}: {:?}", marked(&mark)));
    assert_eq!(links_before, links(), "links on the host");
}

/// The processes whose environment has `mark`.
fn marked(mark: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        // Processes come and go meanwhile; one that cannot be read is none of ours.
        let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environ
            .split(|byte| *byte == 0)
            .any(|var| var == mark.as_bytes())
        {
            let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push(format!("{:?} {}", entry.file_name(), comm.trim()));
        }
    }
    found
}

fn links() -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir("/sys/class/net")
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name == BRIDGE || name.starts_with("vm") || name.starts_with("uplink"))
        .collect();
    names.sort();
    names
}
