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

/// A Service created in second `created`, with its own ClusterIP, that claims these external IPs.
fn claiming(name: &str, created: u32, external_ips: &[&str]) -> Change {
    let own = name.bytes().next().unwrap_or_default();
    full_service(json!({
        "metadata": { "namespace": "ns", "name": name,
                      "creationTimestamp": format!("2026-01-01T00:00:{created:02}Z") },
        "spec": { "clusterIP": format!("10.0.0.{own}"), "externalIPs": external_ips, "ports": [{ "port": 80 }] },
    }))
}

struct Fixture {
    model: Model,
    planner: Planner,
    applied: Applied,
}

impl Fixture {
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

    /// The Services with this external address in their plan.
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

/// The way in which a Service claims [`IP`].
#[derive(Clone, Copy, Debug)]
enum Claim {
    ClusterIp,
    LoadBalancer,
    ExternalIp,
    /// It claims only its own ClusterIP.
    Nothing,
}

/// A Service created in second `created` that claims [`IP`] in this way.
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
fn r12_an_external_ip_never_wins_over_an_assigned_address() {
    // The oldest Service has the lowest rank.
    let services = [
        having("a", 1, Claim::ExternalIp),
        having("b", 2, Claim::LoadBalancer),
        having("c", 3, Claim::ClusterIp),
    ];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut fixture = Fixture::new();
        let mut lost = std::collections::BTreeMap::new();
        for index in order {
            fixture.step([services[index].clone()]);
            for conflict in fixture.planner.take_conflicts() {
                lost.insert(conflict.service.name().to_owned(), conflict.to_string());
            }
        }
        assert_eq!(fixture.owners(IP), ["c"], "{order:?}");
        let by = |loser: &str| lost.get(loser).map(String::as_str).unwrap_or_default();
        let cluster = "192.0.2.1:80/TCP is at the ClusterIP of Service ns/c";
        let balancer = "192.0.2.1:80/TCP is at a load balancer's address of Service ns/b";
        assert!([cluster, balancer].contains(&by("a")), "{order:?}: {lost:?}");
        assert_eq!(by("b"), cluster, "{order:?}");
        assert!(!lost.contains_key("c"), "{order:?}: {lost:?}");

        fixture.step([Change::Delete(Kind::Service, named("c"))]);
        assert_eq!(fixture.owners(IP), ["b"], "{order:?}");
        fixture.step([having("b", 2, Claim::Nothing)]);
        assert_eq!(fixture.owners(IP), ["a"], "{order:?}");
    }
}

#[test]
fn r12_a_load_balancers_address_wins_over_an_older_external_ip() {
    let mut fixture = Fixture::new();
    fixture.step([having("a", 1, Claim::ExternalIp), having("b", 2, Claim::ExternalIp)]);
    assert_eq!(fixture.owners(IP), ["a"]);
    fixture.step([having("b", 2, Claim::LoadBalancer)]);
    assert_eq!(fixture.owners(IP), ["b"]);
    fixture.step([having("b", 2, Claim::ExternalIp)]);
    assert_eq!(fixture.owners(IP), ["a"]);
}

#[test]
fn r12_the_older_service_owns_a_node_port_and_the_conflict_names_it() {
    let node_port = |name: &str, created: u32| {
        full_service(json!({
            "metadata": { "namespace": "ns", "name": name,
                          "creationTimestamp": format!("2026-01-01T00:00:{created:02}Z") },
            "spec": { "type": "NodePort", "clusterIP": format!("10.0.0.{created}"),
                      "ports": [{ "port": 80, "nodePort": 30_080 }] },
        }))
    };
    let mut fixture = Fixture::new();
    fixture.step([node_port("young", 2), node_port("old", 1)]);
    let withheld: Vec<_> = fixture.planner.withheld(&named("young")).map(|lost| lost.to_string()).collect();
    assert_eq!(withheld, ["node:30080/TCP"]);
    let conflicts: Vec<_> = fixture.planner.take_conflicts().iter().map(ToString::to_string).collect();
    assert_eq!(conflicts, ["node:30080/TCP belongs to the older Service ns/old"]);
}

