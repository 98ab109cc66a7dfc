//! A node: its engine, and what an agent does around it.

use super::*;
use crate::core::types::{EPOCH_ASKING, LATE};

/// Questions to servers, and behind how many RELEASEs of this turn each belongs.
type Soundings = VecDeque<(usize, Sounding)>;

impl World {
    pub(super) fn plan_wake(&mut self, node: usize) {
        if self.nodes[node].down {
            return;
        }
        let Some(at) = self.nodes[node].engine.poll_timeout() else {
            return;
        };
        let at = at + self.nodes[node].stood_still();
        let at = at.max(self.turn_at(node)).max(self.now);
        if self.nodes[node].wake.is_none_or(|planned| at < planned) {
            self.nodes[node].wake = Some(at);
            self.at_time(at, Ev::Wake(node));
        }
    }

    pub(super) fn wake(&mut self, node: usize) {
        if self.nodes[node].wake.is_some_and(|at| at <= self.now) {
            self.nodes[node].wake = None;
        }
        if !self.runs(node) {
            return;
        }
        self.drain(node);
        if self.runs(node) {
            let now = self.clock(node);
            self.nodes[node].engine.handle_timeout(now);
            self.carry_out(node);
        }
    }

    /// Its agent can act.
    pub(super) fn runs(&self, node: usize) -> bool {
        !self.nodes[node].down && self.now >= self.turn_at(node)
    }

    pub(super) fn tell(&mut self, node: usize, event: Event) {
        if self.nodes[node].down {
            return;
        }
        let now = self.clock(node);
        self.nodes[node].engine.handle(event, now);
        self.carry_out(node);
    }

    /// The ring, to its end. A record is let go once what came of it is stored.
    pub(super) fn drain(&mut self, node: usize) {
        if self.nodes[node].down {
            return;
        }
        if self.now < self.turn_at(node) {
            let at = self.turn_at(node);
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
            let count = pending.len();
            self.nodes[node].read.extend(pending);
            let first = self.nodes[node].read.len() - count;
            for index in first..first + count {
                let event = self.nodes[node].read[index].2.clone();
                self.learn(node, &event);
                self.tell(node, event);
                if self.nodes[node].down {
                    return;
                }
            }
            self.commit(node);
        }
    }

    pub(super) fn check_lost(&mut self, node: usize, port: IfIndex) {
        let state = &mut self.nodes[node];
        let Some(truth) = state.ports.get(&port).filter(|_| !state.down) else {
            return;
        };
        let told = state.lost_told.entry(port).or_default();
        let count = truth.lost - *told;
        *told = truth.lost;
        if count > 0 {
            state.lost_at.insert(port, self.now);
            state.dirty_ports.insert(port);
            self.excuse(node, port);
            self.tell(node, Event::RecordsLost { port, count });
        }
    }

    /// What happened at a port puts the release of its addresses off.
    pub(super) fn excuse(&mut self, node: usize, port: IfIndex) {
        let state = &mut self.nodes[node];
        let known = state.engine.bindings().map(|it| (it.key, it.port));
        // An agent that has just started may not know them yet.
        let stored = state.stored.iter().map(|(key, saved)| (*key, saved.port));
        let there: Vec<Key> = known
            .chain(stored)
            .filter_map(|(key, at)| (at == port).then_some(key))
            .collect();
        for key in there {
            let until = self.now + secs(1000);
            state.excused.insert(ip_of(key), until);
        }
    }

    /// A port comes into being; its programs take a moment.
    pub(super) fn new_port(&mut self, node: usize, role: Role, name: String) -> IfIndex {
        let ifindex = self.next_port;
        self.next_port += 1;
        let truth = PortTruth {
            name,
            role,
            carrier: true,
            watched: false,
            made_at: self.now,
            back_at: None,
            heard: None,
            lose: 0,
            lost: 0,
        };
        self.nodes[node].ports.insert(ifindex, truth);
        let delay = if self.rng.percent(self.setup.late) {
            // Many ports came at once, or the loop waited for its disk: nothing else is done until then.
            let delay = self.rng.millis(1000, 4000);
            let state = &mut self.nodes[node];
            state.busy_until = state.busy_until.max(self.now + delay);
            delay
        } else {
            self.rng.millis(5, 60)
        };
        self.at(delay, Ev::Watch(node, ifindex));
        ifindex
    }

