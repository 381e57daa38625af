//! Series as tables.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::Table;

use super::{Load, Route, Series, Traffic, Way};
use crate::{
    report::{grid, time},
    statistics::{Estimate, PARTS, estimate, quantile},
    subject::Subject,
};

/// All series of one case.
pub(crate) struct Case<'a>(BTreeMap<(Option<Subject>, Way), &'a Series>);

/// The series, case by case.
pub(crate) fn cases(all: &[Series]) -> BTreeMap<(u32, Route, Load), Case<'_>> {
    let mut cases = BTreeMap::new();
    for series in all {
        let case = cases.entry((series.services, series.route, series.load));
        let Case(case) = case.or_insert_with(|| Case(BTreeMap::new()));
        case.insert((series.subject, series.way), series);
    }
    cases
}

impl<'a> Case<'a> {
    /// Straight, with no proxy anywhere: nothing can be faster.
    #[must_use]
    pub(crate) fn limit(&self) -> Option<&'a Series> {
        self.0.get(&(None, Way::Straight)).copied()
    }

    /// Straight, past a subject that serves others.
    #[must_use]
    pub(crate) fn in_place(&self, subject: Subject) -> Option<&'a Series> {
        self.0.get(&(Some(subject), Way::Straight)).copied()
    }

    /// What subjects made of it.
    pub(crate) fn subjects(&self) -> impl Iterator<Item = (Subject, &'a Series)> {
        self.0.iter().filter_map(|((subject, way), series)| {
            subject.filter(|_| *way == Way::Service).map(|subject| (subject, *series))
        })
    }
}

/// How often `of` does what `to` does once, round by round; nothing where rounds are missing.
#[must_use]
pub(crate) fn ratio(of: &Series, to: &Series) -> Option<Estimate> {
    let complete = of.failed.is_none() && to.failed.is_none() && !of.rates.is_empty();
    let ratios: Vec<f64> = of.rates.iter().zip(&to.rates).map(|(of, to)| of / to).collect();
    complete.then(|| estimate(&ratios))
}

fn ratio_text(of: &Series, to: Option<&Series>) -> String {
    if of.failed.is_some() {
        return "failed".to_owned();
    }
    to.and_then(|to| ratio(of, to)).map_or_else(|| "-".to_owned(), |ratio| ratio.to_string())
}

fn rate(series: &Series) -> String {
    let rate = quantile(series.rates.clone(), 0.5);
    match series.load.traffic {
        _ if rate.is_nan() => "-".to_owned(),
        // KiB to what network people count in.
        Traffic::Bulk => format!("{:.1} Gbit", rate * 1024.0 * 8.0 / 1e9),
        _ => format!("{rate:.0}"),
    }
}

fn cpu(series: &Series) -> String {
    let nanoseconds = quantile(series.cpu_nanoseconds.clone(), 0.5);
    if nanoseconds.is_nan() { "-".to_owned() } else { format!("{:.2} µs", nanoseconds / 1e3) }
}

/// One row for each case, with the ratio to the limit for each subject.
#[must_use]
pub(crate) fn ratio_table(all: &[Series]) -> Table {
    let subjects: BTreeSet<Subject> = all.iter().filter_map(|series| series.subject).collect();
    let mut header = vec!["Services", "route", "traffic", "straight, no proxy"];
    header.extend(subjects.iter().map(|subject| subject.name()));
    let mut table = grid(&header, &[1, 2]);
    for ((services, route, load), case) in cases(all) {
        let limit = case.limit();
        let mut row = vec![services.to_string(), route.name().to_owned(), load.to_string()];
        row.push(limit.map_or_else(|| "-".to_owned(), |limit| format!("{}/s", rate(limit))));
        row.extend(subjects.iter().map(|subject| {
            let own = case.subjects().find(|(one, _)| one == subject);
            own.map_or_else(|| "not loaded".to_owned(), |(_, series)| ratio_text(series, limit))
        }));
        table.add_row(row);
    }
    table
}

