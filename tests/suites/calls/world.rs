//! Where sequences are played: a node with a pod, everything else behind it, and the data planes of one agent.
//!
//! ```text
//! pod ── node (the planes) ── beyond: backends, a server that is no Service's, and the Services' addresses themselves
//! ```
//!
//! In: Services as they are to be. Out: a node that serves them, once [`World::tell`] returns: flows that are stale are gone
//! then, and sockets of backends that are gone are closed. A world lives for many sequences, on one CPU, so that what one
//! thread has sent is there before what it sends next.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::symlink,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU16, Ordering::Relaxed},
        mpsc,
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;
use weir::{
    dataplane::{
        Dataplane, Stack,
        ebpf::{Ebpf, Place},
        nftables::Nftables,
    },
    machine::probe::Probe,
    model::{Change, DetectLocal, Family, Kind, NodePortSetting, Object, ObjectName, PerFamily, Settings},
    plan::Delta,
    stale::{flows, sockets},
};
use weir_tests::{agent::Agent, bpffs::BpfFs, cgroup::Cgroup, netns::Namespace};

use super::{
    sequence::{BACKENDS, SERVICES, Side, To, Wire},
    servers::{Reached, Server, Servers},
};

/// Services have one of so many addresses: no two sequences in a row use the same ones.
const ADDRESSES: u16 = 8 * SERVICES as u16;
const SERVICE_PORT: u16 = 80;
const BACKEND_PORT: u16 = 8080;

/// How the node serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plane {
    Packets,
    /// eBPF at sockets, and nftables behind it.
    Sockets,
}

/// The family of what is sent.
pub(super) const fn family(wire: Wire) -> Family {
    match wire {
        Wire::V6 => Family::V6,
        Wire::V4 | Wire::Mapped => Family::V4,
    }
}

fn address(family: Family, network: u8, host: u16) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 244, network, host as u8).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x244, network.into(), 0, 0, 0, host).into(),
    }
}

fn service_address(family: Family, slot: u16) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, 0, 10 + slot as u8).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10 + slot).into(),
    }
}

/// The address of the client.
pub(super) fn own_address(side: Side, family: Family) -> IpAddr {
    match side {
        Side::Pod => address(family, 1, 10),
        Side::Host => address(family, 0, 1),
    }
}

fn server_address(family: Family, server: Server) -> SocketAddr {
    match server {
        Server::Backend(number) => SocketAddr::new(address(family, 2, 10 + u16::from(number)), BACKEND_PORT),
        Server::Elsewhere | Server::Untranslated => SocketAddr::new(address(family, 3, 10), BACKEND_PORT),
    }
}

/// A thread in a namespace that runs what it is given.
struct Worker(mpsc::Sender<Box<dyn FnOnce() + Send>>);

impl Worker {
    fn start(place: &Namespace, cpu: impl FnOnce() + Send + 'static) -> Result<Self> {
        let (jobs, todo) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        place.thread(move || {
            cpu();
            todo.into_iter().for_each(|job| job());
        })?;
        Ok(Self(jobs))
    }

    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (answer, done) = mpsc::channel();
        let sent = self.0.send(Box::new(move || drop(answer.send(work()))));
        ensure!(sent.is_ok(), "a thread of the world is gone");
        done.recv().context("a thread of the world died")
    }
}

/// The function that brings changes into force.
type Tell = Box<dyn FnMut(Vec<Change>) -> Result<()> + Send>;

/// A node and what is around it.
pub(super) struct World {
    pub(super) plane: Plane,
    pub(super) reached: Reached,
    tell: Arc<Mutex<Tell>>,
    node: Worker,
    clients: [Worker; 2],
    /// How many sequences were begun.
    begun: AtomicU16,
    /// Last, in this order: what serves, what it is in, and what that is in.
    _servers: Servers,
    _names: TempDir,
    _spaces: [Namespace; 3],
    _files: BpfFs,
    _cgroup: Cgroup,
}

