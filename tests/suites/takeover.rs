//! From kube-proxy to weir and back on running nodes, as a DaemonSet's image is changed: no new connection fails, and
//! neither leaves its rules to the other for longer than that takes.

use std::{
    ffi::OsString,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, ensure};
use serde_json::json;
use weir::model::{Family, Object};
use weir_tests::{
    assets,
    control_plane::ControlPlane,
    netns::Namespace,
    node::{CLUSTER_CIDRS, Location, Topology, node_address, node_name},
    objects::{Addresses, node, pod, service},
    process::Process,
    runner::serve,
    subject::Plane,
    traffic::{Call, Load, Outcome, SERVER_PORTS, Transport, ask, await_answers, every_way},
    wait::{await_that, await_within},
};

const WEB: Addresses = Addresses::new(1).named("web");
/// kube-proxy's first start waits for its informers, and iptables is slow on a busy machine.
const LONG: Duration = Duration::from_secs(120);

/// How kube-proxy is run before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Nftables,
    /// With the iptables that writes to nf_tables.
    Iptables,
    /// With the iptables that has tables of its own.
    Legacy,
    Ipvs,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables | Self::Legacy => "iptables",
            Self::Ipvs => "ipvs",
        }
    }

    /// The parts of a node's kernel that kube-proxy writes to, in text.
    fn listing(self, host: &Namespace) -> String {
        let told = |program: &str, args: &[&str]| host.stdout(program, args).unwrap_or_default();
        let mut all = told("nft", &["list", "ruleset"]);
        match self {
            Self::Nftables | Self::Iptables => {}
            Self::Legacy => {
                all += &told("iptables-legacy-save", &[]);
                all += &told("ip6tables-legacy-save", &[]);
            }
            Self::Ipvs => {
                let servers = host.run(|| fs::read_to_string("/proc/thread-self/net/ip_vs"));
                all.extend(servers.unwrap_or_default().lines().skip(3).map(|line| format!("ip_vs {line}\n")));
                all += &told("ipset", &["list", "-name"]);
                all += &told("ip", &["address", "show"]);
            }
        }
        all
    }

    /// Whether a listing holds what kube-proxy made of the Service in both families.
    fn serves(self, listing: &str) -> bool {
        let in_table = |family: Family, what: &str| {
            let name = match (self, family) {
                (Self::Nftables, Family::V4) => "ip kube-proxy ",
                (Self::Nftables, Family::V6) => "ip6 kube-proxy ",
                (_, Family::V4) => "ip nat ",
                (_, Family::V6) => "ip6 nat ",
            };
            let table = listing.split("table ").find(|table| table.starts_with(name));
            table.is_some_and(|table| table.contains(what))
        };
        Family::ALL.iter().all(|family| {
            let address = WEB.cluster_ip(*family).to_string();
            match self {
                Self::Nftables => in_table(*family, &address),
                Self::Iptables => in_table(*family, "chain KUBE-SEP-"),
                Self::Legacy => listing.contains(&format!("-A KUBE-SERVICES -d {address}/")),
                Self::Ipvs => listing.contains("ip_vs ") && listing.contains(&format!(" {address}/")),
            }
        })
    }
}

struct Cluster<'a> {
    topology: &'a Topology,
    plane: ControlPlane<'a>,
    directory: tempfile::TempDir,
    mode: Mode,
}

