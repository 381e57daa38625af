//! The subject of the tests: weir, or the real kube-proxy, on both nodes of a topology.
//!
//! In: objects and settings. Out: nodes programmed by them; [`Subject::publish`] returns once both nodes show it.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use weir::model::{Family, Object};

use crate::{
    assets,
    bpffs::unpin_all,
    control_plane::ControlPlane,
    node::{Location, Topology, node_address, node_name},
    objects::{
        self, Addresses, Endpoint, PORT, Shape, Slice, TARGET, node, pod, service, service_cidr, slice,
    },
    process::{Process, tail},
    traffic::{Call, Outcome, PATIENCE, Transport, ask},
};

mod settings;
mod store;

pub use settings::{Detector, Settings};
use store::Store;

/// How long a change may take to show on both nodes, on a busy machine.
const SETTLE: Duration = Duration::from_secs(30);
/// The Service that shows how far the agents have come.
const MARKER: Addresses = Addresses::new(250).named("marker");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// weir with one of its data planes, fed from a directory of manifests unless made by [`Subject::of_cluster`].
    Weir(Plane),
    /// kube-proxy v1.36.3 in nftables mode, fed by a real API server: the oracle.
    KubeProxy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Plane {
    /// Everything by packets.
    Nftables,
    /// TCP and UDP of this node at the socket, the rest as in [`Plane::Nftables`].
    Ebpf,
}

impl Plane {
    pub const ALL: [Self; 2] = [Self::Nftables, Self::Ebpf];
}

impl Kind {
    /// The name of the nftables tables it makes.
    #[must_use]
    pub fn table(self) -> &'static str {
        match self {
            Self::Weir(_) => "weir",
            Self::KubeProxy => "kube-proxy",
        }
    }

    /// The name of its data plane in configurations.
    #[must_use]
    pub fn mode(self) -> &'static str {
        match self {
            Self::Weir(Plane::Ebpf) => "ebpf",
            Self::Weir(Plane::Nftables) | Self::KubeProxy => "nftables",
        }
    }

    fn program(self) -> Result<PathBuf> {
        match self {
            Self::Weir(_) => assets::weir(),
            Self::KubeProxy => assets::kubernetes("kube-proxy"),
        }
    }
}

/// A service proxy on both nodes. Dropping it stops it.
pub struct Subject<'a> {
    kind: Kind,
    topology: &'a Topology,
    directory: tempfile::TempDir,
    arguments: Vec<String>,
    state: Mutex<State<'a>>,
    /// How many of [`State::puts`] the running agents have shown.
    settled: Mutex<u64>,
}

struct State<'a> {
    store: Store<'a>,
    settings: Settings,
    agents: [Option<Process>; 2],
    /// The objects that were last published under each name.
    published: BTreeMap<String, Vec<Object>>,
    markers: u16,
    /// The number of publications.
    puts: u64,
}

impl<'a> Subject<'a> {
    /// Prepares a subject, with both Node objects and the ServiceCIDR published; no agent runs yet.
    ///
    /// # Errors
    ///
    /// When a program is missing, or the control plane does not come up.
    pub fn new(kind: Kind, topology: &'a Topology) -> Result<Self> {
        if kind == Kind::KubeProxy {
            return Self::of_cluster(kind, topology);
        }
        let directory = tempfile::Builder::new().prefix("weir-subject-").tempdir()?;
        let store = Store::manifests(directory.path().join("manifests"))?;
        Self::fed(kind, topology, directory, store)
    }

    /// [`Subject::new`] with either kind fed by a real API server, on the router.
    ///
    /// # Errors
    ///
    /// When a program is missing, or the control plane does not come up.
    pub fn of_cluster(kind: Kind, topology: &'a Topology) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-subject-").tempdir()?;
        let address = Location::Router.client_address(Family::V4);
        let store = Store::Cluster(Box::new(ControlPlane::start(&topology.router, address)?));
        Self::fed(kind, topology, directory, store)
    }

