//! Programs and schemas that check the chart: helm, kubeconform, and the schemas of the objects that the chart makes.
//!
//! The programs are built from the Go module `tests/chart`, which pins their versions. The schemas come from the modules
//! that define the objects, Kubernetes and the Prometheus operator, because kubeconform's default sites may be out of
//! reach, and have the schemas of another version.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use super::{archive, go, kubernetes, level::Level};
use crate::machine::{Machine, is_executable};

const MODULE: &str = "tests/chart";

/// A program of the module.
pub(super) struct Program {
    name: &'static str,
    version: &'static str,
    module: &'static str,
    package: &'static str,
    takes: &'static str,
}

pub(super) const HELM: Program = Program {
    name: "helm",
    version: "4.3.1",
    module: "helm.sh/helm/v4",
    package: "helm.sh/helm/v4/cmd/helm",
    takes: "two minutes",
};
pub(super) const KUBECONFORM: Program = Program {
    name: "kubeconform",
    version: "0.8.0",
    module: "github.com/yannh/kubeconform",
    package: "github.com/yannh/kubeconform/cmd/kubeconform",
    takes: "half a minute",
};

/// Sources of definitions: the module that pins the version, the module with the file, and the file.
const KUBERNETES: [&str; 3] = ["tests/kubernetes", "k8s.io/kubernetes", "api/openapi-spec/swagger.json"];
const MONITORS: [[&str; 3]; 2] = [
    operator("example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"),
    operator("example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml"),
];

const fn operator(file: &'static str) -> [&'static str; 3] {
    [MODULE, "github.com/prometheus-operator/prometheus-operator", file]
}

impl Program {
    fn file(&self, machine: &Machine) -> PathBuf {
        machine.cache.join(format!("{}-{}", self.name, self.version)).join(self.name)
    }
}

/// helm and kubeconform.
pub(crate) fn tools(machine: &Machine) -> [PathBuf; 2] {
    [HELM.file(machine), KUBECONFORM.file(machine)]
}

/// The directory of the schemas. Its name has the version and the set, so that no other schemas are used by mistake.
pub(crate) fn schemas(machine: &Machine) -> PathBuf {
    machine.cache.join(format!("schemas-v{}-monitors", kubernetes::KUBERNETES))
}

/// Whether a program or the schemas have to be made.
pub(super) fn lacks_any(machine: &Machine) -> bool {
    tools(machine).iter().any(|tool| !is_executable(tool)) || !schemas(machine).exists()
}

pub(super) fn missing_program(machine: &Machine, program: &Program) -> Option<String> {
    let Program { name, version, takes, .. } = program;
    let exists = is_executable(&program.file(machine));
    (!exists).then(|| format!("{name} {version} (built from source, {takes} the first time)"))
}

pub(super) fn build_program(machine: &Machine, program: &Program) -> Result<()> {
    let flags = format!("-s -w -X {}/internal/version.version=v{}", program.module, program.version);
    go::build(machine, MODULE, program.package, &program.file(machine), &flags)
}

pub(super) fn missing_schemas(machine: &Machine, _: Level) -> Result<Option<String>> {
    let exists = schemas(machine).exists();
    Ok((!exists).then(|| format!("schemas of Kubernetes {} (from its sources)", kubernetes::KUBERNETES)))
}

pub(super) fn install_schemas(machine: &Machine, _: Level) -> Result<()> {
    let file = |[pinned_by, module, file]: [&str; 3]| -> Result<String> {
        let file = go::sources(machine, pinned_by, module)?.join(file);
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    };
    let mut all = kubernetes_schemas(serde_json::from_str(&file(KUBERNETES)?)?)?;
    for monitor in MONITORS {
        all.extend(custom_schemas(&serde_yaml_ng::from_str(&file(monitor)?)?)?);
    }
    archive::whole(&schemas(machine), |draft| write(draft, &all))
}

fn write(directory: &Path, all: &BTreeMap<String, Value>) -> Result<()> {
    for (name, schema) in all {
        fs::write(directory.join(name), serde_json::to_vec(schema)?)?;
    }
    Ok(())
}

