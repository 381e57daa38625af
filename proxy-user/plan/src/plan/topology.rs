//! Selects the endpoints of a service port that this node may use (E4 to E10).
//!
//! In: the endpoints of the port, the sets that its frontends use, this node. Out: the two backend sets.

use super::Backend;
use crate::model::{Candidate, NodeView};

/// The sets that the frontends of a port use (E4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Uses {
    /// The Cluster set.
    pub(super) cluster: bool,
    /// The Local set.
    pub(super) local: bool,
}

/// The selected endpoints.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Selection {
    /// The Cluster set (E6), sorted.
    pub(super) cluster: Vec<Backend>,
    /// The Local set (E7), sorted.
    pub(super) local: Vec<Backend>,
    /// Whether there is a usable endpoint on any node (E8).
    pub(super) any: bool,
}

/// How hints narrow the Cluster set (E9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Preference {
    Nothing,
    SameNode,
    SameZone,
}

/// Selects from `candidates`, which are sorted.
pub(super) fn select(candidates: &[Candidate<'_>], uses: Uses, node: &NodeView) -> Selection {
    let cluster = if uses.cluster { cluster_set(candidates, node) } else { Vec::new() };
    let local = if uses.local { local_set(candidates) } else { Vec::new() };
    let usable = |candidate: &Candidate<'_>| candidate.endpoint.ready || is_draining(candidate);
    let any = !cluster.is_empty() || (uses.local && candidates.iter().any(usable));
    Selection { cluster, local, any }
}

/// The Cluster set: ready endpoints, narrowed by hints; if none is ready, terminating endpoints that still
/// serve (E6).
fn cluster_set(candidates: &[Candidate<'_>], node: &NodeView) -> Vec<Backend> {
    let preference = preference(candidates, node);
    let ready = backends(candidates, |candidate| {
        candidate.endpoint.ready && is_preferred(candidate, preference, node)
    });
    if ready.is_empty() { backends(candidates, is_draining) } else { ready }
}

/// The Local set, independent of other nodes' endpoints and of hints (E7).
fn local_set(candidates: &[Candidate<'_>]) -> Vec<Backend> {
    let ready = backends(candidates, |candidate| candidate.endpoint.local && candidate.endpoint.ready);
    if !ready.is_empty() {
        return ready;
    }
    backends(candidates, |candidate| candidate.endpoint.local && is_draining(candidate))
}

/// Whether the endpoint is terminating and still serves.
fn is_draining(candidate: &Candidate<'_>) -> bool {
    candidate.endpoint.serving && candidate.endpoint.terminating
}

/// Hints count only if every ready endpoint has them and one of them names this node or zone. Node hints go
/// before zone hints (E9).
fn preference(candidates: &[Candidate<'_>], node: &NodeView) -> Preference {
    let ready = || candidates.iter().filter(|candidate| candidate.endpoint.ready);
    let holds = |hinted: fn(&Candidate<'_>) -> bool, preference| {
        ready().all(hinted) && ready().any(|candidate| is_preferred(candidate, preference, node))
    };
    if holds(|candidate| candidate.endpoint.node_hint.is_some(), Preference::SameNode) {
        Preference::SameNode
    } else if holds(|candidate| candidate.endpoint.zones.is_some(), Preference::SameZone) {
        Preference::SameZone
    } else {
        Preference::Nothing
    }
}

/// Whether a preference keeps an endpoint (E10).
fn is_preferred(candidate: &Candidate<'_>, preference: Preference, node: &NodeView) -> bool {
    match preference {
        Preference::Nothing => true,
        Preference::SameNode => candidate.endpoint.node_hint == Some(true),
        Preference::SameZone => {
            candidate.endpoint.zones.as_deref().is_some_and(|zones| zones.contains(&node.zone))
        }
    }
}

/// The candidates that fulfil a condition, as backends.
pub(super) fn backends(candidates: &[Candidate<'_>], keep: impl Fn(&Candidate<'_>) -> bool) -> Vec<Backend> {
    let kept = candidates.iter().filter(|candidate| keep(candidate));
    let mut kept: Vec<Backend> = kept
        .map(|Candidate { endpoint, port }| Backend {
            address: endpoint.address,
            port: *port,
            local: endpoint.local || endpoint.unplaced,
        })
        .collect();
    kept.shrink_to_fit();
    kept
}
