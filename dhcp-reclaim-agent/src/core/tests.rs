//! The engine, driven by hand: each test tells what the wire shows and reads what is to be done.

mod dhcp;
mod gates;
mod imports;
mod memory;
mod operator;
mod outcome;
mod ports;
mod release;
mod watch;

use std::{net::Ipv4Addr, time::Duration};

use super::{
    Action, AlarmId, Answer, AskError, Commit, Direction, Engine, Event, Evidence, IfIndex, Key,
    MacAddr, Message, MessageType, Notice, NoticeKind, Outcome, Policy, Port, PortLoss, Probe,
    ProbeVia, QueryAnswer, ReleaseOutcome, Role, SavedAlarm, State, Time, TransactionId, Vlan,
    Vlans,
    binding::{Ask, Check, Speaker},
    gates::{Gate, Override, Verdict},
};

const SEGMENT: u32 = 1;
const VM_PORT: IfIndex = 11;
const OTHER_PORT: IfIndex = 12;
const UPLINK: IfIndex = 20;
const VM: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const OTHER: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
const SERVER_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xfe]);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
const IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const KEY: Key = Key {
    segment: SEGMENT,
    vlan: 0,
    ip: IP,
};

/// An engine with the wire in the test's hand. Looks are answered from `evidence`, probes leave.
struct Bench {
    engine: Engine,
    now: Time,
    evidence: Evidence,
    /// Whether a look finds that a frame of the VM has just come.
    vm_talks: bool,
    /// Where a look finds that the VM has just been seen, and where else; whose its address then is,
    /// and whether only its MAC was.
    lives_at: Option<IfIndex>,
    also_at: Option<IfIndex>,
    address_of: Option<MacAddr>,
    mac_only: bool,
    /// Probes leave.
    sends: bool,
    outcome: ReleaseOutcome,
    /// What the server says to lease queries; `None`: nothing yet.
    lease_query: Option<QueryAnswer>,
    /// The server answers what comes behind RELEASEs.
    reads_on: bool,
    /// How many gates had spoken for the latest RELEASE when it was on its way.
    grounds: usize,
    /// Who had ordered it.
    ordered_by: Option<Override>,
    seen: Vec<Action>,
    /// What was to be saved, in which state; `None` is deleted.
    saves: Vec<(Key, Option<State>)>,
}

impl Bench {
    fn new(policy: Policy) -> Self {
        let now = Time::ZERO + Duration::from_secs(1000);
        let mut bench = Self {
            engine: Engine::new(policy, now),
            now,
            evidence: Evidence {
                armed: true,
                ..Evidence::default()
            },
            vm_talks: false,
            lives_at: None,
            also_at: None,
            address_of: None,
            mac_only: false,
            sends: true,
            outcome: ReleaseOutcome::Sent,
            lease_query: Some(QueryAnswer::Silence),
            reads_on: false,
            grounds: 0,
            ordered_by: None,
            seen: Vec::new(),
            saves: Vec::new(),
        };
        bench.port(VM_PORT, "vm1", Role::Vm);
        bench.port(OTHER_PORT, "vm2", Role::Vm);
        bench
    }

    fn port(&mut self, ifindex: IfIndex, name: &str, role: Role) {
        self.tell(Event::PortUp(Port {
            ifindex,
            name: name.to_owned(),
            segment: SEGMENT,
            role,
        }));
    }

    fn tell(&mut self, event: Event) {
        self.engine.handle(event, self.now);
        self.carry_out();
    }

    fn carry_out(&mut self) {
        while let Some(action) = self.engine.poll_action() {
            match action {
                Action::Save { .. } | Action::SaveTransaction { .. } => {}
                _ => self.seen.push(action.clone()),
            }
            let answer = match action {
                Action::Look {
                    key, mac, own_port, ..
                } => {
                    let mut evidence = self.evidence;
                    let seen_at = [self.lives_at, self.also_at];
                    for port in seen_at.into_iter().flatten() {
                        if own_port == Some(port) {
                            evidence.own_at = Some(self.now);
                            evidence.address_at = (!self.mac_only).then_some(self.now);
                        } else {
                            evidence.elsewhere = Some((self.now, port));
                        }
                        let of = self.address_of.unwrap_or(mac);
                        evidence.address = (!self.mac_only).then_some((self.now, of));
                    }
                    if self.vm_talks {
                        evidence.own_at = Some(self.now);
                        evidence.address_at = Some(self.now);
                    }
                    Event::Evidence { key, evidence }
                }
                Action::Probe { key, .. } => Event::Probed {
                    key,
                    sent: self.sends,
                },
                Action::Release { key, .. } => {
                    self.grounds = self.engine.grounds(key).len();
                    self.ordered_by = self.engine.ordered_by(key).cloned();
                    Event::Released {
                        key,
                        outcome: self.outcome,
                    }
                }
                Action::Sound(sounding) if self.reads_on => Event::ServerRead {
                    server: (sounding.segment, sounding.vlan, sounding.server),
                    mark: sounding.mark,
                },
                Action::Query { key, query } => match self.lease_query {
                    Some(answer) => Event::Queried {
                        key,
                        server: query.server,
                        answer,
                    },
                    None => continue,
                },
                Action::Save { key } => {
                    self.saves
                        .push((key, self.engine.saved(key).map(|saved| saved.state)));
                    continue;
                }
                Action::SaveTransaction { .. }
                | Action::SaveAlarm { .. }
                | Action::Arm { .. }
                | Action::Disarm { .. }
                | Action::Control { .. }
                | Action::Sound(_)
                | Action::Answer { .. }
                | Action::Notify(_) => {
                    continue;
                }
            };
            self.engine.handle(answer, self.now);
        }
    }