impl<'a> Cluster<'a> {
    fn new(topology: &'a Topology, mode: Mode) -> Result<Self> {
        let plane = ControlPlane::start(&topology.router, Location::Router.client_address(Family::V4))?;
        let directory = tempfile::Builder::new().prefix("weir-takeover-").tempdir()?;
        plane.apply(&[&node(1), &node(2)])?;
        let configuration = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": mode.name(),
            "clientConnection": {"kubeconfig": plane.kubeconfig()?, "qps": 1000, "burst": 1000},
            "clusterCIDR": CLUSTER_CIDRS.join(","),
            "nftables": {"minSyncPeriod": "10ms"},
            "iptables": {"minSyncPeriod": "10ms"},
            // A network namespace other than the first may not change these.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        });
        fs::write(directory.path().join("config.conf"), configuration.to_string())?;
        if mode == Mode::Legacy {
            let legacy = directory.path().join("legacy");
            fs::create_dir(&legacy)?;
            for name in ["iptables", "iptables-save", "iptables-restore"] {
                for name in [name.to_owned(), name.replace("iptables", "ip6tables")] {
                    let program = name.replace("tables", "tables-legacy");
                    std::os::unix::fs::symlink(assets::program(&program)?, legacy.join(name))?;
                }
            }
        }
        Ok(Self { topology, plane, directory, mode })
    }

    fn log(&self, node: u8) -> PathBuf {
        self.directory.path().join(format!("agent-{node}.log"))
    }

    fn host(&self, node: u8) -> &Namespace {
        self.topology.at(Location::Host(node))
    }

    fn start(&self, node: u8, program: &Path, words: &[String]) -> Result<Process> {
        let config = format!("--config={}", self.directory.path().join("config.conf").display());
        let name = format!("--hostname-override={}", node_name(node));
        let mut path = OsString::from(self.directory.path().join("legacy"));
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        self.host(node).launch(program, &self.log(node), |command| {
            command.args(words).args([config, name]).env("PATH", path);
        })
    }

    fn listing(&self, node: u8) -> String {
        self.mode.listing(self.host(node))
    }

    fn start_kube_proxy(&self, node: u8) -> Result<Process> {
        let agent = self.start(node, &assets::kubernetes("kube-proxy")?, &["--v=2".to_owned()])?;
        await_within(LONG, "kube-proxy has programmed the node", || self.mode.serves(&self.listing(node)));
        Ok(agent)
    }

    /// Starts weir, and returns when it serves; with `take_over`, when it has removed what kube-proxy left.
    fn start_weir(&self, node: u8, plane: Plane, take_over: bool) -> Result<Process> {
        let mode = match plane {
            Plane::Nftables => "nftables",
            Plane::Ebpf => "ebpf",
        };
        let words = [
            "run".to_owned(),
            format!("--proxy-mode={mode}"),
            format!("--take-over={take_over}"),
            format!("--cgroup-root={}", self.topology.cgroup_root(node).display()),
            format!("--bpf-root={}", self.topology.bpf_root(node)?.display()),
        ];
        let before = fs::read_to_string(self.log(node)).unwrap_or_default().len();
        let agent = self.start(node, &assets::weir()?, &words)?;
        let sign = if take_over { "took over from kube-proxy" } else { "in force" };
        await_that("weir serves", || {
            fs::read_to_string(self.log(node)).is_ok_and(|log| log[before..].contains(sign))
        });
        Ok(agent)
    }

    /// How many connections to the Service's port the metrics of a node's agent count.
    fn counted(&self, node: u8) -> Result<u64> {
        let page = self.host(node).run(|| -> Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", 10249))?;
            write!(stream, "GET /metrics HTTP/1.0\r\n\r\n")?;
            let mut page = String::new();
            stream.read_to_string(&mut page)?;
            Ok(page)
        })?;
        let name = format!("service=\"{}\"", WEB.name());
        let lines = page.lines().filter(|line| line.starts_with("weir_service_connections_total{"));
        let counts = lines.filter(|line| line.contains(&name) && line.contains("protocol=\"TCP\""));
        Ok(counts.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum())
    }

    /// Removes what weir left, or kube-proxy.
    fn clean_up(&self, node: u8, words: &[&str]) -> Result<()> {
        let root = format!("--bpf-root={}", self.topology.bpf_root(node)?.display());
        let words = [&["cleanup", &*root][..], words].concat();
        let output = self.host(node).output(&assets::weir()?.display().to_string(), &words)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn publish(&self, objects: &[Object]) -> Result<()> {
        self.plane.apply(&objects.iter().collect::<Vec<_>>())
    }
}

