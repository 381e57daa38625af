//! What stands in the maps for a service port.
//!
//! In: a [`PortPlan`], and where its backends are. Out: keys and values.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_ebpf::{Choice, Endpoint, FrontendKey, FrontendValue, MemberKey, flag, set, verdict};

use super::slots::Range;
use crate::{
    model::{Family, Protocol},
    plan::{Backend, Destination, Frontend, FrontendPlan, PortPlan, Target, Treatment},
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

    const fn index(self) -> usize {
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
    ranges: [Range; 2],
    /// Whether it has session affinity, which is counted.
    pub(super) sticky: bool,
}

impl Site {
    pub(super) fn new(port: u32, sticky: bool) -> Self {
        Self { port, ranges: [Range::default(); 2], sticky }
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
    let address = match frontend.destination {
        Destination::Address(address) => address,
        Destination::NodePort(family) => unspecified(family),
    };
    FrontendKey::new(address, frontend.port, frontend.protocol.number())
}

/// What stands for every address of this node.
pub(super) fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The value of a frontend. What only packets can decide is left to them: sources that are not let in (F7), because a
/// socket that connects may not have its address yet, what is answered here for as long as somebody does, and addresses
/// that are `theirs` for another reason.
pub(super) fn value(plan: &PortPlan, planned: &FrontendPlan, site: &Site, theirs: bool) -> FrontendValue {
    let theirs = theirs || planned.allowed_sources.is_some() || planned.answered_here;
    let choice = |treatment: Treatment| match treatment.target {
        _ if theirs => Choice::default(),
        Target::Cluster => serve(site, Set::Cluster),
        Target::Local => serve(site, Set::Local),
        Target::Reject => Choice { verdict: verdict::REFUSE, ..Choice::default() },
        Target::Drop => Choice::default(),
    };
    FrontendValue {
        port: site.port,
        flags: if has_members(plan) { flag::MEMBERS } else { 0 },
        affinity: plan.affinity.unwrap_or(0),
        zero: 0,
        pod: choice(planned.route.pod),
        host: choice(planned.route.host),
    }
}

fn serve(site: &Site, set: Set) -> Choice {
    let Range { first, count } = site.range(set);
    Choice { first, count, set: set.number(site.port), verdict: verdict::SERVE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::ebpf::fixture::{address, backend, port};

    fn site() -> Site {
        let mut site = Site::new(3, false);
        site.set_range(Set::Cluster, Range { first: 10, count: 2 });
        site.set_range(Set::Local, Range { first: 20, count: 1 });
        site
    }

    fn value_of(plan: &PortPlan, theirs: bool) -> FrontendValue {
        value(plan, &plan.frontends[0], &site(), theirs)
    }

    #[test]
    fn pods_and_the_host_each_get_what_their_route_says() {
        let cluster = Choice { first: 10, count: 2, set: 12, verdict: verdict::SERVE };
        let local = Choice { first: 20, count: 1, set: 13, verdict: verdict::SERVE };
        let refuse = Choice { verdict: verdict::REFUSE, ..Choice::default() };
        let all = [
            (Target::Cluster, cluster),
            (Target::Local, local),
            (Target::Reject, refuse),
            // F2: a socket cannot be left waiting, so its packets are dropped.
            (Target::Drop, Choice::default()),
        ];
        for ((pod, for_pod), (host, for_host)) in all.into_iter().flat_map(|pod| all.map(|host| (pod, host)))
        {
            let plan = port("web", &[]).at(address("10.96.0.1"), 80, [pod, host]);
            let value = value_of(&plan, false);
            assert_eq!((value.port, value.pod, value.host), (3, for_pod, for_host), "{pod:?} and {host:?}");
        }
    }

    #[test]
    fn what_only_packets_can_decide_is_left_to_them() {
        let plan =
            port("web", &["10.244.0.1"]).at(address("198.51.100.1"), 80, [Target::Cluster, Target::Reject]);
        let pass = Choice::default();
        assert_eq!(pass.verdict, verdict::PASS);
        let value = value_of(&plan, true);
        assert_eq!((value.pod, value.host), (pass, pass), "an address of the host's own");
        let value = value_of(&plan.guarded("203.0.113.0/24"), false);
        assert_eq!((value.pod, value.host), (pass, pass), "F7");
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
        assert_eq!((sets(&plan), value_of(&plan, false).flags), (vec![], 0));

        plan.affinity = Some(60);
        let sticky = [entry(12, "10.244.0.1"), entry(12, "10.244.0.2"), entry(13, "10.244.0.2")];
        assert_eq!(sets(&plan), sticky, "A1");
        let value = value_of(&plan, false);
        assert_eq!((value.flags, value.affinity), (flag::MEMBERS, 60));

        plan.id.protocol = Protocol::Udp;
        assert_eq!(sets(&plan), [&sticky[..], &[entry(14, "10.244.0.3")]].concat());
        plan.affinity = None;
        assert_eq!(sets(&plan), [entry(14, "10.244.0.3")], "K2");
        assert_eq!(value_of(&plan, false).flags, flag::MEMBERS);
    }

    #[test]
    fn a_node_port_has_the_unspecified_address_of_its_family() {
        for (family, unspecified) in [(Family::V4, "0.0.0.0"), (Family::V6, "::")] {
            let destination = Destination::NodePort(family);
            let found = key(&Frontend { destination, protocol: Protocol::Udp, port: 30080 });
            assert_eq!(found, FrontendKey::new(unspecified.parse().unwrap(), 30080, 17));
        }
        assert!(!is_for_sockets(Protocol::Sctp));
    }
}
