//! Entries of `frontends` for addresses without port, which decide about all ports that no frontend names.
//!
//! In: the node's addresses and the ClusterIPs. Out: the entry of each address, and the ClusterIPs that are
//! left to nftables because this host has the address itself.
//!
//! If an interface of the host has a ClusterIP, a server on the host answers there in the Service's place, as
//! a DNS cache on every node does. nftables rules decide whether a packet reaches that server or a backend,
//! so the socket plane leaves the address alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use proxy_ebpf::{Address, FrontendKey, FrontendValue, flag, wire};

use crate::{
    dataplane::Error,
    model::Family,
    plan::{ClusterIpDelta, NodePlan, NodePortAddresses},
};

/// The addresses, as the plans have them.
#[derive(Default)]
pub(super) struct AddressEntries {
    /// The addresses of this node that serve NodePorts, with their flags; empty before the first node plan.
    node: BTreeMap<IpAddr, u32>,
    /// The ClusterIPs that the host has itself.
    on_host: BTreeSet<IpAddr>,
    on_host_in_wire_form: BTreeSet<Address>,
    /// A ClusterIP that the host got or lost after its frontends were written.
    moved: Option<IpAddr>,
    /// Addresses of the node that no longer serve NodePorts.
    gone: Vec<IpAddr>,
    /// ClusterIPs that are not in the map, because one of their frontends could not be written.
    withheld: BTreeSet<IpAddr>,
    host: Vec<IpAddr>,
}

impl AddressEntries {
    /// Stores the addresses of a delta.
    pub(super) fn expect(&mut self, node: &NodePlan, cluster_ips: &[ClusterIpDelta], complete: bool) {
        if complete {
            self.on_host.clear();
            self.moved = None;
        }
        let now = serving(node);
        self.gone.extend(self.node.keys().filter(|address| !now.contains_key(address)));
        self.node = now;
        self.host.clone_from(&node.host_addresses);
        for delta in cluster_ips {
            match delta {
                ClusterIpDelta::Add(ip) if self.host.binary_search(ip).is_ok() => {
                    self.on_host.insert(*ip);
                }
                ClusterIpDelta::Add(_) => {}
                ClusterIpDelta::Remove(ip) => {
                    self.on_host.remove(ip);
                }
            }
        }
        let left = self.on_host.iter().find(|ip| self.host.binary_search(ip).is_err()).copied();
        let came = self.withheld.iter().find(|ip| self.host.binary_search(ip).is_ok()).copied();
        self.moved = self.moved.or(left).or(came);
        self.on_host_in_wire_form = self.on_host.iter().map(|ip| wire(*ip)).collect();
    }

    /// Records that the host has an address that is a ClusterIP in the map.
    pub(super) fn came_to_host(&mut self, ip: IpAddr) {
        if !self.on_host.contains(&ip) {
            self.moved = Some(ip);
        }
    }

    pub(super) fn host(&self) -> &[IpAddr] {
        &self.host
    }

    /// Whether a frontend is left to nftables because the host has its address.
    pub(super) fn is_for_packets(&self) -> impl Fn(&FrontendKey) -> bool + use<> {
        let on_host = self.on_host_in_wire_form.clone();
        move |key| !on_host.is_empty() && on_host.contains(&key.address)
    }

    /// The entries of the node's addresses that serve NodePorts.
    pub(super) fn of_node(&self) -> impl Iterator<Item = (FrontendKey, FrontendValue)> + '_ {
        self.node.iter().map(|(address, flags)| entry(*address, *flags))
    }

    /// The addresses whose entries are to be removed.
    pub(super) fn take_gone(&mut self) -> Vec<IpAddr> {
        std::mem::take(&mut self.gone)
    }

    /// The entry of a ClusterIP; `None` if the host has the address.
    pub(super) fn of_cluster_ip(&self, ip: IpAddr) -> Option<(FrontendKey, FrontendValue)> {
        let apart = self.host.binary_search(&ip).is_err();
        apart.then(|| entry(ip, flag::CLUSTER_IP | self.node.get(&ip).copied().unwrap_or(0)))
    }

    /// The entry of an address of the node; `None` if it does not serve NodePorts.
    pub(super) fn of_node_address(&self, address: &IpAddr) -> Option<(FrontendKey, FrontendValue)> {
        self.node.get(address).map(|flags| entry(*address, *flags))
    }

    /// Records that a ClusterIP is not in the map for now.
    pub(super) fn withhold(&mut self, ip: IpAddr) {
        self.withheld.insert(ip);
    }

    /// The reverse of [`AddressEntries::withhold`].
    pub(super) fn end_withholding(&mut self, ip: &IpAddr) {
        self.withheld.remove(ip);
    }

    /// The ClusterIPs that are not in the map yet.
    pub(super) fn take_withheld(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.withheld)
    }

    /// Fails if the host got or lost a ClusterIP, so that the caller writes everything again.
    pub(super) fn check_moved(&self) -> Result<(), Error> {
        match self.moved {
            None => Ok(()),
            Some(ip) => Err(Error::Kernel(format!(
                "this host got or lost the ClusterIP {ip} as an address of its own: writing all Services again"
            ))),
        }
    }
}

fn entry(address: IpAddr, flags: u32) -> (FrontendKey, FrontendValue) {
    let key = FrontendKey::address(address);
    (key, FrontendValue::address(&key, flags))
}