proptest::proptest! {
    /// The owner depends only on the present claims, not on earlier ones.
    #[test]
    fn r12_the_owner_does_not_depend_on_history(
        steps in proptest::collection::vec((0..6_u8, 0..4_u32, 0..5_u8), 1..40)
    ) {
        let mut fixture = Fixture::new();
        let mut there = std::collections::BTreeMap::new();
        for (which, created, claim) in steps {
            let name = char::from(b'a' + which).to_string();
            let claims = [Claim::ClusterIp, Claim::LoadBalancer, Claim::ExternalIp, Claim::Nothing];
            let change = match claims.get(usize::from(claim)) {
                Some(claim) => having(&name, created, *claim),
                None => Change::Delete(Kind::Service, named(&name)),
            };
            fixture.step([change.clone()]);
            match change {
                Change::Apply(_) => there.insert(name, change),
                _ => there.remove(&name),
            };
        }
        let mut fresh = Fixture::new();
        fresh.step(there.into_values());
        proptest::prop_assert_eq!(fixture.owners(IP), fresh.owners(IP));
        proptest::prop_assert!(fixture.owners(IP).len() <= 1);
    }
}

#[test]
fn r12_the_older_service_owns_the_frontend_in_any_order_of_arrival() {
    for (a, b, owner) in [(1, 2, "a"), (2, 1, "b"), (1, 1, "a")] {
        for reverse in [false, true] {
            let mut services = vec![claiming("a", a, &[IP]), claiming("b", b, &[IP])];
            if reverse {
                services.reverse();
            }
            let mut fixture = Fixture::new();
            for service in services {
                fixture.step([service]);
            }
            assert_eq!(fixture.owners(IP), [owner], "{a} {b} {reverse}");
            let loser = if owner == "a" { "b" } else { "a" };
            assert_eq!(fixture.planner.withheld(&named(loser)).count(), 1);
            assert_eq!(fixture.planner.withheld(&named(owner)).count(), 0);
        }
    }
}

#[test]
fn r12_a_released_frontend_goes_to_the_next_claim_in_the_same_delta() {
    for go in [Change::Delete(Kind::Service, named("a")), claiming("a", 1, &["192.0.2.2"])] {
        let mut fixture = Fixture::new();
        fixture.step([claiming("c", 3, &[IP]), claiming("b", 2, &[IP]), claiming("a", 1, &[IP])]);
        assert_eq!(fixture.owners(IP), ["a"]);
        let delta = fixture.step([go]);
        assert_eq!(fixture.owners(IP), ["b"]);
        let order: Vec<&str> =
            delta.ports.iter().filter_map(|port| port.id()).map(|id| id.service.name()).collect();
        assert_eq!(order, ["a", "b"], "the release is first");
        fixture.step([Change::Delete(Kind::Service, named("b"))]);
        assert_eq!(fixture.owners(IP), ["c"]);
    }
}

#[test]
fn r12_an_older_service_wins_the_frontend_from_a_younger_one() {
    let mut fixture = Fixture::new();
    fixture.step([claiming("b", 2, &[IP])]);
    let delta = fixture.step([claiming("a", 1, &[IP])]);
    let order: Vec<&str> =
        delta.ports.iter().filter_map(|port| port.id()).map(|id| id.service.name()).collect();
    assert_eq!(order, ["b", "a"], "the release is first");
    assert_eq!(fixture.owners(IP), ["a"]);
}

#[test]
fn r12_a_withdrawn_claim_never_wins() {
    let mut fixture = Fixture::new();
    fixture.step([claiming("a", 1, &[IP]), claiming("b", 2, &[IP])]);
    assert!(fixture.step([claiming("b", 2, &[])]).is_empty(), "b never had it");
    fixture.step([Change::Delete(Kind::Service, named("a"))]);
    assert_eq!(fixture.owners(IP), Vec::<String>::new());
}

#[test]
fn r12_a_service_that_is_created_again_is_the_youngest() {
    let mut fixture = Fixture::new();
    fixture.step([claiming("a", 1, &[IP]), claiming("b", 2, &[IP])]);
    fixture.step([claiming("a", 3, &[IP])]);
    assert_eq!(fixture.owners(IP), ["b"]);
    fixture.step([claiming("b", 4, &[IP])]);
    assert_eq!(fixture.owners(IP), ["a"]);
}

#[test]
fn r12_a_refused_release_requires_a_reread_of_the_data_plane() {
    let mut fixture = Fixture::new();
    fixture.step([claiming("a", 1, &[IP]), claiming("b", 2, &[IP])]);
    fixture.model.apply(claiming("a", 1, &[]));
    fixture.planner.update(&named("a"), fixture.model.plan(&named("a")));
    let delta = fixture.planner.take_delta();
    let ids: Vec<_> = delta.ports.iter().filter_map(|port| port.id()).cloned().collect();
    assert_eq!(fixture.planner.record_applied(&delta, &ids[..1]), PerFamily { v4: true, v6: false });
}
