//! Parts of Services that weir does not serve.
//!
//! In: invalid values, frontends that another Service already has, frontends beyond the bound. Out: one log line and one event
//! for each Service and reason.

use std::{collections::BTreeMap, fmt::Display};

use crate::{
    model::{Model, ObjectName},
    observe::{Events, Trouble},
    plan::{MOST_FRONTENDS, Planner},
};

/// A note names this many and counts the rest.
const NAMED: usize = 8;

/// Reports what was left out since the last call.
pub(super) fn tell(model: &mut Model, planner: &mut Planner, events: &Events) {
    for (service, (uid, note)) in model.take_ignored() {
        events.report(Trouble::of_service(service, "ValueIgnored", "Program", note).with_uid(uid));
    }
    for (service, beyond) in planner.take_over_limit() {
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
    events.report(Trouble::of_service(service, reason, "Program", note).with_uid(uid));
}

/// The first few, and the number of the rest.
pub(super) fn some_of<T: Display>(all: &[T]) -> String {
    let mut words: Vec<String> = all.iter().take(NAMED).map(ToString::to_string).collect();
    if all.len() > NAMED {
        words.push(format!("and {} more", all.len() - NAMED));
    }
    words.join("; ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        fixture::{model, named, service, settings},
        observe::Metrics,
    };

    #[test]
    fn each_service_and_reason_is_told_once_with_a_note_that_counts() {
        let ips = |first: u8, count: u32| -> Vec<String> {
            (0..count).map(|number| format!("{first}.0.{}.{}", number >> 8, number & 255)).collect()
        };
        let web = |name: &str, own: u8, external_ips: Vec<String>| {
            let spec = json!({
                "clusterIP": format!("10.0.0.{own}"), "externalIPs": external_ips, "ports": [{ "port": 80 }],
            });
            service(name, spec)
        };
        let mut model = model(
            settings(),
            [
                web("a", 1, ips(198, 400)),
                web("b", 2, ips(198, 400)),
                web("c", 3, ips(127, 400)),
                web("d", 4, ips(44, 20_000)),
                web("e", 5, ips(45, 1)),
            ],
        );
        let mut planner = Planner::default();
        for name in model.take_dirty() {
            planner.update(&name, model.plan(&name));
        }
        let (events, mut troubles) = Events::channel(Metrics::new());
        tell(&mut model, &mut planner, &events);
        let mut told = BTreeMap::new();
        while let Ok(trouble) = troubles.try_recv() {
            let words = (trouble.about, trouble.note);
            assert!(told.insert(trouble.reason, words).is_none(), "{told:?}");
        }
        let reasons = told.iter().map(|(reason, (about, _))| (*reason, about.clone()));
        let about = |name: &str| crate::observe::Subject::Service(named(name));
        assert_eq!(
            reasons.collect::<Vec<_>>(),
            [("FrontendTaken", about("b")), ("TooManyFrontends", about("d")), ("ValueIgnored", about("c"))]
        );
        let note = |reason: &str| told[reason].1.as_str();
        assert!(note("FrontendTaken").starts_with("198.0.0.0:80/TCP belongs to Service ns/a"));
        assert!(note("FrontendTaken").ends_with("and 392 more"), "{}", note("FrontendTaken"));
        assert!(note("TooManyFrontends").starts_with("3617 frontends"), "{}", note("TooManyFrontends"));
        assert!(note("ValueIgnored").ends_with("and 395 more"), "{}", note("ValueIgnored"));
        tell(&mut model, &mut planner, &events);
        assert!(troubles.try_recv().is_err(), "it is told once");
    }
}
