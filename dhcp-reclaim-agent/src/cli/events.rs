//! `events`: what happened of late, and what happens now.

use std::io::{self, Write};

use anyhow::bail;

use super::{
    Query,
    table::{or_dash, word},
    unexpected,
};
use crate::control::{EventView, Request, Response, json_line, printable};

/// Print what happened of late, oldest first
///
/// With --json: an object a line.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with what happens from now on
    #[arg(long)]
    follow: bool,
    #[command(flatten)]
    query: Query,
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    args.query.ask(
        &Request::Events {
            follow: args.follow,
        },
        |answer| {
            match answer {
                Response::Event(event) if args.query.json => {
                    writeln!(stdout, "{}", json_line(&event)?)?;
                }
                Response::Event(event) => writeln!(stdout, "{}", line(&event))?,
                Response::Lost { count } => {
                    bail!(
                        "{count} events are missing from here: they came faster than they were read"
                    )
                }
                other => return Err(unexpected(&other)),
            }
            // Each at once: the next may be an hour away.
            stdout.flush()?;
            Ok(())
        },
    )
}

pub(super) fn line(event: &EventView) -> String {
    let line = format!(
        "{:.3}  {:<14}  {}  {}  {}  {}",
        event.ts,
        word(&event.event),
        or_dash(event.ip),
        or_dash(event.mac),
        or_dash(event.port.as_deref()),
        event.reason,
    );
    printable(line.trim_end()).into_owned()
}
