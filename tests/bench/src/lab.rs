//! What several sections do: many clients that take leases, and an agent that knows them.
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, STATE},
    clock::Deadline,
    crowd::{Asking, Crowd, crowd_mac},
    fixture::{BRIDGE, Mac},
    netns::NetNs,
    sandbox::DIR,
    server::Pool,
    world::World,
};

/// The node's own address: what the agent asks servers from.
const NODE: &str = "10.67.0.253/16";
/// For the largest crowd.
const PATIENCE: Duration = Duration::from_secs(120);

/// A /16 with room for `count` clients.
pub fn pool(count: usize) -> Result<Pool> {
    let first = Ipv4Addr::new(10, 67, 16, 0);
    let last = Ipv4Addr::from_bits(first.to_bits() + u32::try_from(count)? + 255);
    Ok(Pool {
        first,
        last,
        prefix: 16,
        leasequery: false,
        renewal: None,
    })
}

/// Gives the node an address on its bridge.
pub fn settle_in(world: &World) -> Result<()> {
    world
        .node
        .netns
        .ip(&format!("addr add {NODE} dev {BRIDGE}"))
}

/// Takes down what an earlier world of this sandbox left: links, stores, memory.
pub fn sweep() -> Result<()> {
    let script = format!(
        "for link in $(ls /sys/class/net); do
             [ $link = lo ] || ip link del $link 2>/dev/null || true
         done
         rm -rf {STATE} {DIR}/server"
    );
    NetNs::current()?.shell(&script).map(drop)
}

/// Plugs in `ports` veths with nobody behind them.
pub fn plug_in(world: &World, ports: usize) -> Result<Vec<Crowd>> {
    let names = (1..=ports).map(|n| format!("crowd{n}"));
    names
        .map(|name| Crowd::plug_in(&world.node, &name))
        .collect()
}

/// Takes `count` leases, evenly behind the ports.
pub fn take(crowds: &[Crowd], count: usize) -> Result<BTreeMap<Mac, Ipv4Addr>> {
    take_from(
        crowds,
        count,
        Ipv4Addr::from_bits(pool(count)?.first.to_bits() + 16),
    )
}

/// The same, from this address on.
pub fn take_from(
    crowds: &[Crowd],
    count: usize,
    first: Ipv4Addr,
) -> Result<BTreeMap<Mac, Ipv4Addr>> {
    let base = first.to_bits();
    let clients = (0..count).map(|n| {
        let n = u16::try_from(n)?;
        Ok((crowd_mac(n), Ipv4Addr::from_bits(base + u32::from(n))))
    });
    let clients: Vec<(Mac, Ipv4Addr)> = clients.collect::<Result<_>>()?;
    let each = clients.len().div_ceil(crowds.len());
    thread::scope(|scope| {
        let takers: Vec<_> = crowds
            .iter()
            .zip(clients.chunks(each))
            .map(|(crowd, clients)| {
                scope.spawn(move || crowd.take(clients, Asking::Straight, PATIENCE))
            })
            .collect();
        let mut leases = BTreeMap::new();
        for taker in takers {
            let taken = taker.join().map_err(|_panic| anyhow!("a taker panicked"))?;
            leases.extend(taken?);
        }
        Ok(leases)
    })
}

/// Takes once more, behind the same ports, what the agent has missed: what gets lost while so many ask
/// at once is no part of what is measured after it.
pub fn take_again(agent: &Agent, crowds: &[Crowd], leases: &BTreeMap<Mac, Ipv4Addr>) -> Result<()> {
    let deadline = Deadline::after(PATIENCE);
    let all: Vec<(Mac, Ipv4Addr)> = leases.iter().map(|(mac, ip)| (*mac, *ip)).collect();
    let each = all.len().div_ceil(crowds.len());
    loop {
        thread::sleep(Duration::from_secs(1));
        let list = agent.list()?;
        let bound = list.iter().filter(|one| one.state == "bound");
        let bound: BTreeSet<Ipv4Addr> = bound.map(|one| one.ip).collect();
        if leases.values().all(|ip| bound.contains(ip)) {
            return Ok(());
        }
        ensure!(!deadline.passed(), "{} of {} bound", bound.len(), all.len());
        for (crowd, mine) in crowds.iter().zip(all.chunks(each)) {
            let missed = mine.iter().filter(|(_, ip)| !bound.contains(ip));
            let missed: Vec<_> = missed.copied().collect();
            crowd.take(&missed, Asking::Straight, PATIENCE)?;
        }
    }
}

/// Waits until the agent has bound so many leases.
pub fn all_bound(agent: &Agent, count: usize) -> Result<()> {
    let deadline = Deadline::after(PATIENCE);
    loop {
        let list = agent.list()?;
        let bound = list.iter().filter(|one| one.state == "bound").count();
        if bound >= count {
            return Ok(());
        }
        ensure!(
            !deadline.passed(),
            "the agent knows {bound} of {count} leases:\n{}",
            agent.log()
        );
        thread::sleep(Duration::from_millis(200));
    }
}
