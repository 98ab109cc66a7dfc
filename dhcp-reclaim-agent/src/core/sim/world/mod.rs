//! The world by its own truth: nodes, ports, VMs, one DHCP server, and the wires between them.

mod deeds;
mod guest;
mod judge;
mod server;
mod shell;
mod wire;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use super::{
    super::{
        Action, AlarmId, Commit, Direction, Engine, Event, Evidence, IfIndex, Key, MacAddr,
        Message, MessageType, NoticeKind, Policy, Port, PortLoss, Probe, ProbeVia, QueryAnswer,
        Release, ReleaseOutcome, Role, Saved, SavedAlarm, SavedTransaction, Sounding, State, Time,
        TransactionId, Vlan,
        binding::{Binding, Check},
        gates::{Gate, Override},
    },
    rng::Rng,
    setup::{Kind, Setup},
};

const SEGMENT: u32 = 1;
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
const SERVER_MAC: MacAddr = MacAddr([2, 0xff, 0, 0, 0, 0xfe]);
const POOL: u8 = 60;
/// Of VMs that tag their frames themselves.
const TRUNK: Vlan = 7;
const START: Duration = Duration::from_secs(1000);
/// What a server's clock, and the way of its ACK, may take from a lease as the node sees it.
const LEASE_SLACK: Duration = Duration::from_secs(5);
/// Within this, a death is released on the slow road.
const SLOW: Duration = Duration::from_secs(480);
/// On the fast road.
const SOON: Duration = Duration::from_secs(90);
/// What an agent notices of the time in which it did not run, at most.
const OVERSLEPT: Duration = Duration::from_secs(6);
/// After a move, nothing else happens to the VM or to the way to it for this long.
const CALM: Duration = Duration::from_secs(20);
/// How long before the end of a hold-down a VM that started elsewhere must have been heard.
const LAST_WORD: Duration = Duration::from_secs(5);
/// A cut that began so long before has been noticed by a question.
const UNNOTICED: Duration = Duration::from_secs(6);

pub type VmId = usize;
/// When, about which address, about which VM, and what.
type Line = (Time, Option<Ipv4Addr>, Option<VmId>, String);

/// The world's own name of an address: every VLAN has the same addresses, and they are not the same.
fn address(vlan: Vlan, n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, u8::try_from(vlan).unwrap_or(0), 0, n)
}

fn vlan_of(ip: Ipv4Addr) -> Vlan {
    ip.octets()[1].into()
}

/// As it stands in a frame.
fn on_wire(ip: Ipv4Addr) -> Ipv4Addr {
    let [a, vlan, b, c] = ip.octets();
    if a == 10 && u16::from(vlan) == TRUNK {
        Ipv4Addr::new(a, 0, b, c)
    } else {
        ip
    }
}

/// What stands in a frame, by its own name.
fn off_wire(vlan: Vlan, ip: Ipv4Addr) -> Ipv4Addr {
    let [a, _, _, c] = ip.octets();
    if a == 10 && ip != SERVER && vlan == TRUNK {
        address(vlan, c)
    } else {
        ip
    }
}

fn key_of(ip: Ipv4Addr) -> Key {
    Key {
        segment: SEGMENT,
        vlan: vlan_of(ip),
        ip: on_wire(ip),
    }
}

fn ip_of(key: Key) -> Ipv4Addr {
    off_wire(key.vlan, key.ip)
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
    pub restarts: u64,
    pub repeated: u64,
    pub alarms: u64,
    /// Deaths whose release was waited for, and how many of them were excused.
    pub deadlines: u64,
    pub excused: u64,
    pub questions: u64,
    pub answers: u64,
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
        self.restarts += other.restarts;
        self.repeated += other.repeated;
        self.alarms += other.alarms;
        self.deadlines += other.deadlines;
        self.excused += other.excused;
        self.questions += other.questions;
        self.answers += other.answers;
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
    vlan: Vlan,
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
    asked_at: Time,
}

impl Vm {
    fn owner(&self) -> Vec<u8> {
        owner_of(self.vlan, self.client_id.as_deref(), self.mac)
    }
}

/// Whose a lease is, as servers tell it: by client-id, else by MAC, in each subnet.
fn owner_of(vlan: Vlan, client_id: Option<&[u8]>, mac: MacAddr) -> Vec<u8> {
    let mut owner = vlan.to_be_bytes().to_vec();
    owner.extend_from_slice(client_id.unwrap_or(&mac.0));
    owner
}

