use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use jiff::Timestamp;
use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};

use super::{
    feed::{Answer, BINDINGS_MAX, Failure, Question, Told},
    model::{Now, Overlay, Top, Wish},
    view,
};
use crate::{
    control::{BindingView, EventView, ExplainView, GateView, PauseView, Peer, StatsView},
    core::{MacAddr, NoticeKind, Outcome, State, Time},
};

/// A view, its clock, and a terminal of 80x24.
struct Bench {
    top: Top,
    seconds: u64,
}

impl Bench {
    fn new() -> Self {
        let top = Top::new(stats(0, 0), (80, 24), at(0));
        Self { top, seconds: 0 }
    }

    fn now(&self) -> Now {
        at(self.seconds)
    }

    fn told(&mut self, told: Told) -> Vec<Wish> {
        let now = self.now();
        self.top.told(told, now)
    }

    fn later(&mut self, seconds: u64) -> Vec<Wish> {
        self.seconds += seconds;
        let now = self.now();
        self.top.tick(now)
    }

    fn keys(&mut self, keys: &str) -> Vec<Wish> {
        let mut wishes = Vec::new();
        for character in keys.chars() {
            wishes.extend(self.key(KeyCode::Char(character)));
        }
        wishes
    }

    fn key(&mut self, code: KeyCode) -> Vec<Wish> {
        self.told(Told::Key(KeyEvent::new(code, KeyModifiers::NONE)))
    }

    fn answer(&mut self, question: Question, answer: Answer) {
        self.told(Told::Answer(question, Ok(answer)));
    }

    fn list(&mut self, bindings: Vec<BindingView>) {
        self.answer(Question::List, Answer::List(bindings, 0));
    }

    fn happens(&mut self, event: NoticeKind, reason: &str) {
        let event = EventView {
            ts: self.now().wall,
            event,
            ip: Some(ip(7)),
            mac: None,
            port: Some("vnet7".to_owned()),
            reason: reason.to_owned(),
        };
        self.told(Told::Event(event));
    }

    fn fails(&mut self, gone: bool) {
        let text = "no agent is running here".to_owned();
        self.told(Told::Answer(Question::Stats, Err(Failure { text, gone })));
    }

    fn screen(&self) -> Vec<String> {
        self.screen_of(80, 24)
    }

    fn screen_of(&self, columns: u16, rows: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
        let now = self.now().wall;
        terminal
            .draw(|frame| view::draw(frame, &self.top, now))
            .unwrap();
        let cells = terminal.backend().buffer().content();
        cells
            .chunks(usize::from(columns))
            .map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>())
            .map(|line| line.trim_end().to_owned())
            .collect()
    }

    fn shows(&self, part: &str) -> bool {
        self.screen().iter().any(|line| line.contains(part))
    }

    /// The table as it is shown: the last byte of each address.
    fn order(&self) -> Vec<u8> {
        let rows = self.top.shown.iter().map(|index| &self.top.rows[*index]);
        rows.map(|row| row.ip.octets()[3]).collect()
    }
}

fn wall(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

fn at(seconds: u64) -> Now {
    Now {
        monotonic: Time::ZERO + Duration::from_secs(1000 + seconds),
        wall: wall(seconds.cast_signed()),
    }
}

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, last)
}

fn stats(started: i64, held: u64) -> StatsView {
    StatsView {
        version: "0.1.0".to_owned(),
        started_at: wall(started - 7200),
        dry_run: false,
        bridges: vec!["br0".to_owned()],
        ports: 4,
        paused: None,
        breaker_open_since: None,
        bindings: BTreeMap::from([(State::Bound, 2), (State::Silent, 1), (State::Gone, 1)]),
        counters: BTreeMap::from([
            ("core.held_breaker".to_owned(), held),
            ("core.held_hold_down".to_owned(), 3),
            ("core.releases_sent".to_owned(), held),
            ("core.records_lost".to_owned(), 0),
            ("kernel.records".to_owned(), 12),
        ]),
    }
}

fn binding(last: u8, state: State, seen: i64) -> BindingView {
    BindingView {
        origin: crate::core::Origin::Wire,
        ip: ip(last),
        mac: MacAddr([2, 0, 0, 0, 0, last]),
        client_id: None,
        server: Some(ip(1)),
        server_mac: None,
        segment: "br0".to_owned(),
        vlan: None,
        port: format!("vnet{last}"),
        state,
        outcome: (state == State::Released).then_some(Outcome::Verified),
        lease_expires_at: Some(wall(3600 - i64::from(last) * 60)),
        last_seen_at: Some(wall(seen)),
    }
}

