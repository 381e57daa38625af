//! Several Services that claim one frontend (R12).

use serde_json::json;

use super::applied::Applied;
use crate::{
    model::{Change, Kind},
    model::{
        Model, PerFamily,
        fixture::{full_service, model, named, settings},
    },
    plan::{Delta, Planner},
};

/// A Service created in this second, with a ClusterIP of its own, that claims these external addresses.
fn claiming(name: &str, created: u32, external_ips: &[&str]) -> Change {
    let own = name.bytes().next().unwrap_or_default();
    full_service(json!({
        "metadata": { "namespace": "ns", "name": name,
                      "creationTimestamp": format!("2026-01-01T00:00:{created:02}Z") },
        "spec": { "clusterIP": format!("10.0.0.{own}"), "externalIPs": external_ips, "ports": [{ "port": 80 }] },
    }))
}

struct Rig {
    model: Model,
    planner: Planner,
    applied: Applied,
}

impl Rig {
    fn new() -> Self {
        Self { model: model(settings(), []), planner: Planner::default(), applied: Applied::default() }
    }

    fn step(&mut self, changes: impl IntoIterator<Item = Change>) -> Delta {
        changes.into_iter().for_each(|change| self.model.apply(change));
        for name in self.model.take_dirty() {
            self.planner.update(&name, self.model.plan(&name));
        }
        let delta = self.planner.take_delta();
        self.applied.apply(&delta);
        delta
    }

    /// The Services that have this external address, by their plans.
    fn owners(&self, ip: &str) -> Vec<String> {
        let ip: std::net::IpAddr = ip.parse().unwrap();
        let has = crate::plan::Destination::Address(ip);
        let mut owners: Vec<String> = self
            .planner
            .services()
            .filter(|(_, plan)| {
                let all = plan.ports.iter().flat_map(|port| &port.frontends);
                all.into_iter().any(|planned| planned.frontend.destination == has)
            })
            .map(|(name, _)| name.name().to_owned())
            .collect();
        owners.sort_unstable();
        owners
    }
}

const IP: &str = "192.0.2.1";

/// What an address is to a Service.
#[derive(Clone, Copy, Debug)]
enum Claim {
    ClusterIp,
    LoadBalancer,
    ExternalIp,
    /// It claims nothing but its own ClusterIP.
    Nothing,
}

/// A Service created in this second that has [`IP`] as this.
fn having(name: &str, created: u32, claim: Claim) -> Change {
    let own = format!("10.0.0.{}", name.bytes().next().unwrap_or_default());
    let cluster_ip = if matches!(claim, Claim::ClusterIp) { IP } else { &own };
    let external = if matches!(claim, Claim::ExternalIp) { vec![IP] } else { Vec::new() };
    let ingress = if matches!(claim, Claim::LoadBalancer) { json!([{ "ip": IP }]) } else { json!([]) };
    full_service(json!({
        "metadata": { "namespace": "ns", "name": name,
                      "creationTimestamp": format!("2026-01-01T00:00:{created:02}Z") },
        "spec": { "type": "LoadBalancer", "clusterIP": cluster_ip, "externalIPs": external,
                  "ports": [{ "port": 80 }] },
        "status": { "loadBalancer": { "ingress": ingress } },
    }))
}

#[test]
fn r12_no_external_ip_takes_an_address_from_the_service_that_the_cluster_gave_it_to() {
    // The oldest one claims most and is given least.
    let services = [
        having("a", 1, Claim::ExternalIp),
        having("b", 2, Claim::LoadBalancer),
        having("c", 3, Claim::ClusterIp),
    ];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut rig = Rig::new();
        let mut lost = std::collections::BTreeMap::new();
        for index in order {
            rig.step([services[index].clone()]);
            for conflict in rig.planner.take_conflicts() {
                lost.insert(conflict.service.name().to_owned(), conflict.to_string());
            }
        }
        assert_eq!(rig.owners(IP), ["c"], "{order:?}");
        let by = |loser: &str| lost.get(loser).map(String::as_str).unwrap_or_default();
        let cluster = "192.0.2.1:80/TCP is at the ClusterIP of Service ns/c";
        let balancer = "192.0.2.1:80/TCP is at a load balancer's address of Service ns/b";
        assert!([cluster, balancer].contains(&by("a")), "{order:?}: {lost:?}");
        assert_eq!(by("b"), cluster, "{order:?}");
        assert!(!lost.contains_key("c"), "{order:?}: {lost:?}");

        rig.step([Change::Delete(Kind::Service, named("c"))]);
        assert_eq!(rig.owners(IP), ["b"], "{order:?}");
        rig.step([having("b", 2, Claim::Nothing)]);
        assert_eq!(rig.owners(IP), ["a"], "{order:?}");
    }
}

#[test]
fn r12_an_address_that_becomes_the_load_balancers_is_taken_from_an_older_external_ip() {
    let mut rig = Rig::new();
    rig.step([having("a", 1, Claim::ExternalIp), having("b", 2, Claim::ExternalIp)]);
    assert_eq!(rig.owners(IP), ["a"]);
    rig.step([having("b", 2, Claim::LoadBalancer)]);
    assert_eq!(rig.owners(IP), ["b"]);
    rig.step([having("b", 2, Claim::ExternalIp)]);
    assert_eq!(rig.owners(IP), ["a"]);
}

