//! `classify()`: from a frame to a [`Record`](crate::abi::Record), and who wants to hear of it.
//!
//! Frames are hostile. Every read of the frame is masked into the buffer, so nothing here can panic
//! or leave it, and the verifier sees that; every loop has a constant bound. What was read lives in
//! memory (`Walk`, `Record`), not in variables: the verifier tracks each variable's possible values
//! along every path, but takes what comes from a map for unknown, and so many paths become one.

#[cfg(any(test, feature = "vectors"))]
use zerocopy::FromZeros as _;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::abi::{
    ANOMALY_DUPLICATE, ANOMALY_FRAGMENT, ANOMALY_HARDWARE_TYPE, ANOMALY_LENGTHS, ANOMALY_NO_END,
    ANOMALY_OPTION_LENGTH, ANOMALY_OVERRUN, ANOMALY_STACKED_TAGS, ANOMALY_TOO_MANY, CLIENT_ID_MAX,
    DIRECTION_FROM_PORT, PRESENT_CLIENT_ID, PRESENT_LEASE_TIME, PRESENT_MESSAGE_TYPE,
    PRESENT_RAPID_COMMIT, PRESENT_REBINDING_TIME, PRESENT_RELAY_AGENT, PRESENT_RENEWAL_TIME,
    PRESENT_REQUESTED_IP, PRESENT_SERVER_ID, ROLE_ASIDE, ROLE_UPLINK, ROLE_VM, Record,
};

#[cfg(any(test, feature = "vectors"))]
pub mod vectors;

/// Bytes of a frame that are looked at; the rest of a longer one is reported as an anomaly, unless
/// its options end before.
pub const FRAME_MAX: usize = 2048;
/// Bytes that [`candidate`] needs: up to the UDP ports behind two VLAN tags. A shorter frame holds
/// no BOOTP message.
pub const HEAD: usize = 46;

const MASK: usize = FRAME_MAX - 1;
/// Options, pads and ends that one message may have.
const STEPS_MAX: u32 = 96;

const ETHERTYPE: usize = 12;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const VLAN: u16 = 0x8100;
const VLAN_SERVICE: u16 = 0x88a8;
const VLAN_OLD_QINQ: u16 = 0x9100;
const VLAN_ID: u16 = 0x0fff;
const UDP: u8 = 17;

/// RFC 951 and 2131: where things are in a BOOTP message.
const SNAME: u32 = 44;
const FILE: u32 = 108;
const COOKIE: u32 = 236;
const OPTIONS: u32 = 240;
const MAGIC: u32 = 0x6382_5363;

pub const DISCOVER: u8 = 1;
pub const REQUEST: u8 = 3;
pub const DECLINE: u8 = 4;
pub const ACK: u8 = 5;
pub const NAK: u8 = 6;
pub const RELEASE: u8 = 7;

/// The VLAN tag that the kernel took off the frame already; a zero `protocol` is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    /// TPID, host order.
    pub protocol: u16,
    /// TCI, host order.
    pub tci: u16,
}

impl Tag {
    pub const NONE: Self = Self {
        protocol: 0,
        tci: 0,
    };
}

/// What a frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing that a DHCP server or client reads.
    Other,
    /// To UDP 67 or 68, but shorter than its headers claim.
    Truncated,
    /// To UDP 67 or 68, but not BOOTP with the DHCP cookie.
    NotDhcp,
    /// A DHCP message; the record holds it.
    Message,
}

/// Who wants to hear of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    Nobody,
    Push,
    /// A question: push it, and keep its xid so that the answer is heard.
    PushAndRemember,
    /// An answer: push it if its xid is kept.
    PushIfAsked,
    /// A server's message from a VM.
    Rogue,
}

/// State of the walk through the options. The caller keeps it next to the record.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Walk {
    /// Start of the BOOTP message.
    bootp: u32,
    /// Next option.
    at: u32,
    /// End of the area that is walked.
    limit: u32,
    /// Bits of option 52 whose areas are still to be walked.
    overload: u32,
    overloaded: u32,
    client_id: u32,
    /// The message is longer than the buffer.
    cut: u32,
}

