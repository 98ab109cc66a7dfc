//! The control socket: what people and programs may ask a running agent.

#![forbid(unsafe_code)]

mod client;
mod events;
mod protocol;
mod server;
mod text;

pub use self::{
    client::{Client, ClientError},
    events::{EventFeed, EventLog},
    protocol::{
        BindingView, ErrorCode, EventView, ExplainView, GateView, PROTOCOL, Request, Response,
        StatsView, client_id_text,
    },
    server::{BindError, ControlRequest, ControlServer, ControlStats, REQUEST_QUEUE},
    text::{json_line, printable},
};
