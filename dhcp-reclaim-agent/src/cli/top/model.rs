//! What the view shows, and what a key or an answer makes of it: pure, told the time.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use jiff::Timestamp;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::{
    feed::{Answer, Failure, Question, Told},
    rows::{Id, Row, Sort, arrange},
    view,
};
use crate::{
    control::{EventView, ExplainView, StatsView},
    core::{NoticeKind, Time},
};

/// Between two looks at the figures.
const STATS_EVERY: Duration = Duration::from_secs(2);
/// Bindings are asked for when something happened; and that they were heard is no event.
const LIST_EVERY: Duration = Duration::from_secs(1);
const LIST_ANYWAY: Duration = Duration::from_secs(10);
/// The agent works for us for at most this part of its time, as far as we can tell.
const LIST_SHARE: u32 = 20;
/// Between two tries to follow events, if they end at once.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);
/// How long something said covers the keys.
const NOTICE: Duration = Duration::from_secs(10);
const MINUTE: Duration = Duration::from_secs(60);

const EVENTS_MAX: usize = 200;
const FILTER_MAX: usize = 60;
/// Minutes of releases that are remembered.
pub const MINUTES: usize = 40;

/// Both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub monotonic: Time,
    pub wall: Timestamp,
}

/// What the model wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    Ask(Question),
    Follow,
    Quit,
}

#[derive(Debug, Default)]
pub enum Overlay {
    #[default]
    None,
    Help,
    /// `p` was pressed: what `y` will ask for.
    Confirm(Question),
    Explain {
        ip: std::net::Ipv4Addr,
        /// `Err`: what the agent said instead.
        found: Option<Result<Vec<ExplainView>, String>>,
        scroll: u16,
    },
}

#[derive(Debug)]
pub struct Top {
    pub size: (u16, u16),
    pub stats: StatsView,
    /// Since when the agent does not answer, and why.
    pub lost: Option<(Timestamp, String)>,
    pub notice: Option<String>,
    noticed_at: Option<Time>,
    pub rows: Vec<Row>,
    /// Bindings beyond those.
    pub more: usize,
    pub shown: Vec<usize>,
    selected: Option<Id>,
    pub cursor: usize,
    pub sort: Sort,
    pub reversed: bool,
    pub filter: String,
    pub editing: bool,
    pub overlay: Overlay,
    /// Oldest first.
    pub events: VecDeque<EventView>,
    /// RELEASEs by minute.
    pub releases: BTreeMap<i64, u64>,
    pub events_missed: u64,
    /// Counters of the last minute, oldest first.
    samples: VecDeque<(Time, BTreeMap<String, u64>)>,

    asked: Option<(Question, Time)>,
    stats_due: Time,
    list_due: Time,
    list_answered: Option<Time>,
    list_took: Duration,
    /// Something happened since the bindings were asked for.
    stale: bool,
    explain_due: bool,
    /// What was confirmed, and waits for its turn.
    order: Option<Question>,
    following: bool,
    follow_due: Time,
    /// Whose events those are.
    followed: Option<Timestamp>,
}

impl Top {
    /// Of an agent that has answered once.
    pub fn new(stats: StatsView, size: (u16, u16), now: Now) -> Self {
        let mut top = Self {
            size,
            stats: StatsView {
                counters: BTreeMap::new(),
                ..stats.clone()
            },
            lost: None,
            notice: None,
            noticed_at: None,
            rows: Vec::new(),
            more: 0,
            shown: Vec::new(),
            selected: None,
            cursor: 0,
            sort: Sort::default(),
            reversed: false,
            filter: String::new(),
            editing: false,
            overlay: Overlay::None,
            events: VecDeque::new(),
            releases: BTreeMap::new(),
            events_missed: 0,
            samples: VecDeque::new(),
            asked: None,
            stats_due: now.monotonic + STATS_EVERY,
            list_due: now.monotonic,
            list_answered: None,
            list_took: Duration::ZERO,
            stale: true,
            explain_due: false,
            order: None,
            following: false,
            follow_due: now.monotonic,
            followed: None,
        };
        top.figures(stats, now);
        top
    }

    /// What is to be asked now; called a few times a second.
    pub fn tick(&mut self, now: Now) -> Vec<Wish> {
        let mut wishes = Vec::new();
        if self.notice.is_some() {
            let since = *self.noticed_at.get_or_insert(now.monotonic);
            if now.monotonic.since(since) >= NOTICE {
                self.notice = None;
            }
        }
        if !self.following && self.lost.is_none() && now.monotonic >= self.follow_due {
            // The agent tells its past again; a new one has none, and ours stays.
            if self.followed == Some(self.stats.started_at) {
                self.events.clear();
                self.releases.clear();
            }
            self.followed = Some(self.stats.started_at);
            self.following = true;
            wishes.push(Wish::Follow);
        }
        // One question at a time: an agent that is slow is not asked more.
        if self.asked.is_none()
            && let Some(question) = self.next_question(now.monotonic)
        {
            self.asked = Some((question.clone(), now.monotonic));
            wishes.push(Wish::Ask(question));
        }
        wishes
    }

