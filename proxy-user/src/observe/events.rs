//! Kubernetes events about Services and this Node: what `kubectl describe` shows of them.
//!
//! In: [`Trouble`]s from the rooms that meet them, which never wait. Out: the same on a channel to the task that writes
//! events; without an API server only log lines.

use std::time::Duration;

use kube::Client;
use tokio::sync::mpsc;

use super::{Metrics, scribe::Scribe};
use crate::model::{ObjectName, Uid};

/// Troubles that may wait for the task that writes events; more are only logged and counted.
const WAITING: usize = 256;

/// The longest that trouble waits which every node sees alike, so that one node may come first.
const SPREAD: Duration = Duration::from_secs(60);

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A Service.
    Service(ObjectName),
    /// The Node this agent runs on.
    Node,
}

/// Something an operator should hear of, in the words of the events API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What it is about.
    pub about: Subject,
    /// What tells the Service from an earlier one of the same name.
    pub uid: Option<Uid>,
    /// Whether all nodes are likely to see the same.
    pub everywhere: bool,
    /// Whether all is well: something worth knowing, and no trouble at all.
    pub normal: bool,
    /// What it is, as one word such as `FailedToProgram`.
    pub reason: &'static str,
    /// What was being done, as one word such as `Program`.
    pub action: &'static str,
    /// What went wrong, in a sentence.
    pub note: String,
}

impl Trouble {
    /// Trouble with a Service, which other nodes are likely to see too.
    #[must_use]
    pub const fn of_service(
        service: ObjectName,
        reason: &'static str,
        action: &'static str,
        note: String,
    ) -> Self {
        Self {
            about: Subject::Service(service),
            uid: None,
            everywhere: true,
            normal: false,
            reason,
            action,
            note,
        }
    }

    /// Trouble with the agent of this node.
    #[must_use]
    pub const fn of_node(reason: &'static str, action: &'static str, note: String) -> Self {
        Self { about: Subject::Node, uid: None, everywhere: false, normal: false, reason, action, note }
    }

    /// The agent of this node starts, in kube-proxy's words.
    #[must_use]
    pub fn starting() -> Self {
        Self { normal: true, ..Self::of_node("Starting", "StartKubeProxy", String::new()) }
    }

    /// The same about the Service that has this uid.
    #[must_use]
    pub fn with_uid(self, uid: Option<Uid>) -> Self {
        Self { uid, ..self }
    }

    /// The same, seen by this node and told without waiting for others.
    #[must_use]
    pub fn of_this_node_alone(self) -> Self {
        Self { everywhere: false, ..self }
    }

    /// Troubles that have this in common become one event.
    pub(super) fn key(&self) -> (Subject, &'static str) {
        (self.about.clone(), self.reason)
    }
}

/// Takes troubles in. Clones lead to the same place.
#[derive(Clone, Debug)]
pub struct Events(Option<(mpsc::Sender<Trouble>, Metrics)>);

impl Events {
    /// Without an API server: troubles are only logged.
    #[must_use]
    pub const fn logged() -> Self {
        Self(None)
    }

    /// A place to tell troubles to, and where they come out.
    #[must_use]
    pub fn channel(metrics: Metrics) -> (Self, mpsc::Receiver<Trouble>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(Some((sender, metrics))), receiver)
    }

    /// Writes events in the name of the agent on `node`, from a task that ends with the last clone. Trouble that every
    /// node sees waits for a minute at most.
    #[must_use]
    pub fn start(client: Client, node: &str, metrics: Metrics) -> Self {
        Self::start_within(client, node, metrics, SPREAD)
    }

    /// The same, where trouble that every node sees waits no longer than `spread`.
    #[must_use]
    pub fn start_within(client: Client, node: &str, metrics: Metrics, spread: Duration) -> Self {
        let (events, troubles) = Self::channel(metrics.clone());
        tokio::spawn(Scribe::new(client, node, metrics, spread).write(troubles));
        events
    }

    /// Tells of trouble. Returns at once; where too much is waiting, it is only logged and counted.
    pub fn tell(&self, trouble: Trouble) {
        let Trouble { about, reason, note, .. } = &trouble;
        tracing::debug!(?about, reason, note, "event");
        let Some((sender, metrics)) = &self.0 else { return };
        if sender.try_send(trouble).is_err() {
            metrics.event_dropped();
            tracing::debug!("event not written: the queue is full");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(number: usize) -> Trouble {
        let note = format!("it fails {number}");
        Trouble::of_service(ObjectName::new("shop", "cart"), "Fails", "Try", note)
    }

    #[test]
    fn telling_never_waits_even_where_nothing_listens_and_what_does_not_fit_is_counted() {
        let metrics = Metrics::new();
        let (events, mut troubles) = Events::channel(metrics.clone());
        for number in 0..WAITING + 10 {
            events.tell(trouble(number));
        }
        for number in 0..WAITING {
            assert_eq!(troubles.try_recv().unwrap(), trouble(number));
        }
        assert!(troubles.try_recv().is_err(), "what did not fit is gone");
        assert!(metrics.render().contains("\nweir_events_dropped_total 10\n"));
        drop(troubles);
        events.tell(trouble(0));
        Events::logged().tell(trouble(0));
    }
}
