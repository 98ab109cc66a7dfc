//! The agent dies at any moment, and nothing is forgotten and nothing is done twice.
//!
//! The judges are the server's own store and a capture of what reaches the server.
use std::{
    collections::BTreeMap,
    env, fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use dhcp_reclaim_ebpf::abi::{ABI_VERSION, EmitOrder};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook, STATE, Setup},
    boot::kernel::has_tcx,
    clock::{Deadline, now},
    fixture::{Mac, NIC, SERVER_IP, pool_ip, vm_mac},
    lab_test,
    process::Process,
    sandbox::{BPFFS, DIR, filters, foreign, test_in_world},
    server::{Place, ServerKind},
    trace::{Call, Tracer},
    vm::{Client, KillKind, Vm},
    watch::tail,
    wire::{ACK, Capture, Frame, RELEASE},
    world::{PATIENCE, World},
};
use nix::{libc, unistd::Pid};

/// How often the agent is killed in each of the worlds; together they make the 200 of the bar.
const CRASHES: &str = "DHCP_RECLAIM_CRASHES";
const CRASHES_PER_WORLD: u32 = 67;
/// Added to the seed of each world: `DHCP_RECLAIM_SEED=1000 cargo test -p dhcp-reclaim-tests --test
/// crash killed_at_random` is another run.
const SEED: &str = "DHCP_RECLAIM_SEED";
/// What an agent says of a RELEASE that the one before it did not see the end of.
const WHILE_RELEASING: &str = "an earlier agent ended while it was releasing";
/// So many at once boot VMs and end them.
const OPERATORS: u8 = 3;
/// VMs that one of them has at most, by number; a number lives again and again.
const NUMBERS: u8 = 6;

#[test]
fn killed_at_random_moments_in_world_1() {
    killed_at_random_moments("killed_at_random_moments_in_world_1", 1);
}

#[test]
fn killed_at_random_moments_in_world_2() {
    killed_at_random_moments("killed_at_random_moments_in_world_2", 2);
}

#[test]
fn killed_at_random_moments_in_world_3() {
    killed_at_random_moments("killed_at_random_moments_in_world_3", 3);
}

/// VMs come and go, and so does the agent, with SIGKILL. In the end the server has no lease of a VM
/// that is dead, every VM that lives has kept its own, and no lease was released twice.
///
/// No agent can hear what is said by a port that no program is attached to: in the first moments after
/// the port came to be, or for as long as no agent runs. So a guest asks for its lease once its port is
/// watched. It asks then whether an agent runs or not, and its port, itself or
/// both may be gone when the next agent starts.
fn killed_at_random_moments(name: &str, world: u32) {
    let crashes = number(CRASHES, CRASHES_PER_WORLD);
    test_in_world(
        module_path!(),
        name,
        Duration::from_secs(120) + Duration::from_secs(6) * crashes,
        || churn(crashes, world + number(SEED, 0)),
    );
}

fn number(name: &str, default: u32) -> u32 {
    let given = env::var(name).ok().and_then(|value| value.parse().ok());
    given.unwrap_or(default)
}

