//! An older package is replaced by this one while VMs come and go: nothing is lost by it.
//!
//! `cargo xtask dist --test` builds the older one and runs this.
use std::{
    collections::BTreeSet,
    env, fs,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook, binary},
    clock::now,
    fixture::{SERVER_IP, pool_ip},
    lab_test,
    sandbox::{DIR, run, skip},
    server::{Place, ServerKind},
    vm::KillKind,
    watch::until,
    world::{PATIENCE, World},
};

const OLD: &str = "DHCP_RECLAIM_OLD_BIN";
const POOL: u8 = 80;
/// VMs that live through it all, and such that die while there is no agent.
const LIVING: u8 = 4;
const DOOMED: u8 = 3;
/// Deaths before the upgrade, and after it.
const DEATHS: usize = 8;

/// Who came and went.
#[derive(Default)]
struct Churn {
    next: AtomicU8,
    over: AtomicBool,
    dead: Mutex<Vec<Dead>>,
    failures: Mutex<Vec<String>>,
}

struct Dead {
    ip: Ipv4Addr,
    plugged_in: Instant,
    leased: Instant,
}

impl Churn {
    fn deaths(&self) -> usize {
        self.dead
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    fn go_on(&self, world: &World) {
        while !self.over.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = self.one(world, number) {
                let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
                failures.push(format!("vm{number}: {error:#}"));
                return;
            }
        }
    }

    fn one(&self, world: &World, number: u8) -> Result<()> {
        let plugged_in = now();
        let mut vm = world.boot(number)?;
        let ip = vm.wait_lease(PATIENCE)?;
        let leased = now();
        vm.ping(SERVER_IP)?;
        vm.kill(KillKind::PortDeleted)?;
        self.dead
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Dead {
                ip,
                plugged_in,
                leased,
            });
        Ok(())
    }

    /// Until so many have died, or one failed to.
    fn wait_deaths(&self, count: usize) -> Result<()> {
        let dir = Path::new(DIR);
        until(dir, Duration::from_secs(120), "enough deaths", || {
            let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
            ensure!(failures.is_empty(), "{}", failures.join("\n"));
            Ok((self.deaths() >= count).then_some(()))
        })
    }
}

/// Runs the package's own script as dpkg does, with a service manager that only stops the old agent.
fn postinst(old: nix::unistd::Pid, from: &str) -> Result<()> {
    let stubs = Path::new(DIR).join("stubs");
    fs::create_dir_all(&stubs)?;
    fs::create_dir_all("/run/systemd/system")?;
    let calls = Path::new(DIR).join("systemctl.log");
    let new = binary()?;
    for (name, text) in [
        (
            "systemctl",
            format!(
                "#!/bin/sh\necho \"$*\" >>{}\n[ \"$1\" != restart ] || kill -TERM {old}\n",
                calls.display()
            ),
        ),
        (
            "dhcp-reclaim",
            format!(
                "#!/bin/sh\nexec {} run --check --bridge br0\n",
                new.display()
            ),
        ),
    ] {
        let path = stubs.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("packaging/debian/postinst");
    let path = format!(
        "{}:{}",
        stubs.display(),
        env::var("PATH").unwrap_or_default()
    );
    run(Command::new("sh")
        .arg(script)
        .args(["configure", from])
        .env("PATH", path))?;
    let calls = fs::read_to_string(calls)?;
    ensure!(
        calls.lines().last() == Some("restart dhcp-reclaim.service"),
        "systemctl was told:\n{calls}"
    );
    Ok(())
}

fn version_of(program: &Path) -> Result<String> {
    let told = run(Command::new(program).arg("--version"))?;
    let (_, version) = told.trim().split_once(' ').context("no version")?;
    Ok(version.to_owned())
}

lab_test! { within Duration::from_secs(300);
    fn an_upgrade_under_churn_loses_nothing() {
        let Some(old) = env::var_os(OLD).map(PathBuf::from) else {
            return skip("`cargo xtask dist --test` builds the older version and runs it");
        };
        let (old_version, version) = (version_of(&old)?, version_of(&binary()?)?);
        ensure!(old_version != version, "both are {version}");
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, POOL)?;
        let setup = world.agent(Hook::Tc).quick().args(&["--breaker", "off"]);
        let agent = setup.clone().program(&old).start()?;
        let mut living = Vec::new();
        for number in 1..=LIVING + DOOMED {
            let vm = world.boot(number)?;
            let ip = vm.wait_lease(PATIENCE)?;
            agent.wait_event("bound", ip, PATIENCE)?;
            living.push((vm, ip));
        }

        let mut doomed = living.split_off(LIVING.into());

        let churn = Churn {
            next: AtomicU8::new(LIVING + DOOMED + 1),
            ..Churn::default()
        };
        let (agent, gone, ready) = thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| churn.go_on(&world));
            }
            let upgraded = (|| -> Result<(Agent, Instant, Instant)> {
                churn.wait_deaths(DEATHS)?;
                let before = churn.deaths();
                let gone = now();
                postinst(agent.pid(), &old_version)?;
                agent.stop()?;
                // Nobody sees how these go.
                for (vm, _) in &mut doomed {
                    vm.kill(KillKind::PortDeleted)?;
                }
                let agent = setup.start()?;
                let ready = now();
                let meanwhile = churn.deaths() - before;
                churn.wait_deaths(before + meanwhile + DEATHS)?;
                println!(
                    "NOTE from {old_version} to {version}: {} ms without an agent, in which {} VMs died",
                    ready.duration_since(gone).as_millis(),
                    meanwhile + doomed.len()
                );
                Ok((agent, gone, ready))
            })();
            churn.over.store(true, Ordering::Relaxed);
            upgraded
        })?;
        let failures = churn.failures.into_inner().unwrap_or_default();
        ensure!(failures.is_empty(), "{}", failures.join("\n"));

        // Who was plugged in and got a lease while there was no agent did so behind a port that nobody
        // watched yet: that lease is nobody's to give back.
        let dead = churn.dead.into_inner().unwrap_or_default();
        let unseen = |dead: &&Dead| dead.leased >= gone && dead.plugged_in <= ready;
        let unseen: BTreeSet<Ipv4Addr> = dead.iter().filter(unseen).map(|dead| dead.ip).collect();
        // Everybody else who died left an address that is free again, and the living have theirs.
        let alive: BTreeSet<Ipv4Addr> = living.iter().map(|(_, ip)| *ip).collect();
        let kept: BTreeSet<Ipv4Addr> = alive.union(&unseen).copied().collect();
        for ip in (0..POOL).map(pool_ip).filter(|ip| !kept.contains(ip)) {
            world
                .server
                .wait_gone(ip, PATIENCE)
                .with_context(|| format!("{ip} was never given back; {}", agent.log()))?;
        }
        for (vm, ip) in &living {
            ensure!(world.server.has(*ip)?, "{ip} lives, and its lease is gone");
            let state = agent.state(*ip)?;
            ensure!(state == "bound", "{ip} is {state}");
            vm.ping(SERVER_IP)?;
        }
        for lost in ["ring_full", "rate_limited", "slot_taken"] {
            let count = agent.stat(&format!("kernel.{lost}"))?;
            ensure!(count == 0, "{lost}: {count}");
        }
        println!(
            "NOTE {} VMs died and were released, {LIVING} lived through it; {} leases were taken \
             behind ports that nobody watched yet",
            dead.len() + doomed.len() - unseen.len(),
            unseen.len()
        );
        agent.stop()
    }
}
