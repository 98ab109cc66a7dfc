//! What crosses the kernel boundary. Network data are byte arrays in network order; what the host
//! counts (interface indexes, nanoseconds) is in host order. No padding, no `bool`: every size is
//! asserted here, and a test locks the offsets.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Changes whenever a layout or a map below changes; pins carry it in their path.
pub const ABI_VERSION: u32 = 1;

/// Slots of the `PORTS` array. A port's slot is `ifindex & (PORT_SLOTS - 1)`.
pub const PORT_SLOTS: u32 = 32_768;
/// Transactions that a port may have open at once; the oldest makes room.
pub const PENDING_PER_PORT: usize = 6;
/// Entries of `WATCH`: two (address, MAC) for each binding whose check is due.
pub const WATCH_ENTRIES: u32 = 131_072;
/// Entries of `ORDERS`: RELEASEs between decision and wire.
pub const ORDER_ENTRIES: u32 = 4_096;
/// Bytes of the `RECORDS` ring.
pub const RING_BYTES: u32 = 4 * 1024 * 1024;
/// Longest client identifier (RFC 2132 section 9.14): what one option can hold.
pub const CLIENT_ID_MAX: usize = 255;

/// The frame came in by the port: its VM (or the far side of an uplink) sent it.
pub const DIRECTION_FROM_PORT: u8 = 1;
/// The frame goes out by the port: it is on its way to the VM.
pub const DIRECTION_TO_PORT: u8 = 2;

/// Not watched; also what an empty slot holds.
pub const ROLE_NONE: u8 = 0;
/// A VM is behind the port: what it says is believed about itself only.
pub const ROLE_VM: u8 = 1;
/// Other hosts are behind the port: DHCP servers, relays, VMs elsewhere.
pub const ROLE_UPLINK: u8 = 2;

/// One DHCP message, as `classify` read it. All bytes that were not on the wire are zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Record {
    /// `CLOCK_MONOTONIC`, nanoseconds, when the frame was seen.
    pub seen_ns: u64,
    /// Interface that the program ran on.
    pub ifindex: u32,
    /// `PortSlot::lost` when this record was made: records of this port that found no room.
    pub lost: u32,
    /// `DIRECTION_*`.
    pub direction: u8,
    /// `ROLE_*` of the port.
    pub role: u8,
    /// Outer VLAN identifier (12 bits), zero when untagged or priority-tagged.
    pub vlan: [u8; 2],
    /// `PRESENT_*`: the options that were found and well formed.
    pub present: u16,
    /// `ANOMALY_*`: why what a server reads may differ from what we read. Any bit: ambiguous.
    pub anomalies: u16,
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    pub source_ip: [u8; 4],
    pub destination_ip: [u8; 4],
    /// BOOTP `op`: 1 request, 2 reply.
    pub op: u8,
    /// Option 53 (RFC 2132 section 9.6), zero when absent.
    pub message_type: u8,
    /// BOOTP `flags`: the top bit asks for broadcast replies.
    pub flags: [u8; 2],
    pub xid: [u8; 4],
    pub ciaddr: [u8; 4],
    pub yiaddr: [u8; 4],
    pub giaddr: [u8; 4],
    pub chaddr: [u8; 6],
    /// UDP source and destination ports.
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    /// Zero; keeps the next field aligned.
    pub reserved: [u8; 2],
    /// Option 50.
    pub requested_ip: [u8; 4],
    /// Option 54.
    pub server_id: [u8; 4],
    /// Option 51, seconds; all ones is infinite.
    pub lease_time: [u8; 4],
    /// Option 58, seconds (T1).
    pub renewal_time: [u8; 4],
    /// Option 59, seconds (T2).
    pub rebinding_time: [u8; 4],
    /// Length of option 61.
    pub client_id_len: u8,
    /// Option 61, verbatim.
    pub client_id: [u8; CLIENT_ID_MAX],
}

