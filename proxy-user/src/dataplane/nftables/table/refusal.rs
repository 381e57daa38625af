//! What to make of a transaction that the kernel refuses: which service ports it is about.
//!
//! In: the ports of the transaction and the kernel's answer. Out: all others are in force, and those are named; or the
//! error, where it is about no port at all. A refused transaction costs 13 ms, because the kernel waits until no packet
//! is on its way through what it takes back. So it is asked once about everything in a transaction, and not port by port.

use std::{collections::HashMap, io};

use super::{Slots, Table};
use crate::{
    dataplane::nftables::{
        element::{self, Item, Leads},
        netlink::{About, Transaction},
        object::Object,
        socket::Netlink,
        stage::{Stage, remembering},
    },
    plan::{NodePlan, PortDelta, PortId, PortPlan},
};

/// Most trials of one transaction: one that left something out can meet what was hidden behind that.
const MOST_TRIALS: usize = 8;

/// Most transactions that are halved because the kernel does not say what it refuses, for each call.
const MOST_HALVED: usize = 32;

/// The service ports that the kernel refuses, and why.
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

/// Whether an error is about no port. What is missing was there when the transaction was made, so another program took it
/// away. Nor are memory, rights and lost reports any port's matter.
fn concerns_all(error: &io::Error) -> bool {
    use libc::{EACCES, EAGAIN, EINTR, EMSGSIZE, ENOBUFS, ENOENT, ENOMEM, EPERM};
    let kind = error.raw_os_error();
    matches!(kind, Some(ENOENT | ENOMEM | EPERM | EACCES | ENOBUFS | EMSGSIZE | EAGAIN | EINTR))
}

/// What is asked for by these ports; what cannot be said was sorted out before.
fn staged<'a>(ports: &[&'a PortDelta]) -> Stage<'a> {
    let mut stage = Stage::default();
    for port in ports {
        if let Err(problem) = stage.take_in(port) {
            tracing::debug!(id = ?port.id(), problem, "is left out once more");
        }
    }
    stage
}

impl Table {
    /// Puts what the kernel takes of a refused transaction in force, and names the ports that it does not take.
    ///
    /// # Errors
    ///
    /// When an error is about no port. Nothing of these ports is in force then.
    pub(super) fn sort_out<'a>(
        &mut self,
        netlink: &mut Netlink,
        mut ports: Vec<&'a PortDelta>,
        node: &NodePlan,
        mut error: io::Error,
        refused: &mut Refused,
    ) -> io::Result<()> {
        for _ in 0..MOST_TRIALS {
            if concerns_all(&error) {
                return Err(error);
            }
            let blamed = match &*ports {
                [_] => break,
                _ => self.blamed(netlink, &ports, node, &error)?,
            };
            if blamed.is_empty() {
                break;
            }
            let (bad, good): (Vec<(usize, &'a PortDelta)>, _) =
                ports.into_iter().enumerate().partition(|(index, _)| blamed.contains_key(index));
            bad.into_iter().for_each(|(index, port)| refused.add(port, blamed[&index].clone()));
            ports = good.into_iter().map(|(_, port)| port).collect();
            match self.commit(netlink, &staged(&ports), node) {
                Ok(()) => return Ok(()),
                Err(next) => error = next,
            }
        }
        self.halve(netlink, &ports, node, error, refused)
    }

    /// Halves a transaction until the port that the kernel stumbles over stands alone.
    fn halve(
        &mut self,
        netlink: &mut Netlink,
        ports: &[&PortDelta],
        node: &NodePlan,
        error: io::Error,
        refused: &mut Refused,
    ) -> io::Result<()> {
        if concerns_all(&error) {
            return Err(error);
        }
        if ports.len() < 2 || refused.halved >= MOST_HALVED {
            ports.iter().for_each(|port| refused.add(port, error.to_string()));
            return Ok(());
        }
        refused.halved += 1;
        let (first, second) = ports.split_at(ports.len() / 2);
        for half in [first, second] {
            if let Err(error) = self.commit(netlink, &staged(half), node) {
                self.halve(netlink, half, node, error, refused)?;
            }
        }
        Ok(())
    }

    /// The places of the ports that the kernel refuses when it is asked about each element, and why it does.
    fn blamed(
        &self,
        netlink: &mut Netlink,
        ports: &[&PortDelta],
        node: &NodePlan,
        error: &io::Error,
    ) -> io::Result<HashMap<usize, String>> {
        let stage = staged(ports);
        let others = match error.raw_os_error() {
            Some(libc::EEXIST | libc::EBUSY) => self.others(netlink, &stage)?,
            _ => Slots::default(),
        };
        let mut transaction = Transaction::on_trial(&self.raw);
        let numbers = self.number_steps(netlink, &stage)?;
        self.write(&mut transaction, &stage, &numbers, node, self.needs_after(&stage), &others);
        let (batch, about) = transaction.finish_trial();
        let mut problems: HashMap<About, String> = HashMap::new();
        for (index, (place, error)) in netlink.try_out(&batch)?.into_iter().enumerate() {
            // What is missing behind something that was refused is missing for that reason.
            if index == 0 && concerns_all(&error) {
                return Err(error);
            }
            if let Some(about) = about.get(place) {
                problems.entry(about.clone()).or_insert_with(|| error.to_string());
            }
        }
        Ok(blame(ports, problems))
    }
}

/// Which ports have something to do with what is refused. Of two that ask for the same element it is the later one.
fn blame(ports: &[&PortDelta], mut problems: HashMap<About, String>) -> HashMap<usize, String> {
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

fn items(plan: &PortPlan) -> Vec<Item> {
    element::items(plan).unwrap_or_default()
}

fn keys(plan: &PortPlan) -> Vec<About> {
    let keys = items(plan).into_iter().map(|item| About::Element(item.map.name().to_owned(), item.key));
    keys.collect()
}

fn objects(plan: &PortPlan) -> Vec<About> {
    let led_to = items(plan).into_iter().flat_map(|item| match item.leads {
        Leads::Bucket(object) => object.needed(),
        Leads::Nowhere | Leads::To(_) | Leads::Verdict(_) => Vec::new(),
    });
    let mut objects: Vec<Object> = led_to.chain(remembering(plan)).collect();
    objects.sort_unstable();
    objects.dedup();
    objects.into_iter().map(|object| About::Object(object.name())).collect()
}
