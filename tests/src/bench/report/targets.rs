//! What weir set out to reach, and what was measured.
//!
//! In: a report. Out: a table with a verdict for each target, which is as good as the machine was quiet.

use comfy_table::Table;

use super::{Report, bytes, grid, time};
use crate::bench::{
    paths::{Load, Route, Traffic, cases, ratio},
    programming::{Change, Kind, Run},
    statistics::{Estimate, quantile},
    subject::Subject,
    workload::Workload,
};

/// A target, what was measured, and the verdict.
type Row = [String; 3];

/// One row for each target.
#[must_use]
pub(super) fn table(report: &Report) -> Table {
    let mut table = grid(&["target", "measured", "verdict"], &[0, 1, 2]);
    for row in path_rows(report).into_iter().chain(programming_rows(report)) {
        table.add_row(row);
    }
    table
}

fn row(target: String, measured: Option<(String, bool)>) -> Row {
    match measured {
        None => [target, "-".to_owned(), "not measured".to_owned()],
        Some((text, met)) => [target, text, if met { "met" } else { "missed" }.to_owned()],
    }
}

fn path_rows(report: &Report) -> Vec<Row> {
    let mut rows = Vec::new();
    for traffic in [Traffic::Connect, Traffic::Request, Traffic::ConnectedDatagram] {
        let of = |subject| to_limit(report, Route::PodSameNode, traffic, subject);
        let measured = of(Subject::WeirEbpf).map(|ratio| (ratio.to_string(), ratio.point >= 0.99));
        rows.push(row(format!("weir eBPF, ClusterIP, {}: 0.99 of straight", traffic.name()), measured));
    }
    for route in [Route::PodSameNode, Route::NodePortLocal, Route::NodePortRemote] {
        for traffic in [Traffic::Connect, Traffic::Request] {
            let of = |subject| to_limit(report, route, traffic, subject);
            let both = of(Subject::WeirNftables).zip(of(Subject::KubeProxyNftables));
            // Where the intervals meet, nobody is ahead.
            let measured =
                both.map(|(own, peer)| (format!("{own}; kube-proxy {peer}"), own.high >= peer.low));
            rows.push(row(
                format!(
                    "weir nftables, {}, {}: no less than kube-proxy nftables",
                    route.name(),
                    traffic.name()
                ),
                measured,
            ));
        }
    }
    rows
}

/// The ratio to the limit with the most Services that both were measured with... of one client by IPv4.
fn to_limit(report: &Report, route: Route, traffic: Traffic, subject: Subject) -> Option<Estimate> {
    let load = Load { traffic, clients: 1, v6: false };
    let all = cases(&report.paths);
    let of_all = all.iter().filter(|((_, one, other), _)| (*one, *other) == (route, load));
    of_all
        .filter_map(|(_, case)| {
            let (_, series) = case.subjects().find(|(one, _)| *one == subject)?;
            // Past the subject itself nothing differs but the Service.
            let to = case.in_place(subject).or(case.limit())?;
            Some((series.rates.len(), ratio(series, to)?))
        })
        .max_by_key(|(rounds, _)| *rounds)
        .map(|(_, ratio)| ratio)
}

fn programming_rows(report: &Report) -> Vec<Row> {
    let over = |subject, services, value: fn(&Run) -> Option<f64>| {
        let found = |run: &&Run| run.subject == subject && run.workload == Workload::many(services);
        let values: Vec<f64> = report.programming.iter().filter(found).filter_map(value).collect();
        (!values.is_empty()).then(|| quantile(values, 0.5))
    };
    let (own, peer) = (Subject::WeirNftables, Subject::KubeProxyNftables);
    let times = |value, factor: f64, text: fn(f64) -> String| {
        over(own, 10_000, value).zip(over(peer, 10_000, value)).map(|(own, peer)| {
            (format!("{}; kube-proxy {}: {:.0}x", text(own), text(peer), peer / own), peer >= own * factor)
        })
    };
    let start = |run: &Run| run.start.as_ref().map(|start| start.seconds);
    let memory = |run: &Run| run.start.as_ref().map(|start| start.memory.resident as f64);
    let restart = |run: &Run| run.restart.as_ref().map(|restart| restart.seconds);
    let at_most = |subject, value, bound: f64| {
        over(subject, 50_000, value).map(|seconds| (time(seconds), seconds <= bound))
    };
    let mut rows = vec![
        row(
            "10,000 Services: start 10 times as fast as kube-proxy nftables".to_owned(),
            times(start, 10.0, time),
        ),
        row("10,000 Services: one change 100 times as fast".to_owned(), times(changed, 100.0, time)),
        row("10,000 Services: a quarter of its memory".to_owned(), times(memory, 4.0, bytes)),
    ];
    for subject in [Subject::WeirEbpf, Subject::WeirNftables] {
        let name = subject.name();
        rows.push(row(
            format!("{name}, 50,000 Services: 10 ms from API write to a new Service"),
            at_most(subject, changed, 0.01),
        ));
        rows.push(row(
            format!("{name}, 50,000 Services: 2 s to be ready again"),
            at_most(subject, restart, 2.0),
        ));
    }
    rows
}

/// The median of new Services in one run.
fn changed(run: &Run) -> Option<f64> {
    let of_kind = run.idle.iter().filter(|change| change.kind == Kind::ServiceAdded);
    let seconds: Vec<f64> = of_kind.map(Change::total).collect();
    (!seconds.is_empty()).then(|| quantile(seconds, 0.5))
}
