//! What it takes to look after many bindings while nothing happens.
use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread::{self, sleep},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook},
    clock::{Deadline, now},
    crowd::Crowd,
    fixture::{BRIDGE, Mac},
    report::Row,
    sandbox::DIR,
    server::{Place, Pool, ServerKind},
    world::World,
};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::Value;

use crate::{lab, stats::percentile};

const SECTION: &str = "steady";
/// As the agent has them by default: after how long a quiet address is looked at, and how many are in a
/// second.
const SILENCE: Duration = Duration::from_secs(30);
const PROBE_RATE: f64 = 100.0;
const BUCKET: Duration = Duration::from_millis(100);
const READY: &str = ": ready bridges=";

pub fn rows(quick: bool) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let sizes: &[usize] = if quick {
        &[1000]
    } else {
        &[1000, 10_000, 65_536]
    };
    for size in sizes {
        rows.extend(steady(*size, quick)?);
    }
    Ok(rows)
}

fn steady(count: usize, quick: bool) -> Result<Vec<Row>> {
    lab::sweep()?;
    let pool = Pool {
        first: Ipv4Addr::new(10, 68, 0, 0),
        last: Ipv4Addr::new(10, 69, 3, 255),
        prefix: 8,
        leasequery: false,
        renewal: None,
    };
    let world = World::with_pool(ServerKind::Kea, Place::Remote, pool)?;
    let setup = world.agent(Hook::Tc).args(&[
        "--record-rate",
        "20000",
        "--record-burst",
        "20000",
        "--bindings-per-port",
        "5000",
    ]);
    let agent = setup.start()?;
    // Threads answer for the ports; the machine has few processors for many of them.
    let ports = (count / 4096).clamp(4, 16);
    let crowds = lab::plug_in(&world, ports)?;
    let stop = AtomicBool::new(false);
    let asked = AtomicU64::new(0);
    let rows = thread::scope(|scope| {
        let leases = lab::take_from(&crowds, count, Ipv4Addr::new(10, 68, 0, 16))?;
        lab::take_again(&agent, &crowds, &leases)?;
        let each = leases.len().div_ceil(crowds.len());
        let all: Vec<(Mac, Ipv4Addr)> = leases.iter().map(|(mac, ip)| (*mac, *ip)).collect();
        for (crowd, mine) in crowds.iter().zip(all.chunks(each)) {
            let (stop, asked) = (&stop, &asked);
            let mine: BTreeMap<Ipv4Addr, Mac> = mine.iter().map(|(mac, ip)| (*ip, *mac)).collect();
            scope.spawn(move || live(crowd, &mine, stop, asked));
        }
        let found = watch(&agent, count, quick, &asked, &all);
        stop.store(true, Ordering::Relaxed);
        found
    })?;
    let mut rows = rows;
    agent.stop()?;
    // The log of those before has the line too.
    let before = fs::read_to_string(setup.log())?.matches(READY).count();
    let begin = now();
    let mut again = setup.spawn()?;
    again.wait_log_nth(READY, before + 1, Duration::from_secs(30))?;
    let ready = (now() - begin).as_secs_f64();
    rows.push(
        Row::new(
            SECTION,
            format!("{count} stored bindings: from start to ready"),
            ready,
            "s",
        )
        .goal("below 1 s", ready < 1.0),
    );
    Ok(rows)
}