    pub(super) fn watch_port(&mut self, node: usize, ifindex: IfIndex) {
        if self.nodes[node].down {
            // The next agent finds it.
            return;
        }
        if self.now < self.turn_at(node) {
            let at = self.turn_at(node);
            self.at_time(at, Ev::Watch(node, ifindex));
            return;
        }
        let Some(truth) = self.nodes[node].ports.get_mut(&ifindex) else {
            return;
        };
        truth.watched = true;
        let port = truth.port(ifindex);
        let (dark, made_at) = (!truth.carrier, truth.made_at);
        self.drain(node);
        self.nodes[node].dirty_ports.insert(ifindex);
        let segment = port.segment;
        self.tell(node, Event::PortUp(port));
        if self.now.since(made_at) > LATE {
            let here = self.vms.iter().filter(|vm| vm.port == Some(ifindex));
            let macs = here.map(|vm| vm.mac).collect();
            self.tell(node, Event::Unheard { segment, macs });
        }
        if dark {
            let loss = PortLoss::CarrierLost;
            self.tell(
                node,
                Event::PortDown {
                    port: ifindex,
                    loss,
                },
            );
        }
    }

    /// One step of the agent's; `true`: it was killed before it.
    fn killed(&mut self, node: usize) -> bool {
        let Some((steps, length)) = self.nodes[node].kill_in else {
            return false;
        };
        if steps > 0 {
            self.nodes[node].kill_in = Some((steps - 1, length));
            return false;
        }
        self.kill(node, length);
        true
    }

    fn kill(&mut self, node: usize, length: Duration) {
        self.say(None, None, || format!("node{node}: its agent is killed"));
        let state = &mut self.nodes[node];
        state.kill_in = None;
        state.down = true;
        state.wake = None;
        state.dirty.clear();
        state.dirty_transactions.clear();
        state.dirty_alarms.clear();
        state.dirty_ports.clear();
        // What it had read and not yet let go is still in the ring.
        let newer = std::mem::take(&mut state.pending);
        state.pending = std::mem::take(&mut state.read);
        state.pending.extend(newer);
        self.at(length, Ev::Start(node));
    }

    /// Writes what changed, and lets the ring go.
    pub(super) fn commit(&mut self, node: usize) {
        let state = &mut self.nodes[node];
        if state.down {
            return;
        }
        for key in std::mem::take(&mut state.dirty) {
            state.stored_suspended.insert(key, state.suspended_told);
            match state.engine.saved(key) {
                Some(saved) => state.stored.insert(key, saved),
                None => state.stored.remove(&key),
            };
        }
        for id in std::mem::take(&mut state.dirty_transactions) {
            match state.engine.saved_transaction(id) {
                Some(saved) => state.stored_transactions.insert(id, saved),
                None => state.stored_transactions.remove(&id),
            };
        }
        for id in std::mem::take(&mut state.dirty_alarms) {
            match state.engine.saved_alarm(id) {
                Some(saved) => state.stored_alarms.insert(id, saved),
                None => state.stored_alarms.remove(&id),
            };
        }
        for ifindex in std::mem::take(&mut state.dirty_ports) {
            let lost = state.lost_told.get(&ifindex).copied().unwrap_or(0);
            match state.ports.get(&ifindex) {
                Some(truth) => state
                    .stored_ports
                    .insert(ifindex, (truth.port(ifindex), lost)),
                None => state.stored_ports.remove(&ifindex),
            };
        }
        state.read.clear();
        let open = |key: &Key| {
            let stored = state.stored.get(key);
            stored.is_some_and(|saved| saved.state == State::Releasing)
        };
        state.orders.retain(|key, _| open(key));
    }

