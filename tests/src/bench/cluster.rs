//! The API server in the caller's namespace, and the Services the benchmark puts there.
//!
//! In: how many Services there should be. Out: a cluster that has them. No controller runs: the benchmark writes the
//! EndpointSlices itself.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Context as _;
use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    },
    serde_json::{from_value, json},
};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use tokio::task::JoinSet;

use super::rig::{API_SERVER, BACKEND_PORT, NODE_ADDRESS};
use crate::{apiserver::ApiServer, objects::NAMESPACE};

/// So many objects are written at the same time.
const WRITERS: usize = 32;

/// Endpoints of each Service.
pub(super) const ENDPOINTS: u32 = 5;
/// The name of the node that subjects say they run on.
pub(super) const NODE: &str = "bench";
/// Endpoints, and clients that are pods, are in here.
pub(super) const POD_CIDR: &str = "10.128.0.0/10";
/// The same for both families, as kube-proxy's `clusterCIDR` wants it.
pub(super) const CLUSTER_CIDRS: &str = "10.128.0.0/10,fd00:190::/32";
/// Where ClusterIPs come from.
pub(super) const SERVICE_CIDR: &str = "10.96.0.0/12";
const SERVICE_CIDR_V6: &str = "fd00:10:96::/112";

/// A Service of the benchmark, by number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbered(pub u32);

impl Numbered {
    /// Its name.
    #[must_use]
    pub(super) fn name(self) -> String {
        format!("bench-{}", self.0)
    }

    /// Its only address and port.
    #[must_use]
    pub(super) fn cluster_ip(self) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::from_bits(Ipv4Addr::new(10, 100, 0, 1).to_bits() + self.0), 80)
    }

    /// Its endpoints: addresses that no other Service has.
    #[must_use]
    pub(super) fn endpoints(self) -> Vec<SocketAddrV4> {
        let first = Ipv4Addr::new(10, 128, 0, 1).to_bits() + self.0 * ENDPOINTS;
        (first..first + ENDPOINTS)
            .map(|address| SocketAddrV4::new(Ipv4Addr::from_bits(address), BACKEND_PORT))
            .collect()
    }

    /// The Service itself.
    ///
    /// # Errors
    ///
    /// When it is not what Kubernetes takes for one.
    pub(super) fn service(self) -> anyhow::Result<Service> {
        Ok(from_value(json!({
            "metadata": { "name": self.name() },
            "spec": { "clusterIP": self.cluster_ip().ip(), "ports": [{ "port": 80, "targetPort": BACKEND_PORT }] },
        }))?)
    }

    /// The slice of a Service that has these endpoints.
    ///
    /// # Errors
    ///
    /// When it is not what Kubernetes takes for one.
    pub(super) fn slice(self, endpoints: &[SocketAddrV4]) -> anyhow::Result<EndpointSlice> {
        let endpoint = |at: &SocketAddrV4| {
            json!({
                "addresses": [at.ip()],
                "conditions": { "ready": true, "serving": true, "terminating": false },
                "nodeName": NODE,
            })
        };
        Ok(from_value(json!({
            "metadata": { "name": self.name(), "labels": { "kubernetes.io/service-name": self.name() } },
            "addressType": "IPv4",
            "ports": [{ "name": "", "port": BACKEND_PORT, "protocol": "TCP" }],
            "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        }))?)
    }
}

/// The running cluster.
pub(super) struct Cluster {
    services: Api<Service>,
    slices: Api<EndpointSlice>,
    kubeconfig: PathBuf,
    _server: ApiServer,
}

impl Cluster {
    /// Starts it and waits until it answers.
    ///
    /// # Errors
    ///
    /// When it does not come up.
    pub(super) async fn start() -> anyhow::Result<Self> {
        let cidr = format!("--service-cluster-ip-range={SERVICE_CIDR},{SERVICE_CIDR_V6}");
        // What is measured is not how the API server shares itself out.
        let unlimited = ["--max-requests-inflight=1000", "--max-mutating-requests-inflight=1000"];
        let server = ApiServer::start_at(API_SERVER.into(), &[&cidr, unlimited[0], unlimited[1]]).await?;
        let client = server.client().await?;
        create_node(&client).await?;
        Ok(Self {
            services: Api::namespaced(client.clone(), NAMESPACE),
            slices: Api::namespaced(client, NAMESPACE),
            kubeconfig: server.kubeconfig("admin")?,
            _server: server,
        })
    }

    /// A kubeconfig for the subjects.
    #[must_use]
    pub(super) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Creates the Services `from..to`, each with its slice.
    ///
    /// # Errors
    ///
    /// When the API server refuses one.
    pub(super) async fn grow(&self, from: u32, to: u32) -> anyhow::Result<()> {
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            let (services, slices) = (self.services.clone(), self.slices.clone());
            writers.spawn(async move {
                for number in (from..to).skip(writer).step_by(WRITERS).map(Numbered) {
                    services.create(&PostParams::default(), &number.service()?).await?;
                    slices.create(&PostParams::default(), &number.slice(&number.endpoints())?).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(writer) = writers.join_next().await {
            writer??;
        }
        Ok(())
    }

    /// Creates a Service with slices of any kind.
    ///
    /// # Errors
    ///
    /// When the API server refuses one.
    pub(super) async fn create(&self, service: &Service, slices: &[EndpointSlice]) -> anyhow::Result<()> {
        self.services.create(&PostParams::default(), service).await?;
        for slice in slices {
            self.slices.create(&PostParams::default(), slice).await?;
        }
        Ok(())
    }

    /// Creates one Service and then its slice, and says when the API server had accepted the latter.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub(super) async fn add(&self, service: Numbered) -> anyhow::Result<Instant> {
        let slice = service.slice(&service.endpoints())?;
        self.services.create(&PostParams::default(), &service.service()?).await?;
        self.slices.create(&PostParams::default(), &slice).await?;
        Ok(Instant::now())
    }

    /// Leaves a Service with these endpoints only, and says when the API server had accepted that.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub(super) async fn leave(
        &self,
        service: Numbered,
        endpoints: &[SocketAddrV4],
    ) -> anyhow::Result<Instant> {
        let slice = service.slice(endpoints)?;
        let patch = json!({ "endpoints": slice.endpoints });
        self.slices.patch(&service.name(), &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(Instant::now())
    }

    /// Deletes one Service and its slice.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub(super) async fn delete(&self, service: Numbered) -> anyhow::Result<()> {
        self.services.delete(&service.name(), &DeleteParams::default()).await?;
        self.slices.delete(&service.name(), &DeleteParams::default()).await?;
        Ok(())
    }
}

/// The Node that subjects run on.
///
/// # Errors
///
/// When it is not what Kubernetes takes for one.
pub(super) fn node() -> anyhow::Result<Node> {
    let addresses = json!([{ "type": "InternalIP", "address": NODE_ADDRESS }]);
    let labels = BTreeMap::from([("kubernetes.io/hostname", NODE)]);
    Ok(from_value(
        json!({ "metadata": { "name": NODE, "labels": labels }, "status": { "addresses": addresses } }),
    )?)
}

async fn create_node(client: &Client) -> anyhow::Result<()> {
    let created = Api::<Node>::all(client.clone()).create(&PostParams::default(), &node()?).await;
    created.context("creating the Node")?;
    Ok(())
}
