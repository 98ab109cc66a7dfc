//! A lease as the wire showed it, and what is known about the life behind it.

use std::{net::Ipv4Addr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    engine::Vigil,
    gates::Gate,
    types::{
        Direction, Evidence, IfIndex, Key, MacAddr, Message, MessageType, PortLoss, Role, State,
        Time,
    },
};

/// How much longer than "never" an infinite lease lasts (RFC 2131 section 3.3).
const INFINITE: u32 = u32::MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    pub key: Key,
    pub chaddr: MacAddr,
    /// Option 61, verbatim.
    pub client_id: Option<Vec<u8>>,
    /// Option 54, or the destination of a unicast REQUEST.
    pub server: Option<Ipv4Addr>,
    pub server_mac: Option<MacAddr>,
    pub port: IfIndex,
    /// The port's name, also after the port is gone.
    pub port_name: String,
    pub state: State,
    pub origin: Origin,
    /// A server's ACK made it.
    pub acked: bool,
    /// The address itself was the source of a frame at its own port.
    pub seen_alive: bool,
    /// Another MAC was seen to hold this very lease while its first owner lived (clones of one
    /// image, one client-id): whose death it is cannot be told.
    pub shared: bool,
    /// Why what we know of it may not be what the server knows.
    pub doubt: Option<Doubt>,
    /// When the lease ends; `None` is never, or not known.
    pub expires: Option<Time>,
    /// When a binding that only a REQUEST made is given up.
    pub tentative_until: Option<Time>,
    pub last_seen: Option<Time>,
    /// It spoke at a port that was not heard, by then.
    pub unheard_at: Option<Time>,
    pub since: Time,
    /// When it fell silent, or its port was lost, if nothing was heard of it since.
    pub silent_at: Option<Time>,
    pub check: Check,
    /// When the engine wants to look at it again.
    pub due: Option<Time>,
    /// The latest answer to a look, while it is being watched.
    pub evidence: Option<Box<(Time, Evidence)>>,
    /// The gate that held its release last.
    pub held_by: Option<Gate>,
    /// The kernel dropped its RELEASE, and the reason has not been looked at yet.
    pub vetoed: bool,
    /// RELEASEs that could not be sent.
    pub failures: u32,
    /// Its place in the queue for its server's pace.
    pub turn: Option<Time>,
    /// What is known of its RELEASE, once one left.
    pub outcome: Option<Outcome>,
    /// For as long as its address is looked after, once released.
    pub vigil: Option<Vigil>,
    /// Whose address it was before, if that lease was released and nobody knows with what outcome.
    pub after: Option<MacAddr>,
    /// It was alive after its release, and that has been told.
    pub alarmed: bool,
}

/// How a lease came to be known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Its DHCP was heard.
    #[default]
    Wire,
    /// Somebody told us: a lease file, or the server when it was asked.
    Imported,
}

/// What the server made of a RELEASE, which it does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Nothing is known.
    Unverified,
    /// The address is free, or somebody else has it.
    Verified,
    /// The server says that the lease is active as before.
    Ignored,
}

impl Outcome {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unverified => "unverified",
            Self::Verified => "verified",
            Self::Ignored => "ignored",
        }
    }
}

/// Why a binding is not certain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doubt {
    /// A message about it may read differently at the server.
    Ambiguous,
    /// Records of its port were lost at this time.
    RecordsLost(Time),
    /// Another port claimed its address or its MAC at this time.
    Conflict(Time),
    /// The server leased it to its MAC at another port too, while its own was up; or it was found at
    /// another port where nobody had listened. Only an ACK ends it.
    Contested,
}

/// The search for a sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// No question is open.
    Idle,
    /// The cheap question: did anything come in by the port?
    Glancing,
    /// The address and its MAC are armed in WATCH.
    Watching(Watching),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watching {
    /// Every frame since then was counted.
    pub armed_at: Time,
    /// The port is gone since then.
    pub lost: Option<(Time, PortLoss)>,
    /// Probes that left since `armed_at`.
    pub probes: u32,
    /// When the latest of them left.
    pub probed_at: Option<Time>,
    /// When the latest two left that went to everybody, whoever has the address by now.
    pub all_asked: [Option<Time>; 2],
    /// The one that leaves now goes to everybody.
    pub asking_all: bool,
    /// Every port of the segment is watched, and probes go into the segment too.
    pub everywhere: bool,
    /// It may have started elsewhere unheard: the uplink was not heard after a probe, or no agent
    /// ran when it was last to be seen.
    pub deaf: bool,
    /// Its port is gone, and what was seen elsewhere until then has not been looked at yet.
    pub closing: bool,
    /// It is to begin anew, once what was seen until now has been looked at.
    pub anew: bool,
}

impl Binding {
    /// Nothing is known of it but whose it is, and nothing is being done about it.
    pub fn new(key: Key, chaddr: MacAddr, since: Time) -> Self {
        Self {
            key,
            chaddr,
            client_id: None,
            server: None,
            server_mac: None,
            port: 0,
            port_name: String::new(),
            state: State::Requested,
            origin: Origin::Wire,
            acked: false,
            seen_alive: false,
            shared: false,
            doubt: None,
            expires: None,
            tentative_until: None,
            last_seen: None,
            unheard_at: None,
            since,
            silent_at: None,
            check: Check::Idle,
            due: None,
            evidence: None,
            held_by: None,
            vetoed: false,
            failures: 0,
            turn: None,
            outcome: None,
            vigil: None,
            after: None,
            alarmed: false,
        }
    }

