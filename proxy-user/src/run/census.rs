//! Totals of programmed frontends and backends.
//!
//! In: the port changes of deltas that are in force. Out: the numbers for the metrics, counted along with each change.

use crate::{
    model::{Family, PerFamily},
    observe::{Metrics, TrafficPolicy},
    plan::{PortDelta, PortPlan, Target},
};

#[derive(Debug, Default)]
pub(super) struct Census {
    frontends: PerFamily<usize>,
    backends: PerFamily<usize>,
    /// Ports that drop ClusterIP traffic (F2) and external traffic (F3) because no endpoint is here.
    internal_drops: PerFamily<usize>,
    external_drops: PerFamily<usize>,
}

impl Census {
    pub(super) fn count(&mut self, delta: &PortDelta) {
        if let Some(plan) = &delta.before {
            self.shift(plan, usize::saturating_sub);
        }
        if let Some(plan) = &delta.after {
            self.shift(plan, usize::saturating_add);
        }
    }

    /// Sets a family to zero, because a complete delta counts all of it again.
    pub(super) fn forget(&mut self, family: Family) {
        for totals in
            [&mut self.frontends, &mut self.backends, &mut self.internal_drops, &mut self.external_drops]
        {
            *totals.get_mut(family) = 0;
        }
    }

    fn shift(&mut self, plan: &PortPlan, by: fn(usize, usize) -> usize) {
        let shift = |number: &mut usize, amount: usize| *number = by(*number, amount);
        let family = plan.id.family;
        shift(self.frontends.get_mut(family), plan.frontends.len());
        shift(self.backends.get_mut(family), plan.cluster.len());
        let routes = || plan.frontends.iter().map(|planned| planned.route);
        let internal = routes().any(|route| route.host.target == Target::Drop);
        let external =
            routes().any(|route| route.outside.target == Target::Drop && route.host.target != Target::Drop);
        shift(self.internal_drops.get_mut(family), usize::from(internal));
        shift(self.external_drops.get_mut(family), usize::from(external));
    }

    pub(super) fn publish(&self, metrics: &Metrics, services: usize) {
        let both = |totals: &PerFamily<usize>| totals.v4 + totals.v6;
        metrics.set_size(services, both(&self.frontends), both(&self.backends));
        for family in Family::ALL {
            metrics.no_local_endpoints(family, TrafficPolicy::Internal, *self.internal_drops.get(family));
            metrics.no_local_endpoints(family, TrafficPolicy::External, *self.external_drops.get(family));
        }
    }
}
