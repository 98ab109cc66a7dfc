//! The search for a sign of life: what counts as one, and when somebody is asked.

use super::{memory::saved, *};
use crate::core::{
    Saved,
    binding::{Doubt, Origin, Watching},
};

fn at(bench: &Bench) -> Option<(State, IfIndex)> {
    bench.engine.binding(KEY).map(|it| (it.state, it.port))
}

fn doubt(bench: &Bench) -> Option<Doubt> {
    bench.engine.binding(KEY).and_then(|it| it.doubt)
}

fn look(bench: &mut Bench, evidence: Evidence) {
    bench.tell(Event::Evidence { key: KEY, evidence });
}

/// Nothing was heard of it for a while, and it has been asked.
fn looked_for() -> Bench {
    let mut bench = settled();
    bench.until(Duration::from_millis(100), |bench| bench.probes() > 0);
    bench
}

// ---- the port goes while its VM is being looked for ------------------------------------------

/// What was seen by then is looked at once more: whoever spoke elsewhere last is there.
#[test]
fn what_was_seen_last_before_its_port_went_counts() {
    let millis = Duration::from_millis;
    // When its own port and when another was heard, after the watch began.
    for (own, elsewhere, follows) in [
        (None, millis(10), true),
        (Some(millis(10)), millis(20), true),
        (Some(millis(10)), millis(10), false),
        (Some(millis(20)), millis(10), false),
    ] {
        let mut bench = looked_for();
        let since = bench.watching().armed_at;
        bench.now = since + millis(30);
        bench.evidence.own_at = own.map(|own| since + own);
        bench.evidence.address_at = bench.evidence.own_at;
        bench.evidence.elsewhere = Some((since + elsewhere, OTHER_PORT));
        bench.lose(VM_PORT, PortLoss::Deleted);
        let expected = if follows {
            (State::Bound, OTHER_PORT)
        } else {
            (State::Silent, VM_PORT)
        };
        assert_eq!(at(&bench), Some(expected), "{own:?} {elsewhere:?}");
    }
    // What was seen before the watch began says nothing.
    let mut bench = looked_for();
    bench.evidence.elsewhere = Some((Time::ZERO + secs(1), OTHER_PORT));
    bench.lose(VM_PORT, PortLoss::Deleted);
    assert_eq!(at(&bench), Some((State::Silent, VM_PORT)));
}

/// Somebody asks for its address while it is looked for, and is found to speak in its name.
#[test]
fn a_silence_that_begins_anew_begins_once() {
    let mut bench = looked_for();
    bench.evidence.elsewhere = Some((bench.now, OTHER_PORT));
    let probes = bench.probes();
    bench.message(bench.request(OTHER_PORT, OTHER, IP));
    assert_eq!(count(&bench, NoticeKind::Conflict), 1);
    assert_eq!(bench.probes(), probes + 1);
}

// ---- the cheap question ----------------------------------------------------------------------

/// Lets it be quiet until it is looked at; how often it was armed and asked by then.
fn glance(bench: &mut Bench) -> (usize, usize) {
    bench.seen.clear();
    bench.until(Duration::from_millis(10), |bench| bench.looks() > 0);
    (bench.arms(true) + bench.arms(false), bench.probes())
}

const LEFT_ALONE: (usize, usize) = (0, 0);
const LISTENED_FOR: (usize, usize) = (1, 0);
const ASKED: (usize, usize) = (1, 1);

#[test]
fn a_port_that_is_heard_tells_of_its_only_vm() {
    let mut bench = settled();
    bench.evidence.port_at = Some(bench.now);
    assert_eq!(glance(&mut bench), LEFT_ALONE);

    let mut bench = settled();
    bench.evidence.port_at = bench.engine.binding(KEY).and_then(|it| it.last_seen);
    assert_eq!(glance(&mut bench), ASKED, "it is no news");

    let mut bench = settled();
    bench.lease(VM_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.evidence.port_at = Some(bench.now + secs(1));
    assert_eq!(glance(&mut bench), LISTENED_FOR, "which of the two?");

    let mut bench = settled();
    bench.pass(secs(6));
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    bench.evidence.port_at = Some(bench.now);
    assert_eq!(glance(&mut bench), ASKED, "it may have another address");

    let mut bench = settled();
    bench.evidence.port_at = Some(bench.now);
    bench.now = bench.now + secs(1);
    bench.tell(Event::Overslept {
        suspended: Duration::ZERO,
    });
    assert_eq!(glance(&mut bench), ASKED, "it may have gone since");
}

/// Where a REQUEST alone was seen, a frame of whoever is behind the port says nothing of its address.
#[test]
fn a_port_that_is_heard_confirms_no_request() {
    for others in [0, 1] {
        let mut bench = Bench::new(Policy {
            commit: Commit::Request,
            ..Policy::default()
        });
        for n in 0..others {
            bench.lease(VM_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2 + n));
        }
        bench.pass(secs(5));
        let asked = Saved {
            acked: false,
            seen_alive: false,
            origin: Origin::Wire,
            ..saved(State::Requested)
        };
        bench.evidence.port_at = Some(bench.now);
        bench.engine.restore(vec![asked], bench.now);
        bench.carry_out();
        assert_eq!(glance(&mut bench), ASKED, "{others}");
        assert_eq!(bench.state(KEY), Some(State::Requested));
    }
}

