//! A real etcd and kube-apiserver inside a namespace, for agents without another source.
//!
//! In: objects. Out: the same objects, admitted by Kubernetes' own validation, on the watches of its clients.

use std::{fmt::Debug, net::IpAddr, path::PathBuf, sync::OnceLock};

use anyhow::{Context as _, Result, bail};
use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    },
    serde::{Serialize, de::DeserializeOwned},
};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use tokio::runtime::Runtime;
use weir::model::{Kind, Object};

use crate::{apiserver::ApiServer, netns::Namespace, objects::NAMESPACE};

/// A running control plane. Dropping it stops it.
pub struct ControlPlane<'a> {
    namespace: &'a Namespace,
    server: ApiServer,
    /// Connects from the namespace of the thread that blocks on it.
    runtime: Runtime,
    client: OnceLock<Client>,
}

impl<'a> ControlPlane<'a> {
    /// Starts etcd and kube-apiserver, reachable at `address`, and waits until it serves.
    ///
    /// # Errors
    ///
    /// When the programs are missing or do not come up; the message ends with what the API server logged last.
    pub fn start(namespace: &'a Namespace, address: IpAddr) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let start = || runtime.block_on(ApiServer::start_at(address, &["--authorization-mode=AlwaysAllow"]));
        let server = namespace.run(start)?;
        Ok(Self { namespace, server, runtime, client: OnceLock::new() })
    }

    /// A kubeconfig with every right.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        self.server.kubeconfig("admin")
    }

    /// Kills the API server as a power failure would. Its data stays.
    pub fn stop(&mut self) {
        self.server.stop();
    }

    /// Starts the API server again and waits until it serves.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.client.take();
        let Self { namespace, server, runtime, .. } = self;
        namespace.run(|| runtime.block_on(server.restart()))
    }

    fn with_client<T: Send>(&self, work: impl AsyncFnOnce(Client) -> Result<T> + Send) -> Result<T> {
        self.namespace.run(|| {
            self.runtime.block_on(async {
                if let Some(client) = self.client.get() {
                    return work(client.clone()).await;
                }
                let client = self.server.client().await?;
                work(self.client.get_or_init(|| client).clone()).await
            })
        })
    }

    /// Creates or changes objects, status included, in this order.
    ///
    /// # Errors
    ///
    /// When the API server refuses one; the message names it.
    pub fn apply(&self, objects: &[&Object]) -> Result<()> {
        self.with_client(async |client| {
            for object in objects {
                apply(&client, object).await?;
            }
            Ok(())
        })
    }

    /// Deletes objects, given by kind and name.
    ///
    /// # Errors
    ///
    /// When the API server refuses, also for one that does not exist.
    pub fn delete(&self, objects: &[(Kind, String)]) -> Result<()> {
        self.with_client(async |client| {
            let parameters = DeleteParams::default();
            for (kind, name) in objects {
                let client = client.clone();
                match kind {
                    Kind::Service => {
                        drop(Api::<Service>::namespaced(client, NAMESPACE).delete(name, &parameters).await?);
                    }
                    Kind::EndpointSlice => {
                        drop(
                            Api::<EndpointSlice>::namespaced(client, NAMESPACE)
                                .delete(name, &parameters)
                                .await?,
                        );
                    }
                    Kind::Node | Kind::ServiceCidr | Kind::Pod | Kind::Namespace => {
                        bail!("{kind:?} {name} is not deleted by any case")
                    }
                }
            }
            Ok(())
        })
    }
}

async fn apply(client: &Client, object: &Object) -> Result<()> {
    let client = client.clone();
    match object {
        Object::Service(service) => {
            let api = Api::<Service>::namespaced(client, NAMESPACE);
            put(&api, service.as_ref(), service.status.is_some()).await
        }
        Object::EndpointSlice(slice) => put(&Api::namespaced(client, NAMESPACE), slice.as_ref(), false).await,
        Object::Node(node) => put_node(&Api::all(client), node).await,
        // The API server makes it from its own flags.
        Object::ServiceCidr(_) => Ok(()),
    }
}

/// Server-side apply: what we stop naming goes away.
async fn put<K>(api: &Api<K>, object: &K, with_status: bool) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
{
    let name = object.meta().name.as_deref().unwrap_or_default();
    let parameters = PatchParams::apply("weir-tests").force();
    let context = || format!("{} {name}", K::kind(&()));
    api.patch(name, &parameters, &Patch::Apply(object)).await.with_context(context)?;
    if with_status {
        api.patch_status(name, &parameters, &Patch::Apply(object)).await.with_context(context)?;
    }
    Ok(())
}

/// Nodes have two addresses of one type, which server-side apply takes for one.
async fn put_node(api: &Api<Node>, node: &Node) -> Result<()> {
    let name = node.metadata.name.as_deref().unwrap_or_default();
    match api.create(&PostParams::default(), node).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            api.patch(name, &PatchParams::default(), &Patch::Merge(node)).await?;
        }
        created => drop(created?),
    }
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(node)).await?;
    Ok(())
}
