//! What the host plugs in and takes away.

use super::*;

fn down(bench: &mut Bench, port: IfIndex, loss: PortLoss) {
    bench.tell(Event::PortDown { port, loss });
}

fn up(bench: &mut Bench, ifindex: IfIndex, segment: u32, role: Role) {
    bench.tell(Event::PortUp(Port {
        ifindex,
        name: "vm1".to_owned(),
        segment,
        role,
    }));
}

fn reasons(bench: &Bench, kind: NoticeKind) -> Vec<String> {
    let notices = bench.seen.iter().filter_map(notice);
    let of_kind = notices.filter(|notice| notice.event == kind);
    of_kind.map(|notice| notice.reason.clone()).collect()
}

#[test]
fn a_new_name_is_saved_and_the_same_one_is_not() {
    let saves = |name: &str| {
        let mut bench = settled();
        bench.saves.clear();
        bench.port(VM_PORT, name, Role::Vm);
        bench.saves.len()
    };
    assert_eq!((saves("vm1"), saves("renamed")), (0, 1));
}

/// Behind a port whose DHCP is not heard another MAC may have the address: everybody is asked.
#[test]
fn where_there_was_a_port_aside_everybody_is_asked() {
    let asks_everybody = |ports: &[(IfIndex, Role)]| {
        let mut bench = settled();
        for (port, role) in ports {
            bench.port(*port, "other", *role);
        }
        down(&mut bench, VM_PORT, PortLoss::Deleted);
        bench.seen.iter().any(
            |action| matches!(action, Action::Control { probe } if probe.mac == MacAddr::BROADCAST),
        )
    };
    assert!(!asks_everybody(&[(31, Role::Vm)]));
    assert!(asks_everybody(&[(31, Role::Aside)]));
    assert!(asks_everybody(&[(31, Role::Aside), (32, Role::Vm)]));
    assert!(asks_everybody(&[(31, Role::Vm), (32, Role::Aside)]));
}

#[test]
fn that_a_bridge_is_gone_is_told_when_it_goes() {
    let mut bench = settled();
    for (there, told) in [(true, 0), (false, 1), (false, 1), (true, 1)] {
        bench.tell(Event::Bridge {
            segment: SEGMENT,
            there,
        });
        assert_eq!(count(&bench, NoticeKind::Held), told, "{there}");
    }
}

#[test]
fn after_a_suspension_leases_end_sooner_and_that_is_saved() {
    for (suspended, saved) in [(0, false), (5, true)] {
        let mut bench = settled();
        let before = bench.engine.binding(KEY).and_then(|it| it.expires);
        bench.saves.clear();
        bench.tell(Event::Overslept {
            suspended: secs(suspended),
        });
        let after = bench.engine.binding(KEY).and_then(|it| it.expires);
        assert_eq!(after.map(|at| at + secs(suspended)), before);
        assert_eq!(!bench.saves.is_empty(), saved, "{suspended}");
    }
}

#[test]
fn a_link_that_comes_back_elsewhere_takes_only_its_own_along() {
    // It went to another port while this one was nobody's.
    let mut bench = settled();
    down(&mut bench, VM_PORT, PortLoss::Detached);
    bench.lives_at = Some(OTHER_PORT);
    bench.pass(secs(11));
    let at = |bench: &Bench| bench.engine.binding(KEY).map(|it| (it.state, it.port));
    assert_eq!(at(&bench), Some((State::Bound, OTHER_PORT)));
    up(&mut bench, VM_PORT, 2, Role::Vm);
    assert_eq!(at(&bench), Some((State::Bound, OTHER_PORT)));
    // It stayed.
    let mut bench = settled();
    down(&mut bench, VM_PORT, PortLoss::Detached);
    up(&mut bench, VM_PORT, 2, Role::Vm);
    assert_eq!(bench.state(KEY), Some(State::Moved));
    // An index is given to another link, later: that one has nothing of it.
    let mut bench = settled();
    down(&mut bench, VM_PORT, PortLoss::Deleted);
    up(&mut bench, VM_PORT, 2, Role::Vm);
    assert_eq!(bench.state(KEY), Some(State::Silent));
}

#[test]
fn each_of_many_that_were_detached_may_be_deleted() {
    let mut bench = settled();
    bench.lease(OTHER_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.pass(secs(3));
    for loss in [PortLoss::Detached, PortLoss::Deleted] {
        for port in [VM_PORT, OTHER_PORT] {
            down(&mut bench, port, loss);
        }
    }
    bench.pass(secs(5));
    assert_eq!(bench.releases(), 2);
}

#[test]
fn a_port_that_is_told_again_begins_no_silence_anew() {
    let mut bench = settled();
    bench.pass(secs(200));
    assert_eq!(bench.state(KEY), Some(State::Silent));
    let watched_since = |bench: &Bench| match bench.engine.binding(KEY).map(|it| it.check) {
        Some(Check::Watching(watching)) => watching.armed_at,
        check => panic!("{check:?}"),
    };
    let before = watched_since(&bench);
    bench.port(VM_PORT, "vm1", Role::Vm);
    bench.pass(secs(2));
    assert_eq!(watched_since(&bench), before);
}

#[test]
fn lost_records_are_told_once_a_minute_and_all_of_them() {
    let mut bench = settled();
    let lose = |bench: &mut Bench, after: u64| {
        bench.now = bench.now + secs(after);
        bench.tell(Event::RecordsLost {
            port: VM_PORT,
            count: 2,
        });
        reasons(bench, NoticeKind::RecordsLost)
    };
    assert_eq!(lose(&mut bench, 0).len(), 1);
    assert_eq!(lose(&mut bench, 59).len(), 1);
    let told = lose(&mut bench, 1);
    assert_eq!(told.len(), 2);
    assert!(told[1].starts_with("4 records lost"), "{told:?}");
    assert_eq!(bench.engine.counters()["records_lost"], 6);
}

#[test]
fn how_a_port_was_lost_is_told() {
    for (loss, text) in [
        (PortLoss::Deleted, "deleted, 1 bindings"),
        (PortLoss::CarrierLost, "carrier lost, 1 bindings"),
        (PortLoss::LinkDown, "link down, 1 bindings"),
        (PortLoss::Detached, "detached from the bridge, 1 bindings"),
        (PortLoss::Unseen, "gone when the agent started, 1 bindings"),
    ] {
        let mut bench = settled();
        down(&mut bench, VM_PORT, loss);
        assert_eq!(reasons(&bench, NoticeKind::PortLost), [text]);
    }
}