#[derive(Clone, Debug)]
struct PortTruth {
    name: String,
    role: Role,
    carrier: bool,
    /// Its programs are there.
    watched: bool,
    /// Since when it may be spoken by.
    made_at: Time,
    /// When its bridge was made again, and they were not.
    back_at: Option<Time>,
    /// When the epoch began in which something came in last.
    heard: Option<Time>,
    /// Of the records to come, as many are lost.
    lose: u32,
    /// As many were.
    lost: u32,
}

impl PortTruth {
    fn port(&self, ifindex: IfIndex) -> Port {
        Port {
            ifindex,
            name: self.name.clone(),
            segment: SEGMENT,
            role: self.role,
        }
    }
}

/// As `abi::WatchValue`: the two latest ports.
#[derive(Clone, Copy, Debug, Default)]
struct Watch {
    seen: [(IfIndex, Time); 2],
    /// The latest frame, and its MAC.
    last: Option<(Time, MacAddr)>,
}

impl Watch {
    fn note(&mut self, port: IfIndex, mac: MacAddr, now: Time) {
        self.last = Some((now, mac));
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
    /// Its agent is dead; the programs go on.
    down: bool,
    /// After how many of its steps the agent is killed, and for how long.
    kill_in: Option<(u32, Duration)>,
    ports: BTreeMap<IfIndex, PortTruth>,
    /// Zero where there is none.
    uplink: IfIndex,
    /// The uplink is cut, or no port of the bridge, until then.
    cut_until: Time,
    cut_since: Time,
    /// Its bridge is gone, or down, until then.
    flat_until: Time,
    /// Ports that wait for the bridge to be made again.
    unplugged: BTreeMap<IfIndex, PortTruth>,
    asleep_until: Time,
    /// Its agent alone is busy until then: with ports that came at once, or a slow disk.
    busy_until: Time,
    /// When, by its own clock, it was suspended, and for how long that stood still.
    suspended: Vec<(Time, Duration)>,
    /// As much of it as its agent has been told.
    suspended_told: Duration,
    /// A person holds its releases; kept in the store.
    paused: bool,
    resumed_at: Time,
    started_at: Time,
    links_changed: Time,
    epoch: Time,
    armed: BTreeMap<Key, (MacAddr, Option<IfIndex>, bool)>,
    watch: BTreeMap<Source, Watch>,
    /// In the ring, and not read.
    pending: Vec<(Time, IfIndex, Event)>,
    /// Read, and not let go yet.
    read: Vec<(Time, IfIndex, Event)>,
    dirty: BTreeSet<Key>,
    dirty_transactions: BTreeSet<TransactionId>,
    dirty_alarms: BTreeSet<AlarmId>,
    dirty_ports: BTreeSet<IfIndex>,
    /// Pinned: what was ordered, and what `emit` made of it.
    orders: BTreeMap<Key, (Time, ReleaseOutcome)>,
    // The store.
    stored: BTreeMap<Key, Saved>,
    /// What had been told of suspensions when each was written.
    stored_suspended: BTreeMap<Key, Duration>,
    stored_transactions: BTreeMap<TransactionId, SavedTransaction>,
    stored_alarms: BTreeMap<AlarmId, SavedAlarm>,
    stored_ports: BTreeMap<IfIndex, (Port, u32)>,
    wake: Option<Time>,
    /// FIFO towards the server, and from it.
    sent_until: Time,
    answered_until: Time,
    // What follows is truth, and not known to the engine.
    last_frame: BTreeMap<Source, (Time, IfIndex)>,
    facts: BTreeMap<Source, Fact>,
    /// Others that were heard to claim an address while a binding of it was known here.
    claims: BTreeSet<(MacAddr, Ipv4Addr)>,
    /// Of whom it has told that another port has them, and when.
    conflicts: BTreeMap<(MacAddr, Ipv4Addr), Time>,
    /// RELEASEs since the latest ACK of the address to the MAC.
    given_back: BTreeSet<(MacAddr, Ipv4Addr)>,
    lost_told: BTreeMap<IfIndex, u32>,
    lost_at: BTreeMap<IfIndex, Time>,
    probes: BTreeMap<Key, Vec<Time>>,
    misses: BTreeMap<Key, u32>,
    /// Sightings that a look has reported.
    reported: BTreeMap<Key, Time>,
    /// Those that no server has shown to have read, and how many one has.
    releases: Vec<Time>,
    releases_read: usize,
    /// Of all, those that were no repetitions.
    released: Vec<(Time, Ipv4Addr)>,
    /// Something made it forget or doubt: no bound on its reclaiming holds.
    excused_until: Time,
    /// The same for single addresses.
    excused: BTreeMap<Ipv4Addr, Time>,
}

#[derive(Clone, Debug)]
struct Lease {
    owner: Vec<u8>,
    until: Time,
}

#[derive(Clone, Debug)]
enum Ask {
    Selecting,
    /// DISCOVER with rapid commit: the address is the server's choice.
    Rapid,
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
    Start(usize),
    /// For how long its clock stood still.
    Awake(usize, Duration),
    BridgeBack(usize),
    Watch(usize, IfIndex),
    QueryAnswered(usize, Key, Ipv4Addr),
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
    Sounded {
        node: usize,
        /// Of the agent that asked.
        started_at: Time,
        sounding: Sounding,
        /// RELEASEs of the node that went before.
        counted: usize,
    },
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
    Resume(usize),
    Deadline {
        ip: Ipv4Addr,
        owner: Vec<u8>,
        vm: VmId,
        incarnation: u32,
        node: usize,
        died: Time,
        bound: Duration,
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
    /// Behind which node's uplink the switch between them has last seen a MAC.
    switch: BTreeMap<MacAddr, usize>,
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
            switch: BTreeMap::new(),
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
            if world.setup.uplinks {
                let uplink = world.new_port(node, Role::Uplink, format!("up{node}"));
                world.nodes[node].uplink = uplink;
            }
            world.at(secs(1), Ev::Tick(node));
        }
        if let Some((node, step)) = world.setup.kill_at {
            world.nodes[node].kill_in = Some((step, Duration::from_millis(300)));
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
                vlan: if rng.percent(world.setup.trunks) {
                    TRUNK
                } else {
                    0
                },
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
                asked_at: now,
            });
        }
        let span = world.setup.span.as_millis().try_into().unwrap_or(u64::MAX);
        for index in 0..world.setup.decisions {
            let mut rng = Rng::of(seed, u64::from(index) + 1000);
            let at = match world.setup.together {
                Some(at) if index as usize >= world.setup.vms => {
                    let after = world.setup.aftermath.map_or(0, |after| after.as_millis());
                    let after = after.try_into().unwrap_or(u64::MAX);
                    let most = match world.dies_in_the_crowd(index) {
                        true => after / 40,
                        false => after,
                    };
                    at + Duration::from_millis(rng.below(most.max(1)))
                }
                Some(_) => rng.millis(0, 2000),
                None => rng.millis(0, span),
            };
            world.at(at, Ev::Decide(index));
        }
        world
    }

    /// Of a world with an aftermath, the decisions that follow the boots.
    fn dies_in_the_crowd(&self, index: u32) -> bool {
        let vms = self.setup.vms;
        self.setup.aftermath.is_some() && (vms..2 * vms).contains(&(index as usize))
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

    /// Whose VM lives, and whose lease: the same, once all is over.
    pub fn ends(&self) -> (BTreeSet<Vec<u8>>, BTreeSet<Vec<u8>>) {
        let living = self.vms.iter().filter(|vm| vm.life != Life::Off);
        let leases = self.leases.values();
        (
            living.map(Vm::owner).collect(),
            leases.map(|lease| lease.owner.clone()).collect(),
        )
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
            Ev::Start(node) => self.start(node),
            Ev::Awake(node, suspended) => self.awake(node, suspended),
            Ev::BridgeBack(node) => self.bridge_back(node),
            Ev::QueryAnswered(node, key, server) => self.query_answered(node, key, server),
            Ev::Sounded {
                node,
                started_at,
                sounding,
                counted,
            } => {
                self.sounded(node, started_at, sounding, counted);
            }
            Ev::Watch(node, port) => self.watch_port(node, port),
            Ev::Wake(node) => self.wake(node),
            Ev::Drain(node) => self.drain(node),
            Ev::Tick(node) => {
                self.at(secs(1), Ev::Tick(node));
                if self.runs(node) {
                    self.nodes[node].epoch = self.clock(node);
                    let ports: Vec<_> = self.nodes[node].ports.keys().copied().collect();
                    for port in ports {
                        self.check_lost(node, port);
                    }
                }
                if !self.asleep(node) && self.rng.percent(20) && self.hears(node) {
                    self.hear_uplink(node);
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
            Ev::Resume(node) => self.resume(node),
            Ev::Deadline {
                ip,
                owner,
                vm,
                incarnation,
                node,
                died,
                bound,
            } => self.deadline(ip, owner, vm, incarnation, node, died, bound),
        }
        for node in 0..self.nodes.len() {
            self.commit(node);
            self.plan_wake(node);
        }
    }

    fn asleep(&self, node: usize) -> bool {
        self.now < self.nodes[node].asleep_until
    }

    /// When its agent gets the processor again.
    fn turn_at(&self, node: usize) -> Time {
        let state = &self.nodes[node];
        state.asleep_until.max(state.busy_until)
    }

    /// The node's own clock, which stands still while it is suspended.
    fn clock(&self, node: usize) -> Time {
        let stood: Duration = self.nodes[node].stood_still();
        let stood = u64::try_from(stood.as_nanos()).unwrap_or(u64::MAX);
        Time::from_nanos(self.now.as_nanos().saturating_sub(stood))
    }

    /// The world's time of what was `at` by the node's clock.
    fn world_time(&self, node: usize, at: Time) -> Time {
        let stood = self.nodes[node].suspended.iter();
        let before = stood.filter(|(slept_at, _)| *slept_at <= at);
        at + before.map(|(_, length)| *length).sum::<Duration>()
    }

    /// Frames cross the node's uplink, and its bridge.
    fn open(&self, node: usize) -> bool {
        self.now >= self.nodes[node].shut_until()
    }

    /// What comes in by the uplink is seen there, whether or not the bridge takes it.
    fn hears(&self, node: usize) -> bool {
        self.now >= self.nodes[node].cut_until
    }
}

impl Node {
    /// By its uplink being cut, or its bridge gone or down.
    fn shut_until(&self) -> Time {
        self.cut_until.max(self.flat_until)
    }

    fn stood_still(&self) -> Duration {
        self.suspended.iter().map(|(_, length)| *length).sum()
    }

    /// What is stored, as `store::row` reads it: leases went on while the host was suspended.
    fn remembered(&self) -> Vec<Saved> {
        let stored = self.stored.iter().map(|(key, saved)| {
            let told = self.stored_suspended.get(key).copied().unwrap_or_default();
            let meanwhile = self.stood_still().saturating_sub(told);
            let sooner = |at: Time| Time::ZERO + at.since(Time::ZERO).saturating_sub(meanwhile);
            Saved {
                expires: saved.expires.map(sooner),
                tentative_until: saved.tentative_until.map(sooner),
                ..saved.clone()
            }
        });
        stored.collect()
    }

    fn binding(&self, ip: Ipv4Addr) -> Option<&Binding> {
        let key = key_of(ip);
        self.engine.bindings().find(|binding| binding.key == key)
    }

    fn new(policy: Policy, now: Time) -> Self {
        Self {
            engine: Engine::new(policy, now),
            ports: BTreeMap::new(),
            uplink: 0,
            cut_until: Time::ZERO,
            cut_since: Time::ZERO,
            flat_until: Time::ZERO,
            unplugged: BTreeMap::new(),
            asleep_until: Time::ZERO,
            busy_until: Time::ZERO,
            suspended: Vec::new(),
            suspended_told: Duration::ZERO,
            paused: false,
            resumed_at: Time::ZERO,
            started_at: now,
            links_changed: now,
            epoch: now,
            armed: BTreeMap::new(),
            watch: BTreeMap::new(),
            down: false,
            kill_in: None,
            pending: Vec::new(),
            read: Vec::new(),
            dirty: BTreeSet::new(),
            dirty_transactions: BTreeSet::new(),
            dirty_alarms: BTreeSet::new(),
            dirty_ports: BTreeSet::new(),
            orders: BTreeMap::new(),
            stored: BTreeMap::new(),
            stored_suspended: BTreeMap::new(),
            stored_transactions: BTreeMap::new(),
            stored_alarms: BTreeMap::new(),
            stored_ports: BTreeMap::new(),
            wake: None,
            sent_until: Time::ZERO,
            answered_until: Time::ZERO,
            last_frame: BTreeMap::new(),
            facts: BTreeMap::new(),
            claims: BTreeSet::new(),
            conflicts: BTreeMap::new(),
            given_back: BTreeSet::new(),
            lost_told: BTreeMap::new(),
            lost_at: BTreeMap::new(),
            probes: BTreeMap::new(),
            misses: BTreeMap::new(),
            reported: BTreeMap::new(),
            releases: Vec::new(),
            releases_read: 0,
            released: Vec::new(),
            excused_until: Time::ZERO,
            excused: BTreeMap::new(),
        }
    }
}