    pub fn told(&mut self, told: Told, now: Now) -> Vec<Wish> {
        match told {
            Told::Key(key) => return self.key(key),
            Told::Resized { columns, rows } => self.size = (columns, rows),
            Told::Answer(question, answer) => self.answered(&question, answer, now),
            Told::Event(event) => self.happened(event),
            Told::EventsEnded { lost } => {
                self.following = false;
                self.follow_due = now.monotonic + FOLLOW_EVERY;
                self.events_missed += lost;
                self.stats_due = now.monotonic;
            }
            Told::Signal(_) | Told::TerminalLost(_) => return vec![Wish::Quit],
        }
        Vec::new()
    }

    /// How much a counter grew within the last minute.
    pub fn grew(&self, name: &str) -> u64 {
        let newest = self.stats.counters.get(name).copied().unwrap_or(0);
        let oldest = self.samples.front().and_then(|(_, then)| then.get(name));
        newest.saturating_sub(oldest.copied().unwrap_or(0))
    }

    fn say(&mut self, text: impl Into<String>) {
        self.notice = Some(text.into());
        self.noticed_at = None;
    }

    /// What `resume` would end.
    pub fn holds_all(&self) -> bool {
        self.stats.paused.is_some() || self.stats.breaker_open_since.is_some()
    }

    fn next_question(&mut self, now: Time) -> Option<Question> {
        if self.lost.is_some() {
            return (now >= self.stats_due).then_some(Question::Stats);
        }
        if let Some(order) = self.order.take() {
            return Some(order);
        }
        if let Overlay::Explain { ip, .. } = self.overlay
            && self.explain_due
        {
            self.explain_due = false;
            return Some(Question::Explain(ip));
        }
        if now >= self.stats_due {
            return Some(Question::Stats);
        }
        let old = self
            .list_answered
            .is_none_or(|at| now.since(at) >= LIST_ANYWAY);
        if now >= self.list_due && (self.stale || old) {
            self.stale = false;
            return Some(Question::List);
        }
        None
    }

    fn answered(&mut self, question: &Question, answer: Result<Answer, Failure>, now: Now) {
        let asked = self.asked.take().map_or(now.monotonic, |(_, at)| at);
        match answer {
            Ok(Answer::Stats(stats)) => {
                self.stats_due = now.monotonic + STATS_EVERY;
                // Its figures move with time alone.
                self.explain_due = true;
                self.figures(stats, now);
            }
            Ok(Answer::List(bindings, more)) => {
                self.list_took = now.monotonic.since(asked);
                self.list_answered = Some(now.monotonic);
                self.list_due = now.monotonic + LIST_EVERY.max(self.list_took * LIST_SHARE);
                self.rows = bindings.iter().map(Row::new).collect();
                self.more = more;
                self.arrange();
            }
            Ok(Answer::Explain(views)) => self.explained(question, Ok(views)),
            Ok(Answer::Done(text)) => {
                self.say(text);
                self.stats_due = now.monotonic;
            }
            Err(Failure { text, gone: false }) => match question {
                Question::Explain(_) => self.explained(question, Err(text)),
                Question::Pause | Question::Resume => self.notice = Some(text),
                Question::Stats | Question::List => {
                    self.say(text);
                    self.stats_due = now.monotonic + STATS_EVERY;
                    self.list_due = now.monotonic + STATS_EVERY;
                    self.stale = true;
                }
            },
            Err(Failure { text, gone: true }) => {
                // Whoever gave an order must see that it was not carried out.
                if matches!(question, Question::Pause | Question::Resume) {
                    self.say(format!("not done: {text}"));
                }
                self.stats_due = now.monotonic + LIST_EVERY;
                self.stale = true;
                self.order = None;
                let since = self.lost.take().map_or(now.wall, |(since, _)| since);
                self.lost = Some((since, text));
            }
        }
    }

    fn figures(&mut self, stats: StatsView, now: Now) {
        if stats.started_at != self.stats.started_at {
            self.samples.clear();
            self.say("the agent was started again");
            self.stale = true;
        } else if self.lost.is_some() {
            self.say("the agent answers again");
        }
        self.lost = None;
        while let Some((at, _)) = self.samples.front()
            && now.monotonic.since(*at) > MINUTE
        {
            self.samples.pop_front();
        }
        self.samples
            .push_back((now.monotonic, stats.counters.clone()));
        self.stats = stats;
    }

