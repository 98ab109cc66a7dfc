//! From the death of VMs to their addresses free at the server.
use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook},
    clock::{Deadline, now},
    crowd::{Crowd, unplug},
    fixture::{BRIDGE, LEASE_SECONDS, Mac, NIC, SERVER_IP, SERVER_MAC, vm_mac},
    forge::{Forged, Nic},
    server::{Place, ServerKind},
    vm::{Client, KillKind, Vm},
    wire::{Capture, DISCOVER, RELEASE},
    world::{PATIENCE, World},
};

use crate::{
    lab,
    stats::{median, percentile},
};
use dhcp_reclaim_tests::report::Row;

/// All deaths of this section wait for this long before anything is sent.
const HOLD_DOWN: Duration = Duration::from_secs(1);
/// Of one frame in a socket's buffer.
const TRUESIZE: u64 = 1280;
/// On their way at once, by a pacer that sees the server's socket.
const AT_ONCE: u64 = 48;
const OFFER: u8 = 2;

pub fn rows(quick: bool) -> Result<Vec<Row>> {
    let mut rows = one(if quick { 5 } else { 15 })?;
    rows.extend(many(ServerKind::Dnsmasq, 100, 1, quick)?);
    // The goal is within the noise of one.
    let rounds = if quick { 1 } else { 6 };
    rows.extend(many(ServerKind::Dnsmasq, 1000, rounds, quick)?);
    rows.extend(many(ServerKind::Kea, 1000, 1, quick)?);
    if !quick {
        rows.extend(many(ServerKind::Kea, 10_000, 1, quick)?);
    }
    Ok(rows)
}

fn agent(world: &World) -> Result<Agent> {
    let agent = world.agent(Hook::Tc).args(&[
        "--breaker",
        "off",
        "--record-rate",
        "20000",
        "--record-burst",
        "20000",
        "--bindings-per-port",
        "4000",
        // Nobody is to fall silent while leases are being taken.
        "--silence",
        "10m",
        "--probe-interval",
        "5s",
        "--hold-down",
        "1s",
        "--hold-down-uplink",
        "1s",
        "--settle",
        "500ms",
        "--detach-on-exit",
    ]);
    agent.start()
}

/// A pool of one address: whoever comes next gets it as soon as the server has it back.
fn one(rounds: u8) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for kind in [ServerKind::Dnsmasq, ServerKind::Kea] {
        lab::sweep()?;
        let world = World::new(kind, Place::Remote, 1)?;
        lab::settle_in(&world)?;
        let agent = agent(&world)?;
        let wire = Capture::start(world.server.netns(), NIC)?;
        let next = Crowd::plug_in(&world.node, "next")?;
        let mut times = Vec::new();
        for round in 0..rounds {
            let name = format!("vm{round}");
            let mut vm = Vm::off(&world.node, &name, vm_mac(10 + round))?;
            vm.plug_in()?;
            agent.wait_port_event("port-up", &name, PATIENCE)?;
            vm.start_client(Client::Udhcpc)?;
            let ip = vm.wait_lease(PATIENCE)?;
            agent.wait("its lease", PATIENCE, |event| {
                event.name == "bound" && event.json["mac"] == vm.mac.to_string()
            })?;
            let died = vm.kill(KillKind::PortDeleted)?;
            let given = given_again(&wire, &next, died)?;
            times.push((given - died).as_secs_f64());
            world.server.wait_gone(ip, PATIENCE)?;
            // The offer is forgotten.
            sleep(Duration::from_millis(200));
        }
        let found = median(&times);
        let over = found.value - HOLD_DOWN.as_secs_f64();
        rows.push(
            Row::new(
                SECTION,
                format!("1 VM, {kind}: its address offered to the next"),
                found.value,
                "s",
            )
            .interval(found.interval)
            .beside("the lease's end", f64::from(LEASE_SECONDS))
            .goal("hold-down (1 s) + 0.2 s", over <= 0.2),
        );
        rows.push(
            Row::new(SECTION, "the 99th of 100", percentile(&times, 0.99), "s")
                .note(format!("of {rounds}: the slowest")),
        );
        agent.stop()?;
    }
    Ok(rows)
}

const SECTION: &str = "reclaim";

