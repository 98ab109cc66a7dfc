//! What became of a RELEASE, and who speaks after it.

use super::*;

fn answered(bench: &mut Bench, server: Ipv4Addr, answer: QueryAnswer) {
    bench.tell(Event::Queried {
        key: KEY,
        server,
        answer,
    });
}

/// The same of one of a crowd.
fn answered_of(bench: &mut Bench, n: u16, server: Ipv4Addr, answer: QueryAnswer) {
    let (.., ip, _) = nth(n);
    bench.tell(Event::Queried {
        key: Key { ip, ..KEY },
        server,
        answer,
    });
}

/// Whether something newer than the RELEASE was seen; `None`: nobody looks any more.
fn closed(bench: &Bench) -> Option<bool> {
    let vigil = bench.engine.binding(KEY).and_then(|it| it.vigil);
    vigil.map(|vigil| vigil.closed)
}

/// Many VMs, each at a port of its own; `servers`: each has its own server, too.
fn crowd(count: u16, servers: bool) -> Bench {
    let mut bench = Bench::new(Policy {
        breaker: None,
        rate: 10_000,
        burst: 10_000,
        ..Policy::default()
    });
    lease_all(&mut bench, count, servers);
    bench.pass(secs(5));
    bench
}

fn nth(n: u16) -> (IfIndex, MacAddr, Ipv4Addr, Ipv4Addr) {
    let [high, low] = n.to_be_bytes();
    (
        1000 + u32::from(n),
        MacAddr([2, 0, 0, 7, high, low]),
        Ipv4Addr::new(10, 7, high, low),
        Ipv4Addr::new(10, 8, high, low),
    )
}

fn lease_all(bench: &mut Bench, count: u16, servers: bool) {
    for n in 0..count {
        lease_from(bench, n, if servers { nth(n).3 } else { SERVER });
    }
}

fn lease_from(bench: &mut Bench, n: u16, server: Ipv4Addr) {
    let (port, mac, ip, _) = nth(n);
    bench.port(port, &format!("vm{n}"), Role::Vm);
    for message in [bench.request(port, mac, ip), bench.ack(port, mac, ip)] {
        bench.message(Message {
            server_id: Some(server),
            ..message
        });
    }
}

fn all_die(bench: &mut Bench, count: u16) {
    for n in 0..count {
        bench.lose(nth(n).0, PortLoss::Deleted);
    }
}

#[test]
fn so_many_are_looked_after_at_once_and_others_after_them() {
    const ROUND: u16 = 400;
    let mut bench = crowd(0, false);
    for _ in 0..6 {
        lease_all(&mut bench, ROUND, false);
        bench.pass(secs(5));
        all_die(&mut bench, ROUND);
        bench.pass(secs(70));
        bench.seen.clear();
    }
    let counters = bench.engine.counters();
    assert_eq!(counters["releases_sent"], 6 * u64::from(ROUND));
    assert_eq!(counters["vigils_refused"], 0);

    let mut bench = crowd(2049, false);
    all_die(&mut bench, 2049);
    bench.pass(secs(10));
    let counters = bench.engine.counters();
    assert_eq!(counters["releases_sent"], 2049);
    assert_eq!(counters["vigils_refused"], 1);
}

#[test]
fn what_was_seen_since_closes_it_and_what_was_seen_before_does_not() {
    let mut bench = released(None);
    let before = Time::ZERO + secs(1);
    bench.evidence.elsewhere = Some((before, OTHER_PORT));
    bench.evidence.own_at = Some(before);
    bench.pass(secs(2));
    assert_eq!(closed(&bench), Some(false));
    bench.evidence.own_at = Some(bench.now);
    bench.pass(secs(2));
    assert_eq!(closed(&bench), Some(true));
    bench.evidence.own_at = None;
    bench.pass(secs(2));
    assert_eq!(closed(&bench), Some(true));
}

