//! Netlink by hand, for what no library lists.

use std::io;

use rtnetlink::{
    packet_core::{NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator},
    sys::{Socket, SocketAddr},
};

/// Sends a request for a dump, and hands on the type and the payload of each message of it.
pub(crate) fn dump(
    protocol: isize,
    request: &[u8],
    mut each: impl FnMut(u16, &[u8]),
) -> io::Result<()> {
    let socket = Socket::new(protocol)?;
    socket.send_to(request, &SocketAddr::new(0, 0), 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            match message.message_type() {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let errno = u32_at(message.payload(), 0).unwrap_or_default();
                    return Err(io::Error::from_raw_os_error(-errno.cast_signed()));
                }
                kind => each(kind, message.payload()),
            }
            let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

pub(crate) fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    // Some are marked as nested by newer kernels.
    const KIND: u16 = 0x3fff;
    let mut all = NlasIterator::new(attributes).map_while(Result::ok);
    all.find(|attribute| attribute.kind() & KIND == kind)
        .map(|attribute| attribute.value().to_vec())
}

/// An attribute that is a name, without the byte that ends it.
pub(crate) fn text(attributes: &[u8], kind: u16) -> Option<String> {
    let bytes = attribute(attributes, kind)?;
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
    Some(String::from_utf8_lossy(bytes).into_owned())
}

/// In the host's byte order.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}
