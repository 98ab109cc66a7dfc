//! The loop: it owns the core, tells it what happened, and carries out what it wants.

mod armed;
mod epochs;
mod memory;
mod query;
mod segments;
mod view;

use std::{
    collections::BTreeMap, net::Ipv4Addr, sync::Arc, sync::atomic::Ordering, time::Duration,
};

use anyhow::Context as _;
use dhcp_reclaim_ebpf::abi::{
    EMIT_EGRESS, EMIT_INGRESS, EmitOrder, Record, VERDICT_NONE, VERDICT_SENT, VERDICT_VETOED,
};
use futures::FutureExt as _;
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::{debug, error, info, trace, warn};

use self::{
    armed::{Armed, Scope},
    epochs::Epochs,
    memory::Memory,
    query::Queries,
    segments::Segments,
    view::Clocks,
};
use crate::{
    clock,
    config::{self, Settings},
    control::{ControlRequest, ControlServer, ControlStats, EventLog, REQUEST_QUEUE, StatsView},
    core::{
        Action, Engine, Event, Evidence, IfIndex, Key, MacAddr, Notice, NoticeKind, Port, PortLoss,
        Probe, ProbeVia, Release, ReleaseOutcome, Role, Time,
    },
    emit::{PacketSocket, PrivateLink},
    errors::chain,
    kernel::{self, AttachedHook, BATCH, Kernel, LoadOptions, RecordRing, watch_ip, watch_mac},
    packet::{arp, release::release_frame},
    ports::{PortEvent, PortWatcher, local_addresses},
    store::Store,
};

/// The coarse tier's clock, at its slowest: how finely "heard lately" is known.
const EPOCH_MAX: Duration = Duration::from_secs(1);
const EPOCH_MIN: Duration = Duration::from_millis(50);
/// DHCP records a second, and at once, of an uplink: many hosts speak there.
const UPLINK_RECORDS: (u16, u16) = (5_000, 10_000);
/// Batches that are read before something else gets its turn.
const DRAIN: usize = 64;
/// Option 56 of every RELEASE: who sent it, for the server's log.
const MESSAGE: &str = concat!("dhcp-reclaim ", env!("CARGO_PKG_VERSION"));

/// Runs the agent until SIGTERM or SIGINT.
pub fn run(settings: Settings) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(async { Agent::start(settings).await?.run().await })
}

struct Agent {
    settings: Settings,
    engine: Engine,
    kernel: Kernel,
    ring: RecordRing,
    requests: mpsc::Receiver<ControlRequest>,
    control: Arc<ControlStats>,
    memory: Memory,
    ports: PortWatcher,
    link: PrivateLink,
    socket: PacketSocket,
    log: EventLog,
    segments: Segments,
    /// Ports that are watched.
    watched: BTreeMap<IfIndex, Watched>,
    /// Ports where no program could be attached: whatever lives there is not seen.
    blind: BTreeMap<IfIndex, Port>,
    armed: Armed,
    epochs: Epochs,
    /// Somebody waits to hear the uplink: a new epoch tells old frames from new ones.
    epoch_wanted: bool,
    queries: Queries,
    counters: Counters,
    started_at: jiff::Timestamp,
}

#[derive(Debug)]
struct Watched {
    port: Port,
    hook: AttachedHook,
    lost: u32,
}

/// What the loop itself counts; the core and the kernel half have their own.
#[derive(Debug, Default)]
struct Counters {
    malformed_records: u64,
    probes_failed: u64,
    controls_failed: u64,
    watch_failures: u64,
    arm_failures: u64,
    store_failures: u64,
    commits: u64,
}

