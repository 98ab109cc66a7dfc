//! What outlives the agent, field by field.

use super::*;
use crate::core::{
    Saved, SavedRelease, SavedTransaction,
    binding::{Doubt, Origin},
};

pub(super) fn saved(state: State) -> Saved {
    let at = |n| Time::ZERO + secs(n);
    Saved {
        key: KEY,
        chaddr: VM,
        client_id: Some(vec![1, 2, 3]),
        server: Some(SERVER),
        server_mac: Some(SERVER_MAC),
        port: VM_PORT,
        port_name: "vm1".to_owned(),
        state,
        origin: Origin::Imported,
        acked: true,
        seen_alive: true,
        shared: true,
        doubt: Some(Doubt::Conflict(at(990))),
        expires: Some(at(5000)),
        tentative_until: Some(at(4000)),
        last_seen: Some(at(980)),
        released: None,
    }
}

fn next(saved: &Saved) -> Bench {
    let mut bench = Bench::new(Policy::default());
    bench.engine.restore(vec![saved.clone()], bench.now);
    bench
}

#[test]
fn nothing_of_a_binding_is_lost_between_two_agents() {
    for state in [State::Requested, State::Bound, State::Withdrawn] {
        let saved = saved(state);
        assert_eq!(next(&saved).engine.saved(KEY), Some(saved));
    }
    let bench = next(&saved(State::Bound));
    let binding = bench.engine.binding(KEY).expect("it is known");
    assert_eq!(binding.port_name, "vm1");
    // Its name stays, also where its port is gone.
    let gone = Saved {
        port: 99,
        port_name: "gone".to_owned(),
        ..saved(State::Bound)
    };
    let bench = next(&gone);
    let binding = bench.engine.binding(KEY).expect("it is known");
    assert_eq!((binding.port, &*binding.port_name), (0, "gone"));
}

#[test]
fn nothing_of_what_was_released_is_lost_either() {
    let saved = Saved {
        released: Some(SavedRelease {
            at: Time::ZERO + secs(995),
            silent_since: Time::ZERO + secs(985),
            outcome: Outcome::Ignored,
            vigil_until: Some(Time::ZERO + secs(1100)),
            alarmed: true,
        }),
        ..saved(State::Released)
    };
    assert_eq!(next(&saved).engine.saved(KEY).as_ref(), Some(&saved));
    // Its time is over the moment it ends.
    let over = Saved {
        released: saved.released.map(|released| SavedRelease {
            vigil_until: Some(Time::ZERO + secs(1000)),
            ..released
        }),
        ..saved
    };
    let bench = next(&over);
    let vigil = bench.engine.binding(KEY).map(|it| it.vigil.is_some());
    assert_eq!(vigil, Some(false));
}

/// What was not sent is not kept as sent.
#[test]
fn a_dry_run_leaves_nothing_to_remember() {
    let mut bench = settled();
    bench.outcome = ReleaseOutcome::DryRun;
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(10));
    assert_eq!(bench.releases(), 1);
    assert_eq!(bench.state(KEY), Some(State::Released));
    assert_eq!(bench.engine.saved(KEY), None);
}

#[test]
fn a_question_is_as_open_as_it_was() {
    for (age, open) in [(119, true), (120, false)] {
        let mut bench = Bench::new(Policy::default());
        let id = TransactionId {
            port: VM_PORT,
            xid: 7,
            chaddr: VM,
        };
        let saved = SavedTransaction {
            id,
            port_name: "vm1".to_owned(),
            at: Time::ZERO + secs(1000 - age),
            ask: Ask::InitReboot { ip: IP },
            vlan: 0,
            client_id: Some(vec![1]),
            ambiguous: true,
            poisoned: false,
        };
        bench
            .engine
            .restore_transactions(vec![saved.clone()], bench.now);
        // It is said to whoever keeps it, whatever became of it.
        let said = bench.engine.poll_action();
        assert_eq!(said, Some(Action::SaveTransaction { id }));
        let known = bench.engine.saved_transaction(id);
        assert_eq!(known, open.then_some(saved), "{age}");
    }
}

