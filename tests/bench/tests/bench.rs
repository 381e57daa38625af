//! The benchmark in its smallest form: that it measures, not what. Its samples are read back as every other use reads them.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use weir_bench::{
    Subject,
    paths::{Load, Route, Series, Traffic, Way},
    programming::{Act, Kind, Run},
    report::Report,
};
use weir_tests::assets;

/// Runs the benchmark with these arguments. Returns its output.
fn bench(arguments: &str, directory: &Path) -> Result<String> {
    let bench = Command::new(env!("CARGO_BIN_EXE_weir-bench"))
        .current_dir(directory)
        .args(arguments.split_whitespace())
        .env("WEIR_BIN", assets::weir()?)
        .output()?;
    ensure!(bench.status.success(), "{}", String::from_utf8_lossy(&bench.stderr));
    Ok(String::from_utf8(bench.stdout)?)
}

/// Its output, and the samples that it wrote.
fn measured(arguments: &str, directory: &Path) -> Result<(String, Report)> {
    let table = bench(arguments, directory)?;
    Ok((table, Report::load(&directory.join("bench.json"))?))
}

#[test]
fn programming_is_measured_in_all_its_phases() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let subjects = [Subject::WeirEbpf, Subject::WeirNftables];
    let (table, report) = measured(
        "--only programming --subject weir-ebpf,weir-nftables --services 10 --wide 150 --rounds 1 --changes 1 \
         --busy-changes 2 --churn 50",
        directory.path(),
    )?;
    assert!(subjects.iter().all(|subject| table.contains(subject.name())), "{table}");
    assert!(report.versions["weir eBPF"].starts_with("weir "), "{:?}", report.versions);
    let workloads: Vec<_> =
        report.programming.iter().map(|run| (run.workload.to_string(), run.subject)).collect();
    let expected = ["1x150", "10x5"].map(|workload| subjects.map(|subject| (workload.to_owned(), subject)));
    assert_eq!(workloads, expected.concat());
    report.programming.iter().try_for_each(was_programmed)
}

fn was_programmed(run: &Run) -> Result<()> {
    assert_eq!(run.unfinished, None, "{run:?}");
    let kinds: Vec<_> = run.idle.iter().map(|change| change.kind).collect();
    assert_eq!(kinds, Kind::ALL);
    // weir programs every one of them, and counts what it does.
    let counted = |value: Option<f64>| value.is_some_and(|value| value > 0.0);
    let all_count = run.idle.iter().all(|change| counted(change.sync_seconds) && counted(change.cpu_seconds));
    assert!(all_count, "{:?}", run.idle);
    let busy = run.busy.as_ref().context("not measured among others")?;
    assert!(busy.changes.len() == 6 && busy.writes > 0 && busy.traffic.received > 0, "{busy:?}");
    let restart = run.restart.as_ref().context("not restarted")?;
    assert!(restart.connects > 0 && restart.traffic.received > 0, "{restart:?}");
    assert_eq!(restart.failed, 0, "connections to a Service of before failed: {restart:?}");
    let kernel = run.kernel.context("no kernel memory")?;
    assert_eq!(kernel.maps > 0, run.subject == Subject::WeirEbpf, "{kernel:?}");
    Ok(())
}

/// The same binary by another path is another subject.
#[test]
fn another_build_recovers_from_hostile_acts_beside_the_one_under_test() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let other = directory.path().join("before");
    std::os::unix::fs::symlink(assets::weir()?, &other)?;
    let (table, report) = measured(
        &format!(
            "--only hostile --hostile-services 20 --rounds 1 --bound 60 --short-acts --subject \
             weir-ebpf,weir-ebpf@{0},weir-nftables@{0}",
            other.display()
        ),
        directory.path(),
    )?;
    let names = [
        "weir eBPF".to_owned(),
        format!("weir eBPF @ {}", other.display()),
        format!("weir nftables @ {}", other.display()),
    ];
    assert!(names.iter().all(|name| report.versions[name].starts_with("weir ")), "{:?}", report.versions);
    let acts = Act::ALL.into_iter().filter(|act| !act.is_long());
    for (act, name) in acts.flat_map(|act| names.iter().map(move |name| (act, name))) {
        let of: Vec<_> = report
            .recoveries
            .iter()
            .filter(|one| (one.act, one.subject.name()) == (act, name.as_str()))
            .collect();
        assert!(matches!(of[..], [one] if one.seconds.is_some()), "{act:?}, {name}: {of:?}");
        assert!(table.contains(act.name()), "{table}");
    }
    Ok(())
}

#[test]
fn names_are_measured_beside_coredns() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let table = bench("--only dns --rounds 1 --changes 1 --path-slot 4", directory.path())?;
    for word in ["weir", "CoreDNS", "ratio"] {
        assert!(table.contains(word), "{table}");
    }
    Ok(())
}

