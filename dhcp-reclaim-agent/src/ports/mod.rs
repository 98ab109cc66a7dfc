//! Which ports exist, whose they are, and their coming and going, by rtnetlink.

#![forbid(unsafe_code)]

mod glob;
mod links;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::poll_fn,
    io,
    net::{IpAddr, Ipv4Addr},
    ops::ControlFlow,
};

use futures::{FutureExt as _, TryStreamExt};
use netlink_packet_route::{
    AddressFamily,
    address::AddressAttribute,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
};
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::{
    packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer},
    sys::{AsyncSocket, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};
use tracing::warn;

pub use self::{
    glob::{Glob, GlobError},
    links::{Link, LinkChange, Links, OWN_PREFIX, PortEvent, PortRules, VlanFiltering},
};
use crate::core::{IfIndex, MacAddr, Port, Vlan};

/// The group of link messages, as the bit for bind(2).
const GROUP_LINK: u32 = 1;
/// Asked of the kernel: room for some thousand link messages.
const RECEIVE_BUFFER: usize = 8 << 20;
/// The kernel builds datagrams of at most 32 KiB for a dump (netlink_dump).
const DATAGRAM: usize = 64 << 10;

/// The link messages cannot be followed any longer.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error("cannot open a netlink socket for links")]
    Open(#[source] io::Error),
    #[error("cannot ask the kernel for its links")]
    Ask(#[source] io::Error),
    #[error("cannot read link messages")]
    Read(#[source] io::Error),
    #[error("the kernel refuses to list its links")]
    Refused(#[source] io::Error),
}

/// Follows the ports of the bridges in its rules, in the network namespace that it was made in.
///
/// Not on top of `rtnetlink::Connection`: that hands answers and messages out by two queues, and so
/// loses which came first. A dump row that is older than a deletion must not bring a port back.
pub struct PortWatcher {
    socket: TokioSocket,
    links: Links,
    ready: VecDeque<PortEvent>,
    datagram: Vec<u8>,
    sequence: u32,
    dump: Dump,
    /// What is dumped: the VLANs, or else the links.
    of_vlans: bool,
    /// The links are to be read once the VLANs have been.
    links_lost: bool,
    resyncs: u64,
    malformed: u64,
    /// To be told by [`Self::next`].
    failed: Option<WatchError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dump {
    /// Messages suffice.
    None,
    Running,
    /// Something was lost or changed meanwhile: what it says is not the whole truth.
    Spoiled,
}

impl PortWatcher {
    /// The bridges and ports that are there, and all that changes from then on.
    pub async fn start(rules: PortRules) -> Result<(Vec<PortEvent>, Self), WatchError> {
        Self::with_buffer(rules, RECEIVE_BUFFER).await
    }

    async fn with_buffer(
        rules: PortRules,
        bytes: usize,
    ) -> Result<(Vec<PortEvent>, Self), WatchError> {
        let mut watcher = Self {
            socket: open(bytes).map_err(WatchError::Open)?,
            links: Links::new(rules),
            ready: VecDeque::new(),
            datagram: Vec::with_capacity(DATAGRAM),
            sequence: 0,
            dump: Dump::None,
            of_vlans: false,
            links_lost: false,
            resyncs: 0,
            failed: None,
            malformed: 0,
        };
        // The socket is a member of the group already: what changes during the dump is not missed.
        watcher.ask()?;
        while watcher.dump != Dump::None {
            watcher.receive().await?;
        }
        Ok((watcher.ready.drain(..).collect(), watcher))
    }

    /// The next change. Cancel safe.
    pub async fn next(&mut self) -> Result<PortEvent, WatchError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            self.receive().await?;
        }
    }

    /// Reads what is there, and waits for nothing: the ports that are to be told of, with their bridges'
    /// numbers for segments; or `None`, if that is not known by now. An error is [`Self::next`]'s to tell.
    pub fn waiting(&mut self) -> Option<Vec<Port>> {
        // More than that is as good as one.
        for _ in 0..256 {
            // However much there is: nobody else is to have a turn here.
            match tokio::task::unconstrained(self.receive()).now_or_never() {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    self.failed = Some(error);
                    return None;
                }
                None if self.dump != Dump::None => return None,
                None => {
                    let ready = self.ready.iter();
                    let ports = ready.filter_map(|event| match event {
                        PortEvent::PortUp(port) => Some(port.clone()),
                        _ => None,
                    });
                    return Some(ports.collect());
                }
            }
        }
        None
    }

    /// How often the kernel dropped messages, and all links were read anew.
    pub fn resyncs(&self) -> u64 {
        self.resyncs
    }

    /// Link messages that could not be read.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// One datagram. It waits for nothing once it has read.
    async fn receive(&mut self) -> Result<(), WatchError> {
        self.datagram.clear();
        let (socket, datagram) = (&self.socket, &mut self.datagram);
        let read = poll_fn(|context| socket.poll_recv(context, datagram)).await;
        match read {
            Ok(()) => {
                self.read_datagram()?;
                if self.dump == Dump::None && self.links.want_vlans() {
                    self.ask_vlans()?;
                }
                Ok(())
            }
            // Messages came faster than they were read, and some are lost.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.overrun(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(WatchError::Read(error)),
        }
    }

    fn overrun(&mut self) -> Result<(), WatchError> {
        self.resyncs += 1;
        warn!(
            resyncs = self.resyncs,
            "link messages were lost; reading all links anew"
        );
        match self.dump {
            Dump::None => self.ask(),
            // One dump at a time: the kernel answers EBUSY to a second.
            Dump::Running | Dump::Spoiled => {
                self.dump = Dump::Spoiled;
                // Links may be among what was lost, whatever the dump is of.
                self.links_lost = true;
                Ok(())
            }
        }
    }

    fn ask(&mut self) -> Result<(), WatchError> {
        self.links_lost = false;
        self.send(wire::dump_request)?;
        self.links.begin_dump();
        self.of_vlans = false;
        Ok(())
    }

    fn ask_vlans(&mut self) -> Result<(), WatchError> {
        self.send(wire::vlan_dump_request)?;
        self.of_vlans = true;
        Ok(())
    }

    fn send(&mut self, request: impl Fn(u32) -> Vec<u8>) -> Result<(), WatchError> {
        // Zero is the sequence of messages that nobody asked for.
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        let request = request(self.sequence);
        let kernel = SocketAddr::new(0, 0);
        self.socket
            .socket_ref()
            .send_to(&request, &kernel, 0)
            .map_err(WatchError::Ask)?;
        self.dump = Dump::Running;
        Ok(())
    }

    fn read_datagram(&mut self) -> Result<(), WatchError> {
        let datagram = std::mem::take(&mut self.datagram);
        let mut rest = datagram.as_slice();
        let mut result = Ok(());
        while !rest.is_empty() && result.is_ok() {
            let Ok(message) = NetlinkBuffer::new_checked(rest) else {
                self.count_malformed("lengths contradict one another");
                break;
            };
            result = self.read_message(&message);
            let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        self.datagram = datagram;
        result
    }

    fn read_message(&mut self, message: &NetlinkBuffer<&[u8]>) -> Result<(), WatchError> {
        let ours = message.sequence_number() == self.sequence && self.dump != Dump::None;
        if ours && message.flags() & NLM_F_DUMP_INTR != 0 {
            self.dump = Dump::Spoiled;
        }
        match message.message_type() {
            NLMSG_DONE if ours => return self.dumped(),
            NLMSG_ERROR if ours => {
                let code = message
                    .payload()
                    .get(..4)
                    .and_then(|code| code.try_into().ok());
                let errno = code.map_or(0, i32::from_ne_bytes).saturating_neg();
                return Err(WatchError::Refused(io::Error::from_raw_os_error(errno)));
            }
            _ => {}
        }
        match wire::link_change(message) {
            Ok(Some(change)) => self.ready.extend(self.links.apply(change)),
            Ok(None) => {}
            Err(error) => self.count_malformed(&error.to_string()),
        }
        Ok(())
    }

    fn dumped(&mut self) -> Result<(), WatchError> {
        match self.dump {
            Dump::None => {}
            Dump::Spoiled if self.of_vlans && !self.links_lost => return self.ask_vlans(),
            Dump::Spoiled => return self.ask(),
            Dump::Running => {
                self.dump = Dump::None;
                if self.of_vlans {
                    return Ok(());
                }
                self.ready.extend(self.links.end_dump());
                if self.resyncs > 0 {
                    self.ready.push_back(PortEvent::Resynced);
                }
            }
        }
        Ok(())
    }

    fn count_malformed(&mut self, why: &str) {
        self.malformed += 1;
        warn!(malformed = self.malformed, why, "link message left out");
    }
}

fn open(bytes: usize) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    // Past net.core.rmem_max only with CAP_NET_ADMIN; without, a mass loss costs a resync.
    setsockopt(socket.socket_ref(), sockopt::RcvBufForce, &bytes)
        .or_else(|_| setsockopt(socket.socket_ref(), sockopt::RcvBuf, &bytes))?;
    socket.socket_mut().bind(&SocketAddr::new(0, GROUP_LINK))?;
    Ok(socket)
}

/// IPv4 addresses of a link.
pub async fn local_addresses(ifindex: IfIndex) -> Result<Vec<Ipv4Addr>, AddressError> {
    let networks = local_networks(ifindex).await?;
    Ok(networks.into_iter().map(|(address, _)| address).collect())
}

/// The same, with the lengths of their prefixes.
pub async fn local_networks(ifindex: IfIndex) -> Result<Vec<(Ipv4Addr, u8)>, AddressError> {
    let (connection, handle, _messages) =
        rtnetlink::new_connection().map_err(AddressError::Open)?;
    let connection = tokio::spawn(connection);
    let rows = handle
        .address()
        .get()
        .set_link_index_filter(ifindex)
        .execute();
    let rows: Result<Vec<_>, _> = rows.try_collect().await;
    connection.abort();
    let rows = rows.map_err(AddressError::Ask)?;
    // IFA_LOCAL is ours; IFA_ADDRESS may be the far end's.
    let addresses = rows
        .iter()
        .flat_map(|row| {
            row.attributes
                .iter()
                .map(|one| (one, row.header.prefix_len))
        })
        .filter_map(|(attribute, prefix)| {
            let AddressAttribute::Local(IpAddr::V4(address)) = attribute else {
                return None;
            };
            Some((*address, prefix))
        });
    Ok(addresses.collect())
}

/// A bridge's table has no bound of its own, and a guest can send in any number of names.
const MACS_OF_PORT: usize = 1024;
const ROWS: usize = 65_536;

/// What bridges have learned.
#[derive(Debug)]
pub struct Learned {
    /// At which of their ports, and on which VLAN of a bridge that filters them (otherwise zero).
    pub macs: Vec<(IfIndex, Vlan, MacAddr)>,
    /// Ports that may have learned more: of each 1,024 are read.
    pub full: BTreeSet<IfIndex>,
    /// There may be more at any port: of all 65,536 are read.
    pub cut: bool,
}

pub async fn learned_macs() -> Result<Learned, AddressError> {
    let mut macs = Vec::new();
    let mut of_port: BTreeMap<IfIndex, usize> = BTreeMap::new();
    let mut rows = 0;
    neighbours(AddressFamily::Bridge, |row| {
        rows += 1;
        let vlan = row.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Vlan(vlan) => Some(*vlan),
            _ => None,
        });
        let port = row.header.ifindex;
        let count = of_port.entry(port).or_default();
        // The bridge's own, and those of its ports, are permanent.
        if row.header.state != NeighbourState::Permanent
            && *count < MACS_OF_PORT
            && let Some(mac) = mac_of(row)
        {
            *count += 1;
            macs.push((port, vlan.unwrap_or(0), mac));
        }
        match rows < ROWS {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    })
    .await?;
    let full = of_port
        .into_iter()
        .filter(|(_, count)| *count >= MACS_OF_PORT);
    Ok(Learned {
        macs,
        full: full.map(|(port, _)| port).collect(),
        cut: rows >= ROWS,
    })
}