#[test]
fn what_is_to_be_kept_is_said_when_it_changes() {
    let mut bench = Bench::new(Policy::default());
    let id = TransactionId {
        port: VM_PORT,
        xid: 7,
        chaddr: VM,
    };
    let said = |bench: &mut Bench, message: Message| {
        bench.engine.handle(Event::Message(message), bench.now);
        let mut said = 0;
        while let Some(action) = bench.engine.poll_action() {
            said += usize::from(action == Action::SaveTransaction { id });
        }
        said
    };
    let request = bench.request(VM_PORT, VM, IP);
    assert_eq!(said(&mut bench, request), 1, "it is open");
    let ack = bench.ack(VM_PORT, VM, IP);
    assert_eq!(said(&mut bench, ack), 1, "it is closed");
}

#[test]
fn an_alarm_that_is_taken_over_is_kept_on() {
    let mut bench = Bench::new(Policy::default());
    let id = AlarmId {
        segment: SEGMENT,
        mac: VM,
    };
    bench.engine.restore_alarms(vec![SavedAlarm {
        id,
        port: VM_PORT,
        port_name: "vm1".to_owned(),
    }]);
    let said = bench.engine.poll_action();
    assert_eq!(said, Some(Action::SaveAlarm { id }));
}

#[test]
fn a_binding_whose_port_is_there_is_taken_over_and_looked_at_soon() {
    let mut bench = after_restart(&settled(), &PORTS);
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!((bench.probes(), bench.saves.len()), (0, 1));
    bench.pass(secs(2));
    assert_eq!(bench.probes(), 1, "looked at");
    bench.vm_talks = true;
    bench.pass(secs(100));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    let binding = bench.engine.bindings().next().unwrap();
    assert_eq!(
        (binding.server_mac, binding.port),
        (Some(SERVER_MAC), VM_PORT)
    );
    // It is as it was: its port goes, and so does it.
    bench.vm_talks = false;
    let (port, loss) = (VM_PORT, PortLoss::Deleted);
    bench.lose(port, loss);
    bench.pass(secs(3));
    assert_eq!(bench.releases(), 1);
}

#[test]
fn a_binding_whose_port_went_while_nobody_listened_takes_the_slow_road() {
    // Gone, or another port by now: by its index, or by its name.
    for ports in [
        &[(OTHER_PORT, "vm2")][..],
        &[(VM_PORT, "vm9"), (OTHER_PORT, "vm2")],
        &[(VM_PORT + 50, "vm1"), (OTHER_PORT, "vm2")],
    ] {
        let mut bench = after_restart(&settled(), ports);
        assert_eq!(bench.state(KEY), Some(State::Silent), "{ports:?}");
        assert_eq!(bench.probes(), 1);
        bench.pass(secs(299));
        assert_eq!(bench.releases(), 0, "it may have asked behind a new port");
        bench.pass(secs(2));
        assert_eq!(bench.releases(), 1);
        assert_eq!(bench.state(KEY), Some(State::Released));
    }
}

#[test]
fn a_binding_whose_port_has_no_carrier_at_the_start_takes_the_slow_road() {
    let bench = settled();
    let mut next = Bench::new(Policy::default());
    next.now = bench.now;
    next.lose(VM_PORT, PortLoss::CarrierLost);
    let saved = bench.engine.saved(KEY).expect("it is live");
    next.engine.restore(vec![saved], next.now);
    next.carry_out();
    assert_eq!(next.state(KEY), Some(State::Silent));
    next.pass(secs(299));
    assert_eq!(next.releases(), 0);
    next.pass(secs(2));
    assert_eq!(next.releases(), 1);
}

#[test]
fn what_is_told_after_a_time_without_the_agent_takes_the_slow_road() {
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.lease(OTHER_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.pass(secs(1));
    bench.tell(Event::Overslept {
        suspended: secs(1800),
    });
    bench.lose(OTHER_PORT, PortLoss::Deleted);
    bench.pass(secs(299));
    assert_eq!(bench.releases(), 0, "they may have been started elsewhere");
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 2);
}

#[test]
fn a_port_that_goes_before_its_vm_was_seen_again_takes_the_slow_road() {
    let mut bench = after_restart(&settled(), &PORTS);
    let (port, loss) = (VM_PORT, PortLoss::Deleted);
    bench.lose(port, loss);
    bench.pass(secs(299));
    assert_eq!(bench.releases(), 0, "it may have asked behind a new port");
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 1);
}

#[test]
fn a_binding_whose_vm_has_a_new_port_is_found_there() {
    let mut bench = after_restart(&settled(), &[(31, "vm1")]);
    bench.evidence.elsewhere = Some((bench.now + secs(1), 31));
    bench.pass(secs(20));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    bench.evidence.elsewhere = None;
    bench.vm_talks = true;
    bench.pass(secs(600));
    assert_eq!(
        (bench.releases(), bench.state(KEY)),
        (0, Some(State::Bound))
    );
    assert_eq!(bench.engine.saved(KEY).unwrap().port, 31);
}

