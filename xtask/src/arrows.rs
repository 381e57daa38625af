//! Checks that imports between the rooms of the agent are in the table [`ARROWS`], so that they point one way.
//!
//! In: the source files of the crates in `proxy-user`. Out: each import that the table lacks, with its file.
//!
//! A room is a module at the top, or a module in `dataplane`. Tests may import every room. Paths inside macros and in
//! comments are not read.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use syn::{
    Attribute, File, Item, ItemMod, ItemUse, UseTree,
    visit::{self, Visit},
};

/// The source files of the agent, and of the crate that plans.
const SOURCES: [&str; 2] = ["proxy-user/src", "proxy-user/plan/src"];

/// The room whose modules are rooms themselves.
const WING: &str = "dataplane";

/// Each room, and the rooms that it may import. Rooms stand in order: none imports a room below itself.
const ARROWS: [(&str, &[&str]); 22] = [
    ("causes", &[]),
    ("connection_limit", &[]),
    ("model", &[]),
    ("plan", &["model"]),
    ("sys", &["model"]),
    ("config", &["model"]),
    ("source", &["causes", "model"]),
    ("observe", &["connection_limit", "model", "config"]),
    ("dataplane", &["model", "plan"]),
    ("dataplane/memory", &["model", "plan", "dataplane"]),
    ("dataplane/faulty", &["model", "plan", "dataplane"]),
    ("dataplane/stack", &["model", "plan", "dataplane"]),
    ("dataplane/nftables", &["sys", "model", "plan", "dataplane"]),
    ("dataplane/ebpf", &["causes", "sys", "model", "plan", "dataplane"]),
    ("optout", &["model", "source", "observe"]),
    ("dns", &["connection_limit", "model", "config", "source", "observe", "dataplane/nftables"]),
    ("relay", &["connection_limit", "model", "plan", "observe", "dataplane/ebpf"]),
    ("stale", &["sys", "model", "plan", "observe", "dataplane", "dataplane/nftables", "dataplane/ebpf"]),
    ("takeover", &["sys", "model"]),
    ("machine", &["sys", "model", "config", "dataplane", "dataplane/ebpf", "stale"]),
    ("cli", &["model", "config", "plan", "dns", "dataplane", "machine"]),
    ("run", &[]),
];

/// The room that wires all others.
const WIRING: &str = "run";

