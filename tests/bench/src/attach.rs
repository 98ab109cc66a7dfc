//! From a port's making to its programs at work, and who takes a lease in between.
use std::{
    collections::BTreeSet,
    path::Path,
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::maps::{Array, Map, MapData};
use dhcp_reclaim_ebpf::abi::{ABI_VERSION, PortSlot, port_slots};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook, Setup},
    clock::{Deadline, now},
    crowd::{Asking, Crowd, crowd_mac},
    fixture::BRIDGE,
    forge::{self, Nic},
    netns::NetNs,
    node::Node,
    report::Row,
    sandbox::BPFFS,
    server::{Place, ServerKind},
    watch::tail,
    world::{PATIENCE, World},
};
use nix::net::if_::if_nametoindex;
use zerocopy::transmute;

use crate::{
    lab,
    stats::{median, percentile},
};

const SECTION: &str = "attach";

pub fn rows(quick: bool) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let (many, samples) = if quick { (200, 20) } else { (1000, 100) };
    for (ports, way) in [(10, &BY_TCX), (many, &BY_TCX), (many, &BY_CLSACT)] {
        rows.extend(beside(ports, samples, way)?);
    }
    for way in [&BY_TCX, &EXPEDITED, &BY_CLSACT] {
        rows.extend(containers(if quick { 100 } else { 500 }, way)?);
    }
    Ok(rows)
}

/// How an agent attaches its programs, and what that is called in the table.
struct Way {
    hook: Hook,
    args: &'static [&'static str],
    said: &'static str,
}

const BY_TCX: Way = Way {
    hook: Hook::Tc,
    args: &["--detach-on-exit"],
    said: "",
};
const EXPEDITED: Way = Way {
    hook: Hook::Tc,
    args: &["--detach-on-exit", "--expedite"],
    said: ", `--expedite`",
};
const BY_CLSACT: Way = Way {
    hook: Hook::Clsact,
    args: &["--detach-on-exit"],
    said: ", `--hook clsact`",
};

/// One port more, beside so many.
fn beside(ports: usize, samples: usize, way: &Way) -> Result<Vec<Row>> {
    lab::sweep()?;
    let node = Node::new()?;
    let far = NetNs::new()?;
    let lines: Vec<String> = (0..ports)
        .map(|n| {
            format!(
                "link add p{n} master {BRIDGE} up type veth peer name q{n} netns {}",
                far.path()
            )
        })
        .collect();
    batch(&node.netns, &lines)?;
    let setup = Setup::new(Place::Local, way.hook).args(way.args);
    let agent = setup.start()?;
    agent.until("all ports", Duration::from_secs(120), |agent| {
        Ok((agent.stat("ports")? >= ports as u64).then_some(()))
    })?;
    let pin = Path::new(BPFFS).join(format!("dhcp-reclaim/v{ABI_VERSION}/PORTS"));
    let slots = Map::Array(MapData::from_pin(pin)?);
    let slots: Array<_, [u8; size_of::<PortSlot>()]> = slots.try_into()?;
    let (mut first, mut both) = (Vec::new(), Vec::new());
    for n in 0..samples {
        let (at_work, told) = one(&node, &far, &agent, &slots, &format!("new{n}"))?;
        first.push(at_work.as_secs_f64() * 1e3);
        both.push(told.as_secs_f64() * 1e3);
    }
    agent.stop_within(Duration::from_secs(120))?;
    let name = format!("a port more, beside {ports}{}", way.said);
    let mut rows = Vec::new();
    for (what, times) in [
        ("its first frame is seen", &first),
        ("the agent says that it is watched, both ways", &both),
    ] {
        let found = median(times);
        rows.push(
            Row::new(SECTION, format!("{name}: {what}"), found.value, "ms")
                .interval(found.interval)
                .note(format!(
                    "99 of 100: {:.1} ms, with `ip` making it",
                    percentile(times, 0.99)
                )),
        );
    }
    Ok(rows)
}

