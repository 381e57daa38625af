//! The plan of the node, and the plans of a [`Model`]'s Services.
//!
//! In: the model. Out: a [`NodePlan`] and [`ServicePlan`]s. These methods of the model are here, because
//! `plan` may import `model` but not the reverse.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{NodePlan, NodePortAddresses, ServicePlan, plan_service};
use crate::model::{Family, LoopbackNodePorts, Model, NodePortSetting, ObjectName, PerFamily};

impl Model {
    /// The plan of a Service; an empty plan if weir serves no such Service.
    #[must_use]
    pub fn plan(&self, name: &ObjectName) -> ServicePlan {
        self.service(name).map_or_else(ServicePlan::default, |(service, endpoints)| {
            plan_service(service, endpoints, self.node_view())
        })
    }

    /// The plan of the node.
    #[must_use]
    pub fn node_plan(&self) -> NodePlan {
        let settings = self.settings();
        let served = |family| *settings.families.get(family);
        let cidrs: Vec<IpNet> = self.service_cidrs().filter(|cidr| served(Family::of(cidr.addr()))).collect();
        let mut service_cidrs = IpNet::aggregate(&cidrs);
        service_cidrs.sort_unstable();
        let node_port_addresses =
            PerFamily { v4: self.node_port_addresses(Family::V4), v6: self.node_port_addresses(Family::V6) };
        let host_addresses = self.host_addresses().unwrap_or_default().iter().copied();
        let host_addresses =
            host_addresses.filter(|address| is_needed(*address, &node_port_addresses)).collect();
        NodePlan {
            local_traffic: self.node_view().local_traffic.clone(),
            node_port_addresses,
            loopback_node_ports: PerFamily {
                v4: settings.loopback_node_ports.v4 != LoopbackNodePorts::Never && served(Family::V4),
                v6: settings.loopback_node_ports.v6 != LoopbackNodePorts::Never && served(Family::V6),
            },
            host_addresses,
            masquerade_mark: 1_u32.checked_shl(settings.masquerade_bit.into()).unwrap_or_default(),
            service_cidrs,
            answers_names: settings.dns_service.is_some(),
            name_clients: settings.dns_service.as_ref().and_then(|_| self.name_clients()),
            drops_out_of_window: !settings.tcp_be_liberal,
        }
    }

    /// The addresses at which NodePorts of a family answer (R13 to R15).
    fn node_port_addresses(&self, family: Family) -> NodePortAddresses {
        let NodePortSetting { primary, networks } = &self.settings().node_port_addresses;
        let own = primary.then(|| *self.node_view().addresses.get(family));
        let own = own.filter(|address| !address.is_loopback()).map(IpNet::from);
        let of_family = |net: &IpNet| Family::of(net.addr()) == family;
        let networks: Vec<IpNet> = networks.iter().copied().filter(of_family).chain(own).collect();
        if networks.is_empty() || networks.iter().any(|network| network.prefix_len() == 0) {
            return NodePortAddresses::AnyLocal;
        }
        let inside = |address: &IpAddr| networks.iter().any(|network| network.contains(address));
        let single =
            || networks.iter().filter(|net| net.prefix_len() == net.max_prefix_len()).map(IpNet::addr);
        let mut addresses: Vec<IpAddr> = match self.host_addresses() {
            Some(all) => all.iter().copied().filter(inside).collect(),
            // The host's addresses are not known yet, so only networks of one address can be used.
            None => single().collect(),
        };
        addresses.retain(|address| !address.is_loopback());
        addresses.sort_unstable();
        addresses.dedup();
        NodePortAddresses::Only(addresses)
    }
}

/// Whether the plan uses an address of this host. Each pod gives the host an IPv6 link-local address on its
/// link. No Service has such an address, and if all addresses serve NodePorts, the kernel checks for each
/// packet whether its destination is local. So a link-local address matters only if a setting names its
/// network.
fn is_needed(address: IpAddr, node_ports: &PerFamily<NodePortAddresses>) -> bool {
    let is_link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    let serves = || match node_ports.get(Family::of(address)) {
        NodePortAddresses::AnyLocal => false,
        NodePortAddresses::Only(addresses) => addresses.contains(&address),
    };
    !is_link_local || serves()
}
