//! What was measured: raw samples as JSON, and tables of them.
//!
//! In: samples. Out: a file, tables for the terminal (`tables`), a page with plots (`page`), the difference to
//! another file (`compare`).

use std::{collections::BTreeMap, fmt, fs, io::Write as _, path::Path};

use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use serde::{Deserialize, Serialize};

use super::{
    hooks::{self, Cost},
    maps,
    options::Options,
    paths::{self, Series},
    programming::{self, Recovery, Run},
    subject::{Subject, version},
};
use weir_tests::assets;

mod behind;
pub(super) mod compare;
pub(super) mod page;
mod plots;
mod validate;
mod verdicts;

/// What the file looks like; another number is another form.
const FORMAT: u32 = 2;

/// One line of progress.
pub(super) fn say(line: fmt::Arguments<'_>) {
    // Progress that nobody can see is no reason to stop.
    let _ = writeln!(std::io::stderr(), "{} {line}", k8s_openapi::jiff::Zoned::now().strftime("%H:%M:%S"));
}

/// Everything one invocation measured.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// `FORMAT`.
    pub format: u32,
    /// When it began, in UTC.
    pub began: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// What it was told.
    pub arguments: Vec<String>,
    /// Where.
    pub machine: Machine,
    /// The versions of subjects and tools, in their own words.
    pub versions: BTreeMap<String, String>,
    /// Subjects that could not be measured here, and why.
    pub absent: BTreeMap<String, String>,
    /// What the values of [`Series::latencies`] are for.
    pub latency_parts: Vec<f64>,
    /// What the maps of the eBPF plane cost, programmed by themselves.
    pub maps: Vec<maps::Run>,
    /// Each start of a subject, in the order they were made.
    pub programming: Vec<Run>,
    /// What hostile acts cost, in the order they were done.
    #[serde(default)]
    pub recoveries: Vec<Recovery>,
    /// Rates of traffic, in the order they were measured.
    pub paths: Vec<Series>,
    /// What the socket programs took.
    pub hooks: Vec<Cost>,
}

/// The machine measured on.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Its kernel's release.
    pub kernel: String,
    /// Its distribution.
    pub system: String,
    /// What its processor calls itself.
    pub processor: String,
    /// Cores that the benchmark may use.
    pub processors: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Load of the last minute, when the benchmark began: what else there was to do.
    pub load: f64,
}

impl Machine {
    /// This one.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    fn this() -> Result<Self> {
        let field = |file: &str, name: &str| -> Result<String> {
            let text = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            Ok(line
                .unwrap_or_default()
                .trim_start_matches([' ', '\t', ':', '='])
                .trim_matches('"')
                .to_owned())
        };
        let memory = field("/proc/meminfo", "MemTotal")?;
        Ok(Self {
            kernel: field("/proc/sys/kernel/osrelease", "")?,
            // Not every system has it, and nothing depends on it.
            system: field("/etc/os-release", "PRETTY_NAME").unwrap_or_default(),
            processor: field("/proc/cpuinfo", "model name")?,
            processors: std::thread::available_parallelism()?.get(),
            load: field("/proc/loadavg", "")?.split(' ').next().unwrap_or_default().parse()?,
            memory_bytes: memory.split_whitespace().next().unwrap_or("0").parse::<u64>()? * 1024,
        })
    }
}

impl Report {
    /// One without samples: what is known before anything is measured.
    ///
    /// # Errors
    ///
    /// When a program is missing.
    pub(super) fn new(options: &Options, subjects: &[Subject]) -> Result<Self> {
        let mut absent = BTreeMap::new();
        let mut versions = BTreeMap::new();
        for subject in subjects {
            if let Some(why) = subject.lacks() {
                say(format_args!("{} is left out: {why}", subject.name()));
                absent.insert(subject.name().to_owned(), why.to_owned());
                continue;
            }
            versions.insert(subject.name().to_owned(), subject.version()?);
        }
        for program in ["kube-apiserver", "etcd"] {
            versions.insert(program.to_owned(), version(&assets::kubernetes(program)?)?);
        }
        let iperf = version(Path::new("iperf3")).context("the package iperf3 has it")?;
        versions.insert("iperf3".to_owned(), iperf);
        Ok(Self {
            format: FORMAT,
            began: k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M").to_string(),
            seconds: 0.0,
            arguments: options.said(),
            machine: Machine::this()?,
            versions,
            absent,
            latency_parts: super::statistics::PARTS.to_vec(),
            maps: Vec::new(),
            programming: Vec::new(),
            recoveries: Vec::new(),
            paths: Vec::new(),
            hooks: Vec::new(),
        })
    }