/// The MAC that `ip` has at `link`, by the kernel's table of neighbours.
pub async fn neighbour(link: IfIndex, ip: Ipv4Addr) -> Result<Option<MacAddr>, AddressError> {
    let destination = NeighbourAttribute::Destination(NeighbourAddress::Inet(ip));
    let mut found = None;
    neighbours(AddressFamily::Inet, |row| {
        if row.header.ifindex != link || !row.attributes.contains(&destination) {
            return ControlFlow::Continue(());
        }
        found = mac_of(row);
        ControlFlow::Break(())
    })
    .await?;
    Ok(found)
}

/// Reads the kernel's table, for as long as `each` goes on.
async fn neighbours(
    family: AddressFamily,
    mut each: impl FnMut(&NeighbourMessage) -> ControlFlow<()>,
) -> Result<(), AddressError> {
    let (connection, handle, _messages) =
        rtnetlink::new_connection().map_err(AddressError::Open)?;
    let connection = tokio::spawn(connection);
    let rows = handle.neighbours().get().set_address_family(family);
    let mut rows = std::pin::pin!(rows.execute());
    let read = loop {
        match rows.try_next().await {
            Ok(Some(row)) if each(&row).is_continue() => {}
            Ok(_) => break Ok(()),
            Err(error) => break Err(AddressError::Ask(error)),
        }
    };
    connection.abort();
    read
}