// ---- what counts as life ---------------------------------------------------------------------

#[test]
fn its_mac_is_a_sign_of_who_is_bound_and_not_of_who_only_asked() {
    let mut bench = Bench::new(Policy {
        commit: Commit::Request,
        ..Policy::default()
    });
    bench.message(bench.request(VM_PORT, VM, IP));
    (bench.lives_at, bench.mac_only) = (Some(VM_PORT), true);
    bench.pass(secs(20));
    assert_eq!(bench.state(KEY), Some(State::Requested));

    let mut bench = looked_for();
    (bench.lives_at, bench.mac_only) = (Some(VM_PORT), true);
    bench.pass(secs(2));
    let check = bench.engine.binding(KEY).map(|it| it.check);
    assert_eq!(check, Some(Check::Idle));
}

/// Whose address it is at the new port: another MAC that the server knows by the same name is a clone.
#[test]
fn a_clone_that_has_the_address_elsewhere_shares_it() {
    let follow = |client_id: Option<Vec<u8>>, mac: MacAddr, is_old: bool| {
        let mut bench = Bench::new(Policy::default());
        bench.message(Message {
            client_id,
            ..bench.request(VM_PORT, VM, IP)
        });
        bench.message(bench.ack(VM_PORT, VM, IP));
        bench.pass(secs(5));
        bench.lose(VM_PORT, PortLoss::Deleted);
        let seen_at = if is_old { Time::ZERO } else { bench.now };
        let evidence = Evidence {
            elsewhere: Some((bench.now, OTHER_PORT)),
            address: Some((seen_at, mac)),
            ..bench.evidence
        };
        look(&mut bench, evidence);
        assert_eq!(at(&bench), Some((State::Bound, OTHER_PORT)));
        bench.engine.binding(KEY).map(|it| it.shared)
    };
    let name = || Some(vec![1, 2]);
    assert_eq!(follow(name(), OTHER, false), Some(true));
    assert_eq!(follow(name(), OTHER, true), Some(false));
    assert_eq!(follow(name(), VM, false), Some(false));
    assert_eq!(follow(None, OTHER, false), Some(false));
}

#[test]
fn an_uplink_that_was_heard_a_second_before_the_question_was_open() {
    let after = |moment: Duration| {
        let mut bench = settled_with_uplink();
        bench.lose(VM_PORT, PortLoss::Deleted);
        let probed_at = bench.watching().probed_at.expect("it was asked");
        bench.now = probed_at + secs(1);
        let heard_at = Time::from_nanos((probed_at.as_nanos()) - 1_000_000_000) + moment;
        let evidence = Evidence {
            uplink_at: Some(Time::from_nanos(heard_at.as_nanos() - 1)),
            ..bench.evidence
        };
        look(&mut bench, evidence);
        let Watching { deaf, probes, .. } = bench.watching();
        (deaf, probes)
    };
    assert_eq!(after(Duration::from_nanos(1)), (false, 1));
    assert_eq!(after(Duration::ZERO), (true, 0));
}

#[test]
fn a_conflict_ends_with_what_comes_after_it() {
    for (after, doubtful) in [(0, true), (1, false)] {
        let mut bench = settled();
        bench.message(bench.request(OTHER_PORT, OTHER, IP));
        assert_eq!(doubt(&bench), Some(Doubt::Conflict(bench.now)));
        bench.now = bench.now + Duration::from_nanos(after);
        bench.message(Message {
            kind: MessageType::Inform,
            requested_ip: None,
            server_id: None,
            ..bench.request(VM_PORT, VM, IP)
        });
        assert_eq!(doubt(&bench).is_some(), doubtful, "{after}");
    }
}

