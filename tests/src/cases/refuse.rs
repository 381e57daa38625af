//! Calls that are refused, dropped or left alone: F1 to F7.

use super::{matrix::router, *};
use crate::objects::{pod, service};

const PING: [Transport; 1] = [Transport::Ping];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = unserved();
    cases.extend(cluster_addresses());
    cases.extend(left_alone());
    cases.extend(source_ranges());
    cases
}

fn unserved() -> Vec<Case> {
    let everywhere = [CLUSTER, NODE_PORT, EXTERNAL, BALANCER];
    vec![
        case("F1", "without endpoints every destination refuses", service([]).everywhere()).checks(
            &[POD12, HOST, OUTSIDE],
            &everywhere,
            &Expect::Refused,
        ),
        case("F1", "without any slice every destination refuses", service([]).everywhere().slices([]))
            .checks(&[POD12, HOST, OUTSIDE], &everywhere, &Expect::Refused),
        case("F1", "policies Local refuse too where there is no endpoint at all", {
            service([]).everywhere().internal_local().external_local()
        })
        .checks(&[POD12, HOST, OUTSIDE], &everywhere, &Expect::Refused),
        case(
            "F2",
            "internal policy Local drops without local endpoints",
            service([pod(2, 1)]).internal_local(),
        )
        .checks(&[POD12, HOST, OUTSIDE], &[CLUSTER], &Expect::Dropped)
        .check(POD22, CLUSTER, any(&[POD21])),
        case(
            "F3 R6",
            "external policy Local drops without local endpoints, but not for pods and the host",
            service([pod(2, 1)]).everywhere().external_local(),
        )
        .checks(&[OUTSIDE], &EXTERNALS, &Expect::Dropped)
        .checks(&[POD12], &EXTERNALS, &by(&[POD21], Kept))
        .checks(&[HOST], &EXTERNALS, &by(&[POD21], Masqueraded))
        .check(OUTSIDE, Target { address: Address::Node(2), port: PORT }, by(&[POD21], Kept)),
    ]
}

fn cluster_addresses() -> Vec<Case> {
    let shape = || service([pod(1, 1)]);
    vec![
        case("F4", "a port the Service does not have is refused on its ClusterIP", shape()).checks(
            &[POD12, HOST, OUTSIDE],
            &[CLUSTER.port(4242)],
            &Expect::Refused,
        ),
        case("F4", "a protocol the Service does not have is refused on its ClusterIP", {
            shape().ports(&[("stream", Transport::Tcp, PORT)])
        })
        .over(&[Transport::Udp, Transport::Datagram])
        .checks(&[POD12, HOST], &[CLUSTER], &Expect::Refused),
        case("F4", "a ClusterIP refuses ICMP echo", shape()).over(&PING).checks(
            &[POD12, HOST, OUTSIDE],
            &[CLUSTER],
            &Expect::Refused,
        ),
        case("F5", "an address of the Service range that is no Service's is dropped", shape()).checks(
            &[POD12, HOST, OUTSIDE],
            &[UNUSED],
            &Expect::Dropped,
        ),
        case("F5", "an address of the Service range that is no Service's drops ICMP echo", shape())
            .over(&PING)
            .checks(&[POD12, OUTSIDE], &[UNUSED], &Expect::Dropped),
    ]
}

fn left_alone() -> Vec<Case> {
    let shape = || service([pod(1, 1)]).everywhere();
    vec![
        // The router answers on these addresses at port 9999.
        case("F6", "other ports of external and load balancer addresses are left alone", shape())
            .over(&[Transport::Tcp])
            .checks(&[POD12, HOST], &[EXTERNAL.port(9999), BALANCER.port(9999)], &router()),
        case("F6", "external addresses answer ICMP echo as they would without a Service", shape())
            .over(&PING)
            .step(Step::Run("ping the router behind both addresses", |run| {
                run.echo(POD12, EXTERNAL)?;
                run.echo(POD12, BALANCER)
            })),
        case("F6", "other ports of the node's address reach the node", shape()).step(Step::Run(
            "ask the node's own server",
            |run| {
                run.node_itself(POD12)?;
                run.node_itself(OUTSIDE)
            },
        )),
    ]
}

fn source_ranges() -> Vec<Case> {
    let friend = Location::Outside(0);
    let stranger = Location::Outside(1);
    let ranged = |ranges: &[&str]| service([pod(1, 1)]).everywhere().only_from(ranges);
    let one = ["192.168.77.100/32", "fd00:192:168:77::100/128"];
    vec![
        case("F7", "source ranges let others not in, pods and the host included", ranged(&one))
            .check(friend, BALANCER, any(&[POD11]))
            .checks(&[stranger, POD12, HOST], &[BALANCER], &Expect::Dropped),
        case("F7", "source ranges are for the load balancer's address only", ranged(&one)).checks(
            &[stranger, POD12, HOST],
            &[CLUSTER, NODE_PORT, EXTERNAL],
            &any(&[POD11]),
        ),
        case("F7", "source ranges may name pods", ranged(&["10.244.1.12/32", "fd00:10:244:1::12/128"]))
            // By packets on every data plane, so R5 holds on every one.
            .check(POD12, BALANCER, by(&[POD11], Masqueraded))
            .checks(&[POD21, stranger], &[BALANCER], &Expect::Dropped),
        case("F7", "source ranges apply before there is an endpoint to refuse for", {
            service([]).everywhere().only_from(&one)
        })
        .check(friend, BALANCER, Expect::Refused)
        .check(stranger, BALANCER, Expect::Dropped),
        case("F7", "source ranges keep the external policy Local", ranged(&one).external_local())
            .check(friend, BALANCER, by(&[POD11], Kept))
            .check(stranger, BALANCER, Expect::Dropped),
        case(
            "F7",
            "a range of all addresses lets every client in",
            ranged(&["0.0.0.0/0", "::/0", one[0], one[1]]),
        )
        .checks(&[friend, stranger, POD12, HOST], &[BALANCER], &any(&[POD11])),
        case("F7", "ranges of IPv4 only close IPv4", ranged(&one[..1])).only(Family::V4).check(
            stranger,
            BALANCER,
            Expect::Dropped,
        ),
        case("F7", "ranges of IPv4 only leave IPv6 open", ranged(&one[..1])).only(Family::V6).checks(
            &[stranger, POD12, HOST],
            &[BALANCER],
            &any(&[POD11]),
        ),
        case("F7", "overlapping ranges are one", {
            ranged(&[
                "192.168.77.96/28",
                "192.168.77.100/32",
                "fd00:192:168:77::100/124",
                "fd00:192:168:77::100/128",
            ])
        })
        .checks(&[friend, stranger], &[BALANCER], &any(&[POD11]))
        .check(POD12, BALANCER, Expect::Dropped),
    ]
}
