//! From the model to the screen: pure.

use jiff::{Timestamp, tz::TimeZone};
use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize},
    text::{Line, Span},
    widgets::{Block, Borders, Clear, Paragraph, Wrap},
};

use super::{
    feed::Question,
    model::{MINUTES, Overlay, Top},
    rows::Row,
};
use crate::{
    cli::{
        explain,
        table::{between, or_dash, short, word},
    },
    control::{EventView, printable},
    core::{NoticeKind, State},
};

/// All but the table at 80x24: header, states, releases, panels, events, footer.
const PANELS: u16 = 5;
const EVENTS: u16 = 5;
const SMALL: u16 = 20;
const LEAST: (u16, u16) = (40, 8);

const HELP: &str = "\
 Up Down j k PgUp PgDn Home End    move
 Enter    why this address is, or is not, released; any key goes back
 /        filter: words that a row must have, as in `silent vnet`; Esc: all
 s        sort by the next of urgency, address, port, lease left, last seen
 r        turn the order round
 p        pause all releases of this node, or go on (and close the breaker)
 q        quit

 Urgency: what is being released, then gone, then silent the longest.
 SEEN: since the VM sent its latest frame that was looked for.
 held: how often a gate held a RELEASE back since the agent started, and
 within the last minute. Enter on an address tells why.";

/// Rows of the table on a screen of this height.
pub fn table_height(rows: u16) -> usize {
    let around = 4 + if rows < SMALL { 0 } else { PANELS + EVENTS };
    usize::from(rows.saturating_sub(around).max(1))
}

pub fn draw(frame: &mut Frame<'_>, top: &Top, now: Timestamp) {
    let area = frame.area();
    if area.width < LEAST.0 || area.height < LEAST.1 {
        frame.render_widget(Paragraph::new("the terminal is too small"), area);
        return;
    }
    let extra = |height| if area.height < SMALL { 0 } else { height };
    let [header, states, releases, panels, table, events, footer] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(extra(PANELS)),
        Constraint::Min(2),
        Constraint::Length(extra(EVENTS)),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(head(top, header.width, now), header);
    frame.render_widget(by_state(top, now), states);
    frame.render_widget(by_minute(top, now), releases);
    if panels.height > 0 {
        let [left, right] = Layout::horizontal([Constraint::Fill(1); 2]).areas(panels);
        frame.render_widget(held(top, left), left);
        frame.render_widget(counters(top, right), right);
    }
    bindings(frame, top, table, now);
    if events.height > 0 {
        frame.render_widget(latest(top, events), events);
    }
    frame.render_widget(foot(top), footer);
    let body = Rect {
        y: area.y + 1,
        height: area.height - 2,
        ..area
    };
    match &top.overlay {
        Overlay::None => {}
        Overlay::Help => over(frame, body, "help", HELP, 0),
        Overlay::Confirm(order) => {
            let text = match order {
                Question::Resume => {
                    " Let releases go on? What is dead by now is released soon, and an open\n \
                     breaker is closed.\n\n y yes, any other key no"
                }
                Question::Stats | Question::List | Question::Explain(_) | Question::Pause => {
                    " Hold all releases of this node, until somebody lets them go on?\n The hold \
                     outlives the agent.\n\n y yes, any other key no"
                }
            };
            over(frame, body, "pause", text, 0);
        }
        Overlay::Explain { ip, found, scroll } => {
            let text = match found {
                None => "asking the agent ...".to_owned(),
                Some(Err(error)) => printable(error).into_owned(),
                Some(Ok(views)) => explain::text(views, now),
            };
            over(frame, body, &format!("explain {ip}"), &text, *scroll);
        }
    }
}

fn over(frame: &mut Frame<'_>, area: Rect, title: &str, text: &str, scroll: u16) {
    let lines = u16::try_from(text.lines().count()).unwrap_or(u16::MAX);
    // Not beyond the last line, wherever the keys went.
    let scroll = scroll.min(lines.saturating_sub(1));
    let text = Paragraph::new(text.to_owned())
        .wrap(Wrap { trim: false })
        .scroll((scroll, 0))
        .block(block(title));
    frame.render_widget(Clear, area);
    frame.render_widget(text, area);
}

