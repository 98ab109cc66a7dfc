//! The loop: it owns the core, tells it what happened, and carries out what it wants.

mod addresses;
mod armed;
mod census;
mod epochs;
mod evidence;
mod figures;
mod imports;
mod memory;
mod operator;
mod ports;
mod query;
mod release;
mod reload;
mod segments;
mod soundings;
mod view;
mod vlans;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::Context as _;
use dhcp_reclaim_ebpf::abi::Record;
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{Interval, MissedTickBehavior, interval, sleep},
};
use tracing::{debug, error, info, trace, warn};

use self::{
    addresses::Addresses,
    armed::{Armed, Scope},
    census::Census,
    epochs::Epochs,
    memory::{Intent, Left, Memory, known_ports},
    operator::Questions,
    query::Queries,
    segments::Segments,
    soundings::Soundings,
    view::Clocks,
    vlans::PortVlans,
};
use crate::{
    clock,
    config::{self, Settings, Source},
    control::{ControlRequest, ControlServer, ControlStats, EventLog, REQUEST_QUEUE, StatsView},
    core::{
        Action, Engine, Event, IfIndex, Notice, NoticeKind, Port, ReleaseOutcome, Role, SegmentId,
        Time,
    },
    emit::{PacketSocket, PrivateLink},
    errors::chain,
    kernel::{self, AttachedHook, BATCH, Expedite, Kernel, KernelError, LoadOptions, RecordRing},
    metrics::{MetricsRequest, MetricsServer, Reclaims},
    ports::{PortEvent, PortWatcher, WatchError},
    sandbox::{self, Strictness},
    service::Service,
    store::{AuditLine, Store, Trail},
};

/// The coarse tier's clock, at its slowest: how finely "heard lately" is known.
const EPOCH_MAX: Duration = Duration::from_secs(1);
const EPOCH_MIN: Duration = Duration::from_millis(50);
/// The loop turns once an epoch at least. Whoever did not run for longer has not listened meanwhile.
const OVERSLEPT: Duration = Duration::from_secs(5);
/// The clocks of a host that is not suspended do not come apart by as much.
const SUSPENDED: Duration = Duration::from_millis(100);
/// What is there when the loop asks has come while it was busy.
const AT_ONCE: Duration = Duration::from_millis(5);
/// So often records come first before what is due has its turn.
const RING_TURNS: u32 = 16;
/// What is due has this long in one turn.
const DUE: Duration = Duration::from_millis(50);
/// Batches that are read before something else gets its turn.
const DRAIN: usize = 64;

/// Runs the agent until SIGTERM or SIGINT.
pub fn run(settings: Settings, source: Source) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(async { Agent::start(settings, source).await?.run().await })
}

struct Agent {
    settings: Settings,
    source: Source,
    service: Service,
    engine: Engine,
    kernel: Kernel,
    expedite: Expedite,
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
    vlans: PortVlans,
    armed: Armed,
    epochs: Epochs,
    /// Somebody waits to hear the uplink: a new epoch tells old frames from new ones.
    epoch_wanted: bool,
    /// What an earlier agent knew is still being taken over, and with it what is to be watched.
    remembering: bool,
    queries: Queries,
    census: Census,
    soundings: Soundings,
    addresses: Addresses,
    questions: Questions,
    counters: Counters,
    /// Closed, if nobody is to be told.
    metrics: mpsc::Receiver<MetricsRequest>,
    reclaims: Reclaims,
    started_at: jiff::Timestamp,
    /// When the loop turned last, by the clock that goes on in a suspended host.
    turned_at: Time,
    /// When the loop last had something to do, and since when what it hears of ports may have been so.
    began: Time,
    ports_since: Time,
    /// Ports, by their segments, that were not heard for long.
    late: BTreeMap<IfIndex, SegmentId>,
    /// As it was told.
    breaker_is_open: bool,
}

/// What the loop has to do next.
enum Turn {
    End,
    Reload,
    Port(Result<PortEvent, WatchError>),
    Ring(Result<(), KernelError>),
    Due,
    Answers,
    Sockets,
    Question(ControlRequest),
    Metrics(MetricsRequest),
    Tick,
    /// Nothing but more records.
    Others,
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
    import_failures: u64,
    reloads: u64,
    reloads_refused: u64,
}

