//! What became of a RELEASE, and what happens if the dead speak.
//!
//! The judge is the server's own store, or a capture of the wire; here the agent's word about the
//! outcome is what is judged.
use std::{net::Ipv4Addr, thread::sleep, time::Duration};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook},
    crowd::{Asking, Crowd, crowd_mac, datagram},
    fixture::{BRIDGE, NIC, SERVER_IP, SERVER_MAC, pool_ip},
    lab_test,
    server::{Place, Pool, ServerKind},
    vm::{KillKind, Vm},
    wire::{Capture, RELEASE},
    world::{PATIENCE, World},
};
use serde_json::Value;

const NODE_IP: Ipv4Addr = Ipv4Addr::new(10, 67, 0, 2);

fn world(kind: ServerKind, leasequery: bool, pool: u8) -> Result<World> {
    let pool = Pool {
        leasequery,
        ..Pool::small(pool)
    };
    let world = World::with_pool(kind, Place::Remote, pool)?;
    world
        .node
        .netns
        .ip(&format!("addr add {NODE_IP}/24 dev {BRIDGE}"))?;
    Ok(world)
}

fn outcome(agent: &Agent, ip: Ipv4Addr) -> Result<Value> {
    let view = agent.explain(ip)?;
    view.get("outcome")
        .or_else(|| view.get("binding")?.get("outcome"))
        .cloned()
        .with_context(|| format!("no outcome in {view}"))
}

fn released(world: &World, agent: &Agent, vm: &mut Vm, ip: Ipv4Addr) -> Result<()> {
    vm.kill(KillKind::PortDeleted)?;
    world
        .server
        .wait_gone(ip, PATIENCE)
        .with_context(|| agent.log())?;
    agent.wait_event("released", ip, PATIENCE).map(drop)
}

lab_test! {
    fn a_server_that_answers_lease_queries_verifies() {
        let world = world(ServerKind::Isc, true, 3)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let wire = Capture::start(world.server.netns(), NIC)?;
        let (mut vm, ip) = world.living(&agent, 1)?;
        released(&world, &agent, &mut vm, ip)?;
        agent
            .wait_event("verified", ip, PATIENCE)
            .with_context(|| world.server.log())?;
        ensure!(outcome(&agent, ip)? == "verified", "{}", outcome(&agent, ip)?);
        ensure!(wire.dhcp(RELEASE).len() == 1, "{:?}", wire.dhcp(RELEASE));
        agent.stop()
    }

    fn a_server_that_does_not_answer_is_asked_once() {
        let world = world(ServerKind::Dnsmasq, false, 3)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let wire = Capture::start(world.server.netns(), NIC)?;
        let (mut one, one_ip) = world.living(&agent, 1)?;
        let (mut two, two_ip) = world.living(&agent, 2)?;
        released(&world, &agent, &mut one, one_ip)?;
        sleep(Duration::from_secs(6));
        released(&world, &agent, &mut two, two_ip)?;
        sleep(Duration::from_secs(2));
        for ip in [one_ip, two_ip] {
            ensure!(outcome(&agent, ip)? == "unverified", "{}", outcome(&agent, ip)?);
        }
        let queries = wire.dhcp(10).len();
        ensure!(queries == 1, "{queries} lease queries");
        // Somebody else has one of them now: that tells.
        let (_next, next_ip) = world.living(&agent, 3)?;
        if [one_ip, two_ip].contains(&next_ip) {
            agent.wait_event("verified", next_ip, PATIENCE)?;
        }
        agent.stop()
    }

    fn a_frame_of_a_released_address_is_an_alarm_whatever_restarts() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 4)?;
        let setup = world.agent(Hook::Tc).quick();
        let agent = setup.start()?;
        let wire = Capture::start(world.server.netns(), NIC)?;
        let port = Crowd::plug_in(&world.node, "crowd1")?;
        let (dead, other) = (crowd_mac(1), crowd_mac(2));
        let (dead_ip, other_ip) = (pool_ip(0), pool_ip(1));
        port.take(&[(dead, dead_ip)], Asking::Straight, PATIENCE)?;
        agent.wait_event("bound", dead_ip, PATIENCE)?;
        // It answers nothing, and its port stays up.
        agent.wait_event("released", dead_ip, PATIENCE)?;
        world.server.wait_gone(dead_ip, PATIENCE)?;

        port.take(&[(other, other_ip)], Asking::Straight, PATIENCE)?;
        agent.wait_event("bound", other_ip, PATIENCE)?;
        // No agent runs, but the programs do.
        agent.kill();
        let forged = datagram((SERVER_MAC, dead), (dead_ip, SERVER_IP), (9, 9), b"alive");
        port.send(&forged)?;
        let agent = setup.start()?;
        agent.wait_event("released-alive", dead_ip, PATIENCE)?;
        // It holds, and is told once, whoever has to know.
        agent.kill();
        let agent = setup.start()?;
        for _ in 0..3 {
            port.send(&forged)?;
            sleep(Duration::from_millis(500));
        }
        // Its neighbour behind the port falls silent, and is held.
        sleep(Duration::from_secs(6));
        agent.ensure_no_event("released-alive", dead_ip)?;
        ensure!(agent.gate(other_ip, "confirmed")?.0 == "hold", "{:?}", agent.explain(other_ip)?);
        let releases = wire.dhcp(RELEASE);
        ensure!(releases.len() == 1, "{releases:?}");
        ensure!(world.server.has(other_ip)?, "its lease is gone");

        // Bound again, it may die again.
        port.take(&[(dead, dead_ip)], Asking::Straight, PATIENCE)?;
        world.server.wait_gone(dead_ip, PATIENCE).with_context(|| agent.log())?;
        agent.stop()
    }
}
