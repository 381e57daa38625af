//! NodePorts on loopback addresses where nothing but the packets' plane serves: a path of its own, on a thread of its own.
//!
//! ```text
//! engine ──NodePortChanges──▶ supervise ──▶ sockets on 127.0.0.1 and ::1 ──▶ backends
//! planes ──name of what serves──▶    └─▶ metrics
//! ```
//! A port that cannot be listened on, because a process has it, keeps none of the others waiting; it is tried again.

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
    dataplane::ebpf,
    model::{Family, LoopbackNodePorts, PerFamily, Protocol, Settings},
    observe::Metrics,
    places::Places,
};

/// How often a port that could not be listened on is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// The families whose NodePorts are to answer on loopback addresses whatever plane serves.
pub(crate) fn relayed(settings: &Settings) -> PerFamily<bool> {
    let is = |family: Family| {
        *settings.families.get(family)
            && *settings.loopback_node_ports.get(family) == LoopbackNodePorts::Always
    };
    PerFamily { v4: is(Family::V4), v6: is(Family::V6) }
}

/// Relays what `news` tells of, for as long as `mode` is not that of the sockets' plane. The thread ends with the process.
///
/// # Errors
///
/// When the thread does not start.
pub(crate) fn start(
    news: mpsc::UnboundedReceiver<NodePortChanges>,
    mode: watch::Receiver<&'static str>,
    places: Places<LoopbackPort>,
    metrics: &Metrics,
) -> anyhow::Result<()> {
    let supervisor = Supervisor {
        node_ports: NodePorts::default(),
        open: BTreeMap::new(),
        taken: BTreeSet::new(),
        places,
        metrics: metrics.clone(),
    };
    std::thread::Builder::new().name("relay".to_owned()).spawn(move || {
        match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(supervisor.run(news, mode)),
            Err(error) => tracing::error!(%error, "NodePorts are not relayed on loopback addresses"),
        }
    })?;
    Ok(())
}

/// A NodePort that is listened on, for as long as this lives.
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
    /// Those that cannot be listened on.
    taken: BTreeSet<LoopbackPort>,
    places: Places<LoopbackPort>,
    metrics: Metrics,
}

impl Supervisor {
    async fn run(
        mut self,
        mut news: mpsc::UnboundedReceiver<NodePortChanges>,
        mut mode: watch::Receiver<&'static str>,
    ) {
        loop {
            tokio::select! {
                some = news.recv() => match some {
                    Some(some) => self.node_ports.apply(some),
                    None => return,
                },
                changed = mode.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(AGAIN), if !self.taken.is_empty() => {}
            }
            while let Ok(more) = news.try_recv() {
                self.node_ports.apply(more);
            }
            let serves = *mode.borrow_and_update() != ebpf::MODE;
            self.follow(serves);
        }
    }

    /// Listens on what leads somewhere, if this is to serve at all, and on nothing else.
    fn follow(&mut self, serves: bool) {
        self.open.retain(|port, _| serves && self.node_ports.get(*port).is_some());
        self.taken.retain(|port| serves && self.node_ports.get(*port).is_some());
        for (port, backends) in self.node_ports.iter().filter(|_| serves) {
            if let Some(open) = self.open.get(&port) {
                open.picker.set(backends);
                continue;
            }
            let picker = Arc::new(Picker::new(backends.clone()));
            match listen(port, Arc::clone(&picker), self.places.clone()) {
                Ok(task) => {
                    self.taken.remove(&port);
                    self.open.insert(port, Open { picker, task });
                }
                Err(error) => {
                    self.metrics.localhost_listener_failed(port.family);
                    if self.taken.insert(port) {
                        let (address, protocol) = (port.address(), port.protocol);
                        tracing::warn!(%address, %protocol, %error, "a NodePort is not served here; it is tried again");
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
    places: Places<LoopbackPort>,
) -> io::Result<JoinHandle<()>> {
    let at = port.address();
    Ok(match port.protocol {
        Protocol::Udp => {
            let datagrams = Datagrams::bind(at)?;
            tokio::spawn(async move { match relay_datagrams(datagrams, port, picker, places).await {} })
        }
        Protocol::Tcp | Protocol::Sctp => {
            let streams = Streams::bind(at)?;
            tokio::spawn(async move { match relay_streams(streams, port, picker, places).await {} })
        }
    })
}
