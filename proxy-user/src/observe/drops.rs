//! Metrics of packets that rules dropped or rejected, by reason.
//!
//! In: a function that reads the kernel's counters. Out: `weir_dropped_packets_total`, read at each scrape.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::counter::ConstCounter,
};

use super::registration::family_name;
use crate::model::Family;

/// How many packets of a family were dropped or rejected for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropCount {
    /// The IP family of the packets.
    pub family: Family,
    /// The label's value, such as `no-endpoints`.
    pub reason: &'static str,
    /// The number since the table was created.
    pub packets: u64,
}

type Read = Box<dyn Fn() -> Vec<DropCount> + Send + Sync>;

/// The function that reads the counters; set once a plane that counts is open.
#[derive(Clone, Default)]
pub(super) struct Drops(Arc<OnceLock<Read>>);

impl fmt::Debug for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Drops")
    }
}

impl Drops {
    /// Sets the function that reads. Only the first call has an effect.
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
