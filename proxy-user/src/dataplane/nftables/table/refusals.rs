//! Finds the service ports that made the kernel refuse a transaction.
//!
//! In: the ports of the transaction and the kernel's error. Out: the names of those ports, and all others in force; or
//! the error, if no port caused it. A refused transaction costs 13 ms, because the kernel waits until no packet uses
//! what it takes back. So weir asks once about everything in a transaction, and not port by port.

use std::collections::{BTreeSet, HashMap};

use super::{Slots, Table};
use crate::{
    dataplane::nftables::{
        elements::{self, PlannedElement, PlannedValue},
        shared_chains::SharedObject,
        socket::{CommitError, Netlink},
        transaction::PortChanges,
    },
    plan::{NodePlan, PortDelta, PortId, PortPlan},
    sys::libnftnl::{Batch, Subject},
};

/// The most trials of one transaction, because one without the refused ports can be refused for another reason.
const MOST_TRIALS: usize = 8;

/// The most transactions that one call halves because the kernel does not report what it refuses.
const MOST_HALVED: usize = 32;

/// The service ports that the kernel refuses, with the reasons.
#[derive(Default)]
pub(super) struct Refused {
    pub(super) ports: Vec<(PortId, String)>,
    halved: usize,
}

impl Refused {
    pub(super) fn add(&mut self, port: &PortDelta, problem: String) {
        self.ports.extend(port.id().map(|id| (id.clone(), problem)));
    }
}

/// The changes of these ports. A port was sorted out before if the maps cannot express its plan.
fn changes_of<'a>(ports: &[&'a PortDelta]) -> PortChanges<'a> {
    let mut changes = PortChanges::default();
    for port in ports {
        if let Err(problem) = changes.add(port) {
            tracing::debug!(id = ?port.id(), %problem, "leaving a service port out again");
        }
    }
    changes
}

impl Table {
    /// Applies the ports of a refused transaction that the kernel takes, and names the rest.
    ///
    /// # Errors
    ///
    /// When no port caused an error. Then nothing of these ports is in force.
    pub(super) fn sort_out<'a>(
        &mut self,
        netlink: &mut Netlink,
        mut ports: Vec<&'a PortDelta>,
        node: &NodePlan,
        error: CommitError,
        refused: &mut Refused,
    ) -> Result<(), CommitError> {
        let mut cause = refusal(error)?;
        for _ in 0..MOST_TRIALS {
            let blamed = match &*ports {
                [_] => break,
                _ => self.blamed(netlink, &ports, node, &cause)?,
            };
            if blamed.is_empty() {
                break;
            }
            let (bad, good): (Vec<(usize, &'a PortDelta)>, _) =
                ports.into_iter().enumerate().partition(|(index, _)| blamed.contains_key(index));
            bad.into_iter().for_each(|(index, port)| refused.add(port, blamed[&index].clone()));
            ports = good.into_iter().map(|(_, port)| port).collect();
            match self.commit(netlink, &changes_of(&ports), node) {
                Ok(()) => return Ok(()),
                Err(next) => cause = refusal(next)?,
            }
        }
        self.halve(netlink, &ports, node, cause, refused)
    }

    /// Halves a transaction until the port that the kernel refuses is alone in one.
    fn halve(
        &mut self,
        netlink: &mut Netlink,
        ports: &[&PortDelta],
        node: &NodePlan,
        cause: CommitError,
        refused: &mut Refused,
    ) -> Result<(), CommitError> {
        if ports.len() < 2 || refused.halved >= MOST_HALVED {
            ports.iter().for_each(|port| refused.add(port, cause.to_string()));
            return Ok(());
        }
        refused.halved += 1;
        let (first, second) = ports.split_at(ports.len() / 2);
        for half in [first, second] {
            if let Err(error) = self.commit(netlink, &changes_of(half), node) {
                self.halve(netlink, half, node, refusal(error)?, refused)?;
            }
        }
        Ok(())
    }

    /// The places of the ports that the kernel refuses when it reports on each element, with the reasons.
    fn blamed(
        &self,
        netlink: &mut Netlink,
        ports: &[&PortDelta],
        node: &NodePlan,
        cause: &CommitError,
    ) -> Result<HashMap<usize, String>, CommitError> {
        let changes = changes_of(ports);
        let foreign =
            if cause.is_conflict() { self.foreign_slots(netlink, &changes)? } else { Slots::default() };
        let numbers = self.number_changes(netlink, &changes)?;
        let (transaction, _) = self.transaction(&changes, numbers, &foreign);
        let mut batch = Batch::for_trial(&self.raw);
        self.write(&mut batch, &transaction, node);
        let (batch, subjects) = batch.finish_trial();
        let mut problems: HashMap<Subject, String> = HashMap::new();
        for (index, (place, error)) in netlink.try_out(&batch)?.into_iter().enumerate() {
            // Later errors may follow from the first, such as a missing object that the kernel refused.
            let error = if index == 0 { refusal(error)? } else { error };
            if let Some(subject) = subjects.get(place) {
                problems.entry(subject.clone()).or_insert_with(|| error.to_string());
            }
        }
        Ok(blame(ports, problems))
    }
}

/// The error, if a port may have caused it.
///
/// # Errors
///
/// All other errors.
fn refusal(error: CommitError) -> Result<CommitError, CommitError> {
    if matches!(error, CommitError::Refused(_)) { Ok(error) } else { Err(error) }
}

/// The ports that caused the kernel's problems. Of two ports that ask for the same element it is the later one.
fn blame(ports: &[&PortDelta], mut problems: HashMap<Subject, String>) -> HashMap<usize, String> {
    let mut blamed = HashMap::new();
    for (index, port) in ports.iter().enumerate().rev() {
        let plans = || [&port.after, &port.before].into_iter().flatten();
        let of_elements: Vec<String> =
            plans().flat_map(|plan| keys(plan)).filter_map(|key| problems.remove(&key)).collect();
        let of_objects =
            || plans().flat_map(|plan| objects(plan)).find_map(|name| problems.get(&name).cloned());
        if let Some(problem) = of_elements.into_iter().next().or_else(of_objects) {
            blamed.insert(index, problem);
        }
    }
    blamed
}

fn elements_of(plan: &PortPlan) -> Vec<PlannedElement> {
    elements::elements(plan).unwrap_or_default()
}

fn keys(plan: &PortPlan) -> impl Iterator<Item = Subject> {
    let elements = elements_of(plan).into_iter();
    elements.map(|element| Subject::Element(element.map.name().to_owned(), element.key))
}

fn objects(plan: &PortPlan) -> impl Iterator<Item = Subject> {
    let of_frontends = elements_of(plan).into_iter().flat_map(|element| match element.value {
        PlannedValue::Chain(object) => object.with_needed(),
        PlannedValue::None | PlannedValue::Backend(_) | PlannedValue::Verdict(_) => Vec::new(),
    });
    let objects: BTreeSet<SharedObject> = of_frontends.chain(elements::affinity_objects(plan)).collect();
    objects.into_iter().map(|object| Subject::Object(object.name()))
}
