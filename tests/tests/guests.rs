//! Guests for real: kernels of their own under qemu, virtio-net on taps, udhcpc and Debian's dhclient
//! with its own script. However a hypervisor or the guest itself ends, restarts, pauses or moves it,
//! the server's store says what became of the lease.
//!
//! All of them run in `cargo xtask test`: a boot takes a few seconds, also emulated, and no test needs
//! more than two. On the machines of `cargo xtask vm` they say that they skip: there is no qemu in
//! there, and one emulated machine within another takes minutes to boot. Guests on an old host kernel
//! are therefore tested only where that kernel is the host's.
use std::{net::Ipv4Addr, path::Path, time::Duration};

use anyhow::{Result, ensure};
use dhcp_reclaim_tests::{
    boot::{Accel, Kernel, qemu},
    cluster::Cluster,
    fixture::{SERVER_IP, vm_mac},
    guest::{BOOTS, Guest, Image, KERNEL, Reboot, Spec, Tap},
    lab_test,
    node::Node,
    sandbox::{DIR, find, skip},
    scene::Scene,
    server::{Place, ServerKind},
    vm::{Client, Station as _},
    world::PATIENCE,
};
use nix::mount::{MsFlags, mount};

/// Longer than any reboot or pause here, as it has to be (docs/safety.md), and than any of these tests.
const SILENT: [&str; 2] = ["--hold-down-silent", "10m"];

fn image() -> Result<Image> {
    if find(qemu::PROGRAM).is_none() {
        return skip(format!("there is no {} here", qemu::PROGRAM));
    }
    if let Err(error) = Kernel::find(KERNEL, &Kernel::store()) {
        return skip(format!("no kernel for guests: {error:#}"));
    }
    Image::new()
}

fn boot(node: &Node, image: &Image, number: u8, client: Client, tap: Tap) -> Result<Guest> {
    let spec = Spec {
        name: format!("vm{number}"),
        mac: vm_mac(number),
        client,
        tap,
        accel: Accel::Tcg,
    };
    Guest::boot(node, image, spec)
}

/// A guest that the server and the agent know, in a world with more `args` for the agent.
fn alive(client: Client, tap: Tap, args: &[&str]) -> Result<(Scene, Guest, Ipv4Addr)> {
    let image = image()?;
    let scene = Scene::new(5, args)?;
    let guest = boot(&scene.world.node, &image, 1, client, tap)?;
    let ip = scene.lives(&guest)?;
    Ok((scene, guest, ip))
}

/// It lives on with its lease, nothing was tried, and its death is believed when it comes.
fn lives_and_dies(scene: &Scene, mut guest: Guest, ip: Ipv4Addr) -> Result<()> {
    guest.ping(SERVER_IP)?;
    scene.meanwhile(2)?;
    scene.unharmed(&guest, ip)?;
    guest.kill();
    freed_once(scene, &guest, ip)
}

fn freed_once(scene: &Scene, guest: &Guest, ip: Ipv4Addr) -> Result<()> {
    scene.freed(ip)?;
    scene.meanwhile(3)?;
    // The address may have been given to that one.
    let mut releases = scene.releases(ip);
    releases.retain(|release| release.chaddr == guest.mac());
    ensure!(releases.len() == 1, "not once: {releases:?}");
    Ok(())
}

fn reboots(client: Client, how: Reboot) -> Result<()> {
    let (scene, guest, ip) = alive(client, Tap::OfQemu, &SILENT)?;
    let again = guest.reboot(how)?;
    ensure!(again == ip, "{again} after the reboot, {ip} before");
    lives_and_dies(&scene, guest, ip)
}

