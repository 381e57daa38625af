//! A real kube-apiserver with its etcd, in the network namespace of the caller.
//!
//! In: the programs that `cargo xtask setup` builds. Out: an API server that can be stopped, started again with the same
//! data on the same port, and given a sibling on the same data. Everything is killed and removed on drop.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Namespace, Service};
use kube::{
    Api, Client, Config,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    assets,
    node::SERVICE_CIDRS,
    objects::NAMESPACE,
    process::{ChildGuard, Process, tail},
};

/// How long programs may take to start on a busy machine.
const START: Duration = Duration::from_secs(120);

pub struct ApiServer {
    /// Before the store, which it uses.
    process: Option<Process>,
    store: Arc<Store>,
    address: IpAddr,
    port: u16,
    options: Vec<String>,
}

/// The state that API servers on the same data share.
struct Store {
    etcd: std::sync::Mutex<Process>,
    guard: ChildGuard,
    etcd_port: u16,
    etcd_arguments: Vec<String>,
    /// Last: etcd writes into it.
    directory: TempDir,
}

impl ApiServer {
    /// Starts etcd and an API server on loopback, which has every user of [`ApiServer::kubeconfig`], and waits until
    /// it is ready. `options` are added to its command line, where the last of one name counts.
    ///
    /// # Errors
    ///
    /// When the programs are not there or do not start.
    pub async fn start(options: &[&str]) -> Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST.into(), options).await
    }

    /// The same at another of this network namespace's addresses.
    ///
    /// # Errors
    ///
    /// When the programs are not there or do not start.
    pub async fn start_at(address: IpAddr, options: &[&str]) -> Result<Self> {
        Self::on(Arc::new(Store::start()?), address, options).await
    }

    /// Starts another API server on the same data.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn sibling(&self) -> Result<Self> {
        let options: Vec<_> = self.options.iter().map(String::as_str).collect();
        Self::on(Arc::clone(&self.store), self.address, &options).await
    }

    async fn on(store: Arc<Store>, address: IpAddr, options: &[&str]) -> Result<Self> {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut server = Self { store, address, port: free_port(address)?, options, process: None };
        server.restart().await?;
        Ok(server)
    }

    /// A client of the API server's etcd, which speaks HTTP too.
    ///
    /// # Errors
    ///
    /// When none can be made.
    pub fn etcd(&self) -> Result<Client> {
        let url = format!("http://127.0.0.1:{}", self.store.etcd_port);
        Ok(Client::try_from(Config::new(url.parse()?))?)
    }

    /// Whether lists can be streamed (WatchList): that takes an etcd that reports its progress, which since Kubernetes 1.31
    /// means 3.4.31, 3.5.13 or newer.
    ///
    /// # Errors
    ///
    /// When etcd does not print its version.
    pub fn streams_lists(&self) -> Result<bool> {
        let answer = Command::new(assets::kubernetes("etcd")?).arg("--version").output()?;
        let text = String::from_utf8(answer.stdout)?;
        let version = text.lines().find_map(|line| line.strip_prefix("etcd Version: "));
        let version = version.with_context(|| format!("etcd --version says {text}"))?;
        let numbers: Vec<u32> = version.split('.').filter_map(|number| number.parse().ok()).collect();
        let &[major, minor, patch] = &numbers[..] else { bail!("etcd calls itself {version}") };
        Ok(match (major, minor) {
            (3, 4) => patch >= 31,
            (3, 5) => patch >= 13,
            newer => newer > (3, 5),
        })
    }

    /// Kills etcd as a power failure would, starts it again with the same data, and waits until it answers. API servers find it by
    /// themselves.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn restart_etcd(&self) -> Result<()> {
        self.store.restart_etcd()?;
        let deadline = Instant::now() + START;
        while let Err(error) = self.etcd_revision().await {
            ensure!(Instant::now() < deadline, "etcd does not answer: {error:#}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Has etcd forget what was before now.
    ///
    /// # Errors
    ///
    /// When etcd refuses.
    pub async fn compact(&self) -> Result<()> {
        let revision = self.etcd_revision().await?;
        let body = serde_json::to_vec(&json!({ "revision": revision, "physical": true }))?;
        let request = http::Request::post("/v3/kv/compaction").body(body)?;
        self.etcd()?.request::<Value>(request).await.map(drop).context("compacting etcd")
    }

    /// As of when etcd is, as it writes that: a text.
    async fn etcd_revision(&self) -> Result<Value> {
        let request = http::Request::post("/v3/maintenance/status").body(b"{}".to_vec())?;
        let mut status: Value = self.etcd()?.request(request).await?;
        Ok(status["header"]["revision"].take())
    }

    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.socket())
    }

    /// The same without the protocol.
    #[must_use]
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    /// The file with the certificate that it shows, and the one with the key. It notices when they change.
    #[must_use]
    pub fn certificate(&self) -> [PathBuf; 2] {
        let directory = self.store.path(&format!("certificates-{}", self.port));
        ["apiserver.crt", "apiserver.key"].map(|name| directory.join(name))
    }

    /// Kills it as a power failure would.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Has it do nothing more, or go on. The kernel acknowledges what it is sent meanwhile, as a load balancer does for a server
    /// that is gone.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let process = self.process.as_ref().context("the API server does not run")?;
        process.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// Starts it again, with the same data on the same port, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop();
        let log = self.store.path(&format!("kube-apiserver-{}.log", self.port));
        self.process = Some(spawn(&self.store.guard, "kube-apiserver", &self.arguments(), &log)?);
        self.ready(&log).await
    }

    fn arguments(&self) -> Vec<String> {
        let path = |name: &str| self.store.path(name).display().to_string();
        let fixed = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.store.etcd_port),
            format!("--bind-address={}", self.address),
            format!("--secure-port={}", self.port),
            format!("--cert-dir={}", path(&format!("certificates-{}", self.port))),
            format!("--token-auth-file={}", path("tokens")),
            format!("--service-cluster-ip-range={}", SERVICE_CIDRS.join(",")),
            "--endpoint-reconciler-type=none".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", path("accounts.key")),
            format!("--service-account-signing-key-file={}", path("accounts.key")),
        ];
        // No client needs a loopback address announced, and there need not be another address to find.
        let advertised =
            (!self.address.is_loopback()).then(|| format!("--advertise-address={}", self.address));
        fixed.into_iter().chain(advertised).chain(self.options.iter().cloned()).collect()
    }

    async fn ready(&mut self, log: &Path) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            let error = match self.serves().await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let exited = self.process.as_mut().and_then(|process| process.status().ok().flatten());
            if exited.is_some() || Instant::now() > deadline {
                bail!("kube-apiserver does not become ready ({exited:?}): {error:#}\n{}", tail(log));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Fails until there is the first namespace, and addresses of every family can be given to Services.
    async fn serves(&self) -> Result<()> {
        ensure!(self.certificate()[0].exists(), "no certificate yet");
        let client = self.client().await?;
        Api::<Namespace>::all(client.clone()).get(NAMESPACE).await?;
        let service = json!({
            "metadata": {"generateName": "ready-"},
            "spec": {"ipFamilyPolicy": "PreferDualStack", "ports": [{"port": 80}]},
        });
        let only_try = PostParams { dry_run: true, ..PostParams::default() };
        let services: Api<Service> = Api::namespaced(client, NAMESPACE);
        services.create(&only_try, &serde_json::from_value(service)?).await?;
        Ok(())
    }

    /// Writes a kubeconfig for `user`; `admin` is in group system:masters, all others are in none. The
    /// token is in a file of its own; see [`ApiServer::rotate_tokens`].
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn kubeconfig(&self, user: &str) -> Result<PathBuf> {
        self.kubeconfig_by(user, self.socket())
    }

    /// The same for a client that asks at another address, which leads here.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn kubeconfig_by(&self, user: &str, address: SocketAddr) -> Result<PathBuf> {
        self.store.write_authorities()?;
        let path = self.store.path(&format!("kubeconfig-{}-{user}", address.port()));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{address}"),
                "certificate-authority": "authorities",
            }}],
            "users": [{"name": user, "user": {"tokenFile": format!("token-{user}")}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
        });
        put(&path, &config.to_string())?;
        Ok(path)
    }

    /// Gives every user another token. API servers accept only the new ones after their next start.
    ///
    /// # Errors
    ///
    /// When the files cannot be written.
    pub fn rotate_tokens(&self) -> Result<()> {
        self.store.write_tokens()
    }

    /// A client that may do anything.
    ///
    /// # Errors
    ///
    /// When the credentials do not make a client.
    pub async fn client(&self) -> Result<Client> {
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig("admin")?)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(Client::try_from(config)?)
    }
}

