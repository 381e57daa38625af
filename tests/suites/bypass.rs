//! Which cgroups the map of bypassed pods holds, and what that does to sockets: with real cgroups, real maps and
//! programs, and once with a real API server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map, MapData};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use proxy_ebpf::Settings;
use serde_json::json;
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use weir::{
    dataplane::{
        Dataplane as _,
        ebpf::{Ebpf, Place},
    },
    model::{Family, ObjectName, PerFamily, Protocol},
    optout::{self, Bypass, Bypassed, BypassedPod, Census, Reason},
    plan::{
        Backend, ClusterIpDelta, Delta, Destination, Frontend, FrontendPlan, NodePlan, NodePortAddresses,
        PortDelta, PortId, PortPlan, Route, Target, Treatment,
    },
    source::{
        SourceStatus,
        kube::{Connection, Credentials, KubeSource},
    },
};
use weir_tests::{apiserver::ApiServer, bpffs::BpfFs, cgroup::Cgroup, netns};

const PATIENCE: Duration = Duration::from_secs(30);

/// A part of the cgroup tree, as a node in a container has it; gone when this is dropped.
struct Tree(Cgroup);

impl Tree {
    fn new(name: &str) -> Self {
        Self(Cgroup::new(&format!("bypass-{name}")).unwrap())
    }

    /// Makes a cgroup with its parents; answers its id.
    fn make(&self, path: &str) -> u64 {
        let path = self.0.path().join(path);
        fs::create_dir_all(&path).unwrap();
        fs::metadata(&path).unwrap().ino()
    }

    fn remove(&self, path: &str) {
        fs::remove_dir(self.0.path().join(path)).unwrap();
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // The group above complains of groups that cannot be removed.
        let _ = empty(self.0.path());
    }
}

/// The files of a cgroup go with it and cannot be removed by themselves.
fn empty(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            empty(&entry.path())?;
            fs::remove_dir(entry.path())?;
        }
    }
    Ok(())
}

/// The two maps, pinned, so that they outlive any one agent.
struct Pins {
    _files: BpfFs,
    place: Place,
}

/// Settings as the rest of the data plane writes them.
fn settings() -> Settings {
    Settings { host: 7, layout: 1, cgroup: 9, ..Settings::default() }
}

impl Pins {
    fn new(capacity: u32, tree: &Tree) -> Self {
        let files = BpfFs::new().unwrap();
        let cgroup_root = tree.0.path().to_owned();
        let place = Place { bpf_root: files.directory("weir").unwrap(), cgroup_root };
        fs::create_dir(place.sockets()).unwrap();
        let map = HashMap::<MapData, u64, u32>::create(capacity, 0).unwrap();
        map.pin(place.sockets().join("bypassed")).unwrap();
        let mut map = Array::<MapData, Settings>::create(2, 0).unwrap();
        for element in [Settings::PLANE, Settings::PODS] {
            map.set(element, settings(), 0).unwrap();
        }
        map.pin(place.sockets().join("settings")).unwrap();
        Self { _files: files, place }
    }

    fn data(&self, name: &str) -> MapData {
        MapData::from_pin(self.place.sockets().join(name)).unwrap()
    }

    fn map(&self) -> HashMap<MapData, u64, u32> {
        Map::HashMap(self.data("bypassed")).try_into().unwrap()
    }

    fn put(&self, id: u64) {
        self.map().insert(id, 1, 0).unwrap();
    }

    /// The ids in the map, after a look at the settings: the count is right and nothing else has changed.
    fn ids(&self) -> BTreeSet<u64> {
        let ids: BTreeSet<u64> = self.map().keys().collect::<Result<_, _>>().unwrap();
        let map: Array<_, Settings> = Map::Array(self.data("settings")).try_into().unwrap();
        let bypassed = u32::try_from(ids.len()).unwrap();
        assert_eq!(map.get(&Settings::PODS, 0).unwrap(), Settings { bypassed, ..settings() });
        assert_eq!(map.get(&Settings::PLANE, 0).unwrap(), settings());
        ids
    }
}

/// The agent's part at work.
struct Fixture {
    wanted: watch::Sender<Arc<Bypassed>>,
    census: watch::Receiver<Census>,
    task: JoinHandle<()>,
}

