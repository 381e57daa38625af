//! The parts of the tests that need a kernel: nodes made of network namespaces, real connections between
//! them, the packet cases that show every rule of a service proxy, and the demo built from the same parts.
//!
//! ```text
//! topology (netns, cgroup, node) ──▶ subject (weir | kube-proxy, fed with objects) ──▶ cases ──▶ traffic ──▶ verdicts
//! ```

#![deny(unsafe_code)]
#![expect(missing_docs, reason = "nothing but the suites uses it, and most names need no words")]

pub mod agent;
pub mod apiserver;
pub mod assets;
pub mod bpffs;
pub mod cases;
pub mod cgroup;
pub mod control_plane;
pub mod demo;
pub mod logged;
pub mod maps;
pub mod mounted;
pub mod names;
pub mod netns;
pub mod node;
pub mod objects;
pub mod process;
pub mod relay;
pub mod runner;
pub mod scenario;
pub mod stand_in;
pub mod subject;
pub mod traffic;
pub mod wait;