/// One port's guests: every second one speaks every ten seconds, the others only when they are asked.
fn live(
    crowd: &Crowd,
    guests: &BTreeMap<Ipv4Addr, Mac>,
    stop: &AtomicBool,
    asked: &AtomicU64,
) -> Result<()> {
    const SPEAKS_EVERY: Duration = Duration::from_secs(10);

    let speakers: Vec<(Ipv4Addr, Mac)> = guests
        .iter()
        .step_by(2)
        .map(|(ip, mac)| (*ip, *mac))
        .collect();
    let mut buffer = [0; 2048];
    let begin = now();
    let mut spoken = 0;
    while !stop.load(Ordering::Relaxed) {
        let due = (now() - begin).as_secs_f64() / SPEAKS_EVERY.as_secs_f64();
        while (spoken as f64) < due * speakers.len() as f64 {
            let (ip, mac) = speakers[spoken % speakers.len()];
            crowd.send(&word(mac, ip))?;
            spoken += 1;
        }
        let length = crowd.receive(&mut buffer)?;
        let frame = &buffer[..length];
        // An ARP request for one of ours, and not one of the kernel's own broadcasts.
        if length < 42 || frame[12..14] != [8, 6] || frame[20..22] != [0, 1] {
            continue;
        }
        let target = Ipv4Addr::new(frame[38], frame[39], frame[40], frame[41]);
        let Some(mac) = guests.get(&target) else {
            continue;
        };
        if frame[..6] == mac.0 {
            asked.fetch_add(1, Ordering::Relaxed);
        }
        let asker = Mac(frame[22..28].try_into()?);
        let asker_ip = Ipv4Addr::new(frame[28], frame[29], frame[30], frame[31]);
        crowd.send(&dhcp_reclaim_tests::forge::arp(
            2,
            (*mac, target),
            (asker, asker_ip),
        ))?;
    }
    Ok(())
}

/// What a guest that is busy sends: it names the guest, and nobody answers.
fn word(mac: Mac, ip: Ipv4Addr) -> Vec<u8> {
    let nobody = Mac([2, 0, 0, 0, 0, 9]);
    dhcp_reclaim_tests::crowd::datagram(
        (nobody, mac),
        (ip, Ipv4Addr::new(10, 99, 0, 1)),
        (9, 9),
        &[],
    )
}

fn watch(
    agent: &Agent,
    count: usize,
    quick: bool,
    asked: &AtomicU64,
    leases: &[(Mac, Ipv4Addr)],
) -> Result<Vec<Row>> {
    let deadline = Deadline::after(Duration::from_secs(60));
    while bound(agent)? < count {
        ensure!(!deadline.passed(), "{} of {count} bound", bound(agent)?);
        sleep(Duration::from_millis(500));
    }
    // The first checks come as the leases came; after one round they are on their way.
    sleep(if quick { SILENCE / 3 } else { SILENCE });
    let time = if quick { SILENCE } else { SILENCE * 2 };
    let before = Usage::of(agent)?;
    let begin = now();
    let mut buckets = Vec::new();
    let mut last = asked.load(Ordering::Relaxed);
    while now() - begin < time {
        sleep(BUCKET);
        let there = asked.load(Ordering::Relaxed);
        buckets.push((there - last) as f64);
        last = there;
    }
    let spent = (now() - begin).as_secs_f64();
    let after = Usage::of(agent)?;
    let cpu = (after.cpu - before.cpu) / spent * 100.0;
    let wakes = (after.switches - before.switches) / spent;
    let probes: f64 = buckets.iter().sum::<f64>() / spent;
    let (scan, ping) = sweeps(leases, if quick { 3 } else { 1 })?;

    let every = (count as f64 / PROBE_RATE).max(SILENCE.as_secs_f64());
    let who = format!("{count} bindings, half silent");
    let rss = after.rss / f64::from(1 << 20);
    let maps = after.maps / f64::from(1 << 20);
    let mean = probes * BUCKET.as_secs_f64();
    let peak = percentile(&buckets, 1.0);
    let burst = peak / mean.max(1.0);
    let at_most = count == 65_536 || quick;
    let mut rows = vec![
        Row::new(SECTION, format!("{who}: CPU"), cpu, "% of a core").beside(
            format!("arp-scan sweeping them every {every:.0} s"),
            scan / every * 100.0,
        ),
        Row::new(SECTION, format!("{who}: CPU"), cpu, "% of a core").beside(
            format!("fping sweeping them every {every:.0} s"),
            ping / every * 100.0,
        ),
        Row::new(SECTION, format!("{who}: wake-ups"), wakes, "a second"),
        Row::new(SECTION, format!("{who}: RSS"), rss, "MiB"),
        Row::new(SECTION, format!("{who}: kernel maps"), maps, "MiB"),
        Row::new(SECTION, format!("{who}: probes"), probes, "a second")
            .beside("a sweep's frames", count as f64 / every),
        Row::new(
            SECTION,
            format!("{who}: probes in the fullest tenth of a second"),
            burst,
            "times the mean",
        )
        .goal("no bursts: below 5", burst < 5.0)
        .note(format!("{peak:.0} by a mean of {mean:.1}")),
    ];
    if at_most {
        rows[0] = rows[0].clone().goal("below 1 %", cpu < 1.0);
        rows[3] = rows[3].clone().goal("below 64 MiB", rss < 64.0);
    }
    Ok(rows)
}

