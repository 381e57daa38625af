//! Metrics of packets that were dropped or refused, by reason.
//!
//! In: a way to read the kernel's counters. Out: `weir_dropped_packets_total`, read at each scrape.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::counter::ConstCounter,
};

use super::metrics::family_name;
use crate::model::Family;

/// What was counted in one family for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropCount {
    /// The family.
    pub family: Family,
    /// Why packets were dropped or refused.
    pub reason: &'static str,
    /// How many.
    pub packets: u64,
}

type Read = Box<dyn Fn() -> Vec<DropCount> + Send + Sync>;

/// Where the counters are read, once there is a plane that counts.
#[derive(Clone, Default)]
pub(super) struct Drops(Arc<OnceLock<Read>>);

impl fmt::Debug for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Drops")
    }
}

impl Drops {
    /// Reads them there. The first one told stays.
    pub(super) fn read_with(&self, read: Read) {
        let _ = self.0.set(read);
    }
}

impl Collector for Drops {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let kind = ConstCounter::new(0_u64).metric_type();
        let help = "Packets of new flows dropped or rejected by nftables rules, by reason";
        let mut metric = encoder.encode_descriptor("weir_dropped_packets", help, None, kind)?;
        for count in self.0.get().map(|read| read()).unwrap_or_default() {
            let labels = [("ip_family", family_name(count.family)), ("reason", count.reason)];
            ConstCounter::new(count.packets).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