/// A row in the store for each VM that lives would be one for each look.
#[test]
fn that_it_was_seen_is_saved_where_something_hangs_on_it() {
    let saves = |acked, origin, seen_alive, doubt| {
        let mut bench = Bench::new(Policy::default());
        let known = Saved {
            acked,
            origin,
            seen_alive,
            doubt,
            shared: false,
            ..saved(State::Bound)
        };
        bench.engine.restore(vec![known], bench.now);
        bench.carry_out();
        bench.saves.clear();
        bench.vm_talks = true;
        bench.pass(secs(2));
        assert_eq!(
            bench
                .engine
                .binding(KEY)
                .map(|it| (it.check, it.seen_alive)),
            Some((Check::Idle, true))
        );
        bench.saves.len()
    };
    let lost = Some(Doubt::RecordsLost(Time::ZERO));
    assert_eq!(saves(true, Origin::Wire, false, None), 0);
    assert_eq!(saves(true, Origin::Wire, true, None), 0);
    assert_eq!(saves(true, Origin::Wire, true, lost), 1);
    assert_eq!(saves(true, Origin::Imported, false, None), 1);
    assert_eq!(saves(true, Origin::Imported, true, None), 0);
    assert_eq!(saves(false, Origin::Wire, false, None), 1);
    assert_eq!(saves(false, Origin::Wire, true, None), 0);
}

#[test]
fn a_request_that_is_confirmed_is_bound_once() {
    let mut bench = Bench::new(Policy {
        commit: Commit::Request,
        ..Policy::default()
    });
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.vm_talks = true;
    bench.pass(secs(200));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(count(&bench, NoticeKind::Bound), 1);
}

// ---- found elsewhere -------------------------------------------------------------------------

#[test]
fn what_a_new_port_lost_since_it_was_seen_there_is_in_doubt() {
    let moment = Duration::from_nanos(1);
    let seen = |at: fn(Time, Duration) -> Time| {
        let mut bench = settled();
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.now = bench.now + secs(1);
        bench.tell(Event::RecordsLost {
            port: OTHER_PORT,
            count: 1,
        });
        let lost_at = bench.now;
        bench.now = bench.now + Duration::from_millis(1);
        let evidence = Evidence {
            elsewhere: Some((at(lost_at, moment), OTHER_PORT)),
            ..bench.evidence
        };
        look(&mut bench, evidence);
        assert_eq!(self::at(&bench), Some((State::Bound, OTHER_PORT)));
        doubt(&bench).map(|doubt| doubt == Doubt::RecordsLost(lost_at))
    };
    let before = |lost_at: Time, moment: Duration| {
        Time::from_nanos(lost_at.as_nanos() - u64::from(moment.subsec_nanos()))
    };
    assert_eq!(seen(before), Some(true));
    assert_eq!(seen(|lost_at, _| lost_at), None);
    assert_eq!(seen(|lost_at, moment| lost_at + moment), None);
}

/// Its port was gone when the agent started: what it was given elsewhere nobody may have heard.
#[test]
fn who_is_found_elsewhere_after_a_start_holds_until_an_ack() {
    let mut bench = Bench::new(Policy::default());
    let known = Saved {
        port: 99,
        port_name: "gone".to_owned(),
        doubt: None,
        last_seen: Some(bench.now),
        ..saved(State::Bound)
    };
    bench.engine.restore(vec![known], bench.now);
    bench.carry_out();
    let evidence = Evidence {
        elsewhere: Some((bench.now, OTHER_PORT)),
        ..bench.evidence
    };
    look(&mut bench, evidence);
    assert_eq!(at(&bench), Some((State::Bound, OTHER_PORT)));
    assert_eq!(doubt(&bench), Some(Doubt::Contested));
}

// ---- when it is asked ------------------------------------------------------------------------

/// Three times within the hold-down, and once more a moment before it ends; however often one looks.
#[test]
fn with_an_uplink_the_last_question_comes_shortly_before_the_end() {
    let mut bench = settled_with_uplink();
    let before = bench.probes();
    bench.lose(VM_PORT, PortLoss::Deleted);
    let died_at = bench.now;
    let mut asked_at = vec![];
    let mut asked = before;
    for _ in 0..1_000 {
        if bench.releases() > 0 {
            break;
        }
        bench.pass_heard(Duration::from_millis(100));
        let evidence = bench.evidence;
        look(&mut bench, evidence);
        for _ in asked..bench.probes() {
            asked_at.push(bench.now.since(died_at).as_millis() / 100);
        }
        asked = bench.probes();
    }
    assert_eq!(asked_at, [1, 34, 67, 90]);
    assert_eq!(bench.now.since(died_at).as_millis() / 100, 100);
}

