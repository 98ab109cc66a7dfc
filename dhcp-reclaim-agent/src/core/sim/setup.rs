//! What a world is like, and how often what happens in it.

use std::{collections::BTreeSet, time::Duration};

use super::super::{Policy, gates::Gate};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Boot,
    KillDeleted,
    KillCarrier,
    KillKept,
    StopStart,
    Pause,
    Reboot,
    CarrierFlap,
    Migrate,
    GuestRelease,
    CutUplink,
    DetachUplink,
    Suspend,
    Forge,
    LoseRecords,
    Restart,
}

#[derive(Clone, Debug)]
pub struct Setup {
    pub policy: Policy,
    pub nodes: usize,
    pub vms: usize,
    pub decisions: u32,
    pub span: Duration,
    /// Decisions after the boots all come at this time.
    pub together: Option<Duration>,
    pub weights: Vec<(Kind, u64)>,
    /// Of a hundred VMs, those whose client-id is their neighbour's.
    pub clones: u64,
    pub shared_ports: u64,
    pub probe_loss: u64,
    /// In milliseconds; what is longer than the hold-down is outside of the assumptions.
    pub longest_pause: u64,
    /// Of a hundred batches of records, those that come out of order.
    pub disorder: u64,
    /// A paused VM wakes between the decision and the frame.
    pub wakes_at_emit: bool,
    /// VMs move while their old node's uplink is cut, and uplinks are cut after moves.
    pub careless: bool,
    /// The share that the breaker allows, as the world counts it.
    pub bound_by_breaker: Option<f64>,
    /// Added to the bound of (b): what the rate may take.
    pub slack: Duration,
}

impl Setup {
    /// All that may happen, within the assumptions.
    pub fn everything() -> Self {
        Self {
            policy: Policy {
                breaker_min: 6,
                ..Policy::default()
            },
            nodes: 2,
            vms: 12,
            decisions: 400,
            span: Duration::from_secs(6000),
            together: None,
            weights: vec![
                (Kind::Boot, 60),
                (Kind::KillDeleted, 8),
                (Kind::KillCarrier, 6),
                (Kind::KillKept, 6),
                (Kind::StopStart, 6),
                (Kind::Pause, 8),
                (Kind::Reboot, 5),
                (Kind::CarrierFlap, 4),
                (Kind::Migrate, 8),
                (Kind::GuestRelease, 4),
                (Kind::CutUplink, 2),
                (Kind::DetachUplink, 1),
                (Kind::Suspend, 1),
                (Kind::Forge, 4),
                (Kind::LoseRecords, 3),
                (Kind::Restart, 1),
            ],
            clones: 5,
            shared_ports: 15,
            probe_loss: 10,
            longest_pause: 200_000,
            disorder: 10,
            wakes_at_emit: false,
            careless: true,
            bound_by_breaker: Some(0.5),
            slack: Duration::ZERO,
        }
    }

    /// Boots, deaths and `kinds`; nothing else.
    pub fn only(kinds: &[(Kind, u64)]) -> Self {
        let mut weights = vec![
            (Kind::Boot, 40),
            (Kind::KillDeleted, 10),
            (Kind::KillKept, 5),
        ];
        weights.extend_from_slice(kinds);
        Self {
            weights,
            clones: 0,
            shared_ports: 0,
            ..Self::everything()
        }
    }

    #[must_use]
    pub fn without(mut self, gate: Gate) -> Self {
        self.policy.without = BTreeSet::from([gate]);
        self
    }
}