#[test]
fn traffic_of_every_kind_is_measured_on_every_route_beside_nodes_without_a_proxy() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (table, report) = measured(
        "--only paths --only hooks --subject weir-ebpf,weir-nftables --path-services 3,10 --path-all 3 --path-rounds 2 \
         --path-slot 4",
        directory.path(),
    )?;
    assert!(table.contains("part of straight") && table.contains("connect4"), "{table}");
    assert_eq!(report.paths.iter().find_map(|series| series.failed.clone()), None);
    for route in Route::ALL {
        let of = |services, subject, way| {
            let found = |series: &&Series| {
                (series.services, series.route, series.subject, series.way) == (services, route, subject, way)
            };
            report.paths.iter().filter(found).count()
        };
        // Unconnected UDP, both families, from one place only.
        let loads = if route == Route::PodSameNode { 12 } else { 10 };
        assert_eq!(of(3, None, Way::Straight), loads, "{route:?}");
        for subject in [Subject::WeirEbpf, Subject::WeirNftables] {
            assert_eq!(of(3, Some(subject), Way::Service), loads, "{route:?}");
        }
    }
    let with_more = report.paths.iter().filter(|series| series.services == 10);
    assert!(with_more.clone().all(|series| series.load.traffic == Traffic::Connect) && with_more.count() > 0);
    for program in ["connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4"] {
        let mut costs = report.hooks.iter().filter(|cost| cost.program == program);
        assert!(costs.any(|cost| cost.nanoseconds.iter().all(|cost| *cost > 0.0)), "{program}");
    }
    renders(directory.path(), &report)
}

/// Page and plots are made from the samples alone.
fn renders(directory: &Path, report: &Report) -> Result<()> {
    bench("--render bench.json", directory)?;
    let date = report.began.split(' ').next().context("no date")?;
    let run = directory.join("docs/benchmarks").join(date);
    let page = std::fs::read_to_string(run.join("README.md"))?;
    assert!(page.contains("outside to NodePort, remote") && page.contains("weir nftables"), "{page}");
    assert!(page.contains("## Names\n\nNot run."), "{page}");
    let plots: Vec<_> = page.split("](paths-").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    for plot in &plots {
        let plot = std::fs::read_to_string(run.join(format!("paths-{plot}")))?;
        assert!(plot.starts_with("<svg") && plot.contains("weir nftables"), "{plot}");
    }
    assert_eq!(plots, ["connect.svg", "request.svg"]);
    assert!(run.join("samples.json").is_file());
    let index = std::fs::read_to_string(directory.join("docs/benchmarks.md"))?;
    assert!(
        index.contains(&format!("(benchmarks/{date}/README.md): weir eBPF, weir nftables; Linux")),
        "{index}"
    );
    Ok(())
}

#[test]
fn kube_proxy_is_fed_by_the_same_api_server() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (table, report) = measured(
        "--only programming --only nodeport-remote/connect/IPv4 --only pod-same-node/request/IPv6 --services 10 --wide 0 \
         --rounds 1 --changes 1 --busy-changes 0 --path-services 10 --path-rounds 2 --path-slot 4 \
         --subject kube-proxy-nftables,kube-proxy-iptables,kube-proxy-ipvs",
        directory.path(),
    )?;
    let absent = report.absent.contains_key(Subject::KubeProxyIpvs.name());
    assert_eq!(report.programming.len(), if absent { 2 } else { 3 });
    assert_eq!(table.contains("kube-proxy ipvs: not run"), absent, "{table}");
    for run in &report.programming {
        assert!(run.unfinished.is_none() && run.start.is_some() && run.restart.is_some(), "{run:?}");
    }
    let connect = Load { traffic: Traffic::Connect, clients: 1, v6: false };
    let request = Load { traffic: Traffic::Request, clients: 1, v6: true };
    for (route, load) in [(Route::NodePortRemote, connect), (Route::PodSameNode, request)] {
        let served = report.paths.iter().filter(|series| {
            (series.route, series.load, series.way) == (route, load, Way::Service) && series.rates.len() == 2
        });
        assert_eq!(served.count(), report.programming.len(), "{:?}", report.paths);
    }
    Ok(())
}

#[test]
fn maps_are_measured_without_an_agent() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (table, report) =
        measured("--only maps --map-services 300 --rounds 1 --changes 1", directory.path())?;
    assert!(table.contains("BYTES A SERVICE"), "{table}");
    assert_eq!(report.maps.len(), 3, "TCP, with affinity, UDP");
    for run in &report.maps {
        assert!(run.filled_seconds > 0.0 && run.adopted_seconds > 0.0, "{run:?}");
        assert!(!run.changed_seconds.is_empty() && !run.came_seconds.is_empty(), "{run:?}");
        let of = |name| run.maps.iter().find(|map| map.name == name).map(|map| (map.room, map.bytes));
        let (room, bytes) = of("slots").unwrap_or_default();
        assert!(room >= 300 * run.endpoints && bytes >= 20 * u64::from(room), "{run:?}");
    }
    Ok(())
}

/// The pages in the repository match their samples: each is written again and compared.
#[test]
fn each_page_matches_its_samples() -> Result<()> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let directory = tempfile::tempdir()?;
    for run in std::fs::read_dir(docs.join("benchmarks"))? {
        let run = run?.path();
        let again = directory.path().join("docs/benchmarks").join(run.file_name().context("no name")?);
        std::fs::create_dir_all(&again)?;
        if run.join("notes.md").is_file() {
            std::fs::copy(run.join("notes.md"), again.join("notes.md"))?;
        }
        bench(&format!("--render {}", run.join("samples.json").display()), directory.path())?;
        for file in ["README.md", "paths-connect.svg"] {
            let [ours, theirs] = [&run, &again].map(|run| std::fs::read_to_string(run.join(file)));
            ensure!(
                ours? == theirs?,
                "{} does not match its samples: `cargo xtask bench --render {}/samples.json` writes it",
                run.join(file).display(),
                run.display()
            );
        }
    }
    Ok(())
}
