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
/// socket that connects may not have its address yet, and addresses that are `theirs` for another reason.
pub(super) fn value(plan: &PortPlan, planned: &FrontendPlan, site: &Site, theirs: bool) -> FrontendValue {
    let theirs = theirs || planned.allowed_sources.is_some();
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
