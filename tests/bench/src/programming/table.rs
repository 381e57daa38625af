//! Runs as tables.

use std::collections::BTreeMap;

use comfy_table::Table;

use super::{Change, Kind, Phase, Recovery, Run};
use crate::{
    report::{bytes, grid, time},
    statistics::quantile,
    subject::Subject,
    workload::Workload,
};

/// The runs of each subject with each workload.
type Groups<'a> = BTreeMap<(Workload, Subject), Vec<&'a Run>>;

fn groups(runs: &[Run]) -> Groups<'_> {
    let mut groups = Groups::new();
    for run in runs {
        groups.entry((run.workload, run.subject)).or_default().push(run);
    }
    groups
}

/// Starting and starting again: one row for each workload and subject.
#[must_use]
pub(crate) fn start_table(runs: &[Run]) -> Table {
    let mut table = grid(
        &[
            "Services x endpoints",
            "subject",
            "start",
            "CPU",
            "from API server",
            "memory",
            "peak (+children)",
            "kernel: maps",
            "kernel: rules",
            "restart",
            "CPU",
            "from API server",
            "failed meanwhile",
        ],
        &[1],
    );
    for ((workload, subject), runs) in groups(runs) {
        let mut row = vec![workload.to_string(), subject.name().to_owned()];
        row.extend(start_cells(&runs));
        row.extend(restart_cells(&runs));
        table.add_row(row);
    }
    table
}

/// The median over the runs that have the figure.
fn over(runs: &[&Run], value: impl Fn(&Run) -> Option<f64>) -> f64 {
    quantile(runs.iter().filter_map(|run| value(run)).collect(), 0.5)
}

fn start_cells(runs: &[&Run]) -> Vec<String> {
    let start = |value: fn(&super::Start) -> f64| over(runs, |run| run.start.as_ref().map(value));
    let kernel =
        |value: fn(&crate::kernel::KernelMemory) -> f64| over(runs, |run| run.kernel.as_ref().map(value));
    vec![
        seconds_or_bound(runs, Phase::Start, start(|start| start.seconds)),
        time(start(|start| start.settled_cpu_seconds)),
        bytes(start(|start| start.traffic.received as f64)),
        bytes(start(|start| start.memory.resident as f64)),
        format!(
            "{} ({})",
            bytes(start(|start| start.memory.peak as f64)),
            bytes(start(|start| start.memory.peak_with_children as f64))
        ),
        bytes(kernel(|kernel| kernel.maps as f64)),
        bytes(kernel(|kernel| kernel.rules as f64)),
    ]
}

fn restart_cells(runs: &[&Run]) -> Vec<String> {
    let restart = |value: fn(&super::Restart) -> f64| over(runs, |run| run.restart.as_ref().map(value));
    let failed: u32 = runs.iter().filter_map(|run| run.restart.as_ref()).map(|restart| restart.failed).sum();
    let connects: u32 =
        runs.iter().filter_map(|run| run.restart.as_ref()).map(|restart| restart.connects).sum();
    vec![
        seconds_or_bound(runs, Phase::Restart, restart(|restart| restart.seconds)),
        time(restart(|restart| restart.settled_cpu_seconds)),
        bytes(restart(|restart| restart.traffic.received as f64)),
        if connects == 0 { "-".to_owned() } else { format!("{failed} of {connects}") },
    ]
}

/// The figure, or that there is none for want of time.
fn seconds_or_bound(runs: &[&Run], phase: Phase, seconds: f64) -> String {
    match runs.iter().find(|run| run.unfinished == Some(phase)) {
        Some(run) if seconds.is_nan() => format!("> {:.0} s", run.bound_seconds),
        _ => time(seconds),
    }
}

/// Single changes: one row for each workload, subject and kind of change.
#[must_use]
pub(crate) fn kinds_table(runs: &[Run]) -> Table {
    let mut table = grid(
        &[
            "Services x endpoints",
            "subject",
            "change",
            "of it the API server",
            "idle p50",
            "p99",
            "after its answer",
            "n",
            "sync",
            "CPU",
            "busy p50",
            "p99",
            "n",
            "writes/s",
            "CPU a write",
        ],
        &[1, 2],
    );
    for ((workload, subject), runs) in groups(runs) {
        for kind in Kind::ALL {
            let mut row = vec![workload.to_string(), subject.name().to_owned(), kind.name().to_owned()];
            row.extend(idle_cells(&runs, kind));
            row.extend(busy_cells(&runs, kind));
            if runs.iter().any(|run| run.start.is_some()) {
                table.add_row(row);
            }
        }
    }
    table
}