impl Agent {
    async fn start(settings: Settings) -> anyhow::Result<Self> {
        // First, since it is what tells two agents apart.
        let server = ControlServer::bind(&settings.control)?;
        let boot = clock::boot_id().context("cannot read the boot's id")?;
        let (store, remembered) = Store::open(&settings.state, clock::wall())?;
        let kernel_debug = tracing::enabled!(tracing::Level::DEBUG);
        let mut kernel = Kernel::load(&LoadOptions {
            bpffs: settings.bpffs.clone(),
            hook: match settings.hook {
                config::Hook::Tc => kernel::Hook::Tc,
                config::Hook::Xdp => kernel::Hook::Xdp,
            },
            debug: kernel_debug,
            ..LoadOptions::default()
        })?;
        kernel.clear_orders()?;
        for key in kernel.armed()? {
            kernel.disarm(&key)?;
        }
        let ring = kernel.ring()?;
        if kernel_debug {
            follow_kernel_log(&mut kernel)?;
        }
        let (connection, handle, _) =
            rtnetlink::new_connection().context("cannot open a netlink socket")?;
        tokio::spawn(connection);
        let link = PrivateLink::create(&handle).await?;
        kernel.attach_emit(link.ifindex())?;
        let socket = PacketSocket::open()?;
        let (present, ports) = PortWatcher::start(settings.port_rules()).await?;
        let (sender, requests) = mpsc::channel(REQUEST_QUEUE);
        let control = server.stats();
        tokio::spawn(server.run(sender));
        let now = clock::monotonic();
        let mut agent = Self {
            engine: Engine::new(settings.policy(), now),
            kernel,
            ring,
            requests,
            control,
            memory: Memory::new(store, boot),
            started_at: clock::wall(),
            ports,
            link,
            socket,
            log: EventLog::default(),
            segments: Segments::new(&settings.bridges),
            watched: BTreeMap::new(),
            blind: BTreeMap::new(),
            armed: Armed::default(),
            epochs: Epochs::default(),
            epoch_wanted: false,
            queries: Queries::default(),
            counters: Counters::default(),
            settings,
        };
        agent.next_epoch();
        for row in &remembered.ports {
            agent.memory.knew_port(row);
        }
        for event in present {
            agent.port_event(event).await;
        }
        agent.remember(remembered).await;
        let stale = agent.kernel.forget_unwatched()?;
        if !stale.is_empty() {
            info!(
                ports = stale.len(),
                "let go of ports that an earlier agent watched"
            );
        }
        Ok(agent)
    }

