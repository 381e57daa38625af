//! Changes while the agents run: endpoints, ports, addresses, types and policies that come and go.

use super::*;
use crate::objects::{ServiceType, Slice, pod, service, slice};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = scaling();
    cases.extend(addresses());
    cases.extend(port_changes());
    cases
}

fn scaling() -> Vec<Case> {
    let both = || service([pod(1, 1), pod(2, 1)]).everywhere();
    let everywhere = [CLUSTER, NODE_PORT, EXTERNAL, BALANCER];
    vec![
        case("E6 R4", "an endpoint is scaled away and back", both())
            .checks(&[POD12, OUTSIDE], &everywhere, &any(&[POD11, POD21]))
            .then(service([pod(2, 1)]).everywhere())
            .checks(&[POD12, OUTSIDE], &everywhere, &any(&[POD21]))
            .then(both())
            .checks(&[POD12, OUTSIDE], &everywhere, &any(&[POD11, POD21])),
        case("F1 E6", "all endpoints are scaled away and back", both())
            .then(service([]).everywhere())
            .checks(&[POD12, HOST, OUTSIDE], &everywhere, &Expect::Refused)
            .then(both())
            .checks(&[POD12, HOST, OUTSIDE], &everywhere, &any(&[POD11, POD21])),
        case("W1 F5", "a Service is deleted and made again", both())
            .check(POD12, CLUSTER, any(&[POD11, POD21]))
            .step(Step::Vanish)
            .checks(&[POD12], &[CLUSTER], &Expect::Dropped)
            .checks(&[OUTSIDE, HOST], &[NODE_PORT], &Expect::Refused)
            .then(both())
            .checks(&[POD12, HOST], &everywhere, &any(&[POD11, POD21])),
        case("E2 E6", "an endpoint becomes ready", {
            service([pod(1, 1).conditions([Some(false), Some(false), Some(false)])])
        })
        .check(POD12, CLUSTER, Expect::Refused)
        .then(service([pod(1, 1)]))
        .check(POD12, CLUSTER, any(&[POD11])),
        case("E9", "hints come and go", service([pod(1, 1), pod(2, 1)]))
            .check(POD12, CLUSTER, any(&[POD11, POD21]))
            .then(service([pod(1, 1).zones(&["zone-a"]), pod(2, 1).zones(&["zone-b"])]))
            .check(POD12, CLUSTER, any(&[POD11]))
            .then(service([pod(1, 1), pod(2, 1)]))
            .check(POD12, CLUSTER, any(&[POD11, POD21])),
        case("W2", "a slice that becomes headless takes its endpoints away", {
            service([]).slices([slice([pod(1, 1)]), slice([pod(2, 1)])])
        })
        .check(POD12, CLUSTER, any(&[POD11, POD21]))
        .then({
            let headless =
                Slice { labels: vec![("service.kubernetes.io/headless", "")], ..slice([pod(1, 1)]) };
            service([]).slices([headless, slice([pod(2, 1)])])
        })
        .check(POD12, CLUSTER, any(&[POD21])),
    ]
}

