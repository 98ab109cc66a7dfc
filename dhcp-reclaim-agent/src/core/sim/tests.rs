//! Worlds by the thousand, and worlds without one of the gates.

use std::{
    collections::BTreeSet,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    super::{Policy, gates::Gate},
    Setup, Stats, Violation, World, run,
    setup::Kind,
    story,
};

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// `DHCP_RECLAIM_SIM_LIVES` of VMs, or what `DHCP_RECLAIM_SIM_SECONDS` hold, in one world after the
/// other, from seed 1 or `DHCP_RECLAIM_SIM_FROM` on; or the one world of `DHCP_RECLAIM_SIM_SEED`.
#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "slow unless optimised; xtask test runs it so"
)]
fn no_living_vm_is_released() {
    let lives = env("DHCP_RECLAIM_SIM_LIVES").unwrap_or(20_000);
    let seconds = env("DHCP_RECLAIM_SIM_SECONDS").map(Duration::from_secs);
    let only = env("DHCP_RECLAIM_SIM_SEED");
    #[expect(
        clippy::disallowed_methods,
        reason = "how long the test may take, not the world's time"
    )]
    let began = std::time::Instant::now();
    let first = only.or_else(|| env("DHCP_RECLAIM_SIM_FROM")).unwrap_or(1);
    let next = AtomicU64::new(first);
    let total = Mutex::new(Stats::default());
    let broken = Mutex::new(None::<(u64, Violation)>);
    let over = AtomicBool::new(false);
    let work = || {
        while !over.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            match run(&Setup::of(seed), seed) {
                Ok((stats, _)) => {
                    let mut total = total.lock().expect("no panic");
                    total.add(&stats);
                    let late = seconds.is_some_and(|most| began.elapsed() >= most);
                    if late || only.is_some() || total.lives >= lives {
                        over.store(true, Ordering::Relaxed);
                    }
                }
                Err(violation) => {
                    over.store(true, Ordering::Relaxed);
                    let mut broken = broken.lock().expect("no panic");
                    if broken.as_ref().is_none_or(|(other, _)| seed < *other) {
                        *broken = Some((seed, violation));
                    }
                }
            }
        }
    };
    let threads = match only {
        Some(_) => 1,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    if let Some((seed, violation)) = broken.into_inner().expect("no panic") {
        panic!("{}", story(&Setup::of(seed), seed, &violation));
    }
    println!(
        "NOTE simulation: {} worlds without a violation: {:?}",
        next.into_inner() - first,
        total.into_inner().expect("no panic")
    );
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "slow unless optimised; xtask test runs it so"
)]
fn the_same_seed_has_the_same_trace() {
    let setup = Setup::everything();
    for seed in 1..4 {
        let once = run(&setup, seed).expect("no violation").1;
        assert_eq!(once, run(&setup, seed).expect("no violation").1);
        assert_ne!(once, run(&setup, seed + 1).expect("no violation").1);
    }
}

/// Where the lack of each gate shows, and by which rule.
fn family(gate: Gate) -> (Setup, &'static [&'static str]) {
    match gate {
        Gate::Confirmed => (
            Setup::only(&[(Kind::LoseRecords, 20), (Kind::GuestRelease, 20)]),
            &["never-the-living", "property"],
        ),
        Gate::Lease => (Setup::only(&[]), &["lease"]),
        Gate::Dead => (
            Setup {
                probe_fail: 60,
                ..Setup::only(&[(Kind::CutUplink, 10), (Kind::Migrate, 30)])
            },
            &["never-the-living", "property"],
        ),
        Gate::Elsewhere => (Setup::only(&[(Kind::Migrate, 30)]), &["against-evidence"]),
        Gate::Unique => (
            Setup {
                clones: 50,
                ..Setup::only(&[])
            },
            &["never-the-living"],
        ),
        Gate::HoldDown => (Setup::only(&[(Kind::Pause, 30)]), &["never-the-living"]),
        Gate::Settled => (
            Setup {
                // Longer than it takes to see a VM after the start, and it die.
                policy: Policy {
                    settle: Duration::from_secs(20),
                    ..Policy::default()
                },
                longest_flap: 1500,
                ..Setup {
                    nodes: 1,
                    uplinks: false,
                    ..Setup::only(&[(Kind::Restart, 30)])
                }
            },
            &["property"],
        ),
        Gate::Paused => (Setup::only(&[(Kind::Hold, 30)]), &["paused"]),
        Gate::Breaker => (mass(Policy::default().burst), &["breaker"]),
        Gate::Rate => (
            Setup {
                policy: Policy {
                    breaker: None,
                    burst: 4,
                    rate: 2,
                    ..Policy::default()
                },
                bound_by_breaker: None,
                ..mass(4)
            },
            &["rate"],
        ),
        Gate::Kernel => (
            Setup {
                longest_pause: 900_000,
                wakes_at_emit: 100,
                ..Setup::only(&[(Kind::Pause, 30)])
            },
            &["never-the-living"],
        ),
    }
}

