//! What really passes on a wire: a packet socket in some namespace, and just enough parsing.
use std::{
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    libc,
    net::if_::if_nametoindex,
    sys::{
        socket::{setsockopt, sockopt},
        time::{TimeSpec, TimeVal},
    },
};

use crate::{
    clock::{Deadline, now, wall},
    fixture::Mac,
    netns::NetNs,
};

const ETH_P_ALL: u16 = 0x0003;

/// Everything that one link sends and receives, from the moment of its making.
pub struct Capture {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    frames: Mutex<Vec<Frame>>,
    more: Condvar,
    stop: AtomicBool,
}

#[derive(Clone, Debug)]
pub struct Frame {
    /// When it passed, by the kernel; this process may read it later.
    pub at: Instant,
    /// Sent by the host that captures, not received.
    pub outgoing: bool,
    /// The identifier of a tag that the kernel took out of the bytes.
    pub vlan: Option<u16>,
    pub bytes: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arp {
    pub op: u16,
    pub sender_mac: Mac,
    pub sender_ip: Ipv4Addr,
    pub target_ip: Ipv4Addr,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dhcp {
    pub from_mac: Mac,
    pub to_mac: Mac,
    pub from_ip: Ipv4Addr,
    pub to_ip: Ipv4Addr,
    pub xid: u32,
    pub ciaddr: Ipv4Addr,
    pub yiaddr: Ipv4Addr,
    pub chaddr: Mac,
    pub options: Vec<(u8, Vec<u8>)>,
}

pub const DISCOVER: u8 = 1;
pub const OFFER: u8 = 2;
pub const REQUEST: u8 = 3;
pub const DECLINE: u8 = 4;
pub const ACK: u8 = 5;
pub const NAK: u8 = 6;
pub const RELEASE: u8 = 7;
pub const INFORM: u8 = 8;

impl Capture {
    /// Captures on `link` of `netns`; it runs once this returns.
    pub fn start(netns: &NetNs, link: &str) -> Result<Self> {
        let (socket, index) = netns.enter(|| {
            let index = if_nametoindex(link).with_context(|| link.to_owned())?;
            Ok((packet_socket()?, usize::try_from(index)?))
        })?;
        // Room for a burst that comes while the reader waits for its turn.
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20))?;
        // Only so that the reader looks at its stop flag now and then.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
        want_tags(&socket)?;
        let shared = Arc::new(Shared::default());
        let reader = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || read(&socket, index, &shared)
        });
        Ok(Self {
            shared,
            reader: Some(reader),
        })
    }

    pub fn frames(&self) -> Vec<Frame> {
        self.lock().clone()
    }

    pub fn count(&self, wanted: impl Fn(&Frame) -> bool) -> usize {
        self.lock().iter().filter(|frame| wanted(frame)).count()
    }

    /// DHCP messages of this type, from clients and servers.
    pub fn dhcp(&self, kind: u8) -> Vec<Dhcp> {
        let frames = self.lock();
        let messages = frames.iter().filter_map(Frame::dhcp);
        messages.filter(|dhcp| dhcp.kind() == Some(kind)).collect()
    }

    /// Waits for a frame, also one of the past.
    pub fn wait(
        &self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Frame) -> bool,
    ) -> Result<Frame> {
        self.wait_nth(what, 1, timeout, wanted)
    }

    /// Waits until `nth` such frames have come, and returns the last of them. `wanted` looks at its
    /// frame only: the capture is locked meanwhile.
    pub fn wait_nth(
        &self,
        what: &str,
        nth: usize,
        timeout: Duration,
        wanted: impl Fn(&Frame) -> bool,
    ) -> Result<Frame> {
        let deadline = Deadline::after(timeout);
        let mut frames = self.lock();
        loop {
            if let Some(frame) = frames.iter().filter(|frame| wanted(frame)).nth(nth - 1) {
                return Ok(frame.clone());
            }
            if deadline.passed() {
                bail!("{what}: not on the wire within {timeout:?}");
            }
            frames = self
                .shared
                .more
                .wait_timeout(frames, deadline.left())
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Frame>> {
        self.shared
            .frames
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            // A reader that panicked has nothing left to stop.
            let _ = reader.join();
        }
    }
}

impl Frame {
    /// A frame that was not captured.
    pub fn of(bytes: Vec<u8>) -> Self {
        Self {
            at: now(),
            outgoing: true,
            vlan: None,
            bytes,
        }
    }

    pub fn from_mac(&self) -> Option<Mac> {
        Some(Mac(array(&self.bytes, 6)?))
    }

    pub fn arp(&self) -> Option<Arp> {
        let bytes = &self.bytes;
        if array(bytes, 12)? != [0x08, 0x06] || array(bytes, 14)? != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        Some(Arp {
            op: u16::from_be_bytes(array(bytes, 20)?),
            sender_mac: Mac(array(bytes, 22)?),
            sender_ip: Ipv4Addr::from(array::<4>(bytes, 28)?),
            target_ip: Ipv4Addr::from(array::<4>(bytes, 38)?),
        })
    }

