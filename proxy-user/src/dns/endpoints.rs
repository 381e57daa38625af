//! Which endpoints of a Service are in an answer, and in which order.
//!
//! In: the endpoints of a Service, and a query. Out: endpoints with the ports of their slice, each address once. Each
//! query starts with another endpoint, and gets no more than its reply has room for.

use hickory_proto::rr::RecordType;

use super::names::{Named, NamedEndpoint, NamedPort, NamedService, NamedSlice, Names, Nearness};
use super::question::{Part, Query};
use crate::model::Family;

/// An endpoint that is in the answer, and its slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen<'a> {
    pub(super) endpoint: &'a NamedEndpoint,
    slice: &'a NamedSlice,
}

impl<'a> Chosen<'a> {
    pub(super) fn ports(self) -> impl Iterator<Item = &'a NamedPort> {
        self.slice.ports.iter()
    }
}

/// The endpoints that belong to the part. Empty only when it has no endpoint of either family.
pub(super) fn choose<'a>(
    names: &Names,
    named: &'a Named,
    service: &NamedService,
    part: Part<'_>,
    topology: bool,
    query: &Query<'_>,
) -> Vec<Chosen<'a>> {
    let counts = |chosen: &Chosen<'_>| {
        (chosen.endpoint.ready || service.publish_not_ready)
            && match part {
                Part::Whole => true,
                Part::Endpoint(label) => chosen.endpoint.label() == label,
                Part::Protocol(_) | Part::Port { .. } => {
                    chosen.ports().any(|port| part.selects(&port.name, port.protocol))
                }
            }
    };
    let all = named
        .slices()
        .flat_map(|slice| slice.endpoints.iter().map(move |endpoint| Chosen { endpoint, slice }));
    let mut chosen: Vec<Chosen<'a>> = all.filter(counts).collect();
    if topology && service.is_headless() && part == Part::Whole {
        keep_near(names, service.nearness, &mut chosen);
    }
    rotate(&mut chosen, query);
    chosen
}

/// Keeps only the endpoints near this node, if there are any.
fn keep_near(names: &Names, nearness: Nearness, chosen: &mut Vec<Chosen<'_>>) {
    let near = |on_node: bool, chosen: &Chosen<'_>| {
        if on_node { chosen.endpoint.local } else { names.in_zone(chosen.endpoint) }
    };
    let steps: &[bool] = match nearness {
        Nearness::Any => &[],
        Nearness::SameZone => &[false],
        Nearness::SameNode => &[true, false],
    };
    for on_node in steps {
        if chosen.iter().any(|chosen| near(*on_node, chosen)) {
            return chosen.retain(|chosen| near(*on_node, chosen));
        }
    }
}

/// Rotates the endpoints and drops those that the reply has no room for. Keeps one endpoint of the other family if
/// there is none of the query's family, because the name exists.
fn rotate(chosen: &mut Vec<Chosen<'_>>, query: &Query<'_>) {
    let family = match query.kind {
        RecordType::A => Some(Family::V4),
        RecordType::AAAA => Some(Family::V6),
        _ => None,
    };
    if let Some(family) = family {
        let of_family = |chosen: &Chosen<'_>| Family::of(chosen.endpoint.address) == family;
        if chosen.iter().any(of_family) {
            chosen.retain(of_family);
        } else {
            chosen.truncate(1);
        }
    }
    if !chosen.is_empty() {
        let first = query.rotation as usize % chosen.len();
        chosen.rotate_left(first);
    }
    chosen.truncate(query.most);
    // An endpoint that moves from one slice to another is in both for a moment.
    if query.kind != RecordType::SRV {
        let mut seen = rustc_hash::FxHashSet::default();
        chosen.retain(|chosen| seen.insert(chosen.endpoint.address));
    }
}
