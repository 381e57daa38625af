//! Durations as kube-proxy reads and writes them in files and flags: `30s`, `1h30m`, `500ms`.
//!
//! In: text that Go's `time.ParseDuration` accepts, and no other, because a configuration that works with
//! weir must also work with kube-proxy. Out: nanoseconds, with a sign until the field is checked.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// A duration in nanoseconds, which may be negative until the field is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct GoDuration(i64);

impl GoDuration {
    /// The duration, or `None` if it is negative.
    #[must_use]
    pub fn positive(self) -> Option<Duration> {
        u64::try_from(self.0).ok().map(Duration::from_nanos)
    }

    /// Whether it is zero, which means "not set" in most fields.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl From<GoDuration> for String {
    /// Writes it as kube-proxy does: `1h0m0s`, `1.5s`, `10ms`.
    fn from(GoDuration(duration): GoDuration) -> Self {
        let (sign, nanoseconds) = (if duration < 0 { "-" } else { "" }, duration.unsigned_abs());
        let fraction = |unit: u64, nanoseconds: u64| {
            let digits = unit.ilog10() as usize;
            let (before, after) = (nanoseconds / unit, nanoseconds % unit);
            format!("{before}.{after:0digits$}").trim_end_matches('0').trim_end_matches('.').to_owned()
        };
        let text = match nanoseconds {
            0 => "0s".to_owned(),
            1..1_000 => format!("{nanoseconds}ns"),
            1_000..1_000_000 => fraction(1_000, nanoseconds) + "µs",
            1_000_000..1_000_000_000 => fraction(1_000_000, nanoseconds) + "ms",
            _ => {
                let (hours, minutes) = (nanoseconds / HOUR, nanoseconds / MINUTE % 60);
                let seconds = fraction(SECOND, nanoseconds % MINUTE);
                match (hours, minutes) {
                    (0, 0) => format!("{seconds}s"),
                    (0, _) => format!("{minutes}m{seconds}s"),
                    _ => format!("{hours}h{minutes}m{seconds}s"),
                }
            }
        };
        sign.to_owned() + &text
    }
}

impl From<Duration> for GoDuration {
    fn from(duration: Duration) -> Self {
        Self(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX))
    }
}

/// The text is not a duration.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a duration such as 30s, 5m or 1h30m")]
pub struct NotADuration(String);

impl FromStr for GoDuration {
    type Err = NotADuration;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map(Self).ok_or_else(|| NotADuration(text.to_owned()))
    }
}

impl TryFrom<String> for GoDuration {
    type Error = NotADuration;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from(*self))
    }
}

const SECOND: u64 = 1_000_000_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;

/// The limit of a sum of nanoseconds before its sign is applied.
const MOST: u64 = 1 << 63;

/// Reads `[-+]?([0-9]*(\.[0-9]*)?[a-z]+)+` in the same steps as Go's `time.ParseDuration`, so that both
/// accept the same texts and round alike.
fn parse(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut sum = 0_u64;
    while !rest.is_empty() {
        let (part, after) = part(rest)?;
        sum = sum.checked_add(part).filter(|sum| *sum <= MOST)?;
        rest = after;
    }
    if negative { 0_i64.checked_sub_unsigned(sum) } else { i64::try_from(sum).ok() }
}

/// Reads the first number with its unit. Returns it in nanoseconds, and the text after it.
fn part(text: &str) -> Option<(u64, &str)> {
    let (whole, rest) = digits(text);
    let (fraction, rest) = rest.strip_prefix('.').map_or(("", rest), digits);
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let end = rest.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(end);
    let unit = match unit {
        "ns" => 1,
        // The micro sign, and the Greek letter mu.
        "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
        "ms" => 1_000_000,
        "s" => SECOND,
        "m" => MINUTE,
        "h" => HOUR,
        _ => return None,
    };
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()? };
    let whole = whole.checked_mul(unit)?;
    Some((whole.checked_add(share(fraction, unit))?, rest))
}

/// The nanoseconds of the digits after a point. Digits beyond the limit are ignored, as in Go.
fn share(digits: &str, unit: u64) -> u64 {
    let (mut value, mut scale) = (0_u64, 1.0_f64);
    for digit in digits.bytes().map(|byte| u64::from(byte - b'0')) {
        match value.checked_mul(10).and_then(|value| value.checked_add(digit)).filter(|it| *it <= MOST) {
            Some(more) => (value, scale) = (more, scale * 10.0),
            None => break,
        }
    }
    (value as f64 * (unit as f64 / scale)) as u64
}

/// The digits at the start, and the text after them.
fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_kube_proxy_writes_them() {
        for (given, written) in [
            ("0", "0s"),
            ("30s", "30s"),
            ("90s", "1m30s"),
            ("15m", "15m0s"),
            ("24h", "24h0m0s"),
            ("1500ms", "1.5s"),
            ("10ms", "10ms"),
            ("250us", "250µs"),
            ("1h0m0.05s", "1h0m0.05s"),
            ("-1m", "-1m0s"),
        ] {
            assert_eq!(String::from(given.parse::<GoDuration>().unwrap()), written, "{given}");
        }
    }

    /// The expected results are those of Go's `time.ParseDuration`.
    #[test]
    fn durations_are_read_as_kube_proxy_reads_them() {
        let nanoseconds = |text: &str| text.parse::<GoDuration>().map(|GoDuration(it)| it);
        for (text, expected) in [
            ("0", 0),
            ("-0", 0),
            ("+5s", 5_000_000_000),
            ("1.5h", 5_400_000_000_000),
            (".5s", 500_000_000),
            ("5.s", 5_000_000_000),
            ("1h1h", 7_200_000_000_000),
            ("1s1h", 3_601_000_000_000),
            ("12\u{b5}s", 12_000),
            ("12\u{3bc}s", 12_000),
            ("0.3333333333333333333h", 1_200_000_000_000),
            ("0.100000000000000000000h", 360_000_000_000),
            ("0.830103483285477580700h", 2_988_372_539_827),
            ("9223372036854775807ns", i64::MAX),
            ("-9223372036854775808ns", i64::MIN),
            ("-2562047h47m16.854775808s", i64::MIN),
        ] {
            assert_eq!(nanoseconds(text).unwrap(), expected, "{text}");
        }
        for text in [
            "",
            " ",
            "30",
            "-",
            "+",
            "s",
            ".",
            "-.",
            ".s",
            "+.s",
            "1",
            "++5s",
            "-+5s",
            "1.2.3s",
            "30 seconds",
            "30 s",
            " 30s",
            "30s ",
            "30S",
            "PT1H",
            "PT30S",
            "1h 30m",
            "1h, 30m",
            "1d",
            "1w",
            "1hour",
            "5min",
            "3 hours ago",
            "0x1s",
            "1e3s",
            "\u{664}s",
            "9223372036854775808ns",
            "-9223372036854775809ns",
            "9223372036854776us",
            "3000000h",
            "2562047h47m16.854775808s",
            "99999999999999999999s",
        ] {
            assert!(nanoseconds(text).is_err(), "{text:?} is accepted");
        }
    }
}
