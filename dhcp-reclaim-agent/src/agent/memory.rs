//! The loop's dealings with the store: what is to be written, and what an earlier agent knew.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use dhcp_reclaim_ebpf::abi::{
    EmitOrder, PortSlot, VERDICT_SENT, VERDICT_UNWATCHED, VERDICT_VETOED, WatchKey,
};
use tracing::{error, info, warn};

use super::{
    Agent, chain, draw_xid,
    view::{self, Clocks},
};
use crate::{
    clock,
    control::{PauseView, client_id_text},
    core::{
        AlarmId, Event, IfIndex, Key, Port, PortLoss, Release, ReleaseOutcome, Role, Saved,
        SegmentId, Time, TransactionId,
        binding::{Check, Doubt},
    },
    kernel::{Kernel, KernelError, role_of},
    store::{
        self, AlarmRow, AuditEntry, AuditGate, AuditLine, AuditOutcome, Batch, BindingRow, Moment,
        OperatorEntry, PortRow, Store, Trail, TransactionRow,
    },
};

/// An uplink that has been away for so long is none any more to an agent that starts.
const LOST_UPLINK: Duration = Duration::from_secs(3600);

/// The store, and what it does not know yet.
pub(super) struct Memory {
    store: Store,
    boot: String,
    /// For how long the host had been suspended, as far as the core has been told.
    suspended: Duration,
    bindings: BTreeSet<Key>,
    transactions: BTreeSet<TransactionId>,
    ports: BTreeSet<IfIndex>,
    /// Uplinks that went, of bridges that have none since: the next agent is to know that they had.
    lost_uplinks: BTreeMap<IfIndex, (Port, Time)>,
    alarms: BTreeSet<AlarmId>,
    /// Intents that are new, or whose outcome is.
    audit: Vec<AuditEntry>,
    /// Lines that the trail does not have yet.
    lines: Vec<AuditLine>,
    trail: Trail,
    intents: Vec<Intent>,
    /// Orders whose outcome the next commit makes known: until then they are the only memory of it.
    settled: Vec<u32>,
    /// Ports of an earlier agent of this boot.
    known_ports: BTreeMap<IfIndex, (String, u32)>,
    /// Ports that were gone at this time, and count as there for what was heard before.
    gone: (Time, Vec<IfIndex>),
    /// The end of a port is not written down yet.
    ended_port: bool,
    failing: bool,
    /// A person holds all releases; and whether the store knows that yet.
    pub(super) pause: Option<PauseView>,
    pause_changed: bool,
}

/// What an earlier agent left in the kernel's maps.
pub(super) struct Left {
    slots: Vec<PortSlot>,
    orders: BTreeMap<u32, EmitOrder>,
    watches: Vec<WatchKey>,
}

impl Left {
    /// To be taken before any port is watched.
    pub(super) fn of(kernel: &Kernel) -> Result<Self, KernelError> {
        Ok(Self {
            slots: kernel.slots(),
            orders: kernel.orders()?,
            watches: kernel.armed()?,
        })
    }
}

/// Ports that an earlier agent knew, whether they are there or not.
pub(super) fn known_ports(remembered: &store::Memory, left: &Left) -> BTreeSet<IfIndex> {
    let watched = left.slots.iter().map(|slot| slot.ifindex);
    let written = remembered.ports.iter().map(|row| row.ifindex);
    let of_bindings = remembered.bindings.iter().map(|row| row.ifindex);
    watched.chain(written).chain(of_bindings).collect()
}

/// A RELEASE that is decided: it may leave once the store knows of it.
pub(super) struct Intent {
    pub(super) key: Key,
    pub(super) release: Release,
    pub(super) xid: u32,
    audit: AuditEntry,
}

