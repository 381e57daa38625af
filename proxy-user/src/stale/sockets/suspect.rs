//! How service ports change whose clients' sockets are closed once their backend stopped serving.
//!
//! In: a [`Delta`] that is in force. Out: [`Suspects`], which say what serves now and since when.

use std::sync::Arc;

use super::clock;
use crate::plan::{Backend, Delta, FrontendPlan, NodePlan, PortDelta, PortId, PortPlan, Removal};

/// What a delta says about service ports whose [`PortPlan::on_removal`] is not to keep sockets.
#[derive(Clone, Debug)]
pub struct Suspects {
    /// When they were in force, in nanoseconds of CLOCK_MONOTONIC.
    pub(super) at: u64,
    /// Whether `ports` are all there are.
    pub(super) complete: bool,
    pub(super) node: Option<Arc<NodePlan>>,
    pub(super) ports: Vec<Change>,
    /// Whether addresses of Services came.
    pub(super) came: bool,
}

/// How one service port changed.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) id: PortId,
    /// What served and does not any more.
    pub(super) lost: Vec<Backend>,
    pub(super) now: Now,
}

/// What a service port is.
#[derive(Clone, Debug)]
pub(super) enum Now {
    /// Closing sockets, as planned.
    Watched(Arc<PortPlan>),
    /// Keeping sockets.
    Kept,
    /// No more.
    Gone,
}

impl Suspects {
    /// What `delta`, which must be in force by now, says: sockets that are led to a backend later than this are not
    /// judged by it. Of a port that could not be programmed it says what is wanted; no harm comes of that, since
    /// sockets are closed only for backends that do not serve.
    #[must_use]
    pub fn of(delta: &Delta) -> Self {
        Self {
            at: clock(),
            complete: delta.complete,
            node: delta.node.clone(),
            ports: delta.ports.iter().filter_map(change).collect(),
            came: delta.complete || delta.ports.iter().any(came),
        }
    }

    /// Whether nothing follows from it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.complete && self.node.is_none() && self.ports.is_empty() && !self.came
    }
}

/// Whether a service port has a frontend that it had not.
fn came(delta: &PortDelta) -> bool {
    let is_new = |planned: &FrontendPlan| {
        delta.before.as_ref().is_none_or(|before| before.frontend(planned.frontend).is_none())
    };
    delta.after.as_ref().is_some_and(|after| after.frontends.iter().any(is_new))
}

fn change(delta: &PortDelta) -> Option<Change> {
    let watched = |plan: &&Arc<PortPlan>| plan.on_removal != Removal::Keep;
    let (before, after) = (delta.before.as_ref().filter(watched), delta.after.as_ref());
    let now = match (before, after) {
        (_, Some(after)) if watched(&after) => Now::Watched(Arc::clone(after)),
        (Some(_), Some(_)) => Now::Kept,
        (Some(_), None) => Now::Gone,
        (None, _) => return None,
    };
    let served = before.map(|plan| &plan.serving[..]).unwrap_or_default();
    let lost = served.iter().filter(|backend| !after.is_some_and(|after| serves(after, backend)));
    Some(Change { id: delta.id()?.clone(), lost: lost.copied().collect(), now })
}

/// Whether clients may stay with a backend, because it serves (K2) or new clients are still led there: an endpoint may
/// be ready without serving (E2).
pub(super) fn serves(plan: &PortPlan, backend: &Backend) -> bool {
    let end = |known: &Backend| (known.address, known.port);
    plan.serving.binary_search_by_key(&end(backend), end).is_ok()
        || plan.cluster.iter().chain(&plan.local).any(|known| end(known) == end(backend))
}
