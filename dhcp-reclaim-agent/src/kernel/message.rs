//! From the kernel half's record to a message of the core's: meaning is checked here.

use std::net::Ipv4Addr;

use dhcp_reclaim_ebpf::abi::{
    DIRECTION_FROM_PORT, DIRECTION_TO_PORT, PRESENT_CLIENT_ID, PRESENT_LEASE_TIME,
    PRESENT_RAPID_COMMIT, PRESENT_REBINDING_TIME, PRESENT_RENEWAL_TIME, PRESENT_REQUESTED_IP,
    PRESENT_SERVER_ID, ROLE_ASIDE, ROLE_UPLINK, ROLE_VM, Record, WATCH_IP, WATCH_MAC, WatchKey,
};

use crate::core::{Direction, IfIndex, MacAddr, Message, MessageType, Role, Time, Vlan};

/// Why a record is no message that the core could act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("no message type (option 53)")]
    NoType,
    #[error("message type {0} is unknown")]
    Type(u8),
    #[error("op {op} does not go with message type {kind}")]
    Op { op: u8, kind: u8 },
    #[error("direction {0} is unknown: the kernel half is another version's")]
    Direction(u8),
    #[error("role {0} is unknown: the kernel half is another version's")]
    Role(u8),
}

/// A port's role, as records and slots say it.
pub fn role_of(role: u8) -> Option<Role> {
    match role {
        ROLE_VM => Some(Role::Vm),
        ROLE_UPLINK => Some(Role::Uplink),
        ROLE_ASIDE => Some(Role::Aside),
        _ => None,
    }
}

/// The record's message.
pub fn message(record: &Record) -> Result<Message, Malformed> {
    let direction = match record.direction {
        DIRECTION_FROM_PORT => Direction::FromPort,
        DIRECTION_TO_PORT => Direction::ToPort,
        other => return Err(Malformed::Direction(other)),
    };
    let role = role_of(record.role).ok_or(Malformed::Role(record.role))?;
    let kind = match record.message_type {
        0 => return Err(Malformed::NoType),
        1 => MessageType::Discover,
        2 => MessageType::Offer,
        3 => MessageType::Request,
        4 => MessageType::Decline,
        5 => MessageType::Ack,
        6 => MessageType::Nak,
        7 => MessageType::Release,
        8 => MessageType::Inform,
        other => return Err(Malformed::Type(other)),
    };
    let from_server = matches!(
        kind,
        MessageType::Offer | MessageType::Ack | MessageType::Nak
    );
    if (record.op == 2) != from_server {
        return Err(Malformed::Op {
            op: record.op,
            kind: record.message_type,
        });
    }
    let has = |bit: u16| record.present & bit != 0;
    let seconds = |bit, bytes| has(bit).then_some(u32::from_be_bytes(bytes));
    let client_id = record.client_id.get(..usize::from(record.client_id_len));
    Ok(Message {
        seen_at: Time::from_nanos(record.seen_ns),
        port: record.ifindex,
        role,
        direction,
        vlan: Vlan::from_be_bytes(record.vlan),
        kind,
        ambiguous: record.anomalies != 0,
        source_mac: MacAddr(record.source_mac),
        destination_mac: MacAddr(record.destination_mac),
        source_ip: record.source_ip.into(),
        destination_ip: record.destination_ip.into(),
        xid: u32::from_be_bytes(record.xid),
        chaddr: MacAddr(record.chaddr),
        ciaddr: address(record.ciaddr),
        yiaddr: address(record.yiaddr),
        giaddr: address(record.giaddr),
        requested_ip: address(record.requested_ip).filter(|_| has(PRESENT_REQUESTED_IP)),
        server_id: address(record.server_id).filter(|_| has(PRESENT_SERVER_ID)),
        lease_secs: seconds(PRESENT_LEASE_TIME, record.lease_time),
        renewal_secs: seconds(PRESENT_RENEWAL_TIME, record.renewal_time),
        rebinding_secs: seconds(PRESENT_REBINDING_TIME, record.rebinding_time),
        client_id: client_id
            .filter(|_| has(PRESENT_CLIENT_ID))
            .map(<[u8]>::to_vec),
        rapid_commit: has(PRESENT_RAPID_COMMIT),
    })
}

