//! What befalls the world: deaths, moves, cuts and forgeries, as the seed decides.

use super::*;

impl World {
    pub(super) fn die(&mut self, vm: VmId, how: Kind) {
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
        let state = &self.nodes[node];
        let (mac, port) = (self.vms[vm].mac, self.vms[vm].port);
        // As the store has it: an agent that is dead now will know it again.
        let stored = state.stored.get(&key_of(ip)).is_some_and(|saved| {
            saved.doubt.is_none() && saved.chaddr == mac && Some(saved.port) == port
        });
        let live = state.binding(ip).is_some_and(Binding::is_live);
        let known = stored && (state.down || live);
        let owned = self
            .leases
            .get(&ip)
            .is_some_and(|lease| lease.owner == owner);
        // The answer to its last words comes to nobody, and is taken for another's.
        let asking = self.now.since(self.vms[vm].asked_at) < secs(1);
        if known && owned && !had_still && !asking {
            let died = self.now;
            let bound = match how {
                Kind::KillKept => SLOW,
                _ => SOON,
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
                    bound,
                },
            );
        }
    }

    pub(super) fn port_gone(&mut self, node: usize, port: IfIndex, loss: PortLoss) {
        if let Some(truth) = self.nodes[node].unplugged.get_mut(&port) {
            // It is none of a bridge's at the moment: its agent is not told.
            truth.carrier = false;
            if loss != PortLoss::CarrierLost {
                self.nodes[node].unplugged.remove(&port);
            }
            return;
        }
        if self.asleep(node) {
            let at = self.nodes[node].asleep_until;
            self.at_time(at, Ev::PortGone(node, port, loss));
            return;
        }
        if !self.nodes[node].ports.contains_key(&port) {
            if loss == PortLoss::Deleted {
                // It had been detached.
                self.tell(node, Event::PortDown { port, loss });
            }
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

    pub(super) fn carrier_back(&mut self, node: usize, port: IfIndex) {
        if let Some(truth) = self.nodes[node].unplugged.get_mut(&port) {
            truth.carrier = true;
            return;
        }
        let Some(truth) = self.nodes[node].ports.get_mut(&port) else {
            return;
        };
        if truth.carrier {
            return;
        }
        truth.carrier = true;
        let (name, role) = (truth.name.clone(), truth.role);
        self.excuse(node, port);
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

    pub(super) fn calm(&self, vm: VmId) -> bool {
        let it = &self.vms[vm];
        self.now >= it.calm_until && self.now >= it.still_until && !self.asleep(it.node)
    }

    /// Nobody who was just moved depends on this node's uplink.
    pub(super) fn calm_node(&self, node: usize) -> bool {
        !self.asleep(node)
            && self
                .vms
                .iter()
                .all(|it| it.node != node || self.now >= it.calm_until)
    }

    pub(super) fn still(&mut self, vm: VmId, how: &str, duration: Duration) {
        self.vms[vm].still_until = self.now + duration;
        self.vms[vm].calm_until = self.now + duration + CALM;
        let ip = self.vms[vm].ip;
        self.say(ip, Some(vm), || format!("vm{vm} {how} for {duration:?}"));
    }

    /// Takes one of the world's decisions: what and whom comes from the seed and its number alone.
    pub(super) fn decide(&mut self, index: u32) {
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
            } else if self.dies_in_the_crowd(index) {
                kind = Kind::KillDeleted;
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
                    _ if alone && rng.percent(30) => {
                        self.port_gone(home, port, PortLoss::Detached);
                        let after = rng.micros(100, 500_000);
                        self.at(after, Ev::PortGone(home, port, PortLoss::Deleted));
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
                let duration = rng.millis(100, self.setup.longest_flap);
                self.still(vm, "has its carrier flap", duration);
                self.port_gone(home, port, PortLoss::CarrierLost);
                self.at(duration, Ev::CarrierBack(home, port));
            }
            Kind::Migrate if running && alone && self.calm(vm) => self.migrate(vm, &mut rng),
            Kind::GuestRelease if running && self.calm(vm) => self.guest_gives_up(vm, &mut rng),
            Kind::CutUplink | Kind::DetachUplink => {
                if !self.is_apart() || !self.calm_node(node) {
                    return;
                }
                let duration = rng.millis(500, 60_000);
                let detach = kind == Kind::DetachUplink;
                self.nodes[node].cut_since = self.now;
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
            Kind::FlapBridge => self.flap_bridge(node, &mut rng),
            Kind::Suspend if self.calm_node(node) => {
                let duration = rng.millis(1000, 60_000);
                let stands_still = rng.percent(50);
                self.nodes[node].asleep_until = self.now + duration;
                self.nodes[node].excused_until = self.now + duration + secs(1000);
                self.say(None, None, || {
                    let clock = if stands_still { ", and its clock" } else { "" };
                    format!("node{node} sleeps for {duration:?}{clock}")
                });
                if stands_still {
                    self.at(duration, Ev::Awake(node, duration));
                } else if duration > OVERSLEPT {
                    self.at(duration, Ev::Awake(node, Duration::ZERO));
                }
            }
            Kind::Forge if running => self.forge(vm, &mut rng),
            Kind::LoseRecords => {
                if let Some(port) = port
                    && let Some(truth) = self.nodes[home].ports.get_mut(&port)
                {
                    truth.lose = 1 + u32::try_from(rng.below(3)).unwrap_or(0);
                }
            }
            Kind::Restart if self.runs(node) => {
                let steps = u32::try_from(rng.below(30)).unwrap_or(0);
                let length = if rng.percent(70) {
                    rng.millis(20, 1000)
                } else {
                    rng.millis(1000, 60_000)
                };
                self.nodes[node].kill_in = Some((steps, length));
            }
            Kind::Hold if self.runs(node) && !self.nodes[node].paused => {
                let duration = rng.millis(1000, 300_000);
                self.hold(node, duration);
            }
            Kind::Ask if self.runs(node) => {
                let Some(ip) = self.vms[vm].memory.or(self.vms[vm].ip) else {
                    return;
                };
                self.question(node, ip, rng.percent(50));
            }
            Kind::Pause
            | Kind::Reboot
            | Kind::CarrierFlap
            | Kind::Migrate
            | Kind::GuestRelease
            | Kind::Suspend
            | Kind::Forge
            | Kind::Restart
            | Kind::Hold
            | Kind::Ask => {}
        }
    }

    /// Long after any cut: two within one hold-down could hide a VM from both sides in turn.
    fn is_apart(&self) -> bool {
        let shut = |node: &Node| node.shut_until() + secs(600);
        self.nodes.iter().all(|node| self.now >= shut(node))
    }

    /// Its bridge is deleted and made again by scripts, or only set down and up.
    fn flap_bridge(&mut self, node: usize, rng: &mut Rng) {
        // As for uplinks: nobody who has just moved depends on it.
        let elsewhere = self.nodes.len() > 1;
        if !self.is_apart() || self.asleep(node) || (elsewhere && !self.calm_node(node)) {
            return;
        }
        let duration = rng.millis(100, 30_000);
        let deleted = rng.percent(60);
        self.say(None, None, || {
            let how = if deleted { "deleted" } else { "set down" };
            format!("node{node}: its bridge is {how} for {duration:?}")
        });
        self.drain(node);
        let now = self.now;
        let state = &mut self.nodes[node];
        state.flat_until = now + duration;
        state.excused_until = now + duration + secs(1000);
        if !deleted {
            return;
        }
        state.links_changed = now;
        let ports: Vec<IfIndex> = state.ports.keys().copied().collect();
        for port in ports {
            self.check_lost(node, port);
            let state = &mut self.nodes[node];
            if let Some(truth) = state.ports.remove(&port) {
                state.unplugged.insert(port, truth);
            }
            if !state.down {
                state.dirty_ports.insert(port);
            }
            let loss = PortLoss::Detached;
            self.tell(node, Event::PortDown { port, loss });
        }
        let (segment, there) = (SEGMENT, false);
        self.tell(node, Event::Bridge { segment, there });
        self.at(duration, Ev::BridgeBack(node));
    }

    pub(super) fn bridge_back(&mut self, node: usize) {
        if self.asleep(node) {
            let at = self.nodes[node].asleep_until;
            self.at_time(at, Ev::BridgeBack(node));
            return;
        }
        self.say(None, None, || format!("node{node}: its bridge is back"));
        self.nodes[node].links_changed = self.now;
        let (segment, there) = (SEGMENT, true);
        self.tell(node, Event::Bridge { segment, there });
        for (port, truth) in std::mem::take(&mut self.nodes[node].unplugged) {
            // Its slot is another one, which counts from zero.
            let truth = PortTruth {
                watched: false,
                made_at: self.now,
                back_at: Some(self.now),
                heard: None,
                lost: 0,
                ..truth
            };
            self.nodes[node].lost_told.remove(&port);
            self.nodes[node].ports.insert(port, truth);
            let delay = self.rng.millis(5, 60);
            self.at(delay, Ev::Watch(node, port));
        }
    }

    /// The node goes on; leases went on meanwhile.
    pub(super) fn awake(&mut self, node: usize, suspended: Duration) {
        let slept_at = self.clock(node).since(Time::ZERO).saturating_sub(suspended);
        let state = &mut self.nodes[node];
        if !suspended.is_zero() {
            state.suspended.push((Time::ZERO + slept_at, suspended));
        }
        if !state.down {
            state.suspended_told = state.stood_still();
        }
        self.tell(node, Event::Overslept { suspended });
    }

    pub(super) fn migrate(&mut self, vm: VmId, rng: &mut Rng) {
        let home = self.vms[vm].node;
        let target = (home + 1) % self.nodes.len();
        let Some(old) = self.vms[vm].port else { return };
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

    pub(super) fn guest_gives_up(&mut self, vm: VmId, rng: &mut Rng) {
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
            vlan: vlan_of(ip),
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
    pub(super) fn forge(&mut self, attacker: VmId, rng: &mut Rng) {
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
            node.excused.insert(ip, self.now + secs(1000));
        }
        let what = rng.below(5);
        // No lease of it was heard where it is: by its port, or since it is there.
        let unheard = !self.nodes[node].engine.bindings().any(|binding| {
            let own = binding.key == key_of(ip) && binding.chaddr == mac;
            own && Some(binding.port) == self.vms[victim].port
        });
        if what == 0 && (self.vms[victim].node != node || unheard) {
            // Whoever may use such a MAC can send the RELEASE himself.
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
                    vlan: vlan_of(ip),
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
                let stolen = address(
                    vlan_of(ip),
                    1 + u8::try_from(rng.below(POOL.into())).unwrap_or(0),
                );
                for node in &mut self.nodes {
                    node.excused.insert(stolen, self.now + secs(1000));
                }
                let message = Message {
                    vlan: vlan_of(ip),
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
