//! Logging: text or JSON lines on standard error.
//!
//! In: the format and kube-proxy's `-v`. Out: a handle that changes both while the agent runs.

use std::io::IsTerminal as _;

use crate::config::LogConfig;
use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt,
    layer::{Layered, SubscriberExt as _},
    reload,
    util::SubscriberInitExt as _,
};

type Filtered = Layered<reload::Layer<EnvFilter, Registry>, Registry>;
type Lines = Box<dyn Layer<Filtered> + Send + Sync>;

/// Changes the filter and the format of logs. Logging goes on when it is dropped.
#[derive(Clone)]
pub struct Telemetry {
    filter: reload::Handle<EnvFilter, Registry>,
    lines: reload::Handle<Lines, Filtered>,
}

/// Why logging could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter cannot be read.
    #[error("`{directives}` is not a log filter")]
    Filter {
        /// As the user wrote it.
        directives: String,
        /// Where parsing stopped.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// This process has set logging up before.
    #[error("logging cannot be set up")]
    Init(#[from] tracing_subscriber::util::TryInitError),
    /// The subscriber is gone.
    #[error("the log filter cannot be changed")]
    Reload(#[from] reload::Error),
}

/// The filter for kube-proxy's `-v`: info messages up to 3, debug messages at 4, traces from 5 on. Libraries log one
/// level less, because they log every request. `kube_client` logs two levels less, because it warns of each watch
/// that breaks off, and weir reports those itself.
pub(super) const fn directives(verbosity: u32) -> &'static str {
    match verbosity {
        0..=3 => "warn,weir=info,kube_client=error",
        4 => "info,weir=debug",
        _ => "debug,weir=trace",
    }
}

impl Telemetry {
    /// Sets logging up for this process. The environment variable `WEIR_LOG` replaces the filter of `-v`.
    ///
    /// # Errors
    ///
    /// When `WEIR_LOG` is no filter, or logging is set up already.
    pub fn init(config: LogConfig) -> Result<Self, TelemetryError> {
        let (filter, filter_handle) = reload::Layer::new(filter(config)?);
        let (lines, lines_handle) = reload::Layer::new(lines(config));
        tracing_subscriber::registry().with(filter).with(lines).try_init()?;
        Ok(Self { filter: filter_handle, lines: lines_handle })
    }

    /// Replaces the settings given to [`Telemetry::init`].
    ///
    /// # Errors
    ///
    /// When `WEIR_LOG` is no filter.
    pub fn set(&self, config: LogConfig) -> Result<(), TelemetryError> {
        self.filter.reload(filter(config)?)?;
        Ok(self.lines.reload(lines(config))?)
    }
}

fn filter(config: LogConfig) -> Result<EnvFilter, TelemetryError> {
    let chosen = std::env::var("WEIR_LOG").ok().filter(|filter| !filter.is_empty());
    parse(chosen.as_deref().unwrap_or(directives(config.verbosity)))
}

fn lines(config: LogConfig) -> Lines {
    let lines = fmt::layer().with_writer(std::io::stderr);
    if config.json {
        lines.json().flatten_event(true).boxed()
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).boxed()
    }
}

fn parse(directives: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(directives)
        .map_err(|source| TelemetryError::Filter { directives: directives.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::filter::LevelFilter;

    use super::*;

    #[test]
    fn verbosity_chooses_the_level() {
        for (verbosity, level) in
            [(0, LevelFilter::INFO), (2, LevelFilter::INFO), (4, LevelFilter::DEBUG), (9, LevelFilter::TRACE)]
        {
            assert_eq!(parse(directives(verbosity)).unwrap().max_level_hint(), Some(level), "-v={verbosity}");
        }
    }

    #[test]
    fn a_wrong_filter_is_named() {
        let error = parse("weir=loud").unwrap_err();
        assert_eq!(error.to_string(), "`weir=loud` is not a log filter");
    }
}
