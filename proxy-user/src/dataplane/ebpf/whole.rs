//! Addresses as a whole: what holds for ports of theirs that no frontend names.
//!
//! In: the node's addresses and the ClusterIPs. Out: what is to be written for each address, and which ClusterIPs are the
//! packets' business because this host has them itself.
//!
//! A ClusterIP on an interface of the host is somebody's who answers there in the Service's place, as a DNS cache on every
//! node does. Whether a packet gets to him or to a backend is decided by rules that only packets meet, so sockets leave
//! the address as it is.

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

/// What is known about addresses.
#[derive(Default)]
pub(super) struct Whole {
    /// This node's addresses that serve NodePorts, with their flags; nothing until a node was seen.
    node: BTreeMap<IpAddr, u32>,
    /// ClusterIPs that the host has itself.
    at_home: BTreeSet<IpAddr>,
    at_home_on_wire: BTreeSet<Address>,
    /// A ClusterIP came to the host or left it, and its frontends are not written accordingly.
    moved: Option<IpAddr>,
    /// Addresses of the node that serve no longer.
    gone: Vec<IpAddr>,
    /// ClusterIPs that are not written, because a frontend there could not be.
    withheld: BTreeSet<IpAddr>,
    host: Vec<IpAddr>,
}

impl Whole {
    /// Takes in what is to be.
    pub(super) fn expect(&mut self, node: &NodePlan, cluster_ips: &[ClusterIpDelta], complete: bool) {
        if complete {
            self.at_home.clear();
            self.moved = None;
        }
        let now = serving(node);
        self.gone.extend(self.node.keys().filter(|address| !now.contains_key(address)));
        self.node = now;
        self.host.clone_from(&node.host_addresses);
        for delta in cluster_ips {
            match delta {
                ClusterIpDelta::Add(ip) if self.host.binary_search(ip).is_ok() => {
                    self.at_home.insert(*ip);
                }
                ClusterIpDelta::Add(_) => {}
                ClusterIpDelta::Remove(ip) => {
                    self.at_home.remove(ip);
                }
            }
        }
        let left = self.at_home.iter().find(|ip| self.host.binary_search(ip).is_err()).copied();
        let came = self.withheld.iter().find(|ip| self.host.binary_search(ip).is_ok()).copied();
        self.moved = self.moved.or(left).or(came);
        self.at_home_on_wire = self.at_home.iter().map(|ip| wire(*ip)).collect();
    }

    /// Tells that an address of the host turned out to be a known ClusterIP.
    pub(super) fn came_home(&mut self, ip: IpAddr) {
        if !self.at_home.contains(&ip) {
            self.moved = Some(ip);
        }
    }

    /// The host's own addresses.
    pub(super) fn host(&self) -> &[IpAddr] {
        &self.host
    }

    /// Whether the packets decide about a frontend because of its address.
    pub(super) fn is_theirs(&self) -> impl Fn(&FrontendKey) -> bool + use<> {
        let at_home = self.at_home_on_wire.clone();
        move |key| !at_home.is_empty() && at_home.contains(&key.address)
    }

    /// What is written for an address of the node that serves NodePorts.
    pub(super) fn of_node(&self) -> impl Iterator<Item = (FrontendKey, FrontendValue)> + '_ {
        self.node.iter().map(|(address, flags)| entry(*address, *flags))
    }

    /// Addresses for which something is written no longer.
    pub(super) fn take_gone(&mut self) -> Vec<IpAddr> {
        std::mem::take(&mut self.gone)
    }

    /// What is written for a ClusterIP; nothing for one that the host has.
    pub(super) fn of_cluster_ip(&self, ip: IpAddr) -> Option<(FrontendKey, FrontendValue)> {
        let apart = self.host.binary_search(&ip).is_err();
        apart.then(|| entry(ip, flag::CLUSTER_IP | self.node.get(&ip).copied().unwrap_or(0)))
    }

    /// What is written for an address if it is one of the node's that serve NodePorts.
    pub(super) fn of_node_address(&self, address: &IpAddr) -> Option<(FrontendKey, FrontendValue)> {
        self.node.get(address).map(|flags| entry(*address, *flags))
    }

    /// Tells that a ClusterIP is not written for now.
    pub(super) fn withhold(&mut self, ip: IpAddr) {
        self.withheld.insert(ip);
    }

    /// Tells that an address is no ClusterIP, written or not.
    pub(super) fn unhold(&mut self, ip: &IpAddr) {
        self.withheld.remove(ip);
    }

    /// ClusterIPs that are yet to be written.
    pub(super) fn take_withheld(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.withheld)
    }

    /// Fails when a ClusterIP moved, so that everything is written anew.
    pub(super) fn settled(&self) -> Result<(), Error> {
        match self.moved {
            None => Ok(()),
            Some(ip) => Err(Error::Kernel(format!(
                "the ClusterIP {ip} came to this host's own addresses or left them: writing everything anew"
            ))),
        }
    }
}

