//! From a death to its RELEASE: what keeps it, and for how long.

use super::*;

fn dies(bench: &mut Bench, port: IfIndex) {
    bench.tell(Event::PortDown {
        port,
        loss: PortLoss::Deleted,
    });
}

/// Where there is an uplink, and a pause keeps the dead.
fn kept() -> Bench {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass_heard(secs(10));
    bench.engine.pause("an upgrade".to_owned(), bench.now);
    bench.carry_out();
    dies(&mut bench, VM_PORT);
    bench.pass_heard(secs(20));
    assert_eq!(bench.state(KEY), Some(State::Gone));
    bench
}

#[test]
fn who_is_kept_for_long_is_asked_as_seldom_as_any_silent_vm() {
    let mut bench = kept();
    let probes = bench.probes();
    bench.pass_heard(secs(100));
    let asked = bench.probes() - probes;
    assert!((9..=11).contains(&asked), "{asked}");
}

/// The answer to the latest question is a second old at most, and a cut takes longer than another.
#[test]
fn a_question_is_fresh_for_two_seconds() {
    let mut bench = kept();
    let probed_at = match bench.engine.binding(KEY).map(|it| it.check) {
        Some(Check::Watching(watching)) => watching.probed_at.expect("it was asked"),
        check => panic!("{check:?}"),
    };
    bench.engine.resume("root", bench.now);
    let after = |moment: Duration| {
        let mut bench = kept();
        bench.engine.resume("root", bench.now);
        bench.carry_out();
        bench.now = probed_at + secs(2) + moment;
        bench.evidence.uplink_at = Some(bench.now);
        let before = (bench.releases(), bench.probes());
        bench.tell(Event::Evidence {
            key: KEY,
            evidence: bench.evidence,
        });
        (bench.releases() - before.0, bench.probes() - before.1)
    };
    assert_eq!(after(Duration::ZERO), (1, 0));
    assert_eq!(after(Duration::from_nanos(1)), (0, 1));
}

const SECOND: Key = Key {
    ip: Ipv4Addr::new(10, 0, 0, 2),
    ..KEY
};

/// Two die, and one may be released at once.
fn in_the_queue(policy: Policy) -> Bench {
    let mut bench = Bench::new(Policy {
        rate: 1,
        burst: 1,
        ..policy
    });
    bench.lease(VM_PORT, VM, IP);
    bench.lease(OTHER_PORT, OTHER, SECOND.ip);
    bench.pass(secs(5));
    dies(&mut bench, VM_PORT);
    dies(&mut bench, OTHER_PORT);
    while bench.releases() == 0 {
        bench.pass(Duration::from_millis(100));
    }
    bench
}

#[test]
fn who_waits_for_its_turn_keeps_it_and_who_is_held_gives_it_up() {
    let mut bench = in_the_queue(Policy::default());
    let waiting = |bench: &Bench| {
        let turns = [KEY, SECOND].map(|key| bench.engine.binding(key).and_then(|it| it.turn));
        turns.into_iter().flatten().count()
    };
    assert_eq!((bench.releases(), waiting(&bench)), (1, 1));
    bench.pass(Duration::from_millis(500));
    assert_eq!((bench.releases(), waiting(&bench)), (1, 1));
    let mut paused = bench.engine.clone();
    bench.pass(secs(2));
    assert_eq!((bench.releases(), waiting(&bench)), (2, 0));
    std::mem::swap(&mut bench.engine, &mut paused);
    bench.engine.pause("an upgrade".to_owned(), bench.now);
    bench.pass(secs(2));
    assert_eq!(
        (bench.releases(), waiting(&bench)),
        (2, 0),
        "none of it since"
    );
}

#[test]
fn where_the_rate_is_not_asked_no_token_is_waited_for() {
    let bench = in_the_queue(Policy {
        without: [Gate::Rate].into(),
        ..Policy::default()
    });
    assert_eq!(bench.releases(), 2);
}

#[test]
fn what_cannot_be_sent_is_tried_again_ever_less_often() {
    let mut bench = settled();
    bench.outcome = ReleaseOutcome::Failed;
    dies(&mut bench, VM_PORT);
    while bench.releases() == 0 {
        bench.pass(Duration::from_millis(100));
    }
    let retry = Duration::from_millis(1000);
    let mut tries = 1;
    for pause in 1..=5_u32 {
        bench.pass(retry * pause - Duration::from_millis(200));
        assert_eq!(bench.releases(), tries, "in pause {pause}");
        bench.pass(Duration::from_millis(200));
        tries += 1;
        assert_eq!(bench.releases(), tries, "after pause {pause}");
    }
    assert_eq!(bench.engine.counters()["releases_failed"], 6);
}

#[test]
fn why_it_is_taken_for_dead_is_told() {
    let mut bench = settled();
    dies(&mut bench, VM_PORT);
    bench.pass(secs(5));
    let gone = bench.seen.iter().filter_map(notice);
    let gone: Vec<_> = gone.filter(|it| it.event == NoticeKind::Gone).collect();
    assert_eq!(gone.len(), 1);
    assert_eq!(
        gone[0].reason,
        "3 probes unanswered, not a frame for 2.000s"
    );
}
