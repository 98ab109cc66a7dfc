//! Ports come and go: what is watched, since when, and whether the programs are still there.

use std::collections::{BTreeMap, BTreeSet};

use futures::FutureExt as _;
use tracing::{debug, info, warn};

use super::{Agent, Watched, chain};
use crate::{
    clock,
    core::{Event, IfIndex, MacAddr, Port, PortLoss, Role, SegmentId, types::LATE},
    kernel::{AttachedHook, BATCH, KernelError},
    ports::{PortEvent, VlanFiltering, learned_macs},
};

/// DHCP records a second, and at once, of an uplink: many hosts speak there.
const UPLINK_RECORDS: (u16, u16) = (5_000, 10_000);

impl Agent {
    /// All that are there, so that a host that starts many VMs waits for one commit, not for many.
    pub(super) async fn port_events(&mut self, first: PortEvent) -> anyhow::Result<()> {
        self.port_event(first).await;
        for _ in 1..BATCH {
            let Some(event) = self.ports.next().now_or_never() else {
                break;
            };
            // To attach many takes as long as it takes, and is no time in which nobody looked.
            self.turn().await;
            self.port_event(event?).await;
        }
        Ok(())
    }

    pub(super) async fn port_event(&mut self, event: PortEvent) {
        match event {
            PortEvent::BridgeUp { ifindex, name, mac } => {
                info!(bridge = name, ifindex, %mac, "bridge is there");
                self.segments.up(ifindex, &name, mac);
                if let Some(segment) = self.segments.id(&name) {
                    let there = true;
                    self.tell(Event::Bridge { segment, there }).await;
                }
                // The one before it may have filtered VLANs.
                self.bridge_vlans(ifindex, VlanFiltering::Off).await;
            }
            PortEvent::BridgeMac { ifindex, mac } => self.segments.set_mac(ifindex, mac),
            PortEvent::BridgeVlans { ifindex, filtering } => {
                self.bridge_vlans(ifindex, filtering).await;
            }
            PortEvent::Vlans { ifindex, vlans } => self.vlans_of(ifindex, vlans).await,
            PortEvent::BridgeDown { ifindex, name } => {
                warn!(bridge = name, ifindex, "bridge is gone: waiting for it");
                self.segments.down(ifindex);
                self.vlans.forget(ifindex);
                if let Some(segment) = self.segments.id(&name) {
                    let there = false;
                    self.tell(Event::Bridge { segment, there }).await;
                }
            }
            PortEvent::PortUp(port) => self.port_up(port).await,
            PortEvent::PortDown { ifindex, loss } => self.port_down(ifindex, loss).await,
            PortEvent::Resynced => {
                warn!(
                    resyncs = self.ports.resyncs(),
                    "link messages were lost; all links read anew"
                );
            }
        }
    }

    async fn port_up(&mut self, port: Port) {
        let Some(segment) = self.segments.by_ifindex(port.segment) else {
            return;
        };
        if self.memory.has_ended_port() {
            // What the VM says by its next port must not seem to come from somebody else.
            self.commit();
        }
        self.watch(Port { segment, ..port }).await;
    }

    pub(super) async fn watch(&mut self, port: Port) {
        let (rate, burst) = self.record_limits(port.role);
        let hook = match self
            .expedite
            .during(|| self.kernel.watch(&port, rate, burst))
        {
            Ok(hook) => hook,
            Err(error) => return self.cannot_watch(port, &error),
        };
        debug!(port = port.name, role = ?port.role, hook = hook.name(), "watched");
        let ifindex = port.ifindex;
        let was_blind = self.blind.remove(&ifindex).is_some();
        let late = clock::monotonic().since(self.ports_since) > LATE;
        if (was_blind || late) && !self.remembering {
            self.late.insert(ifindex, port.segment);
        }
        // A slot that was the port's already may have lost records that nobody heard of; a new one
        // counts from zero.
        let total = self.kernel.port_lost(ifindex).unwrap_or(0);
        let lost = match self.watched.get(&ifindex) {
            Some(watched) => watched.lost,
            None => self.memory.port_lost(ifindex, &port.name).min(total),
        };
        self.watched.insert(
            ifindex,
            Watched {
                port: port.clone(),
                hook,
                lost,
            },
        );
        self.memory.port(ifindex);
        if port.role == Role::Uplink {
            self.memory.has_uplink(port.segment);
        }
        self.apply_pvid(ifindex);
        if !self.remembering {
            self.apply_exact(ifindex);
        }
        self.tell(Event::PortUp(port)).await;
    }

