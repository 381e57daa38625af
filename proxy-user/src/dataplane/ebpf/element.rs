//! The keys and values of a service port.
//!
//! In: a [`PortPlan`] and its placement. Out: keys and values.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_ebpf::{Column, Endpoint, FrontendKey, MemberKey, Record, Slots, flag, set};

use super::ranges::Range;
use crate::{
    model::{Family, Protocol},
    plan::{Backend, BackendSet, Destination, Frontend, FrontendPlan, PortPlan},
};

/// The indices of a service port in the maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Placement {
    /// In `ports` and `tallies`.
    pub(super) port: u32,
    /// In `records`; [`Record::NOTHING`] as long as the port has no record.
    pub(super) record: u32,
    ranges: [Range; 2],
    /// Whether the port has session affinity, because the size of `affinities` depends on the number of such
    /// ports.
    pub(super) sticky: bool,
}

impl Placement {
    pub(super) fn new(port: u32, sticky: bool) -> Self {
        Self { port, record: Record::NOTHING, ranges: [Range::default(); 2], sticky }
    }

    pub(super) fn range(&self, set: BackendSet) -> Range {
        self.ranges[set_index(set)]
    }

    pub(super) fn set_range(&mut self, set: BackendSet, range: Range) {
        self.ranges[set_index(set)] = range;
    }
}

/// The index of a backend set in [`Record::sets`].
pub(super) const fn set_index(set: BackendSet) -> usize {
    match set {
        BackendSet::Cluster => 0,
        BackendSet::Local => 1,
    }
}

/// The number of a backend set in `members`, unique among all ports.
const fn set_number(set: BackendSet, port: u32) -> u32 {
    match set {
        BackendSet::Cluster => set::number(port, set::CLUSTER),
        BackendSet::Local => set::number(port, set::LOCAL),
    }
}

/// Whether sticky clients, or sockets that send without a connection, stay with backends of this port.
pub(super) fn has_members(plan: &PortPlan) -> bool {
    plan.affinity.is_some() || plan.id.protocol == Protocol::Udp
}

/// The backends of the sets that sticky clients stay in, and of the set that flows without a connection stay
/// in.
pub(super) fn members(plan: &PortPlan, port: u32) -> impl Iterator<Item = MemberKey> + '_ {
    let chosen = BackendSet::ALL.map(|set| (set_number(set, port), plan.backends(set)));
    let chosen = chosen.into_iter().filter(|_| plan.affinity.is_some());
    let serving =
        (plan.id.protocol == Protocol::Udp).then(|| (set::number(port, set::SERVING), &*plan.serving));
    chosen.chain(serving).flat_map(|(set, backends)| {
        backends.iter().map(move |backend| MemberKey { set, backend: endpoint(backend) })
    })
}

pub(super) fn endpoint(backend: &Backend) -> Endpoint {
    Endpoint::new(backend.address, backend.port)
}

pub(super) fn key(frontend: &Frontend) -> FrontendKey {
    let protocol = frontend.protocol.number();
    match frontend.destination {
        Destination::Address(address) => FrontendKey::new(address, frontend.port, protocol),
        Destination::NodePort(family) => FrontendKey::node_port(any(family), frontend.port, protocol),
    }
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Whether the socket plane leaves a frontend to nftables: a frontend with source ranges (F7), because a
/// socket that connects may not have its address yet, and one that this node may answer itself.
pub(super) fn is_for_packets(planned: &FrontendPlan) -> bool {
    planned.allowed_sources.is_some() || planned.answered_here
}

/// The record of a port, with the columns of its frontends.
pub(super) fn record(plan: &PortPlan, placement: &Placement, columns: [Column; Record::COLUMNS]) -> Record {
    let slots = |set: BackendSet| {
        let Range { first, count } = placement.range(set);
        Slots { first: if count == 0 { 0 } else { first }, count }
    };
    Record {
        flags: if has_members(plan) { flag::MEMBERS } else { 0 },
        affinity: plan.affinity.unwrap_or(0),
        sources: 0,
        zero: 0,
        sets: BackendSet::ALL.map(slots),
        columns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataplane::ebpf::fixture::{WithFrontends as _, address, backend, port},
        plan::Target,
    };

    fn placement() -> Placement {
        let mut placement = Placement::new(3, false);
        placement.set_range(BackendSet::Cluster, Range { first: 10, count: 2 });
        placement.set_range(BackendSet::Local, Range { first: 20, count: 1 });
        placement
    }

    fn record_of(plan: &PortPlan) -> Record {
        record(plan, &placement(), [Column::default(); Record::COLUMNS])
    }

    #[test]
    fn a_record_has_the_slots_of_both_sets() {
        let sets = record_of(&port("web", &["10.244.0.1", "10.244.0.2"])).sets;
        assert_eq!(sets, [Slots { first: 10, count: 2 }, Slots { first: 20, count: 1 }]);
    }

    #[test]
    fn frontends_that_a_socket_cannot_decide_about_are_left_to_nftables() {
        let plan = port("web", &["10.244.0.1"]).at(address("198.51.100.1"), 80, [Target::Cluster; 2]);
        assert!(!is_for_packets(&plan.frontends[0]));
        let mut answered = plan.frontends[0].clone();
        answered.answered_here = true;
        assert!(is_for_packets(&answered));
        assert!(is_for_packets(&plan.guarded("203.0.113.0/24").frontends[0]), "F7");
    }

    #[test]
    fn only_udp_and_sticky_ports_have_members() {
        let mut plan = port("web", &["10.244.0.1", "10.244.0.2"]).at_ip("10.96.0.1");
        plan.local = vec![backend("10.244.0.2")];
        plan.serving = vec![backend("10.244.0.3")];
        let sets = |plan: &PortPlan| {
            let of = |member: MemberKey| (member.set, member.backend.ip().to_string());
            members(plan, 3).map(of).collect::<Vec<_>>()
        };
        let entry = |set, ip: &str| (set, ip.to_owned());
        assert_eq!((sets(&plan), record_of(&plan).flags), (vec![], 0));

        plan.affinity = Some(60);
        let sticky = [entry(12, "10.244.0.1"), entry(12, "10.244.0.2"), entry(13, "10.244.0.2")];
        assert_eq!(sets(&plan), sticky, "A1");
        let record = record_of(&plan);
        assert_eq!((record.flags, record.affinity), (flag::MEMBERS, 60));

        plan.id.protocol = Protocol::Udp;
        assert_eq!(sets(&plan), [&sticky[..], &[entry(14, "10.244.0.3")]].concat());
        plan.affinity = None;
        assert_eq!(sets(&plan), [entry(14, "10.244.0.3")], "K2");
        assert_eq!(record_of(&plan).flags, flag::MEMBERS);
    }

    #[test]
    fn no_destination_is_a_node_ports_key() {
        for (family, unspecified) in [(Family::V4, "0.0.0.0"), (Family::V6, "::")] {
            let destination = Destination::NodePort(family);
            let found = key(&Frontend { destination, protocol: Protocol::Udp, port: 30080 });
            let unspecified = unspecified.parse().unwrap();
            assert_eq!(found, FrontendKey::node_port(unspecified, 30080, 17));
            assert_ne!(found, FrontendKey::new(unspecified, 30080, 17));
        }
    }
}
