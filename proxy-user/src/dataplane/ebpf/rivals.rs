//! Programs of others that keep ours from being attached.
//!
//! In: the cgroup that ours are to be attached to. Out: an error that names each program in the way. The kernel lets
//! programs stand beside each other only where all of them were attached so that they may (`BPF_F_ALLOW_MULTI`); old
//! agents attached theirs alone, and such a program stays when its agent is gone.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use crate::sys::bpf::{Attached, attached};
use aya::programs::loaded_programs;

/// The hooks of our programs, with the number that the kernel has for each.
const HOOKS: [(&str, u32); 12] = [
    ("sock_create", 2),
    ("connect4", 10),
    ("connect6", 11),
    ("post_bind4", 12),
    ("post_bind6", 13),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
    ("sock_release", 34),
];

const ALLOW_OVERRIDE: u32 = 1;
const ALLOW_MULTI: u32 = 2;

/// Why programs cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum Rivalry {
    /// Others are in the way.
    #[error(
        "other programs are attached so that none may stand beside them, and have to be detached first: {}",
        .0.join(", ")
    )]
    InTheWay(Vec<String>),
    /// The cgroup cannot be asked.
    #[error("cannot open the cgroup {}", .path.display())]
    Cgroup {
        /// The cgroup.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
}

/// Looks for programs that stand alone at our hooks of a cgroup.
///
/// # Errors
///
/// When there are some, or the cgroup cannot be opened.
pub fn no_rivals(cgroup: &Path) -> Result<(), Rivalry> {
    let own = File::open(cgroup).map_err(|source| Rivalry::Cgroup { path: cgroup.to_owned(), source })?;
    let mut found = Vec::new();
    for (hook, number) in HOOKS {
        // A hook that this kernel does not know is none to be in the way of.
        let at = |cgroup: &File| attached(cgroup, number).unwrap_or_default();
        let here = at(&own);
        if here.flags & ALLOW_MULTI == 0 {
            found.extend(here.programs.iter().map(|id| named(hook, *id, cgroup)));
        }
        found.extend(above(cgroup, at).iter().map(|(id, path)| named(hook, *id, path)));
    }
    if found.is_empty() { Ok(()) } else { Err(Rivalry::InTheWay(found)) }
}

/// The program of the nearest cgroup above that has one and lets none be attached below.
fn above(cgroup: &Path, at: impl Fn(&File) -> Attached) -> Option<(u32, PathBuf)> {
    for path in cgroup.ancestors().skip(1) {
        // Beyond the root of the hierarchy there are no cgroups.
        if !path.join("cgroup.procs").exists() {
            return None;
        }
        let Attached { flags, programs } = at(&File::open(path).ok()?);
        if flags & ALLOW_MULTI != 0 {
            return None;
        }
        if let Some(id) = programs.first() {
            return (flags & ALLOW_OVERRIDE == 0).then(|| (*id, path.to_owned()));
        }
    }
    None
}

fn named(hook: &str, id: u32, cgroup: &Path) -> String {
    let program = loaded_programs().flatten().find(|program| program.id() == id);
    let name = program.as_ref().and_then(|program| program.name_as_str()).unwrap_or("without a name");
    format!("`{name}` (id {id}) at {hook} of {}", cgroup.display())
}
