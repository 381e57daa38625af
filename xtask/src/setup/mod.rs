//! `cargo xtask setup`: installs what is missing on this machine.
//!
//! In: the [`Machine`](crate::machine::Machine) and a [`Level`]. Out: a machine on which `cargo build`, the demo, the
//! tests or the checks work.

mod archive;
mod chart;
mod compiler;
mod cross;
mod go;
mod kubernetes;
mod level;
mod nft;
mod steps;
mod system;

pub(crate) use archive::FILE_LISTS;
pub(crate) use chart::{schemas as chart_schemas, tools as chart_tools};
pub(crate) use cross::{Cross, cross};
pub(crate) use kubernetes::assets as kubernetes_assets;
pub(crate) use level::Level;
pub(crate) use nft::readers as nft_readers;
pub(crate) use steps::run;
