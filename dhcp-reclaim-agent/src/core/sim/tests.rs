//! Worlds by the thousand, and worlds without one of the gates.

use super::{Setup, Stats, run, story};

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_living_vm_is_released() {
    let setup = Setup::everything();
    let lives = env("DHCP_RECLAIM_SIM_LIVES").unwrap_or(20_000);
    let first = env("DHCP_RECLAIM_SIM_SEED");
    let mut total = Stats::default();
    let mut seed = first.unwrap_or(1);
    loop {
        match run(&setup, seed) {
            Ok((stats, _)) => total.add(&stats),
            Err(violation) => panic!("{}", story(&setup, seed, &violation)),
        }
        if first.is_some() || total.lives >= lives {
            break;
        }
        seed += 1;
    }
    println!("{} worlds: {total:?}", seed);
}
