//! What the host plugs in and takes away.

use super::*;

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
        bench.lose(VM_PORT, PortLoss::Deleted);
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
    bench.lose(VM_PORT, PortLoss::Detached);
    bench.lives_at = Some(OTHER_PORT);
    bench.pass(secs(11));
    let at = |bench: &Bench| bench.engine.binding(KEY).map(|it| (it.state, it.port));
    assert_eq!(at(&bench), Some((State::Bound, OTHER_PORT)));
    up(&mut bench, VM_PORT, 2, Role::Vm);
    assert_eq!(at(&bench), Some((State::Bound, OTHER_PORT)));
    // It stayed.
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Detached);
    up(&mut bench, VM_PORT, 2, Role::Vm);
    assert_eq!(bench.state(KEY), Some(State::Moved));
    // An index is given to another link, later: that one has nothing of it.
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Deleted);
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
            bench.lose(port, loss);
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
    let before = bench.watching().armed_at;
    bench.port(VM_PORT, "vm1", Role::Vm);
    bench.pass(secs(2));
    assert_eq!(bench.watching().armed_at, before);
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
        bench.lose(VM_PORT, loss);
        assert_eq!(reasons(&bench, NoticeKind::PortLost), [text]);
    }
}

/// Proxmox and Incus take a port off its bridge before they delete it.
#[test]
fn a_port_that_is_detached_and_then_deleted_is_as_good_as_deleted() {
    let down = |loss| Event::PortDown {
        port: VM_PORT,
        loss,
    };
    for was_cut in [false, true] {
        let mut bench = settled();
        bench.tell(down(PortLoss::Detached));
        bench.pass(Duration::from_millis(500));
        if was_cut {
            // Nobody was heard meanwhile.
            for there in [false, true] {
                let segment = SEGMENT;
                bench.tell(Event::Bridge { segment, there });
            }
        }
        bench.tell(down(PortLoss::Deleted));
        bench.pass(Duration::from_millis(1900));
        assert_eq!(bench.releases(), 0, "the hold-down is that of its end");
        bench.pass(secs(5));
        assert_eq!(bench.releases(), usize::from(!was_cut));
        bench.pass(secs(300));
        assert_eq!(bench.releases(), 1);
    }
    // What lives by another port by now has nothing to do with it.
    let mut bench = settled();
    bench.tell(down(PortLoss::Detached));
    bench.lives_at = Some(OTHER_PORT);
    bench.pass(secs(11));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    bench.tell(down(PortLoss::Deleted));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 0);
    // Nor has one that is a port again.
    let mut bench = settled();
    bench.tell(down(PortLoss::Detached));
    bench.port(VM_PORT, "vm1", Role::Vm);
    bench.vm_talks = true;
    bench.pass(secs(1));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    bench.vm_talks = false;
    bench.tell(down(PortLoss::Deleted));
    bench.pass(secs(3));
    assert_eq!(bench.releases(), 1, "the port's end is told once");
}

fn unheard(mac: MacAddr) -> Event {
    Event::Unheard {
        segment: SEGMENT,
        macs: vec![mac],
    }
}

#[test]
fn whoever_spoke_at_a_port_that_was_not_heard_has_the_long_time() {
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(1));
    bench.port(13, "late", Role::Vm);
    bench.tell(unheard(VM));
    bench.pass(secs(299));
    assert_eq!(bench.releases(), 0);
    bench.pass(secs(3));
    assert_eq!(bench.releases(), 1);
    // It is nothing to anybody else.
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(1));
    bench.tell(unheard(OTHER));
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 1);
    // Who was not seen since, too; and who was, as ever.
    for is_seen in [false, true] {
        let mut bench = settled();
        bench.tell(unheard(VM));
        bench.vm_talks = is_seen;
        bench.pass(secs(40));
        bench.vm_talks = false;
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.pass(secs(5));
        assert_eq!(bench.releases(), usize::from(is_seen));
    }
}

