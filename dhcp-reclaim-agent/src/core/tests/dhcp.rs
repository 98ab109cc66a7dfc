//! What VMs and servers say, and whom it binds.

use super::*;
use crate::core::binding::{Binding, Doubt};

const OTHER_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const OTHER_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 253);

fn binding(bench: &Bench) -> &Binding {
    bench.engine.binding(KEY).expect("the binding is known")
}

fn leaves(bench: &mut Bench) {
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
}

/// An uplink, and what its server sends by it.
fn beyond(bench: &mut Bench, mac: MacAddr, ip: Ipv4Addr) {
    bench.message(Message {
        port: UPLINK,
        role: Role::Uplink,
        direction: Direction::FromPort,
        ..bench.ack(UPLINK, mac, ip)
    });
}

/// RFC 4039: the DISCOVER names no address, and the ACK follows at once.
fn rapid_commit(bench: &mut Bench, port: IfIndex, mac: MacAddr, ip: Ipv4Addr, agreed: bool) {
    bench.message(Message {
        kind: MessageType::Discover,
        rapid_commit: true,
        requested_ip: None,
        server_id: None,
        ..bench.request(port, mac, ip)
    });
    bench.message(Message {
        rapid_commit: agreed,
        ..bench.ack(port, mac, ip)
    });
}

#[test]
fn a_request_alone_says_whose_the_lease_would_be() {
    let mut bench = Bench::new(Policy::default());
    bench.message(Message {
        ciaddr: Some(IP),
        requested_ip: None,
        server_id: None,
        destination_ip: SERVER,
        destination_mac: SERVER_MAC,
        client_id: Some(vec![1, 2]),
        ..bench.request(VM_PORT, VM, IP)
    });
    let binding = binding(&bench);
    assert_eq!(binding.state, State::Requested);
    assert_eq!(binding.client_id, Some(vec![1, 2]));
    assert_eq!(binding.server, Some(SERVER));
    assert_eq!(binding.server_mac, Some(SERVER_MAC));
    assert_eq!((binding.port, &*binding.port_name), (VM_PORT, "vm1"));
    assert_eq!(binding.last_seen, Some(bench.now));
    assert!(!binding.acked && !binding.shared);
}

#[test]
fn an_ack_says_where_its_lease_is() {
    let bench = settled();
    let binding = binding(&bench);
    assert_eq!((binding.port, &*binding.port_name), (VM_PORT, "vm1"));
    assert!(!binding.shared);
}

/// Where a REQUEST alone makes a binding, the latest of its own VM says which server it is.
#[test]
fn a_live_binding_follows_the_server_that_its_vm_asks_and_nobody_elses() {
    for commit in [Commit::Request, Commit::Ack] {
        let mut bench = Bench::new(Policy {
            commit,
            ..Policy::default()
        });
        let asks = |bench: &mut Bench, port, mac| {
            bench.message(Message {
                server_id: Some(OTHER_SERVER),
                client_id: Some(vec![9]),
                ..bench.request(port, mac, IP)
            });
        };
        bench.message(bench.request(VM_PORT, VM, IP));
        asks(&mut bench, OTHER_PORT, VM);
        asks(&mut bench, VM_PORT, OTHER);
        asks(&mut bench, OTHER_PORT, OTHER);
        let first = (Some(SERVER), None);
        let known = |bench: &Bench| (binding(bench).server, binding(bench).client_id.clone());
        assert_eq!(known(&bench), first, "{commit:?}");
        asks(&mut bench, VM_PORT, VM);
        let follows = match commit {
            Commit::Request => (Some(OTHER_SERVER), Some(vec![9])),
            Commit::Ack => first,
        };
        assert_eq!(known(&bench), follows, "{commit:?}");
    }
}

/// Two clones had the lease, and one gave it back: who asks again by the same name is one of them.
#[test]
fn who_asks_for_a_lease_that_two_had_has_it_with_another_only_by_the_same_name() {
    let asks_again = |shared: bool, client_id: Option<Vec<u8>>| {
        let mut bench = settled();
        if shared {
            bench.lease(OTHER_PORT, OTHER, IP);
        }
        let (port, mac) = if shared {
            (OTHER_PORT, OTHER)
        } else {
            (VM_PORT, VM)
        };
        bench.message(Message {
            kind: MessageType::Release,
            ciaddr: Some(IP),
            requested_ip: None,
            ..bench.request(port, mac, IP)
        });
        assert_eq!(bench.state(KEY), Some(State::Withdrawn));
        bench.message(Message {
            client_id,
            ..bench.request(port, mac, IP)
        });
        assert_eq!(bench.state(KEY), Some(State::Requested));
        binding(&bench).shared
    };
    assert!(asks_again(true, None));
    assert!(!asks_again(true, Some(vec![9])));
    assert!(!asks_again(false, None));
}