fn block(title: &str) -> Block<'static> {
    Block::new()
        .borders(Borders::TOP)
        .border_style(Style::new().dim())
        .title(Span::from(format!(" {title} ")).bold())
}

fn head(top: &Top, width: u16, now: Timestamp) -> Paragraph<'static> {
    let stats = &top.stats;
    let bridges: Vec<_> = stats.bridges.iter().map(|name| printable(name)).collect();
    let up = short(between(stats.started_at, now));
    let left = format!(
        " dhcp-reclaim {}  {}  {} ports  up {up}{}",
        printable(&stats.version),
        bridges.join(" "),
        stats.ports,
        if stats.dry_run { "  DRY RUN" } else { "" },
    );
    let time = now.to_zoned(TimeZone::system()).strftime("%H:%M:%S ");
    let room = usize::from(width).saturating_sub(10);
    let left: String = left.chars().take(room).collect();
    let line = format!("{left:<room$} {time}");
    let style = match top.lost {
        None => Style::new().add_modifier(Modifier::REVERSED),
        Some(_) => Style::new().fg(Color::White).bg(Color::Red),
    };
    Paragraph::new(line).style(style)
}

fn by_state(top: &Top, now: Timestamp) -> Paragraph<'static> {
    if let Some((since, why)) = &top.lost {
        let ago = short(between(*since, now));
        let text = format!(" no answer for {ago}: {}", printable(why));
        return Paragraph::new(text).style(Style::new().fg(Color::Red).bold());
    }
    let mut line = Vec::new();
    if top.stats.paused.is_some() {
        line.push(Span::from(" PAUSED ").style(Style::new().fg(Color::Black).bg(Color::Yellow)));
    }
    if top.stats.breaker_open_since.is_some() {
        line.push(Span::from(" BREAKER OPEN ").style(Style::new().fg(Color::White).bg(Color::Red)));
    }
    for (state, count) in &top.stats.bindings {
        line.push(Span::from(format!(" {} ", word(state))));
        line.push(Span::from(count.to_string()).style(style(*state)).bold());
        line.push(Span::from(" "));
    }
    if top.stats.bindings.is_empty() {
        line.push(Span::from(" no leases yet"));
    }
    let silent = |row: &&Row| matches!(row.state, State::Silent | State::Gone);
    if let Some(seen) = top
        .rows
        .iter()
        .filter(silent)
        .filter_map(|row| row.seen)
        .min()
    {
        line.push(Span::from(format!(
            " longest silence {}",
            short(between(seen, now))
        )));
    }
    Paragraph::new(Line::from(line))
}

fn by_minute(top: &Top, now: Timestamp) -> Paragraph<'static> {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let this = now.as_second().div_euclid(60);
    let minutes = i64::try_from(MINUTES).unwrap_or(i64::MAX);
    let counts: Vec<u64> = (this - minutes + 1..=this)
        .map(|minute| top.releases.get(&minute).copied().unwrap_or(0))
        .collect();
    let most = counts.iter().copied().max().unwrap_or(0);
    let bars: String = counts
        .iter()
        .map(|count| match count {
            0 => '·',
            count => {
                let height = (count * 8).div_ceil(most).clamp(1, 8) - 1;
                BARS[usize::try_from(height).unwrap_or(0)]
            }
        })
        .collect();
    let latest = top.grew("core.releases_sent") + top.grew("core.releases_dry_run");
    Paragraph::new(Line::from(vec![
        Span::from(" releases/min "),
        Span::from(bars).fg(Color::Cyan),
        Span::from(format!(" {latest} now, at most {most}")),
    ]))
}

