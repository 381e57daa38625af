//! Model, planner and data plane on one thread: takes changes in, brings the kernel up to date, takes the next in.
//!
//! In: changes, host addresses, and changes of weir's tables by other programs. Out: a programmed kernel, reports, and suspects for
//! `stale`. There is no pacing: changes that arrive while the kernel is written are the next delta. A failure delays nothing else:
//! a refused service port is tried again by itself, and a family with a failed table is compared with the kernel by itself, at
//! once and then less and less often, while every other change is written as it comes.
//!
//! ```text
//! changes ─▶ take_in ─▶ program ─▶ applied: in force ─▶ report, checks, suspects, relay
//!                          ▲              │ refused, failed
//!                          └── recovery ◀─┘
//! ```

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::PoisonError,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot, watch};

use super::{left_out, served};
use crate::{
    dataplane::{Dataplane, nftables::News},
    dns::SharedNames,
    model::{Change, Family, Model, PerFamily, Settings},
    observe::{Events, Health, HealthChecks, Metrics},
    plan::{Planner, PortId},
    relay,
    source::host::Addresses,
    stale::{flows::Suspects, sockets},
};

mod applied;
mod checks;
mod program;
mod recovery;
mod report;
mod suspects;
#[cfg(test)]
mod tests;

use checks::Checks;
use recovery::{FIRST_RETRY, Recovery, Retries};
use report::Report;
use suspects::Suspected;

pub(super) struct Inputs {
    pub(super) changes: mpsc::Receiver<Change>,
    pub(super) addresses: Addresses,
    /// The open data plane. The kernel's state is read while the engine already takes in changes and plans.
    pub(super) opened: oneshot::Receiver<Opened>,
    pub(super) stopping: watch::Receiver<bool>,
}

pub(super) struct Opened {
    pub(super) plane: Box<dyn Dataplane>,
    /// Changes that other programs make to weir's tables.
    pub(super) foreign: watch::Receiver<News>,
    /// Receives the backends that serve no longer, once that is in force.
    pub(super) sockets: Option<std::sync::mpsc::Sender<sockets::Suspects>>,
    /// Receives the name of the plane that serves.
    pub(super) mode: watch::Sender<&'static str>,
}

/// The delay before a table is compared if weir does not know whether another program changed it.
const COMPARE: Duration = Duration::from_secs(60);

/// Queries for names wait for at most this many changes.
const CHANGES_OF_NAMES: usize = 256;

/// The most changes that one delta takes in, and that are kept of each kind for a family that fails.
const MOST_CHANGES: usize = 65_536;

pub(super) struct Engine {
    model: Model,
    planner: Planner,
    plane: Option<Box<dyn Dataplane>>,
    families: Vec<Family>,
    know_addresses: bool,
    node_is_optional: bool,
    /// Whether the data plane has received a complete delta.
    began: bool,

    // Retries.
    recoveries: PerFamily<Recovery>,
    retries: Retries,
    longest_retry: Duration,
    /// The service ports that cannot be programmed, and why.
    refused: BTreeMap<PortId, String>,
    /// The service ports that one plane leaves to another.
    left: BTreeMap<PortId, String>,
    /// The latest changes by other programs.
    news: News,
    /// The time of the next retry.
    wake: Option<Instant>,

    // Receivers of the outcome.
    report: Report,
    checks: Checks,
    suspected: Suspected,
    names: Option<(SharedNames, watch::Sender<u32>)>,
    /// Receives NodePorts in force of these families.
    relay: Option<(mpsc::UnboundedSender<relay::NodePortChanges>, PerFamily<bool>)>,
}

impl Engine {
    pub(super) fn new(settings: Settings, metrics: Metrics, health: Health) -> Self {
        let now = Instant::now();
        Self {
            families: served(settings.families).collect(),
            model: Model::new(settings),
            planner: Planner::default(),
            plane: None,
            know_addresses: false,
            node_is_optional: false,
            began: false,
            recoveries: PerFamily { v4: Recovery::at_start(now), v6: Recovery::at_start(now) },
            retries: Retries::default(),
            longest_retry: Duration::from_secs(30),
            refused: BTreeMap::new(),
            left: BTreeMap::new(),
            news: News::default(),
            wake: None,
            report: Report::new(metrics, health),
            checks: Checks::default(),
            suspected: Suspected::default(),
            names: None,
            relay: None,
        }
    }

    /// Sends the number of local endpoints in force to these servers.
    pub(super) fn with_health_checks(self, health_checks: HealthChecks) -> Self {
        Self { checks: Checks::of(health_checks), ..self }
    }

    /// Keeps these names up to date, and sends the number of changes that they have taken in.
    pub(super) fn with_names(self, names: Option<(SharedNames, watch::Sender<u32>)>) -> Self {
        Self { names, ..self }
    }

    /// Sends events about service ports that cannot be programmed.
    pub(super) fn with_events(mut self, events: Events) -> Self {
        self.report.events = events;
        self
    }

