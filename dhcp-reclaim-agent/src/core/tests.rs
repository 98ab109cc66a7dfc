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

use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use serde::{
    Deserialize as _,
    de::{IntoDeserializer as _, value::Error as ValueError},
};

use super::{
    Action, AlarmId, Answer, AskError, Commit, Direction, Engine, Event, Evidence, IfIndex, Key,
    MacAddr, Message, MessageType, Notice, NoticeKind, Outcome, Policy, Port, PortLoss, Probe,
    ProbeVia, QueryAnswer, ReleaseOutcome, Role, SavedAlarm, State, Time, TransactionId, Vlan,
    Vlans,
    binding::{Ask, Check, Speaker, Watching},
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
const OTHER_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 253);
const IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const OTHER_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const KEY: Key = Key {
    segment: SEGMENT,
    vlan: 0,
    ip: IP,
};
const SECOND: Key = Key {
    ip: OTHER_IP,
    ..KEY
};

/// More actions or turns than that in one go are without an end.
const RESTLESS: u32 = 20_000;

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
    /// Nobody has said yet whether they did.
    is_sending: bool,
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
            is_sending: false,
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
        let mut actions = 0;
        while let Some(action) = self.engine.poll_action() {
            actions += 1;
            assert!(actions < RESTLESS, "it goes on and on: {action:?}");
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
                Action::Probe { .. } if self.is_sending => continue,
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
        let mut turns = 0;
        while let Some(at) = self.engine.poll_timeout().filter(|at| *at <= until) {
            turns += 1;
            assert!(turns < RESTLESS, "it never rests: due at {at:?}");
            self.turn(at);
        }
        self.now = until;
    }

    /// What the engine does when it is called at the time that it asked for.
    fn turn(&mut self, due: Time) {
        self.now = self.now.max(due);
        self.engine.handle_timeout(self.now);
        self.carry_out();
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

    /// Lets time pass by `step` until it is so.
    fn until(&mut self, step: Duration, done: impl Fn(&Self) -> bool) {
        self.until_by(step, done, Self::pass);
    }

    /// The same, on an uplink that is heard all the time.
    fn until_heard(&mut self, step: Duration, done: impl Fn(&Self) -> bool) {
        self.until_by(step, done, Self::pass_heard);
    }

    fn until_by(
        &mut self,
        step: Duration,
        done: impl Fn(&Self) -> bool,
        pass: fn(&mut Self, Duration),
    ) {
        let limit = self.now + secs(1_000);
        while !done(self) {
            assert!(
                self.now < limit,
                "it does not come to that: {:?}",
                self.notices()
            );
            pass(self, step);
        }
    }

    fn lose(&mut self, port: IfIndex, loss: PortLoss) {
        self.tell(Event::PortDown { port, loss });
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

    fn nak(&self, port: IfIndex, mac: MacAddr, ip: Ipv4Addr) -> Message {
        Message {
            kind: MessageType::Nak,
            yiaddr: None,
            ..self.ack(port, mac, ip)
        }
    }

    /// A RELEASE of the guest's own.
    fn release_of(&self, port: IfIndex, mac: MacAddr, ip: Ipv4Addr) -> Message {
        Message {
            kind: MessageType::Release,
            ciaddr: Some(ip),
            requested_ip: None,
            ..self.request(port, mac, ip)
        }
    }

    fn gives_back(&mut self, port: IfIndex, mac: MacAddr, ip: Ipv4Addr) {
        self.message(self.release_of(port, mac, ip));
    }

    /// An ACK as the uplink shows it.
    fn ack_beyond(&mut self, mac: MacAddr, ip: Ipv4Addr) {
        self.message(Message {
            port: UPLINK,
            role: Role::Uplink,
            direction: Direction::FromPort,
            ..self.ack(UPLINK, mac, ip)
        });
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
        self.count_of(|action| matches!(action, Action::Release { .. }))
    }

    fn probes(&self) -> usize {
        self.count_of(|action| matches!(action, Action::Probe { .. }))
    }

    fn looks(&self) -> usize {
        self.count_of(|action| matches!(action, Action::Look { .. }))
    }

    fn queries(&self) -> usize {
        self.count_of(|action| matches!(action, Action::Query { .. }))
    }

    /// How often an address was armed, at its own port or everywhere.
    fn arms(&self, wanted: bool) -> usize {
        self.count_of(|it| matches!(it, Action::Arm { everywhere, .. } if *everywhere == wanted))
    }

    fn count_of(&self, wanted: impl Fn(&Action) -> bool) -> usize {
        self.seen.iter().filter(|action| wanted(action)).count()
    }

    fn watching(&self) -> Watching {
        match self.engine.binding(KEY).map(|binding| binding.check) {
            Some(Check::Watching(watching)) => watching,
            check => panic!("{check:?}"),
        }
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

/// The same, where there is an uplink that has been heard for a while.
fn settled_with_uplink() -> Bench {
    let mut bench = settled();
    bench.port(UPLINK, "eth0", Role::Uplink);
    bench.pass_heard(secs(10));
    bench
}

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

/// A binding whose port was deleted, and that was released for it.
fn released(answer: Option<QueryAnswer>) -> Bench {
    let mut bench = settled();
    bench.lease_query = answer;
    bench.lose(VM_PORT, PortLoss::Deleted);
    bench.until(Duration::from_millis(100), |bench| bench.releases() > 0);
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
    let states = [
        (State::Requested, "requested"),
        (State::Bound, "bound"),
        (State::Silent, "silent"),
        (State::Gone, "gone"),
        (State::Releasing, "releasing"),
        (State::Released, "released"),
        (State::Refused, "refused"),
        (State::Withdrawn, "withdrawn"),
        (State::Expired, "expired"),
        (State::Moved, "moved"),
    ];
    for (state, name) in states {
        assert_eq!(state.name(), name);
    }
}

#[test]
fn a_mac_is_read_as_it_is_written() {
    let mac = MacAddr([2, 0, 0x0f, 0xab, 0xcd, 0xef]);
    let text = "02:00:0f:ab:cd:ef";
    assert_eq!(
        (mac.to_string(), format!("{mac:?}")),
        (text.to_owned(), text.to_owned())
    );
    let read = |text: &str| {
        let parsed = text.parse::<MacAddr>();
        let deserialized: Result<MacAddr, ValueError> =
            MacAddr::deserialize(text.into_deserializer());
        assert_eq!(deserialized.ok(), parsed.clone().ok(), "{text}");
        parsed
    };
    assert_eq!(read(text), Ok(mac));
    assert_eq!(read("02:00:0F:AB:CD:EF"), Ok(mac));
    for bad in [
        "",
        "02:00:0f:ab:cd",
        "02:00:0f:ab:cd:ef:01",
        "02:00:0f:ab:cd:e",
        "2:00:0f:ab:cd:ef",
        "02:00:0f:ab:cd:0ef",
        "02:00:0f:ab:cd:eg",
        "02:00:0f:ab:cd:+1",
        "02-00-0f-ab-cd-ef",
    ] {
        let error = read(bad).map_err(|error| error.to_string());
        assert!(
            error.is_err_and(|it| it.starts_with(&format!("`{bad}` is not"))),
            "{bad}"
        );
    }
}

/// Who has ended is remembered for as long as under the old one.
#[test]
fn another_policy_looks_at_nobody_who_has_ended() {
    let mut bench = settled();
    bench.gives_back(VM_PORT, VM, IP);
    let due = |bench: &Bench| bench.engine.binding(KEY).and_then(|it| it.due);
    let before = due(&bench);
    bench.engine.set_policy(Policy::default(), bench.now);
    assert_eq!(due(&bench), before);
    // Nor at one whose watch has its own times.
    let mut bench = settled();
    bench.until(Duration::from_millis(100), |bench| bench.probes() > 0);
    assert_eq!(bench.state(KEY), Some(State::Bound));
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

    bench.lose(VM_PORT, PortLoss::Deleted);
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
