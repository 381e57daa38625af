//! How much is programmed, kept up to date from what changes.
//!
//! In: the port changes of deltas that are in force. Out: the numbers for the metrics, without a walk over everything.

use crate::{
    model::{Family, PerFamily},
    observe::{Metrics, TrafficPolicy},
    plan::{PortDelta, PortPlan, Target},
};

/// The running totals.
#[derive(Debug, Default)]
pub(super) struct Census {
    frontends: usize,
    backends: usize,
    /// Ports that drop ClusterIP traffic (F2) and external traffic (F3) because no endpoint is here.
    internal_drops: PerFamily<usize>,
    external_drops: PerFamily<usize>,
}

impl Census {
    /// Counts a change that is in force.
    pub(super) fn count(&mut self, delta: &PortDelta) {
        if let Some(plan) = &delta.before {
            self.shift(plan, usize::saturating_sub);
        }
        if let Some(plan) = &delta.after {
            self.shift(plan, usize::saturating_add);
        }
    }

    fn shift(&mut self, plan: &PortPlan, by: fn(usize, usize) -> usize) {
        let shift = |number: &mut usize, amount: usize| *number = by(*number, amount);
        shift(&mut self.frontends, plan.frontends.len());
        shift(&mut self.backends, plan.cluster.len());
        let routes = || plan.frontends.iter().map(|planned| planned.route);
        let internal = routes().any(|route| route.host.target == Target::Drop);
        let external =
            routes().any(|route| route.outside.target == Target::Drop && route.host.target != Target::Drop);
        shift(self.internal_drops.get_mut(plan.id.family), usize::from(internal));
        shift(self.external_drops.get_mut(plan.id.family), usize::from(external));
    }

    /// Shows the totals.
    pub(super) fn publish(&self, metrics: &Metrics, services: usize) {
        metrics.set_size(services, self.frontends, self.backends);
        for family in Family::ALL {
            metrics.no_local_endpoints(family, TrafficPolicy::Internal, *self.internal_drops.get(family));
            metrics.no_local_endpoints(family, TrafficPolicy::External, *self.external_drops.get(family));
        }
    }
}
