//! DHCPRELEASE frames (RFC 2131 section 4.4.6 and table 5).

use std::net::Ipv4Addr;

use dhcproto::{
    Encodable, Encoder,
    v4::{DhcpOption, Message, MessageType, OptionCode},
};
use etherparse::{EtherType, Ethernet2Header, IpNumber, Ipv4Header, UdpHeader};

use crate::core::{MacAddr, Release};

/// BOOTP messages are at least this long (RFC 1542 section 2.1); relays and old servers drop
/// shorter ones.
pub(super) const BOOTP_MIN: usize = 300;
const OPTION_MAX: usize = 255;
const CLIENT_PORT: u16 = 68;
const SERVER_PORT: u16 = 67;

/// Why no RELEASE can be made. Each names a field of [`Release`] that a binding must not have.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    #[error("the client identifier has {0} bytes; one option holds 255")]
    ClientIdTooLong(usize),
    #[error("the message (option 56) has {0} bytes; one option holds 255")]
    MessageTooLong(usize),
    #[error("{field} {address} is not a unicast address")]
    NotUnicastIp {
        field: &'static str,
        address: Ipv4Addr,
    },
    #[error("{field} {address} is not a unicast address")]
    NotUnicastMac {
        field: &'static str,
        address: MacAddr,
    },
    #[error("the DHCP message cannot be encoded")]
    Encode(#[from] dhcproto::error::EncodeError),
}

/// The frame that gives a lease back, without a VLAN tag: `emit` pushes the one of its order,
/// because a tag in skb metadata is what the bridge and the devices below it expect. `message` is
/// option 56 (left out when empty).
///
/// The xid is at [`XID_OFFSET`], where `emit` looks for it.
pub fn release_frame(
    release: &Release,
    server_mac: MacAddr,
    xid: u32,
    message: &str,
) -> Result<Vec<u8>, ReleaseError> {
    unicast_ip("lease", release.ip)?;
    unicast_ip("server identifier", release.server)?;
    unicast_mac("chaddr", release.chaddr)?;
    // All zero is this host's own, while its bridge has no port: no frame has such a source.
    if server_mac != MacAddr([0; 6]) {
        unicast_mac("server MAC", server_mac)?;
    }
    let bootp = bootp(release, xid, message)?;
    datagram(
        (release.chaddr, server_mac),
        (release.ip, release.server),
        &bootp,
    )
}

/// A client's message: MACs and addresses of who sends it and of the server.
pub(super) fn datagram(
    macs: (MacAddr, MacAddr),
    ips: (Ipv4Addr, Ipv4Addr),
    bootp: &[u8],
) -> Result<Vec<u8>, ReleaseError> {
    // Options are bounded above, so these lengths fit by far.
    let udp_len = UdpHeader::LEN + bootp.len();
    let udp_len = u16::try_from(udp_len).map_err(|_| ReleaseError::MessageTooLong(udp_len))?;
    let mut ip = Ipv4Header {
        total_len: Ipv4Header::MIN_LEN_U16 + udp_len,
        time_to_live: 64,
        protocol: IpNumber::UDP,
        source: ips.0.octets(),
        destination: ips.1.octets(),
        // Below 1,500 bytes always; and an atomic datagram needs no identification (RFC 6864).
        dont_fragment: true,
        ..Ipv4Header::default()
    };
    ip.header_checksum = ip.calc_header_checksum();
    let mut udp = UdpHeader {
        source_port: CLIENT_PORT,
        destination_port: SERVER_PORT,
        length: udp_len,
        checksum: 0,
    };
    udp.checksum = udp
        .calc_checksum_ipv4(&ip, bootp)
        .map_err(|_| ReleaseError::MessageTooLong(bootp.len()))?;
    let ethernet = Ethernet2Header {
        source: macs.0.0,
        destination: macs.1.0,
        ether_type: EtherType::IPV4,
    };

    let mut frame = Vec::with_capacity(Ethernet2Header::LEN + usize::from(ip.total_len));
    frame.extend(ethernet.to_bytes());
    frame.extend(ip.to_bytes());
    frame.extend(udp.to_bytes());
    frame.extend(bootp);
    Ok(frame)
}

/// Where the xid of [`release_frame`] is: Ethernet, IPv4 without options, UDP, then op, htype, hlen
/// and hops.
pub const XID_OFFSET: usize = Ethernet2Header::LEN + Ipv4Header::MIN_LEN + UdpHeader::LEN + 4;

