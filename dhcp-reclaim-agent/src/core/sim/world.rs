//! The world by its own truth: nodes, ports, VMs, one DHCP server, and the wires between them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    net::Ipv4Addr,
    time::Duration,
};

use super::{
    super::{
        Action, Direction, Engine, Event, Evidence, IfIndex, Key, MacAddr, Message, MessageType,
        NoticeKind, Policy, Port, PortLoss, Probe, ProbeVia, QueryAnswer, Release, ReleaseOutcome,
        Role, Time, gates::Gate,
    },
    rng::Rng,
    setup::{Kind, Setup},
};

const SEGMENT: u32 = 1;
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
const SERVER_MAC: MacAddr = MacAddr([2, 0xff, 0, 0, 0, 0xfe]);
const POOL: u8 = 60;
const START: Duration = Duration::from_secs(1000);
/// What a server's clock, and the way of its ACK, may take from a lease as the node sees it.
const LEASE_SLACK: Duration = Duration::from_secs(5);
/// After a move, nothing else happens to the VM or to the way to it for this long.
const CALM: Duration = Duration::from_secs(40);

pub type VmId = usize;
/// When, about which address, about which VM, and what.
type Line = (Time, Option<Ipv4Addr>, Option<VmId>, String);

fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, n)
}

fn key_of(ip: Ipv4Addr) -> Key {
    Key {
        segment: SEGMENT,
        vlan: 0,
        ip,
    }
}

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// What went wrong, and whom it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub at: Time,
    /// The decision that had been taken last.
    pub decision: u32,
    pub ip: Option<Ipv4Addr>,
    pub rule: &'static str,
    pub text: String,
}

#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub lives: u64,
    pub deaths: u64,
    pub releases: u64,
    pub vetoes: u64,
    pub refused: u64,
    pub reclaimed: u64,
    pub moved: u64,
    pub naks: u64,
    pub events: u64,
    pub held: BTreeMap<&'static str, u64>,
}

