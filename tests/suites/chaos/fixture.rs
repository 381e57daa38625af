//! The node: Services, endpoints, clients under load, and the agent with a `/run`, a clock and a memory limit of its own.
//!
//! In: a data plane. Out: a [`Fixture`] that acts are done to. Everything is gone when it is dropped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use weir::model::Family;
use weir_tests::{
    assets,
    node::{CLUSTER_CIDRS, Location, Topology, node_address, node_name},
    process::{Process, end, tail},
    subject::{Kind, Plane},
    traffic::{Call, Load, Transport},
    wait::await_that,
};

use super::{
    clock::Clock,
    cluster::{self, BALANCERS, ENDPOINTS, EXTERNAL, Expected, IN_FILE, Probe, SERVICES, Service, marker},
    memory::MemoryLimit,
    servers,
};

/// The addresses of the DNS Service that agents stand in front of.
pub(crate) const DNS: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];

/// The node and what is on it.
pub(crate) struct Fixture {
    agent: Option<Process>,
    /// Another agent that was started beside it.
    other: Option<Process>,
    /// The agents are in the mount namespace of this process.
    mounts: Child,
    loads: Vec<(Service, Family, Load)>,
    pub(crate) plane: Plane,
    pub(crate) clock: Clock,
    pub(crate) memory: MemoryLimit,
    /// How long everything may take to be right after an act.
    pub(crate) deadline: Duration,
    /// The time until which the agent may end by itself, and is started again.
    pub(crate) may_end_until: Instant,
    /// More probes that must succeed while an act lasts.
    pub(crate) extra: Vec<Probe>,
    /// The file of Services that an act has broken.
    pub(crate) broken: Option<u16>,
    version: u16,
    directory: TempDir,
    /// Last: nothing is left in its groups when they go.
    pub(crate) topology: Topology,
}

impl Fixture {
    /// Makes the node and starts the agent, without waiting for it.
    pub(crate) fn new(plane: Plane) -> Result<Self> {
        let topology = Topology::new()?;
        let directory = tempfile::Builder::new().prefix("weir-chaos-").tempdir()?;
        fs::create_dir(directory.path().join("manifests"))?;
        wire(&topology)?;
        for location in [cluster::HERE, cluster::ELSEWHERE] {
            servers::start(topology.at(location))?;
        }
        let mut fixture = Self {
            agent: None,
            other: None,
            mounts: own_run(&topology)?,
            loads: Vec::new(),
            plane,
            clock: Clock::build(directory.path())?,
            memory: MemoryLimit::new()?,
            deadline: Duration::ZERO,
            may_end_until: Instant::now(),
            extra: Vec::new(),
            broken: None,
            version: 0,
            directory,
            topology,
        };
        fixture.write("cluster", &cluster_objects())?;
        for file in 0..SERVICES / IN_FILE {
            fixture.write_services(file)?;
        }
        fixture.mark()?;
        fixture.start_agent()?;
        Ok(fixture)
    }

    pub(crate) fn manifests(&self) -> PathBuf {
        self.directory.path().join("manifests")
    }

    /// Makes these all objects of a file of manifests, whole.
    pub(crate) fn write(&self, name: &str, objects: &[Value]) -> Result<()> {
        let text: Vec<String> = objects.iter().map(Value::to_string).collect();
        self.write_bytes(name, text.join("\n").as_bytes())
    }

    /// The same with any content.
    pub(crate) fn write_bytes(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let draft = self.directory.path().join("draft");
        fs::write(&draft, bytes)?;
        Ok(fs::rename(draft, self.manifests().join(format!("{name}.json")))?)
    }