fn bootp(release: &Release, xid: u32, message: &str) -> Result<Vec<u8>, ReleaseError> {
    if message.len() > OPTION_MAX {
        return Err(ReleaseError::MessageTooLong(message.len()));
    }
    let unset = Ipv4Addr::UNSPECIFIED;
    let chaddr = release.chaddr.0;
    let mut dhcp = Message::new_with_id(xid, release.ip, unset, unset, unset, &chaddr);
    let options = dhcp.opts_mut();
    options.insert(DhcpOption::MessageType(MessageType::Release));
    options.insert(DhcpOption::ServerIdentifier(release.server));
    if !message.is_empty() {
        options.insert(DhcpOption::Message(message.to_owned()));
    }
    match &release.client_id {
        // dhcproto would split it in two options (RFC 3396), which no client identifier can be.
        Some(id) if id.len() > OPTION_MAX => return Err(ReleaseError::ClientIdTooLong(id.len())),
        Some(id) => {
            options.insert(DhcpOption::ClientIdentifier(id.clone()));
        }
        None => {}
    }

    let mut bytes = Vec::with_capacity(BOOTP_MIN);
    dhcp.encode(&mut Encoder::new(&mut bytes))?;
    if release.client_id.as_ref().is_some_and(Vec::is_empty) {
        // Not a valid identifier (RFC 2132 section 9.14), but what the client sent; dhcproto leaves
        // options without data out. It goes before the end option, which comes last.
        let end = bytes.len() - 1;
        bytes.splice(end..end, [u8::from(OptionCode::ClientIdentifier), 0]);
    }
    bytes.resize(bytes.len().max(BOOTP_MIN), 0);
    Ok(bytes)
}

fn unicast_ip(field: &'static str, address: Ipv4Addr) -> Result<(), ReleaseError> {
    let bad = address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address.is_broadcast();
    if bad {
        Err(ReleaseError::NotUnicastIp { field, address })
    } else {
        Ok(())
    }
}

fn unicast_mac(field: &'static str, address: MacAddr) -> Result<(), ReleaseError> {
    if address.is_unicast() {
        Ok(())
    } else {
        Err(ReleaseError::NotUnicastMac { field, address })
    }
}

#[cfg(test)]
mod tests {
    use dhcproto::{
        Decodable, Decoder,
        v4::{HType, Opcode},
    };
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;
    use crate::core::Time;

    const SERVER_MAC: MacAddr = MacAddr([0x02, 0, 0, 0, 0, 0x53]);
    const XID: u32 = 0x1122_3344;

    fn release(client_id: Option<Vec<u8>>) -> Release {
        Release {
            segment: 4,
            vlan: 0,
            ip: Ipv4Addr::new(10, 0, 0, 7),
            chaddr: MacAddr([0x02, 0, 0, 0, 0, 0x01]),
            client_id,
            server: Ipv4Addr::new(10, 0, 0, 1),
            server_mac: Some(SERVER_MAC),
            silent_since: Time::ZERO,
        }
    }

    /// Code and data of every option up to the end, read without dhcproto.
    fn options(bootp: &[u8]) -> Vec<(u8, Vec<u8>)> {
        assert_eq!(bootp[236..240], [0x63, 0x82, 0x53, 0x63]);
        let mut rest = &bootp[240..];
        let mut found = Vec::new();
        loop {
            match rest {
                [255, padding @ ..] => {
                    assert!(padding.iter().all(|byte| *byte == 0));
                    return found;
                }
                [code, length, data @ ..] => {
                    let (data, after) = data.split_at(usize::from(*length));
                    found.push((*code, data.to_vec()));
                    rest = after;
                }
                _ => panic!("options without end"),
            }
        }
    }

    fn checked(frame: &[u8]) -> Vec<u8> {
        let sliced = SlicedPacket::from_ethernet(frame).unwrap();
        assert!(sliced.link_exts.is_empty(), "no tag in the frame");
        let Some(NetSlice::Ipv4(ip)) = sliced.net else {
            panic!("no IPv4")
        };
        let header = ip.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(header.time_to_live, 64);
        assert_eq!(usize::from(header.total_len), frame.len() - 14);
        let Some(TransportSlice::Udp(udp)) = sliced.transport else {
            panic!("no UDP")
        };
        assert_eq!((udp.source_port(), udp.destination_port()), (68, 67));
        let payload = udp.payload();
        assert_eq!(
            udp.checksum(),
            udp.to_header()
                .calc_checksum_ipv4(&header, payload)
                .unwrap(),
            "UDP checksum"
        );
        assert!(payload.len() >= 300);
        assert_eq!(frame[XID_OFFSET..XID_OFFSET + 4], XID.to_be_bytes());
        payload.to_vec()
    }

