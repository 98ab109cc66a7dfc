//! `list`: the bindings that the agent holds.

use std::fmt::Write;

use jiff::Timestamp;

use super::{
    Query, print, say,
    table::{Table, between, or_dash, short, word},
    unexpected,
};
use crate::{
    clock,
    control::{BindingView, Request, Response, json_line},
    core::State,
};

/// List the leases that the agent knows, and what became of each
///
/// LEASE is the time left, SEEN how long ago the VM last sent a frame. With --json: one array of
/// bindings.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    query: Query,
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    let mut bindings = Vec::new();
    args.query.ask(&Request::List, |answer| match answer {
        Response::Binding(binding) => {
            bindings.push(binding);
            Ok(())
        }
        other => Err(unexpected(&other)),
    })?;
    if args.query.json {
        return print(&array(&bindings)?);
    }
    if bindings.is_empty() {
        return say("no leases yet");
    }
    print(&text(&bindings, clock::wall()))
}

/// A binding a line, so that line tools can be used too.
fn array(bindings: &[BindingView]) -> anyhow::Result<String> {
    let mut text = "[".to_owned();
    for (index, binding) in bindings.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        write!(text, "{comma}\n{}", json_line(binding)?)?;
    }
    text.push_str("\n]\n");
    Ok(text)
}

fn text(bindings: &[BindingView], now: Timestamp) -> String {
    let mut table = Table::new(&["IP", "MAC", "SERVER", "PORT", "STATE", "LEASE", "SEEN"]);
    for binding in bindings {
        table.row([
            binding.ip.to_string(),
            binding.mac.to_string(),
            or_dash(binding.server),
            binding.port.clone(),
            word(&binding.state),
            lease(binding, now),
            or_dash(binding.last_seen_at.map(|seen| short(between(seen, now)))),
        ]);
    }
    table.text()
}

/// Time left of the lease.
pub(super) fn lease(binding: &BindingView, now: Timestamp) -> String {
    match binding.lease_expires_at {
        Some(expires) if expires <= now => "over".to_owned(),
        Some(expires) => short(between(now, expires)),
        None if binding.state == State::Requested => "-".to_owned(),
        None => "forever".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::{control::client_id_text, core::MacAddr};

    fn binding() -> BindingView {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        BindingView {
            ip: Ipv4Addr::new(192, 168, 122, 207),
            mac: MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            client_id: Some(client_id_text(&[1, 2])),
            server: Some(Ipv4Addr::new(192, 168, 122, 1)),
            server_mac: None,
            segment: "virbr0".to_owned(),
            vlan: None,
            port: "vnet12".to_owned(),
            state: State::Bound,
            outcome: None,
            lease_expires_at: Some(now + jiff::SignedDuration::from_secs(599)),
            last_seen_at: Some(now - jiff::SignedDuration::from_secs(3)),
        }
    }

    #[test]
    fn fits_a_terminal() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let asked = BindingView {
            state: State::Requested,
            outcome: None,
            lease_expires_at: None,
            ..binding()
        };
        let text = text(&[binding(), asked], now);
        assert_eq!(
            text,
            "\
IP               MAC                SERVER         PORT    STATE      LEASE  SEEN
192.168.122.207  52:54:00:12:34:56  192.168.122.1  vnet12  bound      9m     3s
192.168.122.207  52:54:00:12:34:56  192.168.122.1  vnet12  requested  -      3s
"
        );
    }

    #[test]
    fn json_is_one_array() {
        for count in 0..3 {
            let text = array(&vec![binding(); count]).unwrap();
            let read: Vec<BindingView> = serde_json::from_str(&text).unwrap();
            assert_eq!(read, vec![binding(); count]);
        }
    }
}
