//! Each gate by itself, at the edges of what it says.

use super::*;
use crate::core::{
    binding::{Binding, Origin, Watching},
    gates::Case,
    limits::Breaker,
    pacing::Pacing,
};

/// When everything of these tests is to be decided.
const NOW: Time = Time::from_nanos(1_000_000_000_000);
const TICK: Duration = Duration::from_nanos(1);

fn before(duration: Duration) -> Time {
    Time::ZERO + NOW.since(Time::ZERO).saturating_sub(duration)
}

/// Its port was lost twenty seconds ago, its probes are unanswered, and all is quiet.
struct World {
    policy: Policy,
    binding: Binding,
    watching: Watching,
    evidence: Evidence,
    uplink: bool,
    settled_at: Time,
    paused: Option<&'static str>,
}

impl World {
    fn new() -> Self {
        let mut binding = Binding::new(KEY, VM, before(secs(100)));
        binding.state = State::Silent;
        binding.server = Some(SERVER);
        binding.acked = true;
        Self {
            policy: Policy::default(),
            binding,
            watching: Watching {
                armed_at: before(secs(20)),
                lost: Some((before(secs(20)), PortLoss::Deleted)),
                probes: 3,
                probed_at: Some(before(secs(5))),
                all_asked: [None; 2],
                asking_all: false,
                everywhere: true,
                deaf: false,
                closing: false,
                anew: false,
            },
            evidence: Evidence {
                armed: true,
                uplink_at: Some(NOW),
                ..Evidence::default()
            },
            uplink: true,
            settled_at: Time::ZERO,
            paused: None,
        }
    }

    fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut world = Self::new();
        change(&mut world);
        world
    }

    fn ask<T>(&self, question: impl FnOnce(&Case<'_>) -> T) -> T {
        let mut binding = self.binding.clone();
        binding.check = Check::Watching(self.watching);
        binding.evidence = Some(Box::new((NOW, self.evidence)));
        question(&Case {
            policy: &self.policy,
            binding: &binding,
            twin: None,
            uplink: self.uplink,
            bridge_gone: false,
            settled_at: self.settled_at,
            watched_at: Time::ZERO,
            paused: self.paused,
            breaker: &Breaker::default(),
            pacing: &Pacing::new(50, 32),
            alarmed: false,
            by: None,
            segment_held: None,
            vlans: None,
            live: 1,
        })
    }

    fn says(&self, gate: Gate) -> (Verdict, String) {
        let findings = self.ask(|case| case.findings(NOW));
        let found = findings.into_iter().find(|finding| finding.gate == gate);
        let found = found.expect("every gate speaks");
        (found.verdict, found.reason)
    }

    fn is_dead(&self) -> bool {
        self.says(Gate::Dead).0 == Verdict::Pass
    }

    fn reason(&self, gate: Gate) -> String {
        self.says(gate).1
    }
}

#[test]
fn one_that_is_left_out_is_not_asked() {
    let mut world = World::with(|world| world.paused = Some("an upgrade"));
    assert_eq!(world.says(Gate::Paused).0, Verdict::Hold);
    world.policy.without.insert(Gate::Paused);
    assert_eq!(
        world.says(Gate::Paused),
        (Verdict::Pass, "overridden".to_owned())
    );
    assert_ne!(world.reason(Gate::Dead), "overridden");
}

#[test]
fn who_has_just_settled_has_settled() {
    let settled =
        |settled_at| World::with(|world| world.settled_at = settled_at).says(Gate::Settled);
    assert_eq!(settled(NOW).0, Verdict::Pass);
    let (verdict, reason) = settled(NOW + Duration::from_millis(1250));
    assert_eq!(verdict, Verdict::Hold);
    assert_eq!(reason, "the agent or its links changed: 1.250s to go");
}

#[test]
fn what_confirms_is_told_by_where_it_comes_from() {
    let seen = |origin| {
        World::with(|world| {
            world.binding.acked = false;
            world.binding.seen_alive = true;
            world.binding.origin = origin;
        })
        .says(Gate::Confirmed)
    };
    let (wire, imported) = (seen(Origin::Wire), seen(Origin::Imported));
    assert_eq!((wire.0, imported.0), (Verdict::Pass, Verdict::Pass));
    assert!(wire.1.starts_with("no ACK was seen"), "{}", wire.1);
    assert!(imported.1.starts_with("imported"), "{}", imported.1);
}