fn entry(address: IpAddr, flags: u32) -> (FrontendKey, FrontendValue) {
    let key = FrontendKey::whole(address);
    (key, FrontendValue::whole(&key, flags))
}

/// The addresses where sockets find NodePorts (R13, R14), with their flags. Loopback ones are for the host's own
/// processes: to everybody else they are his own.
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

    /// A host with these addresses, all of which serve NodePorts.
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

    fn of_node(whole: &Whole) -> Vec<(IpAddr, u32)> {
        whole.of_node().map(|(key, value)| (key.endpoint().ip(), value.flags())).collect()
    }

    #[test]
    fn node_ports_are_at_the_addresses_of_the_node_and_for_the_host_at_loopback() {
        let mut whole = Whole::default();
        let mut node = node(&["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
        node.loopback_node_ports.v4 = true;
        whole.expect(&node, &[], true);
        let loopback = (ip("127.0.0.1"), flag::NODE | flag::LOOPBACK);
        let v6 = (ip("2001:db8::1"), flag::NODE);
        let all = [loopback, (ip("192.0.2.1"), flag::NODE), (ip("192.0.2.2"), flag::NODE), v6];
        assert_eq!(of_node(&whole), all, "R13");
        assert!(whole.take_gone().is_empty());

        node.node_port_addresses.v4 = NodePortAddresses::Only(vec![ip("192.0.2.2")]);
        node.loopback_node_ports.v4 = false;
        whole.expect(&node, &[], false);
        assert_eq!(of_node(&whole), [(ip("192.0.2.2"), flag::NODE), v6], "R14");
        assert_eq!(whole.take_gone(), [ip("127.0.0.1"), ip("192.0.2.1")]);
        assert!(whole.take_gone().is_empty());
    }

    #[test]
    fn a_cluster_ip_of_the_hosts_own_is_left_to_packets_until_it_leaves() {
        let (dns, web) = (ip("10.96.0.10"), ip("10.96.0.11"));
        let known = [ClusterIpDelta::Add(dns), ClusterIpDelta::Add(web)];
        let theirs = |whole: &Whole, ip| whole.is_theirs()(&FrontendKey::new(ip, 53, 17));
        let mut whole = Whole::default();
        whole.expect(&node(&["10.96.0.10"]), &known, true);
        assert!(theirs(&whole, dns) && !theirs(&whole, web));
        assert_eq!(whole.of_cluster_ip(dns), None);
        assert_eq!(whole.of_cluster_ip(web).map(|(_, value)| value.flags()), Some(flag::CLUSTER_IP));
        assert!(whole.settled().is_ok());

        whole.expect(&node(&[]), &[], false);
        assert!(whole.settled().is_err_and(|error| error.to_string().contains("10.96.0.10")));
        whole.expect(&node(&[]), &known, true);
        assert!(!theirs(&whole, dns) && whole.of_cluster_ip(dns).is_some() && whole.settled().is_ok());

        whole.came_home(dns);
        assert!(whole.settled().is_err());
        whole.expect(&node(&["10.96.0.10"]), &known, true);
        whole.came_home(dns);
        assert!(theirs(&whole, dns) && whole.settled().is_ok(), "everything is written accordingly");
    }

    #[test]
    fn a_cluster_ip_that_is_deleted_while_the_host_has_it_moves_nothing() {
        let dns = ip("10.96.0.10");
        let mut whole = Whole::default();
        whole.expect(&node(&["10.96.0.10"]), &[ClusterIpDelta::Add(dns)], true);
        whole.expect(&node(&[]), &[ClusterIpDelta::Remove(dns)], false);
        assert!(whole.settled().is_ok());
    }

    #[test]
    fn a_cluster_ip_that_is_not_written_yet_moves_too() {
        let dns = ip("10.96.0.10");
        let mut whole = Whole::default();
        whole.expect(&node(&[]), &[ClusterIpDelta::Add(dns)], false);
        whole.withhold(dns);
        whole.expect(&node(&["10.96.0.10"]), &[], false);
        assert!(whole.settled().is_err());
    }
}