impl Fixture {
    fn start(place: &Place) -> Self {
        let bypass = Bypass::open(&place.sockets(), &place.cgroup_root).unwrap();
        let (wanted, receiver) = watch::channel(Arc::default());
        Self { wanted, census: bypass.census(), task: tokio::spawn(bypass.run(receiver)) }
    }

    fn want(&self, complete: bool, uids: &[&str]) {
        let pods = uids.iter().map(|uid| {
            let name = ObjectName::new("shop", &format!("of-{uid}"));
            (Arc::from(*uid), BypassedPod { name, reason: Reason::Pod })
        });
        self.wanted.send_replace(Arc::new(Bypassed {
            complete,
            pods: pods.collect(),
            ..Bypassed::default()
        }));
    }

    /// All pods there are, without a setting.
    fn undecided(&self, uids: &[&str]) {
        let name = |uid: &&str| (Arc::from(*uid), ObjectName::new("shop", &format!("of-{uid}")));
        let undecided = uids.iter().map(name).collect();
        self.wanted.send_replace(Arc::new(Bypassed { complete: true, undecided, ..Bypassed::default() }));
    }

    /// Waits until so many pods are left alone and so many wait.
    async fn reach(&mut self, pods: usize, waiting: usize) {
        reach(&mut self.census, "pod", pods, waiting).await;
    }

    async fn end(self) {
        drop(self.wanted);
        timeout(PATIENCE, self.task).await.expect("it ends with its sender").unwrap();
    }
}

async fn reach(census: &mut watch::Receiver<Census>, reason: &'static str, pods: usize, waiting: usize) {
    let pods = if pods == 0 { BTreeMap::new() } else { BTreeMap::from([(reason, pods)]) };
    let wanted = Census { pods, waiting };
    let reached = timeout(PATIENCE, census.wait_for(|census| *census == wanted)).await.is_ok();
    assert!(reached, "{wanted:?} is not reached: {:?}", *census.borrow());
}

#[tokio::test]
async fn ids_come_with_the_choice_and_go_with_it_under_either_driver() {
    let tree = Tree::new("come");
    let pins = Pins::new(16, &tree);
    let systemd = tree.make("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_1.slice");
    let cgroupfs = tree.make("kubelet/kubepods/podb-2");
    tree.make("kubelet/kubepods/podc-3/container");
    let mut fixture = Fixture::start(&pins.place);
    fixture.want(true, &["a-1", "b-2"]);
    fixture.reach(2, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([systemd, cgroupfs]));
    fixture.want(true, &["b-2"]);
    fixture.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([cgroupfs]));
    fixture.want(true, &[]);
    fixture.reach(0, 0).await;
    assert_eq!(pins.ids(), BTreeSet::new());
    fixture.end().await;
}

#[tokio::test]
async fn a_pod_is_left_alone_while_a_cluster_runs_in_it_unless_something_was_decided() {
    let tree = Tree::new("cluster");
    let pins = Pins::new(16, &tree);
    let early = tree.make("kubepods/burstable/poda");
    tree.make("kubepods/burstable/poda/container/kubepods/besteffort");
    let late = tree.make("kubepods/podb");
    tree.make("kubepods/podb/container/init");
    tree.make("kubepods/pod-on/container/kubepods");
    let mut fixture = Fixture::start(&pins.place);
    fixture.undecided(&["a", "b"]);
    reach(&mut fixture.census, "cluster", 1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([early]));
    // In a container in the pod's container, with a kubelet that uses slices. No notification reports it.
    tree.make("kubepods/podb/container/docker/1f/kubelet.slice/kubelet-kubepods.slice");
    reach(&mut fixture.census, "cluster", 2, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([early, late]));
    fixture.undecided(&["b"]);
    reach(&mut fixture.census, "cluster", 1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([late]));
    fixture.end().await;
}

#[tokio::test]
async fn a_cgroup_that_appears_late_is_in_the_map_at_once_and_one_made_anew_too() {
    let tree = Tree::new("late");
    let pins = Pins::new(16, &tree);
    tree.make("kubepods/burstable");
    let mut fixture = Fixture::start(&pins.place);
    fixture.want(true, &["a"]);
    fixture.reach(0, 1).await;
    assert_eq!(pins.ids(), BTreeSet::new());
    let made = Instant::now();
    let first = tree.make("kubepods/burstable/poda");
    fixture.reach(1, 0).await;
    println!("in the map {:?} after the cgroup was made", made.elapsed());
    assert_eq!(pins.ids(), BTreeSet::from([first]));
    // Nothing is missing now, so only inotify can report a change.
    tree.remove("kubepods/burstable/poda");
    fixture.reach(0, 1).await;
    assert_eq!(pins.ids(), BTreeSet::new());
    let second = tree.make("kubepods/besteffort/poda");
    fixture.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([second]));
    fixture.end().await;
}