fn churn(crashes: u32, seed: u32) -> Result<()> {
    let begin = now();
    // A program cannot be run while another thread's child still holds it open for writing.
    for program in ["ip", "tc", "udhcpc", "busybox"] {
        foreign(program)?;
    }
    // To each its own address: dnsmasq offers one to several that ask at once, and whoever asks for it
    // in vain puts its owner in doubt, rightly.
    let hosts: Vec<_> = (1..=OPERATORS * NUMBERS)
        .map(|number| format!("--dhcp-host={},{}", vm_mac(number), pool_ip(number)))
        .collect();
    let hosts: Vec<_> = hosts.iter().map(String::as_str).collect();
    let world = World::with_dnsmasq(&hosts, 100)?;
    let setup = world.agent(Hook::Tc).args(&[
        // A guest that has its lease may be slow to use it.
        "--silence",
        "3s",
        "--probe-interval",
        "200ms",
        "--misses",
        "2",
        "--hold-down",
        "400ms",
        "--hold-down-uplink",
        "400ms",
        "--hold-down-silent",
        "500ms",
        "--settle",
        "200ms",
        "--breaker",
        "off",
    ]);
    let wire = Capture::start(world.server.netns(), NIC)?;
    let done = AtomicU32::new(0);
    let over = AtomicBool::new(false);
    let mut operators: Vec<_> = (0..OPERATORS)
        .map(|number| Vms::new(&world, seed, number))
        .collect();
    let last = thread::scope(|scope| -> Result<Process> {
        let killer = scope.spawn(|| kill_often(&setup, crashes, seed, &done));
        let (done, over) = (&done, &over);
        let working: Vec<_> = operators
            .iter_mut()
            .map(|vms| {
                scope.spawn(move || -> Result<()> {
                    while !over.load(Ordering::Relaxed) {
                        vms.step().with_context(|| {
                            format!("after {} crashes", done.load(Ordering::Relaxed))
                        })?;
                    }
                    Ok(())
                })
            })
            .collect();
        let last = killer.join().map_err(|_| anyhow!("the killer panicked"));
        over.store(true, Ordering::Relaxed);
        for worker in working {
            worker
                .join()
                .map_err(|_| anyhow!("an operator panicked"))??;
        }
        last?
    })?;
    drop(last);
    let agent = setup.start()?;
    let log = || agent.log();
    for vms in &mut operators {
        vms.finish()?;
    }
    let living: Vec<&Vm> = operators
        .iter()
        .flat_map(|vms| vms.living.values())
        .collect();
    let lives: Vec<Life> = operators.iter().flat_map(|vms| vms.lives.clone()).collect();

    // Whoever is dead has lost its lease in the end.
    let deadline = Deadline::after(PATIENCE);
    let mut held: Vec<_>;
    loop {
        held = world.server.leases()?;
        held.retain(|lease| !living.iter().any(|vm| vm.mac == lease.mac));
        if held.is_empty() || deadline.passed() {
            break;
        }
        sleep(Duration::from_millis(100));
    }
    if let Some(forgotten) = held.first() {
        let told = agent.ask_text(&["explain", &forgotten.ip.to_string()]);
        let lives = lives.iter().filter(|life| life.mac == forgotten.mac);
        let ip = forgotten.ip.to_string();
        let log = log();
        let of_it: Vec<_> = log.lines().filter(|line| line.contains(&ip)).collect();
        bail!(
            "seed {seed}: forgotten: {held:?}\n{}\nat {:?} its lives {:?}\nlog of it:\n{}\nlog:\n{}",
            told.unwrap_or_else(|error| format!("{error:#}")),
            now(),
            lives.collect::<Vec<_>>(),
            of_it.join("\n"),
            tail(&log, 60)
        );
    }
    for vm in &living {
        let ip = vm.lease().context("a living VM without a lease")?;
        if !world.server.has(ip)? {
            let its = lives.iter().filter(|life| life.mac == vm.mac);
            let log = log();
            let text = ip.to_string();
            let of_it: Vec<_> = log.lines().filter(|line| line.contains(&text)).collect();
            bail!(
                "seed {seed}: {}: {ip} was taken away\nat {:?} its lives {:?}\nlog of it:\n{}\nlog:\n{}",
                vm.name,
                now(),
                its.collect::<Vec<_>>(),
                of_it.join("\n"),
                tail(&log, 60)
            );
        }
        let state = agent.state(ip)?;
        ensure!(
            ["bound", "silent"].contains(&state.as_str()),
            "seed {seed}: {} is alive, and the agent has its {ip} as {state}\nlog:\n{}",
            vm.name,
            log()
        );
    }
    let releases = judge(&wire, &lives).with_context(log)?;
    ensure!(releases > 0, "the agent never released anything");
    // The maps outlive every agent, and with them what became of each RELEASE; so does the store.
    for sign in ["outcome unknown", "starting without it", "ReleasedAlive"] {
        ensure!(!log().contains(sign), "seed {seed}: {sign}:\n{}", log());
    }
    println!(
        "NOTE seed {seed}: {crashes} crashes, {} of them while releasing; {} VMs died and {} live, \
         {releases} RELEASEs, in {:.0} s",
        log().matches(WHILE_RELEASING).count(),
        lives.len() - living.len(),
        living.len(),
        (now() - begin).as_secs_f64()
    );
    agent.stop()
}

