//! A client that never stops connecting, and counts.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Result, anyhow};
use weir::model::Family;

use super::{Call, Flow, Transport};
use crate::{
    netns::Namespace,
    node::{Location, node_address},
    objects::{Addresses, PORT},
    wait::await_that,
};

/// Every way to a Service on the first node: from a pod, from the node itself and from outside, in both families.
#[must_use]
pub fn every_way(addresses: Addresses, transports: &[Transport]) -> Vec<(Location, Call)> {
    let mut calls = Vec::new();
    for family in Family::ALL {
        let cluster = SocketAddr::new(addresses.cluster_ip(family), PORT);
        let node_port = SocketAddr::new(node_address(family, 1), addresses.node_port(PORT));
        let external = SocketAddr::new(addresses.external_ip(family), PORT);
        for transport in transports {
            for (from, to) in [
                (Location::Pod(1, 2), cluster),
                (Location::Host(1), cluster),
                (Location::Outside(0), node_port),
                (Location::Outside(0), external),
            ] {
                // A busy machine may answer late; what is asked here is whether it answers at all.
                let call = Call { patience: Duration::from_secs(5), ..Call::new(from, to, *transport) };
                calls.push((from, call));
            }
        }
    }
    calls
}

/// Waits until every load has been answered so many times more.
pub fn await_answers(loads: &[Load], more: u64) {
    let before: Vec<u64> = loads.iter().map(Load::answered).collect();
    await_that("every load is answered more", || {
        loads.iter().zip(&before).all(|(load, before)| load.answered() >= before + more)
    });
}

/// The results of the calls of a [`Load`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Answers, by backend.
    pub answers: BTreeMap<String, u64>,
    /// Everything else, by what was seen.
    pub failures: BTreeMap<String, u64>,
}

impl Tally {
    /// How many calls were answered.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answers.values().sum()
    }
}

/// A thread that makes the same call over and over, each time on a new flow.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: JoinHandle<Tally>,
}

impl Load {
    /// Starts calling from a namespace, `pause` after each answer.
    ///
    /// # Errors
    ///
    /// When no thread can be started.
    pub fn start(namespace: &Namespace, call: Call, pause: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&answered));
        let thread = namespace.thread(move || {
            let mut tally = Tally::default();
            while !stopped.load(Ordering::Relaxed) {
                match Flow::open(&call).map(|(flow, answer)| flow.abort(answer)) {
                    Ok(answer) => {
                        *tally.answers.entry(answer.backend).or_default() += 1;
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(other) => *tally.failures.entry(other.to_string()).or_default() += 1,
                }
                if pause > Duration::ZERO {
                    thread::sleep(pause);
                }
            }
            tally
        })?;
        Ok(Self { stop, answered, thread })
    }

    /// How many calls have been answered so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Stops calling.
    ///
    /// # Errors
    ///
    /// When the thread died.
    pub fn stop(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the load thread died"))
    }
}
