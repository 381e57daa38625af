//! Metrics of each service port that clients on this node used.
//!
//! In: a function that reads the kernel's counters. Out: `weir_service_*`, read at each scrape. An unused port has no
//! series, so the number of series depends on the node's traffic and not on the size of the cluster.

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

/// The counters of a service port in one family.
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
    /// New flows that were translated to a backend.
    pub served: u64,
    /// New flows that were refused because there are no endpoints.
    pub refused: u64,
}

/// How many flows were served and refused.
type Counts = (u64, u64);
type Read = Box<dyn Fn() -> Vec<PortCount> + Send + Sync>;

/// The function that reads the counters; set once a plane that counts is open.
#[derive(Clone, Default)]
pub(super) struct Services(Arc<OnceLock<Read>>);

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Services")
    }
}

impl Services {
    /// Sets the function that reads. Only the first call has an effect.
    pub(super) fn read_with(&self, read: Read) {
        let _ = self.0.set(read);
    }

    /// The counters of both families of a port, added.
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
