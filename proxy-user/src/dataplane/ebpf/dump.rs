//! Reads back what the maps say.
//!
//! In: the maps. Out: a [`State`] as far as sockets go; see [`State::for_sockets`].

use std::net::IpAddr;

use proxy_ebpf::{Choice, FrontendKey, FrontendValue, flag, verdict};

use super::{element::unspecified, maps::Maps, problem::Problem};
use crate::{
    dataplane::{Installed, InstalledFrontend, Outcome, State},
    model::{Family, Protocol},
    plan::{Backend, Destination, Frontend},
};

pub(super) fn read(maps: &Maps) -> Result<State, Problem> {
    let mut state = State::default();
    for (key, value) in maps.frontends()? {
        let address = proxy_ebpf::Endpoint { address: key.address, port: key.port, zero: 0 };
        if key.port == 0 {
            if value.flags & flag::CLUSTER_IP != 0 {
                state.cluster_ips.push(address.ip());
            }
            continue;
        }
        let Some(frontend) = frontend(&key, address.ip(), address.port()) else { continue };
        state.frontends.insert(frontend, installed(maps, &value)?);
    }
    state.cluster_ips.sort_unstable();
    Ok(state)
}

fn frontend(key: &FrontendKey, address: IpAddr, port: u16) -> Option<Frontend> {
    let protocol = Protocol::ALL.into_iter().find(|protocol| protocol.number() == key.protocol)?;
    let family = Family::of(address);
    let destination = if address == unspecified(family) {
        Destination::NodePort(family)
    } else {
        Destination::Address(address)
    };
    Some(Frontend { destination, protocol, port })
}

fn installed(maps: &Maps, value: &FrontendValue) -> Result<InstalledFrontend, Problem> {
    let pod = outcome(maps, &value.pod)?;
    let host = outcome(maps, &value.host)?;
    Ok(InstalledFrontend::for_sockets(pod, host, value.affinity))
}

fn outcome(maps: &Maps, choice: &Choice) -> Result<Installed, Problem> {
    let outcome = match choice.verdict {
        verdict::SERVE => {
            let mut backends = Vec::new();
            for slot in choice.first..choice.first.saturating_add(choice.count) {
                let slot = maps.slot(slot)?;
                backends.push(Backend { address: slot.ip(), port: slot.port(), local: false });
            }
            backends.sort_unstable();
            Outcome::Backends(backends)
        }
        verdict::REFUSE => Outcome::Reject,
        _ => Outcome::Packets,
    };
    Ok(Installed { outcome, masquerade: false })
}
