//! From a death to its RELEASE: what keeps it, and for how long.

use super::*;

/// Where there is an uplink, and a pause keeps the dead.
pub(super) fn kept() -> Bench {
    let mut bench = settled_with_uplink();
    bench.engine.pause("an upgrade".to_owned(), bench.now);
    bench.carry_out();
    bench.lose(VM_PORT, PortLoss::Deleted);
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
    assert_eq!(bench.engine.counters()["held_paused"], 1, "it is told once");
}

/// The answer to the latest question is a second old at most, and a cut takes longer than another.
#[test]
fn two_questions_are_fresh_for_two_seconds() {
    let mut twice = kept();
    let before = twice.probes();
    twice.engine.resume("root", twice.now);
    twice.until_heard(Duration::from_millis(10), |bench| {
        bench.probes() == before + 2
    });
    twice.engine.pause("once more".to_owned(), twice.now);
    let probed_at = twice.watching().probed_at.expect("it was asked");
    let after = |moment: Duration| {
        let mut bench = kept();
        bench.engine = twice.engine.clone();
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
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.lose(OTHER_PORT, PortLoss::Deleted);
    bench.until(Duration::from_millis(100), |bench| bench.releases() > 0);
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
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.until(Duration::from_millis(100), |bench| bench.releases() > 0);
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
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(5));
    let gone = bench.seen.iter().filter_map(notice);
    let gone: Vec<_> = gone.filter(|it| it.event == NoticeKind::Gone).collect();
    assert_eq!(gone.len(), 1);
    assert_eq!(
        gone[0].reason,
        "3 probes unanswered, not a frame for 2.000s"
    );
}

#[test]
fn a_lost_port_is_probed_at_once_and_released_after_the_hold_down() {
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Deleted);
    let everywhere = Action::Arm {
        key: KEY,
        mac: VM,
        own_port: None,
        everywhere: true,
    };
    let probe = Probe {
        via: ProbeVia::Segment(SEGMENT),
        vlan: 0,
        ip: IP,
        mac: VM,
    };
    let acts: Vec<_> = bench
        .seen
        .iter()
        .filter(|action| notice(action).is_none())
        .cloned()
        .collect();
    assert_eq!(acts, [everywhere, Action::Probe { key: KEY, probe }]);
    bench.pass(Duration::from_millis(1990));
    assert_eq!(bench.releases(), 0, "the hold-down has not passed");
    assert_eq!(bench.probes(), 3);
    bench.pass(Duration::from_millis(20));
    assert_eq!(bench.releases(), 1);
    assert_eq!(bench.state(KEY), Some(State::Released));
    assert_eq!(
        bench.notices(),
        [
            NoticeKind::PortLost,
            NoticeKind::Silent,
            NoticeKind::Gone,
            NoticeKind::Releasing,
            NoticeKind::Released
        ]
    );
    bench.pass(secs(500));
    assert_eq!(bench.releases(), 1, "once");
}

#[test]
fn what_every_gate_said_is_known_while_a_release_is_on_its_way() {
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(3));
    assert_eq!(bench.grounds, Gate::ALL.len());
    assert!(bench.engine.grounds(KEY).is_empty(), "no longer");
}

#[test]
fn how_long_a_vm_was_silent_is_known_from_the_first_sign_of_it() {
    let silent_at = |bench: &Bench| bench.engine.bindings_of(IP).next().unwrap().silent_at;
    let mut bench = settled();
    assert_eq!(silent_at(&bench), None);
    let lost_at = bench.now;
    let down = Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::CarrierLost,
    };
    bench.tell(down.clone());
    bench.pass(secs(1));
    bench.lose(VM_PORT, PortLoss::Deleted);
    assert_eq!(silent_at(&bench), Some(lost_at));
    let mut bench = settled();
    bench.tell(down);
    bench.port(VM_PORT, "vm1", Role::Vm);
    bench.vm_talks = true;
    bench.pass(secs(2));
    assert_eq!(silent_at(&bench), None, "it is alive");
}

