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
    node::{Place, node_address},
    traffic::Transport,
};

use super::{Act, Held, nothing};
use crate::suites::chaos::{
    cluster::{CLIENT, EXTERNAL, Expected, IN_FILE, PORT, Probe, SERVICES, Service, TARGET, address, slice},
    random::Random,
    rig::Rig,
};

/// The file that these acts write.
const FILE: &str = "tenant";
/// A port that nothing listens on.
const UNUSED: u16 = 7_777;

pub(crate) const ACTS: &[Act] = &[
    Act::new("a Service with long names", long_names).undone(remove),
    Act::new("a manifest that is not UTF-8", |rig, _| {
        let name = b"{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"tenant\",\"annotations\":{\"a\":\"\xff\xfe\"}}}";
        rig.write_bytes(FILE, name)?;
        nothing()
    })
    .undone(remove),
    Act::new("a manifest that is not UTF-8, and a start", |rig, _| {
        rig.write_bytes(FILE, b"\xff\xfe{")?;
        rig.kill_agent()?;
        rig.start_agent()?;
        nothing()
    })
    .undone(remove),
    Act::new("a broken document among good ones", |rig, random| {
        let file = random.below(usize::from(SERVICES / IN_FILE)) as u16;
        break_file(rig, file)?;
        rig.broken = Some(file);
        nothing()
    })
    .undone(mend_file),
    Act::new("a broken document among good ones, and a start", |rig, random| {
        let file = random.below(usize::from(SERVICES / IN_FILE)) as u16;
        break_file(rig, file)?;
        rig.broken = Some(file);
        rig.kill_agent()?;
        rig.start_agent()?;
        nothing()
    })
    .undone(mend_file),
    Act::new("a manifest that is written slowly", |rig, random| {
        let file = random.below(usize::from(SERVICES / IN_FILE)) as u16;
        let mut open = File::create(rig.manifests().join(format!("services-{file}.json")))?;
        for some in Rig::services_of(file).chunks(75) {
            let text: Vec<String> = some.iter().map(Value::to_string).collect();
            writeln!(open, "{}", text.join("\n"))?;
            thread::sleep(Duration::from_millis(400));
        }
        nothing()
    }),
    Act::new("an external address that is another's ClusterIP", |rig, random| {
        let victim = Service(random.below(SERVICES.into()) as u16);
        let ips = Family::ALL.map(|family| victim.cluster_ip(family).to_string());
        rig.write(FILE, &tenant("default", "thief", &json!({ "externalIPs": ips }), &json!({})))?;
        rig.extra = victim.ways();
        nothing()
    })
    .undone(remove),
    Act::new("a load balancer at addresses of the host", |rig, _| {
        let ingress = ["127.0.0.1", "0.0.0.0", "::1", "::"].map(|ip| json!({ "ip": ip }));
        let status = json!({ "loadBalancer": { "ingress": ingress } });
        rig.write(FILE, &tenant("default", "shadow", &json!({ "type": "LoadBalancer", "nodePort": 32_700 }), &status))?;
        rig.extra = [IpAddr::from(Ipv4Addr::LOCALHOST), node_address(Family::V4, 1)]
            .map(|ip| Rig::refused(Place::Host(1), SocketAddr::new(ip, UNUSED)))
            .to_vec();
        nothing()
    })
    .undone(remove),
    Act::new("400 Services with one external address", |rig, _| {
        let ips = Family::ALL.map(|family| address(family, EXTERNAL, 60_000).to_string());
        let services = (0..400_u16).flat_map(|number| {
            tenant("default", &format!("crowd-{number}"), &json!({ "externalIPs": ips }), &json!({}))
        });
        rig.write(FILE, &services.collect::<Vec<_>>())?;
        nothing()
    })
    .undone(remove),
    Act::new("a Service with 2,000 external addresses", |rig, _| {
        let ips: Vec<String> =
            (0..2_000).map(|number| address(Family::V4, EXTERNAL, 50_000 + number).to_string()).collect();
        rig.write(FILE, &tenant("default", "wide", &json!({ "externalIPs": ips }), &json!({})))?;
        nothing()
    })
    .undone(remove),
];

fn remove(rig: &mut Rig) -> Result<()> {
    rig.extra.clear();
    rig.remove(FILE)
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
        // What it wants to take is a port that others serve.
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
fn long_names(rig: &mut Rig, _: &mut Random) -> Result<Held> {
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
    rig.write(FILE, &objects)?;
    for (family, cluster_ip) in Family::ALL.into_iter().zip(cluster_ips) {
        let node_port = SocketAddr::new(node_address(family, 1), 32_702);
        let cluster_ip = SocketAddr::new(cluster_ip.parse()?, PORT);
        let ways = [
            (CLIENT, false, cluster_ip),
            (Place::Host(1), true, cluster_ip),
            (Place::Outside(0), false, node_port),
        ];
        rig.extra.extend(ways.map(|(from, by_packets, to)| Probe {
            from,
            by_packets,
            to,
            transport: Transport::Tcp,
            expected: Expected::Endpoints(vec![endpoint(family)]),
        }));
    }
    nothing()
}

fn break_file(rig: &Rig, file: u16) -> Result<()> {
    let mut objects = Rig::services_of(file);
    let middle = objects.len() / 2;
    objects
        .insert(middle, json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "Broken!" } }));
    rig.write(&format!("services-{file}"), &objects)
}

fn mend_file(rig: &mut Rig) -> Result<()> {
    rig.broken.take().map_or(Ok(()), |file| rig.write_services(file))
}