/// Every way to the Service, from and through the first node.
fn calls() -> Vec<(Location, Call)> {
    every_way(WEB, &[Transport::Tcp, Transport::Udp])
}

/// Does something while everything is called over and over, and every new connection must be answered.
fn under_load<T>(
    topology: &Topology,
    plane: Plane,
    what: &str,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let start = |(from, call)| Load::start(topology.at(from), call, Duration::from_millis(2));
    let loads: Vec<_> = calls().into_iter().map(start).collect::<Result<_>>()?;
    await_answers(&loads, 20);
    let done = work();
    await_answers(&loads, 20);
    for ((from, call), load) in calls().into_iter().zip(loads) {
        let mut tally = load.stop()?;
        // A socket that the programs connected and that outlives them shows its real peer; it works.
        tally.failures.retain(|what, _| !(plane == Plane::Ebpf && what.starts_with("the peer of a call to")));
        ensure!(tally.failures.is_empty(), "{what}: {from} to {} by {}: {tally:?}", call.to, call.transport);
    }
    done
}

/// Other rules in the kernel of the node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Others {
    Nothing,
    /// A firewall that forwards nothing but what pods send, and rules as the CNI plugin portmap makes them, which have
    /// kube-proxy's chain mark what is to be masqueraded.
    Firewall,
}

impl Others {
    /// The port of the node that leads to the first pod.
    const HOST_PORT: u16 = 8099;

    /// How the programs of iptables are called.
    fn programs(mode: Mode) -> [(Family, String); 2] {
        let variant = if mode == Mode::Legacy { "legacy" } else { "nft" };
        [(Family::V4, format!("iptables-{variant}")), (Family::V6, format!("ip6tables-{variant}"))]
    }

    fn make(self, host: &Namespace, mode: Mode) -> Result<()> {
        if self == Self::Nothing {
            return Ok(());
        }
        let port = Self::HOST_PORT;
        for ((family, program), cidr) in Self::programs(mode).into_iter().zip(CLUSTER_CIDRS) {
            let pod = SocketAddr::new(Location::Pod(1, 1).server_address(family), SERVER_PORTS[0]);
            let rules = format!(
                "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -s {cidr} -j ACCEPT\nCOMMIT\n*nat\n\
                 :CNI-HOSTPORT-SETMARK - [0:0]\n:CNI-HOSTPORT-DNAT - [0:0]\n:CNI-DN-WEB - [0:0]\n\
                 -A CNI-HOSTPORT-SETMARK -j KUBE-MARK-MASQ\n\
                 -A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT\n\
                 -A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT\n\
                 -A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport {port} -j CNI-DN-WEB\n\
                 -A CNI-DN-WEB -s {cidr} -p tcp -m tcp --dport {port} -j CNI-HOSTPORT-SETMARK\n\
                 -A CNI-DN-WEB -p tcp -m tcp --dport {port} -j DNAT --to-destination {pod}\nCOMMIT\n"
            );
            let file = tempfile::NamedTempFile::new()?;
            fs::write(file.path(), rules)?;
            let path = file.path().display().to_string();
            host.stdout(&format!("{program}-restore"), &["--noflush", &path])?;
        }
        Ok(())
    }

    /// The rules, as iptables lists them.
    fn listing(host: &Namespace, mode: Mode) -> Result<String> {
        let mut all = String::new();
        for (_, program) in Self::programs(mode) {
            let saved = host.stdout(&format!("{program}-save"), &[])?;
            let is_others = |line: &&str| {
                line.contains("CNI-")
                    || line.starts_with(":FORWARD DROP")
                    || line.starts_with("-A FORWARD -s")
            };
            for line in saved.lines().filter(is_others) {
                all += line.split(" [").next().unwrap_or(line);
                all.push('\n');
            }
        }
        Ok(all)
    }

