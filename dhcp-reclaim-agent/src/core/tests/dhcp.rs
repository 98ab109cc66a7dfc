//! What VMs and servers say, and whom it binds.

use super::*;
use crate::core::binding::{Binding, Doubt};

fn binding(bench: &Bench) -> &Binding {
    bench.engine.binding(KEY).expect("the binding is known")
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
        bench.gives_back(port, mac, IP);
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
fn who_asks_again_is_waited_for_anew() {
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.pass(secs(100));
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.pass(secs(100));
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.engine.counters()["answers_unasked"], 0);
    assert_eq!(bench.state(KEY), Some(State::Bound));
}

/// Or whoever knows its xid could go on answering.
#[test]
fn a_question_has_one_answer() {
    for first in [Bench::ack, Bench::nak] {
        let mut bench = Bench::new(Policy::default());
        bench.message(bench.request(VM_PORT, VM, IP));
        bench.message(first(&bench, VM_PORT, VM, IP));
        let unasked = |bench: &Bench| bench.engine.counters()["answers_unasked"];
        assert_eq!(unasked(&bench), 0);
        bench.message(bench.ack(VM_PORT, VM, OTHER_IP));
        assert_eq!((unasked(&bench), bench.state(SECOND)), (1, None));
    }
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
    bench.gives_back(VM_PORT, VM, IP);
    // By rapid commit, so that no REQUEST for it has taken its place.
    rapid_commit(&mut bench, OTHER_PORT, OTHER, IP, true);
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert!(!binding(&bench).shared);
}

#[test]
fn a_lease_that_is_found_elsewhere_moves_with_its_mac_and_is_withdrawn_for_another() {
    for (mac, ends) in [(VM, NoticeKind::Moved), (OTHER, NoticeKind::Withdrawn)] {
        let mut bench = settled();
        bench.lose(VM_PORT, PortLoss::Deleted);
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
        bench.ack_beyond(VM, IP);
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
        bench.ack_beyond(VM, IP);
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
            bench.lose(VM_PORT, PortLoss::Deleted);
        }
        bench.ack_beyond(mac, IP);
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
    bench.lose(VM_PORT, PortLoss::CarrierLost);
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
    bench.gives_back(VM_PORT, VM, IP);
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
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.seen.iter().any(|action| {
            matches!(action, Action::Control { probe } if (probe.ip, probe.mac) == (relay, mac))
        })
    };
    assert!(asked(0, SERVER_MAC));
    assert!(asked(255, SERVER_MAC));
    assert!(!asked(256, SERVER_MAC));
    assert!(!asked(0, MacAddr::BROADCAST));
}

#[test]
fn a_request_and_its_ack_make_a_binding() {
    let mut bench = Bench::new(Policy::default());
    bench.seen.clear();
    bench.message(bench.request(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Requested));
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(bench.notices(), [NoticeKind::Requested, NoticeKind::Bound]);
    let binding = bench.engine.bindings().next().expect("one binding");
    assert_eq!(binding.server, Some(SERVER));
    assert_eq!(binding.server_mac, Some(SERVER_MAC));
    assert_eq!(binding.expires, Some(bench.now + secs(3600)));
}

#[test]
fn an_ack_that_nobody_asked_for_makes_nothing() {
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), None);
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        xid: 8,
        ..bench.ack(VM_PORT, VM, IP)
    });
    bench.message(bench.ack(OTHER_PORT, VM, IP));
    bench.message(Message {
        vlan: 5,
        ..bench.ack(VM_PORT, VM, IP)
    });
    assert_eq!(bench.state(KEY), Some(State::Requested));
    bench.pass(secs(121));
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Expired));
}

#[test]
fn no_server_is_believed_behind_a_port_that_nobody_named() {
    let mut bench = Bench::new(Policy::default());
    bench.port(13, "spare1", Role::Aside);
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        port: 13,
        role: Role::Aside,
        direction: Direction::FromPort,
        ..bench.ack(VM_PORT, VM, IP)
    });
    assert!(bench.notices().contains(&NoticeKind::RogueServer));
    // The kernel half makes no record of that frame on its way to the VM; should one come, no more
    // is believed.
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Requested));
}

#[test]
fn a_claim_that_the_server_refuses_is_none() {
    let nak = |bench: &Bench, mac: MacAddr| Message {
        kind: MessageType::Nak,
        yiaddr: None,
        lease_secs: None,
        ..bench.ack(OTHER_PORT, mac, IP)
    };
    let mut bench = settled();
    // Two clients that boot at once are offered the same address.
    bench.message(bench.request(OTHER_PORT, OTHER, IP));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.message(nak(&bench, OTHER));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
    // In its own name somebody else may have asked, or itself from another place.
    bench.message(bench.request(OTHER_PORT, VM, IP));
    bench.message(nak(&bench, VM));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
}

