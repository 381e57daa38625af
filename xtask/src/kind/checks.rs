//! Services of every type, asked for by real pods and by the nodes.
//!
//! In: a cluster with the workload. Out: one line for each thing asked, or the first that is not as it should be.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::cluster::{Cluster, array, url};

pub(super) const NAMESPACE: &str = "weir-test";
const EXTERNAL_IP: &str = "198.51.100.7";
const BALANCER_IP: &str = "198.51.100.8";
/// For what has just been changed to be so everywhere.
const PATIENCE: Duration = Duration::from_secs(60);
/// Enough that each of four servers answers: missing one has a chance of 1 in 10,000.
const ASKED: usize = 32;

/// Starts the workload and waits for it.
///
/// # Errors
///
/// When it cannot be made or does not start.
pub(super) fn deploy(cluster: &Cluster<'_>, image: &str) -> Result<()> {
    cluster.kubectl_file("apply", &include_str!("workload.yaml").replace("IMAGE", image))?;
    cluster.rolled_out(NAMESPACE, "deployment/server")?;
    cluster.rolled_out(NAMESPACE, "ds/client")?;
    // What a load balancer's controller would do.
    let status = format!(r#"{{"status":{{"loadBalancer":{{"ingress":[{{"ip":"{BALANCER_IP}"}}]}}}}}}"#);
    let patch = ["patch", "service", "load-balancer", "--subresource=status", "--type=merge", "-p", &status];
    cluster.kubectl(&[&["-n", NAMESPACE], &patch[..]].concat())?;
    Ok(())
}

/// Takes the workload away.
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

/// Where somebody asks from.
enum Asker<'a> {
    Pod(&'a str),
    Node(&'a str),
}

/// The cluster, and what is in it.
struct Scene<'a> {
    cluster: &'a Cluster<'a>,
    clients: Vec<[String; 3]>,
    servers: BTreeSet<String>,
}

/// Asks for Services of every type.
///
/// # Errors
///
/// Naming the first that was not served as it should be.
pub(super) fn run(cluster: &Cluster<'_>) -> Result<()> {
    let servers = pods(cluster, "server")?.into_iter().map(|[name, ..]| name).collect();
    let scene = Scene { cluster, clients: pods(cluster, "client")?, servers };
    ensure!(!scene.clients.is_empty(), "there are no clients");
    let addresses = cluster.addresses()?;
    for [client, node, _] in &scene.clients {
        for (asker, who) in [(Asker::Pod(client), "a pod"), (Asker::Node(node), "the node")] {
            scene.served_by_all(&asker, &scene.cluster_ip("cluster-ip")?)?;
            scene.served_by_all(&asker, &url("http", EXTERNAL_IP, 80))?;
            scene.served_by_all(&asker, &url("http", BALANCER_IP, 80))?;
            for address in &addresses {
                scene.served_by_all(&asker, &url("http", address, 31080))?;
                scene.served_by_all(&asker, &url("http", address, 31081))?;
            }
            scene.refused(&asker, &scene.cluster_ip("nobody")?)?;
            println!(
                "  {node}, {who}: ClusterIP, NodePort, LoadBalancer, externalIP, and none without endpoints"
            );
        }
        scene.pod_only(client)?;
        println!(
            "  {node}, a pod: names, headless, ExternalName, affinity, own node only, itself, UDP, the API server"
        );
    }
    Ok(())
}

impl Scene<'_> {
    fn ask(&self, asker: &Asker<'_>, script: &str) -> Result<String> {
        match asker {
            Asker::Pod(pod) => {
                self.cluster.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "sh", "-c", script])
            }
            Asker::Node(node) => self.cluster.on_node(node, &["sh", "-c", script]),
        }
    }

    fn cluster_ip(&self, service: &str) -> Result<String> {
        let service = self.cluster.kubectl_json(&["-n", NAMESPACE, "get", "service", service])?;
        Ok(url("http", service["spec"]["clusterIP"].as_str().context("no ClusterIP")?, 80))
    }

    /// The names that answer when `address` is asked `times` times.
    fn answers(&self, asker: &Asker<'_>, address: &str, times: usize) -> Result<BTreeSet<String>> {
        let script = format!(
            "i=0; while [ $i -lt {times} ]; do curl -sS --max-time 5 {address}/hostname && echo || exit 1; i=$((i+1)); done"
        );
        Ok(self.ask(asker, &script)?.lines().map(|line| line.trim().to_owned()).collect())
    }

    fn served_by_all(&self, asker: &Asker<'_>, address: &str) -> Result<()> {
        eventually(address, || {
            let answers = self.answers(asker, address, ASKED)?;
            ensure!(answers == self.servers, "{address} was answered by {answers:?}, not {:?}", self.servers);
            Ok(())
        })
    }

    /// Whoever has no endpoints is refused at once, not left waiting.
    fn refused(&self, asker: &Asker<'_>, address: &str) -> Result<()> {
        eventually(address, || {
            let script = format!("curl -sS --max-time 5 {address}/hostname 2>&1; echo code $?");
            let said = self.ask(asker, &script)?;
            ensure!(said.trim_end().ends_with("code 7"), "{address} was to be refused: {said}");
            Ok(())
        })
    }

    /// What only a pod can ask: it has the cluster's DNS and a Service that it is behind itself.
    fn pod_only(&self, client: &str) -> Result<()> {
        let asker = Asker::Pod(client);
        for name in ["cluster-ip", "external-name"] {
            self.served_by_all(&asker, &format!("http://{name}"))?;
        }
        let one = |address: &str, times| {
            eventually(address, || {
                let answers = self.answers(&asker, address, times)?;
                ensure!(answers.len() == 1, "{address} was answered by {answers:?}, not by one");
                Ok(answers)
            })
        };
        // Which of a headless Service's addresses is taken is for the client to say.
        eventually("http://headless:8080", || {
            let answers = self.answers(&asker, "http://headless:8080", 8)?;
            ensure!(
                !answers.is_empty() && answers.is_subset(&self.servers),
                "headless was answered by {answers:?}"
            );
            Ok(())
        })?;
        one("http://sticky", ASKED)?;
        // The only endpoint on this node is the pod that asks, so this is also the way back to oneself.
        let itself = one("http://own-node", 8)?;
        ensure!(itself.contains(client), "own-node was answered by {itself:?}, not by {client} itself");
        let udp =
            "for i in 1 2 3 4 5 6 7 8; do echo hostname | timeout 3 nc -u -w 1 cluster-ip 90; echo; done";
        eventually("udp://cluster-ip:90", || {
            let said = self.ask(&asker, udp)?;
            let answers =
                said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<BTreeSet<_>>();
            ensure!(answers.len() > 1, "UDP was answered by {answers:?}, not by several");
            ensure!(answers.iter().all(|it| self.servers.contains(*it)), "UDP was answered by {answers:?}");
            Ok(())
        })?;
        let api = "curl -sSk --max-time 5 https://kubernetes.default/version";
        eventually("the API server", || {
            let said = self.ask(&asker, api)?;
            ensure!(said.contains("gitVersion"), "the API server answered {said}");
            Ok(())
        })
    }
}

/// Repeats `attempt` until it succeeds, or fails with what it said last.
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
