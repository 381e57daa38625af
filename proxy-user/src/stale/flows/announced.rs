//! Service ports that weir is about to write to the kernel.
//!
//! In: deltas, each before it is applied. Out: whether an announced port serves a flow that suspects call stale.
//!
//! A sweep may take long, and the kernel gets new changes meanwhile. A Service that comes back, or an endpoint that
//! joins, gets flows that the sweep finds, and that must stay.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use super::{Flow, suspect::is_udp};
use crate::{
    model::{Family, Protocol},
    plan::{Destination, Frontend, PortDelta, PortPlan},
};

/// The announced ports. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct AnnouncedPorts(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The number of announced deltas.
    deltas: u64,
    /// The last announced port of each frontend, and the number of its delta.
    ports: FxHashMap<Frontend, (u64, Arc<PortPlan>)>,
}

impl AnnouncedPorts {
    /// Announces ports that weir writes to the kernel next.
    pub fn announce<'a>(&self, ports: impl IntoIterator<Item = &'a PortDelta>) {
        let mut announced = self.lock();
        announced.deltas += 1;
        let delta = announced.deltas;
        for after in ports.into_iter().filter(|port| is_udp(port)).filter_map(|port| port.after.as_ref()) {
            for planned in &after.frontends {
                announced.ports.insert(planned.frontend, (delta, Arc::clone(after)));
            }
        }
    }

    /// The number of announced deltas.
    pub(super) fn deltas(&self) -> u64 {
        self.lock().deltas
    }

    /// Drops the ports of the first `deltas` deltas, because these are in force or have failed, and the sweep has their
    /// suspects.
    pub(super) fn forget(&self, deltas: u64) {
        self.lock().ports.retain(|_, (delta, _)| *delta > deltas);
    }

    /// Whether an announced port serves the flow.
    pub(super) fn serves(&self, flow: Flow) -> bool {
        let (address, port) = (flow.destination.ip(), flow.destination.port());
        let announced = self.lock();
        [Destination::Address(address), Destination::NodePort(Family::of(address))].into_iter().any(
            |destination| {
                let frontend = Frontend { destination, protocol: Protocol::Udp, port };
                announced.ports.get(&frontend).is_some_and(|(_, port)| {
                    flow.is_served_by(port)
                        && port.frontend(frontend).is_some_and(|planned| planned.lets_in(flow.client))
                })
            },
        )
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
