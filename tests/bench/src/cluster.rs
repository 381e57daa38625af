//! The API server in the caller's namespace, and the Services the benchmark puts there.
//!
//! In: what should be there. Out: a cluster that has it. No controller runs: the benchmark writes the EndpointSlices
//! itself.

use std::{
    collections::BTreeMap,
    net::SocketAddrV4,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    },
    serde_json::{from_value, json},
};
use kube::{
    Api, Client,
    api::{DeleteParams, GetParams, Patch, PatchParams, PostParams},
};

use super::{
    node::{API_SERVER, NODE_ADDRESSES},
    seed::{self, Stored},
    workload::{Numbered, Workload},
};
use weir_tests::{apiserver::ApiServer, objects::NAMESPACE, relay::Relay};

/// How long the API server may take until it shows what is in etcd.
const SHOWN: Duration = Duration::from_secs(120);

/// Endpoints of each Service.
pub(super) const ENDPOINTS: u32 = 5;
/// The node's name, for all subjects.
pub(super) const NODE: &str = "bench";
/// Endpoints, and clients that are pods, are in here.
pub(super) const POD_CIDR: &str = "10.128.0.0/10";
/// The same for both families, as kube-proxy's `clusterCIDR` wants it.
pub(super) const CLUSTER_CIDRS: &str = "10.128.0.0/10,fd00:190::/32";
pub(super) const SERVICE_CIDR: &str = "10.96.0.0/12";
const SERVICE_CIDR_V6: &str = "fd00:10:96::/112";

/// When a write began, and when the API server had accepted it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    pub(super) begun: Instant,
    pub(super) accepted: Instant,
}

#[derive(Clone)]
pub(super) struct Objects {
    services: Api<Service>,
    slices: Api<EndpointSlice>,
    etcd: Client,
}

/// [`Objects`] and the server that has them.
pub(super) struct Cluster {
    pub(super) objects: Objects,
    kubeconfig: PathBuf,
    server: tokio::sync::Mutex<ApiServer>,
}

impl Cluster {
    /// Starts it and waits until it answers.
    pub(super) async fn start() -> Result<Self> {
        let cidr = format!("--service-cluster-ip-range={SERVICE_CIDR},{SERVICE_CIDR_V6}");
        // The measurement does not include how the API server shares itself out.
        let unlimited = ["--max-requests-inflight=1000", "--max-mutating-requests-inflight=1000"];
        let server = ApiServer::start_at(API_SERVER.into(), &[&cidr, unlimited[0], unlimited[1]]).await?;
        let client = server.client().await?;
        create_node(&client).await?;
        let objects = Objects {
            services: Api::namespaced(client.clone(), NAMESPACE),
            slices: Api::namespaced(client, NAMESPACE),
            etcd: server.etcd()?,
        };
        Ok(Self { objects, kubeconfig: server.kubeconfig("admin")?, server: server.into() })
    }

    /// Ends the API server, starts it again, and waits until it answers.
    pub(super) async fn restart(&self) -> Result<()> {
        self.server.lock().await.restart().await
    }

    /// Starts a relay that leads to the API server, in the caller's network namespace.
    pub(super) async fn relay(&self) -> Result<Relay> {
        Relay::start(API_SERVER.into(), self.server.lock().await.socket())
    }

    /// A kubeconfig for a subject that asks by this relay.
    pub(super) async fn kubeconfig_by(&self, relay: &Relay) -> Result<PathBuf> {
        self.server.lock().await.kubeconfig_by("admin", relay.address())
    }

    /// A kubeconfig for the subjects.
    #[must_use]
    pub(super) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }
}