impl Agent {
    async fn start(settings: Settings, source: Source) -> anyhow::Result<Self> {
        // First, since it is what tells two agents apart.
        let server = ControlServer::bind(&settings.control)?;
        let metrics_server = match settings.metrics {
            None => None,
            Some(address) => {
                let bound = MetricsServer::bind(address).await;
                Some(bound.with_context(|| format!("cannot serve metrics at {address}"))?)
            }
        };
        let boot = clock::boot_id().context("cannot read the boot's id")?;
        let (store, remembered) = Store::open(&settings.state, clock::wall())?;
        let kernel_debug = tracing::enabled!(tracing::Level::DEBUG);
        let mut kernel = Kernel::load(&LoadOptions {
            bpffs: settings.bpffs.clone(),
            hook: match settings.hook {
                config::Hook::Tc => kernel::Hook::Tc,
                config::Hook::Clsact => kernel::Hook::Clsact,
                config::Hook::Xdp => kernel::Hook::Xdp,
            },
            debug: kernel_debug,
            ..LoadOptions::default()
        })?;
        let left = Left::of(&kernel)?;
        let ring = kernel.ring()?;
        if kernel_debug {
            follow_kernel_log(&mut kernel)?;
        }
        let (connection, handle, _) =
            rtnetlink::new_connection().context("cannot open a netlink socket")?;
        tokio::spawn(connection);
        let expedite = match settings.expedite {
            // Attaching takes longer without, and that is all.
            true => Expedite::open().unwrap_or_else(|error| {
                warn!(%error, "`expedite`: the kernel cannot be told to hurry");
                Expedite::default()
            }),
            false => Expedite::default(),
        };
        let link = PrivateLink::create(&handle).await?;
        kernel.attach_emit(link.ifindex())?;
        let socket = PacketSocket::open()?;
        let (mut present, ports) = PortWatcher::start(settings.port_rules()).await?;
        let listed_at = clock::monotonic();
        let (sender, requests) = mpsc::channel(REQUEST_QUEUE);
        let control = server.stats();
        let (metrics_sender, metrics) = mpsc::channel(1);
        if let Some(server) = metrics_server {
            tokio::spawn(server.run(metrics_sender));
        }
        tokio::spawn(server.run(sender));
        let now = clock::monotonic();
        let mut agent = Self {
            engine: Engine::new(settings.policy(), now),
            kernel,
            expedite,
            ring,
            requests,
            control,
            memory: Memory::new(store, Trail::new(&settings.state), boot),
            started_at: clock::wall(),
            turned_at: clock::boottime(),
            began: clock::monotonic(),
            ports_since: clock::monotonic(),
            late: BTreeMap::new(),
            breaker_is_open: false,
            ports,
            link,
            socket,
            log: EventLog::default(),
            segments: Segments::new(&settings.bridges),
            watched: BTreeMap::new(),
            blind: BTreeMap::new(),
            vlans: PortVlans::default(),
            armed: Armed::default(),
            epochs: Epochs::default(),
            epoch_wanted: false,
            remembering: true,
            queries: Queries::default(),
            census: Census::default(),
            soundings: Soundings::default(),
            addresses: Addresses::default(),
            questions: Questions::default(),
            counters: Counters::default(),
            metrics,
            reclaims: Reclaims::default(),
            service: Service::from_env(),
            source,
            settings,
        };
        agent.next_epoch();
        agent.take_over_pause(remembered.pause.clone());
        for row in &remembered.ports {
            agent.memory.knew_port(row);
        }
        // Who goes while we look has said something that nobody would understand yet.
        let goes = |event: &PortEvent| matches!(event, PortEvent::PortDown { .. });
        let later = present.split_off(present.iter().position(goes).unwrap_or(present.len()));
        // A VM may have been plugged in anew meanwhile: what it says by its next port is heard once
        // the end of its old one is written down, or the next agent would find it at both.
        let known = known_ports(&remembered, &left);
        let (new, old): (Vec<_>, Vec<_>) = present.into_iter().partition(|event| {
            matches!(event, PortEvent::PortUp(port)
                if port.role == Role::Vm && !known.contains(&port.ifindex))
        });
        for event in old {
            agent.port_event(event).await;
        }
        for (segment, _) in agent.segments.absent() {
            let there = false;
            agent.tell(Event::Bridge { segment, there }).await;
        }
        agent.remember(remembered, left, listed_at).await;
        for event in new.into_iter().chain(later) {
            agent.port_event(event).await;
        }
        agent.import_files().await;
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
        let mut hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
        self.enter_sandbox()?;
        let mut tick = self.ticks();
        info!(
            bridges = self.settings.bridges.join(","),
            ports = self.watched.len(),
            control = %self.settings.control.display(),
            "ready"
        );
        self.turned_at = clock::boottime();
        for (_, bridge) in self.segments.absent() {
            warn!(bridge, "not there yet: waiting for it");
        }
        self.service.ready(&self.status());
        let mut ring_turns = 0_u32;
        loop {
            if std::mem::take(&mut self.epoch_wanted) {
                self.next_epoch();
            }
            // What came during the last turn is there to be heard after this, and the tasks that hear
            // people share this thread.
            tokio::task::yield_now().await;
            let wait = self
                .engine
                .poll_timeout()
                .map_or(Duration::from_secs(3600), |at| at.since(clock::monotonic()));
            let asked = clock::monotonic();
            let turn = tokio::select! {
                // What happened comes before what is due because nothing happened.
                biased;
                _ = terminate.recv() => Turn::End,
                _ = interrupt.recv() => Turn::End,
                _ = hangup.recv() => Turn::Reload,
                event = self.ports.next() => Turn::Port(event),
                // However many records there are, what is due has its turn.
                ready = self.ring.ready(), if ring_turns < RING_TURNS => Turn::Ring(ready),
                () = sleep(wait) => Turn::Due,
                () = self.queries.readable() => Turn::Answers,
                () = self.soundings.look() => Turn::Sockets,
                Some(request) = self.requests.recv() => Turn::Question(request),
                Some(reply) = self.metrics.recv() => Turn::Metrics(reply),
                _ = tick.tick() => Turn::Tick,
                () = std::future::ready(()), if ring_turns >= RING_TURNS => Turn::Others,
            };
            let begins = clock::monotonic();
            let was_busy = begins.since(asked) < AT_ONCE;
            self.ports_since = if was_busy { self.began } else { begins };
            self.began = begins;
            ring_turns = match turn {
                Turn::Ring(_) => ring_turns + 1,
                _ => 0,
            };
            self.turn().await;
            match turn {
                Turn::End => break,
                Turn::Reload => {
                    self.reload();
                    tick = self.ticks();
                }
                Turn::Port(event) => self.port_events(event?).await?,
                Turn::Ring(ready) => {
                    ready?;
                    self.read_batch().await;
                    // Where there is always a record to read, people are still answered.
                    if let Ok(request) = self.requests.try_recv() {
                        self.answer(request).await;
                    }
                }
                // A timer that is due shows a moment later: it is not waited for.
                Turn::Due | Turn::Others => {
                    self.what_is_due(begins).await;
                    // For as long as more is due, its own turn does not come.
                    self.look_at_sockets().await;
                }
                Turn::Answers => self.read_answers().await,
                Turn::Sockets => self.look_at_sockets().await,
                Turn::Question(request) => self.answer(request).await,
                Turn::Metrics(reply) => {
                    let _gone = reply.send(self.snapshot());
                }
                Turn::Tick => self.tick().await,
            }
            self.hear_late().await;
            self.commit();
            self.service.alive(clock::monotonic());
        }
        info!("stopping");
        self.service.stopping();
        self.commit();
        let service = std::mem::take(&mut self.service);
        let left = self.leave();
        service.finish();
        left
    }

