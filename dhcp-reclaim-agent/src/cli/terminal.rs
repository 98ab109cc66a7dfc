//! Whether there is a terminal, and what it is shown: colours, and the same again and again.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
    thread,
    time::Duration,
};

use super::print;

/// Colours, where they are wanted (https://no-color.org).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    colour: bool,
}

impl Style {
    #[cfg(test)]
    pub const PLAIN: Self = Self { colour: false };

    pub fn of_stdout() -> Self {
        let unwanted = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self {
            colour: io::stdout().is_terminal() && !unwanted && !dumb,
        }
    }

    pub fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    pub fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    pub fn red(self, text: &str) -> String {
        self.paint("31", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Once, or again after each `every`: on a terminal in place, else one after the other.
pub fn repeat(
    every: Option<Duration>,
    mut text: impl FnMut() -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let in_place = every.is_some() && io::stdout().is_terminal();
    loop {
        let text = text()?;
        if in_place {
            // Home, and away with what was below.
            print(&format!("\u{1b}[H\u{1b}[2J{text}"))?;
        } else {
            print(&text)?;
        }
        let Some(every) = every else {
            return Ok(());
        };
        io::stdout().flush()?;
        thread::sleep(every);
    }
}
