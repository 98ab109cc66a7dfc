//! What VMs and servers say: who has which lease of whom.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use super::{Engine, REPORT_EVERY, TRANSACTION, Transaction};
use crate::core::{
    binding::{Ask, Binding, Doubt, Speaker, lease_end},
    policy::Commit,
    types::{
        Action, IfIndex, Key, MacAddr, Message, MessageType, NoticeKind, SegmentId, State, Time,
        TransactionId, Vlan,
    },
};

/// Open transactions of one port; the kernel half keeps fewer.
const TRANSACTIONS_PER_PORT: usize = 64;
/// An ACK is seen by the uplink and by the port, in whichever order, within this.
const SAME_ANSWER: Duration = Duration::from_secs(1);
/// Servers of one segment whose MAC, or relay, is remembered.
const SERVERS_PER_SEGMENT: usize = 256;

impl Engine {
    pub(super) fn message(&mut self, message: &Message, now: Time) {
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
        self.conflict(key, reason, now);
        self.restart_hold(key, now);
    }

    pub(super) fn conflict(&mut self, key: Key, reason: String, now: Time) {
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
            self.look_soon(key, now);
        }
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

    pub(super) fn close_transaction(&mut self, port: IfIndex, xid: u32, mac: MacAddr) {
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

    pub(super) fn server_mac(
        &self,
        segment: SegmentId,
        vlan: Vlan,
        server: Ipv4Addr,
    ) -> Option<MacAddr> {
        self.segments
            .get(&segment)?
            .servers
            .get(&(vlan, server))
            .copied()
    }
}
