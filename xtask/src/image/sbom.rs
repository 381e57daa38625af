//! The image's bill of materials, in the form of CycloneDX.
//!
//! In: the output of `cargo metadata`, and the libraries beside the program. Out: JSON that depends on nothing else, so
//! that the same image has the same bill. It lacks macros and build scripts, because they are not in the program.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{architecture::Architecture, machine::Machine, process};

/// The program's package.
const PROGRAM: &str = "proxy-user";

/// A library in the image.
pub(super) struct Library {
    pub(super) path: String,
    /// The package of the distribution, and its version where that is known.
    pub(super) package: Option<(String, Option<String>)>,
    pub(super) digest: String,
}

impl Library {
    pub(super) fn new(path: &str, content: &[u8], package: Option<(String, Option<String>)>) -> Self {
        let digest = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { path: path.to_owned(), package, digest }
    }
}

/// Fields of `cargo metadata`.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
    targets: Vec<Target>,
}

impl Package {
    /// Whether the compiler loads the package, instead of linking it into the program.
    fn is_macro(&self) -> bool {
        self.targets.iter().any(|target| target.kind.iter().any(|kind| kind == "proc-macro"))
    }

    fn url(&self) -> String {
        format!("pkg:cargo/{}@{}", self.name, self.version)
    }
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Deserialize)]
struct DependencyKind {
    /// `build` or `dev`; `None` for an ordinary dependency.
    kind: Option<String>,
}

/// The bill of the image for one architecture.
///
/// # Errors
///
/// When cargo cannot list the program's packages.
pub(super) fn bill(machine: &Machine, architecture: Architecture, libraries: &[Library]) -> Result<Vec<u8>> {
    let mut cargo = machine.cargo();
    cargo.args(["metadata", "--format-version=1", "--locked", "--filter-platform", architecture.target()]);
    let metadata =
        serde_json::from_str(&process::read(&mut cargo)?).context("reading the output of cargo")?;
    let lock = std::fs::read_to_string(machine.workspace.join("Cargo.lock")).context("Cargo.lock")?;
    let mut bytes = serde_json::to_vec_pretty(&document(&metadata, &checksums(&lock), libraries)?)?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn document(
    metadata: &Metadata,
    checksums: &BTreeMap<(String, String), String>,
    libraries: &[Library],
) -> Result<Value> {
    let packages: BTreeMap<&str, &Package> = metadata.packages.iter().map(|it| (&*it.id, it)).collect();
    let program = metadata.packages.iter().find(|package| package.name == PROGRAM);
    let program = program.with_context(|| format!("cargo lists no package {PROGRAM}"))?;
    let linked = linked(program, &packages, &metadata.resolve);
    let mut crates: Vec<&Package> =
        linked.keys().filter(|id| **id != program.id).filter_map(|id| packages.get(id).copied()).collect();
    crates.sort_by_key(|package| package.url());
    let mut components: Vec<Value> = crates.iter().map(|package| component(package, checksums)).collect();
    components.extend(libraries.iter().map(shared_library));
    let url = |id: &str| packages.get(id).map(|package| package.url());
    let mut dependencies: Vec<Value> = linked
        .iter()
        .filter_map(|(id, on)| {
            let mut on: Vec<String> = on.iter().filter_map(|id| url(id)).collect();
            on.sort();
            Some(json!({"ref": url(id)?, "dependsOn": on}))
        })
        .collect();
    dependencies.sort_by_key(|dependency| dependency["ref"].to_string());
    Ok(json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {
            "type": "application",
            "bom-ref": program.url(),
            "name": "weir",
            "version": program.version,
            "licenses": license(program),
        }},
        "components": components,
        "dependencies": dependencies,
    }))
}

/// The packages that are linked into the program, by id, each with its own dependencies.
fn linked<'a>(
    program: &'a Package,
    packages: &BTreeMap<&'a str, &'a Package>,
    resolve: &'a Resolve,
) -> BTreeMap<&'a str, BTreeSet<&'a str>> {
    let nodes: BTreeMap<&str, &Node> = resolve.nodes.iter().map(|node| (&*node.id, node)).collect();
    let mut linked = BTreeMap::new();
    let mut waiting = vec![&*program.id];
    while let Some(id) = waiting.pop() {
        if linked.contains_key(id) {
            continue;
        }
        let ordinary = |dependency: &&Dependency| dependency.dep_kinds.iter().any(|it| it.kind.is_none());
        let is_linked = |id: &&str| packages.get(id).is_some_and(|package| !package.is_macro());
        let dependencies = nodes.get(id).into_iter().flat_map(|node| &node.deps).filter(ordinary);
        let on: BTreeSet<&str> = dependencies.map(|dependency| &*dependency.pkg).filter(is_linked).collect();
        waiting.extend(&on);
        linked.insert(id, on);
    }
    linked
}

