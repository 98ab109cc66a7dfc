//! The whole DHCP life, led by real clients and servers: what of it makes, moves and ends a lease.
//!
//! That a server gives a lease up is also the proof that the RELEASE named the client as the client
//! had named itself.
use std::{net::Ipv4Addr, path::Path};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::Event,
    fixture::{Mac, NIC, SERVER_IP, SERVER_MAC, pool_ip, vm_mac},
    forge::{BROADCAST_MAC, Forged, Nic, tagged_arp},
    lab_test,
    node::Node,
    process::Process,
    sandbox::{DIR, find, foreign, skip},
    scene::Scene,
    server::{Place, Pool, Server, ServerKind},
    vm::{Client, ClientId, KillKind, Vm},
    wire::{ACK, DISCOVER, Dhcp, Frame, NAK, RELEASE, REQUEST},
    world::{PATIENCE, World},
};

const XID: u32 = 0x1dea_11fe;

/// A client with each kind of client-id takes a lease and dies; all in one world.
fn clients(kind: ServerKind, client: Client, ids: &[ClientId]) -> Result<()> {
    let scene = Scene::of(kind, Place::Remote, 10, &[])?;
    let mut vms = Vec::new();
    for (number, id) in (1..).zip(ids) {
        let mut vm = Vm::off(&scene.world.node, &format!("vm{number}"), vm_mac(number))?;
        vm.client_id = id.clone();
        scene.boot(&mut vm, client)?;
        vms.push(vm);
    }
    for vm in &mut vms {
        let what = format!("{client:?} with {:?}", vm.client_id);
        let ip = scene.lives(vm).with_context(|| what.clone())?;
        let sent = scene.wire.dhcp(REQUEST);
        let asked = sent.iter().rfind(|dhcp| dhcp.chaddr == vm.mac);
        let id = asked.context("no REQUEST")?.option(61).map(<[u8]>::to_vec);
        match &vm.client_id {
            ClientId::Default => {}
            ClientId::None => ensure!(id.is_none(), "{what} sent {id:?}"),
            ClientId::Given(given) => ensure!(id.as_ref() == Some(given), "{what} sent {id:?}"),
        }
        vm.kill(KillKind::PortDeleted)?;
        // One that was slow to ask may have the address of one that is dead already.
        let mac = vm.mac;
        let frame = scene.wire.wait("its RELEASE", PATIENCE, |frame| {
            let ours = |dhcp: &Dhcp| dhcp.kind() == Some(RELEASE) && dhcp.ciaddr == ip;
            frame
                .dhcp()
                .is_some_and(|dhcp| ours(&dhcp) && dhcp.chaddr == mac)
        });
        let release = frame
            .with_context(|| format!("{what}\n{}", scene.story()))?
            .dhcp()
            .context("not DHCP any more")?;
        ensure!(
            release.option(61).map(<[u8]>::to_vec) == id,
            "{what}: {release:?}"
        );
        scene.freed(ip).with_context(|| what)?;
    }
    Ok(())
}

fn ids(longest: usize) -> Vec<ClientId> {
    let given = |length: usize| ClientId::Given((0..length).map(|n| n as u8 ^ 0x5a).collect());
    let mut ids = vec![ClientId::Default, ClientId::None, given(7)];
    if longest > 7 {
        ids.push(given(longest));
    }
    ids
}

/// Option 61 is at most 255 bytes. dnsmasq and dhcpd keep that many, Kea at most 128 (it drops what
/// has more); dhcpcd sends at most 48.
macro_rules! clients {
    ($($name:ident: $client:ident $kind:ident $ids:expr;)+) => {
        lab_test! {$(
            fn $name() { clients(ServerKind::$kind, Client::$client, &$ids) }
        )+}
    };
}

clients! {
    udhcpc_and_dnsmasq: Udhcpc Dnsmasq ids(200);
    udhcpc_and_kea: Udhcpc Kea ids(128);
    udhcpc_and_isc: Udhcpc Isc ids(200);
    dhclient_and_dnsmasq: Dhclient Dnsmasq ids(200);
    dhclient_and_kea: Dhclient Kea ids(128);
    dhclient_and_isc: Dhclient Isc ids(200);
    dhcpcd_and_dnsmasq: Dhcpcd Dnsmasq ids(48);
    dhcpcd_and_kea: Dhcpcd Kea ids(48);
    dhcpcd_and_isc: Dhcpcd Isc ids(48);
}

fn says(event: &Event, ip: Ipv4Addr, what: &str) -> bool {
    event.ip == Some(ip)
        && event.json["reason"]
            .as_str()
            .is_some_and(|r| r.starts_with(what))
}

