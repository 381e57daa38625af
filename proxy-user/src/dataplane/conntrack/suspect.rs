//! Which UDP flows a change may have left behind: the pure half.
//!
//! In: how service ports change (from `plan`). Out: [`Suspects`], the frontends worth looking at, and for each flow the
//! answer whether it is stale.
//!
//! Connection tracking sends an established flow to the backend it first picked. TCP clients notice a dead one and
//! connect again; a UDP client that keeps sending never gives its flow a chance to expire, so it has to be taken away.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rustc_hash::FxHashMap;

use crate::{
    model::{Family, Protocol},
    plan::{Backend, Destination, Frontend, FrontendPlan, PortDelta, PortPlan, Target},
};

/// A UDP flow as connection tracking has it, both addresses in wire terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Where its client sends to.
    pub destination: SocketAddr,
    /// Where answers come from: the backend, or the destination itself when nothing was translated.
    pub answers: SocketAddr,
}

/// UDP frontends that may have flows to backends which do not serve, with what does.
#[derive(Clone, Debug, Default)]
pub struct Suspects(FxHashMap<Frontend, Arc<PortPlan>>);

impl Suspects {
    /// Those among `ports`, which must be in the kernel by now. Exactly:
    ///
    /// - the port has serving endpoints (without any, flows are left alone: K4), and
    /// - it is new, or lost a serving endpoint, or had none: then all its frontends are meant;
    /// - else only frontends that did not lead to a backend before: their clients' packets may have been tracked on
    ///   the way to nowhere.
    ///
    /// Endpoints that only join make nothing stale, and neither does a port that goes.
    pub fn of<'a>(ports: impl IntoIterator<Item = &'a PortDelta>) -> Self {
        let mut suspects = Self::default();
        for delta in ports {
            let Some(after) = &delta.after else { continue };
            if after.id.protocol != Protocol::Udp || after.serving.is_empty() {
                continue;
            }
            let before = delta.before.as_deref();
            let whole = before.is_none_or(|before| before.serving.is_empty() || lost(before, after));
            let meant = |plan: &&FrontendPlan| whole || !before.is_some_and(|b| leads(b, plan.frontend));
            let frontends = after.frontends.iter().filter(|plan| leads_anywhere(plan)).filter(meant);
            suspects.0.extend(frontends.map(|plan| (plan.frontend, Arc::clone(after))));
        }
        suspects
    }

    /// Adds later suspects; where a frontend is in both, the later plan counts.
    pub fn extend(&mut self, later: Self) {
        self.0.extend(later.0);
    }

    /// Whether there is nothing to look at.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many frontends there are to look at.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The frontends, in no order.
    pub fn frontends(&self) -> impl Iterator<Item = &Frontend> {
        self.0.keys()
    }

    /// The families of the frontends.
    #[must_use]
    pub fn families(&self) -> BTreeSet<Family> {
        self.0.keys().map(|frontend| frontend.destination.family()).collect()
    }

    /// Whether `flow` is addressed to a suspect and answered by something that does not serve it (K2), also when it
    /// was never translated. A NodePort is told by its number alone (K3), unless the address and port are a suspect
    /// themselves: those come first for packets too (R1).
    #[must_use]
    pub fn is_stale(&self, flow: Flow) -> bool {
        let (address, port) = (flow.destination.ip(), flow.destination.port());
        let look_up = |destination| self.0.get(&Frontend { destination, protocol: Protocol::Udp, port });
        look_up(Destination::Address(address))
            .or_else(|| look_up(Destination::NodePort(Family::of(address))))
            .is_some_and(|plan| !serves(&plan.serving, flow.answers.ip(), flow.answers.port()))
    }
}

fn serves(serving: &[Backend], address: IpAddr, port: u16) -> bool {
    serving.binary_search_by_key(&(address, port), |backend| (backend.address, backend.port)).is_ok()
}

fn lost(before: &PortPlan, after: &PortPlan) -> bool {
    before.serving.iter().any(|backend| !serves(&after.serving, backend.address, backend.port))
}

fn leads(plan: &PortPlan, frontend: Frontend) -> bool {
    plan.frontends.iter().any(|plan| plan.frontend == frontend && leads_anywhere(plan))
}

