//! A thousand VMs die at once, and each server loses none of the thousand RELEASEs.
//!
//! The judges are the server's own store and a capture of what reaches the server.
use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    net::Ipv4Addr,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook},
    clock::{Deadline, now},
    crowd::{Asking, Crowd, crowd_mac, unplug},
    fixture::{BRIDGE, Mac, SERVER_IP},
    lab_test,
    server::{Place, Pool, ServerKind},
    wire::{ACK, Capture, Frame, RELEASE},
    world::{PATIENCE, World},
};

const PORTS: u16 = 4;
/// How many there are, where a thousand are too many: an emulated processor keeps the agent from running
/// for seconds meanwhile, and it rightly counts all silence anew.
const CLIENTS: &str = "DHCP_RECLAIM_CROWD";
const NODE_IP: Ipv4Addr = Ipv4Addr::new(10, 67, 0, 253);
/// The machine may be slow.
const SLACK: Duration = Duration::from_secs(25);

fn how_many() -> u16 {
    let given = env::var(CLIENTS).ok().and_then(|value| value.parse().ok());
    given.unwrap_or(1000)
}

/// Takes the leases of all clients, some ports at a time.
fn take(crowds: &[Crowd], asking: Asking) -> Result<BTreeMap<Mac, Ipv4Addr>> {
    let base = Pool::large().first.to_bits() + 16;
    let clients: Vec<(Mac, Ipv4Addr)> = (0..how_many())
        .map(|n| (crowd_mac(n), Ipv4Addr::from_bits(base + u32::from(n))))
        .collect();
    let each = usize::from(how_many() / PORTS);
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
            "the agent knows {known} of {} leases; the others: {:?}; {}",
            leases.len(),
            leases
                .values()
                .filter(|ip| !bound.contains(ip))
                .map(|ip| (ip, list.iter().find(|b| b.ip == *ip).map(|b| &b.state)))
                .collect::<Vec<_>>(),
            agent.ask_text(&["stats"])?
        );
        sleep(Duration::from_millis(200));
    }
}

