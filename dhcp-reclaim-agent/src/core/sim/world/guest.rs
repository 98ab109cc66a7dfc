//! VMs: their boots, their DHCP clients, their talk.

use super::*;

impl World {
    /// It runs, in the life that is meant.
    pub(super) fn speaks(&self, vm: VmId, incarnation: u32) -> bool {
        let it = &self.vms[vm];
        it.life != Life::Off
            && it.incarnation == incarnation
            && self.now >= it.still_until
            && !self.asleep(it.node)
            && it
                .port
                .and_then(|port| self.nodes[it.node].ports.get(&port))
                .is_some_and(|port| {
                    // What is said in the moment before a port that is back is watched may end a lease
                    // sooner than is known: docs/safety.md has it among what is not defended.
                    let back = port.back_at.map(|at| at + Duration::from_millis(100));
                    port.carrier && back.is_none_or(|at| self.now >= at)
                })
    }

    /// If it is only still for now, when it is to be asked again.
    pub(super) fn later(&self, vm: VmId, incarnation: u32) -> Option<Time> {
        let it = &self.vms[vm];
        (it.life != Life::Off && it.incarnation == incarnation && !self.speaks(vm, incarnation))
            .then(|| {
                it.still_until
                    .max(self.nodes[it.node].asleep_until)
                    .max(self.now)
                    + Duration::from_millis(200)
            })
    }

    pub(super) fn boot(&mut self, vm: VmId, remembers: bool) {
        if self.vms[vm].life != Life::Off {
            return;
        }
        let mut node = self.rng.below(self.nodes.len() as u64) as usize;
        let again = self.vms[vm].incarnation > 0;
        if self.setup.evacuated && again {
            node = self.nodes.len() - 1;
        }
        if !self.vms[vm].answers_arp && again {
            // What answers no probe is looked for in vain elsewhere: it starts where it was.
            node = self.vms[vm].node;
        }
        if self.asleep(node) || !self.nodes[node].unplugged.is_empty() {
            return;
        }
        // Some share a port: nested VMs, containers.
        let shared = (self.rng.percent(self.setup.shared_ports))
            .then(|| {
                self.vms
                    .iter()
                    .find(|it| it.life != Life::Off && it.node == node)
                    .and_then(|it| it.port)
            })
            .flatten()
            .filter(|port| self.nodes[node].ports.get(port).is_some_and(|p| p.carrier));
        self.vms[vm].incarnation += 1;
        self.vms[vm].life = Life::Asking;
        let incarnation = self.vms[vm].incarnation;
        self.stats.lives += 1;
        let port = match shared {
            Some(port) => port,
            None => {
                // Where no DHCP is heard is as far as another node.
                let findable = self.vms[vm].answers_arp || incarnation == 1;
                let aside = self.rng.percent(self.setup.aside) && findable;
                let role = if aside { Role::Aside } else { Role::Vm };
                self.new_port(node, role, format!("tap-vm{vm}.{incarnation}"))
            }
        };
        let delay = self.rng.millis(100, 3000);
        let it = &mut self.vms[vm];
        it.node = node;
        it.port = Some(port);
        it.still_until = self.now;
        it.calm_until = self.now + CALM;
        it.ip = None;
        it.exchange += 1;
        if !remembers {
            it.memory = None;
        }
        let exchange = it.exchange;
        self.say(None, Some(vm), || {
            format!("vm{vm} boots on node{node}, port {port}")
        });
        self.at(delay, Ev::Dhcp(vm, incarnation, exchange, remembers));
    }

    /// One attempt at an address.
    pub(super) fn ask(&mut self, vm: VmId, incarnation: u32, exchange: u32, known: bool) {
        if let Some(at) = self.later(vm, incarnation) {
            self.at_time(at, Ev::Dhcp(vm, incarnation, exchange, known));
            return;
        }
        if !self.speaks(vm, incarnation) || self.vms[vm].exchange != exchange {
            return;
        }
        let memory = self.vms[vm].memory.filter(|_| known);
        let (ask, ip) = match memory {
            Some(ip) => (Ask::InitReboot, Some(ip)),
            None if self.rng.percent(self.setup.rapid) => (Ask::Rapid, self.offer(vm)),
            None => (Ask::Selecting, self.offer(vm)),
        };
        self.at(secs(5), Ev::Dhcp(vm, incarnation, exchange, false));
        if let Some(ip) = ip {
            self.send_request(vm, ask, ip);
        }
    }