    /// Lets `duration` pass, stopping at each time the engine asks for.
    fn pass(&mut self, duration: Duration) {
        let until = self.now + duration;
        while let Some(at) = self.engine.poll_timeout().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.engine.handle_timeout(self.now);
            self.carry_out();
        }
        self.now = until;
    }

    /// The same, on an uplink that is heard all the time.
    fn pass_heard(&mut self, duration: Duration) {
        const STEP: Duration = Duration::from_millis(100);
        let until = self.now + duration;
        while self.now < until {
            self.evidence.uplink_at = Some(self.now);
            self.pass(STEP.min(until.since(self.now)));
        }
    }

    fn message(&mut self, message: Message) {
        self.tell(Event::Message(message));
    }

    fn request(&self, port: IfIndex, mac: MacAddr, ip: Ipv4Addr) -> Message {
        Message {
            seen_at: self.now,
            port,
            role: Role::Vm,
            direction: Direction::FromPort,
            vlan: 0,
            kind: MessageType::Request,
            ambiguous: false,
            source_mac: mac,
            destination_mac: MacAddr::BROADCAST,
            source_ip: Ipv4Addr::UNSPECIFIED,
            destination_ip: Ipv4Addr::BROADCAST,
            xid: 7,
            chaddr: mac,
            ciaddr: None,
            yiaddr: None,
            giaddr: None,
            requested_ip: Some(ip),
            server_id: Some(SERVER),
            lease_secs: None,
            renewal_secs: None,
            rebinding_secs: None,
            client_id: None,
            rapid_commit: false,
        }
    }

    fn ack(&self, port: IfIndex, mac: MacAddr, ip: Ipv4Addr) -> Message {
        Message {
            direction: Direction::ToPort,
            kind: MessageType::Ack,
            source_mac: SERVER_MAC,
            destination_mac: mac,
            source_ip: SERVER,
            destination_ip: ip,
            yiaddr: Some(ip),
            requested_ip: None,
            lease_secs: Some(3600),
            ..self.request(port, mac, ip)
        }
    }

    fn lease(&mut self, port: IfIndex, mac: MacAddr, ip: Ipv4Addr) {
        self.message(self.request(port, mac, ip));
        self.message(self.ack(port, mac, ip));
    }

    fn state(&self, key: Key) -> Option<State> {
        self.engine
            .bindings()
            .find(|binding| binding.key == key)
            .map(|binding| binding.state)
    }

    fn notices(&self) -> Vec<NoticeKind> {
        self.seen
            .iter()
            .filter_map(notice)
            .map(|notice| notice.event)
            .collect()
    }

    fn releases(&self) -> usize {
        self.seen
            .iter()
            .filter(|action| matches!(action, Action::Release { .. }))
            .count()
    }

    fn probes(&self) -> usize {
        self.seen
            .iter()
            .filter(|action| matches!(action, Action::Probe { .. }))
            .count()
    }

    fn verdict(&self, gate: Gate) -> Verdict {
        let findings = self
            .engine
            .explain(KEY, self.now)
            .expect("the binding is known");
        findings
            .iter()
            .find(|finding| finding.gate == gate)
            .expect("every gate speaks")
            .verdict
    }
}

fn notice(action: &Action) -> Option<&Notice> {
    match action {
        Action::Notify(notice) => Some(notice),
        Action::Arm { .. }
        | Action::Disarm { .. }
        | Action::Look { .. }
        | Action::Probe { .. }
        | Action::Control { .. }
        | Action::Release { .. }
        | Action::Sound(_)
        | Action::Query { .. }
        | Action::Save { .. }
        | Action::SaveTransaction { .. }
        | Action::SaveAlarm { .. }
        | Action::Answer { .. } => None,
    }
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn settled() -> Bench {
    let mut bench = Bench::new(Policy::default());
    bench.lease(VM_PORT, VM, IP);
    bench.pass(secs(5));
    bench.seen.clear();
    bench
}

#[test]
fn a_request_and_its_ack_make_a_binding() {
    let mut bench = Bench::new(Policy::default());
    bench.seen.clear();
    bench.message(bench.request(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Requested));
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(bench.notices(), [NoticeKind::Requested, NoticeKind::Bound]);
    let binding = bench.engine.bindings().next().expect("one binding");
    assert_eq!(binding.server, Some(SERVER));
    assert_eq!(binding.server_mac, Some(SERVER_MAC));
    assert_eq!(binding.expires, Some(bench.now + secs(3600)));
}

#[test]
fn an_ack_that_nobody_asked_for_makes_nothing() {
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), None);
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        xid: 8,
        ..bench.ack(VM_PORT, VM, IP)
    });
    bench.message(bench.ack(OTHER_PORT, VM, IP));
    bench.message(Message {
        vlan: 5,
        ..bench.ack(VM_PORT, VM, IP)
    });
    assert_eq!(bench.state(KEY), Some(State::Requested));
    bench.pass(secs(121));
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Expired));
}

#[test]
fn a_lost_port_is_probed_at_once_and_released_after_the_hold_down() {
    let mut bench = settled();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
        bench.tell(Event::PortDown {
            port: VM_PORT,
            loss: PortLoss::Deleted,
        });
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

/// A port comes back, and whoever was behind it was seen elsewhere just before.
#[test]
fn what_was_seen_before_its_port_came_back_is_looked_at() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass(secs(10));
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::CarrierLost,
    });
    bench.pass(Duration::from_millis(500));
    bench.lives_at = Some(UPLINK);
    bench.port(VM_PORT, "vm1", Role::Vm);
    assert_eq!(bench.state(KEY), Some(State::Moved));
}

/// What keeps the dead may keep them for long, and an uplink may be cut meanwhile.
#[test]
fn with_an_uplink_whoever_was_kept_is_asked_before_it_is_released() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass_heard(secs(10));
    bench.engine.pause("an upgrade".to_owned(), bench.now);
    bench.carry_out();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass_heard(secs(20));
    assert_eq!(bench.state(KEY), Some(State::Gone));
    // The latest probe left as long ago as may be.
    let probes = bench.probes();
    while bench.probes() == probes {
        bench.pass_heard(secs(1));
    }
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
    assert_eq!((bench.releases(), bench.probes()), (1, probes + 1));
}

