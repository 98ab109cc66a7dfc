//! rtnetlink link messages, as far as they matter here.

// netlink-packet-route decodes every attribute and drops the whole message if it knows one of them
// badly. A port that is missed so is a VM that is not watched; hence only what is needed is read,
// on top of the attribute walk of netlink-packet-core.

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
};
use rtnetlink::packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NlasIterator,
};

use super::links::{Link, LinkChange, VlanFiltering};
use crate::core::{MacAddr, Vlan, Vlans};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
/// `struct ifinfomsg`.
const HEADER: usize = 16;
const AF_UNSPEC: u8 = 0;
const AF_BRIDGE: u8 = 7;
const IFF_UP: u32 = 1;
const IFF_LOWER_UP: u32 = 1 << 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_WIRELESS: u16 = 11;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFLA_BR_VLAN_PROTOCOL: u16 = 8;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
const IFLA_BRIDGE_VLAN_TUNNEL_INFO: u16 = 3;
const BRIDGE_VLAN_INFO_PVID: u16 = 1 << 1;
const BRIDGE_VLAN_INFO_UNTAGGED: u16 = 1 << 2;
const BRIDGE_VLAN_INFO_RANGE_BEGIN: u16 = 1 << 3;
const BRIDGE_VLAN_INFO_RANGE_END: u16 = 1 << 4;
const ETH_P_8021Q: u16 = 0x8100;
const IFLA_CARRIER: u16 = 33;
const IFLA_PARENT_DEV_NAME: u16 = 56;

/// A message that contradicts itself.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed link message: {0}")]
pub struct Malformed(&'static str);

/// Asks for every link, without its counters.
pub fn dump_request(sequence: u32) -> Vec<u8> {
    request(sequence, AddressFamily::Unspec, LinkExtentMask::SkipStats)
}

/// Asks for the VLANs of every bridge and of its ports.
pub fn vlan_dump_request(sequence: u32) -> Vec<u8> {
    let ranges = LinkExtentMask::BrvlanCompressed;
    request(sequence, AddressFamily::Bridge, ranges)
}

fn request(sequence: u32, family: AddressFamily, mask: LinkExtentMask) -> Vec<u8> {
    let mut links = LinkMessage::default();
    links.header.interface_family = family;
    links.attributes.push(LinkAttribute::ExtMask(vec![mask]));
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
    if header[0] == AF_BRIDGE && !removed {
        let ifindex = u32_at(header, 4)?;
        let vlans = find(attributes, IFLA_AF_SPEC, vlans)?.flatten();
        return Ok(vlans.map(|vlans| LinkChange::Vlans { ifindex, vlans }));
    }
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
        vlan_filtering: VlanFiltering::Off,
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
            IFLA_LINKINFO => (link.kind, link.vlan_filtering) = info(value)?,
            // Wireless extensions send link messages with nothing but this in them.
            IFLA_WIRELESS => return Ok(None),
            _ => {}
        }
    }
    Ok((!link.name.is_empty()).then_some(LinkChange::Set(link)))
}

/// `None`: not a bridge's word, but that of a network card about its own switch.
fn vlans(spec: &[u8]) -> Result<Option<Vlans>, Malformed> {
    let mut vlans = Vlans::default();
    let mut first: Option<Vlan> = None;
    for attribute in NlasIterator::new(spec) {
        let attribute = attribute.map_err(|_| Malformed("a VLAN runs past the end"))?;
        match attribute.kind() {
            IFLA_BRIDGE_VLAN_INFO => {}
            IFLA_BRIDGE_VLAN_TUNNEL_INFO => {
                vlans.tunnel = true;
                continue;
            }
            // Its flags and its mode.
            0 | 1 => return Ok(None),
            _ => continue,
        }
        // struct bridge_vlan_info
        let value = u32_at(attribute.value(), 0)?.to_ne_bytes();
        let flags = u16::from_ne_bytes([value[0], value[1]]);
        let vlan = u16::from_ne_bytes([value[2], value[3]]);
        if flags & BRIDGE_VLAN_INFO_RANGE_BEGIN != 0 {
            first = Some(vlan);
            continue;
        }
        let begin = match first.take() {
            Some(begin) if flags & BRIDGE_VLAN_INFO_RANGE_END != 0 => begin,
            Some(_) => return Err(Malformed("a range of VLANs without its end")),
            None => vlan,
        };
        if flags & BRIDGE_VLAN_INFO_PVID != 0 {
            vlans.pvid = vlan;
        }
        let untagged = flags & BRIDGE_VLAN_INFO_UNTAGGED != 0;
        vlans.members.push((begin, vlan, untagged));
    }
    Ok(Some(vlans))
}

