//! What the view is told: keys, signals, and the agent's answers, each from a thread that may wait.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread,
};

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use ratatui::crossterm::event::{self, Event, KeyEvent};

use super::super::{pause, unexpected};
use crate::control::{
    BindingView, Client, ClientError, EventView, ExplainView, Request, Response, StatsView,
};

/// As many bindings as are kept; the rest is counted.
pub const BINDINGS_MAX: usize = 65_536;
/// Who sends more waits until this was read: a follower that waits is cut off by the agent, and told.
const QUEUE: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    Stats,
    List,
    Explain(Ipv4Addr),
    Pause,
    Resume,
}

#[derive(Debug)]
pub enum Answer {
    Stats(StatsView),
    /// With how many more there are.
    List(Vec<BindingView>, usize),
    Explain(Vec<ExplainView>),
    /// An order was carried out: what came of it, in words.
    Done(String),
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub text: String,
    /// Nobody is there, as opposed to: the agent says no.
    pub gone: bool,
}

#[derive(Debug)]
pub enum Told {
    Key(KeyEvent),
    Resized {
        columns: u16,
        rows: u16,
    },
    Answer(Question, Result<Answer, Failure>),
    Event(EventView),
    /// The events end: the agent went, or so many of them did not reach us.
    EventsEnded {
        lost: u64,
    },
    Signal(Signal),
    /// The terminal cannot be read any more.
    TerminalLost(String),
}

/// The threads, and what they say.
#[derive(Debug)]
pub struct Feed {
    pub told: Receiver<Told>,
    sender: SyncSender<Told>,
    questions: Sender<Question>,
    control: PathBuf,
}

impl Feed {
    /// Signals that would end the program come as [`Told::Signal`] from now on.
    pub fn start(control: &Path) -> anyhow::Result<Self> {
        let (sender, told) = sync_channel(QUEUE);
        let ends = ends();
        // Before there are threads: all of them inherit it.
        ends.thread_block().context("cannot block signals")?;
        let signals = sender.clone();
        spawn("signals", move || {
            if let Ok(signal) = ends.wait() {
                // Fails only once nobody draws any more.
                let _ended = signals.send(Told::Signal(signal));
            }
        })?;
        let (questions, asked) = channel();
        let feed = Self {
            told,
            sender,
            questions,
            control: control.to_owned(),
        };
        let (answers, path) = (feed.sender.clone(), feed.control.clone());
        spawn("control", move || {
            for question in asked {
                let answer = ask(&path, &question);
                if answers.send(Told::Answer(question, answer)).is_err() {
                    return;
                }
            }
        })?;
        Ok(feed)
    }

    /// Once the terminal is ours.
    pub fn read_keys(&self) -> anyhow::Result<()> {
        let keys = self.sender.clone();
        spawn("keys", move || {
            loop {
                let told = match event::read() {
                    Ok(Event::Key(key)) if key.is_press() => Told::Key(key),
                    Ok(Event::Resize(columns, rows)) => Told::Resized { columns, rows },
                    Ok(_) => continue,
                    Err(error) => Told::TerminalLost(error.to_string()),
                };
                let last = matches!(told, Told::TerminalLost(_));
                if keys.send(told).is_err() || last {
                    return;
                }
            }
        })
    }

    pub fn ask(&self, question: Question) {
        // The thread that answers ends with this sender.
        let _always = self.questions.send(question);
    }

    /// Follows the agent's events until they end.
    pub fn follow(&self) -> anyhow::Result<()> {
        let (events, path) = (self.sender.clone(), self.control.clone());
        spawn("events", move || {
            let lost = follow(&path, |event| events.send(Told::Event(event)).is_ok());
            let _ended = events.send(Told::EventsEnded { lost });
        })
    }
}

/// Signals whose default is to end the program, and which must not leave the terminal as it is.
pub fn ends() -> SigSet {
    let mut ends = SigSet::empty();
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
    ] {
        ends.add(signal);
    }
    ends
}

fn ask(control: &Path, question: &Question) -> Result<Answer, Failure> {
    answer(control, question).map_err(|error| Failure {
        text: format!("{error:#}"),
        gone: !matches!(error.downcast_ref(), Some(ClientError::Agent { .. })),
    })
}

/// The same with the whole error.
pub fn answer(control: &Path, question: &Question) -> anyhow::Result<Answer> {
    let mut client = Client::connect(control)?;
    let request = match question {
        Question::Stats => Request::Stats,
        Question::List => Request::List,
        Question::Explain(ip) => Request::Explain { ip: *ip },
        Question::Pause => Request::Pause {
            reason: Some("from `dhcp-reclaim top`".to_owned()),
        },
        Question::Resume => Request::Resume,
    };
    let (mut stats, mut bindings, mut more, mut views) = (None, Vec::new(), 0, Vec::new());
    let mut done = String::new();
    for answer in client.ask(&request)? {
        match answer? {
            Response::Stats(view) => stats = Some(view),
            Response::Binding(_) if bindings.len() == BINDINGS_MAX => more += 1,
            Response::Binding(binding) => bindings.push(binding),
            Response::Explain(view) => views.push(view),
            Response::Paused(view) => done = view.text(),
            Response::Resumed(view) => done = pause::resumed(&view),
            other => return Err(unexpected(&other)),
        }
    }
    Ok(match question {
        Question::Stats => Answer::Stats(stats.context("the agent says nothing of itself")?),
        Question::List => Answer::List(bindings, more),
        Question::Explain(_) => Answer::Explain(views),
        Question::Pause | Question::Resume => Answer::Done(done),
    })
}

/// Ends with the number of events that the agent could not deliver; why it ends otherwise, the next
/// question to the agent tells.
fn follow(control: &Path, mut each: impl FnMut(EventView) -> bool) -> u64 {
    let Ok(mut client) = Client::connect(control) else {
        return 0;
    };
    let Ok(answers) = client.ask(&Request::Events { follow: true }) else {
        return 0;
    };
    for answer in answers {
        match answer {
            Ok(Response::Event(event)) => {
                if !each(event) {
                    return 0;
                }
            }
            Ok(Response::Lost { count }) => return count,
            Ok(_) | Err(_) => return 0,
        }
    }
    0
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .with_context(|| format!("cannot start the thread `{name}`"))?;
    Ok(())
}
