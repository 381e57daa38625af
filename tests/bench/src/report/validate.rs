//! What samples cannot be.
//!
//! The form of the file is checked where it is read: every field is known and typed. Here it is what the figures say.

use anyhow::{Context as _, Result, ensure};

use super::{Report, paths::Series, programming::Run};
use crate::statistics::PARTS;

impl Report {
    /// Looks for what cannot have been measured.
    ///
    /// # Errors
    ///
    /// With the first that is found.
    pub(super) fn validate(&self) -> Result<()> {
        ensure!(self.latency_parts == PARTS, "latency_parts are others than this version's");
        ensure!(self.machine.processors > 0 && self.machine.memory_bytes > 0, "machine is empty");
        ensure!(self.seconds >= 0.0, "seconds is {}", self.seconds);
        for run in &self.programming {
            programmed(run).with_context(|| {
                format!("programming, {} with {}, round {}", run.subject.name(), run.workload, run.round)
            })?;
        }
        for recovery in &self.recoveries {
            let seconds = recovery.seconds.unwrap_or(0.0);
            let right = seconds >= 0.0 && recovery.connects >= recovery.failed;
            ensure!(right, "recovery is wrong: {recovery:?}");
        }
        for series in &self.paths {
            measured(series).with_context(|| {
                format!("paths, {} with {}: {series:?}", series.route.name(), series.services)
            })?;
        }
        for cost in &self.hooks {
            positive("hooks", &cost.nanoseconds)?;
        }
        Ok(())
    }
}

fn positive(name: &str, values: &[f64]) -> Result<()> {
    ensure!(values.iter().all(|value| value.is_finite() && *value > 0.0), "{name} has {values:?}");
    Ok(())
}

fn programmed(run: &Run) -> Result<()> {
    let Some(start) = &run.start else {
        ensure!(run.unfinished.is_some(), "there is no start, and no phase is unfinished");
        return Ok(());
    };
    positive("start", &[start.seconds, start.settled_cpu_seconds])?;
    ensure!(start.memory.peak >= start.memory.resident && start.memory.resident > 0, "memory is wrong");
    ensure!(start.traffic.received > 0, "nothing came from the API server");
    let busy = run.busy.iter().flat_map(|busy| &busy.changes);
    for change in run.idle.iter().chain(busy) {
        ensure!(change.seconds >= 0.0 && change.write_seconds > 0.0, "change is wrong: {change:?}");
    }
    let restarted = run.restart.as_ref().is_none_or(|restart| restart.connects >= restart.failed);
    ensure!(restarted, "more connections failed than were made");
    Ok(())
}

fn measured(series: &Series) -> Result<()> {
    ensure!(series.way == crate::paths::Way::Straight || series.subject.is_some(), "nobody serves");
    ensure!(series.failed.is_some() || !series.rates.is_empty(), "no rounds, and nothing failed");
    ensure!(series.rates.len() == series.cpu_nanoseconds.len(), "a CPU time for each rate");
    positive("rates", &series.rates)?;
    ensure!(series.latencies.is_sorted(), "latencies do not ascend");
    ensure!(series.latencies.is_empty() || series.latencies.len() == PARTS.len(), "latencies are missing");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::{Load, Route, Traffic, Way};

    fn series() -> Series {
        Series {
            services: 10,
            route: Route::Host,
            load: Load { traffic: Traffic::Connect, clients: 1, v6: false },
            subject: None,
            way: Way::Straight,
            rates: vec![1.0, 2.0],
            cpu_nanoseconds: vec![1.0, 1.0],
            latencies: PARTS.to_vec(),
            failed: None,
        }
    }

    #[test]
    fn impossible_series_are_found() {
        assert!(measured(&series()).is_ok());
        assert!(measured(&Series { rates: vec![1.0, f64::NAN], ..series() }).is_err());
        assert!(measured(&Series { rates: Vec::new(), cpu_nanoseconds: Vec::new(), ..series() }).is_err());
        assert!(measured(&Series { way: Way::Service, ..series() }).is_err());
        assert!(measured(&Series { latencies: vec![1.0], ..series() }).is_err());
    }

    #[test]
    fn unknown_fields_are_refused() {
        let mut value = serde_json::to_value(series()).unwrap();
        assert!(serde_json::from_value::<Series>(value.clone()).is_ok());
        value["rate"] = 3.into();
        assert!(serde_json::from_value::<Series>(value).is_err());
    }
}