#[test]
fn whoever_else_has_the_address_is_no_alarm() {
    let mut bench = released(None);
    bench.evidence.address = Some((bench.now, OTHER));
    bench.pass(secs(2));
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 0);
    assert_eq!(closed(&bench), None);
}

fn alarm(segment: u32, mac: MacAddr, port: IfIndex, port_name: &str) -> SavedAlarm {
    SavedAlarm {
        id: AlarmId { segment, mac },
        port,
        port_name: port_name.to_owned(),
    }
}

#[test]
fn an_alarm_holds_its_mac_and_its_port_and_nobody_else() {
    let held = |alarm: SavedAlarm| {
        let mut bench = settled();
        bench.engine.restore_alarms(vec![alarm]);
        bench.verdict(Gate::Confirmed) == Verdict::Hold
    };
    assert!(held(alarm(SEGMENT, VM, OTHER_PORT, "vm2")), "its MAC");
    assert!(held(alarm(SEGMENT, OTHER, VM_PORT, "vm1")), "its port");
    assert!(!held(alarm(SEGMENT, OTHER, OTHER_PORT, "vm2")));
    assert!(!held(alarm(2, VM, OTHER_PORT, "vm2")));
    // Two whose ports are not known have no port in common.
    let mut bench = settled();
    bench
        .engine
        .restore_alarms(vec![alarm(SEGMENT, OTHER, 99, "gone")]);
    let next = after_restart(&bench, &[(OTHER_PORT, "vm2")]);
    assert_eq!(next.engine.binding(KEY).map(|it| it.port), Some(0));
    let mut with_alarm = next.engine.clone();
    with_alarm.restore_alarms(vec![alarm(SEGMENT, OTHER, 99, "gone")]);
    assert_eq!(
        with_alarm.explain(KEY, next.now),
        next.engine.explain(KEY, next.now)
    );
}

#[test]
fn so_many_alarms_are_kept_and_one_that_is_may_come_again() {
    let mut bench = Bench::new(Policy::default());
    let of = |n: u16| {
        let (_, mac, ..) = nth(n);
        alarm(SEGMENT, mac, VM_PORT, "vm1")
    };
    let refused = |bench: &Bench| bench.engine.counters()["alarms_refused"];
    bench.engine.restore_alarms((0..4096).map(of).collect());
    bench.engine.restore_alarms(vec![of(0)]);
    assert_eq!(refused(&bench), 0);
    bench.engine.restore_alarms(vec![of(4096)]);
    assert_eq!(refused(&bench), 1);
    assert_eq!(bench.engine.saved_alarm(of(4096).id), None);
}

#[test]
fn who_boots_anew_is_not_looked_after_and_who_only_speaks_of_it_closes_it() {
    let says = |change: fn(Message) -> Message| {
        let mut bench = released(None);
        let discover = Message {
            kind: MessageType::Discover,
            requested_ip: None,
            server_id: None,
            ..bench.request(OTHER_PORT, VM, IP)
        };
        bench.message(change(discover));
        assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 0);
        closed(&bench)
    };
    assert_eq!(says(|its_own| its_own), None);
    let impostor = says(|its_own| Message {
        source_mac: OTHER,
        ..its_own
    });
    assert_eq!(impostor, Some(true));
    let another = says(|its_own| Message {
        chaddr: OTHER,
        source_mac: OTHER,
        requested_ip: Some(IP),
        ..its_own
    });
    assert_eq!(another, Some(true));
    let of_another_address = says(|its_own| Message {
        kind: MessageType::Inform,
        ciaddr: Some(Ipv4Addr::new(10, 0, 0, 9)),
        ..its_own
    });
    assert_eq!(of_another_address, Some(true));
}

