//! The machine: what happened and what time it is go in, what is to be done comes out.

mod dhcp;
mod imports;
mod memory;
mod operator;
mod outcome;
mod ports;
mod release;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use super::{
    binding::{Ask, Binding, Check},
    counters,
    gates::{Case, Finding, Gate, Verdict, breaker_rule},
    index::Index,
    limits::Breaker,
    pacing::Pacing,
    policy::Policy,
    types::{
        Action, Event, IfIndex, Key, MacAddr, Notice, NoticeKind, Port, SegmentId, State, Time,
        Vlan, Vlans,
    },
};

use self::{imports::Imports, operator::Operator, outcome::Aftermath};
pub use self::{
    imports::{Import, ImportCount},
    memory::{Saved, SavedAlarm, SavedRelease, SavedTransaction},
    operator::{AskError, Resumed},
    outcome::Vigil,
};

/// An answer later than this answers nothing (FACTS: bind only an ACK within two minutes).
const TRANSACTION: Duration = Duration::from_secs(120);
/// How long a binding that ended is still shown.
const RETENTION: Duration = Duration::from_secs(600);
/// The same for what no server granted: a guest can ask for as many as it likes.
const UNGRANTED: Duration = Duration::from_secs(10);
/// A RELEASE that could not be sent is tried again after this, times the failures so far.
const RETRY: Duration = Duration::from_secs(1);
/// One report of a rogue server per port in this time, and one of lost records: a guest can cause as
/// many as it likes.
const REPORT_EVERY: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
struct PortInfo {
    port: Port,
    bindings: BTreeSet<Key>,
    transactions: BTreeSet<(u32, MacAddr)>,
    rogue_told: Option<Time>,
    /// It is there, and has no carrier.
    dark: bool,
    /// Records of it were lost, the latest of them by then.
    lost_at: Option<Time>,
    lost_told: Option<Time>,
    /// Records lost since that was told.
    lost: u32,
}

#[derive(Clone, Debug)]
struct Segment {
    settled_at: Time,
    /// Since when all of its ports are watched: who came by the latest of them before that was not heard.
    watched_at: Time,
    uplinks: BTreeSet<IfIndex>,
    /// It has one, or had: without it, a VM that moved is only out of sight.
    had_uplink: bool,
    /// Some of its ports are not asked for their DHCP, or were not.
    had_aside: bool,
    /// Its bridge is not there.
    gone: bool,
    /// Why nothing of it may be released.
    held: Option<String>,
    /// Of its bridge itself, if that filters VLANs.
    vlans: Option<Vlans>,
    /// Learned from what servers sent in by an uplink, for where ACKs to VMs are not seen.
    servers: BTreeMap<(Vlan, Ipv4Addr), MacAddr>,
    /// By server: the latest relay that one of its ACKs came by (its `giaddr`).
    relays: BTreeMap<(Vlan, Ipv4Addr), (Ipv4Addr, MacAddr)>,
}

#[derive(Clone, Debug)]
struct Transaction {
    at: Time,
    ask: Ask,
    vlan: Vlan,
    client_id: Option<Vec<u8>>,
    ambiguous: bool,
    /// A VM answered it too: no answer to it is believed.
    poisoned: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Engine {
    policy: Policy,
    started_at: Time,
    /// Its start, or the end of the latest time in which it did not run.
    listens_since: Time,
    ports: BTreeMap<IfIndex, PortInfo>,
    /// Bindings of links that are no ports at the moment.
    detached: BTreeMap<IfIndex, BTreeSet<Key>>,
    segments: BTreeMap<SegmentId, Segment>,
    /// Each in a place of its own: a tree's nodes are half empty.
    bindings: BTreeMap<Key, Box<Binding>>,
    index: Index,
    /// By xid, client and port.
    transactions: BTreeMap<(u32, MacAddr, IfIndex), Transaction>,
    transactions_due: BTreeSet<(Time, IfIndex, u32, MacAddr)>,
    timers: BTreeSet<(Time, Key)>,
    live: usize,
    breaker: Breaker,
    pacing: Pacing,
    aftermath: Aftermath,
    imports: Imports,
    /// What the gates said when a RELEASE that has not been answered yet was ordered.
    grounds: BTreeMap<Key, Vec<Finding>>,
    operator: Operator,
    counters: BTreeMap<&'static str, u64>,
    actions: VecDeque<Action>,
}

impl Engine {
    pub fn new(policy: Policy, now: Time) -> Self {
        let pacing = Pacing::new(policy.rate, policy.burst);
        Self {
            policy,
            started_at: now,
            listens_since: now,
            ports: BTreeMap::new(),
            detached: BTreeMap::new(),
            segments: BTreeMap::new(),
            bindings: BTreeMap::new(),
            index: Index::default(),
            transactions: BTreeMap::new(),
            transactions_due: BTreeSet::new(),
            timers: BTreeSet::new(),
            live: 0,
            breaker: Breaker::default(),
            pacing,
            aftermath: Aftermath::default(),
            imports: Imports::default(),
            grounds: BTreeMap::new(),
            operator: Operator::default(),
            counters: counters::at_zero(),
            actions: VecDeque::new(),
        }
    }

