//! rtnetlink link messages, as far as they matter here.

// netlink-packet-route decodes every attribute and drops the whole message if it knows one of them
// badly. A port that is missed so is a VM that is not watched; hence only what is needed is read,
// on top of the attribute walk of netlink-packet-core.

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
};
use rtnetlink::packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NlasIterator,
};

use super::links::{Link, LinkChange};
use crate::core::MacAddr;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
/// `struct ifinfomsg`.
const HEADER: usize = 16;
const AF_UNSPEC: u8 = 0;
const IFF_UP: u32 = 1;
const IFF_LOWER_UP: u32 = 1 << 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_WIRELESS: u16 = 11;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_CARRIER: u16 = 33;
const IFLA_PARENT_DEV_NAME: u16 = 56;

/// A message that contradicts itself.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed link message: {0}")]
pub struct Malformed(&'static str);

/// Asks for every link, without its counters.
pub fn dump_request(sequence: u32) -> Vec<u8> {
    let mut links = LinkMessage::default();
    links
        .attributes
        .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetLink(links));
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.header.sequence_number = sequence;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// What a message says about a link; `None` if it says nothing that matters.
pub fn link_change(message: &NetlinkBuffer<&[u8]>) -> Result<Option<LinkChange>, Malformed> {
    let removed = match message.message_type() {
        RTM_NEWLINK => false,
        RTM_DELLINK => true,
        _ => return Ok(None),
    };
    let payload = message.payload();
    let Some((header, attributes)) = payload.split_at_checked(HEADER) else {
        return Err(Malformed("shorter than its header"));
    };
    // AF_BRIDGE messages speak of a bridge's view of its port: a "deleted" one still exists.
    if header[0] != AF_UNSPEC {
        return Ok(None);
    }
    let ifindex = u32_at(header, 4)?;
    if removed {
        return Ok(Some(LinkChange::Removed(ifindex)));
    }
    let flags = u32_at(header, 8)?;

    let mut link = Link {
        ifindex,
        name: String::new(),
        master: None,
        kind: None,
        on_bus: false,
        admin_up: flags & IFF_UP != 0,
        carrier: flags & IFF_LOWER_UP != 0,
        mac: MacAddr::default(),
    };
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute.map_err(|_| Malformed("an attribute runs past the end"))?;
        let value = attribute.value();
        match attribute.kind() {
            IFLA_IFNAME => link.name = text(value),
            IFLA_MASTER => link.master = Some(u32_at(value, 0)?).filter(|master| *master != 0),
            IFLA_CARRIER => link.carrier = value.first().is_some_and(|carrier| *carrier != 0),
            IFLA_PARENT_DEV_NAME => link.on_bus = true,
            IFLA_ADDRESS => {
                if let Ok(mac) = value.try_into() {
                    link.mac = MacAddr(mac);
                }
            }
            IFLA_LINKINFO => link.kind = kind(value)?,
            // Wireless extensions send link messages with nothing but this in them.
            IFLA_WIRELESS => return Ok(None),
            _ => {}
        }
    }
    Ok((!link.name.is_empty()).then_some(LinkChange::Set(link)))
}

fn kind(info: &[u8]) -> Result<Option<String>, Malformed> {
    for attribute in NlasIterator::new(info) {
        let attribute = attribute.map_err(|_| Malformed("the link's kind runs past its end"))?;
        if attribute.kind() == IFLA_INFO_KIND {
            return Ok(Some(text(attribute.value())));
        }
    }
    Ok(None)
}

/// Up to the closing zero. Names are whatever root wrote, UTF-8 or not.
fn text(value: &[u8]) -> String {
    let end = value
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Malformed> {
    bytes
        .get(at..at + 4)
        .and_then(|four| four.try_into().ok())
        .map(u32::from_ne_bytes)
        .ok_or(Malformed("a number is cut short"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, family: u8, flags: u32, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut payload = vec![family, 0, 1, 0];
        payload.extend(7_u32.to_ne_bytes());
        payload.extend(flags.to_ne_bytes());
        payload.extend([0; 4]);
        payload.extend(attributes.concat());
        let mut bytes = u32::try_from(16 + payload.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(payload);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Option<LinkChange>, Malformed> {
        link_change(&NetlinkBuffer::new_checked(bytes).unwrap())
    }

    #[test]
    fn reads_a_tap() {
        let bytes = message(
            RTM_NEWLINK,
            0,
            IFF_UP | IFF_LOWER_UP,
            &[
                attribute(IFLA_IFNAME, b"tap0\0"),
                attribute(IFLA_MASTER, &4_u32.to_ne_bytes()),
                attribute(IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]),
                attribute(IFLA_CARRIER, &[0]),
                // NLA_F_NESTED is set on nested attributes by some kernels.
                attribute(IFLA_LINKINFO | 0x8000, &attribute(IFLA_INFO_KIND, b"tun\0")),
                attribute(999, b"something of the future"),
            ],
        );
        let expected = Link {
            ifindex: 7,
            name: "tap0".to_owned(),
            master: Some(4),
            kind: Some("tun".to_owned()),
            on_bus: false,
            admin_up: true,
            carrier: false,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
        };
        assert_eq!(read(&bytes), Ok(Some(LinkChange::Set(expected))));
    }

    #[test]
    fn a_bridges_view_of_its_port_is_no_deletion() {
        let name = attribute(IFLA_IFNAME, b"tap0\0");
        assert_eq!(
            read(&message(RTM_DELLINK, 7, 0, std::slice::from_ref(&name))),
            Ok(None)
        );
        assert_eq!(
            read(&message(RTM_DELLINK, 0, 0, &[name])),
            Ok(Some(LinkChange::Removed(7)))
        );
    }

    #[test]
    fn wireless_news_are_not_a_detached_port() {
        let bytes = message(RTM_NEWLINK, 0, IFF_UP, &[attribute(IFLA_WIRELESS, &[0; 8])]);
        assert_eq!(read(&bytes), Ok(None));
    }

    proptest! {
        #[test]
        fn any_payload_is_read_or_refused(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = u32::try_from(16 + payload.len()).unwrap().to_ne_bytes().to_vec();
            bytes.extend(RTM_NEWLINK.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(payload);
            // Returns, whatever it says.
            drop(read(&bytes));
        }
    }
}