#[test]
fn who_waits_for_a_port_that_has_come_is_asked_at_once() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass_heard(Duration::from_millis(10000));
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
}

#[test]
fn a_release_that_was_overtaken_is_decided_anew() {
    let mut bench = settled();
    bench.outcome = ReleaseOutcome::Overtaken;
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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

fn unheard(mac: MacAddr) -> Event {
    Event::Unheard {
        segment: SEGMENT,
        macs: vec![mac],
    }
}

#[test]
fn whoever_spoke_at_a_port_that_was_not_heard_has_the_long_time() {
    let mut bench = settled();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(1));
    bench.port(13, "late", Role::Vm);
    bench.tell(unheard(VM));
    bench.pass(secs(299));
    assert_eq!(bench.releases(), 0);
    bench.pass(secs(3));
    assert_eq!(bench.releases(), 1);
    // It is nothing to anybody else.
    let mut bench = settled();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
        bench.tell(Event::PortDown {
            port: VM_PORT,
            loss: PortLoss::Deleted,
        });
        bench.pass(secs(5));
        assert_eq!(bench.releases(), usize::from(is_seen));
    }
}

#[test]
fn what_was_seen_is_looked_at_before_silence_begins_anew() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass(secs(5));
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(1));
    // Its announcement from beyond, once; and then somebody claims its address.
    bench.evidence.elsewhere = Some((bench.now, UPLINK));
    bench.message(bench.request(OTHER_PORT, OTHER, IP));
    assert_eq!(bench.state(KEY), Some(State::Moved));
}

#[test]
fn a_vm_that_is_plugged_in_restarts_nobodys_hold_down() {
    let mut bench = settled();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(1));
    bench.port(13, "new", Role::Vm);
    bench.tell(Event::PvidChanged { port: 13 });
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 1, "3 s, of which 2 s are the hold-down");

    let mut bench = settled();
    bench.lease(OTHER_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(1));
    // What was said by it was taken for another VLAN's.
    bench.tell(Event::PvidChanged { port: OTHER_PORT });
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn with_an_uplink_the_hold_down_is_longer_and_the_uplink_must_be_heard() {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass(secs(10));
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::CarrierLost,
    });
    bench.pass(secs(3));
    assert_eq!(bench.state(KEY), Some(State::Released));
}

#[test]
fn a_vm_behind_a_port_that_nobody_named_is_disowned() {
    let mut bench = settled();
    bench.port(13, "spare1", Role::Aside);
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.evidence.elsewhere = Some((bench.now, 13));
    bench.pass(secs(60));
    assert_eq!(bench.state(KEY), Some(State::Moved));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn no_server_is_believed_behind_a_port_that_nobody_named() {
    let mut bench = Bench::new(Policy::default());
    bench.port(13, "spare1", Role::Aside);
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        port: 13,
        role: Role::Aside,
        direction: Direction::FromPort,
        ..bench.ack(VM_PORT, VM, IP)
    });
    assert!(bench.notices().contains(&NoticeKind::RogueServer));
    // The kernel half makes no record of that frame on its way to the VM; should one come, no more
    // is believed.
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Requested));
}

#[test]
fn a_port_that_is_no_vms_any_more_takes_its_bindings_along() {
    let mut bench = settled();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Detached,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
fn a_claim_that_the_server_refuses_is_none() {
    let nak = |bench: &Bench, mac: MacAddr| Message {
        kind: MessageType::Nak,
        yiaddr: None,
        lease_secs: None,
        ..bench.ack(OTHER_PORT, mac, IP)
    };
    let mut bench = settled();
    // Two clients that boot at once are offered the same address.
    bench.message(bench.request(OTHER_PORT, OTHER, IP));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.message(nak(&bench, OTHER));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
    // In its own name somebody else may have asked, or itself from another place.
    bench.message(bench.request(OTHER_PORT, VM, IP));
    bench.message(nak(&bench, VM));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    let asked = bench.seen.iter().any(|action| {
        matches!(action, Action::Control { probe } if (probe.ip, probe.mac) == (relay, SERVER_MAC))
    });
    assert!(asked, "{:?}", bench.seen);
}

#[test]
fn a_vm_that_was_plugged_in_anew_is_followed() {
    let mut bench = settled();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: 13,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::CarrierLost,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
fn what_the_guest_ends_itself_is_never_released() {
    for (kind, state) in [
        (MessageType::Release, State::Withdrawn),
        (MessageType::Decline, State::Refused),
    ] {
        let mut bench = settled();
        bench.message(Message {
            kind,
            ciaddr: Some(IP),
            ..bench.request(VM_PORT, VM, IP)
        });
        assert_eq!(bench.state(KEY), Some(state));
        bench.tell(Event::PortDown {
            port: VM_PORT,
            loss: PortLoss::Deleted,
        });
        bench.pass(secs(60));
        assert_eq!(bench.releases(), 0);
    }
}

#[test]
fn a_nak_ends_it() {
    let mut bench = settled();
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        kind: MessageType::Nak,
        yiaddr: None,
        ..bench.ack(VM_PORT, VM, IP)
    });
    assert_eq!(bench.state(KEY), Some(State::Refused));
}

#[test]
fn a_neighbour_cannot_end_or_take_it() {
    let mut bench = settled();
    for kind in [
        MessageType::Release,
        MessageType::Decline,
        MessageType::Request,
    ] {
        // In its own name, and in the victim's.
        bench.message(Message {
            kind,
            ciaddr: Some(IP),
            ..bench.request(OTHER_PORT, OTHER, IP)
        });
        bench.message(Message {
            kind,
            ciaddr: Some(IP),
            ..bench.request(OTHER_PORT, VM, IP)
        });
        bench.message(Message {
            kind,
            ciaddr: Some(IP),
            source_mac: OTHER,
            ..bench.request(OTHER_PORT, VM, IP)
        });
    }
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(
        bench.engine.bindings().next().map(|binding| binding.port),
        Some(VM_PORT)
    );
    assert!(bench.notices().contains(&NoticeKind::Conflict));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.vm_talks = true;
    bench.pass(secs(60));
    assert_eq!(
        bench.verdict(Gate::Confirmed),
        Verdict::Pass,
        "its own word settles it"
    );
}

