//! Acts on the node: a table of them, one file for each group.
//!
//! In: a [`Fixture`]. Out: the same after something hostile. An act returns what it holds while the Services have to work in
//! spite of it; then that is let go, its `undo` is called, and the Services have to work without it.

use std::any::Any;

use anyhow::Result;
use weir_tests::subject::Plane;

use super::{fixture::Fixture, random::Random};

pub(crate) use floods::raise_limits;

mod agent;
mod floods;
mod objects;
mod rules;
mod sockets;

/// Resources that an act holds, such as open connections.
pub(crate) type Held = Vec<Box<dyn Any>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    Anything,
    /// Programs at sockets.
    Sockets,
}

pub(crate) struct Act {
    pub(crate) name: &'static str,
    /// Without this it cannot be done.
    pub(crate) needs: Needs,
    /// Whether it may end the agent, which is started again then.
    pub(crate) ends_agent: bool,
    pub(crate) act: fn(&mut Fixture, &mut Random) -> Result<Held>,
    /// Takes back what would be in the way of the next one.
    pub(crate) undo: fn(&mut Fixture) -> Result<()>,
}

impl Act {
    const fn new(name: &'static str, act: fn(&mut Fixture, &mut Random) -> Result<Held>) -> Self {
        Self { name, needs: Needs::Anything, ends_agent: false, act, undo: |_| Ok(()) }
    }

    const fn undone(self, undo: fn(&mut Fixture) -> Result<()>) -> Self {
        Self { undo, ..self }
    }

    const fn at_sockets(self) -> Self {
        Self { needs: Needs::Sockets, ..self }
    }

    const fn ending_the_agent(self) -> Self {
        Self { ends_agent: true, ..self }
    }

    /// All acts on this data plane.
    pub(crate) fn all(plane: Plane) -> Vec<&'static Self> {
        let groups = [rules::ACTS, sockets::ACTS, agent::ACTS, objects::ACTS, floods::ACTS];
        let all = groups.into_iter().flatten();
        all.filter(|act| act.needs == Needs::Anything || plane == Plane::Ebpf).collect()
    }
}

/// Nothing to hold on to.
fn nothing() -> Result<Held> {
    Ok(Vec::new())
}