    /// Decides by another policy from here on, what is open included. Nothing that was found out is
    /// forgotten: who is watched is watched on, for as long as the new one wants it.
    pub fn set_policy(&mut self, policy: Policy, now: Time) {
        self.pacing.set_pace(policy.rate, policy.burst, now);
        self.policy = policy;
        let silence = self.silence();
        let at_rest = self
            .bindings
            .values()
            .filter(|b| b.state == State::Bound && b.check == Check::Idle);
        let dues: Vec<(Key, Time)> = at_rest
            .filter_map(|binding| {
                let due = (binding.last_seen.unwrap_or(now) + silence).max(now);
                Some((binding.key, due.min(binding.due?)))
            })
            .collect();
        for (key, due) in dues {
            self.schedule(key, due);
        }
    }

    /// What is to be done next, oldest first.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] wants to be called; again at once, if more is due than it does in one
    /// turn.
    pub fn poll_timeout(&self) -> Option<Time> {
        let binding = self.timers.first().map(|(at, _)| *at);
        let transaction = self.transactions_due.first().map(|(at, ..)| *at);
        let import = self.imports.due();
        let question = self.operator.next();
        let others = [transaction, import, question].into_iter().flatten();
        binding.into_iter().chain(others).min()
    }

    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(&due) = self.transactions_due.first().filter(|(at, ..)| *at <= now) {
            self.transactions_due.remove(&due);
            let (_, port, xid, mac) = due;
            self.close_transaction(port, xid, mac);
        }
        if self.imports.due().is_some_and(|at| at <= now) {
            self.search_imports(now);
        }
        for _ in 0..self.policy.at_once {
            let Some(&(at, key)) = self.timers.first().filter(|(at, _)| *at <= now) else {
                break;
            };
            self.timers.remove(&(at, key));
            if let Some(binding) = self.bindings.get_mut(&key) {
                binding.due = None;
            }
            self.wake(key, now);
        }
        self.wake_questions(now);
    }

    pub fn handle(&mut self, event: Event, now: Time) {
        match event {
            Event::PortUp(port) => self.port_up(port, now),
            Event::Unheard { segment, macs } => self.unheard(segment, &macs, now),
            Event::PortDown { port, loss } => self.port_down(port, loss, now),
            Event::Bridge { segment, there } => self.bridge(segment, there, now),
            Event::SegmentHeld { segment, reason } => self.segment_held(segment, reason, now),
            Event::SegmentVlans { segment, own } => {
                if self.segment(segment).vlans != own {
                    self.segment(segment).vlans = own;
                    self.look_anew(segment, now);
                }
            }
            Event::PvidChanged { port } => self.pvid_changed(port, now),
            Event::Message(message) => self.message(&message, now),
            Event::RecordsLost { port, count } => self.records_lost(port, count, now),
            Event::Overslept { suspended } => self.overslept(suspended, now),
            Event::Evidence { key, evidence } => {
                if !self.is_answered(key, &evidence) {
                    self.evidence(key, evidence, now);
                    self.conclude(key, now);
                }
            }
            Event::Probed { key, sent } => self.probed(key, sent, now),
            Event::Released { key, outcome } => {
                self.released(key, outcome, now);
                self.answer_outcome(key, outcome);
            }
            Event::Queried {
                key,
                server,
                answer,
            } => self.queried(key, server, answer, now),
            Event::ServerRead { server, mark } => self.server_read(server, mark, now),
        }
    }

    pub fn bindings(&self) -> impl Iterator<Item = &Binding> {
        self.bindings.values().map(|binding| &**binding)
    }