fn four() -> Vec<BindingView> {
    vec![
        binding(9, State::Bound, -1),
        binding(7, State::Silent, -40),
        binding(8, State::Gone, -310),
        binding(6, State::Released, -500),
    ]
}

#[test]
fn at_80x24_all_of_it_is_readable() {
    let mut bench = Bench::new();
    bench.list(four());
    bench.happens(NoticeKind::Held, "hold-down: 1.000s of 2.000s have passed");
    bench.seconds += 1;
    bench.happens(NoticeKind::Released, "RELEASE sent to 10.0.0.1, unverified");
    let mut screen = bench.screen();
    // The machine's time zone is its own affair.
    for line in &mut screen {
        while let Some(colon) = line.find(":13:2") {
            line.replace_range(colon - 2..colon + 6, "HH:MM:SS");
        }
    }
    let expected = " dhcp-reclaim 0.1.0  br0  4 ports  up 2h                               HH:MM:SS
 bound 2  silent 1  gone 1  longest silence 5m
 releases/min ·······································█ 0 now, at most 1
 held by gate, +last minute ──────────── counters; nothing was lost ────────────
 hold-down 3                             sent 0              alive after 0
                                         verified 0          probes 0
                                         ignored 0           messages 0
                                         vetoed 0            conflicts 0
 IP               MAC                PORT             STATE       LEASE    SEEN
 10.0.0.8         02:00:00:00:00:08  vnet8            gone        51m      5m
 10.0.0.7         02:00:00:00:00:07  vnet7            silent      52m      41s
 10.0.0.6         02:00:00:00:00:06  vnet6            verified    53m      8m
 10.0.0.9         02:00:00:00:00:09  vnet9            bound       50m      2s





 events ────────────────────────────────────────────────────────────────────────
 HH:MM:SS  held            10.0.0.7         hold-down: 1.000s of 2.000s have pas
 HH:MM:SS  released        10.0.0.7         RELEASE sent to 10.0.0.1, unverified


 q quit  / filter  s sort  p pause  Enter why  ? help   4 by urgency";
    assert_eq!(screen.join("\n"), expected);
}

#[test]
fn every_size_can_be_drawn() {
    let mut bench = Bench::new();
    bench.list(
        (0..=255)
            .map(|last| binding(last, State::Bound, 0))
            .collect(),
    );
    for overlay in ["", "?", "\r"] {
        match overlay {
            "\r" => drop(bench.key(KeyCode::Enter)),
            keys => drop(bench.keys(keys)),
        }
        for (columns, rows) in [(1, 1), (39, 24), (40, 8), (80, 19), (80, 24), (300, 100)] {
            bench.screen_of(columns, rows);
        }
        bench.key(KeyCode::Esc);
    }
}

#[test]
fn several_bridges_are_told_apart() {
    let mut bench = Bench::new();
    let mut figures = stats(0, 0);
    figures.bridges.push("br1".to_owned());
    bench.answer(Question::Stats, Answer::Stats(figures));
    let tagged = BindingView {
        segment: "br1".to_owned(),
        vlan: Some(42),
        ..binding(7, State::Bound, 0)
    };
    bench.list(vec![binding(7, State::Bound, 0), tagged]);
    assert!(
        bench.shows("vnet7 br0 ") && bench.shows("vnet7.42 br1 "),
        "{:#?}",
        bench.screen()
    );
}

#[test]
fn sorting_goes_round_and_turns_round() {
    let mut bench = Bench::new();
    bench.list(four());
    assert_eq!(bench.order(), [8, 7, 6, 9]);
    bench.keys("r");
    assert_eq!(bench.order(), [9, 6, 7, 8]);
    bench.keys("rs");
    assert_eq!(bench.order(), [6, 7, 8, 9], "by address");
    bench.keys("ss");
    assert_eq!(bench.order(), [9, 8, 7, 6], "by lease left");
    bench.keys("s");
    assert_eq!(bench.order(), [6, 8, 7, 9], "by last seen");
    bench.keys("s");
    assert_eq!(bench.order(), [8, 7, 6, 9]);
}