#[test]
fn who_asks_next_stands_for_the_release_that_nobody_knows_of() {
    for (answer, after) in [
        (None, Some(VM)),
        (Some(QueryAnswer::Active(Some(OTHER))), None),
        (Some(QueryAnswer::Unassigned), None),
    ] {
        let mut bench = released(answer);
        bench.pass(secs(2));
        bench.message(bench.request(OTHER_PORT, OTHER, IP));
        let asked = bench.engine.binding(KEY).map(|it| (it.chaddr, it.after));
        assert_eq!(asked, Some((OTHER, after)), "{answer:?}");
    }
    // And one that was never released stands for nothing.
    let mut bench = settled();
    bench.gives_back(VM_PORT, VM, IP);
    bench.message(bench.request(OTHER_PORT, OTHER, IP));
    assert_eq!(bench.engine.binding(KEY).map(|it| it.after), Some(None));
}

/// An ACK to somebody beyond the uplink: it tells of the RELEASE, if one was sent.
#[test]
fn a_lease_to_another_verifies_what_was_sent_and_nothing_else() {
    for (sent, mac, verified) in [
        (ReleaseOutcome::Sent, OTHER, 1),
        (ReleaseOutcome::Sent, VM, 0),
        (ReleaseOutcome::DryRun, OTHER, 0),
    ] {
        let mut bench = settled();
        bench.lease_query = None;
        bench.outcome = sent;
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.pass(secs(5));
        assert_eq!(bench.state(KEY), Some(State::Released));
        bench.port(UPLINK, "eth0", Role::Uplink);
        bench.ack_beyond(mac, IP);
        assert_eq!(
            count(&bench, NoticeKind::Verified),
            verified,
            "{sent:?} {mac}"
        );
        assert_eq!(closed(&bench), None);
    }
}

#[test]
fn an_answer_counts_from_the_server_that_was_asked_and_for_what_was_released() {
    let mut bench = released(None);
    answered(&mut bench, OTHER_SERVER, QueryAnswer::Unassigned);
    assert_eq!(outcome(&bench), Some(Outcome::Unverified));
    answered(&mut bench, SERVER, QueryAnswer::Active(Some(OTHER)));
    assert_eq!(outcome(&bench), Some(Outcome::Verified));
    let mut bench = settled();
    answered(&mut bench, SERVER, QueryAnswer::Unassigned);
    assert_eq!(outcome(&bench), None);
}

#[test]
fn a_server_that_nobody_knows_is_asked_one_question_at_a_time() {
    let mut bench = crowd(3, false);
    bench.lease_query = None;
    all_die(&mut bench, 3);
    bench.pass(secs(10));
    assert_eq!(bench.releases(), 3);
    assert_eq!(bench.queries(), 1);
    // It answers: the others are asked too, and nobody waits for the one before.
    answered_of(&mut bench, 0, SERVER, QueryAnswer::Unassigned);
    bench.pass(secs(2));
    assert_eq!(bench.queries(), 3);
}

/// Two questions are lost, and the second finds that the server is being left alone already.
#[test]
fn who_is_busy_for_a_moment_is_asked_again_for_each() {
    let mut bench = crowd(3, false);
    bench.lease_query = None;
    all_die(&mut bench, 3);
    bench.pass(secs(10));
    answered_of(&mut bench, 0, SERVER, QueryAnswer::Unassigned);
    bench.pass(secs(2));
    for n in [1, 2] {
        answered_of(&mut bench, n, SERVER, QueryAnswer::Silence);
    }
    bench.lease_query = Some(QueryAnswer::Unassigned);
    bench.pass(secs(7));
    assert_eq!(bench.engine.counters()["releases_verified"], 3);
}

/// However many there are, one that is known to answer is asked.
#[test]
fn one_that_answers_is_asked_for_each_where_no_other_is_asked() {
    let mut bench = crowd(64, true);
    let (.., first) = nth(0);
    for n in [64, 65] {
        lease_from(&mut bench, n, first);
    }
    bench.pass(secs(5));
    bench.lease_query = None;
    all_die(&mut bench, 66);
    bench.pass(secs(20));
    assert_eq!((bench.releases(), bench.queries()), (66, 64));
    answered_of(&mut bench, 0, first, QueryAnswer::Unassigned);
    bench.pass(secs(2));
    assert_eq!(bench.queries(), 66);
}

