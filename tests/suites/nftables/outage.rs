//! Clients connect all the time while a table is made, made anew or repaired: what was served or will be is not refused.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use weir::{
    dataplane::{Dataplane as _, nftables::Nftables},
    model::Family,
    plan::{ClusterIpDelta, Delta, PortPlan},
};

use super::{address, assert_installed, both, in_namespace, link_up, nft, port, start};

/// Service ports of one ClusterIP for each family, in several transactions.
const MANY: u16 = 5000;
const FIRST_PORT: u16 = 1000;

fn plans() -> Vec<Arc<PortPlan>> {
    let plan = |family, number| {
        let mut plan = port(family, 1, &[1, 3, 5], None);
        plan.id.port = format!("port-{number}").into();
        plan.frontends.truncate(1);
        plan.frontends[0].frontend.port = FIRST_PORT + number;
        Arc::new(plan)
    };
    Family::ALL.into_iter().flat_map(|family| (0..MANY).map(move |number| plan(family, number))).collect()
}

fn everything(plans: &[Arc<PortPlan>]) -> Delta {
    let ips = Family::ALL.map(|family| ClusterIpDelta::Add(address(family, 1)));
    Delta { cluster_ips: ips.into(), ..start(&plans.iter().collect::<Vec<_>>()) }
}

/// The results of a client that makes one connection after the other.
#[derive(Default)]
struct Tally {
    answered: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
}

struct Client {
    to: SocketAddr,
    tally: Arc<Tally>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Client {
    fn begin(to: SocketAddr, patience: Duration) -> Self {
        let (tally, stop) = (Arc::new(Tally::default()), Arc::new(AtomicBool::new(false)));
        let (counts, stopped) = (Arc::clone(&tally), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Relaxed) {
                let count = match TcpStream::connect_timeout(&to, patience) {
                    Ok(_) => &counts.answered,
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => &counts.refused,
                    Err(_) => &counts.lost,
                };
                count.fetch_add(1, Relaxed);
            }
        });
        Self { to, tally, stop, thread }
    }

    /// Waits until it is answered some times more.
    fn await_answers(&self) {
        let (wanted, deadline) =
            (self.tally.answered.load(Relaxed) + 20, Instant::now() + Duration::from_secs(60));
        while self.tally.answered.load(Relaxed) < wanted {
            assert!(Instant::now() < deadline, "{} does not answer", self.to);
            std::thread::yield_now();
        }
    }

    fn end(self) -> (SocketAddr, [u64; 2]) {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap();
        (self.to, [&self.tally.refused, &self.tally.lost].map(|count| count.load(Relaxed)))
    }
}

/// A host that has the endpoints, with something that listens there.
fn endpoints_here() {
    link_up();
    for address in ["10.244.0.1/32", "10.244.0.3/32", "10.244.0.5/32"] {
        ip(&["address", "add", address, "dev", "lo"]);
    }
    for address in ["fd00:10:244::1/128", "fd00:10:244::3/128", "fd00:10:244::5/128"] {
        ip(&["address", "add", address, "dev", "lo", "nodad"]);
    }
    let listener = TcpListener::bind("[::]:8080").unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
}

fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}

/// One client for each family, of the service port that comes last.
fn clients(patience: Duration) -> [Client; 2] {
    let to = |family| SocketAddr::new(address(family, 1), FIRST_PORT + MANY - 1);
    Family::ALL.map(|family| Client::begin(to(family), patience))
}

/// Loads what another program or an older version might have left in the table.
fn load(script: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), script).unwrap();
    nft(&["-f", file.path().to_str().unwrap()]);
}

