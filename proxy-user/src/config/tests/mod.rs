//! Files and flags in; configuration, problems and warnings out.

use std::{io::Write as _, time::Duration};

use clap::Parser;
use ipnet::IpNet;
use tempfile::NamedTempFile;

use super::{
    Conntrack, DetectLocal, Error, Host, Loaded, LogConfig, LoopbackNodePorts, NodePortSetting, ProxyMode,
    RequestLimit, SourceConfig, flags::ConfigArgs, load,
};
use crate::model::PerFamily;

mod modes;
mod precedence;
mod refused;
mod settings;

#[derive(Parser)]
#[command(args_override_self = true)]
struct Line {
    #[command(flatten)]
    args: ConfigArgs,
}

fn host() -> Host {
    let families = PerFamily { v4: true, v6: true };
    Host { name: "Host-Name\n".to_owned(), families, cgroup_root: Some("/mounted/here".into()) }
}

/// Loads flags, split at blanks.
pub(super) fn flags(line: &str) -> Result<Loaded, Error> {
    let words = ["weir"].into_iter().chain(line.split_ascii_whitespace());
    load(&Line::try_parse_from(words).unwrap().args, &host())
}

/// Loads a file with these fields, with these flags beside it. Its path is replaced by `FILE` in the result.
pub(super) fn file_with(fields: &str, line: &str) -> Result<Loaded, String> {
    let mut file = NamedTempFile::new().unwrap();
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    write!(file, "{head}{fields}").unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    let mut loaded = flags(&format!("--config {path} {line}"))
        .map_err(|error| error.to_string().replace(&path, "FILE"))?;
    loaded.warnings.iter_mut().for_each(|warning| *warning = warning.replace(&path, "FILE"));
    Ok(loaded)
}

pub(super) fn file(fields: &str) -> Loaded {
    file_with(fields, "").unwrap()
}

fn refusal(fields: &str) -> String {
    file_with(fields, "").unwrap_err()
}
