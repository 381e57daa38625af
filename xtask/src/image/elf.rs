//! The architecture, the loader and the libraries of a program, read from its ELF headers.
//!
//! In: the bytes of an ELF file, also of another architecture, which `ldd` cannot read. Out: a [`Program`].

use anyhow::{Context as _, Result, bail};
use object::{
    Object as _,
    elf::DT_NEEDED,
    read::elf::{ElfFile64, FileHeader as _, ProgramHeader as _},
};

use crate::architecture::Architecture;

/// The needs of a program or a library.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) architecture: Architecture,
    /// The absolute path of the loader; a library has none.
    pub(super) loader: Option<String>,
    /// Names without directory.
    pub(super) libraries: Vec<String>,
}

impl Program {
    /// Reads `bytes`.
    ///
    /// # Errors
    ///
    /// When they are no ELF file of an architecture that weir is shipped for.
    pub(super) fn read(bytes: &[u8]) -> Result<Self> {
        let file = ElfFile64::<object::Endianness>::parse(bytes).context("no 64-bit program of Linux")?;
        let architecture = match file.architecture() {
            object::Architecture::X86_64 => Architecture::Amd64,
            object::Architecture::Aarch64 => Architecture::Arm64,
            other => bail!("a program for {other:?}; images are made for x86_64 and aarch64"),
        };
        let endian = file.endian();
        let mut loader = None;
        for header in file.elf_program_headers() {
            if let Some(path) = header.interpreter(endian, bytes)? {
                loader = Some(String::from_utf8(path.to_vec())?);
            }
        }
        let dynamic = file.elf_header().sections(endian, bytes)?.dynamic_table(endian, bytes)?;
        let libraries = dynamic.iter().filter(|entry| entry.tag == DT_NEEDED);
        let libraries = libraries.map(|entry| Ok(String::from_utf8(dynamic.string(entry)?.to_vec())?));
        Ok(Self { architecture, loader, libraries: libraries.collect::<Result<_>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_has_a_loader_and_the_c_library() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        let program = Program::read(&own).unwrap();
        assert!(program.loader.as_ref().is_some_and(|path| path.starts_with('/')), "{program:?}");
        assert!(program.libraries.iter().any(|name| name == "libc.so.6"), "{program:?}");
    }

    #[test]
    fn a_file_that_is_no_program_is_refused() {
        let error = Program::read(b"#!/bin/sh\n").unwrap_err().to_string();
        assert_eq!(error, "no 64-bit program of Linux");
    }
}
