//! Which cgroups the map of bypassed pods holds: with real cgroups, real maps, and once with a real API server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map, MapData};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use nix::mount::{MsFlags, umount};
use proxy_ebpf::Settings;
use serde_json::json;
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use weir::{
    dataplane::ebpf::{Bypass, BypassCensus},
    model::{Bypassed, BypassedPod, ObjectName, Reason},
    run::pods,
    source::{
        SourceStatus,
        kube::{Connection, Credentials, KubeSource},
    },
};
use weir_tests::apiserver::ApiServer;

const PATIENCE: Duration = Duration::from_secs(30);
const SETTINGS: Settings = Settings { host: 7, layout: 1, bypassed: 0, cgroup: 9 };

/// A part of the cgroup tree, as a node in a container has it; gone when this is dropped.
struct Tree(PathBuf);

impl Tree {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts.lines().find_map(|mount| {
            let mut fields = mount.split(' ').skip(1);
            let path = fields.next()?;
            (fields.next()? == "cgroup2").then_some(path)
        });
        let root = Path::new(root.expect("a cgroup v2 hierarchy is mounted"));
        let tree = Self(root.join(format!("weir-test-bypass-{name}-{}", std::process::id())));
        fs::create_dir(&tree.0).unwrap();
        tree
    }

    /// Makes a cgroup with its parents; answers its id.
    fn make(&self, path: &str) -> u64 {
        let path = self.0.join(path);
        fs::create_dir_all(&path).unwrap();
        fs::metadata(&path).unwrap().ino()
    }

    fn remove(&self, path: &str) {
        fs::remove_dir(self.0.join(path)).unwrap();
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // A second panic would hide the first.
        let removed = remove(&self.0);
        assert!(removed.is_ok() || std::thread::panicking(), "{} is left: {removed:?}", self.0.display());
    }
}

/// The files of a cgroup go with it and cannot be removed by themselves.
fn remove(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// A bpffs with the two maps, which outlive any one agent.
struct Pins(TempDir);

impl Pins {
    fn new(capacity: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        nix::mount::mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .unwrap();
        let pins = Self(directory);
        let map = HashMap::<MapData, u64, u32>::create(capacity, 0).unwrap();
        map.pin(pins.0.path().join("bypassed")).unwrap();
        let mut settings = Array::<MapData, Settings>::create(2, 0).unwrap();
        for element in [Settings::PLANE, Settings::PODS] {
            settings.set(element, SETTINGS, 0).unwrap();
        }
        settings.pin(pins.0.path().join("settings")).unwrap();
        pins
    }

    fn data(&self, name: &str) -> MapData {
        MapData::from_pin(self.0.path().join(name)).unwrap()
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
        let settings: Array<_, Settings> = Map::Array(self.data("settings")).try_into().unwrap();
        let bypassed = u32::try_from(ids.len()).unwrap();
        assert_eq!(settings.get(&Settings::PODS, 0).unwrap(), Settings { bypassed, ..SETTINGS });
        assert_eq!(settings.get(&Settings::PLANE, 0).unwrap(), SETTINGS);
        ids
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let unmounted = umount(self.0.path());
        assert!(unmounted.is_ok() || std::thread::panicking(), "{unmounted:?}");
    }
}

/// The agent's part at work.
struct Rig {
    wanted: watch::Sender<Arc<Bypassed>>,
    census: watch::Receiver<BypassCensus>,
    task: JoinHandle<()>,
}

impl Rig {
    fn start(pins: &Pins, tree: &Tree) -> Self {
        let bypass = Bypass::open(pins.0.path(), &tree.0).unwrap();
        let (wanted, receiver) = watch::channel(Arc::default());
        Self { wanted, census: bypass.census(), task: tokio::spawn(bypass.run(receiver)) }
    }

    fn want(&self, complete: bool, uids: &[&str]) {
        let pods = uids.iter().map(|uid| {
            let name = ObjectName::new("shop", &format!("of-{uid}"));
            (Arc::from(*uid), BypassedPod { name, reason: Reason::Pod })
        });
        self.wanted.send_replace(Arc::new(Bypassed { complete, pods: pods.collect() }));
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

async fn reach(
    census: &mut watch::Receiver<BypassCensus>,
    reason: &'static str,
    pods: usize,
    waiting: usize,
) {
    let pods = if pods == 0 { BTreeMap::new() } else { BTreeMap::from([(reason, pods)]) };
    let wanted = BypassCensus { pods, waiting };
    let reached = timeout(PATIENCE, census.wait_for(|census| *census == wanted)).await.is_ok();
    assert!(reached, "{wanted:?} is not reached: {:?}", *census.borrow());
}

#[tokio::test]
async fn ids_come_with_the_choice_and_go_with_it_under_either_driver() {
    let (tree, pins) = (Tree::new("come"), Pins::new(16));
    let systemd = tree.make("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_1.slice");
    let cgroupfs = tree.make("kubelet/kubepods/podb-2");
    tree.make("kubelet/kubepods/podc-3/container");
    let mut rig = Rig::start(&pins, &tree);
    rig.want(true, &["a-1", "b-2"]);
    rig.reach(2, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([systemd, cgroupfs]));
    rig.want(true, &["b-2"]);
    rig.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([cgroupfs]));
    rig.want(true, &[]);
    rig.reach(0, 0).await;
    assert_eq!(pins.ids(), BTreeSet::new());
    rig.end().await;
}

#[tokio::test]
async fn a_cgroup_that_appears_late_is_in_the_map_at_once_and_one_made_anew_too() {
    let (tree, pins) = (Tree::new("late"), Pins::new(16));
    tree.make("kubepods/burstable");
    let mut rig = Rig::start(&pins, &tree);
    rig.want(true, &["a"]);
    rig.reach(0, 1).await;
    assert_eq!(pins.ids(), BTreeSet::new());
    let made = Instant::now();
    let first = tree.make("kubepods/burstable/poda");
    rig.reach(1, 0).await;
    println!("in the map {:?} after the cgroup was made", made.elapsed());
    assert_eq!(pins.ids(), BTreeSet::from([first]));
    // Nothing is missing now, so only inotify can tell.
    tree.remove("kubepods/burstable/poda");
    rig.reach(0, 1).await;
    assert_eq!(pins.ids(), BTreeSet::new());
    let second = tree.make("kubepods/besteffort/poda");
    rig.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([second]));
    rig.end().await;
}

#[tokio::test]
async fn the_kubelet_s_directories_may_come_later_than_the_agent() {
    let (tree, pins) = (Tree::new("early"), Pins::new(16));
    let mut rig = Rig::start(&pins, &tree);
    rig.want(true, &["a"]);
    rig.reach(0, 1).await;
    let id = tree.make("kubepods.slice/kubepods-poda.slice");
    rig.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([id]));
    rig.end().await;
}