    /// Somebody has it: the server's ACK was seen, or the VM at its own port.
    pub fn is_known(&self) -> bool {
        self.acked || self.seen_alive
    }

    /// Whether a VM may still live behind it, so that it counts for the node.
    pub fn is_live(&self) -> bool {
        match self.state {
            State::Requested | State::Bound | State::Silent | State::Gone | State::Releasing => {
                true
            }
            State::Released | State::Refused | State::Withdrawn | State::Expired | State::Moved => {
                false
            }
        }
    }

    /// One that has ended is remembered for as long as its VM may ask for the lease again and must
    /// then not be taken for its only owner.
    pub fn kept_until(&self) -> Option<Time> {
        self.expires.filter(|_| self.shared)
    }

    /// Whether what came by the uplink may not have been heard.
    pub fn was_deaf(&self) -> bool {
        matches!(self.check, Check::Watching(watching) if watching.deaf)
    }

    /// Known by hearsay only: its VM was not seen here.
    pub fn is_hearsay(&self) -> bool {
        self.origin == Origin::Imported && !self.seen_alive
    }

    pub fn lost(&self) -> Option<(Time, PortLoss)> {
        match self.check {
            Check::Watching(watching) => watching.lost,
            Check::Idle | Check::Glancing => None,
        }
    }
}

/// When a lease of `secs` that was granted at `granted` ends; `None` is never.
pub fn lease_end(granted: Time, secs: u32) -> Option<Time> {
    (secs != INFINITE).then(|| granted + Duration::from_secs(secs.into()))
}

/// What a client asks for (RFC 2131 section 4.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    Selecting {
        ip: Ipv4Addr,
        server: Ipv4Addr,
    },
    InitReboot {
        ip: Ipv4Addr,
    },
    Renewing {
        ip: Ipv4Addr,
        server: Ipv4Addr,
    },
    Rebinding {
        ip: Ipv4Addr,
    },
    /// DISCOVER with rapid commit (RFC 4039): the address is the server's to choose.
    RapidCommit,
}

impl Ask {
    /// `None`: not a question that an ACK could answer with a lease.
    pub fn of(message: &Message) -> Option<Self> {
        if message.kind == MessageType::Discover {
            return message.rapid_commit.then_some(Self::RapidCommit);
        }
        if message.kind != MessageType::Request {
            return None;
        }
        match (message.ciaddr, message.requested_ip, message.server_id) {
            (None, Some(ip), Some(server)) => Some(Self::Selecting { ip, server }),
            (None, Some(ip), None) => Some(Self::InitReboot { ip }),
            (Some(ip), None, None) if message.destination_ip.is_broadcast() => {
                Some(Self::Rebinding { ip })
            }
            (Some(ip), None, None) => Some(Self::Renewing {
                ip,
                server: message.destination_ip,
            }),
            // Some clients repeat ciaddr as option 50, or name the server while they renew.
            (Some(ip), asked, _) if asked.is_none_or(|asked| asked == ip) => {
                Some(Self::Rebinding { ip })
            }
            _ => None,
        }
    }

    pub fn ip(self) -> Option<Ipv4Addr> {
        match self {
            Self::Selecting { ip, .. }
            | Self::InitReboot { ip }
            | Self::Renewing { ip, .. }
            | Self::Rebinding { ip } => Some(ip),
            Self::RapidCommit => None,
        }
    }

    pub fn server(self) -> Option<Ipv4Addr> {
        match self {
            Self::Selecting { server, .. } | Self::Renewing { server, .. } => Some(server),
            Self::InitReboot { .. } | Self::Rebinding { .. } | Self::RapidCommit => None,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Selecting { .. } => "SELECTING",
            Self::InitReboot { .. } => "INIT-REBOOT",
            Self::Renewing { .. } => "RENEWING",
            Self::Rebinding { .. } => "REBINDING",
            Self::RapidCommit => "rapid commit",
        }
    }
}

/// Whose word a message is, and so whom it can be about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// A VM, by its own port: believed about itself.
    Vm,
    /// A server, on its way to a VM's port.
    ServerToVm,
    /// Somebody beyond an uplink.
    Beyond,
    /// A VM that plays the server, or a server where nobody said that one is.
    RogueServer,
    /// A VM that speaks in another's name.
    Impostor,
}

impl Speaker {
    pub fn of(message: &Message) -> Self {
        let from_server = match message.kind {
            MessageType::Offer | MessageType::Ack | MessageType::Nak => true,
            MessageType::Discover
            | MessageType::Request
            | MessageType::Decline
            | MessageType::Release
            | MessageType::Inform => false,
        };
        match (message.role, message.direction, from_server) {
            (Role::Vm, Direction::ToPort, true) => Self::ServerToVm,
            (Role::Vm | Role::Aside, Direction::FromPort, true) => Self::RogueServer,
            (Role::Vm, Direction::FromPort, false) if message.source_mac == message.chaddr => {
                Self::Vm
            }
            (Role::Vm, _, false) | (Role::Aside, _, _) => Self::Impostor,
            (Role::Uplink, _, _) => Self::Beyond,
        }
    }
}