#[test]
fn an_answer_that_a_vm_gave_is_not_believed() {
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    let forged = Message {
        source_mac: OTHER,
        ..bench.ack(VM_PORT, VM, IP)
    };
    // The same frame: in by the attacker's port, out by the victim's.
    bench.message(Message {
        port: OTHER_PORT,
        direction: Direction::FromPort,
        ..forged.clone()
    });
    bench.message(forged);
    assert_eq!(bench.state(KEY), Some(State::Requested));
    assert!(bench.notices().contains(&NoticeKind::RogueServer));
}

#[test]
fn an_ambiguous_message_holds() {
    let mut bench = settled();
    bench.message(Message {
        ambiguous: true,
        ..bench.request(VM_PORT, VM, IP)
    });
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 0);
    assert_eq!(bench.state(KEY), Some(State::Gone));
    assert!(bench.notices().contains(&NoticeKind::Held));
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
fn an_ack_older_than_the_loss_does_not_end_the_doubt() {
    let mut bench = settled();
    let (request, ack) = (bench.request(VM_PORT, VM, IP), bench.ack(VM_PORT, VM, IP));
    bench.pass(secs(1));
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    // They were in the ring before what was lost.
    bench.message(request);
    bench.message(ack);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.pass(secs(1));
    bench.lease(VM_PORT, VM, IP);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
}

#[test]
fn a_lease_that_ran_out_in_doubt_is_not_a_neighbours() {
    let mut bench = settled();
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    bench.vm_talks = false;
    bench.pass(secs(3600));
    assert_eq!(bench.state(KEY), Some(State::Expired));
    // Its renewal may be what was lost, so a neighbour in its MAC's name binds nothing.
    bench.lease(OTHER_PORT, VM, IP);
    assert_eq!(bench.state(KEY), Some(State::Expired));
    bench.tell(Event::PortDown {
        port: OTHER_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(600));
    assert_eq!(bench.releases(), 0);
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(20));
    assert_eq!(bench.releases(), 0);
    assert_eq!(bench.state(KEY), Some(State::Expired));
}

