//! The data planes of this agent.
//!
//! In: the configuration and the machine's features. Out: the nftables plane, with the socket plane in front where it can run.

use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;

use super::choice::choose;
use crate::{
    config::{Config, ProxyMode},
    dataplane::{
        Dataplane, Stack,
        ebpf::{self, Counters, Ebpf, LeftoverPlane, Links, Place, check_conflicts},
        nftables::{Dropped, Drops, News, Nftables, Seen, Watch},
    },
    machine::probe::Probe,
    model::PerFamily,
    observe::DropCount,
};

pub(super) struct Planes {
    pub(super) plane: Box<dyn Dataplane>,
    /// Changes that other programs make to weir's tables.
    pub(super) foreign: watch::Receiver<News>,
    /// The pins of the socket plane, if it runs.
    pub(super) sockets: Option<Place>,
    /// Counters of the nftables plane.
    pub(super) dropped: Drops,
    /// Counters of the socket plane.
    pub(super) counted: Option<Counters>,
    /// Links of the socket plane's programs.
    pub(super) links: Option<Links>,
}

impl Planes {
    /// Opens the planes of the configured mode.
    pub(super) fn open(config: &Config) -> anyhow::Result<Self> {
        let (mut packets, rule_set) = packets(config)?;
        let foreign = watch_rule_set(rule_set)?;
        let dropped = packets.drops()?;
        let place = Place { bpf_root: config.bpf_root.clone(), cgroup_root: config.cgroup_root.clone() };
        let probe = || Probe::of(&place.cgroup_root, &place.bpf_root);
        let open = |probe: &Probe| {
            check_conflicts(&place.cgroup_root)?;
            anyhow::Ok(Ebpf::open(place.clone(), probe.set_retval)?)
        };
        let sockets = choose(config.mode, probe, open)?;
        let counted = sockets.as_ref().map(Ebpf::counters);
        let links = sockets.as_ref().map(Ebpf::links);
        let (plane, sockets): (Box<dyn Dataplane>, _) = match sockets {
            Some(sockets) => {
                let stack =
                    Stack::new(packets, sockets).serving_as(ebpf::MODE).with_retry(config.sync_period);
                (Box::new(stack), Some(place))
            }
            None => {
                packets.remove_moved()?;
                let stack = Stack::new(packets, LeftoverPlane::new(place)).with_retry(config.sync_period);
                (Box::new(stack), None)
            }
        };
        let planes = Self { plane, foreign, sockets, dropped, counted, links };
        tracing::info!(mode = planes.mode(), "programming Services in this mode");
        Ok(planes)
    }

    /// The answer of `/proxyMode`.
    pub(super) fn mode(&self) -> &'static str {
        if self.sockets.is_some() { ebpf::MODE } else { "nftables" }
    }
}

fn packets(config: &Config) -> anyhow::Result<(Nftables, Watch)> {
    Nftables::open_watched(config.model.families)
        .context("opening the nftables data plane, which needs nf_tables and the capability NET_ADMIN")
}

/// Checks the kernel features that this configuration needs, without a change to the kernel.
///
/// # Errors
///
/// Naming the missing feature.
pub(super) fn look(config: &Config) -> anyhow::Result<()> {
    packets(config)?;
    possible(config)
}

/// Checks the kernel features that the configured mode insists on. Loaded programs are removed again.
///
/// # Errors
///
/// Naming the missing feature.
pub(super) fn possible(config: &Config) -> anyhow::Result<()> {
    // The other modes fall back to nftables.
    if config.mode == ProxyMode::Ebpf {
        let probe = || Probe::of(&config.cgroup_root, &config.bpf_root);
        choose(config.mode, probe, |_| check_conflicts(&config.cgroup_root))?;
    }
    Ok(())
}

/// Dropped and refused packets by reason; empty if the counters cannot be read.
pub(super) fn drops(dropped: &Drops) -> Vec<DropCount> {
    let counts = dropped.read().unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot read the counters of the nftables plane");
        Vec::new()
    });
    counts
        .into_iter()
        .map(|Dropped { family, reason, packets }| DropCount { family, reason, packets })
        .collect()
}

/// The longest pause before another attempt to listen.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Reports changes that other programs make to weir's tables, until the receiver is gone.
fn watch_rule_set(mut rule_set: Watch) -> anyhow::Result<watch::Receiver<News>> {
    let (news, foreign) = watch::channel(News::default());
    std::thread::Builder::new().name("rule-set-watch".to_owned()).spawn(move || {
        while !news.is_closed() {
            let seen = rule_set.wait().unwrap_or_else(|error| {
                tracing::warn!(%error, "listening again for changes by other programs");
                listen_anew(&mut rule_set);
                Seen::Lost { families: PerFamily { v4: true, v6: true } }
            });
            news.send_modify(|news| news.take_in(seen));
        }
    })?;
    Ok(foreign)
}

/// Retries until the kernel accepts the socket.
fn listen_anew(rule_set: &mut Watch) {
    let mut wait = Duration::from_millis(100);
    while let Err(error) = rule_set.reopen() {
        tracing::error!(%error, ?wait, "cannot listen for changes by other programs; weir does not notice them meanwhile");
        std::thread::sleep(wait);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}