fn idle_cells(runs: &[&Run], kind: Kind) -> Vec<String> {
    let of_kind = || runs.iter().flat_map(|run| &run.idle).filter(move |change| change.kind == kind);
    let all = |value: fn(&Change) -> Option<f64>| of_kind().filter_map(value).collect::<Vec<f64>>();
    let seconds = all(|change| Some(change.total()));
    vec![
        time(quantile(all(|change| Some(change.write_seconds)), 0.5)),
        seconds_or_bound(runs, Phase::Idle, quantile(seconds.clone(), 0.5)),
        time(quantile(seconds.clone(), 0.99)),
        time(quantile(all(|change| Some(change.seconds)), 0.5)),
        seconds.len().to_string(),
        time(quantile(all(|change| change.sync_seconds), 0.5)),
        time(quantile(all(|change| change.cpu_seconds), 0.5)),
    ]
}

fn busy_cells(runs: &[&Run], kind: Kind) -> Vec<String> {
    let busy = || runs.iter().filter_map(|run| run.busy.as_ref());
    let changes = busy().flat_map(|busy| &busy.changes).filter(|change| change.kind == kind);
    let seconds: Vec<f64> = changes.map(Change::total).collect();
    let pace = busy().map(|busy| f64::from(busy.writes) / busy.seconds).collect();
    let cpu = busy().map(|busy| busy.cpu_seconds / f64::from(busy.writes.max(1))).collect();
    let pace = quantile(pace, 0.5);
    vec![
        seconds_or_bound(runs, Phase::Busy, quantile(seconds.clone(), 0.5)),
        time(quantile(seconds.clone(), 0.99)),
        seconds.len().to_string(),
        if pace.is_nan() { "-".to_owned() } else { format!("{pace:.0}") },
        time(quantile(cpu, 0.5)),
    ]
}

/// Serving again after hostile acts: one row for each workload, act and subject.
#[must_use]
pub(crate) fn recovery_table(all: &[Recovery]) -> Table {
    let mut table = grid(
        &[
            "Services x endpoints",
            "act",
            "subject",
            "until all worked p50",
            "longest",
            "n",
            "CPU",
            "failed meanwhile",
        ],
        &[1, 2],
    );
    let mut groups: BTreeMap<_, Vec<&Recovery>> = BTreeMap::new();
    for one in all {
        groups.entry((one.workload, one.act, one.subject)).or_default().push(one);
    }
    for ((workload, act, subject), group) in groups {
        let seconds: Vec<f64> = group.iter().filter_map(|one| one.seconds).collect();
        let late = group.iter().find(|one| one.seconds.is_none());
        let longest = late.map_or_else(
            || time(quantile(seconds.clone(), 1.0)),
            |late| format!("> {:.0} s", late.bound_seconds),
        );
        let connects: u32 = group.iter().map(|one| one.connects).sum();
        let failed: u32 = group.iter().map(|one| one.failed).sum();
        table.add_row([
            workload.to_string(),
            act.name().to_owned(),
            subject.name().to_owned(),
            time(quantile(seconds.clone(), 0.5)),
            longest,
            group.len().to_string(),
            time(quantile(group.iter().filter_map(|one| one.cpu_seconds).collect(), 0.5)),
            if connects == 0 { "-".to_owned() } else { format!("{failed} of {connects}") },
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_did_not_end_in_time_is_shown_with_the_bound() {
        let mut run = Run::new(Subject::KubeProxyNftables, Workload::many(7), 0, Duration::from_secs(90));
        run.unfinished = Some(Phase::Start);
        let text = start_table(&[run]).to_string();
        let row = text.lines().find(|line| line.contains("7x5")).unwrap();
        assert!(row.contains("> 90 s") && row.contains("kube-proxy nftables"), "{row}");
        assert!(!kinds_table(&[]).to_string().contains("kube-proxy"));
    }
}