    async fn run(mut self) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        // Well below `silence`, or a busy VM would seem silent between two epochs.
        let epoch = (self.settings.silence / 4).clamp(EPOCH_MIN, EPOCH_MAX);
        let mut tick = interval(epoch);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        eprintln!(
            "dhcp-reclaim: ready on {} ({} ports), control socket {}",
            self.settings.bridges.join(", "),
            self.watched.len(),
            self.settings.control.display()
        );
        for bridge in self.segments.absent() {
            warn!(bridge, "not there yet: waiting for it");
        }
        loop {
            if std::mem::take(&mut self.epoch_wanted) {
                self.next_epoch();
            }
            let wait = self
                .engine
                .poll_timeout()
                .map_or(Duration::from_secs(3600), |at| at.since(clock::monotonic()));
            tokio::select! {
                // What happened comes before what is due because nothing happened.
                biased;
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                event = self.ports.next() => self.port_events(event?).await?,
                ready = self.ring.ready() => {
                    ready?;
                    self.read_batch().await;
                    // Where there is always a record to read, people are still answered: this
                    // loop shares its thread with the tasks that hear them.
                    tokio::task::yield_now().await;
                    if let Ok(request) = self.requests.try_recv() {
                        self.answer(request);
                    }
                }
                () = sleep(wait) => {
                    self.drain().await;
                    self.engine.handle_timeout(clock::monotonic());
                    self.carry_out().await;
                }
                () = self.queries.readable() => self.read_answers().await,
                Some(request) = self.requests.recv() => self.answer(request),
                _ = tick.tick() => self.tick().await,
            }
            self.commit();
        }
        info!("stopping");
        self.commit();
        if self.settings.detach_on_exit {
            self.kernel.unpin_all()?;
            return Ok(());
        }
        // What is left goes on listening for the next agent, and nobody looks closer until then.
        for port in self.watched.keys() {
            self.kernel.set_exact(*port, false);
        }
        for key in self.kernel.armed()? {
            self.kernel.disarm(&key)?;
        }
        Ok(())
    }

    async fn tick(&mut self) {
        self.next_epoch();
        for port in std::mem::take(&mut self.blind).into_values() {
            self.watch(port).await;
        }
        let ports: Vec<IfIndex> = self.watched.keys().copied().collect();
        for port in ports {
            self.check_lost(port).await;
        }
        self.expire_queries().await;
    }

    fn next_epoch(&mut self) {
        match self.kernel.advance_epoch() {
            Ok(epoch) => self.epochs.begin(epoch, clock::monotonic()),
            Err(error) => error!(%error, "cannot advance the epoch"),
        }
    }

    // ---- what happened -----------------------------------------------------------------------

    async fn tell(&mut self, event: Event) {
        self.engine.handle(event, clock::monotonic());
        self.carry_out().await;
    }

    async fn record(&mut self, record: &Record) {
        match kernel::message(record) {
            Ok(message) => {
                trace!(?message, "record");
                self.tell(Event::Message(message)).await;
            }
            Err(error) => {
                self.counters.malformed_records += 1;
                debug!(%error, ifindex = record.ifindex, "record refused");
                // What could not be read may have mattered.
                let port = record.ifindex;
                self.tell(Event::RecordsLost { port, count: 1 }).await;
            }
        }
    }

    /// Reads at most a batch of records; their places in the ring are theirs until the commit.
    async fn read_batch(&mut self) -> bool {
        for _ in 0..BATCH {
            let Some(record) = self.ring.read() else {
                return false;
            };
            Box::pin(self.record(&record)).await;
        }
        true
    }

    /// Whatever the kernel half has seen by now is heard before anything is decided.
    async fn drain(&mut self) {
        for _ in 0..DRAIN {
            if !self.read_batch().await {
                return;
            }
            self.commit();
        }
    }

    /// All that are there, so that a host that starts many VMs waits for one commit, not for many.
    async fn port_events(&mut self, first: PortEvent) -> anyhow::Result<()> {
        self.port_event(first).await;
        for _ in 1..BATCH {
            let Some(event) = self.ports.next().now_or_never() else {
                break;
            };
            self.port_event(event?).await;
        }
        Ok(())
    }

    async fn port_event(&mut self, event: PortEvent) {
        match event {
            PortEvent::BridgeUp { ifindex, name, mac } => {
                info!(bridge = name, ifindex, %mac, "bridge is there");
                self.segments.up(ifindex, &name, mac);
            }
            PortEvent::BridgeMac { ifindex, mac } => self.segments.set_mac(ifindex, mac),
            PortEvent::BridgeDown { ifindex, name } => {
                warn!(bridge = name, ifindex, "bridge is gone: waiting for it");
                self.segments.down(ifindex);
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
        self.watch(Port { segment, ..port }).await;
    }

    async fn watch(&mut self, port: Port) {
        let (rate, burst) = self.record_limits(port.role);
        let hook = match self.kernel.watch(&port, rate, burst) {
            Ok(hook) => hook,
            Err(error) => {
                self.counters.watch_failures += 1;
                warn!(port = port.name, error = %chain(&error), "cannot watch, and tries again");
                self.watched.remove(&port.ifindex);
                self.blind.insert(port.ifindex, port);
                return;
            }
        };
        debug!(port = port.name, role = ?port.role, hook = hook.name(), "watched");
        let ifindex = port.ifindex;
        self.blind.remove(&ifindex);
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
        self.apply_exact(ifindex);
        self.tell(Event::PortUp(port)).await;
    }

    async fn port_down(&mut self, ifindex: IfIndex, loss: PortLoss) {
        // The last words of its VM are in the ring.
        self.drain().await;
        self.check_lost(ifindex).await;
        match loss {
            PortLoss::CarrierLost | PortLoss::LinkDown => {}
            PortLoss::Deleted | PortLoss::Detached => {
                self.kernel.unwatch(ifindex);
                self.watched.remove(&ifindex);
                self.blind.remove(&ifindex);
                self.memory.port(ifindex);
            }
        }
        self.tell(Event::PortDown {
            port: ifindex,
            loss,
        })
        .await;
    }

    async fn check_lost(&mut self, ifindex: IfIndex) {
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

    // ---- what is to be done ------------------------------------------------------------------

    async fn carry_out(&mut self) {
        loop {
            self.carry_out_all().await;
            let intents = self.memory.take_intents();
            if intents.is_empty() {
                return;
            }
            // Before the first of the frames, so that no crash makes one leave twice.
            let committed = self.commit();
            for intent in intents {
                let outcome = if committed {
                    self.release(&intent.release, intent.xid).await
                } else {
                    ReleaseOutcome::Failed
                };
                let key = intent.key;
                self.memory.settle(intent, outcome);
                self.engine
                    .handle(Event::Released { key, outcome }, clock::monotonic());
            }
        }
    }

    async fn carry_out_all(&mut self) {
        while let Some(action) = self.engine.poll_action() {
            let answer = match action {
                Action::Arm {
                    key,
                    mac,
                    own_port,
                    everywhere,
                } => {
                    self.arm(key, mac, own_port, everywhere);
                    continue;
                }
                Action::Disarm { key, mac } => {
                    self.disarm(key, mac);
                    continue;
                }
                Action::Look { key, mac, own_port } => {
                    if let Some(port) = own_port {
                        self.check_lost(port).await;
                    }
                    Event::Evidence {
                        key,
                        evidence: self.look(key, mac, own_port),
                    }
                }
                Action::Probe { key, probe } => {
                    let sent = self.probe(&probe);
                    self.counters.probes_failed += u64::from(!sent);
                    Event::Probed { key, sent }
                }
                Action::Control { probe } => {
                    self.counters.controls_failed += u64::from(!self.probe(&probe));
                    continue;
                }
                Action::Release { key, release } => {
                    self.intend(key, release);
                    continue;
                }
                Action::Query { key, query } => match self.query(key, query).await {
                    Some(answer) => answer,
                    None => continue,
                },
                Action::Save { key } => {
                    self.memory.binding(key);
                    continue;
                }
                Action::SaveTransaction { id } => {
                    self.memory.transaction(id);
                    continue;
                }
                Action::Notify(notice) => {
                    self.notify(notice);
                    continue;
                }
            };
            self.engine.handle(answer, clock::monotonic());
        }
    }

    fn arm(&mut self, key: Key, mac: MacAddr, own_port: Option<IfIndex>, everywhere: bool) {
        for watch in [
            watch_ip(key.segment, key.vlan, key.ip),
            watch_mac(key.segment, key.vlan, mac),
        ] {
            if let Err(error) = self.kernel.arm(&watch) {
                // A look finds it unarmed, and so nothing is concluded from its silence.
                self.counters.arm_failures += 1;
                warn!(error = %chain(&error), "cannot watch an address");
            }
        }
        let changed = self.armed.arm(key, mac, own_port, everywhere);
        self.apply_scope(changed);
        self.epoch_wanted |= everywhere;
    }

    fn disarm(&mut self, key: Key, mac: MacAddr) {
        let (changed, mac_is_free) = self.armed.disarm(key, mac);
        self.apply_scope(changed);
        let ip = watch_ip(key.segment, key.vlan, key.ip);
        let mac = mac_is_free.then(|| watch_mac(key.segment, key.vlan, mac));
        for watch in [Some(ip), mac].into_iter().flatten() {
            if let Err(error) = self.kernel.disarm(&watch) {
                warn!(error = %chain(&error), "cannot stop watching an address");
            }
        }
    }

    fn apply_scope(&mut self, scope: Scope) {
        if let Some(port) = scope.port {
            self.apply_exact(port);
        }
        if let Some(segment) = scope.segment {
            let ports: Vec<IfIndex> = self
                .watched
                .values()
                .filter(|watched| watched.port.segment == segment)
                .map(|watched| watched.port.ifindex)
                .collect();
            for port in ports {
                self.apply_exact(port);
            }
        }
    }

    fn apply_exact(&mut self, port: IfIndex) {
        if let Some(watched) = self.watched.get(&port) {
            self.kernel
                .set_exact(port, self.armed.wants(port, watched.port.segment));
        }
    }

    fn look(&self, key: Key, chaddr: MacAddr, own_port: Option<IfIndex>) -> Evidence {
        let ip = self
            .kernel
            .watched(&watch_ip(key.segment, key.vlan, key.ip))
            .ok()
            .flatten();
        let mac = self
            .kernel
            .watched(&watch_mac(key.segment, key.vlan, chaddr))
            .ok()
            .flatten();
        let own = own_port.unwrap_or(0);
        // Only its own station proves that it uses the address.
        let address_at = ip
            .filter(|value| value.mac == chaddr.0)
            .and_then(|value| value.seen_at(own));
        // Where no program is attached, silence says nothing.
        let sighted = own_port.is_none_or(|port| self.watched.contains_key(&port))
            && self.blind.values().all(|port| port.segment != key.segment);
        let values = [ip, mac];
        let by_own = values
            .iter()
            .flatten()
            .filter_map(|value| value.seen_at(own))
            .max();
        let elsewhere = values
            .iter()
            .flatten()
            .filter_map(|value| value.seen_elsewhere(own))
            .max();
        let uplinks = self.watched.values().filter(|watched| {
            watched.port.segment == key.segment && watched.port.role == Role::Uplink
        });
        Evidence {
            own_at: by_own.map(Time::from_nanos),
            address_at: address_at.map(Time::from_nanos),
            elsewhere: elsewhere.map(|(at, port)| (Time::from_nanos(at), port)),
            port_at: own_port.and_then(|port| self.heard(port)),
            uplink_at: uplinks
                .filter_map(|watched| self.heard(watched.port.ifindex))
                .max(),
            address: ip
                .filter(|value| value.latest_ns() != 0)
                .map(|value| (Time::from_nanos(value.latest_ns()), MacAddr(value.mac))),
            armed: ip.is_some() && mac.is_some() && sighted,
        }
    }

    /// Since when something may have come in by the port, at the latest.
    fn heard(&self, port: IfIndex) -> Option<Time> {
        self.epochs.began(self.kernel.port_epoch(port)?)
    }

    fn probe(&mut self, probe: &Probe) -> bool {
        if let ProbeVia::Port(port) = probe.via {
            self.put_back(port);
        }
        let (port, segment) = match probe.via {
            ProbeVia::Port(port) => (Some(port), self.watched.get(&port).map(|w| w.port.segment)),
            ProbeVia::Segment(segment) => (None, Some(segment)),
        };
        let Some(bridge) = segment.and_then(|segment| self.segments.bridge(segment)) else {
            return false;
        };
        let frame = arp::probe(bridge.mac, probe);
        match self.socket.send_on(port.unwrap_or(bridge.ifindex), &frame) {
            Ok(()) => true,
            Err(error) => {
                debug!(error = %chain(&error), "probe not sent");
                false
            }
        }
    }

    /// Others remove filters from a clsact that they share with us (Calico and OVS do): before an
    /// answer is waited for, they are there.
    fn put_back(&mut self, port: IfIndex) {
        let Some(watched) = self.watched.get(&port) else {
            return;
        };
        if watched.hook != AttachedHook::Clsact {
            return;
        }
        let (rate, burst) = self.record_limits(watched.port.role);
        if let Err(error) = self.kernel.watch(&watched.port, rate, burst) {
            self.counters.watch_failures += 1;
            warn!(port = watched.port.name, error = %chain(&error), "cannot watch, and tries again");
            if let Some(watched) = self.watched.remove(&port) {
                self.blind.insert(port, watched.port);
            }
        }
    }

    fn record_limits(&self, role: Role) -> (u16, u16) {
        match role {
            Role::Vm => (self.settings.record_rate, self.settings.record_burst),
            Role::Uplink => UPLINK_RECORDS,
        }
    }

    async fn release(&mut self, release: &Release, xid: u32) -> ReleaseOutcome {
        if self.settings.dry_run {
            return ReleaseOutcome::DryRun;
        }
        let Some(bridge) = self.segments.bridge(release.segment) else {
            return ReleaseOutcome::Failed;
        };
        let server_mac = match release.server_mac {
            Some(mac) if mac == bridge.mac => mac,
            // The bridge's MAC may have changed since the ACK: it takes that of a port.
            _ if is_local(bridge.ifindex, release.server).await => bridge.mac,
            Some(mac) => mac,
            None => {
                warn!(server = %release.server, "no frame of the server was seen: its MAC is not known");
                return ReleaseOutcome::Failed;
            }
        };
        let direction = if server_mac == bridge.mac {
            EMIT_INGRESS
        } else {
            EMIT_EGRESS
        };
        let order = EmitOrder {
            silent_since_ns: release.silent_since.as_nanos(),
            ip: watch_ip(release.segment, release.vlan, release.ip),
            mac: watch_mac(release.segment, release.vlan, release.chaddr),
            ifindex: bridge.ifindex,
            direction,
            verdict: VERDICT_NONE,
            vlan: release.vlan.to_be_bytes(),
        };
        match self.send(release, server_mac, xid, &order) {
            Ok(VERDICT_SENT) => ReleaseOutcome::Sent,
            Ok(VERDICT_VETOED) => ReleaseOutcome::Vetoed,
            Ok(verdict) => {
                warn!(ip = %release.ip, verdict, "RELEASE did not pass the emit program");
                ReleaseOutcome::Failed
            }
            Err(error) => {
                warn!(ip = %release.ip, error = format!("{error:#}"), "RELEASE not sent");
                ReleaseOutcome::Failed
            }
        }
    }

    fn send(
        &mut self,
        release: &Release,
        server_mac: MacAddr,
        xid: u32,
        order: &EmitOrder,
    ) -> anyhow::Result<u8> {
        let frame = release_frame(release, server_mac, xid, MESSAGE)?;
        self.kernel.order(xid, order)?;
        // A vetoed frame is an error here too; the verdict tells which it was.
        let sent = self.link.send_release(&frame);
        let verdict = self.kernel.verdict(xid)?;
        if verdict == VERDICT_NONE {
            sent?;
        }
        Ok(verdict)
    }

    fn notify(&mut self, notice: Notice) {
        let event = view::event(&notice, Clocks::now());
        let Notice {
            event: kind,
            ip,
            mac,
            port,
            reason,
            ..
        } = notice;
        let (ip, mac) = (
            ip.map(tracing::field::display),
            mac.map(tracing::field::display),
        );
        match kind {
            NoticeKind::Released => info!(ip, mac, port, reason, "released"),
            NoticeKind::WouldRelease => info!(ip, mac, port, reason, "would release"),
            NoticeKind::Conflict
            | NoticeKind::RogueServer
            | NoticeKind::RecordsLost
            | NoticeKind::ReleaseFailed
            | NoticeKind::ReleasedAlive
            | NoticeKind::Vetoed => warn!(event = ?kind, ip, mac, port, reason),
            NoticeKind::PortUp
            | NoticeKind::PortLost
            | NoticeKind::Requested
            | NoticeKind::Bound
            | NoticeKind::Renewed
            | NoticeKind::Silent
            | NoticeKind::Alive
            | NoticeKind::Gone
            | NoticeKind::Held
            | NoticeKind::Releasing
            | NoticeKind::Verified
            | NoticeKind::Refused
            | NoticeKind::Withdrawn
            | NoticeKind::Expired
            | NoticeKind::Moved => debug!(event = ?kind, ip, mac, port, reason),
        }
        self.log.push(event);
    }

    /// A client that has gone meanwhile needs no answer.
    fn answer(&self, request: ControlRequest) {
        match request {
            ControlRequest::List { reply } => {
                let clocks = Clocks::now();
                let views = self
                    .engine
                    .bindings()
                    .map(|b| view::binding(b, &self.segments, clocks));
                let _gone = reply.send(views.collect());
            }
            ControlRequest::Explain { ip, reply } => {
                let clocks = Clocks::now();
                let views = self.engine.bindings_of(ip).filter_map(|binding| {
                    let findings = self.engine.explain(binding.key, clocks.monotonic)?;
                    let binding = view::binding(binding, &self.segments, clocks);
                    Some(view::explain(binding, &findings, self.log.history(ip)))
                });
                let _gone = reply.send(views.collect());
            }
            ControlRequest::Events { follow, reply } => {
                let _gone = reply.send(self.log.feed(follow));
            }
            ControlRequest::Stats { reply } => {
                let _gone = reply.send(self.stats());
            }
        }
    }

    fn stats(&self) -> StatsView {
        let mut counters = BTreeMap::new();
        match self.kernel.counters() {
            Ok(kernel) => counters.extend(
                kernel
                    .into_iter()
                    .map(|(name, count)| (format!("kernel.{name}"), count)),
            ),
            Err(error) => warn!(error = %chain(&error), "cannot read the kernel half's counters"),
        }
        let core = self.engine.counters().iter();
        counters.extend(core.map(|(name, count)| (format!("core.{name}"), *count)));
        let Counters {
            malformed_records,
            probes_failed,
            controls_failed,
            watch_failures,
            arm_failures,
            store_failures,
            commits,
        } = self.counters;
        let agent = [
            ("malformed_records", malformed_records),
            ("probes_failed", probes_failed),
            ("controls_failed", controls_failed),
            ("watch_failures", watch_failures),
            ("arm_failures", arm_failures),
            ("store_failures", store_failures),
            ("commits", commits),
            ("lease_answers_refused", self.queries.refused),
            ("link_resyncs", self.ports.resyncs()),
            ("link_messages_malformed", self.ports.malformed()),
            (
                "control_refused",
                self.control.refused.load(Ordering::Relaxed),
            ),
            ("control_slow", self.control.slow.load(Ordering::Relaxed)),
            (
                "events_lost",
                self.control.events_lost.load(Ordering::Relaxed),
            ),
        ];
        counters.extend(agent.map(|(name, count)| (format!("agent.{name}"), count)));
        let mut bindings = BTreeMap::new();
        for binding in self.engine.bindings() {
            *bindings.entry(binding.state).or_default() += 1;
        }
        StatsView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: self.started_at,
            dry_run: self.settings.dry_run,
            bridges: self.settings.bridges.clone(),
            ports: self.watched.len() as u64,
            bindings,
            counters,
        }
    }
}

/// Hands the programs' `debug!` lines on to the agent's log.
fn follow_kernel_log(kernel: &mut Kernel) -> anyhow::Result<()> {
    let Some(logger) = kernel.logger() else {
        return Ok(());
    };
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the logger owns its descriptor"
    )]
    let mut logger = AsyncFd::with_interest(logger, Interest::READABLE)
        .context("cannot follow the kernel half's log")?;
    tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    });
    Ok(())
}

/// A transaction identifier that nobody can guess (RFC 2131 section 4.1).
fn draw_xid() -> Option<u32> {
    match getrandom::u32() {
        Ok(xid) => Some(xid),
        Err(error) => {
            error!(%error, "the kernel gives no random numbers");
            None
        }
    }
}

async fn is_local(bridge: IfIndex, ip: Ipv4Addr) -> bool {
    match local_addresses(bridge).await {
        Ok(addresses) => addresses.contains(&ip),
        Err(error) => {
            warn!(error = %chain(&error), "cannot read the bridge's addresses");
            false
        }
    }
}
