//! How long a subject takes to serve again after a hostile act.
//!
//! In: a cluster with a [`Workload`], subjects. Out: [`Recovery`]s. Each act meets a subject of its own that starts on a
//! node of its own, so none begins with what another left. Where a subject serves at sockets and by packets, both count.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::{
    PATIENCE, Programming, Trial, join,
    start::{Client, all_work},
};
use crate::{
    bound::{Deadline, in_time},
    kernel, probe,
    report::{say, time},
    subject::Subject,
    workload::{Numbered, Workload},
};
use weir_tests::{netns::Namespace, subject::Plane};

/// How many clients a sticky Service remembers when one of its endpoints goes.
const STICKY_CLIENTS: u32 = 50_000;
/// Their addresses start here, where no endpoint is.
const FIRST_CLIENT: Ipv4Addr = Ipv4Addr::new(10, 190, 0, 1);
/// So many of those that have to move are probed.
const MOVING: usize = 20;

/// A hostile act on a subject or on its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// All rules go as soon as the first Service works; counted until all work.
    FlushWhileStarting,
    /// All rules go while every Service works; counted until all work again.
    FlushWhileServing,
    /// A pod's interface comes up, and a Service comes at that moment; counted until that Service works.
    InterfaceUp,
    /// An endpoint of a Service with many sticky clients goes; counted until it answers none of them.
    StickyEndpointRemoved,
    /// The API server ends and starts again, with watches that it ended; counted from the moment it is ready until a Service
    /// works that came then.
    ApiServerRestarted,
    /// The API server falls silent on the connections that there are, as one that froze behind a load balancer, and serves new
    /// ones; counted until a Service works that came then.
    ApiServerSilent,
}

impl Act {
    pub const ALL: [Self; 6] = [
        Self::FlushWhileStarting,
        Self::FlushWhileServing,
        Self::InterfaceUp,
        Self::StickyEndpointRemoved,
        Self::ApiServerRestarted,
        Self::ApiServerSilent,
    ];

    /// The name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FlushWhileStarting => "rules flushed during a start",
            Self::FlushWhileServing => "rules flushed while serving",
            Self::InterfaceUp => "an interface comes up beside a new Service",
            Self::StickyEndpointRemoved => "an endpoint with 50,000 sticky clients goes",
            Self::ApiServerRestarted => "a new Service after a restart of the API server",
            Self::ApiServerSilent => "a new Service behind a server that froze",
        }
    }

    /// Whether it is done to the API server, so that what follows is no matter of rules.
    #[must_use]
    pub fn is_to_api_server(self) -> bool {
        matches!(self, Self::ApiServerRestarted | Self::ApiServerSilent)
    }

    /// Whether it takes most of a minute, however fast a subject is: a silent connection is given up after 45 s.
    #[must_use]
    pub fn is_long(self) -> bool {
        self == Self::ApiServerSilent
    }
}

/// One act, and what came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recovery {
    pub subject: Subject,
    pub workload: Workload,
    pub round: u32,
    pub act: Act,
    /// The longest that was waited for, in seconds.
    pub bound_seconds: f64,
    /// From the act until everything worked, in seconds; nothing where that took longer than the bound.
    pub seconds: Option<f64>,
    /// CPU seconds of the subject from the act until it had come to rest.
    pub cpu_seconds: Option<f64>,
    /// Connections by packets to a Service of before, while that was waited for.
    pub connects: u32,
    pub failed: u32,
}