impl World {
    /// Makes a world on one of the machine's CPUs.
    pub(super) fn new(plane: Plane, number: usize) -> Result<Self> {
        let cpu = move || pin(number);
        let cgroup = Cgroup::new("calls")?;
        let files = BpfFs::new()?;
        let spaces = ["node", "pod", "beyond"].map(|label| Namespace::within(&cgroup, label));
        let [node, pod, beyond] = spaces;
        let (node, pod, beyond) = (node?, pod?, beyond?);
        wire(&node, &pod, &beyond)?;
        let (servers, reached) = Servers::start(&beyond, &addresses(), cpu)?;
        let names = TempDir::new()?;
        for space in [&node, &pod] {
            symlink(space.path(), names.path().join(space.label()))?;
        }
        let place = Place { bpf_root: files.directory("weir")?, cgroup_root: cgroup.path().to_owned() };
        let named = names.path().to_owned();
        let worker = Worker::start(&node, cpu)?;
        let mut tell = worker.run(move || open(plane, place, &named))??;
        tell = worker.run(move || (tell(Vec::new()), tell)).and_then(|(told, tell)| told.map(|()| tell))?;
        Ok(Self {
            plane,
            reached,
            tell: Arc::new(Mutex::new(tell)),
            node: worker,
            clients: [Worker::start(&pod, cpu)?, Worker::start(&node, cpu)?],
            begun: AtomicU16::new(0),
            _servers: servers,
            _names: names,
            _spaces: [node, pod, beyond],
            _files: files,
            _cgroup: cgroup,
        })
    }

    /// Brings changes into force.
    pub(super) fn tell(&self, changes: Vec<Change>) -> Result<()> {
        let tell = Arc::clone(&self.tell);
        self.node.run(move || (tell.lock().unwrap_or_else(PoisonError::into_inner))(changes))?
    }

    /// Runs something where the client is.
    pub(super) fn at<T: Send + 'static>(
        &self,
        side: Side,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        self.clients[usize::from(side == Side::Host)].run(work)
    }

    /// Where everything is for another sequence.
    pub(super) fn begin(&self, side: Side, wire: Wire) -> Ground {
        let family = family(wire);
        Ground { wire, family, own: own_address(side, family), number: self.begun.fetch_add(1, Relaxed) }
    }
}

/// The addresses of a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ground {
    wire: Wire,
    family: Family,
    own: IpAddr,
    number: u16,
}

impl Ground {
    /// The address that a socket is given for this.
    pub(super) fn at(&self, to: To) -> SocketAddr {
        self.written(match to {
            To::Service(number) => SocketAddr::new(self.service(number), SERVICE_PORT),
            To::NodePort(number) => {
                SocketAddr::new(own_address(Side::Host, self.family), self.node_port(number))
            }
            To::Backend(number) => server_address(self.family, Server::Backend(number)),
            To::Elsewhere => server_address(self.family, Server::Elsewhere),
        })
    }

    /// The client's own address, with a port.
    pub(super) fn own(&self, port: u16) -> SocketAddr {
        self.written(SocketAddr::new(self.own, port))
    }

