//! Reads the maps back.
//!
//! In: the maps. Out: a [`State`], reduced as in [`State::for_sockets`].

use proxy_ebpf::{FrontendKey, Record, Slots, flag, kind, verdict};

use super::{element, kernel_state, maps::Maps, problem::Problem};
use crate::{
    dataplane::{Installed, InstalledFrontend, Outcome, State},
    model::{Family, Protocol},
    plan::{Backend, BackendSet, Destination, Frontend},
};

pub(super) fn read(maps: &Maps) -> Result<State, Problem> {
    let mut state = State::default();
    let frontends = maps.frontends()?;
    let records = maps.records_of(kernel_state::port_indices(&frontends))?;
    for (key, value) in frontends.into_iter().filter(|(key, value)| value.is_of(key)) {
        if key.kind == kind::ADDRESS {
            if value.flags() & flag::CLUSTER_IP != 0 {
                state.cluster_ips.push(key.endpoint().ip());
            }
            continue;
        }
        let Some(frontend) = frontend(&key) else { continue };
        let Some((_, record)) = records.get(&value.port()) else { continue };
        let column = record.columns[value.column() as usize];
        let of = |verdict| {
            let outcome = if value.is_for_packets() { verdict::PASS } else { verdict };
            let outcome = outcome_of(maps, record, outcome)?;
            Ok::<_, Problem>(Installed { outcome, masquerade: false })
        };
        let installed = InstalledFrontend::for_sockets(of(column.pod)?, of(column.host)?, record.affinity);
        state.frontends.insert(frontend, installed);
    }
    state.cluster_ips.sort_unstable();
    Ok(state)
}

fn frontend(key: &FrontendKey) -> Option<Frontend> {
    let protocol = Protocol::ALL.into_iter().find(|protocol| protocol.number() == key.protocol)?;
    let endpoint = key.endpoint();
    let destination = match key.kind {
        kind::NODE_PORT => Destination::NodePort(Family::of(endpoint.ip())),
        _ => Destination::Address(endpoint.ip()),
    };
    Some(Frontend { destination, protocol, port: endpoint.port() })
}

fn outcome_of(maps: &Maps, record: &Record, verdict: u8) -> Result<Outcome, Problem> {
    let set = match verdict & !verdict::MASQUERADE {
        verdict::CLUSTER => BackendSet::Cluster,
        verdict::LOCAL => BackendSet::Local,
        verdict::REFUSE => return Ok(Outcome::Reject),
        _ => return Ok(Outcome::Packets),
    };
    let Slots { first, count } = record.sets[element::set_index(set)];
    let mut backends = Vec::new();
    for slot in first..first.saturating_add(count) {
        let slot = maps.slot(slot)?;
        backends.push(Backend { address: slot.ip(), port: slot.port(), local: false });
    }
    backends.sort_unstable();
    Ok(Outcome::Backends(backends))
}
