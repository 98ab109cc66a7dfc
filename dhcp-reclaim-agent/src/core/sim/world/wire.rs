//! Frames: where they come in, and what of them is recorded.

use super::*;

impl World {
    pub(super) fn record(&mut self, node: usize, message: Message) {
        let message = Message {
            seen_at: self.clock(node),
            source_ip: on_wire(message.source_ip),
            ciaddr: message.ciaddr.map(on_wire),
            yiaddr: message.yiaddr.map(on_wire),
            requested_ip: message.requested_ip.map(on_wire),
            ..message
        };
        let delay = self.rng.micros(10, 2000);
        let ports = &mut self.nodes[node].ports;
        let heard = |port: &&mut PortTruth| port.watched && port.role != Role::Aside;
        let Some(port) = ports.get_mut(&message.port).filter(heard) else {
            return;
        };
        if port.lose > 0 && message.kind != MessageType::Discover {
            port.lose -= 1;
            port.lost += 1;
            let name = port.name.clone();
            self.say(about(&message), None, || {
                format!(
                    "node{node}: the record of a {:?} at {name} is lost",
                    message.kind
                )
            });
            return;
        }
        let now = self.now;
        let port = message.port;
        self.nodes[node]
            .pending
            .push((now, port, Event::Message(message)));
        self.at(delay, Ev::Drain(node));
    }

    /// A frame came in by a port of the node.
    pub(super) fn sight(&mut self, node: usize, port: IfIndex, mac: MacAddr, ip: Option<Ipv4Addr>) {
        let (now, stamp) = (self.now, self.clock(node));
        let state = &mut self.nodes[node];
        let Some(truth) = state.ports.get_mut(&port).filter(|port| port.watched) else {
            return;
        };
        truth.heard = Some(state.epoch);
        let exact = state
            .armed
            .values()
            .any(|(_, own, everywhere)| *everywhere || *own == Some(port));
        for source in [Some(Source::Mac(mac)), ip.map(Source::Ip)]
            .into_iter()
            .flatten()
        {
            state.last_frame.insert(source, (now, port));
            if exact && let Some(watch) = state.watch.get_mut(&source) {
                watch.note(port, mac, stamp);
            }
        }
    }

    pub(super) fn hear_uplink(&mut self, node: usize) {
        let uplink = self.nodes[node].uplink;
        self.sight(node, uplink, SERVER_MAC, Some(SERVER));
    }

    /// The switch between the nodes learns where the MAC is, and forgets nothing by itself.
    pub(super) fn passes_switch(&mut self, node: usize, mac: MacAddr) {
        if self.open(node) {
            self.switch.insert(mac, node);
        }
    }

    pub(super) fn crossing(&mut self, node: usize, mac: MacAddr, ip: Option<Ipv4Addr>) {
        self.passes_switch(node, mac);
        for other in 0..self.nodes.len() {
            if other != node && self.open(node) && self.hears(other) {
                let uplink = self.nodes[other].uplink;
                self.sight(other, uplink, mac, ip);
            }
        }
    }

    pub(super) fn frame_of(&mut self, vm: VmId, ip: Option<Ipv4Addr>, broadcast: bool) {
        let (node, mac) = (self.vms[vm].node, self.vms[vm].mac);
        let Some(port) = self.vms[vm].port else {
            return;
        };
        if self.nodes[node].ports.get(&port).is_some_and(|p| p.carrier) {
            self.sight(node, port, mac, ip);
            if broadcast {
                self.crossing(node, mac, ip);
            }
        }
    }

    pub(super) fn probe_leaves(&mut self, node: usize, probe: &Probe, lose: bool) {
        if !lose {
            let slow = self.rng.percent(3);
            let delay = self.rng.micros(100, if slow { 400_000 } else { 3000 });
            self.at(
                delay,
                Ev::ProbeArrives {
                    node,
                    probe: *probe,
                },
            );
        }
    }

