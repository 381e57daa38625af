//! The kernel memory of a subject, and its traffic with the API server.
//!
//! In: an agent, its node, the control plane. Out: bytes.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use weir_tests::netns::Namespace;

/// The pause between readings of the kernel's memory.
const PAUSE: Duration = Duration::from_millis(200);
/// Amounts that differ by less are the same.
const SAME: i64 = 64 << 10;
/// The longest that the kernel's memory is waited for to stay the same.
const PATIENCE: Duration = Duration::from_secs(6);

/// Kernel memory, in bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelMemory {
    /// Of the maps that the agent has open, by their own account.
    pub maps: u64,
    /// The memory that the machine gained when the rules and their sets were removed. Other changes of that
    /// second are in it too.
    pub rules: i64,
}

/// The maps that a process has open, by their numbers: what each takes.
pub(super) fn maps(pid: u32) -> Result<u64> {
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).context("looking for maps")? {
        // A socket may be closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let field = |name: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        };
        if let Some((id, bytes)) = field("map_id:").zip(field("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.into_values().sum())
}

/// Takes all rules out of a node without an agent. The memory that the kernel got back.
pub(super) fn cleared(node: &Namespace) -> Result<i64> {
    let before = resting()?;
    clear(node)?;
    Ok(before - resting()?)
}

/// Takes all rules out of a node.
pub(super) fn clear(node: &Namespace) -> Result<()> {
    node.stdout("nft", &["flush", "ruleset"])?;
    let legacy = node.run(|| fs::read_to_string("/proc/net/ip_tables_names")).unwrap_or_default();
    for table in legacy.lines() {
        for program in ["iptables-legacy", "ip6tables-legacy"] {
            node.stdout(program, &["-t", table, "-F"])?;
            node.stdout(program, &["-t", table, "-X"])?;
        }
    }
    Ok(())
}

/// The memory of the kernel itself, once that stays the same for a moment: the kernel gives memory back only
/// some time after it was freed.
fn resting() -> Result<i64> {
    let begin = Instant::now();
    let (mut last, mut same) = (taken()?, 0);
    while same < 3 && begin.elapsed() < PATIENCE {
        thread::sleep(PAUSE);
        let now = taken()?;
        same = if (now - last).abs() < SAME { same + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

fn taken() -> Result<i64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Result<i64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        Ok(number.with_context(|| format!("/proc/meminfo has no {name}"))?.parse::<i64>()? * 1024)
    };
    Ok(field("SUnreclaim:")? + field("VmallocUsed:")? + field("Percpu:")?)
}

/// Bytes of IP that went over the link between the API server and a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traffic {
    pub received: u64,
    pub sent: u64,
}

impl Traffic {
    /// The counts so far; [`super::node::control_plane`] makes the counters.
    pub(super) fn so_far(control_plane: &Namespace) -> Result<Self> {
        let text = control_plane.stdout("nft", &["-j", "list", "counters"])?;
        let listed: serde_json::Value = serde_json::from_str(&text)?;
        let bytes = |name: &str| {
            let all = listed["nftables"].as_array().into_iter().flatten();
            let counter = all.map(|entry| &entry["counter"]).find(|counter| counter["name"] == name);
            counter
                .and_then(|counter| counter["bytes"].as_u64())
                .with_context(|| format!("there is no counter {name}"))
        };
        Ok(Self { received: bytes("to-nodes")?, sent: bytes("from-nodes")? })
    }

    /// The traffic after `before`.
    #[must_use]
    pub(super) fn since(self, before: Self) -> Self {
        Self { received: self.received - before.received, sent: self.sent - before.sent }
    }
}
