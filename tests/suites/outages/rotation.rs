//! Certificates and tokens that are replaced.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::api::{
    authentication::v1::TokenRequest,
    core::v1::{Namespace, Secret, ServiceAccount},
};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::timeout;
use weir_tests::{apiserver::ApiServer, logged::Lines, relay::Relay};

use super::{
    agent::Agent,
    audit::Audit,
    authority::{Authority, put},
};
use crate::api_objects::{ApiObjects, NAMESPACE, create};

/// An API server reads its files once a minute where it gets no notice of a change.
const PATIENCE: Duration = Duration::from_secs(120);

/// A kubeconfig with these credentials.
fn kubeconfig(directory: &Path, server: &str, authorities: &Path, user: &Value) -> PathBuf {
    let path = directory.join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": authorities}}],
        "users": [{"name": "node", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "node"}}],
    });
    put(&path, &config.to_string());
    path
}

async fn client(kubeconfig: &Path) -> Result<Client, Box<dyn std::error::Error>> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Whether the server accepts a client with the files as they are now.
async fn admits(kubeconfig: &Path) -> bool {
    match client(kubeconfig).await {
        Ok(client) => Api::<Namespace>::all(client).get(NAMESPACE).await.is_ok(),
        Err(_) => false,
    }
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let becomes = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(PATIENCE, becomes).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// The certificates that server and client show and trust.
struct Files {
    directory: TempDir,
    /// The authorities that sign servers.
    authorities: PathBuf,
    /// The authorities that sign clients, for the server.
    clients: PathBuf,
    client: [PathBuf; 2],
}

impl Files {
    fn new(authority: &Authority) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let client = [path("client.crt"), path("client.key")];
        let files = Self { authorities: path("authorities"), clients: path("clients"), client, directory };
        files.of_client(authority);
        files
    }

    fn of_client(&self, authority: &Authority) {
        put(&self.clients, &authority.certificate());
        authority.sign("/O=system:masters/CN=node", &self.client);
    }

    /// Nothing is right any more but what this authority signs.
    fn replace(&self, authority: &Authority, server: &ApiServer) {
        self.of_client(authority);
        authority.sign("/CN=kube-apiserver", &server.certificate());
        put(&self.authorities, &authority.certificate());
    }

    fn kubeconfig(&self, directory: &Path, server: &str) -> PathBuf {
        let [certificate, key] = &self.client;
        let user = json!({"client-certificate": certificate, "client-key": key});
        kubeconfig(directory, server, &self.authorities, &user)
    }
}

#[tokio::test]
async fn certificates_of_server_and_client_and_their_authorities_may_be_replaced_at_once() {
    let files = Files::new(&Authority::new("first"));
    let trusted = format!("--client-ca-file={}", files.clients.display());
    let server = ApiServer::start(&["--authorization-mode=AlwaysAllow", &trusted]).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    objects.service_in_time("web").await;
    std::fs::copy(&server.certificate()[0], &files.authorities).unwrap();
    let relay = Relay::start(server.socket().ip(), server.socket()).unwrap();
    let by_relay = format!("https://{}", relay.address());
    let mut agent = Agent::start(files.kubeconfig(files.directory.path(), &by_relay), &[]).await;
    agent.comes_to(&["web"]).await;
    let before = agent.lists();

    let beside = tempfile::tempdir().unwrap();
    let direct = files.kubeconfig(beside.path(), &server.url());
    // Cut while the old ones are known, and after another request has been refused.
    for (cut_first, name) in [(true, "late"), (false, "last")] {
        files.replace(&Authority::new(name), &server);
        until("the server has the new certificates", async || admits(&direct).await).await;
        if !cut_first {
            let namespaces: Api<Namespace> = Api::all(agent.connection.client());
            until("other requests come through", async || namespaces.get(NAMESPACE).await.is_ok()).await;
        }
        relay.cut();
        ApiObjects(server.client().await.unwrap()).service_in_time(name).await;
        let all: &[&str] = if cut_first { &["late", "web"] } else { &["last", "late", "web"] };
        agent.comes_to(all).await;
    }
    assert_eq!(agent.lists_since(&before), BTreeMap::new(), "the watches go on where they were");
}

