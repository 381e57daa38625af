//! `docs/benchmarks.md` and its plots, made of nothing but samples and `docs/benchmarks/notes.md`.
//!
//! In: a report. Out: files. The page in the repository is checked to be what its samples say.

use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets::ASCII_MARKDOWN};

use super::{
    Report, behind, bytes, hooks, maps, paths,
    plots::{self, Axis, Curve, Group, Scale},
    programming, time, verdicts,
};
use crate::{
    paths::{Load, Route, Series, Traffic, cases, ratio},
    programming::{Change, Kind, Run},
    statistics::{PARTS, estimate, quantile},
    subject::Subject,
    workload::Workload,
};

/// So many times the largest median is still drawn.
const TAIL: f64 = 1.5;
/// What is written below the directory of plots.
const SAMPLES: &str = "samples.json";

/// Writes page, plots and a copy of the samples.
///
/// # Errors
///
/// When a file cannot be written.
pub(crate) fn write(report: &Report, samples: &Path, docs: &Path) -> Result<()> {
    let below = docs.join("benchmarks");
    fs::create_dir_all(&below).with_context(|| format!("making {}", below.display()))?;
    let copy = below.join(SAMPLES);
    if fs::canonicalize(samples).ok() != fs::canonicalize(&copy).ok() {
        fs::copy(samples, &copy).with_context(|| format!("writing {}", copy.display()))?;
    }
    let drawn = draw(report, &below)?;
    let notes = fs::read_to_string(below.join("notes.md")).unwrap_or_default();
    let page = docs.join("benchmarks.md");
    fs::write(&page, text(report, &drawn, &notes)).with_context(|| format!("writing {}", page.display()))
}

