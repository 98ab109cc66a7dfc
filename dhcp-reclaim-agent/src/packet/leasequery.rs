//! DHCPLEASEQUERY by address and by MAC, and the answers to it (RFC 4388).

use std::net::Ipv4Addr;

use dhcproto::{
    Decodable, Decoder, Encodable, Encoder,
    v4::{DhcpOption, HType, Message, MessageType, Opcode, OptionCode},
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

/// The same about whatever `mac` leases (RFC 4388 section 6.4.1).
pub fn query_mac(mac: MacAddr, from: Ipv4Addr, xid: u32) -> Option<Vec<u8>> {
    let unset = Ipv4Addr::UNSPECIFIED;
    let mut dhcp = Message::new_with_id(xid, unset, unset, unset, from, &mac.0);
    dhcp.opts_mut()
        .insert(DhcpOption::MessageType(MessageType::LeaseQuery));
    dhcp.opts_mut()
        .insert(DhcpOption::ParameterRequestList(vec![
            OptionCode::AddressLeaseTime,
            OptionCode::ServerIdentifier,
            OptionCode::ClientIdentifier,
        ]));
    let mut bytes = Vec::with_capacity(BOOTP_MIN);
    dhcp.encode(&mut Encoder::new(&mut bytes)).ok()?;
    bytes.resize(bytes.len().max(BOOTP_MIN), 0);
    Some(bytes)
}

/// What a datagram answers, and which question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    pub xid: u32,
    pub ip: Ipv4Addr,
    pub answer: QueryAnswer,
}

/// A lease that a server calls active (DHCPLEASEACTIVE).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub ip: Ipv4Addr,
    pub mac: MacAddr,
    /// Option 61, verbatim.
    pub client_id: Option<Vec<u8>>,
    /// Option 54.
    pub server: Option<Ipv4Addr>,
    /// What is left of it, in seconds (option 51); all ones is for ever.
    pub secs: u32,
}

/// The lease that an answer tells of; `None`: of none, of nobody's, of one without an end, or it cannot
/// be read whole. Nothing may be released of a lease that is over, nor with half a client-id.
pub fn lease(bytes: &[u8]) -> Option<Lease> {
    let Ok(Reply {
        ip,
        answer: QueryAnswer::Active(Some(mac)),
        ..
    }) = answer(bytes)
    else {
        return None;
    };
    let options = whole(bytes.get(HEADER..)?)?;
    let times = |code| options.iter().filter(|(is, _)| *is == code).count();
    // There is more of it in other fields (RFC 2132 section 9.3), or in another piece (RFC 3396).
    if times(52) > 0 || [51, 54, 61].into_iter().any(|code| times(code) > 1) {
        return None;
    }
    let value = |code| {
        let found = options.iter().find(|(is, _)| *is == code);
        found.map(|(_, value)| *value)
    };
    let four = |code| -> Option<[u8; 4]> { value(code)?.try_into().ok() };
    let nobodys = |ip: &Ipv4Addr| ip.is_unspecified() || ip.is_broadcast() || ip.is_multicast();
    let client_id = value(61).filter(|id| !id.is_empty());
    Some(Lease {
        ip,
        mac,
        client_id: client_id.map(<[u8]>::to_vec),
        server: four(54).map(Ipv4Addr::from).filter(|ip| !nobodys(ip)),
        secs: four(51).map(u32::from_be_bytes)?,
    })
}

/// The first option of this code, if all up to it are whole.
fn option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [] | [_] | [255, ..] => return None,
            [code, length, rest @ ..] => {
                let length = usize::from(*length);
                if *code == wanted {
                    return rest.get(..length);
                }
                options = rest.get(length..)?;
            }
        }
    }
}

/// All options up to the end; `None` if one is cut off.
fn whole(mut options: &[u8]) -> Option<Vec<(u8, &[u8])>> {
    let mut all = Vec::new();
    loop {
        match options {
            [] | [255, ..] => return Some(all),
            [0, rest @ ..] => options = rest,
            [_] => return None,
            [code, length, rest @ ..] => {
                let (value, rest) = rest.split_at_checked(usize::from(*length))?;
                all.push((*code, value));
                options = rest;
            }
        }
    }
}

