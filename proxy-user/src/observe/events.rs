//! Kubernetes events about Services and this Node: what `kubectl describe` shows of them.
//!
//! In: [`Trouble`]s from whoever meets them, who never waits. Out: event objects at the API server, one for each kind
//! of trouble of an object, counted on while it lasts; without an API server only log lines.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use kube::{
    Api, Client, ResourceExt as _,
    api::ListParams,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc;

use crate::model::ObjectName;

/// Troubles that may wait for the API server; more are only logged.
const WAITING: usize = 256;

/// The same trouble is told again no sooner than this. Shorter than the recorder remembers an event to count on.
const AGAIN: Duration = Duration::from_secs(120);

// What an API server takes, in bytes.
const LONGEST_NOTE: usize = 1024;
const LONGEST_INSTANCE: usize = 128;

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
    /// Trouble with a Service.
    #[must_use]
    pub const fn of_service(
        service: ObjectName,
        reason: &'static str,
        action: &'static str,
        note: String,
    ) -> Self {
        Self { about: Subject::Service(service), normal: false, reason, action, note }
    }

    /// Trouble with the agent of this node.
    #[must_use]
    pub const fn of_node(reason: &'static str, action: &'static str, note: String) -> Self {
        Self { about: Subject::Node, normal: false, reason, action, note }
    }

    /// The agent of this node starts, in kube-proxy's words.
    #[must_use]
    pub const fn starting() -> Self {
        let (reason, action) = ("Starting", "StartKubeProxy");
        Self { about: Subject::Node, normal: true, reason, action, note: String::new() }
    }
}

/// Takes troubles in. Clones lead to the same place.
#[derive(Clone, Debug)]
pub struct Events(Option<mpsc::Sender<Trouble>>);

impl Events {
    /// Without an API server: troubles are only logged.
    #[must_use]
    pub const fn logged() -> Self {
        Self(None)
    }

    /// A place to tell troubles to, and where they come out.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<Trouble>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(Some(sender)), receiver)
    }

    /// Writes events in the name of the agent on `node`, from a task that ends with the last clone.
    #[must_use]
    pub fn start(client: Client, node: &str) -> Self {
        let (events, troubles) = Self::channel();
        tokio::spawn(Scribe::new(client, node).write(troubles));
        events
    }

    /// Tells of trouble. Returns at once; where too much is waiting, it is only logged.
    pub fn tell(&self, trouble: Trouble) {
        let Trouble { about, reason, note, .. } = &trouble;
        tracing::debug!(?about, reason, note, "event");
        let Some(sender) = &self.0 else { return };
        if sender.try_send(trouble).is_err() {
            tracing::debug!("no event is written of it: too many are waiting");
        }
    }
}

/// Writes what comes in.
struct Scribe {
    client: Client,
    recorder: Recorder,
    node: String,
    told: HashMap<(Subject, &'static str, String), Instant>,
    complaint: String,
}

impl Scribe {
    fn new(client: Client, node: &str) -> Self {
        let instance = Some(shortened(node, LONGEST_INSTANCE).to_owned());
        let recorder = Recorder::new(client.clone(), Reporter { controller: "weir".to_owned(), instance });
        let node = node.to_owned();
        Self { client, recorder, node, told: HashMap::new(), complaint: String::new() }
    }

    async fn write(mut self, mut troubles: mpsc::Receiver<Trouble>) {
        while let Some(trouble) = troubles.recv().await {
            self.told.retain(|_, at| at.elapsed() < AGAIN);
            let key = (trouble.about.clone(), trouble.reason, trouble.note.clone());
            if self.told.contains_key(&key) {
                continue;
            }
            match self.publish(trouble).await {
                Ok(()) => self.complaint.clear(),
                Err(error) => self.complain(&error),
            }
            // Also after a failure: somebody who meets the same trouble ten times a second must not ask that often.
            self.told.insert(key, Instant::now());
        }
    }

    async fn publish(&self, trouble: Trouble) -> Result<(), kube::Error> {
        let regarding = match &trouble.about {
            Subject::Node => self.node(),
            Subject::Service(name) => match self.reference(name).await? {
                Some(reference) => reference,
                None => return Ok(()),
            },
        };
        let event = Event {
            type_: if trouble.normal { EventType::Normal } else { EventType::Warning },
            reason: trouble.reason.to_owned(),
            action: trouble.action.to_owned(),
            note: Some(shortened(&trouble.note, LONGEST_NOTE).to_owned()),
            secondary: None,
        };
        self.recorder.publish(&event, &regarding).await
    }

    /// How events name this Node. As kube-proxy and the kubelet have it, the uid is the name.
    fn node(&self) -> ObjectReference {
        ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(self.node.clone()),
            uid: Some(self.node.clone()),
            ..ObjectReference::default()
        }
    }

    /// How an event names the Service, with the uid by which `kubectl describe` looks events up; `None` if there is no
    /// such Service any more. It is asked for because the model has no other use for uids.
    async fn reference(&self, name: &ObjectName) -> Result<Option<ObjectReference>, kube::Error> {
        let services: Api<Service> = Api::namespaced(self.client.clone(), name.namespace());
        // A list, because that is what the role allows.
        let this = ListParams::default().fields(&format!("metadata.name={}", name.name())).match_any();
        let found = services.list_metadata(&this).await?.items.into_iter().next();
        Ok(found.map(|service| ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(name.namespace().to_owned()),
            name: Some(name.name().to_owned()),
            uid: service.uid(),
            ..ObjectReference::default()
        }))
    }

    /// Warns that events cannot be written, once in a row.
    fn complain(&mut self, error: &kube::Error) {
        let text = error.to_string();
        if text != self.complaint {
            tracing::warn!(
                error = text,
                "cannot write events; does the role allow to create and patch them?"
            );
        }
        self.complaint = text;
    }
}

/// As much of the start of `text` as fits into so many bytes.
fn shortened(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(number: usize) -> Trouble {
        let note = format!("it fails {number}");
        Trouble::of_service(ObjectName::new("shop", "cart"), "Fails", "Try", note)
    }

    #[test]
    fn who_tells_never_waits_even_where_nobody_listens() {
        let (events, mut troubles) = Events::channel();
        for number in 0..WAITING + 10 {
            events.tell(trouble(number));
        }
        for number in 0..WAITING {
            assert_eq!(troubles.try_recv().unwrap(), trouble(number));
        }
        assert!(troubles.try_recv().is_err(), "what did not fit is gone");
        drop(troubles);
        events.tell(trouble(0));
        Events::logged().tell(trouble(0));
    }

    #[test]
    fn what_is_too_long_is_cut_between_letters() {
        assert_eq!(shortened("short", 10), "short");
        assert_eq!(shortened("déjà", 4), "déj");
        assert_eq!(shortened("déjà", 2), "d");
    }
}