    /// No address in particular, with a port.
    pub(super) fn any(&self, port: u16) -> SocketAddr {
        match self.wire {
            Wire::V4 => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port),
            Wire::V6 | Wire::Mapped => SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port),
        }
    }

    /// The port that sockets of this sequence may share, which those of none before had for long.
    pub(super) const fn shared_port(&self) -> u16 {
        10_000 + self.number % 20_000
    }

    const fn slot(&self, number: usize) -> u16 {
        (self.number.wrapping_mul(SERVICES as u16) + number as u16) % ADDRESSES
    }

    fn service(&self, number: usize) -> IpAddr {
        service_address(self.family, self.slot(number))
    }

    const fn node_port(&self, number: usize) -> u16 {
        30_000 + self.slot(number)
    }

    fn written(&self, address: SocketAddr) -> SocketAddr {
        match address.ip() {
            IpAddr::V4(ip) if self.wire == Wire::Mapped => {
                SocketAddr::new(ip.to_ipv6_mapped().into(), address.port())
            }
            _ => address,
        }
    }

    /// A Service comes, or is as it was.
    pub(super) fn service_is(&self, number: usize, sticky: bool) -> Change {
        let ip = self.service(number).to_string();
        let ports = ["TCP", "UDP"].map(|protocol| {
            json!({ "name": protocol.to_lowercase(), "protocol": protocol, "port": SERVICE_PORT,
                    "nodePort": self.node_port(number) })
        });
        Change::Apply(Object::Service(object(json!({
            "metadata": { "namespace": "calls", "name": self.name(number) },
            "spec": {
                "type": "NodePort",
                "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": [self.family_name()], "ports": ports,
                "sessionAffinity": if sticky { "ClientIP" } else { "None" },
            },
        }))))
    }

    /// A Service has these endpoints; those that drain terminate and still serve.
    pub(super) fn endpoints_are(&self, number: usize, ready: &[u8], drain: &[u8]) -> Change {
        let endpoint = |number: &u8, ready: bool| {
            let address = server_address(self.family, Server::Backend(*number)).ip();
            json!({ "addresses": [address.to_string()], "nodeName": "elsewhere",
                    "conditions": { "ready": ready, "serving": true, "terminating": !ready } })
        };
        let ready = ready.iter().map(|number| endpoint(number, true));
        let endpoints = ready.chain(drain.iter().map(|number| endpoint(number, false)));
        let ports = ["TCP", "UDP"].map(
            |protocol| json!({ "name": protocol.to_lowercase(), "protocol": protocol, "port": BACKEND_PORT }),
        );
        Change::Apply(Object::EndpointSlice(object(json!({
            "metadata": { "namespace": "calls", "name": self.name(number),
                          "labels": { "kubernetes.io/service-name": self.name(number) } },
            "addressType": self.family_name(), "ports": ports,
            "endpoints": endpoints.collect::<Vec<_>>(),
        }))))
    }

    /// A Service goes; its endpoints stay.
    pub(super) fn service_goes(&self, number: usize) -> Change {
        Change::Delete(Kind::Service, ObjectName::new("calls", &self.name(number)))
    }

    /// Deletes all objects of the sequence before.
    pub(super) fn clear(&self) -> impl Iterator<Item = Change> {
        let before = Self { number: self.number.wrapping_sub(1), ..*self };
        (0..SERVICES).flat_map(move |number| {
            let name = ObjectName::new("calls", &before.name(number));
            [Kind::Service, Kind::EndpointSlice].map(|kind| Change::Delete(kind, name.clone()))
        })
    }

    /// No two sequences in a row have the same.
    fn name(&self, service: usize) -> String {
        format!("service-{}-{service}", self.number % ADDRESSES)
    }

    const fn family_name(&self) -> &'static str {
        match self.family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }
}

fn object<T: DeserializeOwned>(value: Value) -> Box<T> {
    Box::new(serde_json::from_value(value).expect("the world wrote an object that is none"))
}

/// Pins the thread, because sockets on one CPU send and receive in order.
fn pin(number: usize) {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    // Where this is not possible the machine is another one than it seems, and order may be another at times.
    let _ = set.set(number % cpus).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
}

fn addresses() -> Vec<(Server, SocketAddr)> {
    let mut all = Vec::new();
    for family in Family::ALL {
        let servers = (0..BACKENDS).map(Server::Backend).chain([Server::Elsewhere]);
        all.extend(servers.map(|server| (server, server_address(family, server))));
        let untranslated = |slot| SocketAddr::new(service_address(family, slot), SERVICE_PORT);
        all.extend((0..ADDRESSES).map(|slot| (Server::Untranslated, untranslated(slot))));
    }
    all
}

