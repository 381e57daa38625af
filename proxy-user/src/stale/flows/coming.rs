//! Ports that the kernel is about to be told, for a walk that judges flows by what was in force before.
//!
//! In: deltas, each before it is applied. Out: whether one of them makes a flow right that suspects call stale.
//!
//! A walk may take long, and the kernel goes on meanwhile: a Service that comes back, or an endpoint that joins, gets
//! flows that the walk finds, and that are right.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use super::{
    Flow,
    suspect::{answers, is_udp},
};
use crate::{
    model::{Family, Protocol},
    plan::{Destination, Frontend, PortDelta, PortPlan},
};

/// What was announced. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Coming(Arc<Mutex<Announced>>);

#[derive(Debug, Default)]
struct Announced {
    /// How many deltas were announced.
    deltas: u64,
    /// The last port that was announced with each frontend, and by which delta.
    ports: FxHashMap<Frontend, (u64, Arc<PortPlan>)>,
}

impl Coming {
    /// The kernel will be told of these ports next.
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

    /// How many deltas were announced.
    pub(super) fn deltas(&self) -> u64 {
        self.lock().deltas
    }

    /// So many deltas are in force or have failed, and the suspects of those that are in force are known.
    pub(super) fn forget(&self, deltas: u64) {
        self.lock().ports.retain(|_, (delta, _)| *delta > deltas);
    }

    /// Whether a port that was announced serves the flow.
    pub(super) fn makes_right(&self, flow: Flow) -> bool {
        let (address, port) = (flow.destination.ip(), flow.destination.port());
        let announced = self.lock();
        [Destination::Address(address), Destination::NodePort(Family::of(address))].into_iter().any(
            |destination| {
                let frontend = Frontend { destination, protocol: Protocol::Udp, port };
                announced.ports.get(&frontend).is_some_and(|(_, port)| {
                    answers(port, flow)
                        && port.frontend(frontend).is_some_and(|planned| planned.lets_in(flow.client))
                })
            },
        )
    }

    fn lock(&self) -> MutexGuard<'_, Announced> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