fn component(package: &Package, checksums: &BTreeMap<(String, String), String>) -> Value {
    let mut component = json!({
        "type": "library",
        "bom-ref": package.url(),
        "name": package.name,
        "version": package.version,
        "licenses": license(package),
    });
    // A crate of this workspace is in no registry.
    if package.source.is_some() {
        component["purl"] = package.url().into();
    }
    if let Some(checksum) = checksums.get(&(package.name.clone(), package.version.clone())) {
        component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
    }
    component
}

fn license(package: &Package) -> Value {
    // Old crates write a slash for "or".
    let expression = package.license.as_ref().map(|license| license.replace('/', " OR "));
    expression.map_or_else(|| json!([]), |expression| json!([{"expression": expression}]))
}

fn shared_library(library: &Library) -> Value {
    let Library { path, package, digest } = library;
    let mut component = json!({
        "type": "library",
        "bom-ref": format!("file:/{path}"),
        "name": path.rsplit('/').next(),
        "hashes": [{"alg": "SHA-256", "content": digest}],
    });
    if let Some((package, version)) = package {
        let at = version.as_ref().map(|version| format!("@{version}")).unwrap_or_default();
        component["purl"] = format!("pkg:deb/debian/{package}{at}").into();
        component["version"] = json!(version);
    }
    component
}

/// Cargo.lock's checksum of each crate, by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let of = |block: &str| {
        let field = |name: &str| {
            let line = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \""))?;
            Some(line.strip_suffix('"')?.to_owned())
        };
        Some(((field("name")?, field("version")?), field("checksum")?))
    };
    lock.split("[[package]]").filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Value {
        let machine = Machine::discover().unwrap();
        let library =
            Library::new("lib/libc.so.6", b"c", Some(("libc6".to_owned(), Some("2.36".to_owned()))));
        let own = Architecture::own().unwrap();
        let [first, second] = [(); 2].map(|()| bill(&machine, own, std::slice::from_ref(&library)).unwrap());
        assert!(first == second, "the same image has the same bill");
        serde_json::from_slice(&first).unwrap()
    }

    #[test]
    fn the_bill_has_what_is_in_the_image_and_nothing_else() {
        let bill = document();
        let components = bill["components"].as_array().unwrap();
        let named = |name: &str| components.iter().find(|component| component["name"] == name);
        let tokio = named("tokio").expect("a linked crate is in the bill");
        assert_eq!(tokio["hashes"][0]["content"].as_str().map(str::len), Some(64));
        assert_eq!(tokio["licenses"][0]["expression"], "MIT");
        assert!(tokio["purl"].as_str().unwrap().starts_with("pkg:cargo/tokio@1."));
        for other in ["proptest", "insta", "clap_derive", "syn", "aya-build"] {
            assert!(named(other).is_none(), "{other} is not in the program");
        }
        assert_eq!(named("libc.so.6").unwrap()["purl"], "pkg:deb/debian/libc6@2.36");
        assert_eq!(bill["metadata"]["component"]["name"], "weir");
    }

    #[test]
    fn every_dependency_is_in_the_bill() {
        let bill = document();
        let refs = |list: &Value| -> BTreeSet<String> {
            list.as_array().unwrap().iter().map(|it| it["bom-ref"].as_str().unwrap().to_owned()).collect()
        };
        let mut known = refs(&bill["components"]);
        known.insert(bill["metadata"]["component"]["bom-ref"].as_str().unwrap().to_owned());
        for dependency in bill["dependencies"].as_array().unwrap() {
            let on = dependency["dependsOn"].as_array().unwrap().iter().chain([&dependency["ref"]]);
            on.for_each(|one| assert!(known.contains(one.as_str().unwrap()), "{one}"));
        }
    }
}