/// Cheap first test: whether the frame may be a DHCP message. May say yes too often, never no.
#[inline(always)]
pub fn candidate(head: &[u8; HEAD]) -> bool {
    match u16::from_be_bytes([head[12], head[13]]) {
        IPV4 => to_dhcp(head[14], head[23], [head[36], head[37]]),
        VLAN | VLAN_SERVICE | VLAN_OLD_QINQ => match u16::from_be_bytes([head[16], head[17]]) {
            IPV4 => to_dhcp(head[18], head[27], [head[40], head[41]]),
            VLAN | VLAN_SERVICE | VLAN_OLD_QINQ => {
                head[20] == 8 && head[21] == 0 && head[31] == UDP
            }
            _ => false,
        },
        _ => false,
    }
}

/// The destination decides, since that is what a server binds to; a client may send from any port.
#[inline(always)]
fn to_dhcp(version_ihl: u8, protocol: u8, destination: [u8; 2]) -> bool {
    protocol == UDP && (version_ihl != 0x45 || matches!(u16::from_be_bytes(destination), 67 | 68))
}

/// Whose frame it is: for the exact tier of WATCH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    /// Network order.
    pub vlan: [u8; 2],
    pub mac: [u8; 6],
    /// IPv4 source or ARP sender address; zero when there is none.
    pub ip: [u8; 4],
}

/// Whether a frame of this destination goes no farther than one link: IEEE 802.1D's reserved addresses
/// (spanning tree, LACP, LLDP), and those of CDP and PVST.
#[inline(always)]
pub fn is_link_local(destination: &[u8; 6]) -> bool {
    match *destination {
        [0x01, 0x80, 0xc2, 0x00, 0x00, last] => last < 0x10,
        [0x01, 0x00, 0x0c, 0xcc, 0xcc, last] => last == 0xcc || last == 0xcd,
        _ => false,
    }
}

/// Bytes that [`sources`] needs: an ARP message without padding.
pub const SOURCES_HEAD: usize = 42;

/// `head` may be filled up with zeros when the frame is shorter.
#[inline(always)]
pub fn sources(head: &[u8; SOURCES_HEAD], tag: Tag) -> Sources {
    let mac = [head[6], head[7], head[8], head[9], head[10], head[11]];
    let outer = u16::from_be_bytes([head[12], head[13]]);
    if outer != VLAN && outer != VLAN_SERVICE {
        let ip = match outer {
            IPV4 => [head[26], head[27], head[28], head[29]],
            ARP => [head[28], head[29], head[30], head[31]],
            _ => [0; 4],
        };
        return Sources {
            vlan: (tag.tci & VLAN_ID).to_be_bytes(),
            mac,
            ip,
        };
    }
    let tci = if tag.protocol != 0 {
        tag.tci
    } else {
        u16::from_be_bytes([head[14], head[15]])
    };
    let ip = match u16::from_be_bytes([head[16], head[17]]) {
        IPV4 => [head[30], head[31], head[32], head[33]],
        ARP => [head[32], head[33], head[34], head[35]],
        _ => [0; 4],
    };
    Sources {
        vlan: (tci & VLAN_ID).to_be_bytes(),
        mac,
        ip,
    }
}

