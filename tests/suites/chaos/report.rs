//! The results of a run: how long everything took to be right after each act, and what never was.
//!
//! In: [`Record`]s. Out: a line as each is made, a table in the end, and for a failure the command that does it again.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Result, bail};
use weir::cli::columns;
use weir_tests::subject::Plane;

use super::Settings;

pub(crate) struct Record {
    name: &'static str,
    /// From the act until everything was right in spite of it.
    pub(crate) under: Option<Duration>,
    /// From its end until everything was right.
    pub(crate) after: Option<Duration>,
    /// The condition that was not met.
    pub(crate) failure: Option<String>,
}

impl Record {
    /// One that has not been done.
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, under: None, after: None, failure: None }
    }
}

pub(crate) struct Report {
    plane: Plane,
    settings: Settings,
    records: Vec<Record>,
    load: Option<(u64, u64)>,
}

impl Report {
    /// Of a run that begins.
    pub(crate) fn new(plane: Plane, settings: &Settings) -> Self {
        say(&format!("{plane:?}: seed {}", settings.seed));
        Self { plane, settings: settings.clone(), records: Vec::new(), load: None }
    }

    pub(crate) fn add(&mut self, record: Record) {
        say(&format!(
            "{:3} {}: {}, {} after it{}",
            self.records.len() + 1,
            record.name,
            seconds(record.under),
            seconds(record.after),
            record.failure.as_ref().map_or_else(String::new, |failure| format!("\nFAILED: {failure}"))
        ));
        self.records.push(record);
    }

    /// Records the load of the last node: answered and failed calls.
    pub(crate) fn end_load(&mut self, load: (u64, u64)) {
        self.load = Some(load);
    }

    pub(crate) fn print(&self) {
        let mut rows = Vec::new();
        let mut groups: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
        for record in &self.records {
            groups.entry(record.name).or_default().push(record);
        }
        for (name, records) in groups {
            let mut under: Vec<Duration> = records.iter().filter_map(|record| record.under).collect();
            under.sort_unstable();
            let after = records.iter().filter_map(|record| record.after).max();
            let failed = records.iter().filter(|record| record.failure.is_some()).count();
            rows.push(vec![
                name.to_owned(),
                records.len().to_string(),
                seconds(under.get(under.len() / 2).copied()),
                seconds(under.last().copied()),
                seconds(after),
                failed.to_string(),
            ]);
        }
        let header = ["ACT", "TIMES", "RIGHT AGAIN, MEDIAN", "LONGEST", "LONGEST AFTER IT", "FAILED"];
        let table = columns(&header, rows.into_iter());
        say(&format!("{:?}, seed {}\n{table}", self.plane, self.settings.seed));
        if let Some((answered, failed)) = self.load {
            say(&format!("load: {answered} calls answered, {failed} not, acts that stop serving included"));
        }
    }

    /// Fails with what failed, how to do it again, and what had been done before.
    ///
    /// # Errors
    ///
    /// See above.
    pub(crate) fn verdict(&self) -> Result<()> {
        let Some(last) = self.records.iter().rposition(|record| record.failure.is_some()) else {
            return Ok(());
        };
        let failures = self.records.iter().filter_map(|record| Some((record.name, record.failure.as_ref()?)));
        let failures: Vec<String> = failures
            .map(|(name, failure)| format!("{name}: {}", failure.lines().next().unwrap_or_default()))
            .collect();
        let acts: Vec<&str> = self.records[..=last].iter().map(|record| record.name).collect();
        let test = match self.plane {
            Plane::Nftables => "by_packets",
            Plane::Ebpf => "at_sockets",
        };
        let minutes = self.settings.time.as_secs_f64() / 30.0;
        let only = if self.settings.only.is_empty() {
            String::new()
        } else {
            format!(" --acts '{}'", self.settings.only.join(","))
        };
        bail!(
            "{}\nagain: cargo xtask test chaos --seed {} --minutes {minutes}{only} -- {test}\nacts: {}",
            failures.join("\n"),
            self.settings.seed,
            acts.join(", ")
        )
    }
}

fn seconds(time: Option<Duration>) -> String {
    time.map_or_else(|| "-".to_owned(), |time| format!("{:.2} s", time.as_secs_f64()))
}

#[expect(clippy::print_stderr, reason = "test output, as it comes")]
fn say(text: &str) {
    eprintln!("{text}");
}
