//! Lease queries on their way: a socket for as long as one is open, and what it hears.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    time::Duration,
};

use nix::net::if_::if_indextoname;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tracing::debug;

use super::{Agent, census::Question, chain, draw_xid};
use crate::{
    clock,
    core::{Event, IfIndex, Key, Query, QueryAnswer, SegmentId, Time, Vlan},
    packet::leasequery::{self, Reply},
};

const PORT: u16 = 67;
/// A server that has not answered by now does not.
const PATIENCE: Duration = Duration::from_secs(3);
/// More open questions than a server that answers ever leaves.
const OPEN: usize = 1024;

/// Open questions and the sockets that wait for their answers.
#[derive(Debug, Default)]
pub(super) struct Queries {
    sockets: BTreeMap<SegmentId, UdpSocket>,
    open: BTreeMap<u32, Asked>,
    told: bool,
    pub(super) refused: u64,
}

#[derive(Debug)]
struct Asked {
    about: About,
    server: Ipv4Addr,
    until: Time,
}

/// What a question is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum About {
    /// What became of the RELEASE of an address.
    Address(Key),
    /// What a MAC leases.
    Mac(Question),
}

impl About {
    fn segment(self) -> SegmentId {
        self.place().0
    }

    /// Where the answer counts.
    fn place(self) -> (SegmentId, Vlan) {
        match self {
            Self::Address(key) => (key.segment, key.vlan),
            Self::Mac(question) => (question.segment, question.vlan),
        }
    }

    fn is_answered_by(self, reply: &Reply) -> bool {
        match self {
            Self::Address(key) => key.ip == reply.ip,
            // Who has no lease may be named or not.
            Self::Mac(question) => match reply.answer {
                QueryAnswer::Active(named) => named == Some(question.mac),
                _ => true,
            },
        }
    }
}

impl Queries {
    /// Open questions to this server about what MACs lease.
    pub(super) fn about_macs(&self, server: Ipv4Addr) -> usize {
        let about_macs =
            |asked: &&Asked| asked.server == server && matches!(asked.about, About::Mac(..));
        self.open.values().filter(about_macs).count()
    }

    /// Waits for an answer; for ever while no question is open.
    pub(super) async fn readable(&self) {
        let sockets = self.sockets.values().map(|s| Box::pin(s.readable()));
        let mut sockets: Vec<_> = sockets.collect();
        if sockets.is_empty() {
            return std::future::pending().await;
        }
        sockets.truncate(8);
        let _which = futures::future::select_all(sockets).await;
    }
}

impl Agent {
    /// Sends the question, or says at once that it cannot be asked.
    pub(super) async fn query(&mut self, key: Key, query: Query) -> Option<Event> {
        match self.ask(key, query).await {
            Ok(()) => None,
            Err(why) => {
                if !std::mem::replace(&mut self.queries.told, true) {
                    debug!(server = %query.server, why, "no lease query: what becomes of RELEASEs is not known");
                }
                let (server, answer) = (query.server, QueryAnswer::NotAsked);
                Some(Event::Queried {
                    key,
                    server,
                    answer,
                })
            }
        }
    }

    async fn ask(&mut self, key: Key, query: Query) -> Result<(), String> {
        self.put(About::Address(key), query.server).await
    }

    /// Asks what a MAC leases; the answer comes to [`Self::lease_told`].
    pub(super) async fn ask_for_mac(&mut self, question: Question) -> Result<(), String> {
        self.put(About::Mac(question), question.server).await
    }

