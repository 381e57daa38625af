//! Where weir is behind.
//!
//! In: a report. Out: a sentence for each case in which a subject of ours is surely slower than the best of the others, or
//! than nothing at all by more than a few per cent: what the page must not leave to be found.

use std::collections::BTreeMap;

use super::{Report, bytes, time};
use crate::{
    paths::{cases, ratio},
    programming::{Change, Kind, Run},
    statistics::quantile,
    subject::Subject,
    workload::Workload,
};

/// With fewer rounds an interval says nothing.
const ROUNDS: usize = 4;

/// All of them, weir's own order of subjects first.
#[must_use]
pub(super) fn sentences(report: &Report) -> Vec<String> {
    let mut sentences = on_paths(report);
    sentences.extend(in_programming(report));
    sentences
}

fn on_paths(report: &Report) -> Vec<String> {
    let mut sentences = Vec::new();
    for ((services, route, load), case) in cases(&report.paths) {
        let Some(limit) = case.limit() else { continue };
        let (own, others): (Vec<_>, Vec<_>) = case
            .subjects()
            .filter(|(_, series)| series.rates.len() >= ROUNDS)
            .filter_map(|(subject, series)| Some((subject, ratio(series, limit)?)))
            .partition(|(subject, _)| subject.is_weir());
        let best = others.iter().max_by(|one, other| one.1.point.total_cmp(&other.1.point));
        for (subject, ratio) in own {
            let Some((peer, theirs)) = best else { continue };
            if ratio.high < theirs.low {
                sentences.push(format!(
                    "{}, {load}, {services} Services: {} has {ratio} of straight, {} {theirs}.",
                    route.name(),
                    subject.name(),
                    peer.name()
                ));
            }
        }
    }
    sentences
}

type Figure = (&'static str, fn(&Run) -> Option<f64>, fn(f64) -> String);

fn in_programming(report: &Report) -> Vec<String> {
    let figures: [Figure; 6] = [
        ("start", |run| run.start.as_ref().map(|start| start.seconds), time),
        ("memory", |run| run.start.as_ref().map(|start| start.memory.resident as f64), bytes),
        (
            "kernel memory",
            |run| run.kernel.as_ref().map(|kernel| kernel.maps as f64 + kernel.rules as f64),
            bytes,
        ),
        ("restart", |run| run.restart.as_ref().map(|restart| restart.seconds), time),
        ("API traffic", |run| run.start.as_ref().map(|start| start.traffic.received as f64), bytes),
        ("a new Service", new_service, time),
    ];
    let mut groups: BTreeMap<Workload, BTreeMap<Subject, Vec<&Run>>> = BTreeMap::new();
    for run in &report.programming {
        groups.entry(run.workload).or_default().entry(run.subject).or_default().push(run);
    }
    let mut sentences = Vec::new();
    for (workload, subjects) in &groups {
        for (name, value, text) in figures {
            let medians = subjects.iter().map(|(subject, runs)| {
                (*subject, quantile(runs.iter().filter_map(|run| value(run)).collect(), 0.5))
            });
            let known = medians.filter(|(_, median)| median.is_finite());
            let (own, others): (Vec<_>, Vec<_>) = known.partition(|(subject, _)| subject.is_weir());
            let Some((peer, theirs)) = others.into_iter().min_by(|one, other| one.1.total_cmp(&other.1))
            else {
                continue;
            };
            for (subject, median) in own.into_iter().filter(|(_, median)| *median > theirs) {
                sentences.push(format!(
                    "{workload}, {name}: {} {}, {} {}.",
                    subject.name(),
                    text(median),
                    peer.name(),
                    text(theirs)
                ));
            }
        }
    }
    sentences
}

fn new_service(run: &Run) -> Option<f64> {
    let changes = run.idle.iter().filter(|change| change.kind == Kind::ServiceAdded);
    let median = quantile(changes.map(Change::total).collect(), 0.5);
    median.is_finite().then_some(median)
}