/// Leaves one running.
fn kill_often(setup: &Setup, crashes: u32, seed: u32, done: &AtomicU32) -> Result<Process> {
    let mut random = Random::new(seed ^ 0x9e37);
    for _ in 0..crashes {
        let mut agent = setup.spawn()?;
        let said = ready(&agent);
        let when = random.below(4);
        if when < 2 {
            // While it starts, or takes over, or soon after.
            sleep(Duration::from_millis(random.below(900).into()));
        } else {
            let deadline = Deadline::after(PATIENCE);
            while ready(&agent) == said && !deadline.passed() {
                agent.check_alive()?;
                sleep(Duration::from_millis(10));
            }
            if when == 2 {
                // While it releases something, if it does.
                let deadline = Deadline::after(Duration::from_millis(800));
                while orders() == 0 && !deadline.passed() {
                    sleep(Duration::from_micros(100));
                }
                sleep(Duration::from_micros(random.below(3000).into()));
            } else {
                sleep(Duration::from_millis(random.below(900).into()));
            }
        }
        agent.check_alive()?;
        agent.kill();
        done.fetch_add(1, Ordering::Relaxed);
    }
    setup.spawn()
}

/// How many agents have said so in the log that they share.
fn ready(agent: &Process) -> usize {
    agent.log().matches(": ready bridges=").count()
}

/// No RELEASE of the agent's falls into the life that took the lease, and nobody had released that
/// lease yet.
fn judge(wire: &Capture, lives: &[Life]) -> Result<usize> {
    let mut last: BTreeMap<(Ipv4Addr, Mac), (u8, Instant)> = BTreeMap::new();
    let mut releases = 0;
    for frame in wire.frames() {
        let Some(dhcp) = frame.dhcp() else { continue };
        let (kind, ip) = match dhcp.kind() {
            Some(ACK) => (ACK, dhcp.yiaddr),
            Some(RELEASE) => (RELEASE, dhcp.ciaddr),
            Some(_) | None => continue,
        };
        let lease = (ip, dhcp.chaddr);
        let before = last.insert(lease, (kind, frame.at));
        let ours = dhcp
            .option(56)
            .is_some_and(|text| text.starts_with(b"dhcp-reclaim"));
        if kind == ACK || !ours {
            continue;
        }
        releases += 1;
        let Some((ACK, leased_at)) = before else {
            bail!("{lease:?} was released a second time: {before:?} came before");
        };
        // An ACK that comes after the death, to a REQUEST of before, is no life's.
        let alive = lives.iter().find(|life| {
            life.mac == dhcp.chaddr
                && life.born <= leased_at
                && leased_at <= frame.at
                && life.died.is_none_or(|died| frame.at < died)
        });
        ensure!(
            alive.is_none(),
            "{lease:?} was released at {:?}, leased at {leased_at:?}, in the middle of {alive:?}",
            frame.at
        );
    }
    Ok(releases)
}

/// RELEASEs that the kernel half knows of, and whose outcome is not written down yet.
fn orders() -> usize {
    let pin = Path::new(BPFFS)
        .join("dhcp-reclaim")
        .join(format!("v{ABI_VERSION}"))
        .join("ORDERS");
    // There is none before the first agent.
    let Ok(map) = MapData::from_pin(pin) else {
        return 0;
    };
    let map: Result<HashMap<_, [u8; 4], [u8; size_of::<EmitOrder>()]>, _> =
        Map::HashMap(map).try_into();
    map.map_or(0, |map| map.keys().count())
}