/// Its records may be read long after it, and the time in which it counts is the wire's.
#[test]
fn an_answer_counts_by_when_it_was_seen_and_on_its_requests_vlan() {
    let after = |millis: u64| {
        let mut bench = Bench::new(Policy::default());
        bench.message(bench.request(VM_PORT, VM, IP));
        bench.now = bench.now + Duration::from_millis(millis);
        bench.message(bench.ack(VM_PORT, VM, IP));
        bench.state(KEY)
    };
    assert_eq!(after(120_000), Some(State::Bound));
    assert_eq!(after(120_001), Some(State::Requested));

    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        vlan: 7,
        ..bench.ack(VM_PORT, VM, IP)
    });
    assert_eq!(bench.engine.counters()["answers_unasked"], 1);
    assert_eq!(bench.state(Key { vlan: 7, ..KEY }), None);
}

#[test]
fn rapid_commit_binds_where_both_speak_of_it() {
    for agreed in [false, true] {
        let mut bench = Bench::new(Policy::default());
        rapid_commit(&mut bench, VM_PORT, VM, IP, agreed);
        assert_eq!(bench.state(KEY), agreed.then_some(State::Bound));
    }
}

#[test]
fn an_ack_as_old_as_the_loss_ends_the_doubt() {
    let mut bench = settled();
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    bench.lease(VM_PORT, VM, IP);
    assert_eq!(binding(&bench).doubt, None);
}

#[test]
fn a_renewal_is_told_as_one_and_as_nothing_else() {
    let mut bench = settled();
    bench.lease(VM_PORT, VM, IP);
    assert_eq!(bench.notices(), [NoticeKind::Renewed]);
}

#[test]
fn what_was_given_back_is_the_next_ones_alone() {
    let mut bench = settled();
    bench.message(Message {
        kind: MessageType::Release,
        ciaddr: Some(IP),
        requested_ip: None,
        ..bench.request(VM_PORT, VM, IP)
    });
    // By rapid commit, so that no REQUEST for it has taken its place.
    rapid_commit(&mut bench, OTHER_PORT, OTHER, IP, true);
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert!(!binding(&bench).shared);
}

#[test]
fn a_lease_that_is_found_elsewhere_moves_with_its_mac_and_is_withdrawn_for_another() {
    for (mac, ends) in [(VM, NoticeKind::Moved), (OTHER, NoticeKind::Withdrawn)] {
        let mut bench = settled();
        leaves(&mut bench);
        bench.seen.clear();
        bench.lease(OTHER_PORT, mac, IP);
        let notices = bench.notices();
        assert!(notices.contains(&ends), "{mac}: {notices:?}");
        assert_eq!(notices.last(), Some(&NoticeKind::Bound), "{mac}");
    }
}

#[test]
fn a_full_port_renews_what_it_has() {
    let mut bench = Bench::new(Policy {
        bindings_per_port: 1,
        ..Policy::default()
    });
    bench.lease(VM_PORT, VM, IP);
    bench.seen.clear();
    bench.lease(VM_PORT, VM, IP);
    assert_eq!(bench.notices(), [NoticeKind::Renewed]);
    assert_eq!(bench.engine.counters()["bindings_refused"], 0);
    // An address that nobody asked for by name.
    rapid_commit(&mut bench, VM_PORT, VM, OTHER_IP, true);
    assert_eq!(bench.engine.counters()["bindings_refused"], 1);
    assert_eq!(bench.engine.bindings().count(), 1);
}

#[test]
fn what_reads_two_ways_is_in_doubt_whoever_said_it() {
    for (asked, answered) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut bench = Bench::new(Policy::default());
        bench.message(Message {
            ambiguous: asked,
            ..bench.request(VM_PORT, VM, IP)
        });
        bench.message(Message {
            ambiguous: answered,
            ..bench.ack(VM_PORT, VM, IP)
        });
        let doubt = (asked || answered).then_some(Doubt::Ambiguous);
        assert_eq!(binding(&bench).doubt, doubt, "{asked} {answered}");
    }
}

