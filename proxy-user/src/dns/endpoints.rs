//! Which endpoints of a Service an answer has, and in what order.
//!
//! In: what is known under a Service's name, and what is asked for. Out: endpoints with the ports of their slice, each
//! address once, the first another one each time. No more than an answer has room for are looked at twice.

use hickory_proto::rr::RecordType;

use super::names::{Named, NamedEndpoint, NamedPort, NamedService, NamedSlice, Names, Nearness};
use super::{
    answer::{Query, is},
    question::Part,
};
use crate::model::Family;

/// An endpoint and the slice it is in.
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

/// The endpoints that the part of the Service has. Empty only when it has none of any family.
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
                    chosen.ports().any(|port| is(part, &port.name, port.protocol))
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

/// Keeps those near this node, if there are any.
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

/// Lets another one be the first, and leaves out what would be cut off. One that is not of the family asked for stays,
/// if there is no other: the name is there.
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
    // An endpoint on its way from one slice to another is in both for a moment.
    if query.kind != RecordType::SRV {
        let mut seen = rustc_hash::FxHashSet::default();
        chosen.retain(|chosen| seen.insert(chosen.endpoint.address));
    }
}