#[test]
fn an_infinite_lease_never_ends() {
    let mut bench = Bench::new(Policy::default());
    bench.vm_talks = true;
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.message(Message {
        lease_secs: Some(u32::MAX),
        ..bench.ack(VM_PORT, VM, IP)
    });
    bench.pass(secs(100_000));
    assert_eq!(bench.state(KEY), Some(State::Bound));
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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

#[test]
fn an_answer_that_takes_its_time_is_an_answer() {
    let mut bench = Bench::new(Policy::default());
    bench.lease(OTHER_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.message(bench.request(VM_PORT, VM, IP));
    // Long enough for everything else that is due, and shorter than a transaction.
    bench.pass(secs(100));
    bench.message(bench.ack(VM_PORT, VM, IP));
    assert_eq!(bench.state(KEY), Some(State::Bound));
    // And one that takes too long is none.
    let ip = Ipv4Addr::new(10, 0, 0, 3);
    bench.message(bench.request(VM_PORT, VM, ip));
    bench.pass(secs(121));
    bench.message(bench.ack(VM_PORT, VM, ip));
    assert_ne!(bench.state(Key { ip, ..KEY }), Some(State::Bound));
}

/// So many die at once on a node that sends a server two a second, `burst` at once.
fn dying_at_once(dead: u8, burst: u32) -> Bench {
    let mut bench = Bench::new(Policy {
        rate: 2,
        burst,
        breaker: None,
        ..Policy::default()
    });
    for n in 1..=dead {
        let port = 100 + u32::from(n);
        bench.port(port, &format!("vm{n}"), Role::Vm);
        bench.lease(
            port,
            MacAddr([2, 0, 0, 0, 1, n]),
            Ipv4Addr::new(10, 0, 1, n),
        );
    }
    bench.pass(secs(5));
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

#[test]
fn by_request_alone_an_address_must_be_seen_alive() {
    let policy = Policy {
        commit: Commit::Request,
        ..Policy::default()
    };
    for talks in [false, true] {
        let mut bench = Bench::new(policy.clone());
        bench.message(bench.request(VM_PORT, VM, IP));
        bench.vm_talks = talks;
        bench.pass(secs(10));
        let state = if talks {
            State::Bound
        } else {
            State::Requested
        };
        assert_eq!(bench.state(KEY), Some(state));
        bench.vm_talks = false;
        bench.tell(Event::PortDown {
            port: VM_PORT,
            loss: PortLoss::Deleted,
        });
        bench.pass(secs(60));
        assert_eq!(bench.releases(), usize::from(talks));
    }
}

#[test]
fn bindings_and_transactions_of_one_port_are_bounded() {
    let mut bench = Bench::new(Policy {
        bindings_per_port: 16,
        ..Policy::default()
    });
    for n in 0..1000_u32 {
        let [_, _, high, low] = n.to_be_bytes();
        let mac = MacAddr([2, 0, 0, 9, high, low]);
        let ip = Ipv4Addr::new(10, 9, high, low);
        bench.message(Message {
            xid: n,
            ..bench.request(VM_PORT, mac, ip)
        });
        bench.message(Message {
            xid: n,
            ..bench.ack(VM_PORT, mac, ip)
        });
    }
    assert_eq!(bench.engine.bindings().count(), 16);
    assert!(bench.engine.counters()["bindings_refused"] > 0);
}

// ---- what outlives the agent -----------------------------------------------------------------

/// Another agent, a moment later: it knows what was saved, and the ports that are there.
fn after_restart(bench: &Bench, ports: &[(IfIndex, &str)]) -> Bench {
    after_restart_with(bench, ports, None)
}

/// The same, where the kernel half knows what became of the intents that were left.
fn after_restart_with(
    bench: &Bench,
    ports: &[(IfIndex, &str)],
    outcome: Option<ReleaseOutcome>,
) -> Bench {
    let mut saved: Vec<_> = bench
        .engine
        .bindings()
        .filter_map(|binding| bench.engine.saved(binding.key))
        .collect();
    for (saved, outcome) in saved.iter_mut().zip(outcome) {
        saved.settle(outcome, bench.now, bench.now + secs(1));
    }
    let transactions: Vec<_> = transactions(bench)
        .into_iter()
        .filter_map(|id| bench.engine.saved_transaction(id))
        .collect();
    let mut next = Bench::new(Policy::default());
    next.now = bench.now + secs(1);
    next.engine = Engine::new(Policy::default(), next.now);
    for (ifindex, name) in ports {
        next.port(*ifindex, name, Role::Vm);
    }
    next.seen.clear();
    next.engine.restore_transactions(transactions, next.now);
    next.engine.restore(saved, next.now);
    next.carry_out();
    next
}

fn transactions(bench: &Bench) -> Vec<TransactionId> {
    let id = |port| TransactionId {
        port,
        xid: 7,
        chaddr: VM,
    };
    let ids = [VM_PORT, OTHER_PORT].map(id).into_iter();
    ids.filter(|id| bench.engine.saved_transaction(*id).is_some())
        .collect()
}

const PORTS: [(IfIndex, &str); 2] = [(VM_PORT, "vm1"), (OTHER_PORT, "vm2")];

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
    bench.tell(Event::PortDown { port, loss });
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
    next.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::CarrierLost,
    });
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.lease(OTHER_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.pass(secs(1));
    bench.tell(Event::Overslept {
        suspended: secs(1800),
    });
    bench.tell(Event::PortDown {
        port: OTHER_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(299));
    assert_eq!(bench.releases(), 0, "they may have been started elsewhere");
    bench.pass(secs(2));
    assert_eq!(bench.releases(), 2);
}

#[test]
fn a_port_that_goes_before_its_vm_was_seen_again_takes_the_slow_road() {
    let mut bench = after_restart(&settled(), &PORTS);
    let (port, loss) = (VM_PORT, PortLoss::Deleted);
    bench.tell(Event::PortDown { port, loss });
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
    bench.tell(Event::PortDown { port, loss });
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
    bench.tell(Event::PortDown { port, loss });
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
    bench.tell(Event::PortDown { port, loss });
    bench.pass(secs(100));
    assert_eq!((bench.releases(), bench.engine.live()), (0, 0));
}

// ---- after the RELEASE ------------------------------------------------------------------------

/// A binding whose port was deleted, and that was released for it.
fn released(answer: Option<QueryAnswer>) -> Bench {
    let mut bench = settled();
    bench.lease_query = answer;
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    while bench.releases() == 0 {
        bench.pass(Duration::from_millis(100));
    }
    assert_eq!(bench.state(KEY), Some(State::Released));
    bench
}

fn outcome(bench: &Bench) -> Option<Outcome> {
    bench.engine.bindings_of(IP).next()?.outcome
}

fn count(bench: &Bench, kind: NoticeKind) -> usize {
    bench
        .notices()
        .iter()
        .filter(|other| **other == kind)
        .count()
}

#[test]
fn a_release_that_nobody_speaks_of_is_unverified() {
    let mut bench = released(Some(QueryAnswer::Silence));
    bench.pass(secs(300));
    assert_eq!(outcome(&bench), Some(Outcome::Unverified));
    assert_eq!(
        (bench.releases(), count(&bench, NoticeKind::Verified)),
        (1, 0)
    );
    assert_eq!(
        bench
            .seen
            .iter()
            .filter(|a| matches!(a, Action::Query { .. }))
            .count(),
        1
    );
    bench.pass(secs(400));
    assert_eq!(bench.state(KEY), None, "forgotten in the end");
}

#[test]
fn the_watch_over_a_released_address_ends() {
    let mut bench = released(None);
    let disarms = |bench: &Bench| {
        let all = bench.seen.iter();
        all.filter(|a| matches!(a, Action::Disarm { .. })).count()
    };
    assert_eq!(disarms(&bench), 0);
    bench.pass(secs(61));
    assert_eq!(disarms(&bench), 1);
    let looks = bench.seen.len();
    bench.pass(secs(60));
    assert_eq!(bench.seen.len(), looks, "nothing is done any more");
}

#[test]
fn a_server_that_does_not_answer_is_not_asked_again() {
    let mut bench = Bench::new(Policy::default());
    bench.lease(VM_PORT, VM, IP);
    bench.lease(OTHER_PORT, OTHER, Ipv4Addr::new(10, 0, 0, 2));
    bench.pass(secs(5));
    for port in [VM_PORT, OTHER_PORT] {
        bench.tell(Event::PortDown {
            port,
            loss: PortLoss::Deleted,
        });
        bench.pass(secs(30));
    }
    assert_eq!(bench.releases(), 2);
    let queries = bench
        .seen
        .iter()
        .filter(|a| matches!(a, Action::Query { .. }));
    assert_eq!(queries.count(), 1);
}

#[test]
fn a_server_that_has_answered_is_asked_again_soon() {
    let queries = |bench: &Bench| {
        let all = bench.seen.iter();
        all.filter(|a| matches!(a, Action::Query { .. })).count()
    };
    let mut bench = Bench::new(Policy::default());
    let others = Ipv4Addr::new(10, 0, 0, 2);
    bench.lease(VM_PORT, VM, IP);
    bench.lease(OTHER_PORT, OTHER, others);
    bench.lease_query = Some(QueryAnswer::Unassigned);
    bench.pass(secs(5));
    let lost = |port| Event::PortDown {
        port,
        loss: PortLoss::Deleted,
    };
    bench.tell(lost(VM_PORT));
    bench.pass(secs(5));
    assert_eq!(queries(&bench), 1);
    // It is busy for a moment.
    bench.lease_query = Some(QueryAnswer::Silence);
    bench.tell(lost(OTHER_PORT));
    bench.pass(secs(5));
    assert_eq!(queries(&bench), 2);
    let mut ends = bench.engine.clone();
    bench.lease_query = Some(QueryAnswer::Unassigned);
    bench.pass(secs(6));
    assert_eq!(queries(&bench), 3);
    let of = |bench: &Bench| bench.engine.bindings_of(others).next()?.outcome;
    assert_eq!(of(&bench), Some(Outcome::Verified));
    // It does not come back.
    std::mem::swap(&mut bench.engine, &mut ends);
    bench.lease_query = Some(QueryAnswer::Silence);
    bench.pass(secs(50));
    assert_eq!(queries(&bench), 4);
    assert_eq!(of(&bench), Some(Outcome::Unverified));
}

#[test]
fn a_server_that_says_nobody_has_it_verifies() {
    let mut bench = released(Some(QueryAnswer::Unassigned));
    bench.pass(secs(2));
    assert_eq!(outcome(&bench), Some(Outcome::Verified));
    let order: Vec<_> = bench.notices().into_iter().rev().take(2).collect();
    assert_eq!(order, [NoticeKind::Verified, NoticeKind::Released]);
}

#[test]
fn a_server_that_gives_it_to_somebody_else_verifies() {
    let mut bench = released(None);
    bench.lease(OTHER_PORT, OTHER, IP);
    assert_eq!(count(&bench, NoticeKind::Verified), 1);
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(outcome(&bench), None, "the new lease has none");
    bench.pass(secs(70));
    assert_eq!(
        (bench.releases(), count(&bench, NoticeKind::ReleasedAlive)),
        (1, 0)
    );
}

#[test]
fn before_a_repetition_a_port_that_has_come_is_asked_too() {
    let mut bench = released(None);
    bench.lease_query = Some(QueryAnswer::Active(Some(VM)));
    let probes = bench.probes();
    bench.port(13, "late", Role::Vm);
    let (came, mut dead) = (bench.now, bench.engine.clone());
    bench.pass(Duration::from_millis(1050));
    assert_eq!((bench.releases(), bench.probes()), (1, probes + 1));
    bench.lives_at = Some(13);
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 1);
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 1);
    // The same, and nobody answers.
    std::mem::swap(&mut bench.engine, &mut dead);
    (bench.now, bench.lives_at) = (came, None);
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 1 + 2);
    assert_eq!(bench.engine.counters()["releases_ignored"], 3);
}