#[test]
fn an_answer_that_only_the_uplink_shows_is_the_askers_on_its_bridge() {
    let elsewhere = 2;
    for segment in [SEGMENT, elsewhere] {
        let mut bench = Bench::new(Policy::default());
        bench.tell(Event::PortUp(Port {
            ifindex: UPLINK,
            name: "eth0".to_owned(),
            segment,
            role: Role::Uplink,
        }));
        bench.message(bench.request(VM_PORT, VM, IP));
        beyond(&mut bench, VM, IP);
        let expected = match segment {
            SEGMENT => State::Bound,
            _ => State::Requested,
        };
        assert_eq!(bench.state(KEY), Some(expected), "{segment}");
        assert_eq!(binding(&bench).port, VM_PORT);
    }
}

/// The port's record of an ACK comes first, and the uplink's of the very same one after it.
#[test]
fn the_same_ack_by_the_uplink_is_no_news_and_another_is() {
    for (millis, conflicts) in [(0, 0), (999, 0), (1000, 1)] {
        let mut bench = Bench::new(Policy::default());
        bench.port(UPLINK, "eth0", Role::Uplink);
        bench.lease(VM_PORT, VM, IP);
        bench.seen.clear();
        bench.now = bench.now + Duration::from_millis(millis);
        beyond(&mut bench, VM, IP);
        assert_eq!(count(&bench, NoticeKind::Conflict), conflicts, "{millis}");
        assert_eq!(bench.state(KEY), Some(State::Bound));
    }
}

#[test]
fn a_lease_beyond_the_uplink_ends_it_and_is_shared_with_one_that_lives() {
    for (lives, mac, ends, shared) in [
        (true, OTHER, State::Withdrawn, true),
        (false, OTHER, State::Withdrawn, false),
        (false, VM, State::Moved, false),
    ] {
        let mut bench = Bench::new(Policy::default());
        bench.port(UPLINK, "eth0", Role::Uplink);
        bench.lease(VM_PORT, VM, IP);
        bench.pass(secs(5));
        if !lives {
            leaves(&mut bench);
        }
        beyond(&mut bench, mac, IP);
        assert_eq!(bench.state(KEY), Some(ends), "{lives} {mac}");
        assert_eq!(binding(&bench).shared, shared, "{lives} {mac}");
    }
}

#[test]
fn a_rogue_server_is_told_once_a_minute() {
    let mut bench = Bench::new(Policy::default());
    let rogue = |bench: &mut Bench| {
        bench.message(Message {
            direction: Direction::FromPort,
            source_mac: OTHER,
            ..bench.ack(OTHER_PORT, VM, IP)
        });
        count(bench, NoticeKind::RogueServer)
    };
    assert_eq!(rogue(&mut bench), 1);
    bench.now = bench.now + secs(59);
    assert_eq!(rogue(&mut bench), 1);
    bench.now = bench.now + secs(1);
    assert_eq!(rogue(&mut bench), 2);
    assert_eq!(rogue(&mut bench), 2);
}

/// One image, one client-id: the clone that asks for the address may have the same lease.
#[test]
fn a_clone_that_asks_shares_the_lease_and_another_name_does_not() {
    for (name, shared) in [(Some(vec![1]), true), (Some(vec![2]), false), (None, false)] {
        let mut bench = Bench::new(Policy::default());
        let named = |message: Message, client_id| Message {
            client_id,
            ..message
        };
        bench.message(named(bench.request(VM_PORT, VM, IP), Some(vec![1])));
        bench.message(bench.ack(VM_PORT, VM, IP));
        // The VM itself is no clone of its own.
        bench.message(named(bench.request(OTHER_PORT, VM, IP), Some(vec![1])));
        assert!(!binding(&bench).shared);
        bench.message(named(bench.request(OTHER_PORT, OTHER, IP), name.clone()));
        assert_eq!(binding(&bench).shared, shared, "{name:?}");
    }
}

#[test]
fn another_mac_behind_the_same_port_may_want_it_too() {
    let mut bench = settled();
    bench.message(bench.request(VM_PORT, OTHER, IP));
    assert_eq!(count(&bench, NoticeKind::Conflict), 0);
    bench.message(bench.request(OTHER_PORT, OTHER, IP));
    assert_eq!(count(&bench, NoticeKind::Conflict), 1);
}

#[test]
fn an_ack_that_nobody_asked_for_shortens_a_lease_and_puts_it_in_doubt_for_another() {
    let mut bench = settled();
    for (seconds, left) in [(60, 60), (3600, 60)] {
        bench.message(Message {
            lease_secs: Some(seconds),
            ..bench.ack(VM_PORT, VM, IP)
        });
        assert_eq!(binding(&bench).expires, Some(bench.now + secs(left)));
        assert_eq!(binding(&bench).doubt, None);
    }
    bench.message(bench.ack(OTHER_PORT, OTHER, IP));
    assert_eq!(binding(&bench).doubt, Some(Doubt::Conflict(bench.now)));
}

