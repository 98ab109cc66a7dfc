//! Text that a guest may have had a hand in, made harmless for a terminal.

use std::{borrow::Cow, fmt::Write, io};

use serde::Serialize;

/// For a terminal: control and formatting characters are escaped.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(harmful) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        if harmful(character) {
            safe.extend(character.escape_default());
        } else {
            safe.push(character);
        }
    }
    Cow::Owned(safe)
}

/// One line of JSON that is harmless on a terminal too: serde_json escapes what JSON demands, which
/// leaves out DEL, the C1 controls and marks that turn text around.
pub fn json_line(value: &impl Serialize) -> io::Result<String> {
    let json = serde_json::to_string(value)?;
    if !json.contains(harmful) {
        return Ok(json);
    }
    let mut safe = String::with_capacity(json.len() + 8);
    for character in json.chars() {
        if !harmful(character) {
            safe.push(character);
            continue;
        }
        // Such characters can only be within strings.
        for unit in character.encode_utf16(&mut [0; 2]) {
            write!(safe, "\\u{unit:04x}").map_err(io::Error::other)?;
        }
    }
    Ok(safe)
}

fn harmful(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_stay_as_they_are() {
        assert_eq!(printable("vnet0"), "vnet0");
        assert_eq!(printable("für"), "für");
        assert_eq!(printable("a\u{1b}[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(printable("\u{9b}31m\u{202e}"), "\\u{9b}31m\\u{202e}");
    }

    #[test]
    fn json_stays_json() {
        let text = "a\u{1b}\u{9b}\u{7f}\u{202e}\"ü";
        let line = json_line(&text).unwrap();
        assert!(!line.contains(harmful), "{line}");
        assert_eq!(serde_json::from_str::<String>(&line).unwrap(), text);
    }
}
