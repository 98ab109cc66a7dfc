//! What outlives the agent: out of the engine, and back into the next one.

use std::net::Ipv4Addr;

use super::{
    Engine, TRANSACTION, Transaction,
    outcome::{VIGIL, Vigil},
};
use crate::core::{
    binding::{Ask, Binding, Check, Doubt, Origin, Outcome},
    policy::Commit,
    types::{
        Action, AlarmId, IfIndex, Key, MacAddr, NoticeKind, PortLoss, ReleaseOutcome, SegmentId,
        State, Time, TransactionId, Vlan,
    },
};

/// What of a binding outlives the agent: of one that is live, and of one that was released for as
/// long as it is shown. What was counted against the VM does not: that begins anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    pub key: Key,
    pub chaddr: MacAddr,
    pub client_id: Option<Vec<u8>>,
    pub server: Option<Ipv4Addr>,
    pub server_mac: Option<MacAddr>,
    pub port: IfIndex,
    pub port_name: String,
    /// `Releasing` is an intent: whether its frame left is not known, unless [`Saved::settle`] is
    /// told.
    pub state: State,
    pub origin: Origin,
    pub acked: bool,
    pub seen_alive: bool,
    pub shared: bool,
    pub doubt: Option<Doubt>,
    pub expires: Option<Time>,
    pub tentative_until: Option<Time>,
    pub last_seen: Option<Time>,
    /// What came after a RELEASE of it, if one left.
    pub released: Option<SavedRelease>,
}

/// What is remembered of a RELEASE that left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedRelease {
    pub at: Time,
    /// No frame of the VM had been seen since then: a later one is a sign of life after it.
    pub silent_since: Time,
    pub outcome: Outcome,
    /// Until when the address is looked after.
    pub vigil_until: Option<Time>,
    pub alarmed: bool,
}

/// A MAC whose released address was alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedAlarm {
    pub id: AlarmId,
    /// Zero: none that is known.
    pub port: IfIndex,
    pub port_name: String,
}