    /// Whether the first pod reaches itself by the port of the node, which takes masquerading.
    fn reach_the_pod(topology: &Topology) -> bool {
        let from = Location::Pod(1, 1);
        Family::ALL.iter().all(|family| {
            let to = SocketAddr::new(node_address(*family, 1), Self::HOST_PORT);
            let call = Call { patience: Duration::from_secs(5), ..Call::new(from, to, Transport::Tcp) };
            matches!(topology.at(from).run(|| ask(&call)), Outcome::Answer(_))
        })
    }
}

/// How kube-proxy's leftovers are removed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TakingOver {
    /// The agent, as soon as it serves.
    ByItself,
    /// `weir cleanup --kube-proxy`, later: both serve until then.
    ByHand,
}

fn there_and_back(mode: Mode, plane: Plane, taking_over: TakingOver) -> Result<()> {
    there_and_back_beside(Others::Nothing, mode, plane, taking_over)
}

fn there_and_back_beside(others: Others, mode: Mode, plane: Plane, taking_over: TakingOver) -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let cluster = Cluster::new(&topology, mode)?;
    // By IPVS of Linux 6.1 a pod does not reach itself over IPv6: no caller is an endpoint of it while all are called.
    let (third, last) = if mode == Mode::Ipvs { (pod(2, 2), pod(1, 2)) } else { (pod(1, 2), pod(2, 2)) };
    let names = [&third, &last].map(|endpoint| endpoint.location.to_string());
    let endpoints = [pod(1, 1), pod(2, 1), third, last];
    // An endpoint that leaves takes UDP answers under way with it under every proxy; so endpoints only come.
    let publish = |count: usize| cluster.publish(&service(&endpoints[..count]).everywhere().objects(WEB));
    let reaches = |backend: &str| {
        let (from, call) = calls()[0];
        let answer = topology.at(from).run(|| ask(&call));
        matches!(answer, Outcome::Answer(answer) if answer.backend.starts_with(backend))
    };
    let answered =
        |(from, call): &(Location, Call)| matches!(topology.at(*from).run(|| ask(call)), Outcome::Answer(_));
    publish(2)?;
    let agent = cluster.start_kube_proxy(1)?;
    let _other = cluster.start_kube_proxy(2)?;
    others.make(cluster.host(1), mode)?;
    let theirs = Others::listing(cluster.host(1), mode)?;
    await_that("everything answers", || calls().iter().all(answered));
    drop(agent);
    let agent = under_load(&topology, plane, "weir takes over", || {
        cluster.start_weir(1, plane, taking_over == TakingOver::ByItself)
    })?;
    if taking_over == TakingOver::ByHand {
        ensure!(mode.serves(&cluster.listing(1)), "what kube-proxy left is gone");
        under_load(&topology, plane, "kube-proxy is removed", || cluster.clean_up(1, &["--kube-proxy"]))?;
    }
    // The kubelet's, and kube-proxy keeps it up.
    let mut listing = cluster.listing(1).replace("KUBE-FIREWALL", "");
    if others == Others::Firewall {
        for needed in ["KUBE-FORWARD", "KUBE-MARK-MASQ"] {
            ensure!(listing.contains(needed), "{needed} is gone from\n{listing}");
            listing = listing.replace(needed, "");
        }
        ensure!(Others::reach_the_pod(&topology), "the port of the node leads nowhere");
    }
    ensure!(Others::listing(cluster.host(1), mode)? == theirs, "rules of others have changed");
    for left in ["kube-proxy", "KUBE-", "ip_vs ", "kube-ipvs0"] {
        ensure!(!listing.contains(left), "{left} is left in\n{listing}");
    }
    if plane == Plane::Ebpf {
        let before = cluster.counted(1)?;
        ensure!(reaches("pod-"), "a socket is not led");
        ensure!(cluster.counted(1)? > before, "a connection is not counted");
    }
    // Only weir is there to follow this.
    publish(3)?;
    await_that("weir follows", || reaches(&names[0]));

    drop(agent);
    let agent = under_load(&topology, plane, "kube-proxy comes back", || cluster.start_kube_proxy(1))?;
    under_load(&topology, plane, "weir is cleaned up", || cluster.clean_up(1, &[]))?;
    ensure!(!cluster.listing(1).contains("weir"), "weir's rules are left");
    publish(4)?;
    await_that("kube-proxy follows", || reaches(&names[1]));
    drop(agent);
    Ok(())
}

