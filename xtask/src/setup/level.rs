//! How far a machine is made ready.

use clap::ValueEnum;

/// The purpose that the machine is ready for; each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Level {
    /// `cargo build`
    Build,
    /// `cargo xtask demo`
    Demo,
    /// `cargo xtask test`
    Test,
    /// `cargo xtask check`
    Check,
}
