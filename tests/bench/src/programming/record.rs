//! The results of one run of one subject.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    kernel::{KernelMemory, Traffic},
    metered::Memory,
    subject::Subject,
    workload::Workload,
};

/// The phases of a run, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// From nothing to the last Service.
    Start,
    Idle,
    /// Single changes while others go on.
    Busy,
    Restart,
}

/// One start of one subject.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub subject: Subject,
    pub workload: Workload,
    pub round: u32,
    /// The longest that a phase was given, in seconds.
    pub bound_seconds: f64,
    /// The phase that did not end in that time; there is nothing from the phases after it.
    pub unfinished: Option<Phase>,
    /// From nothing to the last Service.
    pub start: Option<Start>,
    pub idle: Vec<Change>,
    /// Single changes while others go on.
    pub busy: Option<Busy>,
    pub restart: Option<Restart>,
    /// Kernel memory for it in the end.
    pub kernel: Option<KernelMemory>,
}

/// From nothing to the last Service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// From the start of the process until all Services worked, in seconds.
    pub seconds: f64,
    /// CPU seconds until then.
    pub cpu_seconds: f64,
    /// CPU seconds until the subject had come to rest.
    pub settled_cpu_seconds: f64,
    /// Memory when it had.
    pub memory: Memory,
    /// Traffic between it and the API server.
    pub traffic: Traffic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A Service with five endpoints comes; counted from its slice, which is written last, to the first connection.
    ServiceAdded,
    /// One of five endpoints goes; counted to the last connection that it answers.
    EndpointRemoved,
    /// A second endpoint comes; counted to the first connection that it answers.
    EndpointAdded,
}

impl Kind {
    /// All of them, in the order they are made.
    pub const ALL: [Self; 3] = [Self::ServiceAdded, Self::EndpointRemoved, Self::EndpointAdded];

    /// The name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ServiceAdded => "new Service",
            Self::EndpointRemoved => "removed endpoint",
            Self::EndpointAdded => "added endpoint",
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    pub kind: Kind,
    /// From the request until the API server's answer, in seconds.
    pub write_seconds: f64,
    /// From its answer until clients met it, in seconds; 0 when they did before the answer had come back.
    pub seconds: f64,
    /// Seconds that the subject was programming the kernel for it, by its own count; several syncs add up. Where nothing
    /// else happened.
    pub sync_seconds: Option<f64>,
    /// CPU seconds that it took the subject. Where nothing else happened.
    pub cpu_seconds: Option<f64>,
}

impl Change {
    /// From the request until clients met it, in seconds: the answer is one of the things that may come late.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.write_seconds + self.seconds
    }
}

/// Changes while others go on.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Busy {
    /// How many others there should have been in a second.
    pub wanted_per_second: u32,
    pub writes: u32,
    /// In how many seconds.
    pub seconds: f64,
    /// CPU seconds of the subject in that time.
    pub cpu_seconds: f64,
    /// Traffic between it and the API server in that time.
    pub traffic: Traffic,
    /// The changes that were measured.
    pub changes: Vec<Change>,
}

/// Killed, and started again after a Service had come.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restart {
    /// From the start of the process until the Service worked that had come while it was away, in seconds.
    pub seconds: f64,
    /// CPU seconds until the subject had come to rest.
    pub settled_cpu_seconds: f64,
    /// Connections to a Service of before, from the kill until then.
    pub connects: u32,
    pub failed: u32,
    /// Traffic between it and the API server.
    pub traffic: Traffic,
}

impl Run {
    /// One that has not begun.
    #[must_use]
    pub(crate) fn new(subject: Subject, workload: Workload, round: u32, bound: Duration) -> Self {
        Self {
            subject,
            workload,
            round,
            bound_seconds: bound.as_secs_f64(),
            unfinished: None,
            start: None,
            idle: Vec::new(),
            busy: None,
            restart: None,
            kernel: None,
        }
    }
}
