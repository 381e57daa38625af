//! Changes of the service ports whose clients' sockets weir closes when a backend stops serving.
//!
//! In: a [`Delta`] that is in force. Out: [`Suspects`]: which backends serve now, and since when.

use std::sync::Arc;

use super::clock;
use crate::plan::{Backend, Delta, FrontendPlan, NodePlan, PortDelta, PortId, PortPlan, Removal};

/// The changes of service ports whose [`PortPlan::on_removal`] does not keep sockets.
#[derive(Clone, Debug)]
pub struct Suspects {
    /// When the delta was in force, in nanoseconds of CLOCK_MONOTONIC.
    pub(super) at: u64,
    /// Whether `ports` has all service ports.
    pub(super) complete: bool,
    pub(super) node: Option<Arc<NodePlan>>,
    pub(super) ports: Vec<Change>,
    /// Whether there are new frontends.
    pub(super) came: bool,
}

/// The change of one service port.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) id: PortId,
    /// Backends that no longer serve.
    pub(super) lost: Vec<Backend>,
    pub(super) now: Now,
}

/// The new state of a service port.
#[derive(Clone, Debug)]
pub(super) enum Now {
    /// Its sockets are closed.
    Watched(Arc<PortPlan>),
    /// Its sockets stay.
    Kept,
    /// It was deleted.
    Gone,
}

impl Suspects {
    /// The changes of `delta`, which must be in force by now, because sockets that connect later are not checked
    /// against it. For a port that could not be programmed they have the plan. That is harmless, because sockets are
    /// closed only if their backend does not serve.
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

    /// Whether no socket has to be checked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.complete && self.node.is_none() && self.ports.is_empty() && !self.came
    }
}

/// Whether a service port has a new frontend.
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
    let lost = served
        .iter()
        .filter(|backend| !after.is_some_and(|after| after.serves(backend.address, backend.port)));
    Some(Change { id: delta.id()?.clone(), lost: lost.copied().collect(), now })
}
