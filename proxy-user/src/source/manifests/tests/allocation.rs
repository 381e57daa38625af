//! Allocated ClusterIPs and NodePorts, and the status file.

use super::*;

fn ips(spec: &ServiceSpec) -> Vec<IpAddr> {
    assert_eq!(spec.cluster_ip.as_ref(), spec.cluster_ips.as_ref().and_then(|ips| ips.first()));
    spec.cluster_ips.iter().flatten().map(|ip| ip.parse().unwrap()).collect()
}

#[test]
fn cluster_ips_follow_families_and_policy() {
    let text = service("plain", "")
        + &service("six", "ipFamilies: [IPv6]")
        + &service("dual", "ipFamilyPolicy: PreferDualStack")
        + &service("dual6", "ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6]")
        + &service("half", "ipFamilyPolicy: RequireDualStack, clusterIP: 10.96.0.7")
        + &service("fixed", "clusterIP: 192.0.2.1");
    let mut fixture = Fixture::new(&[("a.yaml", &text)]);
    let families = |name: &str| {
        let spec = fixture.spec(name);
        let ips = ips(&spec);
        let ranges = &fixture.state.settings.service_ranges;
        let inside = ips.iter().filter(|ip| ranges.iter().any(|range| range.contains(*ip))).count();
        (spec.ip_families.unwrap().join(" "), ips.len(), inside)
    };
    assert_eq!(families("plain"), ("IPv4".to_owned(), 1, 1));
    assert_eq!(families("six"), ("IPv6".to_owned(), 1, 1));
    assert_eq!(families("dual"), ("IPv4 IPv6".to_owned(), 2, 2));
    assert_eq!(families("dual6"), ("IPv6 IPv4".to_owned(), 2, 2));
    assert_eq!(families("half"), ("IPv4 IPv6".to_owned(), 2, 2));
    assert_eq!(families("fixed"), ("IPv4".to_owned(), 1, 0));
    assert_eq!(ips(&fixture.spec("half"))[0].to_string(), "10.96.0.7");
    fixture.state.settings.service_ranges.pop();
    let error = load_once(&fixture.state.settings).unwrap_err().to_string();
    assert_eq!(
        error,
        "a.yaml: document 2 (Service default/six): `spec.clusterIP` asks for IPv6, but no IPv6 range is configured\n\
         a.yaml: document 4 (Service default/dual6): `spec.clusterIP` asks for IPv6, but no IPv6 range is configured\n\
         a.yaml: document 5 (Service default/half): `spec.ipFamilyPolicy` asks for IPv6, but no IPv6 range is configured"
    );
}

#[test]
fn node_ports_and_the_health_check_port_are_allocated() {
    let local = "type: LoadBalancer, externalTrafficPolicy: Local";
    let text = service("np", "type: NodePort").replace(
        "{port: 80}",
        "{port: 80, name: a}, {port: 80, name: b, protocol: UDP}, {port: 81, name: c, nodePort: 80}",
    ) + &service("lb", local)
        + &service("bare", "type: LoadBalancer, allocateLoadBalancerNodePorts: false");
    let fixture = Fixture::new(&[("a.yaml", &text)]);
    let ports = |name: &str| -> Vec<_> {
        fixture.spec(name).ports.unwrap().into_iter().map(|port| port.node_port).collect()
    };
    let np = ports("np");
    assert_eq!(np[0], np[1], "both protocols of a port have the same number");
    assert!((30086..=32767).contains(&np[0].unwrap()), "{np:?}");
    assert_eq!(np[2], Some(80));
    let health = fixture.spec("lb").health_check_node_port.unwrap();
    assert!((30086..=32767).contains(&health) && ports("lb")[0] != Some(health));
    assert_eq!((ports("bare"), fixture.spec("bare").health_check_node_port), (vec![None], None));
}

#[test]
fn allocations_survive_a_restart_and_yield_to_explicit_ones() {
    let text: String = (0..40).map(|index| service(&format!("s{index}"), "type: NodePort")).collect();
    let mut fixture = Fixture::new(&[("a.yaml", &text)]);
    fixture.reread();
    let before = fixture.state.status.allocations.clone();
    let mut again = State::new(fixture.state.settings.clone());
    again.reread(&HashSet::new());
    assert_eq!(again.status.allocations, before);

    let wanted = &before[3];
    let (ip, port) = (wanted.cluster_ips[0], wanted.node_ports[0].node_port);
    let name = wanted.service.strip_prefix("default/").unwrap();
    let explicit = format!("type: NodePort, clusterIP: {ip}");
    let explicit = service("zz", &explicit).replace("{port: 80}", &format!("{{port: 80, nodePort: {port}}}"));
    fixture.write("b.yaml", &explicit);
    assert_eq!(fixture.reread(), [format!("+Service default/{name}"), "+Service default/zz".to_owned()]);
    let after = &fixture.state.status.allocations;
    assert_ne!(after[3].cluster_ips, before[3].cluster_ips);
    assert_ne!(after[3].node_ports, before[3].node_ports);
    assert_eq!((&after[..3], &after[4..]), (&before[..3], &before[4..]), "no other Service moves");
    let moved = format!("Service default/{name} moves from {ip} to {}", after[3].cluster_ips[0]);
    assert_eq!(fixture.state.status.warnings, [moved]);
}

#[test]
fn an_address_in_two_manifests_belongs_to_the_first_file() {
    let fixed = "type: NodePort, clusterIP: 10.96.0.9";
    let mut fixture = Fixture::new(&[("a.yaml", &service("z", fixed)), ("b.yaml", &service("a", fixed))]);
    assert_eq!(fixture.reread(), ["+Service default/z"]);
    assert_eq!(
        fixture.errors(),
        ["b.yaml: document 1 (Service default/a): `spec.clusterIP` is taken by Service default/z"]
    );
    fixture.remove("a.yaml");
    assert_eq!(fixture.reread(), ["-Service default/z", "+Service default/a"]);
}

#[test]
fn an_exhausted_range_is_a_warning_and_other_services_are_served() {
    let text: String = (0..8).map(|index| service(&format!("s{index}"), "")).collect();
    let mut fixture = Fixture::new(&[]);
    fixture.state.settings.service_ranges = vec!["192.0.2.0/29".parse().unwrap()];
    fixture.state = State::new(fixture.state.settings.clone());
    fixture.write("a.yaml", &text);
    assert_eq!(fixture.reread().len(), 8);
    assert_eq!(fixture.state.status.allocations.len(), 6);
    let shortages = [
        "Service default/s6: no IPv4 ClusterIP is left to allocate",
        "Service default/s7: no IPv4 ClusterIP is left to allocate",
    ];
    assert_eq!(fixture.state.status.warnings, shortages);
}

#[test]
fn the_status_file_is_updated_and_not_read_as_a_manifest() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", ""))]);
    let path = fixture.directory.path().join("status.json");
    fixture.state.settings.status_file = Some(path.clone());
    fixture.state = State::new(fixture.state.settings.clone());
    let read = || serde_json::from_slice::<ManifestStatus>(&fs::read(&path).unwrap()).unwrap();
    fixture.reread();
    assert_eq!(read(), fixture.state.status);
    assert_eq!(read().allocations[0].service, "default/a");
    fixture.write("a.yaml", "kind: Service");
    fixture.reread();
    assert_eq!(read().files.len(), 1);
    assert_eq!(read().files[0].errors[0], "document 1 (Service): `metadata.name` is missing");
}