/// An older version's table: it serves what the clients ask for, and shares a few names with this version's.
fn older_version(family: Family) -> String {
    let (ip, backend): (_, IpAddr) = match family {
        Family::V4 => ("ip", "10.244.0.1".parse().unwrap()),
        Family::V6 => ("ip6", "fd00:10:244::1".parse().unwrap()),
    };
    let kind = if ip == "ip" { "ipv4_addr" } else { "ipv6_addr" };
    let (to, last) = (address(family, 1), FIRST_PORT + MANY - 1);
    format!(
        "table {ip} weir {{
            map services {{
                type {kind} . inet_proto . inet_service : {kind} . inet_service
                elements = {{ {to} . tcp . {last} : {backend} . 8080 }}
            }}
            set older {{ type {kind}; }}
            chain dispatch {{
                meta l4proto tcp dnat {ip} to {ip} daddr . meta l4proto . th dport map @services
            }}
            chain nat-output {{
                type nat hook output priority 0
                {ip} daddr @older drop
                jump dispatch
            }}
        }}\n"
    )
}

#[test]
fn a_start_with_thousands_of_services_refuses_none() {
    in_namespace(|| {
        endpoints_here();
        let plans = plans();
        let delta = everything(&plans);
        let clients = clients(Duration::from_millis(20));
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&delta).unwrap();
        clients.iter().for_each(Client::await_answers);
        for client in clients {
            let (to, [refused, _]) = client.end();
            assert_eq!(refused, 0, "of {to}");
        }
    });
}

/// The table is made anew because its maps are of another shape, in a transaction for each piece.
#[test]
fn a_table_of_another_shape_serves_until_the_new_one_does() {
    in_namespace(|| {
        endpoints_here();
        Family::ALL.into_iter().for_each(|family| load(&older_version(family)));
        let plans = plans();
        let delta = everything(&plans);
        let clients = clients(Duration::from_secs(10));
        clients.iter().for_each(Client::await_answers);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&delta).unwrap();
        clients.iter().for_each(Client::await_answers);
        for client in clients {
            let (to, lost) = client.end();
            assert_eq!(lost, [0, 0], "refused and lost of {to}");
        }
        assert_installed(&mut plane, &plans[0]);
        let tables = nft(&["list", "tables"]);
        assert_eq!(tables.lines().collect::<Vec<_>>(), ["table ip weir", "table ip6 weir"]);
        let listed = nft(&["list", "ruleset"]);
        assert!(!listed.contains("older") && !listed.contains("dispatch"), "the old table is gone");
    });
}

/// An agent that ended while a stand-in served finds it, and takes it away once the table is whole.
#[test]
fn a_stand_in_that_was_left_behind_goes() {
    in_namespace(|| {
        load(&older_version(Family::V4).replace("weir", "weir-next"));
        for beside in ["", &older_version(Family::V4)] {
            load(beside);
            let plan = Arc::new(port(Family::V4, 1, &[1, 2, 3], None));
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&start(&[&plan])).unwrap();
            assert_installed(&mut plane, &plan);
            assert!(!nft(&["list", "tables"]).contains("next"));
            plane.remove().unwrap();
        }
    });
}

#[test]
fn foreign_objects_in_the_table_go_alone() {
    in_namespace(|| {
        endpoints_here();
        let plans = plans();
        let delta = everything(&plans);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&delta).unwrap();
        let clients = clients(Duration::from_secs(10));
        clients.iter().for_each(Client::await_answers);
        for table in ["ip weir", "ip6 weir"] {
            load(&format!(
                "table {table} {{
                    set theirs {{ type inet_service; elements = {{ 1 }}; }}
                    map numbers {{ type inet_service : mark; }}
                    chain led-to {{ tcp dport @theirs accept; }}
                    chain input {{ type filter hook input priority 5; jump led-to; }}
                }}\n"
            ));
        }
        plane.reread().unwrap();
        plane.apply(&delta).unwrap();
        clients.iter().for_each(Client::await_answers);
        for client in clients {
            let (to, lost) = client.end();
            assert_eq!(lost, [0, 0], "refused and lost of {to}");
        }
        let listed = nft(&["list", "chains"]) + &nft(&["list", "sets"]) + &nft(&["list", "maps"]);
        for name in ["theirs", "numbers", "led-to", "chain input"] {
            assert!(!listed.contains(name), "{name} is still there: {listed}");
        }
    });
}
