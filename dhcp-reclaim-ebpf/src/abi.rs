//! What crosses the kernel boundary. Network data are byte arrays in network order; what the host
//! counts (interface indexes, nanoseconds) is in host order. No padding, no `bool`: every size is
//! asserted here, and a test locks the offsets.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Changes whenever a layout or a map below changes; pins carry it in their path.
pub const ABI_VERSION: u32 = 2;

/// Slots of the `PORTS` array.
pub const PORT_SLOTS: u32 = 32_768;

/// Where a port's slot is: the second only where the first was another's when the port came. Indexes
/// go up with each link that is made, so that new ones meet those that stay.
#[inline(always)]
#[must_use]
pub const fn port_slots(ifindex: u32) -> [u32; 2] {
    // Fibonacci hashing: two that share their low bits do not share these.
    let mixed = ifindex.wrapping_mul(0x9e37_79b1) >> (u32::BITS - PORT_SLOTS.ilog2());
    [ifindex & (PORT_SLOTS - 1), mixed]
}

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
/// Nobody said what is behind the port: it makes no lease, no answer of it is believed, and its frames
/// are signs of life like any other port's.
pub const ROLE_ASIDE: u8 = 3;

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
    /// Outer VLAN identifier (12 bits); `PortSlot::pvid` when untagged or priority-tagged.
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

/// What the kernel half knows of a port: one cache line, since each incoming frame reads it. The map
/// can be mapped into memory, and the agent stores its fields there one by one: an update through
/// the system call would write all 64 bytes, and undo what the kernel half stored meanwhile.
///
/// Fields marked *kernel* may be written on several CPUs at once, without locks. The stores are
/// aligned words, so none is torn; what a race loses is one token, one of `pending` (the answer then
/// counts as unasked: a reclaim missed) or a step of `lost`, which still changes.
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
    /// *kernel*: nanoseconds (`CLOCK_MONOTONIC`) when `tokens` was last filled; zero: never.
    pub tokens_ns: u64,
    /// *kernel*: DHCP records that this port may push now.
    pub tokens: u32,
    /// Records a second, and the depth of the bucket; a zero rate is no limit.
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
    /// VLAN of the port's untagged frames, where its bridge filters VLANs; zero: they have none.
    pub pvid: u16,
    pub reserved2: [u8; 2],
}

impl PortSlot {
    /// Takes one token of the port's bucket at `now_ns`; false when it is empty.
    #[inline(always)]
    pub fn take_token(&mut self, now_ns: u64) -> bool {
        const SECOND: u64 = 1_000_000_000;
        // Long enough to fill any bucket, short enough for the product below.
        const IDLE_MAX: u64 = u16::MAX as u64 * SECOND;

        let rate = u64::from(self.rate);
        if rate == 0 {
            return true;
        }
        let burst = u64::from(self.burst);
        let idle = now_ns.saturating_sub(self.tokens_ns);
        let mut tokens = u64::from(self.tokens);
        if self.tokens_ns == 0 || idle > IDLE_MAX {
            tokens = burst;
            self.tokens_ns = now_ns;
        } else {
            let earned = idle * rate / SECOND;
            if earned != 0 {
                tokens += earned;
                self.tokens_ns += earned * SECOND / rate;
            }
            if tokens > burst {
                tokens = burst;
            }
        }
        let granted = tokens != 0;
        if granted {
            tokens -= 1;
        }
        self.tokens = tokens as u32;
        granted
    }

    /// Keeps the xid of a REQUEST, so that its answer is heard; the oldest makes room.
    #[inline(always)]
    pub fn remember(&mut self, xid: [u8; 4]) {
        if self.asked(xid) {
            return;
        }
        let mut next = self.pending_next as usize;
        if next >= PENDING_PER_PORT {
            next = 0;
        }
        self.pending[next] = xid;
        self.pending_next = next as u8 + 1;
    }

    /// Whether a REQUEST with this xid is remembered.
    #[inline(always)]
    pub fn asked(&self, xid: [u8; 4]) -> bool {
        let mut found = false;
        let mut i = 0;
        while i < PENDING_PER_PORT {
            found |= u32::from_ne_bytes(self.pending[i]) == u32::from_ne_bytes(xid);
            i += 1;
        }
        found
    }
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
/// IPv4 source, or ARP sender), and behind which two ports of the segment. Only the kernel half
/// writes it, and which of the ports is the binding's own is for the reader to say: so the agent
/// never has to rewrite an entry, and no sighting can fall between its reading and its writing.
///
/// The older of the two makes room for a third port, so the latest sighting is always there,
/// whatever guests pretend. CPUs that race here replace one fresh sighting by another as fresh.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct WatchValue {
    /// `CLOCK_MONOTONIC` ns of the latest frame that came in by `ports[i]`; zero: none yet.
    pub seen_ns: [u64; 2],
    /// Interface indexes; zero: none yet.
    pub ports: [u32; 2],
    /// Ethernet source of the latest frame, from whichever port.
    pub mac: [u8; 6],
    pub reserved: [u8; 2],
}

impl WatchValue {
    /// Notes a frame from `mac` by `port`.
    #[inline(always)]
    pub fn note(&mut self, port: u32, now_ns: u64, mac: [u8; 6]) {
        let first =
            self.ports[0] == port || (self.ports[1] != port && self.seen_ns[0] <= self.seen_ns[1]);
        if first {
            self.ports[0] = port;
            self.seen_ns[0] = now_ns;
        } else {
            self.ports[1] = port;
            self.seen_ns[1] = now_ns;
        }
        self.mac = mac;
    }