/// Reads the frame of `len` bytes, of which the buffer holds the first [`FRAME_MAX`]; what lies
/// behind them in the buffer is never read. `record` must come zeroed: only what the message holds
/// is written.
///
/// UDP checksums are not looked at: virtio leaves them unfinished.
#[inline(always)]
pub fn classify(
    frame: &[u8; FRAME_MAX],
    len: u32,
    tag: Tag,
    walk: &mut Walk,
    record: &mut Record,
) -> Outcome {
    if len < HEAD as u32 {
        return Outcome::Other;
    }
    let mut ethertype = half(frame, ETHERTYPE as u32);
    let mut vlan = tag.tci & VLAN_ID;
    let mut anomalies = 0;
    let mut l3 = 14;
    if tag.protocol != 0 && tag.protocol != VLAN {
        anomalies |= ANOMALY_STACKED_TAGS;
    }
    if is_tag(ethertype) {
        if tag.protocol != 0 || ethertype != VLAN {
            anomalies |= ANOMALY_STACKED_TAGS;
        }
        if tag.protocol == 0 {
            vlan = half(frame, 14) & VLAN_ID;
        }
        ethertype = half(frame, 16);
        l3 = 18;
        if is_tag(ethertype) {
            anomalies |= ANOMALY_STACKED_TAGS;
            ethertype = half(frame, 20);
            l3 = 22;
        }
    }
    if ethertype != IPV4 {
        return Outcome::Other;
    }

    let version_ihl = byte(frame, l3);
    let header = u32::from(version_ihl & 0x0f) * 4;
    if version_ihl >> 4 != 4 || header < 20 || byte(frame, l3 + 9) != UDP {
        return Outcome::Other;
    }
    let fragment = half(frame, l3 + 6);
    if fragment & 0x1fff != 0 {
        return Outcome::Other;
    }
    let udp = l3 + header;
    let bootp = udp + 8;
    if bootp > len {
        return Outcome::Truncated;
    }
    let destination = half(frame, udp + 2);
    if destination != 67 && destination != 68 {
        return Outcome::Other;
    }
    let total = u32::from(half(frame, l3 + 2));
    let datagram = u32::from(half(frame, udp + 4));
    if l3 + total > len || total < header + 8 || datagram < 8 {
        return Outcome::Truncated;
    }
    let mut end = l3 + total;
    if fragment & 0x2000 != 0 {
        anomalies |= ANOMALY_FRAGMENT;
    } else if header + datagram != total {
        anomalies |= ANOMALY_LENGTHS;
        if udp + datagram < end {
            end = udp + datagram;
        }
    }
    if bootp + OPTIONS > end {
        return Outcome::NotDhcp;
    }
    let op = byte(frame, bootp);
    if (op != 1 && op != 2) || word(frame, bootp + COOKIE) != MAGIC.to_be_bytes() {
        return Outcome::NotDhcp;
    }
    if byte(frame, bootp + 1) != 1 || byte(frame, bootp + 2) != 6 {
        anomalies |= ANOMALY_HARDWARE_TYPE;
    }

    record.vlan = vlan.to_be_bytes();
    record.anomalies = anomalies;
    record.destination_mac = mac(frame, 0);
    record.source_mac = mac(frame, 6);
    record.source_ip = word(frame, l3 + 12);
    record.destination_ip = word(frame, l3 + 16);
    record.source_port = half(frame, udp).to_be_bytes();
    record.destination_port = destination.to_be_bytes();
    record.op = op;
    record.xid = word(frame, bootp + 4);
    record.flags = half(frame, bootp + 10).to_be_bytes();
    record.ciaddr = word(frame, bootp + 12);
    record.yiaddr = word(frame, bootp + 16);
    record.giaddr = word(frame, bootp + 24);
    record.chaddr = mac(frame, bootp + 28);

    walk.bootp = bootp;
    walk.at = bootp + OPTIONS;
    walk.cut = u32::from(end > FRAME_MAX as u32);
    walk.limit = if end > FRAME_MAX as u32 {
        FRAME_MAX as u32
    } else {
        end
    };
    walk.overload = 0;
    walk.overloaded = 0;
    walk.client_id = 0;
    let mut done = false;
    let mut steps = 0;
    while steps < STEPS_MAX {
        if !step(frame, walk, record) {
            done = true;
            break;
        }
        steps += 1;
    }
    if !done {
        record.anomalies |= ANOMALY_TOO_MANY;
    }
    copy_client_id(frame, walk.client_id, record);
    Outcome::Message
}

/// What becomes of a message, by whose port it passes and which way.
#[inline(always)]
pub fn interest(role: u8, direction: u8, record: &Record) -> Interest {
    // The type may be what the anomaly hides.
    let strange = record.anomalies != 0;
    let kind = record.message_type;
    if direction != DIRECTION_FROM_PORT {
        let answer = record.op == 2 && (kind == ACK || kind == NAK || strange);
        return if role == ROLE_VM && answer {
            Interest::PushIfAsked
        } else {
            Interest::Nobody
        };
    }
    if role == ROLE_UPLINK {
        let wanted = kind == REQUEST || kind == ACK || kind == NAK || strange;
        return if wanted {
            Interest::Push
        } else {
            Interest::Nobody
        };
    }
    if role == ROLE_ASIDE {
        return if record.op == 2 {
            Interest::Rogue
        } else {
            Interest::Nobody
        };
    }
    if role != ROLE_VM {
        return Interest::Nobody;
    }
    if record.op == 2 || u16::from_be_bytes(record.source_port) == 67 {
        return Interest::Rogue;
    }
    if kind == REQUEST
        || strange
        || (kind == DISCOVER && record.present & PRESENT_RAPID_COMMIT != 0)
    {
        return Interest::PushAndRemember;
    }
    if kind == DECLINE || kind == RELEASE {
        return Interest::Push;
    }
    Interest::Nobody
}