    fn fed(
        kind: Kind,
        topology: &'a Topology,
        directory: tempfile::TempDir,
        store: Store<'a>,
    ) -> Result<Self> {
        kind.program()?;
        store.put("cluster", &[], &[service_cidr(), node(1), node(2)])?;
        let state = State {
            store,
            settings: Settings::default(),
            agents: [None, None],
            published: BTreeMap::new(),
            markers: 0,
            puts: 0,
        };
        Ok(Self {
            kind,
            topology,
            directory,
            arguments: Vec::new(),
            state: Mutex::new(state),
            settled: Mutex::new(0),
        })
    }

    /// Starts agents with these arguments besides.
    #[must_use]
    pub fn with_arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        self
    }

    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The directory of manifests, where that is what the agents read.
    #[must_use]
    pub fn manifests(&self) -> Option<PathBuf> {
        self.state().store.directory()
    }

    /// Starts the agents on both nodes with these settings, and waits until they have programmed everything published.
    ///
    /// # Errors
    ///
    /// When an agent does not come up; the message ends with what it logged last.
    pub fn start(&self, settings: &Settings) -> Result<()> {
        self.state().settings = settings.clone();
        for node in [1, 2] {
            self.start_agent(node)?;
        }
        self.settle()?;
        if self.kind == Kind::Weir(Plane::Ebpf) {
            [1, 2].into_iter().try_for_each(|node| self.leads_sockets(node))?;
        }
        if self.kind == Kind::KubeProxy {
            self.await_service_cidrs()?;
        }
        Ok(())
    }

    /// An agent that cannot lead sockets serves by packets instead: a test would then show the other plane.
    fn leads_sockets(&self, node: u8) -> Result<()> {
        let root = self.topology.bpf_root(node)?;
        let pinned: Vec<_> =
            std::fs::read_dir(root)?.flatten().map(|entry| entry.file_name().into_string()).collect();
        let led = pinned.iter().flatten().any(|name| name.starts_with("link-"));
        if !led {
            let log = tail(&self.log(node));
            bail!("node {node} has no programs attached, only {pinned:?}; its agent logged:\n{log}");
        }
        Ok(())
    }

    /// kube-proxy may write its first rules before it has the ServiceCIDRs, and then does without them (F5) until the
    /// next full sync. A change of the node's zone makes it sync fully at once (E11).
    fn await_service_cidrs(&self) -> Result<()> {
        let deadline = Instant::now() + SETTLE;
        for (node, family) in [1, 2].into_iter().flat_map(|node| Family::ALL.map(|family| (node, family))) {
            let from = Location::Host(node);
            let call =
                Call::new(from, SocketAddr::new(MARKER.unused_cluster_ip(family), PORT), Transport::Udp);
            loop {
                match self.topology.at(from).run(|| ask(&call)) {
                    Outcome::Denied => break,
                    other if Instant::now() > deadline => bail!("node {node} lets {} pass: {other}", call.to),
                    _ => {}
                }
                for moved in [objects::node_in(node, "elsewhere"), objects::node(node)] {
                    self.state().store.put("cluster", &[], &[moved])?;
                }
                self.settle()?;
            }
        }
        Ok(())
    }

    /// Starts the agent of one node with the settings of [`Subject::start`], without waiting for it.
    ///
    /// # Errors
    ///
    /// When its program cannot be started.
    pub fn start_agent(&self, node: u8) -> Result<()> {
        let mut state = self.state();
        let kubeconfig = state.store.kubeconfig()?;
        let config = self.directory.path().join(format!("config-{node}.yaml"));
        std::fs::write(&config, state.settings.configuration(self.kind, kubeconfig.as_deref()))?;
        let mut args = match self.kind {
            Kind::Weir(_) => vec![
                "run".to_owned(),
                format!("--proxy-mode={}", self.kind.mode()),
                format!("--cgroup-root={}", self.topology.cgroup_root(node).display()),
                format!("--bpf-root={}", self.topology.bpf_root(node)?.display()),
            ],
            Kind::KubeProxy => vec!["--v=2".to_owned()],
        };
        args.push(format!("--config={}", config.display()));
        args.push(format!("--hostname-override={}", node_name(node)));
        args.extend(self.arguments.iter().cloned());
        if let Some(directory) = state.store.directory() {
            args.push(format!("--source=manifests:{}", directory.display()));
        }
        let host = self.topology.at(Location::Host(node));
        let agent = host.launch(&self.kind.program()?, &self.log(node), |command| {
            command.args(args);
        })?;
        state.agents[usize::from(node) - 1] = Some(agent);
        Ok(())
    }

    /// Kills the agent of one node with SIGKILL. Its rules and maps stay.
    ///
    /// # Errors
    ///
    /// When it does not run, or had died before.
    pub fn kill_agent(&self, node: u8) -> Result<()> {
        let agent = self.state().agents[usize::from(node) - 1].take();
        let mut agent = agent.with_context(|| format!("no agent runs on node {node}"))?;
        agent.check().with_context(|| format!("the agent of node {node} died before it was killed"))
    }

    /// Kills the API server as a power failure would; its data stays. Until it is back, nothing can be published.
    ///
    /// # Errors
    ///
    /// When the agents are fed by none.
    pub fn stop_api_server(&self) -> Result<()> {
        self.state().store.cluster()?.stop();
        Ok(())
    }

    /// Starts the API server again, with its data, and waits until it serves.
    ///
    /// # Errors
    ///
    /// When the agents are fed by none, or it does not start.
    pub fn restart_api_server(&self) -> Result<()> {
        self.state().store.cluster()?.restart()
    }

    /// Kills the agents of both nodes and takes out what they programmed.
    ///
    /// # Errors
    ///
    /// When an agent had died before, or the nodes' rules cannot be removed.
    pub fn stop(&self) -> Result<()> {
        for node in [1, 2] {
            self.kill_agent(node)?;
            self.topology.at(Location::Host(node)).stdout("nft", &["flush", "ruleset"])?;
            unpin_all(&self.topology.bpf_root(node)?)?;
        }
        Ok(())
    }

    /// The log of a node's agent.
    #[must_use]
    pub fn log(&self, node: u8) -> PathBuf {
        self.directory.path().join(format!("agent-{node}.log"))
    }

    /// Makes `objects` all that is published under `name`, and waits until both nodes show it. Deletes the
    /// other objects that were published under that name before.
    ///
    /// # Errors
    ///
    /// When an object is refused, or an agent does not get that far.
    pub fn publish(&self, name: &str, objects: Vec<Object>) -> Result<()> {
        self.publish_all([(name.to_owned(), objects)])
    }

    /// [`Subject::publish`] for many names with one wait.
    ///
    /// # Errors
    ///
    /// As for one.
    pub fn publish_all(&self, all: impl IntoIterator<Item = (String, Vec<Object>)>) -> Result<()> {
        let mut state = self.state();
        for (name, objects) in all {
            let old = state.published.remove(&name).unwrap_or_default();
            state.store.put(&name, &old, &objects)?;
            state.published.insert(name, objects);
        }
        state.puts += 1;
        let put = state.puts;
        drop(state);
        self.settle_through(put)
    }

    /// Waits until the agents have programmed everything published so far.
    ///
    /// # Errors
    ///
    /// When that does not come to pass; the message ends with what the agent logged last.
    pub fn settle(&self) -> Result<()> {
        let mut state = self.state();
        state.puts += 1;
        let put = state.puts;
        drop(state);
        self.settle_through(put)
    }

    /// Publishes a change of a Service and of its slice, and waits for both to show: sources keep the order of
    /// changes of one kind, so all earlier ones show too. Several waiting callers share one such change.
    fn settle_through(&self, put: u64) -> Result<()> {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        if *settled >= put {
            return Ok(());
        }
        let state = self.state();
        let through = state.puts;
        let running: Vec<u8> =
            [1, 2].into_iter().filter(|node| state.agents[usize::from(*node) - 1].is_some()).collect();
        if running.is_empty() {
            return Ok(());
        }
        // Within one change a plane of several parts may show the marker before the rest.
        let parts = self.marked().len();
        let markers = state.store.markers_needed().max(parts);
        drop(state);
        for _ in 0..markers {
            self.show_marker(&running)?;
        }
        *settled = through;
        Ok(())
    }

    fn show_marker(&self, nodes: &[u8]) -> Result<()> {
        let mut state = self.state();
        state.markers += 1;
        let port = 20_000 + state.markers;
        let target = TARGET + state.markers % 2;
        state.store.put("marker", &[], &marker(port, target).objects(MARKER))?;
        drop(state);
        nodes.iter().try_for_each(|node| self.await_marker(*node, port, target))
    }

    /// By which transports the marker shows everything: sockets lead TCP where they lead anything, packets the rest.
    fn marked(&self) -> &'static [Transport] {
        match self.kind {
            Kind::Weir(Plane::Ebpf) => &[Transport::Tcp, Transport::Sctp],
            Kind::Weir(Plane::Nftables) | Kind::KubeProxy => &[Transport::Tcp],
        }
    }

    fn await_marker(&self, node: u8, port: u16, target: u16) -> Result<()> {
        let expected = format!("{}:{target}", Location::Pod(1, 1));
        let deadline = Instant::now() + SETTLE;
        let ways =
            Family::ALL.into_iter().flat_map(|family| self.marked().iter().map(move |way| (family, *way)));
        for (family, transport) in ways {
            let call = Call {
                from: node_address(family, node),
                to: SocketAddr::new(MARKER.cluster_ip(family), port),
                transport,
                patience: PATIENCE,
            };
            loop {
                let shown = |outcome: &Outcome| matches!(outcome, Outcome::Answer(answer) if answer.backend == expected);
                let outcomes =
                    self.topology.at(Location::Host(node)).run(|| [ask(&call), ask(&call), ask(&call)]);
                let Some(outcome) = outcomes.into_iter().find(|outcome| !shown(outcome)) else { break };
                self.still_runs(node)?;
                if Instant::now() > deadline {
                    let log = tail(&self.log(node));
                    bail!(
                        "node {node} does not show the latest change over {family} by {transport}: {outcome}; its agent \
                         logged:\n{log}"
                    );
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    fn still_runs(&self, node: u8) -> Result<()> {
        match &mut self.state().agents[usize::from(node) - 1] {
            Some(agent) => agent.check().with_context(|| format!("the agent of node {node} died")),
            None => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A Service whose port and backend show how far an agent has come. The decoys answer too while the agent does not have its
/// node's zone, which kube-proxy gets some time after its start (E11).
fn marker(port: u16, target: u16) -> Shape {
    let serving = |port, endpoints: Vec<Endpoint>| Slice {
        ports: vec![("marker", Transport::Tcp, port), ("packets", Transport::Sctp, port)],
        ..slice(endpoints)
    };
    let decoys =
        || [(1, 1), (1, 2), (2, 1), (2, 2)].map(|(node, number)| pod(node, number).zones(&["elsewhere"]));
    service([]).ports(&[("marker", Transport::Tcp, port), ("packets", Transport::Sctp, port)]).slices([
        serving(target, vec![pod(1, 1).zones(&["zone-a", "zone-b"])]),
        serving(8082, decoys().to_vec()),
        serving(9999, decoys().to_vec()),
    ])
}

impl Drop for Subject<'_> {
    fn drop(&mut self) {
        // Before the API server, which they would miss.
        self.state().agents = [None, None];
    }
}
