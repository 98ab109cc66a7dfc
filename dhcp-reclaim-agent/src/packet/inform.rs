//! DHCPINFORM frames (RFC 2131 section 4.4.3): any server answers them, and keeps nothing of them.

use std::net::Ipv4Addr;

use dhcproto::{
    Encodable, Encoder,
    v4::{DhcpOption, Message, MessageType},
};

use super::release::{BOOTP_MIN, ReleaseError, datagram};
use crate::core::MacAddr;

/// One from a host with this MAC and address to a server, without a VLAN tag. The answer goes to
/// port 68 of the address.
pub fn inform_frame(
    (mac, from): (MacAddr, Ipv4Addr),
    (server_mac, server): (MacAddr, Ipv4Addr),
    xid: u32,
) -> Result<Vec<u8>, ReleaseError> {
    let unset = Ipv4Addr::UNSPECIFIED;
    let mut dhcp = Message::new_with_id(xid, from, unset, unset, unset, &mac.0);
    dhcp.opts_mut()
        .insert(DhcpOption::MessageType(MessageType::Inform));
    let mut bootp = Vec::with_capacity(BOOTP_MIN);
    dhcp.encode(&mut Encoder::new(&mut bootp))?;
    bootp.resize(bootp.len().max(BOOTP_MIN), 0);
    datagram((mac, server_mac), (from, server), &bootp)
}

#[cfg(test)]
mod tests {
    use dhcproto::{Decodable, Decoder};
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    #[test]
    fn an_inform_names_only_who_asks() {
        let (mac, from) = (MacAddr([2, 0, 0, 0, 0, 1]), Ipv4Addr::new(192, 0, 2, 9));
        let (server_mac, server) = (MacAddr([2, 0, 0, 0, 0, 2]), Ipv4Addr::new(192, 0, 2, 1));
        let frame = inform_frame((mac, from), (server_mac, server), 7).unwrap();
        let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Udp(udp))) =
            (sliced.net, sliced.transport)
        else {
            panic!("not UDP over IPv4");
        };
        let header = ip.header();
        assert_eq!(
            (header.source_addr(), header.destination_addr()),
            (from, server)
        );
        assert_eq!((udp.source_port(), udp.destination_port()), (68, 67));
        let dhcp = Message::decode(&mut Decoder::new(udp.payload())).unwrap();
        assert_eq!((dhcp.xid(), dhcp.ciaddr()), (7, from));
        // No lease is touched by one that names none: no options 50, 54, 61 (RFC 2131 table 5).
        assert_eq!(dhcp.opts().msg_type(), Some(MessageType::Inform));
        assert_eq!(dhcp.opts().iter().count(), 1);
    }
}
