//! `list`: the bindings that the agent holds.

use std::{cmp::Reverse, fmt::Write, time::Duration};

use clap::ValueEnum;
use jiff::Timestamp;

use super::{
    Query, say,
    table::{Table, WIDTH, between, or_dash, short, word},
    terminal::{Style, repeat},
    unexpected,
};
use crate::{
    clock,
    control::{BindingView, PauseView, Request, Response, StatsView, json_line},
    core::{Origin, State},
    ports::Glob,
};

/// List the leases that the agent knows, and what became of each
///
/// LEASE is the time left, SEEN how long ago the VM last sent a frame. SERVER is left out where the
/// table would be wider than 80 columns. With --json: one array of bindings.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Order by this column
    #[arg(long, value_name = "COLUMN", default_value = "ip")]
    sort: Column,
    /// Only those in this state; may be repeated
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = state_parser())]
    state: Vec<String>,
    /// Only those of this port, by name or glob; may be repeated
    #[arg(long, value_name = "GLOB")]
    port: Vec<Glob>,
    #[command(flatten)]
    watch: Watch,
    #[command(flatten)]
    query: Query,
}

/// Show it again and again.
#[derive(Debug, clap::Args)]
pub struct Watch {
    /// Show it again after each of so many seconds, until Ctrl-C [default: 2]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=3600))]
    watch: Option<u32>,
}