/// Asks for the address until it is offered; clients ask every few seconds, this one all the time.
fn given_again(wire: &Capture, next: &Crowd, since: Instant) -> Result<Instant> {
    let mac = vm_mac(250);
    let offered = |frame: &dhcp_reclaim_tests::wire::Frame| {
        frame.at > since
            && frame
                .dhcp()
                .is_some_and(|dhcp| dhcp.kind() == Some(OFFER) && dhcp.chaddr == mac)
    };
    let deadline = Deadline::after(PATIENCE);
    let mut xid = 1;
    while !deadline.passed() {
        xid += 1;
        next.send(&Forged::client(DISCOVER, mac, xid).frame())?;
        if let Ok(frame) = wire.wait("an OFFER", Duration::from_millis(5), offered) {
            return Ok(frame.at);
        }
    }
    bail!("the address was not offered again")
}

/// When each address was seen to be free, and which never were.
struct Freed {
    at: Vec<f64>,
    lost: usize,
}

impl Freed {
    /// Addresses a second, from `start` on, when the first RELEASE was sent.
    fn rate(&self, start: f64) -> f64 {
        let last = self.at.iter().copied().fold(0.0, f64::max);
        self.at.len() as f64 / (last - start)
    }
}

/// Follows the server's store until it is done: nothing changes for a second after `done`.
fn follow(
    world: &World,
    leases: &BTreeMap<Mac, Ipv4Addr>,
    since: Instant,
    done: impl Fn() -> bool,
) -> Result<Freed> {
    const QUIET: Duration = Duration::from_secs(2);
    let mut seen: BTreeMap<Ipv4Addr, Instant> = leases.values().map(|ip| (*ip, since)).collect();
    let mut free: BTreeMap<Ipv4Addr, Instant> = BTreeMap::new();
    let mut changed = now();
    let limit = Deadline::after(Duration::from_secs(240));
    loop {
        let begin = now();
        // A store that is just being written may not be readable.
        if let Ok(there) = world.server.glance() {
            for lease in there {
                if let Some(at) = seen.get_mut(&lease.ip) {
                    *at = begin;
                    free.remove(&lease.ip);
                }
            }
            for (ip, at) in &seen {
                if *at < begin && !free.contains_key(ip) {
                    free.insert(*ip, begin);
                    changed = begin;
                }
            }
        }
        let quiet = now() - changed > QUIET;
        if quiet && (done() || free.len() == seen.len()) {
            break;
        }
        ensure!(!limit.passed(), "{} of {} free", free.len(), seen.len());
        let spent = now() - begin;
        sleep((spent * 4).clamp(Duration::from_millis(5), Duration::from_millis(200)));
    }
    let at: Vec<f64> = free
        .values()
        .map(|at| (*at - since).as_secs_f64())
        .collect();
    let lost = seen.len() - at.len();
    Ok(Freed { at, lost })
}

/// One time of all that is compared, one after another.
struct Round {
    reclaimed: Freed,
    /// Addresses a second.
    pace: f64,
    paced: Freed,
    burst: Freed,
    looped: Option<f64>,
}

fn round(kind: ServerKind, count: usize, quick: bool) -> Result<Round> {
    let ports = if count > 1000 { 10 } else { 4 };
    let (paced, burst, looped) = {
        lab::sweep()?;
        let world = World::with_pool(kind, Place::Remote, lab::pool(count)?)?;
        let crowds = lab::plug_in(&world, ports)?;
        let leases = lab::take(&crowds, count)?;
        let paced = paced(&world, &leases)?;
        let again = lab::take(&crowds, count)?;
        let burst = burst(&world, &again)?;
        let looped = match kind {
            ServerKind::Dnsmasq => {
                let again = lab::take(&crowds, count)?;
                let sample = if quick { 50 } else { 200 };
                Some(release_loop(&world, &again, sample)?)
            }
            ServerKind::Kea | ServerKind::Isc => None,
        };
        (paced, burst, looped)
    };
    let (reclaimed, first) = reclaim(kind, count, ports)?;
    let pace = reclaimed.rate(first);
    Ok(Round {
        reclaimed,
        pace,
        paced,
        burst,
        looped,
    })
}