/// From when its port came to be until it was killed.
#[derive(Clone, Debug)]
struct Life {
    mac: Mac,
    born: Instant,
    died: Option<Instant>,
}

struct Vms<'a> {
    world: &'a World,
    random: Random,
    living: BTreeMap<u8, Vm>,
    /// Their ports are still there.
    corpses: Vec<Vm>,
    lives: Vec<Life>,
    /// Numbers that can be born again.
    free: Vec<u8>,
}

impl<'a> Vms<'a> {
    fn new(world: &'a World, seed: u32, operator: u8) -> Self {
        let first = 1 + operator * NUMBERS;
        Self {
            world,
            random: Random::new(seed ^ (u32::from(operator) << 16)),
            living: BTreeMap::new(),
            corpses: Vec::new(),
            lives: Vec::new(),
            free: (first..first + NUMBERS).collect(),
        }
    }

    /// Something happens to somebody.
    fn step(&mut self) -> Result<()> {
        sleep(Duration::from_millis(self.random.below(150).into()));
        let boot = self.living.len() < 2 || self.random.below(2) == 0;
        if boot && !self.free.is_empty() {
            // Whoever has been dead longest; now and then one that has just died, and is back before
            // anybody could notice.
            let last = self.free.len() - 1;
            let at = if self.random.below(4) == 0 { last } else { 0 };
            let number = self.free.remove(at);
            return self.boot(number);
        }
        let at = self.random.below(self.living.len().try_into()?);
        let Some(&number) = self.living.keys().nth(at.try_into()?) else {
            return Ok(());
        };
        match self.random.below(8) {
            0 | 1 => self.living[&number].renew(),
            2 => {
                let vm = self.living.get_mut(&number).context("gone")?;
                vm.release()?;
                // It says so before its machine goes.
                sleep(Duration::from_millis(100));
                self.kill(number, KillKind::PortDeleted)
            }
            3 => self.kill(number, KillKind::PortKept),
            4 => self.kill(number, KillKind::CarrierLost),
            5 => self.kill(number, KillKind::PortDetached),
            _ => self.kill(number, KillKind::PortDeleted),
        }
    }

    /// The guest asks once its port is watched: a lease from before is not the agent's to know.
    fn boot(&mut self, number: u8) -> Result<()> {
        let name = format!("vm{number}");
        let mut vm = Vm::off(&self.world.node, &name, vm_mac(number))?;
        vm.plug_in()?;
        let deadline = Deadline::after(PATIENCE);
        while !is_watched(&name)? {
            if deadline.passed() {
                let log = fs::read_to_string(Path::new(DIR).join("agent.log"))?;
                bail!("{name} is not watched; the agents say:\n{}", tail(&log, 40));
            }
            sleep(Duration::from_millis(5));
        }
        vm.start_client(Client::Udhcpc)?;
        let ip = vm.wait_lease(PATIENCE)?;
        vm.ping(SERVER_IP)
            .with_context(|| format!("{name} has {ip}"))?;
        self.lives.push(Life {
            mac: vm.mac,
            born: vm.linked_at,
            died: None,
        });
        self.living.insert(number, vm);
        Ok(())
    }

