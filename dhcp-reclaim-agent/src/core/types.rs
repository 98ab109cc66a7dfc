//! The words that the rooms around the core speak: what happened, and what is to be done.

use std::{fmt, net::Ipv4Addr, ops::Add, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{gates::Finding, pacing::ServerKey};

/// `CLOCK_MONOTONIC`, as the kernel half stamps it (`bpf_ktime_get_ns`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    pub const ZERO: Self = Self(0);

    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Self;

    /// Saturates: a time that cannot be told is far away.
    fn add(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// An address that one station can have: neither a group address nor all zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not six hexadecimal bytes with colons between them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an Ethernet address: expected six hexadecimal bytes, as in 02:00:00:00:00:01"
)]
pub struct ParseMacError(String);

impl FromStr for MacAddr {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseMacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|it| it.is_ascii_hexdigit()))
                .ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl Serialize for MacAddr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Interface index of a port, in the agent's network namespace.
pub type IfIndex = u32;

/// A bridge, or what stands in for one. The agent gives each bridge name a number of its own, so
/// that a bridge that is deleted and made again is the same segment.
pub type SegmentId = u32;

/// VLAN identifier; zero is untagged.
pub type Vlan = u16;

/// VLANs of a port of a bridge that filters them, or of the bridge itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vlans {
    /// What its untagged frames belong to; zero: to none, and the bridge drops them.
    pub pvid: Vlan,
    /// The first and the last of each range, and whether frames of it leave untagged.
    pub members: Vec<(Vlan, Vlan, bool)>,
    /// Its frames come with the VLANs of a tunnel's metadata.
    pub tunnel: bool,
}

impl Vlans {
    /// The tag that a frame of `vlan` leaves with, zero for none; `None`: it does not leave.
    pub fn tag(&self, vlan: Vlan) -> Option<Vlan> {
        let of = |(first, last, _): &&(Vlan, Vlan, bool)| (*first..=*last).contains(&vlan);
        let (_, _, untagged) = self.members.iter().find(of)?;
        Some(if *untagged { 0 } else { vlan })
    }
}

/// What a lease belongs to: one address on one VLAN of one segment (bridge).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub segment: SegmentId,
    pub vlan: Vlan,
    pub ip: Ipv4Addr,
}

/// Whose frames come in by a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// A VM's: believed about itself only.
    Vm,
    /// Other hosts': servers, relays, VMs elsewhere.
    Uplink,
    /// Nobody said whose: no lease is learned there and no server believed, but a VM that is seen
    /// there is alive.
    Aside,
}

/// Why a port is no longer there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortLoss {
    /// RTM_DELLINK.
    Deleted,
    /// The link has no carrier any more: qemu closed its persistent tap.
    CarrierLost,
    /// The link has no carrier any more, and is no tap: its VM may only have set it down.
    LinkDown,
    /// It went while no agent ran: what its VM did meanwhile nobody knows.
    Unseen,
    /// It is no longer a port of the bridge.
    Detached,
}

/// A port as `ports` found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub ifindex: IfIndex,
    pub name: String,
    pub segment: SegmentId,
    pub role: Role,
}

/// DHCP message types (RFC 2132 section 9.6) that the core acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MessageType {
    Discover,
    Offer,
    Request,
    Decline,
    Ack,
    Nak,
    Release,
    Inform,
}

/// Where a message was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It came in by the port.
    FromPort,
    /// It goes out by the port, towards the VM.
    ToPort,
}

/// A DHCP message, checked and typed. Unset addresses are `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub seen_at: Time,
    pub port: IfIndex,
    pub role: Role,
    pub direction: Direction,
    pub vlan: Vlan,
    pub kind: MessageType,
    /// What a server reads in it may differ from what we read.
    pub ambiguous: bool,
    pub source_mac: MacAddr,
    pub destination_mac: MacAddr,
    pub source_ip: Ipv4Addr,
    pub destination_ip: Ipv4Addr,
    pub xid: u32,
    pub chaddr: MacAddr,
    pub ciaddr: Option<Ipv4Addr>,
    pub yiaddr: Option<Ipv4Addr>,
    pub giaddr: Option<Ipv4Addr>,
    pub requested_ip: Option<Ipv4Addr>,
    pub server_id: Option<Ipv4Addr>,
    /// Option 51; `u32::MAX` is infinite (RFC 2131 section 3.3).
    pub lease_secs: Option<u32>,
    pub renewal_secs: Option<u32>,
    pub rebinding_secs: Option<u32>,
    pub client_id: Option<Vec<u8>>,
    pub rapid_commit: bool,
}

