//! Pods on every node that make new connections without pause, while agents or servers are replaced.
//!
//! In: a cluster with the workload. Out: how many connections each step saw, and every failure.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};

use super::{
    checks::{self, NAMESPACE, eventually},
    cluster::{Cluster, url},
};

/// How many connections after a step show its effect.
const ENOUGH: usize = 200;

/// Connects to every address in turn, for ever. Each failure is a line, and each round a line with the count so far.
const SCRIPT: &str = r#"
made=0
while :; do
  for address in $ADDRESSES; do
    # A connection is made at once or after the first SYN sent again; after five seconds it counts as lost.
    error=$(curl -sS -o /dev/null --connect-timeout 5 --max-time 10 "$address/hostname" 2>&1) || echo "failed $(date +%T) $address $error"
    made=$((made+1))
  done
  error=$(dig +short +tries=1 +time=5 cluster-ip.weir-test.svc.cluster.local 2>&1) || echo "failed $(date +%T) DNS $error"
  made=$((made+1))
  echo "made $made"
done
"#;

const POD: &str = r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: load, namespace: weir-test}
spec:
  selector: {matchLabels: {app: load}}
  template:
    metadata: {labels: {app: load}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: load
          image: IMAGE
          command: [sh, -c, SCRIPT]
          env: [{name: ADDRESSES, value: "TARGETS"}]
"#;

/// The counts in the pods' logs so far.
#[derive(Default)]
struct Count {
    made: usize,
    failures: BTreeSet<String>,
}

/// Pods that make connections until this is dropped.
pub(super) struct Load<'a> {
    cluster: &'a Cluster<'a>,
    /// The count at the end of the step before.
    before: Count,
    /// A row for each step.
    steps: Vec<Vec<String>>,
}

impl<'a> Load<'a> {
    /// Starts one pod on each node that pods may run on, and waits until they make connections.
    ///
    /// # Errors
    ///
    /// When they do not start, or cannot connect in the first place.
    pub(super) fn start(cluster: &'a Cluster<'a>, image: &str) -> Result<Self> {
        let addresses = cluster.addresses()?;
        let mut targets = vec!["http://cluster-ip".to_owned()];
        targets.extend(addresses.iter().map(|address| url("http", address, 31080)));
        let script = serde_json::to_string(SCRIPT)?;
        let pods =
            POD.replace("IMAGE", image).replace("SCRIPT", &script).replace("TARGETS", &targets.join(" "));
        cluster.kubectl_file("apply", &pods)?;
        cluster.rolled_out(NAMESPACE, "ds/load")?;
        let mut load = Self { cluster, before: Count::default(), steps: Vec::new() };
        load.during("no change", || Ok(()))?;
        Ok(load)
    }

    /// Ends the load; returns a row for each step: name, connections, failures.
    pub(super) fn end(mut self) -> Vec<Vec<String>> {
        std::mem::take(&mut self.steps)
    }

    fn read(&self) -> Result<Count> {
        let mut count = Count::default();
        for [pod, node, _] in checks::pods(self.cluster, "load")? {
            let log = self.cluster.kubectl(&["-n", NAMESPACE, "logs", &pod])?;
            let failures = log.lines().filter_map(|line| line.strip_prefix("failed "));
            count.failures.extend(failures.map(|line| format!("{node} {line}")));
            let last = log.lines().rev().find_map(|line| line.strip_prefix("made "));
            count.made += last.map_or(Ok(0), str::parse::<usize>).context("the count in a pod's log")?;
        }
        Ok(count)
    }

    /// Waits for more connections, because a step may show its effect late.
    fn goes_on(&self) -> Result<()> {
        let before = self.read()?.made;
        eventually("new connections", || {
            let more = self.read()?.made.saturating_sub(before);
            ensure!(more >= ENOUGH, "only {more} were made");
            Ok(())
        })
    }

    /// Does a step, and prints how many connections were made during it.
    ///
    /// # Errors
    ///
    /// When the step or a connection fails.
    pub(super) fn during(&mut self, what: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("{what}, under load");
        act().with_context(|| what.to_owned())?;
        self.goes_on()?;
        let count = self.read()?;
        let failures = count.failures.difference(&self.before.failures).cloned().collect::<Vec<_>>();
        let (made, failed) = (count.made - self.before.made, failures.len());
        self.before = count;
        self.steps.push(vec![what.to_owned(), made.to_string(), failed.to_string()]);
        println!("  {made} new connections, {failed} failed");
        ensure!(failed == 0, "{what}: {failed} of {made} new connections failed:\n{}", failures.join("\n"));
        Ok(())
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        // A pod that stays does no harm: the test deletes its namespace.
        let _ = self.cluster.kubectl(&["-n", NAMESPACE, "delete", "ds", "load", "--wait=false"]);
    }
}
