//! Metrics of each service port that somebody used here.
//!
//! In: a way to read the kernel's counters. Out: `weir_service_*`, read at each scrape. A port nobody used makes no
//! series, so that their number follows the traffic of the node and not the size of the cluster.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, OnceLock},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::counter::ConstCounter,
};

/// What was counted for a service port of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortCount {
    /// The Service's namespace.
    pub namespace: String,
    /// The Service's name.
    pub service: String,
    /// The port's name, empty when it has none.
    pub port: String,
    /// The protocol, in capitals.
    pub protocol: String,
    /// New flows led to a backend.
    pub served: u64,
    /// New flows refused for want of endpoints.
    pub refused: u64,
}

/// How many were led and refused.
type Counts = (u64, u64);
type Read = Box<dyn Fn() -> Vec<PortCount> + Send + Sync>;

/// Where the counters are read, once there is a plane that counts.
#[derive(Clone, Default)]
pub(super) struct Services(Arc<OnceLock<Read>>);

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Services")
    }
}

impl Services {
    /// Reads them there. The first one told stays.
    pub(super) fn read_with(&self, read: Read) {
        let _ = self.0.set(read);
    }

    /// Both families of a port together.
    fn counts(&self) -> BTreeMap<[String; 4], Counts> {
        let mut counts = BTreeMap::<_, Counts>::new();
        for count in self.0.get().map(|read| read()).unwrap_or_default() {
            let PortCount { namespace, service, port, protocol, served, refused } = count;
            if served > 0 || refused > 0 {
                let sum = counts.entry([namespace, service, port, protocol]).or_default();
                *sum = (sum.0 + served, sum.1 + refused);
            }
        }
        counts
    }
}

impl Collector for Services {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let counts = self.counts();
        let names = [
            ("weir_service_connections", "New flows translated to a backend at the socket"),
            ("weir_service_refusals", "New flows refused at the socket because the Service has no endpoints"),
        ];
        for (index, (name, help)) in names.into_iter().enumerate() {
            let kind = ConstCounter::new(0_u64).metric_type();
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            for ([namespace, service, port, protocol], count) in &counts {
                let labels = [
                    ("namespace", namespace.as_str()),
                    ("port", port.as_str()),
                    ("protocol", protocol.as_str()),
                    ("service", service.as_str()),
                ];
                let count = if index == 0 { count.0 } else { count.1 };
                ConstCounter::new(count).encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
