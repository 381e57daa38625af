//! Which server gets the queries to the cluster DNS Service: weir while it answers, and CoreDNS as soon as it does not, for
//! sockets of every kind and in both data planes.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    thread::sleep,
    time::Duration,
};

use anyhow::Result;
use hickory_proto::op::{Message, ResponseCode};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use weir_tests::names::{ask_by_tcp, libc_resolves};

use super::*;

/// Sockets that live through everything, of pods and of the host.
fn long_lived(fixture: &Fixture<'_>) -> Vec<(String, Asker)> {
    let mut askers = Vec::new();
    for location in [CLIENT, Location::Host(1)] {
        for family in Family::ALL {
            for connected in [false, true] {
                let label = format!("{location} over {family}, connected: {connected}");
                askers.push((label, fixture.asker(location, family, connected)));
            }
        }
    }
    askers
}

fn all_answered_by(fixture: &Fixture<'_>, askers: &[(String, Asker)], wanted: Resolver) {
    for (label, asker) in askers {
        await_that(&format!("{label} is answered by {wanted}\n{}", fixture.say_log()), || {
            resolver(asker) == wanted
        });
        assert_eq!(resolver(asker), wanted, "{label} stays there");
    }
}

/// The kernel may let a connected socket of the host keep the way it has, which leads to CoreDNS; all others come back.
fn back_at_weir(fixture: &Fixture<'_>, askers: &[(String, Asker)]) {
    let (may_stay, come): (Vec<_>, Vec<_>) =
        askers.iter().partition(|(label, _)| label.starts_with("node-1") && label.ends_with("true"));
    for (label, asker) in come {
        await_that(&format!("{label} is answered by weir\n{}", fixture.say_log()), || {
            resolver(asker) == Resolver::Weir
        });
    }
    for (label, asker) in may_stay {
        assert_ne!(resolver(asker), Resolver::Absent, "{label} is answered");
    }
}

/// A connection to the Service, and the server at its other end.
struct Connection(TcpStream);

impl Connection {
    fn open(fixture: &Fixture<'_>) -> Self {
        let stream =
            fixture.topology.at(CLIENT).run(|| TcpStream::connect((dns_ip(Family::V4), 53)).unwrap());
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        Self(stream)
    }

    fn resolver(&mut self) -> Resolver {
        let bytes = query(WEB, RecordType::A, false).unwrap().to_vec().unwrap();
        let mut ask = || -> Result<Message> {
            self.0.write_all(&[&u16::try_from(bytes.len())?.to_be_bytes()[..], &bytes].concat())?;
            let mut len = [0; 2];
            self.0.read_exact(&mut len)?;
            let mut reply = vec![0; u16::from_be_bytes(len).into()];
            self.0.read_exact(&mut reply)?;
            Ok(Message::from_vec(&reply)?)
        };
        match ask().ok().and_then(|reply| Some(reply.answers.first()?.data.to_string())).as_deref() {
            Some("10.96.1.1") => Resolver::Weir,
            Some("192.0.2.78") => Resolver::CoreDns,
            _ => Resolver::Absent,
        }
    }
}

fn queries_come_back_to_coredns(plane: Plane) -> Result<()> {
    let topology = Topology::new()?;
    let fixture = Fixture::new(&topology, plane)?;
    let _coredns = fixture.coredns(HOSTS)?;
    let weir = fixture.weir()?;
    fixture.await_answers_of(Resolver::Weir);
    // Killed before, weir would have programmed nothing that leads to CoreDNS.
    await_that("Services are in force", || {
        fixture.health("/healthz").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200 "))
    });
    let askers = long_lived(&fixture);
    all_answered_by(&fixture, &askers, Resolver::Weir);
    let mut connection = Connection::open(&fixture);
    assert_eq!(connection.resolver(), Resolver::Weir);

    drop(weir);
    // Every new socket must be answered.
    let fresh = fixture.asker(CLIENT, Family::V4, true);
    assert_eq!(resolver(&fresh), Resolver::CoreDns, "the first query after SIGKILL");
    all_answered_by(&fixture, &askers, Resolver::CoreDns);
    assert_eq!(
        connection.resolver(),
        Resolver::Absent,
        "a connection ends with the process that accepted it"
    );
    let client = topology.at(CLIENT);
    assert_eq!(
        libc_resolves(client, dns_ip(Family::V4), "web")?,
        ["192.0.2.78".parse::<IpAddr>()?, "2001:db8::78".parse()?]
    );
    let mut connection = Connection::open(&fixture);
    assert_eq!(connection.resolver(), Resolver::CoreDns);

    let weir = fixture.weir()?;
    fixture.await_answers_of(Resolver::Weir);
    back_at_weir(&fixture, &askers);
    assert_eq!(
        connection.resolver(),
        Resolver::CoreDns,
        "a connection stays with the server that accepted it"
    );
    assert_eq!(
        ask_by_tcp(client, dns_ip(Family::V6), WEB, RecordType::A)?.addresses(),
        ["10.96.1.1".parse::<IpAddr>()?]
    );

    kill(Pid::from_raw(weir.id().try_into()?), Signal::SIGTERM)?;
    all_answered_by(&fixture, &askers, Resolver::CoreDns);
    Ok(())
}

