//! Series, case by case.
//!
//! In: the series of a run. Out: for each case the limit, what each subject made of it, and the ratio of two.

use std::collections::BTreeMap;

use super::{Load, Route, Series, Way};
use crate::{
    statistics::{Estimate, estimate},
    subject::Subject,
};

/// All series of one case.
pub(crate) struct Case<'a>(BTreeMap<(Option<Subject>, Way), &'a Series>);

/// The series, case by case.
pub(crate) fn cases(all: &[Series]) -> BTreeMap<(u32, Route, Load), Case<'_>> {
    let mut cases = BTreeMap::new();
    for series in all {
        let case = cases.entry((series.services, series.route, series.load));
        let Case(case) = case.or_insert_with(|| Case(BTreeMap::new()));
        case.insert((series.subject, series.way), series);
    }
    cases
}

impl<'a> Case<'a> {
    /// Straight to the pod, with no proxy anywhere: nothing can be faster.
    #[must_use]
    pub(crate) fn limit(&self) -> Option<&'a Series> {
        self.0.get(&(None, Way::Straight)).copied()
    }

    /// One way on the nodes of one subject.
    #[must_use]
    pub(crate) fn by(&self, subject: Subject, way: Way) -> Option<&'a Series> {
        self.0.get(&(Some(subject), way)).copied()
    }
}

/// The rate of `of` relative to the rate of `to`, round by round; nothing where rounds are missing.
#[must_use]
pub(crate) fn ratio(of: &Series, to: &Series) -> Option<Estimate> {
    let complete = of.failed.is_none() && to.failed.is_none() && !of.rates.is_empty();
    let ratios: Vec<f64> = of.rates.iter().zip(&to.rates).map(|(of, to)| of / to).collect();
    complete.then(|| estimate(&ratios))
}