fn bound(agent: &Agent) -> Result<usize> {
    let stats: Value = serde_json::from_str(&agent.ask_text(&["stats", "--json"])?)?;
    let bound = stats.pointer("/bindings/bound").and_then(Value::as_u64);
    Ok(usize::try_from(bound.unwrap_or(0))?)
}

/// Of the agent's process.
struct Usage {
    cpu: f64,
    switches: f64,
    rss: f64,
    maps: f64,
}

impl Usage {
    fn of(agent: &Agent) -> Result<Self> {
        // USER_HZ, for all that Linux runs on.
        const TICKS: f64 = 100.0;
        let read = |file: &str| {
            let path = format!("/proc/{}/{file}", agent.pid());
            fs::read_to_string(&path).context(path)
        };
        let stat = read("stat")?;
        let fields: Vec<&str> = stat.split_whitespace().collect();
        let [user, system] = [13, 14].map(|at| fields.get(at).and_then(|f| f.parse::<f64>().ok()));
        let status = read("status")?;
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok())
                .with_context(|| name.to_owned())
        };
        let mut maps = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{}/fdinfo", agent.pid()))? {
            // A descriptor may go while we look.
            let text = fs::read_to_string(entry?.path()).unwrap_or_default();
            let of = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name))?;
                line.trim().parse::<u64>().ok()
            };
            if let (Some(id), Some(bytes)) = (of("map_id:"), of("memlock:")) {
                maps.insert(id, bytes);
            }
        }
        Ok(Self {
            cpu: (user.context("stat")? + system.context("stat")?) / TICKS,
            switches: of("voluntary_ctxt_switches:")?,
            rss: of("VmRSS:")? * 1024.0,
            maps: maps.values().sum::<u64>() as f64,
        })
    }
}

/// Seconds of CPU that one sweep takes arp-scan and fping, by every `nth` address at the sweep's pace.
fn sweeps(leases: &[(Mac, Ipv4Addr)], nth: usize) -> Result<(f64, f64)> {
    let asked = leases.iter().step_by(nth);
    let list: Vec<String> = asked.map(|(_, ip)| ip.to_string()).collect();
    let file = format!("{DIR}/addresses");
    fs::write(&file, list.join("\n") + "\n")?;
    let micros = (SILENCE.as_micros() / leases.len() as u128).max(1);
    let mut scan = Command::new("arp-scan");
    scan.arg(format!("--interface={BRIDGE}"))
        .args(["--quiet", "--retry=1", "--arpspa=10.99.0.2", "--file"])
        .arg(&file)
        .arg(format!("--interval={micros}u"));
    let mut ping = Command::new("fping");
    ping.args(["-q", "-r", "0", "-t", "500", "-i"])
        .arg(format!("{:.3}", (micros as f64 / 1000.0).max(0.001)))
        .arg("-f")
        .arg(&file);
    let mut spent = [0.0; 2];
    for (spent, command) in spent.iter_mut().zip([&mut scan, &mut ping]) {
        let before = children()?;
        let output = command.output().context("cannot sweep")?;
        // fping says so of those that do not answer; nobody behind these links speaks ICMP.
        let fine = output.status.code().is_some_and(|code| code < 3);
        ensure!(
            fine,
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        *spent = (children()? - before) * nth as f64;
    }
    Ok((spent[0], spent[1]))
}

fn children() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}