/// The addresses that serve NodePorts (R13, R14), with their flags. Loopback addresses serve the host's own
/// processes only, because every network namespace has its own.
fn serving(node: &NodePlan) -> BTreeMap<IpAddr, u32> {
    let mut serving = BTreeMap::new();
    for family in Family::ALL {
        let of_family = |address: &&IpAddr| Family::of(**address) == family;
        let addresses: Vec<IpAddr> = match node.node_port_addresses.get(family) {
            NodePortAddresses::AnyLocal => node.host_addresses.iter().filter(of_family).copied().collect(),
            NodePortAddresses::Only(addresses) => addresses.clone(),
        };
        serving.extend(addresses.into_iter().map(|address| (address, flag::NODE)));
        if *node.loopback_node_ports.get(family) {
            let loopback: IpAddr = match family {
                Family::V4 => Ipv4Addr::LOCALHOST.into(),
                Family::V6 => Ipv6Addr::LOCALHOST.into(),
            };
            serving.insert(loopback, flag::NODE | flag::LOOPBACK);
        }
    }
    serving
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PerFamily;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A node plan with these host addresses, all of which serve NodePorts.
    fn node(host: &[&str]) -> NodePlan {
        let mut host_addresses: Vec<IpAddr> = host.iter().map(|address| ip(address)).collect();
        host_addresses.sort_unstable();
        NodePlan {
            local_traffic: PerFamily { v4: None, v6: None },
            node_port_addresses: PerFamily {
                v4: NodePortAddresses::AnyLocal,
                v6: NodePortAddresses::AnyLocal,
            },
            loopback_node_ports: PerFamily { v4: false, v6: false },
            host_addresses,
            masquerade_mark: 0x4000,
            service_cidrs: Vec::new(),
            answers_names: false,
            name_clients: None,
            drops_out_of_window: true,
        }
    }

    fn of_node(addresses: &AddressEntries) -> Vec<(IpAddr, u32)> {
        addresses.of_node().map(|(key, value)| (key.endpoint().ip(), value.flags())).collect()
    }

    #[test]
    fn node_ports_are_at_the_addresses_of_the_node_and_for_the_host_at_loopback() {
        let mut addresses = AddressEntries::default();
        let mut node = node(&["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
        node.loopback_node_ports.v4 = true;
        addresses.expect(&node, &[], true);
        let loopback = (ip("127.0.0.1"), flag::NODE | flag::LOOPBACK);
        let v6 = (ip("2001:db8::1"), flag::NODE);
        let all = [loopback, (ip("192.0.2.1"), flag::NODE), (ip("192.0.2.2"), flag::NODE), v6];
        assert_eq!(of_node(&addresses), all, "R13");
        assert!(addresses.take_gone().is_empty());

        node.node_port_addresses.v4 = NodePortAddresses::Only(vec![ip("192.0.2.2")]);
        node.loopback_node_ports.v4 = false;
        addresses.expect(&node, &[], false);
        assert_eq!(of_node(&addresses), [(ip("192.0.2.2"), flag::NODE), v6], "R14");
        assert_eq!(addresses.take_gone(), [ip("127.0.0.1"), ip("192.0.2.1")]);
        assert!(addresses.take_gone().is_empty());
    }

    #[test]
    fn a_cluster_ip_of_the_hosts_own_is_left_to_packets_until_it_leaves() {
        let (dns, web) = (ip("10.96.0.10"), ip("10.96.0.11"));
        let known = [ClusterIpDelta::Add(dns), ClusterIpDelta::Add(web)];
        let is_left =
            |addresses: &AddressEntries, ip| addresses.is_for_packets()(&FrontendKey::new(ip, 53, 17));
        let mut addresses = AddressEntries::default();
        addresses.expect(&node(&["10.96.0.10"]), &known, true);
        assert!(is_left(&addresses, dns) && !is_left(&addresses, web));
        assert_eq!(addresses.of_cluster_ip(dns), None);
        assert_eq!(addresses.of_cluster_ip(web).map(|(_, value)| value.flags()), Some(flag::CLUSTER_IP));
        assert!(addresses.check_moved().is_ok());

        addresses.expect(&node(&[]), &[], false);
        assert!(addresses.check_moved().is_err_and(|error| error.to_string().contains("10.96.0.10")));
        addresses.expect(&node(&[]), &known, true);
        assert!(
            !is_left(&addresses, dns)
                && addresses.of_cluster_ip(dns).is_some()
                && addresses.check_moved().is_ok()
        );

        addresses.came_to_host(dns);
        assert!(addresses.check_moved().is_err());
        addresses.expect(&node(&["10.96.0.10"]), &known, true);
        addresses.came_to_host(dns);
        assert!(
            is_left(&addresses, dns) && addresses.check_moved().is_ok(),
            "all Services are written again"
        );
    }

    #[test]
    fn a_cluster_ip_that_is_deleted_while_the_host_has_it_moves_nothing() {
        let dns = ip("10.96.0.10");
        let mut addresses = AddressEntries::default();
        addresses.expect(&node(&["10.96.0.10"]), &[ClusterIpDelta::Add(dns)], true);
        addresses.expect(&node(&[]), &[ClusterIpDelta::Remove(dns)], false);
        assert!(addresses.check_moved().is_ok());
    }

    #[test]
    fn a_cluster_ip_that_is_not_written_yet_moves_too() {
        let dns = ip("10.96.0.10");
        let mut addresses = AddressEntries::default();
        addresses.expect(&node(&[]), &[ClusterIpDelta::Add(dns)], false);
        addresses.withhold(dns);
        addresses.expect(&node(&["10.96.0.10"]), &[], false);
        assert!(addresses.check_moved().is_err());
    }
}
