//! Leases that were told, and not seen on the wire.

use super::*;
use crate::core::{Import, ImportCount, Origin};

fn told(n: u8, mac: MacAddr) -> Import {
    Import {
        key: Key {
            ip: Ipv4Addr::new(10, 0, 0, n),
            ..KEY
        },
        chaddr: mac,
        client_id: Some(vec![1, 2, 3]),
        server: Some(SERVER),
        server_mac: Some(SERVER_MAC),
        expires: Some(Time::ZERO + secs(5000)),
    }
}

fn taken(count: u64) -> ImportCount {
    ImportCount {
        taken: count,
        ..ImportCount::default()
    }
}

fn import(bench: &mut Bench, imports: Vec<Import>) -> ImportCount {
    let count = bench.engine.import(imports, bench.now);
    bench.carry_out();
    count
}

fn is_hearsay(bench: &Bench) -> bool {
    bench.engine.imports().any(|binding| binding.key == KEY)
}

fn armed(bench: &Bench) -> i64 {
    let each = bench.seen.iter().map(|action| match action {
        Action::Arm { .. } => 1,
        Action::Disarm { .. } => -1,
        _ => 0,
    });
    each.sum()
}

#[test]
fn one_that_is_seen_alive_here_is_a_binding_and_can_be_released() {
    let mut bench = Bench::new(Policy::default());
    let found_at = bench.now + Policy::default().probe_wait;
    bench.lives_at = Some(VM_PORT);
    assert_eq!(import(&mut bench, vec![told(1, VM)]), taken(1));
    assert_eq!((bench.state(KEY), is_hearsay(&bench)), (None, true));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.pass(secs(2));
    assert_eq!(
        (bench.state(KEY), is_hearsay(&bench)),
        (Some(State::Bound), false)
    );
    assert_eq!(armed(&bench), 0);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
    let binding = bench.engine.bindings().next().expect("a binding");
    assert_eq!((binding.port, binding.origin), (VM_PORT, Origin::Imported));
    assert_eq!(binding.port_name, "vm1");
    assert_eq!(binding.server_mac, Some(SERVER_MAC));
    assert_eq!(binding.last_seen, Some(found_at), "when it was seen");
    assert_eq!(binding.since, found_at);
    bench.lives_at = None;
    bench.pass(secs(10));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(290));
    assert_eq!(
        bench.releases(),
        0,
        "no ACK was seen: it has the time of a silent one"
    );
    bench.pass(secs(20));
    assert_eq!(bench.releases(), 1);
    let release = bench.seen.iter().find_map(|action| match action {
        Action::Release { release, .. } => Some(release),
        _ => None,
    });
    assert_eq!(
        release.map(|r| r.client_id.clone()),
        Some(Some(vec![1, 2, 3]))
    );
}

#[test]
fn one_whose_vm_was_never_seen_is_never_released() {
    let mut bench = Bench::new(Policy::default());
    import(&mut bench, vec![told(1, VM)]);
    for round in 0..4 {
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.pass(secs(300));
        assert!(is_hearsay(&bench), "round {round}");
        assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
        bench.port(VM_PORT, "vm1", Role::Vm);
    }
    // At most once a minute.
    let searches = bench.engine.counters()["import_searches"];
    assert!((4..=21).contains(&searches), "{searches}");
    bench.pass(secs(5000));
    assert!(!is_hearsay(&bench), "its lease is over");
    assert_eq!((bench.releases(), armed(&bench)), (0, 0));
    assert_eq!(bench.engine.poll_timeout(), None);
}

#[test]
fn one_that_lives_elsewhere_or_at_two_places_is_not_ours() {
    bench_that_sees(|bench| {
        bench.port(UPLINK, "eth0", Role::Uplink);
        bench.lives_at = Some(UPLINK);
    });
    bench_that_sees(|bench| {
        bench.lives_at = Some(VM_PORT);
        bench.also_at = Some(OTHER_PORT);
    });
    // The address is somebody else's by now.
    bench_that_sees(|bench| {
        bench.lives_at = Some(VM_PORT);
        bench.address_of = Some(OTHER);
    });
    bench_that_sees(|bench| {
        bench.lives_at = Some(VM_PORT);
        bench.evidence.armed = false;
    });
    // Its MAC is there, and has another address.
    bench_that_sees(|bench| {
        bench.lives_at = Some(VM_PORT);
        bench.mac_only = true;
    });
}

