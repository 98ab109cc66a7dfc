//! Many clients behind few ports: no kernels behind them, only the messages that take a lease.
use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::{
    socket::{MsgFlags, recv, send},
    time::TimeVal,
};
use nix::{
    libc,
    net::if_::if_nametoindex,
    sys::socket::{setsockopt, sockopt},
};

use crate::{
    clock::Deadline,
    fixture::{BRIDGE, Mac, NIC, SERVER_IP},
    netns::NetNs,
    node::Node,
    wire::{ACK, DISCOVER, Frame, REQUEST, packet_socket},
};

/// Open transactions of one port; the agent follows few at a time.
const WINDOW: usize = 4;
const AGAIN: Duration = Duration::from_secs(1);
const OFFER: u8 = 2;

/// One port, and the clients behind it.
pub struct Crowd {
    port: String,
    node: NetNs,
    socket: OwnedFd,
    // The far end of the port lives as long as this.
    netns: NetNs,
}

/// How clients come to their leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asking {
    /// The server chooses: DISCOVER, then REQUEST what it offers.
    Discover,
    /// The client names an address at once: servers that keep no offers take that.
    Straight,
}

struct Open {
    ip: Option<Ipv4Addr>,
    since: Deadline,
}

impl Crowd {
    pub fn plug_in(node: &Node, port: &str) -> Result<Self> {
        let netns = NetNs::new()?;
        node.netns.ip(&format!(
            "link add {port} type veth peer name {NIC} netns {}
             link set {port} master {BRIDGE} up",
            netns.path()
        ))?;
        netns.ip(&format!("link set {NIC} arp off up"))?;
        let socket = netns.enter(|| {
            let index = if_nametoindex(NIC)?;
            let socket = packet_socket()?;
            bind(&socket, index)?;
            Ok(socket)
        })?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))?;
        Ok(Self {
            port: port.to_owned(),
            node: node.netns.try_clone()?,
            socket,
            netns,
        })
    }

    /// What comes to the clients, with a read that gives up after some milliseconds.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<usize> {
        match recv(self.socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(length) => Ok(length),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => Ok(0),
            Err(error) => Err(error).context("cannot listen"),
        }
    }

    /// Where the clients are.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    pub fn name(&self) -> &str {
        &self.port
    }

    /// Takes a lease for each MAC; with [`Asking::Straight`] the one that is named beside it.
    pub fn take(
        &self,
        clients: &[(Mac, Ipv4Addr)],
        asking: Asking,
        patience: Duration,
    ) -> Result<BTreeMap<Mac, Ipv4Addr>> {
        let deadline = Deadline::after(patience);
        let mut waiting: VecDeque<(Mac, Ipv4Addr)> = clients.iter().copied().collect();
        let mut open: BTreeMap<Mac, Open> = BTreeMap::new();
        let mut taken = BTreeMap::new();
        while taken.len() < clients.len() {
            ensure!(
                !deadline.passed(),
                "{} of {} leases taken on {}",
                taken.len(),
                clients.len(),
                self.port
            );
            while open.len() < WINDOW
                && let Some((mac, ip)) = waiting.pop_front()
            {
                let ip = (asking == Asking::Straight).then_some(ip);
                self.ask(mac, ip)?;
                let since = Deadline::after(AGAIN);
                open.insert(mac, Open { ip, since });
            }
            let Some(answer) = self.answer()? else {
                for (mac, open) in open.iter_mut().filter(|(_, open)| open.since.passed()) {
                    self.ask(*mac, open.ip)?;
                    open.since = Deadline::after(AGAIN);
                }
                continue;
            };
            let Some(asked) = open.get_mut(&answer.chaddr) else {
                continue;
            };
            match answer.kind() {
                Some(OFFER) if asked.ip.is_none() => {
                    asked.ip = Some(answer.yiaddr);
                    self.ask(answer.chaddr, asked.ip)?;
                }
                Some(ACK) if asked.ip == Some(answer.yiaddr) => {
                    open.remove(&answer.chaddr);
                    taken.insert(answer.chaddr, answer.yiaddr);
                }
                _ => {}
            }
        }
        Ok(taken)
    }

    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = send(self.socket.as_raw_fd(), frame, MsgFlags::empty())?;
        ensure!(sent == frame.len(), "sent {sent} of {} bytes", frame.len());
        Ok(())
    }

    fn ask(&self, mac: Mac, ip: Option<Ipv4Addr>) -> Result<()> {
        self.send(&question(mac, ip))
    }

    fn answer(&self) -> Result<Option<crate::wire::Dhcp>> {
        let mut buffer = [0; 2048];
        let length = self.receive(&mut buffer)?;
        if length == 0 {
            return Ok(None);
        }
        let frame = Frame {
            vlan: None,
            at: crate::clock::now(),
            outgoing: false,
            bytes: buffer[..length].to_vec(),
        };
        Ok(frame.dhcp())
    }
}

