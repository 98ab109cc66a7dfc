//! The lab's one clock: tests wait for foreign programs, so here real time is read.
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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

/// A point in time after which a wait is a failure.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    pub fn after(timeout: Duration) -> Self {
        Self(now() + timeout)
    }

    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(now())
    }

    pub fn passed(self) -> bool {
        self.left().is_zero()
    }
}
