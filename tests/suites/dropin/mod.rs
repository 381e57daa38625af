//! weir in place of kube-proxy: the same flags, the same file, the same answers over HTTP (P1 to P8, H1 to H6), compared between
//! both programs with one configuration.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Taint;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use weir::model::Object;
use weir_tests::{
    assets,
    control_plane::ControlPlane,
    netns::Namespace,
    node::node_name,
    objects::{Addresses, Shape, node, pod, service},
    process::Process,
    wait::{await_that, await_within},
};

mod values;

const HEALTHZ: u16 = 10256;
const ADMIN: u16 = 10249;
const SHOP: Addresses = Addresses::new(7).named("shop");
const CHECK: u16 = 32_007;
const V4: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// An API server wants an address that others could reach.
const API: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

fn machine(label: &str) -> Result<Namespace> {
    let namespace = Namespace::new(label)?;
    namespace.ip(&[format!("addr add {API}/32 dev lo")])?;
    Ok(namespace)
}

#[derive(Clone, Debug, PartialEq)]
struct Answer {
    code: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }
}

/// `GET path`, in a version of HTTP without chunks.
fn get(at: SocketAddr, path: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {at}\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no end of headers")?;
    let mut lines = head.split("\r\n");
    let code = lines.next().and_then(|line| line.split(' ').nth(1)).context("no status line")?.parse()?;
    let header = |line: &str| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_ascii_lowercase(), value.to_owned()))
    };
    Ok(Answer { code, headers: lines.filter_map(header).collect(), body: body.to_owned() })
}

/// A namespace with an API server in it, which agents are started in one after the other.
struct Fixture<'a> {
    namespace: &'a Namespace,
    plane: &'a ControlPlane<'a>,
    directory: tempfile::TempDir,
}

/// The configuration of both programs, with the same meaning for both.
fn configuration(kubeconfig: &Path) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": kubeconfig, "qps": 100, "burst": 100},
        "clusterCIDR": "10.244.0.0/16",
        // So that health checks answer on every address (H3).
        "nodePortAddresses": ["0.0.0.0/0", "::/0"],
        "nftables": {"minSyncPeriod": "10ms", "syncPeriod": "90s", "masqueradeBit": 0},
        // A network namespace other than the first may not change these.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "oomScoreAdj": 17,
    })
}

