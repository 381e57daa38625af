//! Objects that a tenant or an operator writes, each of which may harm itself alone.

use std::{
    fs::File,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::Result;
use serde_json::{Value, json};
use weir::model::Family;
use weir_tests::{
    node::{Location, node_address},
    traffic::Transport,
};

use super::{Act, Held, nothing};
use crate::suites::chaos::{
    cluster::{CLIENT, EXTERNAL, Expected, IN_FILE, PORT, Probe, SERVICES, Service, TARGET, address, slice},
    fixture::Fixture,
    random::Random,
};

/// The file that these acts write.
const FILE: &str = "tenant";
/// A port that nothing listens on.
const UNUSED: u16 = 7_777;

pub(crate) const ACTS: &[Act] = &[
    Act::new("a Service with long names", long_names).undone(remove),
    Act::new("a manifest that is not UTF-8", |fixture, _| {
        let name = b"{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"tenant\",\"annotations\":{\"a\":\"\xff\xfe\"}}}";
        fixture.write_bytes(FILE, name)?;
        nothing()
    })
    .undone(remove),
    Act::new("a manifest that is not UTF-8, and a start", |fixture, _| {
        fixture.write_bytes(FILE, b"\xff\xfe{")?;
        fixture.kill_agent()?;
        fixture.start_agent()?;
        nothing()
    })
    .undone(remove),
    Act::new("a broken document among good ones", |fixture, random| {
        let file = random.below(usize::from(SERVICES / IN_FILE)) as u16;
        break_file(fixture, file)?;
        fixture.broken = Some(file);
        nothing()
    })
    .undone(mend_file),
    Act::new("a broken document among good ones, and a start", |fixture, random| {
        let file = random.below(usize::from(SERVICES / IN_FILE)) as u16;
        break_file(fixture, file)?;
        fixture.broken = Some(file);
        fixture.kill_agent()?;
        fixture.start_agent()?;
        nothing()
    })
    .undone(mend_file),
    Act::new("a manifest that is written slowly", |fixture, random| {
        let file = random.below(usize::from(SERVICES / IN_FILE)) as u16;
        let mut open = File::create(fixture.manifests().join(format!("services-{file}.json")))?;
        for some in Fixture::services_of(file).chunks(75) {
            let text: Vec<String> = some.iter().map(Value::to_string).collect();
            writeln!(open, "{}", text.join("\n"))?;
            thread::sleep(Duration::from_millis(400));
        }
        nothing()
    }),
    Act::new("an external address that is another's ClusterIP", |fixture, random| {
        let victim = Service(random.below(SERVICES.into()) as u16);
        let ips = Family::ALL.map(|family| victim.cluster_ip(family).to_string());
        fixture.write(FILE, &tenant("default", "thief", &json!({ "externalIPs": ips }), &json!({})))?;
        fixture.extra = victim.ways();
        nothing()
    })
    .undone(remove),
    Act::new("a load balancer at addresses of the host", |fixture, _| {
        let ingress = ["127.0.0.1", "0.0.0.0", "::1", "::"].map(|ip| json!({ "ip": ip }));
        let status = json!({ "loadBalancer": { "ingress": ingress } });
        fixture.write(FILE, &tenant("default", "shadow", &json!({ "type": "LoadBalancer", "nodePort": 32_700 }), &status))?;
        fixture.extra = [IpAddr::from(Ipv4Addr::LOCALHOST), node_address(Family::V4, 1)]
            .map(|ip| Fixture::refused(Location::Host(1), SocketAddr::new(ip, UNUSED)))
            .to_vec();
        nothing()
    })
    .undone(remove),
    Act::new("400 Services with one external address", |fixture, _| {
        let ips = Family::ALL.map(|family| address(family, EXTERNAL, 60_000).to_string());
        let services = (0..400_u16).flat_map(|number| {
            tenant("default", &format!("crowd-{number}"), &json!({ "externalIPs": ips }), &json!({}))
        });
        fixture.write(FILE, &services.collect::<Vec<_>>())?;
        nothing()
    })
    .undone(remove),
    Act::new("a Service with 2,000 external addresses", |fixture, _| {
        let ips: Vec<String> =
            (0..2_000).map(|number| address(Family::V4, EXTERNAL, 50_000 + number).to_string()).collect();
        fixture.write(FILE, &tenant("default", "wide", &json!({ "externalIPs": ips }), &json!({})))?;
        nothing()
    })
    .undone(remove),
];

fn remove(fixture: &mut Fixture) -> Result<()> {
    fixture.extra.clear();
    fixture.remove(FILE)
}

/// A Service of one tenant with an endpoint of its own, with these fields of its spec and this status.
fn tenant(namespace: &str, name: &str, fields: &Value, status: &Value) -> Vec<Value> {
    let mut port = json!({ "name": "stream", "protocol": "TCP", "port": UNUSED, "targetPort": TARGET });
    let mut spec = json!({ "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack" });
    for (field, value) in fields.as_object().into_iter().flatten() {
        let at = if field == "nodePort" { &mut port } else { &mut spec };
        at[field] = value.clone();
    }
    if spec["externalIPs"].is_array() {
        // A port that other Services serve, because the Service is to take it from them.
        port["port"] = PORT.into();
    }
    spec["ports"] = json!([port]);
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name, "namespace": namespace },
        "spec": spec,
        "status": status,
    });
    let slices = Family::ALL
        .map(|family| slice(namespace, name, family, &[address(family, 200, THIEVES + name.len() as u16)]));
    [vec![service], slices.to_vec()].concat()
}

