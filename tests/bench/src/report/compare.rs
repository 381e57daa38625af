//! What is different between two files of samples.
//!
//! In: two reports. Out: tables of what both have, with the factor between them.

use std::collections::BTreeMap;

use comfy_table::Table;

use super::{Report, bytes, grid, time};
use crate::{
    paths::{cases, ratio},
    programming::{Change, Kind, Run},
    statistics::quantile,
    subject::Subject,
    workload::Workload,
};

/// One table for paths, one for programming, where both have something of it.
#[must_use]
pub(crate) fn tables(before: &Report, after: &Report) -> Vec<Table> {
    let tables = [paths(before, after), programming(before, after)];
    tables.into_iter().filter(|table| !table.is_empty()).collect()
}

/// Ratios to the limit: absolute rates differ with the machine and its mood.
fn paths(before: &Report, after: &Report) -> Table {
    let mut table = grid(
        &["Services", "route", "traffic", "subject", "before, to the limit", "after", "factor", ""],
        &[1, 2, 3, 7],
    );
    let (old, new) = (cases(&before.paths), cases(&after.paths));
    for ((services, route, load), case) in &new {
        let Some(old) = old.get(&(*services, *route, *load)) else { continue };
        for (subject, series) in case.subjects() {
            let earlier = old.subjects().find(|(other, _)| *other == subject);
            let was = earlier.and_then(|(_, series)| ratio(series, old.limit()?));
            let is = case.limit().and_then(|limit| ratio(series, limit));
            let Some((was, is)) = was.zip(is) else { continue };
            let verdict = match () {
                () if is.low > was.high => "faster",
                () if is.high < was.low => "slower",
                () => "the same within the intervals",
            };
            table.add_row([
                services.to_string(),
                route.name().to_owned(),
                load.to_string(),
                subject.name().to_owned(),
                was.to_string(),
                is.to_string(),
                format!("{:.3}", is.point / was.point),
                verdict.to_owned(),
            ]);
        }
    }
    table
}

/// Figures of programming, by what they are called.
type Figures = Vec<(&'static str, f64, fn(f64) -> String)>;

fn programming(before: &Report, after: &Report) -> Table {
    let mut table =
        grid(&["Services x endpoints", "subject", "median of", "before", "after", "factor"], &[1, 2]);
    let old = figures(&before.programming);
    for ((workload, subject), new) in figures(&after.programming) {
        let Some(old) = old.get(&(workload, subject)) else { continue };
        for ((name, was, text), (_, is, _)) in old.iter().zip(new) {
            if was.is_nan() || is.is_nan() {
                continue;
            }
            table.add_row([
                workload.to_string(),
                subject.name().to_owned(),
                (*name).to_owned(),
                text(*was),
                text(is),
                format!("{:.2}", is / was),
            ]);
        }
    }
    table
}

fn figures(runs: &[Run]) -> BTreeMap<(Workload, Subject), Figures> {
    let mut groups: BTreeMap<_, Vec<&Run>> = BTreeMap::new();
    for run in runs {
        groups.entry((run.workload, run.subject)).or_default().push(run);
    }
    groups.into_iter().map(|(key, runs)| (key, of(&runs))).collect()
}

fn of(runs: &[&Run]) -> Figures {
    let over =
        |value: fn(&Run) -> Option<f64>| quantile(runs.iter().filter_map(|run| value(run)).collect(), 0.5);
    let changes = |kind| {
        let all = runs.iter().flat_map(|run| &run.idle).filter(move |change| change.kind == kind);
        quantile(all.map(Change::total).collect(), 0.5)
    };
    let mut figures: Figures = vec![
        ("start", over(|run| run.start.as_ref().map(|start| start.seconds)), time),
        ("CPU of the start", over(|run| run.start.as_ref().map(|start| start.settled_cpu_seconds)), time),
        ("memory", over(|run| run.start.as_ref().map(|start| start.memory.resident as f64)), bytes),
        ("kernel: maps", over(|run| run.kernel.as_ref().map(|kernel| kernel.maps as f64)), bytes),
        ("kernel: rules", over(|run| run.kernel.as_ref().map(|kernel| kernel.rules as f64)), bytes),
        ("restart", over(|run| run.restart.as_ref().map(|restart| restart.seconds)), time),
    ];
    figures.extend(Kind::ALL.map(|kind| {
        let text: fn(f64) -> String = time;
        (kind.name(), changes(kind), text)
    }));
    figures
}