/// The link's kind, and whether it is a bridge that filters VLANs.
fn info(info: &[u8]) -> Result<(Option<String>, VlanFiltering), Malformed> {
    let kind = find(info, IFLA_INFO_KIND, |value| Ok(text(value)))?;
    // What the data mean is for the kind to say.
    if kind.as_deref() != Some("bridge") {
        return Ok((kind, VlanFiltering::Off));
    }
    let on = |value: &[u8]| Ok(value.first().is_some_and(|on| *on != 0));
    let customer = |value: &[u8]| Ok(value == ETH_P_8021Q.to_be_bytes());
    let filtering = find(info, IFLA_INFO_DATA, |data| {
        let on = find(data, IFLA_BR_VLAN_FILTERING, on)?.unwrap_or_default();
        let customer = find(data, IFLA_BR_VLAN_PROTOCOL, customer)?.unwrap_or(true);
        Ok(match (on, customer) {
            (false, _) => VlanFiltering::Off,
            (true, true) => VlanFiltering::Customer,
            (true, false) => VlanFiltering::Service,
        })
    })?;
    Ok((kind, filtering.unwrap_or_default()))
}

fn find<T>(
    attributes: &[u8],
    kind: u16,
    read: impl Fn(&[u8]) -> Result<T, Malformed>,
) -> Result<Option<T>, Malformed> {
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute.map_err(|_| Malformed("the link's kind runs past its end"))?;
        if attribute.kind() == kind {
            return read(attribute.value()).map(Some);
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
            vlan_filtering: VlanFiltering::Off,
        };
        assert_eq!(read(&bytes), Ok(Some(LinkChange::Set(expected))));
    }

    #[test]
    fn a_bridge_says_whether_it_filters_vlans() {
        let bridge = |kind: &[u8], data: &[Vec<u8>]| {
            let info = [
                attribute(IFLA_INFO_KIND, kind),
                attribute(IFLA_INFO_DATA | 0x8000, &data.concat()),
            ];
            let bytes = message(
                RTM_NEWLINK,
                0,
                IFF_UP,
                &[
                    attribute(IFLA_IFNAME, b"br0\0"),
                    attribute(IFLA_LINKINFO, &info.concat()),
                ],
            );
            match read(&bytes) {
                Ok(Some(LinkChange::Set(link))) => link.vlan_filtering,
                other => panic!("{other:?}"),
            }
        };
        let before = attribute(1, &1500_u32.to_ne_bytes());
        let on = attribute(IFLA_BR_VLAN_FILTERING, &[1]);
        let off = attribute(IFLA_BR_VLAN_FILTERING, &[0]);
        let customer = attribute(IFLA_BR_VLAN_PROTOCOL, &[0x81, 0]);
        let service = attribute(IFLA_BR_VLAN_PROTOCOL, &[0x88, 0xa8]);
        let off_service = [off.clone(), service.clone()];
        assert_eq!(
            [
                bridge(b"bridge\0", &[before.clone(), on.clone(), customer]),
                bridge(b"bridge\0", &[on.clone(), service]),
                bridge(b"bridge\0", &[before, off]),
                bridge(b"bridge\0", &off_service),
                bridge(b"bridge\0", &[]),
                // The number means something else to every other kind.
                bridge(b"vxlan\0", &[on]),
            ],
            [
                VlanFiltering::Customer,
                VlanFiltering::Service,
                VlanFiltering::Off,
                VlanFiltering::Off,
                VlanFiltering::Off,
                VlanFiltering::Off,
            ]
        );
    }

    /// As br_fill_ifvlaninfo_compressed writes them.
    #[test]
    fn a_ports_vlans_are_read_by_ranges() {
        let vlan = |vid: u16, flags: u16| {
            let info = [flags.to_ne_bytes(), vid.to_ne_bytes()].concat();
            attribute(IFLA_BRIDGE_VLAN_INFO, &info)
        };
        let port = |spec: &[Vec<u8>]| {
            let name = attribute(IFLA_IFNAME, b"tap0\0");
            let spec = attribute(IFLA_AF_SPEC, &spec.concat());
            read(&message(RTM_NEWLINK, AF_BRIDGE, IFF_UP, &[name, spec]))
        };
        let access = BRIDGE_VLAN_INFO_PVID | BRIDGE_VLAN_INFO_UNTAGGED;
        let expected = Vlans {
            pvid: 10,
            members: vec![(10, 10, true), (20, 29, false), (40, 40, false)],
            tunnel: false,
        };
        assert_eq!(
            [0, 10, 19, 20, 29, 40].map(|vlan| expected.tag(vlan)),
            [None, Some(0), None, Some(20), Some(29), Some(40)]
        );
        let read = port(&[
            vlan(10, access),
            vlan(20, BRIDGE_VLAN_INFO_RANGE_BEGIN),
            vlan(29, BRIDGE_VLAN_INFO_RANGE_END),
            vlan(40, 0),
        ]);
        let vlans = |vlans| Ok(Some(LinkChange::Vlans { ifindex: 7, vlans }));
        assert_eq!(read, vlans(expected));
        assert_eq!(port(&[]), vlans(Vlans::default()));
        let tunnel = Vlans {
            tunnel: true,
            ..Vlans::default()
        };
        let mapping = attribute(IFLA_BRIDGE_VLAN_TUNNEL_INFO, &[0; 8]);
        assert_eq!(port(&[mapping]), vlans(tunnel));
        // IFLA_BRIDGE_MODE of a network card with a switch of its own.
        assert_eq!(port(&[attribute(1, &[0; 2])]), Ok(None));
        let open = vlan(20, BRIDGE_VLAN_INFO_RANGE_BEGIN);
        assert!(port(&[open, vlan(40, 0)]).is_err());
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
