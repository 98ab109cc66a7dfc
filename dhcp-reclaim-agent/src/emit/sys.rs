//! Packet sockets, and the one netlink message that `Drop` can send.

use std::{io, mem::MaybeUninit};

use nix::net::if_::if_indextoname;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use super::EmitError;
use crate::core::IfIndex;

/// Sends whole Ethernet frames out of any interface; receives nothing, never blocks.
#[derive(Debug)]
pub struct PacketSocket {
    socket: Socket,
}

impl PacketSocket {
    pub fn open() -> Result<Self, EmitError> {
        // Protocol 0: nothing is ever queued for it. PACKET_QDISC_BYPASS stays off, since it would
        // bypass `emit` too.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None).map_err(EmitError::Socket)?;
        socket.set_nonblocking(true).map_err(EmitError::Socket)?;
        Ok(Self { socket })
    }

    /// Sends a frame out of an interface.
    pub fn send_on(&self, ifindex: IfIndex, frame: &[u8]) -> Result<(), EmitError> {
        self.send(ifindex, frame).map_err(|source| {
            let name = if_indextoname(ifindex)
                .ok()
                .and_then(|name| name.into_string().ok());
            let name = name.filter(|name| !name.is_empty());
            let interface = name.unwrap_or_else(|| format!("interface {ifindex}"));
            EmitError::Send { interface, source }
        })
    }

    pub(super) fn send(&self, ifindex: IfIndex, frame: &[u8]) -> io::Result<()> {
        let sent = self.socket.send_to(frame, &link_address(ifindex)?)?;
        if sent != frame.len() {
            return Err(io::Error::new(
                io::ErrorKind::WriteZero,
                "the frame was cut",
            ));
        }
        Ok(())
    }
}

/// RTM_DELLINK, without waiting for more than the kernel's answer.
pub(super) fn delete_link(ifindex: IfIndex) -> io::Result<()> {
    const LEN: u8 = 32;

    let socket = Socket::new(
        Domain::from(libc::AF_NETLINK),
        Type::RAW,
        Some(Protocol::from(libc::NETLINK_ROUTE)),
    )?;
    // struct nlmsghdr, then struct ifinfomsg, whose third word is the index.
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    let mut message = [0_u8; LEN as usize];
    message[..4].copy_from_slice(&u32::from(LEN).to_ne_bytes());
    message[4..6].copy_from_slice(&libc::RTM_DELLINK.to_ne_bytes());
    message[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
    message[20..24].copy_from_slice(&ifindex.to_ne_bytes());
    socket.send(&message)?;

    // struct nlmsghdr, then the error as a negative number.
    let mut answer = [MaybeUninit::new(0_u8); 512];
    let len = socket.recv(&mut answer)?;
    let mut error = [0; 4];
    for (at, byte) in error.iter_mut().enumerate() {
        // SAFETY: initialised above.
        *byte = unsafe { answer[16 + at].assume_init() };
    }
    match i32::from_ne_bytes(error) {
        0 if len >= 20 => Ok(()),
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

fn link_address(ifindex: IfIndex) -> io::Result<SockAddr> {
    let ifindex = i32::try_from(ifindex).map_err(io::Error::other)?;
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: `sockaddr_ll` is a socket address, and so fits the storage, which is aligned for any
    // of them; all of its bit patterns are valid.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as libc::sa_family_t;
    address.sll_ifindex = ifindex;
    // IPv4 RELEASEs and ARP alike go by the Ethernet header in the frame; this is for taps on the
    // way only.
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: initialised above, with the family and the length that belong together.
    Ok(unsafe { SockAddr::new(storage, len) })
}
