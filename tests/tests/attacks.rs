//! What hostile guests may try (FACTS.md section 7), each in a world of its own.
//!
//! The judge is the server's own store and the wire. Each test ends with deaths that *are*
//! reclaimed, so that none passes because nothing works.
use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    fixture::{BRIDGE_MAC, Mac, SERVER_IP, SERVER_MAC, pool_ip, vm_mac},
    forge::{BROADCAST_MAC, Forged, Nic, arp},
    lab_test,
    scene::{Scene, is_release},
    server::{Place, ServerKind},
    vm::{Client, ClientId, KillKind, Vm},
    wire::{ACK, Capture, DECLINE, DISCOVER, INFORM, NAK, OFFER, RELEASE, REQUEST},
    world::PATIENCE,
};

const XID: u32 = 0x0bad_cafe;

/// An attacker, its network card in our hand, and its victim.
struct Attack {
    attacker: Vm,
    attacker_ip: Ipv4Addr,
    nic: Nic,
    victim: Vm,
    victim_ip: Ipv4Addr,
    scene: Scene,
}

impl Attack {
    fn new(args: &[&str]) -> Result<Self> {
        Self::on(Scene::new(20, args)?)
    }

    fn on(scene: Scene) -> Result<Self> {
        let (victim, victim_ip) = scene.living(1)?;
        let (attacker, attacker_ip) = scene.living(2)?;
        let nic = scene.nic(&attacker)?;
        Ok(Self {
            attacker,
            attacker_ip,
            nic,
            victim,
            victim_ip,
            scene,
        })
    }

    /// The attacker dies and is reclaimed, while its victim stays; then the victim dies too.
    fn ends_well(&mut self) -> Result<()> {
        let scene = &self.scene;
        scene.healthy()?;
        scene.unharmed(&self.victim, self.victim_ip)?;
        scene.speaks_and_dies(&mut self.attacker, self.attacker_ip)?;
        scene.unharmed(&self.victim, self.victim_ip)?;
        self.victim_dies_well()
    }

    fn victim_dies_well(&mut self) -> Result<()> {
        let scene = &self.scene;
        scene.healthy()?;
        scene.speaks_and_dies(&mut self.victim, self.victim_ip)?;
        let releases = scene.releases(self.victim_ip);
        ensure!(releases.len() == 1, "not once: {releases:?}");
        Ok(())
    }

    /// A claim is heard, and told about.
    fn conflict(&self) -> Result<()> {
        let event = self
            .scene
            .agent
            .wait_event("conflict", self.victim_ip, PATIENCE)?;
        let state = self.scene.agent.state(self.victim_ip)?;
        ensure!(
            ["bound", "silent"].contains(&state.as_str()),
            "{state} after {event:?}"
        );
        Ok(())
    }
}

fn selecting(mac: Mac, ip: Ipv4Addr) -> Forged {
    Forged::client(REQUEST, mac, XID)
        .option(50, &ip.octets())
        .option(54, &SERVER_IP.octets())
}

/// udhcpc's: hardware type and address.
fn client_id(mac: Mac) -> Vec<u8> {
    [&[1], &mac.0[..]].concat()
}

