//! Limits on waiting.

use std::{
    error::Error,
    fmt,
    time::{Duration, Instant},
};

/// The error of something that took longer than it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OutOfTime;

impl fmt::Display for OutOfTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it took longer than it was given")
    }
}

impl Error for OutOfTime {}

/// The end of a wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(Instant);

impl Deadline {
    #[must_use]
    pub(super) fn after(time: Duration) -> Self {
        Self(Instant::now() + time)
    }

    #[must_use]
    pub(super) fn is_over(self) -> bool {
        Instant::now() > self.0
    }

    /// Fails with [`OutOfTime`] when it is past.
    pub(super) fn check(self) -> Result<(), OutOfTime> {
        if self.is_over() { Err(OutOfTime) } else { Ok(()) }
    }
}

/// `None` where the time was too short; other errors stay errors.
pub(super) fn in_time<T>(result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is::<OutOfTime>() => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn only_lack_of_time_is_no_error() {
        assert_eq!(in_time(Ok(3)).unwrap(), Some(3));
        let late: anyhow::Result<u8> = Err(OutOfTime).context("waiting for a Service");
        assert_eq!(in_time(late).unwrap(), None);
        assert!(in_time::<u8>(Err(anyhow!("it died"))).is_err());
        assert!(
            Deadline::after(Duration::ZERO).check().is_err() || !Deadline::after(Duration::ZERO).is_over()
        );
        assert!(!Deadline::after(Duration::from_secs(60)).is_over());
    }
}
