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
    let bench = next(&saved);
    let restored = bench.engine.saved(KEY).and_then(|it| it.released);
    let released = saved.released.expect("it was");
    let SavedRelease {
        at,
        outcome,
        vigil_until,
        alarmed,
        ..
    } = restored.expect("it is still");
    assert_eq!(
        (at, outcome, vigil_until, alarmed),
        (released.at, released.outcome, released.vigil_until, true)
    );
    // Its time is over the moment it ends.
    let over = Saved {
        released: Some(SavedRelease {
            vigil_until: Some(Time::ZERO + secs(1000)),
            ..released
        }),
        ..saved.clone()
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