pub const PRESENT_REQUESTED_IP: u16 = 1 << 0;
pub const PRESENT_SERVER_ID: u16 = 1 << 1;
pub const PRESENT_LEASE_TIME: u16 = 1 << 2;
pub const PRESENT_RENEWAL_TIME: u16 = 1 << 3;
pub const PRESENT_REBINDING_TIME: u16 = 1 << 4;
pub const PRESENT_CLIENT_ID: u16 = 1 << 5;
pub const PRESENT_MESSAGE_TYPE: u16 = 1 << 6;
/// Option 80 (RFC 4039).
pub const PRESENT_RAPID_COMMIT: u16 = 1 << 7;
/// Option 82 (RFC 3046).
pub const PRESENT_RELAY_AGENT: u16 = 1 << 8;

/// An option of ours has a length that RFC 2132 does not allow.
pub const ANOMALY_OPTION_LENGTH: u16 = 1 << 0;
/// An option of ours came twice: RFC 3396 would join them, servers differ.
pub const ANOMALY_DUPLICATE: u16 = 1 << 1;
/// The options end without option 255.
pub const ANOMALY_NO_END: u16 = 1 << 2;
/// An option runs past its area.
pub const ANOMALY_OVERRUN: u16 = 1 << 3;
/// More options, or pads between them, than the walk follows.
pub const ANOMALY_TOO_MANY: u16 = 1 << 4;
/// First fragment of a datagram: the server sees more than we do.
pub const ANOMALY_FRAGMENT: u16 = 1 << 5;
/// The lengths of frame, IP and UDP contradict one another.
pub const ANOMALY_LENGTHS: u16 = 1 << 6;
/// More than one VLAN tag, or an 802.1ad one.
pub const ANOMALY_STACKED_TAGS: u16 = 1 << 7;
/// `htype` or `hlen` is not Ethernet's.
pub const ANOMALY_HARDWARE_TYPE: u16 = 1 << 8;

/// What the kernel half knows of a port; written by the agent but for the fields marked *kernel*.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PortSlot {
    /// Owner of the slot; zero when free. A frame of another ifindex leaves the slot alone.
    pub ifindex: u32,
    /// Bridge (or stand-in for one) that the port belongs to.
    pub segment: u32,
    /// *kernel*: `EPOCH` at the port's latest incoming frame: the coarse tier of WATCH.
    pub seen_epoch: u32,
    /// *kernel*: records of this port that found no room or no token.
    pub lost: u32,
    /// *kernel*: nanoseconds (`CLOCK_MONOTONIC`) when `tokens` was last filled.
    pub tokens_ns: u64,
    /// *kernel*: DHCP records that this port may push now.
    pub tokens: u32,
    /// Records a second, and the depth of the bucket; zero is no limit.
    pub rate: u16,
    pub burst: u16,
    /// `ROLE_*`.
    pub role: u8,
    /// Non-zero while some check is due at this port: each frame is then looked up in WATCH.
    pub exact: u8,
    /// *kernel*: next place in `pending`.
    pub pending_next: u8,
    pub reserved: u8,
    /// *kernel*: xids of the port's open REQUESTs; only an answer to one of them is a record.
    pub pending: [[u8; 4]; PENDING_PER_PORT],
    pub reserved2: [u8; 4],
}

/// What is watched: an IPv4 address or a MAC on one VLAN of one segment.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct WatchKey {
    pub segment: u32,
    pub vlan: [u8; 2],
    /// `WATCH_IP` or `WATCH_MAC`.
    pub kind: u8,
    pub reserved: u8,
    /// Address, left-aligned, the rest zero.
    pub address: [u8; 8],
}

pub const WATCH_IP: u8 = 4;
pub const WATCH_MAC: u8 = 6;

/// The exact tier of WATCH: when an address was last the *source* of a frame (Ethernet source, or
/// IPv4 source, or ARP sender), and where. Written by the kernel half but for `own_port`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct WatchValue {
    /// `CLOCK_MONOTONIC` ns of the latest frame that came in by `own_port`; zero: none yet.
    pub own_ns: u64,
    /// The same for every other watched port of the segment.
    pub other_ns: u64,
    /// Port of the binding, by the agent; zero when the port is gone.
    pub own_port: u32,
    /// Port of the frame in `other_ns`.
    pub other_port: u32,
    /// Ethernet source of the latest frame, from whichever port.
    pub mac: [u8; 6],
    pub reserved: [u8; 2],
}

