//! The page of a run: `docs/benchmarks/DATE/README.md` with its samples and plots, and its line in `docs/benchmarks.md`.
//!
//! In: a report, and `notes.md` beside the page, if it is there. Out: files. The pages in the repository are checked to
//! match their samples.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets::ASCII_MARKDOWN};

use super::{
    Report, bytes,
    plots::{self, Axis, Curve, Group},
    time,
};
use crate::{
    paths::{Series, Traffic, Way, cases, ratio},
    programming::{Change, Kind, Run},
    statistics::quantile,
    subject::Subject,
    workload::Workload,
};

/// Writes page, plots and samples below `docs/benchmarks`, and lists the run in `docs/benchmarks.md`. `samples` is the file
/// that the report was read from, if any. The directory of the run.
pub(crate) fn write(report: &Report, samples: Option<&Path>, docs: &Path) -> Result<PathBuf> {
    let report = report.without_paths()?;
    let date = report.began.split(' ').next().unwrap_or_default();
    let directory = docs.join("benchmarks").join(date);
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let published = directory.join("samples.json");
    // Written again, numbers may differ in their last digit.
    if samples.is_none_or(|samples| fs::canonicalize(samples).ok() != fs::canonicalize(&published).ok()) {
        report.save(&published)?;
    }
    let drawn = draw(&report, &directory)?;
    let notes = fs::read_to_string(directory.join("notes.md")).unwrap_or_default();
    let page = directory.join("README.md");
    fs::write(&page, text(&report, date, &drawn, &notes))
        .with_context(|| format!("writing {}", page.display()))?;
    let index = docs.join("benchmarks.md");
    let runs = listed(&fs::read_to_string(&index).unwrap_or_default(), date, &summary(&report));
    fs::write(&index, runs).with_context(|| format!("writing {}", index.display()))?;
    Ok(directory)
}

/// A plot that was drawn: its file, and what it shows.
type Drawn = (&'static str, &'static str);

fn text(report: &Report, date: &str, drawn: &[Drawn], notes: &str) -> String {
    let mut page = format!(
        "# Benchmark of {date}\n\n<!-- Written by `cargo xtask bench`; only notes.md is written by hand. -->\n\n\
         [How to read this page](../../benchmarks.md). {}\n{}\n## Verdicts\n\n{}",
        measured_on(report),
        noise(report),
        markdown(report.verdicts())
    );
    if !notes.trim().is_empty() {
        let _ = write!(page, "\n## Notes\n\n{}\n", notes.trim());
    }
    for part in report.parts() {
        let _ = write!(page, "\n## {}\n", part.title);
        for (file, caption) in drawn.iter().filter(|(file, _)| file.starts_with(part.prefix)) {
            let _ = write!(page, "\n![{caption}]({file})\n");
        }
        if part.tables.is_empty() {
            page += "\nNot run.\n";
        }
        for (title, table) in part.tables {
            let _ =
                write!(page, "\n<details><summary>{title}</summary>\n\n{}\n</details>\n", markdown(table));
        }
    }
    page
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
        let _ = writeln!(text, "- {name}: not run, {why}");
    }
    text
}

/// How much straight traffic differs from itself, and how wide intervals came out.
fn noise(report: &Report) -> String {
    let limits = report.paths.iter().filter(|series| series.subject.is_none() && series.rates.len() > 1);
    let spreads: Vec<f64> = limits
        .map(|series| {
            let at = |part| quantile(series.rates.clone(), part);
            (at(0.75) - at(0.25)) / at(0.5)
        })
        .collect();
    let cases = cases(&report.paths);
    let services = report.paths.iter().filter(|series| series.way == Way::Service);
    let widths: Vec<f64> = services
        .filter_map(|series| {
            ratio(series, cases.get(&(series.services, series.route, series.load))?.limit()?)
        })
        .map(|ratio| (ratio.high - ratio.low) / 2.0)
        .collect();
    if spreads.is_empty() || widths.is_empty() {
        return String::new();
    }
    format!(
        "Noise of this run: straight traffic without a proxy differs from round to round by {:.1} % (middle half of the rounds, \
         median case), and half of the intervals of ratios are within ±{:.3}, nine of ten within ±{:.3}.\n",
        quantile(spreads, 0.5) * 100.0,
        quantile(widths.clone(), 0.5),
        quantile(widths, 0.9)
    )
}

/// The line about the run in the list of all runs.
fn summary(report: &Report) -> String {
    let subjects = report.programming.iter().map(|run| run.subject);
    let subjects: BTreeSet<Subject> =
        subjects.chain(report.paths.iter().filter_map(|series| series.subject)).collect();
    let names: Vec<&str> = subjects.into_iter().map(Subject::name).collect();
    let machine = &report.machine;
    format!(
        "{}; Linux {}, {} cores ({})",
        names.join(", "),
        machine.kernel,
        machine.processors,
        machine.processor
    )
}

/// The page that lists the runs, newest first, with this one in the list.
fn listed(index: &str, date: &str, summary: &str) -> String {
    let (mut runs, rest): (Vec<&str>, Vec<&str>) = index.lines().partition(|line| line.starts_with("- [2"));
    let line = format!("- [{date}](benchmarks/{date}/README.md): {summary}");
    runs.retain(|run| !run.starts_with(&format!("- [{date}]")));
    runs.push(&line);
    runs.sort_unstable_by(|one, other| other.cmp(one));
    format!("{}\n\n{}\n", rest.join("\n").trim_end(), runs.join("\n"))
}

