//! Which data planes this agent has, and opening them.
//!
//! In: the configuration, and what the machine has. Out: nftables, with the sockets' plane in front where there can be one.

use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;

use super::choice::choose;
use crate::{
    config::{Config, ProxyMode},
    dataplane::{
        Dataplane, Stack,
        ebpf::{self, Counted, Ebpf, Links, Place, Retired, no_rivals},
        nftables::{Dropped, Drops, News, Nftables, Seen, Watch},
    },
    machine::probe::Probe,
    model::PerFamily,
    observe::DropCount,
};

/// The planes of this agent.
pub(super) struct Planes {
    /// What the engine writes to.
    pub(super) plane: Box<dyn Dataplane>,
    /// News of foreign changes to our tables.
    pub(super) foreign: watch::Receiver<News>,
    /// Where the sockets' plane is, if there is one.
    pub(super) sockets: Option<Place>,
    /// What the nftables plane counts.
    pub(super) dropped: Drops,
    /// What the sockets' plane counts.
    pub(super) counted: Option<Counted>,
    /// How the programs of the sockets' plane are attached.
    pub(super) links: Option<Links>,
}

impl Planes {
    /// Opens what the mode asks for and the machine allows.
    pub(super) fn open(config: &Config) -> anyhow::Result<Self> {
        let (mut packets, rule_set) = packets(config)?;
        let foreign = watch_rule_set(rule_set)?;
        let dropped = packets.drops()?;
        let place = Place { bpf_root: config.bpf_root.clone(), cgroup_root: config.cgroup_root.clone() };
        let probe = || Probe::of(&place.cgroup_root, &place.bpf_root);
        let open = |probe: &Probe| {
            no_rivals(&place.cgroup_root)?;
            anyhow::Ok(Ebpf::open(place.clone(), probe.set_retval)?)
        };
        let sockets = choose(config.mode, probe, open)?;
        let counted = sockets.as_ref().map(Ebpf::counted);
        let links = sockets.as_ref().map(Ebpf::links);
        let (plane, sockets): (Box<dyn Dataplane>, _) = match sockets {
            Some(sockets) => {
                let stack =
                    Stack::new(packets, sockets).serving_as(ebpf::MODE).with_retry(config.sync_period);
                (Box::new(stack), Some(place))
            }
            None => {
                packets.remove_moved()?;
                let stack = Stack::new(packets, Retired::new(place)).with_retry(config.sync_period);
                (Box::new(stack), None)
            }
        };
        let planes = Self { plane, foreign, sockets, dropped, counted, links };
        tracing::info!(mode = planes.mode(), "programming Services in this mode");
        Ok(planes)
    }

    /// The name of what serves, as `/proxyMode` tells it.
    pub(super) fn mode(&self) -> &'static str {
        if self.sockets.is_some() { ebpf::MODE } else { "nftables" }
    }
}

fn packets(config: &Config) -> anyhow::Result<(Nftables, Watch)> {
    Nftables::open_watched(config.model.families)
        .context("opening the nftables data plane, which needs nf_tables and the capability NET_ADMIN")
}

/// Looks for what any agent with this configuration needs of the kernel, which stays as it is.
///
/// # Errors
///
/// Naming what is missing.
pub(super) fn look(config: &Config) -> anyhow::Result<()> {
    packets(config)?;
    possible(config)
}

/// Whether an agent with this configuration would find what its mode insists on. Nothing is loaded that stays.
///
/// # Errors
///
/// Naming what is missing.
pub(super) fn possible(config: &Config) -> anyhow::Result<()> {
    // The other modes make do with what there is.
    if config.mode == ProxyMode::Ebpf {
        let probe = || Probe::of(&config.cgroup_root, &config.bpf_root);
        choose(config.mode, probe, |_| no_rivals(&config.cgroup_root))?;
    }
    Ok(())
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

/// The longest wait before listening anew.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Tells of foreign changes to our tables. The thread ends with the process, or when nobody listens.
fn watch_rule_set(mut rule_set: Watch) -> anyhow::Result<watch::Receiver<News>> {
    let (news, foreign) = watch::channel(News::default());
    std::thread::Builder::new().name("rule-set-watch".to_owned()).spawn(move || {
        while !news.is_closed() {
            let seen = rule_set.wait().unwrap_or_else(|error| {
                tracing::warn!(%error, "listening anew for foreign changes to our tables");
                listen_anew(&mut rule_set);
                Seen::Lost { families: PerFamily { v4: true, v6: true } }
            });
            news.send_modify(|news| news.take_in(seen));
        }
    })?;
    Ok(foreign)
}

/// Tries until the kernel lets us listen.
fn listen_anew(rule_set: &mut Watch) {
    let mut wait = Duration::from_millis(100);
    while let Err(error) = rule_set.reopen() {
        tracing::error!(%error, ?wait, "foreign changes to our tables are not noticed");
        std::thread::sleep(wait);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}
