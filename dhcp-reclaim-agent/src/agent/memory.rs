//! The loop's dealings with the store: what is to be written, and what an earlier agent knew.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use tracing::{error, info};

use super::{Agent, chain, draw_xid, view};
use crate::{
    clock,
    core::{
        Event, IfIndex, Key, Port, PortLoss, Release, ReleaseOutcome, TransactionId, binding::Check,
    },
    store::{
        self, AuditEntry, AuditGate, AuditOutcome, Batch, BindingRow, Moment, PortRow, Store,
        TransactionRow,
    },
};

/// The store, and what it does not know yet.
pub(super) struct Memory {
    store: Store,
    boot: String,
    bindings: BTreeSet<Key>,
    transactions: BTreeSet<TransactionId>,
    ports: BTreeSet<IfIndex>,
    audit: Vec<AuditEntry>,
    intents: Vec<Intent>,
    /// Ports of an earlier agent of this boot.
    known_ports: BTreeMap<IfIndex, (String, u32)>,
    failing: bool,
}

/// A RELEASE that is decided: it may leave once the store knows of it.
pub(super) struct Intent {
    pub(super) key: Key,
    pub(super) release: Release,
    pub(super) xid: u32,
    audit: AuditEntry,
}

impl Memory {
    pub(super) fn new(store: Store, boot: String) -> Self {
        Self {
            store,
            boot,
            bindings: BTreeSet::new(),
            transactions: BTreeSet::new(),
            ports: BTreeSet::new(),
            audit: Vec::new(),
            intents: Vec::new(),
            known_ports: BTreeMap::new(),
            failing: false,
        }
    }

    pub(super) fn binding(&mut self, key: Key) {
        self.bindings.insert(key);
    }

    pub(super) fn transaction(&mut self, id: TransactionId) {
        self.transactions.insert(id);
    }

    pub(super) fn port(&mut self, ifindex: IfIndex) {
        self.ports.insert(ifindex);
    }

    pub(super) fn knew_port(&mut self, row: &PortRow) {
        if row.is_of_this_boot(&self.now()) {
            self.known_ports
                .insert(row.ifindex, (row.name.clone(), row.lost));
        }
    }

    /// Lost records that an earlier agent knew of.
    pub(super) fn port_lost(&mut self, ifindex: IfIndex, name: &str) -> u32 {
        let known = self.known_ports.remove(&ifindex);
        known
            .filter(|(known, _)| known == name)
            .map_or(0, |(_, lost)| lost)
    }

    pub(super) fn take_intents(&mut self) -> Vec<Intent> {
        std::mem::take(&mut self.intents)
    }

    /// What became of an intent; written with the next commit.
    pub(super) fn settle(&mut self, intent: Intent, outcome: ReleaseOutcome) {
        let outcome = match outcome {
            ReleaseOutcome::Sent => AuditOutcome::Sent,
            ReleaseOutcome::Vetoed => AuditOutcome::Vetoed,
            ReleaseOutcome::Failed => AuditOutcome::Failed,
            ReleaseOutcome::DryRun => AuditOutcome::DryRun,
        };
        self.audit.push(AuditEntry {
            outcome,
            ..intent.audit
        });
    }

    fn now(&self) -> Moment {
        Moment {
            boot: self.boot.clone(),
            monotonic: clock::monotonic(),
            wall: clock::wall(),
        }
    }

    fn is_clean(&self) -> bool {
        self.bindings.is_empty()
            && self.transactions.is_empty()
            && self.ports.is_empty()
            && self.audit.is_empty()
    }
}

impl Agent {
    /// Writes what changed, and only then lets the ring forget the records that changed it. `false`:
    /// it could not be written.
    pub(super) fn commit(&mut self) -> bool {
        let written = self.memory.is_clean() || self.write();
        // Also if it could not be written: this agent knows what they said, and a ring that runs
        // full would lose more.
        self.ring.consume();
        written
    }

