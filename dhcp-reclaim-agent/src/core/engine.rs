//! The machine: what happened and what time it is go in, what is to be done comes out.

mod imports;
mod memory;
mod operator;
mod outcome;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use super::{
    binding::{Ask, Binding, Check, Doubt, Origin, Speaker, Watching, lease_end},
    counters,
    gates::{Case, Finding, Gate, Verdict, breaker_rule, secs},
    index::Index,
    limits::Breaker,
    pacing::{Pacing, ServerKey},
    policy::{Commit, Policy},
    types::{
        Action, Event, Evidence, IfIndex, Key, MacAddr, Message, MessageType, Notice, NoticeKind,
        Port, PortLoss, Probe, ProbeVia, Release, ReleaseOutcome, Role, SegmentId, Sounding, State,
        Time, TransactionId, Vlan, Vlans,
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
/// Open transactions of one port; the kernel half keeps fewer.
const TRANSACTIONS_PER_PORT: usize = 64;
/// How long a binding that ended is still shown.
const RETENTION: Duration = Duration::from_secs(600);
/// The same for what no server granted: a guest can ask for as many as it likes.
const UNGRANTED: Duration = Duration::from_secs(10);
/// A held binding is looked at again this often, if its gate cannot tell better.
const HELD_AGAIN: Duration = Duration::from_secs(1);
/// A RELEASE that could not be sent is tried again after this, times the failures so far.
const RETRY: Duration = Duration::from_secs(1);
/// A probe into the segment counts if the uplink was heard after it; the slot tells only in which
/// epoch of a second that was.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// An ACK is seen by the uplink and by the port, in whichever order, within this.
const SAME_ANSWER: Duration = Duration::from_secs(1);
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

/// Quiet VMs are looked at at multiples of this, in nanoseconds.
const TOGETHER: u64 = 50_000_000;
/// Servers of one segment whose MAC, or relay, is remembered.
const SERVERS_PER_SEGMENT: usize = 256;

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
        let sooner: Vec<(Key, Time)> = at_rest
            .filter_map(|binding| {
                let due = (binding.last_seen.unwrap_or(now) + silence).max(now);
                (due < binding.due?).then_some((binding.key, due))
            })
            .collect();
        for (key, due) in sooner {
            self.schedule(key, due);
        }
    }