/// What a VM says by a port before that is watched, nobody hears.
#[test]
fn a_port_that_comes_late_is_asked_before_anything_is_released() {
    for is_new in [true, false] {
        // One that was there, and has its carrier back, was watched all the time.
        let more = usize::from(is_new);
        let mut bench = settled();
        bench.lose(VM_PORT, PortLoss::Deleted);
        bench.pass(Duration::from_millis(1900));
        let probes = bench.probes();
        assert_eq!(probes, 3);
        let port = if is_new { 13 } else { OTHER_PORT };
        bench.port(port, "late", Role::Vm);
        bench.pass(Duration::from_millis(500));
        assert_eq!(bench.releases(), 1 - more, "nobody behind it was asked");
        assert_eq!(bench.probes(), probes + more);
        if !is_new {
            continue;
        }
        let mut lives = bench.engine.clone();
        bench.pass(secs(1));
        assert_eq!(bench.releases(), 1);
        // The same, and it answers.
        std::mem::swap(&mut bench.engine, &mut lives);
        bench.seen.clear();
        bench.lives_at = Some(port);
        bench.pass(secs(1));
        assert_eq!(bench.releases(), 0);
        assert_eq!(bench.state(KEY), Some(State::Bound));
    }
}

/// What keeps the dead may keep them for long, and an uplink may be cut meanwhile.
#[test]
fn with_an_uplink_whoever_was_kept_is_asked_before_it_is_released() {
    let mut bench = kept();
    // The latest probe left as long ago as may be.
    let probes = bench.probes();
    bench.until_heard(secs(1), |bench| bench.probes() > probes);
    bench.pass_heard(secs(3));
    let probes = bench.probes();
    bench.engine.resume("root", bench.now);
    bench.carry_out();
    bench.lives_at = Some(UPLINK);
    let mut dead = bench.engine.clone();
    bench.pass_heard(secs(3));
    assert_eq!(bench.state(KEY), Some(State::Moved));
    assert_eq!(bench.releases(), 0);
    // The same, and nobody answers.
    std::mem::swap(&mut bench.engine, &mut dead);
    bench.lives_at = None;
    bench.evidence.elsewhere = None;
    bench.pass_heard(secs(3));
    assert_eq!((bench.releases(), bench.probes()), (1, probes + 2));
}

#[test]
fn who_waits_for_a_port_that_has_come_is_asked_at_once() {
    let mut bench = settled_with_uplink();
    bench.lose(VM_PORT, PortLoss::Deleted);
    // The last question has left.
    bench.pass_heard(Duration::from_millis(9500));
    bench.port(13, "late", Role::Vm);
    bench.pass_heard(Duration::from_millis(1000));
    assert_eq!(bench.releases(), 0);
    bench.pass_heard(Duration::from_millis(1600));
    assert_eq!(bench.releases(), 1, "no whole round is waited for");
}

#[test]
fn a_port_that_comes_while_the_dead_wait_is_asked_too() {
    let mut bench = settled();
    bench.engine.pause("an upgrade".to_owned(), bench.now);
    bench.carry_out();
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(5));
    assert_eq!(bench.state(KEY), Some(State::Gone));
    bench.port(13, "late", Role::Vm);
    let probes = bench.probes();
    bench.engine.resume("root", bench.now);
    bench.carry_out();
    bench.pass(Duration::from_millis(500));
    assert_eq!(bench.releases(), 0);
    bench.pass(secs(3));
    assert!(bench.probes() > probes);
    assert_eq!(bench.releases(), 1);
    assert_eq!(bench.engine.counters()["held_dead"], 1, "it is told");
}

