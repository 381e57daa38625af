//! Whether weir is ahead of others, level with them or behind.
//!
//! In: a report, which is of one run. Out: a table with a verdict for each comparison. Both sides of one have the same number of
//! Services and were measured in the same rounds: what of two runs or two sizes stood side by side would say nothing. Where the
//! interval of the ratio holds 1, the two are level. Aims that name no other program are shown and not judged.

use comfy_table::Table;

use super::{Report, bytes, grid, time};
use crate::{
    paths::{Case, Load, Route, Series, Traffic, cases, ratio},
    programming::{Change, Kind, Run},
    statistics::{Estimate, quantile},
    subject::Subject,
    workload::Workload,
};

/// With fewer rounds an interval says nothing.
const ROUNDS: usize = 4;

/// What is compared, what was measured, and the verdict.
type Row = [String; 3];

/// One row for each comparison.
#[must_use]
pub(super) fn table(report: &Report) -> Table {
    let mut table = grid(&["what", "measured", "verdict"], &[0, 1, 2]);
    for row in path_rows(report).into_iter().chain(programming_rows(report)) {
        table.add_row(row);
    }
    table
}

/// How one side stands to the other, from the ratio of its speed to the other's.
fn verdict(ratio: &Estimate) -> &'static str {
    match (ratio.low > 1.0, ratio.high < 1.0) {
        (true, _) => "ahead",
        (_, true) => "behind",
        _ => "level",
    }
}

fn not_measured(what: String) -> Row {
    [what, "-".to_owned(), "not measured".to_owned()]
}

fn path_rows(report: &Report) -> Vec<Row> {
    let mut rows = Vec::new();
    for traffic in [Traffic::Connect, Traffic::Request, Traffic::ConnectedDatagram] {
        rows.push(beside_nothing(&report.paths, Route::PodSameNode, traffic));
    }
    for route in [Route::PodSameNode, Route::NodePortLocal, Route::NodePortRemote] {
        for traffic in [Traffic::Connect, Traffic::Request] {
            rows.push(beside_kube_proxy(&report.paths, route, traffic));
        }
    }
    rows
}

/// The eBPF plane beside a node without a proxy.
fn beside_nothing(paths: &[Series], route: Route, traffic: Traffic) -> Row {
    let what = format!("weir eBPF beside no proxy, {}, {}", route.name(), traffic.name());
    let own = |case: &Case<'_>| Some(series(case, Subject::WeirEbpf)?.rates.len());
    let Some((services, case)) = best(paths, route, traffic, own) else { return not_measured(what) };
    let (Some(own), Some(limit)) = (series(&case, Subject::WeirEbpf), case.limit()) else {
        return not_measured(what);
    };
    let Some(ratio) = ratio(own, limit) else { return not_measured(what) };
    let text = format!("{services} Services: {ratio}; {} and {}", each(own), each(limit));
    [what, text, verdict(&ratio).to_owned()]
}

/// The nftables plane beside kube-proxy's, each as a part of the same limit and in absolute time.
fn beside_kube_proxy(paths: &[Series], route: Route, traffic: Traffic) -> Row {
    let (weir, peer) = (Subject::WeirNftables, Subject::KubeProxyNftables);
    let what = format!("{} beside {}, {}, {}", weir.name(), peer.name(), route.name(), traffic.name());
    let both = |case: &Case<'_>| {
        let (own, theirs) = (series(case, weir)?, series(case, peer)?);
        Some(own.rates.len().min(theirs.rates.len()))
    };
    let Some((services, case)) = best(paths, route, traffic, both) else { return not_measured(what) };
    let (Some(own), Some(theirs)) = (series(&case, weir), series(&case, peer)) else {
        return not_measured(what);
    };
    let Some(between) = ratio(own, theirs) else { return not_measured(what) };
    let to_limit =
        |of| case.limit().and_then(|limit| ratio(of, limit)).map(|it| format!(", {it} of no proxy"));
    let part = |of| format!("{}{}", each(of), to_limit(of).unwrap_or_default());
    let text = format!("{services} Services: {between}; {} and {}", part(own), part(theirs));
    [what, text, verdict(&between).to_owned()]
}

/// The case of one client by IPv4 with the most rounds, then the most Services, of those that `rounds` knows.
fn best<'a>(
    paths: &'a [Series],
    route: Route,
    traffic: Traffic,
    rounds: impl Fn(&Case<'_>) -> Option<usize>,
) -> Option<(u32, Case<'a>)> {
    let load = Load { traffic, clients: 1, v6: false };
    let all = cases(paths).into_iter().filter(|((_, one, other), _)| (*one, *other) == (route, load));
    let known = all.filter_map(|((services, ..), case)| {
        let rounds = rounds(&case)?;
        (rounds >= ROUNDS).then_some((rounds, services, case))
    });
    known.max_by_key(|(rounds, services, _)| (*rounds, *services)).map(|(_, services, case)| (services, case))
}