/// Two columns of a panel, as many rows as it has.
fn columns(cells: &[(String, Style)], area: Rect) -> Vec<Line<'static>> {
    let height = usize::from(area.height.saturating_sub(1)).max(1);
    let width = usize::from(area.width / 2);
    (0..height)
        .map(|row| {
            let line = [row, row + height].into_iter().filter_map(|index| {
                let (text, style) = cells.get(index)?;
                let text: String = text.chars().take(width.saturating_sub(1)).collect();
                Some(Span::from(format!("{text:<width$}")).style(*style))
            });
            Line::from(line.collect::<Vec<_>>())
        })
        .collect()
}

fn held(top: &Top, area: Rect) -> Paragraph<'static> {
    let mut gates: Vec<_> = top
        .stats
        .counters
        .iter()
        .filter_map(|(name, count)| {
            let gate = name.strip_prefix("core.held_")?.replace('_', "-");
            (*count > 0).then(|| (top.grew(name), *count, gate))
        })
        .collect();
    gates.sort_by(|a, b| b.cmp(a));
    let cells: Vec<_> = gates
        .into_iter()
        .map(|(grew, count, gate)| match grew {
            0 => (format!(" {gate} {count}"), Style::new()),
            _ => (
                format!(" {gate} {count} +{grew}"),
                Style::new().fg(Color::Yellow),
            ),
        })
        .collect();
    let lines = match cells.is_empty() {
        true => vec![Line::from(" nothing was held")],
        false => columns(&cells, area),
    };
    Paragraph::new(lines).block(block("held by gate, +last minute"))
}

/// What was lost, if anything, and what was done.
fn counters(top: &Top, area: Rect) -> Paragraph<'static> {
    let mut losses: Vec<_> = top
        .stats
        .counters
        .iter()
        .filter(|(name, count)| is_loss(name) && **count > 0)
        .map(|(name, count)| (top.grew(name), name, count))
        .collect();
    // What grows comes first.
    losses.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    let mut cells: Vec<_> = losses
        .iter()
        .map(|(_, name, count)| {
            let name = name.split_once('.').map_or(name.as_str(), |(_, name)| name);
            let text = format!(" {} {count}", printable(name));
            (text, Style::new().fg(Color::Red))
        })
        .collect();
    if top.events_missed > 0 {
        let text = format!(" events missed {}", top.events_missed);
        cells.push((text, Style::new().fg(Color::Red)));
    }
    let title = match cells.is_empty() {
        true => "counters; nothing was lost",
        false => "losses (red) and counters",
    };
    for (shown, name) in [
        ("sent", "core.releases_sent"),
        ("verified", "core.releases_verified"),
        ("ignored", "core.releases_ignored"),
        ("vetoed", "core.releases_vetoed"),
        ("alive after", "core.released_alive"),
        ("probes", "core.probes_sent"),
        ("messages", "core.messages"),
        ("conflicts", "core.conflicts"),
    ] {
        let count = top.stats.counters.get(name).copied().unwrap_or(0);
        cells.push((format!(" {shown} {count}"), Style::new()));
    }
    Paragraph::new(columns(&cells, area)).block(block(title))
}

/// By the name alone, so that a counter that is made tomorrow is shown too.
pub fn is_loss(name: &str) -> bool {
    const ENDS: [&str; 9] = [
        "lost",
        "failed",
        "failures",
        "refused",
        "full",
        "limited",
        "malformed",
        "dropped",
        "missed",
    ];
    [
        "kernel.slot_taken",
        "agent.malformed_records",
        "kernel.truncated",
    ]
    .contains(&name)
        || ENDS.iter().any(|end| name.ends_with(end))
}

