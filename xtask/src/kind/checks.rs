//! Services of every type, called by pods and by the nodes.
//!
//! In: a cluster with the workload. Out: a line for each client, or the first wrong answer.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::cluster::{Cluster, array, url};

pub(super) const NAMESPACE: &str = "weir-test";
const EXTERNAL_IP: &str = "198.51.100.7";
const BALANCER_IP: &str = "198.51.100.8";
/// How long a change may take to reach every node.
const PATIENCE: Duration = Duration::from_secs(60);
/// Enough that each of four servers answers: the chance that one is missed is 1 in 10,000.
const CALLS: usize = 32;

/// Starts the workload and waits for it.
///
/// # Errors
///
/// When it cannot be made or does not start.
pub(super) fn deploy(cluster: &Cluster<'_>, image: &str) -> Result<()> {
    cluster.kubectl_file("apply", &include_str!("workload.yaml").replace("IMAGE", image))?;
    cluster.rolled_out(NAMESPACE, "deployment/server")?;
    cluster.rolled_out(NAMESPACE, "ds/client")?;
    // A cloud's controller would set the address; kind has none.
    let status = format!(r#"{{"status":{{"loadBalancer":{{"ingress":[{{"ip":"{BALANCER_IP}"}}]}}}}}}"#);
    let patch = ["patch", "service", "load-balancer", "--subresource=status", "--type=merge", "-p", &status];
    cluster.kubectl(&[&["-n", NAMESPACE], &patch[..]].concat())?;
    Ok(())
}

pub(super) fn remove(cluster: &Cluster<'_>) -> Result<()> {
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--ignore-not-found"]).map(drop)
}

/// Pods by the label `app`: name, node, address.
pub(super) fn pods(cluster: &Cluster<'_>, app: &str) -> Result<Vec<[String; 3]>> {
    let list = cluster.kubectl_json(&["-n", NAMESPACE, "get", "pods", "-l", &format!("app={app}")])?;
    let running = array(&list["items"]).iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    let text =
        |value: &serde_json::Value| value.as_str().map(str::to_owned).context("a pod that does not run");
    running
        .map(|pod| {
            Ok([
                text(&pod["metadata"]["name"])?,
                text(&pod["spec"]["nodeName"])?,
                text(&pod["status"]["podIP"])?,
            ])
        })
        .collect()
}

/// Where calls come from.
enum Client<'a> {
    Pod(&'a str),
    Node(&'a str),
}

/// The cluster and its workload.
struct Workload<'a> {
    cluster: &'a Cluster<'a>,
    clients: Vec<[String; 3]>,
    servers: BTreeSet<String>,
}

/// Calls Services of every type.
///
/// # Errors
///
/// With the first wrong answer.
pub(super) fn run(cluster: &Cluster<'_>) -> Result<()> {
    let servers = pods(cluster, "server")?.into_iter().map(|[name, ..]| name).collect();
    let workload = Workload { cluster, clients: pods(cluster, "client")?, servers };
    ensure!(!workload.clients.is_empty(), "there are no clients");
    let addresses = cluster.addresses()?;
    for [pod, node, _] in &workload.clients {
        for (client, name) in [(Client::Pod(pod), "a pod"), (Client::Node(node), "the node")] {
            workload.served_by_all(&client, &workload.cluster_ip("cluster-ip")?)?;
            workload.served_by_all(&client, &url("http", EXTERNAL_IP, 80))?;
            workload.served_by_all(&client, &url("http", BALANCER_IP, 80))?;
            for address in &addresses {
                workload.served_by_all(&client, &url("http", address, 31080))?;
                workload.served_by_all(&client, &url("http", address, 31081))?;
            }
            workload.refused(&client, &workload.cluster_ip("no-endpoints")?)?;
            println!(
                "  {node}, {name}: ClusterIP, NodePort, LoadBalancer, externalIP; refused without endpoints"
            );
        }
        workload.pod_only(pod)?;
        println!(
            "  {node}, a pod: names, headless, ExternalName, affinity, own node only, itself, UDP, the API server"
        );
    }
    Ok(())
}

impl Workload<'_> {
    fn shell(&self, client: &Client<'_>, script: &str) -> Result<String> {
        match client {
            Client::Pod(pod) => {
                self.cluster.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "sh", "-c", script])
            }
            Client::Node(node) => self.cluster.on_node(node, &["sh", "-c", script]),
        }
    }

    fn cluster_ip(&self, service: &str) -> Result<String> {
        let service = self.cluster.kubectl_json(&["-n", NAMESPACE, "get", "service", service])?;
        Ok(url("http", service["spec"]["clusterIP"].as_str().context("no ClusterIP")?, 80))
    }

    /// The names of the servers that answer `times` calls to `address`.
    fn answers(&self, client: &Client<'_>, address: &str, times: usize) -> Result<BTreeSet<String>> {
        let script = format!(
            "i=0; while [ $i -lt {times} ]; do curl -sS --max-time 5 {address}/hostname && echo || exit 1; i=$((i+1)); done"
        );
        Ok(self.shell(client, &script)?.lines().map(|line| line.trim().to_owned()).collect())
    }

    fn served_by_all(&self, client: &Client<'_>, address: &str) -> Result<()> {
        eventually(address, || {
            let answers = self.answers(client, address, CALLS)?;
            ensure!(answers == self.servers, "{answers:?} answered at {address}, not {:?}", self.servers);
            Ok(())
        })
    }

    /// A call to a Service without endpoints fails at once, with curl's code 7.
    fn refused(&self, client: &Client<'_>, address: &str) -> Result<()> {
        eventually(address, || {
            let script = format!("curl -sS --max-time 5 {address}/hostname 2>&1; echo code $?");
            let output = self.shell(client, &script)?;
            ensure!(output.trim_end().ends_with("code 7"), "{address} did not refuse: {output}");
            Ok(())
        })
    }

    /// Calls that need a pod: it has the cluster's DNS, and is a backend of a Service itself.
    fn pod_only(&self, pod: &str) -> Result<()> {
        let client = Client::Pod(pod);
        for name in ["cluster-ip", "external-name"] {
            self.served_by_all(&client, &format!("http://{name}"))?;
        }
        let one = |address: &str, times| {
            eventually(address, || {
                let answers = self.answers(&client, address, times)?;
                ensure!(answers.len() == 1, "{answers:?} answered at {address}, not a single server");
                Ok(answers)
            })
        };
        // The client chooses among a headless Service's addresses.
        eventually("http://headless:8080", || {
            let answers = self.answers(&client, "http://headless:8080", 8)?;
            ensure!(
                !answers.is_empty() && answers.is_subset(&self.servers),
                "{answers:?} answered at headless"
            );
            Ok(())
        })?;
        one("http://sticky", CALLS)?;
        // The only endpoint on this node is the calling pod, so this is also a hairpin.
        let itself = one("http://own-node", 8)?;
        ensure!(itself.contains(pod), "{itself:?} answered at own-node, not {pod} itself");
        let udp =
            "for i in 1 2 3 4 5 6 7 8; do echo hostname | timeout 3 nc -u -w 1 cluster-ip 90; echo; done";
        eventually("udp://cluster-ip:90", || {
            let output = self.shell(&client, udp)?;
            let answers =
                output.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<BTreeSet<_>>();
            ensure!(answers.len() > 1, "{answers:?} answered by UDP, not several servers");
            ensure!(answers.iter().all(|it| self.servers.contains(*it)), "{answers:?} answered by UDP");
            Ok(())
        })?;
        let api = "curl -sSk --max-time 5 https://kubernetes.default/version";
        eventually("the API server", || {
            let output = self.shell(&client, api)?;
            ensure!(output.contains("gitVersion"), "the API server answered {output}");
            Ok(())
        })
    }
}

/// Repeats `attempt` until it succeeds, or fails with its last error.
pub(super) fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > PATIENCE => {
                bail!("{what}, after {} s: {error:#}", PATIENCE.as_secs())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}