/// WATCH's key of an address.
pub fn watch_ip(segment: IfIndex, vlan: Vlan, ip: Ipv4Addr) -> WatchKey {
    watch_key(segment, vlan, WATCH_IP, &ip.octets())
}

/// WATCH's key of a MAC.
pub fn watch_mac(segment: IfIndex, vlan: Vlan, mac: MacAddr) -> WatchKey {
    watch_key(segment, vlan, WATCH_MAC, &mac.0)
}

fn watch_key(segment: IfIndex, vlan: Vlan, kind: u8, bytes: &[u8]) -> WatchKey {
    let mut address = [0; 8];
    address[..bytes.len()].copy_from_slice(bytes);
    WatchKey {
        segment,
        vlan: vlan.to_be_bytes(),
        kind,
        reserved: 0,
        address,
    }
}

fn address(bytes: [u8; 4]) -> Option<Ipv4Addr> {
    (bytes != [0; 4]).then(|| bytes.into())
}

#[cfg(test)]
mod tests {
    use dhcp_reclaim_ebpf::abi::{ANOMALY_DUPLICATE, PRESENT_MESSAGE_TYPE};
    use zerocopy::FromZeros as _;

    use super::*;

    fn request() -> Record {
        Record {
            direction: DIRECTION_FROM_PORT,
            role: ROLE_VM,
            vlan: [0, 100],
            present: PRESENT_MESSAGE_TYPE | PRESENT_CLIENT_ID | PRESENT_LEASE_TIME,
            op: 1,
            message_type: 3,
            xid: [0, 0, 1, 0],
            ciaddr: [192, 0, 2, 50],
            requested_ip: [192, 0, 2, 51],
            lease_time: [0xff; 4],
            client_id_len: 3,
            client_id: [7; 255],
            ..Record::new_zeroed()
        }
    }

    #[test]
    fn what_is_absent_or_zero_is_none() {
        let message = message(&request()).unwrap();
        assert_eq!((message.vlan, message.xid), (100, 256));
        assert_eq!(message.ciaddr, Some(Ipv4Addr::new(192, 0, 2, 50)));
        assert_eq!(
            (message.yiaddr, message.giaddr, message.server_id),
            (None, None, None)
        );
        assert_eq!(message.requested_ip, None, "option 50 was not well formed");
        assert_eq!(
            (message.lease_secs, message.renewal_secs),
            (Some(u32::MAX), None)
        );
        assert_eq!(message.client_id.as_deref(), Some(&[7; 3][..]));
        assert!(!message.ambiguous && !message.rapid_commit);
    }

    #[test]
    fn any_anomaly_makes_it_ambiguous() {
        let record = Record {
            anomalies: ANOMALY_DUPLICATE,
            ..request()
        };
        assert!(message(&record).unwrap().ambiguous);
    }

    #[test]
    fn what_has_no_meaning_says_why() {
        let why = |record: Record| message(&record).unwrap_err();
        assert_eq!(
            why(Record {
                message_type: 0,
                ..request()
            }),
            Malformed::NoType
        );
        assert_eq!(
            why(Record {
                message_type: 13,
                ..request()
            }),
            Malformed::Type(13)
        );
        assert_eq!(
            why(Record { op: 2, ..request() }),
            Malformed::Op { op: 2, kind: 3 }
        );
        assert_eq!(
            why(Record {
                message_type: 5,
                ..request()
            }),
            Malformed::Op { op: 1, kind: 5 }
        );
        assert_eq!(
            why(Record {
                direction: 9,
                ..request()
            }),
            Malformed::Direction(9)
        );
        assert_eq!(
            why(Record {
                role: 0,
                ..request()
            }),
            Malformed::Role(0)
        );
    }
}