/// All plots there are samples for.
fn draw(report: &Report, into: &Path) -> Result<Vec<Drawn>> {
    let mut drawn = ratios(&report.paths, into)?;
    drawn.extend(costs(&report.programming, into)?);
    Ok(drawn)
}

fn ratios(series: &[Series], into: &Path) -> Result<Vec<Drawn>> {
    let most = most(series);
    let mut drawn = Vec::new();
    for (traffic, file, title) in [
        (Traffic::Connect, "paths-connect.svg", "TCP connect, request, close"),
        (Traffic::Request, "paths-request.svg", "TCP requests on a kept connection"),
    ] {
        let groups: Vec<Group> = cases(&most)
            .into_iter()
            .filter(|((_, _, load), _)| load.traffic == traffic)
            .filter_map(|((_, route, load), case)| {
                let limit = case.limit()?;
                let bars: Vec<_> = subjects(&most)
                    .filter_map(|subject| Some((subject, ratio(case.by(subject, Way::Service)?, limit)?)))
                    .collect();
                let clients =
                    if load.clients > 1 { format!(", {} clients", load.clients) } else { String::new() };
                let name = format!("{}, {}{clients}", route.name(), load.family());
                (!bars.is_empty()).then_some(Group { name, bars })
            })
            .collect();
        if !groups.is_empty() {
            plots::bars(&into.join(file), title, &groups)?;
            drawn.push((file, title));
        }
    }
    Ok(drawn)
}

fn subjects(series: &[Series]) -> impl Iterator<Item = Subject> {
    series.iter().filter_map(|series| series.subject).collect::<BTreeSet<_>>().into_iter()
}

/// The series of the number of Services that most was measured with.
fn most(all: &[Series]) -> Vec<Series> {
    let count = |services: u32| all.iter().filter(|series| series.services == services).count();
    let services = all.iter().map(|series| series.services).max_by_key(|services| count(*services));
    all.iter().filter(|series| Some(series.services) == services).cloned().collect()
}

/// File and title of a plot, the figure in it, and how it is written.
type Cost = (&'static str, &'static str, fn(&Run) -> Option<f64>, fn(f64) -> String);

const COSTS: [Cost; 3] = [
    (
        "programming-start.svg",
        "Start until the last Service works",
        |run| Some(run.start.as_ref()?.seconds),
        time,
    ),
    ("programming-change.svg", "API write until a new Service works", new_service, time),
    (
        "programming-memory.svg",
        "Resident memory",
        |run| Some(run.start.as_ref()?.memory.resident as f64),
        bytes,
    ),
];

fn new_service(run: &Run) -> Option<f64> {
    let changes = run.idle.iter().filter(|change| change.kind == Kind::ServiceAdded);
    let median = quantile(changes.map(Change::total).collect(), 0.5);
    median.is_finite().then_some(median)
}

/// Against the number of Services.
fn costs(runs: &[Run], into: &Path) -> Result<Vec<Drawn>> {
    let services = Axis { name: "Services", text: |count| format!("{count:.0}") };
    let mut drawn = Vec::new();
    for (file, title, value, text) in COSTS {
        let curves = by_services(runs, value);
        if !curves.is_empty() {
            let up = Axis { name: title, text };
            plots::curves(&into.join(file), title, services, up, &curves)?;
            drawn.push((file, title));
        }
    }
    Ok(drawn)
}

fn by_services(runs: &[Run], value: fn(&Run) -> Option<f64>) -> Vec<Curve> {
    let mut all: BTreeMap<Subject, BTreeMap<u32, Vec<f64>>> = BTreeMap::new();
    for run in runs.iter().filter(|run| run.workload == Workload::many(run.workload.services)) {
        if let Some(value) = value(run) {
            all.entry(run.subject).or_default().entry(run.workload.services).or_default().push(value);
        }
    }
    let median = |(services, values): (u32, Vec<f64>)| (f64::from(services), quantile(values, 0.5));
    all.into_iter()
        .map(|(subject, values)| Curve { subject, points: values.into_iter().map(median).collect() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_listed_newest_first_and_once() {
        let index = "# Benchmarks\n\n## Runs\n\n- [2026-11-01](benchmarks/2026-11-01/README.md): old\n";
        let twice = listed(&listed(index, "2026-12-01", "first"), "2026-12-01", "second");
        let expected = "# Benchmarks\n\n## Runs\n\n- [2026-12-01](benchmarks/2026-12-01/README.md): second\n\
                        - [2026-11-01](benchmarks/2026-11-01/README.md): old\n";
        assert_eq!(twice, expected);
    }

    #[test]
    fn a_part_that_was_not_run_is_marked() {
        let report = Report { began: "2026-12-01 02:43".to_owned(), ..Report::default() };
        let page = text(&report, "2026-12-01", &[], "by hand");
        assert!(page.contains("## Names\n\nNot run.\n") && page.contains("## Notes\n\nby hand\n"), "{page}");
    }
}