/// No answer can be there at the moment of the question.
#[test]
fn after_the_last_question_its_answer_is_waited_for() {
    let mut bench = settled_with_uplink();
    bench.lose(VM_PORT, PortLoss::Deleted);
    let asked = bench.probes();
    for _ in 0..100 {
        let Some(due) = bench.engine.poll_timeout() else {
            break;
        };
        bench.evidence.uplink_at = Some(due);
        bench.turn(due);
        if bench.probes() == asked + 3 {
            break;
        }
    }
    assert_eq!((bench.probes(), bench.releases()), (asked + 3, 0));
    assert!(bench.engine.poll_timeout() > Some(bench.now));
}

/// Of everybody as often as is needed, and for the last time before the hold-down ends: the way beyond
/// an uplink may have been cut meanwhile. Later only itself.
#[test]
fn everybody_is_asked_as_often_as_counts() {
    for (role, asked) in [(Role::Uplink, 3 + 1), (Role::Aside, 3)] {
        let mut bench = settled();
        bench.port(UPLINK, "eth0", role);
        bench.pass_heard(secs(10));
        bench.engine.pause("an upgrade".to_owned(), bench.now);
        bench.carry_out();
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.pass_heard(secs(60));
        let all = bench.count_of(
            |it| matches!(it, Action::Control { probe } if probe.mac == MacAddr::BROADCAST),
        );
        assert_eq!(all, asked, "{role:?}");
        assert!(bench.probes() > 5);
    }
}

#[test]
fn who_is_in_doubt_is_looked_at_soon_if_it_was_not_just_seen() {
    let due = |bench: &Bench| bench.engine.binding(KEY).and_then(|it| it.due);
    let lose = |bench: &mut Bench| {
        bench.tell(Event::RecordsLost {
            port: VM_PORT,
            count: 1,
        });
    };
    let leased = |seconds: u32| {
        let mut bench = Bench::new(Policy {
            silence: secs(100),
            ..Policy::default()
        });
        bench.message(bench.request(VM_PORT, VM, IP));
        bench.message(Message {
            lease_secs: Some(seconds),
            ..bench.ack(VM_PORT, VM, IP)
        });
        bench
    };
    let mut bench = leased(3600);
    bench.now = bench.now + Duration::from_millis(9_999);
    let before = due(&bench);
    lose(&mut bench);
    assert_eq!(due(&bench), before, "it was just seen");
    bench.now = bench.now + Duration::from_millis(1);
    lose(&mut bench);
    assert_eq!(due(&bench), Some(bench.now + secs(1)));
    // Its lease ends before that.
    let mut bench = leased(20);
    bench.now = bench.now + Duration::from_millis(19_500);
    let before = due(&bench);
    lose(&mut bench);
    assert_eq!(due(&bench), before);
    // It is being looked for already.
    let mut bench = leased(3600);
    bench.until(secs(1), |bench| bench.probes() >= 2);
    bench.pass(secs(2));
    let before = due(&bench);
    assert!(before > Some(bench.now + secs(1)));
    lose(&mut bench);
    assert_eq!(due(&bench), before);
}

/// Those that came together are not asked together, for ever.
#[test]
fn neighbours_that_were_seen_together_are_looked_at_apart() {
    let mut bench = Bench::new(Policy::default());
    bench.now = Time::from_nanos(bench.now.as_nanos() | u64::from(u32::MAX));
    for n in 0..=255 {
        let mac = MacAddr([2, 0, 0, 3, 0, n]);
        bench.lease(VM_PORT, mac, Ipv4Addr::new(10, 0, 3, n));
    }
    let due: std::collections::BTreeSet<_> = bench.engine.bindings().map(|it| it.due).collect();
    assert!(due.len() > 100, "{} of 256", due.len());
}

// ---- from quiet to silent, and back ------------------------------------------------------------

/// A port comes back, and whoever was behind it was seen elsewhere just before.
#[test]
fn what_was_seen_before_its_port_came_back_is_looked_at() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass(secs(10));
    bench.lose(VM_PORT, PortLoss::CarrierLost);
    bench.pass(Duration::from_millis(500));
    bench.lives_at = Some(UPLINK);
    bench.port(VM_PORT, "vm1", Role::Vm);
    assert_eq!(bench.state(KEY), Some(State::Moved));
}

