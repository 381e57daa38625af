//! `weir plan`: the state that a data plane would have, as a table or as JSON and YAML.
//!
//! In: a [`State`], and the service port that owns each frontend. Out: the text to print.

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde::Serialize;

use crate::{
    dataplane::{Installed, InstalledFrontend, Outcome, State},
    plan::{Frontend, PortId},
};

/// The format of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Columns, for people
    #[default]
    Table,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// The text of a table cell without a value.
const NONE: &str = "<none>";

/// How many backends a table lists. More are only counted.
const NAMED: usize = 3;

/// The state to print, one row for each frontend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlanView {
    frontends: Vec<Row>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    frontend: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<String>,
    from_pod: Cell,
    from_host: Cell,
    from_outside: Cell,
    #[serde(skip_serializing_if = "Option::is_none")]
    affinity_seconds: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allowed_sources: Option<Vec<String>>,
    /// Whether this node answers the DNS queries to this frontend as long as its DNS server runs.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    answered_here: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Cell {
    action: Action,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    backends: Vec<String>,
    masquerade: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Forward,
    Reject,
    Drop,
    Packets,
}

/// The Service named by `--service` has no frontend.
#[derive(Debug, thiserror::Error)]
#[error("the Service `{0}` has no frontend on this node")]
pub struct NoSuchService(String);

impl PlanView {
    /// The rows of `state`. `owners` has the service port that each frontend belongs to. With `service`
    /// (`NAMESPACE/NAME`) only the rows of that Service.
    ///
    /// # Errors
    ///
    /// When `service` is given and has no frontend.
    pub fn new(
        state: &State,
        owners: &BTreeMap<Frontend, PortId>,
        service: Option<&str>,
    ) -> Result<Self, NoSuchService> {
        let frontends: Vec<Row> = (state.frontends.iter())
            .map(|(frontend, installed)| Row::new(frontend, installed, owners.get(frontend)))
            .filter(|row| service.is_none() || row.service.as_deref() == service)
            .collect();
        match service {
            Some(service) if frontends.is_empty() => Err(NoSuchService(service.to_owned())),
            _ => Ok(Self { frontends }),
        }
    }

    /// The text to print, with a newline at its end. Nothing is truncated to the terminal's width.
    ///
    /// # Errors
    ///
    /// When JSON or YAML cannot be made, which does not happen for this type.
    pub fn render(&self, output: Output) -> anyhow::Result<String> {
        Ok(match output {
            Output::Table => super::columns(&HEADER, self.frontends.iter().map(Row::cells)),
            Output::Json => format!("{}\n", serde_json::to_string_pretty(self)?),
            Output::Yaml => serde_yaml_ng::to_string(self)?,
        })
    }
}

const HEADER: [&str; 7] =
    ["FRONTEND", "SERVICE", "FROM-POD", "FROM-HOST", "FROM-OUTSIDE", "AFFINITY", "SOURCES"];

impl Row {
    fn new(frontend: &Frontend, installed: &InstalledFrontend, owner: Option<&PortId>) -> Self {
        let InstalledFrontend { pod, host, outside, affinity, allowed_sources, answered_here } = installed;
        Self {
            frontend: frontend.to_string(),
            service: owner.map(|port| port.service.to_string()),
            port: owner.map(|port| port.port.to_string()).filter(|name| !name.is_empty()),
            from_pod: Cell::new(pod),
            from_host: Cell::new(host),
            from_outside: Cell::new(outside),
            affinity_seconds: *affinity,
            allowed_sources: allowed_sources
                .as_ref()
                .map(|them| them.iter().map(ToString::to_string).collect()),
            answered_here: *answered_here,
        }
    }

    fn cells(&self) -> Vec<String> {
        let Self {
            frontend,
            service,
            port,
            from_pod,
            from_host,
            from_outside,
            affinity_seconds,
            allowed_sources,
            answered_here,
        } = self;
        let frontend = if *answered_here {
            format!("{frontend} (answered on this node first)")
        } else {
            frontend.clone()
        };
        let owner = match (service, port) {
            (None, _) => NONE.to_owned(),
            (Some(service), None) => service.clone(),
            (Some(service), Some(port)) => format!("{service}:{port}"),
        };
        [
            frontend,
            owner,
            from_pod.text(),
            from_host.text(),
            from_outside.text(),
            affinity_seconds.map_or_else(|| NONE.to_owned(), |seconds| format!("{seconds}s")),
            allowed_sources.as_ref().map_or_else(|| "any".to_owned(), |sources| sources.join(",")),
        ]
        .to_vec()
    }
}

impl Cell {
    fn new(installed: &Installed) -> Self {
        let (action, backends) = match &installed.outcome {
            Outcome::Backends(them) => (Action::Forward, them.iter().map(ToString::to_string).collect()),
            Outcome::Reject => (Action::Reject, Vec::new()),
            Outcome::Drop => (Action::Drop, Vec::new()),
            Outcome::Packets => (Action::Packets, Vec::new()),
        };
        Self { action, backends, masquerade: installed.masquerade && action == Action::Forward }
    }