impl<'a> Fixture<'a> {
    fn new(namespace: &'a Namespace, plane: &'a ControlPlane<'a>) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-dropin-").tempdir()?;
        let fixture = Self { namespace, plane, directory };
        fs::write(fixture.path("config.conf"), configuration(&plane.kubeconfig()?).to_string())?;
        Ok(fixture)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn config(&self) -> String {
        format!("--config={}", self.path("config.conf").display())
    }

    /// kube-proxy's command line as kubeadm has it, on a program by any name.
    fn start(&self, program: &Path) -> Result<Process> {
        let name = format!("--hostname-override={}", node_name(1));
        start(self.namespace, program, &[self.config(), name], &self.path("agent.log"))
    }

    /// weir under kube-proxy's name, as its image has it.
    fn weir_as_kube_proxy(&self) -> Result<PathBuf> {
        let link = self.path("kube-proxy");
        std::os::unix::fs::symlink(assets::weir()?, &link)?;
        Ok(link)
    }

    fn get(&self, port: u16, path: &str) -> Result<Answer> {
        self.namespace.run(|| get((V4, port).into(), path))
    }

    fn await_code(&self, port: u16, path: &str, code: u16) {
        await_within(Duration::from_secs(120), &format!("{port}{path} answers {code}"), || {
            self.get(port, path).is_ok_and(|answer| answer.code == code)
        });
    }
}

fn start(namespace: &Namespace, program: &Path, words: &[String], log: &Path) -> Result<Process> {
    namespace.launch(program, log, |command| {
        command.args(words);
    })
}

fn shop(local: bool) -> Vec<Object> {
    let endpoints = if local { vec![pod(1, 1), pod(1, 2), pod(2, 1)] } else { vec![pod(2, 1)] };
    let shape: Shape = service(endpoints).everywhere().external_local();
    shape.objects(SHOP)
}

fn tainted(key: &str) -> Object {
    let mut object = node(1);
    if let Object::Node(node) = &mut object {
        let taint = Taint { key: key.to_owned(), effect: "NoSchedule".to_owned(), ..Taint::default() };
        node.spec.get_or_insert_default().taints = Some(vec![taint]);
    }
    object
}

/// Everything that can be asked of an agent, by a name for the question.
type Seen = BTreeMap<&'static str, Answer>;

fn look(fixture: &Fixture<'_>, program: &Path) -> Result<Seen> {
    fixture.plane.apply(&[&node(1)])?;
    fixture.plane.apply(&shop(true).iter().collect::<Vec<_>>())?;
    let agent = fixture.start(program)?;
    fixture.await_code(HEALTHZ, "/healthz", 200);
    fixture.await_code(CHECK, "/", 200);
    let mut seen = Seen::new();
    for (name, port, path) in [
        ("healthz", HEALTHZ, "/healthz"),
        ("livez", HEALTHZ, "/livez"),
        ("nothing beside healthz", HEALTHZ, "/nothing"),
        ("healthz beside metrics", ADMIN, "/healthz"),
        ("proxyMode", ADMIN, "/proxyMode"),
        ("configz", ADMIN, "/configz"),
        ("flagz", ADMIN, "/flagz"),
        ("statusz", ADMIN, "/statusz"),
        ("metrics", ADMIN, "/metrics"),
        // After its /healthz, which is what it counts.
        ("slis", ADMIN, "/metrics/slis"),
        ("pprof", ADMIN, "/debug/pprof/"),
        ("nothing beside metrics", ADMIN, "/nothing"),
        ("check", CHECK, "/"),
        ("check anywhere", CHECK, "/some/path"),
    ] {
        seen.insert(name, fixture.get(port, path)?);
    }
    let v6 = (Ipv6Addr::LOCALHOST, CHECK).into();
    await_that("the health check answers on IPv6", || fixture.namespace.run(|| get(v6, "/").is_ok()));
    seen.insert("check by IPv6", fixture.namespace.run(|| get(v6, "/"))?);
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", agent.id()))?;
    assert_eq!(score.trim(), "17");

    fixture.plane.apply(&shop(false).iter().collect::<Vec<_>>())?;
    fixture.await_code(CHECK, "/", 503);
    seen.insert("check without local endpoints", fixture.get(CHECK, "/")?);
    fixture.plane.apply(&[&tainted("ToBeDeletedByClusterAutoscaler")])?;
    fixture.await_code(HEALTHZ, "/healthz", 503);
    seen.insert("healthz of a node that goes", fixture.get(HEALTHZ, "/healthz")?);
    seen.insert("livez of a node that goes", fixture.get(HEALTHZ, "/livez")?);
    fixture.plane.apply(&[&tainted("other")])?;
    fixture.await_code(HEALTHZ, "/healthz", 200);
    assert!(!agent.log().contains("cannot serve"), "{}", agent.log());
    drop(agent);
    fixture.namespace.stdout("nft", &["flush", "ruleset"])?;
    Ok(seen)
}

/// The names of all metrics of a page that begin so.
fn metrics(page: &str, start: &str) -> BTreeSet<String> {
    let name = |line: &str| Some(line.strip_prefix("# TYPE ")?.to_owned());
    page.lines().filter_map(name).filter(|name| name.starts_with(start)).collect()
}

/// The samples of a page of metrics, without comments, and without the value that differs in every process.
fn samples(page: &str) -> BTreeSet<&str> {
    let start = "process_start_time_seconds";
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| if line.starts_with(start) { start } else { line }).collect()
}

/// The fields of a JSON object, of objects in it too, without times.
fn fields(value: &Value) -> BTreeMap<String, String> {
    fn walk(path: &str, value: &Value, into: &mut BTreeMap<String, String>) {
        match value {
            Value::Object(fields) => {
                fields.iter().for_each(|(name, value)| walk(&format!("{path}/{name}"), value, into));
            }
            Value::String(_) if path.ends_with("lastUpdated") || path.ends_with("currentTime") => {
                into.insert(path.to_owned(), "a time".to_owned());
            }
            value => drop(into.insert(path.to_owned(), value.to_string())),
        }
    }
    let mut all = BTreeMap::new();
    walk("", value, &mut all);
    all
}