#[test]
fn a_release_that_was_overtaken_is_decided_anew() {
    let mut bench = settled();
    bench.outcome = ReleaseOutcome::Overtaken;
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(Duration::from_millis(2050));
    assert_eq!(bench.releases(), 1);
    assert_eq!(bench.state(KEY), Some(State::Gone));
    // What came between was a port, and its guest is the one.
    bench.outcome = ReleaseOutcome::Sent;
    bench.port(13, "late", Role::Vm);
    bench.lives_at = Some(13);
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 1);
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(bench.engine.counters()["releases_overtaken"], 1);
    assert_eq!(bench.engine.counters()["releases_failed"], 0);
}

#[test]
fn port_up_never_means_never() {
    let mut bench = Bench::new(Policy {
        release_while_port_up: false,
        ..Policy::default()
    });
    bench.lease(VM_PORT, VM, IP);
    bench.pass(secs(3000));
    assert_eq!(bench.state(KEY), Some(State::Silent));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn one_frame_in_the_hold_down_is_enough() {
    let mut bench = settled();
    bench.lose(VM_PORT, PortLoss::CarrierLost);
    bench.pass(secs(1));
    bench.port(VM_PORT, "vm1", Role::Vm);
    bench.vm_talks = true;
    bench.pass(secs(30));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert!(bench.notices().contains(&NoticeKind::Alive));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn a_veto_sends_it_back_to_be_looked_at() {
    let mut bench = settled();
    bench.outcome = ReleaseOutcome::Vetoed;
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(Duration::from_millis(2010));
    assert!(bench.notices().contains(&NoticeKind::Vetoed));
    assert_ne!(bench.state(KEY), Some(State::Released));
    assert_eq!(bench.engine.counters().get("releases_vetoed"), Some(&1));
    assert_eq!(
        bench.state(KEY),
        Some(State::Silent),
        "the hold-down begins anew"
    );
}

#[test]
fn a_lease_that_ends_soon_is_left_to_end() {
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        lease_secs: Some(20),
        ..bench.ack(VM_PORT, VM, IP)
    });
    bench.pass(secs(11));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(20));
    assert_eq!(bench.releases(), 0);
    assert_eq!(bench.state(KEY), Some(State::Expired));
}

#[test]
fn two_vms_with_one_client_id_hold_each_other() {
    let mut bench = Bench::new(Policy::default());
    let second = Ipv4Addr::new(10, 0, 0, 2);
    for (port, mac, ip) in [(VM_PORT, VM, IP), (OTHER_PORT, OTHER, second)] {
        bench.message(Message {
            client_id: Some(vec![0, 1, 2]),
            ..bench.request(port, mac, ip)
        });
        bench.message(bench.ack(port, mac, ip));
    }
    bench.pass(secs(5));
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(10));
    assert_eq!(bench.verdict(Gate::Unique), Verdict::Hold);
    assert_eq!(bench.releases(), 0);
}

#[test]
fn one_client_id_of_one_mac_or_of_one_that_is_gone_holds_nobody() {
    let mut bench = Bench::new(Policy::default());
    let second = Ipv4Addr::new(10, 0, 0, 2);
    let third = Ipv4Addr::new(10, 0, 0, 3);
    let named = |message: Message| Message {
        client_id: Some(vec![0, 1, 2]),
        ..message
    };
    for (port, mac, ip) in [
        (VM_PORT, VM, IP),
        (VM_PORT, VM, second),
        (OTHER_PORT, OTHER, third),
    ] {
        bench.message(named(bench.request(port, mac, ip)));
        bench.message(bench.ack(port, mac, ip));
    }
    assert_eq!(bench.verdict(Gate::Unique), Verdict::Hold);
    bench.message(Message {
        kind: MessageType::Release,
        ciaddr: Some(third),
        requested_ip: None,
        ..named(bench.request(OTHER_PORT, OTHER, third))
    });
    assert_eq!(bench.verdict(Gate::Unique), Verdict::Pass);
}