/// What WATCH and the port's slot say about one binding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Latest frame of the address or its MAC by its own port, since the watch was armed.
    pub own_at: Option<Time>,
    /// The same, but of the address only: proof that the VM uses it.
    pub address_at: Option<Time>,
    /// The same by any other port of the segment, and which.
    pub elsewhere: Option<(Time, IfIndex)>,
    /// Some frame came in by the binding's own port at or after this time (coarse: whose is not
    /// known).
    pub port_at: Option<Time>,
    /// Some frame came in by an uplink of the segment at or after this time.
    pub uplink_at: Option<Time>,
    /// Latest frame of the address by any port, and its Ethernet source.
    pub address: Option<(Time, MacAddr)>,
    /// The watch is armed: silence means something.
    pub armed: bool,
}

/// Where a unicast ARP probe leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeVia {
    /// Out of the VM's own port: nobody else can answer.
    Port(IfIndex),
    /// Into the segment, to wherever the bridge knows the MAC: the port is gone.
    Segment(SegmentId),
}

/// A unicast ARP request (RFC 5227 probe: sender address 0.0.0.0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub via: ProbeVia,
    pub vlan: Vlan,
    pub ip: Ipv4Addr,
    pub mac: MacAddr,
}

/// All that a DHCPRELEASE needs (RFC 2131 table 5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    pub segment: SegmentId,
    pub vlan: Vlan,
    /// The lease: `ciaddr`, and the IP source.
    pub ip: Ipv4Addr,
    /// `chaddr`, and the Ethernet source.
    pub chaddr: MacAddr,
    /// Option 61, verbatim, if the client used one.
    pub client_id: Option<Vec<u8>>,
    /// Option 54 of the last ACK, and the IP destination.
    pub server: Ipv4Addr,
    /// Ethernet destination; `None` if no reply of the server was ever seen.
    pub server_mac: Option<MacAddr>,
    /// A frame of the address or its MAC after this vetoes the RELEASE in kernel.
    pub silent_since: Time,
}

/// What a DHCPLEASEQUERY by address (RFC 4388) needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    pub segment: SegmentId,
    pub vlan: Vlan,
    pub ip: Ipv4Addr,
    pub server: Ipv4Addr,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryAnswer {
    /// The server's own address, and nobody has it.
    Unassigned,
    /// The server knows nothing of it.
    Unknown,
    /// Somebody has it: by whose MAC, if that is told.
    Active(Option<MacAddr>),
    /// No answer came.
    Silence,
    /// It could not be sent.
    NotAsked,
}

/// What became of a RELEASE that was ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseOutcome {
    /// It left the node.
    Sent,
    /// `emit` saw the VM and dropped it.
    Vetoed,
    /// It could not be sent; nothing left.
    Failed,
    /// Something came between, and nothing left: all gates are asked anew.
    Overtaken,
    /// `--dry-run`: it would have been sent.
    DryRun,
}

/// A port that is watched so long after it came is late: its guest may have its lease by then, and have
/// been quiet since.
pub const LATE: Duration = Duration::from_millis(100);

/// What answers a question to a whole segment is counted in an epoch that began no longer before it:
/// a loop may be busy for long, and ask many.
pub const EPOCH_ASKING: Duration = Duration::from_millis(100);

/// What happened outside of the core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Ports of it were not heard for a while, and these spoke there: whoever of them is searched for may
    /// have been given its address there.
    Unheard {
        segment: SegmentId,
        macs: Vec<MacAddr>,
    },
    /// A port is there and watched.
    PortUp(Port),
    PortDown {
        port: IfIndex,
        loss: PortLoss,
    },
    /// The segment's bridge is there, or it is not.
    Bridge {
        segment: SegmentId,
        there: bool,
    },
    /// Nothing of this segment may be released, and why; `None`: no longer.
    SegmentHeld {
        segment: SegmentId,
        reason: Option<String>,
    },
    /// The segment's bridge filters VLANs, and is itself a member of these; `None`: it does not.
    SegmentVlans {
        segment: SegmentId,
        own: Option<Vlans>,
    },
    /// What the port's untagged frames belong to has changed.
    PvidChanged {
        port: IfIndex,
    },
    Message(Message),
    /// The agent did not run for a while: stopped, suspended with its host, or starved. What is told
    /// from now on may have been so for long.
    Overslept {
        /// For so much of it its clock stood still, too.
        suspended: Duration,
    },
    /// Records of this port were lost: what we know of it may be old.
    RecordsLost {
        port: IfIndex,
        count: u32,
    },
    /// The answer to [`Action::Look`].
    Evidence {
        key: Key,
        evidence: Evidence,
    },
    /// The answer to [`Action::Probe`]: whether it left.
    Probed {
        key: Key,
        sent: bool,
    },
    /// The answer to [`Action::Release`].
    Released {
        key: Key,
        outcome: ReleaseOutcome,
    },
    /// The answer to [`Action::Query`], which may take seconds.
    Queried {
        key: Key,
        server: Ipv4Addr,
        answer: QueryAnswer,
    },
    /// The answer to [`Action::Sound`], if one comes.
    ServerRead {
        server: ServerKey,
        mark: u64,
    },
}

