//! The words on the control socket: one JSON line asks, JSON lines answer. Names are a contract.

use std::{collections::BTreeMap, net::Ipv4Addr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{PauseView, ProbeView, ReleaseView, ResumeView, Which};
use crate::{
    core::{MacAddr, NoticeKind, Origin, Outcome, State, Vlan, gates::Gate},
    leasefile::{Lease, Place},
};

/// Version of the protocol, in each line as `v`. New fields do not change it.
pub const PROTOCOL: u32 = 1;

/// What may be asked; one line a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Every binding.
    List,
    /// Why the bindings of an address are what they are.
    Explain {
        ip: Ipv4Addr,
    },
    /// What happened of late, and with `follow` what happens from now on.
    Events {
        #[serde(default)]
        follow: bool,
    },
    Stats,
    /// Hold all releases.
    Pause {
        #[serde(default)]
        reason: Option<String>,
    },
    /// End that hold, and close the breaker.
    Resume,
    /// Ask the VM now.
    Probe(Which),
    /// Take the steps towards a release early.
    Release {
        #[serde(flatten)]
        which: Which,
        /// Gates to override.
        #[serde(default)]
        force: Vec<Gate>,
    },
    /// Leases that were not seen on the wire; what the wire has said is better.
    Import(ImportRequest),
}

/// Leases of one place, as a server keeps them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportRequest {
    /// `None`: the only one that is followed.
    pub bridge: Option<String>,
    #[serde(default)]
    pub vlan: Vlan,
    pub server: Option<Ipv4Addr>,
    #[serde(default)]
    pub server_mac: Option<MacAddr>,
    pub leases: Vec<LeaseEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseEntry {
    pub ip: Ipv4Addr,
    pub mac: MacAddr,
    /// Option 61, hexadecimal with colons.
    #[serde(default)]
    pub client_id: Option<String>,
    /// `None`: never.
    pub expires_at: Option<Timestamp>,
}

impl ImportRequest {
    pub fn of(place: &Place) -> Self {
        Self {
            bridge: place.bridge.clone(),
            vlan: place.vlan,
            server: place.server,
            server_mac: place.server_mac,
            leases: Vec::new(),
        }
    }
}

impl From<Lease> for LeaseEntry {
    fn from(lease: Lease) -> Self {
        Self {
            ip: lease.ip,
            mac: lease.mac,
            client_id: lease.client_id.as_deref().map(client_id_text),
            expires_at: lease.expires,
        }
    }
}

/// One line of an answer. All answers but a broken one end with `end` or `error`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Response {
    Binding(BindingView),
    Explain(ExplainView),
    Event(EventView),
    /// So many events were not sent because the reader was too slow; the answer ends.
    Lost {
        count: u64,
    },
    Stats(StatsView),
    Imported(ImportView),
    Paused(PauseView),
    Resumed(ResumeView),
    Probed(ProbeView),
    Release(ReleaseView),
    End,
    Error {
        code: ErrorCode,
        message: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// Not a request of this protocol version.
    BadRequest,
    NotFound,
    /// Too many clients.
    Busy,
    /// The agent did not answer in time, or is stopping.
    Unavailable,
    /// Only root, and who owns the agent, may ask for this.
    Denied,
}

/// A line as it travels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Line<T> {
    pub v: u32,
    #[serde(flatten)]
    pub body: T,
}

/// Why a line is not of this protocol.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    #[error("protocol version {0}; this agent speaks {PROTOCOL}")]
    Version(u32),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Reads a [`Request`] or a [`Response`]: the version first, since another one may say anything.
pub fn read_line<T: DeserializeOwned>(line: &[u8]) -> Result<T, LineError> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    match serde_json::from_slice(line)? {
        Version { v: PROTOCOL } => {}
        Version { v } => return Err(LineError::Version(v)),
    }
    Ok(serde_json::from_slice::<Line<T>>(line)?.body)
}