/// One option; false when there is no more.
///
/// A function of its own in the kernel too: inlined, the compiler keeps the walk in registers, and
/// the verifier follows each of their values through each of the steps (a million instructions and
/// more; so it is some ten thousand).
#[inline(never)]
fn step(frame: &[u8; FRAME_MAX], walk: &mut Walk, record: &mut Record) -> bool {
    // Masked at once: all ways into the next step look alike to the verifier.
    let at = walk.at & MASK as u32;
    let limit = walk.limit;
    if walk.at >= limit {
        record.anomalies |= if walk.cut != 0 {
            ANOMALY_TOO_MANY
        } else {
            ANOMALY_NO_END
        };
        return next_area(walk);
    }
    let code = byte(frame, at);
    if code == 0 {
        walk.at = at + 1;
        return true;
    }
    if code == 255 {
        return next_area(walk);
    }
    if at + 2 > limit {
        record.anomalies |= ANOMALY_OVERRUN;
        return next_area(walk);
    }
    let len = byte(frame, at + 1);
    let data = at + 2;
    let next = data + u32::from(len);
    if next > limit {
        record.anomalies |= if walk.cut != 0 {
            ANOMALY_TOO_MANY
        } else {
            ANOMALY_OVERRUN
        };
        return next_area(walk);
    }
    walk.at = next;

    let (bit, fits) = match code {
        50 => (PRESENT_REQUESTED_IP, len == 4),
        51 => (PRESENT_LEASE_TIME, len == 4),
        52 => {
            overload(walk, record, len, byte(frame, data));
            return true;
        }
        53 => (PRESENT_MESSAGE_TYPE, len == 1),
        54 => (PRESENT_SERVER_ID, len == 4),
        58 => (PRESENT_RENEWAL_TIME, len == 4),
        59 => (PRESENT_REBINDING_TIME, len == 4),
        // RFC 2132 section 9.14: two bytes at least.
        61 => (PRESENT_CLIENT_ID, len >= 2),
        80 => (PRESENT_RAPID_COMMIT, len == 0),
        82 => (PRESENT_RELAY_AGENT, len != 0),
        _ => return true,
    };
    if !fits {
        record.anomalies |= ANOMALY_OPTION_LENGTH;
        return true;
    }
    if record.present & bit != 0 {
        record.anomalies |= ANOMALY_DUPLICATE;
        return true;
    }
    record.present |= bit;
    match code {
        50 => record.requested_ip = word(frame, data),
        51 => record.lease_time = word(frame, data),
        53 => record.message_type = byte(frame, data),
        54 => record.server_id = word(frame, data),
        58 => record.renewal_time = word(frame, data),
        59 => record.rebinding_time = word(frame, data),
        61 => {
            walk.client_id = data;
            record.client_id_len = len;
        }
        _ => {}
    }
    true
}

/// Option 52 (RFC 2132 section 9.3).
#[inline(always)]
fn overload(walk: &mut Walk, record: &mut Record, len: u8, value: u8) {
    if len != 1 || value == 0 || value > 3 {
        record.anomalies |= ANOMALY_OPTION_LENGTH;
    } else if walk.overloaded != 0 {
        record.anomalies |= ANOMALY_DUPLICATE;
    } else {
        walk.overloaded = 1;
        walk.overload = u32::from(value);
    }
}

/// RFC 2131 section 4.1: the options first, then `file`, then `sname`.
#[inline(always)]
fn next_area(walk: &mut Walk) -> bool {
    let overload = walk.overload;
    let bootp = walk.bootp;
    walk.cut = 0;
    if overload & 1 != 0 {
        walk.overload = overload & 2;
        walk.at = bootp + FILE;
        walk.limit = bootp + COOKIE;
        return true;
    }
    if overload & 2 != 0 {
        walk.overload = 0;
        walk.at = bootp + SNAME;
        walk.limit = bootp + FILE;
        return true;
    }
    false
}

/// Once, after the walk: a loop within its loop would cost the verifier their product.
#[inline(always)]
fn copy_client_id(frame: &[u8; FRAME_MAX], from: u32, record: &mut Record) {
    let len = record.client_id_len as usize;
    let mut i = 0;
    while i < CLIENT_ID_MAX {
        if i >= len {
            break;
        }
        record.client_id[i] = byte(frame, from + i as u32);
        i += 1;
    }
}

