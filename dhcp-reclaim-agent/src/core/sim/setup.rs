//! What a world is like, and how often what happens in it.

use std::{collections::BTreeSet, time::Duration};

use super::super::{Commit, Policy, gates::Gate};

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
    /// The node's bridge is deleted and made again, or set down and up.
    FlapBridge,
    /// The node sleeps; its monotonic clock goes on, or stands still.
    Suspend,
    Forge,
    LoseRecords,
    Restart,
    /// A person holds all releases of a node for a while.
    Hold,
    /// A person asks a VM, or for its release, without overriding anything.
    Ask,
}

#[derive(Clone, Debug)]
pub struct Setup {
    pub policy: Policy,
    pub nodes: usize,
    /// The server is beyond an uplink; otherwise it is this host.
    pub uplinks: bool,
    pub vms: usize,
    pub decisions: u32,
    pub span: Duration,
    /// Decisions after the boots all come at this time.
    pub together: Option<Duration>,
    /// Or all die then, one after the other, and the others come within so long after it.
    pub aftermath: Option<Duration>,
    pub weights: Vec<(Kind, u64)>,
    /// Whoever starts again does so on the last node.
    pub evacuated: bool,
    /// Of a hundred VMs, those whose client-id is their neighbour's.
    pub clones: u64,
    pub shared_ports: u64,
    /// Those whose port nobody named: no DHCP is heard there.
    pub aside: u64,
    /// Those that tag their frames.
    pub trunks: u64,
    /// Those of the first questions that ask for a rapid commit.
    pub rapid: u64,
    /// Of a hundred RELEASEs, those that never reach the server.
    pub release_loss: u64,
    /// Of a hundred questions to the server how far it has read, those that get lost.
    pub unread: u64,
    /// The server answers DHCPLEASEQUERY.
    pub queries: bool,
    pub probe_loss: u64,
    /// Those that do not even leave.
    pub probe_fail: u64,
    /// In milliseconds; what is longer than the hold-down is outside of the assumptions.
    pub longest_pause: u64,
    /// In milliseconds, of a tap's carrier.
    pub longest_flap: u64,
    /// Of a hundred batches of records, those that come out of order.
    pub disorder: u64,
    /// Percent of new ports that their agent is late at.
    pub late: u64,
    /// Of a hundred RELEASEs, those before which a paused VM wakes, after the decision.
    pub wakes_at_emit: u64,
    /// VMs move while their old node's uplink is cut, and uplinks are cut after moves.
    pub careless: bool,
    /// The share that the breaker allows, as the world counts it.
    pub bound_by_breaker: Option<f64>,
    /// Of every lease, if they all are the same.
    pub lease: Option<Duration>,
    /// The agent of a node is killed before this step of its own.
    pub kill_at: Option<(usize, u32)>,
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
            uplinks: true,
            vms: 12,
            decisions: 400,
            span: Duration::from_secs(6000),
            together: None,
            aftermath: None,
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
                (Kind::FlapBridge, 1),
                (Kind::Suspend, 1),
                (Kind::Forge, 4),
                (Kind::LoseRecords, 3),
                (Kind::Restart, 1),
            ],
            evacuated: false,
            clones: 5,
            shared_ports: 15,
            aside: 5,
            trunks: 20,
            rapid: 15,
            release_loss: 0,
            unread: 10,
            queries: false,
            probe_loss: 10,
            probe_fail: 2,
            longest_pause: 200_000,
            longest_flap: 8000,
            disorder: 10,
            late: 5,
            wakes_at_emit: 0,
            careless: true,
            bound_by_breaker: Some(0.5),
            lease: None,
            kill_at: None,
            slack: Duration::ZERO,
        }
    }

    /// Every kind of world in turn, and with turns of some lengths.
    pub fn of(seed: u64) -> Self {
        let mut all = Self::everything();
        all.policy.at_once = match seed / 8 % 4 {
            0 => 1,
            1 => 2,
            2 => 5,
            _ => all.policy.at_once,
        };
        match seed % 8 {
            0 | 1 => all.on_one_host(),
            2 => Self {
                policy: Policy {
                    commit: Commit::Request,
                    ..all.policy
                },
                ..all
            },
            4 => all.with_a_person(),
            3 => Self {
                queries: true,
                release_loss: 20,
                ..all
            },
            5 => Self::crowd(all.policy),
            6 if (seed / 8).is_multiple_of(2) => {
                // Their server shows that it reads, mostly; and nothing else keeps them.
                let crowd = Self::crowd(all.policy);
                let weights = crowd.weights.iter().copied();
                Self {
                    unread: 40,
                    weights: weights
                        .filter(|(kind, _)| *kind != Kind::CutUplink)
                        .collect(),
                    slack: Duration::from_secs(60),
                    ..crowd
                }
            }
            _ => all,
        }
    }

    /// Many die, and start elsewhere, while their RELEASEs wait for a slow server.
    fn crowd(policy: Policy) -> Self {
        Self {
            policy: Policy {
                rate: 1,
                burst: 2,
                breaker: None,
                ..policy
            },
            vms: 40,
            decisions: 125,
            span: Duration::from_secs(600),
            together: Some(Duration::from_secs(40)),
            aftermath: Some(Duration::from_secs(40)),
            weights: vec![
                (Kind::Boot, 20),
                (Kind::KillDeleted, 2),
                (Kind::CutUplink, 3),
            ],
            evacuated: true,
            unread: 100,
            // Only the last question comes after a cut that nobody noticed.
            probe_loss: 0,
            // Each VLAN has a pace of its own.
            trunks: 0,
            bound_by_breaker: None,
            slack: Duration::from_secs(240),
            ..Self::everything()
        }
    }

    /// Somebody pauses nodes, asks VMs, and asks for releases.
    fn with_a_person(mut self) -> Self {
        self.weights.extend([(Kind::Hold, 2), (Kind::Ask, 15)]);
        self
    }

    /// The server is the host itself, and there is no other.
    fn on_one_host(self) -> Self {
        let elsewhere = [Kind::Migrate, Kind::CutUplink, Kind::DetachUplink];
        let weights = self.weights.iter();
        Self {
            nodes: 1,
            uplinks: false,
            longest_flap: 1500,
            weights: weights
                .filter(|(kind, _)| !elsewhere.contains(kind))
                .copied()
                .collect(),
            ..self
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
            aside: 0,
            trunks: 0,
            ..Self::everything()
        }
    }

    #[must_use]
    pub fn without(mut self, gate: Gate) -> Self {
        self.policy.without = BTreeSet::from([gate]);
        self
    }
}