/// `rate` is what the agent keeps to if it cannot learn better: with an address of its own on the
/// bridge it can.
fn dies_at_once(
    kind: ServerKind,
    place: Place,
    asking: Asking,
    rate: Option<u32>,
    stops: bool,
) -> Result<()> {
    let world = World::with_pool(kind, place, Pool::large())?;
    if place == Place::Remote && rate.is_none() {
        world
            .node
            .netns
            .ip(&format!("addr add {NODE_IP}/16 dev {BRIDGE}"))?;
    }
    // So slow that nothing is done in time unless the pace is learned.
    let by_default = if stops { 50 } else { 5 };
    let rate_arg = rate.unwrap_or(by_default).to_string();
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
    let wire = Capture::start(world.server.netns(), place.link())?;
    let neighbour = world.boot(9)?;
    let neighbour_ip = neighbour.wait_lease(PATIENCE)?;
    neighbour.ping(SERVER_IP)?;
    let crowds = (1..=PORTS)
        .map(|n| Crowd::plug_in(&world.node, &format!("crowd{n}")))
        .collect::<Result<Vec<_>>>()?;
    for crowd in &crowds {
        // What is said before a port is watched is not heard.
        agent.wait_port_event("port-up", crowd.name(), PATIENCE)?;
    }

    let leases = take(&crowds, asking)?;
    all_bound(&agent, &leases)?;
    let mine: BTreeSet<Ipv4Addr> = leases.values().copied().collect();
    ensure!(
        mine.len() == usize::from(how_many()),
        "{} addresses",
        mine.len()
    );
    let stored = world.server.leases()?;
    let held = stored
        .iter()
        .filter(|lease| mine.contains(&lease.ip))
        .count();
    ensure!(held == mine.len(), "the server has {held} of the leases");

    unplug(crowds)?;
    if stops {
        stop_for_a_while(&world, &wire).with_context(|| agent.log())?;
    }
    let paced = rate.map_or(Duration::ZERO, |rate| {
        Duration::from_secs(u64::from(how_many())) / rate
    });
    let deadline = Deadline::after(paced + SLACK);
    while wire.count(is_release) < mine.len() && !deadline.passed() {
        sleep(Duration::from_millis(100));
    }
    // A loss shows as a lease that stays, one too many as a RELEASE that comes late.
    sleep(Duration::from_secs(2));
    let releases = wire.dhcp(RELEASE);
    let stays = world
        .server
        .leases()?
        .iter()
        .filter(|lease| mine.contains(&lease.ip))
        .count();
    let explained = mine
        .first()
        .map(|ip| agent.ask_text(&["explain", &ip.to_string()]));
    let released: BTreeSet<Ipv4Addr> = releases.iter().map(|dhcp| dhcp.ciaddr).collect();
    ensure!(
        released == mine,
        "{} RELEASEs on the wire, for {} of the addresses:\n{}\n{:?}\n{}",
        releases.len(),
        released.len(),
        agent.ask_text(&["stats"]).unwrap_or_default(),
        explained,
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

/// The server stops between two RELEASEs, and is sent no more than it has room for.
fn stop_for_a_while(world: &World, wire: &Capture) -> Result<()> {
    const AT_ONCE: usize = 32;
    let deadline = Deadline::after(PATIENCE);
    // Only who has shown that he reads is waited for: until then there is but the rate.
    let is_shown = |frame: &Frame| {
        let dhcp = frame.dhcp();
        dhcp.is_some_and(|dhcp| dhcp.kind() == Some(ACK) && dhcp.yiaddr.is_unspecified())
    };
    while wire.count(is_release) < 100 || wire.count(is_shown) == 0 {
        ensure!(
            !deadline.passed(),
            "{} RELEASEs, {} answers to what came behind them",
            wire.count(is_release),
            wire.count(is_shown)
        );
        sleep(Duration::from_millis(1));
    }
    world.server.freeze()?;
    let frozen_at = now();
    // More than its socket has room for would come in this time, if it came by rate.
    sleep(Duration::from_secs(5));
    let meanwhile = wire.count(|frame| is_release(frame) && frame.at >= frozen_at);
    world.server.thaw()?;
    ensure!(
        meanwhile <= AT_ONCE,
        "{meanwhile} RELEASEs to a server that does not read"
    );
    Ok(())
}

fn is_release(frame: &Frame) -> bool {
    frame
        .dhcp()
        .is_some_and(|dhcp| dhcp.kind() == Some(RELEASE))
}

lab_test! {
    // At this rate it reads faster than it is sent to (FACTS.md §5a).
    fn a_thousand_at_dnsmasq_by_rate() {
        dies_at_once(ServerKind::Dnsmasq, Place::Remote, Asking::Straight, Some(100), false)
    }
    fn a_thousand_at_dnsmasq() {
        dies_at_once(ServerKind::Dnsmasq, Place::Remote, Asking::Straight, None, false)
    }
    fn a_thousand_at_dnsmasq_of_the_node() {
        dies_at_once(ServerKind::Dnsmasq, Place::Local, Asking::Straight, None, false)
    }
    fn a_thousand_at_kea() {
        dies_at_once(ServerKind::Kea, Place::Remote, Asking::Straight, None, false)
    }
    fn a_thousand_at_kea_of_the_node() {
        dies_at_once(ServerKind::Kea, Place::Local, Asking::Straight, None, false)
    }
    fn a_thousand_at_a_server_that_stops() {
        dies_at_once(ServerKind::Dnsmasq, Place::Remote, Asking::Straight, None, true)
    }
    fn a_thousand_at_isc() {
        dies_at_once(ServerKind::Isc, Place::Remote, Asking::Discover, None, false)
    }
}