impl Watch {
    pub fn every(&self) -> Option<Duration> {
        self.watch
            .map(|seconds| Duration::from_secs(seconds.into()))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Column {
    Ip,
    Mac,
    Server,
    Port,
    State,
    /// What ends first comes first.
    Lease,
    /// What was seen last comes first.
    Seen,
}

const STATES: [State; 10] = [
    State::Requested,
    State::Bound,
    State::Silent,
    State::Gone,
    State::Releasing,
    State::Released,
    State::Refused,
    State::Withdrawn,
    State::Expired,
    State::Moved,
];

/// The words of the column, of which one is no state of the core's: see [`state`].
fn state_parser() -> clap::builder::PossibleValuesParser {
    let states = STATES.map(State::name);
    clap::builder::PossibleValuesParser::new(states.into_iter().chain(["imported"]))
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    let style = Style::of_stdout();
    let every = args.watch.every();
    repeat(every, || {
        let mut bindings = Vec::new();
        args.query.ask(&Request::List, |answer| match answer {
            Response::Binding(binding) => {
                bindings.push(binding);
                Ok(())
            }
            other => Err(unexpected(&other)),
        })?;
        bindings.retain(|it| args.wants(it));
        sort(&mut bindings, args.sort);
        if args.query.json {
            return array(&bindings);
        }
        let held = held(&args.query)?;
        let mut text = String::new();
        // Where it is repeated it is part of what is shown; else it is no line of the table.
        match held {
            Some(held) if every.is_some() => text = format!("{}\n", style.yellow(&held)),
            Some(held) => say(&held)?,
            None => {}
        }
        if bindings.is_empty() {
            let nothing = args.state.is_empty() && args.port.is_empty();
            let nothing = if nothing {
                "no leases yet"
            } else {
                "no such leases"
            };
            match every {
                Some(_) => text.push_str(&format!("{nothing}\n")),
                None => say(nothing)?,
            }
            return Ok(text);
        }
        Ok(text + &table(&bindings, clock::wall(), style))
    })
}

impl Args {
    fn wants(&self, binding: &BindingView) -> bool {
        let state = self.state.is_empty() || self.state.contains(&state(binding));
        let port = self.port.is_empty() || self.port.iter().any(|it| it.matches(&binding.port));
        state && port
    }
}

/// What holds all releases of the node, in a line.
fn held(query: &Query) -> anyhow::Result<Option<String>> {
    let mut held = None;
    query.ask(&Request::Stats, |answer| {
        let Response::Stats(stats) = answer else {
            return Err(unexpected(&answer));
        };
        held = held_text(&stats);
        Ok(())
    })?;
    Ok(held)
}

fn held_text(stats: &StatsView) -> Option<String> {
    let pause = stats.paused.as_ref().map(PauseView::text);
    let breaker = stats.breaker_open_since;
    let what = pause.or(breaker.map(|at| format!("the breaker is open since {at:.0}")))?;
    let text = format!("{what}; nothing is released until `dhcp-reclaim resume`");
    Some(crate::control::printable(&text).into_owned())
}

fn sort(bindings: &mut [BindingView], column: Column) {
    // By address where the column says no more; that is how they come.
    bindings.sort_by_key(|it| it.ip);
    match column {
        Column::Ip => {}
        Column::Mac => bindings.sort_by_key(|it| it.mac),
        Column::Server => bindings.sort_by_key(|it| it.server),
        Column::Port => bindings.sort_by(|a, b| a.port.cmp(&b.port)),
        Column::State => bindings.sort_by_key(|it| it.state),
        Column::Lease => bindings.sort_by_key(|it| it.lease_expires_at.unwrap_or(Timestamp::MAX)),
        Column::Seen => bindings.sort_by_key(|it| Reverse(it.last_seen_at)),
    }
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

fn table(bindings: &[BindingView], now: Timestamp, style: Style) -> String {
    let full = columns(bindings, now, true);
    let table = if full.width() > WIDTH {
        columns(bindings, now, false)
    } else {
        full
    };
    table.painted(
        |cell| match STATES.iter().find(|state| state.name() == cell) {
            Some(State::Bound) => style.green(cell),
            Some(State::Silent | State::Gone | State::Releasing) => style.yellow(cell),
            _ => cell.to_owned(),
        },
    )
}

fn columns(bindings: &[BindingView], now: Timestamp, server: bool) -> Table {
    let heads = ["IP", "MAC", "SERVER", "PORT", "STATE", "LEASE", "SEEN"];
    let shown = |column: &usize| server || *column != 2;
    let heads: Vec<&str> = (0..heads.len()).filter(shown).map(|at| heads[at]).collect();
    let mut table = Table::new(&heads);
    for binding in bindings {
        let cells = [
            binding.ip.to_string(),
            binding.mac.to_string(),
            or_dash(binding.server),
            or_dash(Some(&binding.port).filter(|port| !port.is_empty())),
            state(binding),
            lease(binding, now),
            or_dash(binding.last_seen_at.map(|seen| short(between(seen, now)))),
        ];
        let cells = cells.into_iter().enumerate();
        table.row(
            cells
                .filter(|(column, _)| shown(column))
                .map(|(_, cell)| cell),
        );
    }
    table
}

/// A lease that was only told of is not `requested` by anybody here.
fn state(binding: &BindingView) -> String {
    match (binding.origin, binding.state) {
        (Origin::Imported, State::Requested) => word(&Origin::Imported),
        (Origin::Wire | Origin::Imported, state) => word(&state),
    }
}

/// Time left of the lease.
pub(super) fn lease(binding: &BindingView, now: Timestamp) -> String {
    time_left(binding.lease_expires_at, binding.state, now)
}

pub(super) fn time_left(expires: Option<Timestamp>, state: State, now: Timestamp) -> String {
    match expires {
        Some(expires) if expires <= now => "over".to_owned(),
        Some(expires) => short(between(now, expires)),
        None if state == State::Requested => "-".to_owned(),
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
            origin: Origin::Wire,
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
        let told = BindingView {
            state: State::Requested,
            origin: Origin::Imported,
            port: String::new(),
            last_seen_at: None,
            ..binding()
        };
        let text = table(&[binding(), asked, told], now, Style::PLAIN);
        assert_eq!(
            text,
            "\
IP               MAC                PORT    STATE      LEASE  SEEN
192.168.122.207  52:54:00:12:34:56  vnet12  bound      9m     3s
192.168.122.207  52:54:00:12:34:56  vnet12  requested  -      3s
192.168.122.207  52:54:00:12:34:56  -       imported   9m     -
"
        );
        let text = table(&[binding()], now, Style::PLAIN);
        assert_eq!(
            text,
            "\
IP               MAC                SERVER         PORT    STATE  LEASE  SEEN
192.168.122.207  52:54:00:12:34:56  192.168.122.1  vnet12  bound  9m     3s
"
        );
    }

    #[test]
    fn a_table_too_wide_leaves_the_server_out() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let wide = BindingView {
            port: "tap-0123456789a".to_owned(),
            state: State::Requested,
            ..binding()
        };
        let text = table(&[wide], now, Style::PLAIN);
        assert!(!text.contains("SERVER"), "{text}");
        let longest = text.lines().map(|line| line.chars().count()).max();
        assert!(longest.unwrap() <= WIDTH, "{text}");
    }

    #[test]
    fn columns_sort_and_filters_choose() {
        let with = |last: u8, port: &str, state, seen: i64| BindingView {
            ip: Ipv4Addr::new(10, 0, 0, last),
            port: port.to_owned(),
            state,
            last_seen_at: Some(Timestamp::from_second(seen).unwrap()),
            ..binding()
        };
        let mut bindings = vec![
            with(10, "vnet1", State::Gone, 3),
            with(9, "vnet2", State::Bound, 1),
            with(11, "tap0", State::Bound, 2),
        ];
        let told = BindingView {
            origin: Origin::Imported,
            ..with(12, "", State::Requested, 4)
        };
        let mut order = |column| {
            sort(&mut bindings, column);
            bindings
                .iter()
                .map(|it| it.ip.octets()[3])
                .collect::<Vec<_>>()
        };
        assert_eq!(order(Column::Ip), [9, 10, 11], "by number, not by letters");
        assert_eq!(order(Column::Port), [11, 10, 9]);
        assert_eq!(order(Column::State), [9, 11, 10]);
        assert_eq!(order(Column::Seen), [10, 11, 9]);
        assert_eq!(order(Column::Lease), [9, 10, 11]);

        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let wanted = |words: &[&str]| {
            let args = <Line as clap::Parser>::parse_from([&["list"], words].concat()).args;
            let all = bindings.iter().chain([&told]);
            let wanted = all.filter(|it| args.wants(it));
            wanted.map(|it| it.ip.octets()[3]).collect::<Vec<_>>()
        };
        assert_eq!(wanted(&[]), [9, 10, 11, 12]);
        assert_eq!(wanted(&["--state", "imported"]), [12]);
        assert_eq!(wanted(&["--state", "requested"]), [0_u8; 0]);
        assert_eq!(wanted(&["--state", "gone"]), [10]);
        assert_eq!(
            wanted(&["--state", "gone,bound", "--port", "vnet*"]),
            [9, 10]
        );
        assert_eq!(wanted(&["--port", "tap0"]), [11]);
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