impl Objects {
    /// Puts there what `workload` has and `before` has not.
    pub(super) async fn grow(&self, before: u32, workload: Workload) -> Result<()> {
        let mut objects = Vec::new();
        for service in workload.services().skip(before as usize) {
            objects.extend(Stored::service(&service.service()?)?);
        }
        for number in before..workload.slices() {
            objects.push(Stored::slice(&workload.slice(number, 0)?)?);
        }
        seed::put(&self.etcd, &objects).await?;
        let Some(last) = workload.slices().checked_sub(1).filter(|last| *last >= before) else {
            return Ok(());
        };
        let name = named(&workload.slice(last, 0)?.metadata.name)?;
        // From what the API server remembers, which it fills from etcd.
        let remembered = GetParams::any();
        let begin = Instant::now();
        while self.slices.get_with(&name, &remembered).await.is_err() {
            ensure!(begin.elapsed() < SHOWN, "the API server does not show {name}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Deletes all of it.
    pub(super) async fn shrink(&self, workload: Workload) -> Result<()> {
        for service in workload.services() {
            self.services.delete(&service.name(), &DeleteParams::default()).await?;
        }
        for number in 0..workload.slices() {
            let slice = workload.slice(number, 0)?;
            self.slices.delete(&named(&slice.metadata.name)?, &DeleteParams::default()).await?;
        }
        Ok(())
    }

    /// Creates a Service with slices of any kind.
    pub(super) async fn create(&self, service: &Service, slices: &[EndpointSlice]) -> Result<()> {
        self.services.create(&PostParams::default(), service).await?;
        for slice in slices {
            self.slices.create(&PostParams::default(), slice).await?;
        }
        Ok(())
    }

    /// Deletes a Service with its slices.
    pub(super) async fn remove(&self, service: &Service, slices: &[EndpointSlice]) -> Result<()> {
        self.services.delete(&named(&service.metadata.name)?, &DeleteParams::default()).await?;
        for slice in slices {
            self.slices.delete(&named(&slice.metadata.name)?, &DeleteParams::default()).await?;
        }
        Ok(())
    }

    /// Creates one Service and then its slice; the time of the slice counts.
    pub(super) async fn add(&self, service: Numbered) -> Result<Written> {
        let slice = service.slice(&service.endpoints())?;
        self.services.create(&PostParams::default(), &service.service()?).await?;
        let begun = Instant::now();
        self.slices.create(&PostParams::default(), &slice).await?;
        Ok(Written { begun, accepted: Instant::now() })
    }

    /// Leaves a Service with these endpoints only.
    pub(super) async fn leave(&self, service: Numbered, endpoints: &[SocketAddrV4]) -> Result<Written> {
        self.rewrite(&service.slice(endpoints)?).await
    }

    /// Gives a slice that is there these endpoints.
    pub(super) async fn rewrite(&self, slice: &EndpointSlice) -> Result<Written> {
        let patch = Patch::Merge(json!({ "endpoints": slice.endpoints }));
        let begun = Instant::now();
        self.slices.patch(&named(&slice.metadata.name)?, &PatchParams::default(), &patch).await?;
        Ok(Written { begun, accepted: Instant::now() })
    }

    /// Deletes one Service and its slice.
    pub(super) async fn delete(&self, service: Numbered) -> Result<()> {
        self.services.delete(&service.name(), &DeleteParams::default()).await?;
        self.slices.delete(&service.name(), &DeleteParams::default()).await?;
        Ok(())
    }
}

fn named(name: &Option<String>) -> Result<String> {
    name.clone().context("an object without a name")
}

/// The Node that subjects run on.
fn node() -> Result<Node> {
    let addresses = json!([
        { "type": "InternalIP", "address": NODE_ADDRESSES.0 },
        { "type": "InternalIP", "address": NODE_ADDRESSES.1 },
    ]);
    let labels = BTreeMap::from([("kubernetes.io/hostname", NODE)]);
    Ok(from_value(
        json!({ "metadata": { "name": NODE, "labels": labels }, "status": { "addresses": addresses } }),
    )?)
}

async fn create_node(client: &Client) -> Result<()> {
    let created = Api::<Node>::all(client.clone()).create(&PostParams::default(), &node()?).await;
    created.context("creating the Node")?;
    Ok(())
}
