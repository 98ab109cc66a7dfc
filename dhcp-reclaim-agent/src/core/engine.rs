//! The machine: what happened and what time it is go in, what is to be done comes out.

mod memory;
mod outcome;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use super::{
    binding::{Ask, Binding, Check, Doubt, Speaker, Watching, lease_end},
    gates::{Case, Finding, Gate, Verdict, breaker_rule, secs},
    limits::{Breaker, Pacing},
    policy::{Commit, Policy},
    types::{
        Action, Event, Evidence, IfIndex, Key, MacAddr, Message, MessageType, Notice, NoticeKind,
        Port, PortLoss, Probe, ProbeVia, Release, ReleaseOutcome, Role, SegmentId, State, Time,
        TransactionId, Vlan,
    },
};

use self::outcome::Aftermath;
pub use self::{
    memory::{Saved, SavedTransaction},
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
/// One report of a rogue server per port in this time.
const ROGUE_EVERY: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
struct PortInfo {
    port: Port,
    bindings: BTreeSet<Key>,
    transactions: BTreeSet<(u32, MacAddr)>,
    rogue_told: Option<Time>,
}

#[derive(Clone, Debug)]
struct Segment {
    settled_at: Time,
    uplinks: BTreeSet<IfIndex>,
    /// It has one, or had: without it, a VM that moved is only out of sight.
    had_uplink: bool,
    /// Learned from what servers sent in by an uplink, for where ACKs to VMs are not seen.
    servers: BTreeMap<(Vlan, Ipv4Addr), MacAddr>,
}

/// Servers of one segment whose MAC is remembered.
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
    ports: BTreeMap<IfIndex, PortInfo>,
    /// Bindings of links that are no ports at the moment.
    detached: BTreeMap<IfIndex, BTreeSet<Key>>,
    segments: BTreeMap<SegmentId, Segment>,
    bindings: BTreeMap<Key, Binding>,
    by_mac: BTreeMap<(SegmentId, MacAddr), BTreeSet<Key>>,
    by_client_id: BTreeMap<(SegmentId, Vlan, Vec<u8>), BTreeSet<Key>>,
    /// By xid, client and port.
    transactions: BTreeMap<(u32, MacAddr, IfIndex), Transaction>,
    transactions_due: BTreeSet<(Time, IfIndex, u32, MacAddr)>,
    timers: BTreeSet<(Time, Key)>,
    live: usize,
    breaker: Breaker,
    pacing: Pacing,
    aftermath: Aftermath,
    counters: BTreeMap<&'static str, u64>,
    actions: VecDeque<Action>,
}

impl Engine {
    pub fn new(policy: Policy, now: Time) -> Self {
        let pacing = Pacing::new(policy.rate, policy.burst);
        Self {
            policy,
            started_at: now,
            ports: BTreeMap::new(),
            detached: BTreeMap::new(),
            segments: BTreeMap::new(),
            bindings: BTreeMap::new(),
            by_mac: BTreeMap::new(),
            by_client_id: BTreeMap::new(),
            transactions: BTreeMap::new(),
            transactions_due: BTreeSet::new(),
            timers: BTreeSet::new(),
            live: 0,
            breaker: Breaker::default(),
            pacing,
            aftermath: Aftermath::default(),
            counters: BTreeMap::new(),
            actions: VecDeque::new(),
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
        binding.into_iter().chain(transaction).min()
    }

    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(&(at, port, xid, mac)) = self.transactions_due.first() {
            if at > now {
                break;
            }
            self.close_transaction(port, xid, mac);
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
    }

    pub fn handle(&mut self, event: Event, now: Time) {
        match event {
            Event::PortUp(port) => self.port_up(port, now),
            Event::PortDown { port, loss } => self.port_down(port, loss, now),
            Event::Message(message) => self.message(&message, now),
            Event::RecordsLost { port, count } => self.records_lost(port, count, now),
            Event::Evidence { key, evidence } => self.evidence(key, evidence, now),
            Event::Probed { key, sent } => self.probed(key, sent, now),
            Event::Released { key, outcome } => self.released(key, outcome, now),
            Event::Queried {
                key,
                server,
                answer,
            } => self.queried(key, server, answer, now),
        }
    }

    pub fn bindings(&self) -> impl Iterator<Item = &Binding> {
        self.bindings.values()
    }

    /// Bindings of `ip`, on whichever segment and VLAN.
    pub fn bindings_of(&self, ip: Ipv4Addr) -> impl Iterator<Item = &Binding> {
        self.bindings
            .values()
            .filter(move |binding| binding.key.ip == ip)
    }

    /// What each gate would say now.
    pub fn explain(&self, key: Key, now: Time) -> Option<Vec<Finding>> {
        let binding = self.bindings.get(&key)?;
        Some(self.case(binding).findings(now))
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
        let started_at = self.started_at;
        let settled_after_start = started_at + self.policy.settle;
        let segment = self
            .segments
            .entry(port.segment)
            .or_insert_with(|| Segment {
                settled_at: settled_after_start,
                uplinks: BTreeSet::new(),
                had_uplink: false,
                servers: BTreeMap::new(),
            });
        segment.had_uplink |= port.role == Role::Uplink;
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
            },
        );
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