#[test]
fn sockets_of_every_kind_come_back_to_coredns_when_weir_is_killed_nftables() -> Result<()> {
    queries_come_back_to_coredns(Plane::Nftables)
}

#[test]
fn sockets_of_every_kind_come_back_to_coredns_when_weir_is_killed_ebpf() -> Result<()> {
    queries_come_back_to_coredns(Plane::Ebpf)
}

fn names_without_coredns(plane: Plane) -> Result<()> {
    let topology = Topology::new()?;
    let fixture = Fixture::new(&topology, plane)?;
    let coredns = fixture.coredns(HOSTS)?;
    let _weir = fixture.weir()?;
    fixture.await_answers_of(Resolver::Weir);
    let client = topology.at(CLIENT);
    // An alias is followed to the upstream, which is CoreDNS itself and not the Service.
    await_that("the upstream answers", || fixture.ask(ELSEWHERE, RecordType::A).addresses().len() == 1);
    let elsewhere = ["192.0.2.77".parse::<IpAddr>()?, "2001:db8::77".parse()?];
    for family in Family::ALL {
        assert_eq!(libc_resolves(client, dns_ip(family), "upstream.example")?, elsewhere);
        assert_eq!(libc_resolves(client, dns_ip(family), "out")?, elsewhere, "an ExternalName");
    }
    assert_eq!(
        fixture.ask("out.default.svc.cluster.local.", RecordType::A).answers[0],
        "out.default.svc.cluster.local. 5 IN CNAME upstream.example."
    );

    drop(coredns);
    fixture.write("cluster", &cluster(false))?;
    // The node's own resolv.conf names no other server.
    let code = ask_by_tcp(client, dns_ip(Family::V4), "x.example.", RecordType::A)?.code;
    assert!(matches!(code, ResponseCode::ServFail | ResponseCode::Refused), "{code}");
    for family in Family::ALL {
        assert_eq!(libc_resolves(client, dns_ip(family), "web")?, ["10.96.1.1".parse::<IpAddr>()?]);
        let by_tcp = ask_by_tcp(client, dns_ip(family), WEB, RecordType::A)?;
        assert_eq!(
            by_tcp.addresses(),
            ["10.96.1.1".parse::<IpAddr>()?],
            "F1 is not for what is answered here"
        );
        let by_host = ask_by_tcp(topology.at(Location::Host(1)), dns_ip(family), WEB, RecordType::A)?;
        assert_eq!(by_host.addresses(), ["10.96.1.1".parse::<IpAddr>()?]);
    }
    Ok(())
}

#[test]
fn the_clusters_names_resolve_while_coredns_is_away_nftables() -> Result<()> {
    names_without_coredns(Plane::Nftables)
}

#[test]
fn the_clusters_names_resolve_while_coredns_is_away_ebpf() -> Result<()> {
    names_without_coredns(Plane::Ebpf)
}

/// Its queries then have the Service's own address for their source, and the answers go to a port there that no Service
/// has (F4).
#[test]
fn a_host_with_no_route_elsewhere_is_answered_too() -> Result<()> {
    for plane in [Plane::Nftables, Plane::Ebpf] {
        let topology = Topology::new()?;
        let host = topology.at(Location::Host(1));
        for family in ["-4", "-6"] {
            host.stdout("ip", &[family, "route", "del", "default"])?;
        }
        let fixture = Fixture::new(&topology, plane)?;
        let _weir = fixture.weir()?;
        fixture.await_answers_of(Resolver::Weir);
        assert_eq!(host.stdout("ip", &["-6", "-o", "addr", "show", "dev", "weir-dns"])?, "");
    }
    Ok(())
}

#[test]
fn a_weir_that_does_not_answer_gives_the_queries_back() -> Result<()> {
    let topology = Topology::new()?;
    let fixture = Fixture::new(&topology, Plane::Nftables)?;
    let _coredns = fixture.coredns(HOSTS)?;
    let _weir = fixture.weir()?;
    fixture.await_answers_of(Resolver::Weir);
    let askers = long_lived(&fixture);
    all_answered_by(&fixture, &askers, Resolver::Weir);
    // Whatever the reason: here its own questions to itself get lost.
    let node = topology.at(Location::Host(1));
    let deaf = "add table ip deaf; add chain ip deaf in { type filter hook input priority -10; }; \
                add rule ip deaf in ip daddr 169.254.20.53 udp dport 53 drop";
    node.stdout("nft", &[deaf])?;
    all_answered_by(&fixture, &askers, Resolver::CoreDns);
    assert!(
        fixture.logged("this node no longer answers DNS queries to this address"),
        "{}",
        fixture.say_log()
    );
    node.stdout("nft", &["delete table ip deaf"])?;
    fixture.await_answers_of(Resolver::Weir);
    back_at_weir(&fixture, &askers);
    node.stdout("ip", &["link", "del", "weir-dns"])?;
    await_that("weir notices that its device is gone", || {
        fixture.logged("another program deleted the device")
    });
    fixture.await_answers_of(Resolver::Weir);
    Ok(())
}

