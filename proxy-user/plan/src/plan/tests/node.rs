//! The plan of the node: where NodePorts answer (R13 to R15), the mark (R8), ClusterIP networks (F5).

use serde_json::json;

use crate::{
    model::{
        LoopbackNodePorts, NodePortSetting, PerFamily, Settings,
        fixture::{model, node, service_cidr, settings},
    },
    plan::NodePortAddresses,
};

fn listed(addresses: &NodePortAddresses) -> String {
    match addresses {
        NodePortAddresses::AnyLocal => "any".to_owned(),
        NodePortAddresses::Only(all) => all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
    }
}

#[test]
fn r13_to_r15_node_ports_answer_on_addresses_that_the_setting_and_an_interface_have() {
    let cidrs = |nets: &[&str]| NodePortSetting::of(nets.iter().map(|net| net.parse().unwrap()).collect());
    let host = ["127.0.0.1", "192.0.2.1", "192.0.2.2", "10.1.0.1", "::1", "2001:db8::1", "fe80::1"];
    for (setting, node_ips, v4, v6) in [
        (NodePortSetting::ALL, vec![], "any", "any"),
        (NodePortSetting::PRIMARY, vec!["192.0.2.2", "2001:db8::1"], "192.0.2.2", "2001:db8::1"),
        // If the node has no address of a family, all addresses of that family serve.
        (NodePortSetting::PRIMARY, vec!["192.0.2.2"], "192.0.2.2", "any"),
        (NodePortSetting::PRIMARY, vec![], "any", "any"),
        // R14: an address that is on no interface does not serve.
        (NodePortSetting::PRIMARY, vec!["192.0.2.99"], "", "any"),
        (cidrs(&["192.0.2.0/24"]), vec![], "192.0.2.1 192.0.2.2", "any"),
        (cidrs(&["192.0.2.0/24", "2001:db8::/32"]), vec![], "192.0.2.1 192.0.2.2", "2001:db8::1"),
        (cidrs(&["2001:db8::/32"]), vec![], "any", "2001:db8::1"),
        (cidrs(&["192.0.2.0/24", "0.0.0.0/0"]), vec![], "any", "any"),
        (cidrs(&["203.0.113.0/24", "10.0.0.0/8"]), vec![], "10.1.0.1", "any"),
        // R13: loopback addresses do not serve here, even if a network names them.
        (cidrs(&["127.0.0.0/8", "::1/128"]), vec![], "", ""),
        // R18: names and networks may be mixed.
        (
            NodePortSetting { primary: true, ..cidrs(&["127.0.0.0/8", "::1/128", "10.0.0.0/8"]) },
            vec!["192.0.2.2"],
            "10.1.0.1 192.0.2.2",
            "",
        ),
        (cidrs(&[]), vec![], "any", "any"),
    ] {
        let addresses: Vec<_> =
            node_ips.iter().map(|ip| json!({ "type": "InternalIP", "address": ip })).collect();
        let this = node(json!({ "metadata": { "name": "node-a" }, "status": { "addresses": addresses } }));
        let mut model = model(Settings { node_port_addresses: setting.clone(), ..settings() }, [this]);
        model.set_host_addresses(host.iter().map(|ip| ip.parse().unwrap()).collect());
        let found = model.node_plan().node_port_addresses;
        assert_eq!(
            (listed(&found.v4), listed(&found.v6)),
            (v4.into(), v6.into()),
            "{setting:?} {node_ips:?}"
        );
    }
}

/// Each new pod gives the host a link-local address, which must not change the node's plan.
#[test]
fn link_local_addresses_are_in_the_plan_only_if_a_setting_names_their_network() {
    let pods = "fe80::1 fe80::2";
    let cidrs = |net: &str| NodePortSetting::of(vec![net.parse().unwrap()]);
    for (setting, expected) in [
        (NodePortSetting::ALL, "192.0.2.1 2001:db8::1"),
        (cidrs("2001:db8::/32"), "192.0.2.1 2001:db8::1"),
        (cidrs("fe80::/127"), "192.0.2.1 2001:db8::1 fe80::1"),
    ] {
        let mut model = model(Settings { node_port_addresses: setting, ..settings() }, []);
        let host = ["192.0.2.1 2001:db8::1 ", pods].concat();
        model.set_host_addresses(host.split(' ').map(|ip| ip.parse().unwrap()).collect());
        let planned: Vec<_> = model.node_plan().host_addresses.iter().map(ToString::to_string).collect();
        assert_eq!(planned.join(" "), expected);
    }
}

#[test]
fn r14_until_the_interfaces_are_known_only_networks_of_one_address_count() {
    let nets = ["192.0.2.1/32", "127.0.0.1/32", "10.0.0.0/8"].map(|net| net.parse().unwrap()).to_vec();
    let model = model(Settings { node_port_addresses: NodePortSetting::of(nets), ..settings() }, []);
    assert_eq!(listed(&model.node_plan().node_port_addresses.v4), "192.0.2.1");
}

#[test]
fn r13_loopback_node_ports_follow_the_setting_in_served_families() {
    use LoopbackNodePorts::{Always, Never, SocketPlaneOnly};
    let both = PerFamily { v4: true, v6: true };
    let plan = |v4, v6, families| {
        let loopback_node_ports = PerFamily { v4, v6 };
        model(Settings { loopback_node_ports, families, ..settings() }, []).node_plan().loopback_node_ports
    };
    assert_eq!(plan(Always, SocketPlaneOnly, both), both);
    let v4 = PerFamily { v4: true, v6: false };
    assert_eq!(plan(Always, Always, v4), v4);
    assert_eq!(plan(SocketPlaneOnly, Never, both), v4);
}

#[test]
fn r8_the_mark_is_one_bit() {
    for (bit, mark) in [(14, 0x4000), (0, 1), (31, 0x8000_0000)] {
        let model = model(Settings { masquerade_bit: bit, ..settings() }, []);
        assert_eq!(model.node_plan().masquerade_mark, mark);
    }
}

#[test]
fn f5_cluster_ip_networks_of_served_families_are_merged() {
    let cidrs = || {
        [
            service_cidr("a", json!(["10.96.0.0/13", "fd00:96::/112"])),
            service_cidr("b", json!(["10.104.0.0/13", "10.96.1.0/24"])),
        ]
    };
    let text = |families| {
        let model = model(Settings { families, ..settings() }, cidrs());
        let all = model.node_plan().service_cidrs;
        all.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(text(PerFamily { v4: true, v6: true }), ["10.96.0.0/12", "fd00:96::/112"]);
    assert_eq!(text(PerFamily { v4: true, v6: false }), ["10.96.0.0/12"]);
}
