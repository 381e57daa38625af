//! What was measured: raw samples as JSON, and a table of them.

use std::{collections::BTreeMap, fmt, fs, io::Write as _, path::Path};

use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use serde::{Deserialize, Serialize};

use super::{
    hooks::{self, Cost},
    maps,
    paths::{self, Sample},
    probe::ConnectTimes,
    process::Memory,
    statistics::quantile,
    subject::Subject,
};

/// One line of progress.
pub(super) fn say(line: fmt::Arguments<'_>) {
    // Progress that nobody can see is no reason to stop.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Everything one invocation measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// The subjects' versions, in their own words.
    pub versions: BTreeMap<String, String>,
    /// Endpoints of each Service.
    pub endpoints: u32,
    /// What the maps of the eBPF plane cost, programmed by themselves.
    pub maps: Vec<maps::Run>,
    /// Each start of a subject, in the order they were made.
    pub runs: Vec<Run>,
    /// Rates of traffic, in the order they were measured.
    pub paths: Vec<Sample>,
    /// What the socket programs took.
    pub hooks: Vec<Cost>,
}

/// The machine measured on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Machine {
    kernel: String,
    processor: String,
    processors: usize,
    memory_bytes: u64,
    /// Of the last minute, when the benchmark began: what else there was to do.
    load: f64,
}

/// One start of one subject.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    /// Which.
    pub subject: Subject,
    /// Services there were.
    pub services: u32,
    /// Which repetition.
    pub round: u32,
    /// From the start of the process until all Services worked, in seconds.
    pub start_seconds: f64,
    /// CPU seconds until then.
    pub start_cpu_seconds: f64,
    /// CPU seconds until the subject had come to rest.
    pub settled_cpu_seconds: f64,
    /// Memory when it had.
    pub memory: Memory,
    /// Memory after the changes.
    pub memory_after_changes: Option<Memory>,
    /// Single changes.
    pub changes: Vec<Change>,
    /// Connect times with that many Services.
    pub connects: ConnectTimes,
}

/// One Service added, and then one of its endpoints removed. Latencies count from the API server's answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Change {
    /// From the slice's creation, right after the Service's, to the first connection, in seconds.
    pub added_seconds: f64,
    /// Seconds that the subject was programming the kernel for it, by its own count; several syncs add up.
    pub added_sync_seconds: f64,
    /// CPU seconds that adding took the subject.
    pub added_cpu_seconds: f64,
    /// To the last connection that the removed endpoint answered, in seconds.
    pub removed_seconds: f64,
    /// As for adding.
    pub removed_sync_seconds: f64,
    /// CPU seconds that removing took the subject.
    pub removed_cpu_seconds: f64,
}

impl Machine {
    /// This one.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    pub(super) fn this() -> anyhow::Result<Self> {
        let field = |file: &str, name: &str| -> anyhow::Result<String> {
            let text = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            Ok(line.unwrap_or_default().trim_start_matches([' ', '\t', ':']).to_owned())
        };
        let memory = field("/proc/meminfo", "MemTotal")?;
        Ok(Self {
            kernel: field("/proc/sys/kernel/osrelease", "")?,
            processor: field("/proc/cpuinfo", "model name")?,
            processors: std::thread::available_parallelism()?.get(),
            load: field("/proc/loadavg", "")?.split(' ').next().unwrap_or_default().parse()?,
            memory_bytes: memory.split_whitespace().next().unwrap_or("0").parse::<u64>()? * 1024,
        })
    }
}