fn many(kind: ServerKind, count: usize, times: usize, quick: bool) -> Result<Vec<Row>> {
    let rounds: Vec<Round> = (0..times)
        .map(|_| round(kind, count, quick))
        .collect::<Result<_>>()?;
    let of = |what: fn(&Round) -> f64| median(&rounds.iter().map(what).collect::<Vec<_>>());
    let at: Vec<f64> = rounds
        .iter()
        .flat_map(|round| round.reclaimed.at.iter().copied())
        .collect();
    let lost: usize = rounds.iter().map(|round| round.reclaimed.lost).sum();
    let burst_lost: usize = rounds.iter().map(|round| round.burst.lost).sum();
    let pace = of(|round| round.pace);
    let paced = of(|round| round.paced.rate(0.0));
    let ratio = of(|round| round.pace / round.paced.rate(0.0));

    let who = format!("{count} VMs at once, {kind}");
    let mut rows = Vec::new();
    rows.push(
        Row::new(
            SECTION,
            format!("{who}: the median address is free"),
            median(&at).value,
            "s",
        )
        .beside("the lease's end", f64::from(LEASE_SECONDS)),
    );
    rows.push(Row::new(
        SECTION,
        format!("{who}: 99 of 100 addresses are free"),
        percentile(&at, 0.99),
        "s",
    ));
    rows.push(
        Row::new(SECTION, format!("{who}: lost"), lost as f64, "RELEASEs")
            .beside("all sent at once", burst_lost as f64)
            .goal("none", lost == 0)
            .note(several(times, String::new)),
    );
    let speed = |row: Row| match times {
        1 => row,
        _ => row.interval(pace.interval),
    };
    if count >= 1000 {
        let paced_lost: usize = rounds.iter().map(|round| round.paced.lost).sum();
        let mut notes = vec![several(times, || {
            let [low, high] = ratio.interval;
            format!(
                ", of which the ratio is {:.3} [{low:.3}, {high:.3}]",
                ratio.value
            )
        })];
        if paced_lost > 0 {
            notes.push(format!("that one lost {paced_lost}"));
        }
        notes.retain(|note| !note.is_empty());
        rows.push(
            speed(Row::new(
                SECTION,
                format!("{who}: pace"),
                pace.value,
                "a second",
            ))
            .beside("by somebody who sees the server's socket", paced.value)
            .goal("at least 0.9 of that", ratio.value >= 0.9)
            .note(notes.join("; ")),
        );
    }
    if rounds.iter().all(|round| round.looped.is_some()) {
        let looped = of(|round| round.looped.unwrap_or_default());
        let met = pace.value >= 10.0 * looped.value || ratio.value >= 0.9;
        rows.push(
            speed(Row::new(
                SECTION,
                format!("{who}: pace"),
                pace.value,
                "a second",
            ))
            .beside("a dhcp_release process each, store re-read", looped.value)
            .goal("ten times that, as far as the server can", met)
            .note(format!(
                "the server itself, by somebody who sees its socket: {:.0}{}",
                paced.value,
                match times {
                    1 => String::new(),
                    _ => format!(
                        "; the loop from {:.0} to {:.0}",
                        looped.interval[0], looped.interval[1]
                    ),
                }
            )),
        );
    }
    Ok(rows)
}

/// For the note of a row that was taken more than once.
fn several(times: usize, more: impl Fn() -> String) -> String {
    match times {
        1 => String::new(),
        _ => format!("{times} times{}", more()),
    }
}

fn reclaim(kind: ServerKind, count: usize, ports: usize) -> Result<(Freed, f64)> {
    lab::sweep()?;
    let world = World::with_pool(kind, Place::Remote, lab::pool(count)?)?;
    lab::settle_in(&world)?;
    let agent = agent(&world)?;
    let crowds = lab::plug_in(&world, ports)?;
    for crowd in &crowds {
        agent.wait_port_event("port-up", crowd.name(), PATIENCE)?;
    }
    let leases = lab::take(&crowds, count)?;
    lab::all_bound(&agent, count)?;
    let wire = Capture::start(world.server.netns(), NIC)?;
    let died = now();
    unplug(crowds)?;
    // Who captures all of them takes a processor from the server.
    let first = wire.wait("a RELEASE", PATIENCE, |frame| {
        frame
            .dhcp()
            .is_some_and(|dhcp| dhcp.kind() == Some(RELEASE))
    })?;
    drop(wire);
    let sent = || agent.stat("core.releases_sent").unwrap_or(0) as usize >= count;
    let freed = follow(&world, &leases, died, || {
        died.elapsed() > HOLD_DOWN * 3 && sent()
    })?;
    agent.stop()?;
    Ok((freed, (first.at - died).as_secs_f64()))
}

