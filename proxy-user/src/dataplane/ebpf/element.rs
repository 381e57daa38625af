//! What stands in the maps for a service port.
//!
//! In: a [`PortPlan`], and where its backends are. Out: keys and values.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_ebpf::{Column, Endpoint, FrontendKey, MemberKey, Record, Slots, flag, set};

use super::slots::Range;
use crate::{
    model::{Family, Protocol},
    plan::{Backend, Destination, Frontend, FrontendPlan, PortPlan},
};

/// The two backend sets of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Set {
    Cluster,
    Local,
}

impl Set {
    pub(super) const ALL: [Self; 2] = [Self::Cluster, Self::Local];

    pub(super) fn of(self, plan: &PortPlan) -> &[Backend] {
        match self {
            Self::Cluster => &plan.cluster,
            Self::Local => &plan.local,
        }
    }

    /// The set's number, unique among all ports.
    pub(super) const fn number(self, port: u32) -> u32 {
        match self {
            Self::Cluster => set::number(port, set::CLUSTER),
            Self::Local => set::number(port, set::LOCAL),
        }
    }

    pub(super) const fn index(self) -> usize {
        match self {
            Self::Cluster => 0,
            Self::Local => 1,
        }
    }
}

/// Where a service port is in the maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Site {
    /// Its number.
    pub(super) port: u32,
    /// Its record; [`Record::NOTHING`] before there is one.
    pub(super) record: u32,
    ranges: [Range; 2],
    /// Whether it has session affinity, which is counted.
    pub(super) sticky: bool,
}

impl Site {
    pub(super) fn new(port: u32, sticky: bool) -> Self {
        Self { port, record: Record::NOTHING, ranges: [Range::default(); 2], sticky }
    }

    pub(super) fn range(&self, set: Set) -> Range {
        self.ranges[set.index()]
    }

    pub(super) fn set_range(&mut self, set: Set, range: Range) {
        self.ranges[set.index()] = range;
    }
}

/// Whether sockets are served: the hooks see no SCTP.
pub(super) fn is_for_sockets(protocol: Protocol) -> bool {
    match protocol {
        Protocol::Tcp | Protocol::Udp => true,
        Protocol::Sctp => false,
    }
}

/// Whether somebody remembers backends of this port: sticky clients, and sockets that send without a connection.
pub(super) fn has_members(plan: &PortPlan) -> bool {
    plan.affinity.is_some() || plan.id.protocol == Protocol::Udp
}

/// Every backend that is to be in `members`: of the sets sticky clients stay in, and those that flows without a
/// connection stay with.
pub(super) fn members(plan: &PortPlan, port: u32) -> impl Iterator<Item = MemberKey> + '_ {
    let chosen = Set::ALL.map(|set| (set.number(port), set.of(plan)));
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

/// The key of a frontend.
pub(super) fn key(frontend: &Frontend) -> FrontendKey {
    let protocol = frontend.protocol.number();
    match frontend.destination {
        Destination::Address(address) => FrontendKey::new(address, frontend.port, protocol),
        Destination::NodePort(family) => FrontendKey::node_port(any(family), frontend.port, protocol),
    }
}

/// An address of a family.
fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Whether only packets can decide about a frontend: sources that are not let in (F7), because a socket that connects may
/// not have its address yet, and what is answered here for as long as a frontend does.
pub(super) fn is_for_packets(planned: &FrontendPlan) -> bool {
    planned.allowed_sources.is_some() || planned.answered_here
}

/// The record of a port whose frontends have these columns.
pub(super) fn record(plan: &PortPlan, site: &Site, columns: [Column; Record::COLUMNS]) -> Record {
    let slots = |set: Set| {
        let Range { first, count } = site.range(set);
        Slots { first: if count == 0 { 0 } else { first }, count }
    };
    Record {
        flags: if has_members(plan) { flag::MEMBERS } else { 0 },
        affinity: plan.affinity.unwrap_or(0),
        sources: 0,
        zero: 0,
        sets: Set::ALL.map(slots),
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

    fn site() -> Site {
        let mut site = Site::new(3, false);
        site.set_range(Set::Cluster, Range { first: 10, count: 2 });
        site.set_range(Set::Local, Range { first: 20, count: 1 });
        site
    }

    fn record_of(plan: &PortPlan) -> Record {
        record(plan, &site(), [Column::default(); Record::COLUMNS])
    }

    #[test]
    fn a_record_has_the_slots_of_both_sets() {
        let sets = record_of(&port("web", &["10.244.0.1", "10.244.0.2"])).sets;
        assert_eq!(sets, [Slots { first: 10, count: 2 }, Slots { first: 20, count: 1 }]);
    }

    #[test]
    fn what_only_packets_can_decide_is_left_to_them() {
        let plan = port("web", &["10.244.0.1"]).at(address("198.51.100.1"), 80, [Target::Cluster; 2]);
        assert!(!is_for_packets(&plan.frontends[0]));
        let mut answered = plan.frontends[0].clone();
        answered.answered_here = true;
        assert!(is_for_packets(&answered));
        assert!(is_for_packets(&plan.guarded("203.0.113.0/24").frontends[0]), "F7");
    }

    #[test]
    fn only_what_is_remembered_has_members() {
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
        assert!(!is_for_sockets(Protocol::Sctp));
    }
}
