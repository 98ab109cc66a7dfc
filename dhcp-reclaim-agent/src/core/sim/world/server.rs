//! The DHCP server, and its answers' way back.

use super::*;

impl World {
    pub(super) fn offer(&mut self, vm: VmId) -> Option<Ipv4Addr> {
        let owner = self.vms[vm].owner();
        let now = self.now;
        if let Some((ip, _)) = self.leases.iter().find(|(_, l)| l.owner == owner) {
            return Some(*ip);
        }
        let free: Vec<Ipv4Addr> = (1..=POOL)
            .map(|n| address(self.vms[vm].vlan, n))
            .filter(|ip| self.leases.get(ip).is_none_or(|l| l.until <= now))
            .collect();
        self.rng.pick(&free).copied()
    }

    pub(super) fn server_hears(&mut self, question: Question) {
        let owner = owner_of(
            vlan_of(question.ip),
            question.client_id.as_deref(),
            question.chaddr,
        );
        let now = self.now;
        let grant = self
            .leases
            .get(&question.ip)
            .is_none_or(|lease| lease.until <= now || lease.owner == owner);
        let drawn = secs(120 + self.rng.below(8) * 60);
        let lease = grant.then(|| self.setup.lease.unwrap_or(drawn));
        if let Some(lease) = lease {
            // One lease for one client.
            self.leases.retain(|_, l| l.owner != owner);
            self.leases.insert(
                question.ip,
                Lease {
                    owner,
                    until: now + lease,
                },
            );
        }
        self.say(Some(question.ip), None, || match lease {
            Some(lease) => format!(
                "server: ACK {} to {}, {lease:?}",
                question.ip, question.chaddr
            ),
            None => format!("server: NAK {} to {}", question.ip, question.chaddr),
        });
        self.stats.naks += u64::from(!grant);
        let delay = self.rng.micros(1000, 5000);
        let way = &mut self.nodes[question.node].answered_until;
        let at = (self.now + delay).max(*way);
        *way = at;
        self.at_time(at, Ev::Answer(question, lease));
    }

    /// The server's answer arrives at the node of the client.
    pub(super) fn answer(&mut self, question: &Question, lease: Option<Duration>) {
        let node = question.node;
        let granted = lease.map(|lease| lease.as_secs().try_into().unwrap_or(u32::MAX));
        let message = Message {
            direction: Direction::ToPort,
            source_mac: SERVER_MAC,
            source_ip: SERVER,
            xid: question.xid,
            chaddr: question.chaddr,
            yiaddr: granted.map(|_| question.ip),
            server_id: Some(SERVER),
            lease_secs: granted,
            rapid_commit: matches!(question.ask, Ask::Rapid),
            vlan: vlan_of(question.ip),
            ..self.blank(
                question.port,
                if lease.is_some() {
                    MessageType::Ack
                } else {
                    MessageType::Nak
                },
            )
        };
        for other in 0..self.nodes.len() {
            let crosses = self.setup.uplinks && self.hears(other);
            if let Some(lease) = lease
                && other != node
                && !crosses
            {
                // That the end is another one now is not heard there.
                let until = self.now + lease + secs(1000);
                self.nodes[other].excused.insert(question.ip, until);
            }
            if crosses && (other == node || question.broadcast) {
                self.hear_uplink(other);
                let uplink = self.nodes[other].uplink;
                let copy = Message {
                    port: uplink,
                    role: Role::Uplink,
                    direction: Direction::FromPort,
                    ..message.clone()
                };
                self.record(other, copy);
            }
        }
        if !self.open(node) || !self.nodes[node].ports.contains_key(&question.port) {
            return;
        }
        if self.setup.policy.commit == Commit::Ack {
            self.record(node, message);
        }
        let Some(vm) = self.vms.iter().position(|vm| {
            vm.mac == question.chaddr && vm.port == Some(question.port) && vm.xid == question.xid
        }) else {
            return;
        };
        let incarnation = self.vms[vm].incarnation;
        if self.speaks(vm, incarnation) {
            self.got(vm, question.ip, lease);
        }
    }

    pub(super) fn release_arrives(&mut self, release: &Release, node: usize) {
        let client_id = release.client_id.as_deref();
        let owner = owner_of(vlan_of(release.ip), client_id, release.chaddr);
        let now = self.now;
        let good = self
            .leases
            .get(&release.ip)
            .is_some_and(|lease| lease.owner == owner && lease.until > now);
        self.say(Some(release.ip), None, || {
            let what = if good { "frees" } else { "refuses to free" };
            format!("server: {what} {} (from node{node})", release.ip)
        });
        if good {
            self.leases.remove(&release.ip);
            self.stats.reclaimed += 1;
        } else {
            self.stats.refused += 1;
        }
    }

    /// DHCPLEASEQUERY: who has the address?
    pub(super) fn query_answered(&mut self, node: usize, key: Key, server: Ipv4Addr) {
        if !self.open(node) || self.asleep(node) {
            return;
        }
        let now = self.now;
        let ip = ip_of(key);
        let lease = self.leases.get(&ip).filter(|lease| lease.until > now);
        let answer = match lease {
            None => QueryAnswer::Unassigned,
            Some(lease) => {
                let mac = self.vms.iter().find(|vm| vm.owner() == lease.owner);
                QueryAnswer::Active(mac.map(|vm| vm.mac))
            }
        };
        self.say(Some(ip), None, || {
            format!("server: to a lease query for {ip}: {answer:?}")
        });
        let event = Event::Queried {
            key,
            server,
            answer,
        };
        self.tell(node, event);
    }

    /// The server answers what came behind RELEASEs: it has read them.
    pub(super) fn sounded(
        &mut self,
        node: usize,
        asked_by: Time,
        sounding: Sounding,
        counted: usize,
    ) {
        let state = &mut self.nodes[node];
        let read = counted.saturating_sub(state.releases_read);
        state.releases.drain(..read.min(state.releases.len()));
        state.releases_read += read;
        if state.started_at != asked_by || self.asleep(node) {
            return;
        }
        let server = (sounding.segment, sounding.vlan, sounding.server);
        let mark = sounding.mark;
        self.tell(node, Event::ServerRead { server, mark });
    }
}