    /// Takes a file of manifests away.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.manifests().join(format!("{name}.json")))?)
    }

    /// The objects of one of the files that have the Services.
    pub(crate) fn services_of(file: u16) -> Vec<Value> {
        (file * IN_FILE..(file + 1) * IN_FILE).flat_map(|number| Service(number).objects()).collect()
    }

    /// Writes one of the files that have the Services.
    pub(crate) fn write_services(&self, file: u16) -> Result<()> {
        self.write(&format!("services-{file}"), &Self::services_of(file))
    }

    /// Gives the marker another endpoint, which the agent has to take in.
    pub(crate) fn mark(&mut self) -> Result<()> {
        self.version = self.version % 60_000 + 1;
        self.write("marker", &marker::objects(self.version))
    }

    /// The last one that [`Fixture::mark`] wrote.
    pub(crate) fn version(&self) -> u16 {
        self.version
    }

    /// Where the agent pins what it has.
    pub(crate) fn bpf_root(&self) -> Result<PathBuf> {
        self.topology.bpf_root(1)
    }

    /// The agent's `/run`, as it is seen from here.
    pub(crate) fn run_directory(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/run", self.mounts.id()))
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.directory.path().join("agent.log")
    }

    fn spawn(&self, arguments: &[String], log: &Path) -> Result<Process> {
        let weir = assets::weir()?;
        let agent = self.topology.at(Location::Host(1)).launch(Path::new("nsenter"), log, |command| {
            command.arg(format!("--mount=/proc/{}/ns/mnt", self.mounts.id())).arg("--");
            // As in containers: a soft limit that an agent has to raise for itself.
            command.args(["prlimit", "--nofile=1024:", "--"]);
            command.arg(&weir).args(arguments);
            self.clock.preload(command);
        })?;
        self.memory.hold(agent.id())?;
        Ok(agent)
    }

    fn arguments(&self) -> Result<Vec<String>> {
        let config = self.directory.path().join("config.json");
        fs::write(&config, configuration(self.plane))?;
        Ok(vec![
            "run".to_owned(),
            "--dns".to_owned(),
            "--dns-service=default/kube-dns".to_owned(),
            format!("--proxy-mode={}", Kind::Weir(self.plane).mode()),
            format!("--config={}", config.display()),
            format!("--hostname-override={}", node_name(1)),
            format!("--cgroup-root={}", self.topology.cgroup_root(1).display()),
            format!("--bpf-root={}", self.bpf_root()?.display()),
            format!("--source=manifests:{}", self.manifests().display()),
            "--manifest-status=/run/weir-manifests.json".to_owned(),
        ])
    }

    /// Starts the agent and waits for nothing.
    pub(crate) fn start_agent(&mut self) -> Result<()> {
        ensure!(self.agent.is_none(), "the agent runs already");
        self.agent = Some(self.spawn(&self.arguments()?, &self.log())?);
        Ok(())
    }

    /// Starts one more agent on the same node.
    pub(crate) fn start_other_agent(&mut self) -> Result<()> {
        self.other = Some(self.spawn(&self.arguments()?, &self.directory.path().join("other.log"))?);
        Ok(())
    }

    /// Kills one of two agents; the other one is the node's then.
    pub(crate) fn kill_one(&mut self, first: bool) -> Result<()> {
        if !first {
            std::mem::swap(&mut self.agent, &mut self.other);
        }
        self.agent = None;
        self.agent = self.other.take();
        ensure!(self.agent.is_some(), "there was no other agent");
        Ok(())
    }

    /// Kills the agent as the kernel does for want of memory. Its rules and maps stay.
    pub(crate) fn kill_agent(&mut self) -> Result<()> {
        if Instant::now() > self.may_end_until {
            self.alive()?;
        }
        self.agent = None;
        Ok(())
    }

    /// Starts the agent again if something has ended it, as a kubelet does. Whether it had ended.
    pub(crate) fn restart_if_dead(&mut self) -> Result<bool> {
        let dead = match &mut self.agent {
            Some(agent) => agent.status()?.is_some(),
            None => true,
        };
        if dead {
            self.agent = None;
            self.start_agent()?;
        }
        Ok(dead)
    }

    /// Fails when the agent has ended by itself.
    pub(crate) fn alive(&mut self) -> Result<()> {
        if let Some(agent) = &mut self.agent
            && let Some(status) = agent.status()?
        {
            bail!("the agent ended by itself: {status}");
        }
        Ok(())
    }

    /// The end of the agent's log.
    pub(crate) fn last_words(&self) -> String {
        tail(&self.log())
    }

    /// Keeps clients connecting to some Services until [`Fixture::end_load`].
    pub(crate) fn start_load(&mut self) -> Result<()> {
        for (number, family) in [(0, Family::V4), (1, Family::V6), (1002, Family::V4), (1003, Family::V6)] {
            let service = Service(number);
            for (from, transport) in [(cluster::CLIENT, Transport::Tcp), (Location::Host(1), Transport::Udp)]
            {
                let to = service.to_cluster_ip(family, from, false, transport).to;
                let call = Call { patience: Duration::from_millis(300), ..Call::new(from, to, transport) };
                let load = Load::start(self.topology.at(from), call, Duration::from_millis(20))?;
                self.loads.push((service, family, load));
            }
        }
        Ok(())
    }

    /// How many of the load's calls were answered, and how many were not. Fails when another Service answered one.
    pub(crate) fn end_load(&mut self) -> Result<(u64, u64)> {
        let (mut answered, mut failed) = (0, 0);
        for (service, family, load) in self.loads.drain(..) {
            let tally = load.stop()?;
            answered += tally.answered();
            failed += tally.failures.values().sum::<u64>();
            let own: Vec<String> = service.endpoints(family).iter().map(ToString::to_string).collect();
            if let Some(other) = tally.answers.keys().find(|backend| !own.contains(backend)) {
                bail!("{} was answered by {other}, an endpoint of another Service", service.name());
            }
        }
        Ok((answered, failed))
    }

    /// A DNS name of a Service, and the address that it must resolve to.
    pub(crate) fn name_of(service: Service) -> (String, std::net::IpAddr) {
        (format!("{}.default.svc.cluster.local.", service.name()), service.cluster_ip(Family::V4))
    }

    /// A probe of something that no Service has: a connection to it is refused.
    pub(crate) fn refused(from: Location, to: std::net::SocketAddr) -> Probe {
        Probe { from, by_packets: false, to, transport: Transport::Tcp, expected: Expected::Refused }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        (self.agent, self.other) = (None, None);
        end(&mut self.mounts);
        for (_, _, load) in self.loads.drain(..) {
            // Its threads are in the topology's groups.
            let _ = load.stop();
        }
    }
}