/// The schema of every kind in Kubernetes' OpenAPI description, by the file name that kubeconform reads, and the file of
/// definitions that all of them refer to.
fn kubernetes_schemas(mut description: Value) -> Result<BTreeMap<String, Value>> {
    let Value::Object(mut definitions) = description["definitions"].take() else {
        anyhow::bail!("Kubernetes' description has no definitions");
    };
    definitions.values_mut().for_each(strict);
    // The description has strings here, and the API server takes numbers too.
    for (name, also) in [
        ("io.k8s.apimachinery.pkg.util.intstr.IntOrString", "integer"),
        ("io.k8s.apimachinery.pkg.api.resource.Quantity", "number"),
    ] {
        definitions.insert(name.to_owned(), json!({"type": ["string", also]}));
    }
    let mut all = BTreeMap::new();
    for (name, definition) in &definitions {
        for kind in definition["x-kubernetes-group-version-kind"].as_array().into_iter().flatten() {
            let [group, version, kind] =
                ["group", "version", "kind"].map(|it| kind[it].as_str().unwrap_or_default());
            all.insert(
                file_name(group, version, kind),
                json!({"$ref": format!("definitions.json#/definitions/{name}")}),
            );
        }
    }
    all.insert("definitions.json".to_owned(), json!({"definitions": definitions}));
    Ok(all)
}

/// The schemas of a CustomResourceDefinition.
fn custom_schemas(definition: &Value) -> Result<BTreeMap<String, Value>> {
    let spec = &definition["spec"];
    let [group, kind] = [&spec["group"], &spec["names"]["kind"]].map(|it| it.as_str().unwrap_or_default());
    let versions = spec["versions"].as_array().context("a definition without versions")?;
    let schema = |version: &Value| {
        let mut schema = version["schema"]["openAPIV3Schema"].clone();
        schema["properties"]["metadata"] =
            json!({"$ref": "definitions.json#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"});
        strict(&mut schema);
        (file_name(group, version["name"].as_str().unwrap_or_default(), kind), schema)
    };
    Ok(versions.iter().map(schema).collect())
}

/// The file name that kubeconform reads: kind, first word of the group, version.
fn file_name(group: &str, version: &str, kind: &str) -> String {
    let group = group.split('.').next().filter(|word| !word.is_empty());
    let suffix = group.map_or(version.to_owned(), |group| format!("{group}-{version}"));
    format!("{kind}-{suffix}.json").to_lowercase()
}

/// Makes `schema` and its parts refuse unknown fields, which kubeconform's `--strict` needs.
fn strict(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            close(fields);
            fields.values_mut().for_each(strict);
        }
        Value::Array(several) => several.iter_mut().for_each(strict),
        _ => {}
    }
}

fn close(fields: &mut Map<String, Value>) {
    let open = fields.contains_key("additionalProperties")
        || fields.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    // A field may have the name `properties` too; a list of fields is an object, and its schema has the type object.
    if !open
        && fields.get("type") == Some(&json!("object"))
        && fields.get("properties").is_some_and(Value::is_object)
    {
        fields.insert("additionalProperties".to_owned(), Value::Bool(false));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_pins_the_versions_that_the_cache_is_named_after() {
        let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(MODULE).join("go.mod");
        let module = fs::read_to_string(module).unwrap();
        for Program { module: path, version, .. } in [HELM, KUBECONFORM] {
            assert!(module.contains(&format!("\t{path} v{version}\n")), "{path} {version}: {module}");
        }
    }

    #[test]
    fn kinds_are_found_where_kubeconform_looks_and_refuse_unknown_fields() {
        let all = kubernetes_schemas(json!({"definitions": {
            "io.k8s.api.apps.v1.DaemonSet": {
                "type": "object",
                "properties": {"spec": {"type": "object", "properties": {"a": {"type": "string"}}},
                               "labels": {"type": "object", "additionalProperties": {"type": "string"}}},
                "x-kubernetes-group-version-kind": [{"group": "apps", "version": "v1", "kind": "DaemonSet"}]}}}))
        .unwrap();
        let reference = "definitions.json#/definitions/io.k8s.api.apps.v1.DaemonSet";
        assert_eq!(all["daemonset-apps-v1.json"], json!({"$ref": reference}));
        let set = &all["definitions.json"]["definitions"]["io.k8s.api.apps.v1.DaemonSet"];
        assert_eq!(set["additionalProperties"], false);
        assert_eq!(set["properties"]["spec"]["additionalProperties"], false);
        assert_eq!(set["properties"]["labels"]["additionalProperties"], json!({"type": "string"}));
        assert!(set["properties"].get("additionalProperties").is_none());
        assert_eq!(file_name("", "v1", "ConfigMap"), "configmap-v1.json");
        assert_eq!(file_name("rbac.authorization.k8s.io", "v1", "ClusterRole"), "clusterrole-rbac-v1.json");
    }
}