/// An open question of a VM's to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionId {
    pub port: IfIndex,
    pub xid: u32,
    pub chaddr: MacAddr,
}

/// Who an alarm after a RELEASE is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AlarmId {
    pub segment: SegmentId,
    pub mac: MacAddr,
}

/// What the core wants done. The shell answers `Look`, `Probe` and `Release` with the `Event` of
/// the same key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Watch the address and its MAC exactly: at `own_port`, and at every port of the segment if
    /// `everywhere`. `own_port` is `None` once the port is lost. Arming again changes the scope
    /// and forgets nothing that was seen.
    Arm {
        key: Key,
        mac: MacAddr,
        own_port: Option<IfIndex>,
        everywhere: bool,
    },
    Disarm {
        key: Key,
        mac: MacAddr,
    },
    Look {
        key: Key,
        mac: MacAddr,
        own_port: Option<IfIndex>,
    },
    Probe {
        key: Key,
        probe: Probe,
    },
    /// Ask the server, or its relay, whether the way is open; any frame on the uplink answers.
    Control {
        probe: Probe,
    },
    Release {
        key: Key,
        release: Release,
    },
    /// Ask the server how far it has read: behind the RELEASEs that were ordered before.
    Sound(Sounding),
    /// Ask the server who has the address.
    Query {
        key: Key,
        query: Query,
    },
    /// What must outlive the agent has changed: `Engine::saved` says to what, `None` that there is
    /// nothing to keep. It comes before the `Release` that it is the intent of.
    Save {
        key: Key,
    },
    /// The same of an open question, by `Engine::saved_transaction`.
    SaveTransaction {
        id: TransactionId,
    },
    /// The same of an alarm, by `Engine::saved_alarm`.
    SaveAlarm {
        id: AlarmId,
    },
    /// Tell who asked (`Engine::ask`, `Engine::ask_release`).
    Answer {
        key: Key,
        answer: Answer,
    },
    /// Tell people and programs.
    Notify(Notice),
}

/// A question that a server answers in its turn: what came before it has been read by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sounding {
    pub segment: SegmentId,
    pub vlan: Vlan,
    pub server: Ipv4Addr,
    pub server_mac: Option<MacAddr>,
    /// An address that the server serves.
    pub ip: Ipv4Addr,
    /// RELEASEs that went before.
    pub mark: u64,
}

/// What came of a person's question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A frame of it came since, at this time and by this port.
    Alive {
        at: Time,
        port: String,
    },
    /// Nothing came.
    Silent,
    /// Its lease ended meanwhile, here or by its VM.
    Ended,
    /// What each gate says; one of them holds.
    Held(Vec<Finding>),
    Released(ReleaseOutcome),
}

/// What happened, for people and programs: one line of `events`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub at: Time,
    pub event: NoticeKind,
    pub ip: Option<Ipv4Addr>,
    pub mac: Option<MacAddr>,
    pub port: Option<String>,
    /// Why, in one clause, with the figures.
    pub reason: String,
}

/// Names of `events`; a contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoticeKind {
    PortUp,
    PortLost,
    Requested,
    Bound,
    Renewed,
    Silent,
    /// A frame of a silent or gone VM: it lives.
    Alive,
    Gone,
    /// A gate holds the release back.
    Held,
    Releasing,
    Released,
    /// The server took the RELEASE.
    Verified,
    /// `--dry-run`.
    WouldRelease,
    /// `emit` dropped the RELEASE.
    Vetoed,
    ReleaseFailed,
    Refused,
    Withdrawn,
    Expired,
    Moved,
    /// Another port claims what belongs to a binding.
    Conflict,
    /// A VM sent a server's message.
    RogueServer,
    RecordsLost,
    /// Frames of an address after its release.
    ReleasedAlive,
    /// A person holds all releases of the node.
    Paused,
    /// A person ends that hold, or closes the breaker.
    Resumed,
    /// A person overrides gates.
    Forced,
}

/// States of a binding; a contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Requested,
    Bound,
    Silent,
    Gone,
    Releasing,
    Released,
    Refused,
    Withdrawn,
    Expired,
    Moved,
}

impl State {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Bound => "bound",
            Self::Silent => "silent",
            Self::Gone => "gone",
            Self::Releasing => "releasing",
            Self::Released => "released",
            Self::Refused => "refused",
            Self::Withdrawn => "withdrawn",
            Self::Expired => "expired",
            Self::Moved => "moved",
        }
    }
}