    fn kill(&mut self, number: u8, kind: KillKind) -> Result<()> {
        let mut vm = self.living.remove(&number).context("no such VM")?;
        let at = vm.kill(kind)?;
        let life = self.lives.iter_mut().rfind(|life| life.mac == vm.mac);
        life.context("never born")?.died = Some(at);
        match kind {
            KillKind::PortDeleted | KillKind::PortDetached => self.free.push(number),
            KillKind::CarrierLost | KillKind::PortKept => self.corpses.push(vm),
        }
        // Somebody takes the machine away, sooner or later.
        if self.corpses.len() > 2 {
            let vm = self.corpses.remove(0);
            vm.unplug()?;
            let number = (1..=OPERATORS * NUMBERS).find(|n| vm_mac(*n) == vm.mac);
            self.free.extend(number);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        while self.living.len() < 2 {
            let number = self.free.pop().context("nobody left")?;
            self.boot(number)?;
        }
        Ok(())
    }
}

/// Both programs sit on the port, pinned.
/// By the pins of both links; clsact has filters instead, which outlive an agent too.
fn is_watched(port: &str) -> Result<bool> {
    if !has_tcx()? {
        for way in ["ingress", "egress"] {
            if filters(port, way)? == 0 {
                return Ok(false);
            }
        }
        return Ok(true);
    }
    let ifindex = fs::read_to_string(format!("/sys/class/net/{port}/ifindex"))?;
    let top = Path::new(BPFFS).join("dhcp-reclaim");
    let Ok(versions) = fs::read_dir(top) else {
        return Ok(false);
    };
    Ok(versions.flatten().any(|version| {
        let links = version.path().join("links");
        ["ingress", "egress"]
            .iter()
            .all(|way| links.join(format!("{}-{way}", ifindex.trim())).exists())
    }))
}

/// Numbers from a seed; good enough to shake things.
struct Random(u64);

impl Random {
    fn new(seed: u32) -> Self {
        Self(u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1)
    }

    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let drawn = u32::try_from(self.0 >> 33).unwrap_or(0);
        drawn % limit.max(1)
    }
}

/// Where the agent is killed on its way from a decision to what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The kernel half lets the frame pass, and the store does not know yet that it is to.
    Ordered,
    /// The intent is written down, and the frame has not left.
    Intended,
    /// The frame has left, and nothing of it is written down.
    Sent,
    /// All is written down.
    WrittenDown,
}

impl Step {
    /// Lets the process run until it is there.
    fn reach(self, pid: Pid) -> Result<()> {
        // No other frame of the agent's is as long as a RELEASE.
        let release = |call: &Call| call.number == libc::SYS_sendto && call.args[2] >= 200;
        let mut tracer = Tracer::seize(pid)?;
        match self {
            Self::Ordered => {
                while orders() == 0 {
                    tracer.step()?;
                }
            }
            Self::Intended => while !release(&tracer.step()?) {},
            Self::Sent => {
                while !release(&tracer.step()?) {}
                // Its return.
                tracer.step()?;
            }
            Self::WrittenDown => {
                while !release(&tracer.step()?) {}
                while orders() != 0 {
                    tracer.step()?;
                }
            }
        }
        Ok(())
    }
}

fn store() -> PathBuf {
    Path::new(STATE).join("bindings.redb")
}

fn set_aside() -> Result<Vec<String>> {
    let names = fs::read_dir(STATE)?.flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.filter(|name| name.contains(".bad-")).collect())
}

/// The server and the agent can be quicker than whoever reads the capture.
fn released_on(wire: &Capture, nth: usize) -> Result<()> {
    let is_release = |frame: &Frame| frame.dhcp().is_some_and(|it| it.kind() == Some(RELEASE));
    wire.wait_nth("the RELEASE", nth, PATIENCE, is_release)
        .map(drop)
}

/// The lease of a VM that is learned, dies, and is freed.
fn a_life(world: &World, agent: &Agent, number: u8) -> Result<()> {
    let mut vm = world.boot_heard(agent, number)?;
    let ip = vm.wait_lease(PATIENCE)?;
    agent.wait_event("bound", ip, PATIENCE)?;
    vm.kill(KillKind::PortDeleted)?;
    world
        .server
        .wait_gone(ip, PATIENCE)
        .with_context(|| agent.log())
}

