//! Samples as tables, for the terminal and for the page.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::{Cell, Row, Table};
use weir::cli;

use super::{Report, bytes, time};
use crate::{
    dns,
    hooks::Cost,
    kernel::KernelMemory,
    maps,
    paths::{Series, Traffic, Way, cases, ratio},
    programming::{Change, Kind, Phase, Recovery, Restart, Run, Start},
    statistics::quantile,
    subject::Subject,
    workload::Workload,
};

/// An empty table.
#[must_use]
pub(super) fn grid(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.set_header(header);
    table
}

/// A table in kubectl's form, for the terminal.
#[must_use]
pub(crate) fn columns(table: &Table) -> String {
    let cells = |row: &Row| row.cell_iter().map(Cell::content).collect::<Vec<String>>();
    let header = table.header().map(cells).unwrap_or_default();
    let header: Vec<String> = header.iter().map(|name| name.to_uppercase()).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    cli::columns(&header, table.row_iter().map(cells))
}

/// Where a run has nothing.
fn not_run() -> String {
    "not run".to_owned()
}

fn rate(series: &Series) -> String {
    let rate = quantile(series.rates.clone(), 0.5);
    match series.load.traffic {
        _ if rate.is_nan() => "-".to_owned(),
        // KiB to what network people count in.
        Traffic::Bulk => format!("{:.1} Gbit/s", rate * 1024.0 * 8.0 / 1e9),
        _ => format!("{rate:.0}/s"),
    }
}

/// Rates as parts of the limit: one row for each case, one column for each subject.
#[must_use]
pub(super) fn ratios(all: &[Series], way: Way) -> Table {
    let subjects: BTreeSet<Subject> = all.iter().filter_map(|series| series.subject).collect();
    let mut header = vec!["Services", "route", "traffic", "straight, no proxy"];
    header.extend(subjects.iter().map(|subject| subject.name()));
    let mut table = grid(&header);
    for ((services, route, load), case) in cases(all) {
        if way == Way::Straight && !route.is_compared_in_place() {
            continue;
        }
        let limit = case.limit();
        let mut row = vec![services.to_string(), route.name().to_owned(), load.to_string()];
        row.push(limit.map_or_else(not_run, rate));
        row.extend(subjects.iter().map(|subject| match (case.by(*subject, way), limit) {
            (Some(own), _) if own.failed.is_some() => "failed".to_owned(),
            (Some(own), Some(limit)) => {
                ratio(own, limit).map_or_else(|| "-".to_owned(), |ratio| ratio.to_string())
            }
            _ => not_run(),
        }));
        table.add_row(row);
    }
    table
}