fn mac_of(row: &NeighbourMessage) -> Option<MacAddr> {
    row.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => {
            Some(MacAddr(bytes.as_slice().try_into().ok()?))
        }
        _ => None,
    })
}

/// The addresses of a link cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error("cannot open a netlink socket for addresses")]
    Open(#[source] io::Error),
    #[error("cannot list the addresses of a link")]
    Ask(#[source] rtnetlink::Error),
}

#[cfg(test)]
mod tests {
    use std::{process::Command, thread, time::Duration};

    use nix::sched::{CloneFlags, unshare};
    use tokio::time::timeout;

    use super::*;
    use crate::core::{PortLoss, Role};

    const PATIENCE: Duration = Duration::from_secs(5);
    const QUIET: Duration = Duration::from_millis(200);

    /// Runs a test in a network namespace of its own, which goes with its thread.
    fn in_namespace(test: impl AsyncFnOnce() + Send + 'static) {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: a network namespace needs root");
            return;
        }
        let done = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(test());
        });
        if let Err(panic) = done.join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn ip(arguments: &str) {
        let status = Command::new("ip")
            .args(arguments.split_whitespace())
            .status()
            .unwrap();
        assert!(status.success(), "ip {arguments}");
    }

    fn rules() -> PortRules {
        PortRules {
            bridges: vec!["br0".to_owned()],
            ports: Vec::new(),
            uplinks: vec!["up*".parse().unwrap()],
        }
    }

    async fn next(watcher: &mut PortWatcher) -> PortEvent {
        timeout(PATIENCE, watcher.next())
            .await
            .expect("no event came")
            .unwrap()
    }

    /// The next event that is not about a bridge's MAC, which follows its ports.
    async fn next_change(watcher: &mut PortWatcher) -> PortEvent {
        loop {
            let event = next(watcher).await;
            if !matches!(event, PortEvent::BridgeMac { .. }) {
                return event;
            }
        }
    }

    async fn next_up(watcher: &mut PortWatcher, name: &str) -> IfIndex {
        let event = next_change(watcher).await;
        let PortEvent::PortUp(port) = event else {
            panic!("{name} should be up: {event:?}")
        };
        assert_eq!(port.name, name);
        let role = if name.starts_with("up") {
            Role::Uplink
        } else {
            Role::Vm
        };
        assert_eq!(port.role, role);
        port.ifindex
    }

    async fn nothing_more(watcher: &mut PortWatcher) {
        while let Ok(event) = timeout(QUIET, watcher.next()).await {
            let event = event.unwrap();
            assert!(matches!(event, PortEvent::BridgeMac { .. }), "{event:?}");
        }
    }

    #[test]
    fn a_port_that_has_just_come_is_known_to_wait() {
        in_namespace(async || {
            ip("link add br0 type bridge");
            let (_, mut watcher) = PortWatcher::start(rules()).await.unwrap();
            nothing_more(&mut watcher).await;
            assert_eq!(watcher.waiting(), Some(Vec::new()));
            ip("link add vm0 master br0 type veth peer name guest0");
            // As the agent does: the runtime has not looked at its sockets since.
            tokio::task::yield_now().await;
            for _ in 0..2 {
                let waiting = watcher.waiting().unwrap_or_default();
                let names: Vec<&str> = waiting.iter().map(|port| port.name.as_str()).collect();
                assert_eq!(names, ["vm0"], "it waits until it is told");
            }
            next_up(&mut watcher, "vm0").await;
            nothing_more(&mut watcher).await;
            ip("link del vm0");
            tokio::task::yield_now().await;
            assert_eq!(watcher.waiting(), Some(Vec::new()), "it is gone, not new");
        });
    }

    #[test]
    fn follows_a_bridge_that_comes_goes_and_comes_again() {
        in_namespace(async || {
            ip("link add vm0 type veth peer name guest0");
            let (initial, mut watcher) = PortWatcher::start(rules()).await.unwrap();
            assert_eq!(initial, []);

            ip("link add br0 type bridge");
            let first = next_change(&mut watcher).await;
            let PortEvent::BridgeUp {
                ifindex: bridge, ..
            } = first
            else {
                panic!("{first:?}")
            };
            ip("link set vm0 master br0");
            let port = next_up(&mut watcher, "vm0").await;
            ip("link add up0 master br0 type veth peer name far0");
            next_up(&mut watcher, "up0").await;

            ip("link del br0");
            let mut lost = 0;
            loop {
                match next_change(&mut watcher).await {
                    PortEvent::PortDown {
                        loss: PortLoss::Detached,
                        ..
                    } => lost += 1,
                    PortEvent::BridgeDown { ifindex, .. } => {
                        assert_eq!(ifindex, bridge);
                        break;
                    }
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(lost, 2);

            ip("link add br0 type bridge");
            ip("link set vm0 master br0");
            let again = next_change(&mut watcher).await;
            assert!(matches!(again, PortEvent::BridgeUp { .. }), "{again:?}");
            assert_eq!(next_up(&mut watcher, "vm0").await, port);

            ip("link del vm0");
            let gone = next_change(&mut watcher).await;
            let deleted = PortEvent::PortDown {
                ifindex: port,
                loss: PortLoss::Deleted,
            };
            assert_eq!(gone, deleted);
            nothing_more(&mut watcher).await;
        });
    }

    #[test]
    fn what_is_there_at_the_start_is_told_once() {
        in_namespace(async || {
            ip("link add br0 type bridge");
            ip("link add vm0 master br0 type veth peer name guest0");
            ip("link add dreclaim0 master br0 type veth peer name dreclaim1");
            let (initial, mut watcher) = PortWatcher::start(rules()).await.unwrap();
            let [PortEvent::BridgeUp { name, .. }, PortEvent::PortUp(port)] = initial.as_slice()
            else {
                panic!("{initial:?}")
            };
            assert_eq!((name.as_str(), port.name.as_str()), ("br0", "vm0"));
            nothing_more(&mut watcher).await;
        });
    }

    #[test]
    fn carrier_of_a_veth_follows_its_guest() {
        in_namespace(async || {
            ip("link add br0 type bridge");
            let (_, mut watcher) = PortWatcher::start(rules()).await.unwrap();
            ip("link add vm0 master br0 type veth peer name guest0");
            let port = next_up(&mut watcher, "vm0").await;
            ip("link set vm0 up");
            nothing_more(&mut watcher).await;
            ip("link set guest0 up");
            nothing_more(&mut watcher).await;

            ip("link set guest0 down");
            let lost = PortEvent::PortDown {
                ifindex: port,
                loss: PortLoss::LinkDown,
            };
            assert_eq!(next_change(&mut watcher).await, lost);
            ip("link set guest0 up");
            assert_eq!(next_up(&mut watcher, "vm0").await, port);

            // Our own end, set down by hand, says nothing about the guest.
            ip("link set vm0 down");
            nothing_more(&mut watcher).await;
            ip("link set vm0 up");
            nothing_more(&mut watcher).await;

            ip("link set vm0 down");
            ip("link set vm0 name vm1");
            assert_eq!(next_up(&mut watcher, "vm1").await, port);
        });
    }

    #[test]
    fn overrun_loses_nothing() {
        in_namespace(async || {
            ip("link add br0 type bridge");
            ip("link add old0 master br0 type veth peer name oldguest");
            let (initial, mut watcher) = PortWatcher::with_buffer(rules(), 8 << 10).await.unwrap();
            assert_eq!(initial.len(), 2);

            ip("link del old0");
            for number in 0..60 {
                ip(&format!(
                    "link add vm{number} master br0 type veth peer name guest{number}"
                ));
            }
            let mut ports = BTreeSet::new();
            loop {
                match next_change(&mut watcher).await {
                    PortEvent::PortUp(port) => assert!(ports.insert(port.name)),
                    PortEvent::PortDown { loss, .. } => assert_eq!(loss, PortLoss::Deleted),
                    PortEvent::Resynced => break,
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(ports.len(), 60);
            assert!(watcher.resyncs() >= 1);
            assert_eq!(watcher.malformed(), 0);
            nothing_more(&mut watcher).await;
        });
    }

    #[test]
    fn addresses_of_a_bridge() {
        in_namespace(async || {
            ip("link add br0 type bridge");
            ip("addr add 10.0.0.1/24 dev br0");
            ip("addr add 10.0.1.1/24 dev br0");
            let (initial, _watcher) = PortWatcher::start(rules()).await.unwrap();
            let [PortEvent::BridgeUp { ifindex, .. }] = initial.as_slice() else {
                panic!("{initial:?}")
            };
            let found = local_networks(*ifindex).await.unwrap();
            assert_eq!(
                found,
                [
                    (Ipv4Addr::new(10, 0, 0, 1), 24),
                    (Ipv4Addr::new(10, 0, 1, 1), 24)
                ]
            );
            assert!(
                local_networks(ifindex + 1000)
                    .await
                    .map_or(true, |none| none.is_empty())
            );
        });
    }
}