    /// The next agent, as `agent::memory` does it.
    pub(super) fn start(&mut self, node: usize) {
        if self.now < self.turn_at(node) {
            let at = self.turn_at(node);
            self.at_time(at, Ev::Start(node));
            return;
        }
        self.say(None, None, || format!("node{node}: its agent starts anew"));
        self.stats.restarts += 1;
        let now = self.clock(node);
        let started_at = self.now;
        let state = &mut self.nodes[node];
        state.down = false;
        state.suspended_told = state.stood_still();
        state.engine = Engine::new(self.setup.policy.clone(), now);
        state.armed.clear();
        state.watch.clear();
        state.started_at = started_at;
        state.epoch = now;
        state.wake = None;
        state.lost_told = state
            .stored_ports
            .iter()
            .map(|(ifindex, (_, lost))| {
                let total = state.ports.get(ifindex).map_or(0, |truth| truth.lost);
                (*ifindex, total.min(*lost))
            })
            .collect();
        let present: Vec<IfIndex> = state.ports.keys().copied().collect();
        let gone: Vec<Port> = state
            .stored_ports
            .iter()
            .filter(|(ifindex, _)| !state.ports.contains_key(ifindex))
            .map(|(_, (port, _))| port.clone())
            .collect();
        for ifindex in &present {
            let state = &mut self.nodes[node];
            state.dirty_ports.insert(*ifindex);
            let Some(truth) = state.ports.get_mut(ifindex) else {
                continue;
            };
            truth.watched = true;
            let (port, dark) = (truth.port(*ifindex), !truth.carrier);
            self.tell(node, Event::PortUp(port));
            if dark {
                let (port, loss) = (*ifindex, PortLoss::CarrierLost);
                self.tell(node, Event::PortDown { port, loss });
            }
        }
        for port in &gone {
            self.tell(node, Event::PortUp(port.clone()));
        }
        if !self.nodes[node].unplugged.is_empty() {
            let (segment, there) = (SEGMENT, false);
            self.tell(node, Event::Bridge { segment, there });
        }
        let state = &mut self.nodes[node];
        for (key, (silent_since, outcome)) in std::mem::take(&mut state.orders) {
            if let Some(saved) = state.stored.get_mut(&key) {
                saved.settle(outcome, silent_since, now);
            }
        }
        let transactions = state.stored_transactions.values().cloned().collect();
        let bindings = state.remembered();
        let alarms = state.stored_alarms.values().cloned().collect();
        if state.paused {
            state.engine.restore_pause("by the seed".to_owned());
        }
        state.engine.restore_transactions(transactions, now);
        state.engine.restore_alarms(alarms);
        state.engine.restore(bindings, now);
        self.carry_out(node);
        for ifindex in present {
            self.check_lost(node, ifindex);
        }
        self.drain(node);
        for port in gone {
            // That there was one, the next one is to know too.
            let is_uplink = port.role == Role::Uplink;
            let (port, loss) = (port.ifindex, PortLoss::Unseen);
            self.tell(node, Event::PortDown { port, loss });
            if !self.nodes[node].down && !is_uplink {
                self.nodes[node].dirty_ports.insert(port);
            }
        }
    }

    /// A person asks what is with an address, or for its release: nothing that any gate holds.
    pub(super) fn question(&mut self, node: usize, ip: Ipv4Addr, release: bool) {
        let (now, key) = (self.clock(node), key_of(ip));
        self.say(Some(ip), None, || {
            let what = if release { "the release of " } else { "" };
            format!("node{node}: somebody asks for {what}{ip}")
        });
        let engine = &mut self.nodes[node].engine;
        let asked = if release {
            let gates = BTreeSet::new();
            let who = "the seed".to_owned();
            engine.ask_release(key, Override { who, gates }, now)
        } else {
            engine.ask(key, now)
        };
        self.stats.questions += u64::from(asked.is_ok());
        self.carry_out(node);
    }

    /// A person holds the node's releases, and ends that later.
    pub(super) fn hold(&mut self, node: usize, duration: Duration) {
        self.say(None, None, || {
            format!("node{node} is paused for {duration:?}")
        });
        let now = self.clock(node);
        let state = &mut self.nodes[node];
        state.paused = true;
        state.engine.pause("by the seed".to_owned(), now);
        self.carry_out(node);
        self.at(duration, Ev::Resume(node));
    }

    pub(super) fn resume(&mut self, node: usize) {
        if !self.runs(node) {
            self.at(secs(1), Ev::Resume(node));
            return;
        }
        self.say(None, None, || format!("node{node} is resumed"));
        let (now, resumed_at) = (self.clock(node), self.now);
        let state = &mut self.nodes[node];
        state.paused = false;
        state.resumed_at = resumed_at;
        state.engine.resume("the seed", now);
        self.carry_out(node);
    }

