//! Whether a VM is alive: who is looked at when, by what, and what that shows.

use std::time::Duration;

use super::{Engine, RETRY, TRANSACTION, holds};
use crate::core::{
    binding::{Binding, Check, Doubt, Origin, Watching},
    gates::{Gate, secs},
    policy::Commit,
    types::{
        Action, Evidence, IfIndex, Key, MacAddr, NoticeKind, PortLoss, Probe, ProbeVia, Role,
        State, Time,
    },
};

/// A probe into the segment counts if the uplink was heard after it; the slot tells only in which
/// epoch of a second that was.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// Quiet VMs are looked at at multiples of this, in nanoseconds.
const TOGETHER: u64 = 50_000_000;

impl Engine {
    pub(super) fn wake(&mut self, key: Key, now: Time) {
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

    pub(super) fn evidence(&mut self, key: Key, evidence: Evidence, now: Time) {
        if !self.bindings.contains_key(&key) && self.import_seen(key, evidence, now) {
            return;
        }
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if !binding.is_live() {
            self.looked_after(key, evidence, now);
            return;
        }
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
            Check::Watching(watching) if watching.anew => {
                let latest = evidence.own_at.max(evidence.address_at);
                let latest = latest.max(evidence.elsewhere.map(|(at, _)| at));
                if latest.is_some_and(|at| at >= watching.armed_at) {
                    self.watched(key, watching, evidence, now);
                }
                // It is at rest by now, or elsewhere; or it was not seen.
                match self.bindings.get(&key).map(|binding| binding.check) {
                    Some(Check::Watching(it)) if it.anew => self.begin_anew(key, it, now),
                    _ => {}
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

    pub(super) fn look_and_probe(&mut self, key: Key, now: Time) {
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
            self.begin_anew(key, watching, now);
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
                all_asked: [None; 2],
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

    /// A sign of life by its own port.
    pub(super) fn alive(&mut self, key: Key, at: Time, how: &str, now: Time) {
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
            self.conflict(key, format!("seen behind {name} too"), now);
            self.begin_anew(key, watching, now);
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
        let due = watching
            .probed_at
            .map_or(now, |at| at + self.dead_again(key, at));
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
                    // Everybody: the way may have been cut while the others were asked.
                    Some(last) if last <= now => self.ask_about(key, true, now),
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
    pub(super) fn round(&self, key: Key) -> Duration {
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

    /// When to ask whoever seems dead again, after the latest probe: soon, if it went to fewer ports than
    /// there are by now.
    pub(super) fn dead_again(&self, key: Key, probed_at: Time) -> Duration {
        let round = self.round(key);
        let watched_at = self.segments.get(&key.segment).map(|it| it.watched_at);
        if watched_at.is_some_and(|at| probed_at <= at) {
            return round.min(self.policy.probe_wait);
        }
        round
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

    pub(super) fn send_probes(&mut self, key: Key, now: Time) {
        let probes = self.bindings.get(&key).and_then(|it| match it.check {
            Check::Watching(watching) => Some(watching.probes),
            Check::Idle | Check::Glancing => None,
        });
        let everybody = probes.is_some_and(|probes| probes < self.policy.misses);
        self.ask_about(key, everybody, now);
    }

    /// `everybody`: whoever has the address, too, wherever that may be.
    pub(super) fn ask_about(&mut self, key: Key, everybody: bool, now: Time) {
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
        if watching.everywhere && ask_all && everybody {
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
        if let Some(binding) = self.bindings.get_mut(&key)
            && let Check::Watching(watching) = &mut binding.check
        {
            watching.asking_all |= watching.everywhere && ask_all && everybody;
        }
        // If no answer of the shell's comes back, the round still ends.
        self.schedule(key, now + self.round(key));
    }

    pub(super) fn probed(&mut self, key: Key, sent: bool, now: Time) {
        let round = self.round(key);
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let answered_within = self.case(binding).probe_wait();
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        let is_gone = binding.state == State::Gone;
        let Check::Watching(watching) = &mut binding.check else {
            return;
        };
        let is_of_all = std::mem::take(&mut watching.asking_all);
        if !sent {
            self.add("probes_failed", 1);
            // Nothing else may be waited for by then.
            let again = match is_gone && is_of_all {
                true => round.min(self.policy.probe_wait),
                false => round,
            };
            self.schedule(key, now + again);
            return;
        }
        watching.probed_at = Some(now);
        if is_of_all {
            let [_, last] = watching.all_asked;
            // Two at once are one.
            let is_another = last.is_some_and(|at| now.since(at) >= answered_within);
            let before = if is_another {
                last
            } else {
                watching.all_asked[0]
            };
            watching.all_asked = [before, Some(now)];
        }
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

    pub(super) fn begin_watch(
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
            all_asked: [None; 2],
            asking_all: false,
            everywhere,
            deaf: false,
            closing: false,
            anew: false,
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

    fn set_check(&mut self, key: Key, check: Check) {
        if let Some(binding) = self.bindings.get_mut(&key) {
            binding.check = check;
        }
    }

    /// Something new was said about a binding whose death is being looked into: silence begins anew, and
    /// what was seen until now is not forgotten unseen.
    pub(super) fn restart_hold(&mut self, key: Key, now: Time) {
        let Some(binding) = self
            .bindings
            .get_mut(&key)
            .filter(|binding| binding.state != State::Releasing)
        else {
            return;
        };
        let Check::Watching(watching) = &mut binding.check else {
            return;
        };
        watching.anew = true;
        let own_port = Some(binding.port).filter(|_| watching.lost.is_none());
        let mac = binding.chaddr;
        self.actions.push_back(Action::Look { key, mac, own_port });
        self.schedule(key, now + RETRY);
    }

    fn begin_anew(&mut self, key: Key, watching: Watching, now: Time) {
        let lost = watching.lost.map(|(_, loss)| (now, loss));
        self.begin_watch(key, lost, watching.everywhere, now);
        if watching.deaf
            && let Some(Check::Watching(anew)) = self.bindings.get(&key).map(|b| b.check)
        {
            self.set_check(key, Check::Watching(Watching { deaf: true, ..anew }));
        }
        self.send_probes(key, now);
    }

    /// How long a quiet VM is left alone: as long as it takes to look at all others.
    pub(super) fn silence(&self) -> Duration {
        let live = u32::try_from(self.live).unwrap_or(u32::MAX);
        // They are looked at after three quarters of it, in the mean (see `early`).
        let round = Duration::from_secs(1) * live * 4 / 3 / self.policy.probe_rate.max(1);
        self.policy.silence.max(round)
    }

    /// It is in doubt, and nothing but a look can end that: once its VM is dead, nothing does. One that
    /// was just seen is left alone, or a neighbour could have it asked without end.
    pub(super) fn look_soon(&mut self, key: Key, now: Time) {
        let soon = now + self.policy.probe_wait;
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let is_idle = binding.is_live() && binding.check == Check::Idle;
        let seen_at = binding.last_seen.unwrap_or(Time::ZERO);
        let is_long_ago = now.since(seen_at) >= self.policy.probe_interval;
        if is_idle && is_long_ago {
            let due = binding.due.map_or(soon, |due| due.min(soon));
            self.schedule(key, due);
        }
    }

    /// Nothing is in doubt: take the watch away, and look again after `silence`; or soon, at what was
    /// last seen while nobody listened.
    pub(super) fn rest(&mut self, key: Key, now: Time) {
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
            let together = due.as_nanos().checked_next_multiple_of(TOGETHER);
            Time::from_nanos(together.unwrap_or(u64::MAX))
        };
        let end = binding
            .expires
            .into_iter()
            .chain(binding.tentative_until)
            .min();
        self.schedule(key, end.map_or(due, |end| end.min(due)));
    }
}

/// By how much less than the longest a quiet address is asked sooner, so that those that came together
/// are not asked together, for ever.
fn early(key: Key, seen: Time, longest: Duration) -> Duration {
    // Fibonacci hashing: neighbours are as far from one another as they can be.
    let mixed = (u64::from(key.ip.to_bits()) ^ seen.as_nanos()).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let share = u32::try_from(mixed >> 54).unwrap_or(0);
    longest * share / 1024
}
