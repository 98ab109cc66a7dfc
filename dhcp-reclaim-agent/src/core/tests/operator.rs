//! What people order.

use super::*;

fn held_by(bench: &Bench, gate: Gate) -> bool {
    let held = |notice: &&Notice| notice.event == NoticeKind::Held;
    let gate = format!("{gate}: ");
    let mut notices = bench.seen.iter().filter_map(notice).filter(held);
    notices.any(|notice| notice.reason.starts_with(&gate))
}

#[test]
fn while_paused_the_dead_are_noticed_and_nothing_is_released() {
    let mut bench = settled();
    bench.engine.pause("an upgrade".to_owned(), bench.now);
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 0);
    assert_eq!(bench.state(KEY), Some(State::Gone));
    assert_eq!(bench.verdict(Gate::Paused), Verdict::Hold);
    assert!(held_by(&bench, Gate::Paused));
    let resumed = bench.engine.resume("somebody", bench.now);
    assert!(resumed.was_paused && !resumed.breaker_closed);
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 1);
    let kinds = bench.notices();
    for kind in [NoticeKind::Paused, NoticeKind::Resumed] {
        assert_eq!(
            kinds.iter().filter(|it| **it == kind).count(),
            1,
            "{kind:?}"
        );
    }
}

#[test]
fn resume_closes_the_breaker() {
    let mut bench = Bench::new(Policy {
        breaker: Some(0.1),
        breaker_min: 0,
        ..Policy::default()
    });
    bench.lease(VM_PORT, VM, IP);
    bench.pass(secs(5));
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(60));
    assert!(held_by(&bench, Gate::Breaker));
    assert_eq!(bench.releases(), 0);
    let resumed = bench.engine.resume("somebody", bench.now);
    assert!(!resumed.was_paused && resumed.breaker_closed);
    assert_eq!(bench.engine.breaker_opened_at(), None);
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 1);
    let again = bench.engine.resume("somebody", bench.now);
    assert!(!again.was_paused && !again.breaker_closed);
    bench.pass(secs(1));
    let resumed = |kind: &&NoticeKind| **kind == NoticeKind::Resumed;
    assert_eq!(bench.notices().iter().filter(resumed).count(), 1);
}

fn answers(bench: &Bench) -> Vec<Answer> {
    let answers = bench.seen.iter().filter_map(|action| match action {
        Action::Answer { key: KEY, answer } => Some(answer.clone()),
        _ => None,
    });
    answers.collect()
}

fn force(gates: &[Gate]) -> Override {
    Override {
        who: "uid 0, pid 7".to_owned(),
        gates: gates.iter().copied().collect(),
    }
}

fn ask_release(bench: &mut Bench, gates: &[Gate]) {
    let asked = bench.engine.ask_release(KEY, force(gates), bench.now);
    assert_eq!(asked, Ok(()));
    bench.carry_out();
}

/// The gates that hold, as the one answer has them.
fn held(bench: &Bench) -> Vec<Gate> {
    let [Answer::Held(findings)] = &answers(bench)[..] else {
        panic!("{:?}", answers(bench));
    };
    let held = findings.iter().filter(|it| it.verdict != Verdict::Pass);
    held.map(|it| it.gate).collect()
}

#[test]
fn who_is_asked_is_alive_or_silent() {
    let mut bench = settled();
    bench.vm_talks = true;
    assert_eq!(bench.engine.ask(KEY, bench.now), Ok(()));
    bench.carry_out();
    assert_eq!(bench.probes(), 1, "it is asked at once");
    assert_eq!(bench.engine.ask(KEY, bench.now), Err(AskError::Open));
    let began = bench.now;
    bench.pass(secs(2));
    let [Answer::Alive { at, port }] = &answers(&bench)[..] else {
        panic!("{:?}", answers(&bench));
    };
    assert!(*at >= began && at.since(began) < Duration::from_millis(100));
    assert_eq!(port, "vm1");

    bench.seen.clear();
    bench.vm_talks = false;
    assert_eq!(bench.engine.ask(KEY, bench.now), Ok(()));
    bench.pass(secs(2));
    assert_eq!(answers(&bench), [Answer::Silent]);
    assert_eq!(
        bench.state(KEY),
        Some(State::Bound),
        "one question is no death"
    );
}

#[test]
fn a_question_counts_for_no_death_and_is_no_flood() {
    let mut bench = settled();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    let watching = |bench: &Bench| match bench.engine.bindings_of(IP).next().unwrap().check {
        Check::Watching(watching) => (watching.probes, watching.probed_at),
        check => panic!("{check:?}"),
    };
    let before = watching(&bench);
    assert_eq!(bench.engine.ask(KEY, bench.now), Ok(()));
    bench.carry_out();
    assert_eq!(watching(&bench), before);
    let beside = |action: &&Action| matches!(action, Action::Control { .. });
    assert_eq!(bench.seen.iter().filter(beside).count(), 1);

    // Each address is asked once at a time, and all of them within a rate.
    let mut bench = Bench::new(Policy::default());
    let mut asked = 0;
    for n in 1..=200_u8 {
        let key = Key {
            ip: Ipv4Addr::new(10, 0, 1, n),
            ..KEY
        };
        bench.lease(VM_PORT, MacAddr([2, 0, 0, 0, 1, n]), key.ip);
        match bench.engine.ask(key, bench.now) {
            Ok(()) => asked += 1,
            Err(error) => assert_eq!(error, AskError::TooMany),
        }
    }
    assert_eq!(asked, 20);
}

