//! Many VMs boot at once: what is heard of their DHCP, counted against a schedule.
use std::{
    net::Ipv4Addr,
    process::Command,
    thread::{self, sleep},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook},
    clock::{Deadline, now},
    crowd::{Crowd, crowd_mac},
    fixture::{Mac, NIC, SERVER_IP, SERVER_MAC},
    forge::{Forged, Nic},
    report::Row,
    server::{Place, ServerKind},
    wire::{ACK, DISCOVER, REQUEST},
    world::World,
};
use serde_json::Value;

use crate::lab;

const SECTION: &str = "storm";
/// Each client's broadcast goes to all other ports too: few, so that the sender keeps to its schedule.
const PORTS: usize = 4;
const NEIGHBOURS: usize = 15;
/// Who answers in the forged exchanges: the lab's own server hears them too, and is not to refuse them.
const GHOST: Ipv4Addr = Ipv4Addr::new(10, 67, 0, 200);

pub fn rows(quick: bool) -> Result<Vec<Row>> {
    let seconds = if quick { 2 } else { 5 };
    let mut fastest: f64 = 0.0;
    let mut rows = Vec::new();
    for (kind, offered) in [
        (ServerKind::Dnsmasq, [300, 1000]),
        (ServerKind::Kea, [3000, 20_000]),
    ] {
        // A server that is asked for far more than it can answers less.
        let mut answered: f64 = 0.0;
        for rate in offered {
            answered = answered.max(perfdhcp(kind, rate, seconds)?);
        }
        fastest = fastest.max(answered);
        rows.push(Row::new(
            SECTION,
            format!("{kind} answers perfdhcp"),
            answered,
            "exchanges a second",
        ));
    }
    rows.push(storm(fastest, seconds)?);
    rows.push(flood(seconds)?);
    Ok(rows)
}

