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
    bench.lose(VM_PORT, PortLoss::Deleted);
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
    bench.lose(VM_PORT, PortLoss::Deleted);
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
    bench.lose(VM_PORT, PortLoss::Deleted);
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
    bench.gives_back(VM_PORT, VM, IP);
    assert_eq!(bench.state(KEY), Some(State::Withdrawn));
    bench.pass(secs(2));
    assert!(matches!(
        answers(&bench)[..],
        [Answer::Alive { .. } | Answer::Ended]
    ));
}

#[test]
fn a_release_that_is_asked_for_goes_through_the_gates() {
    // Bound, and its port up: all that can be done early is to ask, which takes SECONDs then.
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

#[test]
fn an_earlier_agents_pause_goes_on() {
    let mut bench = settled();
    bench.engine.restore_pause("an upgrade".to_owned());
    assert_eq!(bench.verdict(Gate::Paused), Verdict::Hold);
    assert!(bench.notices().is_empty(), "it is no news");
}

/// A RELEASE needs a silence that was watched at every port; one that was is not begun anew.
#[test]
fn a_release_that_is_asked_for_is_watched_everywhere_once() {
    let mut bench = settled();
    bench.engine.ask(KEY, bench.now).unwrap();
    bench.carry_out();
    assert_eq!((bench.arms(false), bench.arms(true)), (1, 0));
    bench.pass(secs(2));
    ask_release(&mut bench, &[]);
    assert_eq!((bench.arms(false), bench.arms(true)), (1, 1));

    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Deleted);
    assert_eq!(bench.arms(true), 1);
    ask_release(&mut bench, &[]);
    assert_eq!(bench.arms(true), 1);
}

/// Three probes in a row that count are apart, however impatient a person is.
#[test]
fn who_cannot_wait_sends_no_probe_that_counts_before_the_last_is_answered() {
    let wait = Policy::default().probe_wait;
    let asked_after = |rest: Duration, closing: bool| {
        let mut bench = settled();
        bench.lose(VM_PORT, PortLoss::CarrierLost);
        if closing {
            // The port is back, and goes again: what came by it meanwhile is not looked at yet.
            for event in [
                Event::PortUp(Port {
                    ifindex: VM_PORT,
                    name: "vm1".to_owned(),
                    segment: SEGMENT,
                    role: Role::Vm,
                }),
                Event::PortDown {
                    port: VM_PORT,
                    loss: PortLoss::CarrierLost,
                },
            ] {
                bench.engine.handle(event, bench.now);
            }
        }
        bench.now = bench.now + rest;
        let before = bench.probes();
        let asked = bench.engine.ask_release(KEY, force(&[]), bench.now);
        assert_eq!(asked, Ok(()));
        let mut sent = Vec::new();
        while let Some(action) = bench.engine.poll_action() {
            sent.push(action);
        }
        let beside = bench.engine.counters()["questions_asked"];
        let is_probe = |action: &&Action| matches!(action, Action::Probe { .. });
        assert_eq!(before, 1);
        (sent.iter().filter(is_probe).count(), beside)
    };
    assert_eq!(asked_after(wait - Duration::from_millis(1), false), (0, 1));
    assert_eq!(asked_after(wait, false), (1, 0));
    assert_eq!(asked_after(wait, true), (0, 1));

    // As many as are needed have left: no more of them count.
    let mut bench = settled();
    bench.engine.pause("an upgrade".to_owned(), bench.now);
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.until(Duration::from_millis(100), |bench| bench.probes() >= 3);
    bench.now = bench.now + wait;
    ask_release(&mut bench, &[]);
    assert_eq!(bench.probes(), 3);
    assert_eq!(bench.engine.counters()["questions_asked"], 1);
}

#[test]
fn who_ordered_a_release_is_known_while_it_is_on_its_way() {
    let mut bench = settled();
    ask_release(&mut bench, &[Gate::HoldDown]);
    assert!(bench.engine.ordered_by(KEY).is_none(), "asked, not ordered");
    bench.pass(secs(4));
    assert_eq!(bench.releases(), 1);
    assert_eq!(bench.ordered_by, Some(force(&[Gate::HoldDown])));
}

/// The early look is only for who lives: what it does not see counts for nothing.
#[test]
fn the_first_look_after_a_question_is_no_look_of_the_watch() {
    let mut bench = settled();
    bench.engine.ask(KEY, bench.now).unwrap();
    bench.carry_out();
    let looked_at = |bench: &Bench| bench.engine.binding(KEY).unwrap().evidence.clone();
    let before = looked_at(&bench);
    bench.until(Duration::from_millis(10), |bench| bench.looks() > 0);
    assert_eq!(looked_at(&bench), before);
    bench.pass(secs(2));
    assert_ne!(looked_at(&bench), before);
}

#[test]
fn who_was_kept_for_long_is_asked_before_an_order_is_followed() {
    let mut bench = release::kept();
    let probes = bench.probes();
    bench.until_heard(secs(1), |bench| bench.probes() > probes);
    bench.pass_heard(secs(3));
    let probes = bench.probes();
    ask_release(&mut bench, &[Gate::Paused]);
    bench.until_heard(Duration::from_millis(100), |bench| bench.releases() > 0);
    assert_eq!(bench.probes(), probes + 2);
}

/// Nobody can be asked: what was asked before says too little by now.
#[test]
fn an_order_about_whom_nobody_could_be_asked_is_held_by_that_alone() {
    let mut bench = release::kept();
    bench.pass_heard(secs(3));
    bench.sends = false;
    ask_release(&mut bench, &[Gate::Paused]);
    bench.until_heard(secs(1), |bench| !answers(bench).is_empty());
    assert_eq!(held(&bench), [Gate::Dead]);
    assert_eq!(bench.releases(), 0);
}

#[test]
fn who_must_wait_for_a_turn_only_is_released_at_it() {
    let mut bench = Bench::new(Policy {
        rate: 1,
        burst: 1,
        ..Policy::default()
    });
    bench.lease(VM_PORT, VM, IP);
    bench.lease(OTHER_PORT, OTHER, SECOND.ip);
    bench.pass(secs(5));
    let asked = bench
        .engine
        .ask_release(SECOND, force(&[Gate::HoldDown]), bench.now);
    assert_eq!(asked, Ok(()));
    ask_release(&mut bench, &[Gate::HoldDown]);
    bench.pass(secs(5));
    assert_eq!(bench.releases(), 2);
    let both = bench.seen.iter().filter_map(|action| match action {
        Action::Answer { answer, .. } => Some(answer.clone()),
        _ => None,
    });
    let sent = Answer::Released(ReleaseOutcome::Sent);
    assert_eq!(both.collect::<Vec<_>>(), [sent.clone(), sent]);
}

#[test]
fn each_question_has_an_answer_of_its_own() {
    let mut bench = settled();
    bench.lease(OTHER_PORT, OTHER, SECOND.ip);
    bench.pass(secs(1));
    for key in [KEY, SECOND] {
        bench.engine.ask(key, bench.now).unwrap();
        bench.carry_out();
        bench.pass(Duration::from_millis(300));
    }
    bench.pass(secs(3));
    let answered: Vec<Key> = bench
        .seen
        .iter()
        .filter_map(|action| match action {
            Action::Answer { key, .. } => Some(*key),
            _ => None,
        })
        .collect();
    assert_eq!(answered, [KEY, SECOND]);
}
