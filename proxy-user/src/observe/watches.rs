//! How long the API server has sent nothing for each kind.
//!
//! In: functions that read it. Out: `weir_watch_silence_seconds`, read at each scrape. An API server sends a bookmark
//! for each kind about once a minute, so after a long silence the node misses changes.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::gauge::ConstGauge,
};

/// Each kind's silence, without the kinds of which nothing ever arrived.
type Read = Box<dyn Fn() -> Vec<(&'static str, Duration)> + Send + Sync>;

/// The functions that read silences, one for each source.
#[derive(Clone, Default)]
pub(super) struct Watches(Arc<Mutex<Vec<Read>>>);

impl fmt::Debug for Watches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watches")
    }
}

impl Watches {
    /// Adds the function of a source.
    pub(super) fn read_with(&self, read: Read) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(read);
    }
}

impl Collector for Watches {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Time since the API server last sent an event or a bookmark for a kind, in seconds";
        let kind = ConstGauge::new(0.0).metric_type();
        let mut metric = encoder.encode_descriptor("weir_watch_silence_seconds", help, None, kind)?;
        let reads = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (kind, silence) in reads.iter().flat_map(|read| read()) {
            ConstGauge::new(silence.as_secs_f64()).encode(metric.encode_family(&[("kind", kind)])?)?;
        }
        Ok(())
    }
}