    async fn put(&mut self, about: About, server: Ipv4Addr) -> Result<(), String> {
        if self.queries.open.len() >= OPEN {
            return Err("too many are open".to_owned());
        }
        let (segment, vlan) = about.place();
        let bridge = self.segments.bridge(segment).ok_or("no bridge")?;
        if self.own_vlan(segment) != Some(vlan) {
            return Err("the bridge's own address is on another VLAN".to_owned());
        }
        let networks = self.addresses.of(bridge.ifindex).await;
        let networks = networks.map_err(|error| chain(&error))?;
        if networks.iter().any(|(own, _)| *own == server) {
            return Err("the server is this host".to_owned());
        }
        let (from, _) = *networks.first().ok_or("the bridge has no address")?;
        let xid = draw_xid().ok_or("no random numbers")?;
        let payload = match about {
            About::Address(key) => leasequery::query(key.ip, from, xid),
            About::Mac(question) => leasequery::query_mac(question.mac, from, xid),
        };
        let payload = payload.ok_or("it cannot be encoded")?;
        let socket = match self.queries.sockets.entry(segment) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(none) => {
                let socket = open(bridge.ifindex, from).map_err(|error| error.to_string())?;
                none.insert(socket)
            }
        };
        let to = SocketAddrV4::new(server, PORT);
        socket
            .send_to(&payload, to)
            .await
            .map_err(|error| error.to_string())?;
        let until = clock::monotonic() + PATIENCE;
        let asked = Asked {
            about,
            server,
            until,
        };
        self.queries.open.insert(xid, asked);
        Ok(())
    }

    /// Reads what has come, and hands on what answers a question.
    pub(super) async fn read_answers(&mut self) {
        // An answer may order a repetition: by then all that is newer is to be known.
        self.drain().await;
        let mut answers = Vec::new();
        let mut leases = Vec::new();
        let mut buffer = [0; 2048];
        let Queries {
            sockets,
            open,
            refused,
            ..
        } = &mut self.queries;
        for (segment, socket) in sockets.iter() {
            while let Ok((length, from)) = socket.try_recv_from(&mut buffer) {
                let answer = buffer.get(..length).map(leasequery::answer);
                let Some(Ok(reply)) = answer else {
                    *refused += 1;
                    continue;
                };
                // From the server itself, with a number that it alone was told.
                let ours = open.get(&reply.xid).is_some_and(|asked| {
                    asked.about.is_answered_by(&reply)
                        && asked.about.segment() == *segment
                        && from == SocketAddr::from((asked.server, PORT))
                });
                // What does not fit closes no question: the answer may still come.
                let asked = if ours { open.remove(&reply.xid) } else { None };
                let Some(Asked { about, server, .. }) = asked else {
                    *refused += 1;
                    continue;
                };
                match about {
                    About::Address(key) => answers.push(Event::Queried {
                        key,
                        server,
                        answer: reply.answer,
                    }),
                    About::Mac(question) => {
                        let lease = buffer.get(..length).and_then(leasequery::lease);
                        leases.extend(lease.map(|lease| (question, lease)));
                    }
                }
            }
        }
        self.close_idle();
        for answer in answers {
            self.tell(answer).await;
        }
        for (question, lease) in leases {
            self.lease_told(question, lease).await;
        }
    }

    /// Gives up on what nobody answered.
    pub(super) async fn expire_queries(&mut self) {
        let now = clock::monotonic();
        if self.queries.open.values().all(|asked| asked.until > now) {
            return;
        }
        // An answer that waited for us has come in time.
        self.read_answers().await;
        let late = self
            .queries
            .open
            .extract_if(.., |_, asked| asked.until <= now);
        let late: Vec<Asked> = late.map(|(_, asked)| asked).collect();
        self.close_idle();
        for Asked { about, server, .. } in late {
            let key = match about {
                About::Address(key) => key,
                About::Mac(question) => {
                    self.census.ask_again(question);
                    continue;
                }
            };
            let answer = QueryAnswer::Silence;
            self.tell(Event::Queried {
                key,
                server,
                answer,
            })
            .await;
        }
    }

    /// The port is not ours to keep: a server or a relay may want it.
    fn close_idle(&mut self) {
        let Queries { sockets, open, .. } = &mut self.queries;
        sockets.retain(|segment, _| open.values().any(|asked| asked.about.segment() == *segment));
    }
}

/// Port 67 of the bridge's address: there the answers come to.
///
/// Whoever has it already keeps it: a socket bound more closely would take the renewals that are
/// meant for a server or a relay on this host. One that starts while ours is open may have it too.
fn open(bridge: IfIndex, from: Ipv4Addr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    let name = if_indextoname(bridge)?;
    socket.bind_device(Some(name.to_bytes()))?;
    socket.bind(&SocketAddrV4::new(from, PORT).into())?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket.into())
}