    /// Reads one, and looks whether it can be what it says.
    ///
    /// # Errors
    ///
    /// When the file is not there, or of another form, or holds what cannot have been measured.
    pub fn load(path: &Path) -> Result<Self> {
        let name = path.display();
        let text = fs::read(path).with_context(|| format!("reading {name}"))?;
        let report: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{name} is not what this version of the benchmark writes"))?;
        ensure!(report.format == FORMAT, "{name} has format {}, not {FORMAT}", report.format);
        report.validate().with_context(|| name.to_string())?;
        Ok(report)
    }

    /// Writes all of it, so that a run that ends early leaves what it has.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        fs::write(path, serde_json::to_vec(self)?).with_context(|| format!("writing {}", path.display()))
    }

    /// Titles and tables of what was measured.
    #[must_use]
    pub(super) fn tables(&self) -> Vec<(&'static str, Table)> {
        let (programming, paths) = (self.programming.is_empty(), self.paths.is_empty());
        let tables = [
            (self.maps.is_empty(), "Maps of the eBPF plane by themselves", maps::table(&self.maps)),
            (programming, "Programming: start and restart", programming::start_table(&self.programming)),
            (programming, "Programming: single changes", programming::kinds_table(&self.programming)),
            (
                self.recoveries.is_empty(),
                "Serving again after hostile acts (aim: 1 s, of the API server 5 s, one that froze 50 s)",
                programming::recovery_table(&self.recoveries),
            ),
            (paths, "Paths: part of straight, no proxy (95 %)", paths::ratio_table(&self.paths)),
            (paths, "Paths: rates and CPU time", paths::rate_table(&self.paths)),
            (paths, "Paths: latencies, IPv4", paths::latency_table(&self.paths)),
            (self.hooks.is_empty(), "Socket programs", hooks::table(&self.hooks)),
            (false, "Verdicts", verdicts::table(self)),
        ];
        tables.into_iter().filter(|(empty, ..)| !empty).map(|(_, title, table)| (title, table)).collect()
    }
}

/// An empty table; columns are numbers but for those in `words`.
#[must_use]
pub(super) fn grid(header: &[&str], words: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(header);
    for column in table.column_iter_mut().filter(|column| !words.contains(&column.index)) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A time with a fitting unit.
#[must_use]
pub(super) fn time(seconds: f64) -> String {
    match seconds {
        s if s.is_nan() => "-".to_owned(),
        0.0 => "0".to_owned(),
        s if s < 1e-6 => format!("{:.0} ns", s * 1e9),
        s if s < 1e-4 => format!("{:.1} µs", s * 1e6),
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 0.1 => format!("{:.1} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

/// An amount with a fitting unit.
#[must_use]
pub(super) fn bytes(bytes: f64) -> String {
    let (kibi, mebi) = (bytes / 1024.0, bytes / f64::from(1 << 20));
    match mebi.abs() {
        m if m.is_nan() => "-".to_owned(),
        m if m < 0.1 => format!("{kibi:.0} KiB"),
        m if m < 10.0 => format!("{mebi:.1} MiB"),
        _ => format!("{mebi:.0} MiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_a_fitting_unit() {
        let texts = [0.0, 0.000_000_2, 0.000_04, 0.004_21, 0.42, 13.37, f64::NAN].map(time);
        assert_eq!(texts, ["0", "200 ns", "40.0 µs", "4.2 ms", "420 ms", "13.4 s", "-"]);
        let texts = [2048.0, 3_250_000.0, 1e8, f64::NAN].map(bytes);
        assert_eq!(texts, ["2 KiB", "3.1 MiB", "95 MiB", "-"]);
    }
}
