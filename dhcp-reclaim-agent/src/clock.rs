//! The one place that reads clocks; everything else is told the time.

#![forbid(unsafe_code)]

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::core::Time;

/// `CLOCK_MONOTONIC`: the clock of `bpf_ktime_get_ns`, so that times of both halves compare.
pub fn monotonic() -> Time {
    read(ClockId::CLOCK_MONOTONIC)
}

/// `CLOCK_BOOTTIME`: goes on while the host is suspended.
pub fn boottime() -> Time {
    read(ClockId::CLOCK_BOOTTIME)
}

/// For how long the host has been suspended since it booted, to a millisecond. A process that is
/// interrupted between two clocks sees them apart, and looks again.
pub fn suspended() -> Duration {
    let mut nearest = (Duration::MAX, Duration::ZERO);
    for _ in 0..8 {
        let before = monotonic();
        let suspended = boottime().since(before);
        let took = monotonic().since(before);
        nearest = nearest.min((took, suspended));
        if took < Duration::from_millis(1) {
            break;
        }
    }
    nearest.1
}

fn read(clock: ClockId) -> Time {
    // Fails only for a clock that the kernel does not have (clock_gettime(2)).
    let Ok(now) = clock_gettime(clock) else {
        return Time::ZERO;
    };
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec()).unwrap_or(0);
    Time::from_nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

/// The time of day, for people and for what outlives a boot.
pub fn wall() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

/// Tells one boot from another (random(4)): monotonic times of different boots do not compare.
pub fn boot_id() -> std::io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monotonic_does_not_go_back() {
        let first = monotonic();
        assert!(first > Time::ZERO);
        assert!(monotonic() >= first);
    }
}