/// As network managers remove routes that are not theirs, and set devices down.
#[test]
fn routes_that_another_program_removes_come_back() -> Result<()> {
    let topology = Topology::new()?;
    let fixture = Fixture::new(&topology, Plane::Nftables)?;
    let _coredns = fixture.coredns(HOSTS)?;
    let _weir = fixture.weir()?;
    fixture.await_answers_of(Resolver::Weir);
    let node = topology.at(Location::Host(1));
    let routes = || {
        let of = |family| {
            let local = ["route", "show", "table", "local", "type", "local", "dev", "weir-dns"];
            node.stdout("ip", &[&[family][..], &local].concat())
        };
        Ok::<_, anyhow::Error>(format!("{}{}", of("-4")?, of("-6")?))
    };
    let all = routes()?;
    for family in Family::ALL {
        assert!(all.contains(&dns_ip(family).to_string()), "{all}");
    }
    for flush in [&["-4", "route", "flush"][..], &["-6", "route", "flush"]] {
        node.stdout("ip", &[flush, &["table", "local", "dev", "weir-dns"]].concat())?;
    }
    await_that("weir makes the routes anew", || routes().is_ok_and(|now| now == all));
    fixture.await_answers_of(Resolver::Weir);
    node.stdout("ip", &["link", "set", "weir-dns", "down"])?;
    await_that("weir sets the device up again", || routes().is_ok_and(|now| now == all));
    fixture.await_answers_of(Resolver::Weir);
    Ok(())
}

#[test]
fn a_pod_that_holds_a_thousand_connections_keeps_no_other_client_out() -> Result<()> {
    let topology = Topology::new()?;
    let fixture = Fixture::new(&topology, Plane::Nftables)?;
    let _weir = fixture.weir()?;
    fixture.await_answers_of(Resolver::Weir);
    let greedy = topology.at(Location::Pod(1, 2));
    let held: Vec<TcpStream> = greedy.run(|| {
        (0..1000).map(|_| TcpStream::connect((dns_ip(Family::V4), 53))).collect::<std::io::Result<_>>()
    })?;
    for location in [CLIENT, Location::Host(1)] {
        for family in Family::ALL {
            let said = ask_by_tcp(topology.at(location), dns_ip(family), WEB, RecordType::A)?;
            assert_eq!(said.addresses(), ["10.96.1.1".parse::<IpAddr>()?], "{location} over {family}");
        }
    }
    let healthz = fixture.health("/livez")?;
    assert!(healthz.starts_with("HTTP/1.1 200 "), "{healthz}");
    drop(held);
    Ok(())
}

#[test]
fn an_address_that_another_process_has_is_left_to_it() -> Result<()> {
    let topology = Topology::new()?;
    let fixture = Fixture::new(&topology, Plane::Nftables)?;
    let node = topology.at(Location::Host(1));
    // As NodeLocal DNSCache does it.
    node.ip(&["addr add 10.96.0.10/32 dev lo".into()])?;
    let cache = CoreDns::start(node, &format!("    bind 10.96.0.10\n{HOSTS}"))?;
    let _weir = fixture.weir()?;
    await_that("weir logs where the queries go", || fixture.logged("weir leaves it to the program"));
    for location in [CLIENT, Location::Host(1)] {
        await_that(
            &format!("{location} is answered by the cache\n{}\n{}", fixture.say_log(), cache.log()),
            || resolver(&fixture.asker(location, Family::V4, false)) == Resolver::CoreDns,
        );
    }
    // No other process has the other family's address, so weir has it.
    await_that("IPv6 is answered by weir", || {
        resolver(&fixture.asker(CLIENT, Family::V6, false)) == Resolver::Weir
    });
    sleep(Duration::from_secs(1));
    assert_eq!(resolver(&fixture.asker(CLIENT, Family::V4, false)), Resolver::CoreDns, "and so it stays");
    Ok(())
}

#[test]
fn f4_nothing_else_is_to_be_had_at_an_address_that_is_the_nodes() -> Result<()> {
    let topology = Topology::new()?;
    let fixture = Fixture::new(&topology, Plane::Nftables)?;
    let _coredns = fixture.coredns(HOSTS)?;
    let _servers = weir_tests::runner::serve(&topology)?;
    let _weir = fixture.weir()?;
    fixture.await_answers_of(Resolver::Weir);
    // A process of the host that listens everywhere is not to be had at a ClusterIP.
    let anywhere = topology.at(Location::Host(1)).run(|| std::net::TcpListener::bind("0.0.0.0:2222"))?;
    let refused = topology.at(CLIENT).run(|| TcpStream::connect((dns_ip(Family::V4), 2222)));
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    drop(anywhere);
    Ok(())
}
