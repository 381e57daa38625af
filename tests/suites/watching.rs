//! Watches against a stand-in for an API server that fails on demand.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{sync::mpsc::Receiver, task::JoinHandle, time::timeout};
use weir::{
    model::{Change, Kind},
    source::{
        SourceStatus,
        kube::{Connection, Credentials, KubeSource, watch, watch_pods},
    },
};
use weir_tests::{
    logged::Lines,
    stand_in::{Asked, Fault, StandIn},
};

const PATIENCE: Duration = Duration::from_secs(120);
/// A kind in protobuf and one in JSON, each with the kind as changes name it.
const KINDS: [(&str, &str); 2] = [("services", "Service"), ("nodes", "Node")];

struct Source {
    changes: Receiver<Change>,
    status: Arc<SourceStatus>,
    task: JoinHandle<()>,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Source {
    async fn start(server: &StandIn) -> Self {
        Self::start_with(server, None).await
    }

    /// The same, with a place to keep versions.
    async fn start_with(server: &StandIn, versions: Option<&Path>) -> Self {
        let credentials = Credentials::Kubeconfig(server.kubeconfig().unwrap());
        let (servers, node, versions) = (Vec::new(), "n1".to_owned(), versions.map(Path::to_owned));
        let settings = KubeSource { credentials, servers, node, versions };
        let connection = Connection::open(settings).await.unwrap();
        let status = Arc::new(SourceStatus::default());
        let (sender, changes) = tokio::sync::mpsc::channel(16);
        let task = tokio::spawn(watch(connection, sender, Arc::clone(&status)));
        Self { changes, status, task }
    }

    /// Waits for this change.
    async fn comes(&mut self, what: &str) {
        let comes = async {
            loop {
                match self.changes.recv().await.expect("the source goes on") {
                    Change::Apply(object)
                        if format!("{} {}", object.kind(), object.name().name()) == what =>
                    {
                        return;
                    }
                    Change::Apply(_) | Change::Synced(_) => {}
                    Change::Delete(kind, name) => panic!("{kind} {name} is taken away"),
                }
            }
        };
        let came = timeout(PATIENCE, comes).await.is_ok();
        assert!(came, "{what} does not come; {:#?}", self.status.report());
    }
}

/// The requests for watches of a kind, once there are so many.
async fn watches(server: &StandIn, plural: &str, count: usize) -> Vec<Asked> {
    let asked = async {
        loop {
            let asked: Vec<_> = server.asked(plural).into_iter().filter(|asked| asked.watch).collect();
            if asked.len() >= count {
                return asked;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, asked).await.unwrap_or_else(|_| panic!("{:#?}", server.asked(plural)))
}

fn lists(server: &StandIn, plural: &str) -> usize {
    server.asked(plural).iter().filter(|asked| !asked.watch).count()
}

/// The time from each to the next.
fn gaps(asked: &[Asked]) -> Vec<Duration> {
    asked.windows(2).map(|pair| pair[1].at - pair[0].at).collect()
}

/// Takes what is logged from now on, by other tests too.
fn logged_by_all() -> Lines {
    let lines = Lines::default();
    let writer = lines.clone();
    let log = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::set_global_default(log).unwrap();
    lines
}

/// How many lines have all these words.
fn with(lines: &Lines, words: &[&str]) -> usize {
    lines.text().lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
}

#[tokio::test]
async fn a_kind_whose_watches_end_at_once_is_asked_for_less_and_less_and_delays_no_other() {
    let lines = logged_by_all();
    for (plural, kind) in KINDS {
        let server = StandIn::start().await.unwrap();
        server.fail(plural, Fault::EndAtOnce);
        server.put(plural, "listed");
        let mut source = Source::start(&server).await;
        source.comes(&format!("{kind} listed")).await;
        for round in 1..=4 {
            watches(&server, plural, round).await;
            let slice = format!("slice-{round}");
            server.put("endpointslices", &slice);
            source.comes(&format!("EndpointSlice {slice}")).await;
        }
        let gaps = gaps(&watches(&server, plural, 4).await);
        for (doublings, gap) in gaps.iter().take(3).enumerate() {
            let least = Duration::from_millis(250) * 2_u32.pow(u32::try_from(doublings).unwrap());
            assert!(*gap >= least, "{plural} is asked for again after {gaps:?}");
        }
        assert_eq!(lists(&server, "endpointslices"), 1, "the other kind is not disturbed");
        assert_eq!(with(&lines, &["WARN", kind, "ended the watch"]), 1, "it is said once");

        server.fail(plural, Fault::None);
        server.put(plural, "late");
        source.comes(&format!("{kind} late")).await;
    }
}

/// The error of a refused watch, and whether it means that only a list helps.
const REFUSALS: [(Fault, bool); 6] = [
    (Fault::Refused(410, None), true),
    (Fault::Error(410, "Expired"), true),
    (Fault::Error(410, "Gone"), true),
    (Fault::Error(422, "Invalid"), true),
    (Fault::Error(500, "InternalError"), false),
    (Fault::Error(400, "BadRequest"), false),
];

#[tokio::test]
async fn where_watches_are_of_no_use_lists_bring_the_news() {
    let mut cases = tokio::task::JoinSet::new();
    for (plural, kind) in KINDS {
        for (fault, only_a_list_helps) in REFUSALS {
            cases.spawn(async move {
                let server = StandIn::start().await.unwrap();
                server.fail(plural, fault);
                let mut source = Source::start(&server).await;
                watches(&server, plural, 1).await;
                server.put(plural, "late");
                source.comes(&format!("{kind} late")).await;
                server.put("endpointslices", "slice");
                source.comes("EndpointSlice slice").await;

                let (lists, watches) = (lists(&server, plural), watches(&server, plural, 1).await.len());
                let most = if only_a_list_helps { watches } else { watches / 3 };
                assert!(lists <= most + 1, "{plural}, {fault:?}: {lists} lists for {watches} watches");
                server.fail(plural, Fault::None);
                server.put(plural, "last");
                source.comes(&format!("{kind} last")).await;
            });
        }
    }
    while let Some(case) = cases.join_next().await {
        case.unwrap();
    }
}

#[tokio::test]
async fn an_error_that_fails_one_watch_lists_nothing_anew() {
    for (plural, kind) in KINDS {
        for fault in [Fault::Error(500, "InternalError"), Fault::Refused(500, None)] {
            let server = StandIn::start().await.unwrap();
            server.fail_once(plural, fault);
            let mut source = Source::start(&server).await;
            watches(&server, plural, 2).await;
            server.put(plural, "late");
            source.comes(&format!("{kind} late")).await;
            assert_eq!(lists(&server, plural), 1, "{plural}, {fault:?}");
        }
    }
}

#[tokio::test]
async fn a_busy_server_is_left_alone_as_long_as_it_asks_for_and_lists_nothing_anew() {
    let after = Duration::from_secs(3);
    for (plural, kind) in KINDS {
        let server = StandIn::start().await.unwrap();
        server.fail(plural, Fault::Refused(429, Some(3)));
        let mut source = Source::start(&server).await;
        let asked = watches(&server, plural, 3).await;
        assert!(gaps(&asked).iter().all(|gap| *gap >= after), "{plural}: {:?}", gaps(&asked));
        assert_eq!(lists(&server, plural), 1, "{plural}");
        server.fail(plural, Fault::None);
        server.put(plural, "late");
        source.comes(&format!("{kind} late")).await;
    }
}

/// The `resourceVersion` parameters of each list of a kind, in the order of the requests.
fn versions(server: &StandIn, plural: &str) -> Vec<String> {
    let version = |asked: &Asked| {
        let parts = asked.query.split('&').filter(|part| part.starts_with("resourceVersion"));
        let mut parts: Vec<_> = parts.map(str::to_owned).collect();
        parts.sort();
        parts.join(" ")
    };
    server.asked(plural).iter().filter(|asked| !asked.watch).map(version).collect()
}

#[tokio::test]
async fn an_agent_asks_first_for_a_list_no_older_than_its_predecessors() {
    let kept = tempfile::tempdir().unwrap();
    let server = StandIn::start().await.unwrap();
    server.put("services", "listed");
    let mut source = Source::start_with(&server, Some(kept.path())).await;
    source.comes("Service listed").await;
    watches(&server, "services", 1).await;
    server.put("services", "watched");
    source.comes("Service watched").await;
    // Nothing is put in order before it ends.
    drop(source);
    let mut source = Source::start_with(&server, Some(kept.path())).await;
    source.comes("Service watched").await;
    watches(&server, "services", 2).await;
    assert_eq!(versions(&server, "services"), ["", "resourceVersion=3 resourceVersionMatch=NotOlderThan"]);

    // The list after it is as of now: what the agent before knew has served its purpose.
    server.fail_once("services", Fault::Refused(410, None));
    drop(source);
    let mut source = Source::start_with(&server, Some(kept.path())).await;
    server.put("services", "later");
    source.comes("Service later").await;
    let asked = async {
        while versions(&server, "services").len() < 4 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, asked).await.expect("a list is asked for after 410");
    assert_eq!(versions(&server, "services")[3], "");
}

#[tokio::test]
async fn a_server_that_has_not_come_so_far_is_asked_for_a_list_as_of_now() {
    let kept = tempfile::tempdir().unwrap();
    let server = StandIn::start().await.unwrap();
    for name in ["a", "b"] {
        server.put("services", name);
    }
    let mut source = Source::start_with(&server, Some(kept.path())).await;
    source.comes("Service b").await;
    watches(&server, "services", 1).await;
    drop(source);

    server.restore();
    server.put("services", "restored");
    let mut source = Source::start_with(&server, Some(kept.path())).await;
    source.comes("Service restored").await;
    watches(&server, "services", 2).await;
    let not_older = "resourceVersion=3 resourceVersionMatch=NotOlderThan";
    assert_eq!(versions(&server, "services"), ["", not_older, ""]);
    let report = source.status.of(Kind::Service).report(Kind::Service);
    assert_eq!((report.relists, report.errors), (1, 0), "{report:?}");

    // Another cluster has versions of its own.
    let other = StandIn::start().await.unwrap();
    other.put("services", "other");
    let mut source = Source::start_with(&other, Some(kept.path())).await;
    source.comes("Service other").await;
    assert_eq!(versions(&other, "services"), [""]);
}

#[tokio::test]
async fn requests_name_the_program() {
    let server = StandIn::start().await.unwrap();
    let _source = Source::start(&server).await;
    for plural in ["services", "endpointslices", "nodes", "servicecidrs"] {
        let asked = async {
            while server.asked(plural).is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            server.asked(plural)
        };
        for asked in timeout(PATIENCE, asked).await.unwrap() {
            let (program, rest) = asked.user_agent.split_once('/').unwrap();
            let (version, rest) = rest.split_once(' ').unwrap();
            assert_eq!((program, version), ("weir", env!("CARGO_PKG_VERSION")));
            assert!(rest.starts_with("(linux/") && rest.ends_with(") node-proxy"), "{rest}");
        }
    }
}

#[tokio::test]
async fn of_namespaces_no_more_than_the_metadata_is_asked_for() {
    let server = StandIn::start().await.unwrap();
    server.put("namespaces", "shop");
    let credentials = Credentials::Kubeconfig(server.kubeconfig().unwrap());
    let settings = KubeSource { credentials, servers: Vec::new(), node: "n1".to_owned(), versions: None };
    let (sender, mut changes) = tokio::sync::mpsc::channel(16);
    let task = tokio::spawn(watch_pods(Connection::open(settings).await.unwrap(), sender, Arc::default()));
    watches(&server, "namespaces", 1).await;
    server.put("namespaces", "late");
    let late = async {
        while !matches!(changes.recv().await, Some(Change::Apply(object)) if object.name().name() == "late") {
        }
    };
    timeout(PATIENCE, late).await.expect("what happens is told");
    for asked in server.asked("namespaces") {
        let first = asked.accept.split(',').next().unwrap();
        assert!(first.starts_with("application/vnd.kubernetes.protobuf;"), "{first}");
        assert!(first.contains("as=PartialObjectMetadata"), "{first}");
    }
    task.abort();
}
