//! Scenarios: text files with what happens to a cluster and what a data plane holds after it.
//!
//! In: a file of `tests/scenarios`. Out: its [`Scenario`], and data planes' states in the lines such a file expects.
//!
//! ```text
//! # What this is about, with the rules it shows.
//! masquerade-all: true                    settings, one a line; see `Setting`
//! == apply what happens                   YAML documents, all in one delta
//! == delete service default/web
//! == host 192.0.2.1 2001:db8::1           the addresses that this host has now
//! == stop                                 what follows happens while no agent runs
//! == restart                              a new process finds the old one's data plane
//! == expect why                           and what is there then:
//! cluster-ips 10.96.0.10
//! 10.96.0.10:80/TCP pod=10.244.0.2:8080* host,outside=10.244.0.2:8080*(masquerade)
//! == maps                                 what the maps of the sockets' plane hold then; see `Maps`
//! frontend 10.96.0.10 cluster-ip
//! ```
//!
//! A `*` marks endpoints that are on this node, or may be because their slice names none.

use std::{fmt::Write as _, net::IpAddr};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, de::DeserializeOwned};
use serde_yaml_ng::Value;
use weir::{
    dataplane::{Installed, InstalledFrontend, Outcome, State},
    model::{Change, DetectLocal, Kind, NodePortSetting, Object, ObjectName, Settings},
};

#[derive(Debug)]
pub struct Scenario {
    pub settings: Settings,
    /// The lines before the first step.
    pub preamble: String,
    pub steps: Vec<Step>,
}

/// One section of a file.
#[derive(Debug)]
pub struct Step {
    /// The line that the section starts on, counted from 1.
    pub line: usize,
    /// That line.
    pub title: String,
    /// The lines after the title.
    pub body: String,
    /// The meaning of title and body.
    pub action: Action,
}

#[derive(Debug)]
pub enum Action {
    Change(Vec<Change>),
    /// The host has these addresses.
    Host(Vec<IpAddr>),
    Stop,
    Restart,
    /// The data plane holds the body.
    Expect,
    /// The maps hold the body.
    Maps,
}

impl Scenario {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// When it is not of the form above; with the line.
    pub fn parse(text: &str) -> Result<Self> {
        let mut preamble = String::new();
        let mut sections: Vec<(usize, &str, String)> = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            match sections.last_mut() {
                _ if text.starts_with("== ") => sections.push((line, text, String::new())),
                Some((.., body)) => writeln!(body, "{text}")?,
                None => writeln!(preamble, "{text}")?,
            }
        }
        let settings = settings(&preamble)?;
        let step = |(line, title, body): (usize, &str, String)| {
            let action = action(title, &body).with_context(|| format!("line {line}: {title}"))?;
            Ok(Step { line, title: title.to_owned(), body, action })
        };
        let steps = sections.into_iter().map(step).collect::<Result<_>>()?;
        Ok(Self { settings, preamble, steps })
    }

    /// The steps that expect something.
    pub fn expectations(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|step| matches!(step.action, Action::Expect | Action::Maps))
    }

    /// The file's text, with what is `seen` in place of the expectations; those of which nothing was seen stay.
    #[must_use]
    pub fn rewritten(&self, seen: &[Option<String>]) -> String {
        let mut seen = seen.iter();
        let mut text = self.preamble.clone();
        for step in &self.steps {
            let body = match step.action {
                Action::Expect | Action::Maps => seen.next().and_then(Option::as_ref),
                _ => None,
            };
            text.extend([step.title.as_str(), "\n", body.unwrap_or(&step.body)]);
        }
        text
    }
}

fn settings(preamble: &str) -> Result<Settings> {
    let networks = |value: &str| value.split_whitespace().map(str::parse).collect::<Result<Vec<_>, _>>();
    let mut settings = Settings {
        node_name: "node-a".to_owned(),
        detect_local: DetectLocal::ClusterCidr(networks("10.244.0.0/16 fd00:10:244::/48")?),
        node_port_addresses: NodePortSetting::ALL,
        ..Settings::default()
    };
    for line in preamble.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (key, value) = line.split_once(": ").context("a setting is not of the form `key: value`")?;
        match (key, value) {
            ("detect-local", "none") => settings.detect_local = DetectLocal::ClusterCidr(Vec::new()),
            ("detect-local", "node-cidr") => settings.detect_local = DetectLocal::NodeCidr,
            ("masquerade-all", value) => settings.masquerade_all = value.parse()?,
            ("external-ips", value) => settings.external_ips = value.parse()?,
            ("node-port-addresses", "primary") => settings.node_port_addresses = NodePortSetting::PRIMARY,
            ("node-port-addresses", value) => {
                settings.node_port_addresses = NodePortSetting::of(networks(value)?);
            }
            _ => bail!("unknown setting `{line}`"),
        }
    }
    Ok(settings)
}