#[test]
fn what_was_seen_is_looked_at_before_silence_begins_anew() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass(secs(5));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(1));
    // Its announcement from beyond, once; and then somebody claims its address.
    bench.evidence.elsewhere = Some((bench.now, UPLINK));
    bench.message(bench.request(OTHER_PORT, OTHER, IP));
    assert_eq!(bench.state(KEY), Some(State::Moved));
}

#[test]
fn with_an_uplink_the_hold_down_is_longer_and_the_uplink_must_be_heard() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass(secs(10));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(30));
    assert_eq!(bench.releases(), 0, "the uplink is cut for all we know");
    assert!(
        bench
            .seen
            .iter()
            .any(|action| matches!(action, Action::Control { probe } if probe.ip == SERVER))
    );
    let mended = bench.now;
    while bench.releases() == 0 {
        bench.evidence.uplink_at = Some(bench.now);
        bench.pass(secs(1));
        assert!(
            bench.now.since(mended) < secs(400),
            "it is released in the end"
        );
    }
    // Who started elsewhere while the cable was cut was not heard: as long as for a silent VM.
    assert!(
        bench.now.since(mended) >= secs(290),
        "{:?}",
        bench.now.since(mended)
    );
}

#[test]
fn with_an_uplink_that_is_heard_the_hold_down_is_the_uplinks() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass(secs(10));
    bench.evidence.uplink_at = Some(bench.now);
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass_heard(Duration::from_millis(9500));
    assert_eq!(bench.releases(), 0, "the hold-down has not passed");
    bench.pass_heard(secs(1));
    assert_eq!(bench.releases(), 1);
}

#[test]
fn a_vm_that_moved_behind_the_uplink_is_disowned() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass(secs(10));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(2));
    bench.evidence.elsewhere = Some((bench.now, UPLINK));
    bench.pass(secs(60));
    assert_eq!(bench.state(KEY), Some(State::Moved));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn a_last_word_by_its_own_port_does_not_take_the_lost_ports_road_away() {
    let mut bench = settled();
    bench.pass(secs(70));
    assert_eq!(bench.state(KEY), Some(State::Silent));
    bench.evidence.own_at = Some(bench.now);
    bench.pass(Duration::from_millis(5));
    bench.lose(VM_PORT, PortLoss::CarrierLost);
    bench.pass(secs(3));
    assert_eq!(bench.state(KEY), Some(State::Released));
}

#[test]
fn a_vm_behind_a_port_that_nobody_named_is_disowned() {
    let mut bench = settled();
    bench.port(13, "spare1", Role::Aside);
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.evidence.elsewhere = Some((bench.now, 13));
    bench.pass(secs(60));
    assert_eq!(bench.state(KEY), Some(State::Moved));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn the_more_there_are_the_less_often_each_is_looked_at() {
    let mut bench = Bench::new(Policy {
        silence: secs(2),
        probe_rate: 4,
        ..Policy::default()
    });
    for n in 1..=64 {
        let mac = MacAddr([2, 0, 0, 0, 0, n]);
        bench.lease(VM_PORT, mac, Ipv4Addr::new(10, 0, 0, n));
    }
    bench.vm_talks = true;
    bench.pass(secs(100));
    bench.seen.clear();
    bench.pass(secs(200));
    let probes = bench.probes();
    assert!((700..900).contains(&probes), "{probes} in 200 seconds");
}

#[test]
fn a_last_question_that_cannot_leave_is_asked_again() {
    let mut bench = Bench::new(Policy::default());
    bench.port(UPLINK, "up0", Role::Uplink);
    bench.evidence.uplink_at = Some(bench.now + secs(10_000));
    bench.lease(VM_PORT, VM, IP);
    bench.pass(secs(5));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(8));
    assert_eq!(bench.probes(), 3, "all but the last");
    bench.sends = false;
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 0);
    assert_eq!(bench.verdict(Gate::Dead), Verdict::Hold);
    bench.sends = true;
    bench.pass(secs(6));
    assert_eq!(bench.releases(), 1);
}

