//! Which endpoints are used: W1 to W8 and E2 to E11.

use super::*;
use crate::objects::{ServiceType, pod, service, slice};

pub(super) fn cases() -> Vec<Case> {
    [states(), policies(), topology(), joins(), skipped()].into_iter().flatten().collect()
}

fn states() -> Vec<Case> {
    let none = [None, None, None];
    let unready = [Some(false), Some(false), Some(false)];
    let dying = [Some(false), Some(false), Some(true)];
    vec![
        case("E2", "conditions left open mean ready", service([pod(1, 1).conditions(none), pod(2, 1)]))
            .check(POD12, CLUSTER, any(&[POD11, POD21])),
        case(
            "E6",
            "endpoints that are not ready are left out",
            service([pod(1, 1).conditions(unready), pod(2, 1)]),
        )
        .check(POD12, CLUSTER, any(&[POD21])),
        case("E6 E2", "a ready endpoint may be terminating, as publishNotReadyAddresses has it", {
            service([pod(1, 1).conditions([Some(true), Some(true), Some(true)])])
        })
        .check(POD12, CLUSTER, any(&[POD11])),
        case("E6", "with no ready endpoint the terminating ones that serve are used", {
            service([pod(1, 1).terminating(), pod(2, 1).terminating(), pod(2, 2).conditions(unready)])
        })
        .check(POD12, CLUSTER, any(&[POD11, POD21])),
        case("E6", "terminating endpoints get nothing while one is ready", {
            service([pod(1, 1).terminating(), pod(2, 1)])
        })
        .check(POD12, CLUSTER, any(&[POD21])),
        case("E8 F1", "endpoints neither ready nor serving are none at all", {
            service([pod(1, 1).conditions(unready), pod(2, 1).conditions(dying)])
        })
        .checks(&[POD12, HOST], &[CLUSTER], &Expect::Refused),
        case("E3", "of two entries for one address the one that is not terminating counts", {
            service([])
                .slices([slice([pod(1, 1).terminating()]), slice([pod(1, 1), pod(2, 1).terminating()])])
        })
        .check(POD12, CLUSTER, any(&[POD11])),
    ]
}

fn policies() -> Vec<Case> {
    let shape = || service([pod(1, 1).terminating(), pod(2, 1)]).everywhere();
    let unready = [Some(false), Some(false), Some(false)];
    vec![
        case(
            "E7",
            "internal policy Local falls back to local terminating endpoints",
            shape().internal_local(),
        )
        .checks(&[POD12, HOST], &[CLUSTER], &any(&[POD11])),
        case(
            "E7",
            "external policy Local falls back to local terminating endpoints",
            shape().external_local(),
        )
        .checks(&[OUTSIDE], &EXTERNALS, &by(&[POD11], Kept))
        .checks(&[POD12], &EXTERNALS, &any(&[POD21])),
        case("E7", "a local ready endpoint keeps the local terminating ones out", {
            service([pod(1, 1).terminating(), pod(1, 2), pod(2, 1)]).everywhere().external_local()
        })
        .checks(&[OUTSIDE], &EXTERNALS, &any(&[POD12])),
        case("E7 E8 F3", "a local endpoint that is not ready is no local endpoint", {
            service([pod(1, 1).conditions(unready), pod(2, 1)]).everywhere().external_local()
        })
        .checks(&[OUTSIDE], &EXTERNALS, &Expect::Dropped),
        case("E5", "external policy Local counts for a ClusterIP Service with external addresses", {
            service([pod(1, 1), pod(2, 1)]).external().external_local()
        })
        .check(OUTSIDE, EXTERNAL, by(&[POD11], Kept)),
    ]
}

