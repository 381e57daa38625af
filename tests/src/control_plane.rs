//! A real etcd and kube-apiserver inside a namespace, for agents that know no other source.
//!
//! In: objects. Out: the same objects, admitted by Kubernetes' own validation, on the watches of whoever connects.

use std::{
    fmt::Debug,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::{
    api::{
        core::v1::{Namespace as KubeNamespace, Node, Service},
        discovery::v1::EndpointSlice,
    },
    serde::{Serialize, de::DeserializeOwned},
};
use kube::{
    Api, Client, Config, Resource,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::runtime::Runtime;
use weir::source::{Kind, Object};

use crate::{assets, netns::Namespace, node::SERVICE_CIDRS, objects::NAMESPACE};

/// How long the API server may take to come up on a busy machine.
const START: Duration = Duration::from_secs(90);

/// A running control plane. Dropping it stops it.
pub struct ControlPlane<'a> {
    namespace: &'a Namespace,
    directory: tempfile::TempDir,
    processes: Vec<Child>,
    /// Connects from the namespace of whoever blocks on it.
    runtime: Runtime,
    client: OnceLock<Client>,
}

impl<'a> ControlPlane<'a> {
    /// Starts etcd and kube-apiserver, reachable at `address` on port 6443, and waits until it serves.
    ///
    /// # Errors
    ///
    /// When the programs are missing or do not come up; the message ends with what the API server logged last.
    pub fn start(namespace: &'a Namespace, address: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-api-").tempdir()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut plane =
            Self { namespace, directory, processes: Vec::new(), runtime, client: OnceLock::new() };
        plane.write_credentials(address)?;
        plane.start_etcd()?;
        plane.start_apiserver(address)?;
        plane.wait()?;
        Ok(plane)
    }

    /// A kubeconfig with every right.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    fn write_credentials(&self, address: &str) -> Result<()> {
        let directory = self.directory.path();
        let token = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        let token = token.trim();
        std::fs::write(directory.join("tokens"), format!("{token},admin,admin,system:masters\n"))?;
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{address}:6443"), "insecure-skip-tls-verify": true,
            }}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        });
        std::fs::write(self.kubeconfig(), serde_yaml_ng::to_string(&kubeconfig)?)?;
        let key = Command::new("openssl")
            .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"])
            .arg(directory.join("accounts.key"))
            .output()
            .context("cannot run openssl, which makes the API server's signing key")?;
        ensure!(key.status.success(), "openssl: {}", String::from_utf8_lossy(&key.stderr));
        Ok(())
    }

    fn spawn(&mut self, program: &str, args: &[String]) -> Result<()> {
        let log = std::fs::File::create(self.directory.path().join(format!("{program}.log")))?;
        let errors = log.try_clone()?;
        let child = self.namespace.spawn(&assets::kubernetes(program)?, |command| {
            command.args(args).stdout(log).stderr(errors);
        })?;
        self.processes.push(child);
        Ok(())
    }

    fn start_etcd(&mut self) -> Result<()> {
        let data = self.directory.path().join("etcd");
        let args = [
            format!("--data-dir={}", data.display()),
            "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
            "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
            "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
            "--unsafe-no-fsync".to_owned(),
        ];
        self.spawn("etcd", &args)
    }

    fn start_apiserver(&mut self, address: &str) -> Result<()> {
        let path = |name: &str| self.directory.path().join(name).display().to_string();
        let args = [
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            format!("--service-cluster-ip-range={}", SERVICE_CIDRS.join(",")),
            format!("--bind-address={address}"),
            format!("--advertise-address={address}"),
            format!("--cert-dir={}", path("certificates")),
            format!("--token-auth-file={}", path("tokens")),
            "--authorization-mode=AlwaysAllow".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", path("accounts.key")),
            format!("--service-account-signing-key-file={}", path("accounts.key")),
        ];
        self.spawn("kube-apiserver", &args)
    }

    fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            let ready = self.with_client(async |client| {
                Api::<KubeNamespace>::all(client).get(NAMESPACE).await?;
                Ok(())
            });
            match ready {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    let log = self.directory.path().join("kube-apiserver.log");
                    bail!("kube-apiserver is not up after {START:?}: {error:#}\n{}", tail(&log));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn with_client<T: Send>(&self, work: impl AsyncFnOnce(Client) -> Result<T> + Send) -> Result<T> {
        self.namespace.run(|| {
            self.runtime.block_on(async {
                if let Some(client) = self.client.get() {
                    return work(client.clone()).await;
                }
                let config = Kubeconfig::read_from(self.kubeconfig())?;
                let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
                let client = Client::try_from(config)?;
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
                    Kind::Node | Kind::ServiceCidr => bail!("{kind:?} {name} is not deleted by any case"),
                }
            }
            Ok(())
        })
    }
}

impl Drop for ControlPlane<'_> {
    fn drop(&mut self) {
        for mut child in self.processes.drain(..).rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
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

/// The end of a log file, for messages.
pub(crate) fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
