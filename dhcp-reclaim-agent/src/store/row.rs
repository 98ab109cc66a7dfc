//! Rows: by the names of bridges and ports, and with times that a reboot does not make nonsense of.

use std::{net::Ipv4Addr, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::Moment;
use crate::core::{
    AlarmId, IfIndex, Key, MacAddr, Origin, Outcome, Port, Role, Saved, SavedAlarm, SavedRelease,
    SavedTransaction, SegmentId, State, Time, TransactionId, Vlan,
    binding::{Ask, Doubt},
};

/// When a row was written. Its times are of the monotonic clock, which a step of the wall clock does
/// not touch; after a reboot they are carried over by the wall clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    boot: String,
    monotonic: u64,
    #[serde(default)]
    suspended: u64,
    wall: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindingRow {
    pub bridge: String,
    vlan: Vlan,
    ip: Ipv4Addr,
    mac: MacAddr,
    client_id: Option<Vec<u8>>,
    server: Option<Ipv4Addr>,
    server_mac: Option<MacAddr>,
    pub ifindex: IfIndex,
    port: String,
    state: State,
    #[serde(default)]
    origin: Origin,
    acked: bool,
    seen_alive: bool,
    #[serde(default)]
    shared: bool,
    doubt: Option<DoubtRow>,
    expires: Option<u64>,
    tentative_until: Option<u64>,
    last_seen: Option<u64>,
    #[serde(default)]
    released: Option<ReleasedRow>,
    written: Written,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ReleasedRow {
    at: u64,
    silent_since: u64,
    outcome: Outcome,
    vigil_until: Option<u64>,
    alarmed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum DoubtRow {
    Ambiguous,
    RecordsLost(u64),
    Conflict(u64),
    Contested,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransactionRow {
    ifindex: IfIndex,
    port: String,
    xid: u32,
    mac: MacAddr,
    at: u64,
    ask: Ask,
    vlan: Vlan,
    client_id: Option<Vec<u8>>,
    ambiguous: bool,
    poisoned: bool,
    boot: String,
}

/// A MAC whose released address was alive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlarmRow {
    pub bridge: String,
    mac: MacAddr,
    ifindex: IfIndex,
    port: String,
    boot: String,
}

/// A port that was watched: it may be gone when the next agent starts, and its records not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRow {
    pub ifindex: IfIndex,
    pub name: String,
    pub bridge: String,
    pub role: Role,
    /// Lost records that the agent knew of.
    pub lost: u32,
    /// An uplink that its bridge had last: since when it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gone_at: Option<u64>,
    boot: String,
}

impl Written {
    fn now(now: &Moment) -> Self {
        Self {
            boot: now.boot.clone(),
            monotonic: now.monotonic.as_nanos(),
            suspended: nanos(now.suspended),
            wall: now.wall,
        }
    }

    /// A time that lay ahead, at a server whose clock goes on while this host is suspended. After a
    /// reboot it can only come nearer: a wall clock that was set back makes no lease longer than it was
    /// when it was written.
    fn ahead(&self, at: u64, now: &Moment) -> Time {
        if self.boot == now.boot {
            let meanwhile = nanos(now.suspended).saturating_sub(self.suspended);
            return Time::from_nanos(at.saturating_sub(meanwhile));
        }
        let left = Duration::from_nanos(at.saturating_sub(self.monotonic));
        let passed = now.wall.duration_since(self.wall).max(SignedDuration::ZERO);
        now.monotonic + left.saturating_sub(passed.unsigned_abs())
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl BindingRow {
    pub fn key(bridge: &str, key: Key) -> String {
        format!("{bridge}/{}/{}", key.vlan, key.ip)
    }

    pub fn new(bridge: &str, saved: Saved, now: &Moment) -> Self {
        let nanos = |time: Option<Time>| time.map(Time::as_nanos);
        Self {
            bridge: bridge.to_owned(),
            vlan: saved.key.vlan,
            ip: saved.key.ip,
            mac: saved.chaddr,
            client_id: saved.client_id,
            server: saved.server,
            server_mac: saved.server_mac,
            ifindex: saved.port,
            port: saved.port_name,
            state: saved.state,
            origin: saved.origin,
            acked: saved.acked,
            seen_alive: saved.seen_alive,
            shared: saved.shared,
            doubt: saved.doubt.map(|doubt| match doubt {
                Doubt::Ambiguous => DoubtRow::Ambiguous,
                Doubt::RecordsLost(at) => DoubtRow::RecordsLost(at.as_nanos()),
                Doubt::Conflict(at) => DoubtRow::Conflict(at.as_nanos()),
                Doubt::Contested => DoubtRow::Contested,
            }),
            expires: nanos(saved.expires),
            tentative_until: nanos(saved.tentative_until),
            last_seen: nanos(saved.last_seen),
            released: saved.released.map(|released| ReleasedRow {
                at: released.at.as_nanos(),
                silent_since: released.silent_since.as_nanos(),
                outcome: released.outcome,
                vigil_until: nanos(released.vigil_until),
                alarmed: released.alarmed,
            }),
            written: Written::now(now),
        }
    }

    pub fn saved(self, segment: SegmentId, now: &Moment) -> Saved {
        let same_boot = self.written.boot == now.boot;
        // After a reboot: before everything that is seen from now on.
        let past = |at: u64| {
            if same_boot {
                Time::from_nanos(at)
            } else {
                now.monotonic
            }
        };
        Saved {
            key: Key {
                segment,
                vlan: self.vlan,
                ip: self.ip,
            },
            chaddr: self.mac,
            client_id: self.client_id,
            server: self.server,
            server_mac: self.server_mac,
            // Indexes begin anew with each boot: the one that is there may be another VM's.
            port: if same_boot { self.ifindex } else { 0 },
            port_name: self.port,
            state: self.state,
            origin: self.origin,
            acked: self.acked,
            seen_alive: self.seen_alive,
            shared: self.shared,
            doubt: self.doubt.map(|doubt| match doubt {
                DoubtRow::Ambiguous => Doubt::Ambiguous,
                DoubtRow::RecordsLost(at) => Doubt::RecordsLost(past(at)),
                DoubtRow::Conflict(at) => Doubt::Conflict(past(at)),
                DoubtRow::Contested => Doubt::Contested,
            }),
            expires: self.expires.map(|at| self.written.ahead(at, now)),
            tentative_until: self.tentative_until.map(|at| self.written.ahead(at, now)),
            last_seen: self.last_seen.filter(|_| same_boot).map(Time::from_nanos),
            released: self.released.map(|released| SavedRelease {
                at: past(released.at),
                silent_since: past(released.silent_since),
                outcome: released.outcome,
                vigil_until: released.vigil_until.map(|at| self.written.ahead(at, now)),
                alarmed: released.alarmed,
            }),
        }
    }
}

impl TransactionRow {
    pub fn key(id: TransactionId) -> String {
        format!("{}/{:08x}/{}", id.port, id.xid, id.chaddr)
    }

    pub fn new(saved: SavedTransaction, now: &Moment) -> Self {
        Self {
            ifindex: saved.id.port,
            port: saved.port_name,
            xid: saved.id.xid,
            mac: saved.id.chaddr,
            at: saved.at.as_nanos(),
            ask: saved.ask,
            vlan: saved.vlan,
            client_id: saved.client_id,
            ambiguous: saved.ambiguous,
            poisoned: saved.poisoned,
            boot: now.boot.clone(),
        }
    }

    /// One of an earlier boot is no longer open: as of the beginning of time.
    pub fn saved(self, now: &Moment) -> SavedTransaction {
        let same_boot = self.boot == now.boot;
        SavedTransaction {
            id: TransactionId {
                port: self.ifindex,
                xid: self.xid,
                chaddr: self.mac,
            },
            port_name: if same_boot { self.port } else { String::new() },
            at: Time::from_nanos(self.at),
            ask: self.ask,
            vlan: self.vlan,
            client_id: self.client_id,
            ambiguous: self.ambiguous,
            poisoned: self.poisoned,
        }
    }
}

impl AlarmRow {
    pub fn key(bridge: &str, id: AlarmId) -> String {
        format!("{bridge}/{}", id.mac)
    }

    pub fn new(bridge: &str, saved: SavedAlarm, now: &Moment) -> Self {
        Self {
            bridge: bridge.to_owned(),
            mac: saved.id.mac,
            ifindex: saved.port,
            port: saved.port_name,
            boot: now.boot.clone(),
        }
    }

    pub fn saved(self, segment: SegmentId, now: &Moment) -> SavedAlarm {
        SavedAlarm {
            id: AlarmId {
                segment,
                mac: self.mac,
            },
            port: if self.boot == now.boot {
                self.ifindex
            } else {
                0
            },
            port_name: self.port,
        }
    }
}

impl PortRow {
    pub fn key(ifindex: IfIndex) -> String {
        ifindex.to_string()
    }

    pub fn new(bridge: &str, port: &Port, lost: u32, gone_at: Option<Time>, now: &Moment) -> Self {
        Self {
            ifindex: port.ifindex,
            name: port.name.clone(),
            bridge: bridge.to_owned(),
            role: port.role,
            lost,
            gone_at: gone_at.map(Time::as_nanos),
            boot: now.boot.clone(),
        }
    }

    pub fn gone_at(&self) -> Option<Time> {
        self.gone_at.map(Time::from_nanos)
    }

    pub fn is_of_this_boot(&self, now: &Moment) -> bool {
        self.boot == now.boot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(boot: &str, monotonic: u64, wall: i64) -> Moment {
        Moment {
            boot: boot.to_owned(),
            monotonic: Time::from_nanos(monotonic * 1_000_000_000),
            suspended: Duration::from_secs(7),
            wall: Timestamp::from_second(1_800_000_000 + wall).unwrap(),
        }
    }

    fn seconds(time: Option<Time>) -> u64 {
        time.unwrap().as_nanos() / 1_000_000_000
    }

    fn saved() -> Saved {
        Saved {
            key: Key {
                segment: 1,
                vlan: 5,
                ip: Ipv4Addr::new(10, 0, 0, 1),
            },
            chaddr: MacAddr([2, 0, 0, 0, 0, 1]),
            client_id: Some(vec![0, 255, 7]),
            server: Some(Ipv4Addr::new(10, 0, 0, 254)),
            server_mac: Some(MacAddr([2, 0, 0, 0, 0, 0xfe])),
            port: 11,
            port_name: "vm1".to_owned(),
            state: State::Silent,
            origin: Origin::Imported,
            acked: true,
            seen_alive: true,
            shared: false,
            doubt: Some(Doubt::Conflict(Time::from_nanos(900_000_000_000))),
            expires: Some(Time::from_nanos(4_600_000_000_000)),
            tentative_until: None,
            last_seen: Some(Time::from_nanos(990_000_000_000)),
            released: Some(SavedRelease {
                at: Time::from_nanos(960_000_000_000),
                silent_since: Time::from_nanos(950_000_000_000),
                outcome: Outcome::Ignored,
                vigil_until: Some(Time::from_nanos(1_020_000_000_000)),
                alarmed: true,
            }),
        }
    }

    fn after(now: &Moment) -> Saved {
        let row = BindingRow::new("br0", saved(), &moment("a", 1000, 0));
        let bytes = serde_json::to_vec(&row).unwrap();
        let row: BindingRow = serde_json::from_slice(&bytes).unwrap();
        row.saved(1, now)
    }

    #[test]
    fn within_a_boot_nothing_changes_whatever_the_wall_clock_does() {
        for wall in [-86_400, 0, 1, 86_400] {
            assert_eq!(after(&moment("a", 1001, wall)), saved());
        }
    }

    #[test]
    fn a_suspended_host_has_less_left_of_a_lease() {
        let now = Moment {
            suspended: Duration::from_secs(67),
            ..moment("a", 1001, 60)
        };
        assert_eq!(seconds(after(&now).expires), 4600 - 60);
    }

    #[test]
    fn after_a_reboot_the_lease_has_what_the_wall_clock_left_of_it() {
        let now = moment("b", 30, 600);
        let saved = after(&now);
        assert_eq!(seconds(saved.expires), 30 + 3000);
        assert_eq!((saved.port, saved.last_seen), (0, None));
        assert_eq!(saved.doubt, Some(Doubt::Conflict(now.monotonic)));
        let released = saved.released.unwrap();
        let now = Some(now.monotonic);
        assert_eq!((Some(released.at), released.vigil_until), (now, now));
    }

    #[test]
    fn an_alarm_keeps_its_mac_through_a_reboot_and_its_port_through_a_restart() {
        let id = AlarmId {
            segment: 1,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
        };
        let saved = SavedAlarm {
            id,
            port: 11,
            port_name: "vm1".to_owned(),
        };
        let row = AlarmRow::new("br0", saved.clone(), &moment("a", 1000, 0));
        let again = row.clone().saved(1, &moment("a", 2000, 0));
        assert_eq!(again, saved);
        let again = row.saved(1, &moment("b", 30, 0));
        assert_eq!((again.id, again.port), (id, 0));
    }

    #[test]
    fn a_clock_that_was_set_back_makes_no_lease_longer() {
        assert_eq!(seconds(after(&moment("b", 30, -86_400)).expires), 30 + 3600);
        assert_eq!(seconds(after(&moment("b", 30, 86_400)).expires), 30);
    }
}