impl Report {
    /// Writes all of it.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub(super) fn save(&self, path: &Path) -> anyhow::Result<()> {
        fs::write(path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// A table for each part that was measured.
    #[must_use]
    pub(super) fn tables(&self) -> Vec<Table> {
        let tables = [
            (self.maps.is_empty(), maps::table(&self.maps)),
            (self.runs.is_empty(), self.programming()),
            (self.paths.is_empty(), paths::table(&self.paths)),
            (self.hooks.is_empty(), hooks::table(&self.hooks)),
        ];
        tables.into_iter().filter(|(empty, _)| !empty).map(|(_, table)| table).collect()
    }

    /// How Services are programmed: one row for each number of Services and subject.
    #[must_use]
    fn programming(&self) -> Table {
        let mut groups: BTreeMap<(u32, Subject), Vec<&Run>> = BTreeMap::new();
        for run in &self.runs {
            groups.entry((run.services, run.subject)).or_default().push(run);
        }
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_header([
            "Services",
            "subject",
            "start",
            "start CPU",
            "memory",
            "peak (+children)",
            "added p50 / p99",
            "sync",
            "CPU",
            "removed p50 / p99",
            "sync",
            "CPU",
            "connect p50 (direct)",
            "to direct",
            "to fewest",
        ]);
        for ((services, subject), runs) in &groups {
            let fewest =
                groups.iter().find(|((_, other), _)| other == subject).map_or(runs, |(_, runs)| runs);
            table.add_row(row(*services, *subject, runs, fewest));
        }
        for column in table.column_iter_mut().filter(|column| column.index != 1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

/// `fewest` are the subject's runs with the fewest Services, to compare connect times with.
fn row(services: u32, subject: Subject, runs: &[&Run], fewest: &[&Run]) -> Vec<String> {
    let over_runs = |value: fn(&Run) -> f64| quantile(runs.iter().map(|run| value(run)).collect(), 0.5);
    let over_changes = |value: fn(&Change) -> f64, q| {
        quantile(runs.iter().flat_map(|run| &run.changes).map(value).collect(), q)
    };
    let both = |value| format!("{} / {}", time(over_changes(value, 0.5)), time(over_changes(value, 0.99)));
    let (direct, service) = (connect(runs, |times| &times.direct), connect(runs, |times| &times.service));
    let (fewest_direct, fewest_service) =
        (connect(fewest, |times| &times.direct), connect(fewest, |times| &times.service));
    vec![
        services.to_string(),
        subject.name().to_owned(),
        time(over_runs(|run| run.start_seconds)),
        time(over_runs(|run| run.settled_cpu_seconds)),
        mebibytes(over_runs(|run| run.memory.resident as f64)),
        format!(
            "{} ({})",
            mebibytes(over_runs(|run| run.memory.peak as f64)),
            mebibytes(over_runs(|run| run.memory.peak_with_children as f64))
        ),
        both(|change| change.added_seconds),
        time(over_changes(|change| change.added_sync_seconds, 0.5)),
        time(over_changes(|change| change.added_cpu_seconds, 0.5)),
        both(|change| change.removed_seconds),
        time(over_changes(|change| change.removed_sync_seconds, 0.5)),
        time(over_changes(|change| change.removed_cpu_seconds, 0.5)),
        format!("{} ({})", time(service / 1e9), time(direct / 1e9)),
        format!("{:.2}", service / direct),
        // Direct connections take out what the machine was doing meanwhile.
        format!("{:.2}", (service / direct) / (fewest_service / fewest_direct)),
    ]
}

/// The median of these connect times, in nanoseconds.
fn connect(runs: &[&Run], times: fn(&ConnectTimes) -> &Vec<u64>) -> f64 {
    quantile(runs.iter().flat_map(|run| times(&run.connects)).map(|ns| *ns as f64).collect(), 0.5)
}

/// A time with a fitting unit.
pub(super) fn time(seconds: f64) -> String {
    match seconds {
        s if s.is_nan() => "-".to_owned(),
        s if s < 1e-6 => format!("{:.0} ns", s * 1e9),
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 0.1 => format!("{:.1} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

fn mebibytes(bytes: f64) -> String {
    format!("{:.0} MiB", bytes / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_fitting_unit() {
        let texts = [0.000_000_2, 0.000_04, 0.004_21, 0.42, 13.37, f64::NAN].map(time);
        assert_eq!(texts, ["200 ns", "40 µs", "4.2 ms", "420 ms", "13.4 s", "-"]);
    }
}