    /// Until there is nothing more to do, or it is killed.
    pub(super) fn carry_out(&mut self, node: usize) {
        loop {
            let (intents, mut soundings) = self.carry_out_all(node);
            if intents.is_empty() && soundings.is_empty() {
                return;
            }
            for (key, release) in &intents {
                let order = (release.silent_since, ReleaseOutcome::Failed);
                self.nodes[node].orders.insert(*key, order);
            }
            if self.killed(node) {
                return;
            }
            // Before the first of the frames, so that no crash makes one leave twice.
            self.commit(node);
            for (at, (key, release)) in intents.into_iter().enumerate() {
                if self.killed(node) {
                    return;
                }
                self.sound(node, &mut soundings, at);
                let outcome = self.emit(node, &release);
                let order = (release.silent_since, outcome);
                self.nodes[node].orders.insert(key, order);
                if self.killed(node) {
                    return;
                }
                let now = self.clock(node);
                self.nodes[node]
                    .engine
                    .handle(Event::Released { key, outcome }, now);
            }
            self.sound(node, &mut soundings, usize::MAX);
        }
    }

    /// Asks the server behind the first `sent` RELEASEs. Some questions, or answers, get lost.
    fn sound(&mut self, node: usize, soundings: &mut Soundings, sent: usize) {
        while let Some((_, sounding)) = soundings.pop_front_if(|(at, _)| *at <= sent) {
            if !self.open(node) || self.rng.percent(self.setup.unread) {
                continue;
            }
            let state = &self.nodes[node];
            let counted = state.releases_read + state.releases.len();
            let started_at = state.started_at;
            let delay = self.rng.micros(1000, 50_000);
            let at = (self.now + delay).max(state.sent_until);
            self.at_time(
                at,
                Ev::Sounded {
                    node,
                    started_at,
                    sounding,
                    counted,
                },
            );
        }
    }