#[test]
fn p1_to_p7_and_h1_to_h6_are_answered_as_kube_proxy_answers() -> Result<()> {
    let namespace = machine("dropin")?;
    let plane = ControlPlane::start(&namespace, API.into())?;
    let fixture = Fixture::new(&namespace, &plane)?;
    let theirs = look(&fixture, &assets::kubernetes("kube-proxy")?)?;
    let ours = look(&fixture, &fixture.weir_as_kube_proxy()?)?;

    let mut differences = Vec::new();
    for (name, their) in &theirs {
        let our = &ours[name];
        let mut compare = |what: &str, our: String, their: String| {
            if our != their {
                differences.push(format!("{name}: {what} is {our}, not {their}"));
            }
        };
        compare("code", our.code.to_string(), their.code.to_string());
        for header in ["content-type", "x-content-type-options", "x-load-balancing-endpoint-weight"] {
            let of = |answer: &Answer| format!("{:?}", answer.headers.get(header));
            // Of errors only the code counts, and metrics come in whatever form one asks for.
            if their.code != 404 && !["metrics", "slis"].contains(name) {
                compare(header, of(our), of(their));
            }
        }
        let is_json = their.headers.get("content-type").is_some_and(|kind| kind == "application/json");
        if is_json && *name != "configz" {
            compare("body", format!("{:?}", fields(&our.json())), format!("{:?}", fields(&their.json())));
        }
        if ["proxyMode", "healthz beside metrics"].contains(name) || name.starts_with("check") {
            compare("text", our.body.clone(), their.body.clone());
        }
    }
    assert_eq!(differences, [""; 0]);
    assert_eq!(theirs["check without local endpoints"].code, 503);

    let (our, their) =
        (metrics(&ours["metrics"].body, "kubeproxy_"), metrics(&theirs["metrics"].body, "kubeproxy_"));
    assert!(!their.is_empty(), "{}", theirs["metrics"].body);
    assert_eq!(their.difference(&our).collect::<Vec<_>>(), [""; 0], "metrics that weir does not have");
    for name in ["rest_client_requests_total counter", "rest_client_request_duration_seconds histogram"] {
        assert!(metrics(&theirs["metrics"].body, "rest_client_").contains(name), "{name}");
        assert!(metrics(&ours["metrics"].body, "rest_client_").contains(name), "{name}");
    }

    assert_eq!(samples(&ours["slis"].body), samples(&theirs["slis"].body), "{}", theirs["slis"].body);
    assert!(samples(&theirs["slis"].body).len() > 1, "{}", theirs["slis"].body);

    let document = |seen: &Seen| fields(&seen["configz"].json());
    let (our, their) = (document(&ours), document(&theirs));
    // kube-proxy fills in only the block of its mode.
    let elsewhere = |field: &str| field.contains("/iptables/") || field.contains("/ipvs/");
    for (field, value) in &their {
        assert!(
            elsewhere(field) || our.get(field) == Some(value),
            "{field}: {:?}, not {value}",
            our.get(field)
        );
    }
    assert_eq!(our.keys().collect::<Vec<_>>(), their.keys().collect::<Vec<_>>());
    Ok(())
}

/// The long names of all flags that a program's help names.
fn flags(help: &str) -> BTreeSet<String> {
    let flag = |line: &str| {
        let (_, rest) = line.trim_start().split_once("--").filter(|(before, _)| before.len() < 6)?;
        let name: String =
            rest.chars().take_while(|letter| letter.is_ascii_alphanumeric() || *letter == '-').collect();
        (!name.is_empty()).then_some(name)
    };
    help.lines().filter(|line| line.starts_with("  ")).filter_map(flag).collect()
}

#[test]
fn every_flag_of_kube_proxy_is_taken() -> Result<()> {
    let mut theirs = BTreeSet::new();
    for kube_proxy in [assets::kubernetes("kube-proxy")?, assets::next_kube_proxy()?] {
        let help = Command::new(kube_proxy).arg("--help").output()?;
        let own = flags(&String::from_utf8(help.stdout)?);
        assert!(own.contains("config") && own.len() > 50, "{own:?}");
        theirs.extend(own);
    }
    for flag in &theirs {
        // Whatever is wrong with the value, the flag is known.
        let output =
            Command::new(assets::weir()?).args(["run", &format!("--{flag}=x"), "--no-such-flag"]).output()?;
        let complaint = String::from_utf8(output.stderr)?;
        assert!(!complaint.contains(&format!("unexpected argument '--{flag}")), "{complaint}");
    }
    Ok(())
}