/// A binding, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindingView {
    pub ip: Ipv4Addr,
    pub mac: MacAddr,
    /// Option 61, hexadecimal with colons.
    pub client_id: Option<String>,
    pub server: Option<Ipv4Addr>,
    pub server_mac: Option<MacAddr>,
    /// The bridge's name.
    pub segment: String,
    /// `None`: untagged.
    pub vlan: Option<Vlan>,
    /// The port's name.
    pub port: String,
    pub state: State,
    /// What the server made of the RELEASE; `None` if none was sent.
    #[serde(default)]
    pub outcome: Option<Outcome>,
    /// How the lease came to be known.
    #[serde(default)]
    pub origin: Origin,
    /// `None`: infinite, or not yet granted.
    pub lease_expires_at: Option<Timestamp>,
    pub last_seen_at: Option<Timestamp>,
}

/// What became of leases that were told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportView {
    /// Their VMs are looked for.
    pub taken: u64,
    /// The wire has said more of the address.
    pub known: u64,
    /// Their time has run out.
    pub over: u64,
    /// No station can have that MAC, address or client-id, or there is no room.
    pub refused: u64,
}

/// One line of `events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventView {
    pub ts: Timestamp,
    pub event: NoticeKind,
    pub ip: Option<Ipv4Addr>,
    pub mac: Option<MacAddr>,
    pub port: Option<String>,
    pub reason: String,
}

/// What a gate says about a binding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateView {
    /// Name as in DESIGN.md section 4.
    pub gate: String,
    /// `pass`, `hold`, `forget`, ...
    pub verdict: String,
    pub reason: String,
}

/// Why a binding is, or is not, released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainView {
    pub binding: BindingView,
    /// Of all gates together: `release`, `hold`, ...
    pub verdict: String,
    pub gates: Vec<GateView>,
    /// Events of the address that are still remembered, oldest first.
    pub history: Vec<EventView>,
}

/// Figures of the agent. Values only ever gain names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsView {
    /// Of the agent.
    pub version: String,
    pub started_at: Timestamp,
    pub dry_run: bool,
    pub bridges: Vec<String>,
    pub ports: u64,
    /// A person holds all releases.
    #[serde(default)]
    pub paused: Option<PauseView>,
    /// The breaker holds all releases.
    #[serde(default)]
    pub breaker_open_since: Option<Timestamp>,
    /// Bindings by state.
    pub bindings: BTreeMap<State, u64>,
    /// `kernel.*` by the kernel half, `core.*` by the decisions, `agent.*` by the loop.
    #[serde(flatten)]
    pub counters: BTreeMap<String, u64>,
}

/// Option 61 as [`BindingView::client_id`] has it.
pub fn client_id_text(bytes: &[u8]) -> String {
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    hex.join(":")
}

/// The bytes of such a text; `None`: it is none, or too long for one option.
pub fn client_id_bytes(text: &str) -> Option<Vec<u8>> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| {
            let digits = byte.len() == 2 && byte.bytes().all(|digit| digit.is_ascii_hexdigit());
            digits.then(|| u8::from_str_radix(byte, 16).ok()).flatten()
        })
        .collect();
    bytes.filter(|bytes| bytes.len() <= 255)
}

#[cfg(test)]
pub(super) mod fixtures {
    use super::*;

