//! The pods of this node whose sockets are left alone.
//!
//! In: [`PodChange`]s in any order. Out: [`Bypassed`]. What is known of a pod is a few words, and only a namespace that
//! says something is remembered.

use std::{collections::BTreeMap, sync::Arc};

use rustc_hash::FxHashMap;

use super::{Namespace, Pod, Reason, SocketLb};
use crate::model::{Change, Kind, ObjectName, PodChange, PodObject, Problem, report};

/// This node's pods and what namespaces say of them.
#[derive(Debug, Default)]
pub struct Pods {
    pods: FxHashMap<ObjectName, Pod>,
    namespaces: FxHashMap<ObjectName, Namespace>,
    /// What was complained of, because objects come again for many other reasons.
    problems: FxHashMap<(Kind, ObjectName), Vec<Problem>>,
    synced: Vec<Kind>,
}

/// The pods whose sockets are left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bypassed {
    /// Whether that is all of them. Until then a pod that is missing may only not have been heard of yet.
    pub complete: bool,
    /// By the UID in the name of the pod's cgroup.
    pub pods: BTreeMap<Arc<str>, BypassedPod>,
    /// Pods of which nothing is said, by the same UID. They are left alone while a cluster runs in them.
    pub undecided: BTreeMap<Arc<str>, ObjectName>,
}

/// A pod whose sockets are left alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BypassedPod {
    /// Namespace and name.
    pub name: ObjectName,
    /// Why.
    pub reason: Reason,
}

impl Pods {
    /// Takes in one change. Values that mean nothing are warned about once.
    pub fn apply(&mut self, change: PodChange) {
        match change {
            Change::Apply(PodObject::Pod(object)) => {
                let name = ObjectName::of(&object.metadata);
                let mut problems = Vec::new();
                let pod = Pod::read(&object, &mut problems);
                self.complain(Kind::Pod, &name, problems);
                match pod {
                    Some(pod) => self.pods.insert(name, pod),
                    None => self.pods.remove(&name),
                };
            }
            Change::Apply(PodObject::Namespace(object)) => {
                let name = ObjectName::of(&object.metadata);
                let mut problems = Vec::new();
                let namespace = Namespace::read(&object, &mut problems);
                self.complain(Kind::Namespace, &name, problems);
                if namespace == Namespace::default() {
                    self.namespaces.remove(&name);
                } else {
                    self.namespaces.insert(name, namespace);
                }
            }
            Change::Delete(kind, name) => {
                match kind {
                    Kind::Pod => drop(self.pods.remove(&name)),
                    Kind::Namespace => drop(self.namespaces.remove(&name)),
                    Kind::Service | Kind::EndpointSlice | Kind::Node | Kind::ServiceCidr => {}
                }
                self.problems.remove(&(kind, name));
            }
            Change::Synced(kind) => {
                if !self.synced.contains(&kind) {
                    self.synced.push(kind);
                }
            }
        }
    }

    /// The pods whose sockets are left alone now.
    #[must_use]
    pub fn bypassed(&self) -> Bypassed {
        let silent = Namespace::default();
        let complete = Kind::PODS.iter().all(|kind| self.synced.contains(kind));
        let mut bypassed = Bypassed { complete, ..Bypassed::default() };
        for pod in self.pods.values() {
            let namespace = ObjectName::new("", pod.name.namespace());
            let namespace = self.namespaces.get(&namespace).unwrap_or(&silent);
            let uid = Arc::clone(&pod.cgroup_uid);
            match pod.socket_lb(namespace) {
                SocketLb::On if pod.is_undecided(namespace) => {
                    bypassed.undecided.insert(uid, pod.name.clone());
                }
                SocketLb::On => {}
                SocketLb::Off(reason) => {
                    bypassed.pods.insert(uid, BypassedPod { name: pod.name.clone(), reason });
                }
            }
        }
        bypassed
    }

    fn complain(&mut self, kind: Kind, name: &ObjectName, problems: Vec<Problem>) {
        let key = (kind, name.clone());
        if self.problems.get(&key).map_or(&[][..], Vec::as_slice) == problems {
            return;
        }
        report(kind.as_str(), name, &problems);
        if problems.is_empty() {
            self.problems.remove(&key);
        } else {
            self.problems.insert(key, problems);
        }
    }
}