#[test]
fn write_config_to_writes_the_file_that_kube_proxy_writes() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut written = Vec::new();
    for (program, first) in [(assets::kubernetes("kube-proxy")?, None), (assets::weir()?, Some("run"))] {
        let path = directory.path().join("written");
        let mut command = Command::new(program);
        command.args(first).args([
            "--proxy-mode=nftables",
            "--cluster-cidr=10.0.0.0/8",
            "--iptables-sync-period=90s",
        ]);
        let output = command.arg(format!("--write-config-to={}", path.display())).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let document: Value = serde_yaml_ng::from_str(&fs::read_to_string(&path)?)?;
        let mut fields = fields(&document);
        fields.retain(|field, _| !field.starts_with("/iptables/") && !field.starts_with("/ipvs/"));
        written.push(fields);
    }
    assert_eq!(written[1], written[0]);
    Ok(())
}

/// Connections and rules outlast it, and so does the process: it needs no restart from outside.
#[test]
fn another_configuration_starts_the_agent_anew_in_its_place_and_a_bad_one_does_not() -> Result<()> {
    let namespace = machine("reload")?;
    let plane = ControlPlane::start(&namespace, API.into())?;
    plane.apply(&[&node(1)])?;
    let fixture = Fixture::new(&namespace, &plane)?;
    let agent = fixture.start(&fixture.weir_as_kube_proxy()?)?;
    fixture.await_code(HEALTHZ, "/healthz", 200);
    let configured = |field: &str| -> Value {
        let answer = fixture.get(ADMIN, "/configz").map(|answer| answer.json()).unwrap_or_default();
        answer.pointer(&format!("/kubeproxy.config.k8s.io/{field}")).cloned().unwrap_or_default()
    };
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", agent.id())).map(Iterator::count);
    assert_eq!(configured("clusterCIDR"), json!("10.244.0.0/16"));
    let chains = || {
        let listed = namespace.stdout("nft", &["-a", "list", "ruleset"])?;
        let chains = listed.lines().filter(|line| line.contains("chain ") && line.contains("# handle"));
        anyhow::Ok(chains.map(str::to_owned).collect::<Vec<_>>())
    };
    let chains_before = chains()?;
    assert!(!chains_before.is_empty());

    let mut counts = Vec::new();
    for cidr in ["10.0.0.0/9", "10.0.0.0/10", "10.0.0.0/11"] {
        let mut next = configuration(&plane.kubeconfig()?);
        next["clusterCIDR"] = cidr.into();
        // As a ConfigMap changes: another file under the same name.
        fs::write(fixture.path("draft"), next.to_string())?;
        fs::rename(fixture.path("draft"), fixture.path("config.conf"))?;
        await_that("the new configuration is in force", || configured("clusterCIDR") == cidr);
        fixture.await_code(HEALTHZ, "/healthz", 200);
        counts.push(descriptors()?);
    }
    assert!(counts[2] <= counts[0] + 3, "descriptors are left open: {counts:?}");
    assert_eq!(chains()?, chains_before, "chains were adopted, not made again");
    assert_eq!(fs::read_to_string(format!("/proc/{}/comm", agent.id()))?.trim(), "weir");

    fs::write(fixture.path("config.conf"), "kind: KubeProxyConfiguration\nmode: [")?;
    await_that("the bad file is told of", || agent.log().contains("is invalid; the old one stays in force"));
    fixture.await_code(HEALTHZ, "/healthz", 200);
    assert_eq!(configured("clusterCIDR"), "10.0.0.0/11");
    Ok(())
}

/// A pod keeps the rights and the mounts that it was made with, even when its configuration changes.
#[test]
fn a_mode_that_the_agent_cannot_have_leaves_it_serving_as_before() -> Result<()> {
    let namespace = Namespace::new("impossible")?;
    let directory = tempfile::tempdir()?;
    let (config, manifests) = (directory.path().join("config.conf"), directory.path().join("manifests"));
    fs::create_dir(&manifests)?;
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    fs::write(&config, format!("{head}mode: nftables\n"))?;
    let words = [
        "run".to_owned(),
        format!("--config={}", config.display()),
        format!("--source=manifests:{}", manifests.display()),
        // On no bpffs, as in a pod that was made for nftables alone.
        format!("--bpf-root={}", directory.path().join("bpf").display()),
    ];
    let mut agent = start(&namespace, &assets::weir()?, &words, &directory.path().join("log"))?;
    let mode = || namespace.run(|| get((V4, ADMIN).into(), "/proxyMode")).map(|answer| answer.body).ok();
    await_that("the agent serves", || mode().as_deref() == Some("nftables"));
    fs::write(&config, format!("{head}mode: ebpf\n"))?;
    await_that("the file is judged", || agent.log().contains("an agent could not start with it here"));
    assert!(agent.log().contains("bpffs"), "{}", agent.log());
    assert_eq!((mode().as_deref(), agent.status()?), (Some("nftables"), None));
    // A file that can be in force here is taken, also after that.
    fs::write(&config, format!("{head}mode: nftables\nclusterCIDR: 10.0.0.0/9\n"))?;
    let configured = || namespace.run(|| get((V4, ADMIN).into(), "/configz")).map(|answer| answer.body);
    await_that("the next file is in force", || configured().is_ok_and(|text| text.contains("10.0.0.0/9")));
    Ok(())
}