impl Memory {
    pub(super) fn new(store: Store, trail: Trail, boot: String) -> Self {
        Self {
            store,
            trail,
            lines: Vec::new(),
            boot,
            suspended: clock::suspended(),
            bindings: BTreeSet::new(),
            transactions: BTreeSet::new(),
            ports: BTreeSet::new(),
            lost_uplinks: BTreeMap::new(),
            alarms: BTreeSet::new(),
            audit: Vec::new(),
            intents: Vec::new(),
            settled: Vec::new(),
            known_ports: BTreeMap::new(),
            gone: (Time::from_nanos(0), Vec::new()),
            ended_port: false,
            failing: false,
            pause: None,
            pause_changed: false,
        }
    }

    pub(super) fn binding(&mut self, key: Key) {
        self.bindings.insert(key);
    }

    pub(super) fn transaction(&mut self, id: TransactionId) {
        self.transactions.insert(id);
    }

    pub(super) fn alarm(&mut self, id: AlarmId) {
        self.alarms.insert(id);
    }

    pub(super) fn port(&mut self, ifindex: IfIndex) {
        self.ports.insert(ifindex);
    }

    pub(super) fn lost_uplink(&mut self, port: &Port, at: Time) {
        self.lost_uplinks.insert(port.ifindex, (port.clone(), at));
    }

    pub(super) fn has_uplink(&mut self, segment: SegmentId) {
        let lost = self
            .lost_uplinks
            .extract_if(.., |_, it| it.0.segment == segment);
        self.ports.extend(lost.map(|(ifindex, _)| ifindex));
    }

    pub(super) fn port_ended(&mut self) {
        self.ended_port = true;
    }

    pub(super) fn has_ended_port(&self) -> bool {
        self.ended_port
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

    /// How many RELEASEs are to be sent in this turn so far.
    pub(super) fn intended(&self) -> usize {
        self.intents.len()
    }

    /// Returns what held before.
    pub(super) fn set_pause(&mut self, pause: Option<PauseView>) -> Option<PauseView> {
        self.pause_changed |= pause != self.pause;
        std::mem::replace(&mut self.pause, pause)
    }

    pub(super) fn operator_entry(&mut self, entry: OperatorEntry) {
        self.audit(AuditLine::Operator(entry));
    }

    pub(super) fn take_intents(&mut self) -> Vec<Intent> {
        std::mem::take(&mut self.intents)
    }

    /// What became of an intent; written with the next commit.
    fn settle(&mut self, entry: AuditEntry) {
        self.lines.push(AuditLine::Release(entry.clone()));
        self.audit.push(entry);
    }

    /// A line of the audit trail; written with the next commit.
    pub(super) fn audit(&mut self, line: AuditLine) {
        self.lines.push(line);
    }

    /// Lines of the audit trail that could not be written.
    pub(super) fn audit_lost(&self) -> u64 {
        self.trail.lost()
    }

    fn now(&self) -> Moment {
        Moment {
            boot: self.boot.clone(),
            monotonic: clock::monotonic(),
            suspended: self.suspended,
            wall: clock::wall(),
        }
    }

    /// What is written from now on has been told that the host was suspended for `total`. Returns how
    /// much of it is new.
    pub(super) fn suspended_since(&mut self, total: Duration) -> Duration {
        total.saturating_sub(std::mem::replace(&mut self.suspended, total))
    }

    /// Whether it was again since then, by the host's total.
    pub(super) fn was_suspended(&self, total: Duration, tolerance: Duration) -> bool {
        total > self.suspended + tolerance
    }

    fn is_clean(&self) -> bool {
        self.bindings.is_empty()
            && self.transactions.is_empty()
            && self.ports.is_empty()
            && self.alarms.is_empty()
            && self.audit.is_empty()
            && self.lines.is_empty()
            && self.settled.is_empty()
            && !self.pause_changed
    }
}

impl Agent {
    /// Writes what changed, and only then lets the ring forget the records that changed it. `false`:
    /// it could not be written.
    pub(super) fn commit(&mut self) -> bool {
        let written = self.memory.is_clean() || self.write();
        self.memory.ended_port = false;
        // Also if it could not be written: this agent knows what they said, and a ring that runs
        // full would lose more.
        self.ring.consume();
        written
    }