    async fn port_down(&mut self, ifindex: IfIndex, loss: PortLoss) {
        // The last words of its VM are in the ring.
        self.drain().await;
        self.check_lost(ifindex).await;
        match loss {
            PortLoss::CarrierLost | PortLoss::LinkDown => {}
            PortLoss::Deleted | PortLoss::Detached | PortLoss::Unseen => {
                self.memory.port_ended();
                self.kernel.unwatch(ifindex);
                if let Some(Watched { port, .. }) = self.watched.remove(&ifindex)
                    && port.role == Role::Uplink
                    && self.uplinks(port.segment).next().is_none()
                {
                    self.memory.lost_uplink(&port, clock::monotonic());
                }
                self.blind.remove(&ifindex);
                self.vlans.forget(ifindex);
                self.memory.port(ifindex);
            }
        }
        self.tell(Event::PortDown {
            port: ifindex,
            loss,
        })
        .await;
    }

    pub(super) async fn check_lost(&mut self, ifindex: IfIndex) {
        let Some(watched) = self.watched.get_mut(&ifindex) else {
            return;
        };
        let Some(total) = self
            .kernel
            .port_lost(ifindex)
            .filter(|total| *total != watched.lost)
        else {
            return;
        };
        let lost = total.wrapping_sub(watched.lost);
        watched.lost = total;
        self.memory.port(ifindex);
        Box::pin(self.tell(Event::RecordsLost {
            port: ifindex,
            count: lost,
        }))
        .await;
    }

    /// Others remove filters from a clsact that they share with us (Calico and OVS do): before an
    /// answer is waited for, they are there.
    pub(super) fn put_back(&mut self, port: IfIndex) {
        let Some(watched) = self.watched.get(&port) else {
            return;
        };
        if watched.hook != AttachedHook::Clsact || self.kernel.in_place(port) {
            return;
        }
        let watched = watched.port.clone();
        let (rate, burst) = self.record_limits(watched.role);
        let put = self.kernel.watch(&watched, rate, burst);
        if let Err(KernelError::PortGone { .. }) = put {
            // Nobody took them: that it is gone is told soon.
            return;
        }
        self.late.insert(port, watched.segment);
        match put {
            Ok(_) => warn!(
                port = watched.name,
                "somebody took a program away: it is put back"
            ),
            Err(error) => self.cannot_watch(watched, &error),
        }
    }

    fn cannot_watch(&mut self, port: Port, error: &KernelError) {
        self.counters.watch_failures += 1;
        warn!(port = port.name, error = %chain(error), "cannot watch, and tries again");
        self.watched.remove(&port.ifindex);
        self.blind.insert(port.ifindex, port);
    }

    /// At all ports of these segments.
    pub(super) fn put_all_back(&mut self, segments: &BTreeSet<SegmentId>) {
        let ports = self.watched.values().map(|watched| &watched.port);
        let ports = ports.filter(|port| segments.contains(&port.segment));
        for port in ports.map(|port| port.ifindex).collect::<Vec<_>>() {
            self.put_back(port);
        }
    }

    /// Who spoke at the ports that were not heard, the bridge has learned: it may be one of those who are
    /// searched for.
    pub(super) async fn hear_late(&mut self) {
        if self.late.is_empty() {
            return;
        }
        let late = std::mem::take(&mut self.late);
        let mut spoke: BTreeMap<SegmentId, BTreeSet<MacAddr>> = BTreeMap::new();
        for segment in late.values() {
            spoke.entry(*segment).or_default();
        }
        let mut complete = false;
        match learned_macs().await {
            Ok(learned) => {
                complete = !learned.cut && late.keys().all(|port| !learned.full.contains(port));
                for (port, _, mac) in learned.macs {
                    if let Some(macs) = late.get(&port).and_then(|it| spoke.get_mut(it)) {
                        macs.insert(mac);
                    }
                }
            }
            Err(error) => {
                warn!(error = %chain(&error), "what the bridges have learned is not known");
            }
        }
        if !complete {
            // Anybody who is searched for may be among those that are missing.
            for (segment, mac) in self.armed.macs() {
                if let Some(macs) = spoke.get_mut(&segment) {
                    macs.insert(mac);
                }
            }
        }
        for (segment, macs) in spoke {
            let macs = macs.into_iter().collect();
            self.tell(Event::Unheard { segment, macs }).await;
        }
    }

    pub(super) fn ports_of(&self, segment: SegmentId) -> impl Iterator<Item = &Port> {
        let watched = self.watched.values().map(|watched| &watched.port);
        watched.filter(move |port| port.segment == segment)
    }

    pub(super) fn uplinks(&self, segment: SegmentId) -> impl Iterator<Item = &Port> {
        self.ports_of(segment)
            .filter(|port| port.role == Role::Uplink)
    }

    pub(super) fn record_limits(&self, role: Role) -> (u16, u16) {
        match role {
            Role::Vm | Role::Aside => (self.settings.record_rate, self.settings.record_burst),
            Role::Uplink => UPLINK_RECORDS,
        }
    }
}