fn leads_anywhere(plan: &FrontendPlan) -> bool {
    [plan.route.pod, plan.route.host, plan.route.outside]
        .iter()
        .any(|treatment| matches!(treatment.target, Target::Cluster | Target::Local))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::ObjectName,
        plan::{PortId, Removal, Route, Treatment},
    };

    const CLUSTER: Target = Target::Cluster;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// `address:port`, or `node4:port` and `node6:port` for a NodePort.
    fn frontend(text: &str, protocol: Protocol) -> Frontend {
        let node = |port: &str, family| Frontend {
            destination: Destination::NodePort(family),
            protocol,
            port: port.parse().unwrap(),
        };
        if let Some(port) = text.strip_prefix("node4:") {
            return node(port, Family::V4);
        }
        if let Some(port) = text.strip_prefix("node6:") {
            return node(port, Family::V6);
        }
        let address = at(text);
        Frontend { destination: Destination::Address(address.ip()), protocol, port: address.port() }
    }

    fn plan(protocol: Protocol, frontends: &[(&str, Target)], serving: &[&str]) -> Arc<PortPlan> {
        let frontends: Vec<_> = frontends
            .iter()
            .map(|(text, target)| FrontendPlan {
                frontend: frontend(text, protocol),
                route: Route::uniform(Treatment { target: *target, masquerade: false }),
                allowed_sources: None,
                answered_here: false,
            })
            .collect();
        let mut serving: Vec<_> = serving
            .iter()
            .map(|text| Backend { address: at(text).ip(), port: at(text).port(), local: false })
            .collect();
        serving.sort();
        Arc::new(PortPlan {
            id: PortId {
                service: ObjectName::new("default", "dns"),
                port: "dns".into(),
                protocol,
                family: frontends.first().map_or(Family::V4, |plan| plan.frontend.destination.family()),
            },
            cluster: serving.clone(),
            local: Vec::new(),
            frontends,
            affinity: None,
            on_removal: Removal::Keep,
            serving,
        })
    }

    fn udp(frontends: &[&str], serving: &[&str]) -> Option<Arc<PortPlan>> {
        let frontends: Vec<_> = frontends.iter().map(|text| (*text, CLUSTER)).collect();
        Some(plan(Protocol::Udp, &frontends, serving))
    }

    fn picked(before: Option<Arc<PortPlan>>, after: Option<Arc<PortPlan>>) -> Vec<String> {
        let suspects = Suspects::of(&[PortDelta { before, after }]);
        let mut names: Vec<_> = suspects.frontends().map(ToString::to_string).collect();
        names.sort();
        names
    }

    const A: &str = "10.1.0.1:53";
    const B: &str = "10.1.0.2:53";
    const VIP: &str = "10.96.0.10:53";
    const NODE: &str = "node4:30053";

    #[test]
    fn a_port_that_lost_a_serving_endpoint_has_all_its_frontends_looked_at_k2_k3() {
        let before = udp(&[VIP, NODE], &[A, B]);
        assert_eq!(picked(before, udp(&[VIP, NODE], &[B])), ["10.96.0.10:53/UDP", "node:30053/UDP"]);
    }

    #[test]
    fn a_changed_target_port_counts_as_a_lost_endpoint() {
        assert_eq!(picked(udp(&[VIP], &[A]), udp(&[VIP], &["10.1.0.1:54"])), ["10.96.0.10:53/UDP"]);
    }

    #[test]
    fn endpoints_that_join_and_ports_that_stay_the_same_leave_nothing_stale() {
        assert!(picked(udp(&[VIP], &[A]), udp(&[VIP], &[A, B])).is_empty());
        assert!(picked(udp(&[VIP], &[A]), udp(&[VIP], &[A])).is_empty());
    }

    #[test]
    fn a_port_without_serving_endpoints_is_left_alone_k4() {
        assert!(picked(udp(&[VIP, NODE], &[A]), udp(&[VIP, NODE], &[])).is_empty());
        assert!(picked(None, udp(&[VIP], &[])).is_empty());
    }

    #[test]
    fn a_port_that_goes_leaves_its_flows_k1() {
        assert!(picked(udp(&[VIP], &[A]), None).is_empty());
    }

    #[test]
    fn new_ports_and_ports_that_had_no_endpoint_are_looked_at() {
        assert_eq!(picked(None, udp(&[VIP], &[A])), ["10.96.0.10:53/UDP"]);
        assert_eq!(picked(udp(&[VIP], &[]), udp(&[VIP], &[A])), ["10.96.0.10:53/UDP"]);
    }

    #[test]
    fn a_frontend_that_newly_leads_somewhere_is_looked_at_alone() {
        assert_eq!(picked(udp(&[VIP], &[A]), udp(&[VIP, NODE], &[A])), ["node:30053/UDP"]);
        let dropped = plan(Protocol::Udp, &[(VIP, CLUSTER), (NODE, Target::Drop)], &[A]);
        assert_eq!(picked(Some(dropped), udp(&[VIP, NODE], &[A])), ["node:30053/UDP"]);
    }

    #[test]
    fn a_frontend_that_leads_nowhere_is_not_looked_at() {
        let after = plan(Protocol::Udp, &[(VIP, CLUSTER), (NODE, Target::Drop)], &[A]);
        assert_eq!(picked(udp(&[VIP, NODE], &[A, B]), Some(after)), ["10.96.0.10:53/UDP"]);
    }

    #[test]
    fn tcp_and_sctp_are_never_touched_k4() {
        for protocol in [Protocol::Tcp, Protocol::Sctp] {
            let before = plan(protocol, &[(VIP, CLUSTER)], &[A, B]);
            assert!(picked(Some(before), Some(plan(protocol, &[(VIP, CLUSTER)], &[A]))).is_empty());
        }
    }

    #[test]
    fn later_suspects_win_over_earlier_ones() {
        let of = |after| Suspects::of(&[PortDelta { before: None, after }]);
        let mut suspects = of(udp(&[VIP], &[A]));
        suspects.extend(of(udp(&[VIP], &[B])));
        assert_eq!(suspects.len(), 1);
        assert!(suspects.is_stale(Flow { destination: at(VIP), answers: at(A) }));
        assert!(!suspects.is_stale(Flow { destination: at(VIP), answers: at(B) }));
    }

    /// Where clients send, who answers, and whether the flow has to go. Every address of the plans below, against
    /// serving, gone, never translated, and answered on the wrong port or by a neighbour.
    #[test]
    fn flows_to_what_does_not_serve_go_and_all_others_stay_k2_k3_r1() {
        let suspects = Suspects::of(&[
            PortDelta {
                before: None,
                after: udp(&[VIP, "203.0.113.7:53", "198.51.100.9:5353", NODE], &[A, "10.1.0.2:5300"]),
            },
            PortDelta {
                before: None,
                after: udp(&["[fd00::10]:53", "[2001:db8::7]:53", "node6:30053"], &["[fd01::1]:53"]),
            },
            // A ClusterIP on a port that is another Service's NodePort.
            PortDelta { before: None, after: udp(&["10.96.0.11:30053"], &["10.1.0.9:9"]) },
        ]);
        let stale = [
            (VIP, "10.1.0.3:53"),
            (VIP, VIP),
            (VIP, B),
            (VIP, "10.1.0.1:5300"),
            ("203.0.113.7:53", "10.1.0.3:53"),
            ("203.0.113.7:53", "203.0.113.7:53"),
            ("198.51.100.9:5353", "10.1.0.3:53"),
            ("192.0.2.4:30053", "10.1.0.3:53"),
            ("192.0.2.5:30053", "192.0.2.5:30053"),
            ("127.0.0.1:30053", "10.1.0.1:9"),
            ("10.96.0.11:30053", A),
            ("[fd00::10]:53", "[fd01::2]:53"),
            ("[fd00::10]:53", "[fd00::10]:53"),
            ("[2001:db8::7]:53", "[fd01::1]:54"),
            ("[2001:db8::99]:30053", "[fd01::2]:53"),
            ("[2001:db8::99]:30053", "[2001:db8::99]:30053"),
        ];
        let kept = [
            (VIP, A),
            (VIP, "10.1.0.2:5300"),
            ("203.0.113.7:53", A),
            ("198.51.100.9:5353", A),
            ("192.0.2.4:30053", A),
            ("192.0.2.5:30053", "10.1.0.2:5300"),
            ("10.96.0.11:30053", "10.1.0.9:9"),
            // Other Services, other ports of the same addresses, pods asked directly, the world.
            ("10.96.0.10:54", "10.1.0.3:53"),
            ("10.96.0.99:53", "10.1.0.3:53"),
            ("198.51.100.9:53", "198.51.100.9:53"),
            ("192.0.2.4:30054", "10.1.0.3:53"),
            (A, A),
            (B, B),
            ("10.1.0.3:53", "10.1.0.3:53"),
            ("9.9.9.9:53", "9.9.9.9:53"),
            ("[fd00::10]:53", "[fd01::1]:53"),
            ("[2001:db8::7]:53", "[fd01::1]:53"),
            ("[2001:db8::99]:30053", "[fd01::1]:53"),
            ("[fd00::11]:53", "[fd01::2]:53"),
            ("[fd00::10]:54", "[fd01::2]:53"),
            ("[2001:db8::99]:30054", "[fd01::2]:53"),
            ("[fd01::2]:53", "[fd01::2]:53"),
        ];
        for (flows, expected) in [(&stale[..], true), (&kept[..], false)] {
            for (destination, answers) in flows {
                let flow = Flow { destination: at(destination), answers: at(answers) };
                assert_eq!(suspects.is_stale(flow), expected, "{destination} answered by {answers}");
            }
        }
    }

    #[test]
    fn a_node_port_of_one_family_does_not_touch_the_other() {
        let suspects = Suspects::of(&[PortDelta { before: None, after: udp(&[NODE], &[A]) }]);
        let other = at("[2001:db8::99]:30053");
        assert!(!suspects.is_stale(Flow { destination: other, answers: other }));
        assert_eq!(suspects.families(), BTreeSet::from([Family::V4]));
    }
}
