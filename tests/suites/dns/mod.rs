//! Names answered on the node: which server gets the queries to the cluster DNS Service, and its answers, beside a real CoreDNS.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod coredns;
mod routing;
mod standalone;
mod strangers;

use std::{
    fmt,
    io::{Read as _, Write as _},
    net::{IpAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use anyhow::Result;
use hickory_proto::rr::RecordType;
use tempfile::TempDir;
use weir::model::Family;
use weir_tests::{
    names::{self, Asker, CoreDns, Said, query},
    node::{CLUSTER_CIDRS, Location, Topology, node_name, pod_address},
    process::{Process, tail},
    subject::Plane,
    wait::await_that,
};

/// Where the pods of these tests are that ask, and where CoreDNS is.
const CLIENT: Location = Location::Pod(1, 1);
const COREDNS: Location = Location::Pod(2, 1);
/// A name that both have, each with another address.
const WEB: &str = "web.default.svc.cluster.local.";
/// A name that CoreDNS alone has.
const ELSEWHERE: &str = "upstream.example.";

/// The cluster DNS Service's ClusterIP.
fn dns_ip(family: Family) -> IpAddr {
    match family {
        Family::V4 => "10.96.0.10".parse().unwrap(),
        Family::V6 => "fd00:10:96::a".parse().unwrap(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resolver {
    Weir,
    CoreDns,
    Absent,
}

impl fmt::Display for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

fn resolver(asker: &Asker) -> Resolver {
    match asker.ask(&query(WEB, RecordType::A, true).unwrap()) {
        Ok(reply) => match reply.answers.first().map(|record| record.data.to_string()).as_deref() {
            Some("10.96.1.1") => Resolver::Weir,
            Some("192.0.2.78") => Resolver::CoreDns,
            _ => Resolver::Absent,
        },
        Err(_) => Resolver::Absent,
    }
}

/// CoreDNS's names where it asks no API server.
const HOSTS: &str = "
    ready
    errors
    hosts {
        192.0.2.77 upstream.example
        2001:db8::77 upstream.example
        192.0.2.78 web.default.svc.cluster.local
        2001:db8::78 web.default.svc.cluster.local
    }";

/// The Services of these tests; `ready` says whether CoreDNS is one of the endpoints.
fn cluster(ready: bool) -> String {
    let slice = |family: Family| {
        let address = pod_address(family, 2, 1);
        let (lower, endpoints) = (
            family.to_string().to_lowercase(),
            if ready { format!("[{{addresses: ['{address}']}}]") } else { "[]".into() },
        );
        format!(
            "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kube-dns-{lower}, namespace: default, labels: {{kubernetes.io/service-name: kube-dns}}}}
addressType: {family}
ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
endpoints: {endpoints}
"
        )
    };
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: default}}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd00:10:96::a']
  ipFamilies: [IPv4, IPv6]
  ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: default}}
spec: {{clusterIP: 10.96.1.1, ports: [{{name: http, port: 80}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: out, namespace: default}}
spec: {{type: ExternalName, externalName: upstream.example}}
{}{}",
        slice(Family::V4),
        slice(Family::V6),
    )
}

/// Weir on node 1 with a directory of manifests.
struct Fixture<'a> {
    topology: &'a Topology,
    directory: TempDir,
    plane: Plane,
    /// The networks of pods in weir's configuration.
    cluster_cidrs: Vec<String>,
    /// The Service that it stands in for; without one it looks for one by itself.
    service: Option<&'static str>,
}

impl<'a> Fixture<'a> {
    fn new(topology: &'a Topology, plane: Plane) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-dns-").tempdir()?;
        std::fs::create_dir(directory.path().join("manifests"))?;
        let cluster_cidrs = CLUSTER_CIDRS.map(str::to_owned).to_vec();
        let fixture = Self { topology, directory, plane, cluster_cidrs, service: Some("default/kube-dns") };
        fixture.write("cluster", &cluster(true))?;
        Ok(fixture)
    }

    /// Puts a whole file of manifests in place.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let manifests = self.directory.path().join("manifests");
        let draft = self.directory.path().join("draft");
        std::fs::write(&draft, text)?;
        std::fs::rename(draft, manifests.join(format!("{name}.yaml")))?;
        Ok(())
    }

    fn arguments(&self) -> Result<Vec<String>> {
        let mut arguments = vec![
            format!("--proxy-mode={}", weir_tests::subject::Kind::Weir(self.plane).mode()),
            format!("--cgroup-root={}", self.topology.cgroup_root(1).display()),
            format!("--bpf-root={}", self.topology.bpf_root(1)?.display()),
            format!("--hostname-override={}", node_name(1)),
            format!("--cluster-cidr={}", self.cluster_cidrs.join(",")),
        ];
        arguments.extend(self.service.map(|service| format!("--dns-service={service}")));
        Ok(arguments)
    }

    /// Starts weir, and waits for nothing.
    fn weir(&self) -> Result<Process> {
        let source = format!("--source=manifests:{}", self.directory.path().join("manifests").display());
        let arguments = [self.arguments()?, vec![source]].concat();
        names::start_weir(self.topology.at(Location::Host(1)), self.directory.path(), &arguments)
    }

    fn coredns(&self, block: &str) -> Result<CoreDns> {
        CoreDns::start(self.topology.at(COREDNS), block)
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("weir.log")
    }

    fn logged(&self, words: &str) -> bool {
        std::fs::read_to_string(self.log()).unwrap_or_default().contains(words)
    }

    fn say_log(&self) -> String {
        tail(&self.log())
    }

    fn asker(&self, location: Location, family: Family, connected: bool) -> Asker {
        self.topology.at(location).run(|| Asker::new(dns_ip(family), connected)).unwrap()
    }

    /// The answer from a port of the node itself.
    fn http(&self, port: u16, path: &str) -> std::io::Result<String> {
        self.topology.at(Location::Host(1)).run(|| {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(
                format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes(),
            )?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })
    }

    /// The answer from the node's health port.
    fn health(&self, path: &str) -> std::io::Result<String> {
        self.http(10256, path)
    }

    /// Waits until a new socket of each location and family is answered by this one.
    fn await_answers_of(&self, wanted: Resolver) {
        for (location, family) in [CLIENT, Location::Host(1)]
            .into_iter()
            .flat_map(|location| Family::ALL.map(|family| (location, family)))
        {
            await_that(
                &format!("{location} is answered by {wanted} over {family}\n{}", self.say_log()),
                || resolver(&self.asker(location, family, false)) == wanted,
            );
        }
    }

    fn ask(&self, name: &str, kind: RecordType) -> Said {
        names::ask(self.topology.at(CLIENT), dns_ip(Family::V4), name, kind).unwrap()
    }
}
