//! The requests to an API server, from its own audit log.

use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

/// Lists and watches as soon as they are answered.
const POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Metadata, verbs: [list, watch]}
- {level: None}
";
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Audit(TempDir);

impl Audit {
    pub(crate) fn new() -> Self {
        let audit = Self(tempfile::tempdir().unwrap());
        std::fs::write(audit.0.path().join("policy"), POLICY).unwrap();
        audit
    }

    /// The options of the API server.
    pub(crate) fn options(&self) -> [String; 2] {
        let path = |name| self.0.path().join(name).display().to_string();
        [format!("--audit-policy-file={}", path("policy")), format!("--audit-log-path={}", path("log"))]
    }

    /// The requests of weir that were refused because of its credentials.
    pub(crate) fn refused(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.0.path().join("log")).unwrap_or_default();
        let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let refused = events.filter(|event| {
            event["responseStatus"]["code"] == 401
                && event["userAgent"].as_str().is_some_and(|agent| agent.starts_with("weir/"))
        });
        refused.filter_map(|event| Some(event["requestURI"].as_str()?.to_owned())).collect()
    }

    /// Waits until each of these was refused so often.
    pub(crate) async fn refuses(&self, resources: &[&str], times: usize) {
        let refuses = async {
            let enough = |refused: &[String]| {
                resources.iter().all(|resource| {
                    refused.iter().filter(|uri| uri.contains(&format!("/{resource}?"))).count() >= times
                })
            };
            while !enough(&self.refused()) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, refuses).await.is_ok();
        assert!(in_time, "not refused {times} times: {resources:?}; {:#?}", self.refused());
    }
}