#[test]
fn what_the_guest_ends_itself_is_never_released() {
    for (kind, state) in [
        (MessageType::Release, State::Withdrawn),
        (MessageType::Decline, State::Refused),
    ] {
        let mut bench = settled();
        bench.message(Message {
            kind,
            ciaddr: Some(IP),
            ..bench.request(VM_PORT, VM, IP)
        });
        assert_eq!(bench.state(KEY), Some(state));
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.pass(secs(60));
        assert_eq!(bench.releases(), 0);
    }
}

#[test]
fn a_nak_ends_it() {
    let mut bench = settled();
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(bench.nak(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Refused));
}

#[test]
fn a_neighbour_cannot_end_or_take_it() {
    let mut bench = settled();
    for kind in [
        MessageType::Release,
        MessageType::Decline,
        MessageType::Request,
    ] {
        // In its own name, and in the victim's.
        bench.message(Message {
            kind,
            ciaddr: Some(IP),
            ..bench.request(OTHER_PORT, OTHER, IP)
        });
        bench.message(Message {
            kind,
            ciaddr: Some(IP),
            ..bench.request(OTHER_PORT, VM, IP)
        });
        bench.message(Message {
            kind,
            ciaddr: Some(IP),
            source_mac: OTHER,
            ..bench.request(OTHER_PORT, VM, IP)
        });
    }
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(
        bench.engine.bindings().next().map(|binding| binding.port),
        Some(VM_PORT)
    );
    assert!(bench.notices().contains(&NoticeKind::Conflict));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.vm_talks = true;
    bench.pass(secs(60));
    assert_eq!(
        bench.verdict(Gate::Confirmed),
        Verdict::Pass,
        "its own word settles it"
    );
}

#[test]
fn an_answer_that_a_vm_gave_is_not_believed() {
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    let forged = Message {
        source_mac: OTHER,
        ..bench.ack(VM_PORT, VM, IP)
    };
    // The same frame: in by the attacker's port, out by the victim's.
    bench.message(Message {
        port: OTHER_PORT,
        direction: Direction::FromPort,
        ..forged.clone()
    });
    bench.message(forged);
    assert_eq!(bench.state(KEY), Some(State::Requested));
    assert!(bench.notices().contains(&NoticeKind::RogueServer));
}

#[test]
fn an_ambiguous_message_holds() {
    let mut bench = settled();
    bench.message(Message {
        ambiguous: true,
        ..bench.request(VM_PORT, VM, IP)
    });
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 0);
    assert_eq!(bench.state(KEY), Some(State::Gone));
    assert!(bench.notices().contains(&NoticeKind::Held));
}

#[test]
fn an_ack_older_than_the_loss_does_not_end_the_doubt() {
    let mut bench = settled();
    let (request, ack) = (bench.request(VM_PORT, VM, IP), bench.ack(VM_PORT, VM, IP));
    bench.pass(secs(1));
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    // They were in the ring before what was lost.
    bench.message(request);
    bench.message(ack);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.pass(secs(1));
    bench.lease(VM_PORT, VM, IP);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
}

#[test]
fn a_lease_that_ran_out_in_doubt_is_not_a_neighbours() {
    let mut bench = settled();
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    bench.vm_talks = false;
    bench.pass(secs(3600));
    assert_eq!(bench.state(KEY), Some(State::Expired));
    // Its renewal may be what was lost, so a neighbour in its MAC's name binds nothing.
    bench.lease(OTHER_PORT, VM, IP);
    assert_eq!(bench.state(KEY), Some(State::Expired));
    bench.lose(OTHER_PORT, PortLoss::Deleted);
    bench.pass(secs(600));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn an_infinite_lease_never_ends() {
    let mut bench = Bench::new(Policy::default());
    bench.vm_talks = true;
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        lease_secs: Some(u32::MAX),
        ..bench.ack(VM_PORT, VM, IP)
    });
    bench.pass(secs(100_000));
    assert_eq!(bench.state(KEY), Some(State::Bound));
}

