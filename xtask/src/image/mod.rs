//! `cargo xtask image`: the container image, made without Docker.
//!
//! In: built programs, one for each architecture, or none for a release build of this machine's. Out: an archive that
//! `docker load`, `podman load`, `ctr images import` and `kind load image-archive` take, or with `--root` the image's
//! files in a directory, which is what the Dockerfile copies. The same programs make the same archive, byte for byte.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    archive::Image,
    elf::{Architecture, Program},
    root::Root,
};
use crate::{
    machine::Machine,
    process,
    setup::{self, Level},
};

mod archive;
mod elf;
mod root;

/// What `cargo xtask image` can be told.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A weir that is built already; several times for several architectures [default: a release build]
    #[arg(long = "binary", value_name = "FILE")]
    binaries: Vec<PathBuf>,
    /// Name and tag of the image [default: weir:VERSION]
    #[arg(long, value_name = "NAME:TAG")]
    tag: Option<String>,
    /// The archive to write
    #[arg(long, value_name = "FILE", default_value = "target/weir-image.tar")]
    output: PathBuf,
    /// Where the libraries of the programs are, below it as below `/`
    #[arg(long, value_name = "DIR", default_value = "/")]
    sysroot: PathBuf,
    /// Write the files of the image into this directory instead of an archive
    #[arg(long, value_name = "DIR", conflicts_with_all = ["output", "tag"])]
    root: Option<PathBuf>,
}

/// Makes the image.
///
/// # Errors
///
/// When weir cannot be built, a program is none that Linux runs, a library is missing, or nothing can be written.
pub(crate) fn run(machine: &Machine, options: &Options) -> Result<()> {
    let Options { binaries, tag, output, sysroot, root } = options;
    let roots = roots(machine, binaries, sysroot)?;
    if let Some(directory) = root {
        let [(_, root)] = &*roots else { bail!("--root takes one program, because it is one root") };
        root.write(directory)?;
        println!("wrote {}: {:.1} MB", directory.display(), megabytes(root.size()));
        return Ok(());
    }
    let tag = tag.clone().unwrap_or_else(|| format!("weir:{}", env!("CARGO_PKG_VERSION")));
    write_archive(&machine.workspace.join(output), &tag, roots)
}

/// Writes an archive called `tag` of the program at `binary`, or of a release build.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn archive(machine: &Machine, binary: Option<&Path>, tag: &str, output: &Path) -> Result<()> {
    let given = binary.map(Path::to_owned).into_iter().collect::<Vec<_>>();
    write_archive(output, tag, roots(machine, &given, Path::new("/"))?)
}

/// The files of an image for each of the programs, or for a release build.
fn roots(machine: &Machine, binaries: &[PathBuf], sysroot: &Path) -> Result<Vec<(Architecture, Root)>> {
    let built;
    let binaries = match binaries {
        [] => {
            built = [release_build(machine)?];
            &built
        }
        given => given,
    };
    let mut roots = Vec::new();
    for binary in binaries {
        let binary = machine.workspace.join(binary);
        let bytes = fs::read(&binary).with_context(|| format!("reading {}", binary.display()))?;
        let program = Program::read(&bytes).with_context(|| binary.display().to_string())?;
        roots.push((program.architecture, Root::assemble(machine, &binary, &program, sysroot)?));
    }
    Ok(roots)
}

fn write_archive(output: &Path, tag: &str, roots: Vec<(Architecture, Root)>) -> Result<()> {
    let mut images: Vec<Image> = Vec::new();
    for (architecture, root) in roots {
        let twice = images.iter().any(|image| image.architecture == architecture);
        ensure!(!twice, "two of the programs are for {architecture}");
        println!("{tag} for {architecture}: {:.1} MB of files", megabytes(root.size()));
        images.push(Image::new(architecture, &root)?);
    }
    let bytes = archive::pack(tag, &images)?;
    if let Some(parent) = output.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    fs::write(output, &bytes).with_context(|| format!("writing {}", output.display()))?;
    println!("wrote {}: {:.1} MB", output.display(), megabytes(bytes.len()));
    Ok(())
}

/// Builds weir for this machine, as it is to be shipped.
fn release_build(machine: &Machine) -> Result<PathBuf> {
    setup::run(machine, Level::Build)?;
    process::run(machine.cargo().args(["build", "--release", "--package", "proxy-user", "--bin", "weir"]))?;
    Ok(machine.target_directory()?.join("release/weir"))
}

#[expect(clippy::cast_precision_loss, reason = "for people to read, with one digit")]
fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}
