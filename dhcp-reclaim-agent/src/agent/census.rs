//! Leases that were there first: servers are asked for them by the MACs that the bridges have learned.
//!
//! What a server says is worth as much as a lease file: it is looked for, and nothing is released
//! before its VM was seen alive at a port.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use tracing::{info, warn};

use super::{Agent, chain};
use crate::{
    clock,
    core::{IfIndex, Import, Key, MacAddr, Role, SegmentId, Time, Vlan},
    packet::leasequery::Lease,
    ports::{learned_macs, neighbour},
};

/// A quiet VM's MAC is in the bridge's table once it speaks: looks for five minutes, and no more.
const LOOKS: u8 = 30;
const BETWEEN: Duration = Duration::from_secs(10);
/// A guest can send in any number of names.
const MACS_PER_PORT: usize = 16;
const MACS: usize = 16_384;
/// Questions on their way to one server: it is not to be stormed, and those about RELEASEs find room.
const AT_ONCE: usize = 32;

/// Who is asked for what a MAC of a bridge leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) segment: SegmentId,
    pub(super) vlan: Vlan,
    pub(super) mac: MacAddr,
    pub(super) server: Ipv4Addr,
}

#[derive(Debug, Default)]
pub(super) struct Census {
    looks: u8,
    next: Option<Time>,
    /// Those that were asked for, or are to be.
    known: BTreeSet<(SegmentId, MacAddr)>,
    by_port: BTreeMap<IfIndex, usize>,
    /// By the server: one that never answers is no reason to keep another waiting.
    waiting: BTreeMap<Ipv4Addr, VecDeque<Question>>,
    /// Not sent, or not answered: they are asked again at the next look, if there is one.
    again: Vec<Question>,
    /// Questions not sent or not answered, each time anew.
    pub(super) unanswered: u64,
    told: bool,
    /// MACs that nobody was asked for, at the look that found most of them: one port has too many, or
    /// all together, or the bridge's own address is on another VLAN.
    pub(super) refused: u64,
    pub(super) asked: u64,
    pub(super) found: u64,
}

impl Census {
    fn wait(&mut self, question: Question) {
        let waiting = self.waiting.entry(question.server).or_default();
        waiting.push_back(question);
    }

    pub(super) fn ask_again(&mut self, question: Question) {
        self.unanswered += 1;
        self.again.push(question);
    }
}

impl Agent {
    /// Goes on asking; called once an epoch.
    pub(super) async fn take_census(&mut self) {
        if self.settings.ask_servers.is_empty() {
            return;
        }
        let now = clock::monotonic();
        let due = self.census.next.is_none_or(|at| at <= now);
        if due && self.census.looks < LOOKS {
            self.census.looks += 1;
            self.census.next = Some(now + BETWEEN);
            self.look_for_macs().await;
        }
        let mut next = Vec::new();
        for (server, waiting) in &mut self.census.waiting {
            let room = AT_ONCE.saturating_sub(self.queries.about_macs(*server));
            next.extend(waiting.drain(..room.min(waiting.len())));
        }
        for question in next {
            self.census.asked += 1;
            if let Err(why) = self.ask_for_mac(question).await {
                let Question { server, mac, .. } = question;
                if !std::mem::replace(&mut self.census.told, true) {
                    warn!(%server, %mac, why, "cannot ask the server for leases");
                }
                self.census.ask_again(question);
            }
        }
    }

    async fn look_for_macs(&mut self) {
        let (engine, told) = (&self.engine, self.engine.told_of());
        let knows = |at: (SegmentId, MacAddr)| told.contains(&at) || engine.knows(at.0, at.1);
        for question in std::mem::take(&mut self.census.again) {
            if !knows((question.segment, question.mac)) {
                self.census.wait(question);
            }
        }
        let learned = match learned_macs().await {
            Ok(learned) => learned,
            Err(error) => {
                warn!(error = %chain(&error), "what the bridges have learned is not known");
                return;
            }
        };
        let mut refused = 0;
        for (port, vlan, mac) in learned.macs {
            let vms = |it: &&super::Watched| it.port.role == Role::Vm;
            let Some(segment) = self
                .watched
                .get(&port)
                .filter(vms)
                .map(|it| it.port.segment)
            else {
                continue;
            };
            // The tables of bridges that filter no VLANs name none.
            let own = self.own_vlan(segment);
            let census = &mut self.census;
            if census.known.contains(&(segment, mac)) || knows((segment, mac)) {
                continue;
            }
            let of_port = census.by_port.entry(port).or_default();
            let too_many = *of_port >= MACS_PER_PORT || census.known.len() >= MACS;
            if too_many || own != Some(vlan) {
                refused += 1;
                continue;
            }
            *of_port += 1;
            census.known.insert((segment, mac));
            for server in &self.settings.ask_servers {
                census.wait(Question {
                    segment,
                    vlan,
                    mac,
                    server: *server,
                });
            }
        }
        self.census.refused = self.census.refused.max(refused);
    }

    /// The server has said what the MAC leases.
    pub(super) async fn lease_told(&mut self, question: Question, lease: Lease) {
        let Question { segment, vlan, .. } = question;
        let now = clock::monotonic();
        let server = lease.server.unwrap_or(question.server);
        let bridge = self.segments.bridge(segment).map(|bridge| bridge.ifindex);
        // It has just answered us.
        let server_mac = match bridge {
            Some(bridge) => neighbour(bridge, server).await.ok().flatten(),
            None => None,
        };
        let import = Import {
            key: Key {
                segment,
                vlan,
                ip: lease.ip,
            },
            chaddr: lease.mac,
            client_id: lease.client_id,
            server: Some(server),
            server_mac,
            expires: (lease.secs != u32::MAX).then(|| now + Duration::from_secs(lease.secs.into())),
        };
        let count = self.engine.import(vec![import], now);
        self.census.found += count.taken;
        info!(ip = %lease.ip, mac = %lease.mac, %server, taken = count.taken, "a lease by its server's word");
        self.carry_out().await;
    }
}
