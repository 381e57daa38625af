//! What can go wrong between us and the kernel.

use std::{
    io,
    path::{Path, PathBuf},
};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

use crate::{causes::causes, dataplane::Error};

/// Why programs or maps are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The object inside this agent is not what the agent expects.
    #[error("the kernel programs have no map `{0}`: this agent was built wrongly")]
    Object(&'static str),
    /// The kernel does not take the object.
    #[error("loading the kernel programs: {}", causes(.0))]
    Load(Box<EbpfError>),
    /// The kernel refuses a program; the text has the verifier's own words.
    #[error("the kernel refuses the program `{name}`: {text}")]
    Program {
        /// The program's name, which is its hook's.
        name: String,
        /// Why.
        text: String,
    },
    /// A map cannot be read or written.
    #[error("map `{name}`: {text}")]
    Map {
        /// The map's name.
        name: String,
        /// Why.
        text: String,
    },
    /// A pinned map is of another layout.
    #[error(
        "the map pinned at {} is of another layout: keys and values of {found:?} bytes, not {expected:?}; `weir cleanup` removes it",
        .path.display()
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Bytes of its keys and values.
        found: [u32; 2],
        /// What they should be.
        expected: [u32; 2],
    },
    /// A file cannot be used.
    #[error("{doing} {}: {error}", .path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system answered.
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