fn bench_that_sees(world: impl FnOnce(&mut Bench)) {
    let mut bench = Bench::new(Policy::default());
    world(&mut bench);
    import(&mut bench, vec![told(1, VM)]);
    bench.pass(secs(30));
    assert_eq!((bench.state(KEY), is_hearsay(&bench)), (None, true));
    assert_eq!(armed(&bench), 0);
}

#[test]
fn what_the_wire_says_is_better() {
    let mut bench = settled();
    let known = ImportCount {
        known: 1,
        ..ImportCount::default()
    };
    assert_eq!(import(&mut bench, vec![told(1, OTHER)]), known);
    assert!(!is_hearsay(&bench));
    // An ACK takes the place of what was told, found or not.
    for found in [false, true] {
        let mut bench = Bench::new(Policy::default());
        bench.lives_at = found.then_some(VM_PORT);
        import(&mut bench, vec![told(1, VM)]);
        bench.pass(secs(2));
        bench.lives_at = None;
        bench.lease(OTHER_PORT, OTHER, IP);
        let binding = bench.engine.bindings().next().expect("a binding");
        assert_eq!((binding.chaddr, binding.origin), (OTHER, Origin::Wire));
        assert!(!is_hearsay(&bench));
    }
    // In the middle of a search, too.
    let mut bench = Bench::new(Policy::default());
    import(&mut bench, vec![told(1, VM)]);
    bench.lease(VM_PORT, VM, IP);
    bench.pass(secs(2));
    assert_eq!(
        (bench.state(KEY), is_hearsay(&bench)),
        (Some(State::Bound), false)
    );
    assert_eq!(armed(&bench), 0);
}

#[test]
fn a_vm_gives_up_its_own_and_no_neighbours() {
    let mut bench = Bench::new(Policy::default());
    import(&mut bench, vec![told(1, VM)]);
    let release = |bench: &Bench, mac| Message {
        kind: MessageType::Release,
        ciaddr: Some(IP),
        requested_ip: None,
        ..bench.request(OTHER_PORT, mac, IP)
    };
    bench.message(release(&bench, OTHER));
    assert!(is_hearsay(&bench), "a neighbour's word");
    // Nor does who asks for it end it.
    bench.message(bench.request(OTHER_PORT, OTHER, IP));
    bench.pass(secs(200));
    assert!(is_hearsay(&bench));
    bench.message(release(&bench, VM));
    assert!(!is_hearsay(&bench));
}

#[test]
fn they_are_bounded_and_looked_for_a_few_at_a_time() {
    let mut bench = Bench::new(Policy::default());
    let many = |from: u32| {
        let each = (from..from + 10_000).map(|n| Import {
            key: Key {
                ip: Ipv4Addr::from(0x0a10_0000 + n),
                ..KEY
            },
            ..told(1, VM)
        });
        each.collect::<Vec<_>>()
    };
    assert_eq!(import(&mut bench, many(0)), taken(10_000));
    let count = import(&mut bench, many(10_000));
    assert_eq!((count.taken, count.refused), (6384, 3616));
    let mut most = 0;
    for _ in 0..300 {
        bench.pass(secs(1));
        most = most.max(armed(&bench));
    }
    assert!((1..=64).contains(&most), "{most} at once");
    assert!(bench.engine.counters()["import_searches"] >= 16_384);
    let nonsense = [
        told(1, MacAddr::BROADCAST),
        told(1, MacAddr([0; 6])),
        told(254, VM),
    ];
    let mut bench = Bench::new(Policy::default());
    assert_eq!(import(&mut bench, nonsense.to_vec()).refused, 3);
}

#[test]
fn they_outlive_the_agent_as_what_they_are() {
    let mut bench = Bench::new(Policy::default());
    import(&mut bench, vec![told(1, VM)]);
    assert!(bench.saves.contains(&(KEY, Some(State::Requested))));
    let saved = bench.engine.saved(KEY).expect("it is kept");
    let mut next = Bench::new(Policy::default());
    next.engine.restore(vec![saved], next.now);
    next.carry_out();
    assert!(is_hearsay(&next));
    next.lives_at = Some(OTHER_PORT);
    next.pass(secs(2));
    assert_eq!(next.state(KEY), Some(State::Bound));
    let saved = next.engine.saved(KEY).expect("it is kept");
    assert_eq!((saved.origin, saved.seen_alive), (Origin::Imported, true));
}

