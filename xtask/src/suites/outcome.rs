//! The result of a suite, read from the output of its programs.
//!
//! In: lines of test programs. Out: counts, the failures in their first lines, a table.

use std::time::Duration;

use super::list::Suite;
use crate::table::columns;

/// How a suite ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    passed: usize,
    failed: usize,
    ignored: usize,
    /// Whether cargo succeeded; it does not when a test did not compile or a program died.
    pub(super) good: bool,
    pub(super) took: Duration,
    failures: Vec<String>,
    /// How many more lines of the failed test at hand are kept.
    room: usize,
}

impl Outcome {
    /// Lines kept of one failed test: a log that is cut in the middle still ends with them.
    const LINES: usize = 30;

    /// Takes a line that a test program wrote.
    pub(super) fn read(&mut self, line: &str) {
        self.count(line);
        self.keep(line);
    }

    /// Adds up `test result: ok. 3 passed; 0 failed; 1 ignored; …`; any other line changes nothing.
    fn count(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.split("; ") {
            let Some((number, what)) = count.split_once(' ') else { continue };
            let Ok(number) = number.parse::<usize>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }

    /// Keeps what a failed test wrote, which follows `---- its name stdout ----`, without its backtrace.
    fn keep(&mut self, line: &str) {
        if line.starts_with("---- ") && line.ends_with(" stdout ----") {
            self.room = Self::LINES;
        } else if line == "failures:" || line.trim().eq_ignore_ascii_case("stack backtrace:") {
            self.room = 0;
        }
        if self.room > 0 && !line.is_empty() {
            self.room -= 1;
            self.failures.push(line.to_owned());
        }
    }

    /// The failures, if a program wrote their reasons.
    pub(super) fn failures(&self) -> Option<String> {
        (!self.failures.is_empty()).then(|| self.failures.join("\n"))
    }

    fn verdict(&self) -> &'static str {
        match (self.good, self.failed) {
            (true, _) if self.passed + self.ignored == 0 => "no tests",
            (true, _) => "ok",
            (false, 0) => "broken",
            (false, _) => "FAILED",
        }
    }
}

/// One row for each suite.
pub(super) fn table(suites: &[Suite], outcomes: &[Outcome]) -> String {
    let row = |(suite, outcome): (&Suite, &Outcome)| {
        let Outcome { passed, failed, ignored, took, .. } = outcome;
        vec![
            suite.name.clone(),
            passed.to_string(),
            failed.to_string(),
            ignored.to_string(),
            format!("{:.1}", took.as_secs_f32()),
            outcome.verdict().to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = suites.iter().zip(outcomes).map(row).collect();
    columns(&["SUITE", "PASSED", "FAILED", "IGNORED", "SECONDS", "RESULT"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Outcome {
        let mut outcome = Outcome::default();
        lines.iter().for_each(|line| outcome.read(line));
        outcome
    }

    #[test]
    fn results_add_up_over_the_programs_of_a_suite() {
        let outcome = read(&[
            "running 4 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
        ]);
        assert_eq!((outcome.passed, outcome.failed, outcome.ignored), (13, 2, 1));
    }

    #[test]
    fn messages_of_failed_tests_are_kept_without_their_backtraces() {
        let outcome = read(&[
            "test a ... FAILED",
            "failures:",
            "---- a stdout ----",
            "Error: no answer",
            "",
            "Caused by:",
            "Stack backtrace:",
            "   0: main",
            "---- b stdout ----",
            "thread 'b' panicked",
            "failures:",
            "    a",
        ]);
        let expected = [
            "---- a stdout ----",
            "Error: no answer",
            "Caused by:",
            "---- b stdout ----",
            "thread 'b' panicked",
        ];
        assert_eq!(outcome.failures, expected);
        let long: Vec<String> = (0..100).map(|number| number.to_string()).collect();
        let lines: Vec<&str> =
            std::iter::once("---- c stdout ----").chain(long.iter().map(String::as_str)).collect();
        assert_eq!(read(&lines).failures.len(), Outcome::LINES);
    }

    #[test]
    fn a_suite_that_died_or_ran_nothing_is_not_good() {
        let died = Outcome { passed: 3, ..Outcome::default() };
        assert_eq!(died.verdict(), "broken");
        assert_eq!(Outcome { good: true, ..Outcome::default() }.verdict(), "no tests");
        assert_eq!(Outcome { good: true, passed: 1, ..Outcome::default() }.verdict(), "ok");
        let text = table(&[Suite::unit()], &[died]);
        assert!(text.contains("unit") && text.contains("broken"), "{text}");
    }
}