/// One RELEASE between decision and wire. Key of `ORDERS`: its xid.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EmitOrder {
    /// Frames seen after this (`CLOCK_MONOTONIC` ns) veto the RELEASE.
    pub silent_since_ns: u64,
    /// Watched address and MAC; both are looked up.
    pub ip: WatchKey,
    pub mac: WatchKey,
    /// Device to redirect to: the bridge.
    pub ifindex: u32,
    /// `EMIT_INGRESS` or `EMIT_EGRESS`.
    pub direction: u8,
    /// *kernel*: `VERDICT_*`.
    pub verdict: u8,
    /// VLAN identifier to push before the frame leaves; zero for none.
    pub vlan: [u8; 2],
}

/// The server is this host: redirect to where the bridge receives.
pub const EMIT_INGRESS: u8 = 1;
/// The server is elsewhere: redirect to where the bridge sends.
pub const EMIT_EGRESS: u8 = 2;

/// `emit` has not run for this order.
pub const VERDICT_NONE: u8 = 0;
pub const VERDICT_SENT: u8 = 1;
/// The address or the MAC was seen after the decision.
pub const VERDICT_VETOED: u8 = 2;
/// The watch had been taken away: nothing is known, so nothing leaves.
pub const VERDICT_UNWATCHED: u8 = 3;

/// Per-CPU counters, in the order of the `COUNTERS` array.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counter {
    /// DHCP messages that passed the first tests.
    Dhcp = 0,
    /// Records handed to the ring.
    Records,
    /// Records lost: no room in the ring.
    RingFull,
    /// Records lost: the port's token bucket was empty.
    RateLimited,
    /// Frames shorter than their headers claim.
    Truncated,
    /// Messages with any `ANOMALY_*`.
    Ambiguous,
    /// UDP 67/68 without BOOTP op 1 or 2, or without the magic cookie (RFC 2131 section 3).
    NotDhcp,
    /// Server messages that a VM sent.
    RogueServer,
    /// Answers towards a port that had not asked (broadcasts for others, mostly).
    Unasked,
    /// RELEASEs that `emit` let through.
    EmitSent,
    /// RELEASEs that `emit` dropped because the VM was seen.
    EmitVetoed,
    /// Frames on the private link without an order.
    EmitNoOrder,
    /// Frames of a port whose slot belongs to another.
    SlotTaken,
}

impl Counter {
    pub const ALL: [Self; 13] = [
        Self::Dhcp,
        Self::Records,
        Self::RingFull,
        Self::RateLimited,
        Self::Truncated,
        Self::Ambiguous,
        Self::NotDhcp,
        Self::RogueServer,
        Self::Unasked,
        Self::EmitSent,
        Self::EmitVetoed,
        Self::EmitNoOrder,
        Self::SlotTaken,
    ];

    /// Name in tables, JSON and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dhcp => "dhcp",
            Self::Records => "records",
            Self::RingFull => "ring_full",
            Self::RateLimited => "rate_limited",
            Self::Truncated => "truncated",
            Self::Ambiguous => "ambiguous",
            Self::NotDhcp => "not_dhcp",
            Self::RogueServer => "rogue_server",
            Self::Unasked => "unasked",
            Self::EmitSent => "emit_sent",
            Self::EmitVetoed => "emit_vetoed",
            Self::EmitNoOrder => "emit_no_order",
            Self::SlotTaken => "slot_taken",
        }
    }
}

const _: () = {
    assert!(size_of::<Record>() == 352);
    assert!(size_of::<PortSlot>() == 64);
    assert!(size_of::<WatchKey>() == 16);
    assert!(size_of::<WatchValue>() == 32);
    assert!(size_of::<EmitOrder>() == 48);
    assert!(PORT_SLOTS.is_power_of_two());
};
