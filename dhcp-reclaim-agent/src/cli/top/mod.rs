//! `top`: a live view in the terminal.

mod feed;
mod model;
mod rows;
mod terminal;
#[cfg(test)]
mod tests;
mod view;

use std::{path::PathBuf, sync::mpsc::RecvTimeoutError, time::Duration};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, raise};

use self::{
    feed::{Answer, Feed, Question, Told},
    model::{Now, Top, Wish},
    terminal::Screen,
};
use crate::{clock, config::DEFAULT_CONTROL};

/// How often the view looks at the time.
const TICK: Duration = Duration::from_millis(250);

/// Watch the agent in the terminal: what is silent, what is held, what is released
///
/// Needs a terminal, best of 80x24 or more. `?` lists the keys.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The agent's control socket
    #[arg(long, value_name = "PATH", env = "DHCP_RECLAIM_CONTROL", default_value = DEFAULT_CONTROL)]
    control: PathBuf,
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    // Without an agent there is nothing to see; that is said in one line, on the terminal as it is.
    let Answer::Stats(stats) = feed::answer(&args.control, &Question::Stats)? else {
        bail!("the agent says nothing of itself");
    };
    let feed = Feed::start(&args.control)?;
    let mut screen = Screen::open()?;
    feed.read_keys()?;
    let size = screen.terminal.size()?;
    let top = Top::new(stats, (size.width, size.height), now());
    let ended = run(&mut screen, &feed, top);
    drop(screen);
    match ended? {
        None => Ok(()),
        Some(signal) => {
            // As if it had not been caught, so that whoever sent it sees what it did.
            feed::ends()
                .thread_unblock()
                .context("cannot unblock signals")?;
            raise(signal).context("cannot end by the signal")?;
            Ok(())
        }
    }
}

/// Until somebody quits, or a signal says so.
fn run(screen: &mut Screen, feed: &Feed, mut top: Top) -> anyhow::Result<Option<Signal>> {
    let mut second = None;
    // What came since the last drawing; all but keys waits for the next tick, however much comes.
    let mut news = true;
    loop {
        let at = now();
        let mut wishes = top.tick(at);
        if news || second != Some(at.wall.as_second()) {
            screen
                .terminal
                .draw(|frame| view::draw(frame, &top, at.wall))?;
            second = Some(at.wall.as_second());
            news = false;
        }
        let due = at.monotonic + TICK;
        loop {
            for wish in wishes.drain(..) {
                match wish {
                    Wish::Ask(question) => feed.ask(question),
                    Wish::Follow => feed.follow()?,
                    Wish::Quit => return Ok(None),
                }
            }
            let left = due.since(clock::monotonic());
            if left.is_zero() {
                break;
            }
            let told = match feed.told.recv_timeout(left) {
                Ok(told) => told,
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => bail!("nobody is left to tell anything"),
            };
            news = true;
            let at_once = match &told {
                Told::Signal(signal) => return Ok(Some(*signal)),
                Told::TerminalLost(why) => bail!("cannot read the terminal: {why}"),
                Told::Key(_) | Told::Resized { .. } => true,
                Told::Answer(..) | Told::Event(_) | Told::EventsEnded { .. } => false,
            };
            wishes = top.told(told, now());
            if at_once && wishes.is_empty() {
                break;
            }
        }
    }
}

fn now() -> Now {
    Now {
        monotonic: clock::monotonic(),
        wall: clock::wall(),
    }
}
