//! Bytes on the wire, made from the core's types: ARP probes and DHCP messages. Only here dhcproto is
//! touched.

#![forbid(unsafe_code)]

pub mod arp;
pub mod inform;
pub mod leasequery;
pub mod release;

/// Shortest Ethernet frame without its checksum (IEEE 802.3): shorter ones are padded by the
/// device or, on a software path, by nobody.
const FRAME_MIN: usize = 60;
