//! The watches of this node's pods and of the namespaces.
//!
//! In: the API server's lists and watches. Out: [`PodChange`]s on a channel of their own. Only the metadata
//! of namespaces is requested; of a pod, RuntimeClass, containers and network are used too.

use std::sync::Arc;

use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{Client, runtime::watcher::Config};
use tokio::{sync::mpsc::Sender, task::JoinSet};

use super::{
    connection::Connection,
    ledger::Named,
    objects::{Absent, Watched},
    protobuf,
    stream_item::ItemResult,
    versions::Version,
    watch::Watch,
};
use crate::{
    model::{Kind, ObjectName, PodChange, PodObject},
    source::SourceStatus,
};

pub(super) async fn both_kinds(
    connection: Connection,
    changes: Sender<PodChange>,
    status: Arc<SourceStatus>,
) {
    let mut watches = JoinSet::new();
    watches.spawn(Watch::<Namespace>::new(&connection, &changes, &status).run());
    watches.spawn(Watch::<Pod>::new(&connection, &changes, &status).run());
    drop(changes);
    while watches.join_next().await.is_some() {}
}

impl Named for PodObject {
    fn name(&self) -> ObjectName {
        self.name()
    }
}

impl Watched for Pod {
    type Object = PodObject;

    const KIND: Kind = Kind::Pod;
    const ABSENT: Absent = Absent::RetryRarely;

    /// This node's pods, including those in the host's network. A finished pod has no processes; the server
    /// reports it as deleted.
    fn selector(node: &str) -> Config {
        let running = "status.phase!=Succeeded,status.phase!=Failed";
        Config::default().fields(&format!("spec.nodeName={node},{running}"))
    }

    fn trimmed(mut self) -> PodObject {
        self.metadata.managed_fields = None;
        self.status = None;
        PodObject::Pod(Box::new(self))
    }

    fn events(client: Client, config: Config, known: Version) -> BoxStream<'static, ItemResult<Self>> {
        protobuf::events(client, config, known)
    }
}

impl Watched for Namespace {
    type Object = PodObject;

    const KIND: Kind = Kind::Namespace;
    const ABSENT: Absent = Absent::RetryRarely;

    /// All namespaces, because the set of those with pods on this node changes all the time.
    fn selector(_node: &str) -> Config {
        Config::default()
    }

    fn trimmed(mut self) -> PodObject {
        self.metadata.managed_fields = None;
        PodObject::Namespace(Box::new(self))
    }

    fn events(client: Client, config: Config, known: Version) -> BoxStream<'static, ItemResult<Self>> {
        protobuf::events(client, config, known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unfinished_pods_of_this_node_are_requested() {
        let fields = Pod::selector("n1").field_selector.unwrap();
        assert_eq!(fields, "spec.nodeName=n1,status.phase!=Succeeded,status.phase!=Failed");
        assert_eq!(Namespace::selector("n1").field_selector, None);
    }
}