    fn write(&mut self) -> bool {
        // Before the store forgets the intents: a crash between the two makes a line come twice, with
        // the same number, and none is missing.
        let lines = std::mem::take(&mut self.memory.lines);
        self.memory.trail.append(&lines);
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
            let watched = self.watched.get(ifindex);
            let watched = watched.map(|it| (&it.port, it.lost, None));
            let lost = self.memory.lost_uplinks.get(ifindex);
            let lost = lost.map(|(port, at)| (port, 0, Some(*at)));
            let row = watched.or(lost).and_then(|(port, lost, gone_at)| {
                let bridge = self.segments.name(port.segment)?;
                Some(PortRow::new(bridge, port, lost, gone_at, &now))
            });
            batch.port(PortRow::key(*ifindex), row.as_ref());
        }
        for id in &self.memory.alarms {
            let Some(bridge) = self.segments.name(id.segment) else {
                continue;
            };
            let row = self
                .engine
                .saved_alarm(*id)
                .map(|saved| AlarmRow::new(bridge, saved, &now));
            batch.alarm(AlarmRow::key(bridge, *id), row.as_ref());
        }
        for entry in &self.memory.audit {
            batch.intent(entry);
        }
        if self.memory.pause_changed {
            batch.pause(self.memory.pause.as_ref());
        }
        match self.memory.store.commit(&batch) {
            Ok(()) => {
                self.counters.commits += 1;
                self.memory.bindings.clear();
                self.memory.transactions.clear();
                self.memory.ports.clear();
                self.memory.alarms.clear();
                self.memory.audit.clear();
                self.memory.pause_changed = false;
                for xid in std::mem::take(&mut self.memory.settled) {
                    if let Err(error) = self.kernel.forget_order(xid) {
                        warn!(error = %chain(&error), "cannot take back an order");
                    }
                }
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
        let gates = self.engine.grounds(key).iter().map(|finding| AuditGate {
            gate: finding.gate.name().to_owned(),
            verdict: view::verdict(finding.verdict).to_owned(),
            reason: finding.reason.clone(),
        });
        let binding = self.engine.binding(key);
        let probes = binding.map_or(0, |binding| match binding.check {
            Check::Watching(watching) => watching.probes,
            Check::Idle | Check::Glancing => 0,
        });
        let port = self.engine.saved(key).map(|saved| saved.port_name);
        let clocks = Clocks::now();
        let audit = AuditEntry {
            number: self.memory.store.next_intent(),
            ts: now.wall,
            ip: key.ip,
            mac: release.chaddr,
            client_id: release.client_id.as_deref().map(client_id_text),
            segment: self.segments.name(key.segment).unwrap_or("?").to_owned(),
            vlan: key.vlan,
            port: port.unwrap_or_default(),
            server: release.server,
            server_mac: release.server_mac,
            acked: binding.is_some_and(|binding| binding.acked),
            seen_alive: binding.is_some_and(|binding| binding.seen_alive),
            lease_expires_at: binding
                .and_then(|binding| binding.expires)
                .map(|at| clocks.wall(at)),
            port_lost: binding
                .and_then(|binding| binding.lost())
                .map(|(_, loss)| loss),
            silent_since: clocks.wall(release.silent_since),
            silent_for_ms: now
                .monotonic
                .since(release.silent_since)
                .as_millis()
                .try_into()
                .unwrap_or(u64::MAX),
            probes,
            gates: gates.collect(),
            xid,
            verdict: None,
            order: self.engine.ordered_by(key).map(ToString::to_string),
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

    /// What became of an intent is known.
    pub(super) fn settle(&mut self, intent: Intent, outcome: ReleaseOutcome) {
        let key = intent.key;
        let now = clock::monotonic();
        let first = self.engine.binding(key).filter(|it| it.vigil.is_none());
        if let Some(silent_at) = first.and_then(|binding| binding.silent_at)
            && outcome == ReleaseOutcome::Sent
        {
            self.reclaims.took(now.since(silent_at));
        }
        self.memory.settled.push(intent.xid);
        self.memory.settle(AuditEntry {
            verdict: self.kernel.verdict(intent.xid).ok().map(verdict_name),
            outcome: outcome_of(outcome),
            ..intent.audit
        });
        self.engine
            .handle(Event::Released { key, outcome }, clock::monotonic());
    }

    /// Takes over what an earlier agent knew, and what came by while there was none. The ports that
    /// were there at `listed_at` have been told.
    pub(super) async fn remember(
        &mut self,
        remembered: store::Memory,
        left: Left,
        listed_at: Time,
    ) {
        let now = self.memory.now();
        // Of a port that is gone there may be records in the ring: it counts as there until those
        // have been read.
        let gone = self.gone_ports(remembered.ports, &left.slots, &now);
        for (port, gone_at) in gone.values() {
            let event = Event::PortUp(port.clone());
            self.engine.handle(event, now.monotonic);
            if port.role == Role::Uplink && self.uplinks(port.segment).next().is_none() {
                let at = gone_at.unwrap_or(now.monotonic);
                self.memory.lost_uplink(port, at);
            }
        }
        self.memory.gone = (listed_at, gone.keys().copied().collect());
        let transactions = remembered.transactions.into_iter();
        let transactions = transactions.map(|row| row.saved(&now)).collect();
        self.engine
            .restore_transactions(transactions, now.monotonic);
        // What belongs to a bridge that is not followed any more stays in the store as it is.
        let bindings = remembered.bindings.into_iter();
        let mut bindings: Vec<_> = bindings
            .filter_map(|row| {
                let segment = self.segments.id(&row.bridge)?;
                let mut saved = row.saved(segment, &now);
                let plain = self.pvid_of(segment, saved.port);
                if saved.key.vlan != plain.unwrap_or(saved.key.vlan) {
                    // The bridge may have filtered VLANs then in another way, and the VM's frames be on
                    // another one now: uncertain until it is seen with it.
                    let doubt = Doubt::RecordsLost(now.monotonic);
                    saved.doubt.get_or_insert(doubt);
                }
                Some(saved)
            })
            .collect();
        if !bindings.is_empty() {
            info!(
                bindings = bindings.len(),
                "took over what an earlier agent knew"
            );
        }
        for intent in remembered.intents {
            self.settle_left(intent, &left.orders, &mut bindings, now.monotonic);
        }
        self.memory.settled.extend(left.orders.keys());
        let alarms = remembered.alarms.into_iter().filter_map(|row| {
            let segment = self.segments.id(&row.bridge)?;
            Some(row.saved(segment, &now))
        });
        self.engine.restore_alarms(alarms.collect());
        self.engine.restore(bindings, now.monotonic);
        self.carry_out().await;
        // What was seen meanwhile of what is still watched has been kept.
        let wanted = self.armed.watches();
        for watch in left.watches {
            if !wanted.contains(&watch)
                && let Err(error) = self.kernel.disarm(&watch)
            {
                warn!(error = %chain(&error), "cannot stop watching an address");
            }
        }
        self.remembering = false;
        let ports: Vec<IfIndex> = self.watched.keys().copied().collect();
        for port in ports {
            self.apply_exact(port);
            self.check_lost(port).await;
        }
        for slot in left.slots.iter().filter(|s| gone.contains_key(&s.ifindex)) {
            let port = slot.ifindex;
            let known = self.memory.port_lost(port, &gone[&port].0.name);
            let count = slot.lost.wrapping_sub(known);
            if count != 0 {
                self.tell(Event::RecordsLost { port, count }).await;
            }
        }
        self.drain().await;
        self.bury().await;
        self.commit();
    }

    /// Ports that an earlier agent watched and that are not there: those that it wrote down, and those
    /// that it ended too early to write down.
    fn gone_ports(
        &mut self,
        rows: Vec<PortRow>,
        slots: &[PortSlot],
        now: &Moment,
    ) -> BTreeMap<IfIndex, (Port, Option<Time>)> {
        let mut gone = BTreeMap::new();
        for slot in slots {
            let port = Port {
                ifindex: slot.ifindex,
                name: format!("if{}", slot.ifindex),
                segment: slot.segment,
                role: role_of(slot.role).unwrap_or(Role::Vm),
            };
            if self.segments.name(port.segment).is_some() {
                gone.insert(port.ifindex, (port, None));
            }
        }
        for row in rows {
            let segment = self.segments.id(&row.bridge);
            let gone_at = row.gone_at();
            let is_over = gone_at.is_some_and(|at| now.monotonic.since(at) > LOST_UPLINK);
            let (Some(segment), true) = (segment, row.is_of_this_boot(now) && !is_over) else {
                self.memory.port(row.ifindex);
                continue;
            };
            let port = Port {
                ifindex: row.ifindex,
                name: row.name,
                segment,
                role: row.role,
            };
            gone.insert(port.ifindex, (port, gone_at));
        }
        gone.retain(|ifindex, _| !self.watched.contains_key(ifindex));
        gone
    }

    /// Whether this was heard when the ports that are gone were gone already.
    pub(super) fn outlived_ports(&self, at: Time) -> bool {
        let (listed_at, gone) = &self.memory.gone;
        !gone.is_empty() && at > *listed_at
    }

    /// All that the ports that are gone had to say has been heard.
    pub(super) async fn bury(&mut self) {
        let (_, gone) = &mut self.memory.gone;
        for port in std::mem::take(gone) {
            self.memory.port(port);
            let loss = PortLoss::Unseen;
            Box::pin(self.tell(Event::PortDown { port, loss })).await;
        }
    }

    /// An intent of an earlier agent that ended before it wrote down what became of it: the kernel
    /// half has the order, and in it what it did with the frame. An order is there before its intent is
    /// written down, and until its outcome is; nothing of an agent that has ended is still on its way.
    fn settle_left(
        &mut self,
        intent: AuditEntry,
        orders: &BTreeMap<u32, EmitOrder>,
        bindings: &mut [Saved],
        now: Time,
    ) {
        let mut audit = AuditOutcome::Unknown;
        if let Some(order) = orders.get(&intent.xid) {
            let outcome = match order.verdict {
                VERDICT_SENT => ReleaseOutcome::Sent,
                VERDICT_VETOED => ReleaseOutcome::Vetoed,
                _ => ReleaseOutcome::Failed,
            };
            audit = outcome_of(outcome);
            let segment = self.segments.id(&intent.segment);
            let same = |saved: &&mut Saved| {
                let key = saved.key;
                Some(key.segment) == segment && (key.vlan, key.ip) == (intent.vlan, intent.ip)
            };
            if let Some(saved) = bindings.iter_mut().find(same) {
                saved.settle(outcome, Time::from_nanos(order.silent_since_ns), now);
            }
        }
        info!(ip = %intent.ip, outcome = ?audit, "an earlier agent ended while it was releasing");
        let order = orders.get(&intent.xid);
        self.memory.settle(AuditEntry {
            verdict: order.map(|order| verdict_name(order.verdict)),
            outcome: audit,
            ..intent
        });
    }
}

fn verdict_name(verdict: u8) -> String {
    match verdict {
        VERDICT_SENT => "sent",
        VERDICT_VETOED => "vetoed",
        VERDICT_UNWATCHED => "unwatched",
        _ => "none",
    }
    .to_owned()
}

fn outcome_of(outcome: ReleaseOutcome) -> AuditOutcome {
    match outcome {
        ReleaseOutcome::Sent => AuditOutcome::Sent,
        ReleaseOutcome::Vetoed => AuditOutcome::Vetoed,
        ReleaseOutcome::Failed | ReleaseOutcome::Overtaken => AuditOutcome::Failed,
        ReleaseOutcome::DryRun => AuditOutcome::DryRun,
    }
}
