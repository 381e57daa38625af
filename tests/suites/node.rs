//! The packet cases on weir's data planes, and what the agent carries itself.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::Result;
use weir_tests::{
    assets,
    netns::Namespace,
    runner::run_cases,
    subject::{Kind, Plane},
    traffic::{Call, Outcome, PATIENCE, Server, Transport, ask, bound},
    wait::await_that,
};

fn every_packet_case_passes(plane: Plane) -> Result<()> {
    let report = run_cases(Kind::Weir(plane))?;
    report.print();
    report.verdict()
}

#[test]
fn every_packet_case_passes_on_nftables() -> Result<()> {
    every_packet_case_passes(Plane::Nftables)
}

#[test]
fn every_packet_case_passes_on_ebpf() -> Result<()> {
    every_packet_case_passes(Plane::Ebpf)
}

/// An agent in nftables mode on one machine, with what stands for its pods on addresses of the machine itself.
#[test]
fn node_ports_on_loopback_addresses_are_relayed_but_where_a_process_has_the_port() -> Result<()> {
    const TAKEN: u16 = 30_081;
    let machine = Namespace::new("relayed")?;
    machine.ip(&["addr add 10.9.0.1/32 dev lo".into(), "addr add fd00:9::1/128 dev lo".into()])?;
    let pod: [IpAddr; 2] = ["10.9.0.1".parse()?, "fd00:9::1".parse()?];
    let _server = Server::start(&machine, "pod", pod)?;
    let held = [Transport::Tcp, Transport::Udp].map(|transport| {
        machine.run(|| bound(transport, SocketAddr::new(Ipv6Addr::LOCALHOST.into(), TAKEN)))
    });
    held[0].as_ref().map_err(|error| anyhow::anyhow!("{error}"))?.listen(1)?;

    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("manifests"))?;
    fs::write(at("manifests/web.yaml"), web(TAKEN))?;
    let configuration = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                         mode: nftables\nnodePortAddresses: [localhost]\n";
    fs::write(at("config.conf"), configuration)?;
    let _agent = machine.launch(&assets::weir()?, &at("log"), |command| {
        command.arg("run").arg(format!("--config={}", at("config.conf").display()));
        command.arg(format!("--source=manifests:{}", at("manifests").display()));
    })?;
    let ask = |address: IpAddr, port, transport| {
        let call = Call { from: address, to: SocketAddr::new(address, port), transport, patience: PATIENCE };
        machine.run(|| ask(&call))
    };
    let served = |address, port, transport| matches!(ask(address, port, transport), Outcome::Answer(_));
    let [v4, v6]: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for (address, transport) in
        [v4, v6].into_iter().flat_map(|it| [(it, Transport::Tcp), (it, Transport::Udp)])
    {
        await_that("a NodePort answers", || served(address, 30_080, transport));
    }
    // NodePorts that no process listens on are served all the same.
    await_that("IPv4 answers beside the taken port", || served(v4, TAKEN, Transport::Tcp));
    let metrics = || machine.output("curl", &["-s", "http://127.0.0.1:10249/metrics"]);
    let shows = |line: &str| {
        metrics().is_ok_and(|it| String::from_utf8_lossy(&it.stdout).lines().any(|it| it == line))
    };
    await_that("the metrics tell of them", || {
        let listeners = |family, count| {
            shows(&format!(
                "kubeproxy_nftables_localhost_nodeport_listeners{{ip_family=\"{family}\"}} {count}"
            ))
        };
        listeners("IPv4", 4) && listeners("IPv6", 2)
    });
    let failures = "kubeproxy_nftables_localhost_nodeport_listener_creation_failures_total";
    assert!(shows(&format!("{failures}{{ip_family=\"IPv4\"}} 0")));
    assert!(!shows(&format!("{failures}{{ip_family=\"IPv6\"}} 0")));
    drop(held);
    for transport in [Transport::Tcp, Transport::Udp] {
        await_that("the port that became free is served", || served(v6, TAKEN, transport));
    }
    // No port opens to the network: the machine's own address serves no NodePort here.
    assert_eq!(ask(pod[0], 30_080, Transport::Tcp), Outcome::Refused);
    fs::write(at("manifests/web.yaml"), "")?;
    await_that("a NodePort that is gone is refused", || ask(v6, 30_080, Transport::Udp) == Outcome::Refused);
    Ok(())
}

fn web(second: u16) -> String {
    let ports = |number: u16| {
        ["TCP", "UDP"].map(|protocol| {
            let name = format!("{}-{number}", protocol.to_lowercase());
            format!(
                "{{name: {name}, protocol: {protocol}, port: {number}, nodePort: {number}, targetPort: 8080}}"
            )
        })
    };
    let ports: Vec<String> = [ports(30_080), ports(second)].concat();
    let slice = |family: &str, address: &str| {
        let ports: Vec<String> = ["TCP", "UDP"]
            .iter()
            .flat_map(|protocol| [30_080, second].map(|number| (protocol, number)))
            .map(|(protocol, number)| {
                format!("{{name: {}-{number}, protocol: {protocol}, port: 8080}}", protocol.to_lowercase())
            })
            .collect();
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-{}, namespace: default, \
             labels: {{kubernetes.io/service-name: web}}}}\naddressType: {family}\nports: [{}]\n\
             endpoints: [{{addresses: ['{address}'], conditions: {{ready: true}}}}]\n",
            family.to_lowercase(),
            ports.join(", ")
        )
    };
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: default}}\n\
         spec: {{type: NodePort, ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv4, IPv6], ports: [{}]}}\n",
        ports.join(", ")
    );
    [service, slice("IPv4", "10.9.0.1"), slice("IPv6", "fd00:9::1")].concat()
}
