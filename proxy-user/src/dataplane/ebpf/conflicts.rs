//! Programs of other agents that prevent weir from attaching its own.
//!
//! In: the cgroup that weir attaches to. Out: an error that names each program in the way. The kernel allows
//! several programs at a hook only if all of them were attached with `BPF_F_ALLOW_MULTI`. Old agents attached
//! theirs without it, and such a program stays when its agent is gone.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use crate::sys::bpf::{Attached, attached};
use aya::programs::loaded_programs;

/// The hooks that weir uses, with the kernel's numbers of their attach types.
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
pub enum Conflict {
    /// Other programs are attached exclusively.
    #[error(
        "other programs are attached exclusively and must be detached first: {}",
        .0.join(", ")
    )]
    Exclusive(Vec<String>),
    /// The cgroup cannot be opened.
    #[error("cannot open the cgroup {}", .path.display())]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
}

/// Looks for programs that are attached exclusively at weir's hooks of a cgroup.
///
/// # Errors
///
/// When there are such programs, or the cgroup cannot be opened.
pub fn check_conflicts(cgroup: &Path) -> Result<(), Conflict> {
    let own = File::open(cgroup).map_err(|source| Conflict::Cgroup { path: cgroup.to_owned(), source })?;
    let mut found = Vec::new();
    for (hook, number) in HOOKS {
        // A kernel without the hook has no program there.
        let at = |cgroup: &File| attached(cgroup, number).unwrap_or_default();
        let here = at(&own);
        if here.flags & ALLOW_MULTI == 0 {
            found.extend(here.programs.iter().map(|id| named(hook, *id, cgroup)));
        }
        found.extend(above(cgroup, at).iter().map(|(id, path)| named(hook, *id, path)));
    }
    if found.is_empty() { Ok(()) } else { Err(Conflict::Exclusive(found)) }
}

/// The program of the nearest ancestor that has one, if it allows none below.
fn above(cgroup: &Path, at: impl Fn(&File) -> Attached) -> Option<(u32, PathBuf)> {
    for path in cgroup.ancestors().skip(1) {
        // Above the root of the hierarchy there are no cgroups.
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
