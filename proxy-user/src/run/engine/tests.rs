//! The results of changes when service ports and families fail. Among the Services of every test is one with
//! a port that is always refused.

use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};

use super::*;
use crate::{
    dataplane::{Error, Faults, Faulty, Fill, Memory, Standing, State, nftables::Seen},
    fixture::{full_slice, named, service, settings},
    model::{Kind, ObjectName},
    observe::{HealthCheckState, Trouble},
    plan::{Delta, Destination},
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Its port is refused.
const STUBBORN: &str = "stubborn";

/// A data plane that a test looks at while the engine has it.
struct Shared<D>(Arc<Mutex<D>>);

impl<D> Clone for Shared<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D> Shared<D> {
    fn lock(&self) -> MutexGuard<'_, D> {
        self.0.lock().unwrap()
    }
}

impl<D: Dataplane> Dataplane for Shared<D> {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        self.lock().apply(delta)
    }
    fn reread(&mut self) -> Result<(), Error> {
        self.lock().reread()
    }
    fn reread_family(&mut self, family: Family) -> Result<(), Error> {
        self.lock().reread_family(family)
    }
    fn has_read(&self, family: Family, generation: u32) -> bool {
        self.lock().has_read(family, generation)
    }
    fn looks_intact(&mut self, family: Family) -> bool {
        self.lock().looks_intact(family)
    }
    fn wants_everything(&self) -> Option<Instant> {
        self.lock().wants_everything()
    }
    fn standing(&self) -> Vec<Standing> {
        self.lock().standing()
    }
    fn fill(&self) -> Vec<Fill> {
        self.lock().fill()
    }
    fn dump(&mut self) -> Result<State, Error> {
        self.lock().dump()
    }
    fn remove(&mut self) -> Result<(), Error> {
        self.lock().remove()
    }
}

/// An engine at work on a host with one address.
struct Rig {
    change: mpsc::Sender<Change>,
    foreign: watch::Sender<News>,
    plane: Shared<Faulty<Memory>>,
    faults: Faults,
    metrics: Metrics,
    health: Health,
    troubles: mpsc::Receiver<Trouble>,
    checks: mpsc::UnboundedReceiver<(ObjectName, Option<HealthCheckState>)>,
    first: mpsc::UnboundedReceiver<Family>,
    suspects: mpsc::UnboundedReceiver<Suspects>,
    engine: tokio::task::JoinHandle<()>,
}

impl Rig {
    /// Starts with what a data plane holds already.
    fn on(memory: Memory) -> Self {
        let faults = Faults::default();
        faults.refuse(named(STUBBORN), true);
        let plane = Shared(Arc::new(Mutex::new(Faulty::with(memory, faults.clone()))));
        let (metrics, health) = (Metrics::new(), Health::new(Duration::from_millis(50)));
        let (events, troubles) = Events::channel(Metrics::new());
        let (servers, checks) = HealthChecks::channel();
        let ((first_in, first), (suspects_in, suspects)) =
            (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let engine = Engine::new(settings(), metrics.clone(), health.clone())
            .with_events(events)
            .with_health_checks(servers)
            .with_first(Some(first_in))
            .with_conntrack(suspects_in)
            // Everything that waits for a retry waits for the rest of the test.
            .with_retry(Duration::from_secs(3600));
        let (change, changes) = mpsc::channel(64);
        let (foreign, news) = watch::channel(News::default());
        let mode = watch::channel("").0;
        let opened = Opened { plane: Box::new(plane.clone()), foreign: news, sockets: None, mode };
        let engine = tokio::spawn(async move {
            let (open, opening) = oneshot::channel();
            assert!(open.send(opened).is_ok(), "nothing waits for the plane");
            let (_stop, stopping) = watch::channel(false);
            let (addresses_in, addresses) = watch::channel(Vec::new());
            addresses_in.send_replace(vec!["192.0.2.1".parse().unwrap()]);
            engine.run(Inputs { changes, addresses, opened: opening, stopping }).await;
        });
        Self { change, foreign, plane, faults, metrics, health, troubles, checks, first, suspects, engine }
    }

    /// Starts with these Services beside the stubborn one.
    async fn with(services: impl IntoIterator<Item = Change>) -> Self {
        let rig = Self::on(Memory::default());
        rig.begin(services).await;
        rig
    }

    async fn begin(&self, services: impl IntoIterator<Item = Change>) {
        self.tell(service(STUBBORN, json!({ "clusterIP": "10.0.9.9", "ports": [{ "port": 9 }] }))).await;
        for service in services {
            self.tell(service).await;
        }
        for kind in Kind::ALL {
            self.tell(Change::Synced(kind)).await;
        }
    }

    async fn tell(&self, change: Change) {
        self.change.send(change).await.unwrap();
    }

    fn holds(&self, ip: &str) -> bool {
        let ip = ip.parse().unwrap();
        let state = self.plane.lock().dump().unwrap();
        state.frontends.keys().any(|frontend| frontend.destination == Destination::Address(ip))
    }

    async fn until_held(&self, ip: &str) {
        until(|| self.holds(ip)).await;
    }

    /// The number that this metric has.
    fn metric(&self, name: &str) -> Option<String> {
        let text = self.metrics.render();
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned))
    }

    async fn until_metric(&self, name: &str, value: &str) {
        until(|| self.metric(name).as_deref() == Some(value)).await;
    }

    /// Another program changes this family's table.
    fn touch(&self, family: Family) {
        let mut families = PerFamily::default();
        *families.get_mut(family) = true;
        self.foreign.send_modify(|news| news.take_in(Seen::Foreign { families, generation: 1 }));
    }

    async fn end(self) {
        drop(self.change);
        self.engine.await.unwrap();
    }
}