    pub fn binding(&self, key: Key) -> Option<&Binding> {
        self.bindings.get(&key).map(|binding| &**binding)
    }

    /// Bindings of `ip`, on whichever segment and VLAN.
    pub fn bindings_of(&self, ip: Ipv4Addr) -> impl Iterator<Item = &Binding> {
        self.bindings().filter(move |binding| binding.key.ip == ip)
    }

    /// What each gate would say now.
    pub fn explain(&self, key: Key, now: Time) -> Option<Vec<Finding>> {
        let binding = self.binding(key).or_else(|| self.imports.get(key))?;
        Some(self.case(binding).findings(now))
    }

    /// What the gates said when the RELEASE of `key` that is on its way was ordered.
    pub fn grounds(&self, key: Key) -> &[Finding] {
        self.grounds.get(&key).map_or(&[], Vec::as_slice)
    }

    pub fn counters(&self) -> &BTreeMap<&'static str, u64> {
        &self.counters
    }

    pub fn live(&self) -> usize {
        self.live
    }

    fn segment(&mut self, id: SegmentId) -> &mut Segment {
        let settled_at = self.started_at + self.policy.settle;
        self.segments.entry(id).or_insert_with(|| Segment {
            settled_at,
            watched_at: Time::ZERO,
            uplinks: BTreeSet::new(),
            had_aside: false,
            had_uplink: false,
            gone: false,
            held: None,
            vlans: None,
            servers: BTreeMap::new(),
            relays: BTreeMap::new(),
        })
    }

    /// The binding ends without a RELEASE of ours.
    fn end(&mut self, key: Key, state: State, reason: String, now: Time) {
        let kind = match state {
            State::Refused => NoticeKind::Refused,
            State::Withdrawn => NoticeKind::Withdrawn,
            State::Expired => NoticeKind::Expired,
            State::Moved => NoticeKind::Moved,
            State::Requested
            | State::Bound
            | State::Silent
            | State::Gone
            | State::Releasing
            | State::Released => return,
        };
        self.end_vigil(key);
        self.retire(key, state, now, true);
        self.tell(key, kind, reason, now);
    }

    fn retire(&mut self, key: Key, state: State, now: Time, recovered: bool) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if binding.is_live() {
            self.live -= 1;
        }
        // A released address is still looked after.
        let armed = matches!(binding.check, Check::Watching(_)) && binding.vigil.is_none();
        let waits = binding.turn.take().zip(binding.server);
        binding.state = state;
        binding.since = now;
        if binding.vigil.is_none() {
            binding.check = Check::Idle;
        }
        let (mac, port) = (binding.chaddr, binding.port);
        if armed {
            self.actions.push_back(Action::Disarm { key, mac });
        }
        let acked = binding.acked;
        if let Some((turn, server)) = waits {
            let pace = (key.segment, key.vlan, server);
            self.pacing.leave(pace, key, turn);
        }
        if let Some(info) = self.ports.get_mut(&port) {
            info.bindings.remove(&key);
        }
        if recovered {
            self.recover(key, now);
        }
        if acked {
            self.schedule_ended(key, now);
        } else {
            self.schedule(key, now + UNGRANTED);
        }
        self.save(key);
    }

    fn recover(&mut self, key: Key, now: Time) {
        let Some(rule) = breaker_rule(&self.policy) else {
            return;
        };
        if self.breaker.recovered(key, self.live, rule) {
            self.notify(
                now,
                NoticeKind::Alive,
                None,
                None,
                None,
                "breaker closed: enough came back".into(),
            );
        }
    }

    fn case<'a>(&'a self, binding: &'a Binding) -> Case<'a> {
        let key = binding.key;
        let twin = binding.client_id.as_ref().and_then(|id| {
            let mut same = self.index.of_client_id(key.segment, key.vlan, id);
            same.find(|other| {
                let other = self.bindings.get(other).filter(|it| it.key != key);
                other.is_some_and(|other| {
                    let shows = other.client_id.as_ref() == Some(id);
                    shows && other.is_live() && other.chaddr != binding.chaddr
                })
            })
        });
        let started = self.started_at + self.policy.settle;
        let segment = self.segments.get(&key.segment);
        let settled_at = segment.map_or(started, |s| s.settled_at.max(started));
        Case {
            policy: &self.policy,
            binding,
            twin,
            uplink: self.has_uplink(key.segment),
            bridge_gone: self.is_gone(key.segment),
            settled_at,
            watched_at: segment.map_or(Time::ZERO, |segment| segment.watched_at),
            paused: self.operator.paused.as_deref(),
            by: self.ordered_by(key),
            breaker: &self.breaker,
            pacing: &self.pacing,
            alarmed: self.is_alarmed(key.segment, binding.chaddr, binding.port),
            segment_held: segment.and_then(|segment| segment.held.as_deref()),
            vlans: segment.and_then(|segment| segment.vlans.as_ref()),
            live: self.live,
        }
    }

    fn is_gone(&self, segment: SegmentId) -> bool {
        self.segments.get(&segment).is_some_and(|it| it.gone)
    }

    fn has_uplink(&self, segment: SegmentId) -> bool {
        self.segments
            .get(&segment)
            .is_some_and(|segment| segment.had_uplink)
    }

    fn segment_of(&self, port: IfIndex) -> Option<SegmentId> {
        self.ports.get(&port).map(|info| info.port.segment)
    }

    fn port_name(&self, port: IfIndex) -> String {
        self.ports
            .get(&port)
            .map_or_else(|| format!("if{port}"), |info| info.port.name.clone())
    }

    fn insert(&mut self, binding: Binding) {
        let key = binding.key;
        let granted = binding.state != State::Requested;
        self.import_yields(key, granted, binding.since);
        self.index.insert(&binding);
        if let Some(info) = self.ports.get_mut(&binding.port) {
            info.bindings.insert(key);
        }
        self.live += usize::from(binding.is_live());
        self.bindings.insert(key, Box::new(binding));
        self.save(key);
    }

    fn remove(&mut self, key: Key) {
        self.end_vigil(key);
        let Some(binding) = self.bindings.remove(&key) else {
            return;
        };
        self.live -= usize::from(binding.is_live());
        self.save(key);
        if let Some(due) = binding.due {
            self.timers.remove(&(due, key));
        }
        if let Check::Watching(_) = binding.check {
            self.actions.push_back(Action::Disarm {
                key,
                mac: binding.chaddr,
            });
        }
        if let Some(info) = self.ports.get_mut(&binding.port) {
            info.bindings.remove(&key);
        }
        self.index.remove(&binding);
        // Replaced or forgotten, it counts against nobody any more.
        if let Some(rule) = breaker_rule(&self.policy) {
            self.breaker.recovered(key, self.live, rule);
        }
    }

    fn schedule(&mut self, key: Key, at: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if let Some(due) = binding.due.replace(at) {
            self.timers.remove(&(due, key));
        }
        self.timers.insert((at, key));
    }

    fn set_state(&mut self, key: Key, state: State, kind: NoticeKind, reason: String, now: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        binding.state = state;
        binding.since = now;
        if state == State::Silent {
            binding.silent_at.get_or_insert(now);
        } else if state == State::Bound {
            binding.silent_at = None;
        }
        self.save(key);
        self.tell(key, kind, reason, now);
    }

    fn tell(&mut self, key: Key, kind: NoticeKind, reason: String, now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let (mac, port) = (binding.chaddr, binding.port_name.clone());
        self.notify(now, kind, Some(key.ip), Some(mac), Some(port), reason);
    }

    fn notify(
        &mut self,
        at: Time,
        event: NoticeKind,
        ip: Option<Ipv4Addr>,
        mac: Option<MacAddr>,
        port: Option<String>,
        reason: String,
    ) {
        self.actions.push_back(Action::Notify(Notice {
            at,
            event,
            ip,
            mac,
            port,
            reason,
        }));
    }

    fn add(&mut self, counter: &'static str, count: u64) {
        debug_assert!(
            self.counters.contains_key(counter),
            "{counter} is none of core/counters.rs"
        );
        *self.counters.entry(counter).or_default() += count;
    }
}

impl PortInfo {
    fn new(port: Port) -> Self {
        Self {
            port,
            bindings: BTreeSet::new(),
            transactions: BTreeSet::new(),
            rogue_told: None,
            dark: false,
            lost_at: None,
            lost_told: None,
            lost: 0,
        }
    }
}

fn holds(findings: &[Finding], gate: Gate) -> bool {
    findings
        .iter()
        .any(|finding| finding.gate == gate && finding.verdict != Verdict::Pass)
}
