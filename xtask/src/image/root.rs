//! The files of the image: the program under both its names, its loader and libraries, and the licences.
//!
//! In: a program and where its libraries are. Out: a [`Root`], files by their path.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{
    elf::Program,
    sbom::{self, Library},
};
use crate::{machine::Machine, process, setup};

const WEIR: &str = "usr/local/bin/weir";
/// The program that DaemonSets of kubeadm and kind start. Under this name weir takes kube-proxy's arguments.
const KUBE_PROXY: &str = "usr/local/bin/kube-proxy";

/// The bill of materials.
const BILL: &str = "usr/share/doc/weir/sbom.cdx.json";

/// A directory, a file or a link.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Directory,
    File {
        /// Permission bits.
        mode: u32,
        content: Vec<u8>,
    },
    /// A symbolic link with this target.
    Link(String),
}

/// The files of an image by their path below `/`. All have the owner root.
#[derive(Debug, Default)]
pub(super) struct Root(BTreeMap<String, Entry>);

impl Root {
    /// Collects `program` at `binary`, and its loader and libraries below `sysroot`.
    ///
    /// # Errors
    ///
    /// When the program cannot be stripped, or with the name of a missing library.
    pub(super) fn assemble(
        machine: &Machine,
        binary: &Path,
        program: &Program,
        sysroot: &Path,
    ) -> Result<Self> {
        let mut root = Self::default();
        root.file(WEIR, 0o755, stripped(machine, binary, program)?);
        root.put(KUBE_PROXY, Entry::Link("weir".to_owned()));
        // Without this file, the C library queries DNS before it reads /etc/hosts.
        root.file("etc/nsswitch.conf", 0o644, b"hosts: files dns\n".to_vec());
        for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
            let text = fs::read(machine.workspace.join(licence)).with_context(|| licence.to_owned())?;
            root.file(&format!("usr/share/doc/weir/{licence}"), 0o644, text);
        }
        let libraries = root.link(program, sysroot)?;
        let bill = sbom::bill(machine, program.architecture, &libraries)?;
        root.file(BILL, 0o644, bill);
        Ok(root)
    }

    /// Adds the loader and the libraries of `program`, and theirs; returns what was added.
    fn link(&mut self, program: &Program, sysroot: &Path) -> Result<Vec<Library>> {
        let mut linked = Vec::new();
        let loader = program.loader.as_deref().map(|path| path.trim_start_matches('/').to_owned());
        let mut wanted = program.libraries.clone();
        while let Some(name) = wanted.pop() {
            let is_loader = loader.as_ref().is_some_and(|path| path.ends_with(&format!("/{name}")));
            let place = format!("lib/{}/{name}", program.architecture.triple());
            if is_loader || self.0.contains_key(&place) {
                continue;
            }
            let found = library(sysroot, program, &name)?;
            let content = fs::read(&found).with_context(|| format!("reading {}", found.display()))?;
            wanted.extend(Program::read(&content).with_context(|| found.display().to_string())?.libraries);
            linked.push(Library::new(&place, &content, package(sysroot, &found)));
            self.file(&place, 0o644, content);
            self.copyright(sysroot, &found);
        }
        if let Some(path) = loader {
            let found = sysroot.join(&path);
            let content = fs::read(&found).with_context(|| format!("the loader {}", found.display()))?;
            linked.push(Library::new(&path, &content, package(sysroot, &found)));
            self.file(&path, 0o755, content);
        }
        linked.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(linked)
    }

    /// Adds Debian's copyright file of the package of `library`, where the packages below `sysroot` are Debian's.
    fn copyright(&mut self, sysroot: &Path, library: &Path) {
        let Some(package) = owner(sysroot, library) else { return };
        let path = format!("usr/share/doc/{package}/copyright");
        if let Ok(text) = fs::read(sysroot.join(&path)) {
            self.file(&path, 0o644, text);
        }
    }

    fn file(&mut self, path: &str, mode: u32, content: Vec<u8>) {
        self.put(path, Entry::File { mode, content });
    }

    fn put(&mut self, path: &str, entry: Entry) {
        for (slash, _) in path.match_indices('/') {
            self.0.entry(path[..slash].to_owned()).or_insert(Entry::Directory);
        }
        self.0.insert(path.to_owned(), entry);
    }

    /// Paths and entries; a directory comes before its files.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.0.iter().map(|(path, entry)| (&**path, entry))
    }

    /// Bytes of all files.
    pub(super) fn size(&self) -> usize {
        let size = |entry: &Entry| if let Entry::File { content, .. } = entry { content.len() } else { 0 };
        self.0.values().map(size).sum()
    }

    /// Writes everything below `directory`.
    ///
    /// # Errors
    ///
    /// When an entry cannot be written, also because it exists.
    pub(super) fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        for (path, entry) in self.entries() {
            let path = directory.join(path);
            let written = match entry {
                Entry::Directory => fs::create_dir_all(&path),
                Entry::Link(target) => symlink(target, &path),
                Entry::File { mode, content } => fs::write(&path, content)
                    .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(*mode))),
            };
            written.with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}

/// The bytes of the program at `binary` without debug information; function names stay, because backtraces show them.
fn stripped(machine: &Machine, binary: &Path, program: &Program) -> Result<Vec<u8>> {
    // The plain strip may know this machine's architecture only.
    let cross = format!("{}-strip", program.architecture.triple());
    let strip = if machine.find(&cross).is_some() { &*cross } else { "strip" };
    let draft = tempfile::tempdir()?;
    let file = draft.path().join("weir");
    process::read(machine.command(strip).args(["--strip-debug", "-o"]).arg(&file).arg(binary))?;
    Ok(fs::read(&file)?)
}