#[test]
fn an_intent_is_saved_before_its_frame_and_never_sent_again() {
    let mut bench = settled();
    let (port, loss) = (VM_PORT, PortLoss::Deleted);
    bench.lose(port, loss);
    bench.pass(Duration::from_millis(1990));
    bench.now = bench.now + secs(1);
    bench.engine.handle_timeout(bench.now);
    let mut last = None;
    let mut interrupted = None;
    while let Some(action) = bench.engine.poll_action() {
        match action {
            Action::Save { key } => last = bench.engine.saved(key).map(|saved| saved.state),
            Action::Look { key, .. } => {
                let evidence = bench.evidence;
                bench
                    .engine
                    .handle(Event::Evidence { key, evidence }, bench.now);
            }
            Action::Release { .. } => interrupted = last,
            _ => {}
        }
    }
    assert_eq!(interrupted, Some(State::Releasing));
    // Killed here: whether the frame left is not known.
    let gone = [(OTHER_PORT, "vm2")];
    let mut next = after_restart(&bench, &gone);
    assert_eq!(next.state(KEY), Some(State::Released));
    assert_eq!(next.notices(), [NoticeKind::Released]);
    let told = next.seen.iter().find_map(notice).unwrap();
    assert!(told.reason.contains("unknown"), "{}", told.reason);
    next.pass(secs(3600));
    assert_eq!((next.releases(), next.state(KEY)), (0, None));
    assert_eq!(next.saves.last(), Some(&(KEY, None)), "not to be kept");

    // It did not leave, as the kernel knows: all is looked at anew.
    for outcome in [ReleaseOutcome::Failed, ReleaseOutcome::Vetoed] {
        let mut next = after_restart_with(&bench, &gone, Some(outcome));
        assert_eq!(next.state(KEY), Some(State::Silent));
        next.pass(secs(400));
        assert_eq!(
            (next.releases(), next.state(KEY)),
            (1, Some(State::Released))
        );
    }

    // It left: that was the one.
    let mut next = after_restart_with(&bench, &gone, Some(ReleaseOutcome::Sent));
    assert_eq!(next.state(KEY), Some(State::Released));
    assert_eq!(next.engine.live(), 0);
    next.pass(secs(3600));
    assert_eq!((next.releases(), next.state(KEY)), (0, None));
}

/// A VM that died and was released, `ago` before the next agent.
fn released_before_restart(ago: Duration) -> Bench {
    let mut bench = settled();
    let (port, loss) = (VM_PORT, PortLoss::Deleted);
    bench.lose(port, loss);
    bench.pass(secs(3));
    assert_eq!(
        (bench.releases(), bench.state(KEY)),
        (1, Some(State::Released))
    );
    bench.pass(ago);
    after_restart(&bench, &[(OTHER_PORT, "vm2")])
}

#[test]
fn a_released_address_is_looked_after_by_the_next_agent_too() {
    let mut bench = released_before_restart(secs(10));
    assert_eq!(bench.state(KEY), Some(State::Released));
    assert_eq!(bench.engine.saved(KEY).unwrap().state, State::Released);
    bench.lease_query = Some(QueryAnswer::Active(Some(VM)));
    bench.pass(secs(5));
    assert_eq!((bench.releases(), bench.notices()), (0, vec![]));
    // A frame that came while there was no agent: the kernel kept it.
    let mut next = after_restart(&bench, &[(OTHER_PORT, "vm2")]);
    next.evidence.address = Some((bench.now, VM));
    next.pass(secs(2));
    assert_eq!(next.notices(), [NoticeKind::ReleasedAlive]);
    next.pass(secs(5));
    assert_eq!(next.notices(), [NoticeKind::ReleasedAlive], "told once");
    // The same by the agent after that: it has been told.
    let mut last = after_restart(&next, &[(OTHER_PORT, "vm2")]);
    last.evidence.address = Some((last.now, VM));
    last.pass(secs(5));
    assert_eq!(last.notices(), []);
    // One that came before the silence that the RELEASE stands on says nothing.
    let mut next = after_restart(&bench, &[(OTHER_PORT, "vm2")]);
    next.evidence.address = Some((Time::from_nanos(1), VM));
    next.pass(secs(90));
    assert_eq!(next.notices(), []);
}