impl Programming<'_> {
    /// Measures the acts with those of the subjects in turn that take part. One that did not recover in time has no further rounds
    /// of that act.
    pub(crate) fn recoveries(
        &self,
        workload: Workload,
        subjects: &[Subject],
        takes_part: impl Fn(Act, Subject) -> bool,
        mut keep: impl FnMut(Recovery) -> Result<()>,
    ) -> Result<()> {
        let mut too_slow = Vec::new();
        for round in 0..self.plan.rounds {
            for (act, subject) in
                Act::ALL.into_iter().flat_map(|act| subjects.iter().map(move |subject| (act, *subject)))
            {
                if !takes_part(act, subject) || too_slow.contains(&(act, subject)) {
                    continue;
                }
                let recovery = self.recovery(subject, workload, round, act);
                let recovery = recovery.with_context(|| format!("{}, {}", subject.name(), act.name()))?;
                if recovery.seconds.is_none() {
                    too_slow.push((act, subject));
                }
                keep(recovery)?;
            }
        }
        Ok(())
    }

    fn recovery(&self, subject: Subject, workload: Workload, round: u32, act: Act) -> Result<Recovery> {
        let mut trial = self.trial(subject, workload, round)?;
        let mut recovery = Recovery {
            subject,
            workload,
            round,
            act,
            bound_seconds: self.plan.bound.as_secs_f64(),
            seconds: None,
            cpu_seconds: None,
            connects: 0,
            failed: 0,
        };
        if act == Act::ApiServerSilent {
            trial.relay = Some(self.runtime.block_on(self.cluster.relay())?);
        }
        self.launch(&mut trial)?;
        let done = self.act(&mut trial, &mut recovery);
        if let Some((took, cpu)) = in_time(done)? {
            let settled = trial.process()?.settle(Deadline::after(PATIENCE))?;
            recovery.seconds = Some(took.as_secs_f64());
            recovery.cpu_seconds = Some(settled.saturating_sub(cpu).as_secs_f64());
        }
        say(format_args!(
            "{}, {}: {}",
            trial.label(),
            act.name(),
            recovery.seconds.map_or_else(|| "not in time".to_owned(), time)
        ));
        trial.process = None;
        kernel::clear(&trial.node.namespace)?;
        Ok(recovery)
    }

    /// How long it took, and the CPU time that the subject had taken before. A subject that does not start in time is not in time
    /// for the act either.
    fn act(&self, trial: &mut Trial<'_>, recovery: &mut Recovery) -> Result<(Duration, Duration)> {
        if recovery.act == Act::FlushWhileStarting {
            return self.flush_while_starting(trial);
        }
        trial.serves(self.deadline())?;
        trial.process()?.settle(Deadline::after(PATIENCE))?;
        self.while_serving(trial, recovery)
    }

    /// How long it took, and the CPU time that the subject had taken before.
    fn flush_while_starting(&self, trial: &mut Trial<'_>) -> Result<(Duration, Duration)> {
        let deadline = self.deadline();
        let first = trial.workload.services().next().context("a workload of nothing")?.cluster_ip();
        let begun =
            trial.node.namespace.thread_outside_group(move || probe::all_answer(&[first], deadline))?;
        join(begun, trial.process.as_mut())?;
        let cpu = trial.process()?.cpu()?;
        flush(&trial.node.namespace)?;
        let begin = Instant::now();
        Ok((trial.serves(deadline)?.saturating_duration_since(begin), cpu))
    }

    /// The same for acts that meet a subject which serves, with a client that keeps connecting meanwhile.
    fn while_serving(&self, trial: &mut Trial<'_>, into: &mut Recovery) -> Result<(Duration, Duration)> {
        // Before the client: filling takes a while.
        let sticky = match into.act {
            Act::StickyEndpointRemoved => Some(self.sticky(trial)?),
            _ => None,
        };
        let existing = trial.workload.services().last().context("a workload of nothing")?.cluster_ip();
        let stop = Arc::new(AtomicBool::new(false));
        let alive = trial.node.namespace.thread_outside_group({
            let stop = Arc::clone(&stop);
            move || probe::alive(existing, &stop)
        })?;
        let cpu = trial.process()?.cpu()?;
        let done = match (into.act, &sticky) {
            (Act::StickyEndpointRemoved, Some(sticky)) => self.remove_sticky_endpoint(trial, sticky),
            (Act::InterfaceUp, _) => self.interface_up(trial),
            (Act::ApiServerRestarted, _) => self.restart_api_server(trial),
            (Act::ApiServerSilent, _) => self.silence_api_server(trial),
            _ => flush_while_serving(trial, self.deadline()),
        };
        stop.store(true, Ordering::Release);
        (into.connects, into.failed) = alive.join().map_err(|_| anyhow!("a probe panicked"))?;
        if let Some(sticky) = sticky {
            self.runtime.block_on(self.cluster.objects.delete(sticky.service))?;
        }
        Ok((done?, cpu))
    }

    fn interface_up(&self, trial: &Trial<'_>) -> Result<Duration> {
        let pod = Namespace::new("pod")?;
        let node = &trial.node.namespace;
        node.ip(&[format!("link add pod0 type veth peer name eth0 netns {}", pod.path())])?;
        pod.ip(&["link set eth0 up".to_owned()])?;
        let service = self.fresh();
        let (to, deadline) = (service.cluster_ip(), self.deadline());
        let probe = node.thread(move || probe::all_answer(&[to], deadline))?;
        node.ip(&["link set pod0 up".to_owned()])?;
        let written = self.runtime.block_on(self.cluster.objects.add(service));
        let met = join(probe, None);
        self.runtime.block_on(self.cluster.objects.delete(service))?;
        Ok(met?.saturating_duration_since(written?.begun))
    }

    fn restart_api_server(&self, trial: &Trial<'_>) -> Result<Duration> {
        self.runtime.block_on(self.cluster.restart())?;
        self.new_service_works(trial)
    }

    fn silence_api_server(&self, trial: &Trial<'_>) -> Result<Duration> {
        trial.relay.as_ref().context("the subject asks the API server itself")?.fall_silent();
        self.new_service_works(trial)
    }

    /// How long it takes from now until a Service works that comes now.
    fn new_service_works(&self, trial: &Trial<'_>) -> Result<Duration> {
        let begin = Instant::now();
        let service = self.fresh();
        let (to, deadline) = (service.cluster_ip(), self.deadline());
        let probe = trial.node.namespace.thread(move || probe::all_answer(&[to], deadline))?;
        let written = self.runtime.block_on(self.cluster.objects.add(service));
        let met = join(probe, None);
        self.runtime.block_on(self.cluster.objects.delete(service))?;
        written?;
        Ok(met?.saturating_duration_since(begin))
    }

    /// A Service that many clients have called; each stays with its endpoint.
    fn sticky(&self, trial: &mut Trial<'_>) -> Result<Sticky> {
        let service = self.fresh();
        let endpoints = service.endpoints();
        let kept = endpoints.get(..2).context("a Service with one endpoint")?;
        let mut object = service.service()?;
        object.spec.get_or_insert_default().session_affinity = Some("ClientIP".to_owned());
        let slice = service.slice(kept)?;
        self.runtime.block_on(self.cluster.objects.create(&object, &[slice]))?;
        let (to, gone, deadline) = (service.cluster_ip(), *kept[1].ip(), self.deadline());
        let asking = trial.node.namespace.thread_outside_group(move || -> Result<Vec<Ipv4Addr>> {
            probe::all_answer(&[to], deadline)?;
            let first = FIRST_CLIENT.to_bits();
            let clients = (first..first + STICKY_CLIENTS).map(Ipv4Addr::from_bits);
            let led = clients.map(|client| Ok((client, probe::answer_to(client, to)?)));
            let led = led.collect::<Result<Vec<_>>>()?;
            Ok(led.into_iter().filter(|(_, endpoint)| *endpoint == gone).map(|(client, _)| client).collect())
        })?;
        let mut clients = join(asking, trial.process.as_mut()).context("asking as many clients")?;
        ensure!(clients.len() >= MOVING, "{gone} answered {} of {STICKY_CLIENTS} clients", clients.len());
        // Of those spread over all.
        let step = clients.len() / MOVING;
        clients = clients.into_iter().step_by(step).collect();
        trial.process()?.settle(Deadline::after(PATIENCE))?;
        Ok(Sticky { service, gone, clients })
    }

    fn remove_sticky_endpoint(&self, trial: &mut Trial<'_>, sticky: &Sticky) -> Result<Duration> {
        let Sticky { service, gone, clients } = sticky;
        let (to, gone, clients, deadline) = (service.cluster_ip(), *gone, clients.clone(), self.deadline());
        let moving = trial
            .node
            .namespace
            .thread_outside_group(move || probe::all_moved(&clients, to, gone, deadline))?;
        let left = service.endpoints().into_iter().take(1).collect::<Vec<_>>();
        let written = self.runtime.block_on(self.cluster.objects.leave(*service, &left));
        let moved = join(moving, trial.process.as_mut());
        Ok(moved?.saturating_duration_since(written?.begun))
    }
}