#[test]
fn an_answer_that_takes_its_time_is_an_answer() {
    let mut bench = Bench::new(Policy::default());
    bench.lease(OTHER_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.message(bench.request(VM_PORT, VM, IP));
    // Long enough for everything else that is due, and shorter than a transaction.
    bench.pass(secs(100));
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    // And one that takes too long is none.
    let ip = Ipv4Addr::new(10, 0, 0, 3);
    bench.message(bench.request(VM_PORT, VM, ip));
    bench.pass(secs(121));
    bench.message(bench.ack(VM_PORT, VM, ip));
    assert_ne!(bench.state(Key { ip, ..KEY }), Some(State::Bound));
}

#[test]
fn by_request_alone_an_address_must_be_seen_alive() {
    let policy = Policy {
        commit: Commit::Request,
        ..Policy::default()
    };
    for talks in [false, true] {
        let mut bench = Bench::new(policy.clone());
        bench.message(bench.request(VM_PORT, VM, IP));
        bench.vm_talks = talks;
        bench.pass(secs(10));
        let state = if talks {
            State::Bound
        } else {
            State::Requested
        };
        assert_eq!(bench.state(KEY), Some(state));
        bench.vm_talks = false;
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.pass(secs(60));
        assert_eq!(bench.releases(), usize::from(talks));
    }
}

#[test]
fn bindings_and_transactions_of_one_port_are_bounded() {
    let mut bench = Bench::new(Policy {
        bindings_per_port: 16,
        ..Policy::default()
    });
    for n in 0..1000_u32 {
        let [_, _, high, low] = n.to_be_bytes();
        let mac = MacAddr([2, 0, 0, 9, high, low]);
        let ip = Ipv4Addr::new(10, 9, high, low);
        bench.message(Message {
            xid: n,
            ..bench.request(VM_PORT, mac, ip)
        });
        bench.message(Message {
            xid: n,
            ..bench.ack(VM_PORT, mac, ip)
        });
    }
    assert_eq!(bench.engine.bindings().count(), 16);
    assert!(bench.engine.counters()["bindings_refused"] > 0);
}

#[test]
fn a_lease_in_its_macs_name_at_another_port_moves_nothing() {
    let mut bench = settled();
    bench.message(bench.request(OTHER_PORT, VM, IP));
    bench.message(bench.ack(OTHER_PORT, VM, IP));
    let binding = bench.engine.bindings().next().expect("the binding stays");
    assert_eq!((binding.port, binding.state), (VM_PORT, State::Bound));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    // The attacker dies, and later the silent owner: neither is released.
    bench.lose(OTHER_PORT, PortLoss::Deleted);
    bench.pass(secs(600));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn a_lease_to_its_mac_at_another_port_is_settled_by_an_ack_and_not_by_frames() {
    let mut bench = settled();
    bench.lease(OTHER_PORT, VM, IP);
    bench.vm_talks = true;
    bench.pass(secs(120));
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    bench.pass(secs(120));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.lease(VM_PORT, VM, IP);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);

    // Or its old port goes, and it is found at the other one.
    bench.lease(OTHER_PORT, VM, IP);
    bench.vm_talks = false;
    let (port, loss) = (VM_PORT, PortLoss::Deleted);
    bench.lose(port, loss);
    bench.pass(Duration::from_millis(500));
    bench.evidence.elsewhere = Some((bench.now, OTHER_PORT));
    bench.pass(secs(1));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
    assert_eq!(bench.releases(), 0);
}

#[test]
fn who_asks_in_the_name_of_one_whose_renewal_was_lost_does_not_come_to_own_its_lease() {
    let mut bench = settled();
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 2,
    });
    // Its renewal was among them; it lives on, and is heard.
    bench.vm_talks = true;
    bench.pass(secs(3700));
    assert_eq!(bench.state(KEY), Some(State::Expired));
    bench.lease(OTHER_PORT, VM, IP);
    assert_eq!(
        bench.state(KEY),
        Some(State::Expired),
        "not the neighbour's"
    );
    bench.vm_talks = false;
    let (port, loss) = (OTHER_PORT, PortLoss::Deleted);
    bench.lose(port, loss);
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 0);
    // Once it renews by its own port, all is as before.
    bench.lease(VM_PORT, VM, IP);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
}

