//! The control socket: what people and programs may ask a running agent.

#![forbid(unsafe_code)]

mod client;
mod events;
mod order;
mod protocol;
mod server;
mod text;

pub use self::{
    client::{Client, ClientError},
    events::{EventFeed, EventLog},
    order::{
        Order, OrderAnswer, Ordered, PauseView, Peer, ProbeView, REASON_MAX, Refusal,
        ReleaseResult, ReleaseView, ResumeView, Which,
    },
    protocol::{
        BindingView, ErrorCode, EventView, ExplainView, GateView, ImportRequest, ImportView,
        LeaseEntry, LineError, PROTOCOL, Request, Response, StatsView, client_id_bytes,
        client_id_text, read_line,
    },
    server::{BindError, ControlRequest, ControlServer, ControlStats, REQUEST_QUEUE},
    text::{json_line, printable},
};