#[test]
fn a_filter_is_words_that_all_match() {
    let mut bench = Bench::new();
    bench.list(four());
    bench.keys("/VNET gone");
    assert_eq!(bench.order(), [8]);
    assert!(bench.shows(" filter: VNET gone_"));
    bench.key(KeyCode::Enter);
    assert!(bench.shows("1 by urgency, with `VNET gone`; Esc shows all"));
    // It is a command again.
    bench.keys("s");
    assert_eq!(bench.order(), [8]);
    bench.key(KeyCode::Esc);
    assert_eq!(bench.order().len(), 4);
    bench.keys("/02:00:00:00:00:07q");
    assert!(bench.order().is_empty(), "q is a letter here");
    bench.key(KeyCode::Backspace);
    assert_eq!(bench.order(), [7]);
    bench.keys(&"x".repeat(1000));
    assert!(bench.top.filter.len() < 100, "{}", bench.top.filter.len());
}

#[test]
fn the_same_binding_stays_selected() {
    let mut bench = Bench::new();
    bench.list(four());
    bench.key(KeyCode::Down);
    bench.list(vec![
        binding(7, State::Bound, 0),
        binding(5, State::Gone, 0),
        binding(9, State::Bound, 0),
    ]);
    bench.key(KeyCode::Enter);
    assert!(matches!(bench.top.overlay, Overlay::Explain { ip: shown, .. } if shown == ip(7)));
    bench.key(KeyCode::Esc);
    bench.list(Vec::new());
    assert_eq!(bench.key(KeyCode::Enter), []);
    assert!(
        matches!(bench.top.overlay, Overlay::None),
        "nothing is selected"
    );
    for code in [
        KeyCode::Down,
        KeyCode::PageDown,
        KeyCode::End,
        KeyCode::Up,
        KeyCode::Home,
    ] {
        bench.key(code);
    }
    bench.list(four());
    bench.key(KeyCode::End);
    assert_eq!(bench.top.cursor, 3);
}

#[test]
fn enter_explains_and_the_answer_follows_the_figures() {
    let mut bench = Bench::new();
    bench.later(0);
    bench.list(four());
    bench.key(KeyCode::Enter);
    assert!(bench.shows("asking the agent"));
    let explain = Question::Explain(ip(8));
    assert_eq!(bench.later(0), [Wish::Ask(explain.clone())]);
    let view = ExplainView {
        binding: binding(8, State::Gone, 0),
        verdict: "hold".to_owned(),
        gates: vec![GateView {
            gate: "hold-down".to_owned(),
            verdict: "hold".to_owned(),
            reason: "1 s of 2 s \u{1b}[2J".to_owned(),
        }],
        history: Vec::new(),
    };
    bench.answer(explain.clone(), Answer::Explain(vec![view]));
    assert!(bench.shows("hold-down  hold     1 s of 2 s \\u{1b}[2J"));
    // Asked again with the figures, and no sooner.
    assert_eq!(bench.later(1), []);
    assert_eq!(bench.later(1), [Wish::Ask(Question::Stats)]);
    bench.answer(Question::Stats, Answer::Stats(stats(0, 0)));
    assert_eq!(bench.later(0), [Wish::Ask(explain.clone())]);
    let text = "10.0.0.8 is not known here".to_owned();
    bench.told(Told::Answer(explain, Err(Failure { text, gone: false })));
    assert!(bench.shows("is not known here"));
    assert!(bench.top.lost.is_none());
    bench.keys("q");
    assert!(
        matches!(bench.top.overlay, Overlay::None),
        "a key goes back"
    );
    // An answer to a question that is no longer open changes nothing.
    bench.answer(Question::Explain(ip(8)), Answer::Explain(Vec::new()));
    assert!(matches!(bench.top.overlay, Overlay::None));
}

#[test]
fn a_pause_is_confirmed_and_its_end_too() {
    let mut bench = Bench::new();
    bench.later(0);
    bench.list(Vec::new());
    assert_eq!(bench.keys("p"), []);
    assert!(bench.shows("Hold all releases"));
    bench.keys("n");
    assert_eq!(bench.later(0), [], "any other key is a no");
    bench.keys("py");
    assert_eq!(bench.later(0), [Wish::Ask(Question::Pause)]);
    let done = "paused since now by uid 0, pid 7: because\u{1b}".to_owned();
    bench.answer(Question::Pause, Answer::Done(done));
    assert!(bench.shows(" paused since now by uid 0, pid 7: because\\u{1b}"));

    let mut figures = stats(0, 0);
    figures.paused = Some(PauseView {
        since: wall(0),
        by: Peer { uid: 0, pid: 7 },
        reason: None,
    });
    figures.breaker_open_since = Some(wall(0));
    assert_eq!(bench.later(0), [Wish::Ask(Question::Stats)], "seen at once");
    bench.answer(Question::Stats, Answer::Stats(figures));
    assert!(bench.shows(" PAUSED  BREAKER OPEN "));
    bench.keys("p");
    assert!(bench.shows("Let releases go on?"));
    bench.keys("y");
    assert_eq!(bench.later(0), [Wish::Ask(Question::Resume)]);
    let text = "for root only".to_owned();
    bench.told(Told::Answer(
        Question::Resume,
        Err(Failure { text, gone: false }),
    ));
    assert!(bench.shows(" for root only"));
}

