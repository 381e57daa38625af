//! Flows that exist when a Service changes: R1 and K1 to K7.

use super::*;
use crate::objects::{Shape, pod, service};

const UDP: [Transport; 2] = [Transport::Udp, Transport::Datagram];
const TCP: Transport = Transport::Tcp;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = established();
    cases.extend(stale());
    cases.extend(shut_out());
    cases
}

fn established() -> Vec<Case> {
    let everywhere = |endpoints: [crate::objects::Endpoint; 1]| service(endpoints).everywhere();
    vec![
        case("R1 K4", "an established TCP flow stays when its endpoint is replaced", everywhere([pod(1, 1)]))
            .over(&[TCP])
            .step(Step::Open(POD12, CLUSTER))
            .step(Step::Open(HOST, CLUSTER))
            .step(Step::Open(OUTSIDE, NODE_PORT))
            .step(Step::Open(OUTSIDE, EXTERNAL))
            .then(everywhere([pod(2, 1)]))
            .check(POD12, CLUSTER, any(&[POD21]))
            .check(OUTSIDE, NODE_PORT, any(&[POD21]))
            .step(Step::Stays),
        case("R1", "an established TCP flow outlives its Service", everywhere([pod(1, 1)]))
            .over(&[TCP])
            .step(Step::Open(POD12, CLUSTER))
            .step(Step::Open(OUTSIDE, NODE_PORT))
            .step(Step::Vanish)
            .check(POD12, CLUSTER, Expect::Dropped)
            .step(Step::Stays),
        case(
            "R1",
            "an established TCP flow stays when the Service loses all endpoints",
            everywhere([pod(2, 1)]),
        )
        .over(&[TCP])
        .step(Step::Open(POD12, CLUSTER))
        .step(Step::Open(OUTSIDE, EXTERNAL))
        .then(service([]).everywhere())
        .check(POD12, CLUSTER, Expect::Refused)
        .step(Step::Stays),
    ]
}

fn opened(case: Case) -> Case {
    case.over(&UDP)
        .step(Step::Open(POD12, CLUSTER))
        .step(Step::Open(HOST, CLUSTER))
        .step(Step::Open(OUTSIDE, NODE_PORT))
        .step(Step::Open(OUTSIDE, EXTERNAL))
        .step(Step::Open(OUTSIDE, BALANCER))
}

/// Clients that still send where no Service accepts them any more.
fn shut_out() -> Vec<Case> {
    let friends =
        ["192.168.77.100/32", "10.244.1.12/32", "fd00:192:168:77::100/128", "fd00:10:244:1::12/128"];
    let one = || service([pod(1, 1)]).everywhere();
    let flows = |name, clients: &[Location], to: Target| {
        clients
            .iter()
            .fold(case("F7 K6", name, one()).over(&UDP), |case, &client| case.step(Step::Open(client, to)))
    };
    vec![
        flows("UDP flows end with the address they were sent to", &[POD12, OUTSIDE], BALANCER)
            .then(Shape { balancer: None, ..one() })
            .step(Step::Ends),
        flows("UDP flows end when the port has another number", &[POD12, HOST], CLUSTER)
            .step(Step::Open(OUTSIDE, EXTERNAL))
            .step(Step::Open(OUTSIDE, NODE_PORT))
            .then(one().ports(&[("stream", TCP, PORT), ("datagram", Transport::Udp, PORT + 1)]))
            .step(Step::Ends),
        flows(
            "UDP flows of clients that source ranges shut out end",
            &[HOST, Location::Outside(1)],
            BALANCER,
        )
        .then(one().only_from(&friends))
        .check(Location::Outside(1), BALANCER, Expect::Dropped)
        .step(Step::Ends),
        flows("UDP flows of clients that source ranges let in stay", &[POD12, OUTSIDE], BALANCER)
            .then(one().only_from(&friends))
            .check(Location::Outside(1), BALANCER, Expect::Dropped)
            .step(Step::Stays),
    ]
}

fn stale() -> Vec<Case> {
    let one = || service([pod(1, 1)]).everywhere();
    let other: fn() -> Shape = || service([pod(2, 1)]).everywhere();
    vec![
        opened(case("K1 K2 K3", "UDP flows move when their endpoint is replaced", one()))
            .then(other())
            .step(Step::Moves(POD21)),
        opened(case("K2", "UDP flows stay while their endpoint serves", one()))
            .then(service([pod(1, 1), pod(2, 1)]).everywhere())
            .step(Step::Stays)
            .then(service([pod(1, 1).terminating(), pod(2, 1)]).everywhere())
            .check(POD12, CLUSTER, any(&[POD21]))
            .step(Step::Stays)
            .then(other())
            .step(Step::Moves(POD21)),
        opened(case("K4 K7", "UDP flows end when there is no endpoint to go to", one()))
            .then(service([]).everywhere())
            .check(POD12, CLUSTER, Expect::Refused)
            .step(Step::Ends)
            .then(other())
            .step(Step::Moves(POD21)),
        opened(case("K6", "UDP flows end with their Service", one())).step(Step::Vanish).step(Step::Ends),
        case(
            "K2",
            "UDP flows that began before the Service had the address come to it",
            service([pod(1, 1)]),
        )
        .over(&UDP)
        .step(Step::Send(POD12, EXTERNAL))
        .step(Step::Send(OUTSIDE, BALANCER))
        .then(other())
        .step(Step::Moves(POD21)),
        case("K2", "UDP flows stay under policy Local while a remote endpoint serves them", one())
            .over(&UDP)
            .step(Step::Open(POD12, CLUSTER))
            .then(service([pod(1, 1), pod(2, 1)]).everywhere().internal_local())
            .step(Step::Stays),
    ]
}
