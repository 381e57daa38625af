//! The content of an event: its subject, its reason and its note.
//!
//! In: an error in any room. Out: a [`Trouble`], with the field names of the events API.

use crate::model::{ObjectName, Uid};

/// The object that an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A Service.
    Service(ObjectName),
    /// The Node of this agent.
    Node,
}

/// A message for operators, with the field names of the events API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The object that the event is about.
    pub about: Subject,
    /// The Service's uid, which distinguishes it from an earlier Service of the same name.
    pub uid: Option<Uid>,
    /// Whether all nodes are likely to see the same.
    pub everywhere: bool,
    /// Whether the event has type Normal instead of Warning.
    pub normal: bool,
    /// One word such as `FailedToProgram`.
    pub reason: &'static str,
    /// One word such as `Program`, for what the agent was doing.
    pub action: &'static str,
    /// A sentence that says what went wrong.
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

    /// The agent of this node starts; reason and action are kube-proxy's.
    #[must_use]
    pub fn starting() -> Self {
        Self { normal: true, ..Self::of_node("Starting", "StartKubeProxy", String::new()) }
    }

    /// With the Service's uid.
    #[must_use]
    pub fn with_uid(self, uid: Option<Uid>) -> Self {
        Self { uid, ..self }
    }

    /// Only this node sees it, so its event does not wait for other nodes.
    #[must_use]
    pub fn of_this_node_alone(self) -> Self {
        Self { everywhere: false, ..self }
    }

    /// Troubles with the same key become one event.
    pub(super) fn key(&self) -> (Subject, &'static str) {
        (self.about.clone(), self.reason)
    }
}
