//! The machine weir runs on: the kernel's features, sysctls and the BPF file system.
//!
//! In: the configuration. Out: `probe`'s findings, which choose the data plane; sysctls as kube-proxy sets them; a mounted
//! bpffs. No Service is needed for any of it.

mod bpffs;
pub mod probe;
mod sysctls;

pub(crate) use bpffs::ensure as ensure_bpffs;
pub(crate) use sysctls::prepare;
