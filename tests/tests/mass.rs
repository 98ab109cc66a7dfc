//! A thousand VMs die at once, and each server loses none of the thousand RELEASEs.
//!
//! The judges are the server's own store and a capture of what reaches the server.
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook},
    clock::{Deadline, now},
    crowd::{Asking, Crowd, crowd_mac, unplug},
    fixture::{Mac, NIC, SERVER_IP},
    lab_test,
    server::{Place, Pool, ServerKind},
    wire::{Capture, RELEASE},
    world::{PATIENCE, World},
};

const PORTS: u16 = 4;
const CLIENTS: u16 = 1000;
/// The machine may be slow; what is measured is printed.
const SLACK: Duration = Duration::from_secs(25);

/// Takes the leases of all clients, some ports at a time.
fn take(crowds: &[Crowd], asking: Asking) -> Result<BTreeMap<Mac, Ipv4Addr>> {
    let base = Pool::large().first.to_bits() + 16;
    let clients: Vec<(Mac, Ipv4Addr)> = (0..CLIENTS)
        .map(|n| (crowd_mac(n), Ipv4Addr::from_bits(base + u32::from(n))))
        .collect();
    let each = usize::from(CLIENTS / PORTS);
    std::thread::scope(|scope| {
        let takers: Vec<_> = crowds
            .iter()
            .zip(clients.chunks(each))
            .map(|(crowd, clients)| {
                scope.spawn(move || crowd.take(clients, asking, Duration::from_secs(60)))
            })
            .collect();
        let mut leases = BTreeMap::new();
        for taker in takers {
            let taken = taker
                .join()
                .map_err(|_panic| anyhow::anyhow!("a taker panicked"))?;
            leases.extend(taken?);
        }
        Ok(leases)
    })
}

/// Waits until the agent has bound every lease.
fn all_bound(agent: &Agent, leases: &BTreeMap<Mac, Ipv4Addr>) -> Result<()> {
    let deadline = Deadline::after(PATIENCE);
    loop {
        let list = agent.list()?;
        let bound = list
            .iter()
            .filter(|binding| binding.state == "bound")
            .map(|binding| binding.ip)
            .collect::<BTreeSet<_>>();
        let known = leases.values().filter(|ip| bound.contains(ip)).count();
        if known == leases.len() {
            return Ok(());
        }
        ensure!(
            !deadline.passed(),
            "the agent knows {known} of {} leases:\n{}",
            leases.len(),
            agent.log()
        );
        sleep(Duration::from_millis(200));
    }
}

fn dies_at_once(kind: ServerKind, asking: Asking, rate: u32) -> Result<()> {
    let world = World::with_pool(kind, Place::Remote, Pool::large())?;
    let rate_arg = rate.to_string();
    let agent = world.agent(Hook::Tc).args(&[
        "--breaker",
        "off",
        "--rate",
        &rate_arg,
        "--record-rate",
        "10000",
        "--record-burst",
        "10000",
        "--bindings-per-port",
        "1000",
        // Nobody is to fall silent while the leases are being taken.
        "--silence",
        "60s",
        "--probe-interval",
        "5s",
        "--hold-down",
        "1s",
        "--hold-down-uplink",
        "1s",
        "--settle",
        "500ms",
    ]);
    let agent = agent.start()?;
    let wire = Capture::start(world.server.netns(), NIC)?;
    let neighbour = world.boot(9)?;
    let neighbour_ip = neighbour.wait_lease(PATIENCE)?;
    neighbour.ping(SERVER_IP)?;
    let crowds = (1..=PORTS)
        .map(|n| Crowd::plug_in(&world.node, &format!("crowd{n}")))
        .collect::<Result<Vec<_>>>()?;

    let begin = now();
    let leases = take(&crowds, asking)?;
    let taking = now() - begin;
    all_bound(&agent, &leases)?;
    let mine: BTreeSet<Ipv4Addr> = leases.values().copied().collect();
    ensure!(
        mine.len() == usize::from(CLIENTS),
        "{} addresses",
        mine.len()
    );
    let stored = world.server.leases()?;
    let held = stored
        .iter()
        .filter(|lease| mine.contains(&lease.ip))
        .count();
    ensure!(held == mine.len(), "the server has {held} of the leases");

    let died = now();
    unplug(crowds)?;
    let paced = Duration::from_secs(u64::from(CLIENTS)) / rate;
    let deadline = Deadline::after(paced + SLACK);
    while wire.count(is_release) < mine.len() && !deadline.passed() {
        sleep(Duration::from_millis(100));
    }
    let sending = now() - died;
    // A loss shows as a lease that stays, one too many as a RELEASE that comes late.
    sleep(Duration::from_secs(2));
    let releases = wire.dhcp(RELEASE);
    let stays = world
        .server
        .leases()?
        .iter()
        .filter(|lease| mine.contains(&lease.ip))
        .count();
    println!(
        "NOTE {kind}: {CLIENTS} leases taken in {:.1} s; {} RELEASEs in {:.1} s at {rate}/s, {stays} lost",
        taking.as_secs_f64(),
        releases.len(),
        sending.as_secs_f64(),
    );
    let released: BTreeSet<Ipv4Addr> = releases.iter().map(|dhcp| dhcp.ciaddr).collect();
    ensure!(
        released == mine,
        "{} RELEASEs on the wire, for {} of the addresses:\n{}",
        releases.len(),
        released.len(),
        agent.log()
    );
    ensure!(releases.len() == mine.len(), "{} RELEASEs", releases.len());
    ensure!(stays == 0, "the server kept {stays} leases");
    neighbour.ping(SERVER_IP)?;
    world
        .server
        .wait_lease(neighbour_ip, neighbour.mac, PATIENCE)
        .context("the neighbour's lease")?;
    agent.stop()
}

fn is_release(frame: &dhcp_reclaim_tests::wire::Frame) -> bool {
    frame
        .dhcp()
        .is_some_and(|dhcp| dhcp.kind() == Some(RELEASE))
}

lab_test! {
    // At this rate it reads faster than it is sent to (FACTS.md §5a).
    fn a_thousand_at_dnsmasq() {
        dies_at_once(ServerKind::Dnsmasq, Asking::Straight, 100)
    }
    fn a_thousand_at_kea() {
        dies_at_once(ServerKind::Kea, Asking::Straight, 500)
    }
    fn a_thousand_at_isc() {
        dies_at_once(ServerKind::Isc, Asking::Discover, 200)
    }
}
