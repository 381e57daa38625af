//! `cargo xtask image`: the container image, made without Docker.
//!
//! In: built programs, one for each architecture, or none for a release build of this machine's. Out: an archive that
//! `docker load`, `podman load`, `ctr images import` and `kind load image-archive` take, or with `--root` the image's
//! files in a directory, which is what the Dockerfile copies. The same programs make the same archive, byte for byte.

use std::{fs, path::PathBuf};

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
    let binaries = match &*options.binaries {
        [] => vec![release_build(machine)?],
        given => given.to_vec(),
    };
    let mut images = Vec::new();
    for binary in &binaries {
        let program =
            Program::read(&fs::read(binary).with_context(|| format!("reading {}", binary.display()))?)
                .with_context(|| format!("{}", binary.display()))?;
        let root = Root::assemble(machine, binary, &program, &options.sysroot)?;
        images.push((program.architecture, root));
    }
    if let Some(directory) = &options.root {
        let [(_, root)] = &*images else { bail!("--root takes one program, because it is one root") };
        root.write(directory)?;
        println!("wrote {}: {:.1} MB", directory.display(), megabytes(root.size()));
        return Ok(());
    }
    let tag = options.tag.clone().unwrap_or_else(|| format!("weir:{}", env!("CARGO_PKG_VERSION")));
    write_archive(machine, options, &tag, images)
}

fn write_archive(
    machine: &Machine,
    options: &Options,
    tag: &str,
    roots: Vec<(Architecture, Root)>,
) -> Result<()> {
    let mut images: Vec<Image> = Vec::new();
    for (architecture, root) in roots {
        let twice = images.iter().any(|image| image.architecture == architecture);
        ensure!(!twice, "two of the programs are for {architecture}");
        println!("{tag} for {architecture}: {:.1} MB of files", megabytes(root.size()));
        images.push(Image::new(architecture, &root)?);
    }
    let output = machine.workspace.join(&options.output);
    let bytes = archive::pack(tag, &images)?;
    if let Some(parent) = output.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    fs::write(&output, &bytes).with_context(|| format!("writing {}", output.display()))?;
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