#[test]
fn r12_the_older_of_two_services_with_one_node_port_has_it_and_the_other_hears_of_it() {
    let node_port = |name: &str, created: u32| {
        full_service(json!({
            "metadata": { "namespace": "ns", "name": name,
                          "creationTimestamp": format!("2026-01-01T00:00:{created:02}Z") },
            "spec": { "type": "NodePort", "clusterIP": format!("10.0.0.{created}"),
                      "ports": [{ "port": 80, "nodePort": 30_080 }] },
        }))
    };
    let mut rig = Rig::new();
    rig.step([node_port("young", 2), node_port("old", 1)]);
    let withheld: Vec<_> = rig.planner.withheld(&named("young")).map(|lost| lost.to_string()).collect();
    assert_eq!(withheld, ["node:30080/TCP"]);
    let told: Vec<_> = rig.planner.take_conflicts().iter().map(ToString::to_string).collect();
    assert_eq!(told, ["node:30080/TCP belongs to the older Service ns/old"]);
}

proptest::proptest! {
    /// Whatever came and went before, the owner follows from what is there now.
    #[test]
    fn r12_the_owner_does_not_depend_on_what_was_before(
        steps in proptest::collection::vec((0..6_u8, 0..4_u32, 0..5_u8), 1..40)
    ) {
        let mut rig = Rig::new();
        let mut there = std::collections::BTreeMap::new();
        for (which, created, claim) in steps {
            let name = char::from(b'a' + which).to_string();
            let claims = [Claim::ClusterIp, Claim::LoadBalancer, Claim::ExternalIp, Claim::Nothing];
            let change = match claims.get(usize::from(claim)) {
                Some(claim) => having(&name, created, *claim),
                None => Change::Delete(Kind::Service, named(&name)),
            };
            rig.step([change.clone()]);
            match change {
                Change::Apply(_) => there.insert(name, change),
                _ => there.remove(&name),
            };
        }
        let mut fresh = Rig::new();
        fresh.step(there.into_values());
        proptest::prop_assert_eq!(rig.owners(IP), fresh.owners(IP));
        proptest::prop_assert!(rig.owners(IP).len() <= 1);
    }
}

#[test]
fn r12_the_older_service_has_the_frontend_whatever_the_order_of_arrival() {
    for (a, b, owner) in [(1, 2, "a"), (2, 1, "b"), (1, 1, "a")] {
        for reverse in [false, true] {
            let mut services = vec![claiming("a", a, &[IP]), claiming("b", b, &[IP])];
            if reverse {
                services.reverse();
            }
            let mut rig = Rig::new();
            for service in services {
                rig.step([service]);
            }
            assert_eq!(rig.owners(IP), [owner], "{a} {b} {reverse}");
            let loser = if owner == "a" { "b" } else { "a" };
            assert_eq!(rig.planner.withheld(&named(loser)).count(), 1);
            assert_eq!(rig.planner.withheld(&named(owner)).count(), 0);
        }
    }
}

#[test]
fn r12_the_next_one_gets_it_in_the_same_delta_when_the_owner_lets_go() {
    for go in [Change::Delete(Kind::Service, named("a")), claiming("a", 1, &["192.0.2.2"])] {
        let mut rig = Rig::new();
        rig.step([claiming("c", 3, &[IP]), claiming("b", 2, &[IP]), claiming("a", 1, &[IP])]);
        assert_eq!(rig.owners(IP), ["a"]);
        let delta = rig.step([go]);
        assert_eq!(rig.owners(IP), ["b"]);
        let order: Vec<&str> =
            delta.ports.iter().filter_map(|port| port.id()).map(|id| id.service.name()).collect();
        assert_eq!(order, ["a", "b"], "the release comes first");
        rig.step([Change::Delete(Kind::Service, named("b"))]);
        assert_eq!(rig.owners(IP), ["c"]);
    }
}

#[test]
fn r12_an_older_service_takes_the_frontend_from_a_younger_one() {
    let mut rig = Rig::new();
    rig.step([claiming("b", 2, &[IP])]);
    let delta = rig.step([claiming("a", 1, &[IP])]);
    let order: Vec<&str> =
        delta.ports.iter().filter_map(|port| port.id()).map(|id| id.service.name()).collect();
    assert_eq!(order, ["b", "a"], "the release comes first");
    assert_eq!(rig.owners(IP), ["a"]);
}

#[test]
fn r12_who_stops_claiming_does_not_get_it_later() {
    let mut rig = Rig::new();
    rig.step([claiming("a", 1, &[IP]), claiming("b", 2, &[IP])]);
    assert!(rig.step([claiming("b", 2, &[])]).is_empty(), "b never had it");
    rig.step([Change::Delete(Kind::Service, named("a"))]);
    assert_eq!(rig.owners(IP), Vec::<String>::new());
}

#[test]
fn r12_a_service_made_anew_is_young_again() {
    let mut rig = Rig::new();
    rig.step([claiming("a", 1, &[IP]), claiming("b", 2, &[IP])]);
    rig.step([claiming("a", 3, &[IP])]);
    assert_eq!(rig.owners(IP), ["b"]);
    rig.step([claiming("b", 4, &[IP])]);
    assert_eq!(rig.owners(IP), ["a"]);
}

#[test]
fn r12_a_release_that_failed_needs_the_data_plane_to_be_read_again() {
    let mut rig = Rig::new();
    rig.step([claiming("a", 1, &[IP]), claiming("b", 2, &[IP])]);
    rig.model.apply(claiming("a", 1, &[]));
    rig.planner.update(&named("a"), rig.model.plan(&named("a")));
    let delta = rig.planner.take_delta();
    let ids: Vec<_> = delta.ports.iter().filter_map(|port| port.id()).cloned().collect();
    assert_eq!(rig.planner.settled(&delta, &ids[..1]), PerFamily { v4: true, v6: false });
}
