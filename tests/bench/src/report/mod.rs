//! The results: raw samples as JSON, and tables, verdicts and plots of them.
//!
//! In: samples. Out: a file, tables for the terminal (`tables`, `verdicts`), a page with plots (`page`).

use std::{collections::BTreeMap, fmt, fs, io::Write as _, path::Path};

use anyhow::{Context as _, Result, ensure};
use comfy_table::Table;
use serde::{Deserialize, Serialize};
use weir_tests::assets;

use super::{
    dns,
    hooks::Cost,
    maps,
    options::Options,
    paths::{Series, Way},
    programming::{Recovery, Run},
    subject::{Subject, version},
};

pub(super) mod page;
mod plots;
mod tables;
mod verdicts;

pub(super) use tables::columns;
use tables::ratios;

/// The format of the file; another number is another format.
const FORMAT: u32 = 2;

/// One line of progress.
pub(super) fn say(line: fmt::Arguments<'_>) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(std::io::stderr(), "{} {line}", k8s_openapi::jiff::Zoned::now().strftime("%H:%M:%S"));
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub format: u32,
    /// When it began, in UTC.
    pub began: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    pub arguments: Vec<String>,
    pub machine: Machine,
    /// The versions of subjects and tools, as they print them.
    pub versions: BTreeMap<String, String>,
    /// Subjects that could not be measured here, and why.
    pub absent: BTreeMap<String, String>,
    /// The quantiles of which [`Series::latencies`] has the values.
    pub latency_parts: Vec<f64>,
    /// The costs of the socket plane's maps, programmed by themselves.
    pub maps: Vec<maps::Run>,
    /// Each start of a subject, in the order they were made.
    pub programming: Vec<Run>,
    /// The costs of hostile acts, in the order they were done.
    #[serde(default)]
    pub recoveries: Vec<Recovery>,
    /// Rates of traffic, in the order they were measured.
    pub paths: Vec<Series>,
    /// The costs of the socket programs.
    pub hooks: Vec<Cost>,
    /// The costs of answers to names, of weir and of CoreDNS.
    #[serde(default)]
    pub names: Vec<dns::Seen>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    pub kernel: String,
    pub system: String,
    /// The name of its processor.
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
            arguments: options.command_line(),
            machine: Machine::this()?,
            versions,
            absent,
            latency_parts: super::statistics::PARTS.to_vec(),
            ..Self::default()
        })
    }

    /// Reads one.
    ///
    /// # Errors
    ///
    /// When the file is not there, or of another form.
    pub fn load(path: &Path) -> Result<Self> {
        let name = path.display();
        let text = fs::read(path).with_context(|| format!("reading {name}"))?;
        let report: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{name} is not what this version of the benchmark writes"))?;
        ensure!(report.format == FORMAT, "{name} has format {}, not {FORMAT}", report.format);
        Ok(report)
    }

    /// Writes all of it, so that a run that ends early leaves what it has.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        fs::write(path, serde_json::to_vec(self)?).with_context(|| format!("writing {}", path.display()))
    }

    /// The same with the version of each other build in place of its path, which means nothing on another machine.
    pub(super) fn without_paths(&self) -> Result<Self> {
        let mut labels: BTreeMap<&str, String> = BTreeMap::new();
        for (name, version) in &self.versions {
            let Some((_, path)) = name.split_once(" @ ").filter(|(_, path)| path.contains('/')) else {
                continue;
            };
            let number = version.split([' ', ',']).find(|word| word.contains('.')).unwrap_or("another build");
            let same =
                labels.iter().filter(|(other, label)| **other != path && label.starts_with(number)).count();
            let label = if same == 0 { number.to_owned() } else { format!("{number} ({})", same + 1) };
            labels.insert(path, label);
        }
        let mut text = serde_json::to_string(self)?;
        for (path, label) in labels {
            text = text.replace(path, &label);
        }
        Ok(serde_json::from_str(&text)?)
    }

    /// The measurements, part by part. A part without tables was not run.
    #[must_use]
    pub(super) fn parts(&self) -> Vec<Part> {
        let (paths, runs) = (&self.paths, &self.programming);
        vec![
            part("Packet paths", "paths", !paths.is_empty(), || {
                vec![
                    (
                        "Through the Service, as a part of straight without a proxy (95 %)",
                        ratios(paths, Way::Service),
                    ),
                    (
                        "Straight to the pod past each subject, as a part of the same",
                        ratios(paths, Way::Straight),
                    ),
                    ("Latencies, one client, IPv4", tables::latencies(self)),
                ]
            }),
            part("Programming", "programming", !runs.is_empty(), || {
                vec![("Start and restart", tables::starts(runs)), ("Single changes", tables::changes(runs))]
            }),
            part("Serving again after hostile acts", "recovery", !self.recoveries.is_empty(), || {
                vec![("By act", tables::recoveries(&self.recoveries))]
            }),
            part("Socket programs", "hooks", !self.hooks.is_empty(), || {
                vec![("By case", tables::hooks(&self.hooks))]
            }),
            part("Maps of the socket plane by themselves", "maps", !self.maps.is_empty(), || {
                vec![("By shape of Service", tables::maps(&self.maps))]
            }),
            part("Names", "names", !self.names.is_empty(), || {
                vec![("weir beside CoreDNS", tables::names(&self.names))]
            }),
        ]
    }

    #[must_use]
    pub(super) fn verdicts(&self) -> Table {
        verdicts::table(self)
    }
}

type Titled = Vec<(&'static str, Table)>;

/// A part of a report.
pub(super) struct Part {
    pub(super) title: &'static str,
    /// The start of the names of its plots' files.
    pub(super) prefix: &'static str,
    pub(super) tables: Titled,
}

fn part(title: &'static str, prefix: &'static str, has_run: bool, tables: impl FnOnce() -> Titled) -> Part {
    Part { title, prefix, tables: if has_run { tables() } else { Vec::new() } }
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

    #[test]
    fn another_build_is_published_by_its_version() {
        let name = "kube-proxy nftables @ /opt/next/kube-proxy".to_owned();
        let version = "Kubernetes v1.37.2, nftables v1.0.6".to_owned();
        let report = Report {
            arguments: vec!["--subject".to_owned(), "kube-proxy-nftables@/opt/next/kube-proxy".to_owned()],
            versions: [(name, version), ("etcd".to_owned(), "etcd Version: 3.6.8".to_owned())].into(),
            ..Report::default()
        };
        let published = report.without_paths().unwrap();
        assert_eq!(published.arguments[1], "kube-proxy-nftables@v1.37.2");
        assert!(published.versions.contains_key("kube-proxy nftables @ v1.37.2"), "{published:?}");
    }
}