    pub fn time(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    pub fn binding() -> BindingView {
        BindingView {
            ip: Ipv4Addr::new(10, 0, 0, 7),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            client_id: Some(client_id_text(&[1, 2, 0, 0, 0, 0, 1])),
            server: Some(Ipv4Addr::new(10, 0, 0, 1)),
            server_mac: Some(MacAddr([2, 0, 0, 0, 0, 0x53])),
            segment: "br0".to_owned(),
            vlan: None,
            port: "vnet0".to_owned(),
            state: State::Bound,
            outcome: None,
            origin: Origin::Wire,
            lease_expires_at: Some(time(600)),
            last_seen_at: Some(time(-3)),
        }
    }

    pub fn event(reason: &str) -> EventView {
        EventView {
            ts: time(0),
            event: NoticeKind::Bound,
            ip: Some(Ipv4Addr::new(10, 0, 0, 7)),
            mac: Some(MacAddr([2, 0, 0, 0, 0, 1])),
            port: Some("vnet0".to_owned()),
            reason: reason.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_a_contract() {
        let line = Line {
            v: PROTOCOL,
            body: Response::Binding(fixtures::binding()),
        };
        assert_eq!(
            serde_json::to_string(&line).unwrap(),
            r#"{"v":1,"kind":"binding","ip":"10.0.0.7","mac":"02:00:00:00:00:01","client_id":"01:02:00:00:00:00:01","server":"10.0.0.1","server_mac":"02:00:00:00:00:53","segment":"br0","vlan":null,"port":"vnet0","state":"bound","outcome":null,"origin":"wire","lease_expires_at":"2023-11-14T22:23:20Z","last_seen_at":"2023-11-14T22:13:17Z"}"#
        );
        let line = Line {
            v: PROTOCOL,
            body: Response::Event(fixtures::event("ACK, 600 s")),
        };
        assert_eq!(
            serde_json::to_string(&line).unwrap(),
            r#"{"v":1,"kind":"event","ts":"2023-11-14T22:13:20Z","event":"bound","ip":"10.0.0.7","mac":"02:00:00:00:00:01","port":"vnet0","reason":"ACK, 600 s"}"#
        );
    }

    #[test]
    fn requests_are_read() {
        for (line, expected) in [
            (r#"{"v":1,"request":"list"}"#, Request::List),
            (
                r#"{"v":1,"request":"events"}"#,
                Request::Events { follow: false },
            ),
            (
                r#"{"v":1,"request":"events","follow":true}"#,
                Request::Events { follow: true },
            ),
            (
                r#"{"v":1,"request":"explain","ip":"10.0.0.7"}"#,
                Request::Explain {
                    ip: Ipv4Addr::new(10, 0, 0, 7),
                },
            ),
            (r#"{"v":1,"request":"stats"}"#, Request::Stats),
            (
                r#"{"v":1,"request":"import","bridge":"br0","server":"10.0.0.1","leases":[{"ip":"10.0.0.7","mac":"02:00:00:00:00:01","client_id":"01:02","expires_at":"2023-11-14T22:13:20Z"}]}"#,
                Request::Import(ImportRequest {
                    bridge: Some("br0".to_owned()),
                    vlan: 0,
                    server: Some(Ipv4Addr::new(10, 0, 0, 1)),
                    server_mac: None,
                    leases: vec![LeaseEntry {
                        ip: Ipv4Addr::new(10, 0, 0, 7),
                        mac: MacAddr([2, 0, 0, 0, 0, 1]),
                        client_id: Some("01:02".to_owned()),
                        expires_at: Some(fixtures::time(0)),
                    }],
                }),
            ),
            (r#"{"v":1,"request":"resume"}"#, Request::Resume),
            (
                r#"{"v":1,"request":"pause"}"#,
                Request::Pause { reason: None },
            ),
            (
                r#"{"v":1,"request":"probe","ip":"10.0.0.7"}"#,
                Request::Probe(Which {
                    ip: Ipv4Addr::new(10, 0, 0, 7),
                    bridge: None,
                    vlan: None,
                }),
            ),
            (
                r#"{"v":1,"request":"release","ip":"10.0.0.7","vlan":5,"force":["hold-down"]}"#,
                Request::Release {
                    which: Which {
                        ip: Ipv4Addr::new(10, 0, 0, 7),
                        bridge: None,
                        vlan: Some(5),
                    },
                    force: vec![Gate::HoldDown],
                },
            ),
        ] {
            let read: Line<Request> = serde_json::from_str(line).unwrap();
            assert_eq!(read.body, expected);
        }
    }

    #[test]
    fn stats_go_there_and_back() {
        let stats = StatsView {
            version: "0.1.0".to_owned(),
            started_at: fixtures::time(0),
            dry_run: false,
            bridges: vec!["br0".to_owned()],
            ports: 3,
            paused: None,
            breaker_open_since: Some(fixtures::time(1)),
            bindings: BTreeMap::from([(State::Bound, 2), (State::Gone, 1)]),
            counters: BTreeMap::from([("dhcp".to_owned(), 9)]),
        };
        let line = Line {
            v: PROTOCOL,
            body: Response::Stats(stats),
        };
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(serde_json::from_str::<Line<Response>>(&text).unwrap(), line);
    }
}