#[inline(always)]
fn is_tag(ethertype: u16) -> bool {
    ethertype == VLAN || ethertype == VLAN_SERVICE || ethertype == VLAN_OLD_QINQ
}

#[inline(always)]
fn byte(frame: &[u8; FRAME_MAX], at: u32) -> u8 {
    frame[at as usize & MASK]
}

#[inline(always)]
fn half(frame: &[u8; FRAME_MAX], at: u32) -> u16 {
    u16::from_be_bytes([byte(frame, at), byte(frame, at + 1)])
}

#[inline(always)]
fn word(frame: &[u8; FRAME_MAX], at: u32) -> [u8; 4] {
    [
        byte(frame, at),
        byte(frame, at + 1),
        byte(frame, at + 2),
        byte(frame, at + 3),
    ]
}

#[inline(always)]
fn mac(frame: &[u8; FRAME_MAX], at: u32) -> [u8; 6] {
    let [a, b, c, d] = word(frame, at);
    [a, b, c, d, byte(frame, at + 4), byte(frame, at + 5)]
}

/// [`classify`] with buffers of its own, for whoever is not the kernel half. A frame that
/// [`candidate`] turns down is not looked at further, as there.
#[cfg(any(test, feature = "vectors"))]
pub fn classify_frame(bytes: &[u8], tag: Tag) -> (Outcome, Record) {
    classify_over(bytes, tag, &mut [0; FRAME_MAX])
}