#[test]
fn a_lease_that_stays_active_is_released_three_times_at_most() {
    let mut bench = released(Some(QueryAnswer::Active(Some(VM))));
    bench.pass(secs(300));
    assert_eq!(bench.releases(), 3);
    assert_eq!(outcome(&bench), Some(Outcome::Ignored));
    assert_eq!(bench.engine.live(), 0);
}

#[test]
fn a_lease_that_stays_active_is_not_released_again_if_anything_newer_was_seen() {
    // A DISCOVER of its MAC at another port, before the answer comes.
    let mut bench = released(None);
    bench.pass(secs(2));
    bench.message(Message {
        kind: MessageType::Discover,
        requested_ip: None,
        server_id: None,
        ..bench.request(OTHER_PORT, VM, IP)
    });
    bench.tell(Event::Queried {
        key: KEY,
        server: SERVER,
        answer: QueryAnswer::Active(Some(VM)),
    });
    bench.pass(secs(70));
    assert_eq!(bench.releases(), 1);
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 0);

    // A frame of its MAC.
    let mut bench = released(None);
    bench.evidence.elsewhere = Some((bench.now, OTHER_PORT));
    bench.pass(secs(2));
    bench.tell(Event::Queried {
        key: KEY,
        server: SERVER,
        answer: QueryAnswer::Active(Some(VM)),
    });
    bench.pass(secs(70));
    assert_eq!(bench.releases(), 1);

    // The kernel saw one.
    let mut bench = released(None);
    bench.outcome = ReleaseOutcome::Vetoed;
    bench.pass(secs(2));
    for _ in 0..3 {
        bench.tell(Event::Queried {
            key: KEY,
            server: SERVER,
            answer: QueryAnswer::Active(Some(VM)),
        });
    }
    bench.pass(secs(70));
    assert_eq!(
        bench.releases(),
        2,
        "the second was dropped, and no third is tried"
    );
    assert_eq!(bench.engine.live(), 0);
}

#[test]
fn a_lease_that_stays_active_is_not_released_again_after_lost_records() {
    let mut bench = settled();
    bench.lease_query = None;
    while bench.releases() == 0 {
        bench.pass(secs(1));
    }
    bench.pass(secs(2));
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    bench.tell(Event::Queried {
        key: KEY,
        server: SERVER,
        answer: QueryAnswer::Active(Some(VM)),
    });
    bench.pass(secs(70));
    assert_eq!((bench.releases(), bench.engine.live()), (1, 0));
}

#[test]
fn the_released_alive_are_told_once_and_held_until_bound_again() {
    let mut bench = released(None);
    bench.evidence.address = Some((bench.now, VM));
    bench.pass(secs(30));
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 1);
    bench.evidence = Evidence {
        armed: true,
        ..Evidence::default()
    };
    // It has another address, from before, at another port: that is not released.
    let other = Key {
        ip: Ipv4Addr::new(10, 0, 0, 2),
        ..KEY
    };
    bench.lease(OTHER_PORT, OTHER, other.ip);
    assert!(bench.engine.explain(other, bench.now).is_some());
    bench.lease(OTHER_PORT, VM, IP);
    bench.pass(secs(5));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass, "bound again");
}

