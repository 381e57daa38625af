//! Session affinity: clients that send datagrams, and backends that receive them.

use std::{
    cell::Cell,
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use weir::{
    dataplane::{Dataplane as _, nftables::Nftables},
    model::Family,
    plan::{PortPlan, Route, Target},
};

use super::{
    address, assert_installed, backend, both, by_udp, in_namespace, link_up, nft, port, start, step,
    treatment,
};

/// Enough that chance alone does what is asserted here about them once in more than a million runs.
const CLIENTS: u8 = 120;

fn sticky(family: Family, backends: &[u8]) -> Arc<PortPlan> {
    let to_all = Route::uniform(treatment(Target::Cluster, false));
    by_udp(port(family, 1, backends, Some(3600)), Some(to_all))
}

fn client(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, number + 100).into(),
        Family::V6 => format!("2001:db8::1:{number:x}").parse().unwrap(),
    }
}

/// Gives this host the addresses of clients, and listens on those of backends.
struct Network {
    backends: BTreeMap<u8, UdpSocket>,
    /// No two flows have the same: connection tracking would take the second for the first.
    next_port: Cell<u16>,
}

impl Network {
    fn new(family: Family) -> Self {
        let add = |address: IpAddr, device: &str| {
            let address = format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 });
            let arguments = ["address", "add", &address, "dev", device, "nodad"];
            let arguments = &arguments[..if address.contains(':') { 6 } else { 5 }];
            let status = Command::new("ip").args(arguments).status().unwrap();
            assert!(status.success(), "{address}");
        };
        (0..CLIENTS).for_each(|number| add(client(family, number), "lo"));
        let sockets = (1..=4).map(|number| {
            let backend = backend(family, number, false);
            add(backend.address, "lo");
            let socket = UdpSocket::bind((backend.address, backend.port)).unwrap();
            socket.set_nonblocking(true).unwrap();
            (number, socket)
        });
        Self { backends: sockets.collect(), next_port: Cell::new(10_000) }
    }

    /// Sends the first datagram of a new flow of this client. Fails where the rules drop it.
    fn send(&self, family: Family, number: u8) -> io::Result<usize> {
        let from = self.next_port.replace(self.next_port.get() + 1);
        let socket = UdpSocket::bind((client(family, number), from)).unwrap();
        socket.send_to(&[number], (address(family, 1), 80))
    }

    /// Which backend a new flow of this client gets to.
    fn call(&self, family: Family, number: u8) -> u8 {
        self.send(family, number).unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            for (backend, socket) in &self.backends {
                let mut bytes = [0];
                if socket.recv_from(&mut bytes).is_ok() {
                    assert_eq!(bytes, [number], "from another client");
                    return *backend;
                }
            }
            std::thread::yield_now();
        }
        panic!("client {number} got to no backend");
    }

    fn call_all(&self, family: Family) -> BTreeMap<u8, u8> {
        (0..CLIENTS).map(|number| (number, self.call(family, number))).collect()
    }
}

/// Counts what leaves with something in the field that the rules carry numbers in.
fn watch_priority() {
    nft(&["add", "table", "inet", "watch"]);
    nft(&["add", "chain", "inet", "watch", "out", "{ type filter hook postrouting priority 300; }"]);
    nft(&["add", "rule", "inet", "watch", "out", "udp dport 8080 meta priority != none counter"]);
    nft(&["add", "rule", "inet", "watch", "out", "udp dport 8080 counter"]);
}