#[cfg(any(test, feature = "vectors"))]
fn classify_over(bytes: &[u8], tag: Tag, frame: &mut [u8; FRAME_MAX]) -> (Outcome, Record) {
    let mut record = Record::new_zeroed();
    let Some(head) = bytes.first_chunk::<HEAD>() else {
        return (Outcome::Other, record);
    };
    if !candidate(head) {
        return (Outcome::Other, record);
    }
    let kept = bytes.len().min(FRAME_MAX);
    frame[..kept].copy_from_slice(&bytes[..kept]);
    let outcome = classify(
        frame,
        bytes.len() as u32,
        tag,
        &mut Walk::default(),
        &mut record,
    );
    (outcome, record)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::{
        vectors::{Builder, CLIENT_IP, CLIENT_MAC, SERVER_IP, SERVER_MAC, XID, arp},
        *,
    };
    use crate::abi::{DIRECTION_TO_PORT, ROLE_NONE};

    #[test]
    fn every_vector_is_what_it_says() {
        for vector in vectors::all() {
            let (outcome, record) = classify_frame(&vector.frame, vector.tag);
            assert_eq!(outcome, vector.outcome, "{}", vector.name);
            if outcome == Outcome::Message {
                assert_eq!(record.anomalies, vector.anomalies, "{}", vector.name);
                assert_eq!(
                    (record.xid, record.chaddr),
                    (XID, CLIENT_MAC),
                    "{}",
                    vector.name
                );
            }
        }
    }

    #[test]
    fn an_ack_is_read_to_the_last_field() {
        let (_, record) = classify_frame(&Builder::server(ACK).build(), Tag::NONE);
        let expected = Record {
            present: PRESENT_MESSAGE_TYPE
                | PRESENT_SERVER_ID
                | PRESENT_LEASE_TIME
                | PRESENT_RENEWAL_TIME
                | PRESENT_REBINDING_TIME,
            source_mac: SERVER_MAC,
            destination_mac: CLIENT_MAC,
            source_ip: SERVER_IP,
            destination_ip: CLIENT_IP,
            op: 2,
            message_type: ACK,
            flags: [0x80, 0],
            xid: XID,
            yiaddr: CLIENT_IP,
            chaddr: CLIENT_MAC,
            source_port: [0, 67],
            destination_port: [0, 68],
            server_id: SERVER_IP,
            lease_time: 3600_u32.to_be_bytes(),
            renewal_time: 1800_u32.to_be_bytes(),
            rebinding_time: 3150_u32.to_be_bytes(),
            ..Record::new_zeroed()
        };
        assert_eq!(record, expected);
    }

    #[test]
    fn a_client_id_is_kept_verbatim() {
        let long: Vec<u8> = (1..=255).collect();
        let (_, record) = classify_frame(
            &Builder::client(REQUEST).option(61, &long).build(),
            Tag::NONE,
        );
        assert_eq!(
            (record.client_id_len, &record.client_id[..]),
            (255, &long[..])
        );

        let (_, record) = classify_frame(&named("overload of both, full to the brim"), Tag::NONE);
        assert_eq!(
            (record.client_id_len, &record.client_id[..126]),
            (125, &[[7; 125].as_slice(), &[0]].concat()[..])
        );
        assert_eq!(
            (record.requested_ip, record.server_id),
            (CLIENT_IP, SERVER_IP)
        );
    }

    #[test]
    fn of_two_the_first_is_kept() {
        let frame = Builder::selecting().option(50, &[10, 0, 0, 1]).build();
        let (_, record) = classify_frame(&frame, Tag::NONE);
        assert_eq!(record.requested_ip, CLIENT_IP);
    }

    #[test]
    fn the_vlan_is_the_outer_one() {
        let vlan = |name: &str| {
            let vector = vectors::all()
                .into_iter()
                .find(|vector| vector.name == name)
                .unwrap();
            u16::from_be_bytes(classify_frame(&vector.frame, vector.tag).1.vlan)
        };
        assert_eq!(vlan("one tag"), 100);
        assert_eq!(vlan("priority tag"), 0);
        assert_eq!(vlan("tag in metadata"), 100);
        assert_eq!(vlan("priority tag in metadata"), 0);
        assert_eq!(vlan("QinQ"), 5);
        assert_eq!(vlan("tags in metadata and frame"), 5);
    }

    #[test]
    fn what_only_the_next_switch_says_is_known() {
        let group = |last| [0x01, 0x80, 0xc2, 0x00, 0x00, last];
        let cisco = |last| [0x01, 0x00, 0x0c, 0xcc, 0xcc, last];
        for destination in [
            group(0),
            group(2),
            group(0xe),
            group(0xf),
            cisco(0xcc),
            cisco(0xcd),
        ] {
            assert!(is_link_local(&destination), "{destination:x?}");
        }
        let routed = [0x01, 0x00, 0x5e, 0, 0, 1];
        for destination in [
            group(0x10),
            group(0x21),
            cisco(0xce),
            [0xff; 6],
            SERVER_MAC,
            routed,
        ] {
            assert!(!is_link_local(&destination), "{destination:x?}");
        }
    }

    #[test]
    fn sources_are_found_behind_tags() {
        let look = |frame: &[u8], tag| sources(frame.first_chunk().unwrap(), tag);
        let ip = [192, 0, 2, 9];
        let builder = || Builder::selecting().with(|b| b.source_ip = ip);
        let plain = Sources {
            vlan: [0; 2],
            mac: CLIENT_MAC,
            ip,
        };
        assert_eq!(look(&builder().build(), Tag::NONE), plain);
        assert_eq!(look(&arp(CLIENT_MAC, ip), Tag::NONE), plain);
        let tag = Tag {
            protocol: 0x8100,
            tci: 0xe064,
        };
        assert_eq!(
            look(&builder().build(), tag),
            Sources {
                vlan: [0, 100],
                ..plain
            }
        );
        let tagged = builder().with(|b| b.tags.push((0x8100, 0xe064))).build();
        assert_eq!(
            look(&tagged, Tag::NONE),
            Sources {
                vlan: [0, 100],
                ..plain
            }
        );
        let v6 = builder().with(|b| b.ethertype = 0x86dd).build();
        assert_eq!(
            look(&v6, Tag::NONE),
            Sources {
                ip: [0; 4],
                ..plain
            }
        );
    }

    #[test]
    fn who_wants_what() {
        let (from, to) = (DIRECTION_FROM_PORT, DIRECTION_TO_PORT);
        let look = |role, direction, builder: Builder| {
            interest(
                role,
                direction,
                &classify_frame(&builder.build(), Tag::NONE).1,
            )
        };
        let bent = |builder: Builder| builder.with(|b| b.end = false);
        for (role, direction, builder, expected) in [
            (
                ROLE_VM,
                from,
                Builder::selecting(),
                Interest::PushAndRemember,
            ),
            (ROLE_VM, from, Builder::client(DISCOVER), Interest::Nobody),
            (
                ROLE_VM,
                from,
                Builder::client(DISCOVER).option(80, &[]),
                Interest::PushAndRemember,
            ),
            (
                ROLE_VM,
                from,
                bent(Builder::client(DISCOVER)),
                Interest::PushAndRemember,
            ),
            (ROLE_VM, from, Builder::client(DECLINE), Interest::Push),
            (ROLE_VM, from, Builder::client(RELEASE), Interest::Push),
            (ROLE_VM, from, Builder::client(8), Interest::Nobody),
            (ROLE_VM, from, Builder::server(ACK), Interest::Rogue),
            (
                ROLE_VM,
                from,
                Builder::client(REQUEST).with(|b| b.source_port = 67),
                Interest::Rogue,
            ),
            (ROLE_VM, to, Builder::server(ACK), Interest::PushIfAsked),
            (ROLE_VM, to, Builder::server(NAK), Interest::PushIfAsked),
            (ROLE_VM, to, Builder::server(2), Interest::Nobody),
            (ROLE_VM, to, bent(Builder::server(2)), Interest::PushIfAsked),
            (ROLE_VM, to, Builder::selecting(), Interest::Nobody),
            (ROLE_UPLINK, from, Builder::selecting(), Interest::Push),
            (ROLE_UPLINK, from, Builder::server(ACK), Interest::Push),
            (ROLE_UPLINK, from, Builder::server(2), Interest::Nobody),
            (ROLE_UPLINK, to, Builder::server(ACK), Interest::Nobody),
            (ROLE_ASIDE, from, Builder::selecting(), Interest::Nobody),
            (
                ROLE_ASIDE,
                from,
                bent(Builder::selecting()),
                Interest::Nobody,
            ),
            (ROLE_ASIDE, from, Builder::server(ACK), Interest::Rogue),
            (ROLE_ASIDE, to, Builder::server(ACK), Interest::Nobody),
            (ROLE_NONE, from, Builder::selecting(), Interest::Nobody),
        ] {
            assert_eq!(
                look(role, direction, builder.clone()),
                expected,
                "{role} {direction} {builder:?}"
            );
        }
    }

    /// Mutants of all vectors: no panic, nothing read behind the frame's end, and the cheap test
    /// never turns down what the thorough one takes.
    #[test]
    fn mutants_do_no_harm() {
        let vectors = vectors::all();
        let mut random = XorShift(0x9e37_79b9_7f4a_7c15);
        let (mut clean, mut soiled) = ([0; FRAME_MAX], [0; FRAME_MAX]);
        let mut messages = 0;
        for round in 0..100_000 {
            let vector = &vectors[round % vectors.len()];
            let mut frame = vector.frame.clone();
            for _ in 0..=random.below(8) {
                match random.below(4) {
                    0 if !frame.is_empty() => frame.truncate(random.below(frame.len())),
                    1 => frame.extend((0..random.below(300)).map(|n| n as u8)),
                    _ if !frame.is_empty() => {
                        let at = random.below(frame.len());
                        frame[at] = random.next() as u8;
                    }
                    _ => {}
                }
            }
            clean.fill(0);
            soiled.fill(random.next() as u8);
            let first = classify_over(&frame, vector.tag, &mut clean);
            let second = classify_over(&frame, vector.tag, &mut soiled);
            assert_eq!(
                first, second,
                "{} in round {round}: {frame:02x?}",
                vector.name
            );
            if frame.len() >= HEAD {
                let mut record = Record::new_zeroed();
                let thorough = classify(
                    &clean_of(&frame),
                    frame.len() as u32,
                    vector.tag,
                    &mut Walk::default(),
                    &mut record,
                );
                assert_eq!(
                    thorough, first.0,
                    "{} in round {round}: {frame:02x?}",
                    vector.name
                );
            }
            messages += usize::from(first.0 == Outcome::Message);
        }
        assert!(
            messages > 10_000,
            "the mutants are too wild: {messages} messages"
        );
    }

    fn clean_of(bytes: &[u8]) -> [u8; FRAME_MAX] {
        let mut frame = [0; FRAME_MAX];
        let kept = bytes.len().min(FRAME_MAX);
        frame[..kept].copy_from_slice(&bytes[..kept]);
        frame
    }

    fn named(name: &str) -> Vec<u8> {
        vectors::all()
            .into_iter()
            .find(|vector| vector.name == name)
            .unwrap()
            .frame
    }

    struct XorShift(u64);

    impl XorShift {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn below(&mut self, bound: usize) -> usize {
            (self.next() % bound as u64) as usize
        }
    }
}
