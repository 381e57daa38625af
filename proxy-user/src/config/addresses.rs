//! Addresses and `nodePortAddresses` as kube-proxy reads them: numbers with leading zeros, names for
//! networks, and whether NodePorts answer on loopback addresses.
//!
//! In: the text of a field. Out: addresses and networks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use super::{
    NodePortSetting,
    file::{Configuration, Mode},
};
use crate::model::{Family, LoopbackNodePorts, PerFamily};

/// kube-proxy's feature gate for NodePorts on loopback addresses in its nftables mode.
pub(super) const LOCALHOST_GATE: &str = "KubeProxyNFTablesLocalhostNodePorts";

/// Parses an address. Leading zeros of its decimal numbers are skipped, as Go's parser did before 1.17.
pub(super) fn address_of(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| {
        let number =
            |part: &str| part.bytes().all(|digit| digit.is_ascii_digit()).then(|| part.parse().ok())?;
        let parts: Vec<u8> = text.split('.').map(number).collect::<Option<_>>()?;
        <[u8; 4]>::try_from(parts).ok().map(IpAddr::from)
    })
}

/// Parses an address with a port, with the same leniency.
pub(super) fn socket_address_of(text: &str) -> Option<SocketAddr> {
    text.parse().ok().or_else(|| {
        let (address, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(address_of(address).filter(IpAddr::is_ipv4)?, port.parse().ok()?))
    })
}

/// Whether NodePorts answer on the loopback address of each family. A network that names the loopback address
/// asks for it, as in kube-proxy's nftables mode (R18), unless its feature gate is off. The socket plane also
/// answers if a network merely contains the address, as kube-proxy's iptables mode does (R13), unless
/// `iptables.localhostNodePorts` is false.
pub(super) fn loopback_node_ports(
    configuration: &Configuration,
    imitated: Mode,
    setting: &NodePortSetting,
) -> PerFamily<LoopbackNodePorts> {
    let is_on = |gate: &str| configuration.feature_gates.get(gate).copied().unwrap_or(true);
    let for_iptables = configuration.iptables.localhost_node_ports.unwrap_or(true);
    let may_be_asked = if imitated == Mode::Nftables { is_on(LOCALHOST_GATE) } else { for_iptables };
    let answers = |loopback: IpAddr| {
        let of_family = |network: &&IpNet| Family::of(network.addr()) == Family::of(loopback);
        let own: Vec<&IpNet> = setting.networks.iter().filter(of_family).collect();
        let holds = |network: &&IpNet| network.contains(&loopback);
        // R14: a family without a network of its own answers on all addresses.
        let is_held = if own.is_empty() { !setting.primary } else { own.iter().any(holds) };
        match own.iter().any(|network| network.prefix_len() > 0 && holds(network)) {
            true if may_be_asked => LoopbackNodePorts::Always,
            false if is_held && for_iptables => LoopbackNodePorts::SocketPlaneOnly,
            _ => LoopbackNodePorts::Never,
        }
    };
    PerFamily { v4: answers(Ipv4Addr::LOCALHOST.into()), v6: answers(Ipv6Addr::LOCALHOST.into()) }
}

/// The networks of a name in `nodePortAddresses` (R18). `primary` is missing here, because its addresses are
/// in the Node.
pub(super) fn networks_of_word(text: &str) -> Option<[IpNet; 2]> {
    let network = |ip: IpAddr, len| IpNet::new_assert(ip, len).trunc();
    match text {
        "localhost" => {
            Some([network(Ipv4Addr::LOCALHOST.into(), 8), network(Ipv6Addr::LOCALHOST.into(), 128)])
        }
        "all" => Some([network(Ipv4Addr::UNSPECIFIED.into(), 0), network(Ipv6Addr::UNSPECIFIED.into(), 0)]),
        _ => None,
    }
}
