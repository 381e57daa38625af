//! Whether weir is ahead of others, level with them or behind.
//!
//! In: a report, which is of one run. Out: a table with a row for each figure of weir and a column for each program beside
//! it. Both sides of a ratio have the same number of Services and were measured in the same run. Where the interval of the
//! ratio holds 1, the two are level.

use std::collections::BTreeSet;

use comfy_table::Table;

use super::{Report, tables::grid};
use crate::{
    paths::{Load, Route, Traffic, Way, cases, ratio},
    programming::{Change, Kind, Run},
    statistics::{ENOUGH, Estimate, ratio_of_medians},
    subject::Subject,
    workload::Workload,
};

/// The builds that are judged.
const OWN: [Subject; 2] = [Subject::WeirEbpf, Subject::WeirNftables];
/// The routes and the traffic that are judged.
const PATHS: [(Route, Traffic); 7] = [
    (Route::PodSameNode, Traffic::Connect),
    (Route::PodSameNode, Traffic::Request),
    (Route::PodSameNode, Traffic::ConnectedDatagram),
    (Route::NodePortLocal, Traffic::Connect),
    (Route::NodePortLocal, Traffic::Request),
    (Route::NodePortRemote, Traffic::Connect),
    (Route::NodePortRemote, Traffic::Request),
];
/// The numbers of Services with which programming is judged.
const SERVICES: [u32; 2] = [1000, 10_000];

/// Figures of one run of programming; less is better.
type Samples = fn(&Run) -> Vec<f64>;

const PROGRAMMING: [(&str, Samples); 5] = [
    ("start", |run| run.start.iter().map(|start| start.seconds).collect()),
    ("a new Service works", |run| changes(run, Kind::ServiceAdded)),
    ("a removed endpoint is gone", |run| changes(run, Kind::EndpointRemoved)),
    ("killed, and ready again", |run| run.restart.iter().map(|restart| restart.seconds).collect()),
    ("resident memory", |run| run.start.iter().map(|start| start.memory.resident as f64).collect()),
];

fn changes(run: &Run, kind: Kind) -> Vec<f64> {
    run.idle.iter().filter(|change| change.kind == kind).map(Change::total).collect()
}

/// One row for each figure that the run has of weir.
#[must_use]
pub(super) fn table(report: &Report) -> Table {
    let subjects = report.paths.iter().filter_map(|series| series.subject);
    let subjects = subjects.chain(report.programming.iter().map(|run| run.subject));
    let others: BTreeSet<Subject> = subjects.filter(|subject| !OWN.contains(subject)).collect();
    let mut header = vec!["figure", "weir", "beside no proxy"];
    header.extend(others.iter().map(|subject| subject.name()));
    let mut table = grid(&header);
    path_rows(report, &others).into_iter().chain(programming_rows(report, &others)).for_each(|row| {
        table.add_row(row);
    });
    table
}

fn path_rows(report: &Report, others: &BTreeSet<Subject>) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let cases = cases(&report.paths);
    for ((services, route, load), case) in &cases {
        if !PATHS.contains(&(*route, load.traffic)) || *load != Load::alone(load.traffic, false) {
            continue;
        }
        for subject in OWN {
            let Some(own) = case.by(subject, Way::Service) else { continue };
            let beside = std::iter::once(case.limit())
                .chain(others.iter().map(|other| case.by(*other, Way::Service)))
                .map(|to| to.map(|to| (ratio(own, to), own.rates.len().min(to.rates.len()))));
            let figure = format!("{}, {}, {services} Services", route.name(), load.traffic.name());
            rows.push(row(figure, subject, beside));
        }
    }
    rows
}