    #[test]
    fn one_frame_byte_by_byte() {
        let frame = release_frame(
            &release(Some(vec![1, 2, 0, 0, 0, 0, 1])),
            SERVER_MAC,
            XID,
            "hi",
        )
        .unwrap();

        let mut expected = vec![
            // Ethernet
            0x02, 0, 0, 0, 0, 0x53, 0x02, 0, 0, 0, 0, 0x01, 0x08, 0x00, //
            // IPv4: 20 + 8 + 300 bytes, DF, ttl 64, UDP
            0x45, 0, 0x01, 0x48, 0, 0, 0x40, 0, 64, 17, 0x25, 0x9e, 10, 0, 0, 7, 10, 0, 0, 1,
            // UDP; the checksum is worked out below
            0, 68, 0, 67, 0x01, 0x34, 0, 0, //
            // op, htype, hlen, hops; xid; secs, flags; ciaddr
            1, 1, 6, 0, 0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0, 10, 0, 0, 7,
        ];
        expected.extend([0; 12]); // yiaddr, siaddr, giaddr
        expected.extend([0x02, 0, 0, 0, 0, 0x01]);
        expected.extend([0; 10 + 64 + 128]); // rest of chaddr, sname, file
        expected.extend([0x63, 0x82, 0x53, 0x63]);
        expected.extend([53, 1, 7]);
        expected.extend([54, 4, 10, 0, 0, 1]);
        expected.extend([56, 2, b'h', b'i']);
        expected.extend([61, 7, 1, 2, 0, 0, 0, 0, 1]);
        expected.push(255);
        expected.resize(14 + 20 + 8 + 300, 0);

        // RFC 768 by hand: pseudo header, then the datagram with a zero checksum.
        let sum = |bytes: &[u8]| -> u32 {
            bytes
                .chunks(2)
                .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
                .sum()
        };
        let mut total = sum(&expected[26..34]) + 17 + 308 + sum(&expected[34..]);
        while total > 0xffff {
            total = (total & 0xffff) + (total >> 16);
        }
        let checksum = !u16::try_from(total).unwrap();
        expected[40..42].copy_from_slice(&checksum.to_be_bytes());

        assert_eq!(frame, expected);
        assert_eq!(XID_OFFSET, 14 + 20 + 8 + 4);
    }

    #[test]
    fn is_table_5_for_dhcproto_too() {
        let frame = release_frame(&release(None), SERVER_MAC, XID, "dhcp-reclaim").unwrap();
        let message = Message::decode(&mut Decoder::new(&checked(&frame))).unwrap();
        assert_eq!(message.opcode(), Opcode::BootRequest);
        assert_eq!(message.htype(), HType::Eth);
        assert_eq!(message.hlen(), 6);
        assert_eq!(message.hops(), 0);
        assert_eq!(message.secs(), 0);
        assert_eq!(u16::from(message.flags()), 0);
        assert_eq!(message.xid(), XID);
        assert_eq!(message.ciaddr(), Ipv4Addr::new(10, 0, 0, 7));
        assert_eq!(message.yiaddr(), Ipv4Addr::UNSPECIFIED);
        assert_eq!(message.siaddr(), Ipv4Addr::UNSPECIFIED);
        assert_eq!(message.giaddr(), Ipv4Addr::UNSPECIFIED);
        assert_eq!(message.chaddr(), [2, 0, 0, 0, 0, 1]);
        assert_eq!(message.opts().msg_type(), Some(MessageType::Release));
        assert_eq!(message.opts().len(), 3, "53, 54, 56");
    }

    #[test]
    fn client_ids_of_every_length_are_verbatim_and_whole() {
        for length in [0, 1, 2, 7, 40, 41, 42, 43, 200, 254, 255] {
            let id: Vec<u8> = (0..=255_u8).cycle().take(length).collect();
            let frame = release_frame(&release(Some(id.clone())), SERVER_MAC, XID, "x").unwrap();
            let payload = checked(&frame);
            let ids: Vec<_> = options(&payload)
                .into_iter()
                .filter(|(code, _)| *code == 61)
                .collect();
            assert_eq!(ids, [(61, id)], "{length} bytes");
        }
    }

    #[test]
    fn refuses_what_no_option_holds() {
        let long = release(Some(vec![0; 256]));
        let made = release_frame(&long, SERVER_MAC, XID, "");
        assert!(
            matches!(made, Err(ReleaseError::ClientIdTooLong(256))),
            "{made:?}"
        );
        let made = release_frame(&release(None), SERVER_MAC, XID, &"x".repeat(256));
        assert!(
            matches!(made, Err(ReleaseError::MessageTooLong(256))),
            "{made:?}"
        );
    }

    #[test]
    fn refuses_addresses_that_are_nobodys() {
        let zero = Release {
            ip: Ipv4Addr::UNSPECIFIED,
            ..release(None)
        };
        let broadcast = Release {
            server: Ipv4Addr::BROADCAST,
            ..release(None)
        };
        let group = Release {
            chaddr: MacAddr([1, 0, 0, 0, 0, 0]),
            ..release(None)
        };
        for (wrong, mac) in [
            (zero, SERVER_MAC),
            (broadcast, SERVER_MAC),
            (group, SERVER_MAC),
            (release(None), MacAddr::BROADCAST),
        ] {
            assert!(
                release_frame(&wrong, mac, XID, "").is_err(),
                "{wrong:?} to {mac}"
            );
        }
    }

    proptest! {
        #[test]
        fn holds_exactly_its_options(
            id in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..=255)),
            message in "[ -~]{0,255}",
        ) {
            let frame = release_frame(&release(id.clone()), SERVER_MAC, XID, &message).unwrap();
            let payload = checked(&frame);
            let mut expected = vec![(53, vec![7]), (54, vec![10, 0, 0, 1])];
            if !message.is_empty() {
                expected.push((56, message.into_bytes()));
            }
            if let Some(id) = id {
                expected.push((61, id));
            }
            prop_assert_eq!(options(&payload), expected);
            prop_assert!(frame.len() <= 1500);
        }
    }
}