#[test]
fn a_vm_that_is_plugged_in_restarts_nobodys_hold_down() {
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(1));
    bench.port(13, "new", Role::Vm);
    bench.tell(Event::PvidChanged { port: 13 });
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 1, "3 s, of which 2 s are the hold-down");

    let mut bench = settled();
    bench.lease(OTHER_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(1));
    // What was said by it was taken for another VLAN's.
    bench.tell(Event::PvidChanged { port: OTHER_PORT });
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn a_port_that_is_no_vms_any_more_takes_its_bindings_along() {
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Detached);
    bench.port(VM_PORT, "spare1", Role::Aside);
    assert_eq!(bench.state(KEY), Some(State::Moved));
    bench.pass(secs(2000));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn nothing_of_a_held_segment_is_released_until_all_was_looked_at_anew() {
    let mut bench = settled();
    let held = |reason: Option<&str>| Event::SegmentHeld {
        segment: SEGMENT,
        reason: reason.map(str::to_owned),
    };
    bench.tell(held(Some("why")));
    bench.tell(held(Some("why")));
    let told = |bench: &Bench| {
        bench
            .notices()
            .iter()
            .filter(|kind| **kind == NoticeKind::Held)
            .count()
    };
    assert_eq!(told(&bench), 1, "once");
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 0);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.tell(held(None));
    bench.pass(Duration::from_millis(1900));
    assert_eq!(bench.releases(), 0, "what was seen before counts no more");
    bench.pass(secs(30));
    assert_eq!(bench.releases(), 1);
}

#[test]
fn who_lost_its_port_while_the_bridge_was_gone_has_the_long_time() {
    let bridge = |there: bool| Event::Bridge {
        segment: SEGMENT,
        there,
    };
    let lost = Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    };
    for before in [true, false] {
        let mut bench = settled();
        if before {
            bench.tell(lost.clone());
            bench.pass(secs(1));
        }
        bench.tell(bridge(false));
        if !before {
            bench.tell(lost.clone());
        }
        bench.pass(secs(600));
        assert_eq!(bench.releases(), 0);
        assert_eq!(bench.verdict(Gate::Settled), Verdict::Hold);
        bench.tell(bridge(true));
        bench.pass(secs(250));
        assert_eq!(bench.releases(), 0, "it may have started there unheard");
        bench.pass(secs(120));
        assert_eq!(bench.releases(), 1);
    }
}

#[test]
fn on_a_bridge_that_filters_vlans_its_own_membership_is_needed() {
    let own = |vlans: &[(Vlan, Vlan, bool)]| Event::SegmentVlans {
        segment: SEGMENT,
        own: Some(Vlans {
            pvid: 0,
            members: vlans.to_vec(),
            tunnel: false,
        }),
    };
    let key = Key { vlan: 10, ..KEY };
    let mut bench = Bench::new(Policy::default());
    bench.tell(own(&[(1, 9, true)]));
    for vlan in [0, 10] {
        let request = bench.request(VM_PORT, VM, IP);
        bench.message(Message { vlan, ..request });
        let ack = bench.ack(VM_PORT, VM, IP);
        bench.message(Message { vlan, ..ack });
    }
    bench.pass(secs(5));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 0, "nobody could be asked");
    bench.tell(own(&[(1, 20, false)]));
    bench.pass(Duration::from_millis(1900));
    assert_eq!(bench.releases(), 0, "nobody was asked");
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 1);
    assert_eq!(bench.state(key), Some(State::Released));
    assert_eq!(bench.state(KEY), Some(State::Gone), "on no VLAN");
}

#[test]
fn a_port_of_another_vlan_takes_its_bindings_along() {
    let mut bench = settled();
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.tell(Event::PvidChanged { port: VM_PORT });
    assert_eq!(bench.state(KEY), Some(State::Moved));
    // Asked on the one VLAN, answered on the other.
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Moved));
    bench.pass(secs(2000));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn lost_records_hold_until_it_is_seen_again() {
    let mut bench = settled();
    bench.pass(secs(6));
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 3,
    });
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.vm_talks = true;
    bench.pass(secs(2));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
}

#[test]
fn leases_end_while_the_host_is_suspended() {
    let mut bench = settled();
    let suspended = secs(4000);
    bench.tell(Event::Overslept { suspended });
    bench.pass(secs(60));
    assert_eq!(bench.state(KEY), Some(State::Expired));
}