#[test]
fn only_what_is_leased_can_be_asked() {
    let mut bench = Bench::new(Policy::default());
    assert_eq!(bench.engine.ask(KEY, bench.now), Err(AskError::Unknown));
    bench.message(bench.request(VM_PORT, VM, IP));
    let asked = bench.engine.ask(KEY, bench.now);
    assert_eq!(asked, Err(AskError::NotLeased(State::Requested)));
    let mut bench = settled();
    assert_eq!(bench.engine.ask(KEY, bench.now), Ok(()));
    bench.message(Message {
        kind: MessageType::Release,
        ciaddr: Some(IP),
        requested_ip: None,
        ..bench.request(VM_PORT, VM, IP)
    });
    assert_eq!(bench.state(KEY), Some(State::Withdrawn));
    bench.pass(secs(2));
    assert!(matches!(
        answers(&bench)[..],
        [Answer::Alive { .. } | Answer::Ended]
    ));
}

#[test]
fn a_release_that_is_asked_for_goes_through_the_gates() {
    // Bound, and its port up: all that can be done early is to ask, which takes seconds then.
    let mut bench = settled();
    let began = bench.now;
    ask_release(&mut bench, &[]);
    bench.pass(secs(4));
    assert_eq!(held(&bench), [Gate::HoldDown]);
    assert_eq!(bench.probes(), 3);
    assert_eq!(bench.state(KEY), Some(State::Silent));
    assert_eq!(bench.releases(), 0);
    bench.pass(secs(295) - bench.now.since(began));
    assert_eq!(bench.releases(), 0, "the hold-down is what it was");
    bench.pass(secs(10));
    assert_eq!(bench.releases(), 1);

    // It lives: that is the answer, and nothing was done to it.
    let mut bench = settled();
    bench.vm_talks = true;
    ask_release(&mut bench, &[Gate::HoldDown]);
    bench.pass(secs(600));
    assert!(matches!(answers(&bench)[..], [Answer::Alive { .. }]));
    assert_eq!(bench.releases(), 0);
    assert_eq!(bench.state(KEY), Some(State::Bound));
}

#[test]
fn who_overrides_a_gate_is_named_and_the_others_hold() {
    let mut bench = settled();
    bench.engine.pause("an upgrade".to_owned(), bench.now);
    ask_release(&mut bench, &[Gate::HoldDown]);
    bench.pass(secs(4));
    assert_eq!(held(&bench), [Gate::Paused]);
    assert_eq!(bench.releases(), 0);
    bench.seen.clear();
    ask_release(&mut bench, &[Gate::HoldDown, Gate::Paused]);
    bench.pass(secs(4));
    assert_eq!(
        answers(&bench),
        [Answer::Released(ReleaseOutcome::Sent)],
        "silent by now"
    );
    assert_eq!(bench.releases(), 1);
    let forced = |notice: &&Notice| notice.event == NoticeKind::Forced;
    let forced: Vec<_> = bench
        .seen
        .iter()
        .filter_map(notice)
        .filter(forced)
        .collect();
    assert_eq!(forced.len(), 1);
    assert_eq!(forced[0].reason, "uid 0, pid 7 overrides hold-down, paused");
    assert_eq!(bench.state(KEY), Some(State::Released));
    assert!(bench.engine.ordered_by(KEY).is_none());
}

#[test]
fn some_gates_cannot_be_overridden() {
    // Whatever is forced: an address that ends soon, one that was seen elsewhere, one not watched.
    let all: Vec<Gate> = Gate::ALL.to_vec();
    let mut bench = Bench::new(Policy {
        min_remaining: secs(4000),
        ..Policy::default()
    });
    bench.lease(VM_PORT, VM, IP);
    bench.pass(secs(5));
    ask_release(&mut bench, &all);
    bench.pass(secs(4));
    assert_eq!(held(&bench), [Gate::Lease]);
    assert_eq!(bench.releases(), 0);

    let mut bench = settled();
    bench.evidence.armed = false;
    ask_release(&mut bench, &all);
    bench.pass(secs(9));
    assert_eq!(held(&bench), [Gate::Dead]);
    assert_eq!(bench.releases(), 0);

    let mut bench = settled();
    let later = bench.now + secs(1);
    bench.evidence.elsewhere = Some((later, OTHER_PORT));
    ask_release(&mut bench, &all);
    bench.pass(secs(9));
    assert!(matches!(answers(&bench)[..], [Answer::Alive { .. }]));
    assert_eq!(bench.releases(), 0);

    // The kernel half has the last word.
    let mut bench = settled();
    bench.outcome = ReleaseOutcome::Vetoed;
    ask_release(&mut bench, &all);
    bench.pass(secs(4));
    assert_eq!(answers(&bench), [Answer::Released(ReleaseOutcome::Vetoed)]);
    assert_ne!(bench.state(KEY), Some(State::Released));
    let never = Gate::ALL.iter().filter(|gate| gate.unforceable().is_some());
    let never: Vec<&str> = never.map(|gate| gate.name()).collect();
    assert_eq!(never, ["lease", "dead", "elsewhere", "rate", "kernel"]);
}

#[test]
fn what_is_forced_counts_for_the_breaker() {
    let mut bench = Bench::new(Policy {
        breaker: Some(0.1),
        breaker_min: 0,
        ..Policy::default()
    });
    bench.lease(VM_PORT, VM, IP);
    bench.pass(secs(5));
    ask_release(&mut bench, &[Gate::HoldDown]);
    bench.pass(secs(4));
    assert_eq!(held(&bench), [Gate::Breaker]);
    assert_eq!(bench.releases(), 0);
}
