//! A foreign hand among programs, maps and links at sockets.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    EbpfLoader,
    programs::{CgroupAttachMode, CgroupSockAddr},
};
use weir::dataplane::ebpf::PROGRAMS;
use weir_tests::bpffs::unpin_all;

use super::{Act, Held, nothing};
use crate::suites::chaos::{fixture::Fixture, random::Random};

/// Without any of its pins the agent ends, and what runs it starts it again.
pub(crate) const ACTS: &[Act] = &[
    Act::new("remove a pinned link", |fixture, random| {
        remove_one(fixture, random, |name| name.starts_with("link-"))?;
        nothing()
    })
    .at_sockets(),
    Act::new("remove a pinned map", |fixture, random| {
        remove_one(fixture, random, |name| !name.starts_with("link-"))?;
        nothing()
    })
    .at_sockets(),
    Act::new("remove every pin", |fixture, _| {
        unpin_all(&fixture.bpf_root()?)?;
        nothing()
    })
    .at_sockets()
    .ending_the_agent(),
    Act::new("remove every pin while no agent runs", |fixture, _| {
        fixture.kill_agent()?;
        unpin_all(&fixture.bpf_root()?)?;
        fixture.start_agent()?;
        nothing()
    })
    .at_sockets()
    .ending_the_agent(),
    Act::new("attach a foreign program", attach_foreign).at_sockets(),
];

fn remove_one(fixture: &Fixture, random: &mut Random, is_meant: fn(&str) -> bool) -> Result<()> {
    let mut pins = Vec::new();
    pins_below(&fixture.bpf_root()?, &mut pins)?;
    pins.retain(|pin| pin.file_name().and_then(|name| name.to_str()).is_some_and(is_meant));
    // The order of a directory is not the seed's.
    pins.sort_unstable();
    random.pick(&pins).map_or(Ok(()), |pin| Ok(fs::remove_file(pin)?))
}

fn pins_below(directory: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            pins_below(&entry.path(), into)?;
        } else {
            into.push(entry.path());
        }
    }
    Ok(())
}

/// A program that is at the same hook and lets everything be: weir's own with empty maps.
fn attach_foreign(fixture: &mut Fixture, _: &mut Random) -> Result<Held> {
    let mut foreign = EbpfLoader::new().load(PROGRAMS)?;
    let program: &mut CgroupSockAddr =
        foreign.program_mut("connect4").context("there is no program connect4")?.try_into()?;
    program.load()?;
    let cgroup = File::open(fixture.topology.cgroup_root(1))?;
    // Links are for several programs in any mode.
    program.attach(cgroup, CgroupAttachMode::Single)?;
    Ok(vec![Box::new(foreign)])
}