#[test]
fn so_many_servers_are_asked_at_once() {
    let mut bench = crowd(65, true);
    bench.lease_query = None;
    all_die(&mut bench, 65);
    bench.pass(secs(30));
    assert_eq!(bench.releases(), 65);
    assert_eq!(bench.queries(), 64);
}

/// One that does not answer is left alone for an hour, and not for a moment longer.
#[test]
fn the_silent_are_left_alone_for_an_hour_and_forgotten_after_it() {
    let hour = secs(3600);
    let moment = Duration::from_nanos(1);
    // Dies shortly before it is over, and is looked after at its end.
    let look = |silent: &dyn Fn(&mut Bench), after: Duration| {
        let mut bench = settled();
        bench.lease_query = None;
        let began = bench.now;
        silent(&mut bench);
        bench.vm_talks = true;
        bench.pass(secs(1800));
        bench.lease(VM_PORT, VM, IP);
        bench.pass(secs(1790));
        bench.vm_talks = false;
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.pass((began + hour).since(bench.now) - moment);
        let evidence = Event::Evidence {
            key: KEY,
            evidence: bench.evidence,
        };
        bench.now = began + after;
        bench.tell(evidence);
        assert_eq!(bench.releases(), 1);
        bench.queries()
    };
    let all_others = |bench: &mut Bench| {
        for n in 0..64 {
            answered(bench, nth(n).3, QueryAnswer::Silence);
        }
    };
    let itself = |bench: &mut Bench| answered(bench, SERVER, QueryAnswer::Silence);
    for (after, asked) in [(hour - moment, 0), (hour, 1)] {
        assert_eq!(look(&all_others, after), asked, "{after:?}");
        assert_eq!(look(&itself, after), asked, "{after:?}");
    }
    assert_eq!(look(&|_| {}, hour - moment), 1);
}

#[test]
fn no_answer_makes_a_second_release_where_nobody_looks() {
    let mut bench = released(None);
    bench.evidence.armed = false;
    bench.pass(secs(2));
    answered(&mut bench, SERVER, QueryAnswer::Active(Some(VM)));
    assert_eq!(count(&bench, NoticeKind::Held), 1);
    assert_eq!(bench.releases(), 1);
}

/// A port came: whoever was released is asked behind it, once in the time that an answer takes.
#[test]
fn before_a_repetition_each_question_has_its_time() {
    let mut bench = released(None);
    bench.pass(secs(2));
    bench.port(13, "late", Role::Vm);
    let probes = bench.probes();
    for (after, asked) in [(0, 1), (1, 1), (998, 1), (1, 2)] {
        bench.now = bench.now + Duration::from_millis(after);
        answered(&mut bench, SERVER, QueryAnswer::Active(Some(VM)));
        assert_eq!(bench.probes(), probes + asked, "{after}");
    }
    assert_eq!(bench.releases(), 1);
}

#[test]
fn a_release_that_nobody_speaks_of_is_unverified() {
    let mut bench = released(Some(QueryAnswer::Silence));
    bench.pass(secs(300));
    assert_eq!(outcome(&bench), Some(Outcome::Unverified));
    assert_eq!(
        (bench.releases(), count(&bench, NoticeKind::Verified)),
        (1, 0)
    );
    assert_eq!(
        bench
            .seen
            .iter()
            .filter(|a| matches!(a, Action::Query { .. }))
            .count(),
        1
    );
    bench.pass(secs(400));
    assert_eq!(bench.state(KEY), None, "forgotten in the end");
}

#[test]
fn the_watch_over_a_released_address_ends() {
    let mut bench = released(None);
    let disarms = |bench: &Bench| {
        let all = bench.seen.iter();
        all.filter(|a| matches!(a, Action::Disarm { .. })).count()
    };
    assert_eq!(disarms(&bench), 0);
    bench.pass(secs(61));
    assert_eq!(disarms(&bench), 1);
    let looks = bench.seen.len();
    bench.pass(secs(60));
    assert_eq!(bench.seen.len(), looks, "nothing is done any more");
}

