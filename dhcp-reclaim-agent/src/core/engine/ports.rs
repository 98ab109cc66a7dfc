//! Ports and bridges: what the host plugs in, takes away, and did not hear.

use std::time::Duration;

use super::{Engine, PortInfo, REPORT_EVERY, RETRY};
use crate::core::{
    binding::{Binding, Check, Doubt},
    gates::Gate,
    types::{
        Action, IfIndex, Key, MacAddr, NoticeKind, Port, PortLoss, Role, SegmentId, State, Time,
    },
};

impl Engine {
    pub(super) fn port_up(&mut self, port: Port, now: Time) {
        let settle = now + self.policy.settle;
        let known = self.ports.get(&port.ifindex);
        let is_new = known.is_none_or(|info| info.port.segment != port.segment);
        let segment = self.segment(port.segment);
        if is_new {
            segment.watched_at = now;
        }
        segment.had_uplink |= port.role == Role::Uplink;
        segment.had_aside |= port.role == Role::Aside;
        if port.role == Role::Uplink && segment.uplinks.insert(port.ifindex) {
            segment.settled_at = segment.settled_at.max(settle);
        }
        self.notify(
            now,
            NoticeKind::PortUp,
            None,
            None,
            Some(port.name.clone()),
            match port.role {
                Role::Vm => "watched".to_owned(),
                Role::Uplink => "watched as an uplink".to_owned(),
                Role::Aside => "watched for VMs that move there: no VM's port by --port".to_owned(),
            },
        );
        if port.role == Role::Vm {
            self.look_for_imports(port.segment, now);
        }
        let ifindex = port.ifindex;
        let known = self.ports.get_mut(&ifindex);
        let Some(info) = known else {
            self.ports.insert(ifindex, PortInfo::new(port));
            self.plugged_in_again(ifindex, now);
            return;
        };
        let renamed = info.port.name != port.name;
        info.port = port;
        info.dark = false;
        let keys: Vec<Key> = info.bindings.iter().copied().collect();
        for key in keys {
            if renamed {
                self.save(key);
            }
            if is_new {
                // Its lease belongs to the segment that it was taken on.
                self.end(
                    key,
                    State::Moved,
                    "its port went to another bridge".to_owned(),
                    now,
                );
            } else {
                self.watch_again(key, now);
            }
        }
    }

    /// Without its bridge nobody can be asked, and whoever is plugged in anew is not heard: the same as
    /// after a time in which no agent ran.
    pub(super) fn bridge(&mut self, id: SegmentId, there: bool, now: Time) {
        let segment = self.segment(id);
        if segment.gone != there {
            return;
        }
        segment.gone = !there;
        self.deafen(Some(id));
        self.look_anew(id, now);
        if !there {
            let reason = format!("{}: its bridge is gone", Gate::Settled);
            self.notify(now, NoticeKind::Held, None, None, None, reason);
        }
    }

    pub(super) fn unheard(&mut self, id: SegmentId, macs: &[MacAddr], now: Time) {
        self.add("ports_unheard", 1);
        self.segment(id).watched_at = now;
        let spoke = macs.iter().flat_map(|mac| self.index.of_mac(id, *mac));
        for key in spoke.collect::<Vec<Key>>() {
            let Some(binding) = self.bindings.get_mut(&key).filter(|it| it.is_live()) else {
                continue;
            };
            binding.unheard_at = Some(now);
            if let Check::Watching(watching) = &mut binding.check {
                watching.deaf |= watching.lost.is_some();
            }
            self.restart_hold(key, now);
        }
    }

    /// Whoever lost its port may have started at another one unheard; of one segment, or of all.
    fn deafen(&mut self, segment: Option<SegmentId>) {
        let of_segment =
            |(key, _): &(&Key, &mut Box<Binding>)| segment.is_none_or(|id| key.segment == id);
        for (_, binding) in self.bindings.iter_mut().filter(of_segment) {
            if let Check::Watching(watching) = &mut binding.check {
                watching.deaf |= watching.lost.is_some();
            }
        }
    }

    pub(super) fn segment_held(&mut self, id: SegmentId, reason: Option<String>, now: Time) {
        let segment = self.segment(id);
        if segment.held == reason {
            return;
        }
        segment.held.clone_from(&reason);
        self.look_anew(id, now);
        if let Some(reason) = reason {
            let reason = format!("{}: {reason}", Gate::Confirmed);
            self.notify(now, NoticeKind::Held, None, None, None, reason);
        }
    }