/// What a datagram from port 67 answers.
pub fn answer(bytes: &[u8]) -> Result<Reply, AnswerError> {
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
    let Some(&[kind]) = option(&bytes[HEADER..], 53) else {
        return Err(AnswerError::Malformed);
    };
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
    Ok(Reply {
        xid: message.xid(),
        ip: message.ciaddr(),
        answer,
    })
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
            let (xid, ip) = (0x1122_3344, IP);
            let answer = expected;
            assert_eq!(read, Ok(Reply { xid, ip, answer }));
        }
    }

    #[test]
    fn asks_by_mac_alone() {
        let bytes = query_mac(MacAddr([2, 0, 0, 0, 0, 9]), US, 0x1122_3344).unwrap();
        assert_eq!(bytes[..8], [1, 1, 6, 0, 0x11, 0x22, 0x33, 0x44]);
        assert_eq!(bytes[12..24], [0; 12], "ciaddr, yiaddr, siaddr");
        assert_eq!(bytes[24..34], [10, 0, 0, 2, 2, 0, 0, 0, 0, 9]);
        assert_eq!(bytes[240..243], [53, 1, 10]);
        assert_eq!(option(&bytes[240..], 55), Some(&[51, 54, 61][..]));
        assert_eq!(option(&bytes[240..], 61), None, "not asked by it");
    }

    /// DHCPLEASEACTIVE for a minute, with these options.
    fn active(options: &[u8]) -> Vec<u8> {
        let mut bytes = reply(13, 1, 6);
        bytes.truncate(243);
        bytes.extend([51, 4, 0, 0, 0, 60]);
        bytes.extend(options);
        bytes
    }

    #[test]
    fn reads_a_lease() {
        let mac = MacAddr([2, 0, 0, 0, 0, 9]);
        let plain = lease(&active(&[])).unwrap();
        assert_eq!((plain.ip, plain.mac, plain.secs), (IP, mac, 60));
        assert_eq!((plain.server, plain.client_id), (None, None));
        let whole = [
            0, 54, 4, 10, 0, 0, 1, 91, 4, 0, 0, 0, 1, 61, 2, 0, 7, 255, 61, 9,
        ];
        let whole = lease(&active(&whole)).unwrap();
        assert_eq!(whole.server, Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(whole.client_id.as_deref(), Some(&[0, 7][..]));
        let long = [&[61, 255][..], &[7; 255]].concat();
        let long = lease(&active(&long)).unwrap();
        assert_eq!(long.client_id, Some(vec![7; 255]));
    }

    #[test]
    fn what_it_does_not_say_is_not_made_up() {
        // A server of its own name, and of none.
        for server in [[0; 4], [255; 4], [224, 0, 0, 1]] {
            let options = [&[54, 4][..], &server].concat();
            assert_eq!(lease(&active(&options)).unwrap().server, None);
        }
        assert_eq!(lease(&active(&[54, 3, 10, 0, 0])).unwrap().server, None);
        assert_eq!(lease(&active(&[61, 0])).unwrap().client_id, None);
        for (why, options) in [
            ("cut off", &[61, 3, 0, 7][..]),
            ("without a length", &[61]),
            ("in two pieces", &[61, 1, 0, 61, 1, 7]),
            ("two ends", &[51, 4, 0, 0, 0, 61]),
            ("elsewhere, too", &[52, 1, 1]),
        ] {
            assert_eq!(lease(&active(options)), None, "{why}");
        }
        let mut endless = active(&[]);
        endless.truncate(243);
        assert_eq!(lease(&endless), None, "no end is told");
        endless.extend([51, 3, 0, 0, 1]);
        assert_eq!(lease(&endless), None, "nor is this one");
        assert_eq!(lease(&reply(11, 1, 6)), None, "unassigned");
        assert_eq!(lease(&reply(12, 1, 6)), None, "unknown");
        assert_eq!(lease(&reply(13, 1, 0)), None, "whose?");
        let mut group = active(&[]);
        group[28] = 3;
        assert_eq!(lease(&group), None, "no station's");
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
            let read = answer(&bytes);
            if let Some(lease) = lease(&bytes) {
                prop_assert_eq!(read.map(|reply| reply.answer), Ok(QueryAnswer::Active(Some(lease.mac))));
            }
        }
    }
}