lab_test! {
    fn a_request_for_a_neighbours_address() {
        let mut attack = Attack::new(&[])?;
        attack.nic.send(&selecting(attack.attacker.mac, attack.victim_ip).frame())?;
        attack.conflict()?;
        attack.ends_well()
    }

    fn a_request_with_a_neighbours_chaddr() {
        let mut attack = Attack::new(&[])?;
        let (victim, me) = (attack.victim.mac, attack.attacker.mac);
        let forged = selecting(victim, attack.victim_ip).with(|f| f.from_mac = me);
        attack.nic.send(&forged.frame())?;
        attack.conflict()?;
        ensure!(attack.scene.agent.counter("core.impostors")? > 0);
        attack.ends_well()
    }

    /// The bridge learns the victim's MAC at the attacker's port, and the server's ACK goes there.
    fn a_request_with_a_neighbours_chaddr_and_source() {
        let mut attack = Attack::new(&["--hold-down-silent", "1m"])?;
        // A victim that would not answer, so that only the rule protects it.
        attack.victim.silence_arp()?;
        let forged = selecting(attack.victim.mac, attack.victim_ip)
            .option(61, &client_id(attack.victim.mac));
        let at_attacker = Capture::start(attack.attacker.netns(), "eth0")?;
        attack.nic.send(&forged.frame())?;
        at_attacker.wait("the server's ACK", PATIENCE, |frame| {
            frame.dhcp().is_some_and(|dhcp| dhcp.kind() == Some(ACK) && dhcp.xid == XID)
        })?;
        attack.conflict()?;
        // The attacker dies at once, with its victim silent.
        let scene = &attack.scene;
        scene.dies(&mut attack.attacker, attack.attacker_ip)?;
        scene.no_release_within(attack.victim_ip, Duration::from_secs(2))?;
        scene.unharmed(&attack.victim, attack.victim_ip)?;
        let binding = scene.agent.binding(attack.victim_ip)?.context("no binding")?;
        ensure!(binding.port.as_deref() == Some("vm1"), "{binding:?}");
        // The server leased it at the attacker's port; what settles that is an ACK at its own.
        attack.victim.ping(SERVER_IP)?;
        attack.victim.renew()?;
        attack.victim_dies_well()
    }

    fn a_release_for_a_neighbour() {
        let mut attack = Attack::new(&[])?;
        let (victim, me) = (attack.victim.mac, attack.attacker.mac);
        let ip = attack.victim_ip;
        // The server refuses one with another's chaddr; this shows that it was no more than asked.
        for (xid, chaddr, from_mac) in [(XID, me, me), (XID + 1, victim, me)] {
            let forged = Forged::client(RELEASE, chaddr, xid)
                .option(54, &Ipv4Addr::new(10, 67, 0, 77).octets())
                .with(|f| {
                    f.from_mac = from_mac;
                    f.ciaddr = ip;
                    f.from_ip = ip;
                });
            attack.nic.send(&forged.frame())?;
            attack.scene.wire.wait("the forged RELEASE", PATIENCE, |frame| {
                frame.dhcp().is_some_and(|dhcp| dhcp.xid == xid)
            })?;
        }
        attack.conflict()?;
        let scene = &attack.scene;
        scene.healthy()?;
        ensure!(scene.world.server.has(ip)?, "the server believed it");
        attack.victim.ping(SERVER_IP)?;
        scene.speaks_and_dies(&mut attack.attacker, attack.attacker_ip)?;
        ensure!(scene.releases(ip).len() == 2, "{:?}", scene.releases(ip));
        scene.speaks_and_dies(&mut attack.victim, ip)?;
        ensure!(scene.releases(ip).len() == 3, "{:?}", scene.releases(ip));
        Ok(())
    }

    /// With everything right, so that the server believes it: nothing is left for us to repeat.
    fn a_perfect_release_for_a_neighbour_is_not_repeated() {
        let mut attack = Attack::new(&[])?;
        let ip = attack.victim_ip;
        let forged = Forged::client(RELEASE, attack.victim.mac, XID)
            .option(54, &SERVER_IP.octets())
            .option(61, &client_id(attack.victim.mac))
            .with(|f| {
                f.ciaddr = ip;
                f.from_ip = ip;
            });
        attack.nic.send(&forged.frame())?;
        attack.scene.world.server.wait_gone(ip, PATIENCE)?;
        attack.conflict()?;
        attack.scene.speaks_and_dies(&mut attack.attacker, attack.attacker_ip)?;
        ensure!(attack.scene.releases(ip).len() == 1, "{:?}", attack.scene.releases(ip));
        attack.scene.healthy()
    }

    fn a_decline_for_a_neighbour() {
        let mut attack = Attack::new(&[])?;
        let (victim, me) = (attack.victim.mac, attack.attacker.mac);
        for (chaddr, from_mac) in [(me, me), (victim, me)] {
            let forged = Forged::client(DECLINE, chaddr, XID)
                .option(50, &attack.victim_ip.octets())
                // Another server's: ours would believe a chaddr.
                .option(54, &Ipv4Addr::new(10, 67, 0, 77).octets())
                .with(|f| f.from_mac = from_mac);
            attack.nic.send(&forged.frame())?;
        }
        attack.scene.wait_counter("core.impostors", 1)?;
        attack.ends_well()
    }

    fn a_vm_that_plays_the_server() {
        let mut attack = Attack::new(&[])?;
        let me = (attack.attacker.mac, attack.attacker_ip);
        let third = pool_ip(15);
        for kind in [OFFER, ACK, NAK] {
            let forged = Forged::server(kind, me, attack.victim.mac, XID, third);
            attack.nic.send(&forged.frame())?;
        }
        let rogue = attack.scene.agent.wait_port_event("rogue-server", "vm2", PATIENCE)?;
        ensure!(rogue.json["mac"] == attack.attacker.mac.to_string(), "{rogue:?}");
        attack.scene.wait_counter("kernel.rogue_server", 3)?;
        ensure!(attack.scene.agent.state(third)? == "none");
        ensure!(attack.scene.agent.state(attack.victim_ip)? == "bound");
        attack.ends_well()
    }

    /// In the server's own name, with its MAC and address.
    fn a_vm_that_plays_the_real_server() {
        let mut attack = Attack::new(&[])?;
        let forged = Forged::server(NAK, (SERVER_MAC, SERVER_IP), attack.victim.mac, XID, Ipv4Addr::UNSPECIFIED);
        attack.nic.send(&forged.frame())?;
        attack.scene.agent.wait_port_event("rogue-server", "vm2", PATIENCE)?;
        // The real one is heard again: the bridge must not send to the attacker what is for it.
        let back = Nic::open(attack.scene.world.server.netns(), "eth0")?;
        back.send(&arp(1, (SERVER_MAC, SERVER_IP), (BROADCAST_MAC, SERVER_IP)))?;
        attack.ends_well()
    }

    fn an_ack_by_a_vm_to_a_real_request() {
        third_party(Evidence::Loud)
    }

    /// The same after the attacker has used up its records: what it sends is no longer heard at its
    /// own port, but still arrives at the victim's.
    fn an_ack_by_a_vm_that_has_used_up_its_records() {
        third_party(Evidence::Spent)
    }

    /// One image, two VMs: each server gives both the same address, or each its own.
    fn a_cloned_client_id_at_dnsmasq() { cloned(ServerKind::Dnsmasq) }
    fn a_cloned_client_id_at_kea() { cloned(ServerKind::Kea) }
    fn a_cloned_client_id_at_isc() { cloned(ServerKind::Isc) }

    fn starvation_by_random_macs() {
        let mut attack = Attack::new(&[])?;
        let before = attack.scene.agent.rss()?;
        let mut sent = 0_u32;
        let mut starve = |nic: &Nic, count: u32| -> Result<()> {
            for n in sent..sent + count {
                let [_, a, b, c] = n.to_be_bytes();
                let mac = Mac([0x06, 0x66, 0, a, b, c]);
                // Beyond the pool: the server refuses, so that the neighbours' addresses are left.
                let ip = Ipv4Addr::new(10, 67, 0, 130 + (n % 100) as u8);
                let forged = match n % 2 {
                    0 => Forged::client(DISCOVER, mac, n),
                    _ => Forged { xid: n, ..selecting(mac, ip) },
                };
                nic.send(&forged.frame())?;
            }
            sent += count;
            Ok(())
        };
        starve(&attack.nic, 3000)?;
        let neighbour = attack.scene.world.boot_heard(&attack.scene.agent, 3)?;
        starve(&attack.nic, 3000)?;
        let ip = attack.scene.lives(&neighbour)?;
        let mut neighbour = neighbour;
        attack.scene.wait_counter("kernel.rate_limited", 1000)?;
        attack.scene.agent.wait_port_event("records-lost", "vm2", PATIENCE)?;
        let bindings = attack.scene.agent.list()?.len();
        ensure!(bindings < 300, "{bindings} bindings");
        let grown = attack.scene.agent.rss()?.saturating_sub(before);
        ensure!(grown < 16 << 20, "the agent grew by {} KiB", grown >> 10);
        attack.scene.dies(&mut neighbour, ip)?;
        attack.ends_well()
    }

    /// Each port that asks for more than it may have is refused, not its neighbours.
    fn more_bindings_than_a_port_may_have() {
        let mut attack = Attack::new(&["--bindings-per-port", "4", "--record-rate", "1000", "--record-burst", "1000"])?;
        // Its NAK would end a binding and make room for another: how many are refused would hang on
        // how fast it answers.
        attack.scene.world.server.freeze()?;
        for n in 0..40 {
            let mac = Mac([0x06, 0x66, 0, 0, 0, n]);
            let ip = Ipv4Addr::new(10, 67, 0, 150 + n);
            attack.nic.send(&Forged { xid: n.into(), ..selecting(mac, ip) }.frame())?;
        }
        // One of its four is its own lease.
        attack.scene.wait_counter("core.bindings_refused", 37)?;
        let listed = attack.scene.agent.list()?;
        let mine = listed.iter().filter(|b| {
            b.port.as_deref() == Some("vm2") && ["requested", "bound"].contains(&b.state.as_str())
        }).count();
        ensure!(mine == 4, "{mine} bindings at the attacker's port: {listed:?}");
        attack.scene.world.server.thaw()?;
        attack.ends_well()
    }

    /// A dead neighbour that seems to live: its address is not reclaimed, and no other is instead.
    fn arp_for_the_dead() {
        let mut attack = Attack::new(&[])?;
        let (dead, ip) = (attack.victim.mac, attack.victim_ip);
        let answer = arp(2, (dead, ip), (SERVER_MAC, SERVER_IP));
        attack.victim.kill(KillKind::PortDeleted)?;
        let deadline = attack.scene.agent.wait_port_event("port-lost", "vm1", PATIENCE)?.at
            + Duration::from_secs(3);
        while dhcp_reclaim_tests::clock::now() < deadline {
            attack.nic.send(&answer)?;
            let seen = attack.scene.agent.events().len();
            attack.scene.agent.next_event(seen, Duration::from_millis(50));
        }
        ensure!(attack.scene.releases(ip).is_empty(), "{:?}", attack.scene.releases(ip));
        ensure!(attack.scene.agent.events().iter().any(|event| {
            event.ip == Some(ip) && ["moved", "alive"].contains(&event.name.as_str())
        }), "{}", attack.scene.story());
        // With the attacker's own end there is nobody left to answer.
        attack.scene.dies(&mut attack.attacker, attack.attacker_ip)?;
        attack.scene.freed(ip)?;
        attack.scene.healthy()
    }

    /// The port's own rate keeps the ring free for its neighbours.
    fn a_flood_while_a_neighbour_boots() { flooded(Flood::AtItsRate) }

    /// Without that rate the ring is full: neighbours lose records too, which is counted, and nothing
    /// worse. The agent answers all the while.
    fn a_flood_that_fills_the_ring() { flooded(Flood::Unlimited) }

    fn a_dead_vms_mac_is_used_elsewhere() {
        let mut attack = Attack::new(&["--hold-down-uplink", "3s"])?;
        let (mac, ip) = (attack.victim.mac, attack.victim_ip);
        attack.victim.kill(KillKind::PortDeleted)?;
        attack.scene.agent.wait_event("silent", ip, PATIENCE)?;
        // In its hold-down: the same MAC boots behind another port and is given the same lease.
        let again = Vm::boot(&attack.scene.world.node, "vm9", mac, Client::Udhcpc)?;
        let same = again.wait_lease(PATIENCE)?;
        ensure!(same == ip, "the server gave {same}");
        again.ping(SERVER_IP)?;
        attack.scene.dies(&mut attack.attacker, attack.attacker_ip)?;
        attack.scene.unharmed(&again, ip)?;
        let binding = attack.scene.agent.binding(ip)?.context("no binding")?;
        ensure!(binding.port.as_deref() == Some("vm9"), "{binding:?}");
        let mut again = again;
        attack.scene.speaks_and_dies(&mut again, ip)?;
        ensure!(attack.scene.releases(ip).len() == 1);
        Ok(())
    }

    fn evasion_of_the_parser() {
        let mut attack = Attack::new(&["--record-rate", "1000", "--record-burst", "1000"])?;
        let third = pool_ip(15);
        let base = || selecting(attack.attacker.mac, third);
        let split = |code: u8, value: &[u8]| {
            let (first, second) = value.split_at(value.len() / 2);
            base().option(code, first).option(code, second)
        };
        let evasions: Vec<(&str, Forged)> = vec![
            ("IP options", base().with(|f| f.ip_options = vec![1; 12])),
            ("a first fragment", base().with(|f| f.fragment = 0x2000)),
            ("a later fragment", base().with(|f| f.fragment = 0x0010)),
            ("QinQ", base().with(|f| f.tags = vec![(0x88a8, 5), (0x8100, 6)])),
            ("a priority tag", base().with(|f| f.tags = vec![(0x8100, 0xe000)])),
            ("pads", base().with(|f| f.options.splice(0..0, [0; 250]).for_each(drop))),
            ("no end", base().with(|f| f.end = false)),
            ("no end and an overrun", base().with(|f| { f.end = false; f.options.extend([61, 200, 1]); })),
            ("overload", base().with(|f| {
                f.options.extend([52, 1, 3]);
                f.file = vec![61, 3, 0, 6, 6, 255];
                f.sname = vec![50, 4, 10, 67, 0, 1, 255];
            })),
            ("a split client-id", split(61, &client_id(attack.victim.mac))),
            ("a split address", split(50, &attack.victim_ip.octets())),
            ("two types", base().option(53, &[RELEASE])),
            ("a UDP length too short", base().with(|f| f.udp_lie = -40)),
            ("a UDP length too long", base().with(|f| f.udp_lie = 40)),
            ("a foreign hardware type", base().with(|f| f.htype = 6)),
            ("an absurd hlen", base().with(|f| f.hlen = 255)),
            ("hlen zero", base().with(|f| f.hlen = 0)),
            ("an unknown type", Forged::client(200, attack.attacker.mac, XID)),
            ("op 2 of a client", base().with(|f| f.op = 2)),
        ];
        for (n, (what, forged)) in evasions.into_iter().enumerate() {
            let seen = attack.scene.agent.counter("kernel.dhcp")? + attack.scene.agent.counter("kernel.truncated")?;
            attack.nic.send(&forged.with(|f| f.xid = XID + n as u32).frame())?;
            if what != "a later fragment" {
                attack.scene.agent.until(what, PATIENCE, |agent| {
                    let now = agent.counter("kernel.dhcp")? + agent.counter("kernel.truncated")?;
                    Ok((now > seen).then_some(()))
                })?;
            }
            attack.scene.healthy().with_context(|| what.to_owned())?;
        }
        ensure!(attack.scene.agent.counter("kernel.ambiguous")? >= 8);
        ensure!(attack.scene.agent.counter("core.ambiguous")? >= 8);
        let (verdict, reason) = attack.scene.agent.gate(attack.attacker_ip, "confirmed")?;
        ensure!(verdict == "hold", "{verdict}: {reason}");
        // The attacker is in doubt and stays: a new, plain REQUEST is what makes it certain.
        attack.scene.unharmed(&attack.victim, attack.victim_ip)?;
        attack.attacker.kill(KillKind::PortDeleted)?;
        let held = attack.scene.agent.wait_event("held", attack.attacker_ip, PATIENCE)?;
        ensure!(held.json["reason"].as_str().is_some_and(|r| r.starts_with("confirmed")), "{held:?}");
        ensure!(attack.scene.releases(attack.attacker_ip).is_empty());
        attack.victim_dies_well()
    }

    /// Terminals and log files are no place for what a guest can write.
    fn control_characters_in_names() {
        let mut attack = Attack::new(&["--log-level", "debug"])?;
        let ip = pool_ip(15);
        let evil = b"\x1b]0;owned\x07\x1b[2J\r\n{\"event\":\"released\"}\x00\xff\xfe";
        let forged = [12, 60, 61, 77, 81, 124, 56].into_iter().fold(
            selecting(attack.attacker.mac, ip),
            |forged, code| forged.option(code, evil),
        );
        attack.nic.send(&forged.frame())?;
        let bound = |event: &dhcp_reclaim_tests::agent::Event| {
            event.ip == Some(ip) && event.name == "bound"
        };
        attack.scene.agent.wait("the answer to the evil REQUEST", PATIENCE, bound)?;
        ensure!(attack.scene.agent.events().iter().all(|event| !event.name.starts_with("not an event")));
        let evil_in = |text: &str| text.chars().any(|c| c.is_control() && c != '\n');
        ensure!(!evil_in(&attack.scene.agent.log()), "{:?}", attack.scene.agent.log());
        for args in [&["list"][..], &["list", "--json"], &["events"], &["events", "--json"]] {
            let shown = attack.scene.agent.ask_text(args)?;
            ensure!(!evil_in(&shown), "{args:?}: {shown:?}");
        }
        // The client-id is given back as it came.
        attack.scene.dies(&mut attack.attacker, ip)?;
        let release = attack.scene.wait_release(ip)?;
        ensure!(release.option(61) == Some(&evil[..]), "{release:?}");
        attack.victim_dies_well()
    }

    fn absurd_times() {
        let scene = Scene::new(4, &[])?;
        // Another server, which does not mind what is granted in its name.
        scene.world.server.netns().ip("addr add 10.67.0.9/24 dev eth0")?;
        for (number, times, lasts) in [
            (7, [0, 0, 0], false),
            (8, [u32::MAX, 10, 20], true),
            (9, [600, 3600, 1200], true),
            (10, [600, u32::MAX, u32::MAX], true),
            (11, [u32::MAX - 1, 0, 0], true),
        ] {
            absurd(&scene, number, times, lasts).with_context(|| format!("{times:?}"))?;
        }
        scene.healthy()
    }

    fn an_inform_makes_no_binding() {
        let mut attack = Attack::new(&[])?;
        let forged = Forged::client(INFORM, attack.attacker.mac, XID).with(|f| {
            f.ciaddr = attack.attacker_ip;
            f.from_ip = attack.attacker_ip;
        });
        attack.nic.send(&forged.frame())?;
        attack.scene.wire.wait("the answer to the INFORM", PATIENCE, |frame| {
            frame.dhcp().is_some_and(|dhcp| dhcp.kind() == Some(ACK) && dhcp.xid == XID)
        })?;
        ensure!(attack.scene.agent.list()?.len() == 2, "{:?}", attack.scene.agent.list()?);
        attack.ends_well()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Flood {
    AtItsRate,
    Unlimited,
}

fn flooded(flood: Flood) -> Result<()> {
    let attack = Attack::new(match flood {
        Flood::AtItsRate => &[],
        Flood::Unlimited => &["--record-rate", "65535", "--record-burst", "65535"],
    })?;
    let Attack {
        mut attacker,
        attacker_ip,
        nic,
        mut victim,
        victim_ip,
        scene,
    } = attack;
    let frames: Vec<_> = (0..512)
        .map(|n| {
            Forged {
                xid: n,
                ..selecting(attacker.mac, pool_ip(15))
            }
            .with(|f| f.to_mac = BRIDGE_MAC)
            .frame()
        })
        .collect();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (sent, neighbour) = std::thread::scope(|scope| -> Result<_> {
        let flooding = scope.spawn(|| {
            let mut sent = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for frame in &frames {
                    // A full queue is no reason to stop.
                    let _ = nic.send(frame);
                    sent += 1;
                }
            }
            sent
        });
        let heard = scene
            .wait_counter("kernel.dhcp", 10_000)
            .and_then(|()| match flood {
                Flood::AtItsRate => scene.living(3).map(Some),
                Flood::Unlimited => {
                    scene.wait_counter("kernel.ring_full", 1000)?;
                    scene.agent.list()?;
                    Ok(None)
                }
            });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let sent = flooding.join().unwrap_or(0);
        Ok((sent, heard?))
    })?;
    println!(
        "NOTE {sent} frames, {} records, {} of the ring full",
        scene.agent.counter("kernel.records")?,
        scene.agent.counter("kernel.ring_full")?
    );
    scene.healthy()?;
    let (mut neighbour, ip) = match neighbour {
        Some(neighbour) => neighbour,
        None => scene.living(3)?,
    };
    scene.speaks_and_dies(&mut neighbour, ip)?;
    scene.unharmed(&victim, victim_ip)?;
    // A port that lost records is believed again once its VM has spoken.
    scene.speaks_and_dies(&mut attacker, attacker_ip)?;
    scene.speaks_and_dies(&mut victim, victim_ip)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Evidence {
    Loud,
    Spent,
}

/// A VM answers its victim's real REQUEST, in the server's name, with a third VM's address. Then
/// the victim dies: the third must not lose what was never the victim's.
fn third_party(evidence: Evidence) -> Result<()> {
    let attack = Attack::new(&[
        "--hold-down-silent",
        "1m",
        "--record-rate",
        "2",
        "--record-burst",
        "20",
    ])?;
    let Attack {
        mut attacker,
        attacker_ip,
        nic,
        victim: mut third,
        victim_ip: third_ip,
        scene,
    } = attack;
    third.silence_arp()?;
    let agent = &scene.agent;
    // A victim that is no kernel: its frames are ours.
    let mut victim = Vm::off(&scene.world.node, "vm5", vm_mac(5))?;
    victim.plug_in()?;
    agent.wait_port_event("port-up", "vm5", PATIENCE)?;
    victim.wait_forwarding(PATIENCE)?;
    let hand = scene.nic(&victim)?;
    let at_victim = Capture::start(victim.netns(), "eth0")?;
    hand.send(
        &selecting(victim.mac, pool_ip(16))
            .with(|f| f.to_mac = attacker.mac)
            .frame(),
    )?;
    agent.wait_event("requested", pool_ip(16), PATIENCE)?;
    if evidence == Evidence::Spent {
        // Records that mean nothing to anybody, until no more are taken.
        for n in 0..200 {
            let other = Ipv4Addr::new(10, 67, 0, 77).octets();
            nic.send(
                &Forged::client(RELEASE, attacker.mac, n)
                    .option(54, &other)
                    .frame(),
            )?;
        }
    }
    let forged = Forged::server(ACK, (attacker.mac, SERVER_IP), victim.mac, XID, third_ip);
    nic.send(&forged.frame())?;
    at_victim.wait("the forged ACK", PATIENCE, |frame| {
        frame
            .dhcp()
            .is_some_and(|dhcp| dhcp.kind() == Some(ACK) && dhcp.xid == XID)
    })?;
    victim.kill(KillKind::PortDeleted)?;
    if evidence == Evidence::Spent {
        agent.wait_port_event("records-lost", "vm2", PATIENCE)?;
    }
    // Reclaimed after it, and so later than it would have been.
    scene.speaks_and_dies(&mut attacker, attacker_ip)?;
    scene.unharmed(&third, third_ip)?;
    let binding = agent.binding(third_ip)?.context("no binding")?;
    ensure!(
        binding.is_of(third.mac) && binding.port.as_deref() == Some("vm1"),
        "{binding:?}\n{}",
        scene.story()
    );
    scene.healthy()?;
    scene.speaks_and_dies(&mut third, third_ip)
}

/// Two live VMs with one client-id: whichever dies, the other keeps its lease.
fn cloned(kind: ServerKind) -> Result<()> {
    let scene = Scene::of(kind, Place::Remote, 10, &["--hold-down-silent", "1m"])?;
    let boot = |number: u8| -> Result<(Vm, Ipv4Addr)> {
        let mut vm = Vm::off(&scene.world.node, &format!("vm{number}"), vm_mac(number))?;
        vm.client_id = ClientId::Given(b"\0one image, many VMs".to_vec());
        vm.plug_in()?;
        // What a client says in the moments before its port is watched is not heard.
        let port = format!("vm{number}");
        scene.agent.wait_port_event("port-up", &port, PATIENCE)?;
        vm.start_client(Client::Udhcpc)?;
        let ip = vm.wait_lease(PATIENCE)?;
        scene.world.server.wait_lease(ip, vm.mac, PATIENCE)?;
        Ok((vm, ip))
    };
    let (mut first, first_ip) = boot(1)?;
    scene.agent.wait_event("bound", first_ip, PATIENCE)?;
    let (mut second, second_ip) = boot(2)?;
    println!("NOTE {kind} gives two VMs with one client-id {first_ip} and {second_ip}");
    scene.agent.until("the second's lease", PATIENCE, |agent| {
        let binding = agent.binding(second_ip)?;
        Ok(binding
            .filter(|binding| binding.is_of(second.mac))
            .map(drop))
    })?;
    let (mut canary, canary_ip) = scene.living(3)?;
    // The one that the server knows last dies; the other uses the address, and is quiet.
    first.silence_arp()?;
    second.kill(KillKind::PortDeleted)?;
    scene.agent.wait_port_event("port-lost", "vm2", PATIENCE)?;
    scene.dies(&mut canary, canary_ip)?;
    scene.no_release_within(second_ip, Duration::from_secs(1))?;
    ensure!(
        scene.world.server.has(first_ip)?,
        "the living lost its lease"
    );
    ensure!(first.lease() == Some(first_ip));
    scene.healthy()?;
    first.kill(KillKind::PortDeleted)?;
    let (mut last, last_ip) = scene.living(4)?;
    scene.dies(&mut last, last_ip)
}

/// A server beyond the uplink grants a lease with these times (51, 58, 59) to a VM that dies then.
fn absurd(scene: &Scene, number: u8, times: [u32; 3], lasts: bool) -> Result<()> {
    let agent = &scene.agent;
    let name = format!("vm{number}");
    let mut vm = Vm::off(&scene.world.node, &name, vm_mac(number))?;
    vm.plug_in()?;
    agent.wait_port_event("port-up", &name, PATIENCE)?;
    vm.wait_forwarding(PATIENCE)?;
    let nic = scene.nic(&vm)?;
    let server = Nic::open(scene.world.server.netns(), "eth0")?;
    let ip = Ipv4Addr::new(10, 67, 0, 220 + number);
    // Not ours, so that ours is silent.
    let other = Ipv4Addr::new(10, 67, 0, 9);
    let request = Forged::client(REQUEST, vm.mac, XID)
        .option(50, &ip.octets())
        .option(54, &other.octets());
    nic.send(&request.frame())?;
    agent.wait_event("requested", ip, PATIENCE)?;
    let mut ack = Forged::client(ACK, SERVER_MAC, XID).option(54, &other.octets());
    ack.op = 2;
    (ack.from_port, ack.to_port) = (67, 68);
    (ack.from_ip, ack.yiaddr, ack.chaddr) = (SERVER_IP, ip, vm.mac);
    for (code, secs) in [51, 58, 59].into_iter().zip(times) {
        ack = ack.option(code, &secs.to_be_bytes());
    }
    server.send(&ack.frame())?;
    agent.wait_event("bound", ip, PATIENCE)?;
    nic.send(&arp(1, (vm.mac, ip), (BROADCAST_MAC, SERVER_IP)))?;
    vm.kill(KillKind::PortDeleted)?;
    if lasts {
        let release = scene.wait_release(ip)?;
        ensure!(release.to_ip == other, "to {}", release.to_ip);
    } else {
        agent.wait_event("expired", ip, PATIENCE)?;
        let (mut alive, alive_ip) = scene.living(1)?;
        scene.dies(&mut alive, alive_ip)?;
        ensure!(scene.wire.count(|frame| is_release(frame, ip)) == 0);
    }
    Ok(())
}
