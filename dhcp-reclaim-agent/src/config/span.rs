//! Durations as people write them: `500ms`, `2s`, `1h30m`.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize, de};

/// A duration with its unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// Units, from the largest, with their milliseconds.
const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSpanError {
    #[error("`{0}` has no unit: write ms, s, m, h or d after each number, as in `500ms` or `2s`")]
    NoUnit(String),
    #[error("`{0}` is no duration: write whole numbers with ms, s, m, h or d, as in `1m30s`")]
    Malformed(String),
    #[error("`{0}` is too long a duration")]
    TooLong(String),
}

impl FromStr for Span {
    type Err = ParseSpanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shown = || {
            text.chars()
                .take(40)
                .collect::<String>()
                .escape_debug()
                .to_string()
        };
        let malformed = || ParseSpanError::Malformed(shown());
        let too_long = || ParseSpanError::TooLong(shown());
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(ParseSpanError::NoUnit(shown()));
        }

        let mut rest = text;
        let mut millis = 0_u64;
        let mut larger = u64::MAX;
        while !rest.is_empty() {
            let digits = rest
                .find(|c: char| !c.is_ascii_digit())
                .ok_or_else(malformed)?;
            let (number, after) = rest.split_at(digits);
            let letters = after
                .find(|c: char| c.is_ascii_digit())
                .unwrap_or(after.len());
            let (unit, after) = after.split_at(letters);
            // Each unit once, from large to small: `30s1m` is more likely a slip than meant.
            let (_, each) = UNITS
                .into_iter()
                .find(|(name, each)| *name == unit && *each < larger)
                .ok_or_else(malformed)?;
            if number.is_empty() {
                return Err(malformed());
            }
            let number: u64 = number.parse().map_err(|_| too_long())?;
            millis = number
                .checked_mul(each)
                .and_then(|part| millis.checked_add(part))
                .ok_or_else(too_long)?;
            larger = each;
            rest = after;
        }
        if text.is_empty() {
            return Err(malformed());
        }
        Ok(Self(Duration::from_millis(millis)))
    }
}

impl fmt::Display for Span {
    /// In the form that is parsed; below a millisecond is cut off.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, each) in UNITS {
            if rest >= each {
                write!(f, "{}{unit}", rest / each)?;
                rest %= each;
            }
        }
        Ok(())
    }
}

impl From<Span> for Duration {
    fn from(span: Span) -> Self {
        span.0
    }
}

impl Serialize for Span {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = Span;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration in quotes with its unit, as in \"500ms\", \"2s\" or \"5m\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_str(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, millis) in [
            ("500ms", 500),
            ("2s", 2_000),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("1d", 86_400_000),
            ("1m500ms", 60_500),
            ("0s", 0),
        ] {
            assert_eq!(
                text.parse(),
                Ok(Span(Duration::from_millis(millis))),
                "{text}"
            );
        }
    }

    #[test]
    fn says_what_is_wrong() {
        assert_eq!(
            "30".parse::<Span>(),
            Err(ParseSpanError::NoUnit("30".to_owned()))
        );
        for text in [
            "", "s", "2 s", "1.5s", "-1s", "2S", "2sec", "30s1m", "1s1s", "2s3",
        ] {
            let parsed = text.parse::<Span>();
            assert!(
                matches!(parsed, Err(ParseSpanError::Malformed(_))),
                "{text:?}: {parsed:?}"
            );
        }
        for text in ["99999999999999999999s", "18446744073709551615d"] {
            let parsed = text.parse::<Span>();
            assert!(
                matches!(parsed, Err(ParseSpanError::TooLong(_))),
                "{text:?}: {parsed:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(millis in any::<u64>()) {
            let span = Span(Duration::from_millis(millis));
            prop_assert_eq!(span.to_string().parse(), Ok(span));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}") {
            drop(text.parse::<Span>());
        }
    }
}