    fn text(&self) -> String {
        let mut text = match self.action {
            Action::Reject => "reject".to_owned(),
            Action::Drop => "drop".to_owned(),
            Action::Packets => "left to nftables".to_owned(),
            Action::Forward => self.backends.iter().take(NAMED).cloned().collect::<Vec<_>>().join(","),
        };
        if self.backends.len() > NAMED {
            text += &format!(" + {} more", self.backends.len() - NAMED);
        }
        if self.masquerade {
            text += " (masquerade)";
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Family, ObjectName, Protocol},
        plan::{Backend, Destination},
    };

    fn frontend(destination: Destination, port: u16) -> Frontend {
        Frontend { destination, protocol: Protocol::Tcp, port }
    }

    fn to(count: u8, masquerade: bool) -> Installed {
        let backend = |n| Backend { address: [10, 244, 0, n].into(), port: 8080, local: false };
        Installed { outcome: Outcome::Backends((1..=count).map(backend).collect()), masquerade }
    }

    fn state() -> (State, BTreeMap<Frontend, PortId>) {
        let web = frontend(Destination::Address([10, 96, 0, 1].into()), 80);
        let node = frontend(Destination::NodePort(Family::V4), 30080);
        let idle = frontend(Destination::Address("fd00:96::1".parse().unwrap()), 443);
        let rejected = Installed { outcome: Outcome::Reject, masquerade: true };
        let plain = |pod: Installed, host: Installed, outside: Installed| InstalledFrontend {
            pod,
            host,
            outside,
            affinity: None,
            allowed_sources: None,
            answered_here: false,
        };
        let mut affine = plain(to(2, false), to(2, true), to(6, true));
        affine.affinity = Some(10800);
        affine.allowed_sources =
            Some(vec!["192.0.2.0/24".parse().unwrap(), "203.0.113.0/24".parse().unwrap()]);
        let dropped = Installed { outcome: Outcome::Drop, masquerade: false };
        let frontends = [
            (web, affine),
            (node, plain(to(1, false), to(1, true), dropped)),
            (idle, plain(rejected.clone(), rejected.clone(), rejected)),
        ];
        let id = |service: &str, port: &str, family| PortId {
            service: ObjectName::new("default", service),
            port: port.into(),
            protocol: Protocol::Tcp,
            family,
        };
        let owners = [
            (web, id("web", "http", Family::V4)),
            (node, id("web", "http", Family::V4)),
            (idle, id("idle", "", Family::V6)),
        ];
        (State { frontends: frontends.into(), cluster_ips: Vec::new() }, owners.into())
    }

    #[test]
    fn a_table_has_a_row_for_each_frontend() {
        let (state, owners) = state();
        let view = PlanView::new(&state, &owners, None).unwrap();
        insta::assert_snapshot!(view.render(Output::Table).unwrap(), @r"
            FRONTEND               SERVICE            FROM-POD                          FROM-HOST                                      FROM-OUTSIDE                                                            AFFINITY   SOURCES
            10.96.0.1:80/TCP       default/web:http   10.244.0.1:8080,10.244.0.2:8080   10.244.0.1:8080,10.244.0.2:8080 (masquerade)   10.244.0.1:8080,10.244.0.2:8080,10.244.0.3:8080 + 3 more (masquerade)   10800s     192.0.2.0/24,203.0.113.0/24
            [fd00:96::1]:443/TCP   default/idle       reject                            reject                                         reject                                                                  <none>     any
            node:30080/TCP         default/web:http   10.244.0.1:8080                   10.244.0.1:8080 (masquerade)                   drop                                                                    <none>     any
        ");
    }

    #[test]
    fn yaml_and_json_hold_the_same_values() {
        let (state, owners) = state();
        let view = PlanView::new(&state, &owners, Some("default/web")).unwrap();
        let yaml = view.render(Output::Yaml).unwrap();
        insta::assert_snapshot!(yaml, @r"
            frontends:
            - frontend: 10.96.0.1:80/TCP
              service: default/web
              port: http
              fromPod:
                action: forward
                backends:
                - 10.244.0.1:8080
                - 10.244.0.2:8080
                masquerade: false
              fromHost:
                action: forward
                backends:
                - 10.244.0.1:8080
                - 10.244.0.2:8080
                masquerade: true
              fromOutside:
                action: forward
                backends:
                - 10.244.0.1:8080
                - 10.244.0.2:8080
                - 10.244.0.3:8080
                - 10.244.0.4:8080
                - 10.244.0.5:8080
                - 10.244.0.6:8080
                masquerade: true
              affinitySeconds: 10800
              allowedSources:
              - 192.0.2.0/24
              - 203.0.113.0/24
            - frontend: node:30080/TCP
              service: default/web
              port: http
              fromPod:
                action: forward
                backends:
                - 10.244.0.1:8080
                masquerade: false
              fromHost:
                action: forward
                backends:
                - 10.244.0.1:8080
                masquerade: true
              fromOutside:
                action: drop
                masquerade: false
        ");
        let json: serde_json::Value = serde_json::from_str(&view.render(Output::Json).unwrap()).unwrap();
        assert_eq!(serde_yaml_ng::from_str::<serde_json::Value>(&yaml).unwrap(), json);
    }

    #[test]
    fn a_service_without_frontends_is_an_error() {
        let (state, owners) = state();
        let error = PlanView::new(&state, &owners, Some("default/none")).unwrap_err();
        assert_eq!(error.to_string(), "the Service `default/none` has no frontend on this node");
    }
}