/// Forty VMs, of which most lose their ports at once.
fn mass(burst: u32) -> Setup {
    Setup {
        policy: Policy {
            breaker_min: 4,
            breaker: Some(0.3),
            burst,
            ..Policy::default()
        },
        vms: 40,
        decisions: 75,
        span: Duration::from_secs(300),
        together: Some(Duration::from_secs(40)),
        weights: vec![(Kind::KillDeleted, 1)],
        bound_by_breaker: Some(0.3),
        slack: Duration::from_secs(60),
        ..Setup::only(&[])
    }
}

const SEEDS: std::ops::Range<u64> = 1..200;

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "slow unless optimised; xtask test runs it so"
)]
fn without_a_gate_the_world_catches_it() {
    let mut blind = Vec::new();
    for gate in Gate::ALL {
        let (setup, rules) = family(gate);
        let broken = setup.clone().without(gate);
        let caught = SEEDS.clone().find_map(|seed| {
            let violation = run(&broken, seed).err()?;
            Some((seed, violation))
        });
        match caught {
            Some((seed, violation)) if rules.contains(&violation.rule) => {
                println!(
                    "without {gate}: seed {seed}: {}: {}",
                    violation.rule, violation.text
                );
            }
            other => blind.push((gate, other)),
        }
    }
    assert!(blind.is_empty(), "not caught: {blind:#?}");
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "slow unless optimised; xtask test runs it so"
)]
fn with_all_gates_the_same_worlds_are_safe() {
    for gate in Gate::ALL {
        let (setup, _) = family(gate);
        for seed in SEEDS.step_by(8) {
            if let Err(violation) = run(&setup, seed) {
                panic!("family of {gate}: {}", story(&setup, seed, &violation));
            }
        }
    }
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "slow unless optimised; xtask test runs it so"
)]
fn a_restart_at_any_step_changes_nothing_but_time() {
    let setup = Setup {
        vms: 8,
        decisions: 13,
        span: Duration::from_secs(1800),
        together: Some(Duration::from_secs(60)),
        lease: Some(Duration::from_secs(7200)),
        weights: vec![
            (Kind::KillDeleted, 3),
            (Kind::KillKept, 1),
            (Kind::Migrate, 2),
        ],
        bound_by_breaker: None,
        // That takes its time, and the end of the span is near.
        late: 0,
        ..Setup::only(&[])
    };
    let mut killed = 0;
    for (seed, node) in [(1, 0), (2, 1), (3, 0), (4, 1)] {
        for step in 0.. {
            let setup = Setup {
                kill_at: Some((node, step)),
                ..setup.clone()
            };
            let mut world = World::new(setup.clone(), seed, BTreeSet::new(), false);
            if let Err(violation) = world.run() {
                panic!("step {step}: {}", story(&setup, seed, &violation));
            }
            let (living, leased) = world.ends();
            assert_eq!(living, leased, "seed {seed}, node {node}, step {step}");
            if world.stats.restarts == 0 {
                break;
            }
            assert!(world.stats.reclaimed > 0, "nobody died: {:?}", world.stats);
            killed += 1;
        }
    }
    println!("NOTE simulation: killed at each of {killed} steps, with the same end");
    assert!(killed > 400, "{killed} steps");
}