#[tokio::test]
async fn after_a_restart_nothing_goes_before_everything_is_known() {
    let (tree, pins) = (Tree::new("restart"), Pins::new(16));
    let [still, no_more] = ["a", "b"].map(|uid| tree.make(&format!("kubepods/pod{uid}")));
    let gone = u64::MAX;
    [still, no_more, gone].into_iter().for_each(|id| pins.put(id));
    let mut rig = Rig::start(&pins, &tree);
    // The count may have been lost; it is put right before anything is heard.
    assert_eq!(pins.ids(), BTreeSet::from([still, no_more, gone]));
    rig.want(false, &["a"]);
    rig.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([still, no_more, gone]));
    // What was seen in use by this run may go at any time.
    rig.want(false, &["a", "b"]);
    rig.reach(2, 0).await;
    rig.want(false, &["a"]);
    rig.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([still, gone]));
    rig.want(true, &["a"]);
    // Complete or not is no part of the census, so another pod shows that it was seen.
    let other = tree.make("kubepods/podc");
    rig.want(true, &["a", "c"]);
    rig.reach(2, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([still, other]));
    rig.end().await;
}

#[tokio::test]
async fn what_does_not_fit_waits_for_room() {
    let (tree, pins) = (Tree::new("full"), Pins::new(1));
    let [first, second] = ["a", "b"].map(|uid| tree.make(&format!("kubepods/pod{uid}")));
    let mut rig = Rig::start(&pins, &tree);
    rig.want(true, &["a"]);
    rig.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([first]));
    rig.want(true, &["a", "b"]);
    rig.reach(1, 1).await;
    rig.want(true, &["b"]);
    rig.reach(1, 0).await;
    assert_eq!(pins.ids(), BTreeSet::from([second]));
    rig.end().await;
}

#[tokio::test]
async fn what_is_written_in_the_cluster_is_what_the_map_holds() {
    let (tree, pins) = (Tree::new("cluster"), Pins::new(16));
    tree.make("kubepods/besteffort");
    let options = ["--authorization-mode=AlwaysAllow", "--disable-admission-plugins=ServiceAccount"];
    let server = ApiServer::start(&options).await.unwrap();
    let settings = KubeSource {
        credentials: Credentials::Kubeconfig(server.kubeconfig("admin").unwrap()),
        servers: Vec::new(),
        node: "n1".to_owned(),
    };
    let connection = Connection::open(settings).await.unwrap();
    let status = Arc::new(SourceStatus::default());
    let mut census = pods::start(connection, status, pins.0.path(), &tree.0).unwrap();

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
