//! Which data planes this agent has, and opening them.
//!
//! In: the configuration, and what the machine has. Out: nftables, with the sockets' plane in front where there can be one.

use anyhow::Context as _;
use tokio::sync::mpsc;

use super::choice::choose;
use crate::{
    config::Config,
    dataplane::{
        Dataplane, Stack,
        ebpf::{Counted, Ebpf, Place, Retired},
        nftables::{Dropped, Drops, Nftables, Seen},
        probe::Probe,
    },
    observe::DropCount,
};

/// The planes of this agent.
pub(super) struct Planes {
    /// What the engine writes to.
    pub(super) plane: Box<dyn Dataplane>,
    /// News of foreign changes to our tables.
    pub(super) foreign: mpsc::Receiver<Seen>,
    /// Where the sockets' plane is, if there is one.
    pub(super) sockets: Option<Place>,
    /// What the nftables plane counts.
    pub(super) dropped: Drops,
    /// What the sockets' plane counts.
    pub(super) counted: Option<Counted>,
}

impl Planes {
    /// Opens what the mode asks for and the machine allows.
    pub(super) fn open(config: &Config) -> anyhow::Result<Self> {
        let packets = Nftables::open(config.model.families)
            .context("opening the nftables data plane, which needs nf_tables and the capability NET_ADMIN")?;
        let foreign = watch_rule_set(&packets)?;
        let dropped = packets.drops()?;
        let place = Place { bpf_root: config.bpf_root.clone(), cgroup_root: config.cgroup_root.clone() };
        let probe = || Probe::of(&place.cgroup_root, &place.bpf_root);
        let sockets = choose(config.mode, probe, |probe| Ebpf::open(place.clone(), probe.set_retval))?;
        let counted = sockets.as_ref().map(Ebpf::counted);
        let (plane, sockets): (Box<dyn Dataplane>, _) = match sockets {
            Some(sockets) => {
                let stack = Stack::new(packets, sockets).serving_as("ebpf").with_retry(config.sync_period);
                (Box::new(stack), Some(place))
            }
            None => {
                let stack = Stack::new(packets, Retired::new(place)).with_retry(config.sync_period);
                (Box::new(stack), None)
            }
        };
        Ok(Self { plane, foreign, sockets, dropped, counted })
    }

    /// The name of what serves, as `/proxyMode` tells it.
    pub(super) fn mode(&self) -> &'static str {
        if self.sockets.is_some() { "ebpf" } else { "nftables" }
    }
}

/// What packet rules dropped and refused; nothing where that cannot be read.
pub(super) fn drops(dropped: &Drops) -> Vec<DropCount> {
    let counts = dropped.read().unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot read what the rules counted");
        Vec::new()
    });
    counts
        .into_iter()
        .map(|Dropped { family, reason, packets }| DropCount { family, reason, packets })
        .collect()
}

/// Tells of foreign changes to our tables. The thread ends with the process, or when nobody listens.
fn watch_rule_set(plane: &Nftables) -> anyhow::Result<mpsc::Receiver<Seen>> {
    let mut rule_set = plane.watch()?;
    let (seen, foreign) = mpsc::channel(1);
    std::thread::Builder::new().name("rule-set-watch".to_owned()).spawn(move || {
        loop {
            match rule_set.wait() {
                // One that is waiting already says it all.
                Ok(what) if matches!(seen.try_send(what), Err(mpsc::error::TrySendError::Closed(_))) => {
                    return;
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(%error, "foreign changes to our tables are no longer noticed");
                    return;
                }
            }
        }
    })?;
    Ok(foreign)
}
