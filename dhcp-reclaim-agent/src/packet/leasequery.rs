//! DHCPLEASEQUERY by address, and the answers to it (RFC 4388).

use std::net::Ipv4Addr;

use dhcproto::{
    Decodable, Decoder, Encodable, Encoder,
    v4::{DhcpOption, HType, Message, MessageType, Opcode},
};

use crate::core::{MacAddr, QueryAnswer};

/// BOOTP's fixed part, then the magic cookie.
const HEADER: usize = 240;
const BOOTP_MIN: usize = 300;

/// Why a datagram is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    #[error("{0} bytes are no DHCP message")]
    Short(usize),
    #[error("hardware type {htype} with addresses of {hlen} bytes is not Ethernet's")]
    Hardware { htype: u8, hlen: u8 },
    #[error("its options cannot be read")]
    Malformed,
    #[error("not the answer to a lease query")]
    NotAnAnswer,
}

/// The payload of a query about `ip`; the answer goes to port 67 of `from` (RFC 4388 section 6.1).
pub fn query(ip: Ipv4Addr, from: Ipv4Addr, xid: u32) -> Option<Vec<u8>> {
    let unset = Ipv4Addr::UNSPECIFIED;
    let mut dhcp = Message::new_with_id(xid, ip, unset, unset, from, &[]);
    dhcp.opts_mut()
        .insert(DhcpOption::MessageType(MessageType::LeaseQuery));
    let mut bytes = Vec::with_capacity(BOOTP_MIN);
    dhcp.encode(&mut Encoder::new(&mut bytes)).ok()?;
    // Not asked by hardware address: type and length are zero.
    bytes.get_mut(1..3)?.fill(0);
    bytes.resize(bytes.len().max(BOOTP_MIN), 0);
    Some(bytes)
}

/// What a datagram from port 67 answers: the xid, the address, and who has it.
pub fn answer(bytes: &[u8]) -> Result<(u32, Ipv4Addr, QueryAnswer), AnswerError> {
    // Checked before dhcproto sees it: its `chaddr` panics on a length above 16.
    let &[_, htype, hlen, ..] = bytes else {
        return Err(AnswerError::Short(bytes.len()));
    };
    if bytes.len() < HEADER {
        return Err(AnswerError::Short(bytes.len()));
    }
    if !matches!((htype, hlen), (1, 6) | (0 | 1, 0)) {
        return Err(AnswerError::Hardware { htype, hlen });
    }
    // Nor is it given options that we do not need: it panics on some of a wrong length.
    let kind = message_type(&bytes[HEADER..]).ok_or(AnswerError::Malformed)?;
    let whole = [&bytes[..HEADER], &[53, 1, kind, 255]].concat();
    let message = Message::decode(&mut Decoder::new(&whole)).map_err(|_| AnswerError::Malformed)?;
    if message.opcode() != Opcode::BootReply {
        return Err(AnswerError::NotAnAnswer);
    }
    let mac = match message.chaddr() {
        &[a, b, c, d, e, f] if message.htype() == HType::Eth => Some(MacAddr([a, b, c, d, e, f])),
        _ => None,
    };
    let answer = match message.opts().msg_type() {
        Some(MessageType::LeaseUnassigned) => QueryAnswer::Unassigned,
        Some(MessageType::LeaseUnknown) => QueryAnswer::Unknown,
        Some(MessageType::LeaseActive) => QueryAnswer::Active(mac.filter(|mac| mac.is_unicast())),
        _ => return Err(AnswerError::NotAnAnswer),
    };
    Ok((message.xid(), message.ciaddr(), answer))
}

/// Option 53, if all options up to it are whole.
fn message_type(mut options: &[u8]) -> Option<u8> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [53, 1, kind, ..] => return Some(*kind),
            [] | [_] | [53 | 255, ..] => return None,
            [_, length, rest @ ..] => options = rest.get(usize::from(*length)..)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);
    const US: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    fn reply(kind: u8, htype: u8, hlen: u8) -> Vec<u8> {
        let mut bytes = query(IP, US, 0x1122_3344).unwrap();
        bytes[..3].copy_from_slice(&[2, htype, hlen]);
        bytes[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        bytes[240..243].copy_from_slice(&[53, 1, kind]);
        bytes
    }

    #[test]
    fn asks_by_address_alone() {
        let bytes = query(IP, US, 0x1122_3344).unwrap();
        let head = [1, 0, 0, 0, 0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0, 10, 0, 0, 7];
        assert_eq!(bytes[..16], head);
        assert_eq!(bytes[16..24], [0; 8], "yiaddr, siaddr");
        assert_eq!(bytes[24..28], [10, 0, 0, 2], "giaddr");
        assert_eq!(bytes[28..236], [0; 208]);
        assert_eq!(bytes[236..244], [99, 130, 83, 99, 53, 1, 10, 255]);
        assert_eq!(bytes.len(), 300);
    }

    #[test]
    fn reads_each_answer() {
        let mac = MacAddr([2, 0, 0, 0, 0, 9]);
        for (kind, hlen, expected) in [
            (11, 0, QueryAnswer::Unassigned),
            (12, 0, QueryAnswer::Unknown),
            (13, 6, QueryAnswer::Active(Some(mac))),
            (13, 0, QueryAnswer::Active(None)),
        ] {
            let read = answer(&reply(kind, 1, hlen));
            assert_eq!(read, Ok((0x1122_3344, IP, expected)));
        }
    }

    #[test]
    fn refuses_what_is_none() {
        assert_eq!(answer(&[]), Err(AnswerError::Short(0)));
        assert_eq!(answer(&[2; 239]), Err(AnswerError::Short(239)));
        for (htype, hlen) in [(1, 17), (1, 255), (6, 6), (1, 16)] {
            let read = answer(&reply(13, htype, hlen));
            assert_eq!(read, Err(AnswerError::Hardware { htype, hlen }));
        }
        assert_eq!(answer(&reply(5, 1, 6)), Err(AnswerError::NotAnAnswer));
        let mut ours = reply(13, 1, 6);
        ours[0] = 1;
        assert_eq!(answer(&ours), Err(AnswerError::NotAnAnswer));
    }

    proptest! {
        #[test]
        fn survives_anything(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _refused = answer(&bytes);
        }

        #[test]
        fn survives_any_options(options in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = reply(13, 1, 6);
            bytes.truncate(240);
            bytes.extend(options);
            let _refused = answer(&bytes);
        }
    }
}