#[tokio::test]
async fn the_kubelet_s_directories_may_come_later_than_the_agent() {
    let tree = Tree::new("early");
    let pins = Pins::new(16, &tree);
    let mut fixture = Fixture::start(&pins.place);
    fixture.want(true, &["a"]);
    fixture.reach(0, 1).await;
    let id = tree.make("kubepods.slice/kubepods-poda.slice");
    fixture.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([id]));
    fixture.end().await;
}

#[tokio::test]
async fn after_a_restart_nothing_goes_before_everything_is_known() {
    let tree = Tree::new("restart");
    let pins = Pins::new(16, &tree);
    let [still, no_more] = ["a", "b"].map(|uid| tree.make(&format!("kubepods/pod{uid}")));
    let gone = u64::MAX;
    [still, no_more, gone].into_iter().for_each(|id| pins.put(id));
    let mut fixture = Fixture::start(&pins.place);
    // The count may have been lost; it is put right before anything is heard.
    assert_eq!(pins.ids(), BTreeSet::from([still, no_more, gone]));
    fixture.want(false, &["a"]);
    fixture.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([still, no_more, gone]));
    // An entry that this run saw in use may go at any time.
    fixture.want(false, &["a", "b"]);
    fixture.reach(2, 0).await;
    fixture.want(false, &["a"]);
    fixture.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([still, gone]));
    fixture.want(true, &["a"]);
    // Complete or not is no part of the census, so another pod shows that it was seen.
    let other = tree.make("kubepods/podc");
    fixture.want(true, &["a", "c"]);
    fixture.reach(2, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([still, other]));
    fixture.end().await;
}

#[tokio::test]
async fn a_pod_that_does_not_fit_waits_for_room() {
    let tree = Tree::new("full");
    let pins = Pins::new(1, &tree);
    let [first, second] = ["a", "b"].map(|uid| tree.make(&format!("kubepods/pod{uid}")));
    let mut fixture = Fixture::start(&pins.place);
    fixture.want(true, &["a"]);
    fixture.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([first]));
    fixture.want(true, &["a", "b"]);
    fixture.reach(1, 1).await;
    fixture.want(true, &["b"]);
    fixture.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([second]));
    fixture.end().await;
}

/// A Service at `service`:80 with one backend.
fn web(service: IpAddr, backend: SocketAddr) -> Delta {
    let frontend = FrontendPlan {
        frontend: Frontend { destination: Destination::Address(service), protocol: Protocol::Tcp, port: 80 },
        route: Route::uniform(Treatment { target: Target::Cluster, masquerade: false }),
        allowed_sources: None,
        answered_here: false,
    };
    let family = if service.is_ipv4() { Family::V4 } else { Family::V6 };
    let port = PortPlan {
        id: PortId {
            service: ObjectName::new("shop", "web"),
            port: "".into(),
            protocol: Protocol::Tcp,
            family,
        },
        cluster: vec![Backend { address: backend.ip(), port: backend.port(), local: true }],
        local: Vec::new(),
        frontends: vec![frontend],
        affinity: None,
        on_removal: weir::plan::Removal::Keep,
        serving: Vec::new(),
    };
    let node = NodePlan {
        local_traffic: PerFamily { v4: None, v6: None },
        node_port_addresses: PerFamily { v4: NodePortAddresses::AnyLocal, v6: NodePortAddresses::AnyLocal },
        loopback_node_ports: PerFamily { v4: true, v6: true },
        host_addresses: Vec::new(),
        masquerade_mark: 0x4000,
        service_cidrs: Vec::new(),
        answers_names: false,
        name_clients: None,
        drops_out_of_window: true,
    };
    Delta {
        node: Some(Arc::new(node)),
        cluster_ips: vec![ClusterIpDelta::Add(service)],
        ports: vec![PortDelta { before: None, after: Some(Arc::new(port)) }],
        complete: true,
    }
}