/// A plot that was drawn: its file, and what it shows.
type Drawn = (String, &'static str);

/// The page.
fn text(report: &Report, drawn: &[Drawn], notes: &str) -> String {
    let mut page = format!(
        "# Benchmarks\n\n<!-- Written by `cargo xtask bench --render`; only benchmarks/notes.md is written by hand. -->\n\n{}\n{}",
        measured_on(report),
        READING
    );
    let _ = write!(page, "{}\n## Verdicts\n\n{}\n", noise(report), markdown(verdicts::table(report)));
    page += &behind_text(report);
    if !notes.trim().is_empty() {
        let _ = write!(page, "\n{}\n", notes.trim());
    }
    for (title, part, tables) in parts(report) {
        if tables.is_empty() {
            continue;
        }
        let _ = write!(page, "\n## {title}\n");
        for (file, caption) in drawn.iter().filter(|(file, _)| file.starts_with(part)) {
            let _ = write!(page, "\n![{caption}](benchmarks/{file})\n");
        }
        for (title, table) in tables {
            let _ =
                write!(page, "\n<details><summary>{title}</summary>\n\n{}\n</details>\n", markdown(table));
        }
    }
    page
}

/// Tables with their titles.
type Titled = Vec<(&'static str, Table)>;

/// Titles, what the names of plots begin with, and tables.
fn parts(report: &Report) -> Vec<(&'static str, &'static str, Titled)> {
    let some = |there: bool, tables: Titled| if there { tables } else { Vec::new() };
    let (series, runs) = (&report.paths, &report.programming);
    vec![
        (
            "Packet paths",
            "paths",
            some(
                !series.is_empty(),
                vec![
                    ("Part of straight, no proxy (95 %)", paths::ratio_table(series)),
                    ("Rates, CPU time, ratios", paths::rate_table(series)),
                    ("Latencies, one client, IPv4", paths::latency_table(series)),
                ],
            ),
        ),
        (
            "Programming",
            "programming",
            some(
                !runs.is_empty(),
                vec![
                    ("Start and restart", programming::start_table(runs)),
                    ("Single changes", programming::kinds_table(runs)),
                ],
            ),
        ),
        (
            "Serving again after hostile acts",
            "recovery",
            some(
                !report.recoveries.is_empty(),
                vec![(
                    "By act; the aim is 1 s, after a restart of the API server 5 s, behind one that froze 50 s",
                    programming::recovery_table(&report.recoveries),
                )],
            ),
        ),
        (
            "Socket programs",
            "hooks",
            some(!report.hooks.is_empty(), vec![("By case", hooks::table(&report.hooks))]),
        ),
        (
            "Maps of the eBPF plane by themselves",
            "maps",
            some(!report.maps.is_empty(), vec![("By shape of Service", maps::table(&report.maps))]),
        ),
    ]
}

fn markdown(mut table: Table) -> String {
    table.load_style(ASCII_MARKDOWN);
    let text = table.to_string();
    // Columns are padded to the same width, which would make the lines of the file very long.
    let squeezed = text.lines().map(|line| {
        let cells = line.trim_matches('|').split('|').map(str::trim);
        let cells = cells.map(|cell| if cell.starts_with("--") { "---" } else { cell });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    });
    squeezed.collect()
}

fn measured_on(report: &Report) -> String {
    let machine = &report.machine;
    let mut text = format!(
        "Measured {} UTC in {:.0} minutes with `cargo xtask bench {}` on Linux {}, {}, {} cores ({}), {} of memory, load {:.1} \
         at the beginning.\n\n",
        report.began,
        (report.seconds / 60.0).ceil(),
        report.arguments.join(" "),
        machine.kernel,
        machine.system,
        machine.processors,
        machine.processor,
        bytes(machine.memory_bytes as f64),
        machine.load
    );
    for (name, version) in &report.versions {
        let _ = writeln!(text, "- {name}: {version}");
    }
    for (name, why) in &report.absent {
        let _ = writeln!(text, "- {name}: not measured, {why}");
    }
    text
}

/// What does not depend on the samples.
const READING: &str = "
## How to read

**Packet paths.** Each subject has two nodes, pods and a client outside, made of network namespaces, and one more set has no
proxy at all. All are up at the same time, fed by one kube-apiserver with etcd, and take turns of some tens of milliseconds,
forwards and backwards (A B C, C B A). A ratio is the middle half's mean of the ratios of single rounds, with the 95 % interval of
4,000 bootstrap resamples; *straight, no proxy* is the limit, straight to the pod, or plain forwarding for what comes from
outside. *Straight past it* goes to the pod too, but on the subject's own node: what the proxy costs traffic that is none of its
business, and the fairer neighbour for its ClusterIPs. Two intervals that overlap are no difference.

A lone client shares one core with its servers, so its rate shows all CPU time that a request takes, and waiting for another
core's scheduler is not in it. *CPU each* is what clients, servers and the kernel for them used: process and softirq, on both
sides, divided by requests. With 16 clients both cores are full. Requests are 64 bytes and so are answers; connections are closed
by reset, or TIME_WAIT would be what is measured. Bulk and small packets are iperf3's, one flow, client and server on different
cores; bulk goes in packets of up to 64 KiB over veth, so it hides what a packet costs, and UDP packets are counted where they
arrive. Everything else is the benchmark's own client, because none of wrk, fortio, netperf and sockperf takes turns this short
without a connection of its own through the Service.

The first packet's latency is that of a TCP connect. The other node has no proxy, so that one node's work is measured; NodePorts are
asked for at that node, and what goes on to the other one passes it in both directions, with and without a proxy.

**Programming.** One subject at a time, in a fresh network namespace, beside the API server. *Start* is from the start of the
process until a connection to every Service worked; *from API server* is bytes of IP. A change counts from the moment its request
leaves for the API server until a client meets it: the first connection to a new Service, the first that an added second endpoint
answers, the last that a removed one does. What the API server itself takes to answer is in that, and beside it; *after its answer*
is 0 where clients were served before the answer was there. *Busy* is the same while 100 other slices a second change. *Restart* is
a kill, one more Service while nobody runs, and then the time from the start until that one works; *failed meanwhile* counts
connections to a Service of before, from the kill on. Whoever does not end in the time that each part has is shown with `>` and that
time, and goes no further. Memory of *maps* is their own account; memory of *rules* is what the kernel gave back when they were
flushed: a difference on a living machine, which can be off by a megabyte.

**Serving again after hostile acts.** Each act meets a subject of its own. Rules are flushed by `nft flush ruleset`, and *until all worked*
is from then until a connection to every Service worked, by packets and, in eBPF mode, at sockets too. An interface that comes up is a
pod's, and what counts is a new Service that is written at that moment. Of the sticky Service's two endpoints one goes, and what counts
is the last of its clients that moves. *Failed meanwhile* counts connections by packets to a Service of before. The aim is a second.
An API server that is started again counts from the moment it answers, until a new Service works; the aim is 5 s. One that froze is played by
a relay before it, which goes on acknowledging what comes on the connections that there are, passes nothing on, and leads new connections to the
API server. That counts from then, also until a new Service works; the aim is 50 s, because 45 s are what a client waits that has learnt
from Kubernetes' own. kube-proxy takes part in these two.

## What to keep in mind

The API server, etcd, the clients, the servers and the subject share the cores named above. A subject's work competes with the API
server's for the same change, so everybody's figures would be better with more cores, and most so for whoever needs most CPU time.
Latencies of single changes under 1 ms are near what connecting and waking up take by themselves. Rates of one machine say nothing
about another's: compare ratios. There is no wire and no network card here; both would add the same to all, and make differences
smaller.

## How to measure again

```
cargo xtask bench                                # everything; --quick takes under five minutes
cargo xtask bench --only nodeport --subject weir-nftables,kube-proxy-nftables
cargo xtask bench --list                         # the names that --only picks from
cargo xtask bench --compare docs/benchmarks/samples.json bench.json
cargo xtask bench --render bench.json            # this page
cargo xtask bench --only hostile --subject weir-ebpf,weir-ebpf@before/weir    # another build in the same run
cargo xtask bench --profile --only programming/10000 --subject weir-nftables    # folded stacks for flame graphs
```
";

/// How much straight traffic differs from itself, and how wide intervals came out.
fn noise(report: &Report) -> String {
    let limits = report.paths.iter().filter(|series| series.subject.is_none() && series.rates.len() > 1);
    let spreads: Vec<f64> = limits
        .map(|series| {
            let at = |part| quantile(series.rates.clone(), part);
            (at(0.75) - at(0.25)) / at(0.5)
        })
        .collect();
    let widths: Vec<f64> = cases(&report.paths)
        .values()
        .flat_map(|case| {
            let limit = case.limit();
            case.subjects().filter_map(move |(_, series)| ratio(series, limit?)).collect::<Vec<_>>()
        })
        .map(|ratio| (ratio.high - ratio.low) / 2.0)
        .collect();
    if spreads.is_empty() || widths.is_empty() {
        return String::new();
    }
    format!(
        "\nNoise of this run: straight traffic without a proxy differs from round to round by {:.1} % (middle half of the rounds, \
         median case), and half of the intervals of ratios are within ±{:.3}, nine of ten within ±{:.3}.\n",
        quantile(spreads, 0.5) * 100.0,
        quantile(widths.clone(), 0.5),
        quantile(widths, 0.9)
    )
}

fn behind_text(report: &Report) -> String {
    let sentences = behind::sentences(report);
    let mut text = "\n## Where weir is behind\n\nThe best of the others is surely ahead (intervals apart; medians where there are \
                    none) here:\n\n"
        .to_owned();
    if sentences.is_empty() {
        return "\n## Where weir is behind\n\nNowhere in what was measured.\n".to_owned();
    }
    for sentence in sentences {
        let _ = writeln!(text, "- {sentence}");
    }
    text
}

/// All plots there are samples for.
fn draw(report: &Report, into: &Path) -> Result<Vec<Drawn>> {
    let mut drawn = ratios(report, into)?;
    drawn.extend(latencies(report, into)?);
    drawn.extend(costs(report, into)?);
    Ok(drawn)
}

fn ratios(report: &Report, into: &Path) -> Result<Vec<Drawn>> {
    let mut drawn = Vec::new();
    let traffics = [
        (Traffic::Connect, "paths-connect.svg", "TCP connect, request, close"),
        (Traffic::Request, "paths-request.svg", "TCP requests on a kept connection"),
        (Traffic::ConnectedDatagram, "paths-udp.svg", "UDP requests, connected socket"),
        (Traffic::Bulk, "paths-bulk.svg", "TCP bulk"),
        (Traffic::Packets, "paths-packets.svg", "UDP packets of 64 bytes"),
    ];
    for (traffic, file, title) in traffics {
        let groups: Vec<Group> = cases(&most(&report.paths))
            .into_iter()
            .filter(|((_, _, load), _)| load.traffic == traffic)
            .filter_map(|((_, route, load), case)| {
                let limit = case.limit()?;
                let bars: Vec<_> = case
                    .subjects()
                    .filter_map(|(subject, series)| Some((subject, ratio(series, limit)?)))
                    .collect();
                let clients =
                    if load.clients > 1 { format!(", {} clients", load.clients) } else { String::new() };
                Some(Group { name: format!("{}, {}{clients}", route.name(), load.family()), bars })
            })
            .filter(|group| !group.bars.is_empty())
            .collect();
        if !groups.is_empty() {
            plots::bars(&into.join(file), title, &groups)?;
            drawn.push((file.to_owned(), title));
        }
    }
    Ok(drawn)
}

/// The series of the number of Services that most was measured with.
fn most(all: &[Series]) -> Vec<Series> {
    let count = |services: u32| all.iter().filter(|series| series.services == services).count();
    let services = all.iter().map(|series| series.services).max_by_key(|services| count(*services));
    all.iter().filter(|series| Some(series.services) == services).cloned().collect()
}

fn latencies(report: &Report, into: &Path) -> Result<Vec<Drawn>> {
    let wanted = [
        (
            Route::PodSameNode,
            Traffic::Connect,
            "paths-first-packet-clusterip.svg",
            "First packet, pod to ClusterIP on its node",
        ),
        (
            Route::PodSameNode,
            Traffic::Request,
            "paths-latency-clusterip.svg",
            "Requests, pod to ClusterIP on its node",
        ),
        (
            Route::NodePortRemote,
            Traffic::Connect,
            "paths-first-packet-nodeport.svg",
            "First packet, outside to a remote NodePort",
        ),
        (
            Route::NodePortRemote,
            Traffic::Request,
            "paths-latency-nodeport.svg",
            "Requests, outside to a remote NodePort",
        ),
    ];
    let all = most(&report.paths);
    let mut drawn = Vec::new();
    for (route, traffic, file, title) in wanted {
        let load = Load { traffic, clients: 1, v6: false };
        let known = cases(&all);
        let Some((_, case)) = known.iter().find(|((_, one, other), _)| (*one, *other) == (route, load))
        else {
            continue;
        };
        let limit = case.limit().map(|series| (None, series));
        let subjects = case.subjects().map(|(subject, series)| (Some(subject), series));
        let curves: Vec<Curve> = limit
            .into_iter()
            .chain(subjects)
            .filter(|(_, series)| !series.latencies.is_empty())
            .map(|(subject, series)| {
                let points = series.latencies.iter().zip(PARTS).map(|(ns, part)| (ns / 1e9, part));
                Curve { subject, points: points.collect() }
            })
            .collect();
        if curves.is_empty() {
            continue;
        }
        let curves = without_tails(curves);
        let across = Axis { name: "latency", scale: Scale::FromLeast, text: time };
        let up = Axis {
            name: "part that took no longer",
            scale: Scale::FromZero,
            text: |part| format!("{part:.1}"),
        };
        plots::curves(&into.join(file), title, across, up, &curves)?;
        drawn.push((file.to_owned(), title));
    }
    Ok(drawn)
}

/// What is far beyond all medians would leave no room for the rest; it is in the table.
fn without_tails(curves: Vec<Curve>) -> Vec<Curve> {
    let median =
        |curve: &Curve| curve.points.iter().find(|(_, part)| *part >= 0.5).map_or(0.0, |(at, _)| *at);
    let far = curves.iter().map(median).fold(0.0, f64::max) * TAIL;
    let near = |curve: Curve| Curve {
        points: curve.points.into_iter().filter(|(at, _)| *at < far).collect(),
        ..curve
    };
    curves.into_iter().map(near).collect()
}

type Cost = (&'static str, &'static str, fn(&Run) -> Option<f64>, fn(f64) -> String);

/// Against the number of Services.
fn costs(report: &Report, into: &Path) -> Result<Vec<Drawn>> {
    let wanted: [Cost; 5] = [
        (
            "programming-start.svg",
            "Start until the last Service works",
            |run| Some(run.start.as_ref()?.seconds),
            time,
        ),
        ("programming-change.svg", "API write to a new Service working", new_service, time),
        (
            "programming-memory.svg",
            "Resident memory",
            |run| Some(run.start.as_ref()?.memory.resident as f64),
            bytes,
        ),
        (
            "programming-kernel.svg",
            "Kernel memory of maps and rules",
            |run| run.kernel.as_ref().map(|kernel| kernel.maps as f64 + kernel.rules.max(1) as f64),
            bytes,
        ),
        (
            "programming-restart.svg",
            "Restart until a Service of meanwhile works",
            |run| Some(run.restart.as_ref()?.seconds),
            time,
        ),
    ];
    let mut drawn = Vec::new();
    for (file, title, value, text) in wanted {
        let curves = by_services(&report.programming, value);
        if curves.is_empty() {
            continue;
        }
        let up = Axis { name: title, scale: Scale::Powers, text };
        plots::curves(&into.join(file), title, SERVICES, up, &curves)?;
        drawn.push((file.to_owned(), title));
    }
    let curves = connects(&report.paths);
    if !curves.is_empty() {
        let (file, title) = ("paths-services.svg", "Pod to ClusterIP: connects, as a part of straight");
        let up = Axis { name: title, scale: Scale::FromZero, text: |ratio| format!("{ratio:.2}") };
        plots::curves(&into.join(file), title, SERVICES, up, &curves)?;
        drawn.push((file.to_owned(), title));
    }
    Ok(drawn)
}

const SERVICES: Axis = Axis { name: "Services", scale: Scale::Powers, text: |count| format!("{count:.0}") };

fn new_service(run: &Run) -> Option<f64> {
    let changes = run.idle.iter().filter(|change| change.kind == Kind::ServiceAdded);
    let median = quantile(changes.map(Change::total).collect(), 0.5);
    median.is_finite().then_some(median)
}

fn by_services(runs: &[Run], value: fn(&Run) -> Option<f64>) -> Vec<Curve> {
    let curve = |subject: Subject| {
        let mut all: std::collections::BTreeMap<u32, Vec<f64>> = std::collections::BTreeMap::new();
        for run in runs.iter().filter(|run| run.subject == subject) {
            if let Some(value) = value(run).filter(|_| run.workload == Workload::many(run.workload.services))
            {
                all.entry(run.workload.services).or_default().push(value);
            }
        }
        let points = all.into_iter().map(|(services, values)| (f64::from(services), quantile(values, 0.5)));
        Curve { subject: Some(subject), points: points.collect() }
    };
    let subjects: BTreeSet<Subject> = runs.iter().map(|run| run.subject).collect();
    subjects.into_iter().map(curve).filter(|curve| !curve.points.is_empty()).collect()
}

/// Connects by numbers of Services, where there are several.
fn connects(series: &[Series]) -> Vec<Curve> {
    let load = Load { traffic: Traffic::Connect, clients: 1, v6: false };
    let curve = |subject: Subject| {
        let all = cases(series);
        let of = all.iter().filter(|((_, route, other), _)| (*route, *other) == (Route::PodSameNode, load));
        let points = of.filter_map(|((services, ..), case)| {
            let (_, own) = case.subjects().find(|(one, _)| *one == subject)?;
            let limit = case.limit()?;
            let ratios: Vec<f64> =
                own.rates.iter().zip(&limit.rates).map(|(own, limit)| own / limit).collect();
            Some((f64::from(*services), estimate(&ratios).point))
        });
        Curve { subject: Some(subject), points: points.collect() }
    };
    let subjects: BTreeSet<Subject> = series.iter().filter_map(|series| series.subject).collect();
    subjects.into_iter().map(curve).filter(|curve| curve.points.len() > 1).collect()
}