/// As `Type=notify` and `WatchdogSec=` have it.
#[test]
fn systemd_gets_ready_watchdog_and_stopping() -> Result<()> {
    let namespace = Namespace::new("notified")?;
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    let socket = UnixDatagram::bind(at("notify"))?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let next = || -> Result<String> {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).context("systemd hears nothing")?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    };
    let until = |wanted: &str| -> Result<Vec<String>> {
        let mut before = Vec::new();
        loop {
            match next()? {
                news if news.lines().any(|line| line == wanted) => return Ok(before),
                news => before.push(news),
            }
        }
    };
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n";
    fs::write(at("config.conf"), head)?;
    let agent = namespace.launch(&assets::weir()?, &at("log"), |command| {
        command.arg("run").arg(format!("--config={}", at("config.conf").display()));
        command.arg(format!("--source=manifests:{}", at("manifests").display()));
        command.env("NOTIFY_SOCKET", at("notify")).env("WATCHDOG_USEC", "200000").env_remove("WATCHDOG_PID");
    })?;

    // Nothing is known of Services while there is no directory to read.
    await_that("the directory is missed", || agent.log().contains("cannot read the directory of manifests"));
    for _ in 0..3 {
        assert_eq!(next()?, "WATCHDOG=1\n");
    }
    fs::create_dir(at("manifests"))?;
    until("READY=1")?;
    until("WATCHDOG=1")?;
    // The same process once more, which systemd takes for the one that it was.
    fs::write(at("config.conf"), format!("{head}clusterCIDR: 10.0.0.0/9\n"))?;
    until("READY=1")?;
    until("WATCHDOG=1")?;
    agent.signal(Signal::SIGTERM)?;
    let before = until("STOPPING=1")?;
    assert!(before.iter().all(|news| news == "WATCHDOG=1\n"), "{before:?}");
    Ok(())
}

#[test]
fn sighup_takes_the_log_settings_from_the_file() -> Result<()> {
    let namespace = Namespace::new("hangup")?;
    let directory = tempfile::tempdir()?;
    let (config, manifests) = (directory.path().join("config.conf"), directory.path().join("manifests"));
    fs::create_dir(&manifests)?;
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n";
    fs::write(&config, head)?;
    let words = [
        "run".to_owned(),
        format!("--config={}", config.display()),
        format!("--source=manifests:{}", manifests.display()),
    ];
    let agent = start(&namespace, &assets::weir()?, &words, &directory.path().join("log"))?;
    await_that("the agent has started", || agent.log().contains("in force"));
    fs::write(&config, format!("{head}logging: {{format: json, verbosity: 4}}\n"))?;
    agent.signal(Signal::SIGHUP)?;
    // Whether the signal or the look at the file is first: what is logged next is JSON.
    await_that("a line is JSON", || {
        agent
            .log()
            .lines()
            .any(|line| serde_json::from_str::<Value>(line).is_ok_and(|line| line["level"] == "INFO"))
    });
    agent.signal(Signal::SIGTERM)?;
    await_that("SIGTERM is heard", || agent.log().contains("what is programmed stays in the kernel"));
    assert!(
        namespace.stdout("nft", &["list", "tables"])?.contains("weir"),
        "SIGTERM leaves the kernel's state"
    );
    Ok(())
}

