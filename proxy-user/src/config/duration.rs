//! Durations as kube-proxy writes them, in files and flags: `30s`, `1h30m`, `500ms`.

use std::{fmt, str::FromStr, time::Duration};

use jiff::{
    SignedDuration,
    fmt::friendly::{Direction, SpanPrinter},
};
use serde::Deserialize;

/// A duration that may be negative until it is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
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
