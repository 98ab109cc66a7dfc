//! Interface names with `*` and `?` in them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// IFNAMSIZ without the closing zero: no link has a longer name.
const NAME_MAX: usize = 15;

/// A pattern for interface names: `*` is any text, `?` any one character.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Glob(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GlobError {
    #[error("an interface name or pattern is empty: leave it out, or write `*` for all")]
    Empty,
    #[error("`{0}` names no interface: names have at most 15 characters, and no `/` or space")]
    Impossible(String),
}

impl Glob {
    pub fn matches(&self, name: &str) -> bool {
        matches(self.0.as_bytes(), name.as_bytes())
    }

    /// Names one interface, and no other can match.
    pub fn is_literal(&self) -> bool {
        !self.0.contains(['*', '?'])
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Linear in both: only the latest `*` is ever tried again.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(b'?') => (p, n) = (p + 1, n + 1),
            Some(byte) if *byte == name[n] => (p, n) = (p + 1, n + 1),
            _ => {
                let Some((star_p, star_n)) = star else {
                    return false;
                };
                star = Some((star_p, star_n + 1));
                (p, n) = (star_p + 1, star_n + 1);
            }
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

impl FromStr for Glob {
    type Err = GlobError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(GlobError::Empty);
        }
        let impossible = |c: char| c == '/' || c.is_whitespace() || c.is_control();
        let shortest = text
            .chars()
            .filter(|c| *c != '*')
            .map(char::len_utf8)
            .sum::<usize>();
        if text.contains(impossible) || shortest > NAME_MAX {
            return Err(GlobError::Impossible(text.escape_debug().to_string()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Glob {
    type Error = GlobError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Glob> for String {
    fn from(glob: Glob) -> Self {
        glob.0
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_as_a_shell_does() {
        for (pattern, name, expected) in [
            ("*", "tap0", true),
            ("*", "", true),
            ("tap*", "tap0", true),
            ("tap*", "tap", true),
            ("tap*", "xtap0", false),
            ("tap?", "tap0", true),
            ("tap?", "tap", false),
            ("tap?", "tap10", false),
            ("*-eth*", "vm1-eth0", true),
            ("*a*a*b", "aaaaaaaaaaaaaac", false),
            ("vnet1", "vnet1", true),
            ("vnet1", "vnet10", false),
        ] {
            let glob: Glob = pattern.parse().unwrap();
            assert_eq!(glob.matches(name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn refuses_what_no_link_is_called() {
        for wrong in ["", "a/b", "a b", "much-too-long-for-linux", "a\u{7}"] {
            assert!(wrong.parse::<Glob>().is_err(), "{wrong:?}");
        }
        assert!("very-l*-with-st*".parse::<Glob>().is_ok());
    }
}