#[test]
fn from_kube_proxys_nftables_mode_and_back_no_connection_fails() -> Result<()> {
    there_and_back(Mode::Nftables, Plane::Nftables, TakingOver::ByItself)
}

#[test]
fn from_kube_proxys_nftables_mode_to_sockets_and_back_no_connection_fails() -> Result<()> {
    there_and_back(Mode::Nftables, Plane::Ebpf, TakingOver::ByHand)
}

#[test]
fn from_kube_proxys_iptables_mode_and_back_no_connection_fails() -> Result<()> {
    there_and_back(Mode::Iptables, Plane::Nftables, TakingOver::ByItself)
}

#[test]
fn from_kube_proxys_iptables_mode_to_sockets_and_back_no_connection_fails() -> Result<()> {
    there_and_back(Mode::Iptables, Plane::Ebpf, TakingOver::ByHand)
}

#[test]
fn from_kube_proxys_legacy_iptables_and_back_no_connection_fails() -> Result<()> {
    there_and_back(Mode::Legacy, Plane::Nftables, TakingOver::ByItself)
}

#[test]
fn from_kube_proxys_legacy_iptables_to_sockets_and_back_no_connection_fails() -> Result<()> {
    there_and_back(Mode::Legacy, Plane::Ebpf, TakingOver::ByHand)
}

/// Packets that only kube-proxy's rules accept go on being accepted, and rules of others that use its chains go on working.
#[test]
fn beside_a_firewall_and_host_ports_no_connection_fails() -> Result<()> {
    there_and_back_beside(Others::Firewall, Mode::Iptables, Plane::Nftables, TakingOver::ByItself)
}

#[test]
fn beside_a_firewall_and_host_ports_in_legacy_iptables_no_connection_to_sockets_fails() -> Result<()> {
    there_and_back_beside(Others::Firewall, Mode::Legacy, Plane::Ebpf, TakingOver::ByHand)
}

#[test]
#[ignore = "needs ip_vs in the kernel, and ipset"]
fn from_kube_proxys_ipvs_mode_and_back_no_connection_fails() -> Result<()> {
    there_and_back(Mode::Ipvs, Plane::Nftables, TakingOver::ByItself)
}

#[test]
#[ignore = "needs ip_vs in the kernel, and ipset"]
fn from_kube_proxys_ipvs_mode_to_sockets_and_back_no_connection_fails() -> Result<()> {
    there_and_back(Mode::Ipvs, Plane::Ebpf, TakingOver::ByHand)
}

/// nf_tables refuses a whole transaction that deletes a chain to which an element of a map leads.
#[test]
fn a_chain_that_a_map_of_others_leads_to_stays_and_everything_else_goes() -> Result<()> {
    let namespace = Namespace::new("maps")?;
    for family in ["ip", "ip6"] {
        namespace.stdout(
            "nft",
            &[&format!(
                "table {family} nat {{
                    chain KUBE-MARK-MASQ {{ meta mark set mark or 0x4000; }}
                    chain KUBE-SERVICES {{ tcp dport 53 jump KUBE-MARK-MASQ; }}
                    map mine {{ type inet_service : verdict; elements = {{ 8099 : jump KUBE-MARK-MASQ }}; }}
                    chain PREROUTING {{
                        type nat hook prerouting priority -100;
                        tcp dport vmap @mine;
                        jump KUBE-SERVICES;
                    }}
                }}"
            )],
        )?;
    }
    let output = namespace.output(&assets::weir()?.display().to_string(), &["cleanup", "--kube-proxy"])?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success() && told.contains("chains=2"), "{told}");
    ensure!(told.contains("KUBE-MARK-MASQ in ip6 nat: a map of another program leads to it"), "{told}");
    for family in ["ip", "ip6"] {
        let left = namespace.stdout("nft", &["list", "table", family, "nat"])?;
        for needed in ["8099 : jump KUBE-MARK-MASQ", "chain KUBE-MARK-MASQ", "0x00004000", "vmap @mine"] {
            ensure!(left.contains(needed), "{needed} is gone from\n{left}");
        }
        ensure!(!left.contains("KUBE-SERVICES"), "{left}");
    }
    Ok(())
}