/// Takes what this thread logs, until the guard is dropped.
fn logged_by_this_thread() -> (Lines, tracing::subscriber::DefaultGuard) {
    let lines = Lines::default();
    let writer = lines.clone();
    let log = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    (lines, tracing::subscriber::set_default(log))
}

fn warnings(lines: &Lines) -> Vec<String> {
    lines.text().lines().filter(|line| line.contains(" WARN ")).map(str::to_owned).collect()
}

/// A service account. Each token is bound to a Secret, and is valid while that exists.
struct Account(Client);

impl Account {
    async fn new(client: Client) -> Self {
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
        create(&accounts, json!({"metadata": {"name": "weir"}})).await;
        Self(client)
    }

    async fn token(&self, bound_to: &str) -> String {
        let secrets: Api<Secret> = Api::namespaced(self.0.clone(), NAMESPACE);
        let secret = create(&secrets, json!({"metadata": {"name": bound_to}})).await;
        let request: TokenRequest = serde_json::from_value(json!({"spec": {
            "audiences": [], "expirationSeconds": 3600,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Secret", "name": bound_to, "uid": secret.metadata.uid},
        }}))
        .unwrap();
        let accounts: Api<ServiceAccount> = Api::namespaced(self.0.clone(), NAMESPACE);
        let issued = accounts.create_token_request("weir", &PostParams::default(), &request).await.unwrap();
        issued.status.unwrap().token.unwrap()
    }

    async fn end(&self, bound_to: &str) {
        let secrets: Api<Secret> = Api::namespaced(self.0.clone(), NAMESPACE);
        secrets.delete(bound_to, &DeleteParams::default()).await.unwrap();
    }
}

#[tokio::test]
async fn a_token_that_is_replaced_is_read_anew_and_an_old_one_costs_no_list_and_one_warning() {
    let audit = Audit::new();
    let [policy, log] = audit.options();
    let options = ["--authorization-mode=AlwaysAllow", &policy, &log];
    let server = ApiServer::start(&options).await.unwrap();
    let objects = ApiObjects::open(&server).await;
    objects.service_in_time("web").await;
    let account = Account::new(objects.0.clone()).await;
    let directory = tempfile::tempdir().unwrap();
    let (file, old) = (directory.path().join("token"), directory.path().join("old-token"));
    put(&file, &account.token("first").await);
    let relay = Relay::start(server.socket().ip(), server.socket()).unwrap();
    let by_relay = format!("https://{}", relay.address());
    let known_by = |file: &Path| json!({"tokenFile": file});
    let authorities = &server.certificate()[0];
    let (lines, _guard) = logged_by_this_thread();
    let config = kubeconfig(directory.path(), &by_relay, authorities, &known_by(&file));
    let mut agent = Agent::start(config, &[]).await;
    agent.comes_to(&["web"]).await;
    let before = agent.lists();

    let beside = tempfile::tempdir().unwrap();
    let with_old = kubeconfig(beside.path(), &server.url(), authorities, &known_by(&old));
    // In time, as a kubelet does it.
    std::fs::copy(&file, &old).unwrap();
    put(&file, &account.token("second").await);
    account.end("first").await;
    until("the first token is worth nothing", async || !admits(&with_old).await).await;
    relay.cut();
    objects.service_in_time("late").await;
    agent.comes_to(&["late", "web"]).await;
    assert!(warnings(&lines).len() <= 1, "{:#?}", warnings(&lines));

    // Too late.
    std::fs::copy(&file, &old).unwrap();
    let warned = warnings(&lines).len();
    account.end("second").await;
    until("the second token is worth nothing", async || !admits(&with_old).await).await;
    relay.cut();
    let resources = ["services", "endpointslices", "nodes", "servicecidrs"];
    audit.refuses(&resources, 4).await;
    let refused = audit.refused();
    assert!(refused.len() < 3 * 4 * resources.len(), "refused too often: {refused:#?}");
    assert_eq!(warnings(&lines).len() - warned, 1, "{:#?}", warnings(&lines));
    put(&file, &account.token("third").await);
    objects.service_in_time("last").await;
    agent.comes_to(&["last", "late", "web"]).await;
    assert_eq!(agent.lists_since(&before), BTreeMap::new(), "a refused token says nothing of the watch");
}