    /// Some bindings at a time, however many are due; not for long, or what else there is waits.
    async fn what_is_due(&mut self, begins: Time) {
        loop {
            self.drain().await;
            self.engine.handle_timeout(clock::monotonic());
            self.carry_out().await;
            let now = clock::monotonic();
            let more = self.engine.poll_timeout().is_some_and(|at| at <= now);
            if !more || now.since(begins) >= DUE {
                return;
            }
        }
    }

    /// What goes on without an agent, or is taken away.
    fn leave(mut self) -> anyhow::Result<()> {
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

    fn enter_sandbox(&self) -> anyhow::Result<()> {
        let strictness = match self.settings.sandbox {
            config::Sandbox::Enforce => Strictness::Enforce,
            config::Sandbox::Log => Strictness::Log,
            config::Sandbox::Off => return Ok(()),
        };
        // Linked statically, the crate finds no getrandom(2) by dlsym. It then opens /dev/urandom, once
        // and for good; later it could not.
        getrandom::u32().context("the kernel gives no random numbers")?;
        let paths = sandbox::Paths {
            config: self.source.file.clone(),
            state: vec![self.settings.state.clone()],
            control: self.settings.control.clone(),
            bpffs: self.settings.bpffs.clone(),
            unpin: self.settings.detach_on_exit,
        };
        sandbox::enter(strictness, &paths)?;
        Ok(())
    }

    fn ticks(&self) -> Interval {
        // Well below `silence`, or a busy VM would seem silent between two epochs.
        let epoch = (self.settings.silence / 4).clamp(EPOCH_MIN, EPOCH_MAX);
        let mut ticks = interval(epoch);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    }

    async fn tick(&mut self) {
        self.next_epoch();
        for port in self.blind.values().cloned().collect::<Vec<_>>() {
            self.watch(port).await;
        }
        let ports: Vec<IfIndex> = self.watched.keys().copied().collect();
        for port in ports {
            self.check_lost(port).await;
        }
        let segments: BTreeSet<SegmentId> = self.armed.segments().collect();
        self.put_all_back(&segments);
        self.expire_queries().await;
        self.take_census().await;
        self.tell_breaker();
    }

    /// Nothing is released while it is open, and time does not close it: who reads no events is to know.
    fn tell_breaker(&mut self) {
        let is_open = self.engine.breaker_opened_at().is_some();
        if is_open == std::mem::replace(&mut self.breaker_is_open, is_open) {
            return;
        }
        if is_open {
            warn!(
                "breaker open: more VMs fell silent at once than `breaker` allows; nothing is released until \
                 enough come back, or `dhcp-reclaim resume`"
            );
        }
        self.service.status(&self.status());
    }

    /// Before anything is concluded from what did or did not happen: was there a time in which
    /// nobody looked?
    pub(super) async fn turn(&mut self) {
        let now = clock::boottime();
        let slept = now.since(std::mem::replace(&mut self.turned_at, now));
        let suspended = self.memory.suspended_since(clock::suspended());
        // However short a suspension is, leases went on meanwhile, and more may follow.
        if slept > OVERSLEPT || suspended > SUSPENDED {
            warn!(
                seconds = slept.as_secs(),
                "did not run for a while: silence is counted anew"
            );
            self.tell(Event::Overslept { suspended }).await;
        }
    }

    fn next_epoch(&mut self) {
        // What is counted in it came later than this.
        let began = clock::monotonic();
        match self.kernel.advance_epoch() {
            Ok(epoch) => self.epochs.begin(epoch, began),
            Err(error) => error!(%error, "cannot advance the epoch"),
        }
    }

    async fn tell(&mut self, event: Event) {
        self.engine.handle(event, clock::monotonic());
        self.carry_out().await;
    }

    async fn record(&mut self, record: &Record) {
        if self.outlived_ports(Time::from_nanos(record.seen_ns)) {
            self.bury().await;
        }
        if let Some(answer) = self.soundings.answered(record) {
            self.tell(answer).await;
            return;
        }
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

    async fn carry_out(&mut self) {
        loop {
            self.carry_out_all().await;
            let intents = self.memory.take_intents();
            let mut soundings = self.soundings.take_pending();
            if intents.is_empty() && soundings.is_empty() {
                return;
            }
            let mut ready = Vec::new();
            for (at, intent) in intents.into_iter().enumerate() {
                match self.order(&intent.release, intent.xid).await {
                    Ok(frame) => ready.push((at, intent, frame)),
                    Err(outcome) => self.settle(intent, outcome),
                }
            }
            // The orders first, then the intents, then the frames: so no crash makes one leave twice,
            // and whether it left is known.
            let committed = ready.is_empty() || self.commit();
            let overtaken = match committed && !ready.is_empty() {
                true => self.overtaken(&ready).await,
                false => BTreeSet::new(),
            };
            for (at, intent, frame) in ready {
                self.sound_behind(&mut soundings, at).await;
                let is_overtaken = overtaken.contains(&intent.release.segment);
                let outcome = match (committed, is_overtaken) {
                    (true, false) => self.send(intent.xid, &frame),
                    (true, true) => ReleaseOutcome::Overtaken,
                    (false, _) => ReleaseOutcome::Failed,
                };
                self.settle(intent, outcome);
            }
            self.sound_behind(&mut soundings, usize::MAX).await;
        }
    }

    async fn carry_out_all(&mut self) {
        // The rest of a question leaves before its probe, and makes it count.
        let mut left = true;
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
                    let sent = std::mem::replace(&mut left, true) && sent;
                    Event::Probed { key, sent }
                }
                Action::Control { probe } => {
                    let sent = self.probe(&probe);
                    self.counters.controls_failed += u64::from(!sent);
                    left &= sent;
                    continue;
                }
                Action::Release { key, release } => {
                    self.intend(key, release);
                    continue;
                }
                Action::Sound(sounding) => {
                    let behind = self.memory.intended();
                    self.soundings.ask_behind(behind, sounding);
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
                Action::SaveAlarm { id } => {
                    self.memory.alarm(id);
                    continue;
                }
                Action::Answer { key, answer } => {
                    self.answer_question(key, answer);
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

    fn notify(&mut self, notice: Notice) {
        let event = view::event(&notice, Clocks::now());
        if matches!(
            event.event,
            NoticeKind::Verified | NoticeKind::ReleasedAlive
        ) {
            self.memory.audit(AuditLine::Outcome(event.clone()));
        }
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
            // Guests' addresses are for `events` and the audit; a conflict's reason has some.
            NoticeKind::Conflict => {
                warn!(event = ?kind, port);
                debug!(event = ?kind, ip, mac, port, reason);
            }
            NoticeKind::RogueServer
            | NoticeKind::RecordsLost
            | NoticeKind::ReleaseFailed
            | NoticeKind::ReleasedAlive
            | NoticeKind::Paused
            | NoticeKind::Resumed
            | NoticeKind::Forced
            | NoticeKind::Vetoed => {
                warn!(event = ?kind, port, reason);
                debug!(event = ?kind, ip, mac, port);
            }
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
    async fn answer(&mut self, request: ControlRequest) {
        match request {
            ControlRequest::List { reply } => {
                let clocks = Clocks::now();
                let views = self
                    .engine
                    .bindings()
                    .chain(self.engine.imports())
                    .map(|b| view::binding(b, &self.segments, clocks));
                let _gone = reply.send(views.collect());
            }
            ControlRequest::Explain { ip, reply } => {
                let clocks = Clocks::now();
                let hearsay = self.engine.imports().filter(|binding| {
                    binding.key.ip == ip && self.engine.binding(binding.key).is_none()
                });
                let bindings = self.engine.bindings_of(ip).chain(hearsay);
                let views = bindings.filter_map(|binding| {
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
            ControlRequest::Order(ordered) => self.order_of(ordered).await,
        }
    }

    fn stats(&self) -> StatsView {
        let clocks = Clocks::now();
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
            import_failures,
            reloads,
            reloads_refused,
        } = self.counters;
        let agent = [
            ("malformed_records", malformed_records),
            ("probes_failed", probes_failed),
            ("controls_failed", controls_failed),
            ("watch_failures", watch_failures),
            ("arm_failures", arm_failures),
            ("store_failures", store_failures),
            ("commits", commits),
            ("import_failures", import_failures),
            ("audit_lost", self.memory.audit_lost()),
            ("reloads", reloads),
            ("reloads_refused", reloads_refused),
            ("lease_answers_refused", self.queries.refused),
            ("leases_asked_for", self.census.asked),
            ("leases_told", self.census.found),
            ("leases_not_asked_for", self.census.refused),
            ("leases_unanswered", self.census.unanswered),
            ("soundings_failed", self.soundings.failed),
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
            paused: self.memory.pause.clone(),
            breaker_open_since: self.engine.breaker_opened_at().map(|at| clocks.wall(at)),
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
