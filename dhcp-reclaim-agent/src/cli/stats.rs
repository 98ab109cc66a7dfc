//! `stats`: the agent's figures.

use super::{
    Query,
    list::Watch,
    table::{Table, word},
    terminal::repeat,
    unexpected,
};
use crate::control::{PauseView, Request, Response, StatsView, json_line};

/// Print the agent's figures
///
/// With --json: one object.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    watch: Watch,
    #[command(flatten)]
    query: Query,
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    repeat(args.watch.every(), || {
        let mut text = String::new();
        args.query.ask(&Request::Stats, |answer| {
            let Response::Stats(stats) = answer else {
                return Err(unexpected(&answer));
            };
            text = if args.query.json {
                json_line(&stats)? + "\n"
            } else {
                for_people(&stats)
            };
            Ok(())
        })?;
        Ok(text)
    })
}

fn for_people(stats: &StatsView) -> String {
    let mut table = Table::new(&["WHAT", "VALUE"]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("version", stats.version.clone());
    row("started", format!("{:.0}", stats.started_at));
    row(
        "dry run",
        if stats.dry_run { "yes" } else { "no" }.to_owned(),
    );
    row(
        "paused",
        stats
            .paused
            .as_ref()
            .map_or_else(|| "no".to_owned(), PauseView::text),
    );
    row(
        "breaker",
        stats
            .breaker_open_since
            .map_or_else(|| "closed".to_owned(), |at| format!("open since {at:.0}")),
    );
    row("bridges", stats.bridges.join(" "));
    row("ports", stats.ports.to_string());
    for (state, count) in &stats.bindings {
        row(&format!("bindings {}", word(state)), count.to_string());
    }
    for (name, count) in &stats.counters {
        row(name, count.to_string());
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use jiff::Timestamp;

    use super::*;
    use crate::core::State;

    #[test]
    fn a_figure_a_line() {
        let stats = StatsView {
            version: "0.1.0".to_owned(),
            started_at: Timestamp::from_second(1_700_000_000).unwrap(),
            dry_run: true,
            bridges: vec!["br0".to_owned()],
            ports: 3,
            paused: None,
            breaker_open_since: None,
            bindings: BTreeMap::from([(State::Bound, 2)]),
            counters: BTreeMap::from([("ring_full".to_owned(), 0)]),
        };
        assert_eq!(
            for_people(&stats),
            "\
WHAT            VALUE
version         0.1.0
started         2023-11-14T22:13:20Z
dry run         yes
paused          no
breaker         closed
bridges         br0
ports           3
bindings bound  2
ring_full       0
"
        );
    }
}
