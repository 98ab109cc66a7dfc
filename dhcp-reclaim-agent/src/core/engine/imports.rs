//! Leases by hearsay: somebody told us of them, and the wire has not.
//!
//! Such a lease is no binding. Its VM is looked for; once it is seen alive at one of our VM ports, and
//! nowhere else, with that MAC and that address, it becomes one. Until then nothing can release it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use super::Engine;
use crate::core::{
    binding::{Binding, Origin, Speaker},
    types::{
        Action, Evidence, IfIndex, Key, MacAddr, Message, MessageType, NoticeKind, Probe, ProbeVia,
        Role, SegmentId, State, Time,
    },
};

/// Leases by hearsay that are kept.
const IMPORTS: usize = 16_384;
/// Those that are looked for at once: every frame of their segments is looked up meanwhile.
const SEARCHES: usize = 64;
/// How long after a search another one is worth while, times the searches so far.
const AGAIN: Duration = Duration::from_secs(60);
const AGAIN_MAX: u32 = 60;

/// A lease that was not seen on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    pub key: Key,
    pub chaddr: MacAddr,
    pub client_id: Option<Vec<u8>>,
    pub server: Option<Ipv4Addr>,
    pub server_mac: Option<MacAddr>,
    /// `None` is never.
    pub expires: Option<Time>,
}

/// What became of leases that were told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportCount {
    /// Their VMs are looked for.
    pub taken: u64,
    /// The wire has said more about the address.
    pub known: u64,
    /// The lease has ended.
    pub over: u64,
    /// No station can have that MAC or address, or there is no room.
    pub refused: u64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Imports {
    waiting: BTreeMap<Key, Waiting>,
    /// When each of those that are not being looked for is next.
    queue: BTreeSet<(Time, Key)>,
    /// Those that are, since when.
    open: BTreeMap<Key, Time>,
    /// VM ports came up there: a search may find more than the one before.
    fresh: BTreeSet<SegmentId>,
    due: Option<Time>,
}

#[derive(Clone, Debug)]
struct Waiting {
    /// As it will be; its port is not known yet.
    binding: Binding,
    searched_at: Option<Time>,
    searches: u32,
    /// Its place in the queue.
    again_at: Time,
}

impl Imports {
    pub(super) fn due(&self) -> Option<Time> {
        self.due
    }

    pub(super) fn get(&self, key: Key) -> Option<&Binding> {
        self.waiting.get(&key).map(|waiting| &waiting.binding)
    }

    fn is_searching(&self, key: Key) -> Option<Time> {
        self.open.get(&key).copied()
    }

    /// Puts it in the queue, for no later than its lease's end.
    fn enqueue(&mut self, key: Key, at: Time) {
        let Some(waiting) = self.waiting.get_mut(&key) else {
            return;
        };
        let at = waiting.binding.expires.map_or(at, |end| at.min(end));
        self.queue.remove(&(waiting.again_at, key));
        waiting.again_at = at;
        self.queue.insert((at, key));
        self.wake_at(at);
    }

    fn wake_at(&mut self, at: Time) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

impl Engine {
    /// Leases by hearsay whose VMs were not seen yet.
    pub fn imports(&self) -> impl Iterator<Item = &Binding> {
        self.imports
            .waiting
            .values()
            .map(|waiting| &waiting.binding)
    }

    /// Whether anything is known of what the MAC leases, by the wire.
    pub fn knows(&self, segment: SegmentId, mac: MacAddr) -> bool {
        let mut bound = self.index.of_mac(segment, mac);
        bound.any(|key| self.bindings.get(&key).is_some_and(|it| it.is_live()))
    }

    /// The MACs of which something is known by hearsay.
    pub fn told_of(&self) -> BTreeSet<(SegmentId, MacAddr)> {
        let waiting = self.imports.waiting.iter();
        waiting
            .map(|(key, it)| (key.segment, it.binding.chaddr))
            .collect()
    }

    /// Takes leases that were not seen on the wire. What the wire has said of an address is better.
    pub fn import(&mut self, imports: Vec<Import>, now: Time) -> ImportCount {
        let mut count = ImportCount::default();
        for mut import in imports {
            let vlans = self.segments.get(&import.key.segment);
            if let Some(own) = vlans.and_then(|segment| segment.vlans.as_ref())
                && import.key.vlan == 0
            {
                // On a bridge that filters VLANs, no frame is without.
                import.key.vlan = own.pvid;
            }
            let key = import.key;
            let plausible = import.chaddr.is_unicast()
                && !key.ip.is_unspecified()
                && !key.ip.is_multicast()
                && !key.ip.is_broadcast()
                && import.server != Some(key.ip);
            let room =
                self.imports.waiting.len() < IMPORTS || self.imports.waiting.contains_key(&key);
            if !plausible || !room {
                count.refused += 1;
            } else if import.expires.is_some_and(|at| at <= now) {
                count.over += 1;
            } else if self
                .bindings
                .get(&key)
                .is_some_and(|b| b.is_live() || b.acked || b.origin == Origin::Imported)
            {
                count.known += 1;
            } else {
                count.taken += 1;
                self.forget_import(key);
                self.keep_import(waiting_binding(import, now), now);
            }
        }
        self.add("imports_taken", count.taken);
        self.add("imports_refused", count.refused);
        self.search_imports(now);
        count
    }