#[test]
fn an_order_is_not_kept_for_the_next_agent() {
    let mut bench = Bench::new();
    bench.later(0);
    bench.list(Vec::new());
    bench.keys("py");
    bench.later(0);
    let text = "no agent is running here".to_owned();
    bench.told(Told::Answer(
        Question::Pause,
        Err(Failure { text, gone: true }),
    ));
    assert!(bench.shows("not done: no agent is running here"));
    bench.later(2);
    bench.answer(Question::Stats, Answer::Stats(stats(60, 0)));
    let orders = bench.later(0);
    assert!(!orders.contains(&Wish::Ask(Question::Pause)), "{orders:?}");
    bench.told(Told::EventsEnded { lost: 0 });
    bench.list(Vec::new());
    bench.fails(true);
    bench.keys("py");
    assert!(matches!(bench.top.overlay, Overlay::None), "nobody to tell");
}

#[test]
fn the_agent_is_asked_no_more_than_needed() {
    let mut bench = Bench::new();
    assert_eq!(bench.later(0), [Wish::Follow, Wish::Ask(Question::List)]);
    // An open question is waited for, however long.
    assert_eq!(bench.later(60), []);
    // It took a minute: the next may take its time too.
    bench.list(four());
    assert_eq!(bench.later(0), [Wish::Ask(Question::Stats)]);
    bench.answer(Question::Stats, Answer::Stats(stats(0, 0)));
    bench.happens(NoticeKind::Bound, "ACK");
    for _ in 0..30 {
        assert_eq!(bench.later(2), [Wish::Ask(Question::Stats)]);
        bench.answer(Question::Stats, Answer::Stats(stats(0, 0)));
    }
    bench.later(20 * 60);
    bench.answer(Question::Stats, Answer::Stats(stats(0, 0)));
    assert_eq!(bench.later(0), [Wish::Ask(Question::List)]);
    // At once: then every second if something happens, else every ten.
    bench.list(four());
    bench.happens(NoticeKind::Bound, "ACK");
    assert_eq!(bench.later(0), []);
    assert_eq!(bench.later(1), [Wish::Ask(Question::List)]);
    bench.list(four());
    let mut lists = 0;
    for _ in 0..20 {
        match bench.later(1).as_slice() {
            [] => {}
            [Wish::Ask(Question::Stats)] => {
                bench.answer(Question::Stats, Answer::Stats(stats(0, 0)))
            }
            [Wish::Ask(Question::List)] => {
                lists += 1;
                bench.list(four());
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(
        (1..=2).contains(&lists),
        "{lists} lists in 20 quiet seconds"
    );
}

#[test]
fn an_agent_that_goes_and_comes_back_is_told() {
    let mut bench = Bench::new();
    bench.later(0);
    bench.list(four());
    bench.happens(NoticeKind::Released, "one");
    bench.told(Told::EventsEnded { lost: 0 });
    bench.fails(true);
    assert_eq!(bench.later(0), []);
    assert_eq!(bench.later(5), [Wish::Ask(Question::Stats)], "asked again");
    bench.fails(true);
    assert!(bench.shows("no answer for 5s: no agent is running here"));
    assert!(bench.shows("10.0.0.8"), "what was known stays");

    assert_eq!(bench.later(1), [Wish::Ask(Question::Stats)]);
    bench.answer(Question::Stats, Answer::Stats(stats(3600, 0)));
    assert!(bench.shows("the agent was started again"));
    assert_eq!(bench.later(0), [Wish::Follow, Wish::Ask(Question::List)]);
    assert_eq!(
        bench.top.events.len(),
        1,
        "a new agent tells no past: ours stays"
    );
    bench.list(four());
    bench.keys("k");
    assert!(
        !bench.shows("started again"),
        "read by whoever pressed a key"
    );
    assert!(bench.top.lost.is_none());
}

#[test]
fn events_that_were_missed_are_counted_and_the_past_is_told_anew() {
    let mut bench = Bench::new();
    bench.later(0);
    bench.list(four());
    bench.happens(NoticeKind::Released, "one");
    bench.told(Told::EventsEnded { lost: 40 });
    assert!(bench.shows("events missed 40"));
    assert_eq!(bench.later(0), [Wish::Ask(Question::Stats)], "not at once");
    assert_eq!(bench.top.events.len(), 1);
    assert_eq!(bench.later(1), [Wish::Follow]);
    assert_eq!(bench.top.events.len(), 0);
    assert_eq!(bench.top.releases.len(), 0, "or it would count twice");
}

#[test]
fn an_agent_that_says_no_is_still_there() {
    let mut bench = Bench::new();
    bench.later(0);
    bench.fails(false);
    assert!(bench.top.lost.is_none());
    assert!(bench.shows("no agent is running here"));
    assert_eq!(bench.later(1), [], "and left in peace for a while");
    bench.later(10);
    assert!(
        !bench.shows("no agent is running here"),
        "it does not stay for ever"
    );
}

#[test]
fn what_grew_within_a_minute_is_marked() {
    let mut bench = Bench::new();
    bench.later(0);
    bench.list(Vec::new());
    for minute in 0..4 {
        bench.later(20);
        bench.answer(Question::Stats, Answer::Stats(stats(0, 5 + minute)));
    }
    assert!(bench.shows(" breaker 8 +3"), "{:#?}", bench.screen());
    assert!(bench.shows(" hold-down 3  "));
    assert!(bench.shows(" 3 now"));
}

#[test]
fn losses_come_first_by_their_names_alone() {
    let mut bench = Bench::new();
    let mut figures = stats(0, 0);
    figures.counters.insert("core.records_lost".to_owned(), 7);
    figures.counters.insert("new.frames_dropped".to_owned(), 2);
    bench.answer(Question::Stats, Answer::Stats(figures));
    assert!(bench.shows("losses (red) and counters"));
    assert!(bench.shows(" frames_dropped 2") && bench.shows(" records_lost 7"));
    for quiet in [
        "core.releases_sent",
        "kernel.records",
        "agent.commits",
        "core.messages",
    ] {
        assert!(!view::is_loss(quiet), "{quiet}");
    }
}

#[test]
fn a_guests_words_do_nothing_to_the_terminal() {
    let mut bench = Bench::new();
    let evil = "a\u{1b}[2J\u{9b}31m\u{202e}\u{200b}b";
    let mut view = binding(7, State::Silent, 0);
    view.port = evil.to_owned();
    view.segment = evil.to_owned();
    bench.list(vec![view]);
    bench.happens(NoticeKind::RogueServer, evil);
    bench.keys("/");
    bench.keys("\u{202e}\u{1b}");
    bench.key(KeyCode::Enter);
    bench.top.filter.clear();
    bench.key(KeyCode::Home);
    let screen = bench.screen_of(200, 40).join("\n");
    assert!(screen.contains("a\\u{1b}[2J"), "{screen}");
    let odd = screen
        .chars()
        .find(|c| (c.is_control() && *c != '\n') || ('\u{200b}'..='\u{202e}').contains(c));
    assert_eq!(odd, None);
}

#[test]
fn as_many_bindings_as_an_agent_may_have_are_bounded_and_quick() {
    let mut bench = Bench::new();
    let many = (0..BINDINGS_MAX).map(|number| BindingView {
        ip: Ipv4Addr::from_bits(0x0a00_0000 + u32::try_from(number).unwrap()),
        ..binding(1, State::Bound, 0)
    });
    bench.answer(Question::List, Answer::List(many.collect(), 12));
    bench.keys("/10.0.255.255");
    assert_eq!(bench.top.shown.len(), 1);
    bench.key(KeyCode::Esc);
    bench.key(KeyCode::End);
    assert!(bench.shows("10.0.255.255"));
    assert!(bench.shows("65536 of 65548"));
    for number in 0..1000 {
        bench.happens(NoticeKind::Released, &number.to_string());
        bench.seconds += 60;
    }
    assert!(bench.top.events.len() <= 200);
    assert!(bench.top.releases.len() <= 40);
}

#[test]
fn quitting_is_always_possible() {
    for before in ["", "/", "?"] {
        let mut bench = Bench::new();
        bench.keys(before);
        let key = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(bench.told(Told::Key(key)), [Wish::Quit]);
    }
    assert_eq!(Bench::new().keys("q"), [Wish::Quit]);
}