    /// What is told from now on may have been so for long: the same as after a start.
    pub(super) fn overslept(&mut self, suspended: Duration, now: Time) {
        self.add("overslept", 1);
        self.listens_since = now;
        // The server's clock went on meanwhile.
        let sooner = u64::try_from(suspended.as_nanos()).unwrap_or(u64::MAX);
        for binding in self.bindings.values_mut() {
            if let Some(end) = &mut binding.expires {
                *end = Time::from_nanos(end.as_nanos().saturating_sub(sooner));
            }
        }
        self.deafen(None);
        let segments: Vec<SegmentId> = self.segments.keys().copied().collect();
        for segment in segments {
            self.look_anew(segment, now);
        }
        if sooner > 0 {
            let keys: Vec<Key> = self.bindings.keys().copied().collect();
            for key in keys {
                self.save(key);
            }
        }
    }

    /// What was seen of a segment until now may have been seen as another VLAN's.
    pub(super) fn look_anew(&mut self, id: SegmentId, now: Time) {
        let settle = now + self.policy.settle;
        let segment = self.segment(id);
        segment.settled_at = segment.settled_at.max(settle);
        self.restart_holds(id, now);
    }

    fn restart_holds(&mut self, id: SegmentId, now: Time) {
        let of_segment = |key: &&Key| key.segment == id;
        let keys: Vec<Key> = self.bindings.keys().filter(of_segment).copied().collect();
        for key in keys {
            self.restart_hold(key, now);
        }
    }

    /// Its VMs' leases belong to the VLAN that they were taken on.
    pub(super) fn pvid_changed(&mut self, port: IfIndex, now: Time) {
        let Some(info) = self.ports.get(&port) else {
            return;
        };
        let segment = info.port.segment;
        let keys: Vec<Key> = info.bindings.iter().copied().collect();
        let transactions: Vec<_> = info.transactions.iter().copied().collect();
        let is_new = keys.is_empty() && transactions.is_empty() && info.port.role == Role::Vm;
        for (xid, mac) in transactions {
            self.close_transaction(port, xid, mac);
        }
        for key in keys {
            let reason = "its port's untagged frames belong to another VLAN now".to_owned();
            self.end(key, State::Moved, reason, now);
        }
        if is_new {
            // As tools plug in a VM: nobody had a lease by it, and who it is says so when asked again.
            self.segment(segment).watched_at = now;
        } else {
            self.look_anew(segment, now);
        }
    }

    /// A link that had been detached is a port again, perhaps of another bridge.
    fn plugged_in_again(&mut self, port: IfIndex, now: Time) {
        let place = self.ports.get(&port).map(|info| &info.port);
        let segment = place.map(|port| port.segment);
        let is_vms = place.is_some_and(|port| port.role == Role::Vm);
        for key in self.detached.remove(&port).unwrap_or_default() {
            let Some(binding) = self
                .bindings
                .get(&key)
                .filter(|b| b.is_live() && b.port == port)
            else {
                continue;
            };
            if segment != Some(binding.key.segment) {
                self.end(
                    key,
                    State::Moved,
                    "its port went to another bridge".to_owned(),
                    now,
                );
                continue;
            }
            if !is_vms {
                let reason = "its port is no VM's port any more".to_owned();
                self.end(key, State::Moved, reason, now);
                continue;
            }
            if let Some(info) = self.ports.get_mut(&port) {
                info.bindings.insert(key);
            }
            self.watch_again(key, now);
        }
    }

    pub(super) fn port_down(&mut self, port: IfIndex, loss: PortLoss, now: Time) {
        let Some(info) = self.ports.get_mut(&port) else {
            if loss == PortLoss::Deleted {
                self.deleted_at_last(port, now);
            }
            return;
        };
        let keys: Vec<Key> = info.bindings.iter().copied().collect();
        let name = info.port.name.clone();
        let segment = info.port.segment;
        match loss {
            // It is still a port: what comes back by it is known.
            PortLoss::CarrierLost | PortLoss::LinkDown => info.dark = true,
            PortLoss::Deleted | PortLoss::Detached | PortLoss::Unseen => {
                let transactions: Vec<_> = info.transactions.iter().copied().collect();
                for (xid, mac) in transactions {
                    self.close_transaction(port, xid, mac);
                }
                self.ports.remove(&port);
                if loss != PortLoss::Deleted && !keys.is_empty() {
                    // A port that never comes back keeps no more than what still lives.
                    let bindings = &self.bindings;
                    self.detached.retain(|_, keys| {
                        keys.retain(|key| bindings.get(key).is_some_and(|it| it.is_live()));
                        !keys.is_empty()
                    });
                    self.detached.insert(port, keys.iter().copied().collect());
                }
                if let Some(segment) = self.segments.get_mut(&segment)
                    && segment.uplinks.remove(&port)
                {
                    segment.settled_at = segment.settled_at.max(now + self.policy.settle);
                }
            }
        }
        let reason = format!("{}, {} bindings", loss_text(loss), keys.len());
        self.notify(now, NoticeKind::PortLost, None, None, Some(name), reason);
        for key in keys {
            self.lose_port(key, loss, now);
        }
    }