#[test]
fn a_server_that_does_not_answer_is_not_asked_again() {
    let mut bench = Bench::new(Policy::default());
    bench.lease(VM_PORT, VM, IP);
    bench.lease(OTHER_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.pass(secs(5));
    for port in [VM_PORT, OTHER_PORT] {
        bench.lose(port, PortLoss::Deleted);
        bench.pass(secs(30));
    }
    assert_eq!(bench.releases(), 2);
    let queries = bench
        .seen
        .iter()
        .filter(|a| matches!(a, Action::Query { .. }));
    assert_eq!(queries.count(), 1);
}

#[test]
fn a_server_that_has_answered_is_asked_again_soon() {
    let mut bench = Bench::new(Policy::default());
    let others = Ipv4Addr::new(10, 0, 0, 2);
    bench.lease(VM_PORT, VM, IP);
    bench.lease(OTHER_PORT, OTHER, others);
    bench.lease_query = Some(QueryAnswer::Unassigned);
    bench.pass(secs(5));
    let lost = |port| Event::PortDown {
        port,
        loss: PortLoss::Deleted,
    };
    bench.tell(lost(VM_PORT));
    bench.pass(secs(5));
    assert_eq!(bench.queries(), 1);
    // It is busy for a moment.
    bench.lease_query = Some(QueryAnswer::Silence);
    bench.tell(lost(OTHER_PORT));
    bench.pass(secs(5));
    assert_eq!(bench.queries(), 2);
    let mut ends = bench.engine.clone();
    bench.lease_query = Some(QueryAnswer::Unassigned);
    bench.pass(secs(6));
    assert_eq!(bench.queries(), 3);
    let of = |bench: &Bench| bench.engine.bindings_of(others).next()?.outcome;
    assert_eq!(of(&bench), Some(Outcome::Verified));
    // It does not come back.
    std::mem::swap(&mut bench.engine, &mut ends);
    bench.lease_query = Some(QueryAnswer::Silence);
    bench.pass(secs(50));
    assert_eq!(bench.queries(), 4);
    assert_eq!(of(&bench), Some(Outcome::Unverified));
}

#[test]
fn a_server_that_says_nobody_has_it_verifies() {
    let mut bench = released(Some(QueryAnswer::Unassigned));
    bench.pass(secs(2));
    assert_eq!(outcome(&bench), Some(Outcome::Verified));
    let order: Vec<_> = bench.notices().into_iter().rev().take(2).collect();
    assert_eq!(order, [NoticeKind::Verified, NoticeKind::Released]);
}

#[test]
fn a_server_that_gives_it_to_somebody_else_verifies() {
    let mut bench = released(None);
    bench.lease(OTHER_PORT, OTHER, IP);
    assert_eq!(count(&bench, NoticeKind::Verified), 1);
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(outcome(&bench), None, "the new lease has none");
    bench.pass(secs(70));
    assert_eq!(
        (bench.releases(), count(&bench, NoticeKind::ReleasedAlive)),
        (1, 0)
    );
}

#[test]
fn before_a_repetition_a_port_that_has_come_is_asked_too() {
    let mut bench = released(None);
    bench.lease_query = Some(QueryAnswer::Active(Some(VM)));
    let probes = bench.probes();
    bench.port(13, "late", Role::Vm);
    let (came, mut dead) = (bench.now, bench.engine.clone());
    bench.pass(Duration::from_millis(1050));
    assert_eq!((bench.releases(), bench.probes()), (1, probes + 1));
    bench.lives_at = Some(13);
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 1);
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 1);
    // The same, and nobody answers.
    std::mem::swap(&mut bench.engine, &mut dead);
    (bench.now, bench.lives_at) = (came, None);
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 1 + 2);
    assert_eq!(bench.engine.counters()["releases_ignored"], 3);
}