/// Each complaint is one line that names the thing and what to do; the exit code of a wrong word or field is 2.
#[test]
fn a_setting_that_cannot_work_is_reported_in_one_line() -> Result<()> {
    let namespace = Namespace::new("complaints")?;
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.conf");
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    fs::write(&config, format!("{head}iptables: {{masqueradeBit: 40}}\n"))?;
    let (config, empty) = (config.display().to_string(), directory.path().display().to_string());
    let weir = assets::weir()?.display().to_string();
    let as_nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"];
    for (words, code, expected) in [
        (vec![&*weir, "run", "--no-such-flag"], 2, "unexpected argument '--no-such-flag' found"),
        (vec![&weir, "run", "--proxy-mode=userspace"], 2, "`userspace` is not one of auto, ebpf, nftables"),
        (vec![&weir, "run", "--config=/nowhere"], 2, "cannot read the configuration file `/nowhere`"),
        (vec![&weir, "run", "--config", &config], 2, "iptables.masqueradeBit: 40 is not a bit from 0 to 31"),
        (
            vec![&weir, "run", "--proxy-mode=nftables"],
            1,
            "no in-cluster credentials (outside a pod, give a kubeconfig",
        ),
        (
            vec![&weir, "run", "--proxy-mode=nftables", "--kubeconfig=/nowhere"],
            1,
            "cannot read kubeconfig `/nowhere`",
        ),
        (
            [&["setpriv"], &as_nobody[..], &[&*weir, "run", "--proxy-mode=nftables"]].concat(),
            1,
            "needs nf_tables and the capability NET_ADMIN",
        ),
        (vec![&weir, "run", "--proxy-mode=ebpf", "--bpf-root", &empty], 1, "bpffs at "),
        (vec![&weir, "run", "--proxy-mode=ebpf", "--cgroup-root", &empty], 1, "cgroup v2 at "),
    ] {
        let line = words.join(" ");
        let output = namespace.output(words[0], &words[1..])?;
        let complaint = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(code), "{line}: {complaint}");
        let named = complaint.lines().filter(|line| line.contains(expected)).count();
        assert_eq!(named, 1, "{line}: {complaint}");
    }
    Ok(())
}

/// Sysctls outlive the agent, so that one that can do nothing for Services must not leave any.
#[test]
fn an_agent_without_usable_credentials_leaves_the_machine_as_it_is() -> Result<()> {
    const ESTABLISHED: &str = "net/netfilter/nf_conntrack_tcp_timeout_established";
    let namespace = machine("untouched")?;
    let directory = tempfile::tempdir()?;
    let malformed = directory.path().join("kubeconfig");
    fs::write(&malformed, "apiVersion: v1\nkind: Config\ncurrent-context: none\n")?;
    namespace.sysctl(ESTABLISHED, "4321")?;
    let weir = assets::weir()?.display().to_string();
    let run = |kubeconfig: &str| {
        let kubeconfig = format!("--kubeconfig={kubeconfig}");
        let timeout = "--conntrack-tcp-timeout-established=1234s";
        namespace.output(&weir, &["run", "--proxy-mode=nftables", timeout, &kubeconfig])
    };
    let established = || namespace.stdout("cat", &[&format!("/proc/sys/{ESTABLISHED}")]);
    for kubeconfig in ["/nonexistent", &malformed.display().to_string()] {
        let output = run(kubeconfig)?;
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(established()?.trim(), "4321", "{kubeconfig}");
    }
    // With good credentials the same settings are set.
    let plane = ControlPlane::start(&namespace, API.into())?;
    let words = [
        "run".to_owned(),
        "--proxy-mode=nftables".to_owned(),
        "--conntrack-tcp-timeout-established=1234s".to_owned(),
        format!("--kubeconfig={}", plane.kubeconfig()?.display()),
    ];
    let _agent = start(&namespace, &assets::weir()?, &words, &directory.path().join("log"))?;
    await_that("the setting is set", || established().is_ok_and(|now| now.trim() == "1234"));
    Ok(())
}

/// An agent that cannot reach its API server lives, and is not ready for traffic.
#[test]
fn healthz_is_503_until_services_are_programmed() -> Result<()> {
    let namespace = machine("alone")?;
    let mut plane = ControlPlane::start(&namespace, API.into())?;
    plane.apply(&[&node(1)])?;
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.conf");
    fs::write(&config, configuration(&plane.kubeconfig()?).to_string())?;
    plane.stop();
    let words = [
        "run".to_owned(),
        format!("--config={}", config.display()),
        format!("--hostname-override={}", node_name(1)),
    ];
    let agent = start(&namespace, &assets::weir()?, &words, &directory.path().join("log"))?;
    let ask = |path: &str| namespace.run(|| get((V4, HEALTHZ).into(), path)).map(|answer| answer.code).ok();
    await_that("the agent has looked for the API server in vain", || {
        agent.log().contains("the API server does not answer")
    });
    await_that("it serves", || ask("/livez").is_some());
    assert_eq!((ask("/livez"), ask("/healthz")), (Some(200), Some(503)));
    plane.restart()?;
    await_that("the node is ready", || ask("/healthz") == Some(200));
    Ok(())
}