/// Others' chains with names that look alike stay, and so do others' rules that lead to kube-proxy's chains, in both
/// variants of iptables. The device of the ipvs mode goes.
#[test]
fn cleanup_removes_only_kube_proxys_rules() -> Result<()> {
    let namespace = Namespace::new("leftovers")?;
    let rules = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-TCOU7JCQXEZGVUNU - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n\
                 :MINE - [0:0]\n[7:420] -A PREROUTING -p tcp -j MINE\n\
                 -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                 -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                 -A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m udp --dport 53 -j KUBE-SVC-TCOU7JCQXEZGVUNU\n\
                 -A KUBE-SVC-TCOU7JCQXEZGVUNU -m statistic --mode random --probability 0.5 -j RETURN\n\
                 [5:300] -A MINE -p udp\n-A MINE -j KUBE-SERVICES\n[6:360] -A MINE -j RETURN\nCOMMIT\n\
                 *filter\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\nCOMMIT\n";
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("rules");
    fs::write(&file, rules)?;
    let variants = ["iptables-nft", "iptables-legacy", "ip6tables-legacy"];
    for variant in variants {
        if variant.starts_with("ip6") {
            fs::write(&file, rules.replace("10.96.0.10/32", "fd00::10/128"))?;
        }
        namespace.stdout(&format!("{variant}-restore"), &["--counters", &file.display().to_string()])?;
    }
    namespace
        .stdout("nft", &["add table ip6 kube-proxy; add table ip mine; add chain ip mine KUBE-SERVICES"])?;
    namespace.ip(&["link add kube-ipvs0 type veth peer name other0".to_owned()])?;
    let weir = assets::weir()?.display().to_string();

    let output = namespace.output(&weir, &["cleanup", "--kube-proxy"])?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success() && told.contains("tables=1 chains=3"), "{told}");
    ensure!(told.contains("devices=1"), "{told}");
    for variant in variants {
        let left = namespace.stdout(&format!("{variant}-save"), &["--counters"])?;
        let is_rule = |line: &&str| line.contains("-A ") || line.contains(" - [");
        let mut left: Vec<&str> = left.lines().filter(is_rule).collect();
        let mut expected = [
            ":KUBE-FIREWALL - [0:0]",
            "[0:0] -A INPUT -j KUBE-FIREWALL",
            ":KUBE-KUBELET-CANARY - [0:0]",
            // Empty, for the rule that leads there.
            ":KUBE-SERVICES - [0:0]",
            ":MINE - [0:0]",
            "[0:0] -A MINE -j KUBE-SERVICES",
            "[7:420] -A PREROUTING -p tcp -j MINE",
            "[5:300] -A MINE -p udp",
            "[6:360] -A MINE -j RETURN",
        ];
        left.sort_unstable();
        expected.sort_unstable();
        assert_eq!(left, expected, "{variant}");
    }
    assert!(namespace.stdout("nft", &["list", "tables"])?.contains("table ip mine"));
    let output = namespace.output(&weir, &["cleanup", "--kube-proxy"])?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success() && !told.contains("removed"), "{told}");
    ensure!(told.contains("KUBE-SERVICES in ip nat: rules of other programs lead to it, in MINE"), "{told}");
    Ok(())
}