#[test]
fn the_uplink_must_have_been_heard_since_the_watch_began() {
    assert!(World::new().is_dead());
    let heard = |at| World::with(|world| world.evidence.uplink_at = at).is_dead();
    assert!(!heard(None));
    assert!(!heard(Some(before(secs(20) + TICK))));
    assert!(heard(Some(before(secs(20)))));
    let unheard = |change: fn(&mut World)| {
        let world = World::with(|world| {
            world.evidence.uplink_at = None;
            change(world);
        });
        world.is_dead()
    };
    assert!(unheard(|world| world.uplink = false));
    assert!(unheard(|world| world.watching.everywhere = false));
}

#[test]
fn a_probe_has_its_time() {
    let probed = |ago| World::with(|world| world.watching.probed_at = Some(before(ago)));
    assert!(!probed(secs(1) - TICK).is_dead());
    assert!(probed(secs(1)).is_dead());
    let few = World::with(|world| world.watching.probes = 2);
    assert_eq!(few.reason(Gate::Dead), "2 of 3 probes have left");
}

/// The hold-down of ten seconds ended ten seconds ago, and a probe's time is a second.
#[test]
fn the_last_probe_leaves_shortly_before_the_hold_down_ends() {
    let last = |at| World::with(|world| world.watching.probed_at = at);
    assert!(last(Some(before(secs(11)))).is_dead());
    let early = before(secs(11) + TICK);
    for at in [None, Some(early)] {
        let reason = last(at).reason(Gate::Dead);
        assert!(reason.starts_with("no probe could leave"), "{reason}");
    }
    let early = |change: fn(&mut World)| {
        let world = World::with(|world| {
            world.watching.probed_at = Some(early);
            change(world);
        });
        world.is_dead()
    };
    assert!(early(|world| world.uplink = false));
    assert!(early(|world| world.watching.everywhere = false));
    let lost = |ago| {
        let world = World::with(|world| {
            world.watching.armed_at = before(ago);
            world.watching.lost = Some((before(ago), PortLoss::Deleted));
            world.watching.probed_at = Some(before(ago));
        });
        world.is_dead()
    };
    // It ends now, and a tick later.
    assert!(!lost(secs(10)));
    assert!(lost(secs(10) - TICK));
}

#[test]
fn an_answer_to_a_probe_takes_no_longer_than_its_round() {
    let wait = |change: fn(&mut World)| World::with(change).ask(|case| case.probe_wait());
    assert_eq!(wait(|_| ()), secs(1));
    // A third of the hold-down.
    let short = wait(|world| world.policy.hold_down_uplink = Duration::from_millis(900));
    assert_eq!(short, Duration::from_millis(300));
    let often = wait(|world| {
        world.watching.lost = None;
        world.policy.probe_interval = Duration::from_millis(500);
    });
    assert_eq!(often, Duration::from_millis(500));
}

#[test]
fn what_was_seen_elsewhere_counts_from_the_watch_on() {
    let seen = |at| {
        World::with(|world| world.evidence.elsewhere = Some((at, OTHER_PORT)))
            .says(Gate::Elsewhere)
            .0
    };
    assert_eq!(seen(before(secs(20) + TICK)), Verdict::Pass);
    assert_eq!(seen(before(secs(20))), Verdict::Hold);
    assert_eq!(seen(NOW), Verdict::Hold);
    let moved = World::with(|world| world.binding.state = State::Moved);
    assert_eq!(
        moved.says(Gate::Elsewhere),
        (Verdict::Hold, "the VM moved".to_owned())
    );
}

#[test]
fn by_xdp_nothing_that_has_a_vlan_is_released() {
    let xdp = |vlan| {
        World::with(|world| {
            world.policy.blind_to_tags = true;
            world.binding.key.vlan = vlan;
        })
    };
    assert_eq!(xdp(0).says(Gate::Confirmed).0, Verdict::Pass);
    assert!(xdp(10).reason(Gate::Confirmed).starts_with("by XDP"));
}

#[test]
fn a_watch_that_is_to_begin_anew_shows_nothing() {
    let world = World::with(|world| world.watching.anew = true);
    assert!(world.reason(Gate::Dead).starts_with("something new"));
}