/// One row for each case and subject; the limit's own figures are in the row.
#[must_use]
pub(crate) fn rate_table(all: &[Series]) -> Table {
    let mut table = grid(
        &[
            "Services",
            "route",
            "traffic",
            "clients",
            "family",
            "subject",
            "limit /s",
            "/s",
            "to the limit (95 %)",
            "to straight past it (95 %)",
            "CPU each: limit",
            "CPU each",
        ],
        &[1, 2, 4, 5],
    );
    for ((services, route, load), case) in cases(all) {
        let limit = case.limit();
        for (subject, series) in case.subjects() {
            table.add_row([
                services.to_string(),
                route.name().to_owned(),
                load.traffic.name().to_owned(),
                load.clients.to_string(),
                load.family().to_string(),
                subject.name().to_owned(),
                limit.map_or_else(|| "-".to_owned(), rate),
                rate(series),
                ratio_text(series, limit),
                ratio_text(series, case.in_place(subject)),
                limit.map_or_else(|| "-".to_owned(), cpu),
                cpu(series),
            ]);
        }
    }
    table
}

/// Latencies of the first packet and of requests, of IPv4 alone.
#[must_use]
pub(crate) fn latency_table(all: &[Series]) -> Table {
    let mut table =
        grid(&["Services", "route", "latency of", "subject", "p50", "p90", "p99", "p99.9"], &[1, 2, 3]);
    for ((services, route, load), case) in cases(all) {
        let what = match load.traffic {
            Traffic::Connect => "first packet (TCP connect)",
            Traffic::Request => "request, kept connection",
            _ => continue,
        };
        if load.clients > 1 || load.v6 {
            continue;
        }
        let limit = case.limit().map(|limit| ("straight, no proxy", limit));
        let subjects = case.subjects().map(|(subject, series)| (subject.name(), series));
        for (name, series) in limit.into_iter().chain(subjects) {
            let mut row =
                vec![services.to_string(), route.name().to_owned(), what.to_owned(), name.to_owned()];
            row.extend([0.5, 0.9, 0.99, 0.999].map(|part| latency(series, part)));
            table.add_row(row);
        }
    }
    table
}

fn latency(series: &Series, part: f64) -> String {
    let found = PARTS.iter().zip(&series.latencies).find(|(known, _)| **known == part);
    found.map_or_else(|| "-".to_owned(), |(_, nanoseconds)| time(nanoseconds / 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(subject: Option<Subject>, way: Way, rates: [f64; 2]) -> Series {
        Series {
            services: 10,
            route: Route::PodSameNode,
            load: Load::alone(Traffic::Connect, false),
            subject,
            way,
            rates: rates.to_vec(),
            cpu_nanoseconds: vec![12_340.0; 2],
            latencies: PARTS.iter().map(|part| part * 1e5).collect(),
            failed: None,
        }
    }

    #[test]
    fn ratios_are_of_one_round_and_what_failed_is_shown_so() {
        let (weir, peer) = (Some(Subject::WeirEbpf), Some(Subject::KubeProxyNftables));
        let all = [
            series(None, Way::Straight, [2000.0, 1000.0]),
            series(weir, Way::Straight, [1000.0, 500.0]),
            series(weir, Way::Service, [900.0, 450.0]),
            Series { failed: Some("refused".to_owned()), ..series(peer, Way::Service, [1.0, 1.0]) },
        ];
        let text = rate_table(&all).to_string();
        let row = |name: &str| text.lines().find(|line| line.contains(name)).unwrap().to_owned();
        assert!(row("weir eBPF").contains("0.450 (0.450 to 0.450)"), "{text}");
        assert!(row("weir eBPF").contains("0.900 (0.900 to 0.900)"), "{text}");
        assert!(row("weir eBPF").contains("12.34 µs"), "{text}");
        assert!(row("kube-proxy").contains("failed"), "{text}");
        let matrix = ratio_table(&all).to_string();
        let row = matrix.lines().find(|line| line.contains("connect/IPv4")).unwrap();
        assert!(row.contains("1000/s") && row.contains("0.450") && row.contains("failed"), "{matrix}");
        let latencies = latency_table(&all).to_string();
        assert!(latencies.contains("50.0 µs") && latencies.contains("straight, no proxy"), "{latencies}");
    }
}