/// Latencies of the first packet and of requests, one client by IPv4.
#[must_use]
pub(super) fn latencies(report: &Report) -> Table {
    let mut table = grid(&["Services", "route", "latency of", "subject", "p50", "p90", "p99", "p99.9"]);
    for series in &report.paths {
        let what = match series.load.traffic {
            Traffic::Connect => "first packet (TCP connect)",
            Traffic::Request => "request, kept connection",
            _ => continue,
        };
        let is_limit = series.subject.is_none() && series.way == Way::Straight;
        if series.load.clients > 1 || series.load.v6 || !(is_limit || series.way == Way::Service) {
            continue;
        }
        let subject = series.subject.map_or("straight, no proxy", Subject::name);
        let mut row = vec![
            series.services.to_string(),
            series.route.name().to_owned(),
            what.to_owned(),
            subject.to_owned(),
        ];
        row.extend([0.5, 0.9, 0.99, 0.999].map(|part| {
            let mut known = report.latency_parts.iter().zip(&series.latencies);
            let found = known.find(|(known, _)| **known == part);
            found.map_or_else(|| "-".to_owned(), |(_, nanoseconds)| time(nanoseconds / 1e9))
        }));
        table.add_row(row);
    }
    table
}

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
pub(super) fn starts(runs: &[Run]) -> Table {
    let mut table = grid(&[
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
    ]);
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
    let start = |value: fn(&Start) -> f64| over(runs, |run| run.start.as_ref().map(value));
    let kernel = |value: fn(&KernelMemory) -> f64| over(runs, |run| run.kernel.as_ref().map(value));
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
    let restart = |value: fn(&Restart) -> f64| over(runs, |run| run.restart.as_ref().map(value));
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
pub(super) fn changes(runs: &[Run]) -> Table {
    let mut table = grid(&[
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
    ]);
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
pub(super) fn recoveries(all: &[Recovery]) -> Table {
    let mut table = grid(&[
        "Services x endpoints",
        "act",
        "subject",
        "until all worked p50",
        "longest",
        "n",
        "CPU",
        "failed meanwhile",
    ]);
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

/// One row for each program and case.
#[must_use]
pub(super) fn hooks(costs: &[Cost]) -> Table {
    let mut table = grid(&["Services", "program", "case", "ns a run", "least"]);
    for cost in costs {
        table.add_row([
            cost.services.to_string(),
            cost.other
                .map_or_else(|| cost.program.clone(), |other| format!("{}, {}", cost.program, other.name())),
            cost.case.clone(),
            format!("{:.0}", quantile(cost.nanoseconds.clone(), 0.5)),
            format!("{:.0}", quantile(cost.nanoseconds.clone(), 0.0)),
        ]);
    }
    table
}

/// One row for each shape.
#[must_use]
pub(super) fn maps(runs: &[maps::Run]) -> Table {
    let mut table = grid(&[
        "Services",
        "of",
        "filled (CPU)",
        "adopted (CPU)",
        "endpoint more or less p50 / p99",
        "Service more or less p50 / p99",
        "bytes a Service",
        "bytes an endpoint",
        "all maps",
    ]);
    for shape in maps::Shape::ALL {
        let of_shape: Vec<&maps::Run> = runs.iter().filter(|run| run.shape == shape).collect();
        let Some(run) = of_shape.first() else { continue };
        let over = |value: fn(&maps::Run) -> f64| {
            time(quantile(of_shape.iter().map(|run| value(run)).collect(), 0.5))
        };
        let both = |value: fn(&maps::Run) -> &Vec<f64>| {
            let all: Vec<f64> = of_shape.iter().flat_map(|run| value(run)).copied().collect();
            format!("{} / {}", time(quantile(all.clone(), 0.5)), time(quantile(all, 0.99)))
        };
        let services = f64::from(run.services);
        table.add_row([
            run.services.to_string(),
            shape.name().to_owned(),
            format!("{} ({})", over(|run| run.filled_seconds), over(|run| run.filled_cpu_seconds)),
            format!("{} ({})", over(|run| run.adopted_seconds), over(|run| run.adopted_cpu_seconds)),
            both(|run| &run.changed_seconds),
            both(|run| &run.came_seconds),
            format!("{:.0}", run.bytes(&["frontends", "tallies"]) / services),
            format!("{:.0}", run.bytes(&["slots", "members"]) / services / f64::from(run.endpoints)),
            bytes(run.maps.iter().map(|map| map.bytes).sum::<u64>() as f64),
        ]);
    }
    table
}

/// Names: one row for each server, and the ratio of the two.
#[must_use]
pub(super) fn names(seen: &[dns::Seen]) -> Table {
    let header = [
        "server",
        "queries/s",
        "queries/CPU s",
        "p50",
        "p99",
        "after a change, p50",
        "p99",
        "10,000 endpoints",
    ];
    let mut table = grid(&header);
    let median = |samples: &[f64]| quantile(samples.to_vec(), 0.5);
    let at = |samples: &[f64], part| time(quantile(samples.to_vec(), part));
    for seen in seen {
        table.add_row([
            seen.server.clone(),
            format!("{:.0}", median(&seen.rate)),
            format!("{:.0}", median(&seen.rate_by_core)),
            at(&seen.alone, 0.5),
            at(&seen.alone, 0.99),
            at(&seen.change, 0.5),
            at(&seen.change, 0.99),
            bytes(seen.memory.map_or(f64::NAN, |bytes| bytes as f64)),
        ]);
    }
    if let [weir, coredns] = seen {
        let ratio = |of: fn(&dns::Seen) -> &[f64]| {
            format!("{:.1}x", median(of(weir)) / median(of(coredns)).max(1e-12))
        };
        let empty = String::new;
        table.add_row([
            "ratio".to_owned(),
            ratio(|seen| &seen.rate),
            ratio(|seen| &seen.rate_by_core),
            ratio(|seen| &seen.alone),
            empty(),
            empty(),
            empty(),
            empty(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::paths::{Load, Route};

    #[test]
    fn a_subject_that_did_not_end_in_time_is_shown_with_the_bound() {
        let mut run = Run::new(Subject::KubeProxyNftables, Workload::many(7), 0, Duration::from_secs(90));
        run.unfinished = Some(Phase::Start);
        let text = starts(&[run]).to_string();
        let row = text.lines().find(|line| line.contains("7x5")).unwrap();
        assert!(row.contains("> 90 s") && row.contains("kube-proxy nftables"), "{row}");
        assert!(!changes(&[]).to_string().contains("kube-proxy"));
    }

    fn series(subject: Option<Subject>, way: Way, rates: [f64; 2]) -> Series {
        Series {
            services: 10,
            route: Route::PodSameNode,
            load: Load::alone(Traffic::Connect, false),
            subject,
            way,
            rates: rates.to_vec(),
            cpu_nanoseconds: vec![12_340.0; 2],
            latencies: vec![5e4, 9e4],
            failed: None,
        }
    }

    #[test]
    fn ratios_are_of_one_round_and_a_failed_case_is_shown_so() {
        let (weir, peer) = (Some(Subject::WeirEbpf), Some(Subject::KubeProxyNftables));
        let paths = vec![
            series(None, Way::Straight, [2000.0, 1000.0]),
            series(weir, Way::Straight, [1800.0, 900.0]),
            series(weir, Way::Service, [900.0, 450.0]),
            Series { failed: Some("refused".to_owned()), ..series(peer, Way::Service, [1.0, 1.0]) },
        ];
        let row = |way| {
            let text = ratios(&paths, way).to_string();
            text.lines().find(|line| line.contains("connect/IPv4")).unwrap().to_owned()
        };
        let (service, straight) = (row(Way::Service), row(Way::Straight));
        assert!(service.contains("1000/s") && service.contains("0.450 (0.450 to 0.450)"), "{service}");
        assert!(service.contains("failed"), "{service}");
        assert!(straight.contains("0.900 (0.900 to 0.900)") && straight.contains("not run"), "{straight}");
        let report = Report { paths, latency_parts: vec![0.5, 0.9], ..Report::default() };
        let text = latencies(&report).to_string();
        assert!(text.contains("50.0 µs") && text.contains("straight, no proxy"), "{text}");
    }
}
