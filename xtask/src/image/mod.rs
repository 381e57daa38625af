//! `cargo xtask image`: the container image, made without Docker.
//!
//! In: built programs, one for each architecture, or architectures to make release builds for. Out: an archive that
//! `docker load`, `podman load`, `ctr images import` and `kind load image-archive` take, or with `--root` the image's
//! files in a directory, which is what the Dockerfile copies. The same programs of the same commit make the same archive,
//! byte for byte.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{archive::Image, build::Built, elf::Program, root::Root};
use crate::{architecture::Architecture, machine::Machine, process};

mod archive;
mod build;
mod elf;
mod root;
mod sbom;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Architecture to build for; several for one image of all of them [default: this machine's]
    #[arg(long = "arch", value_name = "ARCH", value_delimiter = ',', conflicts_with = "binaries")]
    architectures: Vec<Architecture>,
    /// A weir binary to use; several times for several architectures
    #[arg(long = "binary", value_name = "FILE")]
    binaries: Vec<PathBuf>,
    /// Name and tag of the image [default: weir:VERSION]
    #[arg(long, value_name = "NAME:TAG")]
    tag: Option<String>,
    /// The archive to write
    #[arg(long, value_name = "FILE", default_value = "target/weir-image.tar")]
    output: PathBuf,
    /// Where the libraries of the programs given with --binary are, below it as below `/`
    #[arg(long, value_name = "DIR", default_value = "/", requires = "binaries")]
    sysroot: PathBuf,
    /// Write the files of the image into this directory instead of an archive
    #[arg(long, value_name = "DIR", conflicts_with_all = ["output", "tag"])]
    root: Option<PathBuf>,
}

/// Makes the image.
///
/// # Errors
///
/// When weir cannot be built, a file is no program of Linux, a library is missing, or the output cannot be written.
pub(crate) fn run(machine: &Machine, options: &Options) -> Result<()> {
    let Options { architectures, binaries, tag, output, sysroot, root } = options;
    let built = match &**binaries {
        [] => build::release(machine, architectures)?,
        given => given.iter().map(|binary| Built::new(binary, sysroot)).collect(),
    };
    let roots = roots(machine, &built)?;
    if let Some(directory) = root {
        let [(_, root)] = &*roots else {
            bail!("--root takes one program, because a directory has the files of one architecture")
        };
        root.write(directory)?;
        println!("wrote {}: {:.1} MB", directory.display(), megabytes(root.size()));
        return Ok(());
    }
    let tag = tag.clone().unwrap_or_else(|| format!("weir:{}", env!("CARGO_PKG_VERSION")));
    write_archive(machine, &machine.workspace.join(output), &tag, roots)
}

/// Writes an archive called `tag` of the program at `binary`, or of a release build.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn archive(machine: &Machine, binary: Option<&Path>, tag: &str, output: &Path) -> Result<()> {
    let built = match binary {
        Some(binary) => vec![Built::new(binary, Path::new("/"))],
        None => build::release(machine, &[])?,
    };
    write_archive(machine, output, tag, roots(machine, &built)?)
}

/// The files of an image for each of the programs.
fn roots(machine: &Machine, built: &[Built]) -> Result<Vec<(Architecture, Root)>> {
    let mut roots = Vec::new();
    for Built { binary, sysroot } in built {
        let binary = machine.workspace.join(binary);
        let bytes = fs::read(&binary).with_context(|| format!("reading {}", binary.display()))?;
        let program = Program::read(&bytes).with_context(|| binary.display().to_string())?;
        roots.push((program.architecture, Root::assemble(machine, &binary, &program, sysroot)?));
    }
    Ok(roots)
}

fn write_archive(
    machine: &Machine,
    output: &Path,
    tag: &str,
    roots: Vec<(Architecture, Root)>,
) -> Result<()> {
    let revision = revision(machine);
    let mut images: Vec<Image> = Vec::new();
    for (architecture, root) in roots {
        let twice = images.iter().any(|image| image.architecture == architecture);
        ensure!(!twice, "two of the programs are for {architecture}");
        println!("{tag} for {architecture}: {:.1} MB of files", megabytes(root.size()));
        images.push(Image::new(architecture, &root, revision.as_deref())?);
    }
    let bytes = archive::pack(tag, &images)?;
    if let Some(parent) = output.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    fs::write(output, &bytes).with_context(|| format!("writing {}", output.display()))?;
    println!("wrote {}: {:.1} MB", output.display(), megabytes(bytes.len()));
    Ok(())
}

/// The commit of the sources, with `-dirty` where they differ from it; `None` outside a git repository.
fn revision(machine: &Machine) -> Option<String> {
    let mut git = machine.command("git");
    git.args(["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]);
    let revision = process::read(&mut git).ok()?.trim().to_owned();
    (!revision.is_empty()).then_some(revision)
}

#[expect(clippy::cast_precision_loss, reason = "printed with one digit")]
fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}