    /// What had been detached is gone now: its VM does not run on, on another bridge.
    fn deleted_at_last(&mut self, port: IfIndex, now: Time) {
        for key in self.detached.remove(&port).unwrap_or_default() {
            let binding = self.bindings.get(&key);
            if binding.is_some_and(|binding| binding.port == port) {
                self.lose_port(key, PortLoss::Deleted, now);
            }
        }
    }

    /// The fast road: the port is gone, so the whole segment is asked at once.
    pub(super) fn lose_port(&mut self, key: Key, loss: PortLoss, now: Time) {
        let Some(binding) = self
            .bindings
            .get_mut(&key)
            .filter(|binding| binding.is_live())
        else {
            return;
        };
        if binding.state == State::Requested {
            // Nothing says that it is a lease; its time limit goes on.
            return;
        }
        if binding.state == State::Releasing {
            return;
        }
        let mac = binding.chaddr;
        let closing = match &mut binding.check {
            Check::Watching(watching) => {
                // What nobody heard since an earlier loss stays unheard.
                watching.deaf &= watching.lost.is_some();
                // It may have been seen at its new port already, or not yet at its own.
                watching.lost = Some((now, loss));
                watching.closing = true;
                true
            }
            Check::Glancing | Check::Idle => false,
        };
        let own_port = Some(binding.port);
        self.set_state(
            key,
            State::Silent,
            NoticeKind::Silent,
            format!("its port: {}", loss_text(loss)),
            now,
        );
        if closing {
            self.actions.push_back(Action::Look { key, mac, own_port });
            self.schedule(key, now + RETRY);
        } else {
            self.search(key, (now, loss), now);
        }
    }

    /// Asks for it everywhere: its port is gone.
    pub(super) fn search(&mut self, key: Key, lost: (Time, PortLoss), now: Time) {
        let was_deaf = self.bindings.get(&key).is_some_and(|it| it.was_deaf());
        self.begin_watch(key, Some(lost), true, now);
        let gone = self.is_gone(key.segment);
        let listens_since = self.listens_since;
        if let Some(binding) = self.bindings.get_mut(&key)
            && (was_deaf || gone || binding.last_seen < binding.unheard_at.max(Some(listens_since)))
            && let Check::Watching(watching) = &mut binding.check
        {
            // It may have been started at another port while nobody listened there.
            watching.deaf = true;
        }
        self.send_probes(key, now);
    }

    /// The port is back: whatever was counted against the VM begins anew.
    fn watch_again(&mut self, key: Key, now: Time) {
        let binding = self.bindings.get_mut(&key);
        let Some(binding) = binding.filter(|binding| binding.is_live()) else {
            return;
        };
        if binding.lost().is_some() && binding.state != State::Releasing {
            // Whoever opened the port may be another VM, and this one elsewhere: where it was seen until
            // now is looked at before silence begins anew.
            if let Check::Watching(watching) = &mut binding.check {
                watching.lost = None;
                watching.closing = false;
            }
            self.restart_hold(key, now);
        }
    }

    pub(super) fn records_lost(&mut self, port: IfIndex, lost: u32, now: Time) {
        let Some(info) = self.ports.get_mut(&port) else {
            return;
        };
        info.lost_at = Some(now);
        let keys: Vec<Key> = info.bindings.iter().copied().collect();
        info.lost = info.lost.saturating_add(lost);
        if info
            .lost_told
            .is_none_or(|at| now.since(at) >= REPORT_EVERY)
        {
            info.lost_told = Some(now);
            let count = std::mem::take(&mut info.lost);
            let name = info.port.name.clone();
            self.notify(
                now,
                NoticeKind::RecordsLost,
                None,
                None,
                Some(name),
                format!("{count} records lost; its bindings are uncertain until seen again"),
            );
        }
        self.add("records_lost", u64::from(lost));
        for key in keys {
            if let Some(binding) = self.bindings.get_mut(&key) {
                // Only an ACK that is clear ends these, so that they stay.
                if !matches!(binding.doubt, Some(Doubt::Ambiguous | Doubt::Contested)) {
                    binding.doubt = Some(Doubt::RecordsLost(now));
                }
                self.save(key);
            }
            self.look_soon(key, now);
        }
    }
}

fn loss_text(loss: PortLoss) -> &'static str {
    match loss {
        PortLoss::Deleted => "deleted",
        PortLoss::CarrierLost => "carrier lost",
        PortLoss::LinkDown => "link down",
        PortLoss::Detached => "detached from the bridge",
        PortLoss::Unseen => "gone when the agent started",
    }
}
