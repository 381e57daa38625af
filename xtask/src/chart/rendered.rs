//! The objects that helm renders from the chart.
//!
//! In: settings, as for `helm template --set`. Out: objects, as JSON.

use anyhow::{Context as _, Result};
use serde::Deserialize as _;
use serde_json::Value;

use crate::{machine::Machine, process, setup};

/// The chart's directory.
pub(super) const CHART: &str = "charts/weir";

/// The objects of a release in `namespace` with these settings.
pub(super) fn rendered(machine: &Machine, namespace: &str, settings: &[&str]) -> Result<Vec<Value>> {
    let [helm, _] = setup::chart_tools(machine);
    let mut command = machine.command(&helm);
    command.args([
        "template",
        "weir",
        CHART,
        "--namespace",
        namespace,
        "--set",
        "apiServer=https://192.0.2.1:6443",
    ]);
    for setting in settings {
        command.args(["--set", setting]);
    }
    let text = process::read(&mut command)?;
    let documents = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize);
    let documents = documents.collect::<Result<Vec<_>, _>>().context("reading the output of helm")?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

pub(super) fn named<'a>(objects: &'a [Value], kind: &str) -> Result<(&'a str, &'a Value)> {
    let object = objects.iter().find(|object| object["kind"] == kind);
    let object = object.with_context(|| format!("the chart makes no {kind}"))?;
    let name = object["metadata"]["name"].as_str().with_context(|| format!("a {kind} has no name"))?;
    Ok((name, object))
}

pub(super) fn pod(objects: &[Value]) -> Result<&Value> {
    Ok(&named(objects, "DaemonSet")?.1["spec"]["template"]["spec"])
}

pub(super) fn listed<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}
