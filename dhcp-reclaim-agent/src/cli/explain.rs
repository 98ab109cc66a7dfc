//! `explain`: why an address is, or is not, given back.

use std::{fmt::Write, net::Ipv4Addr};

use jiff::Timestamp;

use super::{
    Query, events, list, print,
    table::{Table, between, or_dash, short, word},
    unexpected,
};
use crate::{
    clock,
    control::{ExplainView, Request, Response, json_line, printable},
    core::Origin,
};

/// Tell why an address is, or is not, given back
///
/// With --json: an object a line for each binding of the address, mostly one.
#[derive(Debug, clap::Args)]
pub struct Args {
    ip: Ipv4Addr,
    #[command(flatten)]
    query: Query,
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    let mut text = String::new();
    let now = clock::wall();
    args.query
        .ask(&Request::Explain { ip: args.ip }, |answer| {
            let Response::Explain(view) = answer else {
                return Err(unexpected(&answer));
            };
            if args.query.json {
                writeln!(text, "{}", json_line(&view)?)?;
            } else {
                let gap = if text.is_empty() { "" } else { "\n" };
                write!(text, "{gap}{}", for_people(&view, now)?)?;
            }
            Ok(())
        })?;
    print(&text)
}

/// For the live view: nothing of it can fail, a String takes all that is written to it.
pub(super) fn text(views: &[ExplainView], now: Timestamp) -> String {
    let texts = views
        .iter()
        .map(|view| for_people(view, now).unwrap_or_default());
    texts.collect::<Vec<_>>().join("\n")
}

fn for_people(view: &ExplainView, now: Timestamp) -> Result<String, std::fmt::Error> {
    let binding = &view.binding;
    let vlan = binding
        .vlan
        .map(|vlan| format!(", VLAN {vlan}"))
        .unwrap_or_default();
    let mut text = String::new();
    let mut line = |name: &str, value: &str| writeln!(text, "{name:<10} {}", printable(value));
    line("address", &binding.ip.to_string())?;
    line("MAC", &binding.mac.to_string())?;
    line("client-id", &or_dash(binding.client_id.as_deref()))?;
    line(
        "port",
        &format!("{} on {}{vlan}", binding.port, binding.segment),
    )?;
    line("server", &or_dash(binding.server))?;
    line("lease", &list::lease(binding, now))?;
    let seen = binding
        .last_seen_at
        .map(|seen| format!("{} ago", short(between(seen, now))));
    line("seen", &seen.unwrap_or_else(|| "never".to_owned()))?;
    let outcome = binding
        .outcome
        .map(|outcome| format!(", {}", outcome.name()));
    let state = word(&binding.state) + &outcome.unwrap_or_default();
    line("state", &state)?;
    if binding.origin == Origin::Imported {
        line("origin", "imported: not seen on the wire")?;
    }
    line("verdict", &view.verdict)?;

    let mut gates = Table::new(&["GATE", "VERDICT", "WHY"]);
    for gate in &view.gates {
        gates.row([gate.gate.clone(), gate.verdict.clone(), gate.reason.clone()]);
    }
    write!(text, "\n{}", gates.text())?;
    if !view.history.is_empty() {
        text.push('\n');
        for event in &view.history {
            writeln!(text, "{}", events::line(event))?;
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::{BindingView, EventView, GateView},
        core::{MacAddr, NoticeKind, State},
    };

    #[test]
    fn says_which_gate_holds() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let ip = Ipv4Addr::new(10, 0, 0, 7);
        let view = ExplainView {
            binding: BindingView {
                ip,
                mac: MacAddr([2, 0, 0, 0, 0, 1]),
                client_id: None,
                server: Some(Ipv4Addr::new(10, 0, 0, 1)),
                server_mac: None,
                segment: "br0".to_owned(),
                vlan: Some(7),
                port: "vnet0".to_owned(),
                state: State::Gone,
                outcome: None,
                origin: Origin::Wire,
                lease_expires_at: None,
                last_seen_at: None,
            },
            verdict: "hold".to_owned(),
            gates: vec![GateView {
                gate: "hold-down".to_owned(),
                verdict: "hold".to_owned(),
                reason: "1 s of 2 s\u{1b}[0m".to_owned(),
            }],
            history: vec![EventView {
                ts: now,
                event: NoticeKind::PortLost,
                ip: Some(ip),
                mac: None,
                port: Some("vnet0".to_owned()),
                reason: "deleted".to_owned(),
            }],
        };
        assert_eq!(
            for_people(&view, now).unwrap(),
            "\
address    10.0.0.7
MAC        02:00:00:00:00:01
client-id  -
port       vnet0 on br0, VLAN 7
server     10.0.0.1
lease      forever
seen       never
state      gone
verdict    hold

GATE       VERDICT  WHY
hold-down  hold     1 s of 2 s\\u{1b}[0m

2023-11-14T22:13:20.000Z  port-lost       10.0.0.7  -  vnet0  deleted
"
        );
    }
}
