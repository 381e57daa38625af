//! What of a Service is not served although its object asks for it.
//!
//! In: values that mean nothing, frontends that another Service has, frontends beyond the bound. Out: one log line and
//! one event for each Service and reason, whose note counts what it does not name.

use std::{collections::BTreeMap, fmt::Display};

use crate::{
    model::{Model, ObjectName},
    observe::{Events, Trouble},
    plan::{MOST_FRONTENDS, Planner},
};

/// As many are named in a note; the others are counted.
const NAMED: usize = 8;

/// Tells what was left out since this was last called.
pub(super) fn tell(model: &mut Model, planner: &mut Planner, events: &Events) {
    for (service, (uid, note)) in model.take_ignored() {
        events.tell(Trouble::of_service(service, "ValueIgnored", "Program", note).with_uid(uid));
    }
    for (service, beyond) in planner.take_beyond() {
        tracing::warn!(%service, beyond, most = MOST_FRONTENDS, "a Service has too many frontends: some are not served");
        let note = format!(
            "{beyond} frontends (an address and a port each) are not served, because one Service can have {MOST_FRONTENDS}"
        );
        tell_of(model, events, service, "TooManyFrontends", note);
    }
    let mut lost: BTreeMap<ObjectName, Vec<_>> = BTreeMap::new();
    for conflict in planner.take_conflicts() {
        lost.entry(conflict.service.clone()).or_default().push(conflict);
    }
    for (service, conflicts) in lost {
        let note = some_of(&conflicts);
        tracing::warn!(%service, frontends = conflicts.len(), note, "another Service has frontends that a Service claims");
        tell_of(model, events, service, "FrontendTaken", note);
    }
}

fn tell_of(model: &Model, events: &Events, service: ObjectName, reason: &'static str, note: String) {
    let uid = model.uid(&service);
    events.tell(Trouble::of_service(service, reason, "Program", note).with_uid(uid));
}

/// The first few, and how many more there are.
pub(super) fn some_of<T: Display>(all: &[T]) -> String {
    let mut words: Vec<String> = all.iter().take(NAMED).map(ToString::to_string).collect();
    if all.len() > NAMED {
        words.push(format!("and {} more", all.len() - NAMED));
    }
    words.join("; ")
}
