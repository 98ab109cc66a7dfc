//! Text for people: tables and times.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::control::printable;

/// Of a terminal.
pub const WIDTH: usize = 80;

/// Columns as wide as they need to be; the last has no padding, and is wrapped if it is text.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(heads: &[&str]) -> Self {
        Self {
            rows: vec![heads.iter().map(|head| (*head).to_owned()).collect()],
        }
    }

    /// A row; its text is made harmless here.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(
            cells
                .into_iter()
                .map(|cell| printable(&cell).into_owned())
                .collect(),
        );
    }

    pub fn text(&self) -> String {
        self.painted(str::to_owned)
    }

    /// Of its widest line.
    pub fn width(&self) -> usize {
        let text = self.text();
        text.lines()
            .map(|line| line.chars().count())
            .max()
            .unwrap_or(0)
    }

    /// With each cell as `paint` shows it: in as many columns, coloured.
    pub fn painted(&self, paint: impl Fn(&str) -> String) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column| {
            let cells = self
                .rows
                .iter()
                .filter_map(|row: &Vec<String>| row.get(column));
            cells
                .map(|cell: &String| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        let last = columns.saturating_sub(1);
        let indent = widths.iter().take(last).map(|width| width + 2).sum();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if column == last && indent + cell.chars().count() > WIDTH && indent < WIDTH / 2 {
                    line.push_str(&wrapped(cell, indent));
                    continue;
                }
                let pad = " ".repeat(width.saturating_sub(cell.chars().count()) + 2);
                line.push_str(&paint(cell));
                line.push_str(&pad);
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Text in lines of a terminal's width, all but the first of them indented; long words stay whole.
pub fn wrapped(text: &str, indent: usize) -> String {
    let mut wrapped = String::new();
    let mut column = indent;
    for word in text.split(' ') {
        let width = word.chars().count();
        if column > indent && column + 1 + width > WIDTH {
            wrapped.push('\n');
            wrapped.push_str(&" ".repeat(indent));
            column = indent;
        } else if column > indent {
            wrapped.push(' ');
            column += 1;
        }
        wrapped.push_str(word);
        column += width;
    }
    wrapped
}

/// The largest whole unit: `59s`, `9m`, `3h`, `2d`.
pub fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        86_400.. => format!("{}d", seconds / 86_400),
    }
}

/// From `earlier` to `later`; zero if it is the other way round.
pub fn between(earlier: Timestamp, later: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or(Duration::ZERO)
}

/// What there is, or a dash.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// The name that JSON has for a value, so that people and programs read the same word.
pub fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(_) | Err(_) => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{NoticeKind, State};

    #[test]
    fn columns_line_up_and_lines_end_clean() {
        let mut table = Table::new(&["IP", "STATE"]);
        table.row(["10.0.0.7".to_owned(), "bound".to_owned()]);
        table.row(["-".to_owned(), "a\u{1b}[2J".to_owned()]);
        assert_eq!(
            table.text(),
            "IP        STATE\n10.0.0.7  bound\n-         a\\u{1b}[2J\n"
        );
    }

    #[test]
    fn long_text_in_the_last_column_is_wrapped() {
        let mut table = Table::new(&["GATE", "WHY"]);
        table.row([
            "paused".to_owned(),
            "word ".repeat(30).trim_end().to_owned(),
        ]);
        let text = table.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{text}");
        assert!(lines[2].starts_with("        word word"), "{text}");
    }

    #[test]
    fn times_are_short() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (3_599, "59m"),
            (7_200, "2h"),
            (200_000, "2d"),
        ] {
            assert_eq!(short(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn words_are_those_of_the_contract() {
        assert_eq!(word(&State::Bound), "bound");
        assert_eq!(word(&NoticeKind::PortLost), "port-lost");
    }
}
