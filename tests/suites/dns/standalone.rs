//! Without a cluster: names from a directory of manifests, at the node's own link-local address.

use std::collections::BTreeSet;

use anyhow::Result;
use weir_tests::{
    names::libc_resolves,
    runner::serve,
    traffic::{Call, Outcome, Transport, ask},
};

use super::*;

/// Where names are answered without any DNS Service.
const OWN: &str = "169.254.20.53";

fn headless(pods: &[(u8, u8)]) -> String {
    let endpoints = |family: Family| {
        let each = pods.iter().map(|&(node, pod)| {
            format!(
                "{{addresses: ['{}'], hostname: pod-{node}-{pod}, conditions: {{ready: true}}}}",
                pod_address(family, node, pod)
            )
        });
        each.collect::<Vec<_>>().join(", ")
    };
    let slice = |family: Family| {
        format!(
            "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: db-{}
  namespace: default
  labels: {{kubernetes.io/service-name: db, service.kubernetes.io/headless: ''}}
addressType: {family}
ports: [{{name: http, port: 8080}}]
endpoints: [{}]
",
            family.to_string().to_lowercase(),
            endpoints(family)
        )
    };
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: db, namespace: default}}
spec: {{clusterIP: None, ports: [{{name: http, port: 8080}}]}}
{}{}",
        slice(Family::V4),
        slice(Family::V6)
    )
}

#[test]
fn a_headless_service_resolves_to_its_pods_and_follows_them() -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let fixture = Fixture::new(&topology, Plane::Nftables)?;
    // No DNS Service at all.
    fixture.write("cluster", "")?;
    let all = |pods: &[(u8, u8)]| -> BTreeSet<IpAddr> {
        pods.iter()
            .flat_map(|&(node, pod)| Family::ALL.map(|family| pod_address(family, node, pod)))
            .collect()
    };
    let _weir = fixture.weir()?;
    let client = topology.at(CLIENT);
    let own: IpAddr = OWN.parse()?;
    let resolves =
        || libc_resolves(client, own, "db").map(|found| found.into_iter().collect::<BTreeSet<_>>());
    for pods in [&[(1, 2)][..], &[(1, 2), (2, 1)], &[(2, 1), (2, 2), (1, 2)], &[(2, 2)], &[]] {
        fixture.write("db", &headless(pods))?;
        await_that(&format!("db is {pods:?}\n{}", fixture.say_log()), || resolves().unwrap() == all(pods));
        for address in resolves()? {
            let call = Call::new(CLIENT, (address, 8080).into(), Transport::Tcp);
            let outcome = client.run(|| ask(&call));
            assert!(matches!(outcome, Outcome::Answer(_)), "{address}: {outcome}");
        }
    }
    fixture.write("db", &headless(&[(2, 1)]))?;
    await_that("an endpoint has a name of its own", || {
        libc_resolves(client, own, "pod-2-1.db").unwrap()
            == [pod_address(Family::V4, 2, 1), pod_address(Family::V6, 2, 1)]
    });
    Ok(())
}

/// RKE2's Service, by its label; and the log without one.
#[test]
fn a_dns_service_of_another_name_is_found_and_followed() -> Result<()> {
    let topology = Topology::new()?;
    let mut fixture = Fixture::new(&topology, Plane::Nftables)?;
    fixture.service = None;
    let _coredns = fixture.coredns(HOSTS)?;
    // The Service of the other tests is one of a namespace that users may write to.
    let labelled = "name: kube-dns, namespace: default, labels: {k8s-app: kube-dns}";
    fixture.write("cluster", &cluster(true).replace("name: kube-dns, namespace: default", labelled))?;
    let _weir = fixture.weir()?;
    await_that(&format!("weir says where it answers\n{}", fixture.say_log()), || {
        fixture.logged("there is no DNS Service")
            && fixture.logged("names are answered at 169.254.20.53 only")
    });
    await_that("CoreDNS answers at the Service", || {
        resolver(&fixture.asker(CLIENT, Family::V4, false)) == Resolver::CoreDns
    });
    let name = "rke2-coredns-rke2-coredns";
    let rke2 = cluster(true)
        .replace(
            "name: kube-dns, namespace: default",
            &format!("name: {name}, namespace: kube-system, labels: {{k8s-app: kube-dns}}"),
        )
        .replace(
            "namespace: default, labels: {kubernetes.io/service-name: kube-dns}",
            &format!("namespace: kube-system, labels: {{kubernetes.io/service-name: {name}}}"),
        );
    fixture.write("cluster", &rke2)?;
    fixture.await_answers_of(Resolver::Weir);
    assert!(fixture.logged(&format!("service=kube-system/{name}")), "{}", fixture.say_log());
    // It goes, and another one takes its addresses.
    fixture.write("cluster", &cluster(true))?;
    await_that("CoreDNS answers again", || {
        resolver(&fixture.asker(CLIENT, Family::V4, false)) == Resolver::CoreDns
    });
    Ok(())
}

/// As in a container without the right to use the device.
#[test]
fn a_weir_that_may_not_make_its_device_logs_the_remedy() -> Result<()> {
    let topology = Topology::new()?;
    let fixture = Fixture::new(&topology, Plane::Nftables)?;
    let _coredns = fixture.coredns(HOSTS)?;
    let source = format!("--source=manifests:{}", fixture.directory.path().join("manifests").display());
    // The kernel opens no device of such a file system.
    let script = "mount -t tmpfs -o nodev none /dev/net; mknod /dev/net/tun c 10 200";
    let arguments = [fixture.arguments()?, vec![source]].concat();
    let _weir = names::start_weir_behind(
        script,
        topology.at(Location::Host(1)),
        fixture.directory.path(),
        &arguments,
    )?;
    await_that(&format!("weir says what it lacks\n{}", fixture.say_log()), || {
        ["weir-dns", "/dev/net/tun may not be opened", "allow the device c 10:200"]
            .iter()
            .all(|word| fixture.logged(word))
    });
    fixture.await_answers_of(Resolver::CoreDns);
    let log = std::fs::read_to_string(fixture.log())?;
    assert_eq!(log.matches("/dev/net/tun may not be opened").count(), 1, "{log}");
    Ok(())
}
