//! The credentials for the API server, and its address.
//!
//! In: a kubeconfig file, or the environment of a pod. Out: a [`kube::Config`]. It is read again on each
//! call, so that replaced files take effect. Errors name file and field.

use std::path::{Path, PathBuf};

use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::BoxError;

/// The source of credentials and address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// The current context of a kubeconfig file. Relative paths in it are relative to the file.
    Kubeconfig(PathBuf),
    /// The environment and the service account of weir's own pod.
    InCluster,
}

/// Why no connection could be prepared. Nothing has been sent yet.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig file cannot be read.
    #[error("cannot read kubeconfig `{}`", path.display())]
    Read {
        /// The path of the file.
        path: PathBuf,
        /// The error of the read.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a kubeconfig.
    #[error("`{}` is not a kubeconfig: {reason}", path.display())]
    Parse {
        /// The path of the file.
        path: PathBuf,
        /// The parser's message.
        reason: String,
    },
    /// A field of the kubeconfig file is missing or wrong.
    #[error("kubeconfig `{}`: `{field}` {reason}", path.display())]
    Field {
        /// The path of the file.
        path: PathBuf,
        /// The path of the field in the file.
        field: String,
        /// The problem with the field.
        reason: String,
    },
    /// weir does not run in a pod, or the pod has no service account.
    #[error("no in-cluster credentials (outside a pod, give a kubeconfig)")]
    InCluster(#[source] kube::config::InClusterError),
    /// Certificate, key or token cannot be used.
    #[error("the credentials {from} cannot be used")]
    Client {
        /// The origin of the credentials, such as a file.
        from: String,
        /// The problem with them.
        #[source]
        source: BoxError,
    },
}

impl Credentials {
    /// Reads the credentials from their files.
    pub(super) async fn load(&self) -> Result<Config, ConnectError> {
        let mut config = match self {
            Self::InCluster => Config::incluster().map_err(ConnectError::InCluster)?,
            Self::Kubeconfig(path) => from_file(path).await?,
        };
        // The value can only come from the environment here, and that proxy is for the Internet, not for the
        // API server.
        config.proxy_url = None;
        Ok(config)
    }

    /// The origin of the credentials, for messages.
    pub(super) fn origin(&self) -> String {
        match self {
            Self::InCluster => "of the pod's service account".to_owned(),
            Self::Kubeconfig(path) => format!("of kubeconfig `{}`", path.display()),
        }
    }
}

async fn from_file(path: &Path) -> Result<Config, ConnectError> {
    let file = Kubeconfig::read_from(path).map_err(|error| match error {
        KubeconfigError::ReadConfig(source, path) => ConnectError::Read { path, source },
        other => ConnectError::Parse { path: path.to_owned(), reason: other.to_string() },
    })?;
    let names = check(&file).map_err(|FieldProblem { field, reason }| ConnectError::Field {
        path: path.to_owned(),
        field,
        reason,
    })?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(|error| {
        let field = names.field(&error);
        ConnectError::Field { path: path.to_owned(), field, reason: format!("cannot be used: {error}") }
    })
}

/// A problem with a field.
struct FieldProblem {
    field: String,
    reason: String,
}

impl FieldProblem {
    fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

/// The names that the current context refers to.
struct ContextNames {
    cluster: String,
    user: String,
}

impl ContextNames {
    fn field(&self, error: &KubeconfigError) -> String {
        let Self { cluster, user } = self;
        match error {
            KubeconfigError::LoadCertificateAuthority(_) | KubeconfigError::ParseCertificates(_) => {
                format!("clusters[{cluster}].cluster.certificate-authority")
            }
            KubeconfigError::LoadClientCertificate(_) => format!("users[{user}].user.client-certificate"),
            KubeconfigError::LoadClientKey(_) => format!("users[{user}].user.client-key"),
            _ => format!("clusters[{cluster}].cluster"),
        }
    }
}

/// Follows the current context through the file and checks each field.
fn check(file: &Kubeconfig) -> Result<ContextNames, FieldProblem> {
    let current = file
        .current_context
        .as_deref()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| FieldProblem::new("current-context", "is not set"))?;
    let context = file
        .contexts
        .iter()
        .find(|named| named.name == current)
        .and_then(|named| named.context.as_ref())
        .ok_or_else(|| {
            FieldProblem::new("current-context", format!("names `{current}`, which is not in `contexts`"))
        })?;
    check_cluster(file, current, &context.cluster)?;
    let user = context.user.as_deref().unwrap_or_default();
    check_user(file, current, user)?;
    Ok(ContextNames { cluster: context.cluster.clone(), user: user.to_owned() })
}

fn check_cluster(file: &Kubeconfig, context: &str, name: &str) -> Result<(), FieldProblem> {
    let cluster = file
        .clusters
        .iter()
        .find(|named| named.name == name)
        .and_then(|named| named.cluster.as_ref())
        .ok_or_else(|| {
            let field = format!("contexts[{context}].context.cluster");
            FieldProblem::new(field, format!("names `{name}`, which is not in `clusters`"))
        })?;
    let field = format!("clusters[{name}].cluster.server");
    let Some(server) = &cluster.server else { return Err(FieldProblem::new(field, "is not set")) };
    let uri: http::Uri =
        server.parse().map_err(|error| FieldProblem::new(&field, format!("is `{server}`: {error}")))?;
    if !matches!(uri.scheme_str(), Some("https" | "http")) {
        return Err(FieldProblem::new(
            field,
            format!("is `{server}`, which starts with neither https:// nor http://"),
        ));
    }
    if cluster.proxy_url.as_ref().is_some_and(|url| !url.is_empty()) {
        let field = format!("clusters[{name}].cluster.proxy-url");
        return Err(FieldProblem::new(field, "is set, but weir does not connect through a proxy"));
    }
    Ok(())
}

fn check_user(file: &Kubeconfig, context: &str, name: &str) -> Result<(), FieldProblem> {
    if name.is_empty() {
        return Ok(());
    }
    let user = file.auth_infos.iter().find(|named| named.name == name).ok_or_else(|| {
        let field = format!("contexts[{context}].context.user");
        FieldProblem::new(field, format!("names `{name}`, which is not in `users`"))
    })?;
    let Some(user) = &user.auth_info else { return Ok(()) };
    let files = [
        ("tokenFile", user.token_file.as_ref().filter(|_| user.token.is_none())),
        (
            "client-certificate",
            user.client_certificate.as_ref().filter(|_| user.client_certificate_data.is_none()),
        ),
        ("client-key", user.client_key.as_ref().filter(|_| user.client_key_data.is_none())),
    ];
    for (field, path) in files {
        if let Some(path) = path
            && let Err(error) = std::fs::read(path)
        {
            let field = format!("users[{name}].user.{field}");
            return Err(FieldProblem::new(field, format!("names `{path}`, which cannot be read: {error}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
apiVersion: v1
kind: Config
current-context: here
contexts:
- name: here
  context: {cluster: lab, user: node}
clusters:
- name: lab
  cluster: {server: 'https://192.0.2.1:6443', insecure-skip-tls-verify: true}
users:
- name: node
  user: {token: secret}
";

    /// The result of loading. The temporary directory is replaced by `DIR`.
    async fn load(text: &str) -> Result<Config, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        std::fs::write(&path, text).unwrap();
        let error = match Credentials::Kubeconfig(path).load().await {
            Ok(config) => return Ok(config),
            Err(error) => error.to_string(),
        };
        Err(error.replace(&directory.path().display().to_string(), "DIR"))
    }

    #[tokio::test]
    async fn a_valid_file_yields_the_server() {
        assert_eq!(load(GOOD).await.unwrap().cluster_url, "https://192.0.2.1:6443/");
    }

    #[tokio::test]
    async fn an_error_names_the_file_and_the_field() {
        let cases = [
            (
                "current-context: here",
                "current-context: there",
                "`current-context` names `there`, which is not in `contexts`",
            ),
            ("current-context: here", "", "`current-context` is not set"),
            (
                "cluster: lab",
                "cluster: x",
                "`contexts[here].context.cluster` names `x`, which is not in `clusters`",
            ),
            ("user: node}", "user: x}", "`contexts[here].context.user` names `x`, which is not in `users`"),
            ("server: 'https://192.0.2.1:6443', ", "", "`clusters[lab].cluster.server` is not set"),
            (
                "https://192.0.2.1:6443",
                "https://[",
                "`clusters[lab].cluster.server` is `https://[`: invalid authority",
            ),
            (
                "https://192.0.2.1:6443",
                "192.0.2.1:6443",
                "`clusters[lab].cluster.server` is `192.0.2.1:6443`, which starts with neither https:// nor http://",
            ),
            (
                "insecure-skip-tls-verify: true",
                "certificate-authority: ca.crt",
                "`clusters[lab].cluster.certificate-authority` cannot be used: failed to load certificate authority: failed to read file '\"DIR/ca.crt\"': No such file or directory (os error 2)",
            ),
            (
                "token: secret",
                "tokenFile: token",
                "`users[node].user.tokenFile` names `DIR/token`, which cannot be read: No such file or directory (os error 2)",
            ),
        ];
        for (good, bad, expected) in cases {
            let error = load(&GOOD.replace(good, bad)).await.unwrap_err();
            assert_eq!(error, format!("kubeconfig `DIR/kubeconfig`: {expected}"));
        }
    }

    #[tokio::test]
    async fn a_file_that_is_not_a_kubeconfig_is_an_error() {
        let error = load("clusters: 5").await.unwrap_err();
        assert!(error.starts_with("`DIR/kubeconfig` is not a kubeconfig: "), "{error}");
        let missing = Credentials::Kubeconfig("/nonexistent/kubeconfig".into()).load().await.unwrap_err();
        assert_eq!(missing.to_string(), "cannot read kubeconfig `/nonexistent/kubeconfig`");
    }
}