    pub(super) fn probe_arrives(&mut self, node: usize, probe: &Probe) {
        for vm in 0..self.vms.len() {
            let it = &self.vms[vm];
            let reached = match probe.via {
                ProbeVia::Port(port) => it.node == node && it.port == Some(port),
                ProbeVia::Segment(_) => it.node == node || (self.open(node) && self.open(it.node)),
            };
            let to_it = match self.switch.get(&probe.mac) {
                // It came from there, so the switch does not send it back.
                Some(last) if *last == node && it.node != node => false,
                _ => probe.mac == it.mac || probe.mac == MacAddr::BROADCAST,
            };
            let answers = to_it && it.ip == Some(probe.ip) && it.answers_arp;
            let incarnation = it.incarnation;
            if !reached || !answers || !self.speaks(vm, incarnation) {
                continue;
            }
            let home = self.vms[vm].node;
            self.say(Some(probe.ip), Some(vm), || {
                format!("node{node}: vm{vm} answers the probe of {}", probe.ip)
            });
            self.frame_of(vm, Some(probe.ip), false);
            if home != node {
                let (mac, uplink) = (self.vms[vm].mac, self.nodes[node].uplink);
                self.passes_switch(home, mac);
                self.sight(node, uplink, mac, Some(probe.ip));
            }
        }
    }

    pub(super) fn reach_server(&mut self, node: usize) -> Time {
        let delay = self.rng.micros(1000, 5000);
        let at = (self.now + delay).max(self.nodes[node].sent_until);
        self.nodes[node].sent_until = at;
        at
    }

    pub(super) fn blank(&self, port: IfIndex, kind: MessageType) -> Message {
        Message {
            seen_at: self.now,
            port,
            role: Role::Vm,
            direction: Direction::FromPort,
            vlan: 0,
            kind,
            ambiguous: false,
            source_mac: MacAddr::default(),
            destination_mac: MacAddr::BROADCAST,
            source_ip: Ipv4Addr::UNSPECIFIED,
            destination_ip: Ipv4Addr::BROADCAST,
            xid: 0,
            chaddr: MacAddr::default(),
            ciaddr: None,
            yiaddr: None,
            giaddr: None,
            requested_ip: None,
            server_id: None,
            lease_secs: None,
            renewal_secs: None,
            rebinding_secs: None,
            client_id: None,
            rapid_commit: false,
        }
    }

    pub(super) fn request_message(&self, question: &Question, source_mac: MacAddr) -> Message {
        let (ciaddr, requested, server) = match question.ask {
            Ask::Selecting => (None, Some(question.ip), Some(SERVER)),
            Ask::InitReboot => (None, Some(question.ip), None),
            Ask::Renewing | Ask::Rebinding => (Some(question.ip), None, None),
            Ask::Rapid => (None, None, None),
        };
        let kind = match question.ask {
            Ask::Rapid => MessageType::Discover,
            Ask::Selecting | Ask::InitReboot | Ask::Renewing | Ask::Rebinding => {
                MessageType::Request
            }
        };
        Message {
            source_mac,
            destination_mac: if question.broadcast {
                MacAddr::BROADCAST
            } else {
                SERVER_MAC
            },
            source_ip: ciaddr.unwrap_or(Ipv4Addr::UNSPECIFIED),
            destination_ip: if question.broadcast {
                Ipv4Addr::BROADCAST
            } else {
                SERVER
            },
            xid: question.xid,
            chaddr: question.chaddr,
            ciaddr,
            requested_ip: requested,
            server_id: server,
            client_id: question.client_id.clone(),
            rapid_commit: kind == MessageType::Discover,
            vlan: vlan_of(question.ip),
            ..self.blank(question.port, kind)
        }
    }

    pub(super) fn request_frame(&mut self, question: Question, source_mac: MacAddr) {
        let node = question.node;
        let source_ip = match question.ask {
            Ask::Renewing | Ask::Rebinding => Some(question.ip),
            Ask::Selecting | Ask::InitReboot | Ask::Rapid => None,
        };
        self.sight(node, question.port, source_mac, source_ip);
        let message = self.request_message(&question, source_mac);
        if question.broadcast {
            self.crossing(node, source_mac, source_ip);
            for other in 0..self.nodes.len() {
                if other != node && self.open(node) && self.hears(other) {
                    let uplink = self.nodes[other].uplink;
                    let copy = Message {
                        port: uplink,
                        role: Role::Uplink,
                        ..message.clone()
                    };
                    self.record(other, copy);
                }
            }
        }
        self.record(node, message);
        self.passes_switch(node, source_mac);
        if self.open(node) {
            let at = self.reach_server(node);
            self.at_time(at, Ev::ServerHears(question));
        }
    }
}

/// The address that a message is about, by the world's name.
pub(super) fn about(message: &Message) -> Option<Ipv4Addr> {
    let ip = message.yiaddr.or(message.ciaddr).or(message.requested_ip)?;
    Some(off_wire(message.vlan, ip))
}