fn topology() -> Vec<Case> {
    let zones = || [pod(1, 1).zones(&["zone-a"]), pod(2, 1).zones(&["zone-b"])];
    vec![
        case("E9 E10 E11", "zone hints keep traffic in the node's zone", service(zones()))
            .check(POD12, CLUSTER, any(&[POD11]))
            .check(POD22, CLUSTER, any(&[POD21])),
        case("E9", "zone hints choose for external destinations too", service(zones()).everywhere()).checks(
            &[OUTSIDE],
            &EXTERNALS,
            &any(&[POD11]),
        ),
        case("E9 E10", "a hint may name several zones, and an endpoint elsewhere", {
            service([pod(1, 1).zones(&["zone-b"]), pod(2, 1).zones(&["zone-a", "zone-b"])])
        })
        .check(POD12, CLUSTER, any(&[POD21]))
        .check(POD22, CLUSTER, any(&[POD11, POD21])),
        case("E9", "one endpoint without a hint switches hints off", {
            service([pod(1, 1).zones(&["zone-a"]), pod(2, 1)])
        })
        .check(POD12, CLUSTER, any(&[POD11, POD21])),
        case("E9", "hints that leave this zone without endpoints are ignored", {
            service([pod(1, 1).zones(&["zone-c"]), pod(2, 1).zones(&["zone-b"])])
        })
        .check(POD12, CLUSTER, any(&[POD11, POD21]))
        .check(POD22, CLUSTER, any(&[POD21])),
        case("E9 E10", "node hints go before zone hints", {
            let both = ["zone-a", "zone-b"];
            let hinted = |number, node| pod(number, 1).zones(&both).nodes(&[node]);
            service([hinted(1, "node-2"), hinted(2, "node-1")])
        })
        .check(POD12, CLUSTER, any(&[POD21]))
        .check(POD22, CLUSTER, any(&[POD11])),
        case("E7", "hints do not matter to the Local set", {
            service([pod(1, 1).zones(&["zone-b"]), pod(2, 1).zones(&["zone-a"])]).internal_local()
        })
        .check(POD12, CLUSTER, any(&[POD11])),
        case("E6 E9", "hints do not matter to terminating endpoints", {
            let dying = |number, zone| pod(number, 1).terminating().zones(&[zone]);
            service([dying(1, "zone-a"), dying(2, "zone-b")])
        })
        .check(POD12, CLUSTER, any(&[POD11, POD21])),
    ]
}

fn joins() -> Vec<Case> {
    let mut misnamed = slice([pod(1, 1)]);
    misnamed.ports = vec![("Stream", Transport::Tcp, TARGET), ("stream", Transport::Udp, TARGET)];
    misnamed.ports[0].0 = "other";
    let mut foreign = slice([pod(1, 1)]);
    foreign.labels = vec![("kubernetes.io/service-name", "another")];
    let mut headless = slice([pod(1, 1)]);
    headless.labels = vec![("service.kubernetes.io/headless", "")];
    vec![
        case("W6 F1", "a slice's ports join by name and protocol", service([]).slices([misnamed])).check(
            POD12,
            CLUSTER,
            Expect::Refused,
        ),
        case("W7", "the endpoints of all slices are used", {
            service([]).slices([slice([pod(1, 1)]), slice([pod(2, 1)]), slice([pod(2, 2)])])
        })
        .check(POD12, CLUSTER, any(&[POD11, POD21, POD22])),
        case(
            "W7",
            "a slice of another Service is not used",
            service([]).slices([foreign, slice([pod(2, 1)])]),
        )
        .check(POD12, CLUSTER, any(&[POD21])),
        case(
            "W2",
            "a slice labelled headless is not used",
            service([]).slices([headless, slice([pod(2, 1)])]),
        )
        .check(POD12, CLUSTER, any(&[POD21])),
    ]
}

fn skipped() -> Vec<Case> {
    let mut other_proxy = service([pod(1, 1)]);
    other_proxy.labels = vec![("service.kubernetes.io/service-proxy-name", "another")];
    let single = |family| {
        let mut shape = service([pod(1, 1)]).of(ServiceType::NodePort);
        shape.families = vec![family];
        shape
    };
    vec![
        case("W1 F5", "a Service that another proxy owns is not served here", other_proxy).check(
            POD12,
            CLUSTER,
            Expect::Dropped,
        ),
        case(
            "W4 F5",
            "an ExternalName Service is not served",
            service([]).of(ServiceType::ExternalName).slices([]),
        )
        .check(POD12, CLUSTER, Expect::Dropped),
        case("W5 R17", "a Service of IPv4 only", single(Family::V4)).only(Family::V4).checks(
            &[POD12, HOST],
            &[CLUSTER, NODE_PORT],
            &any(&[POD11]),
        ),
        case("W5 R17", "the NodePort of an IPv4 Service is not served over IPv6", single(Family::V4))
            .only(Family::V6)
            .checks(&[POD12, HOST], &[NODE_PORT], &Expect::Refused),
        case("W5 R17", "a Service of IPv6 only", single(Family::V6)).only(Family::V6).checks(
            &[POD12, HOST],
            &[CLUSTER, NODE_PORT],
            &any(&[POD11]),
        ),
    ]
}
