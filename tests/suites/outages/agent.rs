//! A source, and the changes that it has reported.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{sync::mpsc::Receiver, task::JoinHandle, time::timeout};
use weir::{
    model::{Change, Kind},
    source::{
        SourceStatus,
        kube::{Connection, Credentials, KubeSource, watch},
    },
};

use crate::api_objects::NAMESPACE;

/// For an end state to be there. Nothing that is waited for takes so long, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(150);

pub(crate) struct Agent {
    pub(crate) connection: Connection,
    changes: Receiver<Change>,
    status: Arc<SourceStatus>,
    task: JoinHandle<()>,
    services: BTreeSet<String>,
    synced: usize,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    /// Starts one that asks these servers, and waits until it has every kind.
    pub(crate) async fn start(kubeconfig: PathBuf, servers: &[String]) -> Self {
        let settings = KubeSource {
            credentials: Credentials::Kubeconfig(kubeconfig),
            servers: servers.iter().map(|server| server.parse().unwrap()).collect(),
            node: "n1".to_owned(),
            versions: None,
        };
        let connection = Connection::open(settings).await.unwrap();
        let status = Arc::new(SourceStatus::default());
        let (sender, changes) = tokio::sync::mpsc::channel(16);
        let task = tokio::spawn(watch(connection.clone(), sender, Arc::clone(&status)));
        let mut agent = Self { connection, changes, status, task, services: BTreeSet::new(), synced: 0 };
        agent.until("every kind is complete", |agent| agent.synced == Kind::ALL.len()).await;
        agent.watches().await;
        agent
    }

    /// Waits until the watches have begun that follow the lists.
    async fn watches(&self) {
        let watching = async {
            while !self.status.report().iter().all(|report| report.connected) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, watching).await.expect("the watches begin");
    }

    /// Waits until the Services are these and no others.
    pub(crate) async fn comes_to(&mut self, services: &[&str]) {
        let services: BTreeSet<String> = services.iter().map(|name| (*name).to_owned()).collect();
        self.until(&format!("there is {services:?}"), |agent| agent.services == services).await;
    }

    async fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let comes = async {
            while !is_so(self) {
                let change = self.changes.recv().await.expect("the source goes on");
                self.take_in(change);
            }
        };
        let came = timeout(PATIENCE, comes).await.is_ok();
        assert!(came, "not in time: {what}; there is {:?}; {:#?}", self.services, self.status.report());
    }

    fn take_in(&mut self, change: Change) {
        match change {
            Change::Apply(object) if object.kind() == Kind::Service => {
                let name = object.name();
                if name.namespace() == NAMESPACE {
                    self.services.insert(name.name().to_owned());
                }
            }
            Change::Delete(Kind::Service, name) => drop(self.services.remove(name.name())),
            Change::Synced(_) => self.synced += 1,
            Change::Apply(_) | Change::Delete(..) => {}
        }
    }

    /// The number of lists of each kind.
    pub(crate) fn lists(&self) -> BTreeMap<String, u64> {
        self.status.report().iter().map(|report| (report.kind.to_string(), report.relists)).collect()
    }

    /// The number of lists of each kind since `before`, without kinds that were not listed.
    pub(crate) fn lists_since(&self, before: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
        let now = self.lists().into_iter();
        now.map(|(kind, lists)| (kind.clone(), lists - before[&kind]))
            .filter(|(_, lists)| *lists > 0)
            .collect()
    }
}