lab_test! {
    fn a_lease_is_remembered_and_the_vm_dies_meanwhile() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 4)?;
        let setup = world.agent(Hook::Tc).quick();
        let agent = setup.start()?;
        let wire = Capture::start(world.server.netns(), NIC)?;
        let (mut dead, alive) = (world.boot_heard(&agent, 1)?, world.boot_heard(&agent, 2)?);
        let (dead_ip, alive_ip) = (dead.wait_lease(PATIENCE)?, alive.wait_lease(PATIENCE)?);
        agent.wait_event("bound", dead_ip, PATIENCE)?;
        agent.wait_event("bound", alive_ip, PATIENCE)?;
        agent.kill();
        dead.kill(KillKind::PortDeleted)?;
        let agent = setup.start()?;
        world.server.wait_gone(dead_ip, PATIENCE).with_context(|| agent.log())?;
        ensure!(agent.state(alive_ip)? == "bound", "{:?}", agent.list()?);
        ensure!(world.server.has(alive_ip)?, "the living lost its lease");
        released_on(&wire, 1)?;
        ensure!(wire.dhcp(RELEASE).len() == 1, "{:?}", wire.dhcp(RELEASE));
        agent.stop()
    }

    fn killed_between_any_two_steps_of_a_release() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 4)?;
        let setup = world.agent(Hook::Tc).quick();
        let wire = Capture::start(world.server.netns(), NIC)?;
        for (step, left) in [
            (Step::Ordered, None),
            (Step::Intended, Some("Failed")),
            (Step::Sent, Some("Sent")),
            (Step::WrittenDown, None),
        ] {
            let agent = setup.start()?;
            let mut vm = world.boot_heard(&agent, 1)?;
            let ip = vm.wait_lease(PATIENCE)?;
            agent.wait_event("bound", ip, PATIENCE)?;
            let before = wire.dhcp(RELEASE).len();
            let told = agent.log().len();
            vm.kill(KillKind::PortDeleted)?;
            step.reach(agent.pid()).with_context(|| format!("{step:?}"))?;
            agent.kill();
            let agent = setup.start()?;
            let log = || agent.log().split_off(told);
            world.server.wait_gone(ip, PATIENCE).with_context(log)?;
            let said = log().lines().find(|line| line.contains(WHILE_RELEASING)).map(str::to_owned);
            match left {
                Some(left) => {
                    let said = said.with_context(log)?;
                    ensure!(said.contains(left), "{step:?}: {said}");
                }
                None => ensure!(said.is_none(), "{step:?}: {said:?}"),
            }
            agent.until("the end", PATIENCE, |agent| {
                Ok((agent.state(ip)? == "released").then_some(()))
            })?;
            // Its next look at the address, and whatever it would have sent by then.
            ensure!(orders() == 0, "{step:?}: an order is left");
            released_on(&wire, before + 1)?;
            let releases = wire.dhcp(RELEASE).len() - before;
            ensure!(releases == 1, "{step:?}: {releases} RELEASEs\n{}", log());
            agent.stop()?;
        }
        Ok(())
    }

    fn what_came_while_there_was_no_agent_is_read() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 4)?;
        let setup = world.agent(Hook::Tc).quick();
        let agent = setup.start()?;
        // Their ports are watched, and nobody has asked yet.
        let mut vms = Vec::new();
        for number in 1..=2 {
            let mut vm = Vm::off(&world.node, &format!("vm{number}"), vm_mac(number))?;
            vm.plug_in()?;
            agent.wait_port_event("port-up", &vm.name, PATIENCE)?;
            vms.push(vm);
        }
        agent.kill();
        let mut leases = Vec::new();
        for vm in &mut vms {
            vm.start_client(Client::Udhcpc)?;
            leases.push(vm.wait_lease(PATIENCE)?);
        }
        vms[0].kill(KillKind::PortDeleted)?;
        // A clean stop leaves as much behind as a crash does.
        let agent = setup.start()?;
        world.server.wait_gone(leases[0], PATIENCE).with_context(|| agent.log())?;
        ensure!(agent.state(leases[1])? == "bound", "{:?}\n{}", agent.list()?, agent.log());
        agent.stop()?;
        vms[1].renew()?;
        vms[1].kill(KillKind::PortDeleted)?;
        let agent = setup.start()?;
        world.server.wait_gone(leases[1], PATIENCE).with_context(|| agent.log())
    }

    /// A VM is plugged in anew while there is no agent, and the next one is killed as soon as it
    /// watches the new port: the one after that must not take the old port for there, and with it
    /// the answer at the new one for a neighbour's.
    fn killed_when_it_has_just_found_a_new_port() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 4)?;
        let setup = world.agent(Hook::Tc).quick();
        let agent = setup.start()?;
        let mut vm = world.boot_heard(&agent, 1)?;
        let ip = vm.wait_lease(PATIENCE)?;
        agent.wait_event("bound", ip, PATIENCE)?;
        agent.kill();
        vm.kill(KillKind::PortDeleted)?;
        drop(vm);
        let mut vm = Vm::off(&world.node, "vm1", vm_mac(1))?;
        vm.plug_in()?;
        let mut second = setup.spawn()?;
        let mut tracer = Tracer::seize(second.pid())?;
        while !is_watched("vm1")? {
            tracer.step()?;
        }
        second.kill();
        vm.start_client(Client::Udhcpc)?;
        ensure!(vm.wait_lease(PATIENCE)? == ip, "another address");
        let agent = setup.start()?;
        let (verdict, reason) = agent.gate(ip, "confirmed")?;
        ensure!(verdict == "pass", "{verdict}: {reason}\n{}", agent.log());
        vm.kill(KillKind::PortDeleted)?;
        world.server.wait_gone(ip, PATIENCE).with_context(|| agent.log())?;
        agent.stop()
    }

    fn a_damaged_store_is_set_aside() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 4)?;
        let setup = world.agent(Hook::Tc).quick();
        let agent = setup.start()?;
        a_life(&world, &agent, 1)?;
        agent.stop()?;
        let mut bytes = fs::read(store())?;
        let half = bytes.len() / 2;
        bytes[512..half].fill(0xa5);
        fs::write(store(), bytes)?;
        let agent = setup.start()?;
        let log = agent.log();
        ensure!(log.contains("starting without it") && log.contains("bindings.redb"), "{log}");
        ensure!(set_aside()?.len() == 1, "{:?}", set_aside()?);
        a_life(&world, &agent, 2)?;
        // The new one is a good one.
        agent.kill();
        let agent = setup.start()?;
        ensure!(set_aside()?.len() == 1, "{:?}", set_aside()?);
        a_life(&world, &agent, 3)
    }

    fn a_foreign_store_is_set_aside() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 4)?;
        fs::create_dir_all(STATE)?;
        let text = "lease 10.67.0.100 { binding state active; }\n".repeat(100);
        fs::write(store(), &text)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let log = agent.log();
        ensure!(log.contains("starting without it"), "{log}");
        let aside = set_aside()?;
        ensure!(aside.len() == 1, "{aside:?}");
        let kept = fs::read_to_string(Path::new(STATE).join(&aside[0]))?;
        ensure!(kept == text, "what was set aside is not what was there");
        a_life(&world, &agent, 1)
    }

    fn a_store_in_use_is_no_reason_to_start_without_one() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 1)?;
        let _agent = world.agent(Hook::Tc).quick().start()?;
        let control = Path::new(DIR).join("other.sock").display().to_string();
        let mut second = world.agent(Hook::Tc).quick().control(&control).spawn()?;
        let status = second.wait_end(PATIENCE)?;
        ensure!(!status.success(), "it started");
        let log = second.log();
        ensure!(log.contains("in use by another agent") && log.contains("--state"), "{log}");
        ensure!(set_aside()?.is_empty(), "{:?}", set_aside()?);
        Ok(())
    }
}
