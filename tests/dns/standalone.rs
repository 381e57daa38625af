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
    let rig = Rig::new(&topology, Plane::Nftables)?;
    // No DNS Service at all.
    rig.write("cluster", "")?;
    let all = |pods: &[(u8, u8)]| -> BTreeSet<IpAddr> {
        pods.iter()
            .flat_map(|&(node, pod)| Family::ALL.map(|family| pod_address(family, node, pod)))
            .collect()
    };
    let _weir = rig.weir()?;
    let client = topology.at(CLIENT);
    let own: IpAddr = OWN.parse()?;
    let resolves =
        || libc_resolves(client, own, "db").map(|found| found.into_iter().collect::<BTreeSet<_>>());
    for pods in [&[(1, 2)][..], &[(1, 2), (2, 1)], &[(2, 1), (2, 2), (1, 2)], &[(2, 2)], &[]] {
        rig.write("db", &headless(pods))?;
        await_that(&format!("db is {pods:?}\n{}", rig.say_log()), || resolves().unwrap() == all(pods));
        for address in resolves()? {
            let call = Call::new(CLIENT, (address, 8080).into(), Transport::Tcp);
            let outcome = client.run(|| ask(&call));
            assert!(matches!(outcome, Outcome::Answer(_)), "{address}: {outcome}");
        }
    }
    rig.write("db", &headless(&[(2, 1)]))?;
    await_that("an endpoint has a name of its own", || {
        libc_resolves(client, own, "pod-2-1.db").unwrap()
            == [pod_address(Family::V4, 2, 1), pod_address(Family::V6, 2, 1)]
    });
    Ok(())
}