    /// Sends NodePorts in force of these families.
    pub(super) fn with_relay(
        self,
        relay: mpsc::UnboundedSender<relay::NodePortChanges>,
        of: PerFamily<bool>,
    ) -> Self {
        Self { relay: Some((relay, of)), ..self }
    }

    /// Sends each family once everything of it is in force.
    pub(super) fn with_first(mut self, first: Option<mpsc::UnboundedSender<Family>>) -> Self {
        self.report.first = first;
        self
    }

    /// Whether load balancers may send traffic although the source has no Node of this node.
    pub(super) fn with_optional_node(self, optional: bool) -> Self {
        Self { node_is_optional: optional, ..self }
    }

    /// Waits no longer than `longest` after a failure.
    pub(super) fn with_retry(self, longest: Duration) -> Self {
        Self { longest_retry: longest.max(FIRST_RETRY), ..self }
    }

    /// Sends suspects once their delta is in force.
    pub(super) fn with_conntrack(mut self, flows: mpsc::UnboundedSender<Suspects>) -> Self {
        self.suspected.flows = Some(flows);
        self
    }

    /// Runs until the source ends or `stopping` is true.
    pub(super) async fn run(mut self, inputs: Inputs) {
        let Inputs { mut changes, mut addresses, mut opened, mut stopping } = inputs;
        let mut foreign = None;
        self.report.started(&self.families);
        let mut taken = Vec::new();
        loop {
            let wake = self.wake;
            let wake = pin!(async move {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            });
            tokio::select! {
                count = changes.recv_many(&mut taken, MOST_CHANGES) => if count == 0 { return },
                Ok(()) = addresses.changed() => {
                    self.model.set_host_addresses(addresses.borrow_and_update().clone());
                    self.know_addresses = true;
                }
                opened = &mut opened, if self.plane.is_none() => {
                    // The sender is gone only if the agent ends.
                    let Ok(Opened { plane, foreign: news, sockets, mode }) = opened else { return };
                    (self.report.mode, self.suspected.sockets) = (Some(mode), sockets);
                    (self.plane, foreign) = (Some(plane), Some(news));
                }
                news = next(&mut foreign) => self.notice(news),
                () = wake => {}
                _ = stopping.wait_for(|stop| *stop) => return,
            }
            while taken.len() < MOST_CHANGES {
                let Ok(change) = changes.try_recv() else { break };
                taken.push(change);
            }
            self.take_in_names(&taken);
            for change in taken.drain(..) {
                self.take_in(change);
            }
            self.bring_up_to_date();
            let unknown = self.node_is_optional && !self.model.knows_node();
            self.report.publish(&self.families, unknown || self.model.node_eligible());
        }
    }

    /// Schedules repairs of tables that other programs changed since weir read them. If the kernel dropped notifications, a quick
    /// look finds what is urgent, and a full comparison follows later, because it is expensive and often finds nothing.
    fn notice(&mut self, news: News) {
        let (now, known) = (Instant::now(), std::mem::replace(&mut self.news, news));
        for family in self.families.clone() {
            let touched = *news.touched.get(family);
            let is_read = |plane: &dyn Dataplane| {
                touched.1.is_some_and(|generation| plane.has_read(family, generation))
            };
            let mut is_touched =
                touched != *known.touched.get(family) && !self.plane.as_deref().is_some_and(is_read);
            if news.lost != known.lost {
                is_touched |= self.plane.as_deref_mut().is_some_and(|plane| !plane.looks_intact(family));
                if self.recoveries.get_mut(family).by("lost", now + COMPARE) {
                    tracing::debug!(%family, "the kernel dropped notifications about rule sets");
                }
            }
            if is_touched && let Some(wait) = self.recoveries.get_mut(family).touched(now) {
                tracing::warn!(%family, ?wait, "another program changed weir's table, repairing it");
            }
        }
    }

    /// Names come first, because the kernel takes longer.
    fn take_in_names(&self, changes: &[Change]) {
        let Some((names, seen)) = &self.names else { return };
        for some in changes.chunks(CHANGES_OF_NAMES) {
            let mut names = names.write().unwrap_or_else(PoisonError::into_inner);
            some.iter().for_each(|change| names.apply(change));
            seen.send_replace(names.changes());
        }
    }

    fn take_in(&mut self, change: Change) {
        self.report.taken_in(&change);
        self.model.apply(change);
    }

    fn bring_up_to_date(&mut self) {
        if !self.model.is_synced() || !self.know_addresses {
            return;
        }
        let started = Instant::now();
        for name in self.model.take_dirty() {
            self.planner.update(&name, self.model.plan(&name));
            self.checks.replanned(name);
        }
        left_out::tell(&mut self.model, &mut self.planner, &self.report.events);
        self.planner.update_node(self.model.node_plan());
        if let Some(mut plane) = self.plane.take() {
            self.program(&mut *plane, started);
            self.plane = Some(plane);
        }
    }
}

/// The next change by another program; waits for ever while there is no data plane.
async fn next(foreign: &mut Option<watch::Receiver<News>>) -> News {
    if let Some(foreign) = foreign
        && foreign.changed().await.is_ok()
    {
        return *foreign.borrow_and_update();
    }
    std::future::pending().await
}