#[test]
fn a5_a1_clients_stay_with_their_backend_until_it_leaves_and_have_forgotten_it_when_it_comes_back() {
    for family in Family::ALL {
        in_namespace(move || {
            link_up();
            watch_priority();
            let network = Network::new(family);
            let (three, two) = (sticky(family, &[1, 2, 3]), sticky(family, &[1, 2]));
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&start(&[&three])).unwrap();
            let mut before = network.call_all(family);
            assert_eq!(network.call_all(family), before, "A1");
            assert!((1..=3).all(|backend| before.values().any(|chosen| *chosen == backend)), "{before:?}");

            // Every other client calls while a backend is away.
            plane.apply(&step(Some(&three), Some(&two))).unwrap();
            let (calling, silent): (Vec<u8>, Vec<u8>) = (0..CLIENTS).partition(|client| client % 2 == 0);
            for number in calling {
                let chosen = network.call(family, number);
                if before[&number] == 3 {
                    assert_ne!(chosen, 3, "A5");
                    before.insert(number, chosen);
                }
                assert_eq!(chosen, before[&number], "A4");
            }
            plane.apply(&step(Some(&two), Some(&three))).unwrap();
            let after = network.call_all(family);
            let of_three: Vec<u8> = silent.into_iter().filter(|number| before[number] == 3).collect();
            assert!(of_three.iter().any(|number| after[number] != 3), "A5: nothing was forgotten");
            let others = |all: &BTreeMap<u8, u8>| {
                let mut all = all.clone();
                all.retain(|number, _| !of_three.contains(number));
                all
            };
            assert_eq!(others(&after), others(&before), "A4");
            assert_eq!(network.call_all(family), after, "A1");

            let listed = nft(&["list", "chain", "inet", "watch", "out"]);
            assert!(listed.contains("priority != none counter packets 0 "), "{listed}");
            assert_eq!(listed.matches("packets 0 ").count(), 1, "{listed}");
        });
    }
}

#[test]
fn a5_clients_are_remembered_over_a_restart_but_not_for_a_backend_that_left_meanwhile() {
    for family in Family::ALL {
        in_namespace(move || {
            link_up();
            let network = Network::new(family);
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&start(&[&sticky(family, &[1, 2, 3])])).unwrap();
            let before = network.call_all(family);

            drop(plane);
            let (order, left) = (sticky(family, &[3, 1, 2]), sticky(family, &[2, 3, 4]));
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&start(&[&order])).unwrap();
            assert_installed(&mut plane, &order);
            assert_eq!(network.call_all(family), before);

            drop(plane);
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&start(&[&left])).unwrap();
            assert_installed(&mut plane, &left);
            for (number, chosen) in network.call_all(family) {
                assert!(
                    chosen == before[&number] || before[&number] == 1 && chosen != 1,
                    "{number}: {chosen}"
                );
            }
        });
    }
}

/// The content of a map of the table: keys by values.
fn listed(family: &str, map: &str) -> BTreeMap<String, String> {
    let listed = nft(&["list", "map", family, "weir", map]);
    let elements = listed.split_once("elements = {").map_or("", |(_, rest)| rest.split('}').next().unwrap());
    let pairs = elements.split(',').filter_map(|element| element.split_once(" : "));
    pairs.map(|(key, value)| (value.trim().to_owned(), key.trim().to_owned())).collect()
}

#[test]
fn a_number_is_never_given_to_another_backend() {
    in_namespace(|| {
        let numbers = || listed("ip", "numbered");
        let [with, without, other] = [&[1, 2, 3][..], &[1, 2], &[1, 2, 4]].map(|all| sticky(Family::V4, all));
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&with])).unwrap();
        let first = numbers();
        plane.apply(&step(Some(&with), Some(&without))).unwrap();
        assert!(!numbers().contains_key("10.244.0.3 . 8080"), "its number goes with the backend");

        // The highest number is free, and only the kernel still has an element with it.
        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&other])).unwrap();
        let second = numbers();
        for stays in ["10.244.0.1 . 8080", "10.244.0.2 . 8080"] {
            assert_eq!(second[stays], first[stays]);
        }
        assert!(!first.values().any(|number| *number == second["10.244.0.4 . 8080"]), "{first:?} {second:?}");

        // The port goes while no agent runs.
        drop(plane);
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[])).unwrap();
        assert_eq!(numbers(), BTreeMap::new());
        assert!(!nft(&["list", "ruleset"]).contains("svc-1"));
    });
}