/// Takes all ports away at the same moment, as a host does that loses its VMs: one after another,
/// the kernel waits for an RCU period between them.
pub fn unplug(crowds: Vec<Crowd>) -> Result<()> {
    let Some(first) = crowds.first() else {
        return Ok(());
    };
    let mut script: Vec<String> = crowds
        .iter()
        .map(|crowd| format!("link set {} group {LEAVING}", crowd.port))
        .collect();
    script.push(format!("link del group {LEAVING}"));
    first.node.ip(&script.join("\n"))
}

/// The group of links that are taken away together.
const LEAVING: u32 = 1000;

/// The nth client's.
pub fn crowd_mac(n: u16) -> Mac {
    let [high, low] = n.to_be_bytes();
    Mac([0x02, 0xdb, 0, 0, high, low])
}

/// A DISCOVER, or a REQUEST in SELECTING for an address. The answer is wanted by unicast.
fn question(mac: Mac, ip: Option<Ipv4Addr>) -> Vec<u8> {
    let kind = if ip.is_some() { REQUEST } else { DISCOVER };
    let mut options = vec![53, 1, kind];
    if let Some(ip) = ip {
        options.extend([50, 4]);
        options.extend(ip.octets());
        options.extend([54, 4]);
        options.extend(SERVER_IP.octets());
    }
    options.push(255);
    let mut bootp = vec![1, 1, 6, 0];
    bootp.extend([mac.0[2], mac.0[3], mac.0[4], mac.0[5]]);
    bootp.extend([0; 20]);
    bootp.extend(mac.0);
    bootp.resize(236, 0);
    bootp.extend([99, 130, 83, 99]);
    bootp.extend(options);
    bootp.resize(300, 0);

    let broadcast = Ipv4Addr::BROADCAST;
    let from = Ipv4Addr::UNSPECIFIED;
    datagram((Mac([0xff; 6]), mac), (from, broadcast), (68, 67), &bootp)
}

/// An Ethernet frame with a UDP datagram without a checksum. Pairs are (source, destination), but
/// MACs as on the wire: destination first.
pub fn datagram(
    (to, from): (Mac, Mac),
    ips: (Ipv4Addr, Ipv4Addr),
    ports: (u16, u16),
    payload: &[u8],
) -> Vec<u8> {
    let udp_len = u16::try_from(8 + payload.len()).unwrap_or(u16::MAX);
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(ips.0.octets());
    ip.extend(ips.1.octets());
    let mut sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).unwrap_or(0);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());

    let mut frame = Vec::new();
    frame.extend(to.0);
    frame.extend(from.0);
    frame.extend([0x08, 0x00]);
    frame.extend(ip);
    frame.extend(ports.0.to_be_bytes());
    frame.extend(ports.1.to_be_bytes());
    frame.extend(udp_len.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

fn bind(socket: &OwnedFd, index: u32) -> Result<()> {
    // SAFETY: all zero is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = 0x0003_u16.to_be();
    address.sll_ifindex = i32::try_from(index)?;
    let length = u32::try_from(size_of::<libc::sockaddr_ll>())?;
    // SAFETY: the address is of the family and the length that are given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    nix::errno::Errno::result(bound)
        .map(drop)
        .context("cannot bind a packet socket")
}