#[test]
fn a_vm_that_speaks_dhcp_is_alive() {
    let mut bench = settled();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::CarrierLost,
    });
    assert_eq!(bench.state(KEY), Some(State::Silent));
    bench.message(Message {
        kind: MessageType::Inform,
        ..bench.request(VM_PORT, VM, IP)
    });
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(count(&bench, NoticeKind::Alive), 1);
}

#[test]
fn a_port_has_so_many_questions_open_and_may_repeat_them() {
    let mut bench = Bench::new(Policy::default());
    let asks = |bench: &mut Bench, xid: u32| {
        bench.message(Message {
            xid,
            ..bench.request(VM_PORT, VM, IP)
        });
        bench.engine.counters()["transactions_refused"]
    };
    for xid in 0..64 {
        assert_eq!(asks(&mut bench, xid), 0);
    }
    assert_eq!(asks(&mut bench, 0), 0, "a repetition");
    assert_eq!(asks(&mut bench, 64), 1);
}

/// What a server sends by the uplink, whoever it is for.
fn offer(bench: &mut Bench, server: Ipv4Addr, source_mac: MacAddr, giaddr: Option<Ipv4Addr>) {
    bench.message(Message {
        port: UPLINK,
        role: Role::Uplink,
        direction: Direction::FromPort,
        kind: MessageType::Offer,
        server_id: Some(server),
        source_mac,
        giaddr,
        ..bench.ack(UPLINK, MacAddr([2, 0, 0, 0, 8, 8]), OTHER_IP)
    });
}

fn server_mac(bench: &mut Bench, server: Ipv4Addr) -> Option<MacAddr> {
    bench.message(Message {
        server_id: Some(server),
        ..bench.request(VM_PORT, VM, IP)
    });
    let found = binding(bench).server_mac;
    bench.message(Message {
        kind: MessageType::Release,
        ciaddr: Some(IP),
        requested_ip: None,
        ..bench.request(VM_PORT, VM, IP)
    });
    found
}

#[test]
fn so_many_servers_are_known_by_what_they_send() {
    let nth = |n: u16| {
        let [high, low] = n.to_be_bytes();
        (
            Ipv4Addr::new(10, 5, high, low),
            MacAddr([2, 5, 0, 0, high, low]),
        )
    };
    let mut bench = Bench::new(Policy::default());
    bench.port(UPLINK, "eth0", Role::Uplink);
    assert_eq!(server_mac(&mut bench, nth(0).0), None);
    for n in 0..257 {
        offer(&mut bench, nth(n).0, nth(n).1, None);
    }
    for (n, known) in [(0, true), (255, true), (256, false)] {
        let (server, mac) = nth(n);
        assert_eq!(server_mac(&mut bench, server), known.then_some(mac), "{n}");
    }
    // One that is known may have another MAC by now.
    offer(&mut bench, nth(0).0, SERVER_MAC, None);
    assert_eq!(server_mac(&mut bench, nth(0).0), Some(SERVER_MAC));
    offer(&mut bench, nth(0).0, MacAddr::BROADCAST, None);
    assert_eq!(server_mac(&mut bench, nth(0).0), Some(SERVER_MAC));
}

#[test]
fn so_many_relays_are_known_by_what_they_pass_on() {
    let relay = Ipv4Addr::new(192, 0, 2, 3);
    let asked = |others: u16, mac: MacAddr| {
        let mut bench = Bench::new(Policy::default());
        bench.port(UPLINK, "eth0", Role::Uplink);
        for n in 0..others {
            let [high, low] = n.to_be_bytes();
            offer(
                &mut bench,
                Ipv4Addr::new(10, 5, high, low),
                SERVER_MAC,
                Some(relay),
            );
        }
        offer(&mut bench, SERVER, mac, Some(relay));
        bench.lease(VM_PORT, VM, IP);
        bench.pass(secs(5));
        leaves(&mut bench);
        bench.seen.iter().any(|action| {
            matches!(action, Action::Control { probe } if (probe.ip, probe.mac) == (relay, mac))
        })
    };
    assert!(asked(0, SERVER_MAC));
    assert!(asked(255, SERVER_MAC));
    assert!(!asked(256, SERVER_MAC));
    assert!(!asked(0, MacAddr::BROADCAST));
}
