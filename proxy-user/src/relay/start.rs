//! Runs the relay on a thread of its own, while only the nftables plane serves.
//!
//! ```text
//! engine ──NodePortChanges──────▶ supervisor ──▶ sockets on 127.0.0.1 and ::1 ──▶ backends
//! planes ──name of the plane that serves──▶ └─▶ metrics
//! ```
//! If another process has a port, weir tries again later to listen on it. Other ports do not wait.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use super::{
    Datagrams, LoopbackPort, NodePortChanges, NodePorts, Picker, Streams, relay_datagrams, relay_streams,
};
use crate::{
    connection_limit::ConnectionLimit,
    dataplane::ebpf,
    model::{Family, LoopbackNodePorts, PerFamily, Protocol, Settings},
    observe::Metrics,
};

/// The pause before the next attempt to listen.
const AGAIN: Duration = Duration::from_secs(5);

/// The families with NodePorts on loopback addresses while either plane serves.
pub(crate) fn relayed(settings: &Settings) -> PerFamily<bool> {
    let is = |family: Family| {
        *settings.families.get(family)
            && *settings.loopback_node_ports.get(family) == LoopbackNodePorts::Always
    };
    PerFamily { v4: is(Family::V4), v6: is(Family::V6) }
}

/// Relays the NodePorts of `changes` while `mode` is not the socket plane. The thread ends with the process.
///
/// # Errors
///
/// When the thread does not start.
pub(crate) fn start(
    changes: mpsc::UnboundedReceiver<NodePortChanges>,
    mode: watch::Receiver<&'static str>,
    limit: ConnectionLimit<LoopbackPort>,
    metrics: &Metrics,
) -> anyhow::Result<()> {
    let supervisor = Supervisor {
        node_ports: NodePorts::default(),
        open: BTreeMap::new(),
        taken: BTreeSet::new(),
        limit,
        metrics: metrics.clone(),
    };
    std::thread::Builder::new().name("relay".to_owned()).spawn(move || {
        match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(supervisor.run(changes, mode)),
            Err(error) => tracing::error!(%error, "NodePorts are not relayed on loopback addresses"),
        }
    })?;
    Ok(())
}

/// A NodePort with a listening task, which ends when this is dropped.
struct Open {
    picker: Arc<Picker>,
    task: JoinHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Supervisor {
    node_ports: NodePorts,
    open: BTreeMap<LoopbackPort, Open>,
    /// NodePorts that weir cannot listen on.
    taken: BTreeSet<LoopbackPort>,
    limit: ConnectionLimit<LoopbackPort>,
    metrics: Metrics,
}

impl Supervisor {
    async fn run(
        mut self,
        mut changes: mpsc::UnboundedReceiver<NodePortChanges>,
        mut mode: watch::Receiver<&'static str>,
    ) {
        loop {
            tokio::select! {
                some = changes.recv() => match some {
                    Some(some) => self.node_ports.apply(some),
                    None => return,
                },
                changed = mode.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(AGAIN), if !self.taken.is_empty() => {}
            }
            while let Ok(more) = changes.try_recv() {
                self.node_ports.apply(more);
            }
            let serves = *mode.borrow_and_update() != ebpf::MODE;
            self.follow(serves);
        }
    }

    /// Listens on exactly the NodePorts that have backends, or on none if the socket plane serves.
    fn follow(&mut self, serves: bool) {
        self.open.retain(|port, _| serves && self.node_ports.get(*port).is_some());
        self.taken.retain(|port| serves && self.node_ports.get(*port).is_some());
        for (port, backends) in self.node_ports.iter().filter(|_| serves) {
            if let Some(open) = self.open.get(&port) {
                open.picker.set(backends);
                continue;
            }
            let picker = Arc::new(Picker::new(backends.clone()));
            match listen(port, Arc::clone(&picker), self.limit.clone()) {
                Ok(task) => {
                    self.taken.remove(&port);
                    self.open.insert(port, Open { picker, task });
                }
                Err(error) => {
                    self.metrics.localhost_listener_failed(port.family);
                    if self.taken.insert(port) {
                        let (address, protocol) = (port.address(), port.protocol);
                        tracing::warn!(%address, %protocol, %error, "cannot listen for a NodePort on this address; weir will try again");
                    }
                }
            }
        }
        for family in Family::ALL {
            let listening = self.open.keys().filter(|port| port.family == family).count();
            self.metrics.set_localhost_listeners(family, listening);
        }
    }
}

fn listen(
    port: LoopbackPort,
    picker: Arc<Picker>,
    limit: ConnectionLimit<LoopbackPort>,
) -> io::Result<JoinHandle<()>> {
    let at = port.address();
    Ok(match port.protocol {
        Protocol::Udp => {
            let datagrams = Datagrams::bind(at)?;
            tokio::spawn(async move { match relay_datagrams(datagrams, port, picker, limit).await {} })
        }
        Protocol::Tcp | Protocol::Sctp => {
            let streams = Streams::bind(at)?;
            tokio::spawn(async move { match relay_streams(streams, port, picker, limit).await {} })
        }
    })
}