fn searches(bench: &Bench) -> u64 {
    bench.engine.counters()["import_searches"]
}

#[test]
fn who_is_told_of_and_who_is_known_are_two() {
    let mut bench = Bench::new(Policy::default());
    import(&mut bench, vec![told(1, VM)]);
    assert_eq!(bench.engine.told_of(), [(SEGMENT, VM)].into());
    assert!(!bench.engine.knows(SEGMENT, VM));
    bench.lease(VM_PORT, VM, IP);
    assert!(bench.engine.told_of().is_empty());
    assert!(bench.engine.knows(SEGMENT, VM));
    assert!(!bench.engine.knows(SEGMENT, OTHER));
    bench.gives_back(VM_PORT, VM, IP);
    assert!(!bench.engine.knows(SEGMENT, VM), "it has given it up");
}

#[test]
fn what_is_told_without_a_vlan_is_of_the_bridges_own() {
    let mut bench = Bench::new(Policy::default());
    bench.tell(Event::SegmentVlans {
        segment: SEGMENT,
        own: Some(Vlans {
            pvid: 5,
            members: vec![(5, 5, true), (7, 7, false)],
            tunnel: false,
        }),
    });
    let tagged = Key { vlan: 7, ..KEY };
    let other = Import {
        key: tagged,
        ..told(1, OTHER)
    };
    import(&mut bench, vec![told(1, VM), other]);
    let keys: Vec<Key> = bench.engine.imports().map(|it| it.key).collect();
    assert_eq!(keys, [Key { vlan: 5, ..KEY }, tagged]);
}

#[test]
fn what_was_told_is_counted_as_what_it_is() {
    let counts = |world: fn(&mut Bench)| {
        let mut bench = Bench::new(Policy::default());
        world(&mut bench);
        import(&mut bench, vec![told(1, VM)])
    };
    let known = ImportCount {
        known: 1,
        ..ImportCount::default()
    };
    let refused = |bench: &Bench| Message {
        kind: MessageType::Nak,
        yiaddr: None,
        ..bench.ack(VM_PORT, VM, IP)
    };
    let given_back = |bench: &Bench| Message {
        kind: MessageType::Release,
        ciaddr: Some(IP),
        requested_ip: None,
        ..bench.request(VM_PORT, VM, IP)
    };
    assert_eq!(counts(|_| {}), taken(1));
    let over = Import {
        expires: Some(Time::ZERO + secs(1000)),
        ..told(1, VM)
    };
    let over = import(&mut Bench::new(Policy::default()), vec![over]);
    assert_eq!((over.over, over.taken), (1, 0));
    let asked = counts(|bench| bench.message(bench.request(VM_PORT, VM, IP)));
    assert_eq!(asked, known);
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(refused(&bench));
    assert_eq!(bench.state(KEY), Some(State::Refused));
    assert_eq!(import(&mut bench, vec![told(1, VM)]), taken(1));

    let mut bench = settled();
    bench.message(given_back(&bench));
    assert_eq!(import(&mut bench, vec![told(1, VM)]), known, "granted once");

    let mut bench = Bench::new(Policy::default());
    bench.lives_at = Some(VM_PORT);
    import(&mut bench, vec![told(1, VM)]);
    bench.pass(secs(2));
    bench.message(given_back(&bench));
    assert_eq!(bench.state(KEY), Some(State::Withdrawn));
    assert_eq!(import(&mut bench, vec![told(1, VM)]), known, "told once");
    assert_eq!(bench.engine.counters()["imports_taken"], 1);
}

