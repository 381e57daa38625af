//! Clients that are no pods of this node: at the DNS Service's address CoreDNS answers them, at weir's own nothing does.

use anyhow::Result;
use hickory_proto::op::ResponseCode;
use weir_tests::names::{ask, ask_by_tcp};

use super::*;

/// weir's own address.
const OWN: &str = "169.254.20.53";
/// A pod of the same node as the client's.
const OTHER: Location = Location::Pod(1, 2);
/// A machine outside, which reaches the Service's address through node 1.
const OUTSIDE: Location = Location::Outside(0);

/// Which answers a client gets at the DNS Service's address, by a socket of each kind and by TCP.
fn served_by(fixture: &Fixture<'_>, location: Location, family: Family, wanted: Resolver) -> Result<()> {
    for connected in [false, true] {
        await_that(
            &format!(
                "{location} is answered by {wanted} over {family}, connected: {connected}\n{}",
                fixture.say_log()
            ),
            || resolver(&fixture.asker(location, family, connected)) == wanted,
        );
    }
    let address = match wanted {
        Resolver::Weir => "10.96.1.1",
        _ => "192.0.2.78",
    };
    let said = ask_by_tcp(fixture.topology.at(location), dns_ip(family), WEB, RecordType::A)?;
    assert_eq!(said.addresses(), [address.parse::<IpAddr>()?], "{location} over {family} by TCP");
    Ok(())
}

fn strangers_are_left_to_coredns(plane: Plane) -> Result<()> {
    let topology = Topology::new()?;
    let mut fixture = Fixture::new(&topology, plane)?;
    fixture.cluster_cidrs = Family::ALL
        .map(|family| {
            let address = CLIENT.client_address(family);
            format!("{address}/{}", if family == Family::V4 { 32 } else { 128 })
        })
        .to_vec();
    let coredns = fixture.coredns(HOSTS)?;
    let _weir = fixture.weir()?;
    fixture.await_answers_of(Resolver::Weir);
    for family in Family::ALL {
        served_by(&fixture, OTHER, family, Resolver::CoreDns)?;
        served_by(&fixture, OUTSIDE, family, Resolver::CoreDns)?;
        served_by(&fixture, CLIENT, family, Resolver::Weir)?;
        served_by(&fixture, Location::Host(1), family, Resolver::Weir)?;
    }
    await_that(&format!("weir logs the clients that it does not answer\n{}", fixture.say_log()), || {
        fixture.logged("the cluster's DNS Service itself answers") && fixture.logged("clusterCIDR")
    });
    await_that("flows that were passed on are counted", || {
        let metrics = fixture.http(10249, "/metrics").unwrap_or_default();
        metrics.lines().any(|line| {
            line.starts_with("weir_dns_queries_total{outcome=\"passed-on\"}") && !line.ends_with(" 0")
        })
    });

    // Nothing is behind weir's own address but weir.
    let own: IpAddr = OWN.parse()?;
    let said = ask(topology.at(OTHER), own, WEB, RecordType::A)?;
    assert_eq!((said.code, said.answers.len()), (ResponseCode::Refused, 0));
    assert_eq!(
        ask(topology.at(CLIENT), own, WEB, RecordType::A)?.addresses(),
        ["10.96.1.1".parse::<IpAddr>()?]
    );
    await_that(&format!("weir logs the clients that it refuses\n{}", fixture.say_log()), || {
        fixture.logged("refused a query for a name")
            && fixture.logged(&OTHER.client_address(Family::V4).to_string())
    });

    // Without endpoints their queries are refused as those to any other Service.
    drop(coredns);
    fixture.write("cluster", &cluster(false))?;
    let refused = |family| {
        let asked = topology.at(OTHER).run(|| TcpStream::connect((dns_ip(family), 53)));
        asked.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    };
    for family in Family::ALL {
        await_that(&format!("{OTHER} is refused over {family}"), || refused(family));
        served_by(&fixture, CLIENT, family, Resolver::Weir)?;
    }
    Ok(())
}

#[test]
fn pods_outside_cluster_cidr_are_answered_by_coredns_nftables() -> Result<()> {
    strangers_are_left_to_coredns(Plane::Nftables)
}

#[test]
fn pods_outside_cluster_cidr_are_answered_by_coredns_ebpf() -> Result<()> {
    strangers_are_left_to_coredns(Plane::Ebpf)
}

fn one_family_is_known(plane: Plane) -> Result<()> {
    let topology = Topology::new()?;
    let mut fixture = Fixture::new(&topology, plane)?;
    fixture.cluster_cidrs = vec![CLUSTER_CIDRS[0].to_owned()];
    let _coredns = fixture.coredns(HOSTS)?;
    let _weir = fixture.weir()?;
    for location in [CLIENT, OTHER] {
        served_by(&fixture, location, Family::V4, Resolver::Weir)?;
        served_by(&fixture, location, Family::V6, Resolver::CoreDns)?;
    }
    served_by(&fixture, Location::Host(1), Family::V6, Resolver::Weir)
}

#[test]
fn a_cluster_cidr_of_one_family_leaves_the_other_to_coredns_nftables() -> Result<()> {
    one_family_is_known(Plane::Nftables)
}

#[test]
fn a_cluster_cidr_of_one_family_leaves_the_other_to_coredns_ebpf() -> Result<()> {
    one_family_is_known(Plane::Ebpf)
}
