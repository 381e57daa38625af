//! Errors of the socket plane.
//!
//! In: errors of `aya` and of system calls. Out: the text that logs, events and `weir probe` show.

use std::{
    io,
    path::{Path, PathBuf},
};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

use crate::{causes::causes, dataplane::Error};

/// Why programs or maps cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The programs inside this agent lack a map that the agent uses.
    #[error("the kernel programs have no map `{0}`: this agent was built wrongly")]
    MissingMap(&'static str),
    /// The kernel refuses the object with all programs and maps.
    #[error("loading the kernel programs: {}", causes(.0))]
    Load(Box<EbpfError>),
    /// The kernel refuses a program.
    #[error("the kernel refuses the program `{name}`: {text}")]
    Program {
        /// The same as the name of its hook.
        name: String,
        /// The errno, and the verifier's log.
        text: String,
    },
    /// A map cannot be read or written.
    #[error("map `{name}`: {text}")]
    Map {
        /// The map's name.
        name: String,
        /// The error with its causes.
        text: String,
    },
    /// A pinned map has keys or values of another size.
    #[error(
        "the map pinned at {} has another layout: keys and values of {found:?} bytes, not {expected:?}; `weir cleanup` removes it",
        .path.display()
    )]
    Layout {
        /// Where the map is pinned.
        path: PathBuf,
        /// The sizes of its keys and values in bytes.
        found: [u32; 2],
        /// The sizes in this version.
        expected: [u32; 2],
    },
    /// An operation on a file failed.
    #[error("{doing} {}: {error}", .path.display())]
    File {
        /// The operation, as a verb.
        doing: &'static str,
        /// Its file.
        path: PathBuf,
        /// The error of the system call.
        error: io::Error,
    },
}

impl Problem {
    pub(super) fn map(name: &str, error: MapError) -> Self {
        Self::Map { name: name.to_owned(), text: causes(&error) }
    }

    pub(super) fn file(doing: &'static str, path: &Path, error: io::Error) -> Self {
        Self::File { doing, path: path.to_owned(), error }
    }

    pub(super) fn program(name: &str, error: ProgramError) -> Self {
        let text = match &error {
            ProgramError::LoadError { io_error, verifier_log } => format!("{io_error}\n{verifier_log}"),
            other => causes(other),
        };
        Self::Program { name: name.to_owned(), text }
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        Self::Kernel(problem.to_string())
    }
}