    pub(super) fn send_request(&mut self, vm: VmId, ask: Ask, ip: Ipv4Addr) {
        let broadcast = !matches!(ask, Ask::Renewing);
        let xid = self.next_xid;
        self.next_xid += 1;
        let it = &mut self.vms[vm];
        it.xid = xid;
        it.asked_at = self.now;
        let Some(port) = it.port else { return };
        let question = Question {
            node: it.node,
            port,
            chaddr: it.mac,
            client_id: it.client_id.clone(),
            ask,
            ip,
            xid,
            broadcast,
        };
        self.say(Some(ip), Some(vm), || {
            format!("vm{vm} sends REQUEST {:?} for {ip}", question.ask)
        });
        let mac = question.chaddr;
        self.request_frame(question, mac);
    }

    pub(super) fn got(&mut self, vm: VmId, ip: Ipv4Addr, lease: Option<Duration>) {
        let now = self.now;
        let it = &mut self.vms[vm];
        it.exchange += 1;
        let (incarnation, exchange) = (it.incarnation, it.exchange);
        let Some(lease) = lease else {
            it.life = Life::Asking;
            it.ip = None;
            it.memory = None;
            self.say(Some(ip), Some(vm), || format!("vm{vm} loses {ip} by a NAK"));
            self.at(secs(1), Ev::Dhcp(vm, incarnation, exchange, false));
            return;
        };
        let first = it.life != Life::Running;
        it.life = Life::Running;
        it.ip = Some(ip);
        it.memory = Some(ip);
        // The server counts from when it answered.
        it.lease_until = now + lease.saturating_sub(Duration::from_millis(10));
        self.say(Some(ip), Some(vm), || {
            format!("vm{vm} has {ip} for {lease:?}")
        });
        self.at(lease / 2, Ev::Renew(vm, incarnation, exchange, false));
        self.at(lease * 7 / 8, Ev::Renew(vm, incarnation, exchange, true));
        self.at(lease, Ev::Renew(vm, incarnation, exchange, true));
        if first {
            self.frame_of(vm, Some(ip), true);
            self.talk(vm, incarnation);
        }
    }

    pub(super) fn renew(&mut self, vm: VmId, incarnation: u32, exchange: u32, rebind: bool) {
        if self.vms[vm].exchange != exchange || self.vms[vm].incarnation != incarnation {
            return;
        }
        if let Some(at) = self.later(vm, incarnation) {
            self.at_time(at, Ev::Renew(vm, incarnation, exchange, rebind));
            return;
        }
        let (Some(ip), true) = (self.vms[vm].ip, self.speaks(vm, incarnation)) else {
            return;
        };
        if self.vms[vm].lease_until <= self.now {
            self.say(Some(ip), Some(vm), || {
                format!("vm{vm}: its lease of {ip} ran out")
            });
            let it = &mut self.vms[vm];
            it.ip = None;
            it.life = Life::Asking;
            it.exchange += 1;
            let exchange = it.exchange;
            self.at(Duration::ZERO, Ev::Dhcp(vm, incarnation, exchange, false));
            return;
        }
        let ask = if rebind {
            Ask::Rebinding
        } else {
            Ask::Renewing
        };
        self.send_request(vm, ask, ip);
    }

    pub(super) fn talk(&mut self, vm: VmId, incarnation: u32) {
        let Some(every) = self.vms[vm].talk_every else {
            return;
        };
        if self.vms[vm].incarnation != incarnation || self.vms[vm].life == Life::Off {
            return;
        }
        if let Some(at) = self.later(vm, incarnation) {
            self.at_time(at, Ev::Talk(vm, incarnation));
            return;
        }
        if let Some(ip) = self.vms[vm].ip {
            let broadcast = self.rng.percent(20);
            self.frame_of(vm, Some(ip), broadcast);
        }
        let jitter = self.rng.millis(0, 1000);
        if self.vms[vm].life == Life::Running {
            self.at(every + jitter, Ev::Talk(vm, incarnation));
        }
    }
}