#[test]
fn nothing_is_released_before_the_agent_has_settled() {
    let mut bench = Bench::new(Policy {
        settle: secs(30),
        ..Policy::default()
    });
    bench.lease(VM_PORT, VM, IP);
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass(secs(29));
    assert_eq!(
        (bench.releases(), bench.verdict(Gate::Settled)),
        (0, Verdict::Hold)
    );
    bench.pass(secs(3));
    assert_eq!(bench.releases(), 1);
}

#[test]
fn the_breaker_opens_when_too_many_die() {
    let mut bench = Bench::new(Policy {
        breaker_min: 3,
        breaker: Some(0.1),
        ..Policy::default()
    });
    for n in 1..=10_u8 {
        let port = 100 + u32::from(n);
        bench.port(port, &format!("vm{n}"), Role::Vm);
        bench.lease(
            port,
            MacAddr([2, 0, 0, 0, 1, n]),
            Ipv4Addr::new(10, 0, 1, n),
        );
    }
    bench.pass(secs(5));
    for n in 1..=10_u8 {
        bench.tell(Event::PortDown {
            port: 100 + u32::from(n),
            loss: PortLoss::Deleted,
        });
    }
    bench.pass(secs(600));
    assert_eq!(bench.releases(), 3, "what died before it opened");
    assert!(
        bench
            .seen
            .iter()
            .filter_map(notice)
            .any(|n| n.event == NoticeKind::Held && n.reason.starts_with("breaker"))
    );
    // They were not dead: it closes by that, and says so.
    assert!(bench.engine.breaker_opened_at().is_some());
    bench.seen.clear();
    bench.lives_at = Some(OTHER_PORT);
    bench.pass(secs(60));
    assert!(bench.engine.breaker_opened_at().is_none());
    let mut told = bench.seen.iter().filter_map(notice);
    assert!(told.any(|n| n.event == NoticeKind::Alive && n.reason.starts_with("breaker closed")));
}

/// So many die at once on a node that sends a server two a second, `burst` at once.
fn dying_at_once(dead: u8, burst: u32) -> Bench {
    dying_at_once_of(dead, burst, &[])
}

/// The same, where there is an uplink.
fn dying_at_once_beyond(dead: u8, burst: u32) -> Bench {
    dying_at_once_of(dead, burst, &[UPLINK])
}

fn dying_at_once_of(dead: u8, burst: u32, uplinks: &[IfIndex]) -> Bench {
    let mut bench = Bench::new(Policy {
        rate: 2,
        burst,
        breaker: None,
        ..Policy::default()
    });
    for uplink in uplinks {
        bench.port(*uplink, "eth0", Role::Uplink);
    }
    for n in 1..=dead {
        let port = 100 + u32::from(n);
        bench.port(port, &format!("vm{n}"), Role::Vm);
        bench.lease(
            port,
            MacAddr([2, 0, 0, 0, 1, n]),
            Ipv4Addr::new(10, 0, 1, n),
        );
    }
    bench.pass_heard(secs(5));
    for n in 1..=dead {
        bench.tell(Event::PortDown {
            port: 100 + u32::from(n),
            loss: PortLoss::Deleted,
        });
    }
    bench
}

#[test]
fn releases_keep_to_the_rate() {
    let mut bench = dying_at_once(10, 1);
    bench.pass(Duration::from_millis(2010));
    assert_eq!(bench.releases(), 1);
    bench.pass(secs(1));
    assert_eq!(bench.releases(), 3);
    bench.pass(secs(4));
    assert_eq!(bench.releases(), 10);
}

#[test]
fn a_server_that_reads_on_sets_the_pace() {
    for (reads_on, released) in [(false, 8), (true, 100)] {
        let mut bench = dying_at_once(100, 8);
        bench.reads_on = reads_on;
        bench.pass(Duration::from_millis(2010));
        assert_eq!(bench.releases(), released);
    }
}