#[test]
fn a_lease_that_stays_active_is_released_three_times_at_most() {
    let mut bench = released(Some(QueryAnswer::Active(Some(VM))));
    bench.pass(secs(300));
    assert_eq!(bench.releases(), 3);
    assert_eq!(outcome(&bench), Some(Outcome::Ignored));
    assert_eq!(bench.engine.live(), 0);
}

#[test]
fn a_lease_that_stays_active_is_not_released_again_if_anything_newer_was_seen() {
    // A DISCOVER of its MAC at another port, before the answer comes.
    let mut bench = released(None);
    bench.pass(secs(2));
    bench.message(Message {
        kind: MessageType::Discover,
        requested_ip: None,
        server_id: None,
        ..bench.request(OTHER_PORT, VM, IP)
    });
    bench.tell(Event::Queried {
        key: KEY,
        server: SERVER,
        answer: QueryAnswer::Active(Some(VM)),
    });
    bench.pass(secs(70));
    assert_eq!(bench.releases(), 1);
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 0);

    // A frame of its MAC.
    let mut bench = released(None);
    bench.evidence.elsewhere = Some((bench.now, OTHER_PORT));
    bench.pass(secs(2));
    bench.tell(Event::Queried {
        key: KEY,
        server: SERVER,
        answer: QueryAnswer::Active(Some(VM)),
    });
    bench.pass(secs(70));
    assert_eq!(bench.releases(), 1);

    // The kernel saw one.
    let mut bench = released(None);
    bench.outcome = ReleaseOutcome::Vetoed;
    bench.pass(secs(2));
    for _ in 0..3 {
        bench.tell(Event::Queried {
            key: KEY,
            server: SERVER,
            answer: QueryAnswer::Active(Some(VM)),
        });
    }
    bench.pass(secs(70));
    assert_eq!(
        bench.releases(),
        2,
        "the second was dropped, and no third is tried"
    );
    assert_eq!(bench.engine.live(), 0);
}

#[test]
fn a_lease_that_stays_active_is_not_released_again_after_lost_records() {
    let mut bench = settled();
    bench.lease_query = None;
    bench.until(secs(1), |bench| bench.releases() > 0);
    bench.pass(secs(2));
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    bench.tell(Event::Queried {
        key: KEY,
        server: SERVER,
        answer: QueryAnswer::Active(Some(VM)),
    });
    bench.pass(secs(70));
    assert_eq!((bench.releases(), bench.engine.live()), (1, 0));
}

#[test]
fn the_released_alive_are_told_once_and_held_until_bound_again() {
    let mut bench = released(None);
    bench.evidence.address = Some((bench.now, VM));
    bench.pass(secs(30));
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 1);
    bench.evidence = Evidence {
        armed: true,
        ..Evidence::default()
    };
    // It has another address, from before, at another port: that is not released.
    let other = Key {
        ip: Ipv4Addr::new(10, 0, 0, 2),
        ..KEY
    };
    bench.lease(OTHER_PORT, OTHER, other.ip);
    assert!(bench.engine.explain(other, bench.now).is_some());
    bench.lease(OTHER_PORT, VM, IP);
    bench.pass(secs(5));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass, "bound again");
}

#[test]
fn a_vm_that_renews_what_was_released_is_alive() {
    let mut bench = released(None);
    bench.message(Message {
        ciaddr: Some(IP),
        requested_ip: None,
        server_id: None,
        source_ip: IP,
        destination_ip: SERVER,
        ..bench.request(OTHER_PORT, VM, IP)
    });
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 1);
}

#[test]
fn a_vm_that_boots_again_and_asks_is_no_alarm() {
    let mut bench = released(None);
    bench.evidence.elsewhere = Some((bench.now, OTHER_PORT));
    bench.pass(secs(2));
    bench.lease(OTHER_PORT, VM, IP);
    bench.evidence = Evidence {
        armed: true,
        ..Evidence::default()
    };
    bench.pass(secs(5));
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 0);
    assert_eq!(bench.state(KEY), Some(State::Bound));
}