    /// One that is new, or that an earlier agent knew of.
    pub(super) fn keep_import(&mut self, binding: Binding, now: Time) {
        if self.imports.waiting.len() >= IMPORTS {
            self.add("imports_refused", 1);
            return;
        }
        let key = binding.key;
        let waiting = Waiting {
            binding,
            searched_at: None,
            searches: 0,
            again_at: now,
        };
        self.imports.waiting.insert(key, waiting);
        self.imports.enqueue(key, now);
        self.save(key);
    }

    /// Ends those searches whose time is over, and begins others.
    pub(super) fn search_imports(&mut self, now: Time) {
        let wait = self.policy.probe_wait;
        self.imports.due = None;
        for segment in std::mem::take(&mut self.imports.fresh) {
            self.sooner_on(segment, now);
        }
        let over = |(_, at): &(&Key, &Time)| now.since(**at) >= wait;
        let over: Vec<Key> = self
            .imports
            .open
            .iter()
            .filter(over)
            .map(|(key, _)| *key)
            .collect();
        for key in over {
            let Some(mac) = self.imports.get(key).map(|binding| binding.chaddr) else {
                continue;
            };
            // The answer comes by `import_seen`, and ends the search.
            let own_port = None;
            self.actions.push_back(Action::Look { key, mac, own_port });
        }
        while self.imports.open.len() < SEARCHES
            && let Some(&(at, key)) = self.imports.queue.first()
            && at <= now
        {
            self.imports.queue.pop_first();
            self.begin_search(key, now);
        }
        // If no answer to a look comes back, there is another look.
        let opened = self
            .imports
            .open
            .values()
            .map(|at| (*at + wait).max(now + wait));
        let queued = self
            .imports
            .queue
            .first()
            .map(|(at, _)| (*at).max(now + wait));
        self.imports.due = opened.chain(queued).min();
    }

    fn begin_search(&mut self, key: Key, now: Time) {
        let Some(binding) = self.imports.get(key) else {
            return;
        };
        if binding.expires.is_some_and(|at| at <= now) {
            self.forget_import(key);
            return;
        }
        if self.bindings.contains_key(&key) {
            // It has the watch, and perhaps soon an answer that is better.
            self.imports.enqueue(key, now + AGAIN);
            return;
        }
        let mac = binding.chaddr;
        self.imports.open.insert(key, now);
        self.add("import_searches", 1);
        self.actions.push_back(Action::Arm {
            key,
            mac,
            own_port: None,
            everywhere: true,
        });
        // Its own station, and whoever else may have the address.
        for mac in [mac, MacAddr::BROADCAST] {
            let via = ProbeVia::Segment(key.segment);
            let Key { vlan, ip, .. } = key;
            self.actions.push_back(Action::Control {
                probe: Probe { via, vlan, ip, mac },
            });
        }
    }

    /// The answer to a look at an address that is being looked for; `false`: it is none.
    pub(super) fn import_seen(&mut self, key: Key, evidence: Evidence, now: Time) -> bool {
        let Some(armed_at) = self.imports.is_searching(key) else {
            return false;
        };
        let since = |at: &Time| *at >= armed_at;
        let Some(waiting) = self.imports.waiting.get_mut(&key) else {
            return false;
        };
        let mac = waiting.binding.chaddr;
        let named = waiting.binding.port;
        let stranger = evidence
            .address
            .filter(|(at, found)| since(at) && *found != mac)
            .is_some();
        let elsewhere = evidence.elsewhere.filter(|(at, _)| since(at));
        if named == 0 {
            // First: is anything of it seen, and behind which port?
            let port = elsewhere.map(|(_, port)| port);
            let of_vm = port.filter(|port| {
                self.ports
                    .get(port)
                    .is_some_and(|info| info.port.role == Role::Vm)
            });
            if let Some(port) = of_vm.filter(|_| !stranger && evidence.armed) {
                // Then: was it the address itself, of that MAC, there and nowhere else?
                waiting.binding.port = port;
                let own_port = Some(port);
                self.actions.push_back(Action::Look { key, mac, own_port });
                return true;
            }
        } else if evidence.armed
            && !stranger
            && elsewhere.is_none()
            && let Some(at) = evidence.address_at.filter(since)
        {
            self.import_found(key, named, at, now);
            return true;
        }
        if stranger {
            self.add("imports_contradicted", 1);
        }
        self.end_search(key, now);
        true
    }