fn action(title: &str, body: &str) -> Result<Action> {
    let mut words = title.split_whitespace().skip(1);
    Ok(match words.next() {
        Some("apply") => {
            let documents = serde_yaml_ng::Deserializer::from_str(body)
                .map(|document| Ok(Change::Apply(object(Value::deserialize(document)?)?)));
            Action::Change(documents.collect::<Result<_>>()?)
        }
        Some("delete") => {
            let kind = words.next().unwrap_or_default();
            let kind = Kind::ALL.into_iter().find(|known| known.as_str().eq_ignore_ascii_case(kind));
            let name = words.next().context("what is deleted has no name")?;
            let (namespace, name) = name.split_once('/').unwrap_or(("", name));
            let name = ObjectName::new(namespace, name);
            Action::Change(vec![Change::Delete(kind.context("no such kind")?, name)])
        }
        Some("host") => Action::Host(words.map(str::parse).collect::<Result<_, _>>()?),
        Some("stop") => Action::Stop,
        Some("restart") => Action::Restart,
        Some("expect") => Action::Expect,
        Some("maps") => Action::Maps,
        _ => bail!("no such step"),
    })
}

fn object(value: Value) -> Result<Object> {
    fn read<T: DeserializeOwned>(value: Value) -> Result<Box<T>> {
        Ok(Box::new(serde_yaml_ng::from_value(value)?))
    }
    Ok(match value.get("kind").and_then(Value::as_str).unwrap_or_default() {
        "Service" => Object::Service(read(value)?),
        "EndpointSlice" => Object::EndpointSlice(read(value)?),
        "Node" => Object::Node(read(value)?),
        "ServiceCIDR" => Object::ServiceCidr(read(value)?),
        kind => bail!("unknown kind `{kind}`"),
    })
}

/// The content of a data plane, in the lines of an expectation; NodePorts answer on `node_ips`.
#[must_use]
pub fn render(state: &State, node_ips: &[IpAddr]) -> String {
    let mut text = String::new();
    for (name, addresses) in [("node-ips", node_ips), ("cluster-ips", &state.cluster_ips)] {
        if !addresses.is_empty() {
            text.push_str(name);
            addresses.iter().for_each(|address| text.extend([" ", &address.to_string()]));
            text.push('\n');
        }
    }
    for (frontend, installed) in &state.frontends {
        text.push_str(&frontend.to_string());
        installed_frontend(&mut text, installed);
        text.push('\n');
    }
    text
}

fn installed_frontend(text: &mut String, frontend: &InstalledFrontend) {
    let mut classes: Vec<(String, &Installed)> = Vec::new();
    for (class, installed) in
        [("pod", &frontend.pod), ("host", &frontend.host), ("outside", &frontend.outside)]
    {
        match classes.iter_mut().find(|(_, known)| *known == installed) {
            Some((classes, _)) => classes.extend([",", class]),
            None => classes.push((class.to_owned(), installed)),
        }
    }
    for (classes, installed) in classes {
        text.extend([" ", &classes, "="]);
        match &installed.outcome {
            Outcome::Reject => text.push_str("reject"),
            Outcome::Drop => text.push_str("drop"),
            Outcome::Packets => text.push_str("packets"),
            Outcome::Backends(backends) => {
                let star = |local| if local { "*" } else { "" };
                let backends = backends.iter().map(|backend| format!("{backend}{}", star(backend.local)));
                text.push_str(&backends.collect::<Vec<_>>().join(","));
            }
        }
        if installed.masquerade {
            text.push_str("(masquerade)");
        }
    }
    if let Some(seconds) = frontend.affinity {
        text.extend([" affinity=", &seconds.to_string()]);
    }
    if let Some(sources) = &frontend.allowed_sources {
        let sources: Vec<_> = sources.iter().map(ToString::to_string).collect();
        text.extend([" sources=", &sources.join(",")]);
    }
    if frontend.answered_here {
        text.push_str(" answered-here");
    }
}
