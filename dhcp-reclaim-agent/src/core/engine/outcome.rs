//! After a RELEASE: what became of it, and whether the dead stay dead.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use super::{Engine, RETENTION};
use crate::core::{
    binding::{Ask, Check, Doubt, Outcome, Speaker, Watching},
    gates::{Gate, Verdict},
    pacing::ServerKey,
    types::{
        Action, AlarmId, Evidence, IfIndex, Key, MacAddr, Message, MessageType, NoticeKind, Query,
        QueryAnswer, SegmentId, State, Time,
    },
};

/// How long a released address is still looked after, and how often.
pub(super) const VIGIL: Duration = Duration::from_secs(60);
const VIGIL_LOOK: Duration = Duration::from_secs(1);
/// Released addresses that are looked after at once.
const VIGILS: usize = 2048;
/// RELEASEs of one death, at most.
const RELEASES: u32 = 3;
/// A server that does not answer lease queries is not asked again for this long.
const UNANSWERED: Duration = Duration::from_secs(3600);
/// The same where nobody could be asked: an address may come.
const UNASKED: Duration = Duration::from_secs(60);
/// The same for a server that has answered before.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Servers whose answers are remembered.
const SERVERS: usize = 64;
/// MACs that are held after an alarm.
const ALARMS: usize = 4096;

/// What is remembered about a RELEASE while its address is looked after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vigil {
    pub until: Time,
    /// RELEASEs sent.
    pub sent: u32,
    /// The lease query for the latest of them has been sent, or is not to be.
    pub asked: bool,
    /// Something newer was seen of its MAC or address: no further RELEASE.
    pub closed: bool,
}

impl Vigil {
    /// One that ends without another RELEASE.
    pub(super) const fn closed(until: Time) -> Self {
        Self {
            until,
            sent: RELEASES,
            asked: true,
            closed: true,
        }
    }
}

/// Whether a server answers lease queries.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    answers: bool,
    open: bool,
    not_before: Option<Time>,
}

/// What the engine remembers beyond single bindings.
#[derive(Clone, Debug, Default)]
pub(super) struct Aftermath {
    vigils: usize,
    servers: BTreeMap<ServerKey, Asked>,
    /// MACs whose released address was alive, and the port that their binding had.
    alarms: BTreeMap<AlarmId, IfIndex>,
}

impl Engine {
    /// A RELEASE left: the binding has ended, and its watch goes on for a while.
    pub(super) fn begin_vigil(&mut self, key: Key, now: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        binding.outcome = Some(Outcome::Unverified);
        let sent = binding.vigil.map_or(0, |vigil| vigil.sent) + 1;
        if binding.vigil.is_none() {
            if self.aftermath.vigils >= VIGILS {
                self.add("vigils_refused", 1);
                return;
            }
            self.aftermath.vigils += 1;
        }
        binding.vigil = Some(Vigil {
            until: now + VIGIL,
            sent,
            asked: false,
            closed: false,
        });
    }

    /// An earlier agent's vigil goes on: whatever was seen since `silent_since` came after the RELEASE.
    pub(super) fn resume_vigil(&mut self, key: Key, vigil: Vigil, silent_since: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if self.aftermath.vigils >= VIGILS {
            self.add("vigils_refused", 1);
            return;
        }
        self.aftermath.vigils += 1;
        binding.vigil = Some(vigil);
        binding.check = Check::Watching(Watching {
            armed_at: silent_since,
            lost: None,
            probes: 0,
            probed_at: None,
            all_asked: [None; 2],
            asking_all: false,
            everywhere: true,
            deaf: false,
            closing: false,
            anew: false,
        });
        let mac = binding.chaddr;
        self.actions.push_back(Action::Arm {
            key,
            mac,
            own_port: None,
            everywhere: true,
        });
    }