fn addresses() -> Vec<Case> {
    let plain = || service([pod(1, 1), pod(2, 1)]);
    let both = any(&[POD11, POD21]);
    let mut other_proxy = plain();
    other_proxy.labels = vec![("service.kubernetes.io/service-proxy-name", "another")];
    vec![
        case("R3 R13", "a NodePort comes and goes with the type", plain())
            .check(OUTSIDE, NODE_PORT, Expect::Refused)
            .then(plain().of(ServiceType::NodePort))
            .checks(&[OUTSIDE, POD12], &[NODE_PORT, CLUSTER], &both)
            .then(plain())
            .check(OUTSIDE, NODE_PORT, Expect::Refused)
            .check(POD12, CLUSTER, both.clone()),
        case("R10 R11", "external and load balancer addresses come and go", plain())
            .then(plain().everywhere())
            .checks(&[POD12, HOST, OUTSIDE], &[EXTERNAL, BALANCER], &both)
            .then(plain().of(ServiceType::LoadBalancer))
            // Traffic that no proxy captures goes to the router, where no process listens on port 80.
            .checks(&[POD12], &[EXTERNAL], &Expect::Refused)
            .checks(&[POD12, HOST, OUTSIDE], &[CLUSTER, NODE_PORT], &both),
        case("R3 R6", "the external policy changes", plain().everywhere())
            .checks(&[OUTSIDE], &EXTERNALS, &by(&[POD11, POD21], Masqueraded))
            .then(plain().everywhere().external_local())
            .checks(&[OUTSIDE], &EXTERNALS, &by(&[POD11], Kept))
            .then(plain().everywhere())
            .checks(&[OUTSIDE], &EXTERNALS, &by(&[POD11, POD21], Masqueraded)),
        case("R2", "the internal policy changes", plain())
            .then(plain().internal_local())
            .check(POD12, CLUSTER, any(&[POD11]))
            .then(plain())
            .check(POD12, CLUSTER, both.clone()),
        case("F7", "source ranges come and go", plain().everywhere())
            .check(Location::Outside(1), BALANCER, both.clone())
            .then(plain().everywhere().only_from(&["192.168.77.100/32", "fd00:192:168:77::100/128"]))
            .check(Location::Outside(1), BALANCER, Expect::Dropped)
            .check(OUTSIDE, BALANCER, both.clone())
            .then(plain().everywhere().only_from(&["192.168.77.101/32", "fd00:192:168:77::101/128"]))
            .check(Location::Outside(1), BALANCER, both.clone())
            .check(OUTSIDE, BALANCER, Expect::Dropped)
            .then(plain().everywhere())
            .check(OUTSIDE, BALANCER, both.clone()),
        case("W4 F5", "a Service becomes ExternalName and comes back", plain())
            .check(POD12, CLUSTER, both.clone())
            .then(service([]).of(ServiceType::ExternalName).slices([]))
            .check(POD12, CLUSTER, Expect::Dropped)
            .then(plain())
            .check(POD12, CLUSTER, both.clone()),
        case("W1 F5", "a Service is handed to another proxy and back", plain())
            .then(other_proxy)
            .check(POD12, CLUSTER, Expect::Dropped)
            .then(plain())
            .check(POD12, CLUSTER, both.clone()),
    ]
}

fn port_changes() -> Vec<Case> {
    let with = |ports: &[(&'static str, Transport, u16)]| {
        let named = ports.iter().map(|&(name, transport, _)| (name, transport, TARGET)).collect();
        let slice = Slice { ports: named, ..slice([pod(1, 1), pod(2, 1)]) };
        service([]).of(ServiceType::NodePort).ports(ports).slices([slice])
    };
    let both = any(&[POD11, POD21]);
    let first = ("http", Transport::Tcp, 80);
    let second = ("admin", Transport::Tcp, 81);
    vec![
        case("F4 R1", "a port is added and taken away", with(&[first]))
            .over(&[Transport::Tcp])
            .checks(&[POD12], &[CLUSTER.port(81)], &Expect::Refused)
            .then(with(&[first, second]))
            .checks(&[POD12], &[CLUSTER, CLUSTER.port(81), NODE_PORT, NODE_PORT.port(81)], &both)
            .then(with(&[second]))
            .checks(&[POD12], &[CLUSTER.port(81), NODE_PORT.port(81)], &both)
            .checks(&[POD12], &[CLUSTER, NODE_PORT], &Expect::Refused),
        case("W6", "two ports swap their numbers", with(&[first, second]))
            .over(&[Transport::Tcp])
            .then(with(&[("http", Transport::Tcp, 81), ("admin", Transport::Tcp, 80)]))
            .checks(&[POD12], &[CLUSTER, CLUSTER.port(81), NODE_PORT, NODE_PORT.port(81)], &both),
        case("W6", "a target port changes", with(&[first]))
            .over(&[Transport::Tcp])
            .check(POD12, CLUSTER, both.clone())
            .then({
                let slice =
                    Slice { ports: vec![("http", Transport::Tcp, 8082)], ..slice([pod(1, 1), pod(2, 1)]) };
                with(&[first]).slices([slice])
            })
            .check(POD12, CLUSTER, Expect::Served(vec![(POD11, 8082), (POD21, 8082)], Source::Any)),
    ]
}