    /// The latest sighting behind any port; zero: none.
    #[inline(always)]
    pub fn latest_ns(&self) -> u64 {
        if self.seen_ns[0] > self.seen_ns[1] {
            self.seen_ns[0]
        } else {
            self.seen_ns[1]
        }
    }

    /// The latest sighting behind `port`.
    pub fn seen_at(&self, port: u32) -> Option<u64> {
        let at = self.ports.iter().position(|&other| other == port)?;
        (self.seen_ns[at] != 0).then_some(self.seen_ns[at])
    }

    /// The latest sighting behind any other port than `own` (zero for none), and that port.
    pub fn seen_elsewhere(&self, own: u32) -> Option<(u64, u32)> {
        (0..2)
            .filter(|&i| self.seen_ns[i] != 0 && self.ports[i] != own)
            .map(|i| (self.seen_ns[i], self.ports[i]))
            .max()
    }
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
    /// Server messages that came by a port that is no uplink.
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

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use zerocopy::FromZeros as _;

    use super::*;

    #[test]
    fn layouts_are_locked() {
        assert_eq!(
            [
                offset_of!(Record, seen_ns),
                offset_of!(Record, ifindex),
                offset_of!(Record, direction),
                offset_of!(Record, vlan),
                offset_of!(Record, present),
                offset_of!(Record, anomalies),
                offset_of!(Record, source_mac),
                offset_of!(Record, source_ip),
                offset_of!(Record, op),
                offset_of!(Record, xid),
                offset_of!(Record, chaddr),
                offset_of!(Record, requested_ip),
                offset_of!(Record, client_id_len),
                offset_of!(Record, client_id),
            ],
            [0, 8, 16, 18, 20, 22, 24, 36, 44, 48, 64, 76, 96, 97]
        );
        assert_eq!(
            [
                offset_of!(PortSlot, ifindex),
                offset_of!(PortSlot, segment),
                offset_of!(PortSlot, seen_epoch),
                offset_of!(PortSlot, lost),
                offset_of!(PortSlot, tokens_ns),
                offset_of!(PortSlot, tokens),
                offset_of!(PortSlot, rate),
                offset_of!(PortSlot, burst),
                offset_of!(PortSlot, role),
                offset_of!(PortSlot, exact),
                offset_of!(PortSlot, pending_next),
                offset_of!(PortSlot, pending),
                offset_of!(PortSlot, pvid),
            ],
            [0, 4, 8, 12, 16, 24, 28, 30, 32, 33, 34, 36, 60]
        );
        assert_eq!(
            [
                offset_of!(WatchKey, segment),
                offset_of!(WatchKey, vlan),
                offset_of!(WatchKey, kind),
                offset_of!(WatchKey, address),
                offset_of!(WatchValue, ports),
                offset_of!(WatchValue, mac),
                offset_of!(EmitOrder, ip),
                offset_of!(EmitOrder, mac),
                offset_of!(EmitOrder, ifindex),
                offset_of!(EmitOrder, verdict),
            ],
            [0, 4, 6, 8, 16, 24, 8, 24, 40, 45]
        );
    }

    #[test]
    fn counters_are_numbered_in_order() {
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
        }
    }

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let mut slot = PortSlot {
            rate: 10,
            burst: 3,
            ..PortSlot::new_zeroed()
        };
        let start = 5_000_000_000;
        assert_eq!(
            [(); 4].map(|()| slot.take_token(start)),
            [true, true, true, false]
        );
        assert!(!slot.take_token(start + 99_999_999));
        assert!(slot.take_token(start + 100_000_000));
        assert!(!slot.take_token(start + 100_000_000));
        assert!(slot.take_token(u64::MAX), "idle for ages");
        assert_eq!(slot.tokens, 2);
    }

    #[test]
    fn the_oldest_transaction_makes_room() {
        let mut slot = PortSlot::new_zeroed();
        for xid in 1..=7_u32 {
            slot.remember(xid.to_be_bytes());
            slot.remember(xid.to_be_bytes());
        }
        assert!(!slot.asked(1_u32.to_be_bytes()));
        assert!((2..=7_u32).all(|xid| slot.asked(xid.to_be_bytes())));
    }

    #[test]
    fn a_watch_keeps_the_latest_and_tells_ports_apart() {
        let mut value = WatchValue::default();
        assert_eq!((value.seen_at(1), value.seen_elsewhere(1)), (None, None));
        value.note(1, 10, [1; 6]);
        value.note(2, 20, [2; 6]);
        value.note(1, 30, [1; 6]);
        assert_eq!(
            (value.seen_at(1), value.seen_elsewhere(1)),
            (Some(30), Some((20, 2)))
        );
        value.note(3, 40, [3; 6]);
        assert_eq!(
            (value.seen_at(1), value.seen_elsewhere(1)),
            (Some(30), Some((40, 3)))
        );
        assert_eq!((value.latest_ns(), value.mac), (40, [3; 6]));
        assert_eq!(
            value.seen_elsewhere(0),
            Some((40, 3)),
            "no own port: any counts"
        );
    }
}