    /// Untagged, unfragmented, without IP options: what the lab's clients, servers and agent send.
    pub fn dhcp(&self) -> Option<Dhcp> {
        let bytes = &self.bytes;
        if array(bytes, 12)? != [0x08, 0x00, 0x45] || array(bytes, 23)? != [17] {
            return None;
        }
        let ports = [
            u16::from_be_bytes(array(bytes, 34)?),
            u16::from_be_bytes(array(bytes, 36)?),
        ];
        if !ports.iter().all(|port| [67, 68].contains(port)) {
            return None;
        }
        let bootp = bytes.get(42..)?;
        if array(bootp, 236)? != [99, 130, 83, 99] {
            return None;
        }
        Some(Dhcp {
            to_mac: Mac(array(bytes, 0)?),
            from_mac: Mac(array(bytes, 6)?),
            from_ip: Ipv4Addr::from(array::<4>(bytes, 26)?),
            to_ip: Ipv4Addr::from(array::<4>(bytes, 30)?),
            xid: u32::from_be_bytes(array(bootp, 4)?),
            ciaddr: Ipv4Addr::from(array::<4>(bootp, 12)?),
            yiaddr: Ipv4Addr::from(array::<4>(bootp, 16)?),
            chaddr: Mac(array(bootp, 28)?),
            options: options(bootp.get(240..)?),
        })
    }
}

impl Dhcp {
    pub fn kind(&self) -> Option<u8> {
        self.option(53)?.first().copied()
    }

    pub fn option(&self, code: u8) -> Option<&[u8]> {
        let found = self.options.iter().find(|(this, _)| *this == code);
        found.map(|(_, value)| value.as_slice())
    }
}

fn options(mut rest: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    loop {
        match rest {
            [] | [255, ..] => return found,
            [0, tail @ ..] => rest = tail,
            [code, length, tail @ ..] => {
                let Some((value, tail)) = tail.split_at_checked(usize::from(*length)) else {
                    return found;
                };
                found.push((*code, value.to_vec()));
                rest = tail;
            }
            [_] => return found,
        }
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// Without a bind it hears every link of the namespace that it was made in.
pub(crate) fn packet_socket() -> Result<OwnedFd> {
    // SAFETY: takes and returns integers.
    let fd = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(ETH_P_ALL.to_be()),
        )
    };
    let fd = Errno::result(fd).context("cannot open a packet socket")?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn read(socket: &OwnedFd, index: usize, shared: &Shared) {
    let mut buffer = vec![0; 65536];
    while !shared.stop.load(Ordering::Relaxed) {
        // A link that goes down or away wakes us with an error; the next one may still come.
        let Some(received) = receive(socket, &mut buffer) else {
            continue;
        };
        if usize::try_from(received.from.sll_ifindex) != Ok(index) {
            continue;
        }
        let frame = Frame {
            at: received.at,
            outgoing: received.from.sll_pkttype == PACKET_OUTGOING,
            vlan: received.vlan,
            bytes: buffer[..received.length].to_vec(),
        };
        shared
            .frames
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(frame);
        shared.more.notify_all();
    }
}

const PACKET_OUTGOING: u8 = 4;

struct Received {
    at: Instant,
    length: usize,
    from: libc::sockaddr_ll,
    vlan: Option<u16>,
}

fn want_tags(socket: &OwnedFd) -> Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: an int that lives for the call, with its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_AUXDATA,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    Errno::result(result).context("PACKET_AUXDATA")?;
    Ok(())
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Option<Received> {
    let mut control = [0_u64; 16];
    // SAFETY: plain old data, for which all zero is a value.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: as above.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = (&raw mut from).cast();
    header.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: all that the header points to lives for the call, with the lengths given.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, 0) };
    let length = usize::try_from(length).ok()?;
    let mut vlan = None;
    let mut waited = Duration::ZERO;
    // SAFETY: the kernel has just filled the header; the macros stay within its control buffer.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&raw const header);
        while !message.is_null() {
            if (*message).cmsg_level == libc::SOL_PACKET
                && (*message).cmsg_type == libc::PACKET_AUXDATA
            {
                let aux = libc::CMSG_DATA(message)
                    .cast::<libc::tpacket_auxdata>()
                    .read_unaligned();
                if aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                    vlan = Some(aux.tp_vlan_tci & 0xfff);
                }
            }
            if (*message).cmsg_level == libc::SOL_SOCKET
                && (*message).cmsg_type == libc::SCM_TIMESTAMPNS
            {
                let passed = libc::CMSG_DATA(message)
                    .cast::<libc::timespec>()
                    .read_unaligned();
                waited = wall().saturating_sub(TimeSpec::from(passed).into());
            }
            message = libc::CMSG_NXTHDR(&raw const header, message);
        }
    }
    Some(Received {
        at: now() - waited,
        length,
        from,
        vlan,
    })
}
