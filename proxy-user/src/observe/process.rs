//! The metrics that every Prometheus client has of its process, read from /proc at each scrape.
//!
//! In: nothing. Out: `process_*` metrics.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Ticks per second in /proc/PID/stat. The kernel's interface fixes it, and weir's architectures all have this value.
const TICKS: f64 = 100.0;

/// Collects the metrics of this process.
#[derive(Debug)]
pub(super) struct Process;

struct Usage {
    cpu_seconds: f64,
    start_seconds: f64,
    resident_bytes: u64,
    virtual_bytes: u64,
    open_fds: u64,
    max_fds: u64,
}

impl Usage {
    fn read() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The second field is the program's name in brackets and may contain blanks; numbers start after it.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let boot = fs::read_to_string("/proc/stat").ok()?;
        let limits = fs::read_to_string("/proc/self/limits").ok()?;
        Some(Self {
            cpu_seconds: (ticks(11)? + ticks(12)?) / TICKS,
            start_seconds: number(&boot, "btime ")? as f64 + ticks(19)? / TICKS,
            resident_bytes: number(&status, "VmRSS:")? * 1024,
            virtual_bytes: number(&status, "VmSize:")? * 1024,
            open_fds: fs::read_dir("/proc/self/fd").ok()?.count() as u64,
            max_fds: number(&limits, "Max open files").unwrap_or(u64::MAX),
        })
    }
}

/// When this process started, in seconds since the Unix epoch.
pub(super) fn start_seconds() -> Option<f64> {
    Usage::read().map(|usage| usage.start_seconds)
}

fn number(text: &str, label: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(label))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Some(usage) = Usage::read() else { return Ok(()) };
        let Usage { cpu_seconds, start_seconds, resident_bytes, virtual_bytes, open_fds, max_fds } = usage;
        let mut metric = |name, help, value: &dyn EncodeMetric| {
            value.encode(encoder.encode_descriptor(name, help, None, value.metric_type())?)
        };
        metric(
            "process_cpu_seconds",
            "User and system CPU time spent in seconds",
            &ConstCounter::new(cpu_seconds),
        )?;
        metric(
            "process_start_time_seconds",
            "Start time of the process since the Unix epoch in seconds",
            &ConstGauge::new(start_seconds),
        )?;
        let bytes = ConstGauge::new(resident_bytes);
        metric("process_resident_memory_bytes", "Resident memory size in bytes", &bytes)?;
        let bytes = ConstGauge::new(virtual_bytes);
        metric("process_virtual_memory_bytes", "Virtual memory size in bytes", &bytes)?;
        metric("process_open_fds", "Number of open file descriptors", &ConstGauge::new(open_fds))?;
        metric("process_max_fds", "Maximum number of open file descriptors", &ConstGauge::new(max_fds))
    }
}