    fn write(&mut self) -> bool {
        let now = self.memory.now();
        let mut batch = Batch::default();
        for key in &self.memory.bindings {
            let Some(bridge) = self.segments.name(key.segment) else {
                continue;
            };
            let row = self
                .engine
                .saved(*key)
                .map(|saved| BindingRow::new(bridge, saved, &now));
            batch.binding(BindingRow::key(bridge, *key), row.as_ref());
        }
        for id in &self.memory.transactions {
            let row = self
                .engine
                .saved_transaction(*id)
                .map(|saved| TransactionRow::new(saved, &now));
            batch.transaction(TransactionRow::key(*id), row.as_ref());
        }
        for ifindex in &self.memory.ports {
            let row = self.watched.get(ifindex).and_then(|watched| {
                let bridge = self.segments.name(watched.port.segment)?;
                Some(PortRow::new(bridge, &watched.port, watched.lost, &now))
            });
            batch.port(PortRow::key(*ifindex), row.as_ref());
        }
        for entry in &self.memory.audit {
            batch.audit(entry);
        }
        match self.memory.store.commit(&batch) {
            Ok(()) => {
                self.counters.commits += 1;
                self.memory.bindings.clear();
                self.memory.transactions.clear();
                self.memory.ports.clear();
                self.memory.audit.clear();
                if std::mem::take(&mut self.memory.failing) {
                    info!("the state file can be written again");
                }
                true
            }
            Err(error) => {
                self.counters.store_failures += 1;
                if !std::mem::replace(&mut self.memory.failing, true) {
                    error!(
                        error = %chain(&error),
                        "what was learned cannot be written down: nothing is released until it can"
                    );
                }
                false
            }
        }
    }

    /// Puts a RELEASE down in the audit trail, with all that speaks for it.
    pub(super) fn intend(&mut self, key: Key, release: Release) {
        let Some(xid) = draw_xid() else {
            let outcome = ReleaseOutcome::Failed;
            self.engine
                .handle(Event::Released { key, outcome }, clock::monotonic());
            return;
        };
        let now = self.memory.now();
        let probes = self
            .engine
            .bindings_of(key.ip)
            .find(|binding| binding.key == key)
            .map_or(0, |binding| match binding.check {
                Check::Watching(watching) => watching.probes,
                Check::Idle | Check::Glancing => 0,
            });
        let port = self
            .engine
            .saved(key)
            .map(|saved| saved.port_name)
            .unwrap_or_default();
        let findings = self.engine.explain(key, now.monotonic).unwrap_or_default();
        let gates = findings.iter().map(|finding| AuditGate {
            gate: finding.gate.name().to_owned(),
            verdict: view::verdict(finding.verdict).to_owned(),
            reason: finding.reason.clone(),
        });
        let silent_for = now.monotonic.since(release.silent_since);
        let audit = AuditEntry {
            number: self.memory.store.next_audit(),
            ts: now.wall,
            ip: key.ip,
            mac: release.chaddr,
            segment: self.segments.name(key.segment).unwrap_or("?").to_owned(),
            vlan: key.vlan,
            port,
            server: release.server,
            server_mac: release.server_mac,
            silent_since: now
                .wall
                .saturating_sub(silent_for)
                .unwrap_or(Timestamp::MIN),
            silent_for,
            probes,
            gates: gates.collect(),
            xid,
            outcome: AuditOutcome::Intended,
        };
        self.memory.audit.push(audit.clone());
        self.memory.intents.push(Intent {
            key,
            release,
            xid,
            audit,
        });
    }

    /// Takes over what an earlier agent knew, and what came by while there was none. The ports that
    /// are there have been told.
    pub(super) async fn remember(&mut self, remembered: store::Memory) {
        let now = self.memory.now();
        // Of a port that is gone there may be records in the ring: it counts as there until those
        // have been read.
        let mut gone = Vec::new();
        for row in remembered.ports {
            let segment = self.segments.id(&row.bridge);
            let (Some(segment), true) = (segment, row.is_of_this_boot(&now)) else {
                self.memory.port(row.ifindex);
                continue;
            };
            if self.watched.contains_key(&row.ifindex) {
                continue;
            }
            gone.push(row.ifindex);
            let port = Port {
                ifindex: row.ifindex,
                name: row.name,
                segment,
                role: row.role,
            };
            self.engine.handle(Event::PortUp(port), now.monotonic);
        }
        let transactions = remembered.transactions.into_iter();
        let transactions = transactions.map(|row| row.saved(&now)).collect();
        self.engine
            .restore_transactions(transactions, now.monotonic);
        // What belongs to a bridge that is not followed any more stays in the store as it is.
        let bindings = remembered.bindings.into_iter();
        let bindings: Vec<_> = bindings
            .filter_map(|row| {
                let segment = self.segments.id(&row.bridge)?;
                Some(row.saved(segment, &now))
            })
            .collect();
        if !bindings.is_empty() {
            info!(
                bindings = bindings.len(),
                "took over what an earlier agent knew"
            );
        }
        self.engine.restore(bindings, now.monotonic);
        self.carry_out().await;
        let ports: Vec<IfIndex> = self.watched.keys().copied().collect();
        for port in ports {
            self.check_lost(port).await;
        }
        self.drain().await;
        for port in gone {
            self.tell(Event::PortDown {
                port,
                loss: PortLoss::Deleted,
            })
            .await;
            self.memory.port(port);
        }
        self.commit();
    }
}
