//! Starting a subject: with nothing there, and with what it had programmed before it was killed.

use std::{
    net::SocketAddrV4,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use anyhow::{Context as _, Result};

use super::{PATIENCE, Programming, Restart, Start, Trial, join};
use crate::{bound::Deadline, metered::Metered, probe, report::say, workload::Workload};
use weir_tests::netns::Namespace;

/// Services probed for being ready, spread over all; the others are counted in afterwards.
const PROBED: usize = 64;

impl Programming<'_> {
    /// From nothing to the last Service.
    pub(super) fn start(&self, trial: &mut Trial<'_>) -> Result<()> {
        let before = self.traffic()?;
        let begin = Instant::now();
        let deadline = self.deadline();
        self.launch(trial)?;
        let workload = trial.workload;
        let process = trial.process.as_mut().context("it was just started")?;
        let ready = all_work(&trial.node.namespace, Client::Usual, workload, Some(&mut *process), deadline)?;
        let cpu = process.cpu()?;
        let settled_cpu = process.settle(Deadline::after(PATIENCE))?;
        let start = Start {
            seconds: (ready - begin).as_secs_f64(),
            cpu_seconds: cpu.as_secs_f64(),
            settled_cpu_seconds: settled_cpu.as_secs_f64(),
            memory: process.memory(),
            traffic: self.traffic()?.since(before),
        };
        say(format_args!(
            "{} started in {:.2} s, {:.2} CPU s, {} MiB",
            trial.label(),
            start.seconds,
            start.settled_cpu_seconds,
            start.memory.resident >> 20
        ));
        trial.run.start = Some(start);
        Ok(())
    }

    pub(super) fn launch(&self, trial: &mut Trial<'_>) -> Result<()> {
        let Trial { node, relay, directory, run, .. } = trial;
        let kubeconfig = match relay {
            Some(relay) => self.runtime.block_on(self.cluster.kubeconfig_by(relay))?,
            None => self.cluster.kubeconfig().to_owned(),
        };
        let process = run.subject.start(&kubeconfig, &node.namespace, &node.roots, directory.path())?;
        if let Some(profiler) = self.profiler.filter(|_| run.subject.is_weir() && run.start.is_none()) {
            let name = format!("{} {} {}", run.subject.name(), run.workload, run.round);
            trial.profile = Some(profiler.attach(&name, process.id())?);
        }
        trial.process = Some(process);
        Ok(())
    }

    /// Kills it, lets a Service come and starts it again, while a client keeps connecting to another Service.
    pub(super) fn restart(&self, trial: &mut Trial<'_>) -> Result<()> {
        let existing = trial.workload.services().next().context("a workload of nothing")?.cluster_ip();
        let stop = Arc::new(AtomicBool::new(false));
        let alive = trial.node.namespace.thread({
            let stop = Arc::clone(&stop);
            move || probe::alive(existing, &stop)
        })?;
        let measured = self.killed(trial);
        stop.store(true, Ordering::Release);
        let (connects, failed) = alive.join().map_err(|_| anyhow::anyhow!("a probe panicked"))?;
        let restart = Restart { connects, failed, ..measured? };
        say(format_args!(
            "{} restarted in {:.2} s, {} of {} connections failed meanwhile",
            trial.label(),
            restart.seconds,
            restart.failed,
            restart.connects
        ));
        trial.run.restart = Some(restart);
        Ok(())
    }

    fn killed(&self, trial: &mut Trial<'_>) -> Result<Restart> {
        let service = self.fresh();
        // It is of what was there until now.
        if let Some(profile) = trial.profile.take() {
            profile.end()?;
        }
        trial.process = None;
        self.runtime.block_on(self.cluster.objects.add(service))?;
        let before = self.traffic()?;
        let begin = Instant::now();
        let deadline = self.deadline();
        self.launch(trial)?;
        let waiting =
            trial.node.namespace.thread(move || probe::all_answer(&[service.cluster_ip()], deadline))?;
        let ready = join(waiting, trial.process.as_mut());
        let settled =
            ready.and_then(|ready| Ok((ready, trial.process()?.settle(Deadline::after(PATIENCE))?)));
        // Whatever came of it: the next subject must not find it.
        self.runtime.block_on(self.cluster.objects.delete(service))?;
        let (ready, cpu) = settled?;
        Ok(Restart {
            seconds: (ready - begin).as_secs_f64(),
            settled_cpu_seconds: cpu.as_secs_f64(),
            connects: 0,
            failed: 0,
            traffic: self.traffic()?.since(before),
        })
    }
}

/// A client on the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
    /// As processes there are: programs at sockets serve it, where there are any.
    Usual,
    /// One that no program sees: packets serve it.
    ByPackets,
}

impl Client {
    fn start<T: Send + 'static>(
        self,
        node: &Namespace,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>> {
        match self {
            Self::Usual => node.thread(work),
            Self::ByPackets => node.thread_outside_group(work),
        }
    }
}

/// When every Service worked: a spread of them is probed until all do, then each of the rest is connected to once, and
/// waited for if it should not work yet.
pub(super) fn all_work(
    node: &Namespace,
    client: Client,
    workload: Workload,
    mut process: Option<&mut Metered>,
    deadline: Deadline,
) -> Result<Instant> {
    let all: Vec<SocketAddrV4> = workload.services().map(|service| service.cluster_ip()).collect();
    let step = all.len().div_ceil(PROBED).max(1);
    let (mut probed, mut rest): (Vec<_>, Vec<_>) =
        all.into_iter().enumerate().partition(|(number, _)| number % step == 0);
    // The last is among the first to be asked for.
    probed.extend(rest.pop());
    let addresses = |numbered: Vec<(usize, SocketAddrV4)>| -> Vec<SocketAddrV4> {
        numbered.into_iter().map(|(_, address)| address).collect()
    };
    let (probed, rest) = (addresses(probed), addresses(rest));
    let ready =
        join(client.start(node, move || probe::all_answer(&probed, deadline))?, process.as_deref_mut())?;
    let late = client.start(node, move || -> Result<Option<Instant>> {
        let missing = rest.into_iter().filter(|target| !probe::answers(*target)).collect::<Vec<_>>();
        if missing.is_empty() { Ok(None) } else { probe::all_answer(&missing, deadline).map(Some) }
    })?;
    let late = join(late, process)?;
    if late.is_some() {
        say(format_args!("some Services came after those that were probed: the last one counts"));
    }
    Ok(late.unwrap_or(ready))
}