    /// What is to be done next, oldest first.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Time> {
        let binding = self.timers.first().map(|(at, _)| *at);
        let transaction = self.transactions_due.first().map(|(at, ..)| *at);
        let import = self.imports.due();
        let question = self.operator.next();
        let others = [transaction, import, question].into_iter().flatten();
        binding.into_iter().chain(others).min()
    }

    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(&(at, port, xid, mac)) = self.transactions_due.first() {
            if at > now {
                break;
            }
            self.close_transaction(port, xid, mac);
        }
        if self.imports.due().is_some_and(|at| at <= now) {
            self.search_imports(now);
        }
        while let Some(&(at, key)) = self.timers.first() {
            if at > now {
                break;
            }
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

    // ---- ports -------------------------------------------------------------------------------

    fn port_up(&mut self, port: Port, now: Time) {
        let settle = now + self.policy.settle;
        let segment = self.segment(port.segment);
        segment.had_uplink |= port.role == Role::Uplink;
        segment.had_aside |= port.role == Role::Aside;
        if port.role == Role::Uplink && segment.uplinks.insert(port.ifindex) {
            segment.settled_at = segment.settled_at.max(settle);
        }
        self.notify(
            now,
            NoticeKind::PortUp,
            None,
            None,
            Some(port.name.clone()),
            match port.role {
                Role::Vm => "watched".to_owned(),
                Role::Uplink => "watched as an uplink".to_owned(),
                Role::Aside => "watched for VMs that move there: no VM's port by --port".to_owned(),
            },
        );
        if port.role == Role::Vm {
            self.look_for_imports(port.segment, now);
        }
        let ifindex = port.ifindex;
        let known = self.ports.get_mut(&ifindex);
        let Some(info) = known else {
            self.ports.insert(ifindex, PortInfo::new(port));
            self.plugged_in_again(ifindex, now);
            return;
        };
        let moved_from = (info.port.segment != port.segment).then_some(info.port.segment);
        let renamed = info.port.name != port.name;
        info.port = port;
        info.dark = false;
        let keys: Vec<Key> = info.bindings.iter().copied().collect();
        for key in keys {
            if renamed {
                self.save(key);
            }
            if moved_from.is_some() {
                // Its lease belongs to the segment that it was taken on.
                self.end(
                    key,
                    State::Moved,
                    "its port went to another bridge".to_owned(),
                    now,
                );
            } else {
                self.watch_again(key, now);
            }
        }
    }

    fn segment(&mut self, id: SegmentId) -> &mut Segment {
        let settled_at = self.started_at + self.policy.settle;
        self.segments.entry(id).or_insert_with(|| Segment {
            settled_at,
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

    /// Without its bridge nobody can be asked, and whoever is plugged in anew is not heard: the same as
    /// after a time in which no agent ran.
    fn bridge(&mut self, id: SegmentId, there: bool, now: Time) {
        let segment = self.segment(id);
        if segment.gone != there {
            return;
        }
        segment.gone = !there;
        self.deafen(Some(id));
        self.look_anew(id, now);
        if !there {
            let reason = format!("{}: its bridge is gone", Gate::Settled);
            self.notify(now, NoticeKind::Held, None, None, None, reason);
        }
    }

    /// Whoever lost its port may have started at another one unheard; of one segment, or of all.
    fn deafen(&mut self, segment: Option<SegmentId>) {
        let of_segment =
            |(key, _): &(&Key, &mut Box<Binding>)| segment.is_none_or(|id| key.segment == id);
        for (_, binding) in self.bindings.iter_mut().filter(of_segment) {
            if let Check::Watching(watching) = &mut binding.check {
                watching.deaf |= watching.lost.is_some();
            }
        }
    }

    fn segment_held(&mut self, id: SegmentId, reason: Option<String>, now: Time) {
        let segment = self.segment(id);
        if segment.held == reason {
            return;
        }
        segment.held.clone_from(&reason);
        self.look_anew(id, now);
        if let Some(reason) = reason {
            let reason = format!("{}: {reason}", Gate::Confirmed);
            self.notify(now, NoticeKind::Held, None, None, None, reason);
        }
    }

    /// What is told from now on may have been so for long: the same as after a start.
    fn overslept(&mut self, suspended: Duration, now: Time) {
        self.add("overslept", 1);
        self.listens_since = now;
        // The server's clock went on meanwhile.
        let sooner = u64::try_from(suspended.as_nanos()).unwrap_or(u64::MAX);
        for binding in self.bindings.values_mut() {
            if let Some(end) = &mut binding.expires {
                *end = Time::from_nanos(end.as_nanos().saturating_sub(sooner));
            }
        }
        self.deafen(None);
        let segments: Vec<SegmentId> = self.segments.keys().copied().collect();
        for segment in segments {
            self.look_anew(segment, now);
        }
        if sooner > 0 {
            let keys: Vec<Key> = self.bindings.keys().copied().collect();
            for key in keys {
                self.save(key);
            }
        }
    }

    /// What was seen of a segment until now may have been seen as another VLAN's.
    fn look_anew(&mut self, id: SegmentId, now: Time) {
        let settle = now + self.policy.settle;
        let segment = self.segment(id);
        segment.settled_at = segment.settled_at.max(settle);
        let of_segment = |key: &&Key| key.segment == id;
        let keys: Vec<Key> = self.bindings.keys().filter(of_segment).copied().collect();
        for key in keys {
            self.restart_hold(key, now);
        }
    }

    /// Its VMs' leases belong to the VLAN that they were taken on.
    fn pvid_changed(&mut self, port: IfIndex, now: Time) {
        let Some(info) = self.ports.get(&port) else {
            return;
        };
        let segment = info.port.segment;
        let keys: Vec<Key> = info.bindings.iter().copied().collect();
        let transactions: Vec<_> = info.transactions.iter().copied().collect();
        for (xid, mac) in transactions {
            self.close_transaction(port, xid, mac);
        }
        for key in keys {
            let reason = "its port's untagged frames belong to another VLAN now".to_owned();
            self.end(key, State::Moved, reason, now);
        }
        self.look_anew(segment, now);
    }

    /// A link that had been detached is a port again, perhaps of another bridge.
    fn plugged_in_again(&mut self, port: IfIndex, now: Time) {
        let place = self.ports.get(&port).map(|info| &info.port);
        let segment = place.map(|port| port.segment);
        let is_vms = place.is_some_and(|port| port.role == Role::Vm);
        for key in self.detached.remove(&port).unwrap_or_default() {
            let Some(binding) = self
                .bindings
                .get(&key)
                .filter(|b| b.is_live() && b.port == port)
            else {
                continue;
            };
            if segment != Some(binding.key.segment) {
                self.end(
                    key,
                    State::Moved,
                    "its port went to another bridge".to_owned(),
                    now,
                );
                continue;
            }
            if !is_vms {
                let reason = "its port is no VM's port any more".to_owned();
                self.end(key, State::Moved, reason, now);
                continue;
            }
            if let Some(info) = self.ports.get_mut(&port) {
                info.bindings.insert(key);
            }
            self.watch_again(key, now);
        }
    }

    fn port_down(&mut self, port: IfIndex, loss: PortLoss, now: Time) {
        let Some(info) = self.ports.get_mut(&port) else {
            return;
        };
        let keys: Vec<Key> = info.bindings.iter().copied().collect();
        let name = info.port.name.clone();
        let segment = info.port.segment;
        match loss {
            // It is still a port: what comes back by it is known.
            PortLoss::CarrierLost | PortLoss::LinkDown => info.dark = true,
            PortLoss::Deleted | PortLoss::Detached | PortLoss::Unseen => {
                let transactions: Vec<_> = info.transactions.iter().copied().collect();
                for (xid, mac) in transactions {
                    self.close_transaction(port, xid, mac);
                }
                self.ports.remove(&port);
                if loss != PortLoss::Deleted && !keys.is_empty() {
                    // A port that never comes back keeps no more than what still lives.
                    let bindings = &self.bindings;
                    self.detached.retain(|_, keys| {
                        keys.retain(|key| bindings.get(key).is_some_and(|it| it.is_live()));
                        !keys.is_empty()
                    });
                    self.detached.insert(port, keys.iter().copied().collect());
                }
                if let Some(segment) = self.segments.get_mut(&segment)
                    && segment.uplinks.remove(&port)
                {
                    segment.settled_at = segment.settled_at.max(now + self.policy.settle);
                }
            }
        }
        let reason = format!("{}, {} bindings", loss_text(loss), keys.len());
        self.notify(now, NoticeKind::PortLost, None, None, Some(name), reason);
        for key in keys {
            self.lose_port(key, loss, now);
        }
    }

    /// The fast road: the port is gone, so the whole segment is asked at once.
    fn lose_port(&mut self, key: Key, loss: PortLoss, now: Time) {
        let Some(binding) = self
            .bindings
            .get_mut(&key)
            .filter(|binding| binding.is_live())
        else {
            return;
        };
        if binding.state == State::Requested {
            // Nothing says that it is a lease; its time limit goes on.
            return;
        }
        if binding.state == State::Releasing {
            return;
        }
        let mac = binding.chaddr;
        let closing = match &mut binding.check {
            Check::Watching(watching) => {
                // It may have been seen at its new port already, or not yet at its own.
                watching.lost = Some((now, loss));
                watching.closing = true;
                true
            }
            Check::Glancing | Check::Idle => false,
        };
        let own_port = Some(binding.port);
        self.set_state(
            key,
            State::Silent,
            NoticeKind::Silent,
            format!("its port: {}", loss_text(loss)),
            now,
        );
        if closing {
            self.actions.push_back(Action::Look { key, mac, own_port });
            self.schedule(key, now + RETRY);
        } else {
            self.search(key, (now, loss), now);
        }
    }

    /// Asks for it everywhere: its port is gone.
    fn search(&mut self, key: Key, lost: (Time, PortLoss), now: Time) {
        self.begin_watch(key, Some(lost), true, now);
        let gone = self.is_gone(key.segment);
        if let Some(binding) = self.bindings.get_mut(&key)
            && (gone || binding.last_seen.is_none_or(|at| at < self.listens_since))
            && let Check::Watching(watching) = &mut binding.check
        {
            // It may have been started at another port while nobody listened there.
            watching.deaf = true;
        }
        self.send_probes(key, now);
    }

    /// The port is back: whatever was counted against the VM begins anew.
    fn watch_again(&mut self, key: Key, now: Time) {
        let Some(binding) = self.bindings.get(&key).filter(|binding| binding.is_live()) else {
            return;
        };
        if binding.lost().is_some() && binding.state != State::Releasing {
            // Whoever opened the port may be another VM, and this one elsewhere.
            self.begin_watch(key, None, true, now);
            self.send_probes(key, now);
        }
    }

    fn records_lost(&mut self, port: IfIndex, lost: u32, now: Time) {
        let Some(info) = self.ports.get_mut(&port) else {
            return;
        };
        info.lost_at = Some(now);
        let keys: Vec<Key> = info.bindings.iter().copied().collect();
        info.lost = info.lost.saturating_add(lost);
        if info
            .lost_told
            .is_none_or(|at| now.since(at) >= REPORT_EVERY)
        {
            info.lost_told = Some(now);
            let count = std::mem::take(&mut info.lost);
            let name = info.port.name.clone();
            self.notify(
                now,
                NoticeKind::RecordsLost,
                None,
                None,
                Some(name),
                format!("{count} records lost; its bindings are uncertain until seen again"),
            );
        }
        self.add("records_lost", u64::from(lost));
        for key in keys {
            if let Some(binding) = self.bindings.get_mut(&key) {
                // Only an ACK that is clear ends these, so that they stay.
                if !matches!(binding.doubt, Some(Doubt::Ambiguous | Doubt::Contested)) {
                    binding.doubt = Some(Doubt::RecordsLost(now));
                }
                self.save(key);
            }
        }
    }

    // ---- DHCP --------------------------------------------------------------------------------

    fn message(&mut self, message: &Message, now: Time) {
        let Some(info) = self.ports.get(&message.port) else {
            self.add("messages_without_port", 1);
            return;
        };
        let segment = info.port.segment;
        self.add("messages", 1);
        self.heard_after(segment, message, now);
        self.import_heard(segment, message);
        match Speaker::of(message) {
            Speaker::Vm => self.vm_says(segment, message, now),
            Speaker::ServerToVm => self.server_says(segment, message, now),
            Speaker::Beyond => self.beyond_says(segment, message, now),
            Speaker::RogueServer => self.rogue_says(message, now),
            Speaker::Impostor => {
                self.add("impostors", 1);
                self.claimed(segment, message, now);
            }
        }
    }

    fn vm_says(&mut self, segment: SegmentId, message: &Message, now: Time) {
        self.frame_of(segment, message.port, message.chaddr, message.seen_at, now);
        if message.ambiguous {
            self.add("ambiguous", 1);
            self.doubt(segment, message.port, message.chaddr);
        }
        match message.kind {
            MessageType::Request | MessageType::Discover => self.request(segment, message, now),
            MessageType::Release => {
                let ip = message.ciaddr;
                self.given_up(
                    segment,
                    message,
                    ip,
                    State::Withdrawn,
                    "the VM released it",
                    now,
                );
            }
            MessageType::Decline => {
                let ip = message.requested_ip;
                self.given_up(
                    segment,
                    message,
                    ip,
                    State::Refused,
                    "the VM declined it",
                    now,
                );
            }
            MessageType::Inform | MessageType::Offer | MessageType::Ack | MessageType::Nak => {}
        }
    }

    fn request(&mut self, segment: SegmentId, message: &Message, now: Time) {
        let Some(ask) = Ask::of(message) else {
            return;
        };
        self.claimed(segment, message, now);
        let server_mac = match ask {
            Ask::Renewing { .. } => Some(message.destination_mac).filter(|mac| mac.is_unicast()),
            Ask::Selecting { .. }
            | Ask::InitReboot { .. }
            | Ask::Rebinding { .. }
            | Ask::RapidCommit => None,
        };
        let transaction = Transaction {
            at: message.seen_at,
            ask,
            vlan: message.vlan,
            client_id: message.client_id.clone(),
            ambiguous: message.ambiguous,
            poisoned: false,
        };
        self.open_transaction(message, transaction);
        let Some(ip) = ask.ip() else {
            return;
        };
        let key = Key {
            segment,
            vlan: message.vlan,
            ip,
        };
        if message.ambiguous {
            return;
        }
        if let Some(binding) = self
            .bindings
            .get_mut(&key)
            .filter(|binding| binding.is_live())
        {
            if binding.port == message.port && binding.chaddr == message.chaddr {
                // Until an ACK says more, this is the newest word on where its server is.
                binding.server_mac = binding.server_mac.or(server_mac);
                if self.policy.commit == Commit::Request {
                    binding.server = ask.server().or(binding.server);
                    binding.client_id.clone_from(&message.client_id);
                }
                self.save(key);
            }
            return;
        }
        let Some(info) = self.ports.get(&message.port) else {
            return;
        };
        if info.bindings.len() >= self.policy.bindings_per_port {
            self.add("bindings_refused", 1);
            return;
        }
        if self.held_behind_another(key, message.port, message.chaddr) {
            return;
        }
        let port_name = info.port.name.clone();
        let server = ask.server();
        let after = self.released_before(key);
        let known_mac = server.and_then(|server| self.server_mac(segment, message.vlan, server));
        let shared = self
            .bindings
            .get(&key)
            .is_some_and(|b| b.shared && b.client_id == message.client_id);
        self.remove(key);
        self.insert(Binding {
            client_id: message.client_id.clone(),
            server,
            server_mac: server_mac.or(known_mac),
            port: message.port,
            port_name,
            state: State::Requested,
            shared,
            tentative_until: Some(now + TRANSACTION),
            last_seen: Some(message.seen_at),
            after,
            ..Binding::new(key, message.chaddr, now)
        });
        self.tell(
            key,
            NoticeKind::Requested,
            format!("{}, xid {:#010x}", ask.name(), message.xid),
            now,
        );
        match self.policy.commit {
            // The address may come alive before any reply is seen, or without one.
            Commit::Request => {
                self.begin_watch(key, None, false, now);
                self.schedule(key, now + self.policy.probe_wait);
            }
            Commit::Ack => self.schedule(key, now + TRANSACTION),
        }
    }

    fn server_says(&mut self, segment: SegmentId, message: &Message, now: Time) {
        let id = (message.xid, message.chaddr, message.port);
        let Some(transaction) = self.transactions.get(&id).cloned() else {
            self.add("answers_unasked", 1);
            self.contradicted(segment, message, now);
            return;
        };
        if message.seen_at.since(transaction.at) > TRANSACTION || message.vlan != transaction.vlan {
            self.add("answers_unasked", 1);
            self.contradicted(segment, message, now);
            return;
        }
        if transaction.poisoned {
            self.add("answers_poisoned", 1);
            self.contradicted(segment, message, now);
            return;
        }
        match message.kind {
            MessageType::Ack => self.ack(segment, message, &transaction, now),
            MessageType::Nak => {
                self.close_transaction(message.port, message.xid, message.chaddr);
                let Some(ip) = transaction.ask.ip() else {
                    return;
                };
                let key = Key {
                    segment,
                    vlan: message.vlan,
                    ip,
                };
                if self.owned_by(key, message.port, message.chaddr) {
                    self.end(
                        key,
                        State::Refused,
                        "the server answered NAK".to_owned(),
                        now,
                    );
                } else if !transaction.ambiguous {
                    self.claim_refused(key, message.chaddr, transaction.at);
                }
            }
            MessageType::Discover
            | MessageType::Offer
            | MessageType::Request
            | MessageType::Decline
            | MessageType::Release
            | MessageType::Inform => {}
        }
    }

    fn ack(&mut self, segment: SegmentId, message: &Message, transaction: &Transaction, now: Time) {
        let Some(ip) = message.yiaddr else {
            // The answer to an INFORM (RFC 2131 section 4.3.5) grants nothing.
            return;
        };
        if transaction.ask == Ask::RapidCommit && !message.rapid_commit {
            return;
        }
        self.close_transaction(message.port, message.xid, message.chaddr);
        self.learn_relay(segment, message);
        let key = Key {
            segment,
            vlan: message.vlan,
            ip,
        };
        let server = message.server_id.or(transaction.ask.server());
        let expires = message
            .lease_secs
            .and_then(|secs| lease_end(message.seen_at, secs));
        let Some(info) = self.ports.get(&message.port) else {
            return;
        };
        let port_name = info.port.name.clone();
        let full = info.bindings.len() >= self.policy.bindings_per_port;
        // What was lost may be newer than what is read only now.
        let lost_since = info.lost_at.filter(|at| message.seen_at < *at);
        let place = format!("on {port_name}");
        self.handed_on(key, message.chaddr, &place, now);
        self.bound_again(segment, message.chaddr);
        let previous = self.bindings.get(&key).cloned();
        let renewed = previous.as_ref().is_some_and(|b| {
            b.acked && b.is_live() && b.port == message.port && b.chaddr == message.chaddr
        });
        if self.held_behind_another(key, message.port, message.chaddr) {
            // Its owner's port is up, so this may be a neighbour who borrows the MAC and is given
            // its lease, and whose port's end would then be taken for the owner's. A binding
            // follows a VM to a new port only when the old one is gone.
            self.add("acks_contested", 1);
            let reason = format!("the server leased it to the same MAC on {port_name}");
            self.sooner(key, expires);
            self.in_conflict(key, reason, now);
            if let Some(binding) = self.bindings.get_mut(&key) {
                // Frames do not settle it: whoever lives behind the old port can use the MAC.
                let ambiguous = binding.doubt.filter(|doubt| *doubt == Doubt::Ambiguous);
                binding.doubt = ambiguous.or(Some(Doubt::Contested));
                self.save(key);
            }
            return;
        }
        let shared = previous.as_ref().is_some_and(|b| {
            // What one clone gives back, the other still has.
            let same = b.shared && b.client_id == transaction.client_id;
            let taken = b.is_known() && b.lost().is_none() && b.chaddr != message.chaddr;
            // One that the server leased it to at another port too may have it still.
            let may_live = b.is_live() || b.doubt == Some(Doubt::Contested);
            same || (may_live && taken)
        });
        if let Some(previous) = previous.filter(|it| it.is_live())
            && (previous.port, previous.chaddr) != (message.port, message.chaddr)
        {
            let (state, reason) = if previous.chaddr == message.chaddr {
                (
                    State::Moved,
                    format!("the server leased it to the same MAC on {port_name}"),
                )
            } else {
                (
                    State::Withdrawn,
                    format!("the server leased it to {} on {port_name}", message.chaddr),
                )
            };
            self.end(key, state, reason, now);
        } else if full
            && self
                .bindings
                .get(&key)
                .is_none_or(|b| b.port != message.port)
        {
            self.add("bindings_refused", 1);
            return;
        }
        self.remove(key);
        let doubt = if transaction.ambiguous || message.ambiguous {
            Some(Doubt::Ambiguous)
        } else {
            lost_since.map(Doubt::RecordsLost)
        };
        self.insert(Binding {
            client_id: transaction.client_id.clone(),
            server,
            server_mac: Some(message.source_mac).filter(|mac| mac.is_unicast()),
            port: message.port,
            port_name,
            state: State::Bound,
            acked: true,
            shared,
            doubt,
            expires,
            last_seen: Some(message.seen_at),
            ..Binding::new(key, message.chaddr, now)
        });
        let kind = if renewed {
            NoticeKind::Renewed
        } else {
            NoticeKind::Bound
        };
        let lease = match message.lease_secs {
            Some(u32::MAX) => "infinite".to_owned(),
            Some(secs) => format!("{secs}s"),
            None => "of unknown length".to_owned(),
        };
        let server = server.map_or_else(|| "an unnamed server".to_owned(), |ip| ip.to_string());
        self.tell(
            key,
            kind,
            format!(
                "{} answered by {server}, lease {lease}",
                transaction.ask.name()
            ),
            now,
        );
        self.rest(key, now);
    }

    /// What is heard by an uplink: servers, and VMs that live elsewhere.
    fn beyond_says(&mut self, segment: SegmentId, message: &Message, now: Time) {
        match message.kind {
            MessageType::Ack | MessageType::Nak | MessageType::Offer => {
                self.learn_server(segment, message);
                self.learn_relay(segment, message);
                let (xid, mac) = (message.xid, message.chaddr);
                let asked = self
                    .transactions
                    .range((xid, mac, 0)..=(xid, mac, IfIndex::MAX))
                    .map(|((_, _, port), _)| *port)
                    .find(|port| self.segment_of(*port) == Some(segment));
                match asked {
                    Some(port) => {
                        let message = Message {
                            port,
                            ..message.clone()
                        };
                        self.server_says(segment, &message, now);
                    }
                    None => self.leased_beyond(segment, message, now),
                }
            }
            MessageType::Request
            | MessageType::Discover
            | MessageType::Decline
            | MessageType::Release
            | MessageType::Inform => self.claimed(segment, message, now),
        }
    }

    /// An ACK to a host beyond the uplink ends what we thought of the address.
    fn leased_beyond(&mut self, segment: SegmentId, message: &Message, now: Time) {
        let (MessageType::Ack, Some(ip)) = (message.kind, message.yiaddr) else {
            return;
        };
        let key = Key {
            segment,
            vlan: message.vlan,
            ip,
        };
        self.handed_on(key, message.chaddr, "beyond the uplink", now);
        let Some(binding) = self.bindings.get(&key).filter(|binding| binding.is_live()) else {
            return;
        };
        if binding.acked
            && binding.chaddr == message.chaddr
            && binding.state == State::Bound
            && message.seen_at.since(binding.since) < SAME_ANSWER
        {
            // The very ACK that made the binding: its record by the uplink came after the port's.
            return;
        }
        let (state, who) = if binding.chaddr == message.chaddr {
            if binding.is_known() && binding.lost().is_none() {
                // Anybody can ask in its name, and our record of its own question may be lost.
                let expires = message
                    .lease_secs
                    .and_then(|secs| lease_end(message.seen_at, secs));
                self.sooner(key, expires);
                let reason = "the server leased it to its MAC beyond the uplink".to_owned();
                self.in_conflict(key, reason, now);
                return;
            }
            (State::Moved, "its MAC".to_owned())
        } else {
            let shared = binding.is_known() && binding.lost().is_none();
            if let Some(binding) = self.bindings.get_mut(&key) {
                // It lives, as far as is known here: one of two clones, who will ask for it again.
                binding.shared |= shared;
            }
            (State::Withdrawn, message.chaddr.to_string())
        };
        self.end(
            key,
            state,
            format!("the server leased it to {who} beyond the uplink"),
            now,
        );
    }

    fn rogue_says(&mut self, message: &Message, now: Time) {
        self.add("rogue_server", 1);
        // The same frame goes on to its victim's port: what it answers is not believed.
        let any = MacAddr::BROADCAST;
        let same_xid = (message.xid, MacAddr::default(), 0)..=(message.xid, any, IfIndex::MAX);
        for (&(xid, chaddr, port), transaction) in self.transactions.range_mut(same_xid) {
            transaction.poisoned = true;
            let id = TransactionId { port, xid, chaddr };
            self.actions.push_back(Action::SaveTransaction { id });
        }
        let Some(info) = self.ports.get_mut(&message.port) else {
            return;
        };
        if info
            .rogue_told
            .is_some_and(|at| now.since(at) < REPORT_EVERY)
        {
            return;
        }
        info.rogue_told = Some(now);
        let name = info.port.name.clone();
        self.notify(
            now,
            NoticeKind::RogueServer,
            Some(message.source_ip),
            Some(message.source_mac),
            Some(name),
            "a port that is no uplink sent a DHCP server's message, which is not believed; if a server \
             lives there, name the port with --uplink"
                .to_owned(),
        );
    }

    /// Somebody asks for an address, or in a MAC's name: whatever counted against their owners
    /// begins anew, and a claim from another port than the owner's is a conflict.
    fn claimed(&mut self, segment: SegmentId, message: &Message, now: Time) {
        let mut keys: BTreeSet<Key> = BTreeSet::new();
        let asked = Ask::of(message)
            .and_then(Ask::ip)
            .or(message.ciaddr)
            .or(message.requested_ip);
        keys.extend(asked.map(|ip| Key {
            segment,
            vlan: message.vlan,
            ip,
        }));
        keys.extend(self.index.of_mac(segment, message.chaddr));
        for key in keys {
            let Some(binding) = self.bindings.get(&key) else {
                continue;
            };
            if binding.port == message.port && binding.chaddr == message.chaddr {
                continue;
            }
            let clone = asked == Some(key.ip)
                && message.chaddr != binding.chaddr
                && message.client_id.is_some()
                && message.client_id == binding.client_id;
            if clone && let Some(binding) = self.bindings.get_mut(&key) {
                // Of one that has ended, too: it may ask for the lease again.
                binding.shared = true;
            }
            let Some(binding) = self.bindings.get(&key).filter(|b| b.is_live()) else {
                continue;
            };
            if binding.port == message.port && message.chaddr != binding.chaddr {
                // Another MAC behind the same port asks for the address: it may only want it.
                self.restart_hold(key, now);
                continue;
            }
            let lost = binding.lost().is_some();
            let port = self.port_name(message.port);
            if lost {
                self.restart_hold(key, now);
                continue;
            }
            self.in_conflict(
                key,
                format!(
                    "{} on {port} asks for it, or in its MAC's name",
                    message.source_mac
                ),
                now,
            );
        }
    }

    /// The server may have changed the lease's end for somebody in the VM's name: what ends first
    /// counts.
    fn sooner(&mut self, key: Key, expires: Option<Time>) {
        if let Some(binding) = self.bindings.get_mut(&key) {
            binding.expires = binding.expires.into_iter().chain(expires).min();
            self.save(key);
        }
    }

    /// An ACK that is not believed may still be the server's: it binds nothing, but whose address it
    /// names is in doubt.
    fn contradicted(&mut self, segment: SegmentId, message: &Message, now: Time) {
        let (MessageType::Ack, Some(ip)) = (message.kind, message.yiaddr) else {
            return;
        };
        let key = Key {
            segment,
            vlan: message.vlan,
            ip,
        };
        let Some(binding) = self.bindings.get(&key).filter(|b| b.is_live()) else {
            return;
        };
        if binding.chaddr == message.chaddr {
            let secs = message.lease_secs;
            self.sooner(key, secs.and_then(|secs| lease_end(message.seen_at, secs)));
        } else {
            let reason = format!("a doubtful answer leases it to {}", message.chaddr);
            self.in_conflict(key, reason, now);
        }
    }

    /// The server has refused the address to `mac`, which had asked for it: nothing is left of a conflict
    /// that began with that, unless it asked in the owner's name.
    fn claim_refused(&mut self, key: Key, mac: MacAddr, asked_at: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        let owner = binding.is_live() && binding.acked && binding.chaddr != mac;
        if owner && matches!(binding.doubt, Some(Doubt::Conflict(at)) if at >= asked_at) {
            binding.doubt = None;
            self.save(key);
        }
    }

    /// Somebody else has a say in a binding: it holds until its VM is heard by its own port.
    fn in_conflict(&mut self, key: Key, reason: String, now: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if let Some(Doubt::RecordsLost(since)) = &mut binding.doubt {
            // The stronger doubt takes this one in.
            *since = now;
        }
        if binding.doubt.is_none() {
            binding.doubt = Some(Doubt::Conflict(now));
            self.add("conflicts", 1);
            self.tell(key, NoticeKind::Conflict, reason, now);
            self.save(key);
        }
        self.restart_hold(key, now);
    }

    fn given_up(
        &mut self,
        segment: SegmentId,
        message: &Message,
        ip: Option<Ipv4Addr>,
        state: State,
        reason: &str,
        now: Time,
    ) {
        let Some(ip) = ip else {
            return;
        };
        let key = Key {
            segment,
            vlan: message.vlan,
            ip,
        };
        if self.owned_by(key, message.port, message.chaddr) {
            self.end(key, state, reason.to_owned(), now);
        } else {
            self.claimed(segment, message, now);
        }
    }

    /// A frame in the name of `mac` came in by `port`.
    fn frame_of(&mut self, segment: SegmentId, port: IfIndex, mac: MacAddr, at: Time, now: Time) {
        let keys: Vec<Key> = self.index.of_mac(segment, mac).collect();
        for key in keys {
            if self.owned_by(key, port, mac) {
                self.alive(key, at, "it sent a DHCP message", now);
            }
        }
    }

    fn doubt(&mut self, segment: SegmentId, port: IfIndex, mac: MacAddr) {
        let keys: Vec<Key> = self.index.of_mac(segment, mac).collect();
        for key in keys {
            if self.owned_by(key, port, mac)
                && let Some(binding) = self.bindings.get_mut(&key)
            {
                binding.doubt = Some(Doubt::Ambiguous);
                self.save(key);
            }
        }
    }

    fn owned_by(&self, key: Key, port: IfIndex, mac: MacAddr) -> bool {
        self.bindings
            .get(&key)
            .is_some_and(|b| b.is_live() && b.port == port && b.chaddr == mac)
    }

    /// The same MAC has the address behind another port that is up, or may still have it though its
    /// time ran out here, for its renewals may be among records that were lost, or though a frame of
    /// it came from elsewhere, which another can send.
    fn held_behind_another(&self, key: Key, port: IfIndex, mac: MacAddr) -> bool {
        let Some(binding) = self.bindings.get(&key) else {
            return false;
        };
        let holds = binding.is_live() || matches!(binding.state, State::Expired | State::Moved);
        let port_is_up = |port| self.ports.get(&port).is_some_and(|info| !info.dark);
        binding.is_known()
            && binding.chaddr == mac
            && binding.port != port
            && binding.lost().is_none()
            && port_is_up(binding.port)
            && holds
    }

    fn open_transaction(&mut self, message: &Message, transaction: Transaction) {
        let Some(info) = self.ports.get_mut(&message.port) else {
            return;
        };
        let id = (message.xid, message.chaddr);
        if !info.transactions.contains(&id) && info.transactions.len() >= TRANSACTIONS_PER_PORT {
            self.add("transactions_refused", 1);
            return;
        }
        info.transactions.insert(id);
        self.close_transaction_timer(message.port, id);
        self.transactions_due
            .insert((transaction.at + TRANSACTION, message.port, id.0, id.1));
        self.transactions
            .insert((id.0, id.1, message.port), transaction);
        self.save_transaction(message.port, id.0, id.1);
    }

    fn close_transaction_timer(&mut self, port: IfIndex, (xid, mac): (u32, MacAddr)) {
        if let Some(old) = self.transactions.get(&(xid, mac, port)) {
            self.transactions_due
                .remove(&(old.at + TRANSACTION, port, xid, mac));
        }
    }

    fn close_transaction(&mut self, port: IfIndex, xid: u32, mac: MacAddr) {
        self.close_transaction_timer(port, (xid, mac));
        if self.transactions.remove(&(xid, mac, port)).is_some() {
            self.save_transaction(port, xid, mac);
        }
        if let Some(info) = self.ports.get_mut(&port) {
            info.transactions.remove(&(xid, mac));
        }
    }

    fn learn_server(&mut self, segment: SegmentId, message: &Message) {
        let (Some(server), true) = (message.server_id, message.source_mac.is_unicast()) else {
            return;
        };
        let Some(segment) = self.segments.get_mut(&segment) else {
            return;
        };
        let id = (message.vlan, server);
        if segment.servers.len() < SERVERS_PER_SEGMENT || segment.servers.contains_key(&id) {
            segment.servers.insert(id, message.source_mac);
        }
    }

    fn learn_relay(&mut self, segment: SegmentId, message: &Message) {
        let (Some(server), Some(relay)) = (message.server_id, message.giaddr) else {
            return;
        };
        let Some(segment) = self.segments.get_mut(&segment) else {
            return;
        };
        let id = (message.vlan, server);
        let room = segment.relays.len() < SERVERS_PER_SEGMENT || segment.relays.contains_key(&id);
        if room && message.source_mac.is_unicast() {
            segment.relays.insert(id, (relay, message.source_mac));
        }
    }

    /// Whom to ask whether the way to the server is open: itself, or the relay that stands for it on
    /// this link, where nobody would answer for an address beyond.
    fn control_probe(&self, binding: &Binding) -> Option<Probe> {
        let Key { segment, vlan, .. } = binding.key;
        let server = binding.server?;
        let relays = self.segments.get(&segment).map(|segment| &segment.relays);
        let relay = relays.and_then(|relays| relays.get(&(vlan, server)).copied());
        let (ip, mac) = relay.or(binding.server_mac.map(|mac| (server, mac)))?;
        let via = ProbeVia::Segment(segment);
        Some(Probe { via, vlan, ip, mac })
    }

    fn server_mac(&self, segment: SegmentId, vlan: Vlan, server: Ipv4Addr) -> Option<MacAddr> {
        self.segments
            .get(&segment)?
            .servers
            .get(&(vlan, server))
            .copied()
    }

    // ---- liveness ----------------------------------------------------------------------------

    fn wake(&mut self, key: Key, now: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if !binding.is_live() {
            self.wake_ended(key, now);
            return;
        }
        if binding.state == State::Releasing {
            return;
        }
        if binding.expires.is_some_and(|at| at <= now) {
            self.end(key, State::Expired, "its time ran out".to_owned(), now);
            return;
        }
        if binding.tentative_until.is_some_and(|at| at <= now) {
            self.end(
                key,
                State::Expired,
                "no answer to the REQUEST was seen".to_owned(),
                now,
            );
            return;
        }
        if binding.state == State::Requested && self.policy.commit == Commit::Ack {
            let until = binding.tentative_until.unwrap_or(now + TRANSACTION);
            self.schedule(key, until);
            return;
        }
        if binding.check == Check::Idle {
            binding.check = Check::Glancing;
        }
        let own_port = Some(binding.port).filter(|_| binding.lost().is_none());
        let mac = binding.chaddr;
        self.actions.push_back(Action::Look { key, mac, own_port });
    }

    fn evidence(&mut self, key: Key, evidence: Evidence, now: Time) {
        if !self.bindings.contains_key(&key) && self.import_seen(key, evidence, now) {
            return;
        }
        if self
            .bindings
            .get(&key)
            .is_some_and(|binding| binding.vigil.is_some() && !binding.is_live())
        {
            self.looked_after(key, evidence, now);
            return;
        }
        let Some(binding) = self
            .bindings
            .get_mut(&key)
            .filter(|binding| binding.is_live())
        else {
            return;
        };
        binding.evidence = Some(Box::new((now, evidence)));
        match binding.check {
            Check::Idle => {}
            Check::Glancing => self.glanced(key, evidence, now),
            Check::Watching(watching) if watching.closing => {
                // What came by its own port came before that was lost, and says no more than that.
                let since = |at: &Time| *at >= watching.armed_at;
                let own_at = evidence.own_at.filter(since);
                binding.last_seen = binding.last_seen.max(own_at);
                let seen = evidence
                    .elsewhere
                    .filter(|(at, _)| since(at) && own_at.is_none_or(|own| *at > own));
                let evidence = Evidence {
                    own_at: None,
                    address_at: None,
                    ..evidence
                };
                match (seen, watching.lost) {
                    (Some(_), _) | (None, None) => self.watched(key, watching, evidence, now),
                    (None, Some((_, loss))) => self.search(key, (now, loss), now),
                }
            }
            Check::Watching(watching) => self.watched(key, watching, evidence, now),
        }
    }

    /// The cheap answer: something came in by the port, and nobody else lives behind it.
    fn glanced(&mut self, key: Key, evidence: Evidence, now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let alone = self
            .ports
            .get(&binding.port)
            .is_some_and(|info| info.bindings.len() == 1);
        // Whether that is its VM, and which address it has now, the port's slot does not tell.
        let certain = matches!(binding.doubt, None | Some(Doubt::Ambiguous));
        let heard = evidence
            .port_at
            .filter(|at| binding.last_seen.is_none_or(|seen| *at > seen));
        match heard {
            // What came while nobody listened says little of where the VM is now.
            Some(at)
                if alone
                    && certain
                    && at >= self.listens_since
                    && binding.state != State::Requested =>
            {
                self.alive(key, at, "its port is heard", now);
                self.rest(key, now);
            }
            Some(_) if alone || binding.state == State::Requested => self.look_and_probe(key, now),
            // Which of them spoke? Listen first: a busy VM is not asked.
            Some(_) => {
                self.begin_watch(key, None, false, now);
                self.schedule(key, now + self.policy.probe_wait);
            }
            None => self.look_and_probe(key, now),
        }
    }

    fn look_and_probe(&mut self, key: Key, now: Time) {
        self.begin_watch(key, None, false, now);
        self.send_probes(key, now);
    }

    fn watched(&mut self, key: Key, watching: Watching, evidence: Evidence, now: Time) {
        let requested = self
            .bindings
            .get(&key)
            .is_some_and(|binding| binding.state == State::Requested);
        if let Some(at) = evidence
            .address_at
            .or(evidence.own_at.filter(|_| !requested))
            .filter(|at| *at >= watching.armed_at)
        {
            self.confirm(key, evidence.address_at, now);
            self.alive(key, at, "a frame of it came by its own port", now);
            return;
        }
        if let Some((at, port)) = evidence
            .elsewhere
            .filter(|(at, _)| *at >= watching.armed_at)
            .filter(|_| !self.policy.without.contains(&Gate::Elsewhere))
        {
            let other = evidence.address.filter(|(at, _)| *at >= watching.armed_at);
            if let (Some((_, mac)), Some(binding)) = (other, self.bindings.get_mut(&key)) {
                // A clone of it, which the server knows by the same client-id.
                binding.shared |= binding.client_id.is_some() && mac != binding.chaddr;
            }
            self.found_elsewhere(key, watching, at, port, now);
            return;
        }
        let uplink = self.has_uplink(key.segment);
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let answered_within = self.case(binding).probe_wait();
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if std::mem::take(&mut binding.vetoed) {
            // The kernel saw what this look did not: silence begins anew.
            self.restart_hold(key, now);
            return;
        }
        let mut watching = watching;
        if uplink
            && watching.everywhere
            && let Some(probed_at) = watching.probed_at
            && now.since(probed_at) >= answered_within
            && evidence
                .uplink_at
                .is_none_or(|at| at + HEARD_WITHIN < probed_at)
        {
            // The latest probe may have left by a cut cable, and what came while it was cut nobody
            // heard: silence begins anew, and a VM that started elsewhere meanwhile has more time.
            self.begin_watch(key, watching.lost, true, now);
            watching = Watching {
                armed_at: now,
                probes: 0,
                deaf: true,
                ..watching
            };
            self.set_check(key, Check::Watching(watching));
        }
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        if binding.state == State::Requested {
            self.ask_again(key, watching, now);
            return;
        }
        if watching.probes >= self.policy.misses && binding.state == State::Bound {
            let reason = format!(
                "{} probes unanswered in {}",
                watching.probes,
                secs(now.since(watching.armed_at))
            );
            self.set_state(key, State::Silent, NoticeKind::Silent, reason, now);
            // From here on every port of the segment counts, for it may have moved; and the silence
            // that a RELEASE stands on is one that was watched everywhere.
            if !watching.everywhere {
                self.begin_watch(key, None, true, now);
                self.send_probes(key, now);
                return;
            }
        }
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let findings = self.case(binding).findings(now);
        let held_down = holds(&findings, Gate::Dead) || holds(&findings, Gate::HoldDown);
        if held_down && binding.state != State::Gone {
            self.ask_again(key, watching, now);
            return;
        }
        self.gone(key, &findings, now);
    }

    /// Silence went on for as long as it must: dead, unless a gate knows better.
    fn gone(&mut self, key: Key, findings: &[Finding], now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        if binding.state != State::Gone {
            self.found_dead(key, findings, now);
            let Some(binding) = self.bindings.get(&key) else {
                return;
            };
            // The breaker has counted it now.
            let findings = self.case(binding).findings(now);
            self.judge(key, &findings, now);
            return;
        }
        self.judge(key, findings, now);
    }

    fn found_dead(&mut self, key: Key, findings: &[Finding], now: Time) {
        let reason = reason_of(findings, Gate::Dead);
        self.set_state(key, State::Gone, NoticeKind::Gone, reason, now);
        if let Some(rule) = breaker_rule(&self.policy) {
            self.breaker.died(key, now, self.live, rule);
        }
    }

    fn judge(&mut self, key: Key, findings: &[Finding], now: Time) {
        let Some(stop) = findings
            .iter()
            .find(|finding| finding.verdict != Verdict::Pass)
        else {
            self.order_release(key, now);
            return;
        };
        if stop.verdict == Verdict::Forget {
            self.end(key, State::Expired, stop.reason.clone(), now);
            return;
        }
        let told = self.bindings.get(&key).and_then(|binding| binding.held_by);
        if told != Some(stop.gate) {
            self.add(held_counter(stop.gate), 1);
            self.tell(
                key,
                NoticeKind::Held,
                format!("{}: {}", stop.gate, stop.reason),
                now,
            );
            if let Some(binding) = self.bindings.get_mut(&key) {
                binding.held_by = Some(stop.gate);
            }
        }
        let again = match stop.gate {
            Gate::Rate => self.take_turn(key, stop.again_at, now),
            Gate::Confirmed
            | Gate::Lease
            | Gate::Dead
            | Gate::Elsewhere
            | Gate::Unique
            | Gate::HoldDown
            | Gate::Settled
            | Gate::Paused
            | Gate::Breaker
            | Gate::Kernel => stop
                .again_at
                .unwrap_or(now + HELD_AGAIN)
                .max(now + Duration::from_millis(1)),
        };
        // While it waits it is still asked, as any silent VM is.
        let probe_due = self
            .bindings
            .get(&key)
            .is_some_and(|binding| match binding.check {
                Check::Watching(watching) => watching
                    .probed_at
                    .is_none_or(|at| now.since(at) >= self.policy.probe_interval),
                Check::Idle | Check::Glancing => false,
            });
        if probe_due {
            self.send_probes(key, now);
        }
        self.schedule(key, again);
    }

    /// A place in its server's queue; who has had one comes back for the next token.
    fn take_turn(&mut self, key: Key, again_at: Option<Time>, now: Time) -> Time {
        let soon = now + Duration::from_millis(1);
        let again = again_at.map_or(soon, |at| at.max(soon));
        let Some(binding) = self.bindings.get_mut(&key) else {
            return again;
        };
        let Some(server) = binding.server else {
            return again;
        };
        let pace = (key.segment, key.vlan, server);
        if let Some(turn) = binding.turn {
            self.pacing.wait_again(pace, key, turn);
            self.sound(key, now);
            return again;
        }
        let turn = self.pacing.queue(pace, key, now);
        binding.turn = Some(turn);
        self.sound(key, now);
        turn.max(soon)
    }

    /// Asks the server of `key` how far it has read, if it is time to.
    fn sound(&mut self, key: Key, now: Time) {
        let Some(server) = self.bindings.get(&key).and_then(|b| b.server) else {
            return;
        };
        let server_mac = self.bindings.get(&key).and_then(|b| b.server_mac);
        if let Some(mark) = self.pacing.sounding((key.segment, key.vlan, server), now) {
            self.add("soundings", 1);
            self.actions.push_back(Action::Sound(Sounding {
                segment: key.segment,
                vlan: key.vlan,
                server,
                server_mac: server_mac.or_else(|| self.server_mac(key.segment, key.vlan, server)),
                ip: key.ip,
                mark,
            }));
        }
    }

    /// A server has read what it was sent up to `mark`: those who wait for it go on.
    fn server_read(&mut self, server: ServerKey, mark: u64, now: Time) {
        self.add("soundings_answered", 1);
        for (turn, key) in self.pacing.read_up_to(server, mark, now) {
            if let Some(binding) = self.bindings.get_mut(&key)
                && binding.turn == Some(turn)
            {
                binding.turn = Some(now);
                self.schedule(key, now);
            } else {
                self.pacing.leave(server, key, turn);
            }
        }
    }

    fn order_release(&mut self, key: Key, now: Time) {
        self.order_release_because(key, "", now);
    }

    fn order_release_because(&mut self, key: Key, why: &str, now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let (Some(server), Check::Watching(watching)) = (binding.server, binding.check) else {
            return;
        };
        // Before the token is taken: a gate that passed is not to seem to hold.
        let grounds = self.case(binding).findings(now);
        let (pace, turn) = ((key.segment, key.vlan, server), binding.turn);
        if !self.pacing.take(pace, key, turn, now) && !self.policy.without.contains(&Gate::Rate) {
            self.schedule(key, now + HELD_AGAIN);
            return;
        }
        let release = Release {
            segment: key.segment,
            vlan: key.vlan,
            ip: key.ip,
            chaddr: binding.chaddr,
            client_id: binding.client_id.clone(),
            server,
            server_mac: binding
                .server_mac
                .or_else(|| self.server_mac(key.segment, key.vlan, server)),
            silent_since: watching.armed_at,
        };
        let reason = format!(
            "{why}to {server}: silent for {}",
            secs(now.since(watching.armed_at))
        );
        self.set_state(key, State::Releasing, NoticeKind::Releasing, reason, now);
        self.grounds.insert(key, grounds);
        self.actions.push_back(Action::Release { key, release });
        self.sound(key, now);
    }

    fn released(&mut self, key: Key, outcome: ReleaseOutcome, now: Time) {
        self.grounds.remove(&key);
        let Some(binding) = self
            .bindings
            .get_mut(&key)
            .filter(|b| b.state == State::Releasing)
        else {
            return;
        };
        let server = binding.server.map(|ip| ip.to_string()).unwrap_or_default();
        match outcome {
            ReleaseOutcome::Sent => {
                self.add("releases_sent", 1);
                self.breaker.released(key);
                self.begin_vigil(key, now);
                self.finish(
                    key,
                    NoticeKind::Released,
                    format!("RELEASE sent to {server}, unverified"),
                    now,
                );
            }
            ReleaseOutcome::DryRun => {
                self.add("releases_dry_run", 1);
                self.finish(
                    key,
                    NoticeKind::WouldRelease,
                    format!("dry run: to {server}"),
                    now,
                );
            }
            // A repetition that does not leave: the first one stands.
            ReleaseOutcome::Vetoed | ReleaseOutcome::Failed if binding.vigil.is_some() => {
                if let Some(vigil) = &mut binding.vigil {
                    vigil.closed = true;
                }
                self.add("repetitions_stopped", 1);
                self.finish(
                    key,
                    NoticeKind::Held,
                    "the repetition did not leave: the VM was seen, or nothing could be sent"
                        .into(),
                    now,
                );
            }
            ReleaseOutcome::Vetoed => {
                binding.state = State::Silent;
                binding.vetoed = true;
                self.save(key);
                self.add("releases_vetoed", 1);
                self.add(held_counter(Gate::Kernel), 1);
                self.tell(
                    key,
                    NoticeKind::Vetoed,
                    "kernel: a frame of it came after the decision".into(),
                    now,
                );
                self.wake(key, now);
            }
            ReleaseOutcome::Failed => {
                binding.state = State::Gone;
                binding.turn = None;
                binding.failures += 1;
                let again = now + RETRY * binding.failures.min(60);
                self.save(key);
                self.add("releases_failed", 1);
                self.tell(
                    key,
                    NoticeKind::ReleaseFailed,
                    "it could not be sent".into(),
                    now,
                );
                self.schedule(key, again);
            }
        }
    }

    fn finish(&mut self, key: Key, kind: NoticeKind, reason: String, now: Time) {
        self.retire(key, State::Released, now, false);
        self.tell(key, kind, reason, now);
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

    /// A sign of life by its own port.
    fn alive(&mut self, key: Key, at: Time, how: &str, now: Time) {
        let Some(binding) = self
            .bindings
            .get_mut(&key)
            .filter(|binding| binding.is_live())
        else {
            return;
        };
        binding.last_seen = binding.last_seen.max(Some(at));
        binding.held_by = None;
        // After a lost record only the address itself, or an ACK, says that it is still the VM's.
        if let Some(Doubt::Conflict(since)) = binding.doubt
            && at > since
        {
            binding.doubt = None;
            self.save(key);
        }
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        match binding.state {
            // On its way: the kernel has the last word, and `released` hears it.
            State::Releasing => return,
            State::Silent | State::Gone => {
                let silent = secs(now.since(binding.since));
                self.set_state(
                    key,
                    State::Bound,
                    NoticeKind::Alive,
                    format!("{how}, {silent} after it fell silent"),
                    now,
                );
                self.recover(key, now);
            }
            State::Requested | State::Bound => {}
            State::Released | State::Refused | State::Withdrawn | State::Expired | State::Moved => {
                return;
            }
        }
        self.rest(key, now);
    }

    /// The address itself was seen: a REQUEST's pair is a lease, and the VM uses it.
    fn confirm(&mut self, key: Key, address_at: Option<Time>, now: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        let Some(at) = address_at else {
            return;
        };
        let first = !std::mem::replace(&mut binding.seen_alive, true);
        let doubted = matches!(binding.doubt, Some(Doubt::RecordsLost(since)) if at > since);
        if doubted {
            binding.doubt = None;
        }
        // Where an ACK was seen nothing hangs on it, and the next look says it again: no row for each VM
        // just for that.
        let matters = !(binding.acked && binding.origin == Origin::Wire);
        if (first && matters) || doubted {
            self.save(key);
        }
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if binding.state == State::Requested && self.policy.commit == Commit::Request {
            binding.tentative_until = None;
            let mac = binding.chaddr;
            self.bound_again(key.segment, mac);
            self.set_state(
                key,
                State::Bound,
                NoticeKind::Bound,
                "seen alive at its own port".into(),
                now,
            );
        }
    }

    fn found_elsewhere(
        &mut self,
        key: Key,
        watching: Watching,
        at: Time,
        port: IfIndex,
        now: Time,
    ) {
        if self
            .bindings
            .get(&key)
            .is_some_and(|binding| binding.port == port)
        {
            // The port had lost its carrier and no more than that, or is there again.
            if let Some(info) = self.ports.get_mut(&port) {
                info.bindings.insert(key);
            }
            self.alive(key, at, "a frame of it came by its own port", now);
            return;
        }
        let name = self.port_name(port);
        let vm_port = self
            .ports
            .get(&port)
            .is_some_and(|info| info.port.role == Role::Vm);
        if !vm_port {
            self.end(key, State::Moved, format!("it is alive behind {name}"), now);
            return;
        }
        if watching.lost.is_none() {
            // Its own port is up: it is plugged in twice, or a neighbour speaks in its name, who
            // must not come to own it by that. It can be followed once its port is gone.
            self.in_conflict(key, format!("seen behind {name} too"), now);
            return;
        }
        // Its old port is gone and a VM's port of ours has it: it was plugged in anew.
        let old = self.bindings.get(&key).map(|binding| binding.port);
        if let Some(info) = old.and_then(|old| self.ports.get_mut(&old)) {
            info.bindings.remove(&key);
        }
        let mut lost_since = None;
        if let Some(info) = self.ports.get_mut(&port) {
            info.bindings.insert(key);
            lost_since = info.lost_at.filter(|lost| at < *lost);
        }
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        // Its old port is gone, and with it who might have used the MAC there.
        binding.doubt = binding.doubt.filter(|doubt| *doubt != Doubt::Contested);
        let unheard = watching.deaf
            || matches!(watching.lost, Some((_, PortLoss::Unseen)))
            || binding.last_seen.is_none_or(|at| at < self.listens_since);
        if unheard && binding.doubt.is_none() {
            // It may have been given another end there while nobody listened.
            binding.doubt = Some(Doubt::Contested);
        }
        if let (None, Some(lost)) = (binding.doubt, lost_since) {
            // What it asked for there may be among them.
            binding.doubt = Some(Doubt::RecordsLost(lost));
        }
        binding.port = port;
        binding.port_name.clone_from(&name);
        self.save(key);
        self.tell(
            key,
            NoticeKind::Moved,
            format!("it is alive behind {name}: followed there"),
            now,
        );
        self.alive(key, at, "behind its new port", now);
    }

    /// Asks once more, and comes back for the answer.
    fn ask_again(&mut self, key: Key, watching: Watching, now: Time) {
        let round = self.round(key);
        let due = watching.probed_at.map_or(now, |at| at + round);
        let enough = watching.probes >= self.policy.misses;
        match self
            .hold_ends(key, Duration::ZERO)
            .filter(|at| enough && *at > now && *at <= now + round)
        {
            Some(end) => {
                // One more probe would only put the end off; but where an uplink may be cut, it must
                // have been open until shortly before.
                let last = self.last_question(key);
                match last.filter(|last| watching.probed_at.is_none_or(|at| at < *last)) {
                    Some(last) if last <= now => self.send_probes(key, now),
                    Some(last) => self.schedule(key, last),
                    None => self.schedule(key, end),
                }
            }
            None if due <= now => self.send_probes(key, now),
            None => self.schedule(key, due),
        }
    }

    /// When the hold-down is over, or this much before; not while a silent VM is only looked for at
    /// its own port.
    fn hold_ends(&self, key: Key, before: Duration) -> Option<Time> {
        let binding = self.bindings.get(&key)?;
        let Check::Watching(watching) = binding.check else {
            return None;
        };
        if !watching.everywhere {
            return None;
        }
        Some(watching.armed_at + self.case(binding).hold().saturating_sub(before))
    }

    /// When to ask for the last time before the end of the hold-down, if there is an uplink.
    fn last_question(&self, key: Key) -> Option<Time> {
        let binding = self.bindings.get(&key)?;
        let wait = self.case(binding).probe_wait();
        self.hold_ends(key, wait)
            .filter(|_| self.has_uplink(key.segment))
    }

    /// Time between two probes: on the fast road they share the hold-down, and while a VM still
    /// counts as alive an answer is looked for first.
    fn round(&self, key: Key) -> Duration {
        let Some(binding) = self.bindings.get(&key) else {
            return self.policy.probe_interval;
        };
        let round = match binding.lost() {
            Some(_) => (self.case(binding).hold() / self.policy.misses.max(1))
                .min(self.policy.probe_interval),
            None => self.policy.probe_interval,
        };
        if self.is_hurried(key) {
            return round.min(self.policy.probe_wait);
        }
        round
    }

    fn send_probes(&mut self, key: Key, now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let Check::Watching(watching) = binding.check else {
            return;
        };
        let (ip, mac, vlan) = (key.ip, binding.chaddr, key.vlan);
        let via = match watching.lost {
            Some(_) => ProbeVia::Segment(key.segment),
            None => ProbeVia::Port(binding.port),
        };
        let control = self.control_probe(binding);
        let has_uplink = self.has_uplink(key.segment);
        self.add("probes_sent", 1);
        if watching.everywhere && watching.lost.is_none() {
            let via = ProbeVia::Segment(key.segment);
            self.actions.push_back(Action::Control {
                probe: Probe { via, vlan, ip, mac },
            });
        }
        let ask_all = self
            .segments
            .get(&key.segment)
            .is_some_and(|segment| segment.had_uplink || segment.had_aside);
        if watching.everywhere && ask_all && watching.probes < self.policy.misses {
            // Of everybody too: the switches beyond still think that the MAC is here, and so send
            // nothing for it to where it has moved; and another MAC may have the address by now,
            // there or behind a port whose DHCP is not heard.
            // Whoever answers for the dead there costs a lease, no more.
            let via = ProbeVia::Segment(key.segment);
            let mac = MacAddr::BROADCAST;
            self.actions.push_back(Action::Control {
                probe: Probe { via, vlan, ip, mac },
            });
        }
        if let Some(probe) = control.filter(|_| watching.everywhere && has_uplink) {
            self.actions.push_back(Action::Control { probe });
        }
        self.actions.push_back(Action::Probe {
            key,
            probe: Probe { via, vlan, ip, mac },
        });
        // If no answer of the shell's comes back, the round still ends.
        self.schedule(key, now + self.round(key));
    }

    fn probed(&mut self, key: Key, sent: bool, now: Time) {
        let round = self.round(key);
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        let Check::Watching(watching) = &mut binding.check else {
            return;
        };
        if !sent {
            self.add("probes_failed", 1);
            self.schedule(key, now + round);
            return;
        }
        watching.probed_at = Some(now);
        watching.probes += 1;
        // The first answer is looked for soon, so that a live VM is watched for a moment only.
        let enough = watching.probes >= self.policy.misses;
        let next = if watching.lost.is_none() {
            now + round.min(self.policy.probe_wait)
        } else {
            now + round
        };
        let wait = self.bindings.get(&key).map(|b| self.case(b).probe_wait());
        let last = self.last_question(key).filter(|last| *last > now);
        let end = self
            .hold_ends(key, Duration::ZERO)
            .map(|end| end.max(now + wait.unwrap_or_default()));
        let next = last
            .or(end)
            .filter(|_| enough)
            .map_or(next, |at| at.min(next));
        self.schedule(key, next);
    }

    fn begin_watch(
        &mut self,
        key: Key,
        lost: Option<(Time, PortLoss)>,
        everywhere: bool,
        now: Time,
    ) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        let mac = binding.chaddr;
        if let Check::Watching(_) = binding.check {
            // What was seen until now belongs to the watch that ends here.
            self.actions.push_back(Action::Disarm { key, mac });
        }
        binding.check = Check::Watching(Watching {
            armed_at: now,
            lost,
            probes: 0,
            probed_at: None,
            everywhere,
            deaf: false,
            closing: false,
        });
        binding.evidence = None;
        self.leave_queue(key);
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let own_port = Some(binding.port).filter(|_| lost.is_none());
        self.actions.push_back(Action::Arm {
            key,
            mac,
            own_port,
            everywhere,
        });
    }

    /// Gives up the place in the server's queue.
    fn leave_queue(&mut self, key: Key) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if let (Some(turn), Some(server)) = (binding.turn.take(), binding.server) {
            self.pacing
                .leave((key.segment, key.vlan, server), key, turn);
        }
    }

    fn set_check(&mut self, key: Key, check: Check) {
        if let Some(binding) = self.bindings.get_mut(&key) {
            binding.check = check;
        }
    }

    /// Something new was said about a binding whose death is being looked into: look anew.
    fn restart_hold(&mut self, key: Key, now: Time) {
        let Some(binding) = self
            .bindings
            .get(&key)
            .filter(|binding| binding.state != State::Releasing)
        else {
            return;
        };
        if let Check::Watching(watching) = binding.check {
            self.begin_watch(
                key,
                watching.lost.map(|(_, loss)| (now, loss)),
                watching.everywhere,
                now,
            );
            if watching.deaf
                && let Some(Check::Watching(anew)) = self.bindings.get(&key).map(|b| b.check)
            {
                self.set_check(key, Check::Watching(Watching { deaf: true, ..anew }));
            }
            self.send_probes(key, now);
        }
    }

    /// How long a quiet VM is left alone: as long as it takes to look at all others.
    fn silence(&self) -> Duration {
        let live = u32::try_from(self.live).unwrap_or(u32::MAX);
        // They are looked at after three quarters of it, in the mean (see `early`).
        let round = Duration::from_secs(1) * live * 4 / 3 / self.policy.probe_rate.max(1);
        self.policy.silence.max(round)
    }

    /// Nothing is in doubt: take the watch away, and look again after `silence`; or soon, at what was
    /// last seen while nobody listened.
    fn rest(&mut self, key: Key, now: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if let Check::Watching(_) = binding.check {
            self.actions.push_back(Action::Disarm {
                key,
                mac: binding.chaddr,
            });
        }
        binding.check = Check::Idle;
        binding.evidence = None;
        binding.failures = 0;
        self.leave_queue(key);
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let seen = binding.last_seen.unwrap_or(now);
        let due = if seen < self.listens_since {
            now + self.policy.probe_wait
        } else {
            let silence = self.silence();
            let silence = silence - early(key, seen, silence / 2);
            let due = (seen + silence).max(now + Duration::from_millis(1));
            // Those that are due at nearly the same time are looked at in one go.
            let late = due.as_nanos() % TOGETHER;
            due + Duration::from_nanos((TOGETHER - late) % TOGETHER)
        };
        let end = binding
            .expires
            .into_iter()
            .chain(binding.tentative_until)
            .min();
        self.schedule(key, end.map_or(due, |end| end.min(due)));
    }

    // ---- bookkeeping -------------------------------------------------------------------------

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

fn reason_of(findings: &[Finding], gate: Gate) -> String {
    findings
        .iter()
        .find(|finding| finding.gate == gate)
        .map(|f| f.reason.clone())
        .unwrap_or_default()
}

/// By how much less than the longest a quiet address is asked sooner, so that those that came together
/// are not asked together, for ever.
fn early(key: Key, seen: Time, longest: Duration) -> Duration {
    // Fibonacci hashing: neighbours are as far from one another as they can be.
    let mixed = (u64::from(key.ip.to_bits()) ^ seen.as_nanos()).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let share = u32::try_from(mixed >> 54).unwrap_or(0);
    longest * share / 1024
}

fn loss_text(loss: PortLoss) -> &'static str {
    match loss {
        PortLoss::Deleted => "deleted",
        PortLoss::CarrierLost => "carrier lost",
        PortLoss::LinkDown => "link down",
        PortLoss::Detached => "detached from the bridge",
        PortLoss::Unseen => "gone when the agent started",
    }
}

/// Counters carry the gate's name, so that each has its own.
fn held_counter(gate: Gate) -> &'static str {
    match gate {
        Gate::Confirmed => "held_confirmed",
        Gate::Lease => "held_lease",
        Gate::Dead => "held_dead",
        Gate::Elsewhere => "held_elsewhere",
        Gate::Unique => "held_unique",
        Gate::HoldDown => "held_hold_down",
        Gate::Settled => "held_settled",
        Gate::Paused => "held_paused",
        Gate::Breaker => "held_breaker",
        Gate::Rate => "held_rate",
        Gate::Kernel => "held_kernel",
    }
}