/// When the agent thinks that the lease ends.
fn expires(scene: &Scene, ip: Ipv4Addr) -> Result<String> {
    let binding = scene.agent.binding(ip)?.context("no binding")?;
    let end = binding.rest["lease_expires_at"].as_str().map(str::to_owned);
    end.with_context(|| format!("{binding:?}"))
}

/// A VM by hand has asked and was answered; `tags` around everything.
struct ByHand {
    vm: Vm,
    nic: Nic,
}

impl ByHand {
    fn new(scene: &Scene, number: u8) -> Result<Self> {
        let name = format!("vm{number}");
        let mut vm = Vm::off(&scene.world.node, &name, vm_mac(number))?;
        vm.plug_in()?;
        scene.agent.wait_port_event("port-up", &name, PATIENCE)?;
        vm.wait_forwarding(PATIENCE)?;
        let nic = scene.nic(&vm)?;
        Ok(Self { vm, nic })
    }
}

fn ack(mac: Mac, ip: Ipv4Addr, id: Ipv4Addr) -> Forged {
    let mut ack = Forged::server(ACK, (SERVER_MAC, SERVER_IP), mac, XID, ip);
    ack.options = vec![53, 1, ACK];
    ack.option(54, &id.octets())
        .option(51, &3600_u32.to_be_bytes())
}

fn renewing(mac: Mac, ip: Ipv4Addr) -> Forged {
    Forged::client(REQUEST, mac, XID)
        .option(61, &[&[1], &mac.0[..]].concat())
        .with(|f| (f.ciaddr, f.from_ip) = (ip, ip))
}