#[test]
fn what_was_seen_before_the_search_is_no_answer_to_it() {
    let mut bench = Bench::new(Policy::default());
    bench.evidence.elsewhere = Some((bench.now, VM_PORT));
    bench.now = bench.now + secs(1);
    import(&mut bench, vec![told(1, VM)]);
    bench.pass(secs(2));
    let followed = |action: &Action| {
        matches!(
            action,
            Action::Look {
                own_port: Some(_),
                ..
            }
        )
    };
    assert!(!bench.seen.iter().any(followed), "{:?}", bench.seen);
    // Nor where nobody counted.
    bench.lives_at = Some(VM_PORT);
    bench.evidence = Evidence::default();
    bench.pass(secs(120));
    assert!(searches(&bench) > 1);
    assert!(!bench.seen.iter().any(followed), "{:?}", bench.seen);
    bench.evidence = Evidence {
        armed: true,
        elsewhere: Some((Time::ZERO + secs(1000), VM_PORT)),
        ..Evidence::default()
    };
    // Nor does a stranger who had the address then contradict it.
    bench.evidence.address = bench.evidence.elsewhere.map(|(at, _)| (at, OTHER));
    bench.lives_at = None;
    bench.pass(secs(120));
    assert_eq!(bench.engine.counters()["imports_contradicted"], 0);
}

#[test]
fn a_full_port_takes_no_more_of_them() {
    for room in [1, 2] {
        let mut bench = Bench::new(Policy {
            bindings_per_port: room,
            ..Policy::default()
        });
        bench.lease(VM_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
        bench.lives_at = Some(VM_PORT);
        import(&mut bench, vec![told(1, VM)]);
        bench.pass(secs(2));
        assert_eq!(bench.state(KEY).is_some(), room == 2);
        assert_eq!(is_hearsay(&bench), room == 1);
    }
}

/// A REQUEST for the address has the watch of it, and may come to nothing.
#[test]
fn a_search_ends_for_a_question_and_goes_on_after_it() {
    let mut bench = Bench::new(Policy::default());
    import(&mut bench, vec![told(1, VM)]);
    assert_eq!(armed(&bench), 1);
    bench.message(bench.request(VM_PORT, VM, IP));
    assert_eq!(armed(&bench), 0);
    assert!(is_hearsay(&bench));
}

#[test]
fn a_port_that_comes_has_those_of_its_segment_looked_for_sooner() {
    let wait = Policy::default().probe_wait;
    for (segment, sooner) in [(SEGMENT, true), (2, false)] {
        let mut bench = Bench::new(Policy::default());
        import(&mut bench, vec![told(1, VM)]);
        // Each search that finds nothing makes the pause longer: 60, 120, 180 s.
        bench.pass(wait + secs(60) + wait + secs(120) + wait);
        assert_eq!(searches(&bench), 3);
        bench.pass(secs(10));
        bench.tell(Event::PortUp(Port {
            ifindex: 31,
            name: "new".to_owned(),
            segment,
            role: Role::Vm,
        }));
        bench.pass(secs(49));
        assert_eq!(searches(&bench), 3, "a minute is between two");
        bench.pass(secs(1));
        assert_eq!(searches(&bench), 3 + u64::from(sooner));
    }
    // While it is looked for, another port begins nothing anew.
    let mut bench = Bench::new(Policy::default());
    import(&mut bench, vec![told(1, VM)]);
    bench.pass(wait + secs(60));
    assert_eq!(searches(&bench), 2);
    bench.port(31, "new", Role::Vm);
    bench.engine.handle_timeout(bench.now + wait);
    assert_eq!(searches(&bench), 2);
    // Who waits for no longer than that waits no longer for it.
    let mut bench = Bench::new(Policy::default());
    import(&mut bench, vec![told(1, VM)]);
    bench.pass(wait + secs(30));
    bench.port(31, "new", Role::Vm);
    bench.pass(secs(30));
    assert_eq!(searches(&bench), 2);
    // And where nobody is looked for, a port wakes nobody.
    let mut bench = Bench::new(Policy::default());
    bench.port(31, "new", Role::Vm);
    assert_eq!(bench.engine.poll_timeout(), None);
}

#[test]
fn a_refusal_ends_what_was_told_of_whom_it_refuses() {
    let vlan = |message: Message, vlan| Message { vlan, ..message };
    let refusal = |bench: &Bench, port, mac| Message {
        kind: MessageType::Nak,
        yiaddr: None,
        ..bench.ack(port, mac, IP)
    };
    let mut bench = Bench::new(Policy::default());
    import(&mut bench, vec![told(1, VM)]);
    bench.message(refusal(&bench, OTHER_PORT, OTHER));
    bench.message(vlan(refusal(&bench, VM_PORT, VM), 7));
    assert!(is_hearsay(&bench));
    bench.message(refusal(&bench, VM_PORT, VM));
    assert!(!is_hearsay(&bench));
}