fn programming_rows(report: &Report, others: &BTreeSet<Subject>) -> Vec<Vec<String>> {
    let runs = |subject, services| {
        let of = move |run: &&Run| (run.subject, run.workload) == (subject, Workload::many(services));
        report.programming.iter().filter(of)
    };
    let mut rows = Vec::new();
    for (services, (name, samples)) in
        SERVICES.into_iter().flat_map(|it| PROGRAMMING.map(move |figure| (it, figure)))
    {
        for subject in OWN {
            let own: Vec<f64> = runs(subject, services).flat_map(samples).collect();
            if own.is_empty() {
                continue;
            }
            let beside = others.iter().map(|other| {
                let theirs: Vec<f64> = runs(*other, services).flat_map(samples).collect();
                let has_run = runs(*other, services).next().is_some();
                has_run.then(|| (ratio_of_medians(&theirs, &own), own.len().min(theirs.len())))
            });
            let mut row = row(format!("{name}, {services} Services"), subject, beside);
            // A node without a proxy programs nothing.
            row.insert(2, "-".to_owned());
            rows.push(row);
        }
    }
    rows
}

/// A cell for each program: nothing where it was not run, no ratio where it did not get that far.
fn row(
    figure: String,
    subject: Subject,
    beside: impl Iterator<Item = Option<(Option<Estimate>, usize)>>,
) -> Vec<String> {
    let cells = beside.map(|other| match other {
        None => "not run".to_owned(),
        Some((None, _)) => "did not finish".to_owned(),
        Some((Some(ratio), samples)) => {
            let few = if samples < ENOUGH { format!(", n = {samples}") } else { String::new() };
            let ratio_text = if samples > 1 { ratio.to_string() } else { format!("{:.1}", ratio.point) };
            format!("{}: {ratio_text}{few}", verdict(&ratio))
        }
    });
    [figure, subject.name().to_owned()].into_iter().chain(cells).collect()
}

/// How one side stands to the other, by the ratio of its speed to the other's, with the digits that the table shows.
fn verdict(ratio: &Estimate) -> &'static str {
    let shown = |end: f64| (end * 1000.0).round();
    match (shown(ratio.low) > 1000.0, shown(ratio.high) < 1000.0) {
        (true, _) => "ahead",
        (_, true) => "behind",
        _ => "level",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::Series;

    fn measured(services: u32, subject: Option<Subject>, rates: [f64; 4]) -> Series {
        Series {
            services,
            route: Route::PodSameNode,
            load: Load::alone(Traffic::Connect, false),
            subject,
            way: if subject.is_some() { Way::Service } else { Way::Straight },
            rates: rates.to_vec(),
            cpu_nanoseconds: Vec::new(),
            latencies: Vec::new(),
            failed: None,
        }
    }

    #[test]
    fn a_verdict_is_of_one_size_and_of_intervals() {
        let peer = Subject::KubeProxyNftables;
        let theirs = [4e5, 4.1e5, 4e5, 4.1e5];
        for (rates, wanted) in [
            ([4.4e5, 4.5e5, 4.4e5, 4.5e5], "ahead: "),
            ([4.1e5, 4e5, 4e5, 4.1e5], "level: "),
            ([3.6e5, 3.7e5, 3.6e5, 3.7e5], "behind: "),
        ] {
            // Of another size there is only the other program, which is beside nothing.
            let paths = [
                measured(10, None, [5e5; 4]),
                measured(10, Some(Subject::WeirNftables), rates),
                measured(10, Some(peer), theirs),
                measured(50_000, Some(peer), [1e5; 4]),
            ];
            let rows = path_rows(&Report { paths: paths.to_vec(), ..Report::default() }, &[peer].into());
            let [row] = &rows[..] else { panic!("{rows:?}") };
            assert!(row[2].starts_with("behind: ") && row[3].starts_with(wanted), "{row:?}");
        }
    }

    #[test]
    fn not_run_and_not_finished_differ() {
        let one = Estimate { point: 2.0, low: 2.0, high: 2.0 };
        let cells = [None, Some((None, 0)), Some((Some(one), 1))];
        let row = row("start".to_owned(), Subject::WeirEbpf, cells.into_iter());
        assert_eq!(row, ["start", "weir eBPF", "not run", "did not finish", "ahead: 2.0, n = 1"]);
    }
}
