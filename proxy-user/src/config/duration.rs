//! Durations as kube-proxy writes them, in files and flags: `30s`, `1h30m`, `500ms`.

use std::{fmt, str::FromStr, time::Duration};

use jiff::{
    SignedDuration,
    fmt::friendly::{Direction, SpanPrinter},
};
use serde::{Deserialize, Serialize};

/// A duration that may be negative until it is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct GoDuration(SignedDuration);

impl GoDuration {
    /// The duration, if it is not negative.
    #[must_use]
    pub fn positive(self) -> Option<Duration> {
        Duration::try_from(self.0).ok()
    }

    /// Whether it is no time at all, which most fields take for "not set".
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

impl From<GoDuration> for String {
    /// As kube-proxy writes it: `1h0m0s`, `1.5s`, `10ms`.
    fn from(GoDuration(duration): GoDuration) -> Self {
        let (sign, whole) = (if duration.is_negative() { "-" } else { "" }, duration.unsigned_abs());
        let fraction = |unit: u32, nanoseconds: u128| {
            let digits = unit.ilog10() as usize;
            let (before, after) = (nanoseconds / u128::from(unit), nanoseconds % u128::from(unit));
            format!("{before}.{after:0digits$}").trim_end_matches('0').trim_end_matches('.').to_owned()
        };
        let nanoseconds = whole.as_nanos();
        let text = match nanoseconds {
            0 => "0s".to_owned(),
            1..1_000 => format!("{nanoseconds}ns"),
            1_000..1_000_000 => fraction(1_000, nanoseconds) + "µs",
            1_000_000..1_000_000_000 => fraction(1_000_000, nanoseconds) + "ms",
            _ => {
                let (hours, minutes) = (whole.as_secs() / 3600, whole.as_secs() / 60 % 60);
                let seconds = fraction(1_000_000_000, nanoseconds % 60_000_000_000);
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
        Self(SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX))
    }
}

/// Text that is no duration.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a duration such as 30s, 5m or 1h30m")]
pub struct NotADuration(String);

impl FromStr for GoDuration {
    type Err = NotADuration;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "0" {
            return Ok(Self::default());
        }
        text.parse().map(Self).map_err(|_| NotADuration(text.to_owned()))
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
        f.write_str(&SpanPrinter::new().direction(Direction::Sign).duration_to_string(&self.0))
    }
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
}
