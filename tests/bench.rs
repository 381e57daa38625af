//! The benchmark in its smallest form: that it measures, not what.

use std::process::Command;

use anyhow::{Result, ensure};
use weir_tests::{
    assets,
    bench::{
        Subject,
        paths::{Way, client::Traffic},
        report::{Report, Run},
    },
};

/// Runs the benchmark with these arguments. What it printed, and what it wrote.
fn bench(arguments: &str) -> Result<(String, Report)> {
    let directory = tempfile::tempdir()?;
    let output = directory.path().join("bench.json");
    let bench = Command::new(env!("CARGO_BIN_EXE_weir-bench"))
        .args(arguments.split(' '))
        .arg("--output")
        .arg(&output)
        .env("WEIR_BIN", assets::weir()?)
        .output()?;
    ensure!(bench.status.success(), "{}", String::from_utf8_lossy(&bench.stderr));
    Ok((String::from_utf8(bench.stdout)?, serde_json::from_slice(&std::fs::read(output)?)?))
}

#[test]
fn programming_is_measured_on_both_planes() -> Result<()> {
    let subjects = [Subject::WeirEbpf, Subject::WeirNftables];
    let (table, report) = bench(
        "--part programming --subject weir-ebpf --subject weir-nftables --services 10 --rounds 1 --changes 1 \
         --connects 50",
    )?;
    assert!(subjects.iter().all(|subject| table.contains(subject.name())), "{table}");
    assert!(table.contains("sync"), "{table}");
    assert!(report.versions["weir ebpf"].starts_with("weir "), "{:?}", report.versions);
    assert_eq!(report.runs.len(), subjects.len(), "{report:?}");
    report.runs.iter().zip(subjects).for_each(|(run, subject)| was_programmed(run, subject));
    Ok(())
}

fn was_programmed(run: &Run, subject: Subject) {
    assert_eq!((run.subject, run.services, run.round), (subject, 10, 0));
    assert!(run.start_seconds > 0.0 && run.settled_cpu_seconds > 0.0, "{run:?}");
    assert!(run.memory.resident > 0 && run.memory.peak >= run.memory.resident, "{run:?}");
    assert_eq!((run.connects.direct.len(), run.connects.service.len()), (50, 50));
    let [change] = &run.changes[..] else { panic!("not one change: {run:?}") };
    // weir programs both, and counts what it does.
    assert!(change.added_sync_seconds > 0.0 && change.removed_sync_seconds > 0.0, "{change:?}");
    assert!(change.added_cpu_seconds > 0.0 && change.removed_cpu_seconds > 0.0, "{change:?}");
}

#[test]
fn names_are_measured_beside_coredns() -> Result<()> {
    let (table, _) = bench("--part dns --rounds 1 --changes 1 --path-slot 4")?;
    for word in ["weir", "CoreDNS", "ratio"] {
        assert!(table.contains(word), "{table}");
    }
    Ok(())
}

#[test]
fn traffic_of_every_kind_is_measured_both_ways_beside_a_node_without_a_proxy() -> Result<()> {
    let (table, report) = bench(
        "--part paths --subject weir-ebpf --subject weir-nftables --path-services 3,10 --path-rounds 2 --path-slot 5",
    )?;
    assert!(table.contains("to straight") && table.contains("connect4"), "{table}");
    for services in [3, 10] {
        for traffic in [Traffic::Connect, Traffic::Request, Traffic::ConnectedDatagram, Traffic::Datagram] {
            let rates = |subject, way| {
                report
                    .paths
                    .iter()
                    .filter(|sample| sample.services == services && sample.load.traffic == traffic)
                    .filter(|sample| sample.subject == subject && sample.way == way && sample.rate > 0.0)
                    .count()
            };
            let loads = if traffic == Traffic::Connect { 3 } else { 2 };
            for subject in [Some(Subject::WeirEbpf), Some(Subject::WeirNftables)] {
                assert_eq!([Way::Straight, Way::Service].map(|way| rates(subject, way)), [2 * loads; 2]);
            }
            assert_eq!([Way::Straight, Way::Service].map(|way| rates(None, way)), [2 * loads, 0]);
        }
    }
    for program in ["connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4"] {
        let mut costs = report.hooks.iter().filter(|cost| cost.program == program);
        assert!(costs.any(|cost| cost.nanoseconds.iter().all(|cost| *cost > 0.0)), "{program}");
    }
    Ok(())
}

#[test]
fn maps_are_measured_without_an_agent() -> Result<()> {
    let (table, report) = bench("--part maps --map-services 300 --rounds 1 --changes 1")?;
    assert!(table.contains("bytes a Service"), "{table}");
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
