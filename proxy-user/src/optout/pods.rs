//! The pods of this node that opt out of the socket plane.
//!
//! In: [`PodChange`]s in any order. Out: [`Bypassed`]. Only a few words of each pod are stored, and only
//! namespaces that decide something.

use std::{collections::BTreeMap, sync::Arc};

use rustc_hash::FxHashMap;

use super::{Namespace, Pod, Reason, SocketLb};
use crate::model::{Change, Kind, ObjectName, PodChange, PodObject, Problem, report};

/// This node's pods, and the namespaces that decide for their pods.
#[derive(Debug, Default)]
pub struct Pods {
    pods: FxHashMap<ObjectName, Pod>,
    namespaces: FxHashMap<ObjectName, Namespace>,
    /// Problems that were logged, because an object arrives again at every change of another field.
    problems: FxHashMap<(Kind, ObjectName), Vec<Problem>>,
    synced: Vec<Kind>,
}

/// The pods that the socket plane leaves alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bypassed {
    /// Whether the list is complete. Until then a missing pod may just not have arrived yet.
    pub complete: bool,
    /// Keyed by the UID in the name of the pod's cgroup.
    pub pods: BTreeMap<Arc<str>, BypassedPod>,
    /// Pods without a decision, keyed by the same UID. The socket plane leaves them alone while a cluster
    /// runs in them.
    pub undecided: BTreeMap<Arc<str>, ObjectName>,
}

/// A pod that the socket plane leaves alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BypassedPod {
    /// Namespace and name of the pod.
    pub name: ObjectName,
    /// Why its sockets are left alone.
    pub reason: Reason,
}

impl Pods {
    /// Takes in one change. A value that weir ignores is logged once.
    pub fn apply(&mut self, change: PodChange) {
        match change {
            Change::Apply(PodObject::Pod(object)) => {
                let name = ObjectName::of(&object.metadata);
                let mut problems = Vec::new();
                let pod = Pod::read(&object, &mut problems);
                self.report_problems(Kind::Pod, &name, problems);
                match pod {
                    Some(pod) => self.pods.insert(name, pod),
                    None => self.pods.remove(&name),
                };
            }
            Change::Apply(PodObject::Namespace(object)) => {
                let name = ObjectName::of(&object.metadata);
                let mut problems = Vec::new();
                let namespace = Namespace::read(&object, &mut problems);
                self.report_problems(Kind::Namespace, &name, problems);
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

    /// Returns the pods that the socket plane leaves alone now.
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

    fn report_problems(&mut self, kind: Kind, name: &ObjectName, problems: Vec<Problem>) {
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
