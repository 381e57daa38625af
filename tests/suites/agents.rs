//! Disturbances of a running agent: a second agent on the node, removed links, a bpffs that is out of sight.

use std::{
    fs::{self, File, Permissions},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::{fd::AsFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{EbpfLoader, programs::CgroupSockAddr};
use nix::sys::signal::Signal;
use weir::dataplane::ebpf::PROGRAMS;
use weir::sys::bpf;
use weir_tests::{
    assets,
    bpffs::BpfFs,
    cgroup::Cgroup,
    netns::Namespace,
    process::Process,
    subject::{Kind, Plane},
    wait::await_that,
};

const CONFIG: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
# A network namespace other than the first may not change these.
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
";

/// A node with a directory of manifests.
struct Node {
    namespace: Namespace,
    /// The programs serve the sockets of this cgroup. The agents are outside of it.
    pods: PathBuf,
    files: tempfile::TempDir,
    bpffs: BpfFs,
    /// Last, because it can go only when nothing is left in it.
    group: Cgroup,
}

impl Node {
    fn new(label: &str) -> Result<Self> {
        let group = Cgroup::new(label)?;
        let namespace = Namespace::within(&group.child("host")?, label)?;
        namespace.ip(&["addr add 192.168.77.11/24 dev lo".to_owned()])?;
        let pods = group.path().join("pods");
        let node = Self { namespace, pods, files: tempfile::tempdir()?, bpffs: BpfFs::new()?, group };
        node.make_cgroup()?;
        fs::create_dir(node.path("manifests"))?;
        node.publish("web", 10)?;
        Ok(node)
    }

    /// Makes the cgroup of the pods, which may have been there before.
    fn make_cgroup(&self) -> Result<()> {
        fs::create_dir(&self.pods).with_context(|| format!("making {}", self.pods.display()))?;
        Ok(fs::write(self.pods.join("cgroup.type"), "threaded")?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// A Service at 10.96.0.`last`.
    fn publish(&self, name: &str, last: u8) -> Result<()> {
        let text = format!(
            "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec: {{clusterIP: 10.96.0.{last}, ports: [{{port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{{addresses: [10.244.1.11], conditions: {{ready: true}}}}]
"
        );
        let draft = self.path("draft");
        fs::write(&draft, text)?;
        Ok(fs::rename(draft, self.path("manifests").join(format!("{name}.yaml")))?)
    }

    /// Whether a Service at 10.96.0.`last` is programmed.
    fn has(&self, last: u8) -> bool {
        let rules = self.namespace.stdout("nft", &["list", "table", "ip", "weir"]).unwrap_or_default();
        rules.contains(&format!("10.96.0.{last} "))
    }

    fn bpf_root(&self) -> Result<PathBuf> {
        self.bpffs.directory("weir")
    }

    /// Writes the configuration of an agent that has its own ports for health and metrics.
    fn configure(&self, name: &str, port: u16, more: &str) -> Result<PathBuf> {
        let (file, draft) = (self.path(&format!("{name}.yaml")), self.path("draft"));
        let ports =
            format!("healthzBindAddress: 127.0.0.1:{port}\nmetricsBindAddress: 127.0.0.1:{}\n", port + 1);
        fs::write(&draft, format!("{CONFIG}{ports}{more}"))?;
        fs::rename(draft, &file)?;
        Ok(file)
    }

    /// Starts an agent with its own ports for health and metrics.
    fn start(&self, name: &str, plane: Plane, port: u16) -> Result<Agent> {
        self.start_by(&[], &assets::weir()?, name, Kind::Weir(plane).mode(), port, &self.bpf_root()?)
    }

    fn start_by(
        &self,
        before: &[&str],
        weir: &Path,
        name: &str,
        mode: &str,
        port: u16,
        bpf_root: &Path,
    ) -> Result<Agent> {
        let config = self.configure(name, port, "")?;
        let mut words: Vec<String> = before.iter().map(|word| (*word).to_owned()).collect();
        words.extend([
            weir.display().to_string(),
            "run".to_owned(),
            format!("--config={}", config.display()),
            format!("--source=manifests:{}", self.path("manifests").display()),
            "--hostname-override=node-1".to_owned(),
            format!("--proxy-mode={mode}"),
            format!("--cgroup-root={}", self.pods.display()),
            format!("--bpf-root={}", bpf_root.display()),
        ]);
        let process = self.namespace.launch(Path::new(&words[0]), &self.path(name), |command| {
            command.args(&words[1..]);
        })?;
        Ok(Agent { process, port })
    }

    fn get(&self, port: u16, path: &str) -> Result<String> {
        self.namespace.run(|| {
            let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
    }

    /// The code that an agent's `/healthz` answers.
    fn health(&self, agent: &Agent) -> Option<u16> {
        self.get(agent.port, "/healthz").ok()?.split(' ').nth(1)?.parse().ok()
    }

    /// The sum of a metric of an agent.
    fn metric(&self, agent: &Agent, name: &str) -> u64 {
        let page = self.get(agent.port + 1, "/metrics").unwrap_or_default();
        let lines = page.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum()
    }

    /// Connects from the cgroup of the pods to the first Service, whether or not anything answers there.
    fn connect_as_a_pod(&self) {
        let enter =
            format!("echo 0 > {}/cgroup.threads; exec 3<>/dev/tcp/10.96.0.10/80", self.pods.display());
        // Nothing answers at the backend; the test is which backend the socket got.
        let _ = self.namespace.output("timeout", &["0.2", "bash", "-c", &enter]);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let removed = fs::remove_dir(&self.pods);
        assert!(removed.is_ok() || std::thread::panicking(), "{} of {:?}", self.pods.display(), self.group);
    }
}

struct Agent {
    process: Process,
    port: u16,
}

impl Agent {
    fn log(&self) -> String {
        self.process.log()
    }

    fn logged(&self, text: &str) -> usize {
        self.log().matches(text).count()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }
}

const WAITS: &str = "another agent serves this node";

fn a_second_agent_waits(plane: Plane) -> Result<()> {
    let node = Node::new("second")?;
    let first = node.start("first.log", plane, 20256)?;
    await_that("the first agent serves", || node.health(&first) == Some(200));
    let second = node.start("second.log", plane, 21256)?;
    await_that("the second agent says that it waits", || second.logged(WAITS) == 1);
    ensure!(second.logged(&format!("process={}", first.process.id())) == 1, "{}", second.log());
    await_that("the second agent is not ready", || node.health(&second) == Some(503));
    // Only the first does anything.
    node.publish("more", 11)?;
    await_that("the first agent follows", || node.has(11));
    ensure!(first.logged("another program changed weir's table") == 0, "{}", first.log());

    first.signal(Signal::SIGKILL)?;
    await_that("the second agent serves", || node.health(&second) == Some(200));
    node.publish("last", 12)?;
    await_that("the second agent follows", || node.has(12));
    ensure!(second.logged(WAITS) == 1, "{}", second.log());
    Ok(())
}

#[test]
fn a_second_agent_with_nftables_waits_until_the_first_is_gone() -> Result<()> {
    a_second_agent_waits(Plane::Nftables)
}

#[test]
fn a_second_agent_with_sockets_waits_until_the_first_is_gone() -> Result<()> {
    a_second_agent_waits(Plane::Ebpf)
}

#[test]
fn an_agent_that_starts_anew_with_another_configuration_stays_the_only_one() -> Result<()> {
    let node = Node::new("anew")?;
    let first = node.start("first.log", Plane::Nftables, 20256)?;
    await_that("the first agent serves", || node.health(&first) == Some(200));
    let second = node.start("second.log", Plane::Nftables, 21256)?;
    await_that("the second agent waits", || second.logged(WAITS) == 1);
    for round in 1..=3 {
        for agent in [&first, &second] {
            let name =
                agent.process.log_file().file_name().and_then(|name| name.to_str()).context("no name")?;
            node.configure(name, agent.port, &format!("clusterCIDR: 10.24{round}.0.0/16\n"))?;
        }
        await_that("the first agent starts anew", || first.logged("restarting with it") == round);
        await_that("the first agent serves again", || {
            first.logged("watching manifests") == round + 1 && node.health(&first) == Some(200)
        });
        await_that("the second agent starts anew, and waits", || second.logged(WAITS) == round + 1);
    }
    ensure!(second.logged("in force") == 0, "{}", second.log());
    Ok(())
}

#[test]
fn a_process_without_rights_cannot_keep_the_agent_from_serving() -> Result<()> {
    let node = Node::new("rogue")?;
    let script = "use Socket; $| = 1; socket(S, AF_UNIX, SOCK_STREAM, 0) or die;
        bind(S, pack('S a*', AF_UNIX, qq(\\0weir-agent))) or die; listen(S, 5) or die; print qq(bound\\n); sleep 600";
    let rogue = node.namespace.launch(Path::new("setpriv"), &node.path("rogue.log"), |command| {
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "perl", "-e", script]);
    })?;
    await_that("the name is taken", || rogue.log().contains("bound"));
    let agent = node.start("agent.log", Plane::Nftables, 20256)?;
    await_that("the agent serves", || node.health(&agent) == Some(200));
    ensure!(agent.logged("weir runs without the lock") == 1, "{}", agent.log());
    drop(rogue);
    Ok(())
}

#[test]
fn cleanup_reports_an_agent_that_serves_the_node() -> Result<()> {
    let node = Node::new("cleanup")?;
    let agent = node.start("agent.log", Plane::Nftables, 20256)?;
    await_that("the agent serves", || node.health(&agent) == Some(200));
    let root = format!("--bpf-root={}", node.bpf_root()?.display());
    let weir = assets::weir()?.display().to_string();
    let output = node.namespace.output(&weir, &["cleanup", &root])?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success() && told.contains("an agent serves this node"), "{told}");
    await_that("the agent has repaired its tables", || node.has(10));
    drop(agent);
    let output = node.namespace.output(&weir, &["cleanup", &root])?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success() && !told.contains("an agent serves this node"), "{told}");
    Ok(())
}

/// Attaches a program to a cgroup as old agents did, so that no other may stand beside it.
fn attach_alone(cgroup: &Path) -> Result<()> {
    /// `BPF_CGROUP_INET4_CONNECT`
    const CONNECT4: u32 = 10;
    let mut foreign = EbpfLoader::new().load(PROGRAMS)?;
    let program: &mut CgroupSockAddr =
        foreign.program_mut("connect4").context("there is no program connect4")?.try_into()?;
    program.load()?;
    Ok(bpf::attach_alone(File::open(cgroup)?, program.fd()?.as_fd(), CONNECT4)?)
}

#[test]
fn a_program_that_suffers_no_other_is_named_and_packets_serve() -> Result<()> {
    let node = Node::new("alone")?;
    attach_alone(&node.pods)?;
    let told = format!("at connect4 of {}", node.pods.display());
    let start = |name, mode, port| node.start_by(&[], &assets::weir()?, name, mode, port, &node.bpf_root()?);
    let mut strict = start("strict.log", "ebpf", 20256)?;
    await_that("an agent that may use nothing else ends", || {
        strict.process.status().is_ok_and(|ended| ended.is_some_and(|status| !status.success()))
    });
    ensure!(strict.logged(&told) == 1, "{}", strict.log());
    let agent = start("auto.log", "auto", 21256)?;
    await_that("the agent serves", || node.health(&agent) == Some(200) && node.has(10));
    ensure!(agent.logged(&told) == 1, "{}", agent.log());
    let mode = node.get(agent.port + 1, "/proxyMode")?;
    ensure!(mode.ends_with("nftables"), "{mode}");
    Ok(())
}

#[test]
fn links_that_are_removed_or_detached_are_there_again() -> Result<()> {
    let node = Node::new("links")?;
    let agent = node.start("agent.log", Plane::Ebpf, 20256)?;
    await_that("the agent serves", || node.health(&agent) == Some(200));
    let served = || node.metric(&agent, "weir_service_connections_total{");
    node.connect_as_a_pod();
    await_that("a socket is led", || served() == 1);

    let root = node.bpf_root()?;
    for (round, link) in (1..).zip(["link-recvmsg4", "link-connect4"]) {
        fs::remove_file(root.join(link))?;
        await_that(&format!("{link} is there again\n{}", agent.log()), || {
            root.join(link).exists() && node.metric(&agent, "weir_programs_attached_anew_total") == round
        });
    }
    let before = served();
    node.connect_as_a_pod();
    await_that("a socket is led again", || served() > before);

    // All links lead nowhere when their cgroup is gone.
    fs::remove_dir(&node.pods)?;
    node.make_cgroup()?;
    let links = fs::read_dir(&root)?.flatten();
    let links = links.filter(|entry| entry.file_name().to_string_lossy().starts_with("link-")).count() as u64;
    await_that(&format!("all are attached to the new cgroup\n{}", agent.log()), || {
        node.metric(&agent, "weir_programs_attached_anew_total") == 2 + links
    });
    let before = served();
    node.connect_as_a_pod();
    await_that("a socket is led in the new cgroup", || served() > before);
    ensure!(agent.logged("weir attached them again") >= 3, "{}", agent.log());
    Ok(())
}

#[test]
fn without_a_look_at_the_bpffs_nftables_serves() -> Result<()> {
    let node = Node::new("blind")?;
    // Its own copy, because the way to the built one may be closed to others.
    fs::set_permissions(node.files.path(), Permissions::from_mode(0o755))?;
    let copy = node.path("weir");
    fs::copy(assets::weir()?, &copy)?;
    let closed = node.path("closed");
    fs::create_dir_all(closed.join("weir"))?;
    fs::set_permissions(&closed, Permissions::from_mode(0o700))?;
    let rights = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=+net_admin",
        "--ambient-caps=+net_admin",
    ];
    let agent = node.start_by(&rights, &copy, "agent.log", "nftables", 20256, &closed.join("weir"))?;
    await_that(&format!("the agent serves\n{}", agent.log()), || node.health(&agent) == Some(200));
    ensure!(agent.logged("no permission to look for kernel programs") == 1, "{}", agent.log());
    Ok(())
}