    fn explained(&mut self, question: &Question, answer: Result<Vec<ExplainView>, String>) {
        if let Overlay::Explain { ip, found, .. } = &mut self.overlay
            && *question == Question::Explain(*ip)
        {
            *found = Some(answer);
        }
    }

    fn happened(&mut self, event: EventView) {
        self.stale = true;
        if matches!(event.event, NoticeKind::Released | NoticeKind::WouldRelease) {
            let minute = event.ts.as_second().div_euclid(60);
            *self.releases.entry(minute).or_default() += 1;
            while self.releases.len() > MINUTES {
                self.releases.pop_first();
            }
        }
        self.events.push_back(event);
        if self.events.len() > EVENTS_MAX {
            self.events.pop_front();
        }
    }

    /// Filters and sorts anew; the same row stays selected if it is still there.
    fn arrange(&mut self) {
        self.shown = arrange(&self.rows, &self.filter, self.sort, self.reversed);
        let found = self.selected.as_ref().and_then(|id| {
            self.shown
                .iter()
                .position(|index| self.rows[*index].id() == *id)
        });
        self.cursor = found.unwrap_or(self.cursor).min(self.last());
        self.select(self.cursor);
    }

    fn last(&self) -> usize {
        self.shown.len().saturating_sub(1)
    }

    fn select(&mut self, cursor: usize) {
        self.cursor = cursor.min(self.last());
        self.selected = self.row().map(Row::id);
    }

    fn row(&self) -> Option<&Row> {
        self.shown.get(self.cursor).map(|index| &self.rows[*index])
    }

    fn key(&mut self, key: KeyEvent) -> Vec<Wish> {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return vec![Wish::Quit];
        }
        self.notice = None;
        if self.editing {
            self.edit(key.code);
            return Vec::new();
        }
        match &mut self.overlay {
            Overlay::None => return self.command(key.code),
            Overlay::Help => self.overlay = Overlay::None,
            Overlay::Confirm(order) => {
                if key.code == KeyCode::Char('y') {
                    self.order = Some(order.clone());
                }
                self.overlay = Overlay::None;
            }
            Overlay::Explain { scroll, .. } => match key.code {
                KeyCode::Up | KeyCode::Char('k') => *scroll = scroll.saturating_sub(1),
                KeyCode::Down | KeyCode::Char('j') => *scroll = scroll.saturating_add(1),
                KeyCode::PageUp => *scroll = scroll.saturating_sub(10),
                KeyCode::PageDown => *scroll = scroll.saturating_add(10),
                _ => self.overlay = Overlay::None,
            },
        }
        Vec::new()
    }

    fn edit(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.editing = false,
            KeyCode::Esc => {
                self.editing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(character) if self.filter.chars().count() < FILTER_MAX => {
                self.filter.push(character);
            }
            _ => return,
        }
        self.arrange();
    }

    fn command(&mut self, code: KeyCode) -> Vec<Wish> {
        let page = view::table_height(self.size.1);
        match code {
            KeyCode::Char('q') => return vec![Wish::Quit],
            KeyCode::Char('?' | 'h') => self.overlay = Overlay::Help,
            KeyCode::Char('/') => self.editing = true,
            // An order waits for nobody: it is asked for while the agent answers, or not at all.
            KeyCode::Char('p') if self.lost.is_some() => {
                self.say("no agent to tell");
            }
            KeyCode::Char('p') => {
                self.overlay = Overlay::Confirm(match self.holds_all() {
                    true => Question::Resume,
                    false => Question::Pause,
                });
            }
            KeyCode::Esc => {
                self.filter.clear();
                self.arrange();
            }
            KeyCode::Char('s') => {
                self.sort = self.sort.next();
                self.arrange();
            }
            KeyCode::Char('r') => {
                self.reversed = !self.reversed;
                self.arrange();
            }
            KeyCode::Up | KeyCode::Char('k') => self.select(self.cursor.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(self.cursor + 1),
            KeyCode::PageUp => self.select(self.cursor.saturating_sub(page)),
            KeyCode::PageDown => self.select(self.cursor + page),
            KeyCode::Home | KeyCode::Char('g') => self.select(0),
            KeyCode::End | KeyCode::Char('G') => self.select(self.last()),
            KeyCode::Enter => {
                if let Some(row) = self.row() {
                    self.overlay = Overlay::Explain {
                        ip: row.ip,
                        found: None,
                        scroll: 0,
                    };
                    self.explain_due = true;
                }
            }
            _ => {}
        }
        Vec::new()
    }
}
