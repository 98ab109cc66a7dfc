//! Frames by hand: what no honest client or server would send, and guests that are no kernel.
use std::{
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    libc,
    net::if_::if_nametoindex,
    sys::socket::{MsgFlags, setsockopt, sockopt},
};

use crate::{fixture::Mac, netns::NetNs, wire::packet_socket};

pub const BROADCAST_MAC: Mac = Mac([0xff; 6]);
const UDP: u8 = 17;

/// A link of some namespace, written to as its owner's kernel would.
#[derive(Debug)]
pub struct Nic {
    socket: OwnedFd,
    address: libc::sockaddr_ll,
}

impl Nic {
    pub fn open(netns: &NetNs, link: &str) -> Result<Self> {
        let (socket, index) = netns.enter(|| {
            let index = if_nametoindex(link).with_context(|| link.to_owned())?;
            Ok((packet_socket()?, index))
        })?;
        // It only sends: what it would receive is thrown away early.
        let _best_effort = setsockopt(&socket, sockopt::RcvBuf, &0);
        // SAFETY: plain old data, for which all zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index.cast_signed();
        Ok(Self { socket, address })
    }

    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the buffer and the address live for the call, with their own lengths.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                MsgFlags::empty().bits(),
                (&raw const self.address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        Errno::result(sent).context("cannot send a frame")?;
        Ok(())
    }
}

/// A DHCP message and all that is around it; every field may lie.
#[derive(Clone, Debug)]
pub struct Forged {
    pub from_mac: Mac,
    pub to_mac: Mac,
    /// TPID and TCI, outermost first.
    pub tags: Vec<(u16, u16)>,
    pub from_ip: Ipv4Addr,
    pub to_ip: Ipv4Addr,
    pub ip_options: Vec<u8>,
    /// Flags and offset of the IPv4 header.
    pub fragment: u16,
    pub from_port: u16,
    pub to_port: u16,
    /// Added to the UDP length.
    pub udp_lie: i16,
    pub op: u8,
    pub htype: u8,
    pub hlen: u8,
    pub xid: u32,
    pub flags: u16,
    pub ciaddr: Ipv4Addr,
    pub yiaddr: Ipv4Addr,
    pub giaddr: Ipv4Addr,
    pub chaddr: Mac,
    pub sname: Vec<u8>,
    pub file: Vec<u8>,
    pub options: Vec<u8>,
    pub end: bool,
}

impl Forged {
    /// A client's broadcast of this type.
    pub fn client(kind: u8, mac: Mac, xid: u32) -> Self {
        Self {
            from_mac: mac,
            to_mac: BROADCAST_MAC,
            tags: Vec::new(),
            from_ip: Ipv4Addr::UNSPECIFIED,
            to_ip: Ipv4Addr::BROADCAST,
            ip_options: Vec::new(),
            fragment: 0,
            from_port: 68,
            to_port: 67,
            udp_lie: 0,
            op: 1,
            htype: 1,
            hlen: 6,
            xid,
            flags: 0,
            ciaddr: Ipv4Addr::UNSPECIFIED,
            yiaddr: Ipv4Addr::UNSPECIFIED,
            giaddr: Ipv4Addr::UNSPECIFIED,
            chaddr: mac,
            sname: Vec::new(),
            file: Vec::new(),
            options: vec![53, 1, kind],
            end: true,
        }
    }

    /// A server's broadcast of this type to `chaddr`, with a lease time of an hour.
    pub fn server(
        kind: u8,
        from: (Mac, Ipv4Addr),
        chaddr: Mac,
        xid: u32,
        yiaddr: Ipv4Addr,
    ) -> Self {
        Self {
            from_ip: from.1,
            from_port: 67,
            to_port: 68,
            op: 2,
            flags: 0x8000,
            yiaddr,
            chaddr,
            ..Self::client(kind, from.0, xid)
        }
        .option(54, &from.1.octets())
        .option(51, &3600_u32.to_be_bytes())
    }