fn wire(node: &Namespace, pod: &Namespace, beyond: &Namespace) -> Result<()> {
    let mut on_node = vec![
        format!("link add pod type veth peer name eth0 netns {}", pod.path()),
        format!("link add eth0 type veth peer name eth0 netns {}", beyond.path()),
        "link set pod up".to_owned(),
        "link set eth0 up".to_owned(),
    ];
    let (mut in_pod, mut in_beyond) =
        (vec!["link set eth0 up".to_owned()], vec!["link set eth0 up".to_owned()]);
    for (family, single, link) in [(Family::V4, 32, 24), (Family::V6, 128, 64)] {
        let nodad = if family == Family::V6 { "nodad" } else { "" };
        let own = own_address(Side::Host, family);
        let (gateway, client) = (address(family, 1, 1), own_address(Side::Pod, family));
        let peer = address(family, 0, 2);
        on_node.push(format!("addr add {own}/{link} dev eth0 {nodad}"));
        on_node.push(format!("addr add {gateway}/{single} dev pod {nodad}"));
        on_node.push(format!("route add {client}/{single} dev pod"));
        on_node.push(format!("route add default via {peer}"));
        in_pod.push(format!("addr add {client}/{single} dev eth0 {nodad}"));
        in_pod.push(format!("route add {gateway}/{single} dev eth0"));
        in_pod.push(format!("route add default via {gateway}"));
        in_beyond.push(format!("addr add {peer}/{link} dev eth0 {nodad}"));
        in_beyond.push(format!("route add default via {own}"));
        for (server, at) in addresses().into_iter().filter(|(_, at)| Family::of(at.ip()) == family) {
            let _ = server;
            in_beyond.push(format!("addr add {}/{single} dev lo {nodad}", at.ip()));
        }
    }
    node.ip(&on_node)?;
    pod.ip(&in_pod)?;
    beyond.ip(&in_beyond)
}

/// Opens the planes in the calling thread's namespace.
fn open(plane: Plane, place: Place, names: &std::path::Path) -> Result<Tell> {
    let networks = ["10.244.0.0/16", "fd00:10:244::/48"].map(str::parse);
    let networks = networks.into_iter().collect::<Result<_, _>>()?;
    let settings = Settings {
        node_name: "node".to_owned(),
        detect_local: DetectLocal::ClusterCidr(networks),
        node_port_addresses: NodePortSetting::ALL,
        ..Settings::default()
    };
    let own =
        Family::ALL.into_iter().flat_map(|family| [own_address(Side::Host, family), address(family, 1, 1)]);
    let own: Vec<IpAddr> = own.collect();
    let packets = Nftables::open(PerFamily { v4: true, v6: true }).context("these tests need root")?;
    let mut tracking = flows::Conntrack::open()?;
    tracking.load()?;
    if plane == Plane::Packets {
        let mut agent = Agent::new(settings, packets);
        agent.model().set_host_addresses(own);
        return Ok(Box::new(move |changes| bring(&mut agent, &mut tracking, changes).map(drop)));
    }
    let probe = Probe::of(&place.cgroup_root, &place.bpf_root);
    ensure!(probe.namespace_cookie, "this kernel lacks SO_NETNS_COOKIE (Linux 5.14), which this test needs");
    ensure!(probe.set_retval, "this kernel lacks bpf_set_retval (Linux 6.1), which this test needs");
    let sockets = Ebpf::open(place.clone(), probe.set_retval)?;
    let mut agent = Agent::new(settings, Stack::new(packets, sockets).serving_as("ebpf"));
    agent.model().set_host_addresses(own);
    let mut closing = sockets::Sockets::open(&place.sockets(), &place.services(), &[names])?;
    Ok(Box::new(move |changes| {
        let delta = bring(&mut agent, &mut tracking, changes)?;
        for standing in agent.plane().standing() {
            ensure!(standing.failures == 0, "the plane {} failed", standing.plane);
        }
        closing.take_in(sockets::Suspects::of(&delta));
        closing.sweep();
        Ok(())
    }))
}

/// Brings changes into force, and ends flows that are stale by them.
fn bring<D: Dataplane>(
    agent: &mut Agent<D>,
    tracking: &mut flows::Conntrack,
    changes: Vec<Change>,
) -> Result<Delta> {
    changes.into_iter().for_each(|change| agent.take_in(change));
    let delta = agent
        .bring_into_force()
        .map_err(|error| anyhow!("{error}: {:?}", std::error::Error::source(&error)))?;
    let suspects = flows::Suspects::of(&delta.ports);
    let suspects = suspects.on(agent.planner().node(), |frontend| agent.planner().has_frontend(frontend));
    if !suspects.is_empty() {
        tracking.clean(&suspects)?;
    }
    Ok(delta)
}

/// How long anything may take that must come.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