fn release(mac: Mac, ip: Ipv4Addr, xid: u32) -> Vec<u8> {
    Forged::client(RELEASE, mac, xid)
        .with(|frame| {
            frame.to_mac = SERVER_MAC;
            frame.from_ip = ip;
            frame.to_ip = SERVER_IP;
            frame.ciaddr = ip;
        })
        .option(54, &SERVER_IP.octets())
        .frame()
}

/// All as fast as they can be sent.
fn burst(world: &World, leases: &BTreeMap<Mac, Ipv4Addr>) -> Result<Freed> {
    let nic = Nic::open(&world.node.netns, BRIDGE)?;
    let begin = now();
    for (n, (mac, ip)) in leases.iter().enumerate() {
        nic.send(&release(*mac, *ip, u32::try_from(n)?))?;
    }
    follow(world, leases, begin, || true)
}

/// The next is sent when the server's socket has room: nobody outside of its host sees that.
fn paced(world: &World, leases: &BTreeMap<Mac, Ipv4Addr>) -> Result<Freed> {
    let nic = Nic::open(&world.node.netns, BRIDGE)?;
    let server = world.server.netns().try_clone()?;
    let frames: Vec<Vec<u8>> = leases
        .iter()
        .zip(0..)
        .map(|((mac, ip), n)| release(*mac, *ip, n))
        .collect();
    let begin = now();
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || -> Result<()> {
            server.enter(|| {
                let mut left = frames.iter();
                while left.len() > 0 {
                    let lies = waiting()? / TRUESIZE;
                    for frame in left.by_ref().take(AT_ONCE.saturating_sub(lies) as usize) {
                        nic.send(frame)?;
                    }
                    std::thread::yield_now();
                }
                Ok(())
            })
        });
        let freed = follow(world, leases, begin, || true)?;
        match sender.join() {
            Ok(sent) => sent?,
            Err(_) => bail!("the pacer panicked"),
        }
        Ok(freed)
    })
}

/// Bytes in the sockets of the DHCP server of this thread's namespace.
fn waiting() -> Result<u64> {
    let udp = fs::read_to_string("/proc/thread-self/net/udp")?;
    let packet = fs::read_to_string("/proc/thread-self/net/packet")?;
    let mut bytes = 0;
    for line in udp.lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, local, _, _, queues, ..] = fields[..] else {
            continue;
        };
        if local.ends_with(":0043") {
            let (_, received) = queues.split_once(':').context("no queues")?;
            bytes += u64::from_str_radix(received, 16)?;
        }
    }
    for line in packet.lines().skip(1) {
        let rmem = line.split_whitespace().nth(6).context("no rmem")?;
        bytes += rmem.parse::<u64>()?;
    }
    Ok(bytes)
}

/// As OpenStack Neutron does it: a process for each address, then a look into the store; three tries.
/// Returns addresses a second.
fn release_loop(world: &World, leases: &BTreeMap<Mac, Ipv4Addr>, sample: usize) -> Result<f64> {
    const TRIES: usize = 3;
    const BETWEEN: Duration = Duration::from_millis(300);

    let begin = now();
    let mut freed = 0;
    for (mac, ip) in leases.iter().take(sample) {
        for attempt in 0..TRIES {
            if attempt > 0 {
                sleep(BETWEEN);
            }
            let mut command: Command = world.server.netns().command("dhcp_release");
            let status = command
                .args([NIC, &ip.to_string(), &mac.to_string()])
                .status();
            ensure!(
                status.context("dhcp_release")?.success(),
                "dhcp_release failed"
            );
            let there = world.server.glance()?;
            if there.iter().all(|lease| lease.ip != *ip) {
                freed += 1;
                break;
            }
        }
    }
    ensure!(freed > 0, "dhcp_release freed nothing");
    Ok(f64::from(freed) / (now() - begin).as_secs_f64())
}