    pub fn option(mut self, code: u8, value: &[u8]) -> Self {
        self.options.push(code);
        self.options
            .push(u8::try_from(value.len()).unwrap_or(u8::MAX));
        self.options.extend(value);
        self
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The frame, with a valid IPv4 checksum and none for UDP.
    pub fn frame(&self) -> Vec<u8> {
        let mut bootp = vec![self.op, self.htype, self.hlen, 0];
        bootp.extend(self.xid.to_be_bytes());
        bootp.extend([0, 0]);
        bootp.extend(self.flags.to_be_bytes());
        for ip in [self.ciaddr, self.yiaddr, Ipv4Addr::UNSPECIFIED, self.giaddr] {
            bootp.extend(ip.octets());
        }
        bootp.extend(self.chaddr.0);
        bootp.extend([0; 10]);
        bootp.extend(filled(&self.sname, 64));
        bootp.extend(filled(&self.file, 128));
        bootp.extend([99, 130, 83, 99]);
        bootp.extend(&self.options);
        if self.end {
            bootp.push(255);
            // Some servers want the 300 bytes of BOOTP.
            bootp.resize(bootp.len().max(300), 0);
        }

        let udp = u16::try_from(bootp.len() + 8).unwrap_or(u16::MAX);
        let header = u16::try_from(20 + self.ip_options.len()).unwrap_or(20);
        let mut ip = vec![0x40 | u8::try_from(header / 4).unwrap_or(5), 0];
        ip.extend((header + udp).to_be_bytes());
        ip.extend([0x12, 0x34]);
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([64, UDP, 0, 0]);
        ip.extend(self.from_ip.octets());
        ip.extend(self.to_ip.octets());
        ip.extend(&self.ip_options);
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());

        let mut frame = ethernet(self.from_mac, self.to_mac, &self.tags, 0x0800);
        frame.extend(ip);
        frame.extend(self.from_port.to_be_bytes());
        frame.extend(self.to_port.to_be_bytes());
        frame.extend(udp.wrapping_add_signed(self.udp_lie).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(bootp);
        frame
    }
}

/// An ARP message; `op` 1 asks and 2 answers.
pub fn arp(op: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    tagged_arp(&[], op, sender, target)
}

pub fn tagged_arp(
    tags: &[(u16, u16)],
    op: u16,
    sender: (Mac, Ipv4Addr),
    target: (Mac, Ipv4Addr),
) -> Vec<u8> {
    let mut frame = ethernet(sender.0, target.0, tags, 0x0806);
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(op.to_be_bytes());
    for (mac, ip) in [sender, target] {
        frame.extend(mac.0);
        frame.extend(ip.octets());
    }
    frame.resize(60, 0);
    frame
}

/// What QEMU sends on a VM's behalf once it runs on the new node: a reverse ARP request.
pub fn rarp(mac: Mac) -> Vec<u8> {
    let mut frame = ethernet(mac, BROADCAST_MAC, &[], 0x8035);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in 0..2 {
        frame.extend(mac.0);
        frame.extend([0; 4]);
    }
    frame.resize(60, 0);
    frame
}

/// What a switch says by each of its ports, those that it blocks included: a configuration BPDU (IEEE
/// 802.1D section 9.3.1).
pub fn bpdu(from: Mac) -> Vec<u8> {
    const LENGTH: u16 = 3 + 35;
    let mut frame = ethernet(from, Mac([0x01, 0x80, 0xc2, 0, 0, 0]), &[], LENGTH);
    // The LLC's header; protocol, version, type and flags, all zero.
    frame.extend([0x42, 0x42, 0x03, 0, 0, 0, 0, 0]);
    let bridge = [&[0x80, 0][..], &from.0].concat();
    frame.extend(&bridge);
    // The root's distance: it is the root itself.
    frame.extend([0; 4]);
    frame.extend(&bridge);
    // Its port; then age, most age, hello and delay, in 256ths of a second.
    frame.extend([0x80, 1, 0, 0, 20, 0, 2, 0, 15, 0]);
    frame.resize(60, 0);
    frame
}

fn ethernet(from: Mac, to: Mac, tags: &[(u16, u16)], ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(600);
    frame.extend(to.0);
    frame.extend(from.0);
    for (protocol, tci) in tags {
        frame.extend(protocol.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame
}

fn filled(bytes: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(length, 0);
    bytes
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixture::{pool_ip, vm_mac},
        wire::{Frame, REQUEST},
    };

    #[test]
    fn what_is_written_can_be_read() {
        let bytes = Forged::client(REQUEST, vm_mac(1), 7)
            .option(50, &pool_ip(0).octets())
            .frame();
        assert_eq!(checksum(&bytes[14..34]), 0);
        let dhcp = Frame::of(bytes).dhcp().unwrap();
        assert_eq!((dhcp.kind(), dhcp.chaddr), (Some(REQUEST), vm_mac(1)));
        assert_eq!(dhcp.option(50), Some(&pool_ip(0).octets()[..]));
    }
}
