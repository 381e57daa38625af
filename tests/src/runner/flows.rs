//! Flows that a case leaves open: they stay, they move, or they end.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    cases::Difference,
    node::Location,
    subject::Kind,
    traffic::{Flow, Outcome, PATIENCE},
};

/// How long flows may take to move (K2).
const MOVE: Duration = Duration::from_secs(10);

/// A flow and the backend that answered it first, if any did.
pub(super) struct OpenFlow {
    pub(super) label: String,
    pub(super) flow: Flow,
    pub(super) backend: Option<String>,
}

impl OpenFlow {
    /// The flow is answered by the location that answered first.
    pub(super) fn stays(&self) -> Result<()> {
        let outcome = self.flow.ask(PATIENCE);
        let same =
            matches!(&outcome, Outcome::Answer(answer) if Some(&answer.backend) == self.backend.as_ref());
        ensure!(same, "{} did not stay with {:?}: {outcome}", self.label, self.backend);
        Ok(())
    }

    /// The flow comes to get no answers, or stays where that rule does not hold. The rule by which it ended.
    pub(super) fn ends(&self, kind: Kind) -> Result<Option<Difference>> {
        if !Difference::Ended.is_of(kind) {
            return self.stays().map(|()| None);
        }
        self.comes_to("end", |outcome| !matches!(outcome, Outcome::Answer(_)))?;
        Ok(Some(Difference::Ended))
    }

    /// The flow comes to be answered by this location.
    pub(super) fn moves(&self, location: Location) -> Result<()> {
        self.comes_to(&format!("move to {location}"), |outcome| {
            matches!(outcome, Outcome::Answer(answer) if answer.backend.starts_with(&format!("{location}:")))
        })
    }

    /// Asks until it is so. Until then only the old state is right: the old backend, or no answer.
    fn comes_to(&self, what: &str, is_so: impl Fn(&Outcome) -> bool) -> Result<()> {
        let deadline = Instant::now() + MOVE;
        loop {
            let outcome = self.flow.ask(PATIENCE);
            if is_so(&outcome) {
                return Ok(());
            }
            let stranger =
                matches!(&outcome, Outcome::Answer(answer) if Some(&answer.backend) != self.backend.as_ref());
            ensure!(!stranger && Instant::now() < deadline, "{} did not {what}: {outcome}", self.label);
            thread::sleep(Duration::from_millis(10));
        }
    }
}