/// For whoever waits for no more than that; others have their round.
#[test]
fn a_question_to_everybody_that_cannot_leave_is_soon_asked_again() {
    let tries = |bench: &mut Bench| {
        let before = bench.probes();
        bench.pass_heard(secs(3));
        bench.probes() - before
    };
    let mut bench = release::kept();
    bench.sends = false;
    bench.engine.resume("root", bench.now);
    assert_eq!(tries(&mut bench), 3);
    let mut bench = settled_with_uplink();
    bench.sends = false;
    bench.lose(VM_PORT, PortLoss::Deleted);
    assert_eq!(tries(&mut bench), 0, "but the first");
}

/// What was asked by a cut cable is no question to everybody.
#[test]
fn after_a_cut_everybody_is_asked_anew() {
    let mut bench = settled_with_uplink();
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.until(Duration::from_millis(100), |bench| bench.watching().deaf);
    let Watching {
        armed_at,
        all_asked,
        ..
    } = bench.watching();
    let since = all_asked.into_iter().flatten().min();
    assert!(since.is_none_or(|at| at >= armed_at), "{all_asked:?}");
}

/// The server behind a relay is not on the link: who is asked whether the way is open is the relay.
#[test]
fn the_relay_is_asked_for_a_server_behind_it() {
    let relay = Ipv4Addr::new(192, 0, 2, 3);
    let mut bench = Bench::new(Policy::default());
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        giaddr: Some(relay),
        ..bench.ack(VM_PORT, VM, IP)
    });
    // A renewal goes past the relay, by whichever router.
    bench.pass(secs(5));
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        source_mac: MacAddr([2, 0, 0, 0, 9, 9]),
        ..bench.ack(VM_PORT, VM, IP)
    });
    bench.pass(secs(5));
    bench.lose(VM_PORT, PortLoss::Deleted);
    let asked = bench.seen.iter().any(|action| {
        matches!(action, Action::Control { probe } if (probe.ip, probe.mac) == (relay, SERVER_MAC))
    });
    assert!(asked, "{:?}", bench.seen);
}

#[test]
fn a_vm_that_was_plugged_in_anew_is_followed() {
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.port(13, "vm1", Role::Vm);
    bench.evidence.elsewhere = Some((bench.now, 13));
    bench.pass(secs(10));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(
        bench.engine.bindings().next().map(|binding| binding.port),
        Some(13)
    );
    assert_eq!(bench.releases(), 0);
    // It dies there.
    bench.evidence.elsewhere = None;
    bench.lose(13, PortLoss::Deleted);
    bench.pass(secs(3));
    assert_eq!(bench.releases(), 1);
}

#[test]
fn a_busy_vm_is_never_probed() {
    let mut bench = settled();
    for _ in 0..100 {
        bench.evidence.port_at = Some(bench.now);
        bench.pass(secs(10));
    }
    assert_eq!(bench.probes(), 0);
    assert_eq!(bench.state(KEY), Some(State::Bound));
}

#[test]
fn a_quiet_vm_that_answers_is_alive() {
    let mut bench = settled();
    bench.vm_talks = true;
    bench.pass(secs(600));
    assert!(bench.probes() >= 10, "it was asked: {}", bench.probes());
    assert!(bench.notices().is_empty());
}

#[test]
fn a_silent_vm_with_its_port_up_goes_the_slow_road() {
    let mut bench = settled();
    bench.pass(secs(30 + 20 + 2));
    assert_eq!(bench.state(KEY), Some(State::Silent));
    bench.pass(secs(270));
    assert_eq!(bench.releases(), 0);
    bench.pass(secs(40));
    assert_eq!(bench.releases(), 1);
}

#[test]
fn probes_that_are_sent_often_do_not_put_the_end_off() {
    let mut bench = Bench::new(Policy {
        probe_interval: Duration::from_millis(300),
        hold_down: secs(5),
        ..Policy::default()
    });
    bench.lease(VM_PORT, VM, IP);
    bench.pass(secs(5));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(6));
    assert_eq!(bench.releases(), 1, "{:?}", bench.notices());
}

/// The switches beyond still have the MAC at this node's port.
#[test]
fn where_there_is_an_uplink_everybody_is_asked_for_the_address() {
    let mut bench = settled();
    bench.port(UPLINK, "uplink0", Role::Uplink);
    bench.lose(VM_PORT, PortLoss::Deleted);
    let asked = Action::Control {
        probe: Probe {
            via: ProbeVia::Segment(SEGMENT),
            vlan: 0,
            ip: IP,
            mac: MacAddr::BROADCAST,
        },
    };
    assert!(bench.seen.contains(&asked), "{:?}", bench.seen);
}
