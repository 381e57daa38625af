//! The benchmark in its smallest form: that it measures, not what.

use std::process::Command;

use anyhow::{Result, ensure};
use weir_tests::{
    assets,
    bench::{Subject, report::Report},
};

#[test]
fn the_benchmark_writes_every_sample_it_shows() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let output = directory.path().join("bench.json");
    let arguments = "--subject weir --services 10 --rounds 1 --changes 1 --connects 50 --output";
    let bench = Command::new(env!("CARGO_BIN_EXE_weir-bench"))
        .args(arguments.split(' '))
        .arg(&output)
        .env("WEIR_BIN", assets::weir()?)
        .output()?;
    ensure!(bench.status.success(), "{}", String::from_utf8_lossy(&bench.stderr));
    let table = String::from_utf8(bench.stdout)?;
    assert!(table.contains("weir") && table.contains("sync"), "{table}");

    let report: Report = serde_json::from_slice(&std::fs::read(output)?)?;
    assert!(report.versions["weir"].starts_with("weir "), "{:?}", report.versions);
    let [run] = &report.runs[..] else { panic!("not one run: {report:?}") };
    assert_eq!((run.subject, run.services, run.round), (Subject::Weir, 10, 0));
    assert!(run.start_seconds > 0.0 && run.settled_cpu_seconds > 0.0, "{run:?}");
    assert!(run.memory.resident > 0 && run.memory.peak >= run.memory.resident, "{run:?}");
    assert_eq!((run.connects.direct.len(), run.connects.service.len()), (50, 50));
    let [change] = &run.changes[..] else { panic!("not one change: {run:?}") };
    // weir programs both, and counts what it does.
    assert!(change.added_sync_seconds > 0.0 && change.removed_sync_seconds > 0.0, "{change:?}");
    assert!(change.added_cpu_seconds > 0.0 && change.removed_cpu_seconds > 0.0, "{change:?}");
    Ok(())
}