    fn carry_out_all(&mut self, node: usize) -> (Vec<(Key, Release)>, Soundings) {
        let mut intents = Vec::new();
        let mut soundings = VecDeque::new();
        while !self.nodes[node].down
            && let Some(action) = self.nodes[node].engine.poll_action()
        {
            if self.killed(node) {
                return (Vec::new(), VecDeque::new());
            }
            let answer = match action {
                Action::Arm {
                    key,
                    mac,
                    own_port,
                    everywhere,
                } => {
                    self.mix(1);
                    let now = self.clock(node);
                    let state = &mut self.nodes[node];
                    state.armed.insert(key, (mac, own_port, everywhere));
                    state.watch.entry(Source::Ip(ip_of(key))).or_default();
                    state.watch.entry(Source::Mac(mac)).or_default();
                    if everywhere {
                        state.epoch = now;
                    }
                    continue;
                }
                Action::Disarm { key, mac } => {
                    let state = &mut self.nodes[node];
                    state.armed.remove(&key);
                    state.watch.remove(&Source::Ip(ip_of(key)));
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
                        let ip = off_wire(probe.vlan, probe.ip);
                        self.probe_leaves(node, &Probe { ip, ..probe }, false);
                    }
                    continue;
                }
                Action::Release { key, release } => {
                    self.mix(5);
                    intents.push((key, release));
                    continue;
                }
                Action::Sound(sounding) => {
                    self.mix(7);
                    soundings.push_back((intents.len(), sounding));
                    continue;
                }
                Action::Query { key, query } if self.setup.queries => {
                    let delay = self.rng.micros(1000, 8000);
                    let at = self.now + delay;
                    self.at_time(at, Ev::QueryAnswered(node, key, query.server));
                    continue;
                }
                Action::Query { key, query } => Event::Queried {
                    key,
                    server: query.server,
                    answer: QueryAnswer::Silence,
                },
                Action::Save { key } => {
                    self.nodes[node].dirty.insert(key);
                    continue;
                }
                Action::SaveTransaction { id } => {
                    self.nodes[node].dirty_transactions.insert(id);
                    continue;
                }
                Action::SaveAlarm { id } => {
                    self.nodes[node].dirty_alarms.insert(id);
                    continue;
                }
                Action::Answer { key, answer } => {
                    self.say(Some(ip_of(key)), None, || format!("the answer: {answer:?}"));
                    self.stats.answers += 1;
                    continue;
                }
                Action::Notify(notice) => {
                    self.mix(6 + notice.event as u64);
                    self.stats.moved += u64::from(notice.event == NoticeKind::Moved);
                    self.stats.repeated += u64::from(notice.reason.contains("once more"));
                    self.stats.alarms += u64::from(notice.event == NoticeKind::ReleasedAlive);
                    if let (NoticeKind::Conflict, Some(mac), Some(ip)) =
                        (notice.event, notice.mac, notice.ip)
                    {
                        self.nodes[node].conflicts.insert((mac, ip), self.now);
                    }
                    let vlan = self
                        .vms
                        .iter()
                        .find(|vm| Some(vm.mac) == notice.mac)
                        .map_or(0, |vm| vm.vlan);
                    let ip = notice.ip.map(|ip| off_wire(vlan, ip));
                    self.say(ip, None, || {
                        format!(
                            "node{node}: {:?} {} ({}): {}",
                            notice.event,
                            ip.map(|ip| ip.to_string()).unwrap_or_default(),
                            notice.port.as_deref().unwrap_or("-"),
                            notice.reason
                        )
                    });
                    continue;
                }
            };
            let now = self.clock(node);
            self.nodes[node].engine.handle(answer, now);
        }
        (intents, soundings)
    }

    pub(super) fn look(
        &mut self,
        node: usize,
        key: Key,
        mac: MacAddr,
        own: Option<IfIndex>,
    ) -> Evidence {
        let state = &mut self.nodes[node];
        let ip = state.watch.get(&Source::Ip(ip_of(key))).copied();
        let mac = state.watch.get(&Source::Mac(mac)).copied();
        let port = own.unwrap_or(0);
        let both = [ip, mac];
        let heard = |port: IfIndex| state.ports.get(&port).and_then(|truth| truth.heard);
        let evidence = Evidence {
            address: ip.and_then(|watch| watch.last),
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

    pub(super) fn probe(&mut self, node: usize, key: Key, probe: &Probe) -> bool {
        let sent = match probe.via {
            ProbeVia::Port(port) => self.nodes[node]
                .ports
                .get(&port)
                .is_some_and(|truth| truth.carrier),
            ProbeVia::Segment(_) => {
                let now = self.clock(node);
                let state = &mut self.nodes[node];
                if now.since(state.epoch) > EPOCH_ASKING {
                    state.epoch = now;
                }
                self.now >= self.nodes[node].flat_until
            }
        };
        if !sent || self.rng.percent(self.setup.probe_fail) {
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
        let ip = ip_of(key);
        self.say(Some(ip), None, || {
            let lost = if lose { ", lost on its way" } else { "" };
            format!("node{node}: probe {ip} via {:?}{lost}", probe.via)
        });
        self.probe_leaves(node, &Probe { ip, ..*probe }, lose);
        true
    }

    pub(super) fn emit(&mut self, node: usize, release: &Release) -> ReleaseOutcome {
        let silent_since = release.silent_since;
        let release = &Release {
            ip: off_wire(release.vlan, release.ip),
            silent_since: self.world_time(node, silent_since),
            ..release.clone()
        };
        if self.setup.wakes_at_emit > 0 && self.rng.percent(self.setup.wakes_at_emit) {
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
        let vetoed = latest.is_none_or(|times| times.iter().any(|at| *at > silent_since));
        if vetoed && !self.setup.policy.without.contains(&Gate::Kernel) {
            self.stats.vetoes += 1;
            let known = state.reported.get(&key_of(release.ip)).copied();
            if known.is_some_and(|at| at > silent_since) {
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
        let id = (release.chaddr, release.ip);
        let repeated = self.nodes[node].given_back.contains(&id);
        self.judge(node, release);
        self.count(node, release.ip, repeated);
        if self.open(node) && !self.rng.percent(self.setup.release_loss) {
            let delay = self.rng.micros(1000, 5000);
            let at = (self.now + delay).max(self.nodes[node].sent_until);
            self.nodes[node].sent_until = at;
            self.at_time(at, Ev::ReleaseArrives(release.clone(), node));
        }
        ReleaseOutcome::Sent
    }
}
