//! Single changes, from the write until clients meet them.

use std::{
    net::SocketAddrV4,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{Busy, Change, Kind, PATIENCE, Programming, Trial, churn::Churn, join};
use crate::{
    bound::Deadline,
    cluster::Written,
    metrics, probe,
    report::{say, time},
    workload::Numbered,
};

/// How long changes have gone on before the first one is measured among them.
const WARM_UP: Duration = Duration::from_secs(1);

impl Programming<'_> {
    /// Single changes with nothing else going on.
    pub(super) fn idle(&self, trial: &mut Trial<'_>) -> Result<()> {
        let mut changes = Vec::new();
        let measured = self.series(trial, self.plan.changes, true, &mut changes);
        say(format_args!("{}: {}", trial.label(), summary(&changes)));
        trial.run.idle = changes;
        measured
    }

    /// Single changes while others go on.
    pub(super) fn busy(&self, trial: &mut Trial<'_>) -> Result<()> {
        if self.plan.churn == 0 || self.plan.busy_changes == 0 {
            return Ok(());
        }
        let (before, cpu) = (self.traffic()?, trial.process()?.cpu()?);
        let objects = self.cluster.objects.clone();
        let churn = Churn::start(self.runtime, objects, trial.workload, self.plan.churn);
        std::thread::sleep(WARM_UP);
        let mut changes = Vec::new();
        let measured = self.series(trial, self.plan.busy_changes, false, &mut changes);
        let churned = churn.end(self.runtime)?;
        say(format_args!("{} beside {} writes: {}", trial.label(), churned.writes, summary(&changes)));
        trial.run.busy = Some(Busy {
            wanted_per_second: self.plan.churn,
            writes: churned.writes,
            seconds: churned.time.as_secs_f64(),
            cpu_seconds: trial.process()?.cpu()?.saturating_sub(cpu).as_secs_f64(),
            traffic: self.traffic()?.since(before),
            changes,
        });
        measured
    }

    /// So many changes of each kind, or as many as there is time for. Each may take as long as all: a slow subject has a figure
    /// then, and not only a bound.
    fn series(&self, trial: &mut Trial<'_>, count: u32, quiet: bool, into: &mut Vec<Change>) -> Result<()> {
        let end = self.deadline();
        for _ in 0..count {
            self.changes(trial, quiet, into)?;
            if end.is_over() {
                break;
            }
        }
        Ok(())
    }

    /// One change of each kind to a new Service.
    fn changes(&self, trial: &mut Trial<'_>, quiet: bool, into: &mut Vec<Change>) -> Result<()> {
        let service = self.fresh();
        let made = Kind::ALL.into_iter().try_for_each(|kind| {
            into.push(self.change(trial, service, kind, quiet)?);
            Ok(())
        });
        // Whatever came of it: the next subject must not find it.
        self.runtime.block_on(self.cluster.objects.delete(service))?;
        made
    }

    fn change(&self, trial: &mut Trial<'_>, service: Numbered, kind: Kind, quiet: bool) -> Result<Change> {
        if kind == Kind::EndpointAdded {
            // One endpoint first, so that the second is met at once.
            self.runtime.block_on(self.cluster.objects.leave(service, &service.endpoints()[..1]))?;
            self.gone(trial, service, self.deadline())?;
        }
        // A removal comes right after a change that was waited for.
        let rested = kind == Kind::EndpointRemoved;
        let before = quiet.then(|| at_rest(trial, rested)).transpose()?;
        // Answering that is no part of what is measured.
        let cpu = trial.process()?.cpu()?;
        let is_written = Arc::new(AtomicBool::new(false));
        let probe = watch(trial, service, kind, &is_written, self.deadline())?;
        let written = self.write(service, kind);
        is_written.store(true, Ordering::Release);
        let (met, written) = (join(probe, None), written?);
        let met = met?;
        let settled = quiet.then(|| trial.process()?.settle(Deadline::after(PATIENCE))).transpose()?;
        let after = quiet.then(|| metrics::sync_seconds(&trial.node.namespace)).transpose()?;
        Ok(Change {
            kind,
            write_seconds: (written.accepted - written.begun).as_secs_f64(),
            seconds: met.saturating_duration_since(written.accepted).as_secs_f64(),
            sync_seconds: before.zip(after).map(|(before, after)| after - before),
            cpu_seconds: settled.map(|settled| settled.saturating_sub(cpu).as_secs_f64()),
        })
    }

    fn write(&self, service: Numbered, kind: Kind) -> Result<Written> {
        let (objects, endpoints) = (&self.cluster.objects, service.endpoints());
        match kind {
            Kind::ServiceAdded => self.runtime.block_on(objects.add(service)),
            Kind::EndpointRemoved => {
                self.runtime.block_on(objects.leave(service, &endpoints[..endpoints.len() - 1]))
            }
            Kind::EndpointAdded => self.runtime.block_on(objects.leave(service, &endpoints[..2])),
        }
    }

    /// Waits until only the first endpoint answers.
    fn gone(&self, trial: &Trial<'_>, service: Numbered, deadline: Deadline) -> Result<()> {
        let written = Arc::new(AtomicBool::new(true));
        for endpoint in service.endpoints().into_iter().skip(1) {
            let (written, to) = (Arc::clone(&written), service.cluster_ip());
            let probe = move || probe::last_answer(to, *endpoint.ip(), &written, deadline);
            join(trial.node.namespace.thread(probe)?, None)?;
        }
        Ok(())
    }
}

/// The subject's count at rest. Waits for the rest unless `rested`.
fn at_rest(trial: &mut Trial<'_>, rested: bool) -> Result<f64> {
    if !rested {
        trial.process()?.settle(Deadline::after(PATIENCE))?;
    }
    metrics::sync_seconds(&trial.node.namespace)
}

/// Has clients look out for a change.
fn watch(
    trial: &Trial<'_>,
    service: Numbered,
    kind: Kind,
    written: &Arc<AtomicBool>,
    deadline: Deadline,
) -> Result<JoinHandle<Result<Instant>>> {
    let (to, endpoints): (_, Vec<SocketAddrV4>) = (service.cluster_ip(), service.endpoints());
    let written = Arc::clone(written);
    let last = *endpoints.last().context("a Service without endpoints")?.ip();
    let second = *endpoints.get(1).context("a Service with one endpoint")?.ip();
    trial.node.namespace.thread(move || match kind {
        Kind::ServiceAdded => probe::all_answer(&[to], deadline),
        Kind::EndpointRemoved => probe::last_answer(to, last, &written, deadline),
        Kind::EndpointAdded => probe::first_answer(to, second, deadline),
    })
}

fn summary(changes: &[Change]) -> String {
    let of = |kind| {
        let times = changes.iter().filter(|change| change.kind == kind).map(Change::total);
        crate::statistics::quantile(times.collect(), 0.5)
    };
    let texts = Kind::ALL.map(|kind| format!("{} {}", kind.name(), time(of(kind))));
    format!("{} changes; {}", changes.len(), texts.join(", "))
}