impl Store {
    fn start() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-apiserver-").tempdir()?;
        let (guard, ()) = ChildGuard::start("etcd", || Ok(()))?;
        let local = Ipv4Addr::LOCALHOST.into();
        let (etcd_port, peer_port) = (free_port(local)?, free_port(local)?);
        let etcd_arguments = vec![
            format!("--data-dir={}", directory.path().join("etcd").display()),
            format!("--listen-client-urls=http://127.0.0.1:{etcd_port}"),
            format!("--advertise-client-urls=http://127.0.0.1:{etcd_port}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peer_port}"),
            "--unsafe-no-fsync".to_owned(),
        ];
        let etcd = spawn(&guard, "etcd", &etcd_arguments, &directory.path().join("etcd.log"))?;
        let store = Self { directory, guard, etcd: etcd.into(), etcd_port, etcd_arguments };
        store.write_tokens()?;
        let key = Command::new("openssl")
            .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"])
            .arg(store.path("accounts.key"))
            .output()
            .context("cannot run openssl, which makes the API server's signing key")?;
        ensure!(key.status.success(), "openssl: {}", String::from_utf8_lossy(&key.stderr));
        Ok(store)
    }

    fn restart_etcd(&self) -> Result<()> {
        let mut etcd = self.etcd.lock().unwrap_or_else(PoisonError::into_inner);
        etcd.kill();
        *etcd = spawn(&self.guard, "etcd", &self.etcd_arguments, &self.path("etcd.log"))?;
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Every API server has signed for itself.
    fn write_authorities(&self) -> Result<()> {
        let mut all = String::new();
        for entry in std::fs::read_dir(self.directory.path())? {
            all += &std::fs::read_to_string(entry?.path().join("apiserver.crt")).unwrap_or_default();
        }
        put(&self.path("authorities"), &all)
    }

    fn write_tokens(&self) -> Result<()> {
        let mut accepted = String::new();
        for (user, group) in [("admin", "system:masters"), ("weir", "")] {
            let token = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
            let token = token.trim();
            accepted += &format!("{token},{user},{user},{group}\n");
            std::fs::write(self.path(&format!("token-{user}")), token)?;
        }
        std::fs::write(self.path("tokens"), accepted)?;
        Ok(())
    }
}

/// Writes a file that another process may be reading.
fn put(path: &Path, text: &str) -> Result<()> {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text)?;
    Ok(std::fs::rename(draft, path)?)
}

fn spawn(guard: &ChildGuard, program: &str, arguments: &[String], log: &Path) -> Result<Process> {
    guard.launch(&assets::kubernetes(program)?, log, |command| {
        command.args(arguments);
    })
}

fn free_port(address: IpAddr) -> Result<u16> {
    Ok(TcpListener::bind((address, 0))?.local_addr()?.port())
}