    /// The watch over a released address ends, if there is one.
    pub(super) fn end_vigil(&mut self, key: Key) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if binding.vigil.take().is_none() {
            return;
        }
        self.aftermath.vigils -= 1;
        self.save(key);
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if let Check::Watching(_) = std::mem::replace(&mut binding.check, Check::Idle) {
            let mac = binding.chaddr;
            self.actions.push_back(Action::Disarm { key, mac });
        }
    }

    /// When a binding that has ended is to be looked at next.
    pub(super) fn schedule_ended(&mut self, key: Key, now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let at = match binding.vigil {
            Some(_) => now + VIGIL_LOOK,
            None => (binding.since + RETENTION).max(binding.kept_until().unwrap_or(Time::ZERO)),
        };
        self.schedule(key, at);
    }

    pub(super) fn wake_ended(&mut self, key: Key, now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let Some(vigil) = binding.vigil else {
            self.remove(key);
            return;
        };
        if vigil.until <= now {
            self.end_vigil(key);
            self.schedule_ended(key, now);
            return;
        }
        let own_port = Some(binding.port).filter(|_| binding.lost().is_none());
        let mac = binding.chaddr;
        self.actions.push_back(Action::Look { key, mac, own_port });
        self.schedule_ended(key, now);
    }

    /// A look at an address that is released: nobody is to be there.
    pub(super) fn looked_after(&mut self, key: Key, evidence: Evidence, now: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        let (Check::Watching(watching), Some(vigil)) = (binding.check, &mut binding.vigil) else {
            return;
        };
        binding.evidence = Some(Box::new((now, evidence)));
        let since = watching.armed_at;
        let seen = [
            evidence.own_at,
            evidence.elsewhere.map(|(at, _)| at),
            evidence.address.map(|(at, _)| at),
        ];
        vigil.closed |= seen.iter().flatten().any(|at| *at >= since);
        match evidence.address.filter(|(at, _)| *at >= since) {
            Some((_, mac)) if mac == binding.chaddr => {
                self.released_alive(key, "a frame of it came", now);
                return;
            }
            // Whoever has it now had it from the server, or took it: no answer would tell which.
            Some(_) => {
                self.end_vigil(key);
                self.schedule_ended(key, now);
                return;
            }
            None => {}
        }
        self.ask_server(key, now);
    }

    /// The dead speak: tell it once, and release nothing more of them.
    fn released_alive(&mut self, key: Key, how: &str, now: Time) {
        self.add("released_alive", 1);
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let (mac, port) = (binding.chaddr, binding.port);
        self.tell(
            key,
            NoticeKind::ReleasedAlive,
            format!(
                "{how} after its release; nothing of its port or MAC is released until bound again"
            ),
            now,
        );
        let segment = key.segment;
        self.put_alarm(AlarmId { segment, mac }, port);
        self.end_vigil(key);
        if let Some(binding) = self.bindings.get_mut(&key) {
            binding.alarmed = true;
        }
        self.save(key);
        self.schedule_ended(key, now);
    }

    /// Whether a released address of this port or MAC was alive.
    pub(super) fn is_alarmed(&self, segment: SegmentId, mac: MacAddr, port: IfIndex) -> bool {
        let alarms = &self.aftermath.alarms;
        alarms.contains_key(&AlarmId { segment, mac })
            || (port != 0
                && alarms
                    .iter()
                    .any(|(id, at)| id.segment == segment && *at == port))
    }

    /// The port of an alarm, if it holds.
    pub(super) fn alarm(&self, id: AlarmId) -> Option<IfIndex> {
        self.aftermath.alarms.get(&id).copied()
    }

    pub(super) fn put_alarm(&mut self, id: AlarmId, port: IfIndex) {
        let alarms = &self.aftermath.alarms;
        if alarms.len() >= ALARMS && !alarms.contains_key(&id) {
            self.add("alarms_refused", 1);
            return;
        }
        self.aftermath.alarms.insert(id, port);
        self.save_alarm(id);
    }

    /// The server gave this MAC a lease: what was amiss with it is mended.
    pub(super) fn bound_again(&mut self, segment: SegmentId, mac: MacAddr) {
        let id = AlarmId { segment, mac };
        if self.aftermath.alarms.remove(&id).is_some() {
            self.save_alarm(id);
        }
    }

    // ---- what is heard ----------------------------------------------------------------------

    /// Any client's message about a released address, or of its MAC, is newer than the RELEASE.
    pub(super) fn heard_after(&mut self, segment: SegmentId, message: &Message, now: Time) {
        match Speaker::of(message) {
            Speaker::ServerToVm | Speaker::RogueServer => return,
            Speaker::Beyond => match message.kind {
                MessageType::Ack | MessageType::Nak | MessageType::Offer => return,
                MessageType::Request
                | MessageType::Discover
                | MessageType::Decline
                | MessageType::Release
                | MessageType::Inform => {}
            },
            Speaker::Vm | Speaker::Impostor => {}
        }
        let asked = Ask::of(message).and_then(Ask::ip);
        let about = [asked, message.ciaddr, message.requested_ip];
        let about = about.into_iter().flatten().map(|ip| Key {
            segment,
            vlan: message.vlan,
            ip,
        });
        let of_mac = self.index.of_mac(segment, message.chaddr);
        let keys: Vec<Key> = about.chain(of_mac).collect();
        for key in keys {
            let Some(binding) = self.bindings.get_mut(&key) else {
                continue;
            };
            if binding.state != State::Released {
                continue;
            }
            if let Some(vigil) = &mut binding.vigil {
                vigil.closed = true;
            }
            // In `ciaddr` is what a client uses; one that boots anew asks for it instead.
            if message.ciaddr == Some(key.ip)
                && binding.chaddr == message.chaddr
                && binding.outcome.is_some()
                && !binding.alarmed
                && Speaker::of(message) != Speaker::Impostor
            {
                self.released_alive(key, "a DHCP message of it came", now);
            } else if message.ciaddr.is_none()
                && binding.chaddr == message.chaddr
                && Speaker::of(message) != Speaker::Impostor
            {
                // It boots anew, here or elsewhere: what it sends from now on is no sign of an error.
                self.end_vigil(key);
                self.schedule_ended(key, now);
            }
        }
    }

    /// Whose it was, if it was released without anybody knowing with what outcome.
    pub(super) fn released_before(&self, key: Key) -> Option<MacAddr> {
        let binding = self.bindings.get(&key)?;
        let open = binding.state == State::Released
            && matches!(
                binding.outcome,
                Some(Outcome::Unverified | Outcome::Ignored)
            );
        if open {
            Some(binding.chaddr)
        } else {
            binding.after
        }
    }

    /// The server gave a released address to `mac`: it took the RELEASE.
    pub(super) fn handed_on(&mut self, key: Key, mac: MacAddr, place: &str, now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        if let Some(before) = binding.after {
            // Asked for since; the answer tells.
            let port = binding.port_name.clone();
            if before != mac {
                self.add("releases_verified", 1);
                self.notify(
                    now,
                    NoticeKind::Verified,
                    Some(key.ip),
                    Some(before),
                    Some(port),
                    format!("the server leased it to {mac} {place}"),
                );
            }
            if let Some(binding) = self.bindings.get_mut(&key) {
                binding.after = None;
            }
            return;
        }
        if binding.state != State::Released || binding.outcome.is_none() {
            return;
        }
        if binding.chaddr != mac {
            self.verified(key, format!("the server leased it to {mac} {place}"), now);
        }
        self.end_vigil(key);
        self.schedule_ended(key, now);
    }

    fn verified(&mut self, key: Key, reason: String, now: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if binding.outcome.replace(Outcome::Verified) == Some(Outcome::Verified) {
            return;
        }
        self.save(key);
        self.add("releases_verified", 1);
        self.tell(key, NoticeKind::Verified, reason, now);
    }

    // ---- lease queries ----------------------------------------------------------------------

    fn ask_server(&mut self, key: Key, now: Time) {
        if !self.policy.leasequery {
            return;
        }
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        let (Some(server), Some(vigil)) = (binding.server, &mut binding.vigil) else {
            return;
        };
        if vigil.asked || vigil.closed {
            return;
        }
        let id = (key.segment, key.vlan, server);
        let servers = &mut self.aftermath.servers;
        if !servers.contains_key(&id) && servers.len() >= SERVERS {
            servers.retain(|_, asked| asked.open || asked.not_before.is_some_and(|at| at > now));
            if servers.len() >= SERVERS {
                return;
            }
        }
        let asked = servers.entry(id).or_default();
        if let Some(at) = asked.not_before.filter(|at| *at > now) {
            vigil.asked = at >= vigil.until;
            return;
        }
        if asked.open && !asked.answers {
            // Whether it answers at all is being found out.
            return;
        }
        asked.open = true;
        vigil.asked = true;
        let query = Query {
            segment: key.segment,
            vlan: key.vlan,
            ip: key.ip,
            server,
        };
        self.add("lease_queries", 1);
        self.actions.push_back(Action::Query { key, query });
    }

    pub(super) fn queried(&mut self, key: Key, server: Ipv4Addr, answer: QueryAnswer, now: Time) {
        let asked = self
            .aftermath
            .servers
            .entry((key.segment, key.vlan, server))
            .or_default();
        asked.open = false;
        let is_open = asked.not_before.is_none_or(|at| at <= now);
        let mut again = false;
        match answer {
            // One that is busy loses a question as it loses a RELEASE.
            QueryAnswer::Silence if is_open && std::mem::take(&mut asked.answers) => {
                asked.not_before = Some(now + ASK_AGAIN);
                again = true;
            }
            QueryAnswer::Silence if is_open => asked.not_before = Some(now + UNANSWERED),
            QueryAnswer::Silence => again = true,
            QueryAnswer::NotAsked => asked.not_before = Some(now + UNASKED),
            QueryAnswer::Unassigned | QueryAnswer::Unknown | QueryAnswer::Active(_) => {
                asked.answers = true;
                asked.not_before = None;
            }
        }
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if binding.state != State::Released || binding.server != Some(server) {
            return;
        }
        if let Some(vigil) = binding.vigil.as_mut().filter(|_| again) {
            vigil.asked = false;
        }
        match answer {
            QueryAnswer::Silence => self.add("lease_queries_unanswered", 1),
            QueryAnswer::NotAsked | QueryAnswer::Unknown => {}
            QueryAnswer::Unassigned => {
                let reason = format!("{server} says that nobody has it");
                self.verified(key, reason, now);
            }
            QueryAnswer::Active(Some(mac)) if mac != binding.chaddr => {
                let reason = format!("{server} says that {mac} has it");
                self.verified(key, reason, now);
            }
            QueryAnswer::Active(_) => self.still_active(key, server, now),
        }
    }

    /// The server knows the lease as it was: once more, if nothing has changed here either.
    fn still_active(&mut self, key: Key, server: Ipv4Addr, now: Time) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if binding.outcome.replace(Outcome::Ignored) != Some(Outcome::Ignored) {
            self.add("releases_ignored", 1);
            self.save(key);
        }
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let Some(vigil) = binding.vigil.filter(|vigil| !vigil.closed) else {
            return;
        };
        if vigil.sent >= RELEASES {
            return;
        }
        // A binding that has ended is not told of its port's losses.
        let lost_at = self.ports.get(&binding.port).and_then(|port| port.lost_at);
        if let (Check::Watching(watching), Some(lost)) = (binding.check, lost_at)
            && lost >= watching.armed_at
            && let Some(binding) = self.bindings.get_mut(&key)
        {
            binding.doubt = binding.doubt.or(Some(Doubt::RecordsLost(lost)));
        }
        // It may not have a token: then it is as good as ignored. Every other gate must pass.
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let findings = self.case(binding).findings(now);
        let stop = findings.iter().find(|f| f.verdict != Verdict::Pass);
        let port = binding.port;
        // It may be behind what has come, or come back, since it was asked.
        let may_live = stop.map_or_else(|| self.is_stale(key, now), |it| it.gate == Gate::Dead);
        if may_live && self.ask_the_released(key, now) {
            return;
        }
        if let Some(stop) = stop {
            let reason = format!("no second RELEASE: {}: {}", stop.gate, stop.reason);
            self.tell(key, NoticeKind::Held, reason, now);
            return;
        }
        let why = format!("{server} still has it as active: once more ");
        self.order_release_because(key, &why, now);
        if self
            .bindings
            .get(&key)
            .is_some_and(|b| b.state == State::Releasing)
        {
            self.live += 1;
            if let Some(info) = self.ports.get_mut(&port) {
                info.bindings.insert(key);
            }
            self.add("releases_repeated", 1);
        }
    }

    /// It is asked again, and then the server is. `false`: no look could show what comes of it.
    fn ask_the_released(&mut self, key: Key, now: Time) -> bool {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return false;
        };
        let is_armed = matches!(binding.evidence.as_deref(), Some((_, seen)) if seen.armed);
        let (Check::Watching(watching), Some(vigil)) = (binding.check, &mut binding.vigil) else {
            return false;
        };
        if watching.anew || !is_armed {
            return false;
        }
        vigil.asked = false;
        let is_open = watching
            .probed_at
            .is_some_and(|at| now.since(at) < self.policy.probe_wait);
        if !is_open {
            self.ask_about(key, true, now);
        }
        true
    }
}
