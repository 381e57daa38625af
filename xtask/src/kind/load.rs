//! New connections without pause from a pod on every node, while something is being replaced.
//!
//! In: a cluster with the workload. Out: how many connections were made meanwhile, and every one that failed.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};

use super::{
    checks::{self, NAMESPACE, eventually},
    cluster::{Cluster, url},
};

/// Connections that tell whether something works.
const CONVINCING: usize = 200;

/// Connects to every address in turn, for ever, and counts. A line says what failed, and now and then how many were made.
const SCRIPT: &str = r#"
made=0
while :; do
  for address in $ADDRESSES; do
    # A connection is made at once or after the first SYN sent again; five seconds is lost.
    said=$(curl -sS -o /dev/null --connect-timeout 5 --max-time 10 "$address/hostname" 2>&1) || echo "failed $(date +%T) $address $said"
    made=$((made+1))
  done
  said=$(dig +short +tries=1 +time=5 cluster-ip.weir-test.svc.cluster.local 2>&1) || echo "failed $(date +%T) DNS $said"
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

/// What the pods have said so far.
#[derive(Default)]
struct Seen {
    made: usize,
    failures: BTreeSet<String>,
}

/// Pods that make connections until this is dropped.
pub(super) struct Load<'a> {
    cluster: &'a Cluster<'a>,
    /// What was known when somebody last looked.
    before: Seen,
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
        let mut load = Self { cluster, before: Seen::default() };
        load.during("nothing", || Ok(()))?;
        Ok(load)
    }

    fn read(&self) -> Result<Seen> {
        let mut seen = Seen::default();
        for [pod, node, _] in checks::pods(self.cluster, "load")? {
            let log = self.cluster.kubectl(&["-n", NAMESPACE, "logs", &pod])?;
            let failures = log.lines().filter_map(|line| line.strip_prefix("failed "));
            seen.failures.extend(failures.map(|line| format!("{node} {line}")));
            let last = log.lines().rev().find_map(|line| line.strip_prefix("made "));
            seen.made += last.map_or(Ok(0), str::parse::<usize>).context("what a pod says it made")?;
        }
        Ok(seen)
    }

    /// Waits until some more connections are made, so that what came before has had its effect.
    fn goes_on(&self) -> Result<()> {
        let before = self.read()?.made;
        eventually("new connections", || {
            let more = self.read()?.made.saturating_sub(before);
            ensure!(more >= CONVINCING, "only {more} were made");
            Ok(())
        })
    }

    /// Does `what` and says how many connections were made meanwhile.
    ///
    /// # Errors
    ///
    /// When it fails, or when a single connection does.
    pub(super) fn during(&mut self, what: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("{what}, under load");
        act().with_context(|| what.to_owned())?;
        self.goes_on()?;
        let seen = self.read()?;
        let failures = seen.failures.difference(&self.before.failures).cloned().collect::<Vec<_>>();
        let (made, failed) = (seen.made - self.before.made, failures.len());
        self.before = seen;
        println!("  {made} new connections, {failed} failed");
        ensure!(failed == 0, "{what}: {failed} of {made} new connections failed:\n{}", failures.join("\n"));
        Ok(())
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        // A pod that stays is no harm: the namespace it is in goes with the test.
        let _ = self.cluster.kubectl(&["-n", NAMESPACE, "delete", "ds", "load", "--wait=false"]);
    }
}