/// Asks for `to` from a new thread in `pod`.
fn connect(pod: &Cgroup, to: SocketAddr) -> Result<(), ErrorKind> {
    let asked = || {
        pod.enter().unwrap();
        TcpStream::connect(to).map(drop).map_err(|error| error.kind())
    };
    std::thread::scope(|scope| scope.spawn(asked).join()).unwrap()
}

#[test]
fn sockets_of_a_pod_that_is_off_are_left_alone_and_its_neighbour_s_are_not() {
    let node = Cgroup::new("bypass-node").unwrap();
    let class = node.child("kubepods").unwrap().child("burstable").unwrap();
    let [on, off] = ["poda", "podb"].map(|name| class.child(name).unwrap());
    // Processes are in a container's group, not in the pod's.
    let [on, off] = [&on, &off].map(|pod| pod.child("container").unwrap());
    let here = netns::Namespace::within(&node, "bypass").unwrap();
    let files = BpfFs::new().unwrap();
    let place = Place { bpf_root: files.directory("weir").unwrap(), cgroup_root: node.path().to_owned() };
    here.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for (service, local) in [("10.96.0.10", "127.0.0.1"), ("fd00:10:96::10", "::1")] {
            let (service, local): (IpAddr, IpAddr) = (service.parse().unwrap(), local.parse().unwrap());
            let listener = TcpListener::bind((local, 0)).unwrap();
            let mut plane = Ebpf::open(place.clone(), true).unwrap();
            plane.reread().unwrap();
            plane.apply(&web(service, listener.local_addr().unwrap())).unwrap();
            let to = SocketAddr::new(service, 80);
            let ask = || [&on, &off].map(|pod| connect(pod, to));
            assert_eq!(ask(), [Ok(()), Ok(())]);
            runtime.block_on(async {
                let mut fixture = Fixture::start(&place);
                fixture.want(true, &["b"]);
                fixture.reach(1, 0).await;
                // There is no route to the Service's address here, so only translated sockets reach the backend.
                assert_eq!(ask(), [Ok(()), Err(ErrorKind::NetworkUnreachable)]);
                fixture.want(true, &[]);
                fixture.reach(0, 0).await;
                assert_eq!(ask(), [Ok(()), Ok(())]);
                fixture.end().await;
            });
            plane.remove().unwrap();
        }
    });
}

#[tokio::test]
async fn the_map_holds_the_settings_of_the_cluster() {
    let tree = Tree::new("cluster");
    let pins = Pins::new(16, &tree);
    tree.make("kubepods/besteffort");
    let options = ["--authorization-mode=AlwaysAllow", "--disable-admission-plugins=ServiceAccount"];
    let server = ApiServer::start(&options).await.unwrap();
    let settings = KubeSource {
        credentials: Credentials::Kubeconfig(server.kubeconfig("admin").unwrap()),
        servers: Vec::new(),
        node: "n1".to_owned(),
        versions: None,
    };
    let connection = Connection::open(settings).await.unwrap();
    let status = Arc::new(SourceStatus::default());
    let mut census =
        optout::start(connection, status, &pins.place.sockets(), &pins.place.cgroup_root).unwrap();

    let client = server.client().await.unwrap();
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let pod = json!({
        "metadata": {"name": "a"},
        "spec": {"nodeName": "n1", "containers": [{"name": "main", "image": "none"}]},
    });
    let pod = pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
    let namespaces: Api<Namespace> = Api::all(client);
    let label = |value| Patch::Merge(json!({"metadata": {"labels": {"weir.dev/socket-lb": value}}}));
    namespaces.patch("default", &PatchParams::default(), &label("off")).await.unwrap();
    reach(&mut census, "namespace", 0, 1).await;
    let id = tree.make(&format!("kubepods/besteffort/pod{}", pod.metadata.uid.unwrap()));
    reach(&mut census, "namespace", 1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([id]));
    pods.patch("a", &PatchParams::default(), &label("on")).await.unwrap();
    reach(&mut census, "pod", 0, 0).await;
    assert_eq!(pins.ids(), BTreeSet::new());
    pods.patch("a", &PatchParams::default(), &label("off")).await.unwrap();
    reach(&mut census, "pod", 1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([id]));
    pods.delete("a", &DeleteParams::default().grace_period(0)).await.unwrap();
    reach(&mut census, "pod", 0, 0).await;
    assert_eq!(pins.ids(), BTreeSet::new());
}