#[test]
fn a_vm_that_renews_what_was_released_is_alive() {
    let mut bench = released(None);
    bench.message(Message {
        ciaddr: Some(IP),
        requested_ip: None,
        server_id: None,
        source_ip: IP,
        destination_ip: SERVER,
        ..bench.request(OTHER_PORT, VM, IP)
    });
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 1);
}

#[test]
fn a_vm_that_boots_again_and_asks_is_no_alarm() {
    let mut bench = released(None);
    bench.evidence.elsewhere = Some((bench.now, OTHER_PORT));
    bench.pass(secs(2));
    bench.lease(OTHER_PORT, VM, IP);
    bench.evidence = Evidence {
        armed: true,
        ..Evidence::default()
    };
    bench.pass(secs(5));
    assert_eq!(count(&bench, NoticeKind::ReleasedAlive), 0);
    assert_eq!(bench.state(KEY), Some(State::Bound));
}

#[test]
fn a_lease_in_its_macs_name_at_another_port_moves_nothing() {
    let mut bench = settled();
    bench.message(bench.request(OTHER_PORT, VM, IP));
    bench.message(bench.ack(OTHER_PORT, VM, IP));
    let binding = bench.engine.bindings().next().expect("the binding stays");
    assert_eq!((binding.port, binding.state), (VM_PORT, State::Bound));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    // The attacker dies, and later the silent owner: neither is released.
    bench.tell(Event::PortDown {
        port: OTHER_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(600));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn a_lease_to_its_mac_at_another_port_is_settled_by_an_ack_and_not_by_frames() {
    let mut bench = settled();
    bench.lease(OTHER_PORT, VM, IP);
    bench.vm_talks = true;
    bench.pass(secs(120));
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 1,
    });
    bench.pass(secs(120));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.lease(VM_PORT, VM, IP);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);

    // Or its old port goes, and it is found at the other one.
    bench.lease(OTHER_PORT, VM, IP);
    bench.vm_talks = false;
    let (port, loss) = (VM_PORT, PortLoss::Deleted);
    bench.tell(Event::PortDown { port, loss });
    bench.pass(Duration::from_millis(500));
    bench.evidence.elsewhere = Some((bench.now, OTHER_PORT));
    bench.pass(secs(1));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
    assert_eq!(bench.releases(), 0);
}

#[test]
fn who_asks_in_the_name_of_one_whose_renewal_was_lost_does_not_come_to_own_its_lease() {
    let mut bench = settled();
    bench.tell(Event::RecordsLost {
        port: VM_PORT,
        count: 2,
    });
    // Its renewal was among them; it lives on, and is heard.
    bench.vm_talks = true;
    bench.pass(secs(3700));
    assert_eq!(bench.state(KEY), Some(State::Expired));
    bench.lease(OTHER_PORT, VM, IP);
    assert_eq!(
        bench.state(KEY),
        Some(State::Expired),
        "not the neighbour's"
    );
    bench.vm_talks = false;
    let (port, loss) = (OTHER_PORT, PortLoss::Deleted);
    bench.tell(Event::PortDown { port, loss });
    bench.pass(secs(60));
    assert_eq!(bench.releases(), 0);
    // Once it renews by its own port, all is as before.
    bench.lease(VM_PORT, VM, IP);
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
}

#[test]
fn one_that_was_seen_and_whose_ack_was_not_is_nobody_elses_either() {
    let mut bench = Bench::new(Policy {
        commit: Commit::Request,
        ..Policy::default()
    });
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.vm_talks = true;
    bench.pass(secs(5));
    bench.vm_talks = false;
    assert_eq!(bench.state(KEY), Some(State::Bound));
    // A neighbour asks in its name, and goes.
    bench.lease(OTHER_PORT, VM, IP);
    let binding = bench.engine.bindings().next().expect("one binding");
    assert_eq!(binding.port, VM_PORT);
    let (port, loss) = (OTHER_PORT, PortLoss::Deleted);
    bench.tell(Event::PortDown { port, loss });
    bench.pass(secs(600));
    assert_eq!(bench.releases(), 0);
}

#[test]
fn leases_end_while_the_host_is_suspended() {
    let mut bench = settled();
    let suspended = secs(4000);
    bench.tell(Event::Overslept { suspended });
    bench.pass(secs(60));
    assert_eq!(bench.state(KEY), Some(State::Expired));
}

#[test]
fn its_macs_lease_beyond_the_uplink_is_a_conflict_until_it_speaks() {
    let mut bench = settled();
    bench.pass(secs(6));
    bench.port(UPLINK, "uplink0", Role::Uplink);
    let ack = Message {
        port: UPLINK,
        role: Role::Uplink,
        direction: Direction::FromPort,
        xid: 99,
        ..bench.ack(UPLINK, VM, IP)
    };
    bench.message(ack);
    assert_eq!(bench.state(KEY), Some(State::Bound));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Hold);
    bench.vm_talks = true;
    // Once it is dead nothing would end that.
    bench.pass(secs(2));
    assert_eq!(bench.verdict(Gate::Confirmed), Verdict::Pass);
}

#[test]
fn who_only_asked_for_an_address_does_not_share_it() {
    let mut bench = Bench::new(Policy::default());
    bench.message(bench.request(VM_PORT, VM, IP));
    bench.lease(OTHER_PORT, OTHER, IP);
    assert_eq!(bench.verdict(Gate::Unique), Verdict::Pass);
}

/// What one of two clones has given back the other may ask for again, and is then not its only owner.
#[test]
fn a_lease_that_two_had_is_remembered_until_it_ends() {
    let mut bench = settled();
    bench.lease(OTHER_PORT, OTHER, IP);
    bench.message(Message {
        kind: MessageType::Release,
        ciaddr: Some(IP),
        requested_ip: None,
        ..bench.request(OTHER_PORT, OTHER, IP)
    });
    assert_eq!(bench.state(KEY), Some(State::Withdrawn));
    bench.pass(secs(3500));
    assert_eq!(bench.state(KEY), Some(State::Withdrawn));
    bench.pass(secs(200));
    assert_eq!(bench.state(KEY), None);
}