lab_test! {
    fn renewing_moves_the_leases_end() {
        let scene = Scene::new(5, &[])?;
        let (mut vm, ip) = scene.living(1)?;
        let before = expires(&scene, ip)?;
        vm.renew()?;
        scene.agent.wait("a renewal", PATIENCE, |event| {
            event.name == "renewed" && says(event, ip, "RENEWING")
        })?;
        let after = expires(&scene, ip)?;
        ensure!(after > before, "{before}, then {after}");
        scene.dies(&mut vm, ip)
    }

    fn rebinding_moves_the_leases_end() {
        let scene = Scene::new(5, &[])?;
        let (mut vm, ip) = scene.living(1)?;
        let before = expires(&scene, ip)?;
        scene.nic(&vm)?.send(&renewing(vm.mac, ip).frame())?;
        scene.agent.wait("a rebinding", PATIENCE, |event| {
            event.name == "renewed" && says(event, ip, "REBINDING")
        })?;
        let after = expires(&scene, ip)?;
        ensure!(after > before, "{before}, then {after}");
        scene.dies(&mut vm, ip)
    }

    /// dhclient remembers its lease over a reboot, and asks for it at once.
    fn init_reboot() {
        let scene = Scene::new(5, &[])?;
        let mut vm = scene.world.boot_client(1, Client::Dhclient)?;
        let ip = scene.lives(&vm)?;
        vm.kill(KillKind::PortKept)?;
        vm.restart_client(Client::Dhclient)?;
        scene.agent.wait("an INIT-REBOOT", PATIENCE, |event| {
            event.name == "renewed" && says(event, ip, "INIT-REBOOT")
        })?;
        scene.unharmed(&vm, ip)?;
        scene.dies(&mut vm, ip)
    }

    fn rapid_commit() {
        let world = World::with_dnsmasq(&["--dhcp-rapid-commit"], 5)?;
        let scene = Scene::in_world(world, &[])?;
        let mut hand = ByHand::new(&scene, 1)?;
        let discover = Forged::client(DISCOVER, hand.vm.mac, XID).option(80, &[]);
        hand.nic.send(&discover.frame())?;
        let bound = scene.agent.wait("a lease without a REQUEST", PATIENCE, |event| {
            event.name == "bound" && event.json["reason"].as_str().is_some_and(|r| r.starts_with("rapid commit"))
        })?;
        let ip = bound.ip.context("no address")?;
        scene.world.server.wait_lease(ip, hand.vm.mac, PATIENCE)?;
        ensure!(scene.wire.dhcp(REQUEST).is_empty(), "it was asked");
        hand.vm.kill(KillKind::PortDeleted)?;
        scene.freed(ip)
    }

    fn an_infinite_lease_is_given_back() {
        let world = World::with_dnsmasq(&[&format!("--dhcp-range={},{},infinite", pool_ip(20), pool_ip(25))], 0)?;
        let scene = Scene::in_world(world, &[])?;
        let mut vm = scene.world.boot_heard(&scene.agent, 1)?;
        let ip = vm.wait_lease(PATIENCE)?;
        let bound = scene.agent.wait_event("bound", ip, PATIENCE)?;
        ensure!(says(&bound, ip, "SELECTING") && bound.json["reason"].as_str().is_some_and(|r| r.ends_with("infinite")), "{bound:?}");
        ensure!(scene.world.server.has(ip)?, "the judge does not know infinite leases");
        vm.ping(SERVER_IP)?;
        scene.dies(&mut vm, ip)
    }

    /// The first server is gone, and another one on its network has the lease by REBINDING.
    fn a_changed_server_is_the_one_that_is_told() {
        let mut scene = Scene::new(5, &[])?;
        let (mut vm, ip) = scene.living(1)?;
        let second = Ipv4Addr::new(10, 67, 0, 2);
        // Authoritative: it grants what it knows nothing of.
        scene.world.server.succeed(second, Pool::small(5), &["--dhcp-authoritative"])?;
        scene.nic(&vm)?.send(&renewing(vm.mac, ip).frame())?;
        scene.agent.wait("the second server's ACK", PATIENCE, |event| {
            event.name == "renewed" && event.json["reason"].as_str().is_some_and(|r| r.contains("10.67.0.2"))
        })?;
        scene.world.server.wait_lease(ip, vm.mac, PATIENCE)?;
        vm.kill(KillKind::PortDeleted)?;
        scene.freed(ip)?;
        let release = scene.wait_release(ip)?;
        ensure!(release.to_ip == second && release.option(54) == Some(&second.octets()), "{release:?}");
        Ok(())
    }

    /// Its first address stays the server's to lose; the one that it has now is what dies with it.
    fn a_changed_address() {
        let scene = Scene::new(5, &[])?;
        let mut vm = scene.world.boot_heard(&scene.agent, 1)?;
        let first = scene.lives(&vm)?;
        vm.client_id = ClientId::Given(b"\0another now".to_vec());
        vm.restart_client(Client::Udhcpc)?;
        let bound = scene.agent.wait("another address", PATIENCE, |event| {
            event.name == "bound" && event.ip != Some(first)
        })?;
        let second = bound.ip.context("no address")?;
        scene.agent.until("its use", PATIENCE, |_| {
            Ok((vm.lease() == Some(second)).then_some(()))
        })?;
        vm.ping(SERVER_IP)?;
        vm.kill(KillKind::PortDeleted)?;
        scene.freed(second)?;
        // Both were leased, and none of them is used by anybody.
        scene.freed(first)
    }

    /// Its server was set up anew, with another pool: what the VM has is none of its addresses.
    fn a_nak_ends_the_binding() {
        let mut scene = Scene::new(5, &[])?;
        let (mut vm, ip) = scene.living(1)?;
        let pool = Pool {
            first: pool_ip(50),
            last: pool_ip(55),
            ..Pool::small(5)
        };
        scene.world.server.succeed(SERVER_IP, pool, &["--dhcp-authoritative"])?;
        scene.nic(&vm)?.send(&renewing(vm.mac, ip).frame())?;
        let nak = scene.wire.wait("the server's NAK", PATIENCE, |frame| {
            frame.dhcp().is_some_and(|dhcp| dhcp.xid == XID && dhcp.kind() == Some(NAK))
        })?;
        ensure!(nak.from_mac() == Some(SERVER_MAC));
        scene.agent.wait_event("refused", ip, PATIENCE)?;
        vm.kill(KillKind::PortDeleted)?;
        let (mut other, other_ip) = scene.living(2)?;
        scene.dies(&mut other, other_ip)?;
        ensure!(scene.releases(ip).is_empty(), "a RELEASE of what was refused");
        Ok(())
    }

    /// The guest tags its frames, and so does its server: the kernel here has no VLAN links.
    fn a_tagged_guest_is_released_with_its_tag() {
        let tag = vec![(0x8100, 100)];
        let scene = Scene::new(5, &[])?;
        let mut hand = ByHand::new(&scene, 1)?;
        let mac = hand.vm.mac;
        let ip = pool_ip(60);
        let server = Nic::open(scene.world.server.netns(), NIC)?;
        let asks = Forged::client(REQUEST, mac, XID)
            .option(50, &ip.octets())
            .option(54, &SERVER_IP.octets())
            .with(|f| f.tags.clone_from(&tag));
        hand.nic.send(&asks.frame())?;
        scene.agent.wait_event("requested", ip, PATIENCE)?;
        server.send(&ack(mac, ip, SERVER_IP).with(|f| f.tags.clone_from(&tag)).frame())?;
        scene.agent.wait_event("bound", ip, PATIENCE)?;
        let binding = scene.agent.binding(ip)?.context("no binding")?;
        ensure!(binding.rest["vlan"] == 100, "{binding:?}");
        hand.nic.send(&tagged_arp(&tag, 1, (mac, ip), (BROADCAST_MAC, SERVER_IP)))?;
        hand.vm.kill(KillKind::PortDeleted)?;
        // The uplink must be heard: the server's own kernel does not answer on a VLAN.
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        scene.agent.until("its RELEASE", PATIENCE, |agent| {
            server.send(&tagged_arp(&tag, 1, (SERVER_MAC, SERVER_IP), (BROADCAST_MAC, SERVER_IP)))?;
            Ok((agent.state(ip)? == "released").then_some(()))
        })?;
        let raw = scene.wire.wait("a tagged RELEASE", PATIENCE, |frame| {
            tagged_release(frame).is_some_and(|(vlan, ciaddr)| vlan == 100 && ciaddr == ip)
        })?;
        ensure!(raw.from_mac() == Some(mac));
        Ok(())
    }

    /// Its client-id is made of the machine-id: the one that clones of an image share.
    fn systemd_networkd() {
        if !Path::new("/usr/lib/systemd/systemd-networkd").exists() {
            return skip("systemd-networkd is not installed");
        }
        clients(ServerKind::Dnsmasq, Client::Networkd, &[ClientId::Default])
    }

    /// The ACKs come from the relay's MAC, and the RELEASE is routed to the server past it.
    fn a_server_behind_a_relay() { behind_relay(&[], FAR) }

    /// As with RFC 5107, the server calls itself by the relay's address: all goes through the relay.
    fn a_server_that_is_called_like_its_relay() { behind_relay(&["--dhcp-proxy"], NEAR) }
}