/// Endpoints of tenants start here, where no Service of the cluster has one.
const THIEVES: u16 = 40_000;

/// Kubernetes takes namespaces, Services and ports with names of 63 characters.
fn long_names(fixture: &mut Fixture, _: &mut Random) -> Result<Held> {
    let (namespace, name, port) = ("n".repeat(63), "s".repeat(63), "p".repeat(63));
    let cluster_ips = ["10.96.200.1", "fd00:10:96::c801"];
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "sessionAffinity": "ClientIP",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 32_701,
            "ports": [{ "name": port, "protocol": "TCP", "port": PORT, "targetPort": TARGET, "nodePort": 32_702 }],
        },
    });
    let endpoint = |family| address(family, 200, THIEVES);
    let mut objects = vec![service];
    for family in Family::ALL {
        let mut slice = slice(&namespace, &name, family, &[endpoint(family)]);
        slice["ports"] = json!([{ "name": port, "protocol": "TCP", "port": TARGET }]);
        objects.push(slice);
    }
    fixture.write(FILE, &objects)?;
    for (family, cluster_ip) in Family::ALL.into_iter().zip(cluster_ips) {
        let node_port = SocketAddr::new(node_address(family, 1), 32_702);
        let cluster_ip = SocketAddr::new(cluster_ip.parse()?, PORT);
        let ways = [
            (CLIENT, false, cluster_ip),
            (Location::Host(1), true, cluster_ip),
            (Location::Outside(0), false, node_port),
        ];
        fixture.extra.extend(ways.map(|(from, by_packets, to)| Probe {
            from,
            by_packets,
            to,
            transport: Transport::Tcp,
            expected: Expected::Endpoints(vec![endpoint(family)]),
        }));
    }
    nothing()
}

fn break_file(fixture: &Fixture, file: u16) -> Result<()> {
    let mut objects = Fixture::services_of(file);
    let middle = objects.len() / 2;
    objects
        .insert(middle, json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "Broken!" } }));
    fixture.write(&format!("services-{file}"), &objects)
}

fn mend_file(fixture: &mut Fixture) -> Result<()> {
    fixture.broken.take().map_or(Ok(()), |file| fixture.write_services(file))
}
