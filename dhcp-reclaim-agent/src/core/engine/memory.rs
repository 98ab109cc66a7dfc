//! What outlives the agent: out of the engine, and back into the next one.

use std::net::Ipv4Addr;

use super::{Engine, RETENTION, TRANSACTION, Transaction};
use crate::core::{
    binding::{Ask, Binding, Check, Doubt, Outcome},
    policy::Commit,
    types::{
        Action, IfIndex, Key, MacAddr, NoticeKind, PortLoss, SegmentId, State, Time, TransactionId,
        Vlan,
    },
};

/// What of a binding outlives the agent. What was counted against the VM does not: that begins anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    pub key: Key,
    pub chaddr: MacAddr,
    pub client_id: Option<Vec<u8>>,
    pub server: Option<Ipv4Addr>,
    pub server_mac: Option<MacAddr>,
    pub port: IfIndex,
    pub port_name: String,
    /// One of those that are live. `Releasing` is an intent: whether its frame left is not known.
    pub state: State,
    pub acked: bool,
    pub seen_alive: bool,
    pub shared: bool,
    pub doubt: Option<Doubt>,
    pub expires: Option<Time>,
    pub tentative_until: Option<Time>,
    pub last_seen: Option<Time>,
}

/// An open question: without it, the answer to it would mean nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedTransaction {
    pub id: TransactionId,
    pub port_name: String,
    pub at: Time,
    pub ask: Ask,
    pub vlan: Vlan,
    pub client_id: Option<Vec<u8>>,
    pub ambiguous: bool,
    pub poisoned: bool,
}

impl Engine {
    /// `None`: nothing of it needs to be kept.
    pub fn saved(&self, key: Key) -> Option<Saved> {
        let binding = self.bindings.get(&key).filter(|b| b.is_live())?;
        // Ports are renamed while they come up.
        let port_name = self
            .ports
            .get(&binding.port)
            .map_or(&binding.port_name, |info| &info.port.name);
        Some(Saved {
            key,
            chaddr: binding.chaddr,
            client_id: binding.client_id.clone(),
            server: binding.server,
            server_mac: binding.server_mac,
            port: binding.port,
            port_name: port_name.clone(),
            state: binding.state,
            acked: binding.acked,
            seen_alive: binding.seen_alive,
            shared: binding.shared,
            doubt: binding.doubt,
            expires: binding.expires,
            tentative_until: binding.tentative_until,
            last_seen: binding.last_seen,
        })
    }

    /// `None`: it is closed.
    pub fn saved_transaction(&self, id: TransactionId) -> Option<SavedTransaction> {
        let transaction = self.transactions.get(&(id.xid, id.chaddr, id.port))?;
        Some(SavedTransaction {
            id,
            port_name: self.port_name(id.port),
            at: transaction.at,
            ask: transaction.ask,
            vlan: transaction.vlan,
            client_id: transaction.client_id.clone(),
            ambiguous: transaction.ambiguous,
            poisoned: transaction.poisoned,
        })
    }

    /// Takes over what an earlier agent knew. To be called once the ports that are there have been
    /// told; whatever is known by then is newer and stays.
    pub fn restore(&mut self, saved: Vec<Saved>, now: Time) {
        for saved in saved {
            if !self.bindings.contains_key(&saved.key) {
                self.restore_binding(saved, now);
            }
        }
    }

    /// Takes over the questions that are still open; the others are told to be forgotten.
    pub fn restore_transactions(&mut self, saved: Vec<SavedTransaction>, now: Time) {
        for saved in saved {
            let TransactionId { port, xid, chaddr } = saved.id;
            let open = saved.at + TRANSACTION > now
                && self
                    .ports
                    .get(&port)
                    .is_some_and(|info| info.port.name == saved.port_name);
            self.save_transaction(port, xid, chaddr);
            if !open || self.transactions.contains_key(&(xid, chaddr, port)) {
                continue;
            }
            if let Some(info) = self.ports.get_mut(&port) {
                info.transactions.insert((xid, chaddr));
            }
            self.transactions_due
                .insert((saved.at + TRANSACTION, port, xid, chaddr));
            let transaction = Transaction {
                at: saved.at,
                ask: saved.ask,
                vlan: saved.vlan,
                client_id: saved.client_id,
                ambiguous: saved.ambiguous,
                poisoned: saved.poisoned,
            };
            self.transactions.insert((xid, chaddr, port), transaction);
        }
    }

    fn restore_binding(&mut self, saved: Saved, now: Time) {
        let key = saved.key;
        let state = match saved.state {
            State::Requested => State::Requested,
            // Silence is counted anew: nobody listened meanwhile.
            State::Bound | State::Silent | State::Gone => State::Bound,
            // Its frame may have left, and the address may be somebody else's by now.
            State::Releasing => State::Released,
            State::Released | State::Refused | State::Withdrawn | State::Expired | State::Moved => {
                return;
            }
        };
        let present = self.has_port(saved.port, &saved.port_name, key.segment);
        let bound_to = present && state != State::Released;
        self.insert(Binding {
            key,
            chaddr: saved.chaddr,
            client_id: saved.client_id,
            server: saved.server,
            server_mac: saved.server_mac,
            // Zero is nobody's: the index may be another port's by now.
            port: if bound_to { saved.port } else { 0 },
            port_name: saved.port_name,
            state,
            acked: saved.acked,
            seen_alive: saved.seen_alive,
            shared: saved.shared,
            doubt: saved.doubt,
            expires: saved.expires,
            tentative_until: saved.tentative_until,
            last_seen: saved.last_seen,
            since: now,
            check: Check::Idle,
            due: None,
            evidence: None,
            held_by: None,
            vetoed: false,
            failures: 0,
            turn: None,
            outcome: (state == State::Released).then_some(Outcome::Unverified),
            vigil: None,
            after: None,
            alarmed: false,
        });
        self.add("bindings_restored", 1);
        match state {
            State::Released => {
                self.add("releases_unknown", 1);
                self.tell(
                    key,
                    NoticeKind::Released,
                    "outcome unknown: the agent ended while it was releasing, and it is not \
                     released again"
                        .to_owned(),
                    now,
                );
                self.schedule(key, now + RETENTION);
            }
            State::Requested => {
                let soon = match self.policy.commit {
                    Commit::Ack => saved.tentative_until.unwrap_or(now),
                    Commit::Request => now + self.policy.probe_wait,
                };
                self.schedule(key, soon);
            }
            State::Bound if present => self.schedule(key, now + self.policy.probe_wait),
            State::Bound => self.lose_port(key, PortLoss::Deleted, now),
            State::Silent
            | State::Gone
            | State::Releasing
            | State::Refused
            | State::Withdrawn
            | State::Expired
            | State::Moved => {}
        }
    }

    fn has_port(&self, port: IfIndex, name: &str, segment: SegmentId) -> bool {
        self.ports
            .get(&port)
            .is_some_and(|info| info.port.name == name && info.port.segment == segment)
    }

    pub(super) fn save(&mut self, key: Key) {
        let action = Action::Save { key };
        if self.actions.back() != Some(&action) {
            self.actions.push_back(action);
        }
    }

    pub(super) fn save_transaction(&mut self, port: IfIndex, xid: u32, chaddr: MacAddr) {
        let id = TransactionId { port, xid, chaddr };
        self.actions.push_back(Action::SaveTransaction { id });
    }
}