#[test]
fn a1_a_client_that_came_while_the_slots_were_gone_is_remembered_like_any_other() {
    for family in Family::ALL {
        in_namespace(move || {
            link_up();
            let network = Network::new(family);
            let three = sticky(family, &[1, 2, 3]);
            let mut plane = Nftables::open(both()).unwrap();
            plane.apply(&start(&[&three])).unwrap();
            let table = if family == Family::V4 { "ip" } else { "ip6" };
            let maps = nft(&["list", "maps", table]);
            let slots = maps.split_whitespace().find(|word| word.starts_with("slots-")).unwrap();
            nft(&["flush", "map", table, "weir", slots]);
            assert!((0..CLIENTS).all(|number| network.send(family, number).is_err()), "{family}");
            plane.reread().unwrap();
            plane.apply(&start(&[&three])).unwrap();
            let before = network.call_all(family);
            assert_eq!(network.call_all(family), before, "{family}");
        });
    }
}

#[test]
fn a6_there_is_room_for_many_clients_however_many_endpoints_there_are() {
    in_namespace(|| {
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&sticky(Family::V4, &[1])])).unwrap();
        let listed = nft(&["list", "maps", "ip"]);
        let clients = listed.split("map clients-").nth(1).unwrap();
        assert!(clients.split('}').next().unwrap().contains("size 1048576"), "{listed}");
    });
}

#[test]
fn affinity_comes_and_goes_and_its_timeout_changes_while_the_port_serves() {
    in_namespace(|| {
        link_up();
        let network = Network::new(Family::V4);
        let plan = |affinity, backends: &[u8]| {
            let to_all = Route::uniform(treatment(Target::Cluster, false));
            by_udp(port(Family::V4, 1, backends, affinity), Some(to_all))
        };
        let mut plane = Nftables::open(both()).unwrap();
        let steps = [
            plan(None, &[1, 2, 3]),
            plan(Some(60), &[1, 2, 3]),
            plan(Some(3600), &[1, 2, 3]),
            plan(Some(3600), &[2]),
            plan(None, &[2, 4]),
            plan(Some(60), &[1, 2, 3, 4]),
        ];
        plane.apply(&start(&[&steps[0]])).unwrap();
        for pair in steps.windows(2) {
            plane.apply(&step(Some(&pair[0]), Some(&pair[1]))).unwrap();
            assert_installed(&mut plane, &pair[1]);
            let all = network.call_all(Family::V4);
            if pair[1].affinity.is_some() {
                assert_eq!(network.call_all(Family::V4), all);
            }
        }
    });
}

/// One site has more IPv6 addresses than any memory.
#[test]
fn a6_clients_of_one_site_do_not_fill_the_memory() {
    /// More than come through before the site is recognised.
    const FLOOD: u16 = 8192;
    in_namespace(|| {
        link_up();
        let _backends = Network::new(Family::V6);
        std::fs::write("/proc/sys/net/ipv6/ip_nonlocal_bind", "1").unwrap();
        let mut plane = Nftables::open(both()).unwrap();
        plane.apply(&start(&[&sticky(Family::V6, &[1, 2])])).unwrap();
        let send = |client: String| {
            let socket = UdpSocket::bind((client.parse::<IpAddr>().unwrap(), 20_000)).unwrap();
            socket.send_to(b"x", (address(Family::V6, 1), 80)).unwrap();
        };
        (0..FLOOD).for_each(|number| send(format!("2001:db8:1::{number:x}")));
        send("2001:db8:2::1".to_owned());
        let listed = nft(&["list", "map", "ip6", "weir", "clients-cluster/default/svc-1/http/udp"]);
        let remembered = listed.matches("expires").count();
        assert!((1000..usize::from(FLOOD)).contains(&remembered), "{remembered} clients");
        assert!(listed.contains("2001:db8:2::1 "), "the client of another site");
    });
}