async fn until(wanted: impl Fn() -> bool) {
    let waiting = async {
        while !wanted() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it does not come");
}

async fn next<T>(receiver: &mut mpsc::UnboundedReceiver<T>) -> T {
    tokio::time::timeout(PATIENCE, receiver.recv()).await.expect("it does not come").unwrap()
}

/// The frontends of the flows to look at.
fn looked_at(suspects: Suspects) -> Vec<String> {
    suspects.frontends().map(ToString::to_string).collect()
}

fn at(name: &str, ip: &str) -> Change {
    service(name, json!({ "clusterIP": ip, "ports": [{ "port": 80 }] }))
}

fn dual(name: &str, number: u8) -> Change {
    let ips = json!([format!("10.0.0.{number}"), format!("fd00::{number}")]);
    let families = json!(["IPv4", "IPv6"]);
    let spec =
        json!({ "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": families, "ports": [{ "port": 80 }] });
    service(name, spec)
}

/// A Service with a healthCheckNodePort, and its endpoints.
fn checked(name: &str, port: u16) -> Change {
    service(
        name,
        json!({
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port,
            "clusterIP": "10.0.3.1", "ports": [{ "port": 80, "nodePort": 30080 }],
        }),
    )
}

fn local(service: &str, endpoints: &[&str]) -> Change {
    let list = endpoints.iter().map(|ip| {
        json!({ "addresses": [ip], "nodeName": "node-a", "conditions": { "ready": true, "serving": true } })
    });
    slice_of(service, json!([{ "name": "", "port": 8080, "protocol": "TCP" }]), list.collect())
}

fn slice_of(service: &str, ports: Value, endpoints: Value) -> Change {
    full_slice(json!({
        "metadata": {
            "namespace": "ns", "name": service, "labels": { "kubernetes.io/service-name": service },
            "annotations": { "endpoints.kubernetes.io/last-change-trigger-time": "2999-01-01T00:00:00Z" },
        },
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
    }))
}

#[tokio::test]
async fn what_could_not_be_removed_is_counted_once_for_each_family() {
    let failures = |family| {
        format!("kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{{ip_family=\"{family}\"}}")
    };
    let rig = Rig::with([dual("api", 1)]).await;
    rig.until_held("fd00::1").await;
    assert_eq!(rig.metric(&failures("IPv4")).as_deref(), Some("0"));
    rig.faults.fail_removals(PerFamily { v4: 2, v6: 1 });
    for (name, number) in [("web", 2), ("mail", 3)] {
        rig.tell(dual(name, number)).await;
        rig.until_held(&format!("fd00::{number}")).await;
        rig.until_metric(&failures("IPv4"), "2").await;
        rig.until_metric(&failures("IPv6"), "1").await;
    }
    rig.end().await;
}

#[tokio::test]
async fn r12_who_does_not_get_a_frontend_hears_of_it() {
    let claiming = |name, ip| {
        let spec = json!({ "clusterIP": ip, "ports": [{ "port": 80 }], "externalIPs": ["198.51.100.1"] });
        service(name, spec)
    };
    let mut rig = Rig::with([claiming("api", "10.0.0.1"), claiming("web", "10.0.0.2")]).await;
    let trouble = tokio::time::timeout(PATIENCE, rig.troubles.recv()).await.unwrap().unwrap();
    let note =
        "198.51.100.1:80/TCP belongs to Service ns/api, which is as old and comes first by name".to_owned();
    assert_eq!(trouble, Trouble::of_service(named("web"), "FrontendTaken", "Program", note));
    rig.end().await;
}

#[tokio::test]
async fn ports_that_cannot_be_programmed_are_told_of_by_service_and_counted() {
    let ports = json!([{ "name": "a", "port": 1 }, { "name": "b", "port": 2 }]);
    let mut rig = Rig::on(Memory::default());
    rig.faults.refuse(named("web"), true);
    rig.begin([service("web", json!({ "clusterIP": "10.0.0.1", "ports": ports }))]).await;
    let why = "a fault on purpose";
    let note =
        |text: String| move |name| Trouble::of_service(named(name), "FailedToProgram", "Program", text);
    for expected in [
        note(format!("ns/stubborn/TCP (IPv4): {why}"))(STUBBORN),
        note(format!("ns/web:a/TCP (IPv4): {why}; ns/web:b/TCP (IPv4): {why}"))("web"),
    ] {
        let trouble = tokio::time::timeout(PATIENCE, rig.troubles.recv()).await.unwrap().unwrap();
        assert_eq!(trouble, expected);
    }
    rig.until_metric("weir_unprogrammed_ports", "3").await;
    rig.tell(Change::Delete(Kind::Service, named("web"))).await;
    rig.until_metric("weir_unprogrammed_ports", "1").await;
    rig.faults.refuse(named(STUBBORN), false);
    rig.tell(at(STUBBORN, "10.0.9.8")).await;
    rig.until_metric("weir_unprogrammed_ports", "0").await;
    assert!(rig.holds("10.0.9.8"));
    rig.end().await;
}

#[tokio::test]
async fn a_refused_port_delays_no_change_of_another() {
    let rig = Rig::with([at("web", "10.0.0.1")]).await;
    rig.until_held("10.0.0.1").await;
    // As many waits as would double the time between two tries of everything.
    for number in 2..40 {
        let ip = format!("10.0.0.{number}");
        rig.tell(at("web", &ip)).await;
        rig.until_held(&ip).await;
    }
    rig.until_metric("weir_unprogrammed_ports", "1").await;
    let everything = rig.metric("weir_reconciles_total{reason=\"failure\"}");
    assert_eq!(everything, None, "one port is no reason to compare everything");
    rig.end().await;
}

#[tokio::test]
async fn a_refused_port_is_tried_again_by_itself() {
    let rig = Rig::with([at("web", "10.0.0.1")]).await;
    rig.until_metric("weir_unprogrammed_ports", "1").await;
    rig.faults.refuse(named(STUBBORN), false);
    rig.until_held("10.0.9.9").await;
    rig.until_metric("weir_unprogrammed_ports", "0").await;
    rig.end().await;
}

#[tokio::test]
async fn with_a_refused_port_the_node_is_healthy_and_taken_over_and_nothing_is_pending() {
    let mut rig = Rig::with([at("web", "10.0.0.1")]).await;
    assert_eq!((next(&mut rig.first).await, next(&mut rig.first).await), (Family::V4, Family::V6));
    for number in 2..5 {
        let ip = format!("10.0.0.{number}");
        rig.tell(at("web", &ip)).await;
        rig.tell(local("web", &["10.244.0.1"])).await;
        rig.until_held(&ip).await;
        until(|| rig.health.healthy()).await;
    }
    for pending in ["service", "endpoint"] {
        let name = format!("kubeproxy_sync_proxy_rules_{pending}_changes_pending");
        rig.until_metric(&name, "0").await;
    }
    let latency = r#"kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"}"#;
    until(|| rig.metric(latency).is_some()).await;
    rig.end().await;
}

#[tokio::test]
async fn with_a_refused_port_stale_flows_of_others_are_looked_for() {
    let dns = json!({ "clusterIP": "10.0.0.53", "ports": [{ "port": 53, "protocol": "UDP" }] });
    let mut rig = Rig::with([service("dns", dns)]).await;
    let endpoints =
        json!([{ "addresses": ["10.244.0.1"], "conditions": { "ready": true, "serving": true } }]);
    rig.tell(slice_of("dns", json!([{ "name": "", "port": 53, "protocol": "UDP" }]), endpoints)).await;
    assert_eq!(looked_at(next(&mut rig.suspects).await), ["10.0.0.53:53/UDP"]);
    rig.end().await;
}

#[tokio::test]
async fn suspects_of_a_change_spare_flows_that_a_later_one_makes_right() {
    let dns =
        || service("dns", json!({ "clusterIP": "10.0.0.53", "ports": [{ "port": 53, "protocol": "UDP" }] }));
    let ports = json!([{ "name": "", "port": 53, "protocol": "UDP" }]);
    let endpoints =
        json!([{ "addresses": ["10.244.0.1"], "conditions": { "ready": true, "serving": true } }]);
    let mut rig = Rig::with([dns(), slice_of("dns", ports, endpoints)]).await;
    next(&mut rig.suspects).await;
    let flow = crate::stale::flows::Flow {
        client: "10.244.0.9".parse().unwrap(),
        destination: "10.0.0.53:53".parse().unwrap(),
        answers: "10.244.0.1:53".parse().unwrap(),
    };
    rig.tell(Change::Delete(Kind::Service, named("dns"))).await;
    let gone = loop {
        let suspects = next(&mut rig.suspects).await;
        suspects.begin();
        if suspects.is_stale(flow) {
            break suspects;
        }
    };
    rig.tell(dns()).await;
    next(&mut rig.suspects).await;
    assert!(!gone.is_stale(flow), "a walk by them may still be under way");
    rig.end().await;
}

#[tokio::test]
async fn flows_of_a_service_that_goes_while_a_family_cannot_be_written_are_looked_for_later() {
    let ips = json!(["10.0.0.53", "fd00::53"]);
    let ports = json!([{ "port": 53, "protocol": "UDP" }]);
    let dns =
        json!({ "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": ["IPv4", "IPv6"], "ports": ports });
    let mut rig = Rig::with([service("dns", dns)]).await;
    for _ in Family::ALL {
        next(&mut rig.first).await;
    }
    next(&mut rig.suspects).await;
    rig.faults.break_family(Family::V6, true);
    rig.tell(Change::Delete(Kind::Service, named("dns"))).await;
    assert_eq!(looked_at(next(&mut rig.suspects).await), ["10.0.0.53:53/UDP"]);
    // The repair of the family names only the remaining frontends.
    rig.faults.break_family(Family::V6, false);
    rig.touch(Family::V6);
    assert_eq!(looked_at(next(&mut rig.suspects).await), ["[fd00::53]:53/UDP"]);
    rig.end().await;
}

#[tokio::test]
async fn with_a_refused_port_the_health_checks_of_others_are_told() {
    let mut rig = Rig::with([checked("lb", 30100), local("lb", &["10.244.0.1", "10.244.0.2"])]).await;
    let counted = |told: (ObjectName, Option<HealthCheckState>)| {
        (told.0, told.1.map(|state| (state.port, state.local_endpoints)))
    };
    assert_eq!(counted(next(&mut rig.checks).await), (named("lb"), Some((30100, 2))));
    rig.tell(local("lb", &[])).await;
    assert_eq!(counted(next(&mut rig.checks).await), (named("lb"), Some((30100, 0))));

    // Clients are sent away from a port that cannot be changed, and not to it.
    rig.tell(local("lb", &["10.244.0.1", "10.244.0.2"])).await;
    assert_eq!(counted(next(&mut rig.checks).await), (named("lb"), Some((30100, 2))));
    rig.faults.refuse(named("lb"), true);
    rig.tell(local("lb", &["10.244.0.2"])).await;
    assert_eq!(counted(next(&mut rig.checks).await), (named("lb"), Some((30100, 1))));
    rig.tell(local("lb", &["10.244.0.2", "10.244.0.3", "10.244.0.4"])).await;
    rig.until_metric("weir_unprogrammed_ports", "2").await;
    assert!(rig.checks.try_recv().is_err());
    rig.faults.refuse(named("lb"), false);
    assert_eq!(counted(next(&mut rig.checks).await), (named("lb"), Some((30100, 3))));
    rig.end().await;
}

#[tokio::test]
async fn a_family_that_cannot_be_written_costs_the_other_nothing() {
    let mut rig = Rig::on(Memory::default());
    rig.faults.break_family(Family::V6, true);
    rig.begin([dual("web", 1)]).await;
    assert_eq!(next(&mut rig.first).await, Family::V4);
    for number in 2..40 {
        rig.tell(dual("web", number)).await;
        rig.until_held(&format!("10.0.0.{number}")).await;
        until(|| rig.health.healthy()).await;
    }
    assert!(!rig.holds("fd00::39") && rig.first.try_recv().is_err());
    assert!(rig.metric("weir_unprogrammed_ports").as_deref() == Some("1"), "its ports are not refused");

    // Only everything puts it right, and a foreign change is a reason to try.
    rig.faults.break_family(Family::V6, false);
    rig.touch(Family::V6);
    rig.until_held("fd00::39").await;
    assert_eq!(next(&mut rig.first).await, Family::V6);
    assert!(!rig.holds("fd00::1"));
    rig.tell(dual("web", 40)).await;
    rig.until_held("fd00::40").await;
    rig.end().await;
}

#[tokio::test]
async fn a_foreign_change_has_its_family_repaired_once() {
    let rig = Rig::with([dual("web", 1)]).await;
    rig.until_held("fd00::1").await;
    let repairs = "weir_reconciles_total{reason=\"foreign\"}";
    for count in 1..4 {
        rig.touch(Family::V6);
        rig.until_metric(repairs, &count.to_string()).await;
    }
    // Lost notices have the families that they touched repaired once.
    let families = PerFamily { v4: true, v6: false };
    rig.foreign.send_modify(|news| news.take_in(Seen::Lost { families }));
    rig.until_metric(repairs, "4").await;
    rig.tell(dual("web", 2)).await;
    rig.until_held("fd00::2").await;
    rig.until_metric(repairs, "4").await;
    rig.end().await;
}

#[tokio::test]
async fn without_any_family_the_node_is_not_healthy() {
    let rig = Rig::on(Memory::default());
    Family::ALL.iter().for_each(|family| rig.faults.break_family(*family, true));
    rig.begin([dual("web", 1)]).await;
    until(|| !rig.health.healthy()).await;
    rig.end().await;
}

#[tokio::test]
async fn what_is_programmed_stays_when_it_is_refused_at_the_next_start() {
    let old = Rig::with([at("web", "10.0.0.1")]).await;
    old.until_held("10.0.0.1").await;
    let memory = old.plane.lock().clone();
    old.end().await;

    let rig = Rig::on(Memory::default());
    rig.faults.refuse(named("web"), true);
    *rig.plane.lock() = memory.restarted(rig.faults.clone());
    rig.begin([at("web", "10.0.0.2"), at("api", "10.0.0.3")]).await;
    rig.until_held("10.0.0.3").await;
    assert!(rig.holds("10.0.0.1") && !rig.holds("10.0.0.2"));
    rig.faults.refuse(named("web"), false);
    rig.until_held("10.0.0.2").await;
    assert!(!rig.holds("10.0.0.1"));
    rig.end().await;
}