    fn end_search(&mut self, key: Key, now: Time) {
        let Some(waiting) = self.imports.waiting.get_mut(&key) else {
            return;
        };
        waiting.binding.port = 0;
        waiting.searched_at = Some(now);
        waiting.searches = waiting.searches.saturating_add(1);
        let again_at = now + AGAIN * waiting.searches.min(AGAIN_MAX);
        let mac = waiting.binding.chaddr;
        if self.imports.open.remove(&key).is_some() {
            self.actions.push_back(Action::Disarm { key, mac });
        }
        self.imports.enqueue(key, again_at);
        // Its place is free for the next one.
        self.imports.wake_at(now);
    }

    /// Its VM lives here: from now on it is a binding like others, but for where it is from.
    fn import_found(&mut self, key: Key, port: IfIndex, at: Time, now: Time) {
        self.end_search(key, now);
        let room = self
            .ports
            .get(&port)
            .filter(|info| info.bindings.len() < self.policy.bindings_per_port);
        let Some(port_name) = room.map(|info| info.port.name.clone()) else {
            self.add("bindings_refused", 1);
            return;
        };
        // It may have asked for the address meanwhile.
        if self.bindings.contains_key(&key) {
            return;
        }
        let Some(waiting) = self.take_import(key) else {
            return;
        };
        self.insert(Binding {
            port,
            state: State::Bound,
            seen_alive: true,
            last_seen: Some(at),
            since: now,
            port_name,
            ..waiting.binding
        });
        self.add("imports_found", 1);
        let reason = "imported, and seen alive at this port".to_owned();
        self.tell(key, NoticeKind::Bound, reason, now);
        self.rest(key, now);
    }

    pub(super) fn forget_import(&mut self, key: Key) {
        if self.take_import(key).is_some() {
            self.save(key);
        }
    }

    fn take_import(&mut self, key: Key) -> Option<Waiting> {
        let waiting = self.imports.waiting.remove(&key)?;
        self.imports.queue.remove(&(waiting.again_at, key));
        if self.imports.open.remove(&key).is_some() {
            let mac = waiting.binding.chaddr;
            self.actions.push_back(Action::Disarm { key, mac });
        }
        Some(waiting)
    }

    /// A binding of the address takes its watch over; what the server granted takes its place, too.
    pub(super) fn import_yields(&mut self, key: Key, granted: bool, now: Time) {
        if granted {
            self.forget_import(key);
        } else if self.imports.is_searching(key).is_some() {
            self.end_search(key, now);
        }
    }

    /// A VM's port came up on the segment: whoever is looked for may have come with it.
    pub(super) fn look_for_imports(&mut self, segment: SegmentId, now: Time) {
        if !self.imports.waiting.is_empty() {
            self.imports.fresh.insert(segment);
            self.imports.wake_at(now + self.policy.probe_wait);
        }
    }

    fn sooner_on(&mut self, segment: SegmentId, now: Time) {
        let waiting = self.imports.waiting.iter();
        let of_segment = waiting
            .filter(|(key, _)| key.segment == segment && !self.imports.open.contains_key(key));
        let turns: Vec<(Key, Time)> = of_segment
            .filter_map(|(key, it)| {
                let at = (it.searched_at? + AGAIN).max(now);
                Some((*key, at.min(it.again_at)))
            })
            .collect();
        for (key, at) in turns {
            self.imports.enqueue(key, at);
        }
    }

    /// What the wire says of an address ends what was only told.
    pub(super) fn import_heard(&mut self, segment: SegmentId, message: &Message) {
        if self.imports.waiting.is_empty() {
            return;
        }
        let from_vm = match Speaker::of(message) {
            Speaker::Vm => true,
            Speaker::ServerToVm | Speaker::Beyond => false,
            Speaker::RogueServer | Speaker::Impostor => return,
        };
        let ip = match message.kind {
            MessageType::Ack => message.yiaddr,
            MessageType::Release => message.ciaddr,
            MessageType::Decline => message.requested_ip,
            MessageType::Nak => {
                // Which address it refuses it does not say.
                self.forget_imports_of(segment, message);
                return;
            }
            MessageType::Discover
            | MessageType::Offer
            | MessageType::Request
            | MessageType::Inform => return,
        };
        let Some(ip) = ip else {
            return;
        };
        let key = Key {
            segment,
            vlan: message.vlan,
            ip,
        };
        // A VM is believed about itself only.
        let about_itself = self
            .imports
            .get(key)
            .is_some_and(|binding| binding.chaddr == message.chaddr);
        if about_itself || !from_vm {
            self.forget_import(key);
        }
    }

    fn forget_imports_of(&mut self, segment: SegmentId, message: &Message) {
        let of_it = |binding: &&Binding| {
            let key = binding.key;
            (key.segment, key.vlan, binding.chaddr) == (segment, message.vlan, message.chaddr)
        };
        let keys: Vec<Key> = self.imports().filter(of_it).map(|b| b.key).collect();
        for key in keys {
            self.forget_import(key);
        }
    }
}

fn waiting_binding(import: Import, now: Time) -> Binding {
    Binding {
        client_id: import.client_id,
        server: import.server,
        server_mac: import.server_mac,
        origin: Origin::Imported,
        expires: import.expires,
        ..Binding::new(import.key, import.chaddr, now)
    }
}
