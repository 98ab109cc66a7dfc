//! The lab's one clock: tests wait for foreign programs, so here real time is read.
use std::{
    env,
    sync::LazyLock,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Set where everything takes longer, as on an emulated processor: how many times as long.
pub const SLOW: &str = "DHCP_RECLAIM_TEST_SLOW";

static FACTOR: LazyLock<u32> = LazyLock::new(|| {
    let factor = env::var(SLOW).ok().and_then(|text| text.parse().ok());
    factor.unwrap_or(1)
});

#[expect(clippy::disallowed_methods, reason = "the lab's one monotonic clock")]
pub fn now() -> Instant {
    Instant::now()
}

/// Seconds since the epoch: what servers write into their lease stores.
#[expect(clippy::disallowed_methods, reason = "the lab's one wall clock")]
pub fn wall() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// How many times as long as on a developer's machine things take here.
pub fn slowness() -> u32 {
    *FACTOR
}

/// A limit of patience, as it is on this machine.
pub fn scaled(limit: Duration) -> Duration {
    limit * slowness()
}

/// A point in time after which a wait is a failure.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    pub fn after(timeout: Duration) -> Self {
        Self(now() + scaled(timeout))
    }

    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(now())
    }

    pub fn passed(self) -> bool {
        self.left().is_zero()
    }
}
