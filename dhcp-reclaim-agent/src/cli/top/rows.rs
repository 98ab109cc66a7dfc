//! The bindings as a table: what is shown of each, filtered and sorted.

use std::{cmp::Ordering, net::Ipv4Addr};

use jiff::Timestamp;

use crate::{
    cli::{list, table::word},
    control::{BindingView, printable},
    core::{Outcome, State, Vlan},
};

/// A binding, with what is looked for in it. Guests have a hand in its texts: all are harmless here.
#[derive(Clone, Debug)]
pub struct Row {
    pub ip: Ipv4Addr,
    pub vlan: Option<Vlan>,
    pub segment: String,
    pub mac: String,
    pub port: String,
    pub state: State,
    pub shown_state: String,
    pub expires: Option<Timestamp>,
    pub seen: Option<Timestamp>,
    text: String,
}

/// What tells one row from another.
pub type Id = (String, Option<Vlan>, Ipv4Addr);

impl Row {
    pub fn new(binding: &BindingView) -> Self {
        let (segment, port) = (printable(&binding.segment), printable(&binding.port));
        let mac = binding.mac.to_string();
        let ip = binding.ip;
        let state = word(&binding.state);
        let shown_state = match binding.outcome {
            Some(outcome @ (Outcome::Verified | Outcome::Ignored)) => outcome.name().to_owned(),
            Some(Outcome::Unverified) | None => state.clone(),
        };
        let text = format!("{ip} {mac} {port} {segment} {state} {shown_state}").to_lowercase();
        Self {
            ip,
            vlan: binding.vlan,
            segment: segment.into_owned(),
            mac,
            port: port.into_owned(),
            state: binding.state,
            shown_state,
            expires: binding.lease_expires_at,
            seen: binding.last_seen_at,
            text,
        }
    }

    pub fn id(&self) -> Id {
        (self.segment.clone(), self.vlan, self.ip)
    }

    /// Where it is, as far as it does not go without saying.
    pub fn place(&self, several_bridges: bool) -> String {
        let mut place = self.port.clone();
        if let Some(vlan) = self.vlan {
            place.push_str(&format!(".{vlan}"));
        }
        if several_bridges {
            place.push_str(&format!(" {}", self.segment));
        }
        place
    }

    /// All words of the filter, in any order.
    fn matches(&self, words: &[String]) -> bool {
        words.iter().all(|word| self.text.contains(word.as_str()))
    }

    pub fn lease(&self, now: Timestamp) -> String {
        list::time_left(self.expires, self.state, now)
    }
}

/// What comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// What is about to be released, then what is silent, the longest first.
    #[default]
    Urgent,
    Address,
    Port,
    /// Those that end soonest.
    Lease,
    /// Those that were heard longest ago.
    Seen,
}

impl Sort {
    pub fn next(self) -> Self {
        match self {
            Self::Urgent => Self::Address,
            Self::Address => Self::Port,
            Self::Port => Self::Lease,
            Self::Lease => Self::Seen,
            Self::Seen => Self::Urgent,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Urgent => "urgency",
            Self::Address => "address",
            Self::Port => "port",
            Self::Lease => "lease left",
            Self::Seen => "last seen",
        }
    }

    fn order(self, a: &Row, b: &Row) -> Ordering {
        let first = match self {
            Self::Urgent => urgency(a.state)
                .cmp(&urgency(b.state))
                .then_with(|| a.seen.cmp(&b.seen)),
            Self::Address => Ordering::Equal,
            Self::Port => a.port.cmp(&b.port),
            // What never ends comes last.
            Self::Lease => (a.expires.is_none(), a.expires).cmp(&(b.expires.is_none(), b.expires)),
            Self::Seen => a.seen.cmp(&b.seen),
        };
        first.then_with(|| (a.ip, &a.segment, a.vlan).cmp(&(b.ip, &b.segment, b.vlan)))
    }
}

fn urgency(state: State) -> u8 {
    match state {
        State::Releasing => 0,
        State::Gone => 1,
        State::Silent => 2,
        State::Released => 3,
        State::Requested => 4,
        State::Bound => 5,
        State::Moved => 6,
        State::Refused => 7,
        State::Withdrawn => 8,
        State::Expired => 9,
    }
}

/// Which rows are shown, in which order; as indices into `rows`.
pub fn arrange(rows: &[Row], filter: &str, sort: Sort, reversed: bool) -> Vec<usize> {
    let words: Vec<String> = filter.split_whitespace().map(str::to_lowercase).collect();
    let mut shown: Vec<usize> = (0..rows.len())
        .filter(|index| rows[*index].matches(&words))
        .collect();
    shown.sort_by(|a, b| sort.order(&rows[*a], &rows[*b]));
    if reversed {
        shown.reverse();
    }
    shown
}