impl Saved {
    /// What became of the intent that this is, if it is one.
    pub fn settle(&mut self, outcome: ReleaseOutcome, silent_since: Time, now: Time) {
        if self.state != State::Releasing {
            return;
        }
        self.state = match (outcome, self.released) {
            (ReleaseOutcome::Sent, before) => {
                self.released = Some(SavedRelease {
                    at: now,
                    silent_since,
                    outcome: Outcome::Unverified,
                    vigil_until: Some(now + VIGIL),
                    alarmed: before.is_some_and(|before| before.alarmed),
                });
                State::Released
            }
            // A repetition that did not leave: the one before it stands.
            (_, Some(_)) => State::Released,
            (
                ReleaseOutcome::Vetoed
                | ReleaseOutcome::Failed
                | ReleaseOutcome::Overtaken
                | ReleaseOutcome::DryRun,
                None,
            ) => State::Gone,
        };
    }
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
        let binding = self.bindings.get(&key).filter(|b| {
            let released = b.state == State::Released && b.outcome.is_some();
            b.is_live() || released || b.kept_until().is_some()
        });
        let binding = binding.map(|it| &**it);
        let binding = binding.or_else(|| self.imports.get(key))?;
        let silent_since = match binding.check {
            Check::Watching(watching) => watching.armed_at,
            Check::Idle | Check::Glancing => binding.since,
        };
        let released = binding.outcome.map(|outcome| SavedRelease {
            at: binding.since,
            silent_since,
            outcome,
            vigil_until: binding.vigil.map(|vigil| vigil.until),
            alarmed: binding.alarmed,
        });
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
            origin: binding.origin,
            acked: binding.acked,
            seen_alive: binding.seen_alive,
            shared: binding.shared,
            doubt: binding.doubt,
            expires: binding.expires,
            tentative_until: binding.tentative_until,
            last_seen: binding.last_seen,
            released,
        })
    }

    /// `None`: it has ended.
    pub fn saved_alarm(&self, id: AlarmId) -> Option<SavedAlarm> {
        let port = self.alarm(id)?;
        Some(SavedAlarm {
            id,
            port,
            port_name: self.port_name(port),
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

    /// Takes over the alarms: what was amiss is so until the server mends it.
    pub fn restore_alarms(&mut self, saved: Vec<SavedAlarm>) {
        for SavedAlarm {
            id,
            port,
            port_name,
        } in saved
        {
            let present = self.has_port(port, &port_name, id.segment);
            self.put_alarm(id, if present { port } else { 0 });
        }
    }

    fn restore_binding(&mut self, saved: Saved, now: Time) {
        let key = saved.key;
        let state = match saved.state {
            State::Requested => State::Requested,
            // Silence is counted anew: nobody listened meanwhile.
            State::Bound | State::Silent | State::Gone => State::Bound,
            // Its frame may have left, and the address may be somebody else's by now.
            State::Releasing | State::Released => State::Released,
            ended @ (State::Refused | State::Withdrawn | State::Expired | State::Moved) => ended,
        };
        let unknown = saved.state == State::Releasing;
        let released = saved.released;
        let present = self.has_port(saved.port, &saved.port_name, key.segment);
        // Its carrier went before this agent listened, or before its binding was known here.
        let dark = self.ports.get(&saved.port).is_some_and(|info| info.dark);
        let binding = Binding {
            client_id: saved.client_id,
            server: saved.server,
            server_mac: saved.server_mac,
            // Zero is nobody's: the index may be another port's by now.
            port: if present { saved.port } else { 0 },
            port_name: saved.port_name,
            state,
            origin: saved.origin,
            acked: saved.acked,
            seen_alive: saved.seen_alive,
            shared: saved.shared,
            doubt: saved.doubt,
            expires: saved.expires,
            tentative_until: saved.tentative_until,
            last_seen: saved.last_seen,
            outcome: (state == State::Released)
                .then(|| released.map_or(Outcome::Unverified, |released| released.outcome)),
            alarmed: released.is_some_and(|released| released.alarmed),
            ..Binding::new(
                key,
                saved.chaddr,
                released.map_or(now, |released| released.at),
            )
        };
        if binding.is_hearsay() && state == State::Requested {
            self.keep_import(binding, now);
            return;
        }
        self.insert(binding);
        self.add("bindings_restored", 1);
        let ended = self.bindings.get(&key).is_some_and(|b| !b.is_live());
        if ended && let Some(info) = self.ports.get_mut(&saved.port) {
            // It is none of its port's any more.
            info.bindings.remove(&key);
        }
        match state {
            State::Released => {
                if unknown {
                    self.add("releases_unknown", 1);
                    self.tell(
                        key,
                        NoticeKind::Released,
                        "outcome unknown: the agent ended while it was releasing, and it is not \
                         released again"
                            .to_owned(),
                        now,
                    );
                }
                self.restore_vigil(key, released, now);
            }
            State::Requested => {
                let soon = match self.policy.commit {
                    Commit::Ack => saved.tentative_until.unwrap_or(now),
                    Commit::Request => now + self.policy.probe_wait,
                };
                self.schedule(key, soon);
            }
            State::Bound if present && !dark => self.schedule(key, now + self.policy.probe_wait),
            State::Bound => self.lose_port(key, PortLoss::Unseen, now),
            State::Refused | State::Withdrawn | State::Expired | State::Moved => {
                self.schedule_ended(key, now);
            }
            State::Silent | State::Gone | State::Releasing => {}
        }
    }

    /// Goes on looking after a released address. It is not released again, whatever its server says:
    /// not all that was newer may have been heard.
    fn restore_vigil(&mut self, key: Key, released: Option<SavedRelease>, now: Time) {
        let vigil = released.and_then(|released| {
            let until = released.vigil_until.filter(|until| *until > now)?;
            Some((released.silent_since, until))
        });
        if let Some((silent_since, until)) = vigil {
            self.resume_vigil(key, Vigil::closed(until), silent_since);
        }
        self.schedule_ended(key, now);
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

    pub(super) fn save_alarm(&mut self, id: AlarmId) {
        self.actions.push_back(Action::SaveAlarm { id });
    }

    pub(super) fn save_transaction(&mut self, port: IfIndex, xid: u32, chaddr: MacAddr) {
        let id = TransactionId { port, xid, chaddr };
        self.actions.push_back(Action::SaveTransaction { id });
    }
}