/// Makes a port whose VM speaks all the time. Returns when the programs saw a frame of it, and when the
/// agent told of the port.
fn one(
    node: &Node,
    far: &NetNs,
    agent: &Agent,
    slots: &Array<MapData, [u8; size_of::<PortSlot>()]>,
    name: &str,
) -> Result<(Duration, Duration)> {
    let peer = format!("far-{name}");
    node.netns.ip(&format!(
        "link add {name} type veth peer name {peer} netns {}",
        far.path()
    ))?;
    far.ip(&format!("link set {peer} arp off up"))?;
    let nic = Nic::open(far, &peer)?;
    let mac = crowd_mac(1);
    let frame = forge::rarp(mac);
    let ifindex = node.netns.enter(|| Ok(if_nametoindex(name)?))?;
    let begin = now();
    node.netns
        .ip(&format!("link set {name} master {BRIDGE} up"))?;
    let deadline = Deadline::after(PATIENCE);
    let at_work = loop {
        // Refused while the far end has no carrier.
        let _down = nic.send(&frame);
        let slot: PortSlot = transmute!(slots.get(&port_slots(ifindex)[0], 0)?);
        if slot.ifindex == ifindex && slot.seen_epoch != 0 {
            break now() - begin;
        }
        ensure!(!deadline.passed(), "{name} is not watched");
    };
    let event = agent.wait_port_event("port-up", name, PATIENCE)?;
    let told = event.at.max(begin) - begin;
    node.netns.ip(&format!("link del {name}"))?;
    Ok((at_work, told))
}

fn batch(netns: &NetNs, lines: &[String]) -> Result<()> {
    let script = lines.join("\n");
    netns
        .shell(&format!("ip -batch - <<'END'\n{script}\nEND"))
        .map(drop)
}

/// Containers that ask for a lease the moment that their link is up, some at a time.
fn containers(count: usize, way: &Way) -> Result<Vec<Row>> {
    const AT_A_TIME: usize = 5;

    lab::sweep()?;
    let world = World::with_pool(ServerKind::Kea, Place::Remote, lab::pool(count)?)?;
    let agent = world.agent(way.hook).args(way.args).start()?;
    let begin = now();
    let numbers: Vec<usize> = (0..count).collect();
    let taken: Vec<_> = thread::scope(|scope| {
        let world = &world;
        let plugs: Vec<_> = numbers
            .chunks(count.div_ceil(AT_A_TIME))
            .map(|numbers| {
                scope.spawn(move || -> Result<Vec<_>> {
                    numbers.iter().map(|n| container(world, *n)).collect()
                })
            })
            .collect();
        let mut taken = Vec::new();
        for plug in plugs {
            let plug = plug
                .join()
                .map_err(|_panic| anyhow!("a container panicked"))?;
            taken.extend(plug?);
        }
        Ok::<_, anyhow::Error>(taken)
    })?;
    let took = now() - begin;
    // What was seen has been told by now.
    sleep(Duration::from_secs(2));
    let bound: BTreeSet<_> = agent
        .list()?
        .into_iter()
        .filter(|binding| binding.state == "bound")
        .map(|binding| binding.ip)
        .collect();
    let missed = taken
        .iter()
        .filter(|(_, ip, _)| !bound.contains(ip))
        .count();
    let exchange: Vec<f64> = taken
        .iter()
        .map(|(_, _, time)| time.as_secs_f64() * 1e3)
        .collect();
    let row = Row::new(
        SECTION,
        format!(
            "{count} containers that ask the moment their link is up{}: leases missed",
            way.said
        ),
        missed as f64,
        "leases",
    )
    .goal("none", missed == 0)
    .note(format!(
        "{AT_A_TIME} at a time, {:.0} a second; DISCOVER to ACK took {:.1} ms",
        count as f64 / took.as_secs_f64(),
        median(&exchange).value
    ));
    agent.stop_within(Duration::from_secs(120))?;
    Ok(vec![row])
}

fn container(world: &World, n: usize) -> Result<(Crowd, std::net::Ipv4Addr, Duration)> {
    let crowd = Crowd::plug_in(&world.node, &format!("c{n}"))?;
    let begin: Instant = now();
    let mac = crowd_mac(u16::try_from(n)?);
    let client = (mac, std::net::Ipv4Addr::UNSPECIFIED);
    let taken = crowd
        .take(&[client], Asking::Discover, PATIENCE)
        .with_context(|| tail(&world.server.log(), 5))?;
    let ip = *taken.get(&mac).context("no lease")?;
    Ok((crowd, ip, now() - begin))
}