/// Of the server, and of its relay on the VMs' network.
const FAR: Ipv4Addr = Ipv4Addr::new(10, 68, 0, 1);
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 67, 0, 3);

/// The server is beyond a router that relays, and that says nothing by itself. It answers ARP for
/// itself and not for what is behind it.
fn behind_relay(args: &[&str], server_id: Ipv4Addr) -> Result<()> {
    if find("dhcrelay").is_none() {
        return skip("dhcrelay is not installed");
    }
    let relay_mac = Mac([2, 0xdc, 0, 0, 7, 1]);
    let node = Node::new()?;
    let relay = Node::elsewhere(relay_mac)?;
    node.cable_to(&relay, "vmside", Mac([2, 0xdc, 0, 0, 7, 2]))?;
    let kind = ServerKind::Dnsmasq;
    let server = Server::start_with(&relay, kind, Place::Remote, Pool::small(5), args)?;
    server.netns().ip(&format!(
        "addr flush dev {NIC}
         addr add {FAR}/24 dev {NIC}
         route add 10.67.0.0/24 via 10.68.0.2"
    ))?;
    relay.netns.ip(&format!(
        "link set vmside nomaster
         addr add {NEAR}/24 dev vmside
         addr add 10.68.0.2/24 dev br0"
    ))?;
    relay.netns.shell("echo 1 >/proc/sys/net/ipv4/ip_forward")?;
    let mut command = relay.netns.command(foreign("dhcrelay")?);
    command.args(["-4", "-d", "--no-pid", "-a", "-id", "vmside", "-iu", "br0"]);
    command.arg(FAR.to_string());
    let mut process = Process::spawn(Path::new(DIR), "relay", &mut command)?;
    process.wait_log(&["Sending on   Socket/fallback"], PATIENCE)?;

    let scene = Scene::in_world(World { node, server }, &[])?;
    let mut vm = scene.world.boot_heard(&scene.agent, 1)?;
    let ip = vm
        .wait_lease(PATIENCE)
        .with_context(|| format!("{}\n{}", process.log(), scene.world.server.log()))?;
    scene.agent.wait_event("bound", ip, PATIENCE)?;
    let binding = scene.agent.binding(ip)?.context("no binding")?;
    ensure!(binding.server == Some(server_id), "{binding:?}");
    vm.ping(NEAR)?;
    vm.kill(KillKind::PortDeleted)?;
    scene.freed(ip)?;
    let release = scene.wait_release(ip)?;
    ensure!(
        release.option(54) == Some(&server_id.octets()),
        "{release:?}"
    );
    ensure!(
        release.ciaddr == ip && release.chaddr == vm.mac,
        "{release:?}"
    );
    Ok(())
}

/// The tag and `ciaddr` of a RELEASE that has one, wherever the kernel left it.
fn tagged_release(frame: &Frame) -> Option<(u16, Ipv4Addr)> {
    let (vlan, bytes) = match frame.vlan {
        Some(vlan) => (vlan, frame.bytes.clone()),
        None => {
            let tci = frame.bytes.get(12..16).filter(|b| b[..2] == [0x81, 0])?;
            let vlan = u16::from_be_bytes([tci[2], tci[3]]) & 0xfff;
            (vlan, [&frame.bytes[..12], &frame.bytes[16..]].concat())
        }
    };
    let dhcp = Frame::of(bytes).dhcp()?;
    (dhcp.kind() == Some(RELEASE)).then_some((vlan, dhcp.ciaddr))
}