lab_test! {
    within 2 * BOOTS + Duration::from_secs(120);

    fn killed_and_its_tap_goes() {
        let (scene, mut guest, ip) = alive(Client::Udhcpc, Tap::OfQemu, &[])?;
        guest.kill();
        scene.agent.wait_port_event("port-lost", "vm1", PATIENCE)?;
        ensure!(!Path::new("/sys/class/net/vm1").exists(), "the tap is still there");
        freed_once(&scene, &guest, ip)
    }

    fn killed_and_its_tap_stays_without_carrier() {
        let (scene, mut guest, ip) = alive(Client::Dhclient, Tap::Persistent, &[])?;
        guest.kill();
        scene.agent.wait_port_event("port-lost", "vm1", PATIENCE)?;
        freed_once(&scene, &guest, ip)?;
        ensure!(Path::new("/sys/class/net/vm1").exists(), "the tap is gone");
        Ok(())
    }

    fn powered_off_from_inside() {
        let (scene, mut guest, ip) = alive(Client::Dhclient, Tap::OfQemu, &[])?;
        guest.power_off()?;
        freed_once(&scene, &guest, ip)
    }

    /// One there that cannot run a machine is as good as none.
    fn kvm_that_does_not_work_is_not_used() {
        let image = image()?;
        let dir = Path::new(DIR);
        // What is done to try it is no reason for it not to work.
        Accel::Tcg.boots(&image.kernel, dir, BOOTS)?;
        let there = Path::new("/dev/kvm").exists();
        if there {
            mount(
                Some("/dev/null"), "/dev/kvm", None::<&str>, MsFlags::MS_BIND, None::<&str>,
            )?;
        }
        let found = Accel::wanted(true, &image.kernel, dir);
        ensure!(found == Accel::Tcg, "{found:?}");
        Ok(())
    }

    fn rebooted_from_inside() { reboots(Client::Udhcpc, Reboot::FromInside) }
    fn reset_by_the_hypervisor() { reboots(Client::Dhclient, Reboot::Reset) }

    /// For longer than a lost port is given, and for less than a silent one is: its port is there, so
    /// the longer one counts.
    fn paused_and_continued() {
        let (scene, guest, ip) = alive(Client::Udhcpc, Tap::OfQemu, &SILENT)?;
        guest.pause()?;
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        // This one's port is lost after the pause began: its whole hold-down is within the pause.
        scene.meanwhile(4)?;
        let (verdict, reason) = scene.agent.gate(ip, "hold-down")?;
        ensure!(verdict == "hold", "hold-down: {verdict} ({reason})");
        guest.go_on()?;
        scene.agent.until("a guest that is back", PATIENCE, |agent| {
            Ok((agent.state(ip)? == "bound").then_some(()))
        })?;
        lives_and_dies(&scene, guest, ip)
    }

    fn live_migrated() {
        let image = image()?;
        let cluster = Cluster::new(&SILENT)?;
        let scene = &cluster.scene;
        let mut guest = boot(&scene.world.node, &image, 1, Client::Udhcpc, Tap::OfQemu)?;
        let ip = scene.lives(&guest)?;
        guest.migrate(&cluster.node2)?;
        scene.agent.wait_event("moved", ip, PATIENCE)?;
        guest.ping(SERVER_IP)?;
        scene.meanwhile(2)?;
        scene.unharmed(&guest, ip)?;
        // Its next renewal is what tells node 2 of the lease.
        guest.renew()?;
        cluster.second.wait_event("bound", ip, PATIENCE)?;
        guest.kill();
        freed_once(scene, &guest, ip)?;
        cluster.second.wait_event("released", ip, PATIENCE).map(drop)
    }

    /// Both clients, with the server that libvirt would run for them.
    fn with_libvirts_dnsmasq() {
        let image = image()?;
        let scene = Scene::of(ServerKind::Dnsmasq, Place::Libvirt, 5, &SILENT)?;
        let node = &scene.world.node;
        let mut dies = boot(node, &image, 1, Client::Dhclient, Tap::OfQemu)?;
        let lives = boot(node, &image, 2, Client::Udhcpc, Tap::OfQemu)?;
        let dead_ip = scene.lives(&dies)?;
        let ip = scene.lives(&lives)?;
        dies.kill();
        scene.freed(dead_ip)?;
        scene.unharmed(&lives, ip)?;
        lives.ping(SERVER_IP)
    }
}
