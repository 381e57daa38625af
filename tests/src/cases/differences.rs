//! Where a subject is known to differ from the table, and why. Everything else that differs is a failure.

use super::Case;
use crate::subject::Kind;

/// A known difference.
#[derive(Clone, Copy, Debug)]
pub struct Difference {
    /// Whose.
    pub kind: Kind,
    /// The name of the case.
    pub case: &'static str,
    /// Why it is so.
    pub reason: &'static str,
}

const DIFFERENCES: [Difference; 0] = [];

/// The known difference of a subject in a case, if there is one.
#[must_use]
pub fn known(kind: Kind, case: &Case) -> Option<Difference> {
    DIFFERENCES.into_iter().find(|difference| difference.kind == kind && difference.case == case.name)
}
