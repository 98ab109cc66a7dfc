//! ARP requests that ask whether somebody is there, and that no cache remembers.

use std::net::Ipv4Addr;

use etherparse::{
    ArpEthIpv4Packet, ArpOperation, EtherType, Ethernet2Header, SingleVlanHeader, VlanId,
};

use super::FRAME_MIN;
use crate::core::{MacAddr, Probe, Vlan};

/// A unicast ARP request to the VM itself. The sender's address is 0.0.0.0 (RFC 5227 section 2.1):
/// the answer comes, and nobody's cache changes.
pub fn probe(source_mac: MacAddr, probe: &Probe) -> Vec<u8> {
    request(source_mac, probe.mac, probe.vlan, probe.ip)
}

/// The same, asked of everybody: finds the MAC of a server.
pub fn who_has(source_mac: MacAddr, vlan: Vlan, ip: Ipv4Addr) -> Vec<u8> {
    request(source_mac, MacAddr::BROADCAST, vlan, ip)
}

fn request(source: MacAddr, destination: MacAddr, vlan: Vlan, ip: Ipv4Addr) -> Vec<u8> {
    let arp = ArpEthIpv4Packet {
        operation: ArpOperation::REQUEST,
        sender_mac: source.0,
        sender_ipv4: Ipv4Addr::UNSPECIFIED.octets(),
        target_mac: [0; 6],
        target_ipv4: ip.octets(),
    };
    // Out of range is masked to 12 bits, as the kernel half reads it.
    let vlan_id = VlanId::try_new(vlan & 0x0fff).unwrap_or(VlanId::ZERO);
    let ethernet = Ethernet2Header {
        source: source.0,
        destination: destination.0,
        ether_type: if vlan == 0 {
            EtherType::ARP
        } else {
            EtherType::VLAN_TAGGED_FRAME
        },
    };

    let mut frame = Vec::with_capacity(FRAME_MIN);
    frame.extend(ethernet.to_bytes());
    if vlan != 0 {
        let tag = SingleVlanHeader {
            vlan_id,
            ether_type: EtherType::ARP,
            ..Default::default()
        };
        frame.extend(tag.to_bytes());
    }
    frame.extend(arp.to_bytes());
    frame.resize(FRAME_MIN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket};

    use super::*;
    use crate::core::ProbeVia;

    const AGENT: MacAddr = MacAddr([0x02, 0, 0, 0, 0, 0xfe]);
    const VM: MacAddr = MacAddr([0x02, 0, 0, 0, 0, 0x01]);
    const IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);

    fn to_vm(vlan: Vlan) -> Probe {
        Probe {
            via: ProbeVia::Port(3),
            vlan,
            ip: IP,
            mac: VM,
        }
    }

    #[test]
    fn untagged_probe_byte_by_byte() {
        let mut expected = vec![
            0x02, 0, 0, 0, 0, 0x01, 0x02, 0, 0, 0, 0, 0xfe, 0x08, 0x06, // Ethernet
            0, 1, 0x08, 0x00, 6, 4, 0, 1, // Ethernet, IPv4, request
            0x02, 0, 0, 0, 0, 0xfe, 0, 0, 0, 0, // sender
            0, 0, 0, 0, 0, 0, 10, 0, 0, 7, // target
        ];
        expected.resize(60, 0);
        assert_eq!(probe(AGENT, &to_vm(0)), expected);
    }

    #[test]
    fn tagged_probe_carries_its_vlan() {
        let frame = probe(AGENT, &to_vm(0x0abc));
        assert_eq!(frame[12..18], [0x81, 0x00, 0x0a, 0xbc, 0x08, 0x06]);
        assert_eq!(frame.len(), 60);

        let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(NetSlice::Arp(arp)) = sliced.net else {
            panic!("no ARP in {sliced:?}")
        };
        assert_eq!(arp.operation(), ArpOperation::REQUEST);
        assert_eq!(arp.target_protocol_addr(), IP.octets());
        assert_eq!(arp.sender_protocol_addr(), [0; 4]);
    }

    #[test]
    fn who_has_is_broadcast() {
        let frame = who_has(AGENT, 0, IP);
        assert_eq!(frame[..6], [0xff; 6]);
        // All but the destination is as in a probe.
        assert_eq!(frame[6..], probe(AGENT, &to_vm(0))[6..]);
    }
}
