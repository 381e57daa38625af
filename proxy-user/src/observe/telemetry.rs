//! Sets logging up: text or JSON lines on standard error.
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

/// Changes what is logged, and how; dropping it changes nothing.
#[derive(Clone)]
pub struct Telemetry {
    filter: reload::Handle<EnvFilter, Registry>,
    lines: reload::Handle<Lines, Filtered>,
}

/// Why logging is not as asked for.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter cannot be read.
    #[error("`{directives}` is not a log filter")]
    Filter {
        /// What was given.
        directives: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Logging is set up already.
    #[error("logging cannot be set up")]
    Init(#[from] tracing_subscriber::util::TryInitError),
    /// Nobody logs any more.
    #[error("the log filter cannot be changed")]
    Reload(#[from] reload::Error),
}

/// The filter for kube-proxy's `-v`: up to 3 what an operator cares about, 4 debug messages, from 5 on traces. The
/// libraries below weir stay one step quieter, since they log every request, and `kube_client` two: it warns of each watch that breaks
/// off, which weir tells of itself.
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

    /// Logs from now on as [`Telemetry::init`] would with these settings.
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