/// A Service, an endpoint of it, and some of its clients.
struct Sticky {
    service: Numbered,
    gone: Ipv4Addr,
    clients: Vec<Ipv4Addr>,
}

impl Trial<'_> {
    /// When every Service worked by packets, and at sockets where the subject serves there.
    fn serves(&mut self, deadline: Deadline) -> Result<Instant> {
        let (node, workload) = (&self.node.namespace, self.workload);
        let process = self.process.as_mut();
        if self.run.subject.plane() != Some(Plane::Ebpf) {
            return all_work(node, Client::ByPackets, workload, process, deadline);
        }
        thread::scope(|scope| {
            let sockets = scope.spawn(|| all_work(node, Client::Usual, workload, None, deadline));
            let packets = all_work(node, Client::ByPackets, workload, process, deadline);
            let sockets = sockets.join().map_err(|_| anyhow!("a probe panicked"))?;
            Ok(packets?.max(sockets?))
        })
    }
}

fn flush_while_serving(trial: &mut Trial<'_>, deadline: Deadline) -> Result<Duration> {
    flush(&trial.node.namespace)?;
    let begin = Instant::now();
    Ok(trial.serves(deadline)?.saturating_duration_since(begin))
}

/// Takes out all rules in the way firewalls do when they load their own.
fn flush(node: &Namespace) -> Result<()> {
    node.stdout("nft", &["flush", "ruleset"]).map(drop)
}