impl Stats {
    pub fn add(&mut self, other: &Self) {
        self.lives += other.lives;
        self.deaths += other.deaths;
        self.releases += other.releases;
        self.vetoes += other.vetoes;
        self.refused += other.refused;
        self.reclaimed += other.reclaimed;
        self.moved += other.moved;
        self.naks += other.naks;
        self.events += other.events;
        for (gate, count) in &other.held {
            *self.held.entry(gate).or_default() += count;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Off,
    /// It runs, and has no address yet.
    Asking,
    Running,
}

#[derive(Clone, Debug)]
struct Vm {
    mac: MacAddr,
    client_id: Option<Vec<u8>>,
    life: Life,
    /// Counts its lives: what was planned for an earlier one is void.
    incarnation: u32,
    /// Counts its DHCP exchanges.
    exchange: u32,
    node: usize,
    port: Option<IfIndex>,
    /// It neither sends nor answers before this: paused, or between two boots.
    still_until: Time,
    /// Nothing more is done to it before this (see [`CALM`]).
    calm_until: Time,
    answers_arp: bool,
    talk_every: Option<Duration>,
    ip: Option<Ipv4Addr>,
    lease_until: Time,
    /// What it remembers from before.
    memory: Option<Ipv4Addr>,
    xid: u32,
}

impl Vm {
    fn owner(&self) -> Vec<u8> {
        self.client_id.clone().unwrap_or(self.mac.0.to_vec())
    }
}

#[derive(Clone, Debug)]
struct PortTruth {
    name: String,
    role: Role,
    carrier: bool,
    /// When the epoch began in which something came in last.
    heard: Option<Time>,
    lose: u32,
    lost: u32,
}

/// As `abi::WatchValue`: the two latest ports.
#[derive(Clone, Copy, Debug, Default)]
struct Watch {
    seen: [(IfIndex, Time); 2],
}

impl Watch {
    fn note(&mut self, port: IfIndex, now: Time) {
        let [a, b] = self.seen;
        let first = a.0 == port || (b.0 != port && a.1 <= b.1);
        self.seen[usize::from(!first)] = (port, now);
    }

    fn latest(&self) -> Time {
        self.seen[0].1.max(self.seen[1].1)
    }

    fn at(&self, port: IfIndex) -> Option<Time> {
        let found = self.seen.iter().find(|(other, _)| *other == port)?;
        (found.1 != Time::ZERO).then_some(found.1)
    }

    fn elsewhere(&self, own: IfIndex) -> Option<(Time, IfIndex)> {
        self.seen
            .iter()
            .filter(|(port, at)| *at != Time::ZERO && *port != own)
            .map(|(port, at)| (*at, *port))
            .max()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Ip(Ipv4Addr),
    Mac(MacAddr),
}

/// The newest DHCP fact that a node was shown about an address or a MAC.
#[derive(Clone, Copy, Debug)]
struct Fact {
    at: Time,
    ack: bool,
    chaddr: MacAddr,
    ip: Option<Ipv4Addr>,
}

struct Node {
    engine: Engine,
    ports: BTreeMap<IfIndex, PortTruth>,
    uplink: IfIndex,
    /// The uplink is cut, or no port of the bridge, until then.
    cut_until: Time,
    asleep_until: Time,
    started_at: Time,
    links_changed: Time,
    epoch: Time,
    armed: BTreeMap<Key, (MacAddr, Option<IfIndex>, bool)>,
    watch: BTreeMap<Source, Watch>,
    pending: Vec<(Time, IfIndex, Event)>,
    wake: Option<Time>,
    /// FIFO towards the server.
    sent_until: Time,
    // What follows is truth, and not known to the engine.
    last_frame: BTreeMap<Source, (Time, IfIndex)>,
    facts: BTreeMap<Source, Fact>,
    lost_told: BTreeMap<IfIndex, Time>,
    probes: BTreeMap<Key, Vec<Time>>,
    misses: BTreeMap<Key, u32>,
    /// Sightings that a look has reported.
    reported: BTreeMap<Key, Time>,
    releases: Vec<Time>,
    /// Something made it forget or doubt: no bound on its reclaiming holds.
    excused_until: Time,
}

#[derive(Clone, Debug)]
struct Lease {
    owner: Vec<u8>,
    until: Time,
}

#[derive(Clone, Debug)]
enum Ask {
    Selecting,
    InitReboot,
    Renewing,
    Rebinding,
}

#[derive(Clone, Debug)]
struct Question {
    node: usize,
    port: IfIndex,
    ask: Ask,
    ip: Ipv4Addr,
    chaddr: MacAddr,
    client_id: Option<Vec<u8>>,
    xid: u32,
    broadcast: bool,
}

#[derive(Clone, Debug)]
enum Ev {
    Decide(u32),
    Wake(usize),
    Drain(usize),
    Tick(usize),
    Talk(VmId, u32),
    Dhcp(VmId, u32, u32, bool),
    Renew(VmId, u32, u32, bool),
    Announce(VmId, u32),
    ServerHears(Question),
    Answer(Question, Option<Duration>),
    ReleaseArrives(Release, usize),
    GuestRelease(VmId, Ipv4Addr),
    ProbeArrives {
        node: usize,
        probe: Probe,
    },
    Control(usize),
    Boot(VmId, bool),
    PortGone(usize, IfIndex, PortLoss),
    CarrierBack(usize, IfIndex),
    UplinkBack(usize, bool),
    Deadline {
        ip: Ipv4Addr,
        owner: Vec<u8>,
        vm: VmId,
        incarnation: u32,
        node: usize,
        died: Time,
    },
}

/// See the module.
pub struct World {
    pub setup: Setup,
    seed: u64,
    now: Time,
    rng: Rng,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    events: BTreeMap<u64, Ev>,
    sequence: u64,
    nodes: Vec<Node>,
    vms: Vec<Vm>,
    leases: BTreeMap<Ipv4Addr, Lease>,
    next_port: IfIndex,
    next_xid: u32,
    dropped: BTreeSet<u32>,
    decision: u32,
    pub stats: Stats,
    /// A hash over all that was done: the same seed has the same.
    pub trace: u64,
    story: Option<Vec<Line>>,
    violation: Option<Violation>,
}

impl World {
    pub fn new(setup: Setup, seed: u64, dropped: BTreeSet<u32>, tell: bool) -> Self {
        let now = Time::ZERO + START;
        let mut rng = Rng::of(seed, 0);
        let nodes = (0..setup.nodes)
            .map(|_| Node::new(setup.policy.clone(), now))
            .collect();
        let mut world = Self {
            seed,
            now,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            sequence: 0,
            nodes,
            vms: Vec::new(),
            leases: BTreeMap::new(),
            next_port: 10,
            next_xid: 1,
            dropped,
            decision: 0,
            stats: Stats::default(),
            trace: seed,
            story: tell.then(Vec::new),
            violation: None,
            rng: Rng::of(seed, 1),
            setup,
        };
        for node in 0..world.nodes.len() {
            let uplink = world.new_port(node, Role::Uplink, format!("up{node}"));
            world.nodes[node].uplink = uplink;
            world.at(secs(1), Ev::Tick(node));
        }
        for id in 0..world.setup.vms {
            let clone = id > 0 && rng.percent(world.setup.clones);
            let n = u8::try_from(id + 1).unwrap_or(u8::MAX);
            let client_id = if clone {
                world.vms[id - 1].client_id.clone()
            } else {
                (world.setup.clones > 0 || rng.percent(50)).then(|| vec![0xff, n])
            };
            let answers_arp = rng.percent(85);
            let busy = rng.percent(40) || !answers_arp;
            world.vms.push(Vm {
                mac: MacAddr([2, 0, 0, 0, 0, n]),
                client_id,
                life: Life::Off,
                incarnation: 0,
                exchange: 0,
                node: 0,
                port: None,
                still_until: now,
                calm_until: now,
                answers_arp,
                talk_every: busy.then(|| rng.millis(500, 40_000)),
                ip: None,
                lease_until: now,
                memory: None,
                xid: 0,
            });
        }
        let span = world.setup.span.as_millis().try_into().unwrap_or(u64::MAX);
        for index in 0..world.setup.decisions {
            let mut rng = Rng::of(seed, u64::from(index) + 1000);
            let at = match world.setup.together {
                Some(at) if index >= world.setup.vms.try_into().unwrap_or(0) => at,
                Some(_) => rng.millis(0, 2000),
                None => rng.millis(0, span),
            };
            world.at(at, Ev::Decide(index));
        }
        world
    }

    /// Runs to the end of the world's span, or to the first violation.
    pub fn run(&mut self) -> Result<(), Violation> {
        let end = Time::ZERO + START + self.setup.span;
        while let Some(Reverse((at, sequence))) = self.queue.pop() {
            if at > end {
                break;
            }
            let Some(event) = self.events.remove(&sequence) else {
                continue;
            };
            self.now = self.now.max(at);
            self.stats.events += 1;
            self.happen(event);
            if let Some(violation) = self.violation.take() {
                return Err(violation);
            }
        }
        for node in &self.nodes {
            for (name, count) in node.engine.counters() {
                if let Some(gate) = name.strip_prefix("held_") {
                    *self.stats.held.entry(gate).or_default() += count;
                }
            }
        }
        Ok(())
    }

    /// The story so far of one address and of all VMs that had it.
    pub fn story(&self, ip: Option<Ipv4Addr>) -> String {
        let lines = self.story.as_deref().unwrap_or_default();
        let vms: BTreeSet<VmId> = lines
            .iter()
            .filter(|(_, about, ..)| *about == ip)
            .filter_map(|(_, _, vm, _)| *vm)
            .collect();
        let start = Time::ZERO + START;
        let last = lines.last().map_or(start, |line| line.0);
        lines
            .iter()
            .filter(|(at, _, _, text)| !text.contains("probe") || last.since(*at) < secs(60))
            .filter(|(_, about, vm, _)| {
                ip.is_none()
                    || *about == ip
                    || (about.is_none() && vm.is_none_or(|vm| vms.contains(&vm)))
            })
            .map(|(at, _, _, text)| format!("{:>10.3}s  {text}\n", at.since(start).as_secs_f64()))
            .collect()
    }

    // ---- the loop ----------------------------------------------------------------------------

    fn at(&mut self, delay: Duration, event: Ev) {
        self.at_time(self.now + delay, event);
    }

    fn at_time(&mut self, at: Time, event: Ev) {
        self.sequence += 1;
        self.queue.push(Reverse((at, self.sequence)));
        self.events.insert(self.sequence, event);
    }

    fn say(&mut self, ip: Option<Ipv4Addr>, vm: Option<VmId>, text: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            story.push((self.now, ip, vm, text()));
        }
    }

    fn mix(&mut self, value: u64) {
        self.trace = (self.trace ^ value ^ self.now.as_nanos())
            .wrapping_mul(0x0100_0000_01b3)
            .rotate_left(17);
    }

    fn violate(&mut self, ip: Option<Ipv4Addr>, rule: &'static str, text: String) {
        self.say(ip, None, || format!("VIOLATION of {rule}: {text}"));
        self.violation.get_or_insert(Violation {
            at: self.now,
            decision: self.decision,
            ip,
            rule,
            text,
        });
    }

    fn happen(&mut self, event: Ev) {
        match event {
            Ev::Decide(index) => {
                if !self.dropped.contains(&index) {
                    self.decision = index;
                    self.decide(index);
                }
            }
            Ev::Wake(node) => self.wake(node),
            Ev::Drain(node) => self.drain(node),
            Ev::Tick(node) => {
                self.at(secs(1), Ev::Tick(node));
                if !self.asleep(node) {
                    self.nodes[node].epoch = self.now;
                    let ports: Vec<_> = self.nodes[node].ports.keys().copied().collect();
                    for port in ports {
                        self.check_lost(node, port);
                    }
                    if self.rng.percent(20) && self.open(node) {
                        self.hear_uplink(node);
                    }
                }
            }
            Ev::Talk(vm, incarnation) => self.talk(vm, incarnation),
            Ev::Dhcp(vm, incarnation, exchange, known) => {
                self.ask(vm, incarnation, exchange, known);
            }
            Ev::Renew(vm, incarnation, exchange, rebind) => {
                self.renew(vm, incarnation, exchange, rebind);
            }
            Ev::Announce(vm, incarnation) => {
                if self.speaks(vm, incarnation) {
                    self.say(None, Some(vm), || {
                        format!("vm{vm} announces itself by RARP")
                    });
                    self.frame_of(vm, None, true);
                }
            }
            Ev::ServerHears(question) => self.server_hears(question),
            Ev::Answer(question, lease) => self.answer(&question, lease),
            Ev::ReleaseArrives(release, node) => self.release_arrives(&release, node),
            Ev::GuestRelease(vm, ip) => {
                let owner = self.vms[vm].owner();
                if self.leases.get(&ip).is_some_and(|l| l.owner == owner) {
                    self.leases.remove(&ip);
                }
            }
            Ev::ProbeArrives { node, probe } => self.probe_arrives(node, &probe),
            Ev::Control(node) => {
                if self.open(node) {
                    self.hear_uplink(node);
                }
            }
            Ev::Boot(vm, remembers) => self.boot(vm, remembers),
            Ev::PortGone(node, port, loss) => self.port_gone(node, port, loss),
            Ev::CarrierBack(node, port) => self.carrier_back(node, port),
            Ev::UplinkBack(node, attached) => {
                if self.now >= self.nodes[node].cut_until {
                    self.say(None, None, || format!("node{node}: its uplink is back"));
                    if attached {
                        self.nodes[node].links_changed = self.now;
                        let uplink = self.new_port(node, Role::Uplink, format!("up{node}"));
                        self.nodes[node].uplink = uplink;
                    }
                }
            }
            Ev::Deadline {
                ip,
                owner,
                vm,
                incarnation,
                node,
                died,
            } => self.deadline(ip, &owner, vm, incarnation, node, died),
        }
        for node in 0..self.nodes.len() {
            self.plan_wake(node);
        }
    }

    fn plan_wake(&mut self, node: usize) {
        let Some(at) = self.nodes[node].engine.poll_timeout() else {
            return;
        };
        let at = at.max(self.nodes[node].asleep_until).max(self.now);
        if self.nodes[node].wake.is_none_or(|planned| at < planned) {
            self.nodes[node].wake = Some(at);
            self.at_time(at, Ev::Wake(node));
        }
    }

    fn wake(&mut self, node: usize) {
        if self.nodes[node].wake.is_some_and(|at| at <= self.now) {
            self.nodes[node].wake = None;
        }
        if self.asleep(node) {
            return;
        }
        self.drain(node);
        let now = self.now;
        self.nodes[node].engine.handle_timeout(now);
        self.carry_out(node);
    }

    fn asleep(&self, node: usize) -> bool {
        self.now < self.nodes[node].asleep_until
    }

    /// Frames cross the node's uplink.
    fn open(&self, node: usize) -> bool {
        self.now >= self.nodes[node].cut_until
    }

    fn tell(&mut self, node: usize, event: Event) {
        let now = self.now;
        self.nodes[node].engine.handle(event, now);
        self.carry_out(node);
    }

    /// The ring, to its end.
    fn drain(&mut self, node: usize) {
        if self.asleep(node) {
            let at = self.nodes[node].asleep_until;
            self.at_time(at, Ev::Drain(node));
            return;
        }
        while !self.nodes[node].pending.is_empty() {
            let mut pending = std::mem::take(&mut self.nodes[node].pending);
            if pending.len() > 1 && self.rng.percent(self.setup.disorder) {
                // Two CPUs wrote them at nearly the same time.
                let i = self.rng.below(pending.len() as u64 - 1) as usize;
                if pending[i].1 != pending[i + 1].1 {
                    pending.swap(i, i + 1);
                }
            }
            for (_, _, event) in pending {
                self.learn(node, &event);
                self.tell(node, event);
            }
        }
    }

    /// Notes what the node was shown, by the world's own reading.
    fn learn(&mut self, node: usize, event: &Event) {
        let Event::Message(message) = event else {
            return;
        };
        let ip = message
            .yiaddr
            .or(message.ciaddr)
            .or(message.requested_ip)
            .filter(|_| message.kind != MessageType::Offer);
        let fact = Fact {
            at: message.seen_at,
            ack: message.kind == MessageType::Ack,
            chaddr: message.chaddr,
            ip,
        };
        let rogue = message.role == Role::Vm
            && message.direction == Direction::FromPort
            && matches!(message.kind, MessageType::Ack | MessageType::Nak);
        if rogue || message.kind == MessageType::Discover {
            return;
        }
        let facts = &mut self.nodes[node].facts;
        facts.insert(Source::Mac(message.chaddr), fact);
        if let Some(ip) = ip {
            facts.insert(Source::Ip(ip), fact);
        }
    }

    fn record(&mut self, node: usize, message: Message) {
        let delay = self.rng.micros(10, 2000);
        let Some(port) = self.nodes[node].ports.get_mut(&message.port) else {
            return;
        };
        if port.lose > 0 && message.kind != MessageType::Discover {
            port.lose -= 1;
            port.lost += 1;
            let name = port.name.clone();
            self.say(
                message.ciaddr.or(message.yiaddr).or(message.requested_ip),
                None,
                || {
                    format!(
                        "node{node}: the record of a {:?} at {name} is lost",
                        message.kind
                    )
                },
            );
            return;
        }
        let now = self.now;
        let port = message.port;
        self.nodes[node]
            .pending
            .push((now, port, Event::Message(message)));
        self.at(delay, Ev::Drain(node));
    }

    fn check_lost(&mut self, node: usize, port: IfIndex) {
        let Some(truth) = self.nodes[node].ports.get_mut(&port) else {
            return;
        };
        let count = std::mem::take(&mut truth.lost);
        if count > 0 {
            let now = self.now;
            self.nodes[node].lost_told.insert(port, now);
            self.nodes[node].excused_until = now + secs(1000);
            self.tell(node, Event::RecordsLost { port, count });
        }
    }

    fn new_port(&mut self, node: usize, role: Role, name: String) -> IfIndex {
        let ifindex = self.next_port;
        self.next_port += 1;
        let truth = PortTruth {
            name: name.clone(),
            role,
            carrier: true,
            heard: None,
            lose: 0,
            lost: 0,
        };
        self.nodes[node].ports.insert(ifindex, truth);
        self.drain(node);
        self.tell(
            node,
            Event::PortUp(Port {
                ifindex,
                name,
                segment: SEGMENT,
                role,
            }),
        );
        ifindex
    }

    // ---- what the engine wants done ------------------------------------------------------------

    fn carry_out(&mut self, node: usize) {
        while let Some(action) = self.nodes[node].engine.poll_action() {
            let answer = match action {
                Action::Arm {
                    key,
                    mac,
                    own_port,
                    everywhere,
                } => {
                    self.mix(1);
                    let state = &mut self.nodes[node];
                    state.armed.insert(key, (mac, own_port, everywhere));
                    state.watch.entry(Source::Ip(key.ip)).or_default();
                    state.watch.entry(Source::Mac(mac)).or_default();
                    if everywhere {
                        state.epoch = self.now;
                    }
                    continue;
                }
                Action::Disarm { key, mac } => {
                    let state = &mut self.nodes[node];
                    state.armed.remove(&key);
                    state.watch.remove(&Source::Ip(key.ip));
                    if !state.armed.values().any(|(other, ..)| *other == mac) {
                        state.watch.remove(&Source::Mac(mac));
                    }
                    continue;
                }
                Action::Look { key, mac, own_port } => {
                    self.mix(2);
                    if let Some(port) = own_port {
                        self.check_lost(node, port);
                    }
                    let evidence = self.look(node, key, mac, own_port);
                    Event::Evidence { key, evidence }
                }
                Action::Probe { key, probe } => {
                    self.mix(3);
                    let sent = self.probe(node, key, &probe);
                    Event::Probed { key, sent }
                }
                Action::Control { probe } => {
                    self.mix(4);
                    if probe.ip == SERVER {
                        let delay = self.rng.micros(100, 3000);
                        self.at(delay, Ev::Control(node));
                    } else {
                        self.probe_leaves(node, &probe, false);
                    }
                    continue;
                }
                Action::Release { key, release } => {
                    self.mix(5);
                    let outcome = self.emit(node, &release);
                    Event::Released { key, outcome }
                }
                // Its server answers no lease query.
                Action::Query { key, query } => Event::Queried {
                    key,
                    server: query.server,
                    answer: QueryAnswer::Silence,
                },
                // Nothing outlives an agent here: one that starts again knows nothing.
                Action::Save { .. } | Action::SaveTransaction { .. } => continue,
                Action::Notify(notice) => {
                    self.mix(6 + notice.event as u64);
                    self.stats.moved += u64::from(notice.event == NoticeKind::Moved);
                    self.say(notice.ip, None, || {
                        format!(
                            "node{node}: {:?} {} ({}): {}",
                            notice.event,
                            notice.ip.map(|ip| ip.to_string()).unwrap_or_default(),
                            notice.port.as_deref().unwrap_or("-"),
                            notice.reason
                        )
                    });
                    continue;
                }
            };
            let now = self.now;
            self.nodes[node].engine.handle(answer, now);
        }
    }

    fn look(&mut self, node: usize, key: Key, mac: MacAddr, own: Option<IfIndex>) -> Evidence {
        let state = &mut self.nodes[node];
        let ip = state.watch.get(&Source::Ip(key.ip)).copied();
        let mac = state.watch.get(&Source::Mac(mac)).copied();
        let port = own.unwrap_or(0);
        let both = [ip, mac];
        let heard = |port: IfIndex| state.ports.get(&port).and_then(|truth| truth.heard);
        let evidence = Evidence {
            // What is done about the released is not modelled.
            address: None,
            own_at: both.iter().flatten().filter_map(|w| w.at(port)).max(),
            address_at: ip.and_then(|w| w.at(port)),
            elsewhere: both
                .iter()
                .flatten()
                .filter_map(|w| w.elsewhere(port))
                .max(),
            port_at: own.and_then(heard),
            uplink_at: heard(state.uplink),
            armed: ip.is_some() && mac.is_some(),
        };
        let latest = both.iter().flatten().map(Watch::latest).max();
        state.reported.insert(key, latest.unwrap_or(Time::ZERO));
        evidence
    }

    fn probe(&mut self, node: usize, key: Key, probe: &Probe) -> bool {
        let sent = match probe.via {
            ProbeVia::Port(port) => self.nodes[node]
                .ports
                .get(&port)
                .is_some_and(|truth| truth.carrier),
            ProbeVia::Segment(_) => true,
        };
        if !sent {
            return false;
        }
        let now = self.now;
        let times = self.nodes[node].probes.entry(key).or_default();
        times.push(now);
        if times.len() > 64 {
            times.drain(..32);
        }
        // Fewer than `misses` in a row are lost.
        let bound = self.setup.policy.misses - 1;
        let lose = self.rng.percent(self.setup.probe_loss);
        let lost = self.nodes[node].misses.entry(key).or_default();
        let lose = lose && *lost < bound;
        *lost = if lose { *lost + 1 } else { 0 };
        self.say(Some(key.ip), None, || {
            let lost = if lose { ", lost on its way" } else { "" };
            format!("node{node}: probe {} via {:?}{lost}", key.ip, probe.via)
        });
        self.probe_leaves(node, probe, lose);
        true
    }

    fn probe_leaves(&mut self, node: usize, probe: &Probe, lose: bool) {
        if !lose {
            let slow = self.rng.percent(3);
            let delay = self.rng.micros(100, if slow { 400_000 } else { 3000 });
            self.at(
                delay,
                Ev::ProbeArrives {
                    node,
                    probe: *probe,
                },
            );
        }
    }

    fn probe_arrives(&mut self, node: usize, probe: &Probe) {
        for vm in 0..self.vms.len() {
            let it = &self.vms[vm];
            let reached = match probe.via {
                ProbeVia::Port(port) => it.node == node && it.port == Some(port),
                ProbeVia::Segment(_) => it.node == node || (self.open(node) && self.open(it.node)),
            };
            let to_it = probe.mac == it.mac || probe.mac == MacAddr::BROADCAST;
            let answers = to_it && it.ip == Some(probe.ip) && it.answers_arp;
            let incarnation = it.incarnation;
            if !reached || !answers || !self.speaks(vm, incarnation) {
                continue;
            }
            let home = self.vms[vm].node;
            self.say(Some(probe.ip), Some(vm), || {
                format!("node{node}: vm{vm} answers the probe of {}", probe.ip)
            });
            self.frame_of(vm, Some(probe.ip), false);
            if home != node {
                let (mac, uplink) = (self.vms[vm].mac, self.nodes[node].uplink);
                self.sight(node, uplink, mac, Some(probe.ip));
            }
        }
    }

    fn emit(&mut self, node: usize, release: &Release) -> ReleaseOutcome {
        if self.setup.wakes_at_emit && self.rng.percent(50) {
            // Between the look and the frame, a paused VM speaks.
            for vm in 0..self.vms.len() {
                if self.vms[vm].ip == Some(release.ip)
                    && self.vms[vm].node == node
                    && self.vms[vm].life == Life::Running
                {
                    self.vms[vm].still_until = self.now;
                    self.say(Some(release.ip), Some(vm), || {
                        format!("vm{vm} wakes and speaks between decision and frame")
                    });
                    self.frame_of(vm, Some(release.ip), false);
                }
            }
        }
        let state = &self.nodes[node];
        let latest = [Source::Ip(release.ip), Source::Mac(release.chaddr)]
            .iter()
            .map(|source| state.watch.get(source).map(Watch::latest))
            .collect::<Option<Vec<_>>>();
        let vetoed = latest.is_none_or(|times| times.iter().any(|at| *at > release.silent_since));
        if vetoed && !self.setup.policy.without.contains(&Gate::Kernel) {
            self.stats.vetoes += 1;
            let known = state.reported.get(&key_of(release.ip)).copied();
            if known.is_some_and(|at| at > release.silent_since) {
                self.violate(
                    Some(release.ip),
                    "against-evidence",
                    "a RELEASE was ordered although the look had shown it alive".to_owned(),
                );
            }
            self.say(Some(release.ip), None, || {
                format!("node{node}: emit vetoes the RELEASE of {}", release.ip)
            });
            return ReleaseOutcome::Vetoed;
        }
        self.stats.releases += 1;
        self.say(Some(release.ip), None, || {
            format!("node{node}: RELEASE of {} leaves", release.ip)
        });
        self.judge(node, release);
        self.count(node);
        if self.open(node) {
            let delay = self.rng.micros(1000, 5000);
            let at = (self.now + delay).max(self.nodes[node].sent_until);
            self.nodes[node].sent_until = at;
            self.at_time(at, Ev::ReleaseArrives(release.clone(), node));
        }
        ReleaseOutcome::Sent
    }

    fn release_arrives(&mut self, release: &Release, node: usize) {
        let owner = release
            .client_id
            .clone()
            .unwrap_or(release.chaddr.0.to_vec());
        let now = self.now;
        let good = self
            .leases
            .get(&release.ip)
            .is_some_and(|lease| lease.owner == owner && lease.until > now);
        self.say(Some(release.ip), None, || {
            let what = if good { "frees" } else { "refuses to free" };
            format!("server: {what} {} (from node{node})", release.ip)
        });
        if good {
            self.leases.remove(&release.ip);
            self.stats.reclaimed += 1;
        } else {
            self.stats.refused += 1;
        }
    }

    // ---- invariants ----------------------------------------------------------------------------

    /// (a), the lease's end, and (e), at the moment when a RELEASE leaves.
    fn judge(&mut self, node: usize, release: &Release) {
        let ip = release.ip;
        let now = self.now;
        // What it knew of a clone may be forgotten, or never have been told.
        let state = &self.nodes[node];
        let forgetful = state.started_at > Time::ZERO + START || !state.lost_told.is_empty();
        let user = (0..self.vms.len()).find(|vm| {
            let it = &self.vms[*vm];
            let fact = state.facts.get(&Source::Mac(it.mac));
            let shown = fact.is_some_and(|fact| fact.ack && fact.ip == Some(ip));
            // A clone on another node has the same address, and this node may never hear of it.
            let far_clone = it.mac != release.chaddr
                && it.client_id.is_some()
                && it.client_id == release.client_id
                && (it.node != node || forgetful || !shown);
            it.life == Life::Running && it.ip == Some(ip) && it.lease_until > now && !far_clone
        });
        if let Some(vm) = user {
            let still = self.vms[vm].still_until > now;
            let how = if still {
                "alive, though still"
            } else {
                "alive"
            };
            self.violate(
                Some(ip),
                "never-the-living",
                format!("vm{vm} is {how} and uses {ip}"),
            );
            return;
        }
        let left = self.leases.get(&ip).map(|lease| lease.until.since(now));
        let clones = self
            .vms
            .iter()
            .filter(|vm| vm.client_id.is_some() && vm.client_id == release.client_id)
            .count();
        // What another clone agreed on with the server elsewhere is not told here.
        if clones < 2 && left.is_some_and(|left| left < LEASE_SLACK) {
            self.violate(
                Some(ip),
                "lease",
                format!("its lease ends in {left:?}: the server may have ended it already"),
            );
            return;
        }
        if let Err(text) = self.property(node, release) {
            self.violate(Some(ip), "property", text);
        }
    }

    /// FACTS §7, over the world's truth: no frame of (port, MAC) within the confirmation time; the
    /// binding's ACK is the newest DHCP fact on this node for that MAC and that address; the probes
    /// all left and stayed unanswered; no hold is on.
    fn property(&self, node: usize, release: &Release) -> Result<(), String> {
        let state = &self.nodes[node];
        let policy = &self.setup.policy;
        let key = key_of(release.ip);
        let silent = self.now.since(release.silent_since);
        let Some(binding) = state.engine.bindings_of(release.ip).next() else {
            return Err("the engine knows no such binding".to_owned());
        };
        let need = if state
            .ports
            .get(&binding.port)
            .is_some_and(|port| port.carrier)
        {
            policy.hold_down_silent
        } else {
            policy.hold_down_uplink
        };
        if silent < need {
            return Err(format!("silent for {silent:?} only, {need:?} are asked"));
        }
        for source in [Source::Ip(release.ip), Source::Mac(release.chaddr)] {
            if let Some((at, _)) = state.last_frame.get(&source)
                && *at > release.silent_since
                && !policy.without.contains(&Gate::Kernel)
            {
                return Err(format!(
                    "a frame of {source:?} came {:?} ago",
                    self.now.since(*at)
                ));
            }
        }
        let fact_ip = state.facts.get(&Source::Ip(release.ip));
        let fact_mac = state.facts.get(&Source::Mac(release.chaddr));
        for fact in [fact_ip, fact_mac] {
            let Some(fact) = fact else {
                return Err("this node was shown no DHCP message about it".to_owned());
            };
            let same = fact.ack && fact.chaddr == release.chaddr && fact.ip == Some(release.ip);
            if !same && self.now.since(fact.at) < need {
                return Err(format!("newer than its ACK, and within the hold: {fact:?}"));
            }
        }
        let probes = state.probes.get(&key).map_or(0, |times| {
            times
                .iter()
                .filter(|at| **at >= release.silent_since)
                .count()
        });
        if probes < policy.misses as usize {
            return Err(format!("{probes} probes left since silence began"));
        }
        let settled = state.started_at.max(state.links_changed) + policy.settle;
        if self.now < settled {
            return Err("the node's start, or a change of its links, is too recent".to_owned());
        }
        if let Some(lost) = state.lost_told.get(&binding.port)
            && state
                .last_frame
                .get(&Source::Ip(release.ip))
                .is_none_or(|(at, _)| at <= lost)
            && fact_ip.is_none_or(|fact| fact.at < *lost)
        {
            return Err("records of its port were lost since its address was seen".to_owned());
        }
        Ok(())
    }

    /// (c), and the breaker's bound.
    fn count(&mut self, node: usize) {
        let (now, policy) = (self.now, self.setup.policy.clone());
        let times = &mut self.nodes[node].releases;
        times.push(now);
        // Every interval that ends now.
        let mut text = None;
        for (i, at) in times.iter().enumerate() {
            let sent = (times.len() - i) as f64;
            let may =
                f64::from(policy.burst) + now.since(*at).as_secs_f64() * f64::from(policy.rate);
            if sent > may + 1e-6 {
                text = Some(format!(
                    "{sent} RELEASEs in {:?}, {may} may be",
                    now.since(*at)
                ));
                break;
            }
        }
        if let Some(text) = text {
            self.violate(None, "rate", text);
            return;
        }
        let Some(share) = self.setup.bound_by_breaker else {
            return;
        };
        let window = policy.breaker_window;
        let recent = self.nodes[node]
            .releases
            .iter()
            .filter(|at| now.since(**at) < window)
            .count();
        let live = self.nodes[node].engine.live();
        let may = policy
            .breaker_min
            .max(((live + recent) as f64 * share) as usize);
        if recent > may {
            self.violate(
                None,
                "breaker",
                format!("{recent} RELEASEs within one window, {may} may be"),
            );
        }
    }

    /// (b): what died is released within the bound, or a gate holds for good reason.
    fn deadline(
        &mut self,
        ip: Ipv4Addr,
        owner: &[u8],
        vm: VmId,
        incarnation: u32,
        node: usize,
        died: Time,
    ) {
        let Some(lease) = self.leases.get(&ip) else {
            return;
        };
        let it = &self.vms[vm];
        if lease.owner != owner
            || lease.until.since(self.now) < secs(20)
            || it.incarnation != incarnation
            || self.nodes[node].excused_until > died
        {
            return;
        }
        let Some(binding) = self.nodes[node].engine.bindings_of(ip).next() else {
            self.violate(
                Some(ip),
                "liveness",
                format!("vm{vm} died, and was forgotten"),
            );
            return;
        };
        let twin = self
            .vms
            .iter()
            .filter(|other| other.client_id.is_some() && other.client_id == it.client_id)
            .count()
            > 1;
        let excused = binding.held_by == Some(Gate::Breaker) || twin;
        if !excused {
            let text = format!(
                "vm{vm} died {:?} ago and its address is still leased: {:?}, held by {:?}, {:?}",
                self.now.since(died),
                binding.state,
                binding.held_by,
                binding.check
            );
            self.violate(Some(ip), "liveness", text);
        }
    }

    // ---- frames --------------------------------------------------------------------------------

    /// A frame came in by a port of the node.
    fn sight(&mut self, node: usize, port: IfIndex, mac: MacAddr, ip: Option<Ipv4Addr>) {
        let now = self.now;
        let state = &mut self.nodes[node];
        let Some(truth) = state.ports.get_mut(&port) else {
            return;
        };
        truth.heard = Some(state.epoch);
        let exact = state
            .armed
            .values()
            .any(|(_, own, everywhere)| *everywhere || *own == Some(port));
        for source in [Some(Source::Mac(mac)), ip.map(Source::Ip)]
            .into_iter()
            .flatten()
        {
            state.last_frame.insert(source, (now, port));
            if exact && let Some(watch) = state.watch.get_mut(&source) {
                watch.note(port, now);
            }
        }
    }

    fn hear_uplink(&mut self, node: usize) {
        let uplink = self.nodes[node].uplink;
        self.sight(node, uplink, SERVER_MAC, Some(SERVER));
    }

    fn crossing(&mut self, node: usize, mac: MacAddr, ip: Option<Ipv4Addr>) {
        for other in 0..self.nodes.len() {
            if other != node && self.open(node) && self.open(other) {
                let uplink = self.nodes[other].uplink;
                self.sight(other, uplink, mac, ip);
            }
        }
    }

    fn frame_of(&mut self, vm: VmId, ip: Option<Ipv4Addr>, broadcast: bool) {
        let (node, mac) = (self.vms[vm].node, self.vms[vm].mac);
        let Some(port) = self.vms[vm].port else {
            return;
        };
        if self.nodes[node].ports.get(&port).is_some_and(|p| p.carrier) {
            self.sight(node, port, mac, ip);
            if broadcast {
                self.crossing(node, mac, ip);
            }
        }
    }

    // ---- VMs -----------------------------------------------------------------------------------

    /// It runs, in the life that is meant.
    fn speaks(&self, vm: VmId, incarnation: u32) -> bool {
        let it = &self.vms[vm];
        it.life != Life::Off
            && it.incarnation == incarnation
            && self.now >= it.still_until
            && !self.asleep(it.node)
            && it
                .port
                .and_then(|port| self.nodes[it.node].ports.get(&port))
                .is_some_and(|port| port.carrier)
    }

    /// If it is only still for now, when it is to be asked again.
    fn later(&self, vm: VmId, incarnation: u32) -> Option<Time> {
        let it = &self.vms[vm];
        (it.life != Life::Off && it.incarnation == incarnation && !self.speaks(vm, incarnation))
            .then(|| {
                it.still_until
                    .max(self.nodes[it.node].asleep_until)
                    .max(self.now)
                    + Duration::from_millis(200)
            })
    }

    fn boot(&mut self, vm: VmId, remembers: bool) {
        if self.vms[vm].life != Life::Off {
            return;
        }
        let mut node = self.rng.below(self.nodes.len() as u64) as usize;
        if !self.vms[vm].answers_arp && self.vms[vm].incarnation > 0 {
            // What answers no probe is looked for in vain elsewhere: it starts where it was.
            node = self.vms[vm].node;
        }
        if self.asleep(node) {
            return;
        }
        // Some share a port: nested VMs, containers.
        let shared = (self.rng.percent(self.setup.shared_ports))
            .then(|| {
                self.vms
                    .iter()
                    .find(|it| it.life != Life::Off && it.node == node)
                    .and_then(|it| it.port)
            })
            .flatten()
            .filter(|port| self.nodes[node].ports.get(port).is_some_and(|p| p.carrier));
        self.vms[vm].incarnation += 1;
        self.vms[vm].life = Life::Asking;
        let incarnation = self.vms[vm].incarnation;
        self.stats.lives += 1;
        let port = match shared {
            Some(port) => port,
            None => self.new_port(node, Role::Vm, format!("tap-vm{vm}.{incarnation}")),
        };
        let delay = self.rng.millis(100, 3000);
        let it = &mut self.vms[vm];
        it.node = node;
        it.port = Some(port);
        it.still_until = self.now;
        it.calm_until = self.now + secs(5);
        it.ip = None;
        it.exchange += 1;
        if !remembers {
            it.memory = None;
        }
        let exchange = it.exchange;
        self.say(None, Some(vm), || {
            format!("vm{vm} boots on node{node}, port {port}")
        });
        self.at(delay, Ev::Dhcp(vm, incarnation, exchange, remembers));
    }

    /// One attempt at an address.
    fn ask(&mut self, vm: VmId, incarnation: u32, exchange: u32, known: bool) {
        if let Some(at) = self.later(vm, incarnation) {
            self.at_time(at, Ev::Dhcp(vm, incarnation, exchange, known));
            return;
        }
        if !self.speaks(vm, incarnation) || self.vms[vm].exchange != exchange {
            return;
        }
        let memory = self.vms[vm].memory.filter(|_| known);
        let (ask, ip) = match memory {
            Some(ip) => (Ask::InitReboot, Some(ip)),
            None => (Ask::Selecting, self.offer(vm)),
        };
        self.at(secs(5), Ev::Dhcp(vm, incarnation, exchange, false));
        if let Some(ip) = ip {
            self.send_request(vm, ask, ip);
        }
    }

    fn offer(&mut self, vm: VmId) -> Option<Ipv4Addr> {
        let owner = self.vms[vm].owner();
        let now = self.now;
        if let Some((ip, _)) = self.leases.iter().find(|(_, l)| l.owner == owner) {
            return Some(*ip);
        }
        let free: Vec<Ipv4Addr> = (1..=POOL)
            .map(address)
            .filter(|ip| self.leases.get(ip).is_none_or(|l| l.until <= now))
            .collect();
        self.rng.pick(&free).copied()
    }

    fn send_request(&mut self, vm: VmId, ask: Ask, ip: Ipv4Addr) {
        let broadcast = !matches!(ask, Ask::Renewing);
        let xid = self.next_xid;
        self.next_xid += 1;
        let it = &mut self.vms[vm];
        it.xid = xid;
        let Some(port) = it.port else { return };
        let question = Question {
            node: it.node,
            port,
            chaddr: it.mac,
            client_id: it.client_id.clone(),
            ask,
            ip,
            xid,
            broadcast,
        };
        self.say(Some(ip), Some(vm), || {
            format!("vm{vm} sends REQUEST {:?} for {ip}", question.ask)
        });
        let mac = question.chaddr;
        self.request_frame(question, mac);
    }

    fn request_frame(&mut self, question: Question, source_mac: MacAddr) {
        let node = question.node;
        let source_ip = match question.ask {
            Ask::Renewing | Ask::Rebinding => Some(question.ip),
            Ask::Selecting | Ask::InitReboot => None,
        };
        self.sight(node, question.port, source_mac, source_ip);
        let message = self.request_message(&question, source_mac);
        if question.broadcast {
            self.crossing(node, source_mac, source_ip);
            for other in 0..self.nodes.len() {
                if other != node && self.open(node) && self.open(other) {
                    let uplink = self.nodes[other].uplink;
                    let copy = Message {
                        port: uplink,
                        role: Role::Uplink,
                        ..message.clone()
                    };
                    self.record(other, copy);
                }
            }
        }
        self.record(node, message);
        if self.open(node) {
            let at = self.reach_server(node);
            self.at_time(at, Ev::ServerHears(question));
        }
    }

    fn reach_server(&mut self, node: usize) -> Time {
        let delay = self.rng.micros(1000, 5000);
        let at = (self.now + delay).max(self.nodes[node].sent_until);
        self.nodes[node].sent_until = at;
        at
    }

    fn request_message(&self, question: &Question, source_mac: MacAddr) -> Message {
        let (ciaddr, requested, server) = match question.ask {
            Ask::Selecting => (None, Some(question.ip), Some(SERVER)),
            Ask::InitReboot => (None, Some(question.ip), None),
            Ask::Renewing | Ask::Rebinding => (Some(question.ip), None, None),
        };
        Message {
            source_mac,
            destination_mac: if question.broadcast {
                MacAddr::BROADCAST
            } else {
                SERVER_MAC
            },
            source_ip: ciaddr.unwrap_or(Ipv4Addr::UNSPECIFIED),
            destination_ip: if question.broadcast {
                Ipv4Addr::BROADCAST
            } else {
                SERVER
            },
            xid: question.xid,
            chaddr: question.chaddr,
            ciaddr,
            requested_ip: requested,
            server_id: server,
            client_id: question.client_id.clone(),
            ..self.blank(question.port, MessageType::Request)
        }
    }

    fn blank(&self, port: IfIndex, kind: MessageType) -> Message {
        Message {
            seen_at: self.now,
            port,
            role: Role::Vm,
            direction: Direction::FromPort,
            vlan: 0,
            kind,
            ambiguous: false,
            source_mac: MacAddr::default(),
            destination_mac: MacAddr::BROADCAST,
            source_ip: Ipv4Addr::UNSPECIFIED,
            destination_ip: Ipv4Addr::BROADCAST,
            xid: 0,
            chaddr: MacAddr::default(),
            ciaddr: None,
            yiaddr: None,
            giaddr: None,
            requested_ip: None,
            server_id: None,
            lease_secs: None,
            renewal_secs: None,
            rebinding_secs: None,
            client_id: None,
            rapid_commit: false,
        }
    }

    fn server_hears(&mut self, question: Question) {
        let owner = question
            .client_id
            .clone()
            .unwrap_or(question.chaddr.0.to_vec());
        let now = self.now;
        let grant = self
            .leases
            .get(&question.ip)
            .is_none_or(|lease| lease.until <= now || lease.owner == owner);
        let lease = grant.then(|| secs(120 + self.rng.below(8) * 60));
        if let Some(lease) = lease {
            // One lease for one client.
            self.leases.retain(|_, l| l.owner != owner);
            self.leases.insert(
                question.ip,
                Lease {
                    owner,
                    until: now + lease,
                },
            );
        }
        self.say(Some(question.ip), None, || match lease {
            Some(lease) => format!(
                "server: ACK {} to {}, {lease:?}",
                question.ip, question.chaddr
            ),
            None => format!("server: NAK {} to {}", question.ip, question.chaddr),
        });
        self.stats.naks += u64::from(!grant);
        let delay = self.rng.micros(1000, 5000);
        self.at(delay, Ev::Answer(question, lease));
    }

    /// The server's answer arrives at the node of the client.
    fn answer(&mut self, question: &Question, lease: Option<Duration>) {
        let node = question.node;
        let granted = lease.map(|lease| lease.as_secs().try_into().unwrap_or(u32::MAX));
        let message = Message {
            direction: Direction::ToPort,
            source_mac: SERVER_MAC,
            source_ip: SERVER,
            xid: question.xid,
            chaddr: question.chaddr,
            yiaddr: granted.map(|_| question.ip),
            server_id: Some(SERVER),
            lease_secs: granted,
            ..self.blank(
                question.port,
                if lease.is_some() {
                    MessageType::Ack
                } else {
                    MessageType::Nak
                },
            )
        };
        for other in 0..self.nodes.len() {
            if self.open(other) && (other == node || question.broadcast) {
                self.hear_uplink(other);
                let uplink = self.nodes[other].uplink;
                let copy = Message {
                    port: uplink,
                    role: Role::Uplink,
                    direction: Direction::FromPort,
                    ..message.clone()
                };
                self.record(other, copy);
            }
        }
        if !self.open(node) || !self.nodes[node].ports.contains_key(&question.port) {
            return;
        }
        self.record(node, message);
        let Some(vm) = self.vms.iter().position(|vm| {
            vm.mac == question.chaddr && vm.port == Some(question.port) && vm.xid == question.xid
        }) else {
            return;
        };
        let incarnation = self.vms[vm].incarnation;
        if self.speaks(vm, incarnation) {
            self.got(vm, question.ip, lease);
        }
    }

    fn got(&mut self, vm: VmId, ip: Ipv4Addr, lease: Option<Duration>) {
        let now = self.now;
        let it = &mut self.vms[vm];
        it.exchange += 1;
        let (incarnation, exchange) = (it.incarnation, it.exchange);
        let Some(lease) = lease else {
            it.life = Life::Asking;
            it.ip = None;
            it.memory = None;
            self.say(Some(ip), Some(vm), || format!("vm{vm} loses {ip} by a NAK"));
            self.at(secs(1), Ev::Dhcp(vm, incarnation, exchange, false));
            return;
        };
        let first = it.life != Life::Running;
        it.life = Life::Running;
        it.ip = Some(ip);
        it.memory = Some(ip);
        // The server counts from when it answered.
        it.lease_until = now + lease.saturating_sub(Duration::from_millis(10));
        self.say(Some(ip), Some(vm), || {
            format!("vm{vm} has {ip} for {lease:?}")
        });
        self.at(lease / 2, Ev::Renew(vm, incarnation, exchange, false));
        self.at(lease * 7 / 8, Ev::Renew(vm, incarnation, exchange, true));
        self.at(lease, Ev::Renew(vm, incarnation, exchange, true));
        if first {
            self.frame_of(vm, Some(ip), true);
            self.talk(vm, incarnation);
        }
    }

    fn renew(&mut self, vm: VmId, incarnation: u32, exchange: u32, rebind: bool) {
        if self.vms[vm].exchange != exchange || self.vms[vm].incarnation != incarnation {
            return;
        }
        if let Some(at) = self.later(vm, incarnation) {
            self.at_time(at, Ev::Renew(vm, incarnation, exchange, rebind));
            return;
        }
        let (Some(ip), true) = (self.vms[vm].ip, self.speaks(vm, incarnation)) else {
            return;
        };
        if self.vms[vm].lease_until <= self.now {
            self.say(Some(ip), Some(vm), || {
                format!("vm{vm}: its lease of {ip} ran out")
            });
            let it = &mut self.vms[vm];
            it.ip = None;
            it.life = Life::Asking;
            it.exchange += 1;
            let exchange = it.exchange;
            self.at(Duration::ZERO, Ev::Dhcp(vm, incarnation, exchange, false));
            return;
        }
        let ask = if rebind {
            Ask::Rebinding
        } else {
            Ask::Renewing
        };
        self.send_request(vm, ask, ip);
    }

    fn talk(&mut self, vm: VmId, incarnation: u32) {
        let Some(every) = self.vms[vm].talk_every else {
            return;
        };
        if self.vms[vm].incarnation != incarnation || self.vms[vm].life == Life::Off {
            return;
        }
        if let Some(at) = self.later(vm, incarnation) {
            self.at_time(at, Ev::Talk(vm, incarnation));
            return;
        }
        if let Some(ip) = self.vms[vm].ip {
            let broadcast = self.rng.percent(20);
            self.frame_of(vm, Some(ip), broadcast);
        }
        let jitter = self.rng.millis(0, 1000);
        if self.vms[vm].life == Life::Running {
            self.at(every + jitter, Ev::Talk(vm, incarnation));
        }
    }

    // ---- what befalls them ---------------------------------------------------------------------

    fn die(&mut self, vm: VmId, how: Kind) {
        let it = &mut self.vms[vm];
        let (node, ip, incarnation) = (it.node, it.ip, it.incarnation);
        let had_still = it.still_until > self.now;
        it.life = Life::Off;
        it.ip = None;
        it.incarnation += 1;
        self.stats.deaths += 1;
        self.say(ip, Some(vm), || {
            format!("vm{vm} dies on node{node} ({how:?})")
        });
        let Some(ip) = ip else { return };
        let owner = self.vms[vm].owner();
        let known = self.nodes[node].engine.bindings_of(ip).any(|binding| {
            binding.acked
                && binding.is_live()
                && binding.doubt.is_none()
                && binding.chaddr == self.vms[vm].mac
                && Some(binding.port) == self.vms[vm].port
        });
        let owned = self
            .leases
            .get(&ip)
            .is_some_and(|lease| lease.owner == owner);
        if known && owned && !had_still {
            let died = self.now;
            let bound = match how {
                Kind::KillKept => secs(480),
                _ => secs(90),
            };
            let bound = bound + self.setup.slack;
            self.at(
                bound,
                Ev::Deadline {
                    ip,
                    owner,
                    vm,
                    incarnation: incarnation + 1,
                    node,
                    died,
                },
            );
        }
    }

    fn port_gone(&mut self, node: usize, port: IfIndex, loss: PortLoss) {
        if !self.nodes[node].ports.contains_key(&port) {
            return;
        }
        if self.asleep(node) {
            let at = self.nodes[node].asleep_until;
            self.at_time(at, Ev::PortGone(node, port, loss));
            return;
        }
        self.drain(node);
        self.check_lost(node, port);
        if loss == PortLoss::CarrierLost {
            if let Some(truth) = self.nodes[node].ports.get_mut(&port) {
                truth.carrier = false;
            }
        } else {
            self.nodes[node].ports.remove(&port);
        }
        // Whoever else lived behind it has no port any more.
        if loss != PortLoss::CarrierLost {
            for vm in 0..self.vms.len() {
                if self.vms[vm].node == node
                    && self.vms[vm].port == Some(port)
                    && self.vms[vm].life != Life::Off
                {
                    self.die(vm, Kind::KillDeleted);
                }
            }
        }
        self.tell(node, Event::PortDown { port, loss });
    }

    fn carrier_back(&mut self, node: usize, port: IfIndex) {
        let Some(truth) = self.nodes[node].ports.get_mut(&port) else {
            return;
        };
        if truth.carrier {
            return;
        }
        truth.carrier = true;
        let (name, role) = (truth.name.clone(), truth.role);
        self.drain(node);
        self.tell(
            node,
            Event::PortUp(Port {
                ifindex: port,
                name,
                segment: SEGMENT,
                role,
            }),
        );
    }

    /// Forgets all but the ports. The hook for `Engine::restore`.
    pub fn restart(&mut self, node: usize) {
        self.drain(node);
        let now = self.now;
        let state = &mut self.nodes[node];
        state.engine = Engine::new(self.setup.policy.clone(), now);
        state.armed.clear();
        state.watch.clear();
        state.started_at = now;
        state.excused_until = now + secs(1000);
        state.wake = None;
        let ports: Vec<Port> = state
            .ports
            .iter()
            .map(|(ifindex, truth)| Port {
                ifindex: *ifindex,
                name: truth.name.clone(),
                segment: SEGMENT,
                role: truth.role,
            })
            .collect();
        let dark: Vec<IfIndex> = state
            .ports
            .iter()
            .filter(|(_, truth)| !truth.carrier)
            .map(|(ifindex, _)| *ifindex)
            .collect();
        for port in ports {
            self.tell(node, Event::PortUp(port));
        }
        for port in dark {
            self.tell(
                node,
                Event::PortDown {
                    port,
                    loss: PortLoss::CarrierLost,
                },
            );
        }
    }

    fn calm(&self, vm: VmId) -> bool {
        let it = &self.vms[vm];
        self.now >= it.calm_until && self.now >= it.still_until && !self.asleep(it.node)
    }

    /// Nobody who was just moved depends on this node's uplink.
    fn calm_node(&self, node: usize) -> bool {
        !self.asleep(node)
            && self
                .vms
                .iter()
                .all(|it| it.node != node || self.now >= it.calm_until)
    }

    fn still(&mut self, vm: VmId, how: &str, duration: Duration) {
        self.vms[vm].still_until = self.now + duration;
        self.vms[vm].calm_until = self.now + duration + CALM;
        let ip = self.vms[vm].ip;
        self.say(ip, Some(vm), || format!("vm{vm} {how} for {duration:?}"));
    }

    /// Takes one of the world's decisions: what and whom comes from the seed and its number alone.
    fn decide(&mut self, index: u32) {
        let mut rng = Rng::of(self.seed, (u64::from(index) + 1000) << 32);
        let total: u64 = self.setup.weights.iter().map(|(_, weight)| weight).sum();
        let mut draw = rng.below(total.max(1));
        let kinds = self.setup.weights.clone();
        let drawn = kinds.iter().find(|(_, weight)| {
            let found = draw < *weight;
            draw = draw.saturating_sub(*weight);
            found
        });
        let Some((kind, _)) = drawn else { return };
        let mut kind = *kind;
        let mut vm = rng.below(self.vms.len() as u64) as usize;
        if self.setup.together.is_some() {
            vm = index as usize % self.vms.len();
            if (index as usize) < self.vms.len() {
                kind = Kind::Boot;
            }
        }
        let node = rng.below(self.nodes.len() as u64) as usize;
        let running = self.vms[vm].life == Life::Running;
        let port = self.vms[vm].port;
        let home = self.vms[vm].node;
        let alone = self
            .vms
            .iter()
            .filter(|it| it.life != Life::Off && it.node == home && it.port == port)
            .count()
            <= 1;
        match kind {
            Kind::Boot => self.boot(vm, rng.percent(50)),
            Kind::KillDeleted | Kind::KillCarrier | Kind::KillKept | Kind::StopStart => {
                if !running || !self.calm(vm) {
                    return;
                }
                let Some(port) = port else { return };
                let kind = if alone || kind == Kind::StopStart {
                    kind
                } else {
                    Kind::KillKept
                };
                if kind == Kind::StopStart && !alone {
                    return;
                }
                self.die(vm, kind);
                match kind {
                    Kind::KillKept => {}
                    Kind::KillCarrier if alone => {
                        self.port_gone(home, port, PortLoss::CarrierLost);
                    }
                    _ if alone => self.port_gone(home, port, PortLoss::Deleted),
                    _ => {}
                }
                if kind == Kind::StopStart {
                    let gap = if rng.percent(50) {
                        rng.millis(200, 9000)
                    } else {
                        rng.millis(9000, 60_000)
                    };
                    let remembers = rng.percent(70);
                    self.at(gap, Ev::Boot(vm, remembers));
                }
            }
            Kind::Pause if running && self.calm(vm) => {
                let longest = self.setup.longest_pause;
                let duration = rng.millis(1000, longest);
                self.still(vm, "pauses", duration);
            }
            Kind::Reboot if running && self.calm(vm) => {
                let duration = rng.millis(2000, 90_000);
                self.still(vm, "reboots", duration);
                let it = &mut self.vms[vm];
                it.exchange += 1;
                let (incarnation, exchange) = (it.incarnation, it.exchange);
                self.at(duration, Ev::Dhcp(vm, incarnation, exchange, true));
            }
            Kind::CarrierFlap if running && alone && self.calm(vm) => {
                let Some(port) = port else { return };
                let duration = rng.millis(100, 8000);
                self.still(vm, "has its carrier flap", duration);
                self.port_gone(home, port, PortLoss::CarrierLost);
                self.at(duration, Ev::CarrierBack(home, port));
            }
            Kind::Migrate if running && alone && self.calm(vm) => self.migrate(vm, &mut rng),
            Kind::GuestRelease if running && self.calm(vm) => self.guest_gives_up(vm, &mut rng),
            Kind::CutUplink | Kind::DetachUplink => {
                // Two cuts within one hold-down could hide a VM from both sides in turn.
                let apart = self
                    .nodes
                    .iter()
                    .all(|node| self.now >= node.cut_until + secs(600));
                if !apart || !self.calm_node(node) {
                    return;
                }
                let duration = rng.millis(500, 60_000);
                let detach = kind == Kind::DetachUplink;
                self.nodes[node].cut_until = self.now + duration;
                self.nodes[node].excused_until = self.now + duration + secs(1000);
                self.say(None, None, || {
                    let what = if detach {
                        "leaves the bridge"
                    } else {
                        "is cut"
                    };
                    format!("node{node}: its uplink {what} for {duration:?}")
                });
                if detach {
                    let uplink = self.nodes[node].uplink;
                    self.drain(node);
                    self.nodes[node].ports.remove(&uplink);
                    self.nodes[node].links_changed = self.now;
                    self.tell(
                        node,
                        Event::PortDown {
                            port: uplink,
                            loss: PortLoss::Detached,
                        },
                    );
                }
                self.at(duration, Ev::UplinkBack(node, detach));
            }
            Kind::Suspend if self.calm_node(node) => {
                let duration = rng.millis(1000, 60_000);
                self.nodes[node].asleep_until = self.now + duration;
                self.nodes[node].excused_until = self.now + duration + secs(1000);
                self.say(None, None, || format!("node{node} sleeps for {duration:?}"));
            }
            Kind::Forge if running => self.forge(vm, &mut rng),
            Kind::LoseRecords => {
                if let Some(port) = port
                    && let Some(truth) = self.nodes[home].ports.get_mut(&port)
                {
                    truth.lose = 1 + u32::try_from(rng.below(3)).unwrap_or(0);
                    self.nodes[home].excused_until = self.now + secs(1000);
                }
            }
            Kind::Restart if !self.asleep(node) => {
                self.say(None, None, || format!("node{node}: its agent starts anew"));
                self.restart(node);
            }
            Kind::Pause
            | Kind::Reboot
            | Kind::CarrierFlap
            | Kind::Migrate
            | Kind::GuestRelease
            | Kind::Suspend
            | Kind::Forge
            | Kind::Restart => {}
        }
    }

    fn migrate(&mut self, vm: VmId, rng: &mut Rng) {
        let home = self.vms[vm].node;
        let target = (home + 1) % self.nodes.len();
        let Some(old) = self.vms[vm].port else { return };
        let twins = self
            .vms
            .iter()
            .filter(|it| it.client_id.is_some() && it.client_id == self.vms[vm].client_id)
            .count();
        // A clone's lease is not told to the node that it moves to.
        if twins > 1 {
            return;
        }
        if target == home || !self.vms[vm].answers_arp || self.asleep(target) {
            return;
        }
        // Nobody moves to where the disks are out of reach. Its own uplink may be cut just now.
        if !self.open(target) || !(self.open(home) || self.setup.careless) {
            return;
        }
        let port = self.new_port(target, Role::Vm, format!("tap-vm{vm}.m{old}"));
        let ip = self.vms[vm].ip;
        self.say(ip, Some(vm), || {
            format!("vm{vm} moves from node{home} to node{target}, port {port}")
        });
        let it = &mut self.vms[vm];
        it.node = target;
        it.port = Some(port);
        it.calm_until = self.now + CALM;
        let incarnation = it.incarnation;
        for i in 0..5 {
            self.at(
                Duration::from_millis(50 + 100 * i),
                Ev::Announce(vm, incarnation),
            );
        }
        let after = rng.millis(10, 3000);
        self.at(after, Ev::PortGone(home, old, PortLoss::Deleted));
    }

    fn guest_gives_up(&mut self, vm: VmId, rng: &mut Rng) {
        let (Some(ip), Some(port)) = (self.vms[vm].ip, self.vms[vm].port) else {
            return;
        };
        let (node, mac) = (self.vms[vm].node, self.vms[vm].mac);
        if !self.open(node) {
            return;
        }
        self.say(Some(ip), Some(vm), || {
            format!("vm{vm} releases {ip} itself")
        });
        let message = Message {
            source_mac: mac,
            source_ip: ip,
            destination_mac: SERVER_MAC,
            destination_ip: SERVER,
            chaddr: mac,
            ciaddr: Some(ip),
            server_id: Some(SERVER),
            client_id: self.vms[vm].client_id.clone(),
            ..self.blank(port, MessageType::Release)
        };
        self.sight(node, port, mac, Some(ip));
        self.record(node, message);
        let at = self.reach_server(node);
        self.at_time(at, Ev::GuestRelease(vm, ip));
        let it = &mut self.vms[vm];
        it.ip = None;
        it.life = Life::Asking;
        it.memory = None;
        it.exchange += 1;
        let (incarnation, exchange) = (it.incarnation, it.exchange);
        let pause = rng.millis(50, 20_000);
        self.at(pause, Ev::Dhcp(vm, incarnation, exchange, false));
    }

    /// A guest tries something on a neighbour. What its forgeries do at the server is the server's
    /// and the switches' affair: only the REQUEST is answered.
    fn forge(&mut self, attacker: VmId, rng: &mut Rng) {
        let others: Vec<VmId> = (0..self.vms.len())
            .filter(|vm| {
                *vm != attacker
                    && self.vms[*vm].life == Life::Running
                    && self.vms[*vm].port != self.vms[attacker].port
            })
            .collect();
        let (Some(&victim), Some(port)) = (rng.pick(&others), self.vms[attacker].port) else {
            return;
        };
        let incarnation = self.vms[attacker].incarnation;
        if !self.speaks(attacker, incarnation) {
            return;
        }
        let (node, own) = (self.vms[attacker].node, self.vms[attacker].mac);
        let (mac, ip) = (self.vms[victim].mac, self.vms[victim].ip);
        let Some(ip) = ip else { return };
        let client_id = self.vms[victim].client_id.clone();
        let mut source = if rng.percent(50) { own } else { mac };
        for node in &mut self.nodes {
            node.excused_until = self.now + secs(1000);
        }
        let what = rng.below(5);
        if what == 0 && self.vms[victim].node != node {
            // Whoever may use a MAC of another node's VM can send the RELEASE himself.
            source = own;
        }
        self.say(Some(ip), Some(attacker), || {
            let what = ["REQUEST", "RELEASE", "DECLINE", "rogue ACK", "frame"][what as usize];
            format!("vm{attacker} forges a {what} of vm{victim} ({ip}), source {source}")
        });
        match what {
            0 => {
                let xid = self.next_xid;
                self.next_xid += 1;
                let question = Question {
                    node,
                    port,
                    ask: if rng.percent(50) {
                        Ask::InitReboot
                    } else {
                        Ask::Rebinding
                    },
                    ip,
                    chaddr: mac,
                    client_id,
                    xid,
                    broadcast: true,
                };
                self.request_frame(question, source);
            }
            1 | 2 => {
                let release = what == 1;
                let message = Message {
                    source_mac: source,
                    chaddr: mac,
                    ciaddr: release.then_some(ip),
                    requested_ip: (!release).then_some(ip),
                    server_id: Some(SERVER),
                    client_id,
                    ..self.blank(
                        port,
                        if release {
                            MessageType::Release
                        } else {
                            MessageType::Decline
                        },
                    )
                };
                self.sight(node, port, source, None);
                self.record(node, message);
            }
            3 => {
                let xid = self.vms[victim].xid;
                let stolen = address(1 + u8::try_from(rng.below(POOL.into())).unwrap_or(0));
                let message = Message {
                    source_mac: source,
                    chaddr: mac,
                    xid,
                    yiaddr: Some(stolen),
                    server_id: Some(SERVER),
                    lease_secs: Some(u32::MAX),
                    ..self.blank(port, MessageType::Ack)
                };
                self.sight(node, port, source, None);
                self.record(node, message.clone());
                if let (true, Some(port)) = (self.vms[victim].node == node, self.vms[victim].port) {
                    let copy = Message {
                        port,
                        direction: Direction::ToPort,
                        ..message
                    };
                    self.record(node, copy);
                }
            }
            _ => {
                let broadcast = rng.percent(50);
                self.sight(node, port, mac, Some(ip));
                if broadcast {
                    self.crossing(node, mac, Some(ip));
                }
            }
        }
    }
}

impl Node {
    fn new(policy: Policy, now: Time) -> Self {
        Self {
            engine: Engine::new(policy, now),
            ports: BTreeMap::new(),
            uplink: 0,
            cut_until: Time::ZERO,
            asleep_until: Time::ZERO,
            started_at: now,
            links_changed: now,
            epoch: now,
            armed: BTreeMap::new(),
            watch: BTreeMap::new(),
            pending: Vec::new(),
            wake: None,
            sent_until: Time::ZERO,
            last_frame: BTreeMap::new(),
            facts: BTreeMap::new(),
            lost_told: BTreeMap::new(),
            probes: BTreeMap::new(),
            misses: BTreeMap::new(),
            reported: BTreeMap::new(),
            releases: Vec::new(),
            excused_until: Time::ZERO,
        }
    }
}