fn bindings(frame: &mut Frame<'_>, top: &Top, area: Rect, now: Timestamp) {
    let height = usize::from(area.height.saturating_sub(1));
    // The cursor stays in the middle, as far as there is something above and below.
    let most = top.shown.len().saturating_sub(height);
    let first = top.cursor.saturating_sub(height / 2).min(most);
    let port_width = usize::from(area.width).saturating_sub(65).clamp(8, 24);
    let mut lines = vec![
        Line::from(format!(
            " {:<15}  {:<17}  {:<port_width$}  {:<10}  {:<7}  SEEN",
            "IP", "MAC", "PORT", "STATE", "LEASE",
        ))
        .bold(),
    ];
    let window = top.shown.iter().enumerate().skip(first).take(height);
    for (place, index) in window {
        let row = &top.rows[*index];
        let mut port = row.place(top.stats.bridges.len() > 1);
        if port.chars().count() > port_width {
            port = port.chars().take(port_width - 1).chain(['…']).collect();
        }
        let line = Line::from(vec![
            Span::from(format!(
                " {:<15}  {:<17}  {port:<port_width$}  ",
                row.ip, row.mac
            )),
            Span::from(format!("{:<10}", row.shown_state)).style(style(row.state)),
            Span::from(format!(
                "  {:<7}  {:<5}",
                row.lease(now),
                or_dash(row.seen.map(|seen| short(between(seen, now)))),
            )),
        ]);
        lines.push(match place == top.cursor {
            true => line.add_modifier(Modifier::REVERSED),
            false => line,
        });
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn latest(top: &Top, area: Rect) -> Paragraph<'static> {
    let height = usize::from(area.height.saturating_sub(1));
    let first = top.events.len().saturating_sub(height);
    let lines = top.events.iter().skip(first).map(event).collect::<Vec<_>>();
    Paragraph::new(lines).block(block("events"))
}

fn event(event: &EventView) -> Line<'static> {
    let time = event.ts.to_zoned(TimeZone::system()).strftime("%H:%M:%S");
    let bad = [
        NoticeKind::ReleasedAlive,
        NoticeKind::RecordsLost,
        NoticeKind::ReleaseFailed,
    ];
    let odd = [
        NoticeKind::Conflict,
        NoticeKind::RogueServer,
        NoticeKind::Held,
        NoticeKind::Vetoed,
    ];
    let style = if bad.contains(&event.event) {
        Style::new().fg(Color::Red).bold()
    } else if odd.contains(&event.event) {
        Style::new().fg(Color::Yellow)
    } else {
        Style::new().bold()
    };
    let whose = match (event.ip, &event.port) {
        (Some(ip), _) => ip.to_string(),
        (None, Some(port)) => printable(port).into_owned(),
        (None, None) => String::new(),
    };
    Line::from(vec![
        Span::from(format!(" {time}  ")),
        Span::from(format!("{:<14}", word(&event.event))).style(style),
        Span::from(format!("  {whose:<15}  {}", printable(&event.reason))),
    ])
}

fn foot(top: &Top) -> Paragraph<'static> {
    if top.editing {
        return Paragraph::new(format!(" filter: {}_", printable(&top.filter)))
            .style(Style::new().bold());
    }
    if let Some(notice) = &top.notice {
        return Paragraph::new(format!(" {}", printable(notice)))
            .style(Style::new().fg(Color::Yellow).bold());
    }
    let more = match top.more {
        0 => String::new(),
        more => format!(" of {}", top.rows.len() + more),
    };
    let turned = if top.reversed { ", reversed" } else { "" };
    let order = format!("{}{more} by {}{turned}", top.shown.len(), top.sort.name());
    if !top.filter.is_empty() {
        let filter = printable(&top.filter);
        return Paragraph::new(format!(" {order}, with `{filter}`; Esc shows all"));
    }
    Paragraph::new(Line::from(vec![
        Span::from(" q quit  / filter  s sort  p pause  Enter why  ? help ").bold(),
        Span::from(format!("  {order}")),
    ]))
}

fn style(state: State) -> Style {
    match state {
        State::Bound => Style::new().fg(Color::Green),
        State::Silent | State::Gone | State::Releasing => Style::new().fg(Color::Yellow).bold(),
        State::Released => Style::new().fg(Color::Cyan),
        State::Requested => Style::new(),
        State::Refused | State::Withdrawn | State::Expired | State::Moved => Style::new().dim(),
    }
}
