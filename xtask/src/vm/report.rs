//! What a machine under test says to us: output as it is, and between its lines, our own words.
use anyhow::Result;
use serde::{Deserialize, Serialize};

/// No program's line begins with it (ASCII record separator).
const MARK: char = '\x1e';

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Word {
    /// The first: it has booted, and this is its `uname -r`.
    Up(String),
    /// What follows is the output of this one.
    Begin(String),
    /// Its exit status, as a shell would say it.
    End(i32),
    /// The last: it powers off.
    Done,
    /// It cannot go on.
    Broken(String),
}

impl Word {
    pub fn to_line(&self) -> Result<String> {
        Ok(format!("{MARK}{}\n", serde_json::to_string(self)?))
    }

    /// `None` for a line of output.
    pub fn of_line(line: &str) -> Option<Self> {
        serde_json::from_str(line.trim_end().strip_prefix(MARK)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_not_output() {
        for word in [Word::Up("6.1".to_owned()), Word::End(101), Word::Done] {
            assert_eq!(Word::of_line(&word.to_line().unwrap()), Some(word));
        }
        assert_eq!(Word::of_line("test a ... ok"), None);
        assert_eq!(Word::of_line("\"Done\""), None);
    }
}