/// Leads the networks of endpoints to their pods, and what is outside to node 1.
fn wire(topology: &Topology) -> Result<()> {
    for family in Family::ALL {
        for (block, pod) in ENDPOINTS {
            let network = cluster::network(family, block);
            topology.at(pod).ip(&[format!("route add local {network} dev lo")])?;
            let here = pod == cluster::HERE;
            let (own, other) = if here { (1, 2) } else { (2, 1) };
            let to = pod.client_address(family);
            topology
                .at(Location::Host(own))
                .ip(&[format!("route add {network} via {to} dev pod1 onlink")])?;
            topology
                .at(Location::Host(other))
                .ip(&[format!("route add {network} via {}", node_address(family, own))])?;
        }
        for block in [BALANCERS, EXTERNAL] {
            let network = cluster::network(family, block);
            topology.outside.ip(&[format!("route add {network} via {}", node_address(family, 1))])?;
        }
    }
    Ok(())
}

/// A mount namespace with a small `/run` of its own, as a container has it.
fn own_run(topology: &Topology) -> Result<Child> {
    let script = "mount -t tmpfs -o size=16m tmpfs /run && exec sleep infinity";
    let mut child = topology.at(Location::Host(1)).spawn(Path::new("unshare"), |command| {
        command.args(["--mount", "--propagation", "private", "sh", "-c", script]);
    })?;
    let id = child.id();
    await_that("there is a /run for the agent", || {
        fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|name| name.trim() == "sleep")
    });
    ensure!(child.try_wait()?.is_none(), "there is no /run for the agent: mounting needs root");
    Ok(child)
}

fn cluster_objects() -> Vec<Value> {
    let addresses = Family::ALL
        .map(|family| json!({ "type": "InternalIP", "address": node_address(family, 1).to_string() }));
    let port = |name, protocol| json!({ "name": name, "protocol": protocol, "port": 53 });
    vec![
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": node_name(1), "labels": { "kubernetes.io/hostname": node_name(1) } },
            "status": { "addresses": addresses },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": "kube-dns", "namespace": "default" },
            "spec": {
                "clusterIP": DNS[0],
                "clusterIPs": DNS,
                "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "RequireDualStack",
                "ports": [port("dns", "UDP"), port("dns-tcp", "TCP")],
            },
        }),
    ]
}

/// No failure is made good by time: the agent tries again and looks at everything only after the period, which is long.
fn configuration(plane: Plane) -> String {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": Kind::Weir(plane).mode(),
        "clusterCIDR": CLUSTER_CIDRS.join(","),
        "nftables": { "syncPeriod": "10m" },
        "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
    })
    .to_string()
}

/// Runs a program to its end and fails with what it complained about.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