#[test]
fn one_that_was_seen_and_whose_ack_was_not_is_nobody_elses_either() {
    let mut bench = Bench::new(Policy {
        commit: Commit::Request,
        ..Policy::default()
    });
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.vm_talks = true;
    bench.pass(secs(5));
    bench.vm_talks = false;
    assert_eq!(bench.state(KEY), Some(State::Bound));
    // A neighbour asks in its name, and goes.
    bench.lease(OTHER_PORT, VM, IP);
    let binding = bench.engine.bindings().next().expect("one binding");
    assert_eq!(binding.port, VM_PORT);
    let (port, loss) = (OTHER_PORT, PortLoss::Deleted);
    bench.lose(port, loss);
    bench.pass(secs(600));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn its_macs_lease_beyond_the_uplink_is_a_conflict_until_it_speaks() {
    let mut bench = settled();
    bench.pass(secs(6));
    bench.port(UPLINK, "uplink0", Role::Uplink);
    let ack = Message {
        port: UPLINK,
        role: Role::Uplink,
        direction: Direction::FromPort,
        xid: 99,
        ..bench.ack(UPLINK, VM, IP)
    };
    bench.message(ack);
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.vm_talks = true;
    // Once it is dead nothing would end that.
    bench.pass(secs(2));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
}

#[test]
fn who_only_asked_for_an_address_does_not_share_it() {
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.lease(OTHER_PORT, OTHER, IP);
    assert_eq!(bench.verdict(Gate::Unique), Verdict::Pass);
}

/// What one of two clones has given back the other may ask for again, and is then not its only owner.
#[test]
fn a_lease_that_two_had_is_remembered_until_it_ends() {
    let mut bench = settled();
    bench.lease(OTHER_PORT, OTHER, IP);
    bench.gives_back(OTHER_PORT, OTHER, IP);
    assert_eq!(bench.state(KEY), Some(State::Withdrawn));
    bench.pass(secs(3500));
    assert_eq!(bench.state(KEY), Some(State::Withdrawn));
    bench.pass(secs(200));
    assert_eq!(bench.state(KEY), None);
}

#[test]
fn an_address_that_two_stations_were_given_is_never_released() {
    let mut bench = settled();
    bench.lease(OTHER_PORT, OTHER, IP);
    assert_eq!(bench.verdict(Gate::Unique), Verdict::Hold);
    // A renewal does not tell the other one's end either.
    bench.pass(secs(60));
    bench.lease(OTHER_PORT, OTHER, IP);
    bench.lose(OTHER_PORT, PortLoss::Deleted);
    bench.pass(secs(600));
    assert_eq!((bench.releases(), bench.state(KEY)), (0, Some(State::Gone)));
}

#[test]
fn what_was_never_granted_is_soon_forgotten() {
    let mut bench = Bench::new(Policy::default());
    for n in 1..=200 {
        let ip = Ipv4Addr::new(10, 0, 1, n);
        bench.message(bench.request(VM_PORT, VM, ip));
        bench.message(bench.nak(VM_PORT, VM, ip));
    }
    assert_eq!(bench.engine.bindings().count(), 200);
    bench.pass(secs(11));
    assert_eq!(bench.engine.bindings().count(), 0);
}

/// RFC 2131 section 4.3.2, and what clients make of it.
#[test]
fn what_is_asked_is_told_by_the_fields_that_are_there() {
    let bench = Bench::new(Policy::default());
    let other = Ipv4Addr::new(10, 0, 0, 2);
    let renewing = Ask::Renewing {
        ip: IP,
        server: SERVER,
    };
    let rebinding = Some(Ask::Rebinding { ip: IP });
    for (ciaddr, requested_ip, server_id, to, expected) in [
        (
            None,
            Some(IP),
            None,
            Ipv4Addr::BROADCAST,
            Some(Ask::InitReboot { ip: IP }),
        ),
        (Some(IP), None, None, SERVER, Some(renewing)),
        (Some(IP), None, None, Ipv4Addr::BROADCAST, rebinding),
        (Some(IP), Some(IP), None, SERVER, rebinding),
        (Some(IP), None, Some(SERVER), SERVER, rebinding),
        (Some(IP), Some(other), None, SERVER, None),
        (None, None, Some(SERVER), Ipv4Addr::BROADCAST, None),
        (None, None, None, Ipv4Addr::BROADCAST, None),
    ] {
        let message = Message {
            ciaddr,
            requested_ip,
            server_id,
            destination_ip: to,
            ..bench.request(VM_PORT, VM, IP)
        };
        assert_eq!(Ask::of(&message), expected, "{message:?}");
    }
}

#[test]
fn who_uses_anothers_mac_is_not_believed() {
    let bench = Bench::new(Policy::default());
    let own = bench.request(VM_PORT, VM, IP);
    assert_eq!(Speaker::of(&own), Speaker::Vm);
    let borrowed = Message {
        source_mac: OTHER,
        ..own
    };
    assert_eq!(Speaker::of(&borrowed), Speaker::Impostor);
}