fn series<'a>(case: &Case<'a>, subject: Subject) -> Option<&'a Series> {
    let found = case.subjects().find(|(one, series)| *one == subject && series.failed.is_none());
    found.map(|(_, series)| series)
}

/// How long one takes.
fn each(series: &Series) -> String {
    let rate = quantile(series.rates.clone(), 0.5);
    if rate > 0.0 { format!("{:.0} ns", 1e9 / rate) } else { "-".to_owned() }
}

fn programming_rows(report: &Report) -> Vec<Row> {
    let values = |subject, services, value: fn(&Run) -> Option<f64>| -> Vec<f64> {
        let found = |run: &&Run| run.subject == subject && run.workload == Workload::many(services);
        report.programming.iter().filter(found).filter_map(value).collect()
    };
    let (own, peer) = (Subject::WeirNftables, Subject::KubeProxyNftables);
    let beside = |what: &str, value, text: fn(f64) -> String| {
        let what = format!("10,000 Services, weir nftables beside kube-proxy nftables: {what}");
        match apart(&values(own, 10_000, value), &values(peer, 10_000, value)) {
            None => not_measured(what),
            Some((verdict, [own, peer])) => {
                let text = format!("{}; kube-proxy {}: {:.1}x", text(own), text(peer), peer / own);
                [what, text, verdict.to_owned()]
            }
        }
    };
    let start = |run: &Run| run.start.as_ref().map(|start| start.seconds);
    let memory = |run: &Run| run.start.as_ref().map(|start| start.memory.resident as f64);
    let restart = |run: &Run| run.restart.as_ref().map(|restart| restart.seconds);
    let mut rows = vec![
        beside("start", start, time),
        beside("one change", changed, time),
        beside("memory", memory, bytes),
    ];
    for subject in [Subject::WeirEbpf, Subject::WeirNftables] {
        let aim = |what: &str, value| {
            let what = format!("{}, 50,000 Services: {what}", subject.name());
            let all = values(subject, 50_000, value);
            if all.is_empty() { not_measured(what) } else { [what, time(quantile(all, 0.5)), "-".to_owned()] }
        };
        rows.push(aim("from API write to a new Service (aim: 10 ms)", changed));
        rows.push(aim("ready again (aim: 2 s)", restart));
    }
    rows
}

/// Which of two is less, if every trial of one is below every trial of the other; and the medians.
fn apart(own: &[f64], peer: &[f64]) -> Option<(&'static str, [f64; 2])> {
    let ends = |values: &[f64]| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        (low, values.iter().copied().fold(f64::NEG_INFINITY, f64::max))
    };
    if own.is_empty() || peer.is_empty() {
        return None;
    }
    let ((own_low, own_high), (peer_low, peer_high)) = (ends(own), ends(peer));
    let verdict = match (own_high < peer_low, own_low > peer_high) {
        (true, _) => "ahead",
        (_, true) => "behind",
        _ => "level",
    };
    Some((verdict, [own, peer].map(|values| quantile(values.to_vec(), 0.5))))
}

/// The median of new Services in one run.
fn changed(run: &Run) -> Option<f64> {
    let of_kind = run.idle.iter().filter(|change| change.kind == Kind::ServiceAdded);
    let seconds: Vec<f64> = of_kind.map(Change::total).collect();
    (!seconds.is_empty()).then(|| quantile(seconds, 0.5))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::Way;

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

    fn beside(paths: Vec<Series>) -> Row {
        beside_kube_proxy(&paths, Route::PodSameNode, Traffic::Connect)
    }

    #[test]
    fn a_verdict_is_of_one_size_and_of_intervals() {
        let (weir, peer) = (Some(Subject::WeirNftables), Some(Subject::KubeProxyNftables));
        let limit = measured(10, None, [5e5; 4]);
        let theirs = measured(10, peer, [4e5, 4.1e5, 4e5, 4.1e5]);
        for (rates, wanted) in [
            ([4.4e5, 4.5e5, 4.4e5, 4.5e5], "ahead"),
            ([4.1e5, 4e5, 4e5, 4.1e5], "level"),
            ([3.6e5, 3.7e5, 3.6e5, 3.7e5], "behind"),
        ] {
            let [_, text, verdict] = beside(vec![limit.clone(), measured(10, weir, rates), theirs.clone()]);
            assert_eq!(verdict, wanted, "{text}");
            assert!(text.contains(" ns") && text.contains("of no proxy"), "{text}");
        }
        // Another size has another limit.
        let [_, text, verdict] = beside(vec![limit, measured(50_000, weir, [4.4e5; 4]), theirs]);
        assert_eq!((&*text, &*verdict), ("-", "not measured"));
    }

    #[test]
    fn trials_that_overlap_are_level() {
        assert_eq!(apart(&[1.0, 2.0], &[3.0]).unwrap().0, "ahead");
        assert_eq!(apart(&[1.0, 4.0], &[3.0]).unwrap().0, "level");
        assert_eq!(apart(&[4.0], &[3.0, 2.0]).unwrap().0, "behind");
        assert!(apart(&[], &[3.0]).is_none());
    }
}