/// The oldest of the latest questions about those that wait.
fn oldest_question(bench: &Bench) -> Duration {
    let asked = bench.engine.bindings().filter_map(|binding| {
        let Check::Watching(watching) = binding.check else {
            return None;
        };
        (binding.state == State::Gone).then_some(watching.probed_at?)
    });
    let oldest = asked.min().unwrap_or(bench.now);
    bench.now.since(oldest)
}

#[test]
fn who_waits_for_long_is_asked_as_any_silent_vm_and_is_not_late() {
    let mut bench = dying_at_once(100, 1);
    let end = bench.now + secs(2) + secs(50);
    let policy = Policy::default();
    let mut longest = Duration::ZERO;
    while bench.now < end {
        one_turn(&mut bench);
        longest = longest.max(oldest_question(&bench));
    }
    assert!(longest >= policy.probe_interval, "{longest:?}");
    let wait = policy.probe_wait + Duration::from_millis(500);
    assert!(longest < policy.probe_interval + wait, "{longest:?}");
    assert_eq!(bench.releases(), 100);
}

/// Whom everybody has been asked about when, and how often those were looked at that are not released.
#[derive(Default)]
struct Asked {
    at: BTreeMap<Ipv4Addr, Vec<Time>>,
    looks: usize,
}

impl Asked {
    /// Until `done`: whoever is released from `since` on has just been asked about.
    fn follow(&mut self, bench: &mut Bench, since: Time, done: impl Fn(&Bench) -> bool) {
        let policy = Policy::default();
        let end = bench.now + secs(1000);
        while !done(bench) {
            assert!(bench.now < end, "{} released", bench.releases());
            let seen = bench.seen.len();
            bench.evidence.uplink_at = Some(bench.now);
            one_turn(bench);
            for action in &bench.seen[seen..] {
                match action {
                    Action::Control { probe } if probe.mac == MacAddr::BROADCAST => {
                        self.at.entry(probe.ip).or_default().push(bench.now);
                    }
                    Action::Look { key, .. } if bench.state(*key) == Some(State::Gone) => {
                        self.looks += 1;
                    }
                    Action::Release { release, .. } if bench.now > since => {
                        let [.., before, at] = self.at[&release.ip][..] else {
                            panic!("{} was asked about once", release.ip);
                        };
                        let (age, gap) = (bench.now.since(at), at.since(before));
                        assert!(
                            age <= policy.probe_wait + secs(1),
                            "{}: {age:?}",
                            release.ip
                        );
                        assert!(
                            gap <= Duration::from_millis(2500),
                            "{}: {gap:?}",
                            release.ip
                        );
                    }
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn who_waits_for_its_turn_is_asked_just_before_it() {
    let policy = Policy::default();
    for burst in [1, 4, 32] {
        let mut bench = dying_at_once_beyond(200, burst);
        let first = bench.now + policy.hold_down_uplink;
        // Until then each has its turn with the questions of its death.
        let since = first + policy.probe_wait + secs(1);
        let mut asked = Asked::default();
        asked.follow(&mut bench, since, |bench| bench.releases() == 200);
        let pace = secs(u64::from((200 - burst) / 2));
        let took = bench.now.since(first);
        assert!(took <= pace + secs(1), "burst {burst}: {took:?} {pace:?}");
        // Twice in ten seconds, and four times at both ends.
        let most = 200 * (8 + pace.as_secs() as usize / 10);
        assert!(asked.looks < most, "burst {burst}: {}", asked.looks);
    }
}

#[test]
fn who_waits_for_its_turn_is_asked_twice_before_it_and_not_more() {
    let mut bench = dying_at_once_beyond(60, 1);
    let never = bench.now + secs(10_000);
    let mut asked = Asked::default();
    asked.follow(&mut bench, never, |bench| bench.releases() == 59);
    asked.follow(&mut bench, never, |bench| bench.releases() == 60);
    let last = asked.at.into_values().max_by_key(|at| at.last().copied());
    let last = last.expect("all were asked");
    let lately = last.iter().filter(|at| bench.now.since(**at) < secs(4));
    assert_eq!(lately.count(), 2, "{:?}: {last:?}", bench.now);
}

#[test]
fn a_question_that_is_on_its_way_is_waited_for_in_the_queue() {
    let mut bench = dying_at_once_beyond(60, 1);
    bench.until_heard(secs(1), |bench| bench.releases() >= 20);
    bench.is_sending = true;
    let asked = bench.seen.len();
    let is_asked = |bench: &Bench| {
        let mut new = bench.seen[asked..].iter();
        new.find_map(|it| match it {
            Action::Probe { key, .. } => Some(*key),
            _ => None,
        })
    };
    bench.until_heard(Duration::from_millis(10), |bench| is_asked(bench).is_some());
    let key = is_asked(&bench).expect("somebody is asked");
    let due = bench.engine.binding(key).and_then(|it| it.due);
    assert!(due > Some(bench.now), "{due:?}");
}

/// One whom a pause keeps, and whose server does not read on: that is sent nothing for half a minute.
fn behind_one_that_is_unread() -> Bench {
    let mut bench = dying_at_once_beyond(3, 1);
    bench.reads_on = true;
    bench.lease(VM_PORT, VM, IP);
    bench.until_heard(Duration::from_millis(100), |bench| bench.releases() == 2);
    bench.reads_on = false;
    bench.until_heard(Duration::from_millis(100), |bench| bench.releases() == 3);
    bench.engine.pause("an upgrade".to_owned(), bench.now);
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.pass_heard(secs(20));
    assert_eq!(bench.state(KEY), Some(State::Gone));
    bench
}

#[test]
fn who_was_kept_is_asked_before_it_takes_its_place_in_the_queue() {
    let mut bench = behind_one_that_is_unread();
    let turn = |bench: &Bench| bench.engine.binding(KEY).and_then(|it| it.turn);
    let probes = bench.probes();
    bench.engine.resume("root", bench.now);
    bench.carry_out();
    bench.until_heard(Duration::from_millis(10), |bench| turn(bench).is_some());
    assert_eq!((bench.releases(), bench.probes()), (3, probes + 2));
}

/// Time is not what it waits for, so its turn may be now: it was asked before it took it.
#[test]
fn whose_turn_has_come_is_not_asked_for_that() {
    let mut bench = behind_one_that_is_unread();
    let probes = bench.probes();
    bench.engine.resume("root", bench.now);
    bench.carry_out();
    bench.until_heard(Duration::from_millis(10), |bench| {
        bench.probes() == probes + 2
    });
    let probed_at = bench.watching().probed_at.expect("it was asked");
    // All that there is to be late by.
    bench.turn(probed_at + Duration::from_millis(1900));
    let turn = bench.engine.binding(KEY).and_then(|it| it.turn);
    assert_eq!(turn, Some(bench.now));
    assert_eq!(bench.probes(), probes + 2);
}

/// A server that was stopped reads on: its pace is as before, whoever waited is asked first.
#[test]
fn who_waited_for_a_server_is_asked_when_that_reads_on() {
    let mut bench = dying_at_once_beyond(200, 8);
    bench.reads_on = true;
    let mut asked = Asked::default();
    let first = bench.now + Policy::default().hold_down_uplink;
    asked.follow(&mut bench, first + secs(2), |bench| bench.releases() >= 8);
    bench.reads_on = false;
    let again = bench.now + secs(15);
    asked.follow(&mut bench, again, |bench| bench.now >= again);
    let released = bench.releases();
    assert!(released < 100, "{released}");
    bench.reads_on = true;
    asked.follow(&mut bench, again, |bench| bench.releases() == 200);
    let took = bench.now.since(again);
    assert!(took < secs(8), "{took:?}");
}

/// A server that takes 50 ms over each: whoever is called while an answer is waited for gives way, and its
/// pace is not that of time, two a second.
#[test]
fn whoever_is_being_asked_does_not_hold_others_up() {
    let mut bench = dying_at_once_beyond(200, 1);
    let first = bench.now + Policy::default().hold_down_uplink;
    let mut read = VecDeque::new();
    while bench.releases() < 200 {
        let seen = bench.seen.len();
        bench.evidence.uplink_at = Some(bench.now);
        let due = bench.engine.poll_timeout().expect("something is due");
        match read.pop_front_if(|(at, _)| *at <= due) {
            Some((at, event)) => {
                bench.now = at;
                bench.tell(event);
            }
            None => bench.turn(due),
        }
        for action in &bench.seen[seen..] {
            if let Action::Sound(sounding) = action {
                let server = (sounding.segment, sounding.vlan, sounding.server);
                let mark = sounding.mark;
                let at = bench.now + Duration::from_millis(50);
                read.push_back((at, Event::ServerRead { server, mark }));
            }
        }
    }
    let took = bench.now.since(first);
    assert!(took < secs(30), "{took:?}");
}

/// A server that had answered is silent: time is the pace, and nobody comes for another's token.
#[test]
fn who_missed_its_turn_has_another_of_its_own() {
    let mut bench = dying_at_once(100, 4);
    bench.reads_on = true;
    let mut asked = Asked::default();
    let never = bench.now + secs(10_000);
    asked.follow(&mut bench, never, |bench| bench.releases() >= 4);
    bench.reads_on = false;
    let left = 100 - bench.releases();
    asked.looks = 0;
    asked.follow(&mut bench, never, |bench| bench.releases() == 100);
    // Less than each second for as long as it is waited for. All of them for each token: 5,000.
    assert!(asked.looks < left * 30, "{} of {left}", asked.looks);
}

/// The next turn of the engine; how many were looked at in it.
fn one_turn(bench: &mut Bench) -> usize {
    let due = bench.engine.poll_timeout().expect("something is due");
    let before = bench.looks();
    bench.turn(due);
    bench.looks() - before
}

#[test]
fn so_many_have_their_turn_at_once() {
    let mut bench = dying_at_once(150, 200);
    let mut turns = Vec::new();
    while bench.releases() < 150 {
        turns.push(one_turn(&mut bench));
        if turns.last() == Some(&64) {
            assert!(bench.engine.poll_timeout() <= Some(bench.now), "{turns:?}");
        }
    }
    assert_eq!(turns.iter().max(), Some(&64), "{turns:?}");
}

#[test]
fn who_boots_while_others_have_their_turn_keeps_its_address() {
    let mut bench = dying_at_once(150, 200);
    while bench.releases() == 0 {
        one_turn(&mut bench);
    }
    assert!(bench.releases() <= 64);
    let (mac, ip) = (MacAddr([2, 0, 0, 0, 1, 150]), Ipv4Addr::new(10, 0, 1, 150));
    bench.lease(OTHER_PORT, mac, ip);
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 149);
}

#[test]
fn a_lease_that_ends_in_just_min_remaining_is_still_given_back() {
    let mut bench = Bench::new(Policy::default());
    bench.lease(VM_PORT, VM, IP);
    let end = bench.now + Duration::from_secs(3600);
    let min_remaining = Policy::default().min_remaining;
    let verdict = |bench: &Bench, now: Time| {
        let explained = bench.engine.explain(KEY, now).unwrap();
        let finding = explained.iter().find(|finding| finding.gate == Gate::Lease);
        finding.unwrap().verdict
    };
    bench.now = Time::from_nanos(end.as_nanos() - min_remaining.as_nanos() as u64);
    assert_eq!(verdict(&bench, bench.now), Verdict::Pass);
    bench.now = bench.now + Duration::from_nanos(1);
    assert_eq!(verdict(&bench, bench.now), Verdict::Forget);
}
