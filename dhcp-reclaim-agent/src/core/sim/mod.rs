//! The engine in a world of its own: nodes, VMs, a server and a clock that jumps, from a seed.

mod rng;
mod setup;
mod tests;
mod world;

use std::collections::BTreeSet;

use setup::Setup;
use world::{Stats, Violation, World};

/// Runs one world; what went wrong comes back as a story.
fn run(setup: &Setup, seed: u64) -> Result<(Stats, u64), Violation> {
    let mut world = World::new(setup.clone(), seed, BTreeSet::new(), false);
    world.run()?;
    Ok((world.stats, world.trace))
}

/// Leaves out decisions for as long as the same rule breaks, and tells what is left.
fn story(setup: &Setup, seed: u64, violation: &Violation) -> String {
    let attempt = |dropped: &BTreeSet<u32>| {
        World::new(setup.clone(), seed, dropped.clone(), false)
            .run()
            .is_err_and(|found| found.rule == violation.rule)
    };
    let mut dropped = BTreeSet::new();
    let mut chunk = setup.decisions;
    while chunk > 0 {
        let mut from = 0;
        while from < setup.decisions {
            let mut more = dropped.clone();
            more.extend(from..(from + chunk).min(setup.decisions));
            if more.len() > dropped.len() && attempt(&more) {
                dropped = more;
            }
            from += chunk;
        }
        chunk /= 2;
    }
    let mut world = World::new(setup.clone(), seed, dropped.clone(), true);
    let last = world.run().err();
    let violation = last.as_ref().unwrap_or(violation);
    format!(
        "seed {seed}: {}: {}\n{} of {} decisions are needed\n\n{}\nagain: DHCP_RECLAIM_SIM_SEED={seed} cargo \
         test --profile sim -p dhcp-reclaim-agent --lib sim\n",
        violation.rule,
        violation.text,
        setup.decisions as usize - dropped.len(),
        setup.decisions,
        world.story(violation.ip),
    )
}