#[test]
fn what_became_of_a_release_is_known_after_a_restart_and_for_as_long() {
    let mut bench = released_before_restart(secs(290));
    let outcome = |bench: &Bench| bench.engine.bindings().next().and_then(|b| b.outcome);
    assert_eq!(outcome(&bench), Some(Outcome::Unverified));
    let mut next = after_restart(&bench, &[(OTHER_PORT, "vm2")]);
    next.message(next.request(OTHER_PORT, OTHER, IP));
    next.message(next.ack(OTHER_PORT, OTHER, IP));
    assert!(next.notices().contains(&NoticeKind::Verified));
    bench.pass(secs(299));
    let mut bench = after_restart(&bench, &[(OTHER_PORT, "vm2")]);
    assert_eq!(bench.state(KEY), Some(State::Released));
    bench.pass(secs(20));
    assert_eq!((bench.state(KEY), bench.releases()), (None, 0));
}

#[test]
fn an_alarm_holds_after_a_restart_until_the_server_binds_again() {
    let mut bench = released_before_restart(secs(1));
    bench.evidence.address = Some((bench.now, VM));
    bench.pass(secs(2));
    assert_eq!(bench.notices(), [NoticeKind::ReleasedAlive]);
    let id = AlarmId {
        segment: SEGMENT,
        mac: VM,
    };
    let alarm = bench.engine.saved_alarm(id).unwrap();
    assert_eq!(alarm.port, 0, "its port is gone");
    let mut next = after_restart(&bench, &PORTS);
    next.engine.restore_alarms(vec![alarm.clone()]);
    assert_eq!(next.engine.saved_alarm(id), Some(alarm));
    next.message(next.request(VM_PORT, VM, IP));
    next.message(next.ack(VM_PORT, VM, IP));
    assert_eq!(next.engine.saved_alarm(id), None, "bound again");
    // A port by its name and index only.
    let alarm = SavedAlarm {
        id,
        port: VM_PORT,
        port_name: "vm1".to_owned(),
    };
    for (port_name, port) in [("vm1", VM_PORT), ("vm9", 0)] {
        let port_name = port_name.to_owned();
        let mut next = after_restart(&bench, &PORTS);
        next.engine.restore_alarms(vec![SavedAlarm {
            port_name,
            ..alarm.clone()
        }]);
        assert_eq!(next.engine.saved_alarm(id).unwrap().port, port);
    }
}

#[test]
fn a_question_that_is_open_when_the_agent_ends_is_answered_to_the_next() {
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    let mut bench = after_restart(&bench, &PORTS);
    assert_eq!(bench.state(KEY), Some(State::Requested));
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(transactions(&bench), []);
    // Not for another port of that index.
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    let mut bench = after_restart(&bench, &[(VM_PORT, "vm9")]);
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Requested));
}

#[test]
fn a_record_that_is_read_again_changes_nothing() {
    let lease = |bench: &mut Bench| {
        let (request, ack) = (bench.request(VM_PORT, VM, IP), bench.ack(VM_PORT, VM, IP));
        bench.message(request.clone());
        bench.message(ack.clone());
        [request, ack]
    };
    // All of them, the last one only, and after a restart.
    for (from, restart) in [(0, false), (1, false), (0, true), (1, true)] {
        let mut bench = Bench::new(Policy::default());
        let messages = lease(&mut bench);
        if restart {
            bench = after_restart(&bench, &PORTS);
        }
        let before = bench.engine.saved(KEY);
        for message in messages.into_iter().skip(from) {
            bench.message(message);
        }
        assert_eq!(bench.engine.saved(KEY), before);
        assert_eq!(bench.engine.live(), 1);
    }
    // The guest's own RELEASE.
    let mut bench = Bench::new(Policy::default());
    lease(&mut bench);
    let release = Message {
        kind: MessageType::Release,
        ciaddr: Some(IP),
        requested_ip: None,
        ..bench.request(VM_PORT, VM, IP)
    };
    bench.message(release.clone());
    assert_eq!(bench.saves.last(), Some(&(KEY, None)));
    let mut bench = after_restart(&bench, &PORTS);
    bench.message(release);
    let (port, loss) = (VM_PORT, PortLoss::Deleted);
    bench.lose(port, loss);
    bench.pass(secs(100));
    assert_eq!((bench.releases(), bench.engine.live()), (0, 0));
}