#[test]
fn an_address_that_two_stations_were_given_is_never_released() {
    let mut bench = settled();
    bench.lease(OTHER_PORT, OTHER, IP);
    assert_eq!(bench.verdict(Gate::Unique), Verdict::Hold);
    // A renewal does not tell the other one's end either.
    bench.pass(secs(60));
    bench.lease(OTHER_PORT, OTHER, IP);
    bench.tell(Event::PortDown {
        port: OTHER_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(600));
    assert_eq!((bench.releases(), bench.state(KEY)), (0, Some(State::Gone)));
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
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.pass(secs(6));
    assert_eq!(bench.releases(), 1, "{:?}", bench.notices());
}

/// The switches beyond still have the MAC at this node's port.
#[test]
fn where_there_is_an_uplink_everybody_is_asked_for_the_address() {
    let mut bench = settled();
    bench.port(UPLINK, "uplink0", Role::Uplink);
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
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

#[test]
fn what_was_never_granted_is_soon_forgotten() {
    let mut bench = Bench::new(Policy::default());
    for n in 1..=200 {
        let ip = Ipv4Addr::new(10, 0, 1, n);
        bench.message(bench.request(VM_PORT, VM, ip));
        bench.message(Message {
            kind: MessageType::Nak,
            yiaddr: None,
            ..bench.ack(VM_PORT, VM, ip)
        });
    }
    assert_eq!(bench.engine.bindings().count(), 200);
    bench.pass(secs(11));
    assert_eq!(bench.engine.bindings().count(), 0);
}

/// RFC 2131 section 4.3.2, and what clients make of it.
#[test]
fn what_is_asked_is_told_by_the_fields_that_are_there() {
    let bench = Bench::new(Policy::default());
    let other = Ipv4Addr::new(10, 0, 0, 2);
    let renewing = Ask::Renewing {
        ip: IP,
        server: SERVER,
    };
    let rebinding = Some(Ask::Rebinding { ip: IP });
    for (ciaddr, requested_ip, server_id, to, expected) in [
        (
            None,
            Some(IP),
            None,
            Ipv4Addr::BROADCAST,
            Some(Ask::InitReboot { ip: IP }),
        ),
        (Some(IP), None, None, SERVER, Some(renewing)),
        (Some(IP), None, None, Ipv4Addr::BROADCAST, rebinding),
        (Some(IP), Some(IP), None, SERVER, rebinding),
        (Some(IP), None, Some(SERVER), SERVER, rebinding),
        (Some(IP), Some(other), None, SERVER, None),
        (None, None, Some(SERVER), Ipv4Addr::BROADCAST, None),
        (None, None, None, Ipv4Addr::BROADCAST, None),
    ] {
        let message = Message {
            ciaddr,
            requested_ip,
            server_id,
            destination_ip: to,
            ..bench.request(VM_PORT, VM, IP)
        };
        assert_eq!(Ask::of(&message), expected, "{message:?}");
    }
}

#[test]
fn names_are_those_of_the_documents() {
    let (ip, server) = (IP, SERVER);
    let asks = [
        Ask::Selecting { ip, server },
        Ask::InitReboot { ip },
        Ask::Renewing { ip, server },
        Ask::Rebinding { ip },
        Ask::RapidCommit,
    ];
    let names = [
        "SELECTING",
        "INIT-REBOOT",
        "RENEWING",
        "REBINDING",
        "rapid commit",
    ];
    assert_eq!(asks.map(Ask::name), names);
    let outcomes = [Outcome::Unverified, Outcome::Verified, Outcome::Ignored];
    assert_eq!(
        outcomes.map(Outcome::name),
        ["unverified", "verified", "ignored"]
    );
}

#[test]
fn who_uses_anothers_mac_is_not_believed() {
    let bench = Bench::new(Policy::default());
    let own = bench.request(VM_PORT, VM, IP);
    assert_eq!(Speaker::of(&own), Speaker::Vm);
    let borrowed = Message {
        source_mac: OTHER,
        ..own
    };
    assert_eq!(Speaker::of(&borrowed), Speaker::Impostor);
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

/// Who has ended is remembered for as long as under the old one.
#[test]
fn another_policy_looks_at_nobody_who_has_ended() {
    let mut bench = settled();
    bench.message(Message {
        kind: MessageType::Release,
        ciaddr: Some(IP),
        requested_ip: None,
        ..bench.request(VM_PORT, VM, IP)
    });
    let due = |bench: &Bench| bench.engine.binding(KEY).and_then(|it| it.due);
    let before = due(&bench);
    bench.engine.set_policy(Policy::default(), bench.now);
    assert_eq!(due(&bench), before);
    // Nor at one whose watch has its own times.
    let mut bench = settled();
    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    let before = due(&bench);
    bench.engine.set_policy(Policy::default(), bench.now);
    assert_eq!(due(&bench), before);
}

#[test]
fn another_policy_holds_from_now_on() {
    let mut bench = Bench::new(Policy {
        silence: secs(3600),
        hold_down: secs(3600),
        hold_down_silent: secs(3600),
        ..Policy::default()
    });
    bench.lease(VM_PORT, VM, IP);
    bench.seen.clear();
    bench.pass(secs(60));
    assert_eq!(bench.probes(), 0, "an hour of silence is not over");

    bench.engine.set_policy(Policy::default(), bench.now);
    bench.pass(secs(5));
    assert!(bench.probes() > 0, "it has been silent for more than 30 s");

    bench.tell(Event::PortDown {
        port: VM_PORT,
        loss: PortLoss::Deleted,
    });
    bench.engine.set_policy(
        Policy {
            hold_down: secs(60),
            ..Policy::default()
        },
        bench.now,
    );
    bench.pass(secs(55));
    assert_eq!(
        bench.releases(),
        0,
        "the hold-down that was open is longer now"
    );
    bench.pass(secs(10));
    assert_eq!(bench.releases(), 1);
}