/// Compares the imports with the table.
///
/// # Errors
///
/// When a file cannot be read or parsed, or with every import that the table lacks.
pub(crate) fn check(workspace: &Path) -> Result<()> {
    let mut wrong = BTreeSet::new();
    let mut files = 0;
    for root in SOURCES {
        for path in sources(&workspace.join(root))? {
            let below = path.strip_prefix(workspace.join(root))?;
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let file = syn::parse_file(&text).with_context(|| format!("parsing {}", path.display()))?;
            files += 1;
            let strays = strays(below, &file).into_iter();
            wrong.extend(strays.map(|stray| format!("{root}/{}: {stray}", below.display())));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
    println!("{files} files, {} rooms", ARROWS.len());
    Ok(())
}

/// The source files below a directory, without tests.
fn sources(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let is_test = path.file_stem().is_some_and(|name| name == "tests" || name == "fixture");
        match (path.is_dir(), path.extension().is_some_and(|ending| ending == "rs")) {
            _ if is_test => {}
            (true, _) => found.extend(sources(&path)?),
            (false, true) => found.push(path),
            (false, false) => {}
        }
    }
    Ok(found)
}

/// The imports of a file that the table lacks.
fn strays(file: &Path, content: &File) -> BTreeSet<String> {
    let module = module(file);
    let Some(from) = room(&module) else { return BTreeSet::new() };
    let Some((_, allowed)) = ARROWS.iter().find(|(room, _)| *room == from) else {
        return BTreeSet::from([format!("the room {from} is not in the table of arrows")]);
    };
    let mut paths = Paths { module, found: BTreeSet::new() };
    paths.visit_file(content);
    let rooms: BTreeSet<String> = paths.found.iter().filter_map(|path| room(path)).collect();
    let is_stray = |to: &&String| **to != from && from != WIRING && !allowed.contains(&to.as_str());
    rooms.iter().filter(is_stray).map(|to| format!("{from} must not import {to}")).collect()
}

/// The path in the crate of the module in a file; empty for `lib.rs` and `main.rs`.
fn module(file: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        file.with_extension("").iter().map(|name| name.to_string_lossy().into_owned()).collect();
    names.pop_if(|name| matches!(&**name, "mod" | "lib" | "main"));
    names
}

/// The room of a path in the crate.
fn room(path: &[String]) -> Option<String> {
    match path {
        [wing, inner, ..] if wing == WING => {
            let inner = format!("{WING}/{inner}");
            let is_room = ARROWS.iter().any(|(room, _)| *room == inner);
            Some(if is_room { inner } else { WING.to_owned() })
        }
        [room, ..] => ARROWS.iter().any(|(name, _)| name == room).then(|| room.clone()),
        [] => None,
    }
}

/// Collects the paths in the crate that a file names.
struct Paths {
    module: Vec<String>,
    found: BTreeSet<Vec<String>>,
}

impl Paths {
    /// Resolves a path as it is written, and keeps it.
    fn take_in(&mut self, written: &[String]) {
        let mut base = self.module.clone();
        let rest = match written.first().map(String::as_str) {
            Some("crate") => {
                base.clear();
                &written[1..]
            }
            Some("self") => &written[1..],
            Some("super") => {
                let up = written.iter().take_while(|name| *name == "super").count();
                base.truncate(base.len().saturating_sub(up));
                &written[up..]
            }
            _ => return,
        };
        base.extend_from_slice(rest);
        self.found.insert(base);
    }

    fn tree(&mut self, before: &mut Vec<String>, tree: &UseTree) {
        match tree {
            UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.tree(before, &path.tree);
                before.pop();
            }
            UseTree::Group(group) => group.items.iter().for_each(|item| self.tree(before, item)),
            UseTree::Name(name) => self.leaf(before, &name.ident),
            UseTree::Rename(name) => self.leaf(before, &name.ident),
            UseTree::Glob(_) => self.take_in(before),
        }
    }

    fn leaf(&mut self, before: &[String], name: &syn::Ident) {
        let mut path = before.to_vec();
        if name != "self" {
            path.push(name.to_string());
        }
        self.take_in(&path);
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Mod(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            _ => &Vec::new(),
        };
        if !attributes.iter().any(is_for_tests) {
            visit::visit_item(self, item);
        }
    }

    /// An inline module adds a segment to the path.
    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.tree(&mut Vec::new(), &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.take_in(&names);
        visit::visit_path(self, path);
    }
}

fn is_for_tests(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute.parse_args::<syn::Path>().is_ok_and(|condition| condition.is_ident("test"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(file: &str, text: &str) -> Vec<String> {
        strays(Path::new(file), &syn::parse_file(text).unwrap()).into_iter().collect()
    }

    #[test]
    fn imports_that_the_table_lacks_are_found_in_every_form() {
        let to_dataplane = ["plan must not import dataplane"];
        for text in [
            "use crate::dataplane::Error;",
            "use crate::{model::Family, dataplane::{Error, State}};",
            "use super::super::dataplane;",
            "fn f() -> crate::dataplane::Error { todo() }",
            "mod inner { use crate::dataplane::*; }",
        ] {
            assert_eq!(found("plan/node.rs", text), to_dataplane, "{text}");
        }
        assert_eq!(
            found("dataplane/ebpf/mod.rs", "use super::nftables;"),
            ["dataplane/ebpf must not import dataplane/nftables"]
        );
    }

    #[test]
    fn arrows_tests_and_the_wiring_are_allowed() {
        for (file, text) in [
            ("plan/node.rs", "use crate::model::Family; use super::Delta; use std::fmt;"),
            ("plan/node.rs", "#[cfg(test)] mod tests { use crate::dataplane::Memory; }"),
            ("run/mod.rs", "use crate::{dataplane, source, observe};"),
            ("stale/sockets/moved.rs", "use crate::dataplane::nftables::Moved;"),
            ("lib.rs", "pub mod plan;"),
        ] {
            assert_eq!(found(file, text), Vec::<String>::new(), "{text}");
        }
    }

    #[test]
    fn a_room_stands_in_the_table_before_it_is_built() {
        assert!(ARROWS.iter().all(|(_, to)| to.iter().all(|to| ARROWS.iter().any(|(room, _)| room == to))));
        for (index, (room, to)) in ARROWS.iter().enumerate() {
            let before = &ARROWS[..index];
            assert!(
                to.iter().all(|to| before.iter().any(|(known, _)| known == to)),
                "{room} imports one below"
            );
        }
    }
}