/// The package of `file` below `sysroot`, from the lists of files: `dpkg -S` finds installed packages only.
fn owner(sysroot: &Path, file: &Path) -> Option<String> {
    let path = Path::new("/").join(file.strip_prefix(sysroot).ok()?);
    let path = path.to_str()?;
    // Debian merged /lib into /usr/lib, so a package's list may have either path.
    let other = path.strip_prefix("/usr").map_or_else(|| format!("/usr{path}"), str::to_owned);
    fs::read_dir(sysroot.join(setup::FILE_LISTS)).ok()?.flatten().find_map(|list| {
        let name = list.file_name().into_string().ok()?;
        let package = name.strip_suffix(".list")?.split(':').next()?;
        let files = fs::read_to_string(list.path()).ok()?;
        files.lines().any(|line| line == path || line == other).then(|| package.to_owned())
    })
}

/// The package of `file` below `sysroot`, and its version where dpkg's status file is there.
fn package(sysroot: &Path, file: &Path) -> Option<(String, Option<String>)> {
    let package = owner(sysroot, file)?;
    let status = fs::read_to_string(sysroot.join("var/lib/dpkg/status")).unwrap_or_default();
    let field = |block: &str, name: &str| {
        block.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(": ")?.to_owned()))
    };
    let own = |block: &&str| field(block, "Package").as_ref() == Some(&package);
    let version = status.split("\n\n").find(own).and_then(|block| field(block, "Version"));
    Some((package, version))
}

/// Where the library `name` is: in one of the directories that loaders search by default.
fn library(sysroot: &Path, program: &Program, name: &str) -> Result<PathBuf> {
    let triple = program.architecture.triple();
    let places = [
        format!("lib/{triple}"),
        format!("usr/lib/{triple}"),
        format!("usr/{triple}/lib"),
        "lib64".to_owned(),
        "usr/lib64".to_owned(),
        "lib".to_owned(),
        "usr/lib".to_owned(),
    ];
    let fits = |file: &PathBuf| {
        let read = fs::read(file).ok().and_then(|bytes| Program::read(&bytes).ok());
        read.is_some_and(|library| library.architecture == program.architecture)
    };
    places.iter().map(|place| sysroot.join(place).join(name)).find(fits).with_context(|| {
        let architecture = program.architecture;
        format!("{name} for {architecture} is nowhere below {}: {}", sysroot.display(), places.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> (Machine, PathBuf, Program) {
        let binary = std::env::current_exe().unwrap();
        let program = Program::read(&fs::read(&binary).unwrap()).unwrap();
        (Machine::discover().unwrap(), binary, program)
    }

    #[test]
    fn an_assembled_root_has_all_libraries_of_its_program() {
        let (machine, binary, program) = own();
        let root = Root::assemble(&machine, &binary, &program, Path::new("/")).unwrap();
        let directory = tempfile::tempdir().unwrap();
        root.write(directory.path()).unwrap();
        // The loader searches the root only, and prints each library that is missing.
        let loader = directory.path().join(program.loader.as_ref().unwrap().trim_start_matches('/'));
        let libraries = directory.path().join("lib").join(program.architecture.triple());
        let mut command = machine.command(loader);
        command.args(["--inhibit-cache", "--library-path"]).arg(libraries).arg("--list");
        let list = process::read(command.arg(directory.path().join(WEIR))).unwrap();
        for line in list.lines().filter(|line| line.contains("=>")) {
            assert!(line.contains(&*directory.path().to_string_lossy()), "{line} is not from the image");
        }
        assert_eq!(fs::read_link(directory.path().join(KUBE_PROXY)).unwrap(), Path::new("weir"));
    }

    #[test]
    fn an_error_names_the_missing_library() {
        let (machine, binary, program) = own();
        let empty = tempfile::tempdir().unwrap();
        let error = Root::assemble(&machine, &binary, &program, empty.path()).unwrap_err();
        assert!(error.to_string().contains(".so"), "{error:#}");
    }

    #[test]
    fn the_licence_of_a_library_is_its_packages() {
        let sysroot = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = sysroot.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("var/lib/dpkg/info/libx1:arm64.list", "/.\n/usr/lib/libx.so.1\n");
        write("var/lib/dpkg/info/liby1.list", "/lib/libx.so.10\n/lib/libx.so\n");
        write("usr/share/doc/libx1/copyright", "as you like");
        let mut root = Root::default();
        root.copyright(sysroot.path(), &sysroot.path().join("lib/libx.so.1"));
        root.copyright(sysroot.path(), &sysroot.path().join("lib/libz.so.1"));
        let files = root.entries().filter(|(_, entry)| **entry != Entry::Directory).collect::<Vec<_>>();
        let licence = Entry::File { mode: 0o644, content: b"as you like".to_vec() };
        assert_eq!(files, [("usr/share/doc/libx1/copyright", &licence)]);
    }

    #[test]
    fn directories_come_before_their_files() {
        let mut root = Root::default();
        root.file("a/b/c", 0o644, vec![0; 3]);
        root.put("a/b-link", Entry::Link("b".to_owned()));
        let paths = root.entries().map(|(path, _)| path).collect::<Vec<_>>();
        assert_eq!(paths, ["a", "a/b", "a/b-link", "a/b/c"]);
        assert_eq!(root.size(), 3);
    }
}
