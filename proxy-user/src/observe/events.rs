//! Kubernetes events about Services and this Node, which `kubectl describe` shows.
//!
//! In: [`Trouble`]s, from callers that never wait. Out: the same on a channel to the task that writes events; without
//! an API server only log lines.

use std::time::Duration;

use kube::Client;
use tokio::sync::mpsc;

use super::{Metrics, event_writer::EventWriter, trouble::Trouble};

/// Troubles that may wait for the task that writes events. Further ones are only logged and counted.
const WAITING: usize = 256;

/// The longest random delay of a trouble that every node sees, so that one node writes its event before the others.
const SPREAD: Duration = Duration::from_secs(60);

/// Queues troubles for the task that writes events. Clones share the queue.
#[derive(Clone, Debug)]
pub struct Events(Option<(mpsc::Sender<Trouble>, Metrics)>);

impl Events {
    /// Without an API server: troubles are only logged.
    #[must_use]
    pub const fn logged() -> Self {
        Self(None)
    }

    /// The queue, and its other end.
    #[must_use]
    pub fn channel(metrics: Metrics) -> (Self, mpsc::Receiver<Trouble>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(Some((sender, metrics))), receiver)
    }

    /// Starts a task that writes events for the agent on `node`, until the last clone is dropped. Trouble that every
    /// node sees waits for a minute at most.
    #[must_use]
    pub fn start(client: Client, node: &str, metrics: Metrics) -> Self {
        Self::start_within(client, node, metrics, SPREAD)
    }

    /// Like [`Events::start`], but trouble that every node sees waits for `spread` at most.
    #[must_use]
    pub fn start_within(client: Client, node: &str, metrics: Metrics, spread: Duration) -> Self {
        let (events, troubles) = Self::channel(metrics.clone());
        tokio::spawn(EventWriter::new(client, node, metrics, spread).write(troubles));
        events
    }

    /// Queues a trouble and returns at once. If the queue is full, the trouble is only logged and counted.
    pub fn report(&self, trouble: Trouble) {
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
    use crate::model::ObjectName;

    fn trouble(number: usize) -> Trouble {
        let note = format!("it fails {number}");
        Trouble::of_service(ObjectName::new("shop", "cart"), "Fails", "Try", note)
    }

    #[test]
    fn reporting_never_waits_and_counts_what_the_queue_has_no_room_for() {
        let metrics = Metrics::new();
        let (events, mut troubles) = Events::channel(metrics.clone());
        for number in 0..WAITING + 10 {
            events.report(trouble(number));
        }
        for number in 0..WAITING {
            assert_eq!(troubles.try_recv().unwrap(), trouble(number));
        }
        assert!(troubles.try_recv().is_err(), "further troubles are dropped");
        assert!(metrics.render().contains("\nweir_events_dropped_total 10\n"));
        drop(troubles);
        events.report(trouble(0));
        Events::logged().report(trouble(0));
    }
}
