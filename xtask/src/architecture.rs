//! Processor architectures, by the names that compilers, Debian and image formats have for them.

use std::{env::consts::ARCH, fmt};

use anyhow::{Result, bail};
use clap::ValueEnum;

/// A processor architecture that weir is shipped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Architecture {
    /// x86_64
    Amd64,
    /// aarch64
    Arm64,
}

impl Architecture {
    /// This machine's.
    ///
    /// # Errors
    ///
    /// When weir is not shipped for it.
    pub(crate) fn own() -> Result<Self> {
        match ARCH {
            "x86_64" => Ok(Self::Amd64),
            "aarch64" => Ok(Self::Arm64),
            other => {
                bail!("images are made for amd64 and arm64; this machine is {other}: name one with --arch")
            }
        }
    }

    /// The name in Debian's directories and in the names of cross compilers.
    pub(crate) fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// rustc's name.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }
}

impl fmt::Display for Architecture {
    /// The name in images and in Debian's packages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        })
    }
}