/// Exchanges a second that a server completes when it is asked for so many.
fn perfdhcp(kind: ServerKind, rate: u32, seconds: u64) -> Result<f64> {
    lab::sweep()?;
    // dnsmasq keeps no more than 2000 in the lab.
    let world = World::with_pool(kind, Place::Remote, lab::pool(20_000)?)?;
    let client = Crowd::plug_in(&world.node, "perf")?;
    let netns = client.netns();
    netns.ip(&format!(
        "addr add 10.67.0.77/16 dev {NIC}\nlink set {NIC} arp on"
    ))?;
    let mut command: Command = netns.command("perfdhcp");
    let clients = if kind == ServerKind::Dnsmasq {
        "1000"
    } else {
        "15000"
    };
    let output = command
        .args([
            "-4",
            "-r",
            &rate.to_string(),
            "-R",
            clients,
            "-p",
            &seconds.to_string(),
        ])
        .args(["-l", NIC, "-W", "1000000", SERVER_IP.to_string().as_str()])
        .output()
        .context("perfdhcp")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let rate = text
        .lines()
        .find_map(|line| line.strip_prefix("Rate: ")?.split(' ').next()?.parse().ok());
    rate.with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

fn started(world: &World) -> Result<(Agent, Vec<Crowd>)> {
    let agent = world.agent(Hook::Tc).args(&[
        "--record-rate",
        "60000",
        "--record-burst",
        "60000",
        "--bindings-per-port",
        "60000",
        "--detach-on-exit",
    ]);
    let agent = agent.start()?;
    let crowds = lab::plug_in(world, PORTS)?;
    for crowd in &crowds {
        agent.wait_port_event("port-up", crowd.name(), Duration::from_secs(20))?;
    }
    Ok((agent, crowds))
}

/// Whole exchanges by forged frames: what the client says comes in by its port, what the server says
/// goes out by it, each when the schedule has it.
struct Exchange {
    from_vm: [Vec<u8>; 2],
    to_vm: Vec<u8>,
}

impl Exchange {
    fn new(mac: Mac, ip: Ipv4Addr, xid: u32) -> Self {
        let request = Forged::client(REQUEST, mac, xid)
            .option(50, &ip.octets())
            .option(54, &GHOST.octets());
        let ack = Forged::server(ACK, (SERVER_MAC, GHOST), mac, xid, ip).with(|ack| {
            ack.to_mac = mac;
            ack.to_ip = ip;
            ack.flags = 0;
        });
        Self {
            from_vm: [Forged::client(DISCOVER, mac, xid).frame(), request.frame()],
            to_vm: ack.frame(),
        }
    }
}

fn storm(fastest: f64, seconds: u64) -> Result<Row> {
    lab::sweep()?;
    let world = World::with_pool(ServerKind::Dnsmasq, Place::Remote, lab::pool(100)?)?;
    let (agent, crowds) = started(&world)?;
    // Ten times the fastest server, as long as there are addresses for it.
    let rate = fastest * 10.0;
    let total = ((rate * seconds as f64) as usize).min(60_000);
    let to_ports: Vec<Nic> = crowds
        .iter()
        .map(|crowd| Nic::open(&world.node.netns, crowd.name()))
        .collect::<Result<_>>()?;
    let exchanges = (0..u16::try_from(total)?).map(|n| {
        let ip = Ipv4Addr::from_bits(0x0a50_0000 + u32::from(n));
        Exchange::new(crowd_mac(n), ip, u32::from(n) + 1)
    });
    let exchanges: Vec<Exchange> = exchanges.collect();
    let begin = now();
    let late = thread::scope(|scope| {
        // One thread for all ports: what is measured needs a processor of its own.
        let sender = scope.spawn(|| -> Result<Duration> {
            let mut late = Duration::ZERO;
            for (n, exchange) in exchanges.iter().enumerate() {
                let due = Duration::from_secs_f64(n as f64 / rate);
                let at = now() - begin;
                match due.checked_sub(at) {
                    Some(wait) if wait > Duration::from_micros(200) => sleep(wait),
                    Some(_) => {}
                    None => late = late.max(at - due),
                }
                for frame in &exchange.from_vm {
                    crowds[n % PORTS].send(frame)?;
                }
                to_ports[n % PORTS].send(&exchange.to_vm)?;
            }
            Ok(late)
        });
        sender
            .join()
            .map_err(|_panic| anyhow!("the sender panicked"))?
    })?;
    let sent = exchanges.len();
    let took = (now() - begin).as_secs_f64();
    let heard = settled(&agent)?;
    let lost = sent.saturating_sub(heard);
    let of = |name: &str| agent.stat(&format!("kernel.{name}"));
    let (full, limited, unasked) = (of("ring_full")?, of("rate_limited")?, of("unasked")?);
    let absorbed = sent as f64 / took;
    let row = Row::new(
        SECTION,
        format!("{sent} exchanges through {PORTS} ports: absorbed, {lost} lost"),
        absorbed,
        "exchanges a second",
    )
    .beside("the fastest server", fastest)
    .goal(
        "ten times that, none lost",
        absorbed >= rate * 0.95 && lost == 0,
    )
    .note(format!(
        "the schedule was {rate:.0} a second, the sender {:.1} ms behind it at worst; records lost: \
         {full} to a full ring, {limited} to the ports' limits; {unasked} answers not asked for",
        late.as_secs_f64() * 1e3
    ));
    agent.stop()?;
    Ok(row)
}

/// Bindings that the agent came to know, once no more come.
fn settled(agent: &Agent) -> Result<usize> {
    let deadline = Deadline::after(Duration::from_secs(120));
    let mut last = 0;
    let mut same = 0;
    while same < 5 {
        sleep(Duration::from_millis(500));
        let stats: Value = serde_json::from_str(&agent.ask_text(&["stats", "--json"])?)?;
        let bound = stats.pointer("/bindings/bound").and_then(Value::as_u64);
        let bound = usize::try_from(bound.unwrap_or(0))?;
        same = if bound == last { same + 1 } else { 0 };
        last = bound;
        ensure!(!deadline.passed(), "still {bound} bound");
    }
    Ok(last)
}

/// One guest sends as fast as it can; its neighbours take their leases meanwhile.
fn flood(seconds: u64) -> Result<Row> {
    lab::sweep()?;
    let world = World::with_pool(ServerKind::Kea, Place::Remote, lab::pool(1000)?)?;
    let agent = world.agent(Hook::Tc).args(&["--detach-on-exit"]).start()?;
    let mut crowds = lab::plug_in(&world, NEIGHBOURS + 1)?;
    for crowd in &crowds {
        agent.wait_port_event("port-up", crowd.name(), Duration::from_secs(20))?;
    }
    let flooder = crowds.pop().context("no ports")?;
    // It asks for an address of no network here: no server is kept busy by it, only the agent.
    let begin = now();
    let until = Duration::from_secs(seconds);
    let count = crowds.len() * 4;
    let (flooded, taken) = thread::scope(|scope| {
        let flood = scope.spawn(|| -> Result<u64> {
            let mut sent = 0;
            while now() - begin < until {
                let xid = u32::try_from(sent % 0xffff_ffff)?;
                let frame = Forged::client(REQUEST, crowd_mac(60_000), xid)
                    .option(50, &[10, 99, 0, 1])
                    .option(54, &[10, 99, 0, 2]);
                flooder.send(&frame.frame())?;
                sent += 1;
            }
            Ok(sent)
        });
        sleep(until / 4);
        let taken = lab::take(&crowds, count)?.len();
        let sent = flood
            .join()
            .map_err(|_panic| anyhow!("the flooder panicked"))??;
        Ok::<_, anyhow::Error>((sent, taken))
    })?;
    let bound = settled(&agent)?;
    let missed = taken.saturating_sub(bound);
    let row = Row::new(
        SECTION,
        format!(
            "a guest that floods: leases of its {} neighbours missed",
            crowds.len()
        ),
        missed as f64,
        "leases",
    )
    .goal("none", missed == 0)
    .note(format!(
        "{:.0} REQUESTs a second by one guest, {taken} leases of the others meanwhile",
        flooded as f64 / seconds as f64
    ));
    agent.stop()?;
    Ok(row)
}