    /// A link that had been detached is a port again, perhaps of another bridge.
    fn plugged_in_again(&mut self, port: IfIndex, now: Time) {
        let segment = self.segment_of(port);
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
            PortLoss::CarrierLost | PortLoss::LinkDown => {}
            PortLoss::Deleted | PortLoss::Detached => {
                let transactions: Vec<_> = info.transactions.iter().copied().collect();
                for (xid, mac) in transactions {
                    self.close_transaction(port, xid, mac);
                }
                self.ports.remove(&port);
                if loss == PortLoss::Detached && !keys.is_empty() {
                    // A port that never comes back keeps no more than what still lives.
                    let bindings = &self.bindings;
                    self.detached.retain(|_, keys| {
                        keys.retain(|key| bindings.get(key).is_some_and(Binding::is_live));
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
        self.begin_watch(key, Some((now, loss)), true, now);
        self.set_state(
            key,
            State::Silent,
            NoticeKind::Silent,
            format!("its port: {}", loss_text(loss)),
            now,
        );
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
        let Some(info) = self.ports.get(&port) else {
            return;
        };
        let name = info.port.name.clone();
        let keys: Vec<Key> = info.bindings.iter().copied().collect();
        self.add("records_lost", u64::from(lost));
        self.notify(
            now,
            NoticeKind::RecordsLost,
            None,
            None,
            Some(name),
            format!("{lost} records lost; its bindings are uncertain until seen again"),
        );
        for key in keys {
            if let Some(binding) = self.bindings.get_mut(&key) {
                // Only an ACK that is clear ends an ambiguity, so that one stays.
                if binding.doubt != Some(Doubt::Ambiguous) {
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
            key,
            chaddr: message.chaddr,
            client_id: message.client_id.clone(),
            server,
            server_mac: server_mac.or(known_mac),
            port: message.port,
            port_name,
            state: State::Requested,
            acked: false,
            seen_alive: false,
            shared,
            doubt: None,
            expires: None,
            tentative_until: Some(now + TRANSACTION),
            last_seen: Some(message.seen_at),
            since: now,
            check: Check::Idle,
            due: None,
            evidence: None,
            held_by: None,
            vetoed: false,
            failures: 0,
            turn: None,
            outcome: None,
            vigil: None,
            after,
            alarmed: false,
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
        let place = format!("on {port_name}");
        self.handed_on(key, message.chaddr, &place, now);
        self.bound_again(segment, message.chaddr);
        let previous = self.bindings.get(&key).cloned();
        let renewed = previous.as_ref().is_some_and(|b| {
            b.acked && b.is_live() && b.port == message.port && b.chaddr == message.chaddr
        });
        if let Some(previous) = previous.as_ref().filter(|b| b.is_live())
            && previous.acked
            && previous.chaddr == message.chaddr
            && previous.port != message.port
            && previous.lost().is_none()
        {
            // Its owner's port is up, so this may be a neighbour who borrows the MAC and is given
            // its lease, and whose port's end would then be taken for the owner's. A binding
            // follows a VM to a new port only when the old one is gone.
            self.add("acks_contested", 1);
            let reason = format!("the server leased it to the same MAC on {port_name}");
            self.sooner(key, expires);
            self.in_conflict(key, reason, now);
            return;
        }
        let shared = previous.as_ref().is_some_and(|b| {
            // What one clone gives back, the other still has.
            let same = b.shared && b.client_id == transaction.client_id;
            let taken = b.acked && b.lost().is_none() && b.chaddr != message.chaddr;
            same || (b.is_live() && taken)
        });
        if let Some(previous) = previous.filter(Binding::is_live)
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
        let doubt = (transaction.ambiguous || message.ambiguous).then_some(Doubt::Ambiguous);
        self.insert(Binding {
            key,
            chaddr: message.chaddr,
            client_id: transaction.client_id.clone(),
            server,
            server_mac: Some(message.source_mac).filter(|mac| mac.is_unicast()),
            port: message.port,
            port_name,
            state: State::Bound,
            acked: true,
            seen_alive: false,
            shared,
            doubt,
            expires,
            tentative_until: None,
            last_seen: Some(message.seen_at),
            since: now,
            check: Check::Idle,
            due: None,
            evidence: None,
            held_by: None,
            vetoed: false,
            failures: 0,
            turn: None,
            outcome: None,
            vigil: None,
            after: None,
            alarmed: false,
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
            if binding.acked && binding.lost().is_none() {
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
            .is_some_and(|at| now.since(at) < ROGUE_EVERY)
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
            "a VM's port sent a DHCP server's message, which is not believed; if a server lives there, \
             name the port with --uplink"
                .to_owned(),
        );
    }

    /// Somebody asks for an address, or in a MAC's name: whatever counted against their owners
    /// begins anew, and a claim from another port than the owner's is a conflict.
    fn claimed(&mut self, segment: SegmentId, message: &Message, now: Time) {
        let mut keys: BTreeSet<Key> = BTreeSet::new();
        let asked = Ask::of(message).and_then(Ask::ip).or(message.ciaddr);
        keys.extend(asked.map(|ip| Key {
            segment,
            vlan: message.vlan,
            ip,
        }));
        keys.extend(
            self.by_mac
                .get(&(segment, message.chaddr))
                .into_iter()
                .flatten()
                .copied(),
        );
        for key in keys {
            let Some(binding) = self.bindings.get(&key) else {
                continue;
            };
            if binding.port == message.port && binding.chaddr == message.chaddr {
                continue;
            }
            if !binding.is_live() {
                continue;
            }
            if binding.port == message.port && message.chaddr != binding.chaddr {
                // Another MAC behind the same port asks for the address: it may only want it.
                self.restart_hold(key, now);
                continue;
            }
            let clone = message.kind == MessageType::Request
                && asked == Some(key.ip)
                && message.chaddr != binding.chaddr
                && message.client_id.is_some()
                && message.client_id == binding.client_id;
            let lost = binding.lost().is_some();
            let port = self.port_name(message.port);
            if clone && let Some(binding) = self.bindings.get_mut(&key) {
                binding.shared = true;
            }
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
        let other = |binding: &Binding| binding.is_live() && binding.chaddr != message.chaddr;
        if self.bindings.get(&key).is_some_and(other) {
            let reason = format!("a doubtful answer leases it to {}", message.chaddr);
            self.in_conflict(key, reason, now);
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
        let keys: Vec<Key> = self
            .by_mac
            .get(&(segment, mac))
            .into_iter()
            .flatten()
            .copied()
            .collect();
        for key in keys {
            if self.owned_by(key, port, mac) {
                self.alive(key, at, "it sent a DHCP message", now);
            }
        }
    }

    fn doubt(&mut self, segment: SegmentId, port: IfIndex, mac: MacAddr) {
        let keys: Vec<Key> = self
            .by_mac
            .get(&(segment, mac))
            .into_iter()
            .flatten()
            .copied()
            .collect();
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
        binding.evidence = Some((now, evidence));
        match binding.check {
            Check::Idle => {}
            Check::Glancing => self.glanced(key, evidence, now),
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
        // Which address its VM has now, the port's slot does not tell.
        let certain = !matches!(binding.doubt, Some(Doubt::RecordsLost(_)));
        let heard = evidence
            .port_at
            .filter(|at| binding.last_seen.is_none_or(|seen| *at > seen));
        match heard {
            Some(at) if alone && certain && binding.state != State::Requested => {
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
            self.found_elsewhere(key, watching, at, port, now);
            return;
        }
        let uplink = self.has_uplink(key.segment);
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
            && evidence
                .uplink_at
                .is_none_or(|at| at + HEARD_WITHIN < probed_at)
        {
            // The latest probe may have left by a cut cable, and those before it too.
            watching.probes = 0;
            binding.check = Check::Watching(watching);
        }
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
            self.begin_watch(key, None, true, now);
            self.send_probes(key, now);
            return;
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
            let reason = reason_of(findings, Gate::Dead);
            self.set_state(key, State::Gone, NoticeKind::Gone, reason, now);
            if let Some(rule) = breaker_rule(&self.policy) {
                self.breaker.died(key, now, self.live, rule);
            }
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
        let (None, Some(server)) = (binding.turn, binding.server) else {
            return again;
        };
        let turn = self.pacing.queue((key.segment, key.vlan, server), now);
        binding.turn = Some(turn);
        turn.max(soon)
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
        if !self.pacing.take((key.segment, key.vlan, server), now)
            && !self.policy.without.contains(&Gate::Rate)
        {
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
        self.actions.push_back(Action::Release { key, release });
    }

    fn released(&mut self, key: Key, outcome: ReleaseOutcome, now: Time) {
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
        binding.state = state;
        binding.since = now;
        if binding.vigil.is_none() {
            binding.check = Check::Idle;
        }
        let (mac, port) = (binding.chaddr, binding.port);
        if armed {
            self.actions.push_back(Action::Disarm { key, mac });
        }
        if let Some(info) = self.ports.get_mut(&port) {
            info.bindings.remove(&key);
        }
        let acked = binding.acked;
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
        if first || doubted {
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
            // The port had lost its carrier and no more than that.
            self.alive(key, at, "a frame of it came by its own port", now);
            return;
        }
        let name = self.port_name(port);
        let vm_port = self
            .ports
            .get(&port)
            .is_some_and(|info| info.port.role == Role::Vm);
        if watching.lost.is_none() || !vm_port {
            self.end(key, State::Moved, format!("it is alive behind {name}"), now);
            return;
        }
        // Its old port is gone and a VM's port of ours has it: it was plugged in anew.
        let old = self.bindings.get(&key).map(|binding| binding.port);
        if let Some(info) = old.and_then(|old| self.ports.get_mut(&old)) {
            info.bindings.remove(&key);
        }
        if let Some(info) = self.ports.get_mut(&port) {
            info.bindings.insert(key);
        }
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
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
        let hold_ends = self
            .bindings
            .get(&key)
            .zip(watching.lost)
            .map(|(binding, _)| watching.armed_at + self.case(binding).hold());
        match hold_ends.filter(|at| enough && *at > now && *at <= now + round) {
            // All was asked; one more probe would only put the end off.
            Some(end) => self.schedule(key, end),
            None if due <= now => self.send_probes(key, now),
            None => self.schedule(key, due),
        }
    }

    /// Time between two probes: on the fast road they share the hold-down, and while a VM still
    /// counts as alive an answer is looked for first.
    fn round(&self, key: Key) -> Duration {
        let Some(binding) = self.bindings.get(&key) else {
            return self.policy.probe_interval;
        };
        match binding.lost() {
            Some(_) => (self.case(binding).hold() / self.policy.misses.max(1))
                .min(self.policy.probe_interval),
            None => self.policy.probe_interval,
        }
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
        let control = binding
            .server
            .zip(binding.server_mac)
            .map(|(ip, mac)| Probe {
                via: ProbeVia::Segment(key.segment),
                vlan,
                ip,
                mac,
            });
        let has_uplink = self.has_uplink(key.segment);
        self.add("probes_sent", 1);
        if watching.everywhere && watching.lost.is_none() {
            let via = ProbeVia::Segment(key.segment);
            self.actions.push_back(Action::Control {
                probe: Probe { via, vlan, ip, mac },
            });
        }
        if watching.everywhere && has_uplink && watching.probes < self.policy.misses {
            // Of everybody too: the switches beyond still think that the MAC is here, and so send
            // nothing for it to where it has moved; and another MAC may have the address by now.
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
        watching.probed_at = Some(now);
        if !sent {
            self.add("probes_failed", 1);
            self.schedule(key, now + round);
            return;
        }
        watching.probes += 1;
        // The first answer is looked for soon, so that a live VM is watched for a moment only.
        let wait = if watching.lost.is_none() {
            round.min(self.policy.probe_wait)
        } else {
            round
        };
        self.schedule(key, now + wait);
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
        });
        binding.evidence = None;
        binding.turn = None;
        let own_port = Some(binding.port).filter(|_| lost.is_none());
        self.actions.push_back(Action::Arm {
            key,
            mac,
            own_port,
            everywhere,
        });
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
            self.send_probes(key, now);
        }
    }

    /// Nothing is in doubt: take the watch away, and look again after `silence`.
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
        binding.failures = 0;
        binding.turn = None;
        let seen = binding.last_seen.unwrap_or(now);
        let due = (seen + self.policy.silence).max(now + Duration::from_millis(1));
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
            let same = self
                .by_client_id
                .get(&(key.segment, key.vlan, id.clone()))?;
            same.iter().copied().find(|other| {
                *other != key
                    && self
                        .bindings
                        .get(other)
                        .is_some_and(|other| other.is_live() && other.chaddr != binding.chaddr)
            })
        });
        let started = self.started_at + self.policy.settle;
        let settled_at = self
            .segments
            .get(&key.segment)
            .map_or(started, |s| s.settled_at.max(started));
        Case {
            policy: &self.policy,
            binding,
            twin,
            uplink: self.has_uplink(key.segment),
            settled_at,
            breaker: &self.breaker,
            pacing: &self.pacing,
            alarmed: self.is_alarmed(key.segment, binding.chaddr, binding.port),
            live: self.live,
        }
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
        self.by_mac
            .entry((key.segment, binding.chaddr))
            .or_default()
            .insert(key);
        if let Some(id) = &binding.client_id {
            self.by_client_id
                .entry((key.segment, key.vlan, id.clone()))
                .or_default()
                .insert(key);
        }
        if let Some(info) = self.ports.get_mut(&binding.port) {
            info.bindings.insert(key);
        }
        self.live += usize::from(binding.is_live());
        self.bindings.insert(key, binding);
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
        remove_from(&mut self.by_mac, (key.segment, binding.chaddr), key);
        if let Some(id) = binding.client_id {
            remove_from(&mut self.by_client_id, (key.segment, key.vlan, id), key);
        }
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
        }
    }
}

fn remove_from<K: Ord>(index: &mut BTreeMap<K, BTreeSet<Key>>, id: K, key: Key) {
    let Some(keys) = index.get_mut(&id) else {
        return;
    };
    keys.remove(&key);
    if keys.is_empty() {
        index.remove(&id);
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

fn loss_text(loss: PortLoss) -> &'static str {
    match loss {
        PortLoss::Deleted => "deleted",
        PortLoss::CarrierLost => "carrier lost",
        PortLoss::LinkDown => "link down",
        PortLoss::Detached => "detached from the bridge",
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
        Gate::Breaker => "held_breaker",
        Gate::Rate => "held_rate",
        Gate::Kernel => "held_kernel",
    }
}
